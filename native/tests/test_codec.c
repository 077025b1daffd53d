/* SPDX-License-Identifier: Apache-2.0 */
/* Pages through the codecs: kinds, checksums, round trips, limits, and input that is not what it should be. */
#include <errno.h>
#include <lz4.h>

#include "pool_fixture.h"

static _Alignas(4096) uint8_t page[PAGE_BYTES];
static _Alignas(4096) uint8_t back[PAGE_BYTES];
static struct fl_codec *codec;
static struct rng rng;

static void test_classify(void) {
    uint32_t pattern = 77;

    memset(page, 0, sizeof page);
    CHECK(fl_page_classify(page, &pattern) == FL_PAGE_ZERO && pattern == 0, "zero page");
    for (int i = 0; i < 64; i++) {
        uint32_t word = i == 0 ? 1 : i == 1 ? 0x80000000u : (uint32_t)rng_next(&rng) | 1;
        for (size_t at = 0; at < PAGE_BYTES; at += 4)
            memcpy(page + at, &word, 4);
        pattern = 77;
        CHECK(fl_page_classify(page, &pattern) == FL_PAGE_SAME && pattern == word, "pattern %08x", word);
    }
    /* Every single bit, of a zero page and of a same page, makes it data. */
    for (int fill = 0; fill <= 0xa5; fill += 0xa5) {
        memset(page, fill, sizeof page);
        for (uint32_t bit = 0; bit < PAGE_BYTES * 8; bit++) {
            page[bit / 8] ^= (uint8_t)(1u << bit % 8);
            CHECK(fl_page_classify(page, &pattern) == FL_PAGE_DATA, "fill %02x with bit %u flipped", fill, bit);
            page[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    }
    /* A 64-bit pattern is not a 32-bit one. */
    uint64_t wide = 0x1111111122222222ull;
    for (size_t at = 0; at < PAGE_BYTES; at += 8)
        memcpy(page + at, &wide, 8);
    CHECK(fl_page_classify(page, &pattern) == FL_PAGE_DATA, "64-bit pattern");
}

static void test_checksum(void) {
    make_page(page, 1, 1);
    uint64_t sum = fl_page_checksum(page, 5);
    CHECK(sum == fl_page_checksum(page, 5), "not repeatable");
    for (uint64_t other = 0; other < 1000; other++)
        CHECK((fl_page_checksum(page, other) == sum) == (other == 5), "page index %d", (int)other);
    CHECK(fl_page_checksum(page, 5 + (1ull << 32)) != sum, "upper half of the index");
    for (int i = 0; i < 2000; i++) {
        uint32_t bit = rng_below(&rng, PAGE_BYTES * 8);
        page[bit / 8] ^= (uint8_t)(1u << bit % 8);
        CHECK(fl_page_checksum(page, 5) != sum, "bit %u flipped", bit);
        page[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
}

/* Room of exactly `limit` bytes on the heap: the sanitizer sees a byte too many; without it, the canary does. */
static uint32_t compress_exactly(uint32_t limit, uint8_t **out) {
    uint8_t *room = malloc(limit + 1);
    CHECK(room, "malloc");
    room[limit] = 0x5a;
    uint32_t length = fl_compress(codec, page, room, limit);
    CHECK(length <= limit && room[limit] == 0x5a, "wrote beyond %u", limit);
    *out = room;
    return length;
}

static void round_trip(const char *what, bool fits) {
    uint8_t *payload, *again;
    uint32_t length = compress_exactly(FL_PAYLOAD_MAX, &payload);
    CHECK((length != 0) == fits, "%s: length %u", what, length);
    if (length) {
        /* An input without a spare byte: reads beyond its end show. */
        uint8_t *exact = malloc(length);
        CHECK(exact, "malloc");
        memcpy(exact, payload, length);
        memset(back, 0xee, sizeof back);
        CHECK(fl_decompress(exact, length, back) == 0, "%s", what);
        CHECK(memcmp(page, back, PAGE_BYTES) == 0, "%s: content", what);
        CHECK(fl_decompress(exact, length - 1, back) == -EBADMSG, "%s: truncated", what);
        free(exact);
        /* Exactly enough room is enough, one less is not, and a refusal leaves the codec usable. */
        CHECK(compress_exactly(length - 1, &again) == 0, "%s: limit %u", what, length - 1);
        free(again);
        CHECK(compress_exactly(length, &again) == length && memcmp(again, payload, length) == 0, "%s: repeat", what);
        free(again);
    }
    free(payload);
}

static void test_round_trips(void) {
    memset(page, 0, sizeof page);
    round_trip("all zero", true);
    memset(page, 0x77, sizeof page);
    round_trip("all same", true);
    for (uint32_t changes = 1; changes <= 256; changes *= 2) {
        memset(page, 0x77, sizeof page);
        for (uint32_t i = 0; i < changes; i++)
            page[rng_below(&rng, PAGE_BYTES)] ^= (uint8_t)(1 + rng_below(&rng, 255));
        round_trip("near same", true);
    }
    for (int i = 0; i < 200; i++) {
        for (size_t at = 0; at < PAGE_BYTES; at += 8) {
            uint64_t word = rng_next(&rng);
            memcpy(page + at, &word, 8);
        }
        round_trip("random", false);
        /* Compressible pages right after refused ones. */
        make_page(page, (uint64_t)i, rng_next(&rng));
        for (size_t at = 0; at < 1400; at += 8)
            memset(page + at, i, 8);
        round_trip("mixed", true);
    }
    for (int i = 0; i < 200; i++) {
        memset(page, 0, sizeof page);
        for (size_t at = 0; at + 12 < PAGE_BYTES; at += 12)
            snprintf((char *)page + at, 12, "%u,", rng_below(&rng, 100000));
        round_trip("numbers", true);
    }
}

static void test_bad_input(void) {
    uint8_t payload[FL_PAYLOAD_MAX] = {0};

    memset(page, 0, sizeof page);
    CHECK(fl_decompress(payload, 0, back) == -EBADMSG, "length 0");
    CHECK(fl_decompress(payload, FL_PAYLOAD_MAX + 1, back) == -EBADMSG, "too long");
    /* Well-formed, but not a page. */
    int shorter = LZ4_compress_default((char *)page, (char *)payload, PAGE_BYTES - 1, sizeof payload);
    CHECK(shorter > 0 && fl_decompress(payload, (uint32_t)shorter, back) == -EBADMSG, "4095 bytes");
    static char longer[PAGE_BYTES + 1];
    int length = LZ4_compress_default(longer, (char *)payload, sizeof longer, sizeof payload);
    CHECK(length > 0 && fl_decompress(payload, (uint32_t)length, back) == -EBADMSG, "4097 bytes");

    /* Flipped bits: an error, or content that the checksum refuses, or the right content after all. */
    uint32_t rounds = runs_slowly() ? 20000 : 100000, undetected = 0;
    for (uint32_t i = 0; i < rounds; i++) {
        if (i % 64 == 0)
            make_page(page, i, 3);
        uint32_t size = fl_compress(codec, page, payload, sizeof payload);
        if (size == 0)
            continue;
        uint8_t *exact = malloc(size);
        CHECK(exact, "malloc");
        memcpy(exact, payload, size);
        for (uint32_t flips = 1 + rng_below(&rng, 4); flips; flips--)
            exact[rng_below(&rng, size)] ^= (uint8_t)(1u << rng_below(&rng, 8));
        if (fl_decompress(exact, size, back) == 0 && fl_page_checksum(back, i) == fl_page_checksum(page, i))
            undetected += memcmp(page, back, PAGE_BYTES) != 0;
        free(exact);
    }
    CHECK(undetected == 0, "%u damaged payloads passed", undetected);
}

int main(int argc, char **argv) {
    rng.state = seed_from(argc, argv);
    CHECK(fl_codec_create(&codec) == 0, "fl_codec_create");
    test_classify();
    test_checksum();
    test_round_trips();
    test_bad_input();
    fl_codec_destroy(codec);
    return 0;
}
