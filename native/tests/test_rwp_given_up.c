/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rwp fails for good, and what reads ACCESS bits takes over: the memory stays registered for RWP, pages that rwp had armed
 * stay armed until they are touched, and are frozen by RWP in sync mode. Its ages are as exact, its evictions lose nothing.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "base/kernel.h"
#include "base/log.h"
#include "pager/scan.h"
#include "said.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "victim.h"

#define PAGES 4096u
#define TOUCHED 400u
#define SCANS 4u
#define TRIES 200u /* 50 ms apart */
#define SECONDS 60u
#define LEAST_PERCENT 99u /* DAMON samples what is on an LRU list */

static _Atomic(bool) rwp_fails;

/* What rwp asks, and nobody else. */
int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    const struct pm_scan_arg *scan = argument;
    if (request == PAGEMAP_SCAN && atomic_load(&rwp_fails) && scan->category_mask & PAGE_IS_ACCESSED) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void scan_whole(struct fl_scanner *scanner) {
    struct fl_age_counts counts;
    for (unsigned i = 0; i < TRIES; i++, sleep_ms(50))
        if (fl_scanner_scan(scanner, &counts) && scanner->armed)
            return;
    CHECK(false, "every scan is void");
}

static void fail_rwp(struct fl_scanner *scanner, const char *next) {
    struct fl_age_counts counts;
    struct said said = said_open();
    fl_log_setup(FL_LOG_INFO, 0);
    said_begin(&said);
    atomic_store(&rwp_fails, true);
    for (unsigned i = 0; i < TRIES && scanner->ops->kind == FL_TRACKER_RWP; i++)
        CHECK(!fl_scanner_scan(scanner, &counts), "a scan of a tracker that fails counts");
    said_end(&said);
    fl_log_setup(FL_LOG_ERROR, 0);
    char words[48], *log = said_text(&said);
    snprintf(words, sizeof(words), "\"tracker\":\"%s\"", next);
    check_said(log, "\"tracker_chosen\"", words, "\"before\":\"rwp\"");
    free(log);
    said_close(&said);
    CHECK(strcmp(fl_tracker_name(scanner->ops->kind), next) == 0, "%s takes over, not %s",
          fl_tracker_name(scanner->ops->kind), next);
}

static uint32_t percent_right(const uint8_t *before, const uint8_t *now, uint32_t first, uint32_t end) {
    uint32_t right = 0;
    for (uint32_t page = first; page < end; page++)
        right += now[page] == (page < TOUCHED ? 0 : before[page] + 1);
    return right * 100 / (end - first);
}

static void check_ages(struct fl_scanner *scanner, struct victim *victim, const uint8_t *ages, const char *tracker) {
    uint8_t before[PAGES];
    for (unsigned i = 0; i < SCANS; i++) {
        memcpy(before, ages, PAGES);
        victim_order(victim, VICTIM_TOUCH, 0, TOUCHED, SECONDS);
        scan_whole(scanner);
        uint32_t seen = percent_right(before, ages, 0, TOUCHED), idle = percent_right(before, ages, TOUCHED, PAGES);
        CHECK(seen >= LEAST_PERCENT, "%s, scan %u: %u %% of what was touched is young", tracker, i, seen);
        CHECK(idle >= LEAST_PERCENT, "%s, scan %u: %u %% of what was not is older", tracker, i, idle);
    }
}

static uint64_t evict_all(struct fl_vm *vm, struct fl_scanner *scanner) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, fl_scanner_harvest, scanner, &evictor) == 0, "evictor");
    for (uint64_t page = 0; page < PAGES; page += FL_WINDOW_PAGES) {
        int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page + page, FL_WINDOW_PAGES, all, &done);
        CHECK(error == 0, "window at page %llu: %s", (unsigned long long)page, strerror(-error));
    }
    fl_evictor_destroy(evictor);
    return done.pages;
}

static void check_next(const char *tracker, uint64_t seed) {
    char names[32];
    static struct fl_vm vm;
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    snprintf(names, sizeof(names), "rwp,%s", tracker);
    const struct fl_tracker_list trackers = trackers_of(names);
    atomic_store(&rwp_fails, false);
    struct victim victim = victim_start(PAGES, 0, seed);
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    CHECK(scanner.ops->kind == FL_TRACKER_RWP && vm.freeze == FL_FREEZE_RWP, "rwp is not in use");
    CHECK(!fl_scanner_scan(&scanner, &counts), "the first scan only arms");
    scan_whole(&scanner);
    fail_rwp(&scanner, tracker);
    CHECK(vm.freeze == FL_FREEZE_RWP, "pages are not frozen by RWP any more");
    for (unsigned i = 0; i < 2; i++) /* the first one only arms, and what was touched before is not known */
        scan_whole(&scanner);
    check_ages(&scanner, &victim, vm.vault.ages + fl_region(&vm, 0)->first_page, tracker);
    uint64_t away = evict_all(&vm, &scanner);
    CHECK(away > PAGES / 2 && away <= PAGES - TOUCHED * LEAST_PERCENT / 100, "%llu pages away, %u were young",
          (unsigned long long)away, TOUCHED);
    CHECK(victim_verify(&victim, SECONDS) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    printf("%-5s takes over from rwp: %u scans as exact, %llu pages evicted, 0 lost\n", tracker, SCANS,
           (unsigned long long)away);
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
}

int main(int argc, char **argv) {
    static const char *const next[] = {"damon", "idle"};
    unsigned tried = 0;
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_of(argc, argv);
    fl_log_setup(FL_LOG_ERROR, 0);
    const char *missing = tracker_missing("rwp");
    for (size_t i = 0; i < sizeof(next) / sizeof(next[0]) && !missing; i++) {
        const char *lacks = tracker_missing(next[i]);
        if (lacks) {
            printf("%-5s not tried: %s\n", next[i], lacks);
            continue;
        }
        check_next(next[i], seed + i);
        tried++;
    }
    if (!tried)
        printf("skipped: %s\n", missing ? missing : "nothing that reads ACCESS bits works here");
    return tried ? 0 : 77;
}
