/* SPDX-License-Identifier: Apache-2.0 */
#include "track/direct_io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attach/proc.h"

struct search {
    int pid;
    char *detail;
    size_t bytes;
};

static int report(const struct search *search, int fd, const char *link, const char *how) {
    snprintf(search->detail, search->bytes,
             "process %d has %.80s %s (descriptor %d): direct I/O sets no ACCESS bits, so a disk's writes into guest "
             "memory would not be seen",
             search->pid, link, how, fd);
    return 1;
}

static int look_at_fd(int fd, const char *link, void *context) {
    const struct search *search = context;
    char path[64], text[512];
    if (strcmp(link, "/dev/vhost-scsi") == 0)
        return report(search, fd, link, "open");
    if (strncmp(link, "pipe:", 5) == 0)
        return 0; /* there the flag means packets */
    snprintf(path, sizeof(path), "/proc/%d/fdinfo/%d", search->pid, fd);
    int error = fl_proc_read(path, text, sizeof(text));
    if (error)
        return error == -ENOENT || error == -ESRCH ? 0 : error; /* closed meanwhile */
    const char *flags = strstr(text, "flags:");
    return flags && strtoull(flags + 6, NULL, 8) & O_DIRECT ? report(search, fd, link, "open with O_DIRECT") : 0;
}

int fl_direct_io(int pid, char *detail, size_t bytes) {
    struct search search = {.pid = pid, .detail = detail, .bytes = bytes};
    return fl_proc_fds(pid, look_at_fd, &search);
}

int fl_direct_io_forbids(int pid, char *detail, size_t bytes) {
    int found = pid ? fl_direct_io(pid, detail, bytes) : 0;
    if (found < 0)
        snprintf(detail, bytes, "whether process %d does direct I/O, whose accesses are not seen, cannot be read: %s",
                 pid, strerror(-found));
    return found != 0;
}
