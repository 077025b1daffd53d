/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flipped bits in the vault, in stored pages and in the page table, with the pager alive and with a successor, to
 * whom its predecessor has left pages protected: the
 * process gets an error (SIGBUS), never a wrong byte, and nothing more is evicted from it. And records of regions that
 * the process itself has overwritten: the pager goes by its own.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "pager/serve.h"
#include "served_vm.h"
#include "swap/entry.h"
#include "swap/uffd.h"
#include "victim.h"

#define PAGES 2048u
#define SCRIBBLED_SCANS 4u

static bool nearly_all_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES * 3 / 4;
}

static bool shown_corrupt(const struct fl_status *status) {
    return status->state == FL_STATE_CORRUPT && status->why == FL_WHY_CORRUPT;
}

/* Flip one bit in up to `count` stored pages of tier ram; returns how many. */
static unsigned flip_stored(struct fl_vault *vault, unsigned count, uint64_t *random) {
    unsigned flipped = 0;
    for (uint32_t page = PAGES / 2; page < PAGES && flipped < count; page++) {
        fl_entry entry = atomic_load(&vault->table[page]);
        if (fl_entry_state(entry) != FL_PAGE_EVICTED || fl_entry_tier(entry) != FL_TIER_RAM)
            continue;
        uint8_t *object = vault->pool + fl_entry_payload(entry) * 8;
        uint64_t at = random_next(random) % 200; /* header and the beginning of the payload */
        object[at] ^= (uint8_t)(1u << (random_next(random) % 8));
        flipped++;
    }
    return flipped;
}

static unsigned flip_entries(struct fl_vault *vault, unsigned count, uint64_t *random) {
    unsigned flipped = 0;
    for (uint32_t page = 256; page < PAGES / 2 && flipped < count; page++) {
        fl_entry entry = atomic_load(&vault->table[page]);
        if (fl_entry_state(entry) != FL_PAGE_EVICTED)
            continue;
        atomic_store(&vault->table[page], entry ^ UINT64_C(1) << (random_next(random) % 64));
        flipped++;
    }
    return flipped;
}

/* As a pager does that dies before it has lifted the protection of what it evicted: the marks stay on the holes. */
static void protect_all(const struct victim *victim, struct fl_vault *vault) {
    struct fl_vm vm = {.pid = (int)victim->pid, .vault = *vault};
    vm.freeze = (enum fl_freeze)atomic_load(&vault->header->freeze);
    CHECK(fl_attach_borrow(vm.pid, &vault->header->attachment, &vm.uffd, NULL) == 0, "userfaultfd");
    int error = -EAGAIN; /* while an event is unread, and nobody reads them here */
    for (unsigned i = 0; i < 1000 && error == -EAGAIN; i++) {
        struct uffd_msg message;
        if (read(vm.uffd, &message, sizeof(message)) < 0)
            sleep_ms(1);
        error = fl_uffd_protect(&vm, fl_address_of_page(&vm, 0, 0), fl_region_pages(&vm, 0) * FL_PAGE_SIZE, true);
    }
    CHECK(error == 0, "protect: %s", strerror(-error));
    close(vm.uffd);
}

static void run(uint64_t random, bool with_successor) {
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-corrupt-%d.sock", (int)getpid());
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "error", NULL};
    struct victim victim = victim_start(PAGES, 2, random);
    victim.shared->hot_pages = 64;
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 10);
    CHECK(pager_budget(connection, PAGES * 4096ull, 600).error == 0, "budget");
    wait_until(&victim, nearly_all_away, 30, "three quarters away");
    if (with_successor)
        pager_kill(pager);
    struct fl_vault vault = vault_of(victim.pid, true);
    unsigned stored = flip_stored(&vault, 20, &random), entries = flip_entries(&vault, 20, &random);
    if (with_successor)
        protect_all(&victim, &vault);
    fl_vault_close(&vault);
    CHECK(stored == 20 && entries == 20, "%u stored pages and %u entries flipped", stored, entries);
    if (with_successor) {
        fl_pager_close(connection);
        pager = pager_start(&victim, socket_path, more);
        connection = pager_connect(socket_path, 10);
    }

    /* While an event is unread the kernel refuses UFFDIO_POISON as it refuses COPY: who waits must not be forgotten. */
    atomic_store(&victim.shared->churn, 1);
    uint64_t errors = victim_verify(&victim, 60), sigbus = atomic_load(&victim.shared->sigbus);
    atomic_store(&victim.shared->churn, 0);
    struct fl_status status = status_of(&victim);
    CHECK(errors == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    /* A bit that only made a stored page's slack or an unused entry bit differ may do no harm; most do. */
    CHECK(sigbus >= 30 && sigbus <= 40, "%llu of 40 damaged pages gave an error", (unsigned long long)sigbus);
    CHECK(status.checksum_errors >= sigbus, "%llu checksum errors", (unsigned long long)status.checksum_errors);
    wait_until(&victim, shown_corrupt, 20, "that the VM is corrupt");
    uint64_t evictions = status_of(&victim).evictions; /* a window may have been under way when the first was found */
    sleep_ms(500);
    CHECK(status_of(&victim).evictions == evictions, "evictions went on");
    /* Detaching would turn the lost pages into zeros. */
    struct fl_reply reply = pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH});
    CHECK(reply.error == -EBADMSG, "detach of a corrupt VM answered %d", reply.error);
    printf("%s: 40 damaged, %llu errors given, 0 wrong bytes\n", with_successor ? "successor" : "living pager",
           (unsigned long long)sigbus);
    pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_RELEASE});
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 10) == FL_EXIT_OK, "release");
    kill(victim.pid, SIGKILL);
}

static bool harvested(const struct fl_status *status) {
    return status->scans > 0;
}

/* The VMM has the vault open, and one that a guest has taken over may write anything there, at any moment. */
static void run_scribbled(uint64_t seed) {
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-corrupt-%d.sock", (int)getpid());
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "error", NULL};
    struct victim victim = victim_start(PAGES, 2, seed);
    victim.shared->hot_pages = 64;
    pid_t pager = pager_start(&victim, socket_path, more);
    struct fl_pager *connection = pager_connect(socket_path, 10);
    CHECK(pager_budget(connection, PAGES * 4096ull, 600).error == 0, "budget");
    wait_until(&victim, harvested, 30, "a scan");
    struct fl_vault vault = vault_of(victim.pid, true);
    struct fl_vault_header *header = vault.header;
    uint64_t start_ns = fl_now(), scans = status_of(&victim).scans;
    atomic_store(&header->scan_interval_ms, 0);
    for (uint32_t i = 0; i < FL_MAX_REGIONS; i++) {
        struct fl_vault_region *region = &header->regions[i];
        region->length = region->first_page = region->file_offset = (UINT64_MAX - i) / FL_PAGE_SIZE * FL_PAGE_SIZE;
        atomic_store(&region->vmm_addr, UINT64_MAX / 2 + i * FL_PAGE_SIZE);
        atomic_store(&region->gone, i % 2);
    }
    atomic_store(&header->region_count, UINT32_MAX);
    /* A view that is opened now is refused; what was mapped before goes on. */
    struct fl_status *status = &vault.stats->status;
    for (unsigned i = 0; i < 3000 && (__atomic_load_n(&status->evicted_pages, __ATOMIC_RELAXED) <= PAGES * 3 / 4 ||
                                      __atomic_load_n(&status->scans, __ATOMIC_RELAXED) < scans + SCRIBBLED_SCANS);
         i++)
        sleep_ms(10);
    scans = __atomic_load_n(&status->scans, __ATOMIC_RELAXED) - scans;
    CHECK(scans >= SCRIBBLED_SCANS, "scans have ended");
    CHECK(__atomic_load_n(&status->evicted_pages, __ATOMIC_RELAXED) > PAGES * 3 / 4, "evictions have ended");
    uint64_t most = (fl_now() - start_ns) / FL_NS_PER_MS / FL_SCAN_MS_MIN + 2;
    CHECK(scans <= most, "%llu scans where the shortest interval allows %llu", (unsigned long long)scans,
          (unsigned long long)most);
    CHECK(victim_verify(&victim, 60) == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    CHECK(waitpid(pager, NULL, WNOHANG) == 0, "the pager has ended");
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 20) == FL_EXIT_OK, "detach");
    CHECK(victim_verify(&victim, 60) == 0, "page %llu read wrong", (unsigned long long)victim.shared->first_error - 1);
    printf("scribbled: %llu scans, 0 wrong bytes\n", (unsigned long long)scans);
    fl_vault_close(&vault);
    kill(victim.pid, SIGKILL);
}

/* A page may turn out to be lost at the last moment, when nothing is away any more and the pager is about to leave. */
static void no_detach_with_a_lost_page(uint64_t seed) {
    struct fl_options options = {.fault_threads = 1, .scan_interval_ms = 10000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    static struct fl_vm vm;
    struct victim victim = victim_start(16, 0, seed);
    options.vmm_pid = (int)victim.pid;
    CHECK(fl_tracker_list_parse("auto", &options.trackers), "trackers");
    CHECK(fl_serve_begin(&vm, &options, &why) == 0, "attach: %s", why.detail);
    atomic_store(&vm.vault.header->corrupt, 1);
    CHECK(fl_serve_detach(&vm, &why) == -EPERM, "detached with a lost page");
    CHECK(atomic_load(&vm.vault.header->phase) == FL_VAULT_REGISTERED, "phase %u",
          atomic_load(&vm.vault.header->phase));
    atomic_store(&vm.vault.header->corrupt, 0);
    CHECK(fl_serve_detach(&vm, &why) == 0, "detach: %s", why.detail);
    kill(victim.pid, SIGKILL);
    fl_serve_close(&vm);
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t random = seed_of(argc, argv);
    run(random, false);
    run(random + 1, true);
    run_scribbled(random + 2);
    no_detach_with_a_lost_page(random + 3);
    return 0;
}
