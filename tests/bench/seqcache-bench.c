/*
 * SeqCache micro-benchmark
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Prints what writes, reads and look-ups cost with few and with many cached
 * clusters, beside a plain memcpy() of the same bytes, in ns: as a table, or
 * with --json for scripts/bench.
 */

#include "qemu/osdep.h"
#include <math.h>
#include <time.h>
#include "qemu/seqcache.h"

#define KIB 1024
#define MIB (1024 * KIB)
#define ROUNDS 5
#define LOOKUPS 200000
#define WRITE_BYTES (32 * MIB)
#define CLUSTER (4 * KIB)

static const unsigned sizes[] = { 10, 1000, 100000 };

/* Keeps the compiler from leaving work out */
static volatile int64_t sink;

/* Processor time, so that other load on the machine does not count */
static double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Write sequentially; what is too much is handed out as an engine does it */
static double write_ns(SeqCache *s, int64_t *offset, int64_t bytes,
                       unsigned clusters, const uint8_t *buf)
{
    SeqCacheLimits limits = {
        .align = CLUSTER,
        .max_bytes = MIN(MIB, (int64_t)clusters / 2 * CLUSTER),
        .max_iov = 1024,
    };
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);
    int64_t count = WRITE_BYTES / bytes;
    double start = now_ns();
    int64_t i;

    for (i = 0; i < count; i++) {
        seqcache_write(s, *offset, bytes, &qiov, 0);
        *offset += bytes;
        while (seqcache_nb_clusters(s) > clusters) {
            seqcache_complete(s, seqcache_get_next_flush(s, &limits, false),
                              true);
        }
    }
    return (now_ns() - start) / count;
}

static double memcpy_ns(int64_t bytes, const uint8_t *buf)
{
    g_autofree uint8_t *dst = g_malloc0(MIB);
    int64_t count = WRITE_BYTES / bytes;
    double start = now_ns();
    int64_t i;

    for (i = 0; i < count; i++) {
        memcpy(dst + i * bytes % MIB, buf, bytes);
        sink = dst[i * bytes % MIB];
    }
    return (now_ns() - start) / count;
}

typedef enum Lookup {
    HIT,
    MISS,
    READ,
    MEMCPY,
} Lookup;

typedef struct LookupRow {
    const char *name;
    Lookup kind;
    bool random;
} LookupRow;

static const LookupRow lookup_rows[] = {
    { "hit", HIT, false },
    { "hit-random", HIT, true },
    { "miss-random", MISS, true },
    { "read-4k", READ, false },
    { "read-4k-random", READ, true },
};

/* @flat holds the same data as @s */
static double lookup_ns(const SeqCache *s, const uint8_t *flat, Lookup kind,
                        bool in_random_order, unsigned clusters)
{
    static uint8_t buf[CLUSTER];
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, CLUSTER);
    double start = now_ns();
    uint32_t random = 1;
    unsigned index = 0;
    int64_t found = 0;
    int i;

    for (i = 0; i < LOOKUPS; i++) {
        int64_t offset;

        if (in_random_order) {
            random = random * 1664525 + 1013904223;
            index = ((uint64_t)random * clusters) >> 32;
        } else {
            index = index + 1 < clusters ? index + 1 : 0;
        }
        offset = (int64_t)index * CLUSTER;

        switch (kind) {
        case MISS:
            offset += (int64_t)clusters * CLUSTER;
            /* fall through */
        case HIT:
            found += seqcache_gap(s, offset, 1);
            break;
        case READ:
            found += seqcache_read(s, offset, CLUSTER, &qiov, 0);
            break;
        case MEMCPY:
            memcpy(buf, flat + offset, CLUSTER);
            found += buf[i % CLUSTER];
            break;
        }
    }
    sink = found;
    return (now_ns() - start) / LOOKUPS;
}

/* One result, of as many as there are in @sizes; @memcpy_ns is 0 for none */
static void print_row(bool json, bool first, const char *name,
                      double copy, const double *ns)
{
    size_t i;

    if (json) {
        printf("%s\n \"%s\": {\"memcpy\": %.2f", first ? "{" : ",", name, copy);
        for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
            printf(", \"%u\": %.2f", sizes[i], ns[i]);
        }
        printf("}");
        return;
    }
    printf("%-16s", name);
    if (copy) {
        printf(" %9.1f", copy);
    } else {
        printf(" %9s", "");
    }
    for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
        printf(" %9.1f", ns[i]);
    }
    printf("\n");
}

static SeqCache *cache_new(unsigned clusters, const uint8_t *flat)
{
    int64_t bytes = (int64_t)clusters * CLUSTER;
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, flat, bytes);
    SeqCache *s = seqcache_new(&(SeqCacheOptions) {
        .cluster_size = CLUSTER,
        .max_unfinished = 1,
    });

    seqcache_write(s, 0, bytes, &qiov, 0);
    return s;
}

static void bench_writes(bool json, const uint8_t *flat)
{
    static const int64_t bytes[] = { 512, 4 * KIB, 64 * KIB };
    static const char *const names[] = { "write-512", "write-4k", "write-64k" };
    size_t i, k;
    int round;

    for (i = 0; i < G_N_ELEMENTS(bytes); i++) {
        double ns[G_N_ELEMENTS(sizes)];
        double copy = INFINITY;

        for (k = 0; k < G_N_ELEMENTS(sizes); k++) {
            SeqCache *s = cache_new(sizes[k], flat);
            int64_t offset = (int64_t)sizes[k] * CLUSTER;

            ns[k] = INFINITY;
            for (round = 0; round < ROUNDS; round++) {
                copy = MIN(copy, memcpy_ns(bytes[i], flat));
                ns[k] = MIN(ns[k], write_ns(s, &offset, bytes[i], sizes[k],
                                            flat));
            }
            seqcache_free(s);
        }
        print_row(json, i == 0, names[i], copy, ns);
    }
}

static void bench_lookups(bool json, const uint8_t *flat)
{
    size_t i, k;
    int round;

    for (i = 0; i < G_N_ELEMENTS(lookup_rows); i++) {
        const LookupRow *row = &lookup_rows[i];
        double ns[G_N_ELEMENTS(sizes)];
        double copy = row->kind == READ ? INFINITY : 0;

        for (k = 0; k < G_N_ELEMENTS(sizes); k++) {
            SeqCache *s = cache_new(sizes[k], flat);

            ns[k] = INFINITY;
            for (round = 0; round < ROUNDS; round++) {
                ns[k] = MIN(ns[k], lookup_ns(s, flat, row->kind, row->random,
                                             sizes[k]));
                if (copy && k == 0) {
                    copy = MIN(copy, lookup_ns(s, flat, MEMCPY, row->random,
                                               sizes[k]));
                }
            }
            seqcache_free(s);
        }
        print_row(json, false, row->name, copy, ns);
    }
}

int main(int argc, char **argv)
{
    bool json = argc == 2 && !strcmp(argv[1], "--json");
    size_t size = (size_t)sizes[G_N_ELEMENTS(sizes) - 1] * CLUSTER;
    g_autofree uint8_t *flat = g_malloc(size);
    size_t i;

    if (argc > 1 && !json) {
        fprintf(stderr, "usage: %s [--json]\n", argv[0]);
        return 1;
    }
    for (i = 0; i < size; i++) {
        flat[i] = i;
    }
    if (!json) {
        printf("ns each          %9s", "memcpy");
        for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
            printf(" %9u", sizes[i]);
        }
        printf(" clusters cached\n");
    }
    bench_writes(json, flat);
    bench_lookups(json, flat);
    if (json) {
        printf("\n}\n");
    }
    return 0;
}
