/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/gate.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach/inspect.h"
#include "attach/tracee.h"

#define STOP_LIMIT_NS 20000000u /* a main thread that takes longer is busy: come back later */
#define STALE_NS 60000000000u   /* after this, what a dead pager prepared is not entered any more */
#define LOOK_NS 10000u          /* between looks whether the calls have been made */
#define LONG_LOOK_NS 100000u    /* once that takes long */
#define LONG_NS 2000000u
#define ENDED_LOOK_NS 1000000u
#define BARRIER_NS 5000000u
#define WORKER_STACK_BYTES (128 * 1024)

struct fl_gate {
    int pid;
    int pidfd;
    uint64_t code_address; /* in the VMM */
    uint64_t data_address;
    struct fl_gate_slot *slots[FL_GATE_SLOTS]; /* in our mapping */
    int (*still)(void *context);               /* or NULL */
    void *context;
    pthread_mutex_t one_run;
};

/* What one run hands to its tracing thread, and gets back. */
struct gate_run {
    struct fl_gate *gate;
    uint32_t slot;
    int error;
    bool handed_over; /* the calls will be made, unless fl_gate_cancel() is faster */
    uint64_t stopped_at_ns;
    uint64_t let_go_at_ns;
    uint64_t ended_at_ns;
    uint64_t timeout_ns;
};

static bool has_ended(int pidfd) {
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    return poll(&end, 1, 0) > 0;
}

static uint32_t slot_state(const struct fl_gate_slot *slot) {
    return __atomic_load_n(&slot->state, __ATOMIC_ACQUIRE);
}

static void set_slot_state(struct fl_gate_slot *slot, uint32_t state) {
    __atomic_store_n(&slot->state, state, __ATOMIC_RELEASE);
}

static struct fl_gate_slot *slot_of(void *gate_local, uint32_t i) {
    return (void *)((char *)gate_local + FL_GATE_CODE_BYTES + (size_t)i * FL_GATE_SLOT_BYTES);
}

int fl_gate_open(int pid, void *gate_local, const struct fl_attachment *attachment, struct fl_gate **out) {
    size_t length = 0;
    const void *code = fl_arch_gate_code(&length);
    uint64_t started = 0;
    if (memcmp(gate_local, code, length) != 0) {
        return -EPROTO;
    }
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0) {
        return -errno;
    }
    /* With the pidfd open, a start time that fits means that the pid stays the VMM's. */
    int error = fl_proc_start_time(pid, &started);
    if (error == 0 && started != attachment->start_time_ticks) {
        error = -ESTALE;
    }
    struct fl_gate *gate = error ? NULL : calloc(1, sizeof(*gate));
    if (!gate) {
        close(pidfd);
        return error ? error : -ENOMEM;
    }
    gate->pid = pid;
    gate->pidfd = pidfd;
    gate->code_address = attachment->gate_code;
    gate->data_address = attachment->gate_data;
    for (uint32_t i = 0; i < FL_GATE_SLOTS; i++) {
        gate->slots[i] = slot_of(gate_local, i);
    }
    pthread_mutex_init(&gate->one_run, NULL);
    *out = gate;
    return 0;
}

void fl_gate_close(struct fl_gate *gate) {
    if (gate) {
        pthread_mutex_destroy(&gate->one_run);
        close(gate->pidfd);
        free(gate);
    }
}

void fl_gate_guard(struct fl_gate *gate, int (*still)(void *context), void *context) {
    gate->still = still;
    gate->context = context;
}

/* The thread says that it runs, and then looks how many calls there are; we write that, and then look whether it runs. */
bool fl_gate_cancel(void *gate_local) {
    bool prepared = false, running = false;
    for (uint32_t i = 0; i < FL_GATE_SLOTS; i++) {
        struct fl_gate_slot *slot = slot_of(gate_local, i);
        if (slot_state(slot) == FL_GATE_PREPARED) {
            __atomic_store_n(&slot->count, 0, __ATOMIC_SEQ_CST);
            prepared = true;
        }
    }
    if (prepared && syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0)) {
        fl_pause_ns(BARRIER_NS); /* where CPUs run without ticks; long enough for any store to be seen */
    }
    for (uint32_t i = 0; i < FL_GATE_SLOTS; i++) {
        running |= slot_state(slot_of(gate_local, i)) == FL_GATE_RUNNING;
    }
    return !running;
}

/* A slot for the next run. -EBUSY: an earlier run is inside, or all slots are taken. */
static int choose_slot(struct fl_gate *gate, struct gate_run *run) {
    uint64_t now = fl_monotonic_ns();
    int chosen = -EBUSY;
    for (uint32_t i = 0; i < FL_GATE_SLOTS; i++) {
        const struct fl_gate_slot *slot = gate->slots[i];
        bool stale = now - slot->prepared_at_ns > STALE_NS;
        uint32_t state = slot_state(slot);
        if (state == FL_GATE_RUNNING && !stale) {
            return -EBUSY;
        }
        if (chosen < 0 && (state == FL_GATE_FREE || (state == FL_GATE_PREPARED && stale))) {
            chosen = (int)i;
        }
    }
    if (chosen < 0) {
        return chosen;
    }
    run->slot = (uint32_t)chosen;
    return 0;
}

/* The gate puts three words below the red zone of the thread's stack; a signal handler would need room there too. */
static bool stack_is_usable(int pid, const struct fl_registers *registers) {
    uint64_t words[8];
    size_t length = 0;
    uint64_t address = fl_arch_gate_stack(registers, &length);
    struct iovec local = {.iov_base = words, .iov_len = length};
    struct iovec remote = {.iov_base = (void *)address, .iov_len = length};
    return process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)length;
}

/*
 * Whether the VMM has our gate, and our slot in it, where the attachment says. A helper that a dead pager left
 * behind may have detached since: then the thread would be sent nowhere. While we have it stopped, nobody else can.
 */
static bool gate_is_there(const struct fl_gate *gate, uint32_t slot) {
    size_t length = 0;
    const void *code = fl_arch_gate_code(&length);
    struct {
        uint8_t code[FL_GATE_CODE_BYTES];
        uint8_t slot[offsetof(struct fl_gate_slot, calls)];
    } seen;
    uint64_t slot_address = gate->data_address + (uint64_t)slot * FL_GATE_SLOT_BYTES;
    struct iovec local[2] = {{.iov_base = seen.code, .iov_len = length},
                             {.iov_base = seen.slot, .iov_len = sizeof(seen.slot)}};
    struct iovec remote[2] = {{.iov_base = (void *)gate->code_address, .iov_len = length},
                              {.iov_base = (void *)slot_address, .iov_len = sizeof(seen.slot)}};
    return process_vm_readv(gate->pid, local, 2, remote, 2, 0) == (ssize_t)(length + sizeof(seen.slot)) &&
           memcmp(seen.code, code, length) == 0 && memcmp(seen.slot, gate->slots[slot], sizeof(seen.slot)) == 0;
}

/* With the thread stopped. Until fl_arch_set() has happened, nothing has; after it, all that is needed has. */
static int send_in(struct gate_run *run) {
    struct fl_gate *gate = run->gate;
    struct fl_gate_slot *slot = gate->slots[run->slot];
    struct fl_registers registers;
    int error = fl_arch_get(gate->pid, &registers);
    if (error) {
        return error;
    }
    if (fl_arch_pc(&registers) - gate->code_address < FL_GATE_CODE_BYTES || fl_arch_in_rseq(gate->pid, &registers) ||
        !stack_is_usable(gate->pid, &registers)) {
        return -EBUSY;
    }
    fl_arch_gate_enter(&registers, gate->code_address, gate->data_address + (uint64_t)run->slot * FL_GATE_SLOT_BYTES,
                       slot);
    set_slot_state(slot, FL_GATE_PREPARED);
    error = !gate_is_there(gate, run->slot) ? -ESTALE : gate->still ? gate->still(gate->context) : 0;
    if (!error) {
        error = fl_arch_set(gate->pid, &registers);
    }
    if (error) {
        set_slot_state(slot, FL_GATE_FREE);
    }
    return error;
}

static int wait_until_free(struct gate_run *run) {
    const struct fl_gate *gate = run->gate;
    const struct fl_gate_slot *slot = gate->slots[run->slot];
    for (;;) {
        uint32_t state = slot_state(slot);
        run->ended_at_ns = fl_monotonic_ns();
        if (state == FL_GATE_FREE) {
            return 0;
        }
        uint64_t waited = run->ended_at_ns - run->stopped_at_ns;
        if (waited >= run->timeout_ns || waited >= ENDED_LOOK_NS) {
            if (has_ended(gate->pidfd)) {
                return -ESRCH;
            }
            if (waited >= run->timeout_ns) {
                return -ETIMEDOUT;
            }
        }
        fl_pause_ns(waited < LONG_NS ? LOOK_NS : LONG_LOOK_NS);
    }
}

/*
 * A thread of its own, because a tracer can give up on a thread that does not stop only by ending. The kernel then
 * lets the VMM's thread go, whatever state it is in.
 */
static void *trace_one_run(void *argument) {
    struct gate_run *run = argument;
    int pid = run->gate->pid;
    fl_tracee_hurry();
    run->error = fl_tracee_seize(pid);
    if (run->error) {
        run->error = run->error == -EPERM ? -EBUSY : run->error;
        return NULL;
    }
    if (has_ended(run->gate->pidfd)) {
        run->error = -ESRCH;
        return NULL;
    }
    run->error = fl_tracee_stop(pid, STOP_LIMIT_NS);
    if (run->error == -ETIMEDOUT) {
        run->error = -EBUSY;
        return NULL;
    }
    if (run->error == -EAGAIN) {
        run->error = -EBUSY;
        fl_tracee_detach(pid);
        return NULL;
    }
    if (run->error) {
        return NULL;
    }
    run->stopped_at_ns = fl_monotonic_ns();
    run->error = send_in(run);
    run->handed_over = run->error == 0;
    /* Fails when it was killed while it was stopped, and then there is nothing to let go. */
    (void)fl_tracee_detach(pid);
    run->let_go_at_ns = fl_monotonic_ns();
    return NULL;
}

static int run_tracer(struct gate_run *run) {
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    int error = pthread_attr_setstacksize(&attributes, WORKER_STACK_BYTES);
    if (error == 0) {
        error = pthread_create(&thread, &attributes, trace_one_run, run);
    }
    pthread_attr_destroy(&attributes);
    if (error) {
        return -error;
    }
    pthread_join(thread, NULL);
    return run->error;
}

static int run_calls(struct fl_gate *gate, struct fl_gate_call *calls, uint32_t count, uint64_t timeout_ns,
                     uint64_t *stop_ns, uint64_t *busy_ns) {
    struct gate_run run = {.gate = gate, .timeout_ns = timeout_ns};
    int error = choose_slot(gate, &run);
    if (error) {
        return has_ended(gate->pidfd) ? -ESRCH : error;
    }
    struct fl_gate_slot *slot = gate->slots[run.slot];
    memcpy(slot->calls, calls, count * sizeof(calls[0]));
    slot->count = count;
    slot->prepared_at_ns = fl_monotonic_ns();
    error = run_tracer(&run);
    if (run.handed_over) {
        /* Not in the tracing thread: a real-time one that looks again and again would keep the VMM from getting there. */
        error = wait_until_free(&run);
    } else if (error == -ESRCH && !has_ended(gate->pidfd)) {
        error = -EBUSY; /* ptrace says so too of a thread that was not where it should be; only the pidfd knows */
    }
    if (error) {
        return error;
    }
    if (stop_ns) {
        *stop_ns = run.let_go_at_ns - run.stopped_at_ns;
    }
    if (busy_ns) {
        *busy_ns = run.ended_at_ns - run.stopped_at_ns;
    }
    for (uint32_t i = 0; i < count; i++) {
        calls[i].result = slot->calls[i].result;
    }
    return 0;
}

int fl_gate_run(struct fl_gate *gate, struct fl_gate_call *calls, uint32_t count, uint64_t timeout_ns,
                uint64_t *stop_ns, uint64_t *busy_ns) {
    if (count == 0 || count > FL_GATE_CALLS_MAX) {
        return -EINVAL;
    }
    pthread_mutex_lock(&gate->one_run);
    int error = run_calls(gate, calls, count, timeout_ns, stop_ns, busy_ns);
    pthread_mutex_unlock(&gate->one_run);
    return error;
}
