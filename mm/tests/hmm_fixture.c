// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * An address space to ask HMM about, as a driver would
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/lockdep.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/mm.h>
#include <linux/uaccess.h>

#include "hmm_fixture.h"

/* The three calls */

/* Faults look at this, to see what the walk holds. */
static void hmm_begin(struct hmm_fixture *t)
{
	t->locks = lockdep_depth(current);
	t->was_locked = rwsem_is_locked(&t->mm->mmap_lock);
	t->asking = true;
}

/* Is there a moment when nobody has the mmap lock? khugepaged takes it, too. */
static bool hmm_is_unlocked(struct mm_struct *mm)
{
	unsigned int tries;

	for (tries = 0; tries < HZ; tries++) {
		if (!rwsem_is_locked(&mm->mmap_lock))
			return true;
		schedule_timeout_uninterruptible(1);
	}
	return false;
}

/* The call gives back the locks that it takes, but that of the caller. */
static void hmm_end(struct hmm_fixture *t)
{
	t->asking = false;
	KUNIT_EXPECT_EQ(t->test, lockdep_depth(current), t->locks);
	if (!t->was_locked)
		KUNIT_EXPECT_TRUE(t->test, hmm_is_unlocked(t->mm));
}

static int hmm_call_locked(struct hmm_range *range)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);
	struct mm_struct *mm = range->notifier->mm;
	int ret;

	hmm_begin(t);
	mmap_read_lock(mm);
	ret = hmm_range_fault(range);
	mmap_read_unlock(mm);
	hmm_end(t);
	return ret;
}

/* The user of the mm is given back, too. */
int hmm_call_timeout(struct hmm_range *range, unsigned long timeout)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);
	int ret, users = atomic_read(&t->mm->mm_users);

	hmm_begin(t);
	ret = hmm_range_fault_unlocked_timeout(range, timeout);
	hmm_end(t);
	KUNIT_EXPECT_EQ(t->test, atomic_read(&t->mm->mm_users), users);
	return ret;
}

static int hmm_call_unlocked(struct hmm_range *range)
{
	return hmm_call_timeout(range, 0);
}

static void hmm_commit_lock(struct hmm_range *range)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);

	t->turns++;
	if (t->before_commit)
		t->before_commit(t);
	/* Whoever does not give it back ends here, and not in a deadlock. */
	KUNIT_ASSERT_FALSE(t->test, t->committing);
	mutex_lock(&t->device);
	t->committing = true;
}

static void hmm_commit_unlock(struct hmm_range *range)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);

	t->committing = false;
	mutex_unlock(&t->device);
}

/* Steps come in order, under the lock, while what was found is so. */
static int hmm_commit(struct hmm_range *range, unsigned long start, unsigned long end)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);

	KUNIT_EXPECT_TRUE(t->test, t->committing);
	KUNIT_EXPECT_FALSE(t->test, mmu_interval_read_retry(range->notifier,
							    range->notifier_seq));
	KUNIT_EXPECT_EQ(t->test, lockdep_depth(current),
			t->locks + IS_ENABLED(CONFIG_LOCKDEP));
	KUNIT_EXPECT_EQ(t->test, start, t->committed);
	KUNIT_EXPECT_GT(t->test, end, start);
	t->committed = end;
	t->commits++;
	if (!t->commit)
		return 0;
	return t->commit(t, (start - t->start) >> PAGE_SHIFT, (end - start) >> PAGE_SHIFT);
}

static const struct hmm_commit_ops hmm_test_commit_ops = {
	.lock = hmm_commit_lock,
	.unlock = hmm_commit_unlock,
	.commit = hmm_commit,
};

int hmm_call_each_timeout(struct hmm_range *range, unsigned long timeout)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);
	int ret, users = atomic_read(&t->mm->mm_users);

	t->committed = range->start;
	t->commits = 0;
	t->turns = 0;
	hmm_begin(t);
	ret = hmm_range_fault_each(range, timeout, &hmm_test_commit_ops);
	hmm_end(t);

	if (!ret)
		KUNIT_EXPECT_EQ(t->test, t->committed, range->end);
	KUNIT_EXPECT_EQ(t->test, atomic_read(&t->mm->mm_users), users);
	return ret;
}

static int hmm_call_each(struct hmm_range *range)
{
	return hmm_call_each_timeout(range, 0);
}

const struct hmm_call hmm_calls[] = {
	[HMM_CALL_LOCKED] = { "locked", hmm_call_locked, true },
	[HMM_CALL_UNLOCKED] = { "unlocked", hmm_call_unlocked, false },
	[HMM_CALL_EACH] = { "each", hmm_call_each, false },
};

const void *hmm_call_gen_params(struct kunit *test, const void *prev, char *desc)
{
	const struct hmm_call *next = prev ? (const struct hmm_call *)prev + 1 : hmm_calls;

	if (next == hmm_calls + ARRAY_SIZE(hmm_calls))
		return NULL;
	strscpy(desc, next->name, KUNIT_PARAM_DESC_SIZE);
	return next;
}

const void *hmm_unlocked_gen_params(struct kunit *test, const void *prev, char *desc)
{
	return hmm_call_gen_params(test, prev ?: &hmm_calls[HMM_CALL_LOCKED], desc);
}

/* The notifier */

static bool hmm_test_invalidate(struct mmu_interval_notifier *notifier,
				const struct mmu_notifier_range *range,
				unsigned long seq)
{
	struct hmm_fixture *t = container_of(notifier, struct hmm_fixture, notifier);

	mutex_lock(&t->device);
	mmu_interval_set_seq(notifier, seq);
	mutex_unlock(&t->device);
	t->invalidations++;
	if (t->on_invalidate)
		t->on_invalidate(t);
	if (t->pause) {
		complete(&t->entered);
		schedule_timeout_uninterruptible(t->pause);
	}
	return true;
}

static const struct mmu_interval_notifier_ops hmm_test_notifier_ops = {
	.invalidate = hmm_test_invalidate,
};

/* Mappings */

static void hmm_watch(struct hmm_fixture *t)
{
	int ret;

	KUNIT_ASSERT_GE(t->test, t->start, PAGE_SIZE);
	ret = mmu_interval_notifier_insert(&t->notifier, t->mm, t->start - PAGE_SIZE,
					   (t->npages + 2) << PAGE_SHIFT,
					   &hmm_test_notifier_ops);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
}

static void hmm_free_elements(void *elements)
{
	kvfree(elements);
}

static void hmm_alloc_elements(struct hmm_fixture *t)
{
	int ret;

	t->elements = kvcalloc(t->npages, sizeof(*t->elements), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(t->test, t->elements);
	ret = kunit_add_action_or_reset(t->test, hmm_free_elements, t->elements);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
}

static void hmm_map(struct hmm_fixture *t, unsigned long start, struct file *file,
		    unsigned long prot, unsigned long flags)
{
	unsigned long size = t->npages << PAGE_SHIFT;

	if (t->npages > HMM_PAGES)
		hmm_alloc_elements(t);
	t->start = kunit_vm_mmap(t->test, file, start, size, prot, flags, 0);
	KUNIT_ASSERT_FALSE(t->test, !t->start || IS_ERR_VALUE(t->start));
	t->mm = current->mm;
	hmm_watch(t);
}

void hmm_map_anon(struct hmm_fixture *t, unsigned long prot)
{
	hmm_map(t, HMM_START, NULL, prot, MAP_PRIVATE | MAP_ANONYMOUS);
}

/* Map memory that is @distance bytes behind the only memory that has page tables. */
void hmm_map_anon_far(struct hmm_fixture *t, unsigned long distance, unsigned long prot)
{
	unsigned long start = HMM_START + distance, near;
	const unsigned long flags = MAP_PRIVATE | MAP_ANONYMOUS;
	char byte = 0;

	near = kunit_vm_mmap(t->test, NULL, HMM_START, PAGE_SIZE, prot, flags, 0);
	KUNIT_ASSERT_EQ(t->test, near, HMM_START);
	KUNIT_ASSERT_EQ(t->test, copy_to_user((void __user *)near, &byte, 1), 0);
	hmm_map(t, start, NULL, prot, flags);
	KUNIT_ASSERT_EQ(t->test, t->start, start);
}

vm_fault_t hmm_handler_map(struct vm_fault *vmf)
{
	vmf->page = alloc_page(GFP_HIGHUSER | __GFP_ZERO);
	return vmf->page ? 0 : VM_FAULT_OOM;
}

/* The walk holds no lock across a fault but the one that faults need. */
static void hmm_expect_only_mmap_lock(struct hmm_fixture *t)
{
	might_sleep();
	KUNIT_EXPECT_EQ(t->test, preempt_count(), 0);
	if (t->asking && debug_locks)
		KUNIT_EXPECT_EQ(t->test, lockdep_depth(current),
				t->locks + IS_ENABLED(CONFIG_LOCKDEP));
}

static vm_fault_t hmm_handler_fault(struct vm_fault *vmf)
{
	struct hmm_fixture *t = vmf->vma->vm_private_data;
	unsigned long page = (vmf->address - t->start) >> PAGE_SHIFT;

	hmm_expect_only_mmap_lock(t);
	t->handled++;
	if (page < HMM_PAGES)
		t->faults[page]++;
	return t->handle ? t->handle(t, vmf, page) : hmm_handler_map(vmf);
}

static const struct vm_operations_struct hmm_handler_vm_ops = {
	.fault = hmm_handler_fault,
};

/* To have this is to say that the lock of the VMA is enough for faults. */
static vm_fault_t hmm_handler_map_none(struct vm_fault *vmf, pgoff_t first, pgoff_t last)
{
	return 0;
}

static const struct vm_operations_struct hmm_handler_by_vma_ops = {
	.fault		= hmm_handler_fault,
	.map_pages	= hmm_handler_map_none,
};

static int hmm_handler_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct hmm_fixture *t = file->private_data;

	vma->vm_ops = t->by_vma ? &hmm_handler_by_vma_ops : &hmm_handler_vm_ops;
	vma->vm_private_data = t;
	return 0;
}

static const struct file_operations hmm_handler_fops = {
	.mmap = hmm_handler_mmap,
};

/* Map memory whose faults @t->handle decides and @t->faults counts. */
void hmm_map_handler(struct hmm_fixture *t)
{
	struct file *file;

	file = anon_inode_create_getfile("[hmm_kunit]", &hmm_handler_fops, t,
					 O_RDWR, NULL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(t->test, file);
	t->file = file;
	hmm_map(t, HMM_START, file, PROT_READ | PROT_WRITE, MAP_SHARED);
}

/* Take pages out of a mapping with a handler, as a truncation would. */
void hmm_zap(struct hmm_fixture *t, unsigned long page, unsigned long npages)
{
	unmap_mapping_range(t->file->f_mapping, (loff_t)page << PAGE_SHIFT,
			    (loff_t)npages << PAGE_SHIFT, 1);
}

/* What the CPU sees */

bool hmm_readable(const struct hmm_fixture *t, unsigned long page)
{
	const void __user *from = (void __user *)hmm_addr(t, page);
	char byte;

	return !copy_from_user_nofault(&byte, from, sizeof(byte));
}

bool hmm_writable(const struct hmm_fixture *t, unsigned long page)
{
	void __user *to = (void __user *)hmm_addr(t, page);
	char byte = 0;

	return !copy_to_user_nofault(to, &byte, sizeof(byte));
}

unsigned long hmm_count(const struct hmm_fixture *t,
			bool (*is)(const struct hmm_fixture *t, unsigned long page))
{
	unsigned long page, count = 0;

	for (page = 0; page < HMM_PAGES; page++)
		count += is(t, page);
	return count;
}

/* Have the CPU write, or only read, each page of [@page, @page + @npages). */
void hmm_touch(struct hmm_fixture *t, unsigned long page, unsigned long npages,
	       bool write)
{
	unsigned long end = page + npages;
	char byte = 0;

	for (; page < end; page++) {
		void __user *at = (void __user *)hmm_addr(t, page);
		unsigned long left;

		left = write ? copy_to_user(at, &byte, 1) : copy_from_user(&byte, at, 1);
		KUNIT_ASSERT_EQ(t->test, left, 0);
	}
}

struct page *hmm_cpu_page(struct hmm_fixture *t, unsigned long page)
{
	struct page *found;

	KUNIT_ASSERT_EQ(t->test, 1, get_user_pages_unlocked(hmm_addr(t, page), 1, &found, 0));
	put_page(found);
	return found;
}

/* Asking */

/* Prepare to ask for @npages pages from @page on, with elements of zero. */
void hmm_ask(struct hmm_fixture *t, unsigned long page, unsigned long npages)
{
	memset(t->pfns, 0, sizeof(t->pfns));
	if (t->elements)
		memset(t->elements, 0, t->npages * sizeof(*t->elements));
	t->range = (struct hmm_range) {
		.notifier	= &t->notifier,
		.start		= hmm_addr(t, page),
		.end		= hmm_addr(t, page + npages),
		.hmm_pfns	= t->elements ?: t->pfns,
	};
}

int hmm_answer(struct hmm_fixture *t)
{
	t->range.notifier_seq = mmu_interval_read_begin(&t->notifier);
	return t->call->fault(&t->range);
}

/*
 * As a driver does: start over, with the requests filled in again, for as long
 * as the range is invalidated.
 */
int hmm_answer_retry(struct hmm_fixture *t)
{
	int ret, tries = 0;

	memcpy(t->asked, t->pfns, sizeof(t->pfns));
	do {
		memcpy(t->pfns, t->asked, sizeof(t->pfns));
		ret = hmm_answer(t);
	} while (ret == -EBUSY && ++tries < 100);
	return ret;
}

/* Ask for all of the mapping with one request. */
int hmm_request_all(struct hmm_fixture *t, unsigned long request)
{
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = request;
	return hmm_answer_retry(t);
}

void hmm_expect_flags(struct hmm_fixture *t, unsigned long i, unsigned long n,
		      unsigned long flags)
{
	unsigned long end = i + n;

	for (; i < end; i++)
		if (hmm_flags(t, i) != flags)
			break;
	KUNIT_EXPECT_EQ_MSG(t->test, i, end, "element %lu is %#lx, not %#lx", i,
			    t->pfns[i], flags);
}

/* Elements that were all HMM_UNTOUCHED. */
void hmm_expect_untouched(struct hmm_fixture *t, unsigned long i, unsigned long n)
{
	unsigned long end = i + n;

	for (; i < end; i++)
		KUNIT_ASSERT_EQ(t->test, t->pfns[i], HMM_UNTOUCHED);
}

int hmm_test_init(struct kunit *test)
{
	struct hmm_fixture *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);

	if (!t)
		return -ENOMEM;
	t->test = test;
	t->call = test->param_value;
	t->npages = HMM_PAGES;
	init_completion(&t->entered);
	init_completion(&t->over);
	mutex_init(&t->device);
	test->priv = t;
	return 0;
}

void hmm_test_exit(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	if (!t)
		return;
	if (t->other.func)
		flush_work(&t->other);
	if (t->notifier.mm)
		mmu_interval_notifier_remove(&t->notifier);
	if (t->file)
		fput(t->file);
}
