/*
 * A node that has a WriteBehind, and requests to it, for tests of that
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "write-behind-node.h"

/* ---- The node that has the WriteBehind ---- */

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

BlockDriver bdrv_node = {
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

BlockDriverState *new_disk(const char *name, const TestConfig *config)
{
    return disk_new(&bdrv_disk, name, &(DiskConfig) {
        .len = DISK_SIZE, .max_len = DISK_SIZE, .align = config->align,
        .max_transfer = config->max_transfer,
    });
}

void test_attach(Test *t)
{
    bdrv_ref(t->disk_bs);
    bdrv_graph_wrlock();
    bdrv_attach_child(t->bs, t->disk_bs, "file", &child_of_bds,
                      BDRV_CHILD_IMAGE | BDRV_CHILD_PRIMARY, &error_abort);
    bdrv_graph_wrunlock();
}

void test_detach(Test *t)
{
    bdrv_graph_wrlock();
    bdrv_unref_child(t->bs, t->bs->file);
    bdrv_graph_wrunlock();
}

unsigned nb_written_out;

static void count_written_out(BlockDriverState *bs)
{
    nb_written_out++;
}

void test_new_wb(Test *t)
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

void fill(uint8_t *buf, int64_t offset, int64_t bytes, unsigned gen)
{
    int64_t i;

    for (i = offset; i < offset + bytes; i++) {
        *buf++ = i * 7 + (i >> 8) * 13 + (i >> 12) * 5 + gen;
    }
}

void fill_disk(Test *t)
{
    fill(t->disk->data, 0, DISK_SIZE, 77);
    fill(t->shadow, 0, DISK_SIZE, 77);
}

void assert_on_disk(Test *t, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&t->disk->lock);
    assert_bytes(t->disk->data + offset, t->shadow + offset, offset, bytes,
                 "disk");
}

void assert_all_on_disk(Test *t)
{
    assert_on_disk(t, 0, DISK_SIZE);
}

void forget_writes(Test *t)
{
    g_array_set_size(t->disk->log, 0);
}

void assert_log(Test *t, const DiskWrite *expected, unsigned n)
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

void assert_no_writes(Test *t)
{
    assert_log(t, NULL, 0);
}

void assert_held(Test *t, unsigned n)
{
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, n);
}

void drain_held(Test *t)
{
    disk_release_later(t->disk);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
}

void change_graph_elsewhere(void)
{
    bdrv_graph_wrlock();
    bdrv_graph_wrunlock();
}

/* ---- Requests, each in a coroutine of its own ---- */

int coroutine_fn op_write(TestOp *op)
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

int coroutine_fn op_read(TestOp *op)
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

int coroutine_fn op_discard(TestOp *op)
{
    int ret = compat_blk_co_pdiscard(op->t->blk, op->offset, op->bytes);

    if (ret == 0) {
        memset(op->t->shadow + op->offset, 0, op->bytes);
    }
    return ret;
}

int coroutine_fn op_blk_flush(TestOp *op)
{
    return blk_co_flush(op->t->blk);
}

/* Each of the others is a request of the node until its function returns */
static void request_end(BlockDriverState **bs)
{
    bdrv_dec_in_flight(*bs);
}

#define REQUEST_GUARD(t)                                                \
    __attribute__((cleanup(request_end)))                               \
    BlockDriverState *request_bs = (bdrv_inc_in_flight((t)->bs), (t)->bs); \
    GRAPH_RDLOCK_GUARD()

int coroutine_fn op_flush(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_flush(op->t->bs, op->t->wb);
}

int coroutine_fn op_reserve(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_reserve(op->t->wb, op->nb_clusters);
}

static int coroutine_fn op_unreserve(TestOp *op)
{
    wb_unreserve(op->t->wb, op->nb_clusters);
    return 0;
}

int coroutine_fn op_write_out(TestOp *op)
{
    REQUEST_GUARD(op->t);
    return wb_co_write_out(op->t->wb, op->offset, op->bytes, NULL);
}

int coroutine_fn op_write_out_unlocked(TestOp *op)
{
    Test *t = op->t;
    int ret;

    REQUEST_GUARD(t);
    qemu_co_mutex_lock(&t->lock);
    ret = wb_co_write_out(t->wb, op->offset, op->bytes, &t->lock);
    qemu_co_mutex_unlock(&t->lock);
    return ret;
}

int coroutine_fn op_continues(TestOp *op)
{
    bool continues;

    qemu_co_mutex_lock(&op->t->lock);
    continues = wb_continues(op->t->wb, op->offset);
    qemu_co_mutex_unlock(&op->t->lock);
    return continues;
}

int coroutine_fn op_settle(TestOp *op)
{
    GRAPH_RDLOCK_GUARD();
    return bdrv_co_settle(op->t->bs, op->gen);
}

int coroutine_fn op_accept(TestOp *op)
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

int coroutine_fn op_append(TestOp *op)
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

int coroutine_fn op_co_write(TestOp *op)
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

bool op_done(TestOp *op)
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

TestOp *op_start_in(TestOp *op, AioContext *ctx)
{
    op->ret = -EINPROGRESS;
    aio_co_enter(ctx, qemu_coroutine_create(op_entry, op));
    return op;
}

TestOp *op_start(TestOp *op)
{
    return op_start_in(op, qemu_get_aio_context());
}

int op_wait(TestOp *op)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, !op_done(op));
    return op->ret;
}

void assert_waits(TestOp *op)
{
    settle();
    g_assert_false(op_done(op));
}

bool ops_done(TestOp *ops, unsigned n)
{
    while (n && op_done(&ops[n - 1])) {
        n--;
    }
    return !n;
}

void ops_start(TestOp *ops, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        op_start(&ops[i]);
    }
}

void ops_finish(TestOp *ops, unsigned n, int ret)
{
    for (unsigned i = 0; i < n; i++) {
        finish(&ops[i], ret);
    }
}

void write_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_write, .offset = offset, .bytes = bytes, .gen = 1);
}

void append_ok(Test *t, int64_t bytes)
{
    run_ok(t, op_append, .bytes = bytes, .gen = 1);
}

void read_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_read, .offset = offset, .bytes = bytes);
}

void read_all(Test *t)
{
    read_ok(t, 0, DISK_SIZE);
}

void discard_ok(Test *t, int64_t offset, int64_t bytes)
{
    run_ok(t, op_discard, .offset = offset, .bytes = bytes);
}

void flush_ok(Test *t)
{
    run_ok(t, op_flush);
}

void flush_writes_nothing(Test *t)
{
    flush_ok(t);
    assert_no_writes(t);
}

void reserve_ok(Test *t, uint64_t nb_clusters)
{
    run_ok(t, op_reserve, .nb_clusters = nb_clusters);
}

void unreserve(Test *t, uint64_t nb_clusters)
{
    run_ok(t, op_unreserve, .nb_clusters = nb_clusters);
}

void accept_ok(Test *t, uint64_t nb_clusters, int64_t offset, int64_t bytes)
{
    run_ok(t, op_accept, .nb_clusters = nb_clusters, .offset = offset,
           .bytes = bytes);
}

bool continues(Test *t, int64_t offset)
{
    return wb_continues(t->wb, offset);
}

void assert_gap(Test *t, int64_t offset, int64_t bytes, int64_t gap)
{
    g_assert_cmpint(wb_gap(t->wb, offset, bytes), ==, gap);
}

void let_go(Test *t, int ret)
{
    disk_release(t->disk);
    finish(t->op, ret);
}

void recover(Test *t)
{
    disk_set_error(t->disk, 0);
    flush_ok(t);
}

void fail_flush(Test *t, int error)
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

/* ---- The fixture ---- */

void set_up(Test *t, const TestConfig *config)
{
    t->config = config;
    qemu_co_mutex_init(&t->lock);
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

void tear_down(Test *t, const TestConfig *config)
{
    if (!t->unchecked) {
        check_all(t);
    }
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t->shadow);
}
