/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/event.h"

#include <unistd.h>

#include "base/kernel.h"
#include "base/log.h"
#include "swap/removed.h"

static void unsafe(struct fl_vm *vm, const char *what, uint64_t start, uint64_t end) {
    uint32_t none = FL_REFUSAL_NONE;
    atomic_fetch_add(&vm->unsafe_events, 1); /* first: see become_safe() in pager/watch.c */
    atomic_compare_exchange_strong(&vm->vault.header->unsafe, &none, FL_REFUSAL_OTHER_MAPPER);
    atomic_store(&vm->remap_pending, 1);
    fl_log(
        FL_LOG_WARNING, "address_space_changed",
        "\"what\":\"%s\",\"start\":\"%llx\",\"end\":\"%llx\",\"detail\":\"everything is brought back and nothing more "
        "evicted until the VMM's memory is mapped in one place again\"",
        what, (unsigned long long)start, (unsigned long long)end);
}

static void parted(struct fl_vm *vm, const char *what, uint64_t start, uint64_t end) {
    unsafe(vm, what, start, end);
    atomic_store(&vm->parted, true);
}

static void unmapped(struct fl_vm *vm, uint64_t start, uint64_t end) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        uint64_t from = atomic_load(&region->vmm_addr), to = from + region->length;
        if (atomic_load(&region->gone) || end <= from || start >= to)
            continue;
        if (start <= from && end >= to) {
            fl_vault_leave_region(&vm->vault, i);
            atomic_store(&vm->remap_pending, 1);
            fl_log(FL_LOG_INFO, "region_unmapped", "\"region\":%u,\"bytes\":%llu", i,
                   (unsigned long long)region->length);
        } else {
            parted(vm, "part of a region was unmapped", start, end);
        }
    }
}

static void remapped(struct fl_vm *vm, uint64_t from, uint64_t to, uint64_t length) {
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        uint64_t start = atomic_load(&region->vmm_addr);
        if (atomic_load(&region->gone) || from + length <= start || from >= start + region->length)
            continue;
        if (from == start && length == region->length) {
            fl_vault_move_region(&vm->vault, i, to);
            fl_log(FL_LOG_INFO, "region_moved", "\"region\":%u,\"to\":\"%llx\"", i, (unsigned long long)to);
        } else {
            parted(vm, "part of a region was moved", from, from + length);
        }
    }
}

static void forked(struct fl_vm *vm, int child_uffd) {
    unsafe(vm, "the VMM forked with guest memory mapped", 0, 0);
    for (uint32_t i = 0; i < FL_FORKS_MAX; i++) {
        int none = -1;
        if (atomic_compare_exchange_strong(&vm->forks[i], &none, child_uffd))
            return;
    }
    /* No place left. Closing it would let the child read holes as zeros; keeping it open lets the child wait. */
    fl_log_text(
        FL_LOG_ERROR, "too_many_forks",
        "process %d has forked more than %d times while memory of it was away: the last child waits in each touch of "
        "that until this pager ends; end the child",
        vm->pid, FL_FORKS_MAX);
}

struct fl_pages fl_event(struct fl_vm *vm, const struct uffd_msg *message) {
    struct fl_pages removed = {0, 0};
    switch (message->event) {
    case UFFD_EVENT_REMOVE:
        removed = fl_removed_by(vm, message->arg.remove.start, message->arg.remove.end);
        break;
    case UFFD_EVENT_REMAP:
        remapped(vm, message->arg.remap.from, message->arg.remap.to, message->arg.remap.len);
        break;
    case UFFD_EVENT_UNMAP:
        unmapped(vm, message->arg.remove.start, message->arg.remove.end);
        break;
    case UFFD_EVENT_FORK:
        forked(vm, (int)message->arg.fork.ufd);
        break;
    default:
        fl_log(FL_LOG_WARNING, "unknown_uffd_event", "\"event\":%u", message->event);
    }
    return removed;
}
