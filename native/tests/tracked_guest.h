/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A KVM guest under a real pager, and a model of what each page's age must be: scans happen only when they are asked
 * for, so what was touched between two of them is known exactly.
 */
#ifndef TRACKED_GUEST_H
#define TRACKED_GUEST_H

#include "base/vault.h"
#include "kvm_vmm.h"
#include "victim.h"

struct tracked_options {
    const char *tracker; /* as for --trackers */
    uint64_t bytes;      /* of guest memory */
    uint32_t vcpus;
    bool large_pages;     /* in the guest's own page tables */
    uint32_t empty_pages; /* so many at the end are not filled in at the start */
    /* NULL, or called when the VMM is up and its memory is still empty. */
    void (*prepare)(struct kvm_vmm *vmm);
};

enum tracked_touch {
    TRACKED_UNTOUCHED,
    TRACKED_TOUCHED,
    TRACKED_UNSURE, /* touched, and then something was done to it that may hide that: not judged */
};

/* Whether the kernel had a page in the VMM's page table when the script that touched it had ended. */
enum tracked_mapped { TRACKED_NOT_LOOKED_AT, TRACKED_MAPPED, TRACKED_NOT_MAPPED };

/* What was seen against what was to be seen. */
struct tracked_score {
    uint64_t scans, voids; /* a void scan tells nothing: ages must not have moved */
    uint64_t right, missed, wrong;
    uint64_t vmm_right, vmm_missed; /* those of them that the VMM alone touched: through its page table, not KVM's */
    uint64_t unsure, unsure_seen;
};

struct tracked_guest {
    struct kvm_vmm vmm;
    struct victim victim; /* what the pager's helpers want */
    pid_t pager;
    char socket_path[64];
    const char *tracker;
    struct fl_pager *connection;
    struct fl_view *view;
    struct fl_vault vault;
    uint64_t cursor; /* in its records */
    uint32_t pages;
    uint8_t *ages, *touched, *there; /* the model: age, enum tracked_touch since the last scan, in the file */
    uint8_t *by_vcpu;                /* touched by one since the last scan */
    uint8_t *mapped;                 /* enum tracked_mapped: as tracked_touch() left it */
    struct tracked_score score;
    uint64_t shown; /* mismatches that were described */
};

struct tracked_guest tracked_start(const struct tracked_options *options);
/* Detach the pager, end the VMM. */
void tracked_end(struct tracked_guest *guest);

/*
 * Start a pager that scans when told to. The first in the VMM's life arms, and takes the ages as they are; with a
 * successor the next scan tells what was touched since its predecessor's last (if the tracker can do that).
 */
void tracked_start_pager(struct tracked_guest *guest);
/* Kill -9, and forget the connection. */
void tracked_kill_pager(struct tracked_guest *guest);

/*
 * Touch these pages with one word each, by one worker or (worker < 0) by all at once, each its share: reads and writes by
 * turns at random. Pages may come more than once.
 */
void tracked_touch(struct tracked_guest *guest, int worker, const uint32_t *pages, uint32_t count, uint64_t *random);

/*
 * Scan, and compare all ages with the model: what was touched is 0, all else one older. Returns the number of
 * mismatches in what was seen as touched; anything else that is not as the model says ends the test.
 */
uint64_t tracked_scan(struct tracked_guest *guest);
struct fl_status tracked_status(struct tracked_guest *guest);

/* Print and judge: of 1,000,000 pages seen, and to be seen, so many must be right. Resets the score. */
void tracked_judge(struct tracked_guest *guest, const char *what, uint64_t least_ppm);

#endif
