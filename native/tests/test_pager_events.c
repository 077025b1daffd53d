/* SPDX-License-Identifier: Apache-2.0 */
/* The served process changes its address space: it frees memory, moves it, plugs more in and out, and forks. */
#include <string.h>

#include "victim.h"

#define PAGES 4096u

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4;
}

static bool nothing_away(const struct fl_status *status) {
    return status->evicted_pages == 0;
}

static bool removal_seen(const struct fl_status *status) {
    return status->removed_pages > 900;
}

static bool plugged(const struct fl_status *status) {
    return status->memory_bytes == (PAGES + 1024) * 4096ull;
}

static bool unplugged(const struct fl_status *status) {
    return status->memory_bytes == PAGES * 4096ull;
}

static bool plugged_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4 + 1000;
}

static void budget(const char *socket_path, uint64_t pages) {
    struct fl_pager *connection = pager_connect(socket_path, 10);
    struct fl_reply reply = pager_budget(connection, pages * 4096ull, 600);
    CHECK(reply.error == 0, "budget: %s", reply.detail);
    fl_pager_close(connection);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-events-%d.sock", (int)getpid());
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "warning", NULL};
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->hot_pages = 128;
    pid_t pager = pager_start(&victim, socket_path, more);
    budget(socket_path, PAGES);
    wait_until(&victim, nearly_all_away, 30, "three quarters away");

    /* Freed memory reads as zeros afterwards, not as what was stored of it. */
    victim_order(&victim, VICTIM_REMOVE, 1000, 1000, 10);
    wait_until(&victim, removal_seen, 10, "900 stored copies forgotten");
    CHECK(victim_verify(&victim, 30) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);

    /* Moved memory is found at its new place. */
    wait_until(&victim, nearly_all_away, 30, "three quarters away again");
    victim_hold(&victim, true);
    victim_order(&victim, VICTIM_MOVE, 0, 0, 10);
    victim_hold(&victim, false);
    CHECK(victim_verify(&victim, 30) == 0, "page %llu after a move",
          (unsigned long long)victim.shared->first_error - 1);
    wait_until(&victim, nearly_all_away, 30, "three quarters away after a move");

    /* Memory plugged in is served, and let go when it is plugged out. */
    victim_order(&victim, VICTIM_PLUG, 0, 0, 10);
    wait_until(&victim, plugged, 10, "4 MiB more");
    budget(socket_path, PAGES + 1024);
    wait_until(&victim, plugged_away, 30, "the plugged memory away");
    victim_order(&victim, VICTIM_UNMAP, 0, 0, 30);
    wait_until(&victim, unplugged, 10, "4 MiB less");
    CHECK(victim_verify(&victim, 30) == 0, "page %llu after unplugging",
          (unsigned long long)victim.shared->first_error - 1);

    /* A child that has the memory mapped reads what the parent would, and nothing is evicted while it lives. */
    budget(socket_path, PAGES);
    wait_until(&victim, nearly_all_away, 30, "three quarters away before a fork");
    victim_hold(&victim, true);
    victim_order(&victim, VICTIM_FORK, 0, 0, 60);
    victim_hold(&victim, false);
    CHECK(atomic_load(&victim.shared->errors) == 0, "the child read page %llu wrong",
          (unsigned long long)victim.shared->first_error - 1);
    wait_until(&victim, nearly_all_away, 60, "evicting again after the child has ended");

    struct fl_pager *connection = pager_connect(socket_path, 10);
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DRAIN}).error == 0, "drain");
    wait_until(&victim, nothing_away, 30, "drained");
    CHECK(victim_verify(&victim, 30) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 30) == FL_EXIT_OK, "exit code");
    CHECK(victim_verify(&victim, 30) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    victim_end(&victim);
    return 0;
}
