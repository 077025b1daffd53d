/* SPDX-License-Identifier: Apache-2.0 */
/* Slabs: their lists, their slots, and their host memory. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "store/pool_internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SLAB_MAGIC 0x46726f73746c6e65ull
#define INTERRUPTED_RETRIES 16

uint64_t slab_tag(uint32_t slab, uint32_t class_index) {
    /* Depends on every bit of its inputs, so that a flipped class or a header in the wrong place shows. */
    uint64_t x = SLAB_MAGIC ^ ((uint64_t)slab << 32 | class_index);
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 29) * 0xd6e8feb86659fd93ull;
    return (x ^ x >> 32) | 1;
}

/* ---- Lists ---- */

static uint32_t *list_head(struct fl_pool *pool, uint32_t slab) {
    const struct slab *at = &pool->slabs[slab];
    if (at->place == PLACE_EMPTY)
        return &pool->empty_head;
    if (at->place < BINS)
        return &pool->heads[atomic_load_explicit(&at->class_index, memory_order_relaxed) - 1][at->place];
    return NULL;
}

void slab_take_out(struct fl_pool *pool, uint32_t slab) {
    struct slab *at = &pool->slabs[slab];
    uint32_t *head = list_head(pool, slab);

    if (head) {
        if (at->previous == SLAB_NONE)
            *head = at->next;
        else
            pool->slabs[at->previous].next = at->next;
        if (at->next != SLAB_NONE)
            pool->slabs[at->next].previous = at->previous;
        if (at->place == PLACE_EMPTY)
            pool->empty_count--;
        else if (*head == SLAB_NONE)
            pool->bins[atomic_load_explicit(&at->class_index, memory_order_relaxed) - 1] &= (uint8_t)~(1u << at->place);
    }
    at->place = PLACE_OUT;
}

static void list_put(struct fl_pool *pool, uint32_t slab, uint8_t place) {
    struct slab *at = &pool->slabs[slab];
    at->place = place;
    uint32_t *head = list_head(pool, slab);

    if (!head)
        return;
    at->previous = SLAB_NONE;
    at->next = *head;
    if (*head != SLAB_NONE)
        pool->slabs[*head].previous = slab;
    *head = slab;
    if (place == PLACE_EMPTY)
        pool->empty_count++;
    else
        pool->bins[atomic_load_explicit(&at->class_index, memory_order_relaxed) - 1] |= (uint8_t)(1u << place);
}

void slab_place(struct fl_pool *pool, uint32_t slab) {
    struct slab *at = &pool->slabs[slab];
    uint32_t class_index = atomic_load_explicit(&at->class_index, memory_order_relaxed) - 1u;
    uint32_t slots = fl_slab_classes[class_index].slots;
    uint8_t place;

    if (at->used == 0)
        place = PLACE_EMPTY;
    else if (slab == pool->evacuating)
        place = PLACE_OUT;
    else if (at->used == slots)
        place = PLACE_FULL;
    else
        place = (uint8_t)(at->used * BINS / slots);
    if (place == at->place)
        return;
    slab_take_out(pool, slab);
    if (place == PLACE_EMPTY) {
        pool->free_slots[class_index] -= slots;
        atomic_store_explicit(&at->class_index, 0, memory_order_release);
        if (slab == pool->evacuating)
            pool->evacuating = SLAB_NONE;
    }
    list_put(pool, slab, place);
}

/* ---- Slots ---- */

static uint32_t first_free_slot(const struct slab_header *header, uint32_t slots) {
    for (uint32_t word = 0; word * 64 < slots; word++) {
        if (~header->bitmap[word]) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(~header->bitmap[word]);
            return slot < slots ? slot : SLAB_NONE;
        }
    }
    return SLAB_NONE;
}

int slab_claim(struct fl_pool *pool, uint32_t class_index, uint32_t payload_bytes, uint32_t *slab, uint32_t *slot) {
    while (pool->bins[class_index]) {
        uint32_t bin = 31u - (uint32_t)__builtin_clz(pool->bins[class_index]);
        uint32_t found = pool->heads[class_index][bin];
        struct slab *at = &pool->slabs[found];
        uint32_t free_slot = first_free_slot(slab_header(pool, found), fl_slab_classes[class_index].slots);
        if (free_slot == SLAB_NONE) {
            /* Its bitmap says full, its count doesn't: somebody wrote to it. It comes back when a slot is freed. */
            slab_take_out(pool, found);
            continue;
        }
        slab_header(pool, found)->bitmap[free_slot / 64] |= 1ull << free_slot % 64;
        at->used++;
        at->payload_bytes = (uint16_t)(at->payload_bytes + payload_bytes);
        slab_store_tally(pool, found);
        pool->free_slots[class_index]--;
        pool->objects++;
        pool->stored_bytes += payload_bytes;
        slab_place(pool, found);
        *slab = found;
        *slot = free_slot;
        return 0;
    }
    return -ENOSPC;
}

int slab_release(struct fl_pool *pool, uint32_t slab, uint32_t class_index, uint32_t slot) {
    struct slab *at = &pool->slabs[slab];
    uint64_t *word = &slab_header(pool, slab)->bitmap[slot / 64];
    uint64_t bit = 1ull << slot % 64;

    if (at->used == 0 || !(*word & bit))
        return -EINVAL;
    struct fl_object *object = slab_object(pool, slab, class_index, slot);
    union object_tail tail = object_tail_load(object);
    /* A damaged length costs exactness of the sums until the slab is empty, no more. */
    uint32_t length = object_tail_valid(tail, class_index) ? tail.length : at->payload_bytes / at->used;
    if (length > at->payload_bytes || at->used == 1)
        length = at->payload_bytes;
    /* A stale handle must not find the old content, which would pass every check but be out of date. */
    object_tail_store(object, (union object_tail){.word = 0});
    *word &= ~bit;
    at->used--;
    at->payload_bytes = (uint16_t)(at->payload_bytes - length);
    at->stuck = 0;
    slab_store_tally(pool, slab);
    pool->free_slots[class_index]++;
    pool->objects--;
    pool->stored_bytes -= length;
    slab_place(pool, slab);
    return 0;
}

/* ---- Host memory ---- */

static int punch(const struct fl_pool *pool, uint32_t slab) {
    off_t offset = (off_t)(pool->file_offset + ((uint64_t)slab << SLAB_SHIFT));
    int error = 0;
    for (int i = 0; i < INTERRUPTED_RETRIES; i++) {
        error =
            fallocate(pool->vault_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, FL_SLAB_BYTES) ? -errno : 0;
        if (error != -EINTR)
            break;
    }
    return error;
}

/* Memory of the host for a slab, or an error where a plain touch would raise SIGBUS. */
static int populate(const struct fl_pool *pool, uint32_t slab) {
    int error = 0;
    for (int i = 0; i < INTERRUPTED_RETRIES; i++) {
        error = madvise(slab_header(pool, slab), FL_SLAB_BYTES, MADV_POPULATE_WRITE) ? -errno : 0;
        if (error == -EINVAL) /* before Linux 5.14 */
            error =
                fallocate(pool->vault_fd, 0, (off_t)(pool->file_offset + ((uint64_t)slab << SLAB_SHIFT)), FL_SLAB_BYTES)
                    ? -errno
                    : 0;
        if (error != -EINTR && error != -EAGAIN)
            break;
    }
    return error;
}

static void map_set(struct fl_pool *pool, uint32_t slab, bool in_use) {
    uint64_t bit = 1ull << slab % 64;
    if (in_use)
        atomic_fetch_or_explicit(&pool->slab_map[slab / 64], bit, memory_order_release);
    else
        atomic_fetch_and_explicit(&pool->slab_map[slab / 64], ~bit, memory_order_release);
}

/* Forget a slab whose memory is the host's again. */
static void unpopulated(struct fl_pool *pool, uint32_t slab) {
    map_set(pool, slab, false);
    pthread_mutex_lock(&pool->lock);
    pool->populated[slab / 64] &= ~(1ull << slab % 64);
    pool->populated_count--;
    if (slab < pool->lowest)
        pool->lowest = slab;
    pthread_mutex_unlock(&pool->lock);
}

bool slab_punch(struct fl_pool *pool, uint32_t slab) {
    /* The map's bit goes last: a kill in between leaves a slab that a successor finds and frees. */
    if (punch(pool, slab))
        return false;
    unpopulated(pool, slab);
    return true;
}

void slab_keep_empty(struct fl_pool *pool, uint32_t slab) {
    pthread_mutex_lock(&pool->lock);
    list_put(pool, slab, PLACE_EMPTY);
    pthread_mutex_unlock(&pool->lock);
}

void slab_put_aside(struct fl_pool *pool, uint32_t slab) {
    pthread_mutex_lock(&pool->lock);
    pool->slabs[slab].aside = 1;
    pool->aside_count++;
    pthread_mutex_unlock(&pool->lock);
}

/* The lowest slab without memory, counted as populated from here on; SLAB_NONE if there is none. Lock held. */
static uint32_t take_unpopulated(struct fl_pool *pool) {
    if ((pool->populated_count + 1) * FL_SLAB_BYTES > pool->limit_bytes)
        return SLAB_NONE;
    for (uint32_t word = pool->lowest / 64; word * 64ull < pool->slab_count; word++) {
        if (!~pool->populated[word])
            continue;
        uint32_t slab = word * 64 + (uint32_t)__builtin_ctzll(~pool->populated[word]);
        if (slab >= pool->slab_count)
            break;
        pool->populated[word] |= 1ull << slab % 64;
        pool->populated_count++;
        pool->lowest = slab + 1;
        pool->slabs[slab].place = PLACE_OUT;
        return slab;
    }
    pool->lowest = pool->slab_count;
    return SLAB_NONE;
}

int slab_grow(struct fl_pool *pool, uint32_t class_index) {
    uint32_t slots = fl_slab_classes[class_index].slots;

    pthread_mutex_lock(&pool->lock);
    uint32_t slab = pool->empty_head;
    bool reserve = slab != SLAB_NONE;
    if (reserve)
        slab_take_out(pool, slab);
    else
        slab = take_unpopulated(pool);
    pthread_mutex_unlock(&pool->lock);
    if (slab == SLAB_NONE)
        return -ENOSPC;

    if (!reserve) {
        /* Marked before it has memory: a kill in between leaves a marked slab without a tag, which is empty. */
        map_set(pool, slab, true);
        if (populate(pool, slab)) {
            /* Some of its pages may have come: back with them. */
            if (!slab_punch(pool, slab))
                slab_put_aside(pool, slab);
            return -ENOSPC;
        }
    }
    struct slab_header *header = slab_header(pool, slab);
    __atomic_store_n(&header->tag, 0, __ATOMIC_SEQ_CST);
    header->class_index = class_index;
    atomic_store_explicit(&header->tally, 0, memory_order_relaxed);
    memset(header->bitmap, 0, sizeof header->bitmap);
    __atomic_store_n(&header->tag, slab_tag(slab, class_index), __ATOMIC_RELEASE);

    pthread_mutex_lock(&pool->lock);
    struct slab *at = &pool->slabs[slab];
    at->used = 0;
    at->payload_bytes = 0;
    at->stuck = 0;
    atomic_store_explicit(&at->class_index, (uint8_t)(class_index + 1), memory_order_release);
    pool->free_slots[class_index] += slots;
    list_put(pool, slab, 0);
    pthread_mutex_unlock(&pool->lock);
    return 0;
}
