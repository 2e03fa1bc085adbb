/*
 * qcow2: compressing ahead
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A compressed write takes a turn before it compresses, and waits afterwards
 * until all turns before its own are over.  So the compressed clusters get
 * their space in the order in which the writes were begun.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "qemu/memalign.h"
#include "qcow2.h"
#include "qcow2-write-behind.h"

/*
 * A coroutine that waits until the first @number turns are over; or, in
 * fua_waiters, for the end of a flush
 */
typedef struct Qcow2TurnWaiter {
    uint64_t number;
    CoQueue queue;
    QLIST_ENTRY(Qcow2TurnWaiter) next;
} Qcow2TurnWaiter;

void *qcow2_get_compress_buf(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    Qcow2CompressAhead *ca = &s->compress_ahead;

    if (s->write_behind) {
        qatomic_inc(&ca->nb_bufs);
        for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS; i++) {
            void *buf = qatomic_read(&ca->spare_bufs[i]) ?
                        qatomic_xchg(&ca->spare_bufs[i], NULL) : NULL;

            if (buf) {
                return buf;
            }
        }
    }
    return qemu_blockalign(bs, s->cluster_size);
}

void qcow2_put_compress_buf(BlockDriverState *bs, void *buf)
{
    BDRVQcow2State *s = bs->opaque;
    Qcow2CompressAhead *ca = &s->compress_ahead;

    if (s->write_behind) {
        for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS && buf; i++) {
            if (!qatomic_cmpxchg(&ca->spare_bufs[i], NULL, buf)) {
                buf = NULL;
            }
        }
        if (qatomic_fetch_dec(&ca->nb_bufs) == 1) {
            for (int i = 0; i < QCOW2_SPARE_COMPRESS_BUFS; i++) {
                qemu_vfree(qatomic_xchg(&ca->spare_bufs[i], NULL));
            }
        }
    }
    qemu_vfree(buf);
}

/*
 * Wait until the first @number turns are over.  Called with s->lock held, which
 * is released meanwhile.
 */
static void coroutine_fn
qcow2_co_wait_turns_locked(BDRVQcow2State *s, uint64_t number)
{
    Qcow2TurnWaiter self = { .number = number };

    if (number > s->compress_ahead.nb_over) {
        qemu_co_queue_init(&self.queue);
        QLIST_INSERT_HEAD(&s->compress_ahead.waiters, &self, next);
        qemu_co_queue_wait(&self.queue, &s->lock);
        QLIST_REMOVE(&self, next);
    }
}

/* A turn is over, whose time has come.  Called with s->lock held. */
static void coroutine_fn qcow2_end_turn_locked(BDRVQcow2State *s)
{
    Qcow2TurnWaiter *waiter;

    s->compress_ahead.nb_over++;
    QLIST_FOREACH(waiter, &s->compress_ahead.waiters, next) {
        if (waiter->number == s->compress_ahead.nb_over) {
            qemu_co_queue_next(&waiter->queue);
        }
    }
}

int coroutine_fn
qcow2_co_compress_ahead(BlockDriverState *bs, uint64_t offset, const void *src,
                        void *dest, GArray *allocs)
{
    BDRVQcow2State *s = bs->opaque;
    uint64_t turn;
    ssize_t len;
    int ret;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        turn = s->compress_ahead.nb_taken++;
    }

    len = qcow2_co_compress(bs, dest, s->cluster_size - 1, src,
                            s->cluster_size);

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        qcow2_co_wait_turns_locked(s, turn);
    }

    if (qatomic_read(&s->abandoned)) {
        ret = -ECANCELED;
    } else if (len >= 0) {
        ret = qcow2_co_write_compressed(bs, offset, dest, len, allocs);
    } else if (len == -ENOMEM) {
        ret = qcow2_co_write_incompressible(bs, offset, src);
    } else {
        ret = -EINVAL;
    }

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        qcow2_end_turn_locked(s);
    }

    return ret;
}

int coroutine_fn qcow2_co_flush_compressed(BlockDriverState *bs)
{
    BDRVQcow2State *s = bs->opaque;
    Qcow2CompressAhead *ca = &s->compress_ahead;
    Qcow2TurnWaiter *waiter;
    uint64_t number;
    int ret;

    if (!s->write_behind) {
        return bdrv_co_flush_inserted(bs);
    }

    qemu_co_mutex_lock(&s->lock);
    number = ++ca->nb_fua_begun;

    /* Let those come along that were begun, if they want to be flushed, too */
    qcow2_co_wait_turns_locked(s, ca->nb_taken);

    while (number > MAX(ca->nb_fua_done, ca->nb_fua_failed)) {
        Qcow2TurnWaiter self;
        uint64_t last;

        if (ca->fua_flushing) {
            qemu_co_queue_init(&self.queue);
            QLIST_INSERT_HEAD(&ca->fua_waiters, &self, next);
            qemu_co_queue_wait(&self.queue, &s->lock);
            QLIST_REMOVE(&self, next);
            continue;
        }

        ca->fua_flushing = true;
        last = ca->nb_fua_begun;
        qemu_co_mutex_unlock(&s->lock);
        ret = bdrv_co_flush_inserted(bs);
        qemu_co_mutex_lock(&s->lock);
        ca->fua_flushing = false;

        if (ret < 0) {
            ca->nb_fua_failed = last;
            ca->fua_error = ret;
        } else {
            ca->nb_fua_done = last;
        }
        QLIST_FOREACH(waiter, &ca->fua_waiters, next) {
            qemu_co_queue_next(&waiter->queue);
        }
    }

    ret = number <= ca->nb_fua_done ? 0 : ca->fua_error;
    qemu_co_mutex_unlock(&s->lock);
    return ret;
}
