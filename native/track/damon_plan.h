/* SPDX-License-Identifier: Apache-2.0 */
/* What DAMON is asked to look at: the VM's memory, in regions as small as the budget allows. */
#ifndef FL_TRACK_DAMON_PLAN_H
#define FL_TRACK_DAMON_PLAN_H

#include "swap/vm.h"
#include "track/damon_sysfs.h"

#define FL_DAMON_BUDGET_PERMILLE 20u /* of one CPU, for a VM */
#define FL_DAMON_REGIONS_MAX (UINT64_C(1) << 18)

struct fl_damon_plan {
    uint32_t count;
    struct fl_damon_range ranges[FL_MAX_REGIONS]; /* by address, none next to another */
    uint64_t pages;
    uint64_t regions_min, regions_max; /* asked for */
    uint64_t regions;                  /* what follows from that */
    uint32_t grain;                    /* pages a region, at most */
};

/*
 * Pages a region, that the budget allows a VM of so many pages. Coarser than `before` (0: nothing was) as soon as the
 * budget asks for it; finer only when there is room to spare, lest it goes to and fro. `region_cost_ns`: CPU time for one
 * region and scan; 0: not measured yet.
 */
uint32_t fl_damon_grain(uint64_t pages, uint32_t interval_ms, uint64_t region_cost_ns, uint32_t before);
/* Share of one CPU that so many regions would take, before anything was measured. */
double fl_damon_cpu_percent(uint64_t regions, uint32_t interval_ms);

/*
 * `plan` holds the one before (or zeros) and gets the new one. `region_cost_ns`: CPU time for one region and scan; 0:
 * not measured yet. A VM without memory has a plan without ranges.
 */
void fl_damon_make_plan(struct fl_vm *vm, uint64_t region_cost_ns, struct fl_damon_plan *plan);

#endif
