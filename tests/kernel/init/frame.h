/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes over the virtio-serial port, in both directions: a header, then `bytes` of payload, little endian.
 *
 *   host -> guest   RUN      id; struct run_request, then its strings (each with its NUL), then stdin
 *                   SIGNAL   id; uint32_t signal, to the run's first process only
 *                   END      id; kill the run with all that it started
 *                   OFF      power off
 *   guest -> host   READY    text: kernel release, then a line for each thing that did not go well
 *                   OUT, ERR id; what the run wrote
 *                   EXIT     id; struct run_end. OUT and ERR may still follow when the run keeps its children
 *                   REFUSED  id; text: why a RUN was not begun
 */
#ifndef KERNEL_INIT_FRAME_H
#define KERNEL_INIT_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    FRAME_RUN = 1,
    FRAME_SIGNAL = 2,
    FRAME_END = 3,
    FRAME_OFF = 4,
    FRAME_READY = 16,
    FRAME_OUT = 17,
    FRAME_ERR = 18,
    FRAME_EXIT = 19,
    FRAME_REFUSED = 20,
    FRAME_LIMIT_BYTES = 64 << 20,
};

struct frame {
    uint32_t kind, id, bytes;
};

struct run_request {
    uint32_t limit_ms;
    uint32_t keep_children; /* 0: what the run leaves behind is killed before EXIT is said */
    uint32_t argument_count, environment_count, stdin_bytes;
};

struct run_end {
    int32_t code; /* exit code, or minus the signal */
    uint32_t over_limit, unkillable;
};

/* Open the port that the host named "frostline", waiting for it to come up; on failure the guest powers off. */
void frame_open(void);

/* The port, for poll(). */
int frame_descriptor(void);

/* Send one frame. A host that is gone is the end of the guest. */
void frame_send(uint32_t kind, uint32_t id, const void *payload, size_t bytes);

/* Take in what there is; true when a whole frame is there. The payload is the caller's until the next call. */
bool frame_receive(struct frame *frame, const unsigned char **payload);

#endif
