/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which page frames lie behind VMM addresses, and what the kernel's page_idle bitmap says of them: both in bulk, and
 * in the bitmap's order, because reading one of its words costs a walk of 64 frames whatever one wants of them.
 *
 *   open, reserve, then as often as you like: find, and mark or accessed. One thread.
 */
#ifndef FL_TRACK_PAGE_IDLE_H
#define FL_TRACK_PAGE_IDLE_H

#include <stddef.h>

#include "swap/vm.h"

#define FL_PAGE_IDLE_PATH "/sys/kernel/mm/page_idle/bitmap"
#define FL_PAGE_IDLE_BATCH (1u << 18) /* most pages in hand at once: 1 GiB of guest memory, 4 MiB of ours */
#define FL_PAGE_IDLE_WORDS 512u       /* of the bitmap, in one call: the kernel takes no more */
#define FL_PAGE_IDLE_LOOKS 4096u      /* addresses asked about by one call */

struct fl_page_idle {
    int bitmap_fd;
    int flags_fd; /* /proc/kpageflags; -1: none, then huge pages look accessed but for their first 4 KiB */
    uint32_t room, count;
    uint64_t *found; /* what find() found: frame and index, by the word of the bitmap */
    uint64_t *spare; /* the sort's */
    uint64_t words[FL_PAGE_IDLE_WORDS];
    uint64_t entries[FL_PAGE_IDLE_LOOKS];
    uint64_t flags[64];
};

/*
 * Whether the bitmap can be used by this process: a page of its own is marked and asked about. If not, `lacks` gets a
 * sentence. Whether it stays marked is not asked: frames that are on no LRU list yet do not.
 */
bool fl_page_idle_try(char *lacks, size_t bytes);

/* -ENODEV: there is no bitmap. -EPERM: it, or the frame numbers, are not for this process. */
int fl_page_idle_open(struct fl_page_idle *idle);
void fl_page_idle_close(struct fl_page_idle *idle);
/* Have room for so many pages (at most FL_PAGE_IDLE_BATCH), no more and no less. What was found is forgotten. */
int fl_page_idle_reserve(struct fl_page_idle *idle, uint32_t pages);

/*
 * Find the frames of the pages [first, first + count) that the VMM has mapped, count <= what was reserved. Faults
 * nothing in. -EPERM: frame numbers are hidden from vm->pagemap_fd. -ESRCH: the VMM has ended. -EAGAIN: it has moved them
 * meanwhile, or a part of its memory at any time.
 */
int fl_page_idle_find(struct fl_page_idle *idle, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count);
/* Index (page - first) of one of the `count` found. */
uint32_t fl_page_idle_index(const struct fl_page_idle *idle, uint32_t which);
/* Mark exactly these as idle. -ENODEV: the bitmap is gone. */
int fl_page_idle_mark(struct fl_page_idle *idle);
/*
 * Set bit i of `accessed` for each of them, page first + i, that is not idle any more, or never was marked. What the
 * kernel does not tell of is not set. Errors as mark().
 */
int fl_page_idle_accessed(struct fl_page_idle *idle, uint64_t *accessed);

#endif
