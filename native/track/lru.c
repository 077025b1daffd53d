/* SPDX-License-Identifier: Apache-2.0 */
#include "track/lru.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "frostline.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define HUGE_BYTES ((size_t)2 << 20)
#define PAGEMAP_PFN ((UINT64_C(1) << 55) - 1)
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define KPAGE_LRU (UINT64_C(1) << 5)

static bool read_word(const char *path, uint64_t index, uint64_t *out) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool done = fd >= 0 && pread(fd, out, sizeof(*out), (off_t)(index * sizeof(*out))) == (ssize_t)sizeof(*out);
    if (fd >= 0)
        close(fd);
    return done;
}

/* Only a plain no counts: without the right to look, believe that draining works. */
static bool is_off_list(const void *address) {
    uint64_t entry, flags;
    return read_word("/proc/self/pagemap", (uintptr_t)address / FL_PAGE_SIZE, &entry) && (entry & PAGEMAP_PRESENT) &&
           (entry & PAGEMAP_PFN) && read_word("/proc/kpageflags", entry & PAGEMAP_PFN, &flags) && !(flags & KPAGE_LRU);
}

int fl_lru_open(struct fl_lru *lru) {
    *lru = (struct fl_lru){.bytes = 3 * HUGE_BYTES};
    /* Reserved all around, so that the kernel does not join it to a neighbour and give that a huge page. */
    void *reserved = mmap(NULL, lru->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return -errno;
    lru->reserved = reserved;
    lru->empty = (char *)(((uintptr_t)reserved + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1));
    char *page = lru->empty + HUGE_BYTES;
    if (mprotect(lru->empty, HUGE_BYTES + FL_PAGE_SIZE, PROT_READ | PROT_WRITE)) {
        int error = -errno;
        fl_lru_close(lru);
        return error;
    }
    *page = 1; /* a mapping that has never had a page is passed over */
    fl_lru_drain(lru);
    return is_off_list(page) ? -EOPNOTSUPP : 0;
}

void fl_lru_close(struct fl_lru *lru) {
    if (lru->reserved)
        munmap(lru->reserved, lru->bytes);
    lru->reserved = NULL;
}

/* The kernel drains all CPUs before it looks for something to collapse; there is nothing, and it says EINVAL. */
void fl_lru_drain(const struct fl_lru *lru) {
    if (lru->reserved)
        (void)madvise(lru->empty, HUGE_BYTES, MADV_COLLAPSE);
}
