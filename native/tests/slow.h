/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether this program runs many times slower than on the machine that it is for: instrumented by a sanitizer, or on an
 * emulated machine, which FL_TEST_SLOW=1 says. Tests then do fewer rounds, and measure no time.
 */
#ifndef FL_TESTS_SLOW_H
#define FL_TESTS_SLOW_H

#include <stdbool.h>
#include <stdlib.h>

#ifndef __has_feature
#define __has_feature(name) 0
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(FL_SANITIZE_ADDRESS) || \
    defined(FL_SANITIZE_THREAD) || __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static inline bool runs_slowly(void) {
    const char *said = getenv("FL_TEST_SLOW");
    return SANITIZED || (said != NULL && said[0] == '1');
}

#endif
