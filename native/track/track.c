/* SPDX-License-Identifier: Apache-2.0 */
/* Which trackers there are, what each would do here, and the choice among them. */
#include "track/track.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "attach/probe.h"
#include "base/log.h"
#include "base/vault.h"
#include "track/damon_admin.h"

const struct fl_tracker_ops *const fl_trackers[FL_TRACKERS] = {
    &fl_tracker_rwp,
    &fl_tracker_zap,
    &fl_tracker_idle,
    &fl_tracker_damon,
};

static bool fits(const struct fl_tracker_ops *ops, const struct fl_tracked *vm, char *detail, size_t bytes) {
    if (vm->freeze == FL_FREEZE_NONE || ops->freeze == FL_FREEZE_NONE || ops->freeze == vm->freeze)
        return true;
    snprintf(detail, bytes, "needs memory registered for %s, and it is for %s %s", fl_freeze_name(ops->freeze),
             fl_freeze_name(vm->freeze), vm->until);
    return false;
}

static bool is_possible(const struct fl_tracker_ops *ops, const struct fl_tracked *vm,
                        const struct fl_kernel_features *kernel, char *detail, size_t bytes) {
    return ops->probe(vm, kernel, detail, bytes) && fits(ops, vm, detail, bytes);
}

struct fl_tracked fl_tracked_of(struct fl_vm *vm) {
    return (struct fl_tracked){.pid = vm->pid,
                               .memory_bytes = FL_READ(vm, memory_bytes),
                               .scan_interval_ms = fl_vault_scan_interval_ms(&vm->vault),
                               .attached = true,
                               .uffd_features = vm->uffd_features,
                               .freeze = vm->freeze,
                               .until = "until a pager starts with nothing away"};
}

/* ---- from outside ------------------------------------------------------------------------------------------- */

/* As a pager that starts now would find it: what it can change then does not stand in the way. */
static void read_registration(const struct fl_vault *vault, struct fl_tracked *vm) {
    const struct fl_vault_header *header = vault->header;
    int64_t away = (int64_t)__atomic_load_n(&vault->stats->status.evicted_pages, __ATOMIC_RELAXED);
    vm->freeze = atomic_load(&header->freeze) == FL_FREEZE_RWP ? FL_FREEZE_RWP : FL_FREEZE_WP;
    if (atomic_load(&header->corrupt))
        snprintf(vm->until, sizeof(vm->until), "for as long as it runs, for pages of it are lost");
    else if (away > 0)
        snprintf(vm->until, sizeof(vm->until), "while %lld pages are away: drain the VM, release it, resume it",
                 (long long)away);
    else if (atomic_load(&header->unsafe))
        snprintf(vm->until, sizeof(vm->until), "until it may be tiered again (%s) and a pager starts",
                 fl_refusal_name(atomic_load(&header->unsafe)));
    else
        vm->freeze = FL_FREEZE_NONE;
}

/* A VM without a vault, or with one that cannot be used, is as one that nobody is attached to. */
static void read_vault(struct fl_tracked *vm) {
    struct fl_vault vault;
    struct fl_refused why;
    uint64_t start_ticks;
    int fd;
    if (fl_proc_start_time(vm->pid, &start_ticks) || fl_vmm_open_vault(vm->pid, O_RDONLY, &fd))
        return;
    if (fl_vault_map(fd, false, vm->pid, start_ticks, &vault, &why)) {
        close(fd);
        return;
    }
    uint64_t memory_bytes = __atomic_load_n(&vault.stats->status.memory_bytes, __ATOMIC_RELAXED);
    uint32_t scan_interval_ms = atomic_load(&vault.header->scan_interval_ms);
    vm->memory_bytes = memory_bytes ? memory_bytes : vm->memory_bytes;
    vm->scan_interval_ms = scan_interval_ms ? scan_interval_ms : vm->scan_interval_ms;
    vm->uffd_features = atomic_load(&vault.header->uffd_features);
    vm->attached = vm->uffd_features != 0;
    if (vm->attached && atomic_load(&vault.header->freeze))
        read_registration(&vault, vm);
    fl_vault_close(&vault);
}

int fl_probe_trackers(int pid, uint64_t memory_bytes, uint32_t scan_interval_ms, struct fl_tracker_probe *out) {
    struct fl_tracked vm = {.pid = pid, .memory_bytes = memory_bytes, .scan_interval_ms = scan_interval_ms};
    struct fl_kernel_features kernel;
    int error = fl_probe_kernel(&kernel);
    if (error)
        return error;
    if (pid)
        read_vault(&vm);
    memset(out, 0, FL_TRACKERS * sizeof(*out));
    for (uint32_t i = 0; i < FL_TRACKERS; i++) {
        out[i].tracker = fl_trackers[i]->kind;
        out[i].possible = is_possible(fl_trackers[i], &vm, &kernel, out[i].detail, sizeof(out[i].detail));
    }
    return 0;
}

/* ---- the choice --------------------------------------------------------------------------------------------- */

static const struct fl_tracker_ops *find(const char *name, size_t length) {
    for (uint32_t i = 0; i < FL_TRACKERS; i++) {
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
        for (uint32_t i = 0; i < FL_TRACKERS; i++)
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

const struct fl_tracker_ops *fl_tracker_next(const struct fl_tracker_list *list, uint32_t *place,
                                             const struct fl_tracked *vm) {
    struct fl_kernel_features kernel;
    char detail[FL_DETAIL_BYTES];
    fl_probe_tracking(&kernel);
    while (*place < list->count) {
        const struct fl_tracker_ops *ops = list->ops[(*place)++];
        if (is_possible(ops, vm, &kernel, detail, sizeof(detail)))
            return ops;
        fl_log_text(FL_LOG_INFO, "tracker_passed_over", "%s: %s", fl_tracker_name(ops->kind), detail);
    }
    return NULL;
}

void fl_tidy_host(void) {
    fl_damon_tidy();
}
