/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices that get at guest memory past the page table. A kernel that pins a page for direct I/O may find it without setting
 * its ACCESS bit (GUP-fast), so trackers that go by ACCESS bits do not see that a disk is about to write into it.
 */
#ifndef FL_TRACK_DIRECT_IO_H
#define FL_TRACK_DIRECT_IO_H

#include <stddef.h>

/*
 * Whether process `pid` has a descriptor through which that can happen: one open with O_DIRECT, or vhost-scsi. 1: it has,
 * and `detail` gets a sentence; 0: it has not; or a negative errno (-ESRCH: it has ended). Reads /proc/PID/fd and fdinfo.
 */
int fl_direct_io(int pid, char *detail, size_t bytes);

/* For a tracker's probe(pid): whether that forbids it, also when it cannot be told. Of pid 0, nothing does. */
int fl_direct_io_forbids(int pid, char *detail, size_t bytes);

#endif
