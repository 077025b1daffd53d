/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Evictions against writes to the very pages that are being evicted, with each kind of freeze that the kernel has. The
 * threads of the victim write whole pages and check every byte of what they wrote before; nobody asks whether a page is
 * cold. On a host of two NUMA nodes all pages are moved from one to the other meanwhile, without a rest.
 *
 * Not each eviction is a race: only one that meets a touch between its freeze and its end. Either the touch cancels it, or
 * the page is stored already, the hole is made, and the touch that asked for the page as it was has it back from the store.
 *
 *   test_evict_race [seed [evictions]]     $FL_RACES does as `evictions`; a million is the figure of SPECIFICATION.md
 */
#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "host_memory.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "victim.h"

#define PAGES 64u /* few, so that hardly a page is evicted without somebody at it */
#define LIMIT_SECONDS 6000u

/* Of the evictions begun; seen were 15 to 115 and 2.5 to 40, the least where all threads share one CPU. */
#define CANCELLED_MIN_PERMILLE 5u
#define LATE_MIN_PERMILLE 1u

struct tally {
    uint64_t evicted;   /* whatever touched the page afterwards */
    uint64_t cancelled; /* by a touch while it was frozen */
    uint64_t late;      /* touched while it was there, and answered when it had been punched */
    uint64_t writes;    /* of whole pages, by the victim, at any moment */
};

static uint64_t evictions_wanted(int argc, char **argv) {
    const char *text = argc > 2 ? argv[2] : getenv("FL_RACES");
    return text ? strtoull(text, NULL, 10) : rounds(40000, 4000);
}

static uint64_t begun(struct fl_vm *vm) {
    return FL_READ(vm, evictions) + FL_READ(vm, evictions_cancelled);
}

/* What a scan does for pages that did not compress, once they were touched. */
static void try_rejected_again(struct fl_vm *vm) {
    for (uint64_t page = 0; page < PAGES; page++) {
        fl_entry rejected = fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0);
        (void)fl_swap_entry(vm, fl_region(vm, 0)->first_page + page, &rejected, 0);
    }
}

/* Evict everything over and over until so many evictions were begun. */
static struct tally race(struct fl_vm *vm, struct fl_fault_server *faults, struct victim *victim, uint64_t wanted) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64], until = fl_now() + LIMIT_SECONDS * FL_NS_PER_SECOND;
    uint64_t writes = atomic_load(&victim->shared->writes);
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    while (begun(vm) < wanted && fl_now() < until) {
        int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, PAGES, all, &done);
        try_rejected_again(vm);
        CHECK(error == 0 || error == -EAGAIN, "evict: %s", strerror(-error));
        CHECK(atomic_load(&victim->shared->errors) == 0, "page %llu read wrong",
              (unsigned long long)victim->shared->first_error - 1);
    }
    fl_evictor_destroy(evictor);
    CHECK(begun(vm) >= wanted, "only %llu of %llu evictions in %u s", (unsigned long long)begun(vm),
          (unsigned long long)wanted, LIMIT_SECONDS);
    return (struct tally){.evicted = FL_READ(vm, evictions),
                          .cancelled = FL_READ(vm, evictions_cancelled),
                          .late = fl_fault_late(faults),
                          .writes = atomic_load(&victim->shared->writes) - writes};
}

static void judge(const struct tally *tally) {
    uint64_t all = tally->evicted + tally->cancelled;
    CHECK(tally->evicted > all / 10, "hardly a page is evicted");
    CHECK(tally->cancelled * 1000 >= all * CANCELLED_MIN_PERMILLE, "of 1000 evictions fewer than %u were cancelled",
          CANCELLED_MIN_PERMILLE);
    CHECK(tally->late * 1000 >= all * LATE_MIN_PERMILLE, "of 1000 evictions fewer than %u went past a touch",
          LATE_MIN_PERMILLE);
}

static void run(const char *tracker, uint64_t seed, uint64_t wanted) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    static struct fl_vm vm;
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->pause_us = 0;
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 2);
    uint64_t start = fl_now();
    if (host_has_nodes())
        host_mover_start(victim.pid, atomic_load(&fl_region(&vm, 0)->vmm_addr), PAGES);
    struct tally tally = race(&vm, faults, &victim, wanted);
    if (host_has_nodes())
        printf("%s: all pages were moved %u times\n", tracker, host_mover_stop());
    uint64_t took_ms = (fl_now() - start) / FL_NS_PER_MS;
    uint64_t errors = victim_verify(&victim, 60);
    printf(
        "%s, freeze %s: %llu races: %llu evictions cancelled by a touch, and %llu of %llu evicted past one; %llu "
        "writes meanwhile, %llu faults, %llu times in sync mode, %llu of them longer than 5 ms, the longest %llu us, "
        "%llu ms: %llu lost\n",
        tracker, fl_freeze_name(vm.freeze), (unsigned long long)(tally.cancelled + tally.late),
        (unsigned long long)tally.cancelled, (unsigned long long)tally.late, (unsigned long long)tally.evicted,
        (unsigned long long)tally.writes, (unsigned long long)FL_READ(&vm, faults),
        (unsigned long long)FL_READ(&vm, sync_windows), (unsigned long long)FL_READ(&vm, sync_long_windows),
        (unsigned long long)FL_READ(&vm, sync_max_ns) / 1000, (unsigned long long)took_ms, (unsigned long long)errors);
    CHECK(errors == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    judge(&tally);
    served_vm_end(&vm, faults);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), wanted = evictions_wanted(argc, argv);
    fl_log_setup(FL_LOG_WARNING, 0);
    run("zap", seed, wanted);
    const char *missing = tracker_missing("rwp");
    if (missing)
        printf("rwp not tried: %s\n", missing);
    else
        run("rwp", seed + 1, wanted);
    return 0;
}
