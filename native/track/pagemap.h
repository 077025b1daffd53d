/* SPDX-License-Identifier: Apache-2.0 */
/* Questions to the VMM's page tables by PAGEMAP_SCAN: many pages a call, and nothing is faulted in to answer them. */
#ifndef FL_TRACK_PAGEMAP_H
#define FL_TRACK_PAGEMAP_H

#include "base/kernel.h"
#include "swap/vm.h"

#define FL_PAGEMAP_RUNS 512u /* runs taken from the kernel by one call */

struct fl_pagemap {
    struct page_region runs[FL_PAGEMAP_RUNS];
};

/*
 * Runs of pages that have `category` (PAGE_IS_...) among the VMM addresses from *from up to `end`, into
 * pagemap->runs. Returns how many, or a negative errno; *from is moved to where the walk ended.
 */
long fl_pagemap_runs(struct fl_pagemap *pagemap, struct fl_vm *vm, uint64_t category, uint64_t *from, uint64_t end);

/* Bit i of `bits` tells whether page first + i of `region` has `category`. 0 or a negative errno. */
int fl_pagemap_bits(struct fl_pagemap *pagemap, struct fl_vm *vm, uint64_t category, uint32_t region, uint64_t first,
                    uint32_t count, uint64_t *bits);

#endif
