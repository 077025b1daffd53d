/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whoever waits for a page gets an answer, also when it can only be an error: a page whose address is unmapped while its fault
 * is in the pager's hands, and a page under which the host's memory has failed. The toucher goes by way of read(2), as KVM
 * and vhost go by way of the kernel, and so is told instead of being killed. And the wait for a page that is held still
 * counts as any other.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "base/log.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "swap/uffd.h"
#include "track/age.h"
#include "victim.h"

#define PAGES 16u
#define LOST 5u /* the page that it is about */
#define SECONDS 20u
#define UNASKED (-1)
#define ASKED (-2)

#ifndef MADV_HWPOISON
#define MADV_HWPOISON 100
#endif

struct toucher { /* of each: UNASKED, ASKED, or the errno of what came of it */
    _Atomic(int) touch, unmap, drop;
    _Atomic(int) ready;
    uint8_t *memory;
};

struct session {
    struct toucher *shared;
    pid_t pid;
    struct fl_vm vm;
    struct fl_fault_server *faults;
};

/* ---- the VMM ------------------------------------------------------------------------------------------------ */

static void *touch_when_asked(void *argument) {
    struct toucher *shared = argument;
    int ends[2];
    if (pipe(ends))
        _exit(90);
    while (atomic_load(&shared->touch) != ASKED)
        sleep_ms(1);
    if (write(ends[1], "", 1) != 1)
        _exit(93);
    ssize_t got = read(ends[0], shared->memory + (size_t)LOST * FL_PAGE_SIZE, 1);
    atomic_store(&shared->touch, got == 1 ? 0 : errno);
    return NULL;
}

static void *change_when_asked(void *argument) {
    struct toucher *shared = argument;
    uint8_t *page = shared->memory + (size_t)LOST * FL_PAGE_SIZE;
    for (;; sleep_ms(1)) {
        if (atomic_load(&shared->unmap) == ASKED)
            atomic_store(&shared->unmap, munmap(page, FL_PAGE_SIZE) ? errno : 0);
        if (atomic_load(&shared->drop) == ASKED)
            atomic_store(&shared->drop, madvise(page, FL_PAGE_SIZE, MADV_DONTNEED) ? errno : 0);
    }
    return NULL;
}

static void live(struct toucher *shared) {
    pthread_t threads[2];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    size_t bytes = (size_t)PAGES * FL_PAGE_SIZE;
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        _exit(91);
    shared->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared->memory == MAP_FAILED)
        _exit(92);
    memset(shared->memory, 0x5a, bytes);
    pthread_create(&threads[0], NULL, touch_when_asked, shared);
    pthread_create(&threads[1], NULL, change_when_asked, shared);
    atomic_store(&shared->ready, 1);
    for (;;)
        poll(NULL, 0, 20);
}

/* ---- the test ----------------------------------------------------------------------------------------------- */

static struct session *begin(const char *tracker) {
    static struct session session;
    const struct fl_tracker_list trackers = trackers_of(tracker);
    memset(&session, 0, sizeof(session));
    session.shared = mmap(NULL, sizeof(*session.shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(session.shared != MAP_FAILED, "mmap");
    *session.shared = (struct toucher){.touch = UNASKED, .unmap = UNASKED, .drop = UNASKED};
    session.pid = fork();
    CHECK(session.pid >= 0, "fork: %s", strerror(errno));
    if (session.pid == 0)
        live(session.shared);
    while (!atomic_load(&session.shared->ready))
        sleep_ms(1);
    session.faults = served_vm_begin(&session.vm, session.pid, &trackers, 1);
    return &session;
}

static void end(struct session *session) {
    served_vm_end(&session->vm, session->faults);
    munmap(session->shared, sizeof(*session->shared));
}

static void ask(_Atomic(int) *what) {
    atomic_store(what, ASKED);
}

static int answer_of(_Atomic(int) *what, const char *name) {
    for (unsigned i = 0; i < SECONDS * 1000 && atomic_load(what) == ASKED; i++)
        sleep_ms(1);
    CHECK(atomic_load(what) != ASKED, "%s: it still waits after %u s", name, SECONDS);
    return atomic_load(what);
}

/* One thread waits for a page, and its message has been read: as the userfaultfd says. */
static bool is_in_our_hands(const struct fl_vm *vm) {
    char path[64], text[256] = "";
    unsigned pending = 0, total = 0;
    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", vm->uffd);
    FILE *file = fopen(path, "re");
    CHECK(file, "%s: %s", path, strerror(errno));
    while (fgets(text, sizeof(text), file))
        (void)(sscanf(text, "pending: %u", &pending) || sscanf(text, "total: %u", &total));
    fclose(file);
    return pending == 0 && total == 1;
}

static void unmapped_in_our_hands(void) {
    struct session *session = begin("zap");
    struct fl_vm *vm = &session->vm;
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64] = {(1u << PAGES) - 1}, page = fl_region(vm, 0)->first_page + LOST;
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, PAGES, all, &done);
    CHECK(error == 0 && done.pages == PAGES, "%llu pages evicted: %s", (unsigned long long)done.pages,
          strerror(-error));
    fl_evictor_destroy(evictor);

    /* On its way back by somebody else: so the fault is kept. */
    fl_entry away = atomic_load(fl_slot(vm, page));
    atomic_store(fl_slot(vm, page), fl_entry_with_state(away, FL_PAGE_LOADING));
    ask(&session->shared->touch);
    for (unsigned i = 0; i < SECONDS * 1000 && !is_in_our_hands(vm); i++)
        sleep_ms(1);
    CHECK(is_in_our_hands(vm), "no fault in %u s", SECONDS);
    ask(&session->shared->unmap);
    CHECK(answer_of(&session->shared->unmap, "munmap") == 0, "munmap");
    CHECK(atomic_load(&session->shared->touch) == ASKED, "the touch was answered too early");
    atomic_store(fl_slot(vm, page), away);
    CHECK(answer_of(&session->shared->touch, "the touch of an unmapped page") == EFAULT, "errno %d",
          atomic_load(&session->shared->touch));
    end(session);
    printf("unmapped while its fault was in our hands: answered\n");
}

/* By a process that the kernel ends for it. False: this kernel cannot. */
static bool fail_memory(struct fl_vm *vm) {
    int status;
    pid_t child = fork();
    CHECK(child >= 0, "fork: %s", strerror(errno));
    if (child == 0) {
        volatile uint8_t *page =
            mmap(NULL, FL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vm->memory[0].fd, (off_t)LOST * FL_PAGE_SIZE);
        (void)page[0];
        _exit(madvise((void *)(uintptr_t)page, FL_PAGE_SIZE, MADV_HWPOISON) ? 1 : 0);
    }
    CHECK(waitpid(child, &status, 0) == child, "waitpid");
    return WIFSIGNALED(status) || WEXITSTATUS(status) == 0;
}

static bool rwp_here(void) {
    struct fl_kernel_features kernel;
    return fl_probe_kernel(&kernel) == 0 && kernel.rwp;
}

static void memory_failed(void) {
    if (!rwp_here()) {
        printf("memory that has failed not tried: this kernel has no RWP\n");
        return;
    }
    struct session *session = begin("rwp");
    ask(&session->shared->drop);
    CHECK(answer_of(&session->shared->drop, "madvise") == 0, "madvise");
    if (!fail_memory(&session->vm)) {
        printf("memory that has failed not tried: this kernel has no MADV_HWPOISON\n");
        end(session);
        return;
    }
    ask(&session->shared->touch);
    CHECK(answer_of(&session->shared->touch, "the touch of a page whose memory has failed") == EFAULT, "errno %d",
          atomic_load(&session->shared->touch));
    end(session);
    printf("memory that has failed: answered\n");
}

static void held_still(const char *tracker) {
    struct session *session = begin(tracker);
    struct fl_vm *vm = &session->vm;
    uint64_t page = fl_region(vm, 0)->first_page + LOST, address = fl_address_of_page(vm, 0, page);
    const uint8_t age = 30;
    __atomic_store_n(&vm->vault.ages[page], age, __ATOMIC_RELAXED);
    uint64_t stall_ns = FL_READ(vm, stall_ns), promotions = FL_READ(vm, promotions[fl_age_bin(age)]);
    atomic_store(fl_slot(vm, page), fl_entry_make(FL_PAGE_FREEZING, FL_TIER_ZERO, 0));
    CHECK(fl_uffd_sync(vm, true) == 0, "sync mode");
    CHECK(fl_uffd_protect(vm, address, FL_PAGE_SIZE, true) == 0, "protect");
    ask(&session->shared->touch);
    CHECK(answer_of(&session->shared->touch, "the touch of a page held still") == 0, "errno %d",
          atomic_load(&session->shared->touch));
    CHECK(fl_uffd_sync(vm, false) == 0, "async mode");
    for (unsigned i = 0; i < SECONDS * 1000 && FL_READ(vm, promotions[fl_age_bin(age)]) == promotions; i++)
        sleep_ms(1);
    CHECK(FL_READ(vm, promotions[fl_age_bin(age)]) == promotions + 1, "not counted at its age");
    CHECK(FL_READ(vm, stall_ns) > stall_ns, "its wait is not counted");
    uint8_t after = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
    CHECK(after == 0, "its age is %u", after);
    end(session);
    printf("%s: the touch of a page held still counts at its age, and so does the wait\n", tracker);
}

int main(void) {
    need_paging();
    fl_log_setup(FL_LOG_ERROR, 0);
    unmapped_in_our_hands();
    memory_failed();
    held_still("zap");
    if (rwp_here())
        held_still("rwp");
    return 0;
}
