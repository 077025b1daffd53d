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
#include "swap/uffd.h"
#include "track/track.h"
#include "victim.h"

#define PAGES 4096u
#define WORDS (PAGES / 64)

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
    struct fl_vault_region *region = &vm->vault.header->regions[0];
    *region = (struct fl_vault_region){.vmm_addr = (uint64_t)(uintptr_t)memory, .length = PAGES * FL_PAGE_SIZE};
    atomic_store(&vm->vault.header->region_count, 1);
    vm->freeze = FL_FREEZE_RWP;
    struct uffdio_register request = {.range = {.start = (uint64_t)(uintptr_t)memory, .len = PAGES * FL_PAGE_SIZE},
                                      .mode = UFFDIO_REGISTER_MODE_RWP};
    CHECK(ioctl(vm->uffd, UFFDIO_REGISTER, &request) == 0, "register: %s", strerror(errno));
}

static void touch(volatile uint8_t *memory, uint64_t *touched, uint64_t *random) {
    uint64_t count = random_next(random) % 3 ? random_next(random) % PAGES : 0;
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

int main(int argc, char **argv) {
    struct fl_kernel_features kernel;
    if (fl_probe_kernel(&kernel) || !kernel.rwp) {
        printf("skipped: this kernel's userfaultfd has no RWP (CONFIG_USERFAULTFD_RWP, Linux 7.3)\n");
        return 77;
    }
    uint64_t random = seed_of(argc, argv), touched[WORDS], seen[WORDS], stop_ns, hot = 0;
    static struct fl_vm vm;
    struct fl_tracker *tracker;
    uint8_t *memory = mmap(NULL, PAGES * FL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED && madvise(memory, PAGES * FL_PAGE_SIZE, MADV_NOHUGEPAGE) == 0, "mmap");
    memset(memory, 1, PAGES * FL_PAGE_SIZE);
    make_vm(&vm, memory);
    CHECK(fl_tracker_rwp.create(&vm, NULL, &tracker) == 0, "tracker");
    for (unsigned round = 0; round < 100; round++) {
        CHECK(fl_tracker_rwp.arm(tracker, &stop_ns) == 0, "arm");
        touch(memory, touched, &random);
        if (round % 10 == 9)
            (void)madvise(memory, PAGES * FL_PAGE_SIZE,
                          MADV_PAGEOUT); /* swapped out, where there is swap: marks stay */
        CHECK(fl_tracker_rwp.harvest(tracker, 0, 0, PAGES, seen) == 0, "harvest");
        for (unsigned word = 0; word < WORDS; word++) {
            CHECK(seen[word] == touched[word], "round %u, pages %u on: touched %llx, seen %llx", round, word * 64,
                  (unsigned long long)touched[word], (unsigned long long)seen[word]);
            hot += (uint64_t)__builtin_popcountll(seen[word]);
        }
    }
    fl_tracker_rwp.destroy(tracker);
    printf("anonymous memory: 100 rounds, %llu touched pages seen, none missed, none imagined\n",
           (unsigned long long)hot);
    return 0;
}
