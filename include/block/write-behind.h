/*
 * Write-behind: background writing of small sequential writes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A WriteBehind belongs to a block node.  It takes small sequential writes
 * into memory (see "qemu/seqcache.h") and writes them to the node's file child
 * later, in large aligned requests.  block/write-behind.c explains how.
 *
 * Writing has two steps.  wb_co_reserve() reserves memory; it may wait and it
 * may fail.  wb_accept() stores the data; it neither waits nor yields, so a
 * caller can allocate the place where the data goes between the two, and make
 * allocation and storing one atomic step.  Accepted data reads back through
 * wb_co_preadv_part() at once.  It is on the child after the next wb_co_flush()
 * that returns success (to be durable there, the child must then be flushed).
 *
 * A failed write of cached data loses nothing: the data stays cached, and the
 * error is kept.  The next wb_co_flush() or wb_co_reserve() tries to write
 * again and fails if that attempt fails.
 *
 * All functions are thread-safe unless they say something else.  They may be
 * called from coroutines in any AioContext.  The file child of the node may
 * change, or be absent, between calls.  Offsets and sizes are in bytes.
 */

#ifndef BLOCK_WRITE_BEHIND_H
#define BLOCK_WRITE_BEHIND_H

#include "block/block-common.h"
#include "block/graph-lock.h"
#include "qapi/qapi-types-block-core.h"

typedef struct WriteBehind WriteBehind;

/**
 * WriteBehindOptions: how a WriteBehind is to behave; fixed for its life time
 * @cache_size: upper bound for the memory that cached data takes; at least two
 *              clusters.  Rounded down to whole clusters.
 * @cluster_size: unit of caching, as in SeqCacheOptions.
 * @max_streams: how many sequential streams are continued at a time, as
 *               max_unfinished in SeqCacheOptions.
 * @pad: whether the end of a stream may be padded with zeroes inside its
 *       cluster, as in SeqCacheOptions.
 * @fill_percent: how many zeroes may be written between streams to have fewer
 *                requests, as in SeqCacheOptions.
 * @event: the blkdebug event of each write to the child.
 * @max_age_ms: data that is older is written although nobody flushes, in
 *              milliseconds; 0 for WB_MAX_AGE_MS.
 * @written_out: called when what wb_start_write_out() asked for is done; may be
 *               NULL if that is not used.  It can be called in any thread, and
 *               must not call any function of this file.  The node has a
 *               request in flight, or the caller is in the main loop.
 */
typedef struct WriteBehindOptions {
    int64_t cache_size;
    int64_t cluster_size;
    unsigned max_streams;
    bool pad;
    unsigned fill_percent;
    BlkdebugEvent event;
    int64_t max_age_ms;
    void (*written_out)(BlockDriverState *bs);
} WriteBehindOptions;

/* How old data gets before it is written without a flush, usually */
#define WB_MAX_AGE_MS 5000

/**
 * wb_new:
 * @bs: the node to whose file child the data goes.
 * @opts: how to behave; copied.  Values outside the ranges given at
 *        WriteBehindOptions are the caller's bug.
 *
 * Create a WriteBehind without any data.  Called in the main thread, or while
 * it waits for the caller.
 *
 * Returns: the WriteBehind, to be freed with wb_free() before @bs is gone.
 */
WriteBehind *wb_new(BlockDriverState *bs, const WriteBehindOptions *opts);

/**
 * wb_free:
 * @wb: the WriteBehind, or NULL, which does nothing.
 *
 * Free @wb.  Data that is still cached is lost: flush before, and report what
 * could not be written.  No request may be using @wb and no write to the child
 * may be in flight, as is the case after a drain.  Called in the main thread.
 */
void wb_free(WriteBehind *wb);

/**
 * wb_drained_begin, wb_drained_end:
 * @wb: the WriteBehind, or NULL, which does nothing.
 *
 * What a driver does for BlockDriver.bdrv_drain_begin and bdrv_drain_end: in
 * between, no background write begins.  Can be called again without effect.
 * wb_new() sees for itself whether the node is drained.
 */
void wb_drained_begin(WriteBehind *wb);
void wb_drained_end(WriteBehind *wb);

/**
 * wb_abandon:
 * @wb: the WriteBehind.
 *
 * Begin no further write to the child.  What is cached stays readable; flushes
 * of it, and wb_co_reserve() when there is no room, fail with -ECANCELED.  What
 * is in flight is not affected.  There is no way back.
 */
void wb_abandon(WriteBehind *wb);

/**
 * wb_cache_size:
 * @wb: the WriteBehind.
 *
 * Returns: the memory that cached data can take at most.
 */
int64_t wb_cache_size(const WriteBehind *wb);

/**
 * wb_co_reserve:
 * @wb: the WriteBehind.
 * @nb_clusters: how many clusters, beyond those that are being continued, the
 *               write can take at most.
 *
 * Reserve memory for one write.  Waits for room, and writes out cached data to
 * make some.  Every successful call must be followed by one call of either
 * wb_accept() or wb_unreserve() with the same @nb_clusters; between the two the
 * caller must not reserve again, but may call anything else.  As long as
 * anything is reserved, no stream is ended to make room, so that what
 * wb_continues() said stays true.
 *
 * Returns: 0 on success; -EINVAL if the cache is smaller than @nb_clusters; the
 * negative errno of the failed write to the child if cached data cannot be
 * written.  Nothing is reserved then.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_reserve(WriteBehind *wb, uint64_t nb_clusters);

/**
 * wb_unreserve:
 * @wb: the WriteBehind.
 * @nb_clusters: what was passed to wb_co_reserve().
 *
 * Give back what wb_co_reserve() reserved.
 */
void coroutine_fn wb_unreserve(WriteBehind *wb, uint64_t nb_clusters);

/**
 * wb_continues:
 * @wb: the WriteBehind.
 * @offset: where a write would start.
 *
 * Returns: whether a write that starts at @offset continues a stream.  The
 * answer can only become false after wb_accept(), wb_co_write(),
 * wb_end_streams(), wb_co_write_out(), wb_drop_written(), wb_co_discard(), or
 * while nothing is reserved.
 */
bool wb_continues(WriteBehind *wb, int64_t offset);

/**
 * wb_accept:
 * @wb: the WriteBehind.
 * @nb_clusters: what was passed to wb_co_reserve(); used up by this call.
 * @offset: where the data goes on the child.
 * @bytes: size of the data.
 * @buf: the data, which is copied.
 *
 * Store a write.  It must continue a stream, or start in a cluster of which
 * nothing is cached, and reach no other cached cluster.  Does not yield.
 *
 * Returns: true if the data is stored; false if the write is not of this kind.
 * The cache is unchanged then.
 */
bool coroutine_fn GRAPH_RDLOCK
wb_accept(WriteBehind *wb, uint64_t nb_clusters,
          int64_t offset, int64_t bytes, const void *buf);

/**
 * wb_co_write:
 * @wb: the WriteBehind.
 * @offset: where the data goes on the child.
 * @bytes: size of the data.
 * @qiov: has the data, which is copied.
 * @qiov_offset: where in @qiov it begins.
 * @may_begin: whether a stream may begin at @offset.
 *
 * Store what lies in the first cluster of a write, if the cache takes it: it
 * replaces cached bytes, up to the first one that is not cached or that is in
 * flight; or it continues a stream; or, with @may_begin, it begins one.
 * Reserves for itself what memory it needs, and waits for it.
 *
 * Returns: how many bytes from the start of the write are stored; 0 if the
 * write is not of this kind; the negative errno of wb_co_reserve() if the
 * latest write to the child has failed, or the cache is full, and cached data
 * cannot be written.
 */
int64_t coroutine_fn GRAPH_RDLOCK
wb_co_write(WriteBehind *wb, int64_t offset, int64_t bytes, QEMUIOVector *qiov,
            size_t qiov_offset, bool may_begin);

/**
 * wb_co_preadv_part:
 * @wb: the WriteBehind.
 * @offset: where to read on the child.
 * @bytes: how much to read.
 * @qiov: filled with the data.
 * @qiov_offset: where in @qiov to begin.
 * @flags: for the requests to the child.
 *
 * Read cached data from the cache and everything else from the child.  All that
 * is cached when this is called is copied before the child is read.  If padding
 * is allowed, bytes that follow cached bytes of the same read up to the end of
 * their cluster are not read from the child: they are zero.
 *
 * Returns: 0 on success, else the negative errno of a read of the child.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_preadv_part(WriteBehind *wb, int64_t offset,
                  int64_t bytes, QEMUIOVector *qiov, size_t qiov_offset,
                  BdrvRequestFlags flags);

/**
 * wb_is_empty:
 * @wb: the WriteBehind.
 *
 * One atomic read.  A caller that excludes wb_accept() and wb_co_write() can
 * rely on it.
 *
 * Returns: whether nothing is cached.
 */
bool wb_is_empty(WriteBehind *wb);

/**
 * wb_read_piece:
 * @wb: the WriteBehind.
 * @offset: where to read on the child.
 * @bytes: how much to read; set to the size of the piece.
 * @qiov: filled with the data if it is cached.
 * @qiov_offset: where in @qiov to begin.
 *
 * Read the first piece of a range if it is cached.  The piece is all of the
 * range that is cached, or all of it that is not, from its start on.  Does not
 * yield.
 *
 * Returns: true if the piece was cached and read; false if it is on the child.
 */
bool coroutine_fn wb_read_piece(WriteBehind *wb, int64_t offset, int64_t *bytes,
                                QEMUIOVector *qiov, size_t qiov_offset);

/**
 * wb_gap:
 * @wb: the WriteBehind.
 * @offset: start of a range.
 * @bytes: size of the range.
 *
 * Returns: how many bytes from the start of the range are not cached; 0 if its
 * first byte is cached, @bytes if nothing of it is.  As long as the caller
 * prevents the range from being discarded, bytes only cease to be cached when
 * they were written to the child.
 */
int64_t wb_gap(WriteBehind *wb, int64_t offset, int64_t bytes);

/**
 * wb_is_dirty:
 * @wb: the WriteBehind.
 *
 * Returns: whether there is cached data that is not on the child, or in flight.
 */
bool wb_is_dirty(WriteBehind *wb);

/**
 * wb_end_streams:
 * @wb: the WriteBehind.
 *
 * Say that no stream will be continued, so that the next flush can write them
 * out with aligned ends (if padding is allowed) and release their memory.  Does
 * nothing while anything is reserved.
 */
void wb_end_streams(WriteBehind *wb);

/**
 * wb_co_flush, wb_flush:
 * @bs: its node, which the generator of wb_flush() wants.
 * @wb: the WriteBehind.
 *
 * Write everything to the child that was cached when this was called.  Ends
 * also under a stream of further writes.  Does not flush the child.
 *
 * wb_flush() can be called outside of coroutines as well.
 *
 * Returns: 0 if all of that data is on the child; else the negative errno of a
 * failed write, after the first failure.  The data stays cached.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_flush(BlockDriverState *bs, WriteBehind *wb);
int co_wrapper_mixed_bdrv_rdlock
wb_flush(BlockDriverState *bs, WriteBehind *wb);

/**
 * wb_co_settle:
 * @wb: the WriteBehind.
 * @mode: what to do; see BdrvSettleMode.
 *
 * What a driver does for BlockDriver.bdrv_co_settle.  With BDRV_SETTLE_STOP and
 * BDRV_SETTLE_IDLE, waits for background writes that are in flight.  Writes
 * that callers of other functions make themselves, in order to flush or to
 * have room, go on.
 *
 * Returns: with BDRV_SETTLE_WRITE, 1 if there is more to write, 0 if not, or
 * the negative errno of a failed write; otherwise 0.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_settle(WriteBehind *wb, BdrvSettleMode mode);

/**
 * wb_cancel_in_flight:
 * @wb: the WriteBehind.
 *
 * What a driver does for BlockDriver.bdrv_cancel_in_flight: until the caller is
 * through and calls wb_co_settle(), or for a minute, do not begin background
 * writes, and write no more than necessary for those who wait for room.
 */
void wb_cancel_in_flight(WriteBehind *wb);

/**
 * wb_start_write_out:
 * @wb: the WriteBehind.
 *
 * Write out in the background everything that is cached now, one request at a
 * time, and then call @written_out of WriteBehindOptions.  Begins with a new
 * attempt if the latest write to the child has failed.  If a write fails, what
 * is left is written after the next flush that succeeds, if not by it.
 *
 * Does not wait; may be called where the graph lock is held for writing.
 */
void wb_start_write_out(WriteBehind *wb);

/**
 * wb_co_write_out:
 * @wb: the WriteBehind.
 * @offset: start of a range.
 * @bytes: size of the range.
 * @lock: NULL; or a lock that the caller holds, so that nobody relies on
 *        wb_continues() when the streams are ended.  It is released while this
 *        waits.
 *
 * Make room for a request to the child: end the streams in the clusters that
 * the range touches, and write them (and what was cached before them) to the
 * child.  Nothing that was cached in the range when this was called is cached
 * any more when it succeeds.  Cheap if nothing of the range is cached.
 *
 * Returns: 0 on success; 1 if @lock was released meanwhile; else the negative
 * errno of a failed write, after the first failure.  The data stays cached.
 */
int coroutine_fn GRAPH_RDLOCK
wb_co_write_out(WriteBehind *wb, int64_t offset, int64_t bytes, CoMutex *lock);

/**
 * wb_drop_written:
 * @wb: the WriteBehind.
 * @offset: start of a range.
 * @bytes: size of the range.
 *
 * End the streams in the clusters that the range touches, and drop what they
 * have of data that is on the child already; what shares a block of the child
 * with newer data stays, and will be written again.  Waits for what is in
 * flight there.  For use after wb_co_write_out() has failed, when somebody else
 * has written to the child.
 */
void coroutine_fn GRAPH_RDLOCK
wb_drop_written(WriteBehind *wb, int64_t offset,
                int64_t bytes);

/**
 * wb_co_discard, wb_discard:
 * @bs: its node, which the generator of wb_discard() wants.
 * @wb: the WriteBehind.
 * @offset: start of the range.
 * @bytes: size of the range.
 *
 * Drop all cached data of the clusters that the range touches, and wait until
 * no write to any of them is in flight.  On return, somebody else may write
 * there, as long as the caller prevents new writes to the range from being
 * accepted.
 *
 * wb_discard() can be called outside of coroutines as well.
 */
void coroutine_fn GRAPH_RDLOCK
wb_co_discard(BlockDriverState *bs, WriteBehind *wb, int64_t offset,
              int64_t bytes);
void co_wrapper_mixed_bdrv_rdlock
wb_discard(BlockDriverState *bs, WriteBehind *wb, int64_t offset,
           int64_t bytes);

/**
 * wb_get_stats:
 * @wb: the WriteBehind.
 *
 * Returns: its statistics, to be freed with qapi_free_BlockStatsWriteBehind().
 * The QAPI schema describes them.
 */
BlockStatsWriteBehind *wb_get_stats(WriteBehind *wb);

#endif /* BLOCK_WRITE_BEHIND_H */
