/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a host does to memory underneath the addresses that it is mapped at: migrates it, swaps it out, makes huge pages of
 * it and breaks them up. What returns text returns a sentence when this host cannot, and NULL when it can.
 */
#ifndef HOST_MEMORY_H
#define HOST_MEMORY_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define HOST_PAGE 4096u
#define HOST_HUGE_PAGES 512u

/* The frames of `pages` pages of a process from an address on, as /proc/PID/pagemap has them: 0 where none is present. */
void host_frames(pid_t pid, uint64_t address, uint32_t pages, uint64_t *frames);
/* Is page `page` of a file in host RAM (and not only in swap)? */
bool host_is_cached(int fd, uint32_t page);

/*
 * Prepare for a migration of about `bytes` that somebody fills in next: get them to lie low and scattered. Takes ten
 * times as much until host_drop_holes().
 */
const char *host_make_holes(uint64_t bytes);
void host_drop_holes(void);
/* To another NUMA node where there are two (`to` 0 or 1), else by compaction. */
bool host_has_nodes(void);
const char *host_migrate(pid_t pid, uint64_t address, uint32_t pages, int to);

/* To and fro between two nodes without a rest, by a thread; returns how often all were moved. One at a time. */
void host_mover_start(pid_t pid, uint64_t address, uint32_t pages);
uint32_t host_mover_stop(void);

/*
 * Keep the kernel from moving pages between NUMA nodes on its own, until this process ends: whoever goes by ACCESS bits
 * loses KVM's with each page moved, whenever that happens to be.
 */
void host_stop_balancing(void);

/* Swap to a zram disk of our own. */
const char *host_swap_on(uint64_t bytes);
void host_swap_off(void);
/* Put a process in a cgroup of its own, from which memory can be reclaimed on order. */
const char *host_cgroup_make(pid_t pid);
void host_cgroup_reclaim(uint64_t bytes);
/* After the process has ended. */
void host_cgroup_drop(void);

/* Make huge pages of shared memory [address, address + pages) of a process: how many there are more by now. */
uint32_t host_collapse(pid_t pid, uint64_t address, uint32_t pages);
/* Small ones again, of pages [first, first + pages) of a file: how many huge ones there are less. */
uint32_t host_split(const char *path, uint32_t first, uint32_t pages);

#endif
