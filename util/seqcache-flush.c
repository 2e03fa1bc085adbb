/*
 * SeqCache: what is written out, and when
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A flush point is a number in the order in which clusters were begun.  A
 * request is a run of clusters that follow each other in address space, as long
 * as the limits allow.
 */

#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "seqcache-int.h"

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
    run->filled = 0;
    run->niov = 1;
}

/*
 * How many zeroes, beside the padding, are between the last cluster of a run
 * and the next one.
 *
 * Returns: their number; -1 if they are not allowed.
 */
static int64_t run_fill(const SeqCache *s, const SeqRun *run, int64_t align)
{
    const SeqCluster *c = run->last;
    uint32_t fill;

    if (pending_end(c) == s->cluster_size) {
        return 0;
    }
    if (!s->pad || !s->fill_percent || c->unfinished ||
        align > s->cluster_size) {
        return -1;
    }
    fill = s->cluster_size - padded_end(s, c, align);
    return (run->filled + fill) * 100 <= s->fill_credit ? fill : -1;
}

/*
 * Add the following clusters to a run, as far as possible.
 *
 * Returns: true if there are more, but the limits do not allow them.
 */
static bool run_extend(const SeqCache *s, SeqRun *run,
                       const SeqCacheLimits *limits, bool unfinished)
{
    int64_t fill;

    while ((fill = run_fill(s, run, limits->align)) >= 0) {
        SeqCluster *c = cluster_next(s, run->last);
        bool adjacent;
        int64_t n;

        if (!c || !cluster_is_pending(c, unfinished) ||
            pending_begin(c, limits->align) > 0) {
            break;
        }

        adjacent = run->last->buf + s->cluster_size == c->buf;
        n = fill + padded_end(s, c, limits->align);
        if (run->bytes > limits->max_bytes - n ||
            (!adjacent && run->niov == limits->max_iov)) {
            return true;
        }
        run->last = c;
        run->bytes += n;
        run->filled += fill;
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
        .filled = run->filled,
        .nb_clusters = n,
    };
    s->fill_credit -= run->filled * 100;
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
            seqcache_ready_remove(s, c);
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
    if (!success) {
        s->fill_credit += r->filled * 100;
    }

    for (i = 0; i < r->nb_clusters; i++) {
        SeqCluster *c = r->clusters[i];

        c->in_flight = false;
        if (success && !c->doomed) {
            /* Padding may reach beyond the run, a run beyond the request */
            uint32_t flushed = MIN(c->end, req->offset + req->bytes -
                                           cluster_offset(s, c));

            s->bytes_unwritten -= flushed - c->flushed;
            c->flushed = flushed;
            c->point = c->point_in_flight;
        }

        if (c->doomed || (!c->unfinished && c->flushed == c->end)) {
            seqcache_cluster_free(s, c);
        } else if (!c->unfinished) {
            seqcache_ready_insert(s, c, hint);
            hint = &c->link;
        }
    }

    g_free(req->iov);
    g_free(r);
}
