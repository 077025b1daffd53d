/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernel interfaces that trackers and eviction live on, tried on two pages of our own. A kernel may offer a feature and do
 * only half of it: take the call and not mark the page, or know the mark and refuse the call.
 *
 * Each returns whether all of it works; if not, `lacks` gets a sentence that says which part does not. Nothing of anybody
 * else is touched, no process is made, and no trial waits for a fault to be answered: the kernel gives an error instead.
 */
#ifndef FL_TRACK_TRIAL_H
#define FL_TRACK_TRIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* PAGEMAP_SCAN for PAGE_IS_PRESENT tells what is mapped, and what is not any more. */
bool fl_trial_pagemap_scan(char *lacks, size_t bytes);
/* As FL_FREEZE_WP and `zap` need it. `offered`: the userfaultfd features that the kernel says it has. */
bool fl_trial_wp(uint64_t offered, char *lacks, size_t bytes);
/* As FL_FREEZE_RWP and `rwp` need it: protection, both its modes, and PAGEMAP_SCAN for PAGE_IS_ACCESSED. */
bool fl_trial_rwp(uint64_t offered, char *lacks, size_t bytes);

#endif
