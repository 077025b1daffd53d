/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 between two instructions of the pool: each operation is single-stepped to a random instruction and killed
 * there. What the page table names must be intact afterwards, and nothing may be leaked. test_pool_kill.c kills by the
 * clock, which seldom hits these few instructions.
 */
#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "pool_fixture.h"

#define PAGES 256
#define CAPACITY (64ull * FL_SLAB_BYTES)
#define KILLS 25 /* of each operation; the second argument asks for more */
#define STEPS_MOST 50000
#define SMALL 1300 /* payload lengths of two classes: 24 and 10 slots a slab */
#define LARGE 3000

static _Atomic(uint64_t) *table; /* shared; the handle, or 0 */
static struct fixture fixture;
static uint8_t payload[FL_PAYLOAD_MAX];

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

static void rebuild(void) {
    CHECK(fl_pool_rebuild_begin(fixture.pool) == 0, "begin");
    for (uint32_t page = 0; page < PAGES; page++)
        if (atomic_load(&table[page]))
            CHECK(fl_pool_rebuild_mark(fixture.pool, atomic_load(&table[page]), page) == 0, "page %u lost", page);
    fl_pool_rebuild_end(fixture.pool);
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
    prepare_empty_slab();
    fl_pool_close(fixture.pool);
    fixture_open_pool(&fixture, CAPACITY);
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
    {"rebuild", prepare_crash, rebuild},
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

/* Steps the child at most `most` instructions and kills it. Returns how many it took, or -77: not allowed to trace. */
static int64_t step_and_kill(const struct operation *operation, int64_t most) {
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork");
    if (pid == 0)
        child(operation);
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid, "waitpid");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return -77;
    CHECK(WIFSTOPPED(status), "%s: preparation failed: status %x", operation->name, status);
    CHECK(ptrace(PTRACE_SETOPTIONS, pid, NULL, PTRACE_O_EXITKILL) == 0, "PTRACE_SETOPTIONS");
    int64_t steps = 0;
    for (; steps < most; steps++) {
        CHECK(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0, "PTRACE_SINGLESTEP: %s", strerror(errno));
        CHECK(waitpid(pid, &status, 0) == pid, "waitpid");
        if (WIFEXITED(status)) {
            CHECK(WEXITSTATUS(status) == 0, "%s failed by itself: status %x", operation->name, status);
            return steps;
        }
        CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "%s: status %x", operation->name, status);
    }
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid, "kill");
    return steps;
}

static void check_all(const char *name, int64_t at) {
    fl_pool_close(fixture.pool);
    fixture_open_pool(&fixture, CAPACITY);
    rebuild();
    uint64_t objects = 0, bytes = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        const struct fl_object *object;
        if (!atomic_load(&table[page]))
            continue;
        CHECK(fl_pool_get(fixture.pool, atomic_load(&table[page]), &object) == 0 && object->page == page &&
                  object->checksum == page && object->length == length_of(page),
              "%s, killed at %lld: page %u", name, (long long)at, page);
        for (uint32_t i = 0; i < object->length; i++)
            CHECK(object->payload[i] == (uint8_t)page, "%s, killed at %lld: page %u at %u", name, (long long)at, page,
                  i);
        objects++;
        bytes += object->length;
    }
    struct fl_pool_stats stats = fixture_stats(&fixture);
    CHECK(stats.objects == objects && stats.stored_bytes == bytes, "%s, killed at %lld: %lld stored bytes too many",
          name, (long long)at, (long long)(stats.stored_bytes - bytes));
    CHECK(stats.aside_bytes == 0, "%s, killed at %lld: a slab was taken for damaged", name, (long long)at);
    CHECK(stats.pool_bytes == fixture_host_bytes(&fixture), "%s, killed at %lld: pool says %llu, host %llu", name,
          (long long)at, (unsigned long long)stats.pool_bytes, (unsigned long long)fixture_host_bytes(&fixture));
}

/* One try on a pool of its own. */
static int64_t attempt(const struct operation *operation, int64_t most) {
    for (uint32_t page = 0; page < PAGES; page++)
        atomic_store(&table[page], 0);
    fixture_make(&fixture, CAPACITY, CAPACITY);
    int64_t steps = step_and_kill(operation, most);
    if (steps != -77)
        check_all(operation->name, steps);
    fixture_destroy(&fixture);
    return steps;
}

/* Once without a kill, so that the stepped instructions are not those of the dynamic linker. */
static void bind_symbols(void) {
    for (size_t i = 0; i < sizeof operations / sizeof operations[0]; i++) {
        fixture_make(&fixture, CAPACITY, CAPACITY);
        operations[i].prepare();
        operations[i].act();
        fixture_destroy(&fixture);
        for (uint32_t page = 0; page < PAGES; page++)
            atomic_store(&table[page], 0);
    }
}

int main(int argc, char **argv) {
    struct rng rng = {seed_from(argc, argv)};
    int kills = argc > 2 ? atoi(argv[2]) : KILLS;
    if (SANITIZED) {
        printf("skipped: a sanitizer's instructions are not the pool's\n");
        return 77;
    }
    table = mmap(NULL, PAGES * sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(table != MAP_FAILED, "mmap");
    bind_symbols();
    for (size_t i = 0; i < sizeof operations / sizeof operations[0]; i++) {
        int64_t whole = attempt(&operations[i], STEPS_MOST);
        if (whole == -77) {
            printf("skipped: not allowed to trace a child\n");
            return 77;
        }
        CHECK(whole > 50 && whole < STEPS_MOST, "%s takes %lld instructions", operations[i].name, (long long)whole);
        for (int kill_number = 0; kill_number < kills; kill_number++)
            attempt(&operations[i], rng_below(&rng, (uint32_t)whole));
        printf("%-40s %6lld instructions, killed at %d of them\n", operations[i].name, (long long)whole, kills);
        fflush(stdout);
    }
    return 0;
}
