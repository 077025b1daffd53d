/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DAMON's sysfs interface (/sys/kernel/mm/damon/admin), which is one for the whole host, shared out among pagers.
 *
 * The first pager makes FL_DAMON_SLOTS kdamonds; each pager takes one and holds a lock on its directory's `state` file, so the
 * kernel itself says which are free when a pager was killed. Slot 0 is never switched on: its settings are the note, for whoever
 * comes next, that all this is ours and whether damon_stat was on before. The last pager to go, or the first after a kill to
 * go as the last, switches damon_stat on again and takes the kdamonds away. The note lives and dies with what it is about.
 *
 * Limits: FL_DAMON_SLOTS - 1 VMs at a time; pagers must see the same mount of sysfs (one network name space), or their locks
 * do not meet.
 */
#ifndef FL_TRACK_DAMON_ADMIN_H
#define FL_TRACK_DAMON_ADMIN_H

#include "track/damon_sysfs.h"

#define FL_DAMON_SLOTS 65u

struct fl_damon_slot {
    uint32_t number;
    struct fl_damon_kdamond kdamond;
    int lock_fd;
    bool stat_was_on; /* as the note says, should somebody take the note away */
};

/* Whether somebody else uses DAMON (damon_stat does not count: it is asked to make room); `who` gets a sentence. */
bool fl_damon_taken(char *who, size_t bytes);

/*
 * Take a free slot. -EBUSY: DAMON is in use by another, or all slots are taken; `why` gets a sentence. Other negative errno:
 * `why` says which file.
 */
int fl_damon_claim(struct fl_damon_slot *out, char *why, size_t bytes);
/*
 * Give it back: the kdamond is off, and after the last slot all is as it was found. Where somebody else has set up DAMON's sysfs
 * meanwhile, all is left as it is.
 */
void fl_damon_release(struct fl_damon_slot *slot);

/* Put back what pagers that were killed have left, unless a living one needs it. Harmless where nothing was left. */
void fl_damon_tidy(void);

#endif
