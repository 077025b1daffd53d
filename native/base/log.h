/* SPDX-License-Identifier: Apache-2.0 */
/* The pager's log: one JSON object a line on standard error, each written with a single write(2). */
#ifndef FL_BASE_LOG_H
#define FL_BASE_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum fl_log_level { FL_LOG_DEBUG, FL_LOG_INFO, FL_LOG_WARNING, FL_LOG_ERROR };

/* Lines below `level` are dropped; `vmm_pid` stands in every line. */
void fl_log_setup(enum fl_log_level level, int vmm_pid);
/* Level from its word ("debug", "info", "warning", "error"); false when the word is another. */
bool fl_log_level_parse(const char *word, enum fl_log_level *out);

/* Of what is tried for ever: whether failure number `times` is worth a line, the first and then ever more seldom. */
static inline bool fl_log_worth(uint64_t times) {
    return (times & (times - 1)) == 0;
}

/*
 * `event` is a stable word; `format` gives further JSON members without a leading comma, e.g.
 * fl_log(FL_LOG_INFO, "evicted", "\"pages\":%u", pages). Strings must be escaped: use fl_log_text for prose.
 */
void fl_log(enum fl_log_level level, const char *event, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same with one member "detail" holding escaped text. */
void fl_log_text(enum fl_log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
