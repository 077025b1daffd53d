/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory is freed and used again while the pager has not come to it yet: by several threads at once, moved at once,
 * filled anew at once, fetched ahead at once, and while our own zap lasts, was not made after all, or comes again and
 * again. Nobody reads the old content of what was freed, and nothing written since is lost.
 *
 * Each moment is met: reads of the userfaultfd are held until all have freed, and forgetting is held when it has begun.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"
#include "pager/scan.h"
#include "served_vm.h"
#include "slow.h"
#include "swap/bring.h"
#include "swap/event.h"
#include "swap/evict.h"
#include "swap/removed.h"
#include "victim.h"

/* Helpers are called between two steps of forgetting, when they have taken more than a millisecond. */
#define MANY ((SANITIZED ? 4 : rounds(8, 2)) * (uint32_t)FL_FORGET_PAGES)
#define THREADS 4u
#define SHARE 64u /* pages that each thread but the first frees */
#define LOOKED_EVERY 16u
#define WORDS (FL_PAGE_SIZE / sizeof(uint64_t))
#define REFILLED 8u
#define REFILLED_BACK 300u /* so far from the end: forgotten last, and in the last window that is evicted */
#define SECONDS 60u

struct shared {
    _Atomic(uint32_t) ready, go, freeing, freed, done, check, checked;
    _Atomic(uint32_t) looked, zeros, old, lost;
    uint8_t *base;
};

static struct fl_vm vm;
static struct shared *shared;
static uint32_t pages;
static uint64_t seed;
static _Atomic(bool) reads_are_held;
static _Atomic(uint32_t) hold_ms, held; /* for how long, once it has begun; the thread */

/* ---- what holds the pager ----------------------------------------------------------------------------------- */

ssize_t read(int fd, void *buffer, size_t bytes) {
    while (atomic_load(&reads_are_held) && fd == vm.uffd)
        sleep_ms(1);
    return syscall(SYS_read, fd, buffer, bytes);
}

/* Helpers are called when there is much to forget: they are at work, and who forgets is not. */
ssize_t write(int fd, const void *buffer, size_t bytes) {
    ssize_t written = syscall(SYS_write, fd, buffer, bytes);
    uint32_t nobody = 0;
    if (bytes == sizeof(uint64_t) && gettid() != getpid() && atomic_load(&hold_ms) &&
        atomic_compare_exchange_strong(&held, &nobody, (uint32_t)gettid()))
        for (unsigned i = 0; i < atomic_load(&hold_ms); i++) {
            sleep_ms(1);
            (void)!syscall(SYS_write, fd, buffer, bytes); /* they are called again and again */
        }
    return written;
}

static void hold_forgetting(uint32_t milliseconds) {
    atomic_store(&held, 0);
    atomic_store(&hold_ms, milliseconds);
}

/* ---- the VMM ------------------------------------------------------------------------------------------------ */

static uint64_t *words_of(uint32_t page) {
    return (uint64_t *)(uintptr_t)(shared->base + (size_t)page * FL_PAGE_SIZE);
}

/* Compresses; no word that is looked at is zero. */
static void fill(uint32_t page, uint64_t generation) {
    uint64_t *words = words_of(page), state = seed ^ (uint64_t)page << 32 ^ generation;
    for (uint32_t i = 0; i < WORDS; i++)
        words[i] = i % 4 ? generation + page : random_next(&state) | 1;
}

static bool is_filled(uint32_t page, uint64_t generation) {
    const volatile uint64_t *words = words_of(page);
    uint64_t state = seed ^ (uint64_t)page << 32 ^ generation;
    bool same = true;
    for (uint32_t i = 0; i < WORDS; i++)
        same &= words[i] == (i % 4 ? generation + page : random_next(&state) | 1);
    return same;
}

static void look(uint32_t page) {
    atomic_fetch_add(*(volatile uint64_t *)words_of(page) ? &shared->old : &shared->zeros, 1);
    atomic_fetch_add(&shared->looked, 1);
}

static void free_pages(uint32_t first, uint32_t count) {
    atomic_fetch_add(&shared->freeing, 1);
    if (madvise(words_of(first), (size_t)count * FL_PAGE_SIZE, MADV_REMOVE))
        _exit(98);
    atomic_fetch_add(&shared->freed, 1);
}

/* The first frees nearly all, and the others, who come after it, the rest. */
static void free_by_several(uint32_t thread) {
    uint32_t most = pages - (THREADS - 1) * SHARE;
    while (thread && atomic_load(&shared->freeing) == 0)
        sleep_ms(1);
    if (thread)
        sleep_ms(20);
    uint32_t first = thread ? most + (thread - 1) * SHARE : 0, count = thread ? SHARE : most;
    free_pages(first, count);
    for (uint32_t i = 1; i <= SHARE; i++)
        look(first + count - i);
}

static void free_and_move(uint32_t thread) {
    size_t bytes = (size_t)pages * FL_PAGE_SIZE;
    if (thread)
        return;
    uint8_t *place = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    free_pages(0, pages);
    if (mremap(shared->base, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place)
        _exit(97);
    shared->base = place;
    for (uint32_t page = 0; page < pages; page += LOOKED_EVERY)
        look(page);
}

static void free_and_fill(uint32_t thread) {
    if (thread)
        return;
    free_pages(0, pages);
    for (uint32_t i = 0; i < REFILLED; i++)
        fill(pages - REFILLED_BACK + i, 2);
    atomic_store(&shared->done, THREADS);
    while (!atomic_load(&shared->check))
        sleep_ms(1);
    for (uint32_t i = 0; i < REFILLED; i++)
        if (!is_filled(pages - REFILLED_BACK + i, 2))
            atomic_fetch_add(&shared->lost, 1);
    atomic_store(&shared->checked, 1);
}

static void free_at_once(uint32_t thread) {
    if (thread)
        return;
    free_pages(0, pages);
    for (uint32_t page = 0; page < pages; page++)
        look(page);
}

static void free_and_wait(uint32_t thread) {
    if (thread)
        return;
    free_pages(0, pages);
    while (!atomic_load(&shared->check))
        sleep_ms(1);
    for (uint32_t page = 0; page < pages; page++)
        look(page);
}

static void free_half_and_wait(uint32_t thread) {
    if (thread)
        return;
    free_pages(0, pages / 2);
    while (!atomic_load(&shared->check))
        sleep_ms(1);
    for (uint32_t page = 0; page < pages / 2; page++)
        look(page);
}

/* Every other page, and the others are touched meanwhile: there is always something to zap. */
static void free_page_by_page(uint32_t thread) {
    for (uint32_t page = 0; page < pages && !thread; page += 2) {
        free_pages(page, 1);
        look(page);
    }
    if (!thread)
        atomic_store(&shared->check, 1);
    for (uint32_t page = 1; thread && !atomic_load(&shared->check); page = (page + 2) % pages)
        words_of(page)[thread]++;
}

static void (*act)(uint32_t thread);

static void *run(void *number) {
    while (!atomic_load(&shared->go))
        sleep_ms(1);
    act((uint32_t)(uintptr_t)number);
    atomic_fetch_add(&shared->done, 1);
    return NULL;
}

static void vmm_main(void) {
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    size_t bytes = (size_t)pages * FL_PAGE_SIZE;
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        _exit(94);
    shared->base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared->base == MAP_FAILED)
        _exit(94);
    for (uint32_t page = 0; page < pages; page++)
        fill(page, 1);
    for (uintptr_t i = 0; i < THREADS; i++)
        if (pthread_create(&thread, NULL, run, (void *)i))
            _exit(93);
    atomic_store(&shared->ready, 1);
    while (true)
        poll(NULL, 0, 20);
}

/* ---- the test ----------------------------------------------------------------------------------------------- */

static void wait_for(_Atomic(uint32_t) *what, uint32_t least, const char *words) {
    for (unsigned i = 0; i < SECONDS * 1000 && atomic_load(what) < least; i++)
        sleep_ms(1);
    CHECK(atomic_load(what) >= least, "not in %u s: %s", SECONDS, words);
}

/* When all has happened that is to happen before it. */
static void let_forget(void) {
    wait_for(&held, 1, "forgetting was held, else this shows nothing");
    atomic_store(&hold_ms, 0);
}

static struct fl_fault_server *serve(void (*what)(uint32_t), uint32_t of_pages) {
    const struct fl_tracker_list trackers = trackers_of("zap");
    pages = of_pages;
    act = what;
    memset(shared, 0, sizeof(*shared));
    pid_t vmm = fork();
    CHECK(vmm >= 0, "fork: %s", strerror(errno));
    if (vmm == 0)
        vmm_main();
    wait_for(&shared->ready, 1, "the VMM has filled its memory");
    return served_vm_begin(&vm, vmm, &trackers, 2);
}

static uint64_t evict(uint32_t first, uint32_t end, uint8_t of_eight, fl_accessed_fn accessed, void *context) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t candidates[FL_WINDOW_PAGES / 64];
    memset(candidates, of_eight, sizeof(candidates));
    CHECK(fl_evictor_create(&vm, accessed, context, &evictor) == 0, "evictor");
    for (uint32_t page = first; page < end; page += FL_WINDOW_PAGES) {
        int error =
            fl_evict_window(evictor, 0, fl_region(&vm, 0)->first_page + page, FL_WINDOW_PAGES, candidates, &done);
        CHECK(error == 0, "window at page %u: %s", page, strerror(-error));
    }
    fl_evictor_destroy(evictor);
    return done.pages;
}

static void evict_all(uint32_t end) {
    uint64_t away = evict(0, end, 0xff, NULL, NULL);
    CHECK(away > end - end / 16, "%llu of %u pages away", (unsigned long long)away, end);
}

static void check_holes(const char *words, uint32_t looked) {
    uint32_t zeros = atomic_load(&shared->zeros), old = atomic_load(&shared->old);
    printf("%s: %u read as zeros, %u with their old content\n", words, zeros, old);
    CHECK(old == 0 && zeros == looked, "%s: %u of %u pages have their old content", words, old, looked);
}

static void freed_by_several(uint32_t of_pages) {
    struct fl_fault_server *faults = serve(free_by_several, of_pages);
    evict_all(pages);
    atomic_store(&reads_are_held, true);
    atomic_store(&shared->go, 1);
    wait_for(&shared->freeing, THREADS, "all threads free");
    sleep_ms(50);
    hold_forgetting(1000); /* at most: who is held may have faults of the others in hand */
    atomic_store(&reads_are_held, false);
    wait_for(&shared->done, THREADS, "all threads have freed and looked");
    let_forget();
    check_holes("freed by several threads at once", THREADS * SHARE);
    served_vm_end(&vm, faults);
}

static void freed_and_moved(uint32_t of_pages) {
    struct fl_fault_server *faults = serve(free_and_move, of_pages);
    evict_all(pages);
    hold_forgetting(SECONDS * 1000);
    atomic_store(&shared->go, 1);
    wait_for(&shared->looked, FL_FORGET_PAGES / LOOKED_EVERY + SHARE,
             "freed, moved and looked at behind the first step");
    let_forget();
    wait_for(&shared->done, THREADS, "all that was to be looked at");
    check_holes("freed and moved", pages / LOOKED_EVERY);
    served_vm_end(&vm, faults);
}

/* The mover has chosen this window and asks what was touched since. A tracker that sees nothing between scans says: nothing. */
static int see_nothing(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count,
                       uint64_t *accessed) {
    (void)tracker, (void)region, (void)first;
    memset(accessed, 0, (count + 63) / 64 * sizeof(*accessed));
    if (!atomic_exchange(&shared->go, 1))
        wait_for(&shared->done, THREADS, "freed and filled anew");
    return 0;
}

static void freed_and_filled(uint32_t of_pages) {
    static const struct fl_tracker_ops blind = {.kind = FL_TRACKER_DAMON, .sees_io = true, .harvest = see_nothing};
    struct fl_fault_server *faults = serve(free_and_fill, of_pages);
    struct fl_scanner scanner = {.vm = &vm, .ops = &blind};
    evict_all(pages - FL_WINDOW_PAGES);
    for (uint32_t page = 0; page < pages; page++) /* as fault threads do it */
        __atomic_store_n(&vm.vault.ages[fl_region(&vm, 0)->first_page + page], 9, __ATOMIC_RELAXED);
    hold_forgetting(SECONDS * 1000);
    (void)evict(pages - FL_WINDOW_PAGES, pages, 0xff, fl_scanner_harvest, &scanner);
    let_forget();
    fl_fault_quiesce(faults);
    atomic_store(&shared->check, 1);
    wait_for(&shared->checked, 1, "what was filled anew is looked at");
    uint32_t lost = atomic_load(&shared->lost);
    printf("freed and filled anew while a window is evicted: %u of %u pages lost\n", lost, REFILLED);
    CHECK(lost == 0, "%u of %u pages lost what was written since they were freed", lost, REFILLED);
    served_vm_end(&vm, faults);
}

/* The VMM knows that it is free; the pager is told to fetch it ahead, or to drain, and has not come to it yet. */
static void freed_and_brought(uint32_t of_pages, bool into_file) {
    struct fl_fault_server *faults = serve(free_and_wait, of_pages);
    struct fl_bringer *bringer;
    uint64_t allowance = UINT64_MAX, brought = 0;
    evict_all(pages);
    CHECK(fl_bringer_create(&vm, &bringer) == 0, "bringer");
    hold_forgetting(SECONDS * 1000);
    atomic_store(&shared->go, 1);
    wait_for(&shared->freed, 1, "freed");
    wait_for(&held, 1, "forgetting is held");
    int error = into_file ? fl_bring_into_file(bringer, 0, &brought)
                          : fl_bring_range(bringer, 0, fl_region(&vm, 0)->first_page, pages, UINT8_MAX, true,
                                           &allowance, &brought);
    CHECK(error == (into_file ? -EAGAIN : 0), "bring: %s", strerror(-error));
    let_forget();
    fl_bringer_destroy(bringer);
    atomic_store(&shared->check, 1);
    wait_for(&shared->done, THREADS, "freed and looked at");
    printf("%llu brought, ", (unsigned long long)brought);
    check_holes(into_file ? "freed and written into the file" : "freed and fetched ahead", pages);
    served_vm_end(&vm, faults);
}

/* As while our own zap lasts and its own event has been seen: what is freed then is put off. */
static void freed_during_zap(uint32_t of_pages) {
    struct fl_fault_server *faults = serve(free_at_once, of_pages);
    struct uffd_msg own = {.event = UFFD_EVENT_REMOVE};
    own.arg.remove.start = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page);
    own.arg.remove.end = own.arg.remove.start + (uint64_t)pages * FL_PAGE_SIZE;
    evict_all(pages);
    fl_zap_mark(&vm, own.arg.remove.start, own.arg.remove.end);
    CHECK(fl_event(&vm, &own).end == 0, "our own zap is taken for a removal");
    atomic_store(&shared->go, 1);
    wait_for(&shared->done, THREADS, "freed and looked at");
    fl_fault_end_zap(faults, true);
    check_holes("freed while a zap lasts", pages);
    served_vm_end(&vm, faults);
}

/* As while the VMM's main thread is not to be had: nothing of what is freed meanwhile can be a piece of our zap. */
static void freed_before_zap(uint32_t of_pages, bool exactly) {
    struct fl_fault_server *faults = serve(free_half_and_wait, of_pages);
    uint64_t start = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page);
    evict_all(pages);
    fl_zap_mark(&vm, start, start + (uint64_t)pages * FL_PAGE_SIZE / (exactly ? 2 : 1));
    atomic_store(&shared->check, !exactly);
    atomic_store(&shared->go, 1);
    wait_for(&shared->freed, 1, "freed");
    sleep_ms(100); /* and looked at, if they are known to have been freed */
    fl_fault_end_zap(faults, false);
    atomic_store(&shared->check, 1);
    wait_for(&shared->done, THREADS, "freed and looked at");
    check_holes(exactly ? "the same range freed before a zap that is not made" : "freed before a zap that is not made",
                pages / 2);
    served_vm_end(&vm, faults);
}

/* How often it has. */
static uint64_t free_while_zap_arms(uint32_t of_pages) {
    struct fl_fault_server *faults = serve(free_page_by_page, of_pages);
    struct fl_tracker *tracker;
    uint64_t stop_ns, armed = 0;
    uint64_t away = evict(0, pages, 0x55, NULL, NULL);
    CHECK(away > pages / 2 - pages / 32, "%llu of %u pages away", (unsigned long long)away, pages / 2);
    CHECK(fl_tracker_zap.create(&vm, faults, &tracker) == 0, "zap");
    atomic_store(&shared->go, 1);
    for (uint64_t until = fl_now() + SECONDS * FL_NS_PER_SECOND; !atomic_load(&shared->check) && fl_now() < until;) {
        (void)fl_zap_settle(&vm, faults); /* as the mover does, where a call of the last arming was late */
        armed += fl_tracker_zap.arm(tracker, &stop_ns) == 0;
        sleep_ms(rounds(1, 20));
    }
    wait_for(&shared->done, THREADS, "freed page by page");
    fl_tracker_zap.destroy(tracker);
    printf("zap has armed %llu times\n", (unsigned long long)armed);
    check_holes("freed page by page while zap arms", pages / 2);
    served_vm_end(&vm, faults);
    return armed;
}

/* That takes the VMM's main thread, which has to get a CPU beside those that free and touch. */
static void freed_while_zap_arms(uint32_t of_pages) {
    uint64_t armed = 0;
    for (uint64_t until = fl_now() + SECONDS * FL_NS_PER_SECOND; !armed && fl_now() < until;)
        armed = free_while_zap_arms(of_pages);
    CHECK(armed > 0, "zap has never armed meanwhile: this shows nothing");
}

int main(int argc, char **argv) {
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    seed = seed_of(argc, argv);
    fl_log_setup(FL_LOG_WARNING, 0);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
    freed_by_several(MANY);
    freed_and_moved(MANY);
    freed_and_filled(MANY);
    freed_and_brought(MANY, false);
    freed_and_brought(MANY, true);
    freed_during_zap(rounds(4096, 1024));
    freed_before_zap(rounds(4096, 1024), false);
    freed_before_zap(rounds(4096, 1024), true);
    freed_while_zap_arms(rounds(16384, 4096));
    return 0;
}
