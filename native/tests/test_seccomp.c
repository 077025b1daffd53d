/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Our reading of seccomp filters against the kernel's: hundreds of random programs, several at a time, are installed in
 * a process that then makes the call; what it gets must be what was foretold. And: filters are read from a tracee as
 * they were installed.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "attach/seccomp.h"
#include "attach/tracee.h"
#include "attach_target.h"

#define LENGTH 24
#define CALL SYS_getppid /* takes no arguments, so that they can be anything */

static uint32_t random32(uint64_t *random) {
    return (uint32_t)target_random(random);
}

/* One instruction that the kernel's checker accepts at `at` of LENGTH; some loads look at the arguments. */
static struct sock_filter random_instruction(uint64_t *random, uint32_t at) {
    static const uint16_t alu[] = {BPF_ADD, BPF_SUB, BPF_MUL, BPF_AND, BPF_OR, BPF_XOR};
    static const uint16_t jumps[] = {BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET};
    uint32_t left = LENGTH - 2 - at; /* a jump may go so far; the last two return */
    uint32_t small = random32(random) % 8;
    uint16_t source = random32(random) % 2 ? BPF_X : BPF_K;
    switch (random32(random) % 12) {
    case 0:
    case 1:
        return (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                            4 * (random32(random) % (sizeof(struct seccomp_data) / 4)));
    case 2:
        return (struct sock_filter)BPF_STMT(BPF_ALU | alu[random32(random) % 6] | source, small);
    case 3:
        return (struct sock_filter)BPF_STMT(BPF_ALU | (random32(random) % 2 ? BPF_LSH : BPF_RSH) | BPF_K, small);
    case 4:
        return (struct sock_filter)BPF_STMT(BPF_ALU | BPF_DIV | BPF_K, small + 1);
    case 5:
        return (struct sock_filter)BPF_STMT(BPF_ALU | BPF_NEG, 0);
    case 6:
        return (struct sock_filter)BPF_STMT(BPF_MISC | (random32(random) % 2 ? BPF_TAX : BPF_TXA), 0);
    case 7:
        return (struct sock_filter)BPF_STMT((random32(random) % 2 ? BPF_LD : BPF_LDX) | BPF_W | BPF_LEN, 0);
    case 8:
        return (struct sock_filter)BPF_STMT((random32(random) % 2 ? BPF_LD : BPF_LDX) | BPF_IMM, random32(random) % 64);
    case 9:
        return (struct sock_filter)BPF_STMT(BPF_ST, small % BPF_MEMWORDS);
    case 10:
        return (struct sock_filter)BPF_STMT(BPF_JMP | BPF_JA, random32(random) % (left + 1));
    default:
        return (struct sock_filter)BPF_JUMP(BPF_JMP | jumps[random32(random) % 4] | source, small,
                                            (uint8_t)(random32(random) % (left + 1)),
                                            (uint8_t)(random32(random) % (left + 1)));
    }
}

/* Only the call that is tried out meets the random part; the rest of the process has to live. */
static void random_filter(uint64_t *random, struct sock_filter out[LENGTH]) {
    out[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    out[1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CALL, 0, LENGTH - 3);
    for (uint32_t i = 2; i < LENGTH - 2; i++) {
        out[i] = random_instruction(random, i);
    }
    /* An error whose number is made of what was computed, so that every difference shows. */
    static const uint32_t actions[] = {SECCOMP_RET_ERRNO | 7, SECCOMP_RET_ERRNO | 9, SECCOMP_RET_ALLOW,
                                       SECCOMP_RET_LOG,       SECCOMP_RET_TRACE,     SECCOMP_RET_KILL_PROCESS};
    out[2 + random32(random) % 18] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, actions[random32(random) % 6]);
    out[2 + random32(random) % 18] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, actions[random32(random) % 6]);
    out[LENGTH - 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, actions[random32(random) % 6]);
    out[LENGTH - 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
}

/* CALL with these arguments, or a negative errno. The address behind the instruction is what a filter is told. */
long call(const uint64_t args[6]);
extern const char behind_call[];
__asm__(".text\n"
        ".type call, @function\n"
        "call:\n"
        "	mov 40(%rdi), %r9\n"
        "	mov 32(%rdi), %r8\n"
        "	mov 24(%rdi), %r10\n"
        "	mov 16(%rdi), %rdx\n"
        "	mov 8(%rdi), %rsi\n"
        "	mov (%rdi), %rdi\n"
        "	mov $110, %eax\n"
        "	syscall\n"
        "behind_call:\n"
        "	ret\n"
        ".size call, . - call\n");
_Static_assert(CALL == 110, "the number in call()");

/* Exit code of a process that installs the filters and makes the call: 0 for a result, 100 + errno, 250 not installed. */
static int kernel_says(struct sock_filter (*filters)[LENGTH], uint32_t count, const uint64_t args[6]) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_DUMPABLE, 0); /* being killed is normal here */
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        for (uint32_t i = 0; i < count; i++) {
            struct sock_fprog program = {.len = LENGTH, .filter = filters[i]};
            if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) {
                _exit(250);
            }
        }
        long result = call(args);
        _exit(result >= 0 ? 0 : 100 - (int)result);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int we_say(struct sock_filter (*filters)[LENGTH], uint32_t count, const uint64_t args[6]) {
    static struct fl_seccomp_filters read;
    read.count = count;
    for (uint32_t i = 0; i < count; i++) {
        read.start[i] = i * LENGTH;
        read.start[i + 1] = (i + 1) * LENGTH;
        memcpy(read.instructions + read.start[i], filters[i], sizeof(filters[i]));
    }
    int64_t verdict = fl_seccomp_verdict(&read, CALL, AUDIT_ARCH_X86_64, (uint64_t)(uintptr_t)behind_call, args);
    MUST(verdict >= 0, "not understood");
    switch ((uint32_t)verdict & SECCOMP_RET_ACTION_FULL) {
    case SECCOMP_RET_KILL_PROCESS:
        return -SIGSYS;
    case SECCOMP_RET_ERRNO:
        return 100 + (int)(verdict & SECCOMP_RET_DATA);
    case SECCOMP_RET_TRACE:
        return 100 + ENOSYS; /* nobody traces it */
    default:
        MUST(fl_seccomp_allows(verdict), "verdict %llx", (unsigned long long)verdict);
        return 0;
    }
}

static void against_the_kernel(uint64_t *random, unsigned rounds) {
    unsigned outcomes[4] = {0};
    for (unsigned i = 0; i < rounds; i++) {
        struct sock_filter filters[3][LENGTH];
        uint32_t count = 1 + random32(random) % 3;
        uint64_t args[6];
        for (size_t k = 0; k < 6; k++) {
            args[k] = target_random(random) % 16;
        }
        for (uint32_t k = 0; k < count; k++) {
            random_filter(random, filters[k]);
        }
        int kernel = kernel_says(filters, count, args);
        MUST(kernel != 250, "round %u: the kernel does not take the program", i);
        int ours = we_say(filters, count, args);
        MUST(kernel == ours, "round %u: the kernel says %d, we say %d", i, kernel, ours);
        outcomes[kernel == 0 ? 0 : kernel < 0 ? 1 : kernel == 100 + ENOSYS ? 2 : 3]++;
    }
    printf("%u programs: %u let through, %u killed, %u for a tracer, %u errors\n", rounds, outcomes[0], outcomes[1],
           outcomes[2], outcomes[3]);
    MUST(outcomes[0] && outcomes[1] && outcomes[2] && outcomes[3], "not every outcome was seen");
}

static void read_from_tracee(uint64_t *random) {
    static struct sock_filter filters[3][LENGTH];
    static struct fl_seccomp_filters found;
    int ready[2];
    char byte = 0;
    for (size_t i = 0; i < 3; i++) {
        random_filter(random, filters[i]);
    }
    MUST(pipe(ready) == 0, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        for (size_t i = 0; i < 3; i++) {
            struct sock_fprog program = {.len = LENGTH, .filter = filters[i]};
            syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
        }
        if (write(ready[1], &byte, 1) != 1) {
            _exit(1);
        }
        for (;;) {
            pause();
        }
    }
    MUST(read(ready[0], &byte, 1) == 1, "the tracee did not start");
    MUST(fl_tracee_seize(pid) == 0 && fl_tracee_stop(pid, 1000000000u) == 0, "stop");
    MUST(fl_seccomp_read(pid, &found) == 0, "read the filters");
    MUST(found.count == 3, "%u filters", found.count);
    for (uint32_t i = 0; i < 3; i++) {
        MUST(found.start[i + 1] - found.start[i] == LENGTH, "filter %u has another length", i);
    }
    MUST(memcmp(found.instructions, filters, sizeof(filters)) == 0, "the filters are others, or in another order");
    kill(pid, SIGKILL);
    waitpid(pid, NULL, __WALL);
    close(ready[0]);
    close(ready[1]);
}

int main(int argc, char **argv) {
    target_need_root();
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    uint64_t random = seed;
    printf("seed %llu\n", (unsigned long long)seed);
    against_the_kernel(&random, target_rounds(1500, 150));
    read_from_tracee(&random);
    return 0;
}
