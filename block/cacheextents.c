/*
 * cacheextents filter: remember block status where asking for it is slow
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Answers to questions for the block status come from a set of extents.  What
 * is not in it is asked of the child, and then for everything from there on:
 * one question brings as many extents as one answer can hold, and all are kept.
 * Everything that is not block status goes to the child as it comes.
 *
 * What is kept stays true because
 * - nobody else in this process may write to the child or resize it
 *   (cacheextents_child_perm());
 * - each request that can change the status is registered while it is active.
 *   When it begins and when it ends, all extents that it touches are dropped as
 *   a whole: a server may allocate more than what was written.  A question that
 *   is in flight at any moment of the request notes its range, and drops that
 *   of its answer which the range touches (CacheExtentsQuestion).  If a later
 *   answer was kept before its own, which may know of the request what it does
 *   not, it keeps nothing;
 * - if anything else can have changed the child, its epoch is another one, and
 *   everything is dropped (cacheextents_check_epoch_locked()).
 *
 * Only children without children of their own are cached, which are protocol
 * nodes: others do not see all that changes below them.  Their questions are
 * passed on.  When a question fails, the child is asked once more for what the
 * caller wants to know: it may well have an answer for a smaller range.
 *
 * Extents start and end at sectors and at blocks of the child, because callers
 * round to those.  A block that has more than one status is data.
 */

#include "qemu/osdep.h"

#include "block/block-extents.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/interval-tree.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/range.h"
#include "qobject/qdict.h"
#include "trace.h"

#define CACHEEXTENTS_OPT_MAX_EXTENTS "max-extents"

#define DEFAULT_MAX_EXTENTS 65536
#define LARGEST_MAX_EXTENTS (16 * 1024 * 1024)

/*
 * A block that has several statuses.  It is data for all who ask, but is a part
 * of the child's extents on both sides of it.
 */
#define CACHED_MIXED (1 << 30)

/* A question that overlaps with more changes than this keeps nothing */
#define MAX_NOTED_CHANGES 1024

/*
 * What is known about the bytes from @node.start to @last.  If an answer ended
 * there, the child's extent can be longer.  Then @node.last is where it can go
 * to at most, which is before the next extent that is known; else it is @last.
 */
typedef struct CachedExtent {
    IntervalTreeNode node;
    uint64_t last;
    int flags;
    bool open_start; /* an answer began here, the child's extent may not */
} CachedExtent;

/* A request that can change the block status */
typedef struct CacheExtentsChange {
    Range range;
    QLIST_ENTRY(CacheExtentsChange) next;
} CacheExtentsChange;

/* A question to the child that is in flight, about all from @start on */
typedef struct CacheExtentsQuestion {
    int64_t start;
    /* Of all changes that were active since it was asked; NULL: do not keep */
    GArray *changed;
    /* Since it was asked, another answer was kept */
    bool overtaken;
    /* Coroutines that hope for its answer */
    CoQueue waiters;
    QLIST_ENTRY(CacheExtentsQuestion) next;
} CacheExtentsQuestion;

typedef struct BDRVCacheExtentsState {
    /* Protects everything below; never held over a yield */
    QemuMutex lock;

    uint64_t max_extents;

    /* Of CachedExtent, which do not overlap */
    IntervalTreeRoot extents;
    uint64_t nb_extents;
    /* The child's epoch, and its block size, for which they are true */
    unsigned epoch;
    int64_t block;

    QLIST_HEAD(, CacheExtentsChange) changes;
    QLIST_HEAD(, CacheExtentsQuestion) questions;

    /* See BlockStatsSpecificCacheExtents in the QAPI schema */
    uint64_t hits;
    uint64_t misses;
    uint64_t nb_questions;
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

/* ---- The set of extents ---- */

/* The first extent that overlaps the range, or NULL.  s->lock is held. */
static CachedExtent *
cacheextents_first_locked(BDRVCacheExtentsState *s, uint64_t start,
                          uint64_t last)
{
    IntervalTreeNode *node = interval_tree_iter_first(&s->extents, start, last);

    return node ? container_of(node, CachedExtent, node) : NULL;
}

/* Called with s->lock held */
static void cacheextents_drop_locked(BDRVCacheExtentsState *s, CachedExtent *e)
{
    interval_tree_remove(&e->node, &s->extents);
    s->nb_extents--;
    g_free(e);
}

/* Called with s->lock held */
static void cacheextents_forget_locked(BDRVCacheExtentsState *s)
{
    CachedExtent *e;

    while ((e = cacheextents_first_locked(s, 0, UINT64_MAX))) {
        cacheextents_drop_locked(s, e);
    }
}

/* The extent that has the byte at @offset, or NULL.  s->lock is held. */
static CachedExtent *cacheextents_at_locked(BDRVCacheExtentsState *s,
                                            uint64_t offset)
{
    CachedExtent *e = cacheextents_first_locked(s, offset, offset);

    return e && offset <= e->last ? e : NULL;
}

/*
 * Whether a change of something with these flags can change what is beside it.
 * (What is data because it is mixed stays data.)
 */
static bool cacheextents_can_be_one(int flags, int neighbour)
{
    return !(neighbour & CACHED_MIXED) &&
           (flags == neighbour || flags & CACHED_MIXED);
}

/*
 * The child's extent changes.  Answers can have cut it into any number of
 * extents, and what is between them need not be known.  Drop them all.  Called
 * with s->lock held.
 */
static void cacheextents_drop_whole_locked(BDRVCacheExtentsState *s,
                                           CachedExtent *e)
{
    uint64_t start = e->node.start;
    uint64_t last = e->last;
    bool open_end = e->last != e->node.last;
    int flags_before = e->flags;
    int flags_after = e->flags;

    s->invalidations++;
    cacheextents_drop_locked(s, e);

    while ((e = cacheextents_first_locked(s, last + 1, UINT64_MAX)) &&
           (e->node.start == last + 1 || open_end || e->open_start) &&
           cacheextents_can_be_one(flags_after, e->flags))
    {
        flags_after = e->flags;
        last = e->last;
        open_end = e->last != e->node.last;
        s->invalidations++;
        cacheextents_drop_locked(s, e);
    }

    while (start && (e = cacheextents_first_locked(s, start - 1, start - 1)) &&
           cacheextents_can_be_one(flags_before, e->flags))
    {
        flags_before = e->flags;
        start = e->node.start;
        s->invalidations++;
        cacheextents_drop_locked(s, e);
    }
}

/*
 * The child changes in this range: drop all extents that it touches, as far as
 * they may go.  Called with s->lock held.
 */
static void cacheextents_invalidate_locked(BDRVCacheExtentsState *s,
                                           Range *range)
{
    CachedExtent *e;

    while ((e = cacheextents_first_locked(s, range_lob(range),
                                          range_upb(range))))
    {
        cacheextents_drop_whole_locked(s, e);
    }
    e = cacheextents_first_locked(s, range_upb(range), UINT64_MAX);
    if (e && e->open_start) {
        cacheextents_drop_whole_locked(s, e);
    }
}

/*
 * Make room for an answer of @nb extents that begins at @start and goes to
 * @last.  What it says is newer than what was known.  If there are too many
 * extents, the first ones go: most users look at one range after the other.
 * Called with s->lock held.
 */
static void cacheextents_make_room_locked(BDRVCacheExtentsState *s,
                                          uint64_t start, uint64_t last,
                                          uint64_t nb)
{
    CachedExtent *e, *next;
    int flags;

    while ((e = cacheextents_first_locked(s, start, last))) {
        if (e->node.start >= start && e->last <= last) {
            cacheextents_drop_locked(s, e);
            continue;
        }
        interval_tree_remove(&e->node, &s->extents);
        if (e->node.start < start) {
            e->last = MIN(e->last, start - 1);
            e->node.last = start - 1;
        } else {
            e->node.start = last + 1;
            e->open_start = false;
        }
        interval_tree_insert(&e->node, &s->extents);
    }
    while (s->nb_extents + nb > s->max_extents) {
        e = cacheextents_first_locked(s, 0, UINT64_MAX);
        flags = e->flags;
        cacheextents_drop_locked(s, e);
        next = cacheextents_first_locked(s, 0, UINT64_MAX);
        if (next && cacheextents_can_be_one(flags, next->flags)) {
            next->open_start = true;
        }
    }
}

/* Keep as much of an answer as there can be extents.  s->lock is held. */
static void cacheextents_keep_locked(BDRVCacheExtentsState *s, int64_t start,
                                     const GArray *answer)
{
    guint nb = MIN(answer->len, s->max_extents);
    int64_t end = start;
    uint64_t limit = UINT64_MAX;
    bool open_start;
    CachedExtent *e;

    for (guint i = 0; i < nb; i++) {
        end += g_array_index(answer, BdrvBlockExtent, i).bytes;
    }
    cacheextents_make_room_locked(s, start, end - 1, nb);

    /* If a neighbour is known, the extent ends there, or the two are twins */
    open_start = start && !cacheextents_at_locked(s, start - 1);
    e = cacheextents_first_locked(s, end, UINT64_MAX);
    if (e) {
        limit = e->node.start - 1;
    }

    for (guint i = 0; i < nb; i++) {
        const BdrvBlockExtent *extent = &g_array_index(answer, BdrvBlockExtent,
                                                       i);

        e = g_new(CachedExtent, 1);
        e->last = start + extent->bytes - 1;
        e->node.start = start;
        e->node.last = i == nb - 1 ? limit : e->last;
        e->flags = extent->flags;
        e->open_start = i == 0 && open_start;
        interval_tree_insert(&e->node, &s->extents);
        start += extent->bytes;
    }
    s->nb_extents += nb;
}

/* ---- Changes ---- */

/* Called with s->lock held */
static void cacheextents_note_change_locked(CacheExtentsQuestion *q,
                                            Range *range)
{
    if (!q->changed) {
        return;
    }
    if (q->changed->len == MAX_NOTED_CHANGES) {
        g_array_unref(q->changed);
        q->changed = NULL;
        return;
    }
    g_array_append_val(q->changed, *range);
}

/*
 * A request of our user is going to change this range of the child.  To be
 * followed by cacheextents_end_change(), whatever becomes of it.
 */
static void cacheextents_begin_change(BlockDriverState *bs,
                                      CacheExtentsChange *change,
                                      int64_t offset, int64_t bytes)
{
    BDRVCacheExtentsState *s = bs->opaque;
    CacheExtentsQuestion *q;

    range_set_bounds(&change->range, offset, offset + MAX(bytes, 1) - 1);
    trace_cacheextents_change(bs, offset, bytes);

    QEMU_LOCK_GUARD(&s->lock);

    QLIST_INSERT_HEAD(&s->changes, change, next);
    cacheextents_invalidate_locked(s, &change->range);
    QLIST_FOREACH(q, &s->questions, next) {
        cacheextents_note_change_locked(q, &change->range);
    }
}

static void cacheextents_end_change(BlockDriverState *bs,
                                    CacheExtentsChange *change)
{
    BDRVCacheExtentsState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    QLIST_REMOVE(change, next);
    cacheextents_invalidate_locked(s, &change->range);
}

/* ---- Questions ---- */

/* Whether nobody but us can change the child, as far as this process goes */
static bool GRAPH_RDLOCK cacheextents_can_keep(BlockDriverState *bs)
{
    return !(bs->file->shared_perm & (BLK_PERM_WRITE | BLK_PERM_RESIZE));
}

/* Forget what is no longer true.  Called with s->lock held. */
static void GRAPH_RDLOCK cacheextents_check_epoch_locked(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;
    unsigned epoch = bdrv_block_status_epoch(bs->file->bs);
    int64_t block = MAX(MAX(bs->bl.request_alignment, BDRV_SECTOR_SIZE),
                        bs->file->bs->bl.request_alignment);

    if (s->epoch != epoch || s->block != block) {
        trace_cacheextents_forget(bs, s->nb_extents);
        cacheextents_forget_locked(s);
        s->epoch = epoch;
        s->block = block;
    }
}

static void append_extent(GArray *extents, int64_t bytes, int flags)
{
    BdrvBlockExtent extent = { .bytes = bytes, .flags = flags };
    BdrvBlockExtent *last = extents->len ?
        &g_array_index(extents, BdrvBlockExtent, extents->len - 1) : NULL;

    if (last && last->flags == flags) {
        last->bytes += bytes;
    } else {
        g_array_append_val(extents, extent);
    }
}

/*
 * What @answer, which begins at a block and was asked for up to @end (the end
 * of the child), says of whole blocks.  A block that has several statuses is
 * data.  So is the last one if the answer ends inside of it, but if it is not
 * the first one it is better asked for again.
 */
static GArray *cacheextents_whole_blocks(const GArray *answer, int64_t start,
                                         int64_t end, int64_t block)
{
    GArray *result = g_array_new(false, false, sizeof(BdrvBlockExtent));
    int64_t pos = start;    /* where the extent ends */
    int64_t done = start;   /* where the result ends, a multiple of @block */
    guint i = 0;

    while (i < answer->len) {
        int flags = g_array_index(answer, BdrvBlockExtent, i).flags;
        int64_t whole;

        do {
            pos += g_array_index(answer, BdrvBlockExtent, i).bytes;
            i++;
        } while (i < answer->len &&
                 g_array_index(answer, BdrvBlockExtent, i).flags == flags);

        whole = pos < end ? QEMU_ALIGN_DOWN(pos, block) : ROUND_UP(pos, block);
        if (whole > done) {
            append_extent(result, whole - done, flags);
            done = whole;
        }
        if (pos > done && (i < answer->len || done == start)) {
            append_extent(result, block, BDRV_BLOCK_DATA | CACHED_MIXED |
                          (flags & BDRV_BLOCK_OFFSET_VALID));
            done += block;
        }
    }
    return result;
}

/*
 * Ask the child for what lies between @start and @end.
 *
 * Returns: 0, and the answer in whole blocks in *@answer, to be freed by the
 * caller; it is empty beyond the end of the child.  Else a negative errno.
 */
static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_ask(BlockDriverState *bs, int64_t start, int64_t end,
                    int64_t block, unsigned max, GArray **answer)
{
    BlockDriverState *child = bs->file->bs;
    g_autoptr(GArray) extents = g_array_new(false, false,
                                            sizeof(BdrvBlockExtent));
    int64_t len = bdrv_co_getlength(child);
    int ret = len < 0 ? len : 0;

    end = MIN(end, len);
    if (end > start) {
        ret = bdrv_co_block_extents(child, start, end - start, max, extents);
    }
    trace_cacheextents_ask(bs, start, extents->len, ret);
    if (ret >= 0) {
        *answer = cacheextents_whole_blocks(extents, start, end, block);
    }
    return ret;
}

/*
 * Ask the child for everything from @start on, and keep of the answer what may
 * be kept.  The answer is returned as well, as by cacheextents_co_ask().
 * Called with s->lock held, which is released meanwhile.
 */
static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_learn_locked(BlockDriverState *bs, int64_t start,
                             GArray **answer)
{
    BDRVCacheExtentsState *s = bs->opaque;
    CacheExtentsQuestion q = {
        .start = start,
        .changed = g_array_new(false, false, sizeof(Range)),
    };
    CacheExtentsQuestion *other;
    CacheExtentsChange *change;
    unsigned epoch = s->epoch;
    int64_t block = s->block;
    uint64_t max = s->max_extents;
    int ret;

    qemu_co_queue_init(&q.waiters);
    QLIST_FOREACH(change, &s->changes, next) {
        cacheextents_note_change_locked(&q, &change->range);
    }
    QLIST_INSERT_HEAD(&s->questions, &q, next);
    qemu_mutex_unlock(&s->lock);

    ret = cacheextents_co_ask(bs, start, INT64_MAX, block, max, answer);

    qemu_mutex_lock(&s->lock);
    QLIST_REMOVE(&q, next);
    s->nb_questions += ret != -ENOTSUP;
    cacheextents_check_epoch_locked(bs);
    if (ret >= 0 && (*answer)->len && s->epoch == epoch &&
        q.changed && !(q.overtaken && q.changed->len))
    {
        cacheextents_keep_locked(s, start, *answer);
        QLIST_FOREACH(other, &s->questions, next) {
            other->overtaken = true;
        }
        for (guint i = 0; i < q.changed->len; i++) {
            cacheextents_invalidate_locked(s, &g_array_index(q.changed, Range,
                                                             i));
        }
    }
    qemu_co_queue_restart_all(&q.waiters);
    g_clear_pointer(&q.changed, g_array_unref);
    return ret;
}

/*
 * Look for the status at @offset in the set.  Called with s->lock held.
 *
 * Returns: its flags, and in *@pnum for how many bytes they are true; -ENOENT
 * if it is not known.
 */
static int cacheextents_find_locked(BDRVCacheExtentsState *s, int64_t offset,
                                    int64_t *pnum)
{
    CachedExtent *e = cacheextents_at_locked(s, offset);

    if (!e) {
        return -ENOENT;
    }
    s->hits++;
    *pnum = e->last + 1 - offset;
    return e->flags & ~CACHED_MIXED;
}

/* As cacheextents_find_locked(), in an answer that begins at @start */
static int cacheextents_find_in(const GArray *answer, int64_t start,
                                int64_t offset, int64_t *pnum)
{
    for (guint i = 0; i < answer->len; i++) {
        const BdrvBlockExtent *extent = &g_array_index(answer, BdrvBlockExtent,
                                                       i);

        start += extent->bytes;
        if (offset < start) {
            *pnum = start - offset;
            return extent->flags & ~CACHED_MIXED;
        }
    }
    return -ENOENT;
}

/*
 * The status at @offset from the set, or from the child.  If it fails with
 * -ENOENT (beyond the end of the child) or -ENOTSUP, the child is to be asked
 * as if there were no filter.
 *
 * Returns: its flags, and in *@pnum for how many bytes they are true; or a
 * negative errno.
 */
static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_find(BlockDriverState *bs, int64_t offset, int64_t bytes,
                     int64_t *pnum)
{
    BDRVCacheExtentsState *s = bs->opaque;
    g_autoptr(GArray) answer = NULL;
    CacheExtentsQuestion *q;
    int64_t start;
    int ret;

    QEMU_LOCK_GUARD(&s->lock);

    cacheextents_check_epoch_locked(bs);
    ret = cacheextents_find_locked(s, offset, pnum);
    if (ret == -ENOENT) {
        /* Somebody else may be about to get the answer; wait only once */
        QLIST_FOREACH(q, &s->questions, next) {
            if (q->start <= offset) {
                qemu_co_queue_wait(&q->waiters, &s->lock);
                cacheextents_check_epoch_locked(bs);
                ret = cacheextents_find_locked(s, offset, pnum);
                break;
            }
        }
    }
    if (ret == -ENOENT) {
        s->misses++;
        start = QEMU_ALIGN_DOWN(offset, s->block);
        ret = cacheextents_co_learn_locked(bs, start, &answer);
        if (ret < 0 && ret != -ENOTSUP) {
            int64_t block = s->block;

            /* The child may well have an answer to a smaller question */
            qemu_mutex_unlock(&s->lock);
            if (cacheextents_co_ask(bs, start, offset + bytes, block, 1,
                                    &answer) == 0) {
                ret = 0;
            }
            qemu_mutex_lock(&s->lock);
        }
        if (ret >= 0) {
            ret = cacheextents_find_in(answer, start, offset, pnum);
        }
    }
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_block_status(BlockDriverState *bs, bool want_zero,
                             int64_t offset, int64_t bytes, int64_t *pnum,
                             int64_t *map, BlockDriverState **file)
{
    int ret = -ENOTSUP;

    *map = offset;
    *file = bs->file->bs;

    /* Always ask for the precise answer, it is good for everybody */
    if (cacheextents_can_keep(bs)) {
        ret = cacheextents_co_find(bs, offset, bytes, pnum);
    }
    if (ret == -ENOTSUP || ret == -ENOENT) {
        *pnum = bytes;
        ret = BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
    }
    return ret;
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
    CacheExtentsChange change;
    int ret;

    cacheextents_begin_change(bs, &change, offset, bytes);
    ret = bdrv_co_pwritev_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
    cacheextents_end_change(bs, &change);
    return ret;
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
    CacheExtentsChange change;
    int ret;

    cacheextents_begin_change(bs, &change, offset, bytes);
    ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);
    cacheextents_end_change(bs, &change);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    CacheExtentsChange change;
    int ret;

    cacheextents_begin_change(bs, &change, offset, bytes);
    ret = bdrv_co_pdiscard(bs->file, offset, bytes);
    cacheextents_end_change(bs, &change);
    return ret;
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
    CacheExtentsChange change;
    int ret;

    cacheextents_begin_change(bs, &change, dst_offset, bytes);
    ret = bdrv_co_copy_range_to(src, src_offset, bs->file, dst_offset, bytes,
                                read_flags, write_flags);
    cacheextents_end_change(bs, &change);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
cacheextents_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                         PreallocMode prealloc, BdrvRequestFlags flags,
                         Error **errp)
{
    CacheExtentsChange change;
    int ret;

    /*
     * When the child grows, its last block changes.  Where that is cannot be
     * told: after a write that met a truncation, its length may be a wrong one.
     */
    cacheextents_begin_change(bs, &change, 0, INT64_MAX);
    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    cacheextents_end_change(bs, &change);
    return ret;
}

/* No question is under way whose answer would be kept */
static void cacheextents_forget(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    trace_cacheextents_forget(bs, s->nb_extents);
    cacheextents_forget_locked(s);
}

static void coroutine_fn GRAPH_RDLOCK
cacheextents_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    cacheextents_forget(bs);
}

/*
 * Nobody else in this process may change what we remember.  A node without a
 * parent remembers nothing and shares: it can be put below a node that writes
 * to the child, or taken out from there.  So do an inactive node and one that
 * is forced to share (force-share); see cacheextents_can_keep().
 */
static void GRAPH_RDLOCK
cacheextents_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                        BlockReopenQueue *reopen_queue,
                        uint64_t perm, uint64_t shared,
                        uint64_t *nperm, uint64_t *nshared)
{
    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (!(bs->open_flags & BDRV_O_INACTIVE) && !QLIST_EMPTY(&bs->parents)) {
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    }
}

/* Permissions have changed, or the node became inactive */
static void GRAPH_RDLOCK
cacheextents_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    if (bs->file && !cacheextents_can_keep(bs)) {
        cacheextents_forget(bs);
    }
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
    QLIST_INIT(&s->changes);
    QLIST_INIT(&s->questions);

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        qemu_mutex_destroy(&s->lock);
        return ret;
    }

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED |
        (BDRV_REQ_FUA & bs->file->bs->supported_write_flags);
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED |
        ((BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK) &
         bs->file->bs->supported_zero_flags);
    bs->supported_truncate_flags = bs->file->bs->supported_truncate_flags;
    return 0;
}

static void cacheextents_close(BlockDriverState *bs)
{
    BDRVCacheExtentsState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    cacheextents_forget_locked(s);
    qemu_mutex_destroy(&s->lock);
}

static int cacheextents_reopen_prepare(BDRVReopenState *state,
                                       BlockReopenQueue *queue, Error **errp)
{
    g_autofree uint64_t *max_extents = g_new(uint64_t, 1);

    GLOBAL_STATE_CODE();

    if (!cacheextents_absorb_opts(max_extents, state->options, errp)) {
        return -EINVAL;
    }
    state->opaque = g_steal_pointer(&max_extents);
    return 0;
}

static void cacheextents_reopen_commit(BDRVReopenState *state)
{
    BDRVCacheExtentsState *s = state->bs->opaque;

    cacheextents_forget(state->bs);
    s->max_extents = *(uint64_t *)state->opaque;
    g_free(state->opaque);
    state->opaque = NULL;
}

static void cacheextents_reopen_abort(BDRVReopenState *state)
{
    g_free(state->opaque);
    state->opaque = NULL;
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
        .questions = s->nb_questions,
        .extents = s->nb_extents,
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
    .bdrv_reopen_abort              = cacheextents_reopen_abort,
    .bdrv_co_invalidate_cache       = cacheextents_co_invalidate_cache,

    .bdrv_child_perm                = cacheextents_child_perm,
    .bdrv_set_perm                  = cacheextents_set_perm,

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
