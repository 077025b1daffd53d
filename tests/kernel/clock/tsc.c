/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prints how many thousand times a second this machine's time stamp counter counts. QEMU's emulation passes that counter
 * on to its guest, whose kernel would find out the rate by timers that are emulated too: on a busy machine it is then
 * wrong by a multiple, and so are all its clocks.
 */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

enum { TRIES = 50, APART_US = 200000 };

struct moment {
    uint64_t ns, ticks, doubt_ns;
};

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Both clocks at one moment, as far as nobody came in between. */
static struct moment look(void) {
    struct moment best = {.doubt_ns = UINT64_MAX};

    for (int i = 0; i < TRIES; i++) {
        uint64_t before_ns = now_ns(), ticks = __rdtsc(), after_ns = now_ns();

        if (after_ns - before_ns < best.doubt_ns)
            best = (struct moment){before_ns, ticks, after_ns - before_ns};
    }
    return best;
}

int main(void) {
    struct moment first = look();

    usleep(APART_US);
    struct moment last = look();
    printf("%llu\n", (unsigned long long)((double)(last.ticks - first.ticks) * 1e6 / (double)(last.ns - first.ns)));
    return 0;
}
