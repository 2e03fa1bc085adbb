/*
 * Tests of qcow2's compression in threads
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A node uses contexts of zlib and zstd again.  Whatever was done with one, the
 * next result must be that of a new one, which the test makes each time.
 *
 * For a given --seed the test always does the same.
 */

#include "qemu/osdep.h"

#define ZLIB_CONST
#include <zlib.h>
#ifdef CONFIG_ZSTD
#include <zstd.h>
#endif

#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "system/block-backend.h"
#include "../block/qcow2.h"

#define MAX_CLUSTER (2 * MiB)

static guint nb_processors;

/* The block layer gets this one instead of GLib's */
guint g_get_num_processors(void)
{
    return nb_processors;
}

typedef struct Test {
    BlockDriverState bs;
    BDRVQcow2State s;
    uint8_t *data;
    uint8_t *packed;
    uint8_t *out;
} Test;

static void set_up(Test *t, gconstpointer type)
{
    t->bs.opaque = &t->s;
    t->s.compression_type = GPOINTER_TO_INT(type);
    qemu_co_mutex_init(&t->s.lock);
    qemu_co_queue_init(&t->s.thread_task_queue);
    t->data = g_malloc(MAX_CLUSTER);
    t->packed = g_malloc(MAX_CLUSTER);
    t->out = g_malloc(MAX_CLUSTER);
}

static void assert_no_contexts(const BDRVQcow2State *s)
{
    g_assert(!s->spare_contexts[0][0] && !s->spare_contexts[1][0]);
}

static void tear_down(Test *t, gconstpointer type)
{
    qcow2_free_threads(&t->s);
    assert_no_contexts(&t->s);
    g_free(t->data);
    g_free(t->packed);
    g_free(t->out);
}

/* A call of qcow2_co_compress() or qcow2_co_decompress() */
typedef struct Call {
    Test *t;
    bool compress;
    void *dest;
    size_t dest_size;
    const void *src;
    size_t src_size;
    ssize_t ret;
    bool done;
} Call;

static void coroutine_fn co_call(void *opaque)
{
    Call *c = opaque;

    c->ret = (c->compress ? qcow2_co_compress : qcow2_co_decompress)
             (&c->t->bs, c->dest, c->dest_size, c->src, c->src_size);
    c->done = true;
}

static void start(Call *c)
{
    qemu_coroutine_enter(qemu_coroutine_create(co_call, c));
}

static void finish(Call *c)
{
    while (!c->done) {
        aio_poll(qemu_get_aio_context(), true);
    }
}

/* What a new context makes of it */
static ssize_t zlib_once(const Call *c, void *dest)
{
    z_stream strm = {
        .next_in = (void *)c->src, .avail_in = c->src_size,
        .next_out = dest, .avail_out = c->dest_size,
    };
    int ret;

    if (c->compress) {
        g_assert(deflateInit2(&strm, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9,
                              Z_DEFAULT_STRATEGY) == Z_OK);
        ret = deflate(&strm, Z_FINISH);
        deflateEnd(&strm);
        return ret == Z_STREAM_END ? c->dest_size - strm.avail_out : -ENOMEM;
    }
    g_assert(inflateInit2(&strm, -12) == Z_OK);
    ret = inflate(&strm, Z_FINISH);
    inflateEnd(&strm);
    return (ret == Z_STREAM_END || ret == Z_BUF_ERROR) && !strm.avail_out ?
           0 : -EIO;
}

#ifdef CONFIG_ZSTD
static ssize_t zstd_once(const Call *c, void *dest)
{
    ZSTD_outBuffer out = { dest, c->dest_size, 0 };
    ZSTD_inBuffer in = { c->src, c->src_size, 0 };
    size_t left, before;

    if (c->compress) {
        ZSTD_CCtx *cctx = ZSTD_createCCtx();

        left = ZSTD_compressStream2(cctx, &out, &in, ZSTD_e_end);
        ZSTD_freeCCtx(cctx);
        return left ? -ENOMEM : out.pos;
    } else {
        ZSTD_DCtx *dctx = ZSTD_createDCtx();

        do {
            before = in.pos + out.pos;
            left = ZSTD_decompressStream(dctx, &out, &in);
        } while (!ZSTD_isError(left) && out.pos < out.size &&
                 in.pos + out.pos != before);
        ZSTD_freeDCtx(dctx);
        return left ? -EIO : 0;
    }
}
#endif

/* Make a call, and compare its result with that of a new context */
static void check(Call *c)
{
    g_autofree uint8_t *expected = g_malloc0(c->dest_size);
    ssize_t ret;

#ifdef CONFIG_ZSTD
    if (c->t->s.compression_type == QCOW2_COMPRESSION_TYPE_ZSTD) {
        ret = zstd_once(c, expected);
    } else
#endif
    {
        ret = zlib_once(c, expected);
    }

    c->done = false;
    memset(c->dest, 0, c->dest_size);
    start(c);
    finish(c);
    g_assert_cmpint(c->ret, ==, ret);
    if (ret >= 0) {
        size_t bytes = c->compress ? ret : c->dest_size;

        g_assert(!memcmp(c->dest, expected, bytes));
    }
}

/* Words of several lengths, beside some random data: between 0 and @bytes */
static void fill(uint8_t *buf, size_t bytes, size_t random_bytes)
{
    for (size_t i = 0; i < bytes; ) {
        size_t len = MIN(bytes - i, g_test_rand_int_range(1, 64));

        memset(buf + i, g_test_rand_int_range('a', 'z'), len);
        i += len;
    }
    for (size_t i = 0; i < random_bytes; i++) {
        buf[i] = g_test_rand_int_range(0, 256);
    }
}

/* Also: all that there is to be used again is one context */
static void test_same_result(Test *t, gconstpointer type)
{
    static const size_t clusters[] = { 512, 4 * KiB, 64 * KiB, MAX_CLUSTER };
    void **contexts[] = { t->s.spare_contexts[0], t->s.spare_contexts[1] };
    void *first[2] = { NULL, NULL };
    int nb_compressed = 0, nb_failed = 0;

    for (int i = 0; i < 200; i++) {
        /* The large ones take their time */
        size_t cluster = clusters[i % 20 ? i % 3 : 3];
        Call compress = { t, true, t->packed, cluster - 1, t->data, cluster };
        Call decompress = { t, false, t->out, cluster, t->packed };
        size_t size;

        fill(t->data, cluster,
             i % 4 ? g_test_rand_int_range(0, cluster) : cluster);
        check(&compress);
        if (compress.ret < 0) {
            g_assert_cmpint(compress.ret, ==, -ENOMEM);
            nb_failed++;
            continue;
        }
        nb_compressed++;
        size = compress.ret;

        /* What is corrupt or cut off, and then what is not */
        decompress.src_size = size;
        t->packed[size / 2] ^= 0x55;
        check(&decompress);
        t->packed[size / 2] ^= 0x55;
        decompress.src_size = size / 2;
        check(&decompress);
        g_assert_cmpint(decompress.ret, ==, -EIO);
        decompress.src_size = size;
        check(&decompress);
        g_assert_cmpint(decompress.ret, ==, 0);
        g_assert(!memcmp(t->out, t->data, cluster));

        for (int k = 0; k < 2; k++) {
            first[k] = first[k] ?: contexts[k][0];
            g_assert(first[k] && contexts[k][0] == first[k]);
            g_assert(!contexts[k][1]);
        }
    }
    g_assert_cmpint(nb_compressed, >, 50);
    g_assert_cmpint(nb_failed, >, 20);
}

#ifdef CONFIG_ZSTD
/* A context that became large, as a corrupt image can make it, is not kept */
static void test_large_window(Test *t, gconstpointer type)
{
    const size_t cluster = 64 * KiB;
    ZSTD_CCtx *cctx = ZSTD_createCCtx();
    ZSTD_outBuffer out = { t->packed, cluster, 0 };
    ZSTD_inBuffer in = { t->data, cluster, 0 };
    Call decompress = { t, false, t->out, cluster, t->packed };

    fill(t->data, cluster, 0);
    ZSTD_CCtx_setParameter(cctx, ZSTD_c_windowLog, 24);
    /* So that the frame does not have its size */
    g_assert(!ZSTD_compressStream2(cctx, &out, &in, ZSTD_e_flush));
    g_assert(!ZSTD_compressStream2(cctx, &out, &in, ZSTD_e_end));
    ZSTD_freeCCtx(cctx);

    decompress.src_size = out.pos;
    check(&decompress);
    g_assert_cmpint(decompress.ret, ==, 0);
    g_assert(!memcmp(t->out, t->data, cluster));
    g_assert(!t->s.spare_contexts[0][0]);
}
#endif

/* How many clusters are compressed at a time on hosts of several sizes */
static void test_at_a_time(Test *t, gconstpointer type)
{
    static const int expected[][2] = { { 1, 4 }, { 5, 5 }, { 64, 16 } };
    const size_t cluster = 4 * KiB;

    fill(t->data, cluster, 0);
    for (int i = 0; i < ARRAY_SIZE(expected); i++) {
        Call calls[32];

        nb_processors = expected[i][0];
        t->s.max_threads = 0;
        for (int k = 0; k < ARRAY_SIZE(calls); k++) {
            calls[k] = (Call) { t, true, t->packed + k * cluster, cluster - 1,
                                t->data, cluster };
            start(&calls[k]);
        }
        /* None of them can have ended yet */
        g_assert_cmpint(t->s.nb_threads, ==, expected[i][1]);
        for (int k = 0; k < ARRAY_SIZE(calls); k++) {
            finish(&calls[k]);
            g_assert_cmpint(t->s.nb_threads, <=, expected[i][1]);
            g_assert_cmpint(calls[k].ret, ==, calls[0].ret);
        }
        g_assert_cmpint(t->s.nb_threads, ==, 0);
    }
}

/* A file with an image, whose node has contexts of both kinds */
typedef struct Image {
    char *path;
    BlockBackend *blk;
    BlockDriverState *bs;
    BDRVQcow2State *s;
} Image;

static void image_open(Image *img, const char *options)
{
    const size_t cluster = 64 * KiB;
    g_autofree uint8_t *data = g_malloc0(cluster);
    g_autofree char *opts = g_strdup(options);
    int fd = g_file_open_tmp("test-qcow2-threads-XXXXXX", &img->path, NULL);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    bdrv_img_create(img->path, "qcow2", NULL, NULL, opts, MiB, 0, true,
                    &error_abort);
    img->blk = blk_new_open(img->path, NULL, NULL, BDRV_O_RDWR, &error_abort);
    img->bs = blk_bs(img->blk);
    img->s = img->bs->opaque;

    g_assert_cmpint(blk_pwrite(img->blk, 0, cluster, data,
                               BDRV_REQ_WRITE_COMPRESSED), ==, 0);
    g_assert_cmpint(blk_pread(img->blk, 0, cluster, data, 0), ==, 0);
    g_assert_cmpint(blk_pwrite_zeroes(img->blk, 0, cluster, 0), ==, 0);
    g_assert(img->s->spare_contexts[0][0] && img->s->spare_contexts[1][0]);
}

static void image_close(Image *img)
{
    blk_unref(img->blk);
    unlink(img->path);
    g_free(img->path);
}

/* A node that failed as corrupt leaves nothing behind */
static void test_failed(void)
{
    Image img;
    BlockDriver *drv;

    image_open(&img, NULL);
    drv = img.bs->drv;
    bdrv_graph_rdlock_main_loop();
    qcow2_signal_corruption(img.bs, true, -1, -1, "for this test");
    bdrv_graph_rdunlock_main_loop();
    img.bs->free_failed(img.bs);
    assert_no_contexts(img.s);
    /* So that everything else is freed, too */
    img.bs->drv = drv;
    image_close(&img);
}

#ifdef CONFIG_ZSTD
static void status_cb(BlockDriverState *bs, int64_t offset, int64_t work_size,
                      void *opaque)
{
}

/* No context of one type is used for the other one */
static void test_downgrade(void)
{
    Image img;
    QemuOpts *opts;

    image_open(&img, "compression_type=zstd");
    opts = qemu_opts_create(img.bs->drv->amend_opts, NULL, 0, &error_abort);
    qemu_opt_set(opts, BLOCK_OPT_COMPAT_LEVEL, "0.10", &error_abort);
    bdrv_graph_rdlock_main_loop();
    bdrv_amend_options(img.bs, opts, status_cb, NULL, false, &error_abort);
    bdrv_graph_rdunlock_main_loop();
    qemu_opts_del(opts);

    g_assert_cmpint(img.s->compression_type, ==, QCOW2_COMPRESSION_TYPE_ZLIB);
    assert_no_contexts(img.s);
    image_close(&img);
}
#endif

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);
    bdrv_init();

    g_test_add_func("/qcow2-threads/failed", test_failed);
    g_test_add("/qcow2-threads/zlib/same-result", Test,
               GINT_TO_POINTER(QCOW2_COMPRESSION_TYPE_ZLIB), set_up,
               test_same_result, tear_down);
    g_test_add("/qcow2-threads/at-a-time", Test,
               GINT_TO_POINTER(QCOW2_COMPRESSION_TYPE_ZLIB), set_up,
               test_at_a_time, tear_down);
#ifdef CONFIG_ZSTD
    g_test_add_func("/qcow2-threads/zstd/downgrade", test_downgrade);
    g_test_add("/qcow2-threads/zstd/same-result", Test,
               GINT_TO_POINTER(QCOW2_COMPRESSION_TYPE_ZSTD), set_up,
               test_same_result, tear_down);
    g_test_add("/qcow2-threads/zstd/large-window", Test,
               GINT_TO_POINTER(QCOW2_COMPRESSION_TYPE_ZSTD), set_up,
               test_large_window, tear_down);
#endif
    return g_test_run();
}
