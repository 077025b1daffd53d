/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fence.h"
#include "base/kernel.h"

#define MOVING_LOOKS 100u
#define MOVING_NS (500 * FL_NS_PER_US)

bool fl_page_of_address(struct fl_vm *vm, uint64_t address, uint64_t *page, uint32_t *region) {
    uint32_t count = fl_region_count(vm);
    for (uint32_t i = 0; i < count; i++) {
        struct fl_vault_region *r = fl_region(vm, i);
        uint64_t start = atomic_load_explicit(&r->vmm_addr, memory_order_acquire);
        if (address - start < r->length && !atomic_load_explicit(&r->gone, memory_order_acquire)) {
            *page = r->first_page + (address - start) / FL_PAGE_SIZE;
            *region = i;
            return true;
        }
    }
    return false;
}

bool fl_region_of_page(struct fl_vm *vm, uint64_t page, uint32_t *region) {
    uint32_t count = fl_region_count(vm);
    for (uint32_t i = 0; i < count; i++) {
        if (page - fl_region(vm, i)->first_page < fl_region_pages(vm, i)) {
            *region = i;
            return true;
        }
    }
    return false;
}

int fl_pages_cached(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint64_t *cached) {
    uint8_t vector[FL_CACHED_PAGES];
    uint64_t skip = first - fl_region(vm, region)->first_page;
    memset(cached, 0, (count + 63) / 64 * sizeof(*cached));
    if (mincore((uint8_t *)vm->memory[region].mapping + skip * FL_PAGE_SIZE, (size_t)count * FL_PAGE_SIZE, vector))
        return -errno;
    for (uint32_t i = 0; i < count; i++)
        cached[i / 64] |= (uint64_t)(vector[i] & 1) << (i % 64);
    return 0;
}

int64_t fl_pages_held(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count) {
    uint64_t range[] = {fl_offset_of_page(vm, region, first), (uint64_t)count * FL_PAGE_SIZE};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } found = {0};
    return syscall(SYS_cachestat, vm->memory[region].fd, range, &found, 0) ? -errno : (int64_t)found.cached;
}

int fl_file_has(struct fl_vm *vm, uint32_t region, uint64_t page) {
    off_t offset = (off_t)fl_offset_of_page(vm, region, page);
    for (uint32_t i = 0; i < MOVING_LOOKS; i++) {
        off_t data = lseek(vm->memory[region].fd, offset, SEEK_DATA);
        if (data == offset)
            return 1;
        if (data < 0 && errno != ENXIO) /* ENXIO: nothing up to the end of the file */
            return -errno;
        /* The frame that a page moves to is no data until all of it is there. */
        if (fl_pages_held(vm, region, page, 1) <= 0)
            return 0;
        fl_sleep_ns(MOVING_NS);
    }
    return 0; /* set aside (fallocate), and never filled */
}

static bool is_freed(fl_entry now, fl_entry mine) {
    return now != mine && now == fl_entry_make(fl_entry_state(mine), FL_TIER_ZERO, 0);
}

bool fl_freed(struct fl_vm *vm, uint64_t page, fl_entry mine) {
    return is_freed(atomic_load_explicit(fl_slot(vm, page), memory_order_acquire), mine);
}

bool fl_settle(struct fl_vm *vm, uint64_t page, fl_entry mine, fl_entry after) {
    fl_entry now = mine; /* or damaged meanwhile: its owner puts it right */
    while (!fl_swap_entry(vm, page, &now, is_freed(now, mine) ? 0 : after))
        ;
    return !is_freed(now, mine);
}

bool fl_forks_wait(struct fl_vm *vm) {
    for (uint32_t i = 0; i < FL_FORKS_MAX; i++)
        if (atomic_load(&vm->forks[i]) >= 0)
            return true;
    return false;
}

void fl_count_away(struct fl_vm *vm, enum fl_tier tier, int64_t pages) {
    FL_COUNT(vm, evicted_pages, pages);
    if (tier == FL_TIER_ZERO)
        FL_COUNT(vm, evicted_zero_pages, pages);
    else if (tier == FL_TIER_SAME)
        FL_COUNT(vm, evicted_same_pages, pages);
    else
        FL_COUNT(vm, evicted_ram_pages, pages);
}

void fl_record(struct fl_vm *vm, enum fl_record_kind kind, enum fl_tier tier, uint64_t start_ns, uint64_t pages,
               uint64_t bytes, uint64_t page) {
    struct fl_stats *stats = vm->vault.stats;
    uint64_t sequence = atomic_fetch_add_explicit(&stats->record_sequence, 1, memory_order_acq_rel) + 1;
    struct fl_record *record = &stats->records[sequence % FL_RECORDS_MAX];
    /* Readers take a record only while its sequence is the one they expect, before and after copying. */
    __atomic_store_n(&record->sequence, 0, __ATOMIC_RELEASE);
    fl_fence();
    record->kind = kind;
    record->tier = tier;
    record->start_ns = start_ns;
    record->end_ns = fl_now();
    record->pages = pages;
    record->bytes = bytes;
    record->page = page;
    record->generation = atomic_load_explicit(&vm->vault.header->budget.generation, memory_order_relaxed);
    __atomic_store_n(&record->sequence, sequence, __ATOMIC_RELEASE);
}
