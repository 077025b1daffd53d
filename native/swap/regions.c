/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/regions.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "base/log.h"
#include "swap/mapped.h"
#include "swap/uffd.h"

#define ADOPT_TRIES 10u /* while the VMM changes its mappings under our eyes */

int fl_region_open(struct fl_vm *vm, uint32_t index) {
    struct fl_vault_region *region = fl_region(vm, index);
    struct fl_memory *memory = &vm->memory[index];
    int error = fl_vmm_open_memfd(vm->pid, region->inode, O_RDWR | O_CLOEXEC, &memory->fd);
    if (error) {
        memory->fd = -1;
        return error;
    }
    memory->mapping =
        mmap(NULL, region->length, PROT_NONE, MAP_SHARED | MAP_NORESERVE, memory->fd, (off_t)region->file_offset);
    if (memory->mapping == MAP_FAILED) {
        error = -errno;
        memory->mapping = NULL;
        close(memory->fd);
        memory->fd = -1;
    }
    return error;
}

void fl_regions_close(struct fl_vm *vm) {
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        struct fl_memory *memory = &vm->memory[i];
        if (memory->mapping)
            munmap(memory->mapping, fl_region(vm, i)->length);
        if (memory->fd >= 0)
            close(memory->fd);
        *memory = (struct fl_memory){.fd = -1};
    }
}

void fl_regions_freeze(struct fl_vm *vm, enum fl_freeze freeze) {
    vm->freeze = freeze;
    atomic_store(&vm->vault.header->freeze, freeze);
    FL_SET(vm, freeze, freeze);
}

static int refuse_register(struct fl_vm *vm, uint32_t index, int error, struct fl_refused *why) {
    struct fl_vault_region *region = fl_region(vm, index);
    if (error == -EBUSY)
        return fl_refuse(
            why, FL_REFUSAL_FOREIGN_UFFD,
            "another userfaultfd owns guest memory of process %d at %#llx; a post-copy migration or another "
            "memory manager is at work: wait for it or stop it",
            vm->pid, (unsigned long long)atomic_load(&region->vmm_addr));
    return fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_KERNEL,
                     "UFFDIO_REGISTER MISSING and %s on process %d, %#llx + %llu bytes: %s",
                     vm->freeze == FL_FREEZE_RWP ? "MINOR|RWP" : "WP", vm->pid,
                     (unsigned long long)atomic_load(&region->vmm_addr), (unsigned long long)region->length,
                     strerror(-error));
}

static int register_region(struct fl_vm *vm, uint32_t index, struct fl_refused *why) {
    struct fl_vault_region *region = fl_region(vm, index);
    int error = fl_uffd_register(vm, atomic_load(&region->vmm_addr), region->length);
    if (error == -EINVAL && vm->freeze == FL_FREEZE_RWP && fl_region_count(vm) == 0) {
        fl_log_text(FL_LOG_WARNING, "no_rwp",
                    "UFFDIO_REGISTER MISSING|MINOR|RWP on process %d: %s, though the kernel offers it; registering for "
                    "WP instead",
                    vm->pid, strerror(EINVAL));
        fl_regions_freeze(vm, FL_FREEZE_WP);
        error = fl_uffd_register(vm, atomic_load(&region->vmm_addr), region->length);
    }
    return error ? refuse_register(vm, index, error, why) : 0;
}

static bool same_memory(const struct fl_vault_region *known, const struct fl_region *found) {
    return known->inode == found->inode && known->file_offset == found->file_offset && known->length == found->length &&
           atomic_load(&known->vmm_addr) == found->vmm_addr;
}

static bool shares_memory(const struct fl_vault_region *known, const struct fl_region *found) {
    return known->inode == found->inode && known->file_offset < found->file_offset + found->length &&
           found->file_offset < known->file_offset + known->length;
}

/* The region that has any of this memory; -1: none. */
static int find_sharer(struct fl_vm *vm, const struct fl_region *found) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        if (!atomic_load(&fl_region(vm, i)->gone) && shares_memory(fl_region(vm, i), found))
            return (int)i;
    return -1;
}

static int add(struct fl_vm *vm, const struct fl_region *found, struct fl_refused *why) {
    uint32_t index = fl_region_count(vm);
    uint64_t first_page = 0;
    if (index > 0)
        first_page = fl_region(vm, index - 1)->first_page + fl_region_pages(vm, index - 1);
    if (index == FL_MAX_REGIONS || found->length / FL_PAGE_SIZE > vm->vault.max_pages - first_page)
        return fl_refuse(
            why, FL_REFUSAL_LIMIT,
            "process %d has more guest memory (or regions, limit %d) than its vault can describe (%llu pages); "
            "detach and attach anew",
            vm->pid, FL_MAX_REGIONS, (unsigned long long)vm->vault.max_pages);
    struct fl_vault_region region = {
        .vmm_addr = found->vmm_addr,
        .length = found->length,
        .file_offset = found->file_offset,
        .inode = found->inode,
        .first_page = first_page,
    };
    fl_vault_put_region(&vm->vault, index, region);
    int error = fl_region_open(vm, index);
    if (error)
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot open the memfd (inode %llu) of process %d: %s",
                         (unsigned long long)found->inode, vm->pid, strerror(-error));
    error = register_region(vm, index, why);
    if (error) {
        munmap(vm->memory[index].mapping, found->length);
        close(vm->memory[index].fd);
        vm->memory[index] = (struct fl_memory){.fd = -1};
        return error;
    }
    /* Faults on it may have come already: they wait as pending until the region can be looked up. */
    fl_vault_count_regions(&vm->vault, index + 1);
    FL_COUNT(vm, memory_bytes, found->length);
    fl_log(FL_LOG_INFO, "region_added", "\"region\":%u,\"bytes\":%llu,\"address\":\"%llx\"", index,
           (unsigned long long)found->length, (unsigned long long)found->vmm_addr);
    (void)fl_uffd_wake(vm, found->vmm_addr, found->length);
    return 0;
}

static int update(struct fl_vm *vm, const struct fl_region *found, struct fl_refused *why) {
    int sharer = find_sharer(vm, found);
    if (sharer < 0)
        return add(vm, found, why);
    const struct fl_vault_region *known = fl_region(vm, (uint32_t)sharer);
    if (!same_memory(known, found))
        return fl_refuse(why, FL_REFUSAL_OTHER_MAPPER,
                         "process %d has %llu bytes of guest memory mapped at %#llx where region %d of %llu bytes is "
                         "served; map it as it was, or detach and attach anew",
                         vm->pid, (unsigned long long)found->length, (unsigned long long)found->vmm_addr, sharer,
                         (unsigned long long)known->length);
    /* What was unmapped and mapped again in its place is not registered. Where nothing happened, nothing changes. */
    return atomic_load(&vm->vault.header->unsafe) ? register_region(vm, (uint32_t)sharer, why) : 0;
}

int fl_regions_update(struct fl_vm *vm, const struct fl_inspection *found, struct fl_refused *why) {
    int error = 0;
    for (uint32_t i = 0; i < found->region_count && !error; i++)
        error = update(vm, &found->regions[i], why);
    return error;
}

static int register_all(struct fl_vm *vm, struct fl_refused *why) {
    int error = 0;
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++)
        error = atomic_load(&fl_region(vm, i)->gone) ? 0 : register_region(vm, i, why);
    return error;
}

/*
 * Not where it was. A pager that died may have left the event unread, or have read it and not said so. Moved: then it is
 * served there. Unmapped: then the mover writes what is away of it into its file.
 */
static int find_again(struct fl_vm *vm, uint32_t index) {
    struct fl_vault_region *region = fl_region(vm, index);
    uint64_t address;
    int error = fl_mapped_elsewhere(vm, index, &address);
    if (!error) {
        fl_vault_move_region(&vm->vault, index, address);
        fl_log(FL_LOG_INFO, "region_moved", "\"region\":%u,\"to\":\"%llx\"", index, (unsigned long long)address);
    } else if (error == -ENOENT) {
        fl_vault_leave_region(&vm->vault, index);
        fl_log(FL_LOG_INFO, "region_unmapped", "\"region\":%u,\"bytes\":%llu", index,
               (unsigned long long)region->length);
    }
    return error == -ENOENT ? 0 : error;
}

/*
 * Register what is mapped of a region, and nothing else: the VMM may have put other memory into its place while no pager
 * lived. -EAGAIN: look again.
 */
static int adopt_mapped(struct fl_vm *vm, uint32_t index) {
    struct fl_vault_region *region = fl_region(vm, index);
    struct fl_pieces pieces;
    int error = fl_mapped_pieces(vm, index, &pieces);
    if (error)
        return error;
    if (!pieces.bytes) {
        error = find_again(vm, index);
        return error || atomic_load(&region->gone) ? error : -EAGAIN;
    }
    if (pieces.bytes != region->length) {
        uint32_t none = FL_REFUSAL_NONE;
        atomic_compare_exchange_strong(&vm->vault.header->unsafe, &none, FL_REFUSAL_OTHER_MAPPER);
        fl_log(FL_LOG_WARNING, "region_partly_mapped", "\"region\":%u,\"bytes\":%llu,\"mapped\":%llu", index,
               (unsigned long long)region->length, (unsigned long long)pieces.bytes);
    }
    /* Pieces beyond the limit are still registered by the predecessor, as all of them should be. */
    for (uint32_t i = 0; i < pieces.count && !error; i++)
        error = fl_uffd_register(vm, pieces.piece[i].start, pieces.piece[i].end - pieces.piece[i].start);
    return error;
}

/* EINVAL and ENOENT are also what is said of a range that has just been unmapped: then look again. */
static int adopt_region(struct fl_vm *vm, uint32_t index, struct fl_refused *why) {
    int error = -EAGAIN;
    for (unsigned try = 0; try < ADOPT_TRIES && (error == -EAGAIN || error == -EINVAL || error == -ENOENT); try++)
        error = adopt_mapped(vm, index);
    return error ? refuse_register(vm, index, error, why) : 0;
}

static int adopt_all(struct fl_vm *vm, struct fl_refused *why) {
    int error = 0;
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++)
        error = atomic_load(&fl_region(vm, i)->gone) ? 0 : adopt_region(vm, i, why);
    return error;
}

/* What is away of a gone region may be written back, if somebody still has its file. */
static int open_all(struct fl_vm *vm, struct fl_refused *why) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        int error = fl_region_open(vm, i);
        if (error == -ENOENT && !atomic_load(&fl_region(vm, i)->gone)) { /* neither open nor mapped any more */
            fl_vault_leave_region(&vm->vault, i);
            continue;
        }
        if (error && !atomic_load(&fl_region(vm, i)->gone))
            return fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_INTERNAL,
                             "cannot open the memfd of region %u of process %d again: %s", i, vm->pid,
                             strerror(-error));
    }
    return 0;
}

int fl_regions_adopt(struct fl_vm *vm, enum fl_freeze freeze, struct fl_refused *why) {
    if (open_all(vm, why))
        return -EPERM;
    fl_regions_freeze(vm, freeze);
    int error = adopt_all(vm, why);
    enum fl_freeze other = freeze == FL_FREEZE_RWP ? FL_FREEZE_WP : FL_FREEZE_RWP;
    if (error && why->refusal != FL_REFUSAL_GONE && fl_uffd_allows(vm->uffd_features, other)) {
        /* The kernel knows better than the vault, and does not change from one kind to the other by itself. */
        fl_regions_freeze(vm, other);
        error = adopt_all(vm, why);
        if (!error)
            fl_log(FL_LOG_WARNING, "freeze_corrected", "\"vault\":%u,\"freeze\":\"%s\"", freeze, fl_freeze_name(other));
    }
    return error;
}

int fl_regions_refreeze(struct fl_vm *vm, enum fl_freeze freeze, struct fl_refused *why) {
    enum fl_freeze before = vm->freeze;
    int error = 0;
    fl_regions_unregister(vm);
    fl_regions_freeze(vm, freeze);
    for (uint32_t i = 0; i < fl_region_count(vm) && !error; i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        if (!atomic_load(&region->gone))
            error = fl_uffd_register(vm, atomic_load(&region->vmm_addr), region->length);
    }
    if (!error)
        return 0;
    fl_log_text(FL_LOG_WARNING, "refreeze_failed", "UFFDIO_REGISTER for freeze %s on process %d: %s; it stays with %s",
                fl_freeze_name(freeze), vm->pid, strerror(-error), fl_freeze_name(before));
    fl_regions_unregister(vm);
    fl_regions_freeze(vm, before);
    if (register_all(vm, why))
        return -EPERM;
    if (error == -EINVAL && freeze == FL_FREEZE_RWP) /* and nothing is wrong with the ranges */
        fl_uffd_disallow_rwp(vm); /* else the next pager takes the memory off its userfaultfd for nothing, too */
    return 0;
}

void fl_regions_unregister(struct fl_vm *vm) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        if (atomic_load(&region->gone))
            continue;
        int error = fl_uffd_unregister(vm, atomic_load(&region->vmm_addr), region->length);
        if (error && error != -ESRCH)
            fl_log_text(FL_LOG_ERROR, "unregister_failed", "UFFDIO_UNREGISTER region %u of process %d: %s", i, vm->pid,
                        strerror(-error));
    }
}

void fl_regions_wake(struct fl_vm *vm) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        if (!atomic_load(&region->gone))
            (void)fl_uffd_wake(vm, atomic_load(&region->vmm_addr), region->length);
    }
}
