/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Taking over from a dead pager. The page table is the journal: every entry tells what its owner was about to do,
 * and each such step is either finished or undone here, before anybody else runs.
 */
#ifndef FL_SWAP_RECOVER_H
#define FL_SWAP_RECOVER_H

#include "base/refused.h"
#include "swap/vm.h"

/*
 * Walk the table, put in-flight pages right, rebuild the pool's free lists, count what is away again.
 * *fixed gets the number of pages put right. Damaged entries of pages that are not in the file are poisoned.
 * 0, or -EPERM with the reason.
 */
int fl_recover(struct fl_vm *vm, uint64_t *fixed, struct fl_refused *why);

#endif
