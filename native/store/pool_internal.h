/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside the pool: slabs, what is private about them, and the lists they are on. Only store/pool*.c includes this.
 *
 * In the vault, at the start of every slab, lies what a successor needs besides the page table: which class the
 * slab is cut for, which slots are taken, and how many payload bytes are in it. The tag is written last and cleared first, so a
 * kill leaves either a whole header or one that says "empty". Everything by which memory is addressed or lists are
 * walked is in struct slab, which is private: the VMM can write to the vault.
 */
#ifndef FL_STORE_POOL_INTERNAL_H
#define FL_STORE_POOL_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "store/pool.h"

#define SLAB_SHIFT 15
#define SLAB_HEADER_BYTES 128u
#define SLAB_GUARD 2u /* slabs at the end of the pool that are never used: as long as any uint16_t length */
#define SLAB_NONE UINT32_MAX

#define SLOT_MIN_BYTES 48u
#define SLOT_MAX_BYTES (FL_PAYLOAD_MAX + (uint32_t)sizeof(struct fl_object))
#define SLOTS_MAX ((FL_SLAB_BYTES - SLAB_HEADER_BYTES) / SLOT_MIN_BYTES)
#define BITMAP_WORDS ((SLOTS_MAX + 63) / 64)

#define OBJECT_MAGIC 0xf17eu

#define CLASS_MAX 96u
#define RESERVE_SLABS 4u
#define TRIM_MAX_SLABS 1024u

struct slab_header {
    uint64_t tag;                  /* slab_tag() when valid; 0: empty */
    uint32_t class_index;          /* under the tag */
    _Atomic(uint32_t) tally;       /* slots in use in the low 16 bits, payload bytes in the high 16: see tally() */
    uint64_t bitmap[BITMAP_WORDS]; /* 1: slot in use; under the pool's lock */
};
_Static_assert(sizeof(struct slab_header) <= SLAB_HEADER_BYTES, "slab header outgrew its place");
_Static_assert(sizeof(struct fl_object) == 16, "object header is part of the vault's format");
_Static_assert(SLAB_GUARD *FL_SLAB_BYTES > UINT16_MAX, "guard must hold the longest length");

struct slab_class {
    uint32_t slots;
    uint32_t slot_bytes;
    uint32_t reciprocal; /* ceil(2^32 / slot_bytes): division on the fault path */
};

/* Where a slab is. Partial slabs are in one of BINS lists of their class by fullness. */
#define BINS 8u
enum place {
    PLACE_FULL = BINS, /* on no list */
    PLACE_EMPTY,       /* populated, no class, on the list of empty slabs */
    PLACE_OUT,         /* on no list: host memory being given or taken, being emptied, jammed, or put aside */
};

struct slab {
    uint32_t next, previous;
    uint16_t used;
    uint16_t payload_bytes;       /* of the objects in it; < 32 KiB */
    _Atomic(uint8_t) class_index; /* + 1; 0: nothing to be read here */
    uint8_t place;
    uint8_t stuck; /* compaction could not empty it; until something in it is freed */
    uint8_t aside; /* header was damaged */
};
_Static_assert(sizeof(struct slab) == 16, "promised in pool.h");

struct fl_pool {
    uint8_t *base;
    int vault_fd;
    uint64_t file_offset;
    _Atomic(uint64_t) *slab_map; /* in the vault */
    uint32_t slab_count;

    pthread_mutex_t lock; /* everything below, and the slabs' bitmaps and tallies */
    struct slab *slabs;
    uint64_t *populated; /* one bit a slab, as slab_map should be */
    uint32_t lowest;     /* no slab below is unpopulated */
    uint32_t evacuating; /* the slab that compaction is emptying, or SLAB_NONE */
    bool compacting;     /* waste was above the mark, and is not yet well below it */
    uint32_t empty_head, empty_count;
    uint32_t heads[CLASS_MAX][BINS];
    uint8_t bins[CLASS_MAX];        /* which of the heads are not empty */
    uint64_t free_slots[CLASS_MAX]; /* in all slabs of the class */
    uint64_t populated_count, aside_count;
    uint64_t objects, stored_bytes, limit_bytes;
    uint64_t (*marks)[BITMAP_WORDS]; /* the bitmaps in the making, during a rebuild only */
};
void *pool_private_array(uint64_t bytes);

/* ---- Classes (pool_class.c): the same table in every process, made once ---- */
extern struct slab_class fl_slab_classes[CLASS_MAX];
extern uint32_t fl_slab_class_count;
void fl_slab_classes_init(void);
/* Class for a payload of 1..FL_PAYLOAD_MAX bytes. */
uint32_t fl_slab_class_for(uint32_t payload_bytes);

/* ---- Slabs (pool_slab.c) ---- */
static inline struct slab_header *slab_header(const struct fl_pool *pool, uint32_t slab) {
    return (struct slab_header *)(pool->base + ((uint64_t)slab << SLAB_SHIFT));
}

static inline struct fl_object *slab_object(const struct fl_pool *pool, uint32_t slab, uint32_t class_index,
                                            uint32_t slot) {
    return (struct fl_object *)(pool->base + ((uint64_t)slab << SLAB_SHIFT) + SLAB_HEADER_BYTES +
                                (uint64_t)slot * fl_slab_classes[class_index].slot_bytes);
}

static inline uint64_t slab_handle(uint32_t slab, uint32_t class_index, uint32_t slot) {
    return (((uint64_t)slab << SLAB_SHIFT) + SLAB_HEADER_BYTES +
            (uint64_t)slot * fl_slab_classes[class_index].slot_bytes) >>
           3;
}

uint64_t slab_tag(uint32_t slab, uint32_t class_index);
/* Put a slab on the list where it belongs by its `used`; a slab without objects loses its class. Lock held. */
void slab_place(struct fl_pool *pool, uint32_t slab);
/* Take a slab off whatever list it is on: it is PLACE_OUT. Lock held. */
void slab_take_out(struct fl_pool *pool, uint32_t slab);
/* Take a slot in the fullest partial slab of the class: 0 or -ENOSPC. Lock held. */
int slab_claim(struct fl_pool *pool, uint32_t class_index, uint32_t payload_bytes, uint32_t *slab, uint32_t *slot);
/* Give a slot back: 0, or -EINVAL if it is not in use. Lock held. */
int slab_release(struct fl_pool *pool, uint32_t slab, uint32_t class_index, uint32_t slot);
/* Have one more slab for the class, from the reserve or from the host: 0 or -ENOSPC. Lock not held, mover only. */
int slab_grow(struct fl_pool *pool, uint32_t class_index);
/* Give an empty slab that is PLACE_OUT back to the host; false: the host refused. Lock not held, mover only. */
bool slab_punch(struct fl_pool *pool, uint32_t slab);
/* What else can be done with it: keep it for the next to grow, or never touch it again. Lock not held. */
void slab_keep_empty(struct fl_pool *pool, uint32_t slab);
void slab_put_aside(struct fl_pool *pool, uint32_t slab);

/* What a slab's header says about its content; one word, so that a kill cannot tear it. Lock held. */
static inline void slab_store_tally(struct fl_pool *pool, uint32_t slab) {
    const struct slab *at = &pool->slabs[slab];
    atomic_store_explicit(&slab_header(pool, slab)->tally, (uint32_t)at->payload_bytes << 16 | at->used,
                          memory_order_relaxed);
}

/* ---- Objects (pool.c) ---- */
/* page, length and magic of an object travel as one word: fault threads clear it while compaction may be reading. */
union object_tail {
    uint64_t word;
    struct {
        uint32_t page;
        uint16_t length;
        uint16_t magic;
    };
};

static inline union object_tail object_tail_load(const struct fl_object *object) {
    union object_tail tail;
    tail.word = __atomic_load_n((const uint64_t *)(const void *)&object->page, __ATOMIC_RELAXED);
    return tail;
}

static inline void object_tail_store(struct fl_object *object, union object_tail tail) {
    __atomic_store_n((uint64_t *)(void *)&object->page, tail.word, __ATOMIC_RELEASE);
}

/* A live object as long as its slot can hold. */
static inline bool object_tail_valid(union object_tail tail, uint32_t class_index) {
    return tail.magic == OBJECT_MAGIC && tail.length != 0 && tail.length <= FL_PAYLOAD_MAX &&
           tail.length + sizeof(struct fl_object) <= fl_slab_classes[class_index].slot_bytes;
}

struct object_place {
    uint32_t slab, class_index, slot;
};
/* Which slot a handle names, if it names the start of one in a slab that has a class. No lock. */
bool object_locate(const struct fl_pool *pool, uint64_t handle, struct object_place *out);
void object_write(struct fl_object *object, uint64_t page, uint64_t checksum, const void *payload, uint32_t length);

#endif
