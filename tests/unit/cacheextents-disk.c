/*
 * A disk in memory that knows its block status, for tests of cacheextents
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-extents.h"
#include "cacheextents-disk.h"
#include "qobject/qdict.h"

/* d->disk.lock is held for all functions whose names say so */
static void disk_set_locked(ExtentsDisk *d, int64_t block, int flags)
{
    Status *h = d->history[block];

    memmove(h, h + 1, (HISTORY - 1) * sizeof(*h));
    h[HISTORY - 1] = (Status) { .since = ++d->now, .flags = flags };
}

int64_t disk_unit(ExtentsDisk *d)
{
    return MAX(d->disk.config.align, BDRV_SECTOR_SIZE);
}

int64_t disk_max_len(ExtentsDisk *d)
{
    return MAX_BLOCKS * d->config.grain;
}

/* A request has changed bytes; units that it has a part of count as a whole */
static void disk_note_change_locked(ExtentsDisk *d, int64_t offset,
                                    int64_t bytes)
{
    int64_t end = MIN(offset + bytes, disk_max_len(d));

    d->now++;
    for (int64_t i = offset / disk_unit(d); i * disk_unit(d) < end; i++) {
        uint64_t *times = d->changes[i];

        memmove(times, times + 1, (CHANGES_KEPT - 1) * sizeof(*times));
        times[CHANGES_KEPT - 1] = d->now;
    }
}

static bool disk_random_locked(ExtentsDisk *d, int percent)
{
    return d->config.random && disk_chance_locked(&d->disk, percent);
}

static void coroutine_fn disk_wait_query_locked(ExtentsDisk *d,
                                                const unsigned *hold)
{
    disk_wait_locked(&d->disk, hold, DISK_STATUS);
    disk_delay_locked(&d->disk);
}

/* ---- Queries ---- */

/* The extent that begins at @offset, at most to @end */
static BdrvBlockExtent disk_extent_locked(ExtentsDisk *d, int64_t offset,
                                          int64_t end)
{
    int64_t block = offset / d->config.grain;
    int flags = d->history[block][HISTORY - 1].flags;

    do {
        block++;
    } while (block * d->config.grain < end && !disk_random_locked(d, 3) &&
             d->history[block][HISTORY - 1].flags == flags);
    return (BdrvBlockExtent) {
        .flags = flags, .bytes = MIN(block * d->config.grain, end) - offset,
    };
}

static int coroutine_fn
extents_co_block_extents(BlockDriverState *bs, int64_t offset, int64_t bytes,
                         unsigned max, GArray *extents)
{
    ExtentsDisk *d = bs->opaque;
    guint first = extents->len;
    int64_t end = offset + MIN(bytes, d->config.reach ?: bytes);
    unsigned connection;

    g_assert(QEMU_IS_ALIGNED(offset | bytes, bs->bl.request_alignment));
    QEMU_LOCK_GUARD(&d->disk.lock);
    do {
        int64_t pos = offset;

        g_array_set_size(extents, first);
        d->nb_queries++;
        d->nb_many += max > 1;
        d->asked_offset = offset;
        d->asked_bytes = bytes;
        disk_wait_query_locked(d, &d->disk.hold);
        if (d->query_error || disk_random_locked(d, d->disk.percent_bad)) {
            return d->query_error ?: -EIO;
        }
        if (max > 1 && d->config.many_error) {
            return d->config.many_error;
        }
        connection = d->connection;
        /* The server needs not look at everything at the same time */
        while (pos < end && extents->len < first + max &&
               (pos == offset || !disk_random_locked(d, 2))) {
            BdrvBlockExtent e = disk_extent_locked(d, pos, end);

            g_array_append_val(extents, e);
            d->nb_answered++;
            pos += e.bytes;
            if (disk_random_locked(d, 5)) {
                disk_delay_locked(&d->disk);
            }
        }
        disk_wait_query_locked(d, &d->disk.hold_after);
    } while (connection != d->connection);
    return 0;
}

static int coroutine_fn
extents_co_block_status(BlockDriverState *bs, BdrvStatusMode mode,
                        int64_t offset, int64_t bytes, int64_t *pnum,
                        int64_t *map, BlockDriverState **file)
{
    g_autoptr(GArray) extents = g_array_new(false, false,
                                            sizeof(BdrvBlockExtent));
    int ret = extents_co_block_extents(bs, offset, bytes, 1, extents);
    const BdrvBlockExtent *e = (const BdrvBlockExtent *)extents->data;

    if (ret < 0) {
        return ret;
    }
    *map = offset;
    *file = bs;
    *pnum = mode & BDRV_WANT_ZERO ? e->bytes : bytes;
    return mode & BDRV_WANT_ZERO ? e->flags : DATA;
}

static bool extents_is_disconnected(BlockDriverState *bs)
{
    ExtentsDisk *d = bs->opaque;

    return qatomic_read(&d->disconnected);
}

/* ---- Changes ---- */

static void disk_truncated_locked(ExtentsDisk *d, int64_t len)
{
    int64_t old = d->disk.len;

    if (len > old && old % d->config.grain) {
        disk_set_locked(d, old / d->config.grain, DATA);
    }
    for (int64_t block = DIV_ROUND_UP(len, d->config.grain);
         block < MAX_BLOCKS; block++) {
        disk_set_locked(d, block, ZERO);
    }
}

/* Blocks that are not covered in whole become data; a discard leaves them */
static void disk_changed_locked(Disk *disk, const DiskChange *c, int64_t start,
                                int64_t bytes)
{
    ExtentsDisk *d = container_of(disk, ExtentsDisk, disk);
    int64_t end = c->offset + start + bytes;

    start += c->offset;
    if (!bytes) {
        if (c->kind == DISK_TRUNCATE) {
            disk_truncated_locked(d, c->offset);
        }
        disk_note_change_locked(d, c->kind == DISK_TRUNCATE ? 0 : c->offset,
                                c->bytes);
    } else if (c->kind != DISK_TRUNCATE) {
        for (int64_t block = start / d->config.grain;
             block * d->config.grain < end; block++) {
            int64_t pos = block * d->config.grain;

            if (pos >= start && pos + d->config.grain <= end) {
                disk_set_locked(d, block, c->kind == DISK_WRITE ? DATA :
                                c->kind == DISK_ZERO && !c->unmap ? DATA_ZERO :
                                c->kind == DISK_ZERO ||
                                disk_random_locked(d, 50) ? ZERO : UNKNOWN);
            } else if (c->kind != DISK_DISCARD) {
                disk_set_locked(d, block, DATA);
            }
        }
    }
}

/* ---- The driver ---- */

static int extents_open(BlockDriverState *bs, QDict *options, int flags,
                        Error **errp)
{
    const ExtentsConfig *config =
        (const ExtentsConfig *)(uintptr_t)qdict_get_int(options, "config");
    DiskConfig disk_config = {
        .len = config->len, .max_len = MAX_BLOCKS * config->grain,
        .align = config->align ?: BDRV_SECTOR_SIZE, .unaligned_copies = true,
    };
    ExtentsDisk *d = bs->opaque;
    int ret;

    qdict_put_int(options, "config", (uintptr_t)&disk_config);
    ret = bdrv_disk.bdrv_open(bs, options, flags, errp);
    d->config = *config;
    d->disk.changed = disk_changed_locked;
    d->disk.grain = config->grain;
    d->disk.overlap = true;
    d->disk.max_hops = config->random ? 2 : 0;
    d->changes = g_malloc0_n(DIV_ROUND_UP(disk_max_len(d), disk_unit(d)),
                             sizeof(*d->changes));
    for (int64_t block = 0; block < MAX_BLOCKS; block++) {
        disk_set_locked(d, block, block % 2 || !config->even ? ZERO :
                                  config->even);
    }
    return ret;
}

static void extents_close(BlockDriverState *bs)
{
    ExtentsDisk *d = bs->opaque;

    g_free(d->changes);
    bdrv_disk.bdrv_close(bs);
}

/* One that knows queries for many extents, and one that does not */
static BlockDriver bdrv_extents, bdrv_extents_one;

void extents_disk_init(void)
{
    bdrv_graph_wrlock();
    bdrv_extents_one = bdrv_disk;
    bdrv_extents_one.instance_size = sizeof(ExtentsDisk);
    bdrv_extents_one.bdrv_open = extents_open;
    bdrv_extents_one.bdrv_close = extents_close;
    bdrv_extents_one.bdrv_co_block_status = extents_co_block_status;
    bdrv_extents = bdrv_extents_one;
    bdrv_extents.bdrv_co_block_extents = extents_co_block_extents;
    bdrv_extents.bdrv_is_disconnected = extents_is_disconnected;
    bdrv_graph_wrunlock();
}

/* ---- What tests do with it ---- */

BlockDriverState *extents_disk_new(const char *name,
                                   const ExtentsConfig *config)
{
    g_assert(config->len <= MAX_BLOCKS * config->grain);
    return disk_new(config->one ? &bdrv_extents_one : &bdrv_extents, name,
                    config);
}

void disk_set(ExtentsDisk *d, int64_t offset, int64_t bytes, int flags)
{
    QEMU_LOCK_GUARD(&d->disk.lock);
    for (int64_t b = offset / d->config.grain;
         b * d->config.grain < offset + bytes; b++) {
        disk_set_locked(d, b, flags);
    }
}

uint64_t disk_now(ExtentsDisk *d)
{
    QEMU_LOCK_GUARD(&d->disk.lock);
    return d->now;
}

bool disk_was(ExtentsDisk *d, uint64_t start, int64_t offset, int flags)
{
    const uint64_t *changes = d->changes[offset / disk_unit(d)];
    const Status *h = d->history[offset / d->config.grain];

    QEMU_LOCK_GUARD(&d->disk.lock);
    if (flags == DATA && (d->config.one || d->config.grain % disk_unit(d))) {
        return true;
    }
    if (flags != UNKNOWN) {
        int i = CHANGES_KEPT - 1;

        while (i >= 0 && changes[i] > start) {
            i--;
        }
        start = i >= 0 ? changes[i] : 0;
    }
    for (int i = HISTORY - 1; i >= 0; i--) {
        if (h[i].flags == flags) {
            return true;
        }
        if (h[i].since <= start) {
            return false;
        }
    }
    /* Too long ago */
    return true;
}

void disk_reconnect(BlockDriverState *bs)
{
    static const int states[] = { DATA, ZERO, UNKNOWN, DATA_ZERO };
    ExtentsDisk *d = bs->opaque;

    QEMU_LOCK_GUARD(&d->disk.lock);
    bdrv_block_status_changed(bs);
    d->connection++;
    for (int64_t b = 0; b < MAX_BLOCKS; b++) {
        disk_set_locked(d, b, states[g_rand_int_range(d->disk.rand, 0, 4)]);
    }
    disk_note_change_locked(d, 0, disk_max_len(d));
}
