/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Far more threads fault at once than a fault thread keeps in hand, while scans make events that must be read before any
 * of them can be answered: all of them go on, and none reads a wrong byte.
 */

#include "victim.h"

static uint32_t pages; /* 64 MiB, fewer where each takes long */
/* While memory goes away nothing depends on the threads, and so many of them would take the CPUs from the pager. */
#define WAITING_PAUSE_US 20000u

static bool half_is_away(const struct fl_status *status) {
    return status->evicted_pages > pages / 2;
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-many-%d.sock", (int)getpid());
    static const char *const more[] = {"--fault-threads", "1", "--stall-target-permille", "1000", "--log-level",
                                       "warning",         NULL};
    unsigned threads = rounds(200, 100);
    pages = rounds(16384, 2048);
    struct victim victim = victim_start(pages, threads, seed);
    victim.shared->hot_pages = 16;
    victim.shared->pause_us = WAITING_PAUSE_US;
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 20);
    CHECK(pager_budget(connection, (pages - 512) * 4096ull, 600).error == 0, "budget");
    for (unsigned round = 0; round < rounds(4, 2); round++) {
        victim_hold(&victim, true);
        wait_until(&victim, half_is_away, 60, "half of the memory away");
        victim.shared->hot_pages = 0; /* all of them at once, anywhere */
        victim.shared->pause_us = 0;
        victim_hold(&victim, false);
        for (unsigned i = 0; i < rounds(10, 5); i++) {
            uint64_t touched = atomic_load(&victim.shared->touches);
            for (unsigned k = 0; k < 200 && atomic_load(&victim.shared->touches) < touched + threads; k++)
                sleep_ms(50);
            CHECK(atomic_load(&victim.shared->touches) >= touched + threads, "the threads hang in round %u", round);
            sleep_ms(100);
        }
        victim.shared->hot_pages = 16;
        victim.shared->pause_us = WAITING_PAUSE_US;
    }
    CHECK(victim_verify(&victim, 60) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    printf("%u threads, %llu touches, %llu faults, 0 wrong\n", threads, (unsigned long long)victim.shared->touches,
           (unsigned long long)status_of(&victim).faults);
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 60) == FL_EXIT_OK, "exit code");
    victim_end(&victim);
    return 0;
}
