/* SPDX-License-Identifier: Apache-2.0 */
#include "track/damon_admin.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/clock.h"

#define STAT_ENABLED FL_DAMON_MODULES "/damon_stat/parameters/enabled"
/* In slot 0, where it means nothing: this is ours, and damon_stat was off (+ 0) or on (+ 1). */
#define NOTE_PATH "0/" FL_DAMON_ATTRS "intervals/update_us"
#define NOTE_MAGIC UINT64_C(0x46724f5374004400)
#define PAUSE_NS FL_NS_PER_MS

static int gone_or(int error) {
    return error == ENOENT || error == ENODEV ? -ENODEV : -error;
}

/* ---- whose DAMON is it ------------------------------------------------------------------------------------- */

static int open_kdamonds(void) {
    int fd = open(FL_DAMON_KDAMONDS, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    return fd < 0 ? gone_or(errno) : fd;
}

static bool read_note(int kdamonds, bool *stat_was_on) {
    int64_t note;
    if (fl_damon_get_number(kdamonds, NOTE_PATH, &note) || ((uint64_t)note & ~UINT64_C(1)) != NOTE_MAGIC)
        return false;
    *stat_was_on = note & 1;
    return true;
}

/* Ours: with our note; or so far that a pager that was killed in between had made the slots and no note yet. */
static bool is_ours(int kdamonds) {
    bool stat_was_on;
    int64_t slots, contexts;
    if (fl_damon_get_number(kdamonds, "nr_kdamonds", &slots) || slots != FL_DAMON_SLOTS)
        return false;
    return read_note(kdamonds, &stat_was_on) ||
           (fl_damon_get_number(kdamonds, "0/contexts/nr_contexts", &contexts) == 0 && contexts == 0);
}

static bool taken_by_module(char *who, size_t bytes) {
    const char *module = fl_damon_module_in_use();
    if (module)
        snprintf(who, bytes, "DAMON is in use by %s; write N to " FL_DAMON_MODULES "/%s/parameters/enabled", module,
                 module);
    return module != NULL;
}

static bool taken_by_sysfs(int kdamonds, char *who, size_t bytes) {
    int64_t count, pid = -1;
    if (is_ours(kdamonds) || fl_damon_get_number(kdamonds, "nr_kdamonds", &count) || count <= 0)
        return false;
    for (int64_t i = 0; i < count && pid <= 0; i++) {
        char path[32];
        snprintf(path, sizeof(path), "%" PRId64 "/pid", i);
        (void)fl_damon_get_number(kdamonds, path, &pid);
    }
    if (pid > 0)
        snprintf(who, bytes,
                 "DAMON is in use by another: %" PRId64 " kdamonds are set up in " FL_DAMON_KDAMONDS
                 ", and thread %" PRId64 " runs",
                 count, pid);
    else
        snprintf(who, bytes,
                 "DAMON is in use by another: %" PRId64 " kdamonds are set up in " FL_DAMON_KDAMONDS
                 ", and none runs; if nobody needs them, write 0 to nr_kdamonds there",
                 count);
    return true;
}

bool fl_damon_taken(char *who, size_t bytes) {
    int kdamonds = open_kdamonds();
    bool taken = taken_by_module(who, bytes) || (kdamonds >= 0 && taken_by_sysfs(kdamonds, who, bytes));
    if (kdamonds >= 0)
        close(kdamonds);
    return taken;
}

/* ---- slots ------------------------------------------------------------------------------------------------- */

/* Whoever makes, takes or gives back slots holds this. The file is the kernel's own and always there. */
static int lock_admin(int kdamonds) {
    uint64_t end = fl_now() + FL_DAMON_WAIT_NS;
    int fd = openat(kdamonds, "nr_kdamonds", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return gone_or(errno);
    while (flock(fd, LOCK_EX | LOCK_NB)) {
        if (fl_now() >= end) {
            close(fd);
            return -EBUSY;
        }
        fl_sleep_ns(PAUSE_NS);
    }
    return fd;
}

static void close_slot(struct fl_damon_slot *slot) {
    if (slot->lock_fd >= 0)
        close(slot->lock_fd);
    if (slot->kdamond.directory_fd >= 0)
        close(slot->kdamond.directory_fd);
    slot->lock_fd = slot->kdamond.directory_fd = -1;
}

/* -EBUSY: a living pager has it. A kdamond that a dead one left on is switched off. */
static int take_slot(int kdamonds, uint32_t number, struct fl_damon_slot *out) {
    char path[16];
    snprintf(path, sizeof(path), "%" PRIu32, number);
    *out = (struct fl_damon_slot){.number = number, .lock_fd = -1};
    out->kdamond.directory_fd = openat(kdamonds, path, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    if (out->kdamond.directory_fd < 0)
        return gone_or(errno);
    out->lock_fd = openat(out->kdamond.directory_fd, "state", O_RDONLY | O_CLOEXEC);
    int error = out->lock_fd < 0 ? gone_or(errno) : flock(out->lock_fd, LOCK_EX | LOCK_NB) ? -errno : 0;
    if (error == -EAGAIN)
        error = -EBUSY;
    if (!error)
        error = fl_damon_off(&out->kdamond);
    if (error)
        close_slot(out);
    return error;
}

/* The note comes before what it is about. */
static int make_room(int kdamonds) {
    int64_t slots, contexts = 0;
    bool stat_was_on = false, stat_is_on = fl_damon_module_is_on("damon_stat");
    int error = fl_damon_get_number(kdamonds, "nr_kdamonds", &slots);
    if (!error && slots != FL_DAMON_SLOTS)
        error = fl_damon_put_number(kdamonds, "nr_kdamonds", FL_DAMON_SLOTS);
    if (!error)
        error = fl_damon_get_number(kdamonds, "0/contexts/nr_contexts", &contexts);
    if (!error && contexts != 1)
        error = fl_damon_put_number(kdamonds, "0/contexts/nr_contexts", 1);
    if (!error && (!read_note(kdamonds, &stat_was_on) || (stat_is_on && !stat_was_on)))
        error = fl_damon_put_number(kdamonds, NOTE_PATH, NOTE_MAGIC | stat_is_on);
    if (!error && stat_is_on)
        error = fl_damon_put(AT_FDCWD, STAT_ENABLED, "N");
    return error;
}

/* Also looks through the rest, for what dead pagers have left on. */
static int find_slot(int kdamonds, struct fl_damon_slot *out) {
    bool found = false;
    for (uint32_t i = 1; i < FL_DAMON_SLOTS; i++) {
        struct fl_damon_slot slot;
        int error = take_slot(kdamonds, i, &slot);
        if (error == -EBUSY)
            continue;
        if (error) {
            if (found)
                close_slot(out);
            return error;
        }
        if (found)
            close_slot(&slot);
        else
            *out = slot;
        found = true;
    }
    return found ? 0 : -EBUSY;
}

static int prepare_slot(struct fl_damon_slot *slot) {
    int error = fl_damon_put_number(slot->kdamond.directory_fd, "contexts/nr_contexts", 1);
    if (!error)
        error = fl_damon_put(slot->kdamond.directory_fd, "contexts/0/operations", "fvaddr");
    if (!error)
        error = fl_damon_put_number(slot->kdamond.directory_fd, "contexts/0/targets/nr_targets", 1);
    return error;
}

static void stat_on(void) {
    if (!fl_damon_module_is_on("damon_stat"))
        (void)fl_damon_put(AT_FDCWD, STAT_ENABLED, "Y");
}

/* Only while nobody else has a slot. */
static void put_back(int kdamonds) {
    bool stat_was_on = false, needed = false;
    for (uint32_t i = 1; i < FL_DAMON_SLOTS; i++) { /* all of them: what dead pagers have left on goes off */
        struct fl_damon_slot slot;
        needed |= take_slot(kdamonds, i, &slot) == -EBUSY;
        close_slot(&slot);
    }
    if (needed)
        return;
    if (read_note(kdamonds, &stat_was_on) && stat_was_on)
        stat_on();
    (void)fl_damon_put_number(kdamonds, "nr_kdamonds", 0);
}

static int claim_locked(int kdamonds, struct fl_damon_slot *out, char *why, size_t bytes) {
    if (fl_damon_taken(why, bytes))
        return -EBUSY;
    int error = make_room(kdamonds);
    if (error) {
        snprintf(why, bytes, "setting up " FL_DAMON_KDAMONDS ": %s", strerror(-error));
        put_back(kdamonds);
        return error;
    }
    error = find_slot(kdamonds, out);
    if (!error) {
        (void)read_note(kdamonds, &out->stat_was_on);
        error = prepare_slot(out);
        if (error)
            close_slot(out);
    }
    if (error) {
        snprintf(why, bytes, "%s: all %u places for VMs in " FL_DAMON_KDAMONDS " are taken, or it is busy",
                 strerror(-error), FL_DAMON_SLOTS - 1);
        put_back(kdamonds);
    }
    return error;
}

int fl_damon_claim(struct fl_damon_slot *out, char *why, size_t bytes) {
    *out = (struct fl_damon_slot){.kdamond.directory_fd = -1, .lock_fd = -1};
    int kdamonds = open_kdamonds(), error = kdamonds < 0 ? kdamonds : 0;
    int lock = error ? -1 : lock_admin(kdamonds);
    if (!error && lock < 0)
        error = lock;
    if (error)
        snprintf(why, bytes, "open or lock " FL_DAMON_KDAMONDS "/nr_kdamonds: %s", strerror(-error));
    else
        error = claim_locked(kdamonds, out, why, bytes);
    if (lock >= 0)
        close(lock);
    if (kdamonds >= 0)
        close(kdamonds);
    return error;
}

void fl_damon_release(struct fl_damon_slot *slot) {
    if (slot->kdamond.directory_fd < 0)
        return;
    int64_t slots;
    int kdamonds = open_kdamonds(), lock = kdamonds < 0 ? -1 : lock_admin(kdamonds);
    (void)fl_damon_off(&slot->kdamond);
    (void)fl_damon_put_number(slot->kdamond.directory_fd, "contexts/nr_contexts", 0);
    close_slot(slot);
    if (lock >= 0 && is_ours(kdamonds))
        put_back(kdamonds);
    else if (lock >= 0 && slot->stat_was_on && fl_damon_get_number(kdamonds, "nr_kdamonds", &slots) == 0 && slots == 0)
        stat_on();
    if (lock >= 0)
        close(lock);
    if (kdamonds >= 0)
        close(kdamonds);
}

void fl_damon_tidy(void) {
    int kdamonds = open_kdamonds(), lock = kdamonds < 0 || !is_ours(kdamonds) ? -1 : lock_admin(kdamonds);
    if (lock >= 0 && is_ours(kdamonds))
        put_back(kdamonds);
    if (lock >= 0)
        close(lock);
    if (kdamonds >= 0)
        close(kdamonds);
}
