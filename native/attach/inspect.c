/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/inspect.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "attach/attach.h"
#include "attach/hugepages.h"
#include "attach/proc.h"
#include "attach/regions.h"

#define URING_LINK "anon_inode:[io_uring]"

struct fd_findings {
    int pid;
    bool vault;
    bool uffd;
    uint64_t uring_kib;   /* pinned by it */
    char passthrough[64]; /* the link that says so, or "" */
};

static int look_at_fd(int fd, const char *link, void *context) {
    struct fd_findings *found = context;
    uint64_t kib = 0;
    if (strcmp(link, FL_VAULT_LINK) == 0) {
        found->vault = true;
    } else if (strcmp(link, FL_UFFD_LINK) == 0) {
        found->uffd = true;
    } else if (strncmp(link, "/dev/vfio/", 10) == 0 || strncmp(link, "anon_inode:[vfio", 16) == 0 ||
               strncmp(link, "anon_inode:kvm-vfio", 19) == 0 || strncmp(link, "anon_inode:[kvm-vfio", 20) == 0) {
        snprintf(found->passthrough, sizeof(found->passthrough), "%.60s", link);
    } else if (strcmp(link, URING_LINK) == 0) {
        int error = fl_proc_uring_pinned_kib(found->pid, fd, &kib);
        found->uring_kib += kib;
        return error;
    }
    return 0;
}

static int refuse_pinned(int pid, uint64_t kib, struct fl_refused *why) {
    return fl_refuse(why, FL_REFUSAL_PASSTHROUGH,
                     "pid %d has %llu KiB of pinned memory (a passed-through device, RDMA or registered io_uring "
                     "buffers)",
                     pid, (unsigned long long)kib);
}

static int check_process(int pid, const struct fl_proc_status *status, struct fl_refused *why) {
    if (status->state == 'Z' || status->state == 'X') {
        return -ESRCH;
    }
    int native = fl_proc_is_native(pid);
    if (native < 0) {
        return native;
    }
    if (!native) {
        return fl_refuse(why, FL_REFUSAL_KERNEL, "pid %d is not a 64-bit x86_64 program, the only kind known so far",
                         pid);
    }
    if (status->shadow_stack) {
        return fl_refuse(why, FL_REFUSAL_KERNEL, "pid %d runs with a shadow stack, which is not supported yet", pid);
    }
    if (status->pinned_kib) {
        return refuse_pinned(pid, status->pinned_kib, why);
    }
    return 0;
}

/* A pager traces the VMM for a moment now and then, by a thread or a child of its own. */
static int check_tracer(int pid, int tracer_pid, const int *skip, int skip_count, struct fl_refused *why) {
    struct fl_proc_status tracer = {.comm = "?"};
    if (tracer_pid == 0 || fl_proc_status(tracer_pid, &tracer) == -ESRCH) {
        return 0;
    }
    for (int i = 0; i < skip_count; i++) {
        if (skip[i] && (tracer.group_pid == skip[i] || tracer.parent_pid == skip[i])) {
            return 0;
        }
    }
    return fl_refuse(why, FL_REFUSAL_TRACED, "pid %d is being traced by pid %d (%s); end that first", pid, tracer_pid,
                     tracer.comm);
}

static int check_vault(int pid, int ignore_pid, struct fl_inspection *out, struct fl_refused *why) {
    int holder = 0;
    int error = fl_vault_holder(pid, &holder);
    if (error || holder == 0) {
        return error;
    }
    out->served_by_pid = holder > 0 ? (uint32_t)holder : 0;
    if (holder > 0 && (holder == ignore_pid || holder == getpid())) {
        return 0;
    }
    if (holder < 0) {
        return fl_refuse(why, FL_REFUSAL_ALREADY_SERVED, "pid %d is served by a pager in another pid name space", pid);
    }
    return fl_refuse(why, FL_REFUSAL_ALREADY_SERVED, "pid %d is served by the pager with pid %d", pid, holder);
}

static int inspect_all(int pid, int ignore_pid, int deep, struct fl_inspection *out, struct fl_refused *why) {
    struct fl_proc_status status;
    struct fd_findings found = {0};
    int error = fl_proc_status(pid, &status);
    if (error) {
        return error;
    }
    out->start_time_ticks = status.start_time_ticks;
    out->uid = status.uid;
    out->seccomp_mode = status.seccomp_mode;
    error = check_process(pid, &status, why);
    if (error) {
        return error;
    }
    found.pid = pid;
    error = fl_proc_fds(pid, look_at_fd, &found);
    if (error == -EAGAIN) {
        return fl_refuse(
            why, FL_REFUSAL_STUCK,
            "an io_uring of pid %d is so busy that the kernel does not say which memory it pins; try again", pid);
    }
    if (error) {
        return error;
    }
    if (found.uring_kib) {
        return refuse_pinned(pid, found.uring_kib, why);
    }
    out->has_vault = found.vault;
    error = fl_regions_find(pid, out, why);
    if (error) {
        return error;
    }
    char huge[FL_DETAIL_BYTES / 2];
    if (fl_hugepages_for_shmem(FL_HUGEPAGES_FOLDER, huge, sizeof(huge))) {
        return fl_refuse(
            why, FL_REFUSAL_HUGETLB,
            "this host may give guest memory huge pages (%s), which cannot be evicted in parts; write never "
            "there and start the VM of pid %d anew",
            huge, pid);
    }
    if (found.passthrough[0]) {
        return fl_refuse(why, FL_REFUSAL_PASSTHROUGH,
                         "pid %d passes a device through to its guest (%s): the device writes to guest memory itself",
                         pid, found.passthrough);
    }
    if (status.seccomp_mode == 1) {
        return fl_refuse(why, FL_REFUSAL_SECCOMP, "pid %d is in strict seccomp mode and may call nothing", pid);
    }
    if (status.locked_kib || (!found.vault && (found.uffd || deep))) {
        error = fl_regions_check_flags(pid, out, why);
        if (error && !(found.vault && why->refusal == FL_REFUSAL_FOREIGN_UFFD)) {
            return error; /* with a vault, the registration is our own */
        }
        *why = (struct fl_refused){0};
    }
    if (found.vault) {
        error = check_vault(pid, ignore_pid, out, why);
        if (error) {
            return error;
        }
    }
    const int skip[] = {getpid(), ignore_pid, (int)out->served_by_pid};
    error = check_tracer(pid, status.tracer_pid, skip, 3, why);
    if (error) {
        return error;
    }
    return fl_regions_other_mapper(pid, out, skip, 3, why);
}

int fl_inspect_target(int pid, int ignore_pid, int deep, struct fl_inspection *out) {
    struct fl_refused why = {0};
    *out = (struct fl_inspection){0};
    if (pid <= 0) {
        return -EINVAL;
    }
    int error = inspect_all(pid, ignore_pid, deep, out, &why);
    if (error && why.refusal == FL_REFUSAL_NONE) {
        struct fl_proc_status status;
        /* Whatever failed, the reason may be that the process ended in the middle. */
        int now = fl_proc_status(pid, &status);
        if (error == -ESRCH || now == -ESRCH || (now == 0 && (status.state == 'Z' || status.state == 'X'))) {
            fl_refuse(&why, FL_REFUSAL_GONE, "pid %d has ended", pid);
        } else if (error == -EACCES || error == -EPERM) {
            fl_refuse(&why, FL_REFUSAL_PERMISSION,
                      "cannot look at pid %d through /proc: %s; run as root (CAP_SYS_PTRACE)", pid, strerror(-error));
        } else {
            fl_refuse(&why, FL_REFUSAL_INTERNAL, "cannot look at pid %d through /proc: %s", pid, strerror(-error));
        }
    }
    out->refusal = why.refusal;
    snprintf(out->detail, sizeof(out->detail), "%s", why.detail);
    return 0;
}

int fl_inspect(int pid, struct fl_inspection *out) {
    return fl_inspect_target(pid, 0, 0, out);
}
