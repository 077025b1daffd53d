/* SPDX-License-Identifier: Apache-2.0 */
/* Gauges of the status that follow from other state: published by the mover, a few times a second. */
#ifndef FL_PAGER_GAUGES_H
#define FL_PAGER_GAUGES_H

#include "swap/vm.h"

void fl_gauges_publish(struct fl_vm *vm, enum fl_state state, enum fl_why why);

#endif
