/*
 * Tests of the set of extents
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Every operation is also applied to an array that says for each byte what is
 * known about it.  The --seed option of GLib repeats a run.
 */

#include "qemu/osdep.h"
#include "qemu/extent-set.h"

#define SIZE 200 /* of the range that the random test uses, in bytes */
#define NB_CHANGES 3 /* of it, at a time */

static int owners[2];

static void add(ExtentSet *set, uint64_t start, uint64_t last, int flags,
                void *owner)
{
    extent_set_add(set, &(Extent) { start, last, flags, owner });
}

static void check(ExtentSet *set, uint64_t from, uint64_t start, uint64_t last,
                  int flags, void *owner)
{
    Extent e;

    g_assert_true(extent_set_first(set, from, UINT64_MAX, &e));
    g_assert_cmpuint(e.start, ==, start);
    g_assert_cmpuint(e.last, ==, last);
    g_assert_cmpint(e.flags, ==, flags);
    g_assert_true(e.owner == owner);
}

static void test_empty(void)
{
    ExtentSet *set = extent_set_new();
    Extent e;

    g_assert_cmpuint(extent_set_count(set), ==, 0);
    g_assert_false(extent_set_first(set, 0, UINT64_MAX, &e));
    g_assert_cmpuint(extent_set_clear(set, 0, UINT64_MAX), ==, 0);
    extent_set_limit(set, 0, UINT64_MAX, UINT64_MAX);
    extent_set_free(set);
    extent_set_free(NULL);
}

/* What a new extent covers is replaced, and what goes beyond it stays */
static void test_replace(void)
{
    ExtentSet *set = extent_set_new();

    add(set, 0, UINT64_MAX, 1, NULL);
    add(set, 100, 199, 2, NULL);
    g_assert_cmpuint(extent_set_count(set), ==, 3);
    check(set, 0, 0, 99, 1, NULL);
    check(set, 100, 100, 199, 2, NULL);
    check(set, 200, 200, UINT64_MAX, 1, NULL);
    g_assert_cmpuint(extent_set_clear(set, 50, 149), ==, 2);
    check(set, 0, 0, 49, 1, NULL);
    check(set, 50, 150, 199, 2, NULL);
    extent_set_free(set);
}

/* Neighbours become one if they say the same, also at the ends of the world */
static void test_merge(void)
{
    ExtentSet *set = extent_set_new();

    add(set, 0, 99, 1, NULL);
    add(set, 200, UINT64_MAX, 1, NULL);
    add(set, 100, 199, 1, &owners[0]);
    g_assert_cmpuint(extent_set_count(set), ==, 3);
    g_assert_cmpuint(extent_set_clear(set, 100, 199), ==, 0);
    add(set, 100, 199, 2, NULL);
    g_assert_cmpuint(extent_set_count(set), ==, 3);
    add(set, 100, 199, 1, NULL);
    g_assert_cmpuint(extent_set_count(set), ==, 1);
    check(set, 0, 0, UINT64_MAX, 1, NULL);
    extent_set_free(set);
}

static void test_limit(void)
{
    ExtentSet *set = extent_set_new();

    for (int i = 0; i < 10; i++) {
        add(set, i * 10, i * 10 + 4, 1, NULL);
    }
    extent_set_limit(set, 10, 30, 54);
    g_assert_cmpuint(extent_set_count(set), ==, 10);
    /* The three that are before the range, then one behind it */
    add(set, 26, 31, 2, NULL);
    extent_set_limit(set, 7, 30, 50);
    check(set, 0, 26, 31, 2, NULL);
    check(set, 51, 50, 54, 1, NULL);
    check(set, 60, 70, 74, 1, NULL);
    g_assert_cmpuint(extent_set_count(set), ==, 7);
    /* What overlaps the range goes last, the lowest one first */
    extent_set_limit(set, 4, 30, 50);
    check(set, 0, 26, 31, 2, NULL);
    extent_set_limit(set, 3, 30, 50);
    check(set, 0, 32, 34, 1, NULL);
    g_assert_cmpuint(extent_set_count(set), ==, 3);
    extent_set_limit(set, 0, UINT64_MAX, UINT64_MAX);
    g_assert_cmpuint(extent_set_count(set), ==, 0);
    extent_set_free(set);
}

/* Who finds out is told how far, and takes over from somebody else */
static void test_expect(void)
{
    ExtentSet *set = extent_set_new();

    add(set, 100, 199, 1, NULL);
    g_assert_cmpuint(extent_set_expect(set, 50, 80, &owners[0]), ==, 80);
    check(set, 0, 50, 80, 0, &owners[0]);
    g_assert_cmpuint(extent_set_expect(set, 81, 300, &owners[1]), ==, 99);
    g_assert_cmpuint(extent_set_expect(set, 200, UINT64_MAX, &owners[0]), ==,
                     UINT64_MAX);
    g_assert_cmpuint(extent_set_expect(set, 60, 70, &owners[1]), ==, 70);
    g_assert_cmpuint(extent_set_expect(set, 75, 90, &owners[1]), ==, 80);
    check(set, 0, 50, 59, 0, &owners[0]);
    check(set, 60, 60, 70, 0, &owners[1]);
    check(set, 71, 71, 74, 0, &owners[0]);
    check(set, 75, 75, 99, 0, &owners[1]);
    g_assert_cmpuint(extent_set_count(set), ==, 6);
    extent_set_free(set);
}

/* Nobody can find out what is being changed, though he is not told */
static void test_change(void)
{
    ExtentSet *set = extent_set_new();
    ExtentChange first, second;

    add(set, 0, 99, 1, NULL);
    g_assert_cmpuint(extent_set_begin_change(set, &first, 20, 29), ==, 1);
    g_assert_cmpuint(extent_set_begin_change(set, &second, 25, 34), ==, 1);
    g_assert_cmpuint(extent_set_expect(set, 20, 99, &owners[0]), ==, 34);
    check(set, 20, 35, 99, 1, NULL);
    extent_set_end_change(&first);
    g_assert_cmpuint(extent_set_expect(set, 20, 99, &owners[0]), ==, 34);
    check(set, 20, 20, 24, 0, &owners[0]);
    check(set, 25, 35, 99, 1, NULL);
    extent_set_end_change(&second);
    check(set, 25, 35, 99, 1, NULL);
    g_assert_cmpuint(extent_set_expect(set, 25, 30, &owners[0]), ==, 30);
    check(set, 20, 20, 30, 0, &owners[0]);
    extent_set_free(set);
}

/* ---- At random ---- */

typedef struct Byte {
    int flags;
    void *owner;
} Byte;

static const Byte unknown = { .flags = -1 };

/* A change, and the range that it has while it is active */
typedef struct Change {
    ExtentChange change;
    bool active;
    int start;
    int last;
} Change;

static bool same(Byte a, Byte b)
{
    return a.flags == b.flags && a.owner == b.owner;
}

/* Compare everything */
static void check_all(ExtentSet *set, const Byte *bytes)
{
    unsigned nb = 0;
    int pos = 0;
    Extent e;

    while (extent_set_first(set, pos, UINT64_MAX, &e)) {
        g_assert_cmpuint(e.last, <, SIZE);
        for (; pos <= e.last; pos++) {
            g_assert_true(same(bytes[pos], pos < e.start ? unknown :
                               (Byte) { e.flags, e.owner }));
        }
        /* It is the whole extent */
        g_assert_false(e.start && same(bytes[e.start - 1], bytes[e.start]));
        nb++;
    }
    for (; pos < SIZE; pos++) {
        g_assert_true(same(bytes[pos], unknown));
    }
    g_assert_cmpuint(extent_set_count(set), ==, nb);
}

static uint64_t known_extents(const Byte *bytes, int start, int last)
{
    uint64_t nb = 0;

    for (int i = start; i <= last; i++) {
        nb += bytes[i].flags >= 0 && !bytes[i].owner &&
            (i == start || !same(bytes[i], bytes[i - 1]));
    }
    return nb;
}

/* The naive way: the best one to go, again and again */
static void limit_bytes(Byte *bytes, unsigned max, int start, int last)
{
    for (;;) {
        int victim = -1, victim_end = 0;
        bool overlaps = true;
        unsigned nb = 0;

        for (int i = 0, end; i < SIZE; i = end) {
            end = i + 1;
            if (bytes[i].flags < 0) {
                continue;
            }
            while (end < SIZE && same(bytes[end], bytes[i])) {
                end++;
            }
            nb++;
            if (overlaps && (victim < 0 || end <= start || i > last)) {
                victim = i;
                victim_end = end;
                overlaps = end > start && i <= last;
            }
        }
        if (nb <= max) {
            return;
        }
        for (int i = victim; i < victim_end; i++) {
            bytes[i] = unknown;
        }
    }
}

/* If @start is known, nobody asks */
static void random_expect(ExtentSet *set, Byte *bytes, const Change *changes,
                          int start, int last)
{
    Byte new = { .owner = &owners[g_test_rand_int_range(0, 2)] };
    Byte old = bytes[start];
    int end = start + 1;

    if (old.flags >= 0 && !old.owner) {
        return;
    }
    while (end <= last && same(bytes[end], old)) {
        end++;
    }
    g_assert_cmpuint(extent_set_expect(set, start, last, new.owner), ==,
                     end - 1);
    for (int i = start; i < end; i++) {
        bytes[i] = new;
        for (int k = 0; k < NB_CHANGES; k++) {
            const Change *c = &changes[k];

            if (c->active && i >= c->start && i <= c->last) {
                bytes[i] = unknown;
            }
        }
    }
}

static void random_change(ExtentSet *set, Byte *bytes, Change *c, int start,
                          int last)
{
    c->active = !c->active;
    if (!c->active) {
        extent_set_end_change(&c->change);
        return;
    }
    c->start = start;
    c->last = last;
    g_assert_cmpuint(extent_set_begin_change(set, &c->change, start, last), ==,
                     known_extents(bytes, start, last));
    for (int i = start; i <= last; i++) {
        bytes[i] = unknown;
    }
}

static void test_random(void)
{
    int nb_ops = g_test_slow() ? 2000000 : 20000;
    ExtentSet *set = extent_set_new();
    Change changes[NB_CHANGES] = { 0 };
    Byte bytes[SIZE];

    for (int i = 0; i < SIZE; i++) {
        bytes[i] = unknown;
    }
    while (nb_ops--) {
        int op = g_test_rand_int_range(0, 10);
        int start = g_test_rand_int_range(0, SIZE);
        int last = g_test_rand_int_range(start, MIN(start + 50, SIZE));
        Byte new = unknown;

        if (op == 0) {
            int max = g_test_rand_int_range(0, 20);

            extent_set_limit(set, max, start, last);
            limit_bytes(bytes, max, start, last);
        } else if (op == 1) {
            random_expect(set, bytes, changes, start, last);
        } else if (op == 2) {
            random_change(set, bytes,
                          &changes[g_test_rand_int_range(0, NB_CHANGES)],
                          start, last);
        } else {
            if (op < 5) {
                uint64_t nb = known_extents(bytes, start, last);

                g_assert_cmpuint(extent_set_clear(set, start, last), ==, nb);
            } else {
                new.flags = g_test_rand_int_range(0, 3);
                new.owner = op == 5 ? &owners[g_test_rand_int_range(0, 2)] :
                                      NULL;
                add(set, start, last, new.flags, new.owner);
            }
            for (int i = start; i <= last; i++) {
                bytes[i] = new;
            }
        }
        check_all(set, bytes);
    }
    for (int i = 0; i < NB_CHANGES; i++) {
        if (changes[i].active) {
            extent_set_end_change(&changes[i].change);
        }
    }
    extent_set_free(set);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/extent-set/empty", test_empty);
    g_test_add_func("/extent-set/replace", test_replace);
    g_test_add_func("/extent-set/merge", test_merge);
    g_test_add_func("/extent-set/limit", test_limit);
    g_test_add_func("/extent-set/expect", test_expect);
    g_test_add_func("/extent-set/change", test_change);
    g_test_add_func("/extent-set/random", test_random);
    return g_test_run();
}
