/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process that stands where a VMM stands: shared guest memory in a memfd of QEMU's name, a main thread that waits in
 * poll, and threads that write pages and check every byte of what they wrote before. Real memory, real faults; only
 * the guest around it is missing (tests/system has that).
 */
#ifndef VICTIM_H
#define VICTIM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include "frostline.h"

#define CHECK(condition, ...)                                                       \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                           \
            fputc('\n', stderr);                                                    \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define VICTIM_PAGES_MAX 65536u
#define VICTIM_THREADS_MAX 256u

enum victim_order { /* asked of the victim */
                    VICTIM_NOTHING = 0,
                    VICTIM_REMOVE, /* punch and MADV_DONTNEED pages [first, first + count), as QEMU's balloon does */
                    VICTIM_MOVE,   /* mremap all of the memory to another address */
                    VICTIM_FORK,   /* fork a child that touches all pages and checks them, wait for it */
                    VICTIM_UNMAP,  /* unmap a second region of 4 MiB that VICTIM_PLUG mapped */
                    VICTIM_PLUG,
                    VICTIM_UNPLUG, /* unmap pages [first, first + count) of it, untouched; its file stays open */
                    VICTIM_REPLUG, /* map all of its file anew, and check every byte */
                    VICTIM_TOUCH,  /* check pages [first, first + count) */
                    VICTIM_VERIFY, /* check every page */
                    VICTIM_END,
};

struct victim_shared {
    uint64_t seed;
    uint32_t pages;
    uint32_t threads;
    uint32_t pause_us;  /* between two touches of a thread */
    uint32_t stay;      /* touches of a page in a row, a random number up to this; 0: one */
    uint32_t hot_pages; /* threads stay within the first so many pages; 0: all */
    _Atomic(uint32_t) ready;
    _Atomic(uint32_t) stop;  /* threads end */
    _Atomic(uint32_t) hold;  /* threads pause */
    _Atomic(uint32_t) held;  /* how many do */
    _Atomic(uint32_t) churn; /* the main thread frees page 0 over and over: its address space is always changing */
    _Atomic(uint32_t) order; /* VICTIM_NOTHING again when it is done */
    uint32_t first, count;
    _Atomic(uint64_t) touches, writes, errors, sigbus;
    _Atomic(uint64_t) first_error; /* page + 1 */
    _Atomic(uint64_t) base;        /* where the memory is mapped */
    _Atomic(uint32_t) lock[VICTIM_PAGES_MAX];
    uint32_t generation[VICTIM_PAGES_MAX]; /* under the page's lock; 0: zeros */
};

struct victim {
    pid_t pid;
    struct victim_shared *shared;
};

/* Start a victim whose pages are all filled; exits the test when that fails. */
struct victim victim_start(uint32_t pages, uint32_t threads, uint64_t seed);
/* Give an order and wait for it, at most `seconds`. */
void victim_order(struct victim *victim, enum victim_order order, uint32_t first, uint32_t count, unsigned seconds);
/* Give an order that may have to wait for a pager; victim_wait() says when it is done. */
void victim_ask(struct victim *victim, enum victim_order order, uint32_t first, uint32_t count);
void victim_wait(struct victim *victim, unsigned seconds);
/* Threads pause, or go on. */
void victim_hold(struct victim *victim, bool hold);
/* Errors so far, after a check of every byte. */
uint64_t victim_verify(struct victim *victim, unsigned seconds);
void victim_end(struct victim *victim);

/* Start the pager program ($FROSTLINE_PAGER) on a victim. Skips the test (77) when there is none. */
pid_t pager_start(const struct victim *victim, const char *socket_path, const char *const *more);
/* Connect, retrying for at most `seconds`; exits the test when it never answers. */
struct fl_pager *pager_connect(const char *socket_path, unsigned seconds);
struct fl_reply pager_tell(struct fl_pager *pager, struct fl_command command);
struct fl_reply pager_budget(struct fl_pager *pager, uint64_t bytes, uint64_t lease_seconds);
/* Exit code of a pager that ends by itself within `seconds`. */
int pager_wait(pid_t pager, unsigned seconds);
void pager_kill(pid_t pager);
/* Status by the vault, whether a pager lives or not; exits the test when there is none. */
struct fl_status status_of(const struct victim *victim);
/* Wait until `condition(status)`; exits the test after `seconds`. */
void wait_until(const struct victim *victim, bool (*condition)(const struct fl_status *), unsigned seconds,
                const char *what);

uint64_t random_next(uint64_t *state);
uint64_t seed_of(int argc, char **argv);
/* How many rounds to do: fewer where each is slow (slow.h). */
unsigned rounds(unsigned plain, unsigned slow);
void sleep_ms(unsigned milliseconds);
/* Refuses to go on (77) where this test cannot run: not root, no userfaultfd. */
void need_paging(void);

#endif
