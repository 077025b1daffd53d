/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The idle tracker on this process' own memory: exactly the pages that were touched, whatever the host does with the
 * frames under them, and nothing is faulted in to find out.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kernel-page-flags.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "base/kernel.h"
#include "host_memory.h"
#include "idle_field.h"
#include "track/page_idle.h"
#include "victim.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

#define PAGES 20000u
#define HUGE_PAGES 512u
#define PRESENT (UINT64_C(1) << 63)
#define FRAME ((UINT64_C(1) << 55) - 1)
#define SWAP_BYTES (128u << 20)
#define HOT_PAGES 16u
#define MOVED_PAGES 8192u

static void *page_at(const struct idle_field *field, uint32_t page) {
    return field->memory + (size_t)page * FL_PAGE_SIZE;
}

static uint32_t count_present(const struct idle_field *field) {
    uint32_t present = 0;
    for (uint32_t page = 0; page < field->pages; page++)
        present += (idle_field_entry(field, page) & PRESENT) != 0;
    return present;
}

/* ---- moved while it looks ------------------------------------------------------------------------------------ */

static struct idle_field *moving;

static void set_address(struct idle_field *field, uint64_t address) {
    struct fl_vault_region *region = (struct fl_vault_region *)fl_region(&field->vm, 0);
    atomic_store(&region->vmm_addr, address);
}

/* As a fault thread does that reads of a move. */
ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset) {
    ssize_t got = syscall(SYS_pread64, fd, buffer, bytes, offset);
    if (moving && fd == moving->vm.pagemap_fd) {
        set_address(moving, fl_region(&moving->vm, 0)->vmm_addr + FL_PAGE_SIZE);
        moving = NULL;
    }
    return got;
}

static void test_moved(uint64_t *random) {
    struct idle_field field = idle_field_make(PAGES);
    uint64_t address = fl_region(&field.vm, 0)->vmm_addr;
    idle_field_arm(&field);
    idle_field_touch_some(&field, 0, PAGES, 16, random);
    moving = &field;
    int error = fl_tracker_idle.collect(field.tracker);
    CHECK(error == -EAGAIN && !moving, "looked at memory that moved meanwhile: %s", strerror(-error));
    set_address(&field, address);
    atomic_store(&field.vm.parted, true);
    error = fl_tracker_idle.collect(field.tracker);
    CHECK(error == -EAGAIN, "looked at memory of which a part had been moved: %s", strerror(-error));
    atomic_store(&field.vm.parted, false);
    idle_field_check(&field, 0, "a scan that was void, then one that is not");
    idle_field_end(&field);
}

/* ---- touched or not ----------------------------------------------------------------------------------------- */

static void test_exact(uint64_t *random) {
    static const uint32_t every[] = {1, 2, 16, 1000, PAGES * 10};
    struct idle_field field = idle_field_make(PAGES);
    for (unsigned round = 0; round < rounds(100, 10); round++) {
        idle_field_arm(&field);
        idle_field_touch_some(&field, 0, PAGES, every[round % 5], random);
        idle_field_check(&field, round * 7 % 500, "random touches");
    }
    idle_field_end(&field);
}

static void run_on(unsigned cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    CHECK(sched_setaffinity(0, sizeof(set), &set) == 0, "sched_setaffinity: %s", strerror(errno));
}

/*
 * Pages fresh from their fault wait in a batch of their CPU and cannot be marked there. Without draining the batches of all
 * CPUs, the last ones would be seen as touched.
 */
static void test_fresh_pages(void) {
    struct idle_field field = idle_field_make(PAGES);
    cpu_set_t all;
    CHECK(sched_getaffinity(0, sizeof(all), &all) == 0, "sched_getaffinity: %s", strerror(errno));
    if (CPU_COUNT(&all) < 2 || !CPU_ISSET(0, &all) || !CPU_ISSET(1, &all))
        printf("pages filled on another CPU not tried: there is one only\n");
    idle_field_arm(&field);
    for (uint32_t round = 0; round < 10 && CPU_ISSET(0, &all) && CPU_ISSET(1, &all); round++) {
        CHECK(madvise(page_at(&field, 0), (1000 + round) * FL_PAGE_SIZE, MADV_REMOVE) == 0, "madvise: %s",
              strerror(errno));
        run_on(round % 2);
        for (uint32_t page = 0; page < 1000 + round; page++)
            idle_field_touch(&field, page, true);
        run_on((round + 1) % 2);
        idle_field_arm(&field);
        idle_field_check(&field, 0, "pages filled just before");
    }
    CHECK(sched_setaffinity(0, sizeof(all), &all) == 0, "sched_setaffinity: %s", strerror(errno));
    idle_field_end(&field);
}

static void test_mapped_since(uint64_t *random) {
    struct idle_field field = idle_field_make(PAGES);
    idle_field_arm(&field);
    CHECK(madvise(page_at(&field, 1000), 5000 * FL_PAGE_SIZE, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    CHECK(madvise(page_at(&field, 9000), 5000 * FL_PAGE_SIZE, MADV_REMOVE) == 0, "madvise: %s", strerror(errno));
    uint32_t present = count_present(&field);
    CHECK(present == PAGES - 10000, "%u pages mapped", present);
    idle_field_check(&field, 0, "unmapped and freed pages");
    CHECK(count_present(&field) == present, "looking has mapped pages");
    for (uint32_t page = 0; page < PAGES; page += 1 + (uint32_t)(random_next(random) % 50)) {
        *(volatile uint8_t *)page_at(&field, page) = 1; /* by a write: reads would map pages around it as well */
        field.expected[page] = 1;
    }
    idle_field_check(&field, 0, "pages mapped since");
    idle_field_arm(&field);
    idle_field_check(&field, 0, "armed again");
    idle_field_end(&field);
}

/* ---- the host moves frames ---------------------------------------------------------------------------------- */

static uint32_t count_moved(const struct idle_field *field, const uint64_t *frames) {
    uint32_t moved = 0;
    for (uint32_t page = 0; page < field->pages; page++) {
        uint64_t entry = idle_field_entry(field, page);
        moved += (entry & PRESENT) && (entry & FRAME) != frames[page];
    }
    return moved;
}

/* A field that lies where the host will move it from, moved between two looks. Returns how many of its pages were. */
static uint32_t migrate_field(uint64_t *random, const char **missing) {
    uint64_t frames[MOVED_PAGES];
    *missing = host_make_holes(MOVED_PAGES * FL_PAGE_SIZE);
    if (*missing)
        return 0;
    struct idle_field field = idle_field_make(MOVED_PAGES);
    for (uint32_t page = 0; page < MOVED_PAGES; page++)
        frames[page] = idle_field_entry(&field, page) & FRAME;
    idle_field_arm(&field);
    idle_field_touch_some(&field, 0, MOVED_PAGES, 16, random);
    *missing = host_migrate(getpid(), (uintptr_t)field.memory, MOVED_PAGES, 1);
    idle_field_check(&field, 0, "migrated pages");
    uint32_t moved = count_moved(&field, frames);
    idle_field_touch_some(&field, 0, MOVED_PAGES, 16, random);
    idle_field_check(&field, 0, "pages touched after they were migrated");
    idle_field_arm(&field);
    idle_field_touch_some(&field, 0, MOVED_PAGES, 16, random);
    idle_field_check(&field, 0, "pages armed after they were migrated");
    idle_field_end(&field);
    host_drop_holes();
    return moved;
}

/* The first time, compaction often moves next to none of ours, and the next time nearly all: so it gets some tries. */
static void test_migration(uint64_t *random) {
    const char *missing = NULL;
    uint32_t moved = 0;
    for (unsigned try = 0; try < 4 && !missing && moved < MOVED_PAGES / 16; try++)
        moved = migrate_field(random, &missing);
    if (missing)
        printf("migrated pages not tried: %s\n", missing);
    else if (moved < MOVED_PAGES / 16)
        printf("migrated pages not tried: compaction has moved %u of %u\n", moved, MOVED_PAGES);
    else
        printf("%u of %u pages were migrated\n", moved, MOVED_PAGES);
}

static void test_swap(uint64_t *random) {
    const char *missing = host_swap_on(SWAP_BYTES);
    if (missing) {
        printf("pages swapped out by the host not tried: %s\n", missing);
        return;
    }
    struct idle_field field = idle_field_make(PAGES);
    idle_field_arm(&field);
    idle_field_touch_some(&field, 0, PAGES, 16, random);
    CHECK(madvise(page_at(&field, 4000), 4000 * FL_PAGE_SIZE, MADV_PAGEOUT) == 0, "madvise: %s", strerror(errno));
    uint32_t away = 0;
    for (uint32_t page = 4000; page < 8000; page++) {
        if (!(idle_field_entry(&field, page) & PRESENT)) {
            field.expected[page] = 0;
            away++;
        }
    }
    CHECK(away > 3000, "only %u of 4000 pages were swapped out", away);
    idle_field_check(&field, 0, "pages swapped out");
    for (uint32_t page = 4000; page < 8000; page += 64) {
        *(volatile uint8_t *)page_at(&field, page) = 1;
        field.expected[page] = 1;
    }
    idle_field_check(&field, 0, "pages swapped in again");
    printf("%u pages were swapped out\n", away);
    idle_field_end(&field);
    host_swap_off();
}

/* ---- huge pages --------------------------------------------------------------------------------------------- */

static uint64_t flags_of(const struct idle_field *field, uint32_t page) {
    uint64_t flags = 0, frame = idle_field_entry(field, page) & FRAME;
    int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && pread(fd, &flags, sizeof(flags), (off_t)(frame * sizeof(flags))) == sizeof(flags), "kpageflags");
    close(fd);
    return flags;
}

static void expect_huge(struct idle_field *field, uint32_t page) {
    idle_field_touch(field, page, false);
    for (uint32_t i = page / HUGE_PAGES * HUGE_PAGES, end = i + HUGE_PAGES; i < end; i++)
        field->expected[i] = (idle_field_entry(field, i) & PRESENT) != 0;
}

static void test_huge(void) {
    struct idle_field field = idle_field_make(8 * HUGE_PAGES);
    for (uint32_t page = HUGE_PAGES; page < 6 * HUGE_PAGES; page += HUGE_PAGES) {
        if (madvise(page_at(&field, page), HUGE_PAGES * FL_PAGE_SIZE, MADV_COLLAPSE)) {
            printf("huge pages not tried: MADV_COLLAPSE of shared memory: %s\n", strerror(errno));
            idle_field_end(&field);
            return;
        }
    }
    for (uint32_t page = 0; page < field.pages; page++) /* mapped again */
        idle_field_touch(&field, page, false);
    CHECK(flags_of(&field, 700) & 1u << KPF_COMPOUND_TAIL, "page 700 is in no huge page");
    idle_field_arm(&field);
    idle_field_check(&field, 0, "huge pages untouched");
    idle_field_touch(&field, 3, false);
    expect_huge(&field, HUGE_PAGES + 300);
    idle_field_check(&field, 0, "one touched in a huge page");
    expect_huge(&field, 3 * HUGE_PAGES + 1);
    idle_field_check(&field, 100, "one touched in a huge page, seen in parts");
    /* One of them mapped by small entries. */
    CHECK(mprotect(page_at(&field, 4 * HUGE_PAGES + 7), FL_PAGE_SIZE, PROT_READ) == 0, "mprotect");
    for (uint32_t page = 4 * HUGE_PAGES; page < 5 * HUGE_PAGES; page++)
        idle_field_touch(&field, page, false);
    idle_field_arm(&field);
    CHECK(flags_of(&field, 4 * HUGE_PAGES + 7) & 1u << KPF_COMPOUND_TAIL, "the huge page was split");
    idle_field_check(&field, 33, "a huge page in small entries, untouched");
    expect_huge(&field, 4 * HUGE_PAGES + 200);
    idle_field_check(&field, 33, "a huge page in small entries");
    puts("huge pages: each seen as one");
    idle_field_end(&field);
}

/* ---- TLBs --------------------------------------------------------------------------------------------------- */

struct looper {
    uint8_t *memory;
    _Atomic(int) uffd; /* + 1 */
    _Atomic(uint64_t) passes;
};

static _Noreturn void loop(struct looper *looper) {
    volatile uint8_t *memory = looper->memory;
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
    struct uffdio_register area = {.range = {.start = (uintptr_t)memory, .len = (uint64_t)PAGES * FL_PAGE_SIZE},
                                   .mode = UFFDIO_REGISTER_MODE_WP};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &area))
        _exit(2);
    for (uint32_t page = 0; page < PAGES; page++) /* mapped, for writing */
        memory[(size_t)page * FL_PAGE_SIZE] = 1;
    atomic_store(&looper->uffd, uffd + 1);
    while (true) {
        for (uint32_t page = 0; page < HOT_PAGES; page++)
            (void)memory[(size_t)page * FL_PAGE_SIZE];
        atomic_fetch_add(&looper->passes, 1);
    }
}

/*
 * A process goes round in so few pages that all stay in its TLB, and does nothing that would flush it. Its memory is
 * registered with a userfaultfd, as a VMM's is.
 */
static void test_hot_loop(void) {
    struct idle_field field = idle_field_make(PAGES);
    struct looper *looper = mmap(NULL, sizeof(*looper), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(looper != MAP_FAILED, "mmap: %s", strerror(errno));
    looper->memory = field.memory;
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0)
        loop(looper);
    for (unsigned i = 0; i < 10000 && !atomic_load(&looper->uffd); i++)
        sleep_ms(1);
    struct idle_field looped = idle_field_of(pid, (uintptr_t)field.memory, PAGES);
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    looped.vm.uffd = (int)syscall(SYS_pidfd_getfd, pidfd, atomic_load(&looper->uffd) - 1, 0);
    looped.vm.freeze = FL_FREEZE_WP;
    CHECK(looped.vm.uffd >= 0, "the process' userfaultfd: %s", strerror(errno));
    for (unsigned round = 0; round < 20; round++) {
        idle_field_arm(&looped);
        uint64_t passes = atomic_load(&looper->passes) + 2;
        for (unsigned i = 0; i < 20000 && atomic_load(&looper->passes) < passes; i++)
            sleep_ms(1);
        memset(looped.expected, 1, HOT_PAGES);
        idle_field_check(&looped, 0, "pages that a loop keeps in its TLB");
    }
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid, "waitpid");
    close(pidfd);
    close(looped.vm.uffd);
    munmap(looper, sizeof(*looper));
    idle_field_end(&looped);
    idle_field_end(&field);
}

/* ---- the end of memory -------------------------------------------------------------------------------------- */

/* The first word of the bitmap that the kernel does not tell of, and whether memory ends inside of it. */
static bool find_last_word(uint64_t *word) {
    int fd = open(FL_PAGE_IDLE_PATH, O_RDWR | O_CLOEXEC);
    uint64_t low = 0, high = UINT64_C(1) << 40, bits;
    CHECK(fd >= 0, "%s: %s", FL_PAGE_IDLE_PATH, strerror(errno));
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (pread(fd, &bits, sizeof(bits), (off_t)(middle * sizeof(bits))) > 0)
            low = middle + 1;
        else
            high = middle;
    }
    *word = low;
    bits = 0;
    bool inside = pwrite(fd, &bits, sizeof(bits), (off_t)(low * sizeof(bits))) == 0;
    close(fd);
    return inside;
}

static uint32_t count_in_word(const struct idle_field *field, uint64_t word) {
    uint32_t count = 0;
    for (uint32_t page = 0; page < field->pages; page++)
        count += (idle_field_entry(field, page) & FRAME) / 64 == word;
    return count;
}

static unsigned next_cpu(const cpu_set_t *set, unsigned cpu) {
    do
        cpu = (cpu + 1) % CPU_SETSIZE;
    while (!CPU_ISSET(cpu, set));
    return cpu;
}

/*
 * Take memory until one field has enough frames of that word: by each CPU in turn, as each has a list of free frames for
 * itself, and the last ones may wait in any. Then touch each of them in every other round.
 */
static void test_last_word(void) {
    enum { FIELDS = 200, ENOUGH = 10 };
    struct idle_field fields[FIELDS], *field = NULL;
    uint32_t made = 0, most = 0;
    unsigned cpu = 0;
    cpu_set_t all;
    uint64_t word;
    if (!find_last_word(&word)) {
        printf("last word of the bitmap not tried: this machine's memory ends with a word\n");
        return;
    }
    CHECK(sched_getaffinity(0, sizeof(all), &all) == 0, "sched_getaffinity: %s", strerror(errno));
    while (most < ENOUGH && made < FIELDS && (uint64_t)sysconf(_SC_AVPHYS_PAGES) > 4 * PAGES) {
        cpu = next_cpu(&all, cpu);
        run_on(cpu);
        fields[made] = idle_field_make(PAGES);
        uint32_t count = count_in_word(&fields[made], word);
        if (count > most) {
            most = count;
            field = &fields[made];
        }
        made++;
    }
    CHECK(sched_setaffinity(0, sizeof(all), &all) == 0, "sched_setaffinity: %s", strerror(errno));
    for (uint32_t round = 0; round < 4 && field; round++) {
        idle_field_arm(field);
        for (uint32_t page = 0; page < PAGES; page++) {
            uint64_t frame = idle_field_entry(field, page) & FRAME;
            if (frame / 64 == word && (frame + round) % 2)
                idle_field_touch(field, page, false);
        }
        idle_field_check(field, 0, "the last word of the bitmap");
    }
    if (field)
        printf("last word of the bitmap: %u pages of it\n", most);
    else
        printf("last word of the bitmap not tried: of its frames, %#llx and on, none is to be had\n",
               (unsigned long long)word * 64);
    while (made)
        idle_field_end(&fields[--made]);
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    need_page_idle();
    test_last_word(); /* first: as little as possible of what runs here has got these frames yet */
    test_fresh_pages();
    test_exact(&random);
    test_moved(&random);
    test_mapped_since(&random);
    test_hot_loop();
    test_huge();
    test_swap(&random);
    test_migration(&random);
    return 0;
}
