/*
 * A seqcache node above a disk in memory, for tests
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qemu/units.h"
#include "seqcache-test.h"

void seqcache_set_up(SeqCacheTest *t, const SeqCacheConfig *config)
{
    QDict *opts = qdict_new();

    t->disk_bs = disk_new(&bdrv_disk, "disk", &config->disk);
    t->disk = t->disk_bs->opaque;

    qdict_put_str(opts, "driver", "seqcache");
    qdict_put_str(opts, "node-name", "cache");
    qdict_put_str(opts, "file", "disk");
    qdict_put_int(opts, "cluster-size", config->cluster_size);
    qdict_put_int(opts, "cache-size", config->cache_size);
    t->bs = bdrv_open(NULL, NULL, opts, BDRV_O_RDWR | BDRV_O_UNMAP,
                      &error_abort);

    t->blk = user_new(t->bs);
    t->shadow = g_malloc0(DISK_MAX_SIZE);
}

void seqcache_tear_down(SeqCacheTest *t)
{
    blk_unref(t->blk);
    bdrv_unref(t->bs);
    bdrv_unref(t->disk_bs);
    g_free(t->shadow);
}

int seqcache_reopen(SeqCacheTest *t, int64_t cluster_size, int64_t cache_size)
{
    QDict *opts = qdict_new();

    qdict_put_int(opts, "cluster-size", cluster_size);
    qdict_put_int(opts, "cache-size", cache_size);
    return bdrv_reopen(t->bs, opts, true, NULL);
}

BlockStatsWriteBehind seqcache_stats(SeqCacheTest *t)
{
    BlockStatsSpecific *stats = bdrv_get_specific_stats(t->bs);
    BlockStatsWriteBehind result = stats->u.seqcache;

    qapi_free_BlockStatsSpecific(stats);
    return result;
}

void read_ok(SeqCacheTest *t, int64_t offset, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    g_assert_cmpint(blk_pread(t->blk, offset, bytes, buf, 0), ==, 0);
    assert_bytes(buf, t->shadow + offset, offset, bytes, "read");
}

void flush_ok(SeqCacheTest *t)
{
    g_assert_cmpint(blk_flush(t->blk), ==, 0);
}

void check_all(SeqCacheTest *t)
{
    read_ok(t, 0, DISK_MAX_SIZE);
    flush_ok(t);
    read_ok(t, 0, DISK_MAX_SIZE);
    assert_bytes(t->disk->data, t->shadow, 0, DISK_MAX_SIZE, "disk");
    assert_bytes(t->disk->stable, t->shadow, 0, DISK_MAX_SIZE, "stable");
}
