/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compaction: the objects of sparsely used slabs move into fuller ones, so that whole slabs become empty.
 *
 * An object is copied while a fault thread may free it. That is harmless: only this thread writes to slots, so the
 * copied bytes stay what they were, and the relocate callback finds that the page table has changed.
 */
#include <string.h>

#include "store/pool_internal.h"

#define WASTE_FLOOR_BYTES (256u << 10)
#define CANDIDATES_MAX 16 /* looked at for the emptiest of a list: the lock is held */
#define BARREN_MAX 16     /* slabs in one call that give nothing away */

/*
 * Once begun it goes on a little below the mark, or every few frees would begin it anew. Empty slabs are trimming's
 * business. Lock held.
 */
static bool wasteful(struct fl_pool *pool) {
    uint64_t held = (pool->populated_count - pool->empty_count - pool->aside_count) * FL_SLAB_BYTES;
    uint64_t most = pool->compacting ? pool->stored_bytes / 100 * 8 + WASTE_FLOOR_BYTES / 2
                                     : pool->stored_bytes / 10 + WASTE_FLOOR_BYTES;
    return pool->compacting = held > pool->stored_bytes + most;
}

/* Emptiest partial slab of a class among the first of its lowest list, or SLAB_NONE. Lock held. */
static uint32_t emptiest_of(const struct fl_pool *pool, uint32_t class_index) {
    uint32_t bin = (uint32_t)__builtin_ctz(pool->bins[class_index]);
    uint32_t best = SLAB_NONE;
    uint32_t slab = pool->heads[class_index][bin];

    for (int i = 0; i < CANDIDATES_MAX && slab != SLAB_NONE; i++, slab = pool->slabs[slab].next) {
        const struct slab *at = &pool->slabs[slab];
        if (!at->stuck && (best == SLAB_NONE || at->used < pool->slabs[best].used))
            best = slab;
    }
    return best;
}

/*
 * The slab that is cheapest to empty: fewest payload bytes to copy, in a class whose other slabs can take them all.
 * Returns SLAB_NONE when no class can spare a slab. Lock held.
 */
static uint32_t choose_slab(const struct fl_pool *pool, uint32_t *class_index) {
    uint32_t best = SLAB_NONE;
    for (uint32_t c = 0; c < fl_slab_class_count; c++) {
        if (!pool->bins[c] || pool->free_slots[c] < fl_slab_classes[c].slots)
            continue;
        uint32_t slab = emptiest_of(pool, c);
        if (slab != SLAB_NONE &&
            (best == SLAB_NONE || pool->slabs[slab].payload_bytes < pool->slabs[best].payload_bytes)) {
            best = slab;
            *class_index = c;
        }
    }
    return best;
}

enum moved { MOVED, MOVED_NOT, MOVED_NO_ROOM };

static enum moved move_object(struct fl_pool *pool, uint32_t slab, uint32_t class_index, uint32_t slot,
                              fl_relocate_fn relocate, void *context) {
    const struct fl_object *from = slab_object(pool, slab, class_index, slot);
    union object_tail tail = object_tail_load(from);
    uint32_t new_slab, new_slot;

    if (!object_tail_valid(tail, class_index))
        return MOVED_NOT; /* freed this moment, or damaged */
    pthread_mutex_lock(&pool->lock);
    int error = slab_claim(pool, class_index, tail.length, &new_slab, &new_slot);
    pthread_mutex_unlock(&pool->lock);
    if (error)
        return MOVED_NO_ROOM;
    object_write(slab_object(pool, new_slab, class_index, new_slot), tail.page, from->checksum, from->payload,
                 tail.length);

    bool taken = relocate(context, tail.page, slab_handle(slab, class_index, slot),
                          slab_handle(new_slab, class_index, new_slot));
    pthread_mutex_lock(&pool->lock);
    if (taken)
        slab_release(pool, slab, class_index, slot);
    else
        slab_release(pool, new_slab, class_index, new_slot);
    pthread_mutex_unlock(&pool->lock);
    return taken ? MOVED : MOVED_NOT;
}

/* Move up to `max_objects` out of the slab that is being evacuated. */
static uint32_t evacuate(struct fl_pool *pool, uint32_t slab, uint32_t class_index, uint32_t max_objects,
                         fl_relocate_fn relocate, void *context) {
    uint32_t slots = fl_slab_classes[class_index].slots;
    uint32_t count = 0;

    for (uint32_t word = 0; word * 64 < slots && count < max_objects; word++) {
        pthread_mutex_lock(&pool->lock);
        /* Not ours any more once it is empty. */
        uint64_t bits = pool->evacuating == slab ? slab_header(pool, slab)->bitmap[word] : 0;
        pthread_mutex_unlock(&pool->lock);
        for (; bits && count < max_objects; bits &= bits - 1) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (slot >= slots)
                break;
            enum moved moved = move_object(pool, slab, class_index, slot, relocate, context);
            if (moved == MOVED_NO_ROOM)
                return count;
            count += moved == MOVED;
        }
    }
    return count;
}

uint32_t fl_pool_compact(struct fl_pool *pool, uint32_t max_objects, fl_relocate_fn relocate, void *context) {
    uint32_t count = 0;
    /* Two slabs whose objects may not move would free each other's `stuck`, for ever: a refused copy is freed too. */
    for (uint32_t barren = 0; count < max_objects && barren < BARREN_MAX;) {
        uint32_t class_index = 0;
        pthread_mutex_lock(&pool->lock);
        uint32_t slab = wasteful(pool) ? choose_slab(pool, &class_index) : SLAB_NONE;
        if (slab != SLAB_NONE) {
            pool->evacuating = slab;
            slab_take_out(pool, slab);
        } else {
            pool->compacting = false;
        }
        pthread_mutex_unlock(&pool->lock);
        if (slab == SLAB_NONE)
            break;

        uint32_t moved = evacuate(pool, slab, class_index, max_objects - count, relocate, context);
        count += moved;
        barren += moved == 0;

        pthread_mutex_lock(&pool->lock);
        if (pool->evacuating == slab) {
            pool->evacuating = SLAB_NONE;
            /* What is left could not be moved: leave the slab alone until that changes. */
            pool->slabs[slab].stuck = count < max_objects;
            slab_place(pool, slab);
        }
        pthread_mutex_unlock(&pool->lock);
    }
    return count;
}
