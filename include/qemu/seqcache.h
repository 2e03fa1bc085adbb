/*
 * SeqCache: a cache for small sequential writes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A SeqCache collects writes that follow each other at arbitrary byte
 * offsets, until they can be written out in large aligned requests.  It is a
 * data structure only: it does no I/O, takes no locks and knows nothing of
 * coroutines.  All functions on one SeqCache must be serialised by the caller.
 *
 * The address space is cut into clusters of a fixed size.  A cached cluster
 * holds one contiguous run of bytes, which may start and end anywhere inside
 * the cluster, and is in one of these states:
 *
 * unfinished:  The end of the run is still open: a write that starts there
 *              continues it.  One unfinished cluster can exist for each of
 *              several concurrent sequential streams, up to a limit; opening
 *              one more finishes the oldest.
 *
 * finished:    The run reached the end of the cluster or was left behind.  It
 *              takes no more writes.  Once it is written out, it leaves the
 *              cache.
 *
 * A cluster in either state may be in flight: (part of) its run was handed out
 * by seqcache_get_next_flush() and was not yet given back to
 * seqcache_complete().  It can still be read and, when it is unfinished,
 * continued; it is not handed out again until then.
 *
 * All offsets and sizes are in bytes.  A request's offset and size must not be
 * negative, and its end must not exceed INT64_MAX.  Anything else, like any
 * other argument that the comments below do not allow, is the caller's bug and
 * aborts.
 *
 * Look-ups do not depend on the number of cached clusters.  Range operations
 * cost O(min(clusters in the range, clusters cached)).
 *
 * The memory of clusters that leave the cache is used for the next ones.  It is
 * freed when the cache becomes empty, except for 64 KiB or one cluster,
 * whatever is larger.  So the cache takes cluster_size bytes for each cluster
 * that it held at most since it was empty, rounded up to 64 KiB, and about a
 * hundred bytes more for each.
 */

#ifndef QEMU_SEQCACHE_H
#define QEMU_SEQCACHE_H

#include "qemu/iov.h"

/* The largest cluster that a SeqCache can be created with */
#define SEQCACHE_MAX_CLUSTER_SIZE (64 * 1024 * 1024)

typedef struct SeqCache SeqCache;

/**
 * SeqCacheOptions: how a SeqCache is to behave; fixed for its life time
 * @cluster_size: size of a cluster; a power of two, at most
 *                SEQCACHE_MAX_CLUSTER_SIZE.
 * @max_unfinished: how many clusters may be unfinished at a time; at least 1.
 * @pad: whether seqcache_get_next_flush() may append zeroes to the run of a
 *       finished cluster to make the end of a request aligned.  Only for users
 *       who know that nobody else stores data in the rest of the cluster.
 * @fill_percent: with @pad, the zeroes may go on up to the end of the cluster
 *                where this lets the request go on in the next cluster: up to
 *                that many bytes for each hundred that were stored; at most
 *                100.
 */
typedef struct SeqCacheOptions {
    int64_t cluster_size;
    unsigned max_unfinished;
    bool pad;
    unsigned fill_percent;
} SeqCacheOptions;

/**
 * SeqCacheLimits: what a request handed out should look like
 * @align: alignment that makes a request cheap; a power of two.
 * @max_bytes: the request gets no larger than this, padding included, except
 *             that it always holds at least one cluster's run; more than 0.
 * @max_iov: the request gets no more elements than this; at least 1.
 */
typedef struct SeqCacheLimits {
    int64_t align;
    int64_t max_bytes;
    int max_iov;
} SeqCacheLimits;

/**
 * SeqCacheRequest: bytes handed out for writing
 * @offset: where to write.
 * @bytes: how much to write: the sum of the elements of @iov.
 * @iov: the data.  The memory belongs to the cache, is constant while the
 *       request exists, and is valid until seqcache_complete().
 * @niov: number of elements of @iov.
 *
 * The cache owns the structure as well; further members are private.
 */
typedef struct SeqCacheRequest {
    int64_t offset;
    int64_t bytes;
    struct iovec *iov;
    int niov;
} SeqCacheRequest;

/**
 * SeqCacheStats: a snapshot of the state of a SeqCache
 * @nb_finished: number of finished clusters that are not in flight.
 * @bytes_finished: bytes of these that are not yet written out, that is, what
 *                  seqcache_get_next_flush() hands out without touching
 *                  unfinished clusters.
 * @bytes_cached: bytes in all runs, written out or not, that is, what
 *                seqcache_read() finds.
 * @bytes_unwritten: bytes of these that were not yet written out; those of
 *                   requests in flight count until they are completed.
 */
typedef struct SeqCacheStats {
    uint64_t nb_finished;
    uint64_t bytes_finished;
    uint64_t bytes_cached;
    uint64_t bytes_unwritten;
} SeqCacheStats;

/**
 * seqcache_new:
 * @opts: how the cache is to behave; copied.  Values outside the ranges given
 *        at SeqCacheOptions are the caller's bug.
 *
 * Create an empty cache.  Allocates no buffers yet.
 *
 * Returns: the cache, to be freed with seqcache_free().
 */
SeqCache *seqcache_new(const SeqCacheOptions *opts);

/**
 * seqcache_free:
 * @s: the cache, or NULL, which does nothing.
 *
 * Free the cache with all its data, written out or not.  No request may be in
 * flight.
 */
void seqcache_free(SeqCache *s);

/**
 * seqcache_can_write:
 * @s: the cache.
 * @offset: start of the intended write.
 * @bytes: its size; 0 is always possible.
 *
 * Tell whether seqcache_write() takes this write.  It does if
 * - the write starts where the run of an unfinished cluster ends, or anywhere
 *   in a cluster that is not cached, and
 * - no further cluster that the write reaches is cached.
 *
 * Returns: true if the write may be passed to seqcache_write().
 */
bool seqcache_can_write(const SeqCache *s, int64_t offset, int64_t bytes);

/**
 * seqcache_continues:
 * @s: the cache.
 * @offset: an offset.
 *
 * Returns: true if the run of an unfinished cluster ends at @offset, so that a
 * write there needs memory only for what lies beyond that cluster.
 */
bool seqcache_continues(const SeqCache *s, int64_t offset);

/**
 * seqcache_write:
 * @s: the cache.
 * @offset: where to write.
 * @bytes: how much to write.
 * @qiov: has the data, which is copied.
 * @qiov_offset: where in @qiov it begins.
 *
 * Store a write in the cache, split at cluster bounds.  A cluster whose run
 * reaches the cluster's end becomes finished, also when it was filled in one
 * go.  If the write leaves one cluster more unfinished than the limit allows,
 * the one that was begun first becomes finished.
 *
 * The write must be one that seqcache_can_write() allows; anything else is the
 * caller's bug and aborts.
 */
void seqcache_write(SeqCache *s, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset);

/**
 * seqcache_overwrite:
 * @s: the cache.
 * @offset: where to write.
 * @bytes: how much to write.
 * @qiov: has the data, which is copied.
 * @qiov_offset: where in @qiov it begins.
 *
 * Replace cached bytes from the start of a range on, up to the first byte that
 * is not cached or that is in flight.  What was written out before will be
 * again.  The states of the clusters do not change.
 *
 * Returns: how many bytes from the start of the range were replaced.
 */
int64_t seqcache_overwrite(SeqCache *s, int64_t offset, int64_t bytes,
                           QEMUIOVector *qiov, size_t qiov_offset);

/**
 * seqcache_read:
 * @s: the cache.
 * @offset: start of the range to read.
 * @bytes: size of the range.
 * @qiov: filled with the bytes found.
 * @qiov_offset: where in @qiov to begin.
 *
 * Copy cached bytes from the start of a range on, crossing from one cached
 * cluster into the next, up to the first byte that is not cached.
 *
 * Returns: how many bytes from the start of the range were cached and copied;
 * 0 for a miss.
 */
int64_t seqcache_read(const SeqCache *s, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset);

/**
 * seqcache_gap:
 * @s: the cache.
 * @offset: start of a range.
 * @bytes: size of the range.
 *
 * The counterpart of seqcache_read(): what has to be read from elsewhere.
 *
 * Returns: how many bytes from the start of the range are not cached; 0 if its
 * first byte is cached, @bytes if nothing of it is.
 */
int64_t seqcache_gap(const SeqCache *s, int64_t offset, int64_t bytes);

/**
 * seqcache_finish_oldest:
 * @s: the cache.
 *
 * Finish the unfinished cluster that was begun first.  If all of its run was
 * written out already, it leaves the cache (when it is in flight: once that is
 * completed).
 *
 * Returns: false if there was no unfinished cluster.
 */
bool seqcache_finish_oldest(SeqCache *s);

/**
 * seqcache_finish:
 * @s: the cache.
 * @offset: start of a range.
 * @bytes: size of the range.
 *
 * Finish all unfinished clusters that the range touches, as
 * seqcache_finish_oldest() does.
 */
void seqcache_finish(SeqCache *s, int64_t offset, int64_t bytes);

/**
 * seqcache_is_clean:
 * @s: the cache.
 *
 * Returns: true if everything that is cached was written out and nothing is in
 * flight.
 */
bool seqcache_is_clean(const SeqCache *s);

/**
 * seqcache_flush_point:
 * @s: the cache.
 *
 * Remember everything that is cached now as to be flushed, including the runs
 * of unfinished clusters as far as they have got, and allow
 * seqcache_get_next_flush() with @unfinished to hand them out.
 *
 * Returns: a number for seqcache_is_flushed().
 */
uint64_t seqcache_flush_point(SeqCache *s);

/**
 * seqcache_is_flushed:
 * @s: the cache.
 * @point: what seqcache_flush_point() returned.
 *
 * Returns: true if all that was cached at that moment has been written out or
 * discarded.  What was written to the cache later does not count, except that
 * a cluster that was unfinished then and has been finished since must be
 * written out whole.
 */
bool seqcache_is_flushed(const SeqCache *s, uint64_t point);

/**
 * seqcache_get_next_flush:
 * @s: the cache.
 * @limits: what the request should look like.
 * @unfinished: whether the runs of unfinished clusters may be handed out, as
 *              far as they had got at the last seqcache_flush_point().
 *
 * Take the next request to write.  It starts with the cluster that was begun
 * first among all that have something to hand out, and goes on with those that
 * follow it without a gap in address space.
 *
 * An unfinished cluster can only be the last in a request.  The bytes that it
 * has are handed out without padding; it stays cached and open, and next time
 * only newer bytes are handed out, from the last multiple of @limits->align in
 * its run.
 *
 * A finished cluster of which a part was already written out while it was open
 * is handed out from the last multiple of @limits->align in that part, or from
 * the start of its run.
 *
 * The end of a finished cluster's run that is the last in a request is padded
 * with zeroes up to the next multiple of @limits->align if the cache was
 * created with @pad and @limits->align is not larger than a cluster.  Padding
 * never goes beyond the end of the cluster or INT64_MAX.  Under the same
 * conditions, a finished cluster that ends earlier than the next one begins is
 * filled with zeroes, as far as fill_percent allows.
 *
 * If @unfinished is false, there is no hurry: clusters at the end of the
 * request that would make its end unaligned are left for the next one.  The
 * same holds if there is more to hand out that @limits did not let into the
 * request.  If no other end is aligned either, nothing is left out.
 *
 * Returns: the request, to be given back to seqcache_complete(); NULL if
 * nothing can be handed out.
 */
SeqCacheRequest *seqcache_get_next_flush(SeqCache *s,
                                         const SeqCacheLimits *limits,
                                         bool unfinished);

/**
 * seqcache_next_flush_bytes:
 * @s: the cache.
 * @limits: what the request should look like.
 *
 * As long as @limits stay the same, this is cheap enough to be asked after each
 * write.
 *
 * Returns: the size of the request that seqcache_get_next_flush() would hand
 * out for these limits without unfinished clusters, without padding and with
 * what would be left for the next one to make its end aligned; 0 if there is
 * none.
 */
int64_t seqcache_next_flush_bytes(SeqCache *s, const SeqCacheLimits *limits);

/**
 * seqcache_complete:
 * @s: the cache.
 * @req: what seqcache_get_next_flush() returned; freed.
 * @success: whether all of it was written.
 *
 * Give back a request.  On success, finished clusters that are written out
 * whole leave the cache.  On failure everything is as it was before it was
 * handed out, so that it is handed out again, in its old place in the order.
 * Clusters that were discarded meanwhile leave the cache in both cases.
 */
void seqcache_complete(SeqCache *s, SeqCacheRequest *req, bool success);

/**
 * seqcache_drop_written:
 * @s: the cache.
 * @offset: start of a range.
 * @bytes: size of the range.
 * @align: as in SeqCacheLimits, for the requests that follow.
 *
 * Finish all unfinished clusters that the range touches, as seqcache_finish()
 * does, and drop what was written out of all clusters that it touches, except
 * what the next request begins with for the sake of @align.  For use when
 * somebody else may have written there meanwhile.
 *
 * Returns: true if a part of the range is in flight.  It is not dropped; the
 * caller calls again when the request is complete.
 */
bool seqcache_drop_written(SeqCache *s, int64_t offset, int64_t bytes,
                           int64_t align);

/**
 * seqcache_discard:
 * @s: the cache.
 * @offset: start of a range.
 * @bytes: size of the range.
 *
 * Drop the cached bytes of all clusters that the range touches; a caller that
 * wants to keep what such a cluster holds outside the range writes it out
 * before.  If a cluster is in flight, its bytes can no longer be read and will
 * not be handed out again, but until its request is completed no write to the
 * cluster is possible and its memory is in use.
 *
 * Returns: true if any of these clusters is (still) in flight.
 */
bool seqcache_discard(SeqCache *s, int64_t offset, int64_t bytes);

/**
 * seqcache_nb_clusters:
 * @s: the cache.
 *
 * Returns: the number of cached clusters; each takes cluster_size bytes of
 * memory.  This is one atomic read, which need not be serialised.
 */
uint64_t seqcache_nb_clusters(const SeqCache *s);

/**
 * seqcache_get_stats:
 * @s: the cache.
 * @stats: filled in.
 */
void seqcache_get_stats(const SeqCache *s, SeqCacheStats *stats);

#endif /* QEMU_SEQCACHE_H */
