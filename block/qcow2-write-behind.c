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
 * A cluster that does not compress goes the same way as a whole host cluster,
 * which is from then on an ordinary normal cluster.  Data is accepted only in
 * the section of s->lock that allocates its host cluster.  So as long as the
 * cluster stays allocated, it can leave the cache, but not enter it: what is
 * found out under s->lock to be on the file stays there.
 *
 * What holds elsewhere in qcow2:
 * - No L2 table is written to the file before the data that it points to is
 *   there and flushed (qcow2_cache_entry_flush(); if an earlier flush could not
 *   cover that data, qcow2_cache_flush_dependency() asks for another).
 * - A host cluster whose refcount becomes 0 has nothing cached or in flight
 *   (update_refcount()), so it can be allocated again.
 * - Whoever accesses normal clusters in the file itself writes out first what
 *   is cached of them: qcow2_alloc_host_offset() does for all that write, and
 *   qcow2_co_copy_range_from().  Reads look here first
 *   (qcow2_co_preadv_part()).
 * - While the cache is dirty, the block status of the file says nothing
 *   (qcow2_co_block_status()).
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qcow2.h"
#include "qcow2-write-behind.h"
#include "trace.h"

#define DEFAULT_COMPRESSED_CACHE_SIZE (16 * MiB)
#define MAX_COMPRESSED_CACHE_SIZE (1 * GiB)

/*
 * How much larger the file gets at most, to have fewer requests.  64 MiB, half
 * of whose clusters do not compress, in random order, to blocks of 4 KiB: with
 * 0, 2, 5, 10 and 25 % it takes 205, 112, 73, 61 and 61 requests, and no, 2.0,
 * 4.9, 5.8 and 5.8 % more blocks than without the cache.  32 MiB where each
 * other cluster does not, the worst case: 266, 249, 223, 181 and 109, for up to
 * 1.8, 4.8, 9.5 and 19.4 % more.
 */
#define FILL_PERCENT 5

bool qcow2_compressed_cache_size(BlockDriverState *bs, QemuOpts *opts,
                                 const char *name, int64_t *size, Error **errp)
{
    BDRVQcow2State *s = bs->opaque;
    const char *str = qemu_opt_get(opts, name);
    int64_t min = 2 * (int64_t)s->cluster_size;
    uint64_t value;

    *size = QCOW2_COMPRESSED_CACHE_SIZE_AUTO;
    if (!str) {
        return true;
    }

    if (qemu_strtosz(str, NULL, &value) < 0 ||
        (value != 0 && (value < min || value > MAX_COMPRESSED_CACHE_SIZE)))
    {
        error_setg(errp, "Invalid value '%s' for option '%s': expected 0 to "
                   "turn the cache off, or a size from %" PRId64 " (two "
                   "clusters) to %" PRId64, str, name, min,
                   (int64_t)MAX_COMPRESSED_CACHE_SIZE);
        return false;
    }

    if (value && (s->incompatible_features & QCOW2_INCOMPAT_DATA_FILE)) {
        error_setg(errp, "Invalid value '%s' for option '%s': expected 0, "
                   "because an image with an external data file has no "
                   "compressed clusters", str, name);
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

int64_t qcow2_default_compressed_cache_size(BlockDriverState *bs)
{
    return qcow2_page_cache_collects(bs->file->bs) ?
           0 : DEFAULT_COMPRESSED_CACHE_SIZE;
}

void qcow2_update_write_behind(BlockDriverState *bs, int flags)
{
    BDRVQcow2State *s = bs->opaque;
    WriteBehindOptions opts = {
        .cache_size = s->compressed_cache_size,
        .cluster_size = s->cluster_size,
        .max_streams = 1,
        .pad = true,
        .fill_percent = FILL_PERCENT,
        .event = BLKDBG_WRITE_COMPRESSED,
    };

    if (!(flags & BDRV_O_RDWR) ||
        (s->incompatible_features & QCOW2_INCOMPAT_DATA_FILE)) {
        opts.cache_size = 0;
    } else if (opts.cache_size == QCOW2_COMPRESSED_CACHE_SIZE_AUTO) {
        opts.cache_size = qcow2_default_compressed_cache_size(bs);
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
    qatomic_set(&s->incompressible_requests, 0);
}

int qcow2_flush_write_behind(BlockDriverState *bs, bool end_stream)
{
    BDRVQcow2State *s = bs->opaque;

    if (!s->write_behind) {
        return 0;
    }
    if (end_stream) {
        wb_end_streams(s->write_behind);
    }
    return wb_flush(bs, s->write_behind);
}

void qcow2_close_write_behind(BlockDriverState *bs)
{
    int ret = qcow2_flush_write_behind(bs, true);

    if (ret < 0) {
        error_report("Lost compressed data on closing node '%s': %s",
                     bdrv_get_device_or_node_name(bs), strerror(-ret));
    }
}

int coroutine_fn
qcow2_co_write_compressed(BlockDriverState *bs, uint64_t offset,
                          const void *buf, int bytes, GArray *allocs)
{
    BDRVQcow2State *s = bs->opaque;
    WriteBehind *wb = s->write_behind;
    Qcow2CompressedAlloc alloc;
    QCowL2Meta in_flight;
    uint64_t host_offset;
    int ret;

    ret = wb_co_reserve(wb, 1);
    if (ret < 0) {
        return ret;
    }

    QEMU_LOCK_GUARD(&s->lock);

    /* After this, s->lock is held until the data is in the cache */
    qcow2_begin_compressed_write(bs, offset, &in_flight);
    qcow2_end_compressed_write(&in_flight);

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

    if (!wb_accept(wb, 1, host_offset, bytes, buf)) {
        /* Only corrupt refcounts can make the allocator return this cluster */
        qcow2_signal_corruption(bs, true, host_offset, bytes, "Preventing "
                                "invalid write of compressed data to a cluster "
                                "in use");
        return -EIO;
    }

    return 0;
}

/* What qcow2_co_write_incompressible() does in one section of s->lock */
static int coroutine_fn GRAPH_RDLOCK
qcow2_co_write_incompressible_locked(BlockDriverState *bs, uint64_t offset,
                                     const void *buf)
{
    BDRVQcow2State *s = bs->opaque;
    WriteBehind *wb = s->write_behind;
    unsigned bytes = s->cluster_size;
    QCow2SubclusterType type;
    uint64_t host_offset = 0;
    QCowL2Meta *m = NULL;
    int ret;

    ret = qcow2_get_host_offset(bs, offset, &bytes, &host_offset, &type);
    if (ret >= 0 && (qcow2_find_write_in_flight(bs, offset) ||
                     (type != QCOW2_SUBCLUSTER_UNALLOCATED_PLAIN &&
                      type != QCOW2_SUBCLUSTER_ZERO_PLAIN))) {
        ret = 1;
    }
    if (ret != 0) {
        wb_unreserve(wb, 1);
        return ret;
    }

    /* There is no write to wait for, and nothing to be copied */
    bytes = s->cluster_size;
    ret = qcow2_alloc_host_offset(bs, offset, &bytes, &host_offset, &m);
    if (ret >= 0) {
        assert(bytes == s->cluster_size && m && !m->next);
        ret = qcow2_pre_write_overlap_check(bs, 0, host_offset, bytes, true);
    }
    if (ret >= 0) {
        /* Also with lazy refcounts: it brings a flush between data and L2 */
        ret = qcow2_cache_set_dependency(bs, s->l2_table_cache,
                                         s->refcount_block_cache);
    }
    if (ret < 0) {
        wb_unreserve(wb, 1);
    } else if (!wb_accept(wb, 1, host_offset, bytes, buf)) {
        /* Only corrupt refcounts can make the allocator return this cluster */
        qcow2_signal_corruption(bs, true, host_offset, bytes, "Preventing "
                                "invalid write of data to a cluster in use");
        ret = -EIO;
    } else {
        ret = qcow2_handle_l2meta(bs, &m, true);
    }
    if (ret == 0) {
        qatomic_inc(&s->incompressible_requests);
    }
    trace_qcow2_write_incompressible(bs, offset, host_offset, ret);

    /* After a failure this frees the cluster, so that it leaves the cache */
    qcow2_handle_l2meta(bs, &m, false);
    return ret;
}

int coroutine_fn
qcow2_co_write_incompressible(BlockDriverState *bs, uint64_t offset,
                              const void *buf)
{
    BDRVQcow2State *s = bs->opaque;
    int ret;

    if (bs->encrypted) {
        return 1;
    }

    ret = wb_co_reserve(s->write_behind, 1);
    if (ret < 0) {
        return ret;
    }

    QEMU_LOCK_GUARD(&s->lock);

    return qcow2_co_write_incompressible_locked(bs, offset, buf);
}

bool coroutine_fn
qcow2_co_read_normal(BlockDriverState *bs, uint64_t host_offset,
                     unsigned *bytes, QEMUIOVector *qiov, size_t qiov_offset)
{
    BDRVQcow2State *s = bs->opaque;
    int64_t piece = *bytes;
    bool cached = wb_read_piece(s->write_behind, host_offset, &piece, qiov,
                                qiov_offset);

    *bytes = piece;
    return cached;
}

int coroutine_fn
qcow2_co_write_out(BlockDriverState *bs, uint64_t host_offset, uint64_t bytes,
                   bool may_unlock)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t start = start_of_cluster(s, host_offset);

    if (!s->incompressible_requests) {
        return 0;
    }
    bytes = ROUND_UP(host_offset + bytes, s->cluster_size) - start;
    return wb_co_write_out(s->write_behind, start, bytes,
                           may_unlock ? &s->lock : NULL);
}

bool qcow2_has_dirty_cache(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    return s->write_behind && wb_is_dirty(s->write_behind);
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
    if (wb_gap(s->write_behind, coffset, csize) == csize) {
        return 0;
    }

    *buf = g_try_malloc(csize);
    if (!*buf) {
        return -ENOMEM;
    }

    qemu_iovec_init_buf(&qiov, *buf, csize);
    ret = wb_co_preadv_part(s->write_behind, coffset, csize, &qiov, 0, 0);
    if (ret < 0) {
        g_free(*buf);
        *buf = NULL;
    }
    return ret;
}

int coroutine_fn qcow2_co_settle(BlockDriverState *bs, BdrvSettleMode mode)
{
    BDRVQcow2State *s = bs->opaque;

    return s->write_behind ? wb_co_settle(s->write_behind, mode) : 0;
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

void qcow2_drop_write_behind(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

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
    stats->u.qcow2.incompressible_requests =
        qatomic_read(&s->incompressible_requests);
    return stats;
}
