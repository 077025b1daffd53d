/* SPDX-License-Identifier: Apache-2.0 */
/*
 * When the mover lets nothing go although the budget would: ages that do not know what an arming without a harvest has
 * hidden; while a zap may come; after an arming, for as long as direct I/O may take that it has not seen; when scans
 * come more or less often from now on, until ages mean what they did; and while it fails, which is shown. And that ages
 * move once an interval. Its tracker only counts and fails; all else is a served process.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach/gate.h"
#include "base/clock.h"
#include "base/log.h"
#include "pager/mover.h"
#include "pager/serve.h"
#include "swap/fault.h"
#include "swap/removed.h"
#include "victim.h"

#define PAGES (2 * FL_WINDOW_PAGES) /* the first is passed over until the next scan when it fails */
#define SECONDS 20u
#define LONGEST_IO_MS 300u

static struct {
    _Atomic(int) harvest_error, arm_error;
    _Atomic(bool) failed;
    _Atomic(uint32_t) arms;
    _Atomic(uint64_t) aged_ns; /* as a pager that is killed in this arming would leave it */
    _Atomic(uint64_t) armed_ns;
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
    int error = atomic_load(&fake.arm_error); /* the test goes on, and may change it, when it sees the count */
    atomic_store(&fake.aged_ns, atomic_load(&vm.vault.header->aged_ns));
    atomic_store(&fake.armed_ns, fl_now());
    atomic_fetch_add(&fake.arms, 1);
    return error;
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
    atomic_store(&budget->min_age_ns, 1);
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

/* The ages of the scan before are as old as they were, and worth nothing when touches were not seen since. */
static void nothing_goes_after_an_arming_without_harvest(void) {
    scan();
    allow(8);
    EXPECT(8, FL_WHY_BUDGET, "after a harvest");
    atomic_store(&fake.arm_error, -EIO);
    scan();
    atomic_store(&fake.arm_error, 0);
    allow(16); /* the walk through the old pages has begun, and would go on */
    EXPECT(8, FL_WHY_NOTHING_COLD, "after a harvest and no arming");
    scan(); /* armed, and nothing to harvest */
    EXPECT(8, FL_WHY_NOTHING_COLD, "after an arming without a harvest");
    sleep_ms(600);
    EXPECT(8, FL_WHY_NOTHING_COLD, "a while after it");
    scan();
    allow(64);
    EXPECT(64, FL_WHY_BUDGET, "after the next harvest");
}

/* Killed over and over in its arming, each pager would age what has been idle for milliseconds. */
static void a_successor_keeps_the_rhythm(void) {
    uint64_t before = fl_now();
    scan();
    CHECK(atomic_load(&fake.aged_ns) >= before, "ages have moved, and a successor would move them again at once");
}

/* As a call of the gate that was handed over and has not been made: whenever it is, it hides what was touched before. */
static void set_zap_under_way(bool under_way) {
    uint64_t start = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page);
    struct fl_gate_slot *slot =
        (struct fl_gate_slot *)(void *)(vm.vault.base + vm.vault.gate_offset + FL_GATE_CODE_BYTES);
    __atomic_store_n(&slot->state, under_way ? FL_GATE_RUNNING : FL_GATE_FREE, __ATOMIC_RELEASE);
    if (under_way)
        fl_zap_mark(&vm, start, start + PAGES * FL_PAGE_SIZE);
}

static void nothing_goes_while_a_zap_may_come(void) {
    uint64_t away = FL_READ(&vm, evicted_pages);
    set_zap_under_way(true);
    allow(away + 8);
    EXPECT(away, FL_WHY_FAILED, "while a zap may come");
    sleep_ms(2 * LONGEST_IO_MS);
    EXPECT(away, FL_WHY_FAILED, "while a zap may come, a while later");
    set_zap_under_way(false);
    EXPECT(away + 8, FL_WHY_BUDGET, "after it");
}

/* Perhaps a page was freed, perhaps it was zapped. It waits until that is known, and not for ever. */
static void what_a_zap_may_have_met_waits_for_its_end(struct victim *victim) {
    uint64_t away = FL_READ(&vm, evicted_pages), page = 0;
    while (fl_entry_state(atomic_load(fl_slot(&vm, page))) != FL_PAGE_EVICTED)
        page++;
    set_zap_under_way(true);
    victim_order(victim, VICTIM_REMOVE, (uint32_t)page, 1, SECONDS);
    allow(0);
    EXPECT(1, FL_WHY_DRAIN, "while a zap may come");
    sleep_ms(500);
    EXPECT(1, FL_WHY_DRAIN, "while a zap may come, a while later");
    set_zap_under_way(false);
    EXPECT(0, FL_WHY_BUDGET, "after it");
    scan();
    allow(away);
    EXPECT(away, FL_WHY_BUDGET, "and out again");
}

/* What is shown must not say that it goes on. */
static void a_failure_is_shown(void) {
    atomic_store(&fake.harvest_error, -EIO);
    allow(128);
    EXPECT(64, FL_WHY_FAILED, "while the tracker fails");
    atomic_store(&fake.harvest_error, 0);
    EXPECT(128, FL_WHY_BUDGET, "when it works again");
}

/* What began just before the arming, and was not seen, may still be writing. */
static void nothing_goes_while_unseen_io_may_last(void) {
    scan();
    allow(144);
    EXPECT(144, FL_WHY_BUDGET, "when it is over");
    uint64_t waited_ms = (fl_now() - atomic_load(&fake.armed_ns)) / FL_NS_PER_MS;
    CHECK(waited_ms >= LONGEST_IO_MS, "evicted %llu ms after an arming", (unsigned long long)waited_ms);
}

static void set_interval(uint32_t interval_ms) {
    atomic_store(&vm.vault.header->scan_interval_ms, interval_ms);
    fl_mover_wake(mover);
    for (unsigned i = 0; i < SECONDS * 1000 && fl_vault_age_interval_ms(&vm.vault) != interval_ms; i++)
        sleep_ms(1);
    CHECK(fl_vault_age_interval_ms(&vm.vault) == interval_ms, "ages are still counted as before");
}

static void expect_ages(uint8_t wanted, const char *what) {
    for (uint64_t page = 0; page < PAGES; page++) {
        uint8_t age = __atomic_load_n(&vm.vault.ages[page], __ATOMIC_RELAXED);
        CHECK(age == wanted, "%s: page %llu has age %u", what, (unsigned long long)page, age);
    }
}

static void set_ages(uint8_t age) {
    for (uint64_t page = 0; page < PAGES; page++)
        __atomic_store_n(&vm.vault.ages[page], age, __ATOMIC_RELAXED);
}

/* Ten scans an hour apart are an hour when they lie six minutes apart, and the other way round. */
static void ages_keep_what_they_mean(void) {
    set_ages(20);
    set_interval(1800000);
    expect_ages(40, "half the time between scans");
    set_ages(7);
    set_interval(3600000);
    expect_ages(3, "twice the time between scans");
    set_ages(200);
    set_interval(1000000);
    expect_ages(UINT8_MAX, "more scans than can be counted");
    atomic_store(&vm.vault.header->age_interval_ms, 0); /* a pager died while it did this */
    set_interval(3600000);
    expect_ages(0, "nobody knows how long scans lay apart");
}

/* Some hours old by scans of a second; then scans lie an hour apart, and nobody has been idle for that. */
static void nothing_goes_by_ages_of_other_scans(void) {
    uint64_t hours = 5 * 3600 * FL_NS_PER_SECOND;
    set_ages(100);
    set_interval(3600000);
    scan();
    atomic_store(&vm.vault.header->age_interval_ms, 1000); /* what these ages were */
    atomic_store(&vm.vault.header->budget.min_age_ns, hours);
    set_interval(3600000);
    uint64_t away = FL_READ(&vm, evicted_pages);
    atomic_store(&vm.vault.header->budget.bytes, (away + 64) * FL_PAGE_SIZE);
    fl_mover_wake(mover);
    EXPECT(away, FL_WHY_NOTHING_COLD, "ages of 100 s");
    sleep_ms(2 * LONGEST_IO_MS);
    EXPECT(away, FL_WHY_NOTHING_COLD, "ages of 100 s, a while later");
    set_ages(5);
    scan();
    EXPECT(away + 64, FL_WHY_BUDGET, "ages of five hours and more");
}

int main(int argc, char **argv) {
    struct fl_options options = {
        .fault_threads = 1, .scan_interval_ms = 3600000, .stall_target_permille = 1000, .longest_io_ms = LONGEST_IO_MS};
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
    CHECK(fl_mover_start(&vm, faults, &options, &mover) == 0, "mover");
    for (unsigned i = 0; i < SECONDS * 1000 && !atomic_load(&fake.arms); i++)
        sleep_ms(1);
    nothing_goes_after_an_arming_without_harvest();
    a_failure_is_shown();
    a_successor_keeps_the_rhythm();
    nothing_goes_while_a_zap_may_come();
    what_a_zap_may_have_met_waits_for_its_end(&victim);
    nothing_goes_while_unseen_io_may_last();
    ages_keep_what_they_mean();
    nothing_goes_by_ages_of_other_scans();
    fl_mover_release(mover);
    fl_mover_join(mover);
    kill(victim.pid, SIGKILL);
    fl_fault_stop(faults);
    fl_serve_close(&vm);
    (void)waitpid(victim.pid, NULL, 0);
    return 0;
}
