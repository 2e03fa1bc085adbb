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

#endif /* BLOCK_SEQCACHE_COMPAT_H */
