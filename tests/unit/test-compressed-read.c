/*
 * Tests of the cache for reads of compressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A test node stands where qcow2 stands: it has clusters, each of which is
 * "compressed" somewhere on a disk in memory.  Compressed data has the number
 * of its cluster and a generation in each of its bytes, so that data that is
 * old, torn or of somebody else is found.
 *
 * For a given --seed the random test always does the same.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "fixture.h"
#include "iothread.h"
#include "memory-disk.h"
#include "block/compressed-read.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"

#define CLUSTER (16 * KiB)
#define NB_CLUSTERS 256
#define IMAGE_SIZE (NB_CLUSTERS * CLUSTER)
/* Each is in one slot, and there is some room to move them */
#define NB_SLOTS (NB_CLUSTERS + 32)
#define DISK_SIZE (NB_SLOTS * CLUSTER)

/* ---- The node that has the cache ---- */

typedef struct TestNode {
    CompressedReadCache *c;
    CoMutex lock; /* protects the following */
    CompressedExtent extents[NB_CLUSTERS];
    bool used[NB_SLOTS];
    GRand *rand;
} TestNode;

/* One byte of the data of a cluster, compressed or not */
static uint8_t data_byte(int cluster, unsigned gen, int64_t pos)
{
    return cluster * 31 + gen * 101 + pos * 7 + (pos >> 8);
}

/* The first bytes of compressed data */
typedef struct TestHeader {
    uint32_t cluster;
    uint32_t gen;
} TestHeader;

static void compress(uint8_t *dest, int64_t bytes, int cluster, unsigned gen)
{
    TestHeader header = { cluster, gen };

    for (int64_t i = 0; i < bytes; i++) {
        dest[i] = data_byte(cluster, gen, i);
    }
    memcpy(dest, &header, sizeof(header));
}

static ssize_t coroutine_fn node_decompress(BlockDriverState *bs, void *dest,
                                            size_t dest_size, const void *src,
                                            size_t src_size)
{
    g_autofree uint8_t *expected = g_malloc(src_size);
    uint8_t *out = dest;
    TestHeader header;

    /* As in a thread pool */
    co_hop();

    g_assert_cmpuint(dest_size, ==, CLUSTER);
    if (src_size < sizeof(header)) {
        return -EINVAL;
    }
    memcpy(&header, src, sizeof(header));
    compress(expected, src_size, header.cluster, header.gen);
    if (memcmp(expected, src, src_size)) {
        return -EINVAL;
    }
    for (size_t i = 0; i < dest_size; i++) {
        out[i] = data_byte(header.cluster, header.gen, i);
    }
    return 0;
}

static int GRAPH_RDLOCK
node_following(BlockDriverState *bs, int64_t start, int64_t end,
               CompressedExtent *extents, int max)
{
    TestNode *s = bs->opaque;
    int n = 0;

    g_assert_cmpint(start % CLUSTER, ==, 0);
    for (int i = start / CLUSTER; i < NB_CLUSTERS && n < max; i++) {
        if (i * CLUSTER < end && s->extents[i].bytes) {
            extents[n++] = s->extents[i];
        }
    }
    return n;
}

static int coroutine_fn GRAPH_RDLOCK
node_read(BlockDriverState *bs, int64_t offset, int64_t bytes,
          QEMUIOVector *qiov)
{
    return bdrv_co_preadv(bs->file, offset, bytes, qiov, 0);
}

static void node_new_cache(BlockDriverState *bs, int64_t cache_size)
{
    TestNode *s = bs->opaque;
    CompressedReadOptions opts = {
        .cache_size = cache_size,
        .cluster_size = CLUSTER,
        .idle_ms = 20,
        .following = node_following,
        .read = node_read,
        .decompress = node_decompress,
    };

    cread_free(s->c);
    s->c = cache_size ? cread_new(bs, &opts) : NULL;
}

static void node_close(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    cread_free(s->c);
    if (s->rand) {
        g_rand_free(s->rand);
    }
}

static int64_t coroutine_fn node_co_getlength(BlockDriverState *bs)
{
    return IMAGE_SIZE;
}

/* As without a cache */
static int coroutine_fn GRAPH_RDLOCK
node_co_read_cluster(BlockDriverState *bs, CompressedExtent extent,
                     int64_t offset, int64_t bytes, QEMUIOVector *qiov,
                     size_t qiov_offset)
{
    g_autofree uint8_t *buf = g_malloc(extent.bytes);
    g_autofree uint8_t *out = g_malloc(CLUSTER);
    int ret = bdrv_co_pread(bs->file, extent.offset, extent.bytes, buf, 0);

    if (ret >= 0) {
        ret = node_decompress(bs, out, CLUSTER, buf, extent.bytes);
    }
    if (ret >= 0) {
        qemu_iovec_from_buf(qiov, qiov_offset, out + offset % CLUSTER, bytes);
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
node_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset,
                    BdrvRequestFlags flags)
{
    TestNode *s = bs->opaque;
    int64_t end = offset + bytes;
    int ret = 0;

    while (offset < end && ret >= 0) {
        int64_t n = MIN(end - offset, CLUSTER - offset % CLUSTER);
        int64_t hole_start = offset - offset % CLUSTER;
        CompressedExtent extent;
        CompressedRead *read = NULL;

        qemu_co_mutex_lock(&s->lock);
        extent = s->extents[offset / CLUSTER];
        while (hole_start && !s->extents[hole_start / CLUSTER - 1].bytes) {
            hole_start -= CLUSTER;
        }
        if (s->c && extent.bytes) {
            read = cread_begin(s->c, offset, n, end, hole_start, extent);
        }
        qemu_co_mutex_unlock(&s->lock);

        if (!extent.bytes) {
            qemu_iovec_memset(qiov, qiov_offset, 0, n);
        } else if (read) {
            ret = cread_co_read(read, qiov, qiov_offset);
        } else {
            ret = node_co_read_cluster(bs, extent, offset, n, qiov,
                                       qiov_offset);
        }
        offset += n;
        qiov_offset += n;
    }
    return ret;
}

/*
 * A free slot: the first one, or a random one in the neighbourhood.  Called
 * with s->lock held.
 */
static int node_alloc(TestNode *s, int cluster)
{
    int slot = s->rand ? cluster + g_rand_int_range(s->rand, 0, 16) : 0;

    while (s->used[slot]) {
        slot = (slot + 1) % NB_SLOTS;
    }
    s->used[slot] = true;
    return slot;
}

/*
 * Write a cluster; the generation is its first byte.  The table is changed
 * first, as qcow2 does, and what the cluster had is free at once.
 */
static int coroutine_fn GRAPH_RDLOCK
node_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    TestNode *s = bs->opaque;
    int cluster = offset / CLUSTER;
    CompressedExtent *extent = &s->extents[cluster];
    CompressedExtent written;
    g_autofree uint8_t *buf = NULL;
    uint8_t gen;
    int ret;

    g_assert_cmpint(bytes, ==, CLUSTER);
    qemu_iovec_to_buf(qiov, 0, &gen, 1);
    /* What was there before can look like data of this cluster */
    written.bytes = s->rand && g_rand_boolean(s->rand) ? CLUSTER / 2 :
                                                         CLUSTER / 3;
    buf = g_malloc(written.bytes);
    compress(buf, written.bytes, cluster, gen);

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        if (extent->bytes) {
            s->used[extent->offset / CLUSTER] = false;
        }
        written.offset = node_alloc(s, cluster) * CLUSTER;
        *extent = written;
    }
    ret = bdrv_co_pwrite(bs->file, written.offset, written.bytes, buf, 0);
    cread_forget(s->c, written.offset, written.bytes);
    return ret;
}

static void node_drain_begin(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    cread_drained_begin(s->c);
}

static void node_drain_end(BlockDriverState *bs)
{
    TestNode *s = bs->opaque;

    cread_drained_end(s->c);
}

static BlockDriver bdrv_node = {
    .format_name            = "compressed-read-node",
    .instance_size          = sizeof(TestNode),
    .bdrv_close             = node_close,
    .bdrv_drain_begin       = node_drain_begin,
    .bdrv_drain_end         = node_drain_end,
    .bdrv_child_perm        = bdrv_default_perms,
    .bdrv_co_getlength      = node_co_getlength,
    .bdrv_co_preadv_part    = node_co_preadv_part,
    .bdrv_co_pwritev        = node_co_pwritev,
};

/* ---- A test's environment ---- */

typedef struct TestConfig {
    int64_t cache_size; /* 0: 16 MiB; -1: no cache */
    uint32_t align;     /* 0: 1 */
    bool random_layout;
    int shuffle;        /* cluster N is the (N ^ shuffle)-th that is written */
} TestConfig;

typedef struct Test {
    BlockBackend *blk;
    BlockDriverState *bs;
    TestNode *node;
    BlockDriverState *disk_bs;
    Disk *disk;
    unsigned gen[NB_CLUSTERS];
} Test;

/* A request that runs in the background */
typedef struct TestOp {
    Test *t;
    int64_t offset;
    int64_t bytes;
    uint8_t *buf;
    QEMUIOVector qiov;
    int ret; /* -EINPROGRESS until it is done */
} TestOp;

static void op_done_cb(void *opaque, int ret)
{
    TestOp *op = opaque;

    op->ret = ret;
}

static void op_init(TestOp *op, Test *t, int64_t offset, int64_t bytes)
{
    *op = (TestOp) {
        .t = t, .offset = offset, .bytes = bytes, .ret = -EINPROGRESS,
        .buf = g_malloc0(bytes),
    };
    qemu_iovec_init_buf(&op->qiov, op->buf, bytes);
}

static void op_start_read(TestOp *op, Test *t, int64_t offset, int64_t bytes)
{
    op_init(op, t, offset, bytes);
    blk_aio_preadv(t->blk, offset, &op->qiov, 0, op_done_cb, op);
}

static void op_start_write(TestOp *op, Test *t, int cluster, uint8_t gen)
{
    op_init(op, t, cluster * CLUSTER, CLUSTER);
    op->buf[0] = gen;
    blk_aio_pwritev(t->blk, op->offset, &op->qiov, 0, op_done_cb, op);
}

static int op_wait(TestOp *op)
{
    while (op->ret == -EINPROGRESS) {
        aio_poll(qemu_get_aio_context(), true);
    }
    return op->ret;
}

/* What was read is what was written last */
static void op_check(TestOp *op)
{
    for (int64_t i = 0; i < op->bytes; i++) {
        int cluster = (op->offset + i) / CLUSTER;
        int64_t pos = (op->offset + i) % CLUSTER;
        unsigned gen = op->t->gen[cluster];

        if (op->buf[i] != (gen ? data_byte(cluster, gen, pos) : 0)) {
            g_error("cluster %d, byte %" PRId64 ": not of generation %u",
                    cluster, pos, gen);
        }
    }
}

static void op_free(TestOp *op)
{
    g_free(op->buf);
}

static void test_read(Test *t, int64_t offset, int64_t bytes)
{
    TestOp op;

    op_start_read(&op, t, offset, bytes);
    g_assert_cmpint(op_wait(&op), ==, 0);
    op_check(&op);
    op_free(&op);
}

static void test_write(Test *t, int cluster)
{
    TestOp op;

    t->gen[cluster]++;
    op_start_write(&op, t, cluster, t->gen[cluster]);
    g_assert_cmpint(op_wait(&op), ==, 0);
    op_free(&op);
}

static void set_up(Test *t, const TestConfig *config)
{
    t->disk_bs = disk_new(&bdrv_disk, "disk", &(DiskConfig) {
        .len = DISK_SIZE, .max_len = DISK_SIZE, .align = config->align,
    });
    t->disk = t->disk_bs->opaque;
    t->bs = bdrv_new_open_driver(&bdrv_node, "node", BDRV_O_RDWR,
                                 &error_abort);
    t->node = t->bs->opaque;
    qemu_co_mutex_init(&t->node->lock);
    if (config->random_layout) {
        t->node->rand = g_rand_new_with_seed(g_test_rand_int());
    }
    bdrv_ref(t->disk_bs);
    bdrv_graph_wrlock();
    bdrv_attach_child(t->bs, t->disk_bs, "file", &child_of_bds,
                      BDRV_CHILD_IMAGE | BDRV_CHILD_PRIMARY, &error_abort);
    bdrv_graph_wrunlock();
    t->blk = user_new(t->bs);
    for (int i = 0; i < NB_CLUSTERS; i++) {
        test_write(t, i ^ config->shuffle);
    }
    if (config->cache_size >= 0) {
        node_new_cache(t->bs, config->cache_size ?: 16 * MiB);
    }
    disk_reset_counts(t->disk);
}

static void tear_down(Test *t, const TestConfig *config)
{
    /* Everything is as it should be in the end */
    t->disk->percent_bad = 0;
    test_read(t, 0, IMAGE_SIZE);
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
}

static uint64_t stat_of(Test *t, size_t offset)
{
    BlockStatsCompressedRead *stats = cread_get_stats(t->node->c);
    uint64_t value = *(uint64_t *)((char *)stats + offset);

    qapi_free_BlockStatsCompressedRead(stats);
    return value;
}

#define STAT(t, member) \
    stat_of(t, offsetof(BlockStatsCompressedRead, member))

/* ---- Requests ---- */

FIXTURE_CASES(sequential_reads_make_few_requests, {}, { .align = 4096 })
{
    for (int i = 0; i < NB_CLUSTERS; i++) {
        test_read(t, i * CLUSTER, CLUSTER);
    }
    g_assert_cmpuint(t->disk->nb.reads, <, 12);
    g_assert_cmpuint(STAT(t, misses), <, 12);
    g_assert_cmpuint(STAT(t, hits) + STAT(t, misses), ==, NB_CLUSTERS);
}

FIXTURE_TEST(small_reads_decompress_once)
{
    for (int64_t pos = 0; pos < 32 * CLUSTER; pos += 1 * KiB) {
        test_read(t, pos, 1 * KiB);
    }
    g_assert_cmpuint(STAT(t, hits) + STAT(t, misses), ==, 32);
    g_assert_cmpuint(STAT(t, cluster_hits), ==, 32 * 15);
}

FIXTURE_TEST(random_reads_are_as_without_a_cache)
{
    /* No two of them are in order */
    for (int i = 0; i < NB_CLUSTERS; i++) {
        test_read(t, (i * 37 % NB_CLUSTERS) * CLUSTER + 512, 512);
    }
    g_assert_cmpuint(t->disk->nb.reads, ==, NB_CLUSTERS);
    g_assert_cmpuint(STAT(t, pieces), ==, 0);
}

FIXTURE_TEST(request_of_many_clusters_is_read_at_once)
{
    test_read(t, 40 * CLUSTER, 8 * CLUSTER);
    g_assert_cmpuint(t->disk->nb.reads, ==, 1);
    /* And nothing beyond it */
    test_read(t, 80 * CLUSTER, 8 * CLUSTER);
    g_assert_cmpuint(t->disk->nb.reads, ==, 2);
    g_assert_cmpuint(STAT(t, piece_bytes), <, 17 * CLUSTER);
}

/* No clusters are left alone between two pieces */
FIXTURE_CASES(layout_does_not_matter, { .shuffle = 1 }, { .shuffle = 7 },
              { .shuffle = 13 }, { .shuffle = 48 })
{
    for (int i = 0; i < NB_CLUSTERS; i++) {
        test_read(t, i * CLUSTER, CLUSTER);
    }
    g_assert_cmpuint(t->disk->nb.reads, <, 12);
}

FIXTURE_TEST(readers_at_the_same_time_share)
{
    TestOp ops[8];

    disk_set_hold(t->disk, DISK_READ, HOLD_BEFORE);
    for (int i = 0; i < 8; i++) {
        op_start_read(&ops[i], t, 5 * CLUSTER + i * 1024, 1024);
    }
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    disk_set_hold(t->disk, DISK_READ, HOLD_NEVER);
    disk_wake(t->disk);
    for (int i = 0; i < 8; i++) {
        g_assert_cmpint(op_wait(&ops[i]), ==, 0);
        op_check(&ops[i]);
        op_free(&ops[i]);
    }
    /* The second one has begun to read ahead */
    g_assert_cmpuint(t->disk->nb.reads, <=, 2);
}

/* Read the first 8 clusters; those that follow are held on their way */
static void hold_what_is_read_ahead(Test *t)
{
    for (int i = 0; i < 8; i++) {
        if (i == 2) {
            disk_set_hold(t->disk, DISK_READ, HOLD_BEFORE);
        }
        test_read(t, i * CLUSTER, CLUSTER);
    }
    g_assert_cmpuint(t->disk->nb_held, >=, 1);
}

FIXTURE_TEST(only_who_needs_what_is_read_ahead_waits_for_it)
{
    TestOp op;

    hold_what_is_read_ahead(t);
    op_start_read(&op, t, 10 * CLUSTER, CLUSTER);
    settle();
    g_assert_cmpint(op.ret, ==, -EINPROGRESS);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    op_check(&op);
    op_free(&op);
    /* Nobody has read his own cluster */
    g_assert_cmpuint(STAT(t, misses), ==, 2);
}

FIXTURE_TEST(drain_waits_for_what_is_read_ahead)
{
    hold_what_is_read_ahead(t);
    disk_release_later(t->disk);
    bdrv_drained_begin(t->bs);
    g_assert_cmpuint(t->disk->nb_in_flight, ==, 0);
    bdrv_drained_end(t->bs);
}

FIXTURE_TEST(error_of_what_is_read_ahead_is_nobodys)
{
    TestOp op;

    hold_what_is_read_ahead(t);
    op_start_read(&op, t, 10 * CLUSTER, CLUSTER);
    disk_set_percent_bad(t->disk, 100);
    settle();
    disk_set_hold(t->disk, DISK_READ, HOLD_AFTER);
    disk_wake(t->disk);
    settle();
    disk_set_percent_bad(t->disk, 0);
    disk_release(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    op_check(&op);
    op_free(&op);
    g_assert_cmpuint(STAT(t, errors), >, 0);
}

FIXTURE_TEST(what_is_read_ahead_during_a_write_is_forgotten)
{
    hold_what_is_read_ahead(t);
    disk_set_hold(t->disk, DISK_READ, HOLD_AFTER);
    disk_wake(t->disk);
    settle();
    g_assert_cmpuint(t->disk->nb_held, >=, 1);
    test_write(t, 10);
    disk_release(t->disk);
    test_read(t, 9 * CLUSTER, 2 * CLUSTER);
}

FIXTURE_TEST(idle_cache_gives_its_memory_back)
{
    test_read(t, 0, 8 * CLUSTER);
    test_read(t, 0, 512);
    g_assert_cmpuint(STAT(t, cached_bytes), >, 0);
    while (STAT(t, cached_bytes)) {
        g_usleep(1000);
        qemu_clock_run_all_timers();
    }
    disk_reset_counts(t->disk);
    test_read(t, 0, 8 * CLUSTER);
    g_assert_cmpuint(t->disk->nb.reads, >, 0);
}

/* ---- Errors ---- */

FIXTURE_TEST(error_of_a_piece_is_nobodys)
{
    disk_set_fault(t->disk, (DiskFault) {
        .kinds = DISK_READ, .first = 1, .error = EIO,
    });
    test_read(t, 0, 4 * CLUSTER);
    g_assert_cmpuint(STAT(t, errors), ==, 1);
    /* Nothing that the request may have left is used */
    g_assert_cmpuint(t->disk->nb.reads, ==, 1 + 4);
    disk_set_fault(t->disk, (DiskFault) {});
    test_read(t, 0, 4 * CLUSTER);
}

FIXTURE_TEST(after_an_error_nothing_is_read_ahead)
{
    disk_set_fault(t->disk, (DiskFault) {
        .kinds = DISK_READ, .first = 1, .error = EIO,
    });
    test_read(t, 0, 4 * CLUSTER);
    disk_set_fault(t->disk, (DiskFault) {});
    disk_reset_counts(t->disk);
    for (int i = 4; i < 16; i++) {
        test_read(t, i * CLUSTER, CLUSTER);
    }
    g_assert_cmpuint(t->disk->nb.reads, ==, 12);
    test_read(t, 16 * CLUSTER, (NB_CLUSTERS - 16) * CLUSTER);
    disk_reset_counts(t->disk);
    test_read(t, 0, 16 * CLUSTER);
    g_assert_cmpuint(t->disk->nb.reads, <, 4);
}

FIXTURE_TEST(error_of_the_own_cluster_is_returned)
{
    TestOp op;

    /* One request for one cluster, as without a cache */
    disk_set_fault(t->disk, (DiskFault) {
        .kinds = DISK_READ, .first = 1, .error = EIO,
    });
    op_start_read(&op, t, 3 * CLUSTER, 512);
    g_assert_cmpint(op_wait(&op), ==, -EIO);
    op_free(&op);
    g_assert_cmpuint(t->disk->nb.reads, ==, 1);
    test_read(t, 3 * CLUSTER, 512);
}

FIXTURE_TEST(corrupt_cluster_fails_alone)
{
    CompressedExtent *extent = &t->node->extents[2];
    TestOp op;
    uint8_t *byte = &t->disk->data[extent->offset + 100];

    *byte ^= 1;
    test_read(t, 0, 2 * CLUSTER);
    op_start_read(&op, t, 2 * CLUSTER, CLUSTER);
    g_assert_cmpint(op_wait(&op), ==, -EIO);
    op_free(&op);
    test_read(t, 3 * CLUSTER, 4 * CLUSTER);
    *byte ^= 1;
    cread_forget(t->node->c, extent->offset, extent->bytes);
}

/* Two clusters at the same place, one of which is too short to be whole */
FIXTURE_TEST(same_place_other_length)
{
    TestOp op;

    t->node->extents[3] = t->node->extents[2];
    t->node->extents[3].bytes = sizeof(TestHeader) - 1;
    for (int i = 0; i < 2; i++) {
        test_read(t, 2 * CLUSTER, 512);
        op_start_read(&op, t, 3 * CLUSTER, 512);
        g_assert_cmpint(op_wait(&op), ==, -EIO);
        op_free(&op);
    }
    t->node->extents[3] = (CompressedExtent) {};
    t->gen[3] = 0;
}

/* A piece has only a part of it */
FIXTURE_TEST(extent_beyond_a_piece)
{
    CompressedExtent last = t->node->extents[3];

    t->node->extents[8] = (CompressedExtent) {
        last.offset + last.bytes - 100, CLUSTER,
    };
    test_read(t, 0, 4 * CLUSTER);
    assert_nb(t, reads, 1);
    for (int i = 0; i < 2; i++) {
        TestOp op;

        op_start_read(&op, t, 8 * CLUSTER, CLUSTER);
        g_assert_cmpint(op_wait(&op), <, 0);
        op_free(&op);
    }
    g_assert_cmpuint(STAT(t, hits), ==, 3);
    t->node->extents[8] = (CompressedExtent) {};
    t->gen[8] = 0;
}

/* ---- Never stale ---- */

FIXTURE_TEST(what_is_written_is_read)
{
    test_read(t, 0, 8 * CLUSTER);
    test_read(t, 8 * CLUSTER, 512);
    for (int i = 0; i < 9; i++) {
        /* Twice: the second time it is back where it was */
        test_write(t, i);
        test_write(t, i);
        test_read(t, i * CLUSTER, 512);
        test_write(t, i);
        test_write(t, i);
        test_read(t, i * CLUSTER, 512);
        test_read(t, i * CLUSTER, CLUSTER);
    }
    g_assert_cmpuint(STAT(t, forgotten), >, 0);
}

/* Write cluster 1 while a read that touches it has got its old data */
static void write_while_read(Test *t, int64_t offset, int64_t bytes)
{
    TestOp op;

    disk_set_hold(t->disk, DISK_READ, HOLD_AFTER);
    op_start_read(&op, t, offset, bytes);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    test_write(t, 1);
    disk_set_hold(t->disk, DISK_READ, HOLD_NEVER);
    disk_wake(t->disk);
    g_assert_cmpint(op_wait(&op), ==, 0);
    op_free(&op);
    test_read(t, CLUSTER, 512);
    test_read(t, CLUSTER, CLUSTER);
}

FIXTURE_TEST(piece_in_flight_is_forgotten)
{
    write_while_read(t, 0, 2 * CLUSTER);
}

FIXTURE_TEST(cluster_in_the_making_is_forgotten)
{
    write_while_read(t, CLUSTER, 512);
}

FIXTURE_TEST(what_is_read_during_a_write_is_not_kept)
{
    TestOp write, read;

    /* The new data goes where the old data is, which the reads still find */
    disk_set_hold(t->disk, DISK_WRITE, HOLD_BEFORE);
    t->gen[1]++;
    op_start_write(&write, t, 1, t->gen[1]);
    settle();
    g_assert_cmpuint(t->disk->nb_held, ==, 1);
    op_start_read(&read, t, 0, 4 * CLUSTER);
    g_assert_cmpint(op_wait(&read), ==, 0);
    op_free(&read);
    op_start_read(&read, t, CLUSTER, 512);
    g_assert_cmpint(op_wait(&read), ==, 0);
    op_free(&read);
    disk_set_hold(t->disk, DISK_WRITE, HOLD_NEVER);
    disk_wake(t->disk);
    g_assert_cmpint(op_wait(&write), ==, 0);
    op_free(&write);
    test_read(t, CLUSTER, 512);
    test_read(t, 0, 4 * CLUSTER);
}

FIXTURE_TEST(another_child_is_read_anew)
{
    BlockDriverState *other = disk_new(&bdrv_disk, "other", &(DiskConfig) {
        .len = DISK_SIZE, .max_len = DISK_SIZE,
    });
    Disk *d = other->opaque;

    test_read(t, 0, 8 * CLUSTER);
    test_read(t, 0, 512);
    for (int i = 0; i < NB_CLUSTERS; i++) {
        t->gen[i] = 9;
        compress(d->data + t->node->extents[i].offset,
                 t->node->extents[i].bytes, i, 9);
    }
    disk_replace(t->disk_bs, other);
    test_read(t, 0, 512);
    test_read(t, 0, 8 * CLUSTER);
    bdrv_unref(other);
}

/* ---- Random ---- */

#define RANDOM_USERS 8
#define RANDOM_STEPS 4000

typedef struct RandomUser {
    TestOp op;
    bool busy;
    bool write;
    int first, last; /* clusters */
    int64_t pos;     /* where a stream goes on */
} RandomUser;

/* Reads of a cluster may overlap, but nothing else: who wins is not defined */
static bool conflicts(RandomUser *users, int first, int last, bool write)
{
    for (int i = 0; i < RANDOM_USERS; i++) {
        RandomUser *u = &users[i];

        if (u->busy && (write || u->write) && first <= u->last &&
            u->first <= last) {
            return true;
        }
    }
    return false;
}

static void random_start(Test *t, RandomUser *users, RandomUser *u, GRand *r)
{
    int64_t offset, bytes;

    u->write = g_rand_int_range(r, 0, 4) == 0;
    if (u->write) {
        offset = g_rand_int_range(r, 0, NB_CLUSTERS) * CLUSTER;
        bytes = CLUSTER;
    } else {
        if (g_rand_int_range(r, 0, 8) == 0) {
            u->pos = g_rand_int_range(r, 0, IMAGE_SIZE / 512) * 512;
        }
        offset = u->pos % IMAGE_SIZE;
        bytes = g_rand_int_range(r, 0, 2) ? CLUSTER :
                g_rand_int_range(r, 1, 5 * CLUSTER / 512) * 512;
        bytes = MIN(bytes, IMAGE_SIZE - offset);
        u->pos = offset + bytes;
    }
    u->first = offset / CLUSTER;
    u->last = (offset + bytes - 1) / CLUSTER;
    if (conflicts(users, u->first, u->last, u->write)) {
        return;
    }

    u->busy = true;
    if (u->write) {
        t->gen[u->first] = t->gen[u->first] % 250 + 1;
        op_start_write(&u->op, t, u->first, t->gen[u->first]);
    } else {
        op_start_read(&u->op, t, offset, bytes);
    }
}

FIXTURE_CASES(random, { .random_layout = true },
              { .random_layout = true, .cache_size = 2 * CLUSTER },
              { .random_layout = true, .cache_size = 300 * KiB, .align = 512 },
              { .random_layout = true, .cache_size = 1 * MiB, .align = 4096 })
{
    GRand *r = g_rand_new_with_seed(g_test_rand_int());
    int steps = RANDOM_STEPS * (g_test_slow() ? 20 : 1);
    RandomUser users[RANDOM_USERS] = {};
    int nb_busy = 0;

    t->disk->max_hops = 5;
    while (steps > 0 || nb_busy) {
        aio_poll(qemu_get_aio_context(), false);
        nb_busy = 0;
        for (int i = 0; i < RANDOM_USERS; i++) {
            RandomUser *u = &users[i];

            if (u->busy && u->op.ret != -EINPROGRESS) {
                g_assert_cmpint(u->op.ret, ==, 0);
                if (!u->write) {
                    op_check(&u->op);
                }
                op_free(&u->op);
                u->busy = false;
            }
            if (!u->busy && steps > 0) {
                random_start(t, users, u, r);
                steps--;
            }
            nb_busy += u->busy;
        }
    }
    g_assert_cmpuint(STAT(t, max_cached_bytes), <=,
                     config->cache_size ?: 16 * MiB);
    g_test_message("hits %" PRIu64 " misses %" PRIu64 " cluster hits %" PRIu64
                   " forgotten %" PRIu64, STAT(t, hits), STAT(t, misses),
                   STAT(t, cluster_hits), STAT(t, forgotten));
    g_assert_cmpuint(STAT(t, cluster_hits), >, 0);
    g_rand_free(r);
}

/* ---- Several threads ---- */

#define THREAD_USERS 6
#define THREAD_CLUSTERS (NB_CLUSTERS / THREAD_USERS)
#define THREAD_STEPS 300

/* Reads everything, and writes every THREAD_USERS-th cluster */
typedef struct ThreadUser {
    Test *t;
    int number;
    GRand *rand;
    Coroutine *co;
    bool done;
} ThreadUser;

/* Read clusters, and look at those that only this user writes */
static void coroutine_fn thread_read(ThreadUser *u, int first, int count)
{
    Test *t = u->t;
    g_autofree uint8_t *buf = g_malloc(count * CLUSTER);
    int64_t start = count == 1 ? g_rand_int_range(u->rand, 0, CLUSTER) : 0;
    int64_t bytes = count * CLUSTER - start;
    int ret = blk_co_pread(t->blk, first * CLUSTER + start, bytes, buf, 0);

    /* Others may be writing: what is read then can be of nobody */
    if (count > 1 && (ret == -EIO || ret == -EINVAL)) {
        return;
    }
    g_assert_cmpint(ret, ==, 0);
    for (int i = first; i < first + count; i++) {
        if (i % THREAD_USERS == u->number) {
            for (int64_t pos = start; pos < CLUSTER; pos++) {
                g_assert_cmpuint(buf[(i - first) * CLUSTER + pos - start], ==,
                                 data_byte(i, t->gen[i], pos));
            }
        }
    }
}

static void coroutine_fn thread_user_co(void *opaque)
{
    ThreadUser *u = opaque;
    Test *t = u->t;

    for (int step = 0; step < THREAD_STEPS; step++) {
        int own = g_rand_int_range(u->rand, 0, THREAD_CLUSTERS) *
                  THREAD_USERS + u->number;

        if (g_rand_int_range(u->rand, 0, 3) == 0) {
            g_autofree uint8_t *buf = g_malloc0(CLUSTER);

            t->gen[own] = t->gen[own] % 250 + 1;
            buf[0] = t->gen[own];
            g_assert_cmpint(blk_co_pwrite(t->blk, own * CLUSTER, CLUSTER, buf,
                                          0), ==, 0);
        } else {
            thread_read(u, own, 1);
        }
        thread_read(u, MIN(step % NB_CLUSTERS, NB_CLUSTERS - 4), 4);
    }
    qatomic_set(&u->done, true);
}

FIXTURE_CASES(threads, { .random_layout = true },
              { .random_layout = true, .cache_size = 200 * KiB, .align = 512 })
{
    IOThread *iothreads[2] = { iothread_new(), iothread_new() };
    ThreadUser users[THREAD_USERS];

    t->disk->max_hops = 3;
    for (int i = 0; i < THREAD_USERS; i++) {
        users[i] = (ThreadUser) {
            .t = t, .number = i,
            .rand = g_rand_new_with_seed(g_test_rand_int()),
        };
        users[i].co = qemu_coroutine_create(thread_user_co, &users[i]);
        aio_co_schedule(i % 3 == 2 ? qemu_get_aio_context() :
                        iothread_get_aio_context(iothreads[i % 3]),
                        users[i].co);
    }
    for (int i = 0; i < THREAD_USERS; i++) {
        while (!qatomic_read(&users[i].done)) {
            aio_poll(qemu_get_aio_context(), false);
        }
        g_rand_free(users[i].rand);
    }
    g_assert_cmpuint(STAT(t, hits), >, 0);
    g_assert_cmpuint(STAT(t, max_cached_bytes), <=,
                     config->cache_size ?: 16 * MiB);
    /* What is read ahead is read in the thread of the reader */
    bdrv_drain_all();
    iothread_join(iothreads[0]);
    iothread_join(iothreads[1]);
}

/*
 * Read all, in order, also where a BlockBackend would wait.  Whatever the state
 * of the graph lock: the graph does not change.
 */
static void coroutine_fn TSA_NO_TSA direct_reader_co(void *opaque)
{
    ThreadUser *u = opaque;
    g_autofree uint8_t *buf = g_malloc(CLUSTER);
    TestOp op = { .t = u->t, .bytes = CLUSTER, .buf = buf };

    qemu_iovec_init_buf(&op.qiov, buf, CLUSTER);
    for (int i = 0; i < NB_CLUSTERS; i++) {
        op.offset = i * CLUSTER;
        g_assert_cmpint(node_co_preadv_part(u->t->bs, op.offset, CLUSTER,
                                            &op.qiov, 0, 0), ==, 0);
        op_check(&op);
    }
    qatomic_set(&u->done, true);
}

static void read_directly(Test *t)
{
    ThreadUser user = { .t = t };

    disk_reset_counts(t->disk);
    qemu_coroutine_enter(qemu_coroutine_create(direct_reader_co, &user));
    while (!user.done) {
        aio_poll(qemu_get_aio_context(), true);
    }
}

/* A reader of its own cluster reads others with it, and that is all */
FIXTURE_TEST(nothing_is_read_ahead_while_drained)
{
    int64_t misses;

    bdrv_drained_begin(t->bs);
    read_directly(t);
    misses = STAT(t, misses);
    g_assert_cmpuint(t->disk->nb.reads, ==, misses);
    g_assert_cmpuint(misses, >, 4);
    bdrv_drained_end(t->bs);

    read_directly(t);
    g_assert_cmpuint(t->disk->nb.reads, >, STAT(t, misses) - misses);
}

/* As long as somebody else has the graph lock; and nobody waits for that */
FIXTURE_TEST(nothing_is_read_ahead_without_the_graph_lock)
{
    IOThread *iothread = iothread_new();
    ThreadUser user = { .t = t };

    user.co = qemu_coroutine_create(direct_reader_co, &user);
    bdrv_graph_wrlock();
    aio_co_schedule(iothread_get_aio_context(iothread), user.co);
    while (!qatomic_read(&user.done)) {
        g_usleep(100);
    }
    bdrv_graph_wrunlock();
    /* Whenever it has begun to read ahead */
    g_assert_cmpuint(STAT(t, misses), >, 4);
    bdrv_drain_all();
    iothread_join(iothread);
}

int main(int argc, char **argv)
{
    disk_test_init(&argc, &argv);
    fixture_add_tests("/compressed-read");
    return g_test_run();
}
