/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pager that tracks by `zap` is killed while it drops pages: its mark stays, by which what the VMM frees is its own doing. The
 * next pager ends that before it scans, whatever it tracks by: what is freed then, or before it is there, is forgotten, and never
 * comes back.
 */
#include <string.h>

#include "base/vault.h"
#include "served_vm.h"
#include "victim.h"

#define PAGES 2048u
#define AT_ONCE 16u /* freed in pieces: none is taken for the marked whole */

static bool half_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 2;
}

/* Its budget is used, and then it dies as in the middle of an arming. */
static void killed_while_it_drops(const struct victim *victim, const char *socket_path) {
    static const char *const zap[] = {"--trackers", "zap", "--log-level", "error", NULL};
    pid_t pager = pager_start(victim, socket_path, zap);
    struct fl_pager *connection = pager_connect(socket_path, 30);
    CHECK(pager_budget(connection, PAGES * FL_PAGE_SIZE, 600).error == 0, "budget");
    wait_until(victim, half_away, 60, "half of it is away");
    fl_pager_close(connection);
    pager_kill(pager);
    struct fl_vault vault = vault_of(victim->pid, true);
    atomic_store(&vault.header->zap_start, atomic_load(&victim->shared->base));
    atomic_store(&vault.header->zap_end, atomic_load(&victim->shared->base) + PAGES * FL_PAGE_SIZE);
    fl_vault_close(&vault);
}

static bool is_marked(const struct victim *victim) {
    struct fl_vault vault = vault_of(victim->pid, false);
    bool marked = atomic_load(&vault.header->zap_end) != 0;
    fl_vault_close(&vault);
    return marked;
}

/* What the first pager's scan has found goes yet. */
static struct fl_status settled(const struct victim *victim) {
    struct fl_status before, after = status_of(victim);
    unsigned tries = 0;
    do {
        before = after;
        sleep_ms(200);
        after = status_of(victim);
        CHECK(++tries < 150, "pages go in and out for %u s", tries / 5);
    } while (before.evicted_pages != after.evicted_pages);
    return after;
}

/* A successor that will not scan for an hour. */
static void followed_by(const char *tracker, uint64_t seed) {
    const char *const more[] = {"--trackers", tracker, "--scan-interval-ms", "3600000", "--log-level", "error", NULL};
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-marked-%d.sock", (int)getpid());
    struct victim victim = victim_start(PAGES, 0, seed);
    killed_while_it_drops(&victim, socket_path);
    uint64_t removed = status_of(&victim).removed_pages;
    victim_ask(&victim, VICTIM_REMOVE, 0, AT_ONCE); /* goes on when the next pager has read of it */
    sleep_ms(20);
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 30);
    for (unsigned i = 0; i < 500 && is_marked(&victim); i++)
        sleep_ms(10);
    bool marked = is_marked(&victim);
    victim_wait(&victim, 30);
    struct fl_status before = settled(&victim);
    CHECK(before.removed_pages - removed > AT_ONCE / 2, "%s: freed before there was a pager, and %llu forgotten",
          tracker, (unsigned long long)(before.removed_pages - removed));
    CHECK(before.evicted_pages > PAGES / 4, "%llu pages away", (unsigned long long)before.evicted_pages);
    for (uint32_t page = AT_ONCE; page < PAGES; page += AT_ONCE)
        victim_order(&victim, VICTIM_REMOVE, page, AT_ONCE, 30);
    struct fl_status after = status_of(&victim);
    for (unsigned i = 0; i < 3000 && after.removed_pages - before.removed_pages < before.evicted_pages; i++) {
        sleep_ms(10);
        after = status_of(&victim);
    }
    uint64_t forgotten = after.removed_pages - before.removed_pages, wrong = victim_verify(&victim, 60);
    printf("followed by %-5s %llu away, of which %llu forgotten and %llu still away; %llu come back as they were\n",
           tracker, (unsigned long long)before.evicted_pages, (unsigned long long)forgotten,
           (unsigned long long)after.evicted_pages, (unsigned long long)wrong);
    CHECK(wrong == 0, "%s: %llu pages come back", tracker, (unsigned long long)wrong);
    CHECK(forgotten == before.evicted_pages && after.evicted_pages == 0, "%s: freed, and not forgotten", tracker);
    CHECK(!marked, "%s: the mark has stayed", tracker);
    fl_pager_close(connection);
    pager_kill(pager);
    victim_end(&victim);
}

int main(int argc, char **argv) {
    static const char *const trackers[] = {"rwp", "zap", "idle", "damon"};
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = seed_of(argc, argv);
    for (size_t i = 0; i < sizeof(trackers) / sizeof(trackers[0]); i++) /* also where it does not work */
        followed_by(trackers[i], seed + i);
    return 0;
}
