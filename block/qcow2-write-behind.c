/*
 * qcow2: cache for compressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Compressed clusters are allocated back to back, so there is one stream, whose
 * end is s->free_byte_offset.  A stream that was ended for any reason may have
 * been padded; the allocator must then not put anything else into the rest of
 * its last cluster.  That is why a write that does not continue the stream
 * always begins a new host cluster, and why one cluster is enough to reserve.
 *
 * What holds elsewhere in qcow2:
 * - No L2 table is written to the file before the data that it points to is
 *   there and flushed (qcow2_cache_entry_flush(); if an earlier flush could not
 *   cover that data, qcow2_cache_flush_dependency() asks for another).
 * - A host cluster whose refcount becomes 0 has nothing cached or in flight
 *   (update_refcount()), so it can be allocated again.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qcow2.h"
#include "qcow2-write-behind.h"

#define DEFAULT_COMPRESSED_CACHE_SIZE (16 * MiB)
#define MAX_COMPRESSED_CACHE_SIZE (1 * GiB)

/*
 * A coroutine that waits until @number compressed writes have had their turn;
 * or, in s->fua_waiters, for the end of a flush
 */
typedef struct Qcow2CompressWaiter {
    uint64_t number;
    CoQueue queue;
    QLIST_ENTRY(Qcow2CompressWaiter) next;
} Qcow2CompressWaiter;

bool qcow2_compressed_cache_size(BlockDriverState *bs, QemuOpts *opts,
                                 int64_t *size, Error **errp)
{
    BDRVQcow2State *s = bs->opaque;
    const char *str = qemu_opt_get(opts, QCOW2_OPT_COMPRESSED_CACHE_SIZE);
    int64_t min = 2 * (int64_t)s->cluster_size;
    uint64_t value;

    *size = QCOW2_COMPRESSED_CACHE_SIZE_AUTO;
    if (!str) {
        return true;
    }

    if (qemu_strtosz(str, NULL, &value) < 0 ||
        (value != 0 && (value < min || value > MAX_COMPRESSED_CACHE_SIZE)))
    {
        error_setg(errp, "Invalid value '%s' for option '"
                   QCOW2_OPT_COMPRESSED_CACHE_SIZE "': expected 0 to turn the "
                   "cache off, or a size from %" PRId64 " (two clusters) to "
                   "%" PRId64, str, min, (int64_t)MAX_COMPRESSED_CACHE_SIZE);
        return false;
    }

    if (value && (s->incompatible_features & QCOW2_INCOMPAT_DATA_FILE)) {
        error_setg(errp, "Invalid value '%s' for option '"
                   QCOW2_OPT_COMPRESSED_CACHE_SIZE "': expected 0, because an "
                   "image with an external data file has no compressed "
                   "clusters", str);
        return false;
    }

    *size = value;
    return true;
}

/*
 * Whether a page cache of this host collects what is written to @bs: it ends up
 * in files or host devices without cache.direct=on, and nowhere else.
 */
static bool GRAPH_RDLOCK qcow2_page_cache_collects(BlockDriverState *bs)
{
    static const char *const drivers[] = {
        "file", "host_device", "host_cdrom", NULL
    };
    bool is_leaf = true;
    BdrvChild *child;

    QLIST_FOREACH(child, &bs->children, next) {
        /* Nothing is written to a backing file, and little to a log */
        if (child->role & (BDRV_CHILD_DATA | BDRV_CHILD_FILTERED)) {
            is_leaf = false;
            if (!qcow2_page_cache_collects(child->bs)) {
                return false;
            }
        }
    }

    return !is_leaf ||
           (bs->drv && g_strv_contains(drivers, bs->drv->format_name) &&
            !(bs->open_flags & BDRV_O_NOCACHE));
}

void qcow2_update_write_behind(BlockDriverState *bs, int flags)
{
    BDRVQcow2State *s = bs->opaque;
    WriteBehindOptions opts = {
        .cache_size = s->compressed_cache_size,
        .cluster_size = s->cluster_size,
        .max_streams = 1,
        .pad = true,
        .event = BLKDBG_WRITE_COMPRESSED,
    };

    if (!(flags & BDRV_O_RDWR) ||
        (s->incompatible_features & QCOW2_INCOMPAT_DATA_FILE)) {
        opts.cache_size = 0;
    } else if (opts.cache_size == QCOW2_COMPRESSED_CACHE_SIZE_AUTO) {
        opts.cache_size = qcow2_page_cache_collects(bs->file->bs) ?
                          0 : DEFAULT_COMPRESSED_CACHE_SIZE;
    }

    opts.cache_size = QEMU_ALIGN_DOWN(opts.cache_size, s->cluster_size);
    if (s->write_behind && wb_cache_size(s->write_behind) == opts.cache_size) {
        return;
    }

    if (s->write_behind && wb_is_dirty(s->write_behind)) {
        return;
    }

    wb_free(s->write_behind);
    s->write_behind = opts.cache_size ? wb_new(bs, &opts) : NULL;
}

void *qcow2_get_compress_buf(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    if (s->write_behind) {
        qatomic_inc(&s->nb_compress_bufs);
        for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS; i++) {
            void *buf = qatomic_read(&s->spare_compress_bufs[i]) ?
                        qatomic_xchg(&s->spare_compress_bufs[i], NULL) : NULL;

            if (buf) {
                return buf;
            }
        }
    }
    return qemu_blockalign(bs, s->cluster_size);
}

void qcow2_put_compress_buf(BlockDriverState *bs, void *buf)
{
    BDRVQcow2State *s = bs->opaque;

    if (s->write_behind) {
        for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS && buf; i++) {
            if (!qatomic_cmpxchg(&s->spare_compress_bufs[i], NULL, buf)) {
                buf = NULL;
            }
        }
        if (qatomic_fetch_dec(&s->nb_compress_bufs) == 1) {
            for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS; i++) {
                qemu_vfree(qatomic_xchg(&s->spare_compress_bufs[i], NULL));
            }
        }
    }
    qemu_vfree(buf);
}

/*
 * Let the next one allocate, and those go on that waited for the turns up to
 * this one.  Called with s->lock held.
 */
static void coroutine_fn qcow2_end_turn_locked(BDRVQcow2State *s)
{
    Qcow2CompressWaiter *waiter;

    s->nb_compress_done++;
    QLIST_FOREACH(waiter, &s->compress_waiters, next) {
        if (waiter->number == s->nb_compress_done) {
            qemu_co_queue_next(&waiter->queue);
        }
    }
}

/*
 * Wait until the turns of the first @number compressed writes are over.  Called
 * with s->lock held, which is released meanwhile.
 */
static void coroutine_fn
qcow2_co_wait_turns_locked(BDRVQcow2State *s, uint64_t number)
{
    Qcow2CompressWaiter self = { .number = number };

    if (number > s->nb_compress_done) {
        qemu_co_queue_init(&self.queue);
        QLIST_INSERT_HEAD(&s->compress_waiters, &self, next);
        qemu_co_queue_wait(&self.queue, &s->lock);
        QLIST_REMOVE(&self, next);
    }
}

ssize_t coroutine_fn
qcow2_co_compress_in_order(BlockDriverState *bs, void *dest, size_t dest_size,
                           const void *src, size_t src_size)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t number;
    ssize_t ret;

    if (!s->write_behind) {
        ret = qcow2_co_compress(bs, dest, dest_size, src, src_size);
        return qatomic_read(&s->abandoned) ? -ECANCELED : ret;
    }

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        number = s->nb_compress_begun++;
    }

    ret = qcow2_co_compress(bs, dest, dest_size, src, src_size);

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        qcow2_co_wait_turns_locked(s, number);
        if (qatomic_read(&s->abandoned)) {
            ret = -ECANCELED;
        }
        if (ret < 0) {
            qcow2_end_turn_locked(s);
        }
    }

    return ret;
}

int coroutine_fn
qcow2_co_write_compressed(BlockDriverState *bs, uint64_t offset,
                          const void *buf, int bytes, GArray *allocs)
{
    BDRVQcow2State *s = bs->opaque;
    WriteBehind *wb = s->write_behind;
    Qcow2CompressedAlloc alloc;
    uint64_t host_offset;
    int ret;

    ret = wb_co_reserve(bs, wb, 1);

    QEMU_LOCK_GUARD(&s->lock);

    qcow2_end_turn_locked(s);
    if (ret < 0) {
        return ret;
    }

    if (s->free_byte_offset && !wb_continues(wb, s->free_byte_offset)) {
        s->free_byte_offset = 0;
    }

    ret = qcow2_alloc_compressed_cluster_offset(bs, offset, bytes,
                                                &host_offset, &alloc);
    if (ret >= 0) {
        g_array_append_val(allocs, alloc);
        ret = qcow2_pre_write_overlap_check(bs, 0, host_offset, bytes, true);
    }
    if (ret < 0) {
        wb_unreserve(wb, 1);
        return ret;
    }

    if (!wb_accept(bs, wb, 1, host_offset, bytes, buf)) {
        /* Only corrupt refcounts can make the allocator return this cluster */
        qcow2_signal_corruption(bs, true, host_offset, bytes, "Preventing "
                                "invalid write of compressed data to a cluster "
                                "in use");
        return -EIO;
    }

    return 0;
}

int coroutine_fn qcow2_co_flush_compressed(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    Qcow2CompressWaiter *waiter;
    uint64_t number;
    int ret;

    if (!s->write_behind) {
        return bdrv_co_flush_inserted(bs);
    }

    qemu_co_mutex_lock(&s->lock);
    number = ++s->nb_fua_begun;

    /* Let those come along that were begun, if they want to be flushed, too */
    qcow2_co_wait_turns_locked(s, s->nb_compress_begun);

    while (number > MAX(s->nb_fua_done, s->nb_fua_failed)) {
        Qcow2CompressWaiter self;
        uint64_t last;

        if (s->fua_flushing) {
            qemu_co_queue_init(&self.queue);
            QLIST_INSERT_HEAD(&s->fua_waiters, &self, next);
            qemu_co_queue_wait(&self.queue, &s->lock);
            QLIST_REMOVE(&self, next);
            continue;
        }

        s->fua_flushing = true;
        last = s->nb_fua_begun;
        qemu_co_mutex_unlock(&s->lock);
        ret = bdrv_co_flush_inserted(bs);
        qemu_co_mutex_lock(&s->lock);
        s->fua_flushing = false;

        if (ret < 0) {
            s->nb_fua_failed = last;
            s->fua_error = ret;
        } else {
            s->nb_fua_done = last;
        }
        QLIST_FOREACH(waiter, &s->fua_waiters, next) {
            qemu_co_queue_next(&waiter->queue);
        }
    }

    ret = number <= s->nb_fua_done ? 0 : s->fua_error;
    qemu_co_mutex_unlock(&s->lock);
    return ret;
}

int coroutine_fn
qcow2_co_read_cached(BlockDriverState *bs, uint64_t l2_entry, uint8_t **buf)
{
    BDRVQcow2State *s = bs->opaque;
    QEMUIOVector qiov;
    uint64_t coffset;
    int csize, ret;

    *buf = NULL;
    if (!s->write_behind) {
        return 0;
    }

    qcow2_parse_compressed_l2_entry(bs, l2_entry, &coffset, &csize);
    if (!wb_is_cached(s->write_behind, coffset, csize)) {
        return 0;
    }

    *buf = g_try_malloc(csize);
    if (!*buf) {
        return -ENOMEM;
    }

    qemu_iovec_init_buf(&qiov, *buf, csize);
    ret = wb_co_preadv_part(bs, s->write_behind, coffset, csize, &qiov, 0, 0);
    if (ret < 0) {
        g_free(*buf);
        *buf = NULL;
    }
    return ret;
}

void qcow2_abandon(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    qatomic_set(&s->abandoned, true);
    if (s->write_behind) {
        wb_abandon(s->write_behind);
    }
}

int coroutine_fn qcow2_co_settle(BlockDriverState *bs, BdrvSettleMode mode)
{
    BDRVQcow2State *s = bs->opaque;

    return s->write_behind ? wb_co_settle(bs, s->write_behind, mode) : 0;
}

void qcow2_cancel_in_flight(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    if (s->write_behind) {
        wb_cancel_in_flight(s->write_behind);
    }
}

void qcow2_drain_begin(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    wb_drained_begin(s->write_behind);
}

void qcow2_drain_end(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    wb_drained_end(s->write_behind);
}

void qcow2_free_ejected(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /* An image can be found to be corrupt while it is being opened */
    if (!s) {
        return;
    }
    /* Which stops the timer that shrinks the caches for metadata */
    bdrv_find_format("qcow2")->bdrv_detach_aio_context(bs);

    if (!s->write_behind) {
        return;
    }
    if (wb_is_dirty(s->write_behind)) {
        error_report("Lost compressed data on closing node '%s': the image is "
                     "corrupt", bdrv_get_device_or_node_name(bs));
    }
    wb_free(s->write_behind);
    s->write_behind = NULL;
}

BlockStatsSpecific *qcow2_get_specific_stats(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    BlockStatsSpecific *stats;

    if (!s->write_behind) {
        return NULL;
    }

    stats = g_new0(BlockStatsSpecific, 1);
    stats->driver = BLOCKDEV_DRIVER_QCOW2;
    stats->u.qcow2.compressed_cache = wb_get_stats(s->write_behind);
    return stats;
}
