/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a VMM's seccomp filters would do with a system call, found out before it is made there: a filter may answer
 * with a kill.
 */
#ifndef FL_ATTACH_SECCOMP_H
#define FL_ATTACH_SECCOMP_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stdint.h>

#define FL_SECCOMP_FILTERS_MAX 64
#define FL_SECCOMP_INSTRUCTIONS_MAX 65536 /* of all filters together */

/* All filters of one thread, oldest first. */
struct fl_seccomp_filters {
    uint32_t count;
    uint32_t start[FL_SECCOMP_FILTERS_MAX + 1]; /* of each in `instructions`, and the end of the last */
    struct sock_filter instructions[FL_SECCOMP_INSTRUCTIONS_MAX];
};

/*
 * Read the filters of a stopped tracee. -E2BIG: more than fit. -EACCES: not allowed to read them (needs CAP_SYS_ADMIN
 * and no filter on ourselves). Other negative errno: the kernel does not give them.
 */
int fl_seccomp_read(int tid, struct fl_seccomp_filters *out);

/*
 * The filters' verdict on a call: SECCOMP_RET_... with its data, or -1 for a filter that is not understood. With no
 * filters, SECCOMP_RET_ALLOW.
 */
int64_t fl_seccomp_verdict(const struct fl_seccomp_filters *filters, uint64_t nr, uint32_t audit_arch,
                           uint64_t instruction, const uint64_t args[6]);

/* Does the call go through unchanged? */
bool fl_seccomp_allows(int64_t verdict);

/* "kills the process", "answers with an error", ... */
const char *fl_seccomp_verdict_text(int64_t verdict);

#endif
