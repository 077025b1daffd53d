/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rwp tracker on anonymous memory: what was touched, exactly, page by page, in this very process. Nothing can be
 * evicted from such memory (there is no file to punch), but its hotness can be seen.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "host_memory.h"
#include "swap/uffd.h"
#include "track/track.h"
#include "victim.h"

#define PAGES 4096u
#define WORDS (PAGES / 64)
#define SWAP_ROUNDS 5u
#define SWAPPED (UINT64_C(1) << 62) /* of a pagemap entry */

static int open_uffd(void) {
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC};
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    CHECK(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0, "userfaultfd: %s", strerror(errno));
    return fd;
}

/* A VM of one region, which is anonymous memory of our own. */
static void make_vm(struct fl_vm *vm, uint8_t *memory) {
    memset(vm, 0, sizeof(*vm));
    vm->pid = (int)getpid();
    vm->uffd = open_uffd();
    vm->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    CHECK(fl_vault_create(vm->pid, 1, PAGES * FL_PAGE_SIZE, &vm->vault) == 0, "vault");
    struct fl_vault_region region = {.vmm_addr = (uint64_t)(uintptr_t)memory, .length = PAGES * FL_PAGE_SIZE};
    fl_vault_put_region(&vm->vault, 0, region);
    fl_vault_count_regions(&vm->vault, 1);
    vm->freeze = FL_FREEZE_RWP;
    struct uffdio_register request = {.range = {.start = (uint64_t)(uintptr_t)memory, .len = PAGES * FL_PAGE_SIZE},
                                      .mode = UFFDIO_REGISTER_MODE_RWP};
    CHECK(ioctl(vm->uffd, UFFDIO_REGISTER, &request) == 0, "register: %s", strerror(errno));
}

static void touch_some(volatile uint8_t *memory, uint64_t *touched, uint64_t count, uint64_t *random) {
    memset(touched, 0, WORDS * sizeof(*touched));
    for (uint64_t i = 0; i < count; i++) {
        uint64_t page = random_next(random) % PAGES;
        touched[page / 64] |= UINT64_C(1) << (page % 64);
        if (random_next(random) & 1)
            memory[page * FL_PAGE_SIZE + i % FL_PAGE_SIZE]++;
        else
            (void)memory[page * FL_PAGE_SIZE + i % FL_PAGE_SIZE];
    }
}

static void arm(struct fl_tracker *tracker) {
    uint64_t stop_ns;
    CHECK(fl_tracker_rwp.arm(tracker, &stop_ns) == 0, "arm");
}

/* Returns how many pages look touched: exactly those that were. */
static uint64_t check_seen(struct fl_tracker *tracker, const uint64_t *touched, const char *when, unsigned round) {
    uint64_t seen[WORDS], hot = 0;
    CHECK(fl_tracker_rwp.harvest(tracker, 0, 0, PAGES, seen) == 0, "harvest");
    for (unsigned word = 0; word < WORDS; word++) {
        CHECK(seen[word] == touched[word], "%s, round %u, pages %u on: touched %llx, seen %llx", when, round, word * 64,
              (unsigned long long)touched[word], (unsigned long long)seen[word]);
        hot += (uint64_t)__builtin_popcountll(seen[word]);
    }
    return hot;
}

/* ---- swapped out and in ------------------------------------------------------------------------------------- */

struct away { /* of the pages that are in swap now */
    uint32_t touched, untouched;
    uint64_t pages[WORDS];
};

static struct away find_away(const struct fl_vm *vm, const uint8_t *memory, const uint64_t *touched) {
    static uint64_t entries[PAGES];
    struct away away = {0};
    CHECK(pread(vm->pagemap_fd, entries, sizeof(entries), (off_t)((uintptr_t)memory / FL_PAGE_SIZE * 8)) ==
              (ssize_t)sizeof(entries),
          "pagemap: %s", strerror(errno));
    for (unsigned page = 0; page < PAGES; page++) {
        bool hot = touched[page / 64] >> (page % 64) & 1, swapped = entries[page] & SWAPPED;
        away.touched += swapped && hot;
        away.untouched += swapped && !hot;
        away.pages[page / 64] |= (uint64_t)swapped << (page % 64);
    }
    return away;
}

/* Every eighth of the pages that are away is brought in by a touch, whether it had been touched before or not. */
static uint32_t touch_away(volatile uint8_t *memory, const struct away *away, uint64_t *touched) {
    uint32_t count = 0, nth = 0;
    for (unsigned page = 0; page < PAGES; page++) {
        if (!(away->pages[page / 64] >> (page % 64) & 1) || nth++ % 8)
            continue;
        if (nth & 8)
            memory[page * FL_PAGE_SIZE]++;
        else
            (void)memory[page * FL_PAGE_SIZE];
        touched[page / 64] |= UINT64_C(1) << (page % 64);
        count++;
    }
    return count;
}

/*
 * What the host has swapped out looks as it did before: a look brings nothing in, a touch does and is seen, and what comes
 * back by itself when swap goes away has been touched by nobody.
 */
static void check_swapped(const struct fl_vm *vm, uint8_t *memory, struct fl_tracker *tracker, uint64_t *random) {
    uint64_t touched[WORDS];
    uint32_t out = 0, in = 0;
    for (unsigned round = 0; round < SWAP_ROUNDS; round++) {
        const char *missing = host_swap_on(4 * PAGES * FL_PAGE_SIZE);
        if (missing) {
            printf("swap not tried: %s\n", missing);
            return;
        }
        arm(tracker);
        touch_some(memory, touched, PAGES / 4, random);
        CHECK(madvise(memory, PAGES * FL_PAGE_SIZE, MADV_PAGEOUT) == 0, "madvise: %s", strerror(errno));
        struct away away = find_away(vm, memory, touched);
        CHECK(away.touched > PAGES / 8 && away.untouched > PAGES / 4,
              "only %u touched pages and %u others are in swap: this test shows nothing", away.touched, away.untouched);
        (void)check_seen(tracker, touched, "in swap", round);
        struct away still = find_away(vm, memory, touched);
        CHECK(memcmp(still.pages, away.pages, sizeof(away.pages)) == 0, "a look has brought pages in");
        out += away.touched + away.untouched;
        in += touch_away(memory, &away, touched);
        (void)check_seen(tracker, touched, "some touched in swap", round);
        host_swap_off();
        away = find_away(vm, memory, touched);
        CHECK(away.touched + away.untouched == 0, "in swap, and there is none");
        (void)check_seen(tracker, touched, "back from swap", round);
    }
    printf("swapped out: %u pages in %u rounds, %u of them touched there, all others back by themselves: none missed, "
           "none "
           "imagined\n",
           out, SWAP_ROUNDS, in);
}

int main(int argc, char **argv) {
    struct fl_kernel_features kernel;
    if (fl_probe_kernel(&kernel) || !kernel.rwp) {
        printf("skipped: this kernel's userfaultfd has no RWP (CONFIG_USERFAULTFD_RWP, Linux 7.3)\n");
        return 77;
    }
    uint64_t random = seed_of(argc, argv), touched[WORDS], hot = 0;
    static struct fl_vm vm;
    struct fl_tracker *tracker;
    uint8_t *memory = mmap(NULL, PAGES * FL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED && madvise(memory, PAGES * FL_PAGE_SIZE, MADV_NOHUGEPAGE) == 0, "mmap");
    memset(memory, 1, PAGES * FL_PAGE_SIZE);
    make_vm(&vm, memory);
    CHECK(fl_tracker_rwp.create(&vm, NULL, &tracker) == 0, "tracker");
    for (unsigned round = 0; round < 100; round++) {
        arm(tracker);
        touch_some(memory, touched, random_next(&random) % 3 ? random_next(&random) % PAGES : 0, &random);
        hot += check_seen(tracker, touched, "in memory", round);
    }
    printf("anonymous memory: 100 rounds, %llu touched pages seen, none missed, none imagined\n",
           (unsigned long long)hot);
    check_swapped(&vm, memory, tracker, &random);
    fl_tracker_rwp.destroy(tracker);
    return 0;
}
