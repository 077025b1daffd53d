/* SPDX-License-Identifier: Apache-2.0 */
/* From a pid to a served VM, and back: attach or take over, run, detach or leave. */
#ifndef FL_PAGER_SERVE_H
#define FL_PAGER_SERVE_H

#include "base/refused.h"
#include "swap/vm.h"
#include "track/track.h"

struct fl_options {
    int vmm_pid;
    const char *socket_path;
    uint32_t fault_threads;
    uint32_t scan_interval_ms;
    uint32_t stall_target_permille;
    uint32_t longest_io_ms; /* nothing is evicted for so long after an arming, at most half an interval */
    uint64_t pool_max_bytes;
    struct fl_tracker_list trackers;
};

/*
 * Attach to the VMM, or take over the vault that is there. On success `vm` is ready for fault threads. 0, or -EPERM
 * with the reason; then the VMM is as it was before.
 */
int fl_serve_begin(struct fl_vm *vm, const struct fl_options *options, struct fl_refused *why);
/* After the fault threads run: wake who waited while nobody served. */
void fl_serve_began(struct fl_vm *vm, uint64_t started_ns);
/* Nothing is away: unregister, close what was injected. 0, or -EPERM with the reason. */
int fl_serve_detach(struct fl_vm *vm, struct fl_refused *why);
/* Close what this process holds. */
void fl_serve_close(struct fl_vm *vm);

#endif
