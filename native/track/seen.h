/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a tracker finds accessed at the beginning of a scan, a bit a page, until harvest() has told of it: once, in the order of
 * a scan. Whoever asks about other pages, or again, wants to know of accesses until now. What was told of in a scan that is void
 * in the end can be kept for the next.
 */
#ifndef FL_TRACK_SEEN_H
#define FL_TRACK_SEEN_H

#include "track/pagemap.h"

struct fl_seen {
    uint64_t *bits[FL_MAX_REGIONS]; /* from a region's first page on; NULL: it was not looked at */
    uint64_t pages[FL_MAX_REGIONS]; /* that there is room for */
    uint64_t told[FL_MAX_REGIONS];  /* of them */
    bool begun;                     /* what is kept from a void scan is not told before the next one has begun */
};

/* The bits of a region, zeros at first; NULL: no memory. */
uint64_t *fl_seen_bits(struct fl_seen *seen, struct fl_vm *vm, uint32_t region);
/*
 * Pages of `kind` at VMM addresses [from, end) of `region` are seen, those that were seen before stay so. 0 or a negative
 * errno; -EAGAIN: they are not in that region any more.
 */
int fl_seen_look(struct fl_seen *seen, struct fl_vm *vm, struct fl_pagemap *pagemap, struct fl_pagemap_kind kind,
                 uint32_t region, uint64_t from, uint64_t end);
/* What fl_tracker_ops.harvest tells. False: there is nothing to tell of these, look anew. */
bool fl_seen_tell(struct fl_seen *seen, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count,
                  uint64_t *accessed);
/* A scan begins: what was told of is forgotten, and what was kept is not. */
void fl_seen_begin(struct fl_seen *seen);
/*
 * The scan is void, and what was seen cannot be seen again: the next one is told of it, too. It is young at once, for the pager
 * may be killed before that.
 */
void fl_seen_keep(struct fl_seen *seen, struct fl_vm *vm);
void fl_seen_forget(struct fl_seen *seen);

#endif
