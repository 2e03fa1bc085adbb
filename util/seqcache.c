/*
 * SeqCache: a cache for small sequential writes
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
 *
 * A cluster and its buffer are one slot of a slab and are never separated.
 * Free slots are reused in the order in which they became free: then small
 * clusters that follow each other are mostly neighbours in memory too, and
 * a request needs few elements in its vector.
 */

#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "qemu/seqcache.h"

/* A slab gets this large, unless that means too many or no clusters */
#define SLAB_SIZE (64 * 1024)
#define SLAB_MAX_CLUSTERS 128

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
    int niov;
} SeqRun;

typedef struct SeqRequest {
    SeqCacheRequest req; /* what the user sees */

    GList link; /* in SeqCache.requests; data is the request itself */

    unsigned nb_clusters;
    SeqCluster *clusters[];
} SeqRequest;

struct SeqCache {
    uint32_t cluster_size;
    int cluster_bits;
    unsigned max_unfinished;
    bool pad;

    GHashTable *clusters; /* set of SeqCluster, doomed ones included */
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

SeqCache *seqcache_new(const SeqCacheOptions *opts)
{
    SeqCache *s;

    assert(opts->cluster_size > 0 &&
           opts->cluster_size <= SEQCACHE_MAX_CLUSTER_SIZE &&
           is_power_of_2(opts->cluster_size));
    assert(opts->max_unfinished > 0);

    s = g_new0(SeqCache, 1);
    s->cluster_size = opts->cluster_size;
    s->cluster_bits = ctz32(opts->cluster_size);
    s->max_unfinished = opts->max_unfinished;
    s->pad = opts->pad;
    s->clusters = g_hash_table_new(g_int64_hash, g_int64_equal);
    s->slab_clusters = g_ptr_array_new_with_free_func(g_free);
    s->slab_buffers = g_ptr_array_new_with_free_func(qemu_vfree);
    s->next_seq = 1;
    return s;
}

/* Get memory for some more clusters */
static void slab_new(SeqCache *s)
{
    unsigned n = MIN(MAX(SLAB_SIZE / s->cluster_size, 1), SLAB_MAX_CLUSTERS);
    SeqCluster *clusters = g_new0(SeqCluster, n);
    uint8_t *buffers = qemu_memalign(qemu_real_host_page_size(),
                                     (size_t)n * s->cluster_size);
    unsigned i;

    g_ptr_array_add(s->slab_clusters, clusters);
    g_ptr_array_add(s->slab_buffers, buffers);

    for (i = 0; i < n; i++) {
        clusters[i].buf = buffers + (size_t)i * s->cluster_size;
        clusters[i].link.data = &clusters[i];
        g_queue_push_tail_link(&s->free, &clusters[i].link);
    }
}

void seqcache_free(SeqCache *s)
{
    if (!s) {
        return;
    }
    assert(g_queue_is_empty(&s->requests));

    g_hash_table_destroy(s->clusters);
    g_ptr_array_unref(s->slab_clusters);
    g_ptr_array_unref(s->slab_buffers);
    g_free(s);
}

/* Begin an unfinished cluster with an empty run */
static SeqCluster *cluster_new(SeqCache *s, int64_t offset)
{
    SeqCluster *c;
    GList *link;

    if (g_queue_is_empty(&s->free)) {
        slab_new(s);
    }
    link = g_queue_pop_head_link(&s->free);
    c = link->data;

    c->index = offset >> s->cluster_bits;
    c->begin = offset_in_cluster(s, offset);
    c->end = c->flushed = c->flush_end = c->begin;
    c->unfinished = true;
    c->in_flight = false;
    c->doomed = false;
    c->seq = s->next_seq++;
    c->point = 0;

    g_hash_table_add(s->clusters, c);
    g_queue_push_tail_link(&s->unfinished, link);
    return c;
}

/* Its bytes no longer count */
static void cluster_forget(SeqCache *s, const SeqCluster *c)
{
    s->bytes_cached -= c->end - c->begin;
    s->bytes_unwritten -= c->end - c->flushed;
}

/* Remove a forgotten cluster that is in no list from the cache */
static void cluster_free(SeqCache *s, SeqCluster *c)
{
    g_hash_table_remove(s->clusters, c);
    g_queue_push_tail_link(&s->free, &c->link);

    /* Give memory back, but let a stream that is flushed often keep a slab */
    if (!g_hash_table_size(s->clusters) && s->slab_buffers->len > 1) {
        g_queue_init(&s->free);
        g_ptr_array_set_size(s->slab_clusters, 0);
        g_ptr_array_set_size(s->slab_buffers, 0);
    }
}

/* Insert by number.  The place is searched from @hint, which is in the list. */
static void ready_insert(SeqCache *s, SeqCluster *c, GList *hint)
{
    while (hint && ((SeqCluster *)hint->data)->seq > c->seq) {
        hint = hint->prev;
    }
    while (hint && hint->next &&
           ((SeqCluster *)hint->next->data)->seq < c->seq) {
        hint = hint->next;
    }
    g_queue_insert_after_link(&s->ready, hint, &c->link);
    s->bytes_ready += c->end - c->flushed;

    if (!hint) {
        s->ahead.first = NULL;
    }
}

static void ready_remove(SeqCache *s, SeqCluster *c)
{
    g_queue_unlink(&s->ready, &c->link);
    s->bytes_ready -= c->end - c->flushed;
    s->ahead.first = NULL;
}

/* Finish an unfinished cluster.  It is gone if there is nothing to write. */
static void cluster_finish(SeqCache *s, SeqCluster *c)
{
    g_queue_unlink(&s->unfinished, &c->link);
    c->unfinished = false;

    if (c->in_flight) {
        /* seqcache_complete() sees to it */
    } else if (c->flushed < c->end) {
        /* Only clusters that were begun since are passed on the way */
        ready_insert(s, c, s->ready.tail);
    } else {
        cluster_forget(s, c);
        cluster_free(s, c);
    }
}

/*
 * The clusters that a range touches, from its start on: an iterator.  The cost
 * is that of the range or that of the cache, whichever has fewer clusters; in
 * the latter case there is no order (@sorted is false).
 */
typedef struct SeqRange {
    const SeqCache *s;
    int64_t next; /* index of a cluster */
    int64_t end;
    bool sorted;
    GHashTableIter iter;
} SeqRange;

static SeqRange range_new(const SeqCache *s, int64_t first, int64_t end)
{
    SeqRange r = {
        .s = s,
        .next = first,
        .end = end,
        .sorted = end - first <= g_hash_table_size(s->clusters),
    };

    if (!r.sorted) {
        g_hash_table_iter_init(&r.iter, s->clusters);
    }
    return r;
}

/* No cluster may enter or leave the cache before the next call */
static SeqCluster *range_next(SeqRange *r)
{
    gpointer key;

    while (r->sorted && r->next < r->end) {
        SeqCluster *c = cluster_find(r->s, r->next++);

        if (c) {
            return c;
        }
    }
    while (!r->sorted && g_hash_table_iter_next(&r->iter, &key, NULL)) {
        SeqCluster *c = key;

        if (c->index >= r->next && c->index < r->end) {
            return c;
        }
    }
    return NULL;
}

/* The cluster with the lowest index in a range, if there is any */
static SeqCluster *range_first(const SeqCache *s, int64_t first, int64_t end,
                               bool doomed)
{
    SeqRange r = range_new(s, first, end);
    SeqCluster *c, *found = NULL;

    while (!(found && r.sorted) && (c = range_next(&r))) {
        if ((doomed || !c->doomed) && (!found || c->index < found->index)) {
            found = c;
        }
    }
    return found;
}

bool seqcache_continues(const SeqCache *s, int64_t offset)
{
    SeqCluster *c = cluster_find(s, offset >> s->cluster_bits);

    return c && c->unfinished && c->end == offset_in_cluster(s, offset);
}

bool seqcache_can_write(const SeqCache *s, int64_t offset, int64_t bytes)
{
    int64_t first = offset >> s->cluster_bits;
    int64_t end = range_end(s, offset, bytes);

    return !bytes ||
           ((!cluster_find(s, first) || seqcache_continues(s, offset)) &&
            !range_first(s, first + 1, end, true));
}

void seqcache_write(SeqCache *s, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset)
{
    while (bytes) {
        uint32_t pos = offset_in_cluster(s, offset);
        uint32_t n = MIN(bytes, s->cluster_size - pos);
        SeqCluster *c = cluster_find(s, offset >> s->cluster_bits);

        if (!c) {
            c = cluster_new(s, offset);
        }
        assert(c->unfinished && c->end == pos);

        qemu_iovec_to_buf(qiov, qiov_offset, c->buf + pos, n);
        c->end += n;
        s->bytes_cached += n;
        s->bytes_unwritten += n;

        if (c->end == s->cluster_size) {
            cluster_finish(s, c);
        } else if (s->unfinished.length > s->max_unfinished) {
            seqcache_finish_oldest(s);
        }

        offset += n;
        qiov_offset += n;
        bytes -= n;
    }
}

/* How many bytes from @offset on are cached in @c, which can be NULL */
static uint32_t cluster_cached(const SeqCache *s, const SeqCluster *c,
                               int64_t offset)
{
    uint32_t pos = offset_in_cluster(s, offset);

    return c && !c->doomed && pos >= c->begin && pos < c->end ?
           c->end - pos : 0;
}

int64_t seqcache_overwrite(SeqCache *s, int64_t offset, int64_t bytes,
                           QEMUIOVector *qiov, size_t qiov_offset)
{
    int64_t done = 0;

    while (done < bytes) {
        uint32_t pos = offset_in_cluster(s, offset + done);
        SeqCluster *c = cluster_find(s, (offset + done) >> s->cluster_bits);
        uint32_t n = MIN(bytes - done, cluster_cached(s, c, offset + done));

        if (!n || c->in_flight) {
            break;
        }
        qemu_iovec_to_buf(qiov, qiov_offset + done, c->buf + pos, n);
        done += n;

        if (pos < c->flushed) {
            s->bytes_unwritten += c->flushed - pos;
            if (!c->unfinished) {
                s->bytes_ready += c->flushed - pos;
                s->ahead.first = NULL;
            } else if (c->flushed == c->flush_end) {
                /* The flush points so far got what they wanted */
                c->point = s->next_seq - 1;
            }
            c->flushed = pos;
        }
    }
    return done;
}

int64_t seqcache_read(const SeqCache *s, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset)
{
    int64_t done = 0;

    while (done < bytes) {
        uint32_t pos = offset_in_cluster(s, offset + done);
        SeqCluster *c = cluster_find(s, (offset + done) >> s->cluster_bits);
        uint32_t n = MIN(bytes - done, cluster_cached(s, c, offset + done));

        if (!n) {
            break;
        }
        qemu_iovec_from_buf(qiov, qiov_offset + done, c->buf + pos, n);
        done += n;
    }
    return done;
}

int64_t seqcache_gap(const SeqCache *s, int64_t offset, int64_t bytes)
{
    int64_t index = offset >> s->cluster_bits;
    int64_t end = range_end(s, offset, bytes);
    SeqCluster *c = cluster_find(s, index);

    if (!bytes) {
        return 0;
    }
    if (!c || c->doomed || offset_in_cluster(s, offset) >= c->end) {
        c = range_first(s, index + 1, end, false);
        if (!c) {
            return bytes;
        }
    }
    return MIN(bytes, MAX(cluster_offset(s, c) + c->begin - offset, 0));
}

bool seqcache_finish_oldest(SeqCache *s)
{
    GList *link = g_queue_peek_head_link(&s->unfinished);

    if (!link) {
        return false;
    }
    cluster_finish(s, link->data);
    return true;
}

void seqcache_finish(SeqCache *s, int64_t offset, int64_t bytes)
{
    int64_t first = offset >> s->cluster_bits;
    int64_t end = range_end(s, offset, bytes);
    GList *link, *next;

    for (link = s->unfinished.head; link; link = next) {
        SeqCluster *c = link->data;

        next = link->next;
        if (c->index >= first && c->index < end) {
            cluster_finish(s, c);
        }
    }
}

bool seqcache_is_clean(const SeqCache *s)
{
    return !s->bytes_unwritten && !s->requests.length;
}

uint64_t seqcache_flush_point(SeqCache *s)
{
    uint64_t point = s->next_seq++;
    GList *link;

    for (link = s->unfinished.head; link; link = link->next) {
        SeqCluster *c = link->data;

        if (c->flush_end == c->end) {
            continue;
        }
        if (c->flushed == c->flush_end) {
            c->point = point - 1;
        } else if (c->in_flight && !c->point_in_flight) {
            c->point_in_flight = point - 1;
        }
        c->flush_end = c->end;
    }
    return point;
}

bool seqcache_is_flushed(const SeqCache *s, uint64_t point)
{
    GList *link = s->ready.head;
    unsigned i;

    if (link && ((SeqCluster *)link->data)->seq < point) {
        return false;
    }

    for (link = s->unfinished.head; link; link = link->next) {
        const SeqCluster *c = link->data;

        if (c->point < point && c->flushed < c->flush_end) {
            return false;
        }
    }

    for (link = s->requests.head; link; link = link->next) {
        const SeqRequest *r = link->data;

        for (i = 0; i < r->nb_clusters; i++) {
            const SeqCluster *c = r->clusters[i];

            if (c->seq < point && !c->unfinished && !c->doomed) {
                return false;
            }
        }
    }
    return true;
}

/* Where the bytes to be written out next end, not counting padding */
static uint32_t pending_end(const SeqCluster *c)
{
    return c->unfinished ? c->flush_end : c->end;
}

/* Where they start: with the block that the first unwritten byte is in */
static uint32_t pending_begin(const SeqCluster *c, int64_t align)
{
    return MAX(c->begin, QEMU_ALIGN_DOWN(c->flushed, align));
}

/* Where they end when they are the last in a request */
static uint32_t padded_end(const SeqCache *s, const SeqCluster *c,
                                 int64_t align)
{
    int64_t end = pending_end(c);

    if (s->pad && !c->unfinished && align <= s->cluster_size) {
        int64_t padded = QEMU_ALIGN_UP(end, align);

        if (padded <= INT64_MAX - cluster_offset(s, c)) {
            return padded;
        }
    }
    return end;
}

/* Can anything of this cluster be handed out now? */
static bool cluster_is_pending(const SeqCluster *c, bool unfinished)
{
    return !c->in_flight && (unfinished || !c->unfinished) &&
           c->flushed < pending_end(c);
}

/* The cluster that follows a ready one in address space, if it is cached */
static SeqCluster *cluster_next(const SeqCache *s, const SeqCluster *c)
{
    /* Mostly it was begun right after it */
    if (c->link.next) {
        SeqCluster *next = c->link.next->data;

        if (next->index == c->index + 1) {
            return next;
        }
    }
    return cluster_find(s, c->index + 1);
}

static void run_init(const SeqCache *s, SeqRun *run, SeqCluster *first,
                     const SeqCacheLimits *limits)
{
    assert(is_power_of_2(limits->align));
    assert(limits->max_bytes > 0 && limits->max_iov > 0);

    run->first = run->last = first;
    run->bytes = padded_end(s, first, limits->align) -
                 pending_begin(first, limits->align);
    run->niov = 1;
}

/*
 * Add the following clusters to a run, as far as possible.
 *
 * Returns: true if there are more, but the limits do not allow them.
 */
static bool run_extend(const SeqCache *s, SeqRun *run,
                       const SeqCacheLimits *limits, bool unfinished)
{
    while (pending_end(run->last) == s->cluster_size) {
        SeqCluster *c = cluster_next(s, run->last);
        bool adjacent;
        uint32_t n;

        if (!c || !cluster_is_pending(c, unfinished) ||
            pending_begin(c, limits->align) > 0) {
            break;
        }

        adjacent = run->last->buf + s->cluster_size == c->buf;
        n = padded_end(s, c, limits->align);
        if (run->bytes > limits->max_bytes - n ||
            (!adjacent && run->niov == limits->max_iov)) {
            return true;
        }
        run->last = c;
        run->bytes += n;
        run->niov += !adjacent;
    }
    return false;
}

/* The first in order of all clusters that have something to hand out */
static SeqCluster *flush_first(const SeqCache *s, bool unfinished)
{
    SeqCluster *c = s->ready.head ? s->ready.head->data : NULL;
    GList *link;

    if (unfinished) {
        for (link = s->unfinished.head; link; link = link->next) {
            SeqCluster *u = link->data;

            if (c && c->seq < u->seq) {
                break;
            }
            if (cluster_is_pending(u, true)) {
                return u;
            }
        }
    }
    return c;
}

/* Make a request of the part of a run that is in [start, end) */
static SeqRequest *request_new(SeqCache *s, const SeqRun *run, int64_t start,
                               int64_t end)
{
    unsigned i, n = range_end(s, start, end - start) -
                    (start >> s->cluster_bits);
    SeqRequest *r = g_malloc(sizeof(*r) + n * sizeof(r->clusters[0]));
    SeqCluster *c = run->first;
    struct iovec *iov = NULL;

    *r = (SeqRequest) {
        .req.offset = start,
        .req.bytes = end - start,
        .req.iov = g_new(struct iovec, run->niov),
        .link.data = r,
        .nb_clusters = n,
    };
    g_queue_push_tail_link(&s->requests, &r->link);

    for (i = 0; i < n; i++) {
        uint32_t pos = offset_in_cluster(s, start);
        uint32_t bytes = MIN(end - start, s->cluster_size - pos);
        SeqCluster *next = cluster_next(s, c);

        if (pos + bytes > pending_end(c)) {
            memset(c->buf + c->end, 0, pos + bytes - c->end);
        }
        if (iov && (uint8_t *)iov->iov_base + iov->iov_len == c->buf) {
            iov->iov_len += bytes;
        } else {
            iov = &r->req.iov[r->req.niov++];
            iov->iov_base = c->buf + pos;
            iov->iov_len = bytes;
        }
        r->clusters[i] = c;
        start += bytes;

        c->in_flight = true;
        c->point_in_flight = 0;
        if (!c->unfinished) {
            ready_remove(s, c);
        }
        c = next;
    }
    return r;
}

SeqCacheRequest *seqcache_get_next_flush(SeqCache *s,
                                         const SeqCacheLimits *limits,
                                         bool unfinished)
{
    SeqCluster *first = flush_first(s, unfinished);
    int64_t start, end, bound;
    SeqRun run;
    bool cut;

    if (!first) {
        return NULL;
    }

    run_init(s, &run, first, limits);
    cut = run_extend(s, &run, limits, unfinished);
    start = cluster_offset(s, first) + pending_begin(first, limits->align);
    end = start + run.bytes;

    if (!unfinished || cut) {
        /* All but the last cluster are full: cut the rest off at a boundary */
        bound = QEMU_ALIGN_DOWN(end, MAX(limits->align, s->cluster_size));
        if (!QEMU_IS_ALIGNED(end, limits->align) && bound > start) {
            end = bound;
        }
    }
    return &request_new(s, &run, start, end)->req;
}

int64_t seqcache_next_flush_bytes(SeqCache *s, const SeqCacheLimits *limits)
{
    SeqCluster *first = flush_first(s, false);

    if (!first) {
        return 0;
    }

    if (!s->ahead.first || s->ahead_limits.align != limits->align ||
        s->ahead_limits.max_bytes != limits->max_bytes ||
        s->ahead_limits.max_iov != limits->max_iov) {
        run_init(s, &s->ahead, first, limits);
        s->ahead_limits = *limits;
    }
    run_extend(s, &s->ahead, limits, false);

    return s->ahead.bytes - (padded_end(s, s->ahead.last, limits->align) -
                             s->ahead.last->end);
}

void seqcache_complete(SeqCache *s, SeqCacheRequest *req, bool success)
{
    SeqRequest *r = container_of(req, SeqRequest, req);
    GList *hint = s->ready.head;
    unsigned i;

    g_queue_unlink(&s->requests, &r->link);

    for (i = 0; i < r->nb_clusters; i++) {
        SeqCluster *c = r->clusters[i];

        c->in_flight = false;
        if (c->doomed) {
            cluster_free(s, c);
            continue;
        }
        if (success) {
            /* Padding may reach beyond the run, a run beyond the request */
            uint32_t flushed = MIN(c->end, req->offset + req->bytes -
                                           cluster_offset(s, c));

            s->bytes_unwritten -= flushed - c->flushed;
            c->flushed = flushed;
            c->point = c->point_in_flight;
        }

        if (c->unfinished) {
            continue;
        }
        if (c->flushed == c->end) {
            cluster_forget(s, c);
            cluster_free(s, c);
        } else {
            ready_insert(s, c, hint);
            hint = &c->link;
        }
    }

    g_free(req->iov);
    g_free(r);
}

bool seqcache_discard(SeqCache *s, int64_t offset, int64_t bytes)
{
    SeqRange r = range_new(s, offset >> s->cluster_bits,
                           range_end(s, offset, bytes));
    GQueue dropped = G_QUEUE_INIT;
    bool in_flight = false;
    SeqCluster *c;
    GList *link;

    while ((c = range_next(&r))) {
        in_flight |= c->in_flight;
        if (c->doomed) {
            continue;
        }

        cluster_forget(s, c);
        if (c->unfinished) {
            g_queue_unlink(&s->unfinished, &c->link);
            c->unfinished = false;
        } else if (!c->in_flight) {
            ready_remove(s, c);
        }
        c->doomed = c->in_flight;
        if (!c->in_flight) {
            g_queue_push_tail_link(&dropped, &c->link);
        }
    }

    while ((link = g_queue_pop_head_link(&dropped))) {
        cluster_free(s, link->data);
    }
    return in_flight;
}

bool seqcache_drop_written(SeqCache *s, int64_t offset, int64_t bytes,
                           int64_t align)
{
    SeqRange r;
    bool in_flight = false;
    SeqCluster *c;

    seqcache_finish(s, offset, bytes);

    r = range_new(s, offset >> s->cluster_bits, range_end(s, offset, bytes));
    while ((c = range_next(&r))) {
        if (!c->doomed) {
            /* There is more of the run: it is finished, but still cached */
            uint32_t begin = pending_begin(c, align);

            in_flight |= c->in_flight;
            s->bytes_cached -= begin - c->begin;
            c->begin = begin;
        }
    }
    s->ahead.first = NULL;
    return in_flight;
}

uint64_t seqcache_nb_clusters(const SeqCache *s)
{
    return g_hash_table_size(s->clusters);
}

void seqcache_get_stats(const SeqCache *s, SeqCacheStats *stats)
{
    *stats = (SeqCacheStats) {
        .nb_finished = s->ready.length,
        .bytes_finished = s->bytes_ready,
        .bytes_cached = s->bytes_cached,
        .bytes_unwritten = s->bytes_unwritten,
    };
}
