/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/bring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "swap/evict.h"
#include "swap/load.h"
#include "swap/removed.h"
#include "swap/uffd.h"

#define COPY_TRIES 200u

struct fl_bringer {
    struct fl_vm *vm;
    uint8_t pages[FL_BATCH_PAGES * FL_PAGE_SIZE] __attribute__((aligned(FL_PAGE_SIZE)));
};

struct run { /* adjacent pages, LOADING and ours, their content in the bringer's buffer */
    uint32_t region;
    bool fresh;
    uint64_t first;
    uint32_t count;
    fl_entry entry[FL_BATCH_PAGES];
};

int fl_bringer_create(struct fl_vm *vm, struct fl_bringer **out) {
    struct fl_bringer *bringer = aligned_alloc(FL_PAGE_SIZE, sizeof(*bringer));
    if (!bringer)
        return -ENOMEM;
    memset(bringer, 0, sizeof(*bringer));
    bringer->vm = vm;
    *out = bringer;
    return 0;
}

void fl_bringer_destroy(struct fl_bringer *bringer) {
    free(bringer);
}

static void settle(struct fl_vm *vm, struct run *run, uint32_t from, uint32_t to, bool resident) {
    for (uint32_t i = from; i < to; i++) {
        fl_entry entry = run->entry[i];
        fl_entry after = resident ? fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_BROUGHT, 0)
                                  : fl_entry_with_state(entry, FL_PAGE_EVICTED);
        if (resident && run->fresh)
            __atomic_store_n(&vm->vault.ages[run->first + i], 0, __ATOMIC_RELAXED);
        bool freed = !fl_settle(vm, run->first + i, entry, after);
        if (resident || freed)
            fl_give_up_copy(vm, entry);
    }
}

/* Take adjacent stored pages from `page` on and fetch them. Ends at the first that does not belong to the run. */
static void gather(struct fl_bringer *bringer, struct run *run, uint64_t end, uint8_t max_age, uint64_t allowance) {
    struct fl_vm *vm = bringer->vm;
    run->count = 0;
    while (run->count < FL_BATCH_PAGES && run->count < allowance && run->first + run->count < end) {
        uint64_t page = run->first + run->count;
        fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_acquire);
        if (fl_entry_state(entry) != FL_PAGE_EVICTED || vm->vault.ages[page] > max_age)
            return;
        fl_entry mine = fl_entry_with_state(entry, FL_PAGE_LOADING);
        bool valid = fl_entry_valid(entry);
        if (!fl_swap_entry(vm, page, &entry, mine))
            return;
        uint8_t *place = bringer->pages + (size_t)run->count * FL_PAGE_SIZE;
        const void *content;
        uint32_t stored_bytes;
        if (!valid || fl_fetch(vm, page, mine, place, &content, &stored_bytes)) {
            fl_poison(vm, run->region, page, entry);
            return;
        }
        if (content != place)
            memcpy(place, content, FL_PAGE_SIZE);
        run->entry[run->count++] = mine;
    }
}

/*
 * One page into the hole that it left in the file. Where there is no hole any more the VMM has mapped the file again and
 * written there, and its page is the newer one. (Looked at for each page just before it is written: nothing writes into
 * holes only.)
 */
static int write_page(struct fl_vm *vm, uint32_t region, uint64_t page, const void *content) {
    int fd = vm->memory[region].fd;
    off_t offset = (off_t)fl_offset_of_page(vm, region, page);
    int there = fl_file_has(vm, region, page);
    if (there)
        return there < 0 ? there : 0;
    ssize_t written = pwrite(fd, content, FL_PAGE_SIZE, offset);
    if (written == FL_PAGE_SIZE)
        return 0;
    int error = written < 0 ? -errno : -EIO;
    if (written > 0)
        (void)fl_punch(vm, region, page, 1); /* half a page must not be taken for a newer one */
    return error;
}

/* Not what the VMM has freed, or perhaps has: that stays away until it is forgotten. As late as can be (swap/load.c). */
static bool is_wanted(struct fl_vm *vm, const struct run *run, uint32_t at) {
    return !fl_removed_meanwhile(vm, run->first + at, run->entry[at], FL_REMOVED_NOT);
}

/* Pages from `at` on of a run into their file. Entries are settled page by page. -EAGAIN: but for some that are not wanted. */
static int write_run(struct fl_bringer *bringer, struct run *run, uint32_t at, uint64_t *pages) {
    struct fl_vm *vm = bringer->vm;
    int left = 0;
    for (; at < run->count; at++) {
        if (!is_wanted(vm, run, at)) {
            settle(vm, run, at, at + 1, false);
            left = -EAGAIN;
            continue;
        }
        int error = write_page(vm, run->region, run->first + at, bringer->pages + (size_t)at * FL_PAGE_SIZE);
        if (error) {
            settle(vm, run, at, run->count, false);
            return error;
        }
        settle(vm, run, at, at + 1, true);
        ++*pages;
    }
    return left;
}

static uint32_t count_wanted(struct fl_vm *vm, const struct run *run, uint32_t at) {
    uint32_t end = at;
    while (end < run->count && is_wanted(vm, run, end))
        end++;
    return end - at;
}

/* Fill the holes of a run. Entries are settled page by page as far as the kernel got. */
static int fill(struct fl_bringer *bringer, struct run *run, uint64_t *pages) {
    struct fl_vm *vm = bringer->vm;
    uint64_t address = fl_address_of_page(vm, run->region, run->first);
    uint32_t at = 0, tries = 0;
    while (at < run->count) {
        uint64_t done, length = (uint64_t)count_wanted(vm, run, at) * FL_PAGE_SIZE;
        if (!length) {
            settle(vm, run, at, at + 1, false);
            at++;
            continue;
        }
        int error = fl_uffd_copy(vm, address + (uint64_t)at * FL_PAGE_SIZE, bringer->pages + (size_t)at * FL_PAGE_SIZE,
                                 length, &done);
        uint32_t filled = (uint32_t)(done / FL_PAGE_SIZE);
        settle(vm, run, at, at + filled, true);
        *pages += filled;
        at += filled;
        if (!error || filled) {
            tries = 0;
            continue;
        }
        if (error == -EEXIST) {
            (void)fl_uffd_wake(vm, address + (uint64_t)at * FL_PAGE_SIZE, FL_PAGE_SIZE);
            settle(vm, run, at, at + 1, true);
            at++;
            continue;
        }
        if ((error == -EAGAIN || error == -ENOMEM) && ++tries < COPY_TRIES) {
            fl_sleep_ns(20 * FL_NS_PER_US * tries);
            continue;
        }
        /* A part of the region is not mapped there any more, and its file still is its content. */
        if (error == -ENOENT) {
            error = write_run(bringer, run, at, pages);
            return error == -EAGAIN ? 0 : error; /* what is not wanted stays, as above */
        }
        settle(vm, run, at, run->count, false);
        if (error == -ESRCH)
            atomic_store(&vm->gone, 1);
        return error;
    }
    return 0;
}

int fl_bring_range(struct fl_bringer *bringer, uint32_t region, uint64_t first, uint64_t count, uint8_t max_age,
                   bool fresh, uint64_t *allowance, uint64_t *pages) {
    struct run run = {.region = region, .fresh = fresh};
    uint64_t end = first + count, page = first;
    while (page < end && *allowance) {
        run.first = page;
        gather(bringer, &run, end, max_age, *allowance);
        if (!run.count) {
            page++;
            continue;
        }
        uint64_t before = *pages;
        int error = fill(bringer, &run, pages);
        *allowance -= *pages - before;
        if (error)
            return error;
        page += run.count;
    }
    return 0;
}

int fl_bring_into_file(struct fl_bringer *bringer, uint32_t region, uint64_t *pages) {
    struct fl_vm *vm = bringer->vm;
    struct run run = {.region = region};
    uint64_t page = fl_region(vm, region)->first_page, end = page + fl_region_pages(vm, region);
    int left = 0;
    while (page < end) {
        run.first = page;
        gather(bringer, &run, end, UINT8_MAX, UINT64_MAX);
        int error = write_run(bringer, &run, 0, pages);
        if (error && error != -EAGAIN)
            return error;
        left = error ? error : left;
        page += run.count ? run.count : 1;
    }
    return left;
}
