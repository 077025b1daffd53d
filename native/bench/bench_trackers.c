/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What each tracker that this kernel has costs, and how exact it is: on a guest that touches exactly the pages it is told
 * to, the same for each tracker. A line of JSON a measurement on standard output.
 *
 *   bench_trackers probe
 *   bench_trackers [--guest plain|kvm] [--trackers NAME,...] --mib N --touched PAGES,... [--rounds N] [--cpu N]
 *                  [--mappers N] [--heat MIB] [--steady SECONDS [--windows N]]
 *
 * A round: other pages are chosen; arm, then two passes of the guest over them. The second is what they cost when
 * nothing is armed. A scan (its arming is timed, with the look before it where the tracker sweeps), one pass (what it
 * takes longer is the guest's part), another scan (its harvest is timed), and what was harvested is compared with what
 * was touched. All times are in ns.
 *
 * --steady: windows of so many seconds in which the guest goes round in the pages without a pause. In every other one there
 * is a scan at its beginning. What is said is touches a window of the guest's own CPU time.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/serve.h"
#include "swap/fault.h"
#include "track/track.h"
#include "trackers/guest.h"

#define TOUCHED_MAX 16u
#define ROUNDS_MAX 64u
#define WINDOWS_MAX 32u
#define VOID_TRIES 20u /* scans that an error made void, in a row */
#define VOID_PAUSE_NS (100 * FL_NS_PER_MS)
#define MIB_MAX 65536u
#define PAGES_OF_MIB 256u

struct asked {
    bool kvm;
    struct fl_tracker_list trackers;
    uint32_t pages, rounds, windows, mappers, steady_seconds;
    uint64_t heat_bytes;
    int cpu;
    uint32_t touched_count;
    uint32_t touched[TOUCHED_MAX];
};

struct scan { /* what one arming or one harvest took */
    uint64_t wall_ns, stop_ns;
};

struct run { /* a guest with a tracker on it */
    const struct asked *asked;
    const struct fl_tracker_ops *ops;
    struct guest *guest;
    struct fl_vm *vm;
    struct fl_fault_server *faults;
    struct fl_tracker *tracker;
    uint64_t right, missed, wrong; /* pages seen and touched, touched and not seen, seen and not touched */
};

static _Noreturn void fail(const char *what, int error) {
    fprintf(stderr, "bench_trackers: %s: %s\n", what, strerror(-error));
    exit(1);
}

/* ---- one scan ------------------------------------------------------------------------------------------------ */

static int arm(struct run *run, struct scan *out) {
    uint64_t start_ns = fl_now();
    int error = run->ops->arm(run->tracker, &out->stop_ns);
    out->wall_ns = fl_now() - start_ns;
    return error;
}

static void compare(struct run *run, uint32_t region, uint64_t first, uint32_t count, const uint64_t *accessed) {
    for (uint32_t i = 0; i < count; i++) {
        bool seen = accessed[i / 64] >> i % 64 & 1;
        uint32_t page = guest_page_at(run->guest, fl_address_of_page(run->vm, region, first + i));
        bool touched = page != UINT32_MAX && guest_touches(run->guest, page);
        run->right += seen && touched;
        run->wrong += seen && !touched;
        run->missed += !seen && touched;
    }
}

/* Into one bitmap of the whole guest, so that comparing is not part of what is timed. */
static int harvest_all(struct run *run, uint64_t *accessed) {
    int error = run->ops->collect ? run->ops->collect(run->tracker) : 0;
    for (uint32_t i = 0; i < fl_region_count(run->vm) && !error; i++) {
        uint64_t first = fl_region(run->vm, i)->first_page, pages = fl_region_pages(run->vm, i);
        for (uint64_t at = 0; at < pages && !error; at += FL_SCAN_PAGES) {
            uint32_t count = pages - at < FL_SCAN_PAGES ? (uint32_t)(pages - at) : FL_SCAN_PAGES;
            error = run->ops->harvest(run->tracker, i, first + at, count, accessed);
            accessed += FL_SCAN_PAGES / 64;
        }
    }
    return error;
}

/* And armed, too, if the tracker sweeps. */
static int harvest(struct run *run, struct scan *armed, struct scan *out) {
    size_t windows = guest_pages(run->guest) / FL_SCAN_PAGES + FL_MAX_REGIONS;
    uint64_t *accessed = calloc(windows, FL_SCAN_PAGES / 8), *at = accessed;
    if (!accessed)
        fail("memory", -ENOMEM);
    memset(accessed, 0, windows * FL_SCAN_PAGES / 8); /* its pages are there before the clock runs */
    uint64_t start_ns = fl_now();
    int error = run->ops->sweep ? run->ops->sweep(run->tracker, &armed->stop_ns) : 0;
    uint64_t swept_ns = fl_now();
    armed->wall_ns = swept_ns - start_ns;
    if (!error)
        error = harvest_all(run, accessed);
    out->wall_ns = fl_now() - swept_ns;
    run->right = run->missed = run->wrong = 0;
    for (uint32_t i = 0; i < fl_region_count(run->vm) && !error; i++) {
        uint64_t first = fl_region(run->vm, i)->first_page, pages = fl_region_pages(run->vm, i);
        for (uint64_t done = 0; done < pages; done += FL_SCAN_PAGES, at += FL_SCAN_PAGES / 64)
            compare(run, i, first + done, pages - done < FL_SCAN_PAGES ? (uint32_t)(pages - done) : FL_SCAN_PAGES, at);
    }
    free(accessed);
    return error;
}

/* ---- setting up ---------------------------------------------------------------------------------------------- */

static struct run begin(const struct asked *asked, const struct fl_tracker_ops *ops) {
    static struct fl_vm vm;
    struct fl_options options = {.fault_threads = 2, .scan_interval_ms = 10000, .stall_target_permille = 1000};
    struct fl_refused why = {0};
    struct run run = {.asked = asked, .ops = ops, .vm = &vm};
    memset(&vm, 0, sizeof(vm));
    run.guest = guest_start(asked->kvm, asked->pages, asked->cpu);
    guest_heat(run.guest, asked->heat_bytes);
    options.vmm_pid = (int)guest_pid(run.guest);
    options.trackers = (struct fl_tracker_list){.count = 1, .ops = {ops}};
    if (fl_serve_begin(&vm, &options, &why)) {
        fprintf(stderr, "bench_trackers: cannot attach: %s\n", why.detail);
        exit(1);
    }
    int error = fl_fault_start(&vm, options.fault_threads, &run.faults);
    if (error)
        fail("fault threads", error);
    fl_serve_began(&vm, fl_now());
    if (asked->mappers)
        guest_map_elsewhere(run.guest, asked->mappers);
    error = ops->create(&vm, run.faults, &run.tracker);
    if (error)
        fail(fl_tracker_name(ops->kind), error);
    return run;
}

static void end(struct run *run) {
    run->ops->destroy(run->tracker);
    guest_end(run->guest);
    fl_fault_stop(run->faults);
    fl_serve_close(run->vm);
}

/* ---- rounds -------------------------------------------------------------------------------------------------- */

struct round {
    struct scan arm, harvest;
    uint64_t plain_ns, armed_ns, right, missed, wrong;
    uint64_t grain; /* pages of which one spoke for all; 1: exact to a page */
};

static int measure(struct run *run, uint64_t seed, uint32_t touched, struct round *out) {
    struct scan other;
    guest_choose(run->guest, seed, touched);
    int error = arm(run, &other);
    (void)guest_pass(run->guest);
    out->plain_ns = guest_pass(run->guest);
    if (!error) /* as in a scan: what arming looks for is what was touched since */
        error = harvest(run, &out->arm, &other);
    if (!error && !run->ops->sweep)
        error = arm(run, &out->arm);
    out->grain = run->ops->grain ? run->ops->grain(run->tracker) : 1;
    out->armed_ns = guest_pass(run->guest);
    if (!error)
        error = harvest(run, &other, &out->harvest);
    out->right = run->right;
    out->missed = run->missed;
    out->wrong = run->wrong;
    return error;
}

static void measure_well(struct run *run, uint64_t seed, uint32_t touched, struct round *out) {
    int error = -EAGAIN;
    for (uint32_t i = 0; i < VOID_TRIES && error; i++) {
        error = measure(run, seed, touched, out);
        if (error) {
            fprintf(stderr, "bench_trackers: %s: a void scan: %s\n", fl_tracker_name(run->ops->kind), strerror(-error));
            fl_sleep_ns(VOID_PAUSE_NS);
        }
    }
    if (error)
        fail(fl_tracker_name(run->ops->kind), error);
}

static void say_head(const struct run *run, const char *kind, uint32_t touched) {
    printf("{\"kind\":\"%s\",\"guest\":\"%s\",\"tracker\":\"%s\",\"pages\":%u,\"touched\":%u,\"mappers\":%u", kind,
           run->asked->kvm ? "kvm" : "plain", fl_tracker_name(run->ops->kind), run->asked->pages, touched,
           run->asked->mappers);
}

static void say(const char *name, const uint64_t *values, uint32_t count, size_t stride) {
    printf(",\"%s\":[", name);
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t *value = (const uint64_t *)(const void *)((const uint8_t *)values + i * stride);
        printf("%s%llu", i ? "," : "", (unsigned long long)*value);
    }
    putchar(']');
}

static void measure_rounds(struct run *run, uint32_t touched) {
    struct round rounds[ROUNDS_MAX];
    uint32_t count = run->asked->rounds;
    memset(rounds, 0, sizeof(rounds));
    for (uint32_t i = 0; i < count; i++)
        measure_well(run, i + 1, touched, &rounds[i]);
    say_head(run, "rounds", touched);
#define SAY(name, field) say(name, &rounds[0].field, count, sizeof(rounds[0]))
    SAY("arm_ns", arm.wall_ns);
    SAY("stop_ns", arm.stop_ns);
    SAY("harvest_ns", harvest.wall_ns);
    SAY("plain_ns", plain_ns);
    SAY("armed_ns", armed_ns);
    SAY("right", right);
    SAY("missed", missed);
    SAY("wrong", wrong);
    SAY("grain", grain);
#undef SAY
    puts("}");
    fflush(stdout);
}

/* ---- a guest that does not rest ------------------------------------------------------------------------------ */

static void measure_steady(struct run *run, uint32_t touched) {
    const struct asked *asked = run->asked;
    uint64_t scanned[WINDOWS_MAX], alone[WINDOWS_MAX];
    uint32_t voids = 0; /* scans that came to nothing; a pager would go on to the next, too */
    struct scan one;
    guest_choose(run->guest, 1, touched);
    int first = arm(run, &one);
    if (first)
        fail(fl_tracker_name(run->ops->kind), first);
    (void)guest_pass(run->guest);
    guest_roam(run->guest);
    for (uint32_t i = 0; i < 2 * asked->windows; i++) {
        uint64_t start_ns = fl_now(), before = guest_touched(run->guest), cpu_ns = guest_cpu_ns(run->guest);
        int error = i % 2 ? harvest(run, &one, &one) : 0;
        int armed = i % 2 && (error || !run->ops->sweep) ? arm(run, &one) : 0;
        error = error ? error : armed;
        if (error == -ENODEV || error == -ESRCH)
            fail(fl_tracker_name(run->ops->kind), error);
        voids += error != 0;
        uint64_t took_ns = fl_now() - start_ns, window_ns = asked->steady_seconds * FL_NS_PER_SECOND;
        fl_sleep_ns(took_ns < window_ns ? window_ns - took_ns : 0);
        uint64_t done = guest_touched(run->guest) - before;
        cpu_ns = guest_cpu_ns(run->guest) - cpu_ns;
        /* In its CPU time, so that only what is done to the guest counts, and not what else the machine does. */
        uint64_t length_ns = cpu_ns ? cpu_ns : fl_now() - start_ns;
        (i % 2 ? scanned : alone)[i / 2] = (uint64_t)((double)done * (double)window_ns / (double)length_ns);
    }
    guest_rest(run->guest);
    say_head(run, "steady", touched);
    printf(",\"window_seconds\":%u,\"voids\":%u", asked->steady_seconds, voids);
    say("scanned", scanned, asked->windows, sizeof(*scanned));
    say("alone", alone, asked->windows, sizeof(*alone));
    puts("}");
    fflush(stdout);
}

/* ---- what is asked ------------------------------------------------------------------------------------------- */

static void print_probe(void) {
    struct fl_tracker_probe probes[FL_TRACKERS];
    int error = fl_probe_trackers(0, 0, 0, probes);
    if (error)
        fail("probe", error);
    for (uint32_t i = 0; i < FL_TRACKERS && probes[i].tracker; i++)
        printf("{\"kind\":\"probe\",\"tracker\":\"%s\",\"possible\":%s,\"detail\":\"%s\"}\n",
               fl_tracker_name(probes[i].tracker), probes[i].possible ? "true" : "false", probes[i].detail);
}

static bool parse_touched(struct asked *asked, const char *text) {
    while (asked->touched_count < TOUCHED_MAX) {
        char *end;
        asked->touched[asked->touched_count++] = (uint32_t)strtoul(text, &end, 10);
        if (end == text || (*end && *end != ','))
            return false;
        if (!*end)
            return true;
        text = end + 1;
    }
    return false;
}

static bool parse(int argc, char **argv, struct asked *asked) {
    static const struct option known[] = {
        {"guest", required_argument, NULL, 'g'},
        {"trackers", required_argument, NULL, 't'},
        {"mib", required_argument, NULL, 'm'},
        {"touched", required_argument, NULL, 'n'},
        {"rounds", required_argument, NULL, 'r'},
        {"cpu", required_argument, NULL, 'c'},
        {"mappers", required_argument, NULL, 'p'},
        {"heat", required_argument, NULL, 'h'},
        {"steady", required_argument, NULL, 's'},
        {"windows", required_argument, NULL, 'w'},
        {0},
    };
    *asked = (struct asked){.rounds = 5, .windows = 3, .cpu = -1};
    bool fine = fl_tracker_list_parse("auto", &asked->trackers);
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        uint32_t number = optarg ? (uint32_t)strtoul(optarg, NULL, 10) : 0;
        if (option == 'g') {
            asked->kvm = strcmp(optarg, "kvm") == 0;
            fine &= asked->kvm || strcmp(optarg, "plain") == 0;
        } else if (option == 't') {
            fine &= fl_tracker_list_parse(optarg, &asked->trackers);
        } else if (option == 'm') {
            fine &= number <= MIB_MAX;
            asked->pages = number * PAGES_OF_MIB;
        } else if (option == 'n') {
            fine &= parse_touched(asked, optarg);
        } else if (option == 'r') {
            asked->rounds = number;
        } else if (option == 'c') {
            asked->cpu = atoi(optarg);
        } else if (option == 'p') {
            asked->mappers = number;
        } else if (option == 'h') {
            asked->heat_bytes = (uint64_t)number << 20;
        } else if (option == 's') {
            asked->steady_seconds = number;
        } else if (option == 'w') {
            asked->windows = number;
        } else {
            return false;
        }
    }
    for (uint32_t i = 0; i < asked->touched_count; i++)
        fine &= asked->touched[i] <= asked->pages;
    return fine && optind == argc && asked->pages && asked->touched_count && asked->rounds &&
           asked->rounds <= ROUNDS_MAX && asked->windows && asked->windows <= WINDOWS_MAX;
}

static void measure_tracker(const struct asked *asked, const struct fl_tracker_ops *ops) {
    struct run run = begin(asked, ops);
    for (uint32_t i = 0; i < asked->touched_count; i++) {
        if (asked->steady_seconds)
            measure_steady(&run, asked->touched[i]);
        else
            measure_rounds(&run, asked->touched[i]);
    }
    end(&run);
}

int main(int argc, char **argv) {
    struct asked asked;
    struct fl_kernel_features kernel;
    char detail[FL_DETAIL_BYTES];
    fl_log_setup(FL_LOG_WARNING, 0);
    if (argc == 2 && strcmp(argv[1], "probe") == 0) {
        print_probe();
        return 0;
    }
    if (!parse(argc, argv, &asked)) {
        fprintf(stderr,
                "usage: bench_trackers probe | [--guest plain|kvm] [--trackers NAME,...] --mib N --touched "
                "PAGES,... [--rounds N] [--cpu N] [--mappers N] [--heat MIB] [--steady SECONDS [--windows N]]\n");
        return 2;
    }
    int error = fl_probe_kernel(&kernel);
    if (error)
        fail("probe", error);
    for (uint32_t i = 0; i < asked.trackers.count; i++) {
        const struct fl_tracker_ops *ops = asked.trackers.ops[i];
        if (ops->probe(&(const struct fl_tracked){0}, &kernel, detail, sizeof(detail)))
            measure_tracker(&asked, ops);
        else
            fprintf(stderr, "bench_trackers: %s is not possible here: %s\n", fl_tracker_name(ops->kind), detail);
    }
    return 0;
}
