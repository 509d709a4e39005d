/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Heterogeneous memory management: what the CPU page tables say, for devices
 *
 * Documentation/mm/hmm.rst has the driver's contract and a complete example.
 */
#ifndef LINUX_HMM_H
#define LINUX_HMM_H

#include <linux/mm.h>

struct mmu_interval_notifier;

/**
 * enum hmm_pfn_flags - the bits of an element of &hmm_range.hmm_pfns
 *
 * An element is one unsigned long: flags at the top, then five bits of order
 * from %HMM_PFN_ORDER_SHIFT on, and the pfn below them. The caller stores
 * requests; hmm_range_fault() replaces them with outputs.
 *
 * @HMM_PFN_VALID: Output: the pfn is that of a page that can be read. It may
 *	be a device-private page only if &hmm_range.dev_private_owner is not
 *	NULL and owns that page.
 * @HMM_PFN_WRITE: Output: the page can be written, too. Never without
 *	%HMM_PFN_VALID.
 * @HMM_PFN_ERROR: Output: no fault can make this page accessible. There is no
 *	VMA, it does not allow reads, it maps I/O, a special page or secret
 *	memory, the memory is poisoned or guarded, the entry is corrupt, or the
 *	pfn does not fit into an element, as on 32 bits above 8 GiB.
 * @HMM_PFN_DMA_MAPPED: Sticky: the page is DMA mapped, see hmm_dma_map_pfn().
 * @HMM_PFN_P2PDMA: Sticky: the page is peer to peer memory and mapped through
 *	the host bridge.
 * @HMM_PFN_P2PDMA_BUS: Sticky: the page is peer to peer memory and mapped by
 *	its bus address.
 * @HMM_PFN_ORDER_SHIFT: Where the order begins. Not a flag.
 * @HMM_PFN_REQ_FAULT: Request: fault the page in unless it can be read. On
 *	success the output has %HMM_PFN_VALID.
 * @HMM_PFN_REQ_WRITE: Request: fault the page in unless it can be written. On
 *	success the output has %HMM_PFN_WRITE. Asks for nothing unless
 *	combined with %HMM_PFN_REQ_FAULT.
 * @HMM_PFN_FLAGS: All that is not pfn: the flags and the order.
 *
 * Sticky bits are the caller's own. They are carried from input to output,
 * whatever the page turns out to be and also when the call fails. What the
 * invalidate callback clears while a call runs stays cleared; what is set in that
 * time may be lost. An element is stored by one write, and one with %HMM_PFN_VALID
 * keeps it until a newer output takes its place.
 *
 * An output without %HMM_PFN_VALID and %HMM_PFN_ERROR says that the page is
 * not accessible at present and that faulting it could succeed. It has
 * neither pfn nor order.
 */
enum hmm_pfn_flags {
	HMM_PFN_VALID = 1UL << (BITS_PER_LONG - 1),
	HMM_PFN_WRITE = 1UL << (BITS_PER_LONG - 2),
	HMM_PFN_ERROR = 1UL << (BITS_PER_LONG - 3),
	HMM_PFN_DMA_MAPPED = 1UL << (BITS_PER_LONG - 4),
	HMM_PFN_P2PDMA = 1UL << (BITS_PER_LONG - 5),
	HMM_PFN_P2PDMA_BUS = 1UL << (BITS_PER_LONG - 6),

	HMM_PFN_ORDER_SHIFT = BITS_PER_LONG - 11,

	HMM_PFN_REQ_FAULT = HMM_PFN_VALID,
	HMM_PFN_REQ_WRITE = HMM_PFN_WRITE,

	HMM_PFN_FLAGS = ~((1UL << HMM_PFN_ORDER_SHIFT) - 1),
};

/**
 * hmm_pfn_to_page() - the page that an output stands for
 * @hmm_pfn: an output with %HMM_PFN_VALID
 *
 * Context: The page is not pinned. It stays only while the caller holds the
 *	lock that its invalidate callback takes, and only after
 *	mmu_interval_read_retry() has returned false under that lock.
 * Return: the page, which may be a tail page of a large folio.
 */
static inline struct page *hmm_pfn_to_page(unsigned long hmm_pfn)
{
	return pfn_to_page(hmm_pfn & ~HMM_PFN_FLAGS);
}

/**
 * hmm_pfn_to_phys() - the physical address that an output stands for
 * @hmm_pfn: an output with %HMM_PFN_VALID
 *
 * Context: As hmm_pfn_to_page().
 * Return: the address of the page's first byte.
 */
static inline phys_addr_t hmm_pfn_to_phys(unsigned long hmm_pfn)
{
	return PFN_PHYS(hmm_pfn & ~HMM_PFN_FLAGS);
}

/**
 * hmm_pfn_to_map_order() - the size of the mapping that covers a page
 * @hmm_pfn: an output with %HMM_PFN_VALID
 *
 * The page is part of a mapping of 1 << order pages, naturally aligned in the
 * address space. Those of them that lie inside the range all have consecutive
 * pfns, the same flags and the same order.
 *
 * That is the mapping of a huge entry, which may begin before &hmm_range.start
 * and end after &hmm_range.end: nothing was promised about those pages, so a
 * device mapping made from the order has to be clipped to the range, see
 * hmm_range_map_pages(). Or it is what PTEs of one large folio add up to, four
 * of them or more, if all of it is inside the range and aligned in memory, too.
 *
 * Context: As hmm_pfn_to_page().
 * Return: the order, in base pages: 0 for a page that is mapped alone.
 */
static inline unsigned int hmm_pfn_to_map_order(unsigned long hmm_pfn)
{
	return (hmm_pfn >> HMM_PFN_ORDER_SHIFT) & 0x1F;
}

/**
 * struct hmm_range - a range of a process's address space to look at
 * @notifier: notifier whose interval includes [@start, @end). Its mm is the
 *	address space.
 * @notifier_seq: sequence that mmu_interval_read_begin() returned for
 *	@notifier. hmm_range_fault_unlocked_timeout() sets it itself.
 * @start: first address of the range (inclusive), page aligned
 * @end: where the range ends (exclusive), page aligned
 * @hmm_pfns: an element for each page of the range, requests on entry and
 *	outputs on return, see &enum hmm_pfn_flags
 * @default_flags: what is requested of every page
 * @pfn_flags_mask: which bits of an element of @hmm_pfns count as a request.
 *	What is requested of page i is
 *	``(hmm_pfns[i] & pfn_flags_mask) | default_flags``.
 * @dev_private_owner: &dev_pagemap.owner of the device-private pages that the
 *	device can reach by itself, or NULL. Device-private pages of any other
 *	owner have to be migrated to be accessed.
 */
struct hmm_range {
	struct mmu_interval_notifier *notifier;
	unsigned long		notifier_seq;
	unsigned long		start;
	unsigned long		end;
	unsigned long		*hmm_pfns;
	unsigned long		default_flags;
	unsigned long		pfn_flags_mask;
	void			*dev_private_owner;
};

/**
 * hmm_range_map_pages() - how far the mapping of a page reaches in the range
 * @range: a range whose outputs are valid
 * @i: index of an element of &hmm_range.hmm_pfns with %HMM_PFN_VALID
 *
 * These are the pages that a device can map in one go, as one physically
 * contiguous piece with the same rights: those of the CPU's mapping of page
 * @i, without what lies before that page or at or after &hmm_range.end. So a
 * driver goes through its range by ``i += hmm_range_map_pages(range, i)``.
 *
 * Context: As hmm_pfn_to_page().
 * Return: how many pages, @i included: at least 1, and no more than the range
 *	has from @i on. Not always a power of two.
 */
static inline unsigned long hmm_range_map_pages(const struct hmm_range *range,
						unsigned long i)
{
	unsigned long left = ((range->end - range->start) >> PAGE_SHIFT) - i;
	unsigned long size = 1UL << hmm_pfn_to_map_order(range->hmm_pfns[i]);
	unsigned long before = ((range->start >> PAGE_SHIFT) + i) & (size - 1);

	return min(left, size - before);
}

/**
 * struct hmm_commit_ops - what hmm_range_fault_each() needs of a driver
 * @lock: take the lock that the notifier's invalidate callback takes. May
 *	sleep.
 * @unlock: release it
 * @commit: put the pages of [start, end) into the device's page table. Called
 *	under that lock; may sleep if the lock lets it. The elements of those
 *	pages are valid, and hmm_pfn_to_page() is good for them, until it
 *	returns. Both addresses are page aligned, and @range is what
 *	hmm_range_fault_each() was called with, so its place in
 *	&hmm_range.hmm_pfns is ``(start - range->start) >> PAGE_SHIFT``. May
 *	change sticky bits, and nothing else of @range. Returns 0 to go on;
 *	anything else ends the call, which returns it.
 *
 * A range that is part of a structure of the driver's own leads there by
 * container_of().
 */
struct hmm_commit_ops {
	void (*lock)(struct hmm_range *range);
	void (*unlock)(struct hmm_range *range);
	int (*commit)(struct hmm_range *range, unsigned long start,
		      unsigned long end);
};

int hmm_range_fault(struct hmm_range *range);
int hmm_range_fault_unlocked_timeout(struct hmm_range *range,
				     unsigned long timeout);
int hmm_range_fault_each(struct hmm_range *range, unsigned long timeout,
			 const struct hmm_commit_ops *ops);

/*
 * How long drivers commonly let a range be invalidated again and again before
 * they give up, in milliseconds.
 */
#define HMM_RANGE_DEFAULT_TIMEOUT 1000

#endif /* LINUX_HMM_H */
