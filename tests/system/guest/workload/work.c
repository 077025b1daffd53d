/* SPDX-License-Identifier: Apache-2.0 */
#include "work.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "console.h"

enum {
    TICK_MS = 50,
    TICKS_PER_SECOND = 1000 / TICK_MS,
    BEHIND_MAX_MS = 1000, /* after a stall, what was missed beyond this is not made up for */
    WRITERS_MAX = 16,
    PAGES_PER_MIB = (1 << 20) / PAGE_BYTES,
};

static uint64_t now_ms(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000U + (uint64_t)now.tv_nsec / 1000000U;
}

static void sleep_ms(uint64_t duration_ms) {
    struct timespec duration = {(time_t)(duration_ms / 1000), (long)(duration_ms % 1000) * 1000000L};

    nanosleep(&duration, NULL);
}

/* Sleep until the tick at *next_ms, then move it on; a long stall moves it to now. */
static void wait_for_tick(uint64_t *next_ms) {
    uint64_t now = now_ms();

    if (now < *next_ms)
        sleep_ms(*next_ms - now);
    else if (now > *next_ms + BEHIND_MAX_MS)
        *next_ms = now;
    *next_ms += TICK_MS;
}

/* Spreads `per_second` over the ticks of a second without rounding anything away. */
static uint64_t due_in_tick(uint64_t per_second, uint64_t tick) {
    uint64_t at = tick % TICKS_PER_SECOND;

    return per_second * (at + 1) / TICKS_PER_SECOND - per_second * at / TICKS_PER_SECOND;
}

struct dice {
    uint64_t state;
};

static uint64_t roll(struct dice *dice) {
    return content_hash(dice->state++);
}

static bool roll_percent(struct dice *dice, long percent) {
    return roll(dice) % 100 < (uint64_t)percent;
}

static struct dice dice_for(const struct work *work, uint64_t stream) {
    return (struct dice){content_hash((uint64_t)work->settings->seed + (stream << 48))};
}

static unsigned thread_count(const struct work *work) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);

    if (work->settings->threads > 0)
        return (unsigned)work->settings->threads;
    return online > 0 ? (unsigned)online : 1;
}

static void timed_grow(struct work *work, uint64_t pages) {
    uint64_t start_ms = now_ms();

    atomic_store(&work->phase, WORK_FILL);
    area_grow(work->area, pages, thread_count(work));
    atomic_store(&work->fill_ms, now_ms() - start_ms);
}

static void run_job(struct work *work) {
    uint64_t pages = (uint64_t)work->job_argument * PAGES_PER_MIB;
    uint64_t start_ms = now_ms();

    switch ((enum work_job)work->job_waiting) {
    case WORK_JOB_NONE:
        return;
    case WORK_JOB_VERIFY:
        atomic_store(&work->phase, WORK_VERIFY);
        area_verify(work->area, thread_count(work));
        atomic_store(&work->verify_ms, now_ms() - start_ms);
        break;
    case WORK_JOB_GROW:
        timed_grow(work, pages);
        break;
    case WORK_JOB_SHRINK:
        area_shrink(work->area, pages < work->hot_pages ? work->hot_pages : pages);
        break;
    }
    atomic_store(&work->jobs_done, work->job_number);
    atomic_store(&work->job_waiting, WORK_JOB_NONE);
}

static void hot_tick(struct work *work, struct dice *dice, uint64_t *hot_next, uint64_t tick) {
    for (uint64_t left = due_in_tick(work->hot_pages, tick); left > 0; left--) {
        area_check(work->area, *hot_next, roll_percent(dice, work->settings->hot_write_percent));
        *hot_next = (*hot_next + 1) % work->hot_pages;
    }
    if (tick % TICKS_PER_SECOND == TICKS_PER_SECOND - 1)
        atomic_fetch_add(&work->round, 1);
}

static void cold_tick(struct work *work, struct dice *dice, uint64_t tick) {
    uint64_t active = work->area->active_pages;

    if (active <= work->hot_pages)
        return;
    for (uint64_t left = due_in_tick((uint64_t)work->settings->rate, tick); left > 0; left--) {
        uint64_t index = work->hot_pages + roll(dice) % (active - work->hot_pages);

        area_check(work->area, index, roll_percent(dice, work->settings->rewrite_percent));
    }
}

static void *runner(void *argument) {
    struct work *work = argument;
    struct dice dice = dice_for(work, 1);
    uint64_t hot_next = 0, tick = 0, next_ms;

    timed_grow(work, (uint64_t)work->settings->mib * PAGES_PER_MIB);
    next_ms = now_ms();
    for (;; tick++) {
        run_job(work);
        atomic_store(&work->phase, work->running ? WORK_RUN : WORK_DONE);
        wait_for_tick(&next_ms);
        if (!work->running)
            continue;
        hot_tick(work, &dice, &hot_next, tick);
        cold_tick(work, &dice, tick);
    }
    return NULL;
}

struct writer {
    struct work *work;
    unsigned number;
};

static void writer_tick(struct work *work, struct dice *dice, uint64_t tick) {
    for (uint64_t left = due_in_tick((uint64_t)work->settings->writer_rate, tick); left > 0; left--) {
        uint64_t active = work->area->active_pages;

        if (active == 0)
            return;
        area_check(work->area, roll(dice) % active, roll_percent(dice, work->settings->writer_write_percent));
    }
}

static void *writer_run(void *argument) {
    struct writer *writer = argument;
    struct work *work = writer->work;
    struct dice dice = dice_for(work, 2 + writer->number);
    uint64_t next_ms = now_ms();

    for (uint64_t tick = 0;; tick++) {
        wait_for_tick(&next_ms);
        if (work->running && (long)writer->number < work->settings->writers)
            writer_tick(work, &dice, tick);
    }
    return NULL;
}

static void start_thread(void *(*body)(void *), void *argument) {
    pthread_t thread;

    errno = pthread_create(&thread, NULL, body, argument);
    if (errno != 0)
        console_fatal("cannot start a thread");
    pthread_detach(thread);
}

void work_start(struct work *work) {
    static struct writer writers[WRITERS_MAX];

    atomic_store(&work->running, true);
    start_thread(runner, work);
    for (unsigned i = 0; i < WRITERS_MAX; i++) {
        writers[i] = (struct writer){work, i};
        start_thread(writer_run, &writers[i]);
    }
}

bool work_ask(struct work *work, enum work_job job, long mib, long number) {
    if (atomic_load(&work->job_waiting) != WORK_JOB_NONE)
        return false;
    atomic_store(&work->job_argument, mib);
    atomic_store(&work->job_number, number);
    atomic_store(&work->job_waiting, job); /* last: the runner looks at this first */
    return true;
}

const char *work_phase_name(enum work_phase phase) {
    static const char *const names[] = {"fill", "run", "verify", "done"};

    return names[phase];
}
