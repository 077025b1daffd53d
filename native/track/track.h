/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Trackers: ways to see which pages were accessed since the last arming. One interface, a file a tracker.
 * Ages and histograms (track/age.h) are made from what a tracker harvests and know nothing of how it saw.
 */
#ifndef FL_TRACK_TRACK_H
#define FL_TRACK_TRACK_H

#include "swap/vm.h"

#define FL_SCAN_PAGES 8192u /* pages harvested by one call: 32 MiB, 1 KiB of bitmap */

struct fl_tracker;
struct fl_fault_server;

struct fl_tracker_ops {
    const char *name;
    /* `faults` answers the messages that arming may cause. 0 or a negative errno. */
    int (*create)(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out);
    void (*destroy)(struct fl_tracker *tracker);
    /*
     * Which of the pages [first, first + count) of `region`, count <= FL_SCAN_PAGES, were accessed since the last
     * arming: bit i of `accessed` is page first + i. Does not change what it looks at. 0 or a negative errno.
     */
    int (*harvest)(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed);
    /*
     * Make all accesses from now on visible, chunk by chunk so that no vCPU waits longer than 1 ms.
     * *stop_max_ns gets the longest single stop. On error the scan is void: ages must not move.
     */
    int (*arm)(struct fl_tracker *tracker, uint64_t *stop_max_ns);
};

extern const struct fl_tracker_ops fl_tracker_zap;

#endif
