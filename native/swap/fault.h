/* SPDX-License-Identifier: Apache-2.0 */
/* Fault threads: read messages from the userfaultfd in batches and answer each by the state of its page. */
#ifndef FL_SWAP_FAULT_H
#define FL_SWAP_FAULT_H

#include "swap/vm.h"

#define FL_FAULT_THREADS_MAX 16

struct fl_fault_server;
/* Start `threads` threads (1 ... FL_FAULT_THREADS_MAX). 0 or a negative errno. */
int fl_fault_start(struct fl_vm *vm, uint32_t threads, struct fl_fault_server **out);
/*
 * Wait until no thread is still acting on events that it had read before this call. Bounded by what an event takes:
 * microseconds, and longer only while much is forgotten that was away and has been freed at once.
 */
void fl_fault_quiesce(struct fl_fault_server *server);
/*
 * The zap that was marked (swap/removed.h) has ended in the VMM, or was never `made`: so does its mark, when all that was read
 * meanwhile is acted on.
 */
void fl_fault_end_zap(struct fl_fault_server *server, bool made);
/* How many messages told of a touch of a page in memory, and the page had been punched when they were answered. */
uint64_t fl_fault_late(const struct fl_fault_server *server);
/* Finish what was read, stop and join. Nobody answers faults after this. */
void fl_fault_stop(struct fl_fault_server *server);

#endif
