/* SPDX-License-Identifier: Apache-2.0 */
/* Everything that depends on the processor, for one stopped thread of a VMM. Implemented by arch_x86_64.c. */
#ifndef FL_ATTACH_ARCH_H
#define FL_ATTACH_ARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "attach/gate.h"

/* General registers as the kernel hands them out; what is in them is the business of the architecture. */
struct fl_registers {
    uint64_t words[27];
};

/* -ENOEXEC: the thread is running code of another kind (32-bit). */
int fl_arch_get(int tid, struct fl_registers *out);
int fl_arch_set(int tid, const struct fl_registers *registers);

uint64_t fl_arch_pc(const struct fl_registers *registers);

/* Offset of a system call instruction in `text`; `length` when there is none. */
size_t fl_arch_find_syscall(const uint8_t *text, size_t length);

/* Turn `registers` into those of a thread about to make this call with the instruction at `instruction`. */
void fl_arch_prepare_call(struct fl_registers *registers, uint64_t instruction, uint64_t nr, const uint64_t args[6]);
int64_t fl_arch_result(const struct fl_registers *registers);

/* AUDIT_ARCH_... as seccomp filters see it. */
uint32_t fl_arch_audit(void);

/* Is the stopped thread in a critical section of rseq(2)? Then it must not be sent elsewhere. */
bool fl_arch_in_rseq(int tid, const struct fl_registers *registers);

/*
 * One run of the gate. The states tell a successor what a dead pager left behind: a FREE slot may be used; a
 * PREPARED one may or may not have been entered; a RUNNING one has been and sets itself FREE. After that the code
 * reads nothing of the slot any more.
 */
enum { FL_GATE_FREE = 0, FL_GATE_PREPARED = 1, FL_GATE_RUNNING = 2 };
#define FL_GATE_SLOT_BYTES 2048
#define FL_GATE_SLOTS (FL_GATE_DATA_BYTES / FL_GATE_SLOT_BYTES)
struct fl_gate_slot {
    uint32_t state;
    uint32_t count;
    uint64_t prepared_at_ns; /* CLOCK_MONOTONIC */
    uint64_t saved[18];
    struct fl_gate_call calls[FL_GATE_CALLS_MAX];
};

/* The position-independent code of the gate. */
const void *fl_arch_gate_code(size_t *length);

/*
 * From the registers of the stopped thread, fill in `slot->saved` with what it will go on with (an interrupted
 * system call is made again) and make `registers` those for entering the gate: code at `gate_code`, slot at
 * `slot_address` in the VMM.
 */
void fl_arch_gate_enter(struct fl_registers *registers, uint64_t gate_code, uint64_t slot_address,
                        struct fl_gate_slot *slot);

/* The end (lowest address in use or promised to the running function) of the thread's stack. */
uint64_t fl_arch_free_stack(const struct fl_registers *registers);

/* Lowest address and length of the thread's own stack that the gate writes to, below what is in use. */
uint64_t fl_arch_gate_stack(const struct fl_registers *registers, size_t *length);

#endif
