/*
 * SeqCache unit tests
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The name of a test says what is broken when it fails.  --seed repeats a
 * run of the model test, and SEQCACHE_OPS is the number of its operations.
 */

#include "qemu/osdep.h"
#include "fixture.h"
#include "seqcache-model.h"

#define MIB (1024 * 1024)
#define CLUSTER (64 * 1024)
#define ALIGN 4096
#define HIGH_ALIGN (4 * CLUSTER)

typedef struct Test {
    SeqCache *s;
    SeqCacheLimits limits; /* of the requests */
} Test;

typedef SeqCacheOptions TestConfig;

static const SeqCacheLimits default_limits = {
    .align = ALIGN, .max_bytes = MIB, .max_iov = 1024,
};

static void set_up(Test *t, const TestConfig *config)
{
    t->s = seqcache_new(config);
    t->limits = default_limits;
}

static void tear_down(Test *t, const TestConfig *config)
{
    seqcache_free(t->s);
}

#define CACHE(max_unfinished_, pad_)                                    \
    .cluster_size = CLUSTER, .max_unfinished = max_unfinished_, .pad = pad_
#define CACHE_512(max_unfinished_)                                      \
    .cluster_size = 512, .max_unfinished = max_unfinished_

/* What the tests store at an address; never 0 */
static uint8_t pattern(int64_t offset)
{
    return 1 + offset % 251;
}

static void put(Test *t, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    for (i = 0; i < bytes; i++) {
        buf[i] = pattern(offset + i);
    }
    g_assert_true(seqcache_can_write(t->s, offset, bytes));
    write_buf(t->s, offset, bytes, buf);
}

/* Expect @cached bytes from @offset on, and nothing after them */
static void expect_read(Test *t, int64_t offset, int64_t cached)
{
    int64_t bytes = cached + 100;
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    g_assert_cmpint(read_buf(t->s, offset, bytes, buf), ==, cached);
    for (i = 0; i < cached; i++) {
        g_assert_cmpint(buf[i], ==, pattern(offset + i));
    }
}

/* Expect a request with @bytes of data, and @padding zeroes behind them */
static SeqCacheRequest *take_padded(Test *t, bool unfinished, int64_t offset,
                                    int64_t bytes, int64_t padding)
{
    SeqCacheRequest *req = seqcache_get_next_flush(t->s, &t->limits,
                                                   unfinished);
    int64_t pos = offset;
    size_t k;
    int i;

    g_assert_nonnull(req);
    g_assert_cmpint(req->offset, ==, offset);
    g_assert_cmpint(req->bytes, ==, bytes + padding);
    g_assert_cmpint(req->niov, <=, t->limits.max_iov);
    for (i = 0; i < req->niov; i++) {
        const uint8_t *data = req->iov[i].iov_base;

        for (k = 0; k < req->iov[i].iov_len; k++, pos++) {
            g_assert_cmpint(data[k], ==,
                            pos < offset + bytes ? pattern(pos) : 0);
        }
    }
    g_assert_cmpint(pos, ==, offset + bytes + padding);
    return req;
}

static SeqCacheRequest *take(Test *t, bool unfinished, int64_t offset,
                             int64_t bytes)
{
    return take_padded(t, unfinished, offset, bytes, 0);
}

static void take_and_complete(Test *t, bool unfinished, int64_t offset,
                              int64_t bytes)
{
    seqcache_complete(t->s, take(t, unfinished, offset, bytes), true);
}

static void expect_next(Test *t, int64_t bytes)
{
    g_assert_cmpint(seqcache_next_flush_bytes(t->s, &t->limits), ==, bytes);
}

static void finish_oldest(Test *t)
{
    g_assert_true(seqcache_finish_oldest(t->s));
}

static void expect_no_request(Test *t, bool unfinished)
{
    g_assert_null(seqcache_get_next_flush(t->s, &t->limits, unfinished));
}

/* @finished: those of the @clusters that are finished and not in flight */
static void expect_clusters(Test *t, unsigned clusters, unsigned finished)
{
    SeqCacheStats stats;

    seqcache_get_stats(t->s, &stats);
    g_assert_cmpint(seqcache_nb_clusters(t->s), ==, clusters);
    g_assert_cmpint(stats.nb_finished, ==, finished);
}

static void expect_gap(Test *t, int64_t offset, int64_t bytes, int64_t gap)
{
    g_assert_cmpint(seqcache_gap(t->s, offset, bytes), ==, gap);
}

static void expect_flushed(Test *t, uint64_t point, bool flushed)
{
    g_assert_cmpint(seqcache_is_flushed(t->s, point), ==, flushed);
}

static void expect_continues(Test *t, int64_t offset, bool continues)
{
    g_assert_cmpint(seqcache_continues(t->s, offset), ==, continues);
}

static void expect_can_write(Test *t, int64_t offset, int64_t bytes, bool can)
{
    g_assert_cmpint(seqcache_can_write(t->s, offset, bytes), ==, can);
}

static void discard(Test *t, int64_t offset, int64_t bytes, bool in_flight)
{
    g_assert_cmpint(seqcache_discard(t->s, offset, bytes), ==, in_flight);
}

FIXTURE_TEST(empty, CACHE(1, false))
{
    SeqCacheStats stats;
    uint8_t byte = 0;

    expect_clusters(t, 0, 0);
    seqcache_get_stats(t->s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, 0);
    g_assert_cmpint(read_buf(t->s, 0, 1, &byte), ==, 0);
    expect_gap(t, 0, INT64_MAX, INT64_MAX);
    expect_gap(t, 0, 0, 0);
    expect_can_write(t, 0, INT64_MAX, true);
    expect_can_write(t, INT64_MAX, 0, true);
    expect_continues(t, 0, false);
    g_assert_false(seqcache_finish_oldest(t->s));
    discard(t, 0, 1, false);
    discard(t, 0, INT64_MAX, false);
    discard(t, 0, 0, false);
    expect_next(t, 0);
    expect_no_request(t, true);
    expect_flushed(t, seqcache_flush_point(t->s), true);
    seqcache_free(NULL);
}

FIXTURE_TEST(split_at_cluster_bounds, CACHE(1, false))
{
    SeqCacheStats stats;

    put(t, CLUSTER - 1, CLUSTER + 2);
    expect_clusters(t, 3, 2);
    seqcache_get_stats(t->s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, CLUSTER + 2);
    g_assert_cmpint(stats.bytes_finished, ==, CLUSTER + 1);
    expect_read(t, CLUSTER - 1, CLUSTER + 2);
    take_and_complete(t, false, CLUSTER - 1, CLUSTER + 1);
    expect_clusters(t, 1, 0);
}

/* The original overran the buffer of the first cluster here */
FIXTURE_TEST(full_cluster_is_finished, CACHE(1, false))
{
    put(t, 0, CLUSTER);
    expect_clusters(t, 1, 1);
    expect_continues(t, CLUSTER, false);
    put(t, CLUSTER, 100);
    expect_clusters(t, 2, 1);
    expect_read(t, 0, CLUSTER + 100);
    take_and_complete(t, false, 0, CLUSTER);
    expect_read(t, CLUSTER, 100);
}

FIXTURE_TEST(filled_by_continuation_is_finished, CACHE(1, false))
{
    put(t, 10, CLUSTER - 20);
    expect_continues(t, CLUSTER - 10, true);
    put(t, CLUSTER - 10, 10);
    expect_clusters(t, 1, 1);
    put(t, CLUSTER, 1);
    expect_read(t, 10, CLUSTER - 10 + 1);
}

FIXTURE_TEST(only_continuations_are_taken, CACHE(1, false))
{
    put(t, 100, 100);
    expect_can_write(t, 200, CLUSTER, true);
    expect_can_write(t, 300, 0, true);
    expect_can_write(t, 0, 1, false);
    expect_can_write(t, 100, 1, false);
    expect_can_write(t, 199, 1, false);
    expect_can_write(t, 201, 1, false);
    expect_continues(t, 199, false);
    expect_continues(t, 201, false);

    /* into a cluster that is cached, from one that is not */
    put(t, 3 * CLUSTER, 1);
    expect_can_write(t, CLUSTER, 2 * CLUSTER, true);
    expect_can_write(t, CLUSTER, 2 * CLUSTER + 1, false);
    expect_can_write(t, CLUSTER, INT64_MAX - CLUSTER, false);

    /* left behind, not full: takes nothing more */
    expect_clusters(t, 2, 1);
    expect_can_write(t, 200, 1, false);
    expect_continues(t, 200, false);
}

FIXTURE_TEST(read_crosses_clusters, CACHE(2, false))
{
    put(t, 1000, 3 * CLUSTER);
    expect_read(t, 1000, 3 * CLUSTER);
    expect_read(t, CLUSTER - 1, 2 * CLUSTER + 1001);
    expect_read(t, 999, 0);
    expect_read(t, 1000 + 3 * CLUSTER, 0);

    /* ends at a cluster that begins later */
    put(t, 5 * CLUSTER - 10, 10);
    put(t, 5 * CLUSTER + 1, 10);
    expect_read(t, 5 * CLUSTER - 10, 10);
    expect_gap(t, 5 * CLUSTER, 100, 1);
    expect_gap(t, 0, 100, 100);
    expect_gap(t, 0, 5000, 1000);
    expect_gap(t, 1000, 5000, 0);
    expect_gap(t, 3 * CLUSTER + 1000, 2 * CLUSTER, 2 * CLUSTER - 1010);
    expect_gap(t, 5 * CLUSTER + 11, INT64_MAX / 2, INT64_MAX / 2);
}

FIXTURE_TEST(several_streams, CACHE(3, false))
{
    int i, stream;

    for (i = 0; i < CLUSTER; i += 512) {
        for (stream = 0; stream < 3; stream++) {
            g_assert_true(!i || seqcache_continues(t->s, stream * 10 * CLUSTER +
                                                      i));
            put(t, stream * 10 * CLUSTER + i, 512);
        }
    }
    expect_clusters(t, 3, 3);
    for (stream = 0; stream < 3; stream++) {
        take_and_complete(t, false, stream * 10 * CLUSTER, CLUSTER);
    }
    expect_no_request(t, true);
}

FIXTURE_TEST(one_more_finishes_the_oldest, CACHE(2, false))
{
    put(t, 0, 100);
    put(t, 2 * CLUSTER, 100);
    put(t, 100, 100);
    expect_no_request(t, true);
    put(t, 4 * CLUSTER, 100);
    expect_clusters(t, 3, 1);
    expect_continues(t, 200, false);
    expect_continues(t, 2 * CLUSTER + 100, true);

    /* a cluster that is full at once needs no place among the unfinished */
    put(t, 8 * CLUSTER, CLUSTER);
    expect_clusters(t, 4, 2);
    expect_continues(t, 2 * CLUSTER + 100, true);
    take_and_complete(t, false, 0, 200);
    take_and_complete(t, false, 8 * CLUSTER, CLUSTER);

    finish_oldest(t);
    take_and_complete(t, false, 2 * CLUSTER, 100);
    finish_oldest(t);
    take_and_complete(t, false, 4 * CLUSTER, 100);
    g_assert_false(seqcache_finish_oldest(t->s));
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(finish_range, CACHE(3, false))
{
    put(t, 0, 100);
    put(t, CLUSTER, 100);
    put(t, 2 * CLUSTER, 100);
    seqcache_finish(t->s, CLUSTER, 0);
    expect_clusters(t, 3, 0);
    seqcache_finish(t->s, 2 * CLUSTER - 1, 1);
    expect_clusters(t, 3, 1);
    expect_continues(t, 100, true);
    expect_continues(t, CLUSTER + 100, false);
    seqcache_finish(t->s, 0, INT64_MAX);
    expect_clusters(t, 3, 3);
}

static int64_t overwrite(Test *t, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    for (i = 0; i < bytes; i++) {
        buf[i] = pattern(offset + i);
    }
    return overwrite_buf(t->s, offset, bytes, buf);
}

FIXTURE_TEST(overwrite, CACHE(1, false))
{
    uint8_t zeroes[2 * ALIGN] = { 0 };
    SeqCacheRequest *req;
    uint64_t point;

    /* Up to the first byte that is not cached */
    write_buf(t->s, ALIGN, 2 * ALIGN, zeroes);
    g_assert_cmpint(overwrite(t, ALIGN - 1, 10), ==, 0);
    g_assert_cmpint(overwrite(t, ALIGN, 3 * ALIGN), ==, 2 * ALIGN);
    expect_read(t, ALIGN, 2 * ALIGN);

    /* What was written out is dirty again, but older flushes need not wait */
    point = seqcache_flush_point(t->s);
    take_and_complete(t, true, ALIGN, 2 * ALIGN);
    g_assert_true(seqcache_is_clean(t->s));
    g_assert_cmpint(overwrite(t, 2 * ALIGN, 1), ==, 1);
    g_assert_false(seqcache_is_clean(t->s));
    expect_flushed(t, point, true);
    point = seqcache_flush_point(t->s);
    expect_flushed(t, point, false);
    req = take(t, true, 2 * ALIGN, ALIGN);

    /* Not in flight */
    g_assert_cmpint(overwrite(t, ALIGN, 1), ==, 0);
    seqcache_complete(t->s, req, true);
    expect_flushed(t, point, true);

    /* The start of a run that is about to be handed out */
    put(t, 3 * ALIGN, CLUSTER - 3 * ALIGN);
    expect_next(t, CLUSTER - 3 * ALIGN);
    g_assert_cmpint(overwrite(t, ALIGN, 1), ==, 1);
    expect_next(t, CLUSTER - ALIGN);
    take_and_complete(t, false, ALIGN, CLUSTER - ALIGN);
    g_assert_true(seqcache_is_clean(t->s));
}

FIXTURE_TEST(finish_of_written_run_frees_it, CACHE(1, false))
{
    SeqCacheRequest *req;

    put(t, 0, 100);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, 0, 100);
    expect_clusters(t, 1, 0);
    finish_oldest(t);
    expect_clusters(t, 0, 0);

    put(t, 0, 100);
    seqcache_flush_point(t->s);
    req = take(t, true, 0, 100);
    finish_oldest(t);
    expect_clusters(t, 1, 0);
    expect_read(t, 0, 100);
    seqcache_complete(t->s, req, true);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(order_is_write_order, CACHE(2, false))
{
    put(t, 50 * CLUSTER + 5, 10);
    put(t, 7 * CLUSTER, CLUSTER);
    put(t, 3 * CLUSTER, CLUSTER);
    put(t, 50 * CLUSTER + 15, CLUSTER - 15);
    put(t, 9 * CLUSTER, CLUSTER);
    put(t, 4 * CLUSTER, CLUSTER);

    take_and_complete(t, false, 50 * CLUSTER + 5, CLUSTER - 5);
    take_and_complete(t, false, 7 * CLUSTER, CLUSTER);
    take_and_complete(t, false, 3 * CLUSTER, 2 * CLUSTER);
    take_and_complete(t, false, 9 * CLUSTER, CLUSTER);
    expect_no_request(t, true);
}

FIXTURE_TEST(failed_request_is_handed_out_again, CACHE(1, false))
{
    SeqCacheRequest *req[4];
    int i;

    t->limits.max_bytes = 2 * CLUSTER;
    put(t, 8 * CLUSTER, 2 * CLUSTER);
    put(t, 0, 6 * CLUSTER);
    req[0] = take(t, false, 8 * CLUSTER, 2 * CLUSTER);
    for (i = 0; i < 2; i++) {
        req[i + 1] = take(t, false, 2 * i * CLUSTER, 2 * CLUSTER);
    }
    put(t, 20 * CLUSTER, CLUSTER);
    t->limits = default_limits;

    /* in any order of completion */
    seqcache_complete(t->s, req[1], false);
    seqcache_complete(t->s, req[2], false);
    seqcache_complete(t->s, req[0], false);
    expect_read(t, 8 * CLUSTER, 2 * CLUSTER);
    expect_read(t, 0, 6 * CLUSTER);

    take_and_complete(t, false, 8 * CLUSTER, 2 * CLUSTER);
    take_and_complete(t, false, 0, 6 * CLUSTER);
    take_and_complete(t, false, 20 * CLUSTER, CLUSTER);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(failed_unfinished_run_is_handed_out_again, CACHE(1, false))
{
    SeqCacheRequest *req;
    uint64_t point;

    put(t, 0, 5000);
    point = seqcache_flush_point(t->s);
    req = take(t, true, 0, 5000);
    put(t, 5000, 100);
    seqcache_complete(t->s, req, false);
    expect_flushed(t, point, false);
    take_and_complete(t, true, 0, 5000);
    expect_flushed(t, point, true);
}

FIXTURE_TEST(unfinished_run_is_written_once, CACHE(1, true))
{
    put(t, 100, 5000);
    expect_no_request(t, true);
    seqcache_flush_point(t->s);
    expect_no_request(t, false);
    take_and_complete(t, true, 100, 5000);
    expect_no_request(t, true);
    seqcache_flush_point(t->s);
    expect_no_request(t, true);
    expect_continues(t, 5100, true);

    /* only what is new, from the block on that it begins in */
    put(t, 5100, 5000);
    expect_no_request(t, true);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, 4096, 6004);

    /* also when it is finished */
    put(t, 10100, CLUSTER - 10100);
    take_and_complete(t, false, 8192, CLUSTER - 8192);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(rest_of_run_stays_inside_run, CACHE(1, false))
{
    put(t, ALIGN + 100, 10);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, ALIGN + 100, 10);
    put(t, ALIGN + 110, 10);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, ALIGN + 100, 20);
    put(t, ALIGN + 120, ALIGN);
    finish_oldest(t);
    take_and_complete(t, false, ALIGN + 100, ALIGN + 20);
}

FIXTURE_TEST(unfinished_in_flight_is_continued, CACHE(1, false))
{
    SeqCacheRequest *req;

    put(t, 0, 5000);
    seqcache_flush_point(t->s);
    req = take(t, true, 0, 5000);
    put(t, 5000, CLUSTER - 5000);
    expect_clusters(t, 1, 0);
    expect_no_request(t, false);
    g_assert_cmpint(req->bytes, ==, 5000);
    g_assert_cmpint(req->iov[0].iov_len, ==, 5000);
    seqcache_complete(t->s, req, true);
    expect_read(t, 0, CLUSTER);
    take_and_complete(t, false, 4096, CLUSTER - 4096);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(unfinished_is_last_in_request, CACHE(2, false))
{
    put(t, 0, 2 * CLUSTER + 100);
    seqcache_flush_point(t->s);
    put(t, 2 * CLUSTER + 100, 100);
    take_and_complete(t, true, 0, 2 * CLUSTER + 100);

    /* a cluster that begins later, or was partly written, is the first */
    put(t, 2 * CLUSTER + 200, 2 * CLUSTER);
    take_and_complete(t, false, 2 * CLUSTER, 2 * CLUSTER);
    put(t, 6 * CLUSTER - 100, 100);
    put(t, 6 * CLUSTER + 1, CLUSTER);
    take_and_complete(t, false, 6 * CLUSTER - 100, 100);
    take_and_complete(t, false, 6 * CLUSTER + 1, CLUSTER - 1);
}

FIXTURE_TEST(padding_is_zero, CACHE(1, true))
{
    SeqCacheRequest *req;
    int i;

    /* Let the buffers have other contents */
    for (i = 0; i < 4; i++) {
        put(t, i * CLUSTER, CLUSTER);
    }
    take_and_complete(t, false, 0, 4 * CLUSTER);

    for (i = 0; i < 4; i++) {
        put(t, 2 * i * CLUSTER, 2 * CLUSTER - 5000);
        finish_oldest(t);
        expect_next(t, 2 * CLUSTER - 5000);
        req = take_padded(t, i % 2, 2 * i * CLUSTER,
                          2 * CLUSTER - 5000, 904);
        expect_read(t, 2 * i * CLUSTER, 2 * CLUSTER - 5000);
        seqcache_complete(t->s, req, true);
    }
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(padding_only_if_allowed, CACHE(1, false))
{
    put(t, 0, 100);
    finish_oldest(t);
    take_and_complete(t, false, 0, 100);
}

FIXTURE_TEST(padding_never_for_unfinished, CACHE(1, true))
{
    SeqCacheRequest *req;

    put(t, 0, 100);
    seqcache_flush_point(t->s);
    req = take(t, true, 0, 100);

    /* not even if it is finished then */
    finish_oldest(t);
    g_assert_cmpint(req->bytes, ==, 100);
    seqcache_complete(t->s, req, true);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(padding_never_leaves_cluster, CACHE(1, true))
{
    SeqCacheRequest *req;

    put(t, 0, CLUSTER - 1);
    finish_oldest(t);
    t->limits.align = CLUSTER;
    req = take_padded(t, false, 0, CLUSTER - 1, 1);
    seqcache_complete(t->s, req, false);

    /* Parts of the block belong to others when it is larger than a cluster */
    t->limits.align = HIGH_ALIGN;
    take_and_complete(t, false, 0, CLUSTER - 1);

    put(t, HIGH_ALIGN - CLUSTER, CLUSTER - 1);
    finish_oldest(t);
    take_and_complete(t, false, HIGH_ALIGN - CLUSTER, CLUSTER - 1);
}

static uint8_t byte_at(const SeqCacheRequest *req, int64_t pos)
{
    int i = 0;

    for (pos -= req->offset; pos >= req->iov[i].iov_len; i++) {
        pos -= req->iov[i].iov_len;
    }
    return ((uint8_t *)req->iov[i].iov_base)[pos];
}

/* A run that ends inside its cluster, and then a whole cluster */
static void put_two(Test *t, int64_t offset, int64_t bytes)
{
    put(t, offset, bytes);
    finish_oldest(t);
    put(t, offset - offset % CLUSTER + CLUSTER, CLUSTER);
}

/* With 10 %, ten clusters pay for one that is empty but for a block */
FIXTURE_TEST(fill_joins_clusters, CACHE(1, true), .fill_percent = 10)
{
    SeqCacheRequest *req;
    int64_t pos;
    int i;

    /* Nothing was stored that would pay for it */
    put_two(t, 0, ALIGN);
    expect_next(t, ALIGN);
    take_and_complete(t, false, 0, ALIGN);

    /* If it fails, the next attempt may have the same zeroes */
    put(t, 2 * CLUSTER, 9 * CLUSTER);
    put_two(t, 11 * CLUSTER, ALIGN);
    for (i = 0; i < 2; i++) {
        expect_next(t, 12 * CLUSTER);
        req = seqcache_get_next_flush(t->s, &t->limits, false);
        g_assert_cmpint(req->offset, ==, CLUSTER);
        g_assert_cmpint(req->bytes, ==, 12 * CLUSTER);
        for (pos = 11 * CLUSTER; pos < 13 * CLUSTER; pos++) {
            bool zero = pos >= 11 * CLUSTER + ALIGN && pos < 12 * CLUSTER;

            g_assert_cmpint(byte_at(req, pos), ==, zero ? 0 : pattern(pos));
        }
        seqcache_complete(t->s, req, i == 1);
    }

    /* They are used up */
    put_two(t, 20 * CLUSTER, ALIGN);
    expect_next(t, ALIGN);
    expect_clusters(t, 2, 2);
}

FIXTURE_TEST(fill_only_up_to_the_next_run, CACHE(1, true), .fill_percent = 100)
{
    put(t, 10 * CLUSTER, 4 * CLUSTER);
    take_and_complete(t, false, 10 * CLUSTER, 4 * CLUSTER);

    /* It does not begin at its cluster's start; it is not the next one */
    put(t, CLUSTER + ALIGN, CLUSTER - ALIGN);
    put(t, 0, ALIGN);
    finish_oldest(t);
    put(t, 2 * CLUSTER, ALIGN);
    finish_oldest(t);
    take_and_complete(t, false, CLUSTER + ALIGN, CLUSTER);
    take_and_complete(t, false, 0, ALIGN);

    /* Parts of the block belong to others */
    t->limits.align = HIGH_ALIGN;
    put_two(t, 8 * CLUSTER, ALIGN);
    take_and_complete(t, false, 8 * CLUSTER, ALIGN);
    expect_clusters(t, 1, 1);
}

FIXTURE_TEST(request_keeps_to_limits, CACHE(1, false))
{
    SeqCacheRequest *req;
    int i;

    /* Clusters of this size are no neighbours in memory */
    put(t, 0, 10 * CLUSTER);
    t->limits.max_bytes = 3 * CLUSTER + CLUSTER / 2;
    expect_next(t, 3 * CLUSTER);
    take_and_complete(t, false, 0, 3 * CLUSTER);

    t->limits = default_limits;
    t->limits.max_iov = 1;
    g_assert_cmpint(seqcache_next_flush_bytes(t->s, &t->limits), >=, CLUSTER);
    req = seqcache_get_next_flush(t->s, &t->limits, false);
    g_assert_cmpint(req->niov, ==, 1);
    g_assert_cmpint(req->offset, ==, 3 * CLUSTER);
    seqcache_complete(t->s, req, false);

    t->limits = default_limits;
    t->limits.max_bytes = 1;
    for (i = 3; i < 10; i++) {
        expect_next(t, CLUSTER);
        take_and_complete(t, false, i * CLUSTER, CLUSTER);
    }
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(padding_counts_for_limits, CACHE(1, true))
{
    put(t, 0, CLUSTER + 10);
    finish_oldest(t);
    t->limits.max_bytes = CLUSTER + ALIGN - 1;
    seqcache_complete(t->s, take(t, false, 0, CLUSTER), false);
    t->limits.max_bytes = CLUSTER + ALIGN;
    seqcache_complete(t->s, take_padded(t, false, 0, CLUSTER + 10,
                                     ALIGN - 10), true);
}

/* A vector of 512-byte elements would make 1 MiB exceed any limit */
FIXTURE_TEST(neighbours_in_memory_share_an_element, CACHE_512(1))
{
    SeqCacheRequest *req;
    int i;

    put(t, 0, 2 * MIB);
    for (i = 0; i < 10; i++) {
        req = take(t, false, i * MIB, MIB);
        g_assert_cmpint(req->niov, <=, 17);
        put(t, (i + 2) * MIB, MIB);
        seqcache_complete(t->s, req, true);
    }
}

FIXTURE_TEST(unaligned_end_waits_without_hurry, CACHE_512(1))
{
    put(t, 512, 9 * 512);
    expect_next(t, 9 * 512);
    take_and_complete(t, false, 512, 7 * 512);

    /* what is left has no better end */
    seqcache_complete(t->s, take(t, false, 4096, 2 * 512), false);
    put(t, 10 * 512, 10 * 512);
    seqcache_complete(t->s, take(t, true, 4096, 12 * 512), false);
    seqcache_complete(t->s, take(t, false, 4096, 4096), false);

    /* more is to come anyway if the limit is the reason, hurry or not */
    t->limits.max_bytes = 9 * 512;
    seqcache_complete(t->s, take(t, true, 4096, 4096), true);
    take_and_complete(t, true, 8192, 4 * 512);
    expect_clusters(t, 0, 0);
}

FIXTURE_TEST(next_flush_bytes_follows_changes, CACHE(2, false))
{
    SeqCacheRequest *req;
    int64_t bytes;

    put(t, CLUSTER, 100);
    expect_next(t, 0);
    put(t, CLUSTER + 100, CLUSTER);
    expect_next(t, CLUSTER);
    put(t, 2 * CLUSTER + 100, CLUSTER);
    expect_next(t, 2 * CLUSTER);
    t->limits.max_bytes = CLUSTER;
    expect_next(t, CLUSTER);
    t->limits.max_bytes = MIB;
    expect_next(t, 2 * CLUSTER);
    finish_oldest(t);
    expect_next(t, 2 * CLUSTER + 100);

    t->limits.max_bytes = CLUSTER;
    req = take(t, false, CLUSTER, CLUSTER);
    t->limits.max_bytes = MIB;
    expect_next(t, CLUSTER + 100);
    seqcache_complete(t->s, req, false);
    expect_next(t, 2 * CLUSTER + 100);

    t->limits.max_iov = 1;
    bytes = seqcache_next_flush_bytes(t->s, &t->limits);
    req = seqcache_get_next_flush(t->s, &t->limits, false);
    g_assert_cmpint(req->bytes, ==, bytes);
    seqcache_complete(t->s, req, false);

    t->limits.max_iov = 1024;
    expect_next(t, 2 * CLUSTER + 100);
    seqcache_discard(t->s, 2 * CLUSTER, 1);
    expect_next(t, CLUSTER);
    put(t, 2 * CLUSTER, CLUSTER);
    expect_next(t, 2 * CLUSTER + 100);
    seqcache_discard(t->s, 0, INT64_MAX);

    /* the alignment matters for what was partly written */
    put(t, 0, 5000);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, 0, 5000);
    put(t, 5000, CLUSTER - 5000);
    expect_next(t, CLUSTER - 4096);
    t->limits.align = 512;
    expect_next(t, CLUSTER - 4608);
}

FIXTURE_TEST(discard_drops, CACHE(2, false))
{
    put(t, 0, 3 * CLUSTER + 100);
    discard(t, CLUSTER + 5000, 1, false);
    expect_read(t, 0, CLUSTER);
    expect_read(t, CLUSTER, 0);
    expect_read(t, 2 * CLUSTER, CLUSTER + 100);
    expect_gap(t, CLUSTER, 3 * CLUSTER, CLUSTER);
    expect_can_write(t, CLUSTER, CLUSTER, true);

    discard(t, 3 * CLUSTER, 1, false);
    expect_clusters(t, 2, 2);
    take_and_complete(t, false, 0, CLUSTER);
    take_and_complete(t, false, 2 * CLUSTER, CLUSTER);
    expect_no_request(t, true);

    put(t, 0, 5 * CLUSTER);
    discard(t, CLUSTER + 100, 2 * CLUSTER, false);
    expect_clusters(t, 2, 2);
    expect_read(t, 0, CLUSTER);
    expect_read(t, 4 * CLUSTER, CLUSTER);
    discard(t, CLUSTER, INT64_MAX - CLUSTER, false);
    expect_clusters(t, 1, 1);
}

FIXTURE_TEST(discard_of_written_open_run, CACHE(1, false))
{
    uint64_t point;

    put(t, 0, 100);
    point = seqcache_flush_point(t->s);
    take_and_complete(t, true, 0, 100);
    discard(t, 99, 1, false);
    expect_clusters(t, 0, 0);
    expect_read(t, 0, 0);
    expect_continues(t, 100, false);

    /* the new owner of the cluster begins anew */
    put(t, 50, 100);
    expect_flushed(t, point, true);
    finish_oldest(t);
    take_and_complete(t, false, 50, 100);
}

FIXTURE_TEST(drop_written, CACHE(4, false))
{
    SeqCacheStats stats;
    uint64_t point;

    /* All of it was written; a part; a part, up to the middle of a block */
    put(t, 0, 100);
    put(t, CLUSTER, 1024);
    put(t, 2 * CLUSTER, 1000);
    seqcache_flush_point(t->s);
    take_and_complete(t, true, 0, 100);
    take_and_complete(t, true, CLUSTER, 1024);
    take_and_complete(t, true, 2 * CLUSTER, 1000);
    put(t, CLUSTER + 1024, 100);
    put(t, 2 * CLUSTER + 1000, 100);
    put(t, 3 * CLUSTER, 100);

    g_assert_false(seqcache_drop_written(t->s, 2 * CLUSTER, 0, 512));
    expect_clusters(t, 4, 0);
    g_assert_false(seqcache_drop_written(t->s, 99, 2 * CLUSTER, 512));
    expect_clusters(t, 3, 2);
    expect_gap(t, 0, INT64_MAX, CLUSTER + 1024);
    expect_read(t, CLUSTER + 1024, 100);
    expect_read(t, 2 * CLUSTER + 511, 0);
    expect_read(t, 2 * CLUSTER + 512, 588);
    seqcache_get_stats(t->s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, 100 + 588 + 100);
    g_assert_cmpint(stats.bytes_finished, ==, 100 + 100);

    point = seqcache_flush_point(t->s);
    take_and_complete(t, true, CLUSTER + 1024, 100);
    take_and_complete(t, true, 2 * CLUSTER + 512, 588);
    take_and_complete(t, true, 3 * CLUSTER, 100);
    expect_flushed(t, point, true);
}

FIXTURE_TEST(discard_in_flight, CACHE(1, false))
{
    SeqCacheRequest *req;
    SeqCacheStats stats;
    uint64_t point;
    bool success = false;

    do {
        put(t, 0, 3 * CLUSTER + 100);
        point = seqcache_flush_point(t->s);
        req = take(t, true, 0, 3 * CLUSTER + 100);
        discard(t, CLUSTER, 1, true);
        discard(t, 3 * CLUSTER, INT64_MAX / 2, true);

        expect_read(t, CLUSTER, 0);
        expect_read(t, 0, CLUSTER);
        expect_gap(t, CLUSTER, 2 * CLUSTER, CLUSTER);
        expect_gap(t, 3 * CLUSTER, 100, 100);
        expect_continues(t, 3 * CLUSTER + 100, false);
        expect_can_write(t, 3 * CLUSTER + 100, 1, false);
        expect_can_write(t, CLUSTER, 1, false);
        discard(t, CLUSTER, 1, true);
        expect_clusters(t, 4, 0);
        seqcache_get_stats(t->s, &stats);
        g_assert_cmpint(stats.bytes_cached, ==, 2 * CLUSTER);
        g_assert_cmpint(stats.bytes_unwritten, ==, 2 * CLUSTER);
        expect_flushed(t, point, false);

        /* What was not discarded stays if it was not written */
        seqcache_complete(t->s, req, success);
        expect_can_write(t, CLUSTER, CLUSTER, true);
        expect_can_write(t, 3 * CLUSTER, CLUSTER, true);
        if (!success) {
            expect_clusters(t, 2, 2);
            take_and_complete(t, true, 0, CLUSTER);
            take_and_complete(t, true, 2 * CLUSTER, CLUSTER);
        }
        expect_clusters(t, 0, 0);
        expect_flushed(t, point, true);
        success = !success;
    } while (success);
}

FIXTURE_TEST(discarded_in_flight_does_not_hold_up_flush, CACHE(1, false))
{
    SeqCacheRequest *req;
    uint64_t point;

    put(t, 0, 2 * CLUSTER);
    point = seqcache_flush_point(t->s);
    req = take(t, true, 0, 2 * CLUSTER);
    discard(t, 0, 2 * CLUSTER, true);
    expect_flushed(t, point, true);
    seqcache_complete(t->s, req, false);
    expect_flushed(t, point, true);
}

FIXTURE_TEST(flush_ends_under_stream_of_writes, CACHE(2, false))
{
    uint64_t point;
    int64_t pos;
    int i;

    put(t, 100 * CLUSTER, 100);
    put(t, 0, 2 * CLUSTER + 1000);
    point = seqcache_flush_point(t->s);
    pos = 2 * CLUSTER + 1000;

    for (i = 0; !seqcache_is_flushed(t->s, point); i++) {
        SeqCacheRequest *req;

        put(t, pos, 1000);
        pos += 1000;
        req = seqcache_get_next_flush(t->s, &t->limits, true);
        g_assert_nonnull(req);
        put(t, pos, 1000);
        pos += 1000;
        seqcache_complete(t->s, req, true);
    }
    g_assert_cmpint(i, ==, 2);
    g_assert_cmpint(pos, <, 3 * CLUSTER);
    expect_no_request(t, true);
}

/* Each flush waits for what it has to, not for what the other one has to */
FIXTURE_TEST(flush_ends_under_stream_of_flushes, CACHE(1, false))
{
    uint64_t first, second, third, fourth;
    SeqCacheRequest *req;

    put(t, 0, 1000);
    first = seqcache_flush_point(t->s);
    expect_flushed(t, first, false);
    req = take(t, true, 0, 1000);
    put(t, 1000, 1000);
    second = seqcache_flush_point(t->s);
    g_assert_cmpint(first, <, second);
    expect_flushed(t, first, false);
    seqcache_complete(t->s, req, true);
    expect_flushed(t, first, true);
    expect_flushed(t, second, false);

    req = take(t, true, 0, 2000);
    put(t, 2000, 1000);
    third = seqcache_flush_point(t->s);
    seqcache_complete(t->s, req, false);
    expect_flushed(t, first, true);
    expect_flushed(t, second, false);
    req = take(t, true, 0, 3000);
    expect_flushed(t, first, true);
    expect_flushed(t, second, false);
    seqcache_complete(t->s, req, true);
    expect_flushed(t, second, true);
    expect_flushed(t, third, true);

    /* nothing new for the second of these, which is set in flight */
    put(t, 3000, 1000);
    expect_flushed(t, third, true);
    first = seqcache_flush_point(t->s);
    expect_flushed(t, third, true);
    req = take(t, true, 0, 4000);
    second = seqcache_flush_point(t->s);
    put(t, 4000, 1000);
    third = seqcache_flush_point(t->s);
    put(t, 5000, 1000);
    fourth = seqcache_flush_point(t->s);
    seqcache_complete(t->s, req, true);
    expect_flushed(t, first, true);
    expect_flushed(t, second, true);
    expect_flushed(t, third, false);
    expect_flushed(t, fourth, false);
}

FIXTURE_TEST(flush_includes_run_that_was_finished_since, CACHE(1, false))
{
    SeqCacheRequest *req;
    uint64_t point;

    put(t, 0, 1000);
    point = seqcache_flush_point(t->s);
    req = take(t, true, 0, 1000);
    put(t, 1000, CLUSTER);
    expect_flushed(t, point, false);
    seqcache_complete(t->s, req, true);
    expect_flushed(t, point, false);
    take_and_complete(t, false, 0, CLUSTER);
    expect_flushed(t, point, true);
}

FIXTURE_TEST(end_of_address_space, CACHE(1, true))
{
    int64_t offset = INT64_MAX - CLUSTER - 1000;
    SeqCacheRequest *req;

    put(t, offset, INT64_MAX - offset);
    expect_clusters(t, 2, 1);
    expect_can_write(t, INT64_MAX - 1, 1, false);
    expect_can_write(t, INT64_MAX, 0, true);
    expect_gap(t, 0, INT64_MAX, offset);
    expect_gap(t, offset - 1, INT64_MAX - offset + 1, 1);
    expect_gap(t, INT64_MAX - 1, 1, 0);
    finish_oldest(t);

    /* no address is left for the padding to end at */
    take_and_complete(t, false, offset, INT64_MAX - offset - (CLUSTER - 1));
    req = take(t, false, INT64_MAX - CLUSTER + 1, CLUSTER - 1);
    discard(t, 0, INT64_MAX, true);
    seqcache_complete(t->s, req, true);
    expect_clusters(t, 0, 0);
}

/* The memory of a cache that was large once is given back and taken again */
FIXTURE_TEST(empty_and_fill_again, CACHE(1, false))
{
    int i;

    for (i = 0; i < 3; i++) {
        put(t, i * CLUSTER, 16 * CLUSTER);
        take_and_complete(t, false, i * CLUSTER, 16 * CLUSTER);
        expect_clusters(t, 0, 0);
        put(t, i * CLUSTER, CLUSTER);
        take_and_complete(t, false, i * CLUSTER, CLUSTER);
        expect_clusters(t, 0, 0);
    }
}

FIXTURE_CASES(buffers_are_aligned,
              { .cluster_size = 512, .max_unfinished = 1 },
              { .cluster_size = 4096, .max_unfinished = 1 },
              { .cluster_size = 64 * 1024, .max_unfinished = 1 },
              { .cluster_size = 2 * MIB, .max_unfinished = 1 })
{
    SeqCacheRequest *req;

    put(t, 0, config->cluster_size);
    req = take(t, false, 0, config->cluster_size);
    g_assert_cmpint((uintptr_t)req->iov[0].iov_base %
                    qemu_real_host_page_size(), ==, 0);
    seqcache_complete(t->s, req, true);
}

#if defined(QEMU_SANITIZE_ADDRESS) || defined(QEMU_SANITIZE_THREAD)
#define USES_MORE_MEMORY true
#else
#define USES_MORE_MEMORY false
#endif

/* Bytes of memory that the process uses; 0 if that does not tell anything */
static uint64_t memory_used(void)
{
    g_autofree char *text = NULL;
    unsigned long pages;

    if (USES_MORE_MEMORY ||
        !g_file_get_contents("/proc/self/statm", &text, NULL, NULL) ||
        sscanf(text, "%*u %lu", &pages) != 1) {
        return 0;
    }
    return pages * qemu_real_host_page_size();
}

/* Scattered, so that each of them is a request, and none follows another */
FIXTURE_TEST(million_clusters, CACHE_512(16))
{
    const unsigned nb = 1000000;
    const unsigned step = 7919; /* prime to @nb, so each place comes once */
    uint64_t before = memory_used();
    uint64_t point;
    unsigned i, place;

    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        put(t, place * 1024L + i % 500, 8);
    }
    expect_clusters(t, nb, nb - 16);

    /* Each costs its buffer, and half of it for what is known about it */
    g_assert_cmpuint(memory_used(), <=, before + nb * 768UL + 16 * MIB);

    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        int64_t offset = place * 1024L + i % 500;

        expect_read(t, offset, 8);
        expect_can_write(t, offset + 4, 8, false);
        expect_gap(t, offset + 8, 512, 512);
    }
    point = seqcache_flush_point(t->s);
    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        expect_flushed(t, point, false);
        take_and_complete(t, true, place * 1024L + i % 500, 8);
    }
    expect_flushed(t, point, true);
    /* What is left are the streams */
    expect_clusters(t, 16, 0);
}

/* The same, in as few requests as there can be */
FIXTURE_TEST(million_clusters_in_order, CACHE_512(1))
{
    const int64_t bytes = 1000000 * 512L;
    g_autofree uint8_t *buf = g_malloc0(MIB);
    int64_t pos, n;

    for (pos = 0; pos < bytes; pos += n) {
        n = MIN(bytes - pos, MIB - 100);
        write_buf(t->s, pos, n, buf);
    }
    expect_clusters(t, 1000000, 1000000);
    expect_gap(t, 0, bytes + 5, 0);
    t->limits.align = 512;
    for (pos = 0; pos < bytes; pos += n) {
        SeqCacheRequest *req = seqcache_get_next_flush(t->s, &t->limits, false);

        n = MIN(bytes - pos, MIB);
        g_assert_cmpint(req->offset, ==, pos);
        g_assert_cmpint(req->bytes, ==, n);
        seqcache_complete(t->s, req, true);
    }
    expect_clusters(t, 0, 0);
}

static void test_model(void)
{
    const unsigned ops_per_cache = 2000;
    const char *env = g_getenv("SEQCACHE_OPS");
    unsigned ops = env ? g_ascii_strtoull(env, NULL, 0) : 1000000;
    g_autoptr(GRand) rand = g_rand_new_with_seed(g_test_rand_int());
    ModelInput in = { .rand = rand };
    unsigned done;

    for (done = 0; done < ops; done += ops_per_cache) {
        seqcache_model_run(&in, ops_per_cache);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/seqcache/model", test_model);
    fixture_add_tests("/seqcache");
    return g_test_run();
}
