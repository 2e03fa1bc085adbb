/*
 * Fuzzer for SeqCache
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input decides on the options of a cache and on a sequence of operations,
 * and all results are compared with the model of the unit test.
 */

#include "qemu/osdep.h"
#include "../unit/seqcache-model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ModelInput in = { .data = data, .size = size };

    seqcache_model_run(&in, UINT_MAX);
    return 0;
}

#ifndef CONFIG_LIBFUZZER
/* Without libFuzzer: take inputs from files, or make up a few */
int main(int argc, char **argv)
{
    int i;

    for (i = 1; i < argc; i++) {
        g_autofree gchar *data = NULL;
        g_autoptr(GError) err = NULL;
        gsize size;

        if (!g_file_get_contents(argv[i], &data, &size, &err)) {
            fprintf(stderr, "%s\n", err->message);
            return 1;
        }
        LLVMFuzzerTestOneInput((uint8_t *)data, size);
    }

    for (i = 0; argc == 1 && i < 2000; i++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        uint8_t data[1024];
        size_t k;

        for (k = 0; k < sizeof(data); k++) {
            data[k] = g_rand_int(rand);
        }
        LLVMFuzzerTestOneInput(data, sizeof(data));
    }
    return 0;
}
#endif
