/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What may change around a VM after attaching: memory plugged in or out, another process that maps it, a device
 * passed through, a fork. Checked in the mover, seldom enough not to be felt.
 */
#ifndef FL_PAGER_WATCH_H
#define FL_PAGER_WATCH_H

#include "swap/bring.h"
#include "swap/vm.h"

struct fl_watch {
    uint64_t next_regions_ns;
    uint64_t next_inspection_ns;
    uint64_t next_write_back_ns; /* of what could not be written back: not before then */
    uint64_t write_back_pause_ns;
    int write_back_error; /* that was logged last */
};

void fl_watch_init(struct fl_watch *watch, uint64_t now_ns);
void fl_watch_step(struct fl_watch *watch, struct fl_vm *vm, struct fl_bringer *bringer, uint64_t now_ns);

#endif
