/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The damon tracker with no pager around it, on the memory of a VMM of kvm_vmm.h: as two regions of a VM, next to each other,
 * behind as much of a struct fl_vm as trackers look at. And the host's DAMON, as others see it.
 */
#ifndef DAMON_FIELD_H
#define DAMON_FIELD_H

#include "kvm_vmm.h"
#include "track/track.h"

#define DAMON_KDAMONDS "/sys/kernel/mm/damon/admin/kdamonds/"
#define DAMON_STAT "/sys/module/damon_stat/parameters/enabled"
#define DAMON_RECLAIM "/sys/module/damon_reclaim/parameters/enabled"
#define DAMON_EXACT_MS 3600000u /* between scans: the budget is for page-exact, however slow the machine */

struct damon_field {
    struct kvm_vmm vmm;
    struct fl_vm vm;
    struct fl_tracker *tracker;
    uint32_t pages;
    uint8_t *expected, *seen;  /* by page; expected: DAMON_BY_... */
    double arm_ms, collect_ms; /* so far, by the clock */
};

#define DAMON_BY_VCPU 1u
#define DAMON_BY_VMM 2u

struct damon_score { /* of pages */
    uint64_t right, missed, wrong;
    uint64_t vmm_right, vmm_missed; /* those of them that the VMM alone touched: through its page table, not KVM's */
};

/* Skips the test (77), and says why, where there is no damon tracker or no KVM guest. */
void need_damon(void);
/* Neither is made by a tracker yet: a VMM with its memory, filled or not. */
struct damon_field *damon_field_make(uint64_t bytes, uint32_t vcpus, uint32_t interval_ms, bool filled);
void damon_field_end(struct damon_field *field);

int damon_field_create(struct damon_field *field);
void damon_field_destroy(struct damon_field *field);
int damon_field_arm(struct damon_field *field);
int damon_field_collect(struct damon_field *field);
/* Arm, and nothing is expected; collect and harvest into `seen`. Exits the test on errors. */
void damon_field_begin(struct damon_field *field);
void damon_field_look(struct damon_field *field);

/* One touch each of the listed pages, by any of the workers, and they are expected to be seen. */
void damon_field_touch(struct damon_field *field, const uint32_t *pages, uint32_t count, uint64_t *random);
uint32_t damon_field_seen(const struct damon_field *field);
void damon_field_add_score(const struct damon_field *field, struct damon_score *score);
double damon_recall(const struct damon_score *score);
double damon_vmm_recall(const struct damon_score *score);
double damon_precision(const struct damon_score *score);

/* A file of the kernel's; missing: the empty text, or -1. */
void damon_read(const char *path, char *text, size_t bytes);
long damon_read_number(const char *path);
/* 0 or a negative errno; waits while DAMON's sysfs is busy. */
int damon_write(const char *path, const char *text);

#endif
