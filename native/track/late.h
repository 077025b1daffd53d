/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Touches between the harvest of a page and its arming, which would hide them for good: a page that a device is writing to
 * by then would look cold, leave, and miss what is written. So whoever arms looks once more at each chunk, as late as it can,
 * and what was accessed since its harvest is young. What is left is the time from that look to the call behind it.
 */
#ifndef FL_TRACK_LATE_H
#define FL_TRACK_LATE_H

#include "track/pagemap.h"

struct fl_late {
    uint64_t *seen[FL_MAX_REGIONS]; /* as harvested and not armed yet: a bit a page; NULL: not harvested */
    uint64_t pages[FL_MAX_REGIONS]; /* that `seen` has room for */
    uint64_t told[FL_MAX_REGIONS];  /* pages of the region, from its first, that were harvested */
};

/* A scan begins: note from now on what is harvested. 0 or -ENOMEM. */
int fl_late_begin(struct fl_late *late, struct fl_vm *vm);
/* What fl_tracker_ops.harvest has told. Only a scan goes from a region's first page to its last; others are not noted. */
void fl_late_note(struct fl_late *late, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count,
                  const uint64_t *accessed);
/* VMM addresses [from, end) of `region` are about to be armed. 0 or a negative errno; -EAGAIN: they are not in it any more. */
int fl_late_look(struct fl_late *late, struct fl_vm *vm, struct fl_pagemap *pagemap, struct fl_pagemap_kind kind,
                 uint32_t region, uint64_t from, uint64_t end);
/* All is armed, or the tracker goes. */
void fl_late_end(struct fl_late *late);

#endif
