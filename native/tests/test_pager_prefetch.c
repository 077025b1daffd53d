/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A prefetch of everything: it is done in steps, so that what else the pager is told need not wait for its end, and to
 * its end.
 */
#include <string.h>

#include "victim.h"

#define PAGES 16384u
#define SECONDS 30u

static bool most_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4;
}

static bool nothing_away(const struct fl_status *status) {
    return status->evicted_pages == 0;
}

static unsigned count_prefetches(struct fl_view *view, uint64_t *pages) {
    struct fl_record records[64];
    uint64_t cursor = 0, lost;
    unsigned found = 0;
    for (int count; (count = fl_view_records(view, &cursor, records, 64, &lost)) > 0;) {
        for (int i = 0; i < count; i++) {
            bool counts = records[i].kind == FL_RECORD_PREFETCH;
            found += counts;
            *pages += counts ? records[i].pages : 0;
        }
    }
    return found;
}

/* Said in the first round in which nothing goes any more. */
static bool holds(const struct fl_status *status) {
    return status->why == FL_WHY_LEASE;
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv), brought = 0;
    char socket_path[64];
    struct fl_view *view;
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-prefetch-%d.sock", (int)getpid());
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "warning", NULL};
    struct victim victim = victim_start(PAGES, 0, seed);
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, SECONDS);
    CHECK(pager_budget(connection, PAGES * 4096ull, 600).error == 0, "budget");
    wait_until(&victim, most_away, SECONDS, "three quarters away");
    CHECK(pager_budget(connection, PAGES * 4096ull, 0).error == 0, "no lease: what is away stays, nothing more goes");
    wait_until(&victim, holds, SECONDS, "that evicting has ended");
    uint64_t away = status_of(&victim).evicted_pages;
    struct fl_command all = {.kind = FL_COMMAND_PREFETCH, .first_page = 0, .page_count = PAGES};
    CHECK(pager_tell(connection, all).error == 0, "prefetch");
    wait_until(&victim, nothing_away, SECONDS, "all of it back");
    CHECK(fl_view_open((int)victim.pid, &view) == 0, "view");
    unsigned steps = 0;
    for (unsigned i = 0; i < SECONDS * 100 && brought < away; i++) { /* the last step's record comes after its pages */
        sleep_ms(10);
        steps += count_prefetches(view, &brought);
    }
    fl_view_close(view);
    CHECK(steps > 1 && brought == away, "%llu pages away were brought back in %u steps, %llu by prefetching",
          (unsigned long long)away, steps, (unsigned long long)brought);
    CHECK(status_of(&victim).faults == 0, "%llu faults", (unsigned long long)status_of(&victim).faults);
    CHECK(victim_verify(&victim, SECONDS) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH});
    fl_pager_close(connection);
    CHECK(pager_wait(pager, SECONDS) == FL_EXIT_OK, "detach");
    printf("%llu pages in %u steps\n", (unsigned long long)brought, steps);
    victim_end(&victim);
    return 0;
}
