/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attach to and detach from a process 200 times, whatever its main thread is doing, and find nothing changed: its
 * registers, waits, signals, descriptors, mappings, scheduling. What was injected works.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach_target.h"
#include "slow.h"

#define STOP_LIMIT_NS 1000000u
#define STUCK_TRIES 100

static uint64_t stops[1024];
static size_t stop_count;

/* A thread that does not get a processor on a busy machine is refused as stuck: the caller's part is to try again. */
static int attach_patiently(int pid, int vault, struct fl_attachment *out, struct fl_refused *why) {
    int error = fl_attach(pid, vault, TARGET_GATE_OFFSET, out, why);
    for (int i = 0; error && why->refusal == FL_REFUSAL_STUCK && i < STUCK_TRIES; i++) {
        error = fl_attach(pid, vault, TARGET_GATE_OFFSET, out, why);
    }
    return error;
}

static int undo_patiently(int pid, const struct fl_attachment *attachment, struct fl_refused *why) {
    int error = fl_attach_undo(pid, attachment, -1, why);
    for (int i = 0; error && why->refusal == FL_REFUSAL_STUCK && i < STUCK_TRIES; i++) {
        error = fl_attach_undo(pid, attachment, -1, why);
    }
    return error;
}

/* The userfaultfd is the target's: it can be registered on its memory, and says so by smaps. */
static void use_uffd(const struct target *target, int uffd) {
    struct uffdio_api api = {.api = UFFD_API};
    MUST(ioctl(uffd, UFFDIO_API, &api) == 0, "UFFDIO_API: %s", strerror(errno));
    struct uffdio_register area = {.range = {.start = target->memory, .len = target->bytes},
                                   .mode = UFFDIO_REGISTER_MODE_MISSING};
    MUST(ioctl(uffd, UFFDIO_REGISTER, &area) == 0, "UFFDIO_REGISTER: %s", strerror(errno));
    MUST(ioctl(uffd, UFFDIO_UNREGISTER, &area.range) == 0, "UFFDIO_UNREGISTER: %s", strerror(errno));
}

static void check_attached(const struct target *target, int vault, const struct fl_attachment *made, bool use) {
    struct fl_attachment found;
    struct fl_inspection *seen = calloc(1, sizeof(*seen));
    int uffd = -1;
    int theirs = -1;
    int again = -1;
    MUST(fl_attach_recover(target->pid, &found) == 0 && found.vmm_uffd == made->vmm_uffd &&
             found.vmm_vault == made->vmm_vault && found.gate_code == made->gate_code &&
             found.gate_data == made->gate_data && found.start_time_ticks == made->start_time_ticks,
         "what is found is not what was made");
    MUST(fl_attach_borrow(target->pid, made, &uffd, &theirs) == 0, "borrow");
    if (use) {
        use_uffd(target, uffd);
    }
    /* The VMM's description of the vault, ours and a new one are three: a lock on one is nobody else's. */
    MUST(flock(theirs, LOCK_EX | LOCK_NB) == 0, "lock on a description of our own");
    MUST(flock(vault, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the pager's own description locks apart");
    MUST(fl_inspect(target->pid, seen) == 0 && seen->refusal == FL_REFUSAL_NONE && seen->has_vault &&
             seen->served_by_pid == (uint32_t)getpid(),
         "seen: %s", seen->detail);
    close(theirs);
    MUST(fl_vmm_open_vault(target->pid, O_RDWR, &again) == 0 && flock(again, LOCK_EX | LOCK_NB) == 0,
         "the lock went with its description");
    close(again);
    close(uffd);
    free(seen);
}

static void rounds_in(struct target *target, enum target_mode mode, unsigned rounds) {
    struct fl_attachment made = {0};
    struct fl_refused why;
    target_set_mode(target, mode);
    char *before = target_picture(target);
    for (unsigned i = 0; i < rounds; i++) {
        int vault = target_vault();
        MUST(attach_patiently(target->pid, vault, &made, &why) == 0, "%s round %u: %s", target_mode_name(mode), i,
             why.detail);
        stops[stop_count++] = made.stop_ns;
        check_attached(target, vault, &made, i % 8 == 0);
        MUST(undo_patiently(target->pid, &made, &why) == 0, "%s round %u: %s", target_mode_name(mode), i, why.detail);
        close(vault);
        target_is_well(target);
    }
    target_lives(target, 3);
    char *after = target_picture(target);
    MUST(strcmp(before, after) == 0, "the target looks different.\nbefore:\n%s\nafter:\n%s", before, after);
    free(before);
    free(after);
}

static void attach_twice(struct target *target) {
    struct fl_attachment made;
    struct fl_attachment second;
    struct fl_refused why;
    int vault = target_vault();
    int other = target_vault();
    MUST(attach_patiently(target->pid, vault, &made, &why) == 0, "%s", why.detail);
    MUST(attach_patiently(target->pid, other, &second, &why) == -EPERM && why.refusal == FL_REFUSAL_ALREADY_SERVED,
         "second: %u %s", why.refusal, why.detail);
    struct fl_attachment stale = made;
    stale.start_time_ticks++;
    MUST(fl_attach_borrow(target->pid, &stale, NULL, NULL) == -ESTALE, "another process' start time");
    MUST(fl_attach_undo(target->pid, &stale, -1, &why) == -EPERM && why.refusal == FL_REFUSAL_GONE, "%s", why.detail);
    stale = made;
    stale.vmm_uffd = made.vmm_vault;
    int fd = -1;
    MUST(fl_attach_borrow(target->pid, &stale, &fd, NULL) == -ESTALE, "a descriptor that is something else");
    MUST(undo_patiently(target->pid, &made, &why) == 0, "%s", why.detail);
    /* Nothing is left to undo, and nothing else is touched. */
    char *before = target_picture(target);
    MUST(undo_patiently(target->pid, &made, &why) == 0, "%s", why.detail);
    char *after = target_picture(target);
    MUST(strcmp(before, after) == 0, "undoing nothing changed something");
    MUST(fl_attach_recover(target->pid, &made) == -ENOENT, "recover");
    free(before);
    free(after);
    close(vault);
    close(other);
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

int main(void) {
    target_need_root();
    struct target target = target_start(TARGET_PPOLL, NULL, NULL, NULL);
    attach_twice(&target);
    unsigned rounds = target_rounds(35, 6);
    for (int mode = 0; mode < TARGET_MODES; mode++) {
        rounds_in(&target, mode, rounds);
    }
    target_is_signalled(&target);
    target_end(&target);
    qsort(stops, stop_count, sizeof(stops[0]), by_size);
    printf("%zu attached: stopped for %llu us in the middle, %llu us at most\n", stop_count,
           (unsigned long long)stops[stop_count / 2] / 1000, (unsigned long long)stops[stop_count - 1] / 1000);
    /* Neighbours that make some of them slow are the machine's; being slow by nature would show every time. */
    MUST(runs_slowly() || stops[stop_count / 2] < STOP_LIMIT_NS, "stops are too long");
    return 0;
}
