/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flipped bits anywhere in the pool, in handles, and a peer that scribbles all the while: never a crash, never a read
 * outside, and never wrong content that passes the checks.
 */
#include <errno.h>
#include <pthread.h>

#include "pool_fixture.h"

#define PAGES 200
#define CAPACITY (24ull * FL_SLAB_BYTES)
/* Damage that every check passes would be a hole; damage that nothing notices (unused bytes) is none. */
#define ROUNDS (runs_slowly() ? 300 : 1200)

static struct fixture fixture;
static struct fl_codec *codec;
static struct rng rng;
static uint8_t contents[PAGES][PAGE_BYTES];
static uint64_t handles[PAGES], pristine_handles[PAGES];
static uint8_t *pristine, *pristine_map;
static uint64_t accepted, refused;

static void put(uint32_t page) {
    handles[page] = 0;
    if (store_page(fixture.pool, codec, page, contents[page], &handles[page]))
        handles[page] = 0;
}

static void check(uint32_t page, uint64_t handle) {
    uint8_t content[PAGE_BYTES];
    if (load_page(fixture.pool, handle, page, content)) {
        CHECK(memcmp(content, contents[page], PAGE_BYTES) == 0, "wrong content accepted for page %u", page);
        accepted++;
    } else {
        refused++;
    }
}

static void check_all(void) {
    for (uint32_t page = 0; page < PAGES; page++)
        if (handles[page])
            check(page, handles[page]);
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    (void)context;
    if (page >= PAGES || handles[page] != old_handle)
        return false;
    handles[page] = new_handle;
    return true;
}

static void flip(size_t at) {
    uint8_t *byte = fixture.base + at;
    __atomic_fetch_xor(byte, (uint8_t)(1u << rng_below(&rng, 8)), __ATOMIC_RELAXED);
}

static void damage(uint32_t slabs) {
    for (uint32_t flips = 1 + rng_below(&rng, 12); flips; flips--) {
        size_t slab = (size_t)rng_below(&rng, slabs) * FL_SLAB_BYTES;
        uint32_t page = rng_below(&rng, PAGES);
        switch (rng_below(&rng, 4)) {
        case 0: /* slab header */
            flip(slab + rng_below(&rng, 128));
            break;
        case 1: /* object header */
            if (pristine_handles[page])
                flip(pristine_handles[page] * 8 + rng_below(&rng, sizeof(struct fl_object)));
            break;
        case 2: /* a whole word, anywhere */
            for (size_t at = slab + 8ull * rng_below(&rng, FL_SLAB_BYTES / 8), i = 0; i < 8; i++)
                fixture.base[at + i] = (uint8_t)rng_next(&rng);
            break;
        default:
            flip(slab + rng_below(&rng, FL_SLAB_BYTES));
        }
    }
}

static void do_things(uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = rng_below(&rng, PAGES);
        if (handles[page] && rng_below(&rng, 3)) {
            (void)fl_pool_free(fixture.pool, handles[page]); /* may be refused: its bit may be gone */
            handles[page] = 0;
        } else if (!handles[page]) {
            put(page);
        }
        if (rng_below(&rng, 32) == 0)
            fl_pool_compact(fixture.pool, 40, relocate, NULL);
        if (rng_below(&rng, 32) == 0)
            fl_pool_trim(fixture.pool);
    }
}

static void rebuild(void) {
    fl_pool_close(fixture.pool);
    fixture_open_pool(&fixture, CAPACITY);
    CHECK(fl_pool_rebuild_begin(fixture.pool) == 0, "begin");
    for (uint32_t page = 0; page < PAGES; page++) {
        int error = handles[page] ? fl_pool_rebuild_mark(fixture.pool, handles[page], page) : 0;
        CHECK(error == 0 || error == -EBADMSG || error == -EEXIST, "mark: %s", strerror(-error));
        if (error)
            handles[page] = 0;
    }
    fl_pool_rebuild_end(fixture.pool);
    struct fl_pool_stats stats = fixture_stats(&fixture);
    CHECK(stats.stored_bytes <= stats.pool_bytes && stats.pool_bytes <= CAPACITY, "sums make no sense");
}

static void restore(void) {
    fl_pool_close(fixture.pool);
    memcpy(fixture.base, pristine, CAPACITY);
    memcpy(fixture.slab_map, pristine_map, fl_pool_map_bytes(CAPACITY));
    memcpy(handles, pristine_handles, sizeof handles);
    fixture_open_pool(&fixture, CAPACITY);
    CHECK(fl_pool_rebuild_begin(fixture.pool) == 0, "begin");
    for (uint32_t page = 0; page < PAGES; page++)
        if (handles[page])
            CHECK(fl_pool_rebuild_mark(fixture.pool, handles[page], page) == 0, "pristine page %u", page);
    fl_pool_rebuild_end(fixture.pool);
}

/* Damage under a running pager, then damage that a successor finds. */
static void test_damage(void) {
    uint32_t slabs = (uint32_t)(fixture_stats(&fixture).pool_bytes / FL_SLAB_BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        damage(slabs);
        check_all();
        do_things(100);
        check_all();
        damage(slabs);
        if (rng_below(&rng, 4) == 0)
            for (size_t i = 0; i < fl_pool_map_bytes(CAPACITY); i++)
                ((uint8_t *)fixture.slab_map)[i] ^= (uint8_t)(1u << rng_below(&rng, 8));
        rebuild();
        check_all();
        do_things(100);
        check_all();
        restore();
    }
    printf("damage: %llu loads right, %llu refused\n", (unsigned long long)accepted, (unsigned long long)refused);
    CHECK(accepted > 0 && refused > 0, "one side never came");
}

static void test_handles(void) {
    uint64_t good = accepted;
    for (int i = 0; i < 400 * ROUNDS; i++) {
        uint32_t page = rng_below(&rng, PAGES);
        uint64_t handle = handles[page];
        if (i % 2)
            handle ^= 1ull << rng_below(&rng, 64);
        else if (i % 8)
            handle = handles[rng_below(&rng, PAGES)]; /* another page's */
        else
            handle = rng_next(&rng) >> rng_below(&rng, 64);
        check(page, handle);
    }
    CHECK(accepted > good, "own handles are among them");
}

#if !defined(FL_SANITIZE_THREAD) && !defined(__SANITIZE_THREAD__)
/* A peer that writes to the vault at any moment. A data race by design, so not for the thread sanitizer. */
static atomic_bool stop;

static void *scribble(void *argument) {
    struct rng own = {(uint64_t)(uintptr_t)argument};
    while (!atomic_load(&stop)) {
        size_t at = rng_below(&own, 2)
                        ? rng_below(&own, CAPACITY / FL_SLAB_BYTES) * FL_SLAB_BYTES + rng_below(&own, 160)
                        : rng_below(&own, CAPACITY);
        __atomic_fetch_xor(fixture.base + at, (uint8_t)(1u << rng_below(&own, 8)), __ATOMIC_RELAXED);
        for (volatile int i = 0; i < 200; i++)
            ;
    }
    return NULL;
}

static void test_scribbling_peer(void) {
    for (int round = 0; round < 10; round++) {
        pthread_t thread;
        atomic_store(&stop, false);
        CHECK(pthread_create(&thread, NULL, scribble, (void *)(uintptr_t)(rng_next(&rng) >> 1)) == 0, "thread");
        for (int i = 0; i < 20; i++) {
            check_all();
            do_things(50);
        }
        rebuild();
        check_all();
        atomic_store(&stop, true);
        pthread_join(thread, NULL);
        restore();
    }
}
#else
static void test_scribbling_peer(void) {
    printf("skipped: a peer that scribbles (a data race by design)\n");
}
#endif

int main(int argc, char **argv) {
    rng.state = seed_from(argc, argv);
    fixture_make(&fixture, CAPACITY, CAPACITY);
    CHECK(fl_codec_create(&codec) == 0, "fl_codec_create");
    for (uint32_t page = 0; page < PAGES; page++) {
        make_page(contents[page], page, 0);
        put(page);
    }
    pristine = malloc(CAPACITY);
    pristine_map = malloc(fl_pool_map_bytes(CAPACITY));
    CHECK(pristine && pristine_map, "malloc");
    memcpy(pristine, fixture.base, CAPACITY);
    memcpy(pristine_map, fixture.slab_map, fl_pool_map_bytes(CAPACITY));
    memcpy(pristine_handles, handles, sizeof handles);
    test_handles();
    test_damage();
    test_scribbling_peer();
    free(pristine);
    free(pristine_map);
    fl_codec_destroy(codec);
    fixture_destroy(&fixture);
    return 0;
}
