/* SPDX-License-Identifier: Apache-2.0 */
#include "swap/mapped.h"

#include <errno.h>
#include <string.h>

#include "attach/inspect.h"
#include "attach/proc.h"
#include "attach/regions.h"

struct search {
    const struct fl_vault_region *region;
    uint64_t start; /* where the region is looked for */
    bool found;
    struct fl_pieces *out;
};

/* A file on a disk may have the same inode number, so the name counts too. */
static bool is_of_region(const struct fl_proc_map *map, const struct fl_vault_region *region) {
    return map->shared && map->inode == region->inode &&
           strncmp(map->path, FL_GUEST_MEMFD_PREFIX, strlen(FL_GUEST_MEMFD_PREFIX)) == 0;
}

static void add_piece(struct fl_pieces *out, uint64_t start, uint64_t end) {
    struct fl_range *last = out->count ? &out->piece[out->count - 1] : NULL;
    out->bytes += end - start;
    if (last && last->end == start)
        last->end = end;
    else if (out->count < FL_PIECES_MAX)
        out->piece[out->count++] = (struct fl_range){start, end};
}

static int collect(const struct fl_proc_map *map, void *context) {
    struct search *search = context;
    uint64_t region_end = search->start + search->region->length;
    if (!is_of_region(map, search->region) || map->end <= search->start || map->start >= region_end ||
        map->offset - search->region->file_offset != map->start - search->start)
        return 0;
    add_piece(search->out, map->start > search->start ? map->start : search->start,
              map->end < region_end ? map->end : region_end);
    return 0;
}

static int pieces_at(struct fl_vm *vm, uint32_t region, uint64_t address, struct fl_pieces *out) {
    struct search search = {.region = fl_region(vm, region), .start = address, .out = out};
    *out = (struct fl_pieces){0};
    return fl_proc_maps(vm->pid, collect, &search);
}

int fl_mapped_pieces(struct fl_vm *vm, uint32_t region, struct fl_pieces *out) {
    return pieces_at(vm, region, atomic_load(&fl_region(vm, region)->vmm_addr), out);
}

static int find_beginning(const struct fl_proc_map *map, void *context) {
    struct search *search = context;
    uint64_t skip = search->region->file_offset - map->offset;
    if (!is_of_region(map, search->region) || search->region->file_offset < map->offset ||
        skip >= map->end - map->start)
        return 0;
    search->start = map->start + skip;
    search->found = true;
    return 1;
}

int fl_mapped_elsewhere(struct fl_vm *vm, uint32_t region, uint64_t *address) {
    struct fl_pieces pieces;
    struct search search = {.region = fl_region(vm, region)};
    int error = fl_proc_maps(vm->pid, find_beginning, &search);
    if (error < 0)
        return error;
    if (!search.found)
        return -ENOENT;
    error = pieces_at(vm, region, search.start, &pieces);
    if (error)
        return error;
    *address = search.start;
    return pieces.bytes == search.region->length ? 0 : -ENOENT;
}

static int find_seam(const struct fl_proc_map *map, void *context) {
    const struct fl_range *range = context;
    return map->start > range->start && map->start < range->end;
}

bool fl_mapping_begins_in(struct fl_vm *vm, uint64_t start, uint64_t end) {
    struct fl_range range = {start, end};
    return fl_proc_maps(vm->pid, find_seam, &range) != 0;
}
