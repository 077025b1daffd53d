/* SPDX-License-Identifier: Apache-2.0 */
/*
 * While the zap tracker waits for the VMM's main thread, the VMM unmaps its memory or a part of it, or moves it, and
 * has something else at that address. That is left alone: dropped, a heap or a stack would be zeros. Moved before
 * anything of it has been looked at, it is not taken for idle. And while it makes the zap's call, it splits its
 * mapping: what the kernel tells of then is still our own doing, and nothing that is away is forgotten.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach/gate.h"
#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "swap/removed.h"
#include "track/track.h"
#include "victim.h"

#define PAGES 1024u
#define BYTES ((size_t)PAGES * FL_PAGE_SIZE)
#define FILLED 1
#define OWN 0xaa
#define SECONDS 60u

struct shared {
    _Atomic(uint32_t) ready, go, split, replaced, check, checked;
    _Atomic(uint32_t) lost;
    uint8_t *base;
};

static struct fl_vm vm;
static struct shared *shared;
static _Atomic(bool) reads_are_held, moves_before_looks;

static bool is_under_way(void) {
    const uint8_t *slots = vm.vault.base + vm.vault.gate_offset + FL_GATE_CODE_BYTES;
    bool any = false;
    for (uint32_t i = 0; i < FL_GATE_SLOTS; i++)
        any |= __atomic_load_n((const uint32_t *)(const void *)(slots + (size_t)i * FL_GATE_SLOT_BYTES),
                               __ATOMIC_ACQUIRE) == FL_GATE_RUNNING;
    return any;
}

/* The event of a call waits as long. */
ssize_t read(int fd, void *buffer, size_t bytes) {
    while (atomic_load(&reads_are_held) && fd == vm.uffd && is_under_way())
        sleep_ms(1);
    return syscall(SYS_read, fd, buffer, bytes);
}

/* ---- the VMM ------------------------------------------------------------------------------------------------ */

static uint8_t *room_above(void) {
    uint8_t *room = mmap(NULL, 2 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return room == MAP_FAILED ? NULL : room;
}

static uint8_t *upper;

/* What they leave free. */
struct place {
    uint8_t *start;
    size_t bytes;
};

static struct place unmap_at(uint8_t *start, size_t bytes) {
    if (munmap(start, bytes))
        _exit(96);
    return (struct place){start, bytes};
}

static struct place unmap(void) {
    return unmap_at(shared->base, BYTES);
}

static struct place unmap_middle(void) {
    return unmap_at(shared->base + BYTES / 2, BYTES / 16);
}

static struct place move_up(void) {
    if (mremap(shared->base, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, upper) != upper)
        _exit(96);
    return (struct place){shared->base, BYTES};
}

static struct place (*leave)(void);

/* All that was there from the beginning. */
static void look(void) {
    for (size_t at = 0; at < BYTES; at += FL_PAGE_SIZE)
        if (((volatile uint8_t *)shared->base)[at] != FILLED)
            atomic_fetch_add(&shared->lost, 1);
}

static void *split(void *unused) {
    (void)unused;
    while (!atomic_load(&shared->split))
        sleep_ms(1);
    if (mprotect(shared->base + BYTES / 4, BYTES / 4, PROT_READ))
        _exit(92);
    atomic_store(&shared->replaced, 1);
    while (!atomic_load(&shared->check))
        sleep_ms(1);
    look();
    atomic_store(&shared->checked, 1);
    return NULL;
}

static void *replace(void *unused) {
    (void)unused;
    while (!atomic_load(&shared->go))
        sleep_ms(1);
    struct place place = leave();
    uint8_t *own = mmap(place.start, place.bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (own != place.start)
        _exit(95);
    memset(own, OWN, place.bytes);
    atomic_store(&shared->replaced, 1);
    while (!atomic_load(&shared->check))
        sleep_ms(1);
    for (size_t at = 0; at < place.bytes; at += FL_PAGE_SIZE)
        if (((volatile uint8_t *)own)[at] != OWN)
            atomic_fetch_add(&shared->lost, 1);
    atomic_store(&shared->checked, 1);
    return NULL;
}

static void vmm_main(void) {
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    upper = room_above(); /* below what is mapped after it */
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (!upper || fd < 0 || ftruncate(fd, (off_t)BYTES))
        _exit(94);
    shared->base = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared->base == MAP_FAILED || shared->base > upper)
        _exit(94);
    memset(shared->base, FILLED, BYTES);
    if (pthread_create(&thread, NULL, replace, NULL) || pthread_create(&thread, NULL, split, NULL))
        _exit(93);
    atomic_store(&shared->ready, 1);
    while (true)
        poll(NULL, 0, 20);
}

/* ---- the test ----------------------------------------------------------------------------------------------- */

static void wait_for(_Atomic(uint32_t) *what, const char *words) {
    for (unsigned i = 0; i < SECONDS * 1000 && !atomic_load(what); i++)
        sleep_ms(1);
    CHECK(atomic_load(what), "not in %u s: %s", SECONDS, words);
}

static _Atomic(uint32_t) traced, let_go;

/* A debugger: as long as it is there, no run of the gate begins. It lets go by ending. */
static void *debug(void *unused) {
    (void)unused;
    CHECK(ptrace(PTRACE_SEIZE, vm.pid, NULL, NULL) == 0, "seize: %s", strerror(errno));
    atomic_store(&traced, 1);
    wait_for(&let_go, "the debugger may go");
    return NULL;
}

struct arming {
    struct fl_tracker *tracker;
    int error;
    _Atomic(bool) ended;
};

static void *arm(void *argument) {
    struct arming *arming = argument;
    uint64_t stop_ns;
    arming->error = fl_tracker_zap.sweep(arming->tracker, &stop_ns);
    atomic_store(&arming->ended, true);
    return NULL;
}

static struct fl_fault_server *serve(struct arming *arming) {
    const struct fl_tracker_list trackers = trackers_of("zap");
    memset(shared, 0, sizeof(*shared));
    pid_t vmm = fork();
    CHECK(vmm >= 0, "fork: %s", strerror(errno));
    if (vmm == 0)
        vmm_main();
    wait_for(&shared->ready, "the VMM has filled its memory");
    struct fl_fault_server *faults = served_vm_begin(&vm, vmm, &trackers, 2);
    CHECK(fl_tracker_zap.create(&vm, faults, &arming->tracker) == 0, "zap");
    return faults;
}

static void replaced(const char *words, struct place (*how)(void)) {
    struct arming arming = {.error = 0};
    pthread_t debugger, armer;
    leave = how;
    struct fl_fault_server *faults = serve(&arming);
    atomic_store(&traced, 0);
    atomic_store(&let_go, 0);
    CHECK(pthread_create(&debugger, NULL, debug, NULL) == 0, "thread");
    wait_for(&traced, "traced by a debugger");
    CHECK(pthread_create(&armer, NULL, arm, &arming) == 0, "thread");
    for (unsigned i = 0; i < SECONDS * 1000 && !fl_zap_marked(&vm) && !atomic_load(&arming.ended); i++)
        sleep_ms(1); /* it has found its region where it was */
    sleep_ms(10);    /* and waits for the main thread */
    atomic_store(&shared->go, 1);
    wait_for(&shared->replaced, "its own memory is there now");
    atomic_store(&let_go, 1);
    pthread_join(debugger, NULL);
    pthread_join(armer, NULL);
    atomic_store(&shared->check, 1);
    wait_for(&shared->checked, "looked at");
    printf("%s: %u pages lost, arming says: %s\n", words, atomic_load(&shared->lost), strerror(-arming.error));
    CHECK(atomic_load(&shared->lost) == 0, "%s: the VMM's own pages were dropped", words);
    CHECK(arming.error, "%s: armed, though nothing is there", words);
    fl_tracker_zap.destroy(arming.tracker);
    served_vm_end(&vm, faults);
}

/* When a sweep is about to look for its first pages; what is there then is not the region. */
static void move_now(void) {
    uint64_t base = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page);
    atomic_store(&moves_before_looks, false);
    atomic_store(&shared->go, 1);
    wait_for(&shared->replaced, "its own memory is there now");
    for (unsigned i = 0; i < SECONDS * 1000 && fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page) == base; i++)
        sleep_ms(1);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PAGEMAP_SCAN && fd == vm.pagemap_fd && atomic_load(&moves_before_looks))
        move_now();
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void moved_before_it_looks(void) {
    struct arming arming = {.error = 0};
    leave = move_up;
    struct fl_fault_server *faults = serve(&arming);
    atomic_store(&moves_before_looks, true);
    (void)arm(&arming);
    printf("moved before it was looked at: the sweep says: %s\n", strerror(-arming.error));
    CHECK(!atomic_load(&moves_before_looks) && arming.error == -EAGAIN, "all of it looks idle");
    fl_tracker_zap.destroy(arming.tracker);
    served_vm_end(&vm, faults);
}

/* The VMM's main thread is in the call, and its event is not read yet. The last half of what the call drops is away. */
static void split_meanwhile(void) {
    struct arming arming = {.error = -EBUSY};
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    pthread_t armer;
    struct fl_fault_server *faults = serve(&arming);
    uint64_t first = fl_region(&vm, 0)->first_page;
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(&vm, NULL, NULL, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, first + PAGES - 1 - FL_WINDOW_PAGES, FL_WINDOW_PAGES, all, &done);
    CHECK(error == 0 && done.pages > FL_WINDOW_PAGES / 2, "evict: %s", strerror(-error));
    fl_evictor_destroy(evictor);
    uint64_t away = FL_READ(&vm, evicted_pages);
    atomic_store(&reads_are_held, true);
    for (uint64_t until = fl_now() + SECONDS * FL_NS_PER_SECOND;;) { /* the main thread may not be to be had */
        atomic_store(&arming.ended, false);
        CHECK(pthread_create(&armer, NULL, arm, &arming) == 0, "thread");
        while (!is_under_way() && !atomic_load(&arming.ended))
            fl_sleep_ns(FL_NS_PER_MS);
        if (is_under_way() || fl_now() > until)
            break;
        pthread_join(armer, NULL);
        (void)fl_zap_settle(&vm, faults); /* what timed out: its mark would refuse the next */
    }
    CHECK(is_under_way(), "no call was made: %s", strerror(-arming.error));
    sleep_ms(10); /* the event is there */
    atomic_store(&shared->split, 1);
    wait_for(&shared->replaced, "its mapping is split");
    atomic_store(&reads_are_held, false);
    pthread_join(armer, NULL);
    /* The call took longer than it may, perhaps. */
    for (unsigned i = 0; i < SECONDS * 100 && fl_zap_settle(&vm, faults); i++)
        sleep_ms(10);
    CHECK(FL_READ(&vm, evicted_pages) == away, "%llu of %llu pages were forgotten",
          (unsigned long long)(away - FL_READ(&vm, evicted_pages)), (unsigned long long)away);
    atomic_store(&shared->check, 1);
    wait_for(&shared->checked, "looked at");
    printf("split while the event of the call waited: %u pages lost of %llu that were away, arming says: %s\n",
           atomic_load(&shared->lost), (unsigned long long)away, strerror(-arming.error));
    CHECK(atomic_load(&shared->lost) == 0, "zeros");
    fl_tracker_zap.destroy(arming.tracker);
    served_vm_end(&vm, faults);
}

int main(void) {
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    fl_log_setup(FL_LOG_WARNING, 0);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
    replaced("unmapped", unmap);
    replaced("moved", move_up);
    replaced("unmapped in the middle", unmap_middle);
    moved_before_it_looks();
    split_meanwhile();
    return 0;
}
