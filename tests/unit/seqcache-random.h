/*
 * What the operations of the seqcache filter's random test have in common
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Locks on byte ranges, and what becomes of a request's result.
 */

#ifndef TESTS_UNIT_SEQCACHE_RANDOM_H
#define TESTS_UNIT_SEQCACHE_RANDOM_H

#include "seqcache-test.h"

#define NB_SECTORS (DISK_MAX_SIZE / BDRV_SECTOR_SIZE)
#define NB_STREAMS 2

/* What one operation has locked, or waits for */
typedef struct Lock {
    struct {
        int64_t offset;
        int64_t bytes;
        bool exclusive;
    } range[2];
    unsigned nb_ranges;
    bool granted;
    QTAILQ_ENTRY(Lock) next;
} Lock;

typedef struct RandomTest {
    SeqCacheTest *t;
    int64_t align;
    bool threads;

    /* Protects everything below, and the shadow, as far as not @locks do */
    QemuMutex lock;

    /* In the order in which they came; a lock respects all before it */
    QTAILQ_HEAD(, Lock) locks;
    CoQueue waiters;

    /* Counts the changes to a sector: when one begins, and when it ends */
    unsigned version[NB_SECTORS];

    /* What the length of the node may be.  Equal for @align up to 512. */
    int64_t min_len;
    int64_t max_len;
    unsigned nb_truncates;

    unsigned nb_left;
    unsigned nb_users;

    /* What failed while it is true, or while this was counted, may fail */
    bool bad;
    unsigned nb_bad;

    /* The main loop waits until @nb_gated is 0 before it drains the node */
    bool gate;
    unsigned nb_gated;

    unsigned nb_done[16];
    unsigned nb_failed;
    unsigned nb_checked; /* flushes */
} RandomTest;

typedef struct User {
    RandomTest *r;
    GRand *rand;
    int64_t pos[NB_STREAMS];

    /* Of the current operation */
    Lock lock;
    bool bad;
    unsigned nb_bad;
} User;

/* A number below @n */
static int64_t below(User *u, int64_t n)
{
    return g_rand_int_range(u->rand, 0, n);
}

/* ---- Locks ---- */

static bool locks_conflict(const Lock *a, const Lock *b)
{
    unsigned i, j;

    for (i = 0; i < a->nb_ranges; i++) {
        for (j = 0; j < b->nb_ranges; j++) {
            if ((a->range[i].exclusive || b->range[j].exclusive) &&
                a->range[i].offset < b->range[j].offset + b->range[j].bytes &&
                b->range[j].offset < a->range[i].offset + a->range[i].bytes) {
                return true;
            }
        }
    }
    return false;
}

static bool lock_has_to_wait(RandomTest *r, const Lock *lock)
{
    Lock *other;

    QTAILQ_FOREACH(other, &r->locks, next) {
        if (other == lock) {
            return false;
        }
        if (locks_conflict(other, lock)) {
            return true;
        }
    }
    g_assert_not_reached();
}

/* Count one more for each sector that may be changed under a lock */
static void lock_count_sectors(const Lock *lock, unsigned *counts)
{
    unsigned i;
    int64_t sector;

    for (i = 0; i < lock->nb_ranges; i++) {
        if (lock->range[i].exclusive) {
            int64_t end = MIN(lock->range[i].offset + lock->range[i].bytes,
                              DISK_MAX_SIZE);

            for (sector = lock->range[i].offset / BDRV_SECTOR_SIZE;
                 sector < DIV_ROUND_UP(end, BDRV_SECTOR_SIZE); sector++) {
                counts[sector]++;
            }
        }
    }
}

static void lock_add(User *u, int64_t offset, int64_t bytes, bool exclusive)
{
    unsigned i = u->lock.nb_ranges++;

    u->lock.range[i].offset = offset;
    u->lock.range[i].bytes = bytes;
    u->lock.range[i].exclusive = exclusive;
}

static void coroutine_fn lock_take(User *u)
{
    RandomTest *r = u->r;

    QEMU_LOCK_GUARD(&r->lock);

    QTAILQ_INSERT_TAIL(&r->locks, &u->lock, next);
    while (lock_has_to_wait(r, &u->lock)) {
        qemu_co_queue_wait(&r->waiters, &r->lock);
    }
    u->lock.granted = true;
    lock_count_sectors(&u->lock, r->version);
    u->bad = r->bad;
    u->nb_bad = r->nb_bad;
}

static void coroutine_fn lock_range(User *u, int64_t offset, int64_t bytes,
                                    bool exclusive)
{
    lock_add(u, offset, bytes, exclusive);
    lock_take(u);
}

static void coroutine_fn lock_drop(User *u)
{
    RandomTest *r = u->r;

    QEMU_LOCK_GUARD(&r->lock);

    lock_count_sectors(&u->lock, r->version);
    QTAILQ_REMOVE(&r->locks, &u->lock, next);
    memset(&u->lock, 0, sizeof(u->lock));
    qemu_co_queue_restart_all(&r->waiters);
}

/* For requests that a BlockBackend does not hold back while it is drained */
static bool gate_enter(RandomTest *r)
{
    QEMU_LOCK_GUARD(&r->lock);

    if (!r->gate) {
        r->nb_gated++;
    }
    return !r->gate;
}

static void gate_leave(RandomTest *r)
{
    QEMU_LOCK_GUARD(&r->lock);
    r->nb_gated--;
}

/* ---- Results ---- */

/* Called with r->lock held */
static bool may_fail_locked(User *u, int ret)
{
    RandomTest *r = u->r;

    return ret == -EIO && (u->bad || r->bad || u->nb_bad != r->nb_bad);
}

static bool succeeded(User *u, int ret)
{
    RandomTest *r = u->r;

    if (ret >= 0) {
        return true;
    }
    QEMU_LOCK_GUARD(&r->lock);
    g_assert(may_fail_locked(u, ret));
    r->nb_failed++;
    return false;
}

/*
 * A change of a range that is locked has ended.  If it failed, each byte is
 * either as it was or as it was to be, and stays so.  Only what is after the
 * end of the node can appear later, unless it is written again.
 */
static void coroutine_fn changed(User *u, int64_t offset, int64_t bytes,
                                 const uint8_t *buf, bool grows, int ret)
{
    RandomTest *r = u->r;
    uint8_t *shadow = r->t->shadow + offset;
    int64_t end = offset + bytes;
    g_autofree uint8_t *found = NULL;
    int64_t i;

    if (ret < 0) {
        int64_t len = blk_co_getlength(r->t->blk);

        found = g_malloc(bytes);
        while (blk_co_pread(r->t->blk, offset, bytes, found, 0) < 0) {
            co_hop();
        }
        for (i = 0; i < bytes; i++) {
            if (found[i] != shadow[i] && found[i] != buf[i]) {
                g_error("byte %" PRId64 " is %02x, neither %02x nor %02x",
                        offset + i, found[i], shadow[i], buf[i]);
            }
        }
        grows &= end > len;
        while (grows &&
               blk_co_pwrite(r->t->blk, offset, bytes, found, 0) < 0) {
            co_hop();
        }
    }

    QEMU_LOCK_GUARD(&r->lock);

    if (ret < 0) {
        g_assert(ret == -ENOTSUP || may_fail_locked(u, ret));
        r->nb_failed++;
    }
    memcpy(shadow, found ?: buf, bytes);
    if (grows) {
        r->max_len = MAX(r->max_len, ROUND_UP(end, MAX(r->align,
                                                       BDRV_SECTOR_SIZE)));
        r->min_len = MAX(r->min_len, ROUND_UP(end, BDRV_SECTOR_SIZE));
    }
}

/* A vector of up to three parts for a buffer */
static void random_qiov(User *u, QEMUIOVector *qiov, uint8_t *buf,
                        int64_t bytes)
{
    qemu_iovec_init(qiov, 3);
    while (bytes && qiov->niov < 2 && below(u, 3) == 0) {
        int64_t n = below(u, bytes) + 1;

        qemu_iovec_add(qiov, buf, n);
        buf += n;
        bytes -= n;
    }
    if (bytes) {
        qemu_iovec_add(qiov, buf, bytes);
    }
}

static uint8_t *random_data(User *u, int64_t bytes)
{
    uint8_t *buf = g_malloc(bytes + 3);
    uint32_t x = g_rand_int(u->rand) | 1;
    int64_t i;

    for (i = 0; i < bytes; i += 4) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        memcpy(buf + i, &x, sizeof(x));
    }
    return buf;
}

#endif /* TESTS_UNIT_SEQCACHE_RANDOM_H */
