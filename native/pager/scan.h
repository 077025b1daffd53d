/* SPDX-License-Identifier: Apache-2.0 */
/* Scans with the best tracker that works, and on to the next one when it fails for good. Mover only. */
#ifndef FL_PAGER_SCAN_H
#define FL_PAGER_SCAN_H

#include "track/age.h"

struct fl_scanner {
    struct fl_vm *vm;
    struct fl_fault_server *faults;
    struct fl_tracker_list list;
    uint32_t place; /* in the list, behind the tracker in use */
    const struct fl_tracker_ops *ops;
    struct fl_tracker *tracker;
    bool armed;
    uint64_t fruitless;  /* choices in a row that found none */
    uint64_t unsettled;  /* tries in a row */
    uint32_t void_scans; /* since the last whole one; that a scan only armed proves nothing */
    bool io_hidden; /* the VMM may do what the tracker does not see: nothing is evicted until the next one is there */
};

/*
 * Choose a tracker of the list for the VM as it is registered. Where none of them works `tracker` is NULL: scans are void and
 * say so, nothing is evicted, faults are served all the same, and now and then all are tried again.
 */
void fl_scanner_start(struct fl_scanner *scanner, struct fl_vm *vm, struct fl_fault_server *faults,
                      const struct fl_tracker_list *list);
void fl_scanner_stop(struct fl_scanner *scanner);

/* End the mark of a zap that was late, or of a pager that was killed (swap/removed.h). False: it may come yet. */
bool fl_scanner_settle_zap(struct fl_scanner *scanner);

/* One scan. True when ages have moved and `counts` is new. */
bool fl_scanner_scan(struct fl_scanner *scanner, struct fl_age_counts *counts);

/*
 * What was accessed since the last arming, as fl_tracker_ops.harvest; `scanner` is one (an fl_accessed_fn). -ENODEV as well
 * when the VMM may do direct I/O by now and the tracker would not see it.
 */
int fl_scanner_harvest(void *scanner, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed);

#endif
