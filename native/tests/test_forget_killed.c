/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pager is killed while it forgets what the VMM has freed. The next one goes on with that before it serves anything, and the
 * old content never comes back.
 */
#include "base/vault.h"
#include "served_vm.h"
#include "swap/entry.h"
#include "victim.h"

#define PAGES 2048u
#define FREED_FIRST 100u
#define FREED_END 1500u

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES - PAGES / 16;
}

/* Scans lie an hour apart, and one may be void, or find pages that are too young. */
static void evict_nearly_all(const struct victim *victim, struct fl_pager *connection) {
    struct fl_status status = status_of(victim);
    for (unsigned i = 0; i < 200 && !nearly_all_away(&status); i++) {
        CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_SCAN}).error == 0, "scan");
        sleep_ms(300);
        status = status_of(victim);
    }
    CHECK(nearly_all_away(&status), "%llu pages away", (unsigned long long)status.evicted_pages);
}

/* As it leaves it when the VMM has freed what is away there: that is a hole in its file. */
static void killed_while_it_forgets(struct victim *victim, pid_t pager) {
    pager_kill(pager);
    struct fl_vault vault = vault_of(victim->pid, true);
    atomic_store(&vault.header->forgetting[5].first, FREED_FIRST);
    atomic_store(&vault.header->forgetting[5].end, FREED_END);
    atomic_store(&vault.header->forgetting[9].first, UINT64_MAX - 1); /* nonsense */
    atomic_store(&vault.header->forgetting[9].end, UINT64_MAX);
    for (uint64_t page = FREED_FIRST; page < FREED_END; page++)
        if (fl_entry_state(atomic_load(&vault.table[page])) == FL_PAGE_EVICTED)
            victim->shared->generation[page] = 0; /* zeros */
    fl_vault_close(&vault);
}

int main(int argc, char **argv) {
    static const char *const more[] = {"--scan-interval-ms", "3600000", "--log-level", "warning", NULL};
    char socket_path[64];
    need_paging();
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-forget-killed-%d.sock", (int)getpid());
    struct victim victim = victim_start(PAGES, 0, seed_of(argc, argv));
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 30);
    CHECK(pager_budget(connection, PAGES * FL_PAGE_SIZE, 600).error == 0, "budget");
    evict_nearly_all(&victim, connection);
    CHECK(pager_budget(connection, PAGES * FL_PAGE_SIZE, 0).error == 0, "no lease: nothing more goes");
    sleep_ms(600);
    fl_pager_close(connection);
    struct fl_status before = status_of(&victim);
    killed_while_it_forgets(&victim, pager);
    pager = pager_start(&victim, socket_path, more);
    connection = pager_connect(socket_path, 30);
    struct fl_status after = status_of(&victim);
    uint64_t forgotten = after.removed_pages - before.removed_pages, wrong = victim_verify(&victim, 60);
    printf("of %llu away %llu are forgotten by the next pager; %llu read wrong\n",
           (unsigned long long)before.evicted_pages, (unsigned long long)forgotten, (unsigned long long)wrong);
    CHECK(wrong == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    CHECK(forgotten <= FREED_END - FREED_FIRST && forgotten > (FREED_END - FREED_FIRST) * 3 / 4, "others than those");
    CHECK(before.evicted_pages - after.evicted_pages == forgotten, "counted wrong");
    fl_pager_close(connection);
    pager_kill(pager);
    victim_end(&victim);
    return 0;
}
