/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that a userspace pager can do: userfaultfd MISSING, read, UFFDIO_COPY from memory, by another process.
 * No table, no decompression, no checks: what Frostline's fault path is measured against.
 */
#ifndef FL_BENCH_BARE_H
#define FL_BENCH_BARE_H

#include <stdint.h>

struct bare; /* shared between the server and whoever started it */

/*
 * Register [memory, memory + bytes) and start a server pinned to `cpu`, with a copy of what is there as its source. Call
 * before any thread exists. Returns 0 or a negative errno. The server ends with this process.
 */
int bare_start(uint8_t *memory, uint64_t bytes, int cpu, struct bare **out);
/* Median of the server's own time from a message read to its page copied, in ns, since the last call; 0: none. */
uint32_t bare_median_ns(struct bare *bare);

#endif
