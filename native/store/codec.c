/* SPDX-License-Identifier: Apache-2.0 */
#include "store/codec.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define PAGE_BYTES 4096
#define PAGE_WORDS (PAGE_BYTES / 8)
/* Words looked at between two chances to stop early: long enough for the compiler to use vectors. */
#define BLOCK_WORDS 32

struct fl_codec {
    LZ4_stream_t state;
};

enum fl_page_kind fl_page_classify(const void *page, uint32_t *pattern) {
    const uint64_t *words = page;
    uint64_t first = words[0];

    /* Most pages are told apart by these four words, in three cache lines. */
    if ((uint32_t)first != (uint32_t)(first >> 32) || words[PAGE_WORDS - 1] != first ||
        words[PAGE_WORDS / 2] != first || words[1] != first)
        return FL_PAGE_DATA;

    for (size_t at = 0; at < PAGE_WORDS; at += BLOCK_WORDS) {
        uint64_t difference = 0;
        for (size_t i = 0; i < BLOCK_WORDS; i++)
            difference |= words[at + i] ^ first;
        if (difference)
            return FL_PAGE_DATA;
    }
    *pattern = (uint32_t)first;
    return first ? FL_PAGE_SAME : FL_PAGE_ZERO;
}

uint64_t fl_page_checksum(const void *page, uint64_t page_index) {
    return XXH3_64bits_withSeed(page, PAGE_BYTES, page_index);
}

int fl_codec_create(struct fl_codec **out) {
    struct fl_codec *codec = calloc(1, sizeof *codec);
    if (!codec)
        return -ENOMEM;
    *out = codec;
    return 0;
}

void fl_codec_destroy(struct fl_codec *codec) {
    free(codec);
}

uint32_t fl_compress(struct fl_codec *codec, const void *page, void *out, uint32_t limit) {
    if (limit > FL_PAYLOAD_MAX)
        limit = FL_PAYLOAD_MAX;
    /* The variant for whole small blocks beats the streaming one, though it clears its 16 KiB of state each time. */
    int length = LZ4_compress_fast_extState(&codec->state, page, out, PAGE_BYTES, (int)limit, 1);
    return length > 0 ? (uint32_t)length : 0;
}

int fl_decompress(const void *in, uint32_t length, void *page) {
    char copy[FL_PAYLOAD_MAX];

    if (length == 0 || length > FL_PAYLOAD_MAX)
        return -EBADMSG;
    /* The vault belongs to the VMM: LZ4 checks what it reads, but only if it cannot change between two reads. */
    memcpy(copy, in, length);
    return LZ4_decompress_safe(copy, page, (int)length, PAGE_BYTES) == PAGE_BYTES ? 0 : -EBADMSG;
}
