/* SPDX-License-Identifier: Apache-2.0 */
/* The words behind the public numbers, and the edges of the public histograms. */
#include <stddef.h>

#include "frostline.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *const refusal_names[] = {
    [FL_REFUSAL_NONE] = "none",
    [FL_REFUSAL_GONE] = "gone",
    [FL_REFUSAL_NOT_SHARED_MEMFD] = "not_shared_memfd",
    [FL_REFUSAL_PASSTHROUGH] = "passthrough",
    [FL_REFUSAL_LOCKED] = "locked",
    [FL_REFUSAL_OTHER_MAPPER] = "other_mapper",
    [FL_REFUSAL_FOREIGN_UFFD] = "foreign_uffd",
    [FL_REFUSAL_ALREADY_SERVED] = "already_served",
    [FL_REFUSAL_TRACED] = "traced",
    [FL_REFUSAL_SECCOMP] = "seccomp",
    [FL_REFUSAL_PERMISSION] = "permission",
    [FL_REFUSAL_KERNEL] = "kernel",
    [FL_REFUSAL_VAULT_INVALID] = "vault_invalid",
    [FL_REFUSAL_HUGETLB] = "hugetlb",
    [FL_REFUSAL_STUCK] = "stuck",
    [FL_REFUSAL_LIMIT] = "limit",
    [FL_REFUSAL_INTERNAL] = "internal",
};

static const char *const state_names[] = {
    [FL_STATE_STARTING] = "starting", [FL_STATE_ACTIVE] = "active",   [FL_STATE_HOLD] = "hold",
    [FL_STATE_DRAIN] = "drain",       [FL_STATE_CORRUPT] = "corrupt", [FL_STATE_DETACHED] = "detached",
    [FL_STATE_RELEASED] = "released",
};

static const char *const why_names[] = {
    [FL_WHY_EVICTING] = "evicting",   [FL_WHY_LEASE] = "lease",
    [FL_WHY_BUDGET] = "budget",       [FL_WHY_NOTHING_COLD] = "nothing_cold",
    [FL_WHY_RATE] = "rate",           [FL_WHY_BRAKE] = "brake",
    [FL_WHY_TIER_FULL] = "tier_full", [FL_WHY_CORRUPT] = "corrupt",
    [FL_WHY_DRAIN] = "drain",         [FL_WHY_UNSAFE] = "unsafe",
    [FL_WHY_FAILED] = "failed",       [FL_WHY_NO_TRACKER] = "no_tracker",
};

static const char *const tracker_names[] = {
    [FL_TRACKER_NONE] = "none", [FL_TRACKER_RWP] = "rwp",     [FL_TRACKER_ZAP] = "zap",
    [FL_TRACKER_IDLE] = "idle", [FL_TRACKER_DAMON] = "damon",
};

static const char *const freeze_names[] = {
    [FL_FREEZE_NONE] = "none",
    [FL_FREEZE_WP] = "wp",
    [FL_FREEZE_RWP] = "rwp",
};

static const uint32_t age_bin_edges[FL_AGE_BINS] = {0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 255};

static const char *name_of(const char *const *names, size_t count, uint32_t number) {
    return number < count && names[number] ? names[number] : "unknown";
}

const char *fl_refusal_name(uint32_t refusal) {
    return name_of(refusal_names, COUNT(refusal_names), refusal);
}

const char *fl_state_name(uint32_t state) {
    return name_of(state_names, COUNT(state_names), state);
}

const char *fl_why_name(uint32_t why) {
    return name_of(why_names, COUNT(why_names), why);
}

const char *fl_tracker_name(uint32_t tracker) {
    return name_of(tracker_names, COUNT(tracker_names), tracker);
}

const char *fl_freeze_name(uint32_t freeze) {
    return name_of(freeze_names, COUNT(freeze_names), freeze);
}

uint32_t fl_age_bin_edge(uint32_t bin) {
    return bin < FL_AGE_BINS ? age_bin_edges[bin] : UINT32_MAX;
}

uint64_t fl_latency_bucket_edge(uint32_t bucket) {
    /* 256 ns * 2^(bucket / 4), in integers: the four steps of an octave in 1/4096. */
    static const uint64_t step[4] = {4096, 4871, 5793, 6889};
    if (bucket >= FL_LATENCY_BUCKETS)
        return UINT64_MAX;
    return (((uint64_t)256 << (bucket / 4)) * step[bucket % 4]) >> 12;
}

uint64_t fl_latency_percentile(const uint64_t *buckets, uint32_t permille) {
    uint64_t total = 0, seen = 0;
    for (uint32_t i = 0; i < FL_LATENCY_BUCKETS; i++)
        total += buckets[i];
    if (!total)
        return 0;
    for (uint32_t i = 0; i < FL_LATENCY_BUCKETS; i++) {
        seen += buckets[i];
        if (seen * 1000 >= total * permille)
            return fl_latency_bucket_edge(i);
    }
    return fl_latency_bucket_edge(FL_LATENCY_BUCKETS - 1);
}
