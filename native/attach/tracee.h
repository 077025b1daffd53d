/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread of a VMM under ptrace. The tracer is the calling thread; when it ends, the kernel lets the VMM's thread
 * go, which is also the only way to give up on one that does not stop.
 */
#ifndef FL_ATTACH_TRACEE_H
#define FL_ATTACH_TRACEE_H

#include <stdint.h>

uint64_t fl_monotonic_ns(void);
void fl_pause_ns(uint64_t ns);

/* Become the tracer; the thread runs on. -EPERM: not allowed, or another tracer is there. -ESRCH: ended. */
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
 * Let the stopped thread, whose registers are set to make a system call, make it, and stop right after it. Waits
 * as long as the call takes. The caller has blocked all signals (fl_tracee_block_signals()). 0 or -ESRCH.
 */
int fl_tracee_step_call(int tid);

/* Of a stopped thread: block every signal; `*saved` is for fl_tracee_restore_signals(). */
int fl_tracee_block_signals(int tid, uint64_t *saved);
int fl_tracee_restore_signals(int tid, uint64_t saved);

#endif
