/* SPDX-License-Identifier: Apache-2.0 */
#include "track/damon_sysfs.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

#define REGIONS "contexts/0/targets/0/regions/"
#define PAUSE_NS FL_NS_PER_MS
#define PASS_POLL_NS (200 * FL_NS_PER_US)
#define PASS_NS (60 * FL_NS_PER_SECOND)

/* ---- files ------------------------------------------------------------------------------------------------- */

/* A directory that was taken away shows as either of them. */
static int gone_or(int error) {
    return error == ENOENT || error == ENODEV ? -ENODEV : -error;
}

/* EBUSY means that somebody is at work in DAMON's sysfs, and is worth waiting for; or else that DAMON is taken. */
int fl_damon_put(int directory, const char *path, const char *text) {
    uint64_t end = fl_now() + FL_DAMON_WAIT_NS;
    while (true) {
        int fd = openat(directory, path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            return gone_or(errno);
        ssize_t written = write(fd, text, strlen(text));
        int error = errno;
        close(fd);
        if (written >= 0)
            return 0;
        if (error != EBUSY || fl_now() >= end)
            return gone_or(error);
        fl_sleep_ns(PAUSE_NS);
    }
}

int fl_damon_put_number(int directory, const char *path, uint64_t number) {
    char text[24];
    snprintf(text, sizeof(text), "%" PRIu64, number);
    return fl_damon_put(directory, path, text);
}

int fl_damon_get(int directory, const char *path, char *text, size_t bytes) {
    uint64_t end = fl_now() + FL_DAMON_WAIT_NS;
    while (true) {
        int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return gone_or(errno);
        ssize_t length = read(fd, text, bytes - 1);
        int error = errno;
        close(fd);
        if (length >= 0) {
            text[length] = '\0';
            return 0;
        }
        if (error != EBUSY || fl_now() >= end)
            return gone_or(error);
        fl_sleep_ns(PAUSE_NS);
    }
}

int fl_damon_get_number(int directory, const char *path, int64_t *out) {
    char text[32];
    int error = fl_damon_get(directory, path, text, sizeof(text));
    *out = error ? -1 : strtoll(text, NULL, 10);
    return error;
}

bool fl_damon_module_is_on(const char *module) {
    char path[96], text[8];
    snprintf(path, sizeof(path), FL_DAMON_MODULES "/%s/parameters/enabled", module);
    return fl_damon_get(AT_FDCWD, path, text, sizeof(text)) == 0 && text[0] == 'Y';
}

const char *fl_damon_module_in_use(void) {
    static const char *const modules[] = {"damon_reclaim", "damon_lru_sort"};
    for (size_t i = 0; i < sizeof(modules) / sizeof(modules[0]); i++)
        if (fl_damon_module_is_on(modules[i]))
            return modules[i];
    return NULL;
}

static bool is_on(int directory) {
    char text[8];
    return fl_damon_get(directory, "state", text, sizeof(text)) == 0 && strncmp(text, "on", 2) == 0;
}

/* ---- a kdamond ------------------------------------------------------------------------------------------- */

int fl_damon_set(struct fl_damon_kdamond *kdamond, const struct fl_damon_settings *settings) {
    const struct {
        const char *path;
        uint64_t number;
    } files[] = {
        {FL_DAMON_ATTRS "intervals/sample_us", settings->sample_us},
        {FL_DAMON_ATTRS "intervals/aggr_us", settings->sample_us},
        {FL_DAMON_ATTRS "intervals/update_us", settings->sample_us},
        {FL_DAMON_ATTRS "nr_regions/min", settings->regions_min},
        {FL_DAMON_ATTRS "nr_regions/max", settings->regions_max},
        {"contexts/0/targets/0/pid_target", (uint64_t)settings->pid},
        {REGIONS "nr_regions", settings->count},
    };
    int error = 0;
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]) && !error; i++)
        error = fl_damon_put_number(kdamond->directory_fd, files[i].path, files[i].number);
    for (uint32_t i = 0; i < settings->count && !error; i++) {
        char path[96];
        snprintf(path, sizeof(path), REGIONS "%" PRIu32 "/start", i);
        error = fl_damon_put_number(kdamond->directory_fd, path, settings->ranges[i].start);
        snprintf(path, sizeof(path), REGIONS "%" PRIu32 "/end", i);
        if (!error)
            error = fl_damon_put_number(kdamond->directory_fd, path, settings->ranges[i].end);
    }
    return error;
}

/* State letter of a kernel thread, 0 when there is none (any more). */
static char thread_state(int pid) {
    char path[32], text[256];
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    if (fl_damon_get(AT_FDCWD, path, text, sizeof(text)))
        return 0;
    const char *end = strrchr(text, ')');
    return end && end[1] == ' ' ? end[2] : 0;
}

/* When it has marked all pages it sleeps for the sampling interval, and nowhere before in this way (TASK_IDLE). */
static int wait_for_pass(int pid) {
    uint64_t end = fl_now() + PASS_NS;
    char state;
    while ((state = thread_state(pid)) != 'I') {
        if (!state)
            return -ENODEV; /* it has ended, or this process is in a pid name space that does not show it */
        if (fl_now() >= end)
            return -ETIMEDOUT;
        fl_sleep_ns(PASS_POLL_NS);
    }
    return 0;
}

uint64_t fl_damon_cpu_ns(int kdamond_pid) {
    char path[48], text[96];
    snprintf(path, sizeof(path), "/proc/%d/schedstat", kdamond_pid);
    return fl_damon_get(AT_FDCWD, path, text, sizeof(text)) ? 0 : strtoull(text, NULL, 10);
}

/* A user that wants DAMON for itself alone (those three modules) makes our start fail for as long as it runs. */
static bool taken_for_itself(void) {
    return fl_damon_module_is_on("damon_stat") || fl_damon_module_in_use();
}

static int start(struct fl_damon_kdamond *kdamond) {
    int fd = openat(kdamond->directory_fd, "state", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return gone_or(errno);
    uint64_t end = fl_now() + FL_DAMON_WAIT_NS;
    int error;
    while (true) {
        error = write(fd, "on", 2) < 0 ? errno : 0;
        if (error != EBUSY)
            break;
        if (taken_for_itself() || fl_now() >= end) {
            error = ENODEV;
            break;
        }
        fl_sleep_ns(PAUSE_NS);
    }
    close(fd);
    return error ? gone_or(error) : 0;
}

int fl_damon_on(struct fl_damon_kdamond *kdamond, uint64_t *cpu_ns) {
    int64_t pid;
    uint64_t start_ns = fl_now();
    int error = start(kdamond);
    if (!error)
        error = fl_damon_get_number(kdamond->directory_fd, "pid", &pid);
    if (error)
        return error;
    kdamond->pid = (int)pid;
    error = pid > 0 ? wait_for_pass((int)pid) : -ENODEV;
    if (error)
        return error;
    *cpu_ns = fl_damon_cpu_ns((int)pid);
    if (!*cpu_ns)
        *cpu_ns = fl_now() - start_ns;
    return 0;
}

int fl_damon_is_on(const struct fl_damon_kdamond *kdamond) {
    int64_t pid;
    int error = fl_damon_get_number(kdamond->directory_fd, "pid", &pid);
    return error ? error : pid > 0 && pid == kdamond->pid ? 0 : -ENODEV;
}

int fl_damon_off(struct fl_damon_kdamond *kdamond) {
    kdamond->pid = 0;
    return is_on(kdamond->directory_fd) ? fl_damon_put(kdamond->directory_fd, "state", "off") : 0;
}
