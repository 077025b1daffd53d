/* SPDX-License-Identifier: Apache-2.0 */
/* One clock for everything that outlives a process: CLOCK_BOOTTIME, so that leases run on while a host sleeps. */
#ifndef FL_BASE_CLOCK_H
#define FL_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define FL_NS_PER_SECOND UINT64_C(1000000000)
#define FL_NS_PER_MS UINT64_C(1000000)
#define FL_NS_PER_US UINT64_C(1000)

static inline uint64_t fl_clock_read(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * FL_NS_PER_SECOND + (uint64_t)now.tv_nsec;
}

static inline uint64_t fl_now(void) {
    return fl_clock_read(CLOCK_BOOTTIME);
}

static inline void fl_sleep_ns(uint64_t nanoseconds) {
    struct timespec pause = {.tv_sec = (time_t)(nanoseconds / FL_NS_PER_SECOND),
                             .tv_nsec = (long)(nanoseconds % FL_NS_PER_SECOND)};
    nanosleep(&pause, NULL);
}

#endif
