/*
 * qcow2: cache for reads of compressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The bytes that a valid L2 entry of a compressed cluster points to change only
 * by compressed writes: whatever else is written goes to clusters that have no
 * such entry.  So it is enough to tell the cache of compressed writes.  It
 * forgets what was there when space is allocated: data for the cache for
 * compressed writes can be read from there from then on.  Other data is in the
 * file only when the write of its cluster ends, but its L2 entry can be seen
 * before.  A read at the same time may get what was there before, and leave it
 * in the cache.  So it is forgotten again then, also if the write has failed,
 * before those go on who wait for it: they may copy what they read.
 *
 * A cluster that is freed needs no attention: nothing points to it any more,
 * and before something does so again, it is written.
 *
 * What changes without us, because the nodes below are others, or another
 * process had the image, changes in a drained section, or no later than the
 * node is opened, reopened or activated.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "qcow2.h"
#include "qcow2-compressed-read.h"
#include "qcow2-write-behind.h"

/* How many entries of L2 tables are looked at */
#define MAX_LOOKED_AT 1024LL

/*
 * Where the compressed data of a cluster is.
 *
 * Returns: false if it is not all in the file, because the image is corrupt or
 * because it was not written yet.
 */
static bool GRAPH_RDLOCK qcow2_get_extent(BlockDriverState *bs,
                                          uint64_t l2_entry,
                                          CompressedExtent *extent)
{
    uint64_t coffset;
    int csize;

    qcow2_parse_compressed_l2_entry(bs, l2_entry, &coffset, &csize);
    *extent = (CompressedExtent) { coffset, csize };
    return (coffset + csize) >> BDRV_SECTOR_BITS <= bs->file->bs->total_sectors;
}

/* The slice of the L2 table for @offset if it is in memory.  Does not yield. */
static uint64_t *qcow2_get_cached_slice(BlockDriverState *bs, int64_t offset)
{
    BDRVQcow2State *s = bs->opaque;
    int l1_index = offset_to_l1_index(s, offset);
    uint64_t l2_offset;

    if (l1_index >= s->l1_size) {
        return NULL;
    }
    l2_offset = s->l1_table[l1_index] & L1E_OFFSET_MASK;
    if (!l2_offset) {
        return NULL;
    }
    l2_offset += l2_entry_size(s) * (offset_to_l2_index(s, offset) -
                                     offset_to_l2_slice_index(s, offset));
    return qcow2_cache_is_table_offset(s->l2_table_cache, l2_offset);
}

static bool GRAPH_RDLOCK
qcow2_is_compressed(BlockDriverState *bs, uint64_t l2_entry)
{
    return qcow2_get_cluster_type(bs, l2_entry) == QCOW2_CLUSTER_COMPRESSED;
}

/* CompressedReadOptions.following */
static int GRAPH_RDLOCK
qcow2_following(BlockDriverState *bs, int64_t start, int64_t end,
                CompressedExtent *extents, int max)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t *slice = NULL;
    int n = 0;

    end = MIN(end, bs->total_sectors << BDRV_SECTOR_BITS);
    end = MIN(end, start + (MAX_LOOKED_AT << s->cluster_bits));
    for (; start < end && n < max; start += s->cluster_size) {
        int i = offset_to_l2_slice_index(s, start);
        uint64_t l2_entry;

        if (!slice || !i) {
            slice = qcow2_get_cached_slice(bs, start);
        }
        if (!slice) {
            break;
        }
        /* Once: a timer can drop the table meanwhile */
        l2_entry = get_l2_entry(s, slice, i);
        if (qcow2_is_compressed(bs, l2_entry) &&
            qcow2_get_extent(bs, l2_entry, &extents[n])) {
            n++;
        }
    }
    return n;
}

/* Where the clusters before @offset begin that are not compressed */
static int64_t GRAPH_RDLOCK
qcow2_get_hole_start(BlockDriverState *bs, int64_t offset)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t *slice = qcow2_get_cached_slice(bs, offset);
    int i = offset_to_l2_slice_index(s, offset);
    int stop = MAX(i - MAX_LOOKED_AT, 0);
    int64_t nb_clusters = 0;

    while (slice && --i >= stop &&
           !qcow2_is_compressed(bs, get_l2_entry(s, slice, i))) {
        nb_clusters++;
    }
    return start_of_cluster(s, offset) - (nb_clusters << s->cluster_bits);
}

/* CompressedReadOptions.read */
static int coroutine_fn GRAPH_RDLOCK
qcow2_co_read_compressed(BlockDriverState *bs, int64_t offset, int64_t bytes,
                         QEMUIOVector *qiov)
{
    BDRVQcow2State *s = bs->opaque;

    BLKDBG_CO_EVENT(bs->file, BLKDBG_READ_COMPRESSED);
    if (s->write_behind) {
        return wb_co_preadv_part(s->write_behind, offset, bytes, qiov, 0, 0);
    }
    return bdrv_co_preadv(bs->file, offset, bytes, qiov, 0);
}

/* Whether somebody else may write to the image at any time */
static bool GRAPH_RDLOCK qcow2_is_shared(BlockDriverState *bs)
{
    BdrvChild *child;

    if (bs->force_share) {
        return true;
    }
    QLIST_FOREACH(child, &bs->children, next) {
        if (!(child->role & BDRV_CHILD_COW) && qcow2_is_shared(child->bs)) {
            return true;
        }
    }
    return false;
}

void qcow2_update_compressed_read(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    CompressedReadOptions opts = {
        .cache_size = s->compressed_read_cache_size,
        .cluster_size = s->cluster_size,
        .following = qcow2_following,
        .read = qcow2_co_read_compressed,
        .decompress = qcow2_co_decompress,
    };

    qcow2_free_compressed_read(bs);

    if (qcow2_is_shared(bs) || (bs->open_flags & BDRV_O_INACTIVE) ||
        (s->incompatible_features & QCOW2_INCOMPAT_DATA_FILE)) {
        return;
    }
    if (opts.cache_size == QCOW2_COMPRESSED_CACHE_SIZE_AUTO) {
        opts.cache_size = qcow2_default_compressed_cache_size(bs);
    }
    if (opts.cache_size) {
        s->compressed_reads = cread_new(bs, &opts);
    }
}

void qcow2_free_compressed_read(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    cread_free(s->compressed_reads);
    s->compressed_reads = NULL;
}

void qcow2_drain_begin_compressed_read(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    cread_drained_begin(s->compressed_reads);
    qcow2_drain_begin(bs);
}

void qcow2_drain_end_compressed_read(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;

    cread_drained_end(s->compressed_reads);
    qcow2_drain_end(bs);
}

void qcow2_forget_compressed(BlockDriverState *bs,
                             const Qcow2CompressedAlloc *alloc)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t coffset;
    int csize;

    if (s->compressed_reads && alloc->new_entry) {
        qcow2_parse_compressed_l2_entry(bs, alloc->new_entry, &coffset, &csize);
        cread_forget(s->compressed_reads, coffset, csize);
    }
}

CompressedRead *
qcow2_begin_compressed_read(BlockDriverState *bs, uint64_t l2_entry,
                            int64_t offset, int64_t bytes, int64_t end)
{
    BDRVQcow2State *s = bs->opaque;
    CompressedExtent extent;
    int64_t hole_start = offset;

    if (!s->compressed_reads || !qcow2_get_extent(bs, l2_entry, &extent)) {
        return NULL;
    }
    if (!offset_into_cluster(s, offset)) {
        hole_start = qcow2_get_hole_start(bs, offset);
    }
    return cread_begin(s->compressed_reads, offset, bytes, end, hole_start,
                       extent);
}

BlockStatsSpecific *qcow2_get_all_specific_stats(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    BlockStatsSpecific *stats = qcow2_get_specific_stats(bs);

    if (!s->compressed_reads) {
        return stats;
    }
    if (!stats) {
        stats = g_new0(BlockStatsSpecific, 1);
        stats->driver = BLOCKDEV_DRIVER_QCOW2;
    }
    stats->u.qcow2.compressed_read_cache = cread_get_stats(s->compressed_reads);
    return stats;
}
