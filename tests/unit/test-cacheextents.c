/*
 * Tests of the cacheextents filter
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Without iothreads, the same --seed does the same.  The environment variable
 * TEST_CACHEEXTENTS_OPS is the number of random operations, in all cases
 * together.
 */

#include "qemu/osdep.h"
#include "block/coroutines.h"
#include "cacheextents-disk.h"
#include "iothread.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

#define NB_USERS 12
#define NB_CASES 10
#define NB_ORDERS 8

#define BLOCK (64 * KiB)
#define PLAIN .len = 64 * BLOCK, .grain = BLOCK
#define STRIPED PLAIN, .even = DATA

static unsigned nb_ops = 60000;

typedef enum OpType {
    OP_END,
    OP_STATUS, OP_IS_ZERO, OP_IS_ALLOCATED,
    OP_WRITE, OP_ZERO, OP_UNMAP, OP_DISCARD, OP_COPY, OP_TRUNCATE,
    OP_TYPES,
    /* Not a request: the status of everything, and what the disk does */
    MAP, DISK_SET, DISK_FAIL, DISK_RECONNECT, DISK_DISCONNECT,
} OpType;

typedef struct Step {
    OpType type;
    int64_t offset;
    int64_t bytes;
    int ret;         /* of queries, without BDRV_BLOCK_OFFSET_VALID */
    int queries;     /* how many reach the disk */
    int extents;     /* known then; 0: any number, or NONE */
} Step;

#define NONE -1

/* A cacheextents node, a disk as its child, and a user of it */
typedef struct Test {
    BlockBackend *blk;
    BlockDriverState *bs;
    BlockDriverState *disk_bs;
    ExtentsDisk *disk;
} Test;

typedef void TestFunc(Test *t, gconstpointer opaque);

/* What a test begins with, and its parameters */
typedef struct Config {
    const char *name;
    ExtentsConfig disk;
    int64_t max_extents;
    Step steps[12];  /* for test_steps() */
    TestFunc *func;  /* if it is another one */
    /* For some tests only */
    OpType type;
    int order;
    unsigned percent_bad;
    bool threads;
} Config;

static void set_up(Test *t, gconstpointer opaque)
{
    const Config *c = opaque;
    QDict *opts = qdict_new();

    t->disk_bs = extents_disk_new("disk", &c->disk);
    t->disk = t->disk_bs->opaque;
    qdict_put_str(opts, "driver", "cacheextents");
    qdict_put_str(opts, "file", "disk");
    if (c->max_extents) {
        qdict_put_int(opts, "max-extents", c->max_extents);
    }
    t->bs = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR | BDRV_O_UNMAP,
                      &error_abort);
    t->blk = user_new(t->bs);
}

static void tear_down(Test *t, gconstpointer opaque)
{
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
}

static BlockStatsSpecificCacheExtents test_stats(Test *t)
{
    BlockStatsSpecific *stats = bdrv_get_specific_stats(t->bs);
    BlockStatsSpecificCacheExtents result = stats->u.cacheextents;

    qapi_free_BlockStatsSpecific(stats);
    return result;
}

/* ---- Operations ---- */

typedef struct Op {
    Test *t;
    OpType type;
    int64_t offset;
    int64_t bytes;
    bool reconnect; /* of the disk, as soon as the query has its answer */
    int ret;        /* -EINPROGRESS until it is done */
    int64_t pnum;
} Op;

/* See disk_was() */
static void check_status(Op *op, uint64_t start, int flags)
{
    ExtentsDisk *d = op->t->disk;
    /* Each block of the disk, and some that requests can change alone */
    int64_t step = MIN(d->config.grain, 7 * disk_unit(d));

    for (int64_t pos = op->offset; pos < op->offset + op->pnum; pos += step) {
        if (!disk_was(d, start, pos, flags)) {
            g_error("offset %" PRId64 " (of %" PRId64 " from %" PRId64
                    "): was not %x", pos, op->pnum, op->offset, flags);
        }
    }
}

static int coroutine_fn op_query(Op *op)
{
    BlockDriverState *bs = op->t->bs;
    BlockDriverState *file = NULL;
    uint64_t start = disk_now(op->t->disk);
    int64_t map = -1;
    int ret;

    GRAPH_RDLOCK_GUARD();

    switch (op->type) {
    case OP_STATUS:
        ret = bdrv_co_block_status_above(bs, NULL, op->offset, op->bytes,
                                         &op->pnum, &map, &file);
        if (ret >= 0 && op->pnum) {
            g_assert(op->pnum <= op->bytes);
            g_assert(ret & BDRV_BLOCK_OFFSET_VALID);
            g_assert(file == bs->file->bs);
            g_assert(map == op->offset);
            g_assert(!(ret & (BDRV_BLOCK_RAW | BDRV_BLOCK_RECURSE |
                              BDRV_BLOCK_COMPRESSED)));
            ret &= DATA_ZERO;
            check_status(op, start, ret);
        }
        return ret;
    case OP_IS_ZERO:
        op->pnum = op->bytes;
        return bdrv_co_is_zero_fast(bs, op->offset, op->bytes);
    case OP_IS_ALLOCATED:
        return bdrv_co_is_allocated(bs, op->offset, op->bytes, &op->pnum);
    default:
        g_assert_not_reached();
    }
}

static void coroutine_fn op_entry(void *opaque)
{
    Op *op = opaque;
    BlockBackend *blk = op->t->blk;
    g_autofree uint8_t *buf = NULL;
    int ret;

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
    case OP_COPY:
        ret = blk_co_copy_range(blk, op->offset, blk, op->offset, op->bytes,
                                0, 0);
        break;
    case OP_TRUNCATE:
        ret = blk_co_truncate(blk, op->offset, true, PREALLOC_MODE_OFF, 0,
                              NULL);
        break;
    default:
        ret = op_query(op);
        if (op->reconnect) {
            disk_reconnect(op->t->disk_bs);
        }
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

static int op_finish(Op *op, int64_t *pnum)
{
    int ret;

    AIO_WAIT_WHILE_UNLOCKED(NULL, qatomic_load_acquire(&op->ret) ==
                                  -EINPROGRESS);
    ret = op->ret;
    if (pnum) {
        *pnum = op->pnum;
    }
    g_free(op);
    return ret;
}

static void change_ok(Test *t, OpType type, int64_t offset, int64_t bytes)
{
    g_assert_cmpint(op_finish(op_start(t, type, offset, bytes), NULL), ==, 0);
}

static int status(Test *t, int64_t offset)
{
    return op_finish(op_start(t, OP_STATUS, offset, 512), NULL);
}

/* Ask for the status of everything; returns how many queries that took */
static unsigned map(Test *t)
{
    unsigned before = t->disk->nb_queries;
    int64_t offset = 0;
    int64_t pnum;

    while (offset < t->disk->disk.len) {
        g_assert_cmpint(op_finish(op_start(t, OP_STATUS, offset,
                                           t->disk->disk.len - offset), &pnum),
                        >=, 0);
        g_assert_cmpint(pnum, >, 0);
        offset += pnum;
    }
    return t->disk->nb_queries - before;
}

static void expect_status(Test *t, int64_t offset, int ret)
{
    g_assert_cmpint(status(t, offset), ==, ret);
}

/* All queries so far, and those that the status of everything takes */
static void expect_queries(Test *t, unsigned nb)
{
    g_assert_cmpuint(t->disk->nb_queries, ==, nb);
}

static void expect_map(Test *t, unsigned nb)
{
    g_assert_cmpuint(map(t), ==, nb);
}

#define expect_stat(t, field, value) \
    g_assert_cmpuint(test_stats(t).field, ==, value)

/* Wait until @nb requests are held by the disk */
static void wait_held(Test *t, unsigned nb)
{
    AIO_WAIT_WHILE_UNLOCKED(NULL, qatomic_read(&t->disk->disk.nb_held) != nb);
}

/* Start a request, which the disk holds */
static Op *hold_op(Test *t, OpType type, int64_t offset, int64_t bytes,
                   int where)
{
    unsigned nb = t->disk->disk.nb_held;
    Op *op;

    disk_set_hold(&t->disk->disk, type >= OP_WRITE ? DISK_CHANGES : DISK_STATUS,
                  where);
    op = op_start(t, type, offset, bytes);
    wait_held(t, nb + 1);
    return op;
}

static Op *hold_query(Test *t, int64_t offset)
{
    return hold_op(t, OP_STATUS, offset, 512, HOLD_AFTER);
}

/* Let everything go on that is held; @op must have this result then */
static void let_go(Test *t, Op *op, int ret)
{
    disk_release(&t->disk->disk);
    g_assert_cmpint(op_finish(op, NULL), ==, ret);
}

/* A query is for what is not known, and for nothing else */
static void check_asked(Test *t, unsigned nb, int64_t offset, int64_t bytes)
{
    expect_queries(t, nb);
    g_assert_cmpint(t->disk->asked_offset, ==, offset);
    g_assert_cmpint(t->disk->asked_bytes, ==, bytes);
}

/* ---- One request after the other ---- */

static void test_steps(Test *t, gconstpointer opaque)
{
    const Config *c = opaque;

    for (const Step *s = c->steps; s->type != OP_END; s++) {
        unsigned before = t->disk->nb_queries;

        g_test_message("step %zd", s - c->steps);
        switch (s->type) {
        case MAP:
            map(t);
            break;
        case DISK_SET:
            disk_set(t->disk, s->offset, s->bytes, s->ret);
            break;
        case DISK_FAIL:
            t->disk->disk.percent_bad = s->bytes;
            break;
        case DISK_RECONNECT:
            disk_reconnect(t->disk_bs);
            break;
        case DISK_DISCONNECT:
            t->disk->disconnected = s->bytes;
            break;
        default:
            g_assert_cmpint(op_finish(op_start(t, s->type, s->offset, s->bytes),
                                      NULL), ==, s->ret);
        }
        expect_queries(t, before + s->queries);
        if (s->extents) {
            expect_stat(t, extents, MAX(s->extents, 0));
        }
    }
}

/* ---- What takes more than such steps ---- */

static const Config plain = { .disk = { PLAIN } };
static const Config striped = { .disk = { STRIPED } };

static void test_statistics(Test *t, gconstpointer opaque)
{
    expect_map(t, 1);
    expect_map(t, 0);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ALLOCATED, 0, BLOCK), NULL),
                    ==, 1);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ZERO, BLOCK, BLOCK), NULL),
                    ==, 1);
    g_assert_cmpint(op_finish(op_start(t, OP_IS_ZERO, 0, BLOCK), NULL), ==, 0);
    expect_queries(t, 1);
    expect_stat(t, extents, 64);
    expect_stat(t, queries, 1);
    expect_stat(t, misses, 1);
    expect_stat(t, hits, 64 + 63 + 3);
    change_ok(t, OP_WRITE, BLOCK - 512, 1024);
    expect_stat(t, invalidations, 2);
}

/*
 * A change is forgotten in whole blocks, and everything else is remembered,
 * whatever the disk has made of the blocks beside it.
 */
static void test_change_forgets_its_blocks(Test *t, gconstpointer opaque)
{
    static const OpType types[] = { OP_WRITE, OP_ZERO, OP_UNMAP, OP_DISCARD };
    int64_t unit = MAX(1024, ((const Config *)opaque)->disk.align);

    map(t);
    for (int i = 0; i < ARRAY_SIZE(types); i++) {
        int64_t pos = (i * 9 + 3) * BLOCK + 8192;
        unsigned before = t->disk->nb_queries;
        unsigned answered = t->disk->nb_answered;
        unsigned extents = test_stats(t).extents;
        int flags = status(t, pos);

        change_ok(t, types[i], pos + 100, 600);
        expect_stat(t, extents, extents + 1);
        expect_status(t, pos - 512, flags);
        expect_status(t, pos + unit, flags);
        expect_queries(t, before);
        map(t);
        check_asked(t, before + 1, pos, unit);
        g_assert_cmpuint(t->disk->nb_answered, ==, answered + 1);
        expect_map(t, 0);
    }
}

/* The disk of a guest that writes, and of which a mirror wants the status */
static void test_disk_in_use(Test *t, gconstpointer opaque)
{
    int64_t max_extents = ((const Config *)opaque)->max_extents;

    expect_map(t, max_extents ? 6 : 1);
    g_assert_cmpuint(t->disk->nb_answered, ==, 512);
    for (int i = 0; i < 60; i++) {
        int64_t offset = (i * 37 % 60) * 4096;
        unsigned answered = t->disk->nb_answered;

        change_ok(t, OP_WRITE, offset, 1024);
        expect_status(t, offset, DATA);
        g_assert_cmpuint(t->disk->nb_answered, ==, answered + 1);
    }
    if (!max_extents) {
        /* What has become the same is one extent */
        expect_stat(t, extents, 512 - 2 * 60);
    }
}

/* Extents end at blocks, also when these are larger all of a sudden */
static void test_block_size(Test *t, gconstpointer opaque)
{
    expect_map(t, 43);
    t->disk->disk.config.align = 4096;
    t->disk->config.reach = 8192;
    bdrv_drained_begin(t->bs);
    bdrv_graph_rdlock_main_loop();
    bdrv_refresh_limits(t->disk_bs, NULL, &error_abort);
    bdrv_refresh_limits(t->bs, NULL, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    bdrv_drained_end(t->bs);
    expect_map(t, 8);
}

/* When the large query fails, the child gets a small one */
static void test_failed_query(Test *t, gconstpointer opaque)
{
    t->disk->query_error = -EIO;
    expect_status(t, 0, -EIO);
    expect_queries(t, 2);
    expect_stat(t, queries, 2);
    t->disk->query_error = -ENOTSUP;
    expect_status(t, 0, -ENOTSUP);
    expect_stat(t, queries, 2);
    expect_stat(t, extents, 0);
    /* Both have failed, so that this was no refusal */
    t->disk->query_error = 0;
    expect_map(t, 1);
}

/* What was refused may have been nothing but a passing error */
static void test_refused_query_once(Test *t, gconstpointer opaque)
{
    unsigned before;

    t->disk->config.many_error = -EIO;
    status(t, 0);
    t->disk->config.many_error = 0;
    before = t->disk->nb_queries;
    while (t->disk->nb_many == 1) {
        change_ok(t, OP_WRITE, 0, 512);
        expect_status(t, 0, DATA);
    }
    expect_queries(t, before + 1001);
    expect_map(t, 0);
}

/* ---- Several requests at a time ---- */

/* The rule: what overlaps a change while it is asked for is asked for again */
static void test_query_and_change(Test *t, gconstpointer opaque)
{
    const Config *c = opaque;
    bool change_first = c->order & 1;
    bool query_last = c->order & 2;
    bool all = c->type == OP_TRUNCATE;
    Op *change = NULL, *query = NULL;
    unsigned before;

    for (int i = 0; i < 2; i++) {
        if (i == change_first) {
            query = hold_query(t, 0);
        } else {
            change = hold_op(t, c->type, 20 * BLOCK + (all ? 512 : 0), BLOCK,
                             c->order & 4 ? HOLD_BEFORE : HOLD_AFTER);
        }
    }
    for (int i = 0; i < 2; i++) {
        disk_set_hold(&t->disk->disk, i == query_last ? DISK_STATUS :
                      DISK_CHANGES, HOLD_NEVER);
        disk_wake(&t->disk->disk);
        g_assert_cmpint(op_finish(i == query_last ? query : change, NULL),
                        >=, 0);
    }

    before = t->disk->nb_queries;
    if (!all) {
        status(t, 0);
        status(t, 17 * BLOCK);
        expect_queries(t, before);
    }
    expect_map(t, 1);
    /* (The contents of what was discarded are not known) */
    expect_map(t, c->type == OP_DISCARD ? 1 : 0);
    g_assert_cmpuint(test_stats(t).extents, >=, all ? 20 : 60);
}

/* Nothing is answered from memory, or kept, where a change is in flight */
static void test_change_in_flight(Test *t, gconstpointer opaque)
{
    Op *change;

    map(t);
    change = hold_op(t, OP_WRITE, 20 * BLOCK, BLOCK, HOLD_AFTER);
    for (int i = 0; i < 2; i++) {
        expect_status(t, 20 * BLOCK + 4096, DATA);
        check_asked(t, 2 + i, 20 * BLOCK + 4096, BLOCK - 4096);
    }
    let_go(t, change, 0);
    expect_map(t, 1);
}

/* Those who ask while somebody else does wait for that answer */
static void test_shared_query(Test *t, gconstpointer opaque)
{
    Op *ops[10];

    ops[0] = hold_query(t, 0);
    for (int i = 1; i < 10; i++) {
        ops[i] = op_start(t, OP_STATUS, i * BLOCK, 512);
    }
    for (int i = 0; i < 10; i++) {
        let_go(t, ops[i], i % 2 ? ZERO : DATA);
    }
    expect_queries(t, 1);
}

/* and not for one that is about something else */
static void test_refused_queries(Test *t, gconstpointer opaque)
{
    Op *first, *second;

    t->disk->config.many_error = -EPERM;
    map(t);
    change_ok(t, OP_WRITE, 0, 10 * BLOCK);
    first = hold_query(t, 0);
    second = hold_query(t, 5 * BLOCK);
    let_go(t, first, DATA);
    let_go(t, second, DATA);
}

/* One that came after a change must not get an answer from before it */
static void test_shared_query_and_change(Test *t, gconstpointer opaque)
{
    Op *first, *second;

    first = hold_query(t, 0);
    change_ok(t, OP_WRITE, 5 * BLOCK, BLOCK);
    second = hold_query(t, 5 * BLOCK);
    check_asked(t, 2, 5 * BLOCK, BLOCK);
    let_go(t, first, DATA);
    let_go(t, second, DATA);
    expect_map(t, 0);
    expect_queries(t, 2);
}

/* nor one from before the server was another */
static void test_shared_query_and_reconnect(Test *t, gconstpointer opaque)
{
    Op *first, *second;

    first = hold_query(t, 0);
    first->reconnect = true;
    second = op_start(t, OP_STATUS, 2 * BLOCK, 512);
    let_go(t, first, DATA);
    g_assert_cmpint(op_finish(second, NULL), >=, 0);
    check_asked(t, 2, 2 * BLOCK, 62 * BLOCK);
}

static void test_reconnect_in_query(Test *t, gconstpointer opaque)
{
    Op *query = hold_query(t, 0);

    disk_reconnect(t->disk_bs);
    disk_set(t->disk, 0, 64 * BLOCK, DATA);
    let_go(t, query, DATA);
    expect_stat(t, extents, 0);
    expect_map(t, 1);
}

/* Where another query is in flight, or something is known, a query ends */
static void test_query_ends_at_others(Test *t, gconstpointer opaque)
{
    Op *ops[3];

    ops[0] = hold_query(t, 40 * BLOCK);
    ops[1] = hold_query(t, 20 * BLOCK + 512);
    check_asked(t, 2, 20 * BLOCK + 512, 20 * BLOCK - 512);
    ops[2] = hold_query(t, 0);
    check_asked(t, 3, 0, 20 * BLOCK + 512);
    for (int i = 0; i < 3; i++) {
        let_go(t, ops[i], DATA);
    }
    expect_map(t, 0);
    expect_stat(t, extents, 64);
}

/* Two wait for an answer that does not reach them: both ask, once */
static void test_query_takes_over(Test *t, gconstpointer opaque)
{
    static const int64_t offsets[] = { 0, 16 * BLOCK, 18 * BLOCK };
    Op *ops[3];

    status(t, 40 * BLOCK);
    ops[0] = hold_query(t, offsets[0]);
    for (int i = 1; i < 3; i++) {
        ops[i] = op_start(t, OP_STATUS, offsets[i], 512);
    }
    expect_queries(t, 2);
    disk_set_hold(&t->disk->disk, DISK_STATUS, HOLD_BEFORE);
    disk_wake(&t->disk->disk);
    wait_held(t, 2);
    check_asked(t, 4, 18 * BLOCK, 22 * BLOCK);
    for (int i = 0; i < 3; i++) {
        let_go(t, ops[i], DATA);
    }
    status(t, 25 * BLOCK);
    expect_queries(t, 4);
}

/* An answer does not replace one that came earlier but is newer */
static void test_overtaken_by_answer(Test *t, gconstpointer opaque)
{
    Op *query = hold_query(t, 5 * BLOCK);

    /* Makes the last block data, then is asked for while the other one waits */
    change_ok(t, OP_TRUNCATE, 12 * BLOCK, 0);
    disk_set_hold(&t->disk->disk, DISK_STATUS, HOLD_NEVER);
    expect_status(t, 0, ZERO);
    let_go(t, query, ZERO);

    expect_status(t, 10 * BLOCK, DATA);
    expect_queries(t, 2);
}

/* A write and a truncation meet: the block layer has another length then */
static void test_truncate_and_write(Test *t, gconstpointer opaque)
{
    Op *write = hold_op(t, OP_WRITE, 50 * BLOCK, BLOCK, HOLD_AFTER);

    disk_set_hold(&t->disk->disk, DISK_CHANGES, HOLD_NEVER);
    change_ok(t, OP_TRUNCATE, 40 * BLOCK + 512, 0);
    let_go(t, write, 0);
    g_assert_cmpint(blk_getlength(t->blk), ==, 51 * BLOCK);
    g_assert_cmpint(t->disk->disk.len, ==, 40 * BLOCK + 512);

    disk_set(t->disk, 42 * BLOCK, BLOCK, DATA);
    expect_status(t, 40 * BLOCK, ZERO);
    change_ok(t, OP_TRUNCATE, 64 * BLOCK, 0);
    expect_status(t, 40 * BLOCK, DATA);
}

/* Changes cut what is expected into more parts than there can be extents */
static void test_many_changes(Test *t, gconstpointer opaque)
{
    Op *query = hold_query(t, 0);

    for (int i = 0; i < 3000; i++) {
        change_ok(t, OP_WRITE, i % 1000 * 4096, 512);
        g_assert_cmpuint(test_stats(t).extents, <=, 16);
    }
    let_go(t, query, DATA);
    g_assert_cmpuint(test_stats(t).extents, <=, 16);
    map(t);
    g_assert_cmpuint(test_stats(t).extents, <=, 16);
}

/* ---- Who else could change the child ---- */

/* The node has another child from now on */
static void new_child(Test *t, BlockDriverState *child)
{
    bdrv_unref(t->disk_bs);
    t->disk_bs = child;
    t->disk = child->opaque;
}

static int reopen(BlockDriverState *bs, const char *option, const char *value)
{
    QDict *opts = qdict_new();

    qdict_put_str(opts, option, value);
    return bdrv_reopen(bs, opts, true, NULL);
}

static void test_replaced_child(Test *t, gconstpointer opaque)
{
    BlockDriverState *other = extents_disk_new("other", &plain.disk);

    map(t);
    g_assert_cmpint(reopen(t->bs, "file", "other"), ==, 0);
    expect_stat(t, extents, 0);
    new_child(t, other);
    expect_map(t, 1);
    expect_status(t, 0, ZERO);

    other = extents_disk_new("third", &striped.disk);
    disk_replace(t->disk_bs, other);
    new_child(t, other);
    expect_status(t, 0, DATA);
}

static void test_reopen_max_extents(Test *t, gconstpointer opaque)
{
    map(t);
    g_assert_cmpint(reopen(t->bs, "max-extents", "10"), ==, 0);
    expect_map(t, 7);
    g_assert_cmpuint(test_stats(t).extents, <=, 10);
    g_assert_cmpint(reopen(t->bs, "max-extents", "0"), ==, -EINVAL);
    g_assert_cmpuint(test_stats(t).extents, <=, 10);
}

/* Another node of the same reopen fails */
static void test_reopen_abort(Test *t, gconstpointer opaque)
{
    BlockDriverState *other = extents_disk_new("other", &plain.disk);
    BlockReopenQueue *queue;
    QDict *opts = qdict_new();

    map(t);
    qdict_put_int(opts, "max-extents", 10);
    queue = bdrv_reopen_queue(NULL, t->bs, opts, true);
    opts = qdict_new();
    qdict_put_str(opts, "config", "another one");
    queue = bdrv_reopen_queue(queue, other, opts, true);
    g_assert_cmpint(bdrv_reopen_multiple(queue, NULL), <, 0);
    expect_map(t, 0);
    expect_stat(t, extents, 64);
    bdrv_unref(other);
}

static void test_inactive(Test *t, gconstpointer opaque)
{
    Op *query;

    map(t);
    blk_unref(t->blk);
    t->blk = NULL;
    bdrv_drain_all_begin();
    g_assert_cmpint(bdrv_inactivate(t->bs, &error_abort), ==, 0);
    bdrv_drain_all_end();
    expect_stat(t, extents, 0);
    t->blk = blk_new(qemu_get_aio_context(), 0, BLK_PERM_ALL);
    g_assert_cmpint(blk_insert_bs(t->blk, t->bs, &error_abort), ==, 0);
    /* (The block layer itself remembers data) */
    status(t, BLOCK);
    status(t, BLOCK);
    expect_queries(t, 3);

    /* Nor is an answer remembered that is under way when this changes */
    query = hold_query(t, BLOCK);
    disk_set(t->disk, 0, BLOCK, ZERO);
    bdrv_graph_rdlock_main_loop();
    bdrv_activate(t->bs, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    let_go(t, query, ZERO);
    expect_stat(t, extents, 0);
    expect_status(t, 0, ZERO);
    expect_map(t, 0);
}

/* Its user cannot be activated, so the node becomes inactive again */
static void test_failed_activation(Test *t, gconstpointer opaque)
{
    BlockBackend *reader;
    int ret;

    map(t);
    g_assert(monitor_add_blk(t->blk, "drive", &error_abort));
    bdrv_drain_all_begin();
    g_assert_cmpint(bdrv_inactivate(t->bs, &error_abort), ==, 0);
    bdrv_drain_all_end();
    expect_stat(t, extents, 0);
    reader = blk_new(qemu_get_aio_context(), BLK_PERM_CONSISTENT_READ,
                     BLK_PERM_ALL & ~BLK_PERM_WRITE);
    g_assert_cmpint(blk_insert_bs(reader, t->bs, &error_abort), ==, 0);

    bdrv_graph_rdlock_main_loop();
    ret = bdrv_activate(t->bs, NULL);
    bdrv_graph_rdunlock_main_loop();
    g_assert_cmpint(ret, <, 0);
    g_assert(t->bs->open_flags & BDRV_O_INACTIVE);

    status(t, BLOCK);
    expect_stat(t, extents, 0);

    /* Another process writes */
    disk_set(t->disk, 0, 64 * BLOCK, DATA);
    blk_unref(reader);
    bdrv_graph_rdlock_main_loop();
    bdrv_activate(t->bs, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    ret = status(t, BLOCK);
    monitor_remove_blk(t->blk);
    g_assert_cmpint(ret, ==, DATA);
}

static void test_cancel(Test *t, gconstpointer opaque)
{
    bdrv_cancel_in_flight(t->bs);
    g_assert_cmpuint(t->disk->disk.nb_cancels, ==, 1);
}

/*
 * While the node has a user, nobody else may write to the child; nor write and
 * then be joined by a user.  What was known before is forgotten.
 */
static void test_permissions(Test *t, gconstpointer opaque)
{
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
        expect_status(t, 0, i ? DATA : ZERO);
        blk_unref(blk);
    }
}

/* Whether others may write to the child, as if the node had become inactive */
static void share_child(Test *t, bool share)
{
    uint64_t perm, shared;

    t->disk_bs->force_share = share;
    blk_get_perm(t->blk, &perm, &shared);
    blk_set_perm(t->blk, perm, shared, &error_abort);
}

/*
 * While others may write, no answer is kept: neither one that was asked for
 * before, nor one of a client that waited for it.
 */
static void test_permissions_in_query(Test *t, gconstpointer opaque)
{
    Op *first = hold_query(t, 0);
    Op *second = op_start(t, OP_STATUS, 2 * BLOCK, 512);

    share_child(t, true);
    disk_set(t->disk, 0, 64 * BLOCK, DATA);
    let_go(t, first, DATA);
    op_finish(second, NULL);
    expect_stat(t, extents, 0);

    disk_set(t->disk, 0, 64 * BLOCK, ZERO);
    share_child(t, false);
    expect_map(t, 1);
    expect_status(t, 2 * BLOCK, ZERO);
}

/* ---- The tests ---- */

static const Config situations[] = {
    /* Callers who want less get the precise answer as well */
    { "always-precise", { STRIPED }, .steps = {
        { OP_IS_ALLOCATED, 0, BLOCK, 1, .queries = 1 },
        { OP_STATUS, BLOCK, 512, ZERO },
        { MAP },
    } },
    { "one-extent-a-query", { STRIPED, .one = true }, .steps = {
        { MAP, .queries = 64 },
        { MAP },
        { OP_WRITE, 5 * BLOCK, 512 },
        { MAP, .queries = 1 },
    } },
    /* A query for each reach of an answer; all is one extent in the end */
    { "reach", { PLAIN, .reach = 16 * BLOCK - 512 }, .steps = {
        { MAP, .queries = 5, .extents = 1 },
        { MAP },
    } },
    { "copy-range", { PLAIN }, .steps = {
        { OP_STATUS, 12 * BLOCK, 512, ZERO, 1 },
        { MAP, .queries = 1 },
        { OP_COPY, 12 * BLOCK, BLOCK },
        { OP_STATUS, 12 * BLOCK, 512, DATA, 1 },
        { OP_STATUS, 13 * BLOCK, 512, ZERO },
    } },
    { "truncate", { STRIPED }, .steps = {
        { MAP, .queries = 1 },
        { OP_TRUNCATE, 40 * BLOCK + 512 },
        { MAP, .queries = 1, .extents = 41 },
        { OP_TRUNCATE, 64 * BLOCK },
        { MAP, .queries = 1 },
        { OP_WRITE, 70 * BLOCK, 512 },
        { MAP, .queries = 1 },
    } },
    { "truncate-in-block",
      { .len = 5 * 4096 + 512, .grain = 4096, .align = 4096 }, .steps = {
        { OP_STATUS, 5 * 4096, 512, ZERO, 1 },
        { OP_TRUNCATE, 6 * 4096 },
        { OP_STATUS, 5 * 4096, 512, DATA, 1 },
    } },
    { "failed-change-forgets", { STRIPED, .random = true }, .steps = {
        { OP_STATUS, 0, 512, DATA, 1 },
        { DISK_FAIL, .bytes = 100 },
        { OP_WRITE, 0, 512, -EIO },
        { OP_STATUS, 0, 512, -EIO, 2 },
        { DISK_FAIL },
        { OP_STATUS, 0, 512, DATA, 1 },
    } },
    /* A child that refuses queries for many extents is not asked again, */
    { "refused-query", { STRIPED, .many_error = -EINVAL }, .steps = {
        { MAP, .queries = 64 + 1 },
        { MAP },
        { OP_WRITE, 5 * BLOCK, 512 },
        { MAP, .queries = 1 },
        /* but on another connection */
        { DISK_RECONNECT },
        { DISK_SET, 0, 64 * BLOCK, ZERO },
        { OP_STATUS, 0, 512, ZERO, 2 },
        /* Other queries are for whole sectors */
        { OP_STATUS, 4096, 100, ZERO, 1 },
        { OP_STATUS, 4096 + 200, 100, ZERO },
        { MAP, .queries = 2 },
    } },
    /* The first query of a second map does not know that it is one */
    { "max-extents", { STRIPED }, .max_extents = 20, .steps = {
        { MAP, .queries = 4, .extents = 20 },
        { OP_STATUS, 63 * BLOCK, 512, ZERO },
        { MAP, .queries = 4 + 1, .extents = 20 },
    } },
    { "one-extent", { STRIPED }, .max_extents = 1, .steps = {
        { MAP, .queries = 64, .extents = 1 },
    } },
    /* A sector or a block of the child that has several statuses is data */
    { "small-extents", { .len = 100 * 512, .grain = 100, .align = 1 },
      .steps = {
        { DISK_SET, 800, 100, DATA },
        { OP_STATUS, 0, 512, ZERO, 1 },
        { OP_STATUS, 512, 512, DATA },
        { OP_IS_ZERO, 512, 1, 0 },
        { OP_STATUS, 1023, 512, DATA },
        { OP_STATUS, 1024, 512, ZERO },
    } },
    /* An answer that ends inside of a sector says nothing about its rest */
    { "short-answer",
      { .len = 100 * 512, .grain = 100, .align = 1, .reach = 700 }, .steps = {
        { OP_STATUS, 0, 512, ZERO, 1, .extents = 1 },
        { OP_STATUS, 512, 512, ZERO, 1 },
    } },
    { "shorter-answer",
      { .len = 100 * 512, .grain = 100, .align = 1, .reach = 100 }, .steps = {
        { OP_STATUS, 0, 512, DATA, 1 },
    } },
    /*
     * Neither data nor zero: nothing to be remembered.  The block layer goes on
     * to the child, and must not ask it again.
     */
    { "unknown-contents", { PLAIN, .even = UNKNOWN }, .steps = {
        { OP_STATUS, 0, 512, UNKNOWN, 1, .extents = 32 },
        { OP_STATUS, 4 * BLOCK, 512, UNKNOWN, 1, .extents = 32 },
        { DISK_RECONNECT },
        { DISK_SET, 0, 64 * BLOCK, UNKNOWN },
        { MAP, .queries = 1 },
        { OP_IS_ALLOCATED, 0, BLOCK, 0, 1, .extents = NONE },
    } },
    { "reconnect", { STRIPED }, .steps = {
        { MAP, .queries = 1 },
        { DISK_RECONNECT },
        { DISK_SET, 0, 64 * BLOCK, ZERO },
        { MAP, .queries = 1, .extents = 1 },
    } },
    /* Nothing is answered from memory while the driver's server is gone */
    { "disconnected", { STRIPED }, .steps = {
        { MAP, .queries = 1 },
        { DISK_DISCONNECT, .bytes = true },
        { DISK_SET, 0, BLOCK, ZERO },
        { OP_STATUS, 0, 512, ZERO, 1, NONE },
        { OP_STATUS, 0, 512, ZERO, 1, NONE },
        { DISK_DISCONNECT, .bytes = false },
        { MAP, .queries = 1 },
        { MAP },
    } },

    /* Those of the functions above */
    { "statistics", { STRIPED }, .func = test_statistics },
    { "change-forgets-its-blocks", { STRIPED },
      .func = test_change_forgets_its_blocks },
    { "change-forgets-its-blocks/align", { STRIPED, .align = 4096 },
      .func = test_change_forgets_its_blocks },
    { "disk-in-use",
      { .len = 256 * KiB, .grain = 512, .even = DATA },
      .func = test_disk_in_use },
    { "disk-in-use/few-extents",
      { .len = 256 * KiB, .grain = 512, .even = DATA }, .max_extents = 100,
      .func = test_disk_in_use },
    { "block-size",
      { .len = 64 * KiB, .grain = 4096, .reach = 3 * 512 },
      .func = test_block_size },
    { "failed-query", { STRIPED }, .func = test_failed_query },
    { "refused-query-once", { STRIPED }, .func = test_refused_query_once },
    { "change-in-flight", { STRIPED }, .func = test_change_in_flight },
    { "shared-query", { STRIPED }, .func = test_shared_query },
    { "refused-queries", { STRIPED }, .func = test_refused_queries },
    { "shared-query-and-change", { STRIPED },
      .func = test_shared_query_and_change },
    { "shared-query-and-reconnect", { STRIPED },
      .func = test_shared_query_and_reconnect },
    { "reconnect-in-query", { STRIPED }, .func = test_reconnect_in_query },
    { "query-ends-at-others", { STRIPED }, .func = test_query_ends_at_others },
    { "query-takes-over", { STRIPED, .reach = 8 * BLOCK },
      .func = test_query_takes_over },
    { "overtaken-by-answer",
      { .len = 10 * BLOCK + 512, .grain = BLOCK },
      .func = test_overtaken_by_answer },
    { "truncate-and-write", { PLAIN }, .func = test_truncate_and_write },
    { "many-changes", { STRIPED }, .max_extents = 16,
      .func = test_many_changes },
    { "replaced-child", { STRIPED }, .func = test_replaced_child },
    { "reopen-max-extents", { STRIPED }, .func = test_reopen_max_extents },
    { "reopen-abort", { STRIPED }, .func = test_reopen_abort },
    { "inactive", { STRIPED }, .func = test_inactive },
    { "failed-activation", { STRIPED }, .func = test_failed_activation },
    { "cancel", { STRIPED }, .func = test_cancel },
    { "permissions", { STRIPED }, .func = test_permissions },
    { "permissions-in-query", { STRIPED }, .func = test_permissions_in_query },
};

/* ---- At random ---- */

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

static Op random_op(Test *t, GRand *rand)
{
    uint32_t align = disk_unit(t->disk);
    int64_t limit = QEMU_ALIGN_DOWN(disk_max_len(t->disk), align);
    /* Mostly queries */
    bool query = g_rand_int_range(rand, 0, 6);
    Op op = { .t = t };

    op.type = query ? g_rand_int_range(rand, OP_STATUS, OP_WRITE) :
              g_rand_int_range(rand, OP_WRITE, OP_TYPES);
    if (op.type == OP_TRUNCATE && g_rand_int_range(rand, 0, 10)) {
        op.type = OP_WRITE;
    }
    op.offset = g_rand_int_range(rand, 0, limit - 1);
    op.bytes = g_rand_int_range(rand, 1, query ? limit : limit / 64);
    op.bytes = MIN(op.bytes, limit - op.offset);
    if (op.type == OP_TRUNCATE) {
        op.offset = MIN(ROUND_UP(op.offset + limit / 2, align), limit);
    } else if (!query && g_rand_int_range(rand, 0, 2)) {
        op.offset = QEMU_ALIGN_DOWN(op.offset, align);
        op.bytes = ROUND_UP(op.bytes, align);
    }
    return op;
}

static void coroutine_fn user_entry(void *opaque)
{
    User *u = opaque;
    RandomTest *r = u->r;
    ExtentsDisk *d = r->t->disk;

    while (qatomic_fetch_dec(&r->nb_left) > 0) {
        uint64_t start = disk_now(d);
        Op op = random_op(r->t, u->rand);

        op_entry(&op);
        qatomic_inc(&r->nb_done[op.type]);
        if (op.ret < 0) {
            g_assert(op.ret == -EIO && d->disk.percent_bad);
            qatomic_inc(&r->nb_failed);
        } else if (op.type == OP_IS_ZERO && op.ret == 1) {
            int64_t end = MIN(op.offset + op.bytes, disk_max_len(d));

            for (int64_t pos = op.offset; pos < end;
                 pos += MIN(d->config.grain, 512)) {
                g_assert(disk_was(d, start, pos, ZERO) ||
                         disk_was(d, start, pos, DATA_ZERO));
            }
        }
    }
    qatomic_dec(&r->nb_users);
    aio_wait_kick();
}

static void test_random(Test *t, gconstpointer opaque)
{
    const Config *c = opaque;
    GRand *rand = g_rand_new_with_seed(g_test_rand_int());
    RandomTest r = {
        .t = t, .nb_left = nb_ops / NB_CASES, .nb_users = NB_USERS,
    };
    IOThread *iothreads[2];
    User users[NB_USERS];

    g_rand_set_seed(t->disk->disk.rand, g_rand_int(rand));
    t->disk->disk.percent_bad = c->percent_bad;
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
    t->disk->disk.percent_bad = 0;
    t->disk->disconnected = false;
    /* Writes beyond the end can have met truncations */
    change_ok(t, OP_TRUNCATE, c->disk.len, 0);
    map(t);
    g_assert_cmpuint(test_stats(t).extents, <=, c->max_extents ?: UINT64_MAX);
    /* It was a test */
    for (int i = OP_STATUS; i < OP_TYPES && nb_ops >= 20000; i++) {
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
}

#define SMALL .len = 200 * KiB, .grain = 512, .random = true
#define LARGE .len = 1 * MiB, .grain = 4096, .random = true

static const Config random_cases[NB_CASES] = {
    { "plain", { SMALL } },
    { "large-blocks", { .len = 20 * MiB, .grain = 64 * KiB, .random = true } },
    { "align-4096", { LARGE, .align = 4096 } },
    { "small-extents",
      { .len = 90 * 512, .grain = 100, .align = 1, .random = true } },
    { "one-extent-a-query", { SMALL, .one = true } },
    { "few-extents-and-short-reach", { SMALL, .reach = 33 * 512 },
      .max_extents = 7 },
    { "answers-shorter-than-extents", { LARGE, .reach = 3 * 512 } },
    { "few-extents-in-parts", { LARGE, .reach = 33 * 512 }, .max_extents = 7 },
    { "errors", { SMALL }, .percent_bad = 5 },
    { "iothreads", { SMALL }, .threads = true },
};

static void add_test(const char *group, const char *name, const Config *config,
                     TestFunc *func)
{
    g_autofree char *path = g_strdup_printf("/cacheextents/%s%s", group, name);

    g_test_add(path, Test, config, set_up, func, tear_down);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        OpType type;
    } changes[] = {
        { "write", OP_WRITE }, { "zero", OP_ZERO }, { "unmap", OP_UNMAP },
        { "discard", OP_DISCARD }, { "copy", OP_COPY },
        { "truncate", OP_TRUNCATE },
    };
    static Config orders[ARRAY_SIZE(changes) * NB_ORDERS];
    const char *env = g_getenv("TEST_CACHEEXTENTS_OPS");

    disk_test_init(&argc, &argv);
    extents_disk_init();

    if (env) {
        g_assert_cmpint(qemu_strtoui(env, NULL, 0, &nb_ops), ==, 0);
    }

    for (int i = 0; i < ARRAY_SIZE(situations); i++) {
        add_test("", situations[i].name, &situations[i],
                 situations[i].func ?: test_steps);
    }
    for (int i = 0; i < ARRAY_SIZE(orders); i++) {
        g_autofree char *group = g_strdup_printf("query-and-change/%d/",
                                                 i % NB_ORDERS);

        orders[i] = striped;
        orders[i].type = changes[i / NB_ORDERS].type;
        orders[i].order = i % NB_ORDERS;
        add_test(group, changes[i / NB_ORDERS].name, &orders[i],
                 test_query_and_change);
    }
    for (int i = 0; i < NB_CASES; i++) {
        add_test("random/", random_cases[i].name, &random_cases[i],
                 test_random);
    }
    return g_test_run();
}
