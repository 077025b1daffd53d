/* SPDX-License-Identifier: Apache-2.0 */
#include "kvm_vmm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "victim.h"

#define START_SECONDS 30u
#define END_SECONDS 60u /* the kernel waits for grace periods when it drops a VM: long on a busy machine */
#define POLL_MS 20
#define LOOK_POLLS 100u /* so often each vCPU is made to look whether it is still itself */

/* ---- in the VMM -------------------------------------------------------------------------------------------- */

struct worker_arguments {
    struct kvm_vmm *vmm;
    uint32_t worker;
};

static void *work(void *argument) {
    const struct worker_arguments *arguments = argument;
    struct kvm_vmm_worker *worker = &arguments->vmm->shared->workers[arguments->worker];
    for (;;) {
        while (sem_wait(&worker->asked) && errno == EINTR)
            ;
        if (atomic_load(&arguments->vmm->shared->stop))
            return NULL;
        worker->outcome = kvm_guest_run(arguments->vmm->guest, arguments->worker, worker->count, worker->passes);
        sem_post(&worker->answered);
    }
}

struct own_memory {
    uint64_t bytes;
    volatile uint8_t *memory;
};

static void own_resize(struct own_memory *own, uint64_t bytes, bool in_file) {
    if (own->bytes == bytes)
        return;
    if (own->bytes)
        munmap((void *)own->memory, own->bytes);
    *own = (struct own_memory){.bytes = bytes};
    if (!bytes)
        return;
    int fd = in_file ? memfd_create("io-buffers", MFD_CLOEXEC) : -1;
    if (in_file && (fd < 0 || ftruncate(fd, (off_t)bytes)))
        _exit(96);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, in_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    if (memory == MAP_FAILED)
        _exit(96);
    if (in_file)
        close(fd);
    own->memory = memory;
}

static void own_touch(const struct own_memory *own, uint64_t pass) {
    for (uint64_t at = 0; at < own->bytes; at += KVM_GUEST_PAGE) {
        if (pass % 2)
            (void)own->memory[at + 8];
        else
            own->memory[at + 8] = (uint8_t)pass;
    }
}

static void *keep_hot(void *argument) {
    struct kvm_vmm_shared *s = argument;
    struct own_memory heap = {0}, buffers = {0};
    for (uint64_t pass = 0; !atomic_load(&s->stop); pass++) {
        own_resize(&heap, atomic_load(&s->heap_bytes), false);
        own_resize(&buffers, atomic_load(&s->buffer_bytes), true);
        own_touch(&heap, pass);
        own_touch(&buffers, pass);
        atomic_fetch_add(&s->heap_passes, 1);
        if (!heap.bytes && !buffers.bytes)
            sleep_ms(1);
    }
    return NULL;
}

/* What it interrupts is KVM_RUN. */
static void look(int number) {
    (void)number;
}

static _Noreturn void vmm_main(struct kvm_vmm *vmm) {
    struct kvm_vmm_shared *s = vmm->shared;
    struct worker_arguments arguments[KVM_GUEST_VCPUS_MAX + 1];
    pthread_t threads[KVM_GUEST_VCPUS_MAX + 1], hot;
    uint32_t workers = kvm_guest_workers(vmm->guest);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    kvm_guest_catch_sigbus();
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = look}, NULL);
    s->started = kvm_guest_start(vmm->guest);
    for (uint32_t i = 0; i < workers && !s->started.error; i++) {
        arguments[i] = (struct worker_arguments){.vmm = vmm, .worker = i};
        if (pthread_create(&threads[i], NULL, work, &arguments[i]))
            _exit(94);
    }
    if (!s->started.error && pthread_create(&hot, NULL, keep_hot, s))
        _exit(94);
    atomic_store(&s->ready, 1);
    if (s->started.error)
        _exit(0);
    for (unsigned polls = 1; !atomic_load(&s->stop); polls++) {
        poll(NULL, 0, POLL_MS);
        for (uint32_t i = 0; i + 1 < workers && polls % LOOK_POLLS == 0; i++)
            pthread_kill(threads[i], SIGUSR1);
    }
    for (uint32_t i = 0; i < workers; i++) {
        sem_post(&s->workers[i].asked);
        pthread_join(threads[i], NULL);
    }
    pthread_join(hot, NULL);
    _exit(0);
}

/* ---- from the test ----------------------------------------------------------------------------------------- */

static void check_alive(const struct kvm_vmm *vmm) {
    int status;
    pid_t ended = waitpid(vmm->pid, &status, WNOHANG);
    CHECK(ended == 0, "the VMM ended, status %#x", status);
}

/*
 * The kernel patches its own code when the first VM or vCPU comes and when the last goes. QEMU's TCG, under which
 * tests/kernel boots a kernel, sometimes goes on with the old code (seen: an int3 in the scheduler). So the test keeps
 * a vCPU that never runs.
 */
static void hold_kvm(void) {
    static bool held;
    int kvm = held ? -1 : open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm >= 0)
        (void)ioctl(vm, KVM_CREATE_VCPU, 0);
    held = true;
}

struct kvm_vmm kvm_vmm_start(const struct kvm_guest_config *config) {
    struct kvm_vmm vmm = {0};
    int error = kvm_guest_create(config, &vmm.guest);
    CHECK(error == 0, "kvm_guest_create: %s", strerror(-error));
    vmm.shared = mmap(NULL, sizeof(*vmm.shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(vmm.shared != MAP_FAILED, "mmap: %s", strerror(errno));
    for (uint32_t i = 0; i < kvm_guest_workers(vmm.guest); i++) {
        sem_init(&vmm.shared->workers[i].asked, 1, 0);
        sem_init(&vmm.shared->workers[i].answered, 1, 0);
    }
    hold_kvm();
    fflush(NULL);
    vmm.pid = fork();
    CHECK(vmm.pid >= 0, "fork: %s", strerror(errno));
    if (vmm.pid == 0)
        vmm_main(&vmm);
    for (unsigned i = 0; i < START_SECONDS * 1000 && !atomic_load(&vmm.shared->ready); i++) {
        sleep_ms(1);
        if (i % 100 == 99 && !atomic_load(&vmm.shared->ready))
            check_alive(&vmm);
    }
    CHECK(atomic_load(&vmm.shared->ready), "the VMM did not start in %u s", START_SECONDS);
    if (vmm.shared->started.error) {
        printf("skipped: no KVM guest here: %s\n", vmm.shared->started.why);
        exit(77);
    }
    return vmm;
}

uint32_t kvm_vmm_host(const struct kvm_vmm *vmm) {
    return kvm_guest_workers(vmm->guest) - 1;
}

void kvm_vmm_begin(struct kvm_vmm *vmm, uint32_t worker, const struct kvm_touch *script, uint32_t count,
                   uint64_t passes) {
    CHECK(worker < kvm_guest_workers(vmm->guest) && count <= KVM_SCRIPT_MAX, "worker %u, %u touches", worker, count);
    struct kvm_vmm_worker *w = &vmm->shared->workers[worker];
    CHECK(atomic_exchange(&w->busy, 1) == 0, "worker %u is at work", worker);
    if (count)
        memcpy(kvm_guest_script(vmm->guest, worker), script, count * sizeof(*script));
    w->count = count;
    w->passes = passes;
    sem_post(&w->asked);
}

struct kvm_outcome kvm_vmm_wait(struct kvm_vmm *vmm, uint32_t worker, struct kvm_touch *script, uint32_t count,
                                unsigned seconds) {
    struct kvm_vmm_worker *w = &vmm->shared->workers[worker];
    struct timespec now;
    CHECK(atomic_load(&w->busy), "worker %u was not asked", worker);
    clock_gettime(CLOCK_REALTIME, &now);
    for (time_t end = now.tv_sec + seconds;;) {
        now.tv_nsec += 100000000;
        if (now.tv_nsec >= 1000000000) {
            now.tv_sec++;
            now.tv_nsec -= 1000000000;
        }
        if (sem_timedwait(&w->answered, &now) == 0)
            break;
        CHECK(errno == ETIMEDOUT || errno == EINTR, "sem_timedwait: %s", strerror(errno));
        check_alive(vmm);
        clock_gettime(CLOCK_REALTIME, &now);
        CHECK(now.tv_sec <= end, "worker %u did not end in %u s", worker, seconds);
    }
    if (script && count)
        memcpy(script, kvm_guest_script(vmm->guest, worker), count * sizeof(*script));
    struct kvm_outcome outcome = w->outcome;
    if (outcome.error == -KVM_GUEST_LOST) {
        printf("no verdict: worker %u: %s\n", worker, outcome.why);
        exit(KVM_VMM_NO_VERDICT);
    }
    atomic_store(&w->busy, 0);
    return outcome;
}

struct kvm_outcome kvm_vmm_stop(struct kvm_vmm *vmm, uint32_t worker, unsigned seconds) {
    kvm_guest_stop(vmm->guest, worker);
    return kvm_vmm_wait(vmm, worker, NULL, 0, seconds);
}

struct kvm_outcome kvm_vmm_run(struct kvm_vmm *vmm, uint32_t worker, struct kvm_touch *script, uint32_t count,
                               unsigned seconds) {
    struct kvm_outcome outcome = {.error = 0};
    uint32_t done = 0;
    do {
        uint32_t now = count - done < KVM_SCRIPT_MAX ? count - done : KVM_SCRIPT_MAX;
        kvm_vmm_begin(vmm, worker, script + done, now, 1);
        outcome = kvm_vmm_wait(vmm, worker, script + done, now, seconds);
        outcome.at += done;
        done += now;
    } while (done < count && !outcome.error);
    return outcome;
}

/* FILL or CHECK of many pages. */
static struct kvm_touch *run_contents(struct kvm_vmm *vmm, uint32_t worker, enum kvm_touch_kind kind, uint64_t seed,
                                      uint32_t first, uint32_t count, const uint32_t *generations, unsigned seconds) {
    struct kvm_touch *script = calloc(count ? count : 1, sizeof(*script));
    CHECK(script, "no memory for a script of %u touches", count);
    for (uint32_t i = 0; i < count; i++)
        script[i] = kvm_touch_content(kind, seed, first + i, generations[i]);
    struct kvm_outcome outcome = kvm_vmm_run(vmm, worker, script, count, seconds);
    CHECK(outcome.error == 0, "worker %u: %s", worker, outcome.why);
    return script;
}

void kvm_vmm_fill(struct kvm_vmm *vmm, uint32_t worker, uint64_t seed, uint32_t first, uint32_t count,
                  const uint32_t *generations, unsigned seconds) {
    free(run_contents(vmm, worker, KVM_TOUCH_FILL, seed, first, count, generations, seconds));
}

uint32_t kvm_vmm_verify(struct kvm_vmm *vmm, uint32_t worker, uint64_t seed, uint32_t first, uint32_t count,
                        const uint32_t *generations, uint32_t *wrong, unsigned seconds) {
    struct kvm_touch *script = run_contents(vmm, worker, KVM_TOUCH_CHECK, seed, first, count, generations, seconds);
    uint32_t pages = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (script[i].result && pages++ == 0 && wrong)
            *wrong = first + i;
    }
    free(script);
    return pages;
}

void kvm_vmm_heat(struct kvm_vmm *vmm, uint64_t heap_bytes, uint64_t buffer_bytes, unsigned seconds) {
    struct kvm_vmm_shared *s = vmm->shared;
    atomic_store(&s->heap_bytes, heap_bytes);
    atomic_store(&s->buffer_bytes, buffer_bytes);
    /* The pass at work may have begun with the old sizes. */
    uint64_t goal = atomic_load(&s->heap_passes) + 2;
    for (unsigned i = 0; i < seconds * 1000 && atomic_load(&s->heap_passes) < goal; i++) {
        sleep_ms(1);
        if (i % 100 == 0)
            check_alive(vmm);
    }
    CHECK(atomic_load(&s->heap_passes) >= goal, "the VMM did not touch its own memory in %u s", seconds);
}

void kvm_vmm_end(struct kvm_vmm *vmm) {
    int status;
    for (uint32_t i = 0; i < kvm_guest_workers(vmm->guest); i++)
        if (atomic_load(&vmm->shared->workers[i].busy))
            kvm_vmm_stop(vmm, i, 30);
    atomic_store(&vmm->shared->stop, 1);
    for (unsigned i = 0; i < END_SECONDS * 1000; i++) {
        if (waitpid(vmm->pid, &status, WNOHANG) == vmm->pid) {
            CHECK(status == 0, "the VMM ended with status %#x", status);
            kvm_guest_destroy(vmm->guest);
            munmap(vmm->shared, sizeof(*vmm->shared));
            return;
        }
        sleep_ms(1);
    }
    kill(vmm->pid, SIGKILL);
    CHECK(false, "the VMM did not end in %u s", END_SECONDS);
}
