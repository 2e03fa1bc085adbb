/*
 * Reading compressed clusters: read ahead, and decompressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A cache for the reads of a format driver whose clusters are compressed and
 * lie anywhere in the file child.  It keeps two kinds of things:
 *
 * - pieces: ranges of the file child that were read with one request, because
 *   the clusters in them follow each other in the image;
 * - decompressed clusters, for readers that want less than a cluster at a time.
 *
 * For each cluster that is to be read, the driver calls cread_begin() in the
 * same critical section in which it looks up where the cluster's compressed
 * data is, and later cread_co_read().  It calls cread_forget() for each range
 * where it has written compressed data.  That is enough, if the compressed data
 * of clusters that are in use changes in no other way.
 *
 * Unless stated otherwise, functions can be called in any thread.
 */

#ifndef BLOCK_COMPRESSED_READ_H
#define BLOCK_COMPRESSED_READ_H

#include "block/block-common.h"
#include "block/graph-lock.h"
#include "qapi/qapi-types-block-core.h"

typedef struct CompressedReadCache CompressedReadCache;

/* A read that was begun */
typedef struct CompressedRead CompressedRead;

/* Where the compressed data of a cluster is in the file child, in bytes */
typedef struct CompressedExtent {
    int64_t offset;
    int64_t bytes;
} CompressedExtent;

/**
 * CompressedReadOptions:
 * @cache_size: memory for pieces and clusters, in bytes; at least two clusters.
 *              What a read needs beyond that, it takes as it would without a
 *              cache: the compressed and the decompressed data of its cluster.
 * @cluster_size: size of a decompressed cluster, in bytes.
 * @idle_ms: after this time without a read, or twice this time, all memory is
 *           given back, in milliseconds of the real-time clock; 0 for 10 s.
 * @following: gives the extents of the compressed clusters of the image that
 *             begin in the guest range from @start to @end, in guest order, at
 *             most @max of them; it can leave out any.  Called by
 *             cread_begin(), in the caller's critical section.  Must not yield.
 *             Returns how many there are.
 * @read: reads @bytes of the file child at @offset.  Returns 0 or -errno.
 * @decompress: decompresses @src into the cluster @dest.  Returns 0 or more on
 *              success, and -errno on failure.
 */
typedef struct CompressedReadOptions {
    int64_t cache_size;
    int64_t cluster_size;
    int64_t idle_ms;
    int GRAPH_RDLOCK_PTR (*following)(BlockDriverState *bs, int64_t start,
                                      int64_t end, CompressedExtent *extents,
                                      int max);
    int coroutine_fn GRAPH_RDLOCK_PTR (*read)(BlockDriverState *bs,
                                              int64_t offset, int64_t bytes,
                                              QEMUIOVector *qiov);
    ssize_t coroutine_fn (*decompress)(BlockDriverState *bs, void *dest,
                                       size_t dest_size, const void *src,
                                       size_t src_size);
} CompressedReadOptions;

/**
 * cread_new:
 * @bs: the node whose file child has the compressed data.
 * @opts: how to behave; copied.  Values outside the ranges given at
 *        CompressedReadOptions are the caller's bug.
 *
 * Returns: an empty cache, to be freed with cread_free() before @bs is gone.
 */
CompressedReadCache *cread_new(BlockDriverState *bs,
                               const CompressedReadOptions *opts);

/**
 * cread_free:
 * @c: the cache, or NULL, which does nothing.
 *
 * Free @c.  No read may be under way, as is the case after a drain.  Called in
 * the main thread, or while it waits for the caller.
 */
void cread_free(CompressedReadCache *c);

/**
 * cread_begin:
 * @c: the cache.
 * @offset: where the read begins in the image.
 * @bytes: how much to read; all of it is in one cluster.
 * @end: where the request of the user ends, that this read is a part of.
 * @hole_start: where the clusters in front of this one begin that are known not
 *              to be compressed; the start of the cluster if there are none.
 * @extent: where the compressed data of the cluster is.
 *
 * Begin to read from a compressed cluster.  Called in the critical section in
 * which @extent was looked up and in which it can't change.  Does not yield.
 *
 * Returns: what cread_co_read() must be called with in any case, and soon,
 * because others can wait for it; NULL if the caller is to read as if there was
 * no cache.
 */
CompressedRead * GRAPH_RDLOCK
cread_begin(CompressedReadCache *c, int64_t offset, int64_t bytes,
            int64_t end, int64_t hole_start, CompressedExtent extent);

/**
 * cread_co_read:
 * @read: what cread_begin() returned; freed.
 * @qiov: filled with the data.
 * @qiov_offset: where in @qiov to begin.
 *
 * Read what cread_begin() was called for.  May also read ahead.
 *
 * Returns: 0 on success, else the negative errno of what reading or
 * decompressing this one cluster returned.
 */
int coroutine_fn GRAPH_RDLOCK
cread_co_read(CompressedRead *read, QEMUIOVector *qiov, size_t qiov_offset);

/**
 * cread_forget:
 * @c: the cache, or NULL, which does nothing.
 * @offset: start of a range of the file child.
 * @bytes: size of the range.
 *
 * No read that begins later uses anything that is known of this range now, nor
 * what requests that are in flight now find there.  To be called
 * - when a write of compressed data was accepted, before other reads can look
 *   up the cluster, if reads find the data from then on; or
 * - when the write is done, also if it failed, before those go on who wait for
 *   it.
 */
void cread_forget(CompressedReadCache *c, int64_t offset, int64_t bytes);

/**
 * cread_drained_begin, cread_drained_end:
 * @c: the cache, or NULL, which does nothing.
 *
 * To be called from BlockDriver.bdrv_drain_begin and .bdrv_drain_end.  In
 * between, nothing is read in the background, so that nobody waits for that or
 * finds it in flight.  In the end all is forgotten.
 */
void cread_drained_begin(CompressedReadCache *c);
void cread_drained_end(CompressedReadCache *c);

/**
 * cread_get_stats:
 * @c: the cache.
 *
 * Returns: its statistics, to be freed with
 * qapi_free_BlockStatsCompressedRead().  The QAPI schema describes them.
 */
BlockStatsCompressedRead *cread_get_stats(CompressedReadCache *c);

#endif /* BLOCK_COMPRESSED_READ_H */
