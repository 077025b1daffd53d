/* SPDX-License-Identifier: Apache-2.0 */
#include "track/age.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

#define WORDS(pages) (((pages) + 63) / 64)
#define WORKING_SET_NS (120 * FL_NS_PER_SECOND)

uint32_t fl_age_bin(uint8_t age) {
    uint32_t bin = 0;
    while (bin + 1 < FL_AGE_BINS && age >= fl_age_bin_edge(bin + 1))
        bin++;
    return bin;
}

/*
 * What is in the file, but not in host RAM: swapped out by the host. Asked only of what is not cached, and holes are
 * skipped in one call; a call that looks for the end of data instead would walk all of a full file, each time.
 */
static int find_swapped(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, const uint64_t *cached,
                        uint64_t *swapped) {
    int fd = vm->memory[region].fd;
    off_t start = (off_t)fl_offset_of_page(vm, region, first);
    for (uint32_t i = 0; i < count; i++) {
        if (cached[i / 64] >> (i % 64) & 1)
            continue;
        off_t data = lseek(fd, start + (off_t)i * FL_PAGE_SIZE, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno; /* ENXIO: nothing up to the end of the file */
        uint64_t at = (uint64_t)(data - start) / FL_PAGE_SIZE;
        if (at >= count)
            return 0;
        if (!(cached[at / 64] >> (at % 64) & 1))
            swapped[at / 64] |= UINT64_C(1) << (at % 64);
        i = (uint32_t)at;
    }
    return 0;
}

int fl_age_resident(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint64_t *resident,
                    uint64_t *swapped_pages) {
    uint64_t swapped[WORDS(FL_SCAN_PAGES)] = {0};
    *swapped_pages = 0;
    int error = fl_pages_cached(vm, region, first, count, resident);
    if (!error)
        error = find_swapped(vm, region, first, count, resident, swapped);
    for (uint32_t word = 0; word < WORDS(count); word++) {
        *swapped_pages += (uint64_t)__builtin_popcountll(swapped[word]);
        resident[word] |= swapped[word];
    }
    return error;
}

static void age_page(struct fl_vm *vm, uint64_t page, bool resident, bool accessed, struct fl_age_counts *counts,
                     uint64_t *promotions) {
    uint8_t age = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
    uint8_t older = age < UINT8_MAX ? (uint8_t)(age + 1) : age;
    fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_relaxed);
    enum fl_page_state state = fl_entry_state(entry);
    if (state == FL_PAGE_EVICTED) {
        __atomic_store_n(&vm->vault.ages[page], older, __ATOMIC_RELAXED);
        counts->evicted[older]++;
        return;
    }
    bool brought = state == FL_PAGE_RESIDENT && fl_entry_tier(entry) == FL_TIER_BROUGHT;
    if (brought) { /* what the tracker sees of it is our own doing */
        (void)fl_swap_entry(vm, page, &entry, 0);
        accessed = false;
    }
    if (!resident || accessed) {
        if (resident) {
            counts->accessed++;
            promotions[age]++;
            counts->resident[0]++;
            counts->candidates[0]++;
        }
        if (entry == fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0))
            (void)fl_swap_entry(vm, page, &entry, 0); /* new content, new chance */
        older = 0;
    } else {
        counts->resident[older]++;
        counts->candidates[older] += fl_entry_tier(entry) != FL_TIER_REJECTED;
    }
    if (older != age)
        __atomic_store_n(&vm->vault.ages[page], older, __ATOMIC_RELAXED);
}

static int age_region(struct fl_vm *vm, uint32_t region, const uint64_t *accessed, struct fl_age_counts *counts,
                      uint64_t *promotions) {
    uint64_t resident[WORDS(FL_SCAN_PAGES)];
    uint64_t first = fl_region(vm, region)->first_page, pages = fl_region_pages(vm, region);
    for (uint64_t at = 0; at < pages; at += FL_SCAN_PAGES) {
        uint32_t count = pages - at < FL_SCAN_PAGES ? (uint32_t)(pages - at) : FL_SCAN_PAGES;
        uint64_t swapped;
        int error = fl_age_resident(vm, region, first + at, count, resident, &swapped);
        if (error)
            return error;
        counts->swapped += swapped;
        for (uint32_t i = 0; i < count; i++)
            age_page(vm, first + at + i, resident[i / 64] >> (i % 64) & 1,
                     accessed[(at + i) / 64] >> ((at + i) % 64) & 1, counts, promotions);
    }
    return 0;
}

static int harvest_region(struct fl_vm *vm, const struct fl_tracker_ops *ops, struct fl_tracker *tracker,
                          uint32_t region, uint64_t *accessed) {
    uint64_t first = fl_region(vm, region)->first_page, pages = fl_region_pages(vm, region);
    for (uint64_t at = 0; at < pages; at += FL_SCAN_PAGES) {
        uint32_t count = pages - at < FL_SCAN_PAGES ? (uint32_t)(pages - at) : FL_SCAN_PAGES;
        int error = ops->harvest(tracker, region, first + at, count, accessed + at / 64);
        if (error)
            return error;
    }
    return 0;
}

static void publish(struct fl_vm *vm, const struct fl_age_counts *counts, const uint64_t *promotions) {
    struct fl_stats *stats = vm->vault.stats;
    uint64_t resident[FL_AGE_BINS] = {0}, evicted[FL_AGE_BINS] = {0}, resident_pages = 0, working_set = 0;
    uint64_t interval_ns = atomic_load(&vm->vault.header->scan_interval_ms) * FL_NS_PER_MS;
    for (uint32_t age = 0; age < 256; age++) {
        uint32_t bin = fl_age_bin((uint8_t)age);
        resident_pages += counts->resident[age];
        resident[bin] += counts->resident[age] * FL_PAGE_SIZE;
        evicted[bin] += counts->evicted[age] * FL_PAGE_SIZE;
        if (promotions[age])
            FL_COUNT(vm, promotions[bin], promotions[age]);
        if (age * interval_ns <= WORKING_SET_NS)
            working_set += (counts->resident[age] + counts->evicted[age]) * FL_PAGE_SIZE;
    }
    atomic_fetch_add(&stats->sequence, 1);
    memcpy(stats->status.resident_age_bytes, resident, sizeof(resident));
    memcpy(stats->status.evicted_age_bytes, evicted, sizeof(evicted));
    stats->status.resident_bytes = (resident_pages - counts->swapped) * FL_PAGE_SIZE;
    stats->status.swapped_bytes = counts->swapped * FL_PAGE_SIZE;
    stats->status.working_set_bytes = working_set;
    stats->status.scan_interval_ns = interval_ns;
    atomic_fetch_add(&stats->sequence, 1);
}

int fl_age_scan(struct fl_vm *vm, const struct fl_tracker_ops *ops, struct fl_tracker *tracker,
                struct fl_age_counts *counts) {
    uint32_t regions = fl_region_count(vm);
    uint64_t *accessed[FL_MAX_REGIONS] = {NULL};
    uint64_t promotions[256] = {0};
    uint64_t start_ns = fl_now();
    int error = ops->collect ? ops->collect(tracker) : 0;
    /* Everything is harvested before anything moves: a scan that fails half-way must not age half of the VM. */
    for (uint32_t i = 0; i < regions && !error; i++) {
        if (atomic_load(&fl_region(vm, i)->gone))
            continue;
        accessed[i] = malloc(WORDS(fl_region_pages(vm, i)) * sizeof(uint64_t));
        error = accessed[i] ? harvest_region(vm, ops, tracker, i, accessed[i]) : -ENOMEM;
    }
    FL_COUNT(vm, harvest_ns, fl_now() - start_ns);
    memset(counts, 0, sizeof(*counts));
    for (uint32_t i = 0; i < regions && !error; i++) {
        if (accessed[i])
            error = age_region(vm, i, accessed[i], counts, promotions);
    }
    if (!error)
        publish(vm, counts, promotions);
    for (uint32_t i = 0; i < regions; i++)
        free(accessed[i]);
    return error;
}
