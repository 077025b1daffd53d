/* SPDX-License-Identifier: Apache-2.0 */
#include "track/seen.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

uint64_t *fl_seen_bits(struct fl_seen *seen, struct fl_vm *vm, uint32_t region) {
    uint64_t pages = fl_region_pages(vm, region);
    if (!seen->bits[region]) {
        seen->bits[region] = calloc((pages + 63) / 64, sizeof(uint64_t));
        seen->pages[region] = seen->bits[region] ? pages : 0;
    }
    return seen->bits[region];
}

int fl_seen_look(struct fl_seen *seen, struct fl_vm *vm, struct fl_pagemap *pagemap, struct fl_pagemap_kind kind,
                 uint32_t region, uint64_t from, uint64_t end) {
    uint64_t *bits = fl_seen_bits(seen, vm, region);
    uint64_t base = fl_address_of_page(vm, region, fl_region(vm, region)->first_page);
    if (!bits)
        return -ENOMEM;
    if (from < base || end > base + seen->pages[region] * FL_PAGE_SIZE)
        return -EAGAIN;
    return fl_pagemap_mark(pagemap, vm, kind, base, from, end, bits);
}

bool fl_seen_tell(struct fl_seen *seen, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count,
                  uint64_t *accessed) {
    uint64_t at = first - fl_region(vm, region)->first_page;
    if (!seen->begun || !seen->bits[region] || at != seen->told[region] || at + count > seen->pages[region] || at % 64)
        return false;
    memcpy(accessed, seen->bits[region] + at / 64, (count + 63) / 64 * sizeof(*accessed));
    seen->told[region] += count;
    return true;
}

/* What is seen of a page that we brought back is our own doing, until it has been armed. */
static void make_young(struct fl_vm *vm, uint64_t page) {
    fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_relaxed);
    if (entry != fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_BROUGHT, 0) &&
        __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED))
        __atomic_store_n(&vm->vault.ages[page], 0, __ATOMIC_RELAXED);
}

void fl_seen_keep(struct fl_seen *seen, struct fl_vm *vm) {
    seen->begun = false;
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        seen->told[i] = 0;
        for (uint64_t at = 0; at < seen->pages[i]; at++)
            if (seen->bits[i][at / 64] >> (at % 64) & 1)
                make_young(vm, fl_region(vm, i)->first_page + at);
    }
}

static void forget_region(struct fl_seen *seen, uint32_t region) {
    free(seen->bits[region]);
    seen->bits[region] = NULL;
    seen->pages[region] = seen->told[region] = 0;
}

void fl_seen_begin(struct fl_seen *seen) {
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++)
        if (seen->told[i])
            forget_region(seen, i);
    seen->begun = true;
}

void fl_seen_forget(struct fl_seen *seen) {
    seen->begun = false;
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++)
        forget_region(seen, i);
}
