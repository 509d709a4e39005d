// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(), on real page tables of base pages
 *
 * A test maps memory in an address space of its own, asks for it as a driver
 * would, and compares both what was stored and what became of the memory. The
 * latter is seen as the CPU sees it, by accesses that do not fault, or counted
 * by a fault handler of the test's own: HMM is never asked about itself.
 *
 * Everything used here is exported, so that the suite can be a module. Every
 * case runs with both calls, see hmm_calls.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/anon_inodes.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/huge_mm.h>
#include <linux/jiffies.h>
#include <linux/lockdep.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/prandom.h>
#include <linux/sched/mm.h>
#include <linux/uaccess.h>

/* More than one page table, wherever the mapping begins. */
#define HMM_PAGES	1024
#define HMM_SIZE	(HMM_PAGES << PAGE_SHIFT)

#define HMM_READ	HMM_PFN_REQ_FAULT
#define HMM_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* What no walk stores: an input that has to be found as it was left. */
#define HMM_UNTOUCHED	(0x5aUL | HMM_STICKY)

static uint seed;
module_param(seed, uint, 0644);
MODULE_PARM_DESC(seed, "of random cases; 0 for a new one each time");

struct hmm_call {
	const char *name;
	int (*fault)(struct hmm_range *range);
	bool locked;
};

/* Enough for faults to take away what lies before, around and behind them. */
#define HMM_PLAN_PAGES	64

/**
 * struct hmm_plan - what else the first fault of a page does
 * @page: the first page that it takes away
 * @npages: how many those are
 * @drop: whether it drops the mmap lock, if it may, before it does its work
 */
struct hmm_plan {
	unsigned long page;
	unsigned long npages;
	bool drop;
};

/**
 * struct hmm_fixture - what a case works with
 * @test: the running test
 * @call: which of the two calls is tested
 * @mm: the address space, the test thread's own
 * @notifier: covers the mapping, and the page before and after it
 * @invalidations: how often @notifier was told
 * @start: where the mapping begins
 * @range: what is handed to the call
 * @pfns: its elements
 * @asked: what they were before the call, to ask again
 * @file: what is mapped by hmm_map_handler()
 * @handle: decides a fault; NULL maps a new page
 * @faults: how often each page was faulted, in a mapping with a handler
 * @plan: what faults do besides, for hmm_handle_plan()
 * @due: how often each page has to be faulted, in all
 * @sticky: the sticky bits that each element has to have in the end
 * @until: when handlers that fight the walk are to stop, in jiffies
 * @asking: the call is running
 * @locks: how many locks were held when it began
 */
struct hmm_fixture {
	struct kunit *test;
	const struct hmm_call *call;
	struct mm_struct *mm;
	struct mmu_interval_notifier notifier;
	unsigned int invalidations;
	unsigned long start;
	struct hmm_range range;
	unsigned long pfns[HMM_PAGES];
	unsigned long asked[HMM_PAGES];
	struct file *file;
	vm_fault_t (*handle)(struct hmm_fixture *t, struct vm_fault *vmf,
			     unsigned long page);
	unsigned int faults[HMM_PAGES];
	struct hmm_plan plan[HMM_PLAN_PAGES];
	unsigned int due[HMM_PLAN_PAGES];
	unsigned long sticky[HMM_PLAN_PAGES];
	unsigned long until;
	bool asking;
	int locks;
};

/* The two calls */

/* Faults look at this, to see what the walk holds. */
static void hmm_begin(struct hmm_fixture *t)
{
	t->locks = lockdep_depth(current);
	t->asking = true;
}

/* The call gives back the locks that it takes, but that of the caller. */
static void hmm_end(struct hmm_fixture *t)
{
	t->asking = false;
	KUNIT_EXPECT_EQ(t->test, lockdep_depth(current), t->locks);
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
static int hmm_call_timeout(struct hmm_range *range, unsigned long timeout)
{
	struct hmm_fixture *t = container_of(range, struct hmm_fixture, range);
	int ret, users = atomic_read(&t->mm->mm_users);

	hmm_begin(t);
	ret = hmm_range_fault_unlocked_timeout(range, timeout);
	hmm_end(t);

	KUNIT_EXPECT_EQ(t->test, atomic_read(&t->mm->mm_users), users);
	KUNIT_EXPECT_FALSE(t->test, rwsem_is_locked(&t->mm->mmap_lock));
	return ret;
}

static int hmm_call_unlocked(struct hmm_range *range)
{
	return hmm_call_timeout(range, 0);
}

enum { HMM_CALL_LOCKED, HMM_CALL_UNLOCKED };

static const struct hmm_call hmm_calls[] = {
	[HMM_CALL_LOCKED] = { "locked", hmm_call_locked, true },
	[HMM_CALL_UNLOCKED] = { "unlocked", hmm_call_unlocked, false },
};

KUNIT_ARRAY_PARAM_DESC(hmm_call, hmm_calls, name);

/* The notifier */

static bool hmm_test_invalidate(struct mmu_interval_notifier *notifier,
				const struct mmu_notifier_range *range,
				unsigned long seq)
{
	struct hmm_fixture *t = container_of(notifier, struct hmm_fixture, notifier);

	mmu_interval_set_seq(notifier, seq);
	t->invalidations++;
	return true;
}

static const struct mmu_interval_notifier_ops hmm_test_notifier_ops = {
	.invalidate = hmm_test_invalidate,
};

/* Mappings */

static unsigned long hmm_addr(const struct hmm_fixture *t, unsigned long page)
{
	return t->start + (page << PAGE_SHIFT);
}

static void hmm_watch(struct hmm_fixture *t)
{
	int ret;

	KUNIT_ASSERT_GE(t->test, t->start, PAGE_SIZE);
	ret = mmu_interval_notifier_insert(&t->notifier, t->mm, t->start - PAGE_SIZE,
					   HMM_SIZE + 2 * PAGE_SIZE,
					   &hmm_test_notifier_ops);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
}

static void hmm_map(struct hmm_fixture *t, struct file *file, unsigned long prot,
		    unsigned long flags)
{
	t->start = kunit_vm_mmap(t->test, file, 0, HMM_SIZE, prot, flags, 0);
	KUNIT_ASSERT_FALSE(t->test, !t->start || IS_ERR_VALUE(t->start));
	t->mm = current->mm;
	hmm_watch(t);
}

static void hmm_map_anon(struct hmm_fixture *t, unsigned long prot)
{
	hmm_map(t, NULL, prot, MAP_PRIVATE | MAP_ANONYMOUS);
}

static vm_fault_t hmm_handler_map(struct vm_fault *vmf)
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
	t->faults[page]++;
	return t->handle ? t->handle(t, vmf, page) : hmm_handler_map(vmf);
}

static const struct vm_operations_struct hmm_handler_vm_ops = {
	.fault = hmm_handler_fault,
};

static int hmm_handler_mmap(struct file *file, struct vm_area_struct *vma)
{
	vma->vm_ops = &hmm_handler_vm_ops;
	vma->vm_private_data = file->private_data;
	return 0;
}

static const struct file_operations hmm_handler_fops = {
	.mmap = hmm_handler_mmap,
};

/* Map memory whose faults @t->handle decides and @t->faults counts. */
static void hmm_map_handler(struct hmm_fixture *t)
{
	struct file *file;

	file = anon_inode_create_getfile("[hmm_kunit]", &hmm_handler_fops, t,
					 O_RDWR, NULL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(t->test, file);
	t->file = file;
	hmm_map(t, file, PROT_READ | PROT_WRITE, MAP_SHARED);
}

/* Take pages out of a mapping with a handler, as a truncation would. */
static void hmm_zap(struct hmm_fixture *t, unsigned long page, unsigned long npages)
{
	unmap_mapping_range(t->file->f_mapping, (loff_t)page << PAGE_SHIFT,
			    (loff_t)npages << PAGE_SHIFT, 1);
}

/* What the CPU sees */

static bool hmm_readable(const struct hmm_fixture *t, unsigned long page)
{
	const void __user *from = (void __user *)hmm_addr(t, page);
	char byte;

	return !copy_from_user_nofault(&byte, from, sizeof(byte));
}

static bool hmm_writable(const struct hmm_fixture *t, unsigned long page)
{
	void __user *to = (void __user *)hmm_addr(t, page);
	char byte = 0;

	return !copy_to_user_nofault(to, &byte, sizeof(byte));
}

static unsigned long hmm_count(const struct hmm_fixture *t,
			       bool (*is)(const struct hmm_fixture *t, unsigned long page))
{
	unsigned long page, count = 0;

	for (page = 0; page < HMM_PAGES; page++)
		count += is(t, page);
	return count;
}

/* Have the CPU write, or only read, each page of [@page, @page + @npages). */
static void hmm_touch(struct hmm_fixture *t, unsigned long page,
		      unsigned long npages, bool write)
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

static struct page *hmm_cpu_page(struct hmm_fixture *t, unsigned long page)
{
	struct page *found;

	KUNIT_ASSERT_EQ(t->test, 1, get_user_pages_unlocked(hmm_addr(t, page), 1, &found, 0));
	put_page(found);
	return found;
}

/* Asking */

/* Prepare to ask for @npages pages from @page on, with elements of zero. */
static void hmm_ask(struct hmm_fixture *t, unsigned long page, unsigned long npages)
{
	memset(t->pfns, 0, sizeof(t->pfns));
	t->range = (struct hmm_range) {
		.notifier	= &t->notifier,
		.start		= hmm_addr(t, page),
		.end		= hmm_addr(t, page + npages),
		.hmm_pfns	= t->pfns,
	};
}

static int hmm_answer(struct hmm_fixture *t)
{
	t->range.notifier_seq = mmu_interval_read_begin(&t->notifier);
	return t->call->fault(&t->range);
}

/*
 * As a driver does: start over, with the requests filled in again, for as long
 * as the range is invalidated.
 */
static int hmm_answer_retry(struct hmm_fixture *t)
{
	int ret, tries = 0;

	memcpy(t->asked, t->pfns, sizeof(t->pfns));
	do {
		memcpy(t->pfns, t->asked, sizeof(t->pfns));
		ret = hmm_answer(t);
	} while (ret == -EBUSY && ++tries < 10);
	return ret;
}

/* Ask for all of the mapping with one request. */
static int hmm_request_all(struct hmm_fixture *t, unsigned long request)
{
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = request;
	return hmm_answer_retry(t);
}

static unsigned long hmm_flags(const struct hmm_fixture *t, unsigned long i)
{
	return t->pfns[i] & HMM_PFN_FLAGS;
}

static void hmm_expect_flags(struct hmm_fixture *t, unsigned long i, unsigned long n,
			     unsigned long flags)
{
	unsigned long end = i + n;

	for (; i < end; i++)
		if (hmm_flags(t, i) != flags)
			break;
	KUNIT_EXPECT_EQ_MSG(t->test, i, end, "element %lu is %#lx, not %#lx", i,
			    t->pfns[i], flags);
}

/* Looking, without a request */

static void hmm_test_snapshot_empty(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, 0), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, 0);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 0);
}

static void hmm_test_snapshot_populated(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, true);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, 0), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_PTR_EQ(test, hmm_pfn_to_page(t->pfns[i]), hmm_cpu_page(t, i));
	KUNIT_EXPECT_EQ(test, hmm_pfn_to_phys(t->pfns[7]), page_to_phys(hmm_cpu_page(t, 7)));
	KUNIT_EXPECT_EQ(test, hmm_pfn_to_map_order(t->pfns[7]), 0);
}

static void hmm_test_snapshot_zero_page(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, false);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, 0), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID);
	KUNIT_EXPECT_TRUE(test, is_zero_pfn(t->pfns[3] & ~HMM_PFN_FLAGS));
}

/* A range that begins and ends inside of page tables, with holes of its own. */
static void hmm_test_snapshot_part(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 100, 50, true);
	hmm_touch(t, 700, 1, false);
	hmm_ask(t, 99, 602);
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	hmm_expect_flags(t, 0, 1, 0);
	hmm_expect_flags(t, 1, 50, HMM_PFN_VALID | HMM_PFN_WRITE);
	hmm_expect_flags(t, 51, 550, 0);
	hmm_expect_flags(t, 601, 1, HMM_PFN_VALID);
	KUNIT_EXPECT_PTR_EQ(test, hmm_pfn_to_page(t->pfns[1]), hmm_cpu_page(t, 100));
	KUNIT_EXPECT_EQ(test, t->pfns[602], 0);
}

/* Requests */

static void hmm_test_read_request(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_READ), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), HMM_PAGES);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 0);
}

static void hmm_test_write_request(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_WRITE), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), HMM_PAGES);
}

/* Writes to pages that only map the zero page invalidate them as they go. */
static void hmm_test_write_after_read(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, false);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_WRITE), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_GE(test, t->invalidations, HMM_PAGES);
}

static void hmm_test_met_request(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	hmm_touch(t, 0, HMM_PAGES, true);
	memset(t->faults, 0, sizeof(t->faults));
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_WRITE), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_NULL(test, memchr_inv(t->faults, 0, sizeof(t->faults)));
}

/* A write that is not also a fault asks for nothing. */
static void hmm_test_write_without_fault(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_PFN_REQ_WRITE), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, 0);

	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_PFN_REQ_WRITE, HMM_PAGES);
	t->range.pfn_flags_mask = ~0UL;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, 0);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 0);
}

/* An element counts only where the mask lets it through. */
static void hmm_test_masked_requests(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_WRITE, HMM_PAGES);
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 0);

	memset_l(t->pfns, HMM_WRITE, HMM_PAGES);
	t->range.pfn_flags_mask = HMM_PFN_REQ_FAULT;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 0);
}

/* The defaults add to what elements ask for. */
static void hmm_test_default_and_mask(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	t->pfns[700] = HMM_PFN_REQ_WRITE;
	t->range.default_flags = HMM_PFN_REQ_FAULT;
	t->range.pfn_flags_mask = HMM_PFN_REQ_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	hmm_expect_flags(t, 0, 700, HMM_PFN_VALID);
	hmm_expect_flags(t, 700, 1, HMM_PFN_VALID | HMM_PFN_WRITE);
	hmm_expect_flags(t, 701, HMM_PAGES - 701, HMM_PFN_VALID);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 1);
}

/* Exactness */

static void hmm_test_every_second_page(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	for (i = 0; i < HMM_PAGES; i += 2)
		t->pfns[i] = HMM_READ;
	t->range.pfn_flags_mask = HMM_READ;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	for (i = 0; i < HMM_PAGES; i++) {
		KUNIT_ASSERT_EQ(test, hmm_readable(t, i), !(i & 1));
		KUNIT_ASSERT_EQ(test, hmm_flags(t, i), i & 1 ? 0 : HMM_PFN_VALID);
	}
}

static void hmm_test_one_write_in_512(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, false);
	hmm_ask(t, 0, 512);
	t->pfns[300] = HMM_WRITE;
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 1);
	KUNIT_EXPECT_TRUE(test, hmm_writable(t, 300));
}

static void hmm_test_one_fault_a_page(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;

	hmm_map_handler(t);
	hmm_ask(t, 0, HMM_PAGES);
	for (i = 0; i < HMM_PAGES; i++)
		t->pfns[i] = i % 3 ? HMM_WRITE : 0;
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->faults[i], i % 3 ? 1 : 0);
}

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
/* Huge pages */

#define HMM_HUGE	(HMM_PFN_VALID | HMM_PFN_WRITE |		\
			 (unsigned long)PMD_ORDER << HMM_PFN_ORDER_SHIFT)

/* Map memory that gets huge pages. Return: the first page of one. */
static unsigned long hmm_map_huge(struct hmm_fixture *t)
{
	struct vm_area_struct *vma;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_GE(t->test, HMM_SIZE, 2 * PMD_SIZE - PAGE_SIZE);
	mmap_write_lock(t->mm);
	vma = find_vma(t->mm, t->start);
	vm_flags_set(vma, VM_HUGEPAGE);
	mmap_write_unlock(t->mm);
	return (ALIGN(t->start, PMD_SIZE) - t->start) >> PAGE_SHIFT;
}

/* All of @n outputs are of one huge page, which maps page @page first. */
static void hmm_expect_huge(struct hmm_fixture *t, unsigned long page, unsigned long n)
{
	unsigned long i;

	hmm_expect_flags(t, 0, n, HMM_HUGE);
	for (i = 0; i < n; i++)
		KUNIT_ASSERT_PTR_EQ(t->test, hmm_pfn_to_page(t->pfns[i]),
				    hmm_cpu_page(t, page + i));
}

/* The one page that is to be written is not the first of the huge zero page. */
static void hmm_test_huge_request_inside(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long page = hmm_map_huge(t);

	hmm_touch(t, page, 1, false);
	hmm_ask(t, page, HPAGE_PMD_NR);
	t->pfns[7] = HMM_WRITE;
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	hmm_expect_huge(t, page, HPAGE_PMD_NR);
}

/* Page 107 brings a huge page, which maps those before it in the range, too. */
static void hmm_test_huge_fault_inside(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long page = hmm_map_huge(t);

	hmm_ask(t, page + 100, 300);
	t->pfns[7] = HMM_WRITE;
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	hmm_expect_huge(t, page + 100, 300);
}
#endif /* CONFIG_TRANSPARENT_HUGEPAGE */

/* Errors */

static void hmm_test_read_only_vma(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_WRITE), -EPERM);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 0);

	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_READ), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_WRITE), -EPERM);
}

static void hmm_test_no_access_vma(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_NONE);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, 0), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_ERROR);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_READ), -EFAULT);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_WRITE), -EFAULT);
}

static void hmm_test_no_vma(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 400), 200 << PAGE_SHIFT), 0);
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, 0), 0);
	hmm_expect_flags(t, 0, 400, 0);
	hmm_expect_flags(t, 400, 200, HMM_PFN_ERROR);
	hmm_expect_flags(t, 600, HMM_PAGES - 600, 0);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_READ), -EFAULT);
	KUNIT_EXPECT_EQ(test, hmm_request_all(t, HMM_WRITE), -EFAULT);
}

/* A hole is no error to a caller who asks for the pages around it. */
static void hmm_test_request_around_hole(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 400), 200 << PAGE_SHIFT), 0);
	hmm_ask(t, 0, HMM_PAGES);
	for (i = 0; i < HMM_PAGES; i++)
		t->pfns[i] = i < 400 || i >= 600 ? HMM_WRITE : 0;
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	hmm_expect_flags(t, 0, 400, HMM_PFN_VALID | HMM_PFN_WRITE);
	hmm_expect_flags(t, 400, 200, HMM_PFN_ERROR);
	hmm_expect_flags(t, 600, HMM_PAGES - 600, HMM_PFN_VALID | HMM_PFN_WRITE);
}

static vm_fault_t hmm_handle_sigbus(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	return page == 700 ? VM_FAULT_SIGBUS : hmm_handler_map(vmf);
}

static vm_fault_t hmm_handle_hwpoison(struct hmm_fixture *t, struct vm_fault *vmf,
				      unsigned long page)
{
	return page == 700 ? VM_FAULT_HWPOISON : hmm_handler_map(vmf);
}

static vm_fault_t hmm_handle_oom(struct hmm_fixture *t, struct vm_fault *vmf,
				 unsigned long page)
{
	return page == 700 ? VM_FAULT_OOM : hmm_handler_map(vmf);
}

/* The failing page is faulted once, and nothing behind it is looked at. */
static void hmm_expect_fault_error(struct hmm_fixture *t, int err)
{
	unsigned long i;

	memset(t->faults, 0, sizeof(t->faults));
	hmm_zap(t, 0, HMM_PAGES);
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_UNTOUCHED, HMM_PAGES);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(t->test, hmm_answer(t), err);

	hmm_expect_flags(t, 0, 700, HMM_PFN_VALID | HMM_PFN_WRITE | HMM_STICKY);
	for (i = 700; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(t->test, t->pfns[i], HMM_UNTOUCHED);
	KUNIT_EXPECT_EQ(t->test, t->faults[700], 1);
	KUNIT_EXPECT_EQ(t->test, t->faults[701], 0);
}

static void hmm_test_fault_errors(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_sigbus;
	hmm_expect_fault_error(t, -EFAULT);
	t->handle = hmm_handle_hwpoison;
	hmm_expect_fault_error(t, -EFAULT);
	t->handle = hmm_handle_oom;
	hmm_expect_fault_error(t, -ENOMEM);
}

/* Refused before anything else is done: the sequence is stale, too. */
static void hmm_expect_refused(struct hmm_fixture *t)
{
	t->pfns[0] = HMM_UNTOUCHED;
	t->range.pfn_flags_mask = HMM_WRITE;
	t->range.notifier_seq = mmu_interval_read_begin(&t->notifier) - 1;
	KUNIT_EXPECT_EQ(t->test, t->call->fault(&t->range), -EINVAL);
	KUNIT_EXPECT_EQ(t->test, t->pfns[0], HMM_UNTOUCHED);
	hmm_ask(t, 0, HMM_PAGES);
}

static void hmm_test_arguments(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);

	t->range.end = t->range.start;
	hmm_expect_refused(t);
	swap(t->range.start, t->range.end);
	hmm_expect_refused(t);
	t->range.start++;
	hmm_expect_refused(t);
	t->range.end--;
	hmm_expect_refused(t);
	t->range.start -= 2 * PAGE_SIZE;
	hmm_expect_refused(t);
	t->range.end += 2 * PAGE_SIZE;
	hmm_expect_refused(t);
	t->range.hmm_pfns = NULL;
	hmm_expect_refused(t);

	/* The notifier covers one page more at each side. */
	t->range.end += PAGE_SIZE;
	t->range.start = t->range.end - PAGE_SIZE;
	KUNIT_EXPECT_EQ(test, hmm_answer(t), 0);
	t->range.start = t->start - PAGE_SIZE;
	t->range.end = t->start;
	KUNIT_EXPECT_EQ(test, hmm_answer(t), 0);
}

static void hmm_test_no_notifier(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	t->range.notifier = NULL;
	if (t->call->locked)
		KUNIT_EXPECT_EQ(test, hmm_range_fault(&t->range), -EINVAL);
	else
		KUNIT_EXPECT_EQ(test, hmm_range_fault_unlocked_timeout(&t->range, 0), -EINVAL);
}

/* Sticky bits */

static void hmm_test_sticky_bits(struct kunit *test)
{
	static const unsigned long bits[] = {
		HMM_PFN_DMA_MAPPED, HMM_PFN_P2PDMA, HMM_PFN_P2PDMA_BUS, HMM_STICKY,
	};
	struct hmm_fixture *t = test->priv;
	unsigned long i, b, want;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 1000), 1 << PAGE_SHIFT), 0);
	hmm_touch(t, 0, 300, true);

	for (b = 0; b < ARRAY_SIZE(bits); b++) {
		hmm_ask(t, 0, HMM_PAGES);
		for (i = 0; i < HMM_PAGES; i++)
			t->pfns[i] = bits[b] | HMM_PFN_ERROR;
		t->pfns[500] |= HMM_READ;
		t->range.pfn_flags_mask = HMM_WRITE;
		KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
		for (i = 0; i < HMM_PAGES; i++) {
			want = i < 300 ? HMM_PFN_VALID | HMM_PFN_WRITE : 0;
			want = i == 500 ? HMM_PFN_VALID : want;
			want = i == 1000 ? HMM_PFN_ERROR : want;
			KUNIT_ASSERT_EQ(test, hmm_flags(t, i), want | bits[b]);
		}
	}
}

static void hmm_test_sticky_bits_on_error(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 600), 1 << PAGE_SHIFT), 0);
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_UNTOUCHED, HMM_PAGES);
	t->range.default_flags = HMM_READ;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), -EFAULT);
	hmm_expect_flags(t, 0, 600, HMM_PFN_VALID | HMM_STICKY);
	for (i = 600; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->pfns[i], HMM_UNTOUCHED);
}

/* Invalidations and restarts */

static void hmm_test_stale_sequence(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, true);
	hmm_ask(t, 0, HMM_PAGES);
	t->pfns[0] = HMM_UNTOUCHED;
	t->range.notifier_seq = mmu_interval_read_begin(&t->notifier);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 1023), PAGE_SIZE), 0);

	if (t->call->locked) {
		KUNIT_EXPECT_EQ(test, t->call->fault(&t->range), -EBUSY);
		KUNIT_EXPECT_EQ(test, t->pfns[0], HMM_UNTOUCHED);
		return;
	}
	/* The other call takes a sequence of its own and returns it. */
	KUNIT_EXPECT_EQ(test, t->call->fault(&t->range), 0);
	KUNIT_EXPECT_FALSE(test, mmu_interval_read_retry(&t->notifier, t->range.notifier_seq));
	hmm_expect_flags(t, 1023, 1, HMM_PFN_ERROR);
}

/*
 * The first fault of page 600 takes others away, far from it and just before
 * it. A driver that has mapped page 5 for DMA would then undo that.
 */
static vm_fault_t hmm_handle_zap(struct hmm_fixture *t, struct vm_fault *vmf,
				 unsigned long page)
{
	if (page == 600 && t->faults[600] == 1) {
		hmm_zap(t, 0, 10);
		hmm_zap(t, 590, 10);
		t->pfns[5] &= ~HMM_STICKY;
	}
	return hmm_handler_map(vmf);
}

/*
 * Pages were stored as present, then invalidated. Of those only page 5 was
 * requested: whether the walk goes on or begins again, the outputs of the
 * others must not be taken for requests.
 */
static void hmm_test_restart_keeps_requests(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;
	int ret;

	hmm_map_handler(t);
	hmm_touch(t, 0, 10, true);
	hmm_touch(t, 590, 10, true);
	memset(t->faults, 0, sizeof(t->faults));
	t->handle = hmm_handle_zap;
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_STICKY, HMM_PAGES);
	t->pfns[5] |= HMM_READ;
	t->pfns[600] |= HMM_READ;
	t->range.pfn_flags_mask = HMM_WRITE;
	ret = hmm_answer(t);

	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->pfns[i] & HMM_STICKY, i == 5 ? 0 : HMM_STICKY);
	if (t->call->locked) {
		KUNIT_EXPECT_EQ(test, ret, -EBUSY);
		KUNIT_EXPECT_EQ(test, t->faults[599], 0);
		return;
	}
	KUNIT_ASSERT_EQ(test, ret, 0);
	for (i = 0; i < HMM_PAGES; i++) {
		KUNIT_ASSERT_EQ(test, t->faults[i], i == 5 || i == 600);
		KUNIT_ASSERT_EQ(test, !!(t->pfns[i] & HMM_PFN_VALID), i == 5 || i == 600);
	}
}

/* Every first fault of a page waits without the lock, as userfaultfd does. */
static vm_fault_t hmm_handle_unlock(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	bool may_drop = vmf->flags & FAULT_FLAG_ALLOW_RETRY;
	bool tried = vmf->flags & FAULT_FLAG_TRIED;

	KUNIT_EXPECT_EQ(t->test, may_drop, !t->call->locked);
	KUNIT_EXPECT_EQ(t->test, tried, t->faults[page] > 1);
	if (t->faults[page] > 1)
		return hmm_handler_map(vmf);
	if (!may_drop || t->call->locked)
		return VM_FAULT_SIGBUS;
	mmap_read_unlock(vmf->vma->vm_mm);
	return VM_FAULT_RETRY;
}

static void hmm_test_dropped_lock(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i;
	int ret;

	hmm_map_handler(t);
	t->handle = hmm_handle_unlock;
	hmm_ask(t, 0, HMM_PAGES);
	for (i = 0; i < HMM_PAGES; i++)
		t->pfns[i] = i & 1 ? HMM_WRITE : 0;
	t->range.pfn_flags_mask = HMM_WRITE;
	ret = hmm_answer(t);

	if (t->call->locked) {
		KUNIT_EXPECT_EQ(test, ret, -EFAULT);
		return;
	}
	KUNIT_ASSERT_EQ(test, ret, 0);
	for (i = 0; i < HMM_PAGES; i++) {
		KUNIT_ASSERT_EQ(test, t->faults[i], i & 1 ? 2 : 0);
		KUNIT_ASSERT_EQ(test, hmm_flags(t, i),
				i & 1 ? HMM_PFN_VALID | HMM_PFN_WRITE : 0);
	}
}

/* Every fault takes away the page behind it, for three times. */
static vm_fault_t hmm_handle_fight(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	if (page && t->faults[page] <= 3)
		hmm_zap(t, page - 1, 1);
	return hmm_handler_map(vmf);
}

static void hmm_test_repeated_invalidation(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_fight;
	KUNIT_ASSERT_EQ(test, hmm_request_all(t, HMM_WRITE), 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_FALSE(test, mmu_interval_read_retry(&t->notifier, t->range.notifier_seq));
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), HMM_PAGES);
}

/* A driver that had mapped the page for DMA undoes that when it goes. */
static void hmm_plan_zap(struct hmm_fixture *t, const struct hmm_plan *plan)
{
	unsigned long i;

	for (i = plan->page; i < plan->page + plan->npages; i++) {
		if (hmm_readable(t, i) && (t->asked[i] & HMM_READ))
			t->due[i]++;
		if (!t->call->locked) {
			t->pfns[i] &= ~HMM_PFN_DMA_MAPPED;
			t->sticky[i] &= ~HMM_PFN_DMA_MAPPED;
		}
	}
	hmm_zap(t, plan->page, plan->npages);
}

static vm_fault_t hmm_handle_plan(struct hmm_fixture *t, struct vm_fault *vmf,
				  unsigned long page)
{
	const struct hmm_plan *plan = &t->plan[page];

	if (t->faults[page] == 1 && plan->npages)
		hmm_plan_zap(t, plan);
	if (t->faults[page] != 1 || !plan->drop || !(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return hmm_handler_map(vmf);
	t->due[page]++;
	mmap_read_unlock(vmf->vma->vm_mm);
	return VM_FAULT_RETRY;
}

/* Some pages are there, some are asked for, and some faults disturb others. */
static void hmm_make_plan(struct hmm_fixture *t, struct rnd_state *rnd)
{
	unsigned long i;

	hmm_zap(t, 0, HMM_PLAN_PAGES);
	hmm_ask(t, 0, HMM_PLAN_PAGES);
	t->range.pfn_flags_mask = HMM_WRITE;
	for (i = 0; i < HMM_PLAN_PAGES; i++) {
		u32 dice = prandom_u32_state(rnd), place = prandom_u32_state(rnd);
		bool there = !(dice & 3), asked = dice & 4;

		t->pfns[i] = HMM_STICKY | HMM_PFN_ERROR | (asked ? HMM_WRITE : 0);
		t->sticky[i] = HMM_STICKY;
		t->due[i] = asked && !there;
		t->plan[i].page = place % HMM_PLAN_PAGES;
		t->plan[i].npages = there || dice & 0x70 ? 0 :
				    min(1 + place / 256 % 8, HMM_PLAN_PAGES - t->plan[i].page);
		t->plan[i].drop = !(dice & 0x700);
		if (there)
			hmm_touch(t, i, 1, true);
	}
	memset(t->faults, 0, sizeof(t->faults));
	memcpy(t->asked, t->pfns, sizeof(t->pfns));
}

/* All is as the CPU sees it, and nothing was done that did not have to be. */
static bool hmm_plan_fulfilled(struct hmm_fixture *t, unsigned long i)
{
	unsigned long want = hmm_readable(t, i) ? HMM_PFN_VALID | HMM_PFN_WRITE : 0;

	if (t->asked[i] & HMM_READ)
		want = HMM_PFN_VALID | HMM_PFN_WRITE;
	return t->faults[i] == t->due[i] && hmm_flags(t, i) == (want | t->sticky[i]);
}

/*
 * However the lock is dropped and the range invalidated: each page is faulted
 * once, once more for each time that it was taken away or waited for, and not
 * at all if it was not asked for.
 */
static void hmm_test_random_restarts(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	u32 used = seed ?: get_random_u32();
	struct rnd_state rnd;
	unsigned long i, n;

	prandom_seed_state(&rnd, used);
	hmm_map_handler(t);
	for (n = 0; n < 500; n++) {
		t->handle = NULL;
		hmm_make_plan(t, &rnd);
		t->handle = hmm_handle_plan;
		KUNIT_ASSERT_EQ_MSG(test, hmm_answer_retry(t), 0, "seed %u, walk %lu", used, n);
		for (i = 0; i < HMM_PLAN_PAGES; i++)
			KUNIT_ASSERT_TRUE_MSG(test, hmm_plan_fulfilled(t, i),
					      "seed %u, walk %lu, page %lu: %#lx became %#lx, %u faults, not %u",
					      used, n, i, t->asked[i], t->pfns[i],
					      t->faults[i], t->due[i]);
	}
}

/* Pages 0 and 1 take each other away, for as long as t->until. */
static vm_fault_t hmm_handle_storm(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	if (time_before(jiffies, t->until))
		hmm_zap(t, !page, 1);
	return hmm_handler_map(vmf);
}

/* The timeout ends a call that never gets anywhere. */
static void hmm_test_timeout(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_storm;
	t->until = jiffies + 20 * HZ;
	hmm_ask(t, 0, 2);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, 1), -EBUSY);
	KUNIT_EXPECT_TRUE(test, time_before(jiffies, t->until));
}

/* The first fault of page 9 takes page 0 away, and all are slow. */
static vm_fault_t hmm_handle_slowly(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	if (page == 9 && t->faults[9] == 1)
		hmm_zap(t, 0, 1);
	msleep(100);
	return hmm_handler_map(vmf);
}

/* The time that faults take is not the time that invalidations cost. */
static void hmm_test_slow_faults(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_slowly;
	hmm_ask(t, 0, 10);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, HZ / 2), 0);
	KUNIT_EXPECT_EQ(test, t->faults[0], 2);
}

/* The OOM killer has reaped the memory: what is missing may be lost data. */
static void hmm_test_reaped_mm(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	mm_flags_set(MMF_UNSTABLE, t->mm);
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, 0), -EFAULT);
	mm_flags_clear(MMF_UNSTABLE, t->mm);
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, 0), 0);
}

/* Nobody runs the process any more. The locked call's caller holds a user. */
static void hmm_test_dead_mm(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	t->call = &hmm_calls[HMM_CALL_UNLOCKED];
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	t->pfns[0] = HMM_UNTOUCHED;
	atomic_dec(&t->mm->mm_users);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -EFAULT);
	atomic_inc(&t->mm->mm_users);
	KUNIT_EXPECT_EQ(test, t->pfns[0], HMM_UNTOUCHED);
}

static int hmm_test_init(struct kunit *test)
{
	struct hmm_fixture *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);

	if (!t)
		return -ENOMEM;
	t->test = test;
	t->call = test->param_value;
	test->priv = t;
	return 0;
}

static void hmm_test_exit(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	if (!t)
		return;
	if (t->notifier.mm)
		mmu_interval_notifier_remove(&t->notifier);
	if (t->file)
		fput(t->file);
}

#define HMM_CASE(name)	KUNIT_CASE_PARAM(hmm_test_##name, hmm_call_gen_params)

static struct kunit_case hmm_test_cases[] = {
	HMM_CASE(snapshot_empty),
	HMM_CASE(snapshot_populated),
	HMM_CASE(snapshot_zero_page),
	HMM_CASE(snapshot_part),
	HMM_CASE(read_request),
	HMM_CASE(write_request),
	HMM_CASE(write_after_read),
	HMM_CASE(met_request),
	HMM_CASE(write_without_fault),
	HMM_CASE(masked_requests),
	HMM_CASE(default_and_mask),
	HMM_CASE(every_second_page),
	HMM_CASE(one_write_in_512),
	HMM_CASE(one_fault_a_page),
	HMM_CASE(read_only_vma),
	HMM_CASE(no_access_vma),
	HMM_CASE(no_vma),
	HMM_CASE(request_around_hole),
	HMM_CASE(fault_errors),
	HMM_CASE(arguments),
	HMM_CASE(no_notifier),
	HMM_CASE(sticky_bits),
	HMM_CASE(sticky_bits_on_error),
	HMM_CASE(stale_sequence),
	HMM_CASE(restart_keeps_requests),
	HMM_CASE(dropped_lock),
	HMM_CASE(repeated_invalidation),
	HMM_CASE(random_restarts),
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	HMM_CASE(huge_request_inside),
	HMM_CASE(huge_fault_inside),
#endif
	KUNIT_CASE_SLOW(hmm_test_timeout),
	KUNIT_CASE_SLOW(hmm_test_slow_faults),
	KUNIT_CASE(hmm_test_reaped_mm),
	KUNIT_CASE(hmm_test_dead_mm),
	{}
};

static struct kunit_suite hmm_test_suite = {
	.name = "hmm",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_test_cases,
};

kunit_test_suite(hmm_test_suite);

MODULE_IMPORT_NS("EXPORTED_FOR_KUNIT_TESTING");
MODULE_DESCRIPTION("KUnit tests of hmm_range_fault()");
MODULE_LICENSE("GPL");
