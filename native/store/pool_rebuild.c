/* SPDX-License-Identifier: Apache-2.0 */
/*
 * After a crash: bitmaps and counts are made anew from the page table's handles.
 *
 * Marks are gathered in private memory: slab headers are a page and a cache set apart in the worst way, and marks
 * come in any order.
 *
 * Objects are not read, except in the few slabs where the predecessor was interrupted: a slab's tally was written in
 * one piece before a handle was published and after one was taken back, so it counts every object that the page table
 * names. If it counts no more than that, its payload bytes are right too.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "store/pool_internal.h"

static uint32_t next_populated(const struct fl_pool *pool, uint32_t from) {
    for (uint32_t word = from / 64; word * 64ull < pool->slab_count; word++) {
        uint64_t bits = pool->populated[word];
        if (word == from / 64)
            bits &= ~0ull << from % 64;
        if (bits)
            return word * 64 + (uint32_t)__builtin_ctzll(bits);
    }
    return SLAB_NONE;
}

static void begin_slab(struct fl_pool *pool, uint32_t slab) {
    struct slab *at = &pool->slabs[slab];
    struct slab_header *header = slab_header(pool, slab);
    /* Each read once: what is checked must be what is used. */
    uint64_t tag = __atomic_load_n(&header->tag, __ATOMIC_ACQUIRE);
    uint32_t class_index = __atomic_load_n(&header->class_index, __ATOMIC_RELAXED);
    uint8_t class_mark = 0;

    memset(at, 0, sizeof *at);
    at->place = PLACE_OUT;
    if (tag != 0) {
        if (class_index < fl_slab_class_count && tag == slab_tag(slab, class_index)) {
            class_mark = (uint8_t)(class_index + 1);
        } else {
            at->aside = 1;
            pool->aside_count++;
        }
    }
    atomic_store_explicit(&at->class_index, class_mark, memory_order_release);
}

int fl_pool_rebuild_begin(struct fl_pool *pool) {
    uint64_t marks_bytes = pool->slab_count * sizeof pool->marks[0];
    if (pool->marks)
        munmap(pool->marks, marks_bytes); /* a rebuild that was begun and not ended */
    pool->marks = pool_private_array(marks_bytes);
    if (!pool->marks)
        return -ENOMEM;
    pthread_mutex_lock(&pool->lock);
    pool->evacuating = SLAB_NONE;
    pool->empty_head = SLAB_NONE;
    pool->empty_count = 0;
    memset(pool->heads, 0xff, sizeof pool->heads);
    memset(pool->bins, 0, sizeof pool->bins);
    memset(pool->free_slots, 0, sizeof pool->free_slots);
    pool->objects = 0;
    pool->stored_bytes = 0;
    pool->aside_count = 0;
    for (uint32_t slab = next_populated(pool, 0); slab != SLAB_NONE; slab = next_populated(pool, slab + 1))
        begin_slab(pool, slab);
    pthread_mutex_unlock(&pool->lock);
    return 0;
}

int fl_pool_rebuild_mark(struct fl_pool *pool, uint64_t handle, uint64_t page) {
    struct object_place at;
    if (page > UINT32_MAX || !pool->marks || !object_locate(pool, handle, &at))
        return -EBADMSG;
    uint64_t *word = &pool->marks[at.slab][at.slot / 64];
    uint64_t bit = 1ull << at.slot % 64;
    if (*word & bit)
        return -EEXIST;
    *word |= bit;
    pool->slabs[at.slab].used++;
    return 0;
}

/* Payload bytes in a slab by its objects. */
static uint32_t count_payload(const struct fl_pool *pool, uint32_t slab, uint32_t class_index) {
    uint32_t bytes = 0;
    for (uint32_t slot = 0; slot < fl_slab_classes[class_index].slots; slot++) {
        if (!(pool->marks[slab][slot / 64] & 1ull << slot % 64))
            continue;
        union object_tail tail = object_tail_load(slab_object(pool, slab, class_index, slot));
        if (object_tail_valid(tail, class_index))
            bytes += tail.length;
    }
    return bytes;
}

static void end_slab(struct fl_pool *pool, uint32_t slab, uint32_t class_index) {
    struct slab *at = &pool->slabs[slab];
    const struct slab_class *class = &fl_slab_classes[class_index];
    struct slab_header *header = slab_header(pool, slab);
    uint32_t tally = atomic_load_explicit(&header->tally, memory_order_relaxed);
    uint32_t payload_bytes = tally >> 16;
    uint32_t most = at->used * (class->slot_bytes - (uint32_t)sizeof(struct fl_object));

    if ((tally & 0xffff) != at->used || payload_bytes < at->used || payload_bytes > most)
        payload_bytes = count_payload(pool, slab, class_index);
    memcpy(header->bitmap, pool->marks[slab], (class->slots + 63) / 64 * sizeof header->bitmap[0]);
    at->payload_bytes = (uint16_t)payload_bytes;
    slab_store_tally(pool, slab);
    pool->objects += at->used;
    pool->stored_bytes += payload_bytes;
    pool->free_slots[class_index] += class->slots - at->used;
    slab_place(pool, slab);
}

void fl_pool_rebuild_end(struct fl_pool *pool) {
    if (!pool->marks)
        return;
    for (uint32_t slab = next_populated(pool, 0); slab != SLAB_NONE; slab = next_populated(pool, slab + 1)) {
        struct slab *at = &pool->slabs[slab];
        if (at->aside)
            continue;
        if (at->used) {
            pthread_mutex_lock(&pool->lock);
            end_slab(pool, slab, atomic_load_explicit(&at->class_index, memory_order_relaxed) - 1u);
            pthread_mutex_unlock(&pool->lock);
        } else {
            atomic_store_explicit(&at->class_index, 0, memory_order_release);
            if (!slab_punch(pool, slab))
                slab_put_aside(pool, slab);
        }
    }
    munmap(pool->marks, pool->slab_count * sizeof pool->marks[0]);
    pool->marks = NULL;
}
