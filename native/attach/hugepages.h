/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether this host may back shared memory with huge pages. A hole punched into a part of one only zeroes that part when
 * the page cannot be split at once (somebody has a reference to it): no fault follows, and the guest would read zeros.
 */
#ifndef FL_ATTACH_HUGEPAGES_H
#define FL_ATTACH_HUGEPAGES_H

#include <stdbool.h>
#include <stddef.h>

#define FL_HUGEPAGES_FOLDER "/sys/kernel/mm/transparent_hugepage"

/*
 * Reads shmem_enabled and hugepages-N/shmem_enabled below `folder`. `what` gets the file that allows huge pages and its
 * word, e.g. ".../shmem_enabled is advise". No such files: no huge pages.
 */
bool fl_hugepages_for_shmem(const char *folder, char *what, size_t size);

#endif
