/*
 * A disk in memory below a seqcache node, for its tests
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The disk asserts what the block layer promises its drivers, and that what is
 * being changed is not changed a second time meanwhile.  It knows what would
 * survive a power cut, and can hold, delay and fail requests.  A request that
 * fails may have been done in part.
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/seqcache-compat.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/units.h"
#include "system/block-backend.h"
#include "seqcache-disk.h"

static int disk_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    Disk *d = bs->opaque;

    qemu_mutex_init(&d->lock);
    qemu_co_queue_init(&d->held);
    QLIST_INIT(&d->changes);
    d->data = g_malloc0(DISK_MAX_SIZE);
    d->stable = g_malloc0(DISK_MAX_SIZE);
    d->mapped = g_new0(bool, DISK_MAX_SIZE / BDRV_SECTOR_SIZE);
    d->rand = g_rand_new_with_seed(1);
    d->unstable_start = DISK_MAX_SIZE;

    d->len = qdict_get_int(options, "len");
    d->align = qdict_get_int(options, "align");
    d->max_transfer = qdict_get_int(options, "max-transfer");
    if (qdict_get_bool(options, "flags")) {
        bs->supported_write_flags = BDRV_REQ_FUA;
        bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;
    }
    bs->supported_zero_flags = bs->supported_write_flags |
                               BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
    qdict_del(options, "len");
    qdict_del(options, "align");
    qdict_del(options, "max-transfer");
    qdict_del(options, "flags");
    return 0;
}

static void disk_close(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    g_assert_cmpuint(d->nb_in_flight, ==, 0);
    g_rand_free(d->rand);
    g_free(d->mapped);
    g_free(d->stable);
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
    Disk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    return d->len;
}

void coroutine_fn co_hop(void)
{
    aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
    qemu_coroutine_yield();
}

void coroutine_fn disk_delay_locked(Disk *d)
{
    unsigned hops = g_rand_int_range(d->rand, 0, d->max_hops + 1);

    qemu_mutex_unlock(&d->lock);
    while (hops--) {
        co_hop();
    }
    qemu_mutex_lock(&d->lock);
}

/* Called with d->lock held */
static bool disk_chance_locked(Disk *d, unsigned percent)
{
    return g_rand_int_range(d->rand, 0, 100) < percent;
}

int disk_result_locked(Disk *d, unsigned kind)
{
    DiskFault *f = &d->fault;

    if (f->kinds & kind) {
        d->nb_faultable++;
        if (f->first && (d->nb_faultable == f->first ||
                         (f->lasting && d->nb_faultable > f->first))) {
            d->nb_faults++;
            return -f->error;
        }
    }
    if (d->error && kind != DISK_READ && kind != DISK_STATUS) {
        return -d->error;
    }
    return !d->error && kind != DISK_STATUS &&
           disk_chance_locked(d, d->percent_bad) ? -EIO : 0;
}

/* Called with d->lock held */
static void disk_change_begin_locked(Disk *d, DiskChange *c)
{
    DiskChange *other;

    QLIST_FOREACH(other, &d->changes, next) {
        g_assert(d->overlap || other->offset >= c->offset + c->bytes ||
                 c->offset >= other->offset + other->bytes);
    }
    QLIST_INSERT_HEAD(&d->changes, c, next);
    d->nb_in_flight++;

    if (d->hold) {
        d->nb_held++;
        qemu_co_queue_wait(&d->held, &d->lock);
        d->nb_held--;
    }
}

/* Called with d->lock held */
static void disk_change_end_locked(Disk *d, DiskChange *c)
{
    QLIST_REMOVE(c, next);
    d->nb_in_flight--;
}

/* Do a part of a change.  Called with d->lock held. */
static void disk_store_locked(Disk *d, const DiskChange *c, int64_t start,
                              int64_t bytes)
{
    int64_t offset = c->offset + start;
    int64_t end = offset + bytes;
    int64_t i;

    if (!bytes) {
        return;
    }
    g_assert_cmpint(end, <=, DISK_MAX_SIZE);
    if (c->src) {
        memmove(d->data + offset, c->src + start, bytes);
    } else {
        memset(d->data + offset, 0, bytes);
    }
    d->unstable_start = MIN(d->unstable_start, offset);
    d->unstable_end = MAX(d->unstable_end, end);

    /* Sectors that are unmapped in part stay mapped */
    for (i = offset / BDRV_SECTOR_SIZE; i * BDRV_SECTOR_SIZE < end; i++) {
        if (!c->unmap) {
            d->mapped[i] = true;
        } else if (i * BDRV_SECTOR_SIZE >= offset &&
                   (i + 1) * BDRV_SECTOR_SIZE <= end) {
            d->mapped[i] = false;
        }
    }
}

/*
 * Change the disk in two steps.  A request that fails does the first one at
 * most.
 */
static int coroutine_fn disk_co_store(Disk *d, DiskChange *c)
{
    int64_t n;
    int ret;

    g_assert(QEMU_IS_ALIGNED(c->offset | c->bytes, d->align));

    QEMU_LOCK_GUARD(&d->lock);

    disk_change_begin_locked(d, c);
    if (c->can_refuse && disk_chance_locked(d, d->percent_unsupported)) {
        disk_change_end_locked(d, c);
        return -ENOTSUP;
    }
    /* It does not grow before it is clear that it will */
    n = g_rand_int_range(d->rand, 0, c->bytes + 1);
    if (d->fault.first) {
        n = d->fault.whole ? n % 2 * c->bytes : QEMU_ALIGN_DOWN(n, d->align);
        n = d->fault.dead && d->nb_faults ? 0 : n;
    }
    n = MIN(n, MAX(d->len - c->offset, 0));
    disk_store_locked(d, c, 0, n);
    disk_delay_locked(d);

    ret = disk_result_locked(d, c->kind);
    if (ret == 0) {
        disk_store_locked(d, c, n, c->bytes - n);
        if (c->can_grow) {
            d->len = MAX(d->len, c->offset + c->bytes);
        }
        if (c->fua) {
            memcpy(d->stable + c->offset, d->data + c->offset, c->bytes);
        }
        while (d->hold_after && c->kind == DISK_WRITE) {
            d->nb_held++;
            qemu_co_queue_wait(&d->held, &d->lock);
            d->nb_held--;
        }
    }
    disk_change_end_locked(d, c);
    return ret;
}

static int coroutine_fn disk_co_preadv(BlockDriverState *bs, int64_t offset,
                                       int64_t bytes, QEMUIOVector *qiov,
                                       BdrvRequestFlags flags)
{
    Disk *d = bs->opaque;
    int64_t n;
    int ret;

    g_assert(QEMU_IS_ALIGNED(offset | bytes, d->align));

    QEMU_LOCK_GUARD(&d->lock);

    d->nb.reads++;
    d->nb_in_flight++;
    n = g_rand_int_range(d->rand, 0, bytes + 1);
    qemu_iovec_from_buf(qiov, 0, d->data + offset, n);
    disk_delay_locked(d);
    qemu_iovec_from_buf(qiov, n, d->data + offset + n, bytes - n);
    ret = disk_result_locked(d, DISK_READ);
    d->nb_in_flight--;
    return ret;
}

/* Called with d->lock held */
static void *disk_new_write_locked(Disk *d, QEMUIOVector *qiov)
{
    uint8_t *buf = g_malloc(qiov->size);

    d->last_write = qiov->iov[0].iov_base;
    qemu_iovec_to_buf(qiov, 0, buf, qiov->size);
    return buf;
}

static int coroutine_fn disk_co_pwritev(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        BdrvRequestFlags flags)
{
    Disk *d = bs->opaque;
    g_autofree uint8_t *begin = NULL;
    g_autofree uint8_t *end = g_malloc(bytes);
    DiskChange c = {
        .offset = offset, .bytes = bytes, .kind = DISK_WRITE,
        .fua = flags & BDRV_REQ_FUA, .can_grow = true,
    };
    int ret;

    g_assert(!d->max_transfer || bytes <= d->max_transfer);
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        d->nb.writes++;
        c.src = begin = disk_new_write_locked(d, qiov);
    }
    ret = disk_co_store(d, &c);

    /* The data must be valid and constant until the request is done */
    qemu_iovec_to_buf(qiov, 0, end, bytes);
    g_assert(!memcmp(begin, end, bytes));
    return ret;
}

static int coroutine_fn disk_co_pwritev_compressed(BlockDriverState *bs,
                                                   int64_t offset,
                                                   int64_t bytes,
                                                   QEMUIOVector *qiov)
{
    Disk *d = bs->opaque;
    g_autofree uint8_t *buf = NULL;
    DiskChange c = {
        .offset = offset, .bytes = bytes, .kind = DISK_WRITE, .can_grow = true,
    };

    WITH_QEMU_LOCK_GUARD(&d->lock) {
        d->nb.compressed++;
        c.src = buf = disk_new_write_locked(d, qiov);
    }
    return disk_co_store(d, &c);
}

static int coroutine_fn disk_co_pwrite_zeroes(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes,
                                              BdrvRequestFlags flags)
{
    Disk *d = bs->opaque;
    DiskChange c = {
        .offset = offset, .bytes = bytes, .kind = DISK_ZERO,
        .fua = flags & BDRV_REQ_FUA,
        .unmap = flags & BDRV_REQ_MAY_UNMAP, .can_refuse = true,
        .can_grow = true,
    };

    WITH_QEMU_LOCK_GUARD(&d->lock) {
        d->nb.zeroes++;
    }
    return disk_co_store(d, &c);
}

/* Whole blocks become zero */
static int coroutine_fn disk_co_pdiscard(BlockDriverState *bs, int64_t offset,
                                         int64_t bytes)
{
    Disk *d = bs->opaque;
    DiskChange c = {
        .offset = offset, .bytes = bytes, .kind = DISK_DISCARD, .unmap = true,
    };

    if (!QEMU_IS_ALIGNED(offset | bytes, d->align)) {
        return -ENOTSUP;
    }
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        d->nb.discards++;
    }
    return disk_co_store(d, &c);
}

static int coroutine_fn GRAPH_RDLOCK
disk_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                        int64_t bytes, BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags)
{
    return bdrv_co_copy_range_to(src, src_offset, dst, dst_offset, bytes,
                                 read_flags, write_flags);
}

/* Only inside of one disk */
static int coroutine_fn GRAPH_RDLOCK
disk_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                      int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                      int64_t bytes, BdrvRequestFlags read_flags,
                      BdrvRequestFlags write_flags)
{
    Disk *d = bs->opaque;
    DiskChange c = {
        .offset = dst_offset, .bytes = bytes, .kind = DISK_WRITE,
        .src = d->data + src_offset, .can_refuse = true, .can_grow = true,
    };

    g_assert(src->bs == bs && dst->bs == bs);
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        d->nb.copies++;
    }
    return disk_co_store(d, &c);
}

static int coroutine_fn GRAPH_RDLOCK
disk_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                 PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    Disk *d = bs->opaque;
    DiskChange c = {
        .offset = offset, .bytes = DISK_MAX_SIZE, .unmap = true,
    };
    int ret;

    QEMU_LOCK_GUARD(&d->lock);

    d->nb.truncates++;
    d->truncate_flags = flags;
    disk_change_begin_locked(d, &c);
    disk_delay_locked(d);
    ret = offset > DISK_MAX_SIZE ? -EFBIG :
          disk_result_locked(d, DISK_TRUNCATE);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot truncate disk");
    } else {
        disk_store_locked(d, &c, 0, MAX(d->len - offset, 0));
        d->len = offset;
    }
    disk_change_end_locked(d, &c);
    return ret;
}

static int coroutine_fn disk_co_flush(BlockDriverState *bs)
{
    Disk *d = bs->opaque;
    int ret;

    QEMU_LOCK_GUARD(&d->lock);

    d->nb.flushes++;
    ret = disk_result_locked(d, DISK_FLUSH);
    if (ret == 0 && d->unstable_start < d->unstable_end) {
        memcpy(d->stable + d->unstable_start, d->data + d->unstable_start,
               d->unstable_end - d->unstable_start);
        d->unstable_start = DISK_MAX_SIZE;
        d->unstable_end = 0;
    }
    d->nb_in_flight++;
    disk_delay_locked(d);
    d->nb_in_flight--;
    return ret;
}

int disk_flags_locked(Disk *d, int64_t offset)
{
    int64_t block = MAX(d->align, BDRV_SECTOR_SIZE);
    int64_t start = QEMU_ALIGN_DOWN(offset, block);
    bool any = false;

    for (int64_t i = start; i < MIN(start + block, DISK_MAX_SIZE);
         i += BDRV_SECTOR_SIZE) {
        any |= d->mapped[i / BDRV_SECTOR_SIZE];
    }
    return (any ? BDRV_BLOCK_DATA : BDRV_BLOCK_ZERO) | BDRV_BLOCK_OFFSET_VALID;
}

int coroutine_fn disk_co_block_status(BlockDriverState *bs,
                                      BdrvStatusMode mode,
                                      int64_t offset, int64_t bytes,
                                      int64_t *pnum,
                                      int64_t *map,
                                      BlockDriverState **file)
{
    Disk *d = bs->opaque;
    int64_t block = MAX(d->align, BDRV_SECTOR_SIZE);
    int64_t end = offset + bytes;
    int64_t pos = QEMU_ALIGN_DOWN(offset, block);
    int flags, ret;

    QEMU_LOCK_GUARD(&d->lock);

    disk_delay_locked(d);
    ret = disk_result_locked(d, DISK_STATUS);
    if (ret < 0) {
        return ret;
    }
    if (d->max_hops) {
        end = MIN(end, pos + block * g_rand_int_range(d->rand, 1, 65));
    }
    flags = disk_flags_locked(d, pos);
    do {
        pos += block;
    } while (pos < end && disk_flags_locked(d, pos) == flags);
    *pnum = MIN(pos, offset + bytes) - offset;
    *map = offset;
    *file = bs;
    return flags;
}

static void disk_cancel_in_flight(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    d->nb_cancels++;
}

BlockDriver bdrv_disk = {
    .format_name                = "seqcache-test-disk",
    .instance_size              = sizeof(Disk),
    .bdrv_cancel_in_flight      = disk_cancel_in_flight,
    .bdrv_open                  = disk_open,
    .bdrv_close                 = disk_close,
    .bdrv_child_perm            = bdrv_default_perms,
    .bdrv_refresh_limits        = disk_refresh_limits,
    .bdrv_co_getlength          = disk_co_getlength,
    .bdrv_co_preadv             = disk_co_preadv,
    .bdrv_co_pwritev            = disk_co_pwritev,
    .bdrv_co_pwritev_compressed = disk_co_pwritev_compressed,
    .bdrv_co_pwrite_zeroes      = disk_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = disk_co_pdiscard,
    .bdrv_co_copy_range_from    = disk_co_copy_range_from,
    .bdrv_co_copy_range_to      = disk_co_copy_range_to,
    .bdrv_co_truncate           = disk_co_truncate,
    .bdrv_co_flush_to_disk      = disk_co_flush,
    .bdrv_co_block_status       = disk_co_block_status,
};

void disk_set_hold(Disk *d, bool hold)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->hold = hold;
    if (!hold) {
        qemu_co_enter_all(&d->held, &d->lock);
    }
}

void disk_set_error(Disk *d, int error)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->error = error;
}

void disk_set_fault(Disk *d, DiskFault fault)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->fault = fault;
    d->nb_faultable = 0;
    d->nb_faults = 0;
}

void disk_reset_counts(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    memset(&d->nb, 0, sizeof(d->nb));
}

void disk_set_percent_bad(Disk *d, unsigned percent)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->percent_bad = percent;
}

SeqCacheTest *seqcache_test_new(const SeqCacheConfig *config)
{
    SeqCacheTest *t = g_new0(SeqCacheTest, 1);
    QDict *opts = qdict_new();

    qdict_put_int(opts, "len", config->len);
    qdict_put_int(opts, "align", config->align ?: 1);
    qdict_put_int(opts, "max-transfer", config->max_transfer);
    qdict_put_bool(opts, "flags", !config->no_flags);
    t->disk_bs = bdrv_new_open_driver_opts(&bdrv_disk, "disk", opts,
                                           BDRV_O_RDWR | BDRV_O_UNMAP,
                                           &error_abort);
    t->disk = t->disk_bs->opaque;

    opts = qdict_new();
    qdict_put_str(opts, "driver", "seqcache");
    qdict_put_str(opts, "node-name", "cache");
    qdict_put_str(opts, "file", "disk");
    qdict_put_int(opts, "cluster-size", config->cluster_size);
    qdict_put_int(opts, "cache-size", config->cache_size);
    t->bs = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR | BDRV_O_UNMAP,
                      &error_abort);

    t->blk = blk_new(qemu_get_aio_context(), TEST_PERMS, BLK_PERM_ALL);
    blk_insert_bs(t->blk, t->bs, &error_abort);
    blk_set_allow_write_beyond_eof(t->blk, true);

    t->shadow = g_malloc0(DISK_MAX_SIZE);
    return t;
}

void seqcache_test_free(SeqCacheTest *t)
{
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t->shadow);
    g_free(t);
}

void assert_bytes(const uint8_t *found, const uint8_t *expected,
                  int64_t offset, int64_t bytes, const char *what)
{
    int64_t i;

    if (!memcmp(found, expected, bytes)) {
        return;
    }
    for (i = 0; found[i] == expected[i]; i++) {
        /* Look for the first difference */
    }
    g_error("%s: byte %" PRId64 " is %02x but should be %02x", what,
            offset + i, found[i], expected[i]);
}

int64_t stat_cached_bytes(SeqCacheTest *t)
{
    BlockStatsSpecific *stats = bdrv_get_specific_stats(t->bs);
    int64_t bytes = stats->u.seqcache.cached_bytes;

    qapi_free_BlockStatsSpecific(stats);
    return bytes;
}

int seqcache_test_reopen(SeqCacheTest *t, int64_t cluster_size,
                         int64_t cache_size)
{
    QDict *opts = qdict_new();

    qdict_put_int(opts, "cluster-size", cluster_size);
    qdict_put_int(opts, "cache-size", cache_size);
    return bdrv_reopen(t->bs, opts, true, NULL);
}

void settle(void)
{
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* There may be more */
    }
}

void read_ok(SeqCacheTest *t, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    g_assert_cmpint(blk_pread(t->blk, offset, bytes, buf, 0), ==, 0);
    assert_bytes(buf, t->shadow + offset, offset, bytes, "read");
}

void flush_ok(SeqCacheTest *t)
{
    g_assert_cmpint(blk_flush(t->blk), ==, 0);
}

void check_all(SeqCacheTest *t)
{
    read_ok(t, 0, DISK_MAX_SIZE);
    flush_ok(t);
    read_ok(t, 0, DISK_MAX_SIZE);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    assert_bytes(t->disk->stable, t->shadow, 0, DISK_MAX_SIZE, "stable");
}
