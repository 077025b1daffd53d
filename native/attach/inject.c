/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/inject.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach/proc.h"
#include "attach/tracee.h"

#define STOP_LIMIT_NS 50000000u
#define GO_LIMIT_MS 1000

/* What the VMM needs to receive the descriptors: all of it is in one page mapped for the purpose. */
struct scratch {
    int32_t socket[2];
    struct iovec iov;
    struct msghdr message;
    char byte[8];
    _Alignas(8) char control[CMSG_SPACE(2 * sizeof(int))];
};

struct injection {
    struct fl_inject_job *job;
    struct fl_registers saved;
    uint64_t signal_mask;
    bool gone;
    /* in the VMM so far; 0 and -1: not there */
    uint64_t scratch;
    uint64_t gate;
    int32_t socket[2];
    int32_t device;
    int32_t vault;
    int32_t uffd;
    int end; /* our own descriptor of socket[0] */
};

const char *fl_inject_step_text(uint32_t step) {
    static const char *const texts[] = {
        [FL_STEP_NONE] = "nothing",
        [FL_STEP_SEIZE] = "PTRACE_SEIZE",
        [FL_STEP_STOP] = "PTRACE_INTERRUPT",
        [FL_STEP_REGISTERS] = "PTRACE_SETREGSET",
        [FL_STEP_SECCOMP] = "PTRACE_SECCOMP_GET_FILTER",
        [FL_STEP_MMAP_SCRATCH] = "mmap of a scratch page",
        [FL_STEP_SOCKETPAIR] = "socketpair",
        [FL_STEP_GETFD] = "pidfd_getfd",
        [FL_STEP_SENDMSG] = "sendmsg of the descriptors",
        [FL_STEP_RECVMSG] = "recvmsg of the descriptors",
        [FL_STEP_USERFAULTFD] = "userfaultfd",
        [FL_STEP_MMAP_GATE] = "mmap of the gate",
        [FL_STEP_MMAP_GATE_CODE] = "mmap of the gate's code",
        [FL_STEP_CLOSE] = "close",
        [FL_STEP_MUNMAP] = "munmap",
        [FL_STEP_MADVISE] = "madvise",
    };
    return step < sizeof(texts) / sizeof(texts[0]) ? texts[step] : "unknown step";
}

static int fail(struct injection *in, uint32_t refusal, uint32_t step, int error) {
    struct fl_inject_job *job = in->job;
    if (job->refusal == FL_REFUSAL_NONE) {
        job->refusal = error == -ESRCH ? FL_REFUSAL_GONE : refusal;
        job->step = step;
        job->error = error;
    }
    return -1;
}

/* Would the VMM's filters let this call through? */
static int ask(struct injection *in, uint32_t step, uint64_t nr, const uint64_t args[6]) {
    struct fl_inject_job *job = in->job;
    int64_t verdict = fl_seccomp_verdict(&job->filters, nr, fl_arch_audit(), job->instruction, args);
    if (fl_seccomp_allows(verdict)) {
        return 0;
    }
    if (job->refusal == FL_REFUSAL_NONE) {
        job->verdict = verdict;
        job->verdict_step = step;
    }
    return fail(in, FL_REFUSAL_SECCOMP, FL_STEP_SECCOMP, -EPERM);
}

/* One system call in the VMM. Negative errno as the kernel returned it; -ESRCH and in->gone when the VMM ended. */
static int64_t call(struct injection *in, uint32_t step, uint64_t nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                    uint64_t e, uint64_t f) {
    const uint64_t args[6] = {a, b, c, d, e, f};
    struct fl_registers registers = in->saved;
    if (in->gone) {
        return -ESRCH;
    }
    if (ask(in, step, nr, args)) {
        return -EPERM;
    }
    fl_arch_prepare_call(&registers, in->job->instruction, nr, args);
    if (fl_arch_set(in->job->pid, &registers) || fl_tracee_step_call(in->job->pid) ||
        fl_arch_get(in->job->pid, &registers)) {
        in->gone = true;
        return -ESRCH;
    }
    return fl_arch_result(&registers);
}

static uint32_t refusal_for(int64_t result) {
    return result == -EPERM || result == -EACCES ? FL_REFUSAL_PERMISSION : FL_REFUSAL_INTERNAL;
}

static int copy(struct injection *in, void *local, uint64_t remote, size_t length, bool to_vmm) {
    struct iovec ours = {.iov_base = local, .iov_len = length};
    struct iovec theirs = {.iov_base = (void *)remote, .iov_len = length};
    int pid = in->job->pid;
    ssize_t moved =
        to_vmm ? process_vm_writev(pid, &ours, 1, &theirs, 1, 0) : process_vm_readv(pid, &ours, 1, &theirs, 1, 0);
    return moved == (ssize_t)length ? 0 : (moved < 0 ? -errno : -EFAULT);
}

static int close_in_vmm(struct injection *in, int32_t *fd) {
    if (*fd < 0) {
        return 0;
    }
    int64_t result = call(in, FL_STEP_CLOSE, SYS_close, (uint64_t)*fd, 0, 0, 0, 0, 0);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_CLOSE, (int)result);
    }
    *fd = -1;
    return 0;
}

static int unmap_in_vmm(struct injection *in, uint64_t *address, uint64_t length) {
    if (*address == 0) {
        return 0;
    }
    int64_t result = call(in, FL_STEP_MUNMAP, SYS_munmap, *address, length, 0, 0, 0, 0);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_MUNMAP, (int)result);
    }
    *address = 0;
    return 0;
}

/* A scratch page and a pair of sockets in the VMM, one of whose ends is ours as well. */
static int open_channel(struct injection *in) {
    int64_t result = call(in, FL_STEP_MMAP_SCRATCH, SYS_mmap, 0, FL_PAGE_SIZE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_MMAP_SCRATCH, (int)result);
    }
    in->scratch = (uint64_t)result;
    result = call(in, FL_STEP_SOCKETPAIR, SYS_socketpair, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0,
                  in->scratch + offsetof(struct scratch, socket), 0, 0);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_SOCKETPAIR, (int)result);
    }
    int error = copy(in, in->socket, in->scratch + offsetof(struct scratch, socket), sizeof(in->socket), false);
    if (error) {
        in->job->leftovers += 2; /* nobody knows their numbers; cannot happen with memory just written to */
        return fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SOCKETPAIR, error);
    }
    in->end = (int)syscall(SYS_pidfd_getfd, in->job->pidfd, in->socket[0], 0);
    if (in->end < 0) {
        error = -errno;
        return fail(in, refusal_for(error), FL_STEP_GETFD, error);
    }
    return 0;
}

static int send_descriptors(struct injection *in) {
    struct fl_inject_job *job = in->job;
    int descriptors[2] = {job->vault_fd, job->device_fd};
    size_t length = (job->device_fd < 0 ? 1 : 2) * sizeof(int);
    struct scratch ours = {.byte = "f"};
    struct iovec iov = {.iov_base = ours.byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = ours.control};
    message.msg_controllen = CMSG_SPACE(length);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(length);
    memcpy(CMSG_DATA(header), descriptors, length);
    if (sendmsg(in->end, &message, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
        int error = -errno;
        return fail(in, refusal_for(error), FL_STEP_SENDMSG, error);
    }
    /* The same structures, for the VMM to receive it with. */
    struct scratch theirs = {.iov = {.iov_base = (void *)(in->scratch + offsetof(struct scratch, byte)), .iov_len = 1}};
    theirs.message.msg_iov = (void *)(in->scratch + offsetof(struct scratch, iov));
    theirs.message.msg_iovlen = 1;
    theirs.message.msg_control = (void *)(in->scratch + offsetof(struct scratch, control));
    theirs.message.msg_controllen = sizeof(theirs.control);
    int error = copy(in, &theirs, in->scratch, sizeof(theirs), true);
    return error ? fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SENDMSG, error) : 0;
}

static int receive_descriptors(struct injection *in) {
    struct scratch theirs;
    int32_t numbers[2] = {-1, -1};
    int64_t result = call(in, FL_STEP_RECVMSG, SYS_recvmsg, (uint64_t)in->socket[1],
                          in->scratch + offsetof(struct scratch, message), MSG_CMSG_CLOEXEC | MSG_DONTWAIT, 0, 0, 0);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_RECVMSG, (int)result);
    }
    int error = copy(in, &theirs, in->scratch, sizeof(theirs), false);
    if (error) {
        return fail(in, FL_REFUSAL_INTERNAL, FL_STEP_RECVMSG, error);
    }
    /* With too few free descriptor numbers the kernel hands over what it can; that much has to be closed again. */
    struct cmsghdr header;
    memcpy(&header, theirs.control, sizeof(header));
    size_t got = 0;
    if (theirs.message.msg_controllen >= sizeof(header) && header.cmsg_type == SCM_RIGHTS &&
        header.cmsg_len >= CMSG_LEN(0) && header.cmsg_len <= CMSG_LEN(sizeof(numbers))) {
        got = (header.cmsg_len - CMSG_LEN(0)) / sizeof(int32_t);
        memcpy(numbers, theirs.control + CMSG_LEN(0), got * sizeof(int32_t));
    }
    in->vault = numbers[0];
    in->device = numbers[1];
    size_t wanted = in->job->device_fd < 0 ? 1 : 2;
    return got == wanted ? 0 : fail(in, FL_REFUSAL_INTERNAL, FL_STEP_RECVMSG, -EMFILE);
}

static int make_userfaultfd(struct injection *in) {
    int64_t result = -ENOTTY;
    if (in->device >= 0) {
        result = call(in, FL_STEP_USERFAULTFD, SYS_ioctl, (uint64_t)in->device, USERFAULTFD_IOC_NEW,
                      O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
    }
    if (in->device < 0 || result == -ENOTTY) {
        result = call(in, FL_STEP_USERFAULTFD, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0, 0, 0, 0);
    }
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_USERFAULTFD, (int)result);
    }
    in->uffd = (int32_t)result;
    return 0;
}

static int map_gate(struct injection *in) {
    uint64_t offset = in->job->gate_offset;
    int64_t result = call(in, FL_STEP_MMAP_GATE, SYS_mmap, 0, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                          (uint64_t)in->vault, offset);
    if (result < 0) {
        return fail(in, refusal_for(result), FL_STEP_MMAP_GATE, (int)result);
    }
    in->gate = (uint64_t)result;
    result = call(in, FL_STEP_MMAP_GATE_CODE, SYS_mmap, in->gate, FL_GATE_CODE_BYTES, PROT_READ | PROT_EXEC,
                  MAP_SHARED | MAP_FIXED, (uint64_t)in->vault, offset);
    return result < 0 ? fail(in, refusal_for(result), FL_STEP_MMAP_GATE_CODE, (int)result) : 0;
}

static int close_channel(struct injection *in) {
    int error = close_in_vmm(in, &in->device);
    error |= close_in_vmm(in, &in->socket[0]);
    error |= close_in_vmm(in, &in->socket[1]);
    error |= unmap_in_vmm(in, &in->scratch, FL_PAGE_SIZE);
    return error;
}

static void take_back(struct injection *in) {
    int failed = close_in_vmm(in, &in->uffd) ? 1 : 0;
    failed += unmap_in_vmm(in, &in->gate, FL_GATE_BYTES) ? 1 : 0;
    failed += close_in_vmm(in, &in->vault) ? 1 : 0;
    failed += close_channel(in) ? 1 : 0;
    if (!in->gone) {
        in->job->leftovers += (uint32_t)failed;
    }
}

static void put_in(struct injection *in) {
    if (open_channel(in) || send_descriptors(in) || receive_descriptors(in) || make_userfaultfd(in) || map_gate(in) ||
        close_channel(in)) {
        take_back(in);
        return;
    }
    in->job->attachment.vmm_uffd = in->uffd;
    in->job->attachment.vmm_vault = in->vault;
    in->job->attachment.gate_code = in->gate;
    in->job->attachment.gate_data = in->gate + FL_GATE_CODE_BYTES;
}

/* Every call that will be made, with arguments of the kind it will have. A filter may kill: nobody tries that out. */
static int ask_about_all(struct injection *in) {
    const struct fl_inject_job *job = in->job;
    const uint64_t page = job->instruction & ~(uint64_t)(FL_PAGE_SIZE - 1); /* stands for an address */
    const uint64_t some_fd = 64;
    const struct {
        uint32_t step;
        bool attaching;
        uint64_t nr;
        uint64_t args[6];
    } calls[] = {
        {FL_STEP_MMAP_SCRATCH,
         true,
         SYS_mmap,
         {0, FL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0}},
        {FL_STEP_SOCKETPAIR, true, SYS_socketpair, {AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, page, 0, 0}},
        {FL_STEP_RECVMSG, true, SYS_recvmsg, {some_fd, page, MSG_CMSG_CLOEXEC | MSG_DONTWAIT, 0, 0, 0}},
        {FL_STEP_USERFAULTFD,
         true,
         job->device_fd < 0 ? SYS_userfaultfd : SYS_ioctl,
         {job->device_fd < 0 ? O_CLOEXEC | O_NONBLOCK : some_fd, job->device_fd < 0 ? 0 : USERFAULTFD_IOC_NEW,
          job->device_fd < 0 ? 0 : O_CLOEXEC | O_NONBLOCK, 0, 0, 0}},
        {FL_STEP_MMAP_GATE,
         true,
         SYS_mmap,
         {0, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, some_fd, job->gate_offset}},
        {FL_STEP_MMAP_GATE_CODE,
         true,
         SYS_mmap,
         {page, FL_GATE_CODE_BYTES, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, some_fd, job->gate_offset}},
        {FL_STEP_MADVISE, true, SYS_madvise, {page, FL_PAGE_SIZE, MADV_DONTNEED, 0, 0, 0}},
        {FL_STEP_CLOSE, false, SYS_close, {some_fd, 0, 0, 0, 0, 0}},
        {FL_STEP_MUNMAP, false, SYS_munmap, {page, FL_PAGE_SIZE, 0, 0, 0, 0}},
    };
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        if ((!calls[i].attaching || job->vault_fd >= 0) && ask(in, calls[i].step, calls[i].nr, calls[i].args)) {
            return -1;
        }
    }
    return 0;
}

static int stop(struct injection *in) {
    int error = fl_tracee_stop(in->job->pid, STOP_LIMIT_NS);
    return error ? fail(in, FL_REFUSAL_STUCK, FL_STEP_STOP, error) : 0;
}

/* A short stop of its own, so that reading and judging the filters does not lengthen the one that counts. */
static int check_seccomp(struct injection *in) {
    struct fl_inject_job *job = in->job;
    if (job->seccomp_mode == 0) {
        return 0;
    }
    if (stop(in)) {
        return -1;
    }
    int error = fl_seccomp_read(job->pid, &job->filters);
    if (fl_tracee_resume(job->pid)) {
        return fail(in, FL_REFUSAL_GONE, FL_STEP_SECCOMP, -ESRCH);
    }
    if (error) {
        return fail(in, FL_REFUSAL_SECCOMP, FL_STEP_SECCOMP, error);
    }
    return ask_about_all(in);
}

/* Filters are only ever added: the same number means the same filters. Older kernels do not say. */
static int seccomp_is_unchanged(struct injection *in) {
    struct fl_proc_status status;
    int error = fl_proc_status(in->job->pid, &status);
    if (error) {
        return fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SECCOMP, error);
    }
    if (status.seccomp_mode != in->job->seccomp_mode || status.seccomp_filters != in->job->seccomp_filters) {
        return fail(in, FL_REFUSAL_STUCK, FL_STEP_SECCOMP, -EAGAIN);
    }
    return 0;
}

static void work_on_stopped(struct injection *in) {
    struct fl_inject_job *job = in->job;
    int error = fl_arch_get(job->pid, &in->saved);
    if (error) {
        fail(in, error == -ENOEXEC ? FL_REFUSAL_KERNEL : FL_REFUSAL_INTERNAL, FL_STEP_REGISTERS, error);
        return;
    }
    bool in_gate = job->attachment.gate_code && fl_arch_pc(&in->saved) - job->attachment.gate_code < FL_GATE_BYTES;
    if (in_gate || fl_arch_in_rseq(job->pid, &in->saved)) {
        fail(in, FL_REFUSAL_STUCK, FL_STEP_REGISTERS, -EAGAIN);
        return;
    }
    if (seccomp_is_unchanged(in)) {
        return;
    }
    error = fl_tracee_block_signals(job->pid, &in->signal_mask);
    if (error) {
        fail(in, FL_REFUSAL_INTERNAL, FL_STEP_REGISTERS, error);
        return;
    }
    if (job->vault_fd >= 0) {
        put_in(in);
    } else {
        take_back(in);
    }
    if (!in->gone && (fl_arch_set(job->pid, &in->saved) || fl_tracee_restore_signals(job->pid, in->signal_mask))) {
        in->gone = true;
    }
    if (in->gone) {
        job->refusal = FL_REFUSAL_NONE; /* that it ended says more than how far we had come */
        fail(in, FL_REFUSAL_GONE, FL_STEP_REGISTERS, -ESRCH);
    }
}

static void stop_and_work(struct injection *in) {
    struct fl_inject_job *job = in->job;
    if (check_seccomp(in) || stop(in)) {
        return; /* our end lets the thread go */
    }
    uint64_t stopped_at_ns = fl_monotonic_ns();
    work_on_stopped(in);
    fl_tracee_detach(job->pid);
    job->attachment.stop_ns = fl_monotonic_ns() - stopped_at_ns;
}

/* The pager's descriptors are not ours to keep: locks and sockets would outlive it. */
static void close_others(const struct fl_inject_job *job, int control) {
    const int keep[] = {job->pidfd, job->vault_fd, job->device_fd, control};
    unsigned first = 0;
    for (;;) {
        unsigned next = ~0u; /* lowest descriptor to keep from `first` on */
        for (size_t i = 0; i < sizeof(keep) / sizeof(keep[0]); i++) {
            if (keep[i] >= 0 && (unsigned)keep[i] >= first && (unsigned)keep[i] < next) {
                next = (unsigned)keep[i];
            }
        }
        if (next > first) {
            syscall(SYS_close_range, first, next == ~0u ? ~0u : next - 1, 0);
        }
        if (next == ~0u) {
            return;
        }
        first = next + 1;
    }
}

/* Tell the pager that nobody else can seize the VMM now, and wait for its go-ahead. */
static bool may_go(int control) {
    char byte = 's';
    struct pollfd answer = {.fd = control, .events = POLLIN};
    return send(control, &byte, 1, MSG_NOSIGNAL) == 1 && poll(&answer, 1, GO_LIMIT_MS) == 1 &&
           recv(control, &byte, 1, MSG_DONTWAIT) == 1;
}

_Noreturn void fl_inject_main(struct fl_inject_job *job, int control) {
    struct injection in = {.job = job, .socket = {-1, -1}, .device = -1, .vault = -1, .uffd = -1, .end = -1};
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    setsid();
    close_others(job, control);
    if (job->vault_fd < 0) {
        in.uffd = job->attachment.vmm_uffd;
        in.vault = job->attachment.vmm_vault;
        in.gate = job->attachment.gate_code;
    }
    int error = fl_tracee_seize(job->pid);
    if (error) {
        fail(&in, FL_REFUSAL_PERMISSION, FL_STEP_SEIZE, error);
    } else if (!may_go(control)) {
        fail(&in, FL_REFUSAL_INTERNAL, FL_STEP_SEIZE, -ECANCELED);
    } else {
        stop_and_work(&in);
    }
    __atomic_store_n(&job->done, 1, __ATOMIC_RELEASE);
    _exit(0);
}
