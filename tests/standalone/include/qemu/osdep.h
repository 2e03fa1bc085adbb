/*
 * Stand-in for QEMU's header of this name: what SeqCache and its tests use
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * For builds without a QEMU tree only.
 */

#ifndef QEMU_OSDEP_H
#define QEMU_OSDEP_H

#include <assert.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#include <glib.h>

/* Multiples of @m, a power of two */
#define QEMU_IS_ALIGNED(n, m) (((n) & ((m) - 1)) == 0)
#define QEMU_ALIGN_DOWN(n, m) ((n) - ((n) & ((m) - 1)))
#define QEMU_ALIGN_UP(n, m) QEMU_ALIGN_DOWN((n) + (m) - 1, m)

#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define QEMU_SANITIZE_ADDRESS 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define QEMU_SANITIZE_ADDRESS 1
#endif

#define ARRAY_SIZE(x) G_N_ELEMENTS(x)

#ifndef container_of
#define container_of(ptr, type, member) \
    ((type *)((char *)(ptr) - offsetof(type, member)))
#endif

static inline uintptr_t qemu_real_host_page_size(void)
{
    return sysconf(_SC_PAGE_SIZE);
}

#endif /* QEMU_OSDEP_H */
