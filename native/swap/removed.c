/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/removed.h"

#include <sched.h>

#include "base/log.h"
#include "swap/load.h"
#include "swap/mapped.h"

/* ---- notes ------------------------------------------------------------------------------------------------- */

void fl_removed_reading(struct fl_vm *vm) {
    atomic_fetch_add(&vm->removals.reads, 1);
}

void fl_removed_was_read(struct fl_vm *vm) {
    atomic_fetch_add(&vm->removals.reads, 1);
}

bool fl_removed_is_reading(struct fl_vm *vm) {
    return atomic_load(&vm->removals.reads) & 1;
}

static void wait_for_reader(const struct fl_removals *removals) {
    uint64_t seen = atomic_load(&removals->reads);
    while (seen & 1 && atomic_load(&removals->reads) == seen)
        sched_yield();
}

/* An end is written last, and says nothing when it is 0. */
static void write_note(struct fl_note *note, struct fl_pages pages) {
    atomic_store(&note->first, pages.first);
    atomic_store(&note->end, pages.end);
}

static struct fl_pages read_note(const struct fl_note *note) {
    return (struct fl_pages){atomic_load(&note->first), atomic_load(&note->end)};
}

static bool note_has(const struct fl_note *note, uint64_t page) {
    uint64_t end = atomic_load(&note->end);
    return page < end && page >= atomic_load(&note->first) && atomic_load(&note->end) == end;
}

void fl_removed_note(struct fl_vm *vm, uint32_t place, struct fl_pages pages) {
    if (pages.first >= pages.end)
        return;
    atomic_fetch_add(&vm->removals.forgetting_count, 1);
    write_note(&vm->removals.forgetting[place], pages);
    write_note(&vm->vault.header->forgetting[place], pages);
}

static bool is_being_forgotten(const struct fl_removals *removals, uint64_t page) {
    if (!atomic_load(&removals->forgetting_count))
        return false;
    for (uint32_t i = 0; i < FL_FORGETTING_MAX; i++)
        if (note_has(&removals->forgetting[i], page))
            return true;
    return false;
}

static uint32_t put_off_count(const struct fl_removals *removals) {
    uint32_t count = atomic_load(&removals->count);
    return count < FL_REMOVALS_MAX ? count : FL_REMOVALS_MAX;
}

static bool is_put_off(const struct fl_removals *removals, uint64_t page, uint32_t first, uint32_t end) {
    for (uint32_t i = first; i < end; i++)
        if (note_has(&removals->put_off[i], page))
            return true;
    return false;
}

enum fl_removed fl_removed(struct fl_vm *vm, uint64_t page) {
    const struct fl_removals *removals = &vm->removals;
    wait_for_reader(removals);
    uint64_t zaps = atomic_load(&removals->zaps);
    uint32_t known = atomic_load(&removals->zap_seen) ? atomic_load(&removals->before_seen) : 0;
    if (is_being_forgotten(removals, page))
        return FL_REMOVED_SURELY;
    /* What was put off for another zap than the one that was seen may be a piece of that. */
    if (is_put_off(removals, page, 0, known))
        return atomic_load(&removals->zaps) == zaps ? FL_REMOVED_SURELY : FL_REMOVED_PERHAPS;
    return is_put_off(removals, page, known, put_off_count(removals)) ? FL_REMOVED_PERHAPS : FL_REMOVED_NOT;
}

bool fl_removed_meanwhile(struct fl_vm *vm, uint64_t page, fl_entry mine, enum fl_removed known) {
    return fl_removed(vm, page) > known || fl_freed(vm, page, mine);
}

/* ---- forgetting -------------------------------------------------------------------------------------------- */

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

static void forget(struct fl_vm *vm, struct fl_pages pages) {
    uint64_t forgotten = 0;
    for (uint64_t page = pages.first; page < pages.end; page++) {
        fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_acquire);
        if (entry) /* most of what is freed at once is not away */
            forgotten += forget_page(vm, page, entry);
    }
    FL_COUNT(vm, removed_pages, forgotten);
}

bool fl_removed_forget(struct fl_vm *vm, uint32_t place) {
    struct fl_note *note = &vm->removals.forgetting[place], *kept = &vm->vault.header->forgetting[place];
    struct fl_pages left = read_note(note), now = left;
    if (left.first >= left.end)
        return false;
    if (now.end - now.first > FL_FORGET_PAGES)
        now.end = now.first + FL_FORGET_PAGES;
    forget(vm, now);
    atomic_store(&note->first, now.end);
    atomic_store(&kept->first, now.end);
    if (now.end < left.end)
        return true;
    atomic_store(&kept->end, 0);
    atomic_store(&note->end, 0);
    atomic_fetch_sub(&vm->removals.forgetting_count, 1);
    return false;
}

void fl_removed_finish(struct fl_vm *vm) {
    uint64_t removed = FL_READ(vm, removed_pages), all = 0;
    for (uint32_t i = 0; i < fl_region_count(vm); i++)
        if (all < fl_region(vm, i)->first_page + fl_region_pages(vm, i))
            all = fl_region(vm, i)->first_page + fl_region_pages(vm, i);
    for (uint32_t i = 0; i < FL_FORGETTING_MAX; i++) {
        struct fl_note *kept = &vm->vault.header->forgetting[i];
        struct fl_pages pages = read_note(kept); /* where the VMM can write */
        if (pages.end > all)
            pages.end = all;
        forget(vm, pages);
        atomic_store(&kept->end, 0);
    }
    removed = FL_READ(vm, removed_pages) - removed;
    if (removed)
        fl_log(FL_LOG_INFO, "forgotten_late", "\"pages\":%llu", (unsigned long long)removed);
}

void fl_removed_forget_page(struct fl_vm *vm, uint64_t page, fl_entry entry) {
    if (!fl_swap_entry(vm, page, &entry, 0))
        return;
    fl_give_up_copy(vm, entry);
    FL_COUNT(vm, removed_pages, 1);
}

/* ---- our own zap ------------------------------------------------------------------------------------------- */

bool fl_zap_marked(struct fl_vm *vm) {
    return atomic_load(&vm->vault.header->zap_end) != 0;
}

enum whose { THE_VMMS, OURS, PERHAPS_OURS };

static enum whose whose_is(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_removals *removals = &vm->removals;
    uint64_t zap_start = atomic_load(&vm->vault.header->zap_start), zap_end = atomic_load(&vm->vault.header->zap_end);
    bool seen = atomic_load(&removals->zap_seen);
    if (end > zap_end || start < zap_start)
        return THE_VMMS;
    if (seen) /* a piece of ours that is told again begins behind what has been done */
        return start == zap_start ? THE_VMMS : PERHAPS_OURS;
    if (start != zap_start || end != zap_end)
        return PERHAPS_OURS;
    atomic_store(&removals->zap_start, start);
    atomic_store(&removals->zap_end, end);
    atomic_store(&removals->before_seen, put_off_count(removals));
    atomic_store(&removals->zap_seen, true);
    return OURS;
}

static void put_off(struct fl_removals *removals, struct fl_pages pages) {
    uint32_t place = atomic_fetch_add(&removals->count, 1);
    if (place < FL_REMOVALS_MAX)
        write_note(&removals->put_off[place], pages);
}

struct fl_pages fl_removed_by(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_pages removed = {0, 0};
    enum whose whose = whose_is(vm, start, end);
    for (uint32_t i = 0; i < fl_region_count(vm); i++) {
        struct fl_vault_region *region = fl_region(vm, i);
        uint64_t base = atomic_load(&region->vmm_addr), stop = base + region->length;
        if (atomic_load(&region->gone) || end <= base || start >= stop)
            continue;
        struct fl_pages pages = {region->first_page + ((start > base ? start : base) - base) / FL_PAGE_SIZE,
                                 region->first_page + ((end < stop ? end : stop) - base) / FL_PAGE_SIZE};
        if (whose == OURS)
            write_note(&vm->removals.taken_for_ours, pages);
        else if (whose == PERHAPS_OURS)
            put_off(&vm->removals, pages);
        else if (removed.first == removed.end)
            removed = pages;
        else
            forget(vm, pages);
    }
    return removed;
}

void fl_zap_mark(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_vault_header *header = vm->vault.header;
    atomic_store(&vm->removals.count, 0);
    atomic_store(&vm->removals.before_seen, 0);
    atomic_store(&vm->removals.zap_seen, false);
    atomic_store(&vm->removals.taken_for_ours.end, 0);
    atomic_fetch_add(&vm->removals.zaps, 1); /* see fl_removed() */
    atomic_store(&header->zap_start, start);
    atomic_store(&header->zap_end, end); /* last: a mark without an end marks nothing */
}

void fl_zap_unmark(struct fl_vm *vm) {
    atomic_store(&vm->vault.header->zap_end, 0);
}

static void forget_put_off(struct fl_vm *vm, uint32_t first, uint32_t end) {
    for (uint32_t i = first; i < end; i++)
        forget(vm, read_note(&vm->removals.put_off[i]));
}

void fl_zap_decide(struct fl_vm *vm, bool made) {
    struct fl_removals *removals = &vm->removals;
    bool seen = atomic_load(&removals->zap_seen);
    uint32_t count = put_off_count(removals), known = atomic_load(&removals->before_seen);
    uint64_t start = atomic_load(&removals->zap_start), end = atomic_load(&removals->zap_end);
    if (!made && seen)
        forget(vm, read_note(&removals->taken_for_ours));
    if (!made || (seen && count > known && !fl_mapping_begins_in(vm, start, end)))
        known = count; /* none of them can be a piece of ours */
    if (!made || seen)
        forget_put_off(vm, 0, known);
    if (atomic_load(&removals->count) > FL_REMOVALS_MAX)
        fl_log(FL_LOG_WARNING, "removals_not_noted",
               "\"count\":%u,\"detail\":\"the VMM freed memory so often during one zap; what of that was away still "
               "counts as away, and what the guest finds there is its own old bytes\"",
               atomic_load(&removals->count) - FL_REMOVALS_MAX);
    for (uint32_t i = 0; i < FL_REMOVALS_MAX; i++)
        atomic_store(&removals->put_off[i].end, 0);
    atomic_store(&removals->count, 0);
}
