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
#include "seqcache-model.h"

#define MIB (1024 * 1024)
#define CLUSTER (64 * 1024)
#define ALIGN 4096
#define HIGH_ALIGN (4 * CLUSTER)

static const SeqCacheLimits default_limits = {
    .align = ALIGN, .max_bytes = MIB, .max_iov = 1024,
};

static SeqCache *cache_new(unsigned max_unfinished, bool pad)
{
    return seqcache_new(&(SeqCacheOptions) {
        .cluster_size = CLUSTER,
        .max_unfinished = max_unfinished,
        .pad = pad,
    });
}

/* What the tests store at an address; never 0 */
static uint8_t pattern(int64_t offset)
{
    return 1 + offset % 251;
}

static void put(SeqCache *s, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    for (i = 0; i < bytes; i++) {
        buf[i] = pattern(offset + i);
    }
    g_assert_true(seqcache_can_write(s, offset, bytes));
    write_buf(s, offset, bytes, buf);
}

/* Expect @cached bytes from @offset on, and nothing after them */
static void expect_read(SeqCache *s, int64_t offset, int64_t cached)
{
    int64_t bytes = cached + 100;
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    g_assert_cmpint(read_buf(s, offset, bytes, buf), ==, cached);
    for (i = 0; i < cached; i++) {
        g_assert_cmpint(buf[i], ==, pattern(offset + i));
    }
}

/* Expect a request with @bytes of data, and @padding zeroes behind them */
static SeqCacheRequest *take_limits(SeqCache *s, const SeqCacheLimits *limits,
                                    bool unfinished, int64_t offset,
                                    int64_t bytes, int64_t padding)
{
    SeqCacheRequest *req = seqcache_get_next_flush(s, limits, unfinished);
    int64_t pos = offset;
    size_t k;
    int i;

    g_assert_nonnull(req);
    g_assert_cmpint(req->offset, ==, offset);
    g_assert_cmpint(req->bytes, ==, bytes + padding);
    g_assert_cmpint(req->niov, <=, limits->max_iov);
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

static SeqCacheRequest *take(SeqCache *s, bool unfinished, int64_t offset,
                             int64_t bytes)
{
    return take_limits(s, &default_limits, unfinished, offset, bytes, 0);
}

static void take_and_complete(SeqCache *s, bool unfinished, int64_t offset,
                              int64_t bytes)
{
    seqcache_complete(s, take(s, unfinished, offset, bytes), true);
}

static void expect_no_request(SeqCache *s, bool unfinished)
{
    g_assert_null(seqcache_get_next_flush(s, &default_limits, unfinished));
}

/* @finished: those of the @clusters that are finished and not in flight */
static void expect_clusters(SeqCache *s, unsigned clusters, unsigned finished)
{
    SeqCacheStats stats;

    seqcache_get_stats(s, &stats);
    g_assert_cmpint(seqcache_nb_clusters(s), ==, clusters);
    g_assert_cmpint(stats.nb_finished, ==, finished);
}

static void test_empty(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheStats stats;
    uint8_t byte = 0;

    expect_clusters(s, 0, 0);
    seqcache_get_stats(s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, 0);
    g_assert_cmpint(read_buf(s, 0, 1, &byte), ==, 0);
    g_assert_cmpint(seqcache_gap(s, 0, INT64_MAX), ==, INT64_MAX);
    g_assert_cmpint(seqcache_gap(s, 0, 0), ==, 0);
    g_assert_true(seqcache_can_write(s, 0, INT64_MAX));
    g_assert_true(seqcache_can_write(s, INT64_MAX, 0));
    g_assert_false(seqcache_continues(s, 0));
    g_assert_false(seqcache_finish_oldest(s));
    g_assert_false(seqcache_discard(s, 0, 1));
    g_assert_false(seqcache_discard(s, 0, INT64_MAX));
    g_assert_false(seqcache_discard(s, 0, 0));
    g_assert_cmpint(seqcache_next_flush_bytes(s, &default_limits), ==, 0);
    expect_no_request(s, true);
    g_assert_true(seqcache_is_flushed(s, seqcache_flush_point(s)));
    seqcache_free(s);
    seqcache_free(NULL);
}

static void test_split_at_cluster_bounds(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheStats stats;

    put(s, CLUSTER - 1, CLUSTER + 2);
    expect_clusters(s, 3, 2);
    seqcache_get_stats(s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, CLUSTER + 2);
    g_assert_cmpint(stats.bytes_finished, ==, CLUSTER + 1);
    expect_read(s, CLUSTER - 1, CLUSTER + 2);
    take_and_complete(s, false, CLUSTER - 1, CLUSTER + 1);
    expect_clusters(s, 1, 0);
    seqcache_free(s);
}

/* The original overran the buffer of the first cluster here */
static void test_full_cluster_is_finished(void)
{
    SeqCache *s = cache_new(1, false);

    put(s, 0, CLUSTER);
    expect_clusters(s, 1, 1);
    g_assert_false(seqcache_continues(s, CLUSTER));
    put(s, CLUSTER, 100);
    expect_clusters(s, 2, 1);
    expect_read(s, 0, CLUSTER + 100);
    take_and_complete(s, false, 0, CLUSTER);
    expect_read(s, CLUSTER, 100);
    seqcache_free(s);
}

static void test_filled_by_continuation_is_finished(void)
{
    SeqCache *s = cache_new(1, false);

    put(s, 10, CLUSTER - 20);
    g_assert_true(seqcache_continues(s, CLUSTER - 10));
    put(s, CLUSTER - 10, 10);
    expect_clusters(s, 1, 1);
    put(s, CLUSTER, 1);
    expect_read(s, 10, CLUSTER - 10 + 1);
    seqcache_free(s);
}

static void test_only_continuations_are_taken(void)
{
    SeqCache *s = cache_new(1, false);

    put(s, 100, 100);
    g_assert_true(seqcache_can_write(s, 200, CLUSTER));
    g_assert_true(seqcache_can_write(s, 300, 0));
    g_assert_false(seqcache_can_write(s, 0, 1));
    g_assert_false(seqcache_can_write(s, 100, 1));
    g_assert_false(seqcache_can_write(s, 199, 1));
    g_assert_false(seqcache_can_write(s, 201, 1));
    g_assert_false(seqcache_continues(s, 199));
    g_assert_false(seqcache_continues(s, 201));

    /* into a cluster that is cached, from one that is not */
    put(s, 3 * CLUSTER, 1);
    g_assert_true(seqcache_can_write(s, CLUSTER, 2 * CLUSTER));
    g_assert_false(seqcache_can_write(s, CLUSTER, 2 * CLUSTER + 1));
    g_assert_false(seqcache_can_write(s, CLUSTER, INT64_MAX - CLUSTER));

    /* left behind, not full: takes nothing more */
    expect_clusters(s, 2, 1);
    g_assert_false(seqcache_can_write(s, 200, 1));
    g_assert_false(seqcache_continues(s, 200));
    seqcache_free(s);
}

static void test_read_crosses_clusters(void)
{
    SeqCache *s = cache_new(2, false);

    put(s, 1000, 3 * CLUSTER);
    expect_read(s, 1000, 3 * CLUSTER);
    expect_read(s, CLUSTER - 1, 2 * CLUSTER + 1001);
    expect_read(s, 999, 0);
    expect_read(s, 1000 + 3 * CLUSTER, 0);

    /* ends at a cluster that begins later */
    put(s, 5 * CLUSTER - 10, 10);
    put(s, 5 * CLUSTER + 1, 10);
    expect_read(s, 5 * CLUSTER - 10, 10);
    g_assert_cmpint(seqcache_gap(s, 5 * CLUSTER, 100), ==, 1);
    g_assert_cmpint(seqcache_gap(s, 0, 100), ==, 100);
    g_assert_cmpint(seqcache_gap(s, 0, 5000), ==, 1000);
    g_assert_cmpint(seqcache_gap(s, 1000, 5000), ==, 0);
    g_assert_cmpint(seqcache_gap(s, 3 * CLUSTER + 1000, 2 * CLUSTER), ==,
                    2 * CLUSTER - 1010);
    g_assert_cmpint(seqcache_gap(s, 5 * CLUSTER + 11, INT64_MAX / 2), ==,
                    INT64_MAX / 2);
    seqcache_free(s);
}

static void test_several_streams(void)
{
    SeqCache *s = cache_new(3, false);
    int i, stream;

    for (i = 0; i < CLUSTER; i += 512) {
        for (stream = 0; stream < 3; stream++) {
            g_assert_true(!i || seqcache_continues(s, stream * 10 * CLUSTER +
                                                      i));
            put(s, stream * 10 * CLUSTER + i, 512);
        }
    }
    expect_clusters(s, 3, 3);
    for (stream = 0; stream < 3; stream++) {
        take_and_complete(s, false, stream * 10 * CLUSTER, CLUSTER);
    }
    expect_no_request(s, true);
    seqcache_free(s);
}

static void test_one_more_finishes_the_oldest(void)
{
    SeqCache *s = cache_new(2, false);

    put(s, 0, 100);
    put(s, 2 * CLUSTER, 100);
    put(s, 100, 100);
    expect_no_request(s, true);
    put(s, 4 * CLUSTER, 100);
    expect_clusters(s, 3, 1);
    g_assert_false(seqcache_continues(s, 200));
    g_assert_true(seqcache_continues(s, 2 * CLUSTER + 100));

    /* a cluster that is full at once needs no place among the unfinished */
    put(s, 8 * CLUSTER, CLUSTER);
    expect_clusters(s, 4, 2);
    g_assert_true(seqcache_continues(s, 2 * CLUSTER + 100));
    take_and_complete(s, false, 0, 200);
    take_and_complete(s, false, 8 * CLUSTER, CLUSTER);

    g_assert_true(seqcache_finish_oldest(s));
    take_and_complete(s, false, 2 * CLUSTER, 100);
    g_assert_true(seqcache_finish_oldest(s));
    take_and_complete(s, false, 4 * CLUSTER, 100);
    g_assert_false(seqcache_finish_oldest(s));
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_finish_range(void)
{
    SeqCache *s = cache_new(3, false);

    put(s, 0, 100);
    put(s, CLUSTER, 100);
    put(s, 2 * CLUSTER, 100);
    seqcache_finish(s, CLUSTER, 0);
    expect_clusters(s, 3, 0);
    seqcache_finish(s, 2 * CLUSTER - 1, 1);
    expect_clusters(s, 3, 1);
    g_assert_true(seqcache_continues(s, 100));
    g_assert_false(seqcache_continues(s, CLUSTER + 100));
    seqcache_finish(s, 0, INT64_MAX);
    expect_clusters(s, 3, 3);
    seqcache_free(s);
}

static int64_t overwrite(SeqCache *s, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int64_t i;

    for (i = 0; i < bytes; i++) {
        buf[i] = pattern(offset + i);
    }
    return overwrite_buf(s, offset, bytes, buf);
}

static void test_overwrite(void)
{
    SeqCache *s = cache_new(1, false);
    uint8_t zeroes[2 * ALIGN] = { 0 };
    SeqCacheRequest *req;
    uint64_t point;

    /* Up to the first byte that is not cached */
    write_buf(s, ALIGN, 2 * ALIGN, zeroes);
    g_assert_cmpint(overwrite(s, ALIGN - 1, 10), ==, 0);
    g_assert_cmpint(overwrite(s, ALIGN, 3 * ALIGN), ==, 2 * ALIGN);
    expect_read(s, ALIGN, 2 * ALIGN);

    /* What was written out is dirty again, but older flushes need not wait */
    point = seqcache_flush_point(s);
    take_and_complete(s, true, ALIGN, 2 * ALIGN);
    g_assert_true(seqcache_is_clean(s));
    g_assert_cmpint(overwrite(s, 2 * ALIGN, 1), ==, 1);
    g_assert_false(seqcache_is_clean(s));
    g_assert_true(seqcache_is_flushed(s, point));
    point = seqcache_flush_point(s);
    g_assert_false(seqcache_is_flushed(s, point));
    req = take(s, true, 2 * ALIGN, ALIGN);

    /* Not in flight */
    g_assert_cmpint(overwrite(s, ALIGN, 1), ==, 0);
    seqcache_complete(s, req, true);
    g_assert_true(seqcache_is_flushed(s, point));

    /* The start of a run that is about to be handed out */
    put(s, 3 * ALIGN, CLUSTER - 3 * ALIGN);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &default_limits), ==,
                    CLUSTER - 3 * ALIGN);
    g_assert_cmpint(overwrite(s, ALIGN, 1), ==, 1);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &default_limits), ==,
                    CLUSTER - ALIGN);
    take_and_complete(s, false, ALIGN, CLUSTER - ALIGN);
    g_assert_true(seqcache_is_clean(s));
    seqcache_free(s);
}

static void test_finish_of_written_run_frees_it(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;

    put(s, 0, 100);
    seqcache_flush_point(s);
    take_and_complete(s, true, 0, 100);
    expect_clusters(s, 1, 0);
    g_assert_true(seqcache_finish_oldest(s));
    expect_clusters(s, 0, 0);

    put(s, 0, 100);
    seqcache_flush_point(s);
    req = take(s, true, 0, 100);
    g_assert_true(seqcache_finish_oldest(s));
    expect_clusters(s, 1, 0);
    expect_read(s, 0, 100);
    seqcache_complete(s, req, true);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_order_is_write_order(void)
{
    SeqCache *s = cache_new(2, false);

    put(s, 50 * CLUSTER + 5, 10);
    put(s, 7 * CLUSTER, CLUSTER);
    put(s, 3 * CLUSTER, CLUSTER);
    put(s, 50 * CLUSTER + 15, CLUSTER - 15);
    put(s, 9 * CLUSTER, CLUSTER);
    put(s, 4 * CLUSTER, CLUSTER);

    take_and_complete(s, false, 50 * CLUSTER + 5, CLUSTER - 5);
    take_and_complete(s, false, 7 * CLUSTER, CLUSTER);
    take_and_complete(s, false, 3 * CLUSTER, 2 * CLUSTER);
    take_and_complete(s, false, 9 * CLUSTER, CLUSTER);
    expect_no_request(s, true);
    seqcache_free(s);
}

static void test_failed_request_is_handed_out_again(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheLimits limits = default_limits;
    SeqCacheRequest *req[4];
    int i;

    limits.max_bytes = 2 * CLUSTER;
    put(s, 8 * CLUSTER, 2 * CLUSTER);
    put(s, 0, 6 * CLUSTER);
    req[0] = take_limits(s, &limits, false, 8 * CLUSTER, 2 * CLUSTER, 0);
    for (i = 0; i < 2; i++) {
        req[i + 1] = take_limits(s, &limits, false, 2 * i * CLUSTER,
                                 2 * CLUSTER, 0);
    }
    put(s, 20 * CLUSTER, CLUSTER);

    /* in any order of completion */
    seqcache_complete(s, req[1], false);
    seqcache_complete(s, req[2], false);
    seqcache_complete(s, req[0], false);
    expect_read(s, 8 * CLUSTER, 2 * CLUSTER);
    expect_read(s, 0, 6 * CLUSTER);

    take_and_complete(s, false, 8 * CLUSTER, 2 * CLUSTER);
    take_and_complete(s, false, 0, 6 * CLUSTER);
    take_and_complete(s, false, 20 * CLUSTER, CLUSTER);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_failed_unfinished_run_is_handed_out_again(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;
    uint64_t point;

    put(s, 0, 5000);
    point = seqcache_flush_point(s);
    req = take(s, true, 0, 5000);
    put(s, 5000, 100);
    seqcache_complete(s, req, false);
    g_assert_false(seqcache_is_flushed(s, point));
    take_and_complete(s, true, 0, 5000);
    g_assert_true(seqcache_is_flushed(s, point));
    seqcache_free(s);
}

static void test_unfinished_run_is_written_once(void)
{
    SeqCache *s = cache_new(1, true);

    put(s, 100, 5000);
    expect_no_request(s, true);
    seqcache_flush_point(s);
    expect_no_request(s, false);
    take_and_complete(s, true, 100, 5000);
    expect_no_request(s, true);
    seqcache_flush_point(s);
    expect_no_request(s, true);
    g_assert_true(seqcache_continues(s, 5100));

    /* only what is new, from the block on that it begins in */
    put(s, 5100, 5000);
    expect_no_request(s, true);
    seqcache_flush_point(s);
    take_and_complete(s, true, 4096, 6004);

    /* also when it is finished */
    put(s, 10100, CLUSTER - 10100);
    take_and_complete(s, false, 8192, CLUSTER - 8192);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_rest_of_run_stays_inside_run(void)
{
    SeqCache *s = cache_new(1, false);

    put(s, ALIGN + 100, 10);
    seqcache_flush_point(s);
    take_and_complete(s, true, ALIGN + 100, 10);
    put(s, ALIGN + 110, 10);
    seqcache_flush_point(s);
    take_and_complete(s, true, ALIGN + 100, 20);
    put(s, ALIGN + 120, ALIGN);
    g_assert_true(seqcache_finish_oldest(s));
    take_and_complete(s, false, ALIGN + 100, ALIGN + 20);
    seqcache_free(s);
}

static void test_unfinished_in_flight_is_continued(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;

    put(s, 0, 5000);
    seqcache_flush_point(s);
    req = take(s, true, 0, 5000);
    put(s, 5000, CLUSTER - 5000);
    expect_clusters(s, 1, 0);
    expect_no_request(s, false);
    g_assert_cmpint(req->bytes, ==, 5000);
    g_assert_cmpint(req->iov[0].iov_len, ==, 5000);
    seqcache_complete(s, req, true);
    expect_read(s, 0, CLUSTER);
    take_and_complete(s, false, 4096, CLUSTER - 4096);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_unfinished_is_last_in_request(void)
{
    SeqCache *s = cache_new(2, false);

    put(s, 0, 2 * CLUSTER + 100);
    seqcache_flush_point(s);
    put(s, 2 * CLUSTER + 100, 100);
    take_and_complete(s, true, 0, 2 * CLUSTER + 100);

    /* a cluster that begins later, or was partly written, is the first */
    put(s, 2 * CLUSTER + 200, 2 * CLUSTER);
    take_and_complete(s, false, 2 * CLUSTER, 2 * CLUSTER);
    put(s, 6 * CLUSTER - 100, 100);
    put(s, 6 * CLUSTER + 1, CLUSTER);
    take_and_complete(s, false, 6 * CLUSTER - 100, 100);
    take_and_complete(s, false, 6 * CLUSTER + 1, CLUSTER - 1);
    seqcache_free(s);
}

static void test_padding_is_zero(void)
{
    SeqCache *s = cache_new(1, true);
    SeqCacheRequest *req;
    int i;

    /* Let the buffers have other contents */
    for (i = 0; i < 4; i++) {
        put(s, i * CLUSTER, CLUSTER);
    }
    take_and_complete(s, false, 0, 4 * CLUSTER);

    for (i = 0; i < 4; i++) {
        put(s, 2 * i * CLUSTER, 2 * CLUSTER - 5000);
        g_assert_true(seqcache_finish_oldest(s));
        g_assert_cmpint(seqcache_next_flush_bytes(s, &default_limits), ==,
                        2 * CLUSTER - 5000);
        req = take_limits(s, &default_limits, i % 2, 2 * i * CLUSTER,
                          2 * CLUSTER - 5000, 904);
        expect_read(s, 2 * i * CLUSTER, 2 * CLUSTER - 5000);
        seqcache_complete(s, req, true);
    }
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_padding_only_if_allowed(void)
{
    SeqCache *s = cache_new(1, false);

    put(s, 0, 100);
    g_assert_true(seqcache_finish_oldest(s));
    take_and_complete(s, false, 0, 100);
    seqcache_free(s);
}

static void test_padding_never_for_unfinished(void)
{
    SeqCache *s = cache_new(1, true);
    SeqCacheRequest *req;

    put(s, 0, 100);
    seqcache_flush_point(s);
    req = take(s, true, 0, 100);

    /* not even if it is finished then */
    g_assert_true(seqcache_finish_oldest(s));
    g_assert_cmpint(req->bytes, ==, 100);
    seqcache_complete(s, req, true);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_padding_never_leaves_cluster(void)
{
    SeqCache *s = cache_new(1, true);
    SeqCacheLimits limits = default_limits;
    SeqCacheRequest *req;

    put(s, 0, CLUSTER - 1);
    g_assert_true(seqcache_finish_oldest(s));
    limits.align = CLUSTER;
    req = take_limits(s, &limits, false, 0, CLUSTER - 1, 1);
    seqcache_complete(s, req, false);

    /* Parts of the block belong to others when it is larger than a cluster */
    limits.align = HIGH_ALIGN;
    req = take_limits(s, &limits, false, 0, CLUSTER - 1, 0);
    seqcache_complete(s, req, true);

    put(s, HIGH_ALIGN - CLUSTER, CLUSTER - 1);
    g_assert_true(seqcache_finish_oldest(s));
    req = take_limits(s, &limits, false, HIGH_ALIGN - CLUSTER, CLUSTER - 1, 0);
    seqcache_complete(s, req, true);
    seqcache_free(s);
}

static void test_request_keeps_to_limits(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheLimits limits = default_limits;
    SeqCacheRequest *req;
    int i;

    /* Clusters of this size are no neighbours in memory */
    put(s, 0, 10 * CLUSTER);
    limits.max_bytes = 3 * CLUSTER + CLUSTER / 2;
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, 3 * CLUSTER);
    req = take_limits(s, &limits, false, 0, 3 * CLUSTER, 0);
    seqcache_complete(s, req, true);

    limits = default_limits;
    limits.max_iov = 1;
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), >=, CLUSTER);
    req = seqcache_get_next_flush(s, &limits, false);
    g_assert_cmpint(req->niov, ==, 1);
    g_assert_cmpint(req->offset, ==, 3 * CLUSTER);
    seqcache_complete(s, req, false);

    limits = default_limits;
    limits.max_bytes = 1;
    for (i = 3; i < 10; i++) {
        g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER);
        req = take_limits(s, &limits, false, i * CLUSTER, CLUSTER, 0);
        seqcache_complete(s, req, true);
    }
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_padding_counts_for_limits(void)
{
    SeqCache *s = cache_new(1, true);
    SeqCacheLimits limits = default_limits;

    put(s, 0, CLUSTER + 10);
    g_assert_true(seqcache_finish_oldest(s));
    limits.max_bytes = CLUSTER + ALIGN - 1;
    seqcache_complete(s, take_limits(s, &limits, false, 0, CLUSTER, 0), false);
    limits.max_bytes = CLUSTER + ALIGN;
    seqcache_complete(s, take_limits(s, &limits, false, 0, CLUSTER + 10,
                                     ALIGN - 10), true);
    seqcache_free(s);
}

/* A vector of 512-byte elements would make 1 MiB exceed any limit */
static void test_neighbours_in_memory_share_an_element(void)
{
    SeqCacheOptions opts = { .cluster_size = 512, .max_unfinished = 1 };
    SeqCache *s = seqcache_new(&opts);
    SeqCacheRequest *req;
    int i;

    put(s, 0, 2 * MIB);
    for (i = 0; i < 10; i++) {
        req = take(s, false, i * MIB, MIB);
        g_assert_cmpint(req->niov, <=, 17);
        put(s, (i + 2) * MIB, MIB);
        seqcache_complete(s, req, true);
    }
    seqcache_free(s);
}

static void test_unaligned_end_waits_without_hurry(void)
{
    SeqCacheOptions opts = { .cluster_size = 512, .max_unfinished = 1 };
    SeqCache *s = seqcache_new(&opts);
    SeqCacheLimits limits = default_limits;

    put(s, 512, 9 * 512);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, 9 * 512);
    take_and_complete(s, false, 512, 7 * 512);

    /* what is left has no better end */
    seqcache_complete(s, take(s, false, 4096, 2 * 512), false);
    put(s, 10 * 512, 10 * 512);
    seqcache_complete(s, take(s, true, 4096, 12 * 512), false);
    seqcache_complete(s, take(s, false, 4096, 4096), false);

    /* more is to come anyway if the limit is the reason, hurry or not */
    limits.max_bytes = 9 * 512;
    seqcache_complete(s, take_limits(s, &limits, true, 4096, 4096, 0), true);
    take_and_complete(s, true, 8192, 4 * 512);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

static void test_next_flush_bytes_follows_changes(void)
{
    SeqCache *s = cache_new(2, false);
    SeqCacheLimits limits = default_limits, other = default_limits;
    SeqCacheRequest *req;
    int64_t bytes;

    other.max_bytes = CLUSTER;
    put(s, CLUSTER, 100);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, 0);
    put(s, CLUSTER + 100, CLUSTER);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER);
    put(s, 2 * CLUSTER + 100, CLUSTER);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, 2 * CLUSTER);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &other), ==, CLUSTER);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, 2 * CLUSTER);
    g_assert_true(seqcache_finish_oldest(s));
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==,
                    2 * CLUSTER + 100);

    req = take_limits(s, &other, false, CLUSTER, CLUSTER, 0);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER + 100);
    seqcache_complete(s, req, false);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==,
                    2 * CLUSTER + 100);

    other = limits;
    other.max_iov = 1;
    bytes = seqcache_next_flush_bytes(s, &other);
    req = seqcache_get_next_flush(s, &other, false);
    g_assert_cmpint(req->bytes, ==, bytes);
    seqcache_complete(s, req, false);

    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==,
                    2 * CLUSTER + 100);
    seqcache_discard(s, 2 * CLUSTER, 1);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER);
    put(s, 2 * CLUSTER, CLUSTER);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==,
                    2 * CLUSTER + 100);
    seqcache_discard(s, 0, INT64_MAX);

    /* the alignment matters for what was partly written */
    put(s, 0, 5000);
    seqcache_flush_point(s);
    take_and_complete(s, true, 0, 5000);
    put(s, 5000, CLUSTER - 5000);
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER - 4096);
    limits.align = 512;
    g_assert_cmpint(seqcache_next_flush_bytes(s, &limits), ==, CLUSTER - 4608);
    seqcache_free(s);
}

static void test_discard_drops(void)
{
    SeqCache *s = cache_new(2, false);

    put(s, 0, 3 * CLUSTER + 100);
    g_assert_false(seqcache_discard(s, CLUSTER + 5000, 1));
    expect_read(s, 0, CLUSTER);
    expect_read(s, CLUSTER, 0);
    expect_read(s, 2 * CLUSTER, CLUSTER + 100);
    g_assert_cmpint(seqcache_gap(s, CLUSTER, 3 * CLUSTER), ==, CLUSTER);
    g_assert_true(seqcache_can_write(s, CLUSTER, CLUSTER));

    g_assert_false(seqcache_discard(s, 3 * CLUSTER, 1));
    expect_clusters(s, 2, 2);
    take_and_complete(s, false, 0, CLUSTER);
    take_and_complete(s, false, 2 * CLUSTER, CLUSTER);
    expect_no_request(s, true);

    put(s, 0, 5 * CLUSTER);
    g_assert_false(seqcache_discard(s, CLUSTER + 100, 2 * CLUSTER));
    expect_clusters(s, 2, 2);
    expect_read(s, 0, CLUSTER);
    expect_read(s, 4 * CLUSTER, CLUSTER);
    g_assert_false(seqcache_discard(s, CLUSTER, INT64_MAX - CLUSTER));
    expect_clusters(s, 1, 1);
    seqcache_free(s);
}

static void test_discard_of_written_open_run(void)
{
    SeqCache *s = cache_new(1, false);
    uint64_t point;

    put(s, 0, 100);
    point = seqcache_flush_point(s);
    take_and_complete(s, true, 0, 100);
    g_assert_false(seqcache_discard(s, 99, 1));
    expect_clusters(s, 0, 0);
    expect_read(s, 0, 0);
    g_assert_false(seqcache_continues(s, 100));

    /* the new owner of the cluster begins anew */
    put(s, 50, 100);
    g_assert_true(seqcache_is_flushed(s, point));
    g_assert_true(seqcache_finish_oldest(s));
    take_and_complete(s, false, 50, 100);
    seqcache_free(s);
}

static void test_drop_written(void)
{
    SeqCache *s = cache_new(4, false);
    SeqCacheStats stats;
    uint64_t point;

    /* All of it was written; a part; a part, up to the middle of a block */
    put(s, 0, 100);
    put(s, CLUSTER, 1024);
    put(s, 2 * CLUSTER, 1000);
    seqcache_flush_point(s);
    take_and_complete(s, true, 0, 100);
    take_and_complete(s, true, CLUSTER, 1024);
    take_and_complete(s, true, 2 * CLUSTER, 1000);
    put(s, CLUSTER + 1024, 100);
    put(s, 2 * CLUSTER + 1000, 100);
    put(s, 3 * CLUSTER, 100);

    g_assert_false(seqcache_drop_written(s, 2 * CLUSTER, 0, 512));
    expect_clusters(s, 4, 0);
    g_assert_false(seqcache_drop_written(s, 99, 2 * CLUSTER, 512));
    expect_clusters(s, 3, 2);
    g_assert_cmpint(seqcache_gap(s, 0, INT64_MAX), ==, CLUSTER + 1024);
    expect_read(s, CLUSTER + 1024, 100);
    expect_read(s, 2 * CLUSTER + 511, 0);
    expect_read(s, 2 * CLUSTER + 512, 588);
    seqcache_get_stats(s, &stats);
    g_assert_cmpint(stats.bytes_cached, ==, 100 + 588 + 100);
    g_assert_cmpint(stats.bytes_finished, ==, 100 + 100);

    point = seqcache_flush_point(s);
    take_and_complete(s, true, CLUSTER + 1024, 100);
    take_and_complete(s, true, 2 * CLUSTER + 512, 588);
    take_and_complete(s, true, 3 * CLUSTER, 100);
    g_assert_true(seqcache_is_flushed(s, point));
    seqcache_free(s);
}

static void test_discard_in_flight(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;
    SeqCacheStats stats;
    uint64_t point;
    bool success = false;

    do {
        put(s, 0, 3 * CLUSTER + 100);
        point = seqcache_flush_point(s);
        req = take(s, true, 0, 3 * CLUSTER + 100);
        g_assert_true(seqcache_discard(s, CLUSTER, 1));
        g_assert_true(seqcache_discard(s, 3 * CLUSTER, INT64_MAX / 2));

        expect_read(s, CLUSTER, 0);
        expect_read(s, 0, CLUSTER);
        g_assert_cmpint(seqcache_gap(s, CLUSTER, 2 * CLUSTER), ==, CLUSTER);
        g_assert_cmpint(seqcache_gap(s, 3 * CLUSTER, 100), ==, 100);
        g_assert_false(seqcache_continues(s, 3 * CLUSTER + 100));
        g_assert_false(seqcache_can_write(s, 3 * CLUSTER + 100, 1));
        g_assert_false(seqcache_can_write(s, CLUSTER, 1));
        g_assert_true(seqcache_discard(s, CLUSTER, 1));
        expect_clusters(s, 4, 0);
        seqcache_get_stats(s, &stats);
        g_assert_cmpint(stats.bytes_cached, ==, 2 * CLUSTER);
        g_assert_cmpint(stats.bytes_unwritten, ==, 2 * CLUSTER);
        g_assert_false(seqcache_is_flushed(s, point));

        /* What was not discarded stays if it was not written */
        seqcache_complete(s, req, success);
        g_assert_true(seqcache_can_write(s, CLUSTER, CLUSTER));
        g_assert_true(seqcache_can_write(s, 3 * CLUSTER, CLUSTER));
        if (!success) {
            expect_clusters(s, 2, 2);
            take_and_complete(s, true, 0, CLUSTER);
            take_and_complete(s, true, 2 * CLUSTER, CLUSTER);
        }
        expect_clusters(s, 0, 0);
        g_assert_true(seqcache_is_flushed(s, point));
        success = !success;
    } while (success);
    seqcache_free(s);
}

static void test_discarded_in_flight_does_not_hold_up_flush(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;
    uint64_t point;

    put(s, 0, 2 * CLUSTER);
    point = seqcache_flush_point(s);
    req = take(s, true, 0, 2 * CLUSTER);
    g_assert_true(seqcache_discard(s, 0, 2 * CLUSTER));
    g_assert_true(seqcache_is_flushed(s, point));
    seqcache_complete(s, req, false);
    g_assert_true(seqcache_is_flushed(s, point));
    seqcache_free(s);
}

static void test_flush_ends_under_stream_of_writes(void)
{
    SeqCache *s = cache_new(2, false);
    uint64_t point;
    int64_t pos;
    int i;

    put(s, 100 * CLUSTER, 100);
    put(s, 0, 2 * CLUSTER + 1000);
    point = seqcache_flush_point(s);
    pos = 2 * CLUSTER + 1000;

    for (i = 0; !seqcache_is_flushed(s, point); i++) {
        SeqCacheRequest *req;

        put(s, pos, 1000);
        pos += 1000;
        req = seqcache_get_next_flush(s, &default_limits, true);
        g_assert_nonnull(req);
        put(s, pos, 1000);
        pos += 1000;
        seqcache_complete(s, req, true);
    }
    g_assert_cmpint(i, ==, 2);
    g_assert_cmpint(pos, <, 3 * CLUSTER);
    expect_no_request(s, true);
    seqcache_free(s);
}

/* Each flush waits for what it has to, not for what the other one has to */
static void test_flush_ends_under_stream_of_flushes(void)
{
    SeqCache *s = cache_new(1, false);
    uint64_t first, second, third, fourth;
    SeqCacheRequest *req;

    put(s, 0, 1000);
    first = seqcache_flush_point(s);
    g_assert_false(seqcache_is_flushed(s, first));
    req = take(s, true, 0, 1000);
    put(s, 1000, 1000);
    second = seqcache_flush_point(s);
    g_assert_cmpint(first, <, second);
    g_assert_false(seqcache_is_flushed(s, first));
    seqcache_complete(s, req, true);
    g_assert_true(seqcache_is_flushed(s, first));
    g_assert_false(seqcache_is_flushed(s, second));

    req = take(s, true, 0, 2000);
    put(s, 2000, 1000);
    third = seqcache_flush_point(s);
    seqcache_complete(s, req, false);
    g_assert_true(seqcache_is_flushed(s, first));
    g_assert_false(seqcache_is_flushed(s, second));
    req = take(s, true, 0, 3000);
    g_assert_true(seqcache_is_flushed(s, first));
    g_assert_false(seqcache_is_flushed(s, second));
    seqcache_complete(s, req, true);
    g_assert_true(seqcache_is_flushed(s, second));
    g_assert_true(seqcache_is_flushed(s, third));

    /* nothing new for the second of these, which is set in flight */
    put(s, 3000, 1000);
    g_assert_true(seqcache_is_flushed(s, third));
    first = seqcache_flush_point(s);
    g_assert_true(seqcache_is_flushed(s, third));
    req = take(s, true, 0, 4000);
    second = seqcache_flush_point(s);
    put(s, 4000, 1000);
    third = seqcache_flush_point(s);
    put(s, 5000, 1000);
    fourth = seqcache_flush_point(s);
    seqcache_complete(s, req, true);
    g_assert_true(seqcache_is_flushed(s, first));
    g_assert_true(seqcache_is_flushed(s, second));
    g_assert_false(seqcache_is_flushed(s, third));
    g_assert_false(seqcache_is_flushed(s, fourth));
    seqcache_free(s);
}

static void test_flush_includes_run_that_was_finished_since(void)
{
    SeqCache *s = cache_new(1, false);
    SeqCacheRequest *req;
    uint64_t point;

    put(s, 0, 1000);
    point = seqcache_flush_point(s);
    req = take(s, true, 0, 1000);
    put(s, 1000, CLUSTER);
    g_assert_false(seqcache_is_flushed(s, point));
    seqcache_complete(s, req, true);
    g_assert_false(seqcache_is_flushed(s, point));
    take_and_complete(s, false, 0, CLUSTER);
    g_assert_true(seqcache_is_flushed(s, point));
    seqcache_free(s);
}

static void test_end_of_address_space(void)
{
    SeqCache *s = cache_new(1, true);
    int64_t offset = INT64_MAX - CLUSTER - 1000;
    SeqCacheRequest *req;

    put(s, offset, INT64_MAX - offset);
    expect_clusters(s, 2, 1);
    g_assert_false(seqcache_can_write(s, INT64_MAX - 1, 1));
    g_assert_true(seqcache_can_write(s, INT64_MAX, 0));
    g_assert_cmpint(seqcache_gap(s, 0, INT64_MAX), ==, offset);
    g_assert_cmpint(seqcache_gap(s, offset - 1, INT64_MAX - offset + 1), ==, 1);
    g_assert_cmpint(seqcache_gap(s, INT64_MAX - 1, 1), ==, 0);
    g_assert_true(seqcache_finish_oldest(s));

    /* no address is left for the padding to end at */
    req = take(s, false, offset, INT64_MAX - offset - (CLUSTER - 1));
    seqcache_complete(s, req, true);
    req = take(s, false, INT64_MAX - CLUSTER + 1, CLUSTER - 1);
    g_assert_true(seqcache_discard(s, 0, INT64_MAX));
    seqcache_complete(s, req, true);
    expect_clusters(s, 0, 0);
    seqcache_free(s);
}

/* The memory of a cache that was large once is given back and taken again */
static void test_empty_and_fill_again(void)
{
    SeqCache *s = cache_new(1, false);
    int i;

    for (i = 0; i < 3; i++) {
        put(s, i * CLUSTER, 16 * CLUSTER);
        take_and_complete(s, false, i * CLUSTER, 16 * CLUSTER);
        expect_clusters(s, 0, 0);
        put(s, i * CLUSTER, CLUSTER);
        take_and_complete(s, false, i * CLUSTER, CLUSTER);
        expect_clusters(s, 0, 0);
    }
    seqcache_free(s);
}

static void test_buffers_are_aligned(void)
{
    SeqCacheOptions opts = { .cluster_size = 512, .max_unfinished = 1 };
    SeqCacheRequest *req;
    SeqCache *s;

    while (opts.cluster_size <= 2 * MIB) {
        s = seqcache_new(&opts);
        put(s, 0, opts.cluster_size);
        req = take(s, false, 0, opts.cluster_size);
        g_assert_cmpint((uintptr_t)req->iov[0].iov_base %
                        qemu_real_host_page_size(), ==, 0);
        seqcache_complete(s, req, true);
        seqcache_free(s);
        opts.cluster_size *= 2;
    }
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
static void test_million_clusters(void)
{
    const unsigned nb = 1000000;
    const SeqCacheOptions opts = { .cluster_size = 512, .max_unfinished = 16 };
    const unsigned step = 7919; /* prime to @nb, so each place comes once */
    uint64_t before = memory_used();
    SeqCache *s = seqcache_new(&opts);
    uint64_t point;
    unsigned i, place;

    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        put(s, place * 1024L + i % 500, 8);
    }
    expect_clusters(s, nb, nb - 16);

    /* Each costs its buffer, and half of it for what is known about it */
    g_assert_cmpuint(memory_used(), <=, before + nb * 768UL + 16 * MIB);

    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        int64_t offset = place * 1024L + i % 500;

        expect_read(s, offset, 8);
        g_assert_false(seqcache_can_write(s, offset + 4, 8));
        g_assert_cmpint(seqcache_gap(s, offset + 8, 512), ==, 512);
    }
    point = seqcache_flush_point(s);
    for (i = 0, place = 0; i < nb; i++, place = (place + step) % nb) {
        g_assert_false(seqcache_is_flushed(s, point));
        take_and_complete(s, true, place * 1024L + i % 500, 8);
    }
    g_assert_true(seqcache_is_flushed(s, point));
    /* What is left are the streams */
    expect_clusters(s, 16, 0);
    seqcache_free(s);
}

/* The same, in as few requests as there can be */
static void test_million_clusters_in_order(void)
{
    const int64_t bytes = 1000000 * 512L;
    const SeqCacheOptions opts = { .cluster_size = 512, .max_unfinished = 1 };
    const SeqCacheLimits limits = {
        .align = 512, .max_bytes = MIB, .max_iov = 1024,
    };
    g_autofree uint8_t *buf = g_malloc0(MIB);
    SeqCache *s = seqcache_new(&opts);
    SeqCacheRequest *req;
    int64_t pos, n;

    for (pos = 0; pos < bytes; pos += n) {
        n = MIN(bytes - pos, MIB - 100);
        write_buf(s, pos, n, buf);
    }
    expect_clusters(s, 1000000, 1000000);
    g_assert_cmpint(seqcache_gap(s, 0, bytes + 5), ==, 0);
    for (pos = 0; pos < bytes; pos += n) {
        n = MIN(bytes - pos, MIB);
        req = seqcache_get_next_flush(s, &limits, false);
        g_assert_cmpint(req->offset, ==, pos);
        g_assert_cmpint(req->bytes, ==, n);
        seqcache_complete(s, req, true);
    }
    expect_clusters(s, 0, 0);
    seqcache_free(s);
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

#define TEST(path, func) g_test_add_func("/seqcache/" path, func)

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    TEST("empty", test_empty);
    TEST("million-clusters", test_million_clusters);
    TEST("million-clusters-in-order", test_million_clusters_in_order);
    TEST("write/split-at-cluster-bounds", test_split_at_cluster_bounds);
    TEST("write/full-cluster-is-finished", test_full_cluster_is_finished);
    TEST("write/filled-by-continuation-is-finished",
         test_filled_by_continuation_is_finished);
    TEST("write/only-continuations-are-taken",
         test_only_continuations_are_taken);
    TEST("write/several-streams", test_several_streams);
    TEST("write/one-more-finishes-the-oldest",
         test_one_more_finishes_the_oldest);
    TEST("write/finish-range", test_finish_range);
    TEST("write/overwrite", test_overwrite);
    TEST("write/finish-of-written-run-frees-it",
         test_finish_of_written_run_frees_it);
    TEST("write/end-of-address-space", test_end_of_address_space);
    TEST("read/crosses-clusters", test_read_crosses_clusters);
    TEST("request/order-is-write-order", test_order_is_write_order);
    TEST("request/failed-is-handed-out-again",
         test_failed_request_is_handed_out_again);
    TEST("request/failed-unfinished-run-is-handed-out-again",
         test_failed_unfinished_run_is_handed_out_again);
    TEST("request/unfinished-run-is-written-once",
         test_unfinished_run_is_written_once);
    TEST("request/rest-of-run-stays-inside-run",
         test_rest_of_run_stays_inside_run);
    TEST("request/unfinished-in-flight-is-continued",
         test_unfinished_in_flight_is_continued);
    TEST("request/unfinished-is-last", test_unfinished_is_last_in_request);
    TEST("request/keeps-to-limits", test_request_keeps_to_limits);
    TEST("request/neighbours-in-memory-share-an-element",
         test_neighbours_in_memory_share_an_element);
    TEST("request/unaligned-end-waits-without-hurry",
         test_unaligned_end_waits_without_hurry);
    TEST("request/next-flush-bytes-follows-changes",
         test_next_flush_bytes_follows_changes);
    TEST("padding/is-zero", test_padding_is_zero);
    TEST("padding/only-if-allowed", test_padding_only_if_allowed);
    TEST("padding/never-for-unfinished", test_padding_never_for_unfinished);
    TEST("padding/never-leaves-cluster", test_padding_never_leaves_cluster);
    TEST("padding/counts-for-limits", test_padding_counts_for_limits);
    TEST("discard/drops", test_discard_drops);
    TEST("discard/written-open-run", test_discard_of_written_open_run);
    TEST("discard/drop-written", test_drop_written);
    TEST("discard/in-flight", test_discard_in_flight);
    TEST("discard/in-flight-does-not-hold-up-flush",
         test_discarded_in_flight_does_not_hold_up_flush);
    TEST("flush/ends-under-stream-of-writes",
         test_flush_ends_under_stream_of_writes);
    TEST("flush/ends-under-stream-of-flushes",
         test_flush_ends_under_stream_of_flushes);
    TEST("flush/includes-run-that-was-finished-since",
         test_flush_includes_run_that_was_finished_since);
    TEST("memory/empty-and-fill-again", test_empty_and_fill_again);
    TEST("memory/buffers-are-aligned", test_buffers_are_aligned);
    TEST("model", test_model);

    return g_test_run();
}
