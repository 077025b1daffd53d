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
 * `plan` holds the one before (or zeros) and gets the new one. `region_cost_ns`: CPU time for one region and scan; 0: not measured
 * yet. A VM without memory has a plan without ranges.
 */
void fl_damon_make_plan(struct fl_vm *vm, uint64_t region_cost_ns, struct fl_damon_plan *plan);

#endif
