/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Races between evictions and writes to the very pages that are being evicted, with each kind of freeze that the kernel
 * has. The threads of the victim write whole pages and check every byte of what they wrote before, and stay on a page
 * about as long as an eviction takes; nobody asks whether a page is cold. On a host of two NUMA nodes all pages are moved
 * from one to the other meanwhile, without a rest.
 *
 * A race is an eviction that meets a touch between its freeze and its end. Either the touch cancels it, or the page is
 * stored already, the hole is made, and the touch that asked for the page as it was has it back from the store. Only
 * these are counted as races, not evictions of pages that nobody was at.
 *
 *   test_evict_race [seed]     $FL_RACES: how many, with each kind; a million is the figure of SPECIFICATION.md.
 *                              $FL_TRACKER: only the kind of freeze that goes with this tracker
 */
#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "host_memory.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "victim.h"

#define PAGES 64u            /* few, so that many are evicted with somebody at them */
#define STAY 256u            /* touches of a page in a row, at most: then about half of the evictions meet one */
#define LIMIT_SECONDS 21600u /* for a million, emulated, on a busy machine */

/*
 * At the least. How many of a thousand are of which kind is the scheduler's choice: 26 to 500 were seen to go past a
 * touch, and once none, where an evictor that had frozen its pages was kept from the CPU until all were touched.
 */
#define CANCELLED_MIN 100u
#define LATE_MIN 5u
#define EVICTED_MIN 100u       /* at a touch or not */
#define LIMIT_EACH_SECONDS 60u /* below what ctest allows */

struct tally {
    uint64_t evicted;   /* whatever touched the page afterwards */
    uint64_t cancelled; /* by a touch while it was frozen */
    uint64_t late;      /* touched while it was there, and answered when it had been punched */
    uint64_t writes;    /* of whole pages, by the victim, at any moment */
};

static uint64_t races_wanted(void) {
    const char *text = getenv("FL_RACES");
    return text ? strtoull(text, NULL, 10) : rounds(10000, 1000);
}

/* What a scan does for pages that did not compress, once they were touched. */
static void try_rejected_again(struct fl_vm *vm) {
    for (uint64_t page = 0; page < PAGES; page++) {
        fl_entry rejected = fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0);
        (void)fl_swap_entry(vm, fl_region(vm, 0)->first_page + page, &rejected, 0);
    }
}

static struct tally tally_now(struct fl_vm *vm, struct fl_fault_server *faults) {
    return (struct tally){.evicted = FL_READ(vm, evictions),
                          .cancelled = FL_READ(vm, evictions_cancelled),
                          .late = fl_fault_late(faults)};
}

static uint64_t races_of(const struct tally *tally) {
    return tally->cancelled + tally->late;
}

static bool enough_of_each(const struct tally *tally) {
    return tally->cancelled >= CANCELLED_MIN && tally->late >= LATE_MIN && tally->evicted >= EVICTED_MIN;
}

/* Evict everything over and over until there were so many races, and enough of each kind. */
static struct tally race(struct fl_vm *vm, struct fl_fault_server *faults, struct victim *victim, uint64_t wanted) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    struct tally tally = {0};
    uint64_t all[FL_WINDOW_PAGES / 64], until = fl_now() + LIMIT_SECONDS * FL_NS_PER_SECOND, each_until = 0;
    uint64_t writes = atomic_load(&victim->shared->writes);
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    while (fl_now() < until) {
        int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, PAGES, all, &done);
        try_rejected_again(vm);
        CHECK(error == 0 || error == -EAGAIN, "evict: %s", strerror(-error));
        CHECK(atomic_load(&victim->shared->errors) == 0, "page %llu read wrong",
              (unsigned long long)victim->shared->first_error - 1);
        tally = tally_now(vm, faults);
        if (!each_until && races_of(&tally) >= wanted)
            each_until = fl_now() + LIMIT_EACH_SECONDS * FL_NS_PER_SECOND;
        if (each_until && (enough_of_each(&tally) || fl_now() > each_until))
            break;
    }
    fl_evictor_destroy(evictor);
    tally.writes = atomic_load(&victim->shared->writes) - writes;
    return tally;
}

static void judge(const struct tally *tally, uint64_t wanted) {
    CHECK(races_of(tally) >= wanted, "only %llu of %llu races in %u s", (unsigned long long)races_of(tally),
          (unsigned long long)wanted, LIMIT_SECONDS);
    CHECK(enough_of_each(tally), "fewer than %u races were cancelled, %u went past a touch, or %u pages evicted",
          CANCELLED_MIN, LATE_MIN, EVICTED_MIN);
}

static void run(const char *tracker, uint64_t seed, uint64_t wanted) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    static struct fl_vm vm;
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->pause_us = 0;
    victim.shared->stay = STAY;
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
        tracker, fl_freeze_name(vm.freeze), (unsigned long long)races_of(&tally), (unsigned long long)tally.cancelled,
        (unsigned long long)tally.late, (unsigned long long)tally.evicted, (unsigned long long)tally.writes,
        (unsigned long long)FL_READ(&vm, faults), (unsigned long long)FL_READ(&vm, sync_windows),
        (unsigned long long)FL_READ(&vm, sync_long_windows), (unsigned long long)FL_READ(&vm, sync_max_ns) / 1000,
        (unsigned long long)took_ms, (unsigned long long)errors);
    CHECK(errors == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    judge(&tally, wanted);
    served_vm_end(&vm, faults);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), wanted = races_wanted();
    const char *only = getenv("FL_TRACKER");
    fl_log_setup(FL_LOG_WARNING, 0);
    if (!only || !strcmp(only, "zap"))
        run("zap", seed, wanted);
    const char *missing = tracker_missing("rwp");
    if (missing)
        printf("rwp not tried: %s\n", missing);
    else if (!only || !strcmp(only, "rwp"))
        run("rwp", seed + 1, wanted);
    return 0;
}
