/* SPDX-License-Identifier: Apache-2.0 */
#include "attach_target.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "slow.h"
#include "target_spin.h"

#define MEMORY_BYTES (4u << 20)
#define STEP_NS 2000000 /* how long the waiting modes wait each time */

static struct target_shared *shared;
static int number_pipe[2];
static _Atomic(uint64_t) next_signal;

const char *target_mode_name(enum target_mode mode) {
    static const char *const names[TARGET_MODES] = {"spin", "ppoll", "sleep", "futex", "read", "signals"};
    return names[mode];
}

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...) {
    if (atomic_fetch_add(&shared->errors, 1) == 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(shared->first_error, sizeof(shared->first_error), format, arguments);
        va_end(arguments);
    }
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void target_pause_us(unsigned us) {
    struct timespec pause = {.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000};
    while (nanosleep(&pause, &pause) && errno == EINTR) {
    }
}

uint64_t target_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33 ^ *state << 31;
}

/* ---- in the target ---------------------------------------------------------------------------------------- */

static void spin_once(uint64_t *random) {
    struct target_spin spin;
    for (size_t i = 0; i < TARGET_SPIN_WORDS; i++) {
        spin.in[i] = target_random(random);
    }
    for (size_t i = 0; i < sizeof(spin.xmm_in) / sizeof(spin.xmm_in[0]); i++) {
        spin.xmm_in[i] = target_random(random);
    }
    spin.flags_in = (target_random(random) & TARGET_SPIN_FLAGS) | 0x202;
    spin.loops = 20000 + target_random(random) % 20000;
    target_spin(&spin);
    if (memcmp(spin.in, spin.out, sizeof(spin.in)) != 0) {
        for (size_t i = 0; i < TARGET_SPIN_WORDS; i++) {
            if (spin.in[i] != spin.out[i]) {
                wrong("register %zu was %llx, is %llx", i, (unsigned long long)spin.in[i],
                      (unsigned long long)spin.out[i]);
            }
        }
    }
    if (memcmp(spin.xmm_in, spin.xmm_out, sizeof(spin.xmm_in)) != 0) {
        wrong("an xmm register has changed");
    }
    if ((spin.flags_in ^ spin.flags_out) & TARGET_SPIN_FLAGS) {
        wrong("flags were %llx, are %llx", (unsigned long long)spin.flags_in, (unsigned long long)spin.flags_out);
    }
    for (size_t i = 0; i < TARGET_SPIN_ZONE; i++) {
        if (spin.zone[i] != spin.in[0]) {
            wrong("word %zu of the red zone has changed", i);
        }
    }
}

static void ppoll_once(void) {
    struct timespec limit = {.tv_nsec = STEP_NS};
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN);
    uint64_t start = now_ns();
    int got = ppoll(NULL, 0, &limit, &mask);
    uint64_t took = now_ns() - start;
    if (got != 0 || took < STEP_NS) {
        wrong("ppoll: %d, errno %d, after %llu ns", got, errno, (unsigned long long)took);
    }
}

static void sleep_once(void) {
    struct timespec limit = {.tv_nsec = STEP_NS};
    uint64_t start = now_ns();
    int got = nanosleep(&limit, NULL);
    uint64_t took = now_ns() - start;
    if (got != 0 || took < STEP_NS) {
        wrong("nanosleep: %d, errno %d, after %llu ns", got, errno, (unsigned long long)took);
    }
}

static void futex_once(void) {
    static uint32_t word = 7;
    struct timespec limit = {.tv_nsec = STEP_NS};
    uint64_t start = now_ns();
    long got = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 7, &limit, NULL, 0);
    uint64_t took = now_ns() - start;
    if (got != -1 || errno != ETIMEDOUT || took < STEP_NS) {
        wrong("futex: %ld, errno %d, after %llu ns", got, errno, (unsigned long long)took);
    }
}

static void read_once(void) {
    static uint64_t expected;
    uint64_t number = 0;
    ssize_t got = read(number_pipe[0], &number, sizeof(number));
    if (got != sizeof(number) || number != expected++) {
        wrong("read: %zd, errno %d, number %llu", got, errno, (unsigned long long)number);
    }
}

static void *write_numbers(void *unused) {
    for (uint64_t number = 0;; number++) {
        struct timespec pause = {.tv_nsec = 500000};
        nanosleep(&pause, NULL);
        if (write(number_pipe[1], &number, sizeof(number)) != sizeof(number)) {
            return unused;
        }
    }
}

static void on_signal(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    uint64_t expected = atomic_fetch_add(&shared->signals, 1);
    if ((uint64_t)(uint32_t)info->si_value.sival_int != (expected & 0xffffffff)) {
        wrong("signal %d came when %llu was due", info->si_value.sival_int, (unsigned long long)expected);
    }
}

/* Queues numbered signals while the mode asks for them, never many at a time. */
static void *send_signals(void *unused) {
    for (;;) {
        struct timespec pause = {.tv_nsec = 200000};
        nanosleep(&pause, NULL);
        uint64_t sent = atomic_load(&next_signal);
        atomic_store(&shared->quieted, atomic_load(&shared->quiet));
        if (!atomic_load(&shared->quieted) && target_sends_signals() && atomic_load(&shared->mode) == TARGET_SIGNALS &&
            sent - atomic_load(&shared->signals) < 16) {
            siginfo_t info = {.si_signo = SIGRTMIN, .si_code = SI_QUEUE};
            info.si_value.sival_int = (int)sent;
            if (syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), SIGRTMIN, &info) == 0) {
                atomic_store(&next_signal, sent + 1);
            }
        }
    }
    return unused;
}

static _Noreturn void be_busy(void) {
    uint64_t random = (uint64_t)getpid();
    pthread_t thread;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pipe(number_pipe) || pthread_create(&thread, NULL, write_numbers, NULL) ||
        pthread_create(&thread, NULL, send_signals, NULL)) {
        _exit(3);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    sigset_t numbered;
    sigemptyset(&numbered);
    sigaddset(&numbered, SIGRTMIN);
    atomic_store(&shared->ready, 1);
    for (uint32_t last = TARGET_MODES;;) {
        uint32_t mode = atomic_load(&shared->mode);
        if (mode != last) { /* the waits are to end by time only */
            sigprocmask(mode == TARGET_SIGNALS ? SIG_UNBLOCK : SIG_BLOCK, &numbered, NULL);
            last = mode;
        }
        switch (mode) {
        case TARGET_PPOLL:
            ppoll_once();
            break;
        case TARGET_SLEEP:
            sleep_once();
            break;
        case TARGET_FUTEX:
            futex_once();
            break;
        case TARGET_READ:
            read_once();
            break;
        default:
            spin_once(&random);
        }
        atomic_fetch_add(&shared->rounds, 1);
    }
}

/* ---- around it -------------------------------------------------------------------------------------------- */

struct target target_start(enum target_mode mode, const char *name, target_setup setup, void *context) {
    struct target target = {.bytes = MEMORY_BYTES};
    target.shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(target.shared != MAP_FAILED, "mmap");
    atomic_store(&target.shared->mode, mode);
    int fd = memfd_create(name ? name : "memory-backend-memfd", MFD_CLOEXEC);
    MUST(fd >= 0 && ftruncate(fd, MEMORY_BYTES) == 0, "memfd");
    /* Mapped by the target alone: the address is handed over in a pipe. */
    int tell[2];
    MUST(pipe(tell) == 0, "pipe");
    fflush(NULL);
    target.pid = fork();
    MUST(target.pid >= 0, "fork");
    if (target.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        shared = target.shared;
        close(tell[0]);
        void *memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED || write(tell[1], &memory, sizeof(memory)) != sizeof(memory)) {
            _exit(2);
        }
        memset(memory, 0x5a, MEMORY_BYTES);
        close(tell[1]);
        if (setup) {
            setup(context);
        }
        be_busy();
    }
    close(fd);
    close(tell[1]);
    MUST(read(tell[0], &target.memory, sizeof(target.memory)) == sizeof(target.memory), "the target did not start");
    close(tell[0]);
    for (int i = 0; i < 5000 && !atomic_load(&target.shared->ready); i++) {
        target_pause_us(1000);
    }
    MUST(atomic_load(&target.shared->ready), "the target did not become ready");
    target_pause_us(20000);
    return target;
}

void target_set_mode(struct target *target, enum target_mode mode) {
    atomic_store(&target->shared->mode, mode);
    target_lives(target, 2);
}

void target_lives(struct target *target, unsigned rounds) {
    uint64_t goal = atomic_load(&target->shared->rounds) + rounds;
    for (int i = 0; i < 20000 && atomic_load(&target->shared->rounds) < goal; i++) {
        MUST(waitpid(target->pid, NULL, WNOHANG) == 0, "the target has ended");
        target_pause_us(1000);
    }
    MUST(atomic_load(&target->shared->rounds) >= goal, "the target does not go on");
    target_is_well(target);
}

void target_is_signalled(struct target *target) {
    for (int i = 0; i < 20000 && target_sends_signals() && !atomic_load(&target->shared->signals); i++) {
        target_pause_us(1000);
    }
    MUST(!target_sends_signals() || atomic_load(&target->shared->signals), "no signal came");
}

void target_stop(struct target *target) {
    int status = 0;
    pid_t stopped = 0;
    MUST(kill(target->pid, SIGSTOP) == 0, "SIGSTOP: %s", strerror(errno));
    for (int i = 0; i < 20000 && stopped == 0; i++) {
        stopped = waitpid(target->pid, &status, WUNTRACED | WNOHANG);
        if (stopped == 0) {
            target_pause_us(1000);
        }
    }
    MUST(stopped == target->pid && WIFSTOPPED(status), "the target does not stop");
}

void target_is_well(struct target *target) {
    uint64_t errors = atomic_load(&target->shared->errors);
    MUST(errors == 0, "the target saw %llu errors, first: %s (mode %s)", (unsigned long long)errors,
         target->shared->first_error, target_mode_name(atomic_load(&target->shared->mode)));
}

void target_end(struct target *target) {
    kill(target->pid, SIGKILL);
    waitpid(target->pid, NULL, 0);
    munmap(target->shared, sizeof(*target->shared));
}

static void append_file(FILE *out, int pid, const char *name, const char *const *only) {
    char path[64];
    char line[1024];
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    FILE *file = fopen(path, "re");
    MUST(file, "%s", path);
    while (fgets(line, sizeof(line), file)) {
        /* A sanitizer's library maps memory of its own whenever it likes; what we map has a name. */
        bool wanted = only == NULL && (!SANITIZED || strchr(line, '/') != NULL);
        for (size_t i = 0; only && only[i]; i++) {
            wanted |= strncmp(line, only[i], strlen(only[i])) == 0;
        }
        if (wanted) {
            fputs(line, out);
        }
    }
    fclose(file);
}

/* While its handler runs, a thread has the signal blocked: no picture of that. */
static void hold_signals(const struct target *target, bool hold) {
    if (atomic_load(&target->shared->mode) != TARGET_SIGNALS)
        return;
    atomic_store(&target->shared->quiet, hold);
    for (int i = 0; i < 20000 && atomic_load(&target->shared->quieted) != hold; i++)
        target_pause_us(1000);
    MUST(atomic_load(&target->shared->quieted) == hold, "the target does not %s sending signals",
         hold ? "stop" : "go on");
    uint64_t goal = atomic_load(&target->shared->rounds) + 2; /* between two rounds all that were sent have come */
    for (int i = 0; i < 20000 && atomic_load(&target->shared->rounds) < goal; i++)
        target_pause_us(1000);
    MUST(atomic_load(&target->shared->rounds) >= goal, "the target does not go on");
}

char *target_picture(const struct target *target) {
    static const char *const status[] = {"TracerPid", "SigBlk", "SigIgn",  "SigCgt",
                                         "Seccomp",   "FDSize", "Threads", NULL};
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    MUST(out, "open_memstream");
    hold_signals(target, true);
    for (int fd = 0; fd < 1024; fd++) {
        char path[64];
        char link[256];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", target->pid, fd);
        ssize_t got = readlink(path, link, sizeof(link) - 1);
        if (got >= 0) {
            link[got] = 0;
            fprintf(out, "fd %d %s\n", fd, link);
        }
    }
    append_file(out, target->pid, "maps", NULL);
    append_file(out, target->pid, "status", status);
    fprintf(out, "policy %d\n", sched_getscheduler(target->pid));
    hold_signals(target, false);
    fclose(out);
    return text;
}

int target_vault(void) {
    int fd = memfd_create(FL_VAULT_MEMFD_NAME, MFD_CLOEXEC);
    MUST(fd >= 0 && ftruncate(fd, TARGET_GATE_OFFSET + FL_GATE_BYTES) == 0, "vault");
    return fd;
}

void target_need_root(void) {
    struct fl_kernel_features features;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (geteuid() != 0) {
        printf("skipped: attaching needs root\n");
        exit(77);
    }
    fl_probe_kernel(&features);
    if (!features.userfaultfd_device && !features.userfaultfd_syscall) {
        printf("skipped: this kernel has no userfaultfd\n");
        exit(77);
    }
}

/* The thread sanitizer takes signals in itself, and hands on one where several of a number have come. */
bool target_sends_signals(void) {
#ifdef FL_SANITIZE_THREAD
    return false;
#else
    return true;
#endif
}

unsigned target_rounds(unsigned plain, unsigned slow) {
    return runs_slowly() ? slow : plain;
}
