/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/load.h"

#include <errno.h>

#include "base/clock.h"
#include "base/log.h"
#include "swap/uffd.h"

#define LOGGED_MAX 16u /* damaged pages named in the log; the others are counted */

static const uint8_t page_of_zeros[FL_PAGE_SIZE] __attribute__((aligned(FL_PAGE_SIZE)));

static int fetch_compressed(struct fl_vm *vm, uint64_t page, uint64_t handle, void *buffer, uint32_t *stored_bytes) {
    const struct fl_object *object;
    int error = fl_pool_get(vm->pool, handle, &object);
    if (error)
        return -EBADMSG;
    uint64_t checksum = object->checksum;
    *stored_bytes = object->length;
    if (object->page != (uint32_t)page || fl_decompress(object->payload, object->length, buffer) ||
        fl_page_checksum(buffer, page) != checksum)
        return -EBADMSG;
    return 0;
}

int fl_fetch(struct fl_vm *vm, uint64_t page, fl_entry entry, void *buffer, const void **content,
             uint32_t *stored_bytes) {
    uint32_t pattern;
    *stored_bytes = 0;
    *content = buffer;
    if (!fl_entry_valid(entry))
        return -EBADMSG;
    switch (fl_entry_tier(entry)) {
    case FL_TIER_ZERO:
        *content = page_of_zeros;
        return 0;
    case FL_TIER_SAME:
        if (!fl_same_pattern(page, fl_entry_payload(entry), &pattern))
            return -EBADMSG;
        for (uint32_t i = 0; i < FL_PAGE_SIZE / sizeof(pattern); i++)
            ((uint32_t *)buffer)[i] = pattern;
        return 0;
    case FL_TIER_RAM:
        return fetch_compressed(vm, page, fl_entry_payload(entry), buffer, stored_bytes);
    case FL_TIER_SETTLING:
    case FL_TIER_BROUGHT:
    case FL_TIER_REJECTED:
        break;
    }
    return -EBADMSG;
}

void fl_discard(struct fl_vm *vm, fl_entry entry) {
    if (fl_entry_tier(entry) == FL_TIER_RAM)
        (void)fl_pool_free(vm->pool, fl_entry_payload(entry));
}

void fl_give_up_copy(struct fl_vm *vm, fl_entry entry) {
    fl_discard(vm, entry);
    fl_count_away(vm, fl_entry_tier(entry), -1);
}

int fl_poison_hole(struct fl_vm *vm, uint32_t region, uint64_t page) {
    uint64_t address = fl_address_of_page(vm, region, page);
    int error = fl_uffd_poison(vm, address);
    if (error != -EEXIST)
        return error;
    /* Poisoned already, or only protected: lifting does nothing to a poison. */
    error = fl_uffd_protect(vm, address, FL_PAGE_SIZE, false);
    if (!error)
        error = fl_uffd_poison(vm, address);
    if (error == -EEXIST)
        error = fl_uffd_wake(vm, address, FL_PAGE_SIZE);
    return error;
}

/* Beyond repair it stays counted: with something away too many nothing is let go too early. */
void fl_count_out(struct fl_vm *vm, fl_entry entry) {
    fl_entry before;
    if (!fl_entry_before_flip(entry, &before))
        return;
    if (fl_entry_state(before) == FL_PAGE_EVICTED || fl_entry_state(before) == FL_PAGE_LOADING)
        fl_count_away(vm, fl_entry_tier(before), -1);
}

void fl_poison(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry) {
    uint64_t now = fl_now();
    atomic_store(&vm->vault.header->corrupt, 1);
    atomic_store_explicit(fl_slot(vm, page), fl_entry_make(FL_PAGE_POISONED, FL_TIER_ZERO, 0), memory_order_release);
    int error = fl_poison_hole(vm, region, page);
    FL_COUNT(vm, checksum_errors, 1);
    FL_COUNT(vm, poisoned_pages, error != -ENOSYS); /* refused for now: the next fault repeats it */
    fl_count_out(vm, entry);
    fl_record(vm, FL_RECORD_ERROR, fl_entry_tier(entry), now, 1, FL_WHY_CORRUPT, page);
    if (FL_READ(vm, checksum_errors) > LOGGED_MAX)
        return;
    fl_log(
        FL_LOG_ERROR, "page_corrupt",
        "\"page\":%llu,\"entry\":\"%016llx\",\"poison_errno\":%d,\"detail\":\"stored copy failed its check; the guest "
        "gets an error instead of wrong bytes, nothing more is evicted from this VM; move it to another host and "
        "look for failing memory\"",
        (unsigned long long)page, (unsigned long long)entry, -error);
}

int fl_load(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry, enum fl_removed known, void *buffer,
            uint32_t *stored_bytes, uint64_t *woken_ns) {
    const void *content;
    uint64_t done;
    if (fl_fetch(vm, page, entry, buffer, &content, stored_bytes)) {
        fl_poison(vm, region, page, entry);
        return -EBADMSG;
    }
    uint64_t address = fl_address_of_page(vm, region, page);
    /* As late as can be: between here and the call behind it a page that is freed still gets its old content. */
    int error = fl_removed_meanwhile(vm, page, entry, known) ? -EAGAIN
                                                             : fl_uffd_copy(vm, address, content, FL_PAGE_SIZE, &done);
    *woken_ns = fl_now();
    if (error && error != -EEXIST) {
        if (!fl_settle(vm, page, entry, fl_entry_with_state(entry, FL_PAGE_EVICTED)))
            fl_give_up_copy(vm, entry);
        return error;
    }
    if (error) /* the VMM filled the hole itself; its page is the newer one, and COPY has woken nobody */
        (void)fl_uffd_wake(vm, address, FL_PAGE_SIZE);
    __atomic_store_n(&vm->vault.ages[page], 0, __ATOMIC_RELAXED);
    (void)fl_settle(vm, page, entry, 0);
    fl_give_up_copy(vm, entry);
    return 0;
}
