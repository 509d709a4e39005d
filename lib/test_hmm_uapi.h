/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What a program says to the HMM test device, /dev/hmm_dmirror<n>. It is for
 * the kernel's own tests, hence not among the exported headers.
 */
#ifndef _LIB_TEST_HMM_UAPI_H
#define _LIB_TEST_HMM_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * struct hmm_dmirror_cmd - the one argument that all commands share
 * @addr: first address of the range to work on, page aligned, in the address
 *	space of the process that opened the device
 * @ptr: the caller's buffer, which data comes from or goes to
 * @npages: length of the range in pages
 * @cpages: Output: how many pages of the range are done, from its start on.
 *	Set also when the command fails.
 * @faults: Output: how many times the device found a page missing from its own
 *	page table. Set also when the command fails.
 */
struct hmm_dmirror_cmd {
	__u64 addr;
	__u64 ptr;
	__u64 npages;
	__u64 cpages;
	__u64 faults;
};

/*
 * READ, READ_UNLOCKED: the device reads the range. The data goes to @ptr.
 *	READ_UNLOCKED leaves the mmap lock to HMM, so that fault handlers that
 *	have to drop it can work.
 * WRITE: the device writes data from @ptr to the range.
 * SNAPSHOT: looks at the range without faulting anything in, and stores one
 *	byte for each page at @ptr, see below.
 * RELEASE: the device drops what it holds of the address space, and the memory
 *	that went to the device through this file comes back. No range.
 * FLAGS: replaces the flags of the open file by @npages. No range.
 * MIGRATE_TO_DEV: moves what can be moved of the range to the device's memory,
 *	and stores the device's data at @ptr up to the first page that is not
 *	there. If there is such a page it fails, with ENOENT unless memory has
 *	run out.
 * MIGRATE_TO_SYS: moves what is in the device's memory of the range back.
 *	@cpages is how many pages moved.
 * EXCLUSIVE: the device gets the range for itself, for atomic access, and stores
 *	its data at @ptr. An access by anybody else takes a page back.
 * CHECK_EXCLUSIVE: fails with EPERM if the device still has a page of the range
 *	for itself.
 */
#define HMM_DMIRROR_READ		_IOWR('H', 0x00, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_READ_UNLOCKED	_IOWR('H', 0x09, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_WRITE		_IOWR('H', 0x01, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_SNAPSHOT		_IOWR('H', 0x04, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_RELEASE		_IOWR('H', 0x07, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_FLAGS		_IOWR('H', 0x08, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_MIGRATE_TO_DEV	_IOWR('H', 0x02, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_MIGRATE_TO_SYS	_IOWR('H', 0x03, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_EXCLUSIVE		_IOWR('H', 0x05, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_CHECK_EXCLUSIVE	_IOWR('H', 0x06, struct hmm_dmirror_cmd)

/* FLAGS: fail the next allocation of a large folio, once */
#define HMM_DMIRROR_FLAG_FAIL_ALLOC	0x1ULL

/*
 * A byte of SNAPSHOT is ERROR, or NONE, or the sum of an access (READ or
 * WRITE), a size (nothing for a base page) and a kind of memory (nothing for
 * ordinary memory).
 */
enum {
	/* No VMA, or one that no device can access, or a broken page. */
	HMM_DMIRROR_PROT_ERROR = 0xff,
	/* Not accessible now. A fault may help. */
	HMM_DMIRROR_PROT_NONE = 0,

	HMM_DMIRROR_PROT_READ = 1 << 0,
	HMM_DMIRROR_PROT_WRITE = 1 << 1,

	HMM_DMIRROR_PROT_PMD = 1 << 2,
	HMM_DMIRROR_PROT_PUD = 1 << 3,

	/* The kinds of memory are numbers, not bits. */
	HMM_DMIRROR_PROT_ZERO = 1 << 4,
	/* Device memory: LOCAL is that of the device asked. */
	HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL = 2 << 4,
	HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE = 3 << 4,
	HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL = 4 << 4,
	HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE = 5 << 4,
};

/* Kinds of device memory. 0 is none of them. */
enum {
	HMM_DMIRROR_MEMORY_DEVICE_PRIVATE = 1,
	HMM_DMIRROR_MEMORY_DEVICE_COHERENT = 2,
};

#endif /* _LIB_TEST_HMM_UAPI_H */
