/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a kdamond found out, by the kernel's damon_aggregated tracepoint: one record a region, taken from that one thread by
 * perf_event_open(), and only of regions that were accessed. DAMON's sysfs can tell the same (a `stat` scheme's tried_regions),
 * with five files a region: measured on 7.3 in one boot, 16,384 regions took 30 to 40 s there, and 0.05 to 0.25 s here, the
 * kdamond's own pass included; for only the 1,040 accessed ones 1.1 s against some ms.
 */
#ifndef FL_TRACK_DAMON_TRACE_H
#define FL_TRACK_DAMON_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fl_damon_trace { /* the tracepoint */
    uint64_t id;
    uint32_t start_at, end_at, accesses_at, regions_at; /* offsets in a record */
    int held_fd;
};

struct fl_damon_record {
    uint64_t start, end;
    uint32_t accesses;
    uint32_t regions; /* how many the kdamond has */
};

struct fl_damon_reader { /* of one kdamond */
    int event_fd;
    void *ring;
    uint64_t ring_bytes;
    const struct fl_damon_trace *trace;
};

/* 0; -ENOENT: the kernel has no such tracepoint, or it cannot be seen; -EPERM, -EACCES: perf events are not allowed. */
int fl_damon_trace_open(struct fl_damon_trace *out);
void fl_damon_trace_close(struct fl_damon_trace *trace);

/*
 * Take records from thread `pid`, which stays on this CPU from now on: of regions with accesses, and in any case of the one that
 * ends at `last_end`. The ring holds `records` of them, but never more than 8 MiB: drain it while they come.
 */
int fl_damon_reader_open(const struct fl_damon_trace *trace, int pid, uint64_t records, uint64_t last_end,
                         struct fl_damon_reader *out);
/* Hand over what has come since. -EOVERFLOW: some were lost. -EPROTO: not what was asked for. */
int fl_damon_reader_drain(struct fl_damon_reader *reader, void (*take)(void *, const struct fl_damon_record *),
                          void *argument);
void fl_damon_reader_close(struct fl_damon_reader *reader);

#endif
