/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The local brake: needs nobody. Stall above its target backs eviction off at once, up to all of it; below it,
 * eviction is let on again by at most 1 % a step. The shape (quadratic back-off, small probes) is that of Senpai in
 * oomd; the stall is exact here, because every fault passes through us.
 */
#ifndef FL_PAGER_BRAKE_H
#define FL_PAGER_BRAKE_H

#include <stdint.h>

#define FL_BRAKE_OFF 1000u /* permille of eviction allowed */

struct fl_brake {
    uint32_t target_permille; /* stalled time per time, e.g. 10 = 1 % */
    uint32_t permille;        /* what is allowed now */
    uint64_t last_ns;
    uint64_t last_stall_ns;
};

void fl_brake_init(struct fl_brake *brake, uint32_t target_permille, uint64_t now_ns, uint64_t stall_ns);
/* Call often: backs off on any call, probes forward once a second. Returns the permille allowed. */
uint32_t fl_brake_step(struct fl_brake *brake, uint64_t now_ns, uint64_t stall_ns);

#endif
