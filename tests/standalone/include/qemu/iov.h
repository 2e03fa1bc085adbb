/*
 * Stand-in for QEMU's header of this name
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef IOV_H
#define IOV_H

typedef struct QEMUIOVector {
    struct iovec *iov;
    int niov;
    size_t size;
    struct iovec local_iov;
} QEMUIOVector;

/* A vector of one element, to initialise @self with */
#define QEMU_IOVEC_INIT_BUF(self, buf, len)                             \
    {                                                                   \
        .iov = &(self).local_iov,                                       \
        .niov = 1,                                                      \
        .size = (len),                                                  \
        .local_iov = { .iov_base = (void *)(buf), .iov_len = (len) },   \
    }

static inline void iov_copy_part(QEMUIOVector *qiov, size_t offset, void *buf,
                                 size_t bytes, bool to_buf)
{
    for (int i = 0; bytes && i < qiov->niov; i++) {
        struct iovec *iov = &qiov->iov[i];
        size_t skip = MIN(offset, iov->iov_len);
        size_t n = MIN(bytes, iov->iov_len - skip);
        uint8_t *base = (uint8_t *)iov->iov_base + skip;

        memcpy(to_buf ? buf : base, to_buf ? base : buf, n);
        buf = (uint8_t *)buf + n;
        bytes -= n;
        offset -= skip;
    }
    assert(!bytes);
}

static inline void qemu_iovec_to_buf(QEMUIOVector *qiov, size_t offset,
                                     void *buf, size_t bytes)
{
    iov_copy_part(qiov, offset, buf, bytes, true);
}

static inline void qemu_iovec_from_buf(QEMUIOVector *qiov, size_t offset,
                                       const void *buf, size_t bytes)
{
    iov_copy_part(qiov, offset, (void *)buf, bytes, false);
}

#endif /* IOV_H */
