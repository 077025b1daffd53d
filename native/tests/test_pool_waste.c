/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host memory beyond what is stored stays <= 12 % of it: freshly filled, and after 70 % was freed and compacted. Sizes
 * are drawn from distributions like those of compressed guest memory, and from some that are worse.
 */
#include <math.h>

#include "pool_fixture.h"

#define MIB (1ull << 20)
#define STORED_BYTES (64 * MIB)
#define OBJECTS_MAX 400000
#define MOST_PERCENT 12.0

static uint64_t handles[OBJECTS_MAX];
static uint16_t lengths[OBJECTS_MAX];
static uint8_t payload[FL_PAYLOAD_MAX];
static struct rng rng;

static double uniform(double low, double high) {
    return low + (high - low) * (double)(rng_next(&rng) >> 11) * 0x1p-53;
}

static double normal(double mean, double deviation) {
    return mean + deviation * sqrt(-2 * log(uniform(1e-12, 1))) * cos(2 * M_PI * uniform(0, 1));
}

static double draw_bell(void) {
    return normal(1365, 500);
}
static double draw_uniform(void) {
    return uniform(100, 2630);
}
static double draw_two_kinds(void) {
    return rng_below(&rng, 100) < 60 ? normal(520, 150) : normal(2630, 200);
}
static double draw_long_tail(void) {
    return 1100 * exp(normal(0, 0.65));
}
static double draw_narrow(void) {
    return normal(1365, 40);
}
static double draw_one_size(void) {
    return 1365;
}
static double draw_poor(void) {
    return uniform(2400, 3072);
}
static double draw_good(void) {
    return uniform(300, 900);
}

static const struct distribution {
    const char *name;
    double (*draw)(void);
} distributions[] = {
    {"bell, mean 1365", draw_bell},
    {"uniform 100-2630", draw_uniform},
    {"two kinds, 520 and 2630", draw_two_kinds},
    {"long tail, median 1100", draw_long_tail},
    {"narrow, 1365 +- 40", draw_narrow},
    {"all 1365", draw_one_size},
    {"uniform 2400-3072", draw_poor},
    {"uniform 300-900", draw_good},
};

static uint32_t draw(const struct distribution *distribution) {
    for (;;) {
        double length = distribution->draw();
        if (length >= 100 && length <= FL_PAYLOAD_MAX)
            return (uint32_t)length;
    }
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    (void)context;
    CHECK(page < OBJECTS_MAX && handles[page] == old_handle, "page %u", (unsigned)page);
    handles[page] = new_handle;
    return true;
}

static double wasted(struct fixture *fixture, const char *name, const char *when) {
    struct fl_pool_stats stats = fixture_stats(fixture);
    CHECK(stats.pool_bytes == fixture_host_bytes(fixture), "pool_bytes is not what the host gives");
    double percent = percent_wasted(&stats);
    CHECK(percent <= MOST_PERCENT, "%s, %s: %.2f %%", name, when, percent);
    return percent;
}

/* Free 70 % of the objects and let the pool draw together, as the mover does it. */
static uint32_t shrink(struct fixture *fixture, uint32_t count, uint32_t run) {
    uint32_t moved = 0, now;
    for (uint32_t page = 0; page < count; page += run) {
        if (rng_below(&rng, 100) >= 70)
            continue;
        for (uint32_t i = page; i < page + run && i < count; i++) {
            CHECK(fl_pool_free(fixture->pool, handles[i]) == 0, "free");
            handles[i] = 0;
        }
    }
    do {
        now = fl_pool_compact(fixture->pool, 512, relocate, NULL);
        fl_pool_trim(fixture->pool);
        moved += now;
    } while (now);
    while (fl_pool_trim(fixture->pool))
        ;
    return moved;
}

static void check_objects(struct fixture *fixture, uint32_t count) {
    const struct fl_object *object;
    uint64_t objects = 0, bytes = 0;
    for (uint32_t page = 0; page < count; page++) {
        if (!handles[page])
            continue;
        CHECK(fl_pool_get(fixture->pool, handles[page], &object) == 0 && object->page == page &&
                  object->length == lengths[page] && object->payload[0] == (uint8_t)page,
              "page %u", page);
        objects++;
        bytes += lengths[page];
    }
    struct fl_pool_stats stats = fixture_stats(fixture);
    CHECK(stats.objects == objects && stats.stored_bytes == bytes, "sums");
}

static void test_distribution(const struct distribution *distribution, uint32_t run) {
    struct fixture fixture;
    fixture_make(&fixture, 128 * MIB, 128 * MIB);
    uint32_t count = 0;
    while (fixture_stats(&fixture).stored_bytes < STORED_BYTES) {
        CHECK(count < OBJECTS_MAX, "too many objects");
        lengths[count] = (uint16_t)draw(distribution);
        payload[0] = (uint8_t)count;
        CHECK(fl_pool_put(fixture.pool, count, 0, payload, lengths[count], &handles[count]) == 0, "put");
        count++;
    }
    double filled = wasted(&fixture, distribution->name, "filled");
    uint32_t moved = shrink(&fixture, count, run);
    check_objects(&fixture, count);
    double shrunk = wasted(&fixture, distribution->name, "70 % freed");
    printf("%-26s runs of %2u: mean %4.0f bytes, waste %5.2f %% filled, %5.2f %% after freeing 70 %% (%u moved)\n",
           distribution->name, run, (double)STORED_BYTES / count, filled, shrunk, moved);
    fflush(stdout);
    fixture_destroy(&fixture);
}

int main(int argc, char **argv) {
    rng.state = seed_from(argc, argv);
    for (size_t i = 0; i < sizeof distributions / sizeof distributions[0]; i++) {
        test_distribution(&distributions[i], 1);
        if (!runs_slowly())
            test_distribution(&distributions[i], 16); /* neighbours are freed together */
    }
    return 0;
}
