// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): invalidations, restarts, and how calls end
 *
 * Fault handlers of the tests' own invalidate the range under the walk, drop
 * the mmap lock, and take their time. What matters is what is asked of them
 * again, and what is not.
 */
#include <kunit/test.h>
#include <linux/delay.h>
#include <linux/hmm.h>
#include <linux/jiffies.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/prandom.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>

#include "hmm_fixture.h"

static uint seed;
module_param(seed, uint, 0644);
MODULE_PARM_DESC(seed, "of random cases; 0 for a new one each time");

/* Return when the other thread is in the middle of it. */
static void hmm_begin_other(struct hmm_fixture *t)
{
	flush_work(&t->other);
	reinit_completion(&t->entered);
	t->rounds++;
	schedule_work(&t->other);
	wait_for_completion(&t->entered);
}

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
 * The first fault of a page takes others away, far from it and just before it.
 * A driver that has mapped page 5 for DMA would then undo that.
 */
static vm_fault_t hmm_handle_zap(struct hmm_fixture *t, struct vm_fault *vmf,
				 unsigned long page)
{
	const unsigned long *at = t->private;

	if (page == *at && t->faults[page] == 1) {
		t->kept = hmm_committed(t);
		hmm_zap(t, 0, 10);
		hmm_zap(t, *at - 10, 10);
		t->pfns[5] &= ~HMM_STICKY;
	}
	return hmm_handler_map(vmf);
}

/*
 * Pages were stored as present, then invalidated. Of those only page 5 was
 * requested: whether the walk goes on or begins again, the outputs of the
 * others must not be taken for requests. What was committed by then is not
 * looked at again: that is for the driver's callback to drop.
 */
static void hmm_expect_requests_kept(struct hmm_fixture *t, unsigned long at)
{
	struct kunit *test = t->test;
	unsigned long i;
	int ret;

	t->handle = NULL;
	hmm_zap(t, 0, HMM_PAGES);
	hmm_touch(t, 0, 10, true);
	hmm_touch(t, at - 10, 10, true);
	memset(t->faults, 0, sizeof(t->faults));
	t->handle = hmm_handle_zap;
	t->private = &at;
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_STICKY, HMM_PAGES);
	t->pfns[5] |= HMM_READ;
	t->pfns[at] |= HMM_READ;
	t->range.pfn_flags_mask = HMM_WRITE;
	ret = hmm_answer(t);

	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->pfns[i] & HMM_STICKY, i == 5 ? 0 : HMM_STICKY);
	if (t->call->locked) {
		KUNIT_EXPECT_EQ(test, ret, -EBUSY);
		KUNIT_EXPECT_EQ(test, t->faults[at - 1], 0);
		return;
	}
	KUNIT_ASSERT_EQ(test, ret, 0);
	for (i = 0; i < HMM_PAGES; i++) {
		bool kept = i < t->kept && (i < 10 || (i >= at - 10 && i < at));

		KUNIT_ASSERT_EQ(test, t->faults[i], i == at || (i == 5 && !kept));
		KUNIT_ASSERT_EQ(test, !!(t->pfns[i] & HMM_PFN_VALID),
				i == 5 || i == at || kept);
	}
}

/* With as many tables behind the fault as the page walker is used for, and not. */
static void hmm_test_restart_keeps_requests(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	hmm_expect_requests_kept(t, 300);
	hmm_expect_requests_kept(t, 600);
}

/* The same for pages that are all asked for alike: what is gone is faulted again. */
static void hmm_test_restart_keeps_like_requests(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i, at = 300;
	int ret;

	hmm_map_handler(t);
	t->handle = hmm_handle_zap;
	t->private = &at;
	hmm_ask(t, 0, HMM_PAGES);
	memset_l(t->pfns, HMM_STICKY | HMM_WRITE, HMM_PAGES);
	t->range.pfn_flags_mask = HMM_WRITE;
	ret = hmm_answer(t);

	for (i = 0; i < HMM_PAGES; i++)
		KUNIT_ASSERT_EQ(test, t->pfns[i] & HMM_STICKY, i == 5 ? 0 : HMM_STICKY);
	KUNIT_ASSERT_EQ(test, ret, t->call->locked ? -EBUSY : 0);
	for (i = 0; i < HMM_PAGES && !ret; i++) {
		bool gone = i >= t->kept && (i < 10 || (i >= at - 10 && i < at));

		KUNIT_ASSERT_EQ(test, t->faults[i], gone ? 2 : 1);
		KUNIT_ASSERT_EQ(test, hmm_flags(t, i) & ~HMM_STICKY,
				HMM_PFN_VALID | HMM_PFN_WRITE);
	}
}

/* All that an element can ask for, and what is no request. */
static const unsigned long hmm_wishes[] = {
	HMM_READ, 0, HMM_WRITE, HMM_PFN_REQ_WRITE, HMM_WRITE, HMM_READ, HMM_READ,
};

/* The last page's first fault takes all others away. */
static vm_fault_t hmm_handle_as_wished(struct hmm_fixture *t, struct vm_fault *vmf,
				       unsigned long page)
{
	const unsigned long *last = t->private;
	unsigned long wish = hmm_wishes[page % ARRAY_SIZE(hmm_wishes)];

	if (page == *last && page && t->faults[page] == 1)
		hmm_zap(t, 0, page);
	if (page != *last)
		KUNIT_EXPECT_EQ(t->test, !!(vmf->flags & FAULT_FLAG_WRITE),
				wish == HMM_WRITE);
	return hmm_handler_map(vmf);
}

/* How many faults a page takes that asks for @wish, with all others taken away once. */
static unsigned int hmm_faults_of_wish(const struct hmm_fixture *t, unsigned long wish)
{
	if (!(wish & HMM_PFN_REQ_FAULT))
		return 0;
	return t->call->locked ? 1 : 2;
}

/*
 * Requests are kept in little room. However many there are, the walk that begins
 * again asks of each page what the first did.
 */
static void hmm_test_restart_keeps_each_request(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long i, n, last, wish;

	hmm_map_handler(t);
	t->handle = hmm_handle_as_wished;
	t->private = &last;
	for (n = 1; n <= 40; n++) {
		hmm_zap(t, 0, HMM_PAGES);
		memset(t->faults, 0, sizeof(t->faults));
		last = n - 1;
		hmm_ask(t, 0, n);
		for (i = 0; i < n; i++)
			t->pfns[i] = hmm_wishes[i % ARRAY_SIZE(hmm_wishes)];
		t->pfns[last] = HMM_READ;
		t->range.pfn_flags_mask = HMM_WRITE;
		KUNIT_ASSERT_EQ(test, hmm_answer(t), t->call->locked && last ? -EBUSY : 0);
		for (i = 0; i < last; i++) {
			wish = hmm_wishes[i % ARRAY_SIZE(hmm_wishes)];
			KUNIT_ASSERT_EQ(test, t->faults[i], hmm_faults_of_wish(t, wish));
		}
		KUNIT_ASSERT_EQ(test, t->faults[last], 1);
	}
}

/* Elements that are a driver's record of what its device has mapped, all of it. */
#define HMM_RECORDED	40UL

/*
 * As the invalidate callback of such a driver does: look for what has to be unmapped,
 * now and a while later, when the call may have begun again.
 */
static void hmm_look_for_mapped(struct hmm_fixture *t)
{
	unsigned long i, looks;

	complete(&t->entered);
	for (looks = 0; looks < 3; looks++) {
		for (i = 0; i < HMM_RECORDED; i++)
			t->lost += !(READ_ONCE(t->pfns[i]) & HMM_PFN_VALID);
		schedule_timeout_uninterruptible(1);
	}
}

/* Another thread takes page 0 away. */
static void hmm_zap_first(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	hmm_zap(t, 0, 1);
}

static vm_fault_t hmm_handle_zap_by_other(struct hmm_fixture *t, struct vm_fault *vmf,
					  unsigned long page)
{
	if (page == *(unsigned long *)t->private && t->rounds < t->limit)
		hmm_begin_other(t);
	return hmm_handler_map(vmf);
}

/* Fill in the record, and have pages 0 and @at faulted in once more. */
static int hmm_ask_recorded(struct hmm_fixture *t, unsigned long at)
{
	hmm_ask(t, 0, HMM_RECORDED);
	t->range.default_flags = HMM_READ;
	t->private = &at;
	t->limit = 0;
	KUNIT_ASSERT_EQ(t->test, hmm_answer(t), 0);

	hmm_zap(t, 0, 1);
	hmm_zap(t, at, 1);
	t->rounds = 0;
	t->limit = 3;
	t->lost = 0;
	t->on_invalidate = hmm_look_for_mapped;
	return hmm_answer(t);
}

/* What has VALID keeps it until another output takes its place, however a call ends. */
static void hmm_test_restart_keeps_outputs(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long at;
	int ret;

	hmm_map_handler(t);
	INIT_WORK(&t->other, hmm_zap_first);
	t->handle = hmm_handle_zap_by_other;
	for (at = 0; at < HMM_RECORDED; at += 13) {
		ret = hmm_ask_recorded(t, at);
		flush_work(&t->other);
		t->on_invalidate = NULL;
		KUNIT_EXPECT_EQ(test, ret, t->call->locked ? -EBUSY : 0);
		KUNIT_EXPECT_EQ(test, t->lost, 0);
		KUNIT_EXPECT_GE(test, t->rounds, 1);
		hmm_look_for_mapped(t);
		KUNIT_EXPECT_EQ(test, t->lost, 0);
	}
}

/* Every first fault of a page waits without the lock, as userfaultfd does. */
static vm_fault_t hmm_handle_unlock(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	bool may_drop = vmf->flags & FAULT_FLAG_ALLOW_RETRY;
	bool tried = vmf->flags & FAULT_FLAG_TRIED;

	KUNIT_EXPECT_EQ(t->test, may_drop, !t->call->locked);
	KUNIT_EXPECT_EQ(t->test, !!(vmf->flags & FAULT_FLAG_KILLABLE), may_drop);
	KUNIT_EXPECT_TRUE(t->test, vmf->flags & FAULT_FLAG_REMOTE);
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

/* The locked call ends each time, and its caller calls again. */
static void hmm_test_repeated_invalidation(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long calls = 0;
	int ret;

	hmm_map_handler(t);
	t->handle = hmm_handle_fight;
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;
	do {
		ret = hmm_answer(t);
	} while (ret == -EBUSY && ++calls < 4 * HMM_PAGES);
	KUNIT_ASSERT_EQ(test, ret, 0);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_FALSE(test, mmu_interval_read_retry(&t->notifier, t->range.notifier_seq));
	/* The first fault of a step may take from the one before, which is done. */
	KUNIT_EXPECT_GE(test, hmm_count(t, hmm_readable),
			HMM_PAGES - (t->commits ? t->commits - 1 : 0));
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

/* The budget */

/*
 * Another thread takes page 0 or 1 away. The notifier has that last for as long
 * as t->pause, and whoever wants to walk has to wait until it is over.
 */
static void hmm_zap_meanwhile(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	hmm_zap(t, t->rounds & 1, 1);
}

static vm_fault_t hmm_handle_storm(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	if (t->rounds < t->limit)
		hmm_begin_other(t);
	return hmm_handler_map(vmf);
}

/* Prepare to ask for pages 0 and 1, which are taken away @limit times. */
static void hmm_make_storm(struct hmm_fixture *t, unsigned int limit)
{
	INIT_WORK(&t->other, hmm_zap_meanwhile);
	hmm_map_handler(t);
	t->handle = hmm_handle_storm;
	t->pause = 2;
	t->limit = limit;
	hmm_ask(t, 0, 2);
	t->pfns[0] = HMM_UNTOUCHED;
	t->pfns[1] = HMM_UNTOUCHED;
	t->range.default_flags = HMM_READ;
}

static const struct hmm_budget {
	const char *name;
	unsigned long timeout;
	unsigned int storms;
	int ret;
} hmm_budgets[] = {
	{ "none, a short storm",	0,	1,	0 },
	{ "none, a long storm",		0,	30,	0 },
	{ "a jiffy, no storm",		1,	0,	0 },
	{ "a jiffy",			1,	100,	-EBUSY },
	{ "twenty jiffies",		20,	100,	-EBUSY },
	{ "a second, a short storm",	HZ,	3,	0 },
};

KUNIT_ARRAY_PARAM_DESC(hmm_budget, hmm_budgets, name);

/* A storm ends a call once it has lasted as long as the budget, and not before. */
static void hmm_expect_budget(struct kunit *test,
			      int (*call)(struct hmm_range *range, unsigned long timeout))
{
	const struct hmm_budget *budget = test->param_value;
	struct hmm_fixture *t = test->priv;
	unsigned long began, took;
	int ret;

	hmm_make_storm(t, budget->storms);
	began = jiffies;
	ret = call(&t->range, budget->timeout);
	took = jiffies - began;
	flush_work(&t->other);

	KUNIT_EXPECT_EQ(test, ret, budget->ret);
	KUNIT_EXPECT_EQ(test, t->pfns[0] & HMM_STICKY, HMM_STICKY);
	KUNIT_EXPECT_EQ(test, t->pfns[1] & HMM_STICKY, HMM_STICKY);
	if (budget->ret) {
		KUNIT_EXPECT_GE(test, took, budget->timeout);
		KUNIT_EXPECT_LT(test, t->rounds, budget->storms);
	} else if (call == hmm_call_each_timeout) {
		/* One page is done while the other is taken away. */
		KUNIT_EXPECT_LE(test, t->rounds, budget->storms);
		KUNIT_EXPECT_GE(test, t->rounds, min(budget->storms, 3));
	} else {
		KUNIT_EXPECT_EQ(test, t->rounds, budget->storms);
	}
}

static void hmm_test_budget(struct kunit *test)
{
	hmm_expect_budget(test, hmm_call_timeout);
}

static void hmm_test_each_budget(struct kunit *test)
{
	hmm_expect_budget(test, hmm_call_each_timeout);
}

/* What goes on when the call begins takes longer than the budget. */
static void hmm_test_late_first_walk(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_make_storm(t, 1);
	t->pause = 10;
	hmm_begin_other(t);
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, 1), 0);
	hmm_expect_flags(t, 0, 2, HMM_PFN_VALID | HMM_PFN_WRITE | HMM_STICKY);
	flush_work(&t->other);
}

/* The first fault of page 9 takes all others away. The @t->limit-th of each is slow. */
static vm_fault_t hmm_handle_slowly(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	if (page == 9 && t->faults[9] == 1)
		hmm_zap(t, 0, 9);
	if (t->faults[page] == t->limit)
		msleep(100);
	return hmm_handler_map(vmf);
}

/* Ask for ten pages. The faults of one of two walks take longer than the timeout. */
static int hmm_ask_slowly(struct hmm_fixture *t, unsigned int slow)
{
	t->handle = hmm_handle_slowly;
	t->limit = slow;
	hmm_zap(t, 0, HMM_PAGES);
	memset(t->faults, 0, sizeof(t->faults));
	hmm_ask(t, 0, 10);
	t->range.default_flags = HMM_READ;
	return hmm_call_timeout(&t->range, HZ / 2);
}

/*
 * The faults of a walk whose outputs are of use may take as long as they like. Those
 * of a walk that was thrown away count.
 */
static void hmm_test_slow_faults(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	KUNIT_EXPECT_EQ(test, hmm_ask_slowly(t, 2), 0);
	KUNIT_EXPECT_EQ(test, t->faults[0], 2);
	KUNIT_EXPECT_EQ(test, hmm_ask_slowly(t, 1), -EBUSY);
	KUNIT_EXPECT_EQ(test, t->faults[0], 1);
}

static void hmm_hold_mmap_lock(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	mmap_write_lock(t->mm);
	complete(&t->entered);
	msleep(1000);
	mmap_write_unlock(t->mm);
}

/* The first fault takes the page before it away, and somebody takes the lock. */
static vm_fault_t hmm_handle_lose_lock(struct hmm_fixture *t, struct vm_fault *vmf,
				       unsigned long page)
{
	if (page != 1 || t->rounds)
		return hmm_handler_map(vmf);
	hmm_zap(t, 0, 1);
	mmap_read_unlock(vmf->vma->vm_mm);
	hmm_begin_other(t);
	return VM_FAULT_RETRY;
}

/* Nor is the time that it takes to get the mmap lock. */
static void hmm_test_slow_lock(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_make_storm(t, 0);
	INIT_WORK(&t->other, hmm_hold_mmap_lock);
	t->pause = 0;
	t->handle = hmm_handle_lose_lock;
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, HZ / 2), 0);
	KUNIT_EXPECT_EQ(test, t->faults[0], 2);
}

/* How else calls end */

static vm_fault_t hmm_handle_kill(struct hmm_fixture *t, struct vm_fault *vmf,
				  unsigned long page)
{
	if (page == 3)
		send_sig(SIGKILL, current, 1);
	return hmm_handler_map(vmf);
}

/* At most one fault follows those that were due when the signal came. */
static void hmm_expect_interrupted(struct hmm_fixture *t, unsigned long faults)
{
	unsigned long i;

	t->handled = 0;
	hmm_ask(t, 0, 10);
	memset_l(t->pfns, HMM_UNTOUCHED, 10);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(t->test, hmm_answer(t), -EINTR);
	KUNIT_EXPECT_LE(t->test, t->handled, faults + 1);

	for (i = 0; i < 10 && t->pfns[i] != HMM_UNTOUCHED; i++)
		;
	hmm_expect_flags(t, 0, i, HMM_PFN_VALID | HMM_PFN_WRITE | HMM_STICKY);
	hmm_expect_untouched(t, i, 10 - i);
}

/* Somebody kills the task: in a fault, and once more before the call. */
static void hmm_test_fatal_signal(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_kill;
	allow_signal(SIGKILL);
	hmm_expect_interrupted(t, 4);
	hmm_expect_interrupted(t, 0);
	flush_signals(current);
	disallow_signal(SIGKILL);
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

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask(t, 0, HMM_PAGES);
	t->pfns[0] = HMM_UNTOUCHED;
	atomic_dec(&t->mm->mm_users);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -EFAULT);
	atomic_inc(&t->mm->mm_users);
	KUNIT_EXPECT_EQ(test, t->pfns[0], HMM_UNTOUCHED);
}

/*
 * Have the next allocation fail. For one that may sleep, failslab's ignore-gfp-wait
 * has to be N.
 */
static void hmm_fail_next_allocation(struct kunit *test)
{
#ifdef CONFIG_FAILSLAB
	void *memory;

	current->fail_nth = 1;
	memory = kmalloc(8, GFP_KERNEL | __GFP_NOWARN);
	current->fail_nth = memory ? 0 : 1;
	kfree(memory);
	if (memory)
		kunit_skip(test, "failslab spares what may sleep");
#else
	kunit_skip(test, "needs CONFIG_FAILSLAB");
#endif
}

/* Did it fail? */
static bool hmm_allocation_failed(void)
{
#ifdef CONFIG_FAILSLAB
	bool failed = !current->fail_nth;

	current->fail_nth = 0;
	return failed;
#else
	return false;
#endif
}

/* Ask to write to pages that are there, and to read every other. */
static void hmm_ask_mixed(struct hmm_fixture *t, unsigned long npages)
{
	unsigned long i;

	hmm_touch(t, 0, npages, true);
	hmm_ask(t, 0, npages);
	for (i = 0; i < npages; i++)
		t->pfns[i] = i & 1 ? HMM_READ : HMM_WRITE;
	t->range.pfn_flags_mask = HMM_WRITE;
}

/* The requests cannot be kept. Who keeps but those of a step has room for them. */
static void hmm_test_no_memory(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	bool steps = t->call == &hmm_calls[HMM_CALL_EACH];

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask_mixed(t, 513);

	hmm_fail_next_allocation(test);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), steps ? 0 : -ENOMEM);
	KUNIT_EXPECT_EQ(test, hmm_allocation_failed(), !steps);
	if (steps) {
		hmm_expect_flags(t, 0, 513, HMM_PFN_VALID | HMM_PFN_WRITE);
		return;
	}
	KUNIT_EXPECT_EQ(test, t->pfns[0], HMM_WRITE);
	KUNIT_EXPECT_EQ(test, t->pfns[511], HMM_READ);
	KUNIT_EXPECT_EQ(test, t->pfns[512], HMM_WRITE);
}

/* There is room for as many as a step has, and elements may have no say. */
static void hmm_test_no_memory_needed(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	hmm_ask_mixed(t, 512);
	hmm_fail_next_allocation(test);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), 0);
	KUNIT_EXPECT_FALSE(test, hmm_allocation_failed());
	hmm_expect_flags(t, 0, 512, HMM_PFN_VALID | HMM_PFN_WRITE);

	hmm_ask_mixed(t, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;
	hmm_fail_next_allocation(test);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), 0);
	KUNIT_EXPECT_FALSE(test, hmm_allocation_failed());
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
}

/* Memory whose pages are faulted in one by one, and not prepared for that yet. */
static void hmm_map_fresh(struct hmm_fixture *t)
{
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	mmap_write_lock(t->mm);
	vm_flags_set(vma_lookup(t->mm, t->start), VM_NOHUGEPAGE);
	mmap_write_unlock(t->mm);
}

/* When the first of several faults in a row fails, the others do not make that good. */
static void hmm_test_first_fault_fails(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_fresh(t);
	/* There are several in a row where there is a page table. */
	hmm_touch(t, 100, 1, false);
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;

	hmm_fail_next_allocation(test);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -ENOMEM);
	KUNIT_EXPECT_TRUE(test, hmm_allocation_failed());
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_writable), 0);
}

/**
 * struct hmm_killer - who kills a task that waits for a lock
 * @work: runs hmm_kill_waiter()
 * @mm: has the lock
 * @task: who waits for it
 * @locked: that the lock is held
 * @over: that the task waits no more
 * @late: whether that took too long
 */
struct hmm_killer {
	struct work_struct work;
	struct mm_struct *mm;
	struct task_struct *task;
	struct completion locked;
	struct completion over;
	bool late;
};

static void hmm_kill_waiter(struct work_struct *work)
{
	struct hmm_killer *killer = container_of(work, struct hmm_killer, work);
	int tries = 0;

	mmap_write_lock(killer->mm);
	complete(&killer->locked);
	while (!rwsem_is_contended(&killer->mm->mmap_lock) && ++tries < 1000)
		fsleep(1000);
	send_sig(SIGKILL, killer->task, 1);
	killer->late = !wait_for_completion_timeout(&killer->over, 5 * HZ);
	mmap_write_unlock(killer->mm);
}

static void hmm_test_killed_waiting(struct kunit *test)
{
	struct hmm_killer killer = { .task = current };
	struct hmm_fixture *t = test->priv;
	int ret;

	/* Where there is no VMA, only the mmap lock will do. */
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	KUNIT_ASSERT_EQ(test, vm_munmap(t->start, PAGE_SIZE), 0);
	hmm_ask(t, 0, 1);
	t->pfns[0] = HMM_UNTOUCHED;
	t->range.default_flags = HMM_READ;
	allow_signal(SIGKILL);
	killer.mm = t->mm;
	init_completion(&killer.locked);
	init_completion(&killer.over);
	INIT_WORK_ONSTACK(&killer.work, hmm_kill_waiter);
	schedule_work(&killer.work);
	wait_for_completion(&killer.locked);

	ret = hmm_range_fault_unlocked_timeout(&t->range, 0);
	complete(&killer.over);
	flush_work(&killer.work);
	destroy_work_on_stack(&killer.work);
	flush_signals(current);
	disallow_signal(SIGKILL);

	KUNIT_EXPECT_EQ(test, ret, -EINTR);
	KUNIT_EXPECT_FALSE(test, killer.late);
	hmm_expect_untouched(t, 0, 1);
	KUNIT_EXPECT_EQ(test, hmm_count(t, hmm_readable), 0);
}

static void hmm_hold_until_over(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	mmap_write_lock(t->mm);
	complete(&t->entered);
	t->late = !wait_for_completion_timeout(&t->over, 5 * HZ);
	mmap_write_unlock(t->mm);
}

/*
 * Somebody has the mmap lock for writing, and changes other VMAs or none: it is
 * nothing to a device that looks at this one, and faults in it.
 */
static void hmm_test_held_mmap_lock(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	int ret;

	if (!IS_ENABLED(CONFIG_PER_VMA_LOCK))
		kunit_skip(test, "needs CONFIG_PER_VMA_LOCK");
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	/* The first fault of all prepares the VMA, and needs the lock for that. */
	hmm_touch(t, 1, 1, true);
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;
	INIT_WORK(&t->other, hmm_hold_until_over);
	hmm_begin_other(t);

	t->range.notifier_seq = mmu_interval_read_begin(&t->notifier);
	ret = t->call->fault(&t->range);
	complete(&t->over);
	flush_work(&t->other);

	KUNIT_EXPECT_EQ(test, ret, 0);
	KUNIT_EXPECT_FALSE(test, t->late);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
}

static void hmm_hold_for_a_while(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	mmap_write_lock(t->mm);
	complete(&t->entered);
	schedule_timeout_uninterruptible(HZ / 5);
	t->kept = get_mm_counter_sum(t->mm, MM_ANONPAGES);
	mmap_write_unlock(t->mm);
}

/* The first fault drops the lock of the VMA, so there is none for the next. */
static void hmm_test_unprepared_vma(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long before;
	int ret;

	if (!IS_ENABLED(CONFIG_PER_VMA_LOCK))
		kunit_skip(test, "needs CONFIG_PER_VMA_LOCK");
	hmm_map_fresh(t);
	before = get_mm_counter_sum(t->mm, MM_ANONPAGES);
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;
	INIT_WORK(&t->other, hmm_hold_for_a_while);
	hmm_begin_other(t);

	ret = t->call->fault(&t->range);
	flush_work(&t->other);

	KUNIT_EXPECT_EQ(test, ret, 0);
	KUNIT_EXPECT_EQ(test, t->kept, before);
	hmm_expect_flags(t, 0, HMM_PAGES, HMM_PFN_VALID | HMM_PFN_WRITE);
}

/**
 * struct hmm_due - a fault that has to come next, and what it does
 * @page: of which page
 * @by_vma: it comes with the lock of the VMA, not the mmap lock
 * @tried: it is said to be a second try
 * @ret: %VM_FAULT_RETRY and more, if it drops that lock, or 0 if it maps a page
 * @meanwhile: the page is mapped by somebody else by then
 * @zap: page 0 is taken away
 */
struct hmm_due {
	unsigned long page;
	bool by_vma;
	bool tried;
	vm_fault_t ret;
	bool meanwhile;
	bool zap;
};

/* Pages up to 3 are in one VMA, and the others in the next. */
static const struct hmm_due hmm_dues[] = {
	/* Who wants the mmap lock gets it, and so do those behind him. */
	{ .page = 0, .by_vma = true, .ret = VM_FAULT_RETRY },
	{ .page = 0 },
	{ .page = 1, .ret = VM_FAULT_RETRY, .meanwhile = true },
	{ .page = 2, .ret = VM_FAULT_RETRY },
	{ .page = 2, .tried = true },
	{ .page = 3 },
	/* The next VMA knows nothing of that. Who has waited may do so but once. */
	{ .page = 4, .by_vma = true, .ret = VM_FAULT_RETRY | VM_FAULT_MAJOR,
	  .meanwhile = true },
	{ .page = 5, .by_vma = true },
	{ .page = 6, .by_vma = true, .ret = VM_FAULT_RETRY | VM_FAULT_MAJOR },
	{ .page = 6, .tried = true },
	{ .page = 7, .zap = true },
	/* Nor does the next walk. */
	{ .page = 0, .by_vma = true },
};

static vm_fault_t hmm_handle_due(struct hmm_fixture *t, struct vm_fault *vmf,
				 unsigned long page)
{
	const struct hmm_due *due = &hmm_dues[t->rounds];

	/* What the CPU does meanwhile, and what is one too many. */
	if (!(vmf->flags & FAULT_FLAG_REMOTE) || t->rounds++ >= ARRAY_SIZE(hmm_dues))
		return hmm_handler_map(vmf);

	KUNIT_EXPECT_EQ(t->test, page, due->page);
	KUNIT_EXPECT_EQ_MSG(t->test, !!(vmf->flags & FAULT_FLAG_VMA_LOCK), due->by_vma,
			    "fault %u", t->rounds);
	KUNIT_EXPECT_EQ_MSG(t->test, !!(vmf->flags & FAULT_FLAG_TRIED), due->tried,
			    "fault %u", t->rounds);
	if (due->zap)
		hmm_zap(t, 0, 1);
	if (!due->ret)
		return hmm_handler_map(vmf);
	release_fault_lock(vmf);
	if (due->meanwhile)
		hmm_touch(t, page, 1, false);
	return due->ret;
}

/* Faults have the lock of their VMA, and the mmap lock only where they need it. */
static void hmm_test_fault_locks(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long addr;

	if (!IS_ENABLED(CONFIG_PER_VMA_LOCK))
		kunit_skip(test, "needs CONFIG_PER_VMA_LOCK");
	t->by_vma = true;
	t->handle = hmm_handle_due;
	hmm_map_handler(t);
	addr = kunit_vm_mmap(test, t->file, hmm_addr(t, 4), HMM_SIZE - 4 * PAGE_SIZE,
			     PROT_READ, MAP_SHARED | MAP_FIXED, 4 * PAGE_SIZE);
	KUNIT_ASSERT_EQ(test, addr, hmm_addr(t, 4));
	hmm_ask(t, 0, 8);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_answer(t), 0);
	KUNIT_EXPECT_EQ(test, t->rounds, ARRAY_SIZE(hmm_dues));
	hmm_expect_flags(t, 0, 4, HMM_PFN_VALID | HMM_PFN_WRITE);
	hmm_expect_flags(t, 4, 4, HMM_PFN_VALID);
}

/* The suite */

static struct kunit_case hmm_retry_cases[] = {
	HMM_CASE(stale_sequence),
	HMM_CASE(restart_keeps_requests),
	HMM_CASE(restart_keeps_like_requests),
	HMM_CASE(restart_keeps_each_request),
	HMM_CASE(restart_keeps_outputs),
	HMM_CASE(dropped_lock),
	HMM_CASE(repeated_invalidation),
	HMM_CASE(random_restarts),
	KUNIT_CASE_PARAM(hmm_test_budget, hmm_budget_gen_params),
	KUNIT_CASE_PARAM(hmm_test_each_budget, hmm_budget_gen_params),
	KUNIT_CASE(hmm_test_late_first_walk),
	KUNIT_CASE_SLOW(hmm_test_slow_faults),
	KUNIT_CASE_SLOW(hmm_test_slow_lock),
	HMM_CASE(fatal_signal),
	KUNIT_CASE(hmm_test_killed_waiting),
	KUNIT_CASE_PARAM(hmm_test_held_mmap_lock, hmm_unlocked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_fault_locks, hmm_unlocked_gen_params),
	KUNIT_CASE(hmm_test_reaped_mm),
	KUNIT_CASE_PARAM(hmm_test_dead_mm, hmm_unlocked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_unprepared_vma, hmm_unlocked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_no_memory, hmm_unlocked_gen_params),
	KUNIT_CASE_PARAM(hmm_test_no_memory_needed, hmm_unlocked_gen_params),
	HMM_CASE(first_fault_fails),
	{}
};

static struct kunit_suite hmm_retry_suite = {
	.name = "hmm_retry",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_retry_cases,
};

kunit_test_suite(hmm_retry_suite);
