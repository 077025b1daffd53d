/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pager that the host gives too little: no descriptor for the event of a fork, and no memory for threads. It waits and says so,
 * or ends and lets the next one serve; nobody reads a wrong byte either way.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "base/clock.h"
#include "pager/serve.h"
#include "victim.h"

#define PAGES 1024u
#define STACK_BYTES (UINT64_C(1) << 46) /* of each thread; there is not so much address space */

#ifndef __has_feature
#define __has_feature(name) 0
#endif
#define UNDER_TSAN __has_feature(thread_sanitizer)

static char socket_path[64];
static int log_fd;

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4;
}

static bool none_away(const struct fl_status *status) {
    return status->evicted_pages == 0;
}

/* How often it is in what pagers have logged so far. */
static unsigned logged(const char *event) {
    static char text[1 << 20];
    ssize_t length = pread(log_fd, text, sizeof(text) - 1, 0);
    unsigned count = 0;
    text[length > 0 ? length : 0] = '\0';
    for (const char *at = text; (at = strstr(at, event)); at++)
        count++;
    return count;
}

static void wait_logged(const char *event, unsigned times, unsigned seconds) {
    for (unsigned i = 0; i < seconds * 100 && logged(event) < times; i++)
        sleep_ms(10);
    CHECK(logged(event) >= times, "%s logged %u times in %u s", event, logged(event), seconds);
}

/* A pager whose log is kept, under a limit. */
static pid_t start_logged(const struct victim *victim, int resource, const struct rlimit *limit) {
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "warning", NULL};
    struct rlimit before;
    int own = dup(STDERR_FILENO);
    CHECK(own >= 0 && dup2(log_fd, STDERR_FILENO) >= 0, "dup: %s", strerror(errno));
    CHECK(getrlimit((unsigned)resource, &before) == 0, "getrlimit");
    CHECK(!limit || setrlimit((unsigned)resource, limit) == 0, "setrlimit: %s", strerror(errno));
    pid_t pager = pager_start(victim, socket_path, more);
    CHECK(setrlimit((unsigned)resource, &before) == 0, "setrlimit: %s", strerror(errno));
    CHECK(dup2(own, STDERR_FILENO) >= 0, "dup: %s", strerror(errno));
    close(own);
    return pager;
}

static void allow(uint64_t pages) {
    struct fl_pager *connection = pager_connect(socket_path, 10);
    struct fl_reply reply = pager_budget(connection, pages * 4096ull, 600);
    CHECK(reply.error == 0, "budget: %s", reply.detail);
    fl_pager_close(connection);
}

/* Each of two threads tries ten times a second, and says so at the first time and whenever it has been twice as often. */
static unsigned lines_allowed(uint64_t ns) {
    unsigned lines = 4;
    for (uint64_t tries = ns / (100 * FL_NS_PER_MS); tries > 1; tries /= 2)
        lines += 2;
    return lines;
}

/* It forks while the pager may open nothing more: who waits does so until the event can be read, and the pager stays. */
static void event_of_a_fork(struct victim *victim, pid_t pager) {
    struct rlimit before, none = {.rlim_cur = 0};
    CHECK(prlimit(pager, RLIMIT_NOFILE, NULL, &before) == 0, "prlimit: %s", strerror(errno));
    none.rlim_max = before.rlim_max;
    CHECK(prlimit(pager, RLIMIT_NOFILE, &none, NULL) == 0, "prlimit: %s", strerror(errno));
    victim_hold(victim, true);
    uint64_t start_ns = fl_now();
    victim_ask(victim, VICTIM_FORK, 0, 0);
    wait_logged("event_not_read", 2, 10);
    sleep_ms(1000);
    unsigned lines = logged("event_not_read");
    uint64_t took_ns = fl_now() - start_ns;
    CHECK(lines <= lines_allowed(took_ns), "%u lines in %llu ms", lines, (unsigned long long)(took_ns / FL_NS_PER_MS));
    CHECK(atomic_load(&victim->shared->order) == VICTIM_FORK, "the fork's event was not needed");
    CHECK(kill(pager, 0) == 0 && logged("uffd_read_failed") == 0, "the pager has given up");
    CHECK(prlimit(pager, RLIMIT_NOFILE, &before, NULL) == 0, "prlimit: %s", strerror(errno));
    victim_wait(victim, 60);
    victim_hold(victim, false);
    CHECK(atomic_load(&victim->shared->errors) == 0, "the child read page %llu wrong",
          (unsigned long long)victim->shared->first_error - 1);
    wait_until(victim, nearly_all_away, 60, "evicting again after the child has ended");
}

/* A new pager for what one has left behind, and it cannot start a thread: it ends, and the next one serves. */
static pid_t no_threads(struct victim *victim) {
    const struct rlimit stack = {.rlim_cur = STACK_BYTES, .rlim_max = RLIM_INFINITY};
    pid_t pager = start_logged(victim, RLIMIT_STACK, &stack);
    CHECK(pager_wait(pager, 20) == FL_EXIT_FAILED, "exit code");
    CHECK(logged("no_fault_threads") == 1, "it does not say why");
    CHECK(access(socket_path, F_OK) != 0, "it has left its socket");
    return start_logged(victim, RLIMIT_STACK, NULL);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-limits-%d.sock", (int)getpid());
    log_fd = memfd_create("log", MFD_CLOEXEC);
    CHECK(log_fd >= 0, "memfd: %s", strerror(errno));
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->hot_pages = 64;
    pid_t pager = start_logged(&victim, RLIMIT_NOFILE, NULL);
    allow(PAGES);
    wait_until(&victim, nearly_all_away, 30, "three quarters away");
    event_of_a_fork(&victim, pager);
    pager_kill(pager);
    if (UNDER_TSAN) {
        printf("a pager without memory for threads not tried: ThreadSanitizer starts under no such limit\n");
        pager = start_logged(&victim, RLIMIT_STACK, NULL);
    } else {
        pager = no_threads(&victim);
    }
    CHECK(victim_verify(&victim, 30) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    struct fl_pager *connection = pager_connect(socket_path, 10);
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DRAIN}).error == 0, "drain");
    wait_until(&victim, none_away, 30, "drained");
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 30) == FL_EXIT_OK, "exit code");
    CHECK(victim_verify(&victim, 30) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    victim_end(&victim);
    return 0;
}
