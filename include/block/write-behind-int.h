/*
 * Write-behind: what its files share
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_WRITE_BEHIND_INT_H
#define BLOCK_WRITE_BEHIND_INT_H

#include "block/block_int.h"
#include "block/write-behind.h"
#include "qemu/seqcache.h"
#include "qemu/timer.h"

/* A coroutine that waits in wb_co_reserve() */
typedef struct WriteBehindReserver {
    QSIMPLEQ_ENTRY(WriteBehindReserver) next;
} WriteBehindReserver;

struct WriteBehind {
    /* Constant */
    BlockDriverState *bs;
    uint64_t max_clusters;
    int64_t cluster_size;
    bool pad;
    BlkdebugEvent event;
    int64_t max_age_ms;
    int64_t settled_ms;
    void (*written_out)(BlockDriverState *bs);

    /* Protects everything below; never held over a yield */
    QemuMutex lock;

    SeqCache *cache;

    /* The node is drained: workers do not begin anything */
    bool drained;

    /* Clusters that wb_co_reserve() promised and wb_accept() did not yet use */
    uint64_t nb_reserved;

    /* Coroutines in wb_co_reserve(); the first one is served first */
    QSIMPLEQ_HEAD(, WriteBehindReserver) reservers;
    /* Coroutines in wb_co_flush() */
    unsigned nb_flushing;
    /* Coroutines in wb_co_settle() that write; not while it is settled */
    unsigned nb_settling;

    /* Background coroutines, and whether one of them has yet to begin */
    unsigned nb_workers;
    bool worker_starting;
    /* Whether one of them is the straggler */
    bool has_straggler;
    /* Whether it has to write out what was cached at @straggler_point, ... */
    bool straggler_wanted;
    uint64_t straggler_point;
    /* ... to call @written_out then, and first to try again what has failed */
    bool straggler_notify;
    bool straggler_retry;

    /* Starts the straggler; NULL when @freed */
    QEMUTimer *timer;
    bool timer_armed;
    /* What was cached at this flush point is old when the timer runs out */
    uint64_t age_point;

    /* No workers until then, in ms of the real-time clock; 0: not settled */
    int64_t settled_until;

    /*
     * While BDRV_SETTLE_WRITE has not written everything: the flush point of
     * its first call
     */
    bool settle_write;
    uint64_t settle_point;

    /* Requests that a worker or a waiter is writing to the child */
    unsigned nb_in_flight;

    /*
     * Woken up whenever something changed that a waiter can wait for: a request
     * is done, a reservation was used or given back, data was discarded, the
     * first reserver has left.
     */
    CoQueue waiters;

    /* Negative errno while the latest write to the child failed, else 0 */
    int error;
    /* Counts failures, so that a waiter notices one that came while it slept */
    uint64_t nb_failures;

    /* wb_abandon() was called, nothing is written any more */
    bool abandoned;

    /* wb_free() was called, the last worker frees the structure */
    bool freed;

    /* The members that are not filled in by wb_get_stats() itself */
    BlockStatsWriteBehind stats;
};

/* ---- write-behind.c ---- */

/*
 * What a request should look like: the child's current limits, and no more than
 * half of the cache, so that the other half can take writes meanwhile.
 */
SeqCacheLimits GRAPH_RDLOCK wb_limits(WriteBehind *wb);

/*
 * Write @req to the child.  Called with wb->lock held, which is released while
 * the request is in flight.
 */
void coroutine_fn GRAPH_RDLOCK
wb_co_write_locked(WriteBehind *wb, SeqCacheRequest *req);

/*
 * The last thing that a worker does.  Called with wb->lock held, which is
 * released.
 */
void coroutine_fn wb_end_worker_locked(WriteBehind *wb);

/*
 * Write out what was cached at the flush point @point, while @callers, which is
 * wb->nb_flushing or wb->nb_settling, counts this caller.  Stops earlier when
 * nothing of a range is cached any more, if @bytes is not 0, or when one
 * request is done, if @one.  Called with wb->lock held.
 *
 * Returns: 0; 1 if it stopped because of @one; or the negative errno of a
 * failed write.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_write_point_locked(WriteBehind *wb, uint64_t point, unsigned *callers,
                         int64_t offset, int64_t bytes, bool one);

/* ---- write-behind-age.c ---- */

/* @max_age_ms is that of WriteBehindOptions */
void wb_age_init(WriteBehind *wb, int64_t max_age_ms);

/* There is data that will be old one day.  Called with wb->lock held. */
void wb_age_start_locked(WriteBehind *wb);

/*
 * Whether workers must not begin anything: a flush needs them even if the cache
 * is settled.  Called with wb->lock held.
 */
bool wb_is_settled_locked(WriteBehind *wb);

#endif /* BLOCK_WRITE_BEHIND_INT_H */
