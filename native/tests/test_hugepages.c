/* SPDX-License-Identifier: Apache-2.0 */
/* Which settings of a host may give shared memory huge pages: in folders that look like the kernel's. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "attach/hugepages.h"

static char folder[] = "/tmp/fl-hugepages-XXXXXX";

static void put(const char *name, const char *text) {
    char path[128];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    if (!text) {
        unlink(path);
        return;
    }
    FILE *file = fopen(path, "we");
    if (!file || fputs(text, file) < 0 || fclose(file))
        abort();
}

static int check(const char *all, const char *large, const char *small, bool huge, const char *named) {
    char what[256] = "";
    put("shmem_enabled", all);
    put("hugepages-2048kB/shmem_enabled", large);
    put("hugepages-64kB/shmem_enabled", small);
    bool seen = fl_hugepages_for_shmem(folder, what, sizeof(what));
    if (seen == huge && (!huge || strstr(what, named)))
        return 0;
    fprintf(stderr, "all %s, 2M %s, 64k %s: %d (%s), expected %d\n", all ? all : "-", large ? large : "-",
            small ? small : "-", seen, what, huge);
    return 1;
}

int main(void) {
    char path[128];
    if (!mkdtemp(folder))
        return 1;
    snprintf(path, sizeof(path), "%s/hugepages-2048kB", folder);
    mkdir(path, 0700);
    snprintf(path, sizeof(path), "%s/hugepages-64kB", folder);
    mkdir(path, 0700);
    const char *never = "always within_size advise [never] deny force\n",
               *advise = "always [advise] never deny force\n";
    const char *inherit = "always [inherit] within_size advise never\n", *size_never = "always inherit [never]\n";
    const char *always = "[always] inherit never\n";
    int wrong = 0;
    wrong += check(never, inherit, size_never, false, "");
    wrong += check(advise, inherit, size_never, true, "advise");
    wrong += check(never, inherit, always, true, "64kB");
    wrong += check("always never [deny] force\n", inherit, always, false, "");
    wrong += check("always never deny [force]\n", size_never, size_never, true, "force");
    wrong += check(advise, size_never, size_never, false, "");
    wrong += check(advise, NULL, NULL, true, "advise"); /* a kernel without sizes */
    wrong += check(never, NULL, NULL, false, "");
    wrong += check(NULL, NULL, NULL, false, ""); /* a kernel without huge pages */
    wrong += check("no brackets at all\n", NULL, NULL, false, "");
    snprintf(path, sizeof(path), "rm -r %s", folder);
    return wrong || system(path) != 0;
}
