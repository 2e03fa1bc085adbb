/*
 * A seqcache node above a disk in memory, for tests
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_UNIT_SEQCACHE_TEST_H
#define TESTS_UNIT_SEQCACHE_TEST_H

#include "memory-disk.h"

/* A seqcache node, a disk as its child, and a user of it */
typedef struct SeqCacheTest {
    BlockBackend *blk;
    BlockDriverState *bs;
    BlockDriverState *disk_bs;
    Disk *disk;
    uint8_t *shadow; /* what it must read as */
    bool unchecked;  /* the disk does not have that in the end */
} SeqCacheTest;

typedef struct SeqCacheConfig {
    int64_t cluster_size;
    int64_t cache_size;
    DiskConfig disk;
} SeqCacheConfig;

void seqcache_set_up(SeqCacheTest *t, const SeqCacheConfig *config);
void seqcache_tear_down(SeqCacheTest *t);
int seqcache_reopen(SeqCacheTest *t, int64_t cluster_size, int64_t cache_size);
BlockStatsWriteBehind seqcache_stats(SeqCacheTest *t);

void read_ok(SeqCacheTest *t, int64_t offset, int64_t bytes);
void flush_ok(SeqCacheTest *t);

/* The node reads right, and after a flush the disk has it all */
void check_all(SeqCacheTest *t);

#endif /* TESTS_UNIT_SEQCACHE_TEST_H */
