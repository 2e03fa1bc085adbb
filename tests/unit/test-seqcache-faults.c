/*
 * A disk that fails at each request of a fixed script, below each of our users
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A script of requests is run with each request that the disk gets made to fail
 * in turn: it alone, or it and all that come after it; with several errors; and
 * with the change that fails done in whole, up to some block, or not at all.
 * Each time
 * - nothing crashes, and nothing takes longer than RUN_SECONDS;
 * - what fails, fails with the disk's error, and fails only if the disk did;
 * - what was accepted reads back, also while the disk refuses all changes;
 * - a flush that succeeds is the truth about the disk;
 * - when the disk works again, what has failed can be repeated as it was, a
 *   flush succeeds, and a power cut after it would lose nothing;
 * - if the disk never works again, nor does anything of what it says has
 *   failed, a qcow2 image on it is not corrupt.
 *
 * Each request fails in one of these ways, by turns; where there are too many,
 * every fourth.  With -m slow each fails in all of them; --seed decides about
 * partial changes then.
 * TEST_FAULTS_ONLY=N lets only request N fail, and says what that leads to.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "block/block-extents.h"
#include "block/snapshot.h"
#include "memory-disk.h"

#define RUN_SECONDS 60

#define K KiB

/* What blk_check() reads at a time */
#define PIECE (8 * KiB)

typedef enum Op {
    OP_WRITE, OP_FUA, OP_COMPRESSED, OP_COMPRESSED_FUA, OP_ZERO, OP_UNMAP,
    OP_DISCARD, OP_READ, OP_STATUS, OP_FLUSH, OP_GROW, OP_SNAPSHOT,
} Op;

/* All parts of a step are started before the first one is waited for */
typedef struct Step {
    Op op;
    int64_t offset;
    int64_t bytes;      /* of a part */
    unsigned parts;     /* which follow each other; 0: 1 */
} Step;

typedef enum Driver { SEQCACHE, QCOW2, CACHEEXTENTS } Driver;

typedef struct Stack {
    const char *name;
    Driver driver;
    int64_t cluster_size;
    int64_t cache_size;
    uint32_t align;
    int64_t len;        /* of the disk, or virtual size of the image */
    bool no_flags;
    bool small_l2;      /* the cache for L2 tables has only two slices */
    bool extents;       /* the disk knows queries for many extents */
    bool incompressible; /* two of three clusters are */
    unsigned every;     /* one request of so many fails in "make check"; 0: 1 */
    const Step *script;
} Stack;

typedef struct Run {
    const Stack *stack;
    BlockBackend *blk;
    BlockDriverState *bs;
    BlockDriverState *disk_bs;
    Disk *disk;
    uint8_t *shadow;    /* what it must read as */
    bool *unknown;      /* a change of this byte has failed */
    int64_t len;        /* of @shadow that can be read */
    DiskFault fault;
    GArray *failed;     /* of Step, in one part each */
    unsigned gen;
} Run;

static unsigned seed;
static bool every_way;
static unsigned only;
static unsigned nb_runs;
static char current[200];

/* ---- Disk ---- */

/* As disk_co_block_status(), for all of the range */
static int coroutine_fn
disk_co_block_extents(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      unsigned max, GArray *extents)
{
    Disk *d = bs->opaque;
    int64_t block = MAX(d->config.align, BDRV_SECTOR_SIZE);
    int ret;

    QEMU_LOCK_GUARD(&d->lock);

    disk_delay_locked(d);
    ret = disk_result_locked(d, DISK_STATUS);
    for (unsigned i = 0; ret == 0 && i < max && bytes; i++) {
        BdrvBlockExtent e = { .flags = disk_flags_locked(d, offset) };

        do {
            e.bytes += MIN(block, bytes - e.bytes);
        } while (e.bytes < bytes &&
                 disk_flags_locked(d, offset + e.bytes) == e.flags);
        g_array_append_val(extents, e);
        offset += e.bytes;
        bytes -= e.bytes;
    }
    return ret;
}

static BlockDriver bdrv_disk_extents;

/* ---- Runs ---- */

static BlockDriverState *new_disk(const Stack *stack, const char *name,
                                  int64_t len)
{
    return disk_new(stack->extents ? &bdrv_disk_extents : &bdrv_disk, name,
                    &(DiskConfig) {
        .len = len, .align = stack->align, .no_flags = stack->no_flags,
    });
}

/* An empty image; it is made once for each stack */
static void fill_with_image(const Stack *stack, BlockDriverState *disk_bs)
{
    static const Stack *made;
    static char *image;
    static size_t size;
    Disk *d = disk_bs->opaque;

    if (made != stack) {
        g_autofree char *path = g_strdup_printf("%s/seqcache-faults-%d",
                                                g_get_tmp_dir(), getpid());
        g_autofree char *options = g_strdup_printf("cluster_size=%" PRId64,
                                                   stack->cluster_size);

        bdrv_img_create(path, "qcow2", NULL, NULL, options, stack->len, 0,
                        true, &error_abort);
        g_free(image);
        g_assert(g_file_get_contents(path, &image, &size, NULL));
        unlink(path);
        made = stack;
    }
    d->len = ROUND_UP(size, stack->align);
    g_assert(d->len <= DISK_MAX_SIZE);
    memcpy(d->data, image, size);
    memcpy(d->stable, image, size);
    memset(d->mapped, true, d->len / BDRV_SECTOR_SIZE);
}

/* @check: without a cache, in order to be checked */
static BlockDriverState *open_node(const Stack *stack, const char *name,
                                   const char *disk, bool check)
{
    static const char *const drivers[] = {
        [SEQCACHE] = "seqcache", [QCOW2] = "qcow2",
        [CACHEEXTENTS] = "cacheextents",
    };
    QDict *opts = qdict_new();

    qdict_put_str(opts, "driver", drivers[stack->driver]);
    qdict_put_str(opts, "node-name", name);
    qdict_put_str(opts, "file", disk);
    if (stack->driver == SEQCACHE) {
        qdict_put_int(opts, "cluster-size", stack->cluster_size);
        qdict_put_int(opts, "cache-size", stack->cache_size);
    } else if (stack->driver == QCOW2) {
        qdict_put_int(opts, "compressed-cache-size",
                      check ? 0 : stack->cache_size);
        qdict_put_int(opts, "l2-cache-entry-size", 512);
        qdict_put_int(opts, "l2-cache-size", stack->small_l2 ? 1 * K : 64 * K);
    }
    return bdrv_open(NULL, NULL, opts, BDRV_O_RDWR | BDRV_O_UNMAP |
                     (check ? BDRV_O_CHECK : 0), &error_abort);
}

static Run *run_new(const Stack *stack, DiskFault fault)
{
    Run *r = g_new0(Run, 1);

    r->stack = stack;
    r->fault = fault;
    r->disk_bs = new_disk(stack, "disk", stack->len);
    r->disk = r->disk_bs->opaque;
    r->disk->max_hops = 1;
    g_rand_set_seed(r->disk->rand, fault.first + 1000 * fault.error +
                    1000000 * seed);
    if (stack->driver == QCOW2) {
        fill_with_image(stack, r->disk_bs);
    }
    r->bs = open_node(stack, "node", "disk", false);
    r->blk = user_new(r->bs);
    r->len = stack->len;
    r->shadow = g_malloc0(DISK_MAX_SIZE);
    r->unknown = g_new0(bool, DISK_MAX_SIZE);
    r->failed = g_array_new(false, false, sizeof(Step));
    disk_set_fault(r->disk, fault);
    nb_runs++;
    return r;
}

/* The disk stays */
static void run_close(Run *r)
{
    blk_unref(r->blk);
    bdrv_unref(r->bs);
    r->blk = NULL;
}

static void run_free(Run *r)
{
    bdrv_unref(r->disk_bs);
    g_array_free(r->failed, true);
    g_free(r->unknown);
    g_free(r->shadow);
    g_free(r);
}

/* Something has gone wrong: 0 is right, and the disk's error if it had any */
static void assert_ret(Run *r, int ret, const Step *s)
{
    if (ret != 0 && !(ret == -r->fault.error && r->disk->nb_faults)) {
        g_error("%s: operation %d at %" PRId64 " returned %d", current, s->op,
                s->offset, ret);
    }
}

/* All that is known must read right, unless the disk cannot be read */
static void check_reads(Run *r, BlockBackend *blk, bool can_fail)
{
    g_autofree uint8_t *buf = g_malloc(PIECE);

    for (int64_t pos = 0; pos < r->len; pos += PIECE) {
        int64_t bytes = MIN(PIECE, r->len - pos);
        int ret = blk_pread(blk, pos, bytes, buf, 0);

        if (ret != 0) {
            g_assert(can_fail);
            assert_ret(r, ret, &(Step) { OP_READ, pos });
            continue;
        }
        for (int64_t i = 0; i < bytes; i++) {
            if (r->unknown[pos + i]) {
                buf[i] = r->shadow[pos + i];
            }
        }
        assert_bytes(buf, r->shadow + pos, pos, bytes, current);
    }
}

/*
 * What cacheextents says must be true of the disk, and what seqcache says must
 * fit with what is read
 */
static bool status_is_right(Run *r, int64_t offset, int flags)
{
    Disk *d = r->disk;

    if (r->stack->driver == SEQCACHE) {
        return !(flags & BDRV_BLOCK_ZERO) || r->unknown[offset] ||
               buffer_is_zero(r->shadow + offset, BDRV_SECTOR_SIZE);
    }
    QEMU_LOCK_GUARD(&d->lock);
    return flags == disk_flags_locked(d, offset);
}

/* Returns: 0, or a negative errno */
static int check_status(Run *r, int64_t offset, int64_t bytes)
{
    int64_t end = offset + bytes;
    int ret;

    while (offset < end) {
        int64_t n, map;
        BlockDriverState *file;

        bdrv_graph_rdlock_main_loop();
        ret = bdrv_block_status(r->bs, offset, end - offset, &n, &map, &file);
        bdrv_graph_rdunlock_main_loop();
        if (ret < 0 || !n) {
            /* Failed, or the end: it could not be made longer */
            return ret < 0 ? ret : 0;
        }
        ret &= BDRV_BLOCK_DATA | BDRV_BLOCK_ZERO | BDRV_BLOCK_OFFSET_VALID;
        for (int64_t i = 0; i < n; i += BDRV_SECTOR_SIZE) {
            if (!status_is_right(r, offset + i, ret)) {
                g_error("%s: status %d of byte %" PRId64, current, ret,
                        offset + i);
            }
        }
        offset += n;
    }
    return 0;
}

/* Whether a qcow2 image is right; @r: and whether it has what was accepted */
static void check_image(const Stack *stack, const uint8_t *data, Run *r)
{
    BlockDriverState *disk_bs = new_disk(stack, "image-disk", DISK_MAX_SIZE);
    BdrvCheckResult result = { 0 };
    BlockDriverState *bs;
    BlockBackend *blk;
    Disk *d = disk_bs->opaque;

    memcpy(d->data, data, DISK_MAX_SIZE);
    bs = open_node(stack, "image", "image-disk", true);
    bdrv_graph_rdlock_main_loop();
    g_assert_cmpint(bdrv_check(bs, &result, 0), ==, 0);
    bdrv_graph_rdunlock_main_loop();
    if (result.corruptions || result.check_errors) {
        g_error("%s: the image is corrupt", current);
    }
    if (r) {
        blk = user_new(bs);
        check_reads(r, blk, false);
        blk_unref(blk);
    }
    bdrv_unref(bs);
    bdrv_unref(disk_bs);
}

/* After a flush: a power cut must not lose anything */
static void check_stable(Run *r)
{
    Disk *d = r->disk;

    if (r->stack->driver == QCOW2) {
        check_image(r->stack, d->stable, r);
        return;
    }
    for (int64_t i = 0; i < r->len; i++) {
        if (!r->unknown[i] && d->stable[i] != r->shadow[i]) {
            g_error("%s: byte %" PRId64 " was not flushed", current, i);
        }
    }
}

/* ---- Steps ---- */

typedef struct Part {
    Run *r;
    Step step;
    uint8_t *buf;
    int ret; /* -EINPROGRESS until it is done */
} Part;

static int coroutine_fn part_co_do(Part *p)
{
    const Step *s = &p->step;
    BlockBackend *blk = p->r->blk;

    switch (s->op) {
    case OP_WRITE:
        return blk_co_pwrite(blk, s->offset, s->bytes, p->buf, 0);
    case OP_FUA:
        return blk_co_pwrite(blk, s->offset, s->bytes, p->buf, BDRV_REQ_FUA);
    case OP_COMPRESSED:
        return blk_co_pwrite(blk, s->offset, s->bytes, p->buf,
                             BDRV_REQ_WRITE_COMPRESSED);
    case OP_COMPRESSED_FUA:
        return blk_co_pwrite(blk, s->offset, s->bytes, p->buf,
                             BDRV_REQ_WRITE_COMPRESSED | BDRV_REQ_FUA);
    case OP_ZERO:
        return blk_co_pwrite_zeroes(blk, s->offset, s->bytes, 0);
    case OP_UNMAP:
        return blk_co_pwrite_zeroes(blk, s->offset, s->bytes,
                                    BDRV_REQ_MAY_UNMAP);
    case OP_DISCARD:
        return compat_blk_co_pdiscard(blk, s->offset, s->bytes);
    case OP_READ:
        return blk_co_pread(blk, s->offset, s->bytes, p->buf, 0);
    case OP_FLUSH:
        return blk_co_flush(blk);
    case OP_GROW:
        return blk_co_truncate(blk, s->offset, false, PREALLOC_MODE_OFF, 0,
                               NULL);
    default:
        g_assert_not_reached();
    }
}

static void coroutine_fn part_entry(void *opaque)
{
    Part *p = opaque;

    p->ret = part_co_do(p);
}

/* Half of each sector compresses well, unless the cluster is not to compress */
static void part_fill(Part *p)
{
    GRand *rand = g_rand_new_with_seed(p->step.offset + 1000 * p->r->gen++);
    const Stack *stack = p->r->stack;

    for (int64_t i = 0; i < p->step.bytes; i++) {
        bool random = i % 512 < 256 ||
            (stack->incompressible &&
             (p->step.offset + i) / stack->cluster_size % 3);

        p->buf[i] = random ? g_rand_int(rand) : p->r->gen | 1;
    }
    g_rand_free(rand);
}

static bool op_writes(Op op)
{
    return op <= OP_COMPRESSED_FUA;
}

/* qcow2 accepts what can be compressed in whole or not at all */
static bool op_can_be_partial(Run *r, Op op)
{
    return op <= OP_DISCARD &&
           !(op == OP_COMPRESSED && r->stack->driver == QCOW2 &&
             !r->stack->incompressible);
}

/* Remember what is to be repeated; a cluster is compressed only once */
static void note_failed(Run *r, const Step *step)
{
    for (guint i = 0; step->op == OP_COMPRESSED && i < r->failed->len; i++) {
        Step *s = &g_array_index(r->failed, Step, i);

        if (s->op == OP_COMPRESSED && s->offset == step->offset) {
            g_array_remove_index(r->failed, i);
            break;
        }
    }
    g_array_append_val(r->failed, *step);
}

static void part_done(Part *p)
{
    const Step *s = &p->step;
    Run *r = p->r;

    if (p->ret < 0) {
        assert_ret(r, p->ret, s);
        if (only) {
            g_test_message("%s: operation %d at %" PRId64 " returned %d",
                           current, s->op, s->offset, p->ret);
        }
        note_failed(r, s);
        if (op_can_be_partial(r, s->op)) {
            memset(r->unknown + s->offset, true, s->bytes);
        }
        return;
    }
    if (s->op <= OP_DISCARD) {
        if (op_writes(s->op)) {
            memcpy(r->shadow + s->offset, p->buf, s->bytes);
        } else {
            memset(r->shadow + s->offset, 0, s->bytes);
        }
        memset(r->unknown + s->offset, false, s->bytes);
    } else if (s->op == OP_GROW) {
        r->len = s->offset;
    }
}

/*
 * There is no step that deletes one: when that fails in the middle, also
 * without a cache, the snapshot is gone and the image needs a repair.
 */
static int create_snapshot(Run *r)
{
    QEMUSnapshotInfo sn = { .name = "snapshot" };

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return bdrv_snapshot_create(r->bs, &sn);
}

/* Do a step; what fails is appended to r->failed */
static void run_step(Run *r, const Step *step)
{
    unsigned nb = MAX(step->parts, 1);
    g_autofree Part *parts = g_new0(Part, nb);

    for (unsigned i = 0; i < nb; i++) {
        Part *p = &parts[i];

        *p = (Part) { .r = r, .step = *step, .ret = -EINPROGRESS };
        p->step.parts = 0;
        p->step.offset += i * step->bytes;
        p->buf = g_malloc0(step->bytes + 1);
        part_fill(p);
        if (step->op == OP_STATUS) {
            p->ret = check_status(r, step->offset, step->bytes);
        } else if (step->op == OP_SNAPSHOT) {
            p->ret = create_snapshot(r);
        } else {
            aio_co_enter(qemu_get_aio_context(),
                         qemu_coroutine_create(part_entry, p));
        }
    }
    for (unsigned i = 0; i < nb; i++) {
        AIO_WAIT_WHILE_UNLOCKED(NULL, parts[i].ret == -EINPROGRESS);
        part_done(&parts[i]);
        g_free(parts[i].buf);
    }
}

static void run_check(Run *r)
{
    /* Or a table is not cached, and no dirty one can make room for it */
    bool can_fail = r->fault.lasting && ((r->fault.kinds & DISK_READ) ||
                                         r->stack->small_l2);

    check_reads(r, r->blk, can_fail);
    if (r->stack->driver == CACHEEXTENTS) {
        int ret = check_status(r, 0, r->len);

        g_assert(ret == 0 || (r->fault.lasting &&
                              (r->fault.kinds & DISK_STATUS)));
    }
}

static bool run_flush(Run *r)
{
    Step flush = { OP_FLUSH };
    guint nb_failed = r->failed->len;

    run_step(r, &flush);
    if (r->failed->len > nb_failed) {
        g_array_set_size(r->failed, nb_failed);
        return false;
    }
    check_stable(r);
    return true;
}

/* The disk works again: what has failed can be repeated */
static void run_repeat(Run *r)
{
    g_autoptr(GArray) failed = r->failed;

    r->failed = g_array_new(false, false, sizeof(Step));
    for (guint i = 0; i < failed->len; i++) {
        run_step(r, &g_array_index(failed, Step, i));
    }
    if (r->failed->len) {
        g_error("%s: a request cannot be repeated", current);
    }
}

static void run_repair(Run *r)
{
    disk_set_fault(r->disk, (DiskFault) { 0 });
    r->fault = (DiskFault) { 0 };
    run_repeat(r);
    run_check(r);
    g_assert(run_flush(r));
}

/*
 * Run the script with a fault.
 *
 * Returns: whether the fault came; else the script has no more requests
 */
static bool run_script(const Stack *stack, DiskFault fault)
{
    bool repair = !fault.dead;
    Run *r = run_new(stack, fault);
    unsigned nb_faults;
    bool checked = false;
    bool failed;

    alarm(RUN_SECONDS);
    for (const Step *s = stack->script; s->op || s->bytes; s++) {
        guint nb_failed = r->failed->len;

        /*
         * Until the table of snapshots is written, the refcounts seem wrong,
         * also without a cache
         */
        if (!repair && s->op == OP_SNAPSHOT) {
            continue;
        }
        snprintf(current, sizeof(current),
                 "%s: %s %u of kinds 0x%x: error %d%s, seed %u, step %zu",
                 stack->name, fault.lasting ? "from" : "only", fault.first,
                 fault.kinds, fault.error, fault.whole ? ", whole" : "",
                 seed, s - stack->script);
        run_step(r, s);
        /* When the fault has come, when it is noticed, and at each flush */
        failed = r->failed->len > nb_failed;
        if (r->disk->nb_faults &&
            (!checked || (failed && !nb_failed) || s->op == OP_FLUSH)) {
            run_check(r);
            checked = true;
            if (s->op == OP_FLUSH && !failed && stack->driver != QCOW2) {
                check_stable(r);
            }
        }
        if (!fault.lasting) {
            run_repeat(r);
        }
    }
    nb_faults = r->disk->nb_faults;
    if (nb_faults) {
        /* Nothing is given up after some attempts */
        for (int i = 0; i < 3 && !run_flush(r); i++) {
            run_check(r);
        }
    }
    if (repair) {
        run_repair(r);
    }
    run_close(r);
    if (stack->driver == QCOW2) {
        check_image(stack, r->disk->data, repair ? r : NULL);
        check_image(stack, r->disk->stable, repair ? r : NULL);
    } else if (repair) {
        check_stable(r);
    }
    run_free(r);
    alarm(0);
    return nb_faults;
}

/*
 * Let request number @first fail, in all ways or in one of them.
 *
 * Returns: whether there is such a request
 */
static bool test_request(const Stack *stack, unsigned kinds, unsigned first)
{
    static const int errors[] = { EIO, ENOSPC, EAGAIN };
    const unsigned ways = 3 * ARRAY_SIZE(errors);
    bool more = false;

    for (unsigned i = 0; i < ways; i++) {
        if (every_way || first % ways == i) {
            more |= run_script(stack, (DiskFault) {
                .kinds = kinds, .first = first, .lasting = i % 3,
                .dead = i % 3 == 2, .error = errors[i / 3],
                .whole = (first + seed) / ways % 2,
            });
        }
    }
    return more;
}

static void test_stack(const void *opaque)
{
    static const unsigned kinds[] = { DISK_ALL, DISK_CHANGES };
    const Stack *stack = opaque;
    const unsigned every = every_way ? 1 : stack->every ?: 1;
    unsigned nb_requests[ARRAY_SIZE(kinds)];

    seed = every_way ? g_test_rand_int() : 0;
    nb_runs = 0;
    for (int k = 0; k < ARRAY_SIZE(kinds); k++) {
        unsigned first = only ?: 1;

        while (test_request(stack, kinds[k], first) && !only) {
            first += every;
        }
        nb_requests[k] = first - 1;
    }
    g_test_message("at most %u requests, %u of them changes and flushes; "
                   "%u runs", nb_requests[0], nb_requests[1], nb_runs);
    g_assert(nb_requests[1] >= 10 || only);
}

/* ---- Stacks ---- */

/* What is in different quarters of a MiB has different slices of L2 tables */
static const Step qcow2_script[] = {
    { OP_COMPRESSED, 0, 4 * K }, { OP_COMPRESSED, 4 * K, 4 * K },
    { OP_COMPRESSED, 8 * K, 4 * K, 4 }, { OP_READ, 0, 24 * K },
    { OP_COMPRESSED, 32 * K, 32 * K }, { OP_FLUSH },
    { OP_WRITE, 10 * K, 1 * K }, { OP_WRITE, 300 * K, 8 * K },
    { OP_COMPRESSED, 540 * K, 4 * K, 3 }, { OP_READ, 540 * K, 12 * K },
    { OP_DISCARD, 16 * K, 8 * K }, { OP_COMPRESSED, 16 * K, 4 * K, 2 },
    { OP_ZERO, 36 * K, 4 * K }, { OP_UNMAP, 40 * K, 8 * K },
    { OP_COMPRESSED_FUA, 64 * K, 4 * K }, { OP_SNAPSHOT, 0, 1 },
    { OP_WRITE, 0, 4 * K }, { OP_DISCARD, 4 * K, 4 * K },
    { OP_COMPRESSED, 96 * K, 4 * K, 8 }, { OP_FUA, 49 * K, 2 * K },
    { OP_GROW, 640 * K, 0 }, { OP_COMPRESSED, 580 * K, 4 * K, 2 },
    { OP_FLUSH },
    { OP_COMPRESSED, 200 * K, 8 * K }, { OP_READ, 190 * K, 20 * K },
    { OP_COMPRESSED, 600 * K, 4 * K }, { OP_WRITE, 320 * K, 512 },
    { 0 }
};

static const Step seqcache_script[] = {
    { OP_WRITE, 100, 1000 }, { OP_WRITE, 1100, 5000 },
    { OP_WRITE, 65000, 3000 }, { OP_READ, 50000, 20000 },
    { OP_WRITE, 500, 1000 }, { OP_WRITE, 128 * K, 64 * K },
    { OP_WRITE, 131000, 200 }, { OP_FLUSH }, { OP_WRITE, 6100, 700 },
    { OP_READ, 4000, 4000 }, { OP_ZERO, 4 * K, 4 * K },
    { OP_UNMAP, 64 * K, 8 * K }, { OP_DISCARD, 128 * K, 8 * K },
    { OP_FUA, 10000, 300 }, { OP_WRITE, 10300, 7000, 8 },
    { OP_WRITE, 200000, 500 }, { OP_WRITE, 200500, 9500 }, { OP_FLUSH },
    { OP_WRITE, 210000, 20000 }, { OP_WRITE, 205000, 20000 },
    { OP_WRITE, 255000, 100 }, { OP_GROW, 300 * K, 0 },
    { OP_COMPRESSED, 64 * K, 4 * K }, { OP_WRITE, 262000, 1000, 4 },
    { OP_STATUS, 0, 300 * K }, { OP_WRITE, 300001, 4000 },
    { OP_READ, 195000, 80000 }, { OP_WRITE, 0, 200 }, { OP_FLUSH },
    { OP_FUA, 131100, 77 }, { OP_WRITE, 4 * K, 4 * K, 6 },
    { 0 }
};

static const Step cacheextents_script[] = {
    { OP_STATUS, 0, 256 * K }, { OP_WRITE, 16 * K, 8 * K },
    { OP_STATUS, 100 * K, 4 * K }, { OP_WRITE, 120 * K, 12 * K },
    { OP_STATUS, 0, 256 * K }, { OP_DISCARD, 16 * K, 4 * K },
    { OP_STATUS, 12 * K, 4 * K }, { OP_UNMAP, 120 * K, 4 * K },
    { OP_STATUS, 0, 256 * K }, { OP_ZERO, 64 * K, 4 * K }, { OP_FLUSH },
    { OP_STATUS, 60 * K, 20 * K }, { OP_READ, 0, 32 * K },
    { OP_GROW, 300 * K, 0 }, { OP_STATUS, 250 * K, 50 * K },
    { OP_WRITE, 290 * K, 4 * K, 2 }, { OP_FUA, 200 * K, 4 * K },
    { OP_STATUS, 0, 300 * K }, { OP_COMPRESSED, 8 * K, 4 * K },
    { OP_STATUS, 0, 20 * K },
    { 0 }
};

static const Stack stacks[] = {
    { "qcow2", QCOW2, 4 * K, 64 * K, 512, 560 * K,
      .script = qcow2_script },
    { "qcow2-two-clusters", QCOW2, 4 * K, 8 * K, 4 * K, 560 * K,
      .small_l2 = true, .script = qcow2_script },
    { "qcow2-incompressible", QCOW2, 4 * K, 64 * K, 512, 560 * K,
      .incompressible = true, .script = qcow2_script },
    { "qcow2-incompressible-two-clusters", QCOW2, 4 * K, 8 * K, 4 * K, 560 * K,
      .incompressible = true, .small_l2 = true, .script = qcow2_script },
    { "qcow2-no-cache", QCOW2, 4 * K, 0, 512, 560 * K,
      .script = qcow2_script },
    { "qcow2-512", QCOW2, 512, 8 * K, 512, 560 * K,
      .no_flags = true, .small_l2 = true,
      .every = 4, /* is prime to the number of ways, so all get their turn */
      .script = qcow2_script },
    { "seqcache", SEQCACHE, 64 * K, 1 * MiB, 512, 256 * K,
      .script = seqcache_script },
    { "seqcache-two-clusters", SEQCACHE, 4 * K, 8 * K, 4 * K, 256 * K,
      .script = seqcache_script },
    { "seqcache-no-fua", SEQCACHE, 16 * K, 64 * K, 4 * K, 256 * K,
      .no_flags = true, .script = seqcache_script },
    { "cacheextents", CACHEEXTENTS, .align = 512, .len = 256 * K,
      .extents = true, .script = cacheextents_script },
    { "cacheextents-one", CACHEEXTENTS, .align = 4 * K, .len = 256 * K,
      .no_flags = true, .script = cacheextents_script },
};

/* ---- Amend, with nothing that fails ---- */

static void on_amend(BlockDriverState *bs, int64_t offset, int64_t total,
                     void *opaque)
{
}

/*
 * An image of version 2 has zeroes where this one has a bit.  They come after
 * what is cached: of these clusters, the first one compresses, two do not.
 */
static void test_amend(void)
{
    const Stack *stack = stacks;
    QemuOpts *opts;
    Run *r;

    while (!stack->incompressible) {
        stack++;
    }
    r = run_new(stack, (DiskFault) { 0 });
    run_step(r, &(Step) { OP_COMPRESSED, 0, 4 * K, 3 });
    run_step(r, &(Step) { OP_ZERO, 4 * K, 8 * K });
    g_assert_cmpuint(r->failed->len, ==, 0);

    opts = qemu_opts_create(r->bs->drv->create_opts, NULL, 0, &error_abort);
    qemu_opt_set(opts, "compat", "0.10", &error_abort);
    bdrv_graph_rdlock_main_loop();
    bdrv_amend_options(r->bs, opts, on_amend, NULL, false, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    qemu_opts_del(opts);

    run_repair(r);
    run_close(r);
    check_image(stack, r->disk->data, r);
    run_free(r);
}

static void on_alarm(int sig)
{
    static const char message[] = " hangs\n";
    ssize_t ret = write(STDERR_FILENO, current, strlen(current));

    ret += write(STDERR_FILENO, message, sizeof(message) - 1);
    _exit(ret > 0 ? 1 : 2);
}

int main(int argc, char **argv)
{
    struct sigaction sa = { .sa_handler = on_alarm };
    const char *env = g_getenv("TEST_FAULTS_ONLY");

    disk_test_init(&argc, &argv);
    every_way = g_test_slow();
    sigaction(SIGALRM, &sa, NULL);

    g_assert(!env || qemu_strtoui(env, NULL, 0, &only) == 0);
    bdrv_graph_wrlock();
    bdrv_disk_extents = bdrv_disk;
    bdrv_disk_extents.bdrv_co_block_extents = disk_co_block_extents;
    bdrv_graph_wrunlock();

    for (int i = 0; i < ARRAY_SIZE(stacks); i++) {
        g_autofree char *path = g_strdup_printf("/seqcache-faults/%s",
                                                stacks[i].name);

        g_test_add_data_func(path, &stacks[i], test_stack);
    }
    g_test_add_func("/seqcache-faults/amend", test_amend);
    return g_test_run();
}
