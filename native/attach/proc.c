/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/proc.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "base/clock.h"

#define URING_LOOKS 20
#define URING_PAUSE_NS 200000u

/* /proc says "no such file" of a process that has ended, and some files read as if empty. */
static int gone_or(int error) {
    return error == ENOENT || error == ESRCH ? -ESRCH : -error;
}

int fl_proc_read(const char *path, char *buffer, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return gone_or(errno);
    }
    size_t used = 0;
    ssize_t got = 0;
    while (used < size - 1) {
        got = read(fd, buffer + used, size - 1 - used);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            break;
        }
        used += (size_t)got;
    }
    int error = got < 0 ? errno : 0;
    close(fd);
    buffer[used] = 0;
    if (error) {
        return gone_or(error);
    }
    return used ? 0 : -ESRCH;
}

/* The text after "\nNAME:" in a status file, or "". */
static const char *status_field(const char *text, const char *name) {
    size_t length = strlen(name);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, length) == 0 && line[length] == ':') {
            return line + length + 1;
        }
    }
    return "";
}

static int read_stat(int pid, struct fl_proc_status *out) {
    char path[64];
    char text[1024];
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    int error = fl_proc_read(path, text, sizeof(text));
    if (error) {
        return error;
    }
    /* The name may contain spaces and parentheses: the last one ends it. */
    char *name = strchr(text, '(');
    char *end = strrchr(text, ')');
    if (!name || !end || end < name) {
        return -EPROTO;
    }
    *end = 0;
    snprintf(out->comm, sizeof(out->comm), "%s", name + 1);
    char *field = end + 1;
    char *save = NULL;
    int number = 3;
    for (char *word = strtok_r(field, " ", &save); word; word = strtok_r(NULL, " ", &save), number++) {
        if (number == 3) {
            out->state = word[0];
        } else if (number == 4) {
            out->parent_pid = atoi(word);
        } else if (number == 22) {
            out->start_time_ticks = strtoull(word, NULL, 10);
            return 0;
        }
    }
    return -EPROTO;
}

int fl_proc_status(int pid, struct fl_proc_status *out) {
    char path[64];
    char text[8192];
    *out = (struct fl_proc_status){0};
    int error = read_stat(pid, out);
    if (error) {
        return error;
    }
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    error = fl_proc_read(path, text, sizeof(text));
    if (error) {
        return error;
    }
    unsigned long real = 0;
    unsigned long effective = 0;
    if (sscanf(status_field(text, "Uid"), "%lu %lu", &real, &effective) == 2) {
        out->uid = (uint32_t)effective;
    }
    out->group_pid = atoi(status_field(text, "Tgid"));
    out->tracer_pid = atoi(status_field(text, "TracerPid"));
    out->seccomp_mode = (uint32_t)atoi(status_field(text, "Seccomp"));
    out->seccomp_filters = (uint32_t)atoi(status_field(text, "Seccomp_filters"));
    out->locked_kib = strtoull(status_field(text, "VmLck"), NULL, 10);
    out->pinned_kib = strtoull(status_field(text, "VmPin"), NULL, 10);
    const char *features = status_field(text, "x86_Thread_features");
    const char *shadow = strstr(features, "shstk");
    out->shadow_stack = shadow && shadow < features + strcspn(features, "\n");
    return 0;
}

int fl_proc_seccomp(int pid, uint32_t *mode, uint32_t *filters) {
    char path[64];
    char text[8192];
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    int error = fl_proc_read(path, text, sizeof(text));
    if (error) {
        return error;
    }
    *mode = (uint32_t)atoi(status_field(text, "Seccomp"));
    *filters = (uint32_t)atoi(status_field(text, "Seccomp_filters"));
    return 0;
}

int fl_proc_start_time(int pid, uint64_t *out) {
    struct fl_proc_status status = {0};
    int error = read_stat(pid, &status);
    if (error) {
        return error;
    }
    *out = status.start_time_ticks;
    return status.state == 'Z' || status.state == 'X' ? -ESRCH : 0;
}

static bool parse_map(char *line, struct fl_proc_map *map) {
    char permissions[5] = "";
    int path_at = 0;
    unsigned major = 0;
    unsigned minor = 0;
    int fields = sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &map->start, &map->end,
                        permissions, &map->offset, &major, &minor, &map->inode, &path_at);
    if (fields < 7 || strlen(permissions) != 4) {
        return false;
    }
    map->major = major;
    map->minor = minor;
    map->readable = permissions[0] == 'r';
    map->writable = permissions[1] == 'w';
    map->executable = permissions[2] == 'x';
    map->shared = permissions[3] == 's';
    line[strcspn(line, "\n")] = 0;
    snprintf(map->path, sizeof(map->path), "%s", path_at ? line + path_at : "");
    return true;
}

static FILE *open_of(int pid, const char *name, int *error) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    FILE *file = fopen(path, "re");
    *error = file ? 0 : gone_or(errno);
    return file;
}

int fl_proc_maps(int pid, int (*visit)(const struct fl_proc_map *map, void *context), void *context) {
    int result = 0;
    FILE *file = open_of(pid, "maps", &result);
    if (!file) {
        return result;
    }
    char *line = NULL;
    size_t room = 0;
    struct fl_proc_map map;
    while (result == 0 && getline(&line, &room, file) > 0) {
        if (parse_map(line, &map)) {
            result = visit(&map, context);
        }
    }
    free(line);
    fclose(file);
    return result;
}

int fl_proc_smaps(int pid,
                  int (*visit)(const struct fl_proc_map *map, const char *flags, uint64_t page_bytes, void *context),
                  void *context) {
    int result = 0;
    FILE *file = open_of(pid, "smaps", &result);
    if (!file) {
        return result;
    }
    char *line = NULL;
    size_t room = 0;
    struct fl_proc_map map = {0};
    uint64_t page_kib = 4;
    while (result == 0 && getline(&line, &room, file) > 0) {
        if (strncmp(line, "VmFlags:", 8) == 0) {
            result = visit(&map, line + 8, page_kib * 1024, context);
        } else if (sscanf(line, "KernelPageSize: %" SCNu64, &page_kib) != 1) {
            struct fl_proc_map next;
            if (parse_map(line, &next)) {
                map = next;
            }
        }
    }
    free(line);
    fclose(file);
    return result;
}

int fl_proc_fds(int pid, int (*visit)(int fd, const char *link, void *context), void *context) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    DIR *folder = opendir(path);
    if (!folder) {
        return gone_or(errno);
    }
    int result = 0;
    const struct dirent *entry;
    while (result == 0 && (entry = readdir(folder))) {
        char link[256];
        if (entry->d_name[0] == '.') {
            continue;
        }
        ssize_t length = readlinkat(dirfd(folder), entry->d_name, link, sizeof(link) - 1);
        if (length < 0) {
            continue; /* closed meanwhile */
        }
        link[length] = 0;
        result = visit(atoi(entry->d_name), link, context);
    }
    closedir(folder);
    return result;
}

int fl_proc_uring_pinned_kib(int pid, int fd, uint64_t *kib) {
    char name[32];
    int result = 0;
    *kib = 0;
    snprintf(name, sizeof(name), "fdinfo/%d", fd);
    for (int i = 0; i < URING_LOOKS; i++) {
        FILE *file = open_of(pid, name, &result);
        if (!file) {
            return result == -ESRCH ? 0 : result; /* closed meanwhile; whoever asks sees if the process has ended */
        }
        char *line = NULL;
        size_t room = 0;
        bool told = false;
        while (getline(&line, &room, file) > 0) {
            uint64_t bytes = 0;
            /* A list of buffers as "index: address/bytes" follows this line, before any other list. */
            if (strncmp(line, "UserBufs:", 9) == 0) {
                told = true;
            } else if (told && sscanf(line, "%*u: 0x%*x/%" SCNu64, &bytes) == 1) {
                *kib += (bytes + 1023) / 1024;
            } else if (told && !strstr(line, ": <none>")) {
                break;
            }
        }
        free(line);
        fclose(file);
        if (told) {
            return 0;
        }
        fl_sleep_ns(URING_PAUSE_NS); /* the ring was in use: the kernel leaves the lists out then */
    }
    return -EAGAIN;
}

int fl_proc_is_native(int pid) {
    char path[64];
    unsigned char header[20];
    snprintf(path, sizeof(path), "/proc/%d/exe", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return gone_or(errno);
    }
    ssize_t got = read(fd, header, sizeof(header));
    close(fd);
    if (got != sizeof(header)) {
        return 0;
    }
    return memcmp(header, ELFMAG, SELFMAG) == 0 && header[EI_CLASS] == ELFCLASS64 &&
           (header[18] | header[19] << 8) == EM_X86_64;
}
