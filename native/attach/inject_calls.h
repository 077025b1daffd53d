/* SPDX-License-Identifier: Apache-2.0 */
/* The system calls that attaching and detaching make in the VMM, whose main thread the caller has stopped. */
#ifndef FL_ATTACH_INJECT_CALLS_H
#define FL_ATTACH_INJECT_CALLS_H

#include "attach/arch.h"
#include "attach/inject.h"

struct fl_injection {
    struct fl_inject_job *job;
    struct fl_registers saved; /* the thread's own */
    bool gone;                 /* the VMM has ended */
    bool spin;                 /* for fl_tracee_step_call() */
    /* what is in the VMM so far; 0 and -1: not there */
    uint64_t gate;
    int32_t socket[2];
    int32_t device;
    int32_t vault;
    int32_t uffd;
    int end; /* our own descriptor of socket[0] */
};

/* Record the first failure. Returns -1. */
int fl_inject_fail(struct fl_injection *in, uint32_t refusal, uint32_t step, int error);

/*
 * Would the VMM's seccomp filters let through every call that the job needs? Asked before the first is made: a filter
 * may kill, so nobody tries that out.
 */
int fl_inject_ask_all(struct fl_injection *in);

/*
 * Whether the thread may still come back into the gate although it is not in it now: a signal handler interrupted a run,
 * or came before its first instruction or after its last. The handler's frame, above the stack pointer, then holds
 * an address in the gate.
 */
bool fl_inject_may_return_to_gate(const struct fl_injection *in);

/* The vault, /dev/userfaultfd and the gate into the VMM. What is left to do is for the gate. */
int fl_inject_put_in(struct fl_injection *in);

/* The rest as calls of the gate: make the userfaultfd (the first), close what is not needed any more. Returns how many. */
uint32_t fl_inject_gate_calls(struct fl_injection *in, struct fl_gate_call calls[FL_GATE_CALLS_MAX]);

/* Close and unmap all that is in the VMM. */
void fl_inject_take_back(struct fl_injection *in);

#endif
