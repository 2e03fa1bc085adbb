/*
 * Block status of many extents in one query
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * bdrv_co_block_status() tells about one extent.  Where asking is slow, and one
 * answer could tell about many (an NBD server), bdrv_co_block_extents() gets
 * all of them.  Whoever keeps the answers must know when they are no longer
 * true: requests through the node itself can be watched by a filter above it,
 * everything else is told by bdrv_block_status_epoch().
 */

#ifndef BLOCK_BLOCK_EXTENTS_H
#define BLOCK_BLOCK_EXTENTS_H

#include "block/block-common.h"
#include "block/graph-lock.h"

/**
 * BdrvBlockExtent: a range of a node whose bytes have the same block status
 * @bytes: its size in bytes; never 0.
 * @flags: of BDRV_BLOCK_DATA and BDRV_BLOCK_ZERO, with the meaning that
 *         include/block/block-common.h gives them.
 */
typedef struct BdrvBlockExtent {
    int64_t bytes;
    int flags;
} BdrvBlockExtent;

/**
 * bdrv_block_extents_align:
 * @bs: the node.
 *
 * Returns: the size of the blocks in whose multiples bdrv_co_block_extents()
 * tells about @bs, in bytes: a sector or a block of the node, whatever is
 * larger.
 */
int64_t bdrv_block_extents_align(BlockDriverState *bs);

/**
 * bdrv_co_block_extents:
 * @bs: the node.
 * @offset: start of the range, in bytes.
 * @bytes: size of the range, in bytes.  It may reach beyond the end of @bs.
 * @max: how many extents are wanted at most; at least 1.
 * @extents: an array of BdrvBlockExtent.  The extents are appended to it.
 *
 * Ask for the precise block status of a range, which is rounded out to whole
 * blocks of bdrv_block_extents_align(), and cut at the end of @bs.  The extents
 * follow each other from its start on, and consist of whole blocks; a block
 * that has more than one status is data.  They need not reach to the end of the
 * range, but there is always at least one, unless the range has no byte inside
 * of @bs.  They never reach beyond the range.  Neighbours can have the same
 * flags.
 *
 * A driver answers with its .bdrv_co_block_extents callback.  Without one this
 * is a single query for the block status.
 *
 * Counts as an in-flight request of @bs.  Can be called in any AioContext.
 *
 * Returns: 0 on success; -ENOTSUP if the answer must not be kept, or would not
 * be about @bs alone (it has children); another negative errno if the query
 * failed.  @extents is unchanged on failure.
 */
int coroutine_fn GRAPH_RDLOCK
bdrv_co_block_extents(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      unsigned max, GArray *extents);

/**
 * bdrv_block_status_changed:
 * @bs: the node.
 *
 * Tell that any block status of @bs can have changed without a request to it:
 * it is new, or its driver has connected to a server again.  Called by drivers
 * before the first answer after the change.  Thread-safe.
 */
void bdrv_block_status_changed(BlockDriverState *bs);

/**
 * bdrv_block_status_epoch:
 * @bs: the node.
 *
 * To be called before a remembered block status of @bs is given as an answer.
 * The driver looks whether its server is still there, without waiting.
 * Thread-safe.
 *
 * Returns: a number that is another one after bdrv_block_status_changed(),
 * another one for each node, and another one each time while the server of @bs
 * is known to be gone: then the next one can be another server.
 */
unsigned GRAPH_RDLOCK bdrv_block_status_epoch(BlockDriverState *bs);

#endif /* BLOCK_BLOCK_EXTENTS_H */
