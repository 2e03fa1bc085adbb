/*
 * Write-behind: reading, from the cache and from the child
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is cached is newer than the child, and can leave the cache as soon as
 * the lock is released.  So a read first copies everything that is cached, in
 * one go, and then reads what is between from the child, piece by piece.
 */

#include "qemu/osdep.h"

#include "block/block_int.h"
#include "block/write-behind-int.h"

/* A part of a read request that is not cached */
typedef struct WriteBehindGap {
    int64_t start; /* from the start of the read request */
    int64_t bytes;
} WriteBehindGap;

/*
 * Read what is cached, append the rest to @gaps.  Called with wb->lock held.
 *
 * Returns: how many bytes were found.
 */
static int64_t wb_read_cached_locked(WriteBehind *wb, int64_t offset,
                                     int64_t bytes, QEMUIOVector *qiov,
                                     size_t qiov_offset, GArray *gaps)
{
    WriteBehindGap gap = { .start = 0 };
    int64_t found = 0;

    while (gap.start < bytes) {
        int64_t pos = offset + gap.start;
        int64_t n = seqcache_read(wb->cache, pos, bytes - gap.start, qiov,
                                  qiov_offset + gap.start);

        found += n;
        gap.start += n;
        pos += n;
        gap.bytes = seqcache_gap(wb->cache, pos, bytes - gap.start);
        if (wb->pad && n && pos % wb->cluster_size) {
            /* Nobody stores anything between a stream and its cluster's end */
            int64_t rest = wb->cluster_size - pos % wb->cluster_size;

            n = MIN(gap.bytes, rest);
            qemu_iovec_memset(qiov, qiov_offset + gap.start, 0, n);
            found += n;
            gap.start += n;
            gap.bytes -= n;
        }
        if (gap.bytes) {
            g_array_append_val(gaps, gap);
            gap.start += gap.bytes;
        }
    }
    return found;
}

int coroutine_fn wb_co_preadv_part(WriteBehind *wb,
                                   int64_t offset, int64_t bytes,
                                   QEMUIOVector *qiov, size_t qiov_offset,
                                   BdrvRequestFlags flags)
{
    g_autoptr(GArray) gaps = NULL;
    int ret;

    WITH_QEMU_LOCK_GUARD(&wb->lock) {
        if (seqcache_gap(wb->cache, offset, bytes) < bytes) {
            gaps = g_array_new(false, false, sizeof(WriteBehindGap));
            wb->stats.read_hits++;
            wb->stats.read_hit_bytes +=
                wb_read_cached_locked(wb, offset, bytes, qiov, qiov_offset,
                                      gaps);
        }
    }

    if ((!gaps || gaps->len) && !wb->bs->file) {
        return -ENOMEDIUM;
    }
    if (!gaps) {
        return bdrv_co_preadv_part(wb->bs->file, offset, bytes, qiov,
                                   qiov_offset, flags);
    }

    for (guint i = 0; i < gaps->len; i++) {
        WriteBehindGap *gap = &g_array_index(gaps, WriteBehindGap, i);

        ret = bdrv_co_preadv_part(wb->bs->file, offset + gap->start, gap->bytes,
                                  qiov, qiov_offset + gap->start, flags);
        if (ret < 0) {
            return ret;
        }
    }

    return 0;
}

bool coroutine_fn wb_read_piece(WriteBehind *wb, int64_t offset, int64_t *bytes,
                                QEMUIOVector *qiov, size_t qiov_offset)
{
    int64_t found;

    if (wb_is_empty(wb)) {
        return false;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    found = seqcache_read(wb->cache, offset, *bytes, qiov, qiov_offset);
    if (!found) {
        *bytes = seqcache_gap(wb->cache, offset, *bytes);
        return false;
    }
    wb->stats.read_hits++;
    wb->stats.read_hit_bytes += found;
    *bytes = found;
    return true;
}

int64_t wb_gap(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return seqcache_gap(wb->cache, offset, bytes);
}
