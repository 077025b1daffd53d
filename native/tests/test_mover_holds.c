/* SPDX-License-Identifier: Apache-2.0 */
/*
 * When the mover lets nothing go although the budget would: ages that do not know what an arming without a harvest has
 * hidden; and while it fails, which is shown. Its tracker only counts and fails; all else is a served process.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/mover.h"
#include "pager/serve.h"
#include "swap/fault.h"
#include "victim.h"

#define PAGES (2 * FL_WINDOW_PAGES) /* the first is passed over until the next scan when it fails */
#define SECONDS 20u

static struct {
    _Atomic(int) harvest_error, arm_error;
    _Atomic(bool) failed;
    _Atomic(uint32_t) arms;
} fake;

static struct fl_vm vm;
static struct fl_mover *mover;

static bool probe(const struct fl_tracked *tracked, const struct fl_kernel_features *kernel, char *detail,
                  size_t bytes) {
    (void)tracked, (void)kernel, (void)detail, (void)bytes;
    return true;
}

static int create(struct fl_vm *served, struct fl_fault_server *faults, struct fl_tracker **out) {
    (void)served, (void)faults;
    *out = (struct fl_tracker *)&fake;
    return 0;
}

static void destroy(struct fl_tracker *tracker) {
    (void)tracker;
}

/* Nothing was accessed. Fails once, and then waits for the test, which has to see that. */
static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    (void)tracker, (void)region, (void)first;
    memset(accessed, 0, (count + 63) / 64 * sizeof(*accessed));
    int error = atomic_load(&fake.harvest_error);
    while (error && atomic_exchange(&fake.failed, true)) {
        sleep_ms(1);
        error = atomic_load(&fake.harvest_error);
    }
    return error;
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    (void)tracker;
    *stop_max_ns = 0;
    atomic_fetch_add(&fake.arms, 1);
    return atomic_load(&fake.arm_error);
}

static const struct fl_tracker_ops counting = {
    .kind = FL_TRACKER_ZAP,
    .sees_io = true,
    .probe = probe,
    .create = create,
    .destroy = destroy,
    .harvest = harvest,
    .arm = arm,
};

/* Returns when it is over: the mover has looked round once more. */
static void scan(void) {
    uint32_t before = atomic_load(&fake.arms);
    fl_mover_scan(mover);
    for (unsigned i = 0; i < SECONDS * 1000 && atomic_load(&fake.arms) == before; i++)
        sleep_ms(1);
    CHECK(atomic_load(&fake.arms) == before + 1, "no scan in %u s", SECONDS);
}

static void allow(uint64_t pages) {
    struct fl_vault_budget *budget = &vm.vault.header->budget;
    atomic_store(&budget->min_age_scans, 1);
    atomic_store(&budget->lease_until_ns, fl_now() + 600 * FL_NS_PER_SECOND);
    atomic_store(&budget->bytes, pages * FL_PAGE_SIZE);
    fl_mover_wake(mover);
}

static bool comes(uint64_t away, uint32_t why, unsigned milliseconds) {
    for (unsigned i = 0; i < milliseconds; i++) {
        if (FL_READ(&vm, evicted_pages) == away && FL_READ(&vm, why) == why)
            return true;
        sleep_ms(1);
    }
    return false;
}

#define EXPECT(away, why_then, what)                                                        \
    CHECK(comes((away), (why_then), SECONDS * 1000), "%s: %llu pages away, why %s", (what), \
          (unsigned long long)FL_READ(&vm, evicted_pages), fl_why_name((uint32_t)FL_READ(&vm, why)))

/* The ages of the scan before are as old as they were, and worth nothing. */
static void nothing_goes_after_an_arming_without_harvest(void) {
    scan();
    allow(8);
    EXPECT(8, FL_WHY_BUDGET, "after a harvest");
    atomic_store(&fake.arm_error, -EIO);
    scan(); /* harvested, and then not armed */
    atomic_store(&fake.arm_error, 0);
    allow(16); /* the walk through the old pages has begun, and would go on */
    EXPECT(16, FL_WHY_BUDGET, "after a harvest, again");
    scan(); /* armed, and nothing to harvest */
    allow(64);
    EXPECT(16, FL_WHY_NOTHING_COLD, "after an arming without a harvest");
    sleep_ms(600);
    EXPECT(16, FL_WHY_NOTHING_COLD, "a while after it");
    scan();
    EXPECT(64, FL_WHY_BUDGET, "after the next harvest");
}

/* What is shown must not say that it goes on. */
static void a_failure_is_shown(void) {
    atomic_store(&fake.harvest_error, -EIO);
    allow(128);
    EXPECT(64, FL_WHY_FAILED, "while the tracker fails");
    atomic_store(&fake.harvest_error, 0);
    EXPECT(128, FL_WHY_BUDGET, "when it works again");
}

int main(int argc, char **argv) {
    struct fl_options options = {.fault_threads = 1, .scan_interval_ms = 3600000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    struct fl_fault_server *faults;
    setvbuf(stdout, NULL, _IOLBF, 0);
    need_paging();
    struct victim victim = victim_start(PAGES, 0, seed_of(argc, argv));
    options.vmm_pid = (int)victim.pid;
    options.trackers = (struct fl_tracker_list){.count = 1, .ops = {&counting}};
    fl_log_setup(FL_LOG_ERROR, options.vmm_pid);
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    CHECK(fl_fault_start(&vm, options.fault_threads, &faults) == 0, "fault threads");
    fl_serve_began(&vm, fl_now());
    CHECK(fl_mover_start(&vm, faults, &options.trackers, options.stall_target_permille, &mover) == 0, "mover");
    for (unsigned i = 0; i < SECONDS * 1000 && !atomic_load(&fake.arms); i++)
        sleep_ms(1);
    nothing_goes_after_an_arming_without_harvest();
    a_failure_is_shown();
    fl_mover_release(mover);
    fl_mover_join(mover);
    kill(victim.pid, SIGKILL);
    fl_fault_stop(faults);
    fl_serve_close(&vm);
    (void)waitpid(victim.pid, NULL, 0);
    return 0;
}
