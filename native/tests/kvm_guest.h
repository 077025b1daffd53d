/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A real KVM guest whose every access to its memory is ordered by a test: 64-bit mode, page tables of its own, 1 to
 * KVM_GUEST_VCPUS_MAX vCPUs. What it does with its memory is exactly a script of struct kvm_touch, and nothing else:
 * its code, its page tables, the scripts and their results lie in the guest's *side memory*, a slot of its own that is
 * other memory of the VMM, and it has no stack and no interrupts. So accuracy can be counted page by page. (A real
 * processor may set ACCESSED bits ahead of the program by speculation; TCG does not.)
 *
 * In one process:    create, start, run ..., destroy.
 * In two:            create, fork, start and run in the child; both see scripts, passes and stop. KVM serves only the
 *                    process that started the guest. kvm_vmm.h does this.
 */
#ifndef KVM_GUEST_H
#define KVM_GUEST_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#define KVM_GUEST_PAGE 4096u
#define KVM_GUEST_WORDS (KVM_GUEST_PAGE / 8)
#define KVM_GUEST_VCPUS_MAX 8u
#define KVM_GUEST_BYTES_MAX (UINT64_C(64) << 30)
#define KVM_SCRIPT_MAX 16384u /* touches of one entry into the guest */

enum kvm_touch_kind {
    KVM_TOUCH_LOAD,  /* read one word: `result` */
    KVM_TOUCH_STORE, /* write `value` to one word */
    KVM_TOUCH_ADD,   /* add `value` to one word, atomically; `result`: what it was (the first of `times`) */
    KVM_TOUCH_FILL,  /* write the page: word 0 is `value`, each next is the one before x `factor` + `step` */
    KVM_TOUCH_CHECK, /* read the page and compare: `result` words are not what FILL would have written */
    KVM_TOUCH_KINDS
};

struct kvm_touch {
    uint32_t page; /* page of guest memory */
    uint16_t word; /* word in the page, for kinds that touch one */
    uint16_t kind;
    uint32_t times; /* how often in a row, at least 1; FILL and CHECK: 1 */
    uint32_t unused;
    uint64_t value, step, factor;
    uint64_t result;
};

enum kvm_guest_backing {
    KVM_GUEST_MEMFD,     /* shared, under the name that QEMU gives to its guest memory */
    KVM_GUEST_HUGETLB,   /* the same in 2 MiB pages */
    KVM_GUEST_ANONYMOUS, /* private anonymous */
};

struct kvm_guest_config {
    uint64_t bytes; /* of guest memory: a multiple of 2 MiB, at most KVM_GUEST_BYTES_MAX */
    uint32_t vcpus;
    bool large_pages; /* the guest's own page tables map its memory by 2 MiB */
    enum kvm_guest_backing backing;
};

struct kvm_guest;

/* What one run of a script came to. `error` is 0 or a negative errno, and then `why` says what happened. */
struct kvm_outcome {
    int error;
    uint32_t at; /* with an error: the touch that it happened at */
    char why[400];
};

/*
 * Error of a run: the virtual processor lost the guest's state, which is the emulator's doing. Seen under QEMU's TCG with
 * several threads (7.2): the nested guest goes on with the host's CR3, at the host's instruction behind VMRUN. It is said
 * only where nothing else can be to blame: all that a guest needs to take an exception lies in side memory, which no pager
 * serves and which is as it was written, and yet it left by a shutdown; or its CR3, which it never changes, is another.
 */
#define KVM_GUEST_LOST EREMOTEIO

/*
 * Lay out side memory, shared with children. Returns 0 or a negative errno.
 */
int kvm_guest_create(const struct kvm_guest_config *config, struct kvm_guest **out);
void kvm_guest_destroy(struct kvm_guest *guest);
/*
 * Make the VM and its memory in this process, and enter each vCPU once with nothing to do. On error the outcome says what
 * the host lacks.
 */
struct kvm_outcome kvm_guest_start(struct kvm_guest *guest);

/* Number of workers of a guest: its vCPUs, and after them the VMM itself, which runs scripts on its own mapping. */
uint32_t kvm_guest_workers(const struct kvm_guest *guest);
uint64_t kvm_guest_bytes(const struct kvm_guest *guest);
uint32_t kvm_guest_pages(const struct kvm_guest *guest);
/* Where the process that started the guest has its memory, and the memfd (-1: anonymous). */
uint8_t *kvm_guest_memory(const struct kvm_guest *guest);
int kvm_guest_memory_fd(const struct kvm_guest *guest);

/* A worker's script, KVM_SCRIPT_MAX entries, in side memory: filled in before a run, results read after it. */
struct kvm_touch *kvm_guest_script(struct kvm_guest *guest, uint32_t worker);
/*
 * Run the first `count` touches of the worker's script `passes` times (0: until kvm_guest_stop()), on the thread of the
 * caller, which must be the only one for this worker. A vCPU drops its TLB at the beginning of each pass, as a guest's
 * change of process does. The script's touches are checked first: -EINVAL for one outside of guest memory.
 */
struct kvm_outcome kvm_guest_run(struct kvm_guest *guest, uint32_t worker, uint32_t count, uint64_t passes);
/* From any thread or process: let the run at work, or else the next one, end after its pass. */
void kvm_guest_stop(struct kvm_guest *guest, uint32_t worker);
/* Passes that a worker has done in its life, also while it runs. */
uint64_t kvm_guest_passes(const struct kvm_guest *guest, uint32_t worker);

/* Take a page out of the guest's own page tables, so that its next touch is an exception; or put it back. */
void kvm_guest_hide(struct kvm_guest *guest, uint32_t page, bool hidden);

/*
 * Poisoned memory ends a run with -EHWPOISON instead of the process: to be called once in the process that runs
 * scripts. Any other SIGBUS ends it.
 */
void kvm_guest_catch_sigbus(void);

/*
 * What generation `generation` of a page holds, for FILL and CHECK: by turns zeros, one word again and again, words
 * that compress and words that do not. Generation 0 is zeros, as in memory never touched.
 */
struct kvm_touch kvm_touch_content(enum kvm_touch_kind kind, uint64_t seed, uint32_t page, uint32_t generation);
/* Word `word` of it. */
uint64_t kvm_touch_word(const struct kvm_touch *content, uint32_t word);

#endif
