/* SPDX-License-Identifier: Apache-2.0 */
#include "track/damon_trace.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "frostline.h"

#define EVENT "events/damon/damon_aggregated/"
#define RECORD_BYTES 64u /* header, length, the tracepoint's own fields */
#define RECORD_MAX 512u
#define RING_BYTES_MAX (UINT64_C(8) << 20)
#define RAW_AT (sizeof(struct perf_event_header) + sizeof(uint32_t))

/* ---- the tracepoint ---------------------------------------------------------------------------------------- */

static int read_text(int directory, const char *path, char *text, size_t bytes) {
    int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t length = read(fd, text, bytes - 1);
    int error = length < 0 ? -errno : 0;
    close(fd);
    text[length < 0 ? 0 : length] = '\0';
    return error;
}

/* A mount of tracefs that nobody else sees and that goes with its descriptor, where the host has none. */
static int mount_tracefs(void) {
#if defined(SYS_fsopen) && defined(SYS_fsconfig) && defined(SYS_fsmount)
    int context = (int)syscall(SYS_fsopen, "tracefs", 1u /* FSOPEN_CLOEXEC */);
    if (context < 0)
        return -errno;
    int mount = -1;
    if (syscall(SYS_fsconfig, context, 6u /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0) == 0)
        mount = (int)syscall(SYS_fsmount, context, 1u /* FSMOUNT_CLOEXEC */, 0u);
    int error = mount < 0 ? -errno : mount;
    close(context);
    return error;
#else
    return -ENOENT;
#endif
}

static int open_tracefs(void) {
    static const char *const places[] = {"/sys/kernel/tracing", "/sys/kernel/debug/tracing"};
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        int fd = open(places[i], O_DIRECTORY | O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && faccessat(fd, "events", F_OK, 0) == 0)
            return fd;
        if (fd >= 0)
            close(fd);
    }
    return mount_tracefs();
}

/* A line of the format is e.g. "field:unsigned long start;	offset:24;	size:8;	signed:0;". */
static bool find_field(const char *format, const char *name, uint32_t bytes, uint32_t *offset) {
    char tail[32];
    uint32_t size;
    snprintf(tail, sizeof(tail), " %s;", name);
    const char *at = strstr(format, tail);
    return at && sscanf(at + strlen(tail), " offset:%" SCNu32 "; size:%" SCNu32 ";", offset, &size) == 2 &&
           size == bytes && *offset + size <= RECORD_MAX - RAW_AT;
}

/*
 * Of one CPU, not of one thread: the first event of a thread in a system makes the kernel patch its scheduler, and QEMU's TCG,
 * on which tests run it, sometimes goes on with the old code (seen: an int3 in __schedule).
 */
static int open_event(const struct fl_damon_trace *trace, int cpu) {
    struct perf_event_attr attr = {
        .type = PERF_TYPE_TRACEPOINT,
        .size = sizeof(attr),
        .config = trace->id,
        .sample_period = 1,
        .sample_type = PERF_SAMPLE_RAW,
        .watermark = 1, /* nobody is to be woken: the ring is looked at when it suits us */
        .wakeup_watermark = UINT32_MAX,
        .disabled = 1,
    };
    int fd = (int)syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int fl_damon_trace_open(struct fl_damon_trace *out) {
    char id[32], format[4096];
    *out = (struct fl_damon_trace){.held_fd = -1};
    int tracefs = open_tracefs();
    if (tracefs < 0)
        return tracefs;
    int error = read_text(tracefs, EVENT "id", id, sizeof(id));
    if (!error)
        error = read_text(tracefs, EVENT "format", format, sizeof(format));
    close(tracefs);
    if (error)
        return error;
    out->id = strtoull(id, NULL, 10);
    if (!find_field(format, "start", 8, &out->start_at) || !find_field(format, "end", 8, &out->end_at) ||
        !find_field(format, "nr_accesses", 4, &out->accesses_at) ||
        !find_field(format, "nr_regions", 4, &out->regions_at))
        return -ENOENT;
    /* Never on. As long as it is there, the kernel need not patch the tracepoint in and out in every scan. */
    out->held_fd = open_event(out, sched_getcpu());
    return out->held_fd < 0 ? out->held_fd : 0;
}

void fl_damon_trace_close(struct fl_damon_trace *trace) {
    if (trace->held_fd >= 0)
        close(trace->held_fd);
    trace->held_fd = -1;
}

/* ---- one kdamond ------------------------------------------------------------------------------------------- */

/* Where it is to do its check, so that one CPU's events are all of it. It ends with the check. */
static int pin(int pid, int cpu) {
    cpu_set_t *set = CPU_ALLOC((size_t)cpu + 1);
    size_t bytes = CPU_ALLOC_SIZE((size_t)cpu + 1);
    if (!set)
        return -ENOMEM;
    CPU_ZERO_S(bytes, set);
    CPU_SET_S((size_t)cpu, bytes, set);
    int error = sched_setaffinity(pid, bytes, set) ? -errno : 0;
    CPU_FREE(set);
    return error;
}

static int map_ring(struct fl_damon_reader *reader, uint64_t bytes) {
    void *ring = mmap(NULL, FL_PAGE_SIZE + bytes, PROT_READ | PROT_WRITE, MAP_SHARED, reader->event_fd, 0);
    if (ring == MAP_FAILED)
        return -errno;
    reader->ring = ring;
    reader->ring_bytes = bytes;
    return 0;
}

int fl_damon_reader_open(const struct fl_damon_trace *trace, int pid, uint64_t records, uint64_t last_end,
                         struct fl_damon_reader *out) {
    char filter[128];
    uint64_t bytes = FL_PAGE_SIZE;
    while (bytes < RING_BYTES_MAX && bytes < (records + 1) * RECORD_BYTES)
        bytes *= 2;
    int cpu = sched_getcpu();
    *out = (struct fl_damon_reader){.event_fd = -1, .trace = trace};
    int error = cpu < 0 ? -errno : pin(pid, cpu);
    if (error)
        return error;
    out->event_fd = open_event(trace, cpu);
    if (out->event_fd < 0)
        return out->event_fd;
    error = map_ring(out, bytes);
    snprintf(filter, sizeof(filter), "common_pid == %d && (nr_accesses > 0 || end == %" PRIu64 ")", pid, last_end);
    if (!error &&
        (ioctl(out->event_fd, PERF_EVENT_IOC_SET_FILTER, filter) || ioctl(out->event_fd, PERF_EVENT_IOC_ENABLE, 0)))
        error = -errno;
    if (error)
        fl_damon_reader_close(out);
    return error;
}

void fl_damon_reader_close(struct fl_damon_reader *reader) {
    if (reader->ring)
        munmap(reader->ring, FL_PAGE_SIZE + reader->ring_bytes);
    if (reader->event_fd >= 0)
        close(reader->event_fd);
    reader->event_fd = -1;
    reader->ring = NULL;
}

/* A record may go over the end of the ring and on at its beginning. */
static void copy_out(const struct fl_damon_reader *reader, uint64_t at, void *to, uint64_t bytes) {
    const uint8_t *data = (const uint8_t *)reader->ring + FL_PAGE_SIZE;
    uint64_t from = at & (reader->ring_bytes - 1), room = reader->ring_bytes - from;
    uint64_t first = bytes < room ? bytes : room;
    memcpy(to, data + from, first);
    memcpy((uint8_t *)to + first, data, bytes - first);
}

static int take_record(const struct fl_damon_reader *reader, uint64_t at, const struct perf_event_header *header,
                       void (*take)(void *, const struct fl_damon_record *), void *argument) {
    const struct fl_damon_trace *trace = reader->trace;
    uint8_t record[RECORD_MAX] = {0};
    struct fl_damon_record out;
    if (header->type == PERF_RECORD_LOST)
        return -EOVERFLOW;
    if (header->type != PERF_RECORD_SAMPLE)
        return 0;
    if (header->size > sizeof(record))
        return -EPROTO;
    copy_out(reader, at, record, header->size);
    memcpy(&out.start, record + RAW_AT + trace->start_at, sizeof(out.start));
    memcpy(&out.end, record + RAW_AT + trace->end_at, sizeof(out.end));
    memcpy(&out.accesses, record + RAW_AT + trace->accesses_at, sizeof(out.accesses));
    memcpy(&out.regions, record + RAW_AT + trace->regions_at, sizeof(out.regions));
    take(argument, &out);
    return 0;
}

int fl_damon_reader_drain(struct fl_damon_reader *reader, void (*take)(void *, const struct fl_damon_record *),
                          void *argument) {
    struct perf_event_mmap_page *page = reader->ring;
    uint64_t head = __atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE), at = page->data_tail;
    int error = 0;
    while (at < head && !error) {
        struct perf_event_header header;
        copy_out(reader, at, &header, sizeof(header));
        if (header.size < sizeof(header) || header.size > head - at)
            return -EPROTO;
        error = take_record(reader, at, &header, take, argument);
        at += header.size;
    }
    __atomic_store_n(&page->data_tail, at, __ATOMIC_RELEASE);
    return error;
}
