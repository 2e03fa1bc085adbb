/*
 * Write-behind: data that nobody flushes, and jobs that settle their nodes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Data does not stay in memory for ever if nobody flushes.  A timer of the main
 * loop runs as long as there is unwritten data.  When it expires, the straggler
 * writes the data that was there when it expired the last time.  The straggler
 * is a worker that does not care whether a request is worth it, and that makes
 * one small request at a time, so a graph change waits for no more than that.
 * It also writes out everything that is cached when wb_start_write_out() or
 * wb_co_settle() asks for it.  It stops at a drain, and goes on when that ends.
 * It leaves a kept error to the waiters.
 *
 * While the cache is settled, which wb_co_settle() starts and the timer ends,
 * there are no workers, except those that help a flush.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/write-behind-int.h"
#include "qemu/units.h"
#include "trace.h"

/* Size of a request of the straggler, if it can be smaller than a cluster */
#define WB_STRAGGLER_BYTES (256 * KiB)

/* How long a settled cache stays so; and if its user is still waiting for it */
#define WB_SETTLED_MS 5000
#define WB_CANCELLED_MS 60000

/* Called with wb->lock held */
static void wb_arm_timer_locked(WriteBehind *wb, int64_t ms)
{
    if (!wb->freed) {
        wb->timer_armed = true;
        timer_mod(wb->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms);
    }
}

/* Want the straggler to write out all that is cached.  wb->lock is held. */
static void wb_want_straggler_locked(WriteBehind *wb)
{
    wb->straggler_wanted = true;
    wb->straggler_point = seqcache_flush_point(wb->cache);
}

bool wb_is_settled_locked(WriteBehind *wb)
{
    return wb->settled_until && !wb->nb_flushing;
}

/*
 * Whether the straggler may write: not while the node is drained or inactive,
 * or its image was found to be corrupt.  Called with wb->lock held.
 */
static bool wb_straggler_can_run_locked(WriteBehind *wb)
{
    return !wb->freed && !wb->abandoned && !wb->drained &&
           !wb_is_settled_locked(wb) &&
           wb->bs->drv && !(wb->bs->open_flags & BDRV_O_INACTIVE) &&
           (!wb->error || (wb->straggler_retry && !wb->nb_in_flight));
}

/*
 * Returns: whether the straggler has nothing to do (any more); if so, it is no
 * longer wanted.  Called with wb->lock held.
 */
static bool wb_straggler_is_done_locked(WriteBehind *wb)
{
    if (!seqcache_is_flushed(wb->cache, wb->straggler_point)) {
        return false;
    }
    wb->straggler_wanted = false;
    if (wb->straggler_notify && !wb->freed) {
        wb->straggler_notify = false;
        wb->written_out(wb->bs);
    }
    return true;
}

/*
 * The straggler is wanted, but cannot run now: try again later.  Called with
 * wb->lock held.
 */
static void wb_rearm_timer_locked(WriteBehind *wb)
{
    if (wb->bs->drv) {
        wb_arm_timer_locked(wb, wb->max_age_ms);
    }
}

void wb_drained_begin(WriteBehind *wb)
{
    if (!wb) {
        return;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    wb->drained = true;
}

void wb_drained_end(WriteBehind *wb)
{
    if (!wb) {
        return;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    wb->drained = false;
    if (wb->straggler_wanted) {
        wb_arm_timer_locked(wb, 0);
    }
}

/*
 * Write out what was cached at wb->straggler_point, one request at a time.
 * Called with wb->lock held, which is released while a request is in flight.
 */
static void coroutine_fn GRAPH_RDLOCK
wb_co_straggle_locked(WriteBehind *wb)
{
    while (wb_straggler_can_run_locked(wb) &&
           !seqcache_is_flushed(wb->cache, wb->straggler_point)) {
        SeqCacheLimits limits = wb_limits(wb);
        SeqCacheRequest *req;

        limits.max_bytes = MIN(limits.max_bytes, WB_STRAGGLER_BYTES);
        limits.max_bytes = MAX(limits.max_bytes, wb->cluster_size);
        req = seqcache_get_next_flush(wb->cache, &limits, true);
        wb->straggler_retry = false;
        if (req) {
            wb_co_write_locked(wb, req);
        } else {
            /* What is not flushed is in flight: others write it */
            qemu_co_queue_wait(&wb->waiters, &wb->lock);
        }
    }
}

static void coroutine_fn wb_co_straggler(void *opaque)
{
    WriteBehind *wb = opaque;

    qemu_mutex_lock(&wb->lock);
    if (bdrv_graph_co_try_rdlock()) {
        wb_co_straggle_locked(wb);
        bdrv_graph_co_rdunlock();
    }
    wb->has_straggler = false;
    if (!wb_straggler_is_done_locked(wb)) {
        wb_rearm_timer_locked(wb);
    } else if (!wb->timer_armed && !seqcache_is_clean(wb->cache)) {
        wb_arm_timer_locked(wb, wb->max_age_ms);
    }
    wb_end_worker_locked(wb);
}

/*
 * What the straggler is to do now that the timer has run out.  Arms the timer
 * again if there is, or can be, anything to do later.
 *
 * Returns: whether it has to be started.  Called with wb->lock held.
 */
static bool wb_timer_locked(WriteBehind *wb)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);

    wb->timer_armed = false;
    if (wb->settled_until > now) {
        wb_arm_timer_locked(wb, wb->settled_until - now);
        return false;
    }
    if (wb->settled_until) {
        wb->settled_until = 0;
        wb_want_straggler_locked(wb);
    }
    if (wb->has_straggler) {
        /* It arms the timer when it ends */
        return false;
    }
    if (!wb->straggler_wanted) {
        if (seqcache_is_clean(wb->cache)) {
            /* The next write arms the timer */
            return false;
        }
        wb->straggler_wanted = true;
        wb->straggler_point = wb->age_point;
        wb->age_point = seqcache_flush_point(wb->cache);
    }
    if (wb_straggler_is_done_locked(wb)) {
        wb_arm_timer_locked(wb, wb->max_age_ms);
        return false;
    }
    if (!wb_straggler_can_run_locked(wb)) {
        wb_rearm_timer_locked(wb);
        return false;
    }

    wb->has_straggler = true;
    wb->nb_workers++;
    bdrv_inc_in_flight(wb->bs);
    return true;
}

/* Runs in the main loop, and not in a nested event loop */
static void wb_timer_cb(void *opaque)
{
    WriteBehind *wb = opaque;
    bool start;

    GLOBAL_STATE_CODE();

    WITH_QEMU_LOCK_GUARD(&wb->lock) {
        start = wb_timer_locked(wb);
    }
    if (start) {
        aio_co_enter(bdrv_get_aio_context(wb->bs),
                     qemu_coroutine_create(wb_co_straggler, wb));
    }
}

void wb_age_init(WriteBehind *wb, int64_t max_age_ms)
{
    wb->max_age_ms = max_age_ms ?: WB_MAX_AGE_MS;
    wb->settled_ms = MIN(wb->max_age_ms, WB_SETTLED_MS);
    wb->timer = timer_new_ms(QEMU_CLOCK_REALTIME, wb_timer_cb, wb);
}

void wb_age_start_locked(WriteBehind *wb)
{
    if (!wb->timer_armed) {
        wb->age_point = seqcache_flush_point(wb->cache);
        wb_arm_timer_locked(wb, wb->max_age_ms);
    }
}

/*
 * Write out a part of what was cached when this was first called since it has
 * returned 0.  Called with wb->lock held.
 */
static int coroutine_fn GRAPH_RDLOCK wb_co_settle_write_locked(WriteBehind *wb)
{
    int ret;

    if (wb->abandoned) {
        return -ECANCELED;
    }
    if (!wb->settle_write) {
        wb->settle_write = true;
        wb->settle_point = seqcache_flush_point(wb->cache);
    }
    wb->settled_until = 0;

    ret = wb_co_write_point_locked(wb, wb->settle_point, &wb->nb_settling, 0, 0,
                                   true);
    wb->settle_write = ret != 0;
    return ret;
}

/* The cache is settled for @ms milliseconds.  Called with wb->lock held. */
static void wb_settle_locked(WriteBehind *wb, int64_t ms)
{
    wb->settled_until = qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms;
    wb_arm_timer_locked(wb, ms);
}

void wb_cancel_in_flight(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    wb_settle_locked(wb, WB_CANCELLED_MS);
}

int coroutine_fn wb_co_settle(WriteBehind *wb,
                              BdrvSettleMode mode)
{
    QEMU_LOCK_GUARD(&wb->lock);

    trace_wb_settle(wb->bs, mode, seqcache_is_clean(wb->cache));
    if (mode == BDRV_SETTLE_WRITE) {
        return wb_co_settle_write_locked(wb);
    }

    wb_settle_locked(wb, wb->settled_ms);
    while (wb->nb_workers) {
        qemu_co_queue_wait(&wb->waiters, &wb->lock);
    }

    if (mode == BDRV_SETTLE_IDLE) {
        wb->settled_until = 0;
        wb_want_straggler_locked(wb);
        wb_arm_timer_locked(wb, 0);
    }
    return 0;
}

void wb_start_write_out(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    wb_want_straggler_locked(wb);
    wb->straggler_notify = true;
    wb->straggler_retry = true;
    wb_arm_timer_locked(wb, 0);
}
