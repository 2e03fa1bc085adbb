/*
 * qcow2: compressing ahead
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Several compressed writes can be under way on a node that has a cache for
 * compressed clusters: they compress in parallel, and allocate space in the
 * order in which they were begun.  All functions take a qcow2 node and may be
 * called in any thread.
 */

#ifndef BLOCK_QCOW2_COMPRESS_AHEAD_H
#define BLOCK_QCOW2_COMPRESS_AHEAD_H

#include "block/block-common.h"
#include "block/graph-lock.h"

/* Clusters of a request are compressed in one thread up to this many bytes */
#define QCOW2_PIECE_BYTES (256 * KiB)

/* Two for each of the pieces that qemu-img convert begins at most */
#define QCOW2_SPARE_COMPRESS_BUFS 32

/* What a node needs for this; part of BDRVQcow2State, all zero at first */
typedef struct Qcow2CompressAhead {
    /* Turns that were taken, and those that are over; protected by s->lock */
    uint64_t nb_taken, nb_over;
    QLIST_HEAD(, Qcow2TurnWaiter) waiters;
    /*
     * Compressed writes with FUA: those that were to be flushed so far, those
     * that were flushed, and those whose flush failed, with the error;
     * protected by s->lock
     */
    uint64_t nb_fua_begun, nb_fua_done, nb_fua_failed;
    int fua_error;
    /* Whether one of them flushes; and those that wait for its end */
    bool fua_flushing;
    QLIST_HEAD(, Qcow2TurnWaiter) fua_waiters;
    /* Buffers for pieces that are not in use; atomic */
    void *spare_bufs[QCOW2_SPARE_COMPRESS_BUFS];
} Qcow2CompressAhead;

/**
 * qcow2_compressed_piece:
 * @bs: the node.
 *
 * Returns: how many bytes of a compressed write one call for the node writes at
 * most: one cluster, or some if the node has a cache for compressed clusters.
 */
uint64_t qcow2_compressed_piece(BlockDriverState *bs);

/**
 * qcow2_co_compress_ahead:
 * @bs: the node; s->lock is not held, and the node has a cache for compressed
 *      clusters.
 * @offset: guest offset of the first cluster.
 * @bytes: how much to write, at most qcow2_compressed_piece(); whole clusters,
 *         or up to the end of the image.
 * @qiov: the data; it may change meanwhile.
 * @qiov_offset: where in @qiov it begins.
 * @allocs: array of Qcow2CompressedAlloc; what is allocated is appended.
 *
 * Compress clusters in a thread, and write them to the cache when those that
 * were begun before are written.  Those that do not compress are written as
 * normal clusters.  On failure, the caller undoes everything in @allocs;
 * clusters that do not compress are not among them, because they can be written
 * again as they are.
 *
 * Returns: 0 on success; -ECANCELED if the image was abandoned; another -errno
 * on failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_compress_ahead(BlockDriverState *bs, uint64_t offset, uint64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset, GArray *allocs);

/**
 * qcow2_co_flush_compressed:
 * @bs: the node; s->lock is not held.
 *
 * Make a compressed write stable that has succeeded (FUA).  If the node has a
 * cache, this waits for the compressed writes that were begun before, until
 * their data is in the cache as well.  All that are to be flushed at that time
 * share one flush, and its result.
 *
 * Returns: 0 on success, -errno on failure.
 */
int coroutine_fn GRAPH_RDLOCK qcow2_co_flush_compressed(BlockDriverState *bs);

#endif /* BLOCK_QCOW2_COMPRESS_AHEAD_H */
