/* SPDX-License-Identifier: Apache-2.0 */
#include "base/refused.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

int fl_refuse(struct fl_refused *out, uint32_t refusal, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out->detail, sizeof(out->detail), format, arguments);
    va_end(arguments);
    out->refusal = refusal;
    return -EPERM;
}
