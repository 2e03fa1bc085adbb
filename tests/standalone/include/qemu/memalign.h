/*
 * Stand-in for QEMU's header of this name
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MEMALIGN_H
#define QEMU_MEMALIGN_H

static inline void *qemu_memalign(size_t alignment, size_t size)
{
    void *mem = NULL;

    if (posix_memalign(&mem, alignment, size)) {
        abort();
    }
    return mem;
}

static inline void qemu_vfree(void *mem)
{
    free(mem);
}

#endif /* QEMU_MEMALIGN_H */
