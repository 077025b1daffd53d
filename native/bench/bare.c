/* SPDX-License-Identifier: Apache-2.0 */
#include "bare.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "measure.h"

#define SAMPLES 65536u
#define MESSAGES 16u
#define PAGE_BYTES 4096u

struct bare {
    _Atomic(uint32_t) count; /* samples ever taken */
    uint32_t seen;           /* of these, reported; not the server's */
    uint32_t samples[SAMPLES];
};

static void copy_page(int uffd, const uint8_t *memory, const uint8_t *source, uint64_t address) {
    uint64_t offset = (address & ~(uint64_t)(PAGE_BYTES - 1)) - (uint64_t)(uintptr_t)memory;
    struct uffdio_copy copy = {
        .dst = (uint64_t)(uintptr_t)memory + offset,
        .src = (uint64_t)(uintptr_t)(source + offset),
        .len = PAGE_BYTES,
    };
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
        _exit(1);
}

/*
 * The same loop as the pager's fault threads: read what is there, wait only when nothing is. Waiting before each read
 * is slower by a poll, for the next fault is often there by then.
 */
static void serve(struct bare *bare, int uffd, const uint8_t *memory, const uint8_t *source) {
    struct uffd_msg messages[MESSAGES];
    for (;;) {
        ssize_t bytes = read(uffd, messages, sizeof(messages));
        if (bytes < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = uffd, .events = POLLIN};
            (void)poll(&wait, 1, -1);
            continue;
        }
        if (bytes <= 0)
            _exit(0);
        for (size_t i = 0; i < (size_t)bytes / sizeof(messages[0]); i++) {
            uint64_t start = fl_now();
            copy_page(uffd, memory, source, messages[i].arg.pagefault.address);
            uint32_t count = atomic_load_explicit(&bare->count, memory_order_relaxed);
            bare->samples[count % SAMPLES] = (uint32_t)(fl_now() - start);
            atomic_store_explicit(&bare->count, count + 1, memory_order_release);
        }
    }
}

static int open_uffd(uint8_t *memory, uint64_t bytes) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        return -errno;
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {
        .range = {.start = (uint64_t)(uintptr_t)memory, .len = bytes},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range)) {
        int error = -errno;
        close(uffd);
        return error;
    }
    return uffd;
}

int bare_start(uint8_t *memory, uint64_t bytes, int cpu, struct bare **out) {
    struct bare *bare = mmap(NULL, sizeof(*bare), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *source = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bare == MAP_FAILED || source == MAP_FAILED)
        return -ENOMEM;
    /* Huge pages would spare the source TLB misses that a real store has. */
    (void)madvise(source, bytes, MADV_NOHUGEPAGE);
    memcpy(source, memory, bytes);
    int uffd = open_uffd(memory, bytes);
    if (uffd < 0)
        return uffd;
    pid_t child = fork();
    if (child < 0)
        return -errno;
    if (child == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (measure_pin(cpu) || mlockall(MCL_CURRENT))
            _exit(1);
        serve(bare, uffd, memory, source);
    }
    (void)munmap(source, bytes);
    *out = bare;
    return 0;
}

uint32_t bare_median_ns(struct bare *bare) {
    static uint32_t sorted[SAMPLES];
    uint32_t end = atomic_load_explicit(&bare->count, memory_order_acquire);
    uint32_t count = end - bare->seen < SAMPLES ? end - bare->seen : SAMPLES;
    for (uint32_t i = 0; i < count; i++)
        sorted[i] = bare->samples[(end - count + i) % SAMPLES];
    bare->seen = end;
    return measure_median(sorted, count);
}
