/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page table: one 64-bit word a guest page, in the vault, shared by all threads and by successive pagers.
 *
 *   63            16 15   12 11    8 7      0
 *   +---------------+-------+-------+--------+
 *   |    payload    | tier  | state | check  |
 *   +---------------+-------+-------+--------+
 *
 * The word 0 is a valid entry: nothing is stored, the page (if there is one) is in the VMM's file. The check is
 * a CRC-8 over the other 56 bits, so a flipped bit in the table is found before it is believed.
 *
 * Who may change what. Every change is a compare-and-swap; a state names its only owner:
 *   RESIDENT  anybody may take it: mover -> FREEZING, fault thread -> BUSY
 *   FREEZING  mover; a fault thread may cancel it (-> BUSY, or -> RESIDENT when the VMM frees the page)
 *   PUNCHING  mover: stored, write-protected, hole being punched
 *   EVICTED   anybody may take it -> LOADING
 *   LOADING   whoever took it: stored copy on its way back
 *   BUSY      the fault thread that took it: zero-fill or un-protect under way, nothing stored
 *   POISONED  final
 * PUNCHING and LOADING stay their owner's when the VMM frees the page, but lose tier and payload: the owner, who knows them,
 * gives the stored copy up and leaves a hole (fl_settle()).
 */
#ifndef FL_SWAP_ENTRY_H
#define FL_SWAP_ENTRY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum fl_page_state {
    FL_PAGE_RESIDENT = 0,
    FL_PAGE_FREEZING = 1,
    FL_PAGE_PUNCHING = 2,
    FL_PAGE_EVICTED = 3,
    FL_PAGE_LOADING = 4,
    FL_PAGE_BUSY = 5,
    FL_PAGE_POISONED = 6,
};

enum fl_tier {
    FL_TIER_ZERO = 0,
    FL_TIER_SAME = 1,
    FL_TIER_RAM = 2,
    FL_TIER_SETTLING = 13, /* RESIDENT only: was BROUGHT at the last scan, and its touches show since; until the next */
    FL_TIER_BROUGHT =
        14, /* RESIDENT only: brought back by us, not by a touch, and nobody sees its touches; until a scan */
    FL_TIER_REJECTED = 15, /* RESIDENT only: did not compress well, left alone until it is touched */
};

typedef uint64_t fl_entry;
typedef _Atomic(fl_entry) fl_entry_slot;

/* CRC-8 (polynomial 0x07) of the 56 bits above the check; 0 for 0. */
uint8_t fl_entry_check(uint64_t bits);

static inline fl_entry fl_entry_make(enum fl_page_state state, enum fl_tier tier, uint64_t payload) {
    uint64_t bits = payload << 16 | (uint64_t)tier << 12 | (uint64_t)state << 8;
    return bits | fl_entry_check(bits);
}

static inline enum fl_page_state fl_entry_state(fl_entry entry) {
    return (enum fl_page_state)(entry >> 8 & 15);
}

static inline enum fl_tier fl_entry_tier(fl_entry entry) {
    return (enum fl_tier)(entry >> 12 & 15);
}

static inline uint64_t fl_entry_payload(fl_entry entry) {
    return entry >> 16;
}

static inline fl_entry fl_entry_with_state(fl_entry entry, enum fl_page_state state) {
    return fl_entry_make(state, fl_entry_tier(entry), fl_entry_payload(entry));
}

/* The check fits and state and tier are ones that exist together. */
bool fl_entry_valid(fl_entry entry);

/*
 * What an entry was before one of its bits flipped; an entry that is valid is itself. Two valid ones differ in four bits or
 * more, so there is no other. Good enough to count by, never to load by. false: more than one bit has flipped.
 */
bool fl_entry_before_flip(fl_entry entry, fl_entry *before);

/* Payload of a same-filled page: the 32-bit pattern and 16 bits of check for it and its page. */
uint64_t fl_same_payload(uint64_t page, uint32_t pattern);
/* The pattern; false when the payload does not belong to this page. */
bool fl_same_pattern(uint64_t page, uint64_t payload, uint32_t *pattern);

#endif
