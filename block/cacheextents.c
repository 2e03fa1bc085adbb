/*
 * cacheextents filter: remember block status where asking for it is slow
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The filter answers queries for the block status from a set of extents.  For a
 * range that is not in it, it asks the child, up to the next extent that is
 * known: one query brings as many extents as one answer can hold, and the set
 * keeps all of them.  Everything that is not block status goes to the child as
 * it comes.
 *
 * An extent tells what its bytes contain, data or zeroes, and not what the
 * child has allocated.  A request that changes bytes makes nothing else
 * unknown, whatever a server allocates around them.  An extent that is neither
 * data nor known to read as zero is not kept.
 *
 * The set stays true because
 * - nobody else in this process may write to the child or resize it
 *   (cacheextents_child_perm());
 * - while a query is in flight, the set has expected extents where it asks, and
 *   the answer is kept only where they still are.  A request that changes bytes
 *   removes what is known and what is expected, and nothing can be expected
 *   there before it has ended;
 * - if anything else can have changed the child, or its server is gone, its
 *   epoch is another one, and everything is forgotten
 *   (cacheextents_check_epoch_locked()).
 *
 * Only children without children of their own are cached, which are protocol
 * nodes: others do not see all that changes below them.  Queries for them are
 * passed on.
 *
 * Extents start and end at sectors and at blocks of the child, because callers
 * round to those.
 */

#include "qemu/osdep.h"

#include "block/block-extents.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/filter-common.h"
#include "block/seqcache-compat.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/extent-set.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "trace.h"

#define CACHEEXTENTS_OPT_MAX_EXTENTS "max-extents"

#define DEFAULT_MAX_EXTENTS 65536
#define LARGEST_MAX_EXTENTS (16 * 1024 * 1024)

/*
 * A child that has refused a query for many extents gets so many queries for
 * one extent before the next one for many: it may have been a passing error.
 */
#define QUERIES_AFTER_REFUSAL 1000

/* A request that can change the contents, while it is active */
typedef struct CacheExtentsChange {
    BlockDriverState *bs;
    ExtentChange range;
} CacheExtentsChange;

typedef struct BDRVCacheExtentsState {
    /* Protects everything below; never held over a yield */
    QemuMutex lock;

    uint64_t max_extents;

    /* Whether nobody else can change the child; if not, nothing is kept */
    bool exclusive;

    /*
     * The flags are BDRV_BLOCK_DATA and BDRV_BLOCK_ZERO; the owner of what is
     * expected is a CoQueue of those who wait for the query
     */
    ExtentSet *extents;
    /* The child's epoch, and its block size, for which they are true */
    unsigned epoch;
    int64_t block;
    /* How often the child is asked for one extent because it refused many */
    unsigned single_queries;

    /* See BlockStatsSpecificCacheExtents in the QAPI schema */
    uint64_t hits;
    uint64_t misses;
    uint64_t nb_queries;
    uint64_t invalidations;
} BDRVCacheExtentsState;

static QemuOptsList cacheextents_runtime_opts = {
    .name = "cacheextents",
    .head = QTAILQ_HEAD_INITIALIZER(cacheextents_runtime_opts.head),
    .desc = {
        {
            /* A number, parsed by cacheextents_absorb_opts() */
            .name = CACHEEXTENTS_OPT_MAX_EXTENTS,
            .type = QEMU_OPT_STRING,
            .help = "How many extents are remembered at most",
        },
        { /* end of list */ }
    },
};

/*
 * Take our option out of @options.  Returns false and sets @errp if it is not
 * valid.
 */
static bool cacheextents_absorb_opts(uint64_t *max_extents, QDict *options,
                                     Error **errp)
{
    g_autoptr(QemuOpts) opts = qemu_opts_create(&cacheextents_runtime_opts,
                                                NULL, 0, &error_abort);
    const char *str;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        return false;
    }

    *max_extents = DEFAULT_MAX_EXTENTS;
    str = qemu_opt_get(opts, CACHEEXTENTS_OPT_MAX_EXTENTS);
    if (str && (parse_uint_full(str, 10, max_extents) < 0 ||
                *max_extents < 1 || *max_extents > LARGEST_MAX_EXTENTS))
    {
        error_setg(errp, "Invalid value '%s' for option '"
                   CACHEEXTENTS_OPT_MAX_EXTENTS "': expected a number from 1 "
                   "to %d", str, LARGEST_MAX_EXTENTS);
        return false;
    }
    return true;
}

/* ---- Changes ---- */

/*
 * A request of our user is going to change this range of the child.  To be
 * called before the child sees it.  @change belongs to the caller.  It ends
 * when it goes out of scope, which must be after the child is done.
 */
static void GRAPH_RDLOCK
cacheextents_begin_change(BlockDriverState *bs, CacheExtentsChange *change,
                          int64_t offset, int64_t bytes)
{
    BDRVCacheExtentsState *s = bs->opaque;
    int64_t block = bdrv_block_extents_align(bs->file->bs);
    uint64_t end = offset + MAX(bytes, 1);

    change->bs = bs;
    trace_cacheextents_change(bs, offset, bytes);

    QEMU_LOCK_GUARD(&s->lock);
    s->invalidations += extent_set_begin_change(s->extents, &change->range,
                                                QEMU_ALIGN_DOWN(offset, block),
                                                ROUND_UP(end, block) - 1);
    /* It can have made two extents of one */
    extent_set_limit(s->extents, s->max_extents, offset, offset);
}

static void cacheextents_end_change(CacheExtentsChange *change)
{
    BDRVCacheExtentsState *s = change->bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);
    extent_set_end_change(&change->range);
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(CacheExtentsChange, cacheextents_end_change)

/* ---- Queries ---- */

/* Nor keep the answers of queries in flight.  Called with s->lock held. */
static void cacheextents_forget_locked(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;

    trace_cacheextents_forget(bs, extent_set_count(s->extents));
    extent_set_clear(s->extents, 0, UINT64_MAX);
    s->single_queries = 0;
}

/* Forget what is no longer true.  Called with s->lock held. */
static void GRAPH_RDLOCK cacheextents_check_epoch_locked(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;
    unsigned epoch = bdrv_block_status_epoch(bs->file->bs);
    int64_t block = bdrv_block_extents_align(bs->file->bs);

    if (s->epoch != epoch || s->block != block) {
        cacheextents_forget_locked(bs);
        s->epoch = epoch;
        s->block = block;
    }
}

/*
 * Keep @answer, which begins at @start, where it is still expected, and expect
 * nothing more of @query up to @last.  Called with s->lock held.
 */
static void cacheextents_keep_locked(BDRVCacheExtentsState *s, CoQueue *query,
                                     uint64_t start, uint64_t last,
                                     const GArray *answer)
{
    const BdrvBlockExtent *extent = (const BdrvBlockExtent *)answer->data;
    const BdrvBlockExtent *end = extent + answer->len;
    uint64_t pos = start; /* of extent */
    Extent e;

    for (uint64_t next = start;
         next <= last && extent_set_first(s->extents, next, last, &e);
         next = e.last + 1) {
        if (e.owner != query) {
            continue;
        }
        extent_set_clear(s->extents, e.start, e.last);
        for (; extent < end && pos <= e.last; pos += extent++->bytes) {
            Extent new = {
                .start = MAX(pos, e.start),
                .last = MIN(pos + extent->bytes - 1, e.last),
                .flags = extent->flags,
            };

            if (new.flags && new.start <= new.last) {
                extent_set_add(s->extents, &new);
            }
            if (pos + extent->bytes - 1 > e.last) {
                break;
            }
        }
    }
    extent_set_limit(s->extents, s->max_extents, start, last);
}

/*
 * Ask the child for everything from @start on that is not known, and keep of
 * the answer what may be kept.  If the child refuses that, ask for one extent,
 * up to @last.  Called with s->lock held, which is released meanwhile.
 *
 * Returns: 0, and the extent at @start in *@extent; it is empty beyond the end
 * of the child.  Else a negative errno.
 */
static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_query_locked(BlockDriverState *bs, int64_t start, int64_t last,
                             BdrvBlockExtent *extent)
{
    BDRVCacheExtentsState *s = bs->opaque;
    BlockDriverState *child = bs->file->bs;
    g_autoptr(GArray) answer = g_array_new(false, false,
                                           sizeof(BdrvBlockExtent));
    unsigned epoch = s->epoch;
    bool many = !s->single_queries;
    bool refused = false;
    unsigned max = many ? s->max_extents : 1;
    CoQueue query;
    int64_t expected;
    Extent e;
    int ret;

    s->single_queries -= !many;
    if (extent_set_count(s->extents) > s->max_extents / 2 &&
        !(start && extent_set_first(s->extents, start - 1, start - 1, &e)))
    {
        /*
         * It would replace much of what is known.  That is right for those who
         * look at one range after the other, and not for others.
         */
        max = 1;
    }
    qemu_co_queue_init(&query);
    expected = extent_set_expect(s->extents, start,
                                 many ? INT64_MAX - 1 : last, &query);
    qemu_mutex_unlock(&s->lock);

    ret = bdrv_co_block_extents(child, start, expected + 1 - start, max,
                                answer);
    if (many && ret < 0 && ret != -ENOTSUP) {
        int one = bdrv_co_block_extents(child, start,
                                        MIN(last, expected) + 1 - start, 1,
                                        answer);

        /* If both fail, the caller gets the first error, or may ask itself */
        ret = one < 0 && one != -ENOTSUP ? ret : one;
        refused = true;
    }
    trace_cacheextents_query(bs, start, answer->len, ret);

    qemu_mutex_lock(&s->lock);
    s->nb_queries += refused + (ret != -ENOTSUP);
    cacheextents_check_epoch_locked(bs);
    if (refused && ret == 0 && s->epoch == epoch) {
        s->single_queries = QUERIES_AFTER_REFUSAL;
    }
    cacheextents_keep_locked(s, &query, start, expected, answer);
    qemu_co_queue_restart_all(&query);

    *extent = answer->len ? g_array_index(answer, BdrvBlockExtent, 0) :
              (BdrvBlockExtent) { 0 };
    return ret;
}

/*
 * The status at @offset from the set, or from the child.  If it fails with
 * -ENOTSUP, the child is to be asked as if there were no filter; also beyond
 * its end.
 *
 * Returns: its flags, and in *@pnum for how many bytes they are true; or a
 * negative errno.
 */
static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_find(BlockDriverState *bs, int64_t offset, int64_t bytes,
                     int64_t *pnum)
{
    BDRVCacheExtentsState *s = bs->opaque;
    BdrvBlockExtent answer;
    int64_t start;
    Extent e;
    int ret;

    QEMU_LOCK_GUARD(&s->lock);

    for (bool waited = false; ; waited = true) {
        cacheextents_check_epoch_locked(bs);
        /* Nobody tells us if it could not be activated */
        if (!s->exclusive || (bs->open_flags & BDRV_O_INACTIVE)) {
            return -ENOTSUP;
        }
        if (!extent_set_first(s->extents, offset, offset, &e)) {
            break;
        }
        if (!e.owner) {
            s->hits++;
            *pnum = e.last + 1 - offset;
            return e.flags;
        }
        if (waited) {
            break;
        }
        /* Somebody else is about to get the answer; wait only once */
        qemu_co_queue_wait(e.owner, &s->lock);
    }

    s->misses++;
    start = QEMU_ALIGN_DOWN(offset, s->block);
    ret = cacheextents_co_query_locked(bs, start,
                                       ROUND_UP(offset + bytes, s->block) - 1,
                                       &answer);
    if (ret < 0) {
        return ret;
    }
    *pnum = answer.bytes - (offset - start);
    return *pnum > 0 ? answer.flags : -ENOTSUP;
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_block_status(BlockDriverState *bs, BdrvStatusMode mode,
                             int64_t offset, int64_t bytes, int64_t *pnum,
                             int64_t *map, BlockDriverState **file)
{
    /* Always ask for the precise answer, it is good for everybody */
    int ret = cacheextents_co_find(bs, offset, bytes, pnum);

    *map = offset;
    *file = bs->file->bs;
    if (ret == -ENOTSUP) {
        *pnum = bytes;
        ret = BDRV_BLOCK_RAW;
    }
    return ret < 0 ? ret : ret | BDRV_BLOCK_OFFSET_VALID;
}

/* ---- Everything else ---- */

static int64_t coroutine_fn GRAPH_RDLOCK
cacheextents_co_getlength(BlockDriverState *bs)
{
    return bdrv_co_getlength(bs->file->bs);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                            QEMUIOVector *qiov, size_t qiov_offset,
                            BdrvRequestFlags flags)
{
    return bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_pwritev_part(BlockDriverState *bs, int64_t offset,
                             int64_t bytes, QEMUIOVector *qiov,
                             size_t qiov_offset, BdrvRequestFlags flags)
{
    g_auto(CacheExtentsChange) change;

    cacheextents_begin_change(bs, &change, offset, bytes);
    return bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                                flags);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        size_t qiov_offset,
                                        BdrvRequestFlags flags)
{
    return cacheextents_co_pwritev_part(bs, offset, bytes, qiov, qiov_offset,
                                        flags | BDRV_REQ_WRITE_COMPRESSED);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                              int64_t bytes, BdrvRequestFlags flags)
{
    g_auto(CacheExtentsChange) change;

    cacheextents_begin_change(bs, &change, offset, bytes);
    return bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    g_auto(CacheExtentsChange) change;

    cacheextents_begin_change(bs, &change, offset, bytes);
    return bdrv_co_pdiscard(bs->file, offset, bytes);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                                int64_t src_offset, BdrvChild *dst,
                                int64_t dst_offset, int64_t bytes,
                                BdrvRequestFlags read_flags,
                                BdrvRequestFlags write_flags)
{
    return bdrv_co_copy_range_from(bs->file, src_offset, dst, dst_offset,
                                   bytes, read_flags, write_flags);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                              int64_t src_offset, BdrvChild *dst,
                              int64_t dst_offset, int64_t bytes,
                              BdrvRequestFlags read_flags,
                              BdrvRequestFlags write_flags)
{
    g_auto(CacheExtentsChange) change;

    cacheextents_begin_change(bs, &change, dst_offset, bytes);
    return bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset, bytes,
                                 read_flags, write_flags);
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                         PreallocMode prealloc, BdrvRequestFlags flags,
                         Error **errp)
{
    g_auto(CacheExtentsChange) change;

    /*
     * When the child grows, its last block changes.  Where that is cannot be
     * told: after a write that met a truncation, its length may be a wrong one.
     */
    cacheextents_begin_change(bs, &change, 0, INT64_MAX);
    return bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
}

/* Whether @bs, or a filter above it, is the backing file of an image */
static bool GRAPH_RDLOCK cacheextents_is_backing(BlockDriverState *bs)
{
    BdrvChild *p;

    QLIST_FOREACH(p, &bs->parents, next_parent) {
        if ((p->role & BDRV_CHILD_COW) ||
            ((p->role & BDRV_CHILD_FILTERED) && p->klass == &child_of_bds &&
             cacheextents_is_backing(p->opaque)))
        {
            return true;
        }
    }
    return false;
}

/*
 * Nobody else in this process may change what we remember.  A node that
 * remembers nothing shares what its parents do.  These are
 * - a node without a parent: it can be put below a node that writes to the
 *   child, or taken out from there;
 * - a node above a child that has children of its own;
 * - a backing file that nobody needs to read consistently, as a commit job is
 *   writing to it; or to which somebody still writes when the job has ended;
 * - an inactive node, and one that is forced to share (force-share).
 * See cacheextents_set_perm().
 */
static void GRAPH_RDLOCK
cacheextents_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                        BlockReopenQueue *reopen_queue,
                        uint64_t perm, uint64_t shared,
                        uint64_t *nperm, uint64_t *nshared)
{
    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (c && QLIST_EMPTY(&c->bs->children) && !QLIST_EMPTY(&bs->parents) &&
        !(bs->open_flags & BDRV_O_INACTIVE) &&
        !(cacheextents_is_backing(bs) &&
          (!(perm & BLK_PERM_CONSISTENT_READ) ||
           bdrv_has_rival(c, BLK_PERM_WRITE | BLK_PERM_RESIZE))))
    {
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
}

/*
 * Permissions have changed, or whether the node is inactive, so that another
 * process can change the child.  A query that waits meanwhile finds either its
 * expectation gone or us no longer exclusive.
 */
static void GRAPH_RDLOCK
cacheextents_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    BDRVCacheExtentsState *s = bs->opaque;
    bool exclusive = bs->file && !(bs->open_flags & BDRV_O_INACTIVE) &&
        !(bs->file->shared_perm & (BLK_PERM_WRITE | BLK_PERM_RESIZE));

    QEMU_LOCK_GUARD(&s->lock);

    if (s->exclusive != exclusive) {
        s->exclusive = exclusive;
        cacheextents_forget_locked(bs);
    }
}

/* Another process can have changed the child until now */
static void coroutine_fn GRAPH_RDLOCK
cacheextents_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    BDRVCacheExtentsState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);
    cacheextents_forget_locked(bs);
}

static void cacheextents_close(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    extent_set_free(s->extents);
    qemu_mutex_destroy(&s->lock);
}

static int cacheextents_open(BlockDriverState *bs, QDict *options, int flags,
                             Error **errp)
{
    BDRVCacheExtentsState *s = bs->opaque;
    int ret;

    GLOBAL_STATE_CODE();

    if (!cacheextents_absorb_opts(&s->max_extents, options, errp)) {
        return -EINVAL;
    }

    /* Before cacheextents_set_perm() */
    qemu_mutex_init(&s->lock);
    s->extents = extent_set_new();
    s->block = BDRV_SECTOR_SIZE;

    ret = bdrv_filter_open_child(bs, options, errp);
    if (ret < 0) {
        cacheextents_close(bs);
    }
    return ret;
}

static int cacheextents_reopen_prepare(BDRVReopenState *state,
                                       BlockReopenQueue *queue, Error **errp)
{
    uint64_t max_extents;

    GLOBAL_STATE_CODE();

    if (!cacheextents_absorb_opts(&max_extents, state->options, errp)) {
        return -EINVAL;
    }
    state->opaque = GUINT_TO_POINTER(max_extents);
    return 0;
}

static void cacheextents_reopen_commit(BDRVReopenState *state)
{
    BDRVCacheExtentsState *s = state->bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    cacheextents_forget_locked(state->bs);
    s->max_extents = GPOINTER_TO_UINT(state->opaque);
}

static BlockStatsSpecific *
cacheextents_get_specific_stats(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;
    BlockStatsSpecific *stats = g_new0(BlockStatsSpecific, 1);

    QEMU_LOCK_GUARD(&s->lock);

    stats->driver = BLOCKDEV_DRIVER_CACHEEXTENTS;
    stats->u.cacheextents = (BlockStatsSpecificCacheExtents) {
        .hits = s->hits,
        .misses = s->misses,
        .queries = s->nb_queries,
        .extents = extent_set_count(s->extents),
        .invalidations = s->invalidations,
    };
    return stats;
}

/* What can be reset to its default when the node is reopened */
static const char *const cacheextents_mutable_opts[] = {
    CACHEEXTENTS_OPT_MAX_EXTENTS, NULL
};

/* A job that is cancelled does not wait for a server that is gone */
static void GRAPH_RDLOCK cacheextents_cancel_in_flight(BlockDriverState *bs)
{
    bdrv_cancel_in_flight(bs->file->bs);
}

static BlockDriver bdrv_cacheextents_filter = {
    .format_name                    = "cacheextents",
    .instance_size                  = sizeof(BDRVCacheExtentsState),

    .bdrv_open                      = cacheextents_open,
    .bdrv_close                     = cacheextents_close,
    .mutable_opts                   = cacheextents_mutable_opts,
    .bdrv_reopen_prepare            = cacheextents_reopen_prepare,
    .bdrv_reopen_commit             = cacheextents_reopen_commit,

    .bdrv_refresh_limits            = bdrv_write_once_refresh_limits,
    .bdrv_child_perm                = cacheextents_child_perm,
    .bdrv_set_perm                  = cacheextents_set_perm,
    .bdrv_co_invalidate_cache       = cacheextents_co_invalidate_cache,

    .bdrv_co_getlength              = cacheextents_co_getlength,
    .bdrv_co_truncate               = cacheextents_co_truncate,
    .bdrv_co_block_status           = cacheextents_co_block_status,

    .bdrv_co_preadv_part            = cacheextents_co_preadv_part,
    .bdrv_co_pwritev_part           = cacheextents_co_pwritev_part,
    .bdrv_co_pwritev_compressed_part =
        cacheextents_co_pwritev_compressed_part,
    .bdrv_co_pwrite_zeroes          = cacheextents_co_pwrite_zeroes,
    .bdrv_co_pdiscard               = cacheextents_co_pdiscard,
    .bdrv_co_copy_range_from        = cacheextents_co_copy_range_from,
    .bdrv_co_copy_range_to          = cacheextents_co_copy_range_to,
    .bdrv_cancel_in_flight          = cacheextents_cancel_in_flight,

    .bdrv_get_specific_stats        = cacheextents_get_specific_stats,

    .is_filter                      = true,
};

static void bdrv_cacheextents_init(void)
{
    bdrv_register(&bdrv_cacheextents_filter);
}

block_init(bdrv_cacheextents_init);
