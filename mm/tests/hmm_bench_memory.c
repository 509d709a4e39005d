// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The memory that the benchmark of HMM is run on
 */
#include <linux/anon_inodes.h>
#include <linux/bitmap.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ioport.h>
#include <linux/leafops.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/swapops.h>
#include <linux/syscalls.h>
#include <linux/topology.h>
#include <linux/uaccess.h>

#include "hmm_bench.h"

/* How many pages each of the many VMAs has. */
#define HMM_BENCH_PIECE	16

static unsigned long hmm_bench_addr(const struct hmm_bench *b, unsigned long page)
{
	return b->start + (page << PAGE_SHIFT);
}

/* Mapping */

/* Have page tables, and no memory, wherever the range begins in one. */
static bool hmm_bench_reserve(struct hmm_bench *b)
{
	unsigned long at, size = (b->room << PAGE_SHIFT) + PMD_SIZE;

	at = vm_mmap(NULL, 0, size, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, 0);
	if (!at || IS_ERR_VALUE(at))
		return false;
	b->start = ALIGN(at, PMD_SIZE);
	return true;
}

static bool hmm_bench_place(struct hmm_bench *b, unsigned long page, unsigned long npages,
			    unsigned long prot)
{
	unsigned long flags = b->file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
	unsigned long at = hmm_bench_addr(b, page);

	return vm_mmap(b->file, at, npages << PAGE_SHIFT, PROT_READ | PROT_WRITE | prot,
		       flags | MAP_FIXED | MAP_NORESERVE, 0) == at;
}

/* In every VMA of the range. */
static void hmm_bench_flag(struct hmm_bench *b, vm_flags_t flags)
{
	unsigned long addr = b->start, end = hmm_bench_addr(b, b->room);
	struct vm_area_struct *vma;

	mmap_write_lock(b->mm);
	for (; (vma = find_vma_intersection(b->mm, addr, end)); addr = vma->vm_end)
		vm_flags_set(vma, flags);
	mmap_write_unlock(b->mm);
}

/* Have the CPU write, or only read, every @step-th page. */
static bool hmm_bench_touch(struct hmm_bench *b, unsigned long step, bool write)
{
	unsigned long page, left = 0;
	char byte = 0;

	for (page = 0; page < b->room && !left; page += step) {
		void __user *at = (void __user *)hmm_bench_addr(b, page);

		left = write ? copy_to_user(at, &byte, 1) : copy_from_user(&byte, at, 1);
	}
	return !left;
}

bool hmm_bench_map_empty(struct hmm_bench *b)
{
	if (!hmm_bench_reserve(b) || !hmm_bench_place(b, 0, b->room, 0))
		return false;
	hmm_bench_flag(b, VM_NOHUGEPAGE);
	return true;
}

bool hmm_bench_map_half(struct hmm_bench *b)
{
	return hmm_bench_map_empty(b) && hmm_bench_touch(b, 2, true);
}

bool hmm_bench_map_full(struct hmm_bench *b)
{
	return hmm_bench_map_empty(b) && hmm_bench_touch(b, 1, true);
}

/* The rest of the page table is for hmm_bench_fault_beside(). */
bool hmm_bench_map_table(struct hmm_bench *b)
{
	return hmm_bench_map_full(b) && hmm_bench_place(b, b->room, b->room, 0);
}

/* Neighbours that differ are not merged. */
bool hmm_bench_map_pieces(struct hmm_bench *b)
{
	unsigned long page;

	if (!hmm_bench_reserve(b))
		return false;
	for (page = 0; page < b->room; page += HMM_BENCH_PIECE)
		if (!hmm_bench_place(b, page, min(HMM_BENCH_PIECE, b->room - page),
				     page / HMM_BENCH_PIECE & 1 ? PROT_EXEC : 0))
			return false;
	hmm_bench_flag(b, VM_NOHUGEPAGE);
	return hmm_bench_touch(b, 1, true);
}

/* States */

bool hmm_bench_zap(struct hmm_bench *b)
{
	if (b->waited)
		bitmap_zero(b->waited, b->room);
	return !do_madvise(b->mm, b->start, b->room << PAGE_SHIFT, MADV_DONTNEED);
}

bool hmm_bench_zap_and_read(struct hmm_bench *b)
{
	return hmm_bench_zap(b) && hmm_bench_touch(b, 1, false);
}

bool hmm_bench_zap_and_write_half(struct hmm_bench *b)
{
	return hmm_bench_zap(b) && hmm_bench_touch(b, 2, true);
}

/* Faults that wait */

/*
 * As userfaultfd does: the first fault of a page drops the lock to wait for the
 * page, and when the fault is tried again it is there.
 */
static vm_fault_t hmm_bench_wait_fault(struct vm_fault *vmf)
{
	struct hmm_bench *b = vmf->vma->vm_private_data;

	if (!__test_and_set_bit(vmf->pgoff, b->waited)) {
		if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
			return VM_FAULT_SIGBUS;
		release_fault_lock(vmf);
		return VM_FAULT_RETRY;
	}
	vmf->page = alloc_page(GFP_HIGHUSER | __GFP_ZERO);
	return vmf->page ? 0 : VM_FAULT_OOM;
}

static const struct vm_operations_struct hmm_bench_wait_vm_ops = {
	.fault = hmm_bench_wait_fault,
};

static int hmm_bench_wait_mmap(struct file *file, struct vm_area_struct *vma)
{
	vma->vm_ops = &hmm_bench_wait_vm_ops;
	vma->vm_private_data = file->private_data;
	return 0;
}

static const struct file_operations hmm_bench_wait_fops = {
	.mmap = hmm_bench_wait_mmap,
};

bool hmm_bench_map_waiting(struct hmm_bench *b)
{
	struct file *file;

	b->waited = kvcalloc(BITS_TO_LONGS(b->room), sizeof(*b->waited), GFP_KERNEL);
	file = anon_inode_create_getfile("[hmm_bench]", &hmm_bench_wait_fops, b, O_RDWR, NULL);
	if (IS_ERR(file))
		return false;
	b->file = file;
	return b->waited && hmm_bench_reserve(b) && hmm_bench_place(b, 0, b->room, 0);
}

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
/* Large folios */

#define HMM_BENCH_MTHP_ORDER	(ilog2(SZ_64K) - PAGE_SHIFT)

/* With folios of these orders and no others, whatever the system's settings. */
static bool hmm_bench_map_orders(struct hmm_bench *b, unsigned long orders)
{
	unsigned long always = huge_anon_orders_always;
	unsigned long madvise = huge_anon_orders_madvise;
	unsigned long inherit = huge_anon_orders_inherit;
	bool mapped;

	if (!hmm_bench_reserve(b) || !hmm_bench_place(b, 0, b->room, 0))
		return false;
	hmm_bench_flag(b, VM_HUGEPAGE);
	WRITE_ONCE(huge_anon_orders_always, orders);
	WRITE_ONCE(huge_anon_orders_madvise, 0);
	WRITE_ONCE(huge_anon_orders_inherit, 0);
	mapped = hmm_bench_touch(b, 1, true);
	WRITE_ONCE(huge_anon_orders_always, always);
	WRITE_ONCE(huge_anon_orders_madvise, madvise);
	WRITE_ONCE(huge_anon_orders_inherit, inherit);
	return mapped;
}

bool hmm_bench_map_thp(struct hmm_bench *b)
{
	return hmm_bench_map_orders(b, BIT(PMD_ORDER));
}

bool hmm_bench_map_mthp(struct hmm_bench *b)
{
	return hmm_bench_map_orders(b, BIT(HMM_BENCH_MTHP_ORDER));
}
#endif

#ifdef CONFIG_HUGETLBFS
bool hmm_bench_map_hugetlb(struct hmm_bench *b)
{
	unsigned long at;

	if (!hmm_bench_reserve(b))
		return false;
	at = ksys_mmap_pgoff(b->start, b->room << PAGE_SHIFT, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_HUGETLB |
			     PMD_SHIFT << MAP_HUGE_SHIFT, -1, 0);
	return at == b->start && hmm_bench_touch(b, 1, true);
}
#endif

#ifdef CONFIG_DEVICE_PRIVATE
/* Device-private memory */

static void hmm_bench_device_free(struct folio *folio)
{
}

/* Nobody touches the pages. */
static vm_fault_t hmm_bench_device_to_ram(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

static const struct dev_pagemap_ops hmm_bench_device_ops = {
	.folio_free	= hmm_bench_device_free,
	.migrate_to_ram	= hmm_bench_device_to_ram,
};

static struct dev_pagemap hmm_bench_device = {
	.type		= MEMORY_DEVICE_PRIVATE,
	.nr_range	= 1,
	.ops		= &hmm_bench_device_ops,
	.owner		= &hmm_bench_device,
};

static bool hmm_bench_create_device(unsigned long size)
{
	struct resource *res = request_free_mem_region(&iomem_resource, size, "hmm_bench");

	if (IS_ERR(res))
		return false;
	hmm_bench_device.range.start = res->start;
	hmm_bench_device.range.end = res->end;
	if (!IS_ERR(memremap_pages(&hmm_bench_device, numa_mem_id())))
		return true;
	release_mem_region(res->start, size);
	return false;
}

/*
 * Entries without a reference or a place in the accounts, which is why they have
 * to be taken back before anybody else sees them.
 */
static int hmm_bench_plant(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_bench *b = data;
	unsigned long pfn = PHYS_PFN(hmm_bench_device.range.start);
	swp_entry_t entry;

	pfn += (addr - b->start) >> PAGE_SHIFT;
	entry = make_writable_device_private_entry(pfn);
	set_pte_at(b->mm, addr, ptep, swp_entry_to_pte(entry));
	return 0;
}

static int hmm_bench_unplant(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_bench *b = data;

	pte_clear(b->mm, addr, ptep);
	return 0;
}

bool hmm_bench_map_device(struct hmm_bench *b)
{
	unsigned long size = ALIGN(b->room << PAGE_SHIFT, BIT(PA_SECTION_SHIFT));

	if (!hmm_bench_map_empty(b) || !hmm_bench_create_device(size))
		return false;
	b->owner = hmm_bench_device.owner;
	return !apply_to_page_range(b->mm, b->start, b->room << PAGE_SHIFT, hmm_bench_plant, b);
}

void hmm_bench_unmap_device(struct hmm_bench *b)
{
	const struct range *range = &hmm_bench_device.range;

	if (!b->owner)
		return;
	apply_to_page_range(b->mm, b->start, b->room << PAGE_SHIFT, hmm_bench_unplant, b);
	memunmap_pages(&hmm_bench_device);
	release_mem_region(range->start, range_len(range));
}
#endif
