/* SPDX-License-Identifier: Apache-2.0 */
/* What the workload says: one JSON object a line, whole lines only, from any thread. */
#ifndef GUEST_CONSOLE_H
#define GUEST_CONSOLE_H

/* Print one line; a line over 1000 bytes is cut. */
__attribute__((format(printf, 1, 2))) void console_line(const char *format, ...);

/* Say {"event":"fatal"} with the text and errno's message, then end (as init: power off). */
__attribute__((format(printf, 1, 2), noreturn)) void console_fatal(const char *format, ...);

/* Put the terminal on stdin into raw input without echo: the other end is a program, not a person. */
void console_no_echo(void);

#endif
