/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pager with the idle tracker on a real KVM guest: ages say exactly which pages the guest's vCPUs and the VMM itself
 * touched, through the second page tables, and what is evicted by them is read back right.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "idle_field.h"
#include "kvm_vmm.h"
#include "served_vm.h"
#include "victim.h"

#define MEMORY_BYTES (UINT64_C(64) << 20)
#define PAGES ((uint32_t)(MEMORY_BYTES / KVM_GUEST_PAGE))
#define VCPUS 2u
#define SECONDS 60u
#define SEED 3u

static char socket_path[64];
static uint64_t scans_wanted;

struct session {
    struct victim victim; /* the VMM, by what tests of pagers go by */
    struct kvm_vmm vmm;
    pid_t pager;
    struct fl_pager *connection;
    struct fl_vault vault;
};

static bool scanned(const struct fl_status *status) {
    return status->scans >= scans_wanted;
}

static bool armed(const struct fl_status *status) {
    return status->arm_ns > 0;
}

static bool all_cold_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 2 && status->why == FL_WHY_NOTHING_COLD;
}

static struct session start(bool large_pages) {
    static const char *const more[] = {
        "--trackers", "idle", "--scan-interval-ms", "3600000", "--stall-target-permille", "1000", "--log-level",
        "warning",    NULL};
    struct session session = {
        .vmm = kvm_vmm_start(&(struct kvm_guest_config){
            .bytes = MEMORY_BYTES, .vcpus = VCPUS, .large_pages = large_pages, .backing = KVM_GUEST_MEMFD})};
    uint32_t *generations = calloc(PAGES, sizeof(*generations));
    CHECK(generations, "no memory");
    for (uint32_t page = 0; page < PAGES; page++)
        generations[page] = 1;
    session.victim.pid = session.vmm.pid;
    kvm_vmm_fill(&session.vmm, 0, SEED, 0, PAGES, generations, SECONDS);
    free(generations);
    session.pager = pager_start(&session.victim, socket_path, more);
    session.connection = pager_connect(socket_path, 10);
    session.vault = vault_of(session.vmm.pid, false);
    wait_until(&session.victim, armed, 30, "the first arming"); /* no scan yet, by its count */
    return session;
}

static void end(struct session *session) {
    pager_tell(session->connection, (struct fl_command){.kind = FL_COMMAND_DETACH});
    fl_pager_close(session->connection);
    CHECK(pager_wait(session->pager, 60) == FL_EXIT_OK, "detach");
    fl_vault_close(&session->vault);
    kvm_vmm_end(&session->vmm);
}

static void scan(struct session *session) {
    scans_wanted = status_of(&session->victim).scans + 1;
    pager_tell(session->connection, (struct fl_command){.kind = FL_COMMAND_SCAN});
    wait_until(&session->victim, scanned, 30, "a scan");
}

/* Random touches by each vCPU and by the VMM; touched[] is by page. */
static void touch(struct session *session, uint32_t count, uint8_t *touched, uint64_t *random) {
    struct kvm_touch *script = calloc(count, sizeof(*script));
    CHECK(script, "no memory");
    for (uint32_t worker = 0; worker < kvm_guest_workers(session->vmm.guest); worker++) {
        for (uint32_t i = 0; i < count; i++) {
            uint64_t choice = random_next(random);
            script[i] = (struct kvm_touch){.page = (uint32_t)(choice % PAGES), .times = 1};
            script[i].word = (uint16_t)(choice >> 32) % KVM_GUEST_WORDS;
            script[i].kind =
                choice >> 48 & 1 ? KVM_TOUCH_ADD : KVM_TOUCH_LOAD; /* adds 0: a write that changes nothing */
            touched[script[i].page] = 1;
        }
        struct kvm_outcome outcome = kvm_vmm_run(&session->vmm, worker, script, count, SECONDS);
        CHECK(outcome.error == 0, "worker %u: %s", worker, outcome.why);
    }
    free(script);
}

static void check(const struct session *session, const uint8_t *touched, unsigned round) {
    uint32_t missed = 0, wrong = 0, first_missed = 0, first_wrong = 0;
    uint64_t first = session->vault.header->regions[0].first_page;
    for (uint32_t page = 0; page < PAGES; page++) {
        uint8_t age = __atomic_load_n(&session->vault.ages[first + page], __ATOMIC_RELAXED);
        if (touched[page] && age && !missed++)
            first_missed = page;
        if (!touched[page] && !age && !wrong++)
            first_wrong = page;
    }
    CHECK(!missed && !wrong, "round %u: %u touched pages have aged (first %u), %u untouched are young (first %u)",
          round, missed, first_missed, wrong, first_wrong);
}

static void test_ages(bool large_pages, uint64_t *random) {
    static const uint32_t counts[] = {1, 20, 300, 3000, 12000};
    struct session session = start(large_pages);
    uint8_t *touched = malloc(PAGES);
    uint64_t seen = 0;
    CHECK(touched, "no memory");
    scan(&session); /* what came before the first arming */
    for (unsigned round = 0; round < 100; round++) {
        memset(touched, 0, PAGES);
        touch(&session, counts[round % 5], touched, random);
        scan(&session);
        check(&session, touched, round);
        for (uint32_t page = 0; page < PAGES; page++)
            seen += touched[page];
    }
    struct fl_status status = status_of(&session.victim);
    CHECK(status.tracker == FL_TRACKER_IDLE && status.tracker_switches == 0 && status.scan_failures == 0,
          "tracker %s, %llu switches, %llu void scans", fl_tracker_name(status.tracker),
          (unsigned long long)status.tracker_switches, (unsigned long long)status.scan_failures);
    printf("guest pages of %s: %llu of %llu touches by page seen in 100 scans, none wrong; arm %.1f, harvest %.1f ms a "
           "GiB\n",
           large_pages ? "2 MiB" : "4 KiB", (unsigned long long)seen, (unsigned long long)seen,
           (double)status.arm_ns / (double)status.scans / 1e6 * 16,
           (double)status.harvest_ns / (double)status.scans / 1e6 * 16);
    free(touched);
    end(&session);
}

/* A fifth of the memory is touched again and again; the rest goes, and all of it is read back. */
static void test_evict(uint64_t *random) {
    struct session session = start(false);
    uint32_t hot = PAGES / 5, wrong = 0, *generations = calloc(PAGES, sizeof(*generations));
    struct kvm_touch *script = calloc(hot, sizeof(*script));
    CHECK(generations && script, "no memory");
    uint32_t offset = (uint32_t)random_next(random) % (PAGES - hot);
    for (uint32_t i = 0; i < hot; i++)
        script[i] = (struct kvm_touch){.page = offset + i, .times = 1, .kind = KVM_TOUCH_LOAD};
    for (uint32_t page = 0; page < PAGES; page++)
        generations[page] = 1;
    for (unsigned round = 0; round < 5; round++) {
        kvm_vmm_run(&session.vmm, round % VCPUS, script, hot, SECONDS);
        scan(&session);
    }
    kvm_vmm_run(&session.vmm, 0, script, hot, SECONDS); /* and once between the scan and the eviction */
    struct fl_command budget = {.kind = FL_COMMAND_BUDGET,
                                .budget_bytes = MEMORY_BYTES,
                                .lease_ns = UINT64_C(600000000000),
                                .generation = 1,
                                .min_age_ns = 2 * 3600 * UINT64_C(1000000000)};
    CHECK(pager_tell(session.connection, budget).error == 0, "budget");
    wait_until(&session.victim, all_cold_away, 60, "the cold pages away");
    struct fl_status status = status_of(&session.victim);
    printf("%llu of %u cold pages away\n", (unsigned long long)status.evicted_pages, PAGES - hot);
    CHECK(status.evicted_pages <= PAGES - hot && status.evicted_pages > (PAGES - hot) / 10 * 7,
          "hot pages went, or cold ones stayed");
    kvm_vmm_run(&session.vmm, 1, script, hot, SECONDS);
    CHECK(status_of(&session.victim).faults == 0, "hot pages were away");
    CHECK(kvm_vmm_verify(&session.vmm, 0, SEED, 0, PAGES, generations, &wrong, SECONDS) == 0, "page %u", wrong);
    CHECK(status_of(&session.victim).faults > 0, "nothing came back");
    free(generations);
    free(script);
    end(&session);
}

int main(int argc, char **argv) {
    need_page_idle();
    need_paging();
    uint64_t random = seed_of(argc, argv);
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-idle-%d.sock", (int)getpid());
    test_ages(false, &random);
    test_ages(true, &random);
    test_evict(&random);
    return 0;
}
