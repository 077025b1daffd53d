/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One mover puts, compacts and trims while two fault threads load and free the same pages, as swap/ does it: claim the
 * page table entry, read, check, clear, free. No content may ever be wrong, and no object may be lost or doubled.
 */
#include <pthread.h>
#include <sched.h>

#include "pool_fixture.h"

#define MIB (1ull << 20)
#define PAGES 6000
#define FAULT_THREADS 2
#define PHASES (runs_slowly() ? 8 : 24)
#define MOVED_MIN 100u
#define CLAIMED (1ull << 47)
#define HANDLE_MASK (FL_HANDLE_END - 1)
#define VERSION_SHIFT 48

/* Handle, CLAIMED, and 16 bits of version. 0: not stored. */
static _Atomic(uint64_t) table[PAGES];
static _Atomic(uint32_t) loads, wants_more; /* wants_more: faults pause while the mover fills */
static atomic_bool stop;
static struct fixture fixture;

static void fault(struct rng *rng, uint32_t page, bool forget) {
    static _Thread_local uint8_t content[PAGE_BYTES], expected[PAGE_BYTES];
    (void)rng;
    uint64_t entry = atomic_load_explicit(&table[page], memory_order_acquire);
    if (!entry || entry & CLAIMED ||
        !atomic_compare_exchange_strong_explicit(&table[page], &entry, entry | CLAIMED, memory_order_acq_rel,
                                                 memory_order_relaxed))
        return;
    CHECK(load_page(fixture.pool, entry & HANDLE_MASK, page, content), "page %u does not load", page);
    make_page(expected, page, entry >> VERSION_SHIFT);
    CHECK(memcmp(content, expected, PAGE_BYTES) == 0, "page %u has wrong content", page);
    atomic_store_explicit(&table[page], forget ? 0 : entry, memory_order_release);
    if (forget)
        CHECK(fl_pool_free(fixture.pool, entry & HANDLE_MASK) == 0, "page %u does not free", page);
    atomic_fetch_add_explicit(&loads, 1, memory_order_relaxed);
}

static void *fault_thread(void *argument) {
    struct rng rng = {(uint64_t)(uintptr_t)argument};
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        if (atomic_load_explicit(&wants_more, memory_order_relaxed)) {
            sched_yield();
            continue;
        }
        fault(&rng, rng_below(&rng, PAGES), rng_below(&rng, 4) != 0);
    }
    return NULL;
}

struct relocations {
    uint32_t taken, refused;
};

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    struct relocations *relocations = context;
    CHECK(page < PAGES, "relocated page %llu", (unsigned long long)page);
    uint64_t entry = atomic_load_explicit(&table[page], memory_order_acquire);
    bool taken = entry && !(entry & CLAIMED) && (entry & HANDLE_MASK) == old_handle &&
                 atomic_compare_exchange_strong_explicit(&table[page], &entry, (entry & ~HANDLE_MASK) | new_handle,
                                                         memory_order_acq_rel, memory_order_relaxed);
    if (taken)
        relocations->taken++;
    else
        relocations->refused++;
    return taken;
}

static uint32_t fill(struct rng *rng, struct fl_codec *codec, uint32_t count) {
    uint8_t page_content[PAGE_BYTES];
    uint32_t stored = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = rng_below(rng, PAGES);
        if (atomic_load_explicit(&table[page], memory_order_acquire))
            continue;
        uint64_t handle, version = rng_next(rng) & 0xffff;
        make_page(page_content, page, version);
        if (store_page(fixture.pool, codec, page, page_content, &handle) == 0) {
            atomic_store_explicit(&table[page], handle | version << VERSION_SHIFT, memory_order_release);
            stored++;
        }
    }
    return stored;
}

int main(int argc, char **argv) {
    struct rng rng = {seed_from(argc, argv)};
    struct relocations relocations = {0};
    struct fl_codec *codec;
    pthread_t threads[FAULT_THREADS];
    uint64_t peak = 0;
    uint32_t stored = 0, compactions = 0;

    fixture_make(&fixture, 64 * MIB, 64 * MIB);
    CHECK(fl_codec_create(&codec) == 0, "fl_codec_create");
    atomic_store(&wants_more, 1);
    for (uintptr_t i = 0; i < FAULT_THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, fault_thread, (void *)(uintptr_t)(rng_next(&rng) >> 1)) == 0, "thread");

    /* And on, where faults forget pages before the mover, which gets little CPU, comes to move them. */
    for (int phase = 0; phase < PHASES || (relocations.taken <= MOVED_MIN && phase < 10 * PHASES); phase++) {
        atomic_store_explicit(&wants_more, 1, memory_order_relaxed);
        stored += fill(&rng, codec, PAGES * 2);
        if (fixture_stats(&fixture).pool_bytes > peak)
            peak = fixture_stats(&fixture).pool_bytes;
        /* Now the pages fault back while the pool draws together and new ones still come. */
        atomic_store_explicit(&wants_more, 0, memory_order_relaxed);
        uint32_t until = atomic_load(&loads) + PAGES * 5 / 4;
        double deadline = wall_seconds() + 30;
        while ((int32_t)(until - atomic_load(&loads)) > 0) {
            CHECK(wall_seconds() < deadline, "faults do not come on");
            compactions += fl_pool_compact(fixture.pool, 64, relocate, &relocations) != 0;
            fl_pool_trim(fixture.pool);
            stored += fill(&rng, codec, 8);
        }
    }
    atomic_store(&stop, true);
    for (int i = 0; i < FAULT_THREADS; i++)
        pthread_join(threads[i], NULL);

    uint64_t live = 0;
    for (uint32_t page = 0; page < PAGES; page++)
        live += atomic_load(&table[page]) != 0;
    CHECK(fixture_stats(&fixture).objects == live, "%llu objects, %llu entries",
          (unsigned long long)fixture_stats(&fixture).objects, (unsigned long long)live);
    CHECK(relocations.taken > MOVED_MIN, "only %u objects were moved", relocations.taken);
    printf("%u stored, %u loads, %u moved in %u compactions, %u moves refused, peak %llu KiB\n", stored,
           atomic_load(&loads), relocations.taken, compactions, relocations.refused, (unsigned long long)peak >> 10);
    for (uint32_t page = 0; page < PAGES; page++)
        fault(&rng, page, true);
    while (fl_pool_trim(fixture.pool))
        ;
    CHECK(fixture_stats(&fixture).objects == 0 && fixture_stats(&fixture).stored_bytes == 0, "not empty");
    /* The threads here look at objects they do not own: such a look at a slab just punched out fills one page again. */
    CHECK(fixture_host_bytes(&fixture) <= 4 * FL_SLAB_BYTES + 16 * PAGE_BYTES, "host memory kept");
    fl_codec_destroy(codec);
    fixture_destroy(&fixture);
    return 0;
}
