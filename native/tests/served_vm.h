/* SPDX-License-Identifier: Apache-2.0 */
/* What tests do with a served VM past its pager. Whatever goes wrong exits the test. */
#ifndef SERVED_VM_H
#define SERVED_VM_H

#include <stdbool.h>
#include <sys/types.h>

#include "base/vault.h"
#include "swap/vm.h"

/* The vault that a VMM holds; for fl_vault_close(). */
struct fl_vault vault_of(pid_t pid, bool write);

/* Evict the first `pages` (at most FL_WINDOW_PAGES) of region 0, whether they are cold or not: more than half of them go. */
void evict_first(struct fl_vm *vm, uint32_t pages);

#endif
