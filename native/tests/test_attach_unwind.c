/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attaching that fails in the middle takes back what was done: the process runs out of descriptors after each one that
 * attaching needs, out of address space, or its seccomp filters forbid a call. And detaching that was done meanwhile by
 * somebody who had been given up.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attach/gate.h"
#include "attach_target.h"
#include "slow.h"

static const struct fl_attachment *undone_first; /* by who was given up, before the next one seizes the process */

static void undo_first(int pid) {
    struct fl_attachment made = *undone_first;
    struct fl_refused why;
    undone_first = NULL;
    if (fl_attach_undo(pid, &made, -1, &why)) {
        fprintf(stderr, "the first one: %s\n", why.detail);
        _exit(1);
    }
}

long ptrace(enum __ptrace_request request, ...) {
    va_list more;
    va_start(more, request);
    int pid = va_arg(more, int);
    void *address = va_arg(more, void *), *data = va_arg(more, void *);
    va_end(more);
    if (request == PTRACE_SEIZE && undone_first) {
        undo_first(pid);
    }
    return syscall(SYS_ptrace, request, pid, address, data);
}

static int attach_patiently(int pid, struct fl_attachment *made, struct fl_refused *why) {
    int vault = target_vault();
    int error = -1;
    for (int i = 0; i < 20; i++) {
        error = fl_attach(pid, vault, TARGET_GATE_OFFSET, made, why);
        if (error == 0 || why->refusal != FL_REFUSAL_STUCK) {
            break;
        }
    }
    close(vault);
    return error;
}

/* Refused with `refusal` and a sentence with `word`; looks the same before and after, and lives. */
static void unwound(struct target *target, uint32_t refusal, const char *word) {
    struct fl_attachment made;
    struct fl_refused why = {0};
    char *before = target_picture(target);
    int error = attach_patiently(target->pid, &made, &why);
    MUST(error == -EPERM && why.refusal == refusal && strstr(why.detail, word), "wanted %s (%s), got %d %s: %s",
         fl_refusal_name(refusal), word, error, fl_refusal_name(why.refusal), why.detail);
    MUST(!strstr(why.detail, "NOT everything"), "%s", why.detail);
    printf("%-10s %s\n", fl_refusal_name(refusal), why.detail);
    char *after = target_picture(target);
    MUST(strcmp(before, after) == 0, "%s\nbefore:\n%s\nafter:\n%s", why.detail, before, after);
    free(before);
    free(after);
    target_lives(target, 3);
}

static void attaches(struct target *target) {
    struct fl_attachment made;
    struct fl_refused why;
    MUST(attach_patiently(target->pid, &made, &why) == 0, "%s", why.detail);
    int error = -1;
    for (int i = 0; i < 20 && error; i++) {
        error = fl_attach_undo(target->pid, &made, -1, &why);
    }
    MUST(error == 0, "%s", why.detail);
    target_lives(target, 3);
}

static void undone_meanwhile(void) {
    struct target target = target_start(TARGET_SPIN, NULL, NULL, NULL);
    struct fl_attachment made;
    struct fl_refused why;
    char *before = target_picture(&target);
    MUST(attach_patiently(target.pid, &made, &why) == 0, "%s", why.detail);
    undone_first = &made;
    int error = fl_attach_undo(target.pid, &made, -1, &why);
    undone_first = NULL;
    MUST(error == 0, "undone meanwhile: %s", why.detail);
    char *after = target_picture(&target);
    MUST(strcmp(before, after) == 0, "before:\n%s\nafter:\n%s", before, after);
    free(before);
    free(after);
    target_lives(&target, 3);
    target_end(&target);
    printf("undone     by somebody who had been given up: nothing is closed twice\n");
}

static rlim_t highest_fd(int pid) {
    rlim_t highest = 0;
    for (int fd = 0; fd < 1024; fd++) {
        char path[64];
        char link[8];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, fd);
        if (readlink(path, link, sizeof(link)) >= 0) {
            highest = (rlim_t)fd;
        }
    }
    return highest;
}

static void close_gaps(void *context) {
    (void)context;
    /* No free numbers below the highest one, so that the limit counts what attaching takes. */
    if (syscall(SYS_close_range, 3, ~0u, 0)) {
        _exit(8);
    }
}

static void out_of_descriptors(void) {
    struct rlimit limit;
    struct rlimit old;
    struct target target = target_start(TARGET_PPOLL, NULL, close_gaps, NULL);
    /* Two sockets, the vault, the device, the userfaultfd: five at the same time. */
    for (rlim_t spare = 0; spare < 5; spare++) {
        MUST(prlimit(target.pid, RLIMIT_NOFILE, NULL, &old) == 0, "prlimit");
        limit = (struct rlimit){.rlim_cur = highest_fd(target.pid) + 1 + spare, .rlim_max = old.rlim_max};
        MUST(prlimit(target.pid, RLIMIT_NOFILE, &limit, NULL) == 0, "prlimit");
        printf("%llu spare: ", (unsigned long long)spare);
        unwound(&target, FL_REFUSAL_INTERNAL, "Too many open files");
        MUST(prlimit(target.pid, RLIMIT_NOFILE, &old, NULL) == 0, "prlimit");
    }
    attaches(&target);
    target_end(&target);
}

static void out_of_address_space(void) {
    struct target target = target_start(TARGET_SLEEP, NULL, NULL, NULL);
    struct rlimit none = {.rlim_cur = 4096, .rlim_max = RLIM_INFINITY};
    struct rlimit old = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
    MUST(prlimit(target.pid, RLIMIT_AS, &none, NULL) == 0, "prlimit");
    unwound(&target, FL_REFUSAL_INTERNAL, "mmap of the gate");
    MUST(prlimit(target.pid, RLIMIT_AS, &old, NULL) == 0, "prlimit");
    attaches(&target);
    target_end(&target);
}

struct filter_choice {
    uint32_t nr;
    uint32_t action;
    int argument; /* -1: whatever; else: only when its low half has one of the bits */
    uint32_t bits;
};

static void install_filter(void *context) {
    const struct filter_choice *choice = context;
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, choice->nr, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)(offsetof(struct seccomp_data, args) +
                                                      8 * (choice->argument < 0 ? 0 : (size_t)choice->argument))),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, choice->bits, 0, choice->argument < 0 ? 0 : 1),
        BPF_STMT(BPF_RET | BPF_K, choice->action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
        _exit(6);
    }
}

static void forbidden(const char *word, struct filter_choice choice) {
    struct target target = target_start(TARGET_FUTEX, NULL, install_filter, &choice);
    unwound(&target, FL_REFUSAL_SECCOMP, word);
    target_end(&target);
}

static void harmless(struct filter_choice choice) {
    struct target target = target_start(TARGET_READ, NULL, install_filter, &choice);
    attaches(&target);
    target_end(&target);
}

static void seccomp(void) {
    forbidden("socketpair it kills the process",
              (struct filter_choice){SYS_socketpair, SECCOMP_RET_KILL_PROCESS, -1, 0});
    forbidden("socketpair it kills the thread", (struct filter_choice){SYS_socketpair, SECCOMP_RET_KILL_THREAD, -1, 0});
    forbidden("recvmsg of the descriptors it sends SIGSYS",
              (struct filter_choice){SYS_recvmsg, SECCOMP_RET_TRAP, -1, 0});
    forbidden("userfaultfd it answers it with an error",
              (struct filter_choice){SYS_ioctl, SECCOMP_RET_ERRNO | EPERM, -1, 0});
    forbidden("gate's code it answers", (struct filter_choice){SYS_mmap, SECCOMP_RET_ERRNO | EACCES, 2, PROT_EXEC});
    forbidden("madvise it hands it to a tracer", (struct filter_choice){SYS_madvise, SECCOMP_RET_TRACE, -1, 0});
    forbidden("munmap it kills", (struct filter_choice){SYS_munmap, SECCOMP_RET_KILL_PROCESS, -1, 0});
    harmless((struct filter_choice){SYS_socketpair, SECCOMP_RET_LOG, -1, 0});
    harmless((struct filter_choice){SYS_ptrace, SECCOMP_RET_KILL_PROCESS, -1, 0});
    harmless((struct filter_choice){SYS_userfaultfd, SECCOMP_RET_KILL_PROCESS, -1, 0});
}

#define GAPS_MAX 64

/* Leaves exactly one gap that the gate fits into, and keeps an address of it on the stack (which is the caller's). */
static void leave_one_gap(void *context) {
    char *area = mmap(NULL, 3 * FL_GATE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *gap = area + FL_GATE_BYTES;
    char *got = NULL;
    if (area == MAP_FAILED || munmap(gap, FL_GATE_BYTES)) {
        _exit(9);
    }
    for (int i = 0; i < GAPS_MAX && got != gap; i++) {
        got = mmap(NULL, FL_GATE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (got != gap || munmap(gap, FL_GATE_BYTES)) {
        _exit(10);
    }
    *(volatile uint64_t *)context = (uint64_t)(uintptr_t)gap + 8;
}

/* An old address on the stack is no reason to believe for ever that the thread might come back to the gate. */
static void stale_address(void) {
    volatile uint64_t stale = 0;
    struct target target = target_start(TARGET_SLEEP, NULL, leave_one_gap, (void *)(uintptr_t)&stale);
    for (int round = 0; round < 3; round++) {
        attaches(&target);
    }
    target_end(&target);
}

int main(void) {
    target_need_root();
    undone_meanwhile();
    out_of_descriptors();
    out_of_address_space();
    stale_address();
    if (SANITIZED) {
        printf("seccomp skipped: a sanitizer's own calls would meet the filters\n");
    } else {
        seccomp();
    }
    return 0;
}
