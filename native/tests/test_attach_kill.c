/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 of whoever attaches, runs the gate and detaches, at random moments, hundreds of times. The process it does it
 * to never notices, and each successor finds things as they are and goes on.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "attach/arch.h"
#include "attach_target.h"

#define PATIENCE 3000 /* tries, a millisecond or more each */

struct tally {
    _Atomic(uint64_t) attached;
    _Atomic(uint64_t) found;
    _Atomic(uint64_t) runs;
    _Atomic(uint64_t) detached;
    _Atomic(uint64_t) failures;
    char failure[400];
};

static struct tally *tally;

static void failed(const char *what, int error, const char *detail) {
    fprintf(stderr, "%s: %d %s\n", what, error, detail); /* nobody asks the first process at its end */
    if (atomic_fetch_add(&tally->failures, 1) == 0) {
        snprintf(tally->failure, sizeof(tally->failure), "%s: %d %s", what, error, detail);
    }
    _exit(1);
}

/* Another pager may have been killed a moment ago, with its helper still at work: that passes. */
static bool passes(uint32_t refusal) {
    return refusal == FL_REFUSAL_STUCK || refusal == FL_REFUSAL_TRACED || refusal == FL_REFUSAL_ALREADY_SERVED;
}

static void use_gate(const struct target *target, const struct fl_attachment *made, uint64_t *random) {
    struct fl_gate *gate = NULL;
    int vault = -1;
    int error = fl_vmm_open_vault(target->pid, O_RDWR, &vault);
    if (error) {
        failed("open the vault", error, strerror(-error));
    }
    void *local = mmap(NULL, FL_GATE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vault, TARGET_GATE_OFFSET);
    error = fl_gate_open(target->pid, local, made, &gate);
    if (error) {
        failed("open the gate", error, strerror(-error));
    }
    unsigned runs = (unsigned)(target_random(random) % 40);
    for (unsigned i = 0; i < runs; i++) {
        struct fl_gate_call calls[2] = {{.nr = SYS_madvise, .args = {target->memory, 65536, MADV_DONTNEED}},
                                        {.nr = SYS_getpid}};
        error = -EBUSY;
        for (int k = 0; k < PATIENCE && error == -EBUSY; k++) {
            error = fl_gate_run(gate, calls, 2, 2000000000u, NULL, NULL);
            if (error == -EBUSY) {
                target_pause_us(1000);
            }
        }
        if (error || calls[0].result != 0 || calls[1].result != target->pid) {
            failed("run the gate", error, strerror(-error));
        }
        atomic_fetch_add(&tally->runs, 1);
    }
    fl_gate_close(gate);
    munmap(local, FL_GATE_BYTES);
    close(vault);
}

/* Find or make an attachment. */
static void get_attached(const struct target *target, struct fl_attachment *made) {
    struct fl_refused why = {0};
    int error = 0;
    for (int i = 0; i < PATIENCE; i++) {
        error = fl_attach_recover(target->pid, made);
        if (error == 0) {
            atomic_fetch_add(&tally->found, 1);
            return;
        }
        if (error == -ENOENT) {
            int vault = target_vault();
            error = fl_attach(target->pid, vault, TARGET_GATE_OFFSET, made, &why);
            close(vault);
            if (error == 0) {
                atomic_fetch_add(&tally->attached, 1);
                return;
            }
            if (!passes(why.refusal)) {
                failed("attach", (int)why.refusal, why.detail);
            }
        } else if (error != -ESTALE) {
            failed("recover", error, strerror(-error));
        }
        target_pause_us(1000);
    }
    failed("attach at last", error, why.detail);
}

static char lock_path[64];
static int lock_fd = -1;

static void get_detached(const struct target *target, const struct fl_attachment *made) {
    struct fl_refused why = {0};
    for (int i = 0; i < PATIENCE; i++) {
        if (fl_attach_undo(target->pid, made, lock_fd, &why) == 0) {
            atomic_fetch_add(&tally->detached, 1);
            return;
        }
        if (!passes(why.refusal)) {
            failed("detach", (int)why.refusal, why.detail);
        }
        target_pause_us(1000);
    }
    failed("detach at last", (int)why.refusal, why.detail);
}

/*
 * As pagers do with the vault: a description of its own for each, so that the lock goes with it and with the helper that it
 * left detaching.
 */
static void take_lock(void) {
    lock_fd = open(lock_path, O_RDWR | O_CLOEXEC);
    MUST(lock_fd >= 0 && flock(lock_fd, LOCK_EX) == 0, "lock %s", lock_path);
}

/* Helpers of the dead finish what they do within milliseconds; wait for a moment without one. */
static void settle(const struct target *target) {
    struct fl_attachment found;
    for (int i = 0; i < PATIENCE; i++) {
        char path[64];
        char text[4096] = "";
        snprintf(path, sizeof(path), "/proc/%d/status", target->pid);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        MUST(fd >= 0 && read(fd, text, sizeof(text) - 1) > 0, "status");
        close(fd);
        if (strstr(text, "TracerPid:\t0\n") && fl_attach_recover(target->pid, &found) != -ESTALE) {
            return;
        }
        target_pause_us(1000);
    }
    MUST(false, "somebody stays with the target, or left half of an attachment in it");
}

static _Noreturn void work_until_killed(const struct target *target, uint64_t random) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    take_lock();
    for (;;) {
        struct fl_attachment made;
        get_attached(target, &made);
        use_gate(target, &made, &random);
        if (target_random(&random) % 3) {
            get_detached(target, &made);
        }
    }
}

int main(int argc, char **argv) {
    target_need_root();
    int lock_file = memfd_create("lock", 0);
    snprintf(lock_path, sizeof(lock_path), "/proc/%d/fd/%d", (int)getpid(), lock_file);
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    uint64_t random = seed;
    printf("seed %llu\n", (unsigned long long)seed);
    tally = mmap(NULL, sizeof(*tally), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(tally != MAP_FAILED, "mmap");
    struct target target = target_start(TARGET_SPIN, NULL, NULL, NULL);
    target_lives(&target, 3);
    char *before = target_picture(&target);
    unsigned kills = target_rounds(500, 40);
    for (unsigned i = 0; i < kills; i++) {
        atomic_store(&target.shared->mode, target_random(&random) % TARGET_MODES);
        pid_t worker = fork();
        MUST(worker >= 0, "fork");
        if (worker == 0) {
            work_until_killed(&target, target_random(&random));
        }
        target_pause_us((unsigned)(target_random(&random) % target_rounds(30000, 200000)));
        kill(worker, SIGKILL);
        waitpid(worker, NULL, 0);
        MUST(atomic_load(&tally->failures) == 0, "kill %u: %s", i, tally->failure);
        target_is_well(&target);
    }
    take_lock();
    settle(&target);
    struct fl_attachment made;
    get_attached(&target, &made);
    use_gate(&target, &made, &random);
    get_detached(&target, &made);
    MUST(atomic_load(&tally->failures) == 0, "at the end: %s", tally->failure);
    for (int mode = TARGET_MODES - 1; mode >= 0; mode--) {
        target_set_mode(&target, mode);
    }
    char *after = target_picture(&target);
    MUST(strcmp(before, after) == 0, "before:\n%s\nafter:\n%s", before, after);
    printf("%u kills: %llu attached, %llu found attached, %llu runs, %llu detached\n", kills,
           (unsigned long long)tally->attached, (unsigned long long)tally->found, (unsigned long long)tally->runs,
           (unsigned long long)tally->detached);
    /* Found attached: a worker was killed after it had attached, before it could say so. */
    MUST(tally->attached + tally->found > kills / 20 && tally->runs > kills, "too little was going on");
    free(before);
    free(after);
    target_end(&target);
    return 0;
}
