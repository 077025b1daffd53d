/* SPDX-License-Identifier: Apache-2.0 */
/* The small things that every bench needs: where it runs and what the middle of its samples is. */
#ifndef FL_BENCH_MEASURE_H
#define FL_BENCH_MEASURE_H

#include <stdint.h>

/* Run this thread (and what it starts) on one CPU; below 0: anywhere. 0 or a negative errno. */
int measure_pin(int cpu);
/* Sorts `samples` and returns the middle one; 0 when there are none. */
uint32_t measure_median(uint32_t *samples, uint32_t count);

#endif
