/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 between any two instructions of the pool: each operation is single-stepped, and after every instruction that
 * changed something a successor is given a copy of what it would find. What the page table names must be intact, and
 * nothing may be leaked. test_pool_kill.c kills for real, but by the clock, which seldom hits these few instructions.
 */
#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "pool_fixture.h"

#define PAGES 256
#define CAPACITY (64ull * FL_SLAB_BYTES)
#define STEPS_MOST 50000
#define SMALL 1300 /* payload lengths of two classes: 24 and 10 slots a slab */
#define LARGE 3000

#define TABLE_BYTES (PAGES * sizeof(uint64_t))

static _Atomic(uint64_t) *table; /* shared with the child; the handle, or 0 */
static struct fixture fixture;   /* the child's */
static uint8_t payload[FL_PAYLOAD_MAX];

/* What the parent last saw of the child's memory, and where a successor tries itself on it. */
static uint8_t seen[CAPACITY], seen_map[CAPACITY / FL_SLAB_BYTES / 8];
static uint64_t seen_table[PAGES], seen_host_bytes;
static struct fixture successor;
static _Atomic(uint64_t) successor_table[PAGES];

static uint32_t length_of(uint32_t page) {
    return page < PAGES / 2 ? SMALL : LARGE;
}

static void store(uint32_t page) {
    uint64_t handle;
    memset(payload, (int)page, length_of(page));
    CHECK(fl_pool_put(fixture.pool, page, page, payload, length_of(page), &handle) == 0, "put");
    atomic_store(&table[page], handle);
}

static void drop(uint32_t page) {
    uint64_t handle = atomic_exchange(&table[page], 0);
    CHECK(fl_pool_free(fixture.pool, handle) == 0, "free page %u", page);
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    (void)context;
    return page % 5 && atomic_compare_exchange_strong(&table[page], &old_handle, new_handle);
}

static void rebuild(struct fl_pool *pool, _Atomic(uint64_t) *truth) {
    CHECK(fl_pool_rebuild_begin(pool) == 0, "begin");
    for (uint32_t page = 0; page < PAGES; page++)
        if (atomic_load(&truth[page]))
            CHECK(fl_pool_rebuild_mark(pool, atomic_load(&truth[page]), page) == 0, "page %u lost", page);
    fl_pool_rebuild_end(pool);
}

/* ---- What is interrupted: `prepare` runs freely, `act` is stepped ---- */

static void prepare_filled(void) {
    for (uint32_t page = 0; page < 30; page++)
        store(page);
}
static void prepare_full_slab(void) {
    for (uint32_t page = 0; page < 25; page++)
        store(page);
}
static void prepare_nothing(void) {
}
static void prepare_empty_slab(void) {
    prepare_filled();
    for (uint32_t page = 0; page < 25; page++)
        drop(page);
}
static void prepare_many_empty(void) {
    for (uint32_t page = 0; page < PAGES; page++)
        store(page);
    for (uint32_t page = 0; page < PAGES; page++)
        if (page % 16)
            drop(page);
}
static void prepare_sparse(void) {
    /* Enough waste to be worth compaction: many classes' slabs with little in each. */
    for (uint32_t page = 0; page < PAGES; page++)
        store(page);
    for (uint32_t page = 0; page < PAGES; page++)
        if (page % 8 > 1)
            drop(page);
}
static void act_put_small(void) {
    store(40);
}
static void act_put_large(void) {
    store(PAGES - 1);
}
static void act_free(void) {
    drop(7);
}
static void act_free_last(void) {
    drop(24);
}
static void act_trim(void) {
    fl_pool_trim(fixture.pool);
}
static void act_compact(void) {
    CHECK(fl_pool_compact(fixture.pool, 1, relocate, NULL) == 1, "nothing was moved");
}
static void prepare_crash(void) {
    /* What a predecessor leaves: slots and whole slabs that nothing names. */
    for (uint32_t page = 0; page < PAGES; page += 2)
        store(page);
    for (uint32_t page = 0; page < PAGES; page += 2)
        if (page % 6 == 0 || page > PAGES - 40)
            atomic_store(&table[page], 0);
    fl_pool_close(fixture.pool);
    fixture_open_pool(&fixture, CAPACITY);
}

static void act_rebuild(void) {
    rebuild(fixture.pool, table);
}

static const struct operation {
    const char *name;
    void (*prepare)(void);
    void (*act)(void);
} operations[] = {
    {"put into a partial slab", prepare_filled, act_put_small},
    {"put into a slab from the host", prepare_nothing, act_put_large},
    {"put into an empty slab of another class", prepare_empty_slab, act_put_large},
    {"free", prepare_filled, act_free},
    {"free the last of a slab", prepare_full_slab, act_free_last},
    {"trim", prepare_many_empty, act_trim},
    {"compact", prepare_sparse, act_compact},
    {"rebuild", prepare_crash, act_rebuild},
};

static _Noreturn void child(const struct operation *operation) {
    operation->prepare();
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
        _exit(77);
    syscall(SYS_getpid);
    raise(SIGSTOP);
    operation->act();
    /* Bound above already, unlike _exit(): whose look-up would be most of what is stepped. */
    for (;;)
        syscall(SYS_exit_group, 0);
}

/* ---- The parent ---- */

/* Calls `visit` for each run of the child's pool that has host memory; reading elsewhere would give it some. */
static bool each_extent(bool (*visit)(size_t at, size_t length)) {
    off_t end = FIXTURE_OFFSET;
    for (;;) {
        off_t at = lseek(fixture.fd, end, SEEK_DATA);
        if (at < 0)
            return false;
        end = lseek(fixture.fd, at, SEEK_HOLE);
        CHECK(end > at, "lseek: %s", strerror(errno));
        if (visit((size_t)(at - FIXTURE_OFFSET), (size_t)(end - at)))
            return true;
    }
}

static bool extent_differs(size_t at, size_t length) {
    return memcmp(seen + at, fixture.base + at, length) != 0;
}

static bool copy_extent(size_t at, size_t length) {
    memcpy(seen + at, fixture.base + at, length);
    memcpy(successor.base + at, fixture.base + at, length);
    return false;
}

static bool changed(void) {
    return seen_host_bytes != fixture_host_bytes(&fixture) || memcmp(seen_table, table, TABLE_BYTES) != 0 ||
           memcmp(seen_map, fixture.slab_map, sizeof seen_map) != 0 || each_extent(extent_differs);
}

static void hand_over(void) {
    CHECK(madvise(successor.base, CAPACITY, MADV_REMOVE) == 0, "MADV_REMOVE: %s", strerror(errno));
    each_extent(copy_extent);
    memcpy(seen_map, fixture.slab_map, sizeof seen_map);
    memcpy(successor.slab_map, seen_map, sizeof seen_map);
    memcpy(seen_table, table, TABLE_BYTES);
    memcpy(successor_table, seen_table, TABLE_BYTES);
    seen_host_bytes = fixture_host_bytes(&fixture);
}

static void check_successor(const char *name, int64_t at) {
    fixture_open_pool(&successor, CAPACITY);
    rebuild(successor.pool, successor_table);
    uint64_t objects = 0, bytes = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        const struct fl_object *object;
        uint64_t handle = atomic_load(&successor_table[page]);
        if (!handle)
            continue;
        CHECK(fl_pool_get(successor.pool, handle, &object) == 0 && object->page == page && object->checksum == page &&
                  object->length == length_of(page),
              "%s, killed at %lld: page %u", name, (long long)at, page);
        memset(payload, (int)page, object->length);
        CHECK(memcmp(payload, object->payload, object->length) == 0, "%s, killed at %lld: page %u's payload", name,
              (long long)at, page);
        objects++;
        bytes += object->length;
    }
    struct fl_pool_stats stats = fixture_stats(&successor);
    CHECK(stats.objects == objects && stats.stored_bytes == bytes, "%s, killed at %lld: %lld stored bytes too many",
          name, (long long)at, (long long)(stats.stored_bytes - bytes));
    CHECK(stats.aside_bytes == 0, "%s, killed at %lld: a slab was taken for damaged", name, (long long)at);
    CHECK(stats.pool_bytes == fixture_host_bytes(&successor), "%s, killed at %lld: pool says %llu, host %llu", name,
          (long long)at, (unsigned long long)stats.pool_bytes, (unsigned long long)fixture_host_bytes(&successor));
    fl_pool_close(successor.pool);
}

/* False: not allowed to trace. */
static bool step_through(const struct operation *operation) {
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork");
    if (pid == 0)
        child(operation);
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid, "waitpid");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return false;
    CHECK(WIFSTOPPED(status), "%s: preparation failed: status %x", operation->name, status);
    CHECK(ptrace(PTRACE_SETOPTIONS, pid, NULL, PTRACE_O_EXITKILL) == 0, "PTRACE_SETOPTIONS");

    int64_t steps = 0, checked = 0;
    for (;;) {
        if (changed()) {
            hand_over();
            check_successor(operation->name, steps);
            checked++;
        }
        CHECK(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0, "PTRACE_SINGLESTEP: %s", strerror(errno));
        CHECK(waitpid(pid, &status, 0) == pid, "waitpid");
        if (WIFEXITED(status))
            break;
        CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "%s: status %x", operation->name, status);
        CHECK(++steps < STEPS_MOST, "%s does not end", operation->name);
    }
    CHECK(WEXITSTATUS(status) == 0, "%s failed by itself: status %x", operation->name, status);
    CHECK(checked > 3, "%s changed only %d times what a successor would find", operation->name, (int)checked);
    printf("%-40s %6lld instructions, %4lld states checked\n", operation->name, (long long)steps, (long long)checked);
    fflush(stdout);
    return true;
}

/* Once without being stepped, so that the instructions are not those of the dynamic linker. */
static void bind_symbols(const struct operation *operation) {
    fixture_make(&fixture, CAPACITY, CAPACITY);
    operation->prepare();
    operation->act();
    fixture_destroy(&fixture);
    memset(table, 0, TABLE_BYTES);
}

int main(void) {
    if (SANITIZED) {
        printf("skipped: a sanitizer's instructions are not the pool's\n");
        return 77;
    }
    table = mmap(NULL, TABLE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(table != MAP_FAILED, "mmap");
    fixture_make(&successor, CAPACITY, CAPACITY);
    fl_pool_close(successor.pool);
    for (size_t i = 0; i < sizeof operations / sizeof operations[0]; i++) {
        bind_symbols(&operations[i]);
        fixture_make(&fixture, CAPACITY, CAPACITY);
        if (!step_through(&operations[i])) {
            printf("skipped: not allowed to trace a child\n");
            return 77;
        }
        fixture_destroy(&fixture);
        memset(table, 0, TABLE_BYTES);
    }
    return 0;
}
