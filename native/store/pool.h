/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tier `ram`: compressed pages in slabs inside the vault.
 *
 * The page table (swap/) is the only truth. Whatever this file keeps in the vault about what is allocated may be
 * stale after a kill, and fl_pool_rebuild_*() makes it right from the table. Contents of the vault are never
 * trusted with memory safety: sizes, classes and lists that the pool relies on are private to the process.
 *
 * Threads. One mover thread puts, compacts, trims and rebuilds. Any number of fault threads get and free. Stats
 * and limit: any thread. fl_pool_get() takes no lock; fl_pool_free() takes a private mutex for some tens of
 * nanoseconds, under which nobody makes a system call.
 *
 * Who may read an object. The pool does not pin what fl_pool_get() returned. It stays as it is while the reader
 * owns the page table entry that names it, i.e. while the entry is in a state in which the relocate callback
 * answers false and nobody else frees it. A reader that owns nothing must look at the entry again before it
 * believes a mismatch.
 */
#ifndef FL_STORE_POOL_H
#define FL_STORE_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "store/codec.h"

#define FL_SLAB_BYTES 32768u
/* Handles are byte offset in the pool / 8, never 0, and below this. */
#define FL_HANDLE_END (1ull << 45)

struct fl_object {
    uint64_t checksum; /* fl_page_checksum() of the plain page */
    uint32_t page;
    uint16_t length; /* of the payload */
    uint16_t magic;
    uint8_t payload[];
};

struct fl_pool;

/* ---- Open and close --------------------------------------------------------------------------------------- */

/* Bytes of slab map (one bit a slab) that a pool of this capacity needs, a multiple of 8. */
uint64_t fl_pool_map_bytes(uint64_t capacity_bytes);

/*
 * `base` maps `capacity_bytes` of the vault from `pool_file_offset`, shared and writable, page-aligned. The last
 * 64 KiB are never used: they catch a reader whose object's length was scribbled over while it read.
 * `slab_map` is in the vault too, aligned to 8, all zero when the vault is new. Slabs marked in it are left alone
 * until fl_pool_rebuild_begin(). The descriptor and the mapping stay the caller's and outlive the pool.
 * Private memory: 16 bytes a slab, touched only for slabs in use (lock with MCL_ONFAULT).
 * -EINVAL: misaligned, or capacity below 128 KiB or above 128 TiB; -ENOMEM.
 */
int fl_pool_open(void *base, uint64_t capacity_bytes, int vault_fd, uint64_t pool_file_offset, void *slab_map,
                 uint64_t limit_bytes, struct fl_pool **out);
/* Forgets the private part; the vault keeps everything. */
void fl_pool_close(struct fl_pool *pool);

/* ---- Objects ---------------------------------------------------------------------------------------------- */

/*
 * Store a payload of 1..FL_PAYLOAD_MAX bytes for a page index below 2^32. Mover only. The object is complete
 * when this returns; publish the handle with release order.
 * -ENOSPC: at the limit, or the host gives no memory; nothing changed. -EINVAL: arguments.
 */
int fl_pool_put(struct fl_pool *pool, uint64_t page, uint64_t checksum, const void *payload, uint32_t length,
                uint64_t *handle);

/*
 * Find an object. No lock. -EBADMSG: the handle is not one of a slot in use's class, or what is there is no live
 * object. Copy `length` once and check it against FL_PAYLOAD_MAX (fl_decompress() does), check `page`, and
 * the checksum of what comes out.
 */
int fl_pool_get(struct fl_pool *pool, uint64_t handle, const struct fl_object **out);

/* Give an object's room back. No system call. -EINVAL: bad handle, or freed already; nothing changed. */
int fl_pool_free(struct fl_pool *pool, uint64_t handle);

/* ---- Upkeep, mover only ----------------------------------------------------------------------------------- */

/* Punch empty slabs out of the vault, all but a small reserve, at most 1024 a call. Returns bytes given back. */
uint64_t fl_pool_trim(struct fl_pool *pool);

/*
 * The object of `page` has been copied: make the page table name new_handle where it names old_handle, and say
 * whether that was done (false: the page was loaded, freed or claimed meanwhile). `page` comes from the vault:
 * check its range. Called without locks held; it must not call the pool.
 */
typedef bool (*fl_relocate_fn)(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle);

/*
 * When more than 10 % of what is stored + 256 KiB is wasted, empty the emptiest slabs into fuller ones until it is 8 %
 * + 128 KiB, copying at most `max_objects` a call. Returns objects moved; 0 means there is nothing (more) to gain.
 */
uint32_t fl_pool_compact(struct fl_pool *pool, uint32_t max_objects, fl_relocate_fn relocate, void *context);

/* ---- After a crash, before any other thread uses the pool ------------------------------------------------- */

/*
 * Forget what is allocated. Slabs with a damaged header are put aside: neither readable nor reused. -ENOMEM: no room
 * for the marks; nothing changed.
 */
int fl_pool_rebuild_begin(struct fl_pool *pool);
/*
 * The page table names this object. Reads nothing of the object itself: its page and checksum are checked on load.
 * -EBADMSG: no such slot, or the slab is damaged; -EEXIST: another entry named this slot before. A handle that was
 * refused must never be passed to fl_pool_free().
 */
int fl_pool_rebuild_mark(struct fl_pool *pool, uint64_t handle, uint64_t page);
/* Everything that was not marked is free again; slabs without a mark go back to the host. */
void fl_pool_rebuild_end(struct fl_pool *pool);

/* ---- Numbers ---------------------------------------------------------------------------------------------- */

struct fl_pool_stats {
    uint64_t stored_bytes; /* payloads */
    uint64_t pool_bytes;   /* host memory in slabs, the reserve and slabs put aside included */
    uint64_t objects;
    uint64_t limit_bytes; /* on pool_bytes */
    uint64_t empty_bytes; /* part of pool_bytes: what fl_pool_trim() may give back, and the reserve */
    uint64_t aside_bytes; /* part of pool_bytes: damaged slabs */
};
void fl_pool_stats(struct fl_pool *pool, struct fl_pool_stats *out);

/* A limit below what is held stops growth at once; what is stored stays. */
void fl_pool_set_limit(struct fl_pool *pool, uint64_t limit_bytes);

#endif
