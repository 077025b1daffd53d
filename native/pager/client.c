/* SPDX-License-Identifier: Apache-2.0 */
/* Talking to a pager (frostline.h, section 3). */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "frostline.h"

struct fl_pager {
    int fd;
};

int fl_pager_connect(const char *socket_path, struct fl_pager **out) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t length = sizeof(peer);
    if (strlen(socket_path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, socket_path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int error = 0;
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length))
        error = -errno;
    else if (peer.uid != 0 && peer.uid != geteuid())
        error = -EPERM;
    struct fl_pager *pager = error ? NULL : malloc(sizeof(*pager));
    if (!pager) {
        close(fd);
        return error ? error : -ENOMEM;
    }
    pager->fd = fd;
    *out = pager;
    return 0;
}

void fl_pager_close(struct fl_pager *pager) {
    if (!pager)
        return;
    close(pager->fd);
    free(pager);
}

static int wait_for(int fd, short events, uint64_t deadline_ns) {
    for (;;) {
        uint64_t now = fl_now();
        struct pollfd wait = {.fd = fd, .events = events};
        int ready =
            now < deadline_ns ? poll(&wait, 1, (int)((deadline_ns - now + FL_NS_PER_MS - 1) / FL_NS_PER_MS)) : 0;
        if (ready > 0)
            return 0;
        if (ready == 0)
            return -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

int fl_pager_call(struct fl_pager *pager, const struct fl_command *command, struct fl_reply *reply, int timeout_ms) {
    uint64_t deadline_ns = fl_now() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * FL_NS_PER_MS;
    int error = wait_for(pager->fd, POLLOUT, deadline_ns);
    if (error)
        return error;
    if (send(pager->fd, command, sizeof(*command), MSG_NOSIGNAL) != (ssize_t)sizeof(*command))
        return errno == ECONNRESET ? -EPIPE : -errno;
    error = wait_for(pager->fd, POLLIN, deadline_ns);
    if (error)
        return error; /* the answer may still come: the caller closes the connection */
    ssize_t length = recv(pager->fd, reply, sizeof(*reply), 0);
    if (length == 0 || (length < 0 && errno == ECONNRESET))
        return -EPIPE;
    if (length < 0)
        return -errno;
    return length == (ssize_t)sizeof(*reply) && reply->abi == FL_ABI ? 0 : -EPROTO;
}
