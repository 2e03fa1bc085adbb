/*
 * Stand-in for QEMU's header of this name
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HOST_UTILS_H
#define HOST_UTILS_H

static inline bool is_power_of_2(uint64_t value)
{
    return value && !(value & (value - 1));
}

static inline int ctz32(uint32_t value)
{
    return value ? __builtin_ctz(value) : 32;
}

#endif /* HOST_UTILS_H */
