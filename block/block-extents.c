/*
 * Block status of many extents in one query
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
#include "block/seqcache-compat.h"

/* One extent, from the query that every driver answers */
static int coroutine_fn GRAPH_RDLOCK
co_block_extent(BlockDriverState *bs, int64_t offset, int64_t bytes,
                GArray *extents)
{
    BlockDriverState *file = NULL;
    BdrvBlockExtent extent;
    int64_t map;
    int ret;

    ret = bdrv_co_common_block_status_above(bs, bs, true, BDRV_WANT_PRECISE,
                                            offset, bytes, &extent.bytes, &map,
                                            &file, NULL);
    if (ret < 0) {
        return ret;
    }
    if ((ret & BDRV_BLOCK_OFFSET_VALID) && (file != bs || map != offset)) {
        return -ENOTSUP;
    }
    extent.flags = ret;
    g_array_append_val(extents, extent);
    return 0;
}

static void append_extent(GArray *extents, int64_t bytes, int flags)
{
    BdrvBlockExtent extent = {
        .bytes = bytes,
        /* The only ones that mean the same whoever asks */
        .flags = flags & (BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO),
    };

    g_array_append_val(extents, extent);
}

/*
 * Append what @raw, a driver's answer that begins at @start, says about the
 * bytes up to @end, in whole blocks of @align bytes.  A block that has several
 * statuses is data.  So is the last one if the answer ends inside of it, but if
 * it is not the first one it is better asked for again.
 */
static void append_whole_blocks(GArray *extents, const GArray *raw,
                                int64_t start, int64_t end, int64_t align)
{
    int64_t pos = start;    /* where the driver's extent ends */
    int64_t done = start;   /* where the result ends */

    for (guint i = 0; i < raw->len && done < end; i++) {
        const BdrvBlockExtent *e = &g_array_index(raw, BdrvBlockExtent, i);
        bool last = i == raw->len - 1;
        int64_t whole;

        pos += MIN(e->bytes, end - pos);
        if (!last && e[1].flags == e->flags) {
            continue;
        }

        whole = pos < end ? QEMU_ALIGN_DOWN(pos, align) : end;
        if (whole > done) {
            append_extent(extents, whole - done, e->flags);
            done = whole;
        }
        if (pos > done && (!last || done == start)) {
            int64_t block = MIN(align, end - done);

            append_extent(extents, block, BDRV_BLOCK_DATA);
            done += block;
        }
    }
}

int64_t bdrv_block_extents_align(BlockDriverState *bs)
{
    IO_CODE();
    return MAX(bs->bl.request_alignment, BDRV_SECTOR_SIZE);
}

int coroutine_fn
bdrv_co_block_extents(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      unsigned max, GArray *extents)
{
    g_autoptr(GArray) raw = NULL;
    guint first = extents->len;
    int64_t align = bdrv_block_extents_align(bs);
    int64_t start = QEMU_ALIGN_DOWN(offset, align);
    int64_t len, end;
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
    end = ROUND_UP(offset + bytes, align);

    raw = g_array_new(false, false, sizeof(BdrvBlockExtent));
    if (bs->drv->bdrv_co_block_extents) {
        bdrv_inc_in_flight(bs);
        ret = bs->drv->bdrv_co_block_extents(bs, start, end - start, max, raw);
        bdrv_dec_in_flight(bs);
    } else {
        ret = co_block_extent(bs, start, MIN(end, len) - start, raw);
    }
    if (ret < 0) {
        return ret;
    }

    append_whole_blocks(extents, raw, start, MIN(end, len), align);
    g_array_set_size(extents, MIN(extents->len, first + max));
    return 0;
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
    assert_bdrv_graph_readable();

    if (bs->drv && bs->drv->bdrv_is_disconnected &&
        bs->drv->bdrv_is_disconnected(bs))
    {
        bdrv_block_status_changed(bs);
    }
    return qatomic_read(&bs->block_status_epoch);
}
