/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/scan.h"

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "swap/removed.h"
#include "track/damon_admin.h"
#include "track/direct_io.h"

#define VOID_SCANS_MAX 5u /* without a whole one, then the next tracker has a try */

/* Stands in where no tracker works: what it is asked, it does not know. Given up like others, for all may work by then. */
static int know_nothing(struct fl_tracker *tracker) {
    (void)tracker;
    return -EAGAIN;
}

static int see_nothing(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count,
                       uint64_t *accessed) {
    (void)tracker, (void)region, (void)first, (void)count, (void)accessed;
    return -EAGAIN;
}

static int arm_nothing(struct fl_tracker *tracker, uint64_t *stop_max_ns) {
    (void)tracker;
    *stop_max_ns = 0;
    return -EAGAIN;
}

static void destroy_nothing(struct fl_tracker *tracker) {
    (void)tracker;
}

static const struct fl_tracker_ops no_tracker = {
    .kind = FL_TRACKER_NONE,
    .sees_io = true, /* it lets nothing go anyway */
    .destroy = destroy_nothing,
    .collect = know_nothing,
    .harvest = see_nothing,
    .arm = arm_nothing,
};

/* The next of the list that can be made, from the place where the last choice ended. */
static bool choose_next(struct fl_scanner *scanner) {
    struct fl_vm *vm = scanner->vm;
    const struct fl_tracked tracked = fl_tracked_of(vm);
    const struct fl_tracker_ops *ops;
    while ((ops = fl_tracker_next(&scanner->list, &scanner->place, &tracked))) {
        int error = ops->create(vm, scanner->faults, &scanner->tracker);
        if (!error) {
            scanner->ops = ops;
            return true;
        }
        fl_log_text(FL_LOG_WARNING, "tracker_failed", "%s on process %d: %s", fl_tracker_name(ops->kind), vm->pid,
                    strerror(-error));
    }
    return false;
}

/* For a successor, too: whether there is something to harvest, and by which tracker. */
static void note_armed(struct fl_scanner *scanner, bool armed) {
    scanner->armed = armed;
    atomic_store(&scanner->vm->vault.header->armed, armed ? scanner->ops->kind : FL_TRACKER_NONE);
}

static void tell_grain(const struct fl_scanner *scanner) {
    const struct fl_tracker_ops *ops = scanner->ops;
    uint32_t exact = scanner->tracker != NULL;
    FL_SET(scanner->vm, tracker_grain, ops->grain && exact ? ops->grain(scanner->tracker) : exact);
}

/* From the list; then from its beginning once more; then none. */
static void choose(struct fl_scanner *scanner, enum fl_tracker_kind before) {
    struct fl_vm *vm = scanner->vm;
    scanner->ops = &no_tracker;
    scanner->tracker = NULL;
    scanner->void_scans = 0;
    scanner->io_hidden = false;
    bool chosen = choose_next(scanner);
    if (!chosen) {
        scanner->place = 0;
        chosen = choose_next(scanner);
    }
    scanner->fruitless = chosen ? 0 : scanner->fruitless + 1;
    if (!chosen && fl_log_worth(scanner->fruitless))
        fl_log_text(
            FL_LOG_ERROR, "no_tracker",
            "none of the trackers that may be used works on process %d as its memory is registered (%s): nothing "
            "is evicted; frostline-agent probe says what each lacks, allow another or mend that",
            vm->pid, fl_freeze_name(vm->freeze));
    FL_SET(vm, tracker, scanner->ops->kind);
    tell_grain(scanner);
    note_armed(scanner,
               scanner->ops->outlives_pager && atomic_load(&vm->vault.header->armed) == (uint32_t)scanner->ops->kind);
    if (scanner->ops->kind != before)
        fl_log(scanner->tracker ? FL_LOG_INFO : FL_LOG_ERROR, "tracker_chosen",
               "\"tracker\":\"%s\",\"before\":\"%s\",\"freeze\":\"%s\"", fl_tracker_name(scanner->ops->kind),
               fl_tracker_name(before), fl_freeze_name(vm->freeze));
}

bool fl_scanner_settle_zap(struct fl_scanner *scanner) {
    int error = fl_zap_settle(scanner->vm, scanner->faults);
    scanner->unsettled = error ? scanner->unsettled + 1 : 0;
    if (error && error != -ESRCH && fl_log_worth(scanner->unsettled))
        fl_log_text(FL_LOG_WARNING, "zap_not_settled",
                    "what this pager, or one that was killed, had begun on process %d: %s; nothing is evicted until it "
                    "has ended, and what the VMM frees there counts as away",
                    scanner->vm->pid, strerror(-error));
    return error == 0;
}

void fl_scanner_start(struct fl_scanner *scanner, struct fl_vm *vm, struct fl_fault_server *faults,
                      const struct fl_tracker_list *list) {
    *scanner = (struct fl_scanner){.vm = vm, .faults = faults, .list = *list};
    (void)fl_scanner_settle_zap(scanner);
    fl_damon_tidy(); /* a predecessor that was killed may have tracked by it, and this one by another */
    choose(scanner, FL_TRACKER_NONE);
}

void fl_scanner_stop(struct fl_scanner *scanner) {
    if (scanner->ops)
        scanner->ops->destroy(scanner->tracker);
    scanner->ops = NULL;
}

/* Gone for good, or as good as that: the next one takes over. */
static void give_up(struct fl_scanner *scanner) {
    enum fl_tracker_kind before = scanner->ops->kind;
    scanner->ops->destroy(scanner->tracker);
    choose(scanner, before);
    FL_COUNT(scanner->vm, tracker_switches, scanner->ops->kind != before);
}

static void void_scan(struct fl_scanner *scanner, bool harvested, int error) {
    struct fl_vm *vm = scanner->vm;
    FL_COUNT(vm, scan_failures, 1);
    /* That there is no tracker is said when none is found. */
    fl_log_text(error == -ESRCH || !scanner->tracker ? FL_LOG_DEBUG : FL_LOG_WARNING,
                harvested ? "arm_failed" : "scan_void", "tracker %s on process %d: %s; %s, the next scan tries again",
                fl_tracker_name(scanner->ops->kind), vm->pid, strerror(-error),
                harvested ? "ages had moved, and what is touched now may be missed" : "no page got older");
    /* Memory that is not where it was, and a call that does not end, are no fault of the tracker's. */
    bool counts = error != -ESRCH && !atomic_load(&vm->parted) && !fl_zap_marked(vm);
    if (error == -ENODEV || (counts && ++scanner->void_scans >= VOID_SCANS_MAX))
        give_up(scanner);
}

/*
 * 0, or why the tracker must not be believed any more; once it must not, only a scan looks again. Looked up each time, however
 * many descriptors that reads: a device that is opened behind the last look may write into a page that is being copied.
 */
static int look_for_hidden_io(struct fl_scanner *scanner, bool scans) {
    char detail[FL_DETAIL_BYTES];
    if (scanner->ops->sees_io)
        return 0;
    if (scanner->io_hidden && !scans)
        return -ENODEV;
    int found = fl_direct_io(scanner->vm->pid, detail, sizeof(detail));
    if (found > 0 && !scanner->io_hidden)
        fl_log_text(FL_LOG_WARNING, "io_not_seen", "tracker %s: %s; the next one that does takes over",
                    fl_tracker_name(scanner->ops->kind), detail);
    scanner->io_hidden = found > 0;
    return found > 0 ? -ENODEV : found;
}

struct arming {
    uint64_t took_ns, stop_max_ns;
};

static int make_visible(struct fl_scanner *scanner, int (*arm)(struct fl_tracker *tracker, uint64_t *stop_max_ns),
                        struct arming *arming) {
    uint64_t start_ns = fl_now();
    int error = arm(scanner->tracker, &arming->stop_max_ns);
    arming->took_ns = fl_now() - start_ns;
    return error;
}

bool fl_scanner_scan(struct fl_scanner *scanner, struct fl_age_counts *counts) {
    struct fl_vm *vm = scanner->vm;
    struct arming arming = {0};
    int error = look_for_hidden_io(scanner, true);
    bool armed = scanner->armed, harvested = false;
    if (!error && armed && scanner->ops->sweep)
        error = make_visible(scanner, scanner->ops->sweep, &arming);
    if (!error && armed) {
        error = fl_age_scan(vm, scanner->ops, scanner->tracker, counts);
        harvested = !error;
    }
    if (error && armed && scanner->ops->voided)
        scanner->ops->voided(scanner->tracker);
    if (!error && !(armed && scanner->ops->sweep))
        error = make_visible(scanner, scanner->ops->arm, &arming);
    FL_COUNT(vm, arm_ns, arming.took_ns);
    tell_grain(scanner);
    note_armed(scanner, !error || (armed && scanner->ops->sweep));
    if (arming.stop_max_ns > FL_READ(vm, scan_stop_max_ns))
        FL_SET(vm, scan_stop_max_ns, arming.stop_max_ns);
    if (error)
        void_scan(scanner, harvested, error);
    else if (harvested)
        scanner->void_scans = 0;
    return harvested;
}

int fl_scanner_harvest(void *context, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    struct fl_scanner *scanner = context;
    int error = look_for_hidden_io(scanner, false);
    if (!error)
        error = scanner->ops->harvest(scanner->tracker, region, first, count, accessed);
    /*
     * What a fault thread has answered since is young, whatever the tracker knows of it (damon: nothing between two scans). A
     * page that was freed and filled anew above all: who forgets the freed one may come to it yet.
     */
    for (uint32_t i = 0; i < count && !error; i++)
        if (!__atomic_load_n(&scanner->vm->vault.ages[first + i], __ATOMIC_RELAXED))
            accessed[i / 64] |= UINT64_C(1) << (i % 64);
    return error;
}
