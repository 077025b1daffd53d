/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/mover.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/brake.h"
#include "pager/choose.h"
#include "pager/gauges.h"
#include "pager/scan.h"
#include "pager/serve.h"
#include "pager/watch.h"
#include "swap/fault.h"
#include "swap/removed.h"

#define IDLE_NS (500 * FL_NS_PER_MS)       /* longest sleep without a reason */
#define RETRY_NS (5 * FL_NS_PER_MS)        /* after the VMM's address space was changing */
#define SETTLE_NS (20 * FL_NS_PER_MS)      /* between looks whether a zap that was late has ended */
#define UNLIMITED_RATE (UINT64_C(2) << 30) /* bytes a second that the brake scales when no rate is set */
#define COMPACT_OBJECTS 256u
#define RELEASE_HOLD_NS (30 * FL_NS_PER_SECOND) /* while children of forks wait for what is away */
#define PREFETCH_STEP_NS (2 * FL_NS_PER_MS)
#define PREFETCH_TRIES 200u /* of one window, while the VMM's address space keeps changing */

struct prefetch {
    uint64_t first, count;
};

struct fl_mover {
    struct fl_vm *vm;
    struct fl_scanner scanner;
    struct fl_chooser chooser;
    struct fl_brake brake;
    struct fl_watch watch;
    pthread_t thread;
    int event_fd;
    _Atomic(uint32_t) ended; /* enum fl_mover_end */
    _Atomic(bool) detach;    /* asked for; the mover reads it in many places */

    pthread_mutex_t lock; /* guards what follows: what the control thread asked for */
    pthread_cond_t wake;
    bool woken, scan_now, release;
    uint32_t prefetch_count;
    struct prefetch prefetch[FL_PREFETCH_MAX];

    /* the mover's own */
    uint64_t scan_began_ns; /* the last one; 0: none yet */
    uint64_t next_scan_ns;
    uint64_t settled_ns; /* direct I/O that the last scan may not have seen is over */
    uint64_t longest_io_ns;
    uint64_t tokens_ns; /* when the rate's tokens were last topped up */
    double tokens;      /* bytes */
    uint64_t tier_full_until_ns;
    enum fl_why why;
    int evict_error;             /* of the last try; 0: it went well */
    struct prefetch prefetching; /* what is left of the range in hand */
    uint32_t prefetch_tries;
    uint64_t release_held_ns; /* since when; 0: it is not */
};

/* ---- scan ------------------------------------------------------------------------------------------------- */

/* Nothing goes by the ages as they are, until a scan has been harvested. */
static void forget_candidates(struct fl_chooser *chooser) {
    memset(chooser->counts.candidates, 0, sizeof(chooser->counts.candidates));
    fl_choose_restart(chooser);
}

/*
 * Somebody wants scans more or less often. An age of so many scans is another time then, and the next scan must not be
 * counted before a whole interval has gone by.
 */
static void keep_interval(struct fl_mover *mover) {
    struct fl_vault *vault = &mover->vm->vault;
    uint32_t wanted_ms = fl_vault_scan_interval_ms(vault);
    if (wanted_ms == fl_vault_age_interval_ms(vault))
        return;
    fl_age_recount(mover->vm, wanted_ms);
    forget_candidates(&mover->chooser);
    mover->next_scan_ns = mover->scan_began_ns ? mover->scan_began_ns + wanted_ms * FL_NS_PER_MS : 0;
}

/*
 * Direct I/O that begins between the last look at a page and its arming is in no age. Once it is over it does no harm, so
 * nothing goes for as long as it may take; with scans that follow each other faster, for half of the time.
 */
static uint64_t settling_ns(const struct fl_mover *mover) {
    uint64_t half_ns = fl_vault_scan_interval_ms(&mover->vm->vault) * FL_NS_PER_MS / 2;
    return mover->longest_io_ns < half_ns ? mover->longest_io_ns : half_ns;
}

static void scan(struct fl_mover *mover) {
    struct fl_vm *vm = mover->vm;
    struct fl_chooser *chooser = &mover->chooser;
    uint64_t start = fl_now();
    bool harvested = fl_scanner_scan(&mover->scanner, &chooser->counts);
    mover->scan_began_ns = start;
    mover->next_scan_ns = start + fl_vault_scan_interval_ms(&vm->vault) * FL_NS_PER_MS;
    mover->settled_ns = fl_now() + settling_ns(mover);
    if (harvested && mover->scanner.armed)
        fl_choose_restart(chooser);
    else /* what was touched meanwhile is in no count, or what is touched from now on cannot be seen */
        forget_candidates(chooser);
    if (!harvested)
        return;
    FL_COUNT(vm, scans, 1);
    FL_SET(vm, last_scan_ns, fl_now());
    FL_SET(vm, last_scan_took_ns, fl_now() - start);
    fl_record(vm, FL_RECORD_SCAN, FL_TIER_ZERO, start, chooser->counts.accessed, FL_READ(vm, resident_bytes), 0);
}

/* ---- out -------------------------------------------------------------------------------------------------- */

static uint64_t rate_allowance(struct fl_mover *mover, uint64_t now, uint32_t brake_permille) {
    uint64_t rate = atomic_load(&mover->vm->vault.header->budget.rate_bytes);
    double full = (double)(rate ? rate : UNLIMITED_RATE) * brake_permille / FL_BRAKE_OFF;
    double burst = full < FL_PAGE_SIZE ? FL_PAGE_SIZE : full;
    mover->tokens += full * (double)(now - mover->tokens_ns) / (double)FL_NS_PER_SECOND;
    mover->tokens_ns = now;
    if (mover->tokens > burst)
        mover->tokens = burst; /* one second's worth */
    return (uint64_t)mover->tokens / FL_PAGE_SIZE;
}

/* Why nothing may go now, or FL_WHY_EVICTING with the number of pages that may. */
static enum fl_why may_evict(struct fl_mover *mover, uint64_t now, uint64_t *allowance) {
    struct fl_vm *vm = mover->vm;
    struct fl_vault_budget *budget = &vm->vault.header->budget;
    uint64_t away = FL_READ(vm, evicted_pages) * FL_PAGE_SIZE, bytes = atomic_load(&budget->bytes);
    uint32_t brake = fl_brake_step(&mover->brake, now, FL_READ(vm, stall_ns));
    FL_SET(vm, brake_permille, brake);
    uint64_t rate_pages = rate_allowance(mover, now, brake);
    if (atomic_load(&vm->vault.header->corrupt))
        return FL_WHY_CORRUPT;
    if (atomic_load(&vm->vault.header->unsafe))
        return FL_WHY_UNSAFE;
    if (atomic_load(&budget->drain))
        return FL_WHY_DRAIN;
    if (now >= atomic_load(&budget->lease_until_ns))
        return FL_WHY_LEASE;
    if (away + FL_PAGE_SIZE > bytes)
        return FL_WHY_BUDGET;
    if (now < mover->tier_full_until_ns)
        return FL_WHY_TIER_FULL;
    if (!rate_pages)
        return brake < FL_BRAKE_OFF ? FL_WHY_BRAKE : FL_WHY_RATE;
    *allowance = (bytes - away) / FL_PAGE_SIZE;
    if (*allowance > rate_pages)
        *allowance = rate_pages;
    return FL_WHY_EVICTING;
}

/*
 * Tried again, and said once a cause. An address space that is changing (EAGAIN) is no failure, and a VMM that has ended is none
 * of ours.
 */
static void note_evict_error(struct fl_mover *mover, int error) {
    if (error == -EAGAIN || error == -ESRCH)
        return;
    if (error)
        mover->why = FL_WHY_FAILED;
    if (error && error != mover->evict_error)
        fl_log_text(FL_LOG_WARNING, "evict_failed", "evicting from process %d: %s; it is tried again", mover->vm->pid,
                    strerror(-error));
    mover->evict_error = error;
}

/* What the budget asks for, in the scans that ages count. */
static uint64_t min_age_scans(const struct fl_vault *vault) {
    uint64_t min_age_ns = atomic_load(&vault->header->budget.min_age_ns);
    uint64_t interval_ns = fl_vault_age_interval_ms(vault) * FL_NS_PER_MS;
    if (!interval_ns)
        return UINT64_MAX;
    uint64_t scans = min_age_ns / interval_ns + (min_age_ns % interval_ns != 0);
    return scans < 1 ? 1 : scans;
}

/* One step of eviction. Returns how long to sleep before the next. */
static uint64_t evict(struct fl_mover *mover, uint64_t now) {
    struct fl_vm *vm = mover->vm;
    struct fl_evicted done = {0};
    uint64_t allowance = 0;
    enum fl_why before = mover->why;
    mover->why = may_evict(mover, now, &allowance);
    if (mover->why == FL_WHY_RATE || mover->why == FL_WHY_BRAKE)
        return 10 * FL_NS_PER_MS;
    if (mover->why != FL_WHY_EVICTING)
        return IDLE_NS;
    if (!mover->scanner.tracker) {
        mover->why = FL_WHY_NO_TRACKER;
        return IDLE_NS;
    }
    uint64_t min_age = min_age_scans(&vm->vault);
    if (min_age > UINT8_MAX) { /* ages end there: which pages are older cannot be told */
        mover->why = FL_WHY_NOTHING_COLD;
        return IDLE_NS;
    }
    /* It may drop page tables yet, and with them what shows that a page was touched; step() sees to its end. */
    if (fl_zap_marked(vm)) {
        mover->why = FL_WHY_FAILED;
        return IDLE_NS;
    }
    if (now < mover->settled_ns) {
        if (before == FL_WHY_NOTHING_COLD)
            mover->why = before; /* until it is known better */
        return mover->settled_ns - now < IDLE_NS ? mover->settled_ns - now : IDLE_NS;
    }
    /* Who is forgetting what the VMM has freed may come to a page that has been filled anew: its new copy is not meant. */
    fl_fault_quiesce(mover->scanner.faults);
    int more = fl_choose_evict(&mover->chooser, allowance, (uint8_t)min_age, &done);
    mover->tokens -= (double)(done.pages * FL_PAGE_SIZE);
    if (done.pages)
        fl_record(vm, FL_RECORD_EVICT, FL_TIER_RAM, now, done.pages, done.stored_bytes, 0);
    if (more == -ENOSPC) {
        mover->why = FL_WHY_TIER_FULL;
        mover->tier_full_until_ns = now + FL_NS_PER_SECOND;
        return IDLE_NS;
    }
    note_evict_error(mover, more < 0 ? more : 0);
    if (more < 0)
        return RETRY_NS;
    if (more == 0)
        mover->why = FL_WHY_NOTHING_COLD;
    return more ? 0 : IDLE_NS;
}

/* ---- back ------------------------------------------------------------------------------------------------- */

/* How many pages are away that should not be. */
static uint64_t excess(struct fl_mover *mover, uint64_t now) {
    struct fl_vm *vm = mover->vm;
    struct fl_vault_budget *budget = &vm->vault.header->budget;
    uint64_t away = FL_READ(vm, evicted_pages);
    if (mover->detach || atomic_load(&budget->drain) || atomic_load(&vm->vault.header->unsafe))
        return away;
    if (now >= atomic_load(&budget->lease_until_ns))
        return 0; /* HOLD: what is away stays */
    uint64_t allowed = atomic_load(&budget->bytes) / FL_PAGE_SIZE;
    return away > allowed ? away - allowed : 0;
}

static uint64_t bring(struct fl_mover *mover, uint64_t pages, bool drain) {
    struct fl_vm *vm = mover->vm;
    uint64_t start = fl_now(), brought = 0;
    int more = fl_choose_bring(&mover->chooser, pages, &brought);
    if (drain)
        FL_COUNT(vm, drained_pages, brought);
    else
        FL_COUNT(vm, prefetched_pages, brought);
    if (brought)
        fl_record(vm, drain ? FL_RECORD_DRAIN : FL_RECORD_PREFETCH, FL_TIER_RAM, start, brought, brought * FL_PAGE_SIZE,
                  0);
    return more < 0 || !brought ? RETRY_NS : 0;
}

/* A range in hand; false: nobody asked for any. */
static bool take_prefetch(struct fl_mover *mover) {
    if (mover->prefetching.count)
        return true;
    pthread_mutex_lock(&mover->lock);
    bool any = mover->prefetch_count > 0;
    if (any) {
        mover->prefetching = mover->prefetch[0];
        mover->prefetch_count--;
        memmove(mover->prefetch, mover->prefetch + 1, mover->prefetch_count * sizeof(mover->prefetch[0]));
    }
    pthread_mutex_unlock(&mover->lock);
    mover->prefetch_tries = 0;
    return any;
}

/* The first window of what is left; what lies in no region goes at once. */
static int prefetch_window(struct fl_mover *mover, uint64_t *pages) {
    struct fl_vm *vm = mover->vm;
    struct prefetch *left = &mover->prefetching;
    uint64_t allowance = UINT64_MAX, count = left->count < FL_WINDOW_PAGES ? left->count : FL_WINDOW_PAGES;
    uint32_t region;
    int error = 0;
    if (!fl_region_of_page(vm, left->first, &region)) {
        left->count = 0; /* regions follow each other without a gap: this is beyond the last */
        return 0;
    }
    uint64_t end = fl_region(vm, region)->first_page + fl_region_pages(vm, region);
    if (count > end - left->first)
        count = end - left->first;
    if (!atomic_load(&fl_region(vm, region)->gone))
        error = fl_bring_range(mover->chooser.bringer, region, left->first, count, UINT8_MAX, true, &allowance, pages);
    if (error)
        return error;
    left->first += count;
    left->count -= count;
    mover->prefetch_tries = 0;
    return 0;
}

/* Returns how long to sleep: 0, or until the VMM's address space may have settled. What cannot be brought is said. */
static uint64_t prefetch(struct fl_mover *mover) {
    struct fl_vm *vm = mover->vm;
    uint64_t start = fl_now(), first = mover->prefetching.first, pages = 0;
    int error = 0;
    while (mover->prefetching.count && !error && !atomic_load(&vm->gone) && fl_now() - start < PREFETCH_STEP_NS)
        error = prefetch_window(mover, &pages);
    FL_COUNT(vm, prefetched_pages, pages);
    if (pages)
        fl_record(vm, FL_RECORD_PREFETCH, FL_TIER_RAM, start, pages, pages * FL_PAGE_SIZE, first);
    if (!error)
        return 0;
    if ((error == -EAGAIN || error == -ENOMEM) && ++mover->prefetch_tries < PREFETCH_TRIES)
        return RETRY_NS;
    if (error != -ESRCH)
        fl_log_text(FL_LOG_WARNING, "prefetch_given_up",
                    "%llu pages from page %llu on of process %d stay away until they are touched: %s",
                    (unsigned long long)mover->prefetching.count, (unsigned long long)mover->prefetching.first, vm->pid,
                    strerror(-error));
    mover->prefetching.count = 0;
    return 0;
}

/* ---- loop ------------------------------------------------------------------------------------------------- */

static enum fl_state state_of(struct fl_mover *mover, uint64_t now) {
    struct fl_vault_header *header = mover->vm->vault.header;
    if (atomic_load(&header->corrupt))
        return FL_STATE_CORRUPT;
    if (mover->detach || atomic_load(&header->budget.drain) || atomic_load(&header->unsafe))
        return FL_STATE_DRAIN;
    return now < atomic_load(&header->budget.lease_until_ns) ? FL_STATE_ACTIVE : FL_STATE_HOLD;
}

static bool relocate(void *context, uint64_t page, uint64_t old_handle, uint64_t new_handle) {
    struct fl_vm *vm = context;
    uint32_t region;
    if (page >= vm->vault.max_pages || !fl_region_of_page(vm, page, &region))
        return false;
    fl_entry old = fl_entry_make(FL_PAGE_EVICTED, FL_TIER_RAM, old_handle);
    return fl_swap_entry(vm, page, &old, fl_entry_make(FL_PAGE_EVICTED, FL_TIER_RAM, new_handle));
}

static void keep_pool(struct fl_mover *mover) {
    struct fl_vm *vm = mover->vm;
    uint32_t moved = fl_pool_compact(vm->pool, COMPACT_OBJECTS, relocate, vm);
    FL_COUNT(vm, compacted_pages, moved);
    (void)fl_pool_trim(vm->pool);
}

/* One round of the loop. Returns how long to sleep. */
static uint64_t step(struct fl_mover *mover) {
    struct fl_vm *vm = mover->vm;
    uint64_t now = fl_now(), pause = IDLE_NS, too_many = 0;
    pthread_mutex_lock(&mover->lock);
    bool scan_now = mover->scan_now;
    mover->scan_now = false;
    pthread_mutex_unlock(&mover->lock);

    bool zap_may_come = !fl_scanner_settle_zap(&mover->scanner);
    fl_watch_step(&mover->watch, vm, mover->chooser.bringer, now);
    keep_interval(mover);
    bool scan_due = !mover->detach && (scan_now || now >= mover->next_scan_ns);
    if (!scan_due && take_prefetch(mover)) { /* a long range does not make scans wait */
        pause = prefetch(mover);
    } else if ((too_many = excess(mover, now)) != 0) {
        mover->why = FL_WHY_DRAIN;
        pause = bring(mover, too_many, state_of(mover, now) != FL_STATE_ACTIVE);
    } else if (scan_due) {
        scan(mover);
        pause = 0;
    } else if (!mover->detach) {
        pause = evict(mover, now);
    }
    if (zap_may_come && pause > SETTLE_NS)
        pause = SETTLE_NS;
    keep_pool(mover);
    fl_gauges_publish(vm, state_of(mover, now), mover->why);
    if (mover->detach || too_many) /* no scan comes before that is done */
        return pause;
    now = fl_now();
    uint64_t to_scan = mover->next_scan_ns > now ? mover->next_scan_ns - now : 0;
    return pause < to_scan ? pause : to_scan;
}

/*
 * Nothing is away, for detaching. A lost page is marked before it is counted out, so the mark is looked at after the count:
 * pages may turn out to be lost while the last of them are brought back, and without us they could read as zeros.
 */
static bool is_drained(struct fl_mover *mover) {
    struct fl_vm *vm = mover->vm;
    bool empty = __atomic_load_n(&vm->vault.stats->status.evicted_pages, __ATOMIC_ACQUIRE) == 0;
    if (!atomic_load(&vm->vault.header->corrupt))
        return empty;
    atomic_store(&mover->detach, false);
    fl_log_text(FL_LOG_ERROR, "detach_given_up",
                "pages of process %d are lost; after detaching the guest could read zeros there: end the VM instead",
                vm->pid);
    return false;
}

/*
 * Told to release. While children of forks wait everything is brought back, and then they are let go; it is held for that long
 * and no longer: who asked will kill us if he must, and the child is then on its own.
 */
static bool may_release(struct fl_mover *mover) {
    uint64_t now = fl_now();
    if (!fl_forks_wait(mover->vm))
        return true;
    if (!mover->release_held_ns)
        mover->release_held_ns = now;
    if (now - mover->release_held_ns > RELEASE_HOLD_NS) {
        fl_log_text(FL_LOG_ERROR, "release_given_up",
                    "a child of process %d waits with %llu pages away and would read zeros without this pager; free "
                    "memory on the host and release again",
                    mover->vm->pid, (unsigned long long)FL_READ(mover->vm, evicted_pages));
        mover->release = false;
        mover->release_held_ns = 0;
    }
    return false;
}

static enum fl_mover_end should_end(struct fl_mover *mover) {
    enum fl_mover_end end = FL_MOVER_RUNS;
    pthread_mutex_lock(&mover->lock);
    if (atomic_load(&mover->vm->gone))
        end = FL_MOVER_VM_GONE;
    else if (mover->release && may_release(mover))
        end = FL_MOVER_RELEASED;
    else if (atomic_load(&mover->detach) && is_drained(mover))
        end = FL_MOVER_DRAINED;
    pthread_mutex_unlock(&mover->lock);
    return end;
}

static void pause_for(struct fl_mover *mover, uint64_t nanoseconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t sum = (uint64_t)until.tv_nsec + nanoseconds;
    until.tv_sec += (time_t)(sum / FL_NS_PER_SECOND);
    until.tv_nsec = (long)(sum % FL_NS_PER_SECOND);
    pthread_mutex_lock(&mover->lock);
    while (!mover->woken && pthread_cond_timedwait(&mover->wake, &mover->lock, &until) == 0)
        ;
    mover->woken = false;
    pthread_mutex_unlock(&mover->lock);
}

static void *run(void *argument) {
    struct fl_mover *mover = argument;
    enum fl_mover_end end;
    while ((end = should_end(mover)) == FL_MOVER_RUNS) {
        uint64_t pause = step(mover);
        if (pause)
            pause_for(mover, pause);
    }
    atomic_store(&mover->ended, end);
    uint64_t one = 1;
    if (write(mover->event_fd, &one, sizeof(one)) < 0)
        fl_log(FL_LOG_ERROR, "event_write_failed", "\"errno\":%d", errno);
    return NULL;
}

/* ---- from the control thread ------------------------------------------------------------------------------- */

/* Tell the mover something under its lock. */
static void begin_telling(struct fl_mover *mover) {
    pthread_mutex_lock(&mover->lock);
}

static void end_telling(struct fl_mover *mover) {
    mover->woken = true;
    pthread_cond_signal(&mover->wake);
    pthread_mutex_unlock(&mover->lock);
}

void fl_mover_wake(struct fl_mover *mover) {
    begin_telling(mover);
    end_telling(mover);
}

void fl_mover_scan(struct fl_mover *mover) {
    begin_telling(mover);
    mover->scan_now = true;
    end_telling(mover);
}

void fl_mover_release(struct fl_mover *mover) {
    begin_telling(mover);
    mover->release = true;
    end_telling(mover);
}

void fl_mover_detach(struct fl_mover *mover) {
    begin_telling(mover);
    atomic_store(&mover->detach, true);
    end_telling(mover);
}

int fl_mover_prefetch(struct fl_mover *mover, uint64_t first_page, uint64_t page_count) {
    int error = -ENOBUFS;
    if (page_count == 0 || first_page >= mover->vm->vault.max_pages ||
        page_count > mover->vm->vault.max_pages - first_page)
        return -EINVAL;
    begin_telling(mover);
    if (mover->prefetch_count < FL_PREFETCH_MAX) {
        mover->prefetch[mover->prefetch_count++] = (struct prefetch){first_page, page_count};
        error = 0;
    }
    end_telling(mover);
    return error;
}

enum fl_mover_end fl_mover_ended(struct fl_mover *mover) {
    return (enum fl_mover_end)atomic_load(&mover->ended);
}

int fl_mover_event_fd(struct fl_mover *mover) {
    return mover->event_fd;
}

static int create_parts(struct fl_mover *mover) {
    struct fl_chooser *chooser = &mover->chooser;
    int error = fl_evictor_create(mover->vm, fl_scanner_harvest, &mover->scanner, &chooser->evictor);
    if (!error)
        error = fl_bringer_create(mover->vm, &chooser->bringer);
    return error;
}

static void destroy(struct fl_mover *mover) {
    struct fl_chooser *chooser = &mover->chooser;
    fl_bringer_destroy(chooser->bringer);
    fl_evictor_destroy(chooser->evictor);
    fl_scanner_stop(&mover->scanner);
    pthread_cond_destroy(&mover->wake);
    pthread_mutex_destroy(&mover->lock);
    if (mover->event_fd >= 0)
        close(mover->event_fd);
    free(mover);
}

int fl_mover_start(struct fl_vm *vm, struct fl_fault_server *faults, const struct fl_options *options,
                   struct fl_mover **out) {
    struct fl_mover *mover = calloc(1, sizeof(*mover));
    if (!mover)
        return -ENOMEM;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&mover->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&mover->lock, NULL);
    mover->vm = vm;
    mover->chooser.vm = vm;
    mover->chooser.scanner = &mover->scanner;
    mover->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint64_t now = fl_now(), last = atomic_load(&vm->vault.header->aged_ns);
    if (last > now)
        last = now;
    mover->tokens_ns = now;
    /* A successor keeps the rhythm: what its predecessor armed is harvested when it is due, not earlier. */
    fl_scanner_start(&mover->scanner, vm, faults, &options->trackers);
    mover->scan_began_ns = last;
    mover->longest_io_ns = options->longest_io_ms * FL_NS_PER_MS;
    mover->next_scan_ns = last ? last + fl_vault_scan_interval_ms(&vm->vault) * FL_NS_PER_MS : now;
    fl_brake_init(&mover->brake, options->stall_target_permille, now, FL_READ(vm, stall_ns));
    fl_watch_init(&mover->watch, now);
    int error = mover->event_fd < 0 ? -errno : create_parts(mover);
    if (!error)
        error = -pthread_create(&mover->thread, NULL, run, mover);
    if (error) {
        destroy(mover);
        return error;
    }
    *out = mover;
    return 0;
}

void fl_mover_join(struct fl_mover *mover) {
    pthread_join(mover->thread, NULL);
    destroy(mover);
}
