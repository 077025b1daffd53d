/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which tracker a pager takes, how memory is registered for it, and what happens when that has to change: between
 * pagers, with pages away, with a page lost, with a descriptor that cannot do it, with a vault that says otherwise.
 */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "pager/serve.h"
#include "served_vm.h"
#include "swap/entry.h"
#include "swap/uffd.h"
#include "victim.h"

#define PAGES 1024u
#define RWP_FEATURES (UINT64_C(3) << 17)

static char socket_path[64];

static bool rwp_here(void) {
    struct fl_kernel_features kernel;
    return fl_probe_kernel(&kernel) == 0 && kernel.rwp;
}

static bool most_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 2;
}

static uint64_t scans_before;

static bool scanned(const struct fl_status *status) {
    return status->scans >= scans_before + 2; /* by this pager, not by the one before it */
}

struct session {
    pid_t pager;
    struct fl_pager *connection;
};

static struct session start(const struct victim *victim, const char *trackers) {
    const char *const more[] = {"--trackers", trackers, "--stall-target-permille", "1000", "--log-level",
                                "error",      NULL};
    struct session session = {.pager = pager_start(victim, socket_path, more)};
    session.connection = pager_connect(socket_path, 10);
    return session;
}

static void release(struct session *session) {
    pager_tell(session->connection, (struct fl_command){.kind = FL_COMMAND_RELEASE});
    fl_pager_close(session->connection);
    CHECK(pager_wait(session->pager, 10) == FL_EXIT_OK, "release");
}

static void uses(const struct victim *victim, uint32_t tracker, uint32_t freeze, const char *when) {
    scans_before = status_of(victim).scans;
    wait_until(victim, scanned, 30, "two scans");
    struct fl_status status = status_of(victim);
    CHECK(status.tracker == tracker && status.freeze == freeze, "%s: tracker %s, freeze %s", when,
          fl_tracker_name(status.tracker), fl_freeze_name(status.freeze));
    printf("%s: tracker %s, freeze %s\n", when, fl_tracker_name(status.tracker), fl_freeze_name(status.freeze));
}

static bool without_tracker(const struct fl_status *status) {
    return status->tracker == FL_TRACKER_NONE && status->why == FL_WHY_NO_TRACKER;
}

/* Pages are served, and nothing goes. */
static void uses_none(const struct victim *victim, const char *when) {
    wait_until(victim, without_tracker, 30, when);
    uint64_t evictions = status_of(victim).evictions;
    sleep_ms(1000);
    struct fl_status status = status_of(victim);
    CHECK(status.evictions == evictions && without_tracker(&status), "%s: tracker %s, why %s", when,
          fl_tracker_name(status.tracker), fl_why_name(status.why));
    printf("%s: none\n", when);
}

/* What is said to one who asks which trackers the next pager could use. */
static void asked(const struct victim *victim, uint32_t tracker, bool possible, const char *words, const char *when) {
    struct fl_tracker_probe probes[FL_TRACKERS];
    CHECK(fl_probe_trackers(victim->pid, 0, 0, probes) == 0, "%s: probe", when);
    for (uint32_t i = 0; i < FL_TRACKERS; i++) {
        if (probes[i].tracker != tracker)
            continue;
        CHECK(probes[i].possible == possible && strstr(probes[i].detail, words), "%s: %s is %spossible: %s", when,
              fl_tracker_name(tracker), probes[i].possible ? "" : "not ", probes[i].detail);
        printf("%s: %s is %spossible: %s\n", when, fl_tracker_name(tracker), possible ? "" : "not ", probes[i].detail);
    }
}

static void with_vault(const struct victim *victim, void (*edit)(struct fl_vault *)) {
    struct fl_vault vault = vault_of(victim->pid, true);
    edit(&vault);
    fl_vault_close(&vault);
}

static void forget_rwp(struct fl_vault *vault) {
    atomic_fetch_and(&vault->header->uffd_features, ~RWP_FEATURES);
}

static void flip_freeze(struct fl_vault *vault) {
    atomic_fetch_xor(&vault->header->freeze, 3);
}

static void spoil_freeze(struct fl_vault *vault) {
    atomic_store(&vault->header->freeze, 0x40000001);
}

static void evict_most(const struct victim *victim, struct session *session) {
    CHECK(pager_budget(session->connection, PAGES * 4096ull, 600).error == 0, "budget");
    wait_until(victim, most_away, 60, "half of the pages away");
}

static void from_one_to_the_other(uint64_t seed) {
    bool rwp = rwp_here();
    uint32_t best = rwp ? FL_TRACKER_RWP : FL_TRACKER_ZAP, best_freeze = rwp ? FL_FREEZE_RWP : FL_FREEZE_WP;
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->hot_pages = 64;
    struct session session = start(&victim, "zap");
    uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "zap asked for");
    if (rwp)
        asked(&victim, FL_TRACKER_RWP, true, "exact to a page", "in use: zap, nothing away");
    release(&session);

    session = start(&victim, "auto");
    uses(&victim, best, best_freeze, "auto, nothing away");
    asked(&victim, FL_TRACKER_ZAP, true, "exact to a page", "auto, nothing away");
    evict_most(&victim, &session);
    if (rwp)
        asked(&victim, FL_TRACKER_ZAP, false, "pages are away: drain the VM, release it, resume it",
              "in use: rwp, pages away");
    asked(&victim, best, true, "exact to a page", "pages away");
    release(&session);

    session = start(&victim, "zap");
    if (rwp)
        uses_none(&victim, "only zap may be used, and pages are away under rwp");
    else
        uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "zap asked for, pages away");
    release(&session);

    with_vault(&victim, flip_freeze);
    asked(&victim, best, false, "pages are away: drain the VM, release it, resume it", "freeze flipped in the vault");
    session = start(&victim, "auto");
    uses(&victim, best, best_freeze, "freeze flipped in the vault");
    release(&session);

    with_vault(&victim, spoil_freeze);
    session = start(&victim, "auto");
    uses(&victim, best, best_freeze, "nonsense for freeze in the vault");
    CHECK(victim_verify(&victim, 60) == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    pager_tell(session.connection, (struct fl_command){.kind = FL_COMMAND_DETACH});
    fl_pager_close(session.connection);
    CHECK(pager_wait(session.pager, 30) == FL_EXIT_OK, "detach");
    CHECK(victim_verify(&victim, 60) == 0, "read wrong after detaching");
    victim_end(&victim);
}

static void descriptor_without_rwp(uint64_t seed) {
    struct victim victim = victim_start(PAGES, 1, seed);
    struct session session = start(&victim, "zap");
    uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "zap asked for");
    release(&session);
    with_vault(&victim, forget_rwp);
    if (rwp_here())
        asked(&victim, FL_TRACKER_RWP, false, "set up without RWP", "a descriptor without RWP");
    session = start(&victim, "auto");
    uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "a descriptor without RWP");
    release(&session);
    kill(victim.pid, SIGKILL);
}

/* Of this process alone: what it sets up has no RWP. */
static bool without_rwp;

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (without_rwp && request == UFFDIO_API && ((const struct uffdio_api *)argument)->features & RWP_FEATURES) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void attach_without_rwp(const struct victim *victim) {
    static struct fl_vm vm;
    struct fl_refused why = {0};
    struct fl_options options = {.vmm_pid = (int)victim->pid,
                                 .fault_threads = 1,
                                 .scan_interval_ms = 10000,
                                 .stall_target_permille = 1000,
                                 .trackers = {.count = 1, .ops = {&fl_tracker_zap}}};
    without_rwp = true;
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    without_rwp = false;
    CHECK(!(vm.uffd_features & RWP_FEATURES), "the descriptor has RWP");
    fl_serve_close(&vm);
}

static void claim_rwp(struct fl_vault *vault) {
    atomic_fetch_or(&vault->header->uffd_features, fl_uffd_features(FL_FREEZE_RWP));
}

static void claim_rwp_and_its_freeze(struct fl_vault *vault) {
    claim_rwp(vault);
    atomic_store(&vault->header->freeze, FL_FREEZE_RWP);
}

/* The vault says that it can, and the kernel that it cannot. */
static void vault_claims_rwp(uint64_t seed) {
    void (*const claims[])(struct fl_vault *) = {claim_rwp, claim_rwp_and_its_freeze};
    struct victim victim = victim_start(PAGES, 1, seed);
    struct session session;
    victim.shared->hot_pages = 64;
    attach_without_rwp(&victim);
    for (unsigned i = 0; i < sizeof(claims) / sizeof(claims[0]); i++) {
        with_vault(&victim, claims[i]);
        session = start(&victim, "auto");
        uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "a vault that claims RWP");
        if (rwp_here())
            asked(&victim, FL_TRACKER_RWP, false, "set up without RWP", "after a vault claimed RWP");
        release(&session);
    }
    session = start(&victim, "auto");
    evict_most(&victim, &session);
    CHECK(victim_verify(&victim, 60) == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    pager_tell(session.connection, (struct fl_command){.kind = FL_COMMAND_DETACH});
    fl_pager_close(session.connection);
    CHECK(pager_wait(session.pager, 30) == FL_EXIT_OK, "detach");
    victim_end(&victim);
}

/* The first page that is away, by an entry that cannot be believed: it is lost. */
static void lose_page(struct fl_vault *vault) {
    for (uint32_t page = PAGES / 2; page < PAGES; page++) {
        uint64_t entry = atomic_load(&vault->table[page]);
        if (fl_entry_state(entry) == FL_PAGE_EVICTED) {
            atomic_store(&vault->table[page], entry ^ 1);
            return;
        }
    }
    CHECK(false, "no page is away");
}

static bool nothing_away(const struct fl_status *status) {
    return status->evicted_pages == 0;
}

/* Changing how memory is registered forgets which pages are poisoned: not while any page is lost. */
static void lost_page(uint64_t seed) {
    struct victim victim = victim_start(PAGES, 1, seed);
    victim.shared->hot_pages = 64;
    struct session session = start(&victim, "zap");
    evict_most(&victim, &session);
    pager_kill(session.pager);
    fl_pager_close(session.connection);
    with_vault(&victim, lose_page);
    session = start(&victim, "zap");
    CHECK(pager_tell(session.connection, (struct fl_command){.kind = FL_COMMAND_DRAIN}).error == 0, "drain");
    wait_until(&victim, nothing_away, 30, "drained");
    release(&session);
    if (rwp_here())
        asked(&victim, FL_TRACKER_RWP, false, "pages of it are lost", "a page is lost, nothing away");

    session = start(&victim, "auto");
    uses(&victim, FL_TRACKER_ZAP, FL_FREEZE_WP, "a page is lost, nothing away");
    CHECK(victim_verify(&victim, 60) == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    CHECK(atomic_load(&victim.shared->sigbus) == 1, "%llu errors given for one lost page",
          (unsigned long long)atomic_load(&victim.shared->sigbus));
    release(&session);
    kill(victim.pid, SIGKILL);
}

/* ---- what has been armed, and where ------------------------------------------------------------------------- */

#define SCAN_TRIES 20u

static uint64_t armed_before;

static bool armed_again(const struct fl_status *status) {
    return status->arm_ns > armed_before;
}

/* Each pager of these scans when it is told to, and once when it is the first. */
static struct session start_slow(const struct victim *victim, const char *trackers) {
    const char *const more[] = {"--trackers", trackers, "--scan-interval-ms", "3600000", "--log-level", "error", NULL};
    struct session session = {.pager = pager_start(victim, socket_path, more)};
    session.connection = pager_connect(socket_path, 30);
    return session;
}

/* What has been armed is counted behind that. */
static void wait_until_counted(const struct victim *victim) {
    struct fl_vault vault = vault_of(victim->pid, false);
    wait_for_round(&vault);
    fl_vault_close(&vault);
}

static void ask_scan(const struct session *session) {
    CHECK(pager_tell(session->connection, (struct fl_command){.kind = FL_COMMAND_SCAN}).error == 0, "scan");
}

/* One that can only arm. */
static void first_scan(const struct victim *victim, const struct session *session) {
    armed_before = status_of(victim).arm_ns;
    ask_scan(session);
    wait_until(victim, armed_again, 60, "the first arming");
    wait_until_counted(victim);
}

/* Harvested once, and armed again: zap needs the VMM's main thread, which may get no CPU for a while. */
static void scan(const struct victim *victim, const struct session *session) {
    bool harvested = false;
    uint64_t until = fl_now() + 60 * FL_NS_PER_SECOND;
    for (unsigned i = 0; i < SCAN_TRIES || fl_now() < until; i++) {
        const struct fl_status before = status_of(victim);
        struct fl_status now = before;
        ask_scan(session);
        for (unsigned k = 0; k < 6000 && now.arm_ns == before.arm_ns && now.scan_failures == before.scan_failures;
             k++) {
            sleep_ms(10);
            now = status_of(victim);
        }
        wait_until_counted(victim);
        now = status_of(victim);
        harvested |= now.scans > before.scans;
        if (harvested && now.scan_failures == before.scan_failures)
            return;
    }
    CHECK(false, "every scan is void");
}

static struct session start_and_scan(const struct victim *victim, const char *tracker, unsigned scans) {
    armed_before = 0;
    struct session session = start_slow(victim, tracker);
    wait_until(victim, armed_again, 60, "the first arming");
    wait_until_counted(victim);
    for (unsigned i = 0; i < scans; i++)
        scan(victim, &session);
    return session;
}

static void crash(struct session *session) {
    fl_pager_close(session->connection);
    pager_kill(session->pager);
}

/* Of all pages. */
static void check_ages(const struct victim *victim, uint8_t least, uint8_t most, const char *tracker,
                       const char *when) {
    struct fl_vault vault = vault_of(victim->pid, false);
    for (uint32_t page = 0; page < PAGES; page++)
        CHECK(vault.ages[page] >= least && vault.ages[page] <= most, "%s, %s: page %u has age %u, not %u to %u",
              tracker, when, page, vault.ages[page], least, most);
    fl_vault_close(&vault);
}

static bool is_possible(const char *tracker) {
    const char *missing = tracker_missing(tracker);
    if (missing)
        printf("%-5s not tried: %s\n", tracker, missing);
    return !missing;
}

/* The VMM moves its memory between two scans, and all of it is touched where it is then. */
static void moved_between_scans(const char *tracker, uint64_t seed) {
    if (!is_possible(tracker))
        return;
    struct victim victim = victim_start(PAGES, 0, seed);
    struct session session = start_and_scan(&victim, tracker, 3);
    check_ages(&victim, 1, 3, tracker, "nobody touched anything");
    victim_order(&victim, VICTIM_MOVE, 0, 0, 30);
    CHECK(victim_verify(&victim, 60) == 0, "%s: read wrong", tracker);
    scan(&victim, &session);
    check_ages(&victim, 0, 0, tracker, "moved, and all touched");
    printf("%-5s memory moved between two scans: young\n", tracker);
    crash(&session);
    victim_end(&victim);
}

/* A pager that has chosen another tracker dies before it has armed anything. Its successor has nothing to harvest. */
static void chosen_and_never_armed(const char *first, const char *second, uint64_t seed) {
    if (!is_possible(first) || !is_possible(second))
        return;
    struct victim victim = victim_start(PAGES, 0, seed);
    struct session session = start_and_scan(&victim, first, 3);
    CHECK(victim_verify(&victim, 60) == 0, "read wrong"); /* all are mapped again */
    for (unsigned i = 0; i < 4; i++)
        scan(&victim, &session);
    check_ages(&victim, 3, 3, first, "touched, and four scans later");
    crash(&session);
    for (unsigned i = 0; i < 2; i++) {
        session = start_slow(&victim, second);
        if (i == 0)
            crash(&session);
    }
    first_scan(&victim, &session);
    check_ages(&victim, 3, 3, second, "the first scan after a pager that armed nothing");
    scan(&victim, &session);
    check_ages(&victim, 4, 4, second, "the second scan");
    printf("%-5s never armed after %s: ages stay\n", second, first);
    crash(&session);
    victim_end(&victim);
}

static void bad_lists(void) {
    static const char *const bad[] = {"", "rwp,", "zap,zap", "zap,nothing", ",zap", "AUTO"};
    struct victim victim = victim_start(16, 0, 1);
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        const char *const more[] = {"--trackers", bad[i], NULL};
        CHECK(pager_wait(pager_start(&victim, socket_path, more), 10) == FL_EXIT_USAGE, "--trackers '%s'", bad[i]);
    }
    kill(victim.pid, SIGKILL);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-choice-%d.sock", (int)getpid());
    from_one_to_the_other(seed);
    descriptor_without_rwp(seed + 1);
    vault_claims_rwp(seed + 3);
    lost_page(seed + 2);
    bad_lists();
    for (unsigned i = 0; i < FL_TRACKERS; i++)
        moved_between_scans(fl_tracker_name(fl_trackers[i]->kind), seed + 4 + i);
    chosen_and_never_armed("rwp", "zap", seed + 8);
    chosen_and_never_armed("zap", "rwp", seed + 9);
    return 0;
}
