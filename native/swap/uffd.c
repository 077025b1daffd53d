/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/kernel.h"
#include "base/log.h"

#define AGAIN_NS (20 * FL_NS_PER_US)
#define EVENTS \
    (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_FORK)
#define FOR_WP (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
#define NEEDED (EVENTS | FOR_WP)
#define FOR_RWP (UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC | UFFD_FEATURE_MINOR_SHMEM)

static int call(struct fl_vm *vm, unsigned long request, void *argument) {
    return ioctl(vm->uffd, request, argument) ? -errno : 0;
}

int fl_uffd_open_device(int flags, int *fd) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -errno;
    *fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK | flags);
    int error = *fd < 0 ? -errno : 0;
    close(device);
    return error;
}

int fl_uffd_open_call(int flags, int *fd) {
    *fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    return *fd < 0 ? -errno : 0;
}

int fl_uffd_open_own(int flags, int *fd) {
    return fl_uffd_open_device(flags, fd) ? fl_uffd_open_call(flags, fd) : 0;
}

uint64_t fl_uffd_features(enum fl_freeze freeze) {
    return freeze == FL_FREEZE_RWP ? FOR_WP | FOR_RWP : FOR_WP;
}

int fl_uffd_api(int fd, uint64_t features) {
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    return ioctl(fd, UFFDIO_API, &api) ? -errno : 0;
}

int fl_uffd_setup(struct fl_vm *vm, struct fl_refused *why) {
    /* From most to least. A set that the kernel does not know leaves the descriptor as it was. */
    static const uint64_t sets[] = {NEEDED | UFFD_FEATURE_POISON | FOR_RWP, NEEDED | UFFD_FEATURE_POISON, NEEDED};
    int error = -EINVAL;
    for (size_t i = 0; i < sizeof(sets) / sizeof(sets[0]) && error == -EINVAL; i++) {
        error = fl_uffd_api(vm->uffd, sets[i]);
        if (!error)
            atomic_store(&vm->vault.header->uffd_features, sets[i]);
    }
    /* Set up before looks the same as unsupported; a register by a descriptor that is not set up gives EINVAL too, so
     * the caller's next step decides. A predecessor that died in between has left no word: RWP is not sure then. */
    if (error == -EINVAL && !atomic_load(&vm->vault.header->uffd_features))
        atomic_store(&vm->vault.header->uffd_features, NEEDED | UFFD_FEATURE_POISON);
    if (error && error != -EINVAL)
        return fl_refuse(why, error == -EPERM ? FL_REFUSAL_PERMISSION : FL_REFUSAL_KERNEL,
                         "UFFDIO_API with shmem MISSING, WP and events on process %d: %s; run as root on a kernel with "
                         "CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP",
                         vm->pid, strerror(-error));
    vm->uffd_features = atomic_load(&vm->vault.header->uffd_features);
    return 0;
}

bool fl_uffd_allows(uint64_t features, enum fl_freeze freeze) {
    return freeze == FL_FREEZE_WP || (freeze == FL_FREEZE_RWP && (features & FOR_RWP) == FOR_RWP);
}

void fl_uffd_disallow_rwp(struct fl_vm *vm) {
    vm->uffd_features = atomic_fetch_and(&vm->vault.header->uffd_features, ~FOR_RWP) & ~FOR_RWP;
}

int fl_uffd_register(struct fl_vm *vm, uint64_t address, uint64_t length) {
    struct uffdio_register argument = {
        .range = {.start = address, .len = length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    argument.mode |=
        vm->freeze == FL_FREEZE_RWP ? UFFDIO_REGISTER_MODE_RWP | UFFDIO_REGISTER_MODE_MINOR : UFFDIO_REGISTER_MODE_WP;
    return call(vm, UFFDIO_REGISTER, &argument);
}

int fl_uffd_unregister(struct fl_vm *vm, uint64_t address, uint64_t length) {
    struct uffdio_range range = {.start = address, .len = length};
    return call(vm, UFFDIO_UNREGISTER, &range);
}

int fl_uffd_copy(struct fl_vm *vm, uint64_t address, const void *source, uint64_t length, uint64_t *done) {
    struct uffdio_copy argument = {.dst = address, .src = (uint64_t)(uintptr_t)source, .len = length};
    int error = call(vm, UFFDIO_COPY, &argument);
    *done = argument.copy > 0 ? (uint64_t)argument.copy : 0;
    /* A part done answers EAGAIN whatever stopped it; the caller finds out by going on from there. */
    return error;
}

int fl_uffd_zero(struct fl_vm *vm, uint64_t address) {
    struct uffdio_zeropage argument = {.range = {.start = address, .len = FL_PAGE_SIZE}};
    return call(vm, UFFDIO_ZEROPAGE, &argument);
}

int fl_uffd_continue(struct fl_vm *vm, uint64_t address) {
    struct uffdio_continue argument = {.range = {.start = address, .len = FL_PAGE_SIZE}};
    return call(vm, UFFDIO_CONTINUE, &argument);
}

int fl_uffd_protect(struct fl_vm *vm, uint64_t address, uint64_t length, bool protect) {
    struct uffdio_range range = {.start = address, .len = length};
    struct uffdio_writeprotect wp = {.range = range, .mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    struct uffdio_rwprotect rwp = {.range = range, .mode = protect ? UFFDIO_RWPROTECT_MODE_RWP : 0};
    return vm->freeze == FL_FREEZE_RWP ? call(vm, UFFDIO_RWPROTECT, &rwp) : call(vm, UFFDIO_WRITEPROTECT, &wp);
}

int fl_uffd_protect_patiently(struct fl_vm *vm, uint64_t address, uint64_t length, bool protect, uint32_t tries) {
    int error = -EAGAIN;
    for (uint32_t i = 0; i < tries && error == -EAGAIN; i++) {
        error = fl_uffd_protect(vm, address, length, protect);
        if (error == -EAGAIN)
            fl_sleep_ns(AGAIN_NS);
    }
    return error;
}

int fl_uffd_sync(struct fl_vm *vm, bool on) {
    struct uffdio_set_mode mode = {.enable = on ? 0 : UFFD_FEATURE_RWP_ASYNC,
                                   .disable = on ? UFFD_FEATURE_RWP_ASYNC : 0};
    return vm->freeze == FL_FREEZE_RWP ? call(vm, UFFDIO_SET_MODE, &mode) : 0;
}

void fl_uffd_leave_sync(struct fl_vm *vm) {
    int error;
    for (uint64_t try = 1; (error = fl_uffd_sync(vm, false)) && error != -ESRCH && !atomic_load(&vm->gone); try++) {
        if (fl_log_worth(try))
            fl_log_text(
                FL_LOG_ERROR, "sync_mode_stays",
                "UFFDIO_SET_MODE back to async on process %d, %llu times: %s; every touch of cold memory there is "
                "answered by this pager until it works; move the VM to another host if it does not",
                vm->pid, (unsigned long long)try, strerror(-error));
        fl_sleep_ns(FL_NS_PER_MS);
    }
}

int fl_uffd_wake(struct fl_vm *vm, uint64_t address, uint64_t length) {
    struct uffdio_range range = {.start = address, .len = length};
    return call(vm, UFFDIO_WAKE, &range);
}

int fl_uffd_poison(struct fl_vm *vm, uint64_t address) {
    if (!(vm->uffd_features & UFFD_FEATURE_POISON))
        return -ENOSYS;
    struct uffdio_poison argument = {.range = {.start = address, .len = FL_PAGE_SIZE}};
    return call(vm, UFFDIO_POISON, &argument);
}
