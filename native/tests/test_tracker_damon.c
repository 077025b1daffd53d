/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the damon tracker sees of a KVM guest, page by page, against what its vCPUs and its VMM really touched, each by itself:
 * page-exact, by regions where the budget is small, with pages that are on no LRU list, and with pages that a CPU never lets go.
 * And what it takes of a CPU where the budget is the limit.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>

#include "damon_field.h"
#include "track/damon_plan.h"
#include "track/damon_sysfs.h"
#include "victim.h"

#define MIB (UINT64_C(1) << 20)
#define EXACT_PERCENT 99.0
#define RUN_PAGES 256u
#define RUNS 16u
#define ALONE_PAGES 500u
#define RUN_PERCENT 80.0
#define REGION_PAGES_MIN 4.0 /* what is judged; other rounds are repeated */
#define REGION_PAGES_MAX 48.0
#define FRAME ((UINT64_C(1) << 55) - 1)
#define BUDGET_INTERVAL_MS 1000u
#define BUDGET_SCANS 8u
#define BUDGET_LEARNT 2u     /* the first goes by an assumed cost, the second measures that of coarser regions */
#define BUDGET_TOLERANCE 1.5 /* one scan differs from the next, and more where the CPU is emulated */
#define ON_LRU (UINT64_C(1) << 5)

static uint32_t *pages_some(uint32_t pages, uint32_t count, uint64_t *random) {
    uint32_t *list = calloc(count ? count : 1, sizeof(*list));
    CHECK(list, "no memory");
    for (uint32_t i = 0; i < count; i++)
        list[i] = (uint32_t)random_next(random) % pages;
    return list;
}

static void exact_round(struct damon_field *field, uint32_t most, struct damon_score *score, uint64_t *random) {
    uint32_t count = most / 4 + (uint32_t)random_next(random) % (most - most / 4);
    uint32_t *list = pages_some(field->pages, count, random);
    damon_field_begin(field);
    damon_field_touch(field, list, count, random);
    damon_field_look(field);
    damon_field_add_score(field, score);
    free(list);
}

static void test_exact(uint64_t bytes, unsigned count, uint32_t most, uint64_t *random) {
    struct damon_field *field = damon_field_make(bytes, 2, DAMON_EXACT_MS, true);
    struct damon_score score = {0};
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
    for (unsigned i = 0; i < count; i++)
        exact_round(field, most, &score, random);
    printf("a scan: arm %.1f ms, collect %.1f ms\n", field->arm_ms / count, field->collect_ms / count);
    CHECK(damon_read_number(DAMON_KDAMONDS "1/contexts/0/monitoring_attrs/nr_regions/min") == (long)field->pages,
          "not one region a page");
    printf("page-exact, %llu MiB, %u rounds: recall %.3f %%, precision %.3f %% (right %llu, missed %llu, wrong %llu)\n",
           (unsigned long long)(bytes / MIB), count, damon_recall(&score), damon_precision(&score),
           (unsigned long long)score.right, (unsigned long long)score.missed, (unsigned long long)score.wrong);
    printf("page-exact, %llu MiB, what the VMM alone touched: recall %.3f %% (right %llu, missed %llu)\n",
           (unsigned long long)(bytes / MIB), damon_vmm_recall(&score), (unsigned long long)score.vmm_right,
           (unsigned long long)score.vmm_missed);
    CHECK(damon_recall(&score) >= EXACT_PERCENT && damon_precision(&score) >= EXACT_PERCENT, "not exact");
    CHECK(score.vmm_right > 0 && damon_vmm_recall(&score) >= EXACT_PERCENT, "not exact for what the VMM touches");
    CHECK(score.right > 0, "nothing was touched");
    damon_field_end(field);
}

/* ---- regions ----------------------------------------------------------------------------------------------- */

static double region_pages(const struct damon_field *field) {
    return (double)field->pages /
           (double)damon_read_number(DAMON_KDAMONDS "1/contexts/0/monitoring_attrs/nr_regions/min");
}

/* A budget that comes to regions of about 16 pages on this machine, by the tracker's own measure of it. */
static void find_interval(struct damon_field *field) {
    uint64_t interval_ms = 1000;
    double grain = 0;
    for (unsigned i = 0; i < 30; i++) {
        atomic_store(&field->vm.vault.header->scan_interval_ms, (uint32_t)interval_ms);
        damon_field_begin(field);
        grain = region_pages(field);
        damon_field_look(field);
        if (i > 4 && grain >= 8 && grain <= 32)
            return;
        if (grain > 16)
            interval_ms = interval_ms < DAMON_EXACT_MS / 2 ? interval_ms * 2 : interval_ms;
        else if (grain < 16)
            interval_ms = interval_ms / 2 + 1;
    }
    CHECK(false, "regions of %.1f pages with %llu ms between scans: they do not follow the budget", grain,
          (unsigned long long)interval_ms);
}

static void touch_runs(struct damon_field *field, uint64_t *random) {
    uint32_t *list = calloc((size_t)RUNS * RUN_PAGES, sizeof(*list));
    CHECK(list, "no memory");
    for (uint32_t run = 0; run < RUNS; run++) {
        uint32_t first = (uint32_t)random_next(random) % (field->pages - RUN_PAGES);
        for (uint32_t i = 0; i < RUN_PAGES; i++)
            list[run * RUN_PAGES + i] = first + i;
    }
    damon_field_touch(field, list, RUNS * RUN_PAGES, random);
    free(list);
}

static void touch_alone(struct damon_field *field, uint64_t *random) {
    uint32_t *list = pages_some(field->pages, ALONE_PAGES, random);
    damon_field_touch(field, list, ALONE_PAGES, random);
    free(list);
}

/* How many pages a region has. Beside another load than when the interval was found it may be many more or fewer. */
static double regions_round(struct damon_field *field, void (*touch)(struct damon_field *, uint64_t *),
                            struct damon_score *score, uint64_t *random) {
    for (unsigned i = 0; i < 10; i++) {
        damon_field_begin(field);
        double grain = region_pages(field);
        touch(field, random);
        damon_field_look(field);
        if (grain >= REGION_PAGES_MIN && grain <= REGION_PAGES_MAX) {
            damon_field_add_score(field, score);
            return grain;
        }
        printf("regions of %.1f pages: not judged\n", grain);
        find_interval(field);
    }
    CHECK(false, "the budget does not stay at regions of %.0f to %.0f pages", REGION_PAGES_MIN, REGION_PAGES_MAX);
    return 0;
}

static void test_regions(uint64_t *random) {
    struct damon_field *field = damon_field_make(128 * MIB, 1, 1000, true);
    struct damon_score runs = {0}, alone = {0};
    unsigned count = rounds(10, 4);
    double grain = 0;
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
    find_interval(field);
    for (unsigned i = 0; i < count; i++) {
        (void)regions_round(field, touch_runs, &runs, random);
        grain += regions_round(field, touch_alone, &alone, random) / count;
    }
    printf("regions of %.1f pages: runs of %u touched pages: recall %.1f %%, precision %.1f %%; pages alone: recall "
           "%.1f %%, precision %.1f %%\n",
           grain, RUN_PAGES, damon_recall(&runs), damon_precision(&runs), damon_recall(&alone),
           damon_precision(&alone));
    CHECK(damon_recall(&runs) >= RUN_PERCENT && damon_precision(&runs) >= RUN_PERCENT, "runs are not seen");
    CHECK(alone.right > 0 && damon_recall(&alone) < RUN_PERCENT, "pages alone cannot be seen like that");
    damon_field_end(field);
}

/* ---- the budget -------------------------------------------------------------------------------------------- */

/* What the kdamond has used when it has been told to stop: the last that can be read while it still ends. */
struct meter {
    int pid;
    _Atomic(bool) stop;
    uint64_t cpu_ns;
};

static void *read_meter(void *argument) {
    struct meter *meter = argument;
    while (!atomic_load(&meter->stop)) {
        uint64_t cpu_ns = fl_damon_cpu_ns(meter->pid);
        meter->cpu_ns = cpu_ns ? cpu_ns : meter->cpu_ns;
        sleep_ms(1);
    }
    return NULL;
}

static double scan_permille(struct damon_field *field, uint32_t interval_ms) {
    pthread_t thread;
    damon_field_begin(field);
    struct meter meter = {.pid = (int)damon_read_number(DAMON_KDAMONDS "1/pid")};
    CHECK(meter.pid > 0, "no kdamond");
    meter.cpu_ns = fl_damon_cpu_ns(meter.pid);
    CHECK(pthread_create(&thread, NULL, read_meter, &meter) == 0, "thread");
    damon_field_look(field);
    atomic_store(&meter.stop, true);
    pthread_join(thread, NULL);
    CHECK(meter.cpu_ns > 0, "the kdamond's CPU time was not seen");
    return (double)meter.cpu_ns / ((double)interval_ms * 1e6) * 1000;
}

/*
 * An interval that is too short for page-exact, by the assumed cost and by a higher one. Over several scans: one
 * differs from the next.
 */
static void test_budget(void) {
    const uint32_t interval_ms = BUDGET_INTERVAL_MS;
    struct damon_field *field = damon_field_make(128 * MIB, 1, interval_ms, true);
    double sum = 0;
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
    for (unsigned scan = 1; scan <= BUDGET_LEARNT + BUDGET_SCANS; scan++) {
        double permille = scan_permille(field, interval_ms);
        printf("budget: scan %u takes %.1f permille of a CPU for %u ms, regions of %.1f pages\n", scan, permille,
               interval_ms, region_pages(field));
        if (scan > BUDGET_LEARNT)
            sum += permille;
    }
    CHECK(region_pages(field) > 1, "the budget is for more than the VM needs, and shows nothing");
    CHECK(sum / BUDGET_SCANS <= FL_DAMON_BUDGET_PERMILLE * BUDGET_TOLERANCE,
          "%.1f permille on average, the budget is %u", sum / BUDGET_SCANS, FL_DAMON_BUDGET_PERMILLE);
    damon_field_end(field);
}

/* ---- pages on no list -------------------------------------------------------------------------------------- */

static uint64_t word_at(int fd, uint64_t index) {
    uint64_t word = 0;
    CHECK(pread(fd, &word, sizeof(word), (off_t)(index * sizeof(word))) == (ssize_t)sizeof(word), "pread: %s",
          strerror(errno));
    return word;
}

static uint32_t count_off_list(const struct damon_field *field) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", field->vm.pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC), flags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    CHECK(pagemap >= 0 && flags >= 0, "pagemap, kpageflags: %s", strerror(errno));
    uint64_t base = (uint64_t)(uintptr_t)kvm_guest_memory(field->vmm.guest) / FL_PAGE_SIZE;
    uint32_t off = 0;
    for (uint32_t page = 0; page < field->pages; page++) {
        uint64_t frame = word_at(pagemap, base + page) & FRAME;
        off += frame && !(word_at(flags, frame) & ON_LRU);
    }
    close(pagemap);
    close(flags);
    return off;
}

static void test_off_list(uint64_t *random) {
    struct damon_field *field = damon_field_make(4 * MIB, 1, DAMON_EXACT_MS, false);
    uint32_t list[20], off = 0, next = 0;
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
    while (!off && next + 20 <= field->pages) {
        for (uint32_t i = 0; i < 20; i++)
            list[i] = next++;
        damon_field_touch(field, list, 20, random);
        off = count_off_list(field);
    }
    CHECK(off, "the kernel puts all pages on their list at once");
    for (unsigned i = 0; i < 3; i++) {
        damon_field_begin(field);
        damon_field_look(field);
        CHECK(damon_field_seen(field) == 0, "scan %u: %u pages look accessed, and none was", i,
              damon_field_seen(field));
    }
    printf("%u pages on no LRU list: none looks accessed\n", off);
    damon_field_end(field);
}

static void test_own_memory(uint64_t *random) {
    struct damon_field *field = damon_field_make(8 * MIB, 1, DAMON_EXACT_MS, true);
    struct damon_score score = {0};
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
    damon_field_begin(field);
    kvm_vmm_heat(&field->vmm, 48 * MIB, 16 * MIB, 60);
    uint32_t *list = pages_some(field->pages, 100, random);
    damon_field_touch(field, list, 100, random);
    damon_field_look(field);
    damon_field_add_score(field, &score);
    CHECK(damon_recall(&score) >= EXACT_PERCENT && damon_precision(&score) >= EXACT_PERCENT,
          "the VMM's own memory shows: missed %llu, wrong %llu", (unsigned long long)score.missed,
          (unsigned long long)score.wrong);
    free(list);
    damon_field_end(field);
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    need_damon();
    test_off_list(&random);
    test_own_memory(&random);
    test_exact(32 * MIB, rounds(20, 8), 2000, &random);
    test_exact(256 * MIB, 2, 20000, &random);
    test_regions(&random);
    test_budget();
    puts("ok");
    return 0;
}
