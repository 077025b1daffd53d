/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/event.h"

#include <unistd.h>

#include "base/kernel.h"
#include "base/log.h"
#include "swap/load.h"

bool fl_event_zap_marked(struct fl_vm *vm) {
    return atomic_load(&vm->vault.header->zap_end) != 0;
}

/* Whether an event may be that of our zap. An exact one is; one inside is put off until that is seen. */
static bool is_our_zap(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_vault_header *header = vm->vault.header;
    uint64_t zap_end = atomic_load(&header->zap_end), zap_start = atomic_load(&header->zap_start);
    if (end > zap_end || start < zap_start)
        return false;
    if (atomic_load(&vm->removals.zap_seen)) /* ours is over */
        return false;
    if (start == zap_start && end == zap_end && !atomic_exchange(&vm->removals.zap_seen, true))
        return true;
    uint32_t place = atomic_fetch_add(&vm->removals.count, 1);
    if (place < FL_REMOVALS_MAX) {
        atomic_store(&vm->removals.put_off[place].start, start);
        atomic_store(&vm->removals.put_off[place].end, end);
    }
    return true;
}

bool fl_event_is_put_off(struct fl_vm *vm, uint64_t address, bool *certain) {
    uint32_t count = atomic_load(&vm->removals.count);
    *certain = atomic_load(&vm->removals.zap_seen);
    /* An end is written last, and counts when it is not 0. */
    for (uint32_t i = 0; i < count && i < FL_REMOVALS_MAX; i++) {
        if (address < atomic_load(&vm->removals.put_off[i].end) &&
            address >= atomic_load(&vm->removals.put_off[i].start))
            return true;
    }
    return false;
}

/* What becomes of an entry whose page is freed; itself: nothing. Resident pages are in the file's hands. */
static fl_entry after_free(fl_entry entry) {
    enum fl_page_state state = fl_entry_state(entry);
    if (!fl_entry_valid(entry))
        return entry;
    if (state == FL_PAGE_EVICTED || state == FL_PAGE_FREEZING)
        return 0;
    if (state == FL_PAGE_PUNCHING || state == FL_PAGE_LOADING)
        return fl_entry_make(state, FL_TIER_ZERO, 0);
    return entry;
}

static bool forget_page(struct fl_vm *vm, uint64_t page, fl_entry entry) {
    fl_entry after;
    do {
        after = after_free(entry);
        if (after == entry)
            return false;
    } while (!fl_swap_entry(vm, page, &entry, after));
    if (fl_entry_state(entry) != FL_PAGE_EVICTED)
        return fl_entry_state(entry) != FL_PAGE_FREEZING; /* its owner does the rest */
    fl_give_up_copy(vm, entry);
    return true;
}

void fl_forget(struct fl_vm *vm, struct fl_range *left) {
    uint64_t start = left->start, end = left->end, forgotten = 0;
    if (end - start > FL_FORGET_PAGES * FL_PAGE_SIZE)
        end = start + FL_FORGET_PAGES * FL_PAGE_SIZE;
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        uint64_t base = atomic_load(&region->vmm_addr), stop = base + region->length;
        if (atomic_load(&region->gone) || end <= base || start >= stop)
            continue;
        uint64_t page = region->first_page + ((start > base ? start : base) - base) / FL_PAGE_SIZE;
        uint64_t last = region->first_page + ((end < stop ? end : stop) - base) / FL_PAGE_SIZE;
        for (; page < last; page++) {
            fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_acquire);
            if (entry) /* most of what is freed at once is not away */
                forgotten += forget_page(vm, page, entry);
        }
    }
    FL_COUNT(vm, removed_pages, forgotten);
    left->start = end;
}

void fl_event_mark_zap(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_vault_header *header = vm->vault.header;
    atomic_store(&vm->removals.count, 0);
    atomic_store(&vm->removals.zap_seen, false);
    atomic_store(&header->zap_start, start);
    atomic_store(&header->zap_end, end); /* last: a mark without an end marks nothing */
}

static void forget_put_off(struct fl_vm *vm) {
    uint32_t count = atomic_load(&vm->removals.count);
    for (uint32_t i = 0; i < count && i < FL_REMOVALS_MAX; i++) {
        struct fl_range left = {atomic_load(&vm->removals.put_off[i].start), atomic_load(&vm->removals.put_off[i].end)};
        while (left.start < left.end)
            fl_forget(vm, &left);
    }
    if (count > FL_REMOVALS_MAX)
        fl_log(FL_LOG_WARNING, "removals_not_noted",
               "\"count\":%u,\"detail\":\"the VMM freed memory so often during one zap; what of that was away still "
               "counts as away, and what the guest finds there is its own old bytes\"",
               count - FL_REMOVALS_MAX);
}

void fl_event_unmark_zap(struct fl_vm *vm) {
    atomic_store(&vm->vault.header->zap_end, 0);
}

void fl_event_settle_zap(struct fl_vm *vm, bool made) {
    if (!made || atomic_load(&vm->removals.zap_seen)) /* else those were our own, in pieces */
        forget_put_off(vm);
    for (uint32_t i = 0; i < FL_REMOVALS_MAX; i++)
        atomic_store(&vm->removals.put_off[i].end, 0);
    atomic_store(&vm->removals.count, 0);
}

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
            unsafe(vm, "part of a region was unmapped", start, end);
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
            unsafe(vm, "part of a region was moved", from, from + length);
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

struct fl_range fl_event(struct fl_vm *vm, const struct uffd_msg *message) {
    struct fl_range removed = {0, 0};
    switch (message->event) {
    case UFFD_EVENT_REMOVE:
        if (!is_our_zap(vm, message->arg.remove.start, message->arg.remove.end))
            removed = (struct fl_range){message->arg.remove.start, message->arg.remove.end};
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
