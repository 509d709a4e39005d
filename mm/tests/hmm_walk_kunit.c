// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): every kind of entry, against a reference
 *
 * A case says what VMA and what entry each page of a small window has, what is
 * requested of it, and how. The window is built in an address space of the
 * test's own: memory is mapped and touched, and then entries are planted in
 * its page tables, which also brings about states that no program could. What
 * the call returns and stores is compared page by page with two things that
 * share no code with the walker: the table in hmm_reference.h says what has to
 * happen, and hmm_oracle() what is there afterwards. How many faults that took
 * is known from the task's own count, so one too many does not go unseen.
 *
 * The same check serves a test that goes through the table, row by row, and
 * one that makes cases up at random and shrinks what fails.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/ioport.h>
#include <linux/leafops.h>
#include <linux/memremap.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/mount.h>
#include <linux/pgtable.h>
#include <linux/prandom.h>
#include <linux/sched/mm.h>
#include <linux/swapops.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "hmm_oracle.h"
#include "hmm_reference.h"

/* The window lies across the border of two page tables. */
#define HMM_PAGES	32
#define HMM_BORDER	(HMM_PAGES / 2)

#define HMM_READ	HMM_PFN_REQ_FAULT
#define HMM_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* A pfn that is that of no page. */
#define HMM_NO_PAGE	BIT(BITS_PER_LONG / 2)

/* What is found behind the end of the elements. */
#define HMM_CANARY	0x5a5a5a5aUL

static unsigned long seed;
module_param(seed, ulong, 0644);
MODULE_PARM_DESC(seed, "of random cases; 0 for a new one each time");

static unsigned int walks = 4000;
module_param(walks, uint, 0644);
MODULE_PARM_DESC(walks, "how many random cases to try");

struct hmm_case_page {
	enum hmm_ref_vma vma;
	enum hmm_ref_entry entry;
	unsigned long in;
};

/**
 * struct hmm_case - all there is to know of one call
 * @first: first page of the range
 * @end: the page behind its last
 * @locked: call hmm_range_fault(), not the other one
 * @owner: name an owner of device-private memory
 * @default_flags: of the range
 * @mask: &hmm_range.pfn_flags_mask
 * @page: what is where, and the element that is passed in for it
 */
struct hmm_case {
	unsigned long first;
	unsigned long end;
	bool locked;
	bool owner;
	unsigned long default_flags;
	unsigned long mask;
	struct hmm_case_page page[HMM_PAGES];
};

/**
 * struct hmm_leaf - a huge page that begins at &hmm_world.base
 * @saved: what was there before another entry was planted
 * @planted: that
 * @has_planted: it is not yet put back
 * @folio: what migrates, if anything does
 * @pfns: elements for all of the page, and one before and behind it
 */
struct hmm_leaf {
	pmd_t saved;
	pmd_t planted;
	bool has_planted;
	struct folio *folio;
	unsigned long *pfns;
};

/**
 * struct hmm_world - where a case takes place
 * @test: the running test
 * @mm: the address space, the test thread's own
 * @base: where the window begins
 * @notifier: covers the window
 * @c: the case whose pages are there
 * @saved: what was in the page tables before entries were planted
 * @planted: those
 * @has_planted: the pages whose entry is not yet put back
 * @leaf: the huge page, in tests of those
 * @mover: ends migrations that are waited for
 * @stop: tells @mover to end
 * @range: what is handed to the call
 * @pfns: its elements
 * @faults: how many faults the call handled
 * @why: what is wrong with what it did
 */
struct hmm_world {
	struct kunit *test;
	struct mm_struct *mm;
	unsigned long base;
	struct mmu_interval_notifier notifier;
	const struct hmm_case *c;
	pte_t saved[HMM_PAGES];
	pte_t planted[HMM_PAGES];
	DECLARE_BITMAP(has_planted, HMM_PAGES);
	struct hmm_leaf leaf;
	struct work_struct mover;
	bool stop;
	struct hmm_range range;
	unsigned long pfns[HMM_PAGES + 1];
	unsigned long faults;
	char why[160];
};

/* The notifier */

static bool hmm_world_invalidate(struct mmu_interval_notifier *notifier,
				 const struct mmu_notifier_range *range, unsigned long seq)
{
	mmu_interval_set_seq(notifier, seq);
	return true;
}

static const struct mmu_interval_notifier_ops hmm_world_notifier_ops = {
	.invalidate = hmm_world_invalidate,
};

/* The memory of two devices, one page each */

#ifdef CONFIG_DEVICE_PRIVATE
#define HMM_DEVICE_SIZE	BIT(PA_SECTION_SHIFT)

struct hmm_device {
	struct dev_pagemap pagemap;
	struct page *page;
};

static struct hmm_device hmm_own, hmm_other;

static void hmm_unplant(struct hmm_world *w, unsigned long page);
static void hmm_unplant_leaf(struct hmm_world *w);

/* Moving back is putting back the entry that was there before. */
static vm_fault_t hmm_device_to_ram(struct vm_fault *vmf)
{
	struct hmm_world *w = vmf->page->zone_device_data;

	if (w->leaf.has_planted)
		hmm_unplant_leaf(w);
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
	device->page = pfn_to_page(PHYS_PFN(pagemap->range.start));
	zone_device_page_init(device->page, pagemap, 0);
	unlock_page(device->page);
	return 0;
}

static void hmm_device_destroy(struct hmm_device *device)
{
	if (!device->page)
		return;
	put_page(device->page);
	memunmap_pages(&device->pagemap);
	release_mem_region(device->pagemap.range.start, HMM_DEVICE_SIZE);
	device->page = NULL;
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

static void *hmm_owner(void)
{
	return &hmm_own;
}

static pgoff_t hmm_device_pfn(struct hmm_world *w, bool own)
{
	struct page *page = own ? hmm_own.page : hmm_other.page;

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

static void *hmm_owner(void)
{
	return &hmm_owner;
}

static pgoff_t hmm_device_pfn(struct hmm_world *w, bool own)
{
	return 0;
}
#endif /* CONFIG_DEVICE_PRIVATE */

/* Entries */

/* Can this kernel have such an entry? */
static bool hmm_possible(enum hmm_ref_vma vma, enum hmm_ref_entry entry)
{
	switch (entry) {
	case REF_SPECIAL:
		/* Anywhere else the kernel calls it corrupt. */
		return vma == REF_VMA_MIXED;
	case REF_PROTNONE:
		return IS_ENABLED(CONFIG_NUMA_BALANCING);
	case REF_SWAP:
		return IS_ENABLED(CONFIG_SWAP);
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
		return IS_ENABLED(CONFIG_MIGRATION);
	case REF_PRIVATE_WRITE:
	case REF_PRIVATE_READ:
	case REF_PRIVATE_OTHER:
	case REF_EXCLUSIVE:
		return IS_ENABLED(CONFIG_DEVICE_PRIVATE);
	case REF_HWPOISON:
		return IS_ENABLED(CONFIG_MEMORY_FAILURE);
	case REF_BAD:
		/* That takes an entry which could be a table. */
		return false;
	default:
		return true;
	}
}

/* There is no swap to fault in from: hmm-tests has some. */
static bool hmm_needs_swap(enum hmm_ref_entry entry, enum hmm_ref_answer answer)
{
	return entry == REF_SWAP && answer == REF_FAULT;
}

static bool hmm_is_migration(enum hmm_ref_entry entry)
{
	return entry == REF_MIGRATION_READ || entry == REF_MIGRATION_EXCLUSIVE ||
	       entry == REF_MIGRATION_WRITE;
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
		return make_writable_device_private_entry(hmm_device_pfn(w, true));
	case REF_PRIVATE_READ:
		return make_readable_device_private_entry(hmm_device_pfn(w, true));
	case REF_PRIVATE_OTHER:
		return make_writable_device_private_entry(hmm_device_pfn(w, false));
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
static pte_t hmm_make_pte(struct hmm_world *w, enum hmm_ref_entry entry, pte_t pte)
{
	switch (entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_ZERO:
	case REF_BAD:
		return pte;
	case REF_READ_ONLY:
		return pte_wrprotect(pte);
	case REF_SPECIAL:
		return pte_mkspecial(pfn_pte(HMM_NO_PAGE, PAGE_READONLY));
	case REF_PROTNONE:
		return pte_modify(pte, PAGE_NONE);
	default:
		return swp_entry_to_pte(hmm_make_softleaf(w, entry, pte_page(pte)));
	}
}

static unsigned long hmm_addr(const struct hmm_world *w, unsigned long page)
{
	return w->base + (page << PAGE_SHIFT);
}

static int hmm_plant_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_world *w = data;
	unsigned long page = (addr - w->base) >> PAGE_SHIFT;
	enum hmm_ref_entry entry = w->c->page[page].entry;

	w->saved[page] = ptep_get(ptep);
	if (hmm_needs_lock(entry) && !folio_trylock(page_folio(pte_page(w->saved[page]))))
		return -EBUSY;
	w->planted[page] = hmm_make_pte(w, entry, w->saved[page]);
	set_pte_at(w->mm, addr, ptep, w->planted[page]);
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
	vm_flags_t flags;
} hmm_vmas[REF_VMAS] = {
	[REF_VMA_WRITABLE]  = { PROT_READ | PROT_WRITE, VM_READ | VM_WRITE },
	[REF_VMA_READ_ONLY] = { PROT_READ, VM_READ },
	[REF_VMA_MIXED]	    = { PROT_WRITE, VM_READ | VM_WRITE | VM_MIXEDMAP },
	[REF_VMA_IO]	    = { PROT_READ | PROT_EXEC, VM_READ | VM_WRITE | VM_IO },
	[REF_VMA_PFNMAP]    = { PROT_READ | PROT_WRITE | PROT_EXEC,
				VM_READ | VM_WRITE | VM_PFNMAP },
	[REF_VMA_NO_READ]   = { PROT_NONE, VM_WRITE },
};

#define HMM_VMA_FLAGS	(VM_READ | VM_WRITE | VM_EXEC | VM_MIXEDMAP | VM_IO | VM_PFNMAP)

static void hmm_vma_change(struct vm_area_struct *vma, vm_flags_t flags)
{
	vm_flags_clear(vma, HMM_VMA_FLAGS & ~flags);
	vm_flags_set(vma, flags);
	vma->vm_page_prot = vm_get_page_prot(vma->vm_flags);
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
	       vm_mmap(NULL, addr, PAGE_SIZE, hmm_vmas[vma].prot,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, 0) == addr;
}

/* Have the CPU bring in what the entry is to be made of. */
static bool hmm_touch(struct hmm_world *w, unsigned long page)
{
	void __user *at = (void __user *)hmm_addr(w, page);
	char byte = 0;

	switch (w->c->page[page].entry) {
	case REF_EMPTY:
	case REF_SPECIAL:
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

static bool hmm_enter(struct hmm_world *w, unsigned long page)
{
	enum hmm_ref_entry entry = w->c->page[page].entry;

	if (w->c->page[page].vma == REF_VMA_NONE)
		return true;
	if (!hmm_touch(w, page))
		return false;
	return entry == REF_EMPTY || entry == REF_WRITABLE || entry == REF_ZERO ||
	       hmm_plant(w, page);
}

/* No assertion may end a test that has planted entries: they have to go first. */
static bool hmm_build(struct hmm_world *w, const struct hmm_case *c)
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

static void hmm_tear_down(struct hmm_world *w)
{
	unsigned long page;

	for (page = 0; page < HMM_PAGES; page++)
		hmm_unplant(w, page);
	hmm_vmas_change(w, HMM_AS_MAPPED);
	vm_munmap(w->base, HMM_PAGES << PAGE_SHIFT);
	w->c = NULL;
}

/* What the reference says */

static enum hmm_ref_entry hmm_entry(const struct hmm_case *c, unsigned long page)
{
	enum hmm_ref_entry entry = c->page[page].entry;

	/* Without an owner's name all device memory is somebody else's. */
	if (!c->owner && (entry == REF_PRIVATE_WRITE || entry == REF_PRIVATE_READ))
		return REF_PRIVATE_OTHER;
	return entry;
}

static enum hmm_ref_request hmm_request(const struct hmm_case *c, unsigned long page)
{
	return hmm_ref_request((c->page[page].in & c->mask) | c->default_flags);
}

static enum hmm_ref_answer hmm_answer(const struct hmm_case *c, unsigned long page)
{
	return hmm_ref_answer(c->page[page].vma, hmm_entry(c, page), hmm_request(c, page));
}

/* Has a migration to end for the call to get anywhere? */
static bool hmm_waits(const struct hmm_case *c)
{
	unsigned long page;

	for (page = c->first; page < c->end; page++)
		if (hmm_is_migration(c->page[page].entry) &&
		    hmm_answer(c, page) == REF_FAULT)
			return true;
	return false;
}

/* Asking */

static unsigned long hmm_faults(void)
{
	return current->min_flt + current->maj_flt;
}

static int hmm_call(struct hmm_world *w, bool locked)
{
	int ret;

	if (!locked)
		return hmm_range_fault_unlocked_timeout(&w->range, 20 * HZ);

	w->range.notifier_seq = mmu_interval_read_begin(&w->notifier);
	mmap_read_lock(w->mm);
	ret = hmm_range_fault(&w->range);
	mmap_read_unlock(w->mm);
	return ret;
}

static void hmm_fill_in(struct hmm_world *w)
{
	const struct hmm_case *c = w->c;
	unsigned long page;

	memset_l(w->pfns, HMM_CANARY, ARRAY_SIZE(w->pfns));
	for (page = c->first; page < c->end; page++)
		w->pfns[page - c->first] = c->page[page].in;
	w->range = (struct hmm_range) {
		.notifier		= &w->notifier,
		.start			= hmm_addr(w, c->first),
		.end			= hmm_addr(w, c->end),
		.hmm_pfns		= w->pfns,
		.default_flags		= c->default_flags,
		.pfn_flags_mask		= c->mask,
		.dev_private_owner	= c->owner ? hmm_owner() : NULL,
	};
}

/* As a driver does: start over for as long as faults invalidate the range. */
static int hmm_ask(struct hmm_world *w)
{
	unsigned long faults = hmm_faults();
	int ret, tries = 0;

	w->stop = false;
	if (hmm_waits(w->c))
		schedule_work(&w->mover);
	do {
		hmm_fill_in(w);
		ret = hmm_call(w, w->c->locked);
	} while (ret == -EBUSY && w->c->locked && ++tries < 3);
	w->faults = hmm_faults() - faults;
	WRITE_ONCE(w->stop, true);
	flush_work(&w->mover);
	return ret;
}

/* Checking */

/* Clearing a marker that nobody needs any more is a fault of its own. */
static unsigned long hmm_faults_due(const struct hmm_case *c, unsigned long page)
{
	return c->page[page].entry == REF_UFFD_WP ? 2 : 1;
}

/* A read fault brings the zero page there, and a write fault one to write to. */
static bool hmm_was_empty(const struct hmm_case *c, unsigned long page)
{
	return c->page[page].entry == REF_EMPTY || c->page[page].entry == REF_UFFD_WP;
}

#define hmm_wrong(w, ...)	(snprintf((w)->why, sizeof((w)->why), __VA_ARGS__), false)

/* Is @out what has to be stored for a page that was not faulted, or was? */
static bool hmm_check_output(struct hmm_world *w, unsigned long page, unsigned long out)
{
	const struct hmm_case *c = w->c;
	enum hmm_ref_answer answer = hmm_answer(c, page);
	unsigned long in = c->page[page].in, want;

	if ((out ^ in) & HMM_STICKY)
		return hmm_wrong(w, "page %lu: sticky bits %#lx became %#lx", page,
				 in & HMM_STICKY, out & HMM_STICKY);
	out &= ~HMM_STICKY;
	want = hmm_ref_output(answer);
	if (answer != REF_FAULT && (out & HMM_PFN_FLAGS) != want)
		return hmm_wrong(w, "page %lu: stored %#lx, not %#lx", page, out, want);
	want = HMM_PFN_VALID | (hmm_request(c, page) == REF_WRITE ? HMM_PFN_WRITE : 0);
	if (answer == REF_FAULT && (out & want) != want)
		return hmm_wrong(w, "page %lu: stored %#lx after a fault", page, out);
	if (answer == REF_FAULT && (out & ~want & HMM_PFN_WRITE) && hmm_was_empty(c, page))
		return hmm_wrong(w, "page %lu: faulted for write, not read", page);
	want = hmm_oracle(w->mm, hmm_addr(w, page), w->range.dev_private_owner).out;
	if (out != want)
		return hmm_wrong(w, "page %lu: stored %#lx, and there is %#lx", page, out, want);
	return true;
}

static bool hmm_check_untouched(struct hmm_world *w, unsigned long page)
{
	unsigned long now = w->pfns[page - w->c->first], in = w->c->page[page].in;

	return now == in || hmm_wrong(w, "page %lu: %#lx became %#lx behind the cursor",
				      page, in, now);
}

static bool hmm_check_elements(struct hmm_world *w, unsigned long cursor)
{
	const struct hmm_case *c = w->c;
	unsigned long page;

	for (page = c->first; page < cursor; page++)
		if (!hmm_check_output(w, page, w->pfns[page - c->first]))
			return false;
	for (; page < c->end; page++)
		if (!hmm_check_untouched(w, page))
			return false;
	return w->pfns[c->end - c->first] == HMM_CANARY ||
	       hmm_wrong(w, "wrote behind the last element");
}

static bool hmm_check(struct hmm_world *w, int ret)
{
	enum hmm_ref_answer answer = REF_STORE_0;
	const struct hmm_case *c = w->c;
	unsigned long page, faults = 0;
	bool right;
	int want;

	for (page = c->first; page < c->end; page++) {
		answer = hmm_answer(c, page);
		if (answer == REF_EPERM || answer == REF_EFAULT)
			break;
		if (answer == REF_FAULT)
			faults += hmm_faults_due(c, page);
	}
	want = page == c->end ? 0 : answer == REF_EPERM ? -EPERM : -EFAULT;
	if (ret != want)
		return hmm_wrong(w, "returned %d, not %d", ret, want);
	if (w->faults != faults)
		return hmm_wrong(w, "%lu faults, not %lu", w->faults, faults);

	mmap_read_lock(w->mm);
	right = hmm_check_elements(w, page);
	mmap_read_unlock(w->mm);
	return right;
}

/* Does HMM do what it has to do in this case? If not, @w->why says so. */
static bool hmm_try(struct hmm_world *w, const struct hmm_case *c)
{
	bool right;

	right = hmm_build(w, c) ? hmm_check(w, hmm_ask(w)) :
				  hmm_wrong(w, "the case could not be built");
	hmm_tear_down(w);
	return right;
}

/* The table, row by row */

struct hmm_row {
	enum hmm_ref_vma vma;
	enum hmm_ref_entry entry;
	enum hmm_ref_request request;
};

static bool hmm_is_refused(enum hmm_ref_vma vma)
{
	return vma >= REF_VMA_NONE;
}

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

static bool hmm_row_possible(const struct hmm_row *row)
{
	return hmm_possible(row->vma, row->entry) &&
	       !hmm_needs_swap(row->entry, hmm_ref_answer(row->vma, row->entry, row->request));
}

static const void *hmm_row_gen(struct hmm_row *row, const void *prev, char *desc,
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

static const void *hmm_row_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_row_gen(&row, prev, desc, hmm_row_possible);
}

/* Ways to say what is requested of the page, and nothing of the others. */
enum { HMM_BY_DEFAULT, HMM_BY_MASK, HMM_BY_BOTH, HMM_WAYS };

static const char * const hmm_way_names[HMM_WAYS] = { "default", "mask", "both" };

static void hmm_case_request(struct hmm_case *c, struct hmm_case_page *p,
			     enum hmm_ref_request request, int way)
{
	static const unsigned long flags[] = { HMM_PFN_REQ_WRITE, HMM_READ, HMM_WRITE };

	switch (way) {
	case HMM_BY_DEFAULT:
		c->default_flags = flags[request];
		p->in |= HMM_WRITE;
		break;
	case HMM_BY_MASK:
		c->mask = HMM_WRITE;
		p->in |= flags[request];
		break;
	case HMM_BY_BOTH:
		c->default_flags = flags[request] & HMM_PFN_REQ_FAULT;
		c->mask = HMM_PFN_REQ_WRITE;
		p->in |= flags[request];
		break;
	}
}

/* Six pages, three on either side of the border, all but one as they should be. */
static const unsigned long hmm_row_places[] = {
	HMM_BORDER - 3, HMM_BORDER, HMM_BORDER + 2
};

static void hmm_row_case(struct hmm_case *c, const struct hmm_row *row,
			 unsigned long place, int way)
{
	unsigned long page;

	*c = (struct hmm_case) {
		.first = HMM_BORDER - 3,
		.end = HMM_BORDER + 3,
		.owner = true,
	};
	for (page = c->first; page < c->end; page++)
		c->page[page] = (struct hmm_case_page) {
			.entry = REF_WRITABLE,
			.in = HMM_PFN_ERROR | (page & 1 ? HMM_STICKY : HMM_PFN_P2PDMA),
		};
	c->page[place].vma = row->vma;
	c->page[place].entry = row->entry;
	hmm_case_request(c, &c->page[place], row->request, way);
}

static void hmm_test_table(struct kunit *test)
{
	const struct hmm_row *row = test->param_value;
	struct hmm_case *c = kunit_kzalloc(test, sizeof(*c), GFP_KERNEL);
	unsigned int i, way, locked;

	KUNIT_ASSERT_NOT_NULL(test, c);
	for (i = 0; i < ARRAY_SIZE(hmm_row_places); i++)
		for (way = 0; way < HMM_WAYS; way++)
			for (locked = 0; locked < 2; locked++) {
				struct hmm_world *w = test->priv;

				hmm_row_case(c, row, hmm_row_places[i], way);
				c->locked = locked;
				KUNIT_EXPECT_TRUE_MSG(test, hmm_try(w, c),
						      "at page %lu, by %s, %s: %s",
						      hmm_row_places[i], hmm_way_names[way],
						      locked ? "locked" : "unlocked", w->why);
			}
}

/* Cases made up at random */

static unsigned long hmm_random(struct rnd_state *rnd, unsigned long below)
{
	return prandom_u32_state(rnd) % below;
}

/* Half of what is there is plain, so that walks get somewhere. */
static enum hmm_ref_vma hmm_random_vma(struct rnd_state *rnd)
{
	return hmm_random(rnd, 2) ? REF_VMA_WRITABLE : hmm_random(rnd, REF_VMAS);
}

static enum hmm_ref_entry hmm_random_entry(struct rnd_state *rnd, enum hmm_ref_vma vma)
{
	enum hmm_ref_entry entry;

	if (hmm_random(rnd, 2))
		return hmm_random(rnd, 2) ? REF_WRITABLE : REF_EMPTY;
	do {
		entry = hmm_random(rnd, REF_ENTRIES);
	} while (!hmm_possible(vma, entry));
	return entry;
}

/* An element is whatever an earlier call left there, with a request or none. */
static unsigned long hmm_random_in(struct rnd_state *rnd)
{
	static const unsigned long requests[] = {
		0, 0, HMM_READ, HMM_WRITE, HMM_PFN_REQ_WRITE
	};
	unsigned long junk = prandom_u32_state(rnd) | ((u64)prandom_u32_state(rnd) << 32);

	return (junk & ~HMM_WRITE) | requests[hmm_random(rnd, ARRAY_SIZE(requests))];
}

/* What would end most walks early, or takes long, is rarely asked for. */
static void hmm_random_page(struct rnd_state *rnd, struct hmm_case *c, unsigned long page,
			    enum hmm_ref_vma vma)
{
	struct hmm_case_page *p = &c->page[page];
	enum hmm_ref_answer answer;

	*p = (struct hmm_case_page) {
		.vma = vma,
		.entry = hmm_random_entry(rnd, vma),
		.in = hmm_random_in(rnd),
	};
	answer = hmm_answer(c, page);
	if ((answer == REF_EFAULT || answer == REF_EPERM || hmm_is_migration(p->entry)) &&
	    hmm_random(rnd, 16))
		p->in &= ~HMM_WRITE;
	answer = hmm_answer(c, page);
	if (hmm_needs_swap(p->entry, answer) ||
	    (hmm_is_migration(p->entry) && answer == REF_FAULT && hmm_random(rnd, 16)))
		p->entry = REF_READ_ONLY;
}

static void hmm_random_case(struct rnd_state *rnd, struct hmm_case *c)
{
	static const unsigned long defaults[] = {
		0, 0, 0, 0, HMM_READ, HMM_WRITE, HMM_PFN_REQ_WRITE
	};
	static const unsigned long masks[] = { 0, HMM_READ, HMM_WRITE, HMM_WRITE, ~0UL };
	enum hmm_ref_vma vma = REF_VMA_WRITABLE;
	unsigned long page;

	c->first = hmm_random(rnd, HMM_PAGES);
	c->end = c->first + 1 + hmm_random(rnd, HMM_PAGES - c->first);
	c->locked = hmm_random(rnd, 2);
	c->owner = hmm_random(rnd, 4);
	c->default_flags = defaults[hmm_random(rnd, ARRAY_SIZE(defaults))];
	c->mask = masks[hmm_random(rnd, ARRAY_SIZE(masks))];
	for (page = 0; page < HMM_PAGES; page++) {
		if (!hmm_random(rnd, 4))
			vma = hmm_random_vma(rnd);
		hmm_random_page(rnd, c, page, vma);
	}
}

/* Shrinking: make the case simpler for as long as it still fails */

static bool hmm_keep_if_wrong(struct hmm_world *w, struct hmm_case *c,
			      const struct hmm_case *simpler)
{
	if (simpler->first >= simpler->end || !memcmp(c, simpler, sizeof(*c)) ||
	    hmm_try(w, simpler))
		return false;
	*c = *simpler;
	return true;
}

static bool hmm_shrink_page(struct hmm_world *w, struct hmm_case *c,
			    struct hmm_case *simpler, unsigned long page)
{
	bool shrunk;

	*simpler = *c;
	simpler->page[page].in = 0;
	shrunk = hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->page[page].entry = REF_EMPTY;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->page[page].vma = REF_VMA_WRITABLE;
	if (hmm_possible(REF_VMA_WRITABLE, c->page[page].entry))
		shrunk |= hmm_keep_if_wrong(w, c, simpler);
	return shrunk;
}

static bool hmm_shrink_once(struct hmm_world *w, struct hmm_case *c, struct hmm_case *simpler)
{
	unsigned long page;
	bool shrunk;

	*simpler = *c;
	simpler->first++;
	shrunk = hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->end--;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->default_flags = 0;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->mask = 0;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	for (page = c->first; page < c->end; page++)
		shrunk |= hmm_shrink_page(w, c, simpler, page);
	return shrunk;
}

static void hmm_print_case(struct kunit *test, const struct hmm_case *c)
{
	unsigned long page;

	kunit_err(test, "pages %lu to %lu, %s, %s owner, default_flags %#lx, mask %#lx\n",
		  c->first, c->end - 1, c->locked ? "locked" : "unlocked",
		  c->owner ? "an" : "no", c->default_flags, c->mask);
	for (page = c->first; page < c->end; page++)
		kunit_err(test, "page %lu: %s, %s, element %#lx\n", page,
			  hmm_ref_vma_names[c->page[page].vma],
			  hmm_ref_writable[c->page[page].entry].name, c->page[page].in);
}

static void hmm_random_failed(struct hmm_world *w, struct hmm_case *c)
{
	struct hmm_case *simpler = kunit_kzalloc(w->test, sizeof(*c), GFP_KERNEL);
	int rounds = 0;

	KUNIT_ASSERT_NOT_NULL(w->test, simpler);
	while (rounds++ < 100 && hmm_shrink_once(w, c, simpler))
		;
	hmm_print_case(w->test, c);
	/* Once more, to say what is wrong with this one. */
	KUNIT_EXPECT_TRUE_MSG(w->test, hmm_try(w, c), "%s", w->why);
}

static void hmm_test_random(struct kunit *test)
{
	struct hmm_case *c = kunit_kzalloc(test, sizeof(*c), GFP_KERNEL);
	u64 used = seed ?: get_random_u32();
	struct hmm_world *w = test->priv;
	struct rnd_state rnd;
	unsigned int i;

	KUNIT_ASSERT_NOT_NULL(test, c);
	kunit_info(test, "seed %llu, %u walks\n", used, walks);
	prandom_seed_state(&rnd, used);
	for (i = 0; i < walks; i++) {
		hmm_random_case(&rnd, c);
		if (hmm_try(w, c))
			continue;
		KUNIT_FAIL(test, "seed %llu, walk %u: %s", used, i, w->why);
		hmm_random_failed(w, c);
		return;
	}
}

/* Empty and bad tables, at every level */

static const struct { const char *name; } hmm_locked[] = { { "unlocked" }, { "locked" } };

KUNIT_ARRAY_PARAM_DESC(hmm_locked, hmm_locked, name);

static pmd_t *hmm_pmd(struct mm_struct *mm, unsigned long addr)
{
	return pmd_offset(pud_offset(p4d_offset(pgd_offset(mm, addr), addr), addr), addr);
}

static pud_t *hmm_pud(struct mm_struct *mm, unsigned long addr)
{
	return pud_offset(p4d_offset(pgd_offset(mm, addr), addr), addr);
}

/* Ask for the pages on both sides of @addr in the same way. */
static int hmm_ask_around(struct hmm_world *w, unsigned long addr, unsigned long request,
			  bool locked)
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
	return hmm_call(w, locked);
}

/* Two empty pages in memory that cannot be written. */
static void hmm_expect_empty(struct hmm_world *w, unsigned long addr, bool locked)
{
	KUNIT_EXPECT_EQ(w->test, hmm_ask_around(w, addr, 0, locked), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, hmm_ask_around(w, addr, HMM_WRITE, locked), -EPERM);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], HMM_STICKY);

	KUNIT_EXPECT_EQ(w->test, hmm_ask_around(w, addr, HMM_READ, locked), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
}

/* No table of x86 or User Mode Linux has it like that. */
#define HMM_BAD_BIT	BIT(8)

/* The page behind @addr has a bad table, and the one before it a good one. */
static void hmm_expect_bad(struct hmm_world *w, unsigned long addr, bool locked)
{
	unsigned long before;

	KUNIT_EXPECT_EQ(w->test, hmm_ask_around(w, addr, 0, locked), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_PFN_ERROR | HMM_STICKY);
	before = w->pfns[0];

	KUNIT_EXPECT_EQ(w->test, hmm_ask_around(w, addr, HMM_READ, locked), -EFAULT);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], before);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_STICKY);
}

/* Read-only memory, so large that it has the borders of all sizes in it. */
static unsigned long hmm_map_large(struct hmm_world *w)
{
	unsigned long size = 3 * PUD_SIZE, start;
	int ret;

	mmu_interval_notifier_remove(&w->notifier);
	start = kunit_vm_mmap(w->test, NULL, 0, size, PROT_READ,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, 0);
	KUNIT_ASSERT_FALSE(w->test, !start || IS_ERR_VALUE(start));
	ret = mmu_interval_notifier_insert(&w->notifier, w->mm, start, size,
					   &hmm_world_notifier_ops);
	KUNIT_ASSERT_EQ(w->test, ret, 0);
	w->base = ALIGN(start, PUD_SIZE) + PMD_SIZE;
	return ALIGN(start, PUD_SIZE);
}

static void hmm_test_empty_tables(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_map_large(w);
	bool locked = test->param_value == &hmm_locked[1];

	/* Each leaves tables behind that the next one finds. */
	hmm_expect_empty(w, addr + PUD_SIZE, locked);
	hmm_expect_empty(w, addr + 2 * PMD_SIZE, locked);
	hmm_expect_empty(w, addr + 2 * PMD_SIZE + 9 * PAGE_SIZE, locked);
}

static void hmm_test_bad_pmd(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_map_large(w) + 2 * PMD_SIZE;
	pmd_t *pmdp, good;

	KUNIT_ASSERT_EQ(test, hmm_ask_around(w, addr, HMM_READ, true), 0);
	pmdp = hmm_pmd(w->mm, addr);
	good = pmdp_get(pmdp);
	*pmdp = __pmd(pmd_val(good) ^ HMM_BAD_BIT);
	hmm_expect_bad(w, addr, test->param_value == &hmm_locked[1]);
	*pmdp = good;
}

static void hmm_test_bad_pud(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_map_large(w) + PUD_SIZE;
	pud_t *pudp, good;

	KUNIT_ASSERT_EQ(test, hmm_ask_around(w, addr, HMM_READ, true), 0);
	pudp = hmm_pud(w->mm, addr);
	good = pudp_get(pudp);
	*pudp = __pud(pud_val(good) ^ HMM_BAD_BIT);
	hmm_expect_bad(w, addr, test->param_value == &hmm_locked[1]);
	*pudp = good;
}

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
/*
 * Huge pages: the rows that a PMD can have, for ranges that begin and end in
 * different places of the page, and ask for one of its pages or for all
 */

#define HMM_HUGE_ORDER	((unsigned long)PMD_ORDER << HMM_PFN_ORDER_SHIFT)

struct hmm_slice {
	long first;
	long n;
	bool all;
};

static const struct hmm_slice hmm_slices[] = {
	{ 0, HPAGE_PMD_NR, true },
	{ 100, 300, true },
	{ HPAGE_PMD_NR - 1, 1, true },
	{ -1, HPAGE_PMD_NR + 2, false },
};

struct hmm_leaf_case {
	const struct hmm_row *row;
	const struct hmm_slice *slice;
	long asked;
	bool all;
	bool locked;
};

static bool hmm_leaf_possible(const struct hmm_row *row)
{
	switch (row->entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_READ_ONLY:
	case REF_ZERO:
		return row->vma == REF_VMA_WRITABLE || row->vma == REF_VMA_READ_ONLY;
	case REF_PROTNONE:
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
	case REF_PRIVATE_WRITE:
	case REF_PRIVATE_READ:
	case REF_PRIVATE_OTHER:
		return (row->vma == REF_VMA_WRITABLE || row->vma == REF_VMA_READ_ONLY) &&
		       hmm_possible(row->vma, row->entry);
	case REF_SPECIAL:
		return row->vma == REF_VMA_MIXED;
	default:
		return false;
	}
}

static const void *hmm_leaf_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_row_gen(&row, prev, desc, hmm_leaf_possible);
}

static pmd_t hmm_make_pmd(struct hmm_world *w, enum hmm_ref_entry entry, pmd_t pmd)
{
	switch (entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_ZERO:
		return pmd;
	case REF_READ_ONLY:
		return pmd_wrprotect(pmd);
	case REF_SPECIAL:
		return pmd_mkspecial(pmd_mkhuge(pfn_pmd(HMM_NO_PAGE, PAGE_READONLY)));
	case REF_PROTNONE:
		return pmd_modify(pmd, PAGE_NONE);
	default:
		return swp_entry_to_pmd(hmm_make_softleaf(w, entry, pmd_page(pmd)));
	}
}

static void hmm_set_pmd(struct hmm_world *w, pmd_t from, pmd_t to)
{
	pmd_t *pmdp = hmm_pmd(w->mm, w->base);
	spinlock_t *ptl = pmd_lock(w->mm, pmdp);

	if (pmd_same(pmdp_get(pmdp), from))
		set_pmd_at(w->mm, w->base, pmdp, to);
	spin_unlock(ptl);
}

static void hmm_plant_leaf(struct hmm_world *w, enum hmm_ref_entry entry)
{
	struct hmm_leaf *leaf = &w->leaf;

	leaf->saved = pmdp_get(hmm_pmd(w->mm, w->base));
	leaf->planted = hmm_make_pmd(w, entry, leaf->saved);
	leaf->folio = hmm_is_migration(entry) ? page_folio(pmd_page(leaf->saved)) : NULL;
	if (leaf->folio)
		folio_lock(leaf->folio);
	hmm_set_pmd(w, leaf->saved, leaf->planted);
	WRITE_ONCE(leaf->has_planted, true);
}

static void hmm_unplant_leaf(struct hmm_world *w)
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
		hmm_unplant_leaf(w);
}

/* One VMA around a huge page, with nothing else in it. */
static bool hmm_map_leaf(struct hmm_world *w, vm_flags_t flags)
{
	unsigned long start = w->base - PMD_SIZE;
	struct vm_area_struct *vma;

	if (vm_mmap(NULL, start, 3 * PMD_SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, 0) != start)
		return false;
	mmap_write_lock(w->mm);
	vma = find_vma(w->mm, start);
	hmm_vma_change(vma, flags);
	vm_flags_set(vma, VM_HUGEPAGE);
	mmap_write_unlock(w->mm);
	/* Have a table for the PMD, below which there is nothing. */
	return !apply_to_page_range(w->mm, start, PAGE_SIZE, NULL, NULL);
}

static bool hmm_touch_leaf(struct hmm_world *w, enum hmm_ref_entry entry)
{
	void __user *at = (void __user *)w->base;
	unsigned long left;
	char byte = 0;

	if (entry == REF_EMPTY || entry == REF_SPECIAL)
		return true;
	left = entry == REF_ZERO ? copy_from_user(&byte, at, 1) : copy_to_user(at, &byte, 1);
	return !left && pmd_trans_huge(pmdp_get(hmm_pmd(w->mm, w->base)));
}

static void hmm_leaf_vma_change(struct hmm_world *w, vm_flags_t flags)
{
	mmap_write_lock(w->mm);
	hmm_vma_change(find_vma(w->mm, w->base), flags);
	mmap_write_unlock(w->mm);
}

static bool hmm_build_leaf(struct hmm_world *w, const struct hmm_row *row)
{
	if (!hmm_map_leaf(w, VM_READ | VM_WRITE) || !hmm_touch_leaf(w, row->entry))
		return false;
	hmm_plant_leaf(w, row->entry);
	hmm_leaf_vma_change(w, hmm_vmas[row->vma].flags);
	return true;
}

static void hmm_tear_down_leaf(struct hmm_world *w)
{
	hmm_unplant_leaf(w);
	hmm_leaf_vma_change(w, VM_READ | VM_WRITE);
	vm_munmap(w->base - PMD_SIZE, 3 * PMD_SIZE);
}

static unsigned long hmm_request_flags(enum hmm_ref_request request)
{
	static const unsigned long flags[] = { 0, HMM_READ, HMM_WRITE };

	return flags[request];
}

static int hmm_ask_leaf(struct hmm_world *w, const struct hmm_leaf_case *c)
{
	unsigned long faults = hmm_faults(), request = hmm_request_flags(c->row->request);
	const struct hmm_slice *slice = c->slice;
	int ret, tries = 0;

	w->stop = false;
	if (w->leaf.folio)
		schedule_work(&w->mover);
	do {
		memset_l(w->leaf.pfns, HMM_STICKY, HPAGE_PMD_NR + 2);
		w->leaf.pfns[c->asked] |= c->all ? 0 : request;
		w->range = (struct hmm_range) {
			.notifier	= &w->notifier,
			.start		= w->base + slice->first * (long)PAGE_SIZE,
			.end		= w->base + (slice->first + slice->n) * (long)PAGE_SIZE,
			.hmm_pfns	= w->leaf.pfns,
			.default_flags	= c->all ? request : 0,
			.pfn_flags_mask	= HMM_WRITE,
			.dev_private_owner = hmm_owner(),
		};
		ret = hmm_call(w, c->locked);
	} while (ret == -EBUSY && c->locked && ++tries < 3);
	w->faults = hmm_faults() - faults;
	WRITE_ONCE(w->stop, true);
	flush_work(&w->mover);
	return ret;
}

/* What is stored for the @i-th element, all being well. */
static bool hmm_check_leaf_output(struct hmm_world *w, const struct hmm_leaf_case *c,
				  enum hmm_ref_answer answer, long i)
{
	unsigned long out = w->leaf.pfns[i] & ~HMM_STICKY, want = hmm_ref_output(answer);
	unsigned long *first = &w->leaf.pfns[max(0, -c->slice->first)];
	long page = c->slice->first + i;

	if (!(w->leaf.pfns[i] & HMM_STICKY))
		return hmm_wrong(w, "page %ld: sticky bits lost", page);
	if (page < 0 || page >= HPAGE_PMD_NR)
		return !out || hmm_wrong(w, "page %ld: stored %#lx outside", page, out);
	if (want & HMM_PFN_VALID)
		want |= HMM_HUGE_ORDER;
	if (answer != REF_FAULT && (out & HMM_PFN_FLAGS) != want)
		return hmm_wrong(w, "page %ld: stored %#lx, not %#lx", page, out, want);
	want = HMM_PFN_VALID | HMM_HUGE_ORDER | hmm_request_flags(c->row->request);
	if (answer == REF_FAULT && (out & want) != want)
		return hmm_wrong(w, "page %ld: stored %#lx after a fault", page, out);
	if (c->row->entry == REF_EMPTY && (out & ~want & HMM_PFN_WRITE))
		return hmm_wrong(w, "page %ld: faulted for write", page);
	want = *first & ~HMM_STICKY;
	if (want & HMM_PFN_VALID)
		want += &w->leaf.pfns[i] - first;
	return out == want || hmm_wrong(w, "page %ld: stored %#lx after %#lx", page, out, *first);
}

/* Before the page that cannot be had, elements may be outputs or not. */
static bool hmm_check_leaf_error(struct hmm_world *w, const struct hmm_leaf_case *c, long i)
{
	unsigned long in = HMM_STICKY, now = w->leaf.pfns[i];

	if (!c->all && i == c->asked)
		in |= hmm_request_flags(c->row->request);
	if (now == in || (i < c->asked && !c->all && (now & HMM_STICKY) == HMM_STICKY))
		return true;
	return hmm_wrong(w, "element %ld: %#lx became %#lx behind the cursor", i, in, now);
}

static bool hmm_check_leaf_oracle(struct hmm_world *w, const struct hmm_leaf_case *c, long i)
{
	unsigned long addr = w->range.start + (i << PAGE_SHIFT), want;

	mmap_read_lock(w->mm);
	want = hmm_oracle(w->mm, addr, w->range.dev_private_owner).out;
	mmap_read_unlock(w->mm);
	return (w->leaf.pfns[i] & ~HMM_STICKY) == want ||
	       hmm_wrong(w, "element %ld: stored %#lx, and there is %#lx", i,
			 w->leaf.pfns[i], want);
}

static bool hmm_check_leaf(struct hmm_world *w, const struct hmm_leaf_case *c, int ret)
{
	enum hmm_ref_answer answer;
	bool right = true;
	int want = 0;
	long i;

	answer = hmm_ref_answer(c->row->vma, c->row->entry, c->row->request);
	if (answer == REF_EPERM || answer == REF_EFAULT)
		want = answer == REF_EPERM ? -EPERM : -EFAULT;
	if (ret != want)
		return hmm_wrong(w, "returned %d, not %d", ret, want);
	if (w->faults != (answer == REF_FAULT ? 1 : 0))
		return hmm_wrong(w, "%lu faults", w->faults);
	for (i = 0; right && i < c->slice->n; i++)
		right = ret ? hmm_check_leaf_error(w, c, i) :
			      hmm_check_leaf_output(w, c, answer, i);
	return right && (ret || (hmm_check_leaf_oracle(w, c, 0) &&
				 hmm_check_leaf_oracle(w, c, c->slice->n - 1)));
}

static void hmm_try_leaf(struct hmm_world *w, const struct hmm_leaf_case *c)
{
	bool right;

	right = hmm_build_leaf(w, c->row) ? hmm_check_leaf(w, c, hmm_ask_leaf(w, c)) :
					    hmm_wrong(w, "there is no huge page");
	hmm_tear_down_leaf(w);
	KUNIT_EXPECT_TRUE_MSG(w->test, right, "%ld pages from %ld, asked for %ld%s, %s: %s",
			      c->slice->n, c->slice->first, c->asked, c->all ? " and all" : "",
			      c->locked ? "locked" : "unlocked", w->why);
}

/* The page asked for is the first of the leaf, one inside, and the last. */
static void hmm_try_slice(struct hmm_world *w, struct hmm_leaf_case *c)
{
	const struct hmm_slice *slice = c->slice;
	long first = max(0, -slice->first);
	long last = min(slice->n, HPAGE_PMD_NR - slice->first) - 1;
	long asked[] = { first, (first + last) / 2, last };
	int i;

	for (i = 0; i < ARRAY_SIZE(asked); i++) {
		if (i && asked[i] == asked[i - 1])
			continue;
		c->asked = asked[i];
		c->all = false;
		hmm_try_leaf(w, c);
	}
	c->asked = first;
	c->all = true;
	if (slice->all)
		hmm_try_leaf(w, c);
}

static void hmm_test_huge_table(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	struct hmm_leaf_case c = { .row = test->param_value };
	int i;

	hmm_map_large(w);
	w->leaf.pfns = kunit_kcalloc(test, HPAGE_PMD_NR + 2, sizeof(*w->leaf.pfns), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, w->leaf.pfns);
	for (i = 0; i < 2 * ARRAY_SIZE(hmm_slices); i++) {
		c.slice = &hmm_slices[i / 2];
		c.locked = i & 1;
		hmm_try_slice(w, &c);
	}
}

/* However a range cuts a huge page, it gets its own part of it. */
static void hmm_test_huge_slices(struct kunit *test)
{
	static const long lengths[] = { 1, 2, 7, 64, HPAGE_PMD_NR };
	struct hmm_row row = { REF_VMA_WRITABLE, REF_WRITABLE, REF_NOTHING };
	struct hmm_slice slice = {};
	struct hmm_leaf_case c = { .row = &row, .slice = &slice, .all = true };
	struct hmm_world *w = test->priv;
	bool right = true;
	int i;

	hmm_map_large(w);
	w->leaf.pfns = kunit_kcalloc(test, HPAGE_PMD_NR + 2, sizeof(*w->leaf.pfns), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, w->leaf.pfns);
	if (hmm_build_leaf(w, &row))
		for (; right && slice.first < HPAGE_PMD_NR; slice.first++)
			for (i = 0; right && i < ARRAY_SIZE(lengths); i++) {
				slice.n = min(lengths[i], HPAGE_PMD_NR - slice.first);
				c.locked = i & 1;
				right = hmm_check_leaf(w, &c, hmm_ask_leaf(w, &c));
			}
	hmm_tear_down_leaf(w);
	KUNIT_EXPECT_EQ(test, slice.first, HPAGE_PMD_NR);
	KUNIT_EXPECT_TRUE_MSG(test, right, "%ld pages: %s", slice.n, w->why);
}

/* Pages @page - 1 and @page of the leaf at the base, which maps pfn 0 and on. */
static void hmm_expect_leaf(struct hmm_world *w, const struct hmm_row *row,
			    unsigned int order, unsigned long page, bool locked)
{
	enum hmm_ref_answer answer = hmm_ref_answer(row->vma, row->entry, row->request);
	unsigned long want = hmm_ref_output(answer) | HMM_STICKY;
	unsigned long faults = hmm_faults();
	int ret;

	if (want & HMM_PFN_VALID)
		want |= (((unsigned long)order << HMM_PFN_ORDER_SHIFT) | (page - 1));
	ret = hmm_ask_around(w, w->base + (page << PAGE_SHIFT), hmm_request_flags(row->request),
			     locked);
	KUNIT_EXPECT_EQ(w->test, ret, answer == REF_EPERM ? -EPERM :
				      answer == REF_EFAULT ? -EFAULT : 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], ret ? HMM_STICKY : want);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], ret ? HMM_STICKY :
			want + (want & HMM_PFN_VALID ? 1 : 0));
	KUNIT_EXPECT_EQ(w->test, hmm_faults(), faults);
}

#ifdef CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD
/*
 * A PUD that is a leaf. Nobody may fault on it, as no memory is behind it: the
 * rows that need a fault are left out.
 */

static bool hmm_pud_possible(const struct hmm_row *row)
{
	bool plain = row->entry == REF_WRITABLE || row->entry == REF_READ_ONLY;

	if (hmm_ref_answer(row->vma, row->entry, row->request) == REF_FAULT)
		return false;
	if (row->vma == REF_VMA_MIXED)
		return row->entry == REF_SPECIAL;
	return plain && !hmm_is_refused(row->vma);
}

static const void *hmm_pud_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row = { .entry = REF_EMPTY };

	if (!prev)
		row = (struct hmm_row) { .request = REF_WRITE };
	return hmm_row_gen(&row, &row, desc, hmm_pud_possible);
}

static pud_t hmm_make_pud(enum hmm_ref_entry entry)
{
	pud_t pud = pud_mkhuge(pfn_pud(0, entry == REF_WRITABLE ? PAGE_SHARED : PAGE_READONLY));

	return entry == REF_SPECIAL ? pud_mkspecial(pud) : pud;
}

static void hmm_test_pud_table(struct kunit *test)
{
	const unsigned long pages[] = { 1, 77, PTRS_PER_PMD * PTRS_PER_PTE - 1 };
	const struct hmm_row *row = test->param_value;
	struct hmm_world *w = test->priv;
	pud_t *pudp, saved;
	int i;

	w->base = hmm_map_large(w) + PUD_SIZE;
	KUNIT_ASSERT_EQ(test, hmm_ask_around(w, w->base, HMM_READ, true), 0);
	hmm_leaf_vma_change(w, hmm_vmas[row->vma].flags);
	pudp = hmm_pud(w->mm, w->base);
	saved = pudp_get(pudp);
	*pudp = hmm_make_pud(row->entry);
	for (i = 0; i < 2 * ARRAY_SIZE(pages); i++)
		hmm_expect_leaf(w, row, PUD_ORDER, pages[i / 2], i & 1);
	*pudp = saved;
	hmm_leaf_vma_change(w, VM_READ);
}
#endif /* CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD */
#ifdef CONFIG_HUGETLBFS
/* Hugetlb entries, of no memory either */

static bool hmm_hugetlb_possible(const struct hmm_row *row)
{
	if (row->vma != REF_VMA_WRITABLE && row->vma != REF_VMA_READ_ONLY)
		return false;
	if (hmm_ref_answer(row->vma, row->entry, row->request) == REF_FAULT)
		return false;
	switch (row->entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_READ_ONLY:
	case REF_PROTNONE:
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
	case REF_UFFD_WP:
	case REF_GUARD:
	case REF_POISON:
	case REF_MIXED_MARKER:
		return hmm_possible(row->vma, row->entry);
	default:
		return false;
	}
}

static const void *hmm_hugetlb_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_row_gen(&row, prev, desc, hmm_hugetlb_possible);
}

static pte_t hmm_make_hugetlb(struct hmm_world *w, enum hmm_ref_entry entry)
{
	pte_t pte = pte_mkhuge(pfn_pte(0, PAGE_SHARED));

	return entry == REF_EMPTY ? __pte(0) : hmm_make_pte(w, entry, pte);
}

static void hmm_unmount(void *mount)
{
	kern_unmount(mount);
}

static void hmm_put_file(void *file)
{
	fput(file);
}

static struct file *hmm_hugetlb_file(struct kunit *test)
{
	struct file_system_type *type = get_fs_type("hugetlbfs");
	struct vfsmount *mount;
	struct file *file;
	struct path root;

	KUNIT_ASSERT_NOT_NULL(test, type);
	mount = kern_mount(type);
	put_filesystem(type);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, mount);
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, hmm_unmount, mount), 0);
	root = (struct path) { .mnt = mount, .dentry = mount->mnt_root };
	file = file_open_root(&root, "hmm", O_RDWR | O_CREAT, 0600);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, file);
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, hmm_put_file, file), 0);
	return file;
}

static void hmm_map_hugetlb(struct hmm_world *w)
{
	char byte;
	int ret;

	mmu_interval_notifier_remove(&w->notifier);
	w->base = kunit_vm_mmap(w->test, hmm_hugetlb_file(w->test), 0, PMD_SIZE,
				PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, 0);
	KUNIT_ASSERT_FALSE(w->test, !w->base || IS_ERR_VALUE(w->base));
	ret = mmu_interval_notifier_insert(&w->notifier, w->mm, w->base, PMD_SIZE,
					   &hmm_world_notifier_ops);
	KUNIT_ASSERT_EQ(w->test, ret, 0);
	/* Whether or not there is a page to be had, there is a table after that. */
	KUNIT_ASSERT_LE(w->test, copy_from_user(&byte, (void __user *)w->base, 1), 1);
}

static void hmm_test_hugetlb_table(struct kunit *test)
{
	const unsigned long pages[] = { 1, 77, HPAGE_PMD_NR - 1 };
	const struct hmm_row *row = test->param_value;
	struct hmm_world *w = test->priv;
	pmd_t *pmdp, saved;
	int i;

	hmm_map_hugetlb(w);
	pmdp = hmm_pmd(w->mm, w->base);
	saved = pmdp_get(pmdp);
	*pmdp = __pmd(pte_val(hmm_make_hugetlb(w, row->entry)));
	hmm_leaf_vma_change(w, hmm_vmas[row->vma].flags);
	for (i = 0; i < 2 * ARRAY_SIZE(pages); i++)
		hmm_expect_leaf(w, row, PMD_ORDER, pages[i / 2], i & 1);
	*pmdp = saved;
	hmm_leaf_vma_change(w, VM_READ | VM_WRITE);
}
#endif /* CONFIG_HUGETLBFS */
#else
static void hmm_unplant_leaf(struct hmm_world *w)
{
}

static void hmm_move_leaf(struct hmm_world *w)
{
}
#endif /* CONFIG_TRANSPARENT_HUGEPAGE */

/* The suite */

static int hmm_walk_init(struct kunit *test)
{
	struct hmm_world *w = kunit_kzalloc(test, sizeof(*w), GFP_KERNEL);
	unsigned long size = HMM_PAGES << PAGE_SHIFT, start;

	if (!w)
		return -ENOMEM;
	w->test = test;
	INIT_WORK(&w->mover, hmm_move);
	test->priv = w;

	/* Address space that nobody else takes. */
	start = kunit_vm_mmap(test, NULL, 0, 3 * PMD_SIZE, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, 0);
	if (!start || IS_ERR_VALUE(start))
		return -ENOMEM;
	w->mm = current->mm;
	w->base = ALIGN(start, PMD_SIZE) + PMD_SIZE - (HMM_BORDER << PAGE_SHIFT);
	vm_munmap(w->base, size);
	return mmu_interval_notifier_insert(&w->notifier, w->mm, w->base, size,
					    &hmm_world_notifier_ops);
}

static void hmm_walk_exit(struct kunit *test)
{
	struct hmm_world *w = test->priv;

	if (w && w->notifier.mm)
		mmu_interval_notifier_remove(&w->notifier);
}

static int hmm_walk_suite_init(struct kunit_suite *suite)
{
	int ret = hmm_devices_create();

	if (ret)
		hmm_devices_destroy();
	return ret;
}

static void hmm_walk_suite_exit(struct kunit_suite *suite)
{
	hmm_devices_destroy();
}

static struct kunit_case hmm_walk_cases[] = {
	KUNIT_CASE_PARAM(hmm_test_table, hmm_row_gen_params),
	KUNIT_CASE_SLOW(hmm_test_random),
	KUNIT_CASE_PARAM(hmm_test_empty_tables, hmm_locked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_bad_pmd, hmm_locked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_bad_pud, hmm_locked_gen_params),
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	KUNIT_CASE_PARAM_ATTR(hmm_test_huge_table, hmm_leaf_gen_params,
			      { .speed = KUNIT_SPEED_SLOW }),
	KUNIT_CASE_SLOW(hmm_test_huge_slices),
#ifdef CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD
	KUNIT_CASE_PARAM(hmm_test_pud_table, hmm_pud_gen_params),
#endif
#ifdef CONFIG_HUGETLBFS
	KUNIT_CASE_PARAM(hmm_test_hugetlb_table, hmm_hugetlb_gen_params),
#endif
#endif
	{}
};

static struct kunit_suite hmm_walk_suite = {
	.name = "hmm_walk",
	.suite_init = hmm_walk_suite_init,
	.suite_exit = hmm_walk_suite_exit,
	.init = hmm_walk_init,
	.exit = hmm_walk_exit,
	.test_cases = hmm_walk_cases,
};

kunit_test_suite(hmm_walk_suite);

MODULE_IMPORT_NS("EXPORTED_FOR_KUNIT_TESTING");
MODULE_DESCRIPTION("KUnit tests of hmm_range_fault() against a reference");
MODULE_LICENSE("GPL");
