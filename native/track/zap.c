/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracker `zap`: drop the VMM's page table entries of guest memory (MADV_DONTNEED on a shared mapping leaves the
 * memory itself alone, and tells KVM to drop its own), then see which came back. Exact to a page because the range
 * is registered for WP, which turns fault-around off.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "attach/gate.h"
#include "base/clock.h"
#include "swap/fault.h"
#include "swap/removed.h"
#include "track/pagemap.h"
#include "track/seen.h"
#include "track/track.h"

#define CHUNK_PAGES_FIRST 2048u /* present pages dropped by one call; adapts to what it takes */
#define CHUNK_PAGES_MIN 512u    /* about 0.1 ms; below, the stops cost more than the chunks. One huge page at least */
#define CHUNK_PAGES_MAX 8192u
#define CHUNK_LONG_NS (500 * FL_NS_PER_US)
#define CHUNK_SHORT_NS (250 * FL_NS_PER_US)
#define GATE_TRIES 25u
#define GATE_TIMEOUT_NS (200 * FL_NS_PER_MS)

_Static_assert(CHUNK_PAGES_MIN *FL_PAGE_SIZE >= FL_HUGE_BYTES,
               "a chunk that ends at a huge page's start has none to drop");

struct fl_tracker {
    struct fl_vm *vm;
    struct fl_fault_server *faults;
    struct fl_gate *gate;
    uint32_t chunk_pages;
    uint64_t stop_max_ns; /* of the arming under way */
    uint32_t region;      /* that is being armed; where it was when that began */
    uint64_t base;
    bool looks;                        /* at what it drops, before it does */
    struct fl_pagemap pagemap, looked; /* the runs that are being dropped, and that look at them */
    struct fl_seen seen;
};

static uint64_t base_of(struct fl_vm *vm, uint32_t region) {
    return fl_address_of_page(vm, region, fl_region(vm, region)->first_page);
}

static bool has_moved(const struct fl_tracker *tracker) {
    struct fl_vm *vm = tracker->vm;
    return atomic_load(&vm->parted) || atomic_load(&fl_region(vm, tracker->region)->gone) ||
           base_of(vm, tracker->region) != tracker->base;
}

/*
 * The VMM may unmap or move memory meanwhile, all of a region or a part, and have its own at that address: dropped, that would be
 * zeros. While an event is being read it is not known yet, and waiting is not for the real-time thread that asks.
 */
static int is_in_place(void *context) {
    const struct fl_tracker *tracker = context;
    struct fl_vm *vm = tracker->vm;
    if (fl_removed_is_reading(vm))
        return -EBUSY;
    return has_moved(tracker) ? -ECANCELED : 0;
}

static int create(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out) {
    struct fl_tracker *tracker = calloc(1, sizeof(*tracker));
    if (!tracker)
        return -ENOMEM;
    int error =
        fl_gate_open(vm->pid, vm->vault.base + vm->vault.gate_offset, &vm->vault.header->attachment, &tracker->gate);
    if (error) {
        free(tracker);
        return error;
    }
    tracker->vm = vm;
    tracker->faults = faults;
    tracker->chunk_pages = CHUNK_PAGES_FIRST;
    fl_gate_guard(tracker->gate, is_in_place, tracker);
    *out = tracker;
    return 0;
}

static void destroy(struct fl_tracker *tracker) {
    if (!tracker)
        return;
    fl_gate_close(tracker->gate);
    fl_seen_forget(&tracker->seen);
    free(tracker);
}

static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    if (fl_seen_tell(&tracker->seen, tracker->vm, region, first, count, accessed))
        return 0;
    return fl_pagemap_bits(&tracker->pagemap, tracker->vm, FL_PAGES_MAPPED, region, first, count, accessed);
}

static void keep(struct fl_tracker *tracker) {
    fl_seen_keep(&tracker->seen, tracker->vm);
}

/* *made: the VMM has made the call, whatever its kernel said to that. */
static int run_gate(struct fl_tracker *tracker, uint64_t address, uint64_t length, bool *made) {
    struct fl_gate_call call = {.nr = SYS_madvise, .args = {address, length, MADV_DONTNEED}};
    uint64_t stop_ns = 0, busy_ns = 0;
    int error = fl_gate_run(tracker->gate, &call, 1, GATE_TIMEOUT_NS, &stop_ns, &busy_ns);
    *made = error == 0;
    if (error)
        return error;
    if (stop_ns > tracker->stop_max_ns)
        tracker->stop_max_ns = stop_ns;
    if (length && busy_ns > CHUNK_LONG_NS && tracker->chunk_pages > CHUNK_PAGES_MIN)
        tracker->chunk_pages = tracker->chunk_pages / 2 > CHUNK_PAGES_MIN ? tracker->chunk_pages / 2 : CHUNK_PAGES_MIN;
    else if (length && busy_ns < CHUNK_SHORT_NS && tracker->chunk_pages < CHUNK_PAGES_MAX)
        tracker->chunk_pages += tracker->chunk_pages / 8;
    return (int)call.result;
}

int fl_zap_settle(struct fl_vm *vm, struct fl_fault_server *faults) {
    if (!fl_zap_marked(vm))
        return 0;
    if (!fl_gate_cancel(vm->vault.base + vm->vault.gate_offset))
        return -EBUSY;
    fl_fault_end_zap(faults, true);
    return 0;
}

static int look(struct fl_tracker *tracker, uint64_t start, uint64_t end) {
    return fl_seen_look(&tracker->seen, tracker->vm, &tracker->looked, FL_PAGES_MAPPED, tracker->region, start, end);
}

/*
 * With a look at the pages as late as can be: what is touched between the two is not seen. Marked only here: what the VMM
 * frees between two tries is known at once.
 */
static int try_zap(struct fl_tracker *tracker, uint64_t start, uint64_t end) {
    bool made;
    int error = tracker->looks ? look(tracker, start, end) : 0;
    if (error)
        return error;
    fl_zap_mark(tracker->vm, start, end);
    error = run_gate(tracker, start, end - start, &made);
    /* Else it is still under way: the mark stays until fl_zap_settle() finds that it has ended. */
    if (error != -ETIMEDOUT)
        fl_fault_end_zap(tracker->faults, made);
    return error;
}

static int zap(struct fl_tracker *tracker, uint64_t start, uint64_t end) {
    int error = -EBUSY;
    for (uint32_t try = 0; try < GATE_TRIES && error == -EBUSY; try++) {
        if (try) /* the VMM's main thread was not to be had */
            fl_sleep_ns(FL_NS_PER_MS << (try < 5 ? try - 1 : 4));
        error = try_zap(tracker, start, end);
    }
    return error;
}

static int arm_region(struct fl_tracker *tracker, uint32_t region) {
    struct fl_vm *vm = tracker->vm;
    uint64_t at = base_of(vm, region), end = at + fl_region(vm, region)->length;
    uint64_t start = 0, stop = 0, pages = 0;
    tracker->region = region;
    tracker->base = at;
    if (tracker->looks && !fl_seen_bits(&tracker->seen, vm, region))
        return -ENOMEM;
    while (at < end) {
        long runs = fl_pagemap_runs(&tracker->pagemap, vm, FL_PAGES_MAPPED, &at, end);
        if (runs < 0)
            return (int)runs;
        for (long i = 0; i < runs; i++) {
            uint64_t from = tracker->pagemap.runs[i].start, to = tracker->pagemap.runs[i].end;
            while (from < to) {
                uint64_t cut = from + (tracker->chunk_pages - pages) * FL_PAGE_SIZE;
                cut = cut < to ? FL_HUGE_START(cut) : to;
                if (cut > from) {
                    start = pages ? start : from;
                    pages += (cut - from) / FL_PAGE_SIZE;
                    from = stop = cut;
                }
                if (from == to && pages < tracker->chunk_pages)
                    break;
                int error = zap(tracker, start, stop);
                if (error)
                    return error;
                pages = 0;
            }
        }
    }
    int error = pages ? zap(tracker, start, stop) : 0;
    /* Where nothing was left, nobody has looked: had it moved away meanwhile, all of it would seem idle. */
    return !error && tracker->looks && has_moved(tracker) ? -EAGAIN : error;
}

static int arm_all(struct fl_tracker *tracker, bool looks, uint64_t *stop_max_ns) {
    struct fl_vm *vm = tracker->vm;
    tracker->looks = looks;
    tracker->stop_max_ns = 0;
    int error = fl_zap_marked(vm) ? -EBUSY : 0;
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++) {
        if (!atomic_load(&fl_region(vm, i)->gone))
            error = arm_region(tracker, i);
    }
    *stop_max_ns = tracker->stop_max_ns;
    return error;
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    return arm_all(tracker, false, stop_max_ns);
}

static int sweep(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    fl_seen_begin(&tracker->seen);
    return arm_all(tracker, true, stop_max_ns);
}

static bool probe(const struct fl_tracked *vm, const struct fl_kernel_features *kernel, char *detail, size_t bytes) {
    (void)vm;
    bool possible = kernel->wp_shmem && kernel->events && kernel->pagemap_scan;
    snprintf(detail, bytes, "%s",
             possible ? "exact to a page, KVM's mappings included; the VMM's main thread is stopped for some tens of "
                        "microseconds a chunk, and each touched page costs the guest one fault a scan"
             : !kernel->wp_shmem     ? kernel->wp_lacks
             : !kernel->pagemap_scan ? kernel->pagemap_scan_lacks
                                     : "this kernel's userfaultfd does not tell when memory is freed, moved or forked");
    return possible;
}

const struct fl_tracker_ops fl_tracker_zap = {
    .kind = FL_TRACKER_ZAP,
    .freeze = FL_FREEZE_WP,
    .outlives_pager = true,
    .sees_io = true,
    .probe = probe,
    .create = create,
    .destroy = destroy,
    .harvest = harvest,
    .voided = keep,
    .arm = arm,
    .sweep = sweep,
};
