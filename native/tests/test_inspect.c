/* SPDX-License-Identifier: Apache-2.0 */
/* What is seen of a process without touching it, and what the kernel is found to be able to do. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach_target.h"

#define FIRST_BYTES (1u << 20)
#define SECOND_BYTES (1u << 16)

struct layout {
    uint64_t first;
    uint64_t second;
    uint64_t first_inode;
    uint64_t second_inode;
};

/* Two memfds; the first is cut into pieces by different protections of its neighbours and advice, the second has an offset. */
static void two_regions(void *context) {
    struct layout *layout = context;
    struct stat info;
    int first = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    int second = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (ftruncate(first, FIRST_BYTES) || ftruncate(second, 2 * SECOND_BYTES)) {
        _exit(4);
    }
    char *a = mmap(NULL, FIRST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, first, 0);
    void *b = mmap(NULL, SECOND_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, second, SECOND_BYTES);
    /* QEMU gives advice like this: it splits the mapping into several lines of /proc/PID/maps. */
    if (a == MAP_FAILED || b == MAP_FAILED || madvise(a + FIRST_BYTES / 4, FIRST_BYTES / 4, MADV_DONTFORK) ||
        madvise(a + FIRST_BYTES / 2, 4096, MADV_DONTDUMP)) {
        _exit(5);
    }
    layout->first = (uint64_t)a;
    layout->second = (uint64_t)b;
    fstat(first, &info);
    layout->first_inode = info.st_ino;
    fstat(second, &info);
    layout->second_inode = info.st_ino;
    close(second); /* a mapping needs no descriptor */
}

static const struct fl_region *region_at(const struct fl_inspection *seen, uint64_t address) {
    for (uint32_t i = 0; i < seen->region_count; i++) {
        if (seen->regions[i].vmm_addr == address) {
            return &seen->regions[i];
        }
    }
    return NULL;
}

static void regions(void) {
    struct layout *layout = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct target target = target_start(TARGET_SLEEP, NULL, two_regions, layout);
    struct fl_inspection *seen = calloc(1, sizeof(*seen));
    MUST(fl_inspect(target.pid, seen) == 0 && seen->refusal == FL_REFUSAL_NONE, "%s", seen->detail);
    MUST(seen->region_count == 3 && seen->memory_bytes == target.bytes + FIRST_BYTES + SECOND_BYTES, "%u regions",
         seen->region_count);
    for (uint32_t i = 1; i < seen->region_count; i++) {
        MUST(seen->regions[i - 1].vmm_addr < seen->regions[i].vmm_addr, "not sorted");
    }
    const struct fl_region *first = region_at(seen, layout->first);
    const struct fl_region *second = region_at(seen, layout->second);
    MUST(first && first->length == FIRST_BYTES && first->file_offset == 0 && first->inode == layout->first_inode,
         "first");
    MUST(second && second->length == SECOND_BYTES && second->file_offset == SECOND_BYTES &&
             second->inode == layout->second_inode,
         "second");
    MUST(region_at(seen, target.memory), "its own memory");
    uint64_t started = 0;
    MUST(fl_proc_start_time(target.pid, &started) == 0 && started == seen->start_time_ticks && started > 0,
         "start time");
    MUST(seen->uid == 0 && seen->has_vault == 0 && seen->served_by_pid == 0, "what is not there");
    int fd = -1;
    struct stat info;
    MUST(fl_vmm_open_memfd(target.pid, layout->first_inode, O_RDWR, &fd) == 0 && fstat(fd, &info) == 0 &&
             info.st_ino == layout->first_inode,
         "open by descriptor");
    close(fd);
    MUST(fl_vmm_open_memfd(target.pid, layout->second_inode, O_RDWR, &fd) == 0 && fstat(fd, &info) == 0 &&
             info.st_ino == layout->second_inode,
         "open by mapping");
    close(fd);
    MUST(fl_vmm_open_memfd(target.pid, 1, O_RDWR, &fd) == -ENOENT, "another inode");
    int number = -1;
    int holder = -1;
    MUST(fl_vmm_find_fd(target.pid, FL_VAULT_LINK, &number) == -ENOENT, "no vault");
    MUST(fl_vmm_open_vault(target.pid, O_RDWR, &fd) == -ENOENT, "no vault");
    MUST(fl_vault_holder(target.pid, &holder) == -ENOENT, "no vault");
    target_end(&target);
    MUST(fl_proc_start_time(target.pid, &started) == -ESRCH, "it has ended");
    MUST(fl_vmm_find_fd(target.pid, FL_VAULT_LINK, &number) == -ESRCH, "it has ended");
    MUST(fl_inspect(target.pid, seen) == 0 && seen->refusal == FL_REFUSAL_GONE, "%s", seen->detail);
    MUST(fl_inspect(0, seen) == -EINVAL && fl_inspect(-1, seen) == -EINVAL, "no pid");
    free(seen);
    munmap(layout, 4096);
}

/* Processes that end while they are looked at: always an answer, and one that fits. */
static void ending(void) {
    struct fl_inspection *seen = calloc(1, sizeof(*seen));
    unsigned gone = 0;
    uint64_t random = 7;
    fflush(NULL);
    for (unsigned i = 0; i < target_rounds(150, 20); i++) {
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;) {
                pause();
            }
        }
        pid_t killer = fork();
        if (killer == 0) {
            target_pause_us((unsigned)(target_random(&random) % 1000));
            kill(pid, SIGKILL);
            _exit(0);
        }
        target_random(&random);
        MUST(fl_inspect(pid, seen) == 0, "no answer");
        MUST(seen->refusal == FL_REFUSAL_GONE || seen->refusal == FL_REFUSAL_NOT_SHARED_MEMFD, "%s", seen->detail);
        gone += seen->refusal == FL_REFUSAL_GONE;
        waitpid(killer, NULL, 0);
        waitpid(pid, NULL, 0);
    }
    printf("ended while looked at: %u\n", gone);
    free(seen);
}

static void probe(void) {
    struct fl_kernel_features found;
    memset(&found, 0xff, sizeof(found));
    MUST(fl_probe_kernel(&found) == 0, "probe");
    printf("raw features %llx; pagemap_scan %u, idle %u, damon_vaddr %u, seccomp filters readable %u\n",
           (unsigned long long)found.raw_features, found.pagemap_scan, found.idle_page_tracking, found.damon_vaddr,
           found.ptrace_seccomp_filter);
    MUST(found.userfaultfd_device <= 1 && found.userfaultfd_syscall <= 1 && found.damon_vaddr <= 1, "not yes or no");
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    MUST((fd >= 0) == found.userfaultfd_syscall, "userfaultfd()");
    close(fd);
    MUST((access("/dev/userfaultfd", R_OK | W_OK) == 0) == found.userfaultfd_device, "/dev/userfaultfd");
    MUST(found.missing_shmem && found.raw_features, "root, and no userfaultfd for shared memory?");
    int status = 0;
    MUST(waitpid(-1, &status, WNOHANG | __WALL) == -1 && errno == ECHILD, "the probe left a process");
}

int main(void) {
    target_need_root();
    probe();
    regions();
    ending();
    return 0;
}
