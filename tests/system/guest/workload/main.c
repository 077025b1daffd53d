/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest-workload: the only program of a test guest.
 *
 *   as init                          settings come from fl.NAME=VALUE on the kernel command line
 *   --process NAME=VALUE ...         the same as an ordinary process, commands on stdin
 *   --dump FIRST COUNT GENERATION NAME=VALUE ...
 *                                    write those pages' contents to stdout
 *
 * Commands, one a line: verify N | grow N MIB | shrink N MIB (N: a number that shows as "jobs_done"),
 * run, stop, where PAGE, poweroff, and NAME VALUE for every live setting.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "area.h"
#include "boot.h"
#include "console.h"
#include "settings.h"
#include "work.h"

enum {
    LINE_BYTES = 256,
    CMDLINE_BYTES = 4096,
    PAGES_PER_MIB = (1 << 20) / PAGE_BYTES,
    /* Address space past what is filled, for `grow`: memory may be plugged in later. */
    GROWTH_MIB = 4096,
};

static struct settings settings;
static struct area area;
static struct work work = {.settings = &settings, .area = &area};
static bool is_init;

static void finish(void) {
    console_line("{\"event\":\"poweroff\"}");
    if (is_init)
        boot_power_off();
    exit(0);
}

static void print_status(void) {
    struct sysinfo memory = {0};
    /* Before all else: whoever sees a job done here must see the errors it found. */
    long jobs_done = work.jobs_done;

    sysinfo(&memory);
    console_line("{\"round\":%llu,\"filled_pages\":%llu,\"checked_pages\":%llu,\"writes\":%llu,\"errors\":%llu,"
                 "\"phase\":\"%s\",\"jobs_done\":%ld,\"fill_ms\":%llu,\"verify_ms\":%llu,\"slowest_us\":%llu,"
                 "\"writers\":%ld,\"rate\":%ld,\"uptime_s\":%ld,\"mem_total_kib\":%llu,\"mem_free_kib\":%llu}",
                 (unsigned long long)work.round, (unsigned long long)area.filled_pages,
                 (unsigned long long)area.checked_pages, (unsigned long long)area.writes,
                 (unsigned long long)area.errors, work_phase_name((enum work_phase)work.phase), jobs_done,
                 (unsigned long long)work.fill_ms, (unsigned long long)work.verify_ms,
                 (unsigned long long)atomic_exchange(&area.slowest_ns, 0) / 1000U, settings.writers, settings.rate,
                 memory.uptime, (unsigned long long)memory.totalram * memory.mem_unit / 1024U,
                 (unsigned long long)memory.freeram * memory.mem_unit / 1024U);
}

static const char *ask(enum work_job job, const char *number, const char *mib) {
    if (number == NULL || (mib == NULL && job != WORK_JOB_VERIFY))
        return "a number is missing";
    if (!work_ask(&work, job, mib == NULL ? 0 : atol(mib), atol(number)))
        return "another job is not done yet";
    return NULL;
}

static const char *obey(const char *verb, const char *first, const char *second) {
    if (strcmp(verb, "verify") == 0)
        return ask(WORK_JOB_VERIFY, first, NULL);
    if (strcmp(verb, "grow") == 0)
        return ask(WORK_JOB_GROW, first, second);
    if (strcmp(verb, "shrink") == 0)
        return ask(WORK_JOB_SHRINK, first, second);
    if (strcmp(verb, "run") == 0 || strcmp(verb, "stop") == 0) {
        atomic_store(&work.running, verb[0] == 'r');
        return NULL;
    }
    if (strcmp(verb, "poweroff") == 0)
        finish();
    if (first == NULL)
        return "a value is missing";
    if (strcmp(verb, "where") == 0) {
        area_where(&area, strtoull(first, NULL, 10));
        return NULL;
    }
    return settings_change(&settings, verb, first);
}

static void command(char *line) {
    char *save = NULL;
    char *verb = strtok_r(line, " \r\n", &save);
    char *first = strtok_r(NULL, " \r\n", &save);
    char *second = strtok_r(NULL, " \r\n", &save);

    if (verb == NULL)
        return;
    const char *refusal = obey(verb, first, second);
    if (refusal != NULL)
        console_line("{\"event\":\"refused\",\"text\":\"%.40s: %s\"}", verb, refusal);
}

/* Read what is there and obey every whole line of it. False at the end of input. */
static bool read_commands(void) {
    static char pending[LINE_BYTES];
    static size_t length;
    ssize_t got = read(STDIN_FILENO, pending + length, sizeof(pending) - 1 - length);

    if (got <= 0)
        return got < 0 && (errno == EINTR || errno == EAGAIN || errno == EIO);
    length += (size_t)got;
    for (;;) {
        char *end = memchr(pending, '\n', length);

        if (end == NULL)
            break;
        *end = '\0';
        command(pending);
        length -= (size_t)(end + 1 - pending);
        memmove(pending, end + 1, length);
    }
    if (length == sizeof(pending) - 1)
        length = 0; /* no command is that long: drop it */
    return true;
}

static long now_ms(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* This thread touches nothing of the area, so the console answers however long the others wait for pages. */
static void serve_console(void) {
    long next_status_ms = now_ms();

    for (;;) {
        struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
        long left_ms = next_status_ms - now_ms();

        if (left_ms <= 0) {
            print_status();
            next_status_ms = now_ms() + settings.interval_ms;
            continue;
        }
        if (poll(&input, 1, (int)left_ms) > 0 && !read_commands())
            finish();
    }
}

static void take_setting(const char *assignment) {
    const char *refusal = settings_parse(&settings, assignment);

    errno = EINVAL;
    if (refusal != NULL)
        console_fatal("setting %.100s: %s", assignment, refusal);
}

static void settings_from_kernel(void) {
    char line[CMDLINE_BYTES] = "", *save = NULL;
    FILE *file = fopen("/proc/cmdline", "re");

    if (file == NULL || fgets(line, sizeof(line), file) == NULL)
        console_fatal("cannot read /proc/cmdline");
    fclose(file);
    for (char *word = strtok_r(line, " \n", &save); word != NULL; word = strtok_r(NULL, " \n", &save))
        if (strncmp(word, "fl.", 3) == 0)
            take_setting(word + 3);
}

static struct content_mix mix_of_settings(void) {
    struct content_mix mix = {(uint64_t)settings.seed, (unsigned)settings.zero_percent, (unsigned)settings.same_percent,
                              (unsigned)settings.random_percent};

    errno = EINVAL;
    if (mix.zero_percent + mix.same_percent + mix.random_percent > 100)
        console_fatal("the kinds of pages add up to more than 100 percent");
    return mix;
}

static int dump(uint64_t first, uint64_t count, uint32_t generation) {
    struct content_mix mix = mix_of_settings();
    uint64_t page[PAGE_WORDS];

    for (uint64_t index = first; index < first + count; index++) {
        content_write(&mix, index, generation, page);
        if (fwrite(page, sizeof(page), 1, stdout) != 1)
            return 1;
    }
    return fflush(stdout) == 0 ? 0 : 1;
}

static void prepare(void) {
    struct content_mix mix = mix_of_settings();
    struct sysinfo memory = {0};
    long hot_mib = settings.hot_mib < settings.mib ? settings.hot_mib : settings.mib;
    long max_mib = settings.max_mib > settings.mib ? settings.max_mib : settings.mib + GROWTH_MIB;

    sysinfo(&memory);
    errno = ENOMEM;
    if ((uint64_t)settings.mib << 20 > (uint64_t)memory.freeram * memory.mem_unit)
        console_fatal("fl.mib=%ld asked for, %llu MiB are free", settings.mib,
                      (unsigned long long)memory.freeram * memory.mem_unit >> 20);
    work.hot_pages = (uint64_t)hot_mib * PAGES_PER_MIB;
    area_create(&area, &mix, (uint64_t)max_mib * PAGES_PER_MIB, settings.huge_pages == 1);
}

int main(int count, char **arguments) {
    int settings_at = 2;

    settings_default(&settings);
    is_init = getpid() == 1;
    if (is_init) {
        boot_as_init();
        settings_from_kernel();
    } else if (count >= 2 && strcmp(arguments[1], "--process") == 0) {
        settings_at = 2;
    } else if (count >= 5 && strcmp(arguments[1], "--dump") == 0) {
        settings_at = 5;
    } else {
        fprintf(stderr, "guest-workload: runs as a test guest's init; else --process or --dump\n");
        return 2;
    }
    for (int i = settings_at; !is_init && i < count; i++)
        take_setting(arguments[i]);
    if (settings_at == 5)
        return dump(strtoull(arguments[2], NULL, 10), strtoull(arguments[3], NULL, 10),
                    (uint32_t)strtoul(arguments[4], NULL, 10));
    console_line("{\"event\":\"booted\"}");
    if (settings.probe == 1)
        finish();
    prepare();
    work_start(&work);
    serve_console();
}
