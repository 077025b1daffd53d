/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A kernel that has a feature half: it offers it and refuses one of its calls, or takes the call and does nothing. The probe
 * must find that out, say which part it is, and a pager must take the next tracker, and say so. Halves are made by a seccomp
 * filter that answers one request in the kernel's place, and by other files where the kernel's are.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach/probe.h"
#include "base/kernel.h"
#include "said.h"
#include "track/page_idle.h"
#include "track/track.h"
#include "victim.h"

#define PAGES 256u
#define LOG_BYTES 65536u

static struct fl_kernel_features whole; /* this kernel, with nothing taken from it */

struct half {
    const char *name;
    unsigned long request;
    int error; /* 0: the call says that all is well, and nothing was done */
    /* Words of what is said to be lacking; NULL: as without the filter. */
    const char *rwp, *wp, *scan;
};

static const struct half halves[] = {
    {"UFFDIO_RWPROTECT refused", UFFDIO_RWPROTECT, EINVAL, "UFFDIO_RWPROTECT fails: Invalid argument", NULL, NULL},
    {"UFFDIO_RWPROTECT without the PTE bit", UFFDIO_RWPROTECT, 0, "UFFDIO_RWPROTECT leaves a page accessed", NULL,
     NULL},
    {"UFFDIO_SET_MODE refused", UFFDIO_SET_MODE, EINVAL, "UFFDIO_SET_MODE to sync mode fails", NULL, NULL},
    {"UFFDIO_SET_MODE does nothing", UFFDIO_SET_MODE, 0, "can be read in sync mode", NULL, NULL},
    {"UFFDIO_WRITEPROTECT refused", UFFDIO_WRITEPROTECT, EINVAL, NULL, "UFFDIO_WRITEPROTECT fails: Invalid argument",
     NULL},
    {"UFFDIO_WRITEPROTECT does nothing", UFFDIO_WRITEPROTECT, 0, NULL, "does not keep writes from a page", NULL},
    {"UFFDIO_REGISTER refused", UFFDIO_REGISTER, EINVAL, "UFFDIO_REGISTER MISSING|MINOR|RWP fails",
     "UFFDIO_REGISTER MISSING|WP fails", NULL},
    {"UFFDIO_API refused with features", UFFDIO_API, EINVAL, "has no RWP", "has no WP on shmem", NULL},
    {"PAGEMAP_SCAN refused", PAGEMAP_SCAN, ENOTTY, "PAGEMAP_SCAN for PAGE_IS_ACCESSED fails", NULL,
     "PAGEMAP_SCAN fails: Inappropriate ioctl"},
    {"PAGEMAP_SCAN says nothing", PAGEMAP_SCAN, 0, "PAGEMAP_SCAN for PAGE_IS_ACCESSED fails", NULL,
     "PAGEMAP_SCAN fails: Protocol error"},
};

static void take_away(unsigned long request, int error) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)request, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs: %s", strerror(errno));
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0, "seccomp: %s", strerror(errno));
}

static void in_child(void (*test)(const void *), const void *argument) {
    int status;
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        test(argument);
        exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %#x", status);
}

/* ---- the probe ---------------------------------------------------------------------------------------------- */

static void check(const char *half, const char *feature, bool there, bool before, const char *lacks,
                  const char *words) {
    CHECK(there == !lacks[0], "%s: %s is %s, and lacks: %s", half, feature, there ? "there" : "not there", lacks);
    if (!before) {
        CHECK(!there, "%s: %s is there all of a sudden", half, feature);
        return;
    }
    CHECK(there == !words, "%s: %s is %s: %s", half, feature, there ? "there" : "not there", lacks);
    if (!words)
        return;
    CHECK(strstr(lacks, words), "%s: %s: %s", half, feature, lacks);
    printf("%s: no %s: %s\n", half, feature, lacks);
}

static void probe_half(const void *argument) {
    const struct half *half = argument;
    struct fl_kernel_features kernel;
    char detail[FL_DETAIL_BYTES];
    take_away(half->request, half->error);
    fl_probe_tracking(&kernel);
    check(half->name, "rwp", kernel.rwp, whole.rwp, kernel.rwp_lacks, half->rwp);
    check(half->name, "wp_shmem", kernel.wp_shmem, whole.wp_shmem, kernel.wp_lacks, half->wp);
    check(half->name, "pagemap_scan", kernel.pagemap_scan, whole.pagemap_scan, kernel.pagemap_scan_lacks, half->scan);
    bool possible = fl_tracker_rwp.probe(&(const struct fl_tracked){0}, &kernel, detail, sizeof(detail));
    CHECK(possible == (kernel.rwp && kernel.events) && (possible || detail[0]), "%s: rwp: %s", half->name, detail);
    CHECK(kernel.rwp || strcmp(detail, kernel.rwp_lacks) == 0, "%s: rwp: %s", half->name, detail);
    possible = fl_tracker_zap.probe(&(const struct fl_tracked){0}, &kernel, detail, sizeof(detail));
    CHECK(possible == (kernel.wp_shmem && kernel.events && kernel.pagemap_scan), "%s: zap: %s", half->name, detail);
    CHECK(!half->wp || strcmp(detail, kernel.wp_lacks) == 0, "%s: zap: %s", half->name, detail);
}

static void probe_halves(void) {
    for (size_t i = 0; i < sizeof(halves) / sizeof(halves[0]); i++) {
        if (halves[i].rwp && !halves[i].wp && !halves[i].scan && !whole.rwp)
            printf("%s: not tried: %s\n", halves[i].name, whole.rwp_lacks);
        else
            in_child(probe_half, &halves[i]);
    }
}

/* ---- other files where the kernel's are ---------------------------------------------------------------------- */

static void must(int result, const char *what) {
    CHECK(result == 0, "%s: %s", what, strerror(errno));
}

static void replace_sys(void) {
    must(unshare(CLONE_NEWNS), "unshare");
    must(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "mount /");
    must(mount("none", "/sys/kernel/mm", "tmpfs", 0, NULL), "mount /sys/kernel/mm");
}

/* A file that takes marks and gives them back stands for the kernel's; then one that opens, and cannot be written. */
static void unwritable_bitmap(const void *nothing) {
    struct fl_kernel_features kernel;
    (void)nothing;
    replace_sys();
    must(mkdir("/sys/kernel/mm/page_idle", 0755), "mkdir");
    int fd = open(FL_PAGE_IDLE_PATH, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0, "%s: %s", FL_PAGE_IDLE_PATH, strerror(errno));
    close(fd);
    fl_probe_tracking(&kernel);
    CHECK(kernel.idle_page_tracking && !kernel.idle_lacks[0], "idle: %s", kernel.idle_lacks);
    must(mount("/dev/full", FL_PAGE_IDLE_PATH, NULL, MS_BIND, NULL), "mount /dev/full");
    fl_probe_tracking(&kernel);
    CHECK(!kernel.idle_page_tracking && strstr(kernel.idle_lacks, "writing to " FL_PAGE_IDLE_PATH " fails: No space"),
          "idle: %s", kernel.idle_lacks);
    printf("a bitmap that cannot be written: %s\n", kernel.idle_lacks);
}

/* DAMON's sysfs is there, and its code for virtual addresses is not: as in a kernel with CONFIG_DAMON_PADDR alone. */
static void damon_without_vaddr(const void *nothing) {
    struct fl_kernel_features kernel;
    (void)nothing;
    replace_sys();
    must(mkdir("/sys/kernel/mm/damon", 0755), "mkdir");
    must(mkdir("/sys/kernel/mm/damon/admin", 0755), "mkdir");
    must(mkdir("/sys/kernel/mm/damon/admin/kdamonds", 0755), "mkdir");
    must(mount("/dev/null", "/proc/kallsyms", NULL, MS_BIND, NULL), "mount /proc/kallsyms");
    fl_probe_tracking(&kernel);
    CHECK(!kernel.damon_vaddr && strstr(kernel.damon_lacks, "CONFIG_DAMON_VADDR"), "damon: %s", kernel.damon_lacks);
    printf("DAMON without virtual addresses: %s\n", kernel.damon_lacks);
}

/* ---- a pager ------------------------------------------------------------------------------------------------- */

struct run {
    const struct half *half;
    struct victim victim;
    char socket_path[64], log_path[64];
    int code; /* that the pager has to end with */
};

/* The VMM is not filtered, and its pager is. */
static void pager_with_half(const void *argument) {
    const struct run *run = argument;
    const char *const more[] = {"--trackers", "auto", NULL};
    int log = open(run->log_path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(log >= 0 && dup2(log, STDERR_FILENO) >= 0, "%s: %s", run->log_path, strerror(errno));
    take_away(run->half->request, run->half->error);
    int code = pager_wait(pager_start(&run->victim, run->socket_path, more), 60);
    CHECK(code == run->code, "the pager ended with %d instead of %d", code, run->code);
}

static void read_log(const struct run *run, char *text) {
    int fd = open(run->log_path, O_RDONLY | O_CLOEXEC);
    ssize_t bytes = fd < 0 ? -1 : read(fd, text, LOG_BYTES - 1);
    CHECK(bytes >= 0, "%s: %s", run->log_path, strerror(errno));
    text[bytes] = 0;
    close(fd);
    (void)unlink(run->log_path);
}

static struct run begin_run(const struct half *half, int code) {
    struct run run = {.half = half, .victim = victim_start(PAGES, 1, 1), .code = code};
    snprintf(run.socket_path, sizeof(run.socket_path), "/tmp/fl-half-%d.sock", (int)getpid());
    snprintf(run.log_path, sizeof(run.log_path), "/tmp/fl-half-%d.log", (int)getpid());
    return run;
}

static bool scanned(const struct fl_status *status) {
    return status->scans >= 3;
}

static bool some_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 4;
}

/* It serves all the same: by the next tracker, and with the freeze that goes with it. */
static void served_by_next(const struct half *half) {
    static char log[LOG_BYTES];
    struct run run = begin_run(half, FL_EXIT_OK);
    int status;
    fflush(NULL);
    pid_t starter = fork();
    if (starter == 0) {
        pager_with_half(&run);
        exit(0);
    }
    struct fl_pager *pager = pager_connect(run.socket_path, 30);
    wait_until(&run.victim, scanned, 30, "three scans");
    struct fl_status seen = status_of(&run.victim);
    CHECK(seen.tracker == FL_TRACKER_ZAP && seen.freeze == FL_FREEZE_WP, "%s: tracker %s, freeze %s", half->name,
          fl_tracker_name(seen.tracker), fl_freeze_name(seen.freeze));
    run.victim.shared->hot_pages = PAGES / 8;
    CHECK(pager_budget(pager, PAGES * FL_PAGE_SIZE, 600).error == 0, "budget");
    wait_until(&run.victim, some_away, 60, "pages away");
    CHECK(victim_verify(&run.victim, 60) == 0, "a page read wrong");
    pager_tell(pager, (struct fl_command){.kind = FL_COMMAND_DETACH});
    fl_pager_close(pager);
    CHECK(waitpid(starter, &status, 0) == starter && status == 0, "the pager's parent: status %#x", status);
    victim_end(&run.victim);
    read_log(&run, log);
    printf("%s, a pager that may choose:\n", half->name);
    check_said(log, "tracker_passed_over", "rwp: ", half->rwp);
    check_said(log, "tracker_chosen", "\"tracker\":\"zap\"", "\"freeze\":\"wp\"");
}

/* Without either way to hold a page still nothing can be evicted: so it does not attach. */
static void refused(const struct half *half, const char *words) {
    static char log[LOG_BYTES];
    struct run run = begin_run(half, FL_EXIT_REFUSED + FL_REFUSAL_KERNEL);
    struct fl_view *view;
    in_child(pager_with_half, &run);
    CHECK(fl_view_open((int)run.victim.pid, &view) == -ENOENT, "something was left in the VMM");
    victim_end(&run.victim);
    read_log(&run, log);
    printf("%s, a pager that may choose:\n", half->name);
    check_said(log, "refused_because", words, "CONFIG_USERFAULTFD");
}

static const struct half *half_of(unsigned long request, int error) {
    size_t i = 0;
    while (halves[i].request != request || halves[i].error != error)
        i++;
    return &halves[i];
}

int main(void) {
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    fl_probe_tracking(&whole);
    probe_halves();
    in_child(unwritable_bitmap, NULL);
    in_child(damon_without_vaddr, NULL);
    if (whole.rwp) {
        served_by_next(half_of(UFFDIO_RWPROTECT, EINVAL));
        served_by_next(half_of(UFFDIO_RWPROTECT, 0));
        served_by_next(half_of(UFFDIO_SET_MODE, EINVAL));
    } else {
        printf("a pager without half of RWP: not tried: %s\n", whole.rwp_lacks);
        refused(half_of(UFFDIO_WRITEPROTECT, EINVAL), "UFFDIO_WRITEPROTECT fails");
        refused(half_of(UFFDIO_WRITEPROTECT, 0), "does not keep writes");
    }
    return 0;
}
