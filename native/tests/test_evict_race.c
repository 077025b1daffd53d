/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Evictions against writes to the very pages that are being evicted, with each kind of freeze that the kernel has. The
 * threads of the victim write whole pages and check every byte of what they wrote before; nobody asks whether a page is
 * cold. A race is a page that was evicted, or whose eviction a touch cancelled. On a host of two NUMA nodes all pages are
 * moved from one to the other meanwhile, without a rest.
 *
 *   test_evict_race [seed [races]]     $FL_RACES does as `races`; a million is the figure of SPECIFICATION.md
 */
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "host_memory.h"
#include "pager/serve.h"
#include "swap/evict.h"
#include "swap/fault.h"
#include "victim.h"

#define PAGES 64u /* few, so that hardly a page is evicted without somebody at it */
#define LIMIT_SECONDS 6000u

static uint64_t races_wanted(int argc, char **argv) {
    const char *text = argc > 2 ? argv[2] : getenv("FL_RACES");
    return text ? strtoull(text, NULL, 10) : rounds(40000, 4000);
}

static bool possible(const char *tracker) {
    struct fl_tracker_probe probes[FL_TRACKERS];
    CHECK(fl_probe_trackers(0, 0, 0, probes) == 0, "probe");
    for (unsigned i = 0; i < FL_TRACKERS; i++) {
        if (strcmp(fl_tracker_name(probes[i].tracker), tracker) == 0 && probes[i].possible)
            return true;
    }
    printf("%s not tried: it is not possible here\n", tracker);
    return false;
}

static uint64_t races_of(struct fl_vm *vm) {
    return FL_READ(vm, evictions) + FL_READ(vm, evictions_cancelled);
}

/* What a scan does for pages that did not compress, once they were touched. */
static void try_rejected_again(struct fl_vm *vm) {
    for (uint64_t page = 0; page < PAGES; page++) {
        fl_entry rejected = fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0);
        (void)fl_swap_entry(vm, fl_region(vm, 0)->first_page + page, &rejected, 0);
    }
}

/* Evict everything over and over until there were enough races. */
static void race(struct fl_vm *vm, struct victim *victim, uint64_t wanted) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64], until = fl_now() + LIMIT_SECONDS * FL_NS_PER_SECOND;
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    while (races_of(vm) < wanted && fl_now() < until) {
        int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, PAGES, all, &done);
        try_rejected_again(vm);
        CHECK(error == 0 || error == -EAGAIN, "evict: %s", strerror(-error));
        CHECK(atomic_load(&victim->shared->errors) == 0, "page %llu read wrong",
              (unsigned long long)victim->shared->first_error - 1);
    }
    fl_evictor_destroy(evictor);
    CHECK(races_of(vm) >= wanted, "only %llu of %llu races in %u s", (unsigned long long)races_of(vm),
          (unsigned long long)wanted, LIMIT_SECONDS);
}

static void run(const char *tracker, uint64_t seed, uint64_t wanted) {
    struct fl_options options = {.fault_threads = 2, .scan_interval_ms = 10000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    struct fl_fault_server *faults;
    static struct fl_vm vm;
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->pause_us = 0;
    memset(&vm, 0, sizeof(vm));
    options.vmm_pid = (int)victim.pid;
    CHECK(fl_tracker_list_parse(tracker, &options.trackers), "tracker %s", tracker);
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    CHECK(fl_fault_start(&vm, options.fault_threads, &faults) == 0, "fault threads");
    fl_serve_began(&vm, fl_now());
    uint64_t start = fl_now();
    if (host_has_nodes())
        host_mover_start(victim.pid, atomic_load(&fl_region(&vm, 0)->vmm_addr), PAGES);
    race(&vm, &victim, wanted);
    if (host_has_nodes())
        printf("%s: all pages were moved %u times\n", tracker, host_mover_stop());
    uint64_t took_ms = (fl_now() - start) / FL_NS_PER_MS;
    uint64_t errors = victim_verify(&victim, 60);
    printf("%s, freeze %s: %llu evicted, %llu cancelled by a touch, %llu faults, %llu writes, %llu times in sync mode, "
           "%llu of them longer than 5 ms, the longest %llu us, %llu ms: %llu lost\n",
           tracker, fl_freeze_name(vm.freeze), (unsigned long long)FL_READ(&vm, evictions),
           (unsigned long long)FL_READ(&vm, evictions_cancelled), (unsigned long long)FL_READ(&vm, faults),
           (unsigned long long)atomic_load(&victim.shared->writes), (unsigned long long)FL_READ(&vm, sync_windows),
           (unsigned long long)FL_READ(&vm, sync_long_windows), (unsigned long long)FL_READ(&vm, sync_max_ns) / 1000,
           (unsigned long long)took_ms, (unsigned long long)errors);
    CHECK(errors == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    CHECK(FL_READ(&vm, evictions) > wanted / 10 && FL_READ(&vm, evictions_cancelled) > 0, "no races to speak of");
    kill(victim.pid, SIGKILL);
    fl_fault_stop(faults);
    fl_serve_close(&vm);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), wanted = races_wanted(argc, argv);
    fl_log_setup(FL_LOG_WARNING, 0);
    run("zap", seed, wanted);
    if (possible("rwp"))
        run("rwp", seed + 1, wanted);
    return 0;
}
