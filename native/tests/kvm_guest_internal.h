/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the guest share: its program, and what that agrees on with the host. */
#ifndef KVM_GUEST_INTERNAL_H
#define KVM_GUEST_INTERNAL_H

#include <stdatomic.h>
#include <stdint.h>

#include "kvm_guest.h"

/* What the program leaves behind when it takes an exception, which nothing in it should cause. */
struct kvm_exception {
    uint64_t taken;    /* KVM_EXCEPTION_TAKEN + vector; 0: none */
    uint64_t stack[4]; /* as pushed: error code (of those that have one), rip, cs, flags */
    uint64_t cr2, r8, r9, rcx, r15;
};

#define KVM_EXCEPTIONS 32u
#define KVM_EXCEPTION_TAKEN 256u
#define KVM_EXCEPTION_STUB 16u /* bytes of code for each vector, from kvm_guest_exceptions on */

/* One for each worker, at the beginning of a page in side memory of which the end is the worker's stack. */
struct kvm_mailbox {
    _Atomic(uint64_t) stop;   /* end after this pass */
    _Atomic(uint64_t) passes; /* done, by the worker only */
    struct kvm_exception exception;
};

/*
 * Position-independent; runs from the first byte and ends in HLT, an exception too. The stack is for exceptions.
 * Registers at entry:
 *   rdi script   rsi touches in it   r8 guest memory   r13 mailbox   r14 passes (0: until stopped)
 * At every instruction after the first few, r15 is the touch at work.
 */
extern const uint8_t kvm_guest_code[], kvm_guest_exceptions[], kvm_guest_code_end[];

__attribute__((format(printf, 3, 4))) struct kvm_outcome kvm_outcome_fail(int error, uint32_t at, const char *format,
                                                                          ...);
/* As kvm_guest_run(), by the calling thread on a mapping. */
struct kvm_outcome kvm_host_run(uint8_t *memory, struct kvm_touch *script, uint32_t count, uint64_t passes,
                                struct kvm_mailbox *mailbox);

/* Of the calling thread: it is in the guest, and what handle_sigbus saw there. */
extern _Thread_local volatile int kvm_in_guest, kvm_poisoned;

#endif
