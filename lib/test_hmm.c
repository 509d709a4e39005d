// SPDX-License-Identifier: GPL-2.0
/*
 * A device that uses HMM as a GPU would, and shows user space what it sees.
 *
 * The model
 * =========
 *
 * There are up to four devices, /dev/hmm_dmirror<n>. Each open file is a mirror
 * of the address space of the process that opened it: the device can read and
 * write what that process can read and write, at the same addresses. The file
 * may be handed to other processes. It stays a mirror of its opener, and
 * whoever holds it can reach the opener's memory. Once the opener's address
 * space is gone there is nothing left to reach.
 *
 * A mirror has a table, the device's page table: one entry for each page that
 * the device can access, which says where the page is and whether it may be
 * written. An access goes through the table alone. Where it finds no entry, or
 * no entry that is strong enough, it misses, and the device faults in all that
 * is left of the access: walks the CPU page tables with HMM, a batch of pages
 * at a time, and enters what HMM put out into the table.
 *
 * A device has memory of its own, too, which a process's pages can migrate to
 * and back from. That of the first two devices is private: the CPU cannot
 * access it, and faults a page back when it tries. That of the others is
 * coherent: the CPU accesses it like any memory. Migration leaves the table
 * alone, but for what the notifier removes: the device learns where a page is
 * now as it learns everything else, from HMM.
 *
 * A page of private memory is nothing but a struct page, so this device, which
 * is not real, keeps the data in a page of system memory, its storage.
 *
 * Words
 * =====
 *
 * mirror	an open file, struct dmirror
 * table	the mirror's device page table
 * entry	what the table holds for a page: the page, and an access tag
 * miss		an access to a page whose entry does not allow it
 * walk		a call into HMM for a batch, together with its retries
 * output	what a walk stored for a page, see enum hmm_pfn_flags
 * chunk	what a device adds to its memory at a time
 * block	the part of a chunk that a PMD can map, the largest folio there is
 *
 * Invariants
 * ==========
 *
 * 1. An entry is as good as the CPU's own: the CPU's entry for the page cannot
 *    change or go away, nor can the page, before the invalidate callback has
 *    removed the entry. No reference to the page is held nor needed.
 * 2. The table is changed, and entries are followed, only under dmirror->lock.
 *    The invalidate callback waits for that lock, hence the page behind an
 *    entry stays what it is until the lock is dropped.
 * 3. Outputs mean something only under dmirror->lock, and only after
 *    mmu_interval_read_retry() said so. dmirror_walk() is the one place.
 * 4. A mirror does not keep the address space alive. mmget_not_zero() succeeds
 *    or the opener is gone.
 * 5. A folio of device memory in use holds a reference to the mirror that it was
 *    allocated for, so whoever is left with it, a child for one, can still use
 *    it when the file is closed.
 *
 * Locks
 * =====
 *
 * device->chunks_lock	which chunks a device has
 * mmap lock		of the mirrored address space
 * folio lock
 * dmirror->lock	the table
 * device->lock		which pages of a device's memory are in use
 * dmirror->inject_lock	what is to happen where
 *
 * in this order. The invalidate callback takes dmirror->lock, and reclaim calls
 * it. Under that lock nothing may wait for memory, touch user memory or take a
 * lock that comes before. device->lock is taken wherever the last reference to
 * a folio can be dropped, in interrupts too.
 *
 * All else in a mirror is set by open and constant until release.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/capability.h>
#include <linux/delay.h>
#include <linux/device.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/hmm.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/kref.h>
#include <linux/memory_hotplug.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/overflow.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/rmap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/wait.h>
#include <linux/xarray.h>

#include "test_hmm_uapi.h"
#include "../mm/tests/hmm_oracle.h"

/* The name of the character device region is known to user space. */
#define DMIRROR_REGION_NAME	"HMM_DMIRROR"

#define DMIRROR_MAX_DEVICES	4
#define DMIRROR_PRIVATE_DEVICES	2

/*
 * Bounds on what a command can make the kernel allocate or do at a time: the
 * range of a command, that of a raw fault, the outputs of a walk in one step and
 * in many, the data in transit between the device and the caller's buffer, and
 * the pages that a file offers for mmap.
 */
#define DMIRROR_MAX_PAGES	(4UL << 20)
#define DMIRROR_MAX_RAW_PAGES	(SZ_4G >> PAGE_SHIFT)
#define DMIRROR_WALK_PAGES	512UL
#define DMIRROR_EACH_PAGES	65536UL
#define DMIRROR_BOUNCE_PAGES	(SZ_2M >> PAGE_SHIFT)
#define DMIRROR_IO_PAGES	16UL

/* The largest folio of device memory, and also a batch of a migration. */
#define DMIRROR_BLOCK_ORDER	(PMD_SHIFT - PAGE_SHIFT)
#define DMIRROR_BLOCK_PAGES	BIT(DMIRROR_BLOCK_ORDER)

/*
 * A coherent device has one chunk. A private one takes more when it needs them,
 * and not so many that a test could not use them up.
 */
#define DMIRROR_CHUNK_SIZE	max_t(unsigned long, SZ_256M, PMD_SIZE)
#define DMIRROR_CHUNK_PAGES	(DMIRROR_CHUNK_SIZE >> PAGE_SHIFT)
#define DMIRROR_CHUNK_BLOCKS	(DMIRROR_CHUNK_SIZE >> PMD_SHIFT)
#define DMIRROR_MAX_CHUNKS	3

/*
 * A chunk is added, before a migration takes the mmap lock, if there are not as
 * many free pages in a row: a block for the migration and some for others that do
 * the same.
 */
#define DMIRROR_SPARE_PAGES	(8 * DMIRROR_BLOCK_PAGES)

static unsigned long spm_addr_dev0;
module_param(spm_addr_dev0, ulong, 0444);
MODULE_PARM_DESC(spm_addr_dev0,
		 "Physical address of reserved memory for the first coherent device");

static unsigned long spm_addr_dev1;
module_param(spm_addr_dev1, ulong, 0444);
MODULE_PARM_DESC(spm_addr_dev1,
		 "Physical address of reserved memory for the second coherent device");

struct dmirror_chunk {
	struct dev_pagemap pagemap;
	struct dmirror_device *device;
	unsigned long *used;	/* a bit for each page */
	unsigned long first_free; /* index of a page; none before it is free */
	struct page **storage;	/* of each page in use, if the memory is private */
};

/*
 * The address of a device is the dev_private_owner of its walks and the owner of
 * its memory.
 */
struct dmirror_device {
	unsigned long coherent_addr;	/* 0 if its memory is private */

	struct mutex chunks_lock;	/* with @lock, to change the chunks */
	spinlock_t lock;		/* protects what is in use or not */
	struct dmirror_chunk *chunks[DMIRROR_MAX_CHUNKS];
};

static struct dmirror_device dmirror_devices[DMIRROR_MAX_DEVICES];

/* Bits of dmirror->flags */
#define DMIRROR_FAIL_ALLOC	0

enum dmirror_stat {
	DMIRROR_INVALIDATIONS,
	DMIRROR_WALKS,
	DMIRROR_RETRIES,
	DMIRROR_MISSES,
	DMIRROR_PAGES_IN,
	DMIRROR_PAGES_OUT,
	DMIRROR_NR_STATS,
};

/* What is to happen at a point that the device passes. */
struct dmirror_injection {
	unsigned int action;
	u64 skip;
	u64 count;
	bool waiting;		/* somebody is at the point; atomic */
};

struct dmirror {
	struct dmirror_device *device;
	struct kref refs;		/* the file's, and one a folio in use */
	struct mmu_interval_notifier notifier;
	struct mutex lock;		/* protects the table */
	struct xarray table;
	unsigned long flags;		/* changed by atomic operations */
	atomic_long_t nr_pages;		/* of device memory */
	atomic_long_t stats[DMIRROR_NR_STATS];
	spinlock_t inject_lock;		/* protects the injections */
	struct dmirror_injection injections[HMM_DMIRROR_NR_POINTS];
	wait_queue_head_t inject_wait;	/* for the injections to change */
	struct page *io_pages[DMIRROR_IO_PAGES];
};

static void dmirror_count(struct dmirror *dmirror, enum dmirror_stat stat,
			  long n)
{
	atomic_long_add(n, &dmirror->stats[stat]);
}

static void dmirror_free(struct dmirror *dmirror)
{
	unsigned int i;

	for (i = 0; i < DMIRROR_IO_PAGES; i++)
		if (dmirror->io_pages[i])
			__free_page(dmirror->io_pages[i]);
	xa_destroy(&dmirror->table);
	mutex_destroy(&dmirror->lock);
	kfree(dmirror);
}

static void dmirror_release(struct kref *refs)
{
	dmirror_free(container_of(refs, struct dmirror, refs));
}

/*
 * Device memory: which pages are in use, and what for
 *
 * Memory is given out by the page and by the block, from the front.
 */

static struct dmirror_chunk *dmirror_pgmap_chunk(struct dev_pagemap *pgmap)
{
	return container_of(pgmap, struct dmirror_chunk, pagemap);
}

static unsigned long dmirror_chunk_first_pfn(struct dmirror_chunk *chunk)
{
	return PHYS_PFN(chunk->pagemap.range.start);
}

static unsigned long dmirror_chunk_index(struct dmirror_chunk *chunk,
					 struct page *page)
{
	return page_to_pfn(page) - dmirror_chunk_first_pfn(chunk);
}

static bool dmirror_is_local(struct dmirror_device *device, struct page *page)
{
	return is_zone_device_page(page) && page_pgmap(page)->owner == device;
}

/* Where the data of a page is that is in use, any page. */
static struct page *dmirror_storage(struct page *page)
{
	struct dmirror_chunk *chunk;

	if (!is_device_private_page(page))
		return page;
	chunk = dmirror_pgmap_chunk(page_pgmap(page));
	return chunk->storage[dmirror_chunk_index(chunk, page)];
}

static void dmirror_storage_free(struct dmirror_chunk *chunk,
				 unsigned long index, unsigned long nr)
{
	struct page **storage = chunk->storage + index;

	if (!chunk->storage)
		return;
	for (; nr--; storage++) {
		if (*storage)
			__free_page(*storage);
		*storage = NULL;
	}
}

/* By the page, so that a folio that is split needs nothing done to these. */
static int dmirror_storage_alloc(struct dmirror_chunk *chunk,
				 unsigned long index, unsigned long nr)
{
	gfp_t gfp = GFP_HIGHUSER | __GFP_ACCOUNT | __GFP_NOWARN;
	unsigned long before, got = 0;

	if (!chunk->storage)
		return 0;
	do {
		before = got;
		got = alloc_pages_bulk(gfp, nr, chunk->storage + index);
	} while (got > before && got < nr);
	if (got == nr)
		return 0;

	dmirror_storage_free(chunk, index, nr);
	return -ENOMEM;
}

/* The first of @nr free pages in a row, aligned to @align, or what is no index. */
static unsigned long dmirror_chunk_find(struct dmirror_chunk *chunk,
					unsigned long nr, unsigned long align)
{
	lockdep_assert_held(&chunk->device->lock);

	return bitmap_find_next_zero_area(chunk->used, DMIRROR_CHUNK_PAGES,
					  chunk->first_free, nr, align - 1);
}

/*
 * Takes a page, or a whole block, for use. Returns its chunk, and its index in
 * there, or NULL if the device has run out.
 */
static struct dmirror_chunk *dmirror_take(struct dmirror_device *device,
					  unsigned int order,
					  unsigned long *index)
{
	unsigned long nr = 1UL << order;
	struct dmirror_chunk *chunk;
	unsigned int i;

	guard(spinlock_irqsave)(&device->lock);
	for (i = 0; i < DMIRROR_MAX_CHUNKS; i++) {
		chunk = device->chunks[i];
		if (!chunk)
			continue;
		*index = dmirror_chunk_find(chunk, nr, nr);
		if (*index >= DMIRROR_CHUNK_PAGES)
			continue;
		bitmap_set(chunk->used, *index, nr);
		if (!order)
			chunk->first_free = *index + 1;
		return chunk;
	}
	return NULL;
}

static void dmirror_give_back(struct dmirror_chunk *chunk, unsigned long index,
			      unsigned long nr)
{
	dmirror_storage_free(chunk, index, nr);
	guard(spinlock_irqsave)(&chunk->device->lock);
	bitmap_clear(chunk->used, index, nr);
	chunk->first_free = min(chunk->first_free, index);
}

/*
 * A folio of device memory for @dmirror, locked, as a page; with no data in it.
 * NULL if the device or its storage has run out.
 */
static struct page *dmirror_devmem_alloc(struct dmirror *dmirror,
					 unsigned int order)
{
	unsigned long index, nr = 1UL << order;
	struct dmirror_chunk *chunk;
	struct page *page;

	chunk = dmirror_take(dmirror->device, order, &index);
	if (!chunk)
		return NULL;
	if (dmirror_storage_alloc(chunk, index, nr)) {
		dmirror_give_back(chunk, index, nr);
		return NULL;
	}

	/* It may still look like a part of a larger folio that it was once. */
	page = pfn_to_page(dmirror_chunk_first_pfn(chunk) + index);
	zone_device_page_init(page, &chunk->pagemap, order);
	if (order)
		folio_set_large_rmappable(page_folio(page));

	kref_get(&dmirror->refs);
	atomic_long_add(nr, &dmirror->nr_pages);
	page->zone_device_data = dmirror;
	return page;
}

/* The last reference is gone. Any context. */
static void dmirror_folio_free(struct folio *folio)
{
	struct dmirror_chunk *chunk = dmirror_pgmap_chunk(folio->pgmap);
	struct dmirror *dmirror = folio->page.zone_device_data;
	unsigned long nr = folio_nr_pages(folio);

	atomic_long_sub(nr, &dmirror->nr_pages);
	dmirror_give_back(chunk, dmirror_chunk_index(chunk, &folio->page), nr);
	kref_put(&dmirror->refs, dmirror_release);
}

/*
 * @tail has become a folio of its own, or, if NULL, all that @folio was split
 * into has been told of.
 */
static void dmirror_folio_split(struct folio *folio, struct folio *tail)
{
	struct dmirror *dmirror = folio->page.zone_device_data;

	if (!tail)
		return;
	tail->pgmap = folio->pgmap;
	tail->page.mapping = folio->page.mapping;
	tail->page.zone_device_data = dmirror;
	kref_get(&dmirror->refs);
}

/*
 * The table
 */

/* Tags of entries: an xarray has no others. */
enum {
	DMIRROR_ENTRY_READ = 0,
	DMIRROR_ENTRY_WRITE = 1,
	DMIRROR_ENTRY_EXCLUSIVE = 3,
};

static void *dmirror_entry(unsigned long output)
{
	return xa_tag_pointer(hmm_pfn_to_page(output),
			      output & HMM_PFN_WRITE ? DMIRROR_ENTRY_WRITE :
						       DMIRROR_ENTRY_READ);
}

/* The page to access, or NULL for a miss. */
static struct page *dmirror_table_lookup(struct dmirror *dmirror,
					 unsigned long index, bool write)
{
	void *entry = xa_load(&dmirror->table, index);

	lockdep_assert_held(&dmirror->lock);

	if (write && xa_pointer_tag(entry) == DMIRROR_ENTRY_READ)
		return NULL;
	return xa_untag_pointer(entry);
}

/* Removes the entries from @first to @last, inclusive. */
static void dmirror_table_drop(struct dmirror *dmirror, unsigned long first,
			       unsigned long last, bool may_sleep)
{
	unsigned long index;
	void *entry;

	lockdep_assert_held(&dmirror->lock);

	xa_for_each_range(&dmirror->table, index, entry, first, last) {
		xa_erase(&dmirror->table, index);
		if (may_sleep)
			cond_resched();
	}
}

/*
 * The notifier
 *
 * A mirror has a single one, for all of the address space, so that the table
 * has nothing to keep track of. The price is that any change of the address
 * space makes all walks start over.
 */

static bool dmirror_invalidate(struct mmu_interval_notifier *notifier,
			       const struct mmu_notifier_range *range,
			       unsigned long cur_seq)
{
	struct dmirror *dmirror = container_of(notifier, struct dmirror,
					       notifier);
	bool may_sleep = mmu_notifier_range_blockable(range);

	/* The page stays, it is just about to be this mirror's alone. */
	if (range->event == MMU_NOTIFY_EXCLUSIVE && range->owner == dmirror)
		return true;

	if (may_sleep)
		mutex_lock(&dmirror->lock);
	else if (!mutex_trylock(&dmirror->lock))
		return false;

	/* First of all, so that a walk under way can't pass its check. */
	mmu_interval_set_seq(notifier, cur_seq);
	dmirror_count(dmirror, DMIRROR_INVALIDATIONS, 1);
	dmirror_table_drop(dmirror, range->start >> PAGE_SHIFT,
			   (range->end - 1) >> PAGE_SHIFT, may_sleep);

	mutex_unlock(&dmirror->lock);
	return true;
}

/* Has the table lost anything since mmu_interval_read_begin() returned @seq? */
static bool dmirror_is_invalidated(struct dmirror *dmirror, unsigned long seq)
{
	guard(mutex)(&dmirror->lock);
	return mmu_interval_read_retry(&dmirror->notifier, seq);
}

static const struct mmu_interval_notifier_ops dmirror_notifier_ops = {
	.invalidate = dmirror_invalidate,
};

/*
 * Injection
 *
 * A test can have something happen when a point is passed, as often as it says
 * and after it was passed as often as it says.
 */

/* How long a test may take that somebody waits for. */
#define DMIRROR_INJECT_PATIENCE	(60 * HZ)

/* What happens now at @point? */
static unsigned int dmirror_inject_take(struct dmirror *dmirror,
					unsigned int point)
{
	struct dmirror_injection *injection = &dmirror->injections[point];
	unsigned int action;

	guard(spinlock)(&dmirror->inject_lock);

	action = injection->action;
	if (action && injection->skip) {
		injection->skip--;
		return HMM_DMIRROR_INJECT_NOTHING;
	}
	if (action && !--injection->count)
		injection->action = HMM_DMIRROR_INJECT_NOTHING;
	return action;
}

static bool dmirror_inject_is_waiting(struct dmirror *dmirror,
				      unsigned int point)
{
	return READ_ONCE(dmirror->injections[point].waiting);
}

static void dmirror_inject_set_waiting(struct dmirror *dmirror,
				       unsigned int point, bool waiting)
{
	WRITE_ONCE(dmirror->injections[point].waiting, waiting);
	wake_up_all(&dmirror->inject_wait);
}

static void dmirror_inject_wait(struct dmirror *dmirror, unsigned int point)
{
	dmirror_inject_set_waiting(dmirror, point, true);
	wait_event_killable_timeout(dmirror->inject_wait,
				    !dmirror_inject_is_waiting(dmirror, point),
				    DMIRROR_INJECT_PATIENCE);
	dmirror_inject_set_waiting(dmirror, point, false);
}

/* Nobody is left who could resume, so whoever waits goes on. */
static void dmirror_inject_nothing(struct dmirror *dmirror)
{
	scoped_guard(spinlock, &dmirror->inject_lock)
		memset(dmirror->injections, 0, sizeof(dmirror->injections));
	wake_up_all(&dmirror->inject_wait);
}

/* A point where one can but wait. */
static void dmirror_inject(struct dmirror *dmirror, unsigned int point)
{
	if (dmirror_inject_take(dmirror, point) == HMM_DMIRROR_INJECT_WAIT)
		dmirror_inject_wait(dmirror, point);
}

/*
 * Walks
 */

/**
 * struct dmirror_walk - a pass over a range of the mirrored address space
 * @dmirror: whose
 * @range: the batch that the walk is at, see dmirror_walk_next()
 * @prepare: puts the requests into @range, for another try, too. NULL if all
 *	pages have the same.
 * @look: does what else has to be done while the mmap lock is held that HMM was
 *	called with. NULL if there is nothing.
 * @use: does what has to be done with the outputs of [start, end), which are a
 *	part of @range. Called with dmirror->lock held, while the outputs are
 *	what the CPU has. Not called for what HMM failed for.
 * @timeout: jiffies for tries after the first invalidation, 0 for ever
 * @batch: how many pages @range has at a time
 * @tries: how many it took
 * @steps: how many times @use was called
 * @each: let HMM do all of the protocol, and hand over a step at a time
 * @unlocked: let HMM take the mmap lock and do the retries
 * @once: do not try again
 */
struct dmirror_walk {
	struct dmirror *dmirror;
	struct hmm_range range;
	void (*prepare)(struct dmirror_walk *walk);
	void (*look)(struct dmirror_walk *walk);
	int (*use)(struct dmirror_walk *walk, unsigned long start,
		   unsigned long end);
	unsigned long timeout;
	unsigned long batch;
	unsigned long tries;
	unsigned long steps;
	bool each;
	bool unlocked;
	bool once;
};

/* The batch was invalidated on the way. Positive: it goes to no caller. */
#define DMIRROR_INVALIDATED 1

static int dmirror_walk_init(struct dmirror_walk *walk, unsigned long start,
			     unsigned long batch, unsigned long requests)
{
	struct dmirror *dmirror = walk->dmirror;

	/* Zeroed: HMM hands on the sticky bits that it finds in here. */
	walk->range.hmm_pfns = kvcalloc(batch, sizeof(*walk->range.hmm_pfns),
					GFP_KERNEL_ACCOUNT);
	if (!walk->range.hmm_pfns)
		return -ENOMEM;

	walk->batch = batch;
	walk->range.notifier = &dmirror->notifier;
	walk->range.dev_private_owner = dmirror->device;
	walk->range.default_flags = requests;
	walk->range.end = start;
	walk->timeout = msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT);
	return 0;
}

static void dmirror_walk_fini(struct dmirror_walk *walk)
{
	kvfree(walk->range.hmm_pfns);
}

/*
 * Moves on to the next batch before @end. Batches are aligned as far as
 * possible, so as not to cut large mappings in two.
 */
static bool dmirror_walk_next(struct dmirror_walk *walk, unsigned long end)
{
	const unsigned long size = walk->batch << PAGE_SHIFT;
	unsigned long start = walk->range.end;

	walk->range.start = start;
	walk->range.end = start + min(end - start, size - start % size);
	return start < end;
}

static unsigned long dmirror_walk_npages(struct dmirror_walk *walk)
{
	return (walk->range.end - walk->range.start) >> PAGE_SHIFT;
}

/* The outputs from @start on. */
static unsigned long *dmirror_walk_outputs(struct dmirror_walk *walk,
					   unsigned long start)
{
	return &walk->range.hmm_pfns[(start - walk->range.start) >> PAGE_SHIFT];
}

static int dmirror_walk_locked(struct dmirror_walk *walk)
{
	struct hmm_range *range = &walk->range;
	struct mm_struct *mm = range->notifier->mm;
	int ret;

	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	ret = hmm_range_fault(range);
	if (!ret && walk->look)
		walk->look(walk);
	mmap_read_unlock(mm);
	return ret == -EBUSY ? DMIRROR_INVALIDATED : ret;
}

/*
 * An invalidation that comes now has to wait, or to fail if it can't. That is
 * over in no time, unless a test wants to see it.
 */
static int dmirror_walk_use(struct dmirror_walk *walk, unsigned long start,
			    unsigned long end)
{
	dmirror_inject(walk->dmirror, HMM_DMIRROR_POINT_USE);
	walk->steps++;
	return walk->use(walk, start, end);
}

static void dmirror_commit_lock(struct hmm_range *range)
{
	struct dmirror_walk *walk = container_of(range, struct dmirror_walk,
						 range);

	walk->tries++;
	mutex_lock(&walk->dmirror->lock);
}

static void dmirror_commit_unlock(struct hmm_range *range)
{
	struct dmirror_walk *walk = container_of(range, struct dmirror_walk,
						 range);

	mutex_unlock(&walk->dmirror->lock);
}

static int dmirror_commit(struct hmm_range *range, unsigned long start,
			  unsigned long end)
{
	return dmirror_walk_use(container_of(range, struct dmirror_walk, range),
				start, end);
}

static const struct hmm_commit_ops dmirror_commit_ops = {
	.lock = dmirror_commit_lock,
	.unlock = dmirror_commit_unlock,
	.commit = dmirror_commit,
};

/* All that the rest of this section does by hand. */
static int dmirror_walk_each(struct dmirror_walk *walk)
{
	int ret;

	if (walk->prepare)
		walk->prepare(walk);
	ret = hmm_range_fault_each(&walk->range, walk->timeout,
				   &dmirror_commit_ops);
	dmirror_count(walk->dmirror, DMIRROR_WALKS, 1);
	dmirror_count(walk->dmirror, DMIRROR_RETRIES, walk->tries - walk->steps);
	return ret;
}

static int dmirror_walk_once(struct dmirror_walk *walk)
{
	struct dmirror *dmirror = walk->dmirror;
	int ret;

	if (fatal_signal_pending(current))
		return -EINTR;

	if (walk->prepare)
		walk->prepare(walk);
	dmirror_count(dmirror, walk->tries++ ? DMIRROR_RETRIES : DMIRROR_WALKS,
		      1);
	if (walk->unlocked)
		ret = hmm_range_fault_unlocked_timeout(&walk->range,
						       walk->timeout);
	else
		ret = dmirror_walk_locked(walk);
	if (ret)
		return ret;

	mutex_lock(&dmirror->lock);
	if (mmu_interval_read_retry(&dmirror->notifier,
				    walk->range.notifier_seq))
		ret = DMIRROR_INVALIDATED;
	else
		ret = dmirror_walk_use(walk, walk->range.start, walk->range.end);
	mutex_unlock(&dmirror->lock);
	return ret;
}

/*
 * The time runs from the first invalidation on, so that a walk may take as long
 * as it needs to fault pages in.
 */
static int dmirror_walk_retry(struct dmirror_walk *walk)
{
	unsigned long deadline;
	int ret;

	ret = dmirror_walk_once(walk);
	deadline = jiffies + walk->timeout;
	while (ret == DMIRROR_INVALIDATED) {
		if (walk->once ||
		    (walk->timeout && time_after(jiffies, deadline)))
			return -EBUSY;
		ret = dmirror_walk_once(walk);
	}
	return ret;
}

/**
 * dmirror_walk() - get the outputs for a batch and use them
 * @walk: what to do
 *
 * Context: Process context, without any lock.
 * Return: what @walk->use returned, or %-EFAULT if the mirrored address space
 * is gone, %-EINTR if a fatal signal is pending, %-EBUSY if the batch was
 * invalidated again and again, and whatever else hmm_range_fault() returns.
 */
static int dmirror_walk(struct dmirror_walk *walk)
{
	struct mm_struct *mm = walk->dmirror->notifier.mm;
	int ret;

	walk->tries = 0;
	walk->steps = 0;
	if (!mmget_not_zero(mm))
		return -EFAULT;
	ret = walk->each ? dmirror_walk_each(walk) : dmirror_walk_retry(walk);
	mmput(mm);

	cond_resched();
	return ret;
}

/*
 * Access
 *
 * Reads and writes of any length take the same steps: copy what the table
 * allows for, and if that is nothing, fault in all that is left.
 */

struct dmirror_fault {
	struct dmirror_walk walk;
	struct xa_state xas;
	unsigned long done;	/* where what is entered ends */
	bool local_only;	/* enter only what is in the device's memory */
};

/* HMM must have granted, for every page, what was requested. */
static bool dmirror_granted(struct dmirror_walk *walk, unsigned long start,
			    unsigned long end)
{
	const unsigned long *output = dmirror_walk_outputs(walk, start);
	unsigned long requests = walk->range.default_flags;

	/* A request is granted by the output flag that has the same bit. */
	for (; start < end; start += PAGE_SIZE)
		if ((*output++ & (requests | HMM_PFN_ERROR)) != requests)
			return false;
	return true;
}

static bool dmirror_is_local_output(struct dmirror_walk *walk,
				    unsigned long output)
{
	return output & HMM_PFN_VALID &&
	       dmirror_is_local(walk->dmirror->device, hmm_pfn_to_page(output));
}

/* Running out of memory stays in the xa_state, too, for dmirror_fault_batch(). */
static int dmirror_fault_use(struct dmirror_walk *walk, unsigned long start,
			     unsigned long end)
{
	struct dmirror_fault *fault = container_of(walk, struct dmirror_fault,
						   walk);
	const unsigned long *output = dmirror_walk_outputs(walk, start);
	struct xa_state *xas = &fault->xas;

	if (WARN_ON_ONCE(!fault->local_only && !dmirror_granted(walk, start, end)))
		return -EIO;

	xas_set(xas, start >> PAGE_SHIFT);
	xas_lock(xas);
	/* Without it, going on to the next would stay where it is, once. */
	xas_load(xas);
	for (; start < end; start += PAGE_SIZE, output++) {
		if (!fault->local_only || dmirror_is_local_output(walk, *output))
			xas_store(xas, dmirror_entry(*output));
		if (xas_error(xas))
			break;
		xas_next(xas);
	}
	xas_unlock(xas);
	fault->done = start;
	return xas_error(xas);
}

/*
 * The table grows with whatever memory there is without waiting. If that is not
 * enough the rest of the batch is done again with memory waited for: without the
 * lock, so the outputs are not valid any more.
 */
static int dmirror_fault_batch(struct dmirror_fault *fault)
{
	struct hmm_range *range = &fault->walk.range;
	int ret;

	fault->done = range->start;
	do {
		range->start = fault->done;
		ret = dmirror_walk(&fault->walk);
	} while (xas_nomem(&fault->xas, GFP_KERNEL));

	return ret;
}

/*
 * Enters [@start, @end) into the table, faulted in as @requests say. Without
 * requests, enters the pages that are in the device's memory now.
 */
static int dmirror_fault(struct dmirror *dmirror, unsigned long start,
			 unsigned long end, unsigned long requests,
			 bool unlocked)
{
	struct dmirror_fault fault = {
		.walk.dmirror = dmirror,
		.walk.use = dmirror_fault_use,
		.walk.each = unlocked,
		.xas = __XA_STATE(&dmirror->table, 0, 0, 0),
		.local_only = !requests,
	};
	unsigned long batch = unlocked ? DMIRROR_EACH_PAGES : DMIRROR_WALK_PAGES;
	int ret;

	batch = min(batch, roundup_pow_of_two((end - start) >> PAGE_SHIFT));
	ret = dmirror_walk_init(&fault.walk, start, batch, requests);
	if (ret)
		return ret;

	while (!ret && dmirror_walk_next(&fault.walk, end))
		ret = dmirror_fault_batch(&fault);

	dmirror_walk_fini(&fault.walk);
	return ret;
}

/* Bits of dmirror_access.flags */
#define DMIRROR_ACCESS_WRITE		BIT(0)
#define DMIRROR_ACCESS_UNLOCKED		BIT(1)	/* leave the mmap lock to HMM */
#define DMIRROR_ACCESS_NO_FAULTS	BIT(2)	/* fail at a miss */

struct dmirror_access {
	struct dmirror *dmirror;
	struct hmm_dmirror_cmd *cmd;
	void *bounce;
	unsigned int flags;
};

static int dmirror_miss(struct dmirror_access *access, unsigned long start,
			unsigned long end)
{
	unsigned long requests = HMM_PFN_REQ_FAULT;

	if (access->flags & DMIRROR_ACCESS_NO_FAULTS)
		return -ENOENT;
	if (access->flags & DMIRROR_ACCESS_WRITE)
		requests |= HMM_PFN_REQ_WRITE;
	access->cmd->faults++;
	dmirror_count(access->dmirror, DMIRROR_MISSES, 1);
	return dmirror_fault(access->dmirror, start, end, requests,
			     access->flags & DMIRROR_ACCESS_UNLOCKED);
}

static int dmirror_read_page(void *buf, struct page *page)
{
	void *addr = kmap_local_page(dmirror_storage(page));
	unsigned long left;

	left = copy_mc_to_kernel(buf, addr, PAGE_SIZE);
	kunmap_local(addr);
	return left ? -EHWPOISON : 0;
}

static int dmirror_write_page(struct page *page, const void *buf)
{
	memcpy_to_page(dmirror_storage(page), 0, buf, PAGE_SIZE);
	/*
	 * The CPU's entry may be writable and clean. Truncation can't interfere,
	 * as the page can't be unmapped now.
	 */
	set_page_dirty(page);
	return 0;
}

/*
 * Copies between @buf and the @npages pages from @index on. Returns how many:
 * less if the next one is a miss or fails, an error if the first one fails.
 */
static long dmirror_copy(struct dmirror_access *access, void *buf,
			 unsigned long index, long npages)
{
	bool write = access->flags & DMIRROR_ACCESS_WRITE;
	struct dmirror *dmirror = access->dmirror;
	struct page *page;
	int ret = 0;
	long done;

	mutex_lock(&dmirror->lock);
	for (done = 0; done < npages; done++, buf += PAGE_SIZE) {
		page = dmirror_table_lookup(dmirror, index + done, write);
		if (!page)
			break;
		ret = write ? dmirror_write_page(page, buf) :
			      dmirror_read_page(buf, page);
		if (ret)
			break;
	}
	mutex_unlock(&dmirror->lock);
	return done ?: ret;
}

/*
 * Moves @npages pages, which start where the command is at, between the bounce
 * buffer and the mirrored address space. All that an access has left is faulted
 * in at the first miss, as a device would that knows what is to come.
 */
static int dmirror_transfer(struct dmirror_access *access, unsigned long npages,
			    unsigned long *moved)
{
	struct hmm_dmirror_cmd *cmd = access->cmd;
	unsigned long end = cmd->addr + (cmd->npages << PAGE_SHIFT);
	unsigned long addr;
	int ret = 0;
	long done;

	while (!ret && *moved < npages) {
		addr = cmd->addr + ((cmd->cpages + *moved) << PAGE_SHIFT);
		done = dmirror_copy(access,
				    access->bounce + (*moved << PAGE_SHIFT),
				    addr >> PAGE_SHIFT, npages - *moved);
		if (done > 0)
			*moved += done;
		else if (done < 0)
			ret = done;
		else
			ret = dmirror_miss(access, addr, end);
	}
	return ret;
}

static int dmirror_access_step(struct dmirror_access *access,
			       unsigned long npages)
{
	struct hmm_dmirror_cmd *cmd = access->cmd;
	void __user *buf = u64_to_user_ptr(cmd->ptr +
					   (cmd->cpages << PAGE_SHIFT));
	bool write = access->flags & DMIRROR_ACCESS_WRITE;
	unsigned long moved = 0;
	int ret;

	if (write &&
	    copy_from_user(access->bounce, buf, npages << PAGE_SHIFT))
		return -EFAULT;

	ret = dmirror_transfer(access, npages, &moved);

	if (!write &&
	    copy_to_user(buf, access->bounce, moved << PAGE_SHIFT))
		return -EFAULT;

	cmd->cpages += moved;
	return ret;
}

static int dmirror_access(struct dmirror *dmirror, struct hmm_dmirror_cmd *cmd,
			  unsigned int flags)
{
	struct dmirror_access access = {
		.dmirror = dmirror,
		.cmd = cmd,
		.flags = flags,
	};
	unsigned long step = min(cmd->npages, DMIRROR_BOUNCE_PAGES);
	int ret = 0;

	access.bounce = kvmalloc_array(step, PAGE_SIZE, GFP_KERNEL_ACCOUNT);
	if (!access.bounce)
		return -ENOMEM;

	while (!ret && cmd->cpages < cmd->npages) {
		step = min(step, cmd->npages - cmd->cpages);
		ret = fatal_signal_pending(current) ?
			      -EINTR : dmirror_access_step(&access, step);
		cond_resched();
	}

	kvfree(access.bounce);
	return ret;
}

/*
 * Snapshot
 */

struct dmirror_snapshot {
	struct dmirror_walk walk;
	u8 prots[DMIRROR_WALK_PAGES];
};

static u8 dmirror_prot_memory(struct dmirror *dmirror, struct page *page)
{
	bool local = dmirror_is_local(dmirror->device, page);

	if (is_device_private_page(page))
		return local ? HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL :
			       HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE;
	if (is_device_coherent_page(page))
		return local ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL :
			       HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE;
	if (is_zero_pfn(page_to_pfn(page)))
		return HMM_DMIRROR_PROT_ZERO;
	return 0;
}

static u8 dmirror_prot_size(unsigned int order)
{
	if (order == PMD_SHIFT - PAGE_SHIFT)
		return HMM_DMIRROR_PROT_PMD;
	if (order == PUD_SHIFT - PAGE_SHIFT)
		return HMM_DMIRROR_PROT_PUD;
	return 0;
}

static u8 dmirror_prot(struct dmirror *dmirror, unsigned long output)
{
	u8 access = output & HMM_PFN_WRITE ? HMM_DMIRROR_PROT_WRITE :
					     HMM_DMIRROR_PROT_READ;

	if (output & HMM_PFN_ERROR)
		return HMM_DMIRROR_PROT_ERROR;
	if (!(output & HMM_PFN_VALID))
		return HMM_DMIRROR_PROT_NONE;

	return access | dmirror_prot_size(hmm_pfn_to_map_order(output)) |
	       dmirror_prot_memory(dmirror, hmm_pfn_to_page(output));
}

static int dmirror_snapshot_use(struct dmirror_walk *walk, unsigned long start,
				unsigned long end)
{
	struct dmirror_snapshot *snapshot = container_of(walk,
							 struct dmirror_snapshot,
							 walk);
	unsigned long i;

	for (i = 0; i < dmirror_walk_npages(walk); i++)
		snapshot->prots[i] = dmirror_prot(walk->dmirror,
						  walk->range.hmm_pfns[i]);
	return 0;
}

static int dmirror_snapshot_batch(struct dmirror_snapshot *snapshot,
				  struct hmm_dmirror_cmd *cmd)
{
	unsigned long npages = dmirror_walk_npages(&snapshot->walk);
	int ret;

	ret = dmirror_walk(&snapshot->walk);
	if (ret)
		return ret;

	if (copy_to_user(u64_to_user_ptr(cmd->ptr + cmd->cpages),
			 snapshot->prots, npages))
		return -EFAULT;

	cmd->cpages += npages;
	return 0;
}

/*
 * Migration
 *
 * Whichever way pages go, and whoever wants it, the steps are the same: the
 * kernel takes the pages of a batch out of use, as far as they can be, a page
 * of the other kind is allocated for each and the data is copied, and the
 * kernel puts the new pages in the old ones' place. What cannot be moved stays
 * where it is.
 */

/* How often, and for how many microseconds, one waits for what is left behind. */
#define DMIRROR_MIGRATION_PATIENCE	10
#define DMIRROR_MIGRATION_PAUSE		1000

/**
 * struct dmirror_migration - a batch of pages on the move
 * @args: the kernel's part. Without a VMA if device memory is evicted wherever
 *	it is mapped.
 * @dmirror: for whom, or whose memory it is; NULL if that differs by page
 * @alloc: gets a locked folio for the page at @addr
 * @gfp: how hard @alloc has to try, besides what it does anyway
 * @npages: how many entries @args.src and @args.dst have
 * @patience: how many more times to wait for pages that are left behind
 * @error: why some page did not move, if for a reason of the device's
 * @may_split: one entry maps each large folio, see dmirror_move_pieces()
 * @too_large: a large folio was left where it is
 */
struct dmirror_migration {
	struct migrate_vma args;
	struct dmirror *dmirror;
	struct page *(*alloc)(struct dmirror_migration *migration,
			      unsigned long addr, unsigned int order);
	gfp_t gfp;
	unsigned long npages;
	unsigned int patience;
	int error;
	bool may_split;
	bool too_large;
};

static int dmirror_migration_init(struct dmirror_migration *migration,
				  gfp_t gfp)
{
	unsigned long *pfns = kvcalloc(2 * DMIRROR_BLOCK_PAGES, sizeof(*pfns),
				       gfp);

	if (!pfns)
		return -ENOMEM;
	migration->args.src = pfns;
	migration->args.dst = pfns + DMIRROR_BLOCK_PAGES;
	migration->patience = DMIRROR_MIGRATION_PATIENCE;
	return 0;
}

static void dmirror_migration_fini(struct dmirror_migration *migration)
{
	kvfree(migration->args.src);
}

static bool dmirror_fails_alloc(struct dmirror *dmirror, unsigned int order)
{
	return order && dmirror &&
	       test_and_clear_bit(DMIRROR_FAIL_ALLOC, &dmirror->flags);
}

static struct page *dmirror_alloc_device(struct dmirror_migration *migration,
					 unsigned long addr, unsigned int order)
{
	if (dmirror_fails_alloc(migration->dmirror, order))
		return NULL;
	return dmirror_devmem_alloc(migration->dmirror, order);
}

static struct page *dmirror_alloc_system(struct dmirror_migration *migration,
					 unsigned long addr, unsigned int order)
{
	gfp_t gfp = GFP_HIGHUSER_MOVABLE | __GFP_NOWARN | migration->gfp;
	struct folio *folio;

	if (dmirror_fails_alloc(migration->dmirror, order))
		return NULL;
	if (migration->args.vma)
		folio = vma_alloc_folio(gfp, order, migration->args.vma, addr);
	else
		folio = folio_alloc(gfp, order);
	if (!folio)
		return NULL;

	folio_lock(folio);
	return folio_page(folio, 0);
}

static void dmirror_discard(unsigned long *dst)
{
	struct page *page = migrate_pfn_to_page(*dst);

	unlock_page(page);
	put_page(page);
	*dst = 0;
}

/* A page that is not there yet, or that is a zero page, has no source. */
static int dmirror_move_data(struct page *to, struct page *from)
{
	to = dmirror_storage(to);
	if (from)
		return copy_mc_highpage(to, dmirror_storage(from)) ?
			       -EHWPOISON : 0;
	clear_highpage(to);
	return 0;
}

/* Gets the folio of @order that pages from @i on move to, and fills it. */
static int dmirror_move_folio(struct dmirror_migration *migration,
			      unsigned long i, unsigned int order,
			      struct page *from)
{
	unsigned long addr = migration->args.start + (i << PAGE_SHIFT);
	unsigned long *dst = &migration->args.dst[i];
	struct page *to = migration->alloc(migration, addr, order);
	unsigned long j;
	int ret = 0;

	if (!to)
		return -ENOMEM;

	*dst = migrate_pfn(page_to_pfn(to));
	if (order)
		*dst |= MIGRATE_PFN_COMPOUND;
	for (j = 0; !ret && j < 1UL << order; j++)
		ret = dmirror_move_data(to + j, from ? from + j : NULL);
	if (ret)
		dmirror_discard(dst);
	return ret;
}

/*
 * A large folio that cannot be moved in one piece is moved by the page, all of
 * it or none: the kernel splits it only if there is a new page for each. It
 * splits the entry in the VMA that the migration is for and no other, so there
 * must not be another.
 */
static int dmirror_move_pieces(struct dmirror_migration *migration,
			       unsigned long i, struct page *from)
{
	unsigned long *dst = &migration->args.dst[i];
	unsigned long j;
	int ret = 0;

	for (j = 0; !ret && j < DMIRROR_BLOCK_PAGES; j++)
		ret = dmirror_move_folio(migration, i + j, 0,
					 from ? from + j : NULL);
	if (!ret)
		return 0;
	while (--j)
		dmirror_discard(&dst[j - 1]);
	return ret;
}

/*
 * A large folio goes in one piece if possible. If not, it is left for another
 * pass to split, but on a fault, where it can't be, it has to go in pieces, or in
 * one piece all the same.
 */
static int dmirror_move_large(struct dmirror_migration *migration,
			      unsigned long i, struct page *from)
{
	int ret;

	ret = dmirror_move_folio(migration, i, DMIRROR_BLOCK_ORDER, from);
	if (ret != -ENOMEM || !migration->args.fault_page)
		return ret;
	if (migration->may_split)
		return dmirror_move_pieces(migration, i, from);
	migration->gfp = __GFP_RETRY_MAYFAIL;
	return dmirror_move_folio(migration, i, DMIRROR_BLOCK_ORDER, from);
}

/* Provides for what is to be moved from page @i on, and tells how many pages that is. */
static unsigned long dmirror_move(struct dmirror_migration *migration,
				  unsigned long i)
{
	unsigned long src = migration->args.src[i];
	struct page *from = migrate_pfn_to_page(src);
	int ret;

	if (!(src & MIGRATE_PFN_MIGRATE))
		return 1;
	if (!(src & MIGRATE_PFN_COMPOUND)) {
		ret = dmirror_move_folio(migration, i, 0, from);
		migration->error = ret ?: migration->error;
		return 1;
	}

	ret = dmirror_move_large(migration, i, from);
	migration->too_large |= ret == -ENOMEM;
	migration->error = ret ?: migration->error;
	return DMIRROR_BLOCK_PAGES;
}

static void dmirror_move_all(struct dmirror_migration *migration)
{
	unsigned long i = 0;

	if (migration->dmirror)
		dmirror_inject(migration->dmirror, HMM_DMIRROR_POINT_COLLECTED);
	while (i < migration->npages)
		i += dmirror_move(migration, i);
	if (migration->dmirror)
		dmirror_inject(migration->dmirror, HMM_DMIRROR_POINT_COPIED);
}

/* How many pages the kernel has put in the place of others. */
static unsigned long dmirror_count_moved(struct dmirror_migration *migration)
{
	bool in = migration->alloc == dmirror_alloc_device;
	unsigned long i, moved = 0;

	for (i = 0; i < migration->npages; i++) {
		unsigned long src = migration->args.src[i];
		unsigned long dst = migration->args.dst[i];

		if (!(src & MIGRATE_PFN_MIGRATE) || !dst)
			continue;
		moved += dst & MIGRATE_PFN_COMPOUND ? DMIRROR_BLOCK_PAGES : 1;
	}
	if (migration->dmirror) {
		dmirror_inject(migration->dmirror, HMM_DMIRROR_POINT_MIGRATED);
		dmirror_count(migration->dmirror,
			      in ? DMIRROR_PAGES_IN : DMIRROR_PAGES_OUT, moved);
	}
	return moved;
}

static long dmirror_migrate_once(struct dmirror_migration *migration)
{
	struct migrate_vma *args = &migration->args;
	long moved;
	int ret;

	memset(args->dst, 0, DMIRROR_BLOCK_PAGES * sizeof(*args->dst));
	ret = migrate_vma_setup(args);
	if (ret)
		return ret;

	migration->npages = args->npages;
	dmirror_move_all(migration);
	migrate_vma_pages(args);
	moved = dmirror_count_moved(migration);
	migrate_vma_finalize(args);
	return moved;
}

/* Is there no use in another try, after @moved pages of the batch have moved? */
static bool dmirror_migration_is_done(struct dmirror_migration *migration,
				      long moved)
{
	if (moved >= (long)migration->npages || migration->args.fault_page)
		return true;
	if (migration->error)
		return !migration->too_large ||
		       !(migration->args.flags & MIGRATE_VMA_SELECT_COMPOUND);
	return !migration->patience || fatal_signal_pending(current);
}

/*
 * Moves what it can of @migration->args, and tells how many pages that were. The
 * mmap lock is held.
 *
 * What is too large to move is split first, by another try that asks for single
 * pages. What else was left behind may be somebody's for a moment only, locked or
 * off its LRU list, so it gets a few more tries. There are not many for a range,
 * as most of what is left behind will never move. On a fault the CPU tries again.
 */
static long dmirror_migrate_vma(struct dmirror_migration *migration)
{
	struct migrate_vma *args = &migration->args;
	unsigned long flags = args->flags, end = args->end;
	int error = migration->error;
	long moved = 0, ret;

	for (;;) {
		migration->error = 0;
		migration->too_large = false;
		ret = dmirror_migrate_once(migration);
		args->end = end;
		if (ret < 0)
			break;
		moved += ret;
		if (dmirror_migration_is_done(migration, moved))
			break;
		if (migration->too_large) {
			args->flags &= ~MIGRATE_VMA_SELECT_COMPOUND;
			continue;
		}
		migration->patience--;
		fsleep(DMIRROR_MIGRATION_PAUSE);
	}
	args->flags = flags;
	migration->error = migration->error ?: error;
	return ret < 0 ? ret : moved;
}

/* Selects what is in @device's memory. */
static unsigned long dmirror_select_local(struct dmirror_device *device)
{
	if (device->coherent_addr)
		return MIGRATE_VMA_SELECT_DEVICE_COHERENT;
	return MIGRATE_VMA_SELECT_DEVICE_PRIVATE | MIGRATE_VMA_SELECT_COMPOUND;
}

/*
 * A large folio of coherent memory, mapped by the CPU, would be taken for
 * ordinary memory when it is to be split, so there is none: what is large has
 * to be split first.
 */
static unsigned long dmirror_select_system(struct dmirror_device *device)
{
	if (device->coherent_addr)
		return MIGRATE_VMA_SELECT_SYSTEM;
	return MIGRATE_VMA_SELECT_SYSTEM | MIGRATE_VMA_SELECT_COMPOUND;
}

/*
 * The CPU needs a page of private memory. The folio is locked, and whoever
 * faults, the opener or a child, gets all of what one entry maps.
 */
static vm_fault_t dmirror_migrate_to_ram(struct vm_fault *vmf)
{
	struct folio *folio = page_folio(vmf->page);
	/* What is mapped by PTEs may be a part of a large folio still. */
	unsigned int order = vmf->pte ? 0 : folio_order(folio);
	struct dmirror *dmirror = folio->page.zone_device_data;
	struct dmirror_migration migration = {
		.args.vma = vmf->vma,
		.args.start = ALIGN_DOWN(vmf->address, PAGE_SIZE << order),
		.args.pgmap_owner = dmirror->device,
		.args.flags = dmirror_select_local(dmirror->device),
		.args.fault_page = vmf->page,
		.dmirror = dmirror,
		.alloc = dmirror_alloc_system,
		.may_split = folio_mapcount(folio) == 1,
	};
	long moved;

	if (dmirror_migration_init(&migration, GFP_KERNEL))
		return VM_FAULT_OOM;
	migration.args.end = migration.args.start + (PAGE_SIZE << order);
	moved = dmirror_migrate_vma(&migration);
	dmirror_migration_fini(&migration);

	if (moved < 0)
		return VM_FAULT_SIGBUS;
	/*
	 * If the page was just in use elsewhere the CPU tries again. A large one
	 * that others have mapped, too, has to wait for memory.
	 */
	return moved || !migration.error ? 0 : vmf_error(migration.error);
}

static const struct dev_pagemap_ops dmirror_pagemap_ops = {
	.folio_free = dmirror_folio_free,
	.folio_split = dmirror_folio_split,
	.migrate_to_ram = dmirror_migrate_to_ram,
};

/*
 * Eviction: device memory goes back to the system, whoever has it mapped
 */

/*
 * Gathers the pages of block @i that are in use, for @dmirror or, if that is NULL,
 * at all. They may be free or in use for another again before they are locked.
 */
static unsigned long dmirror_evict_gather(struct dmirror_migration *migration,
					  struct dmirror_chunk *chunk,
					  unsigned int i)
{
	unsigned long index = i * DMIRROR_BLOCK_PAGES, n = 0, pfn;
	unsigned long end = index + DMIRROR_BLOCK_PAGES;
	struct folio *folio;

	guard(spinlock_irqsave)(&chunk->device->lock);
	for_each_set_bit_from(index, chunk->used, end) {
		pfn = dmirror_chunk_first_pfn(chunk) + index;
		folio = page_folio(pfn_to_page(pfn));
		if (!migration->dmirror ||
		    folio->page.zone_device_data == migration->dmirror)
			migration->args.src[n++] = pfn;
	}
	return n;
}

/* Takes the pages of a block out of use, as far as they can be. */
static unsigned long dmirror_evict_collect(struct dmirror_migration *migration,
					   struct dmirror_device *device,
					   unsigned int nr, unsigned int i)
{
	struct dmirror_chunk *chunk;
	unsigned long npages;

	guard(mutex)(&device->chunks_lock);
	chunk = device->chunks[nr];
	if (!chunk)
		return 0;
	npages = dmirror_evict_gather(migration, chunk, i);
	if (npages)
		migrate_device_pfns(migration->args.src, npages);
	return npages;
}

/* A page that is collected is in use, and keeps its chunk. */
static void dmirror_evict_block(struct dmirror_migration *migration,
				struct dmirror_device *device, unsigned int nr,
				unsigned int i)
{
	struct migrate_vma *args = &migration->args;

	migration->npages = dmirror_evict_collect(migration, device, nr, i);
	if (!migration->npages)
		return;

	memset(args->dst, 0, migration->npages * sizeof(*args->dst));
	dmirror_move_all(migration);
	migrate_device_pages(args->src, args->dst, migration->npages);
	dmirror_count_moved(migration);
	migrate_device_finalize(args->src, args->dst, migration->npages);
	cond_resched();
}

static void dmirror_evict_pass(struct dmirror_migration *migration,
			       struct dmirror_device *device)
{
	unsigned int nr, i;

	for (nr = 0; nr < DMIRROR_MAX_CHUNKS; nr++)
		for (i = 0; i < DMIRROR_CHUNK_BLOCKS; i++)
			dmirror_evict_block(migration, device, nr, i);
}

/*
 * A page that somebody works on at the moment cannot be moved, so there are a few
 * tries. What is left then is in the hands of those who use it, and comes back
 * when they touch it or are done with it.
 */
static void dmirror_evict(struct dmirror *dmirror)
{
	struct dmirror_migration migration = {
		.dmirror = dmirror,
		.alloc = dmirror_alloc_system,
	};
	unsigned int tries = 10;

	if (dmirror_migration_init(&migration, GFP_KERNEL))
		return;
	while (atomic_long_read(&dmirror->nr_pages) && tries--) {
		dmirror_evict_pass(&migration, dmirror->device);
		schedule_timeout_uninterruptible(tries < 9);
	}
	dmirror_migration_fini(&migration);
}

/*
 * Chunks
 */

static void dmirror_chunk_free(struct dmirror_chunk *chunk)
{
	kvfree(chunk->storage);
	bitmap_free(chunk->used);
	kfree(chunk);
}

static struct dmirror_chunk *dmirror_chunk_alloc(struct dmirror_device *device)
{
	struct dmirror_chunk *chunk = kzalloc_obj(*chunk);

	if (!chunk)
		return NULL;

	chunk->device = device;
	chunk->used = bitmap_zalloc(DMIRROR_CHUNK_PAGES, GFP_KERNEL);
	if (!device->coherent_addr)
		chunk->storage = kvcalloc(DMIRROR_CHUNK_PAGES,
					  sizeof(*chunk->storage), GFP_KERNEL);
	if (!chunk->used || (!device->coherent_addr && !chunk->storage)) {
		dmirror_chunk_free(chunk);
		return NULL;
	}
	return chunk;
}

/* The physical addresses that the struct pages of @device's next chunk stand for. */
static struct resource *dmirror_chunk_request(struct dmirror_device *device)
{
	struct resource *res;

	if (!device->coherent_addr)
		return request_free_mem_region(&iomem_resource,
					       DMIRROR_CHUNK_SIZE,
					       KBUILD_MODNAME);
	res = request_mem_region(device->coherent_addr, DMIRROR_CHUNK_SIZE,
				 KBUILD_MODNAME);
	return res ?: ERR_PTR(-EBUSY);
}

static int dmirror_chunk_map(struct dmirror_chunk *chunk)
{
	struct dev_pagemap *pagemap = &chunk->pagemap;
	bool coherent = chunk->device->coherent_addr;
	struct resource *res;
	void *addr;

	res = dmirror_chunk_request(chunk->device);
	if (IS_ERR(res))
		return PTR_ERR(res);

	pagemap->type = coherent ? MEMORY_DEVICE_COHERENT : MEMORY_DEVICE_PRIVATE;
	pagemap->range.start = res->start;
	pagemap->range.end = res->end;
	pagemap->nr_range = 1;
	pagemap->ops = &dmirror_pagemap_ops;
	pagemap->owner = chunk->device;
	addr = memremap_pages(pagemap, numa_mem_id());
	if (!IS_ERR(addr))
		return 0;

	release_mem_region(pagemap->range.start, DMIRROR_CHUNK_SIZE);
	return PTR_ERR(addr);
}

/* No page of the chunk is in use nor can be. */
static void dmirror_chunk_unmap(struct dmirror_chunk *chunk)
{
	memunmap_pages(&chunk->pagemap);
	release_mem_region(chunk->pagemap.range.start, DMIRROR_CHUNK_SIZE);
}

/* Takes chunk number @nr out of use, and returns it, if no page of it is in use. */
static struct dmirror_chunk *dmirror_chunk_retract(struct dmirror_device *device,
						   unsigned int nr)
{
	struct dmirror_chunk *chunk = device->chunks[nr];

	guard(spinlock_irqsave)(&device->lock);
	if (!chunk || !bitmap_empty(chunk->used, DMIRROR_CHUNK_PAGES))
		return NULL;
	device->chunks[nr] = NULL;
	return chunk;
}

/* Adds chunk number @nr. */
static int dmirror_chunk_add(struct dmirror_device *device, unsigned int nr)
{
	struct dmirror_chunk *chunk;
	int ret;

	lockdep_assert_held(&device->chunks_lock);

	chunk = dmirror_chunk_alloc(device);
	if (!chunk)
		return -ENOMEM;
	ret = dmirror_chunk_map(chunk);
	if (ret) {
		dmirror_chunk_free(chunk);
		return ret;
	}
	scoped_guard(spinlock_irqsave, &device->lock)
		device->chunks[nr] = chunk;
	return 0;
}

/* Gives the chunks back that are not in use, and tells whether there are others. */
static bool dmirror_chunks_trim(struct dmirror_device *device)
{
	struct dmirror_chunk *chunk;
	bool others = false;
	unsigned int nr;

	guard(mutex)(&device->chunks_lock);
	for (nr = 0; nr < DMIRROR_MAX_CHUNKS; nr++) {
		chunk = dmirror_chunk_retract(device, nr);
		if (chunk) {
			dmirror_chunk_unmap(chunk);
			dmirror_chunk_free(chunk);
		}
		others |= !!device->chunks[nr];
	}
	return others;
}

static bool dmirror_is_scarce(struct dmirror_device *device)
{
	unsigned int nr;

	guard(spinlock_irqsave)(&device->lock);
	for (nr = 0; nr < DMIRROR_MAX_CHUNKS; nr++)
		if (device->chunks[nr] &&
		    dmirror_chunk_find(device->chunks[nr], DMIRROR_SPARE_PAGES,
				       DMIRROR_BLOCK_PAGES) < DMIRROR_CHUNK_PAGES)
			return false;
	return true;
}

/*
 * Has some blocks ready for a batch that is about to be moved to the device. If
 * there are none to be had the batch, or a part of it, will not move.
 */
static void dmirror_chunks_provide(struct dmirror_device *device)
{
	unsigned int nr = 0;

	if (device->coherent_addr)
		return;
	guard(mutex)(&device->chunks_lock);
	if (!dmirror_is_scarce(device))
		return;
	while (nr < DMIRROR_MAX_CHUNKS && device->chunks[nr])
		nr++;
	if (nr < DMIRROR_MAX_CHUNKS)
		dmirror_chunk_add(device, nr);
}

/*
 * Migration of a range, as commanded
 */

/* Moves on to the next batch before @end, in one VMA and one block. */
static int dmirror_batch_next(struct dmirror_migration *migration,
			      unsigned long start, unsigned long end)
{
	unsigned long next = ALIGN_DOWN(start, PMD_SIZE) + PMD_SIZE;
	struct vm_area_struct *vma;

	vma = vma_lookup(migration->dmirror->notifier.mm, start);
	if (!vma || !(vma->vm_flags & VM_READ))
		return -EINVAL;

	migration->args.vma = vma;
	migration->args.start = start;
	migration->args.end = min3(next, end, vma->vm_end);
	return 0;
}

static long dmirror_migrate_batch(struct dmirror_migration *migration,
				  unsigned long start, unsigned long end)
{
	struct mm_struct *mm = migration->dmirror->notifier.mm;
	long ret;

	if (migration->alloc == dmirror_alloc_device)
		dmirror_chunks_provide(migration->dmirror->device);

	if (mmap_read_lock_killable(mm))
		return -EINTR;
	ret = dmirror_batch_next(migration, start, end);
	if (!ret)
		ret = dmirror_migrate_vma(migration);
	mmap_read_unlock(mm);
	return ret;
}

/* Moves what it can, and tells how many pages that were. */
static int dmirror_migrate_range(struct dmirror_migration *migration,
				 unsigned long start, unsigned long end,
				 u64 *moved)
{
	struct mm_struct *mm = migration->dmirror->notifier.mm;
	long ret;

	ret = dmirror_migration_init(migration, GFP_KERNEL_ACCOUNT);
	if (ret)
		return ret;
	if (!mmget_not_zero(mm)) {
		dmirror_migration_fini(migration);
		return -EFAULT;
	}

	while (start < end && ret >= 0) {
		ret = dmirror_migrate_batch(migration, start, end);
		if (ret >= 0)
			*moved += ret;
		start = migration->args.end;
		cond_resched();
	}
	mmput(mm);
	dmirror_migration_fini(migration);
	return min(ret, 0L);
}

/*
 * Exclusive access
 *
 * The CPU has no access to the page, nor any other device, until one of them
 * wants it: the invalidate callback hears of it then.
 */

/* @page, which is locked, goes into the table unless it is too late. */
static int dmirror_enter_exclusive(struct dmirror *dmirror, unsigned long addr,
				   struct page *page, unsigned long seq)
{
	XA_STATE(xas, &dmirror->table, addr >> PAGE_SHIFT);
	int ret;

	do {
		ret = 0;
		mutex_lock(&dmirror->lock);
		if (mmu_interval_read_retry(&dmirror->notifier, seq)) {
			ret = DMIRROR_INVALIDATED;
		} else {
			xas_lock(&xas);
			xas_store(&xas, xa_tag_pointer(page, DMIRROR_ENTRY_EXCLUSIVE));
			xas_unlock(&xas);
		}
		mutex_unlock(&dmirror->lock);
	} while (xas_nomem(&xas, GFP_KERNEL));

	return ret ?: xas_error(&xas);
}

/*
 * The page is faulted in first, because a fault invalidates, be it one that only
 * takes back the exclusive access that a try before has got.
 */
static int dmirror_exclusive_once(struct dmirror *dmirror, unsigned long addr)
{
	struct mm_struct *mm = dmirror->notifier.mm;
	struct folio *folio;
	struct page *page;
	unsigned long seq;
	int ret;

	ret = dmirror_fault(dmirror, addr, addr + PAGE_SIZE,
			    HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE, false);
	if (ret)
		return ret;

	seq = mmu_interval_read_begin(&dmirror->notifier);
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	page = make_device_exclusive(mm, addr, dmirror, &folio);
	mmap_read_unlock(mm);
	if (IS_ERR(page))
		return PTR_ERR(page);

	ret = dmirror_enter_exclusive(dmirror, addr, page, seq);
	folio_unlock(folio);
	folio_put(folio);
	return ret;
}

static int dmirror_exclusive_page(struct dmirror *dmirror, unsigned long addr)
{
	unsigned long timeout = msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT);
	unsigned long deadline = jiffies + timeout;
	int ret;

	do {
		if (fatal_signal_pending(current))
			return -EINTR;
		ret = dmirror_exclusive_once(dmirror, addr);
		cond_resched();
	} while (ret == DMIRROR_INVALIDATED && time_before(jiffies, deadline));

	return ret == DMIRROR_INVALIDATED ? -EBUSY : ret;
}

static int dmirror_exclusive_range(struct dmirror *dmirror,
				   unsigned long start, unsigned long end)
{
	struct mm_struct *mm = dmirror->notifier.mm;
	int ret = 0;

	if (!mmget_not_zero(mm))
		return -EFAULT;
	for (; !ret && start < end; start += PAGE_SIZE)
		ret = dmirror_exclusive_page(dmirror, start);
	mmput(mm);
	return ret;
}

static bool dmirror_has_exclusive(struct dmirror *dmirror, unsigned long first,
				  unsigned long last)
{
	unsigned long index;
	void *entry;

	guard(mutex)(&dmirror->lock);
	xa_for_each_range(&dmirror->table, index, entry, first, last)
		if (xa_pointer_tag(entry) == DMIRROR_ENTRY_EXCLUSIVE)
			return true;
	return false;
}

/*
 * The test command
 */

static unsigned long dmirror_cmd_end(const struct hmm_dmirror_cmd *cmd)
{
	return cmd->addr + (cmd->npages << PAGE_SHIFT);
}

/* Past this, no arithmetic on the range can overflow. */
static int dmirror_check_args(const struct hmm_dmirror_cmd *cmd)
{
	unsigned long start, size, end;

	if (!cmd->npages || !PAGE_ALIGNED(cmd->addr))
		return -EINVAL;
	if (check_add_overflow(cmd->addr, 0UL, &start) ||
	    check_mul_overflow(cmd->npages, PAGE_SIZE, &size) ||
	    check_add_overflow(start, size, &end))
		return -EINVAL;
	if (cmd->npages > DMIRROR_MAX_PAGES)
		return -E2BIG;
	return 0;
}

static_assert(HMM_DMIRROR_PFN_VALID == HMM_PFN_VALID);
static_assert(HMM_DMIRROR_PFN_WRITE == HMM_PFN_WRITE);
static_assert(HMM_DMIRROR_PFN_ERROR == HMM_PFN_ERROR);
static_assert(HMM_DMIRROR_PFN_DMA_MAPPED == HMM_PFN_DMA_MAPPED);
static_assert(HMM_DMIRROR_PFN_P2PDMA == HMM_PFN_P2PDMA);
static_assert(HMM_DMIRROR_PFN_P2PDMA_BUS == HMM_PFN_P2PDMA_BUS);
static_assert(HMM_DMIRROR_PFN_ORDER_SHIFT == HMM_PFN_ORDER_SHIFT);

static unsigned long dmirror_jiffies(u64 ms)
{
	return msecs_to_jiffies(min_t(u64, ms, INT_MAX));
}

struct dmirror_raw_fault {
	struct dmirror_walk walk;
	unsigned long *requests;
	size_t size;		/* of the requests, in bytes */
};

static void dmirror_raw_fault_prepare(struct dmirror_walk *walk)
{
	struct dmirror_raw_fault *fault = container_of(walk, struct dmirror_raw_fault,
						       walk);

	memcpy(walk->range.hmm_pfns, fault->requests, fault->size);
}

static int dmirror_raw_fault_use(struct dmirror_walk *walk, unsigned long start,
				 unsigned long end)
{
	return 0;
}

/* Where a page is in memory is not for everybody to know. */
static void dmirror_raw_fault_conceal(struct dmirror_raw_fault *fault)
{
	unsigned long *pfns = fault->walk.range.hmm_pfns;
	size_t i;

	if (capable(CAP_SYS_ADMIN))
		return;
	for (i = 0; i < fault->size / sizeof(*pfns); i++)
		pfns[i] &= HMM_PFN_FLAGS;
}

static int dmirror_raw_fault(struct dmirror_raw_fault *fault,
			     struct hmm_dmirror_test *test)
{
	struct dmirror *dmirror = fault->walk.dmirror;
	atomic_long_t *invalidations = &dmirror->stats[DMIRROR_INVALIDATIONS];
	unsigned long faults = current->maj_flt + current->min_flt;
	long before = atomic_long_read(invalidations);
	int ret;

	ret = dmirror_walk(&fault->walk);

	test->fault.tries = fault->walk.tries;
	test->fault.faults = current->maj_flt + current->min_flt - faults;
	test->fault.invalidations = atomic_long_read(invalidations) - before;
	dmirror_raw_fault_conceal(fault);
	if (copy_to_user(u64_to_user_ptr(test->fault.pfns),
			 fault->walk.range.hmm_pfns, fault->size))
		return -EFAULT;
	return ret;
}

/* The array is there for a range that makes no sense, too, with an element. */
static int dmirror_raw_fault_size(struct dmirror_raw_fault *fault,
				  const struct hmm_dmirror_test *test)
{
	unsigned long npages = 1;

	if (test->fault.end > test->fault.start)
		npages = (test->fault.end - test->fault.start - 1) / PAGE_SIZE + 1;
	if (npages > DMIRROR_MAX_RAW_PAGES)
		return -E2BIG;
	fault->size = npages * sizeof(*fault->requests);
	return 0;
}

#define DMIRROR_FAULT_FLAGS						\
	(HMM_DMIRROR_FAULT_UNLOCKED | HMM_DMIRROR_FAULT_ONCE |		\
	 HMM_DMIRROR_FAULT_NO_OWNER | HMM_DMIRROR_FAULT_EACH)

static int dmirror_test_fault(struct dmirror *dmirror,
			      struct hmm_dmirror_test *test)
{
	struct dmirror_raw_fault fault = {
		.walk.dmirror = dmirror,
		.walk.range.notifier = &dmirror->notifier,
		.walk.range.start = test->fault.start,
		.walk.range.end = test->fault.end,
		.walk.range.default_flags = test->fault.default_flags,
		.walk.range.pfn_flags_mask = test->fault.pfn_flags_mask,
		.walk.prepare = dmirror_raw_fault_prepare,
		.walk.use = dmirror_raw_fault_use,
		.walk.timeout = dmirror_jiffies(test->fault.timeout),
		.walk.unlocked = test->flags & HMM_DMIRROR_FAULT_UNLOCKED,
		.walk.once = test->flags & HMM_DMIRROR_FAULT_ONCE,
		.walk.each = test->flags & HMM_DMIRROR_FAULT_EACH,
	};
	int ret;

	if (fault.walk.each && (fault.walk.unlocked || fault.walk.once))
		return -EINVAL;
	ret = dmirror_raw_fault_size(&fault, test);
	if (ret)
		return ret;

	if (!(test->flags & HMM_DMIRROR_FAULT_NO_OWNER))
		fault.walk.range.dev_private_owner = dmirror->device;
	fault.requests = vmemdup_user(u64_to_user_ptr(test->fault.pfns), fault.size);
	if (IS_ERR(fault.requests))
		return PTR_ERR(fault.requests);
	fault.walk.range.hmm_pfns = kvmemdup(fault.requests, fault.size,
					     GFP_KERNEL_ACCOUNT);
	ret = -ENOMEM;
	if (fault.walk.range.hmm_pfns)
		ret = dmirror_raw_fault(&fault, test);

	kvfree(fault.walk.range.hmm_pfns);
	kvfree(fault.requests);
	return ret;
}

static u64 dmirror_device_bytes(struct dmirror_device *device)
{
	unsigned int nr;
	u64 npages = 0;

	guard(mutex)(&device->chunks_lock);
	guard(spinlock_irqsave)(&device->lock);
	for (nr = 0; nr < DMIRROR_MAX_CHUNKS; nr++)
		if (device->chunks[nr])
			npages += bitmap_weight(device->chunks[nr]->used,
						DMIRROR_CHUNK_PAGES);
	return npages << PAGE_SHIFT;
}

static int dmirror_test_stats(struct dmirror *dmirror,
			      struct hmm_dmirror_test *test)
{
	const atomic_long_t *stats = dmirror->stats;

	test->stats.invalidations = atomic_long_read(&stats[DMIRROR_INVALIDATIONS]);
	test->stats.walks = atomic_long_read(&stats[DMIRROR_WALKS]);
	test->stats.retries = atomic_long_read(&stats[DMIRROR_RETRIES]);
	test->stats.misses = atomic_long_read(&stats[DMIRROR_MISSES]);
	test->stats.pages_in = atomic_long_read(&stats[DMIRROR_PAGES_IN]);
	test->stats.pages_out = atomic_long_read(&stats[DMIRROR_PAGES_OUT]);
	test->stats.bytes = (u64)atomic_long_read(&dmirror->nr_pages) << PAGE_SHIFT;
	test->stats.device_bytes = dmirror_device_bytes(dmirror->device);
	return 0;
}

static int dmirror_test_inject(struct dmirror *dmirror,
			       struct hmm_dmirror_test *test)
{
	unsigned int last = HMM_DMIRROR_INJECT_WAIT;
	struct dmirror_injection *injection;

	if (test->inject.point >= HMM_DMIRROR_NR_POINTS)
		return -EINVAL;
	if (test->inject.point == HMM_DMIRROR_POINT_GATE)
		last = HMM_DMIRROR_NR_INJECTIONS - 1;
	if (test->inject.action > last || !test->inject.count)
		return -EINVAL;

	guard(spinlock)(&dmirror->inject_lock);
	injection = &dmirror->injections[test->inject.point];
	injection->action = test->inject.action;
	injection->skip = test->inject.skip;
	injection->count = test->inject.count;
	return 0;
}

static int dmirror_test_await(struct dmirror *dmirror,
			      struct hmm_dmirror_test *test)
{
	unsigned int point = test->await.point;
	long ret;

	if (test->await.reserved || point >= HMM_DMIRROR_NR_POINTS)
		return -EINVAL;
	ret = wait_event_interruptible_timeout(dmirror->inject_wait,
					       dmirror_inject_is_waiting(dmirror, point),
					       dmirror_jiffies(test->await.timeout));
	return ret ? min(ret, 0L) : -ETIMEDOUT;
}

static int dmirror_test_resume(struct dmirror *dmirror,
			       struct hmm_dmirror_test *test)
{
	if (test->resume.reserved ||
	    test->resume.point >= HMM_DMIRROR_NR_POINTS)
		return -EINVAL;
	dmirror_inject_set_waiting(dmirror, test->resume.point, false);
	return 0;
}

struct dmirror_check {
	struct dmirror_walk walk;
	struct hmm_dmirror_test *test;
	struct hmm_oracle oracles[DMIRROR_WALK_PAGES];
};

static void dmirror_check_look(struct dmirror_walk *walk)
{
	struct dmirror_check *check = container_of(walk, struct dmirror_check,
						   walk);
	unsigned long addr = walk->range.start;
	unsigned long i;

	for (i = 0; i < dmirror_walk_npages(walk); i++, addr += PAGE_SIZE)
		check->oracles[i] = hmm_oracle(walk->dmirror->notifier.mm, addr,
					       walk->range.dev_private_owner);
	hmm_oracle_join(check->oracles, walk->range.start, i);
}

static int dmirror_check_differs(struct dmirror_check *check, u64 wrong,
				 unsigned long i, unsigned long found,
				 unsigned long due)
{
	unsigned long mask = capable(CAP_SYS_ADMIN) ? ~0UL : HMM_PFN_FLAGS;

	check->test->check.addr = check->walk.range.start + (i << PAGE_SHIFT);
	check->test->check.wrong = wrong;
	check->test->check.found = found & mask;
	check->test->check.due = due & mask;
	return -EUCLEAN;
}

/* An entry may allow less than the CPU's does. There need not be any. */
static int dmirror_check_entry(struct dmirror_check *check, unsigned long i,
			       void *entry)
{
	const struct hmm_oracle *oracle = &check->oracles[i];
	unsigned long tag = xa_pointer_tag(entry), due = oracle->out;
	struct page *page = xa_untag_pointer(entry);
	unsigned long found;

	if (!entry)
		return 0;
	found = HMM_PFN_VALID | page_to_pfn(page);
	if (tag != DMIRROR_ENTRY_READ)
		found |= HMM_PFN_WRITE;
	if (tag == DMIRROR_ENTRY_EXCLUSIVE && page == oracle->exclusive)
		return 0;
	due &= ~HMM_PFN_FLAGS | found;
	if (found == due && tag != DMIRROR_ENTRY_EXCLUSIVE)
		return 0;
	return dmirror_check_differs(check, HMM_DMIRROR_WRONG_TABLE, i, found,
				     oracle->out);
}

static int dmirror_check_use(struct dmirror_walk *walk, unsigned long start,
			     unsigned long end)
{
	struct dmirror_check *check = container_of(walk, struct dmirror_check,
						   walk);
	unsigned long index = walk->range.start >> PAGE_SHIFT;
	const unsigned long *outputs = walk->range.hmm_pfns;
	unsigned long i;
	int ret;

	for (i = 0; i < dmirror_walk_npages(walk); i++) {
		if (outputs[i] != check->oracles[i].out)
			return dmirror_check_differs(check, HMM_DMIRROR_WRONG_WALK,
						     i, outputs[i],
						     check->oracles[i].out);
		ret = dmirror_check_entry(check, i,
					  xa_load(&walk->dmirror->table, index + i));
		if (ret)
			return ret;
	}
	return 0;
}

static int dmirror_check_range(struct dmirror_check *check, unsigned long start,
			       unsigned long end)
{
	int ret = 0;

	check->walk.range.end = start;
	while (!ret && dmirror_walk_next(&check->walk, end))
		ret = dmirror_walk(&check->walk);
	return ret;
}

static int dmirror_check_table(struct dmirror_check *check)
{
	struct xarray *table = &check->walk.dmirror->table;
	unsigned long index = 0;
	int ret = 0;

	while (!ret && xa_find(table, &index, ULONG_MAX, XA_PRESENT)) {
		ret = dmirror_check_range(check, index << PAGE_SHIFT,
					  (index + 1) << PAGE_SHIFT);
		index++;
	}
	return ret;
}

static int dmirror_test_check(struct dmirror *dmirror,
			      struct hmm_dmirror_test *test)
{
	struct hmm_dmirror_cmd range = {
		.addr = test->check.addr,
		.npages = test->check.npages,
	};
	struct dmirror_check *check;
	int ret;

	ret = range.npages ? dmirror_check_args(&range) : 0;
	if (ret)
		return ret;
	check = kvzalloc_obj(*check, GFP_KERNEL_ACCOUNT);
	if (!check)
		return -ENOMEM;

	check->test = test;
	check->walk.dmirror = dmirror;
	check->walk.look = dmirror_check_look;
	check->walk.use = dmirror_check_use;
	ret = dmirror_walk_init(&check->walk, 0, DMIRROR_WALK_PAGES, 0);
	if (!ret)
		ret = range.npages ? dmirror_check_range(check, range.addr,
							 dmirror_cmd_end(&range)) :
				     dmirror_check_table(check);
	dmirror_walk_fini(&check->walk);
	kvfree(check);
	return ret;
}

struct dmirror_test_op {
	u32 op;
	u32 flags;		/* that it knows */
	int (*fn)(struct dmirror *dmirror, struct hmm_dmirror_test *test);
};

static const struct dmirror_test_op dmirror_test_ops[] = {
	{ HMM_DMIRROR_OP_FAULT, DMIRROR_FAULT_FLAGS, dmirror_test_fault },
	{ HMM_DMIRROR_OP_STATS, 0, dmirror_test_stats },
	{ HMM_DMIRROR_OP_INJECT, 0, dmirror_test_inject },
	{ HMM_DMIRROR_OP_AWAIT, 0, dmirror_test_await },
	{ HMM_DMIRROR_OP_RESUME, 0, dmirror_test_resume },
	{ HMM_DMIRROR_OP_CHECK, 0, dmirror_test_check },
};

static int dmirror_test_op(struct dmirror *dmirror,
			   struct hmm_dmirror_test *test)
{
	const struct dmirror_test_op *op;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(dmirror_test_ops); i++) {
		op = &dmirror_test_ops[i];
		if (op->op != test->op)
			continue;
		if (test->reserved || test->flags & ~op->flags)
			return -EINVAL;
		return op->fn(dmirror, test);
	}
	return -EOPNOTSUPP;
}

static long dmirror_test(struct dmirror *dmirror, void __user *uarg)
{
	struct hmm_dmirror_test test;
	u32 size;
	int ret;

	if (get_user(size, (u32 __user *)uarg))
		return -EFAULT;
	if (size < offsetof(struct hmm_dmirror_test, fault))
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	ret = copy_struct_from_user(&test, sizeof(test), uarg, size);
	if (ret)
		return ret;

	ret = dmirror_test_op(dmirror, &test);
	if (copy_to_user(uarg, &test, min_t(size_t, size, sizeof(test))))
		return -EFAULT;
	return ret;
}

/*
 * Commands
 *
 * Every command gets its argument in kernel memory, with the outputs zeroed and
 * the range checked if it has one.
 */

static int dmirror_cmd_read(struct dmirror *dmirror,
			    struct hmm_dmirror_cmd *cmd)
{
	return dmirror_access(dmirror, cmd, 0);
}

static int dmirror_cmd_read_unlocked(struct dmirror *dmirror,
				     struct hmm_dmirror_cmd *cmd)
{
	return dmirror_access(dmirror, cmd, DMIRROR_ACCESS_UNLOCKED);
}

static int dmirror_cmd_write(struct dmirror *dmirror,
			     struct hmm_dmirror_cmd *cmd)
{
	return dmirror_access(dmirror, cmd, DMIRROR_ACCESS_WRITE);
}

/* How often one looks for pages that an invalidation has dropped. */
#define DMIRROR_READ_BACK_TRIES	10

/* What the table has goes back to user space, to be verified, up to the first miss. */
static int dmirror_read_back(struct dmirror *dmirror,
			     struct hmm_dmirror_cmd *cmd)
{
	return dmirror_access(dmirror, cmd, DMIRROR_ACCESS_NO_FAULTS);
}

/*
 * Reads back what is in the device's memory. What is missing from the table after
 * an invalidation may be there all the same, so that is looked up again.
 */
static int dmirror_read_back_local(struct dmirror *dmirror,
				   struct hmm_dmirror_cmd *cmd)
{
	unsigned int tries = DMIRROR_READ_BACK_TRIES;
	unsigned long start, seq;
	int ret;

	do {
		start = cmd->addr + (cmd->cpages << PAGE_SHIFT);
		seq = mmu_interval_read_begin(&dmirror->notifier);
		ret = dmirror_fault(dmirror, start, dmirror_cmd_end(cmd), 0,
				    false);
		if (ret)
			return ret;
		ret = dmirror_read_back(dmirror, cmd);
	} while (ret == -ENOENT && tries-- &&
		 dmirror_is_invalidated(dmirror, seq));

	return ret;
}

static int dmirror_cmd_migrate_to_dev(struct dmirror *dmirror,
				      struct hmm_dmirror_cmd *cmd)
{
	struct dmirror_migration migration = {
		.args.pgmap_owner = dmirror->device,
		.args.flags = dmirror_select_system(dmirror->device),
		.dmirror = dmirror,
		.alloc = dmirror_alloc_device,
	};
	u64 moved = 0;
	int ret;

	ret = dmirror_migrate_range(&migration, cmd->addr, dmirror_cmd_end(cmd),
				    &moved);
	if (ret)
		return ret;
	ret = dmirror_read_back_local(dmirror, cmd);
	return ret == -ENOENT && migration.error ? migration.error : ret;
}

static int dmirror_cmd_migrate_to_sys(struct dmirror *dmirror,
				      struct hmm_dmirror_cmd *cmd)
{
	struct dmirror_migration migration = {
		.args.pgmap_owner = dmirror->device,
		.args.flags = dmirror_select_local(dmirror->device),
		.dmirror = dmirror,
		.alloc = dmirror_alloc_system,
	};
	int ret;

	ret = dmirror_migrate_range(&migration, cmd->addr, dmirror_cmd_end(cmd),
				    &cmd->cpages);
	return ret ?: migration.error;
}

static int dmirror_cmd_exclusive(struct dmirror *dmirror,
				 struct hmm_dmirror_cmd *cmd)
{
	int ret;

	ret = dmirror_exclusive_range(dmirror, cmd->addr, dmirror_cmd_end(cmd));
	return ret ?: dmirror_read_back(dmirror, cmd);
}

static int dmirror_cmd_check_exclusive(struct dmirror *dmirror,
				       struct hmm_dmirror_cmd *cmd)
{
	unsigned long first = cmd->addr >> PAGE_SHIFT;

	return dmirror_has_exclusive(dmirror, first, first + cmd->npages - 1) ?
		       -EPERM : 0;
}

static int dmirror_cmd_snapshot(struct dmirror *dmirror,
				struct hmm_dmirror_cmd *cmd)
{
	unsigned long end = dmirror_cmd_end(cmd);
	struct dmirror_snapshot *snapshot;
	int ret;

	snapshot = kzalloc_obj(*snapshot, GFP_KERNEL_ACCOUNT);
	if (!snapshot)
		return -ENOMEM;

	snapshot->walk.dmirror = dmirror;
	snapshot->walk.use = dmirror_snapshot_use;
	ret = dmirror_walk_init(&snapshot->walk, cmd->addr, DMIRROR_WALK_PAGES,
				0);
	while (!ret && dmirror_walk_next(&snapshot->walk, end))
		ret = dmirror_snapshot_batch(snapshot, cmd);

	dmirror_walk_fini(&snapshot->walk);
	kfree(snapshot);
	return ret;
}

static int dmirror_cmd_release(struct dmirror *dmirror,
			       struct hmm_dmirror_cmd *cmd)
{
	mutex_lock(&dmirror->lock);
	dmirror_table_drop(dmirror, 0, ULONG_MAX, true);
	mutex_unlock(&dmirror->lock);

	dmirror_evict(dmirror);
	if (!dmirror->device->coherent_addr)
		dmirror_chunks_trim(dmirror->device);
	return 0;
}

static int dmirror_cmd_flags(struct dmirror *dmirror,
			     struct hmm_dmirror_cmd *cmd)
{
	if (cmd->npages & ~HMM_DMIRROR_FLAG_FAIL_ALLOC)
		return -EINVAL;

	if (cmd->npages & HMM_DMIRROR_FLAG_FAIL_ALLOC)
		set_bit(DMIRROR_FAIL_ALLOC, &dmirror->flags);
	else
		clear_bit(DMIRROR_FAIL_ALLOC, &dmirror->flags);
	return 0;
}

struct dmirror_ioctl {
	unsigned int command;
	bool has_range;
	int (*fn)(struct dmirror *dmirror, struct hmm_dmirror_cmd *cmd);
};

static const struct dmirror_ioctl dmirror_ioctls[] = {
	{ HMM_DMIRROR_READ, true, dmirror_cmd_read },
	{ HMM_DMIRROR_READ_UNLOCKED, true, dmirror_cmd_read_unlocked },
	{ HMM_DMIRROR_WRITE, true, dmirror_cmd_write },
	{ HMM_DMIRROR_SNAPSHOT, true, dmirror_cmd_snapshot },
	{ HMM_DMIRROR_MIGRATE_TO_DEV, true, dmirror_cmd_migrate_to_dev },
	{ HMM_DMIRROR_MIGRATE_TO_SYS, true, dmirror_cmd_migrate_to_sys },
	{ HMM_DMIRROR_EXCLUSIVE, true, dmirror_cmd_exclusive },
	{ HMM_DMIRROR_CHECK_EXCLUSIVE, true, dmirror_cmd_check_exclusive },
	{ HMM_DMIRROR_RELEASE, false, dmirror_cmd_release },
	{ HMM_DMIRROR_FLAGS, false, dmirror_cmd_flags },
};

static const struct dmirror_ioctl *dmirror_find_ioctl(unsigned int command)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(dmirror_ioctls); i++)
		if (dmirror_ioctls[i].command == command)
			return &dmirror_ioctls[i];
	return NULL;
}

/*
 * The outputs are handed back whether the command succeeds or not. A failed
 * command has done @cpages pages, too.
 */
static long dmirror_fops_ioctl(struct file *file, unsigned int command,
			       unsigned long arg)
{
	const struct dmirror_ioctl *ioctl = dmirror_find_ioctl(command);
	struct dmirror *dmirror = file->private_data;
	void __user *uarg = (void __user *)arg;
	struct hmm_dmirror_cmd cmd;
	int ret = 0;

	if (command == HMM_DMIRROR_TEST)
		return dmirror_test(dmirror, uarg);
	if (!ioctl)
		return -ENOTTY;
	if (copy_from_user(&cmd, uarg, sizeof(cmd)))
		return -EFAULT;

	cmd.cpages = 0;
	cmd.faults = 0;
	if (ioctl->has_range)
		ret = dmirror_check_args(&cmd);
	if (!ret)
		ret = ioctl->fn(dmirror, &cmd);

	if (copy_to_user(uarg, &cmd, sizeof(cmd)))
		return -EFAULT;
	return ret;
}

/*
 * File operations
 */

static struct dmirror *dmirror_alloc(struct dmirror_device *device)
{
	struct dmirror *dmirror;
	unsigned int i;

	dmirror = kzalloc_obj(*dmirror, GFP_KERNEL_ACCOUNT);
	if (!dmirror)
		return NULL;

	dmirror->device = device;
	kref_init(&dmirror->refs);
	mutex_init(&dmirror->lock);
	spin_lock_init(&dmirror->inject_lock);
	init_waitqueue_head(&dmirror->inject_wait);
	xa_init_flags(&dmirror->table, XA_FLAGS_ACCOUNT);
	for (i = 0; i < DMIRROR_IO_PAGES; i++) {
		dmirror->io_pages[i] = alloc_page(GFP_KERNEL_ACCOUNT |
						  __GFP_ZERO);
		if (!dmirror->io_pages[i]) {
			dmirror_free(dmirror);
			return NULL;
		}
	}
	return dmirror;
}

static int dmirror_fops_open(struct inode *inode, struct file *file)
{
	struct dmirror *dmirror;
	int ret;

	dmirror = dmirror_alloc(&dmirror_devices[iminor(inode)]);
	if (!dmirror)
		return -ENOMEM;

	ret = mmu_interval_notifier_insert(&dmirror->notifier, current->mm, 0,
					   ULONG_MAX & PAGE_MASK,
					   &dmirror_notifier_ops);
	if (ret) {
		dmirror_free(dmirror);
		return ret;
	}

	file->private_data = dmirror;
	return 0;
}

static int dmirror_fops_release(struct inode *inode, struct file *file)
{
	struct dmirror *dmirror = file->private_data;

	mmu_interval_notifier_remove(&dmirror->notifier);
	dmirror_inject_nothing(dmirror);
	dmirror_evict(dmirror);
	kref_put(&dmirror->refs, dmirror_release);
	return 0;
}

/*
 * Who may not drop the lock gets what userfaultfd gives him. Whoever waits
 * without it has to keep the file by himself.
 */
static vm_fault_t dmirror_gate_drop(struct vm_fault *vmf, bool wait)
{
	struct file *file;

	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return VM_FAULT_SIGBUS;
	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
		return VM_FAULT_RETRY;

	file = get_file(vmf->vma->vm_file);
	release_fault_lock(vmf);
	if (wait)
		dmirror_inject_wait(file->private_data, HMM_DMIRROR_POINT_GATE);
	fput(file);
	return VM_FAULT_RETRY;
}

/* The meeting point of a test with a walk, which comes here to fault a page in. */
static vm_fault_t dmirror_gate_fault(struct vm_fault *vmf)
{
	struct dmirror *dmirror = vmf->vma->vm_file->private_data;
	unsigned long index = vmf->pgoff - PHYS_PFN(HMM_DMIRROR_GATE_OFFSET);

	switch (dmirror_inject_take(dmirror, HMM_DMIRROR_POINT_GATE)) {
	case HMM_DMIRROR_INJECT_WAIT:
		dmirror_inject_wait(dmirror, HMM_DMIRROR_POINT_GATE);
		break;
	case HMM_DMIRROR_INJECT_DROP_AND_WAIT:
		return dmirror_gate_drop(vmf, true);
	case HMM_DMIRROR_INJECT_DROP:
		return dmirror_gate_drop(vmf, false);
	case HMM_DMIRROR_INJECT_INVALIDATE:
		zap_vma_range(vmf->vma, vmf->vma->vm_start,
			      vma_pages(vmf->vma) << PAGE_SHIFT);
		break;
	case HMM_DMIRROR_INJECT_SIGBUS:
		return VM_FAULT_SIGBUS;
	case HMM_DMIRROR_INJECT_OOM:
		return VM_FAULT_OOM;
	case HMM_DMIRROR_INJECT_HWPOISON:
		return VM_FAULT_HWPOISON;
	}

	vmf->page = dmirror->io_pages[index];
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct dmirror_gate_ops = {
	.fault = dmirror_gate_fault,
};

/*
 * A file has a few pages of its own to map, as a device has registers. They are
 * in place from the start: such a mapping, which holds struct pages that belong
 * to no file's cache, is a test case for HMM. At another offset, that of a gate,
 * the same pages are faulted in.
 *
 * The mmap lock is held for writing. A test can have that last.
 */
static int dmirror_fops_mmap_prepare(struct vm_area_desc *desc)
{
	struct dmirror *dmirror = desc->file->private_data;
	bool gate = desc->pgoff >= PHYS_PFN(HMM_DMIRROR_GATE_OFFSET);
	pgoff_t first = desc->pgoff;

	if (gate)
		first -= PHYS_PFN(HMM_DMIRROR_GATE_OFFSET);
	dmirror_inject(dmirror, HMM_DMIRROR_POINT_MMAP);
	if (first >= DMIRROR_IO_PAGES ||
	    vma_desc_pages(desc) > DMIRROR_IO_PAGES - first)
		return -ENXIO;

	if (gate)
		desc->vm_ops = &dmirror_gate_ops;
	else
		mmap_action_map_kernel_pages_full(desc,
						  dmirror->io_pages + first);
	return 0;
}

static const struct file_operations dmirror_fops = {
	.owner = THIS_MODULE,
	.open = dmirror_fops_open,
	.release = dmirror_fops_release,
	.mmap_prepare = dmirror_fops_mmap_prepare,
	.unlocked_ioctl = dmirror_fops_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

/*
 * Init and exit
 */

static struct class *dmirror_class;
static unsigned int dmirror_ndevices;
static int dmirror_major;

static void __init dmirror_device_init(struct dmirror_device *device,
				       unsigned long coherent_addr)
{
	device->coherent_addr = coherent_addr;
	mutex_init(&device->chunks_lock);
	spin_lock_init(&device->lock);
}

/*
 * All files are closed, but what they have left behind may be in use still. It
 * comes back however long that takes: a chunk cannot go before.
 */
static void dmirror_device_fini(struct dmirror_device *device)
{
	struct dmirror_migration migration = { .alloc = dmirror_alloc_system };

	dmirror_migration_init(&migration, GFP_KERNEL | __GFP_NOFAIL);
	while (dmirror_chunks_trim(device)) {
		dmirror_evict_pass(&migration, device);
		schedule_timeout_uninterruptible(1);
	}
	dmirror_migration_fini(&migration);
}

static void dmirror_devices_fini(void)
{
	unsigned int i;

	for (i = 0; i < DMIRROR_MAX_DEVICES; i++)
		dmirror_device_fini(&dmirror_devices[i]);
}

/*
 * Memory that nobody else uses, which the CPU can address. Whatever memremap
 * would make a fuss about has to be found before.
 */
static const char __init *dmirror_coherent_objection(unsigned long addr)
{
	struct range range = mhp_get_pluggable_range(true);
	unsigned long last;

	if (!IS_ALIGNED(addr, PMD_SIZE) ||
	    !IS_ALIGNED(addr, memremap_compat_align()))
		return "is not aligned to what a PMD maps";
	if (check_add_overflow(addr, DMIRROR_CHUNK_SIZE - 1, &last) ||
	    addr < range.start || last > range.end)
		return "is out of the range of addresses for memory";
	if (region_intersects(addr, DMIRROR_CHUNK_SIZE, IORESOURCE_SYSTEM_RAM,
			      IORES_DESC_NONE) != REGION_DISJOINT)
		return "is in use as system memory";
	return NULL;
}

/* Where there is no memory, nothing is kept. */
static bool __init dmirror_keeps_data(unsigned long pfn)
{
	unsigned long *word = page_address(pfn_to_page(pfn));

	WRITE_ONCE(word[0], 0x5aa5c33cUL);
	WRITE_ONCE(word[1], ~0x5aa5c33cUL);
	return READ_ONCE(word[0]) == 0x5aa5c33cUL &&
	       READ_ONCE(word[1]) == ~0x5aa5c33cUL;
}

static const char __init *dmirror_coherent_add(struct dmirror_device *device)
{
	unsigned long pfn = PHYS_PFN(device->coherent_addr);
	const char *objection;
	int ret;

	objection = dmirror_coherent_objection(device->coherent_addr);
	if (objection)
		return objection;

	mutex_lock(&device->chunks_lock);
	ret = dmirror_chunk_add(device, 0);
	mutex_unlock(&device->chunks_lock);
	if (ret)
		return ret == -EBUSY ? "is taken" : "can't be mapped";

	if (!dmirror_keeps_data(pfn) ||
	    !dmirror_keeps_data(pfn + DMIRROR_CHUNK_PAGES - 1))
		return "is not there";
	return NULL;
}

/* The coherent devices come together or not at all. */
static bool __init dmirror_coherent_init(void)
{
	struct dmirror_device *device;
	const char *objection;
	unsigned int i;

	if (!spm_addr_dev0 && !spm_addr_dev1)
		return false;
	if (!spm_addr_dev0 || !spm_addr_dev1) {
		pr_warn("no coherent devices: they need both spm_addr_dev0 and spm_addr_dev1\n");
		return false;
	}

	for (i = DMIRROR_PRIVATE_DEVICES; i < DMIRROR_MAX_DEVICES; i++) {
		device = &dmirror_devices[i];
		objection = dmirror_coherent_add(device);
		if (objection) {
			pr_warn("no coherent devices: memory of %lu MiB at %#lx %s\n",
				DMIRROR_CHUNK_SIZE / SZ_1M,
				device->coherent_addr, objection);
			return false;
		}
	}
	return true;
}

static unsigned int __init dmirror_devices_init(void)
{
	dmirror_device_init(&dmirror_devices[0], 0);
	dmirror_device_init(&dmirror_devices[1], 0);
	dmirror_device_init(&dmirror_devices[2], spm_addr_dev0);
	dmirror_device_init(&dmirror_devices[3], spm_addr_dev1);

	if (dmirror_coherent_init())
		return DMIRROR_MAX_DEVICES;
	dmirror_devices_fini();
	return DMIRROR_PRIVATE_DEVICES;
}

static void dmirror_nodes_destroy(unsigned int nr)
{
	while (nr--)
		device_destroy(dmirror_class, MKDEV(dmirror_major, nr));
}

static int __init dmirror_nodes_create(void)
{
	struct device *dev;
	unsigned int minor;

	for (minor = 0; minor < dmirror_ndevices; minor++) {
		dev = device_create(dmirror_class, NULL,
				    MKDEV(dmirror_major, minor), NULL,
				    "hmm_dmirror%u", minor);
		if (IS_ERR(dev)) {
			dmirror_nodes_destroy(minor);
			return PTR_ERR(dev);
		}
	}
	return 0;
}

static int __init dmirror_init(void)
{
	int ret;

	dmirror_class = class_create("hmm_dmirror");
	if (IS_ERR(dmirror_class))
		return PTR_ERR(dmirror_class);

	dmirror_ndevices = dmirror_devices_init();
	dmirror_major = __register_chrdev(0, 0, dmirror_ndevices,
					  DMIRROR_REGION_NAME, &dmirror_fops);
	if (dmirror_major < 0) {
		ret = dmirror_major;
		goto err_class;
	}

	ret = dmirror_nodes_create();
	if (ret)
		goto err_chrdev;

	pr_info("%u devices, for testing only\n", dmirror_ndevices);
	return 0;

err_chrdev:
	__unregister_chrdev(dmirror_major, 0, dmirror_ndevices,
			    DMIRROR_REGION_NAME);
err_class:
	dmirror_devices_fini();
	class_destroy(dmirror_class);
	return ret;
}

static void __exit dmirror_exit(void)
{
	dmirror_nodes_destroy(dmirror_ndevices);
	__unregister_chrdev(dmirror_major, 0, dmirror_ndevices,
			    DMIRROR_REGION_NAME);
	dmirror_devices_fini();
	class_destroy(dmirror_class);
}

module_init(dmirror_init);
module_exit(dmirror_exit);
MODULE_DESCRIPTION("Test device for HMM (heterogeneous memory management)");
MODULE_LICENSE("GPL");
