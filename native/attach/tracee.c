/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/tracee.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "attach/proc.h"

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

/* Between looks for a stop that may not come: as a real-time thread we must not keep the processor from the tracee. */
#define SEIZE_TRIES 5u
#define SEIZE_PAUSE_NS 1000000u
#define LOOK_NS 10000
#define LOOK_MAX_NS 250000
#define SPIN_NS 300000
#define KERNEL_SIGSET 8 /* bytes of the kernel's signal set */
#define SYSCALL_STOP (SIGTRAP | 0x80)

uint64_t fl_monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void fl_pause_ns(uint64_t ns) {
    struct timespec time = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&time, NULL);
}

static bool is_traced(int tid) {
    struct fl_proc_status status;
    return fl_proc_status(tid, &status) == 0 && status.tracer_pid != 0;
}

/* A tracer that is just ending (a killed pager's) holds on for a moment: no reason to give up, nor to blame permissions. */
int fl_tracee_seize(int tid) {
    bool traced = false;
    for (unsigned tries = 1; ptrace(PTRACE_SEIZE, tid, NULL, PTRACE_O_TRACESYSGOOD); tries++) {
        if (errno != EPERM) {
            return -errno;
        }
        traced |= is_traced(tid);
        if (tries == SEIZE_TRIES) {
            return traced ? -EBUSY : -EPERM;
        }
        fl_pause_ns(SEIZE_PAUSE_NS);
    }
    return 0;
}

int fl_tracee_resume(int tid) {
    return ptrace(PTRACE_CONT, tid, NULL, NULL) ? -errno : 0;
}

int fl_tracee_detach(int tid) {
    return ptrace(PTRACE_DETACH, tid, NULL, NULL) ? -errno : 0;
}

static bool become_real_time(int above_lowest) {
    struct sched_param own = {.sched_priority = sched_get_priority_min(SCHED_FIFO) + above_lowest};
    return sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &own) == 0;
}

bool fl_tracee_hurry(void) {
    return become_real_time(0);
}

void fl_tracee_overtake(void) {
    (void)become_real_time(1);
}

_Static_assert(offsetof(struct fl_tracee_schedule, flags) - offsetof(struct fl_tracee_schedule, size) == 8,
               "as the kernel's");

bool fl_tracee_hurry_it(int tid, struct fl_tracee_schedule *own) {
    *own = (struct fl_tracee_schedule){0};
    unsigned size = sizeof(*own) - offsetof(struct fl_tracee_schedule, size);
    if (syscall(SYS_sched_getattr, tid, &own->size, size, 0) || own->policy != SCHED_OTHER) {
        return false;
    }
    struct sched_param lowest = {.sched_priority = sched_get_priority_min(SCHED_FIFO)};
    own->changed = sched_setscheduler(tid, SCHED_FIFO, &lowest) == 0;
    return own->changed != 0;
}

void fl_tracee_unhurry_it(int tid, const struct fl_tracee_schedule *own) {
    if (own->changed) {
        syscall(SYS_sched_setattr, tid, &own->size, 0);
    }
}

/* Wait for the next stop until `deadline_ns`. 0, -ETIMEDOUT or -ESRCH. */
static int wait_until(int tid, uint64_t deadline_ns, int *status) {
    for (uint64_t look_ns = LOOK_NS;; look_ns = look_ns < LOOK_MAX_NS ? look_ns * 5 / 4 : look_ns) {
        int got = waitpid(tid, status, __WALL | WNOHANG);
        if (got) {
            return got == tid && WIFSTOPPED(*status) ? 0 : -ESRCH;
        }
        if (fl_monotonic_ns() >= deadline_ns) {
            return -ETIMEDOUT;
        }
        fl_pause_ns(look_ns);
    }
}

/* Wait for the next stop as long as it takes. Two real-time threads need no wake-up if one just looks again. */
static int wait_for_stop(int tid, bool spin, int *status) {
    uint64_t spin_until_ns = spin ? fl_monotonic_ns() + SPIN_NS : 0;
    for (;;) {
        bool look = spin && fl_monotonic_ns() < spin_until_ns;
        int got = waitpid(tid, status, __WALL | (look ? WNOHANG : 0));
        if (got == tid) {
            return WIFSTOPPED(*status) ? 0 : -ESRCH;
        }
        if (got < 0 && errno != EINTR) {
            return -ESRCH;
        }
        sched_yield();
    }
}

static bool is_event_stop(int status) {
    return status >> 16 == PTRACE_EVENT_STOP;
}

int fl_tracee_stop(int tid, uint64_t limit_ns) {
    uint64_t deadline = fl_monotonic_ns() + limit_ns;
    if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL)) {
        return -errno;
    }
    for (;;) {
        int status = 0;
        int error = wait_until(tid, deadline, &status);
        if (error) {
            return error;
        }
        if (is_event_stop(status)) {
            return WSTOPSIG(status) == SIGTRAP ? 0 : -EAGAIN;
        }
        /* A signal came first and took the place of our stop: ask again, then let it be delivered. */
        int signal = WSTOPSIG(status) == SYSCALL_STOP ? 0 : WSTOPSIG(status);
        if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) || ptrace(PTRACE_CONT, tid, NULL, (void *)(intptr_t)signal)) {
            return -errno;
        }
    }
}

int fl_tracee_step_call(int tid, bool spin) {
    int seen = 0; /* the entry, then the exit */
    int signal = 0;
    while (seen < 2) {
        int status = 0;
        if (ptrace(PTRACE_SYSCALL, tid, NULL, (void *)(intptr_t)signal) || wait_for_stop(tid, spin, &status)) {
            return -ESRCH;
        }
        signal = 0;
        if (is_event_stop(status)) {
            continue; /* job control; it runs on for us and stops for good when let go */
        }
        if (WSTOPSIG(status) == SYSCALL_STOP) {
            seen++;
        } else {
            signal = WSTOPSIG(status); /* SIGSTOP, which cannot be blocked */
        }
    }
    return 0;
}

int fl_tracee_block_signals(int tid, uint64_t *saved) {
    uint64_t all = ~(uint64_t)0;
    if (ptrace(PTRACE_GETSIGMASK, tid, KERNEL_SIGSET, saved) || ptrace(PTRACE_SETSIGMASK, tid, KERNEL_SIGSET, &all)) {
        return -errno;
    }
    return 0;
}

int fl_tracee_restore_signals(int tid, uint64_t saved) {
    return ptrace(PTRACE_SETSIGMASK, tid, KERNEL_SIGSET, &saved) ? -errno : 0;
}
