/* SPDX-License-Identifier: Apache-2.0 */
/* The pager's command socket and its main loop: commands, signals, the VMM's end. */
#ifndef FL_PAGER_CONTROL_H
#define FL_PAGER_CONTROL_H

#include "pager/mover.h"

#define FL_CLIENTS_MAX 8

/* Listen on a SOCK_SEQPACKET socket at `path`, replacing a stale one; mode 0600. A descriptor or a negative errno. */
int fl_control_listen(const char *path);

/* Serve until the mover has ended, for whatever reason. */
enum fl_mover_end fl_control_run(struct fl_vm *vm, struct fl_mover *mover, int listener, int signal_fd);

#endif
