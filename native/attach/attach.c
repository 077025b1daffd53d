/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/attach.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach/inject.h"
#include "attach/inspect.h"
#include "attach/proc.h"
#include "attach/tracee.h"

#define CHILD_LIMIT_NS 2000000000u

/* ---- the forked process ----------------------------------------------------------------------------------- */

static bool wait_readable(int fd, uint64_t deadline_ns) {
    for (;;) {
        uint64_t now = fl_monotonic_ns();
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        int got = now < deadline_ns ? poll(&ready, 1, (int)((deadline_ns - now) / 1000000u) + 1) : 0;
        if (got >= 0 || errno != EINTR) {
            return got > 0;
        }
    }
}

/*
 * Still the process we looked at; attaching: still without a vault; detaching: what is still there. Asked once nobody else can
 * seize it: a process that we gave up may have gone on until then, and numbers that it has closed may be other files by now.
 */
static int check_again(struct fl_inject_job *job, struct fl_refused *why) {
    uint64_t started = 0;
    int number = -1;
    int error = fl_proc_start_time(job->pid, &started);
    if (error || started != job->attachment.start_time_ticks) {
        return fl_refuse(why, FL_REFUSAL_GONE, "pid %d has ended", job->pid);
    }
    if (job->vault_fd < 0) {
        error = fl_inject_verify(job->pid, &job->attachment);
        return error ? fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_INTERNAL,
                                 "cannot detach from pid %d: %s", job->pid, strerror(-error))
                     : 0;
    }
    error = fl_vmm_find_fd(job->pid, FL_VAULT_LINK, &number);
    if (error == 0) {
        return fl_refuse(why, FL_REFUSAL_ALREADY_SERVED, "pid %d was attached to by another pager meanwhile", job->pid);
    }
    return error == -ENOENT ? 0
                            : fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot list the descriptors of pid %d: %s", job->pid,
                                        strerror(-error));
}

/* Start the process, agree with it, and wait for its end. 0: it came to one; what it did is in `job`. */
static int run_child(struct fl_inject_job *job, struct fl_refused *why) {
    int control[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control)) {
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot attach to pid %d: socketpair: %s", job->pid,
                         strerror(errno));
    }
    uint64_t deadline = fl_monotonic_ns() + CHILD_LIMIT_NS;
    pid_t child = fork();
    if (child == 0) {
        close(control[0]);
        fl_inject_main(job, control[1]);
    }
    close(control[1]);
    if (child < 0) {
        int error = errno;
        close(control[0]);
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot attach to pid %d: fork: %s", job->pid, strerror(error));
    }
    char byte = 0;
    int refused = 0;
    if (wait_readable(control[0], deadline) && recv(control[0], &byte, 1, MSG_DONTWAIT) == 1) {
        refused = check_again(job, why);
        if (refused == 0 && send(control[0], &byte, 1, MSG_NOSIGNAL) == 1) {
            wait_readable(control[0], deadline); /* its end closes the socket */
        }
    }
    close(control[0]); /* without a go-ahead, this ends it */
    int status = 0;
    pid_t ended = 0;
    while ((ended = waitpid(child, &status, WNOHANG)) == 0 && fl_monotonic_ns() < deadline) {
        fl_pause_ns(100000);
    }
    if (refused) {
        return refused;
    }
    if (ended == 0) {
        return fl_refuse(why, FL_REFUSAL_STUCK,
                         "pid %d has not come back from an injected system call; process %d stays with it and puts "
                         "everything right when it does",
                         job->pid, (int)child);
    }
    /* If somebody else has reaped it (ECHILD), what it wrote still counts. */
    if (!__atomic_load_n(&job->done, __ATOMIC_ACQUIRE)) {
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "the process that attaches to pid %d was killed (status %#x)",
                         job->pid, (unsigned)status);
    }
    return 0;
}

/* ---- what it says ----------------------------------------------------------------------------------------- */

static int refuse_seccomp(const struct fl_inject_job *job, struct fl_refused *why) {
    if (job->error == -EPERM && job->verdict_step != FL_STEP_NONE) {
        return fl_refuse(why, FL_REFUSAL_SECCOMP,
                         "the seccomp filter of pid %d forbids what attaching needs: for %s it %s; allow that call",
                         job->pid, fl_inject_step_text(job->verdict_step), fl_seccomp_verdict_text(job->verdict));
    }
    return fl_refuse(why, FL_REFUSAL_SECCOMP,
                     "pid %d has seccomp filters that cannot be read, so they cannot be respected: %s: %s; give this "
                     "process CAP_SYS_ADMIN and no seccomp filter of its own",
                     job->pid, fl_inject_step_text(job->step), strerror(-job->error));
}

static int explain(const struct fl_inject_job *job, const char *what, struct fl_refused *why) {
    const char *leftovers = job->leftovers ? "; NOT everything could be put back" : "; everything was put back";
    struct fl_proc_status status = {0};
    switch (job->refusal) {
    case FL_REFUSAL_GONE:
        return fl_refuse(why, FL_REFUSAL_GONE, "pid %d has ended", job->pid);
    case FL_REFUSAL_SECCOMP:
        return refuse_seccomp(job, why);
    case FL_REFUSAL_STUCK:
        return fl_refuse(why, FL_REFUSAL_STUCK, "cannot %s pid %d: its main thread %s; try again", what, job->pid,
                         job->error == -ETIMEDOUT       ? "did not stop within 50 ms"
                         : job->step == FL_STEP_STOP    ? "is paused by a signal (SIGCONT resumes it)"
                         : job->step == FL_STEP_SECCOMP ? "has just changed its seccomp filters"
                                                        : "was in the middle of something that must not be disturbed");
    default:
        break;
    }
    if (job->step == FL_STEP_SEIZE) {
        if (fl_proc_status(job->pid, &status) == 0 && status.tracer_pid) {
            return fl_refuse(why, FL_REFUSAL_TRACED, "cannot %s pid %d: it is being traced by pid %d; end that first",
                             what, job->pid, status.tracer_pid);
        }
        if (job->error == -EBUSY || job->error == -ECANCELED) {
            return fl_refuse(why, FL_REFUSAL_STUCK, "cannot %s pid %d: %s; try again", what, job->pid,
                             job->error == -EBUSY ? "it was being traced until just now"
                                                  : "this process got no CPU in time to begin");
        }
        return fl_refuse(why, FL_REFUSAL_PERMISSION, "cannot %s pid %d: %s: %s; run as root (CAP_SYS_PTRACE)", what,
                         job->pid, fl_inject_step_text(job->step), strerror(-job->error));
    }
    return fl_refuse(why, job->refusal, "cannot %s pid %d: %s: %s%s%s", what, job->pid, fl_inject_step_text(job->step),
                     strerror(-job->error), job->error == -EMFILE ? " (raise its limit of open files)" : "", leftovers);
}

/* ---- the public functions --------------------------------------------------------------------------------- */

static struct fl_inject_job *new_job(void) {
    struct fl_inject_job *job =
        mmap(NULL, sizeof(*job), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (job == MAP_FAILED) {
        return NULL;
    }
    job->pidfd = job->vault_fd = job->lock_fd = job->device_fd = -1;
    return job;
}

static void end_job(struct fl_inject_job *job) {
    const int descriptors[] = {job->pidfd, job->vault_fd, job->device_fd};
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(descriptors[0]); i++) {
        if (descriptors[i] >= 0) {
            close(descriptors[i]);
        }
    }
    if (job->gate_local && job->gate_local != MAP_FAILED) {
        munmap(job->gate_local, FL_GATE_BYTES);
    }
    munmap(job, sizeof(*job));
}

/* What both attaching and detaching need to know of the VMM. */
static int look(struct fl_inject_job *job, const struct fl_proc_status *status, struct fl_refused *why) {
    job->seccomp_mode = status->seccomp_mode;
    job->seccomp_filters = status->seccomp_filters;
    job->attachment.start_time_ticks = status->start_time_ticks;
    if (status->seccomp_mode == 1) {
        return fl_refuse(why, FL_REFUSAL_SECCOMP, "pid %d is in strict seccomp mode and may call nothing", job->pid);
    }
    job->pidfd = (int)syscall(SYS_pidfd_open, job->pid, 0);
    if (job->pidfd < 0) {
        return fl_refuse(why, errno == ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_INTERNAL,
                         "cannot attach to pid %d: pidfd_open: %s", job->pid, strerror(errno));
    }
    int error = fl_inject_find_instruction(job->pid, &job->instruction);
    if (error) {
        return fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_INTERNAL,
                         "cannot find a system call instruction in pid %d: %s", job->pid, strerror(-error));
    }
    return 0;
}

static int write_gate(int vault_fd, uint64_t offset) {
    static const char zeros[FL_GATE_CODE_BYTES];
    size_t length = 0;
    const void *code = fl_arch_gate_code(&length);
    if (offset % FL_PAGE_SIZE) {
        return -EINVAL;
    }
    for (uint64_t at = 0; at < FL_GATE_BYTES; at += sizeof(zeros)) {
        if (pwrite(vault_fd, zeros, sizeof(zeros), (off_t)(offset + at)) != (ssize_t)sizeof(zeros)) {
            return errno ? -errno : -EIO;
        }
    }
    return pwrite(vault_fd, code, length, (off_t)offset) == (ssize_t)length ? 0 : -errno;
}

/* The VMM is given a description of its own: one shared with the pager would keep the pager's lock beyond its death. */
static int reopen(int fd) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    int opened = open(path, O_RDWR | O_CLOEXEC);
    return opened < 0 ? -errno : opened;
}

/* A device that cannot make a userfaultfd is as good as none. */
static int open_device(void) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int trial = device < 0 ? -1 : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
    if (trial >= 0) {
        close(trial);
        return device;
    }
    if (device >= 0) {
        close(device);
    }
    return -1;
}

int fl_attach(int pid, int vault_fd, uint64_t gate_offset, struct fl_attachment *out, struct fl_refused *why) {
    struct fl_inspection *inspection = malloc(sizeof(*inspection));
    struct fl_proc_status status;
    *why = (struct fl_refused){0};
    if (!inspection || fl_inspect_target(pid, getpid(), 1, inspection)) {
        free(inspection);
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot inspect pid %d", pid);
    }
    if (inspection->refusal) {
        int refused = fl_refuse(why, inspection->refusal, "%s", inspection->detail);
        free(inspection);
        return refused;
    }
    uint64_t started = inspection->start_time_ticks;
    free(inspection);
    if (fl_proc_status(pid, &status) || status.start_time_ticks != started) {
        return fl_refuse(why, FL_REFUSAL_GONE, "pid %d has ended", pid);
    }
    int error = write_gate(vault_fd, gate_offset);
    struct fl_inject_job *job = error ? NULL : new_job();
    if (!job) {
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot attach to pid %d: cannot write the gate into the vault: %s",
                         pid, strerror(error ? -error : ENOMEM));
    }
    job->pid = pid;
    job->lock_fd = vault_fd;
    job->gate_offset = gate_offset;
    job->copy = out;
    job->vault_fd = reopen(vault_fd);
    job->device_fd = open_device();
    job->gate_local = mmap(NULL, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vault_fd, (off_t)gate_offset);
    int refused = 0;
    if (job->gate_local == MAP_FAILED) {
        refused = fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot map the gate for pid %d: %s", pid, strerror(errno));
    } else if (job->vault_fd < 0) {
        refused = fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot open the vault for pid %d again: %s", pid,
                            strerror(-job->vault_fd));
    } else {
        refused = look(job, &status, why);
    }
    if (refused == 0) {
        refused = run_child(job, why);
    }
    if (refused == 0 && job->refusal) {
        refused = explain(job, "attach to", why);
    }
    if (refused == 0) {
        *out = job->attachment;
    }
    end_job(job);
    return refused;
}

int fl_attach_undo(int pid, const struct fl_attachment *attachment, int lock_fd, struct fl_refused *why) {
    struct fl_proc_status status;
    *why = (struct fl_refused){0};
    if (fl_proc_status(pid, &status) || status.state == 'Z' ||
        status.start_time_ticks != attachment->start_time_ticks) {
        return fl_refuse(why, FL_REFUSAL_GONE, "pid %d has ended", pid);
    }
    struct fl_inject_job *job = new_job();
    if (!job) {
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot detach from pid %d: %s", pid, strerror(ENOMEM));
    }
    job->pid = pid;
    job->lock_fd = lock_fd;
    job->attachment = *attachment;
    int refused = look(job, &status, why);
    if (refused == 0) {
        refused = run_child(job, why);
    }
    if (refused == 0 && job->refusal) {
        refused = explain(job, "detach from", why);
    }
    end_job(job);
    return refused;
}
