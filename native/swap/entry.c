/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/entry.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

/* CRC-8 tables for a word of eight bytes, made at load time: the check of an entry is seven look-ups. */
static uint8_t crc_of[8][256];

__attribute__((constructor)) static void make_tables(void) {
    for (unsigned byte = 0; byte < 256; byte++) {
        uint8_t crc = (uint8_t)byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (uint8_t)(crc & 0x80 ? crc << 1 ^ 0x07 : crc << 1);
        crc_of[0][byte] = crc;
    }
    for (unsigned place = 1; place < 8; place++)
        for (unsigned byte = 0; byte < 256; byte++)
            crc_of[place][byte] = crc_of[0][crc_of[place - 1][byte]];
}

uint8_t fl_entry_check(uint64_t bits) {
    uint8_t crc = 0;
    for (unsigned place = 1; place < 8; place++)
        crc ^= crc_of[place - 1][bits >> (8 * place) & 0xff];
    return crc;
}

bool fl_entry_valid(fl_entry entry) {
    if (entry == 0)
        return true;
    if ((uint8_t)entry != fl_entry_check(entry & ~UINT64_C(0xff)))
        return false;
    enum fl_tier tier = fl_entry_tier(entry);
    switch (fl_entry_state(entry)) {
    case FL_PAGE_RESIDENT:
        return tier == FL_TIER_ZERO || tier == FL_TIER_REJECTED || tier == FL_TIER_BROUGHT || tier == FL_TIER_SETTLING;
    case FL_PAGE_FREEZING:
    case FL_PAGE_BUSY:
    case FL_PAGE_POISONED:
        return tier == FL_TIER_ZERO;
    case FL_PAGE_PUNCHING:
    case FL_PAGE_EVICTED:
    case FL_PAGE_LOADING:
        return tier == FL_TIER_ZERO || tier == FL_TIER_SAME || tier == FL_TIER_RAM;
    }
    return false;
}

bool fl_entry_before_flip(fl_entry entry, fl_entry *before) {
    *before = entry;
    for (unsigned bit = 0; bit < 64 && !fl_entry_valid(*before); bit++)
        *before = entry ^ UINT64_C(1) << bit;
    return fl_entry_valid(*before);
}

static uint16_t pattern_check(uint64_t page, uint32_t pattern) {
    return (uint16_t)XXH3_64bits_withSeed(&pattern, sizeof(pattern), page);
}

uint64_t fl_same_payload(uint64_t page, uint32_t pattern) {
    return (uint64_t)pattern_check(page, pattern) << 32 | pattern;
}

bool fl_same_pattern(uint64_t page, uint64_t payload, uint32_t *pattern) {
    *pattern = (uint32_t)payload;
    return (uint16_t)(payload >> 32) == pattern_check(page, *pattern);
}
