/* SPDX-License-Identifier: Apache-2.0 */
#include "measure.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

int measure_pin(int cpu) {
    cpu_set_t one;
    if (cpu < 0)
        return 0;
    CPU_ZERO(&one);
    CPU_SET((unsigned)cpu, &one);
    return sched_setaffinity(0, sizeof(one), &one) ? -errno : 0;
}

static int by_value(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

uint32_t measure_median(uint32_t *samples, uint32_t count) {
    if (!count)
        return 0;
    qsort(samples, count, sizeof(*samples), by_value);
    return samples[count / 2];
}
