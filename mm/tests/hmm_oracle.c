// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What HMM has to find, found in another way
 *
 * For tests to compare with. It takes one page at a time, goes down the page
 * tables anew for each, and shares no code with the walker: present pages are
 * looked up with folio_walk_start(), and the kinds of all other entries are
 * tried one after the other.
 */
#include <linux/export.h>
#include <linux/hmm.h>
#include <linux/hugetlb.h>
#include <linux/leafops.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/pagewalk.h>
#include <linux/secretmem.h>
#include <linux/swap.h>
#include <linux/syscalls.h>
#include <linux/userfaultfd_k.h>

#include <asm/tlb.h>

#include "../internal.h"
#include "hmm_oracle.h"

static const struct hmm_oracle oracle_empty;
static const struct hmm_oracle oracle_error = { .out = HMM_PFN_ERROR };

/**
 * struct oracle_page - the page that is looked up
 * @vma: which maps it
 * @addr: of the page
 * @owner: whose device-private memory counts as valid
 */
struct oracle_page {
	struct vm_area_struct *vma;
	unsigned long addr;
	void *owner;
};

static struct hmm_oracle oracle_valid(unsigned long pfn, bool write,
				      unsigned long size)
{
	struct hmm_oracle oracle = { .out = HMM_PFN_VALID | pfn };
	unsigned long order = ilog2(size) - PAGE_SHIFT;

	if (write)
		oracle.out |= HMM_PFN_WRITE;
	oracle.out |= order << HMM_PFN_ORDER_SHIFT;
	return oracle;
}

/* A page that has an entry of its own may be part of a larger whole. */
static struct hmm_oracle oracle_single(struct hmm_oracle oracle)
{
	oracle.folio = pfn_folio(oracle.out & ~HMM_PFN_FLAGS);
	return oracle;
}

static unsigned long oracle_offset(unsigned long addr, unsigned long size)
{
	return (addr % size) >> PAGE_SHIFT;
}

static struct hmm_oracle oracle_present(struct folio_walk *fw,
					struct vm_area_struct *vma,
					unsigned long addr)
{
	bool hugetlb = is_vm_hugetlb_page(vma);

	switch (fw->level) {
	case FW_LEVEL_PTE:
		if (pte_protnone(fw->pte))
			return oracle_empty;
		if (!hugetlb)
			return oracle_single(oracle_valid(pte_pfn(fw->pte),
							  pte_write(fw->pte), PAGE_SIZE));
		return oracle_valid(pte_pfn(fw->pte), pte_write(fw->pte),
				    vma_kernel_pagesize(vma));
	case FW_LEVEL_PMD:
		if (pmd_protnone(fw->pmd))
			return oracle_empty;
		return oracle_valid(pmd_pfn(fw->pmd) + oracle_offset(addr, PMD_SIZE),
				    pmd_write(fw->pmd),
				    hugetlb ? vma_kernel_pagesize(vma) : PMD_SIZE);
	case FW_LEVEL_PUD:
		return oracle_valid(pud_pfn(fw->pud) + oracle_offset(addr, PUD_SIZE),
				    pud_write(fw->pud), PUD_SIZE);
	}
	return oracle_error;
}

/*
 * The bit of userfaultfd stands for a protection that the CPU would have to obey,
 * and so has a device to that has the page to itself.
 */
static struct hmm_oracle oracle_private(const struct oracle_page *p, softleaf_t leaf,
					unsigned long size, bool uffd)
{
	bool write = softleaf_is_device_private_write(leaf) && !uffd;
	struct page *page = softleaf_to_page(leaf);
	struct hmm_oracle oracle;

	if (!p->owner || page_pgmap(page)->owner != p->owner)
		return oracle_empty;
	if (uffd && userfaultfd_rwp(p->vma))
		return oracle_empty;
	oracle = oracle_valid(page_to_pfn(page) + oracle_offset(p->addr, size), write, size);
	return size == PAGE_SIZE ? oracle_single(oracle) : oracle;
}

/* One marker can say several things. */
static bool oracle_only_uffd_wp(softleaf_t leaf)
{
	return softleaf_is_uffd_wp_marker(leaf) &&
	       !softleaf_is_guard_marker(leaf) && !softleaf_is_poison_marker(leaf);
}

static struct hmm_oracle oracle_leaf(const struct oracle_page *p, softleaf_t leaf,
				     unsigned long size, bool uffd)
{
	struct hmm_oracle oracle = oracle_empty;

	if (softleaf_is_device_private(leaf))
		return oracle_private(p, leaf, size, uffd);
	if (softleaf_is_device_exclusive(leaf))
		oracle.exclusive = softleaf_to_page(leaf);
	else if (!softleaf_is_swap(leaf) && !softleaf_is_migration(leaf) &&
		 !oracle_only_uffd_wp(leaf))
		return oracle_error;
	return oracle;
}

/* A present entry that gets here has no page that anybody may use. */
static struct hmm_oracle oracle_pte(const struct oracle_page *p, pte_t pte,
				    unsigned long size)
{
	if (pte_none(pte))
		return oracle_empty;
	if (pte_present(pte))
		return oracle_error;
	return oracle_leaf(p, softleaf_from_pte(pte), size, pte_swp_uffd(pte));
}

static struct hmm_oracle oracle_hugetlb(const struct oracle_page *p)
{
	unsigned long size = vma_kernel_pagesize(p->vma);
	struct hmm_oracle oracle = oracle_empty;
	pte_t *ptep;

	hugetlb_vma_lock_read(p->vma);
	ptep = hugetlb_walk(p->vma, ALIGN_DOWN(p->addr, size), size);
	if (ptep)
		oracle = oracle_pte(p, huge_ptep_get(p->vma->vm_mm, p->addr, ptep), size);
	hugetlb_vma_unlock_read(p->vma);
	return oracle;
}

static struct hmm_oracle oracle_table(const struct oracle_page *p, pmd_t *pmdp)
{
	pte_t *ptep = pte_offset_map(pmdp, p->addr);
	pte_t pte;

	if (!ptep)
		return oracle_empty;
	pte = ptep_get(ptep);
	pte_unmap(ptep);
	return oracle_pte(p, pte, PAGE_SIZE);
}

static struct hmm_oracle oracle_pmd(const struct oracle_page *p, pmd_t *pmdp)
{
	pmd_t pmd = pmdp_get_lockless(pmdp);

	if (pmd_none(pmd))
		return oracle_empty;
	if (!pmd_present(pmd))
		return oracle_leaf(p, softleaf_from_pmd(pmd), PMD_SIZE, pmd_swp_uffd(pmd));
	if (pmd_leaf(pmd) || pmd_bad(pmd))
		return oracle_error;
	return oracle_table(p, pmdp);
}

static struct hmm_oracle oracle_absent(const struct oracle_page *p)
{
	pgd_t *pgdp = pgd_offset(p->vma->vm_mm, p->addr);
	p4d_t *p4dp;
	pud_t *pudp;

	if (is_vm_hugetlb_page(p->vma))
		return oracle_hugetlb(p);
	if (pgd_none(pgdp_get(pgdp)))
		return oracle_empty;
	p4dp = p4d_offset(pgdp, p->addr);
	if (p4d_none(p4dp_get(p4dp)))
		return oracle_empty;
	pudp = pud_offset(p4dp, p->addr);
	if (pud_none(pudp_get(pudp)))
		return oracle_empty;
	if (pud_leaf(pudp_get(pudp)) || pud_bad(pudp_get(pudp)))
		return oracle_error;
	return oracle_pmd(p, pmd_offset(pudp, p->addr));
}

static bool oracle_no_device(struct vm_area_struct *vma)
{
	if (!vma)
		return true;
	if (vma->vm_flags & VM_IO || vma->vm_flags & VM_PFNMAP)
		return true;
	if (!(vma->vm_flags & VM_READ))
		return true;
	return vma_is_secretmem(vma);
}

/**
 * hmm_oracle() - look up a page without HMM
 * @mm: address space
 * @addr: of the page
 * @owner: whose device-private memory counts as valid, NULL for nobody's
 *
 * Context: The mmap lock of @mm is held. What is found holds as long as nothing
 *	changes the entry: that is for the caller to see to, with a notifier.
 * Return: what a walk that requests nothing has to find.
 */
struct hmm_oracle hmm_oracle(struct mm_struct *mm, unsigned long addr,
			     void *owner)
{
	struct oracle_page p = { .addr = addr, .owner = owner };
	struct hmm_oracle oracle;
	struct folio_walk fw;

	mmap_assert_locked(mm);

	p.vma = vma_lookup(mm, addr);
	if (oracle_no_device(p.vma))
		return oracle_error;
	if (folio_walk_start(&fw, p.vma, addr, FW_ZEROPAGE)) {
		oracle = oracle_present(&fw, p.vma, addr);
		folio_walk_end(&fw, p.vma);
	} else {
		oracle = oracle_absent(&p);
	}
	if (p.vma->vm_flags & VM_SHADOW_STACK)
		oracle.out &= ~HMM_PFN_WRITE;
	return oracle;
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle, "test_hmm,hmm_walk_test,hmm_dma_test");

static bool oracle_is_block(const struct hmm_oracle *oracles, unsigned long npages)
{
	unsigned long i;

	for (i = 0; i < npages; i++)
		if (!oracles[i].folio || oracles[i].folio != oracles[0].folio ||
		    oracles[i].out != oracles[0].out + i)
			return false;
	return (oracles[0].out & ~HMM_PFN_FLAGS) % npages == 0;
}

/* What has an order is single no longer. */
static void oracle_set_order(struct hmm_oracle *oracles, unsigned long order)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i++) {
		oracles[i].out |= order << HMM_PFN_ORDER_SHIFT;
		oracles[i].folio = NULL;
	}
}

/**
 * hmm_oracle_join() - find out which pages HMM has to give orders to
 * @oracles: what hmm_oracle() returned for each page, and is changed here
 * @addr: of the first page
 * @npages: how many there are: all of the range that HMM is asked for, up to
 *	where it stopped
 *
 * Pages of one folio that have PTEs of their own count as one mapping where
 * they are an aligned block in both memory and the address space, all with the
 * same rights, of four pages or more.
 *
 * Context: Any.
 */
void hmm_oracle_join(struct hmm_oracle *oracles, unsigned long addr,
		     unsigned long npages)
{
	unsigned long vpn = addr >> PAGE_SHIFT, order, size, i;

	for (order = PMD_ORDER; order >= 2; order--) {
		size = 1UL << order;
		for (i = ALIGN(vpn, size) - vpn; i + size <= npages; i += size)
			if (oracle_is_block(&oracles[i], size))
				oracle_set_order(&oracles[i], order);
	}
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle_join, "test_hmm,hmm_walk_test");

/**
 * hmm_oracle_page_out() - have a page written to swap
 * @addr: of a page of the calling task that is anonymous memory
 *
 * For tests to have a swap entry that can be faulted.
 *
 * Context: The mmap lock is not held.
 * Return: whether it is out.
 */
bool hmm_oracle_page_out(unsigned long addr)
{
	struct folio *folio;
	struct page *page;
	LIST_HEAD(folios);

	if (get_user_pages_unlocked(addr, 1, &page, 0) != 1)
		return false;
	folio = page_folio(page);
	lru_add_drain();
	if (folio_isolate_lru(folio))
		list_add(&folio->lru, &folios);
	folio_put(folio);
	return reclaim_pages(&folios) == 1;
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle_page_out, "hmm_walk_test");

/**
 * hmm_oracle_madvise() - have memory taken away, or be of a kind
 * @mm: address space
 * @start: first address
 * @size: how many bytes
 * @advice: as madvise() takes it
 *
 * Context: The mmap lock is not held.
 * Return: what madvise() would return.
 */
int hmm_oracle_madvise(struct mm_struct *mm, unsigned long start, unsigned long size,
		       int advice)
{
	return do_madvise(mm, start, size, advice);
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle_madvise, "hmm_dma_test");

/**
 * hmm_oracle_write_protect() - have private memory be read-only until it is written
 * @mm: address space
 * @start: first address
 * @size: how many bytes
 *
 * For tests to have entries as a fork leaves them. Unlike what it does to pages of
 * another process, a fault makes them writable again, and invalidates nothing.
 *
 * Context: The mmap lock is not held.
 */
void hmm_oracle_write_protect(struct mm_struct *mm, unsigned long start, unsigned long size)
{
	unsigned long end = start + size;
	struct vm_area_struct *vma;
	struct mmu_gather tlb;

	VMA_ITERATOR(vmi, mm, start);

	mmap_read_lock(mm);
	for_each_vma_range(vmi, vma, end) {
		tlb_gather_mmu(&tlb, mm);
		change_protection(&tlb, vma, max(start, vma->vm_start), min(end, vma->vm_end), 0);
		tlb_finish_mmu(&tlb);
	}
	mmap_read_unlock(mm);
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle_write_protect, "hmm_dma_test");

#ifdef CONFIG_HUGETLB_PAGE
/**
 * hmm_oracle_mmap_hugetlb() - map huge pages of the size that a PMD maps
 * @start: where, aligned to that
 * @size: how many bytes, aligned as well
 *
 * Context: As mmap(), in the calling thread's address space.
 * Return: where they are, or a negative errno.
 */
unsigned long hmm_oracle_mmap_hugetlb(unsigned long start, unsigned long size)
{
	return ksys_mmap_pgoff(start, size, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_HUGETLB |
			       PMD_SHIFT << MAP_HUGE_SHIFT, -1, 0);
}
EXPORT_SYMBOL_FOR_MODULES(hmm_oracle_mmap_hugetlb, "hmm_dma_test");
#endif
