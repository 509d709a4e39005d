// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Heterogeneous memory management: the walker
 *
 * Looks up what the CPU page tables hold for a range of a process, faulting
 * pages in as asked, so that a device can mirror it. This file reads from top
 * to bottom: requests, storing, classifying entries, resolving, the walk's
 * callbacks, faulting, and the two calls.
 */
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
 * fault is handled for that one page and only as strongly as it asked, and
 * the walk goes on at the cursor. An output with %HMM_PFN_ERROR cannot be
 * mended by a fault, so a need turns it into an error of the call.
 *
 * Faults are also how the walk waits for what is in the way, such as a
 * migration: the fault handler knows how to wait for it.
 *
 * Invariants:
 *
 * - Below the cursor &hmm_range.hmm_pfns holds outputs, at and above it what
 *   the caller passed in. The walk never takes an output for a request: when
 *   it has to begin again, it puts the requests back first.
 * - Sticky bits are kept by every store.
 * - No page table lock and no hugetlb VMA lock is held across a fault.
 * - All pages of a large entry that lie inside the range are stored together.
 *
 * A fault can invalidate the range itself, breaking copy-on-write for one. A
 * walk that stopped there would have to begin again for every such page, so
 * the sequence is compared once, when the whole range has been faulted in:
 * what was stored is stale then, but the next walk finds nothing to fault.
 */

/* The parts of an element that are requests. */
#define HMM_REQUESTS	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

/* The parts of an element that outlive every store. */
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/*
 * What a callback returns to end the walk so that a fault can be handled.
 * Positive, as the page walker's channel to its caller is.
 */
#define HMM_WALK_FAULT	1

/**
 * struct hmm_walk - the state of one call
 * @range: the caller's range
 * @mm: the address space, that of the range's notifier
 * @requests: what the caller passed in &hmm_range.hmm_pfns; NULL if the walk
 *	never has to begin again, or if no element counts as a request
 * @cursor: address of the first page without an output
 * @vma: where to handle a fault, valid while the mmap lock stays held
 * @addr: the page to handle a fault for
 * @need: what that page's request lacks
 * @tried: the page whose fault last dropped the mmap lock
 * @excused: jiffies spent on something else than invalidations
 * @may_unlock: the mmap lock is HMM's own and may be dropped by faults
 * @locked: the mmap lock is held
 *
 * @vma, @addr and @need are set by the callback that returns %HMM_WALK_FAULT.
 */
struct hmm_walk {
	struct hmm_range	*range;
	struct mm_struct	*mm;
	unsigned long		*requests;
	unsigned long		cursor;
	struct vm_area_struct	*vma;
	unsigned long		addr;
	unsigned long		need;
	unsigned long		tried;
	unsigned long		excused;
	bool			may_unlock;
	bool			locked;
};

/* Requests */

static unsigned long hmm_index(const struct hmm_range *range, unsigned long addr)
{
	return (addr - range->start) >> PAGE_SHIFT;
}

static unsigned long *hmm_element(const struct hmm_range *range, unsigned long addr)
{
	return &range->hmm_pfns[hmm_index(range, addr)];
}

/* Do the elements of hmm_pfns have a say in what is requested? */
static bool hmm_has_page_requests(const struct hmm_range *range)
{
	return range->pfn_flags_mask & ~range->default_flags & HMM_REQUESTS;
}

static unsigned long hmm_request(const struct hmm_range *range, unsigned long addr)
{
	return (*hmm_element(range, addr) & range->pfn_flags_mask) | range->default_flags;
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

/* The first page of [@start, @end) whose request @out does not meet, or @end. */
static unsigned long hmm_first_need(const struct hmm_range *range, unsigned long start,
				    unsigned long end, unsigned long out)
{
	if (!hmm_has_page_requests(range))
		return hmm_need(range->default_flags, out) ? start : end;

	while (start < end && !hmm_need(hmm_request(range, start), out))
		start += PAGE_SIZE;
	return start;
}

/* Storing */

static void hmm_store_page(unsigned long *element, unsigned long out)
{
	*element = (*element & HMM_STICKY) | out;
}

/* Store outputs for [@start, @end), where @out is that of the first page. */
static void hmm_store(struct hmm_walk *w, unsigned long start, unsigned long end,
		      unsigned long out)
{
	unsigned long *element = hmm_element(w->range, start);
	unsigned long step = out & HMM_PFN_VALID ? 1 : 0;

	for (; start < end; start += PAGE_SIZE, out += step)
		hmm_store_page(element++, out);
	w->cursor = end;
}

/*
 * Begin again: make all outputs requests, as they were passed in. The sticky
 * bits are taken as they are now, because a driver may have cleared some in
 * the invalidation that is the reason for this.
 */
static void hmm_rewind(struct hmm_walk *w)
{
	unsigned long i, npages = hmm_index(w->range, w->cursor);
	unsigned long *pfns = w->range->hmm_pfns;

	for (i = 0; i < npages; i++) {
		pfns[i] &= HMM_STICKY;
		if (w->requests)
			pfns[i] |= w->requests[i] & ~HMM_STICKY;
	}
	w->cursor = w->range->start;
}

/* Classifying: from an entry to the output of the first page that it maps */

static unsigned long hmm_out_valid(unsigned long pfn, bool writable, unsigned int order)
{
	unsigned long out = HMM_PFN_VALID | pfn;

	if (writable)
		out |= HMM_PFN_WRITE;
	return out | ((unsigned long)order << HMM_PFN_ORDER_SHIFT);
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

static unsigned long hmm_out_device_private(const struct hmm_walk *w, softleaf_t leaf,
					    unsigned int order)
{
	if (!hmm_owns(w, leaf))
		return 0;
	return hmm_out_valid(softleaf_to_pfn(leaf),
			     softleaf_is_device_private_write(leaf), order);
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
static unsigned long hmm_out_softleaf(const struct hmm_walk *w, softleaf_t leaf,
				      unsigned int order)
{
	switch (softleaf_type(leaf)) {
	case SOFTLEAF_SWAP:
	case SOFTLEAF_MIGRATION_READ:
	case SOFTLEAF_MIGRATION_READ_EXCLUSIVE:
	case SOFTLEAF_MIGRATION_WRITE:
	case SOFTLEAF_DEVICE_EXCLUSIVE:
		return 0;
	case SOFTLEAF_DEVICE_PRIVATE_READ:
	case SOFTLEAF_DEVICE_PRIVATE_WRITE:
		return hmm_out_device_private(w, leaf, order);
	case SOFTLEAF_MARKER:
		return hmm_out_marker(leaf);
	case SOFTLEAF_HWPOISON:
	case SOFTLEAF_NONE:
		break;
	}
	return HMM_PFN_ERROR;
}

static unsigned long hmm_out_pte(struct mm_walk *walk, unsigned long addr, pte_t pte)
{
	if (pte_none(pte))
		return 0;
	if (!pte_present(pte))
		return hmm_out_softleaf(walk->private, softleaf_from_pte(pte), 0);
	if (pte_protnone(pte))
		return 0;
	if (!vm_normal_page(walk->vma, addr, pte) && !is_zero_pfn(pte_pfn(pte)))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pte_pfn(pte), pte_write(pte), 0);
}

static unsigned long hmm_out_pmd(struct mm_walk *walk, unsigned long addr, pmd_t pmd)
{
	if (!pmd_present(pmd))
		return hmm_out_softleaf(walk->private, softleaf_from_pmd(pmd), PMD_ORDER);
	if (pmd_protnone(pmd))
		return 0;
	if (!vm_normal_page_pmd(walk->vma, addr, pmd) && !is_huge_zero_pmd(pmd))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pmd_pfn(pmd), pmd_write(pmd), PMD_ORDER);
}

static unsigned long hmm_out_pud(struct mm_walk *walk, unsigned long addr, pud_t pud)
{
	if (!vm_normal_page_pud(walk->vma, addr, pud))
		return HMM_PFN_ERROR;
	return hmm_out_valid(pud_pfn(pud), pud_write(pud), PUD_ORDER);
}

/* Resolving: where the output of an entry meets the requests of its pages */

/*
 * The page at @addr has a need that its output @out leaves. Decide what comes
 * of it: a fault, or the error that says why a fault would not help.
 */
static int hmm_stop(struct mm_walk *walk, unsigned long addr, unsigned long out)
{
	struct hmm_walk *w = walk->private;

	if (out & HMM_PFN_ERROR)
		return -EFAULT;

	w->need = hmm_need(hmm_request(w->range, addr), out);
	if ((w->need & HMM_PFN_REQ_WRITE) && !(walk->vma->vm_flags & VM_WRITE))
		return -EPERM;

	w->vma = walk->vma;
	w->addr = addr;
	return HMM_WALK_FAULT;
}

/* Pages [@start, @end) each have an entry of their own, or none: all alike. */
static int hmm_resolve_pages(struct mm_walk *walk, unsigned long start,
			     unsigned long end, unsigned long out)
{
	struct hmm_walk *w = walk->private;
	unsigned long stop = hmm_first_need(w->range, start, end, out);

	hmm_store(w, start, stop, out);
	return stop < end ? hmm_stop(walk, stop, out) : 0;
}

/*
 * One entry of @order maps pages [@start, @end), and @out is the output of the
 * first page that it maps, which may lie below @start.
 *
 * If it lies below and still inside the range, the pages up to @start were
 * stored while there was no entry, and a fault for @start has brought this
 * one: they are stored anew, for they are mapped as @start is.
 */
static int hmm_resolve_leaf(struct mm_walk *walk, unsigned long start,
			    unsigned long end, unsigned int order,
			    unsigned long out)
{
	unsigned long base = ALIGN_DOWN(start, PAGE_SIZE << order);
	struct hmm_walk *w = walk->private;
	unsigned long first = max(base, w->range->start);
	unsigned long stop = hmm_first_need(w->range, start, end, out);

	if (stop < end)
		return hmm_stop(walk, stop, out);

	if (out & HMM_PFN_VALID)
		out += (first - base) >> PAGE_SHIFT;
	hmm_store(w, first, end, out);
	return 0;
}

/* The callbacks: each takes and releases its own page table lock */

/* Refused as a whole, whatever the page tables hold. */
static bool hmm_vma_refused(struct vm_area_struct *vma)
{
	/* Whoever may not read may not write: there is no write-only memory. */
	return vma->vm_flags & (VM_IO | VM_PFNMAP) ||
	       !(vma->vm_flags & VM_READ) || vma_is_secretmem(vma);
}

static int hmm_test_walk(unsigned long start, unsigned long end, struct mm_walk *walk)
{
	if (!hmm_vma_refused(walk->vma))
		return 0;
	/* One tells the page walker to skip the VMA. */
	return hmm_resolve_pages(walk, start, end, HMM_PFN_ERROR) ?: 1;
}

/* There is no entry, or, without a VMA, nothing that could have one. */
static int hmm_pte_hole(unsigned long start, unsigned long end,
			__always_unused int depth, struct mm_walk *walk)
{
	return hmm_resolve_pages(walk, start, end, walk->vma ? 0 : HMM_PFN_ERROR);
}

static int hmm_pte_range(pmd_t *pmdp, unsigned long start, unsigned long end,
			 struct mm_walk *walk)
{
	struct hmm_walk *w = walk->private;
	unsigned long addr, out;
	pte_t *first, *ptep;
	spinlock_t *ptl;
	int ret = 0;

	first = pte_offset_map_lock(walk->mm, pmdp, start, &ptl);
	if (!first) {
		walk->action = ACTION_AGAIN;
		return 0;
	}
	for (addr = start, ptep = first; addr < end; addr += PAGE_SIZE, ptep++) {
		out = hmm_out_pte(walk, addr, ptep_get(ptep));
		if (hmm_need(hmm_request(w->range, addr), out)) {
			ret = hmm_stop(walk, addr, out);
			break;
		}
		hmm_store_page(hmm_element(w->range, addr), out);
	}
	w->cursor = addr;
	pte_unmap_unlock(first, ptl);
	return ret;
}

static int hmm_pmd_entry(pmd_t *pmdp, unsigned long start, unsigned long end,
			 struct mm_walk *walk)
{
	spinlock_t *ptl;
	pmd_t pmd;
	int ret;

	cond_resched();

	ptl = pmd_trans_huge_lock(pmdp, walk->vma);
	if (ptl) {
		ret = hmm_resolve_leaf(walk, start, end, PMD_ORDER,
				       hmm_out_pmd(walk, start, pmdp_get(pmdp)));
		spin_unlock(ptl);
		return ret;
	}

	/* What was huge a moment ago may be gone, and what was not may be now. */
	pmd = pmdp_get_lockless(pmdp);
	if (pmd_none(pmd))
		return hmm_pte_hole(start, end, -1, walk);
	if (IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) &&
	    (!pmd_present(pmd) || pmd_trans_huge(pmd))) {
		walk->action = ACTION_AGAIN;
		return 0;
	}
	/* Mapping the PTEs would clear a bad entry, which is not ours to do. */
	if (pmd_bad(pmd))
		return hmm_resolve_pages(walk, start, end, HMM_PFN_ERROR);
	return hmm_pte_range(pmdp, start, end, walk);
}

static int hmm_pud_entry(pud_t *pudp, unsigned long start, unsigned long end,
			 struct mm_walk *walk)
{
	spinlock_t *ptl;
	pud_t pud;
	int ret;

	ptl = pud_trans_huge_lock(pudp, walk->vma);
	if (ptl) {
		walk->action = ACTION_CONTINUE;
		ret = hmm_resolve_leaf(walk, start, end, PUD_ORDER,
				       hmm_out_pud(walk, start, pudp_get(pudp)));
		spin_unlock(ptl);
		return ret;
	}

	pud = pudp_get(pudp);
	if (pud_trans_huge(pud)) {
		walk->action = ACTION_AGAIN;
		return 0;
	}
	if (!pud_none(pud) && !pud_bad(pud))
		return 0;

	/* The page walker would descend, and never get past a bad entry. */
	walk->action = ACTION_CONTINUE;
	return hmm_resolve_pages(walk, start, end, pud_none(pud) ? 0 : HMM_PFN_ERROR);
}

#ifdef CONFIG_HUGETLB_PAGE
static unsigned long hmm_out_hugetlb(const struct hmm_walk *w, pte_t pte,
				     unsigned int order)
{
	if (huge_pte_none(pte))
		return 0;
	if (!pte_present(pte))
		return hmm_out_softleaf(w, softleaf_from_pte(pte), order);
	if (pte_protnone(pte))
		return 0;
	return hmm_out_valid(pte_pfn(pte), huge_pte_write(pte), order);
}

/* The page walker holds the hugetlb VMA lock and releases it. */
static int hmm_hugetlb_entry(pte_t *ptep, unsigned long hmask,
			     unsigned long start, unsigned long end,
			     struct mm_walk *walk)
{
	struct hstate *h = hstate_vma(walk->vma);
	unsigned int order = huge_page_order(h);
	spinlock_t *ptl;
	pte_t pte;
	int ret;

	cond_resched();

	ptl = huge_pte_lock(h, walk->mm, ptep);
	pte = huge_ptep_get(walk->mm, start & hmask, ptep);
	ret = hmm_resolve_leaf(walk, start, end, order,
			       hmm_out_hugetlb(walk->private, pte, order));
	spin_unlock(ptl);
	return ret;
}
#else
#define hmm_hugetlb_entry	NULL
#endif

static const struct mm_walk_ops hmm_walk_ops = {
	.test_walk	= hmm_test_walk,
	.pte_hole	= hmm_pte_hole,
	.pud_entry	= hmm_pud_entry,
	.pmd_entry	= hmm_pmd_entry,
	.hugetlb_entry	= hmm_hugetlb_entry,
	.walk_lock	= PGWALK_RDLOCK,
};

/* Faulting */

static unsigned int hmm_fault_flags(const struct hmm_walk *w)
{
	unsigned int flags = FAULT_FLAG_REMOTE;

	if (w->need & HMM_PFN_REQ_WRITE)
		flags |= FAULT_FLAG_WRITE;
	if (w->may_unlock)
		flags |= FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_KILLABLE;
	if (w->tried == w->addr)
		flags |= FAULT_FLAG_TRIED;
	return flags;
}

/*
 * Handle the fault that the walk stopped for. The mmap lock is held on entry.
 * On return it is what w->locked says: it may have been dropped on success,
 * when it is HMM's own.
 */
static int hmm_fault(struct hmm_walk *w)
{
	unsigned long began = jiffies;
	vm_fault_t fault;

	fault = handle_mm_fault(w->vma, w->addr, hmm_fault_flags(w), NULL);
	w->excused += jiffies - began;

	if (fault & (VM_FAULT_COMPLETED | VM_FAULT_RETRY)) {
		if (WARN_ON_ONCE(!w->may_unlock))
			return -EFAULT;
		w->tried = w->addr;
		w->locked = false;
		return 0;
	}
	if (fault & VM_FAULT_ERROR)
		return vm_fault_to_errno(fault, 0) ?: -EFAULT;
	return 0;
}

/*
 * Have the mmap lock held, on success. A caller who holds it himself is never
 * interrupted: nothing that he waits for can drop it.
 */
static int hmm_lock(struct hmm_walk *w)
{
	unsigned long began = jiffies;

	if (!w->may_unlock)
		return 0;
	if (fatal_signal_pending(current))
		return -EINTR;
	if (w->locked)
		return 0;

	if (mmap_read_lock_killable(w->mm))
		return -EINTR;
	w->excused += jiffies - began;
	w->locked = true;
	return check_stable_address_space(w->mm) ? -EFAULT : 0;
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
 * Fill the range from the cursor to its end. The mmap lock is what w->locked
 * says, on entry and on return.
 *
 * Return: 0, -EBUSY if the range was invalidated meanwhile, or what else the
 * calls return.
 */
static int hmm_fill(struct hmm_walk *w)
{
	struct hmm_range *range = w->range;
	int ret;

	for (;;) {
		ret = hmm_lock(w);
		if (ret)
			return ret;
		ret = walk_page_range(w->mm, w->cursor, range->end,
				      &hmm_walk_ops, w);
		if (ret != HMM_WALK_FAULT)
			break;
		ret = hmm_fault(w);
		if (ret)
			return ret;
	}
	if (!ret && mmu_interval_check_retry(range->notifier, range->notifier_seq))
		return -EBUSY;
	return ret;
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
 * * -EPERM - a write was requested of a page in a VMA without VM_WRITE
 * * -EFAULT - a page with a request cannot be accessed, see %HMM_PFN_ERROR,
 *   or its fault failed for good
 * * -ENOMEM - a fault ran out of memory
 * * -EBUSY - the range was invalidated since mmu_interval_read_begin()
 *
 * After an error other than -EINVAL a part of hmm_pfns holds outputs, which
 * mean nothing. Sticky bits are what they were.
 */
int hmm_range_fault(struct hmm_range *range)
{
	struct hmm_walk w = {
		.range	= range,
		.cursor	= range->start,
		.tried	= ULONG_MAX,
		.locked	= true,
	};
	int ret;

	ret = hmm_check(range);
	if (ret)
		return ret;

	w.mm = range->notifier->mm;
	mmap_assert_locked(w.mm);

	if (mmu_interval_check_retry(range->notifier, range->notifier_seq))
		return -EBUSY;
	return hmm_fill(&w);
}
EXPORT_SYMBOL(hmm_range_fault);

/* Keep a copy of the requests, if there are any to keep. */
static int hmm_save_requests(struct hmm_walk *w)
{
	const struct hmm_range *range = w->range;
	size_t npages = hmm_index(range, range->end);

	if (!hmm_has_page_requests(range))
		return 0;

	w->requests = kvmalloc_array(npages, sizeof(*w->requests),
				     GFP_KERNEL | __GFP_NOWARN);
	if (!w->requests)
		return -ENOMEM;
	memcpy(w->requests, range->hmm_pfns, npages * sizeof(*w->requests));
	return 0;
}

/* Fill the range once. The mmap lock is not held on entry, nor on return. */
static int hmm_fill_unlocked(struct hmm_walk *w)
{
	int ret;

	hmm_rewind(w);
	w->range->notifier_seq = mmu_interval_read_begin(w->range->notifier);
	ret = hmm_fill(w);
	if (w->locked)
		mmap_read_unlock(w->mm);
	w->locked = false;
	return ret;
}

/* Fill the range until it stays as it is for a whole walk. */
static int hmm_fill_retry(struct hmm_walk *w, unsigned long timeout)
{
	unsigned long began = jiffies;
	int ret;

	do {
		ret = hmm_fill_unlocked(w);
		if (ret != -EBUSY)
			return ret;
	} while (!timeout || jiffies - began - w->excused < timeout);
	return -EBUSY;
}

/**
 * hmm_range_fault_unlocked_timeout() - look up a range, with all retrying done
 * @range: what to look up. &hmm_range.hmm_pfns holds the requests;
 *	&hmm_range.notifier_seq is set by the call, and is what the caller
 *	hands to mmu_interval_read_retry().
 * @timeout: for how long invalidations may keep the call from finishing, in
 *	jiffies, or 0 for as long as it takes. Time spent handling faults or
 *	waiting for the mmap lock does not count, and at least one walk is
 *	always made to the end.
 *
 * Does what hmm_range_fault() does, and all around it: takes the mmap lock,
 * lets fault handlers drop it, and looks again when the range was invalidated
 * meanwhile. Work that a dropped lock interrupts goes on where it was.
 *
 * On success the caller takes the lock that its invalidate callback takes and
 * calls mmu_interval_read_retry(): if that returns false, the outputs hold
 * for as long as the lock is held. If it returns true, call again, with the
 * requests filled in again.
 *
 * Context: Process context, may sleep. The caller holds neither the mmap lock
 *	of the notifier's mm nor the lock that its invalidate callback takes.
 * Return: As hmm_range_fault(), with these differences:
 * * -EFAULT - also when the process is gone or was reaped by the OOM killer
 * * -ENOMEM - also when there is no memory to keep requests in
 * * -EBUSY - the range was invalidated for longer than @timeout
 * * -EINTR - the calling task has a fatal signal pending
 */
int hmm_range_fault_unlocked_timeout(struct hmm_range *range,
				     unsigned long timeout)
{
	struct hmm_walk w = {
		.range		= range,
		.cursor		= range->start,
		.tried		= ULONG_MAX,
		.may_unlock	= true,
	};
	int ret;

	ret = hmm_check(range);
	if (ret)
		return ret;

	w.mm = range->notifier->mm;
	if (!mmget_not_zero(w.mm))
		return -EFAULT;

	ret = hmm_save_requests(&w);
	if (!ret)
		ret = hmm_fill_retry(&w, timeout);
	kvfree(w.requests);

	/*
	 * If this is the last user, tearing down the address space calls the
	 * notifier, which may wait for the very work that this is called from.
	 */
	mmput_async(w.mm);
	return ret;
}
EXPORT_SYMBOL(hmm_range_fault_unlocked_timeout);
