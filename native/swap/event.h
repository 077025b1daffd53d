/* SPDX-License-Identifier: Apache-2.0 */
/* What the VMM does to its address space: REMOVE, REMAP, UNMAP, FORK. The thread that did it waits until we read. */
#ifndef FL_SWAP_EVENT_H
#define FL_SWAP_EVENT_H

#include "swap/vm.h"

struct uffd_msg;

#define FL_FORGET_PAGES UINT64_C(4096) /* in one step: 16 MiB */

/*
 * Act on an event other than a page fault. Never blocks; what takes time is left to the mover, or to the caller: it gets what
 * the VMM has freed (balloon, free page reporting; mostly nothing: start == end) and has fl_forget() forget it, because a
 * stored copy of that must not come back.
 */
struct fl_range fl_event(struct fl_vm *vm, const struct uffd_msg *message);
/* Forget the stored copies of the first FL_FORGET_PAGES of *left, which is made so much shorter. */
void fl_forget(struct fl_vm *vm, struct fl_range *left);

/*
 * Our own zap drops page tables, not memory, but the kernel tells of it as it tells of memory that is gone. So a zap
 * of [start, end) is marked while the VMM may be making it. An event with exactly these bounds is ours. One that lies inside of
 * them waits until the zap has ended: if ours was seen by then, or no zap was made at all, the others were true; if not, the zap
 * came in pieces (the VMM's mappings were split meanwhile) and they were ours. Taking a zap for a removal would lose pages; the
 * other way round, the guest gets its own old bytes where it may expect any. The mark is in the vault: a successor still
 * knows, and takes what lies inside for ours.
 */
void fl_event_mark_zap(struct fl_vm *vm, uint64_t start, uint64_t end);
/* The two steps of its end, see fl_fault_end_zap(): no event is taken for ours any more; what was put off is decided on. */
void fl_event_unmark_zap(struct fl_vm *vm);
void fl_event_settle_zap(struct fl_vm *vm, bool made);
bool fl_event_zap_marked(struct fl_vm *vm);

/*
 * The VMM may have freed this while our own zap lasts. `certain`: it has; else it was perhaps a piece of our zap, which is known
 * when that has ended.
 */
bool fl_event_is_put_off(struct fl_vm *vm, uint64_t address, bool *certain);

#endif
