/*
 * A disk that is nothing but block status, for tests of the cacheextents filter
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-extents.h"
#include "block/seqcache-compat.h"
#include "cacheextents-disk.h"
#include "qapi/error.h"
#include "qobject/qdict.h"

/* d->lock is held for all functions whose names say so */
static void disk_set_locked(Disk *d, int64_t block, int flags)
{
    Status *h = d->history[block];

    memmove(h, h + 1, (HISTORY - 1) * sizeof(*h));
    h[HISTORY - 1] = (Status) { .since = ++d->now, .flags = flags };
}

int64_t disk_unit(Disk *d)
{
    return MAX(d->config.align, BDRV_SECTOR_SIZE);
}

int64_t disk_max_len(Disk *d)
{
    return MAX_BLOCKS * d->config.grain;
}

/* A request has changed bytes; units that it has a part of count as a whole */
static void disk_note_change_locked(Disk *d, int64_t offset, int64_t bytes)
{
    int64_t end = MIN(offset + bytes, disk_max_len(d));

    d->now++;
    for (int64_t i = offset / disk_unit(d); i * disk_unit(d) < end; i++) {
        uint64_t *times = d->changes[i];

        memmove(times, times + 1, (CHANGES_KEPT - 1) * sizeof(*times));
        times[CHANGES_KEPT - 1] = d->now;
    }
}

static bool disk_chance(Disk *d, int percent)
{
    return d->config.random && g_rand_int_range(d->rand, 0, 100) < percent;
}

static void coroutine_fn disk_hop_locked(Disk *d)
{
    while (disk_chance(d, 40)) {
        qemu_mutex_unlock(&d->lock);
        aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
        qemu_coroutine_yield();
        qemu_mutex_lock(&d->lock);
    }
}

static void coroutine_fn disk_wait_locked(Disk *d, int kind, int where)
{
    while (d->hold[kind] == where) {
        d->nb_held++;
        qemu_co_queue_wait(&d->held[kind], &d->lock);
        d->nb_held--;
    }
    disk_hop_locked(d);
}

/* ---- Queries ---- */

/* The extent that begins at @offset, at most to @end */
static BdrvBlockExtent disk_extent_locked(Disk *d, int64_t offset, int64_t end)
{
    int64_t block = offset / d->config.grain;
    int flags = d->history[block][HISTORY - 1].flags;

    do {
        block++;
    } while (block * d->config.grain < end && !disk_chance(d, 3) &&
             d->history[block][HISTORY - 1].flags == flags);
    return (BdrvBlockExtent) {
        .flags = flags, .bytes = MIN(block * d->config.grain, end) - offset,
    };
}

static int coroutine_fn disk_co_block_extents(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes,
                                              unsigned max, GArray *extents)
{
    Disk *d = bs->opaque;
    guint first = extents->len;
    int64_t end = offset + MIN(bytes, d->config.reach ?: bytes);
    unsigned connection;

    g_assert(QEMU_IS_ALIGNED(offset | bytes, bs->bl.request_alignment));
    QEMU_LOCK_GUARD(&d->lock);
    do {
        int64_t pos = offset;

        g_array_set_size(extents, first);
        d->nb_queries++;
        d->nb_many += max > 1;
        d->asked_offset = offset;
        d->asked_bytes = bytes;
        disk_wait_locked(d, QUERIES, HOLD_BEFORE);
        if (d->query_error || disk_chance(d, d->percent_bad)) {
            return d->query_error ?: -EIO;
        }
        if (max > 1 && d->config.many_error) {
            return d->config.many_error;
        }
        connection = d->connection;
        /* The server needs not look at everything at the same time */
        while (pos < end && extents->len < first + max &&
               (pos == offset || !disk_chance(d, 2))) {
            BdrvBlockExtent e = disk_extent_locked(d, pos, end);

            g_array_append_val(extents, e);
            d->nb_answered++;
            pos += e.bytes;
            if (disk_chance(d, 5)) {
                disk_hop_locked(d);
            }
        }
        disk_wait_locked(d, QUERIES, HOLD_AFTER);
    } while (connection != d->connection);
    return 0;
}

static int coroutine_fn
disk_co_block_status(BlockDriverState *bs, BdrvStatusMode mode, int64_t offset,
                     int64_t bytes, int64_t *pnum, int64_t *map,
                     BlockDriverState **file)
{
    g_autoptr(GArray) extents = g_array_new(false, false,
                                            sizeof(BdrvBlockExtent));
    int ret = disk_co_block_extents(bs, offset, bytes, 1, extents);
    const BdrvBlockExtent *e = (const BdrvBlockExtent *)extents->data;

    if (ret < 0) {
        return ret;
    }
    *map = offset;
    *file = bs;
    *pnum = mode & BDRV_WANT_ZERO ? e->bytes : bytes;
    return mode & BDRV_WANT_ZERO ? e->flags : DATA;
}

static bool disk_is_disconnected(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    return qatomic_read(&d->disconnected);
}

/* ---- Changes ---- */

/*
 * Blocks that are covered in whole become @inside, those at the edges become
 * @edge; -1: stay as they are.  If it fails, a part may have been done.
 */
static int coroutine_fn disk_change(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, int inside, int edge)
{
    Disk *d = bs->opaque;
    int64_t end = offset + bytes;
    int ret = 0;

    QEMU_LOCK_GUARD(&d->lock);
    disk_wait_locked(d, CHANGES, HOLD_BEFORE);
    for (int64_t block = offset / d->config.grain;
         block * d->config.grain < end; block++) {
        int64_t start = block * d->config.grain;
        bool whole = start >= offset && start + d->config.grain <= end;

        if (disk_chance(d, d->percent_bad)) {
            ret = -EIO;
            break;
        }
        if ((whole ? inside : edge) >= 0) {
            disk_set_locked(d, block, whole ? inside : edge);
        }
        if (disk_chance(d, 5)) {
            disk_hop_locked(d);
        }
    }
    d->len = MAX(d->len, ret < 0 || inside < 0 ? 0 : end);
    disk_note_change_locked(d, offset, bytes);
    disk_wait_locked(d, CHANGES, HOLD_AFTER);
    return ret;
}

static int coroutine_fn disk_co_pwritev(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        BdrvRequestFlags flags)
{
    return disk_change(bs, offset, bytes, DATA, DATA);
}

static int coroutine_fn
disk_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      BdrvRequestFlags flags)
{
    return disk_change(bs, offset, bytes,
                       flags & BDRV_REQ_MAY_UNMAP ? ZERO : DATA_ZERO, DATA);
}

static int coroutine_fn disk_co_pdiscard(BlockDriverState *bs, int64_t offset,
                                         int64_t bytes)
{
    Disk *d = bs->opaque;

    return disk_change(bs, offset, bytes,
                       disk_chance(d, 50) ? ZERO : UNKNOWN, -1);
}

/* Inside of one disk; they are data then */
static int coroutine_fn GRAPH_RDLOCK
disk_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst, int64_t dst_offset,
                        int64_t bytes, BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags)
{
    return bdrv_co_copy_range_to(src, src_offset, dst, dst_offset, bytes,
                                 read_flags, write_flags);
}

static int coroutine_fn
disk_co_copy_range_to(BlockDriverState *bs, BdrvChild *src, int64_t src_offset,
                      BdrvChild *dst, int64_t dst_offset, int64_t bytes,
                      BdrvRequestFlags read_flags,
                      BdrvRequestFlags write_flags)
{
    return disk_change(bs, dst_offset, bytes, DATA, DATA);
}

static int coroutine_fn
disk_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                 PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    Disk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    disk_wait_locked(d, CHANGES, HOLD_BEFORE);
    if (offset > d->len && d->len % d->config.grain) {
        disk_set_locked(d, d->len / d->config.grain, DATA);
    }
    for (int64_t block = DIV_ROUND_UP(offset, d->config.grain);
         block < MAX_BLOCKS; block++) {
        disk_set_locked(d, block, ZERO);
    }
    d->len = offset;
    disk_note_change_locked(d, 0, disk_max_len(d));
    disk_wait_locked(d, CHANGES, HOLD_AFTER);
    return 0;
}

/* ---- The driver ---- */

static int disk_open(BlockDriverState *bs, QDict *options, int flags,
                     Error **errp)
{
    const DiskConfig *config =
        (const DiskConfig *)(uintptr_t)qdict_get_int(options, "config");
    Disk *d = bs->opaque;

    qdict_del(options, "config");
    bs->supported_zero_flags = BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
    d->config = *config;
    d->len = config->len;
    d->rand = g_rand_new_with_seed(1);
    qemu_mutex_init(&d->lock);
    qemu_co_queue_init(&d->held[QUERIES]);
    qemu_co_queue_init(&d->held[CHANGES]);
    d->changes = g_malloc0_n(DIV_ROUND_UP(disk_max_len(d), disk_unit(d)),
                             sizeof(*d->changes));
    for (int64_t block = 0; block < MAX_BLOCKS; block++) {
        disk_set_locked(d, block, block % 2 || !config->even ? ZERO :
                                  config->even);
    }
    return 0;
}

static void disk_close(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    g_free(d->changes);
    g_rand_free(d->rand);
    qemu_mutex_destroy(&d->lock);
}

static void disk_refresh_limits(BlockDriverState *bs, Error **errp)
{
    Disk *d = bs->opaque;

    bs->bl.request_alignment = d->config.align ?: 512;
}

static int64_t coroutine_fn disk_co_getlength(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    return d->len;
}

static int coroutine_fn disk_co_preadv(BlockDriverState *bs, int64_t offset,
                                       int64_t bytes, QEMUIOVector *qiov,
                                       BdrvRequestFlags flags)
{
    qemu_iovec_memset(qiov, 0, 0, bytes);
    return 0;
}

static void disk_cancel_in_flight(BlockDriverState *bs)
{
    Disk *d = bs->opaque;

    d->nb_cancels++;
}

#define DISK_CALLBACKS                                          \
    .instance_size              = sizeof(Disk),                 \
    .bdrv_open                  = disk_open,                    \
    .bdrv_close                 = disk_close,                   \
    .bdrv_cancel_in_flight      = disk_cancel_in_flight,        \
    .bdrv_child_perm            = bdrv_default_perms,           \
    .bdrv_refresh_limits        = disk_refresh_limits,          \
    .bdrv_co_getlength          = disk_co_getlength,            \
    .bdrv_co_preadv             = disk_co_preadv,               \
    .bdrv_co_pwritev            = disk_co_pwritev,              \
    .bdrv_co_pwrite_zeroes      = disk_co_pwrite_zeroes,        \
    .bdrv_co_pdiscard           = disk_co_pdiscard,             \
    .bdrv_co_copy_range_from    = disk_co_copy_range_from,      \
    .bdrv_co_copy_range_to      = disk_co_copy_range_to,        \
    .bdrv_co_truncate           = disk_co_truncate,             \
    .bdrv_co_block_status       = disk_co_block_status

static BlockDriver bdrv_disk = {
    .format_name                = "cacheextents-test-disk",
    .bdrv_co_block_extents      = disk_co_block_extents,
    .bdrv_is_disconnected       = disk_is_disconnected,
    DISK_CALLBACKS,
};

/* One that does not know queries for many extents */
static BlockDriver bdrv_disk_one = {
    .format_name                = "cacheextents-test-disk-one",
    DISK_CALLBACKS,
};

/* ---- What tests do with it ---- */

BlockDriverState *disk_new(const char *name, const DiskConfig *config)
{
    QDict *opts = qdict_new();

    g_assert(config->len <= MAX_BLOCKS * config->grain);
    qdict_put_int(opts, "config", (uintptr_t)config);
    return bdrv_new_open_driver_opts(config->one ? &bdrv_disk_one : &bdrv_disk,
                                     name, opts, BDRV_O_RDWR | BDRV_O_UNMAP,
                                     &error_abort);
}

void disk_hold(Disk *d, int kind, int where)
{
    QEMU_LOCK_GUARD(&d->lock);
    d->hold[kind] = where;
    for (unsigned nb = d->nb_held; nb > 0; nb--) {
        qemu_co_enter_next(&d->held[kind], &d->lock);
    }
}

void disk_set(Disk *d, int64_t offset, int64_t bytes, int flags)
{
    QEMU_LOCK_GUARD(&d->lock);
    for (int64_t b = offset / d->config.grain;
         b * d->config.grain < offset + bytes; b++) {
        disk_set_locked(d, b, flags);
    }
}

uint64_t disk_now(Disk *d)
{
    QEMU_LOCK_GUARD(&d->lock);
    return d->now;
}

bool disk_was(Disk *d, uint64_t start, int64_t offset, int flags)
{
    const uint64_t *changes = d->changes[offset / disk_unit(d)];
    const Status *h = d->history[offset / d->config.grain];

    QEMU_LOCK_GUARD(&d->lock);
    if (flags == DATA && (d->config.one || d->config.grain % disk_unit(d))) {
        return true;
    }
    if (flags != UNKNOWN) {
        int i = CHANGES_KEPT - 1;

        while (i >= 0 && changes[i] > start) {
            i--;
        }
        start = i >= 0 ? changes[i] : 0;
    }
    for (int i = HISTORY - 1; i >= 0; i--) {
        if (h[i].flags == flags) {
            return true;
        }
        if (h[i].since <= start) {
            return false;
        }
    }
    /* Too long ago */
    return true;
}

void disk_reconnect(BlockDriverState *bs)
{
    static const int states[] = { DATA, ZERO, UNKNOWN, DATA_ZERO };
    Disk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->lock);
    bdrv_block_status_changed(bs);
    d->connection++;
    for (int64_t b = 0; b < MAX_BLOCKS; b++) {
        disk_set_locked(d, b, states[g_rand_int_range(d->rand, 0, 4)]);
    }
    disk_note_change_locked(d, 0, disk_max_len(d));
}
