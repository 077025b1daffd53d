/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "content.h"
#include "measure.h"
#include "tests/kvm_vmm.h"

#define PAGE ((uint64_t)BENCH_PAGE_BYTES)
#define LINES_OF_PAGE 64u /* touches of different pages fall into different cache sets */
#define TOLD_EVERY 4096u
#define WAIT_SECONDS 600

struct shared { /* between a plain VMM and us */
    _Atomic(uint32_t) ready;
    _Atomic(uint32_t) roam;
    _Atomic(uint64_t) touched, cpu_ns;
    uint64_t base, count, took_ns;
    int fd, cpu;
    sem_t asked, answered;
};

struct guest {
    bool kvm;
    pid_t pid;
    uint32_t pages, count;
    uint32_t *order; /* shared with the plain VMM: a permutation, the first `count` of it are touched */
    uint8_t *chosen;
    struct shared *shared;
    struct kvm_vmm vmm;
    struct kvm_touch *script;
    uint64_t touched; /* by a KVM guest's passes */
    uint64_t passes_before, roamed;
    uint32_t mappers;
    pid_t mapper[GUEST_MAPPERS_MAX];
};

static _Noreturn void fail(const char *what) {
    fprintf(stderr, "bench_trackers: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *shared_memory(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    return memory;
}

/* ---- the plain VMM ------------------------------------------------------------------------------------------- */

static void tell(struct shared *s, uint64_t touched) {
    atomic_store_explicit(&s->cpu_ns, fl_clock_read(CLOCK_THREAD_CPUTIME_ID), memory_order_relaxed);
    atomic_fetch_add_explicit(&s->touched, touched, memory_order_relaxed);
}

static void touch_all(const struct guest *guest, uint64_t count) {
    uint8_t *memory = (uint8_t *)(uintptr_t)guest->shared->base;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = guest->order[i];
        volatile uint64_t *word = (volatile uint64_t *)(memory + page * PAGE + page % LINES_OF_PAGE * 64);
        if (page & 1)
            *word = page;
        else
            (void)*word;
        if ((i + 1) % TOLD_EVERY == 0)
            tell(guest->shared, TOLD_EVERY);
    }
    tell(guest->shared, count % TOLD_EVERY);
}

static void *work(void *argument) {
    const struct guest *guest = argument;
    struct shared *s = guest->shared;
    if (measure_pin(s->cpu))
        _exit(90);
    for (;;) {
        while (sem_wait(&s->asked))
            ;
        uint64_t start_ns = fl_clock_read(CLOCK_MONOTONIC);
        do
            touch_all(guest, s->count);
        while (atomic_load_explicit(&s->roam, memory_order_relaxed));
        s->took_ns = fl_clock_read(CLOCK_MONOTONIC) - start_ns;
        sem_post(&s->answered);
    }
    return NULL;
}

static _Noreturn void plain_vmm(const struct guest *guest) {
    struct shared *s = guest->shared;
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    s->fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC); /* as QEMU names it */
    if (s->fd < 0 || ftruncate(s->fd, (off_t)(guest->pages * PAGE)))
        fail("memfd_create");
    uint8_t *memory = mmap(NULL, guest->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (memory == MAP_FAILED)
        fail("mmap of guest memory");
    for (uint64_t page = 0; page < guest->pages; page++)
        memset(memory + page * PAGE, (int)(page % 251) + 1, 256);
    s->base = (uint64_t)(uintptr_t)memory;
    if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)guest))
        fail("pthread_create");
    atomic_store(&s->ready, 1);
    for (;;)
        poll(NULL, 0, 1000);
}

static void start_plain(struct guest *guest, int cpu) {
    struct shared *s = guest->shared = shared_memory(sizeof(*s));
    s->cpu = cpu;
    if (sem_init(&s->asked, 1, 0) || sem_init(&s->answered, 1, 0))
        fail("sem_init");
    fflush(NULL);
    guest->pid = fork();
    if (guest->pid < 0)
        fail("fork");
    if (guest->pid == 0)
        plain_vmm(guest);
    for (uint32_t i = 0; !atomic_load(&s->ready); i++) {
        if (i > WAIT_SECONDS * 1000 || waitpid(guest->pid, NULL, WNOHANG) != 0) {
            fprintf(stderr, "bench_trackers: the guest of %u pages did not start\n", guest->pages);
            exit(1);
        }
        fl_sleep_ns(FL_NS_PER_MS);
    }
}

static void await_answer(const struct guest *guest) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_SECONDS;
    while (sem_timedwait(&guest->shared->answered, &until))
        if (errno != EINTR)
            fail("the guest does not answer");
}

/* ---- either one ---------------------------------------------------------------------------------------------- */

struct guest *guest_start(bool kvm, uint32_t pages, int cpu) {
    struct guest *guest = calloc(1, sizeof(*guest));
    if (!guest)
        fail("memory");
    guest->kvm = kvm;
    guest->pages = pages;
    guest->order = shared_memory(pages * sizeof(*guest->order));
    guest->chosen = calloc(pages, 1);
    guest->script = kvm ? calloc(pages, sizeof(*guest->script)) : NULL;
    if (!guest->chosen || (kvm && !guest->script))
        fail("memory");
    if (!kvm) {
        start_plain(guest, cpu);
    } else {
        guest->vmm = kvm_vmm_start(&(struct kvm_guest_config){.bytes = pages * PAGE, .vcpus = 1});
        guest->pid = guest->vmm.pid;
        guest_choose(guest, 0, pages);
        (void)guest_pass(guest);
    }
    return guest;
}

void guest_end(struct guest *guest) {
    for (uint32_t i = 0; i < guest->mappers; i++) {
        kill(guest->mapper[i], SIGKILL);
        waitpid(guest->mapper[i], NULL, 0);
    }
    if (guest->kvm) {
        kvm_vmm_end(&guest->vmm);
    } else {
        kill(guest->pid, SIGKILL);
        waitpid(guest->pid, NULL, 0);
        munmap(guest->shared, sizeof(*guest->shared));
    }
    munmap(guest->order, guest->pages * sizeof(*guest->order));
    free(guest->script);
    free(guest->chosen);
    free(guest);
}

pid_t guest_pid(const struct guest *guest) {
    return guest->pid;
}

uint32_t guest_pages(const struct guest *guest) {
    return guest->pages;
}

uint32_t guest_page_at(const struct guest *guest, uint64_t address) {
    uint64_t base = guest->kvm ? (uint64_t)(uintptr_t)kvm_guest_memory(guest->vmm.guest) : guest->shared->base;
    uint64_t page = (address - base) / PAGE;
    return address >= base && page < guest->pages ? (uint32_t)page : UINT32_MAX;
}

void guest_choose(struct guest *guest, uint64_t seed, uint32_t count) {
    bench_permutation(seed, guest->pages, guest->order);
    memset(guest->chosen, 0, guest->pages);
    guest->count = count;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = guest->order[i];
        guest->chosen[page] = 1;
        if (guest->kvm)
            guest->script[i] = (struct kvm_touch){.page = page,
                                                  .word = (uint16_t)(page % LINES_OF_PAGE * 8),
                                                  .kind = page & 1 ? KVM_TOUCH_STORE : KVM_TOUCH_LOAD,
                                                  .times = 1,
                                                  .value = page};
    }
}

bool guest_touches(const struct guest *guest, uint32_t page) {
    return guest->chosen[page];
}

static uint64_t kvm_pass(struct guest *guest) {
    uint64_t took_ns = 0;
    for (uint32_t done = 0; done < guest->count;) {
        uint32_t count = guest->count - done < KVM_SCRIPT_MAX ? guest->count - done : KVM_SCRIPT_MAX;
        uint64_t start_ns = fl_now();
        kvm_vmm_begin(&guest->vmm, 0, guest->script + done, count, 1);
        struct kvm_outcome outcome = kvm_vmm_wait(&guest->vmm, 0, NULL, 0, WAIT_SECONDS);
        took_ns += fl_now() - start_ns;
        if (outcome.error) {
            fprintf(stderr, "bench_trackers: the KVM guest: %s\n", outcome.why);
            exit(1);
        }
        done += count;
    }
    guest->touched += guest->count;
    return took_ns;
}

uint64_t guest_pass(struct guest *guest) {
    if (guest->count == 0)
        return 0;
    if (guest->kvm)
        return kvm_pass(guest);
    guest->shared->count = guest->count;
    sem_post(&guest->shared->asked);
    await_answer(guest);
    return guest->shared->took_ns;
}

void guest_roam(struct guest *guest) {
    if (guest->kvm) {
        guest->roamed = guest->count < KVM_SCRIPT_MAX ? guest->count : KVM_SCRIPT_MAX;
        guest->passes_before = kvm_guest_passes(guest->vmm.guest, 0);
        kvm_vmm_begin(&guest->vmm, 0, guest->script, (uint32_t)guest->roamed, 0);
        return;
    }
    guest->shared->count = guest->count;
    atomic_store(&guest->shared->roam, 1);
    sem_post(&guest->shared->asked);
}

void guest_rest(struct guest *guest) {
    if (guest->kvm) {
        (void)kvm_vmm_stop(&guest->vmm, 0, WAIT_SECONDS);
        guest->touched = guest_touched(guest);
        guest->roamed = 0;
        return;
    }
    atomic_store(&guest->shared->roam, 0);
    await_answer(guest);
}

uint64_t guest_touched(const struct guest *guest) {
    if (!guest->kvm)
        return atomic_load(&guest->shared->touched);
    return guest->touched + (kvm_guest_passes(guest->vmm.guest, 0) - guest->passes_before) * guest->roamed;
}

uint64_t guest_cpu_ns(const struct guest *guest) {
    return guest->kvm ? 0 : atomic_load(&guest->shared->cpu_ns);
}

static _Noreturn void map_and_wait(const struct guest *guest, sem_t *done) {
    char path[64];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)guest->pid, guest->shared->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    volatile uint8_t *memory = mmap(NULL, guest->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        fail("mmap of guest memory");
    for (uint64_t page = 0; page < guest->pages; page++)
        (void)memory[page * PAGE];
    sem_post(done);
    for (;;)
        pause();
}

void guest_map_elsewhere(struct guest *guest, uint32_t processes) {
    if (guest->kvm || processes > GUEST_MAPPERS_MAX) {
        fprintf(stderr, "bench_trackers: at most %u mappers, of a plain guest\n", GUEST_MAPPERS_MAX);
        exit(2);
    }
    sem_t *done = shared_memory(sizeof(*done));
    if (sem_init(done, 1, 0))
        fail("sem_init");
    fflush(NULL);
    for (uint32_t i = 0; i < processes; i++) {
        pid_t pid = fork();
        if (pid < 0)
            fail("fork");
        if (pid == 0)
            map_and_wait(guest, done);
        guest->mapper[guest->mappers++] = pid;
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += WAIT_SECONDS;
        if (sem_timedwait(done, &until))
            fail("a mapper of guest memory does not answer");
    }
    munmap(done, sizeof(*done));
}

void guest_heat(struct guest *guest, uint64_t bytes) {
    if (guest->kvm)
        kvm_vmm_heat(&guest->vmm, bytes, bytes, WAIT_SECONDS);
}
