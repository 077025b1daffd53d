/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How exact each tracker of this host is: a hundred rounds of random scripts on a KVM guest's 4 KiB pages, each round
 * compared page by page with what the scripts touched: by any vCPU, by all at once, by the VMM itself, or by nobody. What the
 * VMM touches is judged by itself, too: it goes another way, and would be lost among what the vCPUs touch. The ages of all
 * that was not touched must grow by one each time. The VMM's own memory, very large and very hot, shows nowhere.
 */
#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "served_vm.h"
#include "slow.h"
#include "tracked_guest.h"

#define MIB (UINT64_C(1) << 20)
#define ROUNDS (SANITIZED ? 20u : 100u) /* all of them also on an emulated machine: exact is a matter of many */
#define TRIES 4u
#define POLLED_PAGES 40u
#define POLL_SCANS 11u
#define SECONDS 60u
#define PPM_ALL 1000000u

struct subject {
    const char *tracker;
    uint64_t bytes;
    uint32_t touches; /* most of one round */
    uint64_t least_ppm;
    bool alone; /* it arms without anybody's help, and without a deadline */
};

/*
 * DAMON samples, and what is not on an LRU list at that moment cannot be seen: 99 %. For zap the VMM's main thread must
 * get a CPU within 200 ms, which beside much else it does not always: then the scan is void, and another is made.
 */
static const struct subject subjects[] = {
    {"rwp", 256 * MIB, 1000, PPM_ALL, true},
    {"zap", 256 * MIB, 1000, PPM_ALL, false},
    {"idle", 128 * MIB, 1000, PPM_ALL, false},
    {"damon", 32 * MIB, 500, 990000, false},
};

static uint32_t below(uint64_t *random, uint32_t limit) {
    return (uint32_t)(random_next(random) % limit);
}

/* Pages of a round: scattered, in a few runs, the same few again and again, or one. */
static uint32_t choose_pages(const struct tracked_guest *guest, uint32_t most, uint32_t *pages, uint64_t *random) {
    uint32_t count = 1 + below(random, most);
    uint32_t way = below(random, 8), start = 0, few = 1 + below(random, 20);
    if (way == 0)
        count = 1;
    for (uint32_t i = 0; i < count; i++) {
        if (way < 4)
            pages[i] = below(random, guest->pages);
        else if (way < 6)
            pages[i] = start = i % 50 ? (start + 1) % guest->pages : below(random, guest->pages);
        else if (i < few)
            pages[i] = below(random, guest->pages);
        else
            pages[i] = pages[below(random, few)];
    }
    return count;
}

static void run_round(struct tracked_guest *guest, unsigned round, uint32_t most, uint64_t *random) {
    uint32_t pages[1000], host = kvm_vmm_host(&guest->vmm);
    CHECK(most <= sizeof(pages) / sizeof(pages[0]), "too many touches");
    if (round % 10 == 0) { /* nobody */
        (void)tracked_scan(guest);
        return;
    }
    int worker = round % 10 == 1 ? (int)host : round % 3 == 0 ? -1 : (int)below(random, host);
    for (unsigned i = 1 + below(random, 2); i > 0; i--)
        tracked_touch(guest, worker, pages, choose_pages(guest, most, pages, random), random);
    (void)tracked_scan(guest);
}

/* Guest memory that there is, and nothing else, is in the histograms. */
static void check_histograms(struct tracked_guest *guest) {
    struct fl_status status = tracked_status(guest);
    uint64_t sum = 0, there = 0;
    for (uint32_t i = 0; i < FL_AGE_BINS; i++)
        sum += status.resident_age_bytes[i] + status.evicted_age_bytes[i];
    for (uint32_t page = 0; page < guest->pages; page++)
        there += guest->there[page];
    CHECK(sum == there * KVM_GUEST_PAGE && status.memory_bytes == kvm_guest_bytes(guest->vmm.guest),
          "the histograms sum to %llu MiB and %llu MiB of guest memory were touched", (unsigned long long)(sum / MIB),
          (unsigned long long)(there * KVM_GUEST_PAGE / MIB));
}

/* So many that were not void: how many more it takes depends on what else the machine does. */
static void run_rounds(struct tracked_guest *guest, unsigned count, uint32_t most, uint64_t *random) {
    unsigned whole = 0;
    for (unsigned round = 0; whole < count && round < TRIES * count; round++) {
        run_round(guest, round, most, random);
        whole = (unsigned)(guest->score.scans - guest->score.voids);
    }
    CHECK(whole == count, "%s: %u whole scans in %u", guest->tracker, whole, TRIES * count);
    check_histograms(guest);
}

/* All threads of a process on these CPUs, as far as they can be. */
static void pin(pid_t pid, const cpu_set_t *cpus) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    CHECK(tasks, "%s: %s", path, strerror(errno));
    for (struct dirent *task; (task = readdir(tasks));)
        if (atoi(task->d_name) > 0)
            (void)sched_setaffinity(atoi(task->d_name), sizeof(*cpus), cpus);
    closedir(tasks);
}

/* The VMM alone on one CPU, and pager and test on the others: so that no switch of process empties its TLB. */
static void keep_apart(const struct tracked_guest *guest, bool apart) {
    cpu_set_t all, mine, rest;
    CPU_ZERO(&all);
    for (long cpu = 0; cpu < sysconf(_SC_NPROCESSORS_CONF) && cpu < CPU_SETSIZE; cpu++)
        CPU_SET((size_t)cpu, &all);
    rest = all;
    CPU_ZERO(&mine);
    CPU_SET(1, &mine);
    CPU_CLR(1, &rest);
    pin(guest->vmm.pid, apart ? &mine : &all);
    pin(guest->pager, apart ? &rest : &all);
    pin(getpid(), apart ? &rest : &all);
}

/*
 * A thread of the VMM that does not leave its CPU (it polls a queue in guest memory, say) keeps its pages in the TLB, and sets no
 * ACCESS bit again on its own.
 */
static void check_polled(struct tracked_guest *guest, uint64_t least_ppm) {
    struct kvm_touch script[POLLED_PAGES];
    uint32_t host = kvm_vmm_host(&guest->vmm);
    for (uint32_t i = 0; i < POLLED_PAGES; i++)
        script[i] = (struct kvm_touch){.page = 100 + 7 * i, .kind = KVM_TOUCH_LOAD, .times = 1};
    keep_apart(guest, true);
    kvm_vmm_begin(&guest->vmm, host, script, POLLED_PAGES, 0);
    for (unsigned scan = 0; scan < POLL_SCANS; scan++) {
        uint64_t passes = kvm_guest_passes(guest->vmm.guest, host) + 2; /* also before it is first asked about */
        for (unsigned i = 0; i < SECONDS * 1000 && kvm_guest_passes(guest->vmm.guest, host) < passes; i++)
            sleep_ms(1);
        for (uint32_t i = 0; i < POLLED_PAGES; i++)
            guest->touched[script[i].page] = scan ? TRACKED_TOUCHED : TRACKED_UNSURE;
        (void)tracked_scan(guest);
    }
    CHECK(kvm_vmm_stop(&guest->vmm, host, SECONDS).error == 0, "the VMM's thread");
    keep_apart(guest, false);
    for (uint32_t i = 0; i < POLLED_PAGES; i++)
        guest->touched[script[i].page] = TRACKED_UNSURE;
    (void)tracked_scan(guest);
    tracked_judge(guest, "polled by a thread of the VMM", least_ppm);
}

struct total { /* of all rounds of a tracker */
    uint64_t scans, voids;
    uint64_t vmm_right, vmm_missed;
};

static void judge(struct tracked_guest *guest, const char *what, uint64_t least_ppm, struct total *total) {
    total->scans += guest->score.scans;
    total->voids += guest->score.voids;
    total->vmm_right += guest->score.vmm_right;
    total->vmm_missed += guest->score.vmm_missed;
    tracked_judge(guest, what, least_ppm);
}

static void judge_total(const struct subject *subject, const struct total *total) {
    uint64_t by_vmm = total->vmm_right + total->vmm_missed;
    printf("%-5s touched by the VMM alone: %llu pages, recall %.4f %%\n", subject->tracker, (unsigned long long)by_vmm,
           by_vmm ? 100.0 * (double)total->vmm_right / (double)by_vmm : 100);
    CHECK(by_vmm > 0 && total->vmm_missed * 1000000 <= by_vmm * (1000000 - subject->least_ppm),
          "%s: %llu of %llu touches by the VMM missed", subject->tracker, (unsigned long long)total->vmm_missed,
          (unsigned long long)by_vmm);
    CHECK(!subject->alone || total->voids <= 1, "%s: %llu of %llu scans were void", subject->tracker,
          (unsigned long long)total->voids, (unsigned long long)total->scans);
}

static void check_tracker(const struct subject *subject, bool large_pages, unsigned count, uint64_t *random,
                          struct total *total) {
    struct tracked_guest guest = tracked_start(&(struct tracked_options){.tracker = subject->tracker,
                                                                         .bytes = subject->bytes,
                                                                         .vcpus = 1 + below(random, 4),
                                                                         .large_pages = large_pages,
                                                                         .empty_pages = 256});
    char what[96];
    if (!large_pages) /* first: what a flush of the TLBs lives on is used up with time (track/tlb.h) */
        check_polled(&guest, subject->least_ppm);
    run_rounds(&guest, count, subject->touches, random);
    snprintf(what, sizeof(what), "%u vCPUs, guest's own pages of %s", kvm_vmm_host(&guest.vmm),
             large_pages ? "2 MiB" : "4 KiB");
    judge(&guest, what, subject->least_ppm, total);
    if (!large_pages) {
        kvm_vmm_heat(&guest.vmm, 128 * MIB, 128 * MIB, SECONDS);
        run_rounds(&guest, count / 10, subject->touches, random);
        judge(&guest, "with 256 MiB of the VMM's own very hot", subject->least_ppm, total);
    }
    tracked_end(&guest);
}

int main(int argc, char **argv) {
    const char *only = argc > 2 ? argv[2] : NULL;
    unsigned tried = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    need_paging();
    uint64_t random = seed_of(argc, argv);
    for (size_t i = 0; i < sizeof(subjects) / sizeof(subjects[0]); i++) {
        struct timespec start, end;
        struct total total = {0};
        const char *missing = tracker_missing(subjects[i].tracker);
        if (only && strcmp(only, subjects[i].tracker) != 0)
            continue;
        if (missing) {
            printf("%-5s not tried: %s\n", subjects[i].tracker, missing);
            continue;
        }
        clock_gettime(CLOCK_MONOTONIC, &start);
        check_tracker(&subjects[i], false, ROUNDS, &random, &total);
        check_tracker(&subjects[i], true, ROUNDS / 10, &random, &total);
        judge_total(&subjects[i], &total);
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("%-5s took %lld s\n", subjects[i].tracker, (long long)(end.tv_sec - start.tv_sec));
        tried++;
    }
    if (!tried)
        printf("skipped: no tracker works here\n");
    return tried ? 0 : 77;
}
