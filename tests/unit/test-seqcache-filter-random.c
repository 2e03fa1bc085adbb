/*
 * Random test of the seqcache filter
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Several coroutines send requests of all kinds to a seqcache node while the
 * main loop drains and reopens it and lets the disk fail.  Everything that is
 * changed is changed in a flat buffer as well, and whatever the node says is
 * compared with that.  Byte ranges are locked, so that requests that run at
 * the same time do not overlap; but they share blocks and clusters.
 *
 * Without iothreads, the same --seed does the same.  The environment variable
 * TEST_SEQCACHE_OPS is the number of operations, in all cases together.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "iothread.h"
#include "seqcache-random.h"

#define NB_USERS 12
#define NB_CASES 9

static unsigned nb_ops = 60000;

/* ---- Operations ---- */

typedef struct Extent {
    int64_t offset;
    int64_t bytes;
} Extent;

static Extent clamp(int64_t offset, int64_t bytes)
{
    offset = MIN(MAX(offset, 0), DISK_MAX_SIZE - 1);
    return (Extent) {
        .offset = offset,
        .bytes = MIN(MAX(bytes, 1), DISK_MAX_SIZE - offset),
    };
}

/* A range somewhere, mostly small; aligned or not */
static Extent somewhere(User *u, int64_t max_bytes)
{
    int64_t align = below(u, 2) ? u->r->align : below(u, 2) ? 512 : 1;
    int64_t bytes = below(u, 4) ? below(u, 6000) : below(u, max_bytes);
    int64_t offset = below(u, 2) ? below(u, DISK_MAX_SIZE) :
                     u->pos[below(u, NB_STREAMS)] - below(u, 12000);

    return clamp(ROUND_UP(MAX(offset, 0), align), ROUND_UP(bytes + 1, align));
}

static void coroutine_fn write_extent(User *u, Extent e, unsigned flags)
{
    Disk *d = u->r->t->disk;
    g_autofree uint8_t *buf = random_data(u, e.bytes);
    QEMUIOVector qiov;
    int ret;

    random_qiov(u, &qiov, buf, e.bytes);
    lock_range(u, e.offset, e.bytes, true);
    ret = blk_co_pwritev(u->r->t->blk, e.offset, e.bytes, &qiov, flags);
    if (ret == 0 && (flags & BDRV_REQ_FUA)) {
        QEMU_LOCK_GUARD(&d->lock);
        assert_bytes(d->stable + e.offset, buf, e.offset, e.bytes, "FUA");
    }
    changed(u, e.offset, e.bytes, buf, true, ret);
    lock_drop(u);
    qemu_iovec_destroy(&qiov);
}

static void coroutine_fn op_stream(User *u)
{
    int64_t *pos = &u->pos[below(u, NB_STREAMS)];
    Extent e;

    if (*pos >= DISK_MAX_SIZE || below(u, 60) == 0) {
        *pos = below(u, DISK_MAX_SIZE);
        *pos = ROUND_DOWN(*pos, below(u, 2) ? 1 : 4096);
    }
    e = clamp(*pos, below(u, 2) ? 512 * (1 + below(u, 8)) : below(u, 4000));
    *pos += e.bytes;
    write_extent(u, e, 0);
}

static void coroutine_fn op_write(User *u)
{
    write_extent(u, somewhere(u, 150 * KiB), 0);
}

static void coroutine_fn op_fua(User *u)
{
    write_extent(u, somewhere(u, 20 * KiB), BDRV_REQ_FUA);
}

static void coroutine_fn op_compressed(User *u)
{
    Extent e = somewhere(u, 64 * KiB);
    g_autofree uint8_t *buf = random_data(u, e.bytes);
    int ret;

    lock_range(u, e.offset, e.bytes, true);
    ret = blk_co_pwrite_compressed(u->r->t->blk, e.offset, e.bytes, buf);
    changed(u, e.offset, e.bytes, buf, true, ret);
    lock_drop(u);
}

static void coroutine_fn op_zero(User *u)
{
    static const unsigned flags[] = {
        0, BDRV_REQ_MAY_UNMAP, BDRV_REQ_FUA, BDRV_REQ_NO_FALLBACK,
        BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK,
        BDRV_REQ_MAY_UNMAP | BDRV_REQ_FUA,
    };
    Disk *d = u->r->t->disk;
    unsigned f = flags[below(u, ARRAY_SIZE(flags))];
    Extent e = somewhere(u, 200 * KiB);
    g_autofree uint8_t *buf = g_malloc0(e.bytes);
    int ret;

    lock_range(u, e.offset, e.bytes, true);
    ret = blk_co_pwrite_zeroes(u->r->t->blk, e.offset, e.bytes, f);
    g_assert(ret != -ENOTSUP || (f & BDRV_REQ_NO_FALLBACK));
    if (ret == 0 && (f & BDRV_REQ_FUA)) {
        QEMU_LOCK_GUARD(&d->lock);
        assert_bytes(d->stable + e.offset, buf, e.offset, e.bytes, "zero FUA");
    }
    changed(u, e.offset, e.bytes, buf, true, ret);
    lock_drop(u);
}

static void coroutine_fn op_discard(User *u)
{
    RandomTest *r = u->r;
    Extent e = somewhere(u, 200 * KiB);
    int64_t start = ROUND_UP(e.offset, r->align);
    int64_t end = ROUND_DOWN(e.offset + e.bytes, r->align);
    g_autofree uint8_t *buf = g_malloc(e.bytes);
    int ret;

    lock_range(u, e.offset, e.bytes, true);
    memcpy(buf, r->t->shadow + e.offset, e.bytes);
    if (start < end) {
        memset(buf + start - e.offset, 0, end - start);
    }
    ret = compat_blk_co_pdiscard(r->t->blk, e.offset, e.bytes);
    g_assert_cmpint(ret, !=, -ENOTSUP);
    changed(u, e.offset, e.bytes, buf, false, ret);
    lock_drop(u);
}

static void coroutine_fn op_copy(User *u)
{
    RandomTest *r = u->r;
    int64_t bytes = ROUND_UP(below(u, 40000) + 1, r->align);
    int64_t src = ROUND_DOWN(below(u, DISK_MAX_SIZE - bytes + 1), r->align);
    int64_t dst = ROUND_DOWN(below(u, DISK_MAX_SIZE - bytes + 1), r->align);
    g_autofree uint8_t *buf = g_malloc(bytes);
    int ret = -ENOTSUP;

    if (ABS(src - dst) < bytes) {
        return;
    }
    lock_add(u, src, bytes, false);
    lock_range(u, dst, bytes, true);
    memcpy(buf, r->t->shadow + src, bytes);
    if (gate_enter(r)) {
        ret = blk_co_copy_range(r->t->blk, src, r->t->blk, dst, bytes, 0, 0);
        gate_leave(r);
    }
    changed(u, dst, bytes, buf, true, ret);
    lock_drop(u);
}

static void coroutine_fn op_truncate(User *u)
{
    RandomTest *r = u->r;
    int64_t len = below(u, NB_SECTORS + 1) * BDRV_SECTOR_SIZE;
    int64_t start = ROUND_DOWN(len, MAX(r->align, BDRV_SECTOR_SIZE));
    int ret;

    /* Often near the end */
    if (below(u, 2)) {
        QEMU_LOCK_GUARD(&r->lock);
        len = r->min_len + (below(u, 64) - 32) * BDRV_SECTOR_SIZE;
        len = MIN(MAX(len, 0), DISK_MAX_SIZE);
        start = ROUND_DOWN(len, MAX(r->align, BDRV_SECTOR_SIZE));
    }

    lock_range(u, start, DISK_MAX_SIZE + 1 - start, true);
    if (gate_enter(r)) {
        ret = blk_co_truncate(r->t->blk, len, false, PREALLOC_MODE_OFF, 0,
                              NULL);
        gate_leave(r);
        if (succeeded(u, ret)) {
            QEMU_LOCK_GUARD(&r->lock);
            memset(r->t->shadow + len, 0, DISK_MAX_SIZE - len);
            r->min_len = r->max_len = len;
            r->nb_truncates++;
        }
    }
    lock_drop(u);
}

static void coroutine_fn op_read(User *u)
{
    Extent e = somewhere(u, 100 * KiB);
    g_autofree uint8_t *buf = g_malloc(e.bytes);
    QEMUIOVector qiov;
    int ret;

    random_qiov(u, &qiov, buf, e.bytes);
    lock_range(u, e.offset, e.bytes, false);
    ret = blk_co_preadv(u->r->t->blk, e.offset, e.bytes, &qiov, 0);
    if (succeeded(u, ret)) {
        assert_bytes(buf, u->r->t->shadow + e.offset, e.offset, e.bytes,
                     "read");
    }
    lock_drop(u);
    qemu_iovec_destroy(&qiov);
}

/* Check one answer, and go on after it; 0: there is no more */
static int64_t coroutine_fn check_status(User *u, Extent e)
{
    static const uint8_t zeroes[DISK_MAX_SIZE];
    RandomTest *r = u->r;
    Disk *d = r->t->disk;
    const uint8_t *shadow = r->t->shadow + e.offset;
    BlockDriverState *file;
    int64_t min_len, pnum, map;
    unsigned nb_truncates;
    int ret;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        min_len = r->min_len;
        nb_truncates = r->nb_truncates;
    }
    ret = blk_co_block_status_above(r->t->blk, NULL, e.offset, e.bytes,
                                    &pnum, &map, &file);
    if (!succeeded(u, ret)) {
        return 0;
    }
    g_assert_cmpint(pnum, <=, e.bytes);
    if (ret & BDRV_BLOCK_EOF) {
        WITH_QEMU_LOCK_GUARD(&r->lock) {
            if (nb_truncates == r->nb_truncates) {
                g_assert_cmpint(e.offset + pnum, >=, min_len);
            }
        }
        if (pnum == 0) {
            assert_bytes(zeroes, shadow, e.offset, e.bytes, "after the end");
        }
    } else {
        g_assert_cmpint(pnum, >, 0);
        g_assert(ret & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO));
    }
    if (ret & BDRV_BLOCK_ZERO) {
        assert_bytes(zeroes, shadow, e.offset, pnum, "status zero");
    }
    if (ret & BDRV_BLOCK_OFFSET_VALID) {
        g_assert(file == r->t->disk_bs);
        g_assert_cmpint(map, ==, e.offset);

        QEMU_LOCK_GUARD(&d->lock);
        assert_bytes(d->data + map, shadow, map, pnum, "status with offset");
    }
    return pnum;
}

static void coroutine_fn op_status(User *u)
{
    RandomTest *r = u->r;
    Extent e = somewhere(u, 100 * KiB);
    int64_t n;

    lock_range(u, e.offset, e.bytes, false);
    if (gate_enter(r)) {
        do {
            n = check_status(u, e);
            e.offset += n;
            e.bytes -= n;
        } while (n && e.bytes);
        gate_leave(r);
    }
    lock_drop(u);
}

/* What was not changed during a flush is on stable storage after it */
static void coroutine_fn op_flush(User *u)
{
    RandomTest *r = u->r;
    Disk *d = r->t->disk;
    g_autofree unsigned *version = g_new(unsigned, NB_SECTORS);
    g_autofree unsigned *busy = g_new0(unsigned, NB_SECTORS);
    Lock *lock;
    int64_t i;

    lock_take(u);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        memcpy(version, r->version, sizeof(r->version));
    }
    if (!succeeded(u, blk_co_flush(r->t->blk))) {
        lock_drop(u);
        return;
    }

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        QTAILQ_FOREACH(lock, &r->locks, next) {
            if (lock->granted) {
                lock_count_sectors(lock, busy);
            }
        }

        QEMU_LOCK_GUARD(&d->lock);
        for (i = 0; i < NB_SECTORS; i++) {
            int64_t offset = i * BDRV_SECTOR_SIZE;

            if (version[i] == r->version[i] && !busy[i]) {
                assert_bytes(d->stable + offset, r->t->shadow + offset, offset,
                             BDRV_SECTOR_SIZE, "flush");
                r->nb_checked++;
            }
        }
    }
    lock_drop(u);
}

/* With everything locked: all bytes, the length, and all bytes on the disk */
static void coroutine_fn op_all(User *u)
{
    RandomTest *r = u->r;
    SeqCacheTest *t = r->t;
    g_autofree uint8_t *buf = g_malloc(DISK_MAX_SIZE);
    int64_t len;
    int ret;

    lock_range(u, 0, DISK_MAX_SIZE + 1, true);

    len = blk_co_getlength(t->blk);
    g_assert_cmpint(len, >=, r->min_len);
    g_assert_cmpint(len, <=, r->max_len);

    ret = blk_co_pread(t->blk, 0, DISK_MAX_SIZE, buf, 0);
    if (succeeded(u, ret)) {
        assert_bytes(buf, t->shadow, 0, DISK_MAX_SIZE, "read of all");
    }

    ret = blk_co_flush(t->blk);
    if (succeeded(u, ret)) {
        QEMU_LOCK_GUARD(&t->disk->lock);
        assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
        assert_bytes(t->disk->stable, t->shadow, 0, DISK_MAX_SIZE, "stable");
        len = ROUND_UP(t->disk->len, BDRV_SECTOR_SIZE);
        g_assert_cmpint(len, >=, r->min_len);
        g_assert_cmpint(len, <=, r->max_len);
    }
    lock_drop(u);
}

static const struct {
    void coroutine_fn (*fn)(User *u);
    unsigned weight;
} ops[] = {
    { op_stream, 380 }, { op_write, 140 }, { op_read, 150 },
    { op_status, 80 }, { op_fua, 40 }, { op_zero, 40 }, { op_discard, 40 },
    { op_flush, 30 }, { op_copy, 30 }, { op_compressed, 20 },
    { op_truncate, 10 }, { op_all, 3 },
};

/* Returns: -1 if all operations are done or being done */
static int choose_op(User *u)
{
    RandomTest *r = u->r;
    unsigned i, total = 0;
    int64_t x;

    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        total += ops[i].weight;
    }
    for (i = 0, x = below(u, total); x >= ops[i].weight; i++) {
        x -= ops[i].weight;
    }

    QEMU_LOCK_GUARD(&r->lock);

    if (!r->nb_left) {
        r->nb_users--;
        return -1;
    }
    r->nb_left--;
    r->nb_done[i]++;
    return i;
}

static void coroutine_fn user_entry(void *opaque)
{
    User *u = opaque;
    int i;

    while ((i = choose_op(u)) >= 0) {
        ops[i].fn(u);
        if (below(u, 4) == 0) {
            co_hop();
        }
    }
}

/* ---- What the main loop does meanwhile ---- */

static void close_gate(RandomTest *r)
{
    bool closed;

    do {
        WITH_QEMU_LOCK_GUARD(&r->lock) {
            r->gate = true;
            closed = !r->nb_gated;
        }
        aio_poll(qemu_get_aio_context(), false);
    } while (!closed);
}

static void open_gate(RandomTest *r)
{
    QEMU_LOCK_GUARD(&r->lock);
    r->gate = false;
}

static void event_reopen(RandomTest *r, GRand *rand)
{
    int64_t cluster_size = MAX(r->align, 512) << g_rand_int_range(rand, 0, 6);
    int64_t cache_size = cluster_size * g_rand_int_range(rand, 2, 20);
    unsigned nb_bad;
    bool bad;
    int ret;

    close_gate(r);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        bad = r->bad;
        nb_bad = r->nb_bad;
    }
    ret = seqcache_reopen(r->t, cluster_size, cache_size);
    WITH_QEMU_LOCK_GUARD(&r->lock) {
        g_assert(ret == 0 || bad || nb_bad != r->nb_bad);
    }
    open_gate(r);
    if (ret == 0) {
        g_assert_cmpint(seqcache_stats(r->t).cache_size, ==, cache_size);
    }
}

static void event_drain(RandomTest *r)
{
    Disk *d = r->t->disk;

    close_gate(r);
    bdrv_drained_begin(r->t->bs);
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        g_assert_cmpuint(d->nb_in_flight, ==, 0);
    }
    bdrv_drained_end(r->t->bs);
    open_gate(r);
}

static void event_bad(RandomTest *r, GRand *rand)
{
    bool bad;

    WITH_QEMU_LOCK_GUARD(&r->lock) {
        bad = !r->bad;
        r->nb_bad++;
        r->bad = true;
    }
    disk_set_percent_bad(r->t->disk, bad ? g_rand_int_range(rand, 5, 50) : 0);
    if (!bad) {
        /* What is in flight may have failed already */
        event_drain(r);
        QEMU_LOCK_GUARD(&r->lock);
        r->bad = false;
    }
}

typedef struct RandomCase {
    const char *name;
    SeqCacheConfig config;
    bool errors;
    bool threads;
} RandomCase;

static bool random_is_done(RandomTest *r)
{
    QEMU_LOCK_GUARD(&r->lock);
    return !r->nb_users;
}

static void random_events(RandomTest *r, const RandomCase *c, GRand *rand)
{
    while (!random_is_done(r)) {
        aio_poll(qemu_get_aio_context(), false);
        if (c->threads) {
            g_usleep(100);
        }
        switch (g_rand_int_range(rand, 0, 2000)) {
        case 0:
            event_reopen(r, rand);
            break;
        case 1 ... 2:
            event_drain(r);
            break;
        case 3 ... 6:
            if (c->errors) {
                event_bad(r, rand);
            }
            break;
        case 7:
            bdrv_graph_wrlock();
            bdrv_graph_wrunlock();
            break;
        }
    }
}

static void test_random(SeqCacheTest *t, gconstpointer opaque)
{
    const RandomCase *c = opaque;
    RandomTest r = {
        .t = t,
        .align = c->config.disk.align ?: 1,
        .min_len = c->config.disk.len,
        .max_len = c->config.disk.len,
        .nb_left = nb_ops / NB_CASES + 1,
        .nb_users = NB_USERS,
    };
    User users[NB_USERS];
    IOThread *iothreads[2];
    unsigned seed = g_test_rand_int();
    GRand *rand = g_rand_new_with_seed(seed);
    BlockStatsWriteBehind stats;
    unsigned i;

    qemu_mutex_init(&r.lock);
    qemu_co_queue_init(&r.waiters);
    QTAILQ_INIT(&r.locks);
    t->disk->max_hops = 4;
    t->disk->percent_unsupported = 20;
    g_rand_set_seed(t->disk->rand, seed);

    for (i = 0; c->threads && i < ARRAY_SIZE(iothreads); i++) {
        iothreads[i] = iothread_new();
    }
    for (i = 0; i < NB_USERS; i++) {
        users[i] = (User) {
            .r = &r,
            .rand = g_rand_new_with_seed(g_rand_int(rand)),
        };
        users[i].pos[0] = users[i].pos[1] = DISK_MAX_SIZE;
        aio_co_enter(c->threads ? iothread_get_aio_context(iothreads[i % 2]) :
                                  qemu_get_aio_context(),
                     qemu_coroutine_create(user_entry, &users[i]));
    }
    random_events(&r, c, rand);

    /* Nothing that was accepted is lost */
    disk_set_percent_bad(t->disk, 0);
    bdrv_drained_begin(t->bs);
    bdrv_drained_end(t->bs);
    for (i = 0; c->threads && i < ARRAY_SIZE(iothreads); i++) {
        iothread_join(iothreads[i]);
    }

    g_test_message("flushes checked %u sectors, %u requests failed",
                   r.nb_checked, r.nb_failed);
    stats = seqcache_stats(t);
    g_assert_cmpint(stats.cached_bytes, <=, stats.cache_size);
    check_all(t);

    /* It was a test */
    for (i = 0; i < ARRAY_SIZE(ops); i++) {
        g_assert(r.nb_done[i] > 0 || nb_ops < 20000);
    }
    g_assert(r.nb_checked > 0 || nb_ops < 20000);

    for (i = 0; i < NB_USERS; i++) {
        g_rand_free(users[i].rand);
    }
    g_rand_free(rand);
    qemu_mutex_destroy(&r.lock);
}

static const RandomCase cases[NB_CASES] = {
    { "align-1", {
        .cluster_size = 4 * KiB, .cache_size = 64 * KiB,
        .disk = { .len = 300 * KiB } } },
    { "align-512", {
        .cluster_size = 64 * KiB, .cache_size = 512 * KiB,
        .disk = { .align = 512, .len = 1 * MiB } } },
    { "align-4096", {
        .cluster_size = 16 * KiB, .cache_size = 256 * KiB,
        .disk = { .align = 4096, .len = 200 * KiB, .no_flags = true } } },
    { "small-cache", {
        .cluster_size = 512, .cache_size = 1 * KiB,
        .disk = { .align = 512, .len = 512 * KiB } } },
    { "small-requests", {
        .cluster_size = 4 * KiB, .cache_size = 128 * KiB,
        .disk = { .align = 512, .max_transfer = 8 * KiB } } },
    { "errors", {
        .cluster_size = 4 * KiB, .cache_size = 64 * KiB,
        .disk = { .align = 512, .len = 300 * KiB } },
      .errors = true },
    { "errors-align-4096", {
        .cluster_size = 8 * KiB, .cache_size = 32 * KiB,
        .disk = { .align = 4096, .len = 100 * KiB, .no_flags = true } },
      .errors = true },
    { "iothreads", {
        .cluster_size = 8 * KiB, .cache_size = 128 * KiB,
        .disk = { .align = 512, .len = 300 * KiB } },
      .threads = true },
    { "iothreads-errors", {
        .cluster_size = 4 * KiB, .cache_size = 64 * KiB,
        .disk = { .align = 4096, .len = 300 * KiB } },
      .errors = true, .threads = true },
};

static void set_up(SeqCacheTest *t, gconstpointer opaque)
{
    const RandomCase *c = opaque;

    seqcache_set_up(t, &c->config);
}

static void tear_down(SeqCacheTest *t, gconstpointer opaque)
{
    seqcache_tear_down(t);
}

int main(int argc, char **argv)
{
    const char *env = g_getenv("TEST_SEQCACHE_OPS");
    size_t i;

    disk_test_init(&argc, &argv);

    g_assert(!env || qemu_strtoui(env, NULL, 0, &nb_ops) == 0);

    for (i = 0; i < NB_CASES; i++) {
        g_autofree char *path = g_strdup_printf("/seqcache-filter/random/%s",
                                                cases[i].name);

        g_test_add(path, SeqCacheTest, &cases[i], set_up, test_random,
                   tear_down);
    }
    return g_test_run();
}
