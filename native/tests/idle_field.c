/* SPDX-License-Identifier: Apache-2.0 */
#include "idle_field.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "victim.h"

#define HUGE_BYTES (UINT64_C(2) << 20)
#define FLUSH_BYTES (UINT64_C(1) << 20)

void need_page_idle(void) {
    struct fl_kernel_features features;
    char detail[FL_DETAIL_BYTES];
    CHECK(fl_probe_kernel(&features) == 0, "fl_probe_kernel");
    bool possible = fl_tracker_idle.probe(&(const struct fl_tracked){0}, &features, detail, sizeof(detail));
    printf("%s%s\n", possible ? "" : "skipped: ", detail);
    if (!possible)
        exit(77);
}

/* The first region takes a third, and does not end at a word of anything. */
static uint32_t first_part(uint32_t pages) {
    return pages / 3 + 5;
}

static void add_region(struct fl_vm *vm, uint64_t address, uint32_t pages, uint64_t first_page) {
    uint32_t index = fl_region_count(vm);
    struct fl_vault_region region = {
        .vmm_addr = address, .length = (uint64_t)pages * FL_PAGE_SIZE, .first_page = first_page};
    fl_vault_put_region(&vm->vault, index, region);
    fl_vault_count_regions(&vm->vault, index + 1);
}

struct idle_field idle_field_of(int pid, uint64_t address, uint32_t pages) {
    struct idle_field field = {.vm = {.pid = pid, .uffd = -1}, .pages = pages};
    uint32_t part = first_part(pages);
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
    field.vm.pagemap_fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(field.vm.pagemap_fd >= 0, "%s: %s", path, strerror(errno));
    field.vm.vault.header = calloc(1, FL_VAULT_HEADER_BYTES);
    field.expected = calloc(pages, 1);
    CHECK(field.vm.vault.header && field.expected, "no memory");
    add_region(&field.vm, address, part, 0);
    add_region(&field.vm, address + (uint64_t)part * FL_PAGE_SIZE, pages - part, part);
    return field;
}

/* The tracker keeps the address of the struct fl_vm, so it is made when that stays where it is. */
static struct fl_tracker *tracker_of(struct idle_field *field) {
    if (!field->tracker) {
        int error = fl_tracker_idle.create(&field->vm, NULL, &field->tracker);
        CHECK(error == 0, "create: %s", strerror(-error));
    }
    return field->tracker;
}

struct idle_field idle_field_make(uint32_t pages) {
    size_t bytes = (size_t)pages * FL_PAGE_SIZE;
    int fd = memfd_create("field", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd: %s", strerror(errno));
    uint8_t *place = mmap(NULL, bytes + HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(place != MAP_FAILED, "mmap: %s", strerror(errno));
    uint8_t *start = (uint8_t *)(((uintptr_t)place + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1));
    uint8_t *memory = mmap(start, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    CHECK(memory == start, "mmap: %s", strerror(errno));
    close(fd);
    for (uint32_t i = 0; i < pages; i++)
        memory[(size_t)i * FL_PAGE_SIZE] = (uint8_t)i;
    struct idle_field field = idle_field_of(getpid(), (uintptr_t)memory, pages);
    field.memory = memory;
    return field;
}

void idle_field_end(struct idle_field *field) {
    fl_tracker_idle.destroy(field->tracker);
    if (field->memory)
        munmap(field->memory, (size_t)field->pages * FL_PAGE_SIZE);
    close(field->vm.pagemap_fd);
    free(field->vm.vault.header);
    free(field->expected);
}

void idle_field_flush_tlbs(void) {
    /* So long a range is flushed by a flush of everything. */
    void *range = mmap(NULL, FLUSH_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    CHECK(range != MAP_FAILED, "mmap: %s", strerror(errno));
    munmap(range, FLUSH_BYTES);
}

void idle_field_arm(struct idle_field *field) {
    uint64_t stop_ns;
    int error = fl_tracker_idle.arm(tracker_of(field), &stop_ns);
    CHECK(error == 0, "arm: %s", strerror(-error));
    memset(field->expected, 0, field->pages);
    if (field->memory && field->vm.uffd < 0)
        idle_field_flush_tlbs();
}

void idle_field_touch(struct idle_field *field, uint32_t page, bool write) {
    volatile uint8_t *byte = field->memory + (size_t)page * FL_PAGE_SIZE + 64;
    uint8_t value = *byte;
    if (write)
        *byte = value;
    field->expected[page] = 1;
}

void idle_field_touch_some(struct idle_field *field, uint32_t first, uint32_t count, uint32_t every, uint64_t *random) {
    for (uint32_t page = first; page < first + count; page++) {
        uint64_t choice = random_next(random);
        if ((choice >> 8) % every == 0)
            idle_field_touch(field, page, choice & 1);
    }
}

static void harvest(struct idle_field *field, uint32_t region, uint64_t first, uint32_t count, uint64_t *accessed) {
    memset(accessed, 0xff, (count + 63) / 64 * sizeof(*accessed));
    int error = fl_tracker_idle.harvest(field->tracker, region, first, count, accessed);
    CHECK(error == 0, "harvest: %s", strerror(-error));
}

/* Windows of so many pages, each region from its page `offset` on. seen[] is by page. */
static void see(struct idle_field *field, uint32_t window, uint32_t offset, uint8_t *seen) {
    uint64_t accessed[FL_SCAN_PAGES / 64];
    for (uint32_t region = 0; region < 2; region++) {
        uint64_t first = fl_region(&field->vm, region)->first_page, pages = fl_region_pages(&field->vm, region);
        for (uint64_t at = offset; at < pages; at += window) {
            uint32_t count = pages - at < window ? (uint32_t)(pages - at) : window;
            harvest(field, region, first + at, count, accessed);
            for (uint32_t i = 0; i < count; i++)
                seen[first + at + i] = accessed[i / 64] >> (i % 64) & 1;
        }
    }
}

static void compare(const struct idle_field *field, const uint8_t *seen, uint32_t window, const char *what) {
    uint32_t missed = 0, wrong = 0, first_missed = 0, first_wrong = 0;
    for (uint32_t page = 0; page < field->pages; page++) {
        if (seen[page] == 0xff)
            continue;
        if (field->expected[page] && !seen[page] && !missed++)
            first_missed = page;
        if (!field->expected[page] && seen[page] && !wrong++)
            first_wrong = page;
    }
    CHECK(!missed && !wrong, "%s, windows of %u: %u missed (first %u), %u seen that were not touched (first %u)", what,
          window, missed, first_missed, wrong, first_wrong);
}

void idle_field_check(struct idle_field *field, uint32_t offset, const char *what) {
    uint8_t *seen = malloc(field->pages);
    CHECK(seen, "no memory");
    memset(seen, 0xff, field->pages);
    int error = fl_tracker_idle.collect(field->tracker);
    CHECK(error == 0, "collect: %s", strerror(-error));
    see(field, FL_SCAN_PAGES, 0, seen);
    compare(field, seen, FL_SCAN_PAGES, what);
    memset(seen, 0xff, field->pages);
    see(field, FL_WINDOW_PAGES, offset, seen);
    compare(field, seen, FL_WINDOW_PAGES, what);
    free(seen);
}

uint64_t idle_field_entry(const struct idle_field *field, uint32_t page) {
    uint64_t entry = 0, address = fl_address_of_page((struct fl_vm *)&field->vm, 0, page);
    CHECK(pread(field->vm.pagemap_fd, &entry, sizeof(entry), (off_t)(address / FL_PAGE_SIZE * sizeof(entry))) ==
              sizeof(entry),
          "pagemap: %s", strerror(errno));
    return entry;
}
