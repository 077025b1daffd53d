/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is away of an unmapped region is written back into its file; what the VMM has written into a hole there since, because
 * it has mapped the file again, is newer and stays. What cannot be written back stays away, and is tried again now and then.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/serve.h"
#include "pager/watch.h"
#include "served_vm.h"
#include "swap/bring.h"
#include "swap/fault.h"
#include "victim.h"

#define PAGES 64u
#define NEWER 18u /* one that compresses */

/* By a description that may only read: what is away stays, one line says why, and tries become seldom. */
static void cannot_be_written(struct fl_vm *vm, struct fl_bringer *bringer) {
    struct fl_watch watch;
    char path[64], log_path[] = "/tmp/fl-bring-XXXXXX";
    int may_write = vm->memory[0].fd, log = mkstemp(log_path), stderr_fd = dup(STDERR_FILENO);
    uint64_t away = FL_READ(vm, evicted_pages), now = fl_now();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", may_write);
    vm->memory[0].fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(log >= 0 && stderr_fd >= 0 && vm->memory[0].fd >= 0, "%s, %s: %s", log_path, path, strerror(errno));
    fl_watch_init(&watch, now);
    watch.next_regions_ns = watch.next_inspection_ns = UINT64_MAX;
    atomic_store(&fl_region(vm, 0)->gone, 1);
    atomic_store(&vm->remap_pending, 1);
    dup2(log, STDERR_FILENO);
    unsigned tries = 0;
    for (unsigned i = 0; i < 1000; i++) { /* a second, as the mover would step through it */
        uint64_t before = watch.next_write_back_ns;
        fl_watch_step(&watch, vm, bringer, now + i * FL_NS_PER_MS);
        tries += watch.next_write_back_ns != before;
    }
    dup2(stderr_fd, STDERR_FILENO);
    close(stderr_fd);
    char text[4096] = "";
    CHECK(pread(log, text, sizeof(text) - 1, 0) > 0, "nothing is said");
    const char *said = strstr(text, "write_back_failed");
    CHECK(said && !strstr(said + 1, "write_back_failed"), "not said once: %s", text);
    CHECK(tries > 1 && tries < 10, "%u tries in a second", tries);
    CHECK(FL_READ(vm, evicted_pages) == away, "pages were given up");
    close(log);
    (void)unlink(log_path);
    close(vm->memory[0].fd);
    vm->memory[0].fd = may_write;
    atomic_store(&fl_region(vm, 0)->gone, 0);
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
    evict_first(&vm, PAGES);

    fl_entry entry = atomic_load(fl_slot(&vm, fl_region(&vm, 0)->first_page + NEWER));
    CHECK(fl_entry_state(entry) == FL_PAGE_EVICTED, "page %u is not away", NEWER);
    memset(newer, 0xee, sizeof(newer));
    CHECK(pwrite(fd, newer, sizeof(newer), (off_t)NEWER * FL_PAGE_SIZE) == (ssize_t)sizeof(newer), "pwrite");
    cannot_be_written(&vm, bringer);
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
