/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How slabs are cut. A class is a number of slots a slab: slots get all of the room, so nothing is left at a slab's
 * end, and the only waste is what an object leaves in its slot.
 */
#include "store/pool_internal.h"

/* Step between neighbours, as 1/STEP: finer where most bytes are; few classes where there are few, as each may hold a slab
 * that is partly empty. */
#define STEP_LARGE 25u /* 4 % */
#define STEP_SMALL 12u /* 8 % */
#define SMALL_BYTES 640u

struct slab_class fl_slab_classes[CLASS_MAX];
uint32_t fl_slab_class_count;
static uint8_t class_by_eighth[SLOT_MAX_BYTES / 8 + 1];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t slot_bytes_of(uint32_t slots) {
    return (FL_SLAB_BYTES - SLAB_HEADER_BYTES) / slots & ~7u;
}

static void make_classes(void) {
    uint32_t slots = (FL_SLAB_BYTES - SLAB_HEADER_BYTES) / SLOT_MAX_BYTES;
    uint32_t count = 0;

    /* From the largest slot down; class 0 holds any payload. */
    while (count < CLASS_MAX) {
        uint32_t bytes = slot_bytes_of(slots);
        /* The most slots of this size: rounding down may have made room for more. */
        slots = (FL_SLAB_BYTES - SLAB_HEADER_BYTES) / bytes;
        fl_slab_classes[count++] = (struct slab_class){
            .slots = slots,
            .slot_bytes = bytes,
            .reciprocal = (uint32_t)(((1ull << 32) + bytes - 1) / bytes),
        };
        if (bytes <= SLOT_MIN_BYTES)
            break;
        uint32_t step = bytes > SMALL_BYTES ? STEP_LARGE : STEP_SMALL;
        uint32_t most = bytes - (bytes + step - 1) / step;
        if (most < SLOT_MIN_BYTES)
            most = SLOT_MIN_BYTES;
        while (slot_bytes_of(slots) > most)
            slots++;
    }
    fl_slab_class_count = count;

    /* Class 0 is larger than any object; the smallest that fits wins as the table is overwritten. */
    for (uint32_t c = 0; c < count; c++)
        for (uint32_t eighth = 0; eighth <= SLOT_MAX_BYTES / 8 && eighth * 8 <= fl_slab_classes[c].slot_bytes; eighth++)
            class_by_eighth[eighth] = (uint8_t)c;
}

void fl_slab_classes_init(void) {
    pthread_once(&once, make_classes);
}

uint32_t fl_slab_class_for(uint32_t payload_bytes) {
    return class_by_eighth[(payload_bytes + (uint32_t)sizeof(struct fl_object) + 7) / 8];
}
