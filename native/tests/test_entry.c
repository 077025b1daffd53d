/* SPDX-License-Identifier: Apache-2.0 */
/* Page table words: every kind survives a round trip, and no flipped bits are believed. */
#include <stdio.h>
#include <stdlib.h>

#include "swap/entry.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                               \
        }                                                                           \
    } while (0)

static int round_trip(enum fl_page_state state, enum fl_tier tier, uint64_t payload) {
    fl_entry entry = fl_entry_make(state, tier, payload);
    CHECK(fl_entry_state(entry) == state);
    CHECK(fl_entry_tier(entry) == tier);
    CHECK(fl_entry_payload(entry) == payload);
    CHECK(fl_entry_valid(entry));
    fl_entry before;
    CHECK(fl_entry_before_flip(entry, &before) && before == entry);
    for (unsigned a = 0; a < 64; a++) {
        CHECK(!fl_entry_valid(entry ^ UINT64_C(1) << a));
        CHECK(fl_entry_before_flip(entry ^ UINT64_C(1) << a, &before) && before == entry);
        for (unsigned b = 0; b < a; b++) { /* neither valid nor one bit away from another that is */
            CHECK(!fl_entry_valid(entry ^ UINT64_C(1) << a ^ UINT64_C(1) << b));
            CHECK(!fl_entry_before_flip(entry ^ UINT64_C(1) << a ^ UINT64_C(1) << b, &before));
        }
    }
    return 0;
}

static int state_changes_keep_the_payload(void) {
    fl_entry entry = fl_entry_make(FL_PAGE_PUNCHING, FL_TIER_RAM, 0x123456789abc);
    fl_entry after = fl_entry_with_state(entry, FL_PAGE_EVICTED);
    CHECK(after == fl_entry_make(FL_PAGE_EVICTED, FL_TIER_RAM, 0x123456789abc));
    return 0;
}

static int a_pattern_belongs_to_its_page(void) {
    uint32_t pattern;
    unsigned wrong = 0;
    for (uint64_t page = 0; page < 1000; page++) {
        uint64_t payload = fl_same_payload(page, 0xdeadbeef);
        CHECK(fl_same_pattern(page, payload, &pattern) && pattern == 0xdeadbeef);
        wrong += fl_same_pattern(page + 1, payload, &pattern);
        for (unsigned bit = 0; bit < 48; bit++)
            wrong += fl_same_pattern(page, payload ^ UINT64_C(1) << bit, &pattern);
    }
    CHECK(wrong < 10); /* 16 bits of check over 49,000 tries */
    return 0;
}

int main(void) {
    CHECK(fl_entry_valid(0));
    CHECK(fl_entry_make(FL_PAGE_RESIDENT, FL_TIER_ZERO, 0) == 0);
    CHECK(!fl_entry_valid(fl_entry_make(FL_PAGE_EVICTED, FL_TIER_REJECTED, 0)));
    CHECK(!fl_entry_valid(fl_entry_make(FL_PAGE_FREEZING, FL_TIER_RAM, 1)));
    CHECK(!fl_entry_valid(fl_entry_make((enum fl_page_state)9, FL_TIER_ZERO, 0)));
    /* A CRC-8 finds every one and two flipped bits within 127; an entry has 64. */
    return round_trip(FL_PAGE_EVICTED, FL_TIER_RAM, 0x1fffffffffff) ||
           round_trip(FL_PAGE_PUNCHING, FL_TIER_SAME, 0xffff12345678) || round_trip(FL_PAGE_EVICTED, FL_TIER_ZERO, 0) ||
           round_trip(FL_PAGE_LOADING, FL_TIER_RAM, 1) || round_trip(FL_PAGE_RESIDENT, FL_TIER_REJECTED, 0) ||
           round_trip(FL_PAGE_RESIDENT, FL_TIER_SETTLING, 0) || state_changes_keep_the_payload() ||
           a_pattern_belongs_to_its_page();
}
