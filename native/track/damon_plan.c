/* SPDX-License-Identifier: Apache-2.0 */
#include "track/damon_plan.h"

#include <stdlib.h>

#include "base/clock.h"

#define REGIONS_MIN UINT64_C(64)
#define REGION_COST_FIRST_NS 1500u
#define KERNEL_REGIONS_MIN 3u /* DAMON takes no less */

static int by_address(const void *left, const void *right) {
    const struct fl_damon_range *a = left, *b = right;
    return a->start < b->start ? -1 : a->start > b->start;
}

static void find_ranges(struct fl_vm *vm, struct fl_damon_plan *plan) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        if (atomic_load(&fl_region(vm, i)->gone))
            continue;
        uint64_t start = atomic_load(&fl_region(vm, i)->vmm_addr);
        plan->ranges[count++] = (struct fl_damon_range){start, start + fl_region(vm, i)->length};
        plan->pages += fl_region_pages(vm, i);
    }
    qsort(plan->ranges, count, sizeof(plan->ranges[0]), by_address);
    for (uint32_t i = 0; i < count; i++) {
        if (plan->count && plan->ranges[plan->count - 1].end == plan->ranges[i].start)
            plan->ranges[plan->count - 1].end = plan->ranges[i].end;
        else
            plan->ranges[plan->count++] = plan->ranges[i];
    }
}

static uint64_t divide_up(uint64_t number, uint64_t by) {
    return (number + by - 1) / by;
}

uint32_t fl_damon_grain(uint64_t pages, uint32_t interval_ms, uint64_t region_cost_ns, uint32_t before) {
    uint64_t cost_ns = region_cost_ns ? region_cost_ns : REGION_COST_FIRST_NS;
    uint64_t allowed = interval_ms * FL_NS_PER_MS * FL_DAMON_BUDGET_PERMILLE / 1000 / cost_ns;
    if (allowed > FL_DAMON_REGIONS_MAX)
        allowed = FL_DAMON_REGIONS_MAX;
    if (allowed < REGIONS_MIN)
        allowed = REGIONS_MIN;
    uint32_t grain = 1;
    while (divide_up(pages, grain) > allowed)
        grain *= 2;
    if (grain < before && divide_up(pages, grain) > allowed - allowed / 4)
        grain *= 2;
    return grain;
}

double fl_damon_cpu_percent(uint64_t regions, uint32_t interval_ms) {
    return 100.0 * (double)(regions * REGION_COST_FIRST_NS) / (double)(interval_ms * FL_NS_PER_MS);
}

void fl_damon_make_plan(struct fl_vm *vm, uint64_t region_cost_ns, struct fl_damon_plan *plan) {
    uint32_t before = plan->grain;
    *plan = (struct fl_damon_plan){.count = 0};
    find_ranges(vm, plan);
    if (!plan->count)
        return;
    plan->grain = fl_damon_grain(plan->pages, fl_vault_scan_interval_ms(&vm->vault), region_cost_ns, before);
    plan->regions_min = divide_up(plan->pages, plan->grain);
    if (plan->regions_min < KERNEL_REGIONS_MIN)
        plan->regions_min = KERNEL_REGIONS_MIN;
    /* The kernel cuts each range into pieces of this size, the last one smaller, and joins none again. */
    uint64_t piece = divide_up(plan->pages * FL_PAGE_SIZE / plan->regions_min, FL_PAGE_SIZE) * FL_PAGE_SIZE;
    for (uint32_t i = 0; i < plan->count; i++)
        plan->regions += divide_up(plan->ranges[i].end - plan->ranges[i].start, piece);
    plan->regions_max = plan->regions > plan->regions_min ? plan->regions : plan->regions_min;
}
