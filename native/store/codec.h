/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens to one page's content on its way into a tier and back: what kind of page it is, its checksum,
 * and compression. No function here allocates, locks or makes a system call, except to create and destroy a codec.
 */
#ifndef FL_STORE_CODEC_H
#define FL_STORE_CODEC_H

#include <stdint.h>

/* Longest payload worth storing: a page that compresses to more than 75 % stays where it is. */
#define FL_PAYLOAD_MAX 3072u

enum fl_page_kind {
    FL_PAGE_ZERO = 0, /* nothing but zeros */
    FL_PAGE_SAME = 1, /* one 32-bit pattern all over, not zero */
    FL_PAGE_DATA = 2
};

/* Pages are 4096 bytes, aligned to 8. *pattern is set for ZERO (to 0) and SAME. */
enum fl_page_kind fl_page_classify(const void *page, uint32_t *pattern);

/* Of the plain content, seeded with the page's index: right content under a wrong index does not match. */
uint64_t fl_page_checksum(const void *page, uint64_t page_index);

/* A compressor's working memory: one for each thread that compresses. -ENOMEM when there is none. */
struct fl_codec;
int fl_codec_create(struct fl_codec **out);
void fl_codec_destroy(struct fl_codec *codec);

/*
 * Compress a page into `out`, which has room for `limit` bytes (at most FL_PAYLOAD_MAX count). Returns the
 * length, or 0 when it does not fit.
 */
uint32_t fl_compress(struct fl_codec *codec, const void *page, void *out, uint32_t limit);

/*
 * Decompress into exactly one page; -EBADMSG when the input does not give one, and then `page` holds anything.
 * `in` may be memory that somebody else scribbles on meanwhile: nothing outside of `in` and `page` is touched.
 */
int fl_decompress(const void *in, uint32_t length, void *page);

#endif
