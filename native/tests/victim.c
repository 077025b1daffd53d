/* SPDX-License-Identifier: Apache-2.0 */
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "slow.h"

#define PAGE 4096u
#define HUGE (2u << 20)
#define WORDS (PAGE / 8)
#define PLUG_BYTES (4u << 20)
#define END_SECONDS 60u

static __thread sigjmp_buf on_sigbus;
static __thread volatile sig_atomic_t guarded;

uint64_t random_next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t seed_of(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

unsigned rounds(unsigned plain, unsigned slow) {
    return runs_slowly() ? slow : plain;
}

void sleep_ms(unsigned milliseconds) {
    struct timespec pause = {.tv_sec = milliseconds / 1000, .tv_nsec = (long)(milliseconds % 1000) * 1000000};
    while (nanosleep(&pause, &pause) && errno == EINTR)
        ;
}

void need_paging(void) {
    struct fl_kernel_features features;
    if (geteuid() != 0 || fl_probe_kernel(&features) || !features.wp_shmem || !features.pagemap_scan) {
        printf("skipped: needs root, and a kernel with userfaultfd WP on shmem and PAGEMAP_SCAN\n");
        exit(77);
    }
}

/* ---- content ----------------------------------------------------------------------------------------------- */

/* One word of a page: an eighth of the pages zero, an eighth one pattern, a few not compressible, the rest about 3:1. */
static uint64_t word_of(uint64_t seed, uint32_t page, uint32_t generation, uint32_t word) {
    uint64_t state = seed ^ (uint64_t)page << 32 ^ generation;
    uint64_t base = random_next(&state);
    if (generation == 0)
        return 0;
    switch ((page + generation) % 8) {
    case 0:
        return 0;
    case 1:
        return (base & 0xffffffff) | base << 32;
    case 2:
        if (base % 4 == 0) {
            state += word;
            return random_next(&state);
        }
        break;
    }
    state += word / 4;
    return word % 4 ? base + word / 4 : random_next(&state);
}

static void write_page(struct victim_shared *s, uint32_t page, uint32_t generation) {
    uint64_t *words = (uint64_t *)(uintptr_t)(atomic_load(&s->base) + (uint64_t)page * PAGE);
    for (uint32_t i = 0; i < WORDS; i++)
        words[i] = word_of(s->seed, page, generation, i);
    s->generation[page] = generation;
}

static void check_page(struct victim_shared *s, uint32_t page) {
    const volatile uint64_t *words =
        (const volatile uint64_t *)(uintptr_t)(atomic_load(&s->base) + (uint64_t)page * PAGE);
    guarded = 1;
    if (sigsetjmp(on_sigbus, 1)) {
        atomic_fetch_add(&s->sigbus, 1);
        guarded = 0;
        return;
    }
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < WORDS; i++)
        wrong += words[i] != word_of(s->seed, page, s->generation[page], i);
    guarded = 0;
    if (wrong) {
        uint64_t none = 0;
        atomic_fetch_add(&s->errors, 1);
        atomic_compare_exchange_strong(&s->first_error, &none, page + 1);
    }
}

static void lock_page(struct victim_shared *s, uint32_t page) {
    uint32_t free = 0;
    while (!atomic_compare_exchange_strong(&s->lock[page], &free, 1)) {
        free = 0;
        sched_yield();
    }
}

static void unlock_page(struct victim_shared *s, uint32_t page) {
    atomic_store(&s->lock[page], 0);
}

static void handle_sigbus(int number) {
    (void)number;
    if (guarded)
        siglongjmp(on_sigbus, 1);
    _exit(99);
}

static void *toucher(void *argument) {
    struct victim_shared *s = argument;
    uint64_t random = s->seed ^ (uint64_t)(uintptr_t)&random;
    while (!atomic_load_explicit(&s->stop, memory_order_relaxed)) {
        if (atomic_load(&s->hold)) {
            atomic_fetch_add(&s->held, 1);
            while (atomic_load(&s->hold) && !atomic_load(&s->stop))
                sleep_ms(1);
            atomic_fetch_sub(&s->held, 1);
            continue;
        }
        uint64_t choice = random_next(&random);
        uint32_t page = (uint32_t)(choice % (s->hot_pages ? s->hot_pages : s->pages));
        uint32_t free = 0;
        if (!atomic_compare_exchange_strong(&s->lock[page], &free, 1))
            continue;
        uint32_t times = s->stay ? 1 + (uint32_t)(choice >> 48) % s->stay : 1;
        for (uint32_t i = 0; i < times; i++) {
            check_page(s, page);
            if (choice >> 40 >> i % 8 & 1) {
                write_page(s, page, s->generation[page] + 1);
                atomic_fetch_add(&s->writes, 1);
            }
            atomic_fetch_add(&s->touches, 1);
        }
        unlock_page(s, page);
        if (s->pause_us)
            usleep(s->pause_us);
    }
    return NULL;
}

/* ---- the victim's main thread ------------------------------------------------------------------------------ */

static void remove_pages(struct victim_shared *s, int fd, uint32_t first, uint32_t count) {
    uint64_t offset = (uint64_t)first * PAGE, length = (uint64_t)count * PAGE;
    for (uint32_t i = 0; i < count; i++)
        lock_page(s, first + i);
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) ||
        madvise((void *)(uintptr_t)(atomic_load(&s->base) + offset), length, MADV_DONTNEED))
        _exit(98);
    for (uint32_t i = 0; i < count; i++) {
        s->generation[first + i] = 0;
        unlock_page(s, first + i);
    }
}

static void move(struct victim_shared *s) {
    size_t bytes = (size_t)s->pages * PAGE;
    void *place = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *moved = mremap((void *)(uintptr_t)atomic_load(&s->base), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    if (moved == MAP_FAILED)
        _exit(97);
    atomic_store(&s->base, (uint64_t)(uintptr_t)moved);
}

static void verify(struct victim_shared *s) {
    for (uint32_t page = 0; page < s->pages; page++) {
        lock_page(s, page);
        check_page(s, page);
        unlock_page(s, page);
    }
}

static void fork_and_check(struct victim_shared *s) {
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        verify(s);
        _exit(0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        atomic_fetch_add(&s->errors, 1);
}

static struct {
    int fd;
    uint8_t *memory;
} plugged;

/* Where it was before, if it was. */
static void map_plugged(void) {
    plugged.memory = mmap(plugged.memory, PLUG_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, plugged.fd, 0);
    if (plugged.memory == MAP_FAILED)
        _exit(96);
}

static void plug_in(void) {
    plugged.fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (plugged.fd < 0 || ftruncate(plugged.fd, PLUG_BYTES))
        _exit(96);
    map_plugged();
    memset(plugged.memory, 0x5a, PLUG_BYTES);
}

static void check_plugged(void) {
    for (size_t i = 0; i < PLUG_BYTES; i += 511)
        if (((volatile uint8_t *)plugged.memory)[i] != 0x5a)
            _exit(95);
}

static void plug_out(void) {
    check_plugged();
    munmap(plugged.memory, PLUG_BYTES);
    close(plugged.fd);
}

static void replug(void) {
    munmap(plugged.memory, PLUG_BYTES);
    map_plugged();
    check_plugged();
}

static void obey(struct victim_shared *s, int fd) {
    switch ((enum victim_order)atomic_load(&s->order)) {
    case VICTIM_REMOVE:
        remove_pages(s, fd, s->first, s->count);
        break;
    case VICTIM_MOVE:
        move(s);
        break;
    case VICTIM_FORK:
        fork_and_check(s);
        break;
    case VICTIM_PLUG:
        plug_in();
        break;
    case VICTIM_UNMAP:
        plug_out();
        break;
    case VICTIM_UNPLUG:
        munmap(plugged.memory + (size_t)s->first * PAGE, (size_t)s->count * PAGE);
        break;
    case VICTIM_REPLUG:
        replug();
        break;
    case VICTIM_TOUCH:
        for (uint32_t page = s->first; page < s->first + s->count; page++)
            check_page(s, page);
        break;
    case VICTIM_VERIFY:
        verify(s);
        break;
    case VICTIM_END:
    case VICTIM_NOTHING:
        break;
    }
    atomic_store(&s->order, VICTIM_NOTHING);
}

/*
 * The ordering thread: what the orders do may wait for a page or for an event to be read, and a VMM's main thread,
 * which the pager stops now and then, does not do such things for long.
 */
static void *take_orders(void *argument) {
    struct victim_shared *s = ((void **)argument)[0];
    int fd = *(int *)((void **)argument)[1];
    while (!atomic_load(&s->stop)) {
        if (atomic_load(&s->order))
            obey(s, fd);
        sleep_ms(1);
    }
    return NULL;
}

static void victim_main(struct victim_shared *s) {
    pthread_t threads[VICTIM_THREADS_MAX + 1];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGBUS, handle_sigbus);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    size_t bytes = (size_t)s->pages * PAGE;
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        _exit(94);
    char *place = mmap(NULL, bytes + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED)
        _exit(94);
    char *aligned = place + (HUGE - (uintptr_t)place % HUGE) % HUGE;
    void *memory = mmap(aligned, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (memory == MAP_FAILED)
        _exit(94);
    atomic_store(&s->base, (uint64_t)(uintptr_t)memory);
    for (uint32_t page = 0; page < s->pages; page++)
        write_page(s, page, 1);
    void *arguments[2] = {s, &fd};
    pthread_create(&threads[VICTIM_THREADS_MAX], NULL, take_orders, arguments);
    for (uint32_t i = 0; i < s->threads; i++)
        pthread_create(&threads[i], NULL, toucher, s);
    atomic_store(&s->ready, 1);
    while (!atomic_load(&s->stop)) {
        if (atomic_load(&s->churn))
            remove_pages(s, fd, 0, 1);
        poll(NULL, 0, atomic_load(&s->churn) ? 0 : 20);
    }
    for (uint32_t i = 0; i < s->threads; i++)
        pthread_join(threads[i], NULL);
    pthread_join(threads[VICTIM_THREADS_MAX], NULL);
    _exit(0);
}

/* ---- from the test ----------------------------------------------------------------------------------------- */

struct victim victim_start(uint32_t pages, uint32_t threads, uint64_t seed) {
    struct victim victim;
    CHECK(pages <= VICTIM_PAGES_MAX && threads <= VICTIM_THREADS_MAX, "%u pages, %u threads", pages, threads);
    victim.shared = mmap(NULL, sizeof(*victim.shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(victim.shared != MAP_FAILED, "mmap: %s", strerror(errno));
    victim.shared->seed = seed;
    victim.shared->pages = pages;
    victim.shared->threads = threads;
    victim.shared->pause_us = 50;
    victim.pid = fork();
    CHECK(victim.pid >= 0, "fork: %s", strerror(errno));
    if (victim.pid == 0)
        victim_main(victim.shared);
    for (int i = 0; i < 3000 && !atomic_load(&victim.shared->ready); i++)
        sleep_ms(10);
    CHECK(atomic_load(&victim.shared->ready), "the victim did not fill its memory in 30 s");
    return victim;
}

static void check_alive(struct victim *victim) {
    int status;
    pid_t ended = waitpid(victim->pid, &status, WNOHANG);
    CHECK(ended == 0, "the victim ended, status %#x", status);
}

void victim_ask(struct victim *victim, enum victim_order order, uint32_t first, uint32_t count) {
    victim->shared->first = first;
    victim->shared->count = count;
    atomic_store(&victim->shared->order, order);
}

void victim_wait(struct victim *victim, unsigned seconds) {
    struct victim_shared *s = victim->shared;
    for (unsigned i = 0; i < seconds * 1000 && atomic_load(&s->order); i++) {
        sleep_ms(1);
        if (i % 100 == 0)
            check_alive(victim);
    }
    CHECK(!atomic_load(&s->order), "order %d was not done in %u s", (int)atomic_load(&s->order), seconds);
}

void victim_order(struct victim *victim, enum victim_order order, uint32_t first, uint32_t count, unsigned seconds) {
    victim_ask(victim, order, first, count);
    victim_wait(victim, seconds);
}

void victim_hold(struct victim *victim, bool hold) {
    struct victim_shared *s = victim->shared;
    atomic_store(&s->hold, hold);
    for (unsigned i = 0; i < 20000 && hold && atomic_load(&s->held) != s->threads; i++)
        sleep_ms(1);
    CHECK(!hold || atomic_load(&s->held) == s->threads, "threads did not pause in 20 s: %u of %u",
          atomic_load(&s->held), s->threads);
}

uint64_t victim_verify(struct victim *victim, unsigned seconds) {
    victim_hold(victim, true);
    victim_order(victim, VICTIM_VERIFY, 0, 0, seconds);
    victim_hold(victim, false);
    return atomic_load(&victim->shared->errors);
}

void victim_end(struct victim *victim) {
    int status;
    atomic_store(&victim->shared->stop, 1);
    for (unsigned i = 0; i < END_SECONDS * 1000; i++) {
        if (waitpid(victim->pid, &status, WNOHANG) == victim->pid) {
            CHECK(status == 0, "the victim ended with status %#x", status);
            return;
        }
        sleep_ms(1);
    }
    kill(victim->pid, SIGKILL);
    CHECK(false, "the victim did not end in %u s", END_SECONDS);
}

pid_t pager_start(const struct victim *victim, const char *socket_path, const char *const *more) {
    const char *program = getenv("FROSTLINE_PAGER");
    char pid_text[16];
    const char *arguments[24] = {program, "--pid",           pid_text, "--socket", socket_path, "--scan-interval-ms",
                                 "100",   "--longest-io-ms", "0"}; /* no device writes into these pages */
    if (!program) {
        printf("skipped: FROSTLINE_PAGER does not name the pager program\n");
        kill(victim->pid, SIGKILL);
        exit(77);
    }
    snprintf(pid_text, sizeof(pid_text), "%d", (int)victim->pid);
    for (unsigned i = 9; more && *more && i < 23; i++)
        arguments[i] = *more++;
    pid_t pager = fork();
    if (pager == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv(program, (char *const *)arguments);
        _exit(127);
    }
    CHECK(pager > 0, "fork: %s", strerror(errno));
    return pager;
}

struct fl_pager *pager_connect(const char *socket_path, unsigned seconds) {
    struct fl_pager *pager;
    int error = 0;
    for (unsigned i = 0; i < seconds * 200; i++) {
        error = fl_pager_connect(socket_path, &pager);
        if (!error)
            return pager;
        sleep_ms(5);
    }
    CHECK(false, "no pager at %s in %u s: %s", socket_path, seconds, strerror(-error));
    return NULL;
}

struct fl_reply pager_tell(struct fl_pager *pager, struct fl_command command) {
    struct fl_reply reply;
    command.abi = FL_ABI;
    int error = fl_pager_call(pager, &command, &reply, 10000);
    CHECK(error == 0, "command %u: %s", command.kind, strerror(-error));
    return reply;
}

struct fl_reply pager_budget(struct fl_pager *pager, uint64_t bytes, uint64_t lease_seconds) {
    return pager_tell(pager, (struct fl_command){.kind = FL_COMMAND_BUDGET,
                                                 .budget_bytes = bytes,
                                                 .lease_ns = lease_seconds * 1000000000u,
                                                 .generation = 1,
                                                 .min_age_ns = 1});
}

int pager_wait(pid_t pager, unsigned seconds) {
    int status = 0;
    for (unsigned i = 0; i < seconds * 200; i++) {
        if (waitpid(pager, &status, WNOHANG) == pager) {
            CHECK(WIFEXITED(status), "the pager ended with status %#x", status);
            return WEXITSTATUS(status);
        }
        sleep_ms(5);
    }
    kill(pager, SIGKILL);
    CHECK(false, "the pager did not end in %u s", seconds);
    return -1;
}

void pager_kill(pid_t pager) {
    int status;
    kill(pager, SIGKILL);
    CHECK(waitpid(pager, &status, 0) == pager, "waitpid: %s", strerror(errno));
    CHECK(WIFSIGNALED(status), "the pager had ended before it was killed, status %#x", status);
}

struct fl_status status_of(const struct victim *victim) {
    struct fl_status status = {0};
    struct fl_view *view;
    int error = fl_view_open((int)victim->pid, &view);
    CHECK(error == 0, "no vault to look into: %s", strerror(-error));
    error = fl_view_status(view, &status);
    CHECK(error == 0, "no status: %s", strerror(-error));
    fl_view_close(view);
    return status;
}

void wait_until(const struct victim *victim, bool (*condition)(const struct fl_status *), unsigned seconds,
                const char *what) {
    struct fl_status status;
    for (unsigned i = 0; i < seconds * 100; i++) {
        status = status_of(victim);
        if (condition(&status))
            return;
        sleep_ms(10);
    }
    CHECK(false, "not seen in %u s: %s (state %s, why %s, away %llu, faults %llu)", seconds, what,
          fl_state_name(status.state), fl_why_name(status.why), (unsigned long long)status.evicted_pages,
          (unsigned long long)status.faults);
}
