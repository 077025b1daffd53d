/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random bits stand in every entry of a page table. Each page is touched by a thread of its own, as by a vCPU: within
 * some seconds every one of them has its content or an error, none has a wrong one or hangs, and the pager is at rest
 * afterwards.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "base/clock.h"
#include "base/log.h"
#include "served_vm.h"
#include "slow.h"
#include "swap/entry.h"
#include "victim.h"

#define PAGES 512u
#define WORDS (FL_PAGE_SIZE / sizeof(uint64_t))
#define EVICTED 64u /* at first: the table has all kinds of pages */
#define STACK_BYTES 65536u
#define SECONDS (runs_slowly() ? 60u : 10u)
#define REST_MS 2000u
#define REST_PERCENT 20.0

enum outcome { UNTOUCHED, WAITS, RIGHT, ERROR, WRONG, OUTCOMES };

struct toucher {
    _Atomic(uint32_t) ready, go;
    _Atomic(uint8_t) outcome[PAGES];
};

static struct toucher *toucher;
static uint64_t *memory; /* of the VMM */
static struct fl_vm vm;
static __thread sigjmp_buf on_error;

static void take_error(int number) {
    (void)number;
    siglongjmp(on_error, 1);
}

/* Runs of equal words: worth evicting. */
static uint64_t word_of(uint32_t page, uint32_t word) {
    return ((uint64_t)page << 32 | word / 16) * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

static void *touch(void *argument) {
    uint32_t page = (uint32_t)(uintptr_t)argument;
    while (!atomic_load(&toucher->go))
        sleep_ms(5);
    atomic_store(&toucher->outcome[page], WAITS);
    if (sigsetjmp(on_error, 1)) {
        atomic_store(&toucher->outcome[page], ERROR);
        return NULL;
    }
    const volatile uint64_t *words = memory + page * WORDS;
    bool right = true;
    for (uint32_t i = 0; i < WORDS; i++)
        right &= words[i] == word_of(page, i);
    atomic_store(&toucher->outcome[page], right ? RIGHT : WRONG);
    return NULL;
}

static void be_vmm(void) {
    struct sigaction action = {.sa_handler = take_error};
    pthread_attr_t attributes;
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)PAGES * FL_PAGE_SIZE) == 0, "memfd: %s", strerror(errno));
    memory = mmap(NULL, (size_t)PAGES * FL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
    for (uint32_t page = 0; page < PAGES; page++)
        for (uint32_t i = 0; i < WORDS; i++)
            memory[page * WORDS + i] = word_of(page, i);
    CHECK(sigaction(SIGBUS, &action, NULL) == 0, "sigaction: %s", strerror(errno));
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, STACK_BYTES) == 0,
          "attributes");
    for (uintptr_t page = 0; page < PAGES; page++)
        CHECK(pthread_create(&thread, &attributes, touch, (void *)page) == 0, "thread of page %u", (unsigned)page);
    atomic_store(&toucher->ready, 1);
    while (true)
        sleep_ms(1000);
}

static pid_t vmm_start(void) {
    toucher = mmap(NULL, sizeof(*toucher), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(toucher != MAP_FAILED, "mmap: %s", strerror(errno));
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0)
        be_vmm();
    for (unsigned i = 0; i < 60000 && !atomic_load(&toucher->ready); i++)
        sleep_ms(1);
    CHECK(atomic_load(&toucher->ready), "the VMM does not start");
    return pid;
}

static bool is_owned(fl_entry entry) {
    fl_entry before;
    if (fl_entry_valid(entry) || !fl_entry_before_flip(entry, &before))
        return false;
    enum fl_page_state state = fl_entry_state(before);
    return state == FL_PAGE_PUNCHING || state == FL_PAGE_LOADING || state == FL_PAGE_BUSY;
}

/* How many of them look as if somebody owned the page, but for one flipped bit; some do, or the test proves nothing. */
static uint32_t spoil_entries(uint64_t *random) {
    uint32_t owned = 0;
    for (uint32_t page = 0; page < PAGES; page++) {
        fl_entry entry;
        do
            entry = random_next(random);
        while (fl_entry_valid(entry) || (page < 8 && !is_owned(entry)));
        owned += is_owned(entry);
        atomic_store(fl_slot(&vm, fl_region(&vm, 0)->first_page + page), entry);
    }
    return owned;
}

static void count_outcomes(uint32_t count[OUTCOMES]) {
    memset(count, 0, OUTCOMES * sizeof(*count));
    for (uint32_t page = 0; page < PAGES; page++)
        count[atomic_load(&toucher->outcome[page])]++;
}

static double cpu_ms(void) {
    struct rusage usage;
    CHECK(getrusage(RUSAGE_SELF, &usage) == 0, "getrusage");
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1e3 +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e3;
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    const struct fl_tracker_list trackers = trackers_of("zap");
    uint32_t count[OUTCOMES];
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    fl_log_setup(FL_LOG_ERROR, 0);
    pid_t vmm = vmm_start();
    struct fl_fault_server *faults = served_vm_begin(&vm, vmm, &trackers, 2);
    evict_first(&vm, EVICTED);
    uint32_t owned = spoil_entries(&random);
    uint64_t start_ns = fl_now();
    atomic_store(&toucher->go, 1);
    do {
        sleep_ms(10);
        count_outcomes(count);
    } while (count[UNTOUCHED] + count[WAITS] && fl_now() - start_ns < SECONDS * FL_NS_PER_SECOND);
    printf("%u entries, %u look owned: %u read their content, %u got an error, %u hang, %u read wrong, in %.1f s\n",
           PAGES, owned, count[RIGHT], count[ERROR], count[UNTOUCHED] + count[WAITS], count[WRONG],
           (double)(fl_now() - start_ns) / FL_NS_PER_SECOND);
    CHECK(count[UNTOUCHED] + count[WAITS] == 0, "%u hang", count[UNTOUCHED] + count[WAITS]);
    CHECK(count[WRONG] == 0, "%u read wrong", count[WRONG]);
    CHECK(count[RIGHT] && count[ERROR], "not both outcomes");
    double before_ms = cpu_ms();
    sleep_ms(REST_MS);
    double percent = 100 * (cpu_ms() - before_ms) / REST_MS;
    printf("at rest: %.1f %% of a CPU\n", percent);
    CHECK(percent < REST_PERCENT, "the pager is not at rest");
    served_vm_end(&vm, faults);
    return 0;
}
