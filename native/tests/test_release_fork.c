/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The userfaultfd of a forked child is the pager's alone and dies with it: a release is refused, or held, until what is away has
 * been brought back and the child let go. The child here is only a descriptor, so that it waits for as long as the test wants.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/control.h"
#include "pager/mover.h"
#include "pager/serve.h"
#include "served_vm.h"
#include "swap/fault.h"
#include "victim.h"

#define PAGES 64u
#define SECONDS 20u

static struct fl_vm vm;
static struct fl_mover *mover;
static int listener;
static _Atomic(int) ended = -1;

static void *control(void *unused) {
    (void)unused;
    int end = (int)fl_control_run(&vm, mover, listener, -1);
    atomic_store(&ended, end);
    return NULL;
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    struct fl_options options = {.fault_threads = 1, .scan_interval_ms = 3600000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    struct fl_fault_server *faults;
    pthread_t thread;
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-fork-%d.sock", (int)getpid());
    fl_log_setup(FL_LOG_ERROR, 0);
    struct victim victim = victim_start(PAGES, 0, seed);
    options.vmm_pid = (int)victim.pid;
    CHECK(fl_tracker_list_parse("zap", &options.trackers), "tracker");
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    evict_first(&vm, PAGES);
    atomic_store(&vm.forks[FL_FORKS_MAX - 1], eventfd(0, EFD_CLOEXEC));
    CHECK(fl_fault_start(&vm, 1, &faults) == 0, "fault thread");
    CHECK(fl_mover_start(&vm, faults, &options, &mover) == 0, "mover");
    CHECK((listener = fl_control_listen(socket_path)) >= 0, "socket");
    CHECK(pthread_create(&thread, NULL, control, NULL) == 0, "thread");

    /* By a command: refused, with a reason. */
    struct fl_pager *connection = pager_connect(socket_path, SECONDS);
    struct fl_reply reply = pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_RELEASE});
    CHECK(reply.error == -EBUSY && strstr(reply.detail, "forked"), "release answered %d: %s", reply.error,
          reply.detail);
    fl_pager_close(connection);

    /* By a signal: held, and done when everything is back. */
    fl_mover_release(mover);
    sleep_ms(1500);
    CHECK(atomic_load(&ended) < 0, "released while a child waits");
    atomic_store(&vm.vault.header->unsafe, FL_REFUSAL_OTHER_MAPPER); /* as the fork's event does */
    fl_mover_wake(mover);
    for (unsigned i = 0; i < SECONDS * 1000 && atomic_load(&ended) < 0; i++)
        sleep_ms(1);
    CHECK(atomic_load(&ended) == FL_MOVER_RELEASED, "end %d", atomic_load(&ended));
    CHECK(FL_READ(&vm, evicted_pages) == 0 && !fl_forks_wait(&vm), "released before the child was let go");
    pthread_join(thread, NULL);
    fl_mover_join(mover);
    kill(victim.pid, SIGKILL);
    fl_fault_stop(faults);
    (void)unlink(socket_path);
    close(listener);
    fl_serve_close(&vm);
    return 0;
}
