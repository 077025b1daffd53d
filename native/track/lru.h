/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages on their way to an LRU list. A page just filled in waits in a batch of its CPU (up to 31 of them) until the batch
 * is full: for ever on an idle CPU. Whoever reads ACCESS bits through the kernel (DAMON, page_idle) is refused pages that are
 * on no list, so their bits are never cleared and they look accessed in every scan. Draining the batches is the remedy.
 */
#ifndef FL_TRACK_LRU_H
#define FL_TRACK_LRU_H

#include <stddef.h>

struct fl_lru {
    void *reserved; /* 2 MiB that stay empty, and one page behind them */
    size_t bytes;
    char *empty;
};

/*
 * Get ready to drain, and try it on a page of our own. 0; -EOPNOTSUPP where it has no effect (no MADV_COLLAPSE: Linux 6.1 with
 * CONFIG_TRANSPARENT_HUGEPAGE has it), or another negative errno. Closing is harmless after either.
 */
int fl_lru_open(struct fl_lru *lru);
void fl_lru_close(struct fl_lru *lru);

/* Put every page that waits on any CPU on its list. Tells no errors: what it could not do shows in fl_lru_open(). */
void fl_lru_drain(const struct fl_lru *lru);

#endif
