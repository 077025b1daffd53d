/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/choose.h"

#include <string.h>

#include "base/clock.h"

#define STEP_NS (20 * FL_NS_PER_MS)
#define WORDS (FL_WINDOW_PAGES / 64)

void fl_choose_restart(struct fl_chooser *chooser) {
    chooser->out = chooser->back = (struct fl_pass){0};
}

static void begin(struct fl_chooser *chooser, struct fl_pass *pass, uint32_t threshold) {
    *pass = (struct fl_pass){
        .active = true, .threshold = (uint8_t)threshold, .page = fl_region(chooser->vm, 0)->first_page};
}

/* The window under the pass; false when the walk is over. Moves the pass on to the next. */
static bool next_window(struct fl_chooser *chooser, struct fl_pass *pass, uint32_t *region, uint64_t *first,
                        uint32_t *count) {
    struct fl_vm *vm = chooser->vm;
    while (pass->region < fl_region_count(vm)) {
        struct fl_vault_region *r = fl_region(vm, pass->region);
        uint64_t end = r->first_page + fl_region_pages(vm, pass->region);
        if (!atomic_load(&r->gone) && pass->page < end) {
            *region = pass->region;
            *first = pass->page;
            *count = end - pass->page < FL_WINDOW_PAGES ? (uint32_t)(end - pass->page) : FL_WINDOW_PAGES;
            pass->page += *count;
            return true;
        }
        pass->region++;
        pass->page = end;
    }
    pass->active = false;
    return false;
}

/* The youngest age such that everything as old or older fits; if not even the oldest do, the oldest there are. */
static bool oldest_that_fit(const struct fl_age_counts *counts, uint64_t allowance, uint8_t min_age,
                            uint8_t *threshold) {
    uint64_t sum = 0;
    bool any = false;
    for (uint32_t age = 255;; age--) {
        if (age < min_age)
            return any;
        if (counts->candidates[age]) {
            sum += counts->candidates[age];
            if (any && sum > allowance)
                return true;
            *threshold = (uint8_t)age;
            any = true;
            if (sum > allowance)
                return true;
        }
        if (age == 0)
            return any;
    }
}

/*
 * Old enough, ordinary, in host RAM, and not touched since the last arming. What the host has swapped out takes no RAM:
 * to evict it would bring it in first.
 */
static int find_candidates(struct fl_chooser *chooser, uint32_t region, uint64_t first, uint32_t count,
                           uint8_t threshold, uint64_t *candidates, uint32_t *found) {
    struct fl_vm *vm = chooser->vm;
    uint64_t in_ram[WORDS], swapped[WORDS], accessed[WORDS];
    *found = 0;
    memset(candidates, 0, WORDS * sizeof(*candidates));
    for (uint32_t i = 0; i < count; i++) {
        if (__atomic_load_n(&vm->vault.ages[first + i], __ATOMIC_RELAXED) >= threshold &&
            atomic_load_explicit(fl_slot(vm, first + i), memory_order_relaxed) == 0) {
            candidates[i / 64] |= UINT64_C(1) << (i % 64);
            ++*found;
        }
    }
    if (!*found)
        return 0;
    int error = fl_age_look(vm, region, first, count, in_ram, swapped);
    if (!error)
        error = fl_scanner_harvest(chooser->scanner, region, first, count, accessed);
    if (error)
        return error;
    *found = 0;
    for (uint32_t word = 0; word < (count + 63) / 64; word++) {
        candidates[word] &= in_ram[word] & ~accessed[word];
        *found += (uint32_t)__builtin_popcountll(candidates[word]);
    }
    return 0;
}

/* Leave only the first `allowance` candidates. */
static void cut_to(uint64_t *candidates, uint64_t allowance) {
    for (uint32_t word = 0; word < WORDS; word++) {
        while ((uint64_t)__builtin_popcountll(candidates[word]) > allowance)
            candidates[word] &= ~(UINT64_C(1) << (63 - __builtin_clzll(candidates[word])));
        allowance -= (uint64_t)__builtin_popcountll(candidates[word]);
    }
}

static void walk_done(struct fl_age_counts *counts, uint8_t threshold) {
    for (uint32_t age = threshold; age < 256; age++)
        counts->candidates[age] = 0;
}

int fl_choose_evict(struct fl_chooser *chooser, uint64_t allowance, uint8_t min_age, struct fl_evicted *done) {
    struct fl_pass *pass = &chooser->out;
    uint64_t until = fl_now() + STEP_NS, candidates[WORDS];
    uint8_t threshold = min_age;
    if (pass->active && pass->threshold < min_age)
        pass->active = false; /* a new budget wants older pages */
    if (!pass->active) {
        if (!oldest_that_fit(&chooser->counts, allowance, min_age, &threshold))
            return 0;
        begin(chooser, pass, threshold);
    }
    while (done->pages < allowance && fl_now() < until && !atomic_load(&chooser->vm->gone)) {
        uint32_t region, count, found;
        uint64_t first;
        if (!next_window(chooser, pass, &region, &first, &count)) {
            walk_done(&chooser->counts, pass->threshold);
            return 1;
        }
        int error = find_candidates(chooser, region, first, count, pass->threshold, candidates, &found);
        if (!error && found) {
            if (found > allowance - done->pages) {
                cut_to(candidates, allowance - done->pages);
                pass->page = first; /* the rest of this window is still to come */
            }
            error = fl_evict_window(chooser->evictor, region, first, count, candidates, done);
        }
        if (error)
            return error;
    }
    return 1;
}

static bool youngest_away(const struct fl_age_counts *counts, uint64_t allowance, uint8_t *threshold) {
    uint64_t sum = 0;
    bool any = false;
    for (uint32_t age = 0; age < 256 && sum < allowance; age++) {
        if (counts->evicted[age]) {
            sum += counts->evicted[age];
            *threshold = (uint8_t)age;
            any = true;
        }
    }
    return any;
}

int fl_choose_bring(struct fl_chooser *chooser, uint64_t allowance, uint64_t *pages) {
    struct fl_pass *pass = &chooser->back;
    uint64_t until = fl_now() + STEP_NS;
    if (!FL_READ(chooser->vm, evicted_pages))
        return 0;
    if (!pass->active) {
        uint8_t threshold = UINT8_MAX;
        if (!youngest_away(&chooser->counts, allowance, &threshold))
            threshold = UINT8_MAX; /* evicted since the last scan: all ages */
        begin(chooser, pass, threshold);
    }
    while (allowance && fl_now() < until && !atomic_load(&chooser->vm->gone)) {
        uint32_t region, count;
        uint64_t first;
        if (!next_window(chooser, pass, &region, &first, &count)) {
            for (uint32_t age = 0; age <= pass->threshold; age++)
                chooser->counts.evicted[age] = 0;
            return 1;
        }
        uint64_t before = allowance;
        int error = fl_bring_range(chooser->bringer, region, first, count, pass->threshold, false, &allowance, pages);
        if (error)
            return error;
        if (!allowance && before)
            pass->page = first;
    }
    return 1;
}
