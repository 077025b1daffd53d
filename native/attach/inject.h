/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The part of attaching and detaching that has the VMM's main thread stopped. It runs in a process of its own,
 * forked for it: were the pager itself killed with foreign registers in that thread, the VMM would go on with them.
 */
#ifndef FL_ATTACH_INJECT_H
#define FL_ATTACH_INJECT_H

#include <sys/types.h>

#include "attach/attach.h"
#include "attach/seccomp.h"

enum fl_inject_step {
    FL_STEP_NONE,
    FL_STEP_SEIZE,
    FL_STEP_STOP,
    FL_STEP_REGISTERS,
    FL_STEP_SECCOMP,
    FL_STEP_STACK,
    FL_STEP_SOCKETPAIR,
    FL_STEP_GETFD,
    FL_STEP_SENDMSG,
    FL_STEP_RECVMSG,
    FL_STEP_USERFAULTFD,
    FL_STEP_MMAP_GATE,
    FL_STEP_MMAP_GATE_CODE,
    FL_STEP_GATE,
    FL_STEP_CLOSE,
    FL_STEP_MUNMAP,
    FL_STEP_MADVISE /* only asked about: what the gate will do */
};
const char *fl_inject_step_text(uint32_t step);

/* Shared by the pager and the forked process. */
struct fl_inject_job {
    /* what to do */
    int pid;
    int pidfd;
    int vault_fd;     /* -1: take back what `attachment` describes, as far as its members are set */
    int lock_fd;      /* kept open until the work is done; -1: none */
    int device_fd;    /* /dev/userfaultfd, or -1: make the call instead */
    void *gate_local; /* the pager's mapping of the new gate, which the forked process has too */
    uint64_t gate_offset;
    uint64_t instruction; /* a system call instruction in the VMM */
    uint32_t seccomp_mode;
    uint32_t seccomp_filters; /* as /proc says; 0: unknown */

    /* what came of it */
    struct fl_attachment attachment;
    struct fl_attachment *copy; /* where the forked process writes it too: in shared memory, it outlives the pager */
    uint32_t done;              /* 1: the process came to its end in good order */
    uint32_t refusal;           /* FL_REFUSAL_NONE: success */
    uint32_t step;              /* where it failed */
    int32_t error;              /* negative errno */
    int64_t verdict;            /* of the filters, with FL_STEP_SECCOMP */
    uint32_t verdict_step;      /* about which call */
    uint32_t leftovers;         /* things that could not be taken back */

    struct fl_seccomp_filters filters;
};

/*
 * Do the job, in the forked process. `control` is a socket to the pager: one byte is sent once the VMM cannot be
 * seized by anybody else any more, and one awaited before anything is done to it. Does not return.
 */
_Noreturn void fl_inject_main(struct fl_inject_job *job, int control);

/* Address of a system call instruction in the VMM: its text is never written to. -ENOENT: none found. */
int fl_inject_find_instruction(int pid, uint64_t *out);

/* Unset the members of an attachment that the VMM does not have (any more): -1 for descriptors, 0 for the gate. */
int fl_inject_verify(int pid, struct fl_attachment *attachment);

#endif
