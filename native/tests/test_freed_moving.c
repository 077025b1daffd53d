/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VMM frees a page while it is on its way out or back: what is found there afterwards is a hole, and not the old
 * content. Each moment is met by doing it inside the system call that the way just then makes.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/kernel.h"
#include "base/log.h"
#include "served_vm.h"
#include "swap/bring.h"
#include "swap/event.h"
#include "swap/load.h"
#include "swap/removed.h"
#include "victim.h"

#define PAGES 64u
#define FREED 18u /* one that compresses */
#define NOTE (FL_FORGETTING_MAX - 1)

enum moment { NEVER, AFTER_READ, BEFORE_PUNCH, BEFORE_COPY };

static struct fl_vm vm;
static enum moment moment;

/* As the kernel does it: who frees is told of, and when that has been read, frees. */
static void free_page(void) {
    struct uffd_msg message = {.event = UFFD_EVENT_REMOVE};
    message.arg.remove.start = fl_address_of_page(&vm, 0, fl_region(&vm, 0)->first_page + FREED);
    message.arg.remove.end = message.arg.remove.start + FL_PAGE_SIZE;
    struct fl_pages freed = fl_event(&vm, &message);
    CHECK(freed.end - freed.first == 1, "nothing to forget");
    fl_removed_note(&vm, NOTE, freed);
    while (fl_removed_forget(&vm, NOTE))
        ;
    CHECK(syscall(SYS_fallocate, vm.memory[0].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)FREED * FL_PAGE_SIZE, FL_PAGE_SIZE) == 0,
          "punch: %s", strerror(errno));
}

static bool is_now(enum moment now, uint64_t offset, uint64_t bytes) {
    if (moment != now || (uint64_t)FREED * FL_PAGE_SIZE - offset >= bytes)
        return false;
    moment = NEVER;
    free_page();
    return true;
}

ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset) {
    ssize_t got = syscall(SYS_pread64, fd, buffer, bytes, offset);
    if (fd == vm.memory[0].fd) /* the old content has been read */
        (void)is_now(AFTER_READ, (uint64_t)offset, bytes);
    return got;
}

int fallocate(int fd, int mode, off_t offset, off_t bytes) {
    if (fd == vm.memory[0].fd)
        (void)is_now(BEFORE_PUNCH, (uint64_t)offset, (uint64_t)bytes);
    return (int)syscall(SYS_fallocate, fd, mode, offset, bytes);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    struct uffdio_copy *copy = argument;
    if (request == UFFDIO_COPY && is_now(BEFORE_COPY, copy->dst - fl_address_of_page(&vm, 0, 0), copy->len)) {
        copy->copy = -EAGAIN; /* as while the event is unread */
        errno = EAGAIN;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void check_hole(const char *when, uint64_t removed) {
    uint8_t content[FL_PAGE_SIZE];
    const uint64_t page = fl_region(&vm, 0)->first_page + FREED, away = FL_READ(&vm, evicted_pages);
    uint64_t counted = 0;
    CHECK(moment == NEVER, "%s: the moment did not come", when);
    CHECK(atomic_load(fl_slot(&vm, page)) == 0, "%s: entry %llx", when,
          (unsigned long long)atomic_load(fl_slot(&vm, page)));
    CHECK(syscall(SYS_pread64, vm.memory[0].fd, content, sizeof(content), (off_t)FREED * FL_PAGE_SIZE) ==
              (ssize_t)sizeof(content),
          "pread");
    for (uint32_t i = 0; i < sizeof(content); i++)
        CHECK(content[i] == 0, "%s: the page has content", when);
    for (uint32_t i = 0; i < PAGES; i++)
        counted += fl_entry_state(atomic_load(fl_slot(&vm, fl_region(&vm, 0)->first_page + i))) == FL_PAGE_EVICTED;
    CHECK(counted == away, "%s: %llu pages are away, and %llu are counted", when, (unsigned long long)counted,
          (unsigned long long)away);
    CHECK(FL_READ(&vm, removed_pages) == removed, "%s: %llu copies forgotten", when,
          (unsigned long long)FL_READ(&vm, removed_pages));
    printf("freed %s: a hole\n", when);
}

static struct fl_fault_server *serve(const struct fl_tracker_list *trackers, uint64_t seed) {
    struct victim victim = victim_start(PAGES, 0, seed);
    memset(&vm, 0, sizeof(vm));
    return served_vm_begin(&vm, victim.pid, trackers, 1);
}

static void on_its_way_out(const struct fl_tracker_list *trackers, uint64_t seed, enum moment when, const char *words) {
    struct fl_fault_server *faults = serve(trackers, seed);
    moment = when;
    evict_first(&vm, PAGES);
    check_hole(words, when == BEFORE_PUNCH);
    served_vm_end(&vm, faults);
}

static void brought_back(const struct fl_tracker_list *trackers, uint64_t seed) {
    struct fl_fault_server *faults = serve(trackers, seed);
    struct fl_bringer *bringer;
    uint64_t allowance = PAGES, pages = 0;
    CHECK(fl_bringer_create(&vm, &bringer) == 0, "bringer");
    evict_first(&vm, PAGES);
    const uint64_t away = FL_READ(&vm, evicted_pages);
    moment = BEFORE_COPY;
    CHECK(fl_bring_range(bringer, 0, fl_region(&vm, 0)->first_page, PAGES, UINT8_MAX, false, &allowance, &pages) == 0 &&
              pages == away - 1,
          "%llu of %llu pages brought back", (unsigned long long)pages, (unsigned long long)away);
    check_hole("while it is brought back", 1);
    fl_bringer_destroy(bringer);
    served_vm_end(&vm, faults);
}

static void loaded(const struct fl_tracker_list *trackers, uint64_t seed) {
    static uint8_t buffer[FL_PAGE_SIZE] __attribute__((aligned(FL_PAGE_SIZE)));
    struct fl_fault_server *faults = serve(trackers, seed);
    evict_first(&vm, PAGES);
    const uint64_t page = fl_region(&vm, 0)->first_page + FREED;
    fl_entry entry = atomic_load(fl_slot(&vm, page)), mine = fl_entry_with_state(entry, FL_PAGE_LOADING);
    uint32_t stored_bytes;
    uint64_t woken_ns;
    CHECK(fl_swap_entry(&vm, page, &entry, mine), "the page is not ours");
    moment = BEFORE_COPY;
    CHECK(fl_load(&vm, 0, page, mine, FL_REMOVED_NOT, buffer, &stored_bytes, &woken_ns) == -EAGAIN,
          "it is loaded all the same");
    check_hole("while a touch has it loaded", 1);
    served_vm_end(&vm, faults);
}

int main(int argc, char **argv) {
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_of(argc, argv);
    const struct fl_tracker_list trackers = trackers_of("auto");
    fl_log_setup(FL_LOG_WARNING, 0);
    on_its_way_out(&trackers, seed, AFTER_READ, "while it is copied");
    on_its_way_out(&trackers, seed + 1, BEFORE_PUNCH, "when its copy is complete");
    brought_back(&trackers, seed + 2);
    loaded(&trackers, seed + 3);
    return 0;
}
