/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 at any instruction: a child puts, loads, frees, compacts and trims with two threads; a page table in shared
 * memory is the truth. After each kill the pool is rebuilt from it, and every page that it names must be intact, no
 * object more may be counted, and the host must hold no slab more than the pool says.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

#include "pool_fixture.h"

#define MIB (1ull << 20)
#define PAGES 1024
#define ROUNDS 200
#define CLAIMED (1ull << 47)
#define HANDLE_MASK (FL_HANDLE_END - 1)
#define VERSION_SHIFT 48

struct truth {
    _Atomic(uint64_t) table[PAGES]; /* handle, CLAIMED, version; 0: not stored */
    _Atomic(uint64_t) puts, loads, moves, rebuilds;
    atomic_bool serving;
};

static struct truth *truth;
static struct fixture fixture;

static void rebuild(void) {
    CHECK(fl_pool_rebuild_begin(fixture.pool) == 0, "begin");
    for (uint32_t page = 0; page < PAGES; page++) {
        uint64_t entry = atomic_load(&truth->table[page]);
        if (entry)
            CHECK(fl_pool_rebuild_mark(fixture.pool, entry & HANDLE_MASK, page) == 0, "page %u lost", page);
    }
    fl_pool_rebuild_end(fixture.pool);
    atomic_fetch_add(&truth->rebuilds, 1);
}

static void check_page(uint32_t page, uint64_t entry) {
    uint8_t content[PAGE_BYTES], expected[PAGE_BYTES];
    CHECK(load_page(fixture.pool, entry & HANDLE_MASK, page, content), "page %u does not load", page);
    make_page(expected, page, entry >> VERSION_SHIFT);
    CHECK(memcmp(content, expected, PAGE_BYTES) == 0, "page %u has wrong content", page);
}

/* ---- The child ---- */

static void load(uint32_t page) {
    uint64_t entry = atomic_load_explicit(&truth->table[page], memory_order_acquire);
    if (!entry || entry & CLAIMED || !atomic_compare_exchange_strong(&truth->table[page], &entry, entry | CLAIMED))
        return;
    check_page(page, entry);
    atomic_store_explicit(&truth->table[page], 0, memory_order_release);
    CHECK(fl_pool_free(fixture.pool, entry & HANDLE_MASK) == 0, "page %u does not free", page);
    atomic_fetch_add_explicit(&truth->loads, 1, memory_order_relaxed);
}

static void *fault_thread(void *argument) {
    struct rng rng = {(uint64_t)(uintptr_t)argument};
    for (;;)
        load(rng_below(&rng, PAGES));
    return NULL;
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    (void)context;
    CHECK(page < PAGES, "relocated page %llu", (unsigned long long)page);
    uint64_t entry = atomic_load_explicit(&truth->table[page], memory_order_acquire);
    return entry && !(entry & CLAIMED) && (entry & HANDLE_MASK) == old_handle &&
           atomic_compare_exchange_strong(&truth->table[page], &entry, (entry & ~HANDLE_MASK) | new_handle);
}

static void store(struct rng *rng, struct fl_codec *codec, uint32_t page) {
    uint8_t content[PAGE_BYTES];
    uint64_t handle, version = rng_next(rng) & 0xffff;
    make_page(content, page, version);
    if (store_page(fixture.pool, codec, page, content, &handle))
        return; /* does not compress, or the pool is at its limit */
    atomic_store_explicit(&truth->table[page], handle | version << VERSION_SHIFT, memory_order_release);
    atomic_fetch_add_explicit(&truth->puts, 1, memory_order_relaxed);
}

static _Noreturn void child(uint64_t seed) {
    struct rng rng = {seed};
    struct fl_codec *codec;
    pthread_t thread;

    fixture_open_pool(&fixture, MIB + rng_below(&rng, MIB));
    rebuild();
    CHECK(fl_codec_create(&codec) == 0, "fl_codec_create");
    if (rng_below(&rng, 2))
        CHECK(pthread_create(&thread, NULL, fault_thread, (void *)(uintptr_t)(rng_next(&rng) >> 1)) == 0, "thread");
    atomic_store(&truth->serving, true);
    /* Lives on a clock of its own too, should the parent be gone. */
    for (double until = wall_seconds() + 10; wall_seconds() < until;) {
        bool filling = rng_below(&rng, 2);
        for (int i = 0; i < 300; i++) {
            uint32_t page = rng_below(&rng, PAGES);
            if (filling && !atomic_load(&truth->table[page]))
                store(&rng, codec, page);
            else if (!filling)
                load(page);
            if (i % 50 == 0)
                atomic_fetch_add(&truth->moves, fl_pool_compact(fixture.pool, 32, relocate, NULL));
            if (i % 100 == 0)
                fl_pool_trim(fixture.pool);
        }
    }
    _exit(2);
}

/* ---- The parent ---- */

static void pause_for(uint64_t microseconds) {
    struct timespec time = {.tv_nsec = (long)(microseconds * 1000)};
    nanosleep(&time, NULL);
}

static void run_and_kill(struct rng *rng) {
    atomic_store(&truth->serving, false);
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork");
    if (pid == 0)
        child(rng_next(rng));
    if (rng_below(rng, 4)) { /* else it may well die in its rebuild */
        for (int i = 0; i < 50000 && !atomic_load(&truth->serving); i++)
            pause_for(100);
    }
    pause_for(1 + rng_below(rng, runs_slowly() ? 30000 : 8000));
    CHECK(kill(pid, SIGKILL) == 0, "kill");
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid, "waitpid");
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the child failed by itself: status %x", status);
}

/* Returns how many pages were stored. */
static uint32_t check_all(void) {
    fixture_open_pool(&fixture, UINT64_MAX);
    /* A load that was cut off has not happened. */
    for (uint32_t page = 0; page < PAGES; page++)
        atomic_fetch_and(&truth->table[page], ~CLAIMED);
    rebuild();
    uint64_t objects = 0, bytes = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        uint64_t entry = atomic_load(&truth->table[page]);
        if (!entry)
            continue;
        const struct fl_object *object;
        check_page(page, entry);
        CHECK(fl_pool_get(fixture.pool, entry & HANDLE_MASK, &object) == 0, "page %u", page);
        objects++;
        bytes += object->length;
    }
    struct fl_pool_stats stats = fixture_stats(&fixture);
    CHECK(stats.objects == objects, "%d objects too many", (int)(stats.objects - objects));
    CHECK(stats.stored_bytes == bytes, "%d stored bytes too many", (int)(stats.stored_bytes - bytes));
    CHECK(stats.aside_bytes == 0, "a slab was taken for damaged");
    CHECK(stats.pool_bytes == fixture_host_bytes(&fixture), "pool says %llu, host %llu",
          (unsigned long long)stats.pool_bytes, (unsigned long long)fixture_host_bytes(&fixture));
    fl_pool_close(fixture.pool);
    return (uint32_t)objects;
}

int main(int argc, char **argv) {
    struct rng rng = {seed_from(argc, argv)};
    uint64_t seen = 0;

    truth = mmap(NULL, sizeof *truth, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(truth != MAP_FAILED, "mmap");
    fixture_make(&fixture, 4 * MIB, 4 * MIB);
    fl_pool_close(fixture.pool);
    for (int round = 0; round < ROUNDS; round++) {
        run_and_kill(&rng);
        seen += check_all();
    }
    uint64_t puts = atomic_load(&truth->puts), loads = atomic_load(&truth->loads), moves = atomic_load(&truth->moves);
    printf("%d kills: %llu puts, %llu loads, %llu moves, %llu pages checked after a kill\n", ROUNDS,
           (unsigned long long)puts, (unsigned long long)loads, (unsigned long long)moves, (unsigned long long)seen);
    CHECK(puts > ROUNDS && loads > ROUNDS && seen > ROUNDS && moves > 0,
          "the children did too little to mean anything");
    return 0;
}
