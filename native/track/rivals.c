/* SPDX-License-Identifier: Apache-2.0 */
#include "track/rivals.h"

#include <stdio.h>
#include <stdlib.h>

#include "attach/proc.h"

static bool switched_on(const char *path) {
    char text[32];
    return fl_proc_read(path, text, sizeof(text)) == 0 && (text[0] == 'Y' || strtoul(text, NULL, 0) > 0);
}

void fl_rivals_describe(bool damon_stat, char *text, size_t bytes) {
    static const struct {
        const char *path, *name;
        bool is_damon_stat;
    } rivals[] = {
        {"/sys/kernel/mm/lru_gen/enabled", "MGLRU", false},
        {"/sys/module/damon_stat/parameters/enabled", "damon_stat", true},
        {"/proc/sys/kernel/numa_balancing", "NUMA balancing", false},
    };
    size_t used = 0;
    text[0] = 0;
    for (size_t i = 0; i < sizeof(rivals) / sizeof(rivals[0]) && used < bytes; i++)
        if ((damon_stat || !rivals[i].is_damon_stat) && switched_on(rivals[i].path))
            used += (size_t)snprintf(text + used, bytes - used, "%s%s",
                                     used ? ", " : "; accesses can be missed, these are on: ", rivals[i].name);
}
