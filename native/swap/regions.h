/* SPDX-License-Identifier: Apache-2.0 */
/* Regions of a VM: found, registered, moved, gone. Mover (or start-up) only. */
#ifndef FL_SWAP_REGIONS_H
#define FL_SWAP_REGIONS_H

#include "base/refused.h"
#include "swap/vm.h"

/* Open the memfd behind a region and map it without ever touching it. 0 or a negative errno. */
int fl_region_open(struct fl_vm *vm, uint32_t region);
void fl_regions_close(struct fl_vm *vm);

/* How regions are registered from now on; kept in the vault. Nothing may be registered yet, or nothing away. */
void fl_regions_freeze(struct fl_vm *vm, enum fl_freeze freeze);

/*
 * Take in the regions that `found` has and the vault has not (memory that was plugged in), and register them.
 * 0, or -EPERM with the reason; regions taken in before stay. FL_REFUSAL_OTHER_MAPPER: what is mapped now is not what is
 * served (cut, grown, or in another place). Two regions must never share a part of a file: evicted by way of one, a page
 * would read as zeros by way of the other.
 */
int fl_regions_update(struct fl_vm *vm, const struct fl_inspection *found, struct fl_refused *why);

/*
 * Open and register again what an earlier pager had, for `freeze`: registering twice changes nothing, and where the kernel
 * says that it was the other kind, it is that one.
 */
int fl_regions_adopt(struct fl_vm *vm, enum fl_freeze freeze, struct fl_refused *why);

/*
 * Register everything anew for another kind of freeze, or, where the kernel does not, for the one before, with a line in the
 * log. Nothing is away and no fault thread runs.
 */
int fl_regions_refreeze(struct fl_vm *vm, enum fl_freeze freeze, struct fl_refused *why);

/* Unregister everything. The caller has brought everything back. */
void fl_regions_unregister(struct fl_vm *vm);

/* Wake every waiter: messages that a dead pager had read are not delivered again. */
void fl_regions_wake(struct fl_vm *vm);

#endif
