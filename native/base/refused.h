/* SPDX-License-Identifier: Apache-2.0 */
/* A refusal on its way up: the reason code and a sentence for people. */
#ifndef FL_BASE_REFUSED_H
#define FL_BASE_REFUSED_H

#include "frostline.h"

struct fl_refused {
    uint32_t refusal; /* enum fl_refusal; FL_REFUSAL_NONE when all is well */
    char detail[FL_DETAIL_BYTES];
};

/*
 * Fill in a refusal; `format` says what was tried, on what, what the system said, what to do. Returns -EPERM
 * for every refusal so that a caller can `return fl_refuse(...)`.
 */
int fl_refuse(struct fl_refused *out, uint32_t refusal, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
