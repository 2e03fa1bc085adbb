/*
 * Tests of write-behind
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A test node stands where qcow2 or a filter stands: it hands all of its
 * requests to a WriteBehind.  Its file child is a disk in memory.  After each
 * test, a flush must succeed and the disk must have all that was accepted.
 *
 * For a given --seed the random test always does the same.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "fixture.h"
#include "memory-disk.h"
#include "block/write-behind.h"
#include "iothread.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

#define DISK_SIZE (8 * MiB)

/* ---- The node that has the WriteBehind ---- */

typedef struct TestNode {
    WriteBehind *wb;
    int64_t cluster_size;
} TestNode;

static void node_close(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    wb_free(s->wb);
}

static int64_t coroutine_fn node_co_getlength(BlockDriverState *bs)
{
    return DISK_SIZE;
}

static int coroutine_fn GRAPH_RDLOCK
node_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset,
                    BdrvRequestFlags flags)
{
    TestNode *s = bs->opaque;

    return wb_co_preadv_part(s->wb, offset, bytes, qiov, qiov_offset, flags);
}

/* -EBUSY for a write that a WriteBehind is not made for */
static int coroutine_fn GRAPH_RDLOCK
node_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    TestNode *s = bs->opaque;
    uint64_t nb_clusters = (offset + bytes - 1) / s->cluster_size -
                           offset / s->cluster_size + 1;
    g_autofree uint8_t *buf = g_malloc(bytes);
    int ret;

    qemu_iovec_to_buf(qiov, 0, buf, bytes);
    ret = wb_co_reserve(s->wb, nb_clusters);
    if (ret < 0) {
        return ret;
    }
    return wb_accept(s->wb, nb_clusters, offset, bytes, buf) ? 0 : -EBUSY;
}

static int coroutine_fn GRAPH_RDLOCK
node_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    TestNode *s = bs->opaque;

    wb_co_discard(bs, s->wb, offset, bytes);
    disk_zero(bs->file->bs->opaque, offset, bytes);
    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
node_co_flush_to_os(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    return s->wb ? wb_co_flush(bs, s->wb) : 0;
}

static int coroutine_fn GRAPH_RDLOCK
node_co_settle(BlockDriverState *bs, BdrvSettleMode mode)
{
    TestNode *s = bs->opaque;

    return wb_co_settle(s->wb, mode);
}

static void node_drain_begin(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    wb_drained_begin(s->wb);
}

static void node_drain_end(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    wb_drained_end(s->wb);
}

static BlockDriver bdrv_node = {
    .format_name            = "write-behind-node",
    .instance_size          = sizeof(TestNode),
    .bdrv_close             = node_close,
    .bdrv_child_perm        = bdrv_default_perms,
    .bdrv_co_getlength      = node_co_getlength,
    .bdrv_co_preadv_part    = node_co_preadv_part,
    .bdrv_co_pwritev        = node_co_pwritev,
    .bdrv_co_pdiscard       = node_co_pdiscard,
    .bdrv_co_flush_to_os    = node_co_flush_to_os,
    .bdrv_co_settle         = node_co_settle,
    .bdrv_drain_begin       = node_drain_begin,
    .bdrv_drain_end         = node_drain_end,
};

/* ---- A test's environment ---- */

typedef struct TestConfig {
    int64_t cluster_size;
    int64_t cache_size;
    unsigned max_streams;   /* 0: 4 */
    bool no_pad;
    uint32_t align;         /* 0: 1 */
    uint32_t max_transfer;
    int64_t max_age_ms;
    bool busy;              /* four requests are held, and more are to come */
    int param;              /* what differs between the cases of one test */
} TestConfig;

#define SMALL(nb_clusters) \
    .cluster_size = 4096, .cache_size = (nb_clusters) * 4096
#define LARGE(size) .cluster_size = 64 * KiB, .cache_size = (size)

typedef struct Test {
    const TestConfig *config;
    BlockBackend *blk;
    BlockDriverState *bs;
    WriteBehind *wb;
    BlockDriverState *disk_bs;
    Disk *disk;
    bool unchecked;     /* tear_down() does not look at the disk */

    /* Where op_append() goes on; only for tests in one AioContext */
    int64_t alloc;
    /* What the node must read as */
    uint8_t *shadow;
} Test;

static BlockDriverState *new_disk(const char *name, const TestConfig *config)
{
    return disk_new(&bdrv_disk, name, &(DiskConfig) {
        .len = DISK_SIZE, .max_len = DISK_SIZE, .align = config->align,
        .max_transfer = config->max_transfer,
    });
}

static void test_attach(Test *t)
{
    bdrv_ref(t->disk_bs);
    bdrv_graph_wrlock();
    bdrv_attach_child(t->bs, t->disk_bs, "file", &child_of_bds,
                      BDRV_CHILD_IMAGE | BDRV_CHILD_PRIMARY, &error_abort);
    bdrv_graph_wrunlock();
}

static void test_detach(Test *t)
{
    bdrv_graph_wrlock();
    bdrv_unref_child(t->bs, t->bs->file);
    bdrv_graph_wrunlock();
}

/* How often the WriteBehind of the only node said so */
static unsigned nb_written_out;

static void count_written_out(BlockDriverState *bs)
{
    nb_written_out++;
}

/* The WriteBehind is new from now on, without data */
static void test_new_wb(Test *t)
{
    TestNode *s = t->bs->opaque;
    WriteBehindOptions opts = {
        .cache_size = t->config->cache_size,
        .cluster_size = t->config->cluster_size,
        .max_streams = t->config->max_streams ?: 4,
        .pad = !t->config->no_pad,
        .event = BLKDBG_WRITE_COMPRESSED,
        .max_age_ms = t->config->max_age_ms,
        .written_out = count_written_out,
    };

    wb_free(s->wb);
    s->wb = t->wb = wb_new(t->bs, &opts);
    s->cluster_size = t->config->cluster_size;
    g_assert_cmpint(wb_cache_size(t->wb), ==, t->config->cache_size);
}

static void fill_cache(Test *t);

static void set_up(Test *t, const TestConfig *config)
{
    t->config = config;
    t->disk_bs = new_disk("disk", t->config);
    t->disk = t->disk_bs->opaque;
    t->bs = bdrv_new_open_driver(&bdrv_node, "node",
                                 BDRV_O_RDWR | BDRV_O_UNMAP, &error_abort);
    test_attach(t);
    test_new_wb(t);
    t->blk = user_new(t->bs);
    t->shadow = g_malloc0(DISK_SIZE);
    nb_written_out = 0;
    if (t->config->busy) {
        fill_cache(t);
    }
}

static void check_all(Test *t);

static void tear_down(Test *t, const TestConfig *config)
{
    if (!t->unchecked) {
        check_all(t);
    }
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t->shadow);
}

static void fill(uint8_t *buf, int64_t offset, int64_t bytes, unsigned gen)
{
    int64_t i;

    for (i = offset; i < offset + bytes; i++) {
        *buf++ = i * 7 + (i >> 8) * 13 + (i >> 12) * 5 + gen;
    }
}

/* The disk has something on it */
static void fill_disk(Test *t)
{
    fill(t->disk->data, 0, DISK_SIZE, 77);
    fill(t->shadow, 0, DISK_SIZE, 77);
}

/* Assert that a range of the disk has what was accepted */
static void assert_on_disk(Test *t, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&t->disk->lock);
    assert_bytes(t->disk->data + offset, t->shadow + offset, offset, bytes,
                 "disk");
}

static void assert_all_on_disk(Test *t)
{
    assert_on_disk(t, 0, DISK_SIZE);
}

static void forget_writes(Test *t)
{
    g_array_set_size(t->disk->log, 0);
}

static void assert_log(Test *t, const DiskWrite *expected, unsigned n)
{
    GArray *log = t->disk->log;
    unsigned i;

    for (i = 0; i < MIN(n, log->len); i++) {
        DiskWrite *w = &g_array_index(log, DiskWrite, i);

        g_assert_cmpint(w->offset, ==, expected[i].offset);
        g_assert_cmpint(w->bytes, ==, expected[i].bytes);
    }
    g_assert_cmpuint(log->len, ==, n);
    forget_writes(t);
}

/* Assert which writes the disk got since the last time, as { offset, bytes } */
#define assert_writes(t, ...)                                           \
    do {                                                                \
        const DiskWrite expected_[] = { __VA_ARGS__ };                  \
        assert_log(t, expected_, ARRAY_SIZE(expected_));                \
    } while (0)

static void assert_no_writes(Test *t)
{
    assert_log(t, NULL, 0);
}

/* When nothing happens any more, the disk holds @n requests */
static void assert_held(Test *t, unsigned n)
{
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, n);
}

/* A drained section that begins while the disk holds requests */
static void drain_held(Test *t)
{
    disk_release_later(t->disk);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
}

static void change_graph_elsewhere(void)
{
    bdrv_graph_wrlock();
    bdrv_graph_wrunlock();
}

/* ---- Requests, each in a coroutine of its own ---- */

typedef struct TestOp TestOp;
typedef int coroutine_fn TestOpFunc(TestOp *op);

struct TestOp {
    Test *t;
    TestOpFunc *fn;
    int64_t offset;
    int64_t bytes;
    unsigned gen;
    uint64_t nb_clusters;
    int ret; /* -EINPROGRESS until it is done */
};

static int coroutine_fn op_write(TestOp *op)
{
    g_autofree uint8_t *buf = g_malloc(op->bytes);
    int ret;

    fill(buf, op->offset, op->bytes, op->gen);
    ret = blk_co_pwrite(op->t->blk, op->offset, op->bytes, buf, 0);
    if (ret == 0) {
        memcpy(op->t->shadow + op->offset, buf, op->bytes);
    }
    return ret;
}

/* Read in pieces of @gen bytes, if it is not 0, and compare */
static int coroutine_fn op_read(TestOp *op)
{
    g_autofree uint8_t *buf = g_malloc(op->bytes);
    QEMUIOVector qiov;
    int64_t i, n;
    int ret;

    qemu_iovec_init(&qiov, 1);
    for (i = 0; i < op->bytes; i += n) {
        n = op->gen ? MIN(op->gen, op->bytes - i) : op->bytes;
        qemu_iovec_add(&qiov, buf + i, n);
    }
    ret = blk_co_preadv(op->t->blk, op->offset, op->bytes, &qiov, 0);
    if (ret == 0) {
        assert_bytes(buf, op->t->shadow + op->offset, op->offset, op->bytes,
                     "read");
    }
    qemu_iovec_destroy(&qiov);
    return ret;
}

static int coroutine_fn op_discard(TestOp *op)
{
    int ret = compat_blk_co_pdiscard(op->t->blk, op->offset, op->bytes);

    if (ret == 0) {
        memset(op->t->shadow + op->offset, 0, op->bytes);
    }
    return ret;
}

static int coroutine_fn op_blk_flush(TestOp *op)
{
    return blk_co_flush(op->t->blk);
}

/*
 * The others do not go through the BlockBackend, which would let flushes wait
 * for each other, and requests for the end of a drained section.  Each is a
 * request of the node until its function returns.
 */
static void request_end(BlockDriverState **bs)
{
    bdrv_dec_in_flight(*bs);
}

#define REQUEST_GUARD(t)                                                \
    __attribute__((cleanup(request_end)))                               \
    BlockDriverState *request_bs = (bdrv_inc_in_flight((t)->bs), (t)->bs); \
    GRAPH_RDLOCK_GUARD()

static int coroutine_fn op_flush(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_flush(op->t->bs, op->t->wb);
}

static int coroutine_fn op_reserve(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_reserve(op->t->wb, op->nb_clusters);
}

static int coroutine_fn op_unreserve(TestOp *op)
{
    wb_unreserve(op->t->wb, op->nb_clusters);
    return 0;
}

static int coroutine_fn op_write_out(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_write_out(op->t->wb, op->offset, op->bytes);
}

/* @gen is the mode */
static int coroutine_fn op_settle(TestOp *op)
{
    GRAPH_RDLOCK_GUARD();
    return bdrv_co_settle(op->t->bs, op->gen);
}

/* Use up an op_reserve() */
static int coroutine_fn op_accept(TestOp *op)
{
    Test *t = op->t;
    g_autofree uint8_t *buf = g_malloc(op->bytes);

    REQUEST_GUARD(t);
    fill(buf, op->offset, op->bytes, op->gen);
    if (!wb_accept(t->wb, op->nb_clusters, op->offset, op->bytes, buf)) {
        return -EBUSY;
    }
    memcpy(t->shadow + op->offset, buf, op->bytes);
    return 0;
}

/* Allocate space after the last one, in a new cluster if a stream ended */
static int coroutine_fn op_append(TestOp *op)
{
    Test *t = op->t;
    int ret;

    op->nb_clusters = DIV_ROUND_UP(op->bytes, t->config->cluster_size);
    ret = op_reserve(op);
    if (ret < 0) {
        return ret;
    }
    if (!wb_continues(t->wb, t->alloc)) {
        t->alloc = ROUND_UP(t->alloc, t->config->cluster_size);
    }
    op->offset = t->alloc;
    t->alloc += op->bytes;
    ret = op_accept(op);
    g_assert_cmpint(ret, ==, 0);
    return ret;
}

/*
 * As a filter does it, for what is cached, or continues a stream, or may begin
 * one if @nb_clusters is not 0.  Fails with -EAGAIN if not all was stored.
 */
static int coroutine_fn op_co_write(TestOp *op)
{
    Test *t = op->t;
    g_autofree uint8_t *buf = g_malloc(op->bytes);
    QEMUIOVector qiov;
    int64_t ret;

    REQUEST_GUARD(t);
    fill(buf, op->offset, op->bytes, op->gen);
    /* In two parts, after something else */
    qemu_iovec_init(&qiov, 3);
    qemu_iovec_add(&qiov, &ret, sizeof(ret));
    qemu_iovec_add(&qiov, buf, op->bytes / 3);
    qemu_iovec_add(&qiov, buf + op->bytes / 3, op->bytes - op->bytes / 3);
    ret = wb_co_write(t->wb, op->offset, op->bytes, &qiov, sizeof(ret),
                      op->nb_clusters);
    qemu_iovec_destroy(&qiov);
    if (ret < 0) {
        return ret;
    }
    memcpy(t->shadow + op->offset, buf, ret);
    return ret == op->bytes ? 0 : -EAGAIN;
}

static bool op_done(TestOp *op)
{
    return qatomic_load_acquire(&op->ret) != -EINPROGRESS;
}

static void coroutine_fn op_entry(void *opaque)
{
    TestOp *op = opaque;
    int ret = op->fn(op);

    qatomic_store_release(&op->ret, ret);
    aio_wait_kick();
}

static TestOp *op_start_in(TestOp *op, AioContext *ctx)
{
    op->ret = -EINPROGRESS;
    aio_co_enter(ctx, qemu_coroutine_create(op_entry, op));
    return op;
}

static TestOp *op_start(TestOp *op)
{
    return op_start_in(op, qemu_get_aio_context());
}

static int op_wait(TestOp *op)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, !op_done(op));
    return op->ret;
}

/* A request that goes on in the background, until the end of the block */
#define start(t_, fn_, ...) \
    op_start(&(TestOp) { .t = (t_), .fn = (fn_), __VA_ARGS__ })
#define run(...) op_wait(start(__VA_ARGS__))
#define run_ok(...) g_assert_cmpint(run(__VA_ARGS__), ==, 0)
#define run_fails(t, ret, ...) g_assert_cmpint(run(t, __VA_ARGS__), ==, ret)

/* Wait for it, and assert that it returns this */
#define finish(op, ret) g_assert_cmpint(op_wait(op), ==, ret)

static void assert_waits(TestOp *op)
{
    settle();
    g_assert_false(op_done(op));
}

static bool ops_done(TestOp *ops, unsigned n)
{
    while (n && op_done(&ops[n - 1])) {
        n--;
    }
    return !n;
}

static void ops_start(TestOp *ops, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        op_start(&ops[i]);
    }
}

static void ops_finish(TestOp *ops, unsigned n, int ret)
{
    for (unsigned i = 0; i < n; i++) {
        finish(&ops[i], ret);
    }
}

static void write_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_write, .offset = offset, .bytes = bytes, .gen = 1);
}

static void append_ok(Test *t, int64_t bytes)
{
    run_ok(t, op_append, .bytes = bytes, .gen = 1);
}

static void read_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_read, .offset = offset, .bytes = bytes);
}

static void read_all(Test *t)
{
    read_ok(t, 0, DISK_SIZE);
}

static void discard_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_discard, .offset = offset, .bytes = bytes);
}

static void flush_ok(Test *t)
{
    run_ok(t, op_flush);
}

static void reserve_ok(Test *t, uint64_t nb_clusters)
{
    run_ok(t, op_reserve, .nb_clusters = nb_clusters);
}

static void unreserve(Test *t, uint64_t nb_clusters)
{
    run_ok(t, op_unreserve, .nb_clusters = nb_clusters);
}

/* A flush that fails */
static void fail_flush(Test *t, int error)
{
    disk_set_error(t->disk, error);
    run_fails(t, -error, op_flush);
}

static void check_all(Test *t)
{
    disk_set_error(t->disk, 0);
    disk_release(t->disk);
    flush_ok(t);
    assert_all_on_disk(t);
}

static void fill_cache(Test *t)
{
    disk_hold(t->disk);
    append_ok(t, 60 * 4096 + 1);
    assert_held(t, 4);
}

#define assert_stat(t, field, op, value)                                \
    do {                                                                \
        BlockStatsWriteBehind *stats_ = wb_get_stats((t)->wb);          \
        g_assert_cmpuint(stats_->field, op, value);                     \
        qapi_free_BlockStatsWriteBehind(stats_);                        \
    } while (0)

/* ---- What goes to the child ---- */

/* A filter makes room for a request that goes to the child */
FIXTURE_TEST(write_out, LARGE(4 * MiB), .no_pad = true)
{
    TestOp *op;

    for (int i = 0; i < 4; i++) {
        write_ok(t, i * 64 * KiB, 1000);
    }
    g_assert_true(wb_is_dirty(t->wb));

    /* Nothing to do where nothing is cached, also in the same cluster */
    run_ok(t, op_write_out, .offset = 129000, .bytes = 2000);
    run_ok(t, op_write_out, .offset = MiB, .bytes = DISK_SIZE - MiB);
    assert_no_writes(t);

    /* What was written before goes first; what was written later can wait */
    disk_hold(t->disk);
    op = start(t, op_write_out, .offset = 64 * KiB + 999, .bytes = 1);
    assert_waits(op);
    disk_release(t->disk);
    finish(op, 0);
    g_assert_cmpint(wb_gap(t->wb, 64 * KiB, 64 * KiB), ==, 64 * KiB);
    g_assert_false(wb_continues(t->wb, 64 * KiB + 1000));
    assert_on_disk(t, 0, 65 * KiB);

    /* Streams elsewhere go on */
    g_assert_true(wb_continues(t->wb, 1000));
    g_assert_true(wb_continues(t->wb, 192 * KiB + 1000));

    run_ok(t, op_write_out, .offset = 0, .bytes = INT64_MAX);
    g_assert_cmpint(wb_gap(t->wb, 0, INT64_MAX), ==, INT64_MAX);
    g_assert_false(wb_is_dirty(t->wb));
    assert_all_on_disk(t);
}

FIXTURE_TEST(write_out_error, LARGE(4 * MiB), .no_pad = true)
{
    write_ok(t, 0, 1000);
    disk_set_error(t->disk, EIO);
    run_fails(t, -EIO, op_write_out, .offset = 0, .bytes = 1);
    g_assert_true(wb_is_dirty(t->wb));
    read_ok(t, 0, 2000);
    disk_set_error(t->disk, 0);
    run_ok(t, op_write_out, .offset = 0, .bytes = 1);
    assert_on_disk(t, 0, 2000);
}

FIXTURE_TEST(overwrite, LARGE(4 * MiB), .no_pad = true)
{
    TestOp *flush;

    run_fails(t, -EAGAIN, op_co_write, .offset = 0, .bytes = 1);
    write_ok(t, 0, 1000);
    run_ok(t, op_co_write, .offset = 100, .bytes = 900, .gen = 2);
    read_ok(t, 0, 2000);
    flush_ok(t);
    g_assert_false(wb_is_dirty(t->wb));

    /* What is on the child already is written again */
    run_ok(t, op_co_write, .offset = 500, .bytes = 10, .gen = 3);
    g_assert_true(wb_is_dirty(t->wb));
    disk_hold(t->disk);
    flush = start(t, op_flush);
    assert_held(t, 1);

    /* What is in flight must stay as it is */
    run_fails(t, -EAGAIN, op_co_write, .offset = 500, .bytes = 10, .gen = 4);
    disk_release(t->disk);
    finish(flush, 0);
    assert_writes(t, { 0, 1000 }, { 500, 500 });
    assert_stat(t, accepted_bytes, ==, 1910);
}

/* What goes on inside of a cluster is taken without a reservation */
FIXTURE_TEST(append, SMALL(2), .align = 512)
{
    run_fails(t, -EAGAIN, op_co_write, .offset = 0, .bytes = 1);
    write_ok(t, 0, 1000);
    write_ok(t, 8192, 1000);
    run_fails(t, -EAGAIN, op_co_write, .offset = 1001, .bytes = 1);
    /* The cache is full, and stays as it is */
    run_ok(t, op_co_write, .offset = 1000, .bytes = 1000);
    run_ok(t, op_co_write, .offset = 9192, .bytes = 1000);
    assert_no_writes(t);
    assert_stat(t, accepted_bytes, ==, 4000);
    assert_stat(t, accepted_requests, ==, 4);
    assert_stat(t, max_cached_bytes, ==, 4000);
    read_ok(t, 0, 16384);

    /* Writers learn of an error, though there would be room */
    fail_flush(t, EIO);
    run_fails(t, -EIO, op_co_write, .offset = 2000, .bytes = 1);
    disk_set_error(t->disk, 0);
    flush_ok(t);

    /* No more than what is in the first cluster, and no more streams unasked */
    run_fails(t, -EAGAIN, op_co_write, .offset = 2000, .bytes = 5000);
    g_assert_cmpint(wb_gap(t->wb, 4096, 4096), ==, 4096);
    run_fails(t, -EAGAIN, op_co_write, .offset = 4096, .bytes = 1);
    run_ok(t, op_co_write, .offset = 4096, .bytes = 1, .nb_clusters = 1);
    g_assert_true(wb_continues(t->wb, 4097));
    run_fails(t, -EAGAIN, op_co_write, .offset = 4098, .bytes = 1,
              .nb_clusters = 1);
}

/* Small pieces come out in order, in large aligned requests without reads */
FIXTURE_TEST(large_requests, LARGE(4 * MiB), .align = 4096)
{
    int64_t total = 5 * MiB + 12345;
    int64_t piece = 1;

    while (t->alloc < total) {
        append_ok(t, MIN(piece, total - t->alloc));
        piece = piece * 3 % 8191;
    }
    read_ok(t, 0, total);
    assert_writes(t, { 0, MiB }, { MiB, MiB }, { 2 * MiB, MiB },
                  { 3 * MiB, MiB }, { 4 * MiB, MiB });

    /* No one will continue the stream, so its end can be padded */
    g_assert_true(wb_continues(t->wb, total));
    wb_end_streams(t->wb);
    g_assert_false(wb_continues(t->wb, total));
    disk_reset_counts(t->disk);
    flush_ok(t);
    assert_writes(t, { 5 * MiB, 16 * KiB });
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    assert_stat(t, cached_bytes, ==, 0);
}

/* Neither the limits of the child nor half of a small cache are exceeded */
FIXTURE_CASES(request_size,
         { LARGE(4 * MiB), .align = 512, .param = MiB },
         { LARGE(512 * KiB), .align = 512, .param = 256 * KiB },
         { LARGE(128 * KiB), .align = 512, .param = 64 * KiB },
         { LARGE(4 * MiB), .align = 512, .max_transfer = 300 * KiB,
           .param = 256 * KiB },
         { LARGE(4 * MiB), .align = 512, .max_transfer = 64 * KiB,
           .param = 64 * KiB })
{
    unsigned n = 2 * MiB / config->param;

    while (t->alloc < 2 * MiB) {
        append_ok(t, 32 * KiB);
    }
    flush_ok(t);
    g_assert_cmpuint(t->disk->nb.writes, ==, n);
    /* If they were larger, the block layer split them */
    assert_stat(t, issued_requests, ==, n);
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
}

/* Alignment and maximum size are those that the child has at that moment */
FIXTURE_TEST(limits_change, LARGE(4 * MiB), .align = 512)
{
    append_ok(t, 1000);
    flush_ok(t);
    assert_writes(t, { 0, 1024 });

    disk_set_limits(t->disk_bs, 4096, 128 * KiB);
    append_ok(t, 300000);
    flush_ok(t);
    assert_writes(t, { 0, 128 * KiB }, { 128 * KiB, 128 * KiB },
                  { 256 * KiB, 40 * KiB });
    assert_stat(t, issued_requests, ==, 4);

    disk_set_limits(t->disk_bs, 512, 0);
    append_ok(t, 1000);
    flush_ok(t);
    /* 301000 is in the block that starts at 300544, 302000 ends at 302080 */
    assert_writes(t, { 300544, 1536 });
}

/* A request that begins inside a cluster is not delayed until it is longer */
FIXTURE_TEST(full_request, LARGE(8 * MiB), .align = 512)
{
    append_ok(t, 1000);
    flush_ok(t);
    assert_writes(t, { 0, 1024 });
    append_ok(t, MiB - 1001);
    assert_no_writes(t);
    append_ok(t, 1);
    assert_writes(t, { 512, MiB - 512 });
    append_ok(t, MiB - 1);
    assert_no_writes(t);
    append_ok(t, 1);
    assert_writes(t, { MiB, MiB });
}

/* Clusters smaller than a block of the child: blocks are still written once */
FIXTURE_TEST(large_alignment, .cluster_size = 512, .cache_size = 64 * KiB,
        .align = 4096)
{
    while (t->alloc < 256 * KiB) {
        append_ok(t, 100);
    }
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    g_assert_cmpuint(t->disk->nb.writes, ==, 8);
}

/* Where padding is not allowed, the neighbouring bytes stay what they are */
FIXTURE_TEST(no_pad, LARGE(MiB), .no_pad = true, .align = 4096)
{
    fill_disk(t);
    write_ok(t, 10000, 100000);
    wb_end_streams(t->wb);
    flush_ok(t);
    assert_writes(t, { 8192, 102400 });
}

/* ---- Flush ---- */

FIXTURE_TEST(flush, LARGE(MiB), .align = 512)
{
    /* Nothing to do */
    flush_ok(t);
    assert_no_writes(t);

    /* Two streams, both unfinished, and one cluster that is finished */
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 64 * KiB + 10);
    assert_no_writes(t);
    flush_ok(t);
    assert_writes(t, { 0, 1024 }, { MiB, 64 * KiB + 512 });
    assert_all_on_disk(t);

    /* Nothing new */
    flush_ok(t);
    assert_no_writes(t);

    /* Only the new part, which starts in the block that was written last */
    g_assert_true(wb_continues(t->wb, 1000));
    write_ok(t, 1000, 3000);
    flush_ok(t);
    assert_writes(t, { 512, 3584 });
    assert_all_on_disk(t);

    /* Both flushed streams can go on to the end of their clusters */
    write_ok(t, 4000, 64 * KiB - 4000);
    write_ok(t, MiB + 64 * KiB + 10, 10);
    flush_ok(t);
    assert_writes(t, { 3584, 64 * KiB - 3584 }, { MiB + 64 * KiB, 512 });
}

/* The functions that can be called from the main loop do the same */
FIXTURE_TEST(not_in_coroutine, LARGE(MiB))
{
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 1000);
    wb_discard(t->bs, t->wb, 1, 1);
    memset(t->shadow, 0, 1000);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, 0);
    assert_writes(t, { MiB, 1000 });

    disk_set_error(t->disk, ENOSPC);
    write_ok(t, 0, 1000);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, -ENOSPC);
    disk_set_error(t->disk, 0);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, 0);
    assert_all_on_disk(t);
}

/* A flush waits for what is in flight, and does not write it once more */
FIXTURE_TEST(flush_in_flight, LARGE(512 * KiB))
{
    TestOp *first, *second;

    disk_hold(t->disk);
    append_ok(t, 256 * KiB);
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    first = start(t, op_flush);
    assert_waits(first);
    assert_writes(t, { 0, 256 * KiB });

    /* The first flush does not wait for what comes after it */
    append_ok(t, 1000);
    second = start(t, op_flush);
    assert_held(t, 2);
    disk_release_one(t->disk);
    assert_waits(second);
    g_assert_true(op_done(first));

    disk_release(t->disk);
    finish(first, 0);
    finish(second, 0);
    assert_writes(t, { 256 * KiB, 1000 });
    assert_all_on_disk(t);
}

/* A flush writes the stream as it was; what came later is for the next one */
FIXTURE_TEST(flush_growing, LARGE(MiB), .align = 512)
{
    TestOp *flush;

    append_ok(t, 1024);
    disk_hold(t->disk);
    flush = start(t, op_flush);
    append_ok(t, 1024);
    disk_release(t->disk);
    finish(flush, 0);
    assert_on_disk(t, 0, 1024);
    assert_writes(t, { 0, 1024 });

    flush_ok(t);
    assert_on_disk(t, 0, 2048);
    assert_writes(t, { 1024, 1024 });
    assert_stat(t, partial_flushes, ==, 2);
}

/* The same while it has to wait for other requests */
FIXTURE_TEST(flush_growing_later, LARGE(MiB), .max_streams = 8, .align = 512)
{
    TestOp *flush;

    for (int i = 0; i < 5; i++) {
        write_ok(t, i * MiB, 1024);
    }
    disk_hold(t->disk);
    flush = start(t, op_flush);
    assert_held(t, 4);
    write_ok(t, 4 * MiB + 1024, 1024);
    disk_release(t->disk);
    finish(flush, 0);
    settle();
    assert_writes(t, { 0, 1024 }, { MiB, 1024 }, { 2 * MiB, 1024 },
                  { 3 * MiB, 1024 }, { 4 * MiB, 1024 });
    assert_stat(t, partial_flushes, ==, 5);

    flush_ok(t);
    assert_writes(t, { 4 * MiB + 1024, 1024 });
}

typedef struct Streaming {
    TestOp op;
    bool stop;
} Streaming;

static int coroutine_fn op_stream(TestOp *op)
{
    Streaming *s = container_of(op, Streaming, op);
    TestOp append = { .t = op->t, .bytes = op->bytes, .gen = op->gen };
    int ret = 0;

    while (!s->stop && ret == 0) {
        g_assert_cmpint(op->t->alloc, <, DISK_SIZE - op->bytes);
        ret = op_append(&append);
        co_hop();
    }
    return ret;
}

/* A flush ends though somebody writes all the time */
FIXTURE_TEST(flush_terminates, SMALL(16), .align = 512)
{
    Streaming s = {
        .op = { .t = t, .fn = op_stream, .bytes = 700, .gen = 1 },
    };
    unsigned nb_overtaken = 0;

    t->disk->max_hops = 3;
    op_start(&s.op);
    for (int i = 0; i < 100; i++) {
        int64_t accepted = t->alloc;

        /* Let there be something to flush */
        while (t->alloc == accepted) {
            aio_poll(qemu_get_aio_context(), true);
        }
        accepted = t->alloc;
        flush_ok(t);
        assert_on_disk(t, 0, accepted);
        g_assert_false(op_done(&s.op));
        nb_overtaken += t->alloc > accepted;
    }
    g_assert_cmpuint(nb_overtaken, >, 50);

    s.stop = true;
    finish(&s.op, 0);
}

/* ---- The bound, and waiting for room ---- */

/* Many writers in a small cache all get through, and in their order */
FIXTURE_CASES(bound,
         { .cluster_size = 512, .cache_size = 1024, .max_streams = 1,
           .align = 512 },
         { .cluster_size = 512, .cache_size = 4096, .align = 512 },
         { SMALL(2), .max_streams = 1, .align = 512 },
         { SMALL(2), .max_streams = 8, .align = 512 })
{
    TestOp ops[64];
    bool waited = false;
    int64_t offset = 0;

    disk_hold(t->disk);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .gen = i,
            .bytes = 1 + (i * 377) % (config->cache_size / 2),
        };
    }
    ops_start(ops, ARRAY_SIZE(ops));

    while (!ops_done(ops, ARRAY_SIZE(ops))) {
        settle();
        assert_stat(t, cached_bytes, <=, config->cache_size);
        assert_stat(t, max_cached_bytes, <=, config->cache_size);
        if (!ops_done(ops, ARRAY_SIZE(ops))) {
            waited = true;
            g_assert_cmpuint(t->disk->nb_held, >, 0);
            disk_release_one(t->disk);
        }
    }
    disk_release(t->disk);
    settle();

    g_assert_true(waited);
    g_assert_cmpuint(t->disk->max_in_flight, <=, 4);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        /* First come, first served */
        finish(&ops[i], 0);
        g_assert_cmpint(ops[i].offset, >=, offset);
        offset = ops[i].offset + ops[i].bytes;
    }
}

/* Memory is counted in clusters, not in bytes */
FIXTURE_TEST(bound_clusters, SMALL(4), .max_streams = 100)
{
    TestOp ops[16];
    unsigned n, nb_released;

    disk_hold(t->disk);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_write, .offset = i * 8192, .bytes = 1, .gen = i,
        };
    }
    ops_start(ops, ARRAY_SIZE(ops));

    /* Each write to the disk makes room for one more */
    for (nb_released = 0; ; nb_released++) {
        settle();
        for (n = 0; n < ARRAY_SIZE(ops) && op_done(&ops[n]); n++) {
            finish(&ops[n], 0);
        }
        g_assert_cmpuint(n, ==, 4 + nb_released);
        assert_stat(t, cached_bytes, ==, 4);
        if (n == ARRAY_SIZE(ops)) {
            break;
        }
        for (unsigned i = n; i < ARRAY_SIZE(ops); i++) {
            g_assert_false(op_done(&ops[i]));
        }
        disk_release_one(t->disk);
    }
}

/* Who needs much is not overtaken by those who need little */
FIXTURE_TEST(reserve_order, SMALL(8))
{
    TestOp *large, *small;

    reserve_ok(t, 5);
    large = start(t, op_reserve, .nb_clusters = 4);
    small = start(t, op_reserve, .nb_clusters = 1);
    assert_waits(large);
    assert_waits(small);

    unreserve(t, 5);
    finish(large, 0);
    finish(small, 0);
    unreserve(t, 4);
    unreserve(t, 1);

    /* All of it is possible, and what never fits is refused */
    run_fails(t, -EINVAL, op_reserve, .nb_clusters = 9);
    run_fails(t, -EINVAL, op_reserve, .nb_clusters = UINT64_MAX);
    reserve_ok(t, 0);
    reserve_ok(t, 8);
    unreserve(t, 8);
    unreserve(t, 0);
}

/* Streams are ended only if there is no other way, and the oldest first */
FIXTURE_TEST(streams_end, SMALL(3))
{
    write_ok(t, 0, 100);
    write_ok(t, MiB, 100);
    write_ok(t, 2 * MiB, 4096);
    g_assert_true(wb_continues(t->wb, 100));
    g_assert_true(wb_continues(t->wb, MiB + 100));

    /* There is a finished cluster that can go */
    write_ok(t, 2 * MiB + 4096, 4096);
    g_assert_true(wb_continues(t->wb, 100));
    g_assert_true(wb_continues(t->wb, MiB + 100));

    /* Both that are finished can, but one stream must */
    reserve_ok(t, 2);
    g_assert_false(wb_continues(t->wb, 100));
    g_assert_true(wb_continues(t->wb, MiB + 100));
    unreserve(t, 2);
    assert_on_disk(t, 0, MiB);
}

/* While a reservation is outstanding, what it counts on stays */
FIXTURE_TEST(streams_stay, SMALL(2))
{
    TestOp *waiter;

    write_ok(t, 0, 100);
    reserve_ok(t, 1);
    waiter = start(t, op_reserve, .nb_clusters = 1);
    wb_end_streams(t->wb);
    flush_ok(t);
    assert_waits(waiter);
    g_assert_true(wb_continues(t->wb, 100));

    /* That needs no new cluster, so there is room for the other */
    run_ok(t, op_accept, .nb_clusters = 1, .offset = 100, .bytes = 100);
    finish(waiter, 0);
    g_assert_true(wb_continues(t->wb, 200));
    unreserve(t, 1);

    /* Where it does need one, the waiter gets that of the stream */
    reserve_ok(t, 1);
    waiter = start(t, op_reserve, .nb_clusters = 1);
    assert_waits(waiter);
    run_ok(t, op_accept, .nb_clusters = 1, .offset = MiB, .bytes = 100);
    finish(waiter, 0);
    g_assert_false(wb_continues(t->wb, 200));
    g_assert_true(wb_continues(t->wb, MiB + 100));

    /* A write that is refused uses its reservation up as well */
    run_fails(t, -EBUSY, op_accept, .nb_clusters = 1, .offset = MiB + 200,
              .bytes = 1);
    reserve_ok(t, 2);
    unreserve(t, 2);
}

/* Writes that would need more than one run in a cluster change nothing */
FIXTURE_TEST(refused, SMALL(16))
{
    static const DiskWrite bad[] = {
        { 4096, 10 },           /* before a run */
        { 5000, 10 },           /* its start again */
        { 5050, 100 },          /* in the middle */
        { 5101, 10 },           /* after a gap */
        { 0, 8192 },            /* across it */
        { 5100, 8192 },         /* continues it, but reaches another */
        { 3 * 4096 - 1, 2 },    /* reaches a finished one */
        { 3 * 4096, 1 },        /* starts in that */
    };

    write_ok(t, 5000, 100);
    write_ok(t, 3 * 4096, 4096);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        run_fails(t, -EBUSY, op_write, .offset = bad[i].offset,
                  .bytes = bad[i].bytes, .gen = 9);
        read_ok(t, 0, 64 * KiB);
        assert_stat(t, cached_bytes, ==, 100 + 4096);
    }
    write_ok(t, 5100, 3 * 4096 - 5100);
}

/* ---- Errors ---- */

/* All writes but the next one fail */
static void fail_after_next(Test *t, int error)
{
    disk_set_fault(t->disk, (DiskFault) {
        .kinds = DISK_WRITE, .first = 2, .lasting = true, .error = error,
    });
}

static void start_all_held(Test *t, TestOp *ops, unsigned n, unsigned nb_held)
{
    disk_hold(t->disk);
    ops_start(ops, n);
    assert_held(t, nb_held);
    disk_release(t->disk);
}

/* After an error, all who come share one attempt, and data stays readable */
FIXTURE_TEST(error_shared, LARGE(4 * MiB))
{
    TestOp ops[] = {
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_reserve, .nb_clusters = 1 },
        { .t = t, .fn = op_append, .bytes = 1000 },
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_reserve, .nb_clusters = 1 },
    };
    static const int errors[] = { EIO, ENOSPC, EIO };
    int64_t accepted = 2 * MiB + 1000;

    disk_hold(t->disk);
    append_ok(t, accepted);
    assert_held(t, 2);
    fail_after_next(t, EIO);
    disk_release(t->disk);
    settle();
    disk_set_fault(t->disk, (DiskFault) { 0 });
    /* One of the two failed; nobody tries again by himself */
    g_assert_cmpuint(t->disk->nb.writes, ==, 2);
    assert_stat(t, errors, ==, 1);
    read_all(t);

    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        disk_set_error(t->disk, errors[i]);
        start_all_held(t, ops, ARRAY_SIZE(ops), 1);
        ops_finish(ops, ARRAY_SIZE(ops), -errors[i]);
        g_assert_cmpuint(t->disk->nb.writes, ==, 3 + i);
        assert_stat(t, errors, ==, 2 + i);
        g_assert_cmpint(t->alloc, ==, accepted);
        read_all(t);
    }

    /* The attempt that succeeds clears the error for all */
    disk_set_error(t->disk, 0);
    start_all_held(t, ops, ARRAY_SIZE(ops), 1);
    ops_finish(ops, ARRAY_SIZE(ops), 0);
    unreserve(t, 2);
    assert_on_disk(t, 0, accepted);
    assert_stat(t, errors, ==, 4);
}

/* The success of another request does not mean that the failed one is there */
FIXTURE_TEST(error_kept, LARGE(4 * MiB))
{
    disk_hold(t->disk);
    append_ok(t, 2 * MiB);
    assert_held(t, 2);
    disk_set_error(t->disk, EIO);
    disk_release_one(t->disk);
    settle();
    disk_set_error(t->disk, 0);
    disk_release(t->disk);
    settle();
    assert_on_disk(t, MiB, MiB);
    assert_writes(t, { 0, MiB }, { MiB, MiB });

    /* There is room, but first the failed one is tried once more */
    disk_set_error(t->disk, ENOSPC);
    run_fails(t, -ENOSPC, op_append, .bytes = 1);
    assert_writes(t, { 0, MiB });
    disk_set_error(t->disk, 0);
    append_ok(t, 1);
    assert_writes(t, { 0, MiB });
    flush_ok(t);
    assert_all_on_disk(t);

    /* Now several requests are in flight again, and nobody waits for them */
    disk_hold(t->disk);
    append_ok(t, 2 * MiB);
    assert_held(t, 2);
}

/* A flush stops at the first failure; an error is not forgotten by success */
FIXTURE_TEST(error_fails_fast, LARGE(MiB), .max_streams = 8)
{
    TestOp flush[2] = {
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_flush },
    };
    unsigned n;

    for (int i = 0; i < 7; i++) {
        write_ok(t, i * MiB, 1000);
    }
    fail_flush(t, EIO);
    n = t->disk->nb.writes;
    g_assert_cmpuint(n, <=, 4);

    /* One that succeeds and one that fails: not all is written */
    disk_set_error(t->disk, 0);
    fail_after_next(t, ENOSPC);
    run_fails(t, -ENOSPC, op_flush);
    g_assert_cmpuint(t->disk->nb.writes, >=, n + 2);
    g_assert_cmpuint(t->disk->nb.writes, <=, n + 5);
    read_all(t);

    /* After one that succeeds, there is no need to be careful */
    disk_set_fault(t->disk, (DiskFault) { 0 });
    disk_hold(t->disk);
    ops_start(flush, 2);
    assert_held(t, 1);
    disk_release_one(t->disk);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 1);
    disk_release(t->disk);
    ops_finish(flush, 2, 0);
    assert_all_on_disk(t);
    forget_writes(t);
    flush_ok(t);
    assert_no_writes(t);

    /* The streams survived */
    for (int i = 0; i < 7; i++) {
        write_ok(t, i * MiB + 1000, 1000);
    }
}

/* With a full cache all writers get the error; what was refused is retried */
FIXTURE_TEST(error_full, SMALL(4))
{
    TestOp ops[16];
    unsigned nb_failed = 0;

    disk_set_error(t->disk, ENOSPC);
    disk_hold(t->disk);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_write, .offset = i * 4096, .bytes = 4096,
            .gen = i,
        };
    }
    ops_start(ops, ARRAY_SIZE(ops));
    settle();
    disk_release(t->disk);
    settle();
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        g_assert_true(op_done(&ops[i]));
        if (ops[i].ret) {
            finish(&ops[i], -ENOSPC);
            nb_failed++;
        }
    }
    g_assert_cmpuint(nb_failed, ==, ARRAY_SIZE(ops) - 4);
    read_all(t);

    /* It is the same at any later time */
    run_fails(t, -ENOSPC, op_write, .offset = MiB, .bytes = 1);
    run_fails(t, -ENOSPC, op_flush);

    disk_set_error(t->disk, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        if (ops[i].ret) {
            finish(op_start(&ops[i]), 0);
        }
    }
    flush_ok(t);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        uint8_t buf[4096];

        fill(buf, ops[i].offset, sizeof(buf), ops[i].gen);
        assert_bytes(t->disk->data + ops[i].offset, buf, ops[i].offset,
                     sizeof(buf), "disk");
    }
}

/* A reservation made before the error can be used after it */
FIXTURE_TEST(error_reserved, SMALL(16))
{
    TestOp *waiter;

    reserve_ok(t, 1);
    reserve_ok(t, 2);
    waiter = start(t, op_reserve, .nb_clusters = 16);
    assert_waits(waiter);

    run_ok(t, op_accept, .nb_clusters = 1, .offset = MiB, .bytes = 100);
    fail_flush(t, EIO);
    finish(waiter, -EIO);
    run_ok(t, op_accept, .nb_clusters = 2, .offset = 2 * MiB, .bytes = 5000);
    read_all(t);

    disk_set_error(t->disk, 0);
    reserve_ok(t, 16);
    unreserve(t, 16);
    assert_all_on_disk(t);
}

/* ---- Drain ---- */

/* One node is drained, or all; writers wait for room */
FIXTURE_CASES(drain, { SMALL(16) }, { SMALL(16), .param = true })
{
    bool all = config->param;
    TestOp ops[8];
    unsigned n;

    t->disk->max_hops = 3;
    disk_hold(t->disk);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .bytes = 5 * 4096, .gen = i,
        };
    }
    ops_start(ops, ARRAY_SIZE(ops));
    assert_waits(&ops[ARRAY_SIZE(ops) - 1]);
    g_assert_cmpuint(t->disk->nb_held, >, 0);

    /* Nobody but the waiters themselves can write for them now */
    if (all) {
        disk_release_later(t->disk);
        bdrv_drain_all_begin();
        g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    } else {
        drain_held(t);
    }
    g_assert_true(ops_done(ops, ARRAY_SIZE(ops)));
    ops_finish(ops, ARRAY_SIZE(ops), 0);

    /* What is accepted in the drained section is written after it */
    flush_ok(t);
    n = t->disk->nb.writes;
    append_ok(t, 8 * 4096);
    settle();
    g_assert_cmpuint(t->disk->nb.writes, ==, n);

    if (all) {
        bdrv_drain_all_end();
    } else {
        bdrv_drained_end(t->bs);
    }
    append_ok(t, 1);
    settle();
    g_assert_cmpuint(t->disk->nb.writes, >, n);
}

/* The cache is so full that four requests are in flight, and more to come */
#define BUSY SMALL(64), .max_transfer = 4096, .busy = true

/*
 * A drain waits for what is in flight, not for all that is worth writing; also
 * on a node that failed as corrupt, which is not told of the drain
 */
FIXTURE_CASES(drain_rest, { BUSY }, { BUSY, .param = true })
{
    if (config->param) {
        t->bs->drv = NULL;
    }
    drain_held(t);
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);
    bdrv_drained_end(t->bs);
    t->bs->drv = &bdrv_node;

    if (!config->param) {
        append_ok(t, 1);
        settle();
        g_assert_cmpuint(t->disk->nb.writes, ==, 60);
    }
}

static void coroutine_fn co_create_qcow2(void *opaque)
{
    bool *done = opaque;
    BlockdevRef file = {
        .type = QTYPE_QSTRING, .u.reference = (char *)"image",
    };
    BlockdevCreateOptions opts = {
        .driver = BLOCKDEV_DRIVER_QCOW2,
        .u.qcow2 = {
            .file = &file,
            .size = 2 * MiB,
            .has_cluster_size = true,
            .cluster_size = 4096,
        },
    };

    bdrv_find_format("qcow2")->bdrv_co_create(&opts, &error_abort);
    *done = true;
}

/* qcow2 tells its cache, as the node of this test does */
FIXTURE_TEST(drain_qcow2, SMALL(2), .max_transfer = 4096)
{
    BlockDriverState *disk_bs = new_disk("image", t->config);
    Disk *d = disk_bs->opaque;
    QDict *opts = qdict_new();
    BlockBackend *blk;
    uint8_t buf[4096];
    bool done = false;
    unsigned n = 0;

    qemu_coroutine_enter(qemu_coroutine_create(co_create_qcow2, &done));
    AIO_WAIT_WHILE_UNLOCKED(NULL, !done);

    qdict_put_str(opts, "driver", "qcow2");
    qdict_put_str(opts, "file", "image");
    qdict_put_str(opts, "compressed-cache-size", "512k");
    blk = blk_new_open(NULL, NULL, opts, BDRV_O_RDWR, &error_abort);
    for (unsigned i = 0; i < 200; i++) {
        /* Compresses to a little more than half of its size */
        for (unsigned j = 0; j < sizeof(buf); j++) {
            buf[j] = g_rand_int(d->rand) & 15;
        }
        g_assert_cmpint(blk_pwrite_compressed(blk, i * sizeof(buf), sizeof(buf),
                                              buf), ==, 0);
        if (i == 0) {
            /* There is an L2 table now */
            n = d->nb.writes;
            disk_hold(d);
        }
    }
    settle();
    g_assert_cmpuint(d->nb_held, ==, 4);

    disk_release_later(d);
    bdrv_drained_begin(blk_bs(blk));
    g_assert_cmpuint(d->nb.writes, ==, n + 4);
    bdrv_drained_end(blk_bs(blk));

    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmpuint(d->nb.writes, >, n + 20);
    blk_unref(blk);
    bdrv_unref(disk_bs);
}

/* A cache that is created in a drained section writes nothing before its end */
FIXTURE_TEST(drain_new, SMALL(16))
{
    bdrv_drain_all_begin();
    test_new_wb(t);
    bdrv_drained_begin(t->bs);
    bdrv_drained_end(t->bs);
    append_ok(t, 10 * 4096);
    settle();
    assert_no_writes(t);
    bdrv_drain_all_end();

    append_ok(t, 1);
    settle();
    assert_writes(t, { 0, 8 * 4096 });
}

/* A drain ends though nothing can be written, and a flush in it works */
FIXTURE_TEST(drain_error, SMALL(16))
{
    disk_hold(t->disk);
    append_ok(t, 15 * 4096 + 1);
    disk_set_error(t->disk, EIO);
    drain_held(t);
    assert_stat(t, cached_bytes, ==, 15 * 4096 + 1);

    fail_flush(t, EIO);
    disk_set_error(t->disk, 0);
    flush_ok(t);
    assert_all_on_disk(t);
    bdrv_drained_end(t->bs);
}

/* ---- Discard ---- */

FIXTURE_TEST(discard, SMALL(256))
{
    fill_disk(t);

    /* Nothing cached, in a range of any size */
    wb_discard(t->bs, t->wb, 0, INT64_MAX);
    wb_discard(t->bs, t->wb, 5, 0);

    /* Never written: not at all, not even by a flush */
    write_ok(t, 1000, 20000);
    discard_ok(t, 0, 24 * KiB);
    flush_ok(t);
    assert_no_writes(t);
    assert_stat(t, cached_bytes, ==, 0);
    read_ok(t, 0, 64 * KiB);

    /* Only the clusters that the range touches */
    write_ok(t, 0, 4 * 4096);
    wb_discard(t->bs, t->wb, 4095, 2);
    memset(t->shadow, 0, 2 * 4096);
    read_ok(t, 0, 64 * KiB);
    flush_ok(t);
    assert_writes(t, { 2 * 4096, 2 * 4096 });
    assert_all_on_disk(t);

    /* A stream that was flushed and is open */
    write_ok(t, MiB, 1000);
    flush_ok(t);
    assert_writes(t, { MiB, 1000 });
    discard_ok(t, MiB, 4096);
    g_assert_false(wb_continues(t->wb, MiB + 1000));
    read_ok(t, MiB, 4096);
    flush_ok(t);
    assert_no_writes(t);
    write_ok(t, MiB + 10, 10);
    flush_ok(t);
    assert_writes(t, { MiB + 10, 10 });
}

/* The space can be used by others as soon as a discard returns */
FIXTURE_TEST(discard_in_flight, SMALL(8))
{
    TestOp *flush, *discard;
    uint8_t byte;

    disk_hold(t->disk);
    append_ok(t, 4 * 4096);
    flush = start(t, op_flush);
    assert_held(t, 1);

    discard = start(t, op_discard, .offset = 4096, .bytes = 4096);
    assert_waits(discard);
    /* Other space does not wait, and the rest of the request is cached */
    discard_ok(t, MiB, MiB);
    read_ok(t, 0, 4096);
    read_ok(t, 2 * 4096, 2 * 4096);
    g_assert_cmpint(blk_pread(t->blk, 4096, 1, &byte, 0), ==, 0);
    g_assert_cmpint(byte, ==, 0);

    /* op_discard() has the disk write zeroes, so nothing may come after it */
    disk_release(t->disk);
    finish(discard, 0);
    finish(flush, 0);
    flush_ok(t);
    assert_writes(t, { 0, 4 * 4096 });
}

/* The same for a stream that is being flushed, and that goes on meanwhile */
FIXTURE_TEST(discard_stream_in_flight, SMALL(8))
{
    TestOp *flush, *discard;

    disk_hold(t->disk);
    append_ok(t, 100);
    flush = start(t, op_flush);
    settle();
    append_ok(t, 100);
    discard = start(t, op_discard, .bytes = 4096);
    assert_waits(discard);
    g_assert_false(wb_continues(t->wb, 200));
    run_fails(t, -EBUSY, op_write, .offset = 0, .bytes = 1);

    disk_release(t->disk);
    finish(discard, 0);
    finish(flush, 0);
    write_ok(t, 0, 50);
    read_ok(t, 0, 4096);
    flush_ok(t);
    assert_writes(t, { 0, 100 }, { 0, 50 });
}

/* What was discarded is not tried again, and its error is gone with it */
FIXTURE_TEST(discard_failed, SMALL(4))
{
    TestOp *discard;

    /* Failed before */
    disk_set_error(t->disk, EIO);
    append_ok(t, 2 * 4096);
    settle();
    assert_writes(t, { 0, 2 * 4096 });
    discard_ok(t, 0, 2 * 4096);
    flush_ok(t);
    append_ok(t, 1);
    assert_no_writes(t);
    disk_set_error(t->disk, 0);
    flush_ok(t);
    assert_writes(t, { 2 * 4096, 1 });

    /* Fails afterwards */
    disk_set_error(t->disk, EIO);
    disk_hold(t->disk);
    write_ok(t, MiB, 2 * 4096);
    discard = start(t, op_discard, .offset = MiB, .bytes = 2 * 4096);
    assert_waits(discard);
    disk_release(t->disk);
    finish(discard, 0);
    assert_writes(t, { MiB, 2 * 4096 });
    flush_ok(t);
    write_ok(t, MiB, 100);
    assert_no_writes(t);

    /* Of a full cache: there is room again for who comes next */
    disk_set_error(t->disk, 0);
    flush_ok(t);
    discard_ok(t, 0, DISK_SIZE);
    disk_set_error(t->disk, EIO);
    write_ok(t, 0, 4 * 4096);
    settle();
    run_fails(t, -EIO, op_write, .offset = MiB, .bytes = 1);
    discard_ok(t, 0, DISK_SIZE);
    write_ok(t, MiB, 4 * 4096 - 1);
}

/* A discard in a full cache lets those go on who wait for room */
FIXTURE_TEST(discard_makes_room, SMALL(4))
{
    TestOp *waiter;

    reserve_ok(t, 3);
    write_ok(t, 0, 10);
    waiter = start(t, op_write, .offset = MiB, .bytes = 10);
    assert_waits(waiter);
    discard_ok(t, 0, 4096);
    finish(waiter, 0);
    unreserve(t, 3);
    assert_no_writes(t);
}

/* ---- Reading ---- */

static void read_everywhere(Test *t)
{
    static const int64_t bounds[] = {
        0, 1, 999, 1000, 1001, 4095, 4096, 4097, 8999, 9000, 9001, 16383,
        16384, 16484, 20479, 20480, 24576, 24577, 32768,
    };
    static const unsigned pieces[] = { 0, 1, 512, 4095, 4096, 5000 };

    for (int i = 0; i < ARRAY_SIZE(bounds); i++) {
        for (int j = i + 1; j < ARRAY_SIZE(bounds); j++) {
            for (int k = 0; k < ARRAY_SIZE(pieces); k++) {
                int64_t bytes = bounds[j] - bounds[i];

                if (!pieces[k] || bytes / pieces[k] < IOV_MAX) {
                    run_ok(t, op_read, .offset = bounds[i], .bytes = bytes,
                           .gen = pieces[k]);
                }
            }
        }
    }
}

/* Cached bytes from the cache, the others from the disk, at any boundary */
FIXTURE_TEST(read, SMALL(256), .no_pad = true, .align = 512)
{
    TestOp *flush;

    fill_disk(t);
    write_ok(t, 1000, 8000);    /* across clusters */
    write_ok(t, 16384, 100);    /* the start of one */
    write_ok(t, 20480, 4096);   /* all of one */
    read_everywhere(t);

    /* From one side of a boundary only: no need for the disk */
    disk_reset_counts(t->disk);
    read_ok(t, 1000, 8000);
    read_ok(t, 20480, 4096);
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    /* One request for each gap, however the buffers are cut */
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 100);
    g_assert_cmpuint(t->disk->nb.reads, ==, 4);

    /* What is in flight; without blocks, or reads would have to wait for it */
    disk_set_limits(t->disk_bs, 1, 0);
    disk_hold(t->disk);
    flush = start(t, op_flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    read_everywhere(t);
    disk_release(t->disk);
    finish(flush, 0);
    read_everywhere(t);
}

/* What padding is going to overwrite does not come from the disk */
FIXTURE_TEST(read_padding, SMALL(256), .align = 512)
{
    fill_disk(t);
    write_ok(t, 1000, 8000);
    memset(t->shadow + 9000, 0, 12288 - 9000);
    disk_reset_counts(t->disk);
    read_ok(t, 1000, 12288 - 1000);
    run_ok(t, op_read, .offset = 8000, .bytes = 4000, .gen = 100);
    g_assert_cmpuint(t->disk->nb.reads, ==, 0);
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 5000);
    g_assert_cmpuint(t->disk->nb.reads, ==, 2);
    t->unchecked = true;
}

FIXTURE_TEST(gap, SMALL(256))
{
    write_ok(t, 1000, 8000);
    g_assert_cmpint(wb_gap(t->wb, 0, 1000), ==, 1000);
    g_assert_cmpint(wb_gap(t->wb, 0, 1001), ==, 1000);
    g_assert_cmpint(wb_gap(t->wb, 0, DISK_SIZE), ==, 1000);
    g_assert_cmpint(wb_gap(t->wb, 5000, 1), ==, 0);
    g_assert_cmpint(wb_gap(t->wb, 8999, 1), ==, 0);
    g_assert_cmpint(wb_gap(t->wb, 9000, DISK_SIZE), ==, DISK_SIZE);

    /* The stream's last cluster is open and stays */
    flush_ok(t);
    g_assert_cmpint(wb_gap(t->wb, 0, 8192), ==, 8192);
    g_assert_cmpint(wb_gap(t->wb, 8191, 2), ==, 1);
    wb_end_streams(t->wb);
    g_assert_cmpint(wb_gap(t->wb, 0, DISK_SIZE), ==, DISK_SIZE);
}

/* ---- The child ---- */

/* Without a child the data stays; with a new one it goes there */
FIXTURE_TEST(child, SMALL(4), .align = 512)
{
    BlockDriverState *old_bs = t->disk_bs;

    write_ok(t, 0, 1000);
    test_detach(t);
    read_ok(t, 0, 1000);
    run_fails(t, -ENOMEDIUM, op_read, .offset = 0, .bytes = 4097);
    run_fails(t, -ENOMEDIUM, op_flush);
    run_fails(t, -ENOMEDIUM, op_write, .offset = MiB, .bytes = 4 * 4096);
    read_ok(t, 0, 1000);
    assert_no_writes(t);
    bdrv_unref(old_bs);

    t->disk_bs = new_disk("new", &(TestConfig) { .align = 4096 });
    t->disk = t->disk_bs->opaque;
    test_attach(t);
    write_ok(t, MiB, 4 * 4096);
    flush_ok(t);
    assert_writes(t, { 0, 4096 }, { MiB, 2 * 4096 },
                  { MiB + 2 * 4096, 2 * 4096 });
}

/* ---- Statistics ---- */

FIXTURE_TEST(stats, SMALL(5), .no_pad = true)
{
    WriteBehindOptions opts = {
        .cache_size = 5 * 4096 + 100,
        .cluster_size = 4096,
        .max_streams = 1,
    };
    WriteBehind *wb;

    /* The size is in whole clusters */
    wb = wb_new(t->bs, &opts);
    g_assert_cmpint(wb_cache_size(wb), ==, 5 * 4096);
    wb_free(wb);
    wb_free(NULL);

    append_ok(t, 100);
    append_ok(t, 200);
    flush_ok(t);                /* 300 bytes */
    append_ok(t, 4096);
    read_ok(t, 0, 10);          /* a hit */
    read_ok(t, 4390, 100);      /* 6 bytes of it */
    read_ok(t, MiB, 10);        /* none */
    fail_flush(t, EIO);
    disk_set_error(t->disk, 0);
    flush_ok(t);                /* 4096 bytes; 300 of them stay in the cache */
    run_fails(t, -EBUSY, op_write, .offset = 4100, .bytes = 5);
    write_ok(t, MiB, 4000);

    assert_stat(t, cache_size, ==, 5 * 4096);
    assert_stat(t, cached_bytes, ==, 4300);
    assert_stat(t, unwritten_bytes, ==, 4000);
    assert_stat(t, max_cached_bytes, ==, 4396);
    assert_stat(t, accepted_requests, ==, 4);
    assert_stat(t, accepted_bytes, ==, 8396);
    assert_stat(t, issued_requests, ==, 3);
    assert_stat(t, issued_bytes, ==, 4396);
    assert_stat(t, partial_flushes, ==, 3);
    assert_stat(t, read_hits, ==, 2);
    assert_stat(t, read_hit_bytes, ==, 16);
    assert_stat(t, errors, ==, 1);
}

/* What is in flight is not written yet, what is discarded never will be */
FIXTURE_TEST(stats_unwritten, SMALL(8))
{
    disk_hold(t->disk);
    append_ok(t, 8 * 4096);
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    assert_stat(t, unwritten_bytes, ==, 8 * 4096);
    disk_release(t->disk);
    flush_ok(t);
    assert_stat(t, unwritten_bytes, ==, 0);
    assert_stat(t, cached_bytes, ==, 0);

    append_ok(t, 1000);
    assert_stat(t, unwritten_bytes, ==, 1000);
    flush_ok(t);
    assert_stat(t, unwritten_bytes, ==, 0);
    assert_stat(t, cached_bytes, ==, 1000);
    run_ok(t, op_co_write, .offset = 8 * 4096 + 100, .bytes = 200, .gen = 2);
    assert_stat(t, unwritten_bytes, ==, 900);
    append_ok(t, 10);
    assert_stat(t, unwritten_bytes, ==, 910);
    discard_ok(t, 8 * 4096, 4096);
    assert_stat(t, unwritten_bytes, ==, 0);
}

/* ---- Age ---- */

/* Let more time go by than data may take to get old, or to try again */
static void pass_time(void)
{
    g_usleep(2000);
    qemu_clock_run_timers(QEMU_CLOCK_REALTIME);
    settle();
}

/* For what needs the timer several times; ends if nothing happens at all */
static void wait_for_writes(Test *t, unsigned n)
{
    for (unsigned i = 0; i < 30000 && t->disk->log->len < n; i++) {
        pass_time();
    }
    g_assert_cmpuint(t->disk->log->len, ==, n);
}

/* Nothing is written, however much time goes by */
static void assert_no_writes_later(Test *t)
{
    pass_time();
    pass_time();
    assert_no_writes(t);
}

#define AGE SMALL(64), .max_age_ms = 1

/* What nobody flushes is written nevertheless, once, and not padded */
FIXTURE_TEST(age, AGE, .align = 512)
{
    append_ok(t, 1000);
    settle();
    assert_no_writes(t);
    assert_stat(t, unwritten_bytes, ==, 1000);
    pass_time();
    /* The block layer reads what it needs for a whole block */
    g_assert_cmpuint(t->disk->nb.reads, ==, 1);
    assert_writes(t, { 0, 1024 });
    assert_all_on_disk(t);
    assert_stat(t, unwritten_bytes, ==, 0);
    assert_no_writes_later(t);

    /* The stream goes on, and the timer runs again */
    append_ok(t, 4000);
    wait_for_writes(t, 1);
    assert_writes(t, { 512, 4608 });
    assert_all_on_disk(t);
    run_ok(t, op_co_write, .offset = 4096, .bytes = 904, .gen = 2);
    wait_for_writes(t, 1);
    assert_all_on_disk(t);
}

/* What is young when the timer runs out is written the next time */
FIXTURE_TEST(age_mark, AGE)
{
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 1000);
    pass_time();
    assert_writes(t, { 0, 1000 });
    pass_time();
    assert_writes(t, { MiB, 1000 });
}

/* One request at a time, and small ones: of 256 KiB, where others have 1 MiB */
FIXTURE_TEST(age_requests, LARGE(4 * MiB), .max_age_ms = 1)
{
    append_ok(t, 640 * KiB);
    append_ok(t, 1);
    settle();
    assert_no_writes(t);
    disk_hold(t->disk);
    pass_time();
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release(t->disk);
    wait_for_writes(t, 3);
    assert_writes(t, { 0, 256 * KiB }, { 256 * KiB, 256 * KiB },
                  { 512 * KiB, 128 * KiB + 1 });
    g_assert_cmpuint(t->disk->max_in_flight, ==, 1);
    assert_all_on_disk(t);
}

/* Not in a drained section, but after it */
FIXTURE_TEST(age_drained, AGE)
{
    append_ok(t, 10 * 4096);
    bdrv_drained_begin(t->bs);
    assert_no_writes_later(t);
    bdrv_drained_end(t->bs);
    wait_for_writes(t, 1);
    assert_all_on_disk(t);
}

/* A drained section that begins meanwhile waits for one request */
FIXTURE_TEST(age_drain_begins, LARGE(4 * MiB), .max_age_ms = 1)
{
    append_ok(t, 640 * KiB);
    disk_hold(t->disk);
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);

    drain_held(t);
    assert_writes(t, { 0, 256 * KiB });
    bdrv_drained_end(t->bs);
    wait_for_writes(t, 2);
    assert_all_on_disk(t);
}

/* Not on a node that is inactive, or whose image is corrupt */
FIXTURE_TEST(age_inactive, AGE)
{
    append_ok(t, 1000);
    t->bs->open_flags |= BDRV_O_INACTIVE;
    assert_no_writes_later(t);
    t->bs->open_flags &= ~BDRV_O_INACTIVE;
    wait_for_writes(t, 1);

    append_ok(t, 1000);
    forget_writes(t);
    t->bs->drv = NULL;
    assert_no_writes_later(t);
    t->bs->drv = &bdrv_node;
}

/* One attempt; then it is for a flush or a writer to try again */
FIXTURE_TEST(age_error, AGE)
{
    append_ok(t, 1000);
    disk_set_error(t->disk, EIO);
    pass_time();
    assert_writes(t, { 0, 1000 });
    assert_stat(t, errors, ==, 1);
    assert_no_writes_later(t);
    fail_flush(t, EIO);
    disk_set_error(t->disk, 0);
    flush_ok(t);
    forget_writes(t);

    append_ok(t, 1000);
    wait_for_writes(t, 1);
    assert_writes(t, { 1000, 1000 });
    assert_all_on_disk(t);
}

/* The timer is gone with the cache, also when it has run out */
FIXTURE_TEST(age_free, AGE)
{
    append_ok(t, 1000);
    g_usleep(2000);
    test_new_wb(t);
    qemu_clock_run_timers(QEMU_CLOCK_REALTIME);
    settle();
    assert_no_writes(t);
    memset(t->shadow, 0, 1000);
}

/* ---- Settling ---- */

/*
 * Who settles a node waits for what is in flight, but for no more; then a graph
 * change need not wait.  A flush and a writer go on.
 */
FIXTURE_TEST(settle_stop, BUSY)
{
    TestOp *op = start(t, op_settle, .gen = BDRV_SETTLE_STOP);
    TestOp *flush;

    for (int i = 0; i < 4; i++) {
        assert_waits(op);
        disk_release_one(t->disk);
    }
    settle();
    g_assert_true(op_done(op));
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);

    /* It would hang if anything was in flight */
    append_ok(t, 4096);
    settle();
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);
    change_graph_elsewhere();

    flush = start(t, op_flush);
    assert_held(t, 4);
    disk_release(t->disk);
    finish(flush, 0);
    assert_all_on_disk(t);
    append_ok(t, 4096 * 64);
}

/* It is not for ever: what is left is written after a while */
FIXTURE_TEST(settle_stop_ends, BUSY, .max_age_ms = 1)
{
    TestOp *op = start(t, op_settle, .gen = BDRV_SETTLE_STOP);

    disk_release(t->disk);
    finish(op, 0);
    wait_for_writes(t, 61);
    assert_all_on_disk(t);
    assert_stat(t, unwritten_bytes, ==, 0);
}

/* One at a time, but at once */
FIXTURE_TEST(settle_idle, BUSY)
{
    TestOp *op = start(t, op_settle, .gen = BDRV_SETTLE_IDLE);

    for (int i = 0; i < 4; i++) {
        g_assert_false(op_done(op));
        disk_release_one(t->disk);
        settle();
    }
    g_assert_true(op_done(op));
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    pass_time();
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 1);
    disk_release(t->disk);
    wait_for_writes(t, 61);
    assert_all_on_disk(t);
}

/* In steps, between which the graph can be changed; it ends beside a writer */
FIXTURE_TEST(settle_write, BUSY)
{
    unsigned steps = 0;
    int ret;

    disk_set_error(t->disk, EIO);
    disk_release(t->disk);
    run_fails(t, -EIO, op_settle, .gen = BDRV_SETTLE_WRITE);
    disk_set_error(t->disk, 0);

    t->disk->max_hops = 3;
    while ((ret = run(t, op_settle, .gen = BDRV_SETTLE_WRITE)) > 0) {
        steps++;
        change_graph_elsewhere();
        append_ok(t, 2000);
        g_assert_cmpuint(steps, <, 100);
    }
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpuint(steps, >, 1);
    assert_on_disk(t, 0, 60 * 4096 + 1);
    flush_ok(t);
    run_ok(t, op_settle, .gen = BDRV_SETTLE_WRITE);
    assert_all_on_disk(t);
}

/* While requests are in flight, it sleeps */
FIXTURE_TEST(settle_write_waits, BUSY)
{
    TestOp *op = start(t, op_settle, .gen = BDRV_SETTLE_WRITE);

    assert_waits(op);
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
    disk_release_one(t->disk);
    settle();
    g_assert_true(op_done(op));
    finish(op, 1);
}

/* A node above one that has a cache, and one whose image is corrupt */
FIXTURE_TEST(settle_graph, BUSY)
{
    BlockDriverState *bs = t->bs;
    BlockBackend *blk;
    QDict *opts = qdict_new();
    TestOp *op;

    disk_release(t->disk);
    flush_ok(t);
    qdict_put_str(opts, "driver", "raw");
    qdict_put_str(opts, "file", "node");
    t->bs = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR, &error_abort);
    blk = blk_new_with_bs(t->bs, BLK_PERM_WRITE, BLK_PERM_ALL, &error_abort);
    disk_hold(t->disk);
    append_ok(t, 60 * 4096);
    op = start(t, op_settle, .gen = BDRV_SETTLE_STOP);
    assert_waits(op);
    disk_release(t->disk);
    finish(op, 0);
    bs->drv = NULL;
    run_ok(t, op_settle, .gen = BDRV_SETTLE_STOP);
    bs->drv = &bdrv_node;
    blk_unref(blk);
    bdrv_unref(t->bs);
    t->bs = bs;
}

/* ---- Writing out in the background ---- */

FIXTURE_TEST(start_write_out, LARGE(4 * MiB))
{
    /* Nothing to write */
    wb_start_write_out(t->wb);
    g_assert_cmpuint(nb_written_out, ==, 0);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 1);

    append_ok(t, 640 * KiB);
    assert_no_writes(t);
    disk_hold(t->disk);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release(t->disk);
    settle();
    g_assert_cmpuint(nb_written_out, ==, 2);
    g_assert_cmpuint(t->disk->nb.writes, ==, 3);
    assert_all_on_disk(t);

    /* In a drained section it has to wait */
    append_ok(t, 100);
    bdrv_drained_begin(t->bs);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(t->disk->nb.writes, ==, 3);
    bdrv_drained_end(t->bs);
    for (int i = 0; i < 30000 && nb_written_out == 2; i++) {
        pass_time();
    }
    g_assert_cmpuint(nb_written_out, ==, 3);
    assert_all_on_disk(t);
}

/* What has failed is tried once; a flush that succeeds ends it */
FIXTURE_TEST(start_write_out_error, LARGE(4 * MiB), .max_age_ms = 1)
{
    append_ok(t, 640 * KiB);
    fail_flush(t, EIO);
    forget_writes(t);
    wb_start_write_out(t->wb);
    pass_time();
    assert_writes(t, { 0, 256 * KiB });
    pass_time();
    assert_no_writes(t);

    disk_set_error(t->disk, 0);
    pass_time();
    assert_no_writes(t);
    g_assert_cmpuint(nb_written_out, ==, 0);
    flush_ok(t);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 1);

    /* It goes on when the first attempt is a success */
    append_ok(t, 640 * KiB);
    fail_flush(t, EIO);
    disk_set_error(t->disk, 0);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 2);
    assert_all_on_disk(t);
}

/* ---- Life time ---- */

static int coroutine_fn op_free(TestOp *op)
{
    Test *t = op->t;
    TestNode *s = t->bs->opaque;

    op_append(op);
    assert_no_writes(t);
    wb_free(s->wb);
    s->wb = NULL;
    return 0;
}

/* A worker that was created, but did not begin, finds nothing to work on */
FIXTURE_TEST(free_pending, SMALL(4))
{
    run_ok(t, op_free, .bytes = 4 * 4096);
    bdrv_drained_begin(t->bs);
    bdrv_drained_end(t->bs);
    assert_no_writes(t);
    t->unchecked = true;
}

/* Data that could not be written is no obstacle to closing the node */
FIXTURE_TEST(close_error, SMALL(4))
{
    disk_set_error(t->disk, EIO);
    append_ok(t, 4 * 4096);
    run_fails(t, -EIO, op_flush);
    t->unchecked = true;
}

/* An image that failed as corrupt is not written any more, and nobody hangs */
FIXTURE_TEST(abandon, SMALL(16), .max_transfer = 4096)
{
    TestOp *flush;

    disk_hold(t->disk);
    append_ok(t, 8 * 4096);
    flush = start(t, op_flush);
    settle();
    wb_abandon(t->wb);
    disk_release(t->disk);
    finish(flush, -ECANCELED);
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);
    read_ok(t, 0, 16 * 4096);
    run_fails(t, -ECANCELED, op_flush);
    run_fails(t, -ECANCELED, op_settle, .gen = BDRV_SETTLE_WRITE);
    run_fails(t, -ECANCELED, op_reserve, .nb_clusters = 13);
    reserve_ok(t, 12);
    unreserve(t, 12);
    g_assert_cmpuint(t->disk->nb.writes, ==, 4);
    t->unchecked = true;
}

/* ---- Several threads, and writers of the graph ---- */

/* Change the graph somewhere else while there are waiters */
FIXTURE_TEST(graph_change, SMALL(4), .align = 512)
{
    TestOp *flush;
    TestOp ops[16];

    t->disk->max_hops = 5;
    disk_hold(t->disk);
    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .bytes = 4000, .gen = i,
        };
    }
    ops_start(ops, ARRAY_SIZE(ops));
    flush = start(t, op_flush);
    assert_waits(flush);
    g_assert_cmpuint(t->disk->nb_held, >, 0);

    disk_release_later(t->disk);
    change_graph_elsewhere();
    ops_finish(ops, ARRAY_SIZE(ops), 0);
    finish(flush, 0);
}

typedef struct WriterTest {
    TestOp op;
    bool pending; /* a worker was created, but did not begin */
    bool writer;  /* there is a writer of the graph now */
} WriterTest;

static int coroutine_fn op_append_until_writer(TestOp *op)
{
    WriterTest *w = container_of(op, WriterTest, op);
    int ret = op_append(op);

    qatomic_set(&w->pending, true);
    while (!qatomic_read(&w->writer)) {
        g_usleep(1000);
    }
    return ret;
}

/* A writer of the graph can drain the node, though a worker begins just then */
FIXTURE_TEST(graph_worker, SMALL(4))
{
    IOThread *iothread = iothread_new();
    WriterTest w = {
        .op = { .t = t, .fn = op_append_until_writer, .bytes = 2 * 4096 },
    };
    unsigned in_flight;

    op_start_in(&w.op, iothread_get_aio_context(iothread));
    while (!qatomic_read(&w.pending)) {
        g_usleep(1000);
    }
    assert_no_writes(t);
    g_assert_cmpuint(qatomic_read(&t->bs->in_flight), >, 0);

    bdrv_graph_wrlock();
    qatomic_set(&w.writer, true);
    for (int i = 0; i < 3000; i++) {
        in_flight = qatomic_read(&t->bs->in_flight);
        if (!in_flight) {
            break;
        }
        g_usleep(10000);
    }
    bdrv_graph_wrunlock();
    g_assert_cmpuint(in_flight, ==, 0);

    finish(&w.op, 0);
    iothread_join(iothread);
}

/*
 * Fill a range from its start to its end, and check it on the way.  Nobody else
 * uses the range.
 */
static int coroutine_fn op_fill(TestOp *op)
{
    Test *t = op->t;
    int64_t cluster_size = t->config->cluster_size;
    g_autoptr(GRand) rand = g_rand_new_with_seed(op->gen);
    int64_t end = op->offset + op->bytes;
    int64_t pos = op->offset;
    TestOp sub = { .t = t };
    int ret = 0;

    while (pos < end && ret == 0) {
        sub.gen = op->gen;
        sub.offset = pos;
        sub.bytes = MIN(end - pos, g_rand_int_range(rand, 1, 2 * cluster_size));
        ret = op_write(&sub);
        if (ret == -EBUSY) {
            /* The stream was ended */
            pos = ROUND_UP(pos + 1, cluster_size);
            ret = 0;
            continue;
        } else if (ret < 0) {
            break;
        }
        pos += sub.bytes;

        switch (g_rand_int_range(rand, 0, 16)) {
        case 0:
            ret = op_blk_flush(op);
            assert_on_disk(t, op->offset, op->bytes);
            break;
        case 1:
        case 2:
        case 3:
            sub.offset = g_rand_int_range(rand, op->offset, pos);
            sub.bytes = pos - sub.offset;
            sub.gen = 5000; /* size of the pieces */
            ret = op_read(&sub);
            break;
        case 4:
            sub.offset = ROUND_DOWN(g_rand_int_range(rand, op->offset, pos),
                                    cluster_size);
            sub.bytes = cluster_size;
            ret = op_discard(&sub);
            break;
        }
    }
    return ret;
}

static void move_node(Test *t, IOThread **iothreads, int i)
{
    AioContext *ctx = i % 3 ? iothread_get_aio_context(iothreads[i % 3 - 1]) :
                      qemu_get_aio_context();

    blk_set_aio_context(t->blk, ctx, &error_abort);
}

static void change_graph(Test *t, IOThread **iothreads, int i)
{
    BlockDriverState *parent_bs, *child_bs;
    BdrvChild *child;

    parent_bs = bdrv_new_open_driver(&bdrv_node, NULL, BDRV_O_RDWR,
                                     &error_abort);
    child_bs = new_disk(NULL, t->config);
    bdrv_graph_wrlock();
    child = bdrv_attach_child(parent_bs, child_bs, "file", &child_of_bds,
                              BDRV_CHILD_IMAGE | BDRV_CHILD_PRIMARY,
                              &error_abort);
    bdrv_graph_wrunlock();
    bdrv_graph_wrlock();
    bdrv_unref_child(parent_bs, child);
    bdrv_graph_wrunlock();
    bdrv_unref(parent_bs);
}

static void fill_in_threads(Test *t, void (*interfere)(Test *t,
                                                       IOThread **iothreads,
                                                       int i))
{
    IOThread *iothreads[2] = { iothread_new(), iothread_new() };
    TestOp ops[8];
    unsigned i;

    t->disk->max_hops = 3;
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_fill, .offset = i * MiB, .bytes = 512 * KiB,
            .gen = i,
        };
        op_start_in(&ops[i], i == 7 ? qemu_get_aio_context() :
                    iothread_get_aio_context(iothreads[i % 2]));
    }
    for (i = 0; !ops_done(ops, ARRAY_SIZE(ops)); i++) {
        if (interfere) {
            interfere(t, iothreads, i);
        }
        aio_poll(qemu_get_aio_context(), false);
    }
    g_test_message("%u rounds", i);
    g_assert_cmpuint(i, >, 0);
    ops_finish(ops, ARRAY_SIZE(ops), 0);

    blk_set_aio_context(t->blk, qemu_get_aio_context(), &error_abort);
    assert_stat(t, max_cached_bytes, <=, t->config->cache_size);
    assert_stat(t, errors, ==, 0);
    iothread_join(iothreads[0]);
    iothread_join(iothreads[1]);
}

#define IOTHREADS(streams) { SMALL(12), .align = 512, .max_streams = streams }

/* Requests from several threads at a time */
FIXTURE_CASES(iothreads, IOTHREADS(8), IOTHREADS(2))
{
    fill_in_threads(t, NULL);
}

/* The node's home changes while there are requests */
FIXTURE_CASES(iothreads_move, IOTHREADS(8), IOTHREADS(2))
{
    fill_in_threads(t, move_node);
}

/* There are always writers of the graph that wait for the requests to end */
FIXTURE_CASES(iothreads_graph, IOTHREADS(8), IOTHREADS(2))
{
    fill_in_threads(t, change_graph);
}

/* ---- All of it at random ---- */

typedef struct RandomTest {
    Test *t;
    GRand *rand;
    int64_t granularity; /* what can be discarded without harm to others */
    unsigned nb_writes;
    unsigned nb_refused;
    unsigned nb_errors;
    unsigned nb_flushes;
} RandomTest;

typedef struct RandomUser {
    TestOp op; /* its range is that of the user, and @nb_clusters its steps */
    RandomTest *r;
    int64_t pos;
} RandomUser;

/* A range of up to three units of granularity, from somewhere at @pos */
static void random_range(RandomUser *u, int64_t pos, TestOp *sub)
{
    int64_t end = u->op.offset + u->op.bytes;

    sub->offset = ROUND_DOWN(pos, u->r->granularity);
    sub->bytes = MIN(end - sub->offset, u->r->granularity *
                     g_rand_int_range(u->r->rand, 1, 4));
}

static int coroutine_fn random_write(RandomUser *u, TestOp *sub)
{
    RandomTest *r = u->r;
    const TestConfig *c = r->t->config;
    int64_t end = u->op.offset + u->op.bytes;
    int64_t max = MIN(3 * c->cluster_size, c->cache_size / 2);
    int ret;

    if (u->pos == end) {
        /* Begin anew */
        sub->offset = u->pos = u->op.offset;
        sub->bytes = u->op.bytes;
        return op_discard(sub);
    }
    sub->offset = u->pos;
    sub->bytes = MIN(g_rand_int_range(r->rand, 1, max + 1), end - u->pos);
    sub->gen = g_rand_int(r->rand);
    ret = op_write(sub);
    if (ret == 0) {
        u->pos += sub->bytes;
        r->nb_writes++;
    } else if (ret == -EBUSY) {
        u->pos = MIN(ROUND_UP(u->pos + 1, r->granularity), end);
        r->nb_refused++;
        ret = 0;
    }
    return ret;
}

static int coroutine_fn random_step(RandomUser *u)
{
    RandomTest *r = u->r;
    TestOp *op = &u->op;
    TestOp sub = { .t = r->t };
    int64_t end = op->offset + op->bytes;
    int64_t somewhere = g_rand_int_range(r->rand, op->offset, end);
    int ret;

    switch (g_rand_int_range(r->rand, 0, 20)) {
    default:
        return random_write(u, &sub);
    case 0 ... 4:
        sub.offset = somewhere;
        sub.bytes = g_rand_int_range(r->rand, 1, end - somewhere + 1);
        sub.gen = g_rand_int_range(r->rand, 0, 2) ? 0 :
                  g_rand_int_range(r->rand, 300, 5000);
        return op_read(&sub);
    case 5:
        ret = op_blk_flush(&sub);
        if (ret == 0) {
            assert_on_disk(r->t, op->offset, op->bytes);
            r->nb_flushes++;
        }
        return ret;
    case 6:
        random_range(u, somewhere, &sub);
        return op_discard(&sub);
    case 7:
        /* Go on somewhere else; a cluster's rest may be overwritten there */
        random_range(u, somewhere, &sub);
        ret = op_discard(&sub);
        u->pos = sub.offset + g_rand_int_range(r->rand, 0, sub.bytes);
        if (sub.offset + sub.bytes < end) {
            sub.bytes = end - sub.offset;
            ret = op_discard(&sub);
        }
        return ret;
    case 8:
        wb_end_streams(r->t->wb);
        return 0;
    }
}

static int coroutine_fn op_random(TestOp *op)
{
    RandomUser *u = container_of(op, RandomUser, op);
    int ret;

    while (op->nb_clusters--) {
        ret = random_step(u);
        if (ret < 0) {
            /* The disk is the only source of errors */
            g_assert_cmpint(ret, ==, -EIO);
            u->r->nb_errors++;
            co_hop();
        }
    }
    return 0;
}

/* What the users of the node see little of */
static void random_event(RandomTest *r)
{
    Test *t = r->t;
    int ret;

    switch (g_rand_int_range(r->rand, 0, 5)) {
    case 0:
        t->disk->percent_bad = t->disk->percent_bad ? 0 : 30;
        break;
    case 1:
        bdrv_drained_begin(t->bs);
        g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
        disk_set_limits(t->disk_bs, MIN(1 << g_rand_int_range(r->rand, 0, 13),
                                        r->granularity),
                        g_rand_int_range(r->rand, 0, 2) * 20 * KiB);
        bdrv_drained_end(t->bs);
        break;
    case 2:
        change_graph_elsewhere();
        break;
    case 3:
        ret = wb_flush(t->bs, t->wb);
        g_assert(ret == 0 || ret == -EIO);
        break;
    case 4:
        assert_stat(t, cached_bytes, <=, t->config->cache_size);
        break;
    }
}

#define RANDOM_USERS 8
#define RANDOM_STEPS 1000

FIXTURE_CASES(random,
         { SMALL(2), .align = 512 },
         { SMALL(16), .align = 4096, .max_streams = 8 },
         { .cluster_size = 512, .cache_size = 16 * KiB, .align = 4096,
           .max_streams = 8 },
         { .cluster_size = 16 * KiB, .cache_size = 512 * KiB, .align = 512,
           .max_streams = 3, .no_pad = true })
{
    unsigned seed = g_test_rand_int();
    RandomTest r = {
        .t = t,
        .rand = g_rand_new_with_seed(seed),
        .granularity = MAX(4096, t->config->cluster_size),
    };
    RandomUser users[RANDOM_USERS];
    bool done;

    t->disk->max_hops = 5;
    g_rand_set_seed(t->disk->rand, seed);
    for (int i = 0; i < RANDOM_USERS; i++) {
        users[i] = (RandomUser) {
            .op = {
                .t = t, .fn = op_random, .offset = i * 512 * KiB,
                .bytes = 256 * KiB, .nb_clusters = RANDOM_STEPS,
            },
            .r = &r,
            .pos = i * 512 * KiB,
        };
        op_start(&users[i].op);
    }
    do {
        aio_poll(qemu_get_aio_context(), false);
        if (g_rand_int_range(r.rand, 0, 20) == 0) {
            random_event(&r);
        }
        done = true;
        for (int i = 0; i < RANDOM_USERS; i++) {
            done &= op_done(&users[i].op);
        }
    } while (!done);

    t->disk->percent_bad = 0;
    assert_stat(t, max_cached_bytes, <=, t->config->cache_size);
    g_test_message("%u writes, %u refused, %u errors, %u flushes",
                   r.nb_writes, r.nb_refused, r.nb_errors, r.nb_flushes);
    g_assert_cmpuint(r.nb_writes, >, RANDOM_USERS * RANDOM_STEPS / 10);
    g_assert_cmpuint(r.nb_errors, >, 0);
    g_assert_cmpuint(r.nb_flushes, >, 0);
    g_rand_free(r.rand);
}

int main(int argc, char **argv)
{
    disk_test_init(&argc, &argv);
    fixture_add_tests("/write-behind");
    return g_test_run();
}
