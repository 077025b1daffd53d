/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VMM frees nearly all of its memory at once, and touches it at once: that it has been freed holds from the first touch on,
 * also for what has not been forgotten yet, and threads go on meanwhile.
 */
#include <string.h>

#include "victim.h"

#define FIRST 64u
#define WAITING_PAUSE_US 1000u /* while it is not about them: the CPUs are for the pager */
#define SECONDS 60u

static uint32_t pages;
static uint64_t removed_before, away_before;

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > pages * 3 / 4;
}

/* And the pager has nothing under way: pages that are on their way out while they are freed are another matter. */
static void evict_nearly_all(const struct victim *victim, struct fl_pager *connection) {
    CHECK(pager_budget(connection, pages * 4096ull, 600).error == 0, "budget");
    struct fl_status status = status_of(victim);
    for (unsigned i = 0; i < 120 && !nearly_all_away(&status); i++) {
        CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_SCAN}).error == 0, "scan");
        sleep_ms(500);
        status = status_of(victim);
    }
    CHECK(nearly_all_away(&status), "%llu pages away", (unsigned long long)status.evicted_pages);
    CHECK(pager_budget(connection, pages * 4096ull, 0).error == 0, "no lease: nothing more goes");
    sleep_ms(500);
}

/* But for what threads touched while the rest was evicted. */
static bool all_forgotten(const struct fl_status *status) {
    return status->removed_pages - removed_before >= away_before - FIRST;
}

/* All that is to be freed is locked before any of it is: threads may come to it when it has been, not before. */
static void free_and_touch(struct victim *victim) {
    struct victim_shared *s = victim->shared;
    removed_before = status_of(victim).removed_pages;
    away_before = status_of(victim).evicted_pages;
    s->pause_us = 0;
    victim_ask(victim, VICTIM_REMOVE, FIRST, pages - FIRST);
    for (unsigned i = 0; i < SECONDS * 1000 && atomic_load(&s->order) && !atomic_load(&s->lock[pages - 1]); i++)
        sleep_ms(1);
    s->hot_pages = 0;
    victim_wait(victim, SECONDS);
    sleep_ms(300); /* threads touch it */
}

int main(int argc, char **argv) {
    need_paging();
    pages = rounds(32768, 4096);
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-forget-%d.sock", (int)getpid());
    static const char *const more[] = {"--stall-target-permille", "1000",    "--log-level", "warning",
                                       "--scan-interval-ms",      "3600000", NULL};
    struct victim victim = victim_start(pages, 4, seed_of(argc, argv));
    victim.shared->hot_pages = FIRST;
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 10);
    for (unsigned round = 0; round < rounds(5, 1); round++) {
        victim_hold(&victim, true);
        victim.shared->hot_pages = FIRST;
        victim.shared->pause_us = WAITING_PAUSE_US;
        victim_hold(&victim, false);
        evict_nearly_all(&victim, connection);
        free_and_touch(&victim);
        wait_until(&victim, all_forgotten, SECONDS, "the stored copies of all that was freed are forgotten");
        CHECK(victim_verify(&victim, SECONDS) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    }
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 60) == FL_EXIT_OK, "exit code");
    victim_end(&victim);
    return 0;
}
