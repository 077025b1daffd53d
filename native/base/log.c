/* SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 1024

static enum fl_log_level lowest = FL_LOG_INFO;
static int log_pid;

static const char *const level_words[] = {"debug", "info", "warning", "error"};

void fl_log_setup(enum fl_log_level level, int vmm_pid) {
    lowest = level;
    log_pid = vmm_pid;
}

bool fl_log_level_parse(const char *word, enum fl_log_level *out) {
    for (unsigned i = 0; i < sizeof(level_words) / sizeof(level_words[0]); i++) {
        if (strcmp(word, level_words[i]) == 0) {
            *out = (enum fl_log_level)i;
            return true;
        }
    }
    return false;
}

static void emit(enum fl_log_level level, const char *event, const char *members) {
    char line[LINE_BYTES + 256];
    struct timespec now;
    struct tm utc;
    char stamp[32];
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
    int length = snprintf(
        line, sizeof(line),
        "{\"timestamp\":\"%s.%06ldZ\",\"level\":\"%s\",\"event\":\"%s\",\"vmm_pid\":%d,\"pager_pid\":%d%s%s}\n", stamp,
        now.tv_nsec / 1000, level_words[level], event, log_pid, (int)getpid(), members[0] ? "," : "", members);
    if (length >= (int)sizeof(line))
        length = (int)sizeof(line) - 1;
    if (length > 0 && write(STDERR_FILENO, line, (size_t)length) < 0)
        return; /* nobody reads the log: paging goes on */
}

void fl_log(enum fl_log_level level, const char *event, const char *format, ...) {
    char members[LINE_BYTES];
    if (level < lowest)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(members, sizeof(members), format, arguments);
    va_end(arguments);
    emit(level, event, members);
}

void fl_log_text(enum fl_log_level level, const char *event, const char *format, ...) {
    char text[LINE_BYTES / 2], members[LINE_BYTES];
    if (level < lowest)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    size_t at = (size_t)snprintf(members, sizeof(members), "\"detail\":\"");
    for (const char *c = text; *c && at < sizeof(members) - 4; c++) {
        if (*c == '"' || *c == '\\')
            members[at++] = '\\';
        members[at++] = (unsigned char)*c < 0x20 ? ' ' : *c;
    }
    members[at++] = '"';
    members[at] = '\0';
    emit(level, event, members);
}
