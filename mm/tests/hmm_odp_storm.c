// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of HMM with several faults at a time on one list
 *
 * Storms have threads fault on parts of a region while another takes pages away
 * from it, and count what the device can reach and must not, and the reverse.
 * Watches have threads look at elements of pages that nobody takes away: nothing
 * but what was found of them may ever be seen there.
 */
#include <kunit/test.h>
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/moduleparam.h>
#include <linux/prandom.h>
#include <linux/random.h>
#include <linux/sched/mm.h>

#include "hmm_odp.h"

static uint seconds = 1;
module_param_named(odp_seconds, seconds, uint, 0644);
MODULE_PARM_DESC(odp_seconds, "how long each storm lasts");

/* So many faults at a time, at most. */
#define HMM_ODP_WALKERS	4U

/* The most memory that a region may have: base pages can be large. */
#define HMM_ODP_MOST	SZ_8M

/**
 * struct hmm_odp_storm - what goes on at the same time on a region
 * @index: the number of the case
 * @memory: what the region is made of
 * @call: which call the driver makes
 * @walkers: how many faults there are at a time
 * @o: the region
 * @first: where what is not watched begins, which is what is taken away
 * @whole: faults are always on all of the region
 * @zaps: how often pages were taken away
 * @protects: how often they became read-only
 * @ignore: bits that are no matter where elements are watched
 * @want: what a watcher has to see, a page each
 * @looks: how many elements were looked at
 * @wrong: how many were not as they have to be
 * @page: the first of those
 * @saw: what was there
 * @tasks: the threads
 * @ntasks: how many those are
 */
struct hmm_odp_storm {
	unsigned int index;
	const struct hmm_odp_memory *memory;
	const struct hmm_odp_call *call;
	unsigned int walkers;
	struct hmm_odp *o;
	unsigned long first;
	bool whole;
	unsigned long zaps;
	unsigned long protects;
	unsigned long ignore;
	unsigned long *want;
	unsigned long looks;
	unsigned long wrong;
	unsigned long page;
	unsigned long saw;
	struct task_struct *tasks[HMM_ODP_WALKERS + 2];
	unsigned int ntasks;
};

/* The ways to run a case */

static const struct hmm_odp_memory *const hmm_odp_memories[] = {
	&hmm_odp_pages,
	&hmm_odp_folios,
#ifdef CONFIG_TRANSPARENT_HUGEPAGE
	&hmm_odp_thp,
#endif
#ifdef CONFIG_HUGETLB_PAGE
	&hmm_odp_hugetlb,
#endif
};

static const void *hmm_odp_storm_gen(const void *prev, char *desc, bool alone)
{
	static struct hmm_odp_storm storm;
	unsigned int nr = alone ? 2 : 1, calls = ARRAY_SIZE(hmm_odp_calls), index;

	for (index = prev ? storm.index + 1 : 0;
	     index < nr * calls * ARRAY_SIZE(hmm_odp_memories); index++) {
		storm = (struct hmm_odp_storm) {
			.index		= index,
			.memory		= hmm_odp_memories[index / nr / calls],
			.call		= &hmm_odp_calls[index / nr % calls],
			.walkers	= index % nr ? HMM_ODP_WALKERS : 1,
		};
		if (hmm_odp_npages(storm.memory) > HMM_ODP_MOST >> PAGE_SHIFT)
			continue;
		snprintf(desc, KUNIT_PARAM_DESC_SIZE, alone ? "%s_%s_%u" : "%s_%s",
			 storm.memory->name, storm.call->name, storm.walkers);
		return &storm;
	}
	return NULL;
}

static const void *hmm_odp_storm_gen_params(struct kunit *test, const void *prev, char *desc)
{
	return hmm_odp_storm_gen(prev, desc, true);
}

static const void *hmm_odp_watch_gen_params(struct kunit *test, const void *prev, char *desc)
{
	return hmm_odp_storm_gen(prev, desc, false);
}

/* Of the ways in which a map can work, the one that finds the most. */
static const struct hmm_dma_way *hmm_odp_best_way(void)
{
	if (IS_ENABLED(CONFIG_IOMMU_DMA))
		return &hmm_dma_ways[HMM_DMA_IN_IOVA];
	if (IS_ENABLED(CONFIG_ARCH_HAS_DMA_OPS))
		return &hmm_dma_ways[HMM_DMA_RECORDED];
	return &hmm_dma_ways[HMM_DMA_STATELESS];
}

/* Threads */

/* The address space stays while there are any. */
static void hmm_odp_start(struct hmm_odp_storm *s, int (*run)(void *), const char *name)
{
	struct task_struct *task = kthread_run(run, s, "hmm_odp_%s", name);

	if (!IS_ERR(task))
		s->tasks[s->ntasks++] = task;
	KUNIT_EXPECT_FALSE(s->o->test, IS_ERR(task));
}

static void hmm_odp_stop(struct hmm_odp_storm *s)
{
	while (s->ntasks)
		kthread_stop(s->tasks[--s->ntasks]);
}

static u32 hmm_odp_below(struct rnd_state *rnd, u32 limit)
{
	return prandom_u32_state(rnd) % limit;
}

static void hmm_odp_seed(struct rnd_state *rnd)
{
	prandom_seed_state(rnd, get_random_u64());
}

/* A part of the region: often one page, and often all. */
static void hmm_odp_pick(const struct hmm_odp_storm *s, struct rnd_state *rnd,
			 unsigned long *page, unsigned long *npages)
{
	unsigned long all = s->o->npages;

	*page = 0;
	*npages = all;
	if (s->whole || !hmm_odp_below(rnd, 4))
		return;
	*page = hmm_odp_below(rnd, all);
	*npages = hmm_odp_below(rnd, 3) ? 1 + hmm_odp_below(rnd, all - *page) : 1;
}

/* The device faults. */
static int hmm_odp_walk_thread(void *data)
{
	struct hmm_odp_storm *s = data;
	unsigned long page, npages;
	struct rnd_state rnd;

	hmm_odp_seed(&rnd);
	while (!kthread_should_stop()) {
		hmm_odp_pick(s, &rnd, &page, &npages);
		hmm_odp_fault(s->o, s->call, page, npages,
			      hmm_odp_below(&rnd, 4) ? HMM_ODP_WRITE : HMM_ODP_READ,
			      HZ / 10 + 1);
		cond_resched();
	}
	return 0;
}

/* Map other memory there, and have the page tables go meanwhile. Returns 0 or an error. */
static int hmm_odp_replace(struct hmm_odp *o, unsigned long page, unsigned long npages)
{
	unsigned long at = hmm_odp_addr(o, page);

	return vm_mmap(NULL, at, npages << PAGE_SHIFT, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, 0) == at ? 0 : -ENOMEM;
}

/* Take away a part of what is not watched, or the right to write it. */
static void hmm_odp_disturb(struct hmm_odp_storm *s, struct rnd_state *rnd)
{
	unsigned long piece = hmm_odp_piece(s->memory), all = s->o->npages - s->first, page, npages;
	struct hmm_odp *o = s->o;
	int ret;

	page = ALIGN_DOWN(hmm_odp_below(rnd, all), piece);
	npages = ALIGN_DOWN(hmm_odp_below(rnd, all - page), piece) + piece;
	if (!hmm_odp_below(rnd, 4)) {
		page = 0;
		npages = all;
	}
	page += s->first;

	if (!o->file && !hmm_odp_below(rnd, 3)) {
		hmm_odp_write_protect(o, page, npages);
		s->protects++;
		return;
	}
	if (s->memory == &hmm_odp_pages && !hmm_odp_below(rnd, 8))
		ret = hmm_odp_replace(o, page, npages);
	else
		ret = hmm_odp_zap(o, page, npages);
	s->zaps += !ret;
	if (!hmm_odp_below(rnd, 4))
		hmm_odp_touch(o, page, hmm_odp_below(rnd, 2));
}

/* Calls come to an end between two of these, and are disturbed now and then. */
static void hmm_odp_pause(struct rnd_state *rnd)
{
	if (hmm_odp_below(rnd, 8))
		udelay(hmm_odp_below(rnd, 100));
	else
		usleep_range(50, 100);
	cond_resched();
}

static int hmm_odp_zap_thread(void *data)
{
	struct hmm_odp_storm *s = data;
	struct rnd_state rnd;

	hmm_odp_seed(&rnd);
	kthread_use_mm(s->o->mm);
	while (!kthread_should_stop()) {
		hmm_odp_disturb(s, &rnd);
		if (!hmm_odp_below(&rnd, 16))
			hmm_odp_compare(s->o);
		hmm_odp_pause(&rnd);
	}
	kthread_unuse_mm(s->o->mm);
	return 0;
}

/* Storms */

static struct hmm_odp_storm *hmm_odp_storm_begin(struct kunit *test)
{
	struct hmm_odp_storm *s = kunit_kzalloc(test, sizeof(*s), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, s);
	*s = *(const struct hmm_odp_storm *)test->param_value;
	s->o = hmm_odp_create(test, hmm_odp_best_way(), s->memory);
	return s;
}

/* Has enough been done to call it a storm? */
static bool hmm_odp_is_storm(const struct hmm_odp_storm *s)
{
	const struct hmm_odp_counts *counts = &s->o->counts;
	bool enough;

	mutex_lock(&s->o->lock);
	enough = counts->calls > 10;
	if (s->first < s->o->npages)
		enough &= counts->unmapped > 10;
	mutex_unlock(&s->o->lock);
	return enough;
}

/*
 * A kernel that checks itself takes longer to do as much. On one processor, not much
 * more can happen however long it takes.
 */
static void hmm_odp_wait(const struct hmm_odp_storm *s, unsigned int share)
{
	unsigned int tries = 20;

	do {
		msleep(seconds * MSEC_PER_SEC / share / (num_online_cpus() == 1 ? 4 : 1));
	} while (!hmm_odp_is_storm(s) && --tries);
	KUNIT_EXPECT_GT_MSG(s->o->test, tries, 0, "it was no storm");
}

/* From here to hmm_odp_stop() no assertion may end the test. */
static void hmm_odp_start_walkers(struct hmm_odp_storm *s)
{
	unsigned int i;

	for (i = 0; i < s->walkers; i++)
		hmm_odp_start(s, hmm_odp_walk_thread, s->call->name);
}

static void hmm_odp_say(const struct hmm_odp_storm *s)
{
	const struct hmm_odp_counts *c = &s->o->counts;

	kunit_info(s->o->test,
		   "%lu calls, %lu zaps, %lu protected, %lu pages mapped, %lu unmapped, %lu dirtied\n",
		   c->calls, s->zaps, s->protects, c->mapped, c->unmapped, c->dirtied);
	kunit_info(s->o->test,
		   "stale %lu, lost %lu, undirtied %lu, other %lu, unmet %lu, revived %lu, unlike %lu\n",
		   c->stale, c->lost, c->undirtied, c->other, c->unmet, c->revived, c->unlike);
}

static void hmm_odp_test_storm(struct kunit *test)
{
	struct hmm_odp_storm *s = hmm_odp_storm_begin(test);
	const struct hmm_odp_counts *counts = &s->o->counts;

	hmm_odp_start_walkers(s);
	hmm_odp_start(s, hmm_odp_zap_thread, "zap");
	hmm_odp_wait(s, 1);
	hmm_odp_stop(s);

	hmm_odp_compare(s->o);
	hmm_odp_say(s);
	hmm_odp_expect_right(s->o);
	KUNIT_EXPECT_EQ(test, counts->errors, 0);
	KUNIT_EXPECT_EQ(test, hmm_odp_zap(s->o, 0, s->o->npages), 0);
	hmm_odp_expect_right(s->o);
}

/* Watches */

/* All but the bits to ignore has to be as ever. */
static void hmm_odp_look(struct hmm_odp_storm *s, unsigned long page)
{
	unsigned long saw = hmm_odp_element(s->o, page);

	s->looks++;
	if (!((saw ^ s->want[page]) & ~s->ignore) || s->wrong++)
		return;
	s->page = page;
	s->saw = saw;
}

static int hmm_odp_watch_thread(void *data)
{
	struct hmm_odp_storm *s = data;
	unsigned long page;

	while (!kthread_should_stop()) {
		for (page = 0; page < s->first; page++)
			hmm_odp_look(s, page);
		cond_resched();
	}
	return 0;
}

/*
 * Have the first @first pages watched, which the device has, while calls are made
 * for them again and again.
 */
static struct hmm_odp_storm *hmm_odp_watch_begin(struct kunit *test)
{
	struct hmm_odp_storm *s = hmm_odp_storm_begin(test);
	unsigned long page;
	int ret;

	s->want = kunit_kcalloc(test, s->o->npages, sizeof(*s->want), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, s->want);
	/* Sticky bits may go when there are two walks on an element, and nothing else may. */
	s->ignore = HMM_ODP_STICKY;
	/* Where each call joins the same, each finds the same order. */
	s->whole = s->memory == &hmm_odp_folios;
	s->walkers = 2;
	ret = hmm_odp_fault(s->o, s->call, 0, s->o->npages, HMM_ODP_WRITE, 0);
	KUNIT_ASSERT_EQ(test, ret, 0);
	for (page = 0; page < s->o->npages; page++) {
		s->want[page] = hmm_odp_element(s->o, page);
		KUNIT_ASSERT_TRUE(test, s->want[page] & HMM_PFN_VALID);
	}
	return s;
}

static void hmm_odp_watch_run(struct hmm_odp_storm *s)
{
	struct kunit *test = s->o->test;

	hmm_odp_start_walkers(s);
	hmm_odp_start(s, hmm_odp_watch_thread, "watch");
	if (s->first < s->o->npages)
		hmm_odp_start(s, hmm_odp_zap_thread, "zap");
	hmm_odp_wait(s, 3);
	hmm_odp_stop(s);

	hmm_odp_say(s);
	kunit_info(test, "%lu looks, %lu of them wrong\n", s->looks, s->wrong);
	KUNIT_EXPECT_EQ_MSG(test, s->wrong, 0, "element %lu was %#lx, and is %#lx", s->page,
			    s->saw, s->want[s->page]);
	KUNIT_EXPECT_GT(test, s->looks, s->first);
	hmm_odp_expect_right(s->o);
}

static void hmm_odp_test_watch_calls(struct kunit *test)
{
	struct hmm_odp_storm *s = hmm_odp_watch_begin(test);

	s->first = s->o->npages;
	hmm_odp_watch_run(s);
}

/* What is taken away is the second half. A huge page goes as a whole. */
static void hmm_odp_test_watch_restarts(struct kunit *test)
{
	struct hmm_odp_storm *s = hmm_odp_watch_begin(test);

	s->first = s->o->npages / 2;
	/* Steps that are made shorter may end inside of a folio. */
	if (s->whole && s->call == &hmm_odp_calls[HMM_ODP_EACH])
		s->ignore |= HMM_ODP_ORDERS;
	hmm_odp_watch_run(s);
}

/* The suite */

static struct kunit_case hmm_odp_storm_cases[] = {
	KUNIT_CASE_PARAM(hmm_odp_test_watch_calls, hmm_odp_watch_gen_params),
	KUNIT_CASE_PARAM(hmm_odp_test_watch_restarts, hmm_odp_watch_gen_params),
	KUNIT_CASE_PARAM_ATTR(hmm_odp_test_storm, hmm_odp_storm_gen_params,
			      { .speed = KUNIT_SPEED_SLOW }),
	{}
};

static struct kunit_suite hmm_odp_storm_suite = {
	.name = "hmm_odp_storm",
	.suite_init = hmm_dma_suite_init,
	.suite_exit = hmm_dma_suite_exit,
	.init = hmm_odp_init,
	.exit = hmm_odp_exit,
	.test_cases = hmm_odp_storm_cases,
};

kunit_test_suite(hmm_odp_storm_suite);
