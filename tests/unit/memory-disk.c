/*
 * A disk in memory, for tests of what is above it
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "memory-disk.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"

static int disk_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    const DiskConfig *config =
        (const DiskConfig *)(uintptr_t)qdict_get_int(options, "config");
    Disk *d = bs->opaque;

    qdict_del(options, "config");
    d->config = *config;
    d->config.max_len = config->max_len ?: DISK_MAX_SIZE;
    d->config.align = config->align ?: 1;
    d->len = config->len;
    d->grain = 1;

    qemu_mutex_init(&d->lock);
    qemu_co_queue_init(&d->held);
    QLIST_INIT(&d->changes);
    d->data = g_malloc0(d->config.max_len);
    d->stable = g_malloc0(d->config.max_len);
    d->mapped = g_new0(bool, d->config.max_len / BDRV_SECTOR_SIZE);
    d->log = g_array_new(false, false, sizeof(DiskWrite));
    d->rand = g_rand_new_with_seed(1);
    d->unstable_start = d->config.max_len;

    if (!config->no_flags) {
        bs->supported_write_flags = BDRV_REQ_FUA;
        bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;
    }
    bs->supported_zero_flags = bs->supported_write_flags |
                               BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
    return 0;
}

static void disk_close(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    g_assert_cmpuint(d->nb_in_flight, ==, 0);
    g_rand_free(d->rand);
    g_array_unref(d->log);
    g_free(d->mapped);
    g_free(d->stable);
    g_free(d->data);
    qemu_mutex_destroy(&d->lock);
}

static void disk_refresh_limits(BlockDriverState *bs, Error **errp)
{
    Disk *d = bs->opaque;

    bs->bl.request_alignment = d->config.align;
    bs->bl.max_transfer = d->config.max_transfer;
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

bool disk_chance_locked(Disk *d, unsigned percent)
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

void coroutine_fn disk_wait_locked(Disk *d, const unsigned *hold,
                                   unsigned kind)
{
    d->nb_held++;
    while (*hold & kind) {
        qemu_co_queue_wait(&d->held, &d->lock);
        if (d->release_one) {
            d->release_one = false;
            break;
        }
    }
    d->nb_held--;
}

/* What is being changed must not be changed by @c.  d->lock is held. */
static void disk_assert_free_locked(Disk *d, const DiskChange *c)
{
    DiskChange *other;

    QLIST_FOREACH(other, &d->changes, next) {
        g_assert(d->overlap || other->offset >= c->offset + c->bytes ||
                 c->offset >= other->offset + other->bytes);
    }
}

/* Called with d->lock held */
static void coroutine_fn disk_change_begin_locked(Disk *d, DiskChange *c)
{
    disk_assert_free_locked(d, c);
    QLIST_INSERT_HEAD(&d->changes, c, next);
    d->nb_in_flight++;
    d->max_in_flight = MAX(d->max_in_flight, d->nb_in_flight);
    disk_wait_locked(d, &d->hold, c->kind);
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
    g_assert_cmpint(end, <=, d->config.max_len);
    if (d->changed) {
        d->changed(d, c, start, bytes);
    }
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
    int64_t align = d->config.align;
    int64_t n;
    int ret;

    g_assert(c->unaligned || QEMU_IS_ALIGNED(c->offset | c->bytes, align));

    QEMU_LOCK_GUARD(&d->lock);

    disk_change_begin_locked(d, c);
    if (c->can_refuse && disk_chance_locked(d, d->percent_unsupported)) {
        disk_change_end_locked(d, c);
        return -ENOTSUP;
    }
    /* It does not grow before it is clear that it will */
    n = g_rand_int_range(d->rand, 0, c->bytes + 1);
    if (d->fault.first) {
        n = d->fault.whole ? n % 2 * c->bytes : QEMU_ALIGN_DOWN(n, align);
        n = d->fault.dead && d->nb_faults ? 0 : n;
    }
    n = MAX(QEMU_ALIGN_DOWN(c->offset + n, d->grain) - c->offset, 0);
    n = MIN(n, MAX(d->len - c->offset, 0));
    disk_store_locked(d, c, 0, n);
    disk_delay_locked(d);

    ret = disk_result_locked(d, c->kind);
    if (ret == 0) {
        disk_store_locked(d, c, n, c->bytes - n);
    }
    if (d->changed) {
        d->changed(d, c, c->bytes, 0);
    }
    if (ret == 0) {
        if (c->can_grow) {
            d->len = MAX(d->len, c->offset + c->bytes);
        }
        if (c->fua) {
            memcpy(d->stable + c->offset, d->data + c->offset, c->bytes);
        }
        disk_wait_locked(d, &d->hold_after, c->kind);
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

    g_assert(QEMU_IS_ALIGNED(offset | bytes, d->config.align));

    QEMU_LOCK_GUARD(&d->lock);

    d->nb.reads++;
    d->nb_in_flight++;
    disk_wait_locked(d, &d->hold, DISK_READ);
    n = g_rand_int_range(d->rand, 0, bytes + 1);
    qemu_iovec_from_buf(qiov, 0, d->data + offset, n);
    disk_delay_locked(d);
    qemu_iovec_from_buf(qiov, n, d->data + offset + n, bytes - n);
    ret = disk_result_locked(d, DISK_READ);
    disk_wait_locked(d, &d->hold_after, DISK_READ);
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

    g_assert(!d->config.max_transfer || bytes <= d->config.max_transfer);
    WITH_QEMU_LOCK_GUARD(&d->lock) {
        DiskWrite w = { .offset = offset, .bytes = bytes };

        d->nb.writes++;
        g_array_append_val(d->log, w);
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

    if (!QEMU_IS_ALIGNED(offset | bytes, d->config.align)) {
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
        .unaligned = d->config.unaligned_copies,
    };

    g_assert(src->bs == bs && dst->bs == bs);
    g_assert(c.unaligned || QEMU_IS_ALIGNED(src_offset, d->config.align));
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
        .offset = offset, .bytes = d->config.max_len, .kind = DISK_TRUNCATE,
        .unmap = true,
    };
    int ret;

    QEMU_LOCK_GUARD(&d->lock);

    d->nb.truncates++;
    d->truncate_flags = flags;
    disk_change_begin_locked(d, &c);
    disk_delay_locked(d);
    ret = offset > d->config.max_len ? -EFBIG :
          disk_result_locked(d, DISK_TRUNCATE);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot truncate disk");
    } else {
        disk_store_locked(d, &c, 0, MAX(d->len - offset, 0));
        if (d->changed) {
            d->changed(d, &c, c.bytes, 0);
        }
        d->len = offset;
        disk_wait_locked(d, &d->hold_after, c.kind);
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
        d->unstable_start = d->config.max_len;
        d->unstable_end = 0;
    }
    d->nb_in_flight++;
    disk_delay_locked(d);
    d->nb_in_flight--;
    return ret;
}

int disk_flags_locked(Disk *d, int64_t offset)
{
    int64_t block = MAX(d->config.align, BDRV_SECTOR_SIZE);
    int64_t start = QEMU_ALIGN_DOWN(offset, block);
    bool any = false;

    for (int64_t i = start; i < MIN(start + block, d->config.max_len);
         i += BDRV_SECTOR_SIZE) {
        any |= d->mapped[i / BDRV_SECTOR_SIZE];
    }
    return (any ? BDRV_BLOCK_DATA : BDRV_BLOCK_ZERO) | BDRV_BLOCK_OFFSET_VALID;
}

/* Sometimes it tells no more than what is in the first few blocks */
static int coroutine_fn
disk_co_block_status(BlockDriverState *bs, BdrvStatusMode mode, int64_t offset,
                     int64_t bytes, int64_t *pnum, int64_t *map,
                     BlockDriverState **file)
{
    Disk *d = bs->opaque;
    int64_t block = MAX(d->config.align, BDRV_SECTOR_SIZE);
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
    .format_name                = "memory-disk",
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

BlockDriverState *disk_new(BlockDriver *drv, const char *name,
                           const void *config)
{
    QDict *opts = qdict_new();

    qdict_put_int(opts, "config", (uintptr_t)config);
    return bdrv_new_open_driver_opts(drv, name, opts,
                                     BDRV_O_RDWR | BDRV_O_UNMAP, &error_abort);
}

BlockBackend *user_new(BlockDriverState *bs)
{
    BlockBackend *blk = blk_new(qemu_get_aio_context(),
                                BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE |
                                BLK_PERM_WRITE_UNCHANGED | BLK_PERM_RESIZE,
                                BLK_PERM_ALL);

    blk_insert_bs(blk, bs, &error_abort);
    blk_set_allow_write_beyond_eof(blk, true);
    return blk;
}

void disk_replace(BlockDriverState *from, BlockDriverState *to)
{
    bdrv_drained_begin(from);
    bdrv_drained_begin(to);
    bdrv_graph_wrlock();
    bdrv_replace_node(from, to, &error_abort);
    bdrv_graph_wrunlock();
    bdrv_drained_end(to);
    bdrv_drained_end(from);
}

void disk_set_hold(Disk *d, unsigned kinds, DiskHold where)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->hold &= ~kinds;
    d->hold_after &= ~kinds;
    if (where == HOLD_BEFORE) {
        d->hold |= kinds;
    } else if (where == HOLD_AFTER) {
        d->hold_after |= kinds;
    }
}

void disk_wake(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    for (unsigned nb = d->nb_held; nb > 0; nb--) {
        qemu_co_enter_next(&d->held, &d->lock);
    }
}

void disk_hold(Disk *d)
{
    disk_set_hold(d, DISK_CHANGES, HOLD_BEFORE);
}

void disk_release(Disk *d)
{
    disk_set_hold(d, DISK_ALL, HOLD_NEVER);
    disk_wake(d);
}

static void disk_release_bh(void *opaque)
{
    disk_release(opaque);
}

void disk_release_later(Disk *d)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), disk_release_bh, d);
}

void disk_release_one(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->release_one = d->nb_held;
    qemu_co_enter_next(&d->held, &d->lock);
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

void disk_zero(Disk *d, int64_t offset, int64_t bytes)
{
    DiskChange c = { .offset = offset, .bytes = bytes, .unmap = true };

    QEMU_LOCK_GUARD(&d->lock);
    disk_assert_free_locked(d, &c);
    disk_store_locked(d, &c, 0, bytes);
}

void disk_set_limits(BlockDriverState *bs, uint32_t align,
                     uint32_t max_transfer)
{
    Disk *d = bs->opaque;

    d->config.align = align;
    d->config.max_transfer = max_transfer;

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    bdrv_refresh_limits(bs, NULL, &error_abort);
}

/* ---- Helpers ---- */

void disk_test_init(int *argc, char ***argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(argc, argv, NULL);
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

void settle(void)
{
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* There may be more */
    }
}
