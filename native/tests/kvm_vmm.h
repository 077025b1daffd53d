/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM in a process of its own, around a guest of kvm_guest.h, for a pager to attach to: the main thread waits in
 * poll(), each vCPU has its thread, and so has the VMM itself for its own accesses to guest memory ("the host worker").
 * It can make memory of its own, which is no guest memory, very hot and very large. Whatever goes wrong exits the test.
 */
#ifndef KVM_VMM_H
#define KVM_VMM_H

#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "kvm_guest.h"

/*
 * Exit code of a test whose guest came to grief by KVM_GUEST_LOST, with a line that says so: nothing was found out, for
 * good or ill. Whoever runs the test may run it again, and must say so.
 */
#define KVM_VMM_NO_VERDICT 75

struct kvm_vmm_worker {
    sem_t asked, answered;
    uint32_t count;
    uint64_t passes;
    struct kvm_outcome outcome;
    _Atomic(uint32_t) busy;
};

struct kvm_vmm_shared {
    struct kvm_outcome started;
    _Atomic(uint32_t) ready, stop;
    /* The VMM's own memory: wanted, and passes over all of it. */
    _Atomic(uint64_t) heap_bytes, buffer_bytes, heap_passes;
    struct kvm_vmm_worker workers[KVM_GUEST_VCPUS_MAX + 1];
};

struct kvm_vmm {
    pid_t pid;
    struct kvm_guest *guest;
    struct kvm_vmm_shared *shared;
};

/* Skips the test (77), and says why, where the machine cannot run such a guest. */
struct kvm_vmm kvm_vmm_start(const struct kvm_guest_config *config);
void kvm_vmm_end(struct kvm_vmm *vmm);
/* The host worker's number; vCPUs are 0 and up. */
uint32_t kvm_vmm_host(const struct kvm_vmm *vmm);

/* Run a script of any length once and wait for it; results are in the script. The outcome is not checked. */
struct kvm_outcome kvm_vmm_run(struct kvm_vmm *vmm, uint32_t worker, struct kvm_touch *script, uint32_t count,
                               unsigned seconds);
/*
 * The same in parts, for several workers at once: at most KVM_SCRIPT_MAX touches, `passes` times (0: until
 * kvm_vmm_stop()). kvm_vmm_wait() copies the first `count` results back; `script` may be NULL.
 */
void kvm_vmm_begin(struct kvm_vmm *vmm, uint32_t worker, const struct kvm_touch *script, uint32_t count,
                   uint64_t passes);
struct kvm_outcome kvm_vmm_wait(struct kvm_vmm *vmm, uint32_t worker, struct kvm_touch *script, uint32_t count,
                                unsigned seconds);
struct kvm_outcome kvm_vmm_stop(struct kvm_vmm *vmm, uint32_t worker, unsigned seconds);

/* FILL pages [first, first + count) with the contents of these generations (of page `first` and on). */
void kvm_vmm_fill(struct kvm_vmm *vmm, uint32_t worker, uint64_t seed, uint32_t first, uint32_t count,
                  const uint32_t *generations, unsigned seconds);
/* CHECK them, by the guest or by the VMM. Returns how many pages are wrong; *wrong (if not NULL) is the first. */
uint32_t kvm_vmm_verify(struct kvm_vmm *vmm, uint32_t worker, uint64_t seed, uint32_t first, uint32_t count,
                        const uint32_t *generations, uint32_t *wrong, unsigned seconds);

/*
 * Keep so much memory of the VMM's own busy, heap and file-backed I/O buffers; 0, 0: give it back. Returns when all of
 * it has been touched once.
 */
void kvm_vmm_heat(struct kvm_vmm *vmm, uint64_t heap_bytes, uint64_t buffer_bytes, unsigned seconds);

#endif
