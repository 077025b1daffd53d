/* SPDX-License-Identifier: Apache-2.0 */
#include "pager/control.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"

#define LEASE_MAX_NS (UINT64_C(3600) * FL_NS_PER_SECOND)

enum { POLL_PIDFD, POLL_SIGNAL, POLL_MOVER, POLL_LISTENER, POLL_CLIENTS, POLL_COUNT = POLL_CLIENTS + FL_CLIENTS_MAX };

int fl_control_listen(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    /* We hold the vault's lock, so whoever listened here before serves this VM no more. */
    (void)unlink(path);
    mode_t mask = umask(0177);
    int error = bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, FL_CLIENTS_MAX) ? -errno : 0;
    (void)umask(mask);
    if (error) {
        close(fd);
        return error;
    }
    return fd;
}

static bool may_command(int client) {
    struct ucred peer;
    socklen_t length = sizeof(peer);
    return getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && (peer.uid == 0 || peer.uid == geteuid());
}

static void accept_client(struct pollfd *clients, int listener) {
    int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (client < 0)
        return;
    for (uint32_t i = 0; i < FL_CLIENTS_MAX && may_command(client); i++) {
        if (clients[i].fd < 0) {
            clients[i] = (struct pollfd){.fd = client, .events = POLLIN};
            return;
        }
    }
    close(client); /* a stranger, or one too many */
}

static int set_budget(struct fl_vm *vm, const struct fl_command *command, struct fl_reply *reply) {
    struct fl_vault_budget *budget = &vm->vault.header->budget;
    uint64_t memory = FL_READ(vm, memory_bytes), now = fl_now();
    if (command->budget_bytes > memory || command->lease_ns > LEASE_MAX_NS) {
        snprintf(reply->detail, sizeof(reply->detail),
                 "budget of %llu bytes for %llu bytes of memory, lease %llu s (limit %llu): nothing changed",
                 (unsigned long long)command->budget_bytes, (unsigned long long)memory,
                 (unsigned long long)(command->lease_ns / FL_NS_PER_SECOND),
                 (unsigned long long)(LEASE_MAX_NS / FL_NS_PER_SECOND));
        return -ERANGE;
    }
    uint32_t interval_ms = command->scan_interval_ms;
    if (interval_ms && (interval_ms < FL_SCAN_MS_MIN || interval_ms > FL_SCAN_MS_MAX)) {
        snprintf(reply->detail, sizeof(reply->detail), "a scan every %u ms (%u to %u): nothing changed", interval_ms,
                 FL_SCAN_MS_MIN, FL_SCAN_MS_MAX);
        return -ERANGE;
    }
    /* The old lease ends before the new amounts stand: at no moment is more allowed than either says. */
    atomic_store(&budget->lease_until_ns, 0);
    atomic_store(&budget->bytes, command->budget_bytes);
    atomic_store(&budget->rate_bytes, command->rate_bytes);
    atomic_store(&budget->min_age_ns, command->min_age_ns);
    uint64_t before = atomic_exchange(&budget->generation, command->generation);
    if (interval_ms)
        atomic_store(&vm->vault.header->scan_interval_ms, interval_ms);
    atomic_store(&budget->drain, 0);
    atomic_store(&budget->lease_until_ns, command->lease_ns ? now + command->lease_ns : 0);
    if (before != command->generation)
        fl_record(vm, FL_RECORD_APPLY, FL_TIER_ZERO, now, 0, command->budget_bytes, 0);
    return 0;
}

static int detach(struct fl_vm *vm, struct fl_mover *mover, struct fl_reply *reply) {
    /* The flag, not the count: a page may be lost whose poison could not be set. */
    if (atomic_load(&vm->vault.header->corrupt)) {
        snprintf(
            reply->detail, sizeof(reply->detail),
            "%llu pages are lost (%llu poisoned); after detaching the guest could read zeros there: end the VM instead",
            (unsigned long long)FL_READ(vm, checksum_errors), (unsigned long long)FL_READ(vm, poisoned_pages));
        return -EBADMSG;
    }
    fl_mover_detach(mover);
    return 0;
}

/* A successor can take what the VMM holds. What a child of it waits with is ours alone. */
static int release(struct fl_vm *vm, struct fl_mover *mover, struct fl_reply *reply) {
    if (fl_forks_wait(vm)) {
        snprintf(reply->detail, sizeof(reply->detail),
                 "process %d has forked, and its child waits with %llu pages away that are being brought back; without "
                 "this pager it would read zeros: release again when they are back",
                 vm->pid, (unsigned long long)FL_READ(vm, evicted_pages));
        return -EBUSY;
    }
    fl_mover_release(mover);
    return 0;
}

static int obey(struct fl_vm *vm, struct fl_mover *mover, const struct fl_command *command, struct fl_reply *reply) {
    struct fl_vault_budget *budget = &vm->vault.header->budget;
    int error = 0;
    switch ((enum fl_command_kind)command->kind) {
    case FL_COMMAND_PING:
        return 0;
    case FL_COMMAND_BUDGET:
        error = set_budget(vm, command, reply);
        fl_mover_wake(mover);
        return error;
    case FL_COMMAND_SCAN:
        fl_mover_scan(mover);
        return 0;
    case FL_COMMAND_PREFETCH:
        return fl_mover_prefetch(mover, command->first_page, command->page_count);
    case FL_COMMAND_DRAIN:
        atomic_store(&budget->lease_until_ns, 0);
        atomic_store(&budget->bytes, 0);
        atomic_store(&budget->drain, 1);
        fl_mover_wake(mover);
        return 0;
    case FL_COMMAND_DETACH:
        return detach(vm, mover, reply);
    case FL_COMMAND_RELEASE:
        return release(vm, mover, reply);
    }
    snprintf(reply->detail, sizeof(reply->detail), "no command has the number %u", command->kind);
    return -EINVAL;
}

/* One command from one client. false: close it. */
static bool serve_client(struct fl_vm *vm, struct fl_mover *mover, int client) {
    union {
        struct fl_command command;
        uint8_t bytes[sizeof(struct fl_command) + 1]; /* one more, so that a longer message shows */
    } in;
    struct fl_reply reply = {.abi = FL_ABI, .pager_pid = (uint32_t)getpid()};
    ssize_t length = recv(client, &in, sizeof(in), 0);
    if (length < 0)
        return errno == EAGAIN || errno == EINTR;
    if (length == 0)
        return false;
    if (length != (ssize_t)sizeof(in.command) || in.command.abi != FL_ABI) {
        reply.error = -EPROTO;
        snprintf(reply.detail, sizeof(reply.detail), "message of %zd bytes, this pager speaks interface %d (%zu bytes)",
                 length, FL_ABI, sizeof(in.command));
    } else {
        reply.error = obey(vm, mover, &in.command, &reply);
        fl_log(FL_LOG_DEBUG, "command", "\"kind\":%u,\"error\":%d,\"budget_bytes\":%llu,\"generation\":%llu",
               in.command.kind, reply.error, (unsigned long long)in.command.budget_bytes,
               (unsigned long long)in.command.generation);
    }
    reply.state = __atomic_load_n(&vm->vault.stats->status.state, __ATOMIC_RELAXED);
    reply.evicted_pages = FL_READ(vm, evicted_pages);
    return send(client, &reply, sizeof(reply), MSG_NOSIGNAL) == (ssize_t)sizeof(reply);
}

static void take_signal(int signal_fd, struct fl_mover *mover) {
    struct signalfd_siginfo info;
    if (read(signal_fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
        fl_log(FL_LOG_INFO, "signal", "\"signal\":%u", info.ssi_signo);
        fl_mover_release(mover);
    }
}

enum fl_mover_end fl_control_run(struct fl_vm *vm, struct fl_mover *mover, int listener, int signal_fd) {
    struct pollfd polled[POLL_COUNT];
    for (uint32_t i = 0; i < POLL_COUNT; i++)
        polled[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    polled[POLL_PIDFD].fd = vm->pidfd;
    polled[POLL_SIGNAL].fd = signal_fd;
    polled[POLL_MOVER].fd = fl_mover_event_fd(mover);
    polled[POLL_LISTENER].fd = listener;
    while (fl_mover_ended(mover) == FL_MOVER_RUNS) {
        if (poll(polled, POLL_COUNT, 1000) < 0 && errno != EINTR)
            break;
        if (polled[POLL_PIDFD].revents) {
            atomic_store(&vm->gone, 1);
            polled[POLL_PIDFD].fd = -1;
        }
        if (atomic_load(&vm->gone))
            fl_mover_wake(mover);
        if (polled[POLL_SIGNAL].revents)
            take_signal(signal_fd, mover);
        if (polled[POLL_LISTENER].revents)
            accept_client(&polled[POLL_CLIENTS], listener);
        for (uint32_t i = POLL_CLIENTS; i < POLL_COUNT; i++) {
            if (polled[i].fd >= 0 && polled[i].revents && !serve_client(vm, mover, polled[i].fd)) {
                close(polled[i].fd);
                polled[i].fd = -1;
            }
        }
    }
    for (uint32_t i = POLL_CLIENTS; i < POLL_COUNT; i++) {
        if (polled[i].fd >= 0)
            close(polled[i].fd);
    }
    return fl_mover_ended(mover);
}
