/*
 * A set of extents: what is known about ranges of bytes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/extent-set.h"
#include "qemu/interval-tree.h"

typedef struct ExtentNode {
    IntervalTreeNode node;
    int flags;
    void *owner;
} ExtentNode;

struct ExtentSet {
    IntervalTreeRoot root;
    uint64_t count;
    /* What was inserted last, or NULL: often the neighbour of the next one */
    ExtentNode *newest;
    QLIST_HEAD(, ExtentChange) changes;
};

ExtentSet *extent_set_new(void)
{
    ExtentSet *set = g_new0(ExtentSet, 1);

    QLIST_INIT(&set->changes);
    return set;
}

void extent_set_free(ExtentSet *set)
{
    if (set) {
        assert(QLIST_EMPTY(&set->changes));
        extent_set_clear(set, 0, UINT64_MAX);
        g_free(set);
    }
}

uint64_t extent_set_count(const ExtentSet *set)
{
    return set->count;
}

static ExtentNode *extent_set_find(ExtentSet *set, uint64_t start,
                                   uint64_t last)
{
    IntervalTreeNode *node = interval_tree_iter_first(&set->root, start, last);

    return node ? container_of(node, ExtentNode, node) : NULL;
}

bool extent_set_first(ExtentSet *set, uint64_t start, uint64_t last,
                      Extent *extent)
{
    ExtentNode *e = extent_set_find(set, start, last);

    if (e) {
        extent->start = e->node.start;
        extent->last = e->node.last;
        extent->flags = e->flags;
        extent->owner = e->owner;
    }
    return e;
}

static void extent_set_insert(ExtentSet *set, uint64_t start, uint64_t last,
                              int flags, void *owner)
{
    ExtentNode *e = g_new(ExtentNode, 1);

    e->node.start = start;
    e->node.last = last;
    e->flags = flags;
    e->owner = owner;
    interval_tree_insert(&e->node, &set->root);
    set->count++;
    set->newest = e;
}

static void extent_set_remove(ExtentSet *set, ExtentNode *e)
{
    interval_tree_remove(&e->node, &set->root);
    set->count--;
    if (set->newest == e) {
        set->newest = NULL;
    }
    g_free(e);
}

/* Remove what @e, which overlaps the range, has in common with it */
static void extent_set_cut(ExtentSet *set, ExtentNode *e, uint64_t start,
                           uint64_t last)
{
    if (e->node.start < start) {
        extent_set_insert(set, e->node.start, start - 1, e->flags, e->owner);
    }
    if (e->node.last > last) {
        extent_set_insert(set, last + 1, e->node.last, e->flags, e->owner);
    }
    extent_set_remove(set, e);
}

uint64_t extent_set_clear(ExtentSet *set, uint64_t start, uint64_t last)
{
    uint64_t nb_known = 0;
    ExtentNode *e;

    while ((e = extent_set_find(set, start, last))) {
        nb_known += !e->owner;
        extent_set_cut(set, e, start, last);
    }
    return nb_known;
}

/* The extent at @pos if it says the same as @extent, or NULL */
static ExtentNode *extent_set_same(ExtentSet *set, uint64_t pos,
                                   const Extent *extent)
{
    ExtentNode *e = set->newest;

    if (!e || pos < e->node.start || pos > e->node.last) {
        e = extent_set_find(set, pos, pos);
    }
    return e && e->flags == extent->flags && e->owner == extent->owner ? e :
                                                                         NULL;
}

void extent_set_add(ExtentSet *set, const Extent *extent)
{
    uint64_t start = extent->start;
    uint64_t last = extent->last;
    ExtentNode *e;

    /*
     * When an answer is added extent by extent, none of these goes through the
     * tree: nothing follows, and what is before is the newest one.
     */
    extent_set_clear(set, start, last);
    e = start > 0 ? extent_set_same(set, start - 1, extent) : NULL;
    if (e) {
        start = e->node.start;
        extent_set_remove(set, e);
    }
    e = last < UINT64_MAX ? extent_set_same(set, last + 1, extent) : NULL;
    if (e) {
        last = e->node.last;
        extent_set_remove(set, e);
    }
    extent_set_insert(set, start, last, extent->flags, extent->owner);
}

uint64_t extent_set_expect(ExtentSet *set, uint64_t start, uint64_t last,
                           void *owner)
{
    Extent new = { .start = start, .last = last, .owner = owner };
    ExtentChange *change;
    Extent e;

    if (extent_set_first(set, start, last, &e)) {
        new.last = e.start > start ? e.start - 1 : MIN(e.last, last);
    }
    extent_set_add(set, &new);
    QLIST_FOREACH(change, &set->changes, next) {
        if (change->start <= new.last && change->last >= start) {
            extent_set_clear(set, MAX(change->start, start),
                             MIN(change->last, new.last));
        }
    }
    return new.last;
}

uint64_t extent_set_begin_change(ExtentSet *set, ExtentChange *change,
                                 uint64_t start, uint64_t last)
{
    change->start = start;
    change->last = last;
    QLIST_INSERT_HEAD(&set->changes, change, next);
    return extent_set_clear(set, start, last);
}

void extent_set_end_change(ExtentChange *change)
{
    QLIST_REMOVE(change, next);
}

/* The first extent that begins behind @last, or NULL */
static ExtentNode *extent_set_behind(ExtentSet *set, uint64_t last)
{
    ExtentNode *e = extent_set_find(set, last, last);

    if (e) {
        last = e->node.last;
    }
    return last < UINT64_MAX ? extent_set_find(set, last + 1, UINT64_MAX) :
                               NULL;
}

void extent_set_limit(ExtentSet *set, uint64_t max, uint64_t start,
                      uint64_t last)
{
    while (set->count > max) {
        ExtentNode *e = extent_set_find(set, 0, UINT64_MAX);

        if (e->node.last >= start) {
            e = extent_set_behind(set, last) ?: e;
        }
        extent_set_remove(set, e);
    }
}
