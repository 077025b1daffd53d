/* SPDX-License-Identifier: Apache-2.0 */
/* Finding a system call instruction in a VMM. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "attach/arch.h"
#include "attach/inject.h"
#include "attach/proc.h"

#define TEXT_MAX (16u << 20) /* of one mapping that is searched */

struct text_search {
    int pid;
    bool vdso_only;
    uint64_t found;
};

static int search_text(const struct fl_proc_map *map, void *context) {
    struct text_search *search = context;
    bool is_vdso = strcmp(map->path, "[vdso]") == 0;
    size_t length = map->end - map->start;
    if (!map->readable || !map->executable || is_vdso != search->vdso_only || length > TEXT_MAX || map->start >> 63) {
        return 0;
    }
    uint8_t *text = malloc(length);
    if (!text) {
        return -ENOMEM;
    }
    struct iovec local = {.iov_base = text, .iov_len = length};
    struct iovec remote = {.iov_base = (void *)map->start, .iov_len = length};
    ssize_t got = process_vm_readv(search->pid, &local, 1, &remote, 1, 0);
    size_t at = got > 0 ? fl_arch_find_syscall(text, (size_t)got) : 0;
    bool found = got > 0 && at < (size_t)got;
    free(text);
    if (found) {
        search->found = map->start + at;
    }
    return found;
}

/* In the vDSO, which every process has; else in any library. Text is never written to. */
int fl_inject_find_instruction(int pid, uint64_t *out) {
    struct text_search search = {.pid = pid, .vdso_only = true};
    int result = fl_proc_maps(pid, search_text, &search);
    if (result == 0) {
        search.vdso_only = false;
        result = fl_proc_maps(pid, search_text, &search);
    }
    *out = search.found;
    return result == 1 ? 0 : (result ? result : -ENOENT);
}
