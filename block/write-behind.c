/*
 * Write-behind: background writing of small sequential writes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A write is copied into a SeqCache and returns.  From there the data goes to
 * the child in one of two ways.
 *
 * Workers are background coroutines that write while the users of the node do
 * something else.  A write starts one as soon as there is a request worth
 * writing: a full one, or any when half of the cache is waiting.  Workers
 * count as in-flight requests of the node; a drain waits for them, and they
 * end when nothing is worth writing any more, or with the request in flight
 * when the node is drained.  None starts while it is.  A graph writer may drain
 * the node while it holds the graph lock, so a worker never waits for that
 * lock: if it cannot have it at once, it ends and has taken nothing from the
 * cache.
 *
 * Waiters are callers that need room in the cache (wb_co_reserve()) or that
 * need data to be on the child (wb_co_flush()).  They hold the graph lock
 * already and must never wait for a coroutine that still wants it.  So they do
 * not rely on workers: a waiter takes the next request from the cache and
 * writes it itself, and waits only for requests in flight.
 *
 * Both decide with the same function, wb_next_request_locked(), what to write
 * next.
 *
 * block/write-behind-age.c writes what nobody flushes, and
 * block/write-behind-read.c reads.
 *
 * When a write to the child fails, its data goes back into the cache and @error
 * is set.  Workers stop then.  The first waiter to come writes one request
 * again, the others wait for its result.  If it succeeds, everything goes on;
 * if it fails, everybody who waited for it gets the error.
 *
 * Memory is counted in clusters, those in the cache and those reserved.  When
 * nothing is in flight or reserved, and the cache is still too full, it holds
 * nothing but unfinished clusters.  A waiter then finishes the oldest, so that
 * there is always something to wait for.  While anything is reserved this is
 * not necessary: the holder of a reservation does not wait for another.
 */

#include "qemu/osdep.h"

#include "block/block_int.h"
#include "block/coroutines.h"
#include "block/write-behind-int.h"
#include "qemu/units.h"
#include "trace.h"

/* Size of a request to the child, if the child and the cache allow it */
#define WB_REQUEST_BYTES (1 * MiB)

/* How many requests to the child can be in flight */
#define WB_MAX_IN_FLIGHT 4

WriteBehind *wb_new(BlockDriverState *bs, const WriteBehindOptions *opts)
{
    WriteBehind *wb = g_new0(WriteBehind, 1);
    SeqCacheOptions cache_opts = {
        .cluster_size = opts->cluster_size,
        .max_unfinished = opts->max_streams,
        .pad = opts->pad,
        .fill_percent = opts->fill_percent,
    };

    wb->bs = bs;
    wb->cluster_size = opts->cluster_size;
    wb->max_clusters = opts->cache_size / opts->cluster_size;
    wb->pad = opts->pad;
    wb->event = opts->event;
    wb->written_out = opts->written_out;
    /* From now on wb_drained_begin() and wb_drained_end() tell */
    wb->drained = qatomic_read(&bs->quiesce_counter);
    wb_age_init(wb, opts->max_age_ms);
    assert(wb->max_clusters >= 2);

    qemu_mutex_init(&wb->lock);
    qemu_co_queue_init(&wb->waiters);
    QSIMPLEQ_INIT(&wb->reservers);
    wb->cache = seqcache_new(&cache_opts);

    return wb;
}

static void wb_destroy(WriteBehind *wb)
{
    seqcache_free(wb->cache);
    qemu_mutex_destroy(&wb->lock);
    g_free(wb);
}

void wb_free(WriteBehind *wb)
{
    bool last;

    if (!wb) {
        return;
    }

    qemu_mutex_lock(&wb->lock);
    assert(!wb->nb_in_flight && !wb->nb_flushing && !wb->nb_settling);
    assert(!wb->nb_reserved);
    assert(QSIMPLEQ_EMPTY(&wb->reservers));
    wb->freed = true;
    timer_free(wb->timer);
    wb->timer = NULL;
    last = !wb->nb_workers;
    qemu_mutex_unlock(&wb->lock);

    if (last) {
        wb_destroy(wb);
    }
}

void wb_abandon(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    wb->abandoned = true;
}

int64_t wb_cache_size(const WriteBehind *wb)
{
    return wb->max_clusters * wb->cluster_size;
}

SeqCacheLimits wb_limits(WriteBehind *wb)
{
    SeqCacheLimits limits = {
        .align = 1,
        .max_bytes = MIN(WB_REQUEST_BYTES, wb_cache_size(wb) / 2),
        .max_iov = IOV_MAX,
    };

    if (wb->bs->file) {
        BlockLimits *bl = &wb->bs->file->bs->bl;

        limits.align = bl->request_alignment;
        limits.max_bytes = MIN_NON_ZERO(limits.max_bytes, bl->max_transfer);
        limits.max_iov = MIN_NON_ZERO(limits.max_iov, bl->max_iov);
    }

    /* In whole clusters, this is what can be reached */
    limits.max_bytes = MIN(limits.max_bytes,
                           limits.max_iov * wb->cluster_size);
    limits.max_bytes = MAX(QEMU_ALIGN_DOWN(limits.max_bytes, wb->cluster_size),
                           wb->cluster_size);
    return limits;
}

/* Which data, if any, is worth being written now */
typedef enum WriteBehindWork {
    WB_WORK_NONE,
    WB_WORK_FINISHED,   /* Finished clusters */
    WB_WORK_ALL,        /* Also the streams, as far as they are to be flushed */
} WriteBehindWork;

/* Called with wb->lock held */
static WriteBehindWork GRAPH_RDLOCK wb_work_locked(WriteBehind *wb)
{
    SeqCacheLimits limits;
    SeqCacheStats stats;
    int64_t almost_max;

    if (wb->abandoned) {
        return WB_WORK_NONE;
    }

    if (wb->error) {
        /* One attempt at a time */
        return wb->nb_in_flight ? WB_WORK_NONE : WB_WORK_ALL;
    }

    if (wb->nb_in_flight >= WB_MAX_IN_FLIGHT) {
        return WB_WORK_NONE;
    }

    if (wb->nb_flushing || (wb->nb_settling && !wb->settled_until)) {
        return WB_WORK_ALL;
    }

    seqcache_get_stats(wb->cache, &stats);
    if (!stats.bytes_finished) {
        return WB_WORK_NONE;
    }

    if (!QSIMPLEQ_EMPTY(&wb->reservers) && !wb->nb_in_flight) {
        return WB_WORK_FINISHED;
    }

    if (wb->settled_until) {
        return WB_WORK_NONE;
    }

    if (stats.nb_finished >= wb->max_clusters / 2) {
        return WB_WORK_FINISHED;
    }

    /* From here on no further cluster fits, also if the first is not whole */
    limits = wb_limits(wb);
    almost_max = limits.max_bytes - wb->cluster_size;
    return stats.bytes_finished > almost_max &&
           seqcache_next_flush_bytes(wb->cache, &limits) > almost_max ?
           WB_WORK_FINISHED : WB_WORK_NONE;
}

/*
 * Take the next request that is worth writing now, if any.  The result must go
 * to wb_co_write_locked().  Called with wb->lock held.
 */
static SeqCacheRequest * GRAPH_RDLOCK
wb_next_request_locked(WriteBehind *wb)
{
    WriteBehindWork work = wb_work_locked(wb);
    SeqCacheLimits limits;

    if (work == WB_WORK_NONE) {
        return NULL;
    }
    limits = wb_limits(wb);
    return seqcache_get_next_flush(wb->cache, &limits, work == WB_WORK_ALL);
}

void coroutine_fn wb_co_write_locked(WriteBehind *wb, SeqCacheRequest *req)
{
    int64_t end = req->offset + req->bytes;
    bool retry = wb->error;
    bool partial;
    QEMUIOVector qiov;
    int ret;

    /* Inside a cluster, and its run ends there or went on since the flush */
    partial = seqcache_continues(wb->cache, end) ||
              (end % wb->cluster_size && !seqcache_gap(wb->cache, end, 1));

    wb->nb_in_flight++;
    qemu_mutex_unlock(&wb->lock);

    trace_wb_issue(wb->bs, req->offset, req->bytes, req->niov, partial);

    if (wb->bs->file) {
        BLKDBG_CO_EVENT(wb->bs->file, wb->event);
        qemu_iovec_init_external(&qiov, req->iov, req->niov);
        ret = bdrv_co_pwritev(wb->bs->file, req->offset, req->bytes, &qiov, 0);
    } else {
        ret = -ENOMEDIUM;
    }

    qemu_mutex_lock(&wb->lock);
    wb->nb_in_flight--;
    wb->stats.issued_requests++;
    wb->stats.partial_flushes += partial;
    if (ret < 0) {
        trace_wb_error(wb->bs, req->offset, req->bytes, ret);
        wb->error = ret;
        wb->nb_failures++;
        wb->stats.errors++;
    } else {
        trace_wb_complete(wb->bs, req->offset, req->bytes);
        wb->stats.issued_bytes += req->bytes;
        if (retry) {
            wb->error = 0;
        }
    }
    seqcache_complete(wb->cache, req, ret >= 0);
    qemu_co_queue_restart_all(&wb->waiters);
}

static void coroutine_fn wb_co_worker(void *opaque);

/*
 * Start a worker in the current AioContext if there is work for one.  Called
 * with wb->lock held.
 */
static void coroutine_fn GRAPH_RDLOCK
wb_start_worker_locked(WriteBehind *wb)
{
    if (wb->worker_starting || wb->nb_workers >= WB_MAX_IN_FLIGHT ||
        wb->freed || wb->drained || !wb->bs->drv || wb->error ||
        wb_is_settled_locked(wb) ||
        wb_work_locked(wb) == WB_WORK_NONE) {
        return;
    }

    wb->worker_starting = true;
    wb->nb_workers++;
    bdrv_inc_in_flight(wb->bs);
    aio_co_enter(qemu_get_current_aio_context(),
                 qemu_coroutine_create(wb_co_worker, wb));
}

/*
 * Write as long as something is worth it, and nobody drains the node: a drain
 * waits for what is in flight, not for the whole cache.  A node that failed as
 * corrupt is not told of drains, so it stops at once.  Called with wb->lock
 * held.
 */
static void coroutine_fn GRAPH_RDLOCK
wb_co_work_locked(WriteBehind *wb)
{
    SeqCacheRequest *req;

    while (!wb->freed && !wb->drained && wb->bs->drv && !wb->error &&
           !wb_is_settled_locked(wb) &&
           (req = wb_next_request_locked(wb)) != NULL) {
        /* While this one is in flight, there may be work for another worker */
        wb_start_worker_locked(wb);
        wb_co_write_locked(wb, req);
    }
}

void coroutine_fn wb_end_worker_locked(WriteBehind *wb)
{
    BlockDriverState *bs = wb->bs;
    bool last;

    wb->nb_workers--;
    last = wb->freed && !wb->nb_workers;
    qemu_co_queue_restart_all(&wb->waiters);
    qemu_mutex_unlock(&wb->lock);

    if (last) {
        wb_destroy(wb);
    }
    bdrv_dec_in_flight(bs);
}

static void coroutine_fn wb_co_worker(void *opaque)
{
    WriteBehind *wb = opaque;

    qemu_mutex_lock(&wb->lock);
    wb->worker_starting = false;
    if (bdrv_graph_co_try_rdlock()) {
        wb_co_work_locked(wb);
        bdrv_graph_co_rdunlock();
    }
    wb_end_worker_locked(wb);
}

/*
 * Come closer to what the caller waits for: write something, or wait until
 * something that is in flight is done.  Called with wb->lock held, which is
 * released meanwhile.
 *
 * Returns: false if there was nothing to write and nothing in flight.
 */
static bool coroutine_fn GRAPH_RDLOCK
wb_co_step_locked(WriteBehind *wb)
{
    SeqCacheRequest *req = wb_next_request_locked(wb);

    if (req) {
        wb_co_write_locked(wb, req);
    } else if (wb->nb_in_flight) {
        qemu_co_queue_wait(&wb->waiters, &wb->lock);
    } else {
        return false;
    }
    return true;
}

/*
 * Returns: the error if a write failed since *@nb_failures was read, and none
 * succeeded after that; else 0.  Called with wb->lock held.
 */
static int wb_new_error_locked(WriteBehind *wb, uint64_t *nb_failures)
{
    if (*nb_failures == wb->nb_failures) {
        return 0;
    }
    *nb_failures = wb->nb_failures;
    return wb->error;
}

/* Called with wb->lock held */
static bool wb_has_room_locked(WriteBehind *wb, uint64_t nb_clusters)
{
    return seqcache_nb_clusters(wb->cache) + wb->nb_reserved + nb_clusters <=
           wb->max_clusters;
}

/*
 * What wb_co_reserve() does.  Called with wb->lock held, which is released
 * while this waits.
 */
static int coroutine_fn GRAPH_RDLOCK
wb_co_reserve_locked(WriteBehind *wb, uint64_t nb_clusters)
{
    WriteBehindReserver self;
    uint64_t nb_failures = wb->nb_failures;
    int ret = 0;

    if (nb_clusters > wb->max_clusters) {
        return -EINVAL;
    }

    QSIMPLEQ_INSERT_TAIL(&wb->reservers, &self, next);
    while (QSIMPLEQ_FIRST(&wb->reservers) != &self || wb->error ||
           !wb_has_room_locked(wb, nb_clusters)) {
        ret = wb_new_error_locked(wb, &nb_failures);
        if (ret < 0) {
            break;
        }
        if (wb->abandoned) {
            ret = -ECANCELED;
            break;
        }
        if (wb_co_step_locked(wb)) {
            continue;
        }

        if (QSIMPLEQ_FIRST(&wb->reservers) != &self) {
            qemu_co_queue_wait(&wb->waiters, &wb->lock);
        } else if (wb->error) {
            /* What could not be written was discarded since */
            wb->error = 0;
        } else if (wb->nb_reserved) {
            qemu_co_queue_wait(&wb->waiters, &wb->lock);
        } else {
            seqcache_finish_oldest(wb->cache);
        }
    }

    if (ret == 0) {
        wb->nb_reserved += nb_clusters;
    }
    QSIMPLEQ_REMOVE(&wb->reservers, &self, WriteBehindReserver, next);
    qemu_co_queue_restart_all(&wb->waiters);
    return ret;
}

int coroutine_fn wb_co_reserve(WriteBehind *wb, uint64_t nb_clusters)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return wb_co_reserve_locked(wb, nb_clusters);
}

/* Called with wb->lock held */
static void coroutine_fn
wb_unreserve_locked(WriteBehind *wb, uint64_t nb_clusters)
{
    assert(wb->nb_reserved >= nb_clusters);
    wb->nb_reserved -= nb_clusters;
    qemu_co_queue_restart_all(&wb->waiters);
}

void coroutine_fn wb_unreserve(WriteBehind *wb, uint64_t nb_clusters)
{
    QEMU_LOCK_GUARD(&wb->lock);

    wb_unreserve_locked(wb, nb_clusters);
}

bool wb_continues(WriteBehind *wb, int64_t offset)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return seqcache_continues(wb->cache, offset);
}

/* @bytes were stored and will be old one day.  Called with wb->lock held. */
static void wb_accepted_locked(WriteBehind *wb, int64_t bytes)
{
    wb->stats.accepted_bytes += bytes;
    wb->stats.accepted_requests++;
    wb_age_start_locked(wb);
}

/* Store a write that the cache takes.  Called with wb->lock held. */
static void coroutine_fn GRAPH_RDLOCK
wb_store_locked(WriteBehind *wb, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov, size_t qiov_offset)
{
    SeqCacheStats stats;

    trace_wb_accept(wb->bs, offset, bytes, true);
    seqcache_write(wb->cache, offset, bytes, qiov, qiov_offset);
    seqcache_get_stats(wb->cache, &stats);
    wb->stats.max_cached_bytes = MAX(wb->stats.max_cached_bytes,
                                     stats.bytes_cached);
    wb_accepted_locked(wb, bytes);
    wb_start_worker_locked(wb);
}

bool coroutine_fn wb_accept(WriteBehind *wb, uint64_t nb_clusters,
                            int64_t offset, int64_t bytes, const void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);

    QEMU_LOCK_GUARD(&wb->lock);

    wb_unreserve_locked(wb, nb_clusters);
    if (!seqcache_can_write(wb->cache, offset, bytes)) {
        trace_wb_accept(wb->bs, offset, bytes, false);
        return false;
    }
    wb_store_locked(wb, offset, bytes, &qiov, 0);
    return true;
}

int64_t coroutine_fn wb_co_write(WriteBehind *wb, int64_t offset, int64_t bytes,
                                 QEMUIOVector *qiov, size_t qiov_offset,
                                 bool may_begin)
{
    int64_t n = MIN(bytes, wb->cluster_size - offset % wb->cluster_size);
    bool continues;
    int ret;

    QEMU_LOCK_GUARD(&wb->lock);

    continues = seqcache_continues(wb->cache, offset);
    if (!continues) {
        int64_t done = seqcache_overwrite(wb->cache, offset, n, qiov,
                                          qiov_offset);

        if (done) {
            trace_wb_overwrite(wb->bs, offset, n, done);
            wb_accepted_locked(wb, done);
        }
        if (done || !may_begin || !seqcache_gap(wb->cache, offset, 1)) {
            return done;
        }
    }

    /* A stream begins; or it continues, and the writer learns of the error */
    if (!continues || wb->error) {
        ret = wb_co_reserve_locked(wb, 1);
        if (ret < 0) {
            return ret;
        }
        wb_unreserve_locked(wb, 1);
        if (!seqcache_can_write(wb->cache, offset, n)) {
            trace_wb_accept(wb->bs, offset, n, false);
            return 0;
        }
    }
    wb_store_locked(wb, offset, n, qiov, qiov_offset);
    return n;
}

bool wb_is_empty(WriteBehind *wb)
{
    return !seqcache_nb_clusters(wb->cache);
}

bool wb_is_dirty(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return !seqcache_is_clean(wb->cache);
}

void wb_end_streams(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    if (!wb->nb_reserved) {
        while (seqcache_finish_oldest(wb->cache)) {
            /* The next one */
        }
    }
}

int coroutine_fn
wb_co_write_point_locked(WriteBehind *wb, uint64_t point, unsigned *callers,
                         int64_t offset, int64_t bytes, bool one)
{
    uint64_t nb_failures = wb->nb_failures;
    uint64_t issued = wb->stats.issued_requests;
    int ret = 0;

    (*callers)++;
    if (!seqcache_is_flushed(wb->cache, point)) {
        wb_start_worker_locked(wb);
    }

    while (!seqcache_is_flushed(wb->cache, point) &&
           (!bytes || seqcache_gap(wb->cache, offset, bytes) < bytes)) {
        ret = wb_new_error_locked(wb, &nb_failures);
        if (ret == 0 && wb->abandoned) {
            ret = -ECANCELED;
        }
        if (ret == 0 && one && wb->stats.issued_requests != issued) {
            ret = 1;
        }
        if (ret != 0) {
            break;
        }
        if (!wb_co_step_locked(wb)) {
            /* What is not flushed is in flight or, if not settled, comes out */
            assert(one);
            ret = 1;
            break;
        }
    }

    (*callers)--;
    return ret;
}

int coroutine_fn wb_co_flush(BlockDriverState *bs, WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return wb_co_write_point_locked(wb, seqcache_flush_point(wb->cache),
                                    &wb->nb_flushing, 0, 0, false);
}

int coroutine_fn wb_co_write_out(WriteBehind *wb, int64_t offset, int64_t bytes,
                                 CoMutex *lock)
{
    int ret;

    if (wb_is_empty(wb)) {
        return 0;
    }

    WITH_QEMU_LOCK_GUARD(&wb->lock) {
        if (seqcache_gap(wb->cache, offset, bytes) == bytes) {
            return 0;
        }
        seqcache_finish(wb->cache, offset, bytes);
        if (lock) {
            /* Its next holder finds the streams ended */
            qemu_co_mutex_unlock(lock);
        }

        /* Looking at a large range again and again would not pay */
        if (bytes > 16 * wb->cluster_size) {
            bytes = 0;
        }
        ret = wb_co_write_point_locked(wb, seqcache_flush_point(wb->cache),
                                       &wb->nb_flushing, offset, bytes, false);
    }
    if (lock) {
        qemu_co_mutex_lock(lock);
    }
    return ret < 0 || !lock ? ret : 1;
}

void coroutine_fn wb_drop_written(WriteBehind *wb,
                                  int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&wb->lock);

    while (seqcache_drop_written(wb->cache, offset, bytes,
                                 wb_limits(wb).align))
    {
        qemu_co_queue_wait(&wb->waiters, &wb->lock);
    }
    /* There may be room now */
    qemu_co_queue_restart_all(&wb->waiters);
}

void coroutine_fn wb_co_discard(BlockDriverState *bs, WriteBehind *wb,
                                int64_t offset, int64_t bytes)
{
    if (!bytes) {
        return;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    while (seqcache_discard(wb->cache, offset, bytes)) {
        trace_wb_discard_wait(wb->bs, offset, bytes);
        qemu_co_queue_wait(&wb->waiters, &wb->lock);
    }
    trace_wb_discard(wb->bs, offset, bytes);
    /* There may be room now */
    qemu_co_queue_restart_all(&wb->waiters);
}

BlockStatsWriteBehind *wb_get_stats(WriteBehind *wb)
{
    BlockStatsWriteBehind *stats = g_new(BlockStatsWriteBehind, 1);
    SeqCacheStats cache_stats;

    QEMU_LOCK_GUARD(&wb->lock);

    seqcache_get_stats(wb->cache, &cache_stats);
    *stats = wb->stats;
    stats->cache_size = wb_cache_size(wb);
    stats->cached_bytes = cache_stats.bytes_cached;
    stats->unwritten_bytes = cache_stats.bytes_unwritten;

    return stats;
}
