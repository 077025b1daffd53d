/* SPDX-License-Identifier: Apache-2.0 */
/* Back ahead of a touch: prefetch, drain, and giving back what a smaller budget no longer covers. Mover only. */
#ifndef FL_SWAP_BRING_H
#define FL_SWAP_BRING_H

#include "swap/vm.h"

struct fl_bringer;
int fl_bringer_create(struct fl_vm *vm, struct fl_bringer **out);
void fl_bringer_destroy(struct fl_bringer *bringer);

/*
 * Bring back what is away of pages [first, first + count) of `region`, adjacent pages by one call, but only those at
 * most `max_age` scans old and no more than *allowance pages (which is counted down). Adds to *pages. Their ages go on,
 * for nobody has touched them; `fresh` makes them young, so that they stay for a while. What the VMM has unmapped of the
 * region goes into its file.
 * 0; -EAGAIN when the address space keeps changing; -ESRCH when the VMM ended. A damaged page is poisoned and
 * the rest goes on.
 */
int fl_bring_range(struct fl_bringer *bringer, uint32_t region, uint64_t first, uint64_t count, uint8_t max_age,
                   bool fresh, uint64_t *allowance, uint64_t *pages);

/*
 * Write what is away of a region that the VMM has unmapped back into its file, so that nothing depends on us any
 * more. What the VMM has written there meanwhile stays. 0 or a negative errno; -EAGAIN: but for what it has freed, perhaps.
 */
int fl_bring_into_file(struct fl_bringer *bringer, uint32_t region, uint64_t *pages);

#endif
