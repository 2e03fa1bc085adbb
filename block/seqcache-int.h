/*
 * seqcache filter: what its files share
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_SEQCACHE_INT_H
#define BLOCK_SEQCACHE_INT_H

#include "block/block_int.h"
#include "block/filter-common.h"
#include "block/write-behind.h"

/* How many ends of writes and of cached clusters are remembered */
#define SEQCACHE_NB_ENDS 64

typedef struct SeqCacheFilterOpts {
    int64_t cluster_size;
    int64_t cache_size;
} SeqCacheFilterOpts;

typedef struct BDRVSeqCacheState {
    SeqCacheFilterOpts opts;

    /* NULL if the node is read-only */
    WriteBehind *write_behind;

    /*
     * Has cached data written out and gives back permissions on the child; NULL
     * while the node is being opened or closed
     */
    QEMUBH *release_bh;
    /* Whether it has to; permissions are kept until it was successful */
    bool release_pending;

    /* Protects what follows */
    QemuMutex lock;

    /*
     * Where the latest writes to the child have ended, or writes into the cache
     * at the end of a cluster; -1: unused
     */
    int64_t ends[SEQCACHE_NB_ENDS];
    unsigned next_end;

    /*
     * The length of this node, as requests to it have made it, while the child
     * may be shorter (its data is still cached) or longer (it fills up its last
     * block); -1: that of the child, which others may resize
     */
    int64_t length;
} BDRVSeqCacheState;

/* ---- seqcache.c ---- */

/*
 * What every request to the child begins with: write out what is cached of its
 * range.  Returns: 0, or the negative errno of a failed write.
 */
int coroutine_fn GRAPH_RDLOCK
seqcache_co_begin_direct(BlockDriverState *bs, int64_t offset, int64_t bytes);

/* ---- seqcache-child.c ---- */

/* Nothing is claimed yet; to be called when the node has its options */
void seqcache_child_init(BlockDriverState *bs);

/* Claim nothing any more: the node is being closed */
void seqcache_child_cleanup(BDRVSeqCacheState *s);

/* WriteBehindOptions.written_out */
void seqcache_written_out(BlockDriverState *bs);

/*
 * Others may write to the child from now on: forget what is there already, and
 * how long we have made it; it is @length, or that of the child if @length is
 * -1.  There should be no dirty data; if there is, since somebody has written
 * after the flush, it and the length are kept.
 */
void seqcache_forget_clean(BDRVSeqCacheState *s, int64_t length);

/* A write that ends at @end was successful; 0: there is a writer from now on */
void seqcache_grow(BlockDriverState *bs, int64_t end);

/* The length of the node, or a negative errno, if that of the child is @len */
int64_t seqcache_length(BDRVSeqCacheState *s, int64_t len);

/* Callbacks of BlockDriver */
void GRAPH_RDLOCK
seqcache_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                    BlockReopenQueue *reopen_queue,
                    uint64_t perm, uint64_t shared,
                    uint64_t *nperm, uint64_t *nshared);
void GRAPH_RDLOCK
seqcache_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared);
int64_t coroutine_fn GRAPH_RDLOCK seqcache_co_getlength(BlockDriverState *bs);
int coroutine_fn GRAPH_RDLOCK
seqcache_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                     PreallocMode prealloc, BdrvRequestFlags flags,
                     Error **errp);
void coroutine_fn GRAPH_RDLOCK
seqcache_co_invalidate_cache(BlockDriverState *bs, Error **errp);

#endif /* BLOCK_SEQCACHE_INT_H */
