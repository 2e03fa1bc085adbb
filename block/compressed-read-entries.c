/*
 * Reading compressed clusters: what is kept
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Entries, which are pieces and clusters, never change once they are ready.  To
 * forget one is to take it off its list: no later reader finds it.  Readers
 * that have it already go on to use it.  Their cread_begin() was before the
 * change, so without the cache, they might have read the same.
 */

#include "qemu/osdep.h"

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/compressed-read-int.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "trace.h"

/* What is kept at most of each kind, so that searching it does not take long */
#define CREAD_MAX_ENTRIES 64

/* From this size on, a buffer is not on the heap */
#define CREAD_MIN_MAPPED (128 * KiB)

/* Whole pages of @size */
static size_t cread_mapped_size(int64_t size)
{
    return ROUND_UP(size, qemu_real_host_page_size());
}

/* Called with c->lock held */
static void cread_free_unused_locked(CompressedReadCache *c, CReadEntry *entry)
{
    if (!entry->listed && !entry->nb_users) {
        c->bytes -= entry->size;
        if (entry->mapped) {
            qemu_anon_ram_free(entry->buf, cread_mapped_size(entry->size));
        } else {
            qemu_vfree(entry->buf);
        }
        g_free(entry);
    }
}

void cread_unlist_locked(CompressedReadCache *c, CReadList *list,
                         CReadEntry *entry)
{
    QTAILQ_REMOVE(&list->entries, entry, next);
    list->nb_entries--;
    entry->listed = false;
    cread_free_unused_locked(c, entry);
}

void cread_use_locked(CompressedReadCache *c, CReadList *list,
                      CReadEntry *entry)
{
    entry->nb_users++;
    entry->used = c->nb_reads;
    QTAILQ_REMOVE(&list->entries, entry, next);
    QTAILQ_INSERT_TAIL(&list->entries, entry, next);
}

void cread_unuse_locked(CompressedReadCache *c, CReadEntry *entry)
{
    entry->nb_users--;
    cread_free_unused_locked(c, entry);
}

/* What can be dropped first, or NULL.  Called with c->lock held. */
static CReadEntry *cread_oldest_locked(CReadList *list)
{
    CReadEntry *entry;

    QTAILQ_FOREACH(entry, &list->entries, next) {
        if (!entry->nb_users) {
            return entry;
        }
    }
    return NULL;
}

void cread_drop_unused_locked(CompressedReadCache *c)
{
    CReadList *lists[] = { &c->pieces, &c->clusters };
    CReadEntry *entry;

    for (int i = 0; i < ARRAY_SIZE(lists); i++) {
        while ((entry = cread_oldest_locked(lists[i])) != NULL) {
            cread_unlist_locked(c, lists[i], entry);
        }
    }
}

/*
 * Make room for an entry of @size bytes in @list.  Called with c->lock held.
 *
 * Returns: whether there is.
 */
static bool cread_make_room_locked(CompressedReadCache *c, CReadList *list,
                                   int64_t size)
{
    while (c->bytes + size > c->opts.cache_size ||
           list->nb_entries >= CREAD_MAX_ENTRIES) {
        CReadEntry *piece = cread_oldest_locked(&c->pieces);
        CReadEntry *cluster = cread_oldest_locked(&c->clusters);

        if (list->nb_entries >= CREAD_MAX_ENTRIES) {
            /* Only one of this list helps */
            piece = list == &c->pieces ? piece : NULL;
            cluster = list == &c->clusters ? cluster : NULL;
        }
        if (piece && (!cluster || piece->used <= cluster->used)) {
            cread_unlist_locked(c, &c->pieces, piece);
        } else if (cluster) {
            cread_unlist_locked(c, &c->clusters, cluster);
        } else {
            return false;
        }
    }
    return true;
}

CReadEntry *cread_add_locked(CompressedReadCache *c, CReadList *list,
                             CompressedExtent extent, int64_t size,
                             size_t align)
{
    CReadEntry *entry;
    void *buf;
    /*
     * Pieces come and go in all sizes.  On the heap, they leave gaps that
     * nothing fits into: so large ones are not there.
     */
    bool mapped = size >= CREAD_MIN_MAPPED &&
                  align <= qemu_real_host_page_size();

    if (size > c->opts.cache_size || !cread_make_room_locked(c, list, size)) {
        return NULL;
    }
    buf = mapped ? qemu_anon_ram_alloc(cread_mapped_size(size), NULL, false,
                                       false) :
                   qemu_try_memalign(align, size);
    if (!buf) {
        return NULL;
    }

    entry = g_new0(CReadEntry, 1);
    entry->c = c;
    entry->extent = extent;
    entry->buf = buf;
    entry->size = size;
    entry->mapped = mapped;
    entry->state = CREAD_BUSY;
    qemu_co_queue_init(&entry->waiters);
    entry->nb_users = 1;
    entry->listed = true;
    entry->used = c->nb_reads;
    QTAILQ_INSERT_TAIL(&list->entries, entry, next);
    list->nb_entries++;

    c->bytes += size;
    c->stats.max_cached_bytes = MAX(c->stats.max_cached_bytes, c->bytes);
    return entry;
}

void coroutine_fn cread_ready_locked(CReadEntry *entry)
{
    entry->state = CREAD_READY;
    qemu_co_queue_restart_all(&entry->waiters);
}

void coroutine_fn cread_fail_locked(CompressedReadCache *c, CReadList *list,
                                    CReadEntry *entry)
{
    entry->state = CREAD_FAILED;
    if (entry->listed) {
        cread_unlist_locked(c, list, entry);
    }
    qemu_co_queue_restart_all(&entry->waiters);
}

bool coroutine_fn cread_co_wait_locked(CompressedReadCache *c,
                                       CReadEntry *entry)
{
    while (entry->state == CREAD_BUSY) {
        qemu_co_queue_wait(&entry->waiters, &c->lock);
    }
    return entry->state == CREAD_READY;
}

CReadEntry *cread_find_cluster_locked(CompressedReadCache *c,
                                      const CompressedExtent *extent)
{
    CReadEntry *entry;

    QTAILQ_FOREACH_REVERSE(entry, &c->clusters.entries, next) {
        if (entry->extent.offset == extent->offset &&
            entry->extent.bytes == extent->bytes) {
            return entry;
        }
    }
    return NULL;
}

CReadEntry *cread_find_piece_locked(CompressedReadCache *c,
                                    const CompressedExtent *extent)
{
    CReadEntry *entry;

    QTAILQ_FOREACH_REVERSE(entry, &c->pieces.entries, next) {
        if (entry->extent.offset <= extent->offset &&
            extent_end(extent) <= extent_end(&entry->extent)) {
            return entry;
        }
    }
    return NULL;
}

/* Called with c->lock held */
static unsigned cread_forget_list_locked(CompressedReadCache *c,
                                         CReadList *list,
                                         const CompressedExtent *range)
{
    CReadEntry *entry, *next;
    unsigned n = 0;

    QTAILQ_FOREACH_SAFE(entry, &list->entries, next, next) {
        if (extents_overlap(&entry->extent, range)) {
            cread_unlist_locked(c, list, entry);
            n++;
        }
    }
    return n;
}

void cread_forget_locked(CompressedReadCache *c,
                         const CompressedExtent *range)
{
    unsigned n = cread_forget_list_locked(c, &c->pieces, range) +
                 cread_forget_list_locked(c, &c->clusters, range);

    if (n) {
        trace_cread_forget(c->bs, range->offset, range->bytes, n);
        c->stats.forgotten += n;
    }
}

void cread_forget(CompressedReadCache *c, int64_t offset, int64_t bytes)
{
    CompressedExtent range = { offset, bytes };

    if (!c) {
        return;
    }

    QEMU_LOCK_GUARD(&c->lock);

    cread_forget_locked(c, &range);
}
