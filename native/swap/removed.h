/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the VMM has removed (REMOVE events: balloon, free page reporting) and what has still to be forgotten of it. Who
 * freed goes on as soon as the event has been read, so all of it is noted then, by page: whether memory moves
 * afterwards does not matter. Until a stored copy is forgotten, nobody brings it back.
 */
#ifndef FL_SWAP_REMOVED_H
#define FL_SWAP_REMOVED_H

#include "swap/vm.h"

#define FL_FORGET_PAGES UINT64_C(4096) /* in one step: 16 MiB */

/* Around a read of the userfaultfd and the noting of what it says is removed; one at a time. */
void fl_removed_reading(struct fl_vm *vm);
void fl_removed_was_read(struct fl_vm *vm);
bool fl_removed_is_reading(struct fl_vm *vm);

/*
 * The pages of a REMOVE event of [start, end) that the caller has to forget; first == end: none, because it is our own
 * zap or put off. One event is of one mapping, and mostly of one region: of others that a mapping reaches into, it is
 * forgotten here.
 */
struct fl_pages fl_removed_by(struct fl_vm *vm, uint64_t start, uint64_t end);
/* It is being forgotten from now on, however long that takes. `place`: the caller's, below FL_FORGETTING_MAX. */
void fl_removed_note(struct fl_vm *vm, uint32_t place, struct fl_pages pages);
/* Forget the stored copies of the first FL_FORGET_PAGES of what is noted there. False: that was all. */
bool fl_removed_forget(struct fl_vm *vm, uint32_t place);

/* What a pager that was killed had noted and not forgotten yet. Before anything is served, and evicted. */
void fl_removed_finish(struct fl_vm *vm);

enum fl_removed {
    FL_REMOVED_NOT,     /* or it is forgotten already: then the entry has changed */
    FL_REMOVED_PERHAPS, /* or it was a piece of our own zap, which is known when that has ended */
    FL_REMOVED_SURELY
};
/* What is known of a page that was away a moment ago. Waits for a read that is under way: microseconds, as a rule. */
enum fl_removed fl_removed(struct fl_vm *vm, uint64_t page);
/* Whether more is known by now of the removal of a page that we own as `mine`, LOADING, than was when it was taken. */
bool fl_removed_meanwhile(struct fl_vm *vm, uint64_t page, fl_entry mine, enum fl_removed known);
/* Forget one stored copy, if `entry` (EVICTED) is what the table still says. */
void fl_removed_forget_page(struct fl_vm *vm, uint64_t page, fl_entry entry);

/*
 * Our own zap drops page tables, not memory, but the kernel tells of it as it tells of memory that is gone. So a zap of
 * [start, end), in one region, is marked while the VMM may be making it. An event with exactly these bounds is ours. One
 * that lies inside of them waits until the zap has ended:
 *   no zap was made             all were true
 *   none had exactly its bounds the zap came in pieces (the VMM's mappings were split already), and they were ours
 *   before one that had         true
 *   after it                    true, unless a mapping begins inside of the bounds: split while the event waited to be read, and
 *                               the kernel tells of what is left once more
 * Taking a zap for a removal would lose pages; the other way round, the guest gets its own old bytes where it may expect
 * any. The mark is in the vault: a successor still knows, and takes what lies inside for ours.
 */
void fl_zap_mark(struct fl_vm *vm, uint64_t start, uint64_t end);
bool fl_zap_marked(struct fl_vm *vm);
/* The two steps of its end, see fl_fault_end_zap(): no event is taken for ours any more; what was put off is decided on. */
void fl_zap_unmark(struct fl_vm *vm);
void fl_zap_decide(struct fl_vm *vm, bool made);

#endif
