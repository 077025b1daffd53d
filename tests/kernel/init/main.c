/* SPDX-License-Identifier: Apache-2.0 */
/* The init of a kernel under test: gets the guest ready, then runs what the host asks for (frame.h) until it is off. */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "frame.h"
#include "runs.h"
#include "setup.h"

static void obey(const struct frame *frame, const unsigned char *payload) {
    uint32_t signal = 0;

    switch (frame->kind) {
    case FRAME_RUN:
        runs_begin(frame->id, payload, frame->bytes);
        break;
    case FRAME_SIGNAL:
        memcpy(&signal, payload, frame->bytes < sizeof(signal) ? frame->bytes : sizeof(signal));
        runs_signal(frame->id, (int)signal);
        break;
    case FRAME_END:
        runs_end(frame->id);
        break;
    case FRAME_OFF:
        setup_power_off();
    default:
        setup_fatal("a frame of unknown kind %u from the host", frame->kind);
    }
}

static void say_ready(void) {
    struct utsname name;
    char text[sizeof(name.release) + 1 + SETUP_TROUBLES_BYTES];

    uname(&name);
    int length = snprintf(text, sizeof(text), "%s\n%s", name.release, setup_troubles());
    frame_send(FRAME_READY, 0, text, (size_t)length);
}

/* Signals of children are only a reason to wake up; who it was, waitpid() says. */
static int open_signals(void) {
    sigset_t children;

    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    return signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
}

int main(void) {
    struct pollfd polled[2 + RUNS_POLLED];
    struct signalfd_siginfo ignored[16];
    const unsigned char *payload;
    struct frame frame;

    if (getpid() != 1) {
        fprintf(stderr, "init: runs as the init of a test kernel only\n");
        return 2;
    }
    setup_all();
    int signals = open_signals();
    frame_open();
    say_ready();
    for (;;) {
        polled[0] = (struct pollfd){.fd = frame_descriptor(), .events = POLLIN};
        polled[1] = (struct pollfd){.fd = signals, .events = POLLIN};
        poll(polled, 2 + runs_to_poll(polled + 2), runs_next_deadline_ms());
        while (read(signals, ignored, sizeof(ignored)) > 0)
            ;
        while (frame_receive(&frame, &payload))
            obey(&frame, payload);
        runs_serve();
    }
}
