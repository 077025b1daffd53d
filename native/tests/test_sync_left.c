/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pager has ended in sync mode, where every touch of an armed page waits for the pager, and at first the kernel refuses its
 * successor the way out. The successor goes on until it is out of it. Needs RWP.
 */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "base/kernel.h"
#include "base/log.h"
#include "served_vm.h"
#include "swap/uffd.h"
#include "victim.h"

#define PAGES 64u
#define REFUSALS 20u

static struct fl_vm vm;
static _Atomic(uint32_t) to_refuse, refused;
static _Atomic(bool) in_sync; /* by the last call that the kernel has taken */

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (request != UFFDIO_SET_MODE)
        return (int)syscall(SYS_ioctl, fd, request, argument);
    const struct uffdio_set_mode *mode = argument;
    if (fd == vm.uffd && mode->enable && atomic_load(&to_refuse)) {
        atomic_fetch_sub(&to_refuse, 1);
        atomic_fetch_add(&refused, 1);
        errno = EAGAIN;
        return -1;
    }
    int result = (int)syscall(SYS_ioctl, fd, request, argument);
    if (result == 0)
        atomic_store(&in_sync, mode->disable != 0);
    return result;
}

int main(int argc, char **argv) {
    struct fl_kernel_features features;
    need_paging();
    setvbuf(stdout, NULL, _IOLBF, 0);
    fl_log_setup(FL_LOG_ERROR, 0);
    CHECK(fl_probe_kernel(&features) == 0, "probe");
    if (!features.rwp) {
        printf("skipped: %s\n", features.rwp_lacks);
        return 77;
    }
    const struct fl_tracker_list trackers = trackers_of("rwp");
    struct victim victim = victim_start(PAGES, 0, seed_of(argc, argv));
    struct fl_fault_server *faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    CHECK(fl_uffd_sync(&vm, true) == 0, "sync mode");
    fl_fault_stop(faults);
    fl_serve_close(&vm);
    CHECK(atomic_load(&in_sync), "the pager has not ended in sync mode");

    atomic_store(&to_refuse, REFUSALS);
    faults = served_vm_begin(&vm, victim.pid, &trackers, 1);
    CHECK(atomic_load(&refused) == REFUSALS, "refused %u times of %u", atomic_load(&refused), REFUSALS);
    CHECK(!atomic_load(&in_sync), "the successor has left it in sync mode");
    CHECK(victim_verify(&victim, 30) == 0, "read wrong");
    printf("out of sync mode after it was refused %u times\n", atomic_load(&refused));
    served_vm_end(&vm, faults);
    return 0;
}
