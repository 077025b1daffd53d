/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs of the gate in a process, whatever its main thread is doing: the calls are made, their results come back, and
 * the thread notices nothing. Runs that are not possible just now are refused without harm, and possible later.
 */
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach_target.h"

#define TIMEOUT_NS 2000000000u

struct attached {
    struct target target;
    struct fl_attachment made;
    int vault;
    void *local;
    struct fl_gate *gate;
};

static struct attached attach(enum target_mode mode) {
    struct attached at = {.target = target_start(mode, NULL, NULL, NULL), .vault = target_vault()};
    struct fl_refused why;
    int error = -1;
    for (int i = 0; i < 20 && error; i++) {
        error = fl_attach(at.target.pid, at.vault, TARGET_GATE_OFFSET, &at.made, &why);
    }
    MUST(error == 0, "%s", why.detail);
    at.local = mmap(NULL, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, at.vault, TARGET_GATE_OFFSET);
    MUST(at.local != MAP_FAILED && fl_gate_open(at.target.pid, at.local, &at.made, &at.gate) == 0, "open the gate");
    return at;
}

static void detach(struct attached *at) {
    struct fl_refused why;
    fl_gate_close(at->gate);
    int error = -1;
    for (int i = 0; i < 20 && error; i++) {
        error = fl_attach_undo(at->target.pid, &at->made, -1, &why);
    }
    MUST(error == 0, "%s", why.detail);
    target_lives(&at->target, 3);
    target_end(&at->target);
    munmap(at->local, FL_GATE_BYTES);
    close(at->vault);
}

static int run_patiently(struct fl_gate *gate, struct fl_gate_call *calls, uint32_t count, uint64_t *stop_ns,
                         uint64_t *busy_ns) {
    int error = -EBUSY;
    for (int i = 0; i < 500 && error == -EBUSY; i++) {
        error = fl_gate_run(gate, calls, count, TIMEOUT_NS, stop_ns, busy_ns);
        if (error == -EBUSY) {
            target_pause_us(2000);
        }
    }
    return error;
}

static void runs_in(struct attached *at, enum target_mode mode, unsigned rounds) {
    uint64_t stop_ns = 0;
    uint64_t busy_ns = 0;
    uint64_t stop_sum = 0;
    uint64_t random = 42;
    target_set_mode(&at->target, mode);
    for (unsigned i = 0; i < rounds; i++) {
        struct fl_gate_call calls[FL_GATE_CALLS_MAX];
        uint32_t count = 1 + (uint32_t)(target_random(&random) % FL_GATE_CALLS_MAX);
        for (uint32_t k = 0; k < count; k++) {
            calls[k] = k % 3 == 0   ? (struct fl_gate_call){.nr = SYS_getpid}
                       : k % 3 == 1 ? (struct fl_gate_call){.nr = SYS_close, .args = {(uint64_t)-1}}
                                    : (struct fl_gate_call){.nr = SYS_mmap, /* all six arguments arrive */
                                                            .args = {at->target.memory, 4096, PROT_READ | PROT_WRITE,
                                                                     MAP_SHARED | MAP_FIXED_NOREPLACE,
                                                                     (uint64_t)at->made.vmm_vault, 0}};
        }
        int error = run_patiently(at->gate, calls, count, &stop_ns, &busy_ns);
        MUST(error == 0, "%s round %u: %s", target_mode_name(mode), i, strerror(-error));
        MUST(stop_ns > 0 && busy_ns >= stop_ns, "stopped %llu, busy %llu", (unsigned long long)stop_ns,
             (unsigned long long)busy_ns);
        for (uint32_t k = 0; k < count; k++) {
            int64_t expected = k % 3 == 0 ? at->target.pid : k % 3 == 1 ? -EBADF : -EEXIST;
            MUST(calls[k].result == expected, "call %u: %lld", k, (long long)calls[k].result);
        }
        stop_sum += stop_ns;
        target_is_well(&at->target);
    }
    target_lives(&at->target, 3);
    printf("%-8s %u runs, stopped for %llu us on average\n", target_mode_name(mode), rounds,
           (unsigned long long)(stop_sum / rounds / 1000));
}

/* Dropped page table entries come back by themselves: memory is shared. */
static void drops_memory(struct attached *at) {
    struct fl_gate_call call = {.nr = SYS_madvise, .args = {at->target.memory, at->target.bytes, MADV_DONTNEED}};
    MUST(run_patiently(at->gate, &call, 1, NULL, NULL) == 0 && call.result == 0, "madvise: %lld",
         (long long)call.result);
    char path[64];
    uint64_t entry = 0;
    snprintf(path, sizeof(path), "/proc/%d/pagemap", at->target.pid);
    FILE *pagemap = fopen(path, "re");
    MUST(pagemap && fseeko(pagemap, (off_t)(at->target.memory / 4096 * 8), SEEK_SET) == 0 &&
             fread(&entry, sizeof(entry), 1, pagemap) == 1,
         "pagemap");
    fclose(pagemap);
    MUST(!(entry >> 63), "the page is still mapped");
}

static void bad_input(struct attached *at) {
    struct fl_gate_call calls[FL_GATE_CALLS_MAX + 1] = {{0}};
    struct fl_attachment stale = at->made;
    struct fl_gate *gate = NULL;
    static char other[FL_GATE_BYTES];
    MUST(fl_gate_run(at->gate, calls, 0, TIMEOUT_NS, NULL, NULL) == -EINVAL, "no call");
    MUST(fl_gate_run(at->gate, calls, FL_GATE_CALLS_MAX + 1, TIMEOUT_NS, NULL, NULL) == -EINVAL, "too many");
    stale.start_time_ticks++;
    MUST(fl_gate_open(at->target.pid, at->local, &stale, &gate) == -ESTALE, "another process");
    MUST(fl_gate_open(at->target.pid, other, &at->made, &gate) == -EPROTO, "another gate's code");
}

static bool is_under_way(const struct attached *at) {
    const char *data = (const char *)at->local + FL_GATE_CODE_BYTES;
    bool running = false;
    for (size_t i = 0; i < FL_GATE_SLOTS; i++) {
        const struct fl_gate_slot *slot = (const void *)(data + i * FL_GATE_SLOT_BYTES);
        running |= __atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) == FL_GATE_RUNNING;
    }
    return running;
}

static void wait_under_way(const struct attached *at, bool wanted) {
    for (int i = 0; i < 20000 && is_under_way(at) != wanted; i++) {
        target_pause_us(1000);
    }
    MUST(is_under_way(at) == wanted, "the call %s", wanted ? "is not made" : "does not end");
}

/* A call that outlasts its time, and ends when we say so: handed over, so it is made; until then the gate is busy. */
static void slow_call(struct attached *at) {
    uint32_t *held = (uint32_t *)(void *)((char *)at->local + FL_GATE_BYTES - sizeof(*held));
    __atomic_store_n(held, 1, __ATOMIC_SEQ_CST);
    uint64_t held_address = at->made.gate_data + FL_GATE_DATA_BYTES - sizeof(*held);
    struct fl_gate_call call = {.nr = SYS_futex, .args = {held_address, FUTEX_WAIT, 1}};
    int error = -EBUSY;
    for (int i = 0; i < 500 && error == -EBUSY; i++) {
        error = fl_gate_run(at->gate, &call, 1, 50000000, NULL, NULL);
    }
    MUST(error == -ETIMEDOUT, "slow call: %d", error);
    wait_under_way(at, true); /* the thread may have got no CPU so far, and then it could still be cancelled */
    call = (struct fl_gate_call){.nr = SYS_getpid};
    error = fl_gate_run(at->gate, &call, 1, TIMEOUT_NS, NULL, NULL);
    MUST(error == -EBUSY && !fl_gate_cancel(at->local), "while it is made: %d", error);
    __atomic_store_n(held, 0, __ATOMIC_SEQ_CST);
    MUST(syscall(SYS_futex, held, FUTEX_WAKE, 1) >= 0, "futex: %s", strerror(errno));
    wait_under_way(at, false);
    MUST(fl_gate_cancel(at->local), "under way after it");
    error = run_patiently(at->gate, &call, 1, NULL, NULL);
    MUST(error == 0 && call.result == at->target.pid, "after it: %d", error);
    target_lives(&at->target, 3);
}

static int refuse(void *asked) {
    ++*(unsigned *)asked;
    return -ECANCELED;
}

/* The last moment to say no: the thread has stopped, and goes on as if nothing had been. */
static void guarded(struct attached *at) {
    struct fl_gate_call call = {.nr = SYS_getpid, .result = 7};
    unsigned asked = 0;
    fl_gate_guard(at->gate, refuse, &asked);
    int error = run_patiently(at->gate, &call, 1, NULL, NULL);
    MUST(error == -ECANCELED && asked == 1 && call.result == 7, "guarded: %d, asked %u times", error, asked);
    fl_gate_guard(at->gate, NULL, NULL);
    error = run_patiently(at->gate, &call, 1, NULL, NULL);
    MUST(error == 0 && call.result == at->target.pid, "not guarded any more: %d", error);
    target_lives(&at->target, 3);
}

static void paused_by_signal(struct attached *at) {
    struct fl_gate_call call = {.nr = SYS_getpid};
    target_stop(&at->target);
    uint64_t rounds = atomic_load(&at->target.shared->rounds);
    int error = fl_gate_run(at->gate, &call, 1, TIMEOUT_NS, NULL, NULL);
    MUST(error == -EBUSY, "paused: %d", error);
    target_pause_us(50000);
    MUST(atomic_load(&at->target.shared->rounds) == rounds, "it is not paused any more");
    kill(at->target.pid, SIGCONT);
    error = run_patiently(at->gate, &call, 1, NULL, NULL);
    MUST(error == 0 && call.result == at->target.pid, "resumed: %d", error);
    target_lives(&at->target, 3);
}

static void traced_by_another(struct attached *at) {
    struct fl_gate_call call = {.nr = SYS_getpid};
    int ready[2];
    char byte = 0;
    MUST(pipe(ready) == 0, "pipe");
    pid_t tracer = fork();
    if (tracer == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        byte = ptrace(PTRACE_SEIZE, at->target.pid, 0, 0) == 0;
        if (write(ready[1], &byte, 1) != 1) {
            _exit(1);
        }
        pause();
    }
    MUST(read(ready[0], &byte, 1) == 1 && byte, "the other tracer");
    int error = fl_gate_run(at->gate, &call, 1, TIMEOUT_NS, NULL, NULL);
    MUST(error == -EBUSY, "traced: %d", error);
    kill(tracer, SIGKILL);
    waitpid(tracer, NULL, 0);
    close(ready[0]);
    close(ready[1]);
    error = run_patiently(at->gate, &call, 1, NULL, NULL);
    MUST(error == 0, "not traced any more: %d", error);
}

/* What a pager killed between preparing a slot and entering it leaves behind costs one slot, not the gate. */
static void abandoned_slots(struct attached *at) {
    struct fl_gate_call call = {.nr = SYS_getpid};
    char *data = (char *)at->local + FL_GATE_CODE_BYTES;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    for (size_t i = 0; i < FL_GATE_SLOTS; i++) {
        struct fl_gate_slot *slot = (struct fl_gate_slot *)(void *)(data + i * FL_GATE_SLOT_BYTES);
        slot->state = i + 1 < FL_GATE_SLOTS ? FL_GATE_PREPARED : FL_GATE_FREE;
        slot->prepared_at_ns = now_ns;
    }
    ((struct fl_gate_slot *)(void *)data)->count = 1;
    MUST(fl_gate_cancel(at->local) && ((struct fl_gate_slot *)(void *)data)->count == 0, "prepared, and not cancelled");
    MUST(run_patiently(at->gate, &call, 1, NULL, NULL) == 0, "one slot is left");
    struct fl_gate_slot *last = (struct fl_gate_slot *)(void *)(data + (FL_GATE_SLOTS - 1) * FL_GATE_SLOT_BYTES);
    last->state = FL_GATE_PREPARED;
    MUST(fl_gate_run(at->gate, &call, 1, TIMEOUT_NS, NULL, NULL) == -EBUSY, "no slot is left");
    last->prepared_at_ns = now_ns > 61000000000u ? now_ns - 61000000000u : 0;
    if (now_ns > 61000000000u) {
        MUST(run_patiently(at->gate, &call, 1, NULL, NULL) == 0, "an old one is used again");
    }
    memset(data, 0, FL_GATE_DATA_BYTES);
}

struct caller {
    struct attached *at;
    unsigned runs;
};

static void *call_often(void *argument) {
    struct caller *caller = argument;
    for (unsigned i = 0; i < caller->runs; i++) {
        struct fl_gate_call call = {.nr = SYS_getpid};
        int error = run_patiently(caller->at->gate, &call, 1, NULL, NULL);
        MUST(error == 0 && call.result == caller->at->target.pid, "beside each other: %d", error);
    }
    return NULL;
}

static void callers_beside_each_other(struct attached *at) {
    pthread_t threads[3];
    struct caller caller = {.at = at, .runs = target_rounds(60, 10)};
    for (size_t i = 0; i < 3; i++) {
        MUST(pthread_create(&threads[i], NULL, call_often, &caller) == 0, "thread");
    }
    for (size_t i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
    }
}

static void ended(void) {
    struct attached at = attach(TARGET_SPIN);
    struct fl_gate_call call = {.nr = SYS_getpid};
    target_end(&at.target);
    MUST(fl_gate_run(at.gate, &call, 1, TIMEOUT_NS, NULL, NULL) == -ESRCH, "the process has ended");
    fl_gate_close(at.gate);
    munmap(at.local, FL_GATE_BYTES);
    close(at.vault);
}

int main(void) {
    target_need_root();
    struct attached at = attach(TARGET_PPOLL);
    unsigned rounds = target_rounds(100, 12);
    for (int mode = 0; mode < TARGET_MODES; mode++) {
        runs_in(&at, mode, rounds);
    }
    target_is_signalled(&at.target);
    drops_memory(&at);
    bad_input(&at);
    target_set_mode(&at.target, TARGET_SLEEP);
    slow_call(&at);
    guarded(&at);
    paused_by_signal(&at);
    traced_by_another(&at);
    abandoned_slots(&at);
    target_set_mode(&at.target, TARGET_SIGNALS);
    callers_beside_each_other(&at);
    detach(&at);
    ended();
    return 0;
}
