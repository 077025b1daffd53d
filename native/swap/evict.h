/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Out of the VMM's memory: freeze, read, store, punch, let go. The order is what makes it loss-free:
 *
 *   FREEZING  write-protected; a write cancels
 *   PUNCHING  the copy is complete and named by the table: from here on a kill loses nothing
 *   EVICTED   the hole is there; the next touch faults and is served from the copy
 *
 * Frozen by WP, readers go on and a write cancels. Frozen by RWP, every touch cancels, and the whole VM is in sync mode
 * meanwhile: for FL_SYNC_NS at a time, as long as this thread keeps its CPU. What is touched then goes on as soon as a
 * fault thread has answered, and does not wait for the end.
 *
 * A device that reads a disk into a page holds the page itself, and goes past its page table: nothing would be cancelled, and
 * what it still writes would be lost with the page. But to get at the page it had to touch it. So the evictor asks what
 * was accessed since the tracker armed, as late as that can be known, and lets go of that. (What a device holds for longer
 * than pages are old when they are evicted, nothing shows: docs/architecture.md, Limits.)
 *
 * Reading goes through read(2) on our own descriptor, never through a mapping: a read of a hole gives zeros and leaves
 * the hole a hole.
 */
#ifndef FL_SWAP_EVICT_H
#define FL_SWAP_EVICT_H

#include "base/clock.h"
#include "swap/vm.h"

#define FL_SYNC_NS (5 * FL_NS_PER_MS) /* longest time in sync mode, where nothing else wants the CPU */

/* Which of the pages [first, first + count) were accessed since the last arming, as fl_tracker_ops.harvest. */
typedef int (*fl_accessed_fn)(void *context, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed);

struct fl_evictor;
/* `accessed` may be NULL: then nobody knows, and every page is taken for one that was not. */
int fl_evictor_create(struct fl_vm *vm, fl_accessed_fn accessed, void *context, struct fl_evictor **out);
void fl_evictor_destroy(struct fl_evictor *evictor);

struct fl_evicted {
    uint64_t pages;
    uint64_t stored_bytes;
};

/*
 * Evict from one window, pages [first, first + count) of `region`, count <= FL_WINDOW_PAGES: those marked in
 * `candidates` (bit i = page first + i). Adds to *done. -ENOSPC: the pool is full, nothing was lost; -EAGAIN:
 * the address space is changing; -ESRCH: the VMM ended; or what `accessed` said. Pages that were touched meanwhile stay.
 */
int fl_evict_window(struct fl_evictor *evictor, uint32_t region, uint64_t first, uint32_t count,
                    const uint64_t *candidates, struct fl_evicted *done);

/* Punch [first, first + pages) out of the file. Recovery finishes with it what a dead pager left PUNCHING. */
int fl_punch(struct fl_vm *vm, uint32_t region, uint64_t first, uint64_t pages);
/*
 * Of a huge page, which no VM should have (attach/hugepages.h), a part is punched by splitting it. When that fails, because
 * somebody holds one of its pages, the kernel says that all went well and leaves zeros instead of a hole. Whether it did, of
 * at most FL_BATCH_PAGES pages.
 */
bool fl_punch_left_zeros(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count);
/* Put back what was there. Goes on until it is done, or the VMM has ended. */
void fl_write_over_zeros(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, const void *content);

#endif
