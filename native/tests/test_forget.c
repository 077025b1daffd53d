/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the VMM frees is forgotten: exactly that, in steps between which faults can be answered, whatever lies between its
 * regions. And while our own zap lasts: what does not fit into the list of removals that wait for its end is said.
 */
#include <string.h>
#include <sys/mman.h>

#include "base/kernel.h"
#include "base/log.h"
#include "swap/event.h"
#include "swap/removed.h"
#include "victim.h"

#define PAGES (UINT64_C(1) << 20) /* of each region: 4 GiB */
#define LOW UINT64_C(0x100000000)
#define GAP (FL_FORGET_PAGES * FL_PAGE_SIZE / 2)
#define HIGH (LOW + PAGES * FL_PAGE_SIZE + GAP)
#define TOO_MANY 6u
#define NOTE 3u

static struct fl_vm vm;

static void *memory(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(at != MAP_FAILED, "%zu bytes", bytes);
    return at;
}

static void make_vm(void) {
    vm.vault.header = memory(sizeof(*vm.vault.header));
    vm.vault.stats = memory(sizeof(*vm.vault.stats));
    vm.vault.table = memory(2 * PAGES * sizeof(*vm.vault.table));
    vm.vault.max_pages = 2 * PAGES;
    for (uint32_t i = 0; i < 2; i++) {
        struct fl_vault_region region = {
            .vmm_addr = i ? HIGH : LOW, .length = PAGES * FL_PAGE_SIZE, .first_page = i * PAGES};
        fl_vault_put_region(&vm.vault, i, region);
    }
    fl_vault_count_regions(&vm.vault, 2);
}

static void set_away(uint64_t page) {
    atomic_store(fl_slot(&vm, page), fl_entry_make(FL_PAGE_EVICTED, FL_TIER_ZERO, 0));
    fl_count_away(&vm, FL_TIER_ZERO, 1);
}

static uint64_t count_away(uint64_t first, uint64_t end) {
    uint64_t away = 0;
    for (uint64_t page = first; page < end; page++)
        away += atomic_load(fl_slot(&vm, page)) != 0;
    return away;
}

static struct fl_pages tell(uint64_t start, uint64_t end) {
    struct uffd_msg message = {.event = UFFD_EVENT_REMOVE};
    message.arg.remove.start = start;
    message.arg.remove.end = end;
    return fl_event(&vm, &message);
}

/*
 * From the middle of the lower region to the middle of the upper one; all are away. The kernel tells of one mapping at
 * a time, and one that reaches into two regions is rare: the second one's share is forgotten on the spot.
 */
static void exactly_and_in_steps(void) {
    uint64_t from = PAGES / 2 + 7, to = PAGES + PAGES / 2 - 7, before = FL_READ(&vm, removed_pages), steps = 1;
    for (uint64_t page = 0; page < 2 * PAGES; page++)
        set_away(page);
    struct fl_pages freed = tell(LOW + from * FL_PAGE_SIZE, HIGH + (to - PAGES) * FL_PAGE_SIZE);
    CHECK(freed.first == from && freed.end == PAGES, "pages %llu to %llu to forget", (unsigned long long)freed.first,
          (unsigned long long)freed.end);
    CHECK(count_away(0, PAGES) == PAGES && count_away(PAGES, to) == 0, "not those of the upper region");
    CHECK(fl_removed(&vm, from) == FL_REMOVED_NOT, "known before it is noted");
    fl_removed_note(&vm, NOTE, freed);
    CHECK(fl_removed(&vm, from) == FL_REMOVED_SURELY && fl_removed(&vm, PAGES - 1) == FL_REMOVED_SURELY &&
              fl_removed(&vm, from - 1) == FL_REMOVED_NOT && fl_removed(&vm, PAGES) == FL_REMOVED_NOT,
          "others are known than those");
    for (uint64_t away = FL_READ(&vm, evicted_pages); fl_removed_forget(&vm, NOTE);
         steps++, away = FL_READ(&vm, evicted_pages))
        CHECK(away - FL_READ(&vm, evicted_pages) == FL_FORGET_PAGES, "a step of %llu pages",
              (unsigned long long)(away - FL_READ(&vm, evicted_pages)));
    CHECK(steps == (PAGES - from + FL_FORGET_PAGES - 1) / FL_FORGET_PAGES, "%llu steps", (unsigned long long)steps);
    CHECK(fl_removed(&vm, PAGES - 1) == FL_REMOVED_NOT, "still known when it is forgotten");
    CHECK(count_away(0, from) == from && count_away(from, to) == 0 && count_away(to, 2 * PAGES) == 2 * PAGES - to,
          "other pages than those");
    CHECK(FL_READ(&vm, removed_pages) - before == to - from && FL_READ(&vm, evicted_pages) == 2 * PAGES - (to - from),
          "%llu forgotten, %llu away", (unsigned long long)(FL_READ(&vm, removed_pages) - before),
          (unsigned long long)FL_READ(&vm, evicted_pages));
}

/* What is logged meanwhile. */
static void log_to(int fd, char *text, size_t bytes, void (*act)(void)) {
    int own = dup(STDERR_FILENO);
    CHECK(own >= 0 && dup2(fd, STDERR_FILENO) >= 0, "dup");
    act();
    CHECK(dup2(own, STDERR_FILENO) >= 0, "dup");
    close(own);
    ssize_t length = pread(fd, text, bytes - 1, 0);
    text[length > 0 ? length : 0] = '\0';
}

static void zap_with_removals(void) {
    uint64_t end = LOW + PAGES * FL_PAGE_SIZE;
    fl_zap_mark(&vm, LOW, end);
    for (uint64_t page = 0; page < FL_REMOVALS_MAX + TOO_MANY; page++)
        CHECK(tell(LOW + page * FL_PAGE_SIZE, LOW + (page + 1) * FL_PAGE_SIZE).end == 0, "not put off");
    CHECK(fl_removed(&vm, 0) == FL_REMOVED_PERHAPS && fl_removed(&vm, PAGES) == FL_REMOVED_NOT, "what was put off");
    CHECK(tell(LOW, end).end == 0, "our own zap is taken for a removal");
    CHECK(fl_removed(&vm, 0) == FL_REMOVED_SURELY, "what was put off is not known to be true");
    CHECK(tell(LOW, LOW + FL_PAGE_SIZE).end == 1, "put off although our own zap is over");
    fl_zap_unmark(&vm);
    fl_zap_decide(&vm, true);
}

static void removals_too_many(void) {
    char text[1024];
    int fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(fd >= 0, "memfd");
    for (uint64_t page = 0; page < FL_REMOVALS_MAX + TOO_MANY; page++)
        if (!atomic_load(fl_slot(&vm, page)))
            set_away(page);
    log_to(fd, text, sizeof(text), zap_with_removals);
    close(fd);
    CHECK(count_away(0, FL_REMOVALS_MAX) == 0, "%llu of those that were noted",
          (unsigned long long)count_away(0, FL_REMOVALS_MAX));
    CHECK(count_away(FL_REMOVALS_MAX, FL_REMOVALS_MAX + TOO_MANY) == TOO_MANY, "more than what was noted");
    CHECK(strstr(text, "removals_not_noted") && strstr(text, "\"count\":6"), "logged: %s", text);
}

int main(void) {
    fl_log_setup(FL_LOG_WARNING, 0);
    make_vm();
    exactly_and_in_steps();
    removals_too_many();
    return 0;
}
