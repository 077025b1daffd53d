/* SPDX-License-Identifier: Apache-2.0 */
#include "content.h"

#include <string.h>

/* Multiplier and shifts of the splitmix64 finaliser (Steele, Lea, Flood 2014): cheap, and passes for random. */
uint64_t content_hash(uint64_t value) {
    value += UINT64_C(0x9e3779b97f4a7c15);
    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

static uint64_t page_hash(const struct content_mix *mix, uint64_t index, uint32_t generation) {
    return content_hash(content_hash(mix->seed ^ (uint64_t)generation << 40) + index);
}

/* xorshift64 (Marsaglia 2003): six operations a word, which is what an emulated CPU can afford. */
static uint64_t next_word(uint64_t *state) {
    uint64_t value = *state;

    value ^= value << 13;
    value ^= value >> 7;
    value ^= value << 17;
    return *state = value;
}

static enum content_kind kind_of_hash(const struct content_mix *mix, uint64_t hash) {
    unsigned draw = (unsigned)(hash % 100);

    if (draw < mix->zero_percent)
        return CONTENT_ZERO;
    draw -= mix->zero_percent;
    if (draw < mix->same_percent)
        return CONTENT_SAME;
    draw -= mix->same_percent;
    return draw < mix->random_percent ? CONTENT_RANDOM : CONTENT_COMPRESSIBLE;
}

enum content_kind content_kind(const struct content_mix *mix, uint64_t index, uint32_t generation) {
    return kind_of_hash(mix, page_hash(mix, index, generation));
}

static void write_same(uint64_t hash, uint64_t *words) {
    uint64_t half = (hash >> 32) | 1;
    uint64_t word = half << 32 | half;

    for (unsigned i = 0; i < PAGE_WORDS; i++)
        words[i] = word;
}

static void write_random(uint64_t hash, uint64_t *words) {
    uint64_t state = hash | 1;

    for (unsigned i = 0; i < PAGE_WORDS; i++)
        words[i] = next_word(&state);
}

/*
 * Records of nine words: words 0 and 4 are fresh, the others repeat the first record. lz4 then spends
 * about 12 bytes on each 32 to 40, a match every few words rather than one long run.
 */
static void write_compressible(uint64_t hash, uint64_t *words) {
    enum { RECORD_WORDS = 9 };
    uint64_t state = hash | 1;
    uint64_t record[RECORD_WORDS];
    unsigned at = 0;

    for (unsigned i = 0; i < RECORD_WORDS; i++)
        record[i] = next_word(&state);
    while (at + RECORD_WORDS <= PAGE_WORDS) {
        words[at] = next_word(&state);
        words[at + 1] = record[1];
        words[at + 2] = record[2];
        words[at + 3] = record[3];
        words[at + 4] = next_word(&state);
        words[at + 5] = record[5];
        words[at + 6] = record[6];
        words[at + 7] = record[7];
        words[at + 8] = record[8];
        at += RECORD_WORDS;
    }
    while (at < PAGE_WORDS)
        words[at++] = next_word(&state);
}

void content_write(const struct content_mix *mix, uint64_t index, uint32_t generation, void *page) {
    uint64_t hash = page_hash(mix, index, generation);

    switch (kind_of_hash(mix, hash)) {
    case CONTENT_ZERO:
        memset(page, 0, PAGE_BYTES);
        break;
    case CONTENT_SAME:
        write_same(hash, page);
        break;
    case CONTENT_COMPRESSIBLE:
        write_compressible(hash, page);
        break;
    case CONTENT_RANDOM:
        write_random(hash, page);
        break;
    }
}

const char *content_kind_name(enum content_kind kind) {
    static const char *const names[] = {"zero", "same", "compressible", "random"};

    return names[kind];
}
