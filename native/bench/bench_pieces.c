/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the time goes: the pieces of a fault from the `ram` tier and of an eviction, each by itself, on data that is
 * not in the caches. Prints "GROUP NAME NS", a line each; ns are medians for one page.
 */
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "content.h"
#include "measure.h"
#include "store/codec.h"
#include "store/pool.h"

#define PAGES 16384u /* 64 MiB: more than any L2, and much of an L3 */
#define BATCH 64u    /* as the pager evicts */
#define PAGE BENCH_PAGE_BYTES

struct pieces {
    uint8_t *memory; /* registered with the userfaultfd */
    int memfd, uffd;
    struct fl_pool *pool;
    struct fl_codec *codec;
    uint64_t *handle;
    uint32_t *order;
    uint32_t *times;
};

static void fail(const char *what) {
    fprintf(stderr, "bench_pieces: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void say(const struct pieces *p, const char *group, const char *name, uint32_t samples, uint32_t pages_each) {
    printf("%s %s %u\n", group, name, measure_median(p->times, samples) / pages_each);
}

static void *map(int fd, uint64_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        fail("mmap");
    (void)madvise(at, bytes, MADV_NOHUGEPAGE);
    return at;
}

static uint8_t *page_at(const struct pieces *p, uint64_t page) {
    return p->memory + page * PAGE;
}

static void set_up(struct pieces *p) {
    uint64_t bytes = (uint64_t)PAGES * PAGE;
    p->memfd = memfd_create("bench-pieces", MFD_CLOEXEC);
    if (p->memfd < 0 || ftruncate(p->memfd, (off_t)bytes))
        fail("memfd_create");
    p->memory = map(p->memfd, bytes);
    for (uint32_t page = 0; page < PAGES; page++)
        bench_content_fill(page, page_at(p, page));
    p->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {
        .range = {.start = (uint64_t)(uintptr_t)p->memory, .len = bytes},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
    };
    if (p->uffd < 0 || ioctl(p->uffd, UFFDIO_API, &api) || ioctl(p->uffd, UFFDIO_REGISTER, &range))
        fail("userfaultfd");

    int vault = memfd_create("bench-pieces-pool", MFD_CLOEXEC);
    if (vault < 0 || ftruncate(vault, (off_t)bytes))
        fail("memfd_create");
    void *slab_map = calloc(1, fl_pool_map_bytes(bytes));
    p->handle = calloc(PAGES, sizeof(*p->handle));
    p->order = calloc(PAGES, sizeof(*p->order));
    p->times = calloc(PAGES, sizeof(*p->times));
    if (!slab_map || !p->handle || !p->order || !p->times || fl_codec_create(&p->codec) ||
        fl_pool_open(map(vault, bytes), bytes, vault, 0, slab_map, bytes, &p->pool))
        fail("pool");
    bench_permutation(7, PAGES, p->order);
}

/* ---- eviction ------------------------------------------------------------------------------------------------ */

static void time_protect(struct pieces *p) {
    for (uint32_t first = 0; first < PAGES; first += BATCH) {
        struct uffdio_writeprotect on = {
            .range = {.start = (uint64_t)(uintptr_t)page_at(p, first), .len = BATCH * PAGE},
            .mode = UFFDIO_WRITEPROTECT_MODE_WP,
        };
        uint64_t start = fl_now();
        if (ioctl(p->uffd, UFFDIO_WRITEPROTECT, &on))
            fail("UFFDIO_WRITEPROTECT");
        on.mode = 0;
        if (ioctl(p->uffd, UFFDIO_WRITEPROTECT, &on))
            fail("UFFDIO_WRITEPROTECT");
        p->times[first / BATCH] = (uint32_t)(fl_now() - start);
    }
    say(p, "evict", "protect_and_release", PAGES / BATCH, BATCH);
}

static void time_read(struct pieces *p, uint8_t *buffer) {
    for (uint32_t first = 0; first < PAGES; first += BATCH) {
        uint64_t start = fl_now();
        if (pread(p->memfd, buffer, BATCH * PAGE, (off_t)first * PAGE) != (ssize_t)(BATCH * PAGE))
            fail("pread");
        p->times[first / BATCH] = (uint32_t)(fl_now() - start);
    }
    say(p, "evict", "read", PAGES / BATCH, BATCH);
}

/* Classify, compress, sum and put page by page, as the pager does; each part timed in a pass of its own. */
static void time_store(struct pieces *p, uint8_t *buffer) {
    static uint8_t payload[BATCH][FL_PAYLOAD_MAX];
    uint32_t length[BATCH], *times[4], pattern;
    uint64_t sum[BATCH];
    for (uint32_t i = 0; i < 4; i++)
        times[i] = calloc(PAGES / BATCH, sizeof(uint32_t));
    for (uint32_t first = 0; first < PAGES; first += BATCH) {
        if (pread(p->memfd, buffer, BATCH * PAGE, (off_t)first * PAGE) != (ssize_t)(BATCH * PAGE))
            fail("pread");
        uint64_t at[5];
        at[0] = fl_now();
        uint32_t data = 0;
        for (uint32_t i = 0; i < BATCH; i++)
            data += fl_page_classify(buffer + (size_t)i * PAGE, &pattern) == FL_PAGE_DATA;
        at[1] = fl_now();
        for (uint32_t i = 0; i < BATCH; i++)
            length[i] = fl_compress(p->codec, buffer + (size_t)i * PAGE, payload[i], FL_PAYLOAD_MAX);
        at[2] = fl_now();
        for (uint32_t i = 0; i < BATCH; i++)
            sum[i] = fl_page_checksum(buffer + (size_t)i * PAGE, first + i);
        at[3] = fl_now();
        for (uint32_t i = 0; i < BATCH; i++)
            if (fl_pool_put(p->pool, first + i, sum[i], payload[i], length[i], &p->handle[first + i]))
                fail("fl_pool_put");
        at[4] = fl_now();
        if (data != BATCH)
            fail("content");
        for (uint32_t i = 0; i < 4; i++)
            times[i][first / BATCH] = (uint32_t)(at[i + 1] - at[i]);
    }
    static const char *const name[4] = {"classify", "compress", "checksum", "put"};
    for (uint32_t i = 0; i < 4; i++) {
        memcpy(p->times, times[i], PAGES / BATCH * sizeof(uint32_t));
        say(p, "evict", name[i], PAGES / BATCH, BATCH);
        free(times[i]);
    }
}

/* Nothing maps the pages any more, as after an arming of the zap tracker. */
static void time_punch(struct pieces *p) {
    if (madvise(p->memory, (size_t)PAGES * PAGE, MADV_DONTNEED))
        fail("MADV_DONTNEED");
    for (uint32_t first = 0; first < PAGES; first += BATCH) {
        uint64_t start = fl_now();
        if (fallocate(p->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)first * PAGE, BATCH * PAGE))
            fail("fallocate");
        p->times[first / BATCH] = (uint32_t)(fl_now() - start);
    }
    say(p, "evict", "punch", PAGES / BATCH, BATCH);
}

/* ---- fault --------------------------------------------------------------------------------------------------- */

static void time_fetch(struct pieces *p, uint8_t *buffer) {
    uint32_t *sums = calloc(PAGES, sizeof(*sums));
    if (!sums)
        fail("memory");
    for (uint32_t i = 0; i < PAGES; i++) {
        uint32_t page = p->order[i];
        const struct fl_object *object;
        uint64_t start = fl_now();
        if (fl_pool_get(p->pool, p->handle[page], &object) || fl_decompress(object->payload, object->length, buffer))
            fail("decompress");
        uint64_t middle = fl_now();
        if (fl_page_checksum(buffer, page) != object->checksum)
            fail("checksum");
        sums[i] = (uint32_t)(fl_now() - middle);
        p->times[i] = (uint32_t)(middle - start);
    }
    say(p, "fault", "get_and_decompress", PAGES, 1);
    memcpy(p->times, sums, PAGES * sizeof(*sums));
    free(sums);
    say(p, "fault", "checksum", PAGES, 1);
}

/* Of what the above takes, the waiting for memory: a plain copy of a payload that is not in the caches. */
static void time_payload(struct pieces *p, uint8_t *buffer) {
    for (uint32_t i = 0; i < PAGES; i++) {
        const struct fl_object *object;
        uint64_t start = fl_now();
        if (fl_pool_get(p->pool, p->handle[p->order[i]], &object))
            fail("fl_pool_get");
        memcpy(buffer, object->payload, object->length);
        p->times[i] = (uint32_t)(fl_now() - start);
    }
    say(p, "fault", "of_it:get_and_copy_cold", PAGES, 1);
}

static void time_copy(struct pieces *p, uint8_t *buffer) {
    for (uint32_t i = 0; i < PAGES; i++) {
        bench_content_fill(p->order[i], buffer);
        struct uffdio_copy copy = {
            .dst = (uint64_t)(uintptr_t)page_at(p, p->order[i]), .src = (uint64_t)(uintptr_t)buffer, .len = PAGE};
        uint64_t start = fl_now();
        if (ioctl(p->uffd, UFFDIO_COPY, &copy))
            fail("UFFDIO_COPY");
        p->times[i] = (uint32_t)(fl_now() - start);
    }
    say(p, "fault", "copy_ioctl", PAGES, 1);
}

static void time_free(struct pieces *p) {
    for (uint32_t i = 0; i < PAGES; i++) {
        uint64_t start = fl_now();
        if (fl_pool_free(p->pool, p->handle[p->order[i]]))
            fail("fl_pool_free");
        p->times[i] = (uint32_t)(fl_now() - start);
    }
    say(p, "fault", "free_after_wake", PAGES, 1);
}

int main(int argc, char **argv) {
    struct pieces p;
    static uint8_t buffer[BATCH * PAGE] __attribute__((aligned(PAGE)));
    if (argc > 2 || (argc == 2 && measure_pin(atoi(argv[1])))) {
        fprintf(stderr, "usage: bench_pieces [CPU]\n");
        return 2;
    }
    set_up(&p);
    time_protect(&p);
    time_read(&p, buffer);
    time_store(&p, buffer);
    time_punch(&p);
    time_fetch(&p, buffer);
    time_payload(&p, buffer);
    time_copy(&p, buffer);
    time_free(&p);
    fl_pool_close(p.pool);
    fl_codec_destroy(p.codec);
    return 0;
}
