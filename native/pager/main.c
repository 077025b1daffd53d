/* SPDX-License-Identifier: Apache-2.0 */
/* frostline-pager: serves one VM. Crash-only: what matters is in the vault, and the next pager reads it there. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <malloc.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "pager/control.h"
#include "pager/serve.h"

#define URGENT_NICE (-19)
#define LARGE_BYTES (UINT64_C(64) << 30)

#define LONGEST_IO_MS 2000u
#define LONGEST_IO_MS_MAX 60000u

static const char usage[] =
    "usage: frostline-pager --pid PID --socket PATH [options]\n"
    "\n"
    "Serves the memory of one VM: sees which pages are touched, evicts cold ones within the budget it is given over\n"
    "the socket, brings pages back when they are touched. Started on a VM whose pager died, it takes over.\n"
    "\n"
    "  --fault-threads N            threads that answer faults, 1 to 16 (2)\n"
    "  --scan-interval-ms N         time between two scans, 100 to 3600000 (10000, or what the vault says)\n"
    "  --trackers LIST              which of rwp, zap, idle, damon may be used, the best first, or auto (auto)\n"
    "  --pool-max-bytes N           most host memory for compressed pages (no limit)\n"
    "  --stall-target-permille N    stall above which eviction is braked, 1 to 1000 (10)\n"
    "  --longest-io-ms N            longest direct I/O of the VM's disks, 0 to 60000: nothing is evicted for so long\n"
    "                               after a scan, at most half the time between two (2000)\n"
    "  --log-level L                debug, info, warning, error (info)\n"
    "  --version\n"
    "\n"
    "Exits with 0 when detached or released, 2 on bad usage, 3 when the VM ended, 4 on an internal error,\n"
    "64 + N when the VM is refused (N: enum fl_refusal).\n";

static bool parse_number(const char *text, uint64_t low, uint64_t high, uint64_t *out) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || end == text || *end || text[0] == '-' || value < low || value > high)
        return false;
    *out = value;
    return true;
}

static int bad_usage(const char *what) {
    fprintf(stderr, "frostline-pager: %s\n\n%s", what, usage);
    return FL_EXIT_USAGE;
}

static int bad_value(const char *option, const char *value) {
    fprintf(stderr, "frostline-pager: --%s does not take '%s'; see frostline-pager --help\n", option, value);
    return FL_EXIT_USAGE;
}

/* -1: go on; else the exit code. */
static int parse(int argc, char **argv, struct fl_options *options) {
    enum { PID = 1, SOCKET, THREADS, INTERVAL, TRACKERS, POOL, STALL, IO, LEVEL, VERSION, HELP };
    static const struct option known[] = {
        {"pid", required_argument, NULL, PID},
        {"socket", required_argument, NULL, SOCKET},
        {"fault-threads", required_argument, NULL, THREADS},
        {"scan-interval-ms", required_argument, NULL, INTERVAL},
        {"trackers", required_argument, NULL, TRACKERS},
        {"pool-max-bytes", required_argument, NULL, POOL},
        {"stall-target-permille", required_argument, NULL, STALL},
        {"longest-io-ms", required_argument, NULL, IO},
        {"log-level", required_argument, NULL, LEVEL},
        {"version", no_argument, NULL, VERSION},
        {"help", no_argument, NULL, HELP},
        {0},
    };
    enum fl_log_level level = FL_LOG_INFO;
    uint64_t number = 0;
    *options = (struct fl_options){.fault_threads = 2, .stall_target_permille = 10, .longest_io_ms = LONGEST_IO_MS};
    (void)fl_tracker_list_parse("auto", &options->trackers);
    int which = 0;
    for (int option; (option = getopt_long(argc, argv, "", known, &which)) != -1;) {
        bool fine = true;
        switch (option) {
        case PID:
            fine = parse_number(optarg, 2, 1 << 30, &number);
            options->vmm_pid = (int)number;
            break;
        case SOCKET:
            options->socket_path = optarg;
            break;
        case THREADS:
            fine = parse_number(optarg, 1, FL_FAULT_THREADS_MAX, &number);
            options->fault_threads = (uint32_t)number;
            break;
        case INTERVAL:
            fine = parse_number(optarg, 100, 3600000, &number);
            options->scan_interval_ms = (uint32_t)number;
            break;
        case TRACKERS:
            fine = fl_tracker_list_parse(optarg, &options->trackers);
            break;
        case POOL:
            fine = parse_number(optarg, 0, UINT64_MAX, &options->pool_max_bytes);
            break;
        case STALL:
            fine = parse_number(optarg, 1, 1000, &number);
            options->stall_target_permille = (uint32_t)number;
            break;
        case IO:
            fine = parse_number(optarg, 0, LONGEST_IO_MS_MAX, &number);
            options->longest_io_ms = (uint32_t)number;
            break;
        case LEVEL:
            fine = fl_log_level_parse(optarg, &level);
            break;
        case VERSION:
            printf("frostline-pager %s\n", fl_version());
            return FL_EXIT_OK;
        case HELP:
            fputs(usage, stdout);
            return FL_EXIT_OK;
        default:
            return bad_usage("unknown option or missing value");
        }
        if (!fine)
            return bad_value(known[which].name, optarg);
    }
    if (!options->vmm_pid || !options->socket_path || optind != argc)
        return bad_usage("--pid and --socket are needed, and nothing else");
    fl_log_setup(level, options->vmm_pid);
    return -1;
}

/*
 * The fault path must not wait for memory: nothing of ours is swapped out, and others go first when memory runs out.
 * Comes before the vault is mapped, which decides for itself (base/vault.c).
 */
static void harden(void) {
    (void)mallopt(M_ARENA_MAX, 1);
    bool locked = mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0;
    /* Without CAP_IPC_LOCK the limit on locked memory would make large mappings fail: then rather no lock at all. */
    void *large = mmap(NULL, LARGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (large != MAP_FAILED) {
        munmap(large, LARGE_BYTES);
    } else {
        munlockall();
        locked = false;
    }
    if (!locked)
        fl_log(FL_LOG_WARNING, "mlockall_failed",
               "\"detail\":\"the pager itself may be swapped out; it needs CAP_IPC_LOCK\"");
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, "-900", 4) < 0)
            fl_log(FL_LOG_INFO, "oom_score_failed", "\"errno\":%d", errno);
        close(fd);
    }
}

static int block_signals(void) {
    sigset_t taken;
    sigemptyset(&taken);
    sigaddset(&taken, SIGTERM);
    sigaddset(&taken, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    if (pthread_sigmask(SIG_BLOCK, &taken, NULL))
        return -1;
    return signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int refused(const struct fl_refused *why) {
    fl_log(why->refusal == FL_REFUSAL_GONE ? FL_LOG_INFO : FL_LOG_ERROR, "refused", "\"refusal\":\"%s\",\"code\":%u",
           fl_refusal_name(why->refusal), why->refusal);
    fl_log_text(FL_LOG_ERROR, "refused_because", "%s", why->detail);
    return FL_EXIT_REFUSED + (int)why->refusal;
}

static int finish(struct fl_vm *vm, enum fl_mover_end end) {
    struct fl_refused why;
    switch (end) {
    case FL_MOVER_DRAINED:
        if (fl_serve_detach(vm, &why)) {
            fl_log_text(FL_LOG_ERROR, "detach_failed", "%s", why.detail);
            return why.refusal == FL_REFUSAL_GONE ? FL_EXIT_VM_GONE : FL_EXIT_FAILED;
        }
        fl_log(FL_LOG_INFO, "detached", "\"vm\":\"goes on as if nothing had been\"");
        return FL_EXIT_OK;
    case FL_MOVER_VM_GONE:
        fl_log(FL_LOG_INFO, "vm_gone", "\"faults\":%llu", (unsigned long long)FL_READ(vm, faults));
        return FL_EXIT_VM_GONE;
    case FL_MOVER_RELEASED:
        FL_SET(vm, state, FL_STATE_RELEASED);
        fl_log(FL_LOG_INFO, "released", "\"evicted_pages\":%llu", (unsigned long long)FL_READ(vm, evicted_pages));
        return FL_EXIT_OK;
    case FL_MOVER_RUNS:
        break;
    }
    return FL_EXIT_FAILED;
}

static void close_listener(int listener, const char *socket_path) {
    if (listener < 0)
        return;
    (void)unlink(socket_path);
    close(listener);
}

static int serve(struct fl_vm *vm, const struct fl_options *options, int signal_fd, uint64_t started_ns) {
    struct fl_fault_server *faults;
    struct fl_mover *mover;
    int listener = fl_control_listen(options->socket_path);
    if (listener < 0)
        fl_log_text(FL_LOG_ERROR, "no_socket", "cannot listen on %s: %s; faults are served all the same",
                    options->socket_path, strerror(-listener));
    int error = fl_fault_start(vm, options->fault_threads, &faults);
    if (error) {
        fl_log_text(
            FL_LOG_ERROR, "no_fault_threads",
            "starting %u threads for process %d: %s; the VM waits for the next pager: see the host's limits of memory "
            "and threads",
            options->fault_threads, vm->pid, strerror(-error));
        close_listener(listener, options->socket_path);
        return FL_EXIT_FAILED;
    }
    fl_serve_began(vm, started_ns);
    fl_log(FL_LOG_INFO, "serving", "\"memory_bytes\":%llu,\"evicted_pages\":%llu,\"takeovers\":%u,\"ready_us\":%llu",
           (unsigned long long)FL_READ(vm, memory_bytes), (unsigned long long)FL_READ(vm, evicted_pages),
           vm->vault.stats->status.takeovers, (unsigned long long)((fl_now() - started_ns) / FL_NS_PER_US));
    error = fl_mover_start(vm, faults, options, &mover);
    if (error) {
        fl_log_text(
            FL_LOG_ERROR, "no_mover",
            "starting the thread that scans and evicts for process %d: %s; the VM waits for the next pager: see the "
            "host's limits of memory and threads",
            vm->pid, strerror(-error));
        fl_fault_stop(faults);
        close_listener(listener, options->socket_path);
        return FL_EXIT_FAILED;
    }
    enum fl_mover_end end = fl_control_run(vm, mover, listener, signal_fd);
    fl_mover_join(mover);
    int code = finish(vm, end);
    fl_fault_stop(faults);
    close_listener(listener, options->socket_path);
    return code;
}

int main(int argc, char **argv) {
    uint64_t started_ns = fl_now();
    struct fl_options options;
    struct fl_refused why = {0};
    static struct fl_vm vm;
    int code = parse(argc, argv, &options);
    if (code >= 0)
        return code;
    int signal_fd = block_signals();
    if (signal_fd < 0) {
        fl_log_text(FL_LOG_ERROR, "no_signalfd", "signalfd: %s; see the limit of open files", strerror(errno));
        return FL_EXIT_FAILED;
    }
    harden();
    /*
     * vCPUs wait while we take over. Once we serve, we serve at the VM's own priority: a pager that goes before the vCPU it has
     * just woken looks for the next fault too early, and has to sleep and be woken for each.
     */
    int own_nice = getpriority(PRIO_PROCESS, 0);
    (void)setpriority(PRIO_PROCESS, 0, URGENT_NICE);
    int error = fl_serve_begin(&vm, &options, &why);
    (void)setpriority(PRIO_PROCESS, 0, own_nice);
    code = error ? refused(&why) : serve(&vm, &options, signal_fd, started_ns);
    fl_serve_close(&vm);
    close(signal_fd);
    return code;
}
