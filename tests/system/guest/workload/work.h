/* SPDX-License-Identifier: Apache-2.0 */
/* The threads that use the area: one runner (fill, hot set, cold checks, jobs) and the continuous writers. */
#ifndef GUEST_WORK_H
#define GUEST_WORK_H

#include <stdatomic.h>
#include <stdbool.h>

#include "area.h"
#include "settings.h"

enum work_phase { WORK_FILL, WORK_RUN, WORK_VERIFY, WORK_DONE };

struct work {
    struct settings *settings;
    struct area *area;
    uint64_t hot_pages;
    _Atomic int phase;
    _Atomic bool running;       /* hot set, cold checks and writers are on */
    _Atomic uint64_t round;     /* sweeps over the hot set */
    _Atomic uint64_t fill_ms;   /* how long the last fill took */
    _Atomic uint64_t verify_ms; /* how long the last verification took */
    _Atomic long jobs_done;     /* number of the last job that is done */
    _Atomic int job_waiting;    /* enum work_job, 0 = none */
    _Atomic long job_argument;  /* MiB */
    _Atomic long job_number;
};

enum work_job { WORK_JOB_NONE, WORK_JOB_VERIFY, WORK_JOB_GROW, WORK_JOB_SHRINK };

/* Start all threads; the runner fills the area first. */
void work_start(struct work *work);

/*
 * Ask the runner for a verification of all pages, or to grow or shrink the area to `mib`. One at a time:
 * false while another one waits or runs. `number` shows as jobs_done when it is done.
 */
bool work_ask(struct work *work, enum work_job job, long mib, long number);

const char *work_phase_name(enum work_phase phase);

#endif
