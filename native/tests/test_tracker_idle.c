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
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "base/kernel.h"
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

static void write_text(const char *path, const char *text, bool must) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t written = fd < 0 ? -1 : write(fd, text, strlen(text));
    CHECK(!must || written == (ssize_t)strlen(text), "%s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static void *page_at(const struct idle_field *field, uint32_t page) {
    return field->memory + (size_t)page * FL_PAGE_SIZE;
}

static uint32_t count_present(const struct idle_field *field) {
    uint32_t present = 0;
    for (uint32_t page = 0; page < field->pages; page++)
        present += (idle_field_entry(field, page) & PRESENT) != 0;
    return present;
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
    for (uint32_t page = 0; page < field->pages; page++)
        moved += (idle_field_entry(field, page) & FRAME) != frames[page];
    return moved;
}

static uint64_t sum_of_frames(const struct idle_field *field) {
    uint64_t sum = 0;
    for (uint32_t page = 0; page < field->pages; page++)
        sum += idle_field_entry(field, page) & FRAME;
    return sum;
}

/*
 * Compaction moves pages up, into holes between others: so there are holes everywhere, and what is tracked is what lies
 * lowest. It begins with what lies lower still, and gives up early: so it is asked often.
 */
static void test_migration(uint64_t *random) {
    enum { FIELDS = 8, EACH = PAGES / 4, TRIES = 20 };
    struct idle_field fields[FIELDS];
    uint64_t frames[EACH];
    uint32_t lowest = 0, moved = 0;
    for (uint32_t i = 0; i < FIELDS; i++) {
        fields[i] = idle_field_make(EACH);
        if (sum_of_frames(&fields[i]) < sum_of_frames(&fields[lowest]))
            lowest = i;
    }
    struct idle_field field = fields[lowest];
    fields[lowest] = fields[FIELDS - 1];
    for (uint32_t page = 0; page < EACH; page++)
        frames[page] = idle_field_entry(&field, page) & FRAME;
    for (uint32_t i = 0; i < FIELDS - 1; i++) {
        for (uint32_t page = 0; page < EACH; page += 2)
            CHECK(madvise(page_at(&fields[i], page), FL_PAGE_SIZE, MADV_REMOVE) == 0, "madvise: %s", strerror(errno));
    }
    idle_field_arm(&field);
    idle_field_touch_some(&field, 0, EACH, 16, random);
    for (unsigned i = 0; i < TRIES && moved < EACH / 2; i++) {
        write_text("/proc/sys/vm/compact_memory", "1", false);
        moved = count_moved(&field, frames);
    }
    idle_field_check(&field, 0, "migrated pages");
    idle_field_touch_some(&field, 0, EACH, 16, random);
    idle_field_check(&field, 0, "pages touched after they were migrated");
    if (moved)
        printf("%u of %u pages were migrated\n", moved, EACH);
    else
        printf("migrated pages not tried: compaction has moved none\n");
    for (uint32_t i = 0; i < FIELDS - 1; i++)
        idle_field_end(&fields[i]);
    idle_field_end(&field);
}

static bool swap_on(void) {
    uint8_t header[FL_PAGE_SIZE] = {0};
    uint32_t info[3] = {1, SWAP_BYTES / FL_PAGE_SIZE - 1, 0};
    char size[16];
    if (access("/sys/block/zram0", F_OK))
        return false;
    snprintf(size, sizeof(size), "%u", SWAP_BYTES);
    write_text("/sys/block/zram0/reset", "1", false);
    write_text("/sys/block/zram0/disksize", size, false);
    memcpy(header + 1024, info, sizeof(info));
    memcpy(header + FL_PAGE_SIZE - 10, "SWAPSPACE2", 10);
    int fd = open("/dev/zram0", O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, header, sizeof(header)) == sizeof(header) && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    return written && swapon("/dev/zram0", 0) == 0;
}

static void test_swap(uint64_t *random) {
    if (!swap_on()) {
        printf("pages swapped out by the host not tried: there is no free zram to swap to\n");
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
    CHECK(swapoff("/dev/zram0") == 0, "swapoff: %s", strerror(errno));
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

/* Take memory until some of it is of that word. */
static void test_last_word(uint64_t *random) {
    struct idle_field fields[200];
    uint32_t made = 0, found = 0;
    uint64_t word;
    if (!find_last_word(&word)) {
        printf("the last word of the bitmap not tried: this machine's memory ends with a word\n");
        return;
    }
    while (!found && made < 200 && (uint64_t)sysconf(_SC_AVPHYS_PAGES) > 4 * PAGES) {
        fields[made] = idle_field_make(PAGES);
        found = count_in_word(&fields[made++], word);
    }
    if (found) {
        struct idle_field *field = &fields[made - 1];
        for (uint32_t round = 0; round < 4; round++) {
            idle_field_arm(field);
            for (uint32_t page = 0; page < PAGES; page++) {
                if ((idle_field_entry(field, page) & FRAME) / 64 == word && random_next(random) & 1)
                    idle_field_touch(field, page, false);
            }
            idle_field_check(field, 0, "the last word of the bitmap");
        }
    }
    printf("last word %llu of the bitmap: %u pages of it%s\n", (unsigned long long)word, found,
           found ? "" : ": not tested, other memory of the kernel lies there");
    while (made)
        idle_field_end(&fields[--made]);
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    need_page_idle();
    test_fresh_pages();
    test_exact(&random);
    test_mapped_since(&random);
    test_hot_loop();
    test_huge();
    test_swap(&random);
    test_migration(&random);
    test_last_word(&random);
    return 0;
}
