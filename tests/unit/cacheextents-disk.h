/*
 * A disk in memory that knows its block status, for tests of cacheextents
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * It remembers what the status of each of its blocks was at what time, and when
 * requests have changed them.  So a test can compare an answer with all that it
 * may say.
 */

#ifndef TESTS_UNIT_CACHEEXTENTS_DISK_H
#define TESTS_UNIT_CACHEEXTENTS_DISK_H

#include "memory-disk.h"

#define MAX_BLOCKS 512
#define HISTORY 64
#define CHANGES_KEPT 8

#define DATA (BDRV_BLOCK_DATA | BDRV_BLOCK_OFFSET_VALID)
#define ZERO (BDRV_BLOCK_ZERO | BDRV_BLOCK_OFFSET_VALID)
#define DATA_ZERO (DATA | BDRV_BLOCK_ZERO)
#define UNKNOWN BDRV_BLOCK_OFFSET_VALID

typedef struct ExtentsConfig {
    int64_t len;        /* at the beginning */
    int64_t grain;      /* size of a block */
    uint32_t align;     /* request alignment; 0: 512 */
    int64_t reach;      /* one answer covers at most this much; 0: no limit */
    int even;           /* status of the even blocks, the others are ZERO */
    int many_error;     /* of queries for many extents */
    bool one;           /* it has no bdrv_co_block_extents */
    bool random;        /* yields and short answers at random */
} ExtentsConfig;

typedef struct Status {
    uint64_t since;
    int flags;
} Status;

typedef struct ExtentsDisk {
    Disk disk;          /* its lock protects what follows */
    ExtentsConfig config;
    uint64_t now;       /* counts the changes */
    /* The latest ones come last; those that were never made are 0 */
    Status history[MAX_BLOCKS][HISTORY];
    /* When requests have changed each unit: the latest times come last */
    uint64_t (*changes)[CHANGES_KEPT];

    int query_error;
    unsigned connection;  /* counts reconnects */
    bool disconnected;

    unsigned nb_queries;
    unsigned nb_many;     /* of them, for many extents */
    unsigned nb_answered; /* extents */
    int64_t asked_offset; /* by the last query */
    int64_t asked_bytes;
} ExtentsDisk;

/* To be called once, before the first disk is made */
void extents_disk_init(void);

/* A new node; @config is copied */
BlockDriverState *extents_disk_new(const char *name,
                                   const ExtentsConfig *config);

/* Its size at most, in bytes */
int64_t disk_max_len(ExtentsDisk *d);

/* What a request can change alone: a block of request alignment, or a sector */
int64_t disk_unit(ExtentsDisk *d);

/* The time of the last change */
uint64_t disk_now(ExtentsDisk *d);

/* The blocks of a range have these flags now, without a request */
void disk_set(ExtentsDisk *d, int64_t offset, int64_t bytes, int flags);

/* Everything is different all of a sudden, and the driver says so */
void disk_reconnect(BlockDriverState *bs);

/*
 * Whether an answer of now, to a query that began at @start, may say this of
 * @offset.  It may be what was true at any time since the last request that had
 * changed these bytes before @start: others do not change what they contain.
 * Only if they contain anything it must be what was true since @start.
 *
 * They may be called data because they share a sector or a block with data.
 * Without queries for many extents, the block layer's own hint can call
 * something data that was data.
 */
bool disk_was(ExtentsDisk *d, uint64_t start, int64_t offset, int flags);

#endif /* TESTS_UNIT_CACHEEXTENTS_DISK_H */
