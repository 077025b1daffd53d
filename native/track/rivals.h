/* SPDX-License-Identifier: Apache-2.0 */
/* What else on a host makes touches look as if they had not been, to who goes by ACCESS bits. */
#ifndef FL_TRACK_RIVALS_H
#define FL_TRACK_RIVALS_H

#include <stdbool.h>
#include <stddef.h>

#define FL_RIVALS_BYTES 96u

/* A clause for people ("; accesses can be missed, ..."), or "". `damon_stat`: the kernel's own is one, too. */
void fl_rivals_describe(bool damon_stat, char *text, size_t bytes);

#endif
