/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything that can be set, by `fl.NAME=VALUE` on the kernel command line; those marked live also by a
 * console line `NAME VALUE` while the workload runs. All are whole numbers.
 */
#ifndef GUEST_SETTINGS_H
#define GUEST_SETTINGS_H

#include <stdatomic.h>

struct settings {
    _Atomic long mib;                  /* memory to fill */
    _Atomic long max_mib;              /* how far `grow` may go (address space only) */
    _Atomic long seed;                 /* of contents and of every random choice */
    _Atomic long zero_percent;         /* pages of zeros */
    _Atomic long same_percent;         /* same-filled pages */
    _Atomic long random_percent;       /* incompressible pages; the rest is compressible */
    _Atomic long huge_pages;           /* 1: transparent huge pages wanted; 0: kept away */
    _Atomic long threads;              /* for fill and verify; 0: one a CPU */
    _Atomic long interval_ms;          /* between status lines */
    _Atomic long hot_mib;              /* swept once a second, every byte checked */
    _Atomic long hot_write_percent;    /* live: how many of those checks rewrite the page */
    _Atomic long rate;                 /* live: random cold pages checked a second */
    _Atomic long rewrite_percent;      /* live: how many of those rewrite the page */
    _Atomic long writers;              /* live: threads that check and write anywhere */
    _Atomic long writer_rate;          /* live: pages a second, each */
    _Atomic long writer_write_percent; /* live: how many of those rewrite the page */
    _Atomic long probe;                /* 1: say so and power off at once */
};

void settings_default(struct settings *settings);

/* Take `NAME=VALUE`. NULL, or why not (a constant string). */
const char *settings_parse(struct settings *settings, const char *assignment);

/* Set one that is live. NULL, or why not. */
const char *settings_change(struct settings *settings, const char *name, const char *value);

#endif
