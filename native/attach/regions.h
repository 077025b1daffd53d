/* SPDX-License-Identifier: Apache-2.0 */
/* Guest memory among a VMM's mappings. */
#ifndef FL_ATTACH_REGIONS_H
#define FL_ATTACH_REGIONS_H

#include "base/refused.h"

/* QEMU's name for the file of a memory-backend-memfd. */
#define FL_GUEST_MEMFD_PREFIX "/memfd:memory-backend-memfd"

/*
 * Fill in `out->regions`, sorted by address, and `out->memory_bytes`. -EPERM with `why` when the memory cannot be
 * served, other negative errno when /proc could not be read.
 */
int fl_regions_find(int pid, struct fl_inspection *out, struct fl_refused *why);

/*
 * Does any other process map one of the regions' files? Those of `skip_pids` (0: nobody) and their children
 * may. -EPERM with `why` naming the first.
 */
int fl_regions_other_mapper(int pid, const struct fl_inspection *in, const int *skip_pids, int skip_count,
                            struct fl_refused *why);

/* Locked or registered with a userfaultfd, by smaps: FL_REFUSAL_LOCKED, FL_REFUSAL_FOREIGN_UFFD. */
int fl_regions_check_flags(int pid, const struct fl_inspection *in, struct fl_refused *why);

#endif
