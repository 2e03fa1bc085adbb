/*
 * qcow2: cache for reads of compressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The glue between qcow2 and block/compressed-read.c.
 */

#ifndef BLOCK_QCOW2_COMPRESSED_READ_H
#define BLOCK_QCOW2_COMPRESSED_READ_H

#include "block/compressed-read.h"

/**
 * qcow2_update_compressed_read:
 * @bs: the node; nobody is using it.
 *
 * Begin with an empty cache, or with none, as the node's options and the nodes
 * below say (see compressed-read-cache-size in qapi/block-core.json).  An
 * inactive node has none.
 */
void GRAPH_RDLOCK qcow2_update_compressed_read(BlockDriverState *bs);

/**
 * qcow2_begin_compressed_read:
 * @bs: the node; s->lock is held since @l2_entry was looked up.
 * @l2_entry: entry of a compressed cluster; nothing of it is in the cache for
 *            compressed writes.
 * @offset: guest offset of a read.
 * @bytes: how much to read of this cluster.
 * @end: guest offset where the request ends.
 *
 * Returns: what cread_begin() returns; NULL if the node has no cache.
 */
CompressedRead * GRAPH_RDLOCK
qcow2_begin_compressed_read(BlockDriverState *bs, uint64_t l2_entry,
                            int64_t offset, int64_t bytes, int64_t end);

/**
 * qcow2_drain_begin_compressed_read, qcow2_drain_end_compressed_read:
 * @bs: the node.
 *
 * BlockDriver.bdrv_drain_begin and .bdrv_drain_end of qcow2: those of both
 * caches.
 */
void qcow2_drain_begin_compressed_read(BlockDriverState *bs);
void qcow2_drain_end_compressed_read(BlockDriverState *bs);

/**
 * qcow2_forget_compressed:
 * @bs: the node; s->lock is held.
 * @alloc: of a compressed write that has just allocated its space, or whose
 *         data is in the file, or that has failed.
 *
 * Forget what the cache has of its space.
 */
void GRAPH_RDLOCK
qcow2_forget_compressed(BlockDriverState *bs,
                        const Qcow2CompressedAlloc *alloc);

/**
 * qcow2_free_compressed_read:
 * @bs: the node; it is drained.
 *
 * Free the cache, if there is one.
 */
void qcow2_free_compressed_read(BlockDriverState *bs);

/**
 * qcow2_get_all_specific_stats:
 * @bs: the node.
 *
 * Returns: the node's driver-specific statistics: those of
 * qcow2_get_specific_stats() and of this cache; NULL if it has neither.
 */
BlockStatsSpecific *qcow2_get_all_specific_stats(BlockDriverState *bs);

#endif /* BLOCK_QCOW2_COMPRESSED_READ_H */
