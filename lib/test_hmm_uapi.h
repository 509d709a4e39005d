/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What a program says to the HMM test device, /dev/hmm_dmirror<n>. It is for
 * the kernel's own tests, hence not among the exported headers.
 */
#ifndef _LIB_TEST_HMM_UAPI_H
#define _LIB_TEST_HMM_UAPI_H

#include <linux/const.h>
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

/*
 * HMM_DMIRROR_TEST looks inside, and brings about what would not happen by
 * itself. The structure may grow: what the caller does not know of is zero for
 * the kernel, and what the kernel does not know of has to be zero.
 */

/* What HMM takes and gives for a page, see enum hmm_pfn_flags. */
#define HMM_DMIRROR_PFN_VALID		_BITULL(63)
#define HMM_DMIRROR_PFN_WRITE		_BITULL(62)
#define HMM_DMIRROR_PFN_ERROR		_BITULL(61)
#define HMM_DMIRROR_PFN_DMA_MAPPED	_BITULL(60)
#define HMM_DMIRROR_PFN_P2PDMA		_BITULL(59)
#define HMM_DMIRROR_PFN_P2PDMA_BUS	_BITULL(58)
#define HMM_DMIRROR_PFN_ORDER_SHIFT	53
#define HMM_DMIRROR_PFN_ORDER_MASK	(0x1fULL << HMM_DMIRROR_PFN_ORDER_SHIFT)
#define HMM_DMIRROR_PFN_REQ_FAULT	HMM_DMIRROR_PFN_VALID
#define HMM_DMIRROR_PFN_REQ_WRITE	HMM_DMIRROR_PFN_WRITE

enum {
	HMM_DMIRROR_OP_FAULT = 1,
	HMM_DMIRROR_OP_STATS,
	HMM_DMIRROR_OP_INJECT,
	HMM_DMIRROR_OP_AWAIT,
	HMM_DMIRROR_OP_RESUME,
	HMM_DMIRROR_OP_CHECK,
};

/* OP_CHECK: what was wrong */
enum {
	HMM_DMIRROR_WRONG_WALK = 1,	/* what HMM finds without requests */
	HMM_DMIRROR_WRONG_TABLE,	/* the device's page table */
};

/* OP_FAULT */
#define HMM_DMIRROR_FAULT_UNLOCKED	_BITUL(0) /* leave mmap lock and retries to HMM */
#define HMM_DMIRROR_FAULT_ONCE		_BITUL(1) /* do not try again if invalidated */
#define HMM_DMIRROR_FAULT_NO_OWNER	_BITUL(2) /* own no device memory */
#define HMM_DMIRROR_FAULT_EACH		_BITUL(3) /* leave all to HMM, a step at a time */

/*
 * OP_INJECT: where. A gate is a mapping of the device's file from this offset
 * on, up to as many pages as the device offers for mmap. Each fault in it passes
 * the point GATE.
 */
#define HMM_DMIRROR_GATE_OFFSET		_BITULL(40)

enum {
	HMM_DMIRROR_POINT_GATE,
	HMM_DMIRROR_POINT_COLLECTED,	/* pages to migrate are locked and unmapped */
	HMM_DMIRROR_POINT_COPIED,	/* and new ones have their data */
	HMM_DMIRROR_POINT_MIGRATED,	/* and their place, but are locked still */
	HMM_DMIRROR_POINT_USE,		/* outputs of a walk hold: the device is locked */
	HMM_DMIRROR_POINT_MMAP,		/* the file is being mapped: the address space is locked */
	HMM_DMIRROR_NR_POINTS,
};

/* OP_INJECT: what */
enum {
	HMM_DMIRROR_INJECT_NOTHING,
	/* Wait until OP_RESUME, for a minute at most. */
	HMM_DMIRROR_INJECT_WAIT,
	/* The others are for gates. Drop the fault's lock, then wait as above. */
	HMM_DMIRROR_INJECT_DROP_AND_WAIT,
	/* Drop the fault's lock and have the fault done again. */
	HMM_DMIRROR_INJECT_DROP,
	/* Invalidate the gate. */
	HMM_DMIRROR_INJECT_INVALIDATE,
	/* Have the fault fail. */
	HMM_DMIRROR_INJECT_SIGBUS,
	HMM_DMIRROR_INJECT_OOM,
	HMM_DMIRROR_INJECT_HWPOISON,
	HMM_DMIRROR_NR_INJECTIONS,
};

/**
 * struct hmm_dmirror_test - the argument of HMM_DMIRROR_TEST
 * @size: of the structure as the caller knows it, in bytes
 * @op: one of HMM_DMIRROR_OP_*
 * @flags: for that operation
 * @reserved: 0
 *
 * @fault: calls HMM for @start to @end, exclusive, which are handed on whatever
 *	they are, with @default_flags and @pfn_flags_mask. @pfns is an array of an
 *	element for each page, requests on the way in and outputs on the way out,
 *	if the call fails, too. Page frame numbers are left out unless the caller
 *	has CAP_SYS_ADMIN. @timeout is in milliseconds, 0 is for ever. The device's
 *	own page table does not change. Output: @tries is how many calls it took
 *	(with EACH, how often a step was handed over, or was stale by then),
 *	@faults how many faults were handled, @invalidations how many times
 *	something was invalidated meanwhile.
 * @stats: Output: counts of what was done through the file since it was opened.
 *	@bytes is what it holds of the device's memory now, @device_bytes what all
 *	do.
 * @inject: has @action happen @count times, at least once, when @point is passed,
 *	after it was passed @skip times. It replaces what was to happen there.
 * @await: waits for somebody to wait at @point, for @timeout milliseconds at
 *	most. Fails with ETIMEDOUT.
 * @resume: lets whoever waits at @point go on.
 * @check: compares what HMM finds in @npages pages from @addr on, and what the
 *	device's page table has for them, with what is found without HMM. If
 *	@npages is 0, that is done wherever that table has something. Fails with
 *	EUCLEAN for the first difference. Output: @wrong is one of
 *	HMM_DMIRROR_WRONG_*, @addr is where, @found and @due are like the elements
 *	of @fault.pfns, and what a page table entry of the device allows is told
 *	by VALID and WRITE. An exclusive one is due if both @found and @due have
 *	the same page.
 */
struct hmm_dmirror_test {
	__u32 size;
	__u32 op;
	__u32 flags;
	__u32 reserved;
	union {
		struct {
			__aligned_u64 start;
			__aligned_u64 end;
			__aligned_u64 pfns;
			__aligned_u64 default_flags;
			__aligned_u64 pfn_flags_mask;
			__aligned_u64 timeout;
			__aligned_u64 tries;
			__aligned_u64 faults;
			__aligned_u64 invalidations;
		} fault;
		struct {
			__aligned_u64 invalidations;
			__aligned_u64 walks;
			__aligned_u64 retries;
			__aligned_u64 misses;
			__aligned_u64 pages_in;
			__aligned_u64 pages_out;
			__aligned_u64 bytes;
			__aligned_u64 device_bytes;
		} stats;
		struct {
			__u32 point;
			__u32 action;
			__aligned_u64 skip;
			__aligned_u64 count;
		} inject;
		struct {
			__u32 point;
			__u32 reserved;
			__aligned_u64 timeout;
		} await;
		struct {
			__u32 point;
			__u32 reserved;
		} resume;
		struct {
			__aligned_u64 addr;
			__aligned_u64 npages;
			__aligned_u64 wrong;
			__aligned_u64 found;
			__aligned_u64 due;
		} check;
	};
};

#define HMM_DMIRROR_TEST		_IO('H', 0x40)

/* Kinds of device memory. 0 is none of them. */
enum {
	HMM_DMIRROR_MEMORY_DEVICE_PRIVATE = 1,
	HMM_DMIRROR_MEMORY_DEVICE_COHERENT = 2,
};

#endif /* _LIB_TEST_HMM_UAPI_H */
