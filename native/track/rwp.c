/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracker `rwp`: userfaultfd read-write protection in async mode (Linux 7.3). Arming takes the access rights from the
 * page table entries that are there; the first access of each page gives them back and clears its mark, in the kernel and
 * without a message. Pages stay where they are, and KVM's own mappings go with the protection.
 *
 * The mark goes with the page table entry (a hole punched, a page dropped by the host); what is mapped anew counts as
 * accessed, and what is in the file but not mapped is seen by its MINOR fault when it is touched.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "swap/uffd.h"
#include "track/pagemap.h"
#include "track/seen.h"
#include "track/track.h"

#define CHUNK_BYTES_MAX (UINT64_C(64) << 20)
#define CHUNK_BYTES_MIN FL_HUGE_BYTES
#define CHUNK_LONG_NS (500 * FL_NS_PER_US)
#define CHUNK_SHORT_NS (250 * FL_NS_PER_US)
#define PROTECT_TRIES 10u /* in a row, some 0.2 ms; then with a new look before it */
#define PROTECT_ROUNDS 20u

struct fl_tracker {
    struct fl_vm *vm;
    uint64_t chunk_bytes;
    struct fl_pagemap pagemap;
    struct fl_seen seen;
};

static bool probe(const struct fl_tracked *vm, const struct fl_kernel_features *kernel, char *detail, size_t bytes) {
    bool possible = kernel->rwp && kernel->events;
    if (possible && vm->attached && !fl_uffd_allows(vm->uffd_features, FL_FREEZE_RWP)) {
        snprintf(
            detail, bytes,
            "the userfaultfd that this VM holds was set up without RWP, which is for good: detach the VM, then resume "
            "it, and it gets another");
        return false;
    }
    snprintf(detail, bytes, "%s",
             possible ? "exact to a page, KVM's mappings included, nothing is stopped; each touched page costs the "
                        "guest one short fault a scan"
             : kernel->rwp ? "this kernel's userfaultfd does not tell when memory is freed, moved or forked"
                           : kernel->rwp_lacks);
    return possible;
}

static int create(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out) {
    (void)faults;
    if (vm->freeze != FL_FREEZE_RWP)
        return -ENODEV;
    struct fl_tracker *tracker = calloc(1, sizeof(*tracker));
    if (!tracker)
        return -ENOMEM;
    tracker->vm = vm;
    tracker->chunk_bytes = CHUNK_BYTES_MIN;
    *out = tracker;
    return 0;
}

static void destroy(struct fl_tracker *tracker) {
    if (!tracker)
        return;
    fl_seen_forget(&tracker->seen);
    free(tracker); /* asynchronous protection makes nobody wait: it goes with the next touch, or on unregistering */
}

static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    if (fl_seen_tell(&tracker->seen, tracker->vm, region, first, count, accessed))
        return 0;
    return fl_pagemap_bits(&tracker->pagemap, tracker->vm, FL_PAGES_ACCESSED, region, first, count, accessed);
}

static void keep(struct fl_tracker *tracker) {
    fl_seen_keep(&tracker->seen, tracker->vm);
}

/*
 * The VMM's mmap lock is held for reading as long as a chunk takes; faults need it too only now and then. With a look at each
 * chunk before it, as late as can be: what is touched between the two is not seen.
 */
static int arm_region(struct fl_tracker *tracker, uint32_t region, bool looks, uint64_t *stop_max_ns) {
    struct fl_vm *vm = tracker->vm;
    uint64_t at = fl_address_of_page(vm, region, fl_region(vm, region)->first_page);
    uint64_t end = at + fl_region(vm, region)->length;
    while (at < end) {
        uint64_t stop = FL_HUGE_START(at + tracker->chunk_bytes);
        uint64_t length = (stop < end ? stop : end) - at;
        uint64_t start_ns = 0;
        int error = -EAGAIN;
        for (uint32_t i = 0; i < PROTECT_ROUNDS && error == -EAGAIN; i++) {
            error =
                looks ? fl_seen_look(&tracker->seen, vm, &tracker->pagemap, FL_PAGES_ACCESSED, region, at, at + length)
                      : 0;
            start_ns = fl_now();
            if (!error)
                error = fl_uffd_protect_patiently(vm, at, length, true, PROTECT_TRIES);
        }
        if (error)
            return error;
        uint64_t took_ns = fl_now() - start_ns;
        if (took_ns > *stop_max_ns)
            *stop_max_ns = took_ns;
        if (took_ns > CHUNK_LONG_NS && tracker->chunk_bytes > CHUNK_BYTES_MIN)
            tracker->chunk_bytes /= 2;
        else if (took_ns < CHUNK_SHORT_NS && tracker->chunk_bytes < CHUNK_BYTES_MAX)
            tracker->chunk_bytes *= 2;
        at += length;
    }
    return 0;
}

static int arm_all(struct fl_tracker *tracker, bool looks, uint64_t *stop_max_ns) {
    struct fl_vm *vm = tracker->vm;
    int error = 0;
    *stop_max_ns = 0;
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++) {
        if (!atomic_load(&fl_region(vm, i)->gone))
            error = arm_region(tracker, i, looks, stop_max_ns);
    }
    return error;
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    return arm_all(tracker, false, stop_max_ns);
}

static int sweep(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    fl_seen_begin(&tracker->seen);
    return arm_all(tracker, true, stop_max_ns);
}

const struct fl_tracker_ops fl_tracker_rwp = {
    .kind = FL_TRACKER_RWP,
    .freeze = FL_FREEZE_RWP,
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
