/* SPDX-License-Identifier: Apache-2.0 */
#include "damon_field.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "base/clock.h"
#include "victim.h"

#define SECONDS 60u
#define SCRIPT_SEED 7u
#define FLUSH_BYTES (UINT64_C(1) << 20)

void need_damon(void) {
    struct fl_kernel_features features;
    char detail[FL_DETAIL_BYTES];
    CHECK(fl_probe_kernel(&features) == 0, "fl_probe_kernel");
    bool possible = fl_tracker_damon.probe(&(const struct fl_tracked){0}, &features, detail, sizeof(detail));
    printf("%s%s\n", possible ? "" : "skipped: ", detail);
    fflush(stdout);
    if (!possible)
        exit(77);
}

static void add_region(struct fl_vm *vm, uint64_t address, uint64_t pages, uint64_t first_page) {
    uint32_t index = fl_region_count(vm);
    struct fl_vault_region region = {.vmm_addr = address, .length = pages * FL_PAGE_SIZE, .first_page = first_page};
    fl_vault_put_region(&vm->vault, index, region);
    fl_vault_count_regions(&vm->vault, index + 1);
}

struct damon_field *damon_field_make(uint64_t bytes, uint32_t vcpus, uint32_t interval_ms, bool filled) {
    struct kvm_guest_config config = {.bytes = bytes, .vcpus = vcpus, .backing = KVM_GUEST_MEMFD};
    struct damon_field *field = calloc(1, sizeof(*field));
    CHECK(field, "no memory");
    field->vmm = kvm_vmm_start(&config);
    field->pages = kvm_guest_pages(field->vmm.guest);
    field->expected = calloc(field->pages, 1);
    field->seen = calloc(field->pages, 1);
    field->vm = (struct fl_vm){.pid = field->vmm.pid, .uffd = -1, .pagemap_fd = -1};
    field->vm.vault.header = calloc(1, FL_VAULT_HEADER_BYTES);
    uint32_t *generations = calloc(field->pages, sizeof(*generations));
    CHECK(field->expected && field->seen && field->vm.vault.header && generations, "no memory");
    atomic_store(&field->vm.vault.header->scan_interval_ms, interval_ms);
    /* The second part of memory first, and neither part ends at a word of anything. */
    uint64_t base = (uint64_t)(uintptr_t)kvm_guest_memory(field->vmm.guest), part = field->pages / 3 + 5;
    add_region(&field->vm, base + part * FL_PAGE_SIZE, field->pages - part, part);
    add_region(&field->vm, base, part, 0);
    for (uint32_t page = 0; page < field->pages && filled; page++)
        generations[page] = 1;
    if (filled)
        kvm_vmm_fill(&field->vmm, 0, SCRIPT_SEED, 0, field->pages, generations, SECONDS);
    free(generations);
    return field;
}

void damon_field_end(struct damon_field *field) {
    damon_field_destroy(field);
    kvm_vmm_end(&field->vmm);
    free(field->vm.vault.header);
    free(field->expected);
    free(field->seen);
    free(field);
}

int damon_field_create(struct damon_field *field) {
    return fl_tracker_damon.create(&field->vm, NULL, &field->tracker);
}

void damon_field_destroy(struct damon_field *field) {
    fl_tracker_damon.destroy(field->tracker);
    field->tracker = NULL;
}

int damon_field_arm(struct damon_field *field) {
    uint64_t stop_ns, start_ns = fl_now();
    int error = fl_tracker_damon.arm(field->tracker, &stop_ns);
    field->arm_ms += (double)(fl_now() - start_ns) / FL_NS_PER_MS;
    return error;
}

int damon_field_collect(struct damon_field *field) {
    uint64_t start_ns = fl_now();
    int error = fl_tracker_damon.collect(field->tracker);
    field->collect_ms += (double)(fl_now() - start_ns) / FL_NS_PER_MS;
    return error;
}

/* The VMM gives back so much memory at once that the kernel drops all of its TLB entries, guest memory's among them. */
static void flush_tlbs(struct damon_field *field) {
    kvm_vmm_heat(&field->vmm, FLUSH_BYTES, 0, SECONDS);
    kvm_vmm_heat(&field->vmm, 0, 0, SECONDS);
}

void damon_field_begin(struct damon_field *field) {
    int error = damon_field_arm(field);
    CHECK(error == 0, "arm: %s", strerror(-error));
    flush_tlbs(field);
    memset(field->expected, 0, field->pages);
}

/* By windows that begin anywhere, as the chooser does. */
void damon_field_look(struct damon_field *field) {
    uint64_t bits[(FL_SCAN_PAGES + 63) / 64];
    int error = damon_field_collect(field);
    CHECK(error == 0, "collect: %s", strerror(-error));
    for (uint32_t region = 0; region < fl_region_count(&field->vm); region++) {
        uint64_t first = fl_region(&field->vm, region)->first_page, pages = fl_region_pages(&field->vm, region);
        for (uint64_t at = 0, count; at < pages; at += count) {
            count = at ? FL_SCAN_PAGES - 7 : 77;
            count = pages - at < count ? pages - at : count;
            error = fl_tracker_damon.harvest(field->tracker, region, first + at, (uint32_t)count, bits);
            CHECK(error == 0, "harvest: %s", strerror(-error));
            for (uint64_t i = 0; i < count; i++)
                field->seen[first + at + i] = bits[i / 64] >> (i % 64) & 1;
        }
    }
}

void damon_field_touch(struct damon_field *field, const uint32_t *pages, uint32_t count, uint64_t *random) {
    uint32_t workers = kvm_guest_workers(field->vmm.guest), host = kvm_vmm_host(&field->vmm);
    struct kvm_touch *script = calloc(count ? count : 1, sizeof(*script));
    CHECK(script, "no memory");
    for (uint32_t worker = 0, done = 0; worker < workers; worker++) {
        uint32_t part = worker + 1 < workers ? (count - done) / (workers - worker) : count - done;
        for (uint32_t i = 0; i < part; i++) {
            uint64_t choice = random_next(random);
            script[i] = (struct kvm_touch){.page = pages[done + i],
                                           .word = (uint16_t)(choice >> 8) % KVM_GUEST_WORDS,
                                           .kind = choice % 2 ? KVM_TOUCH_STORE : KVM_TOUCH_LOAD,
                                           .times = 1,
                                           .value = choice};
            field->expected[pages[done + i]] |= worker == host ? DAMON_BY_VMM : DAMON_BY_VCPU;
        }
        struct kvm_outcome outcome = kvm_vmm_run(&field->vmm, worker, script, part, SECONDS);
        CHECK(outcome.error == 0, "worker %u: %s", worker, outcome.why);
        done += part;
    }
    free(script);
}

uint32_t damon_field_seen(const struct damon_field *field) {
    uint32_t seen = 0;
    for (uint32_t page = 0; page < field->pages; page++)
        seen += field->seen[page];
    return seen;
}

void damon_field_add_score(const struct damon_field *field, struct damon_score *score) {
    for (uint32_t page = 0; page < field->pages; page++) {
        score->right += field->seen[page] && field->expected[page];
        score->missed += !field->seen[page] && field->expected[page];
        score->wrong += field->seen[page] && !field->expected[page];
        score->vmm_right += field->seen[page] && field->expected[page] == DAMON_BY_VMM;
        score->vmm_missed += !field->seen[page] && field->expected[page] == DAMON_BY_VMM;
    }
}

static double recall(uint64_t right, uint64_t missed) {
    return right + missed ? 100.0 * (double)right / (double)(right + missed) : 100.0;
}

double damon_recall(const struct damon_score *score) {
    return recall(score->right, score->missed);
}

double damon_vmm_recall(const struct damon_score *score) {
    return recall(score->vmm_right, score->vmm_missed);
}

double damon_precision(const struct damon_score *score) {
    uint64_t all = score->right + score->wrong;
    return all ? 100.0 * (double)score->right / (double)all : 100.0;
}

void damon_read(const char *path, char *text, size_t bytes) {
    ssize_t length = -1;
    text[0] = '\0';
    for (unsigned i = 0; i < 10000 && length < 0; i++) {
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        length = read(fd, text, bytes - 1);
        int error = errno;
        close(fd);
        if (length < 0 && error != EBUSY)
            return;
        sleep_ms(length < 0);
    }
    if (length >= 0)
        text[length] = '\0';
}

long damon_read_number(const char *path) {
    char text[32];
    damon_read(path, text, sizeof(text));
    return text[0] ? strtol(text, NULL, 10) : -1;
}

int damon_write(const char *path, const char *text) {
    int error = EBUSY;
    for (unsigned i = 0; i < 1000 && error == EBUSY; i++) {
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            return -errno;
        error = write(fd, text, strlen(text)) < 0 ? errno : 0;
        close(fd);
        sleep_ms(error == EBUSY);
    }
    return -error;
}
