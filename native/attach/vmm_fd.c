/* SPDX-License-Identifier: Apache-2.0 */
/* Finding and opening what a VMM holds. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "attach/attach.h"
#include "attach/inspect.h"
#include "attach/proc.h"

struct fd_search {
    const char *link;
    int found;
};

static int match_link(int fd, const char *link, void *context) {
    struct fd_search *search = context;
    if (strcmp(link, search->link) == 0 && (search->found < 0 || fd < search->found)) {
        search->found = fd;
    }
    return 0;
}

int fl_vmm_find_fd(int pid, const char *link_text, int *fd_number) {
    struct fd_search search = {.link = link_text, .found = -1};
    int error = fl_proc_fds(pid, match_link, &search);
    if (error) {
        return error;
    }
    *fd_number = search.found;
    return search.found < 0 ? -ENOENT : 0;
}

struct memfd_search {
    int pid;
    uint64_t inode;
    char path[96];
};

static bool is_inode(const char *path, uint64_t inode) {
    struct stat info;
    return stat(path, &info) == 0 && info.st_ino == inode;
}

static int match_memfd(int fd, const char *link, void *context) {
    struct memfd_search *search = context;
    char path[64];
    if (strncmp(link, "/memfd:", 7) != 0) {
        return 0;
    }
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", search->pid, fd);
    if (!is_inode(path, search->inode)) {
        return 0;
    }
    snprintf(search->path, sizeof(search->path), "%s", path);
    return 1;
}

static int match_memfd_map(const struct fl_proc_map *map, void *context) {
    struct memfd_search *search = context;
    if (map->inode != search->inode || strncmp(map->path, "/memfd:", 7) != 0) {
        return 0;
    }
    snprintf(search->path, sizeof(search->path), "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, search->pid, map->start,
             map->end);
    return 1;
}

int fl_vmm_open_memfd(int pid, uint64_t inode, int flags, int *fd) {
    struct memfd_search search = {.pid = pid, .inode = inode};
    int found = fl_proc_fds(pid, match_memfd, &search);
    if (found == 0) {
        /* The VMM may have closed it after mapping. */
        found = fl_proc_maps(pid, match_memfd_map, &search);
    }
    if (found <= 0) {
        return found ? found : -ENOENT;
    }
    int opened = open(search.path, flags | O_CLOEXEC);
    if (opened < 0) {
        return errno == ENOENT ? -ESRCH : -errno;
    }
    struct stat info;
    if (fstat(opened, &info) || info.st_ino != inode) {
        close(opened);
        return -ESTALE; /* the number was given to another file meanwhile */
    }
    *fd = opened;
    return 0;
}

int fl_vmm_open_vault(int pid, int flags, int *fd) {
    int number = -1;
    int error = fl_vmm_find_fd(pid, FL_VAULT_LINK, &number);
    if (error) {
        return error;
    }
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, number);
    int opened = open(path, flags | O_CLOEXEC);
    if (opened < 0) {
        return errno == ENOENT ? -ESRCH : -errno;
    }
    *fd = opened;
    return 0;
}

/* The pid that /proc/locks names for a flock() on the inode: 0 when it lists none. */
static int holder_from_locks(const struct stat *info, int *pid) {
    char line[256];
    *pid = 0;
    FILE *file = fopen("/proc/locks", "re");
    if (!file) {
        return -errno;
    }
    while (fgets(line, sizeof(line), file)) {
        int holder = 0;
        unsigned device_major = 0;
        unsigned device_minor = 0;
        uint64_t inode = 0;
        /* Waiters have "->" before the kind and are not holders. */
        if (sscanf(line, "%*d: FLOCK %*s %*s %d %x:%x:%" SCNu64, &holder, &device_major, &device_minor, &inode) == 4 &&
            inode == info->st_ino && device_major == major(info->st_dev) && device_minor == minor(info->st_dev)) {
            *pid = holder;
            break;
        }
    }
    fclose(file);
    return 0;
}

/* Only the initial pid name space sees every holder in /proc/locks. */
static bool sees_all_pids(void) {
    char link[64] = "";
    ssize_t length = readlink("/proc/self/ns/pid", link, sizeof(link) - 1);
    return length > 0 && strncmp(link, "pid:[4026531836]", (size_t)length) == 0;
}

int fl_vault_holder(int vmm_pid, int *pid) {
    int fd = -1;
    *pid = 0;
    int error = fl_vmm_open_vault(vmm_pid, O_RDWR, &fd);
    if (error) {
        return error;
    }
    struct stat info;
    error = fstat(fd, &info) ? -errno : holder_from_locks(&info, pid);
    if (error == 0 && *pid == 0 && !sees_all_pids()) {
        /* The test takes the lock for a moment: a pager that starts right now has to try again. */
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
            flock(fd, LOCK_UN);
        } else if (errno == EWOULDBLOCK) {
            *pid = -1;
        } else {
            error = -errno;
        }
    }
    close(fd);
    return error;
}
