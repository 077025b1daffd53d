/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a page of the workload holds: a pure function of (seed, page index, generation).
 *
 * Two contents that are not zero pages are alike only by a hash collision (31 bits for same-filled pages,
 * 64 for the others), so a page that comes back stale, torn or from elsewhere is told from the right one.
 */
#ifndef GUEST_CONTENT_H
#define GUEST_CONTENT_H

#include <stdint.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,
};

enum content_kind {
    CONTENT_ZERO,         /* all zeros */
    CONTENT_SAME,         /* one 32-bit pattern, never 0, over and over */
    CONTENT_COMPRESSIBLE, /* about 3:1 under lz4, in short matches as real data has them */
    CONTENT_RANDOM,       /* does not compress */
};

/* Which share of the pages is of which kind; the rest is compressible. */
struct content_mix {
    uint64_t seed;
    unsigned zero_percent;
    unsigned same_percent;
    unsigned random_percent;
};

/* A well mixed 64-bit hash of `value`. */
uint64_t content_hash(uint64_t value);

/* The kind that page `index` has in `generation`; a page changes its kind between generations. */
enum content_kind content_kind(const struct content_mix *mix, uint64_t index, uint32_t generation);

/* Write the PAGE_BYTES bytes of page `index` in `generation` to `page` (8-byte aligned), in address order. */
void content_write(const struct content_mix *mix, uint64_t index, uint32_t generation, void *page);

const char *content_kind_name(enum content_kind kind);

#endif
