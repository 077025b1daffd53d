/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Trackers: ways to see which pages were accessed since the last arming. One interface, a file a tracker.
 * Ages and histograms (track/age.h) are made from what a tracker harvests and know nothing of how it saw.
 *
 * The first scan arms. Each one after it is: collect, harvest of every part of every region, then arm; or, by a tracker that
 * can look at a part and arm it in one go, sweep and then harvest. So little is lost of what is touched meanwhile.
 * Between scans the chooser harvests single windows again, to leave out what was touched since.
 */
#ifndef FL_TRACK_TRACK_H
#define FL_TRACK_TRACK_H

#include <stddef.h>

#include "swap/vm.h"

#define FL_SCAN_PAGES 8192u /* pages harvested by one call: 32 MiB, 1 KiB of bitmap */

struct fl_tracker;
struct fl_fault_server;

/* What is known of a VM when a tracker is chosen for it. Zeros: any VM of this host. */
struct fl_tracked {
    int pid;
    uint64_t memory_bytes;     /* 0: not known */
    uint32_t scan_interval_ms; /* 0: FL_SCAN_INTERVAL_MS */
    bool attached;             /* it holds a userfaultfd, which was set up with these features for its life */
    uint64_t uffd_features;
    enum fl_freeze
        freeze;     /* its memory is registered for this and cannot be for the other; FL_FREEZE_NONE: for either */
    char until[96]; /* what has to happen before it can: "until ...", "while ..." */
};

struct fl_tracker_ops {
    enum fl_tracker_kind kind;
    enum fl_freeze freeze; /* how ranges must be registered; FL_FREEZE_NONE: either way will do */
    bool outlives_pager;   /* what one pager armed, the next one can harvest */
    /* It sees pages that the kernel pins for direct I/O. One that does not is given up as soon as the VMM may do that. */
    bool sees_io;
    /*
     * Whether it can be used at this VM, however its memory is registered; `detail` gets a sentence: what it gives, or
     * what is missing. Changes nothing.
     */
    bool (*probe)(const struct fl_tracked *vm, const struct fl_kernel_features *kernel, char *detail, size_t bytes);
    /* NULL (exact to a page), or of how many pages one speaks for all, as of the last arming. */
    uint32_t (*grain)(const struct fl_tracker *tracker);
    /* `faults` answers the messages that arming may cause. 0 or a negative errno. */
    int (*create)(struct fl_vm *vm, struct fl_fault_server *faults, struct fl_tracker **out);
    /* Disarm: what it changed on the host is put back as it was. NULL is harmless. */
    void (*destroy)(struct fl_tracker *tracker);
    /*
     * NULL, or called once at the beginning of a scan: get what harvest() will tell. -ENODEV: this tracker is gone for
     * good (somebody took its kernel interface away); any other negative errno: this scan is void.
     */
    int (*collect)(struct fl_tracker *tracker);
    /*
     * Which of the pages [first, first + count) of `region`, count <= FL_SCAN_PAGES, were accessed since the last
     * arming: bit i of `accessed` is page first + i. Does not change what it looks at. Errors as collect().
     */
    int (*harvest)(struct fl_tracker *tracker, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed);
    /*
     * NULL, or called when a scan is void after collect() or sweep() has been asked. What collect() got belongs to no scan any
     * more; what sweep() has found cannot be found again, and is kept for the next scan.
     */
    void (*voided)(struct fl_tracker *tracker);
    /*
     * Make all accesses from now on visible, chunk by chunk so that nobody waits for longer than one, and chunks shrink
     * that take more than 0.5 ms. *stop_max_ns gets the longest single one. On error nothing was seen from then on: the
     * next scan arms again and harvests nothing. Errors as collect().
     */
    int (*arm)(struct fl_tracker *tracker, uint64_t *stop_max_ns);
    /*
     * NULL, or called instead of collect() and arm() once all is armed: get what harvest() will tell, and arm, each
     * chunk as soon as it was looked at. On error what it has not come to is still to be seen (but for what a call of
     * `zap` drops that ends too late), so the next scan sweeps again. Of a pager that is killed between this and the
     * end of the scan, the touches since the scan before are forgotten. As arm() besides.
     */
    int (*sweep)(struct fl_tracker *tracker, uint64_t *stop_max_ns);
};

extern const struct fl_tracker_ops fl_tracker_rwp;
extern const struct fl_tracker_ops fl_tracker_zap;
extern const struct fl_tracker_ops fl_tracker_idle;
extern const struct fl_tracker_ops fl_tracker_damon;

/*
 * A call of `zap` that was late, or a pager that was killed in one, has left its mark (swap/removed.h), whatever the
 * tracker is by now. What has not begun is cancelled, and what is over ends the mark. 0: there is none any more.
 * -EBUSY: it is under way yet.
 */
int fl_zap_settle(struct fl_vm *vm, struct fl_fault_server *faults);

/* All there are, in the order in which they are preferred. */
extern const struct fl_tracker_ops *const fl_trackers[FL_TRACKERS];

/* An ordered choice of trackers, e.g. from the command line. */
struct fl_tracker_list {
    uint32_t count;
    const struct fl_tracker_ops *ops[FL_TRACKERS];
};

/* "rwp,zap" or "auto". false: an unknown or doubled name, or none. */
bool fl_tracker_list_parse(const char *text, struct fl_tracker_list *out);

/* A VM as its own pager knows it, whose memory stays registered as it is. */
struct fl_tracked fl_tracked_of(struct fl_vm *vm);

/*
 * The first of the list from `*place` on that is possible for the VM and goes with how its memory is registered; *place
 * is moved behind it. NULL: none is left. What was passed over is logged with its reason.
 */
const struct fl_tracker_ops *fl_tracker_next(const struct fl_tracker_list *list, uint32_t *place,
                                             const struct fl_tracked *vm);

#endif
