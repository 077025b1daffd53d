/* SPDX-License-Identifier: Apache-2.0 */
/* The pool against a shadow model, its limit, what it gives back to the host, and handles that are no handles. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include "pool_fixture.h"

#define MIB (1ull << 20)
#define SHADOWS 20000

struct shadow {
    uint64_t handle; /* 0: not stored */
    uint64_t checksum;
    uint32_t length;
};

static struct shadow shadows[SHADOWS];
static uint8_t payload[FL_PAYLOAD_MAX];
static struct rng rng;

static void make_payload(uint32_t page, uint64_t checksum, uint32_t length) {
    struct rng bytes = {checksum ^ page};
    for (uint32_t at = 0; at < length; at++)
        payload[at] = (uint8_t)rng_next(&bytes);
}

static int put(struct fixture *fixture, uint32_t page, uint32_t length) {
    struct shadow *shadow = &shadows[page];
    uint64_t handle, checksum = rng_next(&rng);
    make_payload(page, checksum, length);
    int error = fl_pool_put(fixture->pool, page, checksum, payload, length, &handle);
    if (error == 0) {
        CHECK(handle != 0 && handle < FL_HANDLE_END, "handle");
        *shadow = (struct shadow){.handle = handle, .checksum = checksum, .length = length};
    }
    return error;
}

static void check(struct fixture *fixture, uint32_t page) {
    const struct shadow *shadow = &shadows[page];
    const struct fl_object *object;
    CHECK(fl_pool_get(fixture->pool, shadow->handle, &object) == 0, "page %u", page);
    CHECK(object->page == page && object->checksum == shadow->checksum && object->length == shadow->length,
          "page %u: header", page);
    make_payload(page, shadow->checksum, shadow->length);
    CHECK(memcmp(object->payload, payload, shadow->length) == 0, "page %u: payload", page);
}

static void drop(struct fixture *fixture, uint32_t page) {
    const struct fl_object *object;
    struct shadow *shadow = &shadows[page];
    CHECK(fl_pool_free(fixture->pool, shadow->handle) == 0, "page %u", page);
    CHECK(fl_pool_free(fixture->pool, shadow->handle) == -EINVAL, "page %u: second free", page);
    CHECK(fl_pool_get(fixture->pool, shadow->handle, &object) == -EBADMSG, "page %u: stale handle", page);
    shadow->handle = 0;
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    (void)context;
    CHECK(page < SHADOWS && shadows[page].handle == old_handle, "relocated page %u", (unsigned)page);
    if (page % 7 == 0)
        return false; /* as if it had been claimed */
    shadows[page].handle = new_handle;
    return true;
}

static void check_sums(struct fixture *fixture) {
    uint64_t objects = 0, bytes = 0;
    for (uint32_t page = 0; page < SHADOWS; page++) {
        if (!shadows[page].handle)
            continue;
        check(fixture, page);
        objects++;
        bytes += shadows[page].length;
    }
    struct fl_pool_stats stats = fixture_stats(fixture);
    CHECK(stats.objects == objects, "%d objects", (int)(stats.objects - objects));
    CHECK(stats.stored_bytes == bytes, "stored bytes");
    CHECK(stats.pool_bytes == fixture_host_bytes(fixture), "pool says %llu, host %llu",
          (unsigned long long)stats.pool_bytes, (unsigned long long)fixture_host_bytes(fixture));
}

static uint32_t random_length(void) {
    switch (rng_below(&rng, 4)) {
    case 0:
        return 1 + rng_below(&rng, 100);
    case 1:
        return FL_PAYLOAD_MAX - rng_below(&rng, 20);
    default:
        return 1 + rng_below(&rng, FL_PAYLOAD_MAX);
    }
}

static void test_shadow(void) {
    struct fixture fixture;
    fixture_make(&fixture, 128 * MIB, 128 * MIB);
    uint32_t rounds = runs_slowly() ? 100000 : 400000, moved = 0;
    uint32_t want = SHADOWS / 2; /* how full it shall be, changing */
    uint32_t have = 0;

    for (uint32_t i = 0; i < rounds; i++) {
        uint32_t page = rng_below(&rng, SHADOWS);
        if (i % 20000 == 0)
            want = rng_below(&rng, SHADOWS);
        if (shadows[page].handle) {
            check(&fixture, page);
            if (have > want || rng_below(&rng, 4) == 0) {
                drop(&fixture, page);
                have--;
            }
        } else if (have <= want) {
            int error = put(&fixture, page, random_length());
            CHECK(error == 0, "put: %s", strerror(-error));
            have++;
        }
        if (i % 1000 == 0)
            moved += fl_pool_compact(fixture.pool, 200, relocate, NULL);
        if (i % 5000 == 0)
            fl_pool_trim(fixture.pool);
        if (i % 50000 == 0)
            check_sums(&fixture);
    }
    check_sums(&fixture);
    CHECK(moved > 0, "compaction never moved anything");
    for (uint32_t page = 0; page < SHADOWS; page++)
        if (shadows[page].handle)
            drop(&fixture, page);
    while (fl_pool_trim(fixture.pool))
        ;
    struct fl_pool_stats stats = fixture_stats(&fixture);
    CHECK(stats.objects == 0 && stats.stored_bytes == 0, "empty");
    CHECK(fixture_host_bytes(&fixture) <= 4 * FL_SLAB_BYTES, "%llu bytes kept", (unsigned long long)stats.pool_bytes);
    fixture_destroy(&fixture);
}

static void test_limit(void) {
    struct fixture fixture;
    fixture_make(&fixture, 64 * MIB, 2 * MIB);
    uint32_t stored = 0;
    int error;
    while ((error = put(&fixture, stored, 1365)) == 0)
        stored++;
    CHECK(error == -ENOSPC, "%s", strerror(-error));
    CHECK(stored > 1365, "only %u objects in 2 MiB", stored);
    CHECK(fixture_stats(&fixture).pool_bytes <= 2 * MIB, "beyond the limit");
    CHECK(fixture_host_bytes(&fixture) <= 2 * MIB, "beyond the limit");
    check_sums(&fixture);

    /* One out, one in; and a raised limit works at once. */
    drop(&fixture, 17);
    CHECK(put(&fixture, 17, 1365) == 0, "recovery");
    CHECK(put(&fixture, stored, 1365) == -ENOSPC, "still full");
    fl_pool_set_limit(fixture.pool, 4 * MIB);
    CHECK(put(&fixture, stored, 1365) == 0, "raised limit");
    CHECK(fixture_stats(&fixture).limit_bytes == 4 * MIB, "limit shown");

    /* A limit below what is held: nothing is lost, nothing grows, and what is freed goes back. */
    fl_pool_set_limit(fixture.pool, MIB);
    check_sums(&fixture);
    uint64_t before = fixture_host_bytes(&fixture);
    CHECK(put(&fixture, stored + 1, 3000) == -ENOSPC, "growth beyond a lowered limit");
    for (uint32_t page = 0; page <= stored; page++)
        if (page % 100)
            drop(&fixture, page);
    fl_pool_trim(fixture.pool);
    check_sums(&fixture);
    CHECK(fixture_host_bytes(&fixture) < before, "nothing given back");
    for (uint32_t page = 0; page <= stored; page++)
        if (shadows[page].handle)
            drop(&fixture, page);
    fixture_destroy(&fixture);
}

static void test_capacity(void) {
    struct fixture fixture;
    fixture_make(&fixture, 8 * FL_SLAB_BYTES, UINT64_MAX);
    uint32_t stored = 0;
    while (put(&fixture, stored, 3072) == 0)
        stored++;
    CHECK(stored == 6 * 10, "%u objects: all slabs but the two that guard the end", stored);
    check_sums(&fixture);
    for (uint32_t page = 0; page < stored; page++)
        drop(&fixture, page);
    fixture_destroy(&fixture);
}

static void test_arguments(void) {
    struct fixture fixture;
    struct fl_pool *pool;
    uint64_t handle;
    fixture_make(&fixture, MIB, MIB);
    CHECK(fl_pool_put(fixture.pool, 0, 0, payload, 0, &handle) == -EINVAL, "empty payload");
    CHECK(fl_pool_put(fixture.pool, 0, 0, payload, FL_PAYLOAD_MAX + 1, &handle) == -EINVAL, "long payload");
    CHECK(fl_pool_put(fixture.pool, 1ull << 32, 0, payload, 1, &handle) == -EINVAL, "page index");
    CHECK(fl_pool_open(fixture.base + 8, MIB, fixture.fd, 0, fixture.slab_map, MIB, &pool) == -EINVAL, "base");
    CHECK(fl_pool_open(fixture.base, 65536, fixture.fd, 0, fixture.slab_map, MIB, &pool) == -EINVAL, "small");
    CHECK(fl_pool_open(fixture.base, 1ull << 50, fixture.fd, 0, fixture.slab_map, MIB, &pool) == -EINVAL, "large");
    CHECK(fl_pool_open(fixture.base, MIB, fixture.fd, 1, fixture.slab_map, MIB, &pool) == -EINVAL, "offset");
    CHECK(fl_pool_open(fixture.base, MIB, fixture.fd, 0, (char *)fixture.slab_map + 1, MIB, &pool) == -EINVAL, "map");
    fixture_destroy(&fixture);
}

/* Every number that is no handle is refused, and changes nothing. */
static void test_handles(void) {
    struct fixture fixture;
    fixture_make(&fixture, 4 * MIB, 4 * MIB);
    const struct fl_object *object;
    for (uint32_t page = 0; page < 500; page++)
        CHECK(put(&fixture, page, 1 + rng_below(&rng, FL_PAYLOAD_MAX)) == 0, "put");
    uint64_t end = 4 * MIB / 8 + 1000, accepted = 0;
    for (uint64_t handle = 0; handle < end; handle++)
        accepted += fl_pool_get(fixture.pool, handle, &object) == 0;
    CHECK(accepted == 500, "%d handles found", (int)accepted);
    for (int i = 0; i < 100000; i++) {
        uint64_t handle = end + (rng_next(&rng) >> rng_below(&rng, 40));
        CHECK(fl_pool_get(fixture.pool, handle, &object) == -EBADMSG, "handle %llx", (unsigned long long)handle);
        CHECK(fl_pool_free(fixture.pool, handle) == -EINVAL, "handle %llx", (unsigned long long)handle);
    }
    check_sums(&fixture);
    uint64_t freed = 0;
    for (uint64_t handle = 0; handle < end; handle++)
        freed += fl_pool_free(fixture.pool, handle) == 0;
    CHECK(freed == 500, "%d handles freed", (int)freed);
    CHECK(fixture_stats(&fixture).objects == 0, "objects left");
    memset(shadows, 0, sizeof shadows);
    fixture_destroy(&fixture);
}

/* An object whose header was scribbled over is none; put right again, it is one. */
static void test_object_header(void) {
    struct fixture fixture;
    const struct fl_object *object, *found;
    fixture_make(&fixture, MIB, MIB);
    CHECK(put(&fixture, 0, 200) == 0 && fl_pool_get(fixture.pool, shadows[0].handle, &object) == 0, "put");
    struct fl_object *damaged = (struct fl_object *)(fixture.base + shadows[0].handle * 8);
    CHECK(damaged == object, "handles are offsets");
    const uint16_t lengths[] = {0, 300, FL_PAYLOAD_MAX, FL_PAYLOAD_MAX + 1, UINT16_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        damaged->length = lengths[i];
        CHECK(fl_pool_get(fixture.pool, shadows[0].handle, &found) == -EBADMSG, "length %u", lengths[i]);
    }
    damaged->length = 200;
    damaged->magic ^= 1;
    CHECK(fl_pool_get(fixture.pool, shadows[0].handle, &found) == -EBADMSG, "magic");
    damaged->magic ^= 1;
    check(&fixture, 0);
    /* Freeing does not depend on what is in the object. */
    damaged->length = UINT16_MAX;
    drop(&fixture, 0);
    CHECK(fixture_stats(&fixture).stored_bytes == 0 && fixture_stats(&fixture).objects == 0, "sums");
    fixture_destroy(&fixture);
}

/* A host without memory, played by a tmpfs of 1 MiB in a mount namespace of our own: an errno, not a SIGBUS. */
static int host_is_full(void) {
    char folder[] = "/tmp/test-pool-XXXXXX", file[64];
    if (!mkdtemp(folder))
        return 77;
    int result = 77;
    if (unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
        mount("none", folder, "tmpfs", 0, "size=1m") == 0) {
        struct fixture fixture = {.capacity_bytes = 8 * MIB};
        snprintf(file, sizeof file, "%s/vault", folder);
        fixture.fd = open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(fixture.fd >= 0 && ftruncate(fixture.fd, FIXTURE_OFFSET + 8 * MIB) == 0, "vault on a tmpfs");
        fixture.base = mmap(NULL, 8 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fixture.fd, FIXTURE_OFFSET);
        fixture.slab_map = calloc(1, fl_pool_map_bytes(8 * MIB));
        CHECK(fixture.base != MAP_FAILED && fixture.slab_map, "mmap");
        fixture_open_pool(&fixture, 8 * MIB);
        uint32_t stored = 0;
        int error;
        while ((error = put(&fixture, stored, 2000)) == 0)
            stored++;
        CHECK(error == -ENOSPC && stored > 100, "stored %u, then %s", stored, strerror(-error));
        check_sums(&fixture); /* what came of the slab that failed has been given back */
        drop(&fixture, 3);
        CHECK(put(&fixture, 3, 2000) == 0, "recovery");
        check_sums(&fixture);
        fl_pool_close(fixture.pool);
        munmap(fixture.base, 8 * MIB);
        free(fixture.slab_map);
        close(fixture.fd);
        umount2(folder, MNT_DETACH);
        result = 0;
    }
    rmdir(folder);
    return result;
}

static void test_host_is_full(void) {
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0)
        _exit(host_is_full());
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child, "waitpid");
    CHECK(WIFEXITED(status), "ended by signal %d", WTERMSIG(status));
    if (WEXITSTATUS(status) == 77)
        printf("skipped: a full host (needs leave to mount a tmpfs)\n");
    else
        CHECK(WEXITSTATUS(status) == 0, "full host");
}

int main(int argc, char **argv) {
    rng.state = seed_from(argc, argv);
    test_arguments();
    test_host_is_full();
    test_shadow();
    test_limit();
    test_capacity();
    test_handles();
    test_object_header();
    return 0;
}
