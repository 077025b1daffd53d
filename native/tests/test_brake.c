/* SPDX-License-Identifier: Apache-2.0 */
/* The local brake: off at once when a VM stalls, back on in small steps. */
#include <stdio.h>

#include "base/clock.h"
#include "pager/brake.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                               \
        }                                                                           \
    } while (0)

int main(void) {
    const uint64_t second = FL_NS_PER_SECOND, ms = FL_NS_PER_MS;
    struct fl_brake brake;
    uint64_t now = 100 * second, stall = 7 * second;
    fl_brake_init(&brake, 10, now, stall);

    /* Nothing stalls: eviction stays fully allowed. */
    for (int i = 0; i < 5; i++)
        CHECK(fl_brake_step(&brake, now += second, stall) == FL_BRAKE_OFF);
    /* Below the target (10 ms a second) too. */
    CHECK(fl_brake_step(&brake, now += second, stall += 9 * ms) == FL_BRAKE_OFF);
    /* A little over: one small step back, at once, not at the end of a second. */
    CHECK(fl_brake_step(&brake, now += 10 * ms, stall += 11 * ms) == FL_BRAKE_OFF - 10);
    /* Ten times the target: a quarter of everything. */
    CHECK(fl_brake_step(&brake, now += 10 * ms, stall += 100 * ms) == FL_BRAKE_OFF - 10 - 250);
    /* Twenty times: all of it. */
    CHECK(fl_brake_step(&brake, now += 10 * ms, stall += 200 * ms) == 0);
    /* Calm again: 1 % a second, no faster however often it is asked. */
    for (int i = 0; i < 50; i++)
        CHECK(fl_brake_step(&brake, now += 10 * ms, stall) == 0);
    CHECK(fl_brake_step(&brake, now += second, stall) == 10);
    for (int i = 0; i < 200; i++)
        fl_brake_step(&brake, now += second, stall);
    CHECK(fl_brake_step(&brake, now + 1, stall) == FL_BRAKE_OFF);
    return 0;
}
