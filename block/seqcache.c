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
 * Cached data can outlive the moment when the last parent that writes lets go.
 * Until it is written, the filter keeps its permission to write to the child,
 * and does not share it.  See seqcache_child_perm().
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/filter-common.h"
#include "block/seqcache-compat.h"
#include "block/write-behind.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/seqcache.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "trace.h"

#define SEQCACHE_OPT_CLUSTER_SIZE "cluster-size"
#define SEQCACHE_OPT_CACHE_SIZE "cache-size"

#define DEFAULT_CLUSTER_SIZE (64 * KiB)
#define DEFAULT_CACHE_SIZE (16 * MiB)
#define MAX_CACHE_SIZE (1 * GiB)

/* How many sequential streams are continued at a time */
#define MAX_STREAMS 16

/* How many ends of writes and of cached clusters are remembered */
#define NB_ENDS 64

typedef struct SeqCacheFilterOpts {
    int64_t cluster_size;
    int64_t cache_size;
} SeqCacheFilterOpts;

/* From seqcache_reopen_prepare() to seqcache_reopen_commit() */
typedef struct SeqCacheReopen {
    SeqCacheFilterOpts opts;
    bool same_child;
} SeqCacheReopen;

typedef struct BDRVSeqCacheState {
    SeqCacheFilterOpts opts;

    /* NULL if the node is read-only */
    WriteBehind *write_behind;

    /*
     * Has cached data written out and gives back permissions on the child; NULL
     * while the node is being opened or closed
     */
    QEMUBH *release_bh;
    /* Whether it has to; permissions are kept until it was successful */
    bool release_pending;

    /* Protects what follows */
    QemuMutex lock;

    /*
     * Where the latest writes to the child have ended, or writes into the cache
     * at the end of a cluster; -1: unused
     */
    int64_t ends[NB_ENDS];
    unsigned next_end;

    /*
     * The length of this node, as requests to it have made it, while the child
     * may be shorter (its data is still cached) or longer (it fills up its last
     * block); -1: that of the child, which others may resize
     */
    int64_t length;
} BDRVSeqCacheState;

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

    dest->cluster_size = cluster_size;
    dest->cache_size = cache_size;
    return true;
}

static void seqcache_written_out(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    if (qatomic_read(&s->release_pending)) {
        qemu_bh_schedule(s->release_bh);
    }
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

/*
 * Others may write to the child from now on: forget what is there already, and
 * how long we have made it.  There should be no dirty data; if there is, since
 * somebody has written after the flush, it and the length are kept.
 */
static void seqcache_forget_clean(BDRVSeqCacheState *s)
{
    if (s->write_behind) {
        wb_end_streams(s->write_behind);
        if (wb_is_dirty(s->write_behind)) {
            return;
        }
    }

    QEMU_LOCK_GUARD(&s->lock);

    s->length = -1;
}

/*
 * A write that goes to @end was successful; 0: there is a writer from now on.
 * Another write that starts there begins a stream, if @stream.
 */
static void seqcache_written(BlockDriverState *bs, int64_t end, bool stream)
{
    BDRVSeqCacheState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    if (stream) {
        s->ends[s->next_end] = end;
        s->next_end = (s->next_end + 1) % NB_ENDS;
    }
    if (s->length < 0) {
        s->length = bs->total_sectors * BDRV_SECTOR_SIZE;
    }
    s->length = MAX(s->length, end);
}

static void seqcache_release_bh(void *opaque);

static int seqcache_open(BlockDriverState *bs, QDict *options, int flags,
                         Error **errp)
{
    BDRVSeqCacheState *s = bs->opaque;
    SeqCacheFilterOpts opts;
    int ret;

    GLOBAL_STATE_CODE();

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
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

    /* A flush of this node replaces FUA if the child does not support it */
    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED |
        (BDRV_REQ_FUA & bs->file->bs->supported_write_flags);
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED |
        ((BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK) &
         bs->file->bs->supported_zero_flags);
    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE &
        bs->file->bs->supported_truncate_flags;

    qemu_mutex_init(&s->lock);
    memset(s->ends, -1, sizeof(s->ends));
    s->length = -1;
    s->release_bh = qemu_bh_new(seqcache_release_bh, bs);
    seqcache_update_write_behind(bs, &opts, bs->open_flags);

    return 0;
}

static void seqcache_close(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;
    int ret;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (s->write_behind) {
        ret = wb_flush(bs, s->write_behind);
        if (ret < 0) {
            error_report("Lost cached data on closing node '%s': %s",
                         bdrv_get_device_or_node_name(bs), strerror(-ret));
        }
    }
    wb_free(s->write_behind);
    s->write_behind = NULL;
    qemu_bh_delete(s->release_bh);
    s->release_bh = NULL;
    qemu_mutex_destroy(&s->lock);
}

/*
 * Everything was flushed before, but a parent that is reopened together with
 * this node can have written something since.
 */
static int seqcache_reopen_prepare(BDRVReopenState *state,
                                   BlockReopenQueue *queue, Error **errp)
{
    BDRVSeqCacheState *s = state->bs->opaque;
    SeqCacheReopen *reopen = g_new0(SeqCacheReopen, 1);
    const char *new_child = qdict_get_try_str(state->options, "file");
    BlockDriverState *child = NULL;
    int ret;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (new_child) {
        child = bdrv_lookup_bs(new_child, new_child, NULL);
    }
    if (!child) {
        child = state->bs->file->bs;
    }

    if (!seqcache_absorb_opts(&reopen->opts, state->options, child, errp)) {
        g_free(reopen);
        return -EINVAL;
    }

    if (s->write_behind) {
        ret = wb_flush(state->bs, s->write_behind);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Failed to write cached data");
            g_free(reopen);
            return ret;
        }
    }

    reopen->same_child = child == state->bs->file->bs;
    state->opaque = reopen;
    return 0;
}

static void seqcache_reopen_commit(BDRVReopenState *state)
{
    BlockDriverState *bs = state->bs;
    BDRVSeqCacheState *s = bs->opaque;
    SeqCacheReopen *reopen = state->opaque;
    int64_t length;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /*
     * A parent that was prepared after this node can have written something, as
     * well.  If it cannot be written out now, keep it, and the old sizes.
     */
    if (!s->write_behind || wb_flush(bs, s->write_behind) == 0) {
        WITH_QEMU_LOCK_GUARD(&s->lock) {
            length = s->length;
        }
        seqcache_update_write_behind(bs, &reopen->opts, state->flags);
        seqcache_forget_clean(s);
        if (reopen->same_child) {
            QEMU_LOCK_GUARD(&s->lock);
            s->length = length;
        }
    } else {
        warn_report("Node '%s' keeps its cache: cached data cannot be written",
                    bdrv_get_device_or_node_name(bs));
    }

    g_free(state->opaque);
    state->opaque = NULL;
}

static void seqcache_reopen_abort(BDRVReopenState *state)
{
    g_free(state->opaque);
    state->opaque = NULL;
}

static bool seqcache_is_dirty(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind && wb_is_dirty(s->write_behind);
}

/* Whether @bs has a parent that writes, other than @c */
static bool GRAPH_RDLOCK seqcache_is_written(BlockDriverState *bs, BdrvChild *c)
{
    BdrvChild *other;

    QLIST_FOREACH(other, &bs->parents, next_parent) {
        if (other != c && (other->perm & BLK_PERM_WRITE)) {
            return true;
        }
    }
    return false;
}

/* Whether somebody else writes to the child @c, which @c allows */
static bool GRAPH_RDLOCK seqcache_has_rival(BdrvChild *c)
{
    return (c->shared_perm & BLK_PERM_WRITE) && seqcache_is_written(c->bs, c);
}

/*
 * Whether BLK_PERM_WRITE cannot be unshared on the child @c, because somebody
 * writes to it or to its backing files, and may have begun when a job was
 * using those
 */
static bool GRAPH_RDLOCK seqcache_has_to_share(BdrvChild *c)
{
    BlockDriverState *bs = bdrv_cow_bs(bdrv_skip_filters(c->bs));

    if (bs && seqcache_has_rival(c)) {
        return true;
    }
    while (bs && !seqcache_is_written(bs, NULL)) {
        bs = bdrv_filter_or_cow_bs(bs);
    }
    return bs;
}

/*
 * While there is a writing parent or dirty data, the cache may write at any
 * time and knows better than the child what its bytes are: nobody else may
 * write there.  Dirty data keeps the permissions under which it was accepted;
 * seqcache_release_bh() gives them back.
 *
 * Unsharing BLK_PERM_WRITE on an image does the same to its backing files.  Two
 * jobs must not find it so: an active commit, which writes to the base, as do
 * the users of the image when it has ended; and a backup to an image whose
 * backing file is the source.  Their filters do not ask for consistent reads.
 * What they share stays shared, also for dirty data that remains when they have
 * gone.  If somebody else then writes to the child itself, nothing is cached
 * (seqcache_has_rival()).
 */
static void GRAPH_RDLOCK
seqcache_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                    BlockReopenQueue *reopen_queue,
                    uint64_t perm, uint64_t shared,
                    uint64_t *nperm, uint64_t *nshared)
{
    const uint64_t write = BLK_PERM_WRITE | BLK_PERM_RESIZE;
    bool writer = perm & BLK_PERM_WRITE;
    bool dirty = seqcache_is_dirty(bs);
    /* Without a writer, a job is known by what it does not share */
    bool for_job = !(perm & BLK_PERM_CONSISTENT_READ) &&
                   (writer || !(shared & BLK_PERM_RESIZE));
    bool was_shared = !writer && c && (c->shared_perm & BLK_PERM_WRITE) &&
                      bdrv_cow_bs(bdrv_skip_filters(c->bs));

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);

    if (c && dirty) {
        *nperm |= c->perm & write;
    }
    if (!writer && !dirty) {
        return;
    }

    *nshared &= ~BLK_PERM_RESIZE;
    if (!c || !(for_job || was_shared || seqcache_has_to_share(c))) {
        *nshared &= ~BLK_PERM_WRITE;
    }
}

static void GRAPH_RDLOCK
seqcache_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    BDRVSeqCacheState *s = bs->opaque;
    bool release = false;

    if (!s->release_bh) {
        /* The node is being opened or closed */
        return;
    }

    if (!(perm & BLK_PERM_WRITE)) {
        const uint64_t write = BLK_PERM_WRITE | BLK_PERM_RESIZE;

        /* What was dirty when permissions were decided may no longer be */
        release = seqcache_is_dirty(bs) ||
                  (bs->file && (bs->file->perm & write & ~perm));
        if (!release) {
            seqcache_forget_clean(s);
        }
    } else {
        seqcache_written(bs, 0, false);
    }

    qatomic_set(&s->release_pending, release);
    if (release) {
        qemu_bh_schedule(s->release_bh);
    }
}

/*
 * Scheduled again when what is cached is written out, and, in case that fails,
 * by seqcache_co_flush_to_os()
 */
static void seqcache_release_bh(void *opaque)
{
    BlockDriverState *bs = opaque;
    BDRVSeqCacheState *s = bs->opaque;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /* A node that is being deleted is flushed and gives back everything */
    if (!s->release_pending || !bs->refcnt) {
        return;
    }

    if (seqcache_is_dirty(bs)) {
        wb_start_write_out(s->write_behind);
        return;
    }

    bdrv_ref(bs);
    qatomic_set(&s->release_pending, false);
    seqcache_forget_clean(s);
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_unref(bs);
}

/* The length of the node, or a negative errno, if that of the child is @len */
static int64_t seqcache_length(BDRVSeqCacheState *s, int64_t len)
{
    QEMU_LOCK_GUARD(&s->lock);

    return len < 0 || s->length < 0 ? len : s->length;
}

/*
 * If the child can be written only once, a request must not reach it in pieces.
 * Requests that come in whole clusters need no cache.
 */
static bool seqcache_is_write_once(BlockDriverState *bs)
{
    return bs->bl.request_alignment > 1;
}

static int64_t coroutine_fn GRAPH_RDLOCK
seqcache_co_getlength(BlockDriverState *bs)
{
    return seqcache_length(bs->opaque, bdrv_co_getlength(bs->file->bs));
}

/* Whether this write, which is not in the cache, should begin a stream there */
static bool GRAPH_RDLOCK
seqcache_begins_stream(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRVSeqCacheState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    for (unsigned i = 0; i < NB_ENDS; i++) {
        if (s->ends[i] == offset) {
            s->ends[i] = -1;
            return true;
        }
    }
    return !QEMU_IS_ALIGNED(offset | bytes,
                            bs->file->bs->bl.request_alignment);
}

/*
 * Cache what lies in the first cluster of a write, if it is a write for the
 * cache.
 *
 * Returns: how much was cached; 0 if the write has to go to the child; negative
 * errno if the cache is full of data that cannot be written.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
seqcache_co_cache(BlockDriverState *bs, int64_t offset, int64_t bytes,
                  QEMUIOVector *qiov, size_t qiov_offset)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t n = wb_co_write(s->write_behind, offset, bytes, qiov, qiov_offset,
                            false);

    if (n == 0 && seqcache_begins_stream(bs, offset, bytes)) {
        n = wb_co_write(s->write_behind, offset, bytes, qiov, qiov_offset,
                        true);
    }
    if (n > 0) {
        seqcache_written(bs, offset + n,
                         QEMU_IS_ALIGNED(offset + n, s->opts.cluster_size));
    }
    return n;
}

/*
 * What every request to the child begins with.  If it changes the child, it
 * ends with seqcache_co_end_direct().
 */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_write_out(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind ?
           wb_co_write_out(s->write_behind, offset, bytes) : 0;
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

    if (seqcache_co_write_out(bs, offset, bytes) < 0) {
        /* What cannot be written stays cached, and comes after the request */
        wb_drop_written(s->write_behind, offset, bytes);
    }
    return ret;
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
    /* A hint about @qiov does not matter for a copy */
    bool cache = s->write_behind && !large &&
                 !(flags & ~BDRV_REQ_REGISTERED_BUF) &&
                 !seqcache_is_write_once(bs) && !seqcache_has_rival(bs->file);
    int64_t done;
    int ret;

    while (bytes && cache) {
        done = seqcache_co_cache(bs, offset, bytes, qiov, qiov_offset);
        if (done < 0) {
            return done;
        }
        if (done == 0) {
            break;
        }
        offset += done;
        qiov_offset += done;
        bytes -= done;
    }
    if (!bytes) {
        return 0;
    }

    trace_seqcache_direct(bs, offset, bytes, flags);
    ret = seqcache_co_write_out(bs, offset, bytes);
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
    if (ret >= 0) {
        seqcache_written(bs, offset + bytes, true);
    }
    return seqcache_co_end_direct(bs, offset, bytes, ret);
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
seqcache_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                    int64_t bytes, QEMUIOVector *qiov,
                                    size_t qiov_offset, BdrvRequestFlags flags)
{
    int ret = seqcache_co_write_out(bs, offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags | BDRV_REQ_WRITE_COMPRESSED);
    if (ret >= 0) {
        seqcache_written(bs, offset + bytes, false);
    }
    return seqcache_co_end_direct(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                          BdrvRequestFlags flags)
{
    int ret = seqcache_co_write_out(bs, offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    if (ret >= 0) {
        seqcache_written(bs, offset + bytes, false);
    }
    return seqcache_co_end_direct(bs, offset, bytes, ret);
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    int ret = seqcache_co_write_out(bs, offset, bytes);

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
    int ret = seqcache_co_write_out(bs, src_offset, bytes);

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
    int ret = seqcache_co_write_out(bs, dst_offset, bytes);

    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset,
                                bytes, read_flags, write_flags);
    if (ret >= 0) {
        seqcache_written(bs, dst_offset + bytes, false);
    }
    return seqcache_co_end_direct(bs, dst_offset, bytes, ret);
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
 * Cached bytes are data; for the rest the child is asked.  Callers expect
 * blocks, so one that is cached in part counts as cached.
 */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_block_status(BlockDriverState *bs, BdrvStatusMode mode,
                         int64_t offset, int64_t bytes, int64_t *pnum,
                         int64_t *map, BlockDriverState **file)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t block, start, end, len, gap;

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

    /* Between the end of the child and cached data there are zeroes */
    len = bdrv_co_getlength(bs->file->bs);
    if (len < 0) {
        return len;
    }
    if (offset >= len) {
        return BDRV_BLOCK_ZERO;
    }

    /*
     * If there is cached data after the end of the child, its last block must
     * not come with BDRV_BLOCK_EOF.  Call it data.
     */
    if (offset + *pnum >= len && seqcache_length(s, len) > len) {
        int64_t last = QEMU_ALIGN_DOWN(len - 1, block);

        if (offset >= last) {
            *pnum = MIN(*pnum, len - offset);
            return BDRV_BLOCK_DATA;
        }
        *pnum = last - offset;
    }
    return BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
}

static int coroutine_fn GRAPH_RDLOCK
seqcache_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                     PreallocMode prealloc, BdrvRequestFlags flags,
                     Error **errp)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t len;
    int ret;

    /* The child must have its true length, and keep no data beyond the end */
    ret = seqcache_co_write_out(bs, 0, INT64_MAX);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Failed to write cached data");
        return ret;
    }

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        len = s->length;
        s->length = MIN(len, offset);
    }
    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    if (ret >= 0) {
        /* It can be more than was asked for, if that need not be exact */
        len = bdrv_co_getlength(bs->file->bs);
    }
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        if (s->length >= 0) {
            s->length = MAX(s->length, len);
        }
    }
    return ret;
}

/* The block layer flushes the child after this */
static int coroutine_fn GRAPH_RDLOCK
seqcache_co_flush_to_os(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;
    int ret;

    if (!s->write_behind) {
        return 0;
    }

    ret = wb_co_flush(bs, s->write_behind);
    if (ret >= 0 && qatomic_read(&s->release_pending)) {
        qemu_bh_schedule(s->release_bh);
    }
    return ret;
}

static int GRAPH_RDLOCK seqcache_inactivate(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind ? wb_flush(bs, s->write_behind) : 0;
}

/* The child has other contents than before, and perhaps another length */
static void coroutine_fn GRAPH_RDLOCK
seqcache_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t len = bdrv_co_getlength(bs->file->bs);
    bool owned;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        owned = s->length >= 0;
    }
    seqcache_forget_clean(s);
    WITH_QEMU_LOCK_GUARD(&s->lock) {
        if (owned && s->length < 0) {
            s->length = len;
        }
    }
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
    .bdrv_inactivate                = seqcache_inactivate,
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
