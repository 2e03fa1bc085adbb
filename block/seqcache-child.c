/*
 * seqcache filter: what it claims of its child
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * While the filter has a parent that writes, or dirty data, nobody else may
 * write to the child or resize it, and the filter knows the length of the node
 * better than the child does.
 *
 * Cached data can outlive the moment when the last parent that writes lets go.
 * Until it is written, the filter keeps its permission to write to the child,
 * and does not share it.  See seqcache_child_perm().
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "seqcache-int.h"

/* ---- Length ---- */

void seqcache_forget_clean(BDRVSeqCacheState *s, int64_t length)
{
    if (s->write_behind) {
        wb_end_streams(s->write_behind);
        if (wb_is_dirty(s->write_behind)) {
            return;
        }
    }

    QEMU_LOCK_GUARD(&s->lock);

    if (s->length >= 0) {
        s->length = length;
    }
}

void seqcache_grow(BlockDriverState *bs, int64_t end)
{
    BDRVSeqCacheState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->lock);

    if (s->length < 0) {
        s->length = bs->total_sectors * BDRV_SECTOR_SIZE;
    }
    s->length = MAX(s->length, end);
}

int64_t seqcache_length(BDRVSeqCacheState *s, int64_t len)
{
    QEMU_LOCK_GUARD(&s->lock);

    return len < 0 || s->length < 0 ? len : s->length;
}

int64_t coroutine_fn seqcache_co_getlength(BlockDriverState *bs)
{
    return seqcache_length(bs->opaque, bdrv_co_getlength(bs->file->bs));
}

int coroutine_fn seqcache_co_truncate(BlockDriverState *bs, int64_t offset,
                                      bool exact, PreallocMode prealloc,
                                      BdrvRequestFlags flags, Error **errp)
{
    BDRVSeqCacheState *s = bs->opaque;
    int64_t len;
    int ret;

    /* The child must have its true length, and keep no data beyond the end */
    ret = seqcache_co_begin_direct(bs, 0, INT64_MAX);
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

/* The child has other contents than before, and perhaps another length */
void coroutine_fn
seqcache_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    seqcache_forget_clean(bs->opaque, bdrv_co_getlength(bs->file->bs));
}

/* ---- Permissions ---- */

void seqcache_written_out(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    if (qatomic_read(&s->release_pending)) {
        qemu_bh_schedule(s->release_bh);
    }
}

static bool seqcache_is_dirty(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    return s->write_behind && wb_is_dirty(s->write_behind);
}

/*
 * Whether BLK_PERM_WRITE cannot be unshared on the child @c, because somebody
 * writes to it or to its backing files, and may have begun when a job was
 * using those
 */
static bool GRAPH_RDLOCK seqcache_has_to_share(BdrvChild *c)
{
    BlockDriverState *bs = bdrv_cow_bs(bdrv_skip_filters(c->bs));

    if (bs && bdrv_has_rival(c, BLK_PERM_WRITE)) {
        return true;
    }
    while (bs && !bdrv_has_other_parent(bs, NULL, BLK_PERM_WRITE)) {
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
 * (bdrv_has_rival()).
 */
void seqcache_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
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

void seqcache_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
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
            seqcache_forget_clean(s, -1);
        }
    } else {
        seqcache_grow(bs, 0);
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
    seqcache_forget_clean(s, -1);
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_unref(bs);
}

void seqcache_child_init(BlockDriverState *bs)
{
    BDRVSeqCacheState *s = bs->opaque;

    qemu_mutex_init(&s->lock);
    s->length = -1;
    s->release_bh = qemu_bh_new(seqcache_release_bh, bs);
}

void seqcache_child_cleanup(BDRVSeqCacheState *s)
{
    qemu_bh_delete(s->release_bh);
    s->release_bh = NULL;
    qemu_mutex_destroy(&s->lock);
}
