/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/evict.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "swap/load.h"
#include "swap/uffd.h"

#define PROTECT_TRIES 50u
/* Sync mode is left after 4 ms, and a batch shrinks until it takes no longer than one: 5 ms, unless the CPU is taken away. */
#define SYNC_BATCH_NS FL_NS_PER_MS
#define SYNC_LEAVE_NS (FL_SYNC_NS - SYNC_BATCH_NS)
#define SYNC_BATCH_PAGES_MIN 4u

struct fl_evictor {
    struct fl_vm *vm;
    fl_accessed_fn accessed;
    void *context;
    struct fl_codec *codec;
    uint32_t batch_pages; /* at most FL_BATCH_PAGES; fewer where a batch takes long and everybody waits for it */
    uint8_t payload[FL_PAYLOAD_MAX];
    uint8_t pages[FL_BATCH_PAGES * FL_PAGE_SIZE] __attribute__((aligned(FL_PAGE_SIZE)));
};

/* A run of adjacent pages that goes through the steps together. */
struct batch {
    uint32_t region;
    uint64_t first;
    uint32_t count;
    fl_entry entry[FL_BATCH_PAGES]; /* what the table holds for each page while it is ours; 0: not ours any more */
};

int fl_evictor_create(struct fl_vm *vm, fl_accessed_fn accessed, void *context, struct fl_evictor **out) {
    struct fl_evictor *evictor = aligned_alloc(FL_PAGE_SIZE, sizeof(*evictor));
    if (!evictor)
        return -ENOMEM;
    memset(evictor, 0, sizeof(*evictor));
    evictor->vm = vm;
    evictor->accessed = accessed;
    evictor->context = context;
    evictor->batch_pages = vm->freeze == FL_FREEZE_RWP ? SYNC_BATCH_PAGES_MIN : FL_BATCH_PAGES;
    int error = fl_codec_create(&evictor->codec);
    if (error) {
        free(evictor);
        return error;
    }
    *out = evictor;
    return 0;
}

void fl_evictor_destroy(struct fl_evictor *evictor) {
    if (!evictor)
        return;
    fl_codec_destroy(evictor->codec);
    free(evictor);
}

static int protect(struct fl_vm *vm, const struct batch *batch, bool on) {
    uint64_t address = fl_address_of_page(vm, batch->region, batch->first);
    return fl_uffd_protect_patiently(vm, address, (uint64_t)batch->count * FL_PAGE_SIZE, on, PROTECT_TRIES);
}

/*
 * Lift the protection and wake; goes on until it is done, because waiters have nobody else. Under RWP what stayed
 * keeps its protection: it is what shows the next touch, and asynchronous again it makes nobody wait.
 */
static void release(struct fl_vm *vm, const struct batch *batch) {
    int error;
    if (vm->freeze == FL_FREEZE_RWP) {
        error = fl_uffd_wake(vm, fl_address_of_page(vm, batch->region, batch->first),
                             (uint64_t)batch->count * FL_PAGE_SIZE);
        if (error == -ESRCH)
            atomic_store(&vm->gone, 1);
        return;
    }
    while ((error = protect(vm, batch, false)) == -EAGAIN && !atomic_load(&vm->gone))
        fl_sleep_ns(FL_NS_PER_MS);
    if (error == -ESRCH)
        atomic_store(&vm->gone, 1);
    else if (error && error != -ENOENT)
        fl_log_text(FL_LOG_ERROR, "unprotect_failed", "UFFDIO_WRITEPROTECT off at page %llu, %u pages: %s",
                    (unsigned long long)batch->first, batch->count, strerror(-error));
}

/* Give page i back as resident if it is still ours. */
static void let_go(struct fl_vm *vm, struct batch *batch, uint32_t i, enum fl_tier mark) {
    fl_entry mine = batch->entry[i], now = mine;
    fl_entry after = mark == FL_TIER_REJECTED ? fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0) : 0;
    if (fl_entry_state(mine) == FL_PAGE_PUNCHING) {
        (void)fl_settle(vm, batch->first + i, mine, after);
        fl_discard(vm, mine);
    } else if (mine) {
        (void)fl_swap_entry(vm, batch->first + i, &now,
                            after); /* nothing is stored yet, and anybody may have cancelled it */
    }
    batch->entry[i] = 0;
}

/* FREEZING for every page that is still an ordinary resident one. Returns how many. */
static uint32_t claim(struct fl_vm *vm, struct batch *batch) {
    fl_entry freezing = fl_entry_make(FL_PAGE_FREEZING, FL_TIER_ZERO, 0);
    uint32_t claimed = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        fl_entry expected = 0;
        batch->entry[i] = 0;
        if (fl_swap_entry(vm, batch->first + i, &expected, freezing)) {
            batch->entry[i] = freezing;
            claimed++;
        }
    }
    return claimed;
}

/* Those of the batch that somebody has touched after all. */
static int drop_accessed(struct fl_evictor *evictor, struct batch *batch) {
    uint64_t accessed[FL_BATCH_PAGES / 64];
    if (!evictor->accessed)
        return 0;
    int error = evictor->accessed(evictor->context, batch->region, batch->first, batch->count, accessed);
    for (uint32_t i = 0; i < batch->count && !error; i++)
        if (accessed[i / 64] >> (i % 64) & 1)
            let_go(evictor->vm, batch, i, FL_TIER_ZERO);
    return error;
}

/*
 * From now on every touch (WP: every write) cancels, and there was none since the last arming. Both sides of the protection
 * are looked at: RWP's hides what came before it; what slips in before WP's is seen only after it.
 */
static int freeze(struct fl_evictor *evictor, struct batch *batch) {
    int error = evictor->vm->freeze == FL_FREEZE_RWP ? drop_accessed(evictor, batch) : 0;
    if (!error)
        error = protect(evictor->vm, batch, true);
    return error ? error : drop_accessed(evictor, batch);
}

static int read_pages(struct fl_evictor *evictor, const struct batch *batch) {
    struct fl_vm *vm = evictor->vm;
    size_t want = (size_t)batch->count * FL_PAGE_SIZE, got = 0;
    off_t offset = (off_t)fl_offset_of_page(vm, batch->region, batch->first);
    while (got < want) {
        ssize_t n = pread(vm->memory[batch->region].fd, evictor->pages + got, want - got, offset + (off_t)got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO; /* past the end of the file: the VMM shrank it */
        got += (size_t)n;
    }
    return 0;
}

/* The stored form of one page. 0; -E2BIG: does not compress; -ENOSPC: no room. */
static int store_page(struct fl_evictor *evictor, uint64_t page, const void *content, fl_entry *entry,
                      uint32_t *stored_bytes) {
    uint32_t pattern;
    uint64_t handle;
    *stored_bytes = 0;
    switch (fl_page_classify(content, &pattern)) {
    case FL_PAGE_ZERO:
        *entry = fl_entry_make(FL_PAGE_PUNCHING, FL_TIER_ZERO, 0);
        return 0;
    case FL_PAGE_SAME:
        *entry = fl_entry_make(FL_PAGE_PUNCHING, FL_TIER_SAME, fl_same_payload(page, pattern));
        return 0;
    case FL_PAGE_DATA:
        break;
    }
    uint32_t length = fl_compress(evictor->codec, content, evictor->payload, FL_PAYLOAD_MAX);
    if (!length)
        return -E2BIG;
    int error =
        fl_pool_put(evictor->vm->pool, page, fl_page_checksum(content, page), evictor->payload, length, &handle);
    if (error)
        return error;
    *stored_bytes = length;
    *entry = fl_entry_make(FL_PAGE_PUNCHING, FL_TIER_RAM, handle);
    return 0;
}

/* FREEZING -> PUNCHING, page by page. Returns 0 or what stopped it (the rest is let go). */
static int store_pages(struct fl_evictor *evictor, struct batch *batch, struct fl_evicted *done) {
    struct fl_vm *vm = evictor->vm;
    int error = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        uint64_t page = batch->first + i;
        fl_entry stored, expected = batch->entry[i];
        uint32_t stored_bytes;
        if (!expected)
            continue;
        if (error) {
            let_go(vm, batch, i, FL_TIER_ZERO);
            continue;
        }
        if (atomic_load_explicit(fl_slot(vm, page), memory_order_relaxed) != expected) {
            batch->entry[i] = 0; /* cancelled by a write: don't compress for nothing */
            continue;
        }
        int failed = store_page(evictor, page, evictor->pages + (size_t)i * FL_PAGE_SIZE, &stored, &stored_bytes);
        if (failed) {
            let_go(vm, batch, i, failed == -E2BIG ? FL_TIER_REJECTED : FL_TIER_ZERO);
            if (failed == -E2BIG)
                FL_COUNT(vm, rejected_pages, 1);
            else
                error = failed;
            continue;
        }
        if (fl_swap_entry(vm, page, &expected, stored)) {
            batch->entry[i] = stored;
            done->stored_bytes += stored_bytes;
        } else {
            fl_discard(vm, stored);
            batch->entry[i] = 0;
        }
    }
    return error;
}

int fl_punch(struct fl_vm *vm, uint32_t region, uint64_t first, uint64_t pages) {
    int fd = vm->memory[region].fd;
    off_t offset = (off_t)fl_offset_of_page(vm, region, first);
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, (off_t)(pages * FL_PAGE_SIZE))) {
        if (errno != EINTR)
            return -errno;
    }
    return 0;
}

bool fl_punch_left_zeros(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count) {
    uint64_t cached[FL_BATCH_PAGES / 64];
    int64_t held = fl_pages_held(vm, region, first, count);
    if (held >= 0)
        return held > 0; /* mincore() does not show a page that is on its way to another frame */
    return fl_pages_cached(vm, region, first, count, cached) || cached[0];
}

void fl_write_over_zeros(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, const void *content) {
    size_t bytes = (size_t)count * FL_PAGE_SIZE, done = 0;
    uint64_t failures = 0;
    off_t offset = (off_t)fl_offset_of_page(vm, region, first);
    while (done < bytes && !atomic_load(&vm->gone)) {
        ssize_t n = pwrite(vm->memory[region].fd, (const uint8_t *)content + done, bytes - done, offset + (off_t)done);
        if (n < 0 && errno != EINTR) {
            if (fl_log_worth(++failures))
                fl_log_text(
                    FL_LOG_ERROR, "not_written_back",
                    "pwrite of %zu bytes that could not be evicted to the memfd of process %d, %llu times: %s; tried "
                    "until it works, and touches of these pages wait; free memory on this host",
                    bytes - done, vm->pid, (unsigned long long)failures, strerror(errno));
            fl_sleep_ns(FL_NS_PER_MS);
        }
        done += n > 0 ? (size_t)n : 0;
    }
    fl_log_text(FL_LOG_WARNING, "hole_not_punched",
                "%u pages from page %llu on are part of a huge page that cannot be split now; they stay in memory",
                count, (unsigned long long)first);
}

/* PUNCHING -> EVICTED by runs. A run whose hole cannot be punched stays in memory. */
static int punch_pages(struct fl_evictor *evictor, struct batch *batch, struct fl_evicted *done) {
    struct fl_vm *vm = evictor->vm;
    int error = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        uint32_t end = i;
        while (end < batch->count && batch->entry[end])
            end++;
        if (end == i)
            continue;
        int failed = fl_punch(vm, batch->region, batch->first + i, end - i);
        bool zeros = !failed && fl_punch_left_zeros(vm, batch->region, batch->first + i, end - i);
        if (zeros)
            fl_write_over_zeros(vm, batch->region, batch->first + i, end - i,
                                evictor->pages + (size_t)i * FL_PAGE_SIZE);
        for (uint32_t k = i; k < end; k++) {
            fl_entry mine = batch->entry[k];
            if (failed || zeros) {
                let_go(vm, batch, k, failed ? FL_TIER_ZERO : FL_TIER_REJECTED);
                continue;
            }
            fl_count_away(vm, fl_entry_tier(mine), 1); /* before a fault can count it out again */
            if (fl_settle(vm, batch->first + k, mine, fl_entry_with_state(mine, FL_PAGE_EVICTED))) {
                done->pages++;
            } else {
                fl_give_up_copy(vm, mine);
            }
        }
        error = failed ? failed : error;
        i = end;
    }
    return error;
}

static int evict_batch(struct fl_evictor *evictor, struct batch *batch, struct fl_evicted *done) {
    struct fl_vm *vm = evictor->vm;
    uint64_t before = done->pages;
    if (!claim(vm, batch))
        return 0;
    int error = freeze(evictor, batch);
    if (!error)
        error = read_pages(evictor, batch);
    if (error) {
        for (uint32_t i = 0; i < batch->count; i++)
            let_go(vm, batch, i, FL_TIER_ZERO);
    } else {
        error = store_pages(evictor, batch, done);
        int failed = punch_pages(evictor, batch, done);
        error = error ? error : failed;
    }
    release(vm, batch);
    FL_COUNT(vm, evictions, done->pages - before);
    if (error == -ESRCH)
        atomic_store(&vm->gone, 1);
    return error;
}

/* ---- sync mode, for FL_FREEZE_RWP only ---- */

static int enter_sync(struct fl_vm *vm, uint64_t *since_ns) {
    int error = fl_uffd_sync(vm, true);
    *since_ns = fl_now();
    FL_COUNT(vm, sync_windows, vm->freeze == FL_FREEZE_RWP && !error);
    return error;
}

static void fit_batch(struct fl_evictor *evictor, uint64_t took_ns) {
    if (evictor->vm->freeze != FL_FREEZE_RWP)
        return;
    if (took_ns > SYNC_BATCH_NS && evictor->batch_pages > SYNC_BATCH_PAGES_MIN)
        evictor->batch_pages /= 2;
    else if (took_ns < SYNC_BATCH_NS / 4 && evictor->batch_pages < FL_BATCH_PAGES)
        evictor->batch_pages *= 2;
}

static void leave_sync(struct fl_vm *vm, uint64_t since_ns) {
    fl_uffd_leave_sync(vm);
    uint64_t took = fl_now() - since_ns;
    if (vm->freeze != FL_FREEZE_RWP)
        return;
    FL_COUNT(vm, sync_long_windows, took > FL_SYNC_NS);
    if (took > FL_READ(vm, sync_max_ns))
        FL_SET(vm, sync_max_ns, took);
}

int fl_evict_window(struct fl_evictor *evictor, uint32_t region, uint64_t first, uint32_t count,
                    const uint64_t *candidates, struct fl_evicted *done) {
    struct fl_vm *vm = evictor->vm;
    uint64_t since_ns;
    int error = enter_sync(vm, &since_ns);
    if (error)
        return error;
    for (uint32_t i = 0; i < count && !error;) {
        if (!(candidates[i / 64] >> (i % 64) & 1)) {
            i++;
            continue;
        }
        struct batch batch = {.region = region, .first = first + i, .count = 0};
        while (i < count && batch.count < evictor->batch_pages && candidates[i / 64] >> (i % 64) & 1) {
            batch.count++;
            i++;
        }
        uint64_t start_ns = fl_now();
        error = evict_batch(evictor, &batch, done);
        uint64_t now_ns = fl_now();
        fit_batch(evictor, now_ns - start_ns);
        if (!error && vm->freeze == FL_FREEZE_RWP && now_ns - since_ns > SYNC_LEAVE_NS) {
            leave_sync(vm, since_ns);
            error = enter_sync(vm, &since_ns);
        }
    }
    leave_sync(vm, since_ns);
    return error;
}
