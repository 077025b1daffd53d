/* SPDX-License-Identifier: Apache-2.0 */
/* fl_probe_kernel(): what this host's kernel can do, found out by trying. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach/probe.h"
#include "attach/seccomp.h"
#include "attach/tracee.h"
#include "frostline.h"

/* Newer than the oldest headers we build with. */
#define FEATURE_POISON (1u << 14)
#define FEATURE_MOVE (1u << 16)
#define FEATURE_RWP (1u << 17)
#define FEATURE_EVENTS \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

struct pagemap_scan {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};
#define PAGEMAP_SCAN_REQUEST _IOWR('f', 16, struct pagemap_scan)
#define PAGE_IS_PRESENT_BIT (1u << 3)

static int userfaultfd_by_device(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        return -1;
    }
    int fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    close(device);
    return fd;
}

/* With no feature asked for, the kernel says all it has. */
static void probe_userfaultfd(struct fl_kernel_features *out) {
    struct uffdio_api api = {.api = UFFD_API};
    int by_device = userfaultfd_by_device();
    int by_call = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    out->userfaultfd_device = by_device >= 0;
    out->userfaultfd_syscall = by_call >= 0;
    if (ioctl(by_device >= 0 ? by_device : by_call, UFFDIO_API, &api) == 0) {
        uint64_t features = api.features;
        out->raw_features = features;
        out->missing_shmem = (features & UFFD_FEATURE_MISSING_SHMEM) != 0;
        out->minor_shmem = (features & UFFD_FEATURE_MINOR_SHMEM) != 0;
        out->wp_shmem = (features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM) != 0;
        out->poison = (features & FEATURE_POISON) != 0;
        out->move = (features & FEATURE_MOVE) != 0;
        out->rwp = (features & FEATURE_RWP) != 0;
        out->events = (features & FEATURE_EVENTS) == FEATURE_EVENTS;
    }
    if (by_device >= 0) {
        close(by_device);
    }
    if (by_call >= 0) {
        close(by_call);
    }
}

static bool has_pagemap_scan(void) {
    char here = 0;
    uint64_t page = (uint64_t)(uintptr_t)&here & ~(uint64_t)(FL_PAGE_SIZE - 1);
    struct pagemap_scan request = {.size = sizeof(request),
                                   .start = page,
                                   .end = page + FL_PAGE_SIZE,
                                   .category_mask = PAGE_IS_PRESENT_BIT,
                                   .return_mask = PAGE_IS_PRESENT_BIT};
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return false;
    }
    int result = ioctl(fd, PAGEMAP_SCAN_REQUEST, &request);
    close(fd);
    return result >= 0;
}

/*
 * DAMON says what it can do only to those who set up a context, which would take it from whoever uses it; so look
 * for its code instead.
 */
static bool has_damon_vaddr(void) {
    char line[512];
    bool found = false;
    if (access("/sys/kernel/mm/damon/admin/kdamonds", F_OK)) {
        return false;
    }
    FILE *file = fopen("/proc/kallsyms", "re");
    while (file && !found && fgets(line, sizeof(line), file)) {
        found = strstr(line, " damon_va_") != NULL;
    }
    if (file) {
        fclose(file);
    }
    return found;
}

/* In a process of its own that shares nothing but the code: only system calls. */
static _Noreturn void wait_with_filter(void) {
    struct sock_filter allow = {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW};
    struct sock_fprog program = {.len = 1, .filter = &allow};
    struct timespec limit = {.tv_sec = 5};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0) {
        syscall(SYS_nanosleep, &limit, NULL);
    }
    syscall(SYS_exit_group, 0);
    __builtin_unreachable();
}

static bool reads_filters_of(int pid) {
    /* It may not have installed its filter yet: look a few times. */
    for (int attempt = 0; attempt < 100; attempt++) {
        long length = -1;
        if (fl_tracee_stop(pid, 100000000u) == 0) {
            length = ptrace(PTRACE_SECCOMP_GET_FILTER, pid, NULL, NULL);
            int error = errno;
            fl_tracee_resume(pid);
            if (length < 0 && error != EINVAL && error != ENOENT) {
                return false;
            }
        }
        if (length == 1) {
            return true;
        }
        fl_pause_ns(1000000);
    }
    return false;
}

static bool has_ptrace_seccomp_filter(void) {
    /* Without an exit signal, nobody who waits for children in general hears of it. */
    int pid = (int)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
    if (pid == 0) {
        wait_with_filter();
    }
    if (pid < 0) {
        return false;
    }
    bool works = fl_tracee_seize(pid) == 0 && reads_filters_of(pid);
    kill(pid, SIGKILL);
    int status = 0;
    while (waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status)) {
    }
    return works;
}

void fl_probe_tracking(struct fl_kernel_features *out) {
    *out = (struct fl_kernel_features){0};
    probe_userfaultfd(out);
    out->pagemap_scan = has_pagemap_scan();
    out->idle_page_tracking = access("/sys/kernel/mm/page_idle/bitmap", R_OK | W_OK) == 0;
    out->damon_vaddr = has_damon_vaddr();
}

int fl_probe_kernel(struct fl_kernel_features *out) {
    fl_probe_tracking(out);
    out->ptrace_seccomp_filter = has_ptrace_seccomp_filter();
    return 0;
}
