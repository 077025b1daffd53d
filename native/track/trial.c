/* SPDX-License-Identifier: Apache-2.0 */
#include "track/trial.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/kernel.h"
#include "swap/uffd.h"
#include "track/pagemap.h"

#define PAGES 2u /* the first is in the file and mapped, the second only in the file */
#define BYTES ((uint64_t)PAGES * FL_PAGE_SIZE)
#define FIRST 1u /* bits of what scan() says */
#define TRIES 3u /* the host may take a page away in the middle of a trial */
#define AGAIN_TRIES 200u

struct scratch {
    struct fl_vm vm; /* as far as swap/uffd.h and track/pagemap.h look at it */
    int file;
    int other; /* what is copied from and to, so that the kernel touches the pages and not we */
    uint8_t *memory;
    uint64_t at;
    char *lacks;
    size_t bytes;
};

static bool fails(struct scratch *s, const char *what, int error) {
    snprintf(s->lacks, s->bytes, "%s fails: %s", what, strerror(-error));
    return false;
}

static bool is_half(struct scratch *s, const char *what) {
    snprintf(s->lacks, s->bytes, "%s", what);
    return false;
}

static void close_scratch(struct scratch *s) {
    if (s->vm.uffd >= 0)
        close(s->vm.uffd);
    if (s->memory)
        munmap(s->memory, BYTES);
    const int files[] = {s->vm.pagemap_fd, s->file, s->other};
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
        if (files[i] >= 0)
            close(files[i]);
}

static bool open_scratch(struct scratch *s, char *lacks, size_t bytes) {
    static const uint8_t filled[BYTES] = {1};
    *s = (struct scratch){.vm = {.pid = getpid(), .uffd = -1}, .lacks = lacks, .bytes = bytes};
    s->vm.pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    s->file = memfd_create("frostline-trial", MFD_CLOEXEC);
    s->other = memfd_create("frostline-trial", MFD_CLOEXEC);
    if (s->vm.pagemap_fd < 0 || s->file < 0 || s->other < 0)
        return fails(s, "to open /proc/self/pagemap and two memfds for a trial", -errno);
    if (pwrite(s->file, filled, BYTES, 0) != (ssize_t)BYTES || pwrite(s->other, filled, 1, 0) != 1)
        return fails(s, "to fill a memfd for a trial", -errno);
    void *memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, s->file, 0);
    if (memory == MAP_FAILED)
        return fails(s, "to map a memfd for a trial", -errno);
    s->memory = memory;
    s->at = (uint64_t)(uintptr_t)memory;
    (void)munlock(memory, BYTES); /* a pager locks all that it maps, and locked pages cannot be dropped */
    (void)madvise(memory, BYTES, MADV_NOHUGEPAGE);
    ((volatile uint8_t *)memory)[0] = filled[0]; /* a write: reading might map the second page too */
    return true;
}

/* Touches by the kernel, which get EFAULT where a thread of a VMM would wait. */
static bool reads(struct scratch *s, uint32_t page) {
    return pwrite(s->other, s->memory + (size_t)page * FL_PAGE_SIZE, 1, 0) == 1;
}

static bool writes(struct scratch *s, uint32_t page) {
    return pread(s->other, s->memory + (size_t)page * FL_PAGE_SIZE, 1, 0) == 1;
}

/* Which of the pages are of `kind`, one bit each; or a negative errno. */
static int scan(struct scratch *s, struct fl_pagemap_kind kind) {
    struct fl_pagemap pagemap;
    int found = 0;
    for (uint64_t from = s->at, end = s->at + BYTES; from < end;) {
        long runs = fl_pagemap_runs(&pagemap, &s->vm, kind, &from, end);
        if (runs < 0)
            return (int)runs;
        for (long i = 0; i < runs; i++)
            for (uint64_t page = pagemap.runs[i].start; page < pagemap.runs[i].end; page += FL_PAGE_SIZE)
                found |= 1 << (page - s->at) / FL_PAGE_SIZE;
    }
    return found;
}

/* Another thread of this process may change its mappings meanwhile. */
static int protect(struct scratch *s, bool on) {
    return fl_uffd_protect_patiently(&s->vm, s->at, BYTES, on, AGAIN_TRIES);
}

/* A userfaultfd on both pages that never makes the kernel wait for an answer. */
static bool register_scratch(struct scratch *s, enum fl_freeze freeze) {
    int error = fl_uffd_open_own(UFFD_USER_MODE_ONLY, &s->vm.uffd);
    if (error)
        return fails(s, "userfaultfd", error);
    s->vm.freeze = freeze;
    error = fl_uffd_api(s->vm.uffd, fl_uffd_features(freeze));
    if (error)
        return fails(s,
                     freeze == FL_FREEZE_RWP ? "UFFDIO_API with RWP, RWP_ASYNC and MINOR_SHMEM"
                                             : "UFFDIO_API with WP on shmem",
                     error);
    error = fl_uffd_register(&s->vm, s->at, BYTES);
    if (error)
        return fails(s, freeze == FL_FREEZE_RWP ? "UFFDIO_REGISTER MISSING|MINOR|RWP" : "UFFDIO_REGISTER MISSING|WP",
                     error);
    return true;
}

/* ---- PAGEMAP_SCAN ------------------------------------------------------------------------------------------- */

static bool scan_tells(struct scratch *s) {
    int mapped = scan(s, FL_PAGES_MAPPED);
    if (mapped < 0)
        return fails(s, "PAGEMAP_SCAN", mapped);
    if (!(mapped & FIRST))
        return is_half(s, "PAGEMAP_SCAN does not tell of a page that is mapped");
    if (madvise(s->memory, BYTES, MADV_DONTNEED))
        return fails(s, "MADV_DONTNEED on a memfd", -errno);
    return scan(s, FL_PAGES_MAPPED) == 0 || is_half(s, "PAGEMAP_SCAN tells of pages that are not mapped any more");
}

/* ---- WP ----------------------------------------------------------------------------------------------------- */

/* Registration for WP turns fault-around off: what is mapped was touched. Without PAGEMAP_SCAN there is nothing to ask. */
static bool maps_what_is_touched(struct scratch *s) {
    if (madvise(s->memory, BYTES, MADV_DONTNEED) || !reads(s, 0))
        return fails(s, "to drop and touch a page that is registered for WP", -errno);
    int mapped = scan(s, FL_PAGES_MAPPED);
    return mapped < 0 || mapped == FIRST || is_half(s, "registered for WP, a touch maps the pages beside it too");
}

static bool wp_works(struct scratch *s) {
    if (!register_scratch(s, FL_FREEZE_WP))
        return false;
    int error = protect(s, true);
    if (error)
        return fails(s, "UFFDIO_WRITEPROTECT", error);
    if (writes(s, 0))
        return is_half(s, "UFFDIO_WRITEPROTECT does not keep writes from a page");
    if (writes(s, 1))
        return is_half(s, "UFFDIO_WRITEPROTECT does not keep writes from a page that is in the file and not mapped "
                          "(CONFIG_PTE_MARKER_UFFD_WP)");
    error = protect(s, false);
    if (error)
        return fails(s, "UFFDIO_WRITEPROTECT, to lift the protection,", error);
    if (!writes(s, 0) || !writes(s, 1))
        return is_half(s, "UFFDIO_WRITEPROTECT does not lift the protection");
    return maps_what_is_touched(s);
}

/* ---- RWP ---------------------------------------------------------------------------------------------------- */

static bool freezes(struct scratch *s) {
    int error = fl_uffd_sync(&s->vm, true);
    if (error)
        return fails(s, "UFFDIO_SET_MODE to sync mode", error);
    if (reads(s, 0))
        return is_half(s, "a page protected by UFFDIO_RWPROTECT can be read in sync mode");
    error = fl_uffd_sync(&s->vm, false);
    return !error || fails(s, "UFFDIO_SET_MODE to async mode", error);
}

static bool rwp_works(struct scratch *s) {
    if (!register_scratch(s, FL_FREEZE_RWP))
        return false;
    int error = protect(s, true);
    if (error)
        return fails(s, "UFFDIO_RWPROTECT", error);
    int accessed = scan(s, FL_PAGES_ACCESSED);
    if (accessed < 0)
        return fails(s, "PAGEMAP_SCAN for PAGE_IS_ACCESSED", accessed);
    if (accessed)
        return is_half(s, "UFFDIO_RWPROTECT leaves a page accessed, by PAGEMAP_SCAN");
    if (!freezes(s))
        return false;
    if (!reads(s, 0))
        return is_half(s, "in async mode the kernel does not lift the protection of a page that is touched");
    if (scan(s, FL_PAGES_ACCESSED) != FIRST)
        return is_half(s, "PAGEMAP_SCAN for PAGE_IS_ACCESSED does not tell of exactly the page that was touched");
    return !reads(s, 1) || is_half(s, "MINOR does not see the touch of a page that is in the file and not mapped");
}

/* ---- trials ------------------------------------------------------------------------------------------------- */

static bool try_out(bool (*works)(struct scratch *), char *lacks, size_t bytes) {
    bool does = false;
    for (uint32_t i = 0; i < TRIES && !does; i++) {
        struct scratch scratch;
        does = open_scratch(&scratch, lacks, bytes) && works(&scratch);
        close_scratch(&scratch);
    }
    if (does)
        lacks[0] = 0;
    return does;
}

bool fl_trial_pagemap_scan(char *lacks, size_t bytes) {
    return try_out(scan_tells, lacks, bytes);
}

bool fl_trial_wp(uint64_t offered, char *lacks, size_t bytes) {
    if (~offered & fl_uffd_features(FL_FREEZE_WP)) {
        snprintf(lacks, bytes,
                 "this kernel's userfaultfd has no WP on shmem: CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP");
        return false;
    }
    return try_out(wp_works, lacks, bytes);
}

bool fl_trial_rwp(uint64_t offered, char *lacks, size_t bytes) {
    if (!(offered & UFFD_FEATURE_RWP)) {
        snprintf(lacks, bytes, "this kernel's userfaultfd has no RWP: CONFIG_USERFAULTFD_RWP (Linux 7.3)");
        return false;
    }
    if (~offered & fl_uffd_features(FL_FREEZE_RWP)) {
        snprintf(lacks, bytes, "this kernel's userfaultfd has RWP without %s",
                 !(offered & UFFD_FEATURE_RWP_ASYNC)     ? "RWP_ASYNC"
                 : !(offered & UFFD_FEATURE_MINOR_SHMEM) ? "MINOR_SHMEM"
                                                         : "MISSING and WP on shmem");
        return false;
    }
    return try_out(rwp_works, lacks, bytes);
}
