/* SPDX-License-Identifier: Apache-2.0 */
#include "setup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, DEVICE_LIMIT_MS = 10000, DISK_LIMIT = 8, CPU_LIMIT = 64 };

static char troubles[SETUP_TROUBLES_BYTES];

__attribute__((format(printf, 1, 2))) static void trouble(const char *format, ...) {
    size_t length = strlen(troubles);
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(troubles + length, sizeof(troubles) - length, format, arguments);
    va_end(arguments);
    length = strlen(troubles);
    snprintf(troubles + length, sizeof(troubles) - length, "\n");
}

const char *setup_troubles(void) {
    return troubles;
}

void setup_power_off(void) {
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

void setup_fatal(const char *format, ...) {
    va_list arguments;

    va_start(arguments, format);
    fprintf(stderr, "init: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    setup_power_off();
}

int setup_open_when_there(const char *path, int flags) {
    int descriptor = -1;

    for (int waited_ms = 0; waited_ms < DEVICE_LIMIT_MS; waited_ms += 10) {
        descriptor = open(path, flags);
        if (descriptor >= 0 || (errno != ENOENT && errno != ENXIO))
            break;
        usleep(10000);
    }
    return descriptor;
}

/* mkdir -p of what comes before the last slash, or of all. */
static void make_folders(const char *path, bool last_too) {
    char part[PATH_BYTES];

    for (const char *slash = path + 1; *slash != '\0'; slash++)
        if (*slash == '/') {
            snprintf(part, sizeof(part), "%.*s", (int)(slash - path), path);
            mkdir(part, 0755);
        }
    if (last_too)
        mkdir(path, 0755);
}

static const struct {
    const char *type, *where, *options;
    bool needed;
} file_systems[] = {
    {"proc", "/proc", NULL, true},
    {"sysfs", "/sys", NULL, true},
    {"devtmpfs", "/dev", NULL, true},
    {"devpts", "/dev/pts", "ptmxmode=0666", false},
    {"tmpfs", "/dev/shm", NULL, true},
    {"tmpfs", "/tmp", "mode=1777", true},
    {"tmpfs", "/run", "mode=0755", true},
    {"debugfs", "/sys/kernel/debug", NULL, false},
    {"tracefs", "/sys/kernel/tracing", NULL, false},
    {"cgroup2", "/sys/fs/cgroup", NULL, true},
    {"hugetlbfs", "/dev/hugepages", "pagesize=2M", false},
};

static void mount_all(void) {
    for (size_t i = 0; i < sizeof(file_systems) / sizeof(file_systems[0]); i++) {
        make_folders(file_systems[i].where, true);
        if (mount(file_systems[i].type, file_systems[i].where, file_systems[i].type, 0, file_systems[i].options) == 0 ||
            errno == EBUSY)
            continue;
        if (file_systems[i].needed)
            setup_fatal("cannot mount %s on %s: %s", file_systems[i].type, file_systems[i].where, strerror(errno));
        trouble("%s is not mounted on %s: %s", file_systems[i].type, file_systems[i].where, strerror(errno));
    }
}

static void load_module(const char *name) {
    char path[PATH_BYTES];

    snprintf(path, sizeof(path), "/modules/%s", name);
    int module = open(path, O_RDONLY | O_CLOEXEC);
    if (module < 0 || (syscall(SYS_finit_module, module, "", 0) != 0 && errno != EEXIST))
        trouble("module %s is not loaded: %s", name, strerror(errno));
    if (module >= 0)
        close(module);
}

static void write_to(const char *path, const char *text) {
    int descriptor = open(path, O_WRONLY | O_CLOEXEC);

    if (descriptor < 0 || write(descriptor, text, strlen(text)) < 0)
        trouble("cannot write %s to %s: %s", text, path, strerror(errno));
    if (descriptor >= 0)
        close(descriptor);
}

static void each_line(const char *path, void (*act)(const char *line, const char *context), const char *context) {
    char line[PATH_BYTES];
    FILE *file = fopen(path, "re");

    if (file == NULL) {
        trouble("cannot read %s: %s", path, strerror(errno));
        return;
    }
    while (fgets(line, sizeof(line), file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        act(line, context);
    }
    fclose(file);
}

static void act_load(const char *line, const char *context) {
    (void)context;
    load_module(line);
}

/* A line of an image's list of links is a path that is to show the image's file or folder of the same path. */
static void act_link(const char *line, const char *where) {
    char target[PATH_BYTES];

    snprintf(target, sizeof(target), "%s/%s", where, line);
    make_folders(line, false);
    if (symlink(target, line) != 0 && errno != EEXIST)
        trouble("cannot link %s to %s: %s", line, target, strerror(errno));
}

static int disks_promised(void) {
    char line[PATH_BYTES] = "";
    FILE *file = fopen("/proc/cmdline", "re");

    if (file == NULL)
        return 0;
    char *read = fgets(line, sizeof(line), file);
    fclose(file);
    const char *found = read == NULL ? NULL : strstr(line, "fl.disks=");
    int count = found == NULL ? 0 : found[strlen("fl.disks=")] - '0';
    return count >= 0 && count <= DISK_LIMIT ? count : 0;
}

static void mount_images(void) {
    for (int i = 0; i < disks_promised(); i++) {
        char device[32], where[32], list[64];

        snprintf(device, sizeof(device), "/dev/vd%c", 'a' + i);
        snprintf(where, sizeof(where), "/image/vd%c", 'a' + i);
        make_folders(where, true);
        int there = setup_open_when_there(device, O_RDONLY | O_CLOEXEC);
        if (there >= 0)
            close(there);
        if (there < 0 || mount(device, where, "ext4", MS_RDONLY, NULL) != 0)
            setup_fatal("cannot mount %s on %s: %s", device, where, strerror(errno));
        snprintf(list, sizeof(list), "%s/links", where);
        each_line(list, act_link, where);
    }
}

static void loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (any < 0 || ioctl(any, SIOCSIFFLAGS, &request) != 0)
        trouble("the loopback interface is not up: %s", strerror(errno));
    if (any >= 0)
        close(any);
}

/*
 * The kernel patches its own code when a module comes, when the first VM comes and when the last one goes. QEMU's
 * emulation with a thread per CPU (seen with 7.2) can go on running the old instruction, or the breakpoint that stood
 * there for a moment, on another CPU: a panic that no real CPU would have. So all of that is done while there is one CPU
 * (maxcpus=1), a VM is held for good, and only then do the others come.
 */
static void hold_kvm(void) {
    int device = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    if (device < 0)
        return; /* a kernel without KVM: the tests say what they miss */
    int machine = ioctl(device, KVM_CREATE_VM, 0);
    if (machine < 0 || ioctl(machine, KVM_CREATE_VCPU, 0) < 0)
        trouble("no VM is held: %s", strerror(errno));
}

static void start_other_cpus(void) {
    char path[64];

    for (int cpu = 1; cpu < CPU_LIMIT; cpu++) {
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
        if (access(path, F_OK) != 0)
            return;
        write_to(path, "1");
    }
}

void setup_all(void) {
    mount_all();
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    for (int stream = 0; stream <= 2 && console >= 0; stream++)
        dup2(console, stream);
    if (console > 2)
        close(console);
    each_line("/modules/order", act_load, NULL);
    hold_kvm();
    start_other_cpus();
    loopback_up();
    write_to("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
    mount_images();
    sethostname("kernel", strlen("kernel"));
}
