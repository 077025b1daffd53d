/* SPDX-License-Identifier: Apache-2.0 */
/* What an init does before anything can run: file systems, modules, images, the loopback interface. */
#ifndef KERNEL_INIT_SETUP_H
#define KERNEL_INIT_SETUP_H

#include <stddef.h>

enum { SETUP_TROUBLES_BYTES = 4096 };

/* Get the guest ready. What did not go well and is no reason to give up is in setup_troubles(), a line each. */
void setup_all(void);
const char *setup_troubles(void);

/* Open a device that may take a moment to appear; -1 with errno after 10 s. */
int setup_open_when_there(const char *path, int flags);

/* Say it on the console and power off. */
__attribute__((format(printf, 1, 2), noreturn)) void setup_fatal(const char *format, ...);
__attribute__((noreturn)) void setup_power_off(void);

#endif
