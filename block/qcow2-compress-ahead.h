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

/* Two for each of the compressed writes that qemu-img convert begins at most */
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
    /* Buffers: how many are in use, and those that are not; atomic */
    unsigned nb_bufs;
    void *spare_bufs[QCOW2_SPARE_COMPRESS_BUFS];
} Qcow2CompressAhead;

/**
 * qcow2_get_compress_buf:
 * @bs: the node.
 *
 * Get memory for one cluster, aligned for the node's requests.  While other
 * compressed writes are under way, memory that they have put back is used
 * again.  Needs no lock.
 *
 * This makes no difference with clusters of 64 KiB.  With 2 MiB (zstd, in
 * order) the heap would give them back to the kernel again and again, and keep
 * some for each thread: a conversion has 0.7 times the page faults, takes 0.9
 * times the processor time, and uses 79 MB instead of 137 MB at most.
 *
 * Returns: the memory, to be put back with qcow2_put_compress_buf().
 */
void *qcow2_get_compress_buf(BlockDriverState *bs);

/**
 * qcow2_put_compress_buf:
 * @bs: the node.
 * @buf: what qcow2_get_compress_buf() returned.
 *
 * Put memory back.  When all of it was put back, all of it is freed.  Needs no
 * lock.
 */
void qcow2_put_compress_buf(BlockDriverState *bs, void *buf);

/**
 * qcow2_co_compress_ahead:
 * @bs: the node; s->lock is not held, and the node has a cache for compressed
 *      clusters.
 * @offset: guest offset of the cluster.
 * @src: the data of one cluster.
 * @dest: a buffer for one cluster, for the compressed data.
 * @allocs: array of Qcow2CompressedAlloc; what is allocated is appended.
 *
 * Compress a cluster, and write it to the cache when those that were begun
 * before are written.  If it does not compress, qcow2_co_write_incompressible()
 * is called for it.  On failure, the caller undoes everything in @allocs;
 * clusters that do not compress are not among them, because they can be written
 * again as they are.
 *
 * Returns: 0 on success; 1 if the data cannot be compressed and the cache does
 * not take it as it is, so that the caller must write it as a normal cluster,
 * which begins in the same order if the caller does not yield before;
 * -ECANCELED if the image was abandoned; another -errno on failure.
 */
int coroutine_fn GRAPH_RDLOCK
qcow2_co_compress_ahead(BlockDriverState *bs, uint64_t offset, const void *src,
                        void *dest, GArray *allocs);

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
