/* SPDX-License-Identifier: Apache-2.0 */
/* What fl_inspect() is made of, with more control. Reads /proc only. */
#ifndef FL_ATTACH_INSPECT_H
#define FL_ATTACH_INSPECT_H

#include "frostline.h"

/*
 * As fl_inspect(), but `ignore_pid` (0: nobody) may map the guest's memory and may hold the vault; so may this
 * process. `deep` also reads the VMM's smaps, which walks the page tables of all guest memory: for the moment
 * before attaching, not for every look.
 */
int fl_inspect_target(int pid, int ignore_pid, int deep, struct fl_inspection *out);

/* Field 22 of /proc/PID/stat. -ESRCH when there is no such process or it is a zombie. */
int fl_proc_start_time(int pid, uint64_t *out);

/* The lowest descriptor of `pid` whose link is `link_text`. -ENOENT: none. */
int fl_vmm_find_fd(int pid, const char *link_text, int *fd_number);

/* Open the memfd with this inode that `pid` holds or maps, with a description of our own (close-on-exec is added to `flags`). */
int fl_vmm_open_memfd(int pid, uint64_t inode, int flags, int *fd);

/* As fl_vmm_open_memfd() for the vault. -ENOENT: the process has none. */
int fl_vmm_open_vault(int pid, int flags, int *fd);

/* Who holds a flock() on the file: *pid is 0 when nobody does, and -1 when somebody does whose pid cannot be seen. */
int fl_vault_holder(int vmm_pid, int *pid);

#endif
