/*
 * SeqCache: a cache for small sequential writes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A cluster and its buffer are one slot of a slab and are never separated.
 * Free slots are reused in the order in which they became free: then small
 * clusters that follow each other are mostly neighbours in memory too, and
 * a request needs few elements in its vector.
 *
 * util/seqcache-flush.c has what is written out, and when.
 */

#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "seqcache-int.h"

/* A slab gets this large, unless that means too many or no clusters */
#define SLAB_SIZE (64 * 1024)
#define SLAB_MAX_CLUSTERS 128

/* No more credit for zeroes between clusters than to fill that many */
#define MAX_FILL_CLUSTERS 16

SeqCache *seqcache_new(const SeqCacheOptions *opts)
{
    SeqCache *s;

    assert(opts->cluster_size > 0 &&
           opts->cluster_size <= SEQCACHE_MAX_CLUSTER_SIZE &&
           is_power_of_2(opts->cluster_size));
    assert(opts->max_unfinished > 0 && opts->fill_percent <= 100);

    s = g_new0(SeqCache, 1);
    s->cluster_size = opts->cluster_size;
    s->cluster_bits = ctz32(opts->cluster_size);
    s->max_unfinished = opts->max_unfinished;
    s->pad = opts->pad;
    s->fill_percent = opts->fill_percent;
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
    g_atomic_int_set(&s->nb_clusters, g_hash_table_size(s->clusters));
    g_queue_push_tail_link(&s->unfinished, link);
    return c;
}

/* Discard a cluster: its bytes no longer count */
static void cluster_doom(SeqCache *s, SeqCluster *c)
{
    s->bytes_cached -= c->end - c->begin;
    s->bytes_unwritten -= c->end - c->flushed;
    c->doomed = true;
}

void seqcache_cluster_free(SeqCache *s, SeqCluster *c)
{
    if (!c->doomed) {
        cluster_doom(s, c);
    }
    g_hash_table_remove(s->clusters, c);
    g_atomic_int_set(&s->nb_clusters, g_hash_table_size(s->clusters));
    g_queue_push_tail_link(&s->free, &c->link);

    /* Give memory back, but let a stream that is flushed often keep a slab */
    if (!g_hash_table_size(s->clusters) && s->slab_buffers->len > 1) {
        g_queue_init(&s->free);
        g_ptr_array_set_size(s->slab_clusters, 0);
        g_ptr_array_set_size(s->slab_buffers, 0);
    }
}

void seqcache_ready_insert(SeqCache *s, SeqCluster *c, GList *hint)
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

/* Finish an unfinished cluster.  It is gone if there is nothing to write. */
static void cluster_finish(SeqCache *s, SeqCluster *c)
{
    g_queue_unlink(&s->unfinished, &c->link);
    c->unfinished = false;

    if (c->in_flight) {
        /* seqcache_complete() sees to it */
    } else if (c->flushed < c->end) {
        /* Only clusters that were begun since are passed on the way */
        seqcache_ready_insert(s, c, s->ready.tail);
    } else {
        seqcache_cluster_free(s, c);
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
        s->fill_credit = MIN(s->fill_credit + (int64_t)n * s->fill_percent,
                             (int64_t)MAX_FILL_CLUSTERS * 100 *
                             s->cluster_size);

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
        if (c->unfinished) {
            g_queue_unlink(&s->unfinished, &c->link);
            c->unfinished = false;
        } else if (!c->in_flight) {
            seqcache_ready_remove(s, c);
        }
        if (!c->in_flight) {
            g_queue_push_tail_link(&dropped, &c->link);
        } else if (!c->doomed) {
            cluster_doom(s, c);
        }
    }

    while ((link = g_queue_pop_head_link(&dropped))) {
        seqcache_cluster_free(s, link->data);
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
    return g_atomic_int_get(&s->nb_clusters);
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
