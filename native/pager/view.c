/* SPDX-License-Identifier: Apache-2.0 */
/* Reading a vault from outside (frostline.h, section 2). Works whether a pager lives or not. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "attach/inspect.h"
#include "base/clock.h"
#include "base/fence.h"
#include "base/vault.h"

#define SNAPSHOT_TRIES 100u

struct fl_view {
    int vmm_pid;
    struct fl_vault vault;
};

int fl_view_open(int vmm_pid, struct fl_view **out) {
    struct fl_refused why;
    uint64_t start_ticks;
    int fd, error = fl_proc_start_time(vmm_pid, &start_ticks);
    if (!error)
        error = fl_vmm_open_vault(vmm_pid, O_RDONLY, &fd);
    if (error)
        return error;
    struct fl_view *view = calloc(1, sizeof(*view));
    if (!view) {
        close(fd);
        return -ENOMEM;
    }
    view->vmm_pid = vmm_pid;
    if (fl_vault_map(fd, false, vmm_pid, start_ticks, &view->vault, &why)) {
        close(fd);
        free(view);
        return -EPROTO;
    }
    *out = view;
    return 0;
}

void fl_view_close(struct fl_view *view) {
    if (!view)
        return;
    fl_vault_close(&view->vault);
    free(view);
}

static void at_least_zero(uint64_t *count) {
    if ((int64_t)*count < 0)
        *count = 0;
}

int fl_view_status(struct fl_view *view, struct fl_status *out) {
    struct fl_stats *stats = view->vault.stats;
    int holder = 0;
    for (uint32_t i = 0; i < SNAPSHOT_TRIES; i++) {
        uint64_t before = atomic_load(&stats->sequence);
        memcpy(out, &stats->status, sizeof(*out));
        fl_fence();
        if (!(before & 1) && atomic_load(&stats->sequence) == before)
            break;
        fl_sleep_ns(10 * FL_NS_PER_US); /* a pager killed while publishing leaves it odd: then what is there must do */
    }
    if (out->abi != FL_ABI)
        return -EPROTO;
    /* A damaged entry cannot tell in which tier it was counted: what is shown is never negative. */
    at_least_zero(&out->evicted_pages);
    at_least_zero(&out->evicted_zero_pages);
    at_least_zero(&out->evicted_same_pages);
    at_least_zero(&out->evicted_ram_pages);
    out->now_ns = fl_now();
    out->pager_alive = fl_vault_holder(view->vmm_pid, &holder) == 0 && holder != 0;
    return 0;
}

int fl_view_records(struct fl_view *view, uint64_t *cursor, struct fl_record *out, uint32_t max, uint64_t *lost) {
    struct fl_stats *stats = view->vault.stats;
    uint64_t newest = atomic_load(&stats->record_sequence);
    uint32_t copied = 0;
    *lost = 0;
    if (*cursor > newest) /* not of this vault */
        *cursor = 0;
    if (newest - *cursor > FL_RECORDS_MAX) {
        *lost = newest - *cursor - FL_RECORDS_MAX;
        *cursor = newest - FL_RECORDS_MAX;
    }
    while (*cursor < newest && copied < max) {
        uint64_t want = *cursor + 1;
        struct fl_record *record = &stats->records[want % FL_RECORDS_MAX];
        uint64_t before = __atomic_load_n(&record->sequence, __ATOMIC_ACQUIRE);
        memcpy(&out[copied], record, sizeof(*record));
        fl_fence();
        uint64_t after = __atomic_load_n(&record->sequence, __ATOMIC_ACQUIRE);
        if (before == want && after == want) {
            copied++;
        } else if (before < want && newest - want < FL_RECORDS_MAX / 2) {
            break; /* being written: next time; one that its writer died in is passed over once it is old */
        } else {
            ++*lost;
        }
        *cursor = want;
    }
    return (int)copied;
}
