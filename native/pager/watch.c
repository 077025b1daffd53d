/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/watch.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "attach/proc.h"
#include "attach/regions.h"
#include "base/clock.h"
#include "base/log.h"
#include "swap/regions.h"
#include "swap/uffd.h"

#define REGIONS_EVERY_NS (2 * FL_NS_PER_SECOND)
#define INSPECT_EVERY_NS (60 * FL_NS_PER_SECOND)
#define INSPECT_UNSAFE_NS (5 * FL_NS_PER_SECOND)
#define WRITE_BACK_FIRST_NS (100 * FL_NS_PER_MS)
#define WRITE_BACK_LAST_NS (10 * FL_NS_PER_SECOND)

void fl_watch_init(struct fl_watch *watch, uint64_t now_ns) {
    *watch = (struct fl_watch){0};
    watch->next_regions_ns = now_ns + REGIONS_EVERY_NS;
    watch->next_inspection_ns = now_ns; /* a successor has not looked yet */
}

static int count_shared_memfd(const struct fl_proc_map *map, void *context) {
    if (map->shared && map->writable && strncmp(map->path, FL_GUEST_MEMFD_PREFIX, strlen(FL_GUEST_MEMFD_PREFIX)) == 0)
        *(uint64_t *)context += map->end - map->start;
    return 0;
}

/* Cheap sign of memory plugged in: the mapped guest memory is not as large as what is served. */
static bool memory_changed(struct fl_vm *vm) {
    uint64_t mapped = 0, served = 0;
    if (fl_proc_maps(vm->pid, count_shared_memfd, &mapped))
        return false;
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        served += atomic_load(&fl_region(vm, i)->gone) ? 0 : fl_region(vm, i)->length;
    return mapped > served;
}

/* What makes tiering unsafe while it lasts. A debugger or a busy moment does not. */
static bool is_unsafe(uint32_t refusal) {
    return refusal == FL_REFUSAL_PASSTHROUGH || refusal == FL_REFUSAL_LOCKED || refusal == FL_REFUSAL_OTHER_MAPPER ||
           refusal == FL_REFUSAL_HUGETLB;
}

static void become_unsafe(struct fl_vm *vm, uint32_t refusal, const char *detail) {
    if (atomic_exchange(&vm->vault.header->unsafe, refusal) != refusal)
        fl_log_text(FL_LOG_WARNING, "unsafe", "%s: %s; everything is brought back", fl_refusal_name(refusal), detail);
}

/* All of what is served is mapped where it should be. A part that is not is in nobody's inspection. */
static bool all_mapped(struct fl_vm *vm, const struct fl_inspection *found) {
    uint64_t served = 0;
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        served += atomic_load(&fl_region(vm, i)->gone) ? 0 : fl_region(vm, i)->length;
    return found->memory_bytes >= served;
}

/* `events` had come before it was looked at. One that has come since is of something that nobody has looked at yet. */
static void become_safe(struct fl_vm *vm, uint32_t events) {
    uint32_t none = FL_REFUSAL_NONE;
    atomic_store(&vm->parted, false);
    atomic_store(&vm->vault.header->unsafe, FL_REFUSAL_NONE);
    if (atomic_load(&vm->unsafe_events) != events) {
        atomic_compare_exchange_strong(&vm->vault.header->unsafe, &none, FL_REFUSAL_OTHER_MAPPER);
        atomic_store(&vm->parted, true);
    } else {
        fl_log_text(FL_LOG_INFO, "safe_again", "what forbade tiering of process %d is gone", vm->pid);
    }
}

static void take_in(struct fl_vm *vm, const struct fl_inspection *found, uint32_t events) {
    struct fl_refused why;
    if (fl_regions_update(vm, found, &why)) {
        if (is_unsafe(why.refusal))
            become_unsafe(vm, why.refusal, why.detail);
        else
            fl_log_text(FL_LOG_ERROR, "region_not_served", "%s", why.detail);
        return;
    }
    if (atomic_load(&vm->vault.header->unsafe) && FL_READ(vm, evicted_pages) == 0 && !fl_forks_wait(vm) &&
        all_mapped(vm, found))
        become_safe(vm, events);
}

static void inspect(struct fl_watch *watch, struct fl_vm *vm, uint64_t now_ns) {
    struct fl_inspection found;
    uint32_t events = atomic_load(&vm->unsafe_events);
    if (fl_inspect_target(vm->pid, (int)getpid(), 0, &found))
        return;
    if (found.refusal == FL_REFUSAL_NONE)
        take_in(vm, &found, events);
    else if (is_unsafe(found.refusal))
        become_unsafe(vm, found.refusal, found.detail);
    bool unsafe = atomic_load(&vm->vault.header->unsafe) != FL_REFUSAL_NONE;
    watch->next_inspection_ns = now_ns + (unsafe ? INSPECT_UNSAFE_NS : INSPECT_EVERY_NS);
}

static void count_memory(struct fl_vm *vm) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        bytes += atomic_load(&fl_region(vm, i)->gone) ? 0 : fl_region(vm, i)->length;
    FL_SET(vm, memory_bytes, bytes);
}

/* Once a cause, not once a try. */
static void log_write_back(struct fl_watch *watch, struct fl_vm *vm, uint32_t region, uint64_t pages, int error) {
    if (!error)
        fl_log(FL_LOG_INFO, "region_closed", "\"region\":%u,\"pages_back\":%llu", region, (unsigned long long)pages);
    else if (error != -EAGAIN && error != watch->write_back_error) /* what the VMM has freed is being forgotten */
        fl_log_text(
            FL_LOG_ERROR, "write_back_failed",
            "writing what is away of region %u, which process %d has unmapped, into its file: %s; it stays in the "
            "pool and is tried again: free memory on the host",
            region, vm->pid, strerror(-error));
    if (error)
        watch->write_back_error = error;
}

/*
 * Memory that was plugged out: nothing may depend on us when the VMM maps the file again somewhere. Again after a
 * takeover, because the predecessor may have died in the middle; what was written back before costs nothing. Returns
 * the last error.
 */
static int write_back_unmapped(struct fl_watch *watch, struct fl_vm *vm, struct fl_bringer *bringer) {
    int failed = 0;
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        uint64_t pages = 0;
        if (!atomic_load(&region->gone) || vm->memory[i].fd < 0)
            continue;
        int error = fl_bring_into_file(bringer, i, &pages);
        log_write_back(watch, vm, i, pages, error);
        FL_COUNT(vm, drained_pages, pages);
        if (error) {
            failed = error;
            continue;
        }
        close(vm->memory[i].fd);
        vm->memory[i].fd = -1;
    }
    count_memory(vm);
    return failed;
}

/* What fails is tried again ever more seldom. */
static void close_unmapped(struct fl_watch *watch, struct fl_vm *vm, struct fl_bringer *bringer, uint64_t now_ns) {
    if (write_back_unmapped(watch, vm, bringer)) {
        uint64_t pause = watch->write_back_pause_ns * 2;
        pause = pause < WRITE_BACK_FIRST_NS ? WRITE_BACK_FIRST_NS : pause;
        watch->write_back_pause_ns = pause > WRITE_BACK_LAST_NS ? WRITE_BACK_LAST_NS : pause;
        watch->next_write_back_ns = now_ns + watch->write_back_pause_ns;
        atomic_store(&vm->remap_pending, 1);
        return;
    }
    watch->write_back_pause_ns = 0;
    watch->next_write_back_ns = 0;
    watch->write_back_error = 0;
}

/* Children of forks wait in faults of their own: when nothing is away any more they can be let go. */
static void let_children_go(struct fl_vm *vm) {
    struct fl_vm child = {.pid = vm->pid};
    if (FL_READ(vm, evicted_pages))
        return;
    for (uint32_t i = 0; i < FL_FORKS_MAX; i++) {
        int uffd = atomic_exchange(&vm->forks[i], -1);
        if (uffd < 0)
            continue;
        child.uffd = uffd;
        child.vault = vm->vault;
        fl_regions_wake(&child);
        close(uffd);
        fl_log(FL_LOG_INFO, "fork_released", "\"descriptor\":%d", uffd);
    }
}

void fl_watch_step(struct fl_watch *watch, struct fl_vm *vm, struct fl_bringer *bringer, uint64_t now_ns) {
    if (now_ns >= watch->next_write_back_ns && atomic_exchange(&vm->remap_pending, 0)) {
        close_unmapped(watch, vm, bringer, now_ns);
        watch->next_inspection_ns = now_ns < watch->next_inspection_ns ? watch->next_inspection_ns : now_ns;
    }
    if (fl_forks_wait(vm))
        let_children_go(vm);
    if (now_ns >= watch->next_regions_ns) {
        watch->next_regions_ns = now_ns + REGIONS_EVERY_NS;
        if (memory_changed(vm))
            inspect(watch, vm, now_ns);
    }
    if (now_ns >= watch->next_inspection_ns ||
        (atomic_load(&vm->vault.header->unsafe) && now_ns + INSPECT_UNSAFE_NS < watch->next_inspection_ns))
        inspect(watch, vm, now_ns);
}
