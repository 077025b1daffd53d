/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory under a tracker with no pager around it: two regions of one memfd, in this process or another, behind as much of
 * a struct fl_vm as trackers look at.
 */
#ifndef IDLE_FIELD_H
#define IDLE_FIELD_H

#include "track/track.h"

struct idle_field {
    struct fl_vm vm;
    struct fl_tracker *tracker;
    uint8_t *memory; /* of this process; NULL: another's */
    uint32_t pages;
    uint8_t *expected; /* by page: 1 when it should be seen as accessed */
};

/* Skips the test (77) where there is no page_idle. */
void need_page_idle(void);
/* A filled memfd of so many pages, mapped at a multiple of 2 MiB. */
struct idle_field idle_field_make(uint32_t pages);
/* Memory of process `pid`. */
struct idle_field idle_field_of(int pid, uint64_t address, uint32_t pages);
void idle_field_end(struct idle_field *field);

/* Arm; nothing is expected from then on. */
void idle_field_arm(struct idle_field *field);
/* Touch a page of own memory (what it holds stays), and expect it to be seen. */
void idle_field_touch(struct idle_field *field, uint32_t page, bool write);
/* The same of about one page in `every`, chosen at random. */
void idle_field_touch_some(struct idle_field *field, uint32_t first, uint32_t count, uint32_t every, uint64_t *random);
/*
 * What the tracker sees must be exactly what is expected: looked at as by a scan, and as after it (windows of 512 pages,
 * from `offset` on).
 */
void idle_field_check(struct idle_field *field, uint32_t offset, const char *what);

/* Page table entries of the field: bit 63 present, 62 swapped, frame in the lower 55. */
uint64_t idle_field_entry(const struct idle_field *field, uint32_t page);
/* A process that goes on touching what is in its TLB sets no ACCESS bits: have it look again. */
void idle_field_flush_tlbs(void);

#endif
