/*
 * A disk in memory, for tests of what is above it
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

#ifndef TESTS_UNIT_MEMORY_DISK_H
#define TESTS_UNIT_MEMORY_DISK_H

#include "block/block_int.h"
#include "block/seqcache-compat.h"
#include "system/block-backend.h"

/* It can grow up to this, unless DiskConfig says otherwise */
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

typedef struct DiskConfig {
    int64_t len;
    int64_t max_len;        /* 0: DISK_MAX_SIZE */
    uint32_t align;         /* 0: 1 */
    uint32_t max_transfer;
    bool no_flags;          /* the disk supports none; QEMU emulates FUA */
    bool unaligned_copies;  /* may be; the block layer does not align them */
} DiskConfig;

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
    bool unaligned;     /* allowed, for DiskConfig.unaligned_copies */
    bool can_grow;
    QLIST_ENTRY(DiskChange) next;
} DiskChange;

typedef struct Disk Disk;

struct Disk {
    /* Constant while there are requests */
    DiskConfig config;
    unsigned max_hops; /* how often a request goes through the event loop */
    int64_t grain;     /* the first step of a change ends at a multiple of it */

    /*
     * A change has done @bytes from its byte @start on; or it is over, and
     * @bytes is 0.  Called with @lock held.  Can be NULL.
     */
    void (*changed)(Disk *d, const DiskChange *c, int64_t start, int64_t bytes);

    /* Protects everything below */
    QemuMutex lock;
    uint8_t *data;      /* zero after @len */
    uint8_t *stable;    /* what of @data would survive a power cut */
    bool *mapped;       /* for each sector; the others are zero */
    int64_t len;
    int64_t unstable_start; /* @data differs from @stable between these */
    int64_t unstable_end;
    GRand *rand;

    /* Requests of these kinds wait in @held before they do anything */
    unsigned hold;
    unsigned hold_after;    /* or after they have done it */
    bool release_one;       /* the next one that is woken goes on */
    CoQueue held;
    unsigned nb_held;
    bool overlap; /* the requests of the user overlap, and so may changes */

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
    GArray *log;      /* of the writes: DiskWrite */
    void *last_write; /* the first buffer */
    BdrvRequestFlags truncate_flags; /* of the last one */
    unsigned nb_cancels;

    unsigned nb_in_flight;
    unsigned max_in_flight;
    QLIST_HEAD(, DiskChange) changes; /* in flight */
};

/* A write in Disk.log */
typedef struct DiskWrite {
    int64_t offset;
    int64_t bytes;
} DiskWrite;

extern BlockDriver bdrv_disk;

/* A user of a node, who may write beyond its end */
BlockBackend *user_new(BlockDriverState *bs);

/* Put @to in the place of @from, as a job does it */
void disk_replace(BlockDriverState *from, BlockDriverState *to);

/*
 * A new node with the driver @drv: bdrv_disk, with a DiskConfig that is copied,
 * or one that is made from that and has a @config of its own
 */
BlockDriverState *disk_new(BlockDriver *drv, const char *name,
                           const void *config);

/*
 * Hold requests of some kinds before or after they are done, or never.  Those
 * that are held already notice with the next disk_wake().
 */
typedef enum DiskHold { HOLD_NEVER, HOLD_BEFORE, HOLD_AFTER } DiskHold;
void disk_set_hold(Disk *d, unsigned kinds, DiskHold where);
void disk_wake(Disk *d);

/* ---- For callbacks that a test adds; they hold d->lock ---- */

/* The lock is released meanwhile */
void coroutine_fn disk_delay_locked(Disk *d);

/* Wait as long as d->hold or d->hold_after, which @hold is, has this kind */
void coroutine_fn disk_wait_locked(Disk *d, const unsigned *hold,
                                   unsigned kind);

/* In @percent of 100 cases */
bool disk_chance_locked(Disk *d, unsigned percent);

/* Returns: 0, or a negative errno if the request is to fail */
int disk_result_locked(Disk *d, unsigned kind);

/* The status of the block that @offset lies in */
int disk_flags_locked(Disk *d, int64_t offset);

/* ---- What tests do with it ---- */

/* Hold changes from now on; let those go on that are held */
void disk_hold(Disk *d);
void disk_release(Disk *d);

/* The same in a bottom half, as soon as the main loop runs */
void disk_release_later(Disk *d);

/* Let one held request, if there is one, go on */
void disk_release_one(Disk *d);

void disk_set_error(Disk *d, int error);

/* Count requests from now on; @fault can be all zeroes */
void disk_set_fault(Disk *d, DiskFault fault);
void disk_reset_counts(Disk *d);
void disk_set_percent_bad(Disk *d, unsigned percent);

/* Write zeroes at once, as somebody who knows that nothing there is written */
void disk_zero(Disk *d, int64_t offset, int64_t bytes);

/* Change the limits */
void disk_set_limits(BlockDriverState *bs, uint32_t align,
                     uint32_t max_transfer);

/* ---- Helpers ---- */

/* What main() begins with */
void disk_test_init(int *argc, char ***argv);

/* How many requests of a kind the disk of a test got, see Disk.nb */
#define assert_nb(t, kind, n) g_assert_cmpuint((t)->disk->nb.kind, ==, n)

/* Compare memory, and say where it differs */
void assert_bytes(const uint8_t *found, const uint8_t *expected,
                  int64_t offset, int64_t bytes, const char *what);

/* Go through the event loop once */
void coroutine_fn co_hop(void);

/* Go on until nothing happens in the main loop any more */
void settle(void);

#endif /* TESTS_UNIT_MEMORY_DISK_H */
