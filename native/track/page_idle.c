/* SPDX-License-Identifier: Apache-2.0 */
#include "track/page_idle.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kernel-page-flags.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define INDEX_BITS 20u /* of an entry of `found`; the frame is above: 44 bits of it */
#define WORD_BITS (INDEX_BITS + 6)
#define DIGIT_BITS 11u
#define DIGITS (1u << DIGIT_BITS)
#define BRIDGE 4u     /* words not ours in the middle of a write: cheaper than another call; nothing is set in them */
#define ORDER_MAX 18u /* of a huge page: 1 GiB */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_FRAME ((UINT64_C(1) << 55) - 1)
#define FIRST_OF_PAIRS UINT64_C(0x5555555555555555)
#define FLAG(bit) (UINT64_C(1) << (bit))

_Static_assert(FL_PAGE_IDLE_BATCH <= UINT64_C(1) << INDEX_BITS, "an index does not fit");

static uint64_t frame_of(uint64_t found) {
    return found >> INDEX_BITS;
}

static uint64_t word_of(uint64_t found) {
    return found >> WORD_BITS;
}

/* The frame of the page at `address` of this process; 0: the kernel does not show it. */
static uint64_t own_frame(const volatile void *address) {
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t bytes = pread(fd, &entry, sizeof(entry), (off_t)((uintptr_t)address / FL_PAGE_SIZE * sizeof(entry)));
    close(fd);
    return bytes == sizeof(entry) && (entry & PAGEMAP_PRESENT) ? entry & PAGEMAP_FRAME : 0;
}

static bool sees_frames(void) {
    volatile uint8_t touched = 1;
    return own_frame(&touched) != 0;
}

int fl_page_idle_open(struct fl_page_idle *idle) {
    memset(idle, 0, sizeof(*idle));
    idle->flags_fd = -1;
    idle->bitmap_fd = open(FL_PAGE_IDLE_PATH, O_RDWR | O_CLOEXEC);
    if (idle->bitmap_fd < 0)
        return errno == ENOENT ? -ENODEV : errno == EACCES ? -EPERM : -errno;
    if (!sees_frames()) {
        fl_page_idle_close(idle);
        return -EPERM;
    }
    idle->flags_fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    return 0;
}

void fl_page_idle_close(struct fl_page_idle *idle) {
    (void)fl_page_idle_reserve(idle, 0);
    if (idle->bitmap_fd >= 0)
        close(idle->bitmap_fd);
    if (idle->flags_fd >= 0)
        close(idle->flags_fd);
    idle->bitmap_fd = idle->flags_fd = -1;
}

int fl_page_idle_reserve(struct fl_page_idle *idle, uint32_t pages) {
    size_t each = pages * sizeof(uint64_t);
    idle->count = 0;
    if (pages == idle->room)
        return 0;
    /* Mapped and not allocated, so that what a scan took goes back when it ends. */
    if (idle->room)
        munmap(idle->found < idle->spare ? idle->found : idle->spare, 2 * idle->room * sizeof(uint64_t));
    idle->room = 0;
    if (!pages)
        return 0;
    uint64_t *room = mmap(NULL, 2 * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return -errno;
    idle->found = room;
    idle->spare = room + pages;
    idle->room = pages;
    return 0;
}

/* ---- which frames ------------------------------------------------------------------------------------------ */

/* By word, low digits first. Memory that was given to the VM in order is in order already. */
static void sort(struct fl_page_idle *idle) {
    uint64_t low = UINT64_MAX, high = 0, before = 0;
    bool sorted = true;
    for (uint32_t i = 0; i < idle->count; i++) {
        uint64_t word = word_of(idle->found[i]);
        sorted &= word >= before;
        before = word;
        low = word < low ? word : low;
        high = word > high ? word : high;
    }
    for (uint32_t shift = 0; !sorted && (high - low) >> shift; shift += DIGIT_BITS) {
        uint32_t place[DIGITS] = {0}, sum = 0;
        for (uint32_t i = 0; i < idle->count; i++)
            place[(word_of(idle->found[i]) - low) >> shift & (DIGITS - 1)]++;
        for (uint32_t digit = 0; digit < DIGITS; digit++) {
            uint32_t here = place[digit];
            place[digit] = sum;
            sum += here;
        }
        for (uint32_t i = 0; i < idle->count; i++)
            idle->spare[place[(word_of(idle->found[i]) - low) >> shift & (DIGITS - 1)]++] = idle->found[i];
        uint64_t *swap = idle->found;
        idle->found = idle->spare;
        idle->spare = swap;
    }
}

int fl_page_idle_find(struct fl_page_idle *idle, struct fl_vm *vm, uint32_t region, uint64_t first, uint32_t count) {
    uint64_t at = fl_address_of_page(vm, region, first) / FL_PAGE_SIZE;
    idle->count = 0;
    if (count > idle->room)
        return -EINVAL;
    for (uint32_t done = 0; done < count;) {
        uint32_t ask = count - done < FL_PAGE_IDLE_LOOKS ? count - done : FL_PAGE_IDLE_LOOKS;
        ssize_t bytes =
            pread(vm->pagemap_fd, idle->entries, ask * sizeof(uint64_t), (off_t)((at + done) * sizeof(uint64_t)));
        if (bytes <= 0)
            return bytes ? -errno : -ESRCH; /* nothing at all is what a process without memory has */
        uint32_t got = (uint32_t)((size_t)bytes / sizeof(uint64_t));
        for (uint32_t i = 0; i < got; i++) {
            uint64_t frame = idle->entries[i] & PAGEMAP_FRAME;
            if (!(idle->entries[i] & PAGEMAP_PRESENT))
                continue; /* not mapped, or swapped out: nobody touched it there */
            if (!frame)
                return -EPERM; /* no memory of a process lies in frame 0 */
            idle->found[idle->count++] = frame << INDEX_BITS | (done + i);
        }
        done += got;
    }
    /* What is not where it was any more looks as if it were not mapped. */
    if (atomic_load(&vm->parted) || fl_address_of_page(vm, region, first) / FL_PAGE_SIZE != at)
        return -EAGAIN;
    sort(idle);
    return 0;
}

uint32_t fl_page_idle_index(const struct fl_page_idle *idle, uint32_t which) {
    return (uint32_t)(idle->found[which] & (FLAG(INDEX_BITS) - 1));
}

/* ---- marking ----------------------------------------------------------------------------------------------- */

/*
 * When a host's memory ends in the middle of a word, the kernel sets the marks of that word and says that it has written
 * nothing.
 */
static int write_words(struct fl_page_idle *idle, uint64_t first, uint32_t count) {
    for (uint32_t done = 0; done < count;) {
        ssize_t bytes = pwrite(idle->bitmap_fd, idle->words + done, (count - done) * sizeof(uint64_t),
                               (off_t)((first + done) * sizeof(uint64_t)));
        if (bytes < 0)
            return errno == ENXIO ? 0 : -errno; /* ENXIO: beyond what page_idle knows of */
        if (bytes == 0)
            return 0;
        done += (uint32_t)((size_t)bytes / sizeof(uint64_t));
    }
    return 0;
}

int fl_page_idle_mark(struct fl_page_idle *idle) {
    uint64_t first = 0;
    uint32_t used = 0;
    for (uint32_t i = 0; i < idle->count; i++) {
        uint64_t word = word_of(idle->found[i]);
        if (used && (word - first >= FL_PAGE_IDLE_WORDS || word - first > used + BRIDGE)) {
            int error = write_words(idle, first, used);
            if (error)
                return error;
            used = 0;
        }
        if (!used)
            first = word;
        while (used <= word - first)
            idle->words[used++] = 0;
        idle->words[word - first] |= UINT64_C(1) << (frame_of(idle->found[i]) % 64);
    }
    return used ? write_words(idle, first, used) : 0;
}

/* ---- looking ----------------------------------------------------------------------------------------------- */

/* *got gets how many words the kernel told of: it says nothing of a last one that memory does not fill. */
static int read_words(struct fl_page_idle *idle, uint64_t *words, uint64_t first, uint32_t count, uint32_t *got) {
    for (*got = 0; *got < count;) {
        ssize_t bytes = pread(idle->bitmap_fd, words + *got, (count - *got) * sizeof(uint64_t),
                              (off_t)((first + *got) * sizeof(uint64_t)));
        if (bytes < 0)
            return -errno;
        if (bytes == 0)
            return 0;
        *got += (uint32_t)((size_t)bytes / sizeof(uint64_t));
    }
    return 0;
}

static bool read_flags(struct fl_page_idle *idle, uint64_t *flags, uint64_t first, uint32_t count) {
    ssize_t bytes = idle->flags_fd < 0
                        ? -1
                        : pread(idle->flags_fd, flags, count * sizeof(uint64_t), (off_t)(first * sizeof(uint64_t)));
    if (bytes < 0)
        return false;
    memset((uint8_t *)flags + bytes, 0, count * sizeof(uint64_t) - (size_t)bytes);
    return true;
}

/*
 * Whether the huge page is idle that `frame` is a tail of. A huge page begins at a multiple of its size, and all of it but
 * its head are tails: going back from multiple to multiple, the first that is no tail is the head.
 */
static int head_is_idle(struct fl_page_idle *idle, uint64_t frame, bool *is_idle) {
    *is_idle = false;
    for (uint32_t order = 1; order <= ORDER_MAX; order++) {
        uint64_t head = frame & ~((UINT64_C(1) << order) - 1), flags, word;
        uint32_t got;
        if (!(frame & UINT64_C(1) << (order - 1)))
            continue; /* the same multiple as before */
        if (!read_flags(idle, &flags, head, 1))
            return 0;
        if (flags & FLAG(KPF_COMPOUND_TAIL))
            continue;
        if (!(flags & FLAG(KPF_COMPOUND_HEAD)))
            return 0; /* split meanwhile */
        int error = read_words(idle, &word, head / 64, 1, &got);
        *is_idle = !error && (!got || (word >> (head % 64) & 1));
        return error;
    }
    return 0;
}

/*
 * Only the head of a huge page has a mark: give its tails the same. `pages` are the ones asked about, which may be tails
 * unless they are marked themselves, or the second of their pair is: in a huge page that one is a tail, and never marked.
 */
static int spread_heads(struct fl_page_idle *idle, uint64_t word, uint64_t pages, uint64_t *bits) {
    uint64_t suspects = pages & ~*bits & ~(*bits >> 1 & FIRST_OF_PAIRS);
    if (!suspects)
        return 0;
    uint32_t from = (uint32_t)__builtin_ctzll(suspects), to = 64 - (uint32_t)__builtin_clzll(suspects);
    if (!read_flags(idle, idle->flags, word * 64 + from, to - from))
        return 0;
    for (uint32_t i = from; i < to; i++) {
        if (!(idle->flags[i - from] & FLAG(KPF_COMPOUND_TAIL)))
            continue;
        bool is_idle = i && *bits >> (i - 1) & 1;
        int error = i == from ? head_is_idle(idle, word * 64 + i, &is_idle) : 0;
        if (error)
            return error;
        *bits = (*bits & ~(UINT64_C(1) << i)) | (uint64_t)is_idle << i;
    }
    return 0;
}

/*
 * A word that the bitmap does not tell of: asking for it has brought the marks up to date all the same, and they show in the
 * page flags, of tails too. What does not show there is taken for idle.
 */
static uint64_t word_by_flags(struct fl_page_idle *idle, uint64_t word) {
    uint64_t bits = 0;
    if (!read_flags(idle, idle->flags, word * 64, 64))
        return ~UINT64_C(0);
    for (uint32_t i = 0; i < 64; i++)
        bits |= (idle->flags[i] >> KPF_IDLE & 1) << i;
    return bits;
}

/* The entries [from, to) lie in one word of the bitmap, and `bits` is that word if it is known. */
static int judge(struct fl_page_idle *idle, uint32_t from, uint32_t to, bool known, uint64_t bits, uint64_t *accessed) {
    uint64_t word = word_of(idle->found[from]), pages = 0;
    for (uint32_t i = from; i < to; i++)
        pages |= UINT64_C(1) << (frame_of(idle->found[i]) % 64);
    if (!known)
        bits = word_by_flags(idle, word);
    int error = known ? spread_heads(idle, word, pages, &bits) : 0;
    if (!(pages & ~bits))
        return error;
    for (uint32_t i = from; i < to; i++) {
        uint32_t index = fl_page_idle_index(idle, i);
        accessed[index / 64] |= (~bits >> (frame_of(idle->found[i]) % 64) & 1) << (index % 64);
    }
    return error;
}

int fl_page_idle_accessed(struct fl_page_idle *idle, uint64_t *accessed) {
    int error = 0;
    for (uint32_t from = 0, end; from < idle->count && !error; from = end) {
        uint64_t first = word_of(idle->found[from]), past = first;
        for (end = from; end < idle->count; end++) {
            uint64_t word = word_of(idle->found[end]);
            if (word > past || word - first >= FL_PAGE_IDLE_WORDS)
                break;
            past = word + 1;
        }
        uint32_t got;
        error = read_words(idle, idle->words, first, (uint32_t)(past - first), &got);
        for (uint32_t to; from < end && !error; from = to) {
            uint64_t word = word_of(idle->found[from]);
            for (to = from; to < end && word_of(idle->found[to]) == word; to++)
                ;
            error = judge(idle, from, to, word - first < got, idle->words[word - first], accessed);
        }
    }
    return error;
}

/* ---- whether it works at all --------------------------------------------------------------------------------- */

static int mark_and_ask(struct fl_page_idle *idle, const char **what) {
    volatile uint8_t touched = 1;
    uint64_t accessed = 0;
    int error = fl_page_idle_reserve(idle, 1);
    *what = "memory for a trial of";
    if (error)
        return error;
    idle->found[idle->count++] = own_frame(&touched) << INDEX_BITS;
    *what = "writing to";
    error = fl_page_idle_mark(idle);
    if (error)
        return error;
    *what = "reading";
    return fl_page_idle_accessed(idle, &accessed);
}

bool fl_page_idle_try(char *lacks, size_t bytes) {
    struct fl_page_idle idle;
    const char *what = "opening";
    int error = fl_page_idle_open(&idle);
    if (!error)
        error = mark_and_ask(&idle, &what);
    else if (idle.bitmap_fd < 0 && error == -ENODEV)
        what = NULL;
    if (!error)
        lacks[0] = 0;
    else if (!what)
        snprintf(lacks, bytes,
                 "no " FL_PAGE_IDLE_PATH ": a kernel with CONFIG_IDLE_PAGE_TRACKING (RHEL, Fedora, Ubuntu), and root");
    else if (error == -EPERM)
        snprintf(lacks, bytes,
                 "page_idle and the frame numbers of /proc/PID/pagemap are not for this process: needs "
                 "root with CAP_SYS_ADMIN");
    else
        snprintf(lacks, bytes, "%s " FL_PAGE_IDLE_PATH " fails: %s", what, strerror(-error));
    fl_page_idle_close(&idle);
    return !error;
}
