/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of native/store share: a pool in a memfd, repeatable content, and checks that end the test. */
#ifndef POOL_FIXTURE_H
#define POOL_FIXTURE_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "slow.h"
#include "store/pool.h"

#define PAGE_BYTES 4096

/* Not assert(): also in a forked child, and says the values' names at least. */
#define CHECK(condition, ...)                                                       \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                           \
            fputc('\n', stderr);                                                    \
            _exit(1);                                                               \
        }                                                                           \
    } while (0)

struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *rng) {
    uint64_t z = rng->state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static inline uint32_t rng_below(struct rng *rng, uint32_t end) {
    return (uint32_t)((rng_next(rng) & 0xffffffff) * end >> 32);
}

/* Seed from the argument or the clock, printed, so that a failure can be had again. */
static inline uint64_t seed_from(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

/* A page that (index, version) determine, of varying compressibility. */
static inline void make_page(uint8_t *page, uint64_t index, uint64_t version) {
    struct rng rng = {index * 0x100000001b3ull ^ version << 40 ^ version};
    uint32_t noise = rng_below(&rng, 70); /* percent of words that do not repeat */
    uint64_t repeated = rng_next(&rng);
    for (size_t at = 0; at < PAGE_BYTES; at += 8) {
        uint64_t word = rng_below(&rng, 100) < noise ? rng_next(&rng) : repeated;
        memcpy(page + at, &word, 8);
    }
}

struct fixture {
    int fd;
    uint8_t *base;
    void *slab_map;
    uint64_t capacity_bytes;
    struct fl_pool *pool;
};

#define FIXTURE_OFFSET 65536 /* of the pool in the file, to see that offsets are added */

static inline void fixture_open_pool(struct fixture *fixture, uint64_t limit_bytes) {
    int error = fl_pool_open(fixture->base, fixture->capacity_bytes, fixture->fd, FIXTURE_OFFSET, fixture->slab_map,
                             limit_bytes, &fixture->pool);
    CHECK(error == 0, "fl_pool_open: %s", strerror(-error));
}

static inline void fixture_make(struct fixture *fixture, uint64_t capacity_bytes, uint64_t limit_bytes) {
    fixture->capacity_bytes = capacity_bytes;
    fixture->fd = memfd_create("test-pool", MFD_CLOEXEC);
    CHECK(fixture->fd >= 0, "memfd_create");
    CHECK(ftruncate(fixture->fd, (off_t)(FIXTURE_OFFSET + capacity_bytes)) == 0, "ftruncate");
    fixture->base = mmap(NULL, capacity_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fixture->fd, FIXTURE_OFFSET);
    CHECK(fixture->base != MAP_FAILED, "mmap");
    fixture->slab_map =
        mmap(NULL, fl_pool_map_bytes(capacity_bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(fixture->slab_map != MAP_FAILED, "mmap");
    fixture_open_pool(fixture, limit_bytes);
}

static inline void fixture_destroy(struct fixture *fixture) {
    fl_pool_close(fixture->pool);
    munmap(fixture->base, fixture->capacity_bytes);
    munmap(fixture->slab_map, fl_pool_map_bytes(fixture->capacity_bytes));
    close(fixture->fd);
}

/* Host memory behind the pool, as the kernel counts it. */
static inline uint64_t fixture_host_bytes(const struct fixture *fixture) {
    struct stat stat;
    CHECK(fstat(fixture->fd, &stat) == 0, "fstat");
    return (uint64_t)stat.st_blocks * 512;
}

static inline struct fl_pool_stats fixture_stats(const struct fixture *fixture) {
    struct fl_pool_stats stats;
    fl_pool_stats(fixture->pool, &stats);
    return stats;
}

static inline double percent_wasted(const struct fl_pool_stats *stats) {
    return 100.0 * ((double)stats->pool_bytes - (double)stats->stored_bytes) / (double)stats->stored_bytes;
}

/* Seconds of a clock that only our own work moves on. */
static inline double cpu_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static inline double wall_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* What swap/ does with a stored page: true if it can be had and passes every check. */
static inline bool load_page(struct fl_pool *pool, uint64_t handle, uint64_t page_index, uint8_t *page) {
    const struct fl_object *object;
    if (fl_pool_get(pool, handle, &object))
        return false;
    uint16_t length = __atomic_load_n(&object->length, __ATOMIC_RELAXED);
    uint64_t checksum = __atomic_load_n(&object->checksum, __ATOMIC_RELAXED);
    return fl_decompress(object->payload, length, page) == 0 && fl_page_checksum(page, page_index) == checksum;
}

/* Compress and put; 0, -ENOSPC, or 1 for a page that does not compress. */
static inline int store_page(struct fl_pool *pool, struct fl_codec *codec, uint64_t page_index, const uint8_t *page,
                             uint64_t *handle) {
    uint8_t payload[FL_PAYLOAD_MAX];
    uint32_t length = fl_compress(codec, page, payload, sizeof payload);
    if (length == 0)
        return 1;
    return fl_pool_put(pool, page_index, fl_page_checksum(page, page_index), payload, length, handle);
}

#endif
