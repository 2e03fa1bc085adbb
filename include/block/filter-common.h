/*
 * What the filters seqcache and cacheextents both need
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_FILTER_COMMON_H
#define BLOCK_FILTER_COMMON_H

#include "block/block_int-common.h"

/**
 * bdrv_filter_open_child:
 * @bs: a filter node that is being opened.
 * @options: its options; what is for the child is taken out.
 * @errp: set on failure.
 *
 * Open the child "file", and let @bs support those flags of requests that a
 * filter can pass on and that its child supports.  Called in the main thread,
 * without the graph lock.
 *
 * Returns: 0 on success, -errno on failure.
 */
int bdrv_filter_open_child(BlockDriverState *bs, QDict *options, Error **errp);

/**
 * bdrv_has_other_parent:
 * @bs: a node.
 * @c: how one of its parents refers to it, or NULL.
 * @perm: permissions (BLK_PERM_*).
 *
 * Returns: whether any of these permissions was given to a parent of @bs other
 * than @c.
 */
bool GRAPH_RDLOCK bdrv_has_other_parent(BlockDriverState *bs, BdrvChild *c,
                                        uint64_t perm);

/**
 * bdrv_has_rival:
 * @c: how a filter refers to its child.
 * @perm: permissions (BLK_PERM_*).
 *
 * Returns: whether any of these permissions on the child was given to somebody
 * else, and the filter lets others write there.
 */
static inline bool GRAPH_RDLOCK bdrv_has_rival(BdrvChild *c, uint64_t perm)
{
    return (c->shared_perm & BLK_PERM_WRITE) &&
           bdrv_has_other_parent(c->bs, c, perm);
}

/**
 * bdrv_write_once_refresh_limits:
 * @bs: a filter node.
 * @errp: unused.
 *
 * BlockDriver.bdrv_refresh_limits of both filters.
 *
 * The filter "compress" and a stream-optimized VMDK image refuse to write to a
 * cluster that was written already.  So does everything above them, if there
 * are only filters and raw nodes between.  A client gets through if it writes
 * whole clusters, for which it must be told their size: raise the request
 * alignment of @bs to it.  Called in the main thread.
 */
void GRAPH_RDLOCK bdrv_write_once_refresh_limits(BlockDriverState *bs,
                                                 Error **errp);

#endif /* BLOCK_FILTER_COMMON_H */
