// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Heterogeneous memory management: the walker
 *
 * Looks up what the CPU page tables hold for a range of a process, faulting
 * pages in as asked, so that a device can mirror it. This file reads from top
 * to bottom: requests, storing, classifying entries, resolving, joining, tables,
 * the page walker's callbacks, walking, locking, faulting, and the calls.
 */
#include <linux/delay.h>
#include <linux/hmm.h>
#include <linux/hugetlb.h>
#include <linux/leafops.h>
#include <linux/memremap.h>
#include <linux/mmu_notifier.h>
#include <linux/oom.h>
#include <linux/pagewalk.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/secretmem.h>
#include <linux/unroll.h>
#include <linux/userfaultfd_k.h>

#include "hmm_internal.h"
#include "internal.h"

/**
 * DOC: How the walk works
 *
 * Words:
 *
 * page
 *	a base page of the range
 * request
 *	what the caller asks of a page: nothing, to read it, or to write it
 * entry
 *	what the CPU page tables hold for a page, at any level
 * output
 *	what the walk stores for a page; it follows from the entry alone
 * need
 *	the bits of the request that the output lacks
 * cursor
 *	the first page that has no output yet
 *
 * Every entry is classified straight into the output of its first page. A
 * page whose output leaves nothing of its request undone is stored. The first
 * that has a need stops the walk: all page table locks are released, the
 * fault is handled for that page and only as strongly as it asked, and the
 * walk goes on at the cursor. Where each page takes a fault of its own, those
 * that come next and lack the same are faulted before that, too. An output with
 * %HMM_PFN_ERROR cannot be mended by a fault, so a need turns it into an error
 * of the call.
 *
 * A walk is one of a VMA, or of a gap between two. The lock that keeps that as
 * it is belongs to the caller or is HMM's own: that of the VMA if it will do,
 * else the mmap lock.
 *
 * Faults are also how the walk waits for what is in the way, such as a
 * migration: the fault handler knows how to wait for it.
 *
 * Invariants:
 *
 * - Below the cursor &hmm_range.hmm_pfns holds outputs. Elements that no walk of
 *   the call has reached hold what the caller asked for.
 * - The walk never takes an output for a request. A walk that begins again leaves
 *   elements alone and goes by requests that were kept elsewhere.
 * - An element is stored by one whole write, sticky bits included.
 * - No page table lock and no hugetlb VMA lock is held across a fault.
 * - All pages of a large entry that lie inside the range are stored together.
 *
 * Elements may be shared: RDMA has one list of them for a memory region, hands it
 * to every fault, and has the invalidate callback go by it on another CPU while a
 * call runs. So what maps a page is read and its output stored under one hold of
 * the page table lock. Of two walks the one that stores last has then read last,
 * and nobody replaces a newer output by an older one. What no fault can mend needs
 * no more than the lock that keeps the VMA. For the same reason nothing
 * is read back from elements but requests: what was stored there may have changed.
 *
 * A fault can invalidate the range itself, breaking copy-on-write for one. A
 * walk that stopped there would have to begin again for every such page, so
 * the sequence is compared once, when the whole range has been faulted in:
 * what was stored is stale then, but the next walk finds nothing to fault.
 * Somebody else's invalidation ends a walk that holds the caller's lock.
 */

/* The parts of an element that are requests. */
#define HMM_REQUESTS	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

/* The parts of an element that outlive every store. */
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/*
 * How a walk ends, besides with 0 or an error. Positive, as the page walker's
 * channel to its caller is, and never seen outside of this file.
 */
enum hmm_walk_end {
	/* A page has a need: handle the fault, and go on. */
	HMM_WALK_FAULT = 1,
	/* The entry is no longer what it was a moment ago: look again. */
	HMM_WALK_AGAIN,
	/* Somebody waits for the lock: give it to them, and go on. */
	HMM_WALK_PAUSE,
	/* The range was invalidated: what was stored is stale. */
	HMM_WALK_STALE,
};

/*
 * How many pages hmm_range_fault_each() hands over at a time, at most: as many
 * as one page of a page table has entries, as a rule.
 */
#define HMM_STEP_PAGES	512UL

/* How many pages' requests are kept in one number. */
#define HMM_BLOCK	8UL

/* After so many timeouts a call ends even if only its own faults were in the way. */
#define HMM_TIMEOUTS	10

/*
 * How many waits for something slow do not count for that, with each page: for a lock,
 * and for what its fault has to bring, with one kind of lock and with the other.
 */
#define HMM_WAITS	4

/* How long a writer gets to wake up, in microseconds. */
#define HMM_GIVE_WAY_US	50

/* No page has this address. */
#define HMM_NO_ADDR	ULONG_MAX

/* What keeps a VMA, or the lack of one, as it is. */
enum hmm_lock {
	HMM_UNLOCKED,
	HMM_VMA_LOCKED,
	HMM_MMAP_LOCKED,
};

/**
 * struct hmm_walk - the state of one call
 * @range: the caller's range
 * @start: where what is being filled begins: the range, or a step of it
 * @stop: where that ends
 * @step: how many pages a step has, unless something else ends it before; a
 *	power of two. 0 if the range is filled as a whole
 * @mm: the address space, that of the range's notifier
 * @request: what each page asks for, if all of them are @alike
 * @requests: else what the caller asked for in the elements of &hmm_range.hmm_pfns,
 *	as hmm_pack() keeps it; NULL if the walk never begins again and can look there
 * @saved: address of the first page whose request is in @requests
 * @saved_end: address behind the last
 * @cursor: address of the first page without an output
 * @vma: the VMA at the cursor, or NULL where there is none
 * @end: where that VMA or that gap ends, or @stop if that is before
 * @lock: what is held, under which @vma and @end are so
 * @addr: the page to handle a fault for
 * @need: what that page's request lacks
 * @run: which pages from @addr on lack the same, as a bitmap
 * @previous: the first page that was faulted the last time that there was a need
 * @tried: the page whose fault last dropped the lock
 * @farthest: the last of the pages that were faulted
 * @since: since when it is that one, or since when it has not been waited for, in
 *	jiffies
 * @waits: how often it was waited for
 * @seq: the notifier's sequence when the walk last looked at it
 * @timeout: for how long invalidations may keep a step from being filled, in
 *	jiffies, or 0 for as long as it takes
 * @began: when the step was begun, in jiffies
 * @untimed: jiffies since then that invalidations have not cost
 * @faulting: jiffies that the faults of this walk took
 * @stale_walks: how many walks of the step were for nothing
 * @giant_end: where what is stored of an entry ends that maps more than a page table
 *	does, as long as the walk goes on there
 * @giant_out: the output of the first page that it maps
 * @look_again: a fault was handled, and its page not yet looked at again
 * @need_mmap_lock: the rest of this VMA needs the mmap lock
 * @faulted: a fault was handled since the cursor was last at the start
 * @hold: the faults get on, and the page table is not done yet
 * @disturbed: somebody else has invalidated the range during this walk
 * @may_unlock: the lock is HMM's own and may be dropped by faults
 * @alike: all pages of the range ask for the same
 * @waited: the fault of @tried waited for something, without the lock
 * @fills_hole: the fault of @addr is one that invalidates nothing
 *
 * @addr, @need, @run and @fills_hole are set by hmm_stop().
 */
struct hmm_walk {
	struct hmm_range	*range;
	unsigned long		start;
	unsigned long		stop;
	unsigned long		step;
	struct mm_struct	*mm;
	unsigned long		request;
	u16			*requests;
	unsigned long		saved;
	unsigned long		saved_end;
	unsigned long		cursor;
	struct vm_area_struct	*vma;
	unsigned long		end;
	enum hmm_lock		lock;
	unsigned long		addr;
	unsigned long		need;
	unsigned long		run;
	unsigned long		previous;
	unsigned long		tried;
	unsigned long		farthest;
	unsigned long		since;
	unsigned long		seq;
	unsigned long		timeout;
	unsigned long		began;
	unsigned long		untimed;
	unsigned long		faulting;
	unsigned int		waits;
	unsigned int		stale_walks;
	unsigned long		giant_end;
	unsigned long		giant_out;
	bool			look_again;
	bool			need_mmap_lock;
	bool			faulted;
	bool			hold;
	bool			disturbed;
	bool			may_unlock;
	bool			alike;
	bool			waited;
	bool			fills_hole;
};

/*
 * Where the step that begins at @start ends. Steps end where their size is aligned,
 * so that they cut as few large mappings in two as can be.
 */
static unsigned long hmm_step_end(const struct hmm_range *range, unsigned long start,
				  unsigned long step)
{
	if (!step)
		return range->end;
	return hmm_addr_end(start, step << PAGE_SHIFT, range->end);
}

/* Do the elements of hmm_pfns have a say in what is requested? */
static bool hmm_has_page_requests(const struct hmm_range *range)
{
	return range->pfn_flags_mask & ~range->default_flags & HMM_REQUESTS;
}

/*
 * The state before anything is filled, of a @range that hmm_check() has let pass. A
 * call for one page is so short that it matters to set nothing that will be set before
 * it is read: by hmm_walk_begin(), hmm_find_vma() or hmm_stop(), with @tried,
 * @farthest or @faulted, or by hmm_fill_retry().
 */
static __always_inline void hmm_walk_init(struct hmm_walk *w, struct hmm_range *range,
					  unsigned long step, unsigned long timeout,
					  enum hmm_lock lock)
{
	w->range = range;
	w->start = range->start;
	w->stop = hmm_step_end(range, range->start, step);
	w->step = step;
	w->mm = range->notifier->mm;
	w->request = range->default_flags;
	w->lock = lock;
	w->tried = HMM_NO_ADDR;
	w->farthest = HMM_NO_ADDR;
	w->timeout = timeout;
	w->may_unlock = lock == HMM_UNLOCKED;
	w->alike = true;
	if (!hmm_has_page_requests(range))
		return;
	/* One page is like itself, and its request need not be kept elsewhere. */
	if (range->end - range->start == PAGE_SIZE) {
		w->request |= READ_ONCE(*range->hmm_pfns) & range->pfn_flags_mask;
		return;
	}
	w->alike = false;
	w->requests = NULL;
}

/* The state before a walk from the start, which goes by the range's sequence. */
static __always_inline void hmm_walk_begin(struct hmm_walk *w)
{
	w->cursor = w->start;
	w->seq = w->range->notifier_seq;
	w->giant_end = HMM_NO_ADDR;
	w->look_again = false;
	w->need_mmap_lock = false;
	w->faulted = false;
	w->hold = false;
	w->disturbed = false;
}

/* Requests */

static unsigned long hmm_index(const struct hmm_range *range, unsigned long addr)
{
	return (addr - range->start) >> PAGE_SHIFT;
}

static unsigned long *hmm_element(const struct hmm_range *range, unsigned long addr)
{
	return &range->hmm_pfns[hmm_index(range, addr)];
}

/*
 * What is left of @request when the page's output is @out. Requests share
 * their bits with the outputs that meet them.
 */
static unsigned long hmm_need(unsigned long request, unsigned long out)
{
	if (!(request & HMM_PFN_REQ_FAULT))
		return 0;
	return request & ~out & HMM_REQUESTS;
}

/* Does @out meet whatever a page can ask for? */
static bool hmm_meets_all(const struct hmm_range *range, unsigned long out)
{
	return !hmm_need(range->default_flags | range->pfn_flags_mask, out);
}

/*
 * Two bits of each element of a block are all that counts as a request, whatever the
 * mask is. They are kept with those of the first page at the top.
 */
#define HMM_REQUEST_SHIFT	(BITS_PER_LONG - 2)
static_assert(HMM_REQUESTS == 3UL << HMM_REQUEST_SHIFT);

static __always_inline u16 hmm_pack(const unsigned long *elements, unsigned long npages)
{
	unsigned long i, bits = 0;

	unrolled_full
	for (i = 0; i < npages; i++)
		bits = bits * 4 + (READ_ONCE(elements[i]) >> HMM_REQUEST_SHIFT);
	return bits << (HMM_BLOCK - npages) * 2;
}

static unsigned long hmm_unpack(unsigned long bits, unsigned long i)
{
	return bits >> (HMM_BLOCK - 1 - i) * 2 << HMM_REQUEST_SHIFT;
}

/*
 * Keep the requests of the step, for its outputs take their place. If the step before
 * was made shorter, outputs of pages behind it have taken their place already, but
 * their requests were kept with those of that step.
 */
static noinline void hmm_save_requests(struct hmm_walk *w)
{
	unsigned long *element = hmm_element(w->range, w->start);
	unsigned long i, left = (w->stop - w->start) >> PAGE_SHIFT;
	u16 *block = w->requests;

	if (w->start < w->saved_end)
		return;
	w->saved = w->start;
	w->saved_end = w->stop;
	for (; left >= HMM_STEP_PAGES; left -= HMM_STEP_PAGES) {
		for (i = 0; i < HMM_STEP_PAGES / HMM_BLOCK; i++, element += HMM_BLOCK)
			*block++ = hmm_pack(element, HMM_BLOCK);
		cond_resched();
	}
	for (; left >= HMM_BLOCK; left -= HMM_BLOCK, element += HMM_BLOCK)
		*block++ = hmm_pack(element, HMM_BLOCK);
	if (left)
		*block = hmm_pack(element, left);
}

/* What the caller asked for in the element of @addr. */
static unsigned long hmm_element_request(const struct hmm_walk *w, unsigned long addr)
{
	unsigned long i;

	if (!w->requests)
		return READ_ONCE(*hmm_element(w->range, addr));
	i = (addr - w->saved) >> PAGE_SHIFT;
	return hmm_unpack(w->requests[i / HMM_BLOCK], i % HMM_BLOCK);
}

/* The request of the page at @addr, which this walk has not stored yet. */
static __always_inline unsigned long hmm_request(const struct hmm_walk *w,
						 unsigned long addr)
{
	const struct hmm_range *range = w->range;

	if (likely(w->alike))
		return w->request;
	return (hmm_element_request(w, addr) & range->pfn_flags_mask) | range->default_flags;
}

/* The first page of [@start, @end) whose request @out does not meet, or @end. */
static unsigned long hmm_first_need(const struct hmm_walk *w, unsigned long start,
				    unsigned long end, unsigned long out)
{
	if (hmm_meets_all(w->range, out))
		return end;
	while (start < end && !hmm_need(hmm_request(w, start), out))
		start += PAGE_SIZE;
	return start;
}

/* Storing */

/* The callback may clear sticky bits meanwhile, and those stay cleared. */
static noinline void hmm_store_sticky(unsigned long *element, unsigned long out)
{
	set_mask_bits(element, ~HMM_STICKY, out);
}

static __always_inline void hmm_store_page(unsigned long *element, unsigned long out)
{
	if (unlikely(READ_ONCE(*element) & HMM_STICKY))
		hmm_store_sticky(element, out);
	else
		WRITE_ONCE(*element, out);
}

/*
 * Which bits the elements of a block have. To look at each of them would cost more. A
 * driver that sets a sticky bit meanwhile is as late as if it did so a moment before
 * the store: hmm_dma_unmap_pfn() does not go by the element.
 */
static __always_inline unsigned long hmm_any(const unsigned long *elements)
{
	unsigned long i, any = 0;

	unrolled_full
	for (i = 0; i < HMM_BLOCK; i++)
		any |= data_race(elements[i]); /* see above */
	return any;
}

/* Has one of them a sticky bit? Mostly none has. */
static __always_inline bool hmm_any_sticky(const unsigned long *elements)
{
	return hmm_any(elements) & HMM_STICKY;
}

/* Store @out for the first of @npages pages, and for each after it @step more. */
static __always_inline void hmm_store_pages(unsigned long *elements, unsigned long npages,
					    unsigned long out, unsigned long step)
{
	unsigned long i;

	for (; npages >= HMM_BLOCK && !hmm_any_sticky(elements); npages -= HMM_BLOCK) {
		unrolled_full
		for (i = 0; i < HMM_BLOCK; i++)
			WRITE_ONCE(elements[i], out + i * step);
		elements += HMM_BLOCK;
		out += HMM_BLOCK * step;
	}
	for (i = 0; i < npages; i++)
		hmm_store_page(&elements[i], out + i * step);
}

/* Store outputs for [@start, @end), where @out is that of the first page. */
static void hmm_store(struct hmm_walk *w, unsigned long start, unsigned long end,
		      unsigned long out)
{
	unsigned long npages = (end - start) >> PAGE_SHIFT;
	unsigned long *elements = hmm_element(w->range, start);

	w->cursor = end;
	if (out & HMM_PFN_VALID)
		hmm_store_pages(elements, npages, out, 1);
	else
		hmm_store_pages(elements, npages, out, 0);
}

/* Classifying: from an entry to the output of the first page that it maps */

static unsigned long hmm_out_valid(unsigned long pfn, bool writable, unsigned int order)
{
	unsigned long out = HMM_PFN_VALID | pfn;

	if (!hmm_pfn_fits(pfn))
		return HMM_PFN_ERROR;
	if (writable)
		out |= HMM_PFN_WRITE;
	return out | ((unsigned long)order << HMM_PFN_ORDER_SHIFT);
}

/* A device that writes to a shadow stack would defeat what it is for. */
static bool hmm_vma_may_write(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_WRITE && !(vma->vm_flags & VM_SHADOW_STACK);
}

/* May the device write where the CPU may? */
static bool hmm_is_writable(const struct hmm_walk *w, bool by_cpu)
{
	return by_cpu && !(w->vma->vm_flags & VM_SHADOW_STACK);
}

/*
 * The page table lock is held, so the entry keeps its page in use and with it
 * the page's pgmap.
 */
static bool hmm_owns(const struct hmm_walk *w, softleaf_t leaf)
{
	void *owner = w->range->dev_private_owner;

	return owner && page_pgmap(softleaf_to_page(leaf))->owner == owner;
}

/*
 * With the uffd bit, which is @protected, the entry traps what it would trap if it
 * were present: all accesses or, where that is not armed, writes.
 */
static unsigned long hmm_out_device_private(const struct hmm_walk *w, softleaf_t leaf,
					    bool writable, unsigned int order,
					    bool protected)
{
	if (protected && userfaultfd_rwp(w->vma))
		return 0;
	if (!hmm_owns(w, leaf))
		return 0;
	return hmm_out_valid(softleaf_to_pfn(leaf),
			     hmm_is_writable(w, writable && !protected), order);
}

/* Any marker but a pure write-protect one is there to make accesses fail. */
static unsigned long hmm_out_marker(softleaf_t leaf)
{
	return softleaf_to_marker(leaf) == PTE_MARKER_UFFD_WP ? 0 : HMM_PFN_ERROR;
}

/*
 * Entries that are neither present nor empty. There is no default, so that a
 * new kind of leaf is a compiler warning here.
 */
static __always_inline unsigned long hmm_out_softleaf(const struct hmm_walk *w,
						      softleaf_t leaf,
						      unsigned int order,
						      bool protected)
{
	switch (softleaf_type(leaf)) {
	case SOFTLEAF_SWAP:
	case SOFTLEAF_MIGRATION_READ:
	case SOFTLEAF_MIGRATION_READ_EXCLUSIVE:
	case SOFTLEAF_MIGRATION_WRITE:
	case SOFTLEAF_DEVICE_EXCLUSIVE:
		return 0;
	case SOFTLEAF_DEVICE_PRIVATE_READ:
		return hmm_out_device_private(w, leaf, false, order, protected);
	case SOFTLEAF_DEVICE_PRIVATE_WRITE:
		return hmm_out_device_private(w, leaf, true, order, protected);
	case SOFTLEAF_MARKER:
		return hmm_out_marker(leaf);
	case SOFTLEAF_HWPOISON:
	case SOFTLEAF_NONE:
		break;
	}
	return HMM_PFN_ERROR;
}

/*
 * Is it enough to look at the entry, which is present, to know that it is of a
 * normal page or a zero page? It is for nearly all. vm_normal_page() tells from
 * no more than this, except in a mixed map without a bit for special entries:
 * hmm_vma_refused() has turned away the other VMAs that it has to look at.
 */
static bool hmm_pte_is_normal(const struct vm_area_struct *vma, pte_t pte)
{
	if (!IS_ENABLED(CONFIG_ARCH_HAS_PTE_SPECIAL) && vma->vm_flags & VM_MIXEDMAP)
		return false;
	return !pte_special(pte) && pte_pfn(pte) <= highest_memmap_pfn;
}

/* Does the output come from the pfn and the right to write alone? */
static bool hmm_pte_is_plain(const struct vm_area_struct *vma, pte_t pte)
{
	return pte_present(pte) && !pte_protnone(pte) && hmm_pte_is_normal(vma, pte);
}

static __always_inline unsigned long hmm_out_pte(const struct hmm_walk *w,
						 unsigned long addr, pte_t pte)
{
	if (pte_none(pte))
		return 0;
	if (!pte_present(pte))
		return hmm_out_softleaf(w, softleaf_from_pte(pte), 0, pte_swp_uffd(pte));
	if (pte_protnone(pte))
		return 0;
	if (!hmm_pte_is_normal(w->vma, pte) && !is_zero_pfn(pte_pfn(pte)) &&
	    !vm_normal_page(w->vma, addr, pte))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pte_pfn(pte), hmm_is_writable(w, pte_write(pte)), 0);
}

static unsigned long hmm_out_pmd(const struct hmm_walk *w, unsigned long addr, pmd_t pmd)
{
	if (!pmd_present(pmd))
		return hmm_out_softleaf(w, softleaf_from_pmd(pmd), PMD_ORDER,
					pmd_swp_uffd(pmd));
	if (pmd_protnone(pmd))
		return 0;
	if (!vm_normal_page_pmd(w->vma, addr, pmd) && !is_huge_zero_pmd(pmd))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pmd_pfn(pmd), hmm_is_writable(w, pmd_write(pmd)), PMD_ORDER);
}

static unsigned long hmm_out_pud(const struct hmm_walk *w, unsigned long addr, pud_t pud)
{
	if (!vm_normal_page_pud(w->vma, addr, pud))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pud_pfn(pud), hmm_is_writable(w, pud_write(pud)), PUD_ORDER);
}

/* Resolving: where the output of an entry meets the requests of its pages */

/*
 * The page at @addr has a need that its output @out leaves. Decide what comes
 * of it: a fault, or the error that says why a fault would not help. Where the
 * page is @empty, there is nothing that a fault could invalidate.
 */
static int hmm_stop(struct hmm_walk *w, unsigned long addr, unsigned long out, bool empty)
{
	if (out & HMM_PFN_ERROR)
		return -EFAULT;

	w->need = hmm_need(hmm_request(w, addr), out);
	if ((w->need & HMM_PFN_REQ_WRITE) && !hmm_vma_may_write(w->vma))
		return -EPERM;

	w->addr = addr;
	w->run = 1;
	w->fills_hole = empty && !is_vm_hugetlb_page(w->vma);
	return HMM_WALK_FAULT;
}

/* Pages [@start, @end) each have an entry of their own, or none: all alike. */
static int hmm_resolve_pages(struct hmm_walk *w, unsigned long start,
			     unsigned long end, unsigned long out)
{
	unsigned long stop = hmm_first_need(w, start, end, out);

	hmm_store(w, start, stop, out);
	return stop < end ? hmm_stop(w, stop, out, !out) : 0;
}

/*
 * Store pages [@first, @end) of the one entry that maps them from @base on, if the
 * requests of those from @start on are met. @out is the output of the page at @base.
 */
static int hmm_resolve_part(struct hmm_walk *w, unsigned long base, unsigned long first,
			    unsigned long start, unsigned long end, unsigned long out)
{
	unsigned long stop = hmm_first_need(w, start, end, out);

	if (stop < end)
		return hmm_stop(w, stop, out, false);

	if (out & HMM_PFN_VALID)
		out += (first - base) >> PAGE_SHIFT;
	hmm_store(w, first, end, out);
	return 0;
}

/* Is the page before @end all there is to fill, of its page table at least? */
static bool hmm_is_one_page(const struct hmm_walk *w, unsigned long end)
{
	return end - w->start == PAGE_SIZE;
}

/* What the others do, for one page, which mostly is all that a device fault is about. */
static __always_inline int hmm_resolve_page(struct hmm_walk *w, unsigned long addr,
					    unsigned long out, bool empty)
{
	if (hmm_need(hmm_request(w, addr), out))
		return hmm_stop(w, addr, out, empty);
	hmm_store_page(hmm_element(w->range, addr), out);
	w->cursor = addr + PAGE_SIZE;
	return 0;
}

/*
 * One entry of @order maps pages [@start, @end), and @out is the output of the
 * first page that it maps, which may lie below @start.
 *
 * If it lies below and still inside what is filled, the pages up to @start were
 * stored while there was no entry, and a fault for @start has brought this
 * one: they are stored anew, for they are mapped as @start is.
 */
static int hmm_resolve_leaf(struct hmm_walk *w, unsigned long start,
			    unsigned long end, unsigned int order,
			    unsigned long out)
{
	unsigned long base = ALIGN_DOWN(start, PAGE_SIZE << order);

	if (!hmm_is_one_page(w, end))
		return hmm_resolve_part(w, base, max(base, w->start), start, end, out);

	if (out & HMM_PFN_VALID)
		out += (start - base) >> PAGE_SHIFT;
	return hmm_resolve_page(w, start, out, false);
}

/* Tables: each level takes and releases its own page table lock */

/**
 * struct hmm_kind - present entries that differ in nothing but the pfn
 * @bits: what they have in common: the entry less its pfn
 * @out: the output that they have in common, likewise
 * @pfns: how many pfns there are, or 0 as long as there is no kind
 * @holes: no request is missed by an empty entry, either
 *
 * Page tables hold long runs of entries of one kind, so it pays to decide once
 * what the kind comes to. They are normal, and not protnone. They are writable, or
 * nobody may ask to write: no request is missed by any.
 *
 * An entry is a pfn, which goes up to @pfns, and bits above and below it. What
 * is left of it without @bits, turned so that the pfn is at the bottom, is its
 * pfn if it has those very bits. If it has not, some bit above the pfn is set,
 * and the number is larger than @pfns. So two instructions and a comparison say
 * what hmm_out_pte() would: that depends on the bits and on that the pfn is below
 * @pfns. A pfn that is kept in two places is none of these, see hmm_whole_pfns().
 */
struct hmm_kind {
	u64 bits;
	unsigned long out;
	unsigned long pfns;
	bool holes;
};

/* Where entries keep the pfn. arm64 has no name for it: it keeps some in two places. */
#ifdef PFN_PTE_SHIFT
#define HMM_PTE_SHIFT	PFN_PTE_SHIFT
#else
#define HMM_PTE_SHIFT	PAGE_SHIFT
#endif

static u64 hmm_kind_pfn(const struct hmm_kind *kind, pte_t pte)
{
	return ror64(pte_val(pte) - kind->bits, HMM_PTE_SHIFT);
}

/*
 * How many pfns there are that an entry keeps in one place. With 52 bits of
 * address, arm64 has the uppermost of them below the others, and where they would
 * be has the right to write.
 */
static unsigned long hmm_whole_pfns(void)
{
	unsigned long pfn = GENMASK(__fls(highest_memmap_pfn), 0);
	u64 kept = pte_val(pfn_pte(pfn, __pgprot(0))) >> HMM_PTE_SHIFT;

	return min(highest_memmap_pfn + 1, BIT(ffz(kept)));
}

/* Take the kind of @pte, whose output is @out, if it has one. */
static void hmm_learn_kind(const struct hmm_walk *w, struct hmm_kind *kind, pte_t pte,
			   unsigned long out)
{
	unsigned long pfns;

	/* 32 bits may be too few, or divided in two: not all is one number. */
	if (!IS_ENABLED(CONFIG_64BIT))
		return;
	if (!hmm_pte_is_plain(w->vma, pte))
		return;
	if (!hmm_meets_all(w->range, out))
		return;
	pfns = hmm_whole_pfns();
	if (pte_pfn(pte) >= pfns)
		return;
	kind->bits = pte_val(pte) - ((u64)pte_pfn(pte) << HMM_PTE_SHIFT);
	kind->out = out & HMM_PFN_FLAGS;
	kind->pfns = pfns;
	kind->holes = hmm_meets_all(w->range, 0);
}

/*
 * Does each page of the VMA take a fault of its own, whatever becomes of its
 * neighbours? A fault brings several where folios are large, or in a file.
 */
static bool hmm_faults_singly(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma) && !userfaultfd_armed(vma) &&
	       !thp_vma_allowable_orders(vma, vma->vm_flags, TVA_PAGEFAULT,
					 THP_ORDERS_ALL_ANON);
}

/*
 * The walk stops for the page whose entry is at @ptep. Find out which pages from
 * there on, before @end, lack the same, so that one fault can follow the other
 * without a walk in between. They have to be empty or present: for what else
 * there is, a fault may do more or less than for a page.
 */
static void hmm_find_run(struct hmm_walk *w, pte_t *ptep, unsigned long end)
{
	unsigned long npages = min((end - w->addr) >> PAGE_SHIFT, BITS_PER_LONG);
	unsigned long i, out, need, addr, request = hmm_request(w, w->addr);
	pte_t pte, first = ptep_get(ptep);

	if (npages == 1 || !hmm_faults_singly(w->vma))
		return;
	for (i = 1; i < npages; i++) {
		addr = w->addr + (i << PAGE_SHIFT);
		pte = ptep_get(ptep + i);
		/*
		 * Entries that repeat are empty, or of one small page: the zero page, or
		 * one that KSM merged, in swap perhaps. Each takes a fault of its own.
		 */
		if (pte_same(pte, first) && hmm_request(w, addr) == request) {
			w->run |= BIT(i);
			continue;
		}
		out = hmm_out_pte(w, addr, pte);
		need = hmm_need(hmm_request(w, addr), out);
		if (!need)
			continue;
		if (need != w->need || pte_none(pte) != pte_none(first) ||
		    !(pte_none(pte) || out & HMM_PFN_VALID))
			break;
		w->run |= BIT(i);
	}
}

/* The output that hmm_out_pte() has for the entry, if it is of the kind or a hole. */
static __always_inline bool hmm_kind_out(const struct hmm_kind *kind, pte_t *ptep,
					 unsigned long *out)
{
	u64 pfn = hmm_kind_pfn(kind, ptep_get(ptep));

	if (likely(pfn < kind->pfns)) {
		*out = kind->out | pfn;
		return true;
	}
	*out = 0;
	return kind->holes && pte_none(ptep_get(ptep));
}

/* Do so for a block, as far as it goes. None of its elements has a sticky bit. */
static __always_inline unsigned long hmm_read_block(const struct hmm_kind *kind, pte_t *ptep,
						    unsigned long *elements)
{
	unsigned long i, out;

	unrolled_count(8)
	for (i = 0; i < HMM_BLOCK; i++) {
		if (!hmm_kind_out(kind, ptep + i, &out))
			break;
		WRITE_ONCE(elements[i], out);
	}
	return i;
}

/*
 * Store the outputs of entries that are of one kind, and of holes between them.
 * Returns how many those are. By itself it has a register for all that it needs,
 * where it costs most.
 */
static noinline unsigned long hmm_read_kind(struct hmm_kind kind, pte_t *ptep,
					    unsigned long *elements,
					    unsigned long npages)
{
	unsigned long n, out, left = npages;

	for (; left >= HMM_BLOCK && !hmm_any_sticky(elements); left -= HMM_BLOCK) {
		n = hmm_read_block(&kind, ptep, elements);
		if (n < HMM_BLOCK)
			return npages - left + n;
		elements += HMM_BLOCK;
		ptep += HMM_BLOCK;
	}
	for (; left && hmm_kind_out(&kind, ptep, &out); left--, ptep++)
		hmm_store_page(elements++, out);
	return npages - left;
}

/* The same for entries that do not differ at all, as of holes or the zero page. */
static unsigned long hmm_read_same(pte_t pte, unsigned long out, pte_t *ptep,
				   unsigned long *elements, unsigned long npages)
{
	unsigned long i;

	for (i = 0; i < npages && pte_same(ptep_get(ptep + i), pte); i++)
		hmm_store_page(&elements[i], out);
	return i;
}

/*
 * What the number grows by that a device-private entry is if its pfn is one more. It
 * is a power of two or the negative of one: else entries are kept in another way.
 */
static __always_inline s64 hmm_private_unit(void)
{
	return pte_val(swp_entry_to_pte(make_readable_device_private_entry(1))) -
	       pte_val(swp_entry_to_pte(make_readable_device_private_entry(0)));
}

/* How many pfns @pte is behind @first, of entries that differ in nothing else. */
static __always_inline u64 hmm_private_distance(u64 first, pte_t pte)
{
	s64 unit = hmm_private_unit();

	if (unit > 0)
		return ror64(pte_val(pte) - first, __ffs64(unit));
	return ror64(first - pte_val(pte), __ffs64(-unit));
}

/*
 * The same for device-private pages: entries like @pte, whose output is @out, of
 * the same memory, and so of the same owner.
 */
static noinline unsigned long hmm_read_private(pte_t pte, unsigned long out, pte_t *ptep,
					       unsigned long *elements,
					       unsigned long npages)
{
	const softleaf_t leaf = softleaf_from_pte(pte);
	const struct range *memory = &page_pgmap(softleaf_to_page(leaf))->range;
	unsigned long offset = softleaf_to_pfn(leaf) - PHYS_PFN(memory->start);
	unsigned long i, pfns = PHYS_PFN(range_len(memory));
	u64 distance, first = pte_val(pte) - offset * hmm_private_unit();

	if (!IS_ENABLED(CONFIG_64BIT) || offset >= pfns)
		return 0;
	out -= offset;
	for (i = 0; i < npages; i++) {
		distance = hmm_private_distance(first, ptep_get(ptep + i));
		if (distance >= pfns)
			break;
		hmm_store_page(&elements[i], out + distance);
	}
	return i;
}

/*
 * The outputs that were just stored without a look at each entry are those that
 * the entries have. What a configuration or an architecture does with the bits of
 * its entries may be more than is known here.
 */
static void hmm_verify_run(const struct hmm_walk *w, const struct hmm_kind *kind,
			   pte_t first, unsigned long first_out, pte_t *ptep,
			   unsigned long addr, unsigned long npages)
{
	unsigned long i, out, due;

	for (i = 0; i < npages; i++, addr += PAGE_SIZE) {
		pte_t pte = ptep_get(ptep + i);

		due = hmm_out_pte(w, addr, pte);
		if (hmm_kind_out(kind, ptep + i, &out) || pte_same(pte, first))
			VM_WARN_ON_ONCE(due != (pte_same(pte, first) ? first_out : out));
		else
			/* The CPU may have marked it dirty or accessed since. */
			VM_WARN_ON_ONCE((due ^ first_out) & HMM_PFN_FLAGS &&
					(due ^ kind->out) & HMM_PFN_FLAGS);
	}
}

/*
 * What follows the entry of @addr is mostly like it. Store the outputs of that, as
 * far as it goes: @kind tells of what was found so far, and @out is the output of
 * @pte. @ptep and @elements are those of the page after it.
 */
static __always_inline unsigned long hmm_read_alike(const struct hmm_walk *w,
						    struct hmm_kind *kind, pte_t pte,
						    unsigned long out, pte_t *ptep,
						    unsigned long *elements,
						    unsigned long npages)
{
	pte_t next = ptep_get(ptep);

	hmm_learn_kind(w, kind, pte, out);
	if (hmm_kind_pfn(kind, next) < kind->pfns || (kind->holes && pte_none(next)))
		return hmm_read_kind(*kind, ptep, elements, npages);
	if (pte_same(next, pte) && hmm_meets_all(w->range, out))
		return hmm_read_same(pte, out, ptep, elements, npages);
	if (out & HMM_PFN_VALID && !pte_present(pte) && hmm_meets_all(w->range, out))
		return hmm_read_private(pte, out, ptep, elements, npages);
	return 0;
}

/**
 * struct hmm_table - the entries of one page table that a walk may look at
 * @ptep: entry of @low. The page table lock is held.
 * @low: where the entries begin that this walk has read or is about to: not below
 *	what is being filled, nor below the VMA
 * @end: where they end
 */
struct hmm_table {
	pte_t		*ptep;
	unsigned long	low;
	unsigned long	end;
};

static pte_t *hmm_table_entry(const struct hmm_table *t, unsigned long addr)
{
	return t->ptep + ((addr - t->low) >> PAGE_SHIFT);
}

/* Read the entries of [@start, @end), each by itself or with those like it. */
static int hmm_read_ptes(struct hmm_walk *w, const struct hmm_table *t,
			 struct hmm_kind *kind, unsigned long start, unsigned long end)
{
	unsigned long *element = hmm_element(w->range, start);
	unsigned long out, n, left = (end - start) >> PAGE_SHIFT;
	pte_t pte, *ptep = hmm_table_entry(t, start);
	int ret;

	for (; left; left -= n, ptep += n, element += n) {
		w->cursor = end - (left << PAGE_SHIFT);
		pte = ptep_get(ptep);
		out = hmm_out_pte(w, w->cursor, pte);
		if (hmm_need(hmm_request(w, w->cursor), out)) {
			ret = hmm_stop(w, w->cursor, out, pte_none(pte));
			if (ret == HMM_WALK_FAULT)
				hmm_find_run(w, ptep, t->end);
			return ret;
		}
		hmm_store_page(element, out);
		n = 1;
		if (left > 1)
			n += hmm_read_alike(w, kind, pte, out, ptep + 1, element + 1,
					    left - 1);
		if (IS_ENABLED(CONFIG_DEBUG_VM))
			hmm_verify_run(w, kind, pte, out, ptep, w->cursor, n);
	}
	w->cursor = end;
	return 0;
}

/*
 * Large folios that are mapped by PTEs
 *
 * A device can map with one entry what the CPU maps with many, if the PTEs of a
 * large folio follow each other. An output is stored with its order, so they are
 * looked for before anything is stored. Whether PTEs follow each other can be told
 * from them alone, and only where they do is a folio worth a look.
 */

/* Less is of no use to devices, and is the least that anonymous memory has. */
#define HMM_JOIN_ORDER	2
#define HMM_JOIN_PAGES	BIT(HMM_JOIN_ORDER)
#define HMM_JOIN_SIZE	(PAGE_SIZE << HMM_JOIN_ORDER)

/**
 * struct hmm_piece - entries that follow each other
 * @start: address of the first page
 * @end: address behind the last
 * @out: output of the first page, without an order
 */
struct hmm_piece {
	unsigned long start;
	unsigned long end;
	unsigned long out;
};

/* The same for pages of the device, whose entries are of another form. */
static bool hmm_may_be_large_private(pte_t first, pte_t last)
{
	softleaf_t leaf;

	if (!IS_ENABLED(CONFIG_DEVICE_PRIVATE) ||
	    hmm_private_distance(pte_val(first), last) != HMM_JOIN_PAGES - 1)
		return false;
	leaf = softleaf_from_pte(last);
	return softleaf_is_device_private(leaf) && PageTail(softleaf_to_page(leaf));
}

/*
 * May these pages, which are aligned in the address space, be of one large folio? If
 * not, they are not. Mostly their entries do not follow each other: if they do, and are
 * aligned in memory, the last pfn has just these bits more than the first. Then the last
 * page tells, because it is no folio's first. @kind makes that quick.
 */
static __always_inline bool hmm_may_be_large(const struct hmm_kind *kind, pte_t *ptep)
{
	pte_t first = ptep_get(ptep), last = ptep_get(ptep + HMM_JOIN_PAGES - 1);
	u32 differ = (pte_val(first) ^ pte_val(last)) >> HMM_PTE_SHIFT;
	u64 pfn;

	if (unlikely(!pte_present(first)))
		return !pte_none(first) && hmm_may_be_large_private(first, last);
	if (differ != HMM_JOIN_PAGES - 1 || !(pte_val(last) >> HMM_PTE_SHIFT & 1))
		return false;
	pfn = hmm_kind_pfn(kind, last);
	return pfn >= kind->pfns || PageTail(pfn_to_page(pfn));
}

/* Are they of a large folio? */
static bool hmm_is_large(const struct hmm_walk *w, unsigned long addr, pte_t *ptep)
{
	unsigned long first = hmm_out_pte(w, addr, ptep_get(ptep));
	unsigned long last;

	addr += HMM_JOIN_SIZE - PAGE_SIZE;
	last = hmm_out_pte(w, addr, ptep_get(ptep + HMM_JOIN_PAGES - 1));
	return first & HMM_PFN_VALID && !(first & (HMM_JOIN_PAGES - 1)) &&
	       last == first + HMM_JOIN_PAGES - 1 &&
	       PageTail(pfn_to_page(last & ~HMM_PFN_FLAGS));
}

/*
 * The first of the blocks in [@addr, @end), which begins aligned, whose pages may be of
 * a large folio, or @end. Mostly there is none. By itself this has a register for all
 * that it needs.
 */
static noinline unsigned long hmm_skip_small(struct hmm_kind kind, const struct hmm_table *t,
					     unsigned long addr, unsigned long end)
{
	pte_t *ptep = hmm_table_entry(t, addr);
	unsigned long left = (end - addr) >> PAGE_SHIFT;

	for (; left >= HMM_JOIN_PAGES; left -= HMM_JOIN_PAGES, ptep += HMM_JOIN_PAGES)
		if (hmm_may_be_large(&kind, ptep))
			return end - (left << PAGE_SHIFT);
	return end;
}

/* Is @want, which is valid, the output of the entry? */
static __always_inline bool hmm_is_next(const struct hmm_walk *w,
					const struct hmm_kind *kind, unsigned long addr,
					pte_t pte, unsigned long want)
{
	u64 pfn = hmm_kind_pfn(kind, pte);

	if (likely(pfn < kind->pfns && (kind->out | pfn) == want))
		return true;
	return hmm_out_pte(w, addr, pte) == want;
}

/*
 * How far entries of one folio follow each other around @addr, which is a page of a
 * large one. Pages below the cursor are of it, too, if a fault came in between.
 */
static void hmm_measure_piece(const struct hmm_walk *w, const struct hmm_table *t,
			      struct hmm_kind *kind, unsigned long addr,
			      struct hmm_piece *piece)
{
	pte_t pte = ptep_get(hmm_table_entry(t, addr));
	unsigned long out = hmm_out_pte(w, addr, pte);
	unsigned long pfn = out & ~HMM_PFN_FLAGS;
	struct folio *folio = pfn_folio(pfn);
	unsigned long before = pfn - folio_pfn(folio);
	unsigned long after = folio_nr_pages(folio) - before;
	unsigned long low, end;
	pte_t *ptep;

	low = addr - (min(before, (addr - t->low) >> PAGE_SHIFT) << PAGE_SHIFT);
	end = addr + (min(after, (t->end - addr) >> PAGE_SHIFT) << PAGE_SHIFT);
	*piece = (struct hmm_piece) { .start = addr, .end = addr, .out = out };
	hmm_learn_kind(w, kind, pte, out);
	for (ptep = hmm_table_entry(t, addr);
	     piece->end < end && hmm_is_next(w, kind, piece->end, ptep_get(ptep), out);
	     ptep++, out++)
		piece->end += PAGE_SIZE;
	for (ptep = hmm_table_entry(t, addr) - 1;
	     piece->start > low && hmm_is_next(w, kind, piece->start - PAGE_SIZE,
					       ptep_get(ptep), piece->out - 1);
	     ptep--, piece->out--)
		piece->start -= PAGE_SIZE;
}

/*
 * File systems and drivers map what they like; other memory has large folios only
 * as transparent huge pages. Where there are none, not to look for them saves a
 * third of the time, if the pages happen to lie one behind the other.
 */
static bool hmm_may_have_large_folios(struct vm_area_struct *vma)
{
	return IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) || !vma_is_anonymous(vma);
}

/*
 * Find the first piece of a large folio that has pages in [@addr, @end) and is worth
 * an order. It may go on from there. Returns false if there is none.
 */
static bool hmm_find_piece(const struct hmm_walk *w, const struct hmm_table *t,
			   struct hmm_kind *kind, unsigned long addr, unsigned long end,
			   struct hmm_piece *piece)
{
	if (t->end - t->low < HMM_JOIN_SIZE || !hmm_may_have_large_folios(w->vma))
		return false;
	addr = ALIGN_DOWN(addr, HMM_JOIN_SIZE);
	if (addr < t->low) {
		if (end - addr <= HMM_JOIN_SIZE)
			return false;
		addr += HMM_JOIN_SIZE;
	}
	for (; addr < end; addr += HMM_JOIN_SIZE) {
		addr = hmm_skip_small(*kind, t, addr, end);
		if (addr == end)
			break;
		if (!hmm_is_large(w, addr, hmm_table_entry(t, addr)))
			continue;
		hmm_measure_piece(w, t, kind, addr, piece);
		if (piece->end - addr >= HMM_JOIN_SIZE)
			return true;
	}
	return false;
}

/*
 * Each page of the piece gets the order of the largest block that it is part of,
 * where that is aligned in both the address space and memory.
 */
static void hmm_store_piece(struct hmm_walk *w, const struct hmm_piece *piece)
{
	unsigned long addr = piece->start, out = piece->out, order, size;

	for (; addr < piece->end; addr += size, out += size >> PAGE_SHIFT) {
		order = umin(__ffs((addr >> PAGE_SHIFT) | (out & ~HMM_PFN_FLAGS)),
			     __fls((piece->end - addr) >> PAGE_SHIFT));
		size = PAGE_SIZE << order;
		if (order < HMM_JOIN_ORDER)
			order = 0;
		hmm_store(w, addr, addr + size, out | order << HMM_PFN_ORDER_SHIFT);
	}
}

/* Pages below the cursor, which were stored before a fault, get an order, too. */
static int hmm_resolve_piece(struct hmm_walk *w, const struct hmm_table *t,
			     const struct hmm_piece *piece)
{
	unsigned long start = max(w->cursor, piece->start);
	struct hmm_piece met = *piece;
	int ret;

	met.end = hmm_first_need(w, start, piece->end, piece->out);
	hmm_store_piece(w, &met);
	w->cursor = met.end;
	if (met.end == piece->end)
		return 0;
	ret = hmm_stop(w, met.end, piece->out, false);
	if (ret == HMM_WALK_FAULT)
		hmm_find_run(w, hmm_table_entry(t, met.end), t->end);
	return ret;
}

/*
 * How far ahead the first look for large folios goes. Where each page is faulted by
 * itself, the walk gets no further, and begins anew after the next.
 */
#define HMM_FIRST_LOOK	(PAGE_SIZE << 5)

/* Read what a page table has from the cursor on. Its lock is held. */
static int hmm_read_table(struct hmm_walk *w, const struct hmm_table *t)
{
	unsigned long end, look = HMM_FIRST_LOOK;
	struct hmm_kind kind = {};
	struct hmm_piece piece;
	bool found;
	int ret;

	do {
		end = hmm_addr_end(w->cursor, look, t->end);
		found = hmm_find_piece(w, t, &kind, w->cursor, end, &piece);
		ret = hmm_read_ptes(w, t, &kind, w->cursor,
				    found ? max(piece.start, w->cursor) : end);
		if (!ret && found)
			ret = hmm_resolve_piece(w, t, &piece);
		look = PMD_SIZE;
	} while (!ret && w->cursor < t->end);
	return ret;
}

/*
 * Is @out, the output of the page at @addr, in its element already, and enough? So it
 * often is in a list that a driver keeps, and what need not be stored needs no lock if
 * @out comes from the entry alone. Should that change, it is for the notifier to tell.
 * The entry has been read: another walk that read it before it became what it is has
 * stored by then, for both happens under the lock that the change took.
 */
static bool hmm_is_stored(struct hmm_walk *w, unsigned long addr, unsigned long out)
{
	unsigned long element;

	/* Pairs with the release of that lock. */
	smp_rmb();
	element = READ_ONCE(*hmm_element(w->range, addr));
	if ((element ^ out) & ~HMM_STICKY || hmm_need(hmm_request(w, addr), out))
		return false;
	w->cursor = addr + PAGE_SIZE;
	return true;
}

/* Is that so for a normal page? */
static bool hmm_is_page_stored(struct hmm_walk *w, pmd_t *pmdp, unsigned long addr)
{
	pte_t pte, *ptep;

	/* An element without a pfn is a request, and mostly alone in that. */
	if (!(READ_ONCE(*hmm_element(w->range, addr)) & ~HMM_PFN_FLAGS))
		return false;
	ptep = pte_offset_map(pmdp, addr);
	if (!ptep)
		return false;
	pte = ptep_get_lockless(ptep);
	pte_unmap(ptep);

	if (!hmm_pte_is_plain(w->vma, pte))
		return false;
	return hmm_is_stored(w, addr, hmm_out_valid(pte_pfn(pte),
						    hmm_is_writable(w, pte_write(pte)), 0));
}

static int hmm_walk_page(struct hmm_walk *w, pmd_t *pmdp, unsigned long addr)
{
	pte_t pte, *ptep;
	spinlock_t *ptl;
	int ret;

	if (hmm_is_page_stored(w, pmdp, addr))
		return 0;
	ptep = pte_offset_map_lock(w->mm, pmdp, addr, &ptl);
	if (!ptep)
		return HMM_WALK_AGAIN;
	pte = ptep_get(ptep);
	ret = hmm_resolve_page(w, addr, hmm_out_pte(w, addr, pte), pte_none(pte));
	pte_unmap_unlock(ptep, ptl);
	return ret;
}

static int hmm_walk_ptes(struct hmm_walk *w, pmd_t *pmdp, unsigned long start,
			 unsigned long end)
{
	struct hmm_table t = {
		.low	= max3(w->start, w->vma->vm_start, ALIGN_DOWN(start, PMD_SIZE)),
		.end	= end,
	};
	spinlock_t *ptl;
	int ret;

	t.ptep = pte_offset_map_lock(w->mm, pmdp, t.low, &ptl);
	if (!t.ptep)
		return HMM_WALK_AGAIN;
	ret = hmm_read_table(w, &t);
	pte_unmap_unlock(t.ptep, ptl);
	return ret;
}

/*
 * Find the entry that covers @addr in a table of PMDs, and NULL where there is
 * no such table. Returns false if that has another reason than that nothing is
 * mapped. Nothing frees such a table while its VMA stays, see walk_pmd_range().
 */
static __always_inline bool hmm_find_pmd(struct mm_struct *mm, unsigned long addr, pmd_t **pmdpp)
{
	pgd_t *pgdp = pgd_offset(mm, addr);
	p4d_t *p4dp, p4d;
	pud_t *pudp, pud;

	*pmdpp = NULL;
	/* Where a pgd_t is an array, as on arm, there can be no copy of it. */
	if (pgd_none(*pgdp) || pgd_bad(*pgdp))
		return pgd_none(*pgdp);
	p4dp = p4d_offset(pgdp, addr);
	p4d = p4dp_get(p4dp);
	if (p4d_none(p4d) || p4d_bad(p4d))
		return p4d_none(p4d);
	pudp = pud_offset(p4dp, addr);
	pud = pudp_get(pudp);
	if (!pud_present(pud) || pud_leaf(pud) || pud_bad(pud))
		return pud_none(pud);
	*pmdpp = pmd_offset(pudp, addr);
	return true;
}

/* Is there no table, or no hugetlb entry, that could map @addr? */
static bool hmm_has_no_table(const struct hmm_walk *w, unsigned long addr)
{
	unsigned long size;
	pmd_t *pmdp;

	if (!is_vm_hugetlb_page(w->vma))
		return hmm_find_pmd(w->mm, addr, &pmdp) && !pmdp;
	size = huge_page_size(hstate_vma(w->vma));
	return !hugetlb_walk(w->vma, ALIGN_DOWN(addr, size), size);
}

#ifdef CONFIG_PER_VMA_LOCK
static bool hmm_vma_is_waited_for(struct vm_area_struct *vma)
{
	return refcount_read(&vma->vm_refcnt) & VM_REFCNT_EXCLUDE_READERS_FLAG;
}
#else
static bool hmm_vma_is_waited_for(struct vm_area_struct *vma)
{
	return false;
}
#endif

/*
 * Does anybody wait for the lock under which the walk goes on? The caller's own is
 * not for HMM to give away.
 */
static bool hmm_is_waited_for(const struct hmm_walk *w)
{
	switch (w->lock) {
	case HMM_VMA_LOCKED:
		return hmm_vma_is_waited_for(w->vma);
	case HMM_MMAP_LOCKED:
		return w->may_unlock && mmap_lock_is_contended(w->mm);
	case HMM_UNLOCKED:
		break;
	}
	return false;
}

/* What one page table covers is done: let others have their turn. */
static int hmm_pause(const struct hmm_walk *w)
{
	cond_resched();
	return hmm_is_waited_for(w) ? HMM_WALK_PAUSE : 0;
}

/*
 * Are [@start, @end) holes in the elements, too, and is that enough? So it is in an
 * array that was cleared, and what need not be stored needs no lock.
 */
static bool hmm_are_holes(const struct hmm_walk *w, unsigned long start, unsigned long end)
{
	unsigned long npages = (end - start) >> PAGE_SHIFT, any = 0;
	unsigned long *element = hmm_element(w->range, start);

	if (!hmm_meets_all(w->range, 0))
		return false;
	for (; npages >= HMM_BLOCK && !any; npages -= HMM_BLOCK, element += HMM_BLOCK)
		any = hmm_any(element) & ~HMM_STICKY;
	for (; npages && !any; npages--, element++)
		any = READ_ONCE(*element) & ~HMM_STICKY;
	return !any;
}

/*
 * Nothing maps [@start, @end), which one page table could, or did not a moment ago:
 * @pmdp is where there is no such table, or NULL where there is no place for one.
 * Who makes the first entry takes the lock that is taken here.
 */
static int hmm_walk_empty(struct hmm_walk *w, pmd_t *pmdp, unsigned long start,
			  unsigned long end)
{
	spinlock_t *ptl = pmdp ? pmd_lockptr(w->mm, pmdp) : &w->mm->page_table_lock;
	int ret = HMM_WALK_AGAIN;

	if (hmm_are_holes(w, start, end)) {
		w->cursor = end;
		return 0;
	}
	spin_lock(ptl);
	if (pmdp ? pmd_none(pmdp_get(pmdp)) : hmm_has_no_table(w, start))
		ret = hmm_resolve_pages(w, start, end, 0);
	spin_unlock(ptl);
	return ret;
}

/* Nothing maps [@start, @end): there are no page tables, or no hugetlb entry. */
static int hmm_walk_hole(struct hmm_walk *w, unsigned long start, unsigned long end)
{
	unsigned long next;
	pmd_t *pmdp;
	int ret = 0;

	for (; !ret && start < end; start = next) {
		next = hmm_addr_end(start, PMD_SIZE, end);
		if (!hmm_find_pmd(w->mm, start, &pmdp))
			return HMM_WALK_AGAIN;
		ret = hmm_walk_empty(w, pmdp, start, next);
		if (!ret && next < end)
			ret = hmm_pause(w);
	}
	return ret;
}

/* Nothing of [@start, @end) can be had, whatever happens under the lock that is held. */
static int hmm_walk_error(struct hmm_walk *w, unsigned long start, unsigned long end)
{
	unsigned long next;
	int ret = 0;

	for (; !ret && start < end; start = next) {
		next = hmm_addr_end(start, PMD_SIZE, end);
		ret = hmm_resolve_pages(w, start, next, HMM_PFN_ERROR);
		if (!ret && next < end)
			ret = hmm_pause(w);
	}
	return ret;
}

static int hmm_walk_pmd(struct hmm_walk *w, pmd_t *pmdp, unsigned long start,
			unsigned long end)
{
	pmd_t pmd = pmdp_get_lockless(pmdp);
	spinlock_t *ptl;
	int ret;

	if (pmd_none(pmd))
		return hmm_walk_empty(w, pmdp, start, end);

	if (IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) &&
	    (!pmd_present(pmd) || pmd_trans_huge(pmd))) {
		ptl = pmd_trans_huge_lock(pmdp, w->vma);
		if (!ptl)
			return HMM_WALK_AGAIN;
		ret = hmm_resolve_leaf(w, start, end, PMD_ORDER,
				       hmm_out_pmd(w, start, pmdp_get(pmdp)));
		spin_unlock(ptl);
		return ret;
	}
	/* Mapping the PTEs would clear a bad entry, which is not ours to do. */
	if (pmd_bad(pmd))
		return hmm_walk_error(w, start, end);
	if (hmm_is_one_page(w, end))
		return hmm_walk_page(w, pmdp, start);
	return hmm_walk_ptes(w, pmdp, start, end);
}

/**
 * struct hmm_giant - an entry that maps more than a page table does
 * @entry: pointer to it
 * @order: of what it maps
 * @lock: takes and returns the lock that keeps it as it is, or returns NULL if it is
 *	no longer there
 * @out: the output of the first page that it maps, at @base
 */
struct hmm_giant {
	void *entry;
	unsigned int order;
	spinlock_t *(*lock)(const struct hmm_walk *w, const struct hmm_giant *giant);
	unsigned long (*out)(const struct hmm_walk *w, const struct hmm_giant *giant,
			     unsigned long base);
};

/*
 * What hmm_resolve_leaf() does, by parts, so that nobody waits for a lock while a
 * quarter of a million elements are stored. All parts are to be alike. The entry can
 * gain a right meanwhile, and then they are stored again; requests that were met stay
 * so. If it loses anything, the range was invalidated, and the walk is stale.
 */
static int hmm_walk_giant(struct hmm_walk *w, const struct hmm_giant *giant,
			  unsigned long start, unsigned long end)
{
	unsigned long base = ALIGN_DOWN(start, PAGE_SIZE << giant->order);
	unsigned long next, out, first = max(base, w->start);
	unsigned long addr = start == w->giant_end ? start : first;
	spinlock_t *ptl;
	int ret = 0;

	for (; !ret && addr < end; addr = next) {
		next = hmm_addr_end(addr, PMD_SIZE, end);
		ptl = giant->lock(w, giant);
		if (!ptl)
			return HMM_WALK_AGAIN;
		out = giant->out(w, giant, base);
		if (addr == first || out == w->giant_out)
			ret = hmm_resolve_part(w, base, addr, clamp(start, addr, next),
					       next, out);
		else if (mmu_interval_check_retry(w->range->notifier,
						  w->range->notifier_seq))
			ret = HMM_WALK_STALE;
		else
			next = first;
		spin_unlock(ptl);
		w->giant_out = out;
		w->giant_end = next;
		start = max(start, next);
		if (!ret && next < end)
			ret = hmm_pause(w);
	}
	return ret;
}

static spinlock_t *hmm_lock_pud(const struct hmm_walk *w, const struct hmm_giant *giant)
{
	return pud_trans_huge_lock(giant->entry, w->vma);
}

static unsigned long hmm_out_giant_pud(const struct hmm_walk *w,
				       const struct hmm_giant *giant, unsigned long base)
{
	return hmm_out_pud(w, base, pudp_get(giant->entry));
}

static int hmm_walk_pud(struct hmm_walk *w, pud_t *pudp, unsigned long start,
			unsigned long end)
{
	const struct hmm_giant giant = {
		.entry	= pudp,
		.order	= PUD_ORDER,
		.lock	= hmm_lock_pud,
		.out	= hmm_out_giant_pud,
	};

	return hmm_walk_giant(w, &giant, start, end);
}

/* The page walker's callbacks */

static int hmm_pte_hole(unsigned long start, unsigned long end,
			__always_unused int depth, struct mm_walk *walk)
{
	return hmm_walk_hole(walk->private, start, end);
}

static int hmm_pmd_entry(pmd_t *pmdp, unsigned long start, unsigned long end,
			 struct mm_walk *walk)
{
	int ret;

	ret = hmm_walk_pmd(walk->private, pmdp, start, end);
	if (!ret)
		return hmm_pause(walk->private);
	if (ret != HMM_WALK_AGAIN)
		return ret;
	walk->action = ACTION_AGAIN;
	return 0;
}

static int hmm_pud_entry(pud_t *pudp, unsigned long start, unsigned long end,
			 struct mm_walk *walk)
{
	pud_t pud = pudp_get(pudp);
	int ret;

	if (pud_trans_huge(pud))
		ret = hmm_walk_pud(walk->private, pudp, start, end);
	else if (pud_none(pud))
		ret = HMM_WALK_AGAIN;
	else if (pud_bad(pud))
		ret = hmm_walk_error(walk->private, start, end);
	else
		return 0;

	/* The page walker would descend, and never get past a bad entry. */
	walk->action = ACTION_CONTINUE;
	if (ret != HMM_WALK_AGAIN)
		return ret;
	walk->action = ACTION_AGAIN;
	return 0;
}

#ifdef CONFIG_HUGETLB_PAGE
static unsigned long hmm_out_hugetlb(const struct hmm_walk *w, pte_t pte,
				     unsigned int order)
{
	if (huge_pte_none(pte))
		return 0;
	if (!pte_present(pte))
		return hmm_out_softleaf(w, softleaf_from_pte(pte), order, pte_swp_uffd(pte));
	if (pte_protnone(pte))
		return 0;
	return hmm_out_valid(pte_pfn(pte), hmm_is_writable(w, huge_pte_write(pte)), order);
}

static spinlock_t *hmm_lock_hugetlb(const struct hmm_walk *w, const struct hmm_giant *giant)
{
	return huge_pte_lock(hstate_vma(w->vma), w->mm, giant->entry);
}

static unsigned long hmm_out_giant_hugetlb(const struct hmm_walk *w,
					   const struct hmm_giant *giant,
					   unsigned long base)
{
	return hmm_out_hugetlb(w, huge_ptep_get(w->mm, base, giant->entry), giant->order);
}

/* Walk an entry that maps more than a page table does. */
static int hmm_walk_hugetlb_giant(struct hmm_walk *w, pte_t *ptep, struct hstate *h,
				  unsigned long start, unsigned long end)
{
	const struct hmm_giant giant = {
		.entry	= ptep,
		.order	= huge_page_order(h),
		.lock	= hmm_lock_hugetlb,
		.out	= hmm_out_giant_hugetlb,
	};

	return hmm_walk_giant(w, &giant, start, end);
}

static int hmm_walk_hugetlb_entry(struct hmm_walk *w, pte_t *ptep, struct hstate *h,
				  unsigned long start, unsigned long end)
{
	unsigned int order = huge_page_order(h);
	unsigned long out;
	spinlock_t *ptl;
	int ret;

	if (huge_page_size(h) > PMD_SIZE)
		return hmm_walk_hugetlb_giant(w, ptep, h, start, end);

	ptl = huge_pte_lock(h, w->mm, ptep);
	out = hmm_out_hugetlb(w, huge_ptep_get(w->mm, start & huge_page_mask(h), ptep),
			      order);
	ret = hmm_resolve_leaf(w, start, end, order, out);
	spin_unlock(ptl);
	return ret;
}

/* Walk a hugetlb page, or the part of it that is in the range. */
static int hmm_walk_hugetlb_page(struct hmm_walk *w, struct hstate *h)
{
	unsigned long size = huge_page_size(h), end = hmm_addr_end(w->cursor, size, w->end);
	pte_t *ptep;
	int ret;

	hugetlb_vma_lock_read(w->vma);
	ptep = hugetlb_walk(w->vma, ALIGN_DOWN(w->cursor, size), size);
	ret = ptep ? hmm_walk_hugetlb_entry(w, ptep, h, w->cursor, end) :
		     hmm_walk_hole(w, w->cursor, end);
	hugetlb_vma_unlock_read(w->vma);
	return ret;
}

/*
 * The lock that keeps page tables from being shared, or no longer, is one of the whole
 * VMA, and others change files under it. The page walker would keep it until the end.
 */
static int hmm_walk_hugetlb(struct hmm_walk *w)
{
	struct hstate *h = hstate_vma(w->vma);
	int ret;

	do {
		ret = hmm_walk_hugetlb_page(w, h);
		if (!ret && w->cursor < w->end)
			ret = hmm_pause(w);
	} while (!ret && w->cursor < w->end);
	return ret;
}
#else
static int hmm_walk_hugetlb(struct hmm_walk *w)
{
	return -EFAULT;
}
#endif

#define HMM_WALK_OPS(by_lock) {			\
	.pte_hole	= hmm_pte_hole,		\
	.pud_entry	= hmm_pud_entry,	\
	.pmd_entry	= hmm_pmd_entry,	\
	.walk_lock	= by_lock,		\
}

static const struct mm_walk_ops hmm_walk_ops[] = {
	[HMM_VMA_LOCKED] = HMM_WALK_OPS(PGWALK_VMA_RDLOCK_VERIFY),
	[HMM_MMAP_LOCKED] = HMM_WALK_OPS(PGWALK_RDLOCK),
};

/* Walking */

/* Refused as a whole, whatever the page tables hold. */
static bool hmm_vma_refused(struct vm_area_struct *vma)
{
	/* Whoever may not read may not write: there is no write-only memory. */
	return vma->vm_flags & (VM_IO | VM_PFNMAP) ||
	       !(vma->vm_flags & VM_READ) ||
	       (!vma_is_anonymous(vma) && vma_is_secretmem(vma));
}

/*
 * Walk what one PMD entry covers, from the cursor on. Returns false if the page
 * walker has to.
 */
static bool hmm_walk_table(struct hmm_walk *w, unsigned long end, int *ret)
{
	pmd_t *pmdp;

	if (!hmm_find_pmd(w->mm, w->cursor, &pmdp))
		return false;
	*ret = pmdp ? hmm_walk_pmd(w, pmdp, w->cursor, end) :
		      hmm_walk_empty(w, NULL, w->cursor, end);
	return true;
}

/*
 * Walk what is left of a VMA, if one entry or one page table covers all of it. A
 * device fault is often about one page, and what it waits for would mostly be
 * the page walker's way down. After a fault, no more than that is walked, either.
 * Returns false if the page walker has to do it.
 */
static bool hmm_walk_short(struct hmm_walk *w, int *ret)
{
	unsigned long end = hmm_addr_end(w->cursor, PMD_SIZE, w->end);

	if (end != w->end && !w->look_again)
		return false;
	w->look_again = false;
	return hmm_walk_table(w, end, ret);
}

/*
 * Store outputs from the cursor on, at most up to w->end. The lock is held,
 * and stays so.
 */
static int hmm_walk(struct hmm_walk *w)
{
	int ret;

	if (!w->vma || hmm_vma_refused(w->vma))
		return hmm_walk_error(w, w->cursor, w->end);
	if (is_vm_hugetlb_page(w->vma))
		return hmm_walk_hugetlb(w);
	if (hmm_walk_short(w, &ret))
		return ret;
	return walk_page_range_vma(w->vma, w->cursor, w->end,
				   &hmm_walk_ops[w->lock], w);
}

/* Locking */

static __always_inline void hmm_unlock(struct hmm_walk *w)
{
	switch (w->lock) {
	case HMM_VMA_LOCKED:
		vma_end_read(w->vma);
		break;
	case HMM_MMAP_LOCKED:
		mmap_read_unlock(w->mm);
		break;
	case HMM_UNLOCKED:
		break;
	}
	w->lock = HMM_UNLOCKED;
}

/* Take the lock of the VMA at the cursor, if there is one and nobody changes it. */
static bool hmm_lock_vma(struct hmm_walk *w)
{
	if (w->need_mmap_lock)
		return false;
	w->vma = lock_vma_under_rcu(w->mm, w->cursor);
	if (!w->vma)
		return false;
	w->end = min(w->stop, w->vma->vm_end);
	w->lock = HMM_VMA_LOCKED;
	return true;
}

/*
 * Something that has taken a whole timeout, since @began, was a wait, and it is over.
 * However long it was, the call goes on, unless it comes to that over and over.
 */
static void hmm_waited(struct hmm_walk *w, unsigned long began)
{
	if (!w->timeout || jiffies - began < w->timeout)
		return;
	if (w->farthest == HMM_NO_ADDR || w->waits == HMM_WAITS)
		return;
	w->waits++;
	w->since = jiffies;
}

static int hmm_lock_mmap(struct hmm_walk *w)
{
	unsigned long began = jiffies;

	if (mmap_read_lock_killable(w->mm))
		return -EINTR;
	w->untimed += jiffies - began;
	hmm_waited(w, began);
	w->lock = HMM_MMAP_LOCKED;
	return 0;
}

/*
 * Find the VMA or the gap at the cursor, with the mmap lock held. A gap is rare,
 * and vma_lookup() is quicker than find_vma().
 */
static void hmm_find_vma(struct hmm_walk *w)
{
	struct vm_area_struct *next;

	w->end = w->stop;
	w->vma = vma_lookup(w->mm, w->cursor);
	if (w->vma) {
		w->end = min(w->end, w->vma->vm_end);
		return;
	}
	next = find_vma(w->mm, w->cursor);
	if (next)
		w->end = min(w->end, next->vm_start);
}

/*
 * Let go of a lock of HMM's own, where its VMA ends or somebody waits for it. A writer
 * that waits for the mmap lock has to wake up first, and a reader that comes back at
 * once would be quicker, over and over.
 */
static void hmm_let_go(struct hmm_walk *w)
{
	bool give_way = w->lock == HMM_MMAP_LOCKED && mmap_lock_is_contended(w->mm);

	if (w->cursor == w->end)
		w->need_mmap_lock = false;
	hmm_unlock(w);
	if (give_way)
		fsleep(HMM_GIVE_WAY_US);
}

/*
 * Is the lock to be kept? Somebody who waits for it gets it when what a page table
 * covers is done, or if its faults do not get on.
 */
static bool hmm_keeps_lock(const struct hmm_walk *w)
{
	if (w->lock == HMM_UNLOCKED || w->cursor >= w->end)
		return false;
	if (w->hold && w->cursor & ~PMD_MASK)
		return true;
	return !hmm_is_waited_for(w);
}

/*
 * Have a lock held, and w->vma and w->end be those of the cursor, on success. A
 * caller who holds the mmap lock himself is interrupted before a fault only, see
 * hmm_fault_run().
 */
static int hmm_lock(struct hmm_walk *w)
{
	int ret;

	if (w->may_unlock && fatal_signal_pending(current))
		return -EINTR;
	if (hmm_keeps_lock(w))
		return 0;

	if (w->may_unlock) {
		if (w->lock != HMM_UNLOCKED)
			hmm_let_go(w);
		ret = hmm_lock_vma(w) ? 0 : hmm_lock_mmap(w);
		if (ret)
			return ret;
		if (check_stable_address_space(w->mm))
			return -EFAULT;
	}
	if (w->lock == HMM_MMAP_LOCKED)
		hmm_find_vma(w);
	return 0;
}

/* Faulting */

static unsigned int hmm_fault_flags(const struct hmm_walk *w)
{
	unsigned int flags = FAULT_FLAG_REMOTE;

	if (w->need & HMM_PFN_REQ_WRITE)
		flags |= FAULT_FLAG_WRITE;
	if (w->may_unlock)
		flags |= FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_KILLABLE;
	if (w->lock == HMM_VMA_LOCKED)
		flags |= FAULT_FLAG_VMA_LOCK;
	if (w->tried == w->addr && w->waited)
		flags |= FAULT_FLAG_TRIED;
	return flags;
}

/* The fault handler has dropped the lock. */
static int hmm_fault_unlocked(struct hmm_walk *w, vm_fault_t fault)
{
	if (WARN_ON_ONCE(!w->may_unlock))
		return -EFAULT;

	/* A handler that only wants the mmap lock has not tried anything yet. */
	w->waited = w->lock == HMM_MMAP_LOCKED || fault & VM_FAULT_MAJOR;
	w->need_mmap_lock = w->lock == HMM_MMAP_LOCKED;
	w->tried = w->addr;
	w->lock = HMM_UNLOCKED;
	return 0;
}

/* Has the range been invalidated since the walk last asked? */
static bool hmm_sequence_moved(struct hmm_walk *w)
{
	unsigned long seq = READ_ONCE(w->range->notifier->invalidate_seq);

	if (likely(seq == w->seq))
		return false;
	w->seq = seq;
	return true;
}

/* Have invalidations kept the step from being filled for as long as they may? */
static bool hmm_timed_out(const struct hmm_walk *w)
{
	return w->timeout && jiffies - w->began - w->untimed >= w->timeout;
}

/*
 * Have faults got no farther for too long, whatever the reason is? A page may stay as it
 * is however often it is faulted, or others may take pages away, and keep the call
 * waiting for locks. No signal ends what a kernel thread waits for.
 */
static bool hmm_is_stuck(struct hmm_walk *w)
{
	if (!w->timeout)
		return false;
	if (w->farthest == HMM_NO_ADDR || w->addr > w->farthest) {
		w->farthest = w->addr;
		w->since = jiffies;
		w->waits = 0;
	}
	return (jiffies - w->since) / HMM_TIMEOUTS >= w->timeout;
}

/*
 * Is there no point in faulting more? With the caller's lock held, there will be no
 * second walk to look at what is faulted now. A second walk has less to do.
 */
static bool hmm_is_pointless(const struct hmm_walk *w)
{
	return w->disturbed && (!w->may_unlock || hmm_timed_out(w));
}

/*
 * Handle the fault of the page at w->addr. The lock is held on entry. On return
 * it is what w->lock says: it may have been dropped on success, when it is HMM's
 * own.
 */
static int hmm_fault(struct hmm_walk *w)
{
	unsigned long began = jiffies;
	vm_fault_t fault;

	/* Once more, but with the lock with which every handler can work. */
	if (w->lock == HMM_VMA_LOCKED && w->tried == w->addr) {
		hmm_unlock(w);
		w->need_mmap_lock = true;
		return 0;
	}

	fault = handle_mm_fault(w->vma, w->addr, hmm_fault_flags(w), NULL);
	if (hmm_sequence_moved(w) && w->fills_hole)
		w->disturbed = true;
	hmm_waited(w, began);
	w->faulted = true;
	w->look_again = true;

	if (fault & (VM_FAULT_COMPLETED | VM_FAULT_RETRY))
		return hmm_fault_unlocked(w, fault);
	if (fault & VM_FAULT_ERROR)
		return vm_fault_to_errno(fault, 0) ?: -EFAULT;
	return 0;
}

/* What ends a call, or this walk of it, between any two faults */
static int hmm_may_fault(struct hmm_walk *w)
{
	if (hmm_sequence_moved(w))
		w->disturbed = true;
	if (fatal_signal_pending(current))
		return -EINTR;
	if (hmm_is_stuck(w))
		return -EBUSY;
	return hmm_is_pointless(w) ? HMM_WALK_STALE : 0;
}

/*
 * Handle the faults that the walk stopped for, for as long as the lock is held.
 * A fault that breaks copy-on-write or brings back what is on a device invalidates
 * the range itself, and then nobody can tell what others did meanwhile.
 */
static int hmm_fault_run(struct hmm_walk *w)
{
	unsigned long i, first = w->addr, began = jiffies;
	int ret = 0;

	if (!w->faulted)
		w->faulting = 0;
	w->hold = !w->faulted || first != w->previous;
	w->previous = first;
	for_each_set_bit(i, &w->run, BITS_PER_LONG) {
		w->addr = first + (i << PAGE_SHIFT);
		ret = hmm_may_fault(w) ?: hmm_fault(w);
		if (ret || w->lock == HMM_UNLOCKED)
			break;
	}
	w->faulting += jiffies - began;
	return ret;
}

/* The calls */

static int hmm_check(const struct hmm_range *range)
{
	const struct interval_tree_node *interval;

	if (!range->notifier || !range->hmm_pfns)
		return -EINVAL;
	if (range->start >= range->end || !PAGE_ALIGNED(range->start | range->end))
		return -EINVAL;

	interval = &range->notifier->interval_tree;
	if (range->start < interval->start || range->end - 1 > interval->last)
		return -EINVAL;
	return 0;
}

/*
 * Go on at the cursor, to the end of what is to be filled. The lock is what
 * w->lock says, on entry and on return.
 *
 * Return: 0, %HMM_WALK_STALE if the range was invalidated meanwhile, or what
 * else the calls return.
 */
static int hmm_fill(struct hmm_walk *w)
{
	struct hmm_range *range = w->range;
	int ret;

	for (;;) {
		ret = hmm_lock(w) ?: hmm_walk(w);
		if (ret == HMM_WALK_FAULT)
			ret = hmm_fault_run(w);
		if (ret && ret != HMM_WALK_AGAIN && ret != HMM_WALK_PAUSE)
			return ret;
		if (w->cursor == w->stop)
			break;
		cond_resched();
	}
	if (hmm_sequence_moved(w))
		w->disturbed = true;
	return w->seq == range->notifier_seq ? 0 : HMM_WALK_STALE;
}

/**
 * hmm_range_fault() - look up a range, with the mmap lock held throughout
 * @range: what to look up. &hmm_range.notifier_seq is what
 *	mmu_interval_read_begin() returned before the call, and
 *	&hmm_range.hmm_pfns holds the requests.
 *
 * Stores for each page of the range what the CPU page tables hold for it, and
 * faults in those pages whose own request is not met by that. Pages without a
 * request are left as they are.
 *
 * The outputs mean nothing until mmu_interval_read_retry() has returned false
 * under the lock that the notifier's invalidate callback takes. When it
 * returns true, and after -EBUSY, start over from mmu_interval_read_begin(),
 * with the requests filled in again.
 *
 * When somebody else invalidates the range, the outputs are stale whatever follows,
 * and the call ends before the next fault.
 *
 * A VMA whose fault handler has to drop the mmap lock, as userfaultfd does,
 * cannot be faulted by this call: that gives -EFAULT. Prefer
 * hmm_range_fault_unlocked_timeout() unless the lock is needed for something
 * else.
 *
 * Context: Process context, may sleep. The caller holds the mmap lock of the
 *	notifier's mm, for reading or writing, before and after. It must not
 *	hold the lock that its invalidate callback takes: faults invalidate.
 * Return:
 * * 0 - every page is stored
 * * -EINVAL - the range is empty, is not page aligned, is not inside the
 *   notifier's interval, or has no notifier or no hmm_pfns; nothing is stored
 * * -EPERM - a write was requested of a page in a VMA without VM_WRITE, or in a
 *   shadow stack
 * * -EFAULT - a page with a request cannot be accessed, see %HMM_PFN_ERROR,
 *   or its fault failed for good
 * * -ENOMEM - a fault ran out of memory
 * * -EBUSY - the range was invalidated since mmu_interval_read_begin()
 * * -EINTR - the calling task has a fatal signal pending, and a page would have to
 *   be faulted
 *
 * After an error other than -EINVAL a part of hmm_pfns holds outputs, which
 * mean nothing. Sticky bits are what they were.
 */
int hmm_range_fault(struct hmm_range *range)
{
	struct hmm_walk w __uninitialized;
	int ret;

	ret = hmm_check(range);
	if (ret)
		return ret;

	hmm_walk_init(&w, range, 0, 0, HMM_MMAP_LOCKED);
	hmm_walk_begin(&w);
	w.end = w.start;
	mmap_assert_locked(w.mm);

	if (mmu_interval_check_retry(range->notifier, range->notifier_seq))
		return -EBUSY;
	ret = hmm_fill(&w);
	return ret == HMM_WALK_STALE ? -EBUSY : ret;
}
EXPORT_SYMBOL(hmm_range_fault);

/*
 * Have room for the requests of what is filled at a time, if elements have a say:
 * @few is for a step. That is all that most calls need.
 */
static int hmm_make_room(struct hmm_walk *w, u16 *few)
{
	unsigned long npages = hmm_index(w->range, w->range->end);

	if (w->alike)
		return 0;
	w->requests = few;
	w->saved_end = w->start;
	if (w->step || npages <= HMM_STEP_PAGES)
		return 0;
	w->requests = kvmalloc_array(DIV_ROUND_UP(npages, HMM_BLOCK), sizeof(*few),
				     GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	return w->requests ? 0 : -ENOMEM;
}

/* Fill the step once, from its start. No lock is held on entry, nor on return. */
static int hmm_fill_unlocked(struct hmm_walk *w)
{
	struct hmm_range *range = w->range;
	int ret;

	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	hmm_walk_begin(w);
	ret = hmm_fill(w);
	hmm_unlock(w);
	return ret;
}

/*
 * Hand the step over, and set @ret to what comes of it. Returns false if it is
 * no longer as it was found.
 */
static bool hmm_commit(struct hmm_walk *w, const struct hmm_commit_ops *ops, int *ret)
{
	struct hmm_range *range = w->range;
	bool valid;

	ops->lock(range);
	valid = !mmu_interval_read_retry(range->notifier, range->notifier_seq);
	if (valid)
		*ret = ops->commit(range, w->start, w->stop);
	ops->unlock(range);
	w->disturbed |= !valid;
	return valid;
}

/* Fill the step, and hand it over. Returns false if it was invalidated. */
static bool hmm_try(struct hmm_walk *w, const struct hmm_commit_ops *ops, int *ret)
{
	*ret = hmm_fill_unlocked(w);
	if (*ret == HMM_WALK_STALE)
		return false;
	return *ret || !ops || hmm_commit(w, ops, ret);
}

/*
 * May there be another walk after one that was for nothing? The time that its faults
 * took counts if it was others who invalidated the range. If it was the faults, the
 * next walk does not need them. That cannot go on, either, if it does not help.
 */
static noinline bool hmm_may_retry(struct hmm_walk *w)
{
	if (!w->timeout)
		return true;
	if (!w->disturbed && w->faulted)
		w->untimed += w->faulting;
	if (hmm_timed_out(w))
		return false;
	return w->stale_walks < 2 || (jiffies - w->began) / HMM_TIMEOUTS < w->timeout;
}

/*
 * A step is too long for how often it is invalidated if that happens although it
 * had nothing to wait for, or twice. Faults take time but once.
 */
static noinline void hmm_shorten(struct hmm_walk *w)
{
	if (!w->step || (w->faulted && w->stale_walks < 2))
		return;
	w->step = max(w->step / 2, 1UL);
	w->stop = hmm_addr_end(w->start, w->step << PAGE_SHIFT, w->stop);
}

/* Fill the step until it stays as it is for a whole walk, and is handed over. */
static int hmm_fill_retry(struct hmm_walk *w, const struct hmm_commit_ops *ops)
{
	int ret;

	w->began = jiffies;
	w->untimed = 0;
	w->stale_walks = 0;
	while (!hmm_try(w, ops, &ret)) {
		w->stale_walks++;
		if (!hmm_may_retry(w))
			return -EBUSY;
		hmm_shorten(w);
	}
	return ret;
}

/* Go on to the next step. Returns false if there is none. */
static bool hmm_next_step(struct hmm_walk *w)
{
	if (w->stop == w->range->end)
		return false;
	w->start = w->stop;
	w->step = min(w->step * 2, HMM_STEP_PAGES);
	w->stop = hmm_step_end(w->range, w->start, w->step);
	return true;
}

/*
 * A call that takes its own locks, and begins again by itself: for the range as
 * a whole, or in steps if there is somebody to hand them to.
 */
static int hmm_fill_steps(struct hmm_range *range, unsigned long timeout,
			  const struct hmm_commit_ops *ops)
{
	u16 few[HMM_STEP_PAGES / HMM_BLOCK] __uninitialized;
	struct hmm_walk w __uninitialized;
	int ret;

	ret = hmm_check(range);
	if (ret)
		return ret;

	hmm_walk_init(&w, range, ops ? HMM_STEP_PAGES : 0, timeout, HMM_UNLOCKED);
	if (!mmget_not_zero(w.mm))
		return -EFAULT;
	ret = hmm_make_room(&w, few);
	if (ret)
		goto put_mm;

	do {
		if (!w.alike)
			hmm_save_requests(&w);
		ret = hmm_fill_retry(&w, ops);
	} while (!ret && hmm_next_step(&w));

	/* Mostly there is none, and kvfree() takes its time to find that out. */
	if (!w.alike && w.requests != few)
		kvfree(w.requests);
put_mm:
	/*
	 * If this is the last user, tearing down the address space calls the
	 * notifier, which may wait for the very work that this is called from.
	 */
	mmput_async(w.mm);
	return ret;
}

/**
 * hmm_range_fault_unlocked_timeout() - look up a range, with all retrying done
 * @range: what to look up. &hmm_range.hmm_pfns holds the requests;
 *	&hmm_range.notifier_seq is set by the call, and is what the caller
 *	hands to mmu_interval_read_retry().
 * @timeout: for how long invalidations may keep the call from finishing, in
 *	jiffies, or 0 for as long as it takes. Time spent waiting for the mmap
 *	lock does not count, nor does that of faults, unless others made the
 *	walk void that the faults were part of.
 *
 * Does what hmm_range_fault() does, and all around it: takes the lock of one
 * VMA after the other, or the mmap lock where that will not do, lets fault
 * handlers drop it, and looks again when the range was invalidated meanwhile.
 * Work that a dropped lock interrupts goes on where it was.
 *
 * On success the caller takes the lock that its invalidate callback takes and
 * calls mmu_interval_read_retry(): if that returns false, the outputs hold
 * for as long as the lock is held. If it returns true, call again, with the
 * requests filled in again.
 *
 * Context: Process context, may sleep, without bound if a fault does: one that
 *	userfaultfd handles waits for its monitor, and only a fatal signal ends that,
 *	which kernel threads do not get. The caller holds neither the mmap lock of the
 *	notifier's mm nor the lock that its invalidate callback takes.
 * Return: As hmm_range_fault(), with these differences:
 * * -EFAULT - also when the process is gone or was reaped by the OOM killer
 * * -ENOMEM - also when there is no memory to keep the requests of a range of
 *   more than 512 pages in, whose elements have a say in them
 * * -EBUSY - the range was invalidated for longer than @timeout, or for ten times
 *   as long it got no farther: no walk without an invalidation, and no fault of a page
 *   behind the last that was faulted. Waits that took a whole @timeout each do not
 *   count, up to four a page
 * * -EINTR - the calling task has a fatal signal pending
 */
int hmm_range_fault_unlocked_timeout(struct hmm_range *range,
				     unsigned long timeout)
{
	return hmm_fill_steps(range, timeout, NULL);
}
EXPORT_SYMBOL(hmm_range_fault_unlocked_timeout);

/**
 * hmm_range_fault_each() - look up a range in steps, and hand each one over
 * @range: what to look up, as for hmm_range_fault_unlocked_timeout()
 * @timeout: for how long invalidations may keep one step from being handed
 *	over, in jiffies, or 0 for as long as it takes
 * @ops: the driver's lock, and what it does with a step
 *
 * Does all that a driver has to do around hmm_range_fault_unlocked_timeout().
 * The range is filled from its start to its end, a step at a time, and each
 * step is handed to &hmm_commit_ops.commit under the lock that the invalidate
 * callback takes, after mmu_interval_read_retry() has returned false. When an
 * invalidation comes in between, only the step that is being filled is done
 * again, so a call gets on however large the range is.
 *
 * The outputs of a step hold while it is being committed. From then on it is
 * the invalidate callback that undoes what a commit did, be it during this
 * call or after it.
 *
 * Context: Process context, may sleep. The caller holds neither the mmap lock
 *	of the notifier's mm nor the lock that its invalidate callback takes.
 * Return:
 * * 0 - all steps were committed
 * * -EBUSY - a step was invalidated for longer than @timeout, or got no farther for
 *   ten times as long, see hmm_range_fault_unlocked_timeout()
 * * what &hmm_commit_ops.commit returned, if that was not 0
 * * for other errors, see hmm_range_fault_unlocked_timeout(); there is always room
 *   for the requests of a step
 *
 * After an error, the steps that were committed stay so. What hmm_pfns holds
 * for the others means nothing but its sticky bits.
 */
int hmm_range_fault_each(struct hmm_range *range, unsigned long timeout,
			 const struct hmm_commit_ops *ops)
{
	return hmm_fill_steps(range, timeout, ops);
}
EXPORT_SYMBOL(hmm_range_fault_each);
