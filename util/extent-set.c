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
};

ExtentSet *extent_set_new(void)
{
    return g_new0(ExtentSet, 1);
}

void extent_set_free(ExtentSet *set)
{
    if (set) {
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

static Extent extent_of(const ExtentNode *e)
{
    return (Extent) {
        .start = e->node.start,
        .last = e->node.last,
        .flags = e->flags,
        .owner = e->owner,
    };
}

bool extent_set_first(ExtentSet *set, uint64_t start, uint64_t last,
                      Extent *extent)
{
    ExtentNode *e = extent_set_find(set, start, last);

    if (e) {
        *extent = extent_of(e);
    }
    return e;
}

static void extent_set_insert(ExtentSet *set, const Extent *extent)
{
    ExtentNode *e = g_new(ExtentNode, 1);

    e->node.start = extent->start;
    e->node.last = extent->last;
    e->flags = extent->flags;
    e->owner = extent->owner;
    interval_tree_insert(&e->node, &set->root);
    set->count++;
}

/* Returns what it was */
static Extent extent_set_remove(ExtentSet *set, ExtentNode *e)
{
    Extent old = extent_of(e);

    interval_tree_remove(&e->node, &set->root);
    set->count--;
    g_free(e);
    return old;
}

/* If the extent at @offset says the same as @extent, they become one */
static void extent_set_merge(ExtentSet *set, uint64_t offset, Extent *extent)
{
    ExtentNode *e = extent_set_find(set, offset, offset);

    if (e && e->flags == extent->flags && e->owner == extent->owner) {
        Extent old = extent_set_remove(set, e);

        extent->start = MIN(extent->start, old.start);
        extent->last = MAX(extent->last, old.last);
    }
}

void extent_set_add(ExtentSet *set, const Extent *extent)
{
    Extent new = *extent;

    extent_set_clear(set, new.start, new.last);
    if (new.start > 0) {
        extent_set_merge(set, new.start - 1, &new);
    }
    if (new.last < UINT64_MAX) {
        extent_set_merge(set, new.last + 1, &new);
    }
    extent_set_insert(set, &new);
}

uint64_t extent_set_clear(ExtentSet *set, uint64_t start, uint64_t last)
{
    uint64_t nb_known = 0;
    ExtentNode *e;

    while ((e = extent_set_find(set, start, last))) {
        Extent old = extent_set_remove(set, e);
        Extent part = old;

        nb_known += !old.owner;
        if (old.start < start) {
            part.last = start - 1;
            extent_set_insert(set, &part);
        }
        if (old.last > last) {
            part.start = last + 1;
            part.last = old.last;
            extent_set_insert(set, &part);
        }
    }
    return nb_known;
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
            e = extent_set_behind(set, last);
        }
        if (!e) {
            break;
        }
        extent_set_remove(set, e);
    }
}
