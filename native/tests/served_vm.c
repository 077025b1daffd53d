/* SPDX-License-Identifier: Apache-2.0 */
#include "served_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "attach/inspect.h"
#include "base/clock.h"
#include "swap/evict.h"
#include "victim.h"

const char *tracker_missing(const char *tracker) {
    static struct fl_tracker_probe probes[FL_TRACKERS];
    CHECK(fl_probe_trackers(0, 0, 0, probes) == 0, "fl_probe_trackers");
    for (uint32_t i = 0; i < FL_TRACKERS; i++)
        if (strcmp(fl_tracker_name(probes[i].tracker), tracker) == 0)
            return probes[i].possible ? NULL : probes[i].detail;
    return "this pager does not know it";
}

struct fl_tracker_list trackers_of(const char *names) {
    struct fl_tracker_list list;
    CHECK(fl_tracker_list_parse(names, &list), "trackers %s", names);
    return list;
}

struct fl_fault_server *served_vm_begin(struct fl_vm *vm, pid_t vmm, const struct fl_tracker_list *trackers,
                                        uint32_t fault_threads) {
    const struct fl_options options = {.vmm_pid = (int)vmm,
                                       .fault_threads = fault_threads,
                                       .scan_interval_ms = 10000,
                                       .stall_target_permille = 1000,
                                       .trackers = *trackers};
    struct fl_refused why = {0};
    struct fl_fault_server *faults;
    memset(vm, 0, sizeof(*vm));
    CHECK(fl_serve_begin(vm, &options, &why) == 0, "attach: %s", why.detail);
    CHECK(fl_fault_start(vm, fault_threads, &faults) == 0, "fault threads");
    fl_serve_began(vm, fl_now());
    return faults;
}

void served_vm_end(struct fl_vm *vm, struct fl_fault_server *faults) {
    pid_t vmm = vm->pid;
    kill(vmm, SIGKILL);
    fl_fault_stop(faults);
    fl_serve_close(vm);
    CHECK(waitpid(vmm, NULL, 0) == vmm, "waitpid: %s", strerror(errno));
}

struct fl_vault vault_of(pid_t pid, bool write) {
    struct fl_vault vault;
    struct fl_refused why;
    uint64_t ticks;
    int fd;
    CHECK(fl_proc_start_time((int)pid, &ticks) == 0, "start time");
    CHECK(fl_vmm_open_vault((int)pid, write ? O_RDWR : O_RDONLY, &fd) == 0, "no vault");
    CHECK(fl_vault_map(fd, write, (int)pid, ticks, &vault, &why) == 0, "%s", why.detail);
    return vault;
}

void wait_for_round(const struct fl_vault *vault) {
    _Atomic(uint64_t) *sequence = &vault->stats->sequence;
    uint64_t from = atomic_load(sequence);
    for (unsigned i = 0; i < 60000 && atomic_load(sequence) < from + 2; i++)
        sleep_ms(1);
    CHECK(atomic_load(sequence) >= from + 2, "the pager's mover does not go round");
}

void evict_first(struct fl_vm *vm, uint32_t pages) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, pages, all, &done);
    CHECK(error == 0 && done.pages > pages / 2, "%llu pages evicted: %s", (unsigned long long)done.pages,
          strerror(-error));
    fl_evictor_destroy(evictor);
}
