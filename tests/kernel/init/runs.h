/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The commands that the host has asked for. Each is in a cgroup of its own, so that all it has started can be
 * found and ended, however it was detached; each has a limit, and says where it hung when it reaches it.
 */
#ifndef KERNEL_INIT_RUNS_H
#define KERNEL_INIT_RUNS_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frame.h"

enum { RUNS_LIMIT = 32, RUNS_POLLED = 2 * RUNS_LIMIT };

/* Begin one, or answer REFUSED. */
void runs_begin(uint32_t id, const unsigned char *payload, size_t bytes);

/* To the first process of a run; a run that has ended is none of ours any more, and nothing happens. */
void runs_signal(uint32_t id, int signal);

/* SIGKILL to every process of a run. */
void runs_end(uint32_t id);

/* Fill in what to wait for; returns how many. */
size_t runs_to_poll(struct pollfd *polled);

/* How long to wait at most, in ms; -1: for ever. */
int runs_next_deadline_ms(void);

/* Pass on output, reap, enforce limits, say EXIT: call it after each wait. */
void runs_serve(void);

#endif
