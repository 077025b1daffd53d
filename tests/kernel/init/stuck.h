/* SPDX-License-Identifier: Apache-2.0 */
/* Where the threads of a cgroup are, for the text of a failure. */
#ifndef KERNEL_INIT_STUCK_H
#define KERNEL_INIT_STUCK_H

#include <stddef.h>

/* A few lines for each thread: name, state, the system call it is in, its kernel stack. Valid until the next call. */
const char *stuck_describe(const char *cgroup, size_t *length);

#endif
