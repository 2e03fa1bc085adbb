/*
 * qcow2: cache for compressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The glue between qcow2 and the write-behind engine.  All functions take a
 * qcow2 node; where the node has no cache for compressed clusters, they do what
 * qcow2 does without one.
 */

#ifndef BLOCK_QCOW2_WRITE_BEHIND_H
#define BLOCK_QCOW2_WRITE_BEHIND_H

#include "block/write-behind.h"

/* The value of the option compressed-cache-size while it is not given */
#define QCOW2_COMPRESSED_CACHE_SIZE_AUTO (-1)

/**
 * qcow2_compressed_cache_size:
 * @bs: the node; its header has been read.
 * @opts: its runtime options.
 * @name: name of the option, of a cache for compressed clusters.
 * @size: set to the value of the option in bytes, or to
 *        QCOW2_COMPRESSED_CACHE_SIZE_AUTO if it is not given.
 * @errp: set if the value is not acceptable for this image.
 *
 * Returns: true on success.
 */
bool qcow2_compressed_cache_size(BlockDriverState *bs, QemuOpts *opts,
                                 const char *name, int64_t *size, Error **errp);

/**
 * qcow2_default_compressed_cache_size:
 * @bs: the node.
 *
 * Returns: the size of a cache for compressed clusters whose option is not
 * given, in bytes: 0 if the host has all data below in its page cache.
 */
int64_t GRAPH_RDLOCK qcow2_default_compressed_cache_size(BlockDriverState *bs);

/**
 * qcow2_update_write_behind:
 * @bs: the node; nobody is using it, and everything was flushed.
 * @flags: the flags that it is being (re)opened with (BDRV_O_*).
 *
 * Create, replace or remove the cache, so that it is as the node's options, the
 * flags and the nodes below say (see compressed-cache-size in
 * qapi/block-core.json).  One that has the right size, or data, is kept.
 */
void GRAPH_RDLOCK qcow2_update_write_behind(BlockDriverState *bs, int flags);

/**
 * qcow2_flush_write_behind:
 * @bs: the node.
 * @end_stream: whether nothing will continue what was written last, as for
 *              wb_end_streams().
 *
 * Write everything to the file that is in the cache; see wb_flush().  Does not
 * flush the file.  s->lock can be held.
 *
 * Returns: 0 on success, also if the node has no cache; -errno on failure.
 */
int coroutine_mixed_fn GRAPH_RDLOCK
qcow2_flush_write_behind(BlockDriverState *bs, bool end_stream);

/**
 * qcow2_close_write_behind:
 * @bs: the node; it is being closed.
 *
 * Write everything to the file that is in the cache, and report if that fails.
 * The cache stays, for what the caller still has to write.
 */
void coroutine_mixed_fn GRAPH_RDLOCK
qcow2_close_write_behind(BlockDriverState *bs);

/**
 * qcow2_co_write_compressed:
 * @bs: the node; s->lock is not held, and the node has a cache.
 * @offset: guest offset of the cluster.
 * @buf: compressed data; copied.
 * @bytes: size of the compressed data.
 * @allocs: array of Qcow2CompressedAlloc; what is allocated is appended.
 *
 * Allocate space for a compressed cluster and accept its data.  On failure, the
 * caller undoes everything in @allocs.
 *
 * Returns: 0 on success, -errno on failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_write_compressed(BlockDriverState *bs, uint64_t offset,
                          const void *buf, int bytes, GArray *allocs);

/**
 * qcow2_co_write_incompressible:
 * @bs: the node; s->lock is not held, and the node has a cache.
 * @offset: guest offset of a cluster.
 * @buf: the data of the whole cluster; copied.
 *
 * Allocate a normal cluster and accept its data.  That is done if nothing is
 * allocated for the guest cluster and no write in flight touches it, and if the
 * image is not encrypted.
 *
 * Returns: 0 on success; 1 if nothing was done, so that the caller must write
 * the cluster; -errno on failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_write_incompressible(BlockDriverState *bs, uint64_t offset,
                              const void *buf);

/**
 * qcow2_co_read_normal:
 * @bs: the node; s->lock is held since @host_offset was looked up, and the
 *      cache has taken normal clusters.
 * @host_offset: where to read in the file; in normal clusters.
 * @bytes: how much to read; set to the size of the first piece.
 * @qiov: filled with the piece if it is cached.
 * @qiov_offset: where in @qiov to begin.
 *
 * Read what is cached at the start of a range of normal clusters; see
 * wb_read_piece().
 *
 * Returns: true if the piece was read; false if it is in the file, also when
 * the caller reads it after it has released s->lock.
 */
bool coroutine_fn
qcow2_co_read_normal(BlockDriverState *bs, uint64_t host_offset,
                     unsigned *bytes, QEMUIOVector *qiov, size_t qiov_offset);

/**
 * qcow2_co_write_out:
 * @bs: the node; s->lock is held since @host_offset was looked up.
 * @host_offset: start of a range in the file, in normal clusters.
 * @bytes: its size.
 * @may_unlock: whether s->lock may be released meanwhile, so that others need
 *              not wait.
 *
 * Write out what is cached of the clusters that the range touches, because the
 * caller accesses them in the file; also after it has released s->lock.
 *
 * Returns: 0 on success, also if the node has no cache; 1 if s->lock was
 * released, so that the caller must look up @host_offset again; -errno on
 * failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_write_out(BlockDriverState *bs, uint64_t host_offset, uint64_t bytes,
                   bool may_unlock);

/**
 * qcow2_has_dirty_cache:
 * @bs: the node; s->lock is held.
 *
 * Returns: whether there is data in the cache that may not be in the file, so
 * that a hole in the file can be in a cluster that has data.
 */
bool qcow2_has_dirty_cache(BlockDriverState *bs);

/**
 * qcow2_co_read_cached:
 * @bs: the node; s->lock is held since @l2_entry was looked up.
 * @l2_entry: entry of a compressed cluster.
 * @buf: set to the whole compressed data of the cluster if any of it is in the
 *       cache, to be freed with g_free(); else to NULL.
 *
 * Read compressed data that must be read before s->lock is released, because
 * the cache drops it when the cluster is freed.
 *
 * Returns: 0 on success, -errno on failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_read_cached(BlockDriverState *bs, uint64_t l2_entry, uint8_t **buf);

/**
 * qcow2_co_settle:
 * @bs: the node.
 * @mode: what to do about cached data.
 *
 * See bdrv_co_settle().
 *
 * Returns: what wb_co_settle() returns; 0 if the node has no cache.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_settle(BlockDriverState *bs, BdrvSettleMode mode);

/**
 * qcow2_cancel_in_flight:
 * @bs: the node.
 *
 * Write no more of the cached data than necessary, as long as a job that is
 * being cancelled waits for its requests.
 */
void GRAPH_RDLOCK qcow2_cancel_in_flight(BlockDriverState *bs);

/**
 * qcow2_drain_begin, qcow2_drain_end:
 * @bs: the node.
 *
 * Nothing is written in the background while the node is drained.
 */
void qcow2_drain_begin(BlockDriverState *bs);
void qcow2_drain_end(BlockDriverState *bs);

/**
 * qcow2_drop_write_behind:
 * @bs: the node; its image failed as corrupt, so that it has no driver any
 *      more, and it is drained.
 *
 * Free the cache.  Its data is lost, which is reported.  Called in the main
 * thread, without the graph lock.
 */
void qcow2_drop_write_behind(BlockDriverState *bs);

/**
 * qcow2_get_specific_stats:
 * @bs: the node.
 *
 * Returns: the node's driver-specific statistics; NULL if it has no cache.
 */
BlockStatsSpecific *qcow2_get_specific_stats(BlockDriverState *bs);

#endif /* BLOCK_QCOW2_WRITE_BEHIND_H */
