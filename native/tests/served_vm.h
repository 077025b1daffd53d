/* SPDX-License-Identifier: Apache-2.0 */
/* What tests do with a served VM past its pager. Whatever goes wrong exits the test. */
#ifndef SERVED_VM_H
#define SERVED_VM_H

#include <stdbool.h>
#include <sys/types.h>

#include "base/vault.h"
#include "pager/serve.h"
#include "swap/fault.h"

/* What the host says of a tracker by its name: NULL when it can be used, else what is missing. */
const char *tracker_missing(const char *tracker);
/* As for --trackers. */
struct fl_tracker_list trackers_of(const char *names);

/* Serve a VMM in this process, as its pager would, but without scans and evictions of its own. */
struct fl_fault_server *served_vm_begin(struct fl_vm *vm, pid_t vmm, const struct fl_tracker_list *trackers,
                                        uint32_t fault_threads);
/* Kill the VMM, which is a child, and forget it. */
void served_vm_end(struct fl_vm *vm, struct fl_fault_server *faults);

/* The vault that a VMM holds; for fl_vault_close(). */
struct fl_vault vault_of(pid_t pid, bool write);
/* Until a pager's mover has ended the round that it is in: it counts and records behind what it does, and publishes last. */
void wait_for_round(const struct fl_vault *vault);

/* Evict the first `pages` (at most FL_WINDOW_PAGES) of region 0, whether they are cold or not: more than half of them go. */
void evict_first(struct fl_vm *vm, uint32_t pages);

#endif
