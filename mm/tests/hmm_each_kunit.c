// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault_each(): steps, and what is done with them
 *
 * What a range comes to is tested with all three calls by the other suites, and
 * so is that steps are committed in order, under the driver's lock and while
 * they hold: see hmm_commit().
 */
#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>

#include "hmm_fixture.h"

/* What hmm_range_fault_each() hands over at a time, at most. */
#define HMM_STEP	512UL

static unsigned long hmm_vpn(const struct hmm_fixture *t, unsigned long page)
{
	return hmm_addr(t, page) >> PAGE_SHIFT;
}

/* Where the step that @page begins ends, when nothing has made steps short. */
static unsigned long hmm_step_end(const struct hmm_fixture *t, unsigned long page)
{
	unsigned long end = page + HMM_STEP - hmm_vpn(t, page) % HMM_STEP;

	return min(end, HMM_PAGES);
}

static int hmm_commit_whole_step(struct hmm_fixture *t, unsigned long page,
				 unsigned long npages)
{
	KUNIT_EXPECT_EQ(t->test, page + npages, hmm_step_end(t, page));
	hmm_expect_flags(t, page, npages, HMM_PFN_VALID | HMM_PFN_WRITE);
	return 0;
}

/* Steps are as long as they may be, and end where large mappings do. */
static void hmm_test_each_whole_steps(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long page;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	t->commit = hmm_commit_whole_step;
	for (page = 0; page < 3; page++) {
		hmm_ask(t, page, HMM_PAGES - page);
		/* The elements begin with the range, which is the fixture's here. */
		t->range.hmm_pfns = t->pfns + page;
		t->range.default_flags = HMM_WRITE;
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
		KUNIT_EXPECT_GE(test, t->commits, HMM_PAGES / HMM_STEP);
	}
}

/* Page 700 is taken away when its step is about to be committed. */
static void hmm_zap_700_once(struct hmm_fixture *t)
{
	if (!t->rounds && t->committed <= hmm_addr(t, 700) && hmm_readable(t, 700)) {
		t->rounds++;
		hmm_zap(t, 700, 1);
	}
}

/*
 * What is asked of a page: to read in the first step, to write behind that. In
 * the steps of @mixed, the first being BIT(0), even pages ask for the other.
 */
static unsigned long hmm_ask_by_step(const struct hmm_fixture *t, unsigned long page,
				     unsigned long mixed)
{
	bool behind = page >= hmm_step_end(t, 0);
	bool other = !(page & 1) && mixed & BIT(behind);

	return behind == other ? HMM_READ : HMM_WRITE;
}

static vm_fault_t hmm_handle_as_asked(struct hmm_fixture *t, struct vm_fault *vmf,
				      unsigned long page)
{
	const unsigned long *mixed = t->private;

	KUNIT_EXPECT_EQ(t->test, !!(vmf->flags & FAULT_FLAG_WRITE),
			hmm_ask_by_step(t, page, *mixed) == HMM_WRITE);
	return hmm_handler_map(vmf);
}

/*
 * Only the step that was invalidated is done again, and of it what is missing,
 * as it was asked for: requests may be alike in one step, and not in the next.
 */
static void hmm_test_each_stale_step(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i, mixed;

	hmm_map_handler(t);
	t->handle = hmm_handle_as_asked;
	t->private = &mixed;
	t->before_commit = hmm_zap_700_once;
	for (mixed = 0; mixed < 4; mixed++) {
		hmm_zap(t, 0, HMM_PAGES);
		memset(t->faults, 0, sizeof(t->faults));
		t->rounds = 0;
		hmm_ask(t, 0, HMM_PAGES);
		for (i = 0; i < HMM_PAGES; i++)
			t->pfns[i] = hmm_ask_by_step(t, i, mixed);
		t->range.pfn_flags_mask = HMM_WRITE;
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
		KUNIT_EXPECT_EQ(test, t->rounds, 1);
		KUNIT_EXPECT_EQ(test, t->turns, t->commits + 1);
		for (i = 0; i < HMM_PAGES; i++)
			KUNIT_ASSERT_EQ(test, t->faults[i], i == 700 ? 2 : 1);
		hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	}
}

/* Some page of the range is taken away, over and over. */
static void hmm_zap_always(struct hmm_fixture *t)
{
	if (t->rounds++ < t->limit)
		hmm_zap(t, 0, 1);
}

static int hmm_commit_note_length(struct hmm_fixture *t, unsigned long page,
				  unsigned long npages)
{
	if (t->commits == 1)
		t->shortest = npages;
	else
		KUNIT_EXPECT_LE(t->test, npages, 2 * t->longest);
	t->longest = max(t->longest, npages);
	return 0;
}

/*
 * A step gets shorter each time it is invalidated with nothing to fault in, and
 * grows again afterwards, by as much each time. It has a page at least.
 */
static void hmm_test_each_short_steps(struct kunit *test)
{
	static const struct {
		unsigned int invalidations;
		unsigned long first;
	} rows[] = { { 0, 512 }, { 1, 256 }, { 2, 128 }, { 8, 2 }, { 9, 1 }, { 20, 1 } };
	struct hmm_fixture *t = test->priv;
	unsigned long begin;
	unsigned int i;

	hmm_map_handler(t);
	begin = hmm_step_end(t, 0);
	t->before_commit = hmm_zap_always;
	t->commit = hmm_commit_note_length;
	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		t->rounds = 0;
		t->longest = 0;
		t->limit = rows[i].invalidations;
		/* From where a step begins, one whole step and another. */
		hmm_ask(t, begin, HMM_PAGES - begin);
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
		KUNIT_EXPECT_EQ(test, t->turns, t->commits + rows[i].invalidations);
		KUNIT_EXPECT_EQ(test, t->shortest, min(rows[i].first, HMM_PAGES - begin));
		if (begin + HMM_STEP <= HMM_PAGES)
			KUNIT_EXPECT_GE(test, t->longest, HMM_STEP / 2);
	}

	/* What is shorter than that as it is stays so. */
	t->rounds = 0;
	t->limit = 1;
	hmm_ask(t, 0, 3);
	KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
	KUNIT_EXPECT_EQ(test, t->shortest, 3);
}

/* One stale walk that had faults does not make a step shorter. */
static void hmm_test_each_faults_keep_length(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long begin;

	hmm_map_handler(t);
	begin = hmm_step_end(t, 0);
	t->before_commit = hmm_zap_always;
	t->commit = hmm_commit_note_length;
	/* The second time there is nothing left to fault in. */
	for (t->limit = 1; t->limit <= 2; t->limit++) {
		t->rounds = 0;
		t->longest = 0;
		hmm_zap(t, 0, HMM_PAGES);
		hmm_ask(t, begin, HMM_PAGES - begin);
		t->range.default_flags = HMM_READ;
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
		KUNIT_EXPECT_EQ(test, t->turns, t->commits + t->limit);
		KUNIT_EXPECT_EQ(test, t->shortest,
				min(HMM_STEP / t->limit, HMM_PAGES - begin));
	}
}

/* The first page of the step is taken away, so that each walk has a fault. */
static void hmm_zap_first_of_step(struct hmm_fixture *t)
{
	if (t->rounds++ < t->limit)
		hmm_zap(t, hmm_committed(t), 1);
}

/*
 * Two stale walks one after the other say that the step is too long, although each of
 * them had something to fault in.
 */
static void hmm_test_each_stale_faults_shorten(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long begin;

	hmm_map_handler(t);
	begin = hmm_step_end(t, 0);
	t->before_commit = hmm_zap_first_of_step;
	t->commit = hmm_commit_note_length;
	for (t->limit = 2; t->limit <= 20; t->limit += 18) {
		t->rounds = 0;
		t->longest = 0;
		hmm_zap(t, 0, HMM_PAGES);
		hmm_ask(t, begin, HMM_PAGES - begin);
		t->range.default_flags = HMM_READ;
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
		KUNIT_EXPECT_EQ(test, t->turns, t->commits + t->limit);
		KUNIT_EXPECT_LE(test, t->shortest, t->limit == 2 ? HMM_STEP / 2 : 1);
	}
}

static void hmm_zap_far_once(struct hmm_fixture *t)
{
	if (!t->rounds++)
		hmm_zap(t, HMM_PAGES - 10, 10);
}

/* What is left out of a step that gets shorter has its requests again. */
static void hmm_test_each_shorter_requests(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long begin;

	hmm_map_handler(t);
	begin = hmm_step_end(t, 0);
	hmm_touch(t, 0, HMM_PAGES, true);
	memset(t->faults, 0, sizeof(t->faults));
	t->before_commit = hmm_zap_far_once;
	hmm_ask(t, begin, HMM_PAGES - begin);
	t->range.pfn_flags_mask = HMM_WRITE;
	KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), 0);
	KUNIT_EXPECT_GT(test, t->turns, t->commits);
	KUNIT_EXPECT_NULL(test, memchr_inv(t->faults, 0, sizeof(t->faults)));
}

static int hmm_commit_end_second(struct hmm_fixture *t, unsigned long page,
				 unsigned long npages)
{
	return t->commits == 2 ? *(int *)t->private : 0;
}

/*
 * What a commit returns ends the call, be it an error or not, and nothing more
 * is faulted in.
 */
static void hmm_test_each_commit_ends(struct kunit *test)
{
	/* The walk has positive codes of its own, which are small. */
	int rets[] = { -ENOSPC, 1, 2, 3, INT_MAX };
	struct hmm_fixture *t = test->priv;
	unsigned long i, end;
	unsigned int turn;

	hmm_map_handler(t);
	end = hmm_step_end(t, hmm_step_end(t, 0));
	t->commit = hmm_commit_end_second;
	for (turn = 0; turn < ARRAY_SIZE(rets); turn++) {
		t->private = &rets[turn];
		hmm_ask(t, 0, HMM_PAGES);
		t->range.default_flags = HMM_READ;
		KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, HZ), rets[turn]);
		KUNIT_EXPECT_EQ(test, t->commits, 2);
		KUNIT_EXPECT_EQ(test, t->turns, 2);
	}
	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->faults[i], i < end);
}

/* An error in a later step leaves the earlier ones committed, and all as asked. */
static void hmm_test_each_walk_fails(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_addr(t, HMM_PAGES - 1), PAGE_SIZE), 0);
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_STICKY, HMM_PAGES);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 0), -EFAULT);
	KUNIT_EXPECT_GE(test, hmm_committed(t), hmm_step_end(t, 0));
	KUNIT_EXPECT_LT(test, hmm_committed(t), HMM_PAGES);
	hmm_expect_flags(t, 0, hmm_committed(t), HMM_PFN_VALID | HMM_STICKY);
	KUNIT_EXPECT_EQ(test, t->pfns[HMM_PAGES - 1], HMM_STICKY);
}

/* Each step has the whole budget: the storm is long, and every step short. */
static void hmm_zap_in_each_step(struct hmm_fixture *t)
{
	if (t->rounds == t->commits) {
		t->rounds++;
		schedule_timeout_uninterruptible(30);
		hmm_zap(t, 0, 1);
	}
}

static void hmm_test_each_budget_is_a_steps(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->before_commit = hmm_zap_in_each_step;
	hmm_ask(t, 0, HMM_PAGES);
	KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, 70), 0);
	KUNIT_EXPECT_GE(test, t->rounds, 3);
	KUNIT_EXPECT_EQ(test, t->rounds, t->commits);
	KUNIT_EXPECT_EQ(test, t->turns, t->commits + t->rounds);
}

static vm_fault_t hmm_handle_slowly(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	schedule_timeout_uninterruptible(10);
	return hmm_handler_map(vmf);
}

static void hmm_zap_in_second_step(struct hmm_fixture *t)
{
	if (t->commits == 1 && !t->rounds++)
		hmm_zap(t, HMM_PAGES - 1, 1);
}

/* Nor is the time that one spends on faults a matter of the others. */
static void hmm_test_each_slow_step(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	hmm_touch(t, HMM_PAGES - 1, 1, true);
	t->handle = hmm_handle_slowly;
	t->before_commit = hmm_zap_in_second_step;
	hmm_ask(t, 0, HMM_PAGES);
	t->pfns[0] = HMM_READ;
	t->range.pfn_flags_mask = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_each_timeout(&t->range, HZ), 0);
	KUNIT_EXPECT_EQ(test, t->turns, t->commits + 1);
}

/* The run that a page belongs to, counted page by page. */
static unsigned long hmm_count_run(const struct hmm_range *range, unsigned long i)
{
	unsigned long order = hmm_pfn_to_map_order(range->hmm_pfns[i]);
	unsigned long vpn = (range->start >> PAGE_SHIFT) + i, n = 1;

	while (range->start + ((i + n) << PAGE_SHIFT) < range->end &&
	       (vpn + n) >> order == vpn >> order)
		n++;
	return n;
}

/* Every order, at every place in its mapping, cut off everywhere. */
static void hmm_test_map_pages(struct kunit *test)
{
	struct hmm_range range = {};
	unsigned long pfns[40];
	unsigned long order, first, npages, i;

	range.hmm_pfns = pfns;
	for (order = 0; order <= 6; order++) {
		memset_l(pfns, HMM_PFN_VALID | order << HMM_PFN_ORDER_SHIFT, ARRAY_SIZE(pfns));
		for (first = 0; first < 64; first++)
			for (npages = 1; npages <= ARRAY_SIZE(pfns); npages++) {
				range.start = (1024 + first) << PAGE_SHIFT;
				range.end = range.start + (npages << PAGE_SHIFT);
				for (i = 0; i < npages; i++)
					KUNIT_ASSERT_EQ(test, hmm_range_map_pages(&range, i),
							hmm_count_run(&range, i));
			}
	}
}

/* What the first page is part of says nothing of the others. */
static void hmm_test_map_pages_mixed(struct kunit *test)
{
	unsigned long pfns[] = {
		HMM_PFN_VALID,
		HMM_PFN_VALID | 1UL << HMM_PFN_ORDER_SHIFT,
		HMM_PFN_VALID | 1UL << HMM_PFN_ORDER_SHIFT,
	};
	struct hmm_range range = {
		.start = PAGE_SIZE,
		.end = 4 * PAGE_SIZE,
		.hmm_pfns = pfns,
	};

	KUNIT_EXPECT_EQ(test, hmm_range_map_pages(&range, 0), 1);
	KUNIT_EXPECT_EQ(test, hmm_range_map_pages(&range, 1), 2);
	KUNIT_EXPECT_EQ(test, hmm_range_map_pages(&range, 2), 1);
}

/* An order that reaches across the borders of all smaller ones. */
static void hmm_test_map_pages_largest(struct kunit *test)
{
	unsigned long pfns[2] = {
		[0 ... 1] = HMM_PFN_VALID | 31UL << HMM_PFN_ORDER_SHIFT,
	};
	struct hmm_range range = {
		.start = (BIT(30) - 1) << PAGE_SHIFT,
		.end = (BIT(30) + 1) << PAGE_SHIFT,
		.hmm_pfns = pfns,
	};

	KUNIT_EXPECT_EQ(test, hmm_range_map_pages(&range, 0), 2);
	KUNIT_EXPECT_EQ(test, hmm_range_map_pages(&range, 1), 1);
}

static struct kunit_case hmm_each_cases[] = {
	KUNIT_CASE(hmm_test_each_whole_steps),
	KUNIT_CASE(hmm_test_each_stale_step),
	KUNIT_CASE(hmm_test_each_short_steps),
	KUNIT_CASE(hmm_test_each_faults_keep_length),
	KUNIT_CASE(hmm_test_each_stale_faults_shorten),
	KUNIT_CASE(hmm_test_each_shorter_requests),
	KUNIT_CASE(hmm_test_each_commit_ends),
	KUNIT_CASE(hmm_test_each_walk_fails),
	KUNIT_CASE(hmm_test_each_budget_is_a_steps),
	KUNIT_CASE(hmm_test_each_slow_step),
	KUNIT_CASE(hmm_test_map_pages),
	KUNIT_CASE(hmm_test_map_pages_mixed),
	KUNIT_CASE(hmm_test_map_pages_largest),
	{}
};

static struct kunit_suite hmm_each_suite = {
	.name = "hmm_each",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_each_cases,
};

kunit_test_suite(hmm_each_suite);
