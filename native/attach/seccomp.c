/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/seccomp.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/ptrace.h>

#define NOT_UNDERSTOOD (-1)

int fl_seccomp_read(int tid, struct fl_seccomp_filters *out) {
    out->count = 0;
    out->start[0] = 0;
    for (uint32_t i = 0;; i++) {
        uint32_t used = out->start[i];
        long length = ptrace(PTRACE_SECCOMP_GET_FILTER, tid, (void *)(uintptr_t)i, NULL);
        if (length < 0) {
            /* ENOENT ends the list; EINVAL says that there is none. */
            return errno == ENOENT || (errno == EINVAL && i == 0) ? 0 : -errno;
        }
        if (i == FL_SECCOMP_FILTERS_MAX || (uint64_t)length > FL_SECCOMP_INSTRUCTIONS_MAX - used) {
            return -E2BIG;
        }
        if (ptrace(PTRACE_SECCOMP_GET_FILTER, tid, (void *)(uintptr_t)i, out->instructions + used) != length) {
            return -errno;
        }
        out->start[i + 1] = used + (uint32_t)length;
        out->count = i + 1;
    }
}

static bool compute(uint16_t code, uint32_t *a, uint32_t operand) {
    switch (BPF_OP(code)) {
    case BPF_ADD:
        *a += operand;
        return true;
    case BPF_SUB:
        *a -= operand;
        return true;
    case BPF_MUL:
        *a *= operand;
        return true;
    case BPF_DIV:
        *a = operand ? *a / operand : 0;
        return true;
    case BPF_AND:
        *a &= operand;
        return true;
    case BPF_OR:
        *a |= operand;
        return true;
    case BPF_XOR:
        *a ^= operand;
        return true;
    case BPF_LSH:
        *a = operand < 32 ? *a << operand : 0;
        return operand < 32;
    case BPF_RSH:
        *a = operand < 32 ? *a >> operand : 0;
        return operand < 32;
    case BPF_NEG:
        *a = 0u - *a;
        return true;
    default:
        return false;
    }
}

/* How far a jump goes; -1: not understood. */
static int64_t jump(const struct sock_filter *at, uint32_t a, uint32_t operand) {
    switch (BPF_OP(at->code)) {
    case BPF_JA:
        return at->k;
    case BPF_JEQ:
        return a == operand ? at->jt : at->jf;
    case BPF_JGT:
        return a > operand ? at->jt : at->jf;
    case BPF_JGE:
        return a >= operand ? at->jt : at->jf;
    case BPF_JSET:
        return a & operand ? at->jt : at->jf;
    default:
        return NOT_UNDERSTOOD;
    }
}

static bool load(const struct sock_filter *at, const struct seccomp_data *data, const uint32_t *memory, uint32_t *out) {
    switch (BPF_MODE(at->code)) {
    case BPF_ABS:
        if (at->k > sizeof(*data) - 4 || at->k % 4) {
            return false;
        }
        memcpy(out, (const char *)data + at->k, 4);
        return true;
    case BPF_IMM:
        *out = at->k;
        return true;
    case BPF_LEN:
        *out = sizeof(*data);
        return true;
    case BPF_MEM:
        *out = memory[at->k % BPF_MEMWORDS];
        return at->k < BPF_MEMWORDS;
    default:
        return false;
    }
}

/* Filters only jump forward, so this ends. */
static int64_t run(const struct sock_filter *filter, uint32_t length, const struct seccomp_data *data) {
    uint32_t memory[BPF_MEMWORDS] = {0};
    uint32_t a = 0;
    uint32_t x = 0;
    for (uint64_t i = 0; i < length; i++) {
        const struct sock_filter *at = &filter[i];
        uint32_t operand = BPF_SRC(at->code) == BPF_X ? x : at->k;
        bool known = true;
        int64_t distance = 0;
        switch (BPF_CLASS(at->code)) {
        case BPF_LD:
            known = load(at, data, memory, &a);
            break;
        case BPF_LDX:
            known = BPF_MODE(at->code) != BPF_ABS && load(at, data, memory, &x);
            break;
        case BPF_ST:
        case BPF_STX:
            known = at->k < BPF_MEMWORDS;
            memory[at->k % BPF_MEMWORDS] = BPF_CLASS(at->code) == BPF_ST ? a : x;
            break;
        case BPF_ALU:
            known = compute(at->code, &a, operand);
            break;
        case BPF_JMP:
            distance = jump(at, a, operand);
            known = distance >= 0;
            i += known ? (uint64_t)distance : 0;
            break;
        case BPF_RET:
            return BPF_RVAL(at->code) == BPF_A ? a : at->k;
        case BPF_MISC:
            if (BPF_MISCOP(at->code) == BPF_TAX) {
                x = a;
            } else {
                a = x;
            }
            break;
        default:
            known = false;
        }
        if (!known) {
            return NOT_UNDERSTOOD;
        }
    }
    return NOT_UNDERSTOOD;
}

/* The kernel takes the lowest action as a signed number: KILL_PROCESS is the most negative. */
static int32_t rank(int64_t verdict) {
    return (int32_t)(uint32_t)((uint64_t)verdict & SECCOMP_RET_ACTION_FULL);
}

int64_t fl_seccomp_verdict(const struct fl_seccomp_filters *filters, uint64_t nr, uint32_t audit_arch,
                           uint64_t instruction, const uint64_t args[6]) {
    struct seccomp_data data = {.nr = (int)nr, .arch = audit_arch, .instruction_pointer = instruction};
    memcpy(data.args, args, sizeof(data.args));
    int64_t strictest = SECCOMP_RET_ALLOW;
    for (uint32_t i = filters->count; i-- > 0;) { /* the newest first: of equals, the kernel takes its data */
        int64_t verdict =
            run(filters->instructions + filters->start[i], filters->start[i + 1] - filters->start[i], &data);
        if (verdict == NOT_UNDERSTOOD) {
            return NOT_UNDERSTOOD;
        }
        if (rank(verdict) < rank(strictest)) {
            strictest = verdict;
        }
    }
    return strictest;
}

bool fl_seccomp_allows(int64_t verdict) {
    if (verdict < 0) {
        return false;
    }
    uint32_t action = (uint32_t)verdict & SECCOMP_RET_ACTION_FULL;
    return action == SECCOMP_RET_ALLOW || action == SECCOMP_RET_LOG;
}

const char *fl_seccomp_verdict_text(int64_t verdict) {
    if (verdict < 0) {
        return "is written in a way that is not understood";
    }
    switch ((uint32_t)verdict & SECCOMP_RET_ACTION_FULL) {
    case SECCOMP_RET_ALLOW:
    case SECCOMP_RET_LOG:
        return "allows it";
    case SECCOMP_RET_KILL_PROCESS:
        return "kills the process for it";
    case SECCOMP_RET_KILL_THREAD:
        return "kills the thread for it";
    case SECCOMP_RET_TRAP:
        return "sends SIGSYS for it";
    case SECCOMP_RET_ERRNO:
        return "answers it with an error";
    case SECCOMP_RET_USER_NOTIF:
        return "hands it to a supervisor";
    case SECCOMP_RET_TRACE:
        return "hands it to a tracer";
    default:
        return "answers it in an unknown way";
    }
}
