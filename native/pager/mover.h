/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mover: one thread that scans, evicts within the budget, brings back, drains and keeps the pool. Whatever it
 * does it does in short steps, and between two steps it looks at what it has been told.
 */
#ifndef FL_PAGER_MOVER_H
#define FL_PAGER_MOVER_H

#include "swap/fault.h"
#include "swap/vm.h"
#include "track/track.h"

#define FL_PREFETCH_MAX 64 /* ranges that may wait */

enum fl_mover_end {
    FL_MOVER_RUNS = 0,
    FL_MOVER_RELEASED, /* stopped in good order, everything as it is */
    FL_MOVER_DRAINED,  /* for detaching: nothing is away */
    FL_MOVER_VM_GONE,
};

struct fl_mover;
struct fl_options;
/* Of `options` it takes trackers, stall_target_permille and longest_io_ms. 0 or a negative errno. */
int fl_mover_start(struct fl_vm *vm, struct fl_fault_server *faults, const struct fl_options *options,
                   struct fl_mover **out);
/* Wait for the thread (it must have been told to release or detach, or the VM be gone). */
void fl_mover_join(struct fl_mover *mover);

/* Something in the vault's budget or `gone` changed: look at it now. */
void fl_mover_wake(struct fl_mover *mover);
void fl_mover_scan(struct fl_mover *mover);
/* -ENOBUFS: too many ranges wait. -EINVAL: no such pages. */
int fl_mover_prefetch(struct fl_mover *mover, uint64_t first_page, uint64_t page_count);
void fl_mover_release(struct fl_mover *mover);
void fl_mover_detach(struct fl_mover *mover);
/* How it ended, or that it still runs. `event_fd` becomes readable when it ends. */
enum fl_mover_end fl_mover_ended(struct fl_mover *mover);
int fl_mover_event_fd(struct fl_mover *mover);

#endif
