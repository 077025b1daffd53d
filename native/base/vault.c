/* SPDX-License-Identifier: Apache-2.0 */
#include "base/vault.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "attach/gate.h"
#include "base/clock.h"

#define ALIGN_UP(value, to) (((value) + (to) - 1) / (to) * (to))
#define SLAB_BYTES UINT64_C(32768) /* one bit of the slab map each */
#define AREA UINT64_C(65536)       /* areas begin at multiples of this */
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

struct layout {
    uint64_t gate, stats, slab_map, ages, table, pool, pool_bytes, end;
};

static struct layout layout_of(uint64_t max_pages) {
    struct layout at;
    at.gate = FL_VAULT_HEADER_BYTES;
    at.stats = ALIGN_UP(at.gate + FL_GATE_CODE_BYTES + FL_GATE_DATA_BYTES, AREA);
    at.slab_map = ALIGN_UP(at.stats + sizeof(struct fl_stats), AREA);
    at.pool_bytes = ALIGN_UP(max_pages * FL_PAGE_SIZE, AREA);
    at.ages = ALIGN_UP(at.slab_map + at.pool_bytes / SLAB_BYTES / 8, AREA);
    at.table = ALIGN_UP(at.ages + max_pages, AREA);
    at.pool = ALIGN_UP(at.table + max_pages * sizeof(uint64_t), AREA);
    at.end = at.pool + at.pool_bytes;
    return at;
}

static uint64_t header_check(const struct fl_vault_header *header) {
    return XXH3_64bits(header, offsetof(struct fl_vault_header, check));
}

static uint32_t region_check(const struct fl_vault_region *region) {
    uint64_t fields[4] = {region->length, region->file_offset, region->inode, region->first_page};
    return (uint32_t)XXH3_64bits(fields, sizeof(fields)) | 1;
}

/* Whether this host can swap memory out at all; yes, when it cannot be seen. */
static bool host_swaps(void) {
    char line[256];
    FILE *swaps = fopen("/proc/swaps", "re");
    if (!swaps)
        return true;
    int lines = 0;
    while (lines < 2 && fgets(line, sizeof(line), swaps))
        lines++;
    fclose(swaps);
    return lines > 1; /* the first is a heading */
}

static int map_file(int fd, bool writable, uint64_t max_pages, struct fl_vault *out) {
    struct layout at = layout_of(max_pages);
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    uint8_t *base = mmap(NULL, at.end, protection, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    /*
     * A pager locks what it maps. Where nothing is ever swapped out that is of no use for the vault, and costs a
     * successor dear: it waits until each of the dead one's pages is unlocked.
     */
    if (!host_swaps())
        (void)munlock(base, at.end);
    /* Sparse by design: a huge page behind one entry would cost 2 MiB. Absent THP support is no error. */
    (void)madvise(base, at.end, MADV_NOHUGEPAGE);
    /* A fork must not carry the pool along, nor a core dump. */
    (void)madvise(base, at.end, MADV_DONTDUMP);
    *out = (struct fl_vault){
        .fd = fd,
        .writable = writable,
        .file_bytes = at.end,
        .max_pages = max_pages,
        .base = base,
        .header = (struct fl_vault_header *)base,
        .stats = (struct fl_stats *)(base + at.stats),
        .ages = base + at.ages,
        .table = (_Atomic(uint64_t) *)(base + at.table),
        .slab_map = base + at.slab_map,
        .pool = base + at.pool,
        .gate_offset = at.gate,
        .pool_offset = at.pool,
        .pool_bytes = at.pool_bytes,
    };
    return 0;
}

int fl_vault_create(int vmm_pid, uint64_t vmm_start_ticks, uint64_t memory_bytes, struct fl_vault *out) {
    /* Four times what is there now, at least 16 GiB: memory can be plugged in, and untouched places cost nothing. */
    uint64_t max_pages = memory_bytes / FL_PAGE_SIZE * 4;
    if (max_pages < UINT64_C(1) << 22)
        max_pages = UINT64_C(1) << 22;
    max_pages = ALIGN_UP(max_pages, AREA);
    if (max_pages > FL_VAULT_MAX_PAGES)
        max_pages = FL_VAULT_MAX_PAGES;
    if (memory_bytes / FL_PAGE_SIZE > max_pages)
        return -E2BIG;
    int fd = memfd_create(FL_VAULT_MEMFD_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    int error = 0;
    if (ftruncate(fd, (off_t)layout_of(max_pages).end) || fcntl(fd, F_ADD_SEALS, SEALS))
        error = -errno;
    if (!error)
        error = map_file(fd, true, max_pages, out);
    if (error) {
        close(fd);
        return error;
    }
    struct fl_vault_header *header = out->header;
    header->magic = FL_VAULT_MAGIC;
    header->version = FL_VAULT_VERSION;
    header->abi = FL_ABI;
    header->max_pages = max_pages;
    header->vmm_start_ticks = vmm_start_ticks;
    header->created_ns = fl_now();
    header->vmm_pid = (uint32_t)vmm_pid;
    header->attachment.vmm_uffd = header->attachment.vmm_vault = -1;
    header->check = header_check(header);
    out->stats->status.abi = FL_ABI;
    return 0;
}

static const char *fault_of_regions(const struct fl_vault_header *header, uint64_t max_pages) {
    uint32_t count = atomic_load(&header->region_count);
    if (count > FL_MAX_REGIONS)
        return "impossible number of regions";
    uint64_t next_page = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct fl_vault_region *region = &header->regions[i];
        if (region->check != region_check(region))
            return "a region's check does not fit";
        if (region->first_page != next_page || region->length == 0 || region->length % FL_PAGE_SIZE ||
            region->length / FL_PAGE_SIZE > max_pages - next_page)
            return "regions overlap or leave the page table";
        next_page += region->length / FL_PAGE_SIZE;
    }
    return NULL;
}

static const char *fault_of(const struct fl_vault_header *header, uint64_t file_bytes, int vmm_pid,
                            uint64_t vmm_start_ticks) {
    if (header->magic != FL_VAULT_MAGIC)
        return "no vault's magic";
    if (header->version != FL_VAULT_VERSION || header->abi != FL_ABI)
        return "made by another version of Frostline";
    if (header->check != header_check(header))
        return "header check does not fit";
    if (header->max_pages > FL_VAULT_MAX_PAGES || layout_of(header->max_pages).end != file_bytes)
        return "wrong size (truncated, or damaged)";
    if (header->vmm_pid != (uint32_t)vmm_pid || header->vmm_start_ticks != vmm_start_ticks)
        return "belongs to another process";
    return fault_of_regions(header, header->max_pages);
}

int fl_vault_map(int fd, bool writable, int vmm_pid, uint64_t vmm_start_ticks, struct fl_vault *out,
                 struct fl_refused *why) {
    struct stat stat;
    int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &stat) || seals < 0)
        return fl_refuse(why, FL_REFUSAL_VAULT_INVALID, "cannot look at the vault of process %d: %s", vmm_pid,
                         strerror(errno));
    const char *fault = NULL;
    struct fl_vault_header copy;
    if ((seals & SEALS) != SEALS)
        fault = "not sealed";
    else if ((uint64_t)stat.st_size < FL_VAULT_HEADER_BYTES ||
             pread(fd, &copy, sizeof(copy), 0) != (ssize_t)sizeof(copy))
        fault = "truncated";
    else
        fault = fault_of(&copy, (uint64_t)stat.st_size, vmm_pid, vmm_start_ticks);
    if (fault)
        return fl_refuse(why, FL_REFUSAL_VAULT_INVALID,
                         "the vault in process %d cannot be used: %s; its VM keeps waiting for pages that are away, so "
                         "find the Frostline version that made it, or end the VM",
                         vmm_pid, fault);
    int error = map_file(fd, writable, copy.max_pages, out);
    if (error)
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "mmap of the vault of process %d (%llu bytes): %s", vmm_pid,
                         (unsigned long long)stat.st_size, strerror(-error));
    for (uint32_t i = 0; i < copy.region_count; i++)
        out->regions[i] = copy.regions[i];
    atomic_store(&out->region_count, copy.region_count);
    return 0;
}

void fl_vault_put_region(struct fl_vault *vault, uint32_t index, struct fl_vault_region region) {
    region.check = region_check(&region);
    vault->regions[index] = region;
    vault->header->regions[index] = region;
}

void fl_vault_count_regions(struct fl_vault *vault, uint32_t count) {
    atomic_store_explicit(&vault->header->region_count, count, memory_order_release);
    atomic_store_explicit(&vault->region_count, count, memory_order_release);
}

void fl_vault_move_region(struct fl_vault *vault, uint32_t index, uint64_t vmm_addr) {
    atomic_store(&vault->regions[index].vmm_addr, vmm_addr);
    atomic_store(&vault->header->regions[index].vmm_addr, vmm_addr);
}

void fl_vault_leave_region(struct fl_vault *vault, uint32_t index) {
    atomic_store(&vault->regions[index].gone, 1);
    atomic_store(&vault->header->regions[index].gone, 1);
}

uint32_t fl_vault_scan_interval_ms(const struct fl_vault *vault) {
    uint32_t interval_ms = atomic_load(&vault->header->scan_interval_ms);
    if (interval_ms < FL_SCAN_MS_MIN)
        return FL_SCAN_MS_MIN;
    return interval_ms < FL_SCAN_MS_MAX ? interval_ms : FL_SCAN_MS_MAX;
}

uint32_t fl_vault_age_interval_ms(const struct fl_vault *vault) {
    uint32_t interval_ms = atomic_load(&vault->header->age_interval_ms);
    return interval_ms >= FL_SCAN_MS_MIN && interval_ms <= FL_SCAN_MS_MAX ? interval_ms : 0;
}

void fl_vault_close(struct fl_vault *vault) {
    if (vault->base)
        munmap(vault->base, vault->file_bytes);
    if (vault->fd >= 0)
        close(vault->fd);
    vault->base = NULL;
    vault->fd = -1;
}
