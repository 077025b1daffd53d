/* SPDX-License-Identifier: Apache-2.0 */
#include "runs.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "stuck.h"

enum { ARGUMENTS_LIMIT = 1024, PATH_BYTES = 128, KILL_LIMIT_MS = 10000, NEVER = -1, OUTPUT_BYTES = 1 << 16 };

struct run {
    bool used, keep_children;
    bool reaped, told; /* the first process has ended; EXIT was sent */
    uint32_t id;
    pid_t pid;
    int streams[2]; /* stdout, stderr; -1: at its end */
    int64_t deadline_ms;
    int64_t killed_ms; /* when its cgroup was killed; 0: not */
    struct run_end end;
};

static struct run all[RUNS_LIMIT];
static const uint32_t stream_kinds[2] = {FRAME_OUT, FRAME_ERR};

static int64_t now_ms(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000 + 1; /* never 0 */
}

static void cgroup_path(char *path, uint32_t id, const char *file) {
    snprintf(path, PATH_BYTES, "/sys/fs/cgroup/run-%u%s", id, file);
}

static int cgroup_write(uint32_t id, const char *file, const char *text) {
    char path[PATH_BYTES];

    cgroup_path(path, id, file);
    int descriptor = open(path, O_WRONLY | O_CLOEXEC);
    if (descriptor < 0)
        return -errno;
    int result = write(descriptor, text, strlen(text)) < 0 ? -errno : 0;
    close(descriptor);
    return result;
}

static void refuse(uint32_t id, const char *why, int error) {
    char text[256];

    snprintf(text, sizeof(text), "%s%s%s", why, error == 0 ? "" : ": ", error == 0 ? "" : strerror(error));
    frame_send(FRAME_REFUSED, id, text, strlen(text));
}

static struct run *find(uint32_t id) {
    for (size_t i = 0; i < RUNS_LIMIT; i++)
        if (all[i].used && all[i].id == id)
            return &all[i];
    return NULL;
}

static struct run *find_free(void) {
    for (size_t i = 0; i < RUNS_LIMIT; i++)
        if (!all[i].used)
            return &all[i];
    return NULL;
}

/* `count` strings from `*at` on into `into`, with a NULL behind. False when they are not all there. */
static bool take_strings(const unsigned char **at, const unsigned char *end, uint32_t count, char **into) {
    if (count > ARGUMENTS_LIMIT)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        const unsigned char *nul = memchr(*at, 0, (size_t)(end - *at));

        if (nul == NULL)
            return false;
        into[i] = (char *)(uintptr_t)*at;
        *at = nul + 1;
    }
    into[count] = NULL;
    return true;
}

static int file_of(const unsigned char *content, size_t bytes) {
    if (bytes == 0)
        return open("/dev/null", O_RDONLY | O_CLOEXEC);
    int file = memfd_create("stdin", MFD_CLOEXEC);
    while (file >= 0 && bytes > 0) {
        ssize_t written = write(file, content, bytes);

        if (written <= 0) {
            close(file);
            return -1;
        }
        content += written;
        bytes -= (size_t)written;
    }
    if (file >= 0)
        lseek(file, 0, SEEK_SET);
    return file;
}

__attribute__((noreturn)) static void become(uint32_t id, const int streams[3], char **arguments, char **environment) {
    sigset_t none;

    setsid();
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int i = 0; i < 3; i++)
        dup2(streams[i], i);
    int failed = cgroup_write(id, "/cgroup.procs", "0");
    if (failed != 0) {
        dprintf(2, "init: cannot enter the cgroup of run %u: %s\n", id, strerror(-failed));
        _exit(126);
    }
    environ = environment;
    execvp(arguments[0], arguments);
    dprintf(2, "init: cannot run %s: %s\n", arguments[0], strerror(errno));
    _exit(127);
}

static bool start(struct run *run, int stdin_file, char **arguments, char **environment) {
    int out[2], err[2];
    char cgroup[PATH_BYTES];

    cgroup_path(cgroup, run->id, "");
    if (mkdir(cgroup, 0755) != 0 && errno != EEXIST)
        return false;
    if (pipe2(out, O_CLOEXEC) != 0)
        return false;
    if (pipe2(err, O_CLOEXEC) != 0) {
        close(out[0]);
        close(out[1]);
        return false;
    }
    run->pid = fork();
    if (run->pid == 0)
        become(run->id, (int[3]){stdin_file, out[1], err[1]}, arguments, environment);
    close(out[1]);
    close(err[1]);
    /* Only our ends: what the run itself sees are ordinary pipes. */
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    run->streams[0] = out[0];
    run->streams[1] = err[0];
    return run->pid > 0;
}

void runs_begin(uint32_t id, const unsigned char *payload, size_t bytes) {
    static char *arguments[ARGUMENTS_LIMIT + 1], *environment[ARGUMENTS_LIMIT + 1];
    const unsigned char *end = payload + bytes, *at = payload + sizeof(struct run_request);
    struct run_request request;
    struct run *run = find_free();

    if (run == NULL || find(id) != NULL) {
        refuse(id, run == NULL ? "too many runs at once" : "a run of that number is under way", 0);
        return;
    }
    if (bytes < sizeof(request)) {
        refuse(id, "half a request", 0);
        return;
    }
    memcpy(&request, payload, sizeof(request));
    if (request.argument_count == 0 || !take_strings(&at, end, request.argument_count, arguments) ||
        !take_strings(&at, end, request.environment_count, environment) || (size_t)(end - at) != request.stdin_bytes) {
        refuse(id, "a request that does not add up", 0);
        return;
    }
    int stdin_file = file_of(at, request.stdin_bytes);
    *run = (struct run){.used = true, .id = id, .keep_children = request.keep_children != 0, .streams = {-1, -1}};
    run->deadline_ms = now_ms() + request.limit_ms;
    if (stdin_file < 0 || !start(run, stdin_file, arguments, environment)) {
        refuse(id, "cannot start it", errno);
        run->used = false;
    }
    if (stdin_file >= 0)
        close(stdin_file);
}

void runs_signal(uint32_t id, int signal) {
    struct run *run = find(id);

    if (run != NULL && !run->reaped)
        kill(run->pid, signal);
}

static void kill_all(struct run *run) {
    run->killed_ms = now_ms();
    if (!run->reaped)
        kill(run->pid, SIGKILL); /* it may not have entered its cgroup yet */
    cgroup_write(run->id, "/cgroup.kill", "1");
}

void runs_end(uint32_t id) {
    struct run *run = find(id);

    if (run != NULL)
        kill_all(run);
}

size_t runs_to_poll(struct pollfd *polled) {
    size_t count = 0;

    for (size_t i = 0; i < RUNS_LIMIT; i++)
        for (int stream = 0; stream < 2 && all[i].used; stream++)
            if (all[i].streams[stream] >= 0)
                polled[count++] = (struct pollfd){.fd = all[i].streams[stream], .events = POLLIN};
    return count;
}

static int64_t next_of(const struct run *run) {
    if (run->told)
        return INT64_MAX;
    return run->killed_ms != 0 ? run->killed_ms + KILL_LIMIT_MS : run->deadline_ms;
}

int runs_next_deadline_ms(void) {
    int64_t next = INT64_MAX, now = now_ms();

    for (size_t i = 0; i < RUNS_LIMIT; i++)
        if (all[i].used && next_of(&all[i]) < next)
            next = next_of(&all[i]);
    if (next == INT64_MAX)
        return NEVER;
    return next <= now ? 0 : (int)(next - now > 1000000 ? 1000000 : next - now);
}

static void pass_on(struct run *run) {
    static char data[OUTPUT_BYTES];

    for (int stream = 0; stream < 2; stream++)
        while (run->streams[stream] >= 0) {
            ssize_t got = read(run->streams[stream], data, sizeof(data));

            if (got > 0) {
                frame_send(stream_kinds[stream], run->id, data, (size_t)got);
            } else if (got == 0) {
                close(run->streams[stream]);
                run->streams[stream] = -1;
            } else {
                break; /* EAGAIN: that is all for now */
            }
        }
}

static void reap(void) {
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (size_t i = 0; i < RUNS_LIMIT; i++)
            if (all[i].used && !all[i].reaped && all[i].pid == pid) {
                all[i].reaped = true;
                all[i].end.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
                if (!all[i].keep_children && all[i].killed_ms == 0)
                    kill_all(&all[i]);
            }
}

static void tell(struct run *run) {
    frame_send(FRAME_EXIT, run->id, &run->end, sizeof(run->end));
    run->told = true;
}

static void say_where_it_hangs(struct run *run) {
    char cgroup[PATH_BYTES];
    size_t length;

    cgroup_path(cgroup, run->id, "");
    const char *text = stuck_describe(cgroup, &length);
    frame_send(FRAME_ERR, run->id, text, length);
}

static void look_after(struct run *run) {
    char cgroup[PATH_BYTES];
    bool silent;

    /* Reaped first, read then: what was written before the end is passed on before EXIT is. */
    pass_on(run);
    silent = run->streams[0] < 0 && run->streams[1] < 0;
    if (!run->told && run->reaped && (silent || run->keep_children))
        tell(run);
    if (!run->told && run->killed_ms == 0 && now_ms() >= run->deadline_ms) {
        run->end.over_limit = 1;
        say_where_it_hangs(run);
        kill_all(run);
    }
    if (!run->told && run->killed_ms != 0 && now_ms() >= run->killed_ms + KILL_LIMIT_MS) {
        run->end.unkillable = 1;
        say_where_it_hangs(run);
        tell(run);
    }
    if (run->told && silent && run->reaped) {
        cgroup_path(cgroup, run->id, "");
        rmdir(cgroup); /* stays as long as somebody lives in it */
        run->used = false;
    }
}

void runs_serve(void) {
    reap();
    for (size_t i = 0; i < RUNS_LIMIT; i++)
        if (all[i].used)
            look_after(&all[i]);
}
