/* SPDX-License-Identifier: Apache-2.0 */
/* Ages by page and the two histograms made from them: cold-age and promotion. */
#ifndef FL_TRACK_AGE_H
#define FL_TRACK_AGE_H

#include "track/track.h"

/* Counts of pages by exact age, as of the last scan: what the choice of the coldest goes by. */
struct fl_age_counts {
    uint64_t resident[256];   /* in the VMM's file: in host RAM, or swapped out by the host */
    uint64_t candidates[256]; /* of these, the ones worth trying: in host RAM, not rejected */
    uint64_t evicted[256];
    uint64_t accessed;
    uint64_t swapped; /* of the resident ones, swapped out by the host */
};

/* Bin of fl_age_bin_edge() that an age belongs to. */
uint32_t fl_age_bin(uint8_t age);

/*
 * Collect, if the tracker does, and harvest every region into the ages: accessed pages become 0, others one scan older
 * (saturating); holes stay 0, so that a page filled in later starts young. Publishes both histograms in the vault's
 * stats. When the tracker fails anywhere before the end, nothing has moved and its error is returned.
 */
int fl_age_scan(struct fl_vm *vm, const struct fl_tracker_ops *ops, struct fl_tracker *tracker,
                struct fl_age_counts *counts);

/*
 * Ages are counted in scans. Count them in scans that lie `interval_ms` apart from now on: each gets what it amounts to, rounded
 * down; 0 where that is not known. Nobody scans meanwhile.
 */
void fl_age_recount(struct fl_vm *vm, uint32_t interval_ms);

/*
 * What the VMM's file has, without touching anything: bit i of `in_ram` is page first + i, there in host RAM; of
 * `swapped`, one that the host has swapped out. Neither: a hole. count <= FL_SCAN_PAGES. 0 or a negative errno.
 */
int fl_age_look(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint64_t *in_ram, uint64_t *swapped);

#endif
