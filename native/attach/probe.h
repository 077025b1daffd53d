/* SPDX-License-Identifier: Apache-2.0 */
/* The part of fl_probe_kernel() that a pager asks for at work. */
#ifndef FL_ATTACH_PROBE_H
#define FL_ATTACH_PROBE_H

#include "frostline.h"

/* What of it is about userfaultfd and PAGEMAP_SCAN: how pages can be held still, and be seen. Milliseconds at most. */
void fl_probe_userfaultfd(struct fl_kernel_features *out);

/*
 * What trackers need to know; the rest of *out is 0. Makes no process: a child of a pager that is killed meanwhile would
 * hold the vault's lock on.
 */
void fl_probe_tracking(struct fl_kernel_features *out);

#endif
