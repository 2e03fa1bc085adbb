/*
 * seqcache filter: collect small sequential writes, write them later
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The work is done by block/write-behind.c.  This driver decides what goes into
 * the cache and sees to it that everything else finds the child as if there
 * were no cache.
 *
 * A write is cached if it overwrites cached data or continues a stream.  A
 * stream begins with a write that starts where an earlier one has ended (also
 * where a cached cluster has ended, and its stream with it), or with one that
 * is not aligned to blocks of the child, which would be expensive there.
 * Others, and large aligned ones, go to the child without a copy.  So random
 * writes cost nothing more than without the filter.
 *
 * A request that goes to the child first writes out what is cached of its
 * range.  Requests whose ranges do not overlap need no order: the cache never
 * writes a byte that its user did not write, and the child serialises what
 * happens inside of one block.
 *
 * block/seqcache-child.c is about what the filter claims of its child while it
 * has writers or dirty data.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/seqcache-compat.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/seqcache.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "seqcache-int.h"
#include "trace.h"

#define SEQCACHE_OPT_CLUSTER_SIZE "cluster-size"
#define SEQCACHE_OPT_CACHE_SIZE "cache-size"

#define DEFAULT_CLUSTER_SIZE (64 * KiB)
#define DEFAULT_CACHE_SIZE (16 * MiB)
#define MAX_CACHE_SIZE (1 * GiB)

/* How many sequential streams are continued at a time */
#define MAX_STREAMS 16

/* From seqcache_reopen_prepare() to seqcache_reopen_commit() */
typedef struct SeqCacheReopen {
    SeqCacheFilterOpts opts;
    bool same_child;
} SeqCacheReopen;

static QemuOptsList seqcache_runtime_opts = {
    .name = "seqcache",
    .head = QTAILQ_HEAD_INITIALIZER(seqcache_runtime_opts.head),
    .desc = {
        {
            /* A size, parsed by seqcache_absorb_opts() like the next one */
            .name = SEQCACHE_OPT_CLUSTER_SIZE,
            .type = QEMU_OPT_STRING,
            .help = "Unit of caching",
        },
        {
            .name = SEQCACHE_OPT_CACHE_SIZE,
            .type = QEMU_OPT_STRING,
            .help = "Maximum size of the cache",
        },
        { /* end of list */ }
    },
};

/*
 * The write size that the child prefers, if it can be the cluster size.
 * Smaller ones than usual are what a server is content with (qemu-nbd says
 * 4 KiB), and no reason not to collect more.
 */
static int64_t GRAPH_RDLOCK
seqcache_default_cluster_size(BlockDriverState *child)
{
    int64_t size = child->bl.opt_transfer;
    int64_t min = MAX(child->bl.request_alignment, DEFAULT_CLUSTER_SIZE);

    if (!is_power_of_2(size) || size > SEQCACHE_MAX_CLUSTER_SIZE) {
        size = 0;
    }
    return MIN(MAX(size, min), SEQCACHE_MAX_CLUSTER_SIZE);
}

/*
 * Take our options out of @options.  Returns false and sets @errp if they are
 * not valid for this child.
 */
static bool GRAPH_RDLOCK
seqcache_absorb_opts(SeqCacheFilterOpts *dest, QDict *options,
                     BlockDriverState *child, Error **errp)
{
    g_autoptr(QemuOpts) opts = qemu_opts_create(&seqcache_runtime_opts, NULL,
                                                0, &error_abort);
    uint64_t min = MAX(child->bl.request_alignment, BDRV_SECTOR_SIZE);
    uint64_t cluster_size = seqcache_default_cluster_size(child);
    uint64_t cache_size;
    const char *str;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        return false;
    }

    str = qemu_opt_get(opts, SEQCACHE_OPT_CLUSTER_SIZE);
    if (str && (qemu_strtosz(str, NULL, &cluster_size) < 0 ||
                !is_power_of_2(cluster_size) || cluster_size < min ||
                cluster_size > SEQCACHE_MAX_CLUSTER_SIZE))
    {
        error_setg(errp, "Invalid value '%s' for option '"
                   SEQCACHE_OPT_CLUSTER_SIZE "': expected a power of two from "
                   "%" PRIu64 " (the child's block size, at least a sector) to "
                   "%d", str, min, SEQCACHE_MAX_CLUSTER_SIZE);
        return false;
    }

    cache_size = MAX(DEFAULT_CACHE_SIZE, 2 * cluster_size);
    str = qemu_opt_get(opts, SEQCACHE_OPT_CACHE_SIZE);
    if (str && (qemu_strtosz(str, NULL, &cache_size) < 0 ||
                cache_size < 2 * cluster_size || cache_size > MAX_CACHE_SIZE))
    {
        error_setg(errp, "Invalid value '%s' for option '"
                   SEQCACHE_OPT_CACHE_SIZE "': expected a size from %" PRIu64
                   " (two clusters) to %" PRId64, str, 2 * cluster_size,
                   (int64_t)MAX_CACHE_SIZE);
        return false;
    }

    *dest = (SeqCacheFilterOpts) { cluster_size, cache_size };
    return true;
}

/*
 * Make the cache what @new_opts and @flags ask for.  If there is one already,
 * everything in it must be on the child.
 */
static void seqcache_update_write_behind(BlockDriverState *bs,
                                         const SeqCacheFilterOpts *new_opts,
                                         int flags)
{
    BDRVSeqCacheState *s = bs->opaque;
    WriteBehindOptions opts = {
        .cache_size = new_opts->cache_size,
        .cluster_size = new_opts->cluster_size,
        .max_streams = MAX_STREAMS,
        .event = BLKDBG_WRITE_AIO,
        .written_out = seqcache_written_out,
    };

    /* Do not lose the statistics when something else is reopened */
    if (s->write_behind && (flags & BDRV_O_RDWR) &&
        new_opts->cache_size == s->opts.cache_size &&
        new_opts->cluster_size == s->opts.cluster_size) {
        return;
    }

    s->opts = *new_opts;
    wb_free(s->write_behind);
    s->write_behind = flags & BDRV_O_RDWR ? wb_new(bs, &opts) : NULL;
}

/* Write out everything, if there is a cache.  BlockDriver.bdrv_inactivate. */
static int coroutine_mixed_fn GRAPH_RDLOCK
seqcache_flush(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind ? wb_flush(bs, s->write_behind) : 0;
}

static int seqcache_open(BlockDriverState *bs, QDict *options, int flags,
                         Error **errp)
{
    BDRVSeqCacheState *s = bs->opaque;
    SeqCacheFilterOpts opts;
    int ret;

    GLOBAL_STATE_CODE();

    ret = bdrv_filter_open_child(bs, options, errp);
    if (ret < 0) {
        return ret;
    }

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!seqcache_absorb_opts(&opts, options, bs->file->bs, errp)) {
        return -EINVAL;
    }

    if (bdrv_is_read_only(bs->file->bs)) {
        ret = bdrv_apply_auto_read_only(bs, "The child in 'file' is read-only: "
                                        "a seqcache node above it needs "
                                        "'read-only=on' or "
                                        "'auto-read-only=on'", errp);
        if (ret < 0) {
            return ret;
        }
    }

    memset(s->ends, -1, sizeof(s->ends));
    seqcache_child_init(bs);
    seqcache_update_write_behind(bs, &opts, bs->open_flags);

    return 0;
}

static void seqcache_close(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;
    int ret;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    ret = seqcache_flush(bs);
    if (ret < 0) {
        error_report("Lost cached data on closing node '%s': %s",
                     bdrv_get_device_or_node_name(bs), strerror(-ret));
    }
    wb_free(s->write_behind);
    s->write_behind = NULL;
    seqcache_child_cleanup(s);
}

/*
 * Everything was flushed before, but a parent that is reopened together with
 * this node can have written something since.
 */
static int seqcache_reopen_prepare(BDRVReopenState *state,
                                   BlockReopenQueue *queue, Error **errp)
{
    g_autofree SeqCacheReopen *reopen = g_new0(SeqCacheReopen, 1);
    const char *new_child = qdict_get_try_str(state->options, "file");
    BlockDriverState *old, *child = NULL;
    int ret;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    old = state->bs->file->bs;
    if (new_child) {
        child = bdrv_lookup_bs(new_child, new_child, NULL);
    }
    reopen->same_child = !child || child == old;

    if (!seqcache_absorb_opts(&reopen->opts, state->options, child ?: old,
                              errp)) {
        return -EINVAL;
    }

    ret = seqcache_flush(state->bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Failed to write cached data");
        return ret;
    }

    state->opaque = g_steal_pointer(&reopen);
    return 0;
}

static void seqcache_reopen_commit(BDRVReopenState *state)
{
    BlockDriverState *bs = state->bs;
    BDRVSeqCacheState *s = bs->opaque;
    g_autofree SeqCacheReopen *reopen = g_steal_pointer(&state->opaque);
    int64_t length;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /*
     * A parent that was prepared after this node can have written something, as
     * well.  If it cannot be written out now, keep it, and the old sizes.
     */
    if (seqcache_flush(bs) < 0) {
        warn_report("Node '%s' keeps its cache: cached data cannot be written",
                    bdrv_get_device_or_node_name(bs));
        return;
    }
    seqcache_update_write_behind(bs, &reopen->opts, state->flags);
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        length = reopen->same_child ? s->length : -1;
    }
    seqcache_forget_clean(s, length);
}

static void seqcache_reopen_abort(BDRVReopenState *state)
{
    g_clear_pointer(&state->opaque, g_free);
}

/*
 * If the child can be written only once, a request must not reach it in pieces.
 * Requests that come in whole clusters need no cache.
 */
static bool seqcache_is_write_once(BlockDriverState *bs)
{
    return bs->bl.request_alignment > 1;
}

/* Whether this write, which is not in the cache, should begin a stream there */
static bool GRAPH_RDLOCK
seqcache_begins_stream(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRVSeqCacheState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    for (unsigned i = 0; i < SEQCACHE_NB_ENDS; i++) {
        if (s->ends[i] == offset) {
            s->ends[i] = -1;
            return true;
        }
    }
    return !QEMU_IS_ALIGNED(offset | bytes,
                            bs->file->bs->bl.request_alignment);
}

/*
 * A write that goes to @end was successful.  Another one that starts there
 * begins a stream.
 */
static void seqcache_remember_end(BDRVSeqCacheState *s, int64_t end)
{
    QEMU_LOCK_GUARD(&s->lock);

    s->ends[s->next_end] = end;
    s->next_end = (s->next_end + 1) % SEQCACHE_NB_ENDS;
}

/*
 * Cache a write up to the first piece that is not one for the cache.
 *
 * Returns: how much was cached; the rest has to go to the child.  A negative
 * errno if the cache is full of data that cannot be written.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
seqcache_co_cache(BlockDriverState *bs, int64_t offset, int64_t bytes,
                  QEMUIOVector *qiov, size_t qiov_offset)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t done, n;

    for (done = 0; done < bytes; done += n) {
        int64_t pos = offset + done;

        n = wb_co_write(s->write_behind, pos, bytes - done, qiov,
                        qiov_offset + done, false);
        if (n == 0 && seqcache_begins_stream(bs, pos, bytes - done)) {
            n = wb_co_write(s->write_behind, pos, bytes - done, qiov,
                            qiov_offset + done, true);
        }
        if (n <= 0) {
            return n < 0 ? n : done;
        }
        seqcache_grow(bs, pos + n);
        if (QEMU_IS_ALIGNED(pos + n, s->opts.cluster_size)) {
            seqcache_remember_end(s, pos + n);
        }
    }
    return done;
}

int coroutine_fn seqcache_co_begin_direct(BlockDriverState *bs, int64_t offset,
                                          int64_t bytes)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind ?
           wb_co_write_out(s->write_behind, offset, bytes, NULL) : 0;
}

/*
 * @ret is the result of the request.  What was cached in its range meanwhile
 * may be older or newer than the request where it is on the child; only the
 * child can tell.  What is not there yet is newer.
 */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_end_direct(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       int ret)
{
    BDRVSeqCacheState *s = bs->opaque;

    if (seqcache_co_begin_direct(bs, offset, bytes) < 0) {
        /* What cannot be written stays cached, and comes after the request */
        wb_drop_written(s->write_behind, offset, bytes);
    }
    return ret;
}

/* The same for a request that can make the node longer */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_end_write(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      int ret)
{
    if (ret >= 0) {
        seqcache_grow(bs, offset + bytes);
    }
    return seqcache_co_end_direct(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pwritev_direct(BlockDriverState *bs, int64_t offset, int64_t bytes,
                           QEMUIOVector *qiov, size_t qiov_offset,
                           BdrvRequestFlags flags)
{
    int ret = seqcache_co_begin_direct(bs, offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
    if (ret >= 0 && !(flags & BDRV_REQ_WRITE_COMPRESSED)) {
        seqcache_remember_end(bs->opaque, offset + bytes);
    }
    return seqcache_co_end_write(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                         QEMUIOVector *qiov, size_t qiov_offset,
                         BdrvRequestFlags flags)
{
    BDRVSeqCacheState *s = bs->opaque;
    bool large = bytes >= s->opts.cluster_size &&
                 QEMU_IS_ALIGNED(offset | bytes,
                                 bs->file->bs->bl.request_alignment);
    int64_t done = 0;

    /* A hint about @qiov does not matter for a copy */
    if (s->write_behind && !large && !(flags & ~BDRV_REQ_REGISTERED_BUF) &&
        !seqcache_is_write_once(bs) &&
        !bdrv_has_rival(bs->file, BLK_PERM_WRITE)) {
        done = seqcache_co_cache(bs, offset, bytes, qiov, qiov_offset);
    }
    if (done < 0 || done == bytes) {
        return MIN(done, 0);
    }

    offset += done;
    bytes -= done;
    trace_seqcache_direct(bs, offset, bytes, flags);
    return seqcache_co_pwritev_direct(bs, offset, bytes, qiov,
                                      qiov_offset + done, flags);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, QEMUIOVector *qiov,
                                    size_t qiov_offset, BdrvRequestFlags flags)
{
    return seqcache_co_pwritev_direct(bs, offset, bytes, qiov, qiov_offset,
                                      flags | BDRV_REQ_WRITE_COMPRESSED);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags)
{
    BDRVSeqCacheState *s = bs->opaque;

    if (!s->write_behind) {
        return bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                                   flags);
    }
    return wb_co_preadv_part(s->write_behind, offset, bytes, qiov,
                             qiov_offset, flags);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                          BdrvRequestFlags flags)
{
    int ret = seqcache_co_begin_direct(bs, offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    return seqcache_co_end_write(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    int ret = seqcache_co_begin_direct(bs, offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pdiscard(bs->file, offset, bytes);
    return seqcache_co_end_direct(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                            int64_t src_offset, BdrvChild *dst,
                            int64_t dst_offset, int64_t bytes,
                            BdrvRequestFlags read_flags,
                            BdrvRequestFlags write_flags)
{
    int ret = seqcache_co_begin_direct(bs, src_offset, bytes);

    if (ret < 0) {
        return ret;
    }
    return bdrv_co_copy_range_from(bs->file, src_offset, dst, dst_offset,
                                   bytes, read_flags, write_flags);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags)
{
    int ret = seqcache_co_begin_direct(bs, dst_offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset,
                                bytes, read_flags, write_flags);
    return seqcache_co_end_write(bs, dst_offset, bytes, ret);
}

/*
 * What shares a cluster or a subcluster with cached bytes is allocated when
 * they are written, and callers of bdrv_co_get_info() rely on that.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
seqcache_co_status_block(BlockDriverState *bs)
{
    BlockDriverState *child = bs->file->bs;
    int64_t block = MAX(child->bl.request_alignment, BDRV_SECTOR_SIZE);
    BlockDriverInfo bdi;

    if (bdrv_co_get_info(child, &bdi) == 0 && bdi.subcluster_size &&
        QEMU_IS_ALIGNED(bdi.subcluster_size, block))
    {
        block = bdi.subcluster_size;
    }
    return block;
}

/*
 * The status at @offset, where *@pnum bytes are not cached.  There can be fewer
 * in *@pnum afterwards.
 */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_gap_status(BlockDriverState *bs, int64_t offset, int64_t block,
                       int64_t *pnum)
{
    int64_t len = bdrv_co_getlength(bs->file->bs);

    if (len < 0) {
        return len;
    }
    if (offset >= len) {
        /* Between the end of the child and cached data there are zeroes */
        return BDRV_BLOCK_ZERO;
    }

    /*
     * If there is cached data after the end of the child, its last block must
     * not come with BDRV_BLOCK_EOF.  Call it data.
     */
    if (offset + *pnum >= len && seqcache_length(bs->opaque, len) > len) {
        int64_t last = QEMU_ALIGN_DOWN(len - 1, block);

        if (offset >= last) {
            *pnum = MIN(*pnum, len - offset);
            return BDRV_BLOCK_DATA;
        }
        *pnum = last - offset;
    }
    return BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
}

/*
 * Cached bytes are data; for the rest the child is asked.  Callers expect
 * blocks, so one that is cached in part counts as cached.
 */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_block_status(BlockDriverState *bs, BdrvStatusMode mode,
                         int64_t offset, int64_t bytes, int64_t *pnum,
                         int64_t *map, BlockDriverState **file)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t block, start, end, gap;

    *map = offset;
    *file = bs->file->bs;
    *pnum = bytes;
    if (!s->write_behind) {
        return BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
    }

    block = seqcache_co_status_block(bs);
    start = QEMU_ALIGN_DOWN(offset, block);
    end = QEMU_ALIGN_UP(offset + bytes, block);
    gap = wb_gap(s->write_behind, start, end - start);
    if (gap < end - start) {
        gap = QEMU_ALIGN_DOWN(gap, block);
    }
    if (gap == 0) {
        /* No further than necessary, each step is a look-up */
        int64_t stop = MIN(end, start + s->opts.cluster_size);

        do {
            start += block;
        } while (start < stop && wb_gap(s->write_behind, start, block) < block);
        *pnum = MIN(start - offset, bytes);
        return BDRV_BLOCK_DATA;
    }
    *pnum = MIN(start + gap - offset, bytes);
    return seqcache_co_gap_status(bs, offset, block, pnum);
}

/* The block layer flushes the child after this */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_flush_to_os(BlockDriverState *bs)
{
    int ret = seqcache_flush(bs);

    if (ret >= 0) {
        seqcache_written_out(bs);
    }
    return ret;
}

static BlockStatsSpecific *seqcache_get_specific_stats(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;
    g_autoptr(BlockStatsWriteBehind) cache_stats = NULL;
    BlockStatsSpecific *stats;

    if (!s->write_behind) {
        return NULL;
    }

    cache_stats = wb_get_stats(s->write_behind);
    stats = g_new0(BlockStatsSpecific, 1);
    stats->driver = BLOCKDEV_DRIVER_SEQCACHE;
    stats->u.seqcache = *cache_stats;
    return stats;
}

/* What can be reset to its default when the node is reopened */
static const char *const seqcache_mutable_opts[] = {
    SEQCACHE_OPT_CLUSTER_SIZE, SEQCACHE_OPT_CACHE_SIZE, NULL
};

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_settle(BlockDriverState *bs, BdrvSettleMode mode)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind ? wb_co_settle(s->write_behind, mode) : 0;
}

/* A job that is cancelled does not wait for a server that is gone */
static void GRAPH_RDLOCK seqcache_cancel_in_flight(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    if (s->write_behind) {
        wb_cancel_in_flight(s->write_behind);
    }
    bdrv_cancel_in_flight(bs->file->bs);
}

static void seqcache_drain_begin(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    wb_drained_begin(s->write_behind);
}

static void seqcache_drain_end(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    wb_drained_end(s->write_behind);
}

static BlockDriver bdrv_seqcache_filter = {
    .format_name                    = "seqcache",
    .instance_size                  = sizeof(BDRVSeqCacheState),

    .bdrv_open                      = seqcache_open,
    .bdrv_close                     = seqcache_close,
    .mutable_opts                   = seqcache_mutable_opts,
    .bdrv_reopen_prepare            = seqcache_reopen_prepare,
    .bdrv_reopen_commit             = seqcache_reopen_commit,
    .bdrv_reopen_abort              = seqcache_reopen_abort,
    .bdrv_inactivate                = seqcache_flush,
    .bdrv_co_invalidate_cache       = seqcache_co_invalidate_cache,

    .bdrv_refresh_limits            = bdrv_write_once_refresh_limits,
    .bdrv_child_perm                = seqcache_child_perm,
    .bdrv_set_perm                  = seqcache_set_perm,

    .bdrv_co_getlength              = seqcache_co_getlength,
    .bdrv_co_truncate               = seqcache_co_truncate,
    .bdrv_co_block_status           = seqcache_co_block_status,

    .bdrv_co_preadv_part            = seqcache_co_preadv_part,
    .bdrv_co_pwritev_part           = seqcache_co_pwritev_part,
    .bdrv_co_pwritev_compressed_part = seqcache_co_pwritev_compressed_part,
    .bdrv_co_pwrite_zeroes          = seqcache_co_pwrite_zeroes,
    .bdrv_co_pdiscard               = seqcache_co_pdiscard,
    .bdrv_co_copy_range_from        = seqcache_co_copy_range_from,
    .bdrv_co_copy_range_to          = seqcache_co_copy_range_to,
    .bdrv_co_flush_to_os            = seqcache_co_flush_to_os,
    .bdrv_co_settle                 = seqcache_co_settle,
    .bdrv_cancel_in_flight          = seqcache_cancel_in_flight,
    .bdrv_drain_begin               = seqcache_drain_begin,
    .bdrv_drain_end                 = seqcache_drain_end,

    .bdrv_get_specific_stats        = seqcache_get_specific_stats,

    .is_filter                      = true,
};

static void bdrv_seqcache_init(void)
{
    bdrv_register(&bdrv_seqcache_filter);
}

block_init(bdrv_seqcache_init);
