/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that is plugged out, wholly or in part, while no pager lives or just before one dies: the next one serves
 * everything else, and what was away of it is in its file when the VMM maps it again.
 */
#include <poll.h>
#include <string.h>

#include "attach/proc.h"
#include "attach/regions.h"
#include "base/kernel.h"
#include "served_vm.h"
#include "victim.h"

#define PAGES 1024u
#define PLUG_PAGES 1024u
#define SECONDS 30u

static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "error", NULL};
static char socket_path[64];

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4 + PLUG_PAGES * 7 / 8;
}

static bool unplugged(const struct fl_status *status) {
    return status->memory_bytes == PAGES * 4096ull;
}

static bool plugged(const struct fl_status *status) {
    return status->memory_bytes == (PAGES + PLUG_PAGES) * 4096ull;
}

static void budget(uint64_t pages) {
    struct fl_pager *connection = pager_connect(socket_path, SECONDS);
    struct fl_reply reply = pager_budget(connection, pages * 4096ull, 600);
    CHECK(reply.error == 0, "budget: %s", reply.detail);
    fl_pager_close(connection);
}

static int count_guest_memory(const struct fl_proc_map *map, void *context) {
    if (strncmp(map->path, FL_GUEST_MEMFD_PREFIX, strlen(FL_GUEST_MEMFD_PREFIX)) == 0)
        *(uint64_t *)context += map->end - map->start;
    return 0;
}

static uint64_t mapped_bytes(const struct victim *victim) {
    uint64_t bytes = 0;
    CHECK(fl_proc_maps((int)victim->pid, count_guest_memory, &bytes) == 0, "maps");
    return bytes;
}

/* As a pager that reads the event, and dies before it has written down what follows from it. */
static void read_and_forget(const struct victim *victim) {
    struct fl_vault vault = vault_of(victim->pid, true);
    struct uffd_msg message = {0};
    int uffd;
    CHECK(fl_attach_borrow((int)victim->pid, &vault.header->attachment, &uffd, NULL) == 0, "userfaultfd");
    struct pollfd readable = {.fd = uffd, .events = POLLIN};
    while (message.event != UFFD_EVENT_UNMAP) {
        CHECK(poll(&readable, 1, SECONDS * 1000) == 1, "no event in %u s", SECONDS);
        CHECK(read(uffd, &message, sizeof(message)) == (ssize_t)sizeof(message), "read");
    }
    close(uffd);
    fl_vault_close(&vault);
}

static pid_t start_with_plugged(struct victim *victim, uint64_t seed) {
    *victim = victim_start(PAGES, 2, seed);
    victim->shared->hot_pages = 64;
    pid_t pager = pager_start(victim, socket_path, more);
    budget(PAGES);
    victim_order(victim, VICTIM_PLUG, 0, 0, SECONDS);
    wait_until(victim, plugged, SECONDS, "4 MiB more");
    budget(PAGES + PLUG_PAGES);
    wait_until(victim, nearly_all_away, SECONDS, "nearly all away");
    return pager;
}

static void end(struct victim *victim, pid_t pager) {
    struct fl_pager *connection = pager_connect(socket_path, SECONDS);
    CHECK(victim_verify(victim, SECONDS) == 0, "page %llu", (unsigned long long)victim->shared->first_error - 1);
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, SECONDS) == FL_EXIT_OK, "exit code");
    CHECK(victim_verify(victim, SECONDS) == 0, "page %llu", (unsigned long long)victim->shared->first_error - 1);
    victim_end(victim);
}

static void unmapped_while_no_pager_lives(uint64_t seed, bool event_is_read) {
    struct victim victim;
    pid_t pager = start_with_plugged(&victim, seed);
    pager_kill(pager);
    victim_ask(&victim, VICTIM_UNPLUG, 0, PLUG_PAGES);
    for (unsigned i = 0; i < SECONDS * 1000 && mapped_bytes(&victim) != PAGES * 4096ull; i++)
        sleep_ms(1);
    if (event_is_read)
        read_and_forget(&victim);
    pager = pager_start(&victim, socket_path, more);
    victim_wait(&victim, SECONDS);
    wait_until(&victim, unplugged, SECONDS, "4 MiB less");
    CHECK(victim_verify(&victim, SECONDS) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    victim_order(&victim, VICTIM_REPLUG, 0, 0, SECONDS);
    end(&victim, pager);
    printf("unmapped while no pager lives, its event %s: all served, nothing lost\n",
           event_is_read ? "read and forgotten" : "unread");
}

static bool all_back(const struct fl_status *status) {
    return status->evicted_pages == 0 && status->why == FL_WHY_UNSAFE;
}

static uint32_t regions_of(const struct victim *victim) {
    struct fl_vault vault = vault_of(victim->pid, true);
    uint32_t count = atomic_load(&vault.header->region_count);
    fl_vault_close(&vault);
    return count;
}

static bool evicting_again(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 2;
}

/* The rest is not served as a region of its own, everything comes back, and nothing goes until it is mapped as it was. */
static void unmapped_in_part(uint64_t seed, bool while_no_pager_lives) {
    struct victim victim;
    pid_t pager = start_with_plugged(&victim, seed);
    if (while_no_pager_lives)
        pager_kill(pager);
    victim_ask(&victim, VICTIM_UNPLUG, 0, PLUG_PAGES / 2 + 8); /* the cut is within a batch */
    if (while_no_pager_lives) {
        for (unsigned i = 0; i < SECONDS * 1000 && mapped_bytes(&victim) == (PAGES + PLUG_PAGES) * 4096ull; i++)
            sleep_ms(1);
        pager = pager_start(&victim, socket_path, more);
    }
    victim_wait(&victim, SECONDS);
    wait_until(&victim, all_back, SECONDS, "all back");
    uint64_t evictions = status_of(&victim).evictions;
    sleep_ms(7000); /* longer than from one inspection to the next */
    CHECK(regions_of(&victim) == 2, "%u regions", regions_of(&victim));
    CHECK(status_of(&victim).evictions == evictions, "evictions went on");
    victim_order(&victim, VICTIM_REPLUG, 0, 0, SECONDS);
    wait_until(&victim, evicting_again, SECONDS, "evicting again when all is mapped as it was");
    end(&victim, pager);
    printf("unmapped in part while %s pager lives: all back, nothing lost\n", while_no_pager_lives ? "no" : "a");
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t seed = seed_of(argc, argv);
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-unmapped-%d.sock", (int)getpid());
    unmapped_while_no_pager_lives(seed, false);
    unmapped_while_no_pager_lives(seed + 1, true);
    unmapped_in_part(seed + 2, false);
    unmapped_in_part(seed + 3, true);
    return 0;
}
