/* SPDX-License-Identifier: Apache-2.0 */
#include "console.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

enum { LINE_BYTES = 1001 };

static pthread_mutex_t line_lock = PTHREAD_MUTEX_INITIALIZER;

static void write_whole(const char *text, size_t length) {
    while (length > 0) {
        ssize_t done = write(STDOUT_FILENO, text, length);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return; /* the host's end is gone: nobody is left to be told */
        text += done;
        length -= (size_t)done;
    }
}

void console_line(const char *format, ...) {
    char line[LINE_BYTES];
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    if (length > LINE_BYTES - 2)
        length = LINE_BYTES - 2;
    line[length] = '\n';
    pthread_mutex_lock(&line_lock);
    write_whole(line, (size_t)length + 1);
    pthread_mutex_unlock(&line_lock);
}

void console_fatal(const char *format, ...) {
    int error = errno;
    char text[512];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    console_line("{\"event\":\"fatal\",\"text\":\"%s: %s\"}", text, strerror(error));
    tcdrain(STDOUT_FILENO);
    if (getpid() == 1)
        reboot(RB_POWER_OFF); /* the end of init would be a panic, whose trace hides what was said here */
    exit(1);
}

void console_no_echo(void) {
    struct termios terminal;

    if (tcgetattr(STDIN_FILENO, &terminal) != 0)
        return; /* a pipe, which echoes nothing */
    terminal.c_lflag &= ~(tcflag_t)(ECHO | ECHONL | ICANON | ISIG);
    terminal.c_oflag &= ~(tcflag_t)OPOST;
    tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
}
