/* SPDX-License-Identifier: Apache-2.0 */
#include "content.h"

#include <string.h>

#define WORDS_KNOWN 64u

/* A generator with a 64-bit counter as its state and a mixing function over it: any page can be made by itself. */
static uint64_t mix(uint64_t value) {
    value ^= value >> 32;
    value *= UINT64_C(0xe9846af9b1a615d);
    value ^= value >> 32;
    value *= UINT64_C(0xe9846af9b1a615d);
    return value ^ value >> 28;
}

static uint64_t draw(uint64_t *state) {
    *state += UINT64_C(0x9e3779b97f4a7c15);
    return mix(*state);
}

static void put(uint8_t *at, uint64_t value, size_t bytes) {
    memcpy(at, &value, bytes);
}

/* 64-byte records as a kernel or a heap has them: two pointers, a counter, flags, a short name, empty fields. */
static void fill_records(uint64_t *state, uint8_t *out) {
    for (uint32_t at = 0; at < BENCH_PAGE_BYTES; at += 64) {
        memset(out + at, 0, 64);
        put(out + at, UINT64_C(0xffff888000000000) | (draw(state) & 0xffffff) << 6, 8);
        put(out + at + 8, UINT64_C(0xffff888000000000) | (draw(state) & 0xffff) << 6, 8);
        put(out + at + 16, draw(state) & 0xffff, 4);
        put(out + at + 20, UINT32_C(0x80000001) << (draw(state) & 3), 4);
        put(out + at + 32, draw(state) & 0x0f0f, 4);
    }
}

static void fill_text(uint64_t *state, uint8_t *out) {
    uint32_t at = 0;
    while (at < BENCH_PAGE_BYTES) {
        /* Squaring favours the low numbers, as common words are common. */
        uint64_t at_random = draw(state) % WORDS_KNOWN;
        uint64_t word = mix(at_random * at_random / WORDS_KNOWN + 1);
        uint32_t length = 3 + (uint32_t)(word % 7);
        for (uint32_t i = 0; i < length && at < BENCH_PAGE_BYTES; i++)
            out[at++] = (uint8_t)('a' + (word >> (5 * i + 8)) % 26);
        if (at < BENCH_PAGE_BYTES)
            out[at++] = ' ';
    }
}

/* A buffer with something in its first part that does not compress. */
static void fill_buffer(uint64_t *state, uint8_t *out) {
    uint32_t used = 384 + (uint32_t)(draw(state) % 1024);
    memset(out, 0, BENCH_PAGE_BYTES);
    for (uint32_t at = 0; at < used; at += 8)
        put(out + at, draw(state), 8);
}

uint64_t bench_content_stamp(uint64_t page) {
    return mix(page + UINT64_C(0x66726f7374)) | 1;
}

void bench_content_fill(uint64_t page, void *out) {
    uint64_t state = mix(page);
    switch (page % 4) {
    case 0:
    case 1:
        fill_records(&state, out);
        break;
    case 2:
        fill_text(&state, out);
        break;
    default:
        fill_buffer(&state, out);
    }
    put(out, bench_content_stamp(page), 8);
}

bool bench_content_is(uint64_t page, const void *content) {
    uint8_t expected[BENCH_PAGE_BYTES];
    bench_content_fill(page, expected);
    return memcmp(content, expected, sizeof(expected)) == 0;
}

void bench_permutation(uint64_t seed, uint32_t count, uint32_t *out) {
    uint64_t state = mix(seed + 1);
    for (uint32_t i = 0; i < count; i++)
        out[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        uint32_t other = (uint32_t)(draw(&state) % i);
        uint32_t kept = out[i - 1];
        out[i - 1] = out[other];
        out[other] = kept;
    }
}
