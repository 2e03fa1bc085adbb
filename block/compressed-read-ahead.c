/*
 * Reading compressed clusters: what to read ahead
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/compressed-read-int.h"
#include "qemu/units.h"
#include "trace.h"

/* How many reads ago a stream has gone on if it is still taken for active */
#define CREAD_ACTIVE_READS 1024

/* Size of the first piece of a stream, and of the later ones */
#define CREAD_MIN_WINDOW (128 * KiB)
#define CREAD_MAX_WINDOW (1 * MiB)

/* How much is read ahead of a stream, and how much if reading is slow */
#define CREAD_MIN_DEPTH (1 * MiB)
#define CREAD_MAX_DEPTH (4 * MiB)

/* For how many reads nothing is read ahead after an error */
#define CREAD_PAUSE 256

/* How many clusters a stream skips before it has gone on once */
#define CREAD_MAX_HOLE 16

/* How many clusters are looked up ahead */
#define CREAD_MAX_FOLLOWING 256

/* Of how many clusters in a row it is found out that they are alone */
#define CREAD_MAX_ALONE 32

/* ---- Streams ---- */

/* Called with c->lock held */
static bool cread_is_active_locked(CompressedReadCache *c,
                                   const CReadStream *stream)
{
    return stream->next >= 0 && stream->nb_exact >= 2 &&
           c->nb_reads - stream->used <= CREAD_ACTIVE_READS;
}

/*
 * A place for a new stream: random reads must not take those of streams that go
 * on.  Called with c->lock held.
 */
static CReadStream *cread_new_stream_locked(CompressedReadCache *c)
{
    CReadStream *found = NULL;
    bool found_active = true;

    for (int i = 0; i < CREAD_STREAMS; i++) {
        CReadStream *stream = &c->streams[i];
        bool active = cread_is_active_locked(c, stream);

        if (!found || (found_active && !active) ||
            (found_active == active && stream->used < found->used)) {
            found = stream;
            found_active = active;
        }
    }
    return found;
}

/*
 * Readers that are slightly out of order belong to a stream that has gone on
 * exactly twice
 */
CReadStream *cread_note_locked(CompressedReadCache *c, int64_t offset,
                               int64_t bytes, int64_t end, int64_t hole_start)
{
    int64_t near = MAX(8 * c->opts.cluster_size, 1 * MiB);
    CReadStream *stream, *found = NULL;
    int64_t max_hole = CREAD_MAX_HOLE * c->opts.cluster_size;
    bool exact = false;

    if (offset % c->opts.cluster_size) {
        hole_start = offset;
    }

    for (int i = 0; i < CREAD_STREAMS && !exact; i++) {
        stream = &c->streams[i];
        if (stream->next < 0) {
            continue;
        }
        exact = stream->next <= offset && stream->next >=
                (stream->nb_exact ? hole_start : MAX(hole_start,
                                                     offset - max_hole));
        if (exact || (!found && cread_is_active_locked(c, stream) &&
                      offset > stream->next - near &&
                      offset < stream->next + near)) {
            found = stream;
        }
    }

    if (!found) {
        found = cread_new_stream_locked(c);
        *found = (CReadStream) {
            .window = CREAD_MIN_WINDOW, .depth = CREAD_MIN_DEPTH,
        };
        trace_cread_stream(c->bs, offset, bytes);
    }
    found->nb_exact += exact && found->end != end;
    found->end = end;
    found->next = MAX(found->next, offset + bytes);
    found->used = c->nb_reads;
    return found;
}

/*
 * How much can be read ahead of each active stream, so that none drops what
 * another one has not used yet.  Called with c->lock held.
 */
static int64_t cread_share_locked(CompressedReadCache *c)
{
    unsigned nb_active = 0;

    for (int i = 0; i < CREAD_STREAMS; i++) {
        nb_active += cread_is_active_locked(c, &c->streams[i]);
    }
    return c->opts.cache_size / 4 * 3 / MAX(nb_active, 1);
}

void cread_note_failure_locked(CompressedReadCache *c)
{
    c->stats.errors++;
    c->resume_at = c->nb_reads + CREAD_PAUSE;
    for (int i = 0; i < CREAD_STREAMS; i++) {
        c->streams[i].window = CREAD_MIN_WINDOW;
    }
}

/* ---- Pieces ---- */

/* What follows, as far as it is looked up */
typedef struct CReadAhead {
    /* What is not in a piece, in guest order; that sorted by @offset */
    CompressedExtent extents[CREAD_MAX_FOLLOWING];
    CompressedExtent sorted[CREAD_MAX_FOLLOWING];
    int nb_extents;
    /* What is in a piece */
    int nb_covered;
    int64_t bytes_covered;
} CReadAhead;

static int compare_extents(const void *a, const void *b)
{
    const CompressedExtent *x = a, *y = b;

    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Called with c->lock held */
static void GRAPH_RDLOCK
cread_look_ahead_locked(CompressedReadCache *c, int64_t start, int64_t end,
                        CReadAhead *ahead)
{
    int n = 0;

    ahead->nb_extents = 0;
    ahead->nb_covered = 0;
    ahead->bytes_covered = 0;

    if (end > start) {
        n = c->opts.following(c->bs, start, end, ahead->extents,
                              CREAD_MAX_FOLLOWING);
    }
    for (int i = 0; i < n; i++) {
        CompressedExtent *extent = &ahead->extents[i];

        if (!cread_find_piece_locked(c, extent)) {
            ahead->extents[ahead->nb_extents++] = *extent;
        } else {
            ahead->nb_covered++;
            ahead->bytes_covered += extent->bytes;
        }
    }
}

static void cread_sort(CReadAhead *ahead)
{
    memcpy(ahead->sorted, ahead->extents,
           ahead->nb_extents * sizeof(ahead->sorted[0]));
    qsort(ahead->sorted, ahead->nb_extents, sizeof(ahead->sorted[0]),
          compare_extents);
}

/*
 * The range around @first of at most @window bytes that has as many of the
 * clusters in @ahead, which is sorted, as possible.  What is between them is
 * never as much as a cluster, so no other cluster is read.  What lies before
 * @first comes first: else it would be left alone.
 *
 * Returns: the range; of 0 bytes if it would have no other cluster than @first.
 */
static CompressedExtent GRAPH_RDLOCK
cread_range(CompressedReadCache *c, const CReadAhead *ahead,
            CompressedExtent first, int64_t window)
{
    uint32_t align = c->bs->file->bs->bl.request_alignment;
    int64_t start = first.offset, end = extent_end(&first);
    const CompressedExtent *extents = ahead->sorted;
    int i, middle = 0, nb_others = 0;

    while (middle < ahead->nb_extents && extents[middle].offset < start) {
        middle++;
    }

    for (i = middle - 1; i >= 0; i--) {
        if (start - extent_end(&extents[i]) >= c->opts.cluster_size ||
            end - extents[i].offset > window) {
            break;
        }
        nb_others++;
        start = extents[i].offset;
    }
    for (i = middle; i < ahead->nb_extents; i++) {
        if (extents[i].offset - end >= c->opts.cluster_size ||
            extent_end(&extents[i]) - start > window) {
            break;
        }
        nb_others += extents[i].offset != first.offset;
        end = MAX(end, extent_end(&extents[i]));
    }
    if (!nb_others) {
        return (CompressedExtent) { 0, 0 };
    }

    /* No bounce buffer; it is 0 for a node that was closed as corrupt */
    align = MAX(align, 1);
    start = QEMU_ALIGN_DOWN(start, align);
    end = QEMU_ALIGN_UP(end, align);
    return (CompressedExtent) { start, end - start };
}

CReadEntry *cread_add_piece_locked(CompressedReadCache *c,
                                   CompressedExtent range)
{
    return cread_add_locked(c, &c->pieces, range, range.bytes,
                            bdrv_opt_mem_align(c->bs->file->bs));
}

/*
 * Whether @bytes of what follows are in pieces, or being read.  If so, this
 * need not be looked up again as long as it is so.
 */
static bool cread_is_covered(CompressedReadCache *c, CReadStream *stream,
                             const CReadAhead *ahead, int64_t cluster_end,
                             int64_t bytes)
{
    int64_t nb_more = ahead->nb_covered;

    if (ahead->nb_covered < CREAD_MAX_FOLLOWING / 2) {
        if (ahead->bytes_covered < bytes) {
            return false;
        }
        nb_more -= ahead->nb_covered * bytes / ahead->bytes_covered;
    } else {
        nb_more -= CREAD_MAX_FOLLOWING / 2;
    }
    stream->look_at = cluster_end + nb_more * c->opts.cluster_size;
    return true;
}

/*
 * Add a piece of what follows a stream that was not found in one.  A cluster
 * that has no others around it is left to its reader.  Called with c->lock
 * held.
 *
 * Returns: the piece, to be read in the background; or NULL.
 */
static CReadEntry * GRAPH_RDLOCK
cread_add_ahead_locked(CompressedReadCache *c, CReadStream *stream,
                       const CReadAhead *ahead, int64_t cluster_end,
                       int64_t window)
{
    CReadEntry *piece;
    CompressedExtent range;
    int i;

    for (i = 0; i < MIN(ahead->nb_extents, CREAD_MAX_ALONE); i++) {
        range = cread_range(c, ahead, ahead->extents[i], window);
        if (range.bytes) {
            piece = cread_add_piece_locked(c, range);
            if (piece) {
                piece->ahead = true;
            }
            return piece;
        }
    }
    i = ahead->nb_extents ? i / 2 : ahead->nb_covered;
    stream->look_at = cluster_end + i * c->opts.cluster_size;
    return NULL;
}

/* @read has found a piece.  Called with c->lock held. */
static void cread_note_hit_locked(CompressedRead *read, CReadStream *stream)
{
    CompressedReadCache *c = read->c;
    CReadEntry *piece = read->piece;

    c->stats.hits++;
    cread_use_locked(c, &c->pieces, piece);
    if (piece->ahead && piece->state == CREAD_BUSY) {
        /* It came too late */
        piece->ahead = false;
        stream->depth = MIN(2 * stream->depth, CREAD_MAX_DEPTH);
        stream->look_at = 0;
    }
}

void cread_choose_piece_locked(CompressedRead *read, CReadStream *stream,
                               int64_t cluster_end, int64_t end)
{
    CompressedReadCache *c = read->c;
    bool sequential = stream->nb_exact > 0;
    /* Begin slowly; what the request is for is not read in vain */
    bool slowly = sequential && stream->window < CREAD_MAX_WINDOW;
    g_autofree CReadAhead *ahead = NULL;
    CompressedExtent range;
    int64_t share, window, depth;

    read->piece = cread_find_piece_locked(c, &read->extent);
    if (read->piece) {
        cread_note_hit_locked(read, stream);
        if (!sequential || cluster_end <= stream->look_at) {
            return;
        }
    } else {
        c->stats.misses++;
        if (!sequential && end <= cluster_end) {
            return;
        }
    }
    if (c->nb_reads < c->resume_at || (read->piece && c->drained)) {
        return;
    }

    ahead = g_new(CReadAhead, 1);
    cread_look_ahead_locked(c, cluster_end, sequential ? INT64_MAX : end,
                            ahead);
    share = cread_share_locked(c);
    window = MIN(slowly ? stream->window : CREAD_MAX_WINDOW, share / 2);
    depth = MIN(slowly ? window / 4 : stream->depth, share - window);
    window = MIN_NON_ZERO(window, c->bs->file->bs->bl.max_transfer);
    if (read->piece &&
        cread_is_covered(c, stream, ahead, cluster_end, depth)) {
        return;
    }

    cread_sort(ahead);
    if (read->piece) {
        read->ahead = cread_add_ahead_locked(c, stream, ahead, cluster_end,
                                             window);
    } else {
        range = cread_range(c, ahead, read->extent, window);
        if (range.bytes) {
            read->piece = cread_add_piece_locked(c, range);
            read->read_piece = read->piece;
        }
    }
    /* Also if not even two clusters fit */
    if (slowly) {
        stream->window *= 2;
    }
}
