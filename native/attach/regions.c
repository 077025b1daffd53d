/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/regions.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "attach/proc.h"

struct region_search {
    struct fl_inspection *out;
    bool too_many;
    bool twice;                 /* a region's file is mapped a second time, in a way that is not a region */
    uint64_t private_memfd;     /* bytes of what would be guest memory if it were mapped shared */
    uint64_t largest_anonymous; /* bytes */
    uint64_t largest_file;
    char largest_file_path[96];
};

#define PAGER_COMM "frostline-pager" /* as the kernel shows it: 15 characters */

static bool is_guest_memfd(const struct fl_proc_map *map) {
    return strncmp(map->path, FL_GUEST_MEMFD_PREFIX, strlen(FL_GUEST_MEMFD_PREFIX)) == 0;
}

/* maps is in address order, so only the last region can be continued. */
static int collect(const struct fl_proc_map *map, void *context) {
    struct region_search *search = context;
    struct fl_inspection *out = search->out;
    uint64_t length = map->end - map->start;
    if (!is_guest_memfd(map)) {
        if (map->inode == 0 && map->path[0] == 0 && map->writable && length > search->largest_anonymous) {
            search->largest_anonymous = length;
        } else if (map->inode && map->shared && map->writable && length > search->largest_file) {
            search->largest_file = length;
            snprintf(search->largest_file_path, sizeof(search->largest_file_path), "%.95s", map->path);
        }
        return 0;
    }
    if (!map->shared) {
        search->private_memfd += length;
        return 0;
    }
    if (!map->writable) {
        return 0;
    }
    struct fl_region *last = out->region_count ? &out->regions[out->region_count - 1] : NULL;
    if (last && last->inode == map->inode && last->vmm_addr + last->length == map->start &&
        last->file_offset + last->length == map->offset) {
        last->length += length;
    } else if (out->region_count == FL_MAX_REGIONS) {
        search->too_many = true;
        return 0;
    } else {
        out->regions[out->region_count++] = (struct fl_region){
            .vmm_addr = map->start, .length = length, .file_offset = map->offset, .inode = map->inode};
    }
    out->memory_bytes += length;
    return 0;
}

static const struct fl_region *region_of_inode(const struct fl_inspection *in, uint64_t inode) {
    for (uint32_t i = 0; i < in->region_count; i++) {
        if (in->regions[i].inode == inode) {
            return &in->regions[i];
        }
    }
    return NULL;
}

/* Is every byte of the mapping part of a region? A private or read-only view is not. */
static bool is_in_region(const struct fl_inspection *in, const struct fl_proc_map *map) {
    for (uint32_t i = 0; i < in->region_count; i++) {
        const struct fl_region *region = &in->regions[i];
        if (map->start >= region->vmm_addr && map->end <= region->vmm_addr + region->length) {
            return map->shared && map->writable;
        }
    }
    return false;
}

static int find_second_view(const struct fl_proc_map *map, void *context) {
    struct region_search *search = context;
    if (is_guest_memfd(map) && region_of_inode(search->out, map->inode) && !is_in_region(search->out, map)) {
        search->twice = true;
    }
    return 0;
}

/* Two regions of one file that share bytes of it. */
static bool regions_overlap(const struct fl_inspection *in) {
    for (uint32_t i = 0; i < in->region_count; i++) {
        for (uint32_t j = i + 1; j < in->region_count; j++) {
            const struct fl_region *a = &in->regions[i];
            const struct fl_region *b = &in->regions[j];
            if (a->inode == b->inode && a->file_offset < b->file_offset + b->length &&
                b->file_offset < a->file_offset + a->length) {
                return true;
            }
        }
    }
    return false;
}

static int refuse_nothing_found(int pid, const struct region_search *search, struct fl_refused *why) {
    static const char advice[] = "run it with -object memory-backend-memfd,share=on,... and -machine memory-backend=";
    if (search->private_memfd) {
        return fl_refuse(why, FL_REFUSAL_NOT_SHARED_MEMFD,
                         "pid %d maps its memory-backend-memfd privately (%" PRIu64 " MiB); %s", pid,
                         search->private_memfd >> 20, advice);
    }
    if (search->largest_file > search->largest_anonymous) {
        return fl_refuse(why, FL_REFUSAL_NOT_SHARED_MEMFD,
                         "pid %d has no shared memory-backend-memfd (its largest shared file is %.60s); %s", pid,
                         search->largest_file_path, advice);
    }
    return fl_refuse(why, FL_REFUSAL_NOT_SHARED_MEMFD,
                     "pid %d has no shared memory-backend-memfd (its largest memory is anonymous, %" PRIu64 " MiB); %s",
                     pid, search->largest_anonymous >> 20, advice);
}

/* Huge pages by the file system that the memfd is on: block sizes would also say so of shmem with THP. */
static int check_page_size(int pid, const struct fl_inspection *in, struct fl_refused *why) {
    for (uint32_t i = 0; i < in->region_count; i++) {
        struct statfs info;
        int fd = -1;
        if (i && in->regions[i].inode == in->regions[i - 1].inode) {
            continue;
        }
        int error = fl_vmm_open_memfd(pid, in->regions[i].inode, O_PATH, &fd);
        if (error) {
            return error;
        }
        error = fstatfs(fd, &info) ? -errno : 0;
        close(fd);
        if (error) {
            return error;
        }
        if (info.f_type == HUGETLBFS_MAGIC) {
            return fl_refuse(why, FL_REFUSAL_HUGETLB,
                             "pid %d has guest memory on hugetlbfs (%ld KiB pages), which cannot be served yet; use "
                             "hugetlb=off",
                             pid, (long)info.f_bsize / 1024);
        }
    }
    return 0;
}

int fl_regions_find(int pid, struct fl_inspection *out, struct fl_refused *why) {
    struct region_search search = {.out = out};
    out->region_count = 0;
    out->memory_bytes = 0;
    int error = fl_proc_maps(pid, collect, &search);
    if (error) {
        return error;
    }
    if (search.too_many) {
        return fl_refuse(why, FL_REFUSAL_LIMIT, "pid %d has more than %d regions of guest memory", pid, FL_MAX_REGIONS);
    }
    if (out->region_count == 0) {
        return refuse_nothing_found(pid, &search, why);
    }
    error = check_page_size(pid, out, why);
    if (error) {
        return error;
    }
    error = fl_proc_maps(pid, find_second_view, &search);
    if (error) {
        return error;
    }
    if (search.twice || search.private_memfd || regions_overlap(out)) {
        return fl_refuse(why, FL_REFUSAL_OTHER_MAPPER,
                         "pid %d maps its guest memory a second time; evicted pages would read as zeros there", pid);
    }
    return 0;
}

static int find_inode(const struct fl_proc_map *map, void *context) {
    const struct fl_inspection *in = context;
    /* The path is compared too: a file on a disk may have the same inode number. */
    return map->inode && region_of_inode(in, map->inode) && is_guest_memfd(map);
}

static bool is_skipped(int pid, const int *skip_pids, int skip_count) {
    for (int i = 0; i < skip_count; i++) {
        if (skip_pids[i] && pid == skip_pids[i]) {
            return true;
        }
    }
    return false;
}

/*
 * Our own ancestors (init, the service manager) may have rights that we were not given, and then cannot be read. They
 * are not what a VMM shares its memory with.
 */
static bool is_our_ancestor(int pid) {
    struct fl_proc_status status;
    int at = getpid();
    for (int depth = 0; depth < 64 && at > 1; depth++) {
        if (fl_proc_status(at, &status)) {
            return false;
        }
        at = status.parent_pid;
        if (at == pid) {
            return true;
        }
    }
    return pid == 1;
}

static int refuse_mapper(int pid, int other, const char *comm, struct fl_refused *why) {
    if (strcmp(comm, PAGER_COMM) == 0) {
        return fl_refuse(why, FL_REFUSAL_ALREADY_SERVED,
                         "pid %d is just being attached to by pager %d; leave it to that one, or end that first", pid,
                         other);
    }
    return fl_refuse(
        why, FL_REFUSAL_OTHER_MAPPER,
        "guest memory of pid %d is also mapped by pid %d (%s), which would read evicted pages as zeros; run "
        "the VM without that back end",
        pid, other, comm);
}

int fl_regions_other_mapper(int pid, const struct fl_inspection *in, const int *skip_pids, int skip_count,
                            struct fl_refused *why) {
    DIR *folder = opendir("/proc");
    if (!folder) {
        return -errno;
    }
    int result = 0;
    const struct dirent *entry;
    while (result == 0 && (entry = readdir(folder))) {
        int other = isdigit((unsigned char)entry->d_name[0]) ? atoi(entry->d_name) : 0;
        if (other <= 0 || other == pid || is_skipped(other, skip_pids, skip_count)) {
            continue;
        }
        int found = fl_proc_maps(other, find_inode, (void *)in);
        struct fl_proc_status status;
        if (found == 1 && fl_proc_status(other, &status) == 0 &&
            !is_skipped(status.parent_pid, skip_pids, skip_count)) {
            result = refuse_mapper(pid, other, status.comm, why);
        } else if ((found == -EACCES || found == -EPERM) && !is_our_ancestor(other)) {
            result =
                fl_refuse(why, FL_REFUSAL_PERMISSION,
                          "cannot read the mappings of pid %d to see whether it shares guest memory: %s; run as root",
                          other, strerror(-found));
        }
    }
    closedir(folder);
    return result;
}

struct flags_check {
    const struct fl_inspection *in;
    uint32_t refusal;
};

static int check_flags(const struct fl_proc_map *map, const char *flags, uint64_t page_bytes, void *context) {
    struct flags_check *check = context;
    if (!is_in_region(check->in, map)) {
        return 0;
    }
    if (page_bytes != FL_PAGE_SIZE) {
        check->refusal = FL_REFUSAL_HUGETLB;
    } else if (strstr(flags, " lo")) {
        check->refusal = FL_REFUSAL_LOCKED;
    } else if (strstr(flags, " um") || strstr(flags, " uw") || strstr(flags, " ui") || strstr(flags, " ur")) {
        check->refusal = FL_REFUSAL_FOREIGN_UFFD;
    }
    return check->refusal != 0;
}

int fl_regions_check_flags(int pid, const struct fl_inspection *in, struct fl_refused *why) {
    struct flags_check check = {.in = in};
    int result = fl_proc_smaps(pid, check_flags, &check);
    if (result < 0) {
        return result;
    }
    switch (check.refusal) {
    case FL_REFUSAL_HUGETLB:
        return fl_refuse(why, check.refusal, "pid %d has guest memory in huge pages, which cannot be served yet", pid);
    case FL_REFUSAL_LOCKED:
        return fl_refuse(why, check.refusal,
                         "guest memory of pid %d is locked; run it without -overcommit mem-lock=on (or mlock)", pid);
    case FL_REFUSAL_FOREIGN_UFFD:
        return fl_refuse(
            why, check.refusal,
            "guest memory of pid %d is registered with another userfaultfd (post-copy migration, snapshot?)", pid);
    default:
        return 0;
    }
}
