/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is away of an unmapped region is written back into its file; what the VMM has written into a hole there since, because
 * it has mapped the file again, is newer and stays.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/serve.h"
#include "swap/bring.h"
#include "swap/evict.h"
#include "swap/fault.h"
#include "victim.h"

#define PAGES 64u
#define NEWER 18u /* one that compresses */

static void evict_all(struct fl_vm *vm) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, PAGES, all, &done);
    CHECK(error == 0 && done.pages > PAGES / 2, "%llu pages evicted: %s", (unsigned long long)done.pages,
          strerror(-error));
    fl_evictor_destroy(evictor);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), written = 0;
    struct fl_options options = {.fault_threads = 1, .scan_interval_ms = 10000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    struct fl_bringer *bringer;
    static struct fl_vm vm;
    uint8_t newer[FL_PAGE_SIZE], seen[FL_PAGE_SIZE], before[PAGES][FL_PAGE_SIZE];
    fl_log_setup(FL_LOG_WARNING, 0);
    struct victim victim = victim_start(PAGES, 0, seed);
    options.vmm_pid = (int)victim.pid;
    CHECK(fl_tracker_list_parse("zap", &options.trackers), "tracker");
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    CHECK(fl_bringer_create(&vm, &bringer) == 0, "bringer");
    int fd = vm.memory[0].fd;
    CHECK(pread(fd, before, sizeof(before), 0) == (ssize_t)sizeof(before), "pread");
    evict_all(&vm);

    fl_entry entry = atomic_load(fl_slot(&vm, fl_region(&vm, 0)->first_page + NEWER));
    CHECK(fl_entry_state(entry) == FL_PAGE_EVICTED, "page %u is not away", NEWER);
    memset(newer, 0xee, sizeof(newer));
    CHECK(pwrite(fd, newer, sizeof(newer), (off_t)NEWER * FL_PAGE_SIZE) == (ssize_t)sizeof(newer), "pwrite");
    CHECK(fl_bring_into_file(bringer, 0, &written) == 0 && written > PAGES / 2, "%llu written back",
          (unsigned long long)written);
    CHECK(FL_READ(&vm, evicted_pages) == 0, "%llu still away", (unsigned long long)FL_READ(&vm, evicted_pages));
    for (uint32_t page = 0; page < PAGES; page++) {
        CHECK(pread(fd, seen, sizeof(seen), (off_t)page * FL_PAGE_SIZE) == (ssize_t)sizeof(seen), "pread");
        CHECK(memcmp(seen, page == NEWER ? newer : before[page], sizeof(seen)) == 0, "page %u is not what was %s", page,
              page == NEWER ? "written last" : "evicted");
    }
    kill(victim.pid, SIGKILL);
    fl_bringer_destroy(bringer);
    fl_serve_close(&vm);
    return 0;
}
