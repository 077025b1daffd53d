/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frostline's public C interface: what the agent (through cffi) and the tools see of the pages.
 *
 *   1. Inspect a VMM          may this process be served, and if not, why (no side effects)
 *   2. View a vault           counters, histograms and records of one VM, read-only, pager alive or not
 *   3. Command a pager        budget, prefetch, drain, detach, release over its local socket
 *
 * Conventions. Functions return 0 or a negative errno; results go to the last argument. Sizes are bytes
 * unless the name says pages; times are nanoseconds of CLOCK_BOOTTIME unless the name says otherwise.
 * A page is 4096 bytes. Structs carry no pointers: they are copied whole between processes of one build,
 * and `FL_ABI` changes whenever one of them does.
 */
#ifndef FROSTLINE_H
#define FROSTLINE_H

#include <stdint.h>

/* cffi:begin */
#define FL_ABI 3
#define FL_PAGE_SIZE 4096
#define FL_MAX_REGIONS 64
#define FL_AGE_BINS 16
#define FL_LATENCY_BUCKETS 64
#define FL_DETAIL_BYTES 256
#define FL_RECORDS_MAX 1024
#define FL_TRACKERS 4
#define FL_SCAN_INTERVAL_MS 10000 /* between scans, when nobody says otherwise */

/* Version of the library, e.g. "0.1.0". */
const char *fl_version(void);

/* ---- 1. Inspect ------------------------------------------------------------------------------------------- */

/* Why a VM is not served. The numbers are wire format: never reuse one. */
enum fl_refusal {
    FL_REFUSAL_NONE = 0,
    FL_REFUSAL_GONE = 1,             /* the process has ended */
    FL_REFUSAL_NOT_SHARED_MEMFD = 2, /* guest memory is private, anonymous, or not in a memfd */
    FL_REFUSAL_PASSTHROUGH = 3,      /* VFIO device open, or memory pinned */
    FL_REFUSAL_LOCKED = 4,           /* guest memory is mlocked */
    FL_REFUSAL_OTHER_MAPPER = 5,     /* another process maps the memfd (vhost-user) */
    FL_REFUSAL_FOREIGN_UFFD = 6,     /* another userfaultfd owns the range */
    FL_REFUSAL_ALREADY_SERVED = 7,   /* a living pager holds the vault */
    FL_REFUSAL_TRACED = 8,           /* a debugger or another tracer is attached */
    FL_REFUSAL_SECCOMP = 9,          /* the VMM's seccomp filter forbids a system call that attaching needs */
    FL_REFUSAL_PERMISSION = 10,      /* this process may not trace the VMM or open userfaultfd */
    FL_REFUSAL_KERNEL = 11,          /* the kernel lacks a feature that is needed */
    FL_REFUSAL_VAULT_INVALID = 12,   /* a vault is there, but truncated, damaged or of another version */
    FL_REFUSAL_HUGETLB = 13,         /* on hugetlbfs, or the host may give it huge pages */
    FL_REFUSAL_STUCK = 14,           /* the VMM's main thread did not stop in time; try again */
    FL_REFUSAL_LIMIT = 15,           /* more regions or memory than the vault can describe */
    FL_REFUSAL_INTERNAL = 16         /* anything else; the detail says what */
};

/* Stable lower-case word for a refusal, e.g. "not_shared_memfd"; "unknown" for other numbers. */
const char *fl_refusal_name(uint32_t refusal);

struct fl_region {
    uint64_t vmm_addr;    /* where the VMM maps it */
    uint64_t length;      /* bytes */
    uint64_t file_offset; /* offset of its first byte in the memfd */
    uint64_t inode;       /* of the memfd */
    uint64_t first_page;  /* index of its first page in the vault; 0 before attaching */
};

struct fl_inspection {
    uint32_t refusal; /* enum fl_refusal */
    uint32_t region_count;
    struct fl_region regions[FL_MAX_REGIONS];
    uint64_t memory_bytes;        /* sum of region lengths */
    uint64_t start_time_ticks;    /* field 22 of /proc/PID/stat: tells a reused pid */
    uint32_t uid;                 /* effective user of the VMM */
    uint32_t seccomp_mode;        /* 0 none, 1 strict, 2 filter */
    uint32_t served_by_pid;       /* living pager, or 0 */
    uint32_t has_vault;           /* 1: attached before (pager alive or not) */
    char detail[FL_DETAIL_BYTES]; /* a sentence for people: what was found and what to do */
};

/* Look at a process without touching it. Returns 0 also when the answer is a refusal. */
int fl_inspect(int pid, struct fl_inspection *out);

struct fl_kernel_features {
    uint32_t userfaultfd_device;  /* /dev/userfaultfd opens */
    uint32_t userfaultfd_syscall; /* userfaultfd() allowed to this process */
    uint32_t missing_shmem;
    uint32_t minor_shmem;
    uint32_t wp_shmem; /* tried: it freezes pages that are mapped and pages that are not */
    uint32_t poison;
    uint32_t move;
    uint32_t rwp;                   /* read-write protection (Linux 7.3), tried in both modes, with PAGE_IS_ACCESSED */
    uint32_t events;                /* REMOVE, REMAP, UNMAP, FORK */
    uint32_t pagemap_scan;          /* tried */
    uint32_t idle_page_tracking;    /* tried: the page_idle bitmap can be written and read */
    uint32_t damon_vaddr;           /* DAMON's sysfs is there, and so is its code for virtual addresses */
    uint32_t ptrace_seccomp_filter; /* filters of a tracee can be read */
    uint64_t raw_features;          /* uffdio_api.features as the kernel said */
    /* A sentence: why it is not there, or which part of what the kernel offers does not work. Empty when it is there. */
    char wp_lacks[FL_DETAIL_BYTES];
    char rwp_lacks[FL_DETAIL_BYTES];
    char pagemap_scan_lacks[FL_DETAIL_BYTES];
    char idle_lacks[FL_DETAIL_BYTES];
    char damon_lacks[FL_DETAIL_BYTES];
};

/* Probe this host's kernel by trying, with throwaway descriptors and pages; never compares versions. */
int fl_probe_kernel(struct fl_kernel_features *out);

/* Ways to see which pages are touched. */
enum fl_tracker_kind {
    FL_TRACKER_NONE = 0,
    FL_TRACKER_RWP = 1,   /* userfaultfd read-write protection, async */
    FL_TRACKER_ZAP = 2,   /* drop page table entries, see which come back */
    FL_TRACKER_IDLE = 3,  /* ACCESS bits by the page_idle bitmap */
    FL_TRACKER_DAMON = 4, /* ACCESS bits by DAMON's fvaddr operations */
};
/* "rwp", "zap", "idle", "damon"; "none" and "unknown" for other numbers. */
const char *fl_tracker_name(uint32_t tracker);

struct fl_tracker_probe {
    uint32_t tracker;             /* enum fl_tracker_kind */
    uint32_t possible;            /* 1: it can be used here */
    char detail[FL_DETAIL_BYTES]; /* a sentence: what it gives, or what is missing and how to get it */
};
/*
 * What each tracker would do for a pager that starts at process `pid` as it is now (0: at any VM of this host), in the
 * order in which a pager prefers them. Where it was attached to before, its vault knows its memory, its scan interval, how
 * its memory is registered, and whether that can be changed; else the first two are as given here, 0 being unknown and
 * FL_SCAN_INTERVAL_MS. Touches nothing. 0 or a negative errno.
 */
int fl_probe_trackers(int pid, uint64_t memory_bytes, uint32_t scan_interval_ms,
                      struct fl_tracker_probe *out /* FL_TRACKERS of them */);
/* Put back what pagers that were killed have left changed on this host (DAMON), unless a living one needs it. */
void fl_tidy_host(void);

/* How a page is held still while it is copied out; fixed by how its range is registered. */
enum fl_freeze {
    FL_FREEZE_NONE = 0,
    FL_FREEZE_WP = 1,  /* write-protected: readers go on, a write cancels */
    FL_FREEZE_RWP = 2, /* read-write-protected in sync mode: any touch cancels */
};
/* "wp", "rwp"; "none" and "unknown" for other numbers. */
const char *fl_freeze_name(uint32_t freeze);

/* ---- 2. View ---------------------------------------------------------------------------------------------- */

enum fl_state {
    FL_STATE_STARTING = 0,
    FL_STATE_ACTIVE = 1,   /* lease valid: may evict within the budget */
    FL_STATE_HOLD = 2,     /* no valid lease: no new evictions, faults served */
    FL_STATE_DRAIN = 3,    /* bringing everything back, then detaches or holds */
    FL_STATE_CORRUPT = 4,  /* a checksum failed: nothing more is evicted from this VM */
    FL_STATE_DETACHED = 5, /* nothing is away and nothing is registered any more */
    FL_STATE_RELEASED = 6  /* pager left politely; the next one may take over */
};
const char *fl_state_name(uint32_t state);

/* Why nothing is evicted right now, in order of precedence. */
enum fl_why {
    FL_WHY_EVICTING = 0,     /* nothing stands in the way */
    FL_WHY_LEASE = 1,        /* no lease, or it has run out */
    FL_WHY_BUDGET = 2,       /* the budget is used up */
    FL_WHY_NOTHING_COLD = 3, /* no page is as old as the budget's minimum age */
    FL_WHY_RATE = 4,         /* rate limit */
    FL_WHY_BRAKE = 5,        /* the VM stalls too much in our faults */
    FL_WHY_TIER_FULL = 6,    /* pool limit or host memory */
    FL_WHY_CORRUPT = 7,
    FL_WHY_DRAIN = 8,
    FL_WHY_UNSAFE = 9,     /* found after attaching: other mapper, fork, locked memory; see refusal */
    FL_WHY_FAILED = 10,    /* the last try did, and is repeated; the pager's log says what */
    FL_WHY_NO_TRACKER = 11 /* none of those that may be used works */
};
const char *fl_why_name(uint32_t why);

/* Lowest age of each bin, in scans; a bin ends where the next begins, the last one is open. */
uint32_t fl_age_bin_edge(uint32_t bin);
/* Upper edge of a latency bucket in nanoseconds (buckets grow by a factor of 2^(1/4), from 256 ns). */
uint64_t fl_latency_bucket_edge(uint32_t bucket);

struct fl_status {
    uint32_t abi;     /* FL_ABI of the writer */
    uint32_t state;   /* enum fl_state */
    uint32_t why;     /* enum fl_why */
    uint32_t refusal; /* with FL_WHY_UNSAFE: the reason found */
    uint32_t vmm_pid;
    uint32_t pager_pid;
    uint32_t pager_alive; /* 1 while a pager holds the vault's lock (filled in by the reader) */
    uint32_t takeovers;   /* pagers after the first */
    uint64_t now_ns;      /* reader's CLOCK_BOOTTIME */
    uint64_t attached_at_ns;
    uint64_t pager_started_ns;
    uint64_t takeover_ns;    /* how long the last pager took from start to serving */
    uint64_t attach_stop_ns; /* how long the VMM's main thread was stopped by attaching */

    /* budget in force */
    uint64_t budget_bytes;          /* most guest bytes that may be away */
    uint64_t budget_rate_bytes;     /* per second; 0 = no limit */
    uint64_t budget_generation;     /* the author's number, shown in records */
    uint64_t budget_lease_until_ns; /* 0 = none */
    uint64_t budget_min_age_ns;     /* pages idle for less stay */
    uint32_t brake_permille;        /* share of the budget that the local brake leaves, 1000 = all */
    uint32_t tracker_grain;         /* pages of which one speaks for all; 1: exact to a page; 0: no tracker yet */

    /* memory */
    uint64_t memory_bytes;   /* of all regions */
    uint64_t resident_bytes; /* in host RAM, as of the last scan */
    uint64_t swapped_bytes;  /* of the VMM's memory swapped out by the host kernel itself, as of the last scan */
    uint64_t evicted_pages;
    uint64_t evicted_zero_pages;
    uint64_t evicted_same_pages;
    uint64_t evicted_ram_pages;
    uint64_t stored_bytes;   /* compressed payload in the pool */
    uint64_t pool_bytes;     /* host RAM that the pool holds */
    uint64_t metadata_bytes; /* page table, ages, stats in host RAM */

    /* hotness, as of the last scan: bytes by age, and accesses by the age the page had */
    uint64_t scan_interval_ns; /* in which the ages are counted */
    uint64_t scans;
    uint64_t last_scan_ns; /* time at its end */
    uint64_t last_scan_took_ns;
    uint64_t scan_failures;     /* void scans: no page got older */
    uint32_t tracker;           /* enum fl_tracker_kind in use */
    uint32_t freeze;            /* enum fl_freeze in use */
    uint64_t tracker_switches;  /* a tracker failed for good and the next one took over */
    uint64_t arm_ns;            /* cumulative: time spent in arming; rwp, zap: and in the look before it */
    uint64_t harvest_ns;        /* cumulative: time spent in harvesting; rwp, zap: what the look has found */
    uint64_t scan_stop_max_ns;  /* longest single stop or chunk of an arming so far */
    uint64_t sync_windows;      /* FL_FREEZE_RWP: how often sync mode was entered */
    uint64_t sync_long_windows; /* FL_FREEZE_RWP: how often that took longer than 5 ms */
    uint64_t sync_max_ns;       /* FL_FREEZE_RWP: longest time in sync mode so far */
    uint64_t working_set_bytes; /* touched in the last 120 s */
    uint64_t resident_age_bytes[FL_AGE_BINS];
    uint64_t evicted_age_bytes[FL_AGE_BINS];
    uint64_t promotions[FL_AGE_BINS]; /* cumulative accesses */

    /* counters, cumulative over the vault's life */
    uint64_t evictions;           /* pages stored and punched */
    uint64_t evictions_cancelled; /* touched while frozen */
    uint64_t rejected_pages;      /* did not compress well enough */
    uint64_t faults;              /* pages loaded because touched */
    uint64_t zero_fills;          /* first touches of memory that was never there */
    uint64_t write_faults;        /* touched while protected, resolved by un-protecting */
    uint64_t minor_faults;        /* in host RAM but not mapped in the VMM, resolved by mapping */
    uint64_t prefetched_pages;
    uint64_t drained_pages;
    uint64_t removed_pages; /* stored copies forgotten because the VMM freed the memory */
    uint64_t checksum_errors;
    uint64_t poisoned_pages;
    uint64_t stale_messages; /* messages that needed nothing */
    uint64_t stall_ns;       /* sum of the time threads waited for loads, or for a page held still or not mapped */
    uint64_t compacted_pages;
    uint64_t recovered_pages;                   /* in-flight pages put right by takeovers */
    uint64_t fault_latency[FL_LATENCY_BUCKETS]; /* count by time from message to wake */
};

/* What the pager did, for traces. */
enum fl_record_kind {
    FL_RECORD_SCAN = 1,  /* pages = accessed, bytes = resident */
    FL_RECORD_APPLY = 2, /* a budget was applied; bytes = budget */
    FL_RECORD_EVICT = 3, /* one burst of evictions; pages = evicted, bytes = stored bytes */
    FL_RECORD_FAULT = 4, /* sampled; pages = 1, bytes = stored bytes, page = which */
    FL_RECORD_DRAIN = 5,
    FL_RECORD_PREFETCH = 6,
    FL_RECORD_TAKEOVER = 7, /* pages = put right */
    FL_RECORD_ERROR = 8     /* page = which, bytes = enum fl_why or errno */
};
struct fl_record {
    uint64_t sequence; /* from 1, no gaps in a vault's life */
    uint32_t kind;     /* enum fl_record_kind */
    uint32_t tier;     /* 0 zero, 1 same, 2 ram; for EVICT/FAULT */
    uint64_t start_ns;
    uint64_t end_ns;
    uint64_t pages;
    uint64_t bytes;
    uint64_t page;
    uint64_t generation; /* of the budget in force */
};

struct fl_view;
/* Find and map (read-only) the vault of a VMM that was attached to. -ENOENT: none; -EPROTO: not usable. */
int fl_view_open(int vmm_pid, struct fl_view **out);
void fl_view_close(struct fl_view *view);
/* A consistent copy of the status. */
int fl_view_status(struct fl_view *view, struct fl_status *out);
/*
 * Copy up to `max` records with sequence > *cursor, oldest first, and advance *cursor.
 * Returns the number copied; *lost gets how many were overwritten before they could be read.
 */
int fl_view_records(struct fl_view *view, uint64_t *cursor, struct fl_record *out, uint32_t max, uint64_t *lost);
/* Nanoseconds below which `permille` of the counted faults lie; 0 when none were counted. */
uint64_t fl_latency_percentile(const uint64_t *buckets, uint32_t permille);

/* ---- 3. Command ------------------------------------------------------------------------------------------- */

enum fl_command_kind {
    FL_COMMAND_PING = 1,
    FL_COMMAND_BUDGET = 2,   /* uses the budget fields */
    FL_COMMAND_SCAN = 3,     /* scan now, and count it as a scan */
    FL_COMMAND_PREFETCH = 4, /* pages [first_page, first_page + page_count) back ahead of a touch */
    FL_COMMAND_DRAIN = 5,    /* everything back; stays attached, budget 0 */
    FL_COMMAND_DETACH = 6,   /* drain, unregister, close what was injected, end */
    FL_COMMAND_RELEASE = 7   /* end at once in good order, everything stays as it is for the next pager; -EBUSY while a
                                forked child waits for pages */
};
struct fl_command {
    uint32_t abi;  /* FL_ABI; anything else is answered with -EPROTO */
    uint32_t kind; /* enum fl_command_kind */
    uint64_t budget_bytes;
    uint64_t rate_bytes; /* evicted guest bytes per second; 0 = no limit */
    uint64_t lease_ns;   /* from now; 0 revokes */
    uint64_t generation;
    uint64_t first_page;
    uint64_t page_count;
    uint64_t min_age_ns;       /* a page goes only when it was idle for so long in whole scans, and for one at least */
    uint32_t scan_interval_ms; /* 0 = leave as it is */
};
struct fl_reply {
    uint32_t abi;
    int32_t error;  /* 0 or negative errno */
    uint32_t state; /* enum fl_state */
    uint32_t pager_pid;
    uint64_t evicted_pages; /* still away */
    char detail[FL_DETAIL_BYTES];
};

struct fl_pager;
/* Connect to a pager's socket (AF_UNIX, SOCK_SEQPACKET). The peer must be this user or root. */
int fl_pager_connect(const char *socket_path, struct fl_pager **out);
void fl_pager_close(struct fl_pager *pager);
/*
 * Send one command and wait for its answer, at most `timeout_ms`. DRAIN and DETACH answer at once that they
 * have begun; follow them in the view. Returns -ETIMEDOUT, -EPIPE, or the transport's errno; the pager's own
 * verdict is in reply->error.
 */
int fl_pager_call(struct fl_pager *pager, const struct fl_command *command, struct fl_reply *reply, int timeout_ms);

/* Exit codes of frostline-pager. A refusal exits with FL_EXIT_REFUSED + enum fl_refusal. */
#define FL_EXIT_OK 0 /* detached, or released */
#define FL_EXIT_USAGE 2
#define FL_EXIT_VM_GONE 3 /* the VMM ended; nothing is left to serve */
#define FL_EXIT_FAILED 4  /* an internal error; the VM waits for the next pager */
#define FL_EXIT_REFUSED 64
/* cffi:end */

#endif
