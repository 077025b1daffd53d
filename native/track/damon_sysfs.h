/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DAMON's files in sysfs, and one kdamond there: what it is to look at, on and off. Who may use which: damon_admin.h.
 *
 * Functions return 0 or a negative errno. -ENODEV: what is named is not there (any more). DAMON answers EBUSY while
 * another process is at work in its sysfs; that is waited for.
 */
#ifndef FL_TRACK_DAMON_SYSFS_H
#define FL_TRACK_DAMON_SYSFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FL_DAMON_KDAMONDS "/sys/kernel/mm/damon/admin/kdamonds"
#define FL_DAMON_MODULES "/sys/module"
#define FL_DAMON_ATTRS "contexts/0/monitoring_attrs/" /* in a kdamond's directory */
#define FL_DAMON_WAIT_NS UINT64_C(20000000000)        /* others are busy as long as one of their checks takes */

int fl_damon_put(int directory, const char *path, const char *text);
int fl_damon_put_number(int directory, const char *path, uint64_t number);
int fl_damon_get(int directory, const char *path, char *text, size_t bytes);
/* *out is -1 on error. */
int fl_damon_get_number(int directory, const char *path, int64_t *out);

/* Whether one of the kernel's own users of DAMON is switched on; false: off, or not in this kernel. */
bool fl_damon_module_is_on(const char *module);
/* The first on of those that want DAMON for themselves alone and that we leave alone; NULL: none. */
const char *fl_damon_module_in_use(void);

struct fl_damon_range {
    uint64_t start, end;
};

struct fl_damon_kdamond {
    int directory_fd;
    int pid; /* while it is on */
};

struct fl_damon_settings { /* takes effect when switched on */
    int pid;
    const struct fl_damon_range *ranges; /* in the order of their addresses */
    uint32_t count;
    uint64_t regions_min, regions_max;
    uint64_t sample_us; /* and one sample an aggregation */
};

int fl_damon_set(struct fl_damon_kdamond *kdamond, const struct fl_damon_settings *settings);
/*
 * Switch on, and return when all pages have been marked; *cpu_ns gets what that cost the kdamond. -ENODEV also: somebody who
 * wants DAMON for itself alone has it, or the kdamond has ended at once.
 */
int fl_damon_on(struct fl_damon_kdamond *kdamond, uint64_t *cpu_ns);
/* CPU time that a kdamond has had, in ns; 0: it has ended, or cannot be seen. */
uint64_t fl_damon_cpu_ns(int kdamond_pid);
/* Whether it is still the one that was switched on: 0, or -ENODEV. */
int fl_damon_is_on(const struct fl_damon_kdamond *kdamond);
/*
 * Switch off, whoever switched it on; returns when it has ended. The write cannot be interrupted and has no limit of ours, but an
 * end: the kdamond is woken from its sleep, and marks and checks each of its regions once more at most. For each it takes the
 * target's mmap lock for reading and the lock of one page table, and nothing that waits for a pager: events of a userfaultfd are
 * waited for without the mmap lock. So it lasts as long as twice the regions, of ours at most 2^18, and whatever else wants
 * that lock meanwhile; and frees the target's memory, if that has ended since and the kdamond is the last to hold it. Only the
 * mover waits for that: faults are answered as always, and nothing is evicted.
 */
int fl_damon_off(struct fl_damon_kdamond *kdamond);

#endif
