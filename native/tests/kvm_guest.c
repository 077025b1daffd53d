/* SPDX-License-Identifier: Apache-2.0 */
#include "kvm_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm_guest_internal.h"

#define LARGE (UINT64_C(2) << 20)
#define GIB (UINT64_C(1) << 30)
/* Guest-virtual addresses are guest-physical ones. Memory lies above the hole that PCs have below 4 GiB. */
#define MEMORY_AT (4 * GIB)
#define SIDE_MAX GIB /* what one page directory maps */
#define TSS_AT 0xfffbd000u
#define IDENTITY_AT UINT64_C(0xfffbc000)

/* Side memory begins with these pages; page directories, page tables and mailboxes follow. */
#define EXCEPTIONS_AT 0u      /* IDT */
#define DESCRIPTORS_AT 0x800u /* GDT */
#define CODE_AT 0x1000u
#define ROOT_AT 0x2000u      /* PML4 */
#define POINTERS_AT 0x3000u  /* PDPT: 512 GiB */
#define DIRECTORY_AT 0x4000u /* of the first GiB, where side memory is; those of guest memory follow */

/* x86 page table entries and control registers, as far as they are needed. */
#define HERE 0x3u /* present, writable */
#define HERE_LARGE 0x83u
#define CR0_BITS 0x80010033u /* PE MP ET NE WP PG */
#define CR4_BITS 0x20u       /* PAE */
#define EFER_BITS 0x500u     /* LME LMA */
#define TYPE_CODE 11u        /* executable, readable, accessed; for a system segment: busy TSS */
#define TYPE_DATA 3u         /* writable, accessed */
#define RFLAGS_BITS 2u
#define CODE_SELECTOR 8u
#define DATA_SELECTOR 16u
#define CODE_DESCRIPTOR UINT64_C(0x00af9b000000ffff)
#define DATA_DESCRIPTOR UINT64_C(0x00cf93000000ffff)
#define GATE_BITS UINT64_C(0x8e00) /* present, interrupt gate */

struct vcpu {
    int fd;
    struct kvm_run *state;
    size_t state_bytes;
};

/* Shared by the process that created it and its children. */
struct kvm_guest {
    struct kvm_guest_config config;
    uint8_t *side;
    uint64_t *written; /* what it held at the beginning up to the mailboxes */
    uint64_t side_bytes, mailboxes_at, mailbox_stride;
    /* Of the process that started it. */
    pid_t owner;
    int kvm, vm, memory_fd;
    uint8_t *memory;
    struct vcpu vcpus[KVM_GUEST_VCPUS_MAX];
};

static uint64_t round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

/* ---- side memory ------------------------------------------------------------------------------------------- */

static uint64_t *table_at(const struct kvm_guest *guest, uint64_t address) {
    return (uint64_t *)(void *)(guest->side + address);
}

/* Identity: side memory by 2 MiB, guest memory as the configuration says. Returns the first address left over. */
static uint64_t write_page_tables(struct kvm_guest *guest) {
    uint64_t *pointers = table_at(guest, POINTERS_AT), directory_at = DIRECTORY_AT;
    uint64_t table = directory_at + KVM_GUEST_PAGE * (1 + round_up(guest->config.bytes, GIB) / GIB);
    table_at(guest, ROOT_AT)[0] = POINTERS_AT | HERE;
    pointers[0] = directory_at | HERE;
    for (uint64_t at = 0; at < guest->side_bytes; at += LARGE)
        table_at(guest, directory_at)[at / LARGE] = at | HERE_LARGE;
    for (uint64_t at = 0; at < guest->config.bytes; at += LARGE) {
        if (at % GIB == 0) {
            directory_at += KVM_GUEST_PAGE;
            pointers[(MEMORY_AT + at) / GIB] = directory_at | HERE;
        }
        uint64_t *entry = &table_at(guest, directory_at)[at % GIB / LARGE];
        if (guest->config.large_pages) {
            *entry = (MEMORY_AT + at) | HERE_LARGE;
            continue;
        }
        *entry = table | HERE;
        for (uint64_t i = 0; i < LARGE / KVM_GUEST_PAGE; i++)
            table_at(guest, table)[i] = (MEMORY_AT + at + i * KVM_GUEST_PAGE) | HERE;
        table += KVM_GUEST_PAGE;
    }
    return table;
}

/* Nothing loads a segment and nothing takes an interrupt; an exception needs both tables to be told of. */
static void write_descriptors(struct kvm_guest *guest) {
    uint64_t at = CODE_AT + (uint64_t)(kvm_guest_exceptions - kvm_guest_code), *gates = table_at(guest, EXCEPTIONS_AT);
    table_at(guest, DESCRIPTORS_AT)[CODE_SELECTOR / 8] = CODE_DESCRIPTOR;
    table_at(guest, DESCRIPTORS_AT)[DATA_SELECTOR / 8] = DATA_DESCRIPTOR;
    for (uint32_t vector = 0; vector < KVM_EXCEPTIONS; vector++, at += KVM_EXCEPTION_STUB)
        gates[2 * vector] = (at & 0xffff) | (uint64_t)CODE_SELECTOR << 16 | GATE_BITS << 32 | (at >> 16 & 0xffff) << 48;
}

static uint64_t page_table_bytes(const struct kvm_guest_config *config) {
    uint64_t tables = config->large_pages ? 0 : config->bytes / LARGE;
    return KVM_GUEST_PAGE * (1 + round_up(config->bytes, GIB) / GIB + tables);
}

int kvm_guest_create(const struct kvm_guest_config *config, struct kvm_guest **out) {
    *out = NULL;
    if (config->bytes == 0 || config->bytes % LARGE || config->bytes > KVM_GUEST_BYTES_MAX || config->vcpus == 0 ||
        config->vcpus > KVM_GUEST_VCPUS_MAX || config->backing > KVM_GUEST_ANONYMOUS)
        return -EINVAL;
    struct kvm_guest *guest = mmap(NULL, sizeof(*guest), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (guest == MAP_FAILED)
        return -errno;
    *guest = (struct kvm_guest){.config = *config, .kvm = -1, .vm = -1, .memory_fd = -1};
    guest->mailboxes_at = DIRECTORY_AT + page_table_bytes(config);
    guest->mailbox_stride = KVM_GUEST_PAGE + round_up(KVM_SCRIPT_MAX * sizeof(struct kvm_touch), KVM_GUEST_PAGE);
    guest->side_bytes = round_up(guest->mailboxes_at + guest->mailbox_stride * kvm_guest_workers(guest), LARGE);
    if (guest->side_bytes <= SIDE_MAX)
        guest->side = mmap(NULL, guest->side_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!guest->side || guest->side == MAP_FAILED) {
        munmap(guest, sizeof(*guest));
        return -ENOMEM;
    }
    memcpy(guest->side + CODE_AT, kvm_guest_code, (size_t)(kvm_guest_code_end - kvm_guest_code));
    write_descriptors(guest);
    if (write_page_tables(guest) != guest->mailboxes_at)
        abort();
    guest->written = malloc(guest->mailboxes_at);
    if (!guest->written) {
        kvm_guest_destroy(guest);
        return -ENOMEM;
    }
    memcpy(guest->written, guest->side, guest->mailboxes_at);
    *out = guest;
    return 0;
}

void kvm_guest_destroy(struct kvm_guest *guest) {
    if (!guest)
        return;
    if (guest->owner == getpid()) {
        for (uint32_t i = 0; i < guest->config.vcpus; i++) {
            if (!guest->vcpus[i].state)
                continue;
            munmap(guest->vcpus[i].state, guest->vcpus[i].state_bytes);
            close(guest->vcpus[i].fd);
        }
        const int fds[] = {guest->vm, guest->kvm, guest->memory_fd};
        for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
            if (fds[i] >= 0)
                close(fds[i]);
        if (guest->memory)
            munmap(guest->memory, guest->config.bytes);
    }
    free(guest->written);
    munmap(guest->side, guest->side_bytes);
    munmap(guest, sizeof(*guest));
}

/* ---- starting ---------------------------------------------------------------------------------------------- */

static struct kvm_outcome failed(const char *what) {
    int error = errno;
    return kvm_outcome_fail(-error, 0, "%s: %s", what, strerror(error));
}

/* Aligned as the largest page that may come to back it. */
static struct kvm_outcome map_memory(struct kvm_guest *guest) {
    uint64_t bytes = guest->config.bytes;
    int flags = MAP_FIXED | (guest->config.backing == KVM_GUEST_ANONYMOUS ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    if (guest->config.backing != KVM_GUEST_ANONYMOUS) {
        unsigned huge = guest->config.backing == KVM_GUEST_HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
        guest->memory_fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC | huge);
        if (guest->memory_fd < 0 || ftruncate(guest->memory_fd, (off_t)bytes))
            return failed("memfd for guest memory");
    }
    uint8_t *place = mmap(NULL, bytes + LARGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED)
        return failed("address space for guest memory");
    uint8_t *aligned = place + (LARGE - (uintptr_t)place % LARGE) % LARGE;
    uint8_t *memory = mmap(aligned, bytes, PROT_READ | PROT_WRITE, flags, guest->memory_fd, 0);
    if (memory == MAP_FAILED)
        return failed("guest memory");
    if (aligned != place)
        munmap(place, (size_t)(aligned - place));
    munmap(aligned + bytes, (size_t)(place + LARGE - aligned));
    guest->memory = memory;
    return (struct kvm_outcome){.error = 0};
}

static int add_slot(struct kvm_guest *guest, uint32_t slot, uint64_t address, uint8_t *memory, uint64_t bytes) {
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = address, .memory_size = bytes, .userspace_addr = (uint64_t)(uintptr_t)memory};
    return ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* 64-bit mode from the first instruction on. */
static int set_registers(int fd) {
    struct kvm_sregs s;
    if (ioctl(fd, KVM_GET_SREGS, &s))
        return -1;
    struct kvm_segment data = {
        .limit = 0xffffffff, .selector = DATA_SELECTOR, .type = TYPE_DATA, .present = 1, .db = 1, .s = 1, .g = 1};
    s.cs = (struct kvm_segment){
        .limit = 0xffffffff, .selector = CODE_SELECTOR, .type = TYPE_CODE, .present = 1, .s = 1, .l = 1, .g = 1};
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.tr = (struct kvm_segment){.limit = 0x67, .selector = 24, .type = TYPE_CODE, .present = 1};
    s.ldt = (struct kvm_segment){.unusable = 1};
    s.gdt = (struct kvm_dtable){.base = DESCRIPTORS_AT, .limit = DATA_SELECTOR + 7};
    s.idt = (struct kvm_dtable){.base = EXCEPTIONS_AT, .limit = KVM_EXCEPTIONS * 16 - 1};
    s.cr0 = CR0_BITS;
    s.cr3 = ROOT_AT;
    s.cr4 = CR4_BITS;
    s.efer = EFER_BITS;
    return ioctl(fd, KVM_SET_SREGS, &s);
}

static struct kvm_outcome add_vcpu(struct kvm_guest *guest, uint32_t index, int state_bytes, struct kvm_cpuid2 *cpuid) {
    struct vcpu *vcpu = &guest->vcpus[index];
    int fd = ioctl(guest->vm, KVM_CREATE_VCPU, index);
    if (fd < 0)
        return failed("KVM_CREATE_VCPU");
    void *state = mmap(NULL, (size_t)state_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (state == MAP_FAILED) {
        close(fd);
        return failed("mapping of a vCPU");
    }
    *vcpu = (struct vcpu){.fd = fd, .state = state, .state_bytes = (size_t)state_bytes};
    if (ioctl(fd, KVM_SET_CPUID2, cpuid))
        return failed("KVM_SET_CPUID2");
    if (set_registers(fd))
        return failed("KVM_SET_SREGS for 64-bit mode");
    return kvm_guest_run(guest, index, 0, 1);
}

static struct kvm_outcome make_vm(struct kvm_guest *guest) {
    guest->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (guest->kvm < 0)
        return failed("/dev/kvm");
    if (ioctl(guest->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        return kvm_outcome_fail(-ENOTSUP, 0, "/dev/kvm has another API version");
    guest->vm = ioctl(guest->kvm, KVM_CREATE_VM, 0);
    if (guest->vm < 0)
        return failed("KVM_CREATE_VM");
    uint64_t identity = IDENTITY_AT;
    /* Intel processors that cannot run real mode directly need room for these; others accept them. */
    if (ioctl(guest->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) || ioctl(guest->vm, KVM_SET_TSS_ADDR, TSS_AT))
        return failed("KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR");
    if (add_slot(guest, 0, 0, guest->side, guest->side_bytes) ||
        add_slot(guest, 1, MEMORY_AT, guest->memory, guest->config.bytes))
        return failed("KVM_SET_USER_MEMORY_REGION");
    return (struct kvm_outcome){.error = 0};
}

static struct kvm_outcome add_vcpus(struct kvm_guest *guest) {
    enum { ENTRIES = 256 };
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + ENTRIES * sizeof(cpuid->entries[0]));
    struct kvm_outcome outcome = {.error = 0};
    int state_bytes = ioctl(guest->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (!cpuid)
        return kvm_outcome_fail(-ENOMEM, 0, "no memory for CPUID");
    cpuid->nent = ENTRIES;
    if (state_bytes < (int)sizeof(struct kvm_run) || ioctl(guest->kvm, KVM_GET_SUPPORTED_CPUID, cpuid))
        outcome = failed("KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID");
    for (uint32_t i = 0; i < guest->config.vcpus && !outcome.error; i++)
        outcome = add_vcpu(guest, i, state_bytes, cpuid);
    free(cpuid);
    return outcome;
}

struct kvm_outcome kvm_guest_start(struct kvm_guest *guest) {
    if (guest->owner)
        return kvm_outcome_fail(-EALREADY, 0, "the guest has been started");
    guest->owner = getpid();
    struct kvm_outcome outcome = map_memory(guest);
    if (!outcome.error)
        outcome = make_vm(guest);
    return outcome.error ? outcome : add_vcpus(guest);
}

/* ---- what it is -------------------------------------------------------------------------------------------- */

uint32_t kvm_guest_workers(const struct kvm_guest *guest) {
    return guest->config.vcpus + 1;
}

uint64_t kvm_guest_bytes(const struct kvm_guest *guest) {
    return guest->config.bytes;
}

uint32_t kvm_guest_pages(const struct kvm_guest *guest) {
    return (uint32_t)(guest->config.bytes / KVM_GUEST_PAGE);
}

uint8_t *kvm_guest_memory(const struct kvm_guest *guest) {
    return guest->memory;
}

int kvm_guest_memory_fd(const struct kvm_guest *guest) {
    return guest->memory_fd;
}

static uint64_t mailbox_at(const struct kvm_guest *guest, uint32_t worker) {
    if (worker >= kvm_guest_workers(guest))
        abort();
    return guest->mailboxes_at + worker * guest->mailbox_stride;
}

static struct kvm_mailbox *mailbox_of(const struct kvm_guest *guest, uint32_t worker) {
    return (struct kvm_mailbox *)(void *)(guest->side + mailbox_at(guest, worker));
}

struct kvm_touch *kvm_guest_script(struct kvm_guest *guest, uint32_t worker) {
    return (struct kvm_touch *)(void *)(guest->side + mailbox_at(guest, worker) + KVM_GUEST_PAGE);
}

void kvm_guest_stop(struct kvm_guest *guest, uint32_t worker) {
    atomic_store(&mailbox_of(guest, worker)->stop, 1);
}

uint64_t kvm_guest_passes(const struct kvm_guest *guest, uint32_t worker) {
    return atomic_load(&mailbox_of(guest, worker)->passes);
}

/* Pages of 2 MiB hide together. Another vCPU may still have it in its TLB until its next pass. */
void kvm_guest_hide(struct kvm_guest *guest, uint32_t page, bool hidden) {
    uint64_t at = MEMORY_AT + (uint64_t)page * KVM_GUEST_PAGE, entry = ROOT_AT;
    uint64_t *last = NULL;
    for (unsigned shift = 39; shift >= (guest->config.large_pages ? 21 : 12); shift -= 9) {
        last = &table_at(guest, entry & ~UINT64_C(0xfff))[at >> shift & 511];
        entry = *last;
    }
    __atomic_store_n(last, hidden ? entry & ~UINT64_C(1) : entry | 1, __ATOMIC_SEQ_CST);
}

/* ---- running ----------------------------------------------------------------------------------------------- */

static struct kvm_outcome check_script(const struct kvm_guest *guest, const struct kvm_touch *script, uint32_t count) {
    if (count > KVM_SCRIPT_MAX)
        return kvm_outcome_fail(-EINVAL, 0, "a script of %u touches, more than %u", count, KVM_SCRIPT_MAX);
    for (uint32_t i = 0; i < count; i++)
        if (script[i].page >= kvm_guest_pages(guest) || script[i].word >= KVM_GUEST_WORDS ||
            script[i].kind >= KVM_TOUCH_KINDS || script[i].times == 0)
            return kvm_outcome_fail(-EINVAL, i, "touch %u (page %u, word %u, kind %u, %u times) cannot be done", i,
                                    script[i].page, script[i].word, script[i].kind, script[i].times);
    return (struct kvm_outcome){.error = 0};
}

/* Which touch of its script the vCPU is at. */
static uint32_t touch_at(const struct kvm_guest *guest, uint32_t worker, uint32_t count) {
    struct kvm_regs regs;
    uint64_t script_at = mailbox_at(guest, worker) + KVM_GUEST_PAGE;
    if (ioctl(guest->vcpus[worker].fd, KVM_GET_REGS, &regs))
        return 0;
    uint64_t index = (regs.r15 - script_at) / sizeof(struct kvm_touch);
    return index < count ? (uint32_t)index : 0;
}

/* The entry of the lowest level that maps an address, as it is in side memory now; 0 where none does. */
static uint64_t mapped_by(const struct kvm_guest *guest, uint64_t address) {
    uint64_t entry = ROOT_AT | HERE;
    for (unsigned shift = 39; shift >= 12; shift -= 9) {
        uint64_t table = entry & ~UINT64_C(0xfff);
        if (table >= guest->side_bytes || address >> 48)
            return 0;
        entry = table_at(guest, table)[address >> shift & 511];
        if (!(entry & 1) || (shift <= 30 && entry & (HERE_LARGE & ~HERE)))
            return entry;
    }
    return entry;
}

/* An exception says where and why; all that it depends on is read again, to tell a wrong byte from a wrong processor. */
static struct kvm_outcome exception_of(const struct kvm_guest *guest, uint32_t worker, uint32_t count) {
    const struct kvm_exception *e = &mailbox_of(guest, worker)->exception;
    uint64_t index = (e->r15 - mailbox_at(guest, worker) - KVM_GUEST_PAGE) / sizeof(struct kvm_touch);
    if (!e->taken)
        return (struct kvm_outcome){.error = 0};
    const struct kvm_touch *touch = kvm_guest_script((struct kvm_guest *)guest, worker) + (index < count ? index : 0);
    return kvm_outcome_fail(
        -EIO, index < count ? (uint32_t)index : 0,
        "the guest took exception %u at touch %llu of %u (page %u, word %u): on its stack %#llx %#llx, address %#llx "
        "which page tables now map by %#llx; r8 %#llx r9 %#llx rcx %llu",
        (unsigned)(e->taken - KVM_EXCEPTION_TAKEN), (unsigned long long)index, count, touch->page, touch->word,
        (unsigned long long)e->stack[0], (unsigned long long)e->stack[1], (unsigned long long)e->cr2,
        (unsigned long long)mapped_by(guest, e->cr2), (unsigned long long)e->r8, (unsigned long long)e->r9,
        (unsigned long long)e->rcx);
}

/* Code, descriptors and page tables are as they were written, but for ACCESSED and DIRTY. */
static bool side_is_whole(const struct kvm_guest *guest) {
    for (uint64_t i = 0; i < guest->mailboxes_at / sizeof(uint64_t); i++) {
        bool table = i * sizeof(uint64_t) >= ROOT_AT;
        if ((table_at(guest, 0)[i] ^ guest->written[i]) & ~(table ? UINT64_C(0x60) : 0))
            return false;
    }
    return true;
}

static struct kvm_outcome shut_down(const struct kvm_guest *guest) {
    if (!side_is_whole(guest))
        return kvm_outcome_fail(-EIO, 0, "the guest shut down: its code or its page tables were overwritten");
    return kvm_outcome_fail(-KVM_GUEST_LOST, 0,
                            "the guest shut down, though its code, page tables and exception handlers are as written");
}

/* One that has lost its way may go on for ever: looked at whenever a signal interrupts it. */
static struct kvm_outcome interrupted(const struct vcpu *vcpu) {
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) || ioctl(vcpu->fd, KVM_GET_REGS, &regs))
        return failed("KVM_GET_SREGS, KVM_GET_REGS");
    if (sregs.cr3 == ROOT_AT)
        return (struct kvm_outcome){.error = 0};
    return kvm_outcome_fail(-KVM_GUEST_LOST, 0,
                            "the guest runs at %#llx with CR3 %#llx, and has never loaded another than %#x",
                            (unsigned long long)regs.rip, (unsigned long long)sregs.cr3, ROOT_AT);
}

static struct kvm_outcome enter(struct kvm_guest *guest, uint32_t worker, uint32_t count) {
    const struct vcpu *vcpu = &guest->vcpus[worker];
    const struct kvm_run *state = vcpu->state;
    for (;;) {
        kvm_poisoned = 0;
        kvm_in_guest = 1;
        int error = ioctl(vcpu->fd, KVM_RUN, 0) ? errno : 0;
        kvm_in_guest = 0;
        uint32_t at = error || state->exit_reason != KVM_EXIT_HLT ? touch_at(guest, worker, count) : 0;
        if (kvm_poisoned)
            return kvm_outcome_fail(-EHWPOISON, at, "a page is poisoned at touch %u", at);
        if (error == EINTR || error == EAGAIN) {
            struct kvm_outcome outcome = interrupted(vcpu);
            if (outcome.error)
                return outcome;
            continue;
        }
        if (error)
            return kvm_outcome_fail(-error, at, "KVM_RUN at touch %u: %s", at, strerror(error));
        if (state->exit_reason == KVM_EXIT_HLT)
            return exception_of(guest, worker, count);
        if (state->exit_reason == KVM_EXIT_SHUTDOWN)
            return shut_down(guest);
        if (state->exit_reason == KVM_EXIT_FAIL_ENTRY)
            return kvm_outcome_fail(-ENOTSUP, at, "the processor does not enter the guest (reason %#llx)",
                                    (unsigned long long)state->fail_entry.hardware_entry_failure_reason);
        if (state->exit_reason == KVM_EXIT_INTERNAL_ERROR)
            return kvm_outcome_fail(-ENOTSUP, at, "KVM cannot run the guest (internal error %u)",
                                    state->internal.suberror);
        return kvm_outcome_fail(-EIO, at, "the guest left by exit %u at touch %u", state->exit_reason, at);
    }
}

static struct kvm_outcome run_vcpu(struct kvm_guest *guest, uint32_t worker, uint32_t count, uint64_t passes) {
    uint64_t mailbox = mailbox_at(guest, worker);
    struct kvm_regs regs = {.rip = CODE_AT,
                            .rflags = RFLAGS_BITS,
                            .rsp = mailbox + KVM_GUEST_PAGE,
                            .rdi = mailbox + KVM_GUEST_PAGE,
                            .rsi = count,
                            .r8 = MEMORY_AT,
                            .r13 = mailbox,
                            .r14 = passes,
                            .r15 = mailbox + KVM_GUEST_PAGE};
    mailbox_of(guest, worker)->exception.taken = 0;
    if (ioctl(guest->vcpus[worker].fd, KVM_SET_REGS, &regs))
        return failed("KVM_SET_REGS");
    return enter(guest, worker, count);
}

struct kvm_outcome kvm_guest_run(struct kvm_guest *guest, uint32_t worker, uint32_t count, uint64_t passes) {
    struct kvm_touch *script = kvm_guest_script(guest, worker);
    struct kvm_outcome outcome = check_script(guest, script, count);
    if (outcome.error)
        return outcome;
    if (worker < guest->config.vcpus)
        outcome = run_vcpu(guest, worker, count, passes);
    else
        outcome = kvm_host_run(guest->memory, script, count, passes, mailbox_of(guest, worker));
    atomic_store(&mailbox_of(guest, worker)->stop, 0);
    return outcome;
}
