/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Page a process's memory out to swap from outside, as a daemon without a pager would: process_madvise(MADV_PAGEOUT)
 * in chunks. Prints "BYTES NS" of the calls alone.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/clock.h"
#include "measure.h"

#define CHUNK_BYTES (UINT64_C(64) << 20)

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: bench_pageout PID ADDRESS BYTES CPU\n");
        return 2;
    }
    int pidfd = (int)syscall(SYS_pidfd_open, atoi(argv[1]), 0);
    uint64_t address = strtoull(argv[2], NULL, 0), bytes = strtoull(argv[3], NULL, 0), took = 0;
    if (pidfd < 0 || measure_pin(atoi(argv[4]))) {
        fprintf(stderr, "bench_pageout: process %s, CPU %s: %s\n", argv[1], argv[4], strerror(errno));
        return 1;
    }
    for (uint64_t at = 0; at < bytes; at += CHUNK_BYTES) {
        uint64_t length = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
        struct iovec range = {.iov_base = (void *)(uintptr_t)(address + at), .iov_len = length};
        uint64_t start = fl_clock_read(CLOCK_MONOTONIC);
        long done = syscall(SYS_process_madvise, pidfd, &range, 1, MADV_PAGEOUT, 0);
        took += fl_clock_read(CLOCK_MONOTONIC) - start;
        if (done != (long)length) {
            fprintf(stderr, "bench_pageout: process_madvise(MADV_PAGEOUT) at %llx: %s\n",
                    (unsigned long long)(address + at), done < 0 ? strerror(errno) : "a part only");
            return 1;
        }
    }
    printf("%llu %llu\n", (unsigned long long)bytes, (unsigned long long)took);
    return 0;
}
