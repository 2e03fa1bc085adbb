/*
 * Tests of the cacheextents filter
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Environment variables:
 * TEST_CACHEEXTENTS_SEED: seed of the random tests.  Without iothreads, the
 *                         same seed does the same.
 * TEST_CACHEEXTENTS_OPS: number of random operations, in all cases together.
 */

#include "qemu/osdep.h"
#include "block/coroutines.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "iothread.h"
#include "cacheextents-disk.h"

#define NB_USERS 12
#define NB_CASES 10

static unsigned seed;
static unsigned nb_ops = 60000;

/* A cacheextents node, a disk as its child, and a user of it */
typedef struct Test {
    BlockBackend *blk;
    BlockDriverState *bs;
    BlockDriverState *disk_bs;
    Disk *disk;
} Test;

static BlockDriverState *filter_new(const char *child, int64_t max_extents,
                                    int flags, Error **errp)
{
    QDict *opts = qdict_new();

    qdict_put_str(opts, "driver", "cacheextents");
    qdict_put_str(opts, "node-name", "cache");
    qdict_put_str(opts, "file", child);
    if (max_extents) {
        qdict_put_int(opts, "max-extents", max_extents);
    }
    return bdrv_open(NULL, NULL, opts, flags, errp);
}

static Test *test_new(const DiskConfig *config, int64_t max_extents)
{
    Test *t = g_new0(Test, 1);

    t->disk_bs = disk_new("disk", config);
    t->disk = t->disk_bs->opaque;
    t->bs = filter_new("disk", max_extents, BDRV_O_RDWR | BDRV_O_UNMAP,
                       &error_abort);
    t->blk = blk_new(qemu_get_aio_context(),
                     BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE |
                     BLK_PERM_WRITE_UNCHANGED | BLK_PERM_RESIZE, BLK_PERM_ALL);
    blk_insert_bs(t->blk, t->bs, &error_abort);
    blk_set_allow_write_beyond_eof(t->blk, true);
    return t;
}

static void test_free(Test *t)
{
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t);
}

static BlockStatsSpecificCacheExtents test_stats(Test *t)
{
    BlockStatsSpecific *stats = bdrv_get_specific_stats(t->bs);
    BlockStatsSpecificCacheExtents result = stats->u.cacheextents;

    qapi_free_BlockStatsSpecific(stats);
    return result;
}

/* ---- Operations ---- */

typedef enum OpType {
    OP_STATUS, OP_IS_ZERO, OP_IS_ALLOCATED, OP_WRITE, OP_ZERO, OP_UNMAP,
    OP_DISCARD, OP_TRUNCATE, OP_TYPES
} OpType;

typedef struct Op {
    Test *t;
    OpType type;
    int64_t offset;
    int64_t bytes;
    int ret; /* -EINPROGRESS until it is done */
    int64_t pnum;
} Op;

/* See disk_was() */
static void check_status(Op *op, uint64_t start, int flags)
{
    Disk *d = op->t->disk;
    /* Each block of the disk, and some that requests can change alone */
    int64_t step = MIN(d->config.grain, 7 * disk_unit(d));

    for (int64_t pos = op->offset; pos < op->offset + op->pnum; pos += step) {
        if (!disk_was(d, start, pos, flags)) {
            g_error("offset %" PRId64 " (of %" PRId64 " from %" PRId64
                    "): was not %x", pos, op->pnum, op->offset, flags);
        }
    }
}

static void coroutine_fn op_query(Op *op)
{
    BlockDriverState *bs = op->t->bs;
    BlockDriverState *file = NULL;
    uint64_t start = disk_now(op->t->disk);
    int64_t map = -1;

    GRAPH_RDLOCK_GUARD();

    switch (op->type) {
    case OP_STATUS:
        op->ret = bdrv_co_block_status_above(bs, NULL, op->offset, op->bytes,
                                             &op->pnum, &map, &file);
        if (op->ret >= 0 && op->pnum) {
            g_assert(op->pnum <= op->bytes);
            g_assert(op->ret & BDRV_BLOCK_OFFSET_VALID);
            g_assert(file == bs->file->bs);
            g_assert(map == op->offset);
            g_assert(!(op->ret & (BDRV_BLOCK_RAW | BDRV_BLOCK_RECURSE |
                                  BDRV_BLOCK_COMPRESSED)));
            op->ret &= DATA_ZERO;
            check_status(op, start, op->ret);
        }
        break;
    case OP_IS_ZERO:
        op->pnum = op->bytes;
        op->ret = bdrv_co_is_zero_fast(bs, op->offset, op->bytes);
        break;
    case OP_IS_ALLOCATED:
        op->ret = bdrv_co_is_allocated(bs, op->offset, op->bytes, &op->pnum);
        break;
    default:
        g_assert_not_reached();
    }
}

static void coroutine_fn op_entry(void *opaque)
{
    Op *op = opaque;
    BlockBackend *blk = op->t->blk;
    g_autofree uint8_t *buf = NULL;
    int ret = 0;

    switch (op->type) {
    case OP_WRITE:
        buf = g_malloc0(op->bytes);
        ret = blk_co_pwrite(blk, op->offset, op->bytes, buf, 0);
        break;
    case OP_ZERO:
    case OP_UNMAP:
        ret = blk_co_pwrite_zeroes(blk, op->offset, op->bytes,
                                   op->type == OP_UNMAP ? BDRV_REQ_MAY_UNMAP :
                                   0);
        break;
    case OP_DISCARD:
        ret = compat_blk_co_pdiscard(blk, op->offset, op->bytes);
        break;
    case OP_TRUNCATE:
        ret = blk_co_truncate(blk, op->offset, true, PREALLOC_MODE_OFF, 0,
                              NULL);
        break;
    default:
        op_query(op);
        ret = op->ret;
    }
    qatomic_store_release(&op->ret, ret);
    aio_wait_kick();
}

static Op *op_start(Test *t, OpType type, int64_t offset, int64_t bytes)
{
    Op *op = g_new(Op, 1);

    *op = (Op) { .t = t, .type = type, .offset = offset, .bytes = bytes,
                 .ret = -EINPROGRESS };
    aio_co_enter(qemu_get_aio_context(), qemu_coroutine_create(op_entry, op));
    return op;
}

static int op_finish(Op *op)
{
    int ret;

    AIO_WAIT_WHILE_UNLOCKED(NULL, qatomic_load_acquire(&op->ret) ==
                                  -EINPROGRESS);
    ret = op->ret;
    g_free(op);
    return ret;
}

static void change_ok(Test *t, OpType type, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(op_finish(op_start(t, type, offset, bytes)), ==, 0);
}

static int status(Test *t, int64_t offset)
{
    return op_finish(op_start(t, OP_STATUS, offset, 512));
}

/* Ask for the status of everything; returns how many queries that took */
static unsigned map(Test *t)
{
    unsigned before = t->disk->nb_queries;
    int64_t offset = 0;

    while (offset < t->disk->len) {
        Op *op = op_start(t, OP_STATUS, offset, t->disk->len - offset);

        AIO_WAIT_WHILE_UNLOCKED(NULL, op->ret == -EINPROGRESS);
        g_assert_cmpint(op->ret, >=, 0);
        g_assert_cmpint(op->pnum, >, 0);
        offset += op->pnum;
        g_free(op);
    }
    return t->disk->nb_queries - before;
}

/* Wait until @nb requests are held by the disk */
static void wait_held(Test *t, unsigned nb)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, qatomic_read(&t->disk->nb_held) != nb);
}

/* Let one request go on, where the disk holds no others any more */
static void let_go(Test *t, CoQueue *held)
{
    QEMU_LOCK_GUARD(&t->disk->lock);
    qemu_co_enter_next(held, &t->disk->lock);
}

/* ---- One situation each ---- */

#define BLOCK (64 * KiB)

/* Every other block is data */
static Test *new_striped(const DiskConfig *config, int64_t max_extents)
{
    Test *t = test_new(config, max_extents);

    for (int64_t pos = 0; pos < config->len; pos += 2 * config->grain) {
        disk_set(t->disk, pos, config->grain, DATA);
    }
    return t;
}

static const DiskConfig plain = { .len = 64 * BLOCK, .grain = BLOCK };

static void test_one_query(void)
{
    Test *t = new_striped(&plain, 0);

    g_assert_cmpuint(map(t), ==, 1);
    g_assert_cmpuint(map(t), ==, 0);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ALLOCATED, 0, BLOCK)), ==, 1);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ZERO, BLOCK, BLOCK)), ==, 1);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ZERO, 0, BLOCK)), ==, 0);
    g_assert_cmpuint(t->disk->nb_queries, ==, 1);
    g_assert_cmpuint(test_stats(t).extents, ==, 64);
    g_assert_cmpuint(test_stats(t).queries, ==, 1);
    g_assert_cmpuint(test_stats(t).misses, ==, 1);
    g_assert_cmpuint(test_stats(t).hits, ==, 64 + 63 + 3);
    test_free(t);
}

/* Callers who want less get the precise answer as well */
static void test_always_precise(void)
{
    Test *t = new_striped(&plain, 0);

    g_assert_cmpint(op_finish(op_start(t, OP_IS_ALLOCATED, 0, BLOCK)), ==, 1);
    g_assert_cmpint(status(t, BLOCK), ==, ZERO);
    g_assert_cmpuint(map(t), ==, 0);
    test_free(t);
}

static void test_one_extent_a_query(void)
{
    Test *t = new_striped(&(DiskConfig) { .len = 64 * BLOCK, .grain = BLOCK,
                                          .one = true }, 0);

    g_assert_cmpuint(map(t), ==, 64);
    g_assert_cmpuint(map(t), ==, 0);
    change_ok(t, OP_WRITE, 5 * BLOCK, 512);
    g_assert_cmpuint(map(t), ==, 1);
    test_free(t);
}

/* A query for each reach of an answer; all is one extent in the end */
static void test_reach(void)
{
    Test *t = test_new(&(DiskConfig) { .len = 64 * BLOCK, .grain = BLOCK,
                                       .reach = 16 * BLOCK - 512 }, 0);

    g_assert_cmpuint(map(t), ==, 5);
    g_assert_cmpuint(map(t), ==, 0);
    g_assert_cmpuint(test_stats(t).extents, ==, 1);
    g_assert_cmpuint(test_stats(t).hits, ==, 1);
    test_free(t);
}

/* A query is for what is not known, and for nothing else */
static void check_asked(Test *t, unsigned before, int64_t offset, int64_t bytes)
{
    g_assert_cmpuint(t->disk->nb_queries, ==, before + 1);
    g_assert_cmpint(t->disk->asked_offset, ==, offset);
    g_assert_cmpint(t->disk->asked_bytes, ==, bytes);
}

/*
 * A change is forgotten in whole blocks, and everything else is remembered,
 * whatever the disk has made of the blocks beside it.
 */
static void test_change_forgets_its_blocks(void)
{
    static const OpType types[] = { OP_WRITE, OP_ZERO, OP_UNMAP, OP_DISCARD };

    for (int align = 512; align <= 4096; align *= 8) {
        Test *t = new_striped(&(DiskConfig) { .len = 64 * BLOCK, .grain = BLOCK,
                                              .align = align }, 0);

        map(t);
        for (int i = 0; i < ARRAY_SIZE(types); i++) {
            int64_t pos = (i * 9 + 3) * BLOCK + 8192;
            unsigned before = t->disk->nb_queries;
            unsigned answered = t->disk->nb_answered;
            unsigned extents = test_stats(t).extents;
            int flags = status(t, pos);

            change_ok(t, types[i], pos + 100, 600);
            g_assert_cmpuint(test_stats(t).invalidations, ==, i + 1);
            g_assert_cmpuint(test_stats(t).extents, ==, extents + 1);
            g_assert_cmpint(status(t, pos - 512), ==, flags);
            g_assert_cmpint(status(t, pos + MAX(1024, align)), ==, flags);
            g_assert_cmpuint(t->disk->nb_queries, ==, before);
            g_assert_cmpuint(map(t), ==, 1);
            check_asked(t, before, pos, MAX(1024, align));
            g_assert_cmpuint(t->disk->nb_answered, ==, answered + 1);
            g_assert_cmpuint(map(t), ==, 0);
        }
        test_free(t);
    }
}

/* The disk of a guest that writes, and of which a mirror wants the status */
static void test_disk_in_use(void)
{
    static const int64_t max_extents[] = { 0, 100 };

    for (int i = 0; i < ARRAY_SIZE(max_extents); i++) {
        Test *t = test_new(&(DiskConfig) { .len = 256 * KiB, .grain = 512 },
                           max_extents[i]);
        unsigned answered;

        for (int64_t pos = 0; pos < 256 * KiB; pos += 1024) {
            disk_set(t->disk, pos, 512, DATA);
        }
        g_assert_cmpuint(map(t), ==, max_extents[i] ? 6 : 1);
        g_assert_cmpuint(t->disk->nb_answered, ==, 512);
        for (int j = 0; j < 60; j++) {
            int64_t offset = (j * 37 % 60) * 4096;

            answered = t->disk->nb_answered;
            change_ok(t, OP_WRITE, offset, 1024);
            g_assert_cmpint(status(t, offset), ==, DATA);
            g_assert_cmpuint(t->disk->nb_answered, ==, answered + 1);
        }
        if (!max_extents[i]) {
            /* What has become the same is one extent */
            g_assert_cmpuint(test_stats(t).extents, ==, 512 - 2 * 60);
        }
        test_free(t);
    }
}

static void coroutine_fn copy_entry(void *opaque)
{
    Op *op = opaque;

    op->ret = blk_co_copy_range(op->t->blk, BLOCK, op->t->blk, op->offset,
                                op->bytes, 0, 0);
    aio_wait_kick();
}

static void test_copy_range(void)
{
    Test *t = new_striped(&plain, 0);
    Op op = {
        .t = t, .offset = 12 * BLOCK, .bytes = BLOCK, .ret = -EINPROGRESS,
    };

    disk_set(t->disk, 0, 64 * BLOCK, ZERO);
    map(t);
    g_assert_cmpint(status(t, op.offset), ==, ZERO);
    aio_co_enter(qemu_get_aio_context(),
                 qemu_coroutine_create(copy_entry, &op));
    AIO_WAIT_WHILE_UNLOCKED(NULL, op.ret == -EINPROGRESS);
    g_assert_cmpint(op.ret, ==, 0);
    g_assert_cmpint(status(t, op.offset), ==, DATA);
    g_assert_cmpint(status(t, op.offset + BLOCK), ==, ZERO);
    test_free(t);
}

static void test_truncate(void)
{
    Test *t = new_striped(&plain, 0);

    map(t);
    change_ok(t, OP_TRUNCATE, 40 * BLOCK + 512, 0);
    g_assert_cmpuint(map(t), ==, 1);
    g_assert_cmpuint(test_stats(t).extents, ==, 41);
    change_ok(t, OP_TRUNCATE, 64 * BLOCK, 0);
    g_assert_cmpuint(map(t), ==, 1);
    change_ok(t, OP_WRITE, 70 * BLOCK, 512);
    g_assert_cmpuint(map(t), ==, 1);
    test_free(t);

    /* From the middle of a block */
    t = test_new(&(DiskConfig) { .len = 5 * 4096 + 512, .grain = 4096,
                                 .align = 4096 }, 0);
    g_assert_cmpint(status(t, 5 * 4096), ==, ZERO);
    change_ok(t, OP_TRUNCATE, 6 * 4096, 0);
    g_assert_cmpint(status(t, 5 * 4096), ==, DATA);
    test_free(t);
}

/* Extents end at blocks, also when these are larger all of a sudden */
static void test_block_size(void)
{
    Test *t = test_new(&(DiskConfig) { .len = 64 * KiB, .grain = 4096,
                                       .reach = 3 * 512 }, 0);

    g_assert_cmpuint(map(t), ==, 43);
    t->disk->config.align = 4096;
    t->disk->config.reach = 8192;
    bdrv_drained_begin(t->bs);
    bdrv_graph_rdlock_main_loop();
    bdrv_refresh_limits(t->disk_bs, NULL, &error_abort);
    bdrv_refresh_limits(t->bs, NULL, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    bdrv_drained_end(t->bs);
    g_assert_cmpuint(map(t), ==, 8);
    test_free(t);
}

static void test_failed_change_drops(void)
{
    Test *t = new_striped(&(DiskConfig) { .len = 64 * BLOCK, .grain = BLOCK,
                                          .random = true }, 0);

    map(t);
    t->disk->percent_bad = 100;
    g_assert_cmpint(op_finish(op_start(t, OP_WRITE, 0, 512)), ==, -EIO);
    g_assert_cmpint(status(t, 0), ==, -EIO);
    t->disk->percent_bad = 0;
    g_assert_cmpint(status(t, 0), ==, DATA);
    test_free(t);
}

/* When the large query fails, the child gets a small one */
static void test_failed_query(void)
{
    Test *t = new_striped(&plain, 0);
    unsigned before;

    t->disk->query_error = -EIO;
    g_assert_cmpint(status(t, 0), ==, -EIO);
    g_assert_cmpuint(t->disk->nb_queries, ==, 2);
    g_assert_cmpuint(test_stats(t).queries, ==, 2);
    t->disk->query_error = -ENOTSUP;
    before = test_stats(t).queries;
    g_assert_cmpint(status(t, 0), ==, -ENOTSUP);
    g_assert_cmpuint(test_stats(t).queries, ==, before);
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    /* Both have failed, so that this was no refusal */
    t->disk->query_error = 0;
    g_assert_cmpuint(map(t), ==, 1);
    test_free(t);
}

/* A child that refuses queries for many extents */
static void test_refused_query(void)
{
    static const int errors[] = { -EINVAL, -EIO, -EOVERFLOW, -EPERM };

    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        Test *t = new_striped(&plain, 0);
        Op *ops[2];

        t->disk->many_error = errors[i];
        g_assert_cmpuint(map(t), ==, 64 + 1);
        g_assert_cmpuint(test_stats(t).queries, ==, 64 + 1);
        g_assert_cmpuint(map(t), ==, 0);
        change_ok(t, OP_WRITE, 5 * BLOCK, 512);
        g_assert_cmpuint(map(t), ==, 1);
        g_assert_cmpuint(t->disk->nb_many, ==, 1);

        /* Nobody waits for an answer that is about something else */
        change_ok(t, OP_WRITE, 0, 10 * BLOCK);
        disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
        ops[0] = op_start(t, OP_STATUS, 0, BLOCK);
        ops[1] = op_start(t, OP_STATUS, 5 * BLOCK, BLOCK);
        wait_held(t, 2);
        disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
        op_finish(ops[0]);
        op_finish(ops[1]);

        /* It is asked again on another connection, */
        disk_reconnect(t->disk_bs);
        disk_set(t->disk, 0, 64 * BLOCK, ZERO);
        g_assert_cmpuint(map(t), ==, 2);
        g_assert_cmpuint(t->disk->nb_many, ==, 2);
        test_free(t);
    }
}

/* and when it may have been nothing but a passing error */
static void test_refused_query_once(void)
{
    Test *t = new_striped(&plain, 0);
    unsigned before;

    t->disk->many_error = -EIO;
    status(t, 0);
    t->disk->many_error = 0;
    before = t->disk->nb_queries;
    while (t->disk->nb_many == 1) {
        change_ok(t, OP_WRITE, 0, 512);
        g_assert_cmpint(status(t, 0), ==, DATA);
    }
    g_assert_cmpuint(t->disk->nb_queries, ==, before + 1001);
    g_assert_cmpuint(map(t), ==, 0);
    test_free(t);
}

static void test_max_extents(void)
{
    Test *t = new_striped(&plain, 20);

    /* 64 extents, 20 a query */
    g_assert_cmpuint(map(t), ==, 4);
    g_assert_cmpuint(test_stats(t).extents, <=, 20);
    g_assert_cmpuint(t->disk->nb_answered, <=, 4 * 20);
    /* What was looked at last is there */
    status(t, 63 * BLOCK);
    g_assert_cmpuint(t->disk->nb_queries, ==, 4);
    /* The first one does not know that it is a map */
    g_assert_cmpuint(map(t), ==, 4 + 1);
    test_free(t);

    t = new_striped(&plain, 1);
    g_assert_cmpuint(map(t), ==, 64);
    g_assert_cmpuint(test_stats(t).extents, ==, 1);
    test_free(t);
}

/*
 * A sector or a block of the child that has several statuses is data.  Extents
 * of 100 bytes: zero 0..799, data 800..899, zero from 900 on.
 */
static void test_small_extents(void)
{
    Test *t = test_new(&(DiskConfig) { .len = 100 * 512, .grain = 100,
                                       .align = 1 }, 0);

    disk_set(t->disk, 800, 100, DATA);
    g_assert_cmpint(status(t, 0), ==, ZERO);
    g_assert_cmpint(status(t, 512), ==, DATA);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ZERO, 512, 1)), ==, 0);
    g_assert_cmpint(status(t, 1023), ==, DATA);
    g_assert_cmpint(status(t, 1024), ==, ZERO);
    g_assert_cmpuint(t->disk->nb_queries, ==, 1);
    test_free(t);
}

/* An answer that ends inside of a sector says nothing about its rest */
static void test_short_answer(void)
{
    Test *t = test_new(&(DiskConfig) { .len = 100 * 512, .grain = 100,
                                       .align = 1, .reach = 700 }, 0);

    g_assert_cmpint(status(t, 0), ==, ZERO);
    g_assert_cmpuint(test_stats(t).extents, ==, 1);
    g_assert_cmpint(status(t, 512), ==, ZERO);
    g_assert_cmpuint(t->disk->nb_queries, ==, 2);
    test_free(t);

    t = test_new(&(DiskConfig) { .len = 100 * 512, .grain = 100,
                                 .align = 1, .reach = 100 }, 0);
    g_assert_cmpint(status(t, 0), ==, DATA);
    g_assert_cmpuint(t->disk->nb_queries, ==, 1);
    test_free(t);
}

/*
 * Neither data nor zero: nothing to be remembered.  The block layer goes on to
 * the child, and must not ask it again.
 */
static void test_unknown_contents(void)
{
    Test *t = test_new(&plain, 0);
    unsigned before;

    disk_set(t->disk, 0, 64 * BLOCK, UNKNOWN);
    g_assert_cmpuint(map(t), ==, 1);
    g_assert_cmpint(status(t, BLOCK), ==, UNKNOWN);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ALLOCATED, 0, BLOCK)), ==, 0);
    g_assert_cmpuint(t->disk->nb_queries, ==, 3);
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    test_free(t);

    /* What is beside it is remembered */
    t = test_new(&plain, 0);
    for (int i = 0; i < 64; i += 2) {
        disk_set(t->disk, i * BLOCK, BLOCK, UNKNOWN);
    }
    status(t, 0);
    g_assert_cmpuint(test_stats(t).extents, ==, 32);
    before = t->disk->nb_queries;
    g_assert_cmpint(status(t, 4 * BLOCK), ==, UNKNOWN);
    check_asked(t, before, 4 * BLOCK, BLOCK);
    test_free(t);
}

/* ---- Several requests at a time ---- */

/* The rule: what overlaps a change while it is asked for is asked for again */
static void check_asked_again(Test *t, OpType type)
{
    bool all = type == OP_TRUNCATE;
    unsigned before = t->disk->nb_queries;

    if (!all) {
        status(t, 0);
        status(t, 17 * BLOCK);
        g_assert_cmpuint(t->disk->nb_queries, ==, before);
    }
    g_assert_cmpuint(map(t), ==, 1);
    /* (The contents of what was discarded are not known) */
    g_assert_cmpuint(map(t), ==, type == OP_DISCARD ? 1 : 0);
    g_assert_cmpuint(test_stats(t).extents, >=, all ? 20 : 60);
}

static void start_change(Test *t, OpType type, Op **op)
{
    if (type == OP_TRUNCATE) {
        *op = op_start(t, type, 20 * BLOCK + 512, 0);
    } else {
        *op = op_start(t, type, 20 * BLOCK, BLOCK);
    }
}

static void test_query_and_change(const void *opaque)
{
    OpType type = *(const OpType *)opaque;
    Op *change, *query;
    Test *t;

    for (int order = 0; order < 8; order++) {
        bool change_first = order & 1;
        bool query_last = order & 2;
        int hold_change = order & 4 ? HOLD_BEFORE : HOLD_AFTER;

        t = new_striped(&plain, 0);
        if (change_first) {
            disk_hold(t->disk, HOLD_AFTER, hold_change);
            start_change(t, type, &change);
            wait_held(t, 1);
        } else {
            disk_hold(t->disk, HOLD_AFTER, hold_change);
        }
        query = op_start(t, OP_STATUS, 0, 512);
        wait_held(t, change_first ? 2 : 1);
        if (!change_first) {
            start_change(t, type, &change);
            wait_held(t, 2);
        }
        if (query_last) {
            disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
            g_assert_cmpint(op_finish(change), ==, 0);
            disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
            op_finish(query);
        } else {
            disk_hold(t->disk, HOLD_NEVER, hold_change);
            op_finish(query);
            disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
            g_assert_cmpint(op_finish(change), ==, 0);
        }
        check_asked_again(t, type);
        test_free(t);
    }
}

/* Those who ask while somebody else does wait for that answer */
static void test_shared_query(void)
{
    Test *t = new_striped(&plain, 0);
    Op *ops[10];

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    for (int i = 0; i < 10; i++) {
        ops[i] = op_start(t, OP_STATUS, i * BLOCK, 512);
    }
    wait_held(t, 1);
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    for (int i = 0; i < 10; i++) {
        op_finish(ops[i]);
    }
    g_assert_cmpuint(t->disk->nb_queries, ==, 1);
    test_free(t);
}

/* One that came after a change must not get an answer from before it */
static void test_shared_query_and_change(void)
{
    Test *t = new_striped(&plain, 0);
    Op *first, *second;

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    first = op_start(t, OP_STATUS, 0, 512);
    wait_held(t, 1);
    change_ok(t, OP_WRITE, 5 * BLOCK, BLOCK);
    second = op_start(t, OP_STATUS, 5 * BLOCK, 512);
    wait_held(t, 2);
    check_asked(t, 1, 5 * BLOCK, BLOCK);
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    op_finish(first);
    g_assert_cmpint(op_finish(second), ==, DATA);
    g_assert_cmpuint(map(t), ==, 0);
    g_assert_cmpuint(t->disk->nb_queries, ==, 2);
    test_free(t);
}

/* Where another query is in flight, or something is known, a query ends */
static void test_query_ends_at_others(void)
{
    Test *t = new_striped(&plain, 0);
    Op *ops[3];

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    ops[0] = op_start(t, OP_STATUS, 40 * BLOCK, 512);
    wait_held(t, 1);
    ops[1] = op_start(t, OP_STATUS, 20 * BLOCK + 512, 512);
    wait_held(t, 2);
    check_asked(t, 1, 20 * BLOCK + 512, 20 * BLOCK - 512);
    ops[2] = op_start(t, OP_STATUS, 0, 512);
    wait_held(t, 3);
    check_asked(t, 2, 0, 20 * BLOCK + 512);
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    for (int i = 0; i < 3; i++) {
        op_finish(ops[i]);
    }
    g_assert_cmpuint(map(t), ==, 0);
    g_assert_cmpuint(test_stats(t).extents, ==, 64);
    test_free(t);
}

/* Two wait for an answer that does not reach them: both ask, once */
static void test_query_takes_over(void)
{
    Test *t = new_striped(&(DiskConfig) { .len = 64 * BLOCK, .grain = BLOCK,
                                          .reach = 8 * BLOCK }, 0);
    static const int64_t offsets[] = { 0, 16 * BLOCK, 18 * BLOCK };
    Op *ops[3];

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    for (int i = 0; i < 3; i++) {
        ops[i] = op_start(t, OP_STATUS, offsets[i], 512);
    }
    wait_held(t, 1);
    g_assert_cmpuint(t->disk->nb_queries, ==, 1);
    t->disk->hold_queries = HOLD_BEFORE;
    let_go(t, &t->disk->held_queries);
    wait_held(t, 2);
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    for (int i = 0; i < 3; i++) {
        op_finish(ops[i]);
    }
    g_assert_cmpuint(t->disk->nb_queries, ==, 3);
    status(t, 25 * BLOCK);
    g_assert_cmpuint(t->disk->nb_queries, ==, 3);
    test_free(t);
}

/* An answer does not replace one that came earlier but is newer */
static void test_overtaken_by_answer(void)
{
    Test *t = test_new(&(DiskConfig) { .len = 10 * BLOCK + 512,
                                       .grain = BLOCK }, 0);
    Op *query;

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    query = op_start(t, OP_STATUS, 5 * BLOCK, 512);
    wait_held(t, 1);
    /* Makes the last block data, then is asked for while the other one waits */
    change_ok(t, OP_TRUNCATE, 12 * BLOCK, 0);
    t->disk->hold_queries = HOLD_NEVER;
    g_assert_cmpint(status(t, 0), ==, ZERO);
    let_go(t, &t->disk->held_queries);
    g_assert_cmpint(op_finish(query), ==, ZERO);

    g_assert_cmpint(status(t, 10 * BLOCK), ==, DATA);
    g_assert_cmpuint(t->disk->nb_queries, ==, 2);
    test_free(t);
}

/* A write and a truncation meet: the block layer has another length then */
static void test_truncate_and_write(void)
{
    Test *t = test_new(&plain, 0);
    Op *write;

    disk_hold(t->disk, HOLD_NEVER, HOLD_AFTER);
    write = op_start(t, OP_WRITE, 50 * BLOCK, BLOCK);
    wait_held(t, 1);
    t->disk->hold_changes = HOLD_NEVER;
    change_ok(t, OP_TRUNCATE, 40 * BLOCK + 512, 0);
    let_go(t, &t->disk->held_changes);
    g_assert_cmpint(op_finish(write), ==, 0);
    g_assert_cmpint(blk_getlength(t->blk), ==, 51 * BLOCK);
    g_assert_cmpint(t->disk->len, ==, 40 * BLOCK + 512);

    disk_set(t->disk, 42 * BLOCK, BLOCK, DATA);
    g_assert_cmpint(status(t, 40 * BLOCK), ==, ZERO);
    change_ok(t, OP_TRUNCATE, 64 * BLOCK, 0);
    g_assert_cmpint(status(t, 40 * BLOCK), ==, DATA);
    test_free(t);
}

/* Changes cut what is expected into more parts than there can be extents */
static void test_many_changes(void)
{
    Test *t = new_striped(&plain, 16);
    Op *query;

    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    query = op_start(t, OP_STATUS, 0, 512);
    wait_held(t, 1);
    for (int i = 0; i < 3000; i++) {
        change_ok(t, OP_WRITE, i % 1000 * 4096, 512);
        g_assert_cmpuint(test_stats(t).extents, <=, 16);
    }
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    op_finish(query);
    g_assert_cmpuint(test_stats(t).extents, <=, 16);
    map(t);
    test_free(t);
}

/* ---- Who else could change the child ---- */

static void test_reconnect(void)
{
    Test *t = new_striped(&plain, 0);
    Op *query;

    map(t);
    disk_reconnect(t->disk_bs);
    disk_set(t->disk, 0, 64 * BLOCK, ZERO);
    g_assert_cmpuint(map(t), ==, 1);

    /* In the middle of a query */
    change_ok(t, OP_WRITE, 0, 512);
    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    query = op_start(t, OP_STATUS, 0, 512);
    wait_held(t, 1);
    disk_reconnect(t->disk_bs);
    disk_set(t->disk, 0, 64 * BLOCK, DATA);
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    g_assert_cmpint(op_finish(query), ==, DATA);
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    g_assert_cmpuint(map(t), ==, 1);
    test_free(t);
}

/* Nothing is answered from memory while the driver's server is gone */
static void test_disconnected(void)
{
    Test *t = new_striped(&plain, 0);
    unsigned before;

    map(t);
    t->disk->disconnected = true;
    disk_set(t->disk, 0, BLOCK, ZERO);
    before = t->disk->nb_queries;
    for (int i = 1; i <= 3; i++) {
        g_assert_cmpint(status(t, 0), ==, ZERO);
        g_assert_cmpuint(t->disk->nb_queries, ==, before + i);
        g_assert_cmpuint(test_stats(t).extents, ==, 0);
    }
    t->disk->disconnected = false;
    g_assert_cmpuint(map(t), ==, 1);
    g_assert_cmpuint(map(t), ==, 0);
    test_free(t);
}

static void test_replaced_child(void)
{
    Test *t = new_striped(&plain, 0);
    BlockDriverState *other = disk_new("other", &plain);
    QDict *opts;

    map(t);
    opts = qdict_new();
    qdict_put_str(opts, "file", "other");
    g_assert_cmpint(bdrv_reopen(t->bs, opts, true, NULL), ==, 0);
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    bdrv_unref(t->disk_bs);
    t->disk_bs = other;
    t->disk = other->opaque;
    g_assert_cmpuint(map(t), ==, 1);
    g_assert_cmpint(status(t, 0), ==, ZERO);

    /* As a job does it */
    other = disk_new("third", &plain);
    bdrv_drained_begin(t->disk_bs);
    bdrv_drained_begin(other);
    bdrv_graph_wrlock();
    bdrv_replace_node(t->disk_bs, other, &error_abort);
    bdrv_graph_wrunlock();
    bdrv_drained_end(other);
    bdrv_drained_end(t->disk_bs);
    bdrv_unref(t->disk_bs);
    t->disk_bs = other;
    t->disk = other->opaque;
    disk_set(t->disk, 0, BLOCK, DATA);
    g_assert_cmpint(status(t, 0), ==, DATA);
    test_free(t);
}

static void test_reopen_max_extents(void)
{
    Test *t = new_striped(&plain, 0);
    QDict *opts;

    map(t);
    opts = qdict_new();
    qdict_put_int(opts, "max-extents", 10);
    g_assert_cmpint(bdrv_reopen(t->bs, opts, true, NULL), ==, 0);
    g_assert_cmpuint(map(t), ==, 7);
    g_assert_cmpuint(test_stats(t).extents, <=, 10);
    opts = qdict_new();
    qdict_put_int(opts, "max-extents", 0);
    g_assert_cmpint(bdrv_reopen(t->bs, opts, true, NULL), ==, -EINVAL);
    g_assert_cmpuint(test_stats(t).extents, <=, 10);
    test_free(t);
}

/* Another node of the same reopen fails */
static void test_reopen_abort(void)
{
    Test *t = new_striped(&plain, 0);
    BlockDriverState *other = disk_new("other", &plain);
    BlockReopenQueue *queue;
    QDict *opts = qdict_new();

    map(t);
    qdict_put_int(opts, "max-extents", 10);
    queue = bdrv_reopen_queue(NULL, t->bs, opts, true);
    opts = qdict_new();
    qdict_put_str(opts, "len", "another one");
    queue = bdrv_reopen_queue(queue, other, opts, true);
    g_assert_cmpint(bdrv_reopen_multiple(queue, NULL), <, 0);
    g_assert_cmpuint(map(t), ==, 0);
    g_assert_cmpuint(test_stats(t).extents, ==, 64);
    bdrv_unref(other);
    test_free(t);
}

static void test_inactive(void)
{
    Test *t = new_striped(&plain, 0);
    Op *query;

    map(t);
    blk_unref(t->blk);
    t->blk = NULL;
    bdrv_drain_all_begin();
    g_assert_cmpint(bdrv_inactivate(t->bs, &error_abort), ==, 0);
    bdrv_drain_all_end();
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    t->blk = blk_new(qemu_get_aio_context(), 0, BLK_PERM_ALL);
    g_assert_cmpint(blk_insert_bs(t->blk, t->bs, &error_abort), ==, 0);
    /* (The block layer itself remembers data) */
    status(t, BLOCK);
    status(t, BLOCK);
    g_assert_cmpuint(t->disk->nb_queries, ==, 3);

    /* Nor is an answer remembered that is under way when this changes */
    disk_hold(t->disk, HOLD_AFTER, HOLD_NEVER);
    query = op_start(t, OP_STATUS, BLOCK, 512);
    wait_held(t, 1);
    disk_set(t->disk, 0, BLOCK, ZERO);
    bdrv_graph_rdlock_main_loop();
    bdrv_activate(t->bs, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    disk_hold(t->disk, HOLD_NEVER, HOLD_NEVER);
    op_finish(query);
    g_assert_cmpuint(test_stats(t).extents, ==, 0);
    g_assert_cmpint(status(t, 0), ==, ZERO);
    g_assert_cmpuint(map(t), ==, 0);
    test_free(t);
}

static void test_cancel(void)
{
    Test *t = new_striped(&plain, 0);

    bdrv_cancel_in_flight(t->bs);
    g_assert_cmpuint(t->disk->nb_cancels, ==, 1);
    test_free(t);
}

/*
 * While the node has a user, nobody else may write to the child; nor write and
 * then be joined by a user.  What was known before is forgotten.
 */
static void test_permissions(void)
{
    Test *t = new_striped(&plain, 0);
    const uint64_t perms[] = { BLK_PERM_WRITE, BLK_PERM_RESIZE };

    for (int i = 0; i < ARRAY_SIZE(perms); i++) {
        BlockBackend *blk = blk_new(qemu_get_aio_context(), perms[i],
                                    BLK_PERM_ALL);
        Error *err = NULL;

        map(t);
        g_assert_cmpint(blk_insert_bs(blk, t->disk_bs, &err), <, 0);
        error_free_or_abort(&err);
        blk_unref(t->blk);
        blk_insert_bs(blk, t->disk_bs, &error_abort);
        disk_set(t->disk, 0, BLOCK, i ? DATA : ZERO);
        g_assert(!blk_new_with_bs(t->bs, BLK_PERM_CONSISTENT_READ,
                                  BLK_PERM_ALL, &err));
        error_free_or_abort(&err);
        blk_remove_bs(blk);
        t->blk = blk_new_with_bs(t->bs, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL,
                                 &error_abort);
        g_assert_cmpint(status(t, 0), ==, i ? DATA : ZERO);
        blk_unref(blk);
    }
    test_free(t);
}

/* ---- At random ---- */

typedef struct RandomCase {
    const char *name;
    DiskConfig config;
    int64_t max_extents;
    unsigned percent_bad;
    bool threads;
} RandomCase;

typedef struct RandomTest {
    Test *t;
    int nb_left;
    int nb_users;
    int nb_done[OP_TYPES];
    int nb_failed;
} RandomTest;

typedef struct User {
    RandomTest *r;
    GRand *rand;
} User;

static void coroutine_fn user_entry(void *opaque)
{
    User *u = opaque;
    RandomTest *r = u->r;
    Test *t = r->t;
    int64_t max_len = MAX_BLOCKS * t->disk->config.grain;
    uint32_t align = MAX(t->disk->config.align, BDRV_SECTOR_SIZE);
    int64_t limit = QEMU_ALIGN_DOWN(max_len, align);

    while (qatomic_fetch_dec(&r->nb_left) > 0) {
        /* Mostly queries */
        bool query = g_rand_int_range(u->rand, 0, 6);
        Op op = { .t = t };
        uint64_t start;

        op.type = query ? g_rand_int_range(u->rand, 0, OP_WRITE) :
                  g_rand_int_range(u->rand, OP_WRITE, OP_TYPES);
        op.offset = g_rand_int_range(u->rand, 0, limit - 1);
        op.bytes = g_rand_int_range(u->rand, 1,
                                    query ? limit : limit / 64);
        op.bytes = MIN(op.bytes, limit - op.offset);
        if (op.type == OP_TRUNCATE) {
            if (g_rand_int_range(u->rand, 0, 10)) {
                continue;
            }
            op.offset = ROUND_UP(op.offset + limit / 2, align);
            op.offset = MIN(op.offset, limit);
        } else if (!query && g_rand_int_range(u->rand, 0, 2)) {
            op.offset = QEMU_ALIGN_DOWN(op.offset, align);
            op.bytes = ROUND_UP(op.bytes, align);
        }

        start = disk_now(t->disk);
        op_entry(&op);
        qatomic_inc(&r->nb_done[op.type]);
        if (op.ret < 0) {
            g_assert(op.ret == -EIO && t->disk->percent_bad);
            qatomic_inc(&r->nb_failed);
        } else if (op.type == OP_IS_ZERO && op.ret == 1) {
            int64_t end = MIN(op.offset + op.bytes, max_len);

            op.pnum = end - op.offset;
            for (int64_t pos = op.offset; pos < end;
                 pos += MIN(t->disk->config.grain, 512)) {
                g_assert(disk_was(t->disk, start, pos, ZERO) ||
                         disk_was(t->disk, start, pos, DATA_ZERO));
            }
        }
    }
    qatomic_dec(&r->nb_users);
    aio_wait_kick();
}

static void test_random(const void *opaque)
{
    const RandomCase *c = opaque;
    GRand *rand = g_rand_new_with_seed(seed);
    Test *t = test_new(&c->config, c->max_extents);
    RandomTest r = {
        .t = t, .nb_left = nb_ops / NB_CASES, .nb_users = NB_USERS,
    };
    IOThread *iothreads[2];
    User users[NB_USERS];

    g_test_message("seed %u", seed);
    g_rand_set_seed(t->disk->rand, g_rand_int(rand));
    t->disk->percent_bad = c->percent_bad;
    for (int i = 0; i < 2; i++) {
        iothreads[i] = iothread_new();
    }
    for (int i = 0; i < NB_USERS; i++) {
        users[i] = (User) {
            .r = &r, .rand = g_rand_new_with_seed(g_rand_int(rand)),
        };
        aio_co_enter(c->threads ? iothread_get_aio_context(iothreads[i % 2]) :
                                  qemu_get_aio_context(),
                     qemu_coroutine_create(user_entry, &users[i]));
    }
    while (qatomic_read(&r.nb_users)) {
        aio_poll(qemu_get_aio_context(), !c->threads);
        if (g_rand_int_range(rand, 0, 2000) == 0) {
            disk_reconnect(t->disk_bs);
        }
        if (g_rand_int_range(rand, 0, 500) == 0) {
            bool disconnected = g_rand_int_range(rand, 0, 4) == 0;

            qatomic_set(&t->disk->disconnected, disconnected);
        }
    }

    for (int i = 0; i < 2; i++) {
        iothread_join(iothreads[i]);
    }
    t->disk->percent_bad = 0;
    t->disk->disconnected = false;
    /* Writes beyond the end can have met truncations */
    change_ok(t, OP_TRUNCATE, c->config.len, 0);
    map(t);
    g_assert_cmpuint(test_stats(t).extents, <=, c->max_extents ?: UINT64_MAX);
    /* It was a test */
    for (int i = 0; i < OP_TYPES && nb_ops >= 20000; i++) {
        g_assert_cmpint(r.nb_done[i], >, 0);
    }
    g_assert_cmpint(!!r.nb_failed, ==, !!c->percent_bad);
    g_test_message("hits %" PRIu64 ", queries %" PRIu64 ", invalidations %"
                   PRIu64, test_stats(t).hits, test_stats(t).queries,
                   test_stats(t).invalidations);
    for (int i = 0; i < NB_USERS; i++) {
        g_rand_free(users[i].rand);
    }
    g_rand_free(rand);
    test_free(t);
}

static const RandomCase cases[NB_CASES] = {
    { "plain", { .len = 200 * KiB, .grain = 512, .random = true } },
    { "large-blocks", { .len = 20 * MiB, .grain = 64 * KiB, .random = true } },
    { "align-4096", {
        .len = 1 * MiB, .grain = 4096, .align = 4096, .random = true } },
    { "small-extents", {
        .len = 90 * 512, .grain = 100, .align = 1, .random = true } },
    { "one-extent-a-query", {
        .len = 200 * KiB, .grain = 512, .one = true, .random = true } },
    { "few-extents-and-short-reach", {
        .len = 200 * KiB, .grain = 512, .reach = 33 * 512, .random = true },
      .max_extents = 7 },
    { "answers-shorter-than-extents", {
        .len = 1 * MiB, .grain = 4096, .reach = 3 * 512, .random = true } },
    { "few-extents-in-parts", {
        .len = 1 * MiB, .grain = 4096, .reach = 33 * 512, .random = true },
      .max_extents = 7 },
    { "errors", { .len = 200 * KiB, .grain = 512, .random = true },
      .percent_bad = 5 },
    { "iothreads", { .len = 200 * KiB, .grain = 512, .random = true },
      .threads = true },
};

static void get_env(const char *name, unsigned *value)
{
    const char *env = g_getenv(name);

    if (env) {
        g_assert_cmpint(qemu_strtoui(env, NULL, 0, value), ==, 0);
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        OpType type;
    } changes[] = {
        { "write", OP_WRITE }, { "zero", OP_ZERO }, { "unmap", OP_UNMAP },
        { "discard", OP_DISCARD }, { "truncate", OP_TRUNCATE },
    };

    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);

    seed = g_random_int();
    get_env("TEST_CACHEEXTENTS_SEED", &seed);
    get_env("TEST_CACHEEXTENTS_OPS", &nb_ops);

#define ADD(name, function) \
    g_test_add_func("/cacheextents/" name, test_ ## function)
    ADD("one-query", one_query);
    ADD("always-precise", always_precise);
    ADD("one-extent-a-query", one_extent_a_query);
    ADD("reach", reach);
    ADD("change-forgets-its-blocks", change_forgets_its_blocks);
    ADD("disk-in-use", disk_in_use);
    ADD("copy-range", copy_range);
    ADD("truncate", truncate);
    ADD("block-size", block_size);
    ADD("failed-change-drops", failed_change_drops);
    ADD("failed-query", failed_query);
    ADD("refused-query", refused_query);
    ADD("refused-query-once", refused_query_once);
    ADD("max-extents", max_extents);
    ADD("small-extents", small_extents);
    ADD("short-answer", short_answer);
    ADD("unknown-contents", unknown_contents);
    ADD("shared-query", shared_query);
    ADD("shared-query-and-change", shared_query_and_change);
    ADD("query-ends-at-others", query_ends_at_others);
    ADD("query-takes-over", query_takes_over);
    ADD("overtaken-by-answer", overtaken_by_answer);
    ADD("truncate-and-write", truncate_and_write);
    ADD("many-changes", many_changes);
    ADD("reconnect", reconnect);
    ADD("disconnected", disconnected);
    ADD("replaced-child", replaced_child);
    ADD("reopen-max-extents", reopen_max_extents);
    ADD("reopen-abort", reopen_abort);
    ADD("inactive", inactive);
    ADD("cancel", cancel);
    ADD("permissions", permissions);
#undef ADD
    for (int i = 0; i < ARRAY_SIZE(changes); i++) {
        g_autofree char *path = g_strdup_printf(
            "/cacheextents/query-and-change/%s", changes[i].name);

        g_test_add_data_func(path, &changes[i].type, test_query_and_change);
    }
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *path = g_strdup_printf("/cacheextents/random/%s",
                                                cases[i].name);

        g_test_add_data_func(path, &cases[i], test_random);
    }
    return g_test_run();
}
