/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/arch.h"

#include <elf.h>
#include <errno.h>
#include <linux/audit.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>

#ifndef __x86_64__
#error "Frostline knows x86_64 only so far"
#endif

_Static_assert(sizeof(struct fl_registers) == sizeof(struct user_regs_struct), "registers as the kernel has them");

#define USER_CS 0x33      /* 64-bit code of a user process */
#define CLEAN_FLAGS 0x202 /* interrupts on, everything else off */
#define RED_ZONE 128      /* bytes below the stack pointer that belong to the running function */

/* What a system call that was interrupted returns to the kernel's own signal code (not in any user header). */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

static struct user_regs_struct *user(struct fl_registers *registers) {
    return (struct user_regs_struct *)registers->words;
}

static const struct user_regs_struct *user_const(const struct fl_registers *registers) {
    return (const struct user_regs_struct *)registers->words;
}

int fl_arch_get(int tid, struct fl_registers *out) {
    struct iovec area = {.iov_base = out->words, .iov_len = sizeof(out->words)};
    if (ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &area)) {
        return -errno;
    }
    return area.iov_len == sizeof(out->words) && user(out)->cs == USER_CS ? 0 : -ENOEXEC;
}

int fl_arch_set(int tid, const struct fl_registers *registers) {
    struct iovec area = {.iov_base = (void *)registers->words, .iov_len = sizeof(registers->words)};
    return ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &area) ? -errno : 0;
}

uint64_t fl_arch_pc(const struct fl_registers *registers) {
    return user_const(registers)->rip;
}

size_t fl_arch_find_syscall(const uint8_t *text, size_t length) {
    for (size_t i = 0; i + 1 < length; i++) {
        if (text[i] == 0x0f && text[i + 1] == 0x05) {
            return i;
        }
    }
    return length;
}

void fl_arch_prepare_call(struct fl_registers *registers, uint64_t instruction, uint64_t nr, const uint64_t args[6]) {
    struct user_regs_struct *regs = user(registers);
    regs->rip = instruction;
    regs->eflags = CLEAN_FLAGS;
    regs->orig_rax = (uint64_t)-1; /* or the kernel would make the interrupted call again */
    regs->rax = nr;
    regs->rdi = args[0];
    regs->rsi = args[1];
    regs->rdx = args[2];
    regs->r10 = args[3];
    regs->r8 = args[4];
    regs->r9 = args[5];
}

int64_t fl_arch_result(const struct fl_registers *registers) {
    return (int64_t)user_const(registers)->rax;
}

uint32_t fl_arch_audit(void) {
    return AUDIT_ARCH_X86_64;
}

/* Not in the headers of older C libraries. */
#define GET_RSEQ_CONFIGURATION 0x420f
struct rseq_configuration {
    uint64_t area;
    uint32_t area_bytes;
    uint32_t signature;
    uint32_t flags;
    uint32_t unused;
};
struct rseq_section {
    uint32_t version;
    uint32_t flags;
    uint64_t start;
    uint64_t length;
    uint64_t abort;
};
#define RSEQ_SECTION_OFFSET 8 /* of the pointer to the section in the registered area */

static bool read_word_of(int tid, uint64_t address, void *out, size_t length) {
    struct iovec local = {.iov_base = out, .iov_len = length};
    struct iovec remote = {.iov_base = (void *)address, .iov_len = length};
    return process_vm_readv(tid, &local, 1, &remote, 1, 0) == (ssize_t)length;
}

bool fl_arch_in_rseq(int tid, const struct fl_registers *registers) {
    const struct user_regs_struct *regs = user_const(registers);
    struct rseq_configuration configuration = {0};
    struct rseq_section section;
    uint64_t pointer = 0;
    if ((int64_t)regs->orig_rax >= 0) {
        return false; /* in a system call, which such a section must not make */
    }
    if (ptrace(GET_RSEQ_CONFIGURATION, tid, sizeof(configuration), &configuration) < 0 || configuration.area == 0 ||
        !read_word_of(tid, configuration.area + RSEQ_SECTION_OFFSET, &pointer, sizeof(pointer)) || pointer == 0 ||
        !read_word_of(tid, pointer, &section, sizeof(section))) {
        return false;
    }
    return regs->rip - section.start < section.length;
}

/* Indexes into fl_gate_slot.saved; the code below has them as byte offsets 16 + 8 * index. */
enum { RIP, FLAGS, RBX, R15, R14, R13, R12, RBP, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI };

_Static_assert(offsetof(struct fl_gate_slot, state) == 0, "as the code has it");
_Static_assert(offsetof(struct fl_gate_slot, count) == 4, "as the code has it");
_Static_assert(offsetof(struct fl_gate_slot, saved) == 16, "as the code has it");
_Static_assert(offsetof(struct fl_gate_slot, calls) == 160, "as the code has it");
_Static_assert(offsetof(struct fl_gate_call, result) == 56 && sizeof(struct fl_gate_call) == 64, "as the code has it");
_Static_assert(sizeof(struct fl_gate_slot) <= FL_GATE_SLOT_BYTES, "a slot's room");

/*
 * Entered with the slot in rbx and the stack pointer just below the red zone of the thread's own stack, where a
 * signal handler that interrupts us has all the room it always has. What is needed after the slot has been given
 * back (the thread's rbx, flags and address) is put on that stack first: from the moment the state is FREE, another
 * run may take the slot even though this one, interrupted by a signal, is not quite through.
 */
__asm__(".pushsection .rodata.fl_gate, \"a\", @progbits\n"
        ".balign 16\n"
        "fl_gate_begin:\n"
        "    movl $2, 0(%rbx)\n"     /* RUNNING */
        "    pushq 16(%rbx)\n"       /* rip */
        "    pushq 24(%rbx)\n"       /* flags */
        "    pushq 32(%rbx)\n"       /* rbx */
        "    leaq 160(%rbx), %r12\n" /* first call */
        "    movl 4(%rbx), %r13d\n"  /* how many */
        "1:  testl %r13d, %r13d\n"
        "    jz 2f\n"
        "    movq 0(%r12), %rax\n"
        "    movq 8(%r12), %rdi\n"
        "    movq 16(%r12), %rsi\n"
        "    movq 24(%r12), %rdx\n"
        "    movq 32(%r12), %r10\n"
        "    movq 40(%r12), %r8\n"
        "    movq 48(%r12), %r9\n"
        "    syscall\n"
        "    movq %rax, 56(%r12)\n"
        "    addq $64, %r12\n"
        "    decl %r13d\n"
        "    jmp 1b\n"
        "2:  movq 40(%rbx), %r15\n"
        "    movq 48(%rbx), %r14\n"
        "    movq 56(%rbx), %r13\n"
        "    movq 64(%rbx), %r12\n"
        "    movq 72(%rbx), %rbp\n"
        "    movq 80(%rbx), %r11\n"
        "    movq 88(%rbx), %r10\n"
        "    movq 96(%rbx), %r9\n"
        "    movq 104(%rbx), %r8\n"
        "    movq 112(%rbx), %rax\n"
        "    movq 120(%rbx), %rcx\n"
        "    movq 128(%rbx), %rdx\n"
        "    movq 136(%rbx), %rsi\n"
        "    movq 144(%rbx), %rdi\n"
        "    movl $0, 0(%rbx)\n" /* FREE: nothing of the slot is read below */
        "    popq %rbx\n"
        "    popfq\n"
        "    ret $128\n" /* to the saved rip, over the red zone */
        "fl_gate_end:\n"
        ".popsection\n");

extern const unsigned char fl_gate_begin[];
extern const unsigned char fl_gate_end[];

const void *fl_arch_gate_code(size_t *length) {
    *length = (size_t)(fl_gate_end - fl_gate_begin);
    return fl_gate_begin;
}

/* What the kernel would do when the thread goes on with no signal to handle. */
static void restart_call(struct user_regs_struct *regs) {
    if ((int64_t)regs->orig_rax < 0) {
        return;
    }
    switch (-(int64_t)regs->rax) {
    case ERESTARTSYS:
    case ERESTARTNOINTR:
    case ERESTARTNOHAND:
        regs->rax = regs->orig_rax;
        regs->rip -= 2;
        break;
    case ERESTART_RESTARTBLOCK:
        regs->rax = SYS_restart_syscall;
        regs->rip -= 2;
        break;
    default:
        break;
    }
}

void fl_arch_gate_enter(struct fl_registers *registers, uint64_t gate_code, uint64_t slot_address,
                        struct fl_gate_slot *slot) {
    struct user_regs_struct *regs = user(registers);
    uint64_t *saved = slot->saved;
    restart_call(regs);
    saved[RIP] = regs->rip;
    saved[FLAGS] = regs->eflags;
    saved[RBX] = regs->rbx;
    saved[R15] = regs->r15;
    saved[R14] = regs->r14;
    saved[R13] = regs->r13;
    saved[R12] = regs->r12;
    saved[RBP] = regs->rbp;
    saved[R11] = regs->r11;
    saved[R10] = regs->r10;
    saved[R9] = regs->r9;
    saved[R8] = regs->r8;
    saved[RAX] = regs->rax;
    saved[RCX] = regs->rcx;
    saved[RDX] = regs->rdx;
    saved[RSI] = regs->rsi;
    saved[RDI] = regs->rdi;
    regs->rip = gate_code;
    regs->rsp -= RED_ZONE;
    regs->rbx = slot_address;
    regs->eflags = CLEAN_FLAGS;
    regs->orig_rax = (uint64_t)-1;
}

uint64_t fl_arch_free_stack(const struct fl_registers *registers) {
    return user_const(registers)->rsp - RED_ZONE;
}

uint64_t fl_arch_gate_stack(const struct fl_registers *registers, size_t *length) {
    *length = 3 * sizeof(uint64_t);
    return fl_arch_free_stack(registers) - *length;
}
