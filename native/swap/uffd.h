/* SPDX-License-Identifier: Apache-2.0 */
/*
 * userfaultfd's calls on a VMM's memory. Addresses are the VMM's; all return 0 or a negative errno.
 * -EAGAIN: the address space is changing or an event waits unread: read events, then try again.
 * -ESRCH: the VMM has ended. -ENOENT: the range is not registered (any more).
 */
#ifndef FL_SWAP_UFFD_H
#define FL_SWAP_UFFD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/refused.h"
#include "swap/vm.h"

/* A userfaultfd of this process's own, by /dev/userfaultfd or else by the system call. `flags`: UFFD_USER_MODE_ONLY or 0. */
int fl_uffd_open_own(int flags, int *fd);
/* By one of the two: 0, or a negative errno. */
int fl_uffd_open_device(int flags, int *fd);
int fl_uffd_open_call(int flags, int *fd);
/* What a descriptor must be set up with for this kind of freeze, apart from events. */
uint64_t fl_uffd_features(enum fl_freeze freeze);
/* Set up a fresh descriptor with exactly these. */
int fl_uffd_api(int fd, uint64_t features);

/* Negotiate features on a fresh descriptor; on one that was set up by an earlier pager this changes nothing. */
int fl_uffd_setup(struct fl_vm *vm, struct fl_refused *why);
/* Whether ranges can be registered for this kind of freeze by a descriptor that was set up with `features`. */
bool fl_uffd_allows(uint64_t features, enum fl_freeze freeze);
/* The kernel does not register for FL_FREEZE_RWP after all: from now on the vault says so too. */
void fl_uffd_disallow_rwp(struct fl_vm *vm);
/*
 * Register for MISSING and what vm->freeze takes: WP; or RWP and MINOR, because RWP does not see the first touch of a
 * page that is in the file and not mapped. -EBUSY: another userfaultfd has it, or it is registered for the other kind.
 */
int fl_uffd_register(struct fl_vm *vm, uint64_t address, uint64_t length);
int fl_uffd_unregister(struct fl_vm *vm, uint64_t address, uint64_t length);
/* Fill holes from `source` and wake; *done gets the bytes filled before an error. -EEXIST: a page is there. */
int fl_uffd_copy(struct fl_vm *vm, uint64_t address, const void *source, uint64_t length, uint64_t *done);
/* Fill one hole with zeros and wake. */
int fl_uffd_zero(struct fl_vm *vm, uint64_t address);
/* Map a page that is in the file, and wake. -EEXIST: it is mapped. -EFAULT: there is none. */
int fl_uffd_continue(struct fl_vm *vm, uint64_t address);
/* Protect against writes (FL_FREEZE_RWP: against every touch), or lift it and wake. */
int fl_uffd_protect(struct fl_vm *vm, uint64_t address, uint64_t length, bool protect);
/*
 * The same, again as long as the kernel answers EAGAIN because the VMM's mappings are changing, which fault threads read of:
 * `tries` times in all, 20 us apart. -EAGAIN: they were not enough.
 */
int fl_uffd_protect_patiently(struct fl_vm *vm, uint64_t address, uint64_t length, bool protect, uint32_t tries);
/*
 * FL_FREEZE_RWP: in sync mode a touch of a protected page waits for us; otherwise the kernel lifts the protection
 * itself. Ending it wakes every waiter. Takes the VMM's mmap lock for writing: once a window, not once a page.
 */
int fl_uffd_sync(struct fl_vm *vm, bool on);
/* Tries until it is done, or the VM gone: in sync mode every touch of a cold page waits for us. */
void fl_uffd_leave_sync(struct fl_vm *vm);
int fl_uffd_wake(struct fl_vm *vm, uint64_t address, uint64_t length);
/* Touches of the hole get SIGBUS from now on. -ENOSYS when the kernel has no UFFDIO_POISON. */
int fl_uffd_poison(struct fl_vm *vm, uint64_t address);

#endif
