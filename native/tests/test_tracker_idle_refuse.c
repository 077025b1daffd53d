/* SPDX-License-Identifier: Apache-2.0 */
/* The idle tracker where it cannot work: no bitmap, frame numbers hidden, the process gone. It says so, with the right errno. */
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "idle_field.h"
#include "victim.h"

static void drop_admin(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    CHECK(syscall(SYS_capget, &header, data) == 0, "capget: %s", strerror(errno));
    data[0].effective &= ~(1u << CAP_SYS_ADMIN);
    CHECK(syscall(SYS_capset, &header, data) == 0, "capset: %s", strerror(errno));
}

static bool is_possible(char *detail) {
    struct fl_kernel_features features;
    CHECK(fl_probe_kernel(&features) == 0, "fl_probe_kernel");
    return fl_tracker_idle.probe(&(const struct fl_tracked){0}, &features, detail, FL_DETAIL_BYTES);
}

/* Page frame numbers are there to be read, and all are 0. */
static void without_admin(void) {
    struct idle_field field = idle_field_make(100);
    char detail[FL_DETAIL_BYTES];
    struct fl_tracker *refused;
    uint64_t stop_ns;
    idle_field_arm(&field);
    drop_admin();
    int hidden = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    CHECK(dup2(hidden, field.vm.pagemap_fd) >= 0, "dup2: %s", strerror(errno));
    int error = fl_tracker_idle.arm(field.tracker, &stop_ns);
    CHECK(error == -EPERM, "arm: %d", error);
    error = fl_tracker_idle.create(&field.vm, NULL, &refused);
    CHECK(error == -EPERM, "create: %d", error);
    CHECK(!is_possible(detail) && strstr(detail, "CAP_SYS_ADMIN"), "%s", detail);
}

static void without_bitmap(void) {
    struct fl_vm vm = {.pid = getpid(), .uffd = -1};
    char detail[FL_DETAIL_BYTES];
    struct fl_tracker *refused;
    CHECK(unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
              mount("none", "/sys/kernel/mm", "tmpfs", 0, NULL) == 0,
          "mount: %s", strerror(errno));
    int error = fl_tracker_idle.create(&vm, NULL, &refused);
    CHECK(error == -ENODEV, "create: %d", error);
    CHECK(!is_possible(detail) && strstr(detail, "CONFIG_IDLE_PAGE_TRACKING"), "%s", detail);
}

static void in_child(void (*test)(void)) {
    int status;
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        test();
        exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %#x", status);
}

static void test_ended_process(void) {
    uint64_t stop_ns, accessed;
    struct idle_field mine = idle_field_make(100);
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0)
        pause();
    struct idle_field field = idle_field_of(pid, (uintptr_t)mine.memory, 100);
    idle_field_arm(&field);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid, "waitpid");
    int error = fl_tracker_idle.arm(field.tracker, &stop_ns);
    CHECK(error == -ESRCH, "arm: %d", error);
    error = fl_tracker_idle.collect(field.tracker);
    CHECK(error == -ESRCH, "collect: %d", error);
    error = fl_tracker_idle.harvest(field.tracker, 0, 0, 10, &accessed);
    CHECK(error == -ESRCH, "harvest: %d", error);
    idle_field_end(&field);
    idle_field_end(&mine);
}

int main(void) {
    need_page_idle();
    in_child(without_admin);
    in_child(without_bitmap);
    test_ended_process();
    return 0;
}
