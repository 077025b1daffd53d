/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/brake.h"

#include "base/clock.h"

#define STEP_NS FL_NS_PER_SECOND
#define FULL_BACKOFF_AT 20u /* times the target: everything off (oomd's coeff_backoff) */
#define PROBE_PERMILLE 10u  /* at most 1 % a step */

void fl_brake_init(struct fl_brake *brake, uint32_t target_permille, uint64_t now_ns, uint64_t stall_ns) {
    *brake = (struct fl_brake){
        .target_permille = target_permille ? target_permille : 1,
        .permille = FL_BRAKE_OFF,
        .last_ns = now_ns,
        .last_stall_ns = stall_ns,
    };
}

uint32_t fl_brake_step(struct fl_brake *brake, uint64_t now_ns, uint64_t stall_ns) {
    uint64_t stalled = stall_ns - brake->last_stall_ns;
    uint64_t allowed = STEP_NS / 1000 * brake->target_permille; /* in a whole step */
    if (stalled >= allowed) {
        uint64_t ratio_permille = stalled * 1000 / allowed / FULL_BACKOFF_AT; /* 1000 = full back-off */
        uint64_t cut = ratio_permille >= 1000 ? FL_BRAKE_OFF : ratio_permille * ratio_permille / 1000;
        cut = cut < PROBE_PERMILLE ? PROBE_PERMILLE : cut; /* over the target never stands still */
        brake->permille = brake->permille > cut ? brake->permille - (uint32_t)cut : 0;
    } else if (now_ns - brake->last_ns < STEP_NS) {
        return brake->permille;
    } else {
        brake->permille += PROBE_PERMILLE;
        if (brake->permille > FL_BRAKE_OFF)
            brake->permille = FL_BRAKE_OFF;
    }
    brake->last_ns = now_ns;
    brake->last_stall_ns = stall_ns;
    return brake->permille;
}
