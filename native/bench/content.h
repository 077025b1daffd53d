/* SPDX-License-Identifier: Apache-2.0 */
/* What the benches fill memory with: the same bytes for every side of a comparison, about 3:1 under lz4. */
#ifndef FL_BENCH_CONTENT_H
#define FL_BENCH_CONTENT_H

#include <stdbool.h>
#include <stdint.h>

#define BENCH_PAGE_BYTES 4096u

/* Content of page number `page`: records with pointers, text, and half-used buffers, in turn. No page is uniform. */
void bench_content_fill(uint64_t page, void *out);
/* The first word of that page: what a touch reads, and enough to tell it from any other. */
uint64_t bench_content_stamp(uint64_t page);
/* Does `content` hold exactly what bench_content_fill() made for `page`? */
bool bench_content_is(uint64_t page, const void *content);

/* The numbers 0 ... count-1 in an order that depends on `seed` alone. `out` has room for `count`. */
void bench_permutation(uint64_t seed, uint32_t count, uint32_t *out);

#endif
