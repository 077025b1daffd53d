/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracker `idle`: the kernel's page_idle bitmap. Arming marks the frames behind the VMM's page tables, which clears the
 * ACCESS bits of all their mappings, KVM's included; a frame that is touched loses its mark. Nothing is protected, so a
 * touch costs the guest nothing: the kernel pays instead, by walking the mappings of each frame, marked or asked about.
 *
 * What counts as accessed: a page that is mapped and whose mark is gone, by whichever process touched it; and one that was
 * mapped since, which never had a mark. The mark moves along when the kernel migrates a page, and so do ACCESS bits. A
 * page that is swapped out is not mapped; when it comes back it is mapped because it was touched, and has no mark.
 *
 * What it cannot see:
 *  - Who clears ACCESS bits clears them for all. MGLRU's aging (under memory pressure) and DAMON do, and tell page_idle
 *    nothing: what was touched before looks idle afterwards.
 *  - DMA and direct I/O into guest memory go by pinned frames and set no ACCESS bit: so not for a VMM that may do that
 *    (direct_io.h). What was done to the file by read() and write() does not count where MGLRU is on.
 *  - hugetlb pages are on no LRU list and never idle. A transparent huge page has one mark for all its pages; when
 *    only a part of it is mapped, without its head, it is never marked either.
 *  - Frames that somebody works on at that moment (reclaim, compaction, I/O): off their LRU list they look accessed,
 *    and of a locked one ACCESS bits are not looked at, so that an access is missed when it is locked while it is read.
 *
 * Frames wait for their LRU list in a batch of each CPU, and are not looked at before they are there: the last 31 that a
 * CPU faulted in or migrated would look accessed for ever on a calm host (lru.h).
 *
 * Clearing ACCESS bits flushes no TLB, so every arming ends with that (tlb.h).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "track/direct_io.h"
#include "track/lru.h"
#include "track/page_idle.h"
#include "track/rivals.h"
#include "track/seen.h"
#include "track/tlb.h"
#include "track/track.h"

#define OFFERED_OF_CHUNK 4u

struct fl_tracker {
    struct fl_vm *vm;
    struct fl_lru lru;
    struct fl_tlb tlb;
    struct fl_seen seen;
    struct fl_page_idle idle;
};

static bool probe(const struct fl_tracked *vm, const struct fl_kernel_features *kernel, char *detail, size_t bytes) {
    if (!kernel->idle_page_tracking) {
        snprintf(detail, bytes, "%s", kernel->idle_lacks);
        return false;
    }
    if (fl_direct_io_forbids(vm->pid, detail, bytes))
        return false;
    char rivals[FL_RIVALS_BYTES];
    fl_rivals_describe(true, rivals, sizeof(rivals));
    snprintf(detail, bytes, "exact to a page, KVM's mappings included, free for the guest, dear for the scanner%s",
             rivals);
    return true;
}

/* ---- a scan's harvest --------------------------------------------------------------------------------------- */

static void forget(struct fl_tracker *tracker) {
    fl_seen_forget(&tracker->seen);
}

static void destroy(struct fl_tracker *tracker) {
    if (!tracker)
        return;
    /* Marks stay where they are: they make nobody wait, and each goes with the next touch of its page. */
    forget(tracker);
    fl_page_idle_close(&tracker->idle);
    fl_lru_close(&tracker->lru);
    free(tracker);
}

static int create(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out) {
    (void)faults;
    struct fl_tracker *tracker = calloc(1, sizeof(*tracker));
    if (!tracker)
        return -ENOMEM;
    tracker->vm = vm;
    int error = fl_page_idle_open(&tracker->idle);
    if (!error)
        error = fl_page_idle_reserve(&tracker->idle, FL_SCAN_PAGES);
    if (!error)
        error = fl_lru_open(&tracker->lru);
    if (error == -EOPNOTSUPP) { /* then so be it */
        fl_log_text(FL_LOG_INFO, "lru_not_drained",
                    "MADV_COLLAPSE drains nothing here: pages just mapped look accessed");
        error = 0;
    }
    if (error) {
        destroy(tracker);
        return error;
    }
    *out = tracker;
    return 0;
}

/* The larger the batches, the more of ours in each word that is walked. They are given back at the end of a scan. */
static int reserve_for_all(struct fl_tracker *tracker) {
    uint64_t most = FL_SCAN_PAGES;
    for (uint32_t i = 0; i < fl_region_count(tracker->vm); i++) {
        uint64_t pages = fl_region_pages(tracker->vm, i);
        most = pages > most ? pages : most;
    }
    most = (most + 63) / 64 * 64;
    return fl_page_idle_reserve(&tracker->idle, most < FL_PAGE_IDLE_BATCH ? (uint32_t)most : FL_PAGE_IDLE_BATCH);
}

/* Find the frames of all regions, a batch at a time, and do something with each. */
static int for_all(struct fl_tracker *tracker,
                   int (*act)(struct fl_tracker *tracker, uint32_t region, uint64_t skipped)) {
    struct fl_vm *vm = tracker->vm;
    int error = reserve_for_all(tracker);
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++) {
        uint64_t pages = fl_region_pages(vm, i);
        for (uint64_t at = 0; at < pages && !error && !atomic_load(&fl_region(vm, i)->gone);) {
            uint32_t count = pages - at < tracker->idle.room ? (uint32_t)(pages - at) : tracker->idle.room;
            error = atomic_load(&vm->gone) ? -ESRCH : 0;
            if (!error)
                error = fl_page_idle_find(&tracker->idle, vm, i, fl_region(vm, i)->first_page + at, count);
            if (!error)
                error = act(tracker, i, at);
            at += count;
        }
    }
    int released = fl_page_idle_reserve(&tracker->idle, FL_SCAN_PAGES);
    return error ? error : released;
}

static int look(struct fl_tracker *tracker, uint32_t region, uint64_t skipped) {
    uint64_t *seen = fl_seen_bits(&tracker->seen, tracker->vm, region);
    return seen ? fl_page_idle_accessed(&tracker->idle, seen + skipped / 64) : -ENOMEM;
}

/* Pages that were migrated wait in a batch like new ones: they have their marks, but are not looked at there. */
static int collect(struct fl_tracker *tracker) {
    forget(tracker);
    fl_seen_begin(&tracker->seen);
    fl_lru_drain(&tracker->lru);
    int error = for_all(tracker, look);
    if (error)
        forget(tracker);
    return error;
}

static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    if (fl_seen_tell(&tracker->seen, tracker->vm, region, first, count, accessed))
        return 0;
    memset(accessed, 0, (count + 63) / 64 * sizeof(*accessed));
    int error = fl_page_idle_find(&tracker->idle, tracker->vm, region, first, count);
    return error ? error : fl_page_idle_accessed(&tracker->idle, accessed);
}

/* ---- arming ------------------------------------------------------------------------------------------------- */

static int mark(struct fl_tracker *tracker, uint32_t region, uint64_t skipped) {
    const struct fl_page_idle *idle = &tracker->idle;
    for (uint32_t i = 0; i < OFFERED_OF_CHUNK && idle->count; i++) {
        uint32_t index = fl_page_idle_index(idle, (uint32_t)(fl_tlb_random(&tracker->tlb) % idle->count));
        fl_tlb_offer(&tracker->tlb, region, fl_region(tracker->vm, region)->first_page + skipped + index);
    }
    return fl_page_idle_mark(&tracker->idle);
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    *stop_max_ns = 0;
    forget(tracker);
    fl_lru_drain(&tracker->lru);
    fl_tlb_begin(&tracker->tlb);
    int error = for_all(tracker, mark);
    if (!error)
        fl_tlb_flush(&tracker->tlb, tracker->vm, stop_max_ns);
    return error;
}

const struct fl_tracker_ops fl_tracker_idle = {
    .kind = FL_TRACKER_IDLE,
    .freeze = FL_FREEZE_NONE,
    .outlives_pager = true,
    .probe = probe,
    .create = create,
    .destroy = destroy,
    .collect = collect,
    .harvest = harvest,
    .voided = forget,
    .arm = arm,
};
