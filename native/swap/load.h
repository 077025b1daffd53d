/* SPDX-License-Identifier: Apache-2.0 */
/* From the store back into the VMM: fetch, verify, fill the hole, wake. Used by faults, prefetch and drain. */
#ifndef FL_SWAP_LOAD_H
#define FL_SWAP_LOAD_H

#include "swap/removed.h"

/*
 * The content of a stored page, verified. `entry` is LOADING and ours. *content points into `buffer` (4096 bytes,
 * 64-byte aligned) or to a page of zeros. *stored_bytes gets what the copy took in the pool. -EBADMSG: the copy
 * is damaged and nothing of it may be used.
 */
int fl_fetch(struct fl_vm *vm, uint64_t page, fl_entry entry, void *buffer, const void **content,
             uint32_t *stored_bytes);

/*
 * Bring back one page that is LOADING and ours, wake who waits, settle the entry and release the copy. Not when more is known of
 * its removal (swap/removed.h) than `known`.
 * 0: it is resident. -EAGAIN: back to EVICTED, try again after reading events. -EBADMSG: poisoned.
 * -ESRCH, -ENOENT: VMM or range gone (entry back to EVICTED).
 * *woken_ns gets the time at which waiters were woken.
 */
int fl_load(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry, enum fl_removed known, void *buffer,
            uint32_t *stored_bytes, uint64_t *woken_ns);

/*
 * Never pass on a damaged copy: poison the hole, name the VM, stop evicting from it. The page is LOADING and ours, `entry` is
 * what the table said of it, which may be damaged itself.
 */
void fl_poison(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry);

/* Of a page that was counted as away: it is not any more, and its stored copy goes. */
void fl_give_up_copy(struct fl_vm *vm, fl_entry entry);

/* Count a page out that was away by its entry, if it was: a damaged one may say what never was. */
void fl_count_out(struct fl_vm *vm, fl_entry entry);

/*
 * Make touches of a hole fail from now on, and wake who waits. A write protection that was left on the hole is lifted for it: the
 * kernel takes its mark for a page. 0, -ENOSYS, or what the caller must try again (-EAGAIN, -ENOMEM).
 */
int fl_poison_hole(struct fl_vm *vm, uint32_t region, uint64_t page);

/* Forget a stored copy whose entry was just taken out of the table. */
void fl_discard(struct fl_vm *vm, fl_entry entry);

#endif
