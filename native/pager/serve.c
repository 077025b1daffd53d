/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/serve.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attach/gate.h"
#include "attach/inspect.h"
#include "attach/probe.h"
#include "base/clock.h"
#include "base/log.h"
#include "swap/recover.h"
#include "swap/regions.h"
#include "swap/removed.h"
#include "swap/uffd.h"

#define LOCK_TRIES 1500u /* 3 s: what a helper takes at most */
#define LOCK_PAUSE_NS (2 * FL_NS_PER_MS)
#define ATTACH_TRIES 5u
#define DETACH_TRIES 50u
#define ATTACH_PAUSE_NS (100 * FL_NS_PER_MS)

static int open_process(struct fl_vm *vm, struct fl_refused *why) {
    char path[64];
    vm->pidfd = (int)syscall(SYS_pidfd_open, vm->pid, 0);
    if (vm->pidfd < 0)
        return fl_refuse(why, errno == ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_INTERNAL, "pidfd_open of process %d: %s",
                         vm->pid, strerror(errno));
    snprintf(path, sizeof(path), "/proc/%d/pagemap", vm->pid);
    vm->pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (vm->pagemap_fd < 0)
        return fl_refuse(why, errno == ENOENT ? FL_REFUSAL_GONE : FL_REFUSAL_PERMISSION, "open %s: %s; run as root",
                         path, strerror(errno));
    return 0;
}

/*
 * Whether a living pager holds the lock. Not so when somebody only looked at it just now (then nobody is named), or when a
 * dead pager's helper is still at work attaching or detaching.
 */
static bool is_held(int vmm_pid, int *holder) {
    return fl_vault_holder(vmm_pid, holder) || *holder < 0 ||
           (*holder > 0 && (kill(*holder, 0) == 0 || errno == EPERM));
}

/* A description of our own, so that the lock is ours alone and goes with us. */
static int lock_vault(struct fl_vm *vm, int *fd, struct fl_refused *why) {
    int error = fl_vmm_open_vault(vm->pid, O_RDWR, fd);
    if (error)
        return fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_VAULT_INVALID,
                         "cannot open the vault of process %d: %s", vm->pid, strerror(-error));
    int holder = 0;
    bool locked = flock(*fd, LOCK_EX | LOCK_NB) == 0;
    for (unsigned try = 0; !locked && try < LOCK_TRIES && !is_held(vm->pid, &holder); try++) {
        fl_sleep_ns(LOCK_PAUSE_NS);
        locked = flock(*fd, LOCK_EX | LOCK_NB) == 0;
    }
    if (!locked) {
        close(*fd);
        return fl_refuse(why, FL_REFUSAL_ALREADY_SERVED,
                         "process %d is served by pager %d; end that one first (release)", vm->pid, holder);
    }
    return 0;
}

static int open_pool(struct fl_vm *vm, uint64_t limit, struct fl_refused *why) {
    struct fl_vault *vault = &vm->vault;
    int error = fl_pool_open(vault->pool, vault->pool_bytes, vault->fd, vault->pool_offset, vault->slab_map,
                             limit ? limit : vault->pool_bytes, &vm->pool);
    if (error)
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot open the pool in the vault of process %d: %s", vm->pid,
                         strerror(-error));
    return 0;
}

static int make_vault(struct fl_vm *vm, const struct fl_inspection *found, struct fl_refused *why) {
    int error = fl_vault_create(vm->pid, found->start_time_ticks, found->memory_bytes, &vm->vault);
    if (error) {
        vm->vault.fd = -1;
        return fl_refuse(why, error == -E2BIG ? FL_REFUSAL_LIMIT : FL_REFUSAL_INTERNAL,
                         "cannot make a vault for %llu bytes of guest memory: %s",
                         (unsigned long long)found->memory_bytes, strerror(-error));
    }
    /* Locked before anybody can see it: from the first moment on it has one owner. */
    if (flock(vm->vault.fd, LOCK_EX | LOCK_NB))
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot lock a new vault: %s", strerror(errno));
    return 0;
}

/* How the regions should be registered: by what the first tracker that will work here needs. */
static enum fl_freeze wanted_freeze(struct fl_vm *vm, const struct fl_options *options) {
    struct fl_tracked tracked = fl_tracked_of(vm);
    tracked.freeze = FL_FREEZE_NONE;
    uint32_t place = 0;
    const struct fl_tracker_ops *ops = fl_tracker_next(&options->trackers, &place, &tracked);
    return ops && ops->freeze ? ops->freeze : FL_FREEZE_WP;
}

/*
 * A kernel that does only half of what it offers: pages could not be held still, and writes to them would be lost. Asked
 * before the VMM is touched (FL_FREEZE_NONE: either way will do), and when it is known how memory will be registered. A VM
 * that is served already goes on as it is.
 */
static int refuse_no_freeze(enum fl_freeze freeze, struct fl_refused *why) {
    struct fl_kernel_features kernel;
    fl_probe_userfaultfd(&kernel);
    if (kernel.wp_shmem || (kernel.rwp && freeze != FL_FREEZE_WP))
        return 0;
    return fl_refuse(why, FL_REFUSAL_KERNEL,
                     "no way to hold a page still here: %s; it takes CONFIG_USERFAULTFD with CONFIG_PTE_MARKER_UFFD_WP "
                     "(or RWP), and root",
                     kernel.wp_lacks);
}

/* Whether a range is registered with a stranger's userfaultfd shows only on registering; undo all of it then. */
static int attach(struct fl_vm *vm, const struct fl_inspection *found, const struct fl_options *options,
                  struct fl_refused *why) {
    struct fl_refused undo_why;
    if (make_vault(vm, found, why))
        return -EPERM;
    /* The attaching child writes into the shared header: what it did is known even if this process dies meanwhile. */
    struct fl_attachment *attachment = &vm->vault.header->attachment;
    if (fl_attach(vm->pid, vm->vault.fd, vm->vault.gate_offset, attachment, why))
        return -EPERM;
    int error = fl_attach_borrow(vm->pid, attachment, &vm->uffd, NULL);
    if (error)
        error = fl_refuse(why, FL_REFUSAL_INTERNAL, "pidfd_getfd of the userfaultfd in process %d: %s", vm->pid,
                          strerror(-error));
    if (!error)
        error = fl_uffd_setup(vm, why);
    if (!error)
        error = open_pool(vm, options->pool_max_bytes, why);
    if (!error) {
        fl_regions_freeze(vm, wanted_freeze(vm, options));
        error = refuse_no_freeze(vm->freeze, why);
    }
    if (!error)
        error = fl_regions_update(vm, found, why);
    if (error) {
        fl_regions_unregister(vm);
        if (fl_attach_undo(vm->pid, attachment, vm->vault.fd, &undo_why))
            fl_log_text(FL_LOG_ERROR, "attach_undo_failed", "%s", undo_why.detail);
        return error;
    }
    struct fl_status *status = &vm->vault.stats->status;
    status->vmm_pid = (uint32_t)vm->pid;
    status->attached_at_ns = fl_now();
    status->attach_stop_ns = attachment->stop_ns;
    atomic_store(&vm->vault.header->phase, FL_VAULT_REGISTERED);
    return 0;
}

/* The userfaultfd that the VMM holds. A pager that died while attaching may not have written down which one it is. */
static int borrow_again(struct fl_vm *vm, struct fl_refused *why) {
    struct fl_attachment *attachment = &vm->vault.header->attachment;
    int error = 0;
    if (atomic_load(&vm->vault.header->phase) == FL_VAULT_NEW)
        error = fl_attach_recover(vm->pid, attachment);
    if (!error)
        error = fl_attach_borrow(vm->pid, attachment, &vm->uffd, NULL);
    if (error)
        return fl_refuse(why, error == -ESRCH ? FL_REFUSAL_GONE : FL_REFUSAL_VAULT_INVALID,
                         "the userfaultfd that belongs to the vault of process %d (descriptor %d) is not there: %s",
                         vm->pid, attachment->vmm_uffd, strerror(-error));
    return 0;
}

/* The predecessor died between handing in and registering: the rest of attaching. */
static int finish_attaching(struct fl_vm *vm, struct fl_refused *why) {
    struct fl_inspection found;
    struct fl_status *status = &vm->vault.stats->status;
    int error = fl_inspect_target(vm->pid, 0, 0, &found);
    if (error || found.refusal)
        return fl_refuse(why, error ? FL_REFUSAL_INTERNAL : found.refusal, "%.*s", FL_DETAIL_BYTES - 1,
                         error ? strerror(-error) : found.detail);
    if (fl_regions_update(vm, &found, why))
        return -EPERM;
    status->vmm_pid = (uint32_t)vm->pid;
    status->attached_at_ns = fl_now();
    status->attach_stop_ns = vm->vault.header->attachment.stop_ns;
    return 0;
}

/*
 * The kernel changes from one kind of registration to the other only by way of none at all, and what is away would read
 * as zeros then: only while nothing is. With pages away, nobody waits for the question what would be best here. And only
 * while all of each region is mapped: other memory may stand in the gap. A page that is lost counts as away for ever.
 */
static int refreeze(struct fl_vm *vm, const struct fl_options *options, struct fl_refused *why) {
    const struct fl_vault_header *header = vm->vault.header;
    if (FL_READ(vm, evicted_pages) || atomic_load(&header->unsafe) || atomic_load(&header->corrupt))
        return 0;
    enum fl_freeze wanted = wanted_freeze(vm, options);
    return wanted == vm->freeze ? 0 : fl_regions_refreeze(vm, wanted, why);
}

/*
 * What is away must be served whatever else is the matter with the VMM, and soon: nothing is inspected here. The
 * mover looks at once whether the VM may still be tiered.
 */
static int take_over(struct fl_vm *vm, const struct fl_options *options, struct fl_refused *why) {
    int fd;
    uint64_t fixed = 0, start = fl_now(), start_ticks;
    int error = fl_proc_start_time(vm->pid, &start_ticks);
    if (error)
        return fl_refuse(why, FL_REFUSAL_GONE, "process %d: %s", vm->pid, strerror(-error));
    if (lock_vault(vm, &fd, why))
        return -EPERM;
    if (fl_vault_map(fd, true, vm->pid, start_ticks, &vm->vault, why)) {
        close(fd);
        return -EPERM;
    }
    if (borrow_again(vm, why) || fl_uffd_setup(vm, why) || open_pool(vm, options->pool_max_bytes, why))
        return -EPERM;
    enum fl_freeze freeze = (enum fl_freeze)atomic_load(&vm->vault.header->freeze);
    if (freeze == FL_FREEZE_NONE) /* the predecessor died before it registered anything */
        freeze = wanted_freeze(vm, options);
    else if (freeze != FL_FREEZE_RWP)
        freeze = FL_FREEZE_WP;
    if (fl_regions_adopt(vm, freeze, why) || fl_recover(vm, &fixed, why) || refreeze(vm, options, why))
        return -EPERM;
    atomic_store(&vm->parted, atomic_load(&vm->vault.header->unsafe) != FL_REFUSAL_NONE); /* for all that we know */
    fl_removed_finish(vm);
    if (atomic_load(&vm->vault.header->phase) == FL_VAULT_NEW && finish_attaching(vm, why))
        return -EPERM;
    atomic_store(&vm->vault.header->phase, FL_VAULT_REGISTERED);
    atomic_store(&vm->remap_pending, 1); /* the predecessor may not have got to what the VMM unmapped */
    FL_COUNT(vm, recovered_pages, fixed);
    FL_COUNT(vm, takeovers, 1);
    fl_record(vm, FL_RECORD_TAKEOVER, FL_TIER_ZERO, start, fixed, 0, 0);
    return 0;
}

static int inspect_and_attach(struct fl_vm *vm, const struct fl_options *options, struct fl_refused *why) {
    struct fl_inspection found;
    int error = fl_inspect_target(vm->pid, 0, 1, &found);
    if (error)
        return fl_refuse(why, FL_REFUSAL_INTERNAL, "cannot inspect process %d: %s", vm->pid, strerror(-error));
    if (found.refusal)
        return fl_refuse(why, found.refusal, "%.*s", FL_DETAIL_BYTES - 1, found.detail);
    if (refuse_no_freeze(FL_FREEZE_NONE, why))
        return -EPERM;
    for (unsigned try = 1;; try++) {
        error = attach(vm, &found, options, why);
        if (!error || why->refusal != FL_REFUSAL_STUCK || try == ATTACH_TRIES)
            return error;
        fl_vault_close(&vm->vault);
        fl_sleep_ns(ATTACH_PAUSE_NS); /* the VMM's main thread was in the middle of something */
    }
}

int fl_serve_begin(struct fl_vm *vm, const struct fl_options *options, struct fl_refused *why) {
    *vm = (struct fl_vm){.pid = options->vmm_pid, .pidfd = -1, .uffd = -1, .pagemap_fd = -1, .vault.fd = -1};
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++)
        vm->memory[i].fd = -1;
    for (uint32_t i = 0; i < FL_FORKS_MAX; i++)
        vm->forks[i] = -1;
    if (open_process(vm, why))
        return -EPERM;
    int vault_fd, error = fl_vmm_open_vault(vm->pid, O_RDONLY, &vault_fd);
    if (!error)
        close(vault_fd);
    bool anew = error != 0;
    error = anew ? inspect_and_attach(vm, options, why) : take_over(vm, options, why);
    if (error)
        return error;
    struct fl_vault_header *header = vm->vault.header;
    atomic_store(&header->pager_pid, (uint32_t)getpid());
    /*
     * A zap of a predecessor that was killed. While no call is under way, and none will be, no event of it waits to be read: what
     * does is what the VMM has freed since.
     */
    if (fl_zap_marked(vm) && fl_gate_cancel(vm->vault.base + vm->vault.gate_offset))
        fl_zap_unmark(vm);
    if (options->scan_interval_ms || !atomic_load(&header->scan_interval_ms))
        atomic_store(&header->scan_interval_ms,
                     options->scan_interval_ms ? options->scan_interval_ms : FL_SCAN_INTERVAL_MS);
    if (anew) /* all ages are 0 */
        atomic_store(&header->age_interval_ms, fl_vault_scan_interval_ms(&vm->vault));
    struct fl_stats *stats = vm->vault.stats;
    if (atomic_load(&stats->sequence) & 1) /* the dead pager was in the middle of publishing */
        atomic_fetch_add(&stats->sequence, 1);
    stats->status.pager_pid = (uint32_t)getpid();
    stats->status.state = FL_STATE_STARTING;
    return 0;
}

void fl_serve_began(struct fl_vm *vm, uint64_t started_ns) {
    struct fl_status *status = &vm->vault.stats->status;
    /* A predecessor may have ended in sync mode. Only now, that nothing of it is PUNCHING any more. */
    fl_uffd_leave_sync(vm);
    fl_regions_wake(vm);
    status->pager_started_ns = started_ns;
    status->takeover_ns = fl_now() - started_ns;
}

int fl_serve_detach(struct fl_vm *vm, struct fl_refused *why) {
    if (atomic_load(&vm->vault.header->corrupt))
        return fl_refuse(why, FL_REFUSAL_INTERNAL,
                         "pages of process %d are lost; after detaching the guest could read zeros there: end the VM "
                         "instead",
                         vm->pid);
    struct fl_attachment attachment = vm->vault.header->attachment;
    atomic_store(&vm->vault.header->phase, FL_VAULT_DETACHING);
    fl_regions_unregister(vm);
    vm->vault.stats->status.state = FL_STATE_DETACHED;
    int error = -EPERM;
    for (unsigned try = 0; error && try < DETACH_TRIES; try++) {
        if (try)
            fl_sleep_ns(ATTACH_PAUSE_NS);
        error = fl_attach_undo(vm->pid, &attachment, vm->vault.fd, why);
        if (error && why->refusal != FL_REFUSAL_STUCK && why->refusal != FL_REFUSAL_TRACED)
            break;
    }
    return error;
}

void fl_serve_close(struct fl_vm *vm) {
    fl_pool_close(vm->pool);
    fl_regions_close(vm);
    fl_vault_close(&vm->vault);
    if (vm->uffd >= 0)
        close(vm->uffd);
    if (vm->pagemap_fd >= 0)
        close(vm->pagemap_fd);
    if (vm->pidfd >= 0)
        close(vm->pidfd);
}
