/* SPDX-License-Identifier: Apache-2.0 */
#include "boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "console.h"

static void mount_one(const char *type, const char *where) {
    if (mkdir(where, 0755) != 0 && errno != EEXIST)
        console_fatal("cannot make %s", where);
    if (mount(type, where, type, 0, NULL) != 0 && errno != EBUSY)
        console_fatal("cannot mount %s on %s", type, where);
}

static void open_console(void) {
    int console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);

    if (console < 0)
        return; /* the kernel's own /dev/console stays */
    for (int stream = 0; stream <= 2; stream++)
        dup2(console, stream);
    if (console > 2)
        close(console);
}

static void load_modules(void) {
    char name[128], path[160];
    FILE *order = fopen("/modules/order", "re");

    if (order == NULL)
        return;
    while (fgets(name, sizeof(name), order) != NULL) {
        name[strcspn(name, "\n")] = '\0';
        snprintf(path, sizeof(path), "/modules/%s", name);
        int module = open(path, O_RDONLY | O_CLOEXEC);
        /* A guest without its balloon is still a guest: say it, go on. */
        if (module < 0 || (syscall(SYS_finit_module, module, "", 0) != 0 && errno != EEXIST))
            console_line("{\"event\":\"warning\",\"text\":\"module %s: %s\"}", name, strerror(errno));
        if (module >= 0)
            close(module);
    }
    fclose(order);
}

void boot_as_init(void) {
    mount_one("proc", "/proc");
    mount_one("sysfs", "/sys");
    mount_one("devtmpfs", "/dev");
    open_console();
    console_no_echo();
    load_modules();
}

void boot_power_off(void) {
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}
