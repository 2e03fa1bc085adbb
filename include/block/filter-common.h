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

#include "block/block-common.h"
#include "block/graph-lock.h"

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
