/*
 * Reading compressed clusters: what its files share
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_COMPRESSED_READ_INT_H
#define BLOCK_COMPRESSED_READ_INT_H

#include "block/block_int.h"
#include "block/compressed-read.h"
#include "qemu/queue.h"
#include "qemu/timer.h"

/* Streams that are known at a time */
#define CREAD_STREAMS 16

typedef enum CReadState {
    CREAD_BUSY,     /* being read or decompressed */
    CREAD_READY,
    CREAD_FAILED,
} CReadState;

/* A piece or a decompressed cluster */
typedef struct CReadEntry {
    /* Constant */
    CompressedReadCache *c;
    CompressedExtent extent; /* what it has, or what it was made from */
    void *buf;
    int64_t size;
    bool mapped; /* @buf is not on the heap */

    CReadState state;
    CoQueue waiters; /* woken when it is not busy any more */
    unsigned nb_users;
    bool listed;
    bool ahead; /* a piece that nobody has had to wait for */
    uint64_t used; /* CompressedReadCache.nb_reads then */
    QTAILQ_ENTRY(CReadEntry) next;
} CReadEntry;

/* The one that was used least recently is the first */
typedef struct CReadList {
    QTAILQ_HEAD(, CReadEntry) entries;
    unsigned nb_entries;
} CReadList;

/* A reader that goes through the image */
typedef struct CReadStream {
    int64_t next; /* where it will go on; -1 for none */
    int64_t end; /* of the request that it was in last */
    unsigned nb_exact; /* how many requests began exactly at @next */
    int64_t window; /* size of its next piece */
    int64_t depth; /* how much is to be read ahead of it */
    int64_t look_at; /* up to here, enough has been read ahead */
    uint64_t used; /* as in CReadEntry */
} CReadStream;

struct CompressedReadCache {
    /* Constant */
    BlockDriverState *bs;
    CompressedReadOptions opts;

    /* Protects everything below; never held over a yield */
    QemuMutex lock;

    CReadList pieces;
    CReadList clusters;
    CReadStream streams[CREAD_STREAMS];
    uint64_t nb_reads;

    /* The node that everything was read from; only compared */
    BlockDriverState *child_bs;

    /* Drops what is not in use if @nb_reads is still the same */
    QEMUTimer *timer;
    bool timer_armed;
    uint64_t timer_reads;

    /* Nothing is read in the background meanwhile */
    bool drained;

    /* A piece could not be read: each reads its own until @nb_reads is this */
    uint64_t resume_at;

    /* Memory of all entries, also of those that are not listed any more */
    int64_t bytes;

    /* The members that are not filled in by cread_get_stats() itself */
    BlockStatsCompressedRead stats;
};

struct CompressedRead {
    CompressedReadCache *c;
    CompressedExtent extent;
    int64_t offset_in_cluster;
    int64_t bytes;

    CReadEntry *piece;   /* has the compressed data, may be NULL */
    bool read_piece;     /* and is to be read by this reader */
    CReadEntry *cluster; /* has the data, may be NULL */
    bool make_cluster;   /* and is to be made by this reader */

    CReadEntry *ahead;   /* a piece to be read in the background, or NULL */
};

static inline int64_t extent_end(const CompressedExtent *extent)
{
    return extent->offset + extent->bytes;
}

static inline bool extents_overlap(const CompressedExtent *a,
                                   const CompressedExtent *b)
{
    return a->offset < extent_end(b) && b->offset < extent_end(a);
}

/* ---- compressed-read-entries.c ---- */

/* Take @entry off @list; it may be gone then.  Called with c->lock held. */
void cread_unlist_locked(CompressedReadCache *c, CReadList *list,
                         CReadEntry *entry);

/* Become a user of @entry, which is in @list.  Called with c->lock held. */
void cread_use_locked(CompressedReadCache *c, CReadList *list,
                      CReadEntry *entry);

/* The opposite; @entry may be gone then.  Called with c->lock held. */
void cread_unuse_locked(CompressedReadCache *c, CReadEntry *entry);

/* Drop all entries that have no users.  Called with c->lock held. */
void cread_drop_unused_locked(CompressedReadCache *c);

/*
 * Add an entry, which is busy and has one user, to @list.  Called with c->lock
 * held.
 *
 * Returns: the entry, or NULL if there is no room.
 */
CReadEntry *cread_add_locked(CompressedReadCache *c, CReadList *list,
                             CompressedExtent extent, int64_t size,
                             size_t align);

/* @entry is not busy any more, but ready.  Called with c->lock held. */
void coroutine_fn cread_ready_locked(CReadEntry *entry);

/*
 * @entry, which the caller is a user of, is not busy any more; nobody finds it
 * in @list.  Called with c->lock held.
 */
void coroutine_fn cread_fail_locked(CompressedReadCache *c, CReadList *list,
                                    CReadEntry *entry);

/*
 * Wait until @entry is not busy.  Called with c->lock held, which is released
 * meanwhile.
 *
 * Returns: whether it is ready.
 */
bool coroutine_fn cread_co_wait_locked(CompressedReadCache *c,
                                       CReadEntry *entry);

/* The cluster that was made from exactly @extent.  Called with c->lock held. */
CReadEntry *cread_find_cluster_locked(CompressedReadCache *c,
                                      const CompressedExtent *extent);

/* A piece that has all of @extent.  Called with c->lock held. */
CReadEntry *cread_find_piece_locked(CompressedReadCache *c,
                                    const CompressedExtent *extent);

/* Drop all entries that overlap @range.  Called with c->lock held. */
void cread_forget_locked(CompressedReadCache *c, const CompressedExtent *range);

/* ---- compressed-read-ahead.c ---- */

/*
 * Find the stream that a read belongs to; the parameters are those of
 * cread_begin().  Called with c->lock held.
 */
CReadStream *cread_note_locked(CompressedReadCache *c, int64_t offset,
                               int64_t bytes, int64_t end, int64_t hole_start);

/* A piece could not be read.  Called with c->lock held. */
void cread_note_failure_locked(CompressedReadCache *c);

/* Add a piece, or return NULL.  Called with c->lock held. */
CReadEntry * GRAPH_RDLOCK
cread_add_piece_locked(CompressedReadCache *c, CompressedExtent range);

/*
 * Decide where the compressed data for @read comes from, and whether to read
 * ahead: set @piece, @read_piece and @ahead.  @cluster_end is where its cluster
 * ends in the image, @end where the user's request ends.  Called with c->lock
 * held.
 */
void GRAPH_RDLOCK
cread_choose_piece_locked(CompressedRead *read, CReadStream *stream,
                          int64_t cluster_end, int64_t end);

#endif /* BLOCK_COMPRESSED_READ_INT_H */
