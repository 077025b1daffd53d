/* SPDX-License-Identifier: Apache-2.0 */
/* Scripts run by the VMM on its own mapping, with the same meaning as in the guest; contents; poisoned memory. */
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvm_guest_internal.h"

_Thread_local volatile int kvm_in_guest, kvm_poisoned;
static _Thread_local sigjmp_buf on_sigbus;
static _Thread_local volatile int on_host;

static void handle_sigbus(int number) {
    if (on_host)
        siglongjmp(on_sigbus, 1);
    if (!kvm_in_guest) {
        signal(number, SIG_DFL);
        raise(number);
    }
    kvm_poisoned = 1;
}

void kvm_guest_catch_sigbus(void) {
    /* Without SA_RESTART, but KVM_RUN would not be restarted anyway. */
    struct sigaction action = {.sa_handler = handle_sigbus};
    sigaction(SIGBUS, &action, NULL);
}

struct kvm_outcome kvm_outcome_fail(int error, uint32_t at, const char *format, ...) {
    struct kvm_outcome outcome = {.error = error, .at = at};
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(outcome.why, sizeof(outcome.why), format, arguments);
    va_end(arguments);
    return outcome;
}

/* ---- contents ---------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

struct kvm_touch kvm_touch_content(enum kvm_touch_kind kind, uint64_t seed, uint32_t page, uint32_t generation) {
    struct kvm_touch touch = {.page = page, .kind = (uint16_t)kind, .times = 1, .factor = 1};
    if (generation == 0)
        return touch;
    touch.value = mix(seed + mix((uint64_t)page << 32 | generation));
    switch ((page + generation) % 8) {
    case 0:
        touch.value = 0;
        break;
    case 1:
        break;
    case 2: /* a linear congruential generator: nothing for a compressor */
        touch.step = 1442695040888963407u;
        touch.factor = 6364136223846793005u;
        break;
    default:
        touch.step = 1 + (touch.value & 0xff);
        break;
    }
    return touch;
}

uint64_t kvm_touch_word(const struct kvm_touch *content, uint32_t word) {
    uint64_t value = content->value;
    for (uint32_t i = 0; i < word; i++)
        value = value * content->factor + content->step;
    return value;
}

/* ---- the VMM's own accesses -------------------------------------------------------------------------------- */

/* Nothing but these accesses may go to the page, so the compiler may not make them into others. */
static void touch_page(volatile uint64_t *words, struct kvm_touch *touch) {
    uint64_t value = touch->value;
    volatile uint64_t *word = &words[touch->word];
    uint64_t wrong = 0;
    switch (touch->kind) {
    case KVM_TOUCH_LOAD:
        for (uint32_t i = 0; i < touch->times; i++)
            touch->result = *word;
        break;
    case KVM_TOUCH_STORE:
        for (uint32_t i = 0; i < touch->times; i++)
            *word = value;
        break;
    case KVM_TOUCH_ADD:
        touch->result = __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
        for (uint32_t i = 1; i < touch->times; i++)
            __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
        break;
    case KVM_TOUCH_FILL:
        for (uint32_t i = 0; i < KVM_GUEST_WORDS; i++, value = value * touch->factor + touch->step)
            words[i] = value;
        break;
    case KVM_TOUCH_CHECK:
        for (uint32_t i = 0; i < KVM_GUEST_WORDS; i++, value = value * touch->factor + touch->step)
            wrong += words[i] != value;
        touch->result = wrong;
        break;
    }
}

struct kvm_outcome kvm_host_run(uint8_t *memory, struct kvm_touch *script, uint32_t count, uint64_t passes,
                                struct kvm_mailbox *mailbox) {
    volatile uint32_t at = 0;
    if (sigsetjmp(on_sigbus, 1)) {
        on_host = 0;
        return kvm_outcome_fail(-EHWPOISON, at, "page %u is poisoned", script[at].page);
    }
    on_host = 1;
    for (uint64_t done = 0; passes == 0 || done < passes; done++) {
        for (at = 0; at < count; at++)
            touch_page((volatile uint64_t *)(memory + (uint64_t)script[at].page * KVM_GUEST_PAGE), &script[at]);
        atomic_fetch_add(&mailbox->passes, 1);
        if (atomic_load(&mailbox->stop))
            break;
    }
    on_host = 0;
    return (struct kvm_outcome){.error = 0};
}
