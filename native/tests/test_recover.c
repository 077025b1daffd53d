/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A page that a dead pager left between its copy and its hole, and a file that cannot be punched just now: if the hole is there
 * already the copy is all there is of the page, else the file's page is as good.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>

#include "base/log.h"
#include "pager/serve.h"
#include "served_vm.h"
#include "swap/evict.h"
#include "swap/recover.h"
#include "victim.h"

#define PAGES 64u
#define PUNCHED 18u /* two pages that compress */
#define THERE 19u

static void leave_punching(struct fl_vm *vm, uint64_t page) {
    fl_entry entry = atomic_load(fl_slot(vm, page));
    CHECK(fl_entry_state(entry) == FL_PAGE_EVICTED, "page %llu is not away", (unsigned long long)page);
    atomic_store(fl_slot(vm, page), fl_entry_with_state(entry, FL_PAGE_PUNCHING));
}

/* A description that may only read: fallocate() gives EBADF. */
static int forbid_punching(struct fl_vm *vm) {
    char path[64];
    int may_write = vm->memory[0].fd;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", may_write);
    vm->memory[0].fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(vm->memory[0].fd >= 0, "%s: %s", path, strerror(errno));
    CHECK(fl_punch(vm, 0, fl_region(vm, 0)->first_page, 1) != 0, "it can be punched");
    return may_write;
}

static enum fl_page_state state_of(struct fl_vm *vm, uint64_t page) {
    return fl_entry_state(atomic_load(fl_slot(vm, page)));
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), fixed;
    struct fl_options options = {.fault_threads = 1, .scan_interval_ms = 10000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    static struct fl_vm vm;
    uint8_t content[FL_PAGE_SIZE] = {1};
    fl_log_setup(FL_LOG_ERROR, 0);
    struct victim victim = victim_start(PAGES, 0, seed);
    options.vmm_pid = (int)victim.pid;
    CHECK(fl_tracker_list_parse("zap", &options.trackers), "tracker");
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    evict_first(&vm, PAGES);
    uint64_t first = fl_region(&vm, 0)->first_page, away = FL_READ(&vm, evicted_pages);
    leave_punching(&vm, first + PUNCHED);
    leave_punching(&vm, first + THERE);
    CHECK(pwrite(vm.memory[0].fd, content, sizeof(content), (off_t)THERE * FL_PAGE_SIZE) == (ssize_t)sizeof(content),
          "pwrite");
    int may_write = forbid_punching(&vm);
    CHECK(fl_recover(&vm, &fixed, &why) == 0, "%s", why.detail);
    close(vm.memory[0].fd);
    vm.memory[0].fd = may_write;
    CHECK(fixed == 2, "%llu pages put right", (unsigned long long)fixed);
    CHECK(state_of(&vm, first + PUNCHED) == FL_PAGE_EVICTED, "state %d of a page whose hole is there",
          (int)state_of(&vm, first + PUNCHED));
    CHECK(state_of(&vm, first + THERE) == FL_PAGE_RESIDENT, "state %d of a page that is in the file",
          (int)state_of(&vm, first + THERE));
    CHECK(FL_READ(&vm, evicted_pages) == away - 1, "%llu pages away", (unsigned long long)FL_READ(&vm, evicted_pages));
    kill(victim.pid, SIGKILL);
    fl_serve_close(&vm);
    return 0;
}
