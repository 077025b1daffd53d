/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A bit flips in the entry of a page that is touched then. What is in memory stays as it is; what is not is lost, and the
 * toucher gets an error. And whatever flips, the pages that are away are counted as those that are. An entry that is damaged
 * so that somebody seems to be at work at its page is not waited for without end.
 */
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/serve.h"
#include "served_vm.h"
#include "swap/fault.h"
#include "swap/uffd.h"
#include "victim.h"

#define PAGES 64u
#define FREED 40u /* these are not away: the VMM has given them back */
#define FREED_PAGES 8u

static struct fl_vm vm;

static fl_entry entry_of(uint32_t page) {
    return atomic_load(fl_slot(&vm, fl_region(&vm, 0)->first_page + page));
}

static void flip(uint32_t page, uint64_t *random) {
    atomic_fetch_xor(fl_slot(&vm, fl_region(&vm, 0)->first_page + page), UINT64_C(1) << random_next(random) % 64);
    CHECK(!fl_entry_valid(entry_of(page)), "page %u", page);
}

static uint64_t count_away(void) {
    uint64_t away = 0;
    for (uint32_t page = 0; page < PAGES; page++)
        away += fl_entry_state(entry_of(page)) == FL_PAGE_EVICTED;
    return away;
}

static bool is_counted(uint64_t away) {
    uint64_t zero = FL_READ(&vm, evicted_zero_pages), same = FL_READ(&vm, evicted_same_pages);
    return FL_READ(&vm, evicted_pages) == away && zero <= away && same <= away &&
           zero + same + FL_READ(&vm, evicted_ram_pages) == away;
}

/* A page is counted out just after its waiter is woken. */
static void check_counted(const char *what) {
    uint64_t away = count_away();
    for (unsigned i = 0; i < 5000 && !is_counted(away); i++)
        sleep_ms(1);
    CHECK(is_counted(away), "%s: %llu pages away, %llu counted", what, (unsigned long long)away,
          (unsigned long long)FL_READ(&vm, evicted_pages));
}

static void serve(struct victim *victim, const char *tracker, struct fl_fault_server **faults) {
    struct fl_options options = {.fault_threads = 2, .scan_interval_ms = 3600000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    memset(&vm, 0, sizeof(vm));
    options.vmm_pid = (int)victim->pid;
    CHECK(fl_tracker_list_parse(tracker, &options.trackers), "tracker");
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    CHECK(fl_fault_start(&vm, options.fault_threads, faults) == 0, "fault threads");
}

static void end(struct victim *victim, struct fl_fault_server *faults) {
    kill(victim->pid, SIGKILL);
    fl_fault_stop(faults);
    fl_serve_close(&vm);
    (void)waitpid(victim->pid, NULL, 0);
}

static void check_all(struct victim *victim, uint64_t lost, const char *what) {
    CHECK(victim_verify(victim, 30) == 0, "%s: page %llu read wrong", what,
          (unsigned long long)victim->shared->first_error - 1);
    uint64_t sigbus = atomic_load(&victim->shared->sigbus);
    CHECK(sigbus == lost, "%s: %llu errors", what, (unsigned long long)sigbus);
    check_counted(what);
    CHECK(atomic_load(&vm.vault.header->corrupt) == (lost != 0), "%s: corrupt %u", what,
          atomic_load(&vm.vault.header->corrupt));
}

/* A fault thread writes that just after it has woken the waiter. */
static void check_resident(uint32_t page) {
    for (unsigned i = 0; i < 5000 && entry_of(page); i++)
        sleep_ms(1);
    CHECK(entry_of(page) == 0, "entry %016llx", (unsigned long long)entry_of(page));
}

/* Touches the page for writing, and waits for it. */
static void write_to(struct victim *victim) {
    uint64_t writes = atomic_load(&victim->shared->writes);
    victim_hold(victim, false);
    for (unsigned i = 0; i < 20000 && atomic_load(&victim->shared->writes) == writes; i++)
        sleep_ms(1);
    CHECK(atomic_load(&victim->shared->writes) > writes, "no write");
    victim_hold(victim, true);
}

/* The fault tells of a page that is mapped. */
static void protected_stays(struct victim *victim, uint64_t *random) {
    uint64_t address = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page);
    CHECK(fl_uffd_protect_patiently(&vm, address, FL_PAGE_SIZE, true, 1000) == 0, "protect");
    flip(0, random);
    write_to(victim);
    check_resident(0);
    check_all(victim, 0, "a protected page");
}

/* The fault tells of a page that is in the file and not mapped, as there is under RWP. */
static void unmapped_stays(struct victim *victim, uint64_t *random) {
    static const uint8_t zeros[FL_PAGE_SIZE];
    uint64_t before = FL_READ(&vm, minor_faults);
    victim_order(victim, VICTIM_REMOVE, FREED, FREED_PAGES, 10);
    for (uint32_t page = FREED; page < FREED + FREED_PAGES; page++) {
        uint64_t offset = fl_offset_of_page(&vm, 0, fl_region(&vm, 0)->first_page + page);
        CHECK(pwrite(vm.memory[0].fd, zeros, sizeof(zeros), (off_t)offset) == (ssize_t)sizeof(zeros), "pwrite");
        flip(page, random);
    }
    check_all(victim, 0, "pages that are not mapped");
    for (uint32_t page = FREED; page < FREED + FREED_PAGES; page++)
        check_resident(page);
    for (unsigned i = 0; i < 5000 && FL_READ(&vm, minor_faults) < before + FREED_PAGES; i++)
        sleep_ms(1);
    CHECK(FL_READ(&vm, minor_faults) == before + FREED_PAGES, "%llu of %u faults told of a page in the file",
          (unsigned long long)(FL_READ(&vm, minor_faults) - before), FREED_PAGES);
}

static void holes_are_lost(struct victim *victim, uint64_t *random) {
    evict_first(&vm, 32);
    check_counted("evicted");
    victim_order(victim, VICTIM_REMOVE, FREED, FREED_PAGES, 10);
    uint64_t lost = 0;
    for (uint32_t page = 1; page < 32; page++) {
        if (fl_entry_state(entry_of(page)) == FL_PAGE_EVICTED && page % 2) {
            flip(page, random);
            lost++;
        }
    }
    for (uint32_t page = FREED; page < FREED + FREED_PAGES; page++, lost++)
        flip(page, random);
    check_all(victim, lost, "holes");
}

/* What an entry was overwritten with may look as if somebody were at work at its page, but for one bit. */
static void nobody_is_at_work(struct victim *victim, uint64_t *random) {
    static const enum fl_page_state owned[] = {FL_PAGE_PUNCHING, FL_PAGE_LOADING, FL_PAGE_BUSY};
    uint64_t lost = atomic_load(&victim->shared->sigbus), before = lost;
    evict_first(&vm, 32);
    for (uint32_t page = 1; page < 32 && lost < before + sizeof(owned) / sizeof(owned[0]); page++) {
        if (fl_entry_state(entry_of(page)) != FL_PAGE_EVICTED)
            continue;
        fl_entry looks_owned = fl_entry_make(owned[lost++ - before], FL_TIER_ZERO, 0);
        atomic_store(fl_slot(&vm, fl_region(&vm, 0)->first_page + page), looks_owned);
        flip(page, random);
    }
    CHECK(lost == before + sizeof(owned) / sizeof(owned[0]), "hardly a page is away");
    CHECK(victim_verify(victim, 30) == 0, "page %llu read wrong", (unsigned long long)victim->shared->first_error - 1);
    CHECK(atomic_load(&victim->shared->sigbus) == lost, "%llu of %llu errors",
          (unsigned long long)(atomic_load(&victim->shared->sigbus) - before), (unsigned long long)(lost - before));
}

static void run(uint64_t random, const char *tracker, void (*first)(struct victim *victim, uint64_t *random),
                void (*second)(struct victim *victim, uint64_t *random)) {
    struct fl_fault_server *faults;
    struct victim victim = victim_start(PAGES, 1, random);
    victim.shared->hot_pages = 1;
    victim_hold(&victim, true);
    serve(&victim, tracker, &faults);
    first(&victim, &random);
    if (second)
        second(&victim, &random);
    end(&victim, faults);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t random = seed_of(argc, argv);
    struct fl_kernel_features features;
    setvbuf(stdout, NULL, _IOLBF, 0);
    fl_log_setup(FL_LOG_ERROR, 0);
    run(random, "zap", protected_stays, holes_are_lost);
    run(random + 2, "zap", nobody_is_at_work, NULL);
    CHECK(fl_probe_kernel(&features) == 0, "probe");
    if (features.rwp)
        run(random + 1, "rwp", unmapped_stays, holes_are_lost);
    else
        printf("pages that are not mapped not tried: %s\n", features.rwp_lacks);
    return 0;
}
