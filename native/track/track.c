/* SPDX-License-Identifier: Apache-2.0 */
/* Which trackers there are, what each would do here, and the choice among them. */
#include "track/track.h"

#include <stdio.h>
#include <string.h>

#include "attach/probe.h"
#include "base/log.h"

const struct fl_tracker_ops *const fl_trackers[FL_TRACKERS] = {
    &fl_tracker_rwp,
    &fl_tracker_zap,
    &fl_tracker_idle,
    &fl_tracker_damon,
};

int fl_probe_trackers(int pid, struct fl_tracker_probe *out) {
    struct fl_kernel_features kernel;
    int error = fl_probe_kernel(&kernel);
    if (error)
        return error;
    memset(out, 0, FL_TRACKERS * sizeof(*out));
    for (uint32_t i = 0; i < FL_TRACKERS && fl_trackers[i]; i++) {
        out[i].tracker = fl_trackers[i]->kind;
        out[i].possible = fl_trackers[i]->probe(pid, &kernel, out[i].detail, sizeof(out[i].detail));
    }
    return 0;
}

static const struct fl_tracker_ops *find(const char *name, size_t length) {
    for (uint32_t i = 0; i < FL_TRACKERS && fl_trackers[i]; i++) {
        const char *known = fl_tracker_name(fl_trackers[i]->kind);
        if (strlen(known) == length && memcmp(known, name, length) == 0)
            return fl_trackers[i];
    }
    return NULL;
}

static bool add(struct fl_tracker_list *list, const struct fl_tracker_ops *ops) {
    for (uint32_t i = 0; i < list->count; i++)
        if (list->ops[i] == ops)
            return false;
    if (!ops || list->count == FL_TRACKERS)
        return false;
    list->ops[list->count++] = ops;
    return true;
}

bool fl_tracker_list_parse(const char *text, struct fl_tracker_list *out) {
    *out = (struct fl_tracker_list){0};
    if (strcmp(text, "auto") == 0) {
        for (uint32_t i = 0; i < FL_TRACKERS && fl_trackers[i]; i++)
            (void)add(out, fl_trackers[i]);
        return true;
    }
    while (true) {
        size_t length = strcspn(text, ",");
        if (!add(out, find(text, length)))
            return false;
        if (!text[length])
            return true;
        text += length + 1;
    }
}

const struct fl_tracker_ops *fl_tracker_next(const struct fl_tracker_list *list, uint32_t *place, int pid,
                                             enum fl_freeze freeze) {
    struct fl_kernel_features kernel;
    char detail[FL_DETAIL_BYTES];
    fl_probe_tracking(&kernel);
    while (*place < list->count) {
        const struct fl_tracker_ops *ops = list->ops[(*place)++];
        if (freeze != FL_FREEZE_NONE && ops->freeze != FL_FREEZE_NONE && ops->freeze != freeze)
            snprintf(detail, sizeof(detail),
                     "needs memory registered for %s, and it is for %s until a pager starts with nothing away",
                     fl_freeze_name(ops->freeze), fl_freeze_name(freeze));
        else if (ops->probe(pid, &kernel, detail, sizeof(detail)))
            return ops;
        fl_log_text(FL_LOG_INFO, "tracker_passed_over", "%s: %s", fl_tracker_name(ops->kind), detail);
    }
    return NULL;
}
