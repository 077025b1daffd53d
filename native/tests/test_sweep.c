/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages that are touched while a scan is under way, by each tracker that looks at pages and arms them in one go:
 * touched when they have been armed again, they are young in the next scan; touched when others have been and they have
 * not, in this one; touched before a scan that comes to nothing, they are young at once and in the next, for what was
 * seen of them cannot be seen again. Pages that we brought back, whose touches are hidden until they are armed. And huge
 * pages that are mapped as one, which the kernel drops as a whole when a part is armed.
 */
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <time.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"
#include "host_memory.h"
#include "pager/scan.h"
#include "served_vm.h"
#include "swap/bring.h"
#include "swap/removed.h"
#include "track/pagemap.h"
#include "victim.h"

#define PAGES 4096u
#define TOUCHED 16u
#define SECONDS 60u
#define TRIES 200u         /* 50 ms apart */
#define VOIDS 4u           /* so many in a row a tracker may have */
#define LARGE_PAGES 32768u /* more than any tracker arms in one go */
#define LATE_PAGE (LARGE_PAGES - 2)
#define CHUNK_BYTES_MIN (2u << 20)
#define CHUNKS_MAX (4 * LARGE_PAGES * FL_PAGE_SIZE / CHUNK_BYTES_MIN) /* of a scan */
#define QUICK_TIMES 1000u
#define HUGE_FIRST (HOST_HUGE_PAGES - 100u) /* so that chunks of zap that begin here would end inside of a huge page */
#define HUGE_PAGES 8192u
#define HUGE_SCANS 6u

struct ages {
    uint8_t of[PAGES];
};

/* All of the first pages, by the victim's thread. */
static void touch(struct victim *victim) {
    uint32_t generations[TOUCHED], changed = 0;
    memcpy(generations, victim->shared->generation, sizeof(generations));
    victim->shared->hot_pages = TOUCHED;
    victim_hold(victim, false);
    for (unsigned i = 0; i < SECONDS * 1000 && changed < TOUCHED; i++, sleep_ms(1))
        for (changed = 0; changed < TOUCHED && victim->shared->generation[changed] != generations[changed];)
            changed++;
    victim_hold(victim, true);
    CHECK(changed == TOUCHED, "page %u was not touched in %u s", changed, SECONDS);
}

static struct ages ages_of(struct fl_vm *vm) {
    struct ages ages;
    memcpy(ages.of, vm->vault.ages + fl_region(vm, 0)->first_page, PAGES);
    return ages;
}

static void check_ages(const struct ages *before, const struct ages *now, uint8_t touched, uint8_t more,
                       const char *when) {
    for (uint32_t page = 0; page < PAGES; page++) {
        uint8_t wanted = page < TOUCHED ? touched : (uint8_t)(before->of[page] + more);
        CHECK(now->of[page] == wanted, "%s: page %u has age %u, not %u", when, page, now->of[page], wanted);
    }
}

static uint32_t chunks; /* of the last scan, where they are counted */

/* One that is harvested and armed again. zap needs the VMM's main thread, which may get no CPU for a while. */
static void scan_whole(struct fl_scanner *scanner, struct fl_age_counts *counts) {
    struct fl_age_counts unused;
    bool harvested = false;
    for (unsigned i = 0; i < TRIES; i++) {
        (void)fl_scanner_settle_zap(scanner);
        chunks = 0;
        harvested |= fl_scanner_scan(scanner, harvested ? &unused : counts);
        if (harvested && scanner->armed)
            return;
        sleep_ms(50);
    }
    CHECK(false, "every scan is void");
}

/* ---- a sweep, and then ------------------------------------------------------------------------------------------- */

static struct {
    const struct fl_tracker_ops *ops;
    struct victim *victim;
    int error;  /* what the scan comes to when all was told */
    bool whole; /* the sweep was */
} swept;

static int sweep_and_touch(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    int error = swept.ops->sweep(tracker, stop_max_ns);
    swept.whole = error == 0;
    if (!error && !swept.error)
        touch(swept.victim);
    return error;
}

static int tell_and_fail(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count,
                         uint64_t *accessed) {
    int error = swept.ops->harvest(tracker, region, first, count, accessed);
    return error ? error : swept.error;
}

static uint32_t count_bits(const uint64_t *bits, uint32_t pages) {
    uint32_t count = 0;
    for (uint32_t word = 0; word < pages / 64; word++)
        count += (uint32_t)__builtin_popcountll(bits[word]);
    return count;
}

/* What whoever chooses pages to evict would be told now. */
static uint32_t count_accessed(const struct fl_scanner *scanner) {
    uint64_t accessed[PAGES / 64];
    int error = scanner->ops->harvest(scanner->tracker, 0, fl_region(scanner->vm, 0)->first_page, PAGES, accessed);
    CHECK(error == 0, "harvest: %s", strerror(-error));
    return count_bits(accessed, PAGES);
}

/* A scan by a tracker whose sweep, or whose harvest, ends in that way. */
static void scan_with(struct fl_scanner *scanner, struct victim *victim, int error) {
    struct fl_tracker_ops ops = *scanner->ops;
    struct fl_age_counts counts;
    swept.whole = false;
    swept.ops = scanner->ops;
    swept.victim = victim;
    swept.error = error;
    ops.sweep = sweep_and_touch;
    ops.harvest = tell_and_fail;
    scanner->ops = &ops;
    if (!error)
        scan_whole(scanner, &counts);
    for (unsigned i = 0; i < VOIDS && error && !swept.whole; i++, sleep_ms(50)) {
        (void)fl_scanner_settle_zap(scanner);
        CHECK(!fl_scanner_scan(scanner, &counts), "a scan that failed counts");
    }
    CHECK(swept.whole, "no sweep is whole");
    scanner->ops = swept.ops;
}

static void check_touched_meanwhile(struct fl_scanner *scanner, struct victim *victim, const char *tracker) {
    struct fl_age_counts counts;
    const struct ages old = ages_of(scanner->vm);
    scan_with(scanner, victim, 0);
    const struct ages swept_ages = ages_of(scanner->vm);
    check_ages(&old, &swept_ages, (uint8_t)(old.of[0] + 1), 1, "touched behind the sweep");
    scan_whole(scanner, &counts);
    const struct ages next = ages_of(scanner->vm);
    check_ages(&swept_ages, &next, 0, 1, "and scanned again");
    printf("%-5s %u pages touched behind the sweep: young in the next scan\n", tracker, TOUCHED);
}

static void check_touched_in_vain(struct fl_scanner *scanner, struct victim *victim, const char *tracker) {
    struct fl_age_counts counts;
    scan_whole(scanner, &counts);
    const struct ages old = ages_of(scanner->vm);
    CHECK(old.of[0] == 1, "age %u", old.of[0]);
    touch(victim);
    scan_with(scanner, victim, -EIO);
    const struct ages now = ages_of(scanner->vm);
    check_ages(&old, &now, 0, 0, "touched before a scan that is void");
    CHECK(count_accessed(scanner) == 0, "what is kept is told to others");
    scan_whole(scanner, &counts);
    const struct ages next = ages_of(scanner->vm);
    check_ages(&now, &next, 0, 1, "and scanned again");
    scan_whole(scanner, &counts);
    const struct ages last = ages_of(scanner->vm);
    check_ages(&next, &last, 1, 1, "and by nobody since");
    printf("%-5s %u pages touched before a void scan: young\n", tracker, TOUCHED);
}

/* The first pages again: away, and brought back by us. Nobody sees their touches until the next arming. */
static void check_brought(struct fl_vm *vm, struct fl_scanner *scanner, struct victim *victim, const char *tracker) {
    struct fl_bringer *bringer;
    struct fl_age_counts counts;
    uint64_t allowance = TOUCHED, pages = 0;
    CHECK(fl_bringer_create(vm, &bringer) == 0, "bringer");
    evict_first(vm, TOUCHED);
    const uint64_t away = FL_READ(vm, evicted_pages),
                   candidates[] = {0, away, away}; /* some do not compress, and stay */
    CHECK(fl_bring_range(bringer, 0, fl_region(vm, 0)->first_page, TOUCHED, UINT8_MAX, false, &allowance, &pages) ==
                  0 &&
              pages == away,
          "%llu pages brought back", (unsigned long long)pages);
    scan_with(scanner, victim, -EIO);
    for (uint32_t page = 0; page < TOUCHED; page++)
        CHECK(ages_of(vm).of[page] == 1, "page %u has age %u after a void scan", page, ages_of(vm).of[page]);
    for (unsigned i = 0; i < sizeof(candidates) / sizeof(candidates[0]); i++) {
        scan_whole(scanner, &counts);
        uint8_t age = ages_of(vm).of[0];
        CHECK(age == 2 + i && counts.resident[age] == TOUCHED, "age %u and %llu pages of it", age,
              (unsigned long long)counts.resident[age]);
        CHECK(counts.candidates[age] == candidates[i], "scan %u after: %llu candidates, not %llu", i + 1,
              (unsigned long long)counts.candidates[age], (unsigned long long)candidates[i]);
    }
    fl_bringer_destroy(bringer);
    printf("%-5s %llu pages brought back: candidates when a second scan has found them idle\n", tracker,
           (unsigned long long)away);
}

static void check_tracker(const char *tracker, uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    static struct fl_vm vm;
    struct victim victim = victim_start(PAGES, 1, seed);
    victim.shared->pause_us = 0;
    victim_hold(&victim, true);
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    CHECK(!fl_scanner_scan(&scanner, &counts), "the first scan only arms");
    for (unsigned i = 0; i < 3; i++)
        scan_whole(&scanner, &counts);
    const struct ages old = ages_of(&vm);
    CHECK(old.of[0] == 3 && old.of[PAGES - 1] == 3, "ages %u and %u after 3 scans", old.of[0], old.of[PAGES - 1]);

    check_touched_meanwhile(&scanner, &victim, tracker);
    check_touched_in_vain(&scanner, &victim, tracker);
    check_brought(&vm, &scanner, &victim, tracker);
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
}

/* ---- while it is under way --------------------------------------------------------------------------------------- */

enum moment {
    NEVER,
    FIRST_ARMED, /* before the look at LATE_PAGE, when the first page has been armed */
    REFUSED,     /* between the look at LATE_PAGE and an arming of it that has to be tried again */
    QUICK,       /* nothing is touched, but chunks are counted, and the clock says that each takes next to no time */
    SLOW         /* and each of them takes long */
};

static struct {
    _Atomic(enum moment) moment; /* the page is touched, once */
    bool touched, refusing;
    _Atomic(uint64_t) quick_since_ns[CLOCK_BOOTTIME + 1], behind_ns; /* the clocks; 0: they run as they should */
    struct fl_vm *vm;
    struct victim *victim;
    struct fl_pagemap_kind accessed;
} during;

static uint64_t address_of(uint32_t page) {
    return fl_address_of_page(during.vm, 0, fl_region(during.vm, 0)->first_page + page);
}

static bool is_late_page_in(uint64_t start, uint64_t end) {
    uint64_t address = address_of(LATE_PAGE);
    return start <= address && address < end;
}

static void touch_late_page(void) {
    during.touched = true;
    victim_order(during.victim, VICTIM_TOUCH, LATE_PAGE, 1, SECONDS);
}

static bool is_armed(uint32_t page) {
    static struct fl_pagemap pagemap;
    enum moment moment = atomic_exchange(&during.moment, NEVER);
    uint64_t bits[1];
    int error =
        fl_pagemap_bits(&pagemap, during.vm, during.accessed, 0, fl_region(during.vm, 0)->first_page + page, 1, bits);
    CHECK(error == 0, "pagemap: %s", strerror(-error));
    atomic_store(&during.moment, moment);
    return !bits[0];
}

/* The arming by zap is a call of the VMM's: it is not made as long as an event seems to be under way. */
static void refuse(bool on) {
    during.refusing = on;
    if (during.vm->freeze != FL_FREEZE_RWP)
        (on ? fl_removed_reading : fl_removed_was_read)(during.vm);
}

static int scan_pages(int fd, struct pm_scan_arg *scan) {
    /* From the beginning on, what is mapped is looked for and nothing is decided yet. */
    bool looks = scan->start > address_of(0) && is_late_page_in(scan->start, scan->end);
    if (during.refusing && looks)
        refuse(false);
    if (atomic_load(&during.moment) == FIRST_ARMED && !during.touched && is_armed(0))
        touch_late_page();
    int result = (int)syscall(SYS_ioctl, fd, PAGEMAP_SCAN, scan);
    if (atomic_load(&during.moment) == REFUSED && !during.touched && looks) {
        touch_late_page();
        refuse(true);
    }
    return result;
}

static uint64_t true_ns(clockid_t clock) {
    struct timespec now = {0};
    CHECK(syscall(SYS_clock_gettime, clock, &now) == 0, "clock %d: %s", (int)clock, strerror(errno));
    return (uint64_t)now.tv_sec * FL_NS_PER_SECOND + (uint64_t)now.tv_nsec;
}

/* By nearly all of the time that was QUICK. */
static uint64_t behind_ns(clockid_t clock, uint64_t now_ns) {
    uint64_t since_ns = atomic_load(&during.quick_since_ns[clock]), quick_ns = since_ns ? now_ns - since_ns : 0;
    return atomic_load(&during.behind_ns) + quick_ns - quick_ns / QUICK_TIMES;
}

static void let_clocks_run_slow(void) {
    atomic_store(&during.quick_since_ns[CLOCK_MONOTONIC], true_ns(CLOCK_MONOTONIC));
    atomic_store(&during.quick_since_ns[CLOCK_BOOTTIME], true_ns(CLOCK_BOOTTIME));
}

static void let_clocks_run(void) {
    uint64_t behind = behind_ns(CLOCK_MONOTONIC, true_ns(CLOCK_MONOTONIC));
    atomic_store(&during.quick_since_ns[CLOCK_MONOTONIC], 0);
    atomic_store(&during.quick_since_ns[CLOCK_BOOTTIME], 0);
    atomic_store(&during.behind_ns, behind);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    uint64_t now_ns = true_ns(clock);
    if (clock == CLOCK_MONOTONIC || clock == CLOCK_BOOTTIME)
        now_ns -= behind_ns(clock, now_ns);
    *time = (struct timespec){(time_t)(now_ns / FL_NS_PER_SECOND), (long)(now_ns % FL_NS_PER_SECOND)};
    return 0;
}

static void begin_chunk(void) {
    enum moment moment = atomic_load(&during.moment);
    if (moment == QUICK || moment == SLOW)
        CHECK(++chunks <= CHUNKS_MAX, "a scan does not come to an end");
    sleep_ms(moment == SLOW);
}

/* zap's chunks: the VMM's main thread is given its call, and is stopped until this has ended. */
long ptrace(enum __ptrace_request request, ...) {
    va_list arguments;
    va_start(arguments, request);
    pid_t thread = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *), *data = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PTRACE_SETREGSET)
        begin_chunk();
    return syscall(SYS_ptrace, request, thread, address, data);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (atomic_load(&during.moment) == NEVER)
        return (int)syscall(SYS_ioctl, fd, request, argument);
    if (request == PAGEMAP_SCAN && fd == during.vm->pagemap_fd)
        return scan_pages(fd, argument);
    if (request == UFFDIO_RWPROTECT)
        begin_chunk();
    const struct uffdio_rwprotect *protect = argument;
    if (request == UFFDIO_RWPROTECT && during.refusing &&
        is_late_page_in(protect->range.start, protect->range.start + protect->range.len)) {
        errno = EAGAIN;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void check_touched_during(const char *tracker, enum moment moment, const char *words, uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    static struct fl_vm vm;
    struct victim victim = victim_start(LARGE_PAGES, 0, seed);
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    during.vm = &vm;
    during.victim = &victim;
    during.accessed = vm.freeze == FL_FREEZE_RWP ? FL_PAGES_ACCESSED : FL_PAGES_MAPPED;
    during.touched = false;
    const uint8_t *age = vm.vault.ages + fl_region(&vm, 0)->first_page + LATE_PAGE;
    for (unsigned i = 0; i < TRIES && !during.touched; i++) {
        for (unsigned scan = 0; scan < 2 && !*age; scan++)
            scan_whole(&scanner, &counts);
        CHECK(*age, "young, and untouched");
        victim_order(&victim, VICTIM_TOUCH, 0, LATE_PAGE, SECONDS);
        victim_order(&victim, VICTIM_TOUCH, LATE_PAGE + 1, LARGE_PAGES - LATE_PAGE - 1, SECONDS);
        (void)fl_scanner_settle_zap(&scanner);
        atomic_store(&during.moment, moment);
        bool whole = fl_scanner_scan(&scanner, &counts);
        atomic_store(&during.moment, NEVER);
        CHECK(whole || !during.touched || during.refusing || *age == 0, "%s: touched in a void scan, and of age %u",
              words, *age);
        CHECK(!whole || (during.touched && !during.refusing), "%s: there was no such moment", words);
        if (during.refusing) { /* void for another reason: not armed, and visible yet */
            refuse(false);
            during.touched = false;
        }
    }
    CHECK(during.touched && *age == 0, "%s: page %u has age %u", words, LATE_PAGE, *age);
    printf("%-5s page %u touched %s: young\n", tracker, LATE_PAGE, words);
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
}

/* Of one that has all pages to arm. */
static uint32_t chunks_of_scan(struct fl_scanner *scanner, struct victim *victim, enum moment moment) {
    struct fl_age_counts counts;
    victim_order(victim, VICTIM_TOUCH, 0, LARGE_PAGES, SECONDS);
    atomic_store(&during.moment, moment);
    if (moment == QUICK)
        let_clocks_run_slow();
    scan_whole(scanner, &counts);
    atomic_store(&during.moment, NEVER);
    if (moment == QUICK)
        let_clocks_run();
    return chunks;
}

/* Chunks that had grown while they were quick, by any amount. */
static void check_slow_chunks(const char *tracker, uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    static struct fl_vm vm;
    const uint32_t smallest = LARGE_PAGES * FL_PAGE_SIZE / CHUNK_BYTES_MIN;
    uint32_t quick = smallest, slow = 0;
    struct victim victim = victim_start(LARGE_PAGES, 0, seed);
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    during.vm = &vm;
    scan_whole(&scanner, &counts); /* the first one only arms */
    for (unsigned i = 0; i < TRIES && quick > smallest / 8; i++)
        quick = chunks_of_scan(&scanner, &victim, QUICK);
    CHECK(quick && quick <= smallest / 8, "they do not grow: %u chunks", quick);
    for (unsigned i = 0; i < 20 && slow < smallest; i++)
        slow = chunks_of_scan(&scanner, &victim, SLOW);
    CHECK(slow >= smallest, "%u chunks, slow as they are", slow);
    printf("%-5s chunks that got slow: from %u to %u a scan of %u pages\n", tracker, quick, slow, LARGE_PAGES);
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
}

/* ---- huge pages -------------------------------------------------------------------------------------------------- */

static uint32_t count_mapped_as_one(struct fl_vm *vm) {
    static struct fl_pagemap pagemap;
    const struct fl_pagemap_kind huge = {PAGE_IS_FILE | PAGE_IS_HUGE, 0};
    static uint64_t bits[HUGE_PAGES / 64];
    int error = fl_pagemap_bits(&pagemap, vm, huge, 0, fl_region(vm, 0)->first_page, HUGE_PAGES, bits);
    CHECK(error == 0, "pagemap: %s", strerror(-error));
    return count_bits(bits, HUGE_PAGES) / HOST_HUGE_PAGES;
}

/* All but the first one's beginning is touched between two scans, and each page is young in the second. */
static void check_huge_pages(const char *tracker, uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of(tracker);
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    static struct fl_vm vm;
    struct victim victim = victim_start(HUGE_PAGES, 0, seed);
    uint64_t base = atomic_load(&victim.shared->base) + HOST_HUGE_PAGES * FL_PAGE_SIZE;
    uint32_t made = host_collapse(victim.pid, base, HUGE_PAGES - HOST_HUGE_PAGES), mapped = 0;
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    fl_scanner_start(&scanner, &vm, faults, &trackers);
    const uint8_t *ages = vm.vault.ages + fl_region(&vm, 0)->first_page;
    during.vm = &vm;
    scan_whole(&scanner, &counts);
    for (unsigned scan = 0; scan < HUGE_SCANS && made; scan++) {
        victim_order(&victim, VICTIM_TOUCH, HUGE_FIRST, HUGE_PAGES - HUGE_FIRST, SECONDS);
        uint32_t now = count_mapped_as_one(&vm);
        mapped = now > mapped ? now : mapped;
        if (!mapped)
            break;
        atomic_store(&during.moment, scan < HUGE_SCANS / 2 ? NEVER : SLOW); /* the smallest chunks, too */
        scan_whole(&scanner, &counts);
        atomic_store(&during.moment, NEVER);
        for (uint32_t page = 0; page < HUGE_PAGES; page++)
            CHECK((ages[page] == 0) == (page >= HUGE_FIRST), "scan %u: page %u has age %u", scan, page, ages[page]);
    }
    if (mapped)
        printf("%-5s %u huge pages mapped as one and touched, %u scans: young\n", tracker, mapped, HUGE_SCANS);
    else
        printf("%-5s huge pages that are mapped as one not tried: %s\n", tracker,
               made ? "this kernel maps none that is armed" : "this host makes none of shared memory");
    fl_scanner_stop(&scanner);
    served_vm_end(&vm, faults);
}

int main(int argc, char **argv) {
    static const char *const trackers[] = {"rwp", "zap"};
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_of(argc, argv);
    unsigned tried = 0;
    fl_log_setup(FL_LOG_WARNING, 0);
    for (size_t i = 0; i < sizeof(trackers) / sizeof(trackers[0]); i++) {
        const char *missing = tracker_missing(trackers[i]);
        if (missing) {
            printf("%-5s not tried: %s\n", trackers[i], missing);
            continue;
        }
        check_tracker(trackers[i], seed + i);
        check_touched_during(trackers[i], FIRST_ARMED, "when the first one had been armed", seed + i);
        check_touched_during(trackers[i], REFUSED, "before an arming that had to be tried again", seed + i);
        check_slow_chunks(trackers[i], seed + i);
        check_huge_pages(trackers[i], seed + i);
        tried++;
    }
    if (!tried)
        printf("skipped: no tracker works here\n");
    return tried ? 0 : 77;
}
