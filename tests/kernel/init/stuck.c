/* SPDX-License-Identifier: Apache-2.0 */
#include "stuck.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT_BYTES = 1 << 16, PATH_BYTES = 192, THREADS_SHOWN = 64 };

static char text[TEXT_BYTES];
static size_t used;

__attribute__((format(printf, 1, 2))) static void add(const char *format, ...) {
    va_list arguments;

    va_start(arguments, format);
    int wanted = vsnprintf(text + used, sizeof(text) - used, format, arguments);
    va_end(arguments);
    used += wanted < 0 ? 0 : (size_t)wanted;
    if (used > sizeof(text) - 1)
        used = sizeof(text) - 1;
}

static void add_file(const char *folder, const char *name) {
    char path[PATH_BYTES * 2], content[4096];

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    ssize_t got = read(file, content, sizeof(content) - 1);
    close(file);
    if (got > 0)
        add("    %s: %.*s%s", name, (int)got, content, content[got - 1] == '\n' ? "" : "\n");
}

static unsigned add_threads(long pid, unsigned shown) {
    char tasks[64], task[PATH_BYTES];
    struct dirent *entry;

    snprintf(tasks, sizeof(tasks), "/proc/%ld/task", pid);
    DIR *folder = opendir(tasks);
    if (folder == NULL)
        return shown;
    while ((entry = readdir(folder)) != NULL && shown < THREADS_SHOWN) {
        if (entry->d_name[0] == '.')
            continue;
        add("  process %ld thread %.20s\n", pid, entry->d_name);
        snprintf(task, sizeof(task), "%s/%.20s", tasks, entry->d_name);
        add_file(task, "comm");
        add_file(task, "syscall");
        add_file(task, "stack");
        shown++;
    }
    closedir(folder);
    return shown;
}

const char *stuck_describe(const char *cgroup, size_t *length) {
    char path[PATH_BYTES], line[32];
    unsigned shown = 0;

    used = 0;
    add("init: over its limit; its threads are at\n");
    snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
    FILE *members = fopen(path, "re");
    while (members != NULL && fgets(line, sizeof(line), members) != NULL)
        shown = add_threads(strtol(line, NULL, 10), shown);
    if (members != NULL)
        fclose(members);
    *length = used;
    return text;
}
