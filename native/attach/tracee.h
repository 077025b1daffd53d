/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread of a VMM under ptrace. The tracer is the calling thread; when it ends, the kernel lets the VMM's thread
 * go, which is also the only way to give up on one that does not stop.
 */
#ifndef FL_ATTACH_TRACEE_H
#define FL_ATTACH_TRACEE_H

#include <stdbool.h>
#include <stdint.h>

uint64_t fl_monotonic_ns(void);
void fl_pause_ns(uint64_t ns);

/*
 * Make the calling thread a real-time one where that is allowed, for the little while that it has another thread
 * stopped: on a busy host, waiting for a processor would make up most of the stop. Returns
 * whether it is one.
 */
bool fl_tracee_hurry(void);

/*
 * The same for the tracee, until it is put back with fl_tracee_unhurry_it(). Only for a tracer that will not
 * be killed in between. Does nothing where it is not allowed, or to a thread that is not an ordinary one.
 */
struct fl_tracee_schedule {
    uint64_t changed;
    uint32_t size; /* from here on struct sched_attr, which C libraries do not declare */
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime;
    uint64_t deadline;
    uint64_t period;
};
bool fl_tracee_hurry_it(int tid, struct fl_tracee_schedule *own);
void fl_tracee_unhurry_it(int tid, const struct fl_tracee_schedule *own);
/*
 * Before such a tracee is let go and waited for: it may spin, and would not give a processor back to a thread of its own
 * priority.
 */
void fl_tracee_overtake(void);

/* Become the tracer; the thread runs on. -EBUSY: another tracer was there. -EPERM: not allowed. -ESRCH: ended. */
int fl_tracee_seize(int tid);

/*
 * Stop the thread on its way to user mode. Signals that arrive meanwhile are delivered. 0: stopped. -ETIMEDOUT: it
 * did not stop in time, and may still. -EAGAIN: it is stopped by job control (SIGSTOP) as well; let it go. -ESRCH.
 */
int fl_tracee_stop(int tid, uint64_t limit_ns);

/* Let a stopped thread run on as it is, staying its tracer. */
int fl_tracee_resume(int tid);
int fl_tracee_detach(int tid);

/*
 * Let the stopped thread, whose registers are set to make a system call, make it, and stop right after it. Waits as
 * long as the call takes; `spin`: at first by looking, for two real-time threads. The caller has blocked all signals
 * (fl_tracee_block_signals()). 0 or -ESRCH.
 */
int fl_tracee_step_call(int tid, bool spin);

/* Of a stopped thread: block every signal; `*saved` is for fl_tracee_restore_signals(). */
int fl_tracee_block_signals(int tid, uint64_t *saved);
int fl_tracee_restore_signals(int tid, uint64_t saved);

#endif
