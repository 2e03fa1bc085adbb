/*
 * What differs between the versions of QEMU that this code is built with
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * This is the only place of the kind.  It asks whether QEMU has a feature and
 * never for a version, because distributions backport.
 */

#ifndef BLOCK_SEQCACHE_COMPAT_H
#define BLOCK_SEQCACHE_COMPAT_H

#include "block/block-common.h"

/*
 * What a query for the block status wants to know: BDRV_WANT_ flags, or once
 * whether zeroes matter
 */
#ifdef BDRV_WANT_PRECISE
typedef unsigned int BdrvStatusMode;
#else
typedef bool BdrvStatusMode;
#define BDRV_WANT_ZERO true
#define BDRV_WANT_PRECISE true
#endif

/* For tests: blk_pdiscard() and blk_co_pdiscard() have flags in some cases */
typedef int (*BlkPdiscard)(BlockBackend *blk, int64_t offset, int64_t bytes);
typedef int (*BlkPdiscardFlags)(BlockBackend *blk, int64_t offset,
                                int64_t bytes, BdrvRequestFlags flags);

static inline int compat_pdiscard(BlkPdiscard func, BlockBackend *blk,
                                  int64_t offset, int64_t bytes)
{
    return func(blk, offset, bytes);
}

static inline int compat_pdiscard_flags(BlkPdiscardFlags func,
                                        BlockBackend *blk, int64_t offset,
                                        int64_t bytes)
{
    return func(blk, offset, bytes, 0);
}

#define COMPAT_PDISCARD(func, ...)                              \
    _Generic(&(func),                                           \
             BlkPdiscard : compat_pdiscard,                     \
             BlkPdiscardFlags : compat_pdiscard_flags)          \
        ((func), __VA_ARGS__)

#define compat_blk_pdiscard(...) COMPAT_PDISCARD(blk_pdiscard, __VA_ARGS__)
#define compat_blk_co_pdiscard(...) \
    COMPAT_PDISCARD(blk_co_pdiscard, __VA_ARGS__)

#endif /* BLOCK_SEQCACHE_COMPAT_H */
