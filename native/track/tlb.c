/* SPDX-License-Identifier: Apache-2.0 */
#include "track/tlb.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "swap/uffd.h"

#define FLUSH_PAGES 64u
#define PROTECT_TRIES 50u

uint64_t fl_tlb_random(struct fl_tlb *tlb) {
    tlb->random = tlb->random * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return tlb->random >> 33;
}

void fl_tlb_begin(struct fl_tlb *tlb) {
    tlb->offered = 0;
}

void fl_tlb_offer(struct fl_tlb *tlb, uint32_t region, uint64_t page) {
    uint64_t place = tlb->offered < FL_TLB_FLUSHES ? tlb->offered : fl_tlb_random(tlb) % (tlb->offered + 1);
    tlb->offered++;
    if (place >= FL_TLB_FLUSHES)
        return;
    tlb->drawn[place].region = region;
    tlb->drawn[place].page = page;
}

/* Around one page. */
static int flush_by(struct fl_vm *vm, uint32_t region, uint64_t page) {
    uint64_t pages = fl_region_pages(vm, region), skip = page - fl_region(vm, region)->first_page;
    uint64_t count = pages < FLUSH_PAGES ? pages : FLUSH_PAGES;
    skip = skip < pages - count ? skip : pages - count;
    uint64_t address = fl_address_of_page(vm, region, fl_region(vm, region)->first_page + skip);
    int error = fl_uffd_protect_patiently(vm, address, count * FL_PAGE_SIZE, true, PROTECT_TRIES);
    return error ? error : fl_uffd_protect_patiently(vm, address, count * FL_PAGE_SIZE, false, PROTECT_TRIES);
}

/*
 * At several places, because protecting flushes nothing where nobody ever wrote. A write to these pages at this very moment is
 * answered as any to a page that is being frozen.
 */
void fl_tlb_flush(const struct fl_tlb *tlb, struct fl_vm *vm, uint64_t *stop_max_ns) {
    int error = 0;
    for (uint32_t i = 0; i < FL_TLB_FLUSHES && i < tlb->offered && !error; i++) {
        uint64_t start_ns = fl_now();
        error = flush_by(vm, tlb->drawn[i].region, tlb->drawn[i].page);
        uint64_t took_ns = fl_now() - start_ns;
        *stop_max_ns = took_ns > *stop_max_ns ? took_ns : *stop_max_ns;
    }
    if (error && error != -ESRCH)
        fl_log_text(FL_LOG_DEBUG, "no_tlb_flush", "userfaultfd protection on process %d: %s", vm->pid,
                    strerror(-error));
}
