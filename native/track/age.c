/* SPDX-License-Identifier: Apache-2.0 */
#include "track/age.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

#define WORDS(pages) (((pages) + 63) / 64)
#define WORKING_SET_NS (120 * FL_NS_PER_SECOND)
#define LOOKS_OF_WINDOW 4u
#define LOOKS_OF_SCAN 64u /* pages of a file that were set aside and never filled stay hidden for ever */
#define LOOK_AGAIN_NS (500 * FL_NS_PER_US)

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

int fl_age_look(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint64_t *in_ram,
                uint64_t *swapped) {
    memset(swapped, 0, WORDS(count) * sizeof(*swapped));
    int error = fl_pages_cached(vm, region, first, count, in_ram);
    return error ? error : find_swapped(vm, region, first, count, in_ram, swapped);
}

static bool any_hidden(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, const uint64_t *in_ram) {
    uint32_t seen = 0;
    for (uint32_t word = 0; word < WORDS(count); word++)
        seen += (uint32_t)__builtin_popcountll(in_ram[word]);
    return seen < count && fl_pages_held(vm, region, first, count) > seen;
}

/* While the kernel moves a page from frame to frame it may look like a hole for a moment, and a hole has no age. */
static int look_until_all_show(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint32_t *looks,
                               uint64_t *in_ram, uint64_t *swapped) {
    int error = fl_age_look(vm, region, first, count, in_ram, swapped);
    for (uint32_t i = 0; i < LOOKS_OF_WINDOW && *looks && !error && any_hidden(vm, region, first, count, in_ram);
         i++, --*looks) {
        uint64_t in_ram_now[WORDS(FL_SCAN_PAGES)], swapped_now[WORDS(FL_SCAN_PAGES)];
        fl_sleep_ns(LOOK_AGAIN_NS);
        error = fl_age_look(vm, region, first, count, in_ram_now, swapped_now);
        for (uint32_t word = 0; word < WORDS(count) && !error; word++) {
            in_ram[word] |= in_ram_now[word];
            swapped[word] = (swapped[word] | swapped_now[word]) & ~in_ram[word];
        }
    }
    return error;
}

/* What was found out about the pages of a region before any age moves: two bits a page. */
enum sight { HOLE, TOUCHED, SWAPPED, IDLE };

struct sights {
    uint64_t *low, *high;
};

static enum sight sight_of(const struct sights *sights, uint64_t at) {
    return (enum sight)((sights->low[at / 64] >> (at % 64) & 1) | (sights->high[at / 64] >> (at % 64) & 1) << 1);
}

/* A fault thread may have made it young in the meantime: then it stays young. */
static void set_age(struct fl_vm *vm, uint64_t page, uint8_t from, uint8_t to) {
    if (from != to)
        (void)__atomic_compare_exchange_n(&vm->vault.ages[page], &from, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static void age_page(struct fl_vm *vm, uint64_t page, enum sight sight, struct fl_age_counts *counts,
                     uint64_t *promotions) {
    uint8_t age = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
    uint8_t older = age < UINT8_MAX ? (uint8_t)(age + 1) : age;
    fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_relaxed);
    enum fl_page_state state = fl_entry_state(entry);
    if (state == FL_PAGE_EVICTED) {
        set_age(vm, page, age, older);
        counts->evicted[older]++;
        return;
    }
    counts->swapped += sight == SWAPPED;
    bool brought = state == FL_PAGE_RESIDENT && fl_entry_tier(entry) == FL_TIER_BROUGHT;
    if (brought) {
        fl_entry before = entry;
        (void)fl_swap_entry(vm, page, &before, fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_SETTLING, 0));
        sight = sight == TOUCHED ? IDLE : sight; /* what the tracker sees of it is our own doing */
    } else if (state == FL_PAGE_RESIDENT && fl_entry_tier(entry) == FL_TIER_SETTLING) {
        fl_entry before = entry;
        (void)fl_swap_entry(vm, page, &before, 0);
    }
    if (sight == HOLE || sight == TOUCHED) {
        if (sight == TOUCHED) {
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
        /* One that was brought back may have been touched since: it goes when another scan has found it idle. */
        counts->candidates[older] += sight == IDLE && fl_entry_tier(entry) != FL_TIER_REJECTED && !brought;
    }
    set_age(vm, page, age, older);
}

static void age_region(struct fl_vm *vm, uint32_t region, const struct sights *sights, struct fl_age_counts *counts,
                       uint64_t *promotions) {
    uint64_t first = fl_region(vm, region)->first_page, pages = fl_region_pages(vm, region);
    for (uint64_t at = 0; at < pages; at++)
        age_page(vm, first + at, sight_of(sights, at), counts, promotions);
}

/* The harvest lies in `low` and is combined there with what the file has. */
static int look_at_region(struct fl_vm *vm, const struct fl_tracker_ops *ops, struct fl_tracker *tracker,
                          uint32_t region, uint32_t *looks, struct sights *sights) {
    uint64_t first = fl_region(vm, region)->first_page, pages = fl_region_pages(vm, region);
    sights->low = calloc(WORDS(pages), sizeof(uint64_t));
    sights->high = calloc(WORDS(pages), sizeof(uint64_t));
    int error = sights->low && sights->high ? 0 : -ENOMEM;
    for (uint64_t at = 0; at < pages && !error; at += FL_SCAN_PAGES) {
        uint64_t in_ram[WORDS(FL_SCAN_PAGES)], swapped[WORDS(FL_SCAN_PAGES)];
        uint32_t count = pages - at < FL_SCAN_PAGES ? (uint32_t)(pages - at) : FL_SCAN_PAGES;
        uint64_t *low = sights->low + at / 64, *high = sights->high + at / 64;
        error = ops->harvest(tracker, region, first + at, count, low);
        if (!error)
            error = look_until_all_show(vm, region, first + at, count, looks, in_ram, swapped);
        for (uint32_t word = 0; word < WORDS(count) && !error; word++) {
            uint64_t touched = low[word] & (in_ram[word] | swapped[word]);
            high[word] = (in_ram[word] | swapped[word]) & ~touched;
            low[word] = touched | (in_ram[word] & ~touched);
        }
    }
    return error;
}

static void publish(struct fl_vm *vm, const struct fl_age_counts *counts, const uint64_t *promotions) {
    struct fl_stats *stats = vm->vault.stats;
    uint64_t resident[FL_AGE_BINS] = {0}, evicted[FL_AGE_BINS] = {0}, resident_pages = 0, working_set = 0;
    uint64_t interval_ns = fl_vault_age_interval_ms(&vm->vault) * FL_NS_PER_MS;
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
    uint32_t regions = fl_region_count(vm), looks = LOOKS_OF_SCAN;
    struct sights sights[FL_MAX_REGIONS] = {{NULL, NULL}};
    uint64_t promotions[256] = {0};
    uint64_t start_ns = fl_now();
    int error = ops->collect ? ops->collect(tracker) : 0;
    /* Everything that can fail comes first: a scan that does must not age half of the VM. */
    for (uint32_t i = 0; i < regions && !error; i++) {
        if (!atomic_load(&fl_region(vm, i)->gone))
            error = look_at_region(vm, ops, tracker, i, &looks, &sights[i]);
    }
    FL_COUNT(vm, harvest_ns, fl_now() - start_ns);
    if (!error) {
        memset(counts, 0, sizeof(*counts));
        /* First: after a kill from here on they must not move again at once. */
        atomic_store(&vm->vault.header->aged_ns, fl_now());
        for (uint32_t i = 0; i < regions; i++) {
            if (sights[i].high)
                age_region(vm, i, &sights[i], counts, promotions);
        }
        publish(vm, counts, promotions);
    }
    for (uint32_t i = 0; i < regions; i++) {
        free(sights[i].low);
        free(sights[i].high);
    }
    return error;
}

void fl_age_recount(struct fl_vm *vm, uint32_t interval_ms) {
    _Atomic(uint32_t) *counted_in = &vm->vault.header->age_interval_ms;
    uint64_t before_ms = fl_vault_age_interval_ms(&vm->vault);
    atomic_store(counted_in, 0); /* whoever comes after a kill from here on finds ages of both kinds */
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        uint64_t first = fl_region(vm, i)->first_page, end = first + fl_region_pages(vm, i);
        for (uint64_t page = first; page < end; page++) {
            uint8_t age = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
            uint64_t now = age * before_ms / interval_ms;
            set_age(vm, page, age, now < UINT8_MAX ? (uint8_t)now : UINT8_MAX);
        }
    }
    atomic_store(counted_in, interval_ms);
}
