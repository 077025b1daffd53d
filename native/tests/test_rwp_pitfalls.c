/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes wrong with read-write protection when it is used as it suggests itself, and that our way does not do it. Where
 * the trouble can be shown without a change to what is tested, it is, first; the other checks fail without the remedy.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "attach/gate.h"
#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"
#include "pager/choose.h"
#include "served_vm.h"
#include "slow.h"
#include "swap/bring.h"
#include "swap/evict.h"
#include "swap/removed.h"
#include "swap/uffd.h"
#include "track/age.h"
#include "victim.h"

#define PAGES 64u
#define LATE_MESSAGES 10u
#define QUIET_WINDOWS 20u
#define SYNC_PAGES_MIN 4u /* the smallest batch of an eviction */
#define SLOW_BATCH_MS 2u
#define SYNC_LONG_NS (4 * FL_NS_PER_MS) /* an evictor that is not done does not leave sync mode before */
/* For a race to be lost, or for messages to come late: both sides may get little of a CPU. */
#define RACE_NS ((runs_slowly() ? 110 : 60) * FL_NS_PER_SECOND)

struct served {
    struct victim victim;
    struct fl_vm vm;
    struct fl_fault_server *faults;
    struct fl_evictor *evictor;
    struct fl_bringer *bringer;
    struct fl_gate *gate;
};

static _Atomic(bool) reads_are_slow;

static _Atomic(uint32_t) reads;
static __thread bool looks_quick; /* whatever this thread does: its clock runs a thousand times slower */

/* Of the pages that an evictor copies out, among others. */
ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset) {
    atomic_fetch_add(&reads, 1);
    if (atomic_load(&reads_are_slow))
        sleep_ms(SLOW_BATCH_MS);
    return syscall(SYS_pread64, fd, buffer, bytes, offset);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static __thread uint64_t since_ns;
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result || clock != CLOCK_BOOTTIME || !looks_quick) {
        since_ns = 0;
        return result;
    }
    uint64_t now_ns = (uint64_t)time->tv_sec * FL_NS_PER_SECOND + (uint64_t)time->tv_nsec;
    since_ns = since_ns ? since_ns : now_ns;
    now_ns = since_ns + (now_ns - since_ns) / 1000;
    *time =
        (struct timespec){.tv_sec = (time_t)(now_ns / FL_NS_PER_SECOND), .tv_nsec = (long)(now_ns % FL_NS_PER_SECOND)};
    return 0;
}

static void serve(struct served *s, uint32_t threads, uint64_t seed) {
    const struct fl_tracker_list trackers = trackers_of("rwp");
    memset(s, 0, sizeof(*s));
    s->victim = victim_start(PAGES, threads, seed);
    s->victim.shared->pause_us = 0;
    s->faults = served_vm_begin(&s->vm, s->victim.pid, &trackers, 2);
    CHECK(s->vm.freeze == FL_FREEZE_RWP, "registered for %s", fl_freeze_name(s->vm.freeze));
    CHECK(fl_evictor_create(&s->vm, NULL, NULL, &s->evictor) == 0 && fl_bringer_create(&s->vm, &s->bringer) == 0,
          "parts");
    CHECK(fl_gate_open(s->vm.pid, s->vm.vault.base + s->vm.vault.gate_offset, &s->vm.vault.header->attachment,
                       &s->gate) == 0,
          "gate");
}

static void serve_no_more(struct served *s) {
    fl_gate_close(s->gate);
    fl_evictor_destroy(s->evictor);
    fl_bringer_destroy(s->bringer);
    served_vm_end(&s->vm, s->faults);
}

static uint64_t address_of(struct served *s, uint64_t page) {
    return fl_address_of_page(&s->vm, 0, fl_region(&s->vm, 0)->first_page + page);
}

static int evict_all(struct served *s, struct fl_evicted *done) {
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    for (uint64_t page = 0; page < PAGES; page++) {
        fl_entry rejected = fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0);
        (void)fl_swap_entry(&s->vm, fl_region(&s->vm, 0)->first_page + page, &rejected, 0);
    }
    return fl_evict_window(s->evictor, 0, fl_region(&s->vm, 0)->first_page, PAGES, all, done);
}

/*
 * Pages stay in the file, and the VMM's page tables know nothing of them: as after reclaim by the host. The event of this is
 * ours, and must have been seen before anything is evicted: taken for a removal, it would have what is away forgotten.
 */
static void unmap_pages(struct served *s) {
    uint64_t start = address_of(s, 0), end = start + PAGES * FL_PAGE_SIZE, until = fl_now() + 60 * FL_NS_PER_SECOND;
    struct fl_gate_call call = {.nr = SYS_madvise, .args = {start, end - start, MADV_DONTNEED}};
    struct fl_gate_call nothing = {.nr = SYS_madvise, .args = {start, 0, MADV_DONTNEED}};
    fl_zap_mark(&s->vm, start, end);
    int error = fl_gate_run(s->gate, &call, 1, 200 * FL_NS_PER_MS, NULL, NULL);
    if (error == -ETIMEDOUT) /* it will be made: when another one has been, it was */
        while ((error = fl_gate_run(s->gate, &nothing, 1, 200 * FL_NS_PER_MS, NULL, NULL)) && fl_now() < until)
            sleep_ms(1);
    CHECK(error == 0 || error == -EBUSY, "gate: %s", strerror(-error));
    fl_fault_end_zap(s->faults, true);
}

/* ---- a write to a page that is in the file, but not mapped -------------------------------------------------- */

/* Evictions of unmapped pages against writers. Returns how many pages were read back wrong. */
static uint64_t evict_unmapped(struct served *s, uint64_t wanted) {
    struct fl_evicted done = {0};
    uint64_t until = fl_now() + RACE_NS;
    while (done.pages < wanted && fl_now() < until && atomic_load(&s->victim.shared->errors) == 0) {
        /* All in the file: what is away has no page table entry that could be dropped. */
        uint64_t allowance = PAGES, brought = 0;
        (void)fl_bring_range(s->bringer, 0, fl_region(&s->vm, 0)->first_page, PAGES, UINT8_MAX, false, &allowance,
                             &brought);
        for (uint64_t page = 0; page < PAGES; page++) {
            fl_entry ours = fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_BROUGHT, 0);
            (void)fl_swap_entry(&s->vm, fl_region(&s->vm, 0)->first_page + page, &ours, 0);
        }
        if (FL_READ(&s->vm, evicted_pages) == 0)
            unmap_pages(s);
        (void)evict_all(s, &done);
    }
    return atomic_load(&s->victim.shared->errors);
}

static void unmapped_pages(uint64_t seed) {
    static struct served s;
    serve(&s, 2, seed);
    struct uffdio_register without = {.range = {.start = address_of(&s, 0), .len = PAGES * FL_PAGE_SIZE},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_RWP};
    CHECK(ioctl(s.vm.uffd, UFFDIO_UNREGISTER, &without.range) == 0, "unregister: %s", strerror(errno));
    CHECK(ioctl(s.vm.uffd, UFFDIO_REGISTER, &without) == 0, "register without MINOR: %s", strerror(errno));
    uint64_t lost = evict_unmapped(&s, 200000);
    CHECK(lost > 0, "without MINOR nothing was lost: this test shows nothing");
    serve_no_more(&s);

    serve(&s, 2, seed + 1);
    uint64_t wrong = evict_unmapped(&s, rounds(3000, 500));
    wrong += victim_verify(&s.victim, 60);
    printf("write to a cached, unmapped page: lost without MINOR, %llu lost with it; %llu mapped by us\n",
           (unsigned long long)wrong, (unsigned long long)FL_READ(&s.vm, minor_faults));
    CHECK(wrong == 0 && FL_READ(&s.vm, minor_faults) > 0, "page %llu read wrong",
          (unsigned long long)s.victim.shared->first_error - 1);
    serve_no_more(&s);
}

/* ---- pages filled in after the scan -------------------------------------------------------------------------- */

#define BUSY_PAGE 0u /* touched all the time */
#define FILLED 16u   /* pages [1, FILLED) are filled in after the scan */

/* Scans until only BUSY_PAGE is young. What is chosen next goes by these counts and ages. */
static void scan_but_one_old(struct served *s, struct fl_chooser *chooser) {
    const uint8_t *ages = s->vm.vault.ages + fl_region(&s->vm, 0)->first_page;
    bool one_old = false;
    for (int scan = 0; scan < 20 && !one_old; scan++) {
        uint64_t touches = atomic_load(&s->victim.shared->touches);
        for (int i = 0; i < 10000 && atomic_load(&s->victim.shared->touches) < touches + 100; i++)
            sleep_ms(1);
        one_old = fl_scanner_scan(chooser->scanner, &chooser->counts) && ages[BUSY_PAGE] == 0;
        for (uint64_t page = BUSY_PAGE + 1; page < PAGES; page++)
            one_old = one_old && ages[page] >= 2;
    }
    CHECK(one_old && chooser->counts.candidates[0] == 1, "not one young page among old ones: %llu",
          (unsigned long long)chooser->counts.candidates[0]);
    fl_choose_restart(chooser);
}

static void choose_all(struct served *s, struct fl_chooser *chooser, struct fl_evicted *done) {
    uint64_t until = fl_now() + 60 * FL_NS_PER_SECOND;
    int more;
    while ((more = fl_choose_evict(chooser, PAGES, 0, done)) == 1 || more == -EAGAIN)
        CHECK(fl_now() < until, "choosing does not end");
    CHECK(more == 0 && atomic_load(&s->vm.gone) == 0, "choose: %s", strerror(-more));
}

/* Freed, and filled anew by touches: their ages are those of what was there before, and they are in no hot set. */
static bool is_young(struct served *s, uint64_t page) {
    uint64_t at = fl_region(&s->vm, 0)->first_page + page;
    return __atomic_load_n(&s->vm.vault.ages[at], __ATOMIC_ACQUIRE) == 0 && atomic_load(fl_slot(&s->vm, at)) == 0;
}

/* The fault thread writes it down after it has woken who touched the page. */
static void wait_until_young(struct served *s, uint64_t page, const char *which) {
    for (int i = 0; i < 10000 && !is_young(s, page); i++)
        sleep_ms(1);
    CHECK(is_young(s, page), "page %llu, %s, has age %u", (unsigned long long)page, which,
          s->vm.vault.ages[fl_region(&s->vm, 0)->first_page + page]);
}

static void fill_in(struct served *s) {
    struct victim_shared *shared = s->victim.shared;
    uint32_t filled = 0;
    victim_order(&s->victim, VICTIM_REMOVE, BUSY_PAGE + 1, FILLED - 1, 10);
    shared->hot_pages = FILLED;
    for (int i = 0; i < 10000 && filled < FILLED - 1; i++, sleep_ms(1))
        for (filled = 0; filled < FILLED - 1 && shared->generation[filled + 1] > 0;)
            filled++;
    CHECK(filled == FILLED - 1, "only %u pages were filled", filled);
    victim_hold(&s->victim, true);
}

static void filled_after_scan(uint64_t seed) {
    static struct served s;
    struct fl_scanner scanner;
    struct fl_evicted done = {0};
    serve(&s, 1, seed);
    s.victim.shared->hot_pages = BUSY_PAGE + 1;
    const struct fl_tracker_list list = {.count = 1, .ops = {&fl_tracker_rwp}};
    fl_scanner_start(&scanner, &s.vm, s.faults, &list);
    struct fl_chooser chooser = {.vm = &s.vm, .scanner = &scanner, .evictor = s.evictor, .bringer = s.bringer};
    scan_but_one_old(&s, &chooser);
    fill_in(&s);
    const uint8_t *ages = s.vm.vault.ages + fl_region(&s.vm, 0)->first_page;
    for (uint64_t page = BUSY_PAGE; page < FILLED; page++)
        wait_until_young(&s, page, "filled in after the scan");
    choose_all(&s, &chooser, &done);
    for (uint64_t page = BUSY_PAGE; page < FILLED; page++)
        CHECK(atomic_load(fl_slot(&s.vm, fl_region(&s.vm, 0)->first_page + page)) == 0,
              "page %llu, filled in after the scan, was evicted", (unsigned long long)page);
    CHECK(done.pages > (PAGES - FILLED) / 2, "only %llu pages were chosen: this test shows nothing",
          (unsigned long long)done.pages);
    /* What a touch brings back is filled in after the scan just as well. */
    uint64_t away = FILLED;
    while (away + 1 < PAGES &&
           fl_entry_state(atomic_load(fl_slot(&s.vm, fl_region(&s.vm, 0)->first_page + away))) != FL_PAGE_EVICTED)
        away++; /* an eviction may have been cancelled */
    s.victim.shared->hot_pages = PAGES;
    CHECK(ages[away] >= 2 && victim_verify(&s.victim, 60) == 0, "age %u, or read wrong", ages[away]);
    wait_until_young(&s, away, "brought back by a touch");
    fl_scanner_stop(&scanner);
    printf("pages filled in after the scan: young, and not chosen where no age is too young; %llu others are\n",
           (unsigned long long)done.pages);
    serve_no_more(&s);
}

/* ---- a hole read through another mapping of the file ----------------------------------------------------------- */

static uint64_t blocks_of(int fd) {
    struct stat status;
    CHECK(fstat(fd, &status) == 0, "fstat");
    return (uint64_t)status.st_blocks;
}

static void bring_one(struct served *s, uint64_t page) {
    uint64_t allowance = 1, brought = 0;
    CHECK(fl_bring_range(s->bringer, 0, fl_region(&s->vm, 0)->first_page + page, 1, UINT8_MAX, false, &allowance,
                         &brought) == 0,
          "back");
}

static void holes_stay_holes(uint64_t seed) {
    static struct served s;
    struct fl_evicted done = {0};
    struct fl_tracker *tracker;
    struct fl_age_counts counts;
    uint64_t stop_ns;
    serve(&s, 0, seed);
    CHECK(evict_all(&s, &done) == 0 && done.pages > PAGES / 2, "%llu evicted", (unsigned long long)done.pages);
    /* Every other page in memory, so that batches reach over holes; the least that there was is what there shall be. */
    uint64_t before = blocks_of(s.vm.memory[0].fd), evicted = FL_READ(&s.vm, evicted_pages);
    for (uint64_t page = 0; page < PAGES; page += 2)
        bring_one(&s, page);
    CHECK(FL_READ(&s.vm, evicted_pages) < evicted, "nothing was brought back: this test shows nothing");
    CHECK(fl_tracker_rwp.create(&s.vm, s.faults, &tracker) == 0, "tracker");
    for (int scan = 0; scan < 3; scan++) {
        CHECK(fl_tracker_rwp.arm(tracker, &stop_ns) == 0, "arm");
        CHECK(fl_age_scan(&s.vm, &fl_tracker_rwp, tracker, &counts) == 0, "scan");
    }
    done.pages = 0;
    CHECK(evict_all(&s, &done) == 0 && done.pages > 0, "nothing was evicted beside holes");
    CHECK(blocks_of(s.vm.memory[0].fd) <= before, "scans and evictions filled holes: %llu blocks, and %llu before",
          (unsigned long long)blocks_of(s.vm.memory[0].fd), (unsigned long long)before);
    fl_tracker_rwp.destroy(tracker);
    /* And what would have happened. */
    uint64_t page = 0;
    while (fl_entry_state(atomic_load(fl_slot(&s.vm, fl_region(&s.vm, 0)->first_page + page))) != FL_PAGE_EVICTED)
        page++;
    int fd = memfd_create("hole", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, FL_PAGE_SIZE) == 0, "memfd");
    volatile uint8_t *mapping = mmap(NULL, FL_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(mapping != MAP_FAILED && mapping[0] == 0, "a hole is not zero");
    CHECK(blocks_of(fd) > 0, "a read through a mapping left the hole a hole: this test shows nothing");
    close(fd);
    CHECK(victim_verify(&s.victim, 60) == 0, "read wrong");
    printf("holes: three scans and an eviction of %llu pages between them left them alone\n",
           (unsigned long long)done.pages);
    serve_no_more(&s);
}

/* ---- messages that come late or twice ------------------------------------------------------------- */

/* Enough evictions, and enough messages of both kinds: those whose page was settled, and those whose page had been punched. */
static bool enough_late(struct served *s, const struct fl_evicted *done) {
    return done->pages >= rounds(4000, 500) && FL_READ(&s->vm, stale_messages) > 0 &&
           fl_fault_late(s->faults) >= LATE_MESSAGES;
}

static void late_messages(uint64_t seed) {
    static struct served s;
    struct fl_evicted done = {0};
    uint64_t until = fl_now() + RACE_NS;
    serve(&s, 2, seed);
    while (!enough_late(&s, &done) && fl_now() < until) {
        int error = evict_all(&s, &done);
        CHECK(error == 0 || error == -EAGAIN, "evict: %s", strerror(-error));
    }
    uint64_t errors = victim_verify(&s.victim, 60);
    printf(
        "%llu pages evicted in %llu times of sync mode, %llu cancelled, %llu messages needed nothing, %llu came when "
        "their page had been punched, longest %llu us: %llu lost\n",
        (unsigned long long)done.pages, (unsigned long long)FL_READ(&s.vm, sync_windows),
        (unsigned long long)FL_READ(&s.vm, evictions_cancelled), (unsigned long long)FL_READ(&s.vm, stale_messages),
        (unsigned long long)fl_fault_late(s.faults), (unsigned long long)FL_READ(&s.vm, sync_max_ns) / 1000,
        (unsigned long long)errors);
    CHECK(errors == 0, "page %llu read wrong", (unsigned long long)s.victim.shared->first_error - 1);
    CHECK(enough_late(&s, &done), "too few messages came late: this test shows nothing");
    serve_no_more(&s);
}

/* ---- SET_MODE, which takes the VMM's mmap lock for writing -------------------------------------------------------- */

/*
 * Nobody is in the way: what an evictor does by itself. Into sync mode once a window; and once more only after as long a time
 * as it may last, and that behind a batch, of however slow a machine.
 */
static void no_storm(uint64_t seed) {
    static struct served s;
    struct fl_evicted done = {0};
    uint64_t took_ns = 0;
    serve(&s, 0, seed);
    uint64_t before = FL_READ(&s.vm, sync_windows);
    for (uint32_t window = 0; window < QUIET_WINDOWS; window++) {
        uint64_t start_ns = fl_now();
        CHECK(evict_all(&s, &done) == 0, "evict");
        took_ns += fl_now() - start_ns;
        victim_order(&s.victim, VICTIM_VERIFY, 0, 0, 60); /* all back */
    }
    uint64_t switches = FL_READ(&s.vm, sync_windows) - before, more = switches - QUIET_WINDOWS;
    CHECK(done.pages > QUIET_WINDOWS * PAGES / 2, "only %llu pages evicted: this test shows nothing",
          (unsigned long long)done.pages);
    CHECK(switches >= QUIET_WINDOWS && more <= QUIET_WINDOWS * PAGES / SYNC_PAGES_MIN && more <= took_ns / SYNC_LONG_NS,
          "a storm: %llu times of sync mode for %llu pages in %u windows, in %llu ms", (unsigned long long)switches,
          (unsigned long long)done.pages, QUIET_WINDOWS, (unsigned long long)(took_ns / FL_NS_PER_MS));
    printf("SET_MODE: %llu times of sync mode for %llu pages in %u windows\n", (unsigned long long)switches,
           (unsigned long long)done.pages, QUIET_WINDOWS);
    serve_no_more(&s);
}

/*
 * Batches that take 2 ms and more, each of the smallest size then: sync mode is left behind each third of them at the latest,
 * for a touch that is not cancelled waits as long as it lasts.
 */
static void no_long_sync(uint64_t seed) {
    static struct served s;
    struct fl_evicted done = {0};
    serve(&s, 0, seed);
    uint64_t before = FL_READ(&s.vm, sync_windows);
    atomic_store(&reads_are_slow, true);
    int error = evict_all(&s, &done);
    atomic_store(&reads_are_slow, false);
    CHECK(error == 0 && done.pages > PAGES / 2, "%llu pages evicted: %s", (unsigned long long)done.pages,
          strerror(-error));
    uint64_t switches = FL_READ(&s.vm, sync_windows) - before;
    CHECK(switches >= PAGES / SYNC_PAGES_MIN / 3, "%llu times of sync mode for %u slow batches, the longest %llu us",
          (unsigned long long)switches, PAGES / SYNC_PAGES_MIN, (unsigned long long)FL_READ(&s.vm, sync_max_ns) / 1000);
    printf("sync mode: %llu times for %u batches of more than %u ms\n", (unsigned long long)switches,
           PAGES / SYNC_PAGES_MIN, SLOW_BATCH_MS);
    serve_no_more(&s);
}

/* How many batches a window of all pages takes. */
static uint32_t batches_of_window(struct served *s) {
    struct fl_evicted done = {0};
    victim_order(&s->victim, VICTIM_VERIFY, 0, 0, 60); /* all back */
    uint32_t before = atomic_load(&reads);
    CHECK(evict_all(s, &done) == 0 && done.pages > PAGES / 2, "%llu pages evicted", (unsigned long long)done.pages);
    return atomic_load(&reads) - before;
}

/* Batches that had grown while they were quick are of the smallest size again soon after they are not: each is waited for. */
static void no_large_slow_batch(uint64_t seed) {
    static struct served s;
    uint32_t quick = 0, slow = 0, windows = 0;
    serve(&s, 0, seed);
    looks_quick = true;
    for (uint32_t window = 0; window < QUIET_WINDOWS && quick != 1; window++)
        quick = batches_of_window(&s);
    looks_quick = false;
    CHECK(quick == 1, "%u batches a window: they do not grow", quick);
    atomic_store(&reads_are_slow, true);
    for (; windows < QUIET_WINDOWS && slow < PAGES / SYNC_PAGES_MIN; windows++)
        slow = batches_of_window(&s);
    atomic_store(&reads_are_slow, false);
    CHECK(slow >= PAGES / SYNC_PAGES_MIN && windows <= 6, "%u batches in window %u: they do not shrink", slow, windows);
    printf("batches that got slow: from %u to %u a window of %u pages in %u windows\n", quick, slow, PAGES, windows);
    serve_no_more(&s);
}

/* ---- brought back by us: accessible, and yet not touched ---------------------------------------------------------- */

static void brought_back(uint64_t seed) {
    static struct served s;
    struct fl_tracker *tracker;
    struct fl_age_counts counts;
    struct fl_evicted done = {0};
    uint64_t stop_ns, allowance = PAGES, brought = 0, hot[1];
    serve(&s, 0, seed);
    CHECK(fl_tracker_rwp.create(&s.vm, s.faults, &tracker) == 0, "tracker");
    for (int scan = 0; scan < 3; scan++) {
        CHECK(fl_tracker_rwp.arm(tracker, &stop_ns) == 0, "arm");
        CHECK(fl_age_scan(&s.vm, &fl_tracker_rwp, tracker, &counts) == 0, "scan");
    }
    uint64_t first = fl_region(&s.vm, 0)->first_page;
    const uint8_t *ages = s.vm.vault.ages + first;
    uint8_t age = ages[10];
    CHECK(evict_all(&s, &done) == 0, "evict");
    CHECK(fl_tracker_rwp.arm(tracker, &stop_ns) == 0, "arm");
    CHECK(fl_bring_range(s.bringer, 0, first, PAGES, UINT8_MAX, false, &allowance, &brought) == 0 && brought > 0,
          "back");
    CHECK(fl_tracker_rwp.harvest(tracker, 0, first, PAGES, hot) == 0 && hot[0] != 0,
          "what UFFDIO_COPY filled does not look accessed: this test shows nothing");
    CHECK(fl_age_scan(&s.vm, &fl_tracker_rwp, tracker, &counts) == 0, "scan");
    CHECK(ages[10] > age, "a page that we brought back went from age %u to %u", age, ages[10]);
    CHECK(counts.accessed == 0, "%llu accesses by nobody", (unsigned long long)counts.accessed);
    fl_tracker_rwp.destroy(tracker);
    printf("%llu pages brought back: their ages go on\n", (unsigned long long)brought);
    serve_no_more(&s);
}

/* ---- another process with the same memory ---------------------------------------------------------------------------- */

struct mapper {
    _Atomic(uint32_t) mapped, look, looked;
    uint64_t sum; /* of the page that was punched */
};

static void map_and_look(struct mapper *mapper, int fd) {
    const uint8_t *mapping = mmap(NULL, PAGES * FL_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    atomic_store(&mapper->mapped, mapping != MAP_FAILED);
    for (int i = 0; i < 10000 && !atomic_load(&mapper->look); i++)
        sleep_ms(1);
    for (size_t i = 0; i < FL_PAGE_SIZE; i++)
        mapper->sum += mapping[3 * FL_PAGE_SIZE + i];
    atomic_store(&mapper->looked, 1);
    _exit(0);
}

static void other_mapping(uint64_t seed) {
    struct victim victim = victim_start(PAGES, 0, seed);
    struct fl_inspection found;
    char path[64];
    uint64_t inode;
    CHECK(fl_inspect((int)victim.pid, &found) == 0 && found.refusal == FL_REFUSAL_NONE, "inspect: %s", found.detail);
    inode = found.regions[0].inode;
    int fd = -1;
    for (int number = 3; number < 64 && fd < 0; number++) {
        struct stat status;
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)victim.pid, number);
        if (stat(path, &status) == 0 && status.st_ino == inode)
            fd = open(path, O_RDWR | O_CLOEXEC);
    }
    CHECK(fd >= 0, "the memfd of the victim");
    /* Not a child of ours: those are passed over, as a pager's own helpers are. */
    struct mapper *mapper = mmap(NULL, sizeof(*mapper), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(mapper != MAP_FAILED, "mmap");
    pid_t between = fork();
    if (between == 0 && fork() == 0)
        map_and_look(mapper, fd);
    if (between == 0)
        _exit(0);
    (void)waitpid(between, NULL, 0);
    for (int i = 0; i < 5000 && !atomic_load(&mapper->mapped); i++)
        sleep_ms(1);
    CHECK(fl_inspect((int)victim.pid, &found) == 0 && found.refusal == FL_REFUSAL_OTHER_MAPPER,
          "a VM with a second mapper is %s", fl_refusal_name(found.refusal));
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * FL_PAGE_SIZE, FL_PAGE_SIZE) == 0, "punch");
    atomic_store(&mapper->look, 1);
    for (int i = 0; i < 5000 && !atomic_load(&mapper->looked); i++)
        sleep_ms(1);
    CHECK(atomic_load(&mapper->looked) && mapper->sum == 0,
          "a hole does not read as zeros elsewhere: this test shows nothing");
    printf("another mapping: refused (%s)\n", fl_refusal_name(found.refusal));
    kill(victim.pid, SIGKILL);
}

int main(int argc, char **argv) {
    struct fl_kernel_features kernel;
    need_paging();
    if (fl_probe_kernel(&kernel) || !kernel.rwp) {
        printf("skipped: this kernel's userfaultfd has no RWP (CONFIG_USERFAULTFD_RWP, Linux 7.3)\n");
        return 77;
    }
    uint64_t seed = seed_of(argc, argv);
    fl_log_setup(FL_LOG_ERROR, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    unmapped_pages(seed);
    filled_after_scan(seed);
    holes_stay_holes(seed);
    late_messages(seed);
    no_storm(seed);
    no_long_sync(seed);
    no_large_slow_batch(seed);
    brought_back(seed);
    other_mapping(seed);
    return 0;
}
