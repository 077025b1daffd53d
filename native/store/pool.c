/* SPDX-License-Identifier: Apache-2.0 */
/* The pool: open and close, objects, trimming, numbers. */
#include "store/pool.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "store/pool_internal.h"

#define CAPACITY_MIN (4ull * FL_SLAB_BYTES)
#define CAPACITY_MAX (1ull << 47)
#define HOST_PAGE_MASK 4095ull

uint64_t fl_pool_map_bytes(uint64_t capacity_bytes) {
    uint64_t slabs = capacity_bytes / FL_SLAB_BYTES;
    return (slabs + 63) / 64 * 8;
}

/* ---- Open and close ---- */

void *pool_private_array(uint64_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static uint64_t populated_bytes(const struct fl_pool *pool) {
    return (pool->slab_count + 63ull) / 64 * 8;
}

static uint64_t slabs_bytes(const struct fl_pool *pool) {
    return (uint64_t)pool->slab_count * sizeof(struct slab);
}

/* Slabs that a predecessor left are neither readable nor reused until the rebuild has looked at them. */
static void adopt_map(struct fl_pool *pool) {
    for (uint32_t word = 0; word * 64ull < pool->slab_count; word++) {
        uint64_t bits = atomic_load_explicit(&pool->slab_map[word], memory_order_relaxed);
        if (pool->slab_count - word * 64ull < 64)
            bits &= (1ull << (pool->slab_count - word * 64ull)) - 1;
        if (!bits)
            continue;
        pool->populated[word] = bits;
        pool->populated_count += (uint64_t)__builtin_popcountll(bits);
        for (; bits; bits &= bits - 1)
            pool->slabs[word * 64 + (uint32_t)__builtin_ctzll(bits)].place = PLACE_OUT;
    }
}

int fl_pool_open(void *base, uint64_t capacity_bytes, int vault_fd, uint64_t pool_file_offset, void *slab_map,
                 uint64_t limit_bytes, struct fl_pool **out) {
    if (!base || !slab_map || (uintptr_t)base & HOST_PAGE_MASK || pool_file_offset & HOST_PAGE_MASK ||
        (uintptr_t)slab_map & 7 || capacity_bytes < CAPACITY_MIN || capacity_bytes > CAPACITY_MAX)
        return -EINVAL;

    struct fl_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return -ENOMEM;
    pool->base = base;
    pool->vault_fd = vault_fd;
    pool->file_offset = pool_file_offset;
    pool->slab_map = slab_map;
    pool->slab_count = (uint32_t)(capacity_bytes / FL_SLAB_BYTES) - SLAB_GUARD;
    pool->limit_bytes = limit_bytes;
    pool->evacuating = SLAB_NONE;
    pool->empty_head = SLAB_NONE;
    memset(pool->heads, 0xff, sizeof pool->heads);
    pool->slabs = pool_private_array(slabs_bytes(pool));
    pool->populated = pool_private_array(populated_bytes(pool));
    /* Adaptive: the holder is out in tens of nanoseconds, so spin a little before asking the kernel to wait. */
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&pool->lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (!pool->slabs || !pool->populated) {
        fl_pool_close(pool);
        return -ENOMEM;
    }
    /* A huge page would hold 64 slabs and could not be given back in parts; best effort, old kernels have none. */
    (void)madvise(base, capacity_bytes & ~HOST_PAGE_MASK, MADV_NOHUGEPAGE);
    fl_slab_classes_init();
    adopt_map(pool);
    *out = pool;
    return 0;
}

void fl_pool_close(struct fl_pool *pool) {
    if (!pool)
        return;
    if (pool->slabs)
        munmap(pool->slabs, slabs_bytes(pool));
    if (pool->populated)
        munmap(pool->populated, populated_bytes(pool));
    if (pool->marks)
        munmap(pool->marks, pool->slab_count * sizeof pool->marks[0]);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* ---- Objects ---- */

bool object_locate(const struct fl_pool *pool, uint64_t handle, struct object_place *out) {
    if (handle >= FL_HANDLE_END)
        return false;
    uint64_t slab = handle >> (SLAB_SHIFT - 3);
    uint32_t within = (uint32_t)(handle << 3) & (FL_SLAB_BYTES - 1);
    if (slab >= pool->slab_count || within < SLAB_HEADER_BYTES)
        return false;
    uint32_t class_index = atomic_load_explicit(&pool->slabs[slab].class_index, memory_order_acquire);
    if (class_index == 0)
        return false;
    const struct slab_class *class = &fl_slab_classes[--class_index];
    within -= SLAB_HEADER_BYTES;
    uint32_t slot = (uint32_t)((uint64_t)within * class->reciprocal >> 32);
    if (slot * class->slot_bytes != within || slot >= class->slots)
        return false;
    *out = (struct object_place){.slab = (uint32_t)slab, .class_index = class_index, .slot = slot};
    return true;
}

void object_write(struct fl_object *object, uint64_t page, uint64_t checksum, const void *payload, uint32_t length) {
    object->checksum = checksum;
    memcpy(object->payload, payload, length);
    object_tail_store(object,
                      (union object_tail){.page = (uint32_t)page, .length = (uint16_t)length, .magic = OBJECT_MAGIC});
}

int fl_pool_put(struct fl_pool *pool, uint64_t page, uint64_t checksum, const void *payload, uint32_t length,
                uint64_t *handle) {
    if (page > UINT32_MAX || length == 0 || length > FL_PAYLOAD_MAX)
        return -EINVAL;
    uint32_t class_index = fl_slab_class_for(length);
    uint32_t slab, slot;

    pthread_mutex_lock(&pool->lock);
    int error = slab_claim(pool, class_index, length, &slab, &slot);
    pthread_mutex_unlock(&pool->lock);
    if (error) {
        error = slab_grow(pool, class_index);
        if (error)
            return error;
        pthread_mutex_lock(&pool->lock);
        error = slab_claim(pool, class_index, length, &slab, &slot);
        pthread_mutex_unlock(&pool->lock);
        if (error)
            return error;
    }
    object_write(slab_object(pool, slab, class_index, slot), page, checksum, payload, length);
    *handle = slab_handle(slab, class_index, slot);
    return 0;
}

int fl_pool_get(struct fl_pool *pool, uint64_t handle, const struct fl_object **out) {
    struct object_place at;
    if (!object_locate(pool, handle, &at))
        return -EBADMSG;
    const struct fl_object *object = slab_object(pool, at.slab, at.class_index, at.slot);
    if (!object_tail_valid(object_tail_load(object), at.class_index))
        return -EBADMSG;
    *out = object;
    return 0;
}

int fl_pool_free(struct fl_pool *pool, uint64_t handle) {
    struct object_place at, again;
    if (!object_locate(pool, handle, &at))
        return -EINVAL;
    int error = -EINVAL;
    pthread_mutex_lock(&pool->lock);
    /* A handle that was freed before may name a slab that has been cut anew since. */
    if (object_locate(pool, handle, &again) && again.class_index == at.class_index)
        error = slab_release(pool, at.slab, at.class_index, at.slot);
    pthread_mutex_unlock(&pool->lock);
    return error;
}

/* ---- Trimming ---- */

uint64_t fl_pool_trim(struct fl_pool *pool) {
    uint64_t given_back = 0;
    for (uint32_t i = 0; i < TRIM_MAX_SLABS; i++) {
        pthread_mutex_lock(&pool->lock);
        uint32_t slab = pool->empty_count > RESERVE_SLABS ? pool->empty_head : SLAB_NONE;
        if (slab != SLAB_NONE)
            slab_take_out(pool, slab);
        pthread_mutex_unlock(&pool->lock);
        if (slab == SLAB_NONE)
            break;
        if (!slab_punch(pool, slab)) {
            slab_keep_empty(pool, slab);
            break;
        }
        given_back += FL_SLAB_BYTES;
    }
    return given_back;
}

/* ---- Numbers ---- */

void fl_pool_stats(struct fl_pool *pool, struct fl_pool_stats *out) {
    pthread_mutex_lock(&pool->lock);
    *out = (struct fl_pool_stats){
        .stored_bytes = pool->stored_bytes,
        .pool_bytes = pool->populated_count * FL_SLAB_BYTES,
        .objects = pool->objects,
        .limit_bytes = pool->limit_bytes,
        .empty_bytes = (uint64_t)pool->empty_count * FL_SLAB_BYTES,
        .aside_bytes = pool->aside_count * FL_SLAB_BYTES,
    };
    pthread_mutex_unlock(&pool->lock);
}

void fl_pool_set_limit(struct fl_pool *pool, uint64_t limit_bytes) {
    pthread_mutex_lock(&pool->lock);
    pool->limit_bytes = limit_bytes;
    pthread_mutex_unlock(&pool->lock);
}
