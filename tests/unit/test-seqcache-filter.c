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
#include "seqcache-disk.h"

/* ---- Requests ---- */

/* A write of recognisable data; may go on in the background */
typedef struct TestWrite {
    SeqCacheTest *t;
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

static TestWrite *write_start(SeqCacheTest *t, AioContext *ctx, int64_t offset,
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

static int write_flags(SeqCacheTest *t, int64_t offset, int64_t bytes,
                       BdrvRequestFlags flags)
{
    return write_finish(write_start(t, qemu_get_aio_context(), offset, bytes,
                                    flags));
}

static void write_ok(SeqCacheTest *t, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(write_flags(t, offset, bytes, 0), ==, 0);
}

/* Write a range in sequential pieces */
static void stream_ok(SeqCacheTest *t, int64_t offset, int64_t bytes,
                      int64_t piece)
{
    int64_t i;

    for (i = 0; i < bytes; i += piece) {
        write_ok(t, offset + i, MIN(piece, bytes - i));
    }
}

static SeqCacheTest *new_test(uint32_t align)
{
    return seqcache_test_new(&(SeqCacheConfig) {
        .cluster_size = 64 * KiB, .cache_size = 1 * MiB, .align = align,
        .len = 512 * KiB,
    });
}

/* ---- Writes and reads ---- */

static void test_merge(void)
{
    SeqCacheTest *t = new_test(512);

    /* Nobody above needs to complete blocks of the disk */
    g_assert_cmpuint(t->bs->bl.request_alignment, ==, 1);
    stream_ok(t, 100, 190000, 700);
    g_assert_cmpuint(t->disk->nb.writes, ==, 0);
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    check_all(t);
    g_assert_cmpuint(t->disk->nb.writes, ==, 1);
    /* Goes on after the flush */
    stream_ok(t, 190100, 5000, 700);
    g_assert_cmpuint(t->disk->nb.writes, ==, 1);
    check_all(t);
    seqcache_test_free(t);
}

static void test_direct(void)
{
    SeqCacheTest *t = new_test(512);
    TestWrite *w;
    int i;

    /* Random aligned ones */
    for (i = 0; i < 20; i++) {
        write_ok(t, (i * 37 % 20) * 8192, 4096);
        g_assert_cmpuint(t->disk->nb.writes, ==, i + 1);
    }
    /* Large aligned ones, without a copy, also when they follow each other */
    for (i = 0; i < 3; i++) {
        w = write_start(t, qemu_get_aio_context(), 200 * KiB + i * 64 * KiB,
                        64 * KiB, 0);
        g_assert(t->disk->last_write == w->buf);
        g_assert_cmpint(write_finish(w), ==, 0);
    }
    g_assert_cmpuint(t->disk->nb.writes, ==, 23);
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    g_assert_cmpint(stat_cached_bytes(t), ==, 0);

    /* What starts where one of them has ended is a stream */
    write_ok(t, 4096, 512);
    write_ok(t, 392 * KiB, 512);
    g_assert_cmpuint(t->disk->nb.writes, ==, 23);
    g_assert_cmpint(stat_cached_bytes(t), ==, 1024);
    check_all(t);
    seqcache_test_free(t);
}

static void test_streams(void)
{
    static const int nb_streams[] = { 1, 8, 16 };
    unsigned nb_writes[3];
    int i, j;
    int64_t n;

    for (i = 0; i < 3; i++) {
        SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
            .cluster_size = 16 * KiB, .cache_size = 1 * MiB, .align = 512,
            .len = 512 * KiB,
        });
        int64_t bytes = 1 * MiB / nb_streams[i];

        /* The first write of each cannot be known as a stream */
        for (j = 0; j < nb_streams[i]; j++) {
            write_ok(t, j * bytes, 512);
        }
        disk_reset_counts(t->disk);
        for (n = 512; n < bytes; n += 512) {
            for (j = 0; j < nb_streams[i]; j++) {
                write_ok(t, j * bytes + n, 512);
            }
        }
        check_all(t);
        nb_writes[i] = t->disk->nb.writes;
        seqcache_test_free(t);
    }
    /* Half of the cache is less than what each of them writes in all */
    g_assert_cmpuint(nb_writes[0], <=, 3);
    g_assert_cmpuint(nb_writes[1], <=, 2 * 8);
    g_assert_cmpuint(nb_writes[2], <=, 2 * 16);
}

/*
 * A stream that goes on inside of its cluster needs no room, so that a cache of
 * as many clusters as there are streams is enough to fill each before it is
 * written
 */
static void test_streams_fill_cache(void)
{
    const int nb_streams = 16;
    const int64_t bytes = 1 * MiB / nb_streams;
    SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
        .cluster_size = 16 * KiB, .cache_size = nb_streams * 16 * KiB,
        .align = 512, .len = 512 * KiB,
    });
    int64_t n;
    int i;

    for (n = 0; n < bytes; n += 512) {
        for (i = 0; i < nb_streams; i++) {
            write_ok(t, i * bytes + n, 512);
        }
    }
    check_all(t);
    /* The first write of each cannot be known as a stream */
    g_assert_cmpuint(t->disk->nb.writes, <=,
                     nb_streams + 1 * MiB / (16 * KiB));
    seqcache_test_free(t);
}

static void test_overwrite(void)
{
    SeqCacheTest *t = new_test(512);
    TestWrite *w[2];

    /* Cached; then flushed and still cached; then across both ends */
    stream_ok(t, 1000, 5000, 100);
    write_ok(t, 1500, 2000);
    g_assert_cmpuint(t->disk->nb.writes, ==, 0);
    check_all(t);
    write_ok(t, 2000, 1000);
    write_ok(t, 512, 512);
    check_all(t);
    stream_ok(t, 70000, 5000, 100);
    write_ok(t, 69000, 7001);
    check_all(t);

    /* In flight: twice, one after the other, and each gets there */
    stream_ok(t, 131072, 65536, 4000);
    disk_set_hold(t->disk, true);
    w[0] = write_start(t, qemu_get_aio_context(), 131072, 512, BDRV_REQ_FUA);
    w[1] = write_start(t, qemu_get_aio_context(), 140000, 100, 0);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    g_assert(!write_is_done(w[0]) && !write_is_done(w[1]));
    disk_set_hold(t->disk, false);
    g_assert_cmpint(write_finish(w[0]), ==, 0);
    g_assert_cmpint(write_finish(w[1]), ==, 0);
    check_all(t);
    seqcache_test_free(t);
}

/* Something is cached, and a request to [4096, 5120) waits in the disk alone */
static TestWrite *overlap_start(SeqCacheTest *t, BdrvRequestFlags flags)
{
    TestWrite *direct;

    t->disk->overlap = true;
    write_ok(t, 3072, 512);
    disk_set_hold(t->disk, true);
    direct = write_start(t, qemu_get_aio_context(), 4096, 1024, flags);
    if (flags == BDRV_REQ_ZERO_WRITE) {
        memset(direct->buf, 0, 1024);
    }
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    WITH_QEMU_LOCK_GUARD(&t->disk->lock) {
        t->disk->hold = false;
    }
    return direct;
}

/*
 * A request goes straight to the disk; meanwhile some of its range is written
 * into the cache and from there to the disk, before the request gets there
 */
static void test_overlap(void)
{
    static const BdrvRequestFlags flags[] = {
        BDRV_REQ_FUA, BDRV_REQ_ZERO_WRITE, BDRV_REQ_WRITE_COMPRESSED,
    };

    for (int i = 0; i < ARRAY_SIZE(flags); i++) {
        SeqCacheTest *t = new_test(512);
        TestWrite *direct = overlap_start(t, flags[i]);

        disk_reset_counts(t->disk);
        write_ok(t, 3584, 1024);
        g_assert_cmpuint(t->disk->nb.writes, ==, 0);
        flush_ok(t);
        g_assert_cmpuint(t->disk->nb.writes, ==, 1);
        read_ok(t, 3072, 1536);
        g_assert(!write_is_done(direct));

        disk_set_hold(t->disk, false);
        g_assert_cmpint(write_finish(direct), ==, 0);
        check_all(t);
        seqcache_test_free(t);
    }
}

/*
 * The same, and more is cached that cannot be written: what was written
 * meanwhile is what the disk has made of it
 */
static void test_overlap_error(void)
{
    SeqCacheTest *t = new_test(512);
    TestWrite *direct = overlap_start(t, BDRV_REQ_FUA);
    uint8_t before[2048], after[2048];

    write_ok(t, 3584, 1024);
    flush_ok(t);
    write_ok(t, 4608, 1024);
    disk_set_error(t->disk, ENOSPC);
    g_assert(!write_is_done(direct));

    disk_set_hold(t->disk, false);
    write_finish(direct);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, before, 0), ==, 0);
    disk_set_error(t->disk, 0);
    flush_ok(t);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, after, 0), ==, 0);
    g_assert_cmpmem(before, 2048, after, 2048);
    g_assert_cmpmem(after, 512, t->shadow + 3584, 512);
    seqcache_test_free(t);
}

static void flush_cb(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

/*
 * The same, and what was written meanwhile is on the disk, but its request is
 * still in flight when more cannot be written
 */
static void test_overlap_error_in_flight(void)
{
    SeqCacheTest *t = new_test(512);
    TestWrite *direct = overlap_start(t, BDRV_REQ_FUA);
    uint8_t before[2048], after[2048];
    int flush = -EINPROGRESS;

    write_ok(t, 3584, 1024);
    t->disk->hold_after = true;
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
        t->disk->hold_after = false;
        qemu_co_enter_next(&t->disk->held, &t->disk->lock);
        t->disk->hold_after = true;
    }
    settle();
    g_assert_cmpint(flush, ==, -EINPROGRESS);
    WITH_QEMU_LOCK_GUARD(&t->disk->lock) {
        t->disk->hold_after = false;
        qemu_co_enter_all(&t->disk->held, &t->disk->lock);
    }
    g_assert_cmpint(write_finish(direct), ==, 0);
    AIO_WAIT_WHILE_UNLOCKED(NULL, flush == -EINPROGRESS);
    g_assert_cmpint(flush, ==, -ENOSPC);

    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, before, 0), ==, 0);
    disk_set_fault(t->disk, (DiskFault) { 0 });
    flush_ok(t);
    g_assert_cmpint(blk_pread(t->blk, 3584, 2048, after, 0), ==, 0);
    g_assert_cmpmem(before, 2048, after, 2048);
    seqcache_test_free(t);
}

static void test_fua(void)
{
    int no_flags;

    for (no_flags = 0; no_flags < 2; no_flags++) {
        SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
            .cluster_size = 4 * KiB, .cache_size = 64 * KiB, .align = 512,
            .len = 512 * KiB, .no_flags = no_flags,
        });
        int i;

        /* Also if nothing was written since the last flush */
        g_assert_cmpint(write_flags(t, 40960, 512, BDRV_REQ_FUA), ==, 0);
        assert_bytes(t->disk->stable, t->shadow, 0, DISK_MAX_SIZE, "FUA");
        for (i = 0; i < 4; i++) {
            stream_ok(t, 100, 3000, 500);
            g_assert_cmpint(write_flags(t, 1100, 500 + i * 3000, BDRV_REQ_FUA),
                            ==, 0);
            assert_bytes(t->disk->stable + 1100, t->shadow + 1100, 1100,
                         500 + i * 3000, "FUA");
            stream_ok(t, 20000, 3000, 500);
            g_assert_cmpint(blk_pwrite_zeroes(t->blk, 20100, 1024 + i,
                                              BDRV_REQ_FUA), ==, 0);
            memset(t->shadow + 20100, 0, 1024 + i);
            assert_bytes(t->disk->stable + 20100, t->shadow + 20100, 20100,
                         1024 + i, "zero FUA");
        }
        check_all(t);
        seqcache_test_free(t);
    }
}

static void test_read(void)
{
    SeqCacheTest *t = new_test(4096);
    int64_t offset;

    write_ok(t, 0, 512 * KiB);
    stream_ok(t, 10000, 100000, 3000);
    stream_ok(t, 600 * KiB + 1, 1000, 100); /* after the end of the disk */
    for (offset = 0; offset < 120000; offset += 9999) {
        read_ok(t, offset, 1);
        read_ok(t, offset, 30000);
    }
    read_ok(t, 511 * KiB, 128 * KiB);
    check_all(t);
    seqcache_test_free(t);
}

/* ---- Everything else, with data in the cache ---- */

/* Cached: 600 bytes around each end of [8 KiB, 24 KiB), and some inside */
static void cache_around(SeqCacheTest *t)
{
    stream_ok(t, 8 * KiB - 300, 600, 100);
    stream_ok(t, 12 * KiB + 100, 600, 100);
    stream_ok(t, 24 * KiB - 300, 600, 100);
    g_assert_cmpint(stat_cached_bytes(t), ==, 1800);
}

static SeqCacheTest *new_test_around(void)
{
    SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
        .cluster_size = 4 * KiB, .cache_size = 64 * KiB, .align = 512,
        .len = 512 * KiB,
    });

    write_ok(t, 0, 64 * KiB);
    cache_around(t);
    disk_reset_counts(t->disk);
    return t;
}

static void test_zero(void)
{
    SeqCacheTest *t = new_test_around();

    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB,
                                      BDRV_REQ_MAY_UNMAP), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
    g_assert_cmpuint(t->disk->nb.zeroes, ==, 1);
    check_all(t);

    /* Refused, not replaced by a write, and nothing is lost */
    cache_around(t);
    t->disk->percent_unsupported = 100;
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB,
                                      BDRV_REQ_NO_FALLBACK), ==, -ENOTSUP);
    check_all(t);
    g_assert_cmpint(blk_pwrite_zeroes(t->blk, 8 * KiB, 16 * KiB, 0), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
    check_all(t);
    seqcache_test_free(t);
}

static void test_discard(void)
{
    SeqCacheTest *t = new_test_around();

    g_assert_cmpint(compat_blk_pdiscard(t->blk, 8 * KiB, 16 * KiB), ==, 0);
    memset(t->shadow + 8 * KiB, 0, 16 * KiB);
    g_assert_cmpuint(t->disk->nb.discards, ==, 1);
    check_all(t);
    seqcache_test_free(t);
}

static void test_compressed(void)
{
    SeqCacheTest *t = new_test_around();

    memset(t->shadow + 8 * KiB, 0x77, 16 * KiB);
    g_assert_cmpint(blk_pwrite_compressed(t->blk, 8 * KiB, 16 * KiB,
                                          t->shadow + 8 * KiB), ==, 0);
    g_assert_cmpuint(t->disk->nb.compressed, ==, 1);
    check_all(t);
    seqcache_test_free(t);
}

typedef struct TestCopy {
    SeqCacheTest *t;
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

static void copy_ok(SeqCacheTest *t, int64_t src, int64_t dst)
{
    TestCopy c = { .t = t, .src = src, .dst = dst, .ret = -EINPROGRESS };

    qemu_coroutine_enter(qemu_coroutine_create(copy_entry, &c));
    AIO_WAIT_WHILE_UNLOCKED(NULL, c.ret == -EINPROGRESS);
    g_assert_cmpint(c.ret, ==, 0);
    memcpy(t->shadow + dst, t->shadow + src, 16 * KiB);
}

static void test_copy_range(void)
{
    SeqCacheTest *t = new_test_around();

    copy_ok(t, 8 * KiB, 100 * KiB);
    g_assert_cmpuint(t->disk->nb.copies, ==, 1);
    check_all(t);
    cache_around(t);
    copy_ok(t, 200 * KiB, 8 * KiB);
    check_all(t);
    seqcache_test_free(t);
}

/* ---- Length and block status ---- */

static int truncate_to(SeqCacheTest *t, int64_t len, BdrvRequestFlags flags)
{
    int ret = blk_truncate(t->blk, len, false, PREALLOC_MODE_OFF, flags, NULL);

    if (ret == 0) {
        memset(t->shadow + len, 0, DISK_MAX_SIZE - len);
        g_assert_cmpint(blk_getlength(t->blk), ==, len);
        g_assert_cmpint(t->disk->len, ==, len);
    }
    return ret;
}

static void test_truncate(void)
{
    SeqCacheTest *t = new_test(512);

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
    check_all(t);
    seqcache_test_free(t);
}

static void assert_length(SeqCacheTest *t, int64_t length)
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
static void test_length(void)
{
    SeqCacheTest *t = new_test(4096);
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

    g_assert_cmpint(seqcache_test_reopen(t, 8192, 64 * KiB), ==, 0);
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
    seqcache_test_free(t);
}

/* Compare flags and size of the answer for what is from @offset on */
/* A request for zeroes reaches the disk if the disk can do it */
static void test_truncate_flags(void)
{
    int no_flags;

    for (no_flags = 0; no_flags < 2; no_flags++) {
        SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
            .cluster_size = 4 * KiB, .cache_size = 64 * KiB, .align = 512,
            .len = 512 * KiB, .no_flags = no_flags,
        });

        stream_ok(t, 500 * KiB, 100 * KiB, 3000);
        g_assert_cmpint(truncate_to(t, 700 * KiB, BDRV_REQ_ZERO_WRITE), ==,
                        no_flags ? -ENOTSUP : 0);
        g_assert_cmphex(t->disk->truncate_flags, ==,
                        no_flags ? 0 : BDRV_REQ_ZERO_WRITE);
        check_all(t);
        seqcache_test_free(t);
    }
}

static void assert_status(SeqCacheTest *t, int64_t offset, int flags,
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

static void test_status(void)
{
    SeqCacheTest *t = new_test(4096);

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
    check_all(t);
    seqcache_test_free(t);
}

static void test_growth(void)
{
    SeqCacheTest *t = new_test(512);
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
    seqcache_test_free(t);
}

/* ---- Errors ---- */

static void test_error(void)
{
    SeqCacheTest *t = new_test(512);
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
    check_all(t);
    seqcache_test_free(t);
}

/* ---- The node ---- */

static void test_reopen(void)
{
    SeqCacheTest *t = new_test(512);

    stream_ok(t, 100, 20000, 999);
    g_assert_cmpint(seqcache_test_reopen(t, 512, 1023), ==, -EINVAL);
    g_assert_cmpint(seqcache_test_reopen(t, 256, 1 * MiB), ==, -EINVAL);
    disk_set_error(t->disk, EIO);
    write_ok(t, 20100, 1000);
    g_assert_cmpint(seqcache_test_reopen(t, 4096, 64 * KiB), !=, 0);
    disk_set_error(t->disk, 0);
    read_ok(t, 0, 65536);

    write_ok(t, 21100, 1000);
    g_assert_cmpint(seqcache_test_reopen(t, 4096, 8192), ==, 0);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    /* It has room for two clusters now */
    disk_reset_counts(t->disk);
    stream_ok(t, 100001, 64 * KiB, 1000);
    g_assert_cmpuint(t->disk->nb.writes, >=, 14);
    g_assert_cmpint(stat_cached_bytes(t), <=, 8192);
    check_all(t);
    seqcache_test_free(t);
}

static void release(void *opaque)
{
    disk_set_hold(opaque, false);
}

/* A drain waits for what is in flight, not for all that is worth writing */
static void test_drain_rest(void)
{
    SeqCacheTest *t = seqcache_test_new(&(SeqCacheConfig) {
        .cluster_size = 4 * KiB, .cache_size = 256 * KiB, .align = 512,
        .max_transfer = 4 * KiB, .len = 512 * KiB,
    });

    disk_set_hold(t->disk, true);
    stream_ok(t, 100, 240 * KiB, 1000);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), release, t->disk);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);
    bdrv_drained_end(t->bs);
    check_all(t);
    seqcache_test_free(t);
}

static void test_drain(void)
{
    SeqCacheTest *t = new_test(512);

    t->disk->max_hops = 10;
    stream_ok(t, 100, 600 * KiB, 64 * KiB - 1);
    g_assert_cmpuint(t->disk->nb_in_flight, >, 0);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    bdrv_drained_end(t->bs);
    g_assert_cmpint(stat_cached_bytes(t), >, 0);
    check_all(t);
    seqcache_test_free(t);
}

/* Whether somebody else may write to the disk */
static bool disk_is_shared(SeqCacheTest *t)
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

static void test_permissions(void)
{
    SeqCacheTest *t = new_test(512);

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
    blk_insert_bs(t->blk, t->bs, &error_abort);
    read_ok(t, 0, 65536);
    seqcache_test_free(t);
}

static void test_inactive(void)
{
    SeqCacheTest *t = new_test(512);

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
    seqcache_test_free(t);
}

static void test_aio_context(void)
{
    SeqCacheTest *t = new_test(512);
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
    check_all(t);
    seqcache_test_free(t);
    iothread_join(iothread);
}

static void test_cancel(void)
{
    SeqCacheTest *t = new_test(512);

    bdrv_cancel_in_flight(t->bs);
    g_assert_cmpuint(t->disk->nb_cancels, ==, 1);
    seqcache_test_free(t);
}

static void test_close(void)
{
    SeqCacheTest *t = new_test(512);

    stream_ok(t, 100, 20000, 999);
    blk_remove_bs(t->blk);
    bdrv_unref(t->bs);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    settle();
    t->bs = NULL;
    seqcache_test_free(t);
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);

#define ADD(name, func) g_test_add_func("/seqcache-filter/" name, func)
    ADD("write/merge", test_merge);
    ADD("write/direct", test_direct);
    ADD("write/streams", test_streams);
    ADD("write/streams-fill-cache", test_streams_fill_cache);
    ADD("write/overwrite", test_overwrite);
    ADD("write/overlap", test_overlap);
    ADD("write/overlap-error", test_overlap_error);
    ADD("write/overlap-error-in-flight", test_overlap_error_in_flight);
    ADD("write/fua", test_fua);
    ADD("read", test_read);
    ADD("zero", test_zero);
    ADD("discard", test_discard);
    ADD("compressed", test_compressed);
    ADD("copy-range", test_copy_range);
    ADD("truncate/cached", test_truncate);
    ADD("truncate/flags", test_truncate_flags);
    ADD("status/cached", test_status);
    ADD("status/growth", test_growth);
    ADD("error", test_error);
    ADD("node/length", test_length);
    ADD("node/reopen", test_reopen);
    ADD("node/drain", test_drain);
    ADD("node/drain-rest", test_drain_rest);
    ADD("node/permissions", test_permissions);
    ADD("node/inactive", test_inactive);
    ADD("node/aio-context", test_aio_context);
    ADD("node/cancel", test_cancel);
    ADD("node/close", test_close);
#undef ADD

    return g_test_run();
}
