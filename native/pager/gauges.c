/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/gauges.h"

#include <sys/stat.h>

void fl_gauges_publish(struct fl_vm *vm, enum fl_state state, enum fl_why why) {
    struct fl_stats *stats = vm->vault.stats;
    struct fl_vault_header *header = vm->vault.header;
    struct fl_pool_stats pool;
    struct stat file;
    fl_pool_stats(vm->pool, &pool);
    uint64_t vault_bytes = fstat(vm->vault.fd, &file) ? pool.pool_bytes : (uint64_t)file.st_blocks * 512;
    atomic_fetch_add(&stats->sequence, 1);
    FL_SET(vm, state, (uint32_t)state);
    FL_SET(vm, why, (uint32_t)why);
    FL_SET(vm, refusal, atomic_load(&header->unsafe));
    FL_SET(vm, stored_bytes, pool.stored_bytes);
    FL_SET(vm, pool_bytes, pool.pool_bytes);
    FL_SET(vm, metadata_bytes, vault_bytes > pool.pool_bytes ? vault_bytes - pool.pool_bytes : 0);
    FL_SET(vm, budget_bytes, atomic_load(&header->budget.bytes));
    FL_SET(vm, budget_rate_bytes, atomic_load(&header->budget.rate_bytes));
    FL_SET(vm, budget_generation, atomic_load(&header->budget.generation));
    FL_SET(vm, budget_lease_until_ns, atomic_load(&header->budget.lease_until_ns));
    FL_SET(vm, budget_min_age_ns, atomic_load(&header->budget.min_age_ns));
    atomic_fetch_add(&stats->sequence, 1);
}
