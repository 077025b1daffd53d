/* SPDX-License-Identifier: Apache-2.0 */
#include "attach/hugepages.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

#include "attach/proc.h"

#define WORD_BYTES 16

/* The word in brackets, "" when there is no such file. */
static void chosen_word(const char *path, char word[WORD_BYTES]) {
    char text[256];
    word[0] = '\0';
    if (fl_proc_read(path, text, sizeof(text)))
        return;
    const char *open = strchr(text, '['), *close = open ? strchr(open, ']') : NULL;
    if (close && close - open - 1 < WORD_BYTES)
        snprintf(word, WORD_BYTES, "%.*s", (int)(close - open - 1), open + 1);
}

static bool is_one_of(const char *word, const char *a, const char *b) {
    return strcmp(word, a) == 0 || strcmp(word, b) == 0;
}

bool fl_hugepages_for_shmem(const char *folder, char *what, size_t size) {
    char path[512], all[WORD_BYTES], one[WORD_BYTES];
    bool sizes = false, huge = false;
    snprintf(path, sizeof(path), "%s/shmem_enabled", folder);
    chosen_word(path, all);
    if (strcmp(all, "deny") == 0)
        return false; /* whatever the sizes say */
    snprintf(what, size, "%s is %s", path, all);
    DIR *entries = opendir(folder);
    for (const struct dirent *entry; entries && !huge && (entry = readdir(entries));) {
        if (strncmp(entry->d_name, "hugepages-", 10) != 0)
            continue;
        snprintf(path, sizeof(path), "%s/%.64s/shmem_enabled", folder, entry->d_name);
        chosen_word(path, one);
        sizes |= one[0] != '\0';
        if (strcmp(one, "inherit") == 0) {
            huge = all[0] && strcmp(all, "never") != 0;
        } else if (one[0] && strcmp(one, "never") != 0) {
            huge = true;
            snprintf(what, size, "%s is %s", path, one);
        }
    }
    if (entries)
        closedir(entries);
    /* Kernels that know one huge size have no file for each. */
    return huge || strcmp(all, "force") == 0 || (!sizes && all[0] && !is_one_of(all, "never", "deny"));
}
