/* SPDX-License-Identifier: Apache-2.0 */
/* What an earlier attachment left in a VMM: believed only as far as /proc shows it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attach/gate.h"
#include "attach/inject.h"
#include "attach/inspect.h"
#include "attach/proc.h"

static bool has_link(int pid, int fd, const char *link) {
    char path[64];
    char text[128];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, fd);
    ssize_t length = readlink(path, text, sizeof(text) - 1);
    if (length < 0) {
        return false;
    }
    text[length] = 0;
    return strcmp(text, link) == 0;
}

struct gate_search {
    uint64_t vault_inode;
    uint64_t code; /* found there */
};

static int match_gate(const struct fl_proc_map *map, void *context) {
    struct gate_search *search = context;
    bool matches = map->executable && map->inode == search->vault_inode && strcmp(map->path, FL_VAULT_LINK) == 0;
    if (matches) {
        search->code = map->start;
    }
    return matches;
}

int fl_inject_verify(int pid, struct fl_attachment *attachment) {
    struct gate_search search = {0};
    char path[64];
    struct stat info;
    if (!has_link(pid, attachment->vmm_uffd, FL_UFFD_LINK)) {
        attachment->vmm_uffd = -1;
    }
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, attachment->vmm_vault);
    if (!has_link(pid, attachment->vmm_vault, FL_VAULT_LINK) || stat(path, &info)) {
        attachment->vmm_vault = -1;
    } else {
        search.vault_inode = info.st_ino;
    }
    int error = search.vault_inode ? fl_proc_maps(pid, match_gate, &search) : 0;
    if (search.code == 0 || search.code != attachment->gate_code) {
        attachment->gate_code = 0;
    }
    return error < 0 ? error : 0;
}

int fl_attach_recover(int pid, struct fl_attachment *out) {
    struct fl_attachment found = {.vmm_uffd = -1, .vmm_vault = -1};
    struct gate_search search = {0};
    char path[64];
    struct stat info;
    int error = fl_proc_start_time(pid, &found.start_time_ticks);
    if (error == 0) {
        error = fl_vmm_find_fd(pid, FL_VAULT_LINK, &found.vmm_vault);
    }
    if (error) {
        return error;
    }
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, found.vmm_vault);
    if (stat(path, &info) || fl_vmm_find_fd(pid, FL_UFFD_LINK, &found.vmm_uffd)) {
        return -ESTALE;
    }
    search.vault_inode = info.st_ino;
    error = fl_proc_maps(pid, match_gate, &search);
    if (error <= 0) {
        return error ? error : -ESTALE;
    }
    found.gate_code = search.code;
    found.gate_data = search.code + FL_GATE_CODE_BYTES;
    *out = found;
    return 0;
}

static int borrow_uffd(int pid, const struct fl_attachment *attachment, int *out) {
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0) {
        return -errno;
    }
    int fd = (int)syscall(SYS_pidfd_getfd, pidfd, attachment->vmm_uffd, 0);
    int error = fd < 0 ? -errno : 0;
    close(pidfd);
    if (error) {
        return error == -EBADF ? -ESTALE : error;
    }
    /* The number may have been given to another file since the attachment was written: look at what we got. */
    if (!has_link(getpid(), fd, FL_UFFD_LINK)) {
        close(fd);
        return -ESTALE;
    }
    *out = fd;
    return 0;
}

int fl_attach_borrow(int pid, const struct fl_attachment *attachment, int *uffd, int *vault) {
    uint64_t started = 0;
    int vault_fd = -1;
    int error = fl_proc_start_time(pid, &started);
    if (error) {
        return error;
    }
    if (started != attachment->start_time_ticks) {
        return -ESTALE;
    }
    if (vault) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", pid, attachment->vmm_vault);
        if (!has_link(pid, attachment->vmm_vault, FL_VAULT_LINK)) {
            return -ESTALE;
        }
        vault_fd = open(path, O_RDWR | O_CLOEXEC);
        if (vault_fd < 0) {
            return errno == ENOENT ? -ESTALE : -errno;
        }
    }
    error = uffd ? borrow_uffd(pid, attachment, uffd) : 0;
    if (error && vault_fd >= 0) {
        close(vault_fd);
    } else if (vault) {
        *vault = vault_fd;
    }
    return error;
}
