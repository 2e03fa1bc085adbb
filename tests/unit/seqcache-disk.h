/*
 * A disk in memory below a seqcache node, for its tests
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The disk asserts what the block layer promises its drivers, and that what is
 * being changed is not changed a second time meanwhile.  It knows what would
 * survive a power cut, and can hold, delay and fail requests.  A request that
 * fails may have been done in part.
 */

#ifndef TESTS_UNIT_SEQCACHE_DISK_H
#define TESTS_UNIT_SEQCACHE_DISK_H

#include "block/block_int.h"
#include "block/seqcache-compat.h"
#include "system/block-backend.h"

/* It can grow up to this */
#define DISK_MAX_SIZE (1 * MiB)

/* Kinds of requests */
enum {
    DISK_READ       = 1 << 0,
    DISK_WRITE      = 1 << 1, /* of data, also compressed and copied */
    DISK_ZERO       = 1 << 2,
    DISK_DISCARD    = 1 << 3,
    DISK_TRUNCATE   = 1 << 4,
    DISK_FLUSH      = 1 << 5,
    DISK_STATUS     = 1 << 6,
    DISK_CHANGES    = DISK_WRITE | DISK_ZERO | DISK_DISCARD | DISK_TRUNCATE |
                      DISK_FLUSH,
    DISK_ALL        = DISK_CHANGES | DISK_READ | DISK_STATUS,
};

/* What is to fail, counting only the requests of some kinds */
typedef struct DiskFault {
    unsigned kinds;
    unsigned first;     /* its number, from 1; 0: nothing fails */
    bool lasting;       /* all that come after it fail as well */
    int error;
    /* A change that fails is done up to a block, or as a whole or not at all */
    bool whole;
    bool dead;          /* all but the first one are not done at all */
} DiskFault;

typedef struct DiskChange {
    int64_t offset;
    int64_t bytes;
    unsigned kind;
    const uint8_t *src; /* NULL: zeroes */
    bool unmap;
    bool fua;
    bool can_refuse;
    bool can_grow;
    QLIST_ENTRY(DiskChange) next;
} DiskChange;

typedef struct Disk {
    /* Constant while there are requests */
    uint32_t align;
    uint32_t max_transfer;
    unsigned max_hops; /* how often a request goes through the event loop */

    /* Protects everything below */
    QemuMutex lock;
    uint8_t *data;      /* zero after @len */
    uint8_t *stable;    /* what of @data would survive a power cut */
    bool *mapped;       /* for each sector; the others are zero */
    int64_t len;
    int64_t unstable_start; /* @data differs from @stable between these */
    int64_t unstable_end;
    GRand *rand;

    bool hold; /* changes wait in @held before they do anything */
    bool hold_after; /* and writes after they have done it */
    CoQueue held;
    unsigned nb_held;
    bool overlap; /* so do the requests of the user, and so may changes */

    /* Changes and flushes fail with this */
    int error;
    /* Or any request, with @error 0, with EIO in this many of 100 cases */
    unsigned percent_bad;
    /* Zero writes and copies are not supported in this many of 100 cases */
    unsigned percent_unsupported;
    /* And those that disk_set_fault() asks for */
    DiskFault fault;
    unsigned nb_faultable;
    unsigned nb_faults;

    /* All that were begun since the last disk_reset_counts() */
    struct {
        unsigned reads, writes, zeroes, discards, flushes, compressed, copies,
                 truncates;
    } nb;
    void *last_write; /* the first buffer */
    BdrvRequestFlags truncate_flags; /* of the last one */
    unsigned nb_cancels;

    unsigned nb_in_flight;
    QLIST_HEAD(, DiskChange) changes; /* in flight */
} Disk;

extern BlockDriver bdrv_disk;

/* A seqcache node, a disk as its child, and a user of it */
typedef struct SeqCacheTest {
    BlockBackend *blk;
    BlockDriverState *bs;
    BlockDriverState *disk_bs;
    Disk *disk;
    uint8_t *shadow; /* what it must read as */
} SeqCacheTest;

typedef struct SeqCacheConfig {
    int64_t cluster_size;
    int64_t cache_size;
    uint32_t align;         /* 0: 1 */
    uint32_t max_transfer;
    int64_t len;
    bool no_flags;          /* the disk supports none; QEMU emulates FUA */
} SeqCacheConfig;

#define TEST_PERMS (BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE | \
                    BLK_PERM_WRITE_UNCHANGED | BLK_PERM_RESIZE)

void coroutine_fn co_hop(void);

/* Called with d->lock held, which is released meanwhile */
void coroutine_fn disk_delay_locked(Disk *d);

/* Called with d->lock held */
int disk_result_locked(Disk *d, unsigned kind);

/*
 * The status of the block that @offset lies in.  Called with d->lock held.
 */
int disk_flags_locked(Disk *d, int64_t offset);

/* Sometimes it tells no more than what is in the first few blocks */
int coroutine_fn disk_co_block_status(BlockDriverState *bs,
                                      BdrvStatusMode mode,
                                      int64_t offset, int64_t bytes,
                                      int64_t *pnum,
                                      int64_t *map,
                                      BlockDriverState **file);
void disk_set_hold(Disk *d, bool hold);
void disk_set_error(Disk *d, int error);

/* Count requests from now on; @fault can be all zeroes */
void disk_set_fault(Disk *d, DiskFault fault);
void disk_reset_counts(Disk *d);
void disk_set_percent_bad(Disk *d, unsigned percent);
SeqCacheTest *seqcache_test_new(const SeqCacheConfig *config);
void seqcache_test_free(SeqCacheTest *t);
void assert_bytes(const uint8_t *found, const uint8_t *expected,
                  int64_t offset, int64_t bytes, const char *what);
int64_t stat_cached_bytes(SeqCacheTest *t);
int seqcache_test_reopen(SeqCacheTest *t, int64_t cluster_size,
                         int64_t cache_size);

/* Go on until nothing happens in the main loop any more */
void settle(void);
void read_ok(SeqCacheTest *t, int64_t offset, int64_t bytes);
void flush_ok(SeqCacheTest *t);

/* The node reads right, and after a flush the disk has it all */
void check_all(SeqCacheTest *t);

#endif /* TESTS_UNIT_SEQCACHE_DISK_H */
