/* SPDX-License-Identifier: Apache-2.0 */
/* Hold known values in every register for a while, then say what is in them. */
#ifndef TARGET_SPIN_H
#define TARGET_SPIN_H

#include <stdint.h>

#define TARGET_SPIN_WORDS 14     /* rax rbx rdx rsi rdi rbp r8..r15 */
#define TARGET_SPIN_ZONE 16      /* words of the red zone; each is in[0] */
#define TARGET_SPIN_FLAGS 0x8d5u /* carry, parity, adjust, zero, sign, overflow */

struct target_spin {
    uint64_t in[TARGET_SPIN_WORDS];
    uint64_t out[TARGET_SPIN_WORDS];
    uint64_t flags_in;
    uint64_t flags_out;
    uint64_t loops;
    uint64_t zone[TARGET_SPIN_ZONE];
    uint64_t unused;
    uint64_t xmm_in[32];
    uint64_t xmm_out[32];
};

void target_spin(struct target_spin *spin);

#endif
