/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes and what comes back: the coldest pages first on the way out, the youngest first on the way back, in
 * steps short enough that a command or a scan never waits long.
 */
#ifndef FL_PAGER_CHOOSE_H
#define FL_PAGER_CHOOSE_H

#include "pager/scan.h"
#include "swap/bring.h"
#include "swap/evict.h"

/* A walk over all pages with one age threshold. */
struct fl_pass {
    bool active;
    uint8_t threshold; /* out: at least this old; back: at most this old */
    uint32_t region;
    uint64_t page;
};

struct fl_chooser {
    struct fl_vm *vm;
    struct fl_scanner *scanner;
    struct fl_evictor *evictor;
    struct fl_bringer *bringer;
    struct fl_age_counts counts; /* as of the last scan, counted down as pages move */
    struct fl_pass out;
    struct fl_pass back;
};

/* New counts: passes begin anew. */
void fl_choose_restart(struct fl_chooser *chooser);

/*
 * Evict up to `allowance` pages that are at least `min_age` scans old, for at most some 20 ms. *done gets what was
 * evicted. 1: there is more; 0: nothing that old is left; or a negative errno (fl_evict_window).
 */
int fl_choose_evict(struct fl_chooser *chooser, uint64_t allowance, uint8_t min_age, struct fl_evicted *done);

/*
 * Bring back up to `allowance` pages, the youngest first, for at most some 20 ms. 1: there is more; 0: nothing is
 * away any more (that the walk saw); or a negative errno.
 */
int fl_choose_bring(struct fl_chooser *chooser, uint64_t allowance, uint64_t *pages);

#endif
