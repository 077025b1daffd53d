/* SPDX-License-Identifier: Apache-2.0 */
#include "track/late.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int fl_late_begin(struct fl_late *late, struct fl_vm *vm) {
    fl_late_end(late);
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        late->pages[i] = fl_region_pages(vm, i);
        late->seen[i] = calloc((late->pages[i] + 63) / 64, sizeof(uint64_t));
        if (!late->seen[i]) {
            fl_late_end(late);
            return -ENOMEM;
        }
    }
    return 0;
}

void fl_late_note(struct fl_late *late, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count,
                  const uint64_t *accessed) {
    uint64_t at = first - fl_region(vm, region)->first_page;
    if (!late->seen[region] || at != late->told[region] || at + count > late->pages[region] || at % 64)
        return;
    memcpy(late->seen[region] + at / 64, accessed, (count + 63) / 64 * sizeof(*accessed));
    late->told[region] += count;
}

static void make_young(struct fl_vm *vm, uint64_t page) {
    if (__atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED))
        __atomic_store_n(&vm->vault.ages[page], 0, __ATOMIC_RELAXED);
}

int fl_late_look(struct fl_late *late, struct fl_vm *vm, struct fl_pagemap *pagemap, struct fl_pagemap_kind kind,
                 uint32_t region, uint64_t from, uint64_t end) {
    uint64_t first = fl_region(vm, region)->first_page, base = fl_address_of_page(vm, region, first);
    const uint64_t *seen = late->seen[region];
    if (from < base || end > base + fl_region(vm, region)->length)
        return -EAGAIN;
    if (end > base + late->told[region] * FL_PAGE_SIZE)
        end = base + late->told[region] * FL_PAGE_SIZE;
    while (seen && from < end) {
        long runs = fl_pagemap_runs(pagemap, vm, kind, &from, end);
        if (runs < 0)
            return (int)runs;
        for (long i = 0; i < runs; i++) {
            uint64_t at = (pagemap->runs[i].start - base) / FL_PAGE_SIZE;
            uint64_t to = (pagemap->runs[i].end - base) / FL_PAGE_SIZE;
            for (; at < to; at++) {
                if (!(seen[at / 64] >> (at % 64) & 1))
                    make_young(vm, first + at);
            }
        }
    }
    return 0;
}

void fl_late_end(struct fl_late *late) {
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        free(late->seen[i]);
        late->seen[i] = NULL;
        late->told[i] = late->pages[i] = 0;
    }
}
