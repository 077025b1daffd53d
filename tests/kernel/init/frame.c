/* SPDX-License-Identifier: Apache-2.0 */
#include "frame.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "setup.h"

enum { READ_BYTES = 1 << 16 };

static int port = -1;
static unsigned char *pending;
static size_t pending_bytes, pending_size, consumed_bytes;

void frame_open(void) {
    static const char device[] = "/dev/vport0p1";

    port = setup_open_when_there(device, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (port < 0)
        setup_fatal("cannot open %s: %s; is it in QEMU's command line?", device, strerror(errno));
}

int frame_descriptor(void) {
    return port;
}

static void send_all(const void *data, size_t bytes) {
    const unsigned char *at = data;

    while (bytes > 0) {
        ssize_t written = write(port, at, bytes);

        if (written > 0) {
            at += written;
            bytes -= (size_t)written;
        } else if (errno == EAGAIN) {
            usleep(500); /* the host is slow to read; nothing here is in a hurry */
        } else if (errno != EINTR) {
            setup_fatal("cannot write to the host: %s", strerror(errno));
        }
    }
}

void frame_send(uint32_t kind, uint32_t id, const void *payload, size_t bytes) {
    struct frame frame = {kind, id, (uint32_t)bytes};

    send_all(&frame, sizeof(frame));
    send_all(payload, bytes);
}

static void make_room(void) {
    memmove(pending, pending + consumed_bytes, pending_bytes - consumed_bytes);
    pending_bytes -= consumed_bytes;
    consumed_bytes = 0;
    if (pending_size - pending_bytes >= READ_BYTES)
        return;
    pending_size = pending_size * 2 + READ_BYTES;
    pending = realloc(pending, pending_size);
    if (pending == NULL)
        setup_fatal("out of memory for a frame of the host's");
}

bool frame_receive(struct frame *frame, const unsigned char **payload) {
    for (;;) {
        if (pending_bytes - consumed_bytes >= sizeof(*frame)) {
            memcpy(frame, pending + consumed_bytes, sizeof(*frame));
            if (frame->bytes > FRAME_LIMIT_BYTES)
                setup_fatal("a frame of %u bytes from the host; the limit is %u", frame->bytes, FRAME_LIMIT_BYTES);
            if (pending_bytes - consumed_bytes >= sizeof(*frame) + frame->bytes) {
                *payload = pending + consumed_bytes + sizeof(*frame);
                consumed_bytes += sizeof(*frame) + frame->bytes;
                return true;
            }
        }
        make_room();
        ssize_t got = read(port, pending + pending_bytes, pending_size - pending_bytes);
        if (got == 0)
            setup_power_off(); /* the host has closed its end: nobody wants anything any more */
        if (got < 0)
            return false;
        pending_bytes += (size_t)got;
    }
}
