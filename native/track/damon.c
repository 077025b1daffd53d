/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracker `damon`: ACCESS bits by the kernel's DAMON, `fvaddr` operations on exactly the VM's memory, so that the VMM's own is
 * never looked at.
 *
 * DAMON samples: it makes one page of each region old, sleeps, and looks whether that page is young. Here the sleep is longer
 * than any scan, and what ends it is switching DAMON off: a kdamond that is told to stop wakes, does its last check, reports
 * each region by a tracepoint, and ends. So a scan costs one marking (arm) and one check (collect) of each region, nothing
 * runs in between, and with regions of one page it tells of each page whether it was accessed since the arming.
 *
 *   page-exact       one region a page
 *   region-grained   regions of 2^n pages; one page of each, another in every scan, speaks for all. A region of which a
 *                    share s of the pages was touched is seen with a chance of s: sharp for runs of touched pages,
 *                    blunt for pages touched alone
 *
 * Budget: at most 2 % of one CPU, by the kdamond's own CPU time as measured in the scans before, and at most 2^18 regions (64 B
 * each of kernel memory). What is over makes the regions twice as large; each change is logged (`damon_mode`).
 *
 * ACCESS bits are cleared without a TLB flush, so every arming ends with that (tlb.h).
 *
 * Limits. Between two scans nothing new is known: harvest() tells what the last collect() saw. Whoever else clears
 * ACCESS bits (MGLRU's aging, page_idle) hides accesses. A huge page is young or old as one. The checks of all VMs of a
 * host take turns, since DAMON's sysfs has one lock. The kernel's DAMON must split ranges into min_nr_regions when it
 * starts and check when it is stopped (7.3 does both, 6.19 only the latter): create() tries that out.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "track/damon_admin.h"
#include "track/damon_plan.h"
#include "track/damon_trace.h"
#include "track/direct_io.h"
#include "track/lru.h"
#include "track/rivals.h"
#include "track/tlb.h"
#include "track/track.h"

#define TRIAL_PAGES 16u
#define SLEEP_US UINT64_C(4000000000) /* an hour and more; the kernel holds it in 32 bits */
#define SLEEP_TRUSTED_NS ((SLEEP_US - 10000000) * FL_NS_PER_US)
#define DRAIN_PAUSE_NS FL_NS_PER_MS
#define WORDS(pages) (((pages) + 63) / 64)

struct fl_tracker {
    struct fl_vm *vm;
    struct fl_damon_slot slot;
    struct fl_damon_trace trace;
    struct fl_lru lru;
    struct fl_tlb tlb;
    struct fl_damon_plan plan;
    uint32_t logged_grain;
    bool armed;
    uint64_t armed_ns, arm_cpu_ns;
    uint64_t region_cost_ns;            /* marking and check; 0: not measured yet */
    uint64_t *accessed[FL_MAX_REGIONS]; /* by region of the VM; NULL: was not looked at */
    uint64_t bases[FL_MAX_REGIONS];
};

/* ---- plan ------------------------------------------------------------------------------------------------- */

/* All of it each time: somebody may have changed it meanwhile. */
static int set_plan(struct fl_tracker *tracker, int pid) {
    const struct fl_damon_plan *plan = &tracker->plan;
    const struct fl_damon_settings settings = {
        .pid = pid,
        .ranges = plan->ranges,
        .count = plan->count,
        .regions_min = plan->regions_min,
        .regions_max = plan->regions_max,
        .sample_us = SLEEP_US,
    };
    return fl_damon_set(&tracker->slot.kdamond, &settings);
}

static void log_mode(struct fl_tracker *tracker) {
    const struct fl_damon_plan *plan = &tracker->plan;
    if (plan->grain == tracker->logged_grain)
        return;
    fl_log(FL_LOG_INFO, "damon_mode",
           "\"mode\":\"%s\",\"pages\":%llu,\"regions\":%llu,\"region_pages\":%u,\"region_cost_ns\":%llu,"
           "\"budget_permille\":%u",
           plan->grain == 1 ? "page-exact" : "region-grained", (unsigned long long)plan->pages,
           (unsigned long long)plan->regions, plan->grain, (unsigned long long)tracker->region_cost_ns,
           FL_DAMON_BUDGET_PERMILLE);
    tracker->logged_grain = plan->grain;
}

/* ---- what was accessed ------------------------------------------------------------------------------------- */

static void forget(struct fl_tracker *tracker) {
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        free(tracker->accessed[i]);
        tracker->accessed[i] = NULL;
    }
}

static int make_bitmaps(struct fl_tracker *tracker) {
    forget(tracker);
    for (uint32_t i = 0; i < fl_region_count(tracker->vm); i++) {
        if (!tracker->bases[i])
            continue;
        tracker->accessed[i] = calloc(WORDS(fl_region_pages(tracker->vm, i)), sizeof(uint64_t));
        if (!tracker->accessed[i])
            return -ENOMEM;
    }
    return 0;
}

static void mark(struct fl_tracker *tracker, uint64_t start, uint64_t end) {
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        if (!tracker->accessed[i])
            continue;
        uint64_t base = tracker->bases[i], stop = base + fl_region(tracker->vm, i)->length;
        uint64_t from = start > base ? start : base, to = end < stop ? end : stop;
        for (; from < to; from += FL_PAGE_SIZE) {
            uint64_t page = (from - base) / FL_PAGE_SIZE;
            tracker->accessed[i][page / 64] |= UINT64_C(1) << (page % 64);
        }
    }
}

static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    const uint64_t *bits = tracker->accessed[region];
    uint64_t at = first - fl_region(tracker->vm, region)->first_page;
    /* Memory that came after the arming was not looked at; it is new. */
    memset(accessed, bits ? 0 : 0xff, WORDS(count) * sizeof(*accessed));
    for (uint32_t i = 0; i < count && bits; i++)
        accessed[i / 64] |= (bits[(at + i) / 64] >> ((at + i) % 64) & 1) << (i % 64);
    return 0;
}

/* ---- the check --------------------------------------------------------------------------------------------- */

struct check {
    struct fl_tracker *tracker;
    _Atomic(bool) ended;
    int error;
    uint64_t cpu_ns; /* of the kdamond, from its beginning */
    bool complete;   /* the record of the last region has come */
    uint64_t regions;
};

static void take(void *argument, const struct fl_damon_record *record) {
    struct check *check = argument;
    const struct fl_damon_plan *plan = &check->tracker->plan;
    if (record->accesses)
        mark(check->tracker, record->start, record->end);
    if (record->end == plan->ranges[plan->count - 1].end) {
        check->complete = true;
        check->regions = record->regions;
    }
}

static void *switch_off(void *argument) {
    struct check *check = argument;
    check->error = fl_damon_off(&check->tracker->slot.kdamond);
    atomic_store(&check->ended, true);
    return NULL;
}

/* Switching off returns after the check; meanwhile its records are taken, so that the ring need not hold all. */
static int run_check(struct check *check, struct fl_damon_reader *reader) {
    pthread_t thread;
    int error = 0, pid = check->tracker->slot.kdamond.pid;
    uint64_t start_ns = fl_now();
    bool threaded = pthread_create(&thread, NULL, switch_off, check) == 0;
    if (!threaded)
        switch_off(check);
    while (!atomic_load(&check->ended)) {
        fl_sleep_ns(DRAIN_PAUSE_NS);
        uint64_t cpu_ns = fl_damon_cpu_ns(pid);
        check->cpu_ns = cpu_ns ? cpu_ns : check->cpu_ns;
        if (!error)
            error = fl_damon_reader_drain(reader, take, check);
    }
    if (!check->cpu_ns) /* it was too short to be seen */
        check->cpu_ns = check->tracker->arm_cpu_ns + (fl_now() - start_ns);
    if (threaded)
        pthread_join(thread, NULL);
    if (!error)
        error = fl_damon_reader_drain(reader, take, check);
    return check->error ? check->error : error;
}

static void learn_cost(struct fl_tracker *tracker, uint64_t cpu_ns) {
    uint64_t cost_ns = cpu_ns / tracker->plan.regions, known_ns = tracker->region_cost_ns;
    tracker->region_cost_ns = known_ns ? (known_ns * 3 + cost_ns) / 4 : cost_ns;
    fl_log(FL_LOG_DEBUG, "damon_cost", "\"regions\":%llu,\"mark_cpu_ns\":%llu,\"cpu_ns\":%llu",
           (unsigned long long)tracker->plan.regions, (unsigned long long)tracker->arm_cpu_ns,
           (unsigned long long)cpu_ns);
}

static bool has_ended(const struct fl_vm *vm) {
    return atomic_load(&vm->gone) || (kill(vm->pid, 0) && errno == ESRCH);
}

/* Gone for good, unless it is the VMM that has gone. */
static int lost(const struct fl_tracker *tracker, const char *what) {
    if (has_ended(tracker->vm))
        return -ESRCH;
    fl_log_text(FL_LOG_WARNING, "damon_lost", "%s (kdamond %u on process %d)", what, tracker->slot.number,
                tracker->vm->pid);
    return -ENODEV;
}

static int judge(const struct fl_tracker *tracker, const struct check *check) {
    if (!check->complete)
        return lost(tracker, "DAMON was switched off by somebody else, or this kernel's does not check when it stops");
    if (check->regions < tracker->plan.regions)
        return lost(tracker, "this kernel's DAMON does not split memory into as many regions as it was asked for");
    return 0;
}

static uint64_t now_without_sleep(void) {
    return fl_clock_read(CLOCK_MONOTONIC);
}

static int look(struct fl_tracker *tracker) {
    struct check check = {.tracker = tracker};
    struct fl_damon_reader reader;
    const struct fl_damon_plan *plan = &tracker->plan;
    int error = fl_damon_reader_open(&tracker->trace, tracker->slot.kdamond.pid, plan->regions,
                                     plan->ranges[plan->count - 1].end, &reader);
    if (error)
        return error == -ESRCH ? lost(tracker, "the kdamond has ended") : error;
    error = run_check(&check, &reader);
    fl_damon_reader_close(&reader);
    if (error == -ENODEV)
        return lost(tracker, "DAMON's sysfs was taken away by somebody else");
    if (!error)
        learn_cost(tracker, check.cpu_ns);
    return error ? error : judge(tracker, &check);
}

static int collect(struct fl_tracker *tracker) {
    if (!tracker->armed)
        return -EAGAIN;
    tracker->armed = false;
    forget(tracker);
    if (!tracker->plan.count)
        return 0;
    if (fl_damon_is_on(&tracker->slot.kdamond))
        return lost(tracker, "DAMON was switched off, or its sysfs taken away, by somebody else");
    if (now_without_sleep() - tracker->armed_ns > SLEEP_TRUSTED_NS)
        return -ETIME; /* it has checked once by itself, and nobody listened */
    int error = make_bitmaps(tracker);
    if (!error)
        error = look(tracker);
    if (error)
        forget(tracker);
    /* DAMON was told of addresses: of what the VMM has moved since, it has looked at the empty place. */
    for (uint32_t i = 0; i < fl_region_count(tracker->vm); i++) {
        if (tracker->bases[i] != atomic_load(&fl_region(tracker->vm, i)->vmm_addr)) {
            free(tracker->accessed[i]);
            tracker->accessed[i] = NULL;
        }
    }
    return error;
}

/* ---- the rest of the interface ----------------------------------------------------------------------------- */

/* Anywhere, for what is mapped is not known. */
static void flush_tlbs(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    struct fl_vm *vm = tracker->vm;
    uint64_t pages = 0;
    uint32_t region;
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        pages += fl_region_pages(vm, i);
    fl_tlb_begin(&tracker->tlb);
    for (uint32_t i = 0; i < FL_TLB_FLUSHES; i++) {
        uint64_t page = fl_tlb_random(&tracker->tlb) % pages;
        if (fl_region_of_page(vm, page, &region) && tracker->bases[region])
            fl_tlb_offer(&tracker->tlb, region, page);
    }
    fl_tlb_flush(&tracker->tlb, vm, stop_max_ns);
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    struct fl_vm *vm = tracker->vm;
    *stop_max_ns = 0; /* but for the flush a vCPU waits for the lock of one page table at most */
    int error = fl_damon_off(&tracker->slot.kdamond);
    fl_damon_make_plan(vm, tracker->region_cost_ns, &tracker->plan);
    tracker->armed = !error && !tracker->plan.count;
    if (tracker->armed)
        return 0;
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        bool looked_at = i < fl_region_count(vm) && !atomic_load(&fl_region(vm, i)->gone);
        tracker->bases[i] = looked_at ? atomic_load(&fl_region(vm, i)->vmm_addr) : 0;
    }
    if (!error)
        error = set_plan(tracker, vm->pid);
    fl_lru_drain(&tracker->lru);
    if (!error)
        error = fl_damon_on(&tracker->slot.kdamond, &tracker->arm_cpu_ns);
    if (error && has_ended(vm))
        return -ESRCH;
    if (error)
        return error == -ENODEV ? lost(tracker, "DAMON does not start: somebody else has it, or took its sysfs away")
                                : error;
    flush_tlbs(tracker, stop_max_ns);
    log_mode(tracker);
    tracker->armed_ns = now_without_sleep();
    tracker->armed = true;
    return 0;
}

static void destroy(struct fl_tracker *tracker) {
    if (!tracker)
        return;
    fl_damon_release(&tracker->slot);
    fl_damon_trace_close(&tracker->trace);
    fl_lru_close(&tracker->lru);
    forget(tracker);
    free(tracker);
}

/* Whether this kernel's DAMON does what this tracker lives on, on some pages of our own. */
static int try_out(struct fl_tracker *tracker) {
    uint64_t bytes = (uint64_t)TRIAL_PAGES * FL_PAGE_SIZE;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -errno;
    uint64_t start = (uint64_t)(uintptr_t)memory;
    tracker->plan = (struct fl_damon_plan){.count = 1,
                                           .ranges = {{start, start + bytes}},
                                           .pages = TRIAL_PAGES,
                                           .regions_min = TRIAL_PAGES,
                                           .regions_max = TRIAL_PAGES,
                                           .regions = TRIAL_PAGES,
                                           .grain = 1};
    int error = set_plan(tracker, (int)getpid());
    if (!error)
        error = fl_damon_on(&tracker->slot.kdamond, &tracker->arm_cpu_ns);
    if (!error)
        error = look(tracker);
    tracker->plan = (struct fl_damon_plan){.count = 0};
    tracker->region_cost_ns = 0; /* so few tell nothing */
    munmap(memory, bytes);
    return error;
}

static int create(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out) {
    (void)faults;
    char why[FL_DETAIL_BYTES];
    struct fl_tracker *tracker = calloc(1, sizeof(*tracker));
    if (!tracker)
        return -ENOMEM;
    tracker->vm = vm;
    int error = fl_lru_open(&tracker->lru);
    if (error)
        fl_log_text(FL_LOG_WARNING, "lru_not_drained",
                    "%s; up to 31 pages a CPU will look accessed until other pages follow them", strerror(-error));
    error = fl_damon_trace_open(&tracker->trace);
    if (!error) {
        error = fl_damon_claim(&tracker->slot, why, sizeof(why));
        if (error)
            fl_log_text(FL_LOG_WARNING, "damon_refused", "%s", why);
        else if ((error = try_out(tracker)))
            fl_damon_release(&tracker->slot);
    }
    if (error) {
        fl_damon_trace_close(&tracker->trace);
        fl_lru_close(&tracker->lru);
        free(tracker);
        return error;
    }
    *out = tracker;
    return 0;
}

/* Before anything was measured: on a slower machine regions become larger. */
static void describe_grain(const struct fl_tracked *vm, char *text, size_t bytes) {
    uint32_t interval_ms = vm->scan_interval_ms ? vm->scan_interval_ms : FL_SCAN_INTERVAL_MS;
    uint32_t grain = fl_damon_grain(vm->memory_bytes / FL_PAGE_SIZE, interval_ms, 0, 0);
    if (!vm->memory_bytes)
        snprintf(text, bytes, "exact to a page as far as 2 %% of a CPU reach, by larger regions beyond");
    else if (grain == 1)
        snprintf(text, bytes, "exact to a page at this VM's size, in about %.2g %% of a CPU",
                 fl_damon_cpu_percent(vm->memory_bytes / FL_PAGE_SIZE, interval_ms));
    else
        snprintf(text, bytes,
                 "an estimate at this VM's size: by regions of about %u KiB, of which one page speaks for all",
                 grain * (FL_PAGE_SIZE / 1024));
}

static bool probe(const struct fl_tracked *vm, const struct fl_kernel_features *kernel, char *detail, size_t bytes) {
    struct fl_damon_trace trace;
    if (!kernel->damon_vaddr) {
        snprintf(detail, bytes, "%s", kernel->damon_lacks);
        return false;
    }
    int error = fl_damon_trace_open(&trace);
    fl_damon_trace_close(&trace);
    if (error) {
        snprintf(detail, bytes,
                 "the damon_aggregated tracepoint cannot be had by perf_event_open: %s; it needs tracefs, "
                 "CONFIG_PERF_EVENTS and CAP_PERFMON",
                 strerror(-error));
        return false;
    }
    if (fl_damon_taken(detail, bytes) || fl_direct_io_forbids(vm->pid, detail, bytes))
        return false;
    char grain[128], rivals[FL_RIVALS_BYTES];
    describe_grain(vm, grain, sizeof(grain));
    fl_rivals_describe(false, rivals, sizeof(rivals));
    snprintf(detail, bytes, "%s; KVM's mappings included, free for the guest; damon_stat is off meanwhile%s", grain,
             rivals);
    return true;
}

static uint32_t grain_of(const struct fl_tracker *tracker) {
    return tracker->plan.grain;
}

const struct fl_tracker_ops fl_tracker_damon = {
    .kind = FL_TRACKER_DAMON,
    .freeze = FL_FREEZE_NONE,
    .probe = probe,
    .create = create,
    .destroy = destroy,
    .grain = grain_of,
    .collect = collect,
    .harvest = harvest,
    .voided = forget,
    .arm = arm,
};
