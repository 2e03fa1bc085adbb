/*
 * Tests of write-behind
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A test node stands where qcow2 or a filter stands: it hands all of its
 * requests to a WriteBehind.  Its file child is a test disk in memory that
 * records the requests it gets, and that can hold, delay or fail them.
 *
 * For a given --seed the random test always does the same.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block_int.h"
#include "block/seqcache-compat.h"
#include "block/write-behind.h"
#include "qobject/qdict.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "iothread.h"

#define DISK_SIZE (8 * MiB)

/* ---- The disk ---- */

typedef struct DiskWrite {
    int64_t offset;
    int64_t bytes;
    QLIST_ENTRY(DiskWrite) next;
} DiskWrite;

typedef struct Disk {
    /* Constant while there are requests */
    uint32_t align;
    uint32_t max_transfer;
    unsigned max_hops; /* how often a write goes through the event loop */

    /* Protects everything below */
    QemuMutex lock;
    uint8_t *data;
    GRand *rand;

    bool hold; /* writes wait in @held before they do anything */
    CoQueue held;
    unsigned nb_held;

    /* Writes fail with this when they are done, after the first @nb_good */
    int error;
    unsigned nb_good;
    /* Or, with @error 0, they fail with EIO in this many of 100 cases */
    unsigned percent_bad;

    unsigned nb_reads;
    unsigned nb_writes; /* begun */
    unsigned max_in_flight;
    unsigned nb_in_flight;
    QLIST_HEAD(, DiskWrite) in_flight;
    GArray *log; /* of DiskWrite, in the order they began */
} Disk;

static int disk_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    Disk *d = bs->opaque;

    qemu_mutex_init(&d->lock);
    qemu_co_queue_init(&d->held);
    QLIST_INIT(&d->in_flight);
    d->data = g_malloc0(DISK_SIZE);
    d->rand = g_rand_new_with_seed(1);
    d->log = g_array_new(false, false, sizeof(DiskWrite));
    d->align = 1;
    return 0;
}

static void disk_close(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    g_assert_cmpuint(d->nb_in_flight, ==, 0);
    g_array_unref(d->log);
    g_rand_free(d->rand);
    g_free(d->data);
    qemu_mutex_destroy(&d->lock);
}

static void disk_refresh_limits(BlockDriverState *bs, Error **errp)
{
    Disk *d = bs->opaque;

    bs->bl.request_alignment = d->align;
    bs->bl.max_transfer = d->max_transfer;
}

static int64_t coroutine_fn disk_co_getlength(BlockDriverState *bs)
{
    return DISK_SIZE;
}

static void coroutine_fn co_hop(void)
{
    aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
    qemu_coroutine_yield();
}

static int coroutine_fn disk_co_preadv(BlockDriverState *bs, int64_t offset,
                                       int64_t bytes, QEMUIOVector *qiov,
                                       BdrvRequestFlags flags)
{
    Disk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    d->nb_reads++;
    qemu_iovec_from_buf(qiov, 0, d->data + offset, bytes);
    return 0;
}

/* Called with d->lock held */
static int disk_result_locked(Disk *d)
{
    if (d->error) {
        if (!d->nb_good) {
            return -d->error;
        }
        d->nb_good--;
    } else if (g_rand_int_range(d->rand, 0, 100) < d->percent_bad) {
        return -EIO;
    }
    return 0;
}

/* Called with d->lock held */
static bool disk_is_busy_locked(Disk *d, int64_t offset, int64_t bytes)
{
    DiskWrite *w;

    QLIST_FOREACH(w, &d->in_flight, next) {
        if (w->offset < offset + bytes && offset < w->offset + w->bytes) {
            return true;
        }
    }
    return false;
}

static int coroutine_fn disk_co_pwritev(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        BdrvRequestFlags flags)
{
    Disk *d = bs->opaque;
    DiskWrite w = { .offset = offset, .bytes = bytes };
    g_autofree uint8_t *begin = g_malloc(bytes);
    g_autofree uint8_t *end = g_malloc(bytes);
    unsigned hops;
    int ret;

    qemu_iovec_to_buf(qiov, 0, begin, bytes);

    qemu_mutex_lock(&d->lock);
    /* What is being written must not be written a second time meanwhile */
    g_assert_false(disk_is_busy_locked(d, offset, bytes));
    QLIST_INSERT_HEAD(&d->in_flight, &w, next);
    g_array_append_val(d->log, w);
    d->nb_writes++;
    d->nb_in_flight++;
    d->max_in_flight = MAX(d->max_in_flight, d->nb_in_flight);

    if (d->hold) {
        d->nb_held++;
        qemu_co_queue_wait(&d->held, &d->lock);
        d->nb_held--;
    }

    hops = d->max_hops ? g_rand_int_range(d->rand, 0, d->max_hops + 1) : 0;
    qemu_mutex_unlock(&d->lock);
    while (hops--) {
        co_hop();
    }

    /* The data must be valid and constant until the request is done */
    qemu_iovec_to_buf(qiov, 0, end, bytes);
    g_assert(!memcmp(begin, end, bytes));

    qemu_mutex_lock(&d->lock);
    ret = disk_result_locked(d);
    if (ret == 0) {
        memcpy(d->data + offset, end, bytes);
    }
    QLIST_REMOVE(&w, next);
    d->nb_in_flight--;
    qemu_mutex_unlock(&d->lock);

    return ret;
}

static BlockDriver bdrv_disk = {
    .format_name            = "write-behind-disk",
    .instance_size          = sizeof(Disk),
    .bdrv_open              = disk_open,
    .bdrv_close             = disk_close,
    .bdrv_child_perm        = bdrv_default_perms,
    .bdrv_refresh_limits    = disk_refresh_limits,
    .bdrv_co_getlength      = disk_co_getlength,
    .bdrv_co_preadv         = disk_co_preadv,
    .bdrv_co_pwritev        = disk_co_pwritev,
};

/* From now on writes wait until they are released */
static void disk_hold(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->hold = true;
}

/* Let one held write, if there is one, go on */
static void disk_release_one(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    qemu_co_enter_next(&d->held, &d->lock);
}

/* Let all held writes go on, and hold no more */
static void disk_release(void *opaque)
{
    Disk *d = opaque;

    QEMU_LOCK_GUARD(&d->lock);
    d->hold = false;
    qemu_co_enter_all(&d->held, &d->lock);
}

static void disk_fail(Disk *d, int error, unsigned nb_good)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->error = error;
    d->nb_good = nb_good;
}

/* Write zeroes as somebody who knows that no write there is in flight */
static void disk_zero(Disk *d, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&d->lock);
    g_assert_false(disk_is_busy_locked(d, offset, bytes));
    memset(d->data + offset, 0, bytes);
}

static void disk_assert_log(Disk *d, const DiskWrite *expected, unsigned n)
{
    unsigned i;

    for (i = 0; i < MIN(n, d->log->len); i++) {
        DiskWrite *w = &g_array_index(d->log, DiskWrite, i);

        g_assert_cmpint(w->offset, ==, expected[i].offset);
        g_assert_cmpint(w->bytes, ==, expected[i].bytes);
    }
    g_assert_cmpuint(d->log->len, ==, n);
    g_array_set_size(d->log, 0);
}

/* Assert which writes the disk got since the last time, as { offset, bytes } */
#define assert_writes(d, ...)                                           \
    do {                                                                \
        const DiskWrite expected_[] = { __VA_ARGS__ };                  \
        disk_assert_log(d, expected_, ARRAY_SIZE(expected_));           \
    } while (0)

static void assert_no_writes(Disk *d)
{
    disk_assert_log(d, NULL, 0);
}

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

    return wb_co_preadv_part(s->wb, offset, bytes, qiov, qiov_offset,
                             flags);
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
    bool busy;              /* see fill_cache() */
} TestConfig;

typedef struct Test {
    int64_t cluster_size;
    int64_t cache_size;
    BlockBackend *blk;
    BlockDriverState *bs;
    WriteBehind *wb;
    BlockDriverState *disk_bs;
    Disk *disk;

    /* Where op_append() goes on; only for tests in one AioContext */
    int64_t alloc;
    /* What the node must read as */
    uint8_t *shadow;
} Test;

static void disk_set_limits(BlockDriverState *disk_bs, uint32_t align,
                            uint32_t max_transfer)
{
    Disk *d = disk_bs->opaque;

    d->align = align;
    d->max_transfer = max_transfer;

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    bdrv_refresh_limits(disk_bs, NULL, &error_abort);
}

static void test_set_limits(Test *t, uint32_t align, uint32_t max_transfer)
{
    disk_set_limits(t->disk_bs, align, max_transfer);
}

static void test_attach(Test *t, BlockDriverState *disk_bs)
{
    bdrv_ref(disk_bs);
    bdrv_graph_wrlock();
    bdrv_attach_child(t->bs, disk_bs, "file", &child_of_bds,
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

static void fill_cache(Test *t);

/* The fixture of a test is a Test, which WB_TEST() describes */
static void test_set_up(Test *t, gconstpointer opaque)
{
    const TestConfig *config = opaque;
    WriteBehindOptions opts = {
        .cache_size = config->cache_size,
        .cluster_size = config->cluster_size,
        .max_streams = config->max_streams ?: 4,
        .pad = !config->no_pad,
        .event = BLKDBG_WRITE_COMPRESSED,
        .max_age_ms = config->max_age_ms,
        .written_out = count_written_out,
    };
    TestNode *s;

    t->disk_bs = bdrv_new_open_driver(&bdrv_disk, NULL, BDRV_O_RDWR,
                                      &error_abort);
    t->disk = t->disk_bs->opaque;
    test_set_limits(t, config->align ?: 1, config->max_transfer);

    t->bs = bdrv_new_open_driver(&bdrv_node, "node",
                                 BDRV_O_RDWR | BDRV_O_UNMAP, &error_abort);
    test_attach(t, t->disk_bs);

    t->wb = wb_new(t->bs, &opts);
    s = t->bs->opaque;
    s->wb = t->wb;
    s->cluster_size = config->cluster_size;
    t->cluster_size = config->cluster_size;
    t->cache_size = config->cache_size;
    g_assert_cmpint(wb_cache_size(t->wb), ==, t->cache_size);

    t->blk = blk_new(qemu_get_aio_context(), BLK_PERM_ALL, BLK_PERM_ALL);
    blk_insert_bs(t->blk, t->bs, &error_abort);

    t->shadow = g_malloc0(DISK_SIZE);
    if (config->busy) {
        fill_cache(t);
    }
}

static void test_tear_down(Test *t, gconstpointer config)
{
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t->shadow);
}

#define WB_TEST(name, ...)                                              \
    static const TestConfig config_##name = { __VA_ARGS__ };            \
    static void test_##name(Test *t, gconstpointer config)

/* For tests that need several, or at another time */
static Test *test_new(const TestConfig *config)
{
    Test *t = g_new0(Test, 1);

    test_set_up(t, config);
    return t;
}

static void test_free(Test *t)
{
    test_tear_down(t, NULL);
    g_free(t);
}

/* Go on until nothing happens in the main loop any more */
static void settle(void)
{
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* There may be more */
    }
}

static void fill(uint8_t *buf, int64_t offset, int64_t bytes, unsigned gen)
{
    int64_t i;

    for (i = offset; i < offset + bytes; i++) {
        *buf++ = i * 7 + (i >> 8) * 13 + (i >> 12) * 5 + gen;
    }
}

static void assert_bytes(const uint8_t *found, const uint8_t *expected,
                         int64_t offset, int64_t bytes)
{
    int64_t i;

    if (!memcmp(found, expected, bytes)) {
        return;
    }
    for (i = 0; found[i] == expected[i]; i++) {
        /* Look for the first difference */
    }
    g_error("byte %" PRId64 " is %02x but should be %02x", offset + i,
            found[i], expected[i]);
}

/* Assert that a range of the disk has what was accepted */
static void assert_on_disk(Test *t, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&t->disk->lock);
    assert_bytes(t->disk->data + offset, t->shadow + offset, offset, bytes);
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
        assert_bytes(buf, op->t->shadow + op->offset, op->offset, op->bytes);
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
 * for each other, and requests for the end of a drained section.
 */

static int coroutine_fn op_flush(TestOp *op)
{
    Test *t = op->t;
    int ret;

    bdrv_inc_in_flight(t->bs);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = wb_co_flush(t->bs, t->wb);
    }
    bdrv_dec_in_flight(t->bs);
    return ret;
}

static int coroutine_fn op_reserve(TestOp *op)
{
    Test *t = op->t;
    int ret;

    bdrv_inc_in_flight(t->bs);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = wb_co_reserve(t->wb, op->nb_clusters);
    }
    bdrv_dec_in_flight(t->bs);
    return ret;
}

static int coroutine_fn op_unreserve(TestOp *op)
{
    wb_unreserve(op->t->wb, op->nb_clusters);
    return 0;
}

/* Use up an op_reserve() */
static int coroutine_fn op_accept(TestOp *op)
{
    Test *t = op->t;
    g_autofree uint8_t *buf = g_malloc(op->bytes);
    bool ok;

    fill(buf, op->offset, op->bytes, op->gen);

    bdrv_inc_in_flight(t->bs);
    WITH_GRAPH_RDLOCK_GUARD() {
        ok = wb_accept(t->wb, op->nb_clusters, op->offset, op->bytes,
                       buf);
    }
    bdrv_dec_in_flight(t->bs);

    if (ok) {
        memcpy(t->shadow + op->offset, buf, op->bytes);
    }
    return ok ? 0 : -EBUSY;
}

/* Allocate space after the last one, in a new cluster if a stream ended */
static int coroutine_fn op_append(TestOp *op)
{
    Test *t = op->t;
    int ret;

    op->nb_clusters = DIV_ROUND_UP(op->bytes, t->cluster_size);
    ret = op_reserve(op);
    if (ret < 0) {
        return ret;
    }
    if (!wb_continues(t->wb, t->alloc)) {
        t->alloc = ROUND_UP(t->alloc, t->cluster_size);
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

    fill(buf, op->offset, op->bytes, op->gen);
    /* In two parts, after something else */
    qemu_iovec_init(&qiov, 3);
    qemu_iovec_add(&qiov, &ret, sizeof(ret));
    qemu_iovec_add(&qiov, buf, op->bytes / 3);
    qemu_iovec_add(&qiov, buf + op->bytes / 3, op->bytes - op->bytes / 3);

    bdrv_inc_in_flight(t->bs);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = wb_co_write(t->wb, op->offset, op->bytes, &qiov, sizeof(ret),
                          op->nb_clusters);
    }
    bdrv_dec_in_flight(t->bs);
    qemu_iovec_destroy(&qiov);
    if (ret < 0) {
        return ret;
    }
    memcpy(t->shadow + op->offset, buf, ret);
    return ret == op->bytes ? 0 : -EAGAIN;
}

static int coroutine_fn op_write_out(TestOp *op)
{
    Test *t = op->t;
    int ret;

    bdrv_inc_in_flight(t->bs);
    WITH_GRAPH_RDLOCK_GUARD() {
        ret = wb_co_write_out(t->wb, op->offset, op->bytes);
    }
    bdrv_dec_in_flight(t->bs);
    return ret;
}

/* @gen is the mode */
static int coroutine_fn op_settle(TestOp *op)
{
    GRAPH_RDLOCK_GUARD();
    return bdrv_co_settle(op->t->bs, op->gen);
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

static void op_start_in(TestOp *op, AioContext *ctx)
{
    op->ret = -EINPROGRESS;
    aio_co_enter(ctx, qemu_coroutine_create(op_entry, op));
}

static void op_start(TestOp *op)
{
    op_start_in(op, qemu_get_aio_context());
}

static int op_wait(TestOp *op)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, !op_done(op));
    return op->ret;
}

static int op_run(TestOp *op)
{
    op_start(op);
    return op_wait(op);
}

static bool ops_done(TestOp *ops, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        if (!op_done(&ops[i])) {
            return false;
        }
    }
    return true;
}

static void ops_start(TestOp *ops, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        op_start(&ops[i]);
    }
}

/* Wait for all, and assert that they return @ret */
static void ops_finish(TestOp *ops, unsigned n, int ret)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        g_assert_cmpint(op_wait(&ops[i]), ==, ret);
    }
}

#define run(t_, fn_, ...) \
    op_run(&(TestOp) { .t = (t_), .fn = (fn_), __VA_ARGS__ })

#define run_ok(t, fn, ...) g_assert_cmpint(run(t, fn, __VA_ARGS__), ==, 0)
#define run_fails(t, ret, fn, ...) \
    g_assert_cmpint(run(t, fn, __VA_ARGS__), ==, ret)

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

static void flush_ok(Test *t)
{
    run_ok(t, op_flush);
}

/* Four requests are held by the disk, and more are to come */
static void fill_cache(Test *t)
{
    disk_hold(t->disk);
    append_ok(t, 60 * 4096 + 1);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
}

#define assert_stat(t, field, op, value)                                \
    do {                                                                \
        BlockStatsWriteBehind *stats_ = wb_get_stats((t)->wb);          \
        g_assert_cmpuint(stats_->field, op, value);                     \
        qapi_free_BlockStatsWriteBehind(stats_);                        \
    } while (0)

/* ---- What goes to the child ---- */

/* A filter makes room for a request that goes to the child */
WB_TEST(write_out, .cluster_size = 64 * KiB, .cache_size = 4 * MiB,
        .no_pad = true)
{
    write_ok(t, 0, 1000);
    write_ok(t, 64 * KiB, 1000);
    write_ok(t, 128 * KiB, 1000);
    write_ok(t, 192 * KiB, 1000);
    g_assert_true(wb_is_dirty(t->wb));

    /* Nothing to do where nothing is cached, also in the same cluster */
    run_ok(t, op_write_out, .offset = 129000, .bytes = 2000);
    run_ok(t, op_write_out, .offset = MiB, .bytes = DISK_SIZE - MiB);
    assert_no_writes(t->disk);

    /* What was written before goes first; what was written later can wait */
    disk_hold(t->disk);
    TestOp op = { .t = t, .fn = op_write_out, .offset = 64 * KiB + 999,
                  .bytes = 1 };
    op_start(&op);
    settle();
    g_assert_false(op_done(&op));
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    g_assert_cmpint(wb_gap(t->wb, 64 * KiB, 64 * KiB), ==, 64 * KiB);
    g_assert_false(wb_continues(t->wb, 64 * KiB + 1000));
    assert_on_disk(t, 0, 65 * KiB);

    /* Streams elsewhere go on */
    g_assert_true(wb_continues(t->wb, 1000));
    g_assert_true(wb_continues(t->wb, 192 * KiB + 1000));

    run_ok(t, op_write_out, .offset = 0, .bytes = INT64_MAX);
    g_assert_cmpint(wb_gap(t->wb, 0, INT64_MAX), ==, INT64_MAX);
    g_assert_false(wb_is_dirty(t->wb));
    assert_on_disk(t, 0, DISK_SIZE);
}

WB_TEST(write_out_error, .cluster_size = 64 * KiB, .cache_size = 4 * MiB,
        .no_pad = true)
{
    write_ok(t, 0, 1000);
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_write_out, .offset = 0, .bytes = 1);
    g_assert_true(wb_is_dirty(t->wb));
    read_ok(t, 0, 2000);
    disk_fail(t->disk, 0, 0);
    run_ok(t, op_write_out, .offset = 0, .bytes = 1);
    assert_on_disk(t, 0, 2000);
}

WB_TEST(overwrite, .cluster_size = 64 * KiB, .cache_size = 4 * MiB,
        .no_pad = true)
{
    TestOp flush = { .t = t, .fn = op_flush };

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
    op_start(&flush);
    settle();

    /* What is in flight must stay as it is */
    run_fails(t, -EAGAIN, op_co_write, .offset = 500, .bytes = 10, .gen = 4);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    assert_on_disk(t, 0, 2000);
    assert_writes(t->disk, { 0, 1000 }, { 500, 500 });
    assert_stat(t, accepted_bytes, ==, 1910);
}

/* What goes on inside of a cluster is taken without a reservation */
WB_TEST(append, .cluster_size = 4096, .cache_size = 2 * 4096, .align = 512)
{
    run_fails(t, -EAGAIN, op_co_write, .offset = 0, .bytes = 1);
    write_ok(t, 0, 1000);
    write_ok(t, 8192, 1000);
    run_fails(t, -EAGAIN, op_co_write, .offset = 1001, .bytes = 1);
    /* The cache is full, and stays as it is */
    run_ok(t, op_co_write, .offset = 1000, .bytes = 1000);
    run_ok(t, op_co_write, .offset = 9192, .bytes = 1000);
    assert_no_writes(t->disk);
    assert_stat(t, accepted_bytes, ==, 4000);
    assert_stat(t, accepted_requests, ==, 4);
    assert_stat(t, max_cached_bytes, ==, 4000);
    read_ok(t, 0, 16384);

    /* Writers learn of an error, though there would be room */
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    run_fails(t, -EIO, op_co_write, .offset = 2000, .bytes = 1);
    disk_fail(t->disk, 0, 0);
    flush_ok(t);

    /* No more than what is in the first cluster, and no more streams unasked */
    run_fails(t, -EAGAIN, op_co_write, .offset = 2000, .bytes = 5000);
    g_assert_cmpint(wb_gap(t->wb, 4096, 4096), ==, 4096);
    run_fails(t, -EAGAIN, op_co_write, .offset = 4096, .bytes = 1);
    run_ok(t, op_co_write, .offset = 4096, .bytes = 1, .nb_clusters = 1);
    g_assert_true(wb_continues(t->wb, 4097));
    run_fails(t, -EAGAIN, op_co_write, .offset = 4098, .bytes = 1,
              .nb_clusters = 1);
    flush_ok(t);
    assert_on_disk(t, 0, 16384);
}

/* Small pieces come out in order, in large aligned requests without reads */
WB_TEST(large_requests, .cluster_size = 64 * KiB, .cache_size = 4 * MiB,
        .align = 4096)
{
    int64_t total = 5 * MiB + 12345;
    int64_t piece = 1;

    while (t->alloc < total) {
        append_ok(t, MIN(piece, total - t->alloc));
        piece = piece * 3 % 8191;
    }
    read_ok(t, 0, total);
    assert_writes(t->disk, { 0, MiB }, { MiB, MiB }, { 2 * MiB, MiB },
                  { 3 * MiB, MiB }, { 4 * MiB, MiB });

    /* No one will continue the stream, so its end can be padded */
    g_assert_true(wb_continues(t->wb, total));
    wb_end_streams(t->wb);
    g_assert_false(wb_continues(t->wb, total));
    t->disk->nb_reads = 0;
    flush_ok(t);
    assert_writes(t->disk, { 5 * MiB, 16 * KiB });
    g_assert_cmpuint(t->disk->nb_reads, ==, 0);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, cached_bytes, ==, 0);
}

/* Neither the limits of the child nor half of a small cache are exceeded */
static void test_request_size(void)
{
    const struct {
        int64_t cache_size;
        uint32_t max_transfer;
        int64_t request;
    } cases[] = {
        { 4 * MiB, 0, MiB },
        { 512 * KiB, 0, 256 * KiB },
        { 128 * KiB, 0, 64 * KiB },
        { 4 * MiB, 300 * KiB, 256 * KiB },
        { 4 * MiB, 64 * KiB, 64 * KiB },
    };
    size_t i;
    unsigned n;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        Test *t = test_new(&(TestConfig) {
            .cluster_size = 64 * KiB,
            .cache_size = cases[i].cache_size,
            .align = 512,
            .max_transfer = cases[i].max_transfer,
        });

        while (t->alloc < 2 * MiB) {
            append_ok(t, 32 * KiB);
        }
        flush_ok(t);

        n = 2 * MiB / cases[i].request;
        g_assert_cmpuint(t->disk->nb_writes, ==, n);
        /* If they were larger, the block layer split them */
        assert_stat(t, issued_requests, ==, n);
        g_assert_cmpuint(t->disk->nb_reads, ==, 0);
        assert_on_disk(t, 0, DISK_SIZE);
        test_free(t);
    }
}

/* Alignment and maximum size are those that the child has at that moment */
WB_TEST(limits_change, .cluster_size = 64 * KiB, .cache_size = 4 * MiB,
        .align = 512)
{
    append_ok(t, 1000);
    flush_ok(t);
    assert_writes(t->disk, { 0, 1024 });

    test_set_limits(t, 4096, 128 * KiB);
    append_ok(t, 300000);
    flush_ok(t);
    assert_writes(t->disk, { 0, 128 * KiB }, { 128 * KiB, 128 * KiB },
                  { 256 * KiB, 40 * KiB });
    assert_stat(t, issued_requests, ==, 4);

    test_set_limits(t, 512, 0);
    append_ok(t, 1000);
    flush_ok(t);
    /* 301000 is in the block that starts at 300544, 302000 ends at 302080 */
    assert_writes(t->disk, { 300544, 1536 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A request that begins inside a cluster is not delayed until it is longer */
WB_TEST(full_request, .cluster_size = 64 * KiB, .cache_size = 8 * MiB,
        .align = 512)
{
    append_ok(t, 1000);
    flush_ok(t);
    assert_writes(t->disk, { 0, 1024 });
    append_ok(t, MiB - 1001);
    assert_no_writes(t->disk);
    append_ok(t, 1);
    assert_writes(t->disk, { 512, MiB - 512 });
    append_ok(t, MiB - 1);
    assert_no_writes(t->disk);
    append_ok(t, 1);
    assert_writes(t->disk, { MiB, MiB });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Clusters smaller than a block of the child: blocks are still written once */
WB_TEST(large_alignment, .cluster_size = 512, .cache_size = 64 * KiB,
        .align = 4096)
{
    while (t->alloc < 256 * KiB) {
        append_ok(t, 100);
    }
    g_assert_cmpuint(t->disk->nb_reads, ==, 0);
    g_assert_cmpuint(t->disk->nb_writes, ==, 8);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Where padding is not allowed, the neighbouring bytes stay what they are */
WB_TEST(no_pad, .cluster_size = 64 * KiB, .cache_size = MiB, .no_pad = true,
        .align = 4096)
{
    fill(t->disk->data, 0, DISK_SIZE, 99);
    fill(t->shadow, 0, DISK_SIZE, 99);

    write_ok(t, 10000, 100000);
    wb_end_streams(t->wb);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_writes(t->disk, { 8192, 102400 });
}

/* ---- Flush ---- */

WB_TEST(flush, .cluster_size = 64 * KiB, .cache_size = MiB, .align = 512)
{
    /* Nothing to do */
    flush_ok(t);
    assert_no_writes(t->disk);

    /* Two streams, both unfinished, and one cluster that is finished */
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 64 * KiB + 10);
    assert_no_writes(t->disk);
    flush_ok(t);
    assert_writes(t->disk, { 0, 1024 }, { MiB, 64 * KiB + 512 });
    assert_on_disk(t, 0, DISK_SIZE);

    /* Nothing new */
    flush_ok(t);
    assert_no_writes(t->disk);

    /* Only the new part, which starts in the block that was written last */
    g_assert_true(wb_continues(t->wb, 1000));
    write_ok(t, 1000, 3000);
    flush_ok(t);
    assert_writes(t->disk, { 512, 3584 });
    assert_on_disk(t, 0, DISK_SIZE);

    /* Both flushed streams can go on to the end of their clusters */
    write_ok(t, 4000, 64 * KiB - 4000);
    write_ok(t, MiB + 64 * KiB + 10, 10);
    flush_ok(t);
    assert_writes(t->disk, { 3584, 64 * KiB - 3584 },
                  { MiB + 64 * KiB, 512 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* The functions that can be called from the main loop do the same */
WB_TEST(not_in_coroutine, .cluster_size = 64 * KiB, .cache_size = MiB)
{
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 1000);
    wb_discard(t->bs, t->wb, 1, 1);
    memset(t->shadow, 0, 1000);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, 0);
    assert_writes(t->disk, { MiB, 1000 });

    disk_fail(t->disk, ENOSPC, 0);
    write_ok(t, 0, 1000);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, -ENOSPC);
    disk_fail(t->disk, 0, 0);
    g_assert_cmpint(wb_flush(t->bs, t->wb), ==, 0);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A flush waits for what is in flight, and does not write it once more */
WB_TEST(flush_in_flight, .cluster_size = 64 * KiB, .cache_size = 512 * KiB)
{
    TestOp flush[2] = {
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_flush },
    };

    disk_hold(t->disk);
    append_ok(t, 256 * KiB);
    g_assert_cmpuint(t->disk->nb_held, ==, 1);

    op_start(&flush[0]);
    settle();
    g_assert_false(op_done(&flush[0]));
    assert_writes(t->disk, { 0, 256 * KiB });

    /* The first flush does not wait for what comes after it */
    append_ok(t, 1000);
    op_start(&flush[1]);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 2);
    disk_release_one(t->disk);
    settle();
    g_assert_true(op_done(&flush[0]));
    g_assert_false(op_done(&flush[1]));

    disk_release(t->disk);
    g_assert_cmpint(flush[0].ret, ==, 0);
    g_assert_cmpint(op_wait(&flush[1]), ==, 0);
    assert_writes(t->disk, { 256 * KiB, 1000 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A flush writes the stream as it was; what came later is for the next one */
WB_TEST(flush_growing, .cluster_size = 64 * KiB, .cache_size = MiB,
        .align = 512)
{
    TestOp flush = { .t = t, .fn = op_flush };

    append_ok(t, 1024);
    disk_hold(t->disk);
    op_start(&flush);
    append_ok(t, 1024);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    assert_on_disk(t, 0, 1024);
    assert_writes(t->disk, { 0, 1024 });

    flush_ok(t);
    assert_on_disk(t, 0, 2048);
    assert_writes(t->disk, { 1024, 1024 });
    assert_stat(t, partial_flushes, ==, 2);
}

/* The same while it has to wait for other requests */
WB_TEST(flush_growing_later, .cluster_size = 64 * KiB, .cache_size = MiB,
        .max_streams = 8, .align = 512)
{
    TestOp flush = { .t = t, .fn = op_flush };
    int i;

    for (i = 0; i < 5; i++) {
        write_ok(t, i * MiB, 1024);
    }
    disk_hold(t->disk);
    op_start(&flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
    write_ok(t, 4 * MiB + 1024, 1024);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    settle();
    assert_writes(t->disk, { 0, 1024 }, { MiB, 1024 }, { 2 * MiB, 1024 },
                  { 3 * MiB, 1024 }, { 4 * MiB, 1024 });
    assert_stat(t, partial_flushes, ==, 5);

    flush_ok(t);
    assert_writes(t->disk, { 4 * MiB + 1024, 1024 });
    assert_on_disk(t, 0, DISK_SIZE);
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
        op->nb_clusters++;
        co_hop();
    }
    return ret;
}

/* A flush ends though somebody writes all the time */
WB_TEST(flush_terminates, .cluster_size = 4096, .cache_size = 64 * KiB,
        .align = 512)
{
    Streaming s = {
        .op = { .t = t, .fn = op_stream, .bytes = 700, .gen = 1 },
    };
    unsigned nb_overtaken = 0;
    int i;

    t->disk->max_hops = 3;
    op_start(&s.op);
    for (i = 0; i < 100; i++) {
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
    g_assert_cmpint(op_wait(&s.op), ==, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* ---- The bound, and waiting for room ---- */

#define NB_WRITERS 64

static void bound_case(int64_t cluster_size, int64_t nb_clusters,
                       unsigned max_streams)
{
    Test *t = test_new(&(TestConfig) {
        .cluster_size = cluster_size,
        .cache_size = cluster_size * nb_clusters,
        .max_streams = max_streams,
        .align = 512,
    });
    TestOp ops[NB_WRITERS];
    bool waited = false;
    int64_t offset = 0;
    unsigned i;

    disk_hold(t->disk);
    for (i = 0; i < NB_WRITERS; i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .gen = i,
            .bytes = 1 + (i * 377) % (nb_clusters / 2 * cluster_size),
        };
        op_start(&ops[i]);
    }

    while (!ops_done(ops, NB_WRITERS)) {
        settle();
        assert_stat(t, cached_bytes, <=, t->cache_size);
        assert_stat(t, max_cached_bytes, <=, t->cache_size);
        if (!ops_done(ops, NB_WRITERS)) {
            waited = true;
            g_assert_cmpuint(t->disk->nb_held, >, 0);
            disk_release_one(t->disk);
        }
    }
    disk_release(t->disk);
    settle();

    g_assert_true(waited);
    g_assert_cmpuint(t->disk->max_in_flight, <=, 4);
    for (i = 0; i < NB_WRITERS; i++) {
        /* First come, first served */
        g_assert_cmpint(ops[i].ret, ==, 0);
        g_assert_cmpint(ops[i].offset, >=, offset);
        offset = ops[i].offset + ops[i].bytes;
    }
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    test_free(t);
}

/* Many writers in a small cache all get through, and in their order */
static void test_bound(void)
{
    bound_case(512, 2, 1);
    bound_case(512, 8, 4);
    bound_case(4096, 2, 1);
    bound_case(4096, 2, 8);
}

/* Memory is counted in clusters, not in bytes */
WB_TEST(bound_clusters, .cluster_size = 4096, .cache_size = 4 * 4096,
        .max_streams = 100)
{
    TestOp ops[16];
    unsigned i, n, nb_released;

    disk_hold(t->disk);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_write, .offset = i * 8192, .bytes = 1, .gen = i,
        };
        op_start(&ops[i]);
    }

    /* Each write to the disk makes room for one more */
    for (nb_released = 0; ; nb_released++) {
        settle();
        for (n = 0; n < ARRAY_SIZE(ops) && op_done(&ops[n]); n++) {
            g_assert_cmpint(ops[n].ret, ==, 0);
        }
        g_assert_cmpuint(n, ==, 4 + nb_released);
        assert_stat(t, cached_bytes, ==, 4);
        if (n == ARRAY_SIZE(ops)) {
            break;
        }
        for (i = n; i < ARRAY_SIZE(ops); i++) {
            g_assert_false(op_done(&ops[i]));
        }
        disk_release_one(t->disk);
    }

    disk_release(t->disk);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Who needs much is not overtaken by those who need little */
WB_TEST(reserve_order, .cluster_size = 4096, .cache_size = 8 * 4096)
{
    TestOp held = { .t = t, .fn = op_reserve, .nb_clusters = 5 };
    TestOp large = { .t = t, .fn = op_reserve, .nb_clusters = 4 };
    TestOp small = { .t = t, .fn = op_reserve, .nb_clusters = 1 };

    g_assert_cmpint(op_run(&held), ==, 0);
    op_start(&large);
    op_start(&small);
    settle();
    g_assert_false(op_done(&large));
    g_assert_false(op_done(&small));

    run_ok(t, op_unreserve, .nb_clusters = 5);
    g_assert_cmpint(op_wait(&large), ==, 0);
    g_assert_cmpint(op_wait(&small), ==, 0);
    run_ok(t, op_unreserve, .nb_clusters = 4);
    run_ok(t, op_unreserve, .nb_clusters = 1);

    /* All of it is possible, and what never fits is refused */
    run_fails(t, -EINVAL, op_reserve, .nb_clusters = 9);
    run_fails(t, -EINVAL, op_reserve, .nb_clusters = UINT64_MAX);
    run_ok(t, op_reserve, .nb_clusters = 0);
    run_ok(t, op_reserve, .nb_clusters = 8);
    run_ok(t, op_unreserve, .nb_clusters = 8);
    run_ok(t, op_unreserve, .nb_clusters = 0);
}

/* Streams are ended only if there is no other way, and the oldest first */
WB_TEST(streams_end, .cluster_size = 4096, .cache_size = 3 * 4096)
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
    run_ok(t, op_reserve, .nb_clusters = 2);
    g_assert_false(wb_continues(t->wb, 100));
    g_assert_true(wb_continues(t->wb, MiB + 100));
    run_ok(t, op_unreserve, .nb_clusters = 2);

    assert_on_disk(t, 0, MiB);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* While a reservation is outstanding, what it counts on stays */
WB_TEST(streams_stay, .cluster_size = 4096, .cache_size = 2 * 4096)
{
    TestOp waiter = { .t = t, .fn = op_reserve, .nb_clusters = 1 };

    write_ok(t, 0, 100);
    run_ok(t, op_reserve, .nb_clusters = 1);
    op_start(&waiter);
    wb_end_streams(t->wb);
    flush_ok(t);
    settle();
    g_assert_false(op_done(&waiter));
    g_assert_true(wb_continues(t->wb, 100));

    /* That needs no new cluster, so there is room for the other */
    run_ok(t, op_accept, .nb_clusters = 1, .offset = 100, .bytes = 100);
    g_assert_cmpint(op_wait(&waiter), ==, 0);
    g_assert_true(wb_continues(t->wb, 200));
    run_ok(t, op_unreserve, .nb_clusters = 1);

    /* Where it does need one, the waiter gets that of the stream */
    run_ok(t, op_reserve, .nb_clusters = 1);
    op_start(&waiter);
    settle();
    g_assert_false(op_done(&waiter));
    run_ok(t, op_accept, .nb_clusters = 1, .offset = MiB, .bytes = 100);
    g_assert_cmpint(op_wait(&waiter), ==, 0);
    g_assert_false(wb_continues(t->wb, 200));
    g_assert_true(wb_continues(t->wb, MiB + 100));

    /* A write that is refused uses its reservation up as well */
    run_fails(t, -EBUSY, op_accept, .nb_clusters = 1, .offset = MiB + 200,
              .bytes = 1);
    run_ok(t, op_reserve, .nb_clusters = 2);
    run_ok(t, op_unreserve, .nb_clusters = 2);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Writes that would need more than one run in a cluster change nothing */
WB_TEST(refused, .cluster_size = 4096, .cache_size = 16 * 4096)
{
    const struct {
        int64_t offset;
        int64_t bytes;
    } bad[] = {
        { 4096, 10 },           /* before a run */
        { 5000, 10 },           /* its start again */
        { 5050, 100 },          /* in the middle */
        { 5101, 10 },           /* after a gap */
        { 0, 8192 },            /* across it */
        { 5100, 8192 },         /* continues it, but reaches another */
        { 3 * 4096 - 1, 2 },    /* reaches a finished one */
        { 3 * 4096, 1 },        /* starts in that */
    };
    size_t i;

    write_ok(t, 5000, 100);
    write_ok(t, 3 * 4096, 4096);
    for (i = 0; i < ARRAY_SIZE(bad); i++) {
        run_fails(t, -EBUSY, op_write, .offset = bad[i].offset,
              .bytes = bad[i].bytes, .gen = 9);
        read_ok(t, 0, 64 * KiB);
        assert_stat(t, cached_bytes, ==, 100 + 4096);
    }
    write_ok(t, 5100, 3 * 4096 - 5100);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* ---- Errors ---- */

/* After an error, all who come share one attempt, and data stays readable */
WB_TEST(error_shared, .cluster_size = 64 * KiB, .cache_size = 4 * MiB)
{
    TestOp ops[] = {
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_reserve, .nb_clusters = 1 },
        { .t = t, .fn = op_append, .bytes = 1000 },
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_reserve, .nb_clusters = 1 },
    };
    int64_t accepted = 2 * MiB + 1000;
    int round;

    disk_hold(t->disk);
    append_ok(t, accepted);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 2);
    disk_fail(t->disk, EIO, 1);
    disk_release(t->disk);
    settle();
    /* One of the two failed; nobody tries again by himself */
    g_assert_cmpuint(t->disk->nb_writes, ==, 2);
    assert_stat(t, errors, ==, 1);
    read_ok(t, 0, DISK_SIZE);

    for (round = 1; round <= 3; round++) {
        disk_fail(t->disk, round == 2 ? ENOSPC : EIO, 0);
        disk_hold(t->disk);
        ops_start(ops, ARRAY_SIZE(ops));
        settle();
        g_assert_cmpuint(t->disk->nb_held, ==, 1);
        disk_release(t->disk);
        ops_finish(ops, ARRAY_SIZE(ops), round == 2 ? -ENOSPC : -EIO);
        g_assert_cmpuint(t->disk->nb_writes, ==, 2 + round);
        assert_stat(t, errors, ==, 1 + round);
        g_assert_cmpint(t->alloc, ==, accepted);
        read_ok(t, 0, DISK_SIZE);
    }

    /* The attempt that succeeds clears the error for all */
    disk_fail(t->disk, 0, 0);
    disk_hold(t->disk);
    ops_start(ops, ARRAY_SIZE(ops));
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release(t->disk);
    ops_finish(ops, ARRAY_SIZE(ops), 0);
    run_ok(t, op_unreserve, .nb_clusters = 2);
    assert_on_disk(t, 0, accepted);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, errors, ==, 4);
}

/* The success of another request does not mean that the failed one is there */
WB_TEST(error_kept, .cluster_size = 64 * KiB, .cache_size = 4 * MiB)
{
    disk_hold(t->disk);
    append_ok(t, 2 * MiB);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 2);
    disk_fail(t->disk, EIO, 0);
    disk_release_one(t->disk);
    settle();
    disk_fail(t->disk, 0, 0);
    disk_release(t->disk);
    settle();
    assert_on_disk(t, MiB, MiB);
    assert_writes(t->disk, { 0, MiB }, { MiB, MiB });

    /* There is room, but first the failed one is tried once more */
    disk_fail(t->disk, ENOSPC, 0);
    run_fails(t, -ENOSPC, op_append, .bytes = 1);
    assert_writes(t->disk, { 0, MiB });
    disk_fail(t->disk, 0, 0);
    append_ok(t, 1);
    assert_writes(t->disk, { 0, MiB });
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);

    /* Now several requests are in flight again, and nobody waits for them */
    disk_hold(t->disk);
    append_ok(t, 2 * MiB);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 2);
    disk_release(t->disk);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A flush stops at the first failure; an error is not forgotten by success */
WB_TEST(error_fails_fast, .cluster_size = 64 * KiB, .cache_size = MiB,
        .max_streams = 8)
{
    TestOp flush[2] = {
        { .t = t, .fn = op_flush },
        { .t = t, .fn = op_flush },
    };
    unsigned n;
    int i;

    for (i = 0; i < 7; i++) {
        write_ok(t, i * MiB, 1000);
    }
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    n = t->disk->nb_writes;
    g_assert_cmpuint(n, <=, 4);

    /* One that succeeds and one that fails: not all is written */
    disk_fail(t->disk, ENOSPC, 1);
    run_fails(t, -ENOSPC, op_flush);
    g_assert_cmpuint(t->disk->nb_writes, >=, n + 2);
    g_assert_cmpuint(t->disk->nb_writes, <=, n + 5);
    read_ok(t, 0, DISK_SIZE);

    /* After one that succeeds, there is no need to be careful */
    disk_fail(t->disk, 0, 0);
    disk_hold(t->disk);
    ops_start(flush, 2);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release_one(t->disk);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 1);
    disk_release(t->disk);
    ops_finish(flush, 2, 0);
    assert_on_disk(t, 0, DISK_SIZE);
    g_array_set_size(t->disk->log, 0);
    flush_ok(t);
    assert_no_writes(t->disk);

    /* The streams survived */
    for (i = 0; i < 7; i++) {
        write_ok(t, i * MiB + 1000, 1000);
    }
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* With a full cache all writers get the error; what was refused is retried */
WB_TEST(error_full, .cluster_size = 4096, .cache_size = 4 * 4096)
{
    TestOp ops[16];
    unsigned nb_failed = 0;
    unsigned i;

    disk_fail(t->disk, ENOSPC, 0);
    disk_hold(t->disk);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_write, .offset = i * 4096, .bytes = 4096,
            .gen = i,
        };
        op_start(&ops[i]);
    }
    settle();
    disk_release(t->disk);
    settle();
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        g_assert_true(op_done(&ops[i]));
        if (ops[i].ret) {
            g_assert_cmpint(ops[i].ret, ==, -ENOSPC);
            nb_failed++;
        }
    }
    g_assert_cmpuint(nb_failed, ==, ARRAY_SIZE(ops) - 4);
    read_ok(t, 0, DISK_SIZE);

    /* It is the same at any later time */
    run_fails(t, -ENOSPC, op_write, .offset = MiB, .bytes = 1);
    run_fails(t, -ENOSPC, op_flush);

    disk_fail(t->disk, 0, 0);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        if (ops[i].ret) {
            g_assert_cmpint(op_run(&ops[i]), ==, 0);
        }
    }
    flush_ok(t);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        uint8_t buf[4096];

        fill(buf, ops[i].offset, ops[i].bytes, ops[i].gen);
        assert_bytes(t->disk->data + ops[i].offset, buf, ops[i].offset,
                     ops[i].bytes);
    }
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A reservation made before the error can be used after it */
WB_TEST(error_reserved, .cluster_size = 4096, .cache_size = 16 * 4096)
{
    TestOp waiter = { .t = t, .fn = op_reserve, .nb_clusters = 16 };

    run_ok(t, op_reserve, .nb_clusters = 1);
    run_ok(t, op_reserve, .nb_clusters = 2);
    op_start(&waiter);
    settle();
    g_assert_false(op_done(&waiter));

    run_ok(t, op_accept, .nb_clusters = 1, .offset = MiB, .bytes = 100);
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    g_assert_cmpint(op_wait(&waiter), ==, -EIO);
    run_ok(t, op_accept, .nb_clusters = 2, .offset = 2 * MiB, .bytes = 5000);
    read_ok(t, 0, DISK_SIZE);

    disk_fail(t->disk, 0, 0);
    g_assert_cmpint(op_run(&waiter), ==, 0);
    run_ok(t, op_unreserve, .nb_clusters = 16);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* ---- Drain ---- */

/* Release the disk when the main loop runs next */
static void release_later(Test *t)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), disk_release, t->disk);
}

static void drain_case(bool all)
{
    const TestConfig config = {
        .cluster_size = 4096,
        .cache_size = 16 * 4096,
    };
    Test *t = test_new(&config);
    TestOp ops[8];
    unsigned i, n;

    /* Workers in flight, and writers that wait for room */
    t->disk->max_hops = 3;
    disk_hold(t->disk);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .bytes = 5 * 4096, .gen = i,
        };
        op_start(&ops[i]);
    }
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    g_assert_false(op_done(&ops[ARRAY_SIZE(ops) - 1]));

    /* Nobody but the waiters themselves can write for them now */
    release_later(t);
    if (all) {
        bdrv_drain_all_begin();
    } else {
        bdrv_drained_begin(t->bs);
    }
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        g_assert_true(op_done(&ops[i]));
        g_assert_cmpint(ops[i].ret, ==, 0);
    }

    /* What is accepted in the drained section is written after it */
    flush_ok(t);
    n = t->disk->nb_writes;
    append_ok(t, 8 * 4096);
    settle();
    g_assert_cmpuint(t->disk->nb_writes, ==, n);

    if (all) {
        bdrv_drain_all_end();
    } else {
        bdrv_drained_end(t->bs);
    }
    append_ok(t, 1);
    settle();
    g_assert_cmpuint(t->disk->nb_writes, >, n);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);

    test_free(t);
}

static void test_drain(void)
{
    drain_case(false);
}

static void test_drain_all(void)
{
    drain_case(true);
}

/* A drain waits for what is in flight, not for all that is worth writing */
WB_TEST(drain_rest, .cluster_size = 4096, .cache_size = 64 * 4096,
        .max_transfer = 4096)
{
    disk_hold(t->disk);
    append_ok(t, 60 * 4096 + 1);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 4);

    release_later(t);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);
    bdrv_drained_end(t->bs);

    append_ok(t, 1);
    settle();
    g_assert_cmpuint(t->disk->nb_writes, ==, 60);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* The same for a node that failed as corrupt, which is not told of the drain */
WB_TEST(drain_failed, .cluster_size = 4096, .cache_size = 64 * 4096,
        .max_transfer = 4096)
{
    BlockDriver *drv = t->bs->drv;

    disk_hold(t->disk);
    append_ok(t, 60 * 4096 + 1);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 4);

    t->bs->drv = NULL;
    release_later(t);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);
    bdrv_drained_end(t->bs);

    t->bs->drv = drv;
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

static void coroutine_fn co_create_qcow2(void *opaque)
{
    bool *done = opaque;
    BlockdevRef file = { .type = QTYPE_QSTRING, .u.reference = (char *)"disk" };
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
static void test_drain_qcow2(void)
{
    BlockDriverState *disk_bs = bdrv_new_open_driver(&bdrv_disk, "disk",
                                                     BDRV_O_RDWR, &error_abort);
    Disk *d = disk_bs->opaque;
    QDict *opts = qdict_new();
    BlockBackend *blk;
    uint8_t buf[4096];
    bool done = false;
    unsigned n = 0;

    qemu_coroutine_enter(qemu_coroutine_create(co_create_qcow2, &done));
    AIO_WAIT_WHILE_UNLOCKED(NULL, !done);
    disk_set_limits(disk_bs, 1, 4096);

    qdict_put_str(opts, "driver", "qcow2");
    qdict_put_str(opts, "file", "disk");
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
            n = d->nb_writes;
            disk_hold(d);
        }
    }
    settle();
    g_assert_cmpuint(d->nb_held, ==, 4);

    aio_bh_schedule_oneshot(qemu_get_aio_context(), disk_release, d);
    bdrv_drained_begin(blk_bs(blk));
    g_assert_cmpuint(d->nb_writes, ==, n + 4);
    bdrv_drained_end(blk_bs(blk));

    g_assert_cmpint(blk_flush(blk), ==, 0);
    g_assert_cmpuint(d->nb_writes, >, n + 20);
    blk_unref(blk);
    bdrv_unref(disk_bs);
}

/* A cache that is created in a drained section writes nothing before its end */
static void test_drain_new(void)
{
    Test *t;

    bdrv_drain_all_begin();
    t = test_new(&(TestConfig) {
        .cluster_size = 4096,
        .cache_size = 16 * 4096,
    });
    bdrv_drained_begin(t->bs);
    bdrv_drained_end(t->bs);
    append_ok(t, 10 * 4096);
    settle();
    assert_no_writes(t->disk);
    bdrv_drain_all_end();

    append_ok(t, 1);
    settle();
    assert_writes(t->disk, { 0, 8 * 4096 });
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);

    test_free(t);
}

/* A drain ends though nothing can be written, and a flush in it works */
WB_TEST(drain_error, .cluster_size = 4096, .cache_size = 16 * 4096)
{
    disk_hold(t->disk);
    append_ok(t, 15 * 4096 + 1);
    disk_fail(t->disk, EIO, 0);
    release_later(t);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    assert_stat(t, cached_bytes, ==, 15 * 4096 + 1);

    run_fails(t, -EIO, op_flush);
    disk_fail(t->disk, 0, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    bdrv_drained_end(t->bs);
}

/* ---- Discard ---- */

WB_TEST(discard, .cluster_size = 4096, .cache_size = MiB)
{
    fill(t->disk->data, 0, DISK_SIZE, 77);
    fill(t->shadow, 0, DISK_SIZE, 77);

    /* Nothing cached, in a range of any size */
    wb_discard(t->bs, t->wb, 0, INT64_MAX);
    wb_discard(t->bs, t->wb, 5, 0);

    /* Never written: not at all, not even by a flush */
    write_ok(t, 1000, 20000);
    run_ok(t, op_discard, .offset = 0, .bytes = 24 * KiB);
    flush_ok(t);
    assert_no_writes(t->disk);
    assert_stat(t, cached_bytes, ==, 0);
    read_ok(t, 0, 64 * KiB);

    /* Only the clusters that the range touches */
    write_ok(t, 0, 4 * 4096);
    wb_discard(t->bs, t->wb, 4095, 2);
    memset(t->shadow, 0, 2 * 4096);
    read_ok(t, 0, 64 * KiB);
    flush_ok(t);
    assert_writes(t->disk, { 2 * 4096, 2 * 4096 });
    assert_on_disk(t, 0, DISK_SIZE);

    /* A stream that was flushed and is open */
    write_ok(t, MiB, 1000);
    flush_ok(t);
    assert_writes(t->disk, { MiB, 1000 });
    run_ok(t, op_discard, .offset = MiB, .bytes = 4096);
    g_assert_false(wb_continues(t->wb, MiB + 1000));
    read_ok(t, MiB, 4096);
    flush_ok(t);
    assert_no_writes(t->disk);
    write_ok(t, MiB + 10, 10);
    flush_ok(t);
    assert_writes(t->disk, { MiB + 10, 10 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* The space can be used by others as soon as a discard returns */
WB_TEST(discard_in_flight, .cluster_size = 4096, .cache_size = 8 * 4096)
{
    TestOp discard = {
        .t = t, .fn = op_discard, .offset = 4096, .bytes = 4096,
    };
    TestOp other = {
        .t = t, .fn = op_discard, .offset = MiB, .bytes = MiB,
    };
    TestOp flush = { .t = t, .fn = op_flush };
    uint8_t buf[1];
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, 1);

    disk_hold(t->disk);
    append_ok(t, 4 * 4096);
    op_start(&flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);

    op_start(&discard);
    settle();
    g_assert_false(op_done(&discard));
    /* Other space does not wait, and the rest of the request is cached */
    g_assert_cmpint(op_run(&other), ==, 0);
    read_ok(t, 0, 4096);
    read_ok(t, 2 * 4096, 2 * 4096);
    g_assert_cmpint(blk_preadv(t->blk, 4096, 1, &qiov, 0), ==, 0);
    g_assert_cmpint(buf[0], ==, 0);

    /* op_discard() has the disk write zeroes, so nothing may come after it */
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&discard), ==, 0);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    flush_ok(t);
    assert_writes(t->disk, { 0, 4 * 4096 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* The same for a stream that is being flushed, and that goes on meanwhile */
WB_TEST(discard_stream_in_flight, .cluster_size = 4096, .cache_size = 8 * 4096)
{
    TestOp discard = { .t = t, .fn = op_discard, .bytes = 4096 };
    TestOp flush = { .t = t, .fn = op_flush };

    disk_hold(t->disk);
    append_ok(t, 100);
    op_start(&flush);
    settle();
    append_ok(t, 100);
    op_start(&discard);
    settle();
    g_assert_false(op_done(&discard));
    g_assert_false(wb_continues(t->wb, 200));
    run_fails(t, -EBUSY, op_write, .offset = 0, .bytes = 1);

    disk_release(t->disk);
    g_assert_cmpint(op_wait(&discard), ==, 0);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    write_ok(t, 0, 50);
    read_ok(t, 0, 4096);
    flush_ok(t);
    assert_writes(t->disk, { 0, 100 }, { 0, 50 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* What was discarded is not tried again, and its error is gone with it */
WB_TEST(discard_failed, .cluster_size = 4096, .cache_size = 4 * 4096)
{
    TestOp discard = { .t = t, .fn = op_discard, .bytes = 2 * 4096 };

    /* Failed before */
    disk_fail(t->disk, EIO, 0);
    append_ok(t, 2 * 4096);
    settle();
    assert_writes(t->disk, { 0, 2 * 4096 });
    g_assert_cmpint(op_run(&discard), ==, 0);
    flush_ok(t);
    append_ok(t, 1);
    assert_no_writes(t->disk);
    disk_fail(t->disk, 0, 0);
    flush_ok(t);
    assert_writes(t->disk, { 2 * 4096, 1 });

    /* Fails afterwards */
    disk_fail(t->disk, EIO, 0);
    disk_hold(t->disk);
    write_ok(t, MiB, 2 * 4096);
    discard.offset = MiB;
    op_start(&discard);
    settle();
    g_assert_false(op_done(&discard));
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&discard), ==, 0);
    assert_writes(t->disk, { MiB, 2 * 4096 });
    flush_ok(t);
    write_ok(t, MiB, 100);
    assert_no_writes(t->disk);

    /* Of a full cache: there is room again for who comes next */
    disk_fail(t->disk, 0, 0);
    flush_ok(t);
    run_ok(t, op_discard, .offset = 0, .bytes = DISK_SIZE);
    disk_fail(t->disk, EIO, 0);
    write_ok(t, 0, 4 * 4096);
    settle();
    run_fails(t, -EIO, op_write, .offset = MiB, .bytes = 1);
    run_ok(t, op_discard, .offset = 0, .bytes = DISK_SIZE);
    g_array_set_size(t->disk->log, 0);
    write_ok(t, MiB, 4 * 4096 - 1);
    disk_fail(t->disk, 0, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A discard in a full cache lets those go on who wait for room */
WB_TEST(discard_makes_room, .cluster_size = 4096, .cache_size = 4 * 4096)
{
    TestOp waiter = { .t = t, .fn = op_write, .offset = MiB, .bytes = 10 };
    TestOp discard = { .t = t, .fn = op_discard, .bytes = 4096 };

    run_ok(t, op_reserve, .nb_clusters = 3);
    write_ok(t, 0, 10);
    op_start(&waiter);
    settle();
    g_assert_false(op_done(&waiter));
    g_assert_cmpint(op_run(&discard), ==, 0);
    g_assert_cmpint(op_wait(&waiter), ==, 0);
    run_ok(t, op_unreserve, .nb_clusters = 3);
    assert_no_writes(t->disk);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* ---- Reading ---- */

static void read_everywhere(Test *t)
{
    static const int64_t bounds[] = {
        0, 1, 999, 1000, 1001, 4095, 4096, 4097, 8999, 9000, 9001, 16383,
        16384, 16484, 20479, 20480, 24576, 24577, 32768,
    };
    static const unsigned pieces[] = { 0, 1, 512, 4095, 4096, 5000 };
    size_t i, j, k;

    for (i = 0; i < ARRAY_SIZE(bounds); i++) {
        for (j = i + 1; j < ARRAY_SIZE(bounds); j++) {
            for (k = 0; k < ARRAY_SIZE(pieces); k++) {
                if (pieces[k] &&
                    (bounds[j] - bounds[i]) / pieces[k] >= IOV_MAX) {
                    continue;
                }
                run_ok(t, op_read, .offset = bounds[i],
                       .bytes = bounds[j] - bounds[i], .gen = pieces[k]);
            }
        }
    }
}

/* Cached bytes from the cache, the others from the disk, at any boundary */
WB_TEST(read, .cluster_size = 4096, .cache_size = MiB, .no_pad = true,
        .align = 512)
{
    TestOp flush = { .t = t, .fn = op_flush };

    fill(t->disk->data, 0, DISK_SIZE, 77);
    fill(t->shadow, 0, DISK_SIZE, 77);
    write_ok(t, 1000, 8000);    /* across clusters */
    write_ok(t, 16384, 100);    /* the start of one */
    write_ok(t, 20480, 4096);   /* all of one */
    read_everywhere(t);

    /* From one side of a boundary only: no need for the disk */
    t->disk->nb_reads = 0;
    read_ok(t, 1000, 8000);
    read_ok(t, 20480, 4096);
    g_assert_cmpuint(t->disk->nb_reads, ==, 0);
    /* One request for each gap, however the buffers are cut */
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 100);
    g_assert_cmpuint(t->disk->nb_reads, ==, 4);

    /* What is in flight; without blocks, or reads would have to wait for it */
    test_set_limits(t, 1, 0);
    disk_hold(t->disk);
    op_start(&flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    read_everywhere(t);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    read_everywhere(t);
}

/* What padding is going to overwrite does not come from the disk */
WB_TEST(read_padding, .cluster_size = 4096, .cache_size = MiB, .align = 512)
{
    fill(t->disk->data, 0, DISK_SIZE, 77);
    fill(t->shadow, 0, DISK_SIZE, 77);
    write_ok(t, 1000, 8000);
    memset(t->shadow + 9000, 0, 12288 - 9000);
    t->disk->nb_reads = 0;
    read_ok(t, 1000, 12288 - 1000);
    run_ok(t, op_read, .offset = 8000, .bytes = 4000, .gen = 100);
    g_assert_cmpuint(t->disk->nb_reads, ==, 0);
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 5000);
    g_assert_cmpuint(t->disk->nb_reads, ==, 2);
}

WB_TEST(gap, .cluster_size = 4096, .cache_size = MiB)
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
WB_TEST(child, .cluster_size = 4096, .cache_size = 4 * 4096, .align = 512)
{
    BlockDriverState *old_bs = t->disk_bs;
    TestOp op = { .t = t, .fn = op_write, .offset = MiB, .bytes = 4 * 4096 };

    write_ok(t, 0, 1000);
    test_detach(t);
    read_ok(t, 0, 1000);
    run_fails(t, -ENOMEDIUM, op_read, .offset = 0, .bytes = 4097);
    run_fails(t, -ENOMEDIUM, op_flush);
    g_assert_cmpint(op_run(&op), ==, -ENOMEDIUM);
    read_ok(t, 0, 1000);
    assert_no_writes(t->disk);

    t->disk_bs = bdrv_new_open_driver(&bdrv_disk, "new", BDRV_O_RDWR,
                                      &error_abort);
    t->disk = t->disk_bs->opaque;
    test_set_limits(t, 4096, 0);
    test_attach(t, t->disk_bs);
    g_assert_cmpint(op_run(&op), ==, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_writes(t->disk, { 0, 4096 }, { MiB, 2 * 4096 },
                  { MiB + 2 * 4096, 2 * 4096 });
    assert_no_writes(old_bs->opaque);

    bdrv_unref(old_bs);
}

/* ---- Statistics ---- */

WB_TEST(stats, .cluster_size = 4096, .cache_size = 5 * 4096, .no_pad = true)
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
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    disk_fail(t->disk, 0, 0);
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
WB_TEST(stats_unwritten, .cluster_size = 4096, .cache_size = 8 * 4096)
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
    run_ok(t, op_discard, .offset = 8 * 4096, .bytes = 4096);
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

#define AGE_CONFIG                                                      \
    .cluster_size = 4096, .cache_size = 64 * 4096, .max_streams = 4,    \
    .max_age_ms = 1

/* The straggler makes requests of 256 KiB, the others of 1 MiB */
#define LARGE_CONFIG .cluster_size = 64 * KiB, .cache_size = 4 * MiB

/* What nobody flushes is written nevertheless, once, and not padded */
WB_TEST(age, AGE_CONFIG, .align = 512)
{
    append_ok(t, 1000);
    settle();
    assert_no_writes(t->disk);
    assert_stat(t, unwritten_bytes, ==, 1000);
    pass_time();
    /* The block layer reads what it needs for a whole block */
    g_assert_cmpuint(t->disk->nb_reads, ==, 1);
    assert_writes(t->disk, { 0, 1024 });
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, unwritten_bytes, ==, 0);
    pass_time();
    pass_time();
    assert_no_writes(t->disk);

    /* The stream goes on, and the timer runs again */
    append_ok(t, 4000);
    wait_for_writes(t, 1);
    assert_writes(t->disk, { 512, 4608 });
    assert_on_disk(t, 0, DISK_SIZE);
    run_ok(t, op_co_write, .offset = 4096, .bytes = 904, .gen = 2);
    wait_for_writes(t, 1);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* What is young when the timer runs out is written the next time */
WB_TEST(age_mark, AGE_CONFIG)
{
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 1000);
    pass_time();
    assert_writes(t->disk, { 0, 1000 });
    pass_time();
    assert_writes(t->disk, { MiB, 1000 });
}

/* One request at a time, and small ones */
WB_TEST(age_requests, LARGE_CONFIG, .max_age_ms = 1)
{
    append_ok(t, 640 * KiB);
    append_ok(t, 1);
    settle();
    assert_no_writes(t->disk);
    disk_hold(t->disk);
    pass_time();
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release(t->disk);
    wait_for_writes(t, 3);
    assert_writes(t->disk, { 0, 256 * KiB }, { 256 * KiB, 256 * KiB },
                  { 512 * KiB, 128 * KiB + 1 });
    g_assert_cmpuint(t->disk->max_in_flight, ==, 1);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Not in a drained section, but after it */
WB_TEST(age_drained, AGE_CONFIG)
{
    append_ok(t, 10 * 4096);
    bdrv_drained_begin(t->bs);
    pass_time();
    pass_time();
    assert_no_writes(t->disk);
    bdrv_drained_end(t->bs);
    wait_for_writes(t, 1);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* A drained section that begins meanwhile waits for one request */
WB_TEST(age_drain_begins, LARGE_CONFIG, .max_age_ms = 1)
{
    append_ok(t, 640 * KiB);
    disk_hold(t->disk);
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);

    aio_bh_schedule_oneshot(qemu_get_aio_context(), disk_release, t->disk);
    bdrv_drained_begin(t->bs);
    assert_writes(t->disk, { 0, 256 * KiB });
    bdrv_drained_end(t->bs);
    wait_for_writes(t, 2);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* Not on a node that is inactive, or whose image is corrupt */
WB_TEST(age_inactive, AGE_CONFIG)
{
    append_ok(t, 1000);
    t->bs->open_flags |= BDRV_O_INACTIVE;
    pass_time();
    pass_time();
    assert_no_writes(t->disk);
    t->bs->open_flags &= ~BDRV_O_INACTIVE;
    wait_for_writes(t, 1);

    append_ok(t, 1000);
    g_array_set_size(t->disk->log, 0);
    t->bs->drv = NULL;
    pass_time();
    pass_time();
    assert_no_writes(t->disk);
    t->bs->drv = &bdrv_node;
}

/* One attempt; then it is for a flush or a writer to try again */
WB_TEST(age_error, AGE_CONFIG)
{
    append_ok(t, 1000);
    disk_fail(t->disk, EIO, 0);
    pass_time();
    assert_writes(t->disk, { 0, 1000 });
    assert_stat(t, errors, ==, 1);
    pass_time();
    pass_time();
    assert_no_writes(t->disk);
    run_fails(t, -EIO, op_flush);
    disk_fail(t->disk, 0, 0);
    flush_ok(t);
    g_array_set_size(t->disk->log, 0);

    append_ok(t, 1000);
    wait_for_writes(t, 1);
    assert_writes(t->disk, { 1000, 1000 });
    assert_on_disk(t, 0, DISK_SIZE);
}

/* The timer is gone with the cache, also when it has run out */
static void test_age_free(void)
{
    Test *t = test_new(&(TestConfig) { AGE_CONFIG });

    append_ok(t, 1000);
    g_usleep(2000);
    bdrv_drained_begin(t->bs);
    run_ok(t, op_flush);
    g_array_set_size(t->disk->log, 0);
    bdrv_drained_end(t->bs);
    append_ok(t, 1000);
    test_free(t);
    qemu_clock_run_timers(QEMU_CLOCK_REALTIME);
    settle();
}

/* ---- Settling ---- */

/* The cache is so full that four requests are in flight, and more to come */
#define BUSY_CONFIG                                                     \
    .cluster_size = 4096, .cache_size = 64 * 4096, .max_transfer = 4096, \
    .busy = true

/*
 * Who settles a node waits for what is in flight, but for no more; then a graph
 * change need not wait.  A flush and a writer go on.
 */
WB_TEST(settle_stop, BUSY_CONFIG)
{
    TestOp op = { .t = t, .fn = op_settle, .gen = BDRV_SETTLE_STOP };
    TestOp flush = { .t = t, .fn = op_flush };

    op_start(&op);
    settle();
    g_assert_false(op_done(&op));
    for (int i = 0; i < 3; i++) {
        disk_release_one(t->disk);
        settle();
    }
    g_assert_false(op_done(&op));
    disk_release_one(t->disk);
    settle();
    g_assert_true(op_done(&op));
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);

    /* It would hang if anything was in flight */
    append_ok(t, 4096);
    settle();
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);
    bdrv_graph_wrlock();
    bdrv_graph_wrunlock();

    op_start(&flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    assert_on_disk(t, 0, DISK_SIZE);
    append_ok(t, 4096 * 64);
}

/* It is not for ever: what is left is written after a while */
WB_TEST(settle_stop_ends, BUSY_CONFIG, .max_age_ms = 1)
{
    TestOp op = { .t = t, .fn = op_settle, .gen = BDRV_SETTLE_STOP };

    op_start(&op);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    wait_for_writes(t, 61);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, unwritten_bytes, ==, 0);
}

/* One at a time, but at once */
WB_TEST(settle_idle, BUSY_CONFIG)
{
    TestOp op = { .t = t, .fn = op_settle, .gen = BDRV_SETTLE_IDLE };

    op_start(&op);
    for (int i = 0; i < 4; i++) {
        g_assert_false(op_done(&op));
        disk_release_one(t->disk);
        settle();
    }
    g_assert_true(op_done(&op));
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    pass_time();
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 1);
    disk_release(t->disk);
    wait_for_writes(t, 61);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* In steps, between which the graph can be changed; it ends beside a writer */
WB_TEST(settle_write, BUSY_CONFIG)
{
    unsigned steps = 0;
    int ret;

    disk_fail(t->disk, EIO, 0);
    disk_release(t->disk);
    run_fails(t, -EIO, op_settle, .gen = BDRV_SETTLE_WRITE);
    disk_fail(t->disk, 0, 0);

    t->disk->max_hops = 3;
    while ((ret = run(t, op_settle, .gen = BDRV_SETTLE_WRITE)) > 0) {
        steps++;
        bdrv_graph_wrlock();
        bdrv_graph_wrunlock();
        append_ok(t, 2000);
        g_assert_cmpuint(steps, <, 100);
    }
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpuint(steps, >, 1);
    assert_on_disk(t, 0, 60 * 4096 + 1);
    flush_ok(t);
    g_assert_cmpint(run(t, op_settle, .gen = BDRV_SETTLE_WRITE), ==, 0);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* While requests are in flight, it sleeps */
WB_TEST(settle_write_waits, BUSY_CONFIG)
{
    TestOp op = { .t = t, .fn = op_settle, .gen = BDRV_SETTLE_WRITE };

    op_start(&op);
    settle();
    g_assert_false(op_done(&op));
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
    disk_release_one(t->disk);
    settle();
    g_assert_true(op_done(&op));
    g_assert_cmpint(op.ret, ==, 1);
    disk_release(t->disk);
    flush_ok(t);
}

/* A node above one that has a cache, and one whose image is corrupt */
WB_TEST(settle_graph, BUSY_CONFIG)
{
    BlockDriverState *raw;
    BlockBackend *blk;
    QDict *opts = qdict_new();
    TestOp op = { .t = t, .fn = op_settle, .gen = BDRV_SETTLE_STOP };
    BlockDriverState *bs = t->bs;

    disk_release(t->disk);
    flush_ok(t);
    qdict_put_str(opts, "driver", "raw");
    qdict_put_str(opts, "file", "node");
    raw = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR, &error_abort);
    blk = blk_new_with_bs(raw, BLK_PERM_WRITE, BLK_PERM_ALL, &error_abort);
    disk_hold(t->disk);
    append_ok(t, 60 * 4096);
    settle();
    t->bs = raw;
    op_start(&op);
    settle();
    g_assert_false(op_done(&op));
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    t->bs = bs;
    bs->drv = NULL;
    run_ok(t, op_settle, .gen = BDRV_SETTLE_STOP);
    bs->drv = &bdrv_node;
    blk_unref(blk);
    bdrv_unref(raw);
    flush_ok(t);
}

/* ---- Writing out in the background ---- */

WB_TEST(start_write_out, LARGE_CONFIG)
{
    /* Nothing to write */
    nb_written_out = 0;
    wb_start_write_out(t->wb);
    g_assert_cmpuint(nb_written_out, ==, 0);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 1);

    append_ok(t, 640 * KiB);
    assert_no_writes(t->disk);
    disk_hold(t->disk);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_release(t->disk);
    settle();
    g_assert_cmpuint(nb_written_out, ==, 2);
    g_assert_cmpuint(t->disk->nb_writes, ==, 3);
    assert_on_disk(t, 0, DISK_SIZE);

    /* In a drained section it has to wait */
    append_ok(t, 100);
    bdrv_drained_begin(t->bs);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(t->disk->nb_writes, ==, 3);
    bdrv_drained_end(t->bs);
    for (int i = 0; i < 30000 && nb_written_out == 2; i++) {
        pass_time();
    }
    g_assert_cmpuint(nb_written_out, ==, 3);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* What has failed is tried once; a flush that succeeds ends it */
WB_TEST(start_write_out_error, LARGE_CONFIG, .max_age_ms = 1)
{
    nb_written_out = 0;
    append_ok(t, 640 * KiB);
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    g_array_set_size(t->disk->log, 0);
    wb_start_write_out(t->wb);
    pass_time();
    assert_writes(t->disk, { 0, 256 * KiB });
    pass_time();
    assert_no_writes(t->disk);

    disk_fail(t->disk, 0, 0);
    pass_time();
    assert_no_writes(t->disk);
    g_assert_cmpuint(nb_written_out, ==, 0);
    flush_ok(t);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 1);

    /* It goes on when the first attempt is a success */
    append_ok(t, 640 * KiB);
    disk_fail(t->disk, EIO, 0);
    run_fails(t, -EIO, op_flush);
    disk_fail(t->disk, 0, 0);
    wb_start_write_out(t->wb);
    pass_time();
    g_assert_cmpuint(nb_written_out, ==, 2);
    assert_on_disk(t, 0, DISK_SIZE);
}

/* ---- Life time ---- */

static int coroutine_fn op_free(TestOp *op)
{
    Test *t = op->t;
    TestNode *s = t->bs->opaque;

    op_append(op);
    assert_no_writes(t->disk);
    wb_free(s->wb);
    s->wb = NULL;
    return 0;
}

/* A worker that was created, but did not begin, finds nothing to work on */
WB_TEST(free_pending, .cluster_size = 4096, .cache_size = 4 * 4096)
{
    run_ok(t, op_free, .bytes = 4 * 4096);
    bdrv_drained_begin(t->bs);
    bdrv_drained_end(t->bs);
    assert_no_writes(t->disk);
}

/* Data that could not be written is no obstacle to closing the node */
WB_TEST(close_error, .cluster_size = 4096, .cache_size = 4 * 4096)
{
    disk_fail(t->disk, EIO, 0);
    append_ok(t, 4 * 4096);
    run_fails(t, -EIO, op_flush);
}

/* An image that failed as corrupt is not written any more, and nobody hangs */
WB_TEST(abandon, .cluster_size = 4096, .cache_size = 16 * 4096,
        .max_transfer = 4096)
{
    TestOp flush = { .t = t, .fn = op_flush };

    disk_hold(t->disk);
    append_ok(t, 8 * 4096);
    op_start(&flush);
    settle();
    wb_abandon(t->wb);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&flush), ==, -ECANCELED);
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);
    read_ok(t, 0, 16 * 4096);
    run_fails(t, -ECANCELED, op_flush);
    run_fails(t, -ECANCELED, op_settle, .gen = BDRV_SETTLE_WRITE);
    run_fails(t, -ECANCELED, op_reserve, .nb_clusters = 13);
    run_ok(t, op_reserve, .nb_clusters = 12);
    run_ok(t, op_unreserve, .nb_clusters = 12);
    g_assert_cmpuint(t->disk->nb_writes, ==, 4);
}

/* ---- Several threads, and writers of the graph ---- */

/* Change the graph somewhere else while there are waiters */
WB_TEST(graph_change, .cluster_size = 4096, .cache_size = 4 * 4096,
        .align = 512)
{
    TestOp flush = { .t = t, .fn = op_flush };
    TestOp ops[16];
    unsigned i;

    t->disk->max_hops = 5;
    disk_hold(t->disk);
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        ops[i] = (TestOp) {
            .t = t, .fn = op_append, .bytes = 4000, .gen = i,
        };
        op_start(&ops[i]);
    }
    op_start(&flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    g_assert_false(op_done(&flush));

    release_later(t);
    bdrv_graph_wrlock();
    bdrv_graph_wrunlock();
    ops_finish(ops, ARRAY_SIZE(ops), 0);
    g_assert_cmpint(op_wait(&flush), ==, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
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
static void test_graph_worker(void)
{
    Test *t = test_new(&(TestConfig) {
        .cluster_size = 4096,
        .cache_size = 4 * 4096,
    });
    IOThread *iothread = iothread_new();
    WriterTest w = {
        .op = { .t = t, .fn = op_append_until_writer, .bytes = 2 * 4096 },
    };
    unsigned in_flight;

    op_start_in(&w.op, iothread_get_aio_context(iothread));
    while (!qatomic_read(&w.pending)) {
        g_usleep(1000);
    }
    assert_no_writes(t->disk);
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

    ops_finish(&w.op, 1, 0);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    test_free(t);
    iothread_join(iothread);
}

/*
 * Fill a range from its start to its end, and check it on the way.  Nobody else
 * uses the range.
 */
static int coroutine_fn op_fill(TestOp *op)
{
    Test *t = op->t;
    g_autoptr(GRand) rand = g_rand_new_with_seed(op->gen);
    int64_t end = op->offset + op->bytes;
    int64_t pos = op->offset;
    TestOp sub = { .t = t };
    int ret = 0;

    while (pos < end && ret == 0) {
        sub.gen = op->gen;
        sub.offset = pos;
        sub.bytes = MIN(end - pos,
                        g_rand_int_range(rand, 1, 2 * t->cluster_size));
        ret = op_write(&sub);
        if (ret == -EBUSY) {
            /* The stream was ended */
            pos = ROUND_UP(pos + 1, t->cluster_size);
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
                                    t->cluster_size);
            sub.bytes = t->cluster_size;
            ret = op_discard(&sub);
            break;
        }
    }
    return ret;
}

typedef void IOThreadsFunc(Test *t, IOThread **iothreads, int i);

static void iothreads_case(unsigned max_streams, IOThreadsFunc *interfere)
{
    Test *t = test_new(&(TestConfig) {
        .cluster_size = 4096,
        .cache_size = 12 * 4096,
        .max_streams = max_streams,
        .align = 512,
    });
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
        interfere(t, iothreads, i);
        aio_poll(qemu_get_aio_context(), false);
    }
    g_test_message("%u rounds", i);
    g_assert_cmpuint(i, >, 0);
    ops_finish(ops, ARRAY_SIZE(ops), 0);

    blk_set_aio_context(t->blk, qemu_get_aio_context(), &error_abort);
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, max_cached_bytes, <=, t->cache_size);
    assert_stat(t, errors, ==, 0);
    test_free(t);
    iothread_join(iothreads[0]);
    iothread_join(iothreads[1]);
}

static void no_interference(Test *t, IOThread **iothreads, int i)
{
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
    child_bs = bdrv_new_open_driver(&bdrv_disk, NULL, BDRV_O_RDWR,
                                    &error_abort);
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

/* Requests from several threads at a time */
static void test_iothreads(void)
{
    iothreads_case(8, no_interference);
    iothreads_case(2, no_interference);
}

/* The node's home changes while there are requests */
static void test_iothreads_move(void)
{
    iothreads_case(8, move_node);
    iothreads_case(2, move_node);
}

/* There are always writers of the graph that wait for the requests to end */
static void test_iothreads_graph(void)
{
    iothreads_case(8, change_graph);
    iothreads_case(2, change_graph);
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
    int64_t end = u->op.offset + u->op.bytes;
    int64_t max = MIN(3 * r->t->cluster_size, r->t->cache_size / 2);
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
    int64_t somewhere = g_rand_int_range(r->rand, op->offset,
                                         op->offset + op->bytes);
    int ret;

    switch (g_rand_int_range(r->rand, 0, 20)) {
    default:
        return random_write(u, &sub);
    case 0 ... 4:
        sub.offset = somewhere;
        sub.bytes = g_rand_int_range(r->rand, 1, op->offset + op->bytes -
                                     somewhere + 1);
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
        if (sub.offset + sub.bytes < op->offset + op->bytes) {
            sub.bytes = op->offset + op->bytes - sub.offset;
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
        test_set_limits(t, MIN(1 << g_rand_int_range(r->rand, 0, 13),
                               r->granularity),
                        g_rand_int_range(r->rand, 0, 2) * 20 * KiB);
        bdrv_drained_end(t->bs);
        break;
    case 2:
        bdrv_graph_wrlock();
        bdrv_graph_wrunlock();
        break;
    case 3:
        ret = wb_flush(t->bs, t->wb);
        g_assert(ret == 0 || ret == -EIO);
        break;
    case 4:
        assert_stat(t, cached_bytes, <=, t->cache_size);
        break;
    }
}

#define RANDOM_USERS 8
#define RANDOM_STEPS 1000

static void random_case(const TestConfig *config, unsigned seed)
{
    Test *t = test_new(config);
    RandomTest r = {
        .t = t,
        .rand = g_rand_new_with_seed(seed),
        .granularity = MAX(4096, config->cluster_size),
    };
    RandomUser users[RANDOM_USERS];
    bool done;
    int i;

    t->disk->max_hops = 5;
    g_rand_set_seed(t->disk->rand, seed);
    for (i = 0; i < RANDOM_USERS; i++) {
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
        for (i = 0; i < RANDOM_USERS; i++) {
            done &= op_done(&users[i].op);
        }
    } while (!done);

    t->disk->percent_bad = 0;
    flush_ok(t);
    assert_on_disk(t, 0, DISK_SIZE);
    assert_stat(t, max_cached_bytes, <=, t->cache_size);
    g_test_message("%u writes, %u refused, %u errors, %u flushes",
                   r.nb_writes, r.nb_refused, r.nb_errors, r.nb_flushes);
    g_assert_cmpuint(r.nb_writes, >, RANDOM_USERS * RANDOM_STEPS / 10);
    g_assert_cmpuint(r.nb_errors, >, 0);
    g_assert_cmpuint(r.nb_flushes, >, 0);

    g_rand_free(r.rand);
    test_free(t);
}

static void test_random(void)
{
    static const TestConfig configs[] = {
        { .cluster_size = 4096, .cache_size = 2 * 4096, .align = 512 },
        { .cluster_size = 4096, .cache_size = 16 * 4096, .align = 4096,
          .max_streams = 8 },
        { .cluster_size = 512, .cache_size = 16 * KiB, .align = 4096,
          .max_streams = 8 },
        { .cluster_size = 16 * KiB, .cache_size = 512 * KiB, .align = 512,
          .max_streams = 3, .no_pad = true },
    };
    unsigned seed = g_test_rand_int();
    size_t i;

    for (i = 0; i < ARRAY_SIZE(configs); i++) {
        random_case(&configs[i], seed + i);
    }
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);

#define ADD_FUNC(name, func) g_test_add_func("/write-behind/" name, func)
#define ADD(path, name)                                                 \
    g_test_add("/write-behind/" path, Test, &config_##name, test_set_up, \
               test_##name, test_tear_down)
    ADD("issue/large-requests", large_requests);
    ADD_FUNC("issue/request-size", test_request_size);
    ADD("issue/full-request", full_request);
    ADD("issue/limits-change", limits_change);
    ADD("issue/large-alignment", large_alignment);
    ADD("issue/no-pad", no_pad);
    ADD("flush/all", flush);
    ADD("flush/not-in-coroutine", not_in_coroutine);
    ADD("flush/in-flight", flush_in_flight);
    ADD("flush/growing", flush_growing);
    ADD("flush/growing-later", flush_growing_later);
    ADD("flush/terminates", flush_terminates);
    ADD_FUNC("bound/writers", test_bound);
    ADD("bound/clusters", bound_clusters);
    ADD("bound/order", reserve_order);
    ADD("bound/streams-end", streams_end);
    ADD("bound/streams-stay", streams_stay);
    ADD("refused", refused);
    ADD("error/shared-attempt", error_shared);
    ADD("error/kept", error_kept);
    ADD("error/fails-fast", error_fails_fast);
    ADD("error/full", error_full);
    ADD("error/reserved", error_reserved);
    ADD_FUNC("drain/node", test_drain);
    ADD_FUNC("drain/all", test_drain_all);
    ADD("drain/rest", drain_rest);
    ADD("drain/failed", drain_failed);
    ADD_FUNC("drain/new", test_drain_new);
    ADD_FUNC("drain/qcow2", test_drain_qcow2);
    ADD("drain/error", drain_error);
    ADD("discard/cached", discard);
    ADD("discard/in-flight", discard_in_flight);
    ADD("discard/stream-in-flight", discard_stream_in_flight);
    ADD("discard/failed", discard_failed);
    ADD("discard/makes-room", discard_makes_room);
    ADD("read/boundaries", read);
    ADD("read/padding", read_padding);
    ADD("read/gap", gap);
    ADD("child", child);
    ADD("write-out/range", write_out);
    ADD("write-out/error", write_out_error);
    ADD("overwrite", overwrite);
    ADD("append", append);
    ADD("stats/all", stats);
    ADD("stats/unwritten", stats_unwritten);
    ADD("age/written", age);
    ADD("age/mark", age_mark);
    ADD("age/requests", age_requests);
    ADD("age/drained", age_drained);
    ADD("age/drain-begins", age_drain_begins);
    ADD("age/inactive", age_inactive);
    ADD("age/error", age_error);
    ADD_FUNC("age/free", test_age_free);
    ADD("settle/stop", settle_stop);
    ADD("settle/stop-ends", settle_stop_ends);
    ADD("settle/idle", settle_idle);
    ADD("settle/write", settle_write);
    ADD("settle/write-waits", settle_write_waits);
    ADD("settle/graph", settle_graph);
    ADD("start-write-out/done", start_write_out);
    ADD("start-write-out/error", start_write_out_error);
    ADD("free/pending-worker", free_pending);
    ADD("free/after-error", close_error);
    ADD("abandon", abandon);
    ADD("graph-change/waiters", graph_change);
    ADD_FUNC("graph-change/worker", test_graph_worker);
    ADD_FUNC("iothreads/concurrent", test_iothreads);
    ADD_FUNC("iothreads/move", test_iothreads_move);
    ADD_FUNC("iothreads/graph-change", test_iothreads_graph);
    ADD_FUNC("random", test_random);
#undef ADD
#undef ADD_FUNC

    return g_test_run();
}
