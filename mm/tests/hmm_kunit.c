// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(), on real page tables of base pages
 *
 * A test maps memory in an address space of its own, asks for it as a driver
 * would, and compares both what was stored and what became of the memory. HMM
 * is never asked about itself.
 *
 * Everything used here is exported, so that the suite can be a module. Every
 * case runs with both calls, see hmm_calls.
 */
#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/huge_mm.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>

#include "../hmm_internal.h"
#include "hmm_fixture.h"

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

/* There are tables only for what is @distance bytes away, until a fault brings more. */
static void hmm_expect_no_tables(struct hmm_fixture *t, unsigned long distance)
{
	struct kunit *test = t->test;

	hmm_map_anon_far(t, distance, PROT_READ | PROT_WRITE);
	hmm_ask(t, 7, 1);
	t->pfns[0] = HMM_UNTOUCHED;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	KUNIT_EXPECT_EQ(test, t->pfns[0], HMM_STICKY);

	hmm_ask(t, 7, 1);
	t->range.default_flags = HMM_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
	hmm_expect_flags(t, 0, 1, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_PTR_EQ(test, hmm_pfn_to_page(t->pfns[0]), hmm_cpu_page(t, 7));
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 1);
}

static void hmm_test_no_p4d_table(struct kunit *test)
{
	hmm_expect_no_tables(test->priv, PGDIR_SIZE);
}

static void hmm_test_no_pud_table(struct kunit *test)
{
	hmm_expect_no_tables(test->priv, P4D_SIZE);
}

static void hmm_test_no_pmd_table(struct kunit *test)
{
	hmm_expect_no_tables(test->priv, PUD_SIZE);
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

/* The request is made of both: the defaults say to read, an element to write. */
static void hmm_test_read_all_write_one(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, HMM_PAGES, false);
	hmm_ask(t, 0, 512);
	t->pfns[300] = HMM_PFN_REQ_WRITE;
	t->range.default_flags = HMM_PFN_REQ_FAULT;
	t->range.pfn_flags_mask = HMM_PFN_REQ_WRITE;
	KUNIT_ASSERT_EQ(test, hmm_answer_retry(t), 0);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 1);
	hmm_expect_flags(t, 300, 1, HMM_PFN_VALID | HMM_PFN_WRITE);
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

	if (HMM_SIZE < 2 * PMD_SIZE - PAGE_SIZE)
		kunit_skip(t->test, "huge pages are too large");
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
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

static vm_fault_t hmm_handle_failing(struct hmm_fixture *t, struct vm_fault *vmf,
				     unsigned long page)
{
	return page == 700 ? *(vm_fault_t *)t->private : hmm_handler_map(vmf);
}

/* The failing page is faulted once, and nothing behind it is looked at. */
static void hmm_expect_fault_error(struct hmm_fixture *t, int err)
{
	memset(t->faults, 0, sizeof(t->faults));
	hmm_zap(t, 0, HMM_PAGES);
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_UNTOUCHED, HMM_PAGES);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(t->test, hmm_answer(t), err);

	hmm_expect_flags(t, 0, 700, HMM_PFN_VALID | HMM_PFN_WRITE | HMM_STICKY);
	hmm_expect_untouched(t, 700, HMM_PAGES - 700);
	KUNIT_EXPECT_EQ(t->test, t->faults[700], 1);
	KUNIT_EXPECT_EQ(t->test, t->faults[701], 0);
}

static void hmm_test_fault_errors(struct kunit *test)
{
	struct {
		vm_fault_t fault;
		int err;
	} rows[] = {
		{ VM_FAULT_SIGBUS, -EFAULT },
		{ VM_FAULT_SIGSEGV, -EFAULT },
		{ VM_FAULT_HWPOISON, -EFAULT },
		{ VM_FAULT_HWPOISON_LARGE, -EFAULT },
		{ VM_FAULT_OOM, -ENOMEM },
		/* An error that has no errno of its own. */
		{ VM_FAULT_FALLBACK, -EFAULT },
	};
	struct hmm_fixture *t = test->priv;
	unsigned int i;

	hmm_map_handler(t);
	t->handle = hmm_handle_failing;
	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		t->private = &rows[i].fault;
		hmm_expect_fault_error(t, rows[i].err);
	}
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
	KUNIT_EXPECT_EQ(test, hmm_range_fault(&t->range), -EINVAL);
	KUNIT_EXPECT_EQ(test, hmm_range_fault_unlocked_timeout(&t->range, 0), -EINVAL);
	KUNIT_EXPECT_EQ(test, hmm_range_fault_each(&t->range, 0, NULL), -EINVAL);
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

/* A sticky bit that none of its neighbours has, wherever it is. */
static void hmm_test_sticky_bits_alone(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i, at;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, 30, true);
	for (at = 0; at < 30; at++) {
		hmm_ask(t, 0, 30);
		memset_l(t->pfns, HMM_PFN_ERROR, 30);
		t->pfns[at] |= HMM_PFN_P2PDMA_BUS;
		KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
		for (i = 0; i < 30; i++)
			KUNIT_ASSERT_EQ(test, hmm_flags(t, i), HMM_PFN_VALID | HMM_PFN_WRITE |
					(i == at ? HMM_PFN_P2PDMA_BUS : 0));
	}
}

/* Pages before 600 get what they need, and those from there on cannot. */
static void hmm_expect_error_at_600(struct hmm_fixture *t, unsigned long request, int err)
{
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_UNTOUCHED, HMM_PAGES);
	t->range.default_flags = request;
	KUNIT_EXPECT_EQ(t->test, hmm_answer(t), err);
	hmm_expect_flags(t, 0, 600, HMM_PFN_VALID | HMM_STICKY | request);
	hmm_expect_untouched(t, 600, HMM_PAGES - 600);
}

/* The other errors: fault_errors, arguments, budget, fatal_signal. */
static void hmm_test_sticky_bits_on_error(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	struct vm_area_struct *vma;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_touch(t, 0, 600, true);
	mmap_write_lock(t->mm);
	vma = find_vma(t->mm, t->start);
	vm_flags_clear(vma, VM_WRITE);
	mmap_write_unlock(t->mm);
	hmm_expect_error_at_600(t, HMM_WRITE, -EPERM);

	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, 600), PAGE_SIZE), 0);
	hmm_expect_error_at_600(t, HMM_WRITE, -EFAULT);
}

/* Addresses */

/*
 * How many bytes there are behind @addr in its block or before @end, whichever is less.
 * Such numbers never wrap, and an @end of 0 is that of all addresses.
 */
static unsigned long hmm_bytes_left(unsigned long addr, unsigned long size,
				    unsigned long end)
{
	return min(size - 1 - addr % size, end - 1 - addr);
}

static void hmm_expect_addr_end(struct kunit *test, unsigned long addr,
				unsigned long size, unsigned long end)
{
	/* What ends where it begins, or before, is no range. */
	if (end - 1 <= addr)
		return;
	KUNIT_ASSERT_EQ_MSG(test, hmm_addr_end(addr, size, end),
			    addr + hmm_bytes_left(addr, size, end) + 1,
			    "%#lx in blocks of %#lx bytes up to %#lx", addr, size, end);
}

/* Every place around @edge, in blocks of every size, cut around @border. */
static void hmm_expect_addr_ends(struct kunit *test, unsigned long edge,
				 unsigned long border)
{
	unsigned long i, j;
	unsigned int order;

	for (order = PAGE_SHIFT; order < BITS_PER_LONG; order++)
		for (i = 0; i < 8; i++)
			for (j = 0; j < 8; j++)
				hmm_expect_addr_end(test, edge + (i - 4) * PAGE_SIZE,
						    1UL << order,
						    border + (j - 4) * PAGE_SIZE);
}

/* The last page of all addresses may be one of a program's, as on s390 it nearly is. */
static void hmm_test_addr_end(struct kunit *test)
{
	unsigned long edge, border;
	unsigned int i, j;

	for (i = PAGE_SHIFT + 4; i <= BITS_PER_LONG; i++)
		for (j = i; j <= BITS_PER_LONG; j++) {
			edge = i < BITS_PER_LONG ? 1UL << i : 0;
			border = j < BITS_PER_LONG ? 1UL << j : 0;
			hmm_expect_addr_ends(test, edge, border);
			hmm_expect_addr_ends(test, -edge, border);
			hmm_expect_addr_ends(test, -edge, -border);
			hmm_expect_addr_ends(test, -border, -edge);
		}

	/* In so many words. */
	KUNIT_EXPECT_EQ(test, hmm_addr_end(0, PMD_SIZE, PMD_SIZE), PMD_SIZE);
	KUNIT_EXPECT_EQ(test, hmm_addr_end(PMD_SIZE, PMD_SIZE, -PAGE_SIZE), 2 * PMD_SIZE);
	KUNIT_EXPECT_EQ(test, hmm_addr_end(-PMD_SIZE, PMD_SIZE, -PAGE_SIZE), -PAGE_SIZE);
	KUNIT_EXPECT_EQ(test, hmm_addr_end(-2 * PAGE_SIZE, PMD_SIZE, -PAGE_SIZE), -PAGE_SIZE);
	KUNIT_EXPECT_EQ(test, hmm_addr_end(-PAGE_SIZE, PMD_SIZE, 0), 0);
	KUNIT_EXPECT_EQ(test, hmm_addr_end(-PAGE_SIZE, PAGE_SIZE, 0), 0);
}

/* The suite */

static struct kunit_case hmm_test_cases[] = {
	HMM_CASE(snapshot_empty),
	HMM_CASE(snapshot_populated),
	HMM_CASE(snapshot_zero_page),
	HMM_CASE(snapshot_part),
	HMM_CASE(no_p4d_table),
	HMM_CASE(no_pud_table),
	HMM_CASE(no_pmd_table),
	HMM_CASE(read_request),
	HMM_CASE(write_request),
	HMM_CASE(write_after_read),
	HMM_CASE(met_request),
	HMM_CASE(write_without_fault),
	HMM_CASE(masked_requests),
	HMM_CASE(default_and_mask),
	HMM_CASE(every_second_page),
	HMM_CASE(one_write_in_512),
	HMM_CASE(read_all_write_one),
	HMM_CASE(one_fault_a_page),
	HMM_CASE(read_only_vma),
	HMM_CASE(no_access_vma),
	HMM_CASE(no_vma),
	HMM_CASE(request_around_hole),
	HMM_CASE(fault_errors),
	HMM_CASE(arguments),
	KUNIT_CASE(hmm_test_no_notifier),
	KUNIT_CASE(hmm_test_addr_end),
	HMM_CASE(sticky_bits),
	HMM_CASE(sticky_bits_alone),
	HMM_CASE(sticky_bits_on_error),
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	HMM_CASE(huge_request_inside),
	HMM_CASE(huge_fault_inside),
#endif
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
