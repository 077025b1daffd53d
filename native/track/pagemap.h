/* SPDX-License-Identifier: Apache-2.0 */
/* Questions to the VMM's page tables by PAGEMAP_SCAN: many pages a call, and nothing is faulted in to answer them. */
#ifndef FL_TRACK_PAGEMAP_H
#define FL_TRACK_PAGEMAP_H

#include "base/kernel.h"
#include "swap/vm.h"

#define FL_PAGEMAP_RUNS 512u /* runs taken from the kernel by one call */

/*
 * What one entry of the page table maps where it maps a huge page. The kernel drops that as a whole when a part is armed,
 * and of the rest nobody could tell any more that it was touched: no chunk ends inside.
 */
#define FL_HUGE_BYTES (UINT64_C(2) << 20)
#define FL_HUGE_START(address) ((address) & ~(FL_HUGE_BYTES - 1))

struct fl_pagemap {
    struct page_region runs[FL_PAGEMAP_RUNS];
};

/* Pages with all of `all` (PAGE_IS_...), and with one of `any` where that is not 0. */
struct fl_pagemap_kind {
    uint64_t all, any;
};

/*
 * Shared memory that has an entry in the page table. While the kernel migrates a page its entry is "swapped", and present
 * again a moment later; memory that is really in swap has none at all, and a marker of WP is of no file.
 */
#define FL_PAGES_MAPPED ((struct fl_pagemap_kind){PAGE_IS_FILE, PAGE_IS_PRESENT | PAGE_IS_SWAPPED})
#define FL_PAGES_ACCESSED ((struct fl_pagemap_kind){PAGE_IS_ACCESSED, 0})

/*
 * Runs of pages of `kind` among the VMM addresses from *from up to `end`, into pagemap->runs. Returns how many, or a
 * negative errno; *from is moved to where the walk ended.
 */
long fl_pagemap_runs(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint64_t *from,
                     uint64_t end);

/*
 * Pages of `kind` among the VMM addresses [from, end) are marked: bit i of `bits` is the page at base + i pages. 0 or a
 * negative errno.
 */
int fl_pagemap_mark(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint64_t base,
                    uint64_t from, uint64_t end, uint64_t *bits);

/* Bit i of `bits` tells whether page first + i of `region` is of `kind`. 0 or a negative errno. */
int fl_pagemap_bits(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint32_t region,
                    uint64_t first, uint32_t count, uint64_t *bits);

#endif
