/* SPDX-License-Identifier: Apache-2.0 */
#include "tracked_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>

#include "attach/inspect.h"

#define SECONDS 60u
#define SHOWN_MAX 8u
#define SCAN_TRIES 20u

const char *tracked_missing(const char *tracker) {
    static struct fl_tracker_probe probes[FL_TRACKERS];
    CHECK(fl_probe_trackers(0, probes) == 0, "fl_probe_trackers");
    for (uint32_t i = 0; i < FL_TRACKERS; i++)
        if (strcmp(fl_tracker_name(probes[i].tracker), tracker) == 0)
            return probes[i].possible ? NULL : probes[i].detail;
    return "this pager does not know it";
}

/* ---- scans ------------------------------------------------------------------------------------------------- */

/* The record of a scan that came since the last look. */
static bool find_scan(struct tracked_guest *guest, struct fl_record *out) {
    struct fl_record records[64];
    uint64_t lost;
    bool found = false;
    for (int count; (count = fl_view_records(guest->view, &guest->cursor, records, 64, &lost)) > 0 || lost;) {
        CHECK(lost == 0, "%llu records lost", (unsigned long long)lost);
        for (int i = 0; i < count; i++) {
            if (records[i].kind != FL_RECORD_SCAN)
                continue;
            CHECK(!found, "two scans where one was asked for");
            *out = records[i];
            found = true;
        }
    }
    return found;
}

static uint64_t failures_of(struct tracked_guest *guest) {
    return tracked_status(guest).scan_failures;
}

/* Ask for a scan, and wait so long for its record. False: it left none, because it was void or could only arm. */
static bool ask_scan(struct tracked_guest *guest, unsigned milliseconds, struct fl_record *out) {
    uint64_t failures = failures_of(guest);
    CHECK(pager_tell(guest->connection, (struct fl_command){.kind = FL_COMMAND_SCAN}).error == 0, "SCAN");
    for (unsigned i = 0; i < milliseconds; i++) {
        if (find_scan(guest, out))
            return true;
        if (i % 64 == 63 && failures_of(guest) != failures) {
            sleep_ms(100); /* a record comes after the failure of the same scan, if at all */
            return find_scan(guest, out);
        }
        sleep_ms(1);
    }
    return false;
}

/* Until a scan has been harvested and armed again; the pager's own are an hour apart. */
static void settle(struct tracked_guest *guest) {
    struct fl_record record;
    for (unsigned i = 0; i < SCAN_TRIES; i++) {
        uint64_t failures = failures_of(guest);
        if (ask_scan(guest, 3000, &record) && failures_of(guest) == failures) {
            memcpy(guest->ages, guest->vault.ages, guest->pages);
            memset(guest->touched, 0, guest->pages);
            return;
        }
    }
    CHECK(false, "%s: no scan in time", guest->tracker);
}

static void show(struct tracked_guest *guest, uint32_t page, const char *what) {
    if (guest->shown++ < SHOWN_MAX)
        printf("%s, scan %llu: page %u %s (age was %u, is %u, entry %llx)\n", guest->tracker,
               (unsigned long long)guest->score.scans, page, what, guest->ages[page], guest->vault.ages[page],
               (unsigned long long)atomic_load(&guest->vault.table[page]));
}

uint64_t tracked_scan(struct tracked_guest *guest) {
    struct fl_record record;
    uint64_t seen = 0, mismatches = 0, failures = failures_of(guest);
    guest->score.scans++;
    if (!ask_scan(guest, SECONDS * 1000, &record)) {
        CHECK(failures_of(guest) != failures, "%s: no scan in %u s", guest->tracker, SECONDS);
        CHECK(memcmp(guest->ages, guest->vault.ages, guest->pages) == 0, "ages have moved in a void scan");
        guest->score.voids++;
        for (uint32_t page = 0; page < guest->pages; page++)
            guest->there[page] |= guest->touched[page];
        settle(guest);
        return 0;
    }
    for (uint32_t page = 0; page < guest->pages; page++) {
        uint8_t was = guest->ages[page], is = guest->vault.ages[page];
        bool touched = guest->touched[page], zero = is == 0;
        guest->there[page] |= touched;
        if (!guest->there[page]) {
            CHECK(zero, "page %u was never touched and has age %u", page, is);
            continue;
        }
        seen += zero;
        guest->score.right += zero && touched;
        guest->score.wrong += zero && !touched;
        guest->score.missed += !zero && touched;
        mismatches += zero != touched;
        if (zero != touched)
            show(guest, page, zero ? "was not touched and is seen as touched" : "was touched and is not seen");
        CHECK(zero || is == (was == UINT8_MAX ? was : was + 1), "page %u: age was %u and is %u", page, was, is);
    }
    CHECK(record.pages == seen, "the scan counted %llu pages and %llu have age 0", (unsigned long long)record.pages,
          (unsigned long long)seen);
    memcpy(guest->ages, guest->vault.ages, guest->pages);
    memset(guest->touched, 0, guest->pages);
    if (failures_of(guest) != failures) { /* harvested, but not armed again */
        guest->score.voids++;
        settle(guest);
    }
    return mismatches;
}

struct fl_status tracked_status(struct tracked_guest *guest) {
    struct fl_status status;
    CHECK(fl_view_status(guest->view, &status) == 0, "fl_view_status");
    return status;
}

/* ---- pager ------------------------------------------------------------------------------------------------- */

static void open_vault(struct tracked_guest *guest) {
    struct fl_refused why;
    uint64_t start;
    int fd, pid = (int)guest->vmm.pid;
    CHECK(fl_proc_start_time(pid, &start) == 0 && fl_vmm_open_vault(pid, O_RDONLY, &fd) == 0, "no vault");
    CHECK(fl_vault_map(fd, false, pid, start, &guest->vault, &why) == 0, "%s", why.detail);
    CHECK(fl_view_open(pid, &guest->view) == 0, "fl_view_open");
    struct fl_vault_header *header = guest->vault.header;
    CHECK(atomic_load(&header->region_count) == 1 && header->regions[0].first_page == 0 &&
              header->regions[0].length == kvm_guest_bytes(guest->vmm.guest),
          "the pager serves something else than guest memory");
}

void tracked_start_pager(struct tracked_guest *guest) {
    const char *const more[] = {"--scan-interval-ms", "3600000", "--trackers", guest->tracker,
                                "--log-level",        "warning", NULL};
    guest->pager = pager_start(&guest->victim, guest->socket_path, more);
    guest->connection = pager_connect(guest->socket_path, SECONDS);
    bool first = !guest->view;
    if (first) {
        open_vault(guest);
        settle(guest);
    }
    CHECK(strcmp(fl_tracker_name(tracked_status(guest).tracker), guest->tracker) == 0, "tracker %s is in use, not %s",
          fl_tracker_name(tracked_status(guest).tracker), guest->tracker);
}

void tracked_kill_pager(struct tracked_guest *guest) {
    pager_kill(guest->pager);
    fl_pager_close(guest->connection);
    guest->connection = NULL;
}

/* ---- guest ------------------------------------------------------------------------------------------------- */

struct tracked_guest tracked_start(const struct tracked_options *options) {
    struct tracked_guest guest = {.tracker = options->tracker, .pages = (uint32_t)(options->bytes / KVM_GUEST_PAGE)};
    guest.vmm = kvm_vmm_start(&(struct kvm_guest_config){
        .bytes = options->bytes, .vcpus = options->vcpus, .large_pages = options->large_pages});
    guest.victim.pid = guest.vmm.pid;
    snprintf(guest.socket_path, sizeof(guest.socket_path), "/tmp/fl-exact-%d.sock", (int)getpid());
    guest.ages = calloc(guest.pages, 1);
    guest.touched = calloc(guest.pages, 1);
    guest.there = calloc(guest.pages, 1);
    uint32_t filled = guest.pages - options->empty_pages, *generations = malloc(guest.pages * sizeof(*generations));
    CHECK(guest.ages && guest.touched && guest.there && generations, "no memory");
    if (options->prepare)
        options->prepare(&guest.vmm);
    for (uint32_t page = 0; page < filled; page++)
        generations[page] = 1;
    kvm_vmm_fill(&guest.vmm, kvm_vmm_host(&guest.vmm), 1, 0, filled, generations, SECONDS);
    memset(guest.there, 1, filled);
    free(generations);
    tracked_start_pager(&guest);
    return guest;
}

void tracked_end(struct tracked_guest *guest) {
    CHECK(pager_tell(guest->connection, (struct fl_command){.kind = FL_COMMAND_DETACH}).error == 0, "detach");
    fl_pager_close(guest->connection);
    CHECK(pager_wait(guest->pager, SECONDS) == FL_EXIT_OK, "detach");
    fl_view_close(guest->view);
    fl_vault_close(&guest->vault);
    kvm_vmm_end(&guest->vmm);
    free(guest->ages);
    free(guest->touched);
    free(guest->there);
}

static void begin_touches(struct tracked_guest *guest, uint32_t worker, const uint32_t *pages, uint32_t count,
                          uint64_t *random) {
    struct kvm_touch *script = calloc(count, sizeof(*script));
    CHECK(script, "no memory");
    for (uint32_t i = 0; i < count; i++) {
        uint64_t choice = random_next(random);
        script[i] = (struct kvm_touch){.page = pages[i],
                                       .word = (uint16_t)((choice >> 8) % KVM_GUEST_WORDS),
                                       .kind = (uint16_t)(choice % 3), /* LOAD, STORE, ADD */
                                       .times = 1 + (uint32_t)(choice >> 32) % 3,
                                       .value = choice};
        guest->touched[pages[i]] = 1;
    }
    kvm_vmm_begin(&guest->vmm, worker, script, count, 1);
    free(script);
}

void tracked_touch(struct tracked_guest *guest, int worker, const uint32_t *pages, uint32_t count, uint64_t *random) {
    uint32_t workers = worker < 0 ? kvm_guest_workers(guest->vmm.guest) : 1, first = worker < 0 ? 0 : (uint32_t)worker;
    while (count) {
        uint32_t part = count / workers < KVM_SCRIPT_MAX ? count / workers : KVM_SCRIPT_MAX;
        for (uint32_t i = 0; i < workers; i++) {
            uint32_t now = i == 0 && part < KVM_SCRIPT_MAX ? count - part * (workers - 1) : part;
            begin_touches(guest, first + i, pages, now, random);
            pages += now;
            count -= now;
        }
        for (uint32_t i = 0; i < workers; i++) {
            struct kvm_outcome outcome = kvm_vmm_wait(&guest->vmm, first + i, NULL, 0, SECONDS);
            CHECK(outcome.error == 0, "worker %u: %s", first + i, outcome.why);
        }
    }
}

/* ---- judgement --------------------------------------------------------------------------------------------- */

void tracked_judge(struct tracked_guest *guest, const char *what, uint64_t least_ppm) {
    const struct tracked_score s = guest->score;
    uint64_t seen = s.right + s.wrong, touched = s.right + s.missed;
    printf("%-5s %s: %llu scans, %llu of them void, %llu pages touched, recall %.4f %%, precision %.4f %%\n",
           guest->tracker, what, (unsigned long long)s.scans, (unsigned long long)s.voids, (unsigned long long)touched,
           touched ? 100.0 * (double)s.right / (double)touched : 100,
           seen ? 100.0 * (double)s.right / (double)seen : 100);
    CHECK(s.missed * 1000000 <= touched * (1000000 - least_ppm), "%s: %llu of %llu touches missed", guest->tracker,
          (unsigned long long)s.missed, (unsigned long long)touched);
    CHECK(s.wrong * 1000000 <= seen * (1000000 - least_ppm), "%s: %llu of %llu seen were none", guest->tracker,
          (unsigned long long)s.wrong, (unsigned long long)seen);
    CHECK(s.voids <= s.scans / 4 + 1, "%s: too many void scans to tell", guest->tracker);
    guest->score = (struct tracked_score){0};
}
