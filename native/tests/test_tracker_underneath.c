/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hotness stays with the address, for each tracker of this host: whatever happens to the memory underneath, a page that
 * nobody touches goes on aging, a touched one is young, and nothing is brought in just to be looked at. Underneath, pages
 * are migrated, swapped out by the host and in again, collapsed and split, evicted and fetched by us; and pagers die.
 *
 *   test_tracker_underneath [seed [tracker]]     FL_PART=moved: only what migrates
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "host_memory.h"
#include "served_vm.h"
#include "tracked_guest.h"

#define MIB (UINT64_C(1) << 20)
#define BYTES (32 * MIB)
#define PAGES ((uint32_t)(BYTES / KVM_GUEST_PAGE))
#define EMPTY 512u
#define TOUCHES 300u
#define MOVING_ROUNDS 100u
#define SECONDS 60u

static const struct subject {
    const char *tracker;
    uint64_t least_ppm;
    /* What it knows of a page is not lost when the kernel moves the page. KVM has ACCESS bits of its own, and drops them. */
    bool keeps;
    /* It tells the pages of a huge page apart; the others see it as one where it is mapped as one. */
    bool splits;
} subjects[] = {{"rwp", 1000000, true, true},
                {"zap", 1000000, true, false},
                {"idle", 1000000, false, false},
                {"damon", 990000, false, false}};

static uint32_t below(uint64_t *random, uint32_t limit) {
    return (uint32_t)(random_next(random) % limit);
}

static uint64_t address_of(const struct tracked_guest *guest, uint32_t page) {
    return (uint64_t)(uintptr_t)kvm_guest_memory(guest->vmm.guest) + (uint64_t)page * KVM_GUEST_PAGE;
}

static int open_memory(const struct tracked_guest *guest) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)guest->vmm.pid, kvm_guest_memory_fd(guest->vmm.guest));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    return fd;
}

/* By a vCPU, by the VMM, or by all at once. */
static void touch_some(struct tracked_guest *guest, uint32_t first, uint32_t count, uint64_t *random) {
    uint32_t pages[TOUCHES], host = kvm_vmm_host(&guest->vmm), way = below(random, 3);
    for (uint32_t i = 0; i < TOUCHES; i++)
        pages[i] = first + below(random, count);
    tracked_touch(guest, way == 0 ? (int)host : way == 1 ? -1 : (int)below(random, host), pages, TOUCHES, random);
}

static void touch_anywhere(struct tracked_guest *guest, uint64_t *random) {
    touch_some(guest, 0, PAGES - EMPTY, random);
}

/* Pages that the file has, in host RAM or in swap: looking at memory that was never touched must not fill it. */
static void check_holes(const struct tracked_guest *guest) {
    struct stat info;
    uint64_t there = 0;
    int fd = open_memory(guest);
    for (uint32_t page = 0; page < PAGES; page++)
        there += guest->there[page];
    CHECK(fstat(fd, &info) == 0, "fstat: %s", strerror(errno));
    CHECK((uint64_t)info.st_blocks * 512 == there * KVM_GUEST_PAGE, "the file has %lld pages and %llu were touched",
          (long long)info.st_blocks / 8, (unsigned long long)there);
    close(fd);
}

static struct tracked_guest start(const struct subject *subject, void (*prepare)(struct kvm_vmm *vmm)) {
    return tracked_start(&(struct tracked_options){
        .tracker = subject->tracker, .bytes = BYTES, .vcpus = 2, .empty_pages = EMPTY, .prepare = prepare});
}

/* What is done next may make the host forget which of these pages were touched: that is not judged. */
static void make_unsure(struct tracked_guest *guest, uint32_t first, uint32_t count) {
    for (uint32_t page = first; page < first + count; page++)
        if (guest->touched[page] == TRACKED_TOUCHED)
            guest->touched[page] = TRACKED_UNSURE;
}

/* ---- migration --------------------------------------------------------------------------------------------- */

static void migrate(struct tracked_guest *guest, int to) {
    const char *missing = host_migrate(guest->vmm.pid, address_of(guest, 0), PAGES, to);
    CHECK(!missing, "%s", missing);
}

/*
 * Returns what share of the pages that could be watched was moved, in percent. Between nodes all come together first: the
 * thread that filled them may have run on either, and what lies where it is to go does not move.
 */
static unsigned migrate_once(struct tracked_guest *guest, int to) {
    static uint64_t before[PAGES], now[PAGES];
    uint32_t watched = 0, moved = 0;
    if (host_has_nodes())
        migrate(guest, !to);
    host_frames(guest->vmm.pid, address_of(guest, 0), PAGES, before);
    migrate(guest, to);
    host_frames(guest->vmm.pid, address_of(guest, 0), PAGES, now);
    for (uint32_t page = 0; page < PAGES; page++) {
        watched += before[page] && now[page];
        moved += before[page] && now[page] && now[page] != before[page];
    }
    return watched ? moved * 100 / watched : 0;
}

static const char *no_migration;

static void prepare_migration(struct kvm_vmm *vmm) {
    (void)vmm;
    no_migration = host_make_holes(BYTES);
}

/* Between NUMA nodes all pages move each time; compaction moves many once, if things lie as it needs them. */
static void test_migrated(const struct subject *subject, uint64_t *random) {
    unsigned percent = 0;
    for (unsigned try = 0; try < 4 && percent < 5; try++) {
        struct tracked_guest guest = start(subject, prepare_migration);
        for (unsigned round = 0; round < 3 && !no_migration; round++) {
            touch_anywhere(&guest, random);
            if (!subject->keeps)
                make_unsure(&guest, 0, PAGES);
            unsigned now = migrate_once(&guest, round % 2 == 0);
            percent = now > percent ? now : percent;
            touch_anywhere(&guest, random);
            (void)tracked_scan(&guest);
            (void)tracked_scan(&guest);
        }
        host_drop_holes();
        check_holes(&guest);
        tracked_judge(&guest, "migrated underneath", subject->least_ppm);
        tracked_end(&guest);
        if (no_migration)
            break;
    }
    if (no_migration || percent < 5)
        printf("%-5s migration not tried: %s\n", subject->tracker,
               no_migration ? no_migration : "compaction has moved next to nothing");
    else
        printf("%-5s %u %% of the pages were migrated at once, by %s\n", subject->tracker, percent,
               host_has_nodes() ? "move_pages()" : "compaction");
}

/* While a page is on its way, its entry is neither empty nor present; scans meet many such. */
static void test_moving(const struct subject *subject, uint64_t *random) {
    if (!subject->keeps)
        return;
    if (!host_has_nodes()) {
        printf("%-5s scans while pages are being moved not tried: the host has one NUMA node\n", subject->tracker);
        return;
    }
    struct tracked_guest guest = start(subject, NULL);
    host_mover_start(guest.vmm.pid, address_of(&guest, 0), PAGES);
    for (unsigned round = 0; round < MOVING_ROUNDS; round++) {
        if (round % 4)
            touch_anywhere(&guest, random);
        (void)tracked_scan(&guest);
    }
    uint32_t moves = host_mover_stop();
    CHECK(moves > 1, "all pages were moved %u times only", moves);
    printf("%-5s all pages were moved %u times in %u scans\n", subject->tracker, moves, MOVING_ROUNDS);
    tracked_judge(&guest, "scanned while on the move", subject->least_ppm);
    tracked_end(&guest);
}

/* ---- swap -------------------------------------------------------------------------------------------------- */

static uint32_t find_swapped(const struct tracked_guest *guest, int fd, uint8_t *swapped) {
    uint32_t count = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        swapped[page] = guest->there[page] && !host_is_cached(fd, page);
        count += swapped[page];
    }
    return count;
}

static uint32_t reclaim(const struct tracked_guest *guest, int fd, uint32_t pages, uint8_t *swapped) {
    uint32_t before = find_swapped(guest, fd, swapped), now = before;
    for (unsigned i = 0; i < 20 && now < before + pages && now < PAGES * 3 / 4; i++) {
        host_cgroup_reclaim((uint64_t)(before + pages - now) * HOST_PAGE);
        now = find_swapped(guest, fd, swapped);
    }
    return now;
}

/* What was in swap and was not touched still is, and the pager has counted all that is in swap now. */
static void check_still_swapped(struct tracked_guest *guest, int fd, const uint8_t *before, const uint8_t *touched) {
    uint8_t now[PAGES];
    uint32_t count = find_swapped(guest, fd, now);
    for (uint32_t page = 0; page < PAGES; page++)
        CHECK(!before[page] || touched[page] || now[page], "%s: page %u came back from swap and nobody touched it",
              guest->tracker, page);
    uint64_t counted = tracked_status(guest).swapped_bytes / HOST_PAGE;
    CHECK(counted == count, "%s: %llu pages counted as swapped out, and %u are", guest->tracker,
          (unsigned long long)counted, count);
}

static bool all_else_away(const struct fl_status *status) {
    return status->evicted_pages > 32 && status->why == FL_WHY_NOTHING_COLD;
}

static bool all_back(const struct fl_status *status) {
    return status->evicted_pages == 0;
}

/* What the host has in swap takes no RAM: it stays there while all else goes, and is not read to be stored elsewhere. */
static void check_not_evicted(struct tracked_guest *guest, int fd) {
    uint8_t swapped[PAGES];
    uint32_t count = reclaim(guest, fd, PAGES / 8, swapped);
    (void)tracked_scan(guest);
    CHECK(pager_budget(guest->connection, BYTES, 600).error == 0, "budget");
    wait_until(&guest->victim, all_else_away, SECONDS, "all that is not in swap away");
    CHECK(pager_budget(guest->connection, BYTES, 0).error == 0, "no lease");
    for (uint32_t page = 0; page < PAGES; page++)
        CHECK(!swapped[page] || (!host_is_cached(fd, page) &&
                                 lseek(fd, (off_t)page * HOST_PAGE, SEEK_DATA) == (off_t)page * HOST_PAGE),
              "%s: page %u was in swap, and is not there any more", guest->tracker, page);
    CHECK(pager_tell(guest->connection, (struct fl_command){.kind = FL_COMMAND_DRAIN}).error == 0, "drain");
    wait_until(&guest->victim, all_back, SECONDS, "everything back");
    printf("%-5s %u pages stayed in the host's swap while others were evicted\n", guest->tracker, count);
    memset(guest->touched, TRACKED_UNTOUCHED, PAGES);
    (void)tracked_scan(guest);
}

static void test_swapped(struct tracked_guest *guest, const struct subject *subject, uint64_t *random) {
    uint8_t swapped[PAGES], touched[PAGES];
    int fd = open_memory(guest);
    uint32_t most = 0;
    for (unsigned round = 0; round < 6; round++) {
        uint32_t count = reclaim(guest, fd, PAGES / 8, swapped);
        most = count > most ? count : most;
        if (round % 3 == 2)
            memset(guest->touched, TRACKED_UNTOUCHED, PAGES); /* nobody: only looked at */
        else
            touch_anywhere(guest, random);
        memcpy(touched, guest->touched, PAGES);
        (void)tracked_scan(guest);
        check_still_swapped(guest, fd, swapped, touched);
        (void)tracked_scan(guest);
        check_still_swapped(guest, fd, swapped, touched);
    }
    CHECK(most > PAGES / 16, "only %u pages were swapped out", most);
    printf("%-5s up to %u pages were in the host's swap\n", guest->tracker, most);
    tracked_judge(guest, "swapped out and in by the host", subject->least_ppm);

    /* Touched first and swapped out then: for a page that has left its page table, that is hard to know. */
    for (unsigned round = 0; round < 2; round++) {
        touch_anywhere(guest, random);
        (void)reclaim(guest, fd, PAGES / 2, swapped);
        for (uint32_t page = 0; page < PAGES; page++)
            if (swapped[page] && guest->touched[page] == TRACKED_TOUCHED)
                guest->touched[page] = TRACKED_UNSURE;
        (void)tracked_scan(guest);
    }
    tracked_judge(guest, "swapped out after it was touched", subject->least_ppm);
    check_not_evicted(guest, fd);
    host_swap_off(); /* which brings everything in again, and nobody has touched it */
    for (unsigned i = 0; i < 3; i++)
        (void)tracked_scan(guest);
    tracked_judge(guest, "swap taken away", subject->least_ppm);
    close(fd);
}

/* ---- huge pages -------------------------------------------------------------------------------------------- */

/*
 * Pages of huge pages of which others were touched since the collapse: each is seen as one, and one that is mapped in parts
 * may go on looking accessed.
 */
static void blur(struct tracked_guest *guest, uint32_t first, uint32_t count, uint8_t *known) {
    for (uint32_t page = first; page < first + count; page++)
        known[(page - first) / HOST_HUGE_PAGES] |= guest->touched[page] == TRACKED_TOUCHED;
    for (uint32_t page = first; page < first + count; page++)
        if (known[(page - first) / HOST_HUGE_PAGES] && guest->touched[page] == TRACKED_UNTOUCHED)
            guest->touched[page] = TRACKED_UNSURE;
}

/* Of four huge pages nobody touches the second and the last. */
static void test_collapsed(struct tracked_guest *guest, const struct subject *subject, uint64_t *random) {
    enum { HUGE = 4 };
    uint32_t first = 2 * HOST_HUGE_PAGES, count = HUGE * HOST_HUGE_PAGES;
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)guest->vmm.pid, kvm_guest_memory_fd(guest->vmm.guest));
    for (unsigned round = 0; round < 4; round++) {
        bool collapse = round % 2 == 0;
        uint8_t known[HUGE] = {0};
        touch_some(guest, 0, first + HOST_HUGE_PAGES, random);
        touch_some(guest, first + 2 * HOST_HUGE_PAGES, HOST_HUGE_PAGES, random);
        uint32_t changed =
            collapse ? host_collapse(guest->vmm.pid, address_of(guest, first), count) : host_split(path, first, count);
        if (!changed) {
            printf("%-5s huge pages not tried: this host does not %s\n", guest->tracker,
                   collapse ? "collapse shared memory" : "split it (debugfs)");
            break;
        }
        printf("%-5s %u huge pages %s\n", guest->tracker, changed, collapse ? "made" : "split");
        make_unsure(guest, first, count);
        for (unsigned scan = 0; scan < 4; scan++) {
            if (scan != 1 - round / 2)
                touch_some(guest, first + (scan % 2) * 2 * HOST_HUGE_PAGES, HOST_HUGE_PAGES, random);
            if (collapse && !subject->splits)
                blur(guest, first, count, known);
            (void)tracked_scan(guest);
        }
    }
    tracked_judge(guest, "collapsed and split", subject->least_ppm);
}

/* ---- ours -------------------------------------------------------------------------------------------------- */

static bool mostly_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4;
}

/* As many pages as there were faults. A fault thread counts the one after the other, behind the wake of who waits. */
static bool wait_until_fetched(struct tracked_guest *guest, const struct fl_status *before) {
    bool same = false;
    for (unsigned i = 0; i < 5000 && !same; i++) {
        struct fl_status now = tracked_status(guest);
        same = before->evicted_pages - now.evicted_pages == now.faults - before->faults;
        if (!same)
            sleep_ms(1);
    }
    return same;
}

static void test_evicted(struct tracked_guest *guest, const struct subject *subject, uint64_t *random) {
    (void)tracked_scan(guest);
    CHECK(pager_budget(guest->connection, BYTES, 600).error == 0, "budget");
    wait_until(&guest->victim, mostly_away, SECONDS, "most of the memory away");
    CHECK(pager_budget(guest->connection, BYTES, 0).error == 0, "no lease"); /* hold: what is away stays away */
    (void)tracked_scan(guest);
    for (unsigned round = 0; round < 6; round++) {
        const struct fl_status before = tracked_status(guest);
        if (round != 3)
            touch_anywhere(guest, random);
        (void)tracked_scan(guest);
        CHECK(wait_until_fetched(guest, &before), "%s: pages came back that nobody touched", guest->tracker);
    }
    tracked_judge(guest, "evicted, fetched by a touch", subject->least_ppm);
    CHECK(pager_tell(guest->connection, (struct fl_command){.kind = FL_COMMAND_DRAIN}).error == 0, "drain");
    wait_until(&guest->victim, all_back, SECONDS, "everything back");
    for (unsigned round = 0; round < 3; round++) { /* what we brought back was touched by nobody */
        (void)tracked_scan(guest);
        touch_anywhere(guest, random);
        (void)tracked_scan(guest);
    }
    tracked_judge(guest, "brought back by us", subject->least_ppm);
}

static void test_pager_killed(struct tracked_guest *guest, const struct subject *subject, uint64_t *random) {
    for (unsigned round = 0; round < 3; round++) {
        touch_anywhere(guest, random);
        (void)tracked_scan(guest);
        touch_anywhere(guest, random);
        tracked_kill_pager(guest);
        touch_anywhere(guest, random);
        tracked_start_pager(guest);
        touch_anywhere(guest, random);
        (void)tracked_scan(guest);
    }
    tracked_judge(guest, "pager killed and replaced", subject->least_ppm);
}

/* ---- all of it --------------------------------------------------------------------------------------------- */

static const char *no_reclaim;

static void prepare_reclaim(struct kvm_vmm *vmm) {
    no_reclaim = host_cgroup_make(vmm->pid);
}

static void check_tracker(const struct subject *subject, bool only_moved, uint64_t *random) {
    test_migrated(subject, random);
    test_moving(subject, random);
    if (only_moved)
        return;
    struct tracked_guest guest = start(subject, prepare_reclaim);
    test_pager_killed(&guest, subject, random);
    const char *missing = no_reclaim ? no_reclaim : host_swap_on(4 * BYTES);
    if (missing)
        printf("%-5s swap not tried: %s\n", subject->tracker, missing);
    else
        test_swapped(&guest, subject, random);
    check_holes(&guest);
    test_evicted(&guest, subject, random);
    test_collapsed(&guest, subject, random);
    tracked_end(&guest);
    host_cgroup_drop();
}

int main(int argc, char **argv) {
    const char *only = argc > 2 ? argv[2] : NULL, *part = getenv("FL_PART");
    unsigned tried = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    need_paging();
    uint64_t random = seed_of(argc, argv);
    for (size_t i = 0; i < sizeof(subjects) / sizeof(subjects[0]); i++) {
        const char *missing = tracker_missing(subjects[i].tracker);
        if (only && strcmp(only, subjects[i].tracker) != 0)
            continue;
        if (missing) {
            printf("%-5s not tried: %s\n", subjects[i].tracker, missing);
            continue;
        }
        check_tracker(&subjects[i], part && strcmp(part, "moved") == 0, &random);
        tried++;
    }
    if (!tried)
        printf("skipped: no tracker works here\n");
    return tried ? 0 : 77;
}
