/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The damon tracker as one of the users of a host's only DAMON: damon_stat makes room and comes back, also after a kill; several
 * VMs at once; nothing is taken from others; and when others take it, the scan is void, the next tracker takes over, and it is
 * said.
 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "damon_field.h"
#include "said.h"
#include "victim.h"

#define MIB (UINT64_C(1) << 20)
#define SLOT_STATE DAMON_KDAMONDS "1/state"
#define OTHER DAMON_KDAMONDS "0/"
/* Of a pager with damon: what is done to it falls behind its arming, and before the next scan. */
#define INTERVAL_MS "2000"

static bool has_stat;

static bool stat_is_on(void) {
    char text[8];
    damon_read(DAMON_STAT, text, sizeof(text));
    return text[0] == 'Y';
}

static long kdamonds(void) {
    return damon_read_number(DAMON_KDAMONDS "nr_kdamonds");
}

static void must_write(const char *path, const char *text) {
    int error = damon_write(path, text);
    CHECK(error == 0, "write %s to %s: %s", text, path, strerror(-error));
}

/* As a host has it where nobody has touched anything. */
static void check_put_back(const char *when) {
    CHECK(!has_stat || stat_is_on(), "%s: damon_stat is off", when);
    CHECK(kdamonds() == 0, "%s: %ld kdamonds", when, kdamonds());
}

static void must_create(struct damon_field *field) {
    int error = damon_field_create(field);
    CHECK(error == 0, "create: %s", strerror(-error));
}

static void check_works(struct damon_field *field, uint64_t *random) {
    struct damon_score score = {0};
    uint32_t list[40];
    for (uint32_t i = 0; i < 40; i++)
        list[i] = (uint32_t)random_next(random) % field->pages;
    damon_field_begin(field);
    damon_field_touch(field, list, 40, random);
    damon_field_look(field);
    damon_field_add_score(field, &score);
    CHECK(score.missed == 0 && score.wrong <= 1, "missed %llu, wrong %llu", (unsigned long long)score.missed,
          (unsigned long long)score.wrong);
}

static bool is_possible(char *why, size_t bytes) {
    struct fl_kernel_features features;
    CHECK(fl_probe_kernel(&features) == 0, "fl_probe_kernel");
    return fl_tracker_damon.probe(&(const struct fl_tracked){0}, &features, why, bytes);
}

/* What is said of a VM of this size, before anything was measured: 2 % of 10 s for 1.5 us a region. */
static void check_grain(uint64_t bytes, uint32_t interval_ms, const char *words) {
    const struct fl_tracked vm = {.memory_bytes = bytes, .scan_interval_ms = interval_ms};
    struct fl_kernel_features features;
    char detail[FL_DETAIL_BYTES];
    CHECK(fl_probe_kernel(&features) == 0, "fl_probe_kernel");
    CHECK(fl_tracker_damon.probe(&vm, &features, detail, sizeof(detail)) && strstr(detail, words), "%llu MiB: %s",
          (unsigned long long)(bytes / MIB), detail);
    CHECK(strlen(detail) + 1 < sizeof(detail), "cut off: %s", detail);
    printf("%llu MiB: %s\n", (unsigned long long)(bytes / MIB), detail);
}

static void test_grain_is_said(void) {
    check_grain(0, 0, "as far as 2 % of a CPU reach");
    check_grain(256 * MIB, 0, "exact to a page at this VM's size, in about 0.98 % of a CPU");
    check_grain(256 * MIB, 1000, "regions of about 32 KiB");
    check_grain(UINT64_C(65536) * MIB, 10000, "regions of about 512 KiB");
}

/* ---- put back ---------------------------------------------------------------------------------------------- */

static void test_two_at_once(struct damon_field *first, struct damon_field *second, uint64_t *random) {
    must_create(first);
    CHECK(!stat_is_on() && kdamonds() > 1, "damon_stat has not made room");
    must_create(second);
    damon_field_begin(first);
    check_works(second, random);
    uint32_t page = 5;
    damon_field_touch(first, &page, 1, random);
    damon_field_look(first);
    CHECK(damon_field_seen(first) == 1 && first->seen[5], "another VM's scan got in the way");
    damon_field_destroy(first);
    CHECK(!stat_is_on() && kdamonds() > 1, "put back while another VM needs it");
    check_works(second, random);
    damon_field_begin(second); /* armed */
    damon_field_destroy(second);
    check_put_back("after two VMs");
}

/* A pager's end without any warning: DAMON stays as it was left, and the next one to go puts it back. */
static void test_killed(struct damon_field *field, struct damon_field *other, uint64_t *random) {
    int pipe_fds[2];
    char done = 0;
    CHECK(pipe(pipe_fds) == 0, "pipe");
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (damon_field_create(field) || damon_field_arm(field) || write(pipe_fds[1], &done, 1) != 1)
            _exit(1);
        pause();
    }
    CHECK(read(pipe_fds[0], &done, 1) == 1, "the child did not get so far");
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    CHECK(damon_read_number(DAMON_KDAMONDS "1/pid") > 0, "nothing was left on");
    CHECK(!stat_is_on(), "damon_stat is on");
    char why[FL_DETAIL_BYTES];
    CHECK(is_possible(why, sizeof(why)), "what a dead pager left is in the way: %s", why);
    must_create(other);
    CHECK(damon_read_number(DAMON_KDAMONDS "1/pid") < 0, "the dead pager's kdamond goes on");
    check_works(other, random);
    damon_field_destroy(other);
    check_put_back("after a kill");
}

/* Killed between making the slots and leaving the note, and between the note and what it is about. */
static void test_killed_early(struct damon_field *field) {
    must_create(field);
    char slots[24];
    snprintf(slots, sizeof(slots), "%ld", kdamonds());
    damon_field_destroy(field);
    must_write(DAMON_KDAMONDS "nr_kdamonds", slots);
    must_create(field);
    damon_field_destroy(field);
    check_put_back("after a kill before the note");
}

/* Switched off by the administrator: stays off. */
static void test_stat_off_before(struct damon_field *field) {
    if (!has_stat)
        return;
    must_write(DAMON_STAT, "N");
    must_create(field);
    damon_field_destroy(field);
    CHECK(!stat_is_on() && kdamonds() == 0, "damon_stat was off, and was switched on");
    must_write(DAMON_STAT, "Y");
}

/* ---- others ------------------------------------------------------------------------------------------------ */

static void check_refused(struct damon_field *field, const char *because) {
    char why[FL_DETAIL_BYTES];
    CHECK(!is_possible(why, sizeof(why)) && strstr(why, because), "probe says: %s", why);
    int error = damon_field_create(field);
    CHECK(error == -EBUSY, "create: %s", strerror(-error));
}

static void test_in_use(struct damon_field *field) {
    if (has_stat)
        must_write(DAMON_STAT, "N");
    must_write(DAMON_KDAMONDS "nr_kdamonds", "2");
    check_refused(field, "none runs");
    must_write(OTHER "contexts/nr_contexts", "1");
    must_write(OTHER "contexts/0/operations", "vaddr");
    must_write(OTHER "contexts/0/targets/nr_targets", "1");
    char pid[16];
    snprintf(pid, sizeof(pid), "%d", (int)getpid());
    must_write(OTHER "contexts/0/targets/0/pid_target", pid);
    must_write(OTHER "state", "on");
    long kdamond = damon_read_number(OTHER "pid");
    check_refused(field, "DAMON is in use by another");
    CHECK(kdamonds() == 2 && kdamond > 0 && damon_read_number(OTHER "pid") == kdamond, "another's DAMON was touched");
    must_write(OTHER "state", "off");
    must_write(DAMON_KDAMONDS "nr_kdamonds", "0");
    if (damon_write(DAMON_RECLAIM, "Y") == 0) {
        check_refused(field, "DAMON is in use by damon_reclaim");
        must_write(DAMON_RECLAIM, "N");
    }
    if (has_stat)
        must_write(DAMON_STAT, "Y");
}

static void check_lost(struct damon_field *field, bool on_arming, const char *what) {
    struct said said = said_open();
    said_begin(&said);
    int error = on_arming ? damon_field_arm(field) : damon_field_collect(field);
    said_end(&said);
    CHECK(error == -ENODEV, "%s: %s", what, strerror(-error));
    damon_field_destroy(field);
    printf("%s: the scan is void, and it is said:\n", what);
    char *log = said_text(&said);
    check_said(log, "\"damon_lost\"", "somebody else", "kdamond 1 on process");
    free(log);
    said_close(&said);
}

static void test_taken_away(struct damon_field *field) {
    must_create(field);
    damon_field_begin(field);
    must_write(SLOT_STATE, "off");
    check_lost(field, false, "switched off");
    check_put_back("after it was switched off");

    must_create(field);
    damon_field_begin(field);
    must_write(SLOT_STATE, "off");
    must_write(DAMON_KDAMONDS "nr_kdamonds", "0");
    check_lost(field, false, "sysfs cleared");
    check_put_back("after sysfs was cleared");

    must_create(field);
    damon_field_begin(field);
    damon_field_look(field);
    must_write(DAMON_KDAMONDS "nr_kdamonds", "3");
    check_lost(field, true, "sysfs taken by another");
    CHECK(kdamonds() == 3, "another's settings were touched");
    must_write(DAMON_KDAMONDS "nr_kdamonds", "0");

    if (!has_stat)
        return;
    CHECK(!stat_is_on(), "damon_stat was switched on although another needs DAMON");
    must_write(DAMON_STAT, "Y");
    must_create(field);
    damon_field_begin(field);
    damon_field_look(field);
    must_write(DAMON_STAT, "Y");
    check_lost(field, true, "DAMON taken by damon_stat");
    check_put_back("after damon_stat took it");
}

/* The kernel's file systems, from under a tracker at work. In a mount namespace of our own from here on. */
static void test_unmounted(struct damon_field *field, uint64_t *random) {
    CHECK(unshare(CLONE_NEWNS) == 0 && mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "namespace: %s",
          strerror(errno));
    must_create(field);
    check_works(field, random);
    (void)umount2("/sys/kernel/tracing", MNT_DETACH);
    (void)umount2("/sys/kernel/debug", MNT_DETACH);
    CHECK(access("/sys/kernel/tracing/events", F_OK) && access("/sys/kernel/debug/tracing", F_OK), "still mounted");
    check_works(field, random);
    damon_field_destroy(field);
    must_create(field);
    check_works(field, random);
    puts("tracefs unmounted: it goes on, and begins anew");

    CHECK(umount2("/sys", MNT_DETACH) == 0, "umount /sys: %s", strerror(errno));
    check_works(field, random);
    CHECK(mount("sysfs", "/sys", "sysfs", 0, NULL) == 0, "mount /sys: %s", strerror(errno));
    puts("sysfs unmounted: it goes on with the folder that it holds");
    damon_field_destroy(field);
    check_put_back("after /sys was unmounted for a moment");
}

static void test_vmm_ends(struct damon_field *field) {
    must_create(field);
    damon_field_begin(field);
    kill(field->vm.pid, SIGKILL);
    for (unsigned i = 0; i < 10000 && kill(field->vm.pid, 0) == 0; i++) {
        waitpid(field->vm.pid, NULL, WNOHANG);
        sleep_ms(1);
    }
    int error = damon_field_arm(field);
    CHECK(error == -ESRCH, "arm after the VMM's end: %s", strerror(-error));
    damon_field_destroy(field);
    check_put_back("after the VMM's end");
}

/* ---- with a pager ------------------------------------------------------------------------------------------ */

static bool scanned_by_damon(const struct fl_status *status) {
    return status->tracker == FL_TRACKER_DAMON && status->scans >= 3;
}

static bool zap_took_over(const struct fl_status *status) {
    return status->tracker == FL_TRACKER_ZAP && status->tracker_switches == 1 && status->scan_failures >= 1;
}

static bool scanned_by_zap(const struct fl_status *status) {
    return status->tracker == FL_TRACKER_ZAP && status->last_scan_ns > status->pager_started_ns;
}

/* It has the kdamond of that number. */
static void kill_damon_pager(struct victim *victim, const char *path, const char *kdamond_pid) {
    static const char *const options[] = {"--trackers", "damon", "--scan-interval-ms", INTERVAL_MS, NULL};
    pid_t pager = pager_start(victim, path, options);
    struct fl_pager *connection = pager_connect(path, 60);
    wait_until(victim, scanned_by_damon, 60, "scans by damon");
    fl_pager_close(connection);
    pager_kill(pager);
    CHECK(!stat_is_on() && damon_read_number(kdamond_pid) > 0, "the killed pager left nothing on");
}

/* The next pager has no use for DAMON, or there is none: then the agent does it. */
static void test_pager_killed(struct damon_field *other, uint64_t seed) {
    static const char *const options[] = {"--trackers", "zap", "--scan-interval-ms", "300", NULL};
    fflush(NULL);
    struct victim victim = victim_start(2048, 2, seed);
    char path[64];
    snprintf(path, sizeof(path), "/tmp/frostline-test-killed-%d.sock", (int)getpid());
    kill_damon_pager(&victim, path, DAMON_KDAMONDS "1/pid");
    pid_t pager = pager_start(&victim, path, options);
    struct fl_pager *connection = pager_connect(path, 60);
    wait_until(&victim, scanned_by_zap, 60, "a scan by the next pager");
    check_put_back("a pager by zap has come after a killed one by damon");
    fl_pager_close(connection);
    pager_kill(pager);
    victim_end(&victim);

    victim = victim_start(2048, 2, seed);
    must_create(other);
    kill_damon_pager(&victim, path, DAMON_KDAMONDS "2/pid");
    fl_tidy_host();
    CHECK(damon_read_number(DAMON_KDAMONDS "2/pid") < 0, "the kdamond of a killed pager goes on");
    CHECK(!stat_is_on() && kdamonds() > 1, "put back while a living one needs it");
    victim_end(&victim);
    damon_field_destroy(other);
    check_put_back("after the living one has gone");

    victim = victim_start(2048, 2, seed);
    kill_damon_pager(&victim, path, DAMON_KDAMONDS "1/pid");
    victim_end(&victim);
    fl_tidy_host();
    check_put_back("nobody follows the killed pager");
}

static void test_pager_goes_on(uint64_t seed) {
    static const char *const options[] = {"--trackers", "damon,zap", "--scan-interval-ms", INTERVAL_MS, NULL};
    fflush(NULL);
    struct victim victim = victim_start(2048, 2, seed);
    char path[64];
    snprintf(path, sizeof(path), "/tmp/frostline-test-damon-%d.sock", (int)getpid());
    struct said said = said_open();
    said_begin(&said);
    pid_t pager = pager_start(&victim, path, options);
    said_end(&said);
    struct fl_pager *connection = pager_connect(path, 60);
    wait_until(&victim, scanned_by_damon, 60, "scans by damon");
    must_write(SLOT_STATE, "off");
    wait_until(&victim, zap_took_over, 60, "the next tracker");
    uint64_t scans = status_of(&victim).scans;
    for (unsigned i = 0; i < 600 && status_of(&victim).scans < scans + 2; i++)
        sleep_ms(100);
    CHECK(status_of(&victim).scans >= scans + 2, "no scans by the next tracker");
    check_put_back("after the pager gave damon up");
    fl_pager_close(connection);
    pager_kill(pager);
    victim_hold(&victim, true);
    CHECK(victim_verify(&victim, 60) == 0, "memory is damaged");
    victim_end(&victim);
    puts("a pager goes on with zap, and says so:");
    char *log = said_text(&said), words[64];
    snprintf(words, sizeof(words), "kdamond 1 on process %d)", (int)victim.pid);
    check_said(log, "\"damon_lost\"", "\"level\":\"warning\"",
               words); /* why: check_lost(); here it depends on the moment */
    check_said(log, "\"scan_void\"", "tracker damon on process", "no page got older");
    check_said(log, "\"tracker_chosen\"", "\"tracker\":\"zap\"", "\"before\":\"damon\"");
    free(log);
    said_close(&said);
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    need_damon();
    test_grain_is_said();
    has_stat = damon_write(DAMON_STAT, "Y") == 0;
    puts(has_stat ? "damon_stat is on" : "damon_stat not tried: this kernel has none");
    CHECK(kdamonds() == 0, "DAMON is set up by somebody else");
    struct damon_field *first = damon_field_make(4 * MIB, 1, DAMON_EXACT_MS, true);
    struct damon_field *second = damon_field_make(4 * MIB, 1, DAMON_EXACT_MS, true);
    test_two_at_once(first, second, &random);
    test_killed(first, second, &random);
    test_killed_early(first);
    test_stat_off_before(first);
    test_in_use(first);
    test_taken_away(first);
    test_pager_killed(first, random_next(&random));
    test_unmounted(first, &random);
    test_vmm_ends(second);
    test_pager_goes_on(random_next(&random));
    damon_field_end(first);
    puts("ok");
    return 0;
}
