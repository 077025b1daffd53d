/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One VM as its pager holds it. Everything here is process-private; what must survive is in the vault.
 *
 * Threads: one mover (scans, evicts, drains, compacts), any number of fault threads, one control thread. They meet
 * in the page table (compare-and-swap only), the pool (its own lock), the counters (atomic adds) and the regions
 * (append-only; addresses are atomic).
 */
#ifndef FL_SWAP_VM_H
#define FL_SWAP_VM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/vault.h"
#include "store/codec.h"
#include "store/pool.h"
#include "swap/entry.h"

#define FL_WINDOW_PAGES 512u  /* pages looked at in one step: 2 MiB */
#define FL_CACHED_PAGES 8192u /* asked of in one call */
#define FL_FORKS_MAX 256
#define FL_REMOVALS_MAX 64u /* that are put off */
#define FL_BATCH_PAGES 64u  /* pages moved by one system call: 256 KiB, so that buffers stay in the L2 cache */

struct fl_memory { /* what the pager holds of one region beside the vault's record */
    int fd;        /* the memfd, opened anew: our own description */
    void *mapping; /* never touched (a touch would fill a hole); mincore asks through it */
};

struct fl_range {
    uint64_t start, end;
};

struct fl_pages { /* [first, end) */
    uint64_t first, end;
};

struct fl_removals {         /* swap/removed.h */
    _Atomic(uint64_t) reads; /* of the userfaultfd; odd while what one says has not been noted */
    _Atomic(uint32_t) forgetting_count;
    struct fl_note forgetting[FL_FORGETTING_MAX];
    /* While our own zap is under way: */
    _Atomic(uint64_t) zaps; /* that were marked */
    _Atomic(bool) zap_seen;
    _Atomic(uint64_t) zap_start, zap_end; /* VMM addresses, if it was seen */
    struct fl_note taken_for_ours;        /* then, by its bounds */
    _Atomic(uint32_t) before_seen;        /* of those below: true, once our own has been seen */
    _Atomic(uint32_t) count; /* of what is put off; may pass the limit, and what is beyond keeps its old content */
    struct fl_note put_off[FL_REMOVALS_MAX];
};

struct fl_vm {
    int pid;
    int pidfd;
    int uffd;
    int pagemap_fd;
    uint64_t uffd_features; /* what it was set up with */
    enum fl_freeze freeze;  /* as in the vault */
    struct fl_vault vault;
    struct fl_pool *pool;
    struct fl_memory memory[FL_MAX_REGIONS]; /* index as in the vault's regions */
    struct fl_removals removals;
    _Atomic(uint32_t) gone;           /* the VMM has ended: stop quietly */
    _Atomic(uint32_t) unsafe_events;  /* that came, and made the VM unsafe */
    _Atomic(bool) parted;             /* parts of regions are not mapped there any more: other memory may be */
    _Atomic(uint32_t) remap_pending;  /* an UNMAP or FORK event waits for the mover */
    _Atomic(int) forks[FL_FORKS_MAX]; /* userfaultfds of forked children that wait for a drain; -1: none */
};

static inline struct fl_vault_region *fl_region(struct fl_vm *vm, uint32_t index) {
    return &vm->vault.regions[index];
}

static inline uint32_t fl_region_count(struct fl_vm *vm) {
    return atomic_load_explicit(&vm->vault.region_count, memory_order_acquire);
}

static inline fl_entry_slot *fl_slot(struct fl_vm *vm, uint64_t page) {
    return &vm->vault.table[page];
}

/* Page index and region of a VMM address; false when it lies in none. */
bool fl_page_of_address(struct fl_vm *vm, uint64_t address, uint64_t *page, uint32_t *region);
/* VMM address of a page that lies in `region`. */
static inline uint64_t fl_address_of_page(struct fl_vm *vm, uint32_t region, uint64_t page) {
    struct fl_vault_region *r = fl_region(vm, region);
    return atomic_load_explicit(&r->vmm_addr, memory_order_acquire) + (page - r->first_page) * FL_PAGE_SIZE;
}
static inline uint64_t fl_offset_of_page(struct fl_vm *vm, uint32_t region, uint64_t page) {
    struct fl_vault_region *r = fl_region(vm, region);
    return r->file_offset + (page - r->first_page) * FL_PAGE_SIZE;
}
static inline uint64_t fl_region_pages(struct fl_vm *vm, uint32_t region) {
    return fl_region(vm, region)->length / FL_PAGE_SIZE;
}
/* Region of a page index; the page must belong to one. */
bool fl_region_of_page(struct fl_vm *vm, uint64_t page, uint32_t *region);
/*
 * Which of the pages [first, first + count) of `region`, count <= FL_CACHED_PAGES, are in host RAM: bit i of `cached` is
 * page first + i. Fills no hole, and brings nothing in from swap. 0 or a negative errno.
 */
int fl_pages_cached(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count, uint64_t *cached);
/*
 * How many of them the kernel holds in RAM, with those that it is moving to another frame at this moment, which
 * fl_pages_cached() may not show. Negative errno: -ENOSYS without CONFIG_CACHESTAT_SYSCALL.
 */
int64_t fl_pages_held(struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count);
/*
 * Whether the file has this page, in RAM, on its way to another frame, or swapped out by the host: 1 or 0 (a hole), or a
 * negative errno. Waits, no longer than some 50 ms, while the kernel says both.
 */
int fl_file_has(struct fl_vm *vm, uint32_t region, uint64_t page);

static inline bool fl_swap_entry(struct fl_vm *vm, uint64_t page, fl_entry *expected, fl_entry desired) {
    return atomic_compare_exchange_strong_explicit(fl_slot(vm, page), expected, desired, memory_order_acq_rel,
                                                   memory_order_acquire);
}

/* Whether the VMM has freed a page that we own as `mine`, PUNCHING or LOADING. */
bool fl_freed(struct fl_vm *vm, uint64_t page, fl_entry mine);
/* Make `after` of it. False: it has been freed, is a hole now, and what `mine` names is for its owner to discard. */
bool fl_settle(struct fl_vm *vm, uint64_t page, fl_entry mine, fl_entry after);

#define FL_COUNT(vm, field, n) __atomic_fetch_add(&(vm)->vault.stats->status.field, (uint64_t)(n), __ATOMIC_RELAXED)
#define FL_UNCOUNT(vm, field, n) __atomic_fetch_sub(&(vm)->vault.stats->status.field, (uint64_t)(n), __ATOMIC_RELAXED)
#define FL_READ(vm, field) __atomic_load_n(&(vm)->vault.stats->status.field, __ATOMIC_RELAXED)
#define FL_SET(vm, field, value) __atomic_store_n(&(vm)->vault.stats->status.field, (value), __ATOMIC_RELAXED)

/* Whether children of forks still wait for a drain. Their userfaultfds die with us, and their holes would read as zeros then. */
bool fl_forks_wait(struct fl_vm *vm);

/* Pages of a tier entered or left the away state. */
void fl_count_away(struct fl_vm *vm, enum fl_tier tier, int64_t pages);
/* Append a record for traces. */
void fl_record(struct fl_vm *vm, enum fl_record_kind kind, enum fl_tier tier, uint64_t start_ns, uint64_t pages,
               uint64_t bytes, uint64_t page);

#endif
