/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/recover.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "swap/evict.h"
#include "swap/load.h"
#include "swap/uffd.h"

static bool file_has(struct fl_vm *vm, uint32_t region, uint64_t page) {
    return fl_file_has(vm, region, page) > 0;
}

static void make_resident(struct fl_vm *vm, uint64_t page) {
    atomic_store(fl_slot(vm, page), 0);
}

/* The entry cannot be believed: what the file has is right; what it has not is lost and must not read as zeros. */
static void damaged(struct fl_vm *vm, uint32_t region, uint64_t page) {
    if (file_has(vm, region, page)) {
        make_resident(vm, page);
        return;
    }
    fl_entry shown = fl_entry_make(FL_PAGE_LOADING, FL_TIER_ZERO, 0);
    fl_poison(vm, region, page, shown);
}

/*
 * Punch a page that was protected since it was copied. True when it is away now. Where its copy is damaged or it cannot be
 * punched, the file's page is as good; where zeros were left instead of a hole, the copy goes over them.
 */
static bool punch(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry) {
    static uint8_t buffer[FL_PAGE_SIZE] __attribute__((aligned(FL_PAGE_SIZE)));
    const void *content;
    uint32_t stored_bytes;
    if (fl_fetch(vm, page, entry, buffer, &content, &stored_bytes) || fl_punch(vm, region, page, 1))
        return !file_has(vm, region, page);
    if (!fl_punch_left_zeros(vm, region, page, 1))
        return true;
    fl_write_over_zeros(vm, region, page, 1, content);
    return false;
}

/* What is away, by tier: shown when all is counted, so that nobody takes a half-done count for little. */
struct away {
    uint64_t pages[FL_TIER_RAM + 1];
};

/* Settle one entry that is not zero. Returns 1 when something was in flight. */
static int settle(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry, struct away *away) {
    if (!fl_entry_valid(entry)) {
        damaged(vm, region, page);
        return 1;
    }
    switch (fl_entry_state(entry)) {
    case FL_PAGE_RESIDENT:
    case FL_PAGE_POISONED:
        return 0;
    case FL_PAGE_FREEZING:
    case FL_PAGE_BUSY:
        make_resident(vm, page); /* a protection that is still on goes with the first write to it */
        return 1;
    case FL_PAGE_PUNCHING:
    case FL_PAGE_EVICTED:
    case FL_PAGE_LOADING:
        break;
    }
    /* A load that got as far as the file left a page that may be newer than the copy. */
    if (fl_entry_state(entry) == FL_PAGE_LOADING && file_has(vm, region, page)) {
        make_resident(vm, page);
        return 1;
    }
    if (fl_entry_tier(entry) == FL_TIER_RAM && fl_pool_rebuild_mark(vm->pool, fl_entry_payload(entry), page)) {
        damaged(vm, region, page);
        return 1;
    }
    int in_flight = fl_entry_state(entry) != FL_PAGE_EVICTED;
    if (fl_entry_state(entry) == FL_PAGE_PUNCHING && !punch(vm, region, page, entry)) {
        make_resident(vm, page);
        return 1;
    }
    atomic_store(fl_slot(vm, page), fl_entry_with_state(entry, FL_PAGE_EVICTED));
    away->pages[fl_entry_tier(entry)]++;
    return in_flight;
}

int fl_recover(struct fl_vm *vm, uint64_t *fixed, struct fl_refused *why) {
    *fixed = 0;
    struct away away = {0};
    int error = fl_pool_rebuild_begin(vm->pool);
    if (error) /* without it every stored page would look damaged */
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot rebuild the pool of process %d: %s; free memory on the host",
                         vm->pid, strerror(-error));
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        bool forget = vm->memory[i].fd < 0; /* unmapped and closed by the VMM: nobody can ask for it again */
        if (forget && !atomic_load(&region->gone))
            return fl_refuse(why, FL_REFUSAL_INTERNAL, "region %u of process %d is not open", i, vm->pid);
        for (uint64_t page = region->first_page, end = page + fl_region_pages(vm, i); page < end; page++) {
            fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_relaxed);
            if (entry && forget)
                make_resident(vm, page);
            else if (entry)
                *fixed += (uint64_t)settle(vm, i, page, entry, &away);
        }
    }
    fl_pool_rebuild_end(vm->pool);
    /* Counted anew, because the dead pager may have been between a change and its count. */
    FL_SET(vm, evicted_zero_pages, away.pages[FL_TIER_ZERO]);
    FL_SET(vm, evicted_same_pages, away.pages[FL_TIER_SAME]);
    FL_SET(vm, evicted_ram_pages, away.pages[FL_TIER_RAM]);
    FL_SET(vm, evicted_pages, away.pages[FL_TIER_ZERO] + away.pages[FL_TIER_SAME] + away.pages[FL_TIER_RAM]);
    return 0;
}
