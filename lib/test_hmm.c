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
 * Words
 * =====
 *
 * mirror	an open file, struct dmirror
 * table	the mirror's device page table
 * entry	what the table holds for a page: the page, and an access tag
 * miss		an access to a page whose entry does not allow it
 * walk		a call into HMM for a batch, together with its retries
 * output	what a walk stored for a page, see enum hmm_pfn_flags
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
 *
 * Locks
 * =====
 *
 * dmirror->lock	the table, dmirror->flags
 *
 * The invalidate callback takes dmirror->lock, and reclaim calls it. Under that
 * lock nothing may wait for memory, touch user memory or take the mmap lock.
 * The mmap lock comes before it.
 *
 * All else in a mirror is set by open and constant until release.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/device.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/hmm.h>
#include <linux/jiffies.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/overflow.h>
#include <linux/pgtable.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/xarray.h>

#include "test_hmm_uapi.h"

/* The name of the character device region is known to user space. */
#define DMIRROR_REGION_NAME	"HMM_DMIRROR"

#define DMIRROR_MAX_DEVICES	4
#define DMIRROR_PRIVATE_DEVICES	2

/*
 * Bounds on what a command can make the kernel allocate or do at a time: the
 * range of a command, the outputs of a walk, the data in transit between the
 * device and the caller's buffer, and the pages that a file offers for mmap.
 */
#define DMIRROR_MAX_PAGES	(4UL << 20)
#define DMIRROR_WALK_PAGES	512UL
#define DMIRROR_BOUNCE_PAGES	(SZ_2M >> PAGE_SHIFT)
#define DMIRROR_IO_PAGES	16UL

static unsigned long spm_addr_dev0;
module_param(spm_addr_dev0, ulong, 0444);
MODULE_PARM_DESC(spm_addr_dev0,
		 "Physical address of reserved memory for the first coherent device");

static unsigned long spm_addr_dev1;
module_param(spm_addr_dev1, ulong, 0444);
MODULE_PARM_DESC(spm_addr_dev1,
		 "Physical address of reserved memory for the second coherent device");

/*
 * The address of a device is the dev_private_owner of its walks, and so the
 * owner of whatever device memory it has.
 */
struct dmirror_device {
	struct device *dev;
};

static struct dmirror_device dmirror_devices[DMIRROR_MAX_DEVICES];

struct dmirror {
	struct dmirror_device *device;
	struct mmu_interval_notifier notifier;
	struct mutex lock;	/* protects the next two */
	struct xarray table;
	u64 flags;
	struct page *io_pages[DMIRROR_IO_PAGES];
};

/*
 * The table
 */

/* Tags of entries. The only other one that an xarray allows for is 3. */
enum {
	DMIRROR_ENTRY_READ = 0,
	DMIRROR_ENTRY_WRITE = 1,
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

	if (write && xa_pointer_tag(entry) != DMIRROR_ENTRY_WRITE)
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

	if (may_sleep)
		mutex_lock(&dmirror->lock);
	else if (!mutex_trylock(&dmirror->lock))
		return false;

	/* First of all, so that a walk under way can't pass its check. */
	mmu_interval_set_seq(notifier, cur_seq);
	dmirror_table_drop(dmirror, range->start >> PAGE_SHIFT,
			   (range->end - 1) >> PAGE_SHIFT, may_sleep);

	mutex_unlock(&dmirror->lock);
	return true;
}

static const struct mmu_interval_notifier_ops dmirror_notifier_ops = {
	.invalidate = dmirror_invalidate,
};

/*
 * Walks
 */

/**
 * struct dmirror_walk - a pass over a range of the mirrored address space
 * @dmirror: whose
 * @range: the batch that the walk is at, see dmirror_walk_next()
 * @use: does what has to be done with the outputs in @range. Called with
 *	dmirror->lock held, while the outputs are what the CPU has. Not called
 *	for a batch that HMM failed for.
 * @unlocked: let HMM take the mmap lock and do the retries
 */
struct dmirror_walk {
	struct dmirror *dmirror;
	struct hmm_range range;
	int (*use)(struct dmirror_walk *walk);
	bool unlocked;
};

/* The batch was invalidated on the way. Positive: it goes to no caller. */
#define DMIRROR_INVALIDATED 1

static int dmirror_walk_init(struct dmirror_walk *walk, unsigned long start,
			     unsigned long requests)
{
	struct dmirror *dmirror = walk->dmirror;

	/* Zeroed: HMM hands on the sticky bits that it finds in here. */
	walk->range.hmm_pfns = kcalloc(DMIRROR_WALK_PAGES,
				       sizeof(*walk->range.hmm_pfns),
				       GFP_KERNEL_ACCOUNT);
	if (!walk->range.hmm_pfns)
		return -ENOMEM;

	walk->range.notifier = &dmirror->notifier;
	walk->range.dev_private_owner = dmirror->device;
	walk->range.default_flags = requests;
	walk->range.end = start;
	return 0;
}

static void dmirror_walk_fini(struct dmirror_walk *walk)
{
	kfree(walk->range.hmm_pfns);
}

/*
 * Moves on to the next batch before @end. Batches are aligned as far as
 * possible, so as not to cut large mappings in two.
 */
static bool dmirror_walk_next(struct dmirror_walk *walk, unsigned long end)
{
	const unsigned long size = DMIRROR_WALK_PAGES << PAGE_SHIFT;
	unsigned long start = walk->range.end;

	walk->range.start = start;
	walk->range.end = start + min(end - start, size - start % size);
	return start < end;
}

static unsigned long dmirror_walk_npages(struct dmirror_walk *walk)
{
	return (walk->range.end - walk->range.start) >> PAGE_SHIFT;
}

static int dmirror_walk_locked(struct hmm_range *range)
{
	struct mm_struct *mm = range->notifier->mm;
	int ret;

	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	ret = hmm_range_fault(range);
	mmap_read_unlock(mm);
	return ret == -EBUSY ? DMIRROR_INVALIDATED : ret;
}

static int dmirror_walk_once(struct dmirror_walk *walk, unsigned long timeout)
{
	struct dmirror *dmirror = walk->dmirror;
	int ret;

	if (fatal_signal_pending(current))
		return -EINTR;

	if (walk->unlocked)
		ret = hmm_range_fault_unlocked_timeout(&walk->range, timeout);
	else
		ret = dmirror_walk_locked(&walk->range);
	if (ret)
		return ret;

	mutex_lock(&dmirror->lock);
	if (mmu_interval_read_retry(&dmirror->notifier,
				    walk->range.notifier_seq))
		ret = DMIRROR_INVALIDATED;
	else
		ret = walk->use(walk);
	mutex_unlock(&dmirror->lock);
	return ret;
}

/*
 * The time runs from the first invalidation on, so that a walk may take as long
 * as it needs to fault pages in.
 */
static int dmirror_walk_retry(struct dmirror_walk *walk)
{
	unsigned long timeout = msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT);
	unsigned long deadline;
	int ret;

	ret = dmirror_walk_once(walk, timeout);
	deadline = jiffies + timeout;
	while (ret == DMIRROR_INVALIDATED) {
		if (time_after(jiffies, deadline))
			return -EBUSY;
		ret = dmirror_walk_once(walk, timeout);
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

	if (!mmget_not_zero(mm))
		return -EFAULT;
	ret = dmirror_walk_retry(walk);
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
};

/* HMM must have granted, for every page, what was requested. */
static bool dmirror_granted(struct dmirror_walk *walk)
{
	const unsigned long *outputs = walk->range.hmm_pfns;
	unsigned long requests = walk->range.default_flags;
	unsigned long i;

	/* A request is granted by the output flag that has the same bit. */
	for (i = 0; i < dmirror_walk_npages(walk); i++)
		if ((outputs[i] & (requests | HMM_PFN_ERROR)) != requests)
			return false;
	return true;
}

/* Running out of memory is left in the xa_state, for dmirror_fault_batch(). */
static int dmirror_fault_use(struct dmirror_walk *walk)
{
	struct xa_state *xas = &container_of(walk, struct dmirror_fault,
					     walk)->xas;
	unsigned long i;

	if (WARN_ON_ONCE(!dmirror_granted(walk)))
		return -EIO;

	xas_set(xas, walk->range.start >> PAGE_SHIFT);
	xas_lock(xas);
	for (i = 0; i < dmirror_walk_npages(walk); i++) {
		xas_store(xas, dmirror_entry(walk->range.hmm_pfns[i]));
		if (xas_error(xas))
			break;
		xas_next(xas);
	}
	xas_unlock(xas);
	return 0;
}

/*
 * The table grows with whatever memory there is without waiting. If that is not
 * enough the batch is done again with memory waited for: without the lock, so
 * the outputs are not valid any more.
 */
static int dmirror_fault_batch(struct dmirror_fault *fault)
{
	int ret;

	do {
		ret = dmirror_walk(&fault->walk);
	} while (xas_nomem(&fault->xas, GFP_KERNEL));

	return ret ?: xas_error(&fault->xas);
}

struct dmirror_access {
	struct dmirror *dmirror;
	struct hmm_dmirror_cmd *cmd;
	void *bounce;
	bool write;
	bool unlocked;
};

static int dmirror_fault(struct dmirror_access *access, unsigned long start,
			 unsigned long end)
{
	struct dmirror *dmirror = access->dmirror;
	struct dmirror_fault fault = {
		.walk.dmirror = dmirror,
		.walk.use = dmirror_fault_use,
		.walk.unlocked = access->unlocked,
		.xas = __XA_STATE(&dmirror->table, 0, 0, 0),
	};
	unsigned long requests = HMM_PFN_REQ_FAULT;
	int ret;

	if (access->write)
		requests |= HMM_PFN_REQ_WRITE;
	ret = dmirror_walk_init(&fault.walk, start, requests);
	if (ret)
		return ret;

	while (!ret && dmirror_walk_next(&fault.walk, end))
		ret = dmirror_fault_batch(&fault);

	dmirror_walk_fini(&fault.walk);
	return ret;
}

static int dmirror_read_page(void *buf, struct page *page)
{
	void *addr = kmap_local_page(page);
	unsigned long left;

	left = copy_mc_to_kernel(buf, addr, PAGE_SIZE);
	kunmap_local(addr);
	return left ? -EHWPOISON : 0;
}

static int dmirror_write_page(struct page *page, const void *buf)
{
	memcpy_to_page(page, 0, buf, PAGE_SIZE);
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
	struct dmirror *dmirror = access->dmirror;
	struct page *page;
	int ret = 0;
	long done;

	mutex_lock(&dmirror->lock);
	for (done = 0; done < npages; done++, buf += PAGE_SIZE) {
		page = dmirror_table_lookup(dmirror, index + done,
					    access->write);
		if (!page)
			break;
		ret = access->write ? dmirror_write_page(page, buf) :
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
		if (done > 0) {
			*moved += done;
		} else if (done < 0) {
			ret = done;
		} else {
			cmd->faults++;
			ret = dmirror_fault(access, addr, end);
		}
	}
	return ret;
}

static int dmirror_access_step(struct dmirror_access *access,
			       unsigned long npages)
{
	struct hmm_dmirror_cmd *cmd = access->cmd;
	void __user *buf = u64_to_user_ptr(cmd->ptr +
					   (cmd->cpages << PAGE_SHIFT));
	unsigned long moved = 0;
	int ret;

	if (access->write &&
	    copy_from_user(access->bounce, buf, npages << PAGE_SHIFT))
		return -EFAULT;

	ret = dmirror_transfer(access, npages, &moved);

	if (!access->write &&
	    copy_to_user(buf, access->bounce, moved << PAGE_SHIFT))
		return -EFAULT;

	cmd->cpages += moved;
	return ret;
}

static int dmirror_access(struct dmirror_access *access)
{
	struct hmm_dmirror_cmd *cmd = access->cmd;
	unsigned long step = min(cmd->npages, DMIRROR_BOUNCE_PAGES);
	int ret = 0;

	access->bounce = kvmalloc_array(step, PAGE_SIZE, GFP_KERNEL_ACCOUNT);
	if (!access->bounce)
		return -ENOMEM;

	while (!ret && cmd->cpages < cmd->npages) {
		step = min(step, cmd->npages - cmd->cpages);
		ret = fatal_signal_pending(current) ?
			      -EINTR : dmirror_access_step(access, step);
		cond_resched();
	}

	kvfree(access->bounce);
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
	bool local = is_zone_device_page(page) &&
		     page_pgmap(page)->owner == dmirror->device;

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

static int dmirror_snapshot_use(struct dmirror_walk *walk)
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
 * Commands
 *
 * Every command gets its argument in kernel memory, with the outputs zeroed and
 * the range checked if it has one.
 */

static int dmirror_cmd_read(struct dmirror *dmirror,
			    struct hmm_dmirror_cmd *cmd)
{
	struct dmirror_access access = { .dmirror = dmirror, .cmd = cmd };

	return dmirror_access(&access);
}

static int dmirror_cmd_read_unlocked(struct dmirror *dmirror,
				     struct hmm_dmirror_cmd *cmd)
{
	struct dmirror_access access = {
		.dmirror = dmirror,
		.cmd = cmd,
		.unlocked = true,
	};

	return dmirror_access(&access);
}

static int dmirror_cmd_write(struct dmirror *dmirror,
			     struct hmm_dmirror_cmd *cmd)
{
	struct dmirror_access access = {
		.dmirror = dmirror,
		.cmd = cmd,
		.write = true,
	};

	return dmirror_access(&access);
}

static int dmirror_cmd_snapshot(struct dmirror *dmirror,
				struct hmm_dmirror_cmd *cmd)
{
	unsigned long end = cmd->addr + (cmd->npages << PAGE_SHIFT);
	struct dmirror_snapshot *snapshot;
	int ret;

	snapshot = kzalloc_obj(*snapshot, GFP_KERNEL_ACCOUNT);
	if (!snapshot)
		return -ENOMEM;

	snapshot->walk.dmirror = dmirror;
	snapshot->walk.use = dmirror_snapshot_use;
	ret = dmirror_walk_init(&snapshot->walk, cmd->addr, 0);
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
	return 0;
}

static int dmirror_cmd_flags(struct dmirror *dmirror,
			     struct hmm_dmirror_cmd *cmd)
{
	if (cmd->npages & ~HMM_DMIRROR_FLAG_FAIL_ALLOC)
		return -EINVAL;

	mutex_lock(&dmirror->lock);
	dmirror->flags = cmd->npages;
	mutex_unlock(&dmirror->lock);
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

/* Past this, no arithmetic on the range can overflow. */
static int dmirror_check_range(const struct hmm_dmirror_cmd *cmd)
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

	if (!ioctl)
		return -ENOTTY;
	if (copy_from_user(&cmd, uarg, sizeof(cmd)))
		return -EFAULT;

	cmd.cpages = 0;
	cmd.faults = 0;
	if (ioctl->has_range)
		ret = dmirror_check_range(&cmd);
	if (!ret)
		ret = ioctl->fn(dmirror, &cmd);

	if (copy_to_user(uarg, &cmd, sizeof(cmd)))
		return -EFAULT;
	return ret;
}

/*
 * File operations
 */

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

static struct dmirror *dmirror_alloc(struct dmirror_device *device)
{
	struct dmirror *dmirror;
	unsigned int i;

	dmirror = kzalloc_obj(*dmirror, GFP_KERNEL_ACCOUNT);
	if (!dmirror)
		return NULL;

	dmirror->device = device;
	mutex_init(&dmirror->lock);
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
	dmirror_free(dmirror);
	return 0;
}

/*
 * A file has a few pages of its own to map, as a device has registers. They are
 * in place from the start: such a mapping, which holds struct pages that belong
 * to no file's cache, is a test case for HMM.
 */
static int dmirror_fops_mmap_prepare(struct vm_area_desc *desc)
{
	struct dmirror *dmirror = desc->file->private_data;

	if (desc->pgoff >= DMIRROR_IO_PAGES ||
	    vma_desc_pages(desc) > DMIRROR_IO_PAGES - desc->pgoff)
		return -ENXIO;

	mmap_action_map_kernel_pages_full(desc,
					  dmirror->io_pages + desc->pgoff);
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

static int __init dmirror_device_create(unsigned int minor)
{
	struct device *dev;

	dev = device_create(dmirror_class, NULL, MKDEV(dmirror_major, minor),
			    NULL, "hmm_dmirror%u", minor);
	if (IS_ERR(dev))
		return PTR_ERR(dev);

	dmirror_devices[minor].dev = dev;
	return 0;
}

static void dmirror_devices_destroy(unsigned int ndevices)
{
	while (ndevices--)
		device_unregister(dmirror_devices[ndevices].dev);
}

static int __init dmirror_devices_create(void)
{
	unsigned int minor;
	int ret;

	for (minor = 0; minor < dmirror_ndevices; minor++) {
		ret = dmirror_device_create(minor);
		if (ret) {
			dmirror_devices_destroy(minor);
			return ret;
		}
	}
	return 0;
}

static unsigned int __init dmirror_count_devices(void)
{
	if (spm_addr_dev0 && spm_addr_dev1)
		return DMIRROR_MAX_DEVICES;
	if (spm_addr_dev0 || spm_addr_dev1)
		pr_warn("no coherent devices: they need both spm_addr_dev0 and spm_addr_dev1\n");
	return DMIRROR_PRIVATE_DEVICES;
}

static int __init dmirror_init(void)
{
	int ret;

	dmirror_class = class_create("hmm_dmirror");
	if (IS_ERR(dmirror_class))
		return PTR_ERR(dmirror_class);

	dmirror_ndevices = dmirror_count_devices();
	dmirror_major = __register_chrdev(0, 0, dmirror_ndevices,
					  DMIRROR_REGION_NAME, &dmirror_fops);
	if (dmirror_major < 0) {
		ret = dmirror_major;
		goto err_class;
	}

	ret = dmirror_devices_create();
	if (ret)
		goto err_chrdev;

	pr_info("%u devices, for testing only\n", dmirror_ndevices);
	return 0;

err_chrdev:
	__unregister_chrdev(dmirror_major, 0, dmirror_ndevices,
			    DMIRROR_REGION_NAME);
err_class:
	class_destroy(dmirror_class);
	return ret;
}

static void __exit dmirror_exit(void)
{
	dmirror_devices_destroy(dmirror_ndevices);
	__unregister_chrdev(dmirror_major, 0, dmirror_ndevices,
			    DMIRROR_REGION_NAME);
	class_destroy(dmirror_class);
}

module_init(dmirror_init);
module_exit(dmirror_exit);
MODULE_DESCRIPTION("Test device for HMM (heterogeneous memory management)");
MODULE_LICENSE("GPL");
