/* SPDX-License-Identifier: Apache-2.0 */
#include "served_vm.h"

#include <fcntl.h>
#include <string.h>

#include "attach/inspect.h"
#include "swap/evict.h"
#include "victim.h"

struct fl_vault vault_of(pid_t pid, bool write) {
    struct fl_vault vault;
    struct fl_refused why;
    uint64_t ticks;
    int fd;
    CHECK(fl_proc_start_time((int)pid, &ticks) == 0, "start time");
    CHECK(fl_vmm_open_vault((int)pid, write ? O_RDWR : O_RDONLY, &fd) == 0, "no vault");
    CHECK(fl_vault_map(fd, write, (int)pid, ticks, &vault, &why) == 0, "%s", why.detail);
    return vault;
}

void evict_first(struct fl_vm *vm, uint32_t pages) {
    struct fl_evictor *evictor;
    struct fl_evicted done = {0};
    uint64_t all[FL_WINDOW_PAGES / 64];
    memset(all, 0xff, sizeof(all));
    CHECK(fl_evictor_create(vm, NULL, NULL, &evictor) == 0, "evictor");
    int error = fl_evict_window(evictor, 0, fl_region(vm, 0)->first_page, pages, all, &done);
    CHECK(error == 0 && done.pages > pages / 2, "%llu pages evicted: %s", (unsigned long long)done.pages,
          strerror(-error));
    fl_evictor_destroy(evictor);
}
