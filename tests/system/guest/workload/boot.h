/* SPDX-License-Identifier: Apache-2.0 */
/* What being init asks for. */
#ifndef GUEST_BOOT_H
#define GUEST_BOOT_H

/* Mount /proc, /sys and /dev, make /dev/ttyS0 the standard streams, load every module named in /modules/order. */
void boot_as_init(void);

/* Power the machine off; does not return. */
__attribute__((noreturn)) void boot_power_off(void);

#endif
