/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate: system calls that only the VMM itself can make on its memory (MADV_DONTNEED for the zap tracker),
 * made by its main thread again and again, in a way that survives the pager's death at any instruction.
 *
 * The gate is a piece of the vault that is mapped into the VMM: one page of code, then data. For a run the pager
 * stops the main thread, writes the calls and all of its registers into a slot of the data, and with one register
 * write sends the thread into the code, which makes the calls, puts every register back and jumps to where the
 * thread was. From that one write on the pager is not needed any more; before it, nothing has changed.
 *
 * A call may block: MADV_DONTNEED on a range of a userfaultfd with EVENT_REMOVE waits until another thread of the
 * pager has read the event. Calls that the kernel restarts by restart_syscall() (nanosleep, poll, timed futex waits) must
 * not be made: they would overwrite what the thread's own interrupted call needs.
 */
#ifndef FL_ATTACH_GATE_H
#define FL_ATTACH_GATE_H

#include <stdbool.h>

#include "attach/attach.h"

#define FL_GATE_CODE_BYTES 4096
#define FL_GATE_DATA_BYTES 65536
#define FL_GATE_BYTES (FL_GATE_CODE_BYTES + FL_GATE_DATA_BYTES)
#define FL_GATE_CALLS_MAX 16

struct fl_gate_call {
    uint64_t nr;
    uint64_t args[6];
    int64_t result; /* what the kernel returned: negative errno on failure */
};

struct fl_gate;

/*
 * `gate_local` is this process' own shared, writable mapping of the gate in the vault (FL_GATE_BYTES). Returns
 * -EPROTO when the gate's code is another build's, -ESTALE when the VMM is another one, -ESRCH when it ended.
 */
int fl_gate_open(int pid, void *gate_local, const struct fl_attachment *attachment, struct fl_gate **out);
void fl_gate_close(struct fl_gate *gate);
/*
 * Asked in each run, with the main thread stopped and just before it is sent in. Not 0: nothing is done, and the run
 * returns that.
 */
void fl_gate_guard(struct fl_gate *gate, int (*still)(void *context), void *context);
/*
 * Let no call be made any more that was prepared, by this pager or by one that was killed, and has not begun: a signal's
 * handler, say, may keep the thread from it. False: one is under way. Between runs only.
 */
bool fl_gate_cancel(void *gate_local);

/*
 * Make `count` calls in the VMM, in order, and fill in their results. `*stop_ns` is how long the main thread was
 * stopped, `*busy_ns` how long it was away from its own work, stop included; either may be NULL. One run at a
 * time (callers are serialised). Returns
 *   0           all calls were made
 *   -EBUSY      nothing was done: traced by somebody else, paused by a signal, did not stop in 20 ms, an
 *               earlier run has not ended, or not a good moment; try again later
 *   -ETIMEDOUT  the calls were handed over, but did not end within `timeout_ns`; they will be made, unless
 *               fl_gate_cancel() is faster, and while they are runs answer -EBUSY
 *   fl_gate_guard()'s error; nothing was done
 *   -ESRCH      the VMM has ended
 *   -ESTALE     the VMM has this gate no more; nothing was done
 *   other       the system's negative errno; nothing was done
 */
int fl_gate_run(struct fl_gate *gate, struct fl_gate_call *calls, uint32_t count, uint64_t timeout_ns,
                uint64_t *stop_ns, uint64_t *busy_ns);

#endif
