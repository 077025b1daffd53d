/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM in a process of its own whose guest touches exactly the pages that it is told to, for bench_trackers: a plain one
 * (a thread that goes through shared memory, page by page) or a KVM guest behind the same calls. A touch is of one word,
 * every other page is written to. Whatever goes wrong ends the program with a message.
 */
#ifndef FL_BENCH_TRACKERS_GUEST_H
#define FL_BENCH_TRACKERS_GUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define GUEST_MAPPERS_MAX 16u

struct guest;

/* All its pages are filled in. `cpu`: where a plain guest's thread runs, below 0: anywhere. */
struct guest *guest_start(bool kvm, uint32_t pages, int cpu);
void guest_end(struct guest *guest);

pid_t guest_pid(const struct guest *guest);
uint32_t guest_pages(const struct guest *guest);
/* Which page of the guest is at this address of the VMM; UINT32_MAX: none. */
uint32_t guest_page_at(const struct guest *guest, uint64_t address);

/* From now on it touches these `count` pages (random by `seed`), in random order. */
void guest_choose(struct guest *guest, uint64_t seed, uint32_t count);
bool guest_touches(const struct guest *guest, uint32_t page);
/* Touch each of them once: what that took, in ns. */
uint64_t guest_pass(struct guest *guest);

/* Go round in them until guest_rest(). */
void guest_roam(struct guest *guest);
void guest_rest(struct guest *guest);
/* Touches so far, also while it roams. */
uint64_t guest_touched(const struct guest *guest);
/* CPU time that these took, faults included; 0: not known (a KVM guest). */
uint64_t guest_cpu_ns(const struct guest *guest);

/* So many other processes map all of a plain guest's memory, and have touched it: more for an rmap walk to find. */
void guest_map_elsewhere(struct guest *guest, uint32_t processes);
/* A KVM guest's VMM keeps so much of its own memory hot. */
void guest_heat(struct guest *guest, uint64_t bytes);

#endif
