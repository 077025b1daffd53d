/* SPDX-License-Identifier: Apache-2.0 */
/* Reading /proc. Every function returns 0 or a negative errno; -ESRCH means that the process has ended. */
#ifndef FL_ATTACH_PROC_H
#define FL_ATTACH_PROC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What we need of /proc/PID/status and /proc/PID/stat. */
struct fl_proc_status {
    char comm[32];
    char state;     /* as in stat: R S D T t Z X */
    int group_pid;  /* of the process, when asked about a thread */
    int tracer_pid; /* a thread's */
    int parent_pid;
    uint32_t uid; /* effective */
    uint32_t seccomp_mode;
    uint32_t seccomp_filters; /* 0 when the kernel does not say */
    uint64_t locked_kib;
    uint64_t pinned_kib;
    bool shadow_stack;
    uint64_t start_time_ticks;
};
int fl_proc_status(int pid, struct fl_proc_status *out);

/* Only the seccomp mode and the number of filters (0 when the kernel does not say). */
int fl_proc_seccomp(int pid, uint32_t *mode, uint32_t *filters);

/* One line of /proc/PID/maps. */
struct fl_proc_map {
    uint64_t start;
    uint64_t end;
    uint64_t offset;
    uint64_t inode;
    uint32_t major;
    uint32_t minor;
    bool readable;
    bool writable;
    bool executable;
    bool shared;
    char path[256]; /* cut off when longer */
};
/* Calls `visit` for each mapping until it returns nonzero; that value is returned. */
int fl_proc_maps(int pid, int (*visit)(const struct fl_proc_map *map, void *context), void *context);

/* Calls `visit` for each descriptor of `pid` with its number and link. */
int fl_proc_fds(int pid, int (*visit)(int fd, const char *link, void *context), void *context);

/*
 * How much memory is registered as buffers with the io_uring behind a descriptor, and so pinned: a kernel may leave it out
 * of VmPin for a process that may lock memory. -EAGAIN: the ring was so busy that it was not told.
 */
int fl_proc_uring_pinned_kib(int pid, int fd, uint64_t *kib);

/*
 * Reads /proc/PID/smaps and calls `visit` for each mapping with its VmFlags line and its page size. Walks page
 * tables: slow for large processes.
 */
int fl_proc_smaps(int pid,
                  int (*visit)(const struct fl_proc_map *map, const char *flags, uint64_t page_bytes, void *context),
                  void *context);

/* Read a small file of /proc whole, zero-terminated. */
int fl_proc_read(const char *path, char *buffer, size_t size);

/* 1: a 64-bit x86_64 program; 0: another kind. */
int fl_proc_is_native(int pid);

#endif
