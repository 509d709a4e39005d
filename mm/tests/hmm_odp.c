// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A driver that is built as RDMA's on-demand paging is
 *
 * The callback trusts the list, as drivers do: only an element that is valid
 * has its translation taken out of the device's table, only what
 * hmm_dma_unmap_pfn() finds is unmapped, and only a page whose element is
 * writable is set dirty. So what HMM does to the list behind the driver's back
 * ends up in what the device can reach. The driver notes beside that what would
 * have been right.
 */
#include <kunit/resource.h>
#include <linux/anon_inodes.h>
#include <linux/dma-direct.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/pci-p2pdma.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "hmm_odp.h"
#include "hmm_oracle.h"

/* Regions lie across the border of two page tables, if they are not aligned to it. */
#define HMM_ODP_START	(SZ_1G + PMD_SIZE)
#define HMM_ODP_BEFORE	37UL

/* Folios of a size that PTEs map, and that devices can map with one entry. */
#define HMM_ODP_FOLIO_ORDER	4
#define HMM_ODP_FOLIO_PAGES	BIT(HMM_ODP_FOLIO_ORDER)

/* The device's table */

/* The pfn that the device reaches at an address, as the translator knows, or 0. */
static unsigned long hmm_odp_translate(struct hmm_odp *o, dma_addr_t addr)
{
	struct hmm_dma_device *d = &o->device;
	void *entry;

	if (d->way->stateless)
		return PHYS_PFN(dma_to_phys(d->dev, addr));
	entry = xa_load(&d->reach, PHYS_PFN(addr));
	return entry ? xa_to_value(entry) >> 1 : 0;
}

/* The page that the device reaches, or NULL if its table has none. */
struct page *hmm_odp_reach(struct hmm_odp *o, unsigned long page)
{
	const struct hmm_odp_entry *entry = &o->table[page];
	struct page *found = NULL;

	mutex_lock(&o->lock);
	if (entry->present)
		found = pfn_to_page(hmm_odp_translate(o, entry->addr));
	mutex_unlock(&o->lock);
	return found;
}

/* Put a page into the device's table, by what its element says now. */
static int hmm_odp_populate_page(struct hmm_odp *o, unsigned long page, unsigned long request)
{
	struct pci_p2pdma_map_state p2pdma = {};
	struct hmm_odp_entry *entry = &o->table[page];
	unsigned long element = hmm_odp_element(o, page);
	dma_addr_t addr;

	/* Requests share their bits with the outputs that meet them. */
	if (request & ~element)
		o->counts.unmet++;
	if (!(element & HMM_PFN_VALID))
		return 0;

	addr = hmm_dma_map_pfn(o->device.dev, &o->map, page, &p2pdma);
	if (dma_mapping_error(o->device.dev, addr))
		return -EIO;
	if (hmm_odp_translate(o, addr) != (element & ~HMM_PFN_FLAGS))
		o->counts.other++;

	o->counts.mapped += !entry->mapped;
	entry->addr = addr;
	entry->present = true;
	entry->writable = element & HMM_PFN_WRITE;
	entry->mapped = true;
	return 0;
}

static int hmm_odp_populate(struct hmm_odp *o, const struct hmm_range *range,
			    unsigned long start, unsigned long end)
{
	int ret = 0;

	lockdep_assert_held(&o->lock);
	for (; start < end && !ret; start += PAGE_SIZE)
		ret = hmm_odp_populate_page(o, (start - o->start) >> PAGE_SHIFT,
					    range->default_flags);
	return ret;
}

/* The calls */

/**
 * struct hmm_odp_fault - a fault of the device's
 * @range: what HMM is asked for
 * @o: the region
 */
struct hmm_odp_fault {
	struct hmm_range range;
	struct hmm_odp *o;
};

/* The drivers' own duty after a call. Returns false if it has to be made again. */
static bool hmm_odp_finish(struct hmm_odp *o, struct hmm_range *range, int *ret)
{
	bool valid;

	mutex_lock(&o->lock);
	valid = !mmu_interval_read_retry(&o->notifier, range->notifier_seq);
	if (valid)
		*ret = hmm_odp_populate(o, range, range->start, range->end);
	mutex_unlock(&o->lock);
	return valid;
}

static int hmm_odp_fault_locked(struct hmm_odp *o, struct hmm_range *range,
				unsigned long timeout)
{
	unsigned long deadline = jiffies + timeout;
	int ret;

	do {
		range->notifier_seq = mmu_interval_read_begin(&o->notifier);
		mmap_read_lock(o->mm);
		ret = hmm_range_fault(range);
		mmap_read_unlock(o->mm);
		if (ret && ret != -EBUSY)
			return ret;
		if (!ret && hmm_odp_finish(o, range, &ret))
			return ret;
	} while (time_before(jiffies, deadline));
	return -EBUSY;
}

static int hmm_odp_fault_unlocked(struct hmm_odp *o, struct hmm_range *range,
				  unsigned long timeout)
{
	unsigned long deadline = jiffies + timeout;
	int ret;

	do {
		ret = hmm_range_fault_unlocked_timeout(range, timeout);
		if (ret || hmm_odp_finish(o, range, &ret))
			return ret;
	} while (time_before(jiffies, deadline));
	return -EBUSY;
}

static void hmm_odp_commit_lock(struct hmm_range *range)
{
	mutex_lock(&container_of(range, struct hmm_odp_fault, range)->o->lock);
}

static void hmm_odp_commit_unlock(struct hmm_range *range)
{
	mutex_unlock(&container_of(range, struct hmm_odp_fault, range)->o->lock);
}

static int hmm_odp_commit(struct hmm_range *range, unsigned long start, unsigned long end)
{
	struct hmm_odp_fault *fault = container_of(range, struct hmm_odp_fault, range);

	return hmm_odp_populate(fault->o, range, start, end);
}

static const struct hmm_commit_ops hmm_odp_commit_ops = {
	.lock	= hmm_odp_commit_lock,
	.unlock	= hmm_odp_commit_unlock,
	.commit	= hmm_odp_commit,
};

static int hmm_odp_fault_each(struct hmm_odp *o, struct hmm_range *range,
			      unsigned long timeout)
{
	return hmm_range_fault_each(range, timeout, &hmm_odp_commit_ops);
}

const struct hmm_odp_call hmm_odp_calls[] = {
	[HMM_ODP_LOCKED] = { "locked", hmm_odp_fault_locked },
	[HMM_ODP_UNLOCKED] = { "unlocked", hmm_odp_fault_unlocked },
	[HMM_ODP_EACH] = { "each", hmm_odp_fault_each },
};

/*
 * The device misses pages [@page, @page + @npages). Returns 0 when its table has
 * them, or what the call did.
 */
int hmm_odp_fault(struct hmm_odp *o, const struct hmm_odp_call *call, unsigned long page,
		  unsigned long npages, unsigned long request, unsigned long timeout)
{
	struct hmm_odp_fault fault = {
		.range = {
			.notifier	= &o->notifier,
			.start		= hmm_odp_addr(o, page),
			.end		= hmm_odp_addr(o, page + npages),
			.hmm_pfns	= &o->map.pfn_list[page],
			.default_flags	= request,
		},
		.o = o,
	};
	int ret = call->fault(o, &fault.range, timeout);

	mutex_lock(&o->lock);
	o->counts.calls += !ret;
	o->counts.errors += ret && ret != -EBUSY;
	mutex_unlock(&o->lock);
	return ret;
}

/* The callback */

/* Take a translation out of the device's table, if the list says that there is one. */
static void hmm_odp_zap_entry(struct hmm_odp *o, unsigned long page)
{
	struct hmm_odp_entry *entry = &o->table[page];

	if (hmm_odp_element(o, page) & HMM_PFN_VALID)
		entry->present = false;
	o->counts.stale += entry->present;
}

/* Nobody but hmm_dma_map_pfn() sets these bits, and that needs the lock. */
static bool hmm_odp_is_revived(const struct hmm_odp *o, unsigned long page)
{
	return hmm_odp_element(o, page) & HMM_ODP_STICKY && !o->table[page].mapped;
}

static void hmm_odp_unmap(struct hmm_odp *o, unsigned long page)
{
	unsigned long element = hmm_odp_element(o, page);
	struct hmm_odp_entry *entry = &o->table[page];
	bool unmapped;

	o->counts.revived += hmm_odp_is_revived(o, page);
	unmapped = hmm_dma_unmap_pfn(o->device.dev, &o->map, page);
	if (unmapped && element & HMM_PFN_WRITE) {
		set_page_dirty(compound_head(hmm_pfn_to_page(element)));
		o->counts.dirtied++;
	}
	o->counts.lost += unmapped != entry->mapped;
	o->counts.undirtied += entry->mapped && entry->writable && !(element & HMM_PFN_WRITE);
	o->counts.unmapped += unmapped;
	entry->mapped = false;
	entry->writable = false;
	/* As drivers do it. What a walk stores meanwhile is stale, for it has begun before. */
	WRITE_ONCE(o->map.pfn_list[page], hmm_odp_element(o, page) & ~HMM_PFN_FLAGS);
}

static void hmm_odp_drop(struct hmm_odp *o, unsigned long page, unsigned long end)
{
	unsigned long i;

	lockdep_assert_held(&o->lock);
	for (i = page; i < end; i++)
		hmm_odp_zap_entry(o, i);
	for (i = page; i < end; i++)
		hmm_odp_unmap(o, i);
}

/* Single-stepped tests have an invalidation take its time. */
static void hmm_odp_hold(struct hmm_odp *o, unsigned long page, unsigned long end)
{
	if (READ_ONCE(o->hold) - page >= end - page)
		return;
	WRITE_ONCE(o->hold, ULONG_MAX);
	complete(&o->holding);
	wait_for_completion(&o->go);
}

static bool hmm_odp_invalidate(struct mmu_interval_notifier *notifier,
			       const struct mmu_notifier_range *range, unsigned long seq)
{
	struct hmm_odp *o = container_of(notifier, struct hmm_odp, notifier);
	unsigned long start = max(range->start, o->start);
	unsigned long end = min(range->end, hmm_odp_addr(o, o->npages));
	unsigned long page = (start - o->start) >> PAGE_SHIFT;

	if (!mmu_notifier_range_blockable(range))
		return false;
	end = (end - o->start) >> PAGE_SHIFT;
	mutex_lock(&o->lock);
	mmu_interval_set_seq(notifier, seq);
	hmm_odp_drop(o, page, end);
	mutex_unlock(&o->lock);
	hmm_odp_hold(o, page, end);
	return true;
}

static const struct mmu_interval_notifier_ops hmm_odp_notifier_ops = {
	.invalidate = hmm_odp_invalidate,
};

/* Memory */

vm_fault_t hmm_odp_handle_map(struct hmm_odp *o, struct vm_fault *vmf, unsigned long page)
{
	if (o->folios) {
		vmf->page = o->folios[page / HMM_ODP_FOLIO_PAGES] + page % HMM_ODP_FOLIO_PAGES;
		get_page(vmf->page);
		return 0;
	}
	vmf->page = alloc_page(GFP_HIGHUSER | __GFP_ZERO);
	return vmf->page ? 0 : VM_FAULT_OOM;
}

static vm_fault_t hmm_odp_handler_fault(struct vm_fault *vmf)
{
	struct hmm_odp *o = vmf->vma->vm_private_data;
	unsigned long page = (vmf->address - o->start) >> PAGE_SHIFT;

	return o->handle ? o->handle(o, vmf, page) : hmm_odp_handle_map(o, vmf, page);
}

static const struct vm_operations_struct hmm_odp_vm_ops = {
	.fault = hmm_odp_handler_fault,
};

static int hmm_odp_mmap(struct file *file, struct vm_area_struct *vma)
{
	vma->vm_ops = &hmm_odp_vm_ops;
	vma->vm_private_data = file->private_data;
	return 0;
}

static const struct file_operations hmm_odp_fops = {
	.mmap = hmm_odp_mmap,
};

static void hmm_odp_mmap_at(struct hmm_odp *o, unsigned long at, unsigned long flags)
{
	o->start = kunit_vm_mmap(o->test, o->file, at, o->npages << PAGE_SHIFT,
				 PROT_READ | PROT_WRITE, flags, 0);
	KUNIT_ASSERT_EQ(o->test, o->start, at);
}

static void hmm_odp_map_handled(struct hmm_odp *o)
{
	struct file *file;

	file = anon_inode_create_getfile("[hmm_odp]", &hmm_odp_fops, o, O_RDWR, NULL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(o->test, file);
	o->file = file;
	hmm_odp_mmap_at(o, HMM_ODP_START - (HMM_ODP_BEFORE << PAGE_SHIFT), MAP_SHARED);
}

static void hmm_odp_put_folios(void *data)
{
	struct page **folios = data;

	for (; *folios; folios++)
		put_page(*folios);
}

static void hmm_odp_map_folios(struct hmm_odp *o)
{
	unsigned long i, n = o->npages / HMM_ODP_FOLIO_PAGES;
	struct page **folios;

	folios = kunit_kcalloc(o->test, n + 1, sizeof(*folios), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(o->test, folios);
	KUNIT_ASSERT_EQ(o->test, 0,
			kunit_add_action_or_reset(o->test, hmm_odp_put_folios, folios));
	for (i = 0; i < n; i++) {
		folios[i] = alloc_pages(GFP_KERNEL | __GFP_COMP, HMM_ODP_FOLIO_ORDER);
		KUNIT_ASSERT_NOT_NULL(o->test, folios[i]);
	}
	o->folios = folios;
	o->file = anon_inode_create_getfile("[hmm_odp]", &hmm_odp_fops, o, O_RDWR, NULL);
	KUNIT_ASSERT_FALSE(o->test, IS_ERR(o->file));
	hmm_odp_mmap_at(o, HMM_ODP_START - (HMM_ODP_FOLIO_PAGES << PAGE_SHIFT), MAP_SHARED);
}

static void hmm_odp_map_pages(struct hmm_odp *o)
{
	hmm_odp_mmap_at(o, HMM_ODP_START - (HMM_ODP_BEFORE << PAGE_SHIFT),
			MAP_PRIVATE | MAP_ANONYMOUS);
	hmm_oracle_madvise(o->mm, o->start, o->npages << PAGE_SHIFT, MADV_NOHUGEPAGE);
}

const struct hmm_odp_memory hmm_odp_pages = {
	.name = "pages", .npages = 128, .piece = 1, .map = hmm_odp_map_pages,
};

const struct hmm_odp_memory hmm_odp_handled = {
	.name = "handled", .npages = 128, .piece = 1, .map = hmm_odp_map_handled,
};

const struct hmm_odp_memory hmm_odp_folios = {
	.name = "folios", .npages = 8 * HMM_ODP_FOLIO_PAGES, .piece = HMM_ODP_FOLIO_PAGES,
	.map = hmm_odp_map_folios,
};

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
static void hmm_odp_map_thp(struct hmm_odp *o)
{
	hmm_odp_mmap_at(o, HMM_ODP_START, MAP_PRIVATE | MAP_ANONYMOUS);
	KUNIT_ASSERT_EQ(o->test, 0, hmm_oracle_madvise(o->mm, o->start, o->npages << PAGE_SHIFT,
						       MADV_HUGEPAGE));
}

const struct hmm_odp_memory hmm_odp_thp = {
	.name = "thp", .piece = 1, .map = hmm_odp_map_thp,
};
#endif

#ifdef CONFIG_HUGETLB_PAGE
static void hmm_odp_map_hugetlb(struct hmm_odp *o)
{
	KUNIT_ASSERT_EQ(o->test, 0, kunit_attach_mm());
	o->start = hmm_oracle_mmap_hugetlb(HMM_ODP_START, o->npages << PAGE_SHIFT);
	if (o->start != HMM_ODP_START)
		kunit_skip(o->test, "there are no pages in the pool of hugetlb pages");
}

const struct hmm_odp_memory hmm_odp_hugetlb = {
	.name = "hugetlb", .map = hmm_odp_map_hugetlb,
};
#endif

/* Take pages away from a mapping with a handler, with the mmap lock held. */
void hmm_odp_zap_file(struct hmm_odp *o, unsigned long page, unsigned long npages)
{
	unmap_mapping_range(o->file->f_mapping, (loff_t)page << PAGE_SHIFT,
			    (loff_t)npages << PAGE_SHIFT, 1);
}

/* Take pages away. Returns 0 if that was possible. */
int hmm_odp_zap(struct hmm_odp *o, unsigned long page, unsigned long npages)
{
	if (!o->file)
		return hmm_oracle_madvise(o->mm, hmm_odp_addr(o, page), npages << PAGE_SHIFT,
					  MADV_DONTNEED);
	/* User Mode Linux looks at all VMAs then, to flush them. */
	mmap_read_lock(o->mm);
	hmm_odp_zap_file(o, page, npages);
	mmap_read_unlock(o->mm);
	return 0;
}

/* Leave private pages where they are, for reading. The next write may write on there. */
void hmm_odp_write_protect(struct hmm_odp *o, unsigned long page, unsigned long npages)
{
	hmm_oracle_write_protect(o->mm, hmm_odp_addr(o, page), npages << PAGE_SHIFT);
}

/* Have the CPU access a page. The address space has to be the calling thread's. */
int hmm_odp_touch(struct hmm_odp *o, unsigned long page, bool write)
{
	void __user *at = (void __user *)hmm_odp_addr(o, page);
	char byte = 0;

	if (write)
		return copy_to_user(at, &byte, 1) ? -EFAULT : 0;
	return copy_from_user(&byte, at, 1) ? -EFAULT : 0;
}

/* The region */

struct hmm_odp *hmm_odp_create(struct kunit *test, const struct hmm_dma_way *way,
			       const struct hmm_odp_memory *memory)
{
	struct hmm_odp *o = test->priv;
	int ret;

	o->memory = memory;
	o->npages = hmm_odp_npages(memory);
	hmm_dma_device_create(&o->device, test, way, 2 * o->npages);
	o->table = kunit_kcalloc(test, o->npages, sizeof(*o->table), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, o->table);

	KUNIT_ASSERT_EQ(test, 0, kunit_attach_mm());
	o->mm = current->mm;
	memory->map(o);
	ret = hmm_dma_map_alloc(o->device.dev, &o->map, o->npages, PAGE_SIZE);
	KUNIT_ASSERT_EQ(test, ret, 0);
	ret = mmu_interval_notifier_insert(&o->notifier, o->mm, o->start,
					   o->npages << PAGE_SHIFT, &hmm_odp_notifier_ops);
	KUNIT_ASSERT_EQ(test, ret, 0);
	return o;
}

int hmm_odp_init(struct kunit *test)
{
	struct hmm_odp *o = kunit_kzalloc(test, sizeof(*o), GFP_KERNEL);

	if (!o)
		return -ENOMEM;
	o->test = test;
	o->hold = ULONG_MAX;
	init_completion(&o->holding);
	init_completion(&o->go);
	mutex_init(&o->lock);
	/* Reclaim calls the notifier, which takes the lock. */
	fs_reclaim_acquire(GFP_KERNEL);
	mutex_lock(&o->lock);
	mutex_unlock(&o->lock);
	fs_reclaim_release(GFP_KERNEL);
	test->priv = o;
	return 0;
}

/* Leave no mapping behind, wherever a test ended. */
void hmm_odp_exit(struct kunit *test)
{
	struct hmm_odp *o = test->priv;

	if (!o)
		return;
	if (o->notifier.mm) {
		mutex_lock(&o->lock);
		hmm_odp_drop(o, 0, o->npages);
		mutex_unlock(&o->lock);
		mmu_interval_notifier_remove(&o->notifier);
	}
	hmm_dma_map_free(o->device.dev, &o->map);
	hmm_dma_device_destroy(&o->device);
	if (!IS_ERR_OR_NULL(o->file))
		fput(o->file);
}

/* Comparing */

static bool hmm_odp_same(const struct hmm_odp_entry *one, const struct hmm_odp_entry *other)
{
	return one->present == other->present && one->addr == other->addr &&
	       one->writable == other->writable;
}

/*
 * Is what the device's table has of a page what the page tables have? The oracle takes
 * locks that are not to be taken under the driver's, so the table is looked at before
 * and after. What is gained in between the device does not have. The sequence alone
 * does not tell: invalidations that overlap have one. Returns false if the two were not
 * so at one time.
 */
static bool hmm_odp_look(struct hmm_odp *o, unsigned long page, bool *like)
{
	unsigned long cpu, pfn = 0, seq;
	struct hmm_odp_entry entry;
	bool stale;

	mutex_lock(&o->lock);
	seq = o->notifier.invalidate_seq;
	entry = o->table[page];
	if (entry.present)
		pfn = hmm_odp_translate(o, entry.addr);
	mutex_unlock(&o->lock);

	*like = true;
	if (!entry.present)
		return true;
	cpu = hmm_oracle(o->mm, hmm_odp_addr(o, page), NULL).out;
	*like = cpu & HMM_PFN_VALID && pfn == (cpu & ~HMM_PFN_FLAGS) &&
		(!entry.writable || cpu & HMM_PFN_WRITE);

	mutex_lock(&o->lock);
	stale = mmu_interval_read_retry(&o->notifier, seq) ||
		!hmm_odp_same(&entry, &o->table[page]);
	mutex_unlock(&o->lock);
	return !stale;
}

static bool hmm_odp_is_like(struct hmm_odp *o, unsigned long page)
{
	unsigned int tries;
	bool like;

	for (tries = 0; tries < 100; tries++)
		if (hmm_odp_look(o, page, &like))
			return like;
	return true;
}

/*
 * Whatever else goes on: a page stays as it is until the callback has been told, and
 * that waits for the lock. So all that the device's table has, the page tables have,
 * and what is mapped is what the table has.
 */
void hmm_odp_compare(struct hmm_odp *o)
{
	unsigned long page, present = 0;

	mmap_read_lock(o->mm);
	for (page = 0; page < o->npages; page++)
		o->counts.unlike += !hmm_odp_is_like(o, page);
	mmap_read_unlock(o->mm);

	mutex_lock(&o->lock);
	for (page = 0; page < o->npages; page++) {
		present += o->table[page].present;
		o->counts.lost += o->table[page].present != o->table[page].mapped;
		o->counts.revived += hmm_odp_is_revived(o, page);
	}
	if (!o->device.way->stateless)
		o->counts.lost += abs_diff(present, hmm_dma_connected(&o->device));
	mutex_unlock(&o->lock);
}

void hmm_odp_expect_right(struct hmm_odp *o)
{
	const struct hmm_odp_counts *counts = &o->counts;

	hmm_odp_compare(o);
	KUNIT_EXPECT_EQ(o->test, counts->stale, 0);
	KUNIT_EXPECT_EQ(o->test, counts->lost, 0);
	KUNIT_EXPECT_EQ(o->test, counts->undirtied, 0);
	KUNIT_EXPECT_EQ(o->test, counts->other, 0);
	KUNIT_EXPECT_EQ(o->test, counts->unmet, 0);
	KUNIT_EXPECT_EQ(o->test, counts->revived, 0);
	KUNIT_EXPECT_EQ(o->test, counts->unlike, 0);
}
