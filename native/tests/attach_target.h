/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process to attach to, whose main thread watches itself: whatever it waits for or computes, it checks that nobody
 * has meddled with it. What it looks like from outside is taken before and after, and must be the same.
 */
#ifndef ATTACH_TARGET_H
#define ATTACH_TARGET_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#include "attach/attach.h"
#include "attach/gate.h"
#include "attach/inspect.h"

#define MUST(condition, ...)                                                        \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                           \
            fputc('\n', stderr);                                                    \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* What the main thread does, again and again. */
enum target_mode {
    TARGET_SPIN,    /* all registers, flags and the red zone hold values that are checked */
    TARGET_PPOLL,   /* with a time limit and a signal mask: ends by time, never by EINTR */
    TARGET_SLEEP,   /* nanosleep: never short */
    TARGET_FUTEX,   /* a futex with a time limit */
    TARGET_READ,    /* a pipe that another thread writes numbers to: none missing */
    TARGET_SIGNALS, /* spins while queued signals with numbers come in: none missing, none twice */
    TARGET_MODES
};
const char *target_mode_name(enum target_mode mode);

struct target_shared {
    _Atomic(uint32_t) ready;
    _Atomic(uint32_t) mode;
    _Atomic(uint64_t) rounds;
    _Atomic(uint64_t) signals;
    _Atomic(uint32_t) quiet; /* no more signals; quieted follows when the last one has been sent */
    _Atomic(uint32_t) quieted;
    _Atomic(uint64_t) errors;
    char first_error[160];
};

struct target {
    pid_t pid;
    struct target_shared *shared;
    uint64_t memory; /* where it maps its memfd */
    uint64_t bytes;
};

/* How the target sets itself up before it becomes busy; run in it. May be NULL. */
typedef void (*target_setup)(void *context);

/* `name` of its memfd: QEMU's when NULL. Exits the test when the target does not come up. */
struct target target_start(enum target_mode mode, const char *name, target_setup setup, void *context);
void target_set_mode(struct target *target, enum target_mode mode);
/* Wait until the main thread has gone round `rounds` more times: it lives. Exits the test when it does not. */
void target_lives(struct target *target, unsigned rounds);
/* Wait until it has had a signal, where any are sent; in TARGET_SIGNALS. */
void target_is_signalled(struct target *target);
/* Send SIGSTOP, and wait until it has stopped. SIGCONT resumes it. */
void target_stop(struct target *target);
/* Exits the test when the target has seen anything wrong. */
void target_is_well(struct target *target);
void target_end(struct target *target);

/* Descriptors, mappings, signal masks, scheduling, as text; free() it. */
char *target_picture(const struct target *target);

/* A vault of a size for tests, with the gate at TARGET_GATE_OFFSET. */
#define TARGET_GATE_OFFSET 8192u
int target_vault(void);

/* Exits with 77 where attaching is impossible. */
void target_need_root(void);
void target_pause_us(unsigned us);
uint64_t target_random(uint64_t *state);
/* How many rounds to do: fewer where each is slow (slow.h). */
unsigned target_rounds(unsigned plain, unsigned slow);
bool target_sends_signals(void);

#endif
