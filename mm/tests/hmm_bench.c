// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Benchmark of hmm_range_fault(), as a KUnit suite
 *
 * Each workload is a piece of memory and a way to ask for it. Where the kernel
 * was built with HMM_PEER, a second implementation is in it, and the two are
 * measured in turn on the very same memory. One line of output is one
 * measurement; what becomes of them is up to the reader.
 *
 * Besides, what is stored has to be right, and no call may fail.
 */
#include <linux/file.h>
#include <linux/hmm.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/sched.h>

#include "hmm_bench.h"

static unsigned int turns = 7;
module_param(turns, uint, 0644);
MODULE_PARM_DESC(turns, "How often each side is measured");

static unsigned int fault_turns = 41;
module_param(fault_turns, uint, 0644);
MODULE_PARM_DESC(fault_turns, "The same for faults, whose time varies much more");

static unsigned long pages = 16384;
module_param(pages, ulong, 0644);
MODULE_PARM_DESC(pages, "Pages of a range that is looked up");

static unsigned long fault_pages = 16384;
module_param(fault_pages, ulong, 0644);
MODULE_PARM_DESC(fault_pages, "Pages of a range that is faulted in");

static unsigned long wait_pages = 65536;
module_param(wait_pages, ulong, 0644);
MODULE_PARM_DESC(wait_pages, "Pages of the largest range whose faults drop the lock");

static unsigned long peer_wait_pages = 16384;
module_param(peer_wait_pages, ulong, 0644);
MODULE_PARM_DESC(peer_wait_pages, "The same, for the peer, which may take quadratic time");

static unsigned int min_us = 20000;
module_param(min_us, uint, 0644);
MODULE_PARM_DESC(min_us, "How long a measurement takes at least");

static unsigned int disturbed_us = 50000;
module_param(disturbed_us, uint, 0644);
MODULE_PARM_DESC(disturbed_us, "The same, with other threads about");

/* The sides */

enum { HMM_BENCH_OURS, HMM_BENCH_BASE };

static const struct hmm_bench_side hmm_bench_sides[] = {
	[HMM_BENCH_OURS] = {
		"ours", hmm_range_fault, hmm_range_fault_unlocked_timeout,
		hmm_range_fault_each
	},
#ifdef HMM_BENCH_PEER
	[HMM_BENCH_BASE] = {
		"base", hmm_peer_range_fault, hmm_peer_range_fault_unlocked_timeout
	},
#endif
};

/* The workloads */

static const struct hmm_bench_work hmm_bench_works[] = {
	/* Snapshots */
	{
		.name = "empty",
		.map = hmm_bench_map_empty,
	}, {
		.name = "empty-unlocked",
		.map = hmm_bench_map_empty,
		.way = HMM_BENCH_UNLOCKED,
	}, {
		.name = "half",
		.map = hmm_bench_map_half,
		.want = HMM_WRITE,
		.half = true,
	}, {
		.name = "populated",
		.map = hmm_bench_map_full,
		.want = HMM_WRITE,
	}, {
		.name = "populated-unlocked",
		.map = hmm_bench_map_full,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
	}, {
		.name = "populated-each",
		.map = hmm_bench_map_full,
		.want = HMM_WRITE,
		.way = HMM_BENCH_EACH,
	}, {
		.name = "thousand-vmas",
		.map = hmm_bench_map_pieces,
		.want = HMM_WRITE,
	},

	/* Requests of what is there */
	{
		.name = "read-met",
		.map = hmm_bench_map_full,
		.default_flags = HMM_READ,
		.want = HMM_WRITE,
	}, {
		.name = "write-met",
		.map = hmm_bench_map_full,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
	}, {
		.name = "write-met-unlocked",
		.map = hmm_bench_map_full,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
	}, {
		.name = "write-met-each",
		.map = hmm_bench_map_full,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.way = HMM_BENCH_EACH,
	}, {
		.name = "read-met-mask",
		.map = hmm_bench_map_full,
		.fill = HMM_READ,
		.want = HMM_WRITE,
	}, {
		.name = "write-met-mask",
		.map = hmm_bench_map_full,
		.fill = HMM_WRITE,
		.want = HMM_WRITE,
	}, {
		.name = "write-met-mask-unlocked",
		.map = hmm_bench_map_full,
		.fill = HMM_WRITE,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
	}, {
		.name = "mixed-met-mask-unlocked",
		.map = hmm_bench_map_full,
		.fill = HMM_WRITE,
		.mixed = true,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
	}, {
		.name = "mixed-met-mask-each",
		.map = hmm_bench_map_full,
		.fill = HMM_WRITE,
		.mixed = true,
		.want = HMM_WRITE,
		.way = HMM_BENCH_EACH,
	},

	/* Other kinds of entries */
	{
		.name = "thp",
		.map = hmm_bench_map_thp,
		.order = PMD_SHIFT - PAGE_SHIFT,
		.want = HMM_WRITE,
	}, {
		.name = "thp-write-met",
		.map = hmm_bench_map_thp,
		.order = PMD_SHIFT - PAGE_SHIFT,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
	}, {
		.name = "thp-each",
		.map = hmm_bench_map_thp,
		.order = PMD_SHIFT - PAGE_SHIFT,
		.want = HMM_WRITE,
		.way = HMM_BENCH_EACH,
	}, {
		.name = "hugetlb",
		.map = hmm_bench_map_hugetlb,
		.order = PMD_SHIFT - PAGE_SHIFT,
		.want = HMM_WRITE,
	}, {
		.name = "hugetlb-write-met",
		.map = hmm_bench_map_hugetlb,
		.order = PMD_SHIFT - PAGE_SHIFT,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
	}, {
		.name = "mthp-64k",
		.map = hmm_bench_map_mthp,
		.order = 16 - PAGE_SHIFT,
		.want = HMM_WRITE,
	}, {
		.name = "device-private",
		.map = hmm_bench_map_device,
		.unmap = hmm_bench_unmap_device,
		.want = HMM_WRITE,
	},

	/* Faults */
	{
		.name = "read-cold",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap,
		.default_flags = HMM_READ,
		.want = HMM_READ,
		.due = 1,
	}, {
		.name = "write-cold",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 1,
	}, {
		.name = "write-cold-mask",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap,
		.fill = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 1,
	}, {
		.name = "write-cold-each",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 1,
		.way = HMM_BENCH_EACH,
	}, {
		.name = "write-after-read",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap_and_read,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 1,
	}, {
		.name = "half-rest",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap_and_write_half,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 2,
	}, {
		.name = "waiting",
		.map = hmm_bench_map_waiting,
		.reset = hmm_bench_zap,
		.sizes = HMM_BENCH_GROWING,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.due = 1,
		.way = HMM_BENCH_UNLOCKED,
	},

	/* Company */
	{
		.name = "disturbed",
		.map = hmm_bench_map_full,
		.sizes = HMM_BENCH_LARGE_CALLS,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
		.beside = hmm_bench_map_beside,
		.period_us = 1000,
	}, {
		.name = "threads-disturbed",
		.map = hmm_bench_map_empty,
		.reset = hmm_bench_zap,
		.run = hmm_bench_run_threads,
		.sizes = HMM_BENCH_LARGE_CALLS,
		.default_flags = HMM_WRITE,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
		.beside = hmm_bench_map_beside,
		.period_us = 100000,
	}, {
		.name = "one-table",
		.map = hmm_bench_map_table,
		.run = hmm_bench_run_alike,
		.repeat = 8192,
		.sizes = HMM_BENCH_HALF_TABLE,
		.want = HMM_WRITE,
		.beside = hmm_bench_fault_beside,
	}, {
		.name = "one-table-unlocked",
		.map = hmm_bench_map_table,
		.run = hmm_bench_run_alike,
		.repeat = 8192,
		.sizes = HMM_BENCH_HALF_TABLE,
		.want = HMM_WRITE,
		.way = HMM_BENCH_UNLOCKED,
		.beside = hmm_bench_fault_beside,
	},
};

KUNIT_ARRAY_PARAM_DESC(hmm_bench_work, hmm_bench_works, name);

/* Asking */

static struct hmm_bench *hmm_bench_of(struct hmm_range *range)
{
	return container_of(range->notifier, struct hmm_bench, notifier);
}

static void hmm_bench_lock(struct hmm_range *range)
{
	mutex_lock(&hmm_bench_of(range)->lock);
}

static void hmm_bench_unlock(struct hmm_range *range)
{
	mutex_unlock(&hmm_bench_of(range)->lock);
}

static int hmm_bench_commit(struct hmm_range *range, unsigned long start, unsigned long end)
{
	hmm_bench_of(range)->committed += (end - start) >> PAGE_SHIFT;
	return 0;
}

static const struct hmm_commit_ops hmm_bench_commit_ops = {
	.lock	= hmm_bench_lock,
	.unlock	= hmm_bench_unlock,
	.commit	= hmm_bench_commit,
};

/* Have the elements ask for what they are to ask for. */
static void hmm_bench_fill(const struct hmm_bench *b, struct hmm_range *range)
{
	unsigned long addr = range->start;
	unsigned long *element = range->hmm_pfns;

	if (!b->work->fill)
		return;
	for (; addr < range->end; addr += PAGE_SIZE)
		*element++ = b->work->mixed && addr & PAGE_SIZE ? HMM_READ : b->work->fill;
}

/* As a driver does it that has no hmm_range_fault_each(). */
static int hmm_bench_call_and_commit(struct hmm_bench *b, struct hmm_range *range)
{
	bool stale;
	int ret;

	for (;;) {
		ret = b->side->fault_unlocked(range, 0);
		if (ret)
			return ret;
		hmm_bench_lock(range);
		stale = mmu_interval_read_retry(range->notifier, range->notifier_seq);
		if (!stale)
			ret = hmm_bench_commit(range, range->start, range->end);
		hmm_bench_unlock(range);
		if (!stale)
			return ret;
		hmm_bench_fill(b, range);
	}
}

static int hmm_bench_call_locked(struct hmm_bench *b, struct hmm_range *range)
{
	int ret;

	for (;;) {
		ret = b->side->fault(range);
		if (ret != -EBUSY)
			return ret;
		range->notifier_seq = mmu_interval_read_begin(range->notifier);
	}
}

static int hmm_bench_call(struct hmm_bench *b, struct hmm_range *range)
{
	switch (b->work->way) {
	case HMM_BENCH_LOCKED:
		break;
	case HMM_BENCH_UNLOCKED:
		return b->side->fault_unlocked(range, 0);
	case HMM_BENCH_EACH:
		if (!b->side->fault_each)
			return hmm_bench_call_and_commit(b, range);
		return b->side->fault_each(range, 0, &hmm_bench_commit_ops);
	}
	return hmm_bench_call_locked(b, range);
}

/* Ask for pages [@first, @end), in calls of @b->call, with an element for each in @pfns. */
int hmm_bench_ask(struct hmm_bench *b, unsigned long *pfns, unsigned long first,
		  unsigned long end)
{
	struct hmm_range range = {
		.notifier	   = &b->notifier,
		.default_flags	   = b->work->default_flags,
		.pfn_flags_mask	   = b->work->fill,
		.dev_private_owner = b->owner,
	};
	bool locked = b->work->way == HMM_BENCH_LOCKED;
	unsigned long page;
	int ret = 0;

	if (locked) {
		range.notifier_seq = mmu_interval_read_begin(range.notifier);
		mmap_read_lock(b->mm);
	}
	for (page = first; page < end && !ret; page += b->call) {
		range.start = b->start + (page << PAGE_SHIFT);
		range.end = b->start + (min(page + b->call, end) << PAGE_SHIFT);
		range.hmm_pfns = pfns + page - first;
		ret = hmm_bench_call(b, &range);
	}
	if (locked)
		mmap_read_unlock(b->mm);
	return ret;
}

/* Measuring */

/**
 * struct hmm_bench_score - what came of the rounds of a measurement
 * @ns: how long they took
 * @best: how long the fastest took, which was disturbed least
 * @pages: how many pages were asked for
 * @faults: how many faults this thread handled
 * @others: how often another thread mapped and unmapped memory meanwhile
 * @others_ns: how long that took it
 */
struct hmm_bench_score {
	u64 ns;
	u64 best;
	unsigned long pages;
	unsigned long faults;
	unsigned long others;
	u64 others_ns;
};

static unsigned long hmm_bench_faults(void)
{
	return current->min_flt + current->maj_flt;
}

static int hmm_bench_round(struct hmm_bench *b, struct hmm_bench_score *score)
{
	const struct hmm_bench_work *work = b->work;
	struct hmm_range all = {
		.start	  = b->start,
		.end	  = b->start + (b->pages << PAGE_SHIFT),
		.hmm_pfns = b->pfns,
	};
	unsigned long faults;
	u64 began, took;
	int ret;

	if (work->reset && !work->reset(b))
		return -ENOMEM;
	hmm_bench_fill(b, &all);

	faults = hmm_bench_faults();
	began = ktime_get_ns();
	ret = work->run ? work->run(b) : hmm_bench_ask(b, b->pfns, 0, b->pages);
	took = ktime_get_ns() - began;
	score->ns += took;
	score->best = score->best ? min(score->best, took) : took;
	score->faults += hmm_bench_faults() - faults;
	score->pages += b->pages * (work->repeat ?: 1);
	return ret;
}

/* Repeat the round for so long that one or another is not disturbed. */
static int hmm_bench_rounds(struct hmm_bench *b, struct hmm_bench_score *score)
{
	unsigned int us = b->work->beside ? max(disturbed_us, 4 * b->work->period_us) : min_us;
	int ret;

	do {
		ret = hmm_bench_round(b, score);
	} while (!ret && score->ns < (u64)us * NSEC_PER_USEC);
	return ret;
}

static void hmm_bench_report(struct hmm_bench *b, unsigned int turn,
			     const struct hmm_bench_score *score)
{
	kunit_info(b->test,
		   "hmm_bench: workload=%s call=%lu side=%s turn=%u ns=%llu best=%llu pages=%lu range=%lu faults=%lu others=%lu others_ns=%llu\n",
		   b->work->name, b->call, b->side->name, turn, score->ns, score->best,
		   score->pages, b->pages, score->faults, score->others, score->others_ns);
}

static int hmm_bench_measure(struct hmm_bench *b, unsigned int turn)
{
	struct hmm_bench_score score = {};
	struct hmm_bench_other *other;
	int ret;

	if (!b->work->beside) {
		ret = hmm_bench_rounds(b, &score);
	} else {
		other = hmm_bench_disturb(b);
		if (!other)
			return -ENOMEM;
		ret = hmm_bench_rounds(b, &score);
		score.others = hmm_bench_calm(other, &score.others_ns);
	}
	if (!ret)
		hmm_bench_report(b, turn, &score);
	return ret;
}

/* Checking */

/* A page that is not there has no folio, and one of the zero page is small. */
static bool hmm_bench_right(const struct hmm_bench *b, unsigned long page)
{
	unsigned long want = b->work->half && page & 1 ? 0 : b->work->want;
	unsigned long out = b->pfns[page];

	if ((out & (HMM_WRITE | HMM_PFN_ERROR)) != want)
		return false;
	return !want || folio_order(page_folio(hmm_pfn_to_page(out))) == b->work->order;
}

/*
 * A round that is not measured. Both sides have to find what is there; that
 * nothing is faulted that was there before, only one promises.
 */
static int hmm_bench_check(struct hmm_bench *b)
{
	const struct hmm_bench_work *work = b->work;
	struct hmm_bench_score score = {};
	unsigned long page;
	int ret;

	b->committed = 0;
	ret = hmm_bench_round(b, &score);
	if (ret)
		return ret;
	if (work->way == HMM_BENCH_EACH)
		KUNIT_EXPECT_EQ(b->test, b->committed, b->pages);
	for (page = 0; page < b->pages && hmm_bench_right(b, page); page++)
		;
	KUNIT_EXPECT_EQ_MSG(b->test, page, b->pages, "%s, calls of %lu: %s stored %#lx",
			    work->name, b->call, b->side->name,
			    page < b->pages ? b->pfns[page] : 0);
	if (work->due && b->side == &hmm_bench_sides[HMM_BENCH_OURS])
		KUNIT_EXPECT_EQ(b->test, score.faults, b->pages / work->due);
	return 0;
}

/* Comparing */

static bool hmm_bench_takes_part(const struct hmm_bench *b, unsigned int side)
{
	return side == HMM_BENCH_OURS || b->work->sizes != HMM_BENCH_GROWING ||
	       b->pages <= peer_wait_pages;
}

/* How often each side is measured, not counting the check. */
static unsigned int hmm_bench_turns(const struct hmm_bench_work *work)
{
	return work->reset && work->sizes != HMM_BENCH_GROWING ? fault_turns : turns;
}

/* The sides take turns, so that what disturbs for a while disturbs both. */
static int hmm_bench_compare(struct hmm_bench *b)
{
	unsigned int turn, side, last = hmm_bench_turns(b->work);
	int ret;

	for (turn = 0; turn <= last; turn++) {
		for (side = 0; side < ARRAY_SIZE(hmm_bench_sides); side++) {
			if (!hmm_bench_takes_part(b, side))
				continue;
			b->side = &hmm_bench_sides[side];
			ret = turn ? hmm_bench_measure(b, turn) : hmm_bench_check(b);
			KUNIT_EXPECT_EQ_MSG(b->test, ret, 0, "%s, calls of %lu: %s failed",
					    b->work->name, b->call, b->side->name);
			if (ret)
				return ret;
		}
	}
	return 0;
}

static void hmm_bench_compare_calls(struct hmm_bench *b)
{
	static const unsigned long calls[] = { 1, 16, 512, ULONG_MAX };
	static const unsigned int first[] = {
		[HMM_BENCH_CALLS]	= 0,
		[HMM_BENCH_LARGE_CALLS]	= 2,
		[HMM_BENCH_HALF_TABLE]	= 3,
	};
	unsigned int i = first[b->work->sizes];

	b->pages = b->room;
	for (; i < ARRAY_SIZE(calls); i++) {
		b->call = min(calls[i], b->pages);
		if (hmm_bench_compare(b))
			return;
	}
}

static void hmm_bench_compare_growing(struct hmm_bench *b)
{
	unsigned long n;

	for (n = b->room / 16; n <= b->room; n *= 4) {
		b->pages = n;
		b->call = n;
		if (hmm_bench_compare(b))
			return;
	}
}

static bool hmm_bench_invalidate(struct mmu_interval_notifier *notifier,
				 const struct mmu_notifier_range *range, unsigned long seq)
{
	struct hmm_bench *b = container_of(notifier, struct hmm_bench, notifier);

	if (!mmu_notifier_range_blockable(range))
		return false;
	mutex_lock(&b->lock);
	mmu_interval_set_seq(notifier, seq);
	mutex_unlock(&b->lock);
	return true;
}

static const struct mmu_interval_notifier_ops hmm_bench_notifier_ops = {
	.invalidate = hmm_bench_invalidate,
};

static int hmm_bench_watch(struct hmm_bench *b)
{
	return mmu_interval_notifier_insert(&b->notifier, b->mm, b->start,
					    b->room << PAGE_SHIFT, &hmm_bench_notifier_ops);
}

static unsigned long hmm_bench_room(const struct hmm_bench_work *work)
{
	if (work->sizes == HMM_BENCH_GROWING)
		return wait_pages;
	if (work->sizes == HMM_BENCH_HALF_TABLE)
		return PTRS_PER_PTE / 2;
	return work->reset ? fault_pages : pages;
}

static void hmm_bench_measure_all(struct hmm_bench *b)
{
	bool mapped = b->work->map(b);

	KUNIT_EXPECT_TRUE_MSG(b->test, mapped, "the memory could not be mapped");
	if (!mapped)
		return;
	KUNIT_ASSERT_EQ(b->test, hmm_bench_watch(b), 0);
	if (b->work->sizes == HMM_BENCH_GROWING)
		hmm_bench_compare_growing(b);
	else
		hmm_bench_compare_calls(b);
	mmu_interval_notifier_remove(&b->notifier);
}

static void hmm_bench_run(struct kunit *test)
{
	const struct hmm_bench_work *work = test->param_value;
	struct hmm_bench *b = test->priv;

	if (!work->map)
		kunit_skip(test, "this kernel has no such memory");
	b->work = work;
	b->room = hmm_bench_room(work);
	b->pfns = kvcalloc(b->room, sizeof(*b->pfns), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, b->pfns);
	KUNIT_ASSERT_EQ(test, kunit_attach_mm(), 0);
	b->mm = current->mm;
	hmm_bench_measure_all(b);
	if (work->unmap)
		work->unmap(b);
}

/* The suite */

static int hmm_bench_init(struct kunit *test)
{
	struct hmm_bench *b = kunit_kzalloc(test, sizeof(*b), GFP_KERNEL);

	if (!b)
		return -ENOMEM;
	b->test = test;
	mutex_init(&b->lock);
	test->priv = b;
	return 0;
}

static void hmm_bench_exit(struct kunit *test)
{
	struct hmm_bench *b = test->priv;

	if (!b)
		return;
	if (b->file)
		fput(b->file);
	kvfree(b->waited);
	kvfree(b->pfns);
}

static struct kunit_case hmm_bench_cases[] = {
	KUNIT_CASE_PARAM_ATTR(hmm_bench_run, hmm_bench_work_gen_params,
			      { .speed = KUNIT_SPEED_VERY_SLOW }),
	{}
};

static struct kunit_suite hmm_bench_suite = {
	.name = "hmm_bench",
	.init = hmm_bench_init,
	.exit = hmm_bench_exit,
	.test_cases = hmm_bench_cases,
};

kunit_test_suite(hmm_bench_suite);
