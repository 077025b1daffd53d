/* SPDX-License-Identifier: Apache-2.0 */
/* What the VMM does to its address space: REMOVE, REMAP, UNMAP, FORK. The thread that did it waits until we read. */
#ifndef FL_SWAP_EVENT_H
#define FL_SWAP_EVENT_H

#include "swap/vm.h"

struct uffd_msg;

/*
 * Act on an event other than a page fault. Never blocks; what takes time is left to the mover, or to the caller: it
 * gets the pages that the VMM has freed (mostly none) and whose stored copies must not come back, see swap/removed.h.
 */
struct fl_pages fl_event(struct fl_vm *vm, const struct uffd_msg *message);

#endif
