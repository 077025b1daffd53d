/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages that somebody holds past the page tables while they are evicted. A device that writes into one: io_uring's fixed
 * buffers stand in for it, into which the kernel writes without looking at the page table, as a disk does. And a page of a
 * huge page, which then cannot be split. Each part first shows the trouble where there is one without our remedy. Trackers
 * that do not see such a device are given up as soon as the VMM can have one. And pages that a vCPU touches while it is the
 * evictor that holds them.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "attach/probe.h"
#include "base/log.h"
#include "host_memory.h"
#include "pager/scan.h"
#include "said.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "swap/recover.h"
#include "track/track.h"
#include "victim.h"

#define PAGES HOST_HUGE_PAGES
#define BYTES ((size_t)PAGES * HOST_PAGE)
#define HELD 7u      /* the page that is held */
#define FROM_DISK 90 /* what the device writes */
#define SECONDS 60u
#define TOUCH_SECONDS 10u /* a touch that ends at once takes no part of that */
#define SKIP 77

enum order { BEGIN_READ, END_READ, HOLD, LET_GO, CHECK_ALL, OPEN_DIRECT, CLOSE_DIRECT, READ_BYTE, WRITE_BYTE };

struct shared {
    sem_t asked, answered;
    enum order order;
    int error;      /* errno of what was ordered */
    uint32_t wrong; /* pages that are not as they were written, by CHECK_ALL */
    _Atomic(uint64_t) base;
};

struct device { /* an io_uring with one read of one page under way */
    int ring, pipe[2];
    struct io_uring_params params;
    uint8_t *submissions, *completions;
    struct io_uring_sqe *entries;
};

/* ---- the VMM ------------------------------------------------------------------------------------------------ */

static void fill(uint8_t *page, uint32_t number, int with) {
    uint32_t *words = (uint32_t *)(void *)page;
    for (uint32_t i = 0; i < HOST_PAGE / sizeof(*words); i++)
        words[i] = with ? (uint32_t)with * 0x01010101u : number << 16 | (i & 0xff);
}

static uint32_t count_wrong(const uint8_t *memory, int held_holds) {
    uint8_t wanted[HOST_PAGE] __attribute__((aligned(8)));
    uint32_t wrong = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        fill(wanted, page, page == HELD ? held_holds : 0);
        wrong += memcmp(memory + (size_t)page * HOST_PAGE, wanted, HOST_PAGE) != 0;
    }
    return wrong;
}

static int open_device(struct device *device, uint8_t *page) {
    struct iovec buffer = {.iov_base = page, .iov_len = HOST_PAGE};
    device->ring = (int)syscall(__NR_io_uring_setup, 2, &device->params);
    if (device->ring < 0 || pipe2(device->pipe, O_CLOEXEC))
        return errno;
    const struct io_uring_params *p = &device->params;
    device->submissions = mmap(NULL, p->sq_off.array + p->sq_entries * sizeof(uint32_t), PROT_READ | PROT_WRITE,
                               MAP_SHARED, device->ring, IORING_OFF_SQ_RING);
    device->completions = mmap(NULL, p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe),
                               PROT_READ | PROT_WRITE, MAP_SHARED, device->ring, IORING_OFF_CQ_RING);
    device->entries = mmap(NULL, p->sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED,
                           device->ring, IORING_OFF_SQES);
    if (device->submissions == MAP_FAILED || device->completions == MAP_FAILED || device->entries == MAP_FAILED)
        return errno;
    return syscall(__NR_io_uring_register, device->ring, IORING_REGISTER_BUFFERS, &buffer, 1) ? errno : 0;
}

/* A read of an empty pipe into the fixed buffer: under way until somebody writes into the pipe. */
static int begin_read(struct device *device, uint8_t *page) {
    int error = open_device(device, page);
    if (error)
        return error;
    device->entries[0] = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED,
                                               .fd = device->pipe[0],
                                               .addr = (uint64_t)(uintptr_t)page,
                                               .len = HOST_PAGE,
                                               .off = UINT64_MAX};
    *(uint32_t *)(void *)(device->submissions + device->params.sq_off.array) = 0;
    __atomic_store_n((uint32_t *)(void *)(device->submissions + device->params.sq_off.tail), 1, __ATOMIC_RELEASE);
    return syscall(__NR_io_uring_enter, device->ring, 1, 0, 0, NULL, 0) == 1 ? 0 : errno;
}

static int end_read(struct device *device) {
    uint8_t content[HOST_PAGE] __attribute__((aligned(8)));
    fill(content, 0, FROM_DISK);
    if (write(device->pipe[1], content, HOST_PAGE) != HOST_PAGE)
        return errno;
    if (syscall(__NR_io_uring_enter, device->ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
        return errno;
    const struct io_uring_cqe *done =
        (const void *)(device->completions + device->params.cq_off.cqes); /* the only one there will be */
    int error = done->res == (int)HOST_PAGE ? 0 : EIO;
    close(device->ring);
    return error;
}

/* A file of which the kernel would read past the page table. */
static int open_direct(int *fd) {
    char path[64];
    snprintf(path, sizeof(path), "/tmp/fl-direct-%d", (int)getpid());
    *fd = open(path, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
    int error = *fd < 0 ? errno : 0;
    unlink(path);
    return error;
}

static void *obey(void *argument) {
    struct shared *s = argument;
    struct device device = {.ring = -1};
    uint8_t *memory = (uint8_t *)(uintptr_t)atomic_load(&s->base);
    struct iovec held = {.iov_base = memory + (size_t)HELD * HOST_PAGE, .iov_len = HOST_PAGE};
    int pipes[2], holds = 0, direct = -1;
    uint8_t byte[HOST_PAGE];
    if (pipe2(pipes, O_CLOEXEC))
        _exit(91);
    for (;;) {
        while (sem_wait(&s->asked))
            ;
        s->error = 0;
        if (s->order == BEGIN_READ) {
            s->error = begin_read(&device, memory + (size_t)HELD * HOST_PAGE);
        } else if (s->order == END_READ) {
            s->error = end_read(&device);
            holds = FROM_DISK;
        } else if (s->order == HOLD) {
            s->error = vmsplice(pipes[1], &held, 1, 0) == (ssize_t)HOST_PAGE ? 0 : errno;
        } else if (s->order == LET_GO) {
            s->error = read(pipes[0], byte, HOST_PAGE) == (ssize_t)HOST_PAGE ? 0 : errno;
        } else if (s->order == OPEN_DIRECT) {
            s->error = open_direct(&direct);
        } else if (s->order == CLOSE_DIRECT) {
            s->error = close(direct) ? errno : 0;
        } else if (s->order == READ_BYTE) {
            (void)((volatile uint8_t *)memory)[(size_t)HELD * HOST_PAGE];
        } else if (s->order == WRITE_BYTE) {
            volatile uint8_t *first = memory + (size_t)HELD * HOST_PAGE;
            *first = *first; /* the content stays, but for the kernel it may have changed */
        } else {
            s->wrong = count_wrong(memory, holds);
        }
        sem_post(&s->answered);
    }
    return NULL;
}

static _Noreturn void vmm(struct shared *s) {
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC); /* as QEMU names it */
    uint8_t *room = mmap(NULL, 2 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fd < 0 || ftruncate(fd, (off_t)BYTES) || room == MAP_FAILED)
        _exit(92);
    /* Where a huge page would lie. */
    uint8_t *place = (uint8_t *)(((uintptr_t)room + BYTES - 1) & ~(uintptr_t)(BYTES - 1));
    uint8_t *memory = mmap(place, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (memory == MAP_FAILED)
        _exit(93);
    for (uint32_t page = 0; page < PAGES; page++)
        fill(memory + (size_t)page * HOST_PAGE, page, 0);
    atomic_store(&s->base, (uint64_t)(uintptr_t)memory);
    if (pthread_create(&thread, NULL, obey, s))
        _exit(94);
    for (;;)
        poll(NULL, 0, 1000);
}

/* ---- and its pager ------------------------------------------------------------------------------------------ */

struct served {
    pid_t pid;
    struct shared *shared;
    struct fl_vm vm;
    struct fl_fault_server *faults;
    const struct fl_tracker_ops *ops;
    struct fl_tracker *tracker;
};

static void begin_vmm(struct served *s) {
    memset(s, 0, sizeof(*s));
    s->shared = mmap(NULL, sizeof(*s->shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(s->shared != MAP_FAILED, "mmap");
    CHECK(sem_init(&s->shared->asked, 1, 0) == 0 && sem_init(&s->shared->answered, 1, 0) == 0, "semaphores");
    fflush(NULL);
    s->pid = fork();
    CHECK(s->pid >= 0, "fork");
    if (s->pid == 0)
        vmm(s->shared);
    for (unsigned i = 0; !atomic_load(&s->shared->base); i++) {
        CHECK(i < SECONDS * 1000 && waitpid(s->pid, NULL, WNOHANG) == 0, "the VMM does not start");
        sleep_ms(1);
    }
}

static bool is_answered(struct served *s, unsigned seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    while (sem_timedwait(&s->shared->answered, &until))
        if (errno != EINTR)
            return false;
    return true;
}

static int ask(struct served *s, enum order order) {
    s->shared->order = order;
    sem_post(&s->shared->asked);
    CHECK(is_answered(s, SECONDS), "order %d is not answered in %u s", (int)order, SECONDS);
    return s->shared->error;
}

static void attach(struct served *s, const struct fl_tracker_ops *ops) {
    const struct fl_tracker_list trackers = {.count = 1, .ops = {ops}};
    s->ops = ops;
    s->faults = served_vm_begin(&s->vm, s->pid, &trackers, 2);
}

static void serve(struct served *s, const struct fl_tracker_ops *ops) {
    uint64_t stop_ns;
    attach(s, ops);
    CHECK(ops->create(&s->vm, s->faults, &s->tracker) == 0, "%s", fl_tracker_name(ops->kind));
    int error = -EBUSY;
    /* A zap needs the VMM's main thread, which may get no CPU for a while. */
    for (unsigned i = 0; (error == -EBUSY || error == -ETIMEDOUT) && i < 20; i++) {
        if (i)
            sleep_ms(20);
        (void)fl_zap_settle(&s->vm, s->faults);
        error = ops->arm(s->tracker, &stop_ns);
    }
    CHECK(error == 0, "arm: %s", strerror(-error));
}

static void detach(struct served *s) {
    served_vm_end(&s->vm, s->faults);
    munmap(s->shared, sizeof(*s->shared));
}

static void end(struct served *s) {
    s->ops->destroy(s->tracker);
    detach(s);
}

static int accessed(void *context, uint32_t region, uint64_t first, uint32_t count, uint64_t *bits) {
    struct served *s = context;
    return s->ops->harvest(s->tracker, region, first, count, bits);
}

static int try_evict_all(struct served *s, fl_accessed_fn asked, void *context, uint64_t *evicted) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(&s->vm, asked, context, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, fl_region(&s->vm, 0)->first_page, PAGES, all, &done);
    fl_evictor_destroy(evictor);
    *evicted = done.pages;
    return error;
}

static uint64_t evict_all(struct served *s, fl_accessed_fn asked) {
    uint64_t evicted;
    int error = try_evict_all(s, asked, s, &evicted);
    CHECK(error == 0 || error == -EAGAIN, "evict: %s", strerror(-error));
    return evicted;
}

/* ---- a device writes into it -------------------------------------------------------------------------------- */

/* Chosen when nobody had touched it; then a disk begins to read into it; then it is evicted. Returns pages lost. */
static uint32_t read_into_it(const struct fl_tracker_ops *ops, fl_accessed_fn asked, uint64_t *evicted) {
    struct served s;
    begin_vmm(&s);
    serve(&s, ops);
    int error = ask(&s, BEGIN_READ);
    if (error) {
        printf("skipped: io_uring with fixed buffers: %s\n", strerror(error));
        end(&s);
        exit(SKIP);
    }
    *evicted = evict_all(&s, asked);
    CHECK(ask(&s, END_READ) == 0, "the read: %s", strerror(s.shared->error));
    CHECK(ask(&s, CHECK_ALL) == 0, "check");
    uint32_t wrong = s.shared->wrong;
    end(&s);
    return wrong;
}

static void test_device(const struct fl_tracker_ops *ops) {
    uint64_t evicted;
    uint32_t lost = read_into_it(ops, NULL, &evicted);
    CHECK(lost == 1 && evicted == PAGES, "%u pages lost without asking again, %llu evicted: nothing is shown", lost,
          (unsigned long long)evicted);
    lost = read_into_it(ops, accessed, &evicted);
    CHECK(lost == 0, "%s: %u pages lost", fl_tracker_name(ops->kind), lost);
    CHECK(evicted < PAGES && evicted > PAGES / 2, "%llu evicted", (unsigned long long)evicted);
    printf("%-5s a device writes into a page of %u, %llu others are evicted: 0 lost\n", fl_tracker_name(ops->kind),
           PAGES, (unsigned long long)evicted);
}

/* ---- a device that the tracker would not see ----------------------------------------------------------------- */

static bool allowed(const struct fl_tracker_ops *ops, int pid, char *detail) {
    struct fl_kernel_features kernel;
    fl_probe_tracking(&kernel);
    return ops->probe(&(const struct fl_tracked){.pid = pid}, &kernel, detail, FL_DETAIL_BYTES);
}

static void check_given_up_said(struct said *said, enum fl_tracker_kind before, enum fl_tracker_kind now) {
    char *log = said_text(said), words[2][48];
    snprintf(words[0], sizeof(words[0]), "tracker %s: ", fl_tracker_name(before));
    check_said(log, "\"io_not_seen\"", words[0], "O_DIRECT");
    snprintf(words[0], sizeof(words[0]), "\"tracker\":\"%s\"", fl_tracker_name(now));
    snprintf(words[1], sizeof(words[1]), "\"before\":\"%s\"", fl_tracker_name(before));
    check_said(log, "\"tracker_chosen\"", words[0], words[1]);
    free(log);
    said_close(said);
}

/* Given up before a page goes, and ages stand; whatever takes over does see it. */
static void check_given_up(struct served *s, struct fl_scanner *scanner) {
    uint8_t *ages = s->vm.vault.ages + fl_region(&s->vm, 0)->first_page, before[PAGES];
    struct fl_age_counts counts;
    uint64_t evicted;
    char detail[FL_DETAIL_BYTES];
    struct said said = said_open();
    memcpy(before, ages, PAGES);
    fl_log_setup(FL_LOG_INFO, 0);
    said_begin(&said);
    int error = try_evict_all(s, fl_scanner_harvest, scanner, &evicted);
    bool counts_scan = fl_scanner_scan(scanner, &counts);
    said_end(&said);
    fl_log_setup(FL_LOG_ERROR, 0);
    CHECK(error == -ENODEV && evicted == 0, "%llu pages evicted beside direct I/O: %s", (unsigned long long)evicted,
          strerror(-error));
    CHECK(!counts_scan, "a scan that does not see direct I/O counts");
    CHECK(memcmp(before, ages, PAGES) == 0, "ages moved in a void scan");
    CHECK(scanner->ops != s->ops && scanner->ops->sees_io, "%s goes on", fl_tracker_name(scanner->ops->kind));
    CHECK(!allowed(s->ops, (int)s->pid, detail) && strstr(detail, "O_DIRECT"), "probe: %s", detail);
    printf("%-5s given up for %s: %s\n", fl_tracker_name(s->ops->kind), fl_tracker_name(scanner->ops->kind), detail);
    check_given_up_said(&said, s->ops->kind, scanner->ops->kind);
}

static void test_hidden_io(const struct fl_tracker_ops *ops) {
    struct served s;
    struct fl_scanner scanner;
    struct fl_age_counts counts;
    const struct fl_tracker_list list = {.count = 1, .ops = {ops}};
    char detail[FL_DETAIL_BYTES];
    begin_vmm(&s);
    attach(&s, ops);
    fl_scanner_start(&scanner, &s.vm, s.faults, &list);
    CHECK(scanner.ops == ops, "%s takes its place", fl_tracker_name(scanner.ops->kind));
    for (int i = 0; i < 3; i++)
        CHECK(fl_scanner_scan(&scanner, &counts) == (i > 0), "scan %d", i);
    int error = ask(&s, OPEN_DIRECT);
    if (error) {
        printf("%-5s O_DIRECT not tried: no file of /tmp opens with it: %s\n", fl_tracker_name(ops->kind),
               strerror(error));
    } else {
        check_given_up(&s, &scanner);
        CHECK(ask(&s, CLOSE_DIRECT) == 0 && allowed(ops, (int)s.pid, detail), "probe: %s", detail);
    }
    fl_scanner_stop(&scanner);
    detach(&s);
}

/* ---- a vCPU touches it while it is frozen -------------------------------------------------------------------- */

struct touch {
    struct served *served;
    enum order order;
    uint64_t page;  /* HELD, in the page table */
    unsigned asked; /* how often of its batch */
    bool done;
};

/*
 * The evictor asks while its batch is held still (with RWP, once before as well): until it is answered the batch stays so, and
 * the whole VM in sync mode. The page is touched meanwhile. None was accessed, the answer is.
 */
static int touch_frozen(void *context, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed_bits) {
    struct touch *touch = context;
    struct served *s = touch->served;
    (void)region;
    memset(accessed_bits, 0, (count + 63) / 64 * sizeof(*accessed_bits));
    if (first > touch->page || first + count <= touch->page ||
        ++touch->asked != (s->vm.freeze == FL_FREEZE_RWP ? 2 : 1))
        return 0;
    fl_entry entry = atomic_load(fl_slot(&s->vm, touch->page));
    CHECK(fl_entry_state(entry) == FL_PAGE_FREEZING, "held still, and its entry is %llx", (unsigned long long)entry);
    s->shared->order = touch->order;
    sem_post(&s->shared->asked);
    touch->done = is_answered(s, TOUCH_SECONDS);
    CHECK(touch->done, "%s: the touch of a page that is being evicted waits for the evictor",
          fl_tracker_name(s->ops->kind));
    entry = atomic_load(fl_slot(&s->vm, touch->page));
    CHECK(fl_entry_state(entry) != FL_PAGE_FREEZING, "%s: touched, and still to be evicted",
          fl_tracker_name(s->ops->kind));
    return 0;
}

/* Its eviction is cancelled, and it goes on at once: not when the evictor is done. Returns how pages are held still. */
static enum fl_freeze touch_one(const struct fl_tracker_ops *ops, enum order order) {
    struct served s;
    begin_vmm(&s);
    serve(&s, ops);
    struct touch touch = {.served = &s, .order = order, .page = fl_region(&s.vm, 0)->first_page + HELD};
    enum fl_freeze freeze = s.vm.freeze;
    uint64_t evicted;
    int error = try_evict_all(&s, touch_frozen, &touch, &evicted);
    CHECK(error == 0 && touch.done, "evict: %s, the page was %s", strerror(-error),
          touch.done ? "touched" : "not held");
    CHECK(FL_READ(&s.vm, evictions_cancelled) == 1 && evicted == PAGES - 1, "%llu cancelled, %llu evicted",
          (unsigned long long)FL_READ(&s.vm, evictions_cancelled), (unsigned long long)evicted);
    CHECK(freeze != FL_FREEZE_RWP || FL_READ(&s.vm, sync_windows) > 0, "not in sync mode");
    /* The fault thread lets go of the page only after it has woken who touched it. */
    for (unsigned i = 0; atomic_load(fl_slot(&s.vm, touch.page)) && i < SECONDS * 1000; i++)
        sleep_ms(1);
    CHECK(atomic_load(fl_slot(&s.vm, touch.page)) == 0 && FL_READ(&s.vm, faults) == 0, "it was evicted all the same");
    CHECK(ask(&s, CHECK_ALL) == 0 && s.shared->wrong == 0, "%u pages lost", s.shared->wrong);
    end(&s);
    return freeze;
}

/* Held still by WP, a write; by RWP, a read just as well. */
static void test_touched(const struct fl_tracker_ops *ops) {
    bool reads_too = touch_one(ops, WRITE_BYTE) == FL_FREEZE_RWP && touch_one(ops, READ_BYTE) == FL_FREEZE_RWP;
    printf("%-5s a page is %s while it is held still: cancelled, and that ends before the evictor goes on\n",
           fl_tracker_name(ops->kind), reads_too ? "written, and one read," : "written");
}

/* ---- a huge page that cannot be split ----------------------------------------------------------------------- */

static bool test_huge(const struct fl_tracker_ops *ops) {
    struct served s;
    begin_vmm(&s);
    if (!host_collapse(s.pid, atomic_load(&s.shared->base), PAGES)) {
        printf("%-5s huge pages not tried: this host does not collapse shared memory\n", fl_tracker_name(ops->kind));
        kill(s.pid, SIGKILL);
        (void)waitpid(s.pid, NULL, 0);
        return false;
    }
    CHECK(ask(&s, HOLD) == 0, "vmsplice: %s", strerror(s.shared->error));
    serve(&s, ops);
    uint64_t held = evict_all(&s, NULL);
    CHECK(ask(&s, CHECK_ALL) == 0 && s.shared->wrong == 0, "%s: %u pages lost", fl_tracker_name(ops->kind),
          s.shared->wrong);
    CHECK(ask(&s, LET_GO) == 0, "splice: %s", strerror(s.shared->error));
    printf("%-5s a huge page with one of its pages held: %llu evicted, 0 lost\n", fl_tracker_name(ops->kind),
           (unsigned long long)held);
    end(&s);
    return true;
}

/* The same for a pager that died between its copies and their holes, when all of it has become a huge page since. */
static void test_huge_recovery(const struct fl_tracker_ops *ops) {
    struct served s;
    uint8_t content[HOST_PAGE] __attribute__((aligned(8)));
    fl_entry away[PAGES];
    uint64_t fixed, kept = 0;
    struct fl_refused why;
    begin_vmm(&s);
    serve(&s, ops);
    CHECK(evict_all(&s, NULL) == PAGES, "not all of it was evicted");
    uint64_t first = fl_region(&s.vm, 0)->first_page;
    for (uint32_t page = 0; page < PAGES; page++) {
        away[page] = atomic_load(fl_slot(&s.vm, first + page));
        fill(content, page, 0);
        CHECK(pwrite(s.vm.memory[0].fd, content, HOST_PAGE, (off_t)page * HOST_PAGE) == (ssize_t)HOST_PAGE, "pwrite");
    }
    CHECK(host_collapse(s.pid, atomic_load(&s.shared->base), PAGES), "it does not become a huge page");
    CHECK(ask(&s, HOLD) == 0, "vmsplice: %s", strerror(s.shared->error));
    for (uint32_t page = 0; page < PAGES; page++)
        if (page != HELD) /* which was touched */
            atomic_store(fl_slot(&s.vm, first + page), fl_entry_with_state(away[page], FL_PAGE_PUNCHING));
    CHECK(fl_recover(&s.vm, &fixed, &why) == 0, "%s", why.detail);
    for (uint32_t page = 0; page < PAGES; page++)
        kept += fl_entry_state(atomic_load(fl_slot(&s.vm, first + page))) == FL_PAGE_RESIDENT;
    CHECK(kept > 0, "the huge page was split, and all went well: nothing is shown");
    CHECK(ask(&s, CHECK_ALL) == 0 && s.shared->wrong == 0, "%s: %u pages lost", fl_tracker_name(ops->kind),
          s.shared->wrong);
    CHECK(ask(&s, LET_GO) == 0, "splice: %s", strerror(s.shared->error));
    printf("%-5s a huge page that a dead pager was about to punch: %llu pages stay, 0 lost\n",
           fl_tracker_name(ops->kind), (unsigned long long)kept);
    end(&s);
}

int main(void) {
    struct fl_kernel_features kernel;
    char detail[FL_DETAIL_BYTES];
    setvbuf(stdout, NULL, _IOLBF, 0);
    need_paging();
    fl_log_setup(FL_LOG_ERROR, 0);
    CHECK(fl_probe_kernel(&kernel) == 0, "probe");
    for (uint32_t i = 0; i < FL_TRACKERS; i++) {
        const struct fl_tracker_ops *ops = fl_trackers[i];
        if (!ops->probe(&(const struct fl_tracked){0}, &kernel, detail, sizeof(detail))) {
            printf("%-5s not tried: %s\n", fl_tracker_name(ops->kind), detail);
            continue;
        }
        if (test_huge(ops))
            test_huge_recovery(ops);
        test_touched(ops);
        if (ops->sees_io) {
            test_device(ops);
            continue;
        }
        printf("%-5s a device that writes into a page is not tried: it does not see it\n", fl_tracker_name(ops->kind));
        test_hidden_io(ops);
    }
    return 0;
}
