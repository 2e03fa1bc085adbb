/*
 * What the filters seqcache and cacheextents both need
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/filter-common.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"

int bdrv_filter_open_child(BlockDriverState *bs, QDict *options, Error **errp)
{
    BlockDriverState *child;
    int ret;

    GLOBAL_STATE_CODE();

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        return ret;
    }

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    child = bs->file->bs;

    /* A flush of the filter replaces FUA if the child does not support it */
    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED |
        (child->supported_write_flags & BDRV_REQ_FUA);
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED |
        (child->supported_zero_flags &
         (BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK));
    bs->supported_truncate_flags = child->supported_truncate_flags &
                                   BDRV_REQ_ZERO_WRITE;
    return 0;
}

bool bdrv_has_other_parent(BlockDriverState *bs, BdrvChild *c, uint64_t perm)
{
    BdrvChild *p;

    QLIST_FOREACH(p, &bs->parents, next_parent) {
        if (p != c && (p->perm & perm)) {
            return true;
        }
    }
    return false;
}

/* bdrv_get_info() would know, but cannot be called by a graph writer */
static int64_t GRAPH_RDLOCK stream_optimized_cluster_size(BlockDriverState *bs)
{
    g_autoptr(ImageInfoSpecific) info = NULL;
    VmdkExtentInfoList *extent;
    int64_t size = 0;

    if (!bs->drv || strcmp(bs->drv->format_name, "vmdk")) {
        return 0;
    }
    info = bdrv_get_specific_info(bs, NULL);
    for (extent = info->u.vmdk.data->extents; extent; extent = extent->next) {
        if (extent->value->compressed) {
            size = MAX(size, extent->value->cluster_size);
        }
    }
    return size;
}

/*
 * The size of the clusters of @bs if it can be written to only once; else 0.
 * Only filters and raw nodes can be between.
 */
static int64_t GRAPH_RDLOCK write_once_size(BlockDriverState *bs)
{
    while (bs && bs->drv) {
        if (!strcmp(bs->drv->format_name, "compress")) {
            return bs->bl.request_alignment;
        }
        if (!bs->drv->is_filter && strcmp(bs->drv->format_name, "raw")) {
            return stream_optimized_cluster_size(bs);
        }
        bs = bdrv_primary_bs(bs);
    }
    return 0;
}

void bdrv_write_once_refresh_limits(BlockDriverState *bs, Error **errp)
{
    GLOBAL_STATE_CODE();

    if (bs->file) {
        bs->bl.request_alignment = MAX(bs->bl.request_alignment,
                                       write_once_size(bs->file->bs));
    }
}
