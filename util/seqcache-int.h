/*
 * SeqCache: what its files share
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The clusters are found by their index through a hash table.  Besides, each
 * is in at most one list, which its state tells:
 *
 *  free                    SeqCache.free
 *  unfinished              SeqCache.unfinished, also while in flight
 *  finished, not in flight SeqCache.ready
 *  finished, in flight     none; only SeqRequest.clusters knows it
 */

#ifndef UTIL_SEQCACHE_INT_H
#define UTIL_SEQCACHE_INT_H

#include "qemu/seqcache.h"

/*
 * A cached cluster.  Positions count from the start of the cluster, and
 * begin <= flushed <= flush_end <= end.
 */
typedef struct SeqCluster {
    /* Offset divided by the cluster size.  Key of the hash table: stay first */
    int64_t index;
    uint8_t *buf;

    /* The run.  Not empty. */
    uint32_t begin;
    uint32_t end;

    /* The run was written out up to here */
    uint32_t flushed;

    /*
     * Where the run ended at the last flush point, if it was there already
     * (else @begin).  Unused once the cluster is finished: all of it is to be
     * written then.
     */
    uint32_t flush_end;

    /* Still open?  Then it is the end of the run that is less than a cluster */
    bool unfinished;

    /* Is it in a request?  There is no more than one at a time. */
    bool in_flight;

    /*
     * Discarded in flight: counts as finished, but is neither readable nor
     * handed out again.
     */
    bool doomed;

    /* When it was begun; unique, and the order of writing out */
    uint64_t seq;

    /*
     * If it is unfinished and @flushed < @flush_end: flush points up to @point
     * need nothing more of it, and those up to @point_in_flight will not once
     * what is in flight is written.
     */
    uint64_t point;
    uint64_t point_in_flight;

    /* In one of the lists of SeqCache; data is the cluster itself */
    GList link;
} SeqCluster;

/*
 * Clusters that can be one request: @first, @last and all between them in
 * address space
 */
typedef struct SeqRun {
    SeqCluster *first;
    SeqCluster *last;
    int64_t bytes; /* what the request holds, with padding */
    int64_t filled; /* of these: zeroes between clusters */
    int niov;
} SeqRun;

typedef struct SeqRequest {
    SeqCacheRequest req; /* what the user sees */

    GList link; /* in SeqCache.requests; data is the request itself */

    int64_t filled; /* as in SeqRun */
    unsigned nb_clusters;
    SeqCluster *clusters[];
} SeqRequest;

struct SeqCache {
    uint32_t cluster_size;
    int cluster_bits;
    unsigned max_unfinished;
    bool pad;
    unsigned fill_percent;

    GHashTable *clusters; /* set of SeqCluster, doomed ones included */
    gint nb_clusters;     /* their number; atomic */
    GQueue unfinished;    /* by SeqCluster.seq */
    GQueue ready;         /* by SeqCluster.seq */
    GQueue free;          /* first freed, first used */
    GQueue requests;      /* all that were handed out and not completed */

    /* What the slabs consist of; all of it is freed at a time */
    GPtrArray *slab_clusters;
    GPtrArray *slab_buffers;

    /* The number that the next cluster or flush point gets */
    uint64_t next_seq;

    int64_t bytes_cached;    /* in runs, except those of doomed clusters */
    int64_t bytes_unwritten; /* of these: from SeqCluster.flushed on */
    int64_t bytes_ready;     /* of these: in @ready */

    /* How many zeroes there may be between clusters, in 1/100 bytes */
    int64_t fill_credit;

    /*
     * What seqcache_next_flush_bytes() found, and for which limits, so that it
     * need not begin anew: the longest run that starts with the first cluster
     * of @ready, all of it in @ready.  Unknown if ahead.first is NULL.
     */
    SeqRun ahead;
    SeqCacheLimits ahead_limits;
};

static inline int64_t cluster_offset(const SeqCache *s, const SeqCluster *c)
{
    return c->index << s->cluster_bits;
}

static inline uint32_t offset_in_cluster(const SeqCache *s, int64_t offset)
{
    return offset & (s->cluster_size - 1);
}

/* The index after that of the last cluster that a range touches */
static inline int64_t range_end(const SeqCache *s, int64_t offset,
                                int64_t bytes)
{
    assert(offset >= 0 && bytes >= 0 && bytes <= INT64_MAX - offset);

    return (offset >> s->cluster_bits) +
           (bytes ? ((offset_in_cluster(s, offset) + bytes - 1) >>
                     s->cluster_bits) + 1 : 0);
}

static inline SeqCluster *cluster_find(const SeqCache *s, int64_t index)
{
    return g_hash_table_lookup(s->clusters, &index);
}

/*
 * Where the bytes to be written out next start: with the block that the first
 * unwritten byte is in
 */
static inline uint32_t pending_begin(const SeqCluster *c, int64_t align)
{
    return MAX(c->begin, QEMU_ALIGN_DOWN(c->flushed, align));
}

static inline void seqcache_ready_remove(SeqCache *s, SeqCluster *c)
{
    g_queue_unlink(&s->ready, &c->link);
    s->bytes_ready -= c->end - c->flushed;
    s->ahead.first = NULL;
}

/* ---- seqcache.c ---- */

/* Remove a cluster that is in no list from the cache */
void seqcache_cluster_free(SeqCache *s, SeqCluster *c);

/*
 * Insert into SeqCache.ready by number.  The place is searched from @hint,
 * which is in the list; NULL if that is empty.
 */
void seqcache_ready_insert(SeqCache *s, SeqCluster *c, GList *hint);

#endif /* UTIL_SEQCACHE_INT_H */
