/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest of kvm_guest.h itself: it touches exactly the pages that its script names, in the order and as often as it
 * says, from as many vCPUs as wanted; what it writes is what the host reads and the other way round; and a check of its
 * memory finds a wrong byte. A fresh memfd is all hole, so the pages it has are the pages that were touched.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "kvm_vmm.h"
#include "victim.h"

#define MIB (UINT64_C(1) << 20)
#define MEMORY_BYTES (256 * MIB)
#define PAGES ((uint32_t)(MEMORY_BYTES / KVM_GUEST_PAGE))
#define SECONDS 60u

/*
 * Some hosts without a processor's help have a KVM that emulates each instruction of such a guest, a thousand times
 * slower; it also goes round for ever at memory that is not there.
 */
static bool emulated;

/* What guest memory should hold: a page that nothing has touched has no entry. */
struct model {
    uint64_t *pages[PAGES];
};

static uint64_t *model_page(struct model *model, uint32_t page) {
    if (!model->pages[page]) {
        model->pages[page] = calloc(KVM_GUEST_WORDS, sizeof(uint64_t));
        CHECK(model->pages[page], "no memory");
    }
    return model->pages[page];
}

static void model_free(struct model *model) {
    for (uint32_t page = 0; page < PAGES; page++)
        free(model->pages[page]);
    free(model);
}

/* What the touch does, and what its result must be. */
static uint64_t model_touch(struct model *model, const struct kvm_touch *touch) {
    uint64_t *words = model_page(model, touch->page), *word = &words[touch->word], wrong = 0, before = *word;
    uint64_t value = touch->value;
    switch ((enum kvm_touch_kind)touch->kind) {
    case KVM_TOUCH_LOAD:
        return *word;
    case KVM_TOUCH_STORE:
        *word = touch->value;
        return touch->result;
    case KVM_TOUCH_ADD:
        *word += touch->value * touch->times;
        return before;
    case KVM_TOUCH_FILL:
    case KVM_TOUCH_CHECK:
        for (uint32_t i = 0; i < KVM_GUEST_WORDS; i++, value = value * touch->factor + touch->step) {
            if (touch->kind == KVM_TOUCH_FILL)
                words[i] = value;
            else
                wrong += words[i] != value;
        }
        return touch->kind == KVM_TOUCH_FILL ? touch->result : wrong;
    case KVM_TOUCH_KINDS:
        break;
    }
    abort();
}

static struct kvm_touch random_touch(uint32_t page, uint64_t *random) {
    uint64_t choice = random_next(random);
    enum kvm_touch_kind kind = (enum kvm_touch_kind)(choice % KVM_TOUCH_KINDS);
    struct kvm_touch touch = {.page = page, .times = 1 + (uint32_t)(choice >> 16) % 20, .value = random_next(random)};
    if (kind == KVM_TOUCH_FILL || kind == KVM_TOUCH_CHECK)
        touch = kvm_touch_content(kind, 1, page, (uint32_t)(choice >> 8) % 3);
    touch.word = (uint16_t)((choice >> 32) % KVM_GUEST_WORDS);
    touch.kind = (uint16_t)kind;
    touch.result = 0x5a5a;
    return touch;
}

static int open_memory(const struct kvm_vmm *vmm) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)vmm->pid, kvm_guest_memory_fd(vmm->guest));
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    return fd;
}

/* The pages that the file has must be exactly those of the model. Returns how many. */
static uint32_t check_populated(int fd, const struct model *model) {
    uint32_t page = 0, count = 0;
    while (page < PAGES) {
        off_t data = lseek(fd, (off_t)page * KVM_GUEST_PAGE, SEEK_DATA);
        CHECK(data >= 0 || errno == ENXIO, "SEEK_DATA: %s", strerror(errno));
        uint32_t first = data < 0 ? PAGES : (uint32_t)(data / KVM_GUEST_PAGE);
        for (; page < first; page++)
            CHECK(!model->pages[page], "page %u should have been touched", page);
        if (page == PAGES)
            break;
        uint32_t end = (uint32_t)(lseek(fd, data, SEEK_HOLE) / KVM_GUEST_PAGE);
        for (; page < end; page++, count++)
            CHECK(model->pages[page], "page %u should not have been touched", page);
    }
    return count;
}

static void check_contents(int fd, const struct model *model) {
    uint64_t words[KVM_GUEST_WORDS];
    for (uint32_t page = 0; page < PAGES; page++) {
        if (!model->pages[page])
            continue;
        CHECK(pread(fd, words, sizeof(words), (off_t)page * KVM_GUEST_PAGE) == sizeof(words), "pread");
        CHECK(memcmp(words, model->pages[page], sizeof(words)) == 0, "page %u differs", page);
    }
}

/* All workers run at once, each in pages of its own, so that the model knows every result. */
static void run_random(struct kvm_vmm *vmm, struct model *model, uint64_t *random) {
    uint32_t workers = kvm_guest_workers(vmm->guest);
    struct kvm_touch *scripts[KVM_GUEST_VCPUS_MAX + 1];
    uint32_t counts[KVM_GUEST_VCPUS_MAX + 1];
    for (uint32_t i = 0; i < workers; i++) {
        uint32_t window = 1 + (uint32_t)random_next(random) % (PAGES / workers),
                 count = counts[i] = (emulated ? 200 : 1500) / workers;
        uint32_t offset = (uint32_t)random_next(random) % (PAGES / workers - window + 1);
        scripts[i] = calloc(count, sizeof(**scripts));
        CHECK(scripts[i], "no memory");
        for (uint32_t k = 0; k < count; k++) {
            uint32_t page = (offset + (uint32_t)random_next(random) % window) * workers + i;
            /* Some pages again and again: their order matters. */
            if (k && random_next(random) % 4 == 0)
                page = scripts[i][k - 1].page;
            scripts[i][k] = random_touch(page, random);
        }
        kvm_vmm_begin(vmm, i, scripts[i], count, 1);
    }
    for (uint32_t i = 0; i < workers; i++) {
        struct kvm_touch *asked = calloc(counts[i], sizeof(*asked));
        CHECK(asked, "no memory");
        memcpy(asked, scripts[i], counts[i] * sizeof(*asked));
        struct kvm_outcome outcome = kvm_vmm_wait(vmm, i, scripts[i], counts[i], SECONDS);
        CHECK(outcome.error == 0, "worker %u: %s", i, outcome.why);
        for (uint32_t k = 0; k < counts[i]; k++) {
            uint64_t expected = model_touch(model, &asked[k]);
            CHECK(scripts[i][k].result == expected, "worker %u, touch %u, kind %u, page %u: %llx, not %llx", i, k,
                  asked[k].kind, asked[k].page, (unsigned long long)scripts[i][k].result, (unsigned long long)expected);
        }
        free(asked);
        free(scripts[i]);
    }
}

/* All vCPUs and the VMM add to the same words at the same time, for as long as it takes all of them to go round. */
static void check_together(struct kvm_vmm *vmm, int fd, struct model *model) {
    enum { WORDS = 8, PASSES = 100 };
    struct kvm_touch script[WORDS];
    uint32_t workers = kvm_guest_workers(vmm->guest);
    uint64_t began[KVM_GUEST_VCPUS_MAX + 1], passes = 0, words[KVM_GUEST_WORDS] = {0};
    for (uint32_t i = 0; i < WORDS; i++)
        script[i] = (struct kvm_touch){
            .page = PAGES - 1 - i, .word = (uint16_t)i, .kind = KVM_TOUCH_ADD, .times = 1 + i, .value = 3};
    for (uint32_t i = 0; i < WORDS; i++) {
        memset(model_page(model, script[i].page), 0, KVM_GUEST_PAGE);
        CHECK(pwrite(fd, words, KVM_GUEST_PAGE, (off_t)script[i].page * KVM_GUEST_PAGE) == KVM_GUEST_PAGE, "pwrite");
    }
    for (uint32_t i = 0; i < workers; i++) {
        began[i] = kvm_guest_passes(vmm->guest, i);
        kvm_vmm_begin(vmm, i, script, WORDS, 0);
    }
    for (uint32_t i = 0; i < workers; i++) {
        uint64_t goal = kvm_guest_passes(vmm->guest, i) + PASSES;
        for (unsigned k = 0; k < SECONDS * 1000 && kvm_guest_passes(vmm->guest, i) < goal; k++)
            sleep_ms(1);
        CHECK(kvm_guest_passes(vmm->guest, i) >= goal, "worker %u does not go round beside the others", i);
    }
    for (uint32_t i = 0; i < workers; i++) {
        struct kvm_outcome outcome = kvm_vmm_stop(vmm, i, SECONDS);
        CHECK(outcome.error == 0, "worker %u: %s", i, outcome.why);
        passes += kvm_guest_passes(vmm->guest, i) - began[i];
    }
    for (uint32_t i = 0; i < WORDS; i++) {
        uint64_t *word = &model_page(model, script[i].page)[i];
        *word = passes * 3 * (1 + i);
    }
    check_contents(fd, model);
}

static void check_scripts(uint32_t vcpus, bool large_pages, uint64_t *random) {
    struct kvm_vmm vmm =
        kvm_vmm_start(&(struct kvm_guest_config){.bytes = MEMORY_BYTES, .vcpus = vcpus, .large_pages = large_pages});
    struct model *model = calloc(1, sizeof(*model));
    CHECK(model, "no memory");
    int fd = open_memory(&vmm);
    uint32_t touched = 0;
    for (uint32_t i = 0; i < kvm_guest_workers(vmm.guest); i++)
        kvm_vmm_begin(&vmm, i, NULL, 0, 1000);
    for (uint32_t i = 0; i < kvm_guest_workers(vmm.guest); i++)
        CHECK(kvm_vmm_wait(&vmm, i, NULL, 0, SECONDS).error == 0, "an empty script");
    kvm_vmm_heat(&vmm, 16 * MIB, 16 * MIB, SECONDS);
    CHECK(check_populated(fd, model) == 0, "memory is touched before any script");
    for (unsigned round = 0; round < rounds(4, 2); round++) {
        run_random(&vmm, model, random);
        touched = check_populated(fd, model);
        check_contents(fd, model);
    }
    kvm_vmm_heat(&vmm, 0, 0, SECONDS);
    check_together(&vmm, fd, model);
    check_populated(fd, model);
    printf("%u vCPUs, pages of %s: touched exactly the %u pages of the scripts, all contents right\n", vcpus,
           large_pages ? "2 MiB" : "4 KiB", touched);
    close(fd);
    model_free(model);
    kvm_vmm_end(&vmm);
}

/* Memory that is not there: the run ends at the touch that needed it, and the next goes on. */
static void check_missing(struct kvm_vmm *vmm, int fd) {
    enum { BAD = 70, COUNT = 100 };
    struct kvm_touch script[COUNT];
    CHECK(ftruncate(fd, (off_t)(MEMORY_BYTES / 2)) == 0, "ftruncate");
    for (uint32_t i = 0; i < COUNT; i++)
        script[i] = (struct kvm_touch){.page = i == BAD ? PAGES - 1 : i, .kind = KVM_TOUCH_LOAD, .times = 1};
    for (uint32_t i = 0; i < kvm_guest_workers(vmm->guest); i++) {
        struct kvm_outcome outcome = kvm_vmm_run(vmm, i, script, COUNT, SECONDS);
        CHECK(outcome.error && outcome.at == BAD, "worker %u: %d at touch %u", i, outcome.error, outcome.at);
        outcome = kvm_vmm_run(vmm, i, script, BAD, SECONDS);
        CHECK(outcome.error == 0, "worker %u: %s", i, outcome.why);
    }
}

/* Every page of the memory (or what fits the time), and then one wrong byte. */
static void check_verify(uint64_t *random) {
    struct kvm_vmm vmm = kvm_vmm_start(&(struct kvm_guest_config){.bytes = MEMORY_BYTES, .vcpus = 2});
    uint32_t *generations = calloc(PAGES, sizeof(*generations)), wrong = 0, pages = emulated ? 500 : PAGES;
    uint64_t seed = random_next(random);
    CHECK(generations, "no memory");
    for (uint32_t page = 0; page < pages; page++)
        generations[page] = (uint32_t)random_next(random) % 4;
    int fd = open_memory(&vmm);
    kvm_vmm_fill(&vmm, 0, seed, 0, pages, generations, SECONDS);
    CHECK(kvm_vmm_verify(&vmm, 1, seed, 0, pages, generations, &wrong, SECONDS) == 0, "page %u is wrong", wrong);
    for (unsigned round = 0; round < rounds(10, 3); round++) {
        uint32_t page = (uint32_t)random_next(random) % pages, worker = round % kvm_guest_workers(vmm.guest);
        uint32_t first = page > 20 ? page - 20 : 0, count = pages - first < 40 ? pages - first : 40;
        off_t at = (off_t)page * KVM_GUEST_PAGE + (off_t)(random_next(random) % KVM_GUEST_PAGE);
        uint8_t byte, flipped;
        CHECK(pread(fd, &byte, 1, at) == 1, "pread");
        flipped = byte ^ (uint8_t)(1u << random_next(random) % 8);
        CHECK(pwrite(fd, &flipped, 1, at) == 1, "pwrite");
        CHECK(kvm_vmm_verify(&vmm, worker, seed, first, count, generations + first, &wrong, SECONDS) == 1 &&
                  wrong == page,
              "worker %u did not find byte %lld", worker, (long long)at);
        CHECK(pwrite(fd, &byte, 1, at) == 1, "pwrite");
        CHECK(kvm_vmm_verify(&vmm, worker, seed, first, count, generations + first, &wrong, SECONDS) == 0, "page %u",
              wrong);
    }
    if (!emulated)
        check_missing(&vmm, fd);
    printf("%u pages written and verified; every flipped bit found, by each vCPU and by the host\n", pages);
    close(fd);
    free(generations);
    kvm_vmm_end(&vmm);
}

static void check_backings(void) {
    static const char *const names[] = {"memfd", "hugetlb", "anonymous"};
    for (enum kvm_guest_backing backing = KVM_GUEST_MEMFD; backing <= KVM_GUEST_ANONYMOUS; backing++) {
        uint32_t generations[64], wrong;
        if (backing == KVM_GUEST_HUGETLB) {
            int fd = memfd_create("probe", MFD_CLOEXEC | MFD_HUGETLB);
            void *page = MAP_FAILED;
            if (fd >= 0 && ftruncate(fd, 2 * MIB) == 0)
                page = mmap(NULL, 2 * MIB, PROT_READ, MAP_SHARED, fd, 0);
            if (page == MAP_FAILED) {
                printf("hugetlb not tried: no free 2 MiB page (%s); write 4 to /proc/sys/vm/nr_hugepages\n",
                       strerror(errno));
                continue;
            }
            munmap(page, 2 * MIB);
            close(fd);
        }
        struct kvm_vmm vmm =
            kvm_vmm_start(&(struct kvm_guest_config){.bytes = 2 * MIB, .vcpus = 1, .backing = backing});
        for (uint32_t i = 0; i < 64; i++)
            generations[i] = i % 5;
        kvm_vmm_fill(&vmm, 0, 7, 100, 64, generations, SECONDS);
        CHECK(kvm_vmm_verify(&vmm, 1, 7, 100, 64, generations, &wrong, SECONDS) == 0, "page %u", wrong);
        kvm_vmm_end(&vmm);
        printf("backing %s: written by the guest, read by the host\n", names[backing]);
    }
}

static void check_refusals(void) {
    static const struct kvm_guest_config bad[] = {
        {.bytes = 0, .vcpus = 1},
        {.bytes = MIB, .vcpus = 1},
        {.bytes = KVM_GUEST_BYTES_MAX + 2 * MIB, .vcpus = 1},
        {.bytes = 2 * MIB, .vcpus = 0},
        {.bytes = 2 * MIB, .vcpus = KVM_GUEST_VCPUS_MAX + 1},
        {.bytes = 2 * MIB, .vcpus = 1, .backing = KVM_GUEST_ANONYMOUS + 1},
    };
    static const struct kvm_touch wrong[] = {
        {.page = 512, .times = 1},
        {.page = 0, .word = KVM_GUEST_WORDS, .times = 1},
        {.page = 0, .kind = KVM_TOUCH_KINDS, .times = 1},
        {.page = 0, .times = 0},
    };
    struct kvm_guest *guest;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        CHECK(kvm_guest_create(&bad[i], &guest) == -EINVAL, "configuration %zu was taken", i);
    struct kvm_vmm vmm = kvm_vmm_start(&(struct kvm_guest_config){.bytes = 2 * MIB, .vcpus = 1});
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct kvm_touch touch = wrong[i];
        for (uint32_t worker = 0; worker < 2; worker++)
            CHECK(kvm_vmm_run(&vmm, worker, &touch, 1, SECONDS).error == -EINVAL, "touch %zu was done", i);
    }
    kvm_vmm_end(&vmm);
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void measure(void) {
    enum { SAMPLE = 16 };
    struct kvm_vmm vmm = kvm_vmm_start(&(struct kvm_guest_config){.bytes = 2 * MIB, .vcpus = 1});
    uint32_t generations[SAMPLE] = {0};
    kvm_vmm_fill(&vmm, 0, 0, 0, SAMPLE, generations, SECONDS);
    double page_seconds = 1;
    for (unsigned i = 0; i < 10; i++) { /* the best of them: the machine may be busy */
        double began = seconds_now();
        kvm_vmm_fill(&vmm, 0, 0, 0, SAMPLE, generations, SECONDS);
        page_seconds = fmin(page_seconds, (seconds_now() - began) / SAMPLE);
    }
    emulated = page_seconds > 1e-3;
    printf("the guest writes a page in %.0f us%s\n", page_seconds * 1e6,
           emulated ? ": KVM emulates it, so all is tried with less" : "");
    kvm_vmm_end(&vmm);
}

/* An exception of the guest is told as what it is, and the guest goes on afterwards. */
static void check_exceptions(void) {
    struct kvm_touch touches[3] = {
        {.page = 1, .times = 1}, {.page = 7, .word = 3, .times = 1}, {.page = 2, .times = 1}};
    for (int large = 0; large < 2; large++) {
        struct kvm_vmm vmm =
            kvm_vmm_start(&(struct kvm_guest_config){.bytes = 4 * MIB, .vcpus = 1, .large_pages = large});
        touches[1].page = large ? 1023 : 7;
        kvm_guest_hide(vmm.guest, touches[1].page, true);
        struct kvm_outcome outcome = kvm_vmm_run(&vmm, 0, touches, 3, SECONDS);
        CHECK(outcome.error == -EIO && outcome.at == 1 && strstr(outcome.why, "exception 14 at touch 1 of 3"),
              "error %d at %u: %s", outcome.error, outcome.at, outcome.why);
        if (!large)
            printf("an exception is told: %s\n", outcome.why);
        kvm_guest_hide(vmm.guest, touches[1].page, false);
        outcome = kvm_vmm_run(&vmm, 0, touches, 3, SECONDS);
        CHECK(outcome.error == 0, "afterwards: %s", outcome.why);
        kvm_vmm_end(&vmm);
    }
}

int main(int argc, char **argv) {
    uint64_t random = seed_of(argc, argv);
    double began = seconds_now();
    setvbuf(stdout, NULL, _IOLBF, 0);
    check_refusals();
    measure();
    check_exceptions();
    for (uint32_t vcpus = 1; vcpus <= 4; vcpus++)
        for (int large = 0; large < 2; large++)
            check_scripts(vcpus, large, &random);
    check_verify(&random);
    check_backings();
    printf("%.1f s\n", seconds_now() - began);
    return 0;
}
