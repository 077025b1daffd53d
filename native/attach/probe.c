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
#include "base/kernel.h"
#include "frostline.h"
#include "swap/uffd.h"
#include "track/page_idle.h"
#include "track/trial.h"

#define FEATURE_MOVE (1u << 16) /* newer than the oldest headers we build with */
#define FEATURE_EVENTS \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

/* With no feature asked for, the kernel says all it has. */
static void read_features(struct fl_kernel_features *out) {
    struct uffdio_api api = {.api = UFFD_API};
    int by_device = -1, by_call = -1;
    out->userfaultfd_device = fl_uffd_open_device(0, &by_device) == 0;
    out->userfaultfd_syscall = fl_uffd_open_call(0, &by_call) == 0;
    if (ioctl(by_device >= 0 ? by_device : by_call, UFFDIO_API, &api) == 0) {
        uint64_t features = api.features;
        out->raw_features = features;
        out->missing_shmem = (features & UFFD_FEATURE_MISSING_SHMEM) != 0;
        out->minor_shmem = (features & UFFD_FEATURE_MINOR_SHMEM) != 0;
        out->poison = (features & UFFD_FEATURE_POISON) != 0;
        out->move = (features & FEATURE_MOVE) != 0;
        out->events = (features & FEATURE_EVENTS) == FEATURE_EVENTS;
    }
    if (by_device >= 0) {
        close(by_device);
    }
    if (by_call >= 0) {
        close(by_call);
    }
}

/*
 * DAMON says what it can do only to those who set up a context, which would take it from whoever uses it; so look
 * for its code instead.
 */
static bool has_damon_vaddr(char *lacks, size_t bytes) {
    char line[512];
    bool found = false;
    if (access("/sys/kernel/mm/damon/admin/kdamonds", F_OK)) {
        snprintf(lacks, bytes, "no DAMON in /sys/kernel/mm: CONFIG_DAMON_SYSFS and CONFIG_DAMON_VADDR, and root");
        return false;
    }
    FILE *file = fopen("/proc/kallsyms", "re");
    if (!file) {
        snprintf(lacks, bytes, "whether DAMON has virtual addresses cannot be seen: /proc/kallsyms: %s",
                 strerror(errno));
        return false;
    }
    while (!found && fgets(line, sizeof(line), file)) {
        found = strstr(line, " damon_va_") != NULL;
    }
    fclose(file);
    if (!found) {
        snprintf(lacks, bytes, "this kernel's DAMON is without virtual addresses: CONFIG_DAMON_VADDR");
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

void fl_probe_userfaultfd(struct fl_kernel_features *out) {
    *out = (struct fl_kernel_features){0};
    read_features(out);
    uint64_t offered = out->raw_features;
    out->pagemap_scan = fl_trial_pagemap_scan(out->pagemap_scan_lacks, sizeof(out->pagemap_scan_lacks));
    out->wp_shmem = fl_trial_wp(offered, out->wp_lacks, sizeof(out->wp_lacks));
    out->rwp = fl_trial_rwp(offered, out->rwp_lacks, sizeof(out->rwp_lacks));
}

void fl_probe_tracking(struct fl_kernel_features *out) {
    fl_probe_userfaultfd(out);
    out->idle_page_tracking = fl_page_idle_try(out->idle_lacks, sizeof(out->idle_lacks));
    out->damon_vaddr = has_damon_vaddr(out->damon_lacks, sizeof(out->damon_lacks));
}

int fl_probe_kernel(struct fl_kernel_features *out) {
    fl_probe_tracking(out);
    out->ptrace_seccomp_filter = has_ptrace_seccomp_filter();
    return 0;
}
