/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory under test: pages of known content, each with its generation and a lock.
 *
 * Every access to a page is made under its lock, so any number of threads may check and rewrite pages while
 * the host takes them away and brings them back; a difference is then the host's doing, never our own race.
 */
#ifndef GUEST_AREA_H
#define GUEST_AREA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "content.h"

struct area {
    struct content_mix mix;
    uint8_t *base;
    _Atomic uint32_t *entries;     /* bit 31: locked; below: generation, 0 = not filled */
    uint64_t reserved_pages;       /* address space, not memory */
    _Atomic uint64_t active_pages; /* pages [0, active) are filled */
    _Atomic uint64_t filled_pages; /* the same, counted while a fill is going on */
    _Atomic uint64_t checked_pages;
    _Atomic uint64_t writes;
    _Atomic uint64_t errors;
    _Atomic uint64_t slowest_ns; /* longest time one page took to be read, since last taken */
};

/* Reserve address space for `pages` pages; nothing is touched. Ends the program if that fails. */
void area_create(struct area *area, const struct content_mix *mix, uint64_t pages, bool huge_pages);

/* Fill the pages [active, pages) with generation 1, by `threads` threads. */
void area_grow(struct area *area, uint64_t pages, unsigned threads);

/* Give the memory of the pages [pages, active) back to the guest's kernel. */
void area_shrink(struct area *area, uint64_t pages);

/*
 * Compare every byte of a page with what it must hold; a difference is counted, described on the console and
 * repaired (with a new generation). With `rewrite` the page gets its next generation's content.
 */
void area_check(struct area *area, uint64_t index, bool rewrite);

/* area_check() every active page, by `threads` threads. */
void area_verify(struct area *area, unsigned threads);

/* Say on the console at which guest-physical address a page lies. */
void area_where(struct area *area, uint64_t index);

#endif
