/* SPDX-License-Identifier: Apache-2.0 */
#include "host_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "victim.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define SYS_CACHESTAT 451 /* newer than our headers: Linux 6.5 */
#define NUMA_NODE_1 "/sys/devices/system/node/node1"
#define BALANCING "/proc/sys/kernel/numa_balancing"
#define CPU_LISTS "/proc/sys/vm/percpu_pagelist_high_fraction"
#define CGROUP "/sys/fs/cgroup"
#define CGROUP_OURS CGROUP "/frostline-test"
#define COLLAPSE_TRIES 20u
#define MPOL_MF_MOVE_ALL (1 << 2)
#define PRESENT (UINT64_C(1) << 63)
#define FRAME ((UINT64_C(1) << 55) - 1)

static int write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int error = write(fd, text, strlen(text)) == (ssize_t)strlen(text) ? 0 : -errno;
    close(fd);
    return error;
}

static bool read_text(const char *path, char *text, size_t bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, bytes - 1);
    if (fd >= 0)
        close(fd);
    text[length > 0 ? length : 0] = '\0';
    return length > 0;
}

/* ---- where pages are --------------------------------------------------------------------------------------- */

void host_frames(pid_t pid, uint64_t address, uint32_t pages, uint64_t *frames) {
    char path[64];
    const size_t bytes = pages * sizeof(*frames);
    snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && pread(fd, frames, bytes, (off_t)(address / HOST_PAGE * sizeof(*frames))) == (ssize_t)bytes,
          "%s: %s", path, strerror(errno));
    close(fd);
    for (uint32_t i = 0; i < pages; i++)
        frames[i] = frames[i] & PRESENT ? frames[i] & FRAME : 0;
}

bool host_is_cached(int fd, uint32_t page) {
    struct {
        uint64_t offset, length;
    } range = {(uint64_t)page * HOST_PAGE, HOST_PAGE};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } state = {0};
    CHECK(syscall(SYS_CACHESTAT, fd, &range, &state, 0) == 0, "cachestat: %s", strerror(errno));
    return state.cached > 0;
}

/* ---- migration --------------------------------------------------------------------------------------------- */

#define CHURN_BYTES (UINT64_C(8) << 20)
#define FIELDS 5u
static char cpu_lists[16]; /* as it was */
static struct {
    uint8_t *memory;
    uint64_t mean_frame;
} fields[FIELDS];
static uint64_t field_bytes;

/* Free some pages on each CPU: what its list holds too much goes back to all. */
static void empty_lists(void) {
    cpu_set_t before, one;
    CHECK(sched_getaffinity(0, sizeof(before), &before) == 0, "sched_getaffinity: %s", strerror(errno));
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        if (!CPU_ISSET(cpu, &before) || sched_setaffinity(0, sizeof(one), &one))
            continue;
        uint8_t *some = mmap(NULL, CHURN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(some != MAP_FAILED, "mmap: %s", strerror(errno));
        for (uint64_t at = 0; at < CHURN_BYTES; at += HOST_PAGE)
            some[at] = 1;
        munmap(some, CHURN_BYTES);
    }
    (void)sched_setaffinity(0, sizeof(before), &before);
}

bool host_has_nodes(void) {
    return access(NUMA_NODE_1, F_OK) == 0;
}

static void fill_field(unsigned which) {
    uint8_t *memory = mmap(NULL, field_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint32_t pages = (uint32_t)(field_bytes / HOST_PAGE);
    uint64_t sum = 0, *frames = calloc(pages, sizeof(*frames));
    CHECK(memory != MAP_FAILED && frames, "%llu bytes: %s", (unsigned long long)field_bytes, strerror(errno));
    host_frames(getpid(), (uintptr_t)memory, pages, frames);
    for (uint32_t i = 0; i < pages; i++) {
        CHECK(frames[i], "page %u of %u is not there", i, pages);
        sum += frames[i];
    }
    free(frames);
    fields[which].memory = memory;
    fields[which].mean_frame = sum / pages;
}

/* Every second page. */
static void punch_field(unsigned which) {
    for (uint64_t at = 0; at < field_bytes; at += 2 * HOST_PAGE)
        CHECK(madvise(fields[which].memory + at, HOST_PAGE, MADV_REMOVE) == 0, "madvise: %s", strerror(errno));
}

/*
 * Compaction moves pages up into holes between others, not into ranges that are all free. So there are fields of pages,
 * and holes in the lowest: the allocator takes single free pages before it breaks up larger runs, and whoever comes next
 * gets these. host_migrate() makes the holes above. What one CPU frees it keeps in a list of its own at first, where
 * neither others nor compaction find it: those are kept short.
 */
const char *host_make_holes(uint64_t bytes) {
    unsigned lowest = 0;
    if (host_has_nodes())
        return NULL;
    if (access("/proc/sys/vm/compact_memory", W_OK))
        return "the host has one NUMA node, and the kernel no CONFIG_COMPACTION";
    if (!read_text(CPU_LISTS, cpu_lists, sizeof(cpu_lists)) || write_text(CPU_LISTS, "1000000"))
        return CPU_LISTS " cannot be written";
    field_bytes = 2 * bytes;
    for (unsigned i = 0; i < FIELDS; i++) {
        fill_field(i);
        lowest = fields[i].mean_frame < fields[lowest].mean_frame ? i : lowest;
    }
    punch_field(lowest);
    empty_lists();
    return NULL;
}

void host_drop_holes(void) {
    if (!fields[0].memory)
        return;
    for (unsigned i = 0; i < FIELDS; i++) {
        munmap(fields[i].memory, field_bytes);
        fields[i].memory = NULL;
    }
    empty_lists();
    CHECK(write_text(CPU_LISTS, cpu_lists) == 0, CPU_LISTS);
}

static const char *move_to_node(pid_t pid, uint64_t address, uint32_t pages, int to) {
    void **places = calloc(pages, sizeof(*places));
    int *nodes = calloc(pages, sizeof(*nodes)), *status = calloc(pages, sizeof(*status));
    CHECK(places && nodes && status, "no memory");
    for (uint32_t i = 0; i < pages; i++) {
        places[i] = (void *)(uintptr_t)(address + (uint64_t)i * HOST_PAGE);
        nodes[i] = to;
    }
    long result = syscall(SYS_move_pages, (long)pid, (unsigned long)pages, places, nodes, status, MPOL_MF_MOVE_ALL);
    free(places);
    free(nodes);
    free(status);
    return result < 0 ? "move_pages() does not work" : NULL;
}

const char *host_migrate(pid_t pid, uint64_t address, uint32_t pages, int to) {
    if (host_has_nodes())
        return move_to_node(pid, address, pages, to);
    for (unsigned i = 0; i < FIELDS && fields[i].memory; i++)
        punch_field(i);
    empty_lists();
    return write_text("/proc/sys/vm/compact_memory", "1") ? "/proc/sys/vm/compact_memory cannot be written" : NULL;
}

static struct {
    pthread_t thread;
    pid_t pid;
    uint64_t address;
    uint32_t pages, moves;
    atomic_bool end;
} mover;

static void *move_on(void *unused) {
    (void)unused;
    for (; !atomic_load(&mover.end); mover.moves++) {
        const char *missing = move_to_node(mover.pid, mover.address, mover.pages, mover.moves % 2 == 0);
        CHECK(!missing, "%s", missing);
    }
    return NULL;
}

void host_mover_start(pid_t pid, uint64_t address, uint32_t pages) {
    mover.pid = pid;
    mover.address = address;
    mover.pages = pages;
    mover.moves = 0;
    atomic_store(&mover.end, false);
    CHECK(pthread_create(&mover.thread, NULL, move_on, NULL) == 0, "pthread_create");
}

uint32_t host_mover_stop(void) {
    atomic_store(&mover.end, true);
    CHECK(pthread_join(mover.thread, NULL) == 0, "pthread_join");
    return mover.moves;
}

static char balancing[16]; /* as it was */

static void balance_again(void) {
    (void)write_text(BALANCING, balancing);
}

void host_stop_balancing(void) {
    if (balancing[0] || !read_text(BALANCING, balancing, sizeof(balancing)) || atoi(balancing) == 0)
        return;
    CHECK(write_text(BALANCING, "0") == 0 && atexit(balance_again) == 0, BALANCING);
}

/* ---- swap -------------------------------------------------------------------------------------------------- */

static int zram = -1;

static void zram_file(char *path, size_t bytes, const char *name) {
    snprintf(path, bytes, "/sys/block/zram%d/%s", zram, name);
}

/* The header that mkswap writes: version 1, the last page, no bad pages; and the signature. */
static bool write_swap_header(const char *device, uint64_t bytes) {
    uint8_t header[HOST_PAGE] = {0};
    const uint32_t info[3] = {1, (uint32_t)(bytes / HOST_PAGE - 1), 0};
    memcpy(header + 1024, info, sizeof(info));
    memcpy(header + HOST_PAGE - 10, "SWAPSPACE2", 10);
    int fd = open(device, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, header, sizeof(header)) == sizeof(header) && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    return written;
}

static void drop_zram(void) {
    char path[64], number[16];
    zram_file(path, sizeof(path), "reset");
    (void)write_text(path, "1");
    snprintf(number, sizeof(number), "%d", zram);
    (void)write_text("/sys/class/zram-control/hot_remove", number);
    zram = -1;
}

const char *host_swap_on(uint64_t bytes) {
    char text[32], path[64];
    if (!read_text("/sys/class/zram-control/hot_add", text, sizeof(text)))
        return "no zram to swap to (modprobe zram)";
    zram = atoi(text);
    zram_file(path, sizeof(path), "disksize");
    snprintf(text, sizeof(text), "%llu", (unsigned long long)bytes);
    bool sized = write_text(path, text) == 0;
    snprintf(path, sizeof(path), "/dev/zram%d", zram);
    for (unsigned i = 0; i < 1000 && access(path, F_OK); i++)
        sleep_ms(1);
    if (sized && write_swap_header(path, bytes) && swapon(path, SWAP_FLAG_PREFER | 32767) == 0)
        return NULL;
    drop_zram();
    return "zram cannot be swapped to";
}

void host_swap_off(void) {
    char path[64];
    if (zram < 0)
        return;
    snprintf(path, sizeof(path), "/dev/zram%d", zram);
    CHECK(swapoff(path) == 0, "swapoff: %s", strerror(errno));
    drop_zram();
}

const char *host_cgroup_make(pid_t pid) {
    char number[16];
    if (syscall(SYS_CACHESTAT, -1, NULL, NULL, 0) && errno == ENOSYS)
        return "the kernel has no cachestat() (CONFIG_CACHESTAT_SYSCALL), so what is swapped out cannot be told";
    (void)write_text(CGROUP "/cgroup.subtree_control", "+memory");
    if (mkdir(CGROUP_OURS, 0755) && errno != EEXIST)
        return "cannot make a cgroup in " CGROUP;
    if (access(CGROUP_OURS "/memory.reclaim", W_OK)) {
        rmdir(CGROUP_OURS);
        return "cgroups have no memory.reclaim (it comes with cgroup v2)";
    }
    snprintf(number, sizeof(number), "%d", (int)pid);
    CHECK(write_text(CGROUP_OURS "/cgroup.procs", number) == 0, "cgroup.procs: %s", strerror(errno));
    return NULL;
}

void host_cgroup_reclaim(uint64_t bytes) {
    char text[32];
    snprintf(text, sizeof(text), "%llu", (unsigned long long)bytes);
    (void)write_text(CGROUP_OURS "/memory.reclaim", text); /* EAGAIN: less than that; the caller looks what it was */
}

void host_cgroup_drop(void) {
    rmdir(CGROUP_OURS);
}

/* ---- huge pages -------------------------------------------------------------------------------------------- */

static uint64_t huge_pages_now(void) {
    char text[4096];
    CHECK(read_text("/proc/meminfo", text, sizeof(text)), "/proc/meminfo");
    const char *line = strstr(text, "ShmemHugePages:");
    return line ? strtoull(line + 15, NULL, 10) / (HOST_HUGE_PAGES * HOST_PAGE / 1024) : 0;
}

/*
 * One at a time: where memory is registered with a userfaultfd, each call makes a huge page of the file, and fails
 * because it may not map it as one. So what it says is not asked; what there is tells.
 */
static uint32_t collapse(int pidfd, uint64_t address, uint32_t pages) {
    uint64_t before = huge_pages_now();
    for (uint32_t at = 0; at < pages; at += HOST_HUGE_PAGES) {
        struct iovec range = {.iov_base = (void *)(uintptr_t)(address + (uint64_t)at * HOST_PAGE),
                              .iov_len = HOST_HUGE_PAGES * HOST_PAGE};
        (void)syscall(SYS_process_madvise, pidfd, &range, 1, MADV_COLLAPSE, 0);
    }
    uint64_t now = huge_pages_now();
    return now > before ? (uint32_t)(now - before) : 0;
}

/* Somebody may hold one of the pages for a moment. */
uint32_t host_collapse(pid_t pid, uint64_t address, uint32_t pages) {
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    uint32_t made = 0;
    for (unsigned i = 0; pidfd >= 0 && i < COLLAPSE_TRIES && !made; i++) {
        if (i)
            sleep_ms(50);
        made = collapse(pidfd, address, pages);
    }
    if (pidfd >= 0)
        close(pidfd);
    return made;
}

uint32_t host_split(const char *path, uint32_t first, uint32_t pages) {
    char text[128];
    uint64_t before = huge_pages_now();
    snprintf(text, sizeof(text), "%s,%#x,%#x", path, first, first + pages);
    (void)write_text("/sys/kernel/debug/split_huge_pages", text);
    uint64_t now = huge_pages_now();
    return before > now ? (uint32_t)(before - now) : 0;
}
