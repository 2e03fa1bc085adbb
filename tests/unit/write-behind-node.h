/*
 * A node that has a WriteBehind, and requests to it, for tests of that
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The node stands where qcow2 or a filter stands: it hands all of its requests
 * to a WriteBehind.  Its file child is a disk in memory.  After each test, a
 * flush must succeed and the disk must have all that was accepted.
 */

#ifndef TESTS_UNIT_WRITE_BEHIND_NODE_H
#define TESTS_UNIT_WRITE_BEHIND_NODE_H

#include "memory-disk.h"
#include "block/write-behind.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"

#define DISK_SIZE (8 * MiB)

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

typedef struct TestOp TestOp;

/* The fixture of a test */
typedef struct Test {
    const TestConfig *config;
    BlockBackend *blk;
    BlockDriverState *bs;
    WriteBehind *wb;
    BlockDriverState *disk_bs;
    Disk *disk;
    CoMutex lock;
    bool unchecked;     /* tear_down() does not look at the disk */

    /* The request that start() has begun last */
    TestOp *op;

    /* Where op_append() goes on; only for tests in one AioContext */
    int64_t alloc;
    /* What the node must read as */
    uint8_t *shadow;
} Test;

void set_up(Test *t, const TestConfig *config);
void tear_down(Test *t, const TestConfig *config);

/* The driver of the node, and the state of a node */
extern BlockDriver bdrv_node;

typedef struct TestNode {
    WriteBehind *wb;
    int64_t cluster_size;
} TestNode;

/* How often the WriteBehind of the only node said that all is written out */
extern unsigned nb_written_out;

/* The WriteBehind is new from now on, without data */
void test_new_wb(Test *t);

/* Make t->disk_bs the child of the node, or let it have none */
void test_attach(Test *t);
void test_detach(Test *t);

BlockDriverState *new_disk(const char *name, const TestConfig *config);

/* What a write of the generation @gen contains */
void fill(uint8_t *buf, int64_t offset, int64_t bytes, unsigned gen);

/* The disk has something on it */
void fill_disk(Test *t);

/* Assert that a range of the disk has what was accepted */
void assert_on_disk(Test *t, int64_t offset, int64_t bytes);
void assert_all_on_disk(Test *t);

/* Assert which writes the disk got since the last time, as { offset, bytes } */
#define assert_writes(t, ...)                                           \
    do {                                                                \
        const DiskWrite expected_[] = { __VA_ARGS__ };                  \
        assert_log(t, expected_, ARRAY_SIZE(expected_));                \
    } while (0)
void assert_log(Test *t, const DiskWrite *expected, unsigned n);
void assert_no_writes(Test *t);
void forget_writes(Test *t);

#define assert_stat(t, field, op, value)                                \
    do {                                                                \
        BlockStatsWriteBehind *stats_ = wb_get_stats((t)->wb);          \
        g_assert_cmpuint(stats_->field, op, value);                     \
        qapi_free_BlockStatsWriteBehind(stats_);                        \
    } while (0)

/* When nothing happens any more, the disk holds @n requests */
void assert_held(Test *t, unsigned n);

/* A drained section that begins while the disk holds requests */
void drain_held(Test *t);

void change_graph_elsewhere(void);

/* ---- Requests, each in a coroutine of its own ---- */

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

/* -EBUSY if a WriteBehind is not made for such a write */
TestOpFunc op_write;

/* Read in pieces of @gen bytes, if it is not 0, and compare */
TestOpFunc op_read;
TestOpFunc op_discard;
TestOpFunc op_blk_flush;

/*
 * The others do not go through the BlockBackend, which would let flushes wait
 * for each other, and requests for the end of a drained section
 */
TestOpFunc op_flush;
TestOpFunc op_reserve;
TestOpFunc op_write_out;

/* With t->lock: it is given to wb_co_write_out(); 1 if wb_continues() */
TestOpFunc op_write_out_unlocked;
TestOpFunc op_continues;

/* @gen is the mode */
TestOpFunc op_settle;

/* Use up an op_reserve() */
TestOpFunc op_accept;

/* Allocate space after the last one, in a new cluster if a stream ended */
TestOpFunc op_append;

/*
 * As a filter does it, for what is cached, or continues a stream, or may begin
 * one if @nb_clusters is not 0.  Fails with -EAGAIN if not all was stored.
 */
TestOpFunc op_co_write;

TestOp *op_start(TestOp *op);
TestOp *op_start_in(TestOp *op, AioContext *ctx);
bool op_done(TestOp *op);
int op_wait(TestOp *op);

#define new_op(t_, fn_, ...) \
    (&(TestOp) { .t = (t_), .fn = (fn_), __VA_ARGS__ })

/* A request that goes on in the background, until the end of the block */
#define start(t, ...) ((t)->op = op_start(new_op(t, __VA_ARGS__)))

/* Do one, and wait for it */
#define run(...) op_wait(op_start(new_op(__VA_ARGS__)))
#define run_ok(...) g_assert_cmpint(run(__VA_ARGS__), ==, 0)
#define run_fails(t, ret, ...) g_assert_cmpint(run(t, __VA_ARGS__), ==, ret)

/* Wait for it, and assert that it returns this */
#define finish(op, ret) g_assert_cmpint(op_wait(op), ==, ret)

/* Assert that it is not done when nothing happens any more */
void assert_waits(TestOp *op);

/* An array of requests that differ by @i */
#define start_ops(ops, fn_, ...)                                        \
    do {                                                                \
        for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {                \
            ops[i] = (TestOp) {                                         \
                .t = t, .fn = (fn_), .gen = i, __VA_ARGS__              \
            };                                                          \
        }                                                               \
        ops_start(ops, ARRAY_SIZE(ops));                                \
    } while (0)
void ops_start(TestOp *ops, unsigned n);
bool ops_done(TestOp *ops, unsigned n);
void ops_finish(TestOp *ops, unsigned n, int ret);

/* ---- Requests that must succeed ---- */

void write_ok(Test *t, int64_t offset, int64_t bytes);
void append_ok(Test *t, int64_t bytes);
void read_ok(Test *t, int64_t offset, int64_t bytes);
void read_all(Test *t);
void discard_ok(Test *t, int64_t offset, int64_t bytes);
void flush_ok(Test *t);
void reserve_ok(Test *t, uint64_t nb_clusters);
void unreserve(Test *t, uint64_t nb_clusters);
void accept_ok(Test *t, uint64_t nb_clusters, int64_t offset, int64_t bytes);

/* A flush that must cause these writes, as { offset, bytes } */
#define flush_writes(t, ...)                                            \
    do {                                                                \
        flush_ok(t);                                                    \
        assert_writes(t, __VA_ARGS__);                                  \
    } while (0)
void flush_writes_nothing(Test *t);

/* A flush that fails, as all changes of the disk do from now on */
void fail_flush(Test *t, int error);

/* The disk works again, and a flush succeeds */
void recover(Test *t);

/* What is held goes on, and t->op returns @ret */
void let_go(Test *t, int ret);

/* See write-behind.h */
bool continues(Test *t, int64_t offset);
void assert_gap(Test *t, int64_t offset, int64_t bytes, int64_t gap);

#endif /* TESTS_UNIT_WRITE_BEHIND_NODE_H */
