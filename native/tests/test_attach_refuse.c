/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every refusal, brought about for real. Whoever is refused is left exactly as it was. (A passed-through VFIO device
 * needs hardware: a file of its name has to do, and memory pinned by io_uring, which gives the same refusal.)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach/hugepages.h"
#include "attach/tracee.h"
#include "attach_target.h"

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 0x0004U
#endif

static unsigned tried;
static unsigned skipped;

/* Attaching is refused with `refusal`, a sentence that has `word` in it, and no trace in the target. */
static void refused(int pid, uint32_t refusal, const char *word) {
    struct fl_attachment made;
    struct fl_refused why = {0};
    int vault = target_vault();
    int error = fl_attach(pid, vault, TARGET_GATE_OFFSET, &made, &why);
    for (int i = 0; i < 20 && refusal != FL_REFUSAL_STUCK && why.refusal == FL_REFUSAL_STUCK; i++) {
        error = fl_attach(pid, vault, TARGET_GATE_OFFSET, &made, &why);
    }
    MUST(error == -EPERM && why.refusal == refusal && strstr(why.detail, word), "wanted %s (%s), got %d %s: %s",
         fl_refusal_name(refusal), word, error, fl_refusal_name(why.refusal), why.detail);
    printf("%-18s %s\n", fl_refusal_name(refusal), why.detail);
    close(vault);
    tried++;
}

static void refused_unchanged(struct target *target, uint32_t refusal, const char *word) {
    char *before = target_picture(target);
    refused(target->pid, refusal, word);
    char *after = target_picture(target);
    MUST(strcmp(before, after) == 0, "before:\n%s\nafter:\n%s", before, after);
    free(before);
    free(after);
}

static void refused_alive(enum target_mode mode, target_setup setup, void *context, uint32_t refusal,
                          const char *word) {
    struct target target = target_start(mode, NULL, setup, context);
    refused_unchanged(&target, refusal, word);
    target_lives(&target, 3);
    target_end(&target);
}

/* ---- what the target may have done to itself --------------------------------------------------------------- */

static void *guest_memory(int flags, int map_flags, size_t bytes) {
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC | (unsigned)flags);
    if (fd < 0 || ftruncate(fd, (off_t)bytes)) {
        _exit(4);
    }
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, map_flags, fd, 0);
}

static void lock_memory(void *context) {
    (void)context;
    void *memory = guest_memory(0, MAP_SHARED, 1 << 20);
    /* By number: the sanitizers make mlock() do nothing. */
    if (memory == MAP_FAILED || syscall(SYS_mlock, memory, 1 << 20)) {
        _exit(5);
    }
}

static void hugetlb_memory(void *context) {
    (void)context;
    if (guest_memory(MFD_HUGETLB, MAP_SHARED | MAP_NORESERVE, 2 << 20) == MAP_FAILED) {
        _exit(5);
    }
}

static void map_twice(void *context) {
    (void)context;
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (ftruncate(fd, 1 << 20) || mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED ||
        mmap(NULL, 1 << 16, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED) {
        _exit(5);
    }
}

static void many_regions(void *context) {
    (void)context;
    char *area = mmap(NULL, (FL_MAX_REGIONS + 1) * 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (ftruncate(fd, (FL_MAX_REGIONS + 1) * 8192)) {
        _exit(4);
    }
    for (int i = 0; i <= FL_MAX_REGIONS; i++) {
        if (mmap(area + i * 8192, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, i * 8192) == MAP_FAILED) {
            _exit(5);
        }
    }
}

static void foreign_uffd(void *context) {
    (void)context;
    void *memory = guest_memory(0, MAP_SHARED, 1 << 20);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register area = {.range = {.start = (uint64_t)memory, .len = 1 << 20},
                                   .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &area)) {
        _exit(5);
    }
}

static void pin_memory(void *context) {
    static char buffer[8192];
    struct io_uring_params parameters = {0};
    struct iovec area = {.iov_base = buffer, .iov_len = sizeof(buffer)};
    int ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);
    *(_Atomic(int) *)context = 1;
    if (ring < 0 || syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &area, 1)) {
        *(_Atomic(int) *)context = 2;
    }
}

/* Opens what looks like a group of devices handed to the guest, in a /dev that only this process sees. */
static void open_vfio(void *context) {
    (void)context;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("none", "/dev", "tmpfs", 0, "size=64k") || mkdir("/dev/vfio", 0700) ||
        open("/dev/vfio/42", O_RDWR | O_CREAT | O_CLOEXEC, 0600) < 0) {
        _exit(5);
    }
}

/* ---- the cases --------------------------------------------------------------------------------------------- */

static void gone(void) {
    pid_t pid = fork();
    if (pid == 0) {
        _exit(0);
    }
    siginfo_t info;
    waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT);
    refused(pid, FL_REFUSAL_GONE, "has ended"); /* a zombie */
    waitpid(pid, NULL, 0);
    refused(pid, FL_REFUSAL_GONE, "has ended");
}

static void not_shared_memfd(void) {
    struct target target = target_start(TARGET_SPIN, "something-else", NULL, NULL);
    refused_unchanged(&target, FL_REFUSAL_NOT_SHARED_MEMFD, "memory-backend-memfd,share=on");
    target_end(&target);
    int ready[2];
    MUST(pipe(ready) == 0, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        char byte = guest_memory(0, MAP_PRIVATE, 1 << 20) != MAP_FAILED;
        if (write(ready[1], &byte, 1) != 1) {
            _exit(1);
        }
        for (;;) {
            pause();
        }
    }
    char byte = 0;
    MUST(read(ready[0], &byte, 1) == 1 && byte, "private memory");
    refused(pid, FL_REFUSAL_NOT_SHARED_MEMFD, "privately");
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(ready[0]);
    close(ready[1]);
}

static void other_mapper(void) {
    struct target target = target_start(TARGET_PPOLL, NULL, NULL, NULL);
    struct fl_inspection *seen = calloc(1, sizeof(*seen));
    MUST(fl_inspect(target.pid, seen) == 0 && seen->refusal == 0 && seen->region_count == 1, "%s", seen->detail);
    int fd = -1;
    MUST(fl_vmm_open_memfd(target.pid, seen->regions[0].inode, O_RDWR, &fd) == 0, "open the memfd");
    int ready[2];
    MUST(pipe(ready) == 0, "pipe");
    pid_t other = fork();
    if (other == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        /* Not a child of ours any more: a pager's own children are its attaching helpers. */
        if (fork()) {
            _exit(0);
        }
        void *memory = mmap(NULL, seen->regions[0].length, PROT_READ, MAP_SHARED, fd, 0);
        pid_t self = memory == MAP_FAILED ? 0 : getpid();
        if (write(ready[1], &self, sizeof(self)) != sizeof(self)) {
            _exit(1);
        }
        alarm(60);
        for (;;) {
            pause();
        }
    }
    waitpid(other, NULL, 0);
    MUST(read(ready[0], &other, sizeof(other)) == sizeof(other) && other > 0, "the other mapper");
    refused_unchanged(&target, FL_REFUSAL_OTHER_MAPPER, "also mapped by pid");
    kill(other, SIGKILL);
    close(fd);
    close(ready[0]);
    close(ready[1]);
    free(seen);
    target_lives(&target, 3);
    target_end(&target);
}

static void traced(void) {
    struct target target = target_start(TARGET_SPIN, NULL, NULL, NULL);
    int ready[2];
    MUST(pipe(ready) == 0, "pipe");
    pid_t tracer = fork();
    if (tracer == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fork()) {
            _exit(0);
        }
        pid_t self = ptrace(PTRACE_SEIZE, target.pid, 0, 0) ? 0 : getpid();
        if (write(ready[1], &self, sizeof(self)) != sizeof(self)) {
            _exit(1);
        }
        alarm(60);
        pause();
        _exit(0);
    }
    waitpid(tracer, NULL, 0);
    MUST(read(ready[0], &tracer, sizeof(tracer)) == sizeof(tracer) && tracer > 0, "the other tracer");
    refused_unchanged(&target, FL_REFUSAL_TRACED, "being traced by");
    /* Whoever lets go before he is looked for leaves no reason to blame permissions. */
    MUST(fl_tracee_seize(target.pid) == -EBUSY, "seized, or not allowed");
    kill(tracer, SIGKILL);
    close(ready[0]);
    close(ready[1]);
    target_lives(&target, 3);
    target_end(&target);
}

static void already_served(void) {
    struct target target = target_start(TARGET_FUTEX, NULL, NULL, NULL);
    struct fl_attachment made;
    struct fl_refused why;
    int vault = target_vault();
    int error = -1;
    for (int i = 0; i < 20 && error; i++) {
        error = fl_attach(target.pid, vault, TARGET_GATE_OFFSET, &made, &why);
    }
    MUST(error == 0, "%s", why.detail);
    int ready[2];
    MUST(pipe(ready) == 0, "pipe");
    pid_t pager = fork();
    if (pager == 0) {
        int fd = -1;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        char byte = fl_vmm_open_vault(target.pid, O_RDWR, &fd) == 0 && flock(fd, LOCK_EX | LOCK_NB) == 0;
        if (write(ready[1], &byte, 1) != 1) {
            _exit(1);
        }
        pause();
    }
    char byte = 0;
    MUST(read(ready[0], &byte, 1) == 1 && byte, "the other pager");
    char word[32];
    snprintf(word, sizeof(word), "pid %d", pager);
    refused_unchanged(&target, FL_REFUSAL_ALREADY_SERVED, word);
    struct fl_inspection *seen = calloc(1, sizeof(*seen));
    MUST(fl_inspect(target.pid, seen) == 0 && seen->refusal == FL_REFUSAL_ALREADY_SERVED &&
             seen->served_by_pid == (uint32_t)pager && seen->has_vault,
         "%s", seen->detail);
    MUST(fl_inspect_target(target.pid, pager, 0, seen) == 0 && seen->refusal == FL_REFUSAL_NONE, "%s", seen->detail);
    kill(pager, SIGKILL);
    waitpid(pager, NULL, 0);
    MUST(fl_inspect(target.pid, seen) == 0 && seen->refusal == FL_REFUSAL_NONE && seen->has_vault &&
             seen->served_by_pid == 0,
         "after its death: %s", seen->detail);
    free(seen);
    close(ready[0]);
    close(ready[1]);
    close(vault);
    target_lives(&target, 3);
    target_end(&target);
}

static void permission(void) {
    struct target target = target_start(TARGET_SPIN, NULL, NULL, NULL);
    pid_t nobody = fork();
    if (nobody == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        MUST(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0, "become nobody");
        refused(target.pid, FL_REFUSAL_PERMISSION, "run as root");
        exit(0);
    }
    int status = 0;
    waitpid(nobody, &status, 0);
    MUST(WIFEXITED(status) && WEXITSTATUS(status) == 0, "as nobody");
    tried++;
    target_lives(&target, 3);
    target_end(&target);
}

static void stopped_by_signal(void) {
    struct target target = target_start(TARGET_READ, NULL, NULL, NULL);
    target_stop(&target);
    refused(target.pid, FL_REFUSAL_STUCK, "paused by a signal");
    target_pause_us(50000);
    uint64_t rounds = atomic_load(&target.shared->rounds);
    target_pause_us(100000);
    MUST(rounds == atomic_load(&target.shared->rounds), "it goes on although nobody resumed it");
    kill(target.pid, SIGCONT);
    target_lives(&target, 3);
    target_end(&target);
}

static void does_not_stop(void) {
    int ready[2];
    MUST(pipe(ready) == 0, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        guest_memory(0, MAP_SHARED, 1 << 20);
        /* A thread that waits as in vfork() for its child cannot be stopped. The child says when there is one. */
        if (syscall(SYS_clone, CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, NULL) == 0) {
            struct timespec nap = {.tv_sec = 30};
            syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
            syscall(SYS_write, ready[1], "", 1);
            syscall(SYS_nanosleep, &nap, NULL);
            _exit(0);
        }
        for (;;) {
            pause();
        }
    }
    char byte;
    MUST(read(ready[0], &byte, 1) == 1, "the child of the one that waits");
    /* Its child shares its memory, which is what it would be refused for; so go by the part that stops it. */
    struct fl_attachment attachment = {.vmm_uffd = -1, .vmm_vault = -1};
    struct fl_refused why;
    MUST(fl_proc_start_time(pid, &attachment.start_time_ticks) == 0, "start time");
    int error = fl_attach_undo(pid, &attachment, -1, &why);
    MUST(error == -EPERM && why.refusal == FL_REFUSAL_STUCK && strstr(why.detail, "did not stop"), "%d %u %s", error,
         why.refusal, why.detail);
    printf("%-18s %s\n", fl_refusal_name(why.refusal), why.detail);
    tried++;
    kill(pid, SIGKILL); /* and its child with it */
    waitpid(pid, NULL, 0);
    close(ready[0]);
    close(ready[1]);
}

/* The smallest 32-bit program: pause() for ever. */
static void other_architecture(void) {
    static const unsigned char program[] = {
        0x7f, 'E', 'L', 'F', 1,    1,    1,    0,    0,    0,    0,    0,    0,    0,    0,    0, /* 32-bit */
        2,    0,   3,   0,   1,    0,    0,    0,    0x54, 0x80, 0x04, 0x08, 0x34, 0,    0,    0, /* executable, i386, entry, headers */
        0,    0,   0,   0,   0,    0,    0,    0,    0x34, 0,    0x20, 0,    1,    0,    0,    0,    0,
        0,    0,   0, /* one program header */
        1,    0,   0,   0,   0,    0,    0,    0,    0,    0x80, 0x04, 0x08, 0,    0x80, 0x04, 0x08, /* load all */
        0x60, 0,   0,   0,   0x60, 0,    0,    0,    5,    0,    0,    0,    0,    0x10, 0,    0,    /* r-x */
        0xb8, 29,  0,   0,   0,    0xcd, 0x80, 0xeb, 0xf7, 0,    0,    0, /* pause in a loop */
    };
    int fd = memfd_create("program", MFD_CLOEXEC);
    int running[2]; /* its end is closed when the program runs; before that it says that it does not */
    MUST(write(fd, program, sizeof(program)) == sizeof(program) && pipe2(running, O_CLOEXEC) == 0, "program");
    pid_t pid = fork();
    if (pid == 0) {
        char *const arguments[] = {"program", NULL};
        char *const environment[] = {NULL};
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        syscall(SYS_execveat, fd, "", arguments, environment, AT_EMPTY_PATH);
        _exit(write(running[1], "", 1) == 1 ? 7 : 8);
    }
    char byte;
    close(fd);
    close(running[1]);
    ssize_t failed = read(running[0], &byte, 1);
    close(running[0]);
    if (failed) {
        waitpid(pid, NULL, 0);
        printf("%-18s skipped: this kernel runs no 32-bit programs\n", "kernel");
        skipped++;
        return;
    }
    refused(pid, FL_REFUSAL_KERNEL, "x86_64");
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static void pinned(void) {
    _Atomic(int) *state = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct target target = target_start(TARGET_SPIN, NULL, pin_memory, (void *)state);
    if (*state == 2) {
        printf("%-18s skipped: no io_uring to pin memory with\n", "passthrough");
        skipped++;
    } else {
        refused_unchanged(&target, FL_REFUSAL_PASSTHROUGH, "pinned");
        target_lives(&target, 3);
    }
    target_end(&target);
    munmap((void *)state, 4096);
}

/* A host that may give shared memory huge pages, played by a file over its setting, in a mount namespace of our own. */
static void huge_pages_of_the_host(void) {
    static const char setting[] = FL_HUGEPAGES_FOLDER "/shmem_enabled",
                      words[] = "always within_size [advise] never deny";
    char file[] = "/tmp/fl-shmem-enabled-XXXXXX";
    if (access(setting, R_OK)) {
        printf("%-18s skipped: no %s\n", "hugetlb", setting);
        skipped++;
        return;
    }
    int fd = mkstemp(file);
    MUST(fd >= 0 && write(fd, words, sizeof(words) - 1) == sizeof(words) - 1, "%s: %s", file, strerror(errno));
    close(fd);
    MUST(unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
             mount(file, setting, NULL, MS_BIND, NULL) == 0,
         "a mount over %s: %s", setting, strerror(errno));
    refused_alive(TARGET_SPIN, NULL, NULL, FL_REFUSAL_HUGETLB, "shmem_enabled is advise");
    MUST(umount2(setting, MNT_DETACH) == 0 && unlink(file) == 0, "%s: %s", setting, strerror(errno));
}

int main(void) {
    target_need_root();
    gone();
    not_shared_memfd();
    refused_alive(TARGET_SPIN, map_twice, NULL, FL_REFUSAL_OTHER_MAPPER, "second time");
    refused_alive(TARGET_SPIN, lock_memory, NULL, FL_REFUSAL_LOCKED, "locked");
    refused_alive(TARGET_SPIN, hugetlb_memory, NULL, FL_REFUSAL_HUGETLB, "hugetlb");
    refused_alive(TARGET_SPIN, many_regions, NULL, FL_REFUSAL_LIMIT, "64 regions");
    refused_alive(TARGET_SLEEP, foreign_uffd, NULL, FL_REFUSAL_FOREIGN_UFFD, "another userfaultfd");
    refused_alive(TARGET_SPIN, open_vfio, NULL, FL_REFUSAL_PASSTHROUGH, "/dev/vfio/42");
    pinned();
    other_mapper();
    traced();
    already_served();
    permission();
    stopped_by_signal();
    does_not_stop();
    other_architecture();
    huge_pages_of_the_host();
    printf("%u refusals, %u skipped\n", tried, skipped);
    return 0;
}
