/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tracker that dies while it scans: in every place where it can fail, and where the host can. The scan is void, no age
 * and no counter moves, and when it is gone for good the next tracker of the list takes over, and it is said: which one, why,
 * and which is the next. Its trackers only count and fail; all else is a served process.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "pager/scan.h"
#include "said.h"
#include "served_vm.h"
#include "victim.h"

#define PAGES (2 * FL_SCAN_PAGES) /* two windows: one can be done when the other fails */
#define FIRST_AGE 7

enum place { NOWHERE, IN_COLLECT, IN_SWEEP, IN_FIRST_WINDOW, IN_SECOND_WINDOW, WITHOUT_RAM_VIEW, IN_ARM };

static struct {
    enum place fails_in;
    int error;
    uint32_t harvests, arms, made, destroyed;
    bool collected; /* it holds what a scan is to be told */
    struct fl_vm *vm;
    void *mapping, *nothing; /* where nothing is mapped */
} fake;

static bool probe(const struct fl_tracked *tracked, const struct fl_kernel_features *kernel, char *detail,
                  size_t bytes) {
    (void)tracked, (void)kernel, (void)detail, (void)bytes;
    return true;
}

static int create(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out) {
    (void)faults;
    fake.vm = vm;
    fake.made++;
    *out = (struct fl_tracker *)&fake;
    return 0;
}

static void destroy(struct fl_tracker *tracker) {
    fake.destroyed += tracker != NULL;
}

static int collect(struct fl_tracker *tracker) {
    (void)tracker;
    fake.collected = true;
    return fake.fails_in == IN_COLLECT ? fake.error : 0;
}

static int sweep(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    (void)tracker;
    *stop_max_ns = 0;
    fake.collected = true;
    return fake.fails_in == IN_SWEEP ? fake.error : 0;
}

static void forget(struct fl_tracker *tracker) {
    (void)tracker;
    fake.collected = false;
}

/* Every other page was accessed. */
static int harvest(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    (void)tracker;
    bool second = first != fl_region(fake.vm, region)->first_page;
    fake.harvests++;
    memset(accessed, 0x55, count / 8);
    if (fake.fails_in == WITHOUT_RAM_VIEW && second) /* what mincore() is asked about is not there any more */
        fake.vm->memory[region].mapping = fake.nothing;
    return fake.fails_in == (second ? IN_SECOND_WINDOW : IN_FIRST_WINDOW) ? fake.error : 0;
}

static int arm(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    (void)tracker;
    *stop_max_ns = 0;
    fake.arms++;
    return fake.fails_in == IN_ARM ? fake.error : 0;
}

#define FAKE(which, op)  \
    {.kind = (which),    \
     .sees_io = true,    \
     .probe = probe,     \
     .create = create,   \
     .destroy = destroy, \
     .op = op,           \
     .harvest = harvest, \
     .voided = forget,   \
     .arm = arm}
static const struct fl_tracker_ops first_choice = FAKE(FL_TRACKER_RWP, collect),
                                   second_choice = FAKE(FL_TRACKER_ZAP, collect), sweeper = FAKE(FL_TRACKER_ZAP, sweep);

static void set_ages(struct fl_vm *vm) {
    memset(vm->vault.ages, FIRST_AGE, PAGES);
}

/* How many pages have the age that an untouched, a touched page gets in one scan, and the one that all had before. */
static void count_ages(const struct fl_vm *vm, uint32_t *older, uint32_t *young, uint32_t *same) {
    *older = *young = *same = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        *older += vm->vault.ages[page] == FIRST_AGE + 1;
        *young += vm->vault.ages[page] == 0;
        *same += vm->vault.ages[page] == FIRST_AGE;
    }
}

/* Scans twice while it fails there, and once more when it does not. */
static void fails(struct fl_scanner *scanner, enum place place, int error, const char *where) {
    struct fl_vm *vm = scanner->vm;
    struct fl_age_counts counts;
    uint32_t older, young, same;
    uint64_t failures = FL_READ(vm, scan_failures);
    memset(&counts, 0xee, sizeof(counts));
    const struct fl_age_counts before = counts;
    fake.fails_in = place;
    fake.error = error;
    fake.mapping = vm->memory[0].mapping;
    set_ages(vm);
    bool moved = fl_scanner_scan(scanner, &counts);
    vm->memory[0].mapping = fake.mapping;
    count_ages(vm, &older, &young, &same);
    CHECK(FL_READ(vm, scan_failures) == failures + 1, "%s: %llu failures counted", where,
          (unsigned long long)(FL_READ(vm, scan_failures) - failures));
    if (place == IN_ARM) { /* what it saw before was whole */
        CHECK(moved && older == PAGES / 2 && young == PAGES / 2, "%s: %u older, %u young", where, older, young);
    } else {
        CHECK(!moved && same == PAGES, "%s: %u pages have moved", where, PAGES - same);
        CHECK(!fake.collected, "%s: what was collected for the void scan is kept", where);
        CHECK(memcmp(&counts, &before, sizeof(counts)) == 0, "%s: the counts of the scan before are gone", where);
    }
    fake.fails_in = NOWHERE;
    fake.harvests = fake.arms = 0;
    set_ages(vm);
    if (!scanner->ops->sweep) { /* nobody knows what was touched meanwhile: armed first, harvested the time after */
        moved = fl_scanner_scan(scanner, &counts);
        count_ages(vm, &older, &young, &same);
        CHECK(!moved && fake.harvests == 0 && same == PAGES, "%s: harvested what was never armed", where);
        CHECK(fake.arms == 1, "%s: armed %u times", where, fake.arms);
    }
    moved = fl_scanner_scan(scanner, &counts);
    count_ages(vm, &older, &young, &same);
    CHECK(fake.arms == (scanner->ops->sweep ? 0 : 2), "%s, then well: armed %u times", where, fake.arms);
    CHECK(moved && older == PAGES / 2 && young == PAGES / 2, "%s, then well: %u older, %u young", where, older, young);
    CHECK(counts.accessed == PAGES / 2 && counts.candidates[FIRST_AGE + 1] == PAGES / 2, "%s: counts", where);
    printf("%s: void, and the one after %s is whole\n", where, scanner->ops->sweep ? "it" : "the next arming");
}

static void check_switch_said(struct said *said, int error) {
    char *log = said_text(said);
    check_said(log, "\"scan_void\"", "tracker rwp on process", strerror(-error));
    check_said(log, "\"tracker_chosen\"", "\"tracker\":\"zap\"", "\"before\":\"rwp\"");
    free(log);
    said_close(said);
}

static void gives_way(struct fl_vm *vm, struct fl_fault_server *faults, int error, uint32_t scans) {
    struct fl_tracker_list list = {.count = 2, .ops = {&first_choice, &second_choice}};
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    uint32_t older, young, same;
    uint64_t switches = FL_READ(vm, tracker_switches);
    struct said said = said_open();
    fake.fails_in = NOWHERE;
    fl_scanner_start(&scanner, vm, faults, &list);
    CHECK(!fl_scanner_scan(&scanner, &counts) && FL_READ(vm, tracker) == FL_TRACKER_RWP, "the first of the list");
    fake.made = fake.destroyed = 0;
    fake.fails_in = IN_SECOND_WINDOW; /* and arming works: after each failure there is a scan that only arms */
    fake.error = error;
    set_ages(vm);
    for (uint32_t i = 0; i < scans; i++) {
        CHECK(FL_READ(vm, tracker) == FL_TRACKER_RWP, "given up after %u scans", i);
        fl_log_setup(FL_LOG_INFO, vm->pid);
        said_begin(&said);
        bool moved = fl_scanner_scan(&scanner, &counts);
        said_end(&said);
        fl_log_setup(FL_LOG_ERROR, vm->pid);
        CHECK(!moved, "a scan that failed counts");
    }
    fake.fails_in = NOWHERE;
    count_ages(vm, &older, &young, &same);
    CHECK(FL_READ(vm, tracker) == FL_TRACKER_ZAP && FL_READ(vm, tracker_switches) == switches + 1,
          "no other took over");
    CHECK(fake.destroyed == 1 && fake.made == 1 && same == PAGES, "made %u, destroyed %u, moved %u", fake.made,
          fake.destroyed, PAGES - same);
    CHECK(!fl_scanner_scan(&scanner, &counts) && fl_scanner_scan(&scanner, &counts), "the next one does not scan");
    fl_scanner_stop(&scanner);
    printf("%s: the next tracker took over after %u scans, and it is said:\n", strerror(-error), scans);
    check_switch_said(&said, error);
}

int main(int argc, char **argv) {
    const struct fl_tracker_list trackers = {.count = 1, .ops = {&first_choice}},
                                 sweepers = {.count = 1, .ops = {&sweeper}};
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    static struct fl_vm vm;
    setvbuf(stdout, NULL, _IOLBF, 0);
    need_paging();
    struct victim victim = victim_start(PAGES, 1, seed_of(argc, argv));
    victim_hold(&victim, true);
    fl_log_setup(FL_LOG_ERROR, (int)victim.pid);
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fake.nothing = mmap(NULL, PAGES * FL_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(fake.nothing != MAP_FAILED && munmap(fake.nothing, PAGES * FL_PAGE_SIZE) == 0, "address space");
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    CHECK(!fl_scanner_scan(&scanner, &counts), "the first scan only arms");
    fails(&scanner, IN_COLLECT, -EIO, "collect fails");
    fails(&scanner, IN_FIRST_WINDOW, -EIO, "the first window fails");
    fails(&scanner, IN_SECOND_WINDOW, -EIO, "the second window fails");
    fails(&scanner, WITHOUT_RAM_VIEW, 0, "the host does not say what is in RAM");
    fails(&scanner, IN_ARM, -EIO, "arming fails");
    fl_scanner_stop(&scanner);
    fl_scanner_start(&scanner, &vm, faults, &sweepers);
    CHECK(!fl_scanner_scan(&scanner, &counts), "the first scan only arms");
    fails(&scanner, IN_SWEEP, -EIO, "the sweep fails");
    fails(&scanner, IN_SECOND_WINDOW, -EIO, "the second window behind a sweep fails");
    fails(&scanner, WITHOUT_RAM_VIEW, 0, "the host does not say behind a sweep what is in RAM");
    fl_scanner_stop(&scanner);
    gives_way(&vm, faults, -ENODEV, 1);
    gives_way(&vm, faults, -EIO, 9);
    served_vm_end(&vm, faults);
    return 0;
}
