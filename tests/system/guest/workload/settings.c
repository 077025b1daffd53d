/* SPDX-License-Identifier: Apache-2.0 */
#include "settings.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { MIB_MAX = 1 << 20 };

static const struct setting {
    const char *name;
    size_t offset;
    long initial, least, most;
    bool live;
} table[] = {
#define SETTING(field, initial, least, most, live) \
    {#field, offsetof(struct settings, field), initial, least, most, live}
    SETTING(mib, 64, 1, MIB_MAX, false),
    SETTING(max_mib, 0, 0, MIB_MAX, false),
    SETTING(seed, 1, 0, 1L << 40, false),
    SETTING(zero_percent, 10, 0, 100, false),
    SETTING(same_percent, 5, 0, 100, false),
    SETTING(random_percent, 5, 0, 100, false),
    SETTING(huge_pages, 0, 0, 1, false),
    SETTING(threads, 0, 0, 32, false),
    SETTING(interval_ms, 500, 50, 60000, false),
    SETTING(hot_mib, 8, 0, MIB_MAX, false),
    SETTING(hot_write_percent, 10, 0, 100, true),
    SETTING(rate, 50, 0, 1000000, true),
    SETTING(rewrite_percent, 10, 0, 100, true),
    SETTING(writers, 0, 0, 16, true),
    SETTING(writer_rate, 500, 0, 1000000, true),
    SETTING(writer_write_percent, 50, 0, 100, true),
    SETTING(probe, 0, 0, 1, false),
#undef SETTING
};

static _Atomic long *field_of(struct settings *settings, const struct setting *setting) {
    return (_Atomic long *)((char *)settings + setting->offset);
}

static const struct setting *find(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
        if (strlen(table[i].name) == length && memcmp(table[i].name, name, length) == 0)
            return &table[i];
    return NULL;
}

static const char *assign(struct settings *settings, const struct setting *setting, const char *text) {
    char *end;

    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0')
        return "not a whole number";
    if (value < setting->least || value > setting->most)
        return "out of range";
    atomic_store(field_of(settings, setting), value);
    return NULL;
}

void settings_default(struct settings *settings) {
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
        atomic_store(field_of(settings, &table[i]), table[i].initial);
}

const char *settings_parse(struct settings *settings, const char *assignment) {
    size_t length = strcspn(assignment, "=");
    const struct setting *setting = find(assignment, length);

    if (setting == NULL || assignment[length] != '=')
        return "no such setting";
    return assign(settings, setting, assignment + length + 1);
}

const char *settings_change(struct settings *settings, const char *name, const char *value) {
    const struct setting *setting = find(name, strlen(name));

    if (setting == NULL)
        return "no such command or setting";
    if (!setting->live)
        return "can be set at boot only";
    return assign(settings, setting, value);
}
