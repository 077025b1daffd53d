/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/fault.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"
#include "swap/event.h"
#include "swap/load.h"
#include "swap/regions.h"
#include "swap/removed.h"
#include "swap/uffd.h"
#include "track/age.h"

#define EVENT_PAUSE_NS (100 * FL_NS_PER_MS)
#define MESSAGES 4u  /* read at once; few, so that threads share a burst */
#define PENDING 256u /* faults in hand that wait for an event or for another thread */
#define MANY_PENDING 64u
#define SAMPLE_EVERY 64u /* one fault in so many becomes a record */
#define SPINS_BEFORE_SLEEP 64u
#define LOGGED_MAX 16u                  /* failures that are named in the log */
#define FORGET_ALONE_NS FL_NS_PER_MS    /* then the helpers are called, and again */
#define OWNER_NS (2 * FL_NS_PER_SECOND) /* whoever owns a page needs microseconds; longer, and nobody does */
#define ZAP_NS (2 * FL_NS_PER_SECOND)   /* a touch waits so long for a zap; it takes some hundreds of microseconds */
#define LEADER_WAIT_MS 1000
#define HELPER_WAIT_MS 250 /* helpers look by themselves too, should the leader be stuck in a load */

_Static_assert(MESSAGES *FL_FAULT_THREADS_MAX <= FL_FORGETTING_MAX, "a note for each message in hand");

enum fault_kind { FAULT_MISSING, FAULT_MINOR, FAULT_PROTECTED };

struct fault {
    uint64_t address;
    uint64_t read_ns;
    enum fault_kind kind;
};

struct worker {
    struct fl_fault_server *server;
    pthread_t thread;
    int epoll;
    _Atomic(uint64_t) batches; /* odd while messages are being read and their events acted on */
    uint32_t first_note;       /* of MESSAGES: what this thread has read of that the VMM has freed, and is to forget */
    uint32_t served;
    uint64_t shortages; /* in a row: a message was there and could not be read */
    bool overflowed;    /* faults were dropped: their waiters must be woken to fault anew */
    uint32_t pending_count;
    struct fault pending[PENDING];
    struct uffd_msg messages[MESSAGES];
    uint8_t buffer[FL_PAGE_SIZE] __attribute__((aligned(64)));
};

/*
 * The first thread leads: it alone waits for the userfaultfd. If several waited, each message would wake them all, and
 * even waking just one (EPOLLEXCLUSIVE) wakes the wrong one when the other is about to look again. A read that
 * comes back full means a burst: then the leader calls the helpers, who read until nothing is left.
 */
struct fl_fault_server {
    struct fl_vm *vm;
    int stop_event;
    int help_event;
    _Atomic(bool) stopping;
    _Atomic(uint64_t) late;
    _Atomic(uint32_t) count;
    /* What is read first is known first: that memory has moved, before it is unmapped where it was. */
    pthread_mutex_t order;
    struct worker *workers;
};

static uint32_t latency_bucket(uint64_t nanoseconds) {
    uint32_t bucket = 0;
    if (nanoseconds > 256) {
        uint32_t octave = 63 - (uint32_t)__builtin_clzll(nanoseconds) - 8;
        bucket = octave * 4;
    }
    while (bucket < FL_LATENCY_BUCKETS - 1 && nanoseconds > fl_latency_bucket_edge(bucket))
        bucket++;
    return bucket < FL_LATENCY_BUCKETS ? bucket : FL_LATENCY_BUCKETS - 1;
}

static void account(struct worker *worker, uint64_t page, enum fl_tier tier, uint8_t age, uint32_t stored_bytes,
                    uint64_t read_ns, uint64_t woken_ns) {
    struct fl_vm *vm = worker->server->vm;
    uint64_t took = woken_ns - read_ns;
    FL_COUNT(vm, faults, 1);
    FL_COUNT(vm, stall_ns, took);
    FL_COUNT(vm, fault_latency[latency_bucket(took)], 1);
    FL_COUNT(vm, promotions[fl_age_bin(age)], 1);
    if (worker->served++ % SAMPLE_EVERY == 0)
        fl_record(vm, FL_RECORD_FAULT, tier, read_ns, 1, stored_bytes, page);
}

static void log_failure(const char *name, uint64_t page, const char *what, int error) {
    static _Atomic(uint32_t) logged;
    if (atomic_fetch_add(&logged, 1) < LOGGED_MAX)
        fl_log(FL_LOG_ERROR, name, "\"page\":%llu,\"what\":\"%s\",\"errno\":%d,\"detail\":\"%s\"",
               (unsigned long long)page, what, -error, strerror(-error));
}

/*
 * What was tried cannot be done, now or here. The waiter is never just left: it looks again by itself, at the page as it is
 * then. ENOENT: the range is unmapped or moved, and what follows from that may not be in the regions yet.
 */
static void fault_anew(struct fl_vm *vm, uint64_t address, uint64_t page, const char *what, int error) {
    if (error == -ESRCH) {
        atomic_store(&vm->gone, 1);
        return;
    }
    if (error != -ENOENT)
        log_failure("fault_failed", page, what, error);
    FL_COUNT(vm, stale_messages, 1);
    (void)fl_uffd_wake(vm, address & ~(uint64_t)(FL_PAGE_SIZE - 1), FL_PAGE_SIZE);
}

/*
 * A page in memory whose touch had to wait for us, because it was being evicted or is not mapped: for the policy it is a page of
 * this age that was touched, and for the brake time lost. (A later scan sees the same touch at age 0, as after a load.)
 */
static void account_resident(struct fl_vm *vm, uint8_t age, uint64_t read_ns) {
    FL_COUNT(vm, stall_ns, fl_now() - read_ns);
    FL_COUNT(vm, promotions[fl_age_bin(age)], 1);
}

static bool load(struct worker *worker, const struct fault *fault, uint32_t region, uint64_t page, fl_entry entry,
                 enum fl_removed known) {
    struct fl_vm *vm = worker->server->vm;
    fl_entry mine = fl_entry_with_state(entry, FL_PAGE_LOADING);
    uint32_t stored_bytes;
    uint64_t woken_ns;
    if (!fl_swap_entry(vm, page, &entry, mine))
        return false;
    uint8_t age = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
    int error = fl_load(vm, region, page, mine, known, worker->buffer, &stored_bytes, &woken_ns);
    /* A damaged copy has been poisoned in the table; that the kernel knows too, and that the waiter is woken, the next look
     * at the same fault sees to. */
    if (error == -EAGAIN || error == -ENOMEM || error == -EBADMSG)
        return false;
    if (error)
        fault_anew(vm, fault->address, page, "UFFDIO_COPY", error);
    else
        account(worker, page, fl_entry_tier(mine), age, stored_bytes, fault->read_ns, woken_ns);
    return true;
}

static int resolve(struct fl_vm *vm, uint64_t address, enum fault_kind kind) {
    int error = 0;
    switch (kind) {
    case FAULT_MISSING:
        error = fl_uffd_zero(vm, address);
        FL_COUNT(vm, zero_fills, error == 0);
        break;
    case FAULT_MINOR:
        error = fl_uffd_continue(vm, address);
        FL_COUNT(vm, minor_faults, error == 0);
        break;
    case FAULT_PROTECTED:
        error = fl_uffd_protect(vm, address, FL_PAGE_SIZE, false);
        FL_COUNT(vm, write_faults, error == 0);
        break;
    }
    return error;
}

/*
 * The page is in the VMM's file, or was never there. It is taken as BUSY so that no eviction can slip in between the
 * look and the act: without that, zeros could land in a hole that was punched a moment ago.
 */
static bool settle_resident(struct worker *worker, const struct fault *fault, uint32_t region, uint64_t page,
                            fl_entry entry) {
    static const char *const names[] = {"UFFDIO_ZEROPAGE", "UFFDIO_CONTINUE", "lifting a protection"};
    struct fl_vm *vm = worker->server->vm;
    if (!fl_swap_entry(vm, page, &entry, fl_entry_make(FL_PAGE_BUSY, FL_TIER_ZERO, 0)))
        return false; /* an eviction that was faster is not cancelled */
    if (fl_entry_state(entry) == FL_PAGE_FREEZING && fault->kind != FAULT_MISSING)
        FL_COUNT(vm, evictions_cancelled, 1);
    uint64_t address = fl_address_of_page(vm, region, page);
    int error = resolve(vm, address, fault->kind);
    /* The host's memory has failed under the page (HWPOISON): the VMM gets the error that it would have had without us. */
    if (error == -EIO) {
        log_failure("memory_failed", page, names[fault->kind], error);
        error = fl_poison_hole(vm, region, page);
    }
    /* Mapped, filled or punched since: the waiter looks again, and says so if it is still in want of something. */
    if (error == -EEXIST || error == -EFAULT) {
        error = fl_uffd_wake(vm, address, FL_PAGE_SIZE);
        FL_COUNT(vm, stale_messages, 1);
    }
    bool answered = error != -EAGAIN && error != -ENOMEM;
    uint8_t age = __atomic_load_n(&vm->vault.ages[page], __ATOMIC_RELAXED);
    if (answered)
        __atomic_store_n(&vm->vault.ages[page], 0, __ATOMIC_RELAXED);
    atomic_store_explicit(fl_slot(vm, page), 0, memory_order_release);
    if (!answered)
        return false;
    /* A first touch of memory that was never there is neither. */
    if (!error && fault->kind != FAULT_MISSING)
        account_resident(vm, age, fault->read_ns);
    if (error)
        fault_anew(vm, fault->address, page, names[fault->kind], error);
    return true;
}

/* A poison marker goes with its page table entry (a zap, a takeover before it was set): put it there again. */
static bool repoison(struct fl_vm *vm, uint32_t region, uint64_t page) {
    int error = fl_poison_hole(vm, region, page);
    /* Without UFFDIO_POISON the vCPU waits for ever: a VM that hangs is better than one that reads a wrong byte. */
    return error != -EAGAIN && error != -ENOMEM;
}

/* Somebody is at work on the page, and needs microseconds. */
static bool is_owned(fl_entry entry) {
    enum fl_page_state state = fl_entry_state(entry);
    return state == FL_PAGE_PUNCHING || state == FL_PAGE_LOADING || state == FL_PAGE_BUSY;
}

/*
 * Flipped bits in the table: whatever the entry says, it is not to be believed, least of all that nothing is stored. A page that
 * the file has needs no entry; the content of a hole is lost. Then the fault is looked at again: as any other, or until
 * the waiter has its error (the kernel may refuse a poison as it may refuse a copy).
 */
static void settle_damaged(struct fl_vm *vm, uint32_t region, uint64_t page, fl_entry entry, uint64_t read_ns) {
    fl_entry before;
    /* More flipped bits than one may look as if somebody owned it, and nobody does. */
    if (fl_entry_before_flip(entry, &before) && is_owned(before) && fl_now() - read_ns < OWNER_NS)
        return;                                     /* its owner goes on with what it knows, and puts it right */
    bool there = fl_file_has(vm, region, page) > 0; /* what cannot be told is taken for lost */
    if (!fl_swap_entry(vm, page, &entry, there ? 0 : fl_entry_make(FL_PAGE_LOADING, FL_TIER_ZERO, 0)))
        return;
    if (!there) {
        fl_poison(vm, region, page, entry);
        return;
    }
    log_failure("entry_damaged", page, "the file has the page, and it stays", -EBADMSG);
    fl_count_out(vm, entry);
}

/* Answer one fault. false: not now, keep it. */
static bool answer(struct worker *worker, const struct fault *fault) {
    struct fl_vm *vm = worker->server->vm;
    uint64_t page;
    uint32_t region;
    enum fl_removed removed;
    if (!fl_page_of_address(vm, fault->address, &page, &region)) {
        /* Unmapped or moved since: the waiter looks again by itself. */
        FL_COUNT(vm, stale_messages, 1);
        (void)fl_uffd_wake(vm, fault->address & ~(uint64_t)(FL_PAGE_SIZE - 1), FL_PAGE_SIZE);
        return true;
    }
    fl_entry entry = atomic_load_explicit(fl_slot(vm, page), memory_order_acquire);
    if (!fl_entry_valid(entry)) {
        settle_damaged(vm, region, page, entry, fault->read_ns);
        return false;
    }
    switch (fl_entry_state(entry)) {
    case FL_PAGE_EVICTED:
        removed = fl_removed(vm, page);
        if (removed == FL_REMOVED_SURELY)
            fl_removed_forget_page(vm, page, entry);
        if (removed == FL_REMOVED_SURELY || (removed == FL_REMOVED_PERHAPS && fl_now() - fault->read_ns < ZAP_NS))
            return false; /* now it is a hole like any other; or it is known in a moment */
        if (!load(worker, fault, region, page, entry, removed))
            return false;
        if (fault->kind != FAULT_MISSING)
            atomic_fetch_add_explicit(&worker->server->late, 1, memory_order_relaxed);
        return true;
    case FL_PAGE_FREEZING:
    case FL_PAGE_RESIDENT:
        return settle_resident(worker, fault, region, page, entry);
    case FL_PAGE_POISONED:
        return repoison(vm, region, page);
    case FL_PAGE_PUNCHING:
    case FL_PAGE_LOADING:
    case FL_PAGE_BUSY:
        return false; /* its owner needs microseconds; look again */
    }
    return true;
}

static void answer_pending(struct worker *worker) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < worker->pending_count; i++) {
        if (!answer(worker, &worker->pending[i]))
            worker->pending[kept++] = worker->pending[i];
    }
    worker->pending_count = kept;
    if (worker->overflowed && kept < PENDING / 2) {
        worker->overflowed = false;
        fl_regions_wake(worker->server->vm);
    }
}

static enum fault_kind kind_of(uint64_t flags) {
    if (flags & (UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_RWP))
        return FAULT_PROTECTED;
    return flags & UFFD_PAGEFAULT_FLAG_MINOR ? FAULT_MINOR : FAULT_MISSING;
}

static void call_helpers(struct fl_fault_server *server) {
    uint64_t one = 1;
    if (server->count > 1 && write(server->help_event, &one, sizeof(one)) < 0)
        fl_log(FL_LOG_DEBUG, "helpers_not_called", "\"errno\":%d", errno);
}

/* Of what may be all of the VMM's memory: others answer faults meanwhile, if there are any. */
static void forget(struct worker *worker, uint32_t place) {
    uint64_t called_ns = fl_now();
    while (fl_removed_forget(worker->server->vm, place)) {
        if (fl_now() - called_ns > FORGET_ALONE_NS) {
            call_helpers(worker->server);
            called_ns = fl_now();
        }
    }
}

/*
 * Read what is there, act on events at once (COPY answers EAGAIN until they are read), queue faults. The kernel hands
 * out faults before events, so reading must go on however many faults wait already: they wait for the event behind them.
 */
static int read_messages(struct worker *worker) {
    struct fl_fault_server *server = worker->server;
    struct fl_vm *vm = server->vm;
    pthread_mutex_lock(&server->order);
    fl_removed_reading(vm);
    ssize_t bytes = read(vm->uffd, worker->messages, sizeof(worker->messages));
    if (bytes < 0) {
        int error = errno;
        fl_removed_was_read(vm);
        pthread_mutex_unlock(&server->order);
        return error == EAGAIN || error == EINTR ? 0 : -error;
    }
    uint64_t now = fl_now();
    uint32_t count = (uint32_t)((size_t)bytes / sizeof(worker->messages[0]));
    for (uint32_t i = 0; i < count; i++) {
        const struct uffd_msg *message = &worker->messages[i];
        if (message->event != UFFD_EVENT_PAGEFAULT) {
            fl_removed_note(vm, worker->first_note + i, fl_event(vm, message));
            continue;
        }
        if (worker->pending_count == PENDING) {
            worker->overflowed = true;
            continue;
        }
        worker->pending[worker->pending_count++] = (struct fault){
            .address = message->arg.pagefault.address,
            .read_ns = now,
            .kind = kind_of(message->arg.pagefault.flags),
        };
    }
    fl_removed_was_read(vm);
    pthread_mutex_unlock(&server->order);
    /* Who freed goes on as soon as his message has been read: all of them are known before the first is acted on. */
    for (uint32_t i = 0; i < count; i++)
        forget(worker, worker->first_note + i);
    return (int)count;
}

static int take_messages(struct worker *worker) {
    atomic_fetch_add(&worker->batches, 1);
    int taken = read_messages(worker);
    atomic_fetch_add(&worker->batches, 1);
    return taken;
}

static bool leads(const struct worker *worker) {
    return worker == worker->server->workers;
}

static void wait_for_work(struct worker *worker) {
    struct epoll_event event;
    uint64_t calls;
    (void)epoll_wait(worker->epoll, &event, 1, leads(worker) ? LEADER_WAIT_MS : HELPER_WAIT_MS);
    /* A helper takes the call before it reads: a call that comes meanwhile brings it back. */
    if (!leads(worker) && read(worker->server->help_event, &calls, sizeof(calls)) < 0 && errno != EAGAIN)
        fl_log(FL_LOG_DEBUG, "help_event_unread", "\"errno\":%d", errno);
}

/* What reading the event of a fork takes. It stays to be read. */
static bool is_shortage(int error) {
    return error == -EMFILE || error == -ENFILE || error == -ENOMEM;
}

/* Outside of the batch: who waits for the events that were read must not wait for this. Said ever more seldom. */
static void wait_out_shortage(struct worker *worker, int error) {
    uint64_t times = ++worker->shortages;
    if (fl_log_worth(times))
        fl_log_text(
            FL_LOG_ERROR, "event_not_read",
            "read of the userfaultfd of process %d, %llu times: %s; it has forked, and no touch is answered until "
            "that can be read: raise the limit of open files, free memory",
            worker->server->vm->pid, (unsigned long long)times, strerror(-error));
    fl_sleep_ns(EVENT_PAUSE_NS);
}

static void *serve(void *argument) {
    struct worker *worker = argument;
    struct fl_vm *vm = worker->server->vm;
    uint32_t spins = 0;
    while (!atomic_load_explicit(&vm->gone, memory_order_relaxed)) {
        int taken = take_messages(worker);
        if (is_shortage(taken)) {
            wait_out_shortage(worker, taken);
            taken = 0;
        } else {
            worker->shortages = 0;
        }
        if (taken < 0) {
            if (taken != -ESRCH)
                fl_log_text(FL_LOG_ERROR, "uffd_read_failed", "read of the userfaultfd of process %d: %s", vm->pid,
                            strerror(-taken));
            atomic_store(&vm->gone, 1);
            break;
        }
        if (taken == MESSAGES)
            call_helpers(worker->server);
        /* So many are mostly waiting for an event that is behind others: on to it, before trying them all again. */
        if (taken == MESSAGES && worker->pending_count >= MANY_PENDING)
            continue;
        answer_pending(worker);
        if (worker->pending_count) {
            /* After an event the address space settles for a moment only, if the VMM frees memory page by page: no sleep. */
            if (taken)
                spins = 0;
            if (++spins < SPINS_BEFORE_SLEEP)
                sched_yield();
            else
                fl_sleep_ns(50 * FL_NS_PER_US);
            continue;
        }
        spins = 0;
        if (taken)
            continue;
        if (atomic_load(&worker->server->stopping))
            break;
        wait_for_work(worker);
    }
    return NULL;
}

static int watch(int epoll, int fd) {
    struct epoll_event readable = {.events = EPOLLIN};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &readable) ? -errno : 0;
}

static int worker_start(struct fl_fault_server *server, struct worker *worker) {
    memset(worker, 0, sizeof(*worker));
    worker->server = server;
    worker->first_note = (uint32_t)(worker - server->workers) * MESSAGES;
    worker->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (worker->epoll < 0)
        return -errno;
    int error = watch(worker->epoll, leads(worker) ? server->vm->uffd : server->help_event);
    if (!error)
        error = watch(worker->epoll, server->stop_event);
    if (!error)
        error = -pthread_create(&worker->thread, NULL, serve, worker);
    if (error)
        close(worker->epoll);
    return error;
}

int fl_fault_start(struct fl_vm *vm, uint32_t threads, struct fl_fault_server **out) {
    if (threads == 0 || threads > FL_FAULT_THREADS_MAX)
        return -EINVAL;
    struct fl_fault_server *server = calloc(1, sizeof(*server));
    if (!server)
        return -ENOMEM;
    server->vm = vm;
    pthread_mutex_init(&server->order, NULL);
    server->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    server->help_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    server->workers = aligned_alloc(64, threads * sizeof(*server->workers));
    int error = server->stop_event < 0 || server->help_event < 0 ? -EMFILE : server->workers ? 0 : -ENOMEM;
    while (!error && server->count < threads) {
        error = worker_start(server, &server->workers[server->count]);
        if (!error)
            server->count++;
    }
    if (error) {
        fl_fault_stop(server);
        return error;
    }
    *out = server;
    return 0;
}

void fl_fault_quiesce(struct fl_fault_server *server) {
    for (uint32_t i = 0; i < server->count; i++) {
        uint64_t seen = atomic_load(&server->workers[i].batches);
        while (seen & 1 && atomic_load(&server->workers[i].batches) == seen)
            sched_yield();
    }
}

void fl_fault_end_zap(struct fl_fault_server *server, bool made) {
    fl_fault_quiesce(server); /* its own event is known */
    fl_zap_unmark(server->vm);
    fl_fault_quiesce(server); /* who saw the mark has noted what it put off */
    fl_zap_decide(server->vm, made);
}

uint64_t fl_fault_late(const struct fl_fault_server *server) {
    return atomic_load_explicit(&server->late, memory_order_relaxed);
}

void fl_fault_stop(struct fl_fault_server *server) {
    uint64_t one = 1;
    atomic_store(&server->stopping, true);
    if (server->stop_event >= 0 && write(server->stop_event, &one, sizeof(one)) < 0)
        fl_log(FL_LOG_WARNING, "fault_stop_late", "\"errno\":%d", errno);
    for (uint32_t i = 0; i < server->count; i++) {
        pthread_join(server->workers[i].thread, NULL);
        close(server->workers[i].epoll);
    }
    if (server->stop_event >= 0)
        close(server->stop_event);
    if (server->help_event >= 0)
        close(server->help_event);
    pthread_mutex_destroy(&server->order);
    free(server->workers);
    free(server);
}
