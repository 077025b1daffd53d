/* SPDX-License-Identifier: Apache-2.0 */
#include "area.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "console.h"

enum {
    ERRORS_DESCRIBED = 50, /* one line each; the rest are only counted */
    THREADS_MAX = 32,
};

static const uint32_t entry_locked = UINT32_C(1) << 31;

static uint8_t *page_at(const struct area *area, uint64_t index) {
    return area->base + index * PAGE_BYTES;
}

/* Returns the page's generation. A holder may wait for its page for long, so waiters give the CPU away. */
static uint32_t page_lock(struct area *area, uint64_t index) {
    _Atomic uint32_t *entry = &area->entries[index];

    for (;;) {
        uint32_t generation = atomic_load_explicit(entry, memory_order_relaxed) & ~entry_locked;

        if (atomic_compare_exchange_weak_explicit(entry, &generation, generation | entry_locked, memory_order_acquire,
                                                  memory_order_relaxed))
            return generation;
        sched_yield();
    }
}

static void page_unlock(struct area *area, uint64_t index, uint32_t generation) {
    atomic_store_explicit(&area->entries[index], generation, memory_order_release);
}

static void *reserve(uint64_t bytes, const char *purpose) {
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (start == MAP_FAILED)
        console_fatal("cannot reserve %llu bytes for %s", (unsigned long long)bytes, purpose);
    return start;
}

void area_create(struct area *area, const struct content_mix *mix, uint64_t pages, bool huge_pages) {
    *area = (struct area){.mix = *mix, .reserved_pages = pages};
    area->base = reserve(pages * PAGE_BYTES, "the pages");
    area->entries = reserve(pages * sizeof(*area->entries), "the generations");
    /* EINVAL: a kernel without huge pages, where the advice is not needed. */
    if (madvise(area->base, pages * PAGE_BYTES, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) != 0 && errno != EINVAL)
        console_fatal("cannot advise on huge pages");
}

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void note_slowest(struct area *area, uint64_t took_ns) {
    uint64_t seen = atomic_load_explicit(&area->slowest_ns, memory_order_relaxed);

    while (took_ns > seen && !atomic_compare_exchange_weak(&area->slowest_ns, &seen, took_ns))
        ;
}

/* The page's guest-physical address by /proc/self/pagemap, or 0 where that is not told. */
static uint64_t physical_address(const void *page) {
    uint64_t entry = 0;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (pagemap < 0)
        return 0;
    if (pread(pagemap, &entry, sizeof(entry), (off_t)((uintptr_t)page / PAGE_BYTES * sizeof(entry))) != sizeof(entry))
        entry = 0;
    close(pagemap);
    return (entry & ((UINT64_C(1) << 55) - 1)) * PAGE_BYTES; /* bits 0-54: the page frame number */
}

/* Where wrong words came from tells a lost page from a lost write. */
static const char *looks_like(const struct area *area, uint64_t index, uint32_t generation, const uint64_t *want,
                              const uint64_t *got) {
    uint64_t previous[PAGE_WORDS];
    bool zeros = true, stale = generation > 1;

    content_write(&area->mix, index, generation > 1 ? generation - 1 : 1, previous);
    for (unsigned i = 0; i < PAGE_WORDS; i++) {
        if (got[i] == want[i])
            continue;
        zeros = zeros && got[i] == 0;
        stale = stale && got[i] == previous[i];
    }
    return zeros ? "zeros" : stale ? "previous generation" : "other";
}

static void describe_error(struct area *area, uint64_t index, uint32_t generation, const uint64_t *want,
                           const uint64_t *got) {
    const uint8_t *want_bytes = (const uint8_t *)want, *got_bytes = (const uint8_t *)got;
    unsigned first = 0, wrong = 0;
    bool persistent = memcmp(page_at(area, index), got, PAGE_BYTES) == 0;

    for (unsigned i = PAGE_BYTES; i-- > 0;) {
        if (want_bytes[i] == got_bytes[i])
            continue;
        first = i;
        wrong++;
    }
    console_line("{\"event\":\"error\",\"page\":%llu,\"offset\":%u,\"wrong_bytes\":%u,\"want\":\"%016llx\","
                 "\"got\":\"%016llx\",\"generation\":%u,\"kind\":\"%s\",\"looks_like\":\"%s\","
                 "\"persistent\":%s,\"gpa\":%llu}",
                 (unsigned long long)index, first, wrong, (unsigned long long)want[first / 8],
                 (unsigned long long)got[first / 8], generation,
                 content_kind_name(content_kind(&area->mix, index, generation)),
                 looks_like(area, index, generation, want, got), persistent ? "true" : "false",
                 (unsigned long long)physical_address(page_at(area, index)));
}

void area_check(struct area *area, uint64_t index, bool rewrite) {
    uint64_t want[PAGE_WORDS], got[PAGE_WORDS];
    uint32_t generation = page_lock(area, index);

    if (generation == 0) { /* shrunk away since it was picked */
        page_unlock(area, index, 0);
        return;
    }
    uint64_t start_ns = now_ns();
    memcpy(got, page_at(area, index), PAGE_BYTES);
    note_slowest(area, now_ns() - start_ns);
    content_write(&area->mix, index, generation, want);
    if (memcmp(want, got, PAGE_BYTES) != 0) {
        if (atomic_fetch_add(&area->errors, 1) < ERRORS_DESCRIBED)
            describe_error(area, index, generation, want, got);
        rewrite = true;
    }
    if (rewrite) {
        generation = generation + 1 == entry_locked ? 1 : generation + 1;
        content_write(&area->mix, index, generation, page_at(area, index));
        atomic_fetch_add_explicit(&area->writes, 1, memory_order_relaxed);
    }
    page_unlock(area, index, generation);
    atomic_fetch_add_explicit(&area->checked_pages, 1, memory_order_relaxed);
}

static void fill_page(struct area *area, uint64_t index) {
    page_lock(area, index);
    content_write(&area->mix, index, 1, page_at(area, index));
    page_unlock(area, index, 1);
    atomic_fetch_add_explicit(&area->filled_pages, 1, memory_order_relaxed);
}

static void verify_page(struct area *area, uint64_t index) {
    area_check(area, index, false);
}

struct part {
    struct area *area;
    void (*action)(struct area *area, uint64_t index);
    uint64_t first, last;
};

static void *part_run(void *argument) {
    struct part *part = argument;

    for (uint64_t index = part->first; index < part->last; index++)
        part->action(part->area, index);
    return NULL;
}

static void for_each_page(struct area *area, uint64_t first, uint64_t last, unsigned threads,
                          void (*action)(struct area *, uint64_t)) {
    struct part parts[THREADS_MAX];
    pthread_t workers[THREADS_MAX];
    unsigned count = threads < 1 ? 1 : threads > THREADS_MAX ? THREADS_MAX : threads;

    for (unsigned i = 0; i < count; i++) {
        parts[i] =
            (struct part){area, action, first + (last - first) * i / count, first + (last - first) * (i + 1) / count};
        errno = pthread_create(&workers[i], NULL, part_run, &parts[i]);
        if (errno != 0)
            console_fatal("cannot start a worker thread");
    }
    for (unsigned i = 0; i < count; i++)
        pthread_join(workers[i], NULL);
}

void area_grow(struct area *area, uint64_t pages, unsigned threads) {
    uint64_t active = atomic_load(&area->active_pages);

    if (pages > area->reserved_pages)
        pages = area->reserved_pages;
    if (pages <= active)
        return;
    for_each_page(area, active, pages, threads, fill_page);
    atomic_store(&area->active_pages, pages);
}

void area_shrink(struct area *area, uint64_t pages) {
    uint64_t active = atomic_load(&area->active_pages);

    if (pages >= active)
        return;
    atomic_store(&area->active_pages, pages);
    for (uint64_t index = pages; index < active; index++) {
        page_lock(area, index); /* whoever picked it before is done with it */
        page_unlock(area, index, 0);
    }
    if (madvise(page_at(area, pages), (active - pages) * PAGE_BYTES, MADV_DONTNEED) != 0)
        console_fatal("cannot give memory back");
    atomic_store(&area->filled_pages, pages);
}

void area_verify(struct area *area, unsigned threads) {
    for_each_page(area, 0, atomic_load(&area->active_pages), threads, verify_page);
}

void area_where(struct area *area, uint64_t index) {
    if (index >= atomic_load(&area->active_pages)) {
        console_line("{\"event\":\"refused\",\"text\":\"page %llu is not filled\"}", (unsigned long long)index);
        return;
    }
    uint32_t generation = page_lock(area, index);
    uint64_t address = physical_address(page_at(area, index));
    page_unlock(area, index, generation);
    console_line("{\"event\":\"where\",\"page\":%llu,\"gpa\":%llu,\"generation\":%u}", (unsigned long long)index,
                 (unsigned long long)address, generation);
}
