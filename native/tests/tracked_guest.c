/* SPDX-License-Identifier: Apache-2.0 */
#include "tracked_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "host_memory.h"
#include "served_vm.h"
#include "track/track.h"

#define SECONDS 60u
#define SHOWN_MAX 8u
#define LATE_MS 200u
#define SCAN_TRIES 20u
#define PAGEMAP_IN_USE (UINT64_C(3) << 62) /* present, or in its way: swapped, being moved */

/* ---- scans ------------------------------------------------------------------------------------------------- */

/* How many scans there were since the last look, and the record of the last of them. */
static unsigned find_scans(struct tracked_guest *guest, struct fl_record *out) {
    struct fl_record records[64];
    uint64_t lost;
    unsigned found = 0;
    for (int count; (count = fl_view_records(guest->view, &guest->cursor, records, 64, &lost)) > 0 || lost;) {
        CHECK(lost == 0, "%llu records lost", (unsigned long long)lost);
        for (int i = 0; i < count; i++) {
            if (records[i].kind != FL_RECORD_SCAN)
                continue;
            found++;
            *out = records[i];
        }
    }
    return found;
}

static void take_ages(struct tracked_guest *guest) {
    memcpy(guest->ages, guest->vault.ages, guest->pages);
    memset(guest->touched, TRACKED_UNTOUCHED, guest->pages);
    memset(guest->by_vcpu, 0, guest->pages);
    memset(guest->mapped, TRACKED_NOT_LOOKED_AT, guest->pages);
}

static uint64_t failures_of(struct tracked_guest *guest) {
    return tracked_status(guest).scan_failures;
}

/* Ask for a scan, and wait for its record. False: it left none, because it was void or could only arm. */
static bool ask_scan(struct tracked_guest *guest, struct fl_record *out) {
    uint64_t failures = failures_of(guest), arm_ns = tracked_status(guest).arm_ns;
    CHECK(pager_tell(guest->connection, (struct fl_command){.kind = FL_COMMAND_SCAN}).error == 0, "SCAN");
    for (unsigned i = 0; i < SECONDS * 1000; i++) {
        unsigned found = find_scans(guest, out);
        if (!found && i % 16 == 15 && (failures_of(guest) != failures || tracked_status(guest).arm_ns != arm_ns)) {
            wait_for_round(&guest->vault); /* a record comes last, if at all */
            found = find_scans(guest, out);
            if (!found)
                return false;
        }
        CHECK(found <= 1, "%s: %u scans where one was asked for", guest->tracker, found);
        if (found)
            return true;
        sleep_ms(1);
    }
    CHECK(false, "%s: no scan in %u s", guest->tracker, SECONDS);
    return false;
}

/* The one that a pager makes by itself when it starts on a VM. */
static void wait_for_first_scan(struct tracked_guest *guest) {
    for (unsigned i = 0; i < SECONDS * 1000 && !tracked_status(guest).arm_ns && !failures_of(guest); i++)
        sleep_ms(1);
    wait_for_round(&guest->vault);
}

/*
 * Until a scan has been harvested and armed again, and no other is under way: a pager scans once by itself when it
 * starts on a VM, and then every hour.
 */
static void settle(struct tracked_guest *guest) {
    struct fl_record record;
    uint64_t until = fl_now() + SECONDS * FL_NS_PER_SECOND; /* zap's main thread may get no CPU for a while */
    for (unsigned i = 0; i < SCAN_TRIES || fl_now() < until; i++) {
        uint64_t failures = failures_of(guest);
        if (!ask_scan(guest, &record) || failures_of(guest) != failures)
            continue;
        do
            sleep_ms(LATE_MS);
        while (find_scans(guest, &record));
        take_ages(guest);
        return;
    }
    CHECK(false, "%s: every scan is void", guest->tracker);
}

static void show(struct tracked_guest *guest, uint32_t page, const char *what) {
    static const char *const mapped[] = {[TRACKED_NOT_LOOKED_AT] = "",
                                         [TRACKED_MAPPED] = ", mapped by the VMM when the script had ended",
                                         [TRACKED_NOT_MAPPED] = ", NOT mapped by the VMM when the script had ended"};
    if (guest->shown++ < SHOWN_MAX)
        printf("%s, scan %llu: page %u %s (age was %u, is %u, entry %llx%s)\n", guest->tracker,
               (unsigned long long)guest->score.scans, page, what, guest->ages[page], guest->vault.ages[page],
               (unsigned long long)atomic_load(&guest->vault.table[page]), mapped[guest->mapped[page]]);
}

/* Of one page that is in the file. True: seen exactly when it was touched, or nobody can tell. */
static bool compare_page(struct tracked_guest *guest, uint32_t page) {
    uint8_t was = guest->ages[page], is = guest->vault.ages[page];
    enum tracked_touch touch = (enum tracked_touch)guest->touched[page];
    bool touched = touch == TRACKED_TOUCHED, seen = is == 0, older = is == (was == UINT8_MAX ? was : was + 1);
    if (touch == TRACKED_UNSURE) { /* 1: its fault was seen, and the scan did not see it again */
        CHECK(is <= 1 || older, "page %u: age was %u and is %u", page, was, is);
        guest->score.unsure++;
        guest->score.unsure_seen += is <= 1;
        return true;
    }
    CHECK(seen || older, "page %u: age was %u and is %u", page, was, is);
    guest->score.right += seen && touched;
    guest->score.wrong += seen && !touched;
    guest->score.missed += !seen && touched;
    guest->score.vmm_right += seen && touched && !guest->by_vcpu[page];
    guest->score.vmm_missed += !seen && touched && !guest->by_vcpu[page];
    if (seen != touched)
        show(guest, page, seen ? "was not touched and is seen as touched" : "was touched and is not seen");
    return seen == touched;
}

static uint64_t compare(struct tracked_guest *guest, const struct fl_record *record) {
    uint64_t seen = 0, mismatches = 0;
    for (uint32_t page = 0; page < guest->pages; page++) {
        guest->there[page] |= guest->touched[page] != TRACKED_UNTOUCHED;
        if (guest->there[page]) {
            seen += guest->vault.ages[page] == 0;
            mismatches += !compare_page(guest, page);
        } else {
            CHECK(guest->vault.ages[page] == 0, "page %u was never touched and has an age", page);
        }
    }
    CHECK(record->pages == seen, "the scan counted %llu pages and %llu have age 0", (unsigned long long)record->pages,
          (unsigned long long)seen);
    take_ages(guest);
    return mismatches;
}

static void void_scan(struct tracked_guest *guest) {
    guest->score.voids++;
    for (uint32_t page = 0; page < guest->pages; page++)
        guest->there[page] |= guest->touched[page] != TRACKED_UNTOUCHED;
    settle(guest);
}

uint64_t tracked_scan(struct tracked_guest *guest) {
    struct fl_record record;
    uint64_t failures = failures_of(guest), mismatches;
    guest->score.scans++;
    if (!ask_scan(guest, &record)) {
        CHECK(failures_of(guest) != failures, "%s: a scan without a record", guest->tracker);
        for (uint32_t page = 0; page < guest->pages; page++) /* 0: by its fault */
            CHECK(guest->vault.ages[page] == guest->ages[page] || (guest->touched[page] && !guest->vault.ages[page]),
                  "page %u: its age has moved in a void scan", page);
        void_scan(guest);
        return 0;
    }
    mismatches = compare(guest, &record);
    if (failures_of(guest) != failures) /* harvested, but not armed again */
        void_scan(guest);
    return mismatches;
}

struct fl_status tracked_status(struct tracked_guest *guest) {
    struct fl_status status;
    CHECK(fl_view_status(guest->view, &status) == 0, "fl_view_status");
    return status;
}

/* ---- pager ------------------------------------------------------------------------------------------------- */

static void open_vault(struct tracked_guest *guest) {
    guest->vault = vault_of(guest->vmm.pid, false);
    CHECK(fl_view_open((int)guest->vmm.pid, &guest->view) == 0, "fl_view_open");
    struct fl_vault_header *header = guest->vault.header;
    CHECK(atomic_load(&header->region_count) == 1 && header->regions[0].first_page == 0 &&
              header->regions[0].length == kvm_guest_bytes(guest->vmm.guest),
          "the pager serves something else than guest memory");
}

static bool outlives_pager(const char *tracker) {
    for (uint32_t i = 0; i < FL_TRACKERS; i++)
        if (strcmp(fl_tracker_name(fl_trackers[i]->kind), tracker) == 0)
            return fl_trackers[i]->outlives_pager;
    return false;
}

void tracked_start_pager(struct tracked_guest *guest) {
    const char *const more[] = {"--scan-interval-ms", "3600000", "--trackers", guest->tracker,
                                "--log-level",        "warning", NULL};
    guest->pager = pager_start(&guest->victim, guest->socket_path, more);
    guest->connection = pager_connect(guest->socket_path, SECONDS);
    if (!guest->view) {
        open_vault(guest);
        wait_for_first_scan(guest);
        settle(guest);
    } else if (!outlives_pager(guest->tracker)) { /* the first scan only arms */
        guest->score.scans++;
        void_scan(guest);
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
    if (strcmp(options->tracker, "idle") == 0 || strcmp(options->tracker, "damon") == 0)
        host_stop_balancing();
    guest.vmm = kvm_vmm_start(&(struct kvm_guest_config){
        .bytes = options->bytes, .vcpus = options->vcpus, .large_pages = options->large_pages});
    guest.victim.pid = guest.vmm.pid;
    snprintf(guest.socket_path, sizeof(guest.socket_path), "/tmp/fl-exact-%d.sock", (int)getpid());
    guest.ages = calloc(guest.pages, 1);
    guest.touched = calloc(guest.pages, 1);
    guest.there = calloc(guest.pages, 1);
    guest.by_vcpu = calloc(guest.pages, 1);
    guest.mapped = calloc(guest.pages, 1);
    uint32_t filled = guest.pages - options->empty_pages, *generations = malloc(guest.pages * sizeof(*generations));
    CHECK(guest.ages && guest.touched && guest.there && guest.by_vcpu && guest.mapped && generations, "no memory");
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
    free(guest->by_vcpu);
    free(guest->mapped);
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
        guest->touched[pages[i]] = TRACKED_TOUCHED;
        guest->by_vcpu[pages[i]] |= worker != kvm_vmm_host(&guest->vmm);
    }
    kvm_vmm_begin(&guest->vmm, worker, script, count, 1);
    free(script);
}

/* Before any scan: whether a touch that no scan sees had come to the VMM's page table at all. */
static void note_mapped(struct tracked_guest *guest, const uint32_t *pages, uint32_t count) {
    uint64_t address = (uint64_t)(uintptr_t)kvm_guest_memory(guest->vmm.guest), entry;
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)guest->vmm.pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    for (uint32_t i = 0; i < count; i++) {
        off_t at = (off_t)((address / KVM_GUEST_PAGE + pages[i]) * sizeof(entry));
        CHECK(pread(fd, &entry, sizeof(entry), at) == sizeof(entry), "%s: %s", path, strerror(errno));
        guest->mapped[pages[i]] = entry & PAGEMAP_IN_USE ? TRACKED_MAPPED : TRACKED_NOT_MAPPED;
    }
    close(fd);
}

void tracked_touch(struct tracked_guest *guest, int worker, const uint32_t *pages, uint32_t count, uint64_t *random) {
    uint32_t workers = worker < 0 ? kvm_guest_workers(guest->vmm.guest) : 1, first = worker < 0 ? 0 : (uint32_t)worker;
    const uint32_t *all = pages, sum = count;
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
    note_mapped(guest, all, sum);
}

/* ---- judgement --------------------------------------------------------------------------------------------- */

void tracked_judge(struct tracked_guest *guest, const char *what, uint64_t least_ppm) {
    const struct tracked_score s = guest->score;
    uint64_t seen = s.right + s.wrong, touched = s.right + s.missed;
    printf("%-5s %s: %llu scans, %llu of them void, %llu pages touched, recall %.4f %%, precision %.4f %%\n",
           guest->tracker, what, (unsigned long long)s.scans, (unsigned long long)s.voids, (unsigned long long)touched,
           touched ? 100.0 * (double)s.right / (double)touched : 100,
           seen ? 100.0 * (double)s.right / (double)seen : 100);
    if (s.vmm_right + s.vmm_missed)
        printf("      of %llu that the VMM alone touched, %llu missed\n",
               (unsigned long long)(s.vmm_right + s.vmm_missed), (unsigned long long)s.vmm_missed);
    if (s.unsure)
        printf("      of %llu pages that nobody can expect to be seen, %llu were\n", (unsigned long long)s.unsure,
               (unsigned long long)s.unsure_seen);
    CHECK(s.missed * 1000000 <= touched * (1000000 - least_ppm), "%s: %llu of %llu touches missed", guest->tracker,
          (unsigned long long)s.missed, (unsigned long long)touched);
    CHECK(s.wrong * 1000000 <= seen * (1000000 - least_ppm), "%s: %llu of %llu seen were none", guest->tracker,
          (unsigned long long)s.wrong, (unsigned long long)seen);
    CHECK(s.voids <= s.scans / 2 + 1, "%s: too many void scans to tell", guest->tracker);
    guest->score = (struct tracked_score){0};
}
