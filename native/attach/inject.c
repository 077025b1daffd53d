/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/inject.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attach/inject_calls.h"
#include "attach/proc.h"
#include "attach/tracee.h"

#define STOP_LIMIT_NS 50000000u
#define GATE_LIMIT_NS 1000000000u
#define GATE_LOOK_NS 10000u
#define GO_LIMIT_MS 1000

const char *fl_inject_step_text(uint32_t step) {
    static const char *const texts[] = {
        [FL_STEP_NONE] = "nothing",
        [FL_STEP_SEIZE] = "PTRACE_SEIZE",
        [FL_STEP_STOP] = "PTRACE_INTERRUPT",
        [FL_STEP_REGISTERS] = "PTRACE_SETREGSET",
        [FL_STEP_SECCOMP] = "PTRACE_SECCOMP_GET_FILTER",
        [FL_STEP_STACK] = "using the stack",
        [FL_STEP_SOCKETPAIR] = "socketpair",
        [FL_STEP_GETFD] = "pidfd_getfd",
        [FL_STEP_SENDMSG] = "sendmsg of the descriptors",
        [FL_STEP_RECVMSG] = "recvmsg of the descriptors",
        [FL_STEP_USERFAULTFD] = "userfaultfd",
        [FL_STEP_MMAP_GATE] = "mmap of the gate",
        [FL_STEP_MMAP_GATE_CODE] = "mmap of the gate's code",
        [FL_STEP_GATE] = "the first run of the gate",
        [FL_STEP_CLOSE] = "close",
        [FL_STEP_MUNMAP] = "munmap",
        [FL_STEP_MADVISE] = "madvise",
    };
    return step < sizeof(texts) / sizeof(texts[0]) ? texts[step] : "unknown step";
}

static int stop(struct fl_injection *in) {
    int error = fl_tracee_stop(in->job->pid, STOP_LIMIT_NS);
    return error ? fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_STOP, error) : 0;
}

/* A short stop of its own, so that reading and judging the filters does not lengthen the one that counts. */
static int check_seccomp(struct fl_injection *in) {
    struct fl_inject_job *job = in->job;
    if (job->seccomp_mode == 0) {
        return 0;
    }
    if (stop(in)) {
        return -1;
    }
    int error = fl_seccomp_read(job->pid, &job->filters);
    if (fl_tracee_resume(job->pid)) {
        return fl_inject_fail(in, FL_REFUSAL_GONE, FL_STEP_SECCOMP, -ESRCH);
    }
    if (error) {
        return fl_inject_fail(in, FL_REFUSAL_SECCOMP, FL_STEP_SECCOMP, error);
    }
    return fl_inject_ask_all(in);
}

/* Filters are only ever added: the same number means the same filters. Older kernels do not say the number. */
static int seccomp_is_unchanged(struct fl_injection *in) {
    uint32_t mode = 0;
    uint32_t filters = 0;
    int error = fl_proc_seccomp(in->job->pid, &mode, &filters);
    if (error) {
        return fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SECCOMP, error);
    }
    if (mode != in->job->seccomp_mode || filters != in->job->seccomp_filters) {
        return fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_SECCOMP, -EAGAIN);
    }
    return 0;
}

/* Everything that has to be right of the stopped thread before anything is done to it. */
static int check_stopped(struct fl_injection *in) {
    struct fl_inject_job *job = in->job;
    int error = fl_arch_get(job->pid, &in->saved);
    if (error) {
        return fl_inject_fail(in, error == -ENOEXEC ? FL_REFUSAL_KERNEL : FL_REFUSAL_INTERNAL, FL_STEP_REGISTERS,
                              error);
    }
    if ((in->gate && (fl_arch_pc(&in->saved) - in->gate < FL_GATE_BYTES || fl_inject_may_return_to_gate(in))) ||
        fl_arch_in_rseq(job->pid, &in->saved)) {
        return fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_REGISTERS, -EAGAIN);
    }
    return seccomp_is_unchanged(in);
}

static int ended(struct fl_injection *in) {
    in->gone = true;
    in->job->refusal = FL_REFUSAL_NONE; /* that it ended says more than how far we had come */
    return fl_inject_fail(in, FL_REFUSAL_GONE, FL_STEP_REGISTERS, -ESRCH);
}

/*
 * With the thread stopped: do `work`, then set the registers either back to what they were or, if `slot` is given and
 * the work was done, for a run of the gate, and let the thread go.
 */
static int work_on_stopped(struct fl_injection *in, int (*work)(struct fl_injection *in), struct fl_gate_slot *slot) {
    int pid = in->job->pid;
    uint64_t signal_mask = 0;
    struct fl_registers after;
    int result = check_stopped(in);
    if (result == 0) {
        int error = fl_tracee_block_signals(pid, &signal_mask);
        if (error) {
            return fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_REGISTERS, error);
        }
        result = work(in);
        after = in->saved;
        if (result == 0 && slot) {
            slot->count = fl_inject_gate_calls(in, slot->calls);
            slot->prepared_at_ns = fl_monotonic_ns();
            fl_arch_gate_enter(&after, in->gate, in->gate + FL_GATE_CODE_BYTES, slot);
            __atomic_store_n(&slot->state, FL_GATE_PREPARED, __ATOMIC_RELEASE);
            if (in->spin) {
                fl_tracee_overtake();
            }
        }
        if (in->gone || fl_arch_set(pid, &after) || fl_tracee_restore_signals(pid, signal_mask)) {
            result = ended(in);
        }
    }
    fl_tracee_detach(pid);
    return result;
}

static int take_back(struct fl_injection *in) {
    uint32_t before = in->job->leftovers;
    fl_inject_take_back(in);
    return in->job->leftovers == before ? 0 : -1;
}

/* What failed is recorded already; what is in the VMM has to go in any case. */
static int put_in(struct fl_injection *in) {
    int result = fl_inject_put_in(in);
    if (result) {
        fl_inject_take_back(in);
    }
    return result;
}

static int wait_for_gate(struct fl_injection *in, const struct fl_gate_slot *slot) {
    uint64_t deadline = fl_monotonic_ns() + GATE_LIMIT_NS;
    struct pollfd end = {.fd = in->job->pidfd, .events = POLLIN};
    while (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) != FL_GATE_FREE) {
        if (poll(&end, 1, 0) > 0) {
            return ended(in);
        }
        if (fl_monotonic_ns() > deadline) {
            in->job->leftovers++; /* it finishes by itself when the VMM is continued; a successor finds it all */
            return fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_GATE, -ETIMEDOUT);
        }
        fl_pause_ns(GATE_LOOK_NS);
    }
    return 0;
}

static int attach(struct fl_injection *in, uint64_t stopped_at_ns) {
    struct fl_inject_job *job = in->job;
    struct fl_gate_slot *slot = (struct fl_gate_slot *)(void *)((char *)job->gate_local + FL_GATE_CODE_BYTES);
    if (work_on_stopped(in, put_in, slot) || wait_for_gate(in, slot)) {
        return -1;
    }
    job->attachment.stop_ns = fl_monotonic_ns() - stopped_at_ns;
    int64_t uffd = slot->calls[0].result;
    in->device = in->socket[0] = in->socket[1] = -1;
    if (uffd >= 0) {
        job->attachment.vmm_uffd = (int32_t)uffd;
        job->attachment.vmm_vault = in->vault;
        job->attachment.gate_code = in->gate;
        job->attachment.gate_data = in->gate + FL_GATE_CODE_BYTES;
        if (job->copy) {
            *job->copy = job->attachment;
        }
        return 0;
    }
    fl_inject_fail(in, uffd == -EPERM || uffd == -EACCES ? FL_REFUSAL_PERMISSION : FL_REFUSAL_INTERNAL,
                   FL_STEP_USERFAULTFD, (int)uffd);
    if (fl_tracee_seize(job->pid) || fl_tracee_stop(job->pid, STOP_LIMIT_NS)) {
        job->leftovers++;
    } else {
        work_on_stopped(in, take_back, NULL);
    }
    return -1;
}

static void stop_and_work(struct fl_injection *in) {
    if (check_seccomp(in) || stop(in)) {
        return; /* our end lets the thread go */
    }
    uint64_t stopped_at_ns = fl_monotonic_ns();
    if (in->job->vault_fd >= 0) {
        attach(in, stopped_at_ns);
    } else {
        work_on_stopped(in, take_back, NULL);
        in->job->attachment.stop_ns = fl_monotonic_ns() - stopped_at_ns;
    }
}

/* The pager's other descriptors are not ours to keep: sockets would outlive it. */
static void close_others(const struct fl_inject_job *job, int control) {
    const int keep[] = {job->pidfd, job->vault_fd, job->lock_fd, job->device_fd, control};
    unsigned first = 0;
    for (;;) {
        unsigned next = ~0u; /* lowest descriptor to keep from `first` on */
        for (size_t i = 0; i < sizeof(keep) / sizeof(keep[0]); i++) {
            if (keep[i] >= 0 && (unsigned)keep[i] >= first && (unsigned)keep[i] < next) {
                next = (unsigned)keep[i];
            }
        }
        if (next > first) {
            syscall(SYS_close_range, first, next == ~0u ? ~0u : next - 1, 0);
        }
        if (next == ~0u) {
            return;
        }
        first = next + 1;
    }
}

/* Tell the pager that nobody else can seize the VMM now, and wait for its go-ahead. */
static bool may_go(int control) {
    char byte = 's';
    struct pollfd answer = {.fd = control, .events = POLLIN};
    return send(control, &byte, 1, MSG_NOSIGNAL) == 1 && poll(&answer, 1, GO_LIMIT_MS) == 1 &&
           recv(control, &byte, 1, MSG_DONTWAIT) == 1;
}

_Noreturn void fl_inject_main(struct fl_inject_job *job, int control) {
    struct fl_injection in = {.job = job, .socket = {-1, -1}, .device = -1, .vault = -1, .uffd = -1, .end = -1};
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    setsid();
    close_others(job, control);
    int error = fl_tracee_seize(job->pid);
    if (error) {
        fl_inject_fail(&in, FL_REFUSAL_PERMISSION, FL_STEP_SEIZE, error);
    } else if (!may_go(control)) {
        fl_inject_fail(&in, FL_REFUSAL_INTERNAL, FL_STEP_SEIZE, -ECANCELED);
    } else {
        struct fl_tracee_schedule own;
        if (job->vault_fd < 0) { /* as our parent has just found it */
            in.uffd = job->attachment.vmm_uffd;
            in.vault = job->attachment.vmm_vault;
            in.gate = job->attachment.gate_code;
        }
        in.spin = fl_tracee_hurry();
        in.spin &= fl_tracee_hurry_it(job->pid, &own);
        stop_and_work(&in);
        fl_tracee_unhurry_it(job->pid, &own);
    }
    __atomic_store_n(&job->done, 1, __ATOMIC_RELEASE);
    _exit(0);
}
