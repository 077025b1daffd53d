/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Into a running VMM, and out of it again, without its co-operation.
 *
 * Attaching leaves two descriptors and one mapping in the VMM: a userfaultfd, the vault's memfd, and the gate
 * (gate.h). They live as long as the VMM does, so nothing is lost when a pager dies. The VMM's main thread is
 * stopped once, for well under a millisecond, and goes on with every register as it was; a failure at any step
 * takes back what was done so far.
 */
#ifndef FL_ATTACH_ATTACH_H
#define FL_ATTACH_ATTACH_H

#include "base/refused.h"

/* Name given to memfd_create() for a vault; by its link a vault is found in a VMM. */
#define FL_VAULT_MEMFD_NAME "frostline-vault"
#define FL_VAULT_LINK "/memfd:frostline-vault (deleted)"
#define FL_UFFD_LINK "anon_inode:[userfaultfd]"

/* Plain data, kept in the vault's header for the pagers to come. */
struct fl_attachment {
    int32_t vmm_uffd; /* descriptor numbers in the VMM */
    int32_t vmm_vault;
    uint64_t gate_code; /* VMM addresses; the data follow the code */
    uint64_t gate_data;
    uint64_t stop_ns;          /* how long the main thread was stopped */
    uint64_t start_time_ticks; /* of the VMM: tells a reused pid */
};

/*
 * Attach to `pid`. `vault_fd` is the new vault's memfd, large enough for the gate at `gate_offset` (a multiple of
 * the page size; FL_GATE_BYTES long), which is filled in here. The VMM gets an open file description of its own,
 * so a flock() held on `vault_fd` ends with the
 * pager, and with the helper that does the work. If `*out` lies in shared memory (the
 * vault's header), it is written even when this process dies meanwhile. Returns 0, or -EPERM with `why`; then nothing was left in
 * the VMM, unless `why` says otherwise. Takes at most 3 s.
 */
int fl_attach(int pid, int vault_fd, uint64_t gate_offset, struct fl_attachment *out, struct fl_refused *why);

/*
 * Take back what fl_attach() left: both descriptors closed, the gate unmapped. The caller has unregistered all
 * ranges and runs no gate. `lock_fd` (-1: none) is kept open until the work is done, even if this process dies
 * meanwhile: a flock() on it keeps a successor from starting on what is being taken away. Returns as fl_attach()
 * does; FL_REFUSAL_STUCK is worth another try.
 */
int fl_attach_undo(int pid, const struct fl_attachment *attachment, int lock_fd, struct fl_refused *why);

/*
 * This process' own descriptors for what the VMM holds, close-on-exec. `*uffd` shares the VMM's description;
 * `*vault` is a fresh one (so that flock() on it is this process' own). Either pointer may be NULL. -ESTALE: the
 * VMM is another one, or its descriptors are not what the attachment says; else the system's negative errno.
 */
int fl_attach_borrow(int pid, const struct fl_attachment *attachment, int *uffd, int *vault);

/*
 * What fl_attach() would have returned, from what is found in the VMM: for a successor of a pager that died before
 * it could write the attachment down. -ENOENT: nothing there. -ESTALE: only a part of it is.
 */
int fl_attach_recover(int pid, struct fl_attachment *out);

#endif
