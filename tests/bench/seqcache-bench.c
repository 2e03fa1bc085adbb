/*
 * SeqCache micro-benchmark
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Prints what writes and look-ups cost, beside a plain memcpy() of the same
 * bytes, and how the cost of look-ups grows with the number of clusters.
 */

#include "qemu/osdep.h"
#include <math.h>
#include <time.h>
#include "qemu/seqcache.h"

#define KIB 1024
#define MIB (1024 * KIB)
#define LOOKUPS 200000
#define ROUNDS 20
#define LOOKUP_CLUSTER (4 * KIB)

static const SeqCacheLimits limits = {
    .align = 4 * KIB, .max_bytes = MIB, .max_iov = 1024,
};

/* Keeps the compiler from leaving work out */
static volatile int64_t sink;

/* Processor time, so that other load on the machine does not count */
static double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static SeqCache *cache_new(int64_t cluster_size)
{
    return seqcache_new(&(SeqCacheOptions) {
        .cluster_size = cluster_size,
        .max_unfinished = 1,
    });
}

/* A sequential stream of writes, handed out and completed as an engine does */
static double write_ns(int64_t cluster_size, int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc0(bytes);
    SeqCache *s = cache_new(cluster_size);
    int64_t count = 64 * MIB / bytes;
    double start = 0;
    int64_t i;

    /* The first part only lets the cache get its memory */
    for (i = -count / 8; i < count; i++) {
        int64_t offset = (i + count / 8) * bytes;

        if (i == 0) {
            start = now_ns();
        }
        seqcache_write(s, offset, bytes, buf);
        if (seqcache_next_flush_bytes(s, &limits) + cluster_size >
            limits.max_bytes) {
            seqcache_complete(s, seqcache_get_next_flush(s, &limits, false),
                              true);
        }
    }
    seqcache_free(s);
    return (now_ns() - start) / count;
}

static double memcpy_ns(int64_t bytes)
{
    g_autofree uint8_t *buf = g_malloc0(bytes);
    g_autofree uint8_t *dst = g_malloc0(2 * MIB);
    int64_t count = 64 * MIB / bytes;
    double start = now_ns();
    int64_t i;

    for (i = 0; i < count; i++) {
        memcpy(dst + i * bytes % (2 * MIB), buf, bytes);
        sink = dst[i * bytes % (2 * MIB)];
    }
    return (now_ns() - start) / count;
}

typedef enum Lookup {
    HIT_IN_ORDER,
    HIT_RANDOM,
    MISS_RANDOM,
    READ_IN_ORDER,
    READ_RANDOM,
    MEMCPY_IN_ORDER,
    MEMCPY_RANDOM,
    LOOKUP__MAX,
} Lookup;

static const char *const lookup_names[LOOKUP__MAX] = {
    [HIT_IN_ORDER] = "look up, hit, in order",
    [HIT_RANDOM] = "look up, hit, random",
    [MISS_RANDOM] = "look up, miss, random",
    [READ_IN_ORDER] = "read 4 KiB, in order",
    [READ_RANDOM] = "read 4 KiB, random",
    [MEMCPY_IN_ORDER] = "memcpy 4 KiB, in order",
    [MEMCPY_RANDOM] = "memcpy 4 KiB, random",
};

/* @flat holds the same data as @s */
static double lookup_ns(const SeqCache *s, const uint8_t *flat, Lookup kind,
                        unsigned clusters)
{
    static uint8_t buf[LOOKUP_CLUSTER];
    bool in_order = kind == HIT_IN_ORDER || kind == READ_IN_ORDER ||
                    kind == MEMCPY_IN_ORDER;
    double start = now_ns();
    uint32_t random = 1;
    unsigned index = 0;
    int64_t found = 0;
    int i;

    for (i = 0; i < LOOKUPS; i++) {
        int64_t offset;

        if (in_order) {
            index = index + 1 < clusters ? index + 1 : 0;
        } else {
            random = random * 1664525 + 1013904223;
            index = ((uint64_t)random * clusters) >> 32;
        }
        offset = (int64_t)index * LOOKUP_CLUSTER;

        switch (kind) {
        case MISS_RANDOM:
            offset += (int64_t)clusters * LOOKUP_CLUSTER;
            /* fall through */
        case HIT_IN_ORDER:
        case HIT_RANDOM:
            found += seqcache_gap(s, offset, 1);
            break;
        case READ_IN_ORDER:
        case READ_RANDOM:
            found += seqcache_read(s, offset, LOOKUP_CLUSTER, buf);
            break;
        default:
            memcpy(buf, flat + offset, LOOKUP_CLUSTER);
            found += buf[i % LOOKUP_CLUSTER];
            break;
        }
    }
    sink = found;
    return (now_ns() - start) / LOOKUPS;
}

static void bench_writes(void)
{
    static const int64_t sizes[] = { 512, 4 * KIB, 64 * KIB };
    size_t i;
    int round;

    printf("sequential writes, ns each  %12s %12s %12s\n", "memcpy",
           "4 KiB cl.", "64 KiB cl.");
    for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
        double ns[3] = { INFINITY, INFINITY, INFINITY };

        for (round = 0; round < ROUNDS; round++) {
            ns[0] = MIN(ns[0], memcpy_ns(sizes[i]));
            ns[1] = MIN(ns[1], write_ns(4 * KIB, sizes[i]));
            ns[2] = MIN(ns[2], write_ns(64 * KIB, sizes[i]));
        }
        printf("  %5" PRId64 " bytes               %12.1f %12.1f %12.1f\n",
               sizes[i], ns[0], ns[1], ns[2]);
    }
}

static void bench_lookups(void)
{
    static const unsigned clusters[] = { 10, 1000, 100000 };
    double ns[LOOKUP__MAX][G_N_ELEMENTS(clusters)];
    size_t i, k, kind;
    int round;

    for (i = 0; i < G_N_ELEMENTS(clusters); i++) {
        size_t size = (size_t)clusters[i] * LOOKUP_CLUSTER;
        g_autofree uint8_t *flat = g_malloc(size);
        SeqCache *s = cache_new(LOOKUP_CLUSTER);

        for (k = 0; k < size; k++) {
            flat[k] = k;
        }
        seqcache_write(s, 0, size, flat);
        for (kind = 0; kind < LOOKUP__MAX; kind++) {
            ns[kind][i] = INFINITY;
            for (round = 0; round < ROUNDS; round++) {
                ns[kind][i] = MIN(ns[kind][i], lookup_ns(s, flat, kind,
                                                         clusters[i]));
            }
        }
        seqcache_free(s);
    }

    printf("\nlook-ups, ns each, clusters:");
    for (i = 0; i < G_N_ELEMENTS(clusters); i++) {
        printf(" %9u", clusters[i]);
    }
    printf("     ratio\n");
    for (kind = 0; kind < LOOKUP__MAX; kind++) {
        printf("  %-26s", lookup_names[kind]);
        for (i = 0; i < G_N_ELEMENTS(clusters); i++) {
            printf(" %9.1f", ns[kind][i]);
        }
        printf(" %9.2f\n",
               ns[kind][G_N_ELEMENTS(clusters) - 1] / ns[kind][0]);
    }
}

int main(void)
{
    bench_writes();
    bench_lookups();
    return 0;
}
