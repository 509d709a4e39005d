// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A small address space to walk, with entries of every kind
 */
#include <kunit/resource.h>
#include <linux/delay.h>
#include <linux/hugetlb.h>
#include <linux/ioport.h>
#include <linux/leafops.h>
#include <linux/memremap.h>
#include <linux/mman.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/swap.h>
#include <linux/swapops.h>
#include <linux/topology.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>

#include "hmm_oracle.h"
#include "hmm_world.h"

/* A pfn that is that of no page. */
#define HMM_NO_PAGE	BIT(BITS_PER_LONG / 2)

/* A pfn that is that of a page, but not of one that anybody maps. */
#define HMM_SOME_PAGE	0UL

/* The notifier */

static bool hmm_world_invalidate(struct mmu_interval_notifier *notifier,
				 const struct mmu_notifier_range *range, unsigned long seq)
{
	struct hmm_world *w = container_of(notifier, struct hmm_world, notifier);

	mutex_lock(&w->device);
	mmu_interval_set_seq(notifier, seq);
	mutex_unlock(&w->device);
	return true;
}

static const struct mmu_interval_notifier_ops hmm_world_notifier_ops = {
	.invalidate = hmm_world_invalidate,
};

/* Have the notifier cover these @size bytes, and nothing else. */
void hmm_world_watch(struct hmm_world *w, unsigned long start, unsigned long size)
{
	int ret;

	if (w->notifier.mm)
		mmu_interval_notifier_remove(&w->notifier);
	w->notifier.mm = NULL;
	ret = mmu_interval_notifier_insert(&w->notifier, w->mm, start, size,
					   &hmm_world_notifier_ops);
	KUNIT_ASSERT_EQ(w->test, ret, 0);
}

/* The memory of two devices, a few pages each */

#ifdef CONFIG_DEVICE_PRIVATE
#define HMM_DEVICE_SIZE	BIT(PA_SECTION_SHIFT)
#define HMM_DEVICE_PAGES	8

struct hmm_device {
	struct dev_pagemap pagemap;
	struct page *pages;
};

static struct hmm_device hmm_own, hmm_other;

static void hmm_unplant(struct hmm_world *w, unsigned long page);

/* Moving back is putting back the entry that was there before. */
static vm_fault_t hmm_device_to_ram(struct vm_fault *vmf)
{
	struct hmm_world *w = vmf->page->zone_device_data;

	if (w->leaf.has_planted)
		hmm_world_unplant_leaf(w);
	else
		hmm_unplant(w, (vmf->address - w->base) >> PAGE_SHIFT);
	return 0;
}

static void hmm_device_free(struct folio *folio)
{
}

static const struct dev_pagemap_ops hmm_device_ops = {
	.folio_free	= hmm_device_free,
	.migrate_to_ram	= hmm_device_to_ram,
};

static int hmm_device_create(struct hmm_device *device)
{
	struct dev_pagemap *pagemap = &device->pagemap;
	struct resource *res;
	unsigned int i;
	void *ret;

	res = request_free_mem_region(&iomem_resource, HMM_DEVICE_SIZE, "hmm_kunit");
	if (IS_ERR(res))
		return PTR_ERR(res);
	pagemap->type = MEMORY_DEVICE_PRIVATE;
	pagemap->range.start = res->start;
	pagemap->range.end = res->end;
	pagemap->nr_range = 1;
	pagemap->ops = &hmm_device_ops;
	pagemap->owner = device;
	ret = memremap_pages(pagemap, numa_mem_id());
	if (IS_ERR(ret)) {
		release_mem_region(pagemap->range.start, HMM_DEVICE_SIZE);
		return PTR_ERR(ret);
	}
	device->pages = pfn_to_page(PHYS_PFN(pagemap->range.start));
	for (i = 0; i < HMM_DEVICE_PAGES; i++) {
		zone_device_page_init(device->pages + i, pagemap, 0);
		unlock_page(device->pages + i);
	}
	return 0;
}

static void hmm_device_destroy(struct hmm_device *device)
{
	unsigned int i;

	if (!device->pages)
		return;
	for (i = 0; i < HMM_DEVICE_PAGES; i++)
		put_page(device->pages + i);
	memunmap_pages(&device->pagemap);
	release_mem_region(device->pagemap.range.start, HMM_DEVICE_SIZE);
	device->pages = NULL;
}

static int hmm_devices_create(void)
{
	return hmm_device_create(&hmm_own) ?: hmm_device_create(&hmm_other);
}

static void hmm_devices_destroy(void)
{
	hmm_device_destroy(&hmm_own);
	hmm_device_destroy(&hmm_other);
}

void *hmm_world_owner(void)
{
	return &hmm_own;
}

/* Which page it is depends on @instead, the page that would be there else. */
static pgoff_t hmm_device_pfn(struct hmm_world *w, bool own, const struct page *instead)
{
	struct page *page = own ? hmm_own.pages : hmm_other.pages;

	page += page_to_pfn(instead) % HMM_DEVICE_PAGES;
	page->zone_device_data = w;
	return page_to_pfn(page);
}
#else
static int hmm_devices_create(void)
{
	return 0;
}

static void hmm_devices_destroy(void)
{
}

void *hmm_world_owner(void)
{
	return &hmm_world_owner;
}

static pgoff_t hmm_device_pfn(struct hmm_world *w, bool own, const struct page *instead)
{
	return 0;
}
#endif /* CONFIG_DEVICE_PRIVATE */

/* Entries */

/* Swap entries are real where there is swap. Others cannot be faulted. */
bool hmm_world_has_swap(void)
{
	return IS_ENABLED(CONFIG_SWAP) && get_nr_swap_pages() > 0;
}

static bool hmm_vma_possible(enum hmm_ref_vma vma)
{
	switch (vma) {
	case REF_VMA_SHADOW_STACK:
		return VM_SHADOW_STACK;
	case REF_VMA_RWP:
		return VM_UFFD_RWP && pgtable_supports_uffd();
	default:
		return true;
	}
}

/* Can this kernel have such an entry in such a VMA? */
bool hmm_world_possible(enum hmm_ref_vma vma, enum hmm_ref_entry entry)
{
	if (!hmm_vma_possible(vma))
		return false;
	switch (entry) {
	case REF_SPECIAL:
		/* Anywhere else the kernel calls it corrupt. */
		return vma == REF_VMA_MIXED;
	case REF_SPECIAL_PAGE:
		return vma == REF_VMA_MIXED && IS_ENABLED(CONFIG_ARCH_HAS_PTE_SPECIAL);
	case REF_PROTNONE:
		return IS_ENABLED(CONFIG_NUMA_BALANCING);
	case REF_RWP:
		return vma == REF_VMA_RWP;
	case REF_SWAP:
		return IS_ENABLED(CONFIG_SWAP);
	case REF_SWAP_RWP:
		return vma == REF_VMA_RWP && hmm_world_has_swap();
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
		return IS_ENABLED(CONFIG_MIGRATION);
	case REF_PRIVATE_WRITE:
	case REF_PRIVATE_READ:
	case REF_PRIVATE_OTHER:
	case REF_EXCLUSIVE:
		return IS_ENABLED(CONFIG_DEVICE_PRIVATE);
	case REF_PRIVATE_WRITE_UFFD:
	case REF_PRIVATE_READ_UFFD:
	case REF_PRIVATE_OTHER_UFFD:
		return IS_ENABLED(CONFIG_DEVICE_PRIVATE) && pgtable_supports_uffd();
	case REF_HWPOISON:
		return IS_ENABLED(CONFIG_MEMORY_FAILURE);
	case REF_BAD:
		/* That takes an entry which could be a table. */
		return false;
	default:
		return true;
	}
}

/* A page stays locked for as long as it migrates, and while it is poisoned. */
static bool hmm_needs_lock(enum hmm_ref_entry entry)
{
	return hmm_is_migration(entry) || entry == REF_HWPOISON;
}

/* What is not present, of @page if it is of any. */
static swp_entry_t hmm_make_softleaf(struct hmm_world *w, enum hmm_ref_entry entry,
				     struct page *page)
{
	switch (entry) {
	case REF_MIGRATION_READ:
		return make_readable_migration_entry(page_to_pfn(page));
	case REF_MIGRATION_EXCLUSIVE:
		return make_readable_exclusive_migration_entry(page_to_pfn(page));
	case REF_MIGRATION_WRITE:
		return make_writable_migration_entry(page_to_pfn(page));
	case REF_PRIVATE_WRITE:
	case REF_PRIVATE_WRITE_UFFD:
		return make_writable_device_private_entry(hmm_device_pfn(w, true, page));
	case REF_PRIVATE_READ:
	case REF_PRIVATE_READ_UFFD:
		return make_readable_device_private_entry(hmm_device_pfn(w, true, page));
	case REF_PRIVATE_OTHER:
	case REF_PRIVATE_OTHER_UFFD:
		return make_writable_device_private_entry(hmm_device_pfn(w, false, page));
	case REF_EXCLUSIVE:
		return make_device_exclusive_entry(page_to_pfn(page));
	case REF_HWPOISON:
		return make_hwpoison_entry(page);
	case REF_UFFD_WP:
		return make_pte_marker_entry(PTE_MARKER_UFFD_WP);
	case REF_GUARD:
		return make_pte_marker_entry(PTE_MARKER_GUARD);
	case REF_POISON:
		return make_pte_marker_entry(PTE_MARKER_POISONED);
	case REF_MIXED_MARKER:
		return make_pte_marker_entry(PTE_MARKER_UFFD_WP | PTE_MARKER_GUARD);
	default:
		return swp_entry(MAX_SWAPFILES - 1, 7);
	}
}

/* The entry to plant for a page whose own, as the CPU left it, is @pte. */
pte_t hmm_world_make_pte(struct hmm_world *w, enum hmm_ref_entry entry, pte_t pte)
{
	swp_entry_t leaf;

	switch (entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_ZERO:
	case REF_BAD:
		return pte;
	case REF_READ_ONLY:
		return pte_wrprotect(pte);
	case REF_SPECIAL:
		return pte_mkspecial(pfn_pte(HMM_NO_PAGE, vm_get_page_prot(VM_READ)));
	case REF_SPECIAL_PAGE:
		return pte_mkspecial(pfn_pte(HMM_SOME_PAGE, vm_get_page_prot(VM_READ)));
	case REF_PROTNONE:
		return pte_modify(pte, vm_get_page_prot(VM_NONE));
	case REF_RWP:
		return pte_mkuffd(pte_modify(pte, vm_get_page_prot(VM_NONE)));
	default:
		leaf = hmm_make_softleaf(w, entry, pte_page(pte));
		pte = swp_entry_to_pte(leaf);
		return hmm_is_private_uffd(entry) ? pte_swp_mkuffd(pte) : pte;
	}
}

/*
 * A writable device-private entry with the uffd bit is what PAGEMAP_SCAN leaves.
 * page_table_check may take it for a mistake, so it does not get to see it.
 */
static void hmm_set_pte(struct hmm_world *w, enum hmm_ref_entry entry, unsigned long addr,
			pte_t *ptep, pte_t pte)
{
	if (!hmm_is_private_uffd(entry)) {
		set_pte_at(w->mm, addr, ptep, pte);
		return;
	}
	ptep_get_and_clear(w->mm, addr, ptep);
	WRITE_ONCE(*ptep, pte);
}

static int hmm_plant_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_world *w = data;
	unsigned long page = (addr - w->base) >> PAGE_SHIFT;
	enum hmm_ref_entry entry = w->c->page[page].entry;

	w->saved[page] = ptep_get(ptep);
	if (hmm_needs_lock(entry) && !folio_trylock(page_folio(pte_page(w->saved[page]))))
		return -EBUSY;
	w->planted[page] = hmm_world_make_pte(w, entry, w->saved[page]);
	hmm_set_pte(w, entry, addr, ptep, w->planted[page]);
	return 0;
}

static int hmm_unplant_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_world *w = data;
	unsigned long page = (addr - w->base) >> PAGE_SHIFT;

	/* A fault may have put something else there. */
	if (pte_same(ptep_get(ptep), w->planted[page]))
		set_pte_at(w->mm, addr, ptep, w->saved[page]);
	return 0;
}

static bool hmm_plant(struct hmm_world *w, unsigned long page)
{
	if (apply_to_page_range(w->mm, hmm_addr(w, page), PAGE_SIZE, hmm_plant_pte, w))
		return false;
	set_bit(page, w->has_planted);
	return true;
}

static void hmm_unplant(struct hmm_world *w, unsigned long page)
{
	if (!test_and_clear_bit(page, w->has_planted))
		return;
	apply_to_page_range(w->mm, hmm_addr(w, page), PAGE_SIZE, hmm_unplant_pte, w);
	if (hmm_needs_lock(w->c->page[page].entry))
		folio_unlock(page_folio(pte_page(w->saved[page])));
}

static void hmm_move_leaf(struct hmm_world *w);

/* Migrations end as soon as somebody waits for them, and no sooner. */
static void hmm_move(struct work_struct *work)
{
	struct hmm_world *w = container_of(work, struct hmm_world, mover);
	unsigned long page;

	while (!READ_ONCE(w->stop)) {
		for_each_set_bit(page, w->has_planted, HMM_PAGES)
			if (hmm_is_migration(w->c->page[page].entry) &&
			    folio_test_waiters(page_folio(pte_page(w->saved[page]))))
				hmm_unplant(w, page);
		hmm_move_leaf(w);
		usleep_range(20, 50);
	}
}

/* Building */

/*
 * How each kind of VMA is mapped at first, so that those of different kinds
 * are not merged, and what it becomes in the end.
 */
static const struct {
	unsigned long prot;
	unsigned long map;
	vm_flags_t flags;
} hmm_vmas[REF_VMAS] = {
	[REF_VMA_WRITABLE]  = { PROT_READ | PROT_WRITE, 0, VM_READ | VM_WRITE },
	[REF_VMA_READ_ONLY] = { PROT_READ, 0, VM_READ },
	[REF_VMA_MIXED]	    = { PROT_WRITE, 0, VM_READ | VM_WRITE | VM_MIXEDMAP },
	[REF_VMA_SHADOW_STACK] = { PROT_WRITE | PROT_EXEC, 0,
				   VM_READ | VM_WRITE | VM_SHADOW_STACK },
	[REF_VMA_RWP]	    = { PROT_READ | PROT_WRITE, MAP_NORESERVE,
				VM_READ | VM_WRITE | VM_UFFD_RWP },
	[REF_VMA_IO]	    = { PROT_READ | PROT_EXEC, 0, VM_READ | VM_WRITE | VM_IO },
	[REF_VMA_PFNMAP]    = { PROT_READ | PROT_WRITE | PROT_EXEC, 0,
				VM_READ | VM_WRITE | VM_PFNMAP },
	[REF_VMA_NO_READ]   = { PROT_NONE, 0, VM_WRITE },
};

#define HMM_VMA_FLAGS	(VM_READ | VM_WRITE | VM_EXEC | VM_MIXEDMAP | VM_IO | VM_PFNMAP | \
			 VM_SHADOW_STACK | VM_UFFD_RWP)

/*
 * Protection by userfaultfd is of the kind that a fault takes away by itself, as
 * nobody else is here to do it.
 */
#ifdef CONFIG_USERFAULTFD
static struct userfaultfd_ctx hmm_uffd = { .features = UFFD_FEATURE_RWP_ASYNC };

static void hmm_vma_set_uffd(struct vm_area_struct *vma)
{
	vma->vm_userfaultfd_ctx.ctx = userfaultfd_rwp(vma) ? &hmm_uffd : NULL;
}
#else
static void hmm_vma_set_uffd(struct vm_area_struct *vma)
{
}
#endif

static void hmm_vma_change(struct vm_area_struct *vma, vm_flags_t flags)
{
	vm_flags_clear(vma, HMM_VMA_FLAGS & ~flags);
	vm_flags_set(vma, flags);
	vma->vm_page_prot = vm_get_page_prot(vma->vm_flags);
	hmm_vma_set_uffd(vma);
}

/*
 * A VMA is ordinary memory for as long as its pages are entered, then what the
 * case says, and in the end what it was mapped as, for the accounts to balance.
 */
enum hmm_stage { HMM_ORDINARY, HMM_AS_CASE, HMM_AS_MAPPED };

static vm_flags_t hmm_vma_flags(enum hmm_ref_vma vma, enum hmm_stage stage)
{
	if (stage == HMM_ORDINARY)
		return VM_READ | VM_WRITE;
	return stage == HMM_AS_CASE ? hmm_vmas[vma].flags :
				      calc_vm_prot_bits(hmm_vmas[vma].prot, 0);
}

static void hmm_vmas_change(struct hmm_world *w, enum hmm_stage stage)
{
	unsigned long addr = w->base, end = hmm_addr(w, HMM_PAGES);
	struct vm_area_struct *vma;

	mmap_write_lock(w->mm);
	for (; (vma = find_vma_intersection(w->mm, addr, end)); addr = vma->vm_end) {
		unsigned long page = (max(addr, vma->vm_start) - w->base) >> PAGE_SHIFT;

		hmm_vma_change(vma, hmm_vma_flags(w->c->page[page].vma, stage));
	}
	mmap_write_unlock(w->mm);
}

static bool hmm_map(struct hmm_world *w, unsigned long page)
{
	enum hmm_ref_vma vma = w->c->page[page].vma;
	unsigned long addr = hmm_addr(w, page);

	return vma == REF_VMA_NONE ||
	       vm_mmap(NULL, addr, PAGE_SIZE, hmm_vmas[vma].prot, MAP_PRIVATE |
		       MAP_ANONYMOUS | MAP_FIXED | hmm_vmas[vma].map, 0) == addr;
}

/* Have the CPU bring in what the entry is to be made of. */
static bool hmm_touch(struct hmm_world *w, unsigned long page)
{
	void __user *at = (void __user *)hmm_addr(w, page);
	char byte = 0;

	switch (w->c->page[page].entry) {
	case REF_EMPTY:
	case REF_SPECIAL:
	case REF_SPECIAL_PAGE:
	case REF_UFFD_WP:
	case REF_GUARD:
	case REF_POISON:
	case REF_MIXED_MARKER:
		return true;
	case REF_ZERO:
		return !copy_from_user(&byte, at, 1);
	default:
		return !copy_to_user(at, &byte, 1);
	}
}

static int hmm_protect_swap_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_world *w = data;

	set_pte_at(w->mm, addr, ptep, pte_swp_mkuffd(ptep_get(ptep)));
	return 0;
}

/* Page out, as of a page that userfaultfd protects if it is to be that. */
static bool hmm_swap_out(struct hmm_world *w, unsigned long page)
{
	unsigned long addr = hmm_addr(w, page);

	if (!hmm_oracle_page_out(addr))
		return false;
	return w->c->page[page].entry == REF_SWAP ||
	       !apply_to_page_range(w->mm, addr, PAGE_SIZE, hmm_protect_swap_pte, w);
}

static bool hmm_enter(struct hmm_world *w, unsigned long page)
{
	enum hmm_ref_entry entry = w->c->page[page].entry;

	if (w->c->page[page].vma == REF_VMA_NONE)
		return true;
	if (!hmm_touch(w, page))
		return false;
	if (entry == REF_SWAP_RWP || (entry == REF_SWAP && hmm_world_has_swap()))
		return hmm_swap_out(w, page);
	return entry == REF_EMPTY || entry == REF_WRITABLE || entry == REF_ZERO ||
	       hmm_plant(w, page);
}

/* No assertion may end a test that has planted entries: they have to go first. */
bool hmm_world_build(struct hmm_world *w, const struct hmm_case *c)
{
	unsigned long page;
	bool built = true;

	w->c = c;
	for (page = c->first; page < c->end; page++)
		built = built && hmm_map(w, page);
	hmm_vmas_change(w, HMM_ORDINARY);
	for (page = c->first; page < c->end; page++)
		built = built && hmm_enter(w, page);
	hmm_vmas_change(w, HMM_AS_CASE);
	return built;
}

void hmm_world_tear_down(struct hmm_world *w)
{
	unsigned long page;

	for (page = 0; page < HMM_PAGES; page++)
		hmm_unplant(w, page);
	hmm_vmas_change(w, HMM_AS_MAPPED);
	vm_munmap(w->base, HMM_PAGES << PAGE_SHIFT);
	w->c = NULL;
}

/* Of the VMA around @w->base. */
void hmm_world_change_vma(struct hmm_world *w, vm_flags_t flags)
{
	mmap_write_lock(w->mm);
	hmm_vma_change(find_vma(w->mm, w->base), flags);
	mmap_write_unlock(w->mm);
}

vm_flags_t hmm_world_vma_flags(enum hmm_ref_vma vma)
{
	return hmm_vmas[vma].flags;
}

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
/* Huge pages */

/* An entry of hugetlbfs is modified as a PTE: x86 inverts the pfn, and how much of it. */
#ifdef CONFIG_HUGETLB_PAGE
static pmd_t hmm_protect_hugetlb(pmd_t pmd)
{
	pte_t pte = huge_pte_modify(__pte(pmd_val(pmd)), vm_get_page_prot(VM_NONE));

	return __pmd(pte_val(huge_pte_mkuffd(pte)));
}
#else
static pmd_t hmm_protect_hugetlb(pmd_t pmd)
{
	return pmd;
}
#endif

/* The entry to plant for a huge page whose own is @pmd. */
pmd_t hmm_world_make_pmd(struct hmm_world *w, enum hmm_ref_entry entry, pmd_t pmd)
{
	swp_entry_t leaf;

	switch (entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_ZERO:
		return pmd;
	case REF_READ_ONLY:
		return pmd_wrprotect(pmd);
	case REF_SPECIAL:
		return pmd_mkspecial(pmd_mkhuge(pfn_pmd(HMM_NO_PAGE,
							vm_get_page_prot(VM_READ))));
	case REF_PROTNONE:
		return pmd_modify(pmd, vm_get_page_prot(VM_NONE));
	case REF_RWP:
		if (w->leaf.file)
			return hmm_protect_hugetlb(pmd);
		return pmd_mkuffd(pmd_modify(pmd, vm_get_page_prot(VM_NONE)));
	default:
		leaf = hmm_make_softleaf(w, entry, pmd_page(pmd));
		pmd = swp_entry_to_pmd(leaf);
		return hmm_is_private_uffd(entry) ? pmd_swp_mkuffd(pmd) : pmd;
	}
}

/* What is not present is kept from page_table_check, as hmm_set_pte() does. */
static void hmm_set_pmd_at(struct hmm_world *w, pmd_t *pmdp, pmd_t pmd)
{
	if (pmd_present(pmd) || pmd_none(pmd)) {
		set_pmd_at(w->mm, w->base, pmdp, pmd);
		return;
	}
	pmdp_huge_get_and_clear(w->mm, w->base, pmdp);
	WRITE_ONCE(*pmdp, pmd);
}

#ifdef CONFIG_HUGETLB_PAGE
static void hmm_set_hugetlb(struct hmm_world *w, pmd_t *pmdp, pmd_t pmd)
{
	set_huge_pte_at(w->mm, w->base, (pte_t *)pmdp, __pte(pmd_val(pmd)), PMD_SIZE);
}
#else
static void hmm_set_hugetlb(struct hmm_world *w, pmd_t *pmdp, pmd_t pmd)
{
}
#endif

static void hmm_set_pmd(struct hmm_world *w, pmd_t from, pmd_t to)
{
	pmd_t *pmdp = hmm_pmd(w->mm, w->base);
	spinlock_t *ptl = pmd_lock(w->mm, pmdp);

	if (pmd_same(pmdp_get(pmdp), from)) {
		/* What is present is accounted, and what a fault brings will be, too. */
		if (w->leaf.file)
			hmm_set_hugetlb(w, pmdp, to);
		else
			hmm_set_pmd_at(w, pmdp, to);
	}
	spin_unlock(ptl);
}

void hmm_world_plant_leaf(struct hmm_world *w, enum hmm_ref_entry entry)
{
	struct hmm_leaf *leaf = &w->leaf;

	leaf->saved = pmdp_get(hmm_pmd(w->mm, w->base));
	leaf->folio = hmm_needs_lock(entry) ? page_folio(pmd_page(leaf->saved)) : NULL;
	if (leaf->folio)
		folio_lock(leaf->folio);
	leaf->planted = hmm_world_make_pmd(w, entry, leaf->saved);
	hmm_set_pmd(w, leaf->saved, leaf->planted);
	WRITE_ONCE(leaf->has_planted, true);
}

void hmm_world_unplant_leaf(struct hmm_world *w)
{
	if (!xchg(&w->leaf.has_planted, false))
		return;
	hmm_set_pmd(w, w->leaf.planted, w->leaf.saved);
	if (w->leaf.folio)
		folio_unlock(w->leaf.folio);
}

static void hmm_move_leaf(struct hmm_world *w)
{
	if (READ_ONCE(w->leaf.has_planted) && folio_test_waiters(w->leaf.folio))
		hmm_world_unplant_leaf(w);
}
#else
void hmm_world_unplant_leaf(struct hmm_world *w)
{
}

static void hmm_move_leaf(struct hmm_world *w)
{
}
#endif /* CONFIG_TRANSPARENT_HUGEPAGE */

/* Read-only memory, so large that it has the borders of all sizes in it. */
unsigned long hmm_world_map_large(struct hmm_world *w)
{
	unsigned long size = 3 * PUD_SIZE, start;

	start = kunit_vm_mmap(w->test, NULL, 0, size, PROT_READ,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, 0);
	KUNIT_ASSERT_FALSE(w->test, !start || IS_ERR_VALUE(start));
	hmm_world_watch(w, start, size);
	w->base = ALIGN(start, PUD_SIZE) + PMD_SIZE;
	return ALIGN(start, PUD_SIZE);
}

/* Asking */

unsigned long hmm_world_faults(void)
{
	return current->min_flt + current->maj_flt;
}

const char * const hmm_world_call_names[HMM_CALLS] = {
	[HMM_CALL_LOCKED]	= "locked",
	[HMM_CALL_UNLOCKED]	= "unlocked",
	[HMM_CALL_EACH]		= "each",
};

const void *hmm_world_call_gen(struct kunit *test, const void *prev, char *desc)
{
	const char * const *next = prev ? (const char * const *)prev + 1 : hmm_world_call_names;

	if (next == hmm_world_call_names + HMM_CALLS)
		return NULL;
	strscpy(desc, *next, KUNIT_PARAM_DESC_SIZE);
	return next;
}

/* The call that a test with hmm_world_call_gen() is to make. */
enum hmm_call_kind hmm_world_call_of(const struct kunit *test)
{
	return (const char * const *)test->param_value - hmm_world_call_names;
}

static int hmm_call_locked(struct hmm_world *w)
{
	int ret;

	w->range.notifier_seq = mmu_interval_read_begin(&w->notifier);
	mmap_read_lock(w->mm);
	ret = hmm_range_fault(&w->range);
	mmap_read_unlock(w->mm);
	return ret;
}

static void hmm_commit_lock(struct hmm_range *range)
{
	struct hmm_world *w = container_of(range, struct hmm_world, range);

	mutex_lock(&w->device);
	w->committing = true;
}

static void hmm_commit_unlock(struct hmm_range *range)
{
	struct hmm_world *w = container_of(range, struct hmm_world, range);

	w->committing = false;
	mutex_unlock(&w->device);
}

/* Steps come in order, under the lock, while what was found is so. */
static int hmm_commit(struct hmm_range *range, unsigned long start, unsigned long end)
{
	struct hmm_world *w = container_of(range, struct hmm_world, range);

	KUNIT_EXPECT_TRUE(w->test, w->committing);
	KUNIT_EXPECT_FALSE(w->test, mmu_interval_read_retry(range->notifier,
							    range->notifier_seq));
	KUNIT_EXPECT_EQ(w->test, start, w->committed);
	KUNIT_EXPECT_LT(w->test, start, end);
	KUNIT_EXPECT_LE(w->test, end, range->end);
	w->committed = end;
	return 0;
}

static const struct hmm_commit_ops hmm_world_commit_ops = {
	.lock	= hmm_commit_lock,
	.unlock	= hmm_commit_unlock,
	.commit	= hmm_commit,
};

/* All of the range is committed if all is well, and its last page is not if not. */
static int hmm_call_each(struct hmm_world *w)
{
	int ret;

	w->committed = w->range.start;
	ret = hmm_range_fault_each(&w->range, 20 * HZ, &hmm_world_commit_ops);
	KUNIT_EXPECT_FALSE(w->test, w->committing);
	KUNIT_EXPECT_EQ(w->test, w->committed == w->range.end, !ret);
	return ret;
}

int hmm_world_call(struct hmm_world *w, enum hmm_call_kind call)
{
	switch (call) {
	case HMM_CALL_LOCKED:
		return hmm_call_locked(w);
	case HMM_CALL_UNLOCKED:
		return hmm_range_fault_unlocked_timeout(&w->range, 20 * HZ);
	default:
		return hmm_call_each(w);
	}
}

/* Ask for the pages on both sides of @addr in the same way. */
int hmm_world_ask_around(struct hmm_world *w, unsigned long addr, unsigned long request,
			 enum hmm_call_kind call)
{
	w->pfns[0] = HMM_STICKY;
	w->pfns[1] = HMM_STICKY;
	w->range = (struct hmm_range) {
		.notifier	= &w->notifier,
		.start		= addr - PAGE_SIZE,
		.end		= addr + PAGE_SIZE,
		.hmm_pfns	= w->pfns,
		.default_flags	= request,
	};
	return hmm_world_call(w, call);
}

/* Rows of the table */

/* All kinds of entry in all kinds of VMA, but one where all are alike. */
static bool hmm_row_next(struct hmm_row *row)
{
	if (++row->request < REF_REQUESTS)
		return true;
	row->request = REF_NOTHING;
	if (!hmm_is_refused(row->vma) && ++row->entry < REF_ENTRIES)
		return true;
	row->entry = REF_EMPTY;
	if (++row->vma == REF_VMAS)
		return false;
	if (hmm_is_refused(row->vma))
		row->entry = REF_WRITABLE;
	return true;
}

const void *hmm_world_row_gen(struct hmm_row *row, const void *prev, char *desc,
			      bool (*possible)(const struct hmm_row *row))
{
	if (!prev)
		*row = (struct hmm_row) {};
	else
		do {
			if (!hmm_row_next(row))
				return NULL;
		} while (!possible(row));
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%s, %s, %s", hmm_ref_vma_names[row->vma],
		 hmm_is_refused(row->vma) ? "any entry" : hmm_ref_writable[row->entry].name,
		 hmm_ref_request_names[row->request]);
	return row;
}

/* The suite */

/*
 * A fault on a protnone entry moves a page of another node to this one, if it
 * can, and what was writable then takes a fault more to be that again. Where
 * pages are has to be no matter of where the scheduler puts the test.
 */
static int hmm_stay_on_node(void)
{
	return set_cpus_allowed_ptr(current, cpumask_of_node(numa_node_id()));
}

int hmm_world_init(struct kunit *test)
{
	struct hmm_world *w = kunit_kzalloc(test, sizeof(*w), GFP_KERNEL);
	unsigned long size = HMM_PAGES << PAGE_SHIFT, start;
	int ret;

	if (!w)
		return -ENOMEM;
	w->test = test;
	INIT_WORK(&w->mover, hmm_move);
	mutex_init(&w->device);
	test->priv = w;
	ret = hmm_stay_on_node();
	if (ret)
		return ret;

	/* Address space that nobody else takes. */
	start = kunit_vm_mmap(test, NULL, 0, 3 * PMD_SIZE, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, 0);
	if (!start || IS_ERR_VALUE(start))
		return -ENOMEM;
	w->mm = current->mm;
	w->base = ALIGN(start, PMD_SIZE) + PMD_SIZE - (HMM_BORDER << PAGE_SHIFT);
	vm_munmap(w->base, size);
	hmm_world_watch(w, w->base, size);
	return 0;
}

void hmm_world_exit(struct kunit *test)
{
	struct hmm_world *w = test->priv;

	if (w && w->notifier.mm)
		mmu_interval_notifier_remove(&w->notifier);
}

int hmm_world_suite_init(struct kunit_suite *suite)
{
	int ret = hmm_devices_create();

	if (ret)
		hmm_devices_destroy();
	return ret;
}

void hmm_world_suite_exit(struct kunit_suite *suite)
{
	hmm_devices_destroy();
}
