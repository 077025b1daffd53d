/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A page whose frame the kernel is just replacing: mincore() does not show it and for SEEK_DATA there is a hole, and only
 * cachestat() tells. It keeps its age, is not overwritten by an older copy, and is not given up for lost. The moment is short, so
 * both calls are told to lie about one page for a while.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "pager/scan.h"
#include "served_vm.h"
#include "swap/bring.h"
#include "swap/recover.h"
#include "victim.h"

#define PAGES 64u
#define MOVING 18u /* one that compresses */
#define LOOKS 3u   /* that do not show it */
#define TRIES 20u

static struct fl_vm vm;
static uint32_t mincore_lies, seek_lies;

int mincore(void *start, size_t bytes, unsigned char *vector) {
    int result = (int)syscall(SYS_mincore, start, bytes, vector);
    const uint8_t *moving = (const uint8_t *)vm.memory[0].mapping + (size_t)MOVING * FL_PAGE_SIZE;
    if (result == 0 && mincore_lies && moving >= (uint8_t *)start && moving < (uint8_t *)start + bytes) {
        vector[(size_t)(moving - (uint8_t *)start) / FL_PAGE_SIZE] = 0;
        mincore_lies--;
    }
    return result;
}

off_t lseek(int fd, off_t offset, int whence) {
    off_t moving = (off_t)MOVING * FL_PAGE_SIZE, found = syscall(SYS_lseek, fd, offset, whence);
    if (whence != SEEK_DATA || fd != vm.memory[0].fd || found != moving || !seek_lies)
        return found;
    seek_lies--;
    return syscall(SYS_lseek, fd, moving + FL_PAGE_SIZE, SEEK_DATA);
}

static void lie(uint32_t mincores, uint32_t seeks) {
    mincore_lies = mincores;
    seek_lies = seeks;
}

static void check_lied(const char *who) {
    CHECK(!mincore_lies && !seek_lies, "%s: %u and %u looks were not made", who, mincore_lies, seek_lies);
}

static struct fl_fault_server *serve(const struct fl_tracker_list *trackers, uint64_t seed) {
    struct victim victim = victim_start(PAGES, 0, seed);
    memset(&vm, 0, sizeof(vm));
    return served_vm_begin(&vm, victim.pid, trackers, 1);
}

static void keeps_its_age(uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of("zap");
    struct fl_fault_server *faults = serve(&trackers, seed);
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    CHECK(!fl_scanner_scan(&scanner, &counts), "the first scan only arms");
    unsigned scans = 0; /* that move ages: an arming fails where the VMM's main thread gets no CPU */
    for (unsigned i = 0; i < TRIES && scans < 3; i++) {
        if (scans == 2)
            lie(LOOKS, LOOKS);
        if (fl_scanner_settle_zap(&scanner))
            scans += fl_scanner_scan(&scanner, &counts);
        else
            sleep_ms(50);
    }
    CHECK(scans == 3, "only %u of %u scans are not void", scans, TRIES);
    check_lied("the scan");
    const uint8_t *ages = vm.vault.ages + fl_region(&vm, 0)->first_page;
    CHECK(ages[MOVING - 1] == 3 && ages[MOVING] == 3, "ages %u and, of the page that is moved, %u", ages[MOVING - 1],
          ages[MOVING]);
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
    printf("a page that is being moved while it is looked at keeps its age\n");
}

/* Evicted, and written by the VMM since, past us: its content in the file is the newer one. */
static void write_newer(uint8_t *newer) {
    evict_first(&vm, PAGES);
    fl_entry entry = atomic_load(fl_slot(&vm, fl_region(&vm, 0)->first_page + MOVING));
    CHECK(fl_entry_state(entry) == FL_PAGE_EVICTED, "page %u is not away", MOVING);
    memset(newer, 0xee, FL_PAGE_SIZE);
    CHECK(pwrite(vm.memory[0].fd, newer, FL_PAGE_SIZE, (off_t)MOVING * FL_PAGE_SIZE) == (ssize_t)FL_PAGE_SIZE,
          "pwrite");
}

static void check_newer(const uint8_t *newer, const char *when) {
    uint8_t seen[FL_PAGE_SIZE];
    CHECK(pread(vm.memory[0].fd, seen, sizeof(seen), (off_t)MOVING * FL_PAGE_SIZE) == (ssize_t)sizeof(seen), "pread");
    CHECK(memcmp(seen, newer, sizeof(seen)) == 0, "%s: page %u is not what was written last", when, MOVING);
}

static void is_not_overwritten(uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of("zap");
    struct fl_fault_server *faults = serve(&trackers, seed);
    struct fl_bringer *bringer;
    uint8_t newer[FL_PAGE_SIZE];
    uint64_t written = 0;
    CHECK(fl_bringer_create(&vm, &bringer) == 0, "bringer");
    write_newer(newer);
    lie(0, LOOKS);
    CHECK(fl_bring_into_file(bringer, 0, &written) == 0 && written > PAGES / 2, "%llu written back",
          (unsigned long long)written);
    check_lied("writing back");
    check_newer(newer, "written back");
    fl_bringer_destroy(bringer);
    served_vm_end(&vm, faults);
    printf("a page that is being moved is not overwritten by its older copy\n");
}

/* Its entry was on the way back when the pager died, or is damaged: the file decides. */
static void is_not_given_up(uint64_t seed, bool damaged) {
    const struct fl_tracker_list trackers = trackers_of("zap");
    struct fl_fault_server *faults = serve(&trackers, seed);
    struct fl_refused why;
    uint8_t newer[FL_PAGE_SIZE];
    uint64_t fixed;
    write_newer(newer);
    fl_entry_slot *slot = fl_slot(&vm, fl_region(&vm, 0)->first_page + MOVING);
    fl_entry entry = atomic_load(slot);
    atomic_store(slot, damaged ? entry ^ UINT64_C(1) << 20 : fl_entry_with_state(entry, FL_PAGE_LOADING));
    lie(0, LOOKS);
    CHECK(fl_recover(&vm, &fixed, &why) == 0 && fixed == 1, "%llu put right: %s", (unsigned long long)fixed,
          why.detail);
    check_lied("recovery");
    CHECK(fl_entry_state(atomic_load(slot)) == FL_PAGE_RESIDENT, "state %d", (int)fl_entry_state(atomic_load(slot)));
    check_newer(newer, "recovered");
    served_vm_end(&vm, faults);
    printf("a page that is being moved is not given up by recovery%s\n", damaged ? ", its entry damaged" : "");
}

int main(int argc, char **argv) {
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_of(argc, argv);
    fl_log_setup(FL_LOG_WARNING, 0);
    keeps_its_age(seed);
    is_not_overwritten(seed + 1);
    is_not_given_up(seed + 2, false);
    is_not_given_up(seed + 3, true);
    return 0;
}
