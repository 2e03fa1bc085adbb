/*
 * Reading compressed clusters: read ahead, and decompressed clusters
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is read ahead is what the next clusters of the image point to, and not
 * what follows in the file: images that were written in parallel have their
 * clusters in another order, and between them there can be normal clusters.  A
 * piece has the clusters whose data lies close to each other, as far as one
 * request may reach.
 *
 * A reader that finds nothing reads a piece instead of one cluster, and others
 * wait for it.  A reader that comes near the end of what was read ahead has a
 * background coroutine read the next piece.  This one takes the graph lock only
 * if it need not wait for it, and nobody who reads a piece has a lock of the
 * format driver: so those who wait for a piece cannot stop it.  A reader waits
 * only for what was begun before its own cread_begin(), so readers do not wait
 * for each other in a circle.
 *
 * An error of a piece is nobody's error: each of its readers then reads exactly
 * its own cluster.
 *
 * block/compressed-read-entries.c keeps pieces and decompressed clusters, and
 * block/compressed-read-ahead.c decides what a piece is.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/compressed-read-int.h"
#include "qemu/memalign.h"
#include "trace.h"

/* For how long nothing must be read before all memory is given back */
#define CREAD_IDLE_MS 10000

/* Called with c->lock held */
static void cread_arm_timer_locked(CompressedReadCache *c)
{
    c->timer_armed = true;
    c->timer_reads = c->nb_reads;
    timer_mod(c->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                        (c->opts.idle_ms ?: CREAD_IDLE_MS));
}

/* Runs in the main loop */
static void cread_timer_cb(void *opaque)
{
    CompressedReadCache *c = opaque;

    QEMU_LOCK_GUARD(&c->lock);

    if (c->nb_reads == c->timer_reads) {
        cread_drop_unused_locked(c);
    }
    c->timer_armed = false;
    if (c->bytes) {
        cread_arm_timer_locked(c);
    }
}

CompressedReadCache *cread_new(BlockDriverState *bs,
                               const CompressedReadOptions *opts)
{
    CompressedReadCache *c = g_new0(CompressedReadCache, 1);

    assert(opts->cache_size >= 2 * opts->cluster_size);

    c->bs = bs;
    c->opts = *opts;
    /* From now on cread_drained_begin() and cread_drained_end() tell */
    c->drained = qatomic_read(&bs->quiesce_counter);
    qemu_mutex_init(&c->lock);
    c->timer = timer_new_ms(QEMU_CLOCK_REALTIME, cread_timer_cb, c);
    QTAILQ_INIT(&c->pieces.entries);
    QTAILQ_INIT(&c->clusters.entries);
    for (int i = 0; i < CREAD_STREAMS; i++) {
        c->streams[i].next = -1;
    }
    return c;
}

void cread_free(CompressedReadCache *c)
{
    if (!c) {
        return;
    }

    timer_free(c->timer);
    cread_forget(c, 0, INT64_MAX);
    assert(!c->bytes);
    qemu_mutex_destroy(&c->lock);
    g_free(c);
}

void cread_drained_begin(CompressedReadCache *c)
{
    if (c) {
        QEMU_LOCK_GUARD(&c->lock);

        c->drained = true;
    }
}

void cread_drained_end(CompressedReadCache *c)
{
    if (c) {
        QEMU_LOCK_GUARD(&c->lock);

        c->drained = false;
        cread_forget_locked(c, &(CompressedExtent) { 0, INT64_MAX });
    }
}

/* ---- Pieces ---- */

/* Read a piece, and tell those who wait for it */
static void coroutine_fn GRAPH_RDLOCK
cread_co_read_piece(CompressedReadCache *c, CReadEntry *piece, bool ahead)
{
    QEMUIOVector qiov;
    int ret;

    trace_cread_read_piece(c->bs, piece->extent.offset, piece->extent.bytes,
                           ahead);
    qemu_iovec_init_buf(&qiov, piece->buf, piece->extent.bytes);
    ret = c->opts.read(c->bs, piece->extent.offset, piece->extent.bytes, &qiov);
    trace_cread_piece_done(c->bs, piece->extent.offset, piece->extent.bytes,
                           ret);

    QEMU_LOCK_GUARD(&c->lock);

    c->stats.pieces++;
    c->stats.piece_bytes += piece->extent.bytes;
    if (ret < 0) {
        cread_note_failure_locked(c);
        cread_fail_locked(c, &c->pieces, piece);
    } else {
        cread_ready_locked(piece);
    }
}

/* Whether @piece is of use, and will be read from where it was looked up */
static bool GRAPH_RDLOCK cread_is_current(CompressedReadCache *c,
                                          const CReadEntry *piece)
{
    QEMU_LOCK_GUARD(&c->lock);

    return piece->listed && c->bs->file && c->bs->file->bs == c->child_bs;
}

/* Read a piece in the background; there may have been a graph change since */
static void coroutine_fn cread_co_read_ahead(void *opaque)
{
    CReadEntry *piece = opaque;
    CompressedReadCache *c = piece->c;
    BlockDriverState *bs = c->bs;

    if (bdrv_graph_co_try_rdlock()) {
        if (cread_is_current(c, piece)) {
            cread_co_read_piece(c, piece, true);
        }
        bdrv_graph_co_rdunlock();
    }

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (piece->state == CREAD_BUSY) {
            cread_fail_locked(c, &c->pieces, piece);
        }
        cread_unuse_locked(c, piece);
    }
    bdrv_dec_in_flight(bs);
}

/* ---- Reads ---- */

CompressedRead *cread_begin(CompressedReadCache *c, int64_t offset,
                            int64_t bytes, int64_t end, int64_t hole_start,
                            CompressedExtent extent)
{
    int64_t offset_in_cluster = offset % c->opts.cluster_size;
    int64_t cluster_start = offset - offset_in_cluster;
    CompressedRead *read;
    CReadStream *stream;

    if (!c->bs->file) {
        return NULL;
    }

    QEMU_LOCK_GUARD(&c->lock);

    if (c->child_bs != c->bs->file->bs) {
        cread_forget_locked(c, &(CompressedExtent) { 0, INT64_MAX });
        c->child_bs = c->bs->file->bs;
    }

    read = g_new(CompressedRead, 1);
    *read = (CompressedRead) {
        .c = c,
        .extent = extent,
        .offset_in_cluster = offset_in_cluster,
        .bytes = bytes,
    };

    c->nb_reads++;
    stream = cread_note_locked(c, offset, bytes, end, hole_start);

    read->cluster = cread_find_cluster_locked(c, &extent);
    if (read->cluster) {
        c->stats.cluster_hits++;
        cread_use_locked(c, &c->clusters, read->cluster);
        return read;
    }

    cread_choose_piece_locked(read, stream,
                              cluster_start + c->opts.cluster_size, end);
    if (bytes < c->opts.cluster_size) {
        read->cluster = cread_add_locked(c, &c->clusters, extent,
                                         c->opts.cluster_size, 64);
        read->make_cluster = read->cluster;
    }
    if (!read->piece && !read->cluster) {
        g_free(read);
        return NULL;
    }
    if (!c->timer_armed) {
        cread_arm_timer_locked(c);
    }
    return read;
}

/* Read exactly the compressed data of one cluster, and decompress it */
static int coroutine_fn GRAPH_RDLOCK
cread_co_decompress_own(CompressedRead *read, void *dest)
{
    CompressedReadCache *c = read->c;
    g_autofree void *buf = g_try_malloc(read->extent.bytes);
    QEMUIOVector qiov;
    int ret;

    if (!buf) {
        return -ENOMEM;
    }
    qemu_iovec_init_buf(&qiov, buf, read->extent.bytes);
    ret = c->opts.read(c->bs, read->extent.offset, read->extent.bytes, &qiov);
    if (ret < 0) {
        return ret;
    }
    return c->opts.decompress(c->bs, dest, c->opts.cluster_size, buf,
                              read->extent.bytes) < 0 ? -EIO : 0;
}

/*
 * Decompress the cluster.  Data of a piece that is not good is read again: what
 * the caller gets to know is about its own cluster.
 */
static int coroutine_fn GRAPH_RDLOCK
cread_co_decompress(CompressedRead *read, void *dest)
{
    CompressedReadCache *c = read->c;
    bool ok = false;

    if (read->piece) {
        WITH_QEMU_LOCK_GUARD(&c->lock) {
            ok = cread_co_wait_locked(c, read->piece);
        }
    }
    if (ok) {
        uint8_t *src = (uint8_t *)read->piece->buf + read->extent.offset -
                       read->piece->extent.offset;

        ok = c->opts.decompress(c->bs, dest, c->opts.cluster_size, src,
                                read->extent.bytes) >= 0;
    }
    return ok ? 0 : cread_co_decompress_own(read, dest);
}

/* Make the cluster that others can wait for */
static int coroutine_fn GRAPH_RDLOCK cread_co_make_cluster(CompressedRead *read)
{
    CompressedReadCache *c = read->c;
    int ret = cread_co_decompress(read, read->cluster->buf);

    QEMU_LOCK_GUARD(&c->lock);

    if (ret < 0) {
        cread_fail_locked(c, &c->clusters, read->cluster);
    } else {
        cread_ready_locked(read->cluster);
    }
    return ret;
}

int coroutine_fn cread_co_read(CompressedRead *read, QEMUIOVector *qiov,
                               size_t qiov_offset)
{
    CompressedReadCache *c = read->c;
    uint8_t *buf = NULL, *out_buf = NULL;
    int ret = 0;

    /* First of all, whatever happens to this read: others wait for it */
    if (read->ahead) {
        bdrv_inc_in_flight(c->bs);
        aio_co_enter(qemu_get_current_aio_context(),
                     qemu_coroutine_create(cread_co_read_ahead, read->ahead));
    }
    if (read->read_piece) {
        cread_co_read_piece(c, read->piece, false);
    }

    if (read->make_cluster) {
        ret = cread_co_make_cluster(read);
        buf = read->cluster->buf;
    } else if (read->cluster) {
        WITH_QEMU_LOCK_GUARD(&c->lock) {
            if (cread_co_wait_locked(c, read->cluster)) {
                buf = read->cluster->buf;
            }
        }
    }
    if (!buf) {
        buf = out_buf = qemu_try_memalign(64, c->opts.cluster_size);
        ret = buf ? cread_co_decompress(read, buf) : -ENOMEM;
    }
    if (ret >= 0) {
        qemu_iovec_from_buf(qiov, qiov_offset, buf + read->offset_in_cluster,
                            read->bytes);
    }
    qemu_vfree(out_buf);

    WITH_QEMU_LOCK_GUARD(&c->lock) {
        if (read->piece) {
            cread_unuse_locked(c, read->piece);
        }
        if (read->cluster) {
            cread_unuse_locked(c, read->cluster);
        }
    }
    g_free(read);
    return ret;
}

/* ---- Statistics ---- */

BlockStatsCompressedRead *cread_get_stats(CompressedReadCache *c)
{
    QEMU_LOCK_GUARD(&c->lock);

    BlockStatsCompressedRead *stats =
        g_memdup2(&c->stats, sizeof(c->stats));

    stats->cache_size = c->opts.cache_size;
    stats->cached_bytes = c->bytes;
    return stats;
}
