/* SPDX-License-Identifier: Apache-2.0 */
/* What of a region the VMM has mapped now, as /proc says: for when events may have been lost with a dead pager. */
#ifndef FL_SWAP_MAPPED_H
#define FL_SWAP_MAPPED_H

#include "swap/vm.h"

#define FL_PIECES_MAX 64u

struct fl_pieces {
    uint64_t bytes; /* of all of them, also of those beyond the limit */
    uint32_t count;
    struct fl_range piece[FL_PIECES_MAX]; /* adjacent mappings are one */
};

/* The parts of a region that are mapped where they belong. 0, or a negative errno (-ESRCH: the VMM has ended). */
int fl_mapped_pieces(struct fl_vm *vm, uint32_t region, struct fl_pieces *out);

/* Whether a mapping begins behind `start` and before `end`: what lies between is not of one piece. What cannot be told is not. */
bool fl_mapping_begins_in(struct fl_vm *vm, uint64_t start, uint64_t end);

/* Where all of the region is mapped instead. -ENOENT: nowhere. */
int fl_mapped_elsewhere(struct fl_vm *vm, uint32_t region, uint64_t *address);

#endif
