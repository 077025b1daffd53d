/* SPDX-License-Identifier: Apache-2.0 */
/* What is said in the log: by this process, or by a pager that it starts. */
#ifndef SAID_H
#define SAID_H

struct said {
    int file, stderr_fd;
};

struct said said_open(void);
/*
 * Between these two standard error goes into the file; a program that is started there goes on writing into it. Nothing
 * else that fails meanwhile is heard of.
 */
void said_begin(struct said *said);
void said_end(struct said *said);
/* So far; for free(). */
char *said_text(const struct said *said);
void said_close(struct said *said);

/* A line of the log has all of these words; exits the test when none has. */
void check_said(const char *log, const char *event, const char *first, const char *second);

#endif
