/* SPDX-License-Identifier: Apache-2.0 */
#include "track/pagemap.h"

#include <errno.h>
#include <string.h>

long fl_pagemap_runs(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint64_t *from,
                     uint64_t end) {
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = *from,
        .end = end,
        .vec = (uint64_t)(uintptr_t)pagemap->runs,
        .vec_len = FL_PAGEMAP_RUNS,
        .category_mask = kind.all,
        .category_anyof_mask = kind.any,
        .return_mask = kind.all,
    };
    long count = ioctl(vm->pagemap_fd, PAGEMAP_SCAN, &scan);
    if (count < 0)
        return -errno;
    if (scan.walk_end <= *from) /* it says that it has walked, and has not: never go round in a circle */
        return -EPROTO;
    *from = scan.walk_end;
    return count;
}

int fl_pagemap_mark(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint64_t base,
                    uint64_t from, uint64_t end, uint64_t *bits) {
    while (from < end) {
        long runs = fl_pagemap_runs(pagemap, vm, kind, &from, end);
        if (runs < 0)
            return (int)runs;
        for (long i = 0; i < runs; i++) {
            uint64_t first = (pagemap->runs[i].start - base) / FL_PAGE_SIZE;
            uint64_t to = (pagemap->runs[i].end - base) / FL_PAGE_SIZE;
            for (uint64_t page = first; page < to; page++)
                bits[page / 64] |= UINT64_C(1) << (page % 64);
        }
    }
    return 0;
}

int fl_pagemap_bits(struct fl_pagemap *pagemap, struct fl_vm *vm, struct fl_pagemap_kind kind, uint32_t region,
                    uint64_t first, uint32_t count, uint64_t *bits) {
    uint64_t base = fl_address_of_page(vm, region, first);
    memset(bits, 0, (count + 63) / 64 * sizeof(*bits));
    return fl_pagemap_mark(pagemap, vm, kind, base, base, base + (uint64_t)count * FL_PAGE_SIZE, bits);
}
