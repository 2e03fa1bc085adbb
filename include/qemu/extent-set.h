/*
 * A set of extents: what is known about ranges of bytes
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The extents of a set do not overlap.  Neighbours that say the same are one
 * extent.  An extent with an owner says nothing yet: its owner is finding out.
 * While bytes are being changed, nobody can find out about them.
 *
 * A pure data structure: it has no lock, and asks nobody.  Each operation takes
 * a time that is logarithmic in the number of extents, for each extent that it
 * adds, removes or cuts.
 */

#ifndef QEMU_EXTENT_SET_H
#define QEMU_EXTENT_SET_H

#include "qemu/queue.h"

typedef struct ExtentSet ExtentSet;

/**
 * Extent: a range of bytes about which the same is known
 * @start: its first byte.
 * @last: its last byte, which may be UINT64_MAX.
 * @flags: what is known; any number.
 * @owner: who is going to find out; NULL if it is known.  Not dereferenced.
 */
typedef struct Extent {
    uint64_t start;
    uint64_t last;
    int flags;
    void *owner;
} Extent;

/**
 * ExtentChange: a change of a range of bytes, from extent_set_begin_change() to
 * extent_set_end_change().  Its contents belong to the set.
 */
typedef struct ExtentChange {
    uint64_t start;
    uint64_t last;
    QLIST_ENTRY(ExtentChange) next;
} ExtentChange;

/**
 * extent_set_new:
 *
 * Returns: an empty set, to be freed with extent_set_free().
 */
ExtentSet *extent_set_new(void);

/**
 * extent_set_free:
 * @set: the set, or NULL.  It has no change.
 */
void extent_set_free(ExtentSet *set);

/**
 * extent_set_count:
 * @set: the set.
 *
 * Returns: the number of extents.
 */
uint64_t extent_set_count(const ExtentSet *set);

/**
 * extent_set_first:
 * @set: the set.
 * @start: the first byte of a range.
 * @last: its last byte.
 *
 * @extent: filled in with the first extent that overlaps the range, as a whole.
 *
 * Returns: whether there is one.
 */
bool extent_set_first(ExtentSet *set, uint64_t start, uint64_t last,
                      Extent *extent);

/**
 * extent_set_add:
 * @set: the set.
 * @extent: what is known now.  Copied.
 *
 * Replaces what was known about the range of @extent.
 */
void extent_set_add(ExtentSet *set, const Extent *extent);

/**
 * extent_set_clear:
 * @set: the set.
 * @start: the first byte of a range.
 * @last: its last byte.
 *
 * Nothing is known about the range any more.  Extents that go beyond it are
 * cut.
 *
 * Returns: the number of extents without an owner that were removed or cut.
 */
uint64_t extent_set_clear(ExtentSet *set, uint64_t start, uint64_t last);

/**
 * extent_set_expect:
 * @set: the set.
 * @start: the first byte of a range.  It is not known.
 * @last: its last byte.
 * @owner: who begins to find out; not NULL.
 *
 * Adds an extent of @owner from @start on, to the next extent of the set, or to
 * @last.  If somebody else is finding out about @start, @owner takes over what
 * the other one has there up to @last.  Nothing is added where there is a
 * change.
 *
 * Returns: the last byte about which @owner is to find out.
 */
uint64_t extent_set_expect(ExtentSet *set, uint64_t start, uint64_t last,
                           void *owner);

/**
 * extent_set_begin_change:
 * @set: the set.
 * @change: the change, owned by the caller until it ends.
 * @start: the first byte of a range.
 * @last: its last byte.
 *
 * Clears the range, and lets nobody expect anything there until the change
 * ends.  Changes may overlap.
 *
 * Returns: what extent_set_clear() does.
 */
uint64_t extent_set_begin_change(ExtentSet *set, ExtentChange *change,
                                 uint64_t start, uint64_t last);

/**
 * extent_set_end_change:
 * @change: what extent_set_begin_change() got.
 *
 * Nothing is known about its range then, unless extent_set_add() was called.
 */
void extent_set_end_change(ExtentChange *change);

/**
 * extent_set_limit:
 * @set: the set.
 * @max: a number of extents.
 * @start: the first byte of a range.
 * @last: its last byte.
 *
 * Removes extents until there are no more than @max: first those before the
 * range, then those after it, and at last those that overlap it; lower ones
 * before higher ones.
 */
void extent_set_limit(ExtentSet *set, uint64_t max, uint64_t start,
                      uint64_t last);

#endif /* QEMU_EXTENT_SET_H */
