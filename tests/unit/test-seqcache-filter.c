/*
 * Tests of the seqcache filter
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each callback of the driver is called while data is cached, and what then
 * reaches the disk, and what reads back, is compared with what there would be
 * without a cache.
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "iothread.h"
#include "fixture.h"
#include "seqcache-test.h"

typedef SeqCacheTest Test;

typedef struct TestConfig {
    SeqCacheConfig filter;
    bool around;    /* see cache_around() */
    int param;      /* what differs between the cases of one test */
} TestConfig;

#define FILTER(cluster_size_, cache_size_, align_, ...)                 \
    .filter = {                                                         \
        .cluster_size = cluster_size_, .cache_size = cache_size_,       \
        .disk = { .align = align_, .len = 512 * KiB, __VA_ARGS__ },     \
    }
#define PLAIN(align_) FILTER(64 * KiB, 1 * MiB, align_)
#define SMALL(...) FILTER(4 * KiB, 64 * KiB, 512, __VA_ARGS__)

/* ---- Requests ---- */

/* A write of recognisable data; may go on in the background */
typedef struct TestWrite {
    Test *t;
    int64_t offset;
    int64_t bytes;
    BdrvRequestFlags flags;
    int ret; /* -EINPROGRESS until it is done */
    uint8_t *buf;
} TestWrite;

static void coroutine_fn write_entry(void *opaque)
{
    TestWrite *w = opaque;
    int ret = blk_co_pwrite(w->t->blk, w->offset, w->bytes, w->buf, w->flags);

    qatomic_store_release(&w->ret, ret);
    aio_wait_kick();
}

static TestWrite *write_start(Test *t, AioContext *ctx, int64_t offset,
                              int64_t bytes, BdrvRequestFlags flags)
{
    static unsigned gen;
    TestWrite *w = g_new(TestWrite, 1);
    int64_t i;

    *w = (TestWrite) {
        .t = t, .offset = offset, .bytes = bytes, .flags = flags,
        .ret = -EINPROGRESS, .buf = g_malloc(bytes),
    };
    gen++;
    for (i = 0; i < bytes; i++) {
        w->buf[i] = ((offset + i) * 7 + ((offset + i) >> 8) * 13 +
                     gen * 29) | 1;
    }
    aio_co_enter(ctx, qemu_coroutine_create(write_entry, w));
    return w;
}

static bool write_is_done(TestWrite *w)
{
    return qatomic_load_acquire(&w->ret) != -EINPROGRESS;
}

static int write_finish(TestWrite *w)
{
    int ret;

    AIO_WAIT_WHILE_UNLOCKED(NULL, !write_is_done(w));
    ret = w->ret;
    if (ret == 0) {
        memcpy(w->t->shadow + w->offset, w->buf, w->bytes);
    }
    g_free(w->buf);
    g_free(w);
    return ret;
}

static int write_flags(Test *t, int64_t offset, int64_t bytes,
                       BdrvRequestFlags flags)
{
    return write_finish(write_start(t, qemu_get_aio_context(), offset, bytes,
                                    flags));
}

static void write_ok(Test *t, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(write_flags(t, offset, bytes, 0), ==, 0);
}

/* Write a range in sequential pieces */
static void stream_ok(Test *t, int64_t offset, int64_t bytes,
                      int64_t piece)
{
    int64_t i;

    for (i = 0; i < bytes; i += piece) {
        write_ok(t, offset + i, MIN(piece, bytes - i));
    }
}

/* Cached: 600 bytes around each end of [8 KiB, 24 KiB), and some inside */
static void cache_around(Test *t)
{
    stream_ok(t, 8 * KiB - 300, 600, 100);
    stream_ok(t, 12 * KiB + 100, 600, 100);
    stream_ok(t, 24 * KiB - 300, 600, 100);
    g_assert_cmpint(seqcache_stats(t).cached_bytes, ==, 1800);
}

static void set_up(Test *t, const TestConfig *config)
{
    seqcache_set_up(t, &config->filter);
    if (config->around) {
        write_ok(t, 0, 64 * KiB);
        cache_around(t);
        disk_reset_counts(t->disk);
    }
}

static void tear_down(Test *t, const TestConfig *config)
{
    if (!t->unchecked) {
        check_all(t);
    }
    seqcache_tear_down(t);
}

/* ---- Writes and reads ---- */

FIXTURE_TEST(merge, PLAIN(512))
{
    /* Nobody above needs to complete blocks of the disk */
    g_assert_cmpuint(t->bs->bl.request_alignment, ==, 1);
    stream_ok(t, 100, 190000, 700);
    assert_nb(t, writes, 0);
    assert_nb(t, reads, 0);
    check_all(t);
    assert_nb(t, writes, 1);
    /* Goes on after the flush */
    stream_ok(t, 190100, 5000, 700);
    assert_nb(t, writes, 1);
}

FIXTURE_TEST(direct, PLAIN(512))
{
    TestWrite *w;
    int i;

    /* Random aligned ones */
    for (i = 0; i < 20; i++) {
        write_ok(t, (i * 37 % 20) * 8192, 4096);
        assert_nb(t, writes, i + 1);
    }
    /* Large aligned ones, without a copy, also when they follow each other */
    for (i = 0; i < 3; i++) {
        w = write_start(t, qemu_get_aio_context(), 200 * KiB + i * 64 * KiB,
                        64 * KiB, 0);
        g_assert(t->disk->last_write == w->buf);
        g_assert_cmpint(write_finish(w), ==, 0);
    }
    assert_nb(t, writes, 23);
    assert_nb(t, reads, 0);
    g_assert_cmpint(seqcache_stats(t).cached_bytes, ==, 0);

    /* What starts where one of them has ended is a stream */
    write_ok(t, 4096, 512);
    write_ok(t, 392 * KiB, 512);
    assert_nb(t, writes, 23);
    g_assert_cmpint(seqcache_stats(t).cached_bytes, ==, 1024);
}

/* Half of the cache is less than what each stream writes in all */
FIXTURE_CASES(streams,
                { FILTER(16 * KiB, 1 * MiB, 512), .param = 1 },
                { FILTER(16 * KiB, 1 * MiB, 512), .param = 8 },
                { FILTER(16 * KiB, 1 * MiB, 512), .param = 16 })
{
    int64_t bytes = 1 * MiB / config->param;

    /* The first write of each cannot be known as a stream */
    for (int i = 0; i < config->param; i++) {
        write_ok(t, i * bytes, 512);
    }
    disk_reset_counts(t->disk);
    for (int64_t n = 512; n < bytes; n += 512) {
        for (int i = 0; i < config->param; i++) {
            write_ok(t, i * bytes + n, 512);
        }
    }
    check_all(t);
    g_assert_cmpuint(t->disk->nb.writes, <=, MAX(3, 2 * config->param));
}

/*
 * A stream that goes on inside of its cluster needs no room, so that a cache of
 * as many clusters as there are streams is enough to fill each before it is
 * written
 */
FIXTURE_TEST(streams_fill_cache, FILTER(16 * KiB, 16 * 16 * KiB, 512))
{
    for (int64_t n = 0; n < 64 * KiB; n += 512) {
        for (int i = 0; i < 16; i++) {
            write_ok(t, i * 64 * KiB + n, 512);
        }
    }
    check_all(t);
    /* The first write of each cannot be known as a stream */
    g_assert_cmpuint(t->disk->nb.writes, <=, 16 + 1 * MiB / (16 * KiB));
}

FIXTURE_TEST(overwrite, PLAIN(512))
{
    TestWrite *w[2];

    /* Cached; then flushed and still cached; then across both ends */
    stream_ok(t, 1000, 5000, 100);
    write_ok(t, 1500, 2000);
    assert_nb(t, writes, 0);
    check_all(t);
    write_ok(t, 2000, 1000);
    write_ok(t, 512, 512);
    check_all(t);
    stream_ok(t, 70000, 5000, 100);
    write_ok(t, 69000, 7001);
    check_all(t);

    /* In flight: twice, one after the other, and each gets there */
    stream_ok(t, 131072, 65536, 4000);
    disk_hold(t->disk);
    w[0] = write_start(t, qemu_get_aio_context(), 131072, 512, BDRV_REQ_FUA);
    w[1] = write_start(t, qemu_get_aio_context(), 140000, 100, 0);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    g_assert(!write_is_done(w[0]) && !write_is_done(w[1]));
    disk_release(t->disk);
    g_assert_cmpint(write_finish(w[0]), ==, 0);
    g_assert_cmpint(write_finish(w[1]), ==, 0);
}

/* Something is cached, and a request to [4096, 5120) waits in the disk alone */
static TestWrite *overlap_start(Test *t, BdrvRequestFlags flags)
{
    TestWrite *direct;

    t->disk->overlap = true;
    write_ok(t, 3072, 512);
    disk_hold(t->disk);
    direct = write_start(t, qemu_get_aio_context(), 4096, 1024, flags);
    if (flags == BDRV_REQ_ZERO_WRITE) {
        memset(direct->buf, 0, 1024);
    }
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    WITH_QEMU_LOCK_GUARD(&t->disk->lock) {
        t->disk->hold = 0;
    }
    return direct;
}

/*
 * A request goes straight to the disk; meanwhile some of its range is written
 * into the cache and from there to the disk, before the request gets there
 */
FIXTURE_CASES(overlap,
                { PLAIN(512), .param = BDRV_REQ_FUA },
                { PLAIN(512), .param = BDRV_REQ_ZERO_WRITE },
                { PLAIN(512), .param = BDRV_REQ_WRITE_COMPRESSED })
{
    TestWrite *direct = overlap_start(t, config->param);

    disk_reset_counts(t->disk);
    write_ok(t, 3584, 1024);
    assert_nb(t, writes, 0);
    flush_ok(t);
    assert_nb(t, writes, 1);
    read_ok(t, 3072, 1536);
    g_assert(!write_is_done(direct));

    disk_release(t->disk);
    g_assert_cmpint(write_finish(direct), ==, 0);
}

/*
 * The same, and more is cached that cannot be written: what was written
 * meanwhile is what the disk has made of it
 */
FIXTURE_TEST(overlap_error, PLAIN(512))
{
    TestWrite *direct = overlap_start(t, BDRV_REQ_FUA);
    uint8_t before[2048], after[2048];

    write_ok(t, 3584, 1024);
    flush_ok(t);
    write_ok(t, 4608, 1024);
    disk_set_error(t->disk, ENOSPC);
    g_assert(!write_is_done(direct));

    disk_release(t->disk);
    write_finish(direct);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, before, 0), ==, 0);
    disk_set_error(t->disk, 0);
    flush_ok(t);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, after, 0), ==, 0);
    g_assert_cmpmem(before, 2048, after, 2048);
    g_assert_cmpmem(after, 512, t->shadow + 3584, 512);
    t->unchecked = true;
}

static void flush_cb(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

/*
 * The same, and what was written meanwhile is on the disk, but its request is
 * still in flight when more cannot be written
 */
FIXTURE_TEST(overlap_error_in_flight, PLAIN(512))
{
    TestWrite *direct = overlap_start(t, BDRV_REQ_FUA);
    uint8_t before[2048], after[2048];
    int flush = -EINPROGRESS;

    write_ok(t, 3584, 1024);
    t->disk->hold_after = DISK_WRITE;
    blk_aio_flush(t->blk, flush_cb, &flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 2);

    /* The run goes on; from the second write on the disk is full */
    write_ok(t, 4608, 1024);
    write_ok(t, 200 * KiB + 100, 100);
    disk_set_fault(t->disk, (DiskFault) {
        .kinds = DISK_WRITE, .first = 2, .lasting = true, .error = ENOSPC,
    });
    WITH_QEMU_LOCK_GUARD(&t->disk->lock) {
        t->disk->hold_after = 0;
        qemu_co_enter_next(&t->disk->held, &t->disk->lock);
        t->disk->hold_after = DISK_WRITE;
    }
    settle();
    g_assert_cmpint(flush, ==, -EINPROGRESS);
    disk_release(t->disk);
    g_assert_cmpint(write_finish(direct), ==, 0);
    AIO_WAIT_WHILE_UNLOCKED(NULL, flush == -EINPROGRESS);
    g_assert_cmpint(flush, ==, -ENOSPC);

    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, before, 0), ==, 0);
    disk_set_fault(t->disk, (DiskFault) { 0 });
    flush_ok(t);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, after, 0), ==, 0);
    g_assert_cmpmem(before, 2048, after, 2048);
    t->unchecked = true;
}

static void assert_stable(Test *t, int64_t offset, int64_t bytes)
{
    assert_bytes(t->disk->stable + offset, t->shadow + offset, offset, bytes,
                 "FUA");
}

FIXTURE_CASES(fua, { SMALL() }, { SMALL(.no_flags = true) })
{
    /* Also if nothing was written since the last flush */
    g_assert_cmpint(write_flags(t, 40960, 512, BDRV_REQ_FUA), ==, 0);
    assert_stable(t, 0, DISK_MAX_SIZE);
    for (int i = 0; i < 4; i++) {
        stream_ok(t, 100, 3000, 500);
        g_assert_cmpint(write_flags(t, 1100, 500 + i * 3000, BDRV_REQ_FUA), ==,
                        0);
        assert_stable(t, 1100, 500 + i * 3000);
        stream_ok(t, 20000, 3000, 500);
        g_assert_cmpint(blk_pwrite_zeroes(t->blk, 20100, 1024 + i,
                                          BDRV_REQ_FUA), ==, 0);
        memset(t->shadow + 20100, 0, 1024 + i);
        assert_stable(t, 20100, 1024 + i);
    }
}

FIXTURE_TEST(read, PLAIN(4096))
{
    int64_t offset;

    write_ok(t, 0, 512 * KiB);
    stream_ok(t, 10000, 100000, 3000);
    stream_ok(t, 600 * KiB + 1, 1000, 100); /* after the end of the disk */
    for (offset = 0; offset < 120000; offset += 9999) {
        read_ok(t, offset, 1);
        read_ok(t, offset, 30000);
    }
    read_ok(t, 511 * KiB, 128 * KiB);
}

/* ---- Everything else, with data in the cache ---- */

#define AROUND SMALL(), .around = true

FIXTURE_TEST(zero, AROUND)
{
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB,
                                      BDRV_REQ_MAY_UNMAP), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
    assert_nb(t, zeroes, 1);
    check_all(t);

    /* Refused, not replaced by a write, and nothing is lost */
    cache_around(t);
    t->disk->percent_unsupported = 100;
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB,
                                      BDRV_REQ_NO_FALLBACK), ==, -ENOTSUP);
    check_all(t);
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB, 0), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
}

FIXTURE_TEST(discard, AROUND)
{
    g_assert_cmpint(compat_blk_pdiscard(t->blk, 8 * KiB, 16 * KiB), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
    assert_nb(t, discards, 1);
}

FIXTURE_TEST(compressed, AROUND)
{
    memset(t->shadow + 8 * KiB, 0x77, 16 * KiB);
    g_assert_cmpint(blk_pwrite_compressed(t->blk, 8 * KiB, 16 * KiB,
                                          t->shadow + 8 * KiB), ==, 0);
    assert_nb(t, compressed, 1);
}

typedef struct TestCopy {
    Test *t;
    int64_t src;
    int64_t dst;
    int ret;
} TestCopy;

static void coroutine_fn copy_entry(void *opaque)
{
    TestCopy *c = opaque;

    c->ret = blk_co_copy_range(c->t->blk, c->src, c->t->blk, c->dst, 16 * KiB,
                               0, 0);
}

static void copy_ok(Test *t, int64_t src, int64_t dst)
{
    TestCopy c = { .t = t, .src = src, .dst = dst, .ret = -EINPROGRESS };

    qemu_coroutine_enter(qemu_coroutine_create(copy_entry, &c));
    AIO_WAIT_WHILE_UNLOCKED(NULL, c.ret == -EINPROGRESS);
    g_assert_cmpint(c.ret, ==, 0);
    memcpy(t->shadow + dst, t->shadow + src, 16 * KiB);
}

FIXTURE_TEST(copy_range, AROUND)
{
    copy_ok(t, 8 * KiB, 100 * KiB);
    assert_nb(t, copies, 1);
    check_all(t);
    cache_around(t);
    copy_ok(t, 200 * KiB, 8 * KiB);
}

/* ---- Length and block status ---- */

static int truncate_to(Test *t, int64_t len, BdrvRequestFlags flags)
{
    int ret = blk_truncate(t->blk, len, false, PREALLOC_MODE_OFF, flags, NULL);

    if (ret == 0) {
        memset(t->shadow + len, 0, DISK_MAX_SIZE - len);
        g_assert_cmpint(blk_getlength(t->blk), ==, len);
        g_assert_cmpint(t->disk->len, ==, len);
    }
    return ret;
}

FIXTURE_TEST(truncate, PLAIN(512))
{
    stream_ok(t, 500 * KiB, 100 * KiB, 3000);
    g_assert_cmpint(truncate_to(t, 550 * KiB, 0), ==, 0);
    check_all(t);
    stream_ok(t, 540 * KiB, 20 * KiB, 3000);
    g_assert_cmpint(truncate_to(t, 700 * KiB, 0), ==, 0);
    check_all(t);
    stream_ok(t, 100, 200 * KiB, 3000);
    g_assert_cmpint(truncate_to(t, 0, 0), ==, 0);
    check_all(t);
    g_assert_cmpint(truncate_to(t, 4096, 0), ==, 0);

    /* Growth fails, then what has to be written before it: nothing is lost */
    stream_ok(t, 100, 10000, 500);
    g_assert_cmpint(truncate_to(t, 2 * MiB, 0), ==, -EFBIG);
    g_assert_cmpint(blk_getlength(t->blk), ==, ROUND_UP(10100, 512));
    check_all(t);
    stream_ok(t, 20000, 10000, 500);
    disk_set_error(t->disk, EIO);
    g_assert_cmpint(truncate_to(t, 8192, 0), ==, -EIO);
    g_assert_cmpint(blk_getlength(t->blk), ==, ROUND_UP(30000, 512));
    disk_set_error(t->disk, 0);
}

static void assert_length(Test *t, int64_t length)
{
    length = ROUND_UP(length, BDRV_SECTOR_SIZE);
    g_assert_cmpint(blk_getlength(t->blk), ==, length);
    /* As when a parent asks again, because the child was resized */
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_refresh_total_sectors(t->bs, 0), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(blk_getlength(t->blk), ==, length);
}

/*
 * The length is what requests have made it, although the disk has only whole
 * blocks; but only while nobody else can resize the disk
 */
FIXTURE_TEST(length, PLAIN(4096))
{
    int64_t end = 512 * KiB;

    assert_length(t, end);
    stream_ok(t, end, 30000, 300);
    end += 30000;
    assert_length(t, end);
    g_assert_cmpint(blk_flush(t->blk), ==, 0);
    g_assert_cmpint(t->disk->len, ==, ROUND_UP(end, 4096));
    assert_length(t, end);

    /* Directly to the disk */
    write_ok(t, 100 * KiB, 64 * KiB);
    g_assert_cmpint(write_flags(t, end, 5000, BDRV_REQ_FUA), ==, 0);
    end += 5000;
    assert_length(t, end);
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, end, 700, 0), ==, 0);
    end += 700;
    assert_length(t, end);

    g_assert_cmpint(seqcache_reopen(t, 8192, 64 * KiB), ==, 0);
    assert_length(t, end);
    g_assert_cmpint(truncate_to(t, 100 * KiB + 512, 0), ==, 0);
    assert_length(t, 100 * KiB + 512);
    g_assert_cmpint(truncate_to(t, 2 * MiB, 0), ==, -EFBIG);
    assert_length(t, 100 * KiB + 512);
    stream_ok(t, 100 * KiB + 512, 100, 50);
    g_assert_cmpint(blk_flush(t->blk), ==, 0);
    end = 100 * KiB + 612;
    assert_length(t, end);

    g_assert_cmpint(blk_set_perm(t->blk, BLK_PERM_CONSISTENT_READ,
                                 BLK_PERM_ALL, &error_abort), ==, 0);
    t->disk->len = 80 * KiB;
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_refresh_total_sectors(t->bs->file->bs, 0), ==, 0);
    g_assert_cmpint(bdrv_refresh_total_sectors(t->bs, 0), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    assert_length(t, 80 * KiB);
    t->unchecked = true;
}

/* A request for zeroes reaches the disk if the disk can do it */
FIXTURE_CASES(truncate_flags, { SMALL() }, { SMALL(.no_flags = true) })
{
    bool no_flags = config->filter.disk.no_flags;

    stream_ok(t, 500 * KiB, 100 * KiB, 3000);
    g_assert_cmpint(truncate_to(t, 700 * KiB, BDRV_REQ_ZERO_WRITE), ==,
                    no_flags ? -ENOTSUP : 0);
    g_assert_cmphex(t->disk->truncate_flags, ==,
                    no_flags ? 0 : BDRV_REQ_ZERO_WRITE);
}

/* Compare flags and size of the answer for what is from @offset on */
static void assert_status(Test *t, int64_t offset, int flags,
                          int64_t bytes)
{
    int64_t pnum, map;
    BlockDriverState *file;
    int ret = bdrv_block_status(t->bs, offset, DISK_MAX_SIZE - offset, &pnum,
                                &map, &file);

    ret &= BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | BDRV_BLOCK_EOF;
    g_assert_cmphex(ret, ==, flags);
    g_assert_cmpint(pnum, ==, bytes);
}

FIXTURE_TEST(status, PLAIN(4096))
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert_status(t, 0, BDRV_BLOCK_ZERO | BDRV_BLOCK_EOF, 512 * KiB);
    write_ok(t, 16 * KiB, 8 * KiB);
    stream_ok(t, 40 * KiB - 1, 4 * KiB + 2, 300);
    stream_ok(t, 200 * KiB, 1, 1);
    /* Blocks that are cached in part are data, all others are the disk's */
    assert_status(t, 0, BDRV_BLOCK_ZERO, 16 * KiB);
    assert_status(t, 16 * KiB, BDRV_BLOCK_DATA, 8 * KiB);
    assert_status(t, 24 * KiB, BDRV_BLOCK_ZERO, 12 * KiB);
    assert_status(t, 36 * KiB, BDRV_BLOCK_DATA, 12 * KiB);
    assert_status(t, 40 * KiB, BDRV_BLOCK_DATA, 8 * KiB);
    assert_status(t, 47 * KiB, BDRV_BLOCK_DATA, 1 * KiB);
    assert_status(t, 48 * KiB, BDRV_BLOCK_ZERO, 152 * KiB);
    assert_status(t, 200 * KiB, BDRV_BLOCK_DATA, 4 * KiB);
    assert_status(t, 204 * KiB, BDRV_BLOCK_ZERO | BDRV_BLOCK_EOF, 308 * KiB);
}

FIXTURE_TEST(growth, PLAIN(512))
{
    int64_t pnum;
    int ret;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    stream_ok(t, 600 * KiB, 1024, 100);
    g_assert_cmpint(t->disk->len, ==, 512 * KiB);
    g_assert_cmpint(blk_getlength(t->blk), ==, 601 * KiB);

    /* The end of the disk is not the end, and zeroes follow */
    for (int64_t pos = 0; pos < 600 * KiB; pos += pnum) {
        ret = bdrv_block_status(t->bs, pos, 1 * MiB, &pnum, NULL, NULL);
        g_assert_cmpint(ret, >=, 0);
        g_assert_cmpint(pnum, >, 0);
        g_assert_false(ret & BDRV_BLOCK_EOF);
        g_assert(pos < 512 * KiB || (ret & BDRV_BLOCK_ZERO));
    }
    assert_status(t, 600 * KiB, BDRV_BLOCK_DATA | BDRV_BLOCK_EOF, 1024);

    /* Also when the driver is asked again */
    g_assert_cmpint(bdrv_refresh_total_sectors(t->bs, 0), ==, 0);
    g_assert_cmpint(blk_getlength(t->blk), ==, 601 * KiB);
    check_all(t);
    g_assert_cmpint(t->disk->len, ==, 601 * KiB);
}

/* ---- Errors ---- */

FIXTURE_TEST(error, PLAIN(512))
{
    int64_t offset = 0;
    int ret;

    disk_set_error(t->disk, ENOSPC);
    stream_ok(t, 100, 20000, 999);
    g_assert_cmpint(blk_flush(t->blk), ==, -ENOSPC);
    read_ok(t, 100, 20000);
    g_assert_cmpint(write_flags(t, 512, 512, BDRV_REQ_FUA), ==, -ENOSPC);
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 512, 512, 0), ==, -ENOSPC);
    g_assert_cmpint(compat_blk_pdiscard(t->blk, 512, 512), ==, -ENOSPC);
    g_assert_cmpint(blk_pwrite_compressed(t->blk, 512, 512, t->shadow), ==,
                    -ENOSPC);
    read_ok(t, 100, 20000);

    /* Until the cache is full */
    disk_set_error(t->disk, 0);
    write_ok(t, 100000, 1000);
    disk_set_error(t->disk, ENOSPC);
    for (offset = 101000; offset < DISK_MAX_SIZE; offset += 1000) {
        ret = write_flags(t, offset, MIN(DISK_MAX_SIZE - offset, 1000), 0);
        if (ret < 0) {
            break;
        }
    }
    g_assert_cmpint(ret, ==, -ENOSPC);
    read_ok(t, 100, 20000);
    read_ok(t, 100000, offset - 100000);
    g_assert_cmpint(write_flags(t, 1000000, 1, 0), ==, -ENOSPC);

    /* Everything that was accepted gets there */
    disk_set_error(t->disk, 0);
}

/* ---- The node ---- */

FIXTURE_TEST(reopen, PLAIN(512))
{
    stream_ok(t, 100, 20000, 999);
    g_assert_cmpint(seqcache_reopen(t, 512, 1023), ==, -EINVAL);
    g_assert_cmpint(seqcache_reopen(t, 256, 1 * MiB), ==, -EINVAL);
    disk_set_error(t->disk, EIO);
    write_ok(t, 20100, 1000);
    g_assert_cmpint(seqcache_reopen(t, 4096, 64 * KiB), !=, 0);
    disk_set_error(t->disk, 0);
    read_ok(t, 0, 65536);

    write_ok(t, 21100, 1000);
    g_assert_cmpint(seqcache_reopen(t, 4096, 8192), ==, 0);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    /* It has room for two clusters now */
    disk_reset_counts(t->disk);
    stream_ok(t, 100001, 64 * KiB, 1000);
    g_assert_cmpuint(t->disk->nb.writes, >=, 14);
    g_assert_cmpint(seqcache_stats(t).cached_bytes, <=, 8192);
}

/* A drain waits for what is in flight, not for all that is worth writing */
FIXTURE_TEST(drain_rest,
          FILTER(4 * KiB, 256 * KiB, 512, .max_transfer = 4 * KiB))
{
    disk_hold(t->disk);
    stream_ok(t, 100, 240 * KiB, 1000);
    disk_release_later(t->disk);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    assert_nb(t, writes, 4);
    bdrv_drained_end(t->bs);
}

FIXTURE_TEST(drain, PLAIN(512))
{
    t->disk->max_hops = 10;
    stream_ok(t, 100, 600 * KiB, 64 * KiB - 1);
    g_assert_cmpuint(t->disk->nb_in_flight, >, 0);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    bdrv_drained_end(t->bs);
    g_assert_cmpint(seqcache_stats(t).cached_bytes, >, 0);
}

/* Whether somebody else may write to the disk */
static bool disk_is_shared(Test *t)
{
    BlockBackend *blk = blk_new(qemu_get_aio_context(), BLK_PERM_WRITE,
                                BLK_PERM_ALL);
    int ret = blk_insert_bs(blk, t->disk_bs, NULL);

    blk_unref(blk);
    return ret == 0;
}

/* What the filter does in the main loop, which writes in the background */
static void run_main_loop(void)
{
    settle();
    qemu_clock_run_timers(QEMU_CLOCK_REALTIME);
    settle();
}

FIXTURE_TEST(permissions, PLAIN(512))
{
    g_assert_false(disk_is_shared(t));
    stream_ok(t, 64 * KiB, 64 * KiB, 1000);
    disk_set_error(t->disk, EIO);
    blk_remove_bs(t->blk);
    run_main_loop();

    /* Nobody writes any more, but there is data that is not on the disk */
    g_assert_false(disk_is_shared(t));
    disk_set_error(t->disk, 0);
    blk_insert_bs(t->blk, t->bs, &error_abort);
    stream_ok(t, 100, 20000, 999);
    blk_remove_bs(t->blk);
    run_main_loop();
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    g_assert(disk_is_shared(t));
    /* So somebody else may write, and is seen */
    memset(t->disk->data + 15000, 0x99, 10000);
    memset(t->shadow + 15000, 0x99, 10000);
    memcpy(t->disk->stable, t->disk->data, DISK_MAX_SIZE);
    blk_insert_bs(t->blk, t->bs, &error_abort);
}

FIXTURE_TEST(inactive, PLAIN(512))
{
    /* One with a name gives up its permissions */
    g_assert(monitor_add_blk(t->blk, "drive", &error_abort));
    stream_ok(t, 100, 20000, 999);
    g_assert_cmpint(bdrv_inactivate_all(), ==, 0);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");

    /* Somewhere else it is written to */
    memset(t->disk->data + 15000, 0x99, 10000);
    memset(t->shadow + 15000, 0x99, 10000);
    read_ok(t, 0, 65536);
    bdrv_activate_all(&error_abort);
    read_ok(t, 0, 65536);
    stream_ok(t, 20100, 2000, 300);
    memcpy(t->disk->stable, t->disk->data, DISK_MAX_SIZE);
    check_all(t);
    monitor_remove_blk(t->blk);
}

FIXTURE_TEST(aio_context, PLAIN(512))
{
    IOThread *iothread = iothread_new();
    AioContext *ctx = iothread_get_aio_context(iothread);
    int i;

    for (i = 0; i < 4; i++) {
        stream_ok(t, 100 + i * 50000, 49999, 999);
        blk_set_aio_context(t->blk, i % 2 ? qemu_get_aio_context() : ctx,
                            &error_abort);
        g_assert(bdrv_get_aio_context(t->disk_bs) ==
                 blk_get_aio_context(t->blk));
    }
    /* Any thread can write */
    g_assert_cmpint(write_finish(write_start(t, ctx, 200099, 800, 0)), ==, 0);
    iothread_join(iothread);
}

FIXTURE_TEST(cancel, PLAIN(512))
{
    bdrv_cancel_in_flight(t->bs);
    g_assert_cmpuint(t->disk->nb_cancels, ==, 1);
}

FIXTURE_TEST(close, PLAIN(512))
{
    stream_ok(t, 100, 20000, 999);
    blk_remove_bs(t->blk);
    bdrv_unref(t->bs);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    settle();
    t->bs = NULL;
    t->unchecked = true;
}

int main(int argc, char **argv)
{
    disk_test_init(&argc, &argv);
    fixture_add_tests("/seqcache-filter");
    return g_test_run();
}
