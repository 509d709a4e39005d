/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A driver that is built as RDMA's on-demand paging is
 *
 * It has one list of elements for good, which says what its device has mapped.
 * Every fault hands HMM a part of that list, several faults may work on it at
 * the same time, and the invalidate callback goes by it. What the device has is
 * kept apart from the list, to compare it with the page tables.
 */
#ifndef _MM_TESTS_HMM_ODP_H
#define _MM_TESTS_HMM_ODP_H

#include <kunit/test.h>
#include <linux/completion.h>
#include <linux/hmm-dma.h>
#include <linux/hmm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/pgtable.h>

#include "hmm_dma_device.h"

#define HMM_ODP_READ	HMM_PFN_REQ_FAULT
#define HMM_ODP_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
#define HMM_ODP_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)
#define HMM_ODP_ORDERS	(HMM_PFN_FLAGS & (HMM_PFN_P2PDMA_BUS - 1))

struct hmm_odp;

/**
 * struct hmm_odp_entry - what the device's table has for a page
 * @addr: the address at which the device reaches the page
 * @present: the device may read there
 * @writable: it may write there, too
 * @mapped: hmm_dma_map_pfn() gave out @addr, and nothing has undone that
 */
struct hmm_odp_entry {
	dma_addr_t addr;
	bool present;
	bool writable;
	bool mapped;
};

/**
 * struct hmm_odp_counts - what went wrong, and how much went on
 * @stale: translations that outlived an invalidation of their page
 * @lost: mappings that hmm_dma_unmap_pfn() did not find, or found twice
 * @undirtied: pages that the device could write, and that nobody set dirty
 * @other: addresses that lead to another page than the one that was found
 * @unmet: pages of good calls that lack what was asked for
 * @revived: elements with sticky bits that the callback has cleared
 * @unlike: translations that the page tables do not have, seen by a comparison
 * @calls: calls that were good
 * @errors: calls that had an error other than -EBUSY
 * @mapped: pages that were mapped
 * @unmapped: pages that invalidations unmapped
 * @dirtied: those of them that the device could write
 *
 * All are changed with &hmm_odp.lock held.
 */
struct hmm_odp_counts {
	unsigned long stale;
	unsigned long lost;
	unsigned long undirtied;
	unsigned long other;
	unsigned long unmet;
	unsigned long revived;
	unsigned long unlike;
	unsigned long calls;
	unsigned long errors;
	unsigned long mapped;
	unsigned long unmapped;
	unsigned long dirtied;
};

struct hmm_odp_call {
	const char *name;
	int (*fault)(struct hmm_odp *o, struct hmm_range *range, unsigned long timeout);
};

/* The three calls, each with what a driver does around it */
enum { HMM_ODP_LOCKED, HMM_ODP_UNLOCKED, HMM_ODP_EACH };

extern const struct hmm_odp_call hmm_odp_calls[3];

/**
 * struct hmm_odp_memory - a kind of memory that the device faults on
 * @name: what it is called
 * @npages: how much of it there is; 0 for two pages that PMDs map
 * @piece: the least number of pages that can be taken away by themselves; 0 for
 *	those of one that a PMD maps
 * @map: map it, at an address that is aligned to @piece
 *
 * How many pages a PMD maps is not known everywhere before the kernel runs.
 */
struct hmm_odp_memory {
	const char *name;
	unsigned long npages;
	unsigned long piece;
	void (*map)(struct hmm_odp *o);
};

static inline unsigned long hmm_odp_npages(const struct hmm_odp_memory *memory)
{
	return memory->npages ?: 2 * PMD_SIZE >> PAGE_SHIFT;
}

static inline unsigned long hmm_odp_piece(const struct hmm_odp_memory *memory)
{
	return memory->piece ?: PMD_SIZE >> PAGE_SHIFT;
}

extern const struct hmm_odp_memory hmm_odp_pages;
extern const struct hmm_odp_memory hmm_odp_handled;
extern const struct hmm_odp_memory hmm_odp_folios;
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
extern const struct hmm_odp_memory hmm_odp_thp;
#endif
#ifdef CONFIG_HUGETLB_PAGE
extern const struct hmm_odp_memory hmm_odp_hugetlb;
#endif

/**
 * struct hmm_odp - a region that the device faults on
 * @test: the running test
 * @device: the device
 * @memory: what the region is made of
 * @mm: the address space, the test thread's own
 * @start: where the region begins
 * @npages: how large it is
 * @notifier: covers the region
 * @lock: the driver's, under which the device's table and @counts are changed
 * @map: how the device reaches the pages; its list is the one for good
 * @table: the device's table
 * @counts: what was seen so far
 * @file: what is mapped, if it has a fault handler
 * @handle: decides a fault of a page; NULL maps a new one
 * @folios: what hmm_odp_folios maps
 * @plan: what @handle goes by
 * @hold: have the callback wait when this page is taken away
 * @holding: it waits
 * @go: it may go on
 */
struct hmm_odp {
	struct kunit *test;
	struct hmm_dma_device device;
	const struct hmm_odp_memory *memory;
	struct mm_struct *mm;
	unsigned long start;
	unsigned long npages;
	struct mmu_interval_notifier notifier;
	struct mutex lock;
	struct hmm_dma_map map;
	struct hmm_odp_entry *table;
	struct hmm_odp_counts counts;
	struct file *file;
	vm_fault_t (*handle)(struct hmm_odp *o, struct vm_fault *vmf, unsigned long page);
	struct page **folios;
	void *plan;
	unsigned long hold;
	struct completion holding;
	struct completion go;
};

static inline unsigned long hmm_odp_addr(const struct hmm_odp *o, unsigned long page)
{
	return o->start + (page << PAGE_SHIFT);
}

/* Elements change under the eyes of whoever looks at them. */
static inline unsigned long hmm_odp_element(const struct hmm_odp *o, unsigned long page)
{
	return READ_ONCE(o->map.pfn_list[page]);
}

/* The region */
int hmm_odp_init(struct kunit *test);
void hmm_odp_exit(struct kunit *test);
struct hmm_odp *hmm_odp_create(struct kunit *test, const struct hmm_dma_way *way,
			       const struct hmm_odp_memory *memory);

/* What the memory does */
vm_fault_t hmm_odp_handle_map(struct hmm_odp *o, struct vm_fault *vmf, unsigned long page);
void hmm_odp_zap_file(struct hmm_odp *o, unsigned long page, unsigned long npages);
int hmm_odp_zap(struct hmm_odp *o, unsigned long page, unsigned long npages);
void hmm_odp_write_protect(struct hmm_odp *o, unsigned long page, unsigned long npages);
int hmm_odp_touch(struct hmm_odp *o, unsigned long page, bool write);

/* What the device does */
int hmm_odp_fault(struct hmm_odp *o, const struct hmm_odp_call *call, unsigned long page,
		  unsigned long npages, unsigned long request, unsigned long timeout);
struct page *hmm_odp_reach(struct hmm_odp *o, unsigned long page);

/* What must not be */
void hmm_odp_compare(struct hmm_odp *o);
void hmm_odp_expect_right(struct hmm_odp *o);

#endif
