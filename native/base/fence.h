/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A full fence for the sequence-numbered areas that other processes read. ThreadSanitizer does not model fences and
 * gcc says so; these areas have one writer at a time inside a process, so it misses nothing.
 */
#ifndef FL_BASE_FENCE_H
#define FL_BASE_FENCE_H

#include <stdatomic.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"
#endif
static inline void fl_fence(void) {
    atomic_thread_fence(memory_order_seq_cst);
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif
