/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process that stands for a VMM: guest memory in a shared memfd, and one thread that touches it and says how long
 * that took. It takes commands, a line each, on its standard input and answers each with a line on its standard output:
 *
 *   touch FIRST COUNT   touch COUNT pages of the current order from its FIRST on, timing each; the answer's line
 *                       "COUNT ERRORS END_NS" is followed by COUNT times (uint32, ns, host byte order)
 *   sweep STEP          touch every STEP-th page in address order: "NS"
 *   order SEED          another random order
 *   verify FIRST COUNT  compare pages of the order with what was written: "ERRORS"
 *   resident            pages of the memory that are in host RAM: "PAGES"
 *   punch               drop all memory from the file (with --bare: so that every touch faults): "0"
 *   bare                median time of the bare server from message to page, since the last call: "NS"
 *   where               address and bytes of the memory: "ADDRESS BYTES"
 *
 * Whatever goes wrong ends the process with a message. It ends with its standard input, and with its parent.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "bare.h"
#include "base/clock.h"
#include "content.h"
#include "measure.h"

struct victim {
    int cpu, fd;
    uint8_t *memory;
    uint32_t pages;
    uint32_t *order;
    uint32_t *times;
    struct bare *bare;
};

static void fail(const char *what) {
    fprintf(stderr, "bench_victim: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t bytes_of(const struct victim *victim) {
    return (uint64_t)victim->pages * BENCH_PAGE_BYTES;
}

static uint64_t word_of(const struct victim *victim, uint32_t page) {
    return *(const volatile uint64_t *)(victim->memory + (uint64_t)page * BENCH_PAGE_BYTES);
}

static void touch(struct victim *victim, uint32_t first, uint32_t count) {
    uint32_t errors = 0;
    if (first > victim->pages || count > victim->pages - first) {
        errno = ERANGE;
        fail("touch beyond the memory");
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = victim->order[first + i];
        uint64_t start = fl_clock_read(CLOCK_MONOTONIC);
        uint64_t word = word_of(victim, page);
        uint64_t took = fl_clock_read(CLOCK_MONOTONIC) - start;
        victim->times[i] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
        errors += word != bench_content_stamp(page);
    }
    printf("%u %u %llu\n", count, errors, (unsigned long long)fl_clock_read(CLOCK_MONOTONIC));
    if (fwrite(victim->times, sizeof(*victim->times), count, stdout) != count)
        fail("write of the times");
}

static void sweep(const struct victim *victim, uint32_t step) {
    uint64_t sum = 0, start = fl_clock_read(CLOCK_MONOTONIC);
    for (uint32_t page = 0; step && page < victim->pages; page += step)
        sum += word_of(victim, page);
    uint64_t took = fl_clock_read(CLOCK_MONOTONIC) - start;
    printf("%llu %llx\n", (unsigned long long)took, (unsigned long long)sum);
}

static void verify(const struct victim *victim, uint32_t first, uint32_t count) {
    uint32_t errors = 0;
    for (uint32_t i = first; i < victim->pages && i - first < count; i++)
        errors += !bench_content_is(victim->order[i], victim->memory + (uint64_t)victim->order[i] * BENCH_PAGE_BYTES);
    printf("%u\n", errors);
}

static void resident(const struct victim *victim) {
    unsigned char *there = malloc(victim->pages);
    uint32_t pages = 0;
    if (!there || mincore(victim->memory, bytes_of(victim), there))
        fail("mincore");
    for (uint32_t i = 0; i < victim->pages; i++)
        pages += there[i] & 1;
    free(there);
    printf("%u\n", pages);
}

static void obey(struct victim *victim, const char *line) {
    unsigned long long first = 0, count = 0;
    if (sscanf(line, "touch %llu %llu", &first, &count) == 2) {
        touch(victim, (uint32_t)first, (uint32_t)count);
    } else if (sscanf(line, "sweep %llu", &count) == 1) {
        sweep(victim, (uint32_t)count);
    } else if (sscanf(line, "order %llu", &first) == 1) {
        bench_permutation(first, victim->pages, victim->order);
        puts("0");
    } else if (sscanf(line, "verify %llu %llu", &first, &count) == 2) {
        verify(victim, (uint32_t)first, (uint32_t)count);
    } else if (strcmp(line, "resident\n") == 0) {
        resident(victim);
    } else if (strcmp(line, "where\n") == 0) {
        printf("%llu %llu\n", (unsigned long long)(uintptr_t)victim->memory, (unsigned long long)bytes_of(victim));
    } else if (strcmp(line, "punch\n") == 0) {
        if (fallocate(victim->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes_of(victim)))
            fail("fallocate");
        puts("0");
    } else if (strcmp(line, "bare\n") == 0 && victim->bare) {
        printf("%u\n", bare_median_ns(victim->bare));
    } else {
        errno = EINVAL;
        fail(line);
    }
    if (fflush(stdout))
        fail("write of an answer");
}

/* Guest memory is touched by this thread only: the main thread stays free to be stopped by whoever attaches. */
static void *run(void *argument) {
    struct victim *victim = argument;
    char line[128];
    if (measure_pin(victim->cpu))
        fail("sched_setaffinity");
    printf("ready\n");
    if (fflush(stdout))
        fail("write");
    while (fgets(line, sizeof(line), stdin))
        obey(victim, line);
    exit(0);
}

static void make_memory(struct victim *victim, uint64_t mib) {
    victim->pages = (uint32_t)(mib << 20 >> 12);
    victim->fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    if (victim->fd < 0 || ftruncate(victim->fd, (off_t)bytes_of(victim)))
        fail("memfd_create");
    victim->memory = mmap(NULL, bytes_of(victim), PROT_READ | PROT_WRITE, MAP_SHARED, victim->fd, 0);
    victim->order = calloc(victim->pages, sizeof(*victim->order));
    victim->times = calloc(victim->pages, sizeof(*victim->times));
    if (victim->memory == MAP_FAILED || !victim->order || !victim->times)
        fail("memory");
    memset(victim->times, 1, victim->pages * sizeof(*victim->times)); /* no fault of its own between two times */
    for (uint32_t page = 0; page < victim->pages; page++)
        bench_content_fill(page, victim->memory + (uint64_t)page * BENCH_PAGE_BYTES);
    bench_permutation(1, victim->pages, victim->order);
}

int main(int argc, char **argv) {
    static const struct option known[] = {
        {"mib", required_argument, NULL, 'm'},
        {"cpu", required_argument, NULL, 'c'},
        {"bare-cpu", required_argument, NULL, 'b'},
        {"name", required_argument, NULL, 'n'}, /* as an emulator has it; for whoever reads the command line */
        {0},
    };
    struct victim victim = {.cpu = -1};
    uint64_t mib = 64;
    int bare_cpu = -1, error;
    bool bare = false;
    pthread_t thread;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (option == 'm') {
            mib = strtoull(optarg, NULL, 10);
        } else if (option == 'c') {
            victim.cpu = atoi(optarg);
        } else if (option == 'b') {
            bare = true;
            bare_cpu = atoi(optarg);
        } else if (option != 'n') {
            return 2;
        }
    }
    if (mib < 1 || mib > 65536) {
        fprintf(stderr, "usage: bench_victim [--mib 1...65536] [--cpu N] [--bare-cpu N]\n");
        return 2;
    }
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    make_memory(&victim, mib);
    if (bare && (error = bare_start(victim.memory, bytes_of(&victim), bare_cpu, &victim.bare))) {
        errno = -error;
        fail("userfaultfd");
    }
    if ((error = pthread_create(&thread, NULL, run, &victim))) {
        errno = error;
        fail("pthread_create");
    }
    pthread_join(thread, NULL);
    return 0;
}
