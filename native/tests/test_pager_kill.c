/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kill -9 at any instruction: pagers die at random moments while three threads write and check every byte of pages
 * that are being evicted and brought back. No byte may be wrong, nothing may hang, and after detaching the process
 * is as it was.
 */
#include <dirent.h>
#include <signal.h>
#include <string.h>

#include "victim.h"

#define PAGES 8192u

static bool most_is_away(const struct fl_status *status) {
    return status->evicted_pages > PAGES / 3;
}

static unsigned count_descriptors(pid_t pid) {
    char path[64];
    unsigned count = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    CHECK(folder, "%s", path);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

int main(int argc, char **argv) {
    need_paging();
    uint64_t random = seed_of(argc, argv);
    char socket_path[64];
    snprintf(socket_path, sizeof(socket_path), "/tmp/fl-kill-%d.sock", (int)getpid());
    struct victim victim = victim_start(PAGES, 3, random);
    unsigned before = count_descriptors(victim.pid), kills = rounds(100, 20);
    static const char *const more[] = {"--stall-target-permille", "1000", "--log-level", "error", NULL};

    pid_t pager = pager_start(&victim, socket_path, more);
    for (unsigned i = 0; i < kills; i++) {
        struct fl_pager *connection = pager_connect(socket_path, 20);
        CHECK(pager_budget(connection, (PAGES - 512) * 4096ull, 600).error == 0, "budget");
        fl_pager_close(connection);
        sleep_ms((unsigned)(random_next(&random) % 150));
        pager_kill(pager);
        uint64_t touched = atomic_load(&victim.shared->touches);
        pager = pager_start(&victim, socket_path, more);
        for (int k = 0; k < 4000 && atomic_load(&victim.shared->touches) < touched + 10; k++)
            sleep_ms(5);
        CHECK(atomic_load(&victim.shared->touches) >= touched + 10, "the threads hang after kill %u", i);
        CHECK(atomic_load(&victim.shared->errors) == 0, "page %llu read wrong after kill %u",
              (unsigned long long)atomic_load(&victim.shared->first_error) - 1, i);
    }
    victim.shared->hot_pages = 256;
    wait_until(&victim, most_is_away, 30, "a third of the memory away");
    CHECK(victim_verify(&victim, 60) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);

    struct fl_pager *connection = pager_connect(socket_path, 20);
    struct fl_status last = status_of(&victim); /* there is no vault to look into once it has detached */
    CHECK(pager_tell(connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(connection);
    CHECK(pager_wait(pager, 60) == FL_EXIT_OK, "exit code of a detached pager");
    CHECK(count_descriptors(victim.pid) == before, "descriptors were left in the process");
    CHECK(victim_verify(&victim, 60) == 0, "page %llu", (unsigned long long)victim.shared->first_error - 1);
    printf("%u kills, %u takeovers, %llu touches, %llu writes, %llu evictions, %llu faults, %llu put right, 0 wrong\n",
           kills, last.takeovers, (unsigned long long)victim.shared->touches, (unsigned long long)victim.shared->writes,
           (unsigned long long)last.evictions, (unsigned long long)last.faults,
           (unsigned long long)last.recovered_pages);
    CHECK(last.takeovers == kills, "%u takeovers", last.takeovers);
    victim_end(&victim);
    return 0;
}
