/*
 * SeqCache compared with a naive model, for the unit test and the fuzzer
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The model knows a window of the address space, byte by byte, and the rules
 * of include/qemu/seqcache.h.  Bytes and clusters of the window are counted
 * from its start.
 */

#ifndef SEQCACHE_MODEL_H
#define SEQCACHE_MODEL_H

#include "qemu/seqcache.h"

#define MODEL_MAX_BYTES 4096
#define MODEL_MAX_CLUSTERS 64
#define MODEL_MAX_REQUESTS 6
#define MODEL_MAX_POINTS 4

/* Where decisions come from: @rand, or @data until it is used up */
typedef struct ModelInput {
    GRand *rand;
    const uint8_t *data;
    size_t size;
} ModelInput;

typedef struct ModelCluster {
    bool cached;
    bool unfinished;
    bool doomed;
    bool in_flight;
    int begin, end;       /* its run */
    int wanted_end;       /* end of the run at the last flush point, or 0 */
    unsigned order;       /* when it was begun */
} ModelCluster;

typedef struct ModelRequest {
    SeqCacheRequest *req; /* NULL if this one is not in use */
    int begin, end;
    uint8_t *data;        /* what it held when it was handed out */
} ModelRequest;

typedef struct ModelPoint {
    bool set;
    uint64_t number;
    unsigned order;
    bool owed[MODEL_MAX_BYTES]; /* what must be written until it is flushed */
} ModelPoint;

typedef struct Model {
    ModelInput *in;
    SeqCache *s;
    SeqCacheOptions opts;
    int64_t base;   /* address of the window */
    int nb;         /* clusters in the window */
    int cs;         /* cluster size */
    int size;       /* bytes in the window */
    int limit;      /* writes may go up to here */
    unsigned order;

    uint8_t expected[MODEL_MAX_BYTES]; /* what the user must find */
    uint8_t disk[MODEL_MAX_BYTES];     /* what was written out */
    bool cached[MODEL_MAX_BYTES];      /* readable in the cache */
    bool dirty[MODEL_MAX_BYTES];       /* cached, not written out */
    uint8_t next_byte;
    SeqCacheLimits limits;

    ModelCluster clusters[MODEL_MAX_CLUSTERS];
    ModelRequest requests[MODEL_MAX_REQUESTS];
    ModelPoint points[MODEL_MAX_POINTS];
} Model;

/* The operations that copy, from or to one buffer */

static void write_buf(SeqCache *s, int64_t offset, int64_t bytes,
                      const void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, (void *)buf, bytes);

    seqcache_write(s, offset, bytes, &qiov, 0);
}

static int64_t overwrite_buf(SeqCache *s, int64_t offset, int64_t bytes,
                             const void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, (void *)buf, bytes);

    return seqcache_overwrite(s, offset, bytes, &qiov, 0);
}

static int64_t read_buf(SeqCache *s, int64_t offset, int64_t bytes, void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);

    return seqcache_read(s, offset, bytes, &qiov, 0);
}

/* A number below @n, or 0 when the input is used up */
static unsigned model_choose(Model *m, unsigned n)
{
    ModelInput *in = m->in;
    unsigned value;

    if (in->rand) {
        return g_rand_int(in->rand) % n;
    }
    if (!in->size) {
        return 0;
    }
    value = *in->data++;
    in->size--;
    if (n > 256 && in->size) {
        value = value << 8 | *in->data++;
        in->size--;
    }
    return value % n;
}

static void model_drop(Model *m, ModelCluster *c)
{
    int i, k;

    for (i = c->begin; i < c->end; i++) {
        m->cached[i] = false;
        m->dirty[i] = false;
        for (k = 0; k < MODEL_MAX_POINTS; k++) {
            m->points[k].owed[i] = false;
        }
    }
}

static int model_first_dirty(Model *m, const ModelCluster *c)
{
    int i = c->begin;

    while (i < c->end && !m->dirty[i]) {
        i++;
    }
    return i;
}

/* A cluster without anything to write leaves the cache when it is finished */
static void model_maybe_leave(Model *m, ModelCluster *c)
{
    if (!c->unfinished && !c->in_flight &&
        (c->doomed || model_first_dirty(m, c) == c->end)) {
        if (!c->doomed) {
            model_drop(m, c);
        }
        c->cached = false;
    }
}

static void model_finish(Model *m, ModelCluster *c)
{
    int i, k;

    for (k = 0; k < MODEL_MAX_POINTS; k++) {
        if (c->order < m->points[k].order) {
            for (i = c->begin; i < c->end; i++) {
                m->points[k].owed[i] |= m->dirty[i];
            }
        }
    }
    c->unfinished = false;
    model_maybe_leave(m, c);
}

static ModelCluster *model_oldest_unfinished(Model *m, int *count)
{
    ModelCluster *oldest = NULL;
    int i;

    *count = 0;
    for (i = 0; i < m->nb; i++) {
        ModelCluster *c = &m->clusters[i];

        if (c->cached && c->unfinished) {
            ++*count;
            if (!oldest || c->order < oldest->order) {
                oldest = c;
            }
        }
    }
    return oldest;
}

static bool model_can_write(Model *m, int begin, int end)
{
    int i;

    for (i = begin; i < end; i++) {
        ModelCluster *c = &m->clusters[i / m->cs];

        if (c->cached && !(i == begin && c->unfinished && c->end == i)) {
            return false;
        }
        i = (i / m->cs + 1) * m->cs - 1;
    }
    return true;
}

static void model_do_write(Model *m, int begin, int end)
{
    g_autofree uint8_t *buf = g_malloc(end - begin + 1);
    ModelCluster *oldest;
    int i, count;

    for (i = begin; i < end; i++) {
        ModelCluster *c = &m->clusters[i / m->cs];

        if (!c->cached) {
            *c = (ModelCluster) {
                .cached = true, .unfinished = true, .begin = i, .end = i,
                .order = ++m->order,
            };
        }
        m->expected[i] = buf[i - begin] = ++m->next_byte;
        m->cached[i] = true;
        m->dirty[i] = true;
        c->end = i + 1;

        if (c->end % m->cs == 0) {
            model_finish(m, c);
        } else if (c->end == end) {
            oldest = model_oldest_unfinished(m, &count);
            if (count > m->opts.max_unfinished) {
                model_finish(m, oldest);
            }
        }
    }

    write_buf(m->s, m->base + begin, end - begin, buf);
}

/* Choose a place to write to: mostly one that makes sense */
static int model_choose_start(Model *m)
{
    int first = model_choose(m, m->nb);
    int i, cluster;

    switch (model_choose(m, 8)) {
    case 0:
        return model_choose(m, m->limit + 1);
    case 1:
        return MIN(first * m->cs, m->limit);
    default:
        for (i = 0; i < m->nb; i++) {
            cluster = (first + i) % m->nb;
            if (m->clusters[cluster].cached &&
                m->clusters[cluster].unfinished) {
                return m->clusters[cluster].end;
            }
        }
        for (i = 0; i < m->nb; i++) {
            cluster = (first + i) % m->nb;
            if (!m->clusters[cluster].cached) {
                first = cluster * m->cs + model_choose(m, m->cs);
                return MIN(first, m->limit);
            }
        }
        return MIN(first * m->cs, m->limit);
    }
}

static int model_choose_bytes(Model *m, int begin)
{
    int bytes;

    switch (model_choose(m, 4)) {
    case 0:
        bytes = model_choose(m, m->cs + 1);
        break;
    case 1:
        bytes = m->cs - begin % m->cs;
        break;
    case 2:
        bytes = m->cs - begin % m->cs + model_choose(m, 4 * m->cs + 1);
        break;
    default:
        bytes = 1 + model_choose(m, 16);
        break;
    }
    return MIN(bytes, m->limit - begin);
}

static void model_write(Model *m)
{
    int begin = model_choose_start(m);
    int end = begin + model_choose_bytes(m, begin);
    ModelCluster *c = &m->clusters[begin / m->cs];
    bool possible = model_can_write(m, begin, end);
    int last;

    g_assert_cmpint(seqcache_can_write(m->s, m->base + begin, end - begin), ==,
                    possible);
    if (begin < m->size) {
        g_assert_cmpint(seqcache_continues(m->s, m->base + begin), ==,
                        c->cached && c->unfinished && c->end == begin);
    }

    if (possible) {
        model_do_write(m, begin, end);
        return;
    }

    /* As much of it as is possible */
    for (last = begin; last < end; last++) {
        if (!model_can_write(m, begin, last + 1)) {
            break;
        }
    }
    model_do_write(m, begin, last);
}

static void model_overwrite(Model *m)
{
    int begin = model_choose(m, m->limit + 1);
    int bytes = model_choose_bytes(m, begin);
    g_autofree uint8_t *buf = g_malloc(bytes + 1);
    int done, i, k;

    for (i = 0; i < bytes; i++) {
        buf[i] = ++m->next_byte;
    }
    done = overwrite_buf(m->s, m->base + begin, bytes, buf);
    for (i = begin; i < begin + bytes; i++) {
        ModelCluster *c = &m->clusters[i / m->cs];

        if (!m->cached[i] || c->in_flight) {
            break;
        }
        m->expected[i] = buf[i - begin];
        /* All from here on is written out again */
        for (k = i; k < c->end && !m->dirty[k]; k++) {
            m->dirty[k] = true;
        }
        if (!c->unfinished) {
            model_finish(m, c);
        }
    }
    g_assert_cmpint(done, ==, i - begin);
}

/* Questions about ranges that go far beyond the window */
static void model_query(Model *m)
{
    int begin = model_choose(m, m->limit + 1);
    int64_t bytes = INT64_MAX - (m->base + begin) - model_choose(m, 2);
    int gap = begin;

    if (m->limit < m->size) {
        bytes = m->limit - begin;
    }
    g_assert_cmpint(seqcache_can_write(m->s, m->base + begin, bytes), ==,
                    model_can_write(m, begin, m->limit));

    while (gap < m->limit && !m->cached[gap]) {
        gap++;
    }
    g_assert_cmpint(seqcache_gap(m->s, m->base + begin, bytes), ==,
                    gap == m->limit ? bytes : gap - begin);
}

static void model_read(Model *m)
{
    int begin = model_choose(m, m->limit + 1);
    int bytes = model_choose_bytes(m, begin);
    g_autofree uint8_t *buf = g_malloc(bytes + 1);
    int found = 0, gap = 0;

    while (found < bytes && m->cached[begin + found]) {
        found++;
    }
    while (gap < bytes && !m->cached[begin + gap]) {
        gap++;
    }

    memset(buf, 0x55, bytes + 1);
    g_assert_cmpint(read_buf(m->s, m->base + begin, bytes, buf), ==,
                    found);
    g_assert_cmpmem(buf, found, m->expected + begin, found);
    g_assert_cmpint(buf[found], ==, 0x55);
    g_assert_cmpint(seqcache_gap(m->s, m->base + begin, bytes), ==, gap);
}

/* Where the block begins that the first byte to be written is in */
static int model_keep_begin(Model *m, ModelCluster *c, int64_t align)
{
    int dirty = model_first_dirty(m, c);

    while (dirty > c->begin && (m->base + dirty) % align) {
        dirty--;
    }
    return dirty;
}

/* Where the bytes of a cluster that can be handed out begin, or -1 */
static int model_pending_begin(Model *m, ModelCluster *c, bool unfinished,
                               int64_t align)
{
    int end = c->unfinished ? c->wanted_end : c->end;

    if (!c->cached || c->doomed || c->in_flight ||
        (c->unfinished && !unfinished)) {
        return -1;
    }
    if (model_first_dirty(m, c) >= end) {
        return -1;
    }
    return model_keep_begin(m, c, align);
}

static int model_padded_end(Model *m, ModelCluster *c, int64_t align)
{
    int end = c->unfinished ? c->wanted_end : c->end;

    if (m->opts.pad && !c->unfinished && align <= m->cs) {
        while (end < m->limit && (m->base + end) % align) {
            end++;
        }
        if ((m->base + end) % align) {
            return c->end;
        }
    }
    return end;
}

/*
 * Find out what the cache should hand out.
 *
 * Returns: where it begins, or -1 for nothing.  @end: where it ends.
 * @untrimmed: where it would end without trimming and padding.  Both do not
 * take max_iov into account, because the model knows nothing of memory.
 */
static int model_predict(Model *m, bool unfinished, int *end, int *untrimmed)
{
    int64_t align = m->limits.align;
    ModelCluster *c, *first = NULL;
    int begin, i, last, aligned = -1;
    bool cut = false;

    for (i = 0; i < m->nb; i++) {
        c = &m->clusters[i];
        if (model_pending_begin(m, c, unfinished, align) >= 0 &&
            (!first || c->order < first->order)) {
            first = c;
        }
    }
    if (!first) {
        return -1;
    }

    begin = model_pending_begin(m, first, unfinished, align);
    last = first - m->clusters;
    while (true) {
        c = &m->clusters[last];
        *end = model_padded_end(m, c, align);
        if ((m->base + *end) % align == 0) {
            aligned = *end;
        }
        *untrimmed = c->unfinished ? c->wanted_end : c->end;
        if (*untrimmed % m->cs || last + 1 == m->nb) {
            break;
        }
        c = &m->clusters[++last];
        if (model_pending_begin(m, c, unfinished, align) !=
            last * m->cs) {
            break;
        }
        if (model_padded_end(m, c, align) - begin > m->limits.max_bytes) {
            cut = true;
            break;
        }
    }

    if ((!unfinished || cut) && aligned >= 0) {
        *end = aligned;
    }
    return begin;
}

/* Mostly the limits stay the same; sometimes one of them changes */
static void model_choose_limits(Model *m)
{
    static const int max_iov[] = { 1024, 1, 2, 5 };

    switch (model_choose(m, 32)) {
    case 0:
        m->limits.align = 1 << model_choose(m, 13);
        break;
    case 1:
        m->limits.max_bytes = 1 + model_choose(m, 2 * m->size);
        break;
    case 2:
        m->limits.max_iov = max_iov[model_choose(m, ARRAY_SIZE(max_iov))];
        break;
    }
}

static void model_next_flush_bytes(Model *m)
{
    int bytes, begin, end, untrimmed;

    model_choose_limits(m);
    begin = model_predict(m, false, &end, &untrimmed);
    bytes = seqcache_next_flush_bytes(m->s, &m->limits);
    if (begin < 0) {
        g_assert_cmpint(bytes, ==, 0);
    } else if (m->limits.max_iov >= m->nb) {
        g_assert_cmpint(bytes, ==, untrimmed - begin);
    } else {
        g_assert_cmpint(bytes, >, 0);
        g_assert_cmpint(bytes, <=, untrimmed - begin);
    }
}

/* Note a request and compare its bytes with what they should be */
static void model_take(Model *m, ModelRequest *r)
{
    int i, n = 0;

    r->data = g_malloc(r->end - r->begin);
    g_assert_cmpint(r->req->niov, >, 0);
    g_assert_cmpint(r->req->niov, <=, m->limits.max_iov);
    for (i = 0; i < r->req->niov; i++) {
        struct iovec *iov = &r->req->iov[i];

        g_assert_cmpint(iov->iov_len, >, 0);
        g_assert_cmpint(iov->iov_len, <=, r->end - r->begin - n);
        memcpy(r->data + n, iov->iov_base, iov->iov_len);
        n += iov->iov_len;
    }
    g_assert_cmpint(n, ==, r->end - r->begin);

    for (i = r->begin; i < r->end; i++) {
        if (m->cached[i]) {
            g_assert_cmpint(r->data[i - r->begin], ==, m->expected[i]);
        } else {
            g_assert_true(m->opts.pad);
            g_assert_cmpint(r->data[i - r->begin], ==, 0);
        }
        m->clusters[i / m->cs].in_flight = true;
    }
}

static bool model_get_next_flush(Model *m, bool unfinished)
{
    ModelRequest *r = m->requests;
    int begin, end, untrimmed;

    while (r->req) {
        if (++r == m->requests + MODEL_MAX_REQUESTS) {
            return true;
        }
    }
    model_choose_limits(m);
    begin = model_predict(m, unfinished, &end, &untrimmed);
    r->req = seqcache_get_next_flush(m->s, &m->limits, unfinished);
    if (begin < 0) {
        g_assert_null(r->req);
        return false;
    }
    g_assert_nonnull(r->req);
    g_assert_cmpint(r->req->offset, ==, m->base + begin);

    r->begin = begin;
    r->end = begin + r->req->bytes;
    if (r->end != end) {
        /* Only a limited vector can be the reason */
        g_assert_cmpint(m->limits.max_iov, <, m->nb);
        g_assert_cmpint(r->end, >, begin);
        g_assert_cmpint(r->end, <=, untrimmed);
        g_assert_cmpint(r->end % m->cs, ==, 0);
    }
    model_take(m, r);
    return true;
}

static void model_complete(Model *m, ModelRequest *r, bool success)
{
    int bytes = r->req->bytes;
    int i, k, n = 0;

    for (i = 0; i < r->req->niov; i++) {
        struct iovec *iov = &r->req->iov[i];

        g_assert_cmpmem(iov->iov_base, iov->iov_len, r->data + n,
                        iov->iov_len);
        n += iov->iov_len;
    }

    seqcache_complete(m->s, r->req, success);
    r->req = NULL;

    /* A failed write may have written some */
    memcpy(m->disk + r->begin, r->data,
           success ? bytes : model_choose(m, bytes + 1));
    g_free(r->data);

    for (i = r->begin; i < r->end; i++) {
        ModelCluster *c = &m->clusters[i / m->cs];

        c->in_flight = false;
        if (!m->cached[i]) {
            m->expected[i] = m->disk[i];
        } else if (success) {
            m->dirty[i] = false;
            for (k = 0; k < MODEL_MAX_POINTS; k++) {
                m->points[k].owed[i] = false;
            }
        }
    }
    for (i = r->begin / m->cs; i <= (r->end - 1) / m->cs; i++) {
        model_maybe_leave(m, &m->clusters[i]);
    }
}

static bool model_discard_cluster(Model *m, ModelCluster *c)
{
    if (!c->cached) {
        return false;
    }
    if (!c->doomed) {
        memcpy(m->expected + c->begin, m->disk + c->begin, c->end - c->begin);
        model_drop(m, c);
        c->doomed = true;
        c->unfinished = false;
        model_maybe_leave(m, c);
    }
    return c->cached;
}

static void model_discard(Model *m)
{
    int begin = model_choose(m, m->limit);
    int64_t bytes = model_choose_bytes(m, begin);
    bool in_flight = false;
    int i, end = begin + bytes;

    if (!model_choose(m, 16)) {
        /* Everything to the end of the address space */
        bytes = INT64_MAX - (m->base + begin);
        end = m->limit;
    }
    if (!model_choose(m, 2)) {
        bytes = 1;
        end = begin + 1;
    }
    if (bytes) {
        for (i = begin / m->cs; i <= (end - 1) / m->cs; i++) {
            in_flight |= model_discard_cluster(m, &m->clusters[i]);
        }
    }
    g_assert_cmpint(seqcache_discard(m->s, m->base + begin, bytes), ==,
                    in_flight);
}

static bool model_finish_oldest(Model *m)
{
    int count;
    ModelCluster *oldest = model_oldest_unfinished(m, &count);

    g_assert_cmpint(seqcache_finish_oldest(m->s), ==, oldest != NULL);
    if (oldest) {
        model_finish(m, oldest);
    }
    return oldest;
}

static void model_finish_range(Model *m)
{
    int begin = model_choose(m, m->limit);
    int bytes = model_choose_bytes(m, begin);
    int64_t align = model_choose(m, 2) ? 1 << model_choose(m, 13) : 0;
    bool in_flight = false, expected = false;
    int i;

    /* With @align, what was written out is dropped as well */
    if (align) {
        in_flight = seqcache_drop_written(m->s, m->base + begin, bytes, align);
    } else {
        seqcache_finish(m->s, m->base + begin, bytes);
    }
    for (i = begin / m->cs; bytes && i <= (begin + bytes - 1) / m->cs; i++) {
        ModelCluster *c = &m->clusters[i];

        if (c->cached && c->unfinished) {
            model_finish(m, c);
        }
        if (align && c->cached && !c->doomed) {
            int keep = model_keep_begin(m, c, align);

            expected |= c->in_flight;
            while (c->begin < keep) {
                m->cached[c->begin++] = false;
            }
        }
    }
    g_assert_cmpint(in_flight, ==, expected);
}

static ModelPoint *model_flush_point(Model *m)
{
    ModelPoint *p = &m->points[model_choose(m, MODEL_MAX_POINTS)];
    int i;

    p->set = true;
    p->number = seqcache_flush_point(m->s);
    p->order = ++m->order;
    memcpy(p->owed, m->dirty, sizeof(p->owed));

    for (i = 0; i < m->nb; i++) {
        m->clusters[i].wanted_end = m->clusters[i].end;
    }
    return p;
}

static void model_check(Model *m)
{
    SeqCacheStats stats, expected = { 0 };
    g_autofree uint8_t *buf = g_malloc(m->size);
    unsigned nb_clusters = 0;
    bool clean = true;
    int i, k;

    for (i = 0; i < m->nb; i++) {
        ModelCluster *c = &m->clusters[i];

        nb_clusters += c->cached;
        if (c->cached && !c->unfinished && !c->in_flight) {
            expected.nb_finished++;
            expected.bytes_finished += c->end - model_first_dirty(m, c);
        }
        clean &= !c->cached || (!c->in_flight && c->unfinished &&
                                model_first_dirty(m, c) == c->end);
    }
    g_assert_cmpint(seqcache_is_clean(m->s), ==, clean);
    for (i = 0; i < m->size; i++) {
        expected.bytes_cached += m->cached[i];
        expected.bytes_unwritten += m->dirty[i];
    }
    seqcache_get_stats(m->s, &stats);
    g_assert_cmpint(seqcache_nb_clusters(m->s), ==, nb_clusters);
    g_assert_cmpint(stats.nb_finished, ==, expected.nb_finished);
    g_assert_cmpint(stats.bytes_cached, ==, expected.bytes_cached);
    g_assert_cmpint(stats.bytes_finished, ==, expected.bytes_finished);
    g_assert_cmpint(stats.bytes_unwritten, ==, expected.bytes_unwritten);

    for (i = 0; i < m->limit; i += MAX(k, 1)) {
        k = read_buf(m->s, m->base + i, m->limit - i, buf);
        g_assert_cmpmem(buf, k, m->expected + i, k);
        g_assert_cmpint(k > 0, ==, m->cached[i]);
        if (i + k < m->limit) {
            g_assert_false(m->cached[i + k]);
        }
        if (!k) {
            k = seqcache_gap(m->s, m->base + i, m->limit - i);
            g_assert_null(memchr(m->cached + i, true, k));
        }
    }

}

static void model_check_points(Model *m)
{
    int k;

    for (k = 0; k < MODEL_MAX_POINTS; k++) {
        if (m->points[k].set) {
            g_assert_cmpint(seqcache_is_flushed(m->s, m->points[k].number), ==,
                            !memchr(m->points[k].owed, true, m->size));
        }
    }
}

static void model_step(Model *m)
{
    ModelRequest *r = &m->requests[model_choose(m, MODEL_MAX_REQUESTS)];

    switch (model_choose(m, 35)) {
    case 0 ... 10:
        model_write(m);
        break;
    case 11 ... 12:
        model_read(m);
        break;
    case 13 ... 14:
        model_next_flush_bytes(m);
        break;
    case 15 ... 16:
        model_get_next_flush(m, false);
        break;
    case 17 ... 19:
        model_get_next_flush(m, true);
        break;
    case 20 ... 25:
        if (r->req) {
            model_complete(m, r, model_choose(m, 4));
        }
        break;
    case 26:
        model_discard(m);
        break;
    case 27:
        model_finish_oldest(m);
        break;
    case 28 ... 29:
        model_flush_point(m);
        break;
    case 30:
        model_query(m);
        break;
    case 31:
        model_check(m);
        break;
    case 32 ... 33:
        model_overwrite(m);
        break;
    case 34:
        model_finish_range(m);
        break;
    }
    model_check_points(m);
}

/* Write out all that there is and compare the disk with what was written */
static void model_end(Model *m)
{
    ModelPoint *p = model_flush_point(m);
    int i;

    do {
        for (i = 0; i < MODEL_MAX_REQUESTS; i++) {
            if (m->requests[i].req) {
                model_complete(m, &m->requests[i], true);
            }
        }
    } while (model_get_next_flush(m, true));

    g_assert_true(seqcache_is_flushed(m->s, p->number));
    model_check(m);
    while (model_finish_oldest(m)) {
        /* All of them are written out and leave */
    }
    g_assert_cmpint(seqcache_nb_clusters(m->s), ==, 0);
    g_assert_cmpmem(m->disk, m->size, m->expected, m->size);
}

/*
 * Do @ops operations, or as many as the input is good for, on a cache of its
 * choice, and compare everything with the model.
 */
static void seqcache_model_run(ModelInput *in, unsigned ops)
{
    Model *m = g_new0(Model, 1);
    int bits;

    m->in = in;
    bits = model_choose(m, 13);
    m->cs = 1 << bits;
    m->opts = (SeqCacheOptions) {
        .cluster_size = m->cs,
        .max_unfinished = 1 + model_choose(m, 4),
        .pad = model_choose(m, 2),
    };
    m->limits = (SeqCacheLimits) {
        .align = 1 << model_choose(m, 13), .max_bytes = 1024, .max_iov = 1024,
    };
    m->nb = model_choose(m, 2) ? 2 : MODEL_MAX_CLUSTERS;
    m->nb = MIN(m->nb, MODEL_MAX_BYTES / m->cs);
    m->size = m->limit = m->nb * m->cs;
    switch (model_choose(m, 3)) {
    case 0:
        break;
    case 1:
        m->base = (1LL << 40) + m->cs;
        break;
    case 2:
        /* The last byte of the window has no address */
        m->base = INT64_MAX - m->size + 1;
        m->limit = m->size - 1;
        break;
    }
    m->s = seqcache_new(&m->opts);

    while (ops-- && (in->rand || in->size)) {
        model_step(m);
    }
    model_end(m);

    seqcache_free(m->s);
    g_free(m);
}

#endif /* SEQCACHE_MODEL_H */
