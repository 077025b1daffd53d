/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/gauges.h"

#include <sys/stat.h>

void fl_gauges_publish(struct fl_vm *vm, enum fl_state state, enum fl_why why) {
    struct fl_stats *stats = vm->vault.stats;
    struct fl_status *status = &stats->status;
    struct fl_vault_header *header = vm->vault.header;
    struct fl_pool_stats pool;
    struct stat file;
    fl_pool_stats(vm->pool, &pool);
    uint64_t vault_bytes = fstat(vm->vault.fd, &file) ? pool.pool_bytes : (uint64_t)file.st_blocks * 512;
    atomic_fetch_add(&stats->sequence, 1);
    status->state = state;
    status->why = why;
    status->refusal = atomic_load(&header->unsafe);
    status->stored_bytes = pool.stored_bytes;
    status->pool_bytes = pool.pool_bytes;
    status->metadata_bytes = vault_bytes > pool.pool_bytes ? vault_bytes - pool.pool_bytes : 0;
    status->budget_bytes = atomic_load(&header->budget.bytes);
    status->budget_rate_bytes = atomic_load(&header->budget.rate_bytes);
    status->budget_generation = atomic_load(&header->budget.generation);
    status->budget_lease_until_ns = atomic_load(&header->budget.lease_until_ns);
    status->budget_min_age_scans = atomic_load(&header->budget.min_age_scans);
    atomic_fetch_add(&stats->sequence, 1);
}
