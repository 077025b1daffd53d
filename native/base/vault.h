/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vault: a sparse memfd that stays open in the VMM and holds everything about one VM that must outlive a
 * pager: who is attached how, the regions, the page table, ages, statistics, the budget and the compressed pool.
 *
 *   0          header          (FL_VAULT_HEADER_BYTES)
 *   gate       code and data of what runs inside the VMM (attach/gate.h)
 *   stats      struct fl_stats
 *   slab_map   one bit a slab of the pool
 *   ages       one byte a page
 *   table      eight bytes a page (swap/entry.h)
 *   pool       compressed pages (store/pool.h)
 *
 * All offsets follow from `max_pages`, so a damaged header cannot point anywhere else. The file is sealed against
 * growing and shrinking: no mapping of it can be cut off under a reader.
 */
#ifndef FL_BASE_VAULT_H
#define FL_BASE_VAULT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "attach/attach.h"
#include "base/refused.h"

#define FL_VAULT_MAGIC UINT64_C(0x746c7561765f4c46) /* "FL_vault" */
#define FL_VAULT_VERSION 5
#define FL_VAULT_HEADER_BYTES UINT64_C(65536)
#define FL_VAULT_MAX_PAGES (UINT64_C(1) << 30) /* 4 TiB of guest memory */
#define FL_SCAN_MS_MIN 100u                    /* each scan stops the VMM's main thread */
#define FL_SCAN_MS_MAX 3600000u

enum fl_vault_phase {
    FL_VAULT_NEW = 0,        /* made, maybe handed in */
    FL_VAULT_REGISTERED = 1, /* regions are registered with the userfaultfd */
    FL_VAULT_DETACHING = 2,  /* drained; what was injected is being closed */
};

/* A region. Written once, then only vmm_addr and gone change. */
struct fl_vault_region {
    _Atomic(uint64_t) vmm_addr;
    uint64_t length;
    uint64_t file_offset;
    uint64_t inode;
    uint64_t first_page;
    _Atomic(uint32_t) gone; /* unmapped by the VMM */
    uint32_t check;         /* over length, file_offset, inode, first_page */
};

/* The lease and what it allows, written by the control thread, read by the mover and by successors. */
struct fl_vault_budget {
    _Atomic(uint64_t) bytes;
    _Atomic(uint64_t) rate_bytes;
    _Atomic(uint64_t) generation;
    _Atomic(uint64_t) lease_until_ns;
    _Atomic(uint64_t) min_age_ns;
    _Atomic(uint32_t) drain; /* a drain was asked for and holds until the next budget */
};

#define FL_FORGETTING_MAX 64u /* removals that are being forgotten at the same time */

struct fl_note { /* of pages [first, end); nothing: the end is 0 */
    _Atomic(uint64_t) first, end;
};

struct fl_vault_header {
    /* constant, under `check` */
    uint64_t magic;
    uint32_t version;
    uint32_t abi;
    uint64_t max_pages;
    uint64_t vmm_start_ticks;
    uint64_t created_ns;
    uint32_t vmm_pid;
    uint32_t reserved;
    uint64_t check;

    /* mutable */
    _Atomic(uint32_t) phase; /* enum fl_vault_phase */
    _Atomic(uint32_t) region_count;
    struct fl_attachment attachment; /* written by the attaching child through the shared mapping */
    _Atomic(uint32_t) corrupt;       /* a checksum failed: nothing is evicted from this VM any more */
    _Atomic(uint32_t) unsafe;        /* enum fl_refusal found after attaching */
    _Atomic(uint32_t) scan_interval_ms;
    _Atomic(uint32_t) armed;           /* enum fl_tracker_kind whose arming the next scan can harvest */
    _Atomic(uint32_t) age_interval_ms; /* in which the ages are counted (track/age.h); 0: nobody knows */
    _Atomic(uint64_t) aged_ns;         /* when they began to move for the last time; 0: never */
    _Atomic(uint32_t) pager_pid;
    _Atomic(uint32_t) freeze;        /* enum fl_freeze: how the regions are registered */
    _Atomic(uint64_t) uffd_features; /* that the userfaultfd was set up with: fixed for its life */
    /* Range that our own zap is dropping (swap/removed.h); end 0: none. */
    _Atomic(uint64_t) zap_start;
    _Atomic(uint64_t) zap_end;
    struct fl_note forgetting[FL_FORGETTING_MAX]; /* a copy of struct fl_removals', for the next pager */
    struct fl_vault_budget budget;
    struct fl_vault_region regions[FL_MAX_REGIONS];
};
_Static_assert(sizeof(struct fl_vault_header) <= FL_VAULT_HEADER_BYTES, "vault header outgrew its place");

/* Statistics area. `sequence` is odd while the mover writes gauges; counters are plain atomic adds. */
struct fl_stats {
    _Atomic(uint64_t) sequence;
    struct fl_status status;
    _Atomic(uint64_t) record_sequence;
    struct fl_record records[FL_RECORDS_MAX];
};

struct fl_vault {
    int fd;
    bool writable;
    uint64_t file_bytes;
    uint64_t max_pages;
    uint8_t *base; /* the whole file, one mapping */
    struct fl_vault_header *header;
    /*
     * The regions as they were checked, and what became of them since. Those in the header are for the next pager: the
     * VMM can write there, and nothing that is read from there twice is what it was.
     */
    struct fl_vault_region regions[FL_MAX_REGIONS];
    _Atomic(uint32_t) region_count;
    struct fl_stats *stats;
    uint8_t *ages;
    _Atomic(uint64_t) *table;
    uint8_t *slab_map;
    uint8_t *pool;
    uint64_t gate_offset;
    uint64_t pool_offset;
    uint64_t pool_bytes;
};

/*
 * Make a vault for a VMM with `memory_bytes` of guest memory (room is left for what is plugged in later) and map it.
 * Returns 0 or a negative errno.
 */
int fl_vault_create(int vmm_pid, uint64_t vmm_start_ticks, uint64_t memory_bytes, struct fl_vault *out);
/*
 * Map the vault behind `fd` (taken over when this succeeds) after checking size, seals, magic, version, layout,
 * regions, and that it belongs to this VMM. 0, or -EPERM with FL_REFUSAL_VAULT_INVALID.
 */
int fl_vault_map(int fd, bool writable, int vmm_pid, uint64_t vmm_start_ticks, struct fl_vault *out,
                 struct fl_refused *why);
/* Write region `index` down, with its check. It counts when fl_vault_count_regions() says so. */
void fl_vault_put_region(struct fl_vault *vault, uint32_t index, struct fl_vault_region region);
void fl_vault_count_regions(struct fl_vault *vault, uint32_t count);
/* Regions move within the VMM's address space, and leave it. */
void fl_vault_move_region(struct fl_vault *vault, uint32_t index, uint64_t vmm_addr);
void fl_vault_leave_region(struct fl_vault *vault, uint32_t index);
/* How often to scan: what the vault says, within limits. */
uint32_t fl_vault_scan_interval_ms(const struct fl_vault *vault);
/* How often it was when the ages were counted, within the same limits; 0: nobody knows what they count. */
uint32_t fl_vault_age_interval_ms(const struct fl_vault *vault);
void fl_vault_close(struct fl_vault *vault);

#endif
