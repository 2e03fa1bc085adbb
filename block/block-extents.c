/*
 * Block status of many extents in one question
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/block-extents.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/coroutines.h"

/* The only flags that mean the same whoever asks, and when */
#define EXTENT_FLAGS (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | \
                      BDRV_BLOCK_OFFSET_VALID)

/* One extent, from the question that every driver answers */
static int coroutine_fn GRAPH_RDLOCK
co_block_extent(BlockDriverState *bs, int64_t offset, int64_t bytes,
                GArray *extents)
{
    BlockDriverState *file = NULL;
    BdrvBlockExtent extent;
    int64_t map;
    int ret;

    ret = bdrv_co_common_block_status_above(bs, bs, true, true, offset, bytes,
                                            &extent.bytes, &map, &file, NULL);
    if (ret < 0) {
        return ret;
    }
    if ((ret & BDRV_BLOCK_OFFSET_VALID) && (file != bs || map != offset)) {
        return -ENOTSUP;
    }
    if (extent.bytes) {
        extent.flags = ret & EXTENT_FLAGS;
        g_array_append_val(extents, extent);
    }
    return 0;
}

/*
 * Remove @head bytes from the start of the extents from index @first on, and
 * what lies more than @bytes after that
 */
static void clamp_extents(GArray *extents, guint first, int64_t head,
                          int64_t bytes)
{
    guint i;

    for (i = first; i < extents->len && bytes; i++) {
        BdrvBlockExtent *extent = &g_array_index(extents, BdrvBlockExtent, i);

        /* The first extent covers at least one block, @head is less */
        extent->bytes = MIN(extent->bytes - head, bytes);
        bytes -= extent->bytes;
        head = 0;
    }
    g_array_set_size(extents, i);
}

int coroutine_fn
bdrv_co_block_extents(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      unsigned max, GArray *extents)
{
    guint first = extents->len;
    int64_t len, start, align;
    int ret;

    IO_CODE();
    assert_bdrv_graph_readable();
    assert(max);

    len = bdrv_co_getlength(bs);
    if (len < 0) {
        return len;
    }
    if (!QLIST_EMPTY(&bs->children)) {
        return -ENOTSUP;
    }
    if (offset >= len || !bytes) {
        return 0;
    }
    bytes = MIN(bytes, len - offset);

    if (!bs->drv->bdrv_co_block_extents) {
        return co_block_extent(bs, offset, bytes, extents);
    }

    align = bs->bl.request_alignment;
    start = QEMU_ALIGN_DOWN(offset, align);

    bdrv_inc_in_flight(bs);
    ret = bs->drv->bdrv_co_block_extents(bs, start,
                                         ROUND_UP(offset + bytes, align) -
                                         start, max, extents);
    bdrv_dec_in_flight(bs);
    if (ret >= 0) {
        clamp_extents(extents, first, offset - start, bytes);
        ret = 0;
    }
    return ret;
}

void bdrv_block_status_changed(BlockDriverState *bs)
{
    static unsigned epochs;

    IO_OR_GS_CODE();
    qatomic_set(&bs->block_status_epoch, qatomic_inc_fetch(&epochs));
}

unsigned bdrv_block_status_epoch(BlockDriverState *bs)
{
    IO_CODE();
    return qatomic_read(&bs->block_status_epoch);
}
