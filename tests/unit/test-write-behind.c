/*
 * Tests of write-behind
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For a given --seed the random test always does the same.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "write-behind-node.h"
#include "fixture.h"
#include "iothread.h"
#include "qobject/qdict.h"

/* ---- What goes to the child ---- */

/* A filter makes room for a request that goes to the child */
FIXTURE_TEST(write_out, LARGE(4 * MiB), .no_pad = true)
{
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
    start(t, op_write_out, .offset = 64 * KiB + 999, .bytes = 1);
    assert_waits(t->op);
    let_go(t, 0);
    assert_gap(t, 64 * KiB, 64 * KiB, 64 * KiB);
    g_assert_false(continues(t, 64 * KiB + 1000));
    assert_on_disk(t, 0, 65 * KiB);

    /* Streams elsewhere go on */
    g_assert_true(continues(t, 1000));
    g_assert_true(continues(t, 192 * KiB + 1000));

    run_ok(t, op_write_out, .offset = 0, .bytes = INT64_MAX);
    assert_gap(t, 0, INT64_MAX, INT64_MAX);
    g_assert_false(wb_is_dirty(t->wb));
    assert_all_on_disk(t);
}

/* Others take the caller's lock, and nobody believes in an ended stream */
FIXTURE_TEST(write_out_unlocked, LARGE(4 * MiB), .no_pad = true)
{
    write_ok(t, 0, 1000);
    write_ok(t, 64 * KiB, 1000);
    disk_hold(t->disk);
    start(t, op_write_out_unlocked, .offset = 64 * KiB, .bytes = 1);
    assert_waits(t->op);
    run_fails(t, 0, op_continues, .offset = 64 * KiB + 1000);
    run_fails(t, 1, op_continues, .offset = 1000);
    let_go(t, 1);
    assert_gap(t, 64 * KiB, 64 * KiB, 64 * KiB);

    /* Where nothing is cached, it stays locked */
    run_ok(t, op_write_out_unlocked, .offset = MiB, .bytes = 1);
    write_ok(t, 1000, 500);
    disk_set_error(t->disk, EIO);
    run_fails(t, -EIO, op_write_out_unlocked, .offset = 0, .bytes = 1);
    disk_set_error(t->disk, 0);
    run_fails(t, 0, op_continues, .offset = 1500);
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
    start(t, op_flush);
    assert_held(t, 1);

    /* What is in flight must stay as it is */
    run_fails(t, -EAGAIN, op_co_write, .offset = 500, .bytes = 10, .gen = 4);
    let_go(t, 0);
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
    recover(t);

    /* No more than what is in the first cluster, and no more streams unasked */
    run_fails(t, -EAGAIN, op_co_write, .offset = 2000, .bytes = 5000);
    assert_gap(t, 4096, 4096, 4096);
    run_fails(t, -EAGAIN, op_co_write, .offset = 4096, .bytes = 1);
    run_ok(t, op_co_write, .offset = 4096, .bytes = 1, .nb_clusters = 1);
    g_assert_true(continues(t, 4097));
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
    g_assert_true(continues(t, total));
    wb_end_streams(t->wb);
    g_assert_false(continues(t, total));
    disk_reset_counts(t->disk);
    flush_writes(t, { 5 * MiB, 16 * KiB });
    assert_nb(t, reads, 0);
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
    assert_nb(t, writes, n);
    /* If they were larger, the block layer split them */
    assert_stat(t, issued_requests, ==, n);
    assert_nb(t, reads, 0);
}

/* Alignment and maximum size are those that the child has at that moment */
FIXTURE_TEST(limits_change, LARGE(4 * MiB), .align = 512)
{
    append_ok(t, 1000);
    flush_writes(t, { 0, 1024 });

    disk_set_limits(t->disk_bs, 4096, 128 * KiB);
    append_ok(t, 300000);
    flush_writes(t, { 0, 128 * KiB }, { 128 * KiB, 128 * KiB },
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
    flush_writes(t, { 0, 1024 });
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
    assert_nb(t, reads, 0);
    assert_nb(t, writes, 8);
}

/* Where padding is not allowed, the neighbouring bytes stay what they are */
FIXTURE_TEST(no_pad, LARGE(MiB), .no_pad = true, .align = 4096)
{
    fill_disk(t);
    write_ok(t, 10000, 100000);
    wb_end_streams(t->wb);
    flush_writes(t, { 8192, 102400 });
}

/* ---- Flush ---- */

FIXTURE_TEST(flush, LARGE(MiB), .align = 512)
{
    /* Nothing to do */
    flush_writes_nothing(t);

    /* Two streams, both unfinished, and one cluster that is finished */
    write_ok(t, 0, 1000);
    write_ok(t, MiB, 64 * KiB + 10);
    assert_no_writes(t);
    flush_writes(t, { 0, 1024 }, { MiB, 64 * KiB + 512 });
    assert_all_on_disk(t);

    /* Nothing new */
    flush_writes_nothing(t);

    /* Only the new part, which starts in the block that was written last */
    g_assert_true(continues(t, 1000));
    write_ok(t, 1000, 3000);
    flush_writes(t, { 512, 3584 });
    assert_all_on_disk(t);

    /* Both flushed streams can go on to the end of their clusters */
    write_ok(t, 4000, 64 * KiB - 4000);
    write_ok(t, MiB + 64 * KiB + 10, 10);
    flush_writes(t, { 3584, 64 * KiB - 3584 }, { MiB + 64 * KiB, 512 });
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
    append_ok(t, 1024);
    disk_hold(t->disk);
    start(t, op_flush);
    append_ok(t, 1024);
    let_go(t, 0);
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
    for (int i = 0; i < 5; i++) {
        write_ok(t, i * MiB, 1024);
    }
    disk_hold(t->disk);
    start(t, op_flush);
    assert_held(t, 4);
    write_ok(t, 4 * MiB + 1024, 1024);
    let_go(t, 0);
    settle();
    assert_writes(t, { 0, 1024 }, { MiB, 1024 }, { 2 * MiB, 1024 },
                  { 3 * MiB, 1024 }, { 4 * MiB, 1024 });
    assert_stat(t, partial_flushes, ==, 5);

    flush_writes(t, { 4 * MiB + 1024, 1024 });
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
    start_ops(ops, op_append,
              .bytes = 1 + (i * 377) % (config->cache_size / 2));

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
    start_ops(ops, op_write, .offset = i * 8192, .bytes = 1);

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
    g_assert_true(continues(t, 100));
    g_assert_true(continues(t, MiB + 100));

    /* There is a finished cluster that can go */
    write_ok(t, 2 * MiB + 4096, 4096);
    g_assert_true(continues(t, 100));
    g_assert_true(continues(t, MiB + 100));

    /* Both that are finished can, but one stream must */
    reserve_ok(t, 2);
    g_assert_false(continues(t, 100));
    g_assert_true(continues(t, MiB + 100));
    unreserve(t, 2);
    assert_on_disk(t, 0, MiB);
}

/* While a reservation is outstanding, what it counts on stays */
FIXTURE_TEST(streams_stay, SMALL(2))
{
    write_ok(t, 0, 100);
    reserve_ok(t, 1);
    start(t, op_reserve, .nb_clusters = 1);
    wb_end_streams(t->wb);
    flush_ok(t);
    assert_waits(t->op);
    g_assert_true(continues(t, 100));

    /* That needs no new cluster, so there is room for the other */
    accept_ok(t, 1, 100, 100);
    finish(t->op, 0);
    g_assert_true(continues(t, 200));
    unreserve(t, 1);

    /* Where it does need one, the waiter gets that of the stream */
    reserve_ok(t, 1);
    start(t, op_reserve, .nb_clusters = 1);
    assert_waits(t->op);
    accept_ok(t, 1, MiB, 100);
    finish(t->op, 0);
    g_assert_false(continues(t, 200));
    g_assert_true(continues(t, MiB + 100));

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
    assert_nb(t, writes, 2);
    assert_stat(t, errors, ==, 1);
    read_all(t);

    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        disk_set_error(t->disk, errors[i]);
        start_all_held(t, ops, ARRAY_SIZE(ops), 1);
        ops_finish(ops, ARRAY_SIZE(ops), -errors[i]);
        assert_nb(t, writes, 3 + i);
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
    flush_writes_nothing(t);

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
    start_ops(ops, op_write, .offset = i * 4096, .bytes = 4096);
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
}

/* A reservation made before the error can be used after it */
FIXTURE_TEST(error_reserved, SMALL(16))
{
    reserve_ok(t, 1);
    reserve_ok(t, 2);
    start(t, op_reserve, .nb_clusters = 16);
    assert_waits(t->op);

    accept_ok(t, 1, MiB, 100);
    fail_flush(t, EIO);
    finish(t->op, -EIO);
    accept_ok(t, 2, 2 * MiB, 5000);
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
    start_ops(ops, op_append, .bytes = 5 * 4096);
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
    assert_nb(t, writes, n);

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
    assert_nb(t, writes, 4);
    bdrv_drained_end(t->bs);
    t->bs->drv = &bdrv_node;

    if (!config->param) {
        append_ok(t, 1);
        settle();
        assert_nb(t, writes, 60);
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
    recover(t);
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
    flush_writes_nothing(t);
    assert_stat(t, cached_bytes, ==, 0);
    read_ok(t, 0, 64 * KiB);

    /* Only the clusters that the range touches */
    write_ok(t, 0, 4 * 4096);
    wb_discard(t->bs, t->wb, 4095, 2);
    memset(t->shadow, 0, 2 * 4096);
    read_ok(t, 0, 64 * KiB);
    flush_writes(t, { 2 * 4096, 2 * 4096 });
    assert_all_on_disk(t);

    /* A stream that was flushed and is open */
    write_ok(t, MiB, 1000);
    flush_writes(t, { MiB, 1000 });
    discard_ok(t, MiB, 4096);
    g_assert_false(continues(t, MiB + 1000));
    read_ok(t, MiB, 4096);
    flush_writes_nothing(t);
    write_ok(t, MiB + 10, 10);
    flush_writes(t, { MiB + 10, 10 });
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
    flush_writes(t, { 0, 4 * 4096 });
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
    g_assert_false(continues(t, 200));
    run_fails(t, -EBUSY, op_write, .offset = 0, .bytes = 1);

    disk_release(t->disk);
    finish(discard, 0);
    finish(flush, 0);
    write_ok(t, 0, 50);
    read_ok(t, 0, 4096);
    flush_writes(t, { 0, 100 }, { 0, 50 });
}

/* What was discarded is not tried again, and its error is gone with it */
FIXTURE_TEST(discard_failed, SMALL(4))
{
    /* Failed before */
    disk_set_error(t->disk, EIO);
    append_ok(t, 2 * 4096);
    settle();
    assert_writes(t, { 0, 2 * 4096 });
    discard_ok(t, 0, 2 * 4096);
    flush_ok(t);
    append_ok(t, 1);
    assert_no_writes(t);
    recover(t);
    assert_writes(t, { 2 * 4096, 1 });

    /* Fails afterwards */
    disk_set_error(t->disk, EIO);
    disk_hold(t->disk);
    write_ok(t, MiB, 2 * 4096);
    start(t, op_discard, .offset = MiB, .bytes = 2 * 4096);
    assert_waits(t->op);
    let_go(t, 0);
    assert_writes(t, { MiB, 2 * 4096 });
    flush_ok(t);
    write_ok(t, MiB, 100);
    assert_no_writes(t);

    /* Of a full cache: there is room again for who comes next */
    recover(t);
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
    reserve_ok(t, 3);
    write_ok(t, 0, 10);
    start(t, op_write, .offset = MiB, .bytes = 10);
    assert_waits(t->op);
    discard_ok(t, 0, 4096);
    finish(t->op, 0);
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
    fill_disk(t);
    write_ok(t, 1000, 8000);    /* across clusters */
    write_ok(t, 16384, 100);    /* the start of one */
    write_ok(t, 20480, 4096);   /* all of one */
    read_everywhere(t);

    /* From one side of a boundary only: no need for the disk */
    disk_reset_counts(t->disk);
    read_ok(t, 1000, 8000);
    read_ok(t, 20480, 4096);
    assert_nb(t, reads, 0);
    /* One request for each gap, however the buffers are cut */
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 100);
    assert_nb(t, reads, 4);

    /* What is in flight; without blocks, or reads would have to wait for it */
    disk_set_limits(t->disk_bs, 1, 0);
    disk_hold(t->disk);
    start(t, op_flush);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >, 0);
    read_everywhere(t);
    let_go(t, 0);
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
    assert_nb(t, reads, 0);
    run_ok(t, op_read, .offset = 0, .bytes = 32768, .gen = 5000);
    assert_nb(t, reads, 2);
    t->unchecked = true;
}

FIXTURE_TEST(gap, SMALL(256))
{
    write_ok(t, 1000, 8000);
    assert_gap(t, 0, 1000, 1000);
    assert_gap(t, 0, 1001, 1000);
    assert_gap(t, 0, DISK_SIZE, 1000);
    assert_gap(t, 5000, 1, 0);
    assert_gap(t, 8999, 1, 0);
    assert_gap(t, 9000, DISK_SIZE, DISK_SIZE);

    /* The stream's last cluster is open and stays */
    flush_ok(t);
    assert_gap(t, 0, 8192, 8192);
    assert_gap(t, 8191, 2, 1);
    wb_end_streams(t->wb);
    assert_gap(t, 0, DISK_SIZE, DISK_SIZE);
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
    flush_writes(t, { 0, 4096 }, { MiB, 2 * 4096 },
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
    assert_nb(t, reads, 1);
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
    recover(t);
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
    assert_nb(t, writes, 4);

    /* It would hang if anything was in flight */
    append_ok(t, 4096);
    settle();
    assert_nb(t, writes, 4);
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
    start(t, op_settle, .gen = BDRV_SETTLE_STOP);
    let_go(t, 0);
    wait_for_writes(t, 61);
    assert_all_on_disk(t);
    assert_stat(t, unwritten_bytes, ==, 0);
}

/* One at a time, but at once */
FIXTURE_TEST(settle_idle, BUSY)
{
    start(t, op_settle, .gen = BDRV_SETTLE_IDLE);
    for (int i = 0; i < 4; i++) {
        g_assert_false(op_done(t->op));
        disk_release_one(t->disk);
        settle();
    }
    g_assert_true(op_done(t->op));
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
    start(t, op_settle, .gen = BDRV_SETTLE_WRITE);
    assert_waits(t->op);
    g_assert_cmpuint(t->disk->nb_held, ==, 4);
    disk_release_one(t->disk);
    settle();
    g_assert_true(op_done(t->op));
    finish(t->op, 1);
}

/* A node above one that has a cache, and one whose image is corrupt */
FIXTURE_TEST(settle_graph, BUSY)
{
    BlockDriverState *bs = t->bs;
    BlockBackend *blk;
    QDict *opts = qdict_new();

    disk_release(t->disk);
    flush_ok(t);
    qdict_put_str(opts, "driver", "raw");
    qdict_put_str(opts, "file", "node");
    t->bs = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR, &error_abort);
    blk = blk_new_with_bs(t->bs, BLK_PERM_WRITE, BLK_PERM_ALL, &error_abort);
    disk_hold(t->disk);
    append_ok(t, 60 * 4096);
    start(t, op_settle, .gen = BDRV_SETTLE_STOP);
    assert_waits(t->op);
    let_go(t, 0);
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
    assert_nb(t, writes, 3);
    assert_all_on_disk(t);

    /* In a drained section it has to wait */
    append_ok(t, 100);
    bdrv_drained_begin(t->bs);
    wb_start_write_out(t->wb);
    pass_time();
    assert_nb(t, writes, 3);
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
    disk_hold(t->disk);
    append_ok(t, 8 * 4096);
    start(t, op_flush);
    settle();
    wb_abandon(t->wb);
    let_go(t, -ECANCELED);
    assert_nb(t, writes, 4);
    read_ok(t, 0, 16 * 4096);
    run_fails(t, -ECANCELED, op_flush);
    run_fails(t, -ECANCELED, op_settle, .gen = BDRV_SETTLE_WRITE);
    run_fails(t, -ECANCELED, op_reserve, .nb_clusters = 13);
    reserve_ok(t, 12);
    unreserve(t, 12);
    assert_nb(t, writes, 4);
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
    start_ops(ops, op_append, .bytes = 4000);
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

/* ---- All of it at random ---- */

#define RANDOM_USERS 8

typedef struct RandomUser {
    TestOp op; /* its range is that of the user, and @nb_clusters its steps */
    GRand *rand;
    int64_t granularity; /* what can be discarded without harm to others */
    int64_t pos;
    unsigned nb_writes;
    unsigned nb_errors;
    unsigned nb_flushes;
} RandomUser;

/* A range of up to three units of granularity, from somewhere at @pos */
static void random_range(RandomUser *u, int64_t pos, TestOp *sub)
{
    int64_t end = u->op.offset + u->op.bytes;

    sub->offset = ROUND_DOWN(pos, u->granularity);
    sub->bytes = MIN(end - sub->offset,
                     u->granularity * g_rand_int_range(u->rand, 1, 4));
}

static int coroutine_fn random_write(RandomUser *u, TestOp *sub)
{
    const TestConfig *c = u->op.t->config;
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
    sub->bytes = MIN(g_rand_int_range(u->rand, 1, max + 1), end - u->pos);
    sub->gen = g_rand_int(u->rand);
    ret = op_write(sub);
    if (ret == 0) {
        u->pos += sub->bytes;
        u->nb_writes++;
    } else if (ret == -EBUSY) {
        /* The stream was ended */
        u->pos = MIN(ROUND_UP(u->pos + 1, u->granularity), end);
        ret = 0;
    }
    return ret;
}

static int coroutine_fn random_step(RandomUser *u)
{
    TestOp *op = &u->op;
    TestOp sub = { .t = op->t };
    int64_t end = op->offset + op->bytes;
    int64_t somewhere = g_rand_int_range(u->rand, op->offset, end);
    int ret;

    switch (g_rand_int_range(u->rand, 0, 20)) {
    default:
        return random_write(u, &sub);
    case 0 ... 4:
        sub.offset = somewhere;
        sub.bytes = g_rand_int_range(u->rand, 1, end - somewhere + 1);
        sub.gen = g_rand_int_range(u->rand, 0, 2) ? 0 :
                  g_rand_int_range(u->rand, 300, 5000);
        return op_read(&sub);
    case 5:
        ret = op_blk_flush(&sub);
        if (ret == 0) {
            assert_on_disk(op->t, op->offset, op->bytes);
            u->nb_flushes++;
        }
        return ret;
    case 6:
        random_range(u, somewhere, &sub);
        return op_discard(&sub);
    case 7:
        /* Go on somewhere else; a cluster's rest may be overwritten there */
        random_range(u, somewhere, &sub);
        ret = op_discard(&sub);
        u->pos = sub.offset + g_rand_int_range(u->rand, 0, sub.bytes);
        if (sub.offset + sub.bytes < end) {
            sub.bytes = end - sub.offset;
            ret = op_discard(&sub);
        }
        return ret;
    case 8:
        wb_end_streams(op->t->wb);
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
            u->nb_errors++;
            co_hop();
        }
    }
    return 0;
}

static bool random_done(RandomUser *users)
{
    for (int i = 0; i < RANDOM_USERS; i++) {
        if (!op_done(&users[i].op)) {
            return false;
        }
    }
    return true;
}

/* What happens beside the users, again and again */
typedef void RandomEvent(Test *t, GRand *rand, IOThread **iothreads);

/*
 * Users with ranges of their own do @steps each, in two iothreads and the main
 * loop, or without iothreads only there.  Returns: how many requests failed.
 */
static unsigned run_random(Test *t, unsigned steps, IOThread **iothreads,
                           RandomEvent *event)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(g_test_rand_int());
    RandomUser users[RANDOM_USERS];
    unsigned nb_writes = 0, nb_errors = 0, nb_flushes = 0;

    g_rand_set_seed(t->disk->rand, g_rand_int(rand));
    for (int i = 0; i < RANDOM_USERS; i++) {
        users[i] = (RandomUser) {
            .op = {
                .t = t, .fn = op_random, .offset = i * 512 * KiB,
                .bytes = 256 * KiB, .nb_clusters = steps,
            },
            .rand = g_rand_new_with_seed(g_rand_int(rand)),
            .granularity = MAX(4096, t->config->cluster_size),
            .pos = i * 512 * KiB,
        };
        op_start_in(&users[i].op, !iothreads || i == RANDOM_USERS - 1 ?
                    qemu_get_aio_context() :
                    iothread_get_aio_context(iothreads[i % 2]));
    }
    while (!random_done(users)) {
        aio_poll(qemu_get_aio_context(), false);
        if (event) {
            event(t, rand, iothreads);
        }
    }

    disk_set_percent_bad(t->disk, 0);
    for (int i = 0; i < RANDOM_USERS; i++) {
        nb_writes += users[i].nb_writes;
        nb_errors += users[i].nb_errors;
        nb_flushes += users[i].nb_flushes;
        g_rand_free(users[i].rand);
    }
    g_test_message("%u writes, %u errors, %u flushes", nb_writes, nb_errors,
                   nb_flushes);
    assert_stat(t, max_cached_bytes, <=, t->config->cache_size);
    g_assert_cmpuint(nb_writes, >, RANDOM_USERS * steps / 10);
    g_assert_cmpuint(nb_flushes, >, 0);
    return nb_errors;
}

static void move_node(Test *t, GRand *rand, IOThread **iothreads)
{
    int i = g_rand_int_range(rand, 0, 3);

    blk_set_aio_context(t->blk, i ? iothread_get_aio_context(iothreads[i - 1]) :
                        qemu_get_aio_context(), &error_abort);
}

static void change_graph(Test *t, GRand *rand, IOThread **iothreads)
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

/*
 * Requests from several threads at a time; while the node's home changes; and
 * with writers of the graph, which wait for requests to end
 */
#define IOTHREADS(streams, event) \
    { SMALL(12), .align = 512, .max_streams = streams, .param = event }

FIXTURE_CASES(iothreads,
              IOTHREADS(8, 0), IOTHREADS(8, 1), IOTHREADS(8, 2),
              IOTHREADS(2, 0), IOTHREADS(2, 1), IOTHREADS(2, 2))
{
    static RandomEvent *const events[] = { NULL, move_node, change_graph };
    IOThread *iothreads[2] = { iothread_new(), iothread_new() };

    t->disk->max_hops = 3;
    g_assert_cmpuint(run_random(t, 200, iothreads, events[config->param]), ==,
                     0);
    blk_set_aio_context(t->blk, qemu_get_aio_context(), &error_abort);
    assert_stat(t, errors, ==, 0);
    iothread_join(iothreads[0]);
    iothread_join(iothreads[1]);
}

/* What the users of the node see little of */
static void random_event(Test *t, GRand *rand, IOThread **iothreads)
{
    int64_t max_align = MAX(4096, t->config->cluster_size);
    int ret;

    switch (g_rand_int_range(rand, 0, 100)) {
    case 0:
        disk_set_percent_bad(t->disk, t->disk->percent_bad ? 0 : 30);
        break;
    case 1:
        bdrv_drained_begin(t->bs);
        g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
        disk_set_limits(t->disk_bs,
                        MIN(1 << g_rand_int_range(rand, 0, 13), max_align),
                        g_rand_int_range(rand, 0, 2) * 20 * KiB);
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

FIXTURE_CASES(random,
         { SMALL(2), .align = 512 },
         { SMALL(16), .align = 4096, .max_streams = 8 },
         { .cluster_size = 512, .cache_size = 16 * KiB, .align = 4096,
           .max_streams = 8 },
         { .cluster_size = 16 * KiB, .cache_size = 512 * KiB, .align = 512,
           .max_streams = 3, .no_pad = true })
{
    t->disk->max_hops = 5;
    g_assert_cmpuint(run_random(t, 1000, NULL, random_event), >, 0);
}

int main(int argc, char **argv)
{
    disk_test_init(&argc, &argv);
    fixture_add_tests("/write-behind");
    return g_test_run();
}
