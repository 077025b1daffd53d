/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/inject_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "attach/tracee.h"

#define STACK_LOOK_BYTES 32768u
/* How many other places are tried for the gate, each twice as far away as the one before. */
#define GATE_PLACES 8u
#define GATE_STRIDE_BYTES (1u << 20)

/*
 * What the VMM needs to receive the descriptors. It lies on the stopped thread's stack, below what is in use and below
 * the red zone, where a signal handler's frame would go: mapping a page for it would lengthen the stop by two calls.
 */
struct scratch {
    int32_t socket[2];
    struct iovec iov;
    struct msghdr message;
    char byte[8];
    _Alignas(8) char control[CMSG_SPACE(2 * sizeof(int))];
};

int fl_inject_fail(struct fl_injection *in, uint32_t refusal, uint32_t step, int error) {
    struct fl_inject_job *job = in->job;
    if (job->refusal == FL_REFUSAL_NONE) {
        job->refusal = error == -ESRCH ? FL_REFUSAL_GONE : refusal;
        job->step = step;
        job->error = error;
    }
    return -1;
}

/* Would the VMM's filters let this call through? */
static int ask(struct fl_injection *in, uint32_t step, uint64_t nr, const uint64_t args[6]) {
    struct fl_inject_job *job = in->job;
    int64_t verdict = fl_seccomp_verdict(&job->filters, nr, fl_arch_audit(), job->instruction, args);
    if (fl_seccomp_allows(verdict)) {
        return 0;
    }
    if (job->refusal == FL_REFUSAL_NONE) {
        job->verdict = verdict;
        job->verdict_step = step;
    }
    return fl_inject_fail(in, FL_REFUSAL_SECCOMP, FL_STEP_SECCOMP, -EPERM);
}

/* One system call in the VMM. Negative errno as the kernel returned it; -ESRCH and in->gone when the VMM ended. */
static int64_t call(struct fl_injection *in, uint32_t step, uint64_t nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
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
    if (fl_arch_set(in->job->pid, &registers) || fl_tracee_step_call(in->job->pid, in->spin) ||
        fl_arch_get(in->job->pid, &registers)) {
        in->gone = true;
        return -ESRCH;
    }
    return fl_arch_result(&registers);
}

static uint32_t refusal_for(int64_t result) {
    return result == -EPERM || result == -EACCES ? FL_REFUSAL_PERMISSION : FL_REFUSAL_INTERNAL;
}

static int copy(struct fl_injection *in, void *local, uint64_t remote, size_t length, bool to_vmm) {
    struct iovec ours = {.iov_base = local, .iov_len = length};
    struct iovec theirs = {.iov_base = (void *)remote, .iov_len = length};
    int pid = in->job->pid;
    ssize_t moved =
        to_vmm ? process_vm_writev(pid, &ours, 1, &theirs, 1, 0) : process_vm_readv(pid, &ours, 1, &theirs, 1, 0);
    return moved == (ssize_t)length ? 0 : (moved < 0 ? -errno : -EFAULT);
}

static int close_in_vmm(struct fl_injection *in, int32_t *fd) {
    if (*fd < 0) {
        return 0;
    }
    int64_t result = call(in, FL_STEP_CLOSE, SYS_close, (uint64_t)*fd, 0, 0, 0, 0, 0);
    if (result < 0) {
        return fl_inject_fail(in, refusal_for(result), FL_STEP_CLOSE, (int)result);
    }
    *fd = -1;
    return 0;
}

static int unmap_in_vmm(struct fl_injection *in, uint64_t *address, uint64_t length) {
    if (*address == 0) {
        return 0;
    }
    int64_t result = call(in, FL_STEP_MUNMAP, SYS_munmap, *address, length, 0, 0, 0, 0);
    if (result < 0) {
        return fl_inject_fail(in, refusal_for(result), FL_STEP_MUNMAP, (int)result);
    }
    *address = 0;
    return 0;
}

static uint64_t scratch_of(const struct fl_injection *in) {
    return (fl_arch_free_stack(&in->saved) - sizeof(struct scratch)) & ~(uint64_t)63;
}

/* A pair of sockets in the VMM, one of whose ends is ours as well. */
static int open_channel(struct fl_injection *in) {
    struct scratch unused;
    int error = copy(in, &unused, scratch_of(in), sizeof(unused), false);
    if (error) {
        return fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_STACK, -EAGAIN);
    }
    uint64_t pair = scratch_of(in) + offsetof(struct scratch, socket);
    int64_t result = call(in, FL_STEP_SOCKETPAIR, SYS_socketpair, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, pair, 0, 0);
    if (result < 0) {
        return fl_inject_fail(in, refusal_for(result), FL_STEP_SOCKETPAIR, (int)result);
    }
    error = copy(in, in->socket, pair, sizeof(in->socket), false);
    if (error) {
        in->job->leftovers += 2; /* nobody knows their numbers; cannot happen with memory just written to */
        return fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SOCKETPAIR, error);
    }
    in->end = (int)syscall(SYS_pidfd_getfd, in->job->pidfd, in->socket[0], 0);
    if (in->end < 0) {
        error = -errno;
        return fl_inject_fail(in, refusal_for(error), FL_STEP_GETFD, error);
    }
    return 0;
}

static int send_descriptors(struct fl_injection *in) {
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
        return fl_inject_fail(in, refusal_for(error), FL_STEP_SENDMSG, error);
    }
    /* The same structures, for the VMM to receive it with. */
    struct scratch theirs = {
        .iov = {.iov_base = (void *)(scratch_of(in) + offsetof(struct scratch, byte)), .iov_len = 1}};
    theirs.message.msg_iov = (void *)(scratch_of(in) + offsetof(struct scratch, iov));
    theirs.message.msg_iovlen = 1;
    theirs.message.msg_control = (void *)(scratch_of(in) + offsetof(struct scratch, control));
    theirs.message.msg_controllen = sizeof(theirs.control);
    int error = copy(in, &theirs, scratch_of(in), sizeof(theirs), true);
    return error ? fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_SENDMSG, error) : 0;
}

static int receive_descriptors(struct fl_injection *in) {
    struct scratch theirs;
    int32_t numbers[2] = {-1, -1};
    int64_t result = call(in, FL_STEP_RECVMSG, SYS_recvmsg, (uint64_t)in->socket[1],
                          scratch_of(in) + offsetof(struct scratch, message), MSG_CMSG_CLOEXEC | MSG_DONTWAIT, 0, 0, 0);
    if (result < 0) {
        return fl_inject_fail(in, refusal_for(result), FL_STEP_RECVMSG, (int)result);
    }
    int error = copy(in, &theirs, scratch_of(in), sizeof(theirs), false);
    if (error) {
        return fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_RECVMSG, error);
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
    return got == wanted ? 0 : fl_inject_fail(in, FL_REFUSAL_INTERNAL, FL_STEP_RECVMSG, -EMFILE);
}

bool fl_inject_may_return_to_gate(const struct fl_injection *in) {
    static uint64_t stack[STACK_LOOK_BYTES / sizeof(uint64_t)];
    struct iovec local = {.iov_base = stack, .iov_len = sizeof(stack)};
    struct iovec remote = {.iov_base = (void *)fl_arch_free_stack(&in->saved), .iov_len = sizeof(stack)};
    ssize_t got = -1;
    while (remote.iov_len >= 4096 && got < 0) { /* less of it near the stack's end */
        got = process_vm_readv(in->job->pid, &local, 1, &remote, 1, 0);
        remote.iov_len /= 2;
    }
    for (ssize_t i = 0; i < got / (ssize_t)sizeof(stack[0]); i++) {
        if (stack[i] - in->gate < FL_GATE_CODE_BYTES) {
            return true;
        }
    }
    return false;
}

/*
 * Not where the stack already holds an address of it, left over from what was once mapped there: it would look for ever as
 * if the thread could come back to the gate, and the gate could never be taken away.
 */
static int map_gate(struct fl_injection *in) {
    uint64_t offset = in->job->gate_offset, wish = 0;
    for (unsigned place = 0; in->gate == 0; place++) {
        int64_t result = call(in, FL_STEP_MMAP_GATE, SYS_mmap, wish, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                              (uint64_t)in->vault, offset);
        if (result < 0) {
            return fl_inject_fail(in, refusal_for(result), FL_STEP_MMAP_GATE, (int)result);
        }
        in->gate = (uint64_t)result;
        if (!fl_inject_may_return_to_gate(in)) {
            break;
        }
        if (place == GATE_PLACES) {
            return fl_inject_fail(in, FL_REFUSAL_STUCK, FL_STEP_MMAP_GATE, -EAGAIN);
        }
        wish = in->gate - ((uint64_t)GATE_STRIDE_BYTES << place);
        if (unmap_in_vmm(in, &in->gate, FL_GATE_BYTES)) {
            return -1;
        }
    }
    int64_t result = call(in, FL_STEP_MMAP_GATE_CODE, SYS_mmap, in->gate, FL_GATE_CODE_BYTES, PROT_READ | PROT_EXEC,
                          MAP_SHARED | MAP_FIXED, (uint64_t)in->vault, offset);
    return result < 0 ? fl_inject_fail(in, refusal_for(result), FL_STEP_MMAP_GATE_CODE, (int)result) : 0;
}

/* With arguments of the kind that the calls will have. */
int fl_inject_ask_all(struct fl_injection *in) {
    const struct fl_inject_job *job = in->job;
    const uint64_t page = job->instruction & ~(uint64_t)(FL_PAGE_SIZE - 1); /* stands for an address */
    const uint64_t some_fd = 64;
    const struct {
        uint32_t step;
        bool attaching;
        uint64_t nr;
        uint64_t args[6];
    } calls[] = {
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

int fl_inject_put_in(struct fl_injection *in) {
    return open_channel(in) || send_descriptors(in) || receive_descriptors(in) || map_gate(in) ? -1 : 0;
}

uint32_t fl_inject_gate_calls(struct fl_injection *in, struct fl_gate_call calls[FL_GATE_CALLS_MAX]) {
    uint32_t count = 0;
    if (in->device >= 0) {
        calls[count++] = (struct fl_gate_call){
            .nr = SYS_ioctl, .args = {(uint64_t)in->device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK}};
        calls[count++] = (struct fl_gate_call){.nr = SYS_close, .args = {(uint64_t)in->device}};
    } else {
        calls[count++] = (struct fl_gate_call){.nr = SYS_userfaultfd, .args = {O_CLOEXEC | O_NONBLOCK}};
    }
    for (int i = 0; i < 2; i++) {
        calls[count++] = (struct fl_gate_call){.nr = SYS_close, .args = {(uint64_t)in->socket[i]}};
    }
    return count;
}

void fl_inject_take_back(struct fl_injection *in) {
    int failed = 0;
    int32_t *const descriptors[] = {&in->uffd, &in->vault, &in->device, &in->socket[0], &in->socket[1]};
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(descriptors[0]); i++) {
        failed += close_in_vmm(in, descriptors[i]) ? 1 : 0;
    }
    failed += unmap_in_vmm(in, &in->gate, FL_GATE_BYTES) ? 1 : 0;
    if (!in->gone) {
        in->job->leftovers += (uint32_t)failed;
    }
}
