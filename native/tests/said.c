/* SPDX-License-Identifier: Apache-2.0 */
#include "said.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "victim.h"

struct said said_open(void) {
    struct said said = {.file = memfd_create("log", MFD_CLOEXEC), .stderr_fd = -1};
    CHECK(said.file >= 0, "memfd: %s", strerror(errno));
    return said;
}

void said_begin(struct said *said) {
    said->stderr_fd = dup(STDERR_FILENO);
    CHECK(said->stderr_fd >= 0 && dup2(said->file, STDERR_FILENO) >= 0, "dup: %s", strerror(errno));
}

void said_end(struct said *said) {
    (void)dup2(said->stderr_fd, STDERR_FILENO);
    close(said->stderr_fd);
    said->stderr_fd = -1;
}

char *said_text(const struct said *said) {
    struct stat status;
    CHECK(fstat(said->file, &status) == 0, "fstat: %s", strerror(errno));
    char *text = calloc((size_t)status.st_size + 1, 1);
    CHECK(text && pread(said->file, text, (size_t)status.st_size, 0) == status.st_size, "the log: %s", strerror(errno));
    return text;
}

void said_close(struct said *said) {
    close(said->file);
}

void check_said(const char *log, const char *event, const char *first, const char *second) {
    for (const char *line = log; *line;) {
        size_t length = strcspn(line, "\n");
        char copy[1024];
        snprintf(copy, sizeof(copy), "%.*s", (int)(length < sizeof(copy) ? length : sizeof(copy) - 1), line);
        if (strstr(copy, event) && strstr(copy, first) && strstr(copy, second)) {
            printf("  %s\n", copy);
            return;
        }
        line += length + (line[length] == '\n');
    }
    CHECK(false, "no %s with '%s' and '%s' in:\n%s", event, first, second, log);
}
