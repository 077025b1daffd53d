/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Emptying the TLBs of a VMM whose ACCESS bits have just been cleared. Clearing them flushes nothing: a CPU that has a
 * page in its TLB does not set the bit again, and the hottest pages of all look idle. What there is to do about it from
 * outside: membarrier() interrupts CPUs and flushes nothing; /proc/PID/clear_refs and process_madvise(MADV_COLD) change
 * what we want to look at; mprotect() has to run in the VMM. But protecting pages by userfaultfd, for whichever freeze
 * the memory is registered, and lifting it at once changes nothing in the end, and its flush is of the whole address
 * space if the range is longer than 33 pages (x86), and of all vCPUs if KVM had mapped any of it. So every arming ends
 * with a few of these.
 *
 * Limit. Where memory is registered for WP the kernel flushes only for pages that it had mapped for writing, and they are not
 * any more afterwards, until somebody writes there: 256 pages an arming. Of memory that is read and never written again nothing
 * is left to flush for in the end.
 */
#ifndef FL_TRACK_TLB_H
#define FL_TRACK_TLB_H

#include "swap/vm.h"

#define FL_TLB_FLUSHES 4u

/* Pages around which to flush: drawn from all that were offered, so that not always the same ones pay for it. */
struct fl_tlb {
    uint64_t random;
    uint64_t offered;
    struct {
        uint32_t region;
        uint64_t page;
    } drawn[FL_TLB_FLUSHES];
};

uint64_t fl_tlb_random(struct fl_tlb *tlb);
/* Forget what was offered. */
void fl_tlb_begin(struct fl_tlb *tlb);
/* A page that the VMM has mapped, as far as can be told. */
void fl_tlb_offer(struct fl_tlb *tlb, uint32_t region, uint64_t page);
/*
 * Flush. *stop_max_ns is raised to the longest single one. Nothing depends on it but how exact a tracker is: an address
 * space that changes all the time gets none, and neither does one of which nothing was offered.
 */
void fl_tlb_flush(const struct fl_tlb *tlb, struct fl_vm *vm, uint64_t *stop_max_ns);

#endif
