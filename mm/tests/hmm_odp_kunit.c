// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of HMM with a driver that is built as RDMA's on-demand paging is
 *
 * These go step by step: pages are taken away, restarts are made and errors
 * come at chosen moments. After each step, what the device can reach is compared
 * with the page tables.
 */
#include <kunit/test.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/workqueue.h>

#include "hmm_odp.h"

/*
 * What the device faults on, and two pages of that with some between them. They
 * have one page table, and so they are in one step of hmm_range_fault_each().
 */
#define HMM_ODP_SPAN	64UL
#define HMM_ODP_EARLY	40UL
#define HMM_ODP_LATE	60UL
#define HMM_ODP_BETWEEN	(HMM_ODP_LATE - HMM_ODP_EARLY - 1)

/**
 * struct hmm_odp_step - a way in which a case runs
 * @index: the number of that way
 * @call: which call the driver makes
 * @way: how its map works
 */
struct hmm_odp_step {
	unsigned int index;
	const struct hmm_odp_call *call;
	const struct hmm_dma_way *way;
};

/* The ways that this kernel has: nothing is skipped. */
static const struct hmm_dma_way *const hmm_odp_ways[] = {
	&hmm_dma_ways[HMM_DMA_STATELESS],
#ifdef CONFIG_ARCH_HAS_DMA_OPS
	&hmm_dma_ways[HMM_DMA_RECORDED],
#endif
#ifdef CONFIG_IOMMU_DMA
	&hmm_dma_ways[HMM_DMA_IN_IOVA],
#endif
};

static const void *hmm_odp_step_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_odp_step step;
	unsigned int index = prev ? step.index + 1 : 0;

	if (index == ARRAY_SIZE(hmm_odp_ways) * ARRAY_SIZE(hmm_odp_calls))
		return NULL;
	step.index = index;
	step.call = &hmm_odp_calls[index % ARRAY_SIZE(hmm_odp_calls)];
	step.way = hmm_odp_ways[index / ARRAY_SIZE(hmm_odp_calls)];
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%s_%s", step.call->name, step.way->name);
	return &step;
}

/**
 * struct hmm_odp_plan - what the first fault of a page does besides
 * @at: that page
 * @zap: first page that it takes away
 * @nzap: how many of them
 * @fails: page whose faults fail, once @at was faulted
 * @error: how they do
 * @faulted: how often @at was
 * @gate: takes a page away that nobody asks for
 * @passed: the fault of @at is over
 * @o: the region
 */
struct hmm_odp_plan {
	unsigned long at;
	unsigned long zap;
	unsigned long nzap;
	unsigned long fails;
	vm_fault_t error;
	unsigned int faulted;
	struct work_struct gate;
	struct completion passed;
	struct hmm_odp *o;
};

/* A region whose faults go by @plan. */
static struct hmm_odp *hmm_odp_begin(struct kunit *test, struct hmm_odp_plan *plan)
{
	const struct hmm_odp_step *step = test->param_value;
	struct hmm_odp *o = hmm_odp_create(test, step->way, &hmm_odp_handled);

	*plan = (struct hmm_odp_plan) {
		.at	= ULONG_MAX,
		.fails	= ULONG_MAX,
		.o	= o,
	};
	init_completion(&plan->passed);
	o->plan = plan;
	return o;
}

static int hmm_odp_ask(struct hmm_odp *o, unsigned long page, unsigned long npages,
		       unsigned long request)
{
	const struct hmm_odp_step *step = o->test->param_value;

	return hmm_odp_fault(o, step->call, page, npages, request, 10 * HZ);
}

/* The device reaches these pages, and may write them, or not. */
static void hmm_odp_expect_reached(struct hmm_odp *o, unsigned long page,
				   unsigned long npages, bool writable)
{
	unsigned long end = page + npages;

	for (; page < end; page++) {
		KUNIT_ASSERT_NOT_NULL(o->test, hmm_odp_reach(o, page));
		KUNIT_ASSERT_EQ(o->test, o->table[page].writable, writable);
	}
}

static void hmm_odp_expect_unreached(struct hmm_odp *o, unsigned long page,
				     unsigned long npages)
{
	unsigned long end = page + npages;

	for (; page < end; page++)
		KUNIT_ASSERT_NULL(o->test, hmm_odp_reach(o, page));
}

/* Elements of pages that the device has, and that nobody took away. */
static void hmm_odp_expect_kept(struct hmm_odp *o, unsigned long page, unsigned long npages)
{
	unsigned long end = page + npages;

	for (; page < end; page++)
		if (!(hmm_odp_element(o, page) & HMM_PFN_VALID))
			break;
	KUNIT_EXPECT_EQ_MSG(o->test, page, end, "element %lu is %#lx", page,
			    page < end ? hmm_odp_element(o, page) : 0);
}

/* Take pages away, and see that the device cannot reach them any more. */
static void hmm_odp_expect_zapped(struct hmm_odp *o, unsigned long page,
				  unsigned long npages)
{
	KUNIT_EXPECT_EQ(o->test, hmm_odp_zap(o, page, npages), 0);
	hmm_odp_expect_right(o);
	hmm_odp_expect_unreached(o, page, npages);
}

/* Without anything in between */

static void hmm_odp_test_fault_and_zap(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);

	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	hmm_odp_expect_reached(o, 0, HMM_ODP_SPAN, true);
	hmm_odp_expect_right(o);
	hmm_odp_expect_zapped(o, HMM_ODP_EARLY, 10);
	hmm_odp_expect_reached(o, HMM_ODP_EARLY + 10, 1, true);

	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	hmm_odp_expect_reached(o, 0, HMM_ODP_SPAN, true);
	hmm_odp_expect_right(o);
	hmm_odp_expect_zapped(o, 0, o->npages);
}

/* What the device has stays where it is, and may be written when that was asked for. */
static void hmm_odp_test_read_then_write(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	struct page *page;

	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_READ), 0);
	hmm_odp_expect_right(o);
	page = hmm_odp_reach(o, 3);
	KUNIT_ASSERT_NOT_NULL(test, page);
	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	KUNIT_EXPECT_PTR_EQ(test, hmm_odp_reach(o, 3), page);
	hmm_odp_expect_reached(o, 0, HMM_ODP_SPAN, true);
	hmm_odp_expect_right(o);

	hmm_odp_expect_zapped(o, 3, 5);
	KUNIT_EXPECT_EQ(test, o->counts.dirtied, 5);
}

/* A call that asks for nothing maps what is there. */
static void hmm_odp_test_snapshot(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	unsigned long page;

	for (page = 0; page < HMM_ODP_SPAN; page += 2)
		KUNIT_ASSERT_EQ(test, hmm_odp_touch(o, page, true), 0);
	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, 0), 0);
	for (page = 0; page < HMM_ODP_SPAN; page += 2)
		hmm_odp_expect_unreached(o, page + 1, 1);
	hmm_odp_expect_right(o);
	KUNIT_EXPECT_EQ(test, o->counts.mapped, HMM_ODP_SPAN / 2);
	hmm_odp_expect_zapped(o, 0, HMM_ODP_SPAN);
}

/*
 * Two walks on one element may lose a sticky bit. The map knows by itself what is
 * mapped, and the callback unmaps it.
 */
static void hmm_odp_test_sticky_lost(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	unsigned long page;

	KUNIT_ASSERT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	mutex_lock(&o->lock);
	for (page = 0; page < 8; page++)
		WRITE_ONCE(o->map.pfn_list[page], hmm_odp_element(o, page) & ~HMM_ODP_STICKY);
	mutex_unlock(&o->lock);
	hmm_odp_expect_zapped(o, 0, 8);
}

/* Restarts */

static vm_fault_t hmm_odp_handle_plan(struct hmm_odp *o, struct vm_fault *vmf,
				      unsigned long page)
{
	struct hmm_odp_plan *plan = o->plan;

	if (page == plan->fails && plan->faulted)
		return plan->error;
	if (page == plan->at && !plan->faulted++) {
		/* What the walk has passed is as it was. */
		hmm_odp_expect_kept(o, 0, HMM_ODP_EARLY);
		if (plan->nzap)
			hmm_odp_zap_file(o, plan->zap, plan->nzap);
		hmm_odp_expect_kept(o, HMM_ODP_EARLY + 1, HMM_ODP_BETWEEN);
	}
	return hmm_odp_handle_map(o, vmf, page);
}

/* The device has all pages but the one whose fault does what the plan says. */
static void hmm_odp_prepare(struct hmm_odp *o, unsigned long at)
{
	struct hmm_odp_plan *plan = o->plan;

	KUNIT_ASSERT_EQ(o->test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	hmm_odp_expect_zapped(o, at, 1);
	plan->at = at;
	o->handle = hmm_odp_handle_plan;
}

/* A fault takes pages away that the walk has passed. */
static void hmm_odp_test_restart(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);

	hmm_odp_prepare(o, HMM_ODP_LATE);
	plan.zap = HMM_ODP_EARLY;
	plan.nzap = 1;
	KUNIT_EXPECT_EQ(test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), 0);
	KUNIT_EXPECT_EQ(test, plan.faulted, 1);
	hmm_odp_expect_kept(o, 0, HMM_ODP_SPAN);
	hmm_odp_expect_reached(o, 0, HMM_ODP_SPAN, true);
	hmm_odp_expect_right(o);
	hmm_odp_expect_zapped(o, 0, HMM_ODP_SPAN);
}

/*
 * What was taken away and could not be faulted stays so. All else is as it was
 * before the call, and goes when it is taken away.
 */
static void hmm_odp_expect_error(struct hmm_odp *o, int error)
{
	KUNIT_EXPECT_EQ(o->test, hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE), error);
	hmm_odp_expect_right(o);
	hmm_odp_expect_kept(o, HMM_ODP_EARLY + 1, HMM_ODP_BETWEEN);
	hmm_odp_expect_zapped(o, HMM_ODP_EARLY + 1, HMM_ODP_BETWEEN);
	o->handle = NULL;
	hmm_odp_expect_zapped(o, 0, HMM_ODP_SPAN);
}

/* The walk that begins again comes to a page that cannot be faulted. */
static void hmm_odp_expect_restart_fails(struct kunit *test, vm_fault_t how, int error)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);

	hmm_odp_prepare(o, HMM_ODP_LATE);
	plan.zap = HMM_ODP_EARLY;
	plan.nzap = 1;
	plan.fails = HMM_ODP_EARLY;
	plan.error = how;
	hmm_odp_expect_error(o, error);
	KUNIT_EXPECT_EQ(test, plan.faulted, 1);
	KUNIT_EXPECT_EQ(test, hmm_odp_element(o, HMM_ODP_EARLY) & HMM_PFN_FLAGS, 0);
}

static void hmm_odp_test_restart_sigbus(struct kunit *test)
{
	hmm_odp_expect_restart_fails(test, VM_FAULT_SIGBUS, -EFAULT);
}

static void hmm_odp_test_restart_no_memory(struct kunit *test)
{
	hmm_odp_expect_restart_fails(test, VM_FAULT_OOM, -ENOMEM);
}

/* The first walk comes to one. */
static void hmm_odp_test_sigbus(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);

	hmm_odp_prepare(o, HMM_ODP_LATE);
	plan.fails = HMM_ODP_LATE;
	plan.error = VM_FAULT_SIGBUS;
	plan.faulted = 1;
	hmm_odp_expect_error(o, -EFAULT);
}

/* There is a hole. */
static void hmm_odp_test_hole(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);

	hmm_odp_prepare(o, HMM_ODP_EARLY);
	KUNIT_ASSERT_EQ(test, vm_munmap(hmm_odp_addr(o, HMM_ODP_LATE), PAGE_SIZE), 0);
	hmm_odp_expect_right(o);
	hmm_odp_expect_unreached(o, HMM_ODP_LATE, 1);
	hmm_odp_expect_error(o, -EFAULT);
}

/* There is a page that nobody may write. */
static void hmm_odp_test_read_only(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	unsigned long addr = hmm_odp_addr(o, HMM_ODP_LATE), at;

	hmm_odp_prepare(o, HMM_ODP_EARLY);
	at = vm_mmap(o->file, addr, PAGE_SIZE, PROT_READ, MAP_SHARED | MAP_FIXED,
		     HMM_ODP_LATE << PAGE_SHIFT);
	KUNIT_ASSERT_EQ(test, at, addr);
	hmm_odp_expect_right(o);
	hmm_odp_expect_error(o, -EPERM);
}

/* A restart that waits */

static void hmm_odp_zap_gate(struct work_struct *work)
{
	struct hmm_odp_plan *plan = container_of(work, struct hmm_odp_plan, gate);

	hmm_odp_zap(plan->o, HMM_ODP_LATE + 1, 1);
}

/* Have an invalidation begin that goes on until it is told not to. */
static vm_fault_t hmm_odp_handle_gate(struct hmm_odp *o, struct vm_fault *vmf,
				      unsigned long page)
{
	struct hmm_odp_plan *plan = o->plan;

	if (page == plan->at && !plan->faulted++) {
		WRITE_ONCE(o->hold, HMM_ODP_LATE + 1);
		queue_work(system_dfl_wq, &plan->gate);
		wait_for_completion(&o->holding);
		complete(&plan->passed);
	}
	return hmm_odp_handle_map(o, vmf, page);
}

static int hmm_odp_ask_thread(void *data)
{
	struct hmm_odp *o = data;
	int ret;

	ret = hmm_odp_ask(o, 0, HMM_ODP_SPAN, HMM_ODP_WRITE);
	while (!kthread_should_stop())
		schedule_timeout_uninterruptible(1);
	return ret;
}

/* Until the thread has nothing to do but to wait for that invalidation. */
static void hmm_odp_wait_asleep(struct task_struct *task)
{
	unsigned int asleep = 0, tries;

	for (tries = 0; tries < HZ && asleep < 3; tries++) {
		schedule_timeout_uninterruptible(1);
		asleep = task_is_running(task) ? 0 : asleep + 1;
	}
}

/*
 * Pages are taken away while a call waits to begin again. Its elements are what
 * the device has, as ever, and the callback goes by them.
 */
static void hmm_odp_test_restart_waits(struct kunit *test)
{
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	struct task_struct *task;

	hmm_odp_prepare(o, HMM_ODP_LATE);
	o->handle = hmm_odp_handle_gate;
	INIT_WORK_ONSTACK(&plan.gate, hmm_odp_zap_gate);
	task = kthread_run(hmm_odp_ask_thread, o, "hmm_odp");
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, task);
	wait_for_completion(&plan.passed);
	hmm_odp_wait_asleep(task);

	hmm_odp_expect_kept(o, 0, HMM_ODP_LATE);
	KUNIT_EXPECT_EQ(test, hmm_odp_zap(o, HMM_ODP_EARLY, 8), 0);
	hmm_odp_expect_right(o);
	KUNIT_EXPECT_FALSE(test, o->table[HMM_ODP_EARLY].present);
	KUNIT_EXPECT_EQ(test, hmm_odp_element(o, HMM_ODP_EARLY) & HMM_PFN_FLAGS, 0);

	complete(&o->go);
	flush_work(&plan.gate);
	destroy_work_on_stack(&plan.gate);
	KUNIT_EXPECT_EQ(test, kthread_stop(task), 0);
	hmm_odp_expect_reached(o, 0, HMM_ODP_SPAN, true);
	hmm_odp_expect_right(o);
	hmm_odp_expect_zapped(o, 0, HMM_ODP_SPAN);
}

/* Two pages whose faults each take the other away. */
static vm_fault_t hmm_odp_handle_fight(struct hmm_odp *o, struct vm_fault *vmf,
				       unsigned long page)
{
	if (page == HMM_ODP_LATE || page == HMM_ODP_LATE + 1)
		hmm_odp_zap_file(o, 2 * HMM_ODP_LATE + 1 - page, 1);
	return hmm_odp_handle_map(o, vmf, page);
}

/* A call that hands over step by step can give the device one of them, then the other. */
static void hmm_odp_test_timeout(struct kunit *test)
{
	const struct hmm_odp_step *step = test->param_value;
	struct hmm_odp_plan plan;
	struct hmm_odp *o = hmm_odp_begin(test, &plan);
	int ret;

	hmm_odp_prepare(o, HMM_ODP_LATE);
	o->handle = hmm_odp_handle_fight;
	ret = hmm_odp_fault(o, step->call, 0, HMM_ODP_SPAN, HMM_ODP_WRITE, HZ / 20);
	if (ret || step->call != &hmm_odp_calls[HMM_ODP_EACH])
		KUNIT_EXPECT_EQ(test, ret, -EBUSY);
	hmm_odp_expect_right(o);
	hmm_odp_expect_kept(o, 0, HMM_ODP_LATE);
	hmm_odp_expect_zapped(o, 0, HMM_ODP_LATE);
	hmm_odp_expect_zapped(o, 0, HMM_ODP_SPAN);
}

/* The suite */

#define HMM_ODP_CASE(name) \
	KUNIT_CASE_PARAM(hmm_odp_test_##name, hmm_odp_step_gen_params)

static struct kunit_case hmm_odp_test_cases[] = {
	HMM_ODP_CASE(fault_and_zap),
	HMM_ODP_CASE(read_then_write),
	HMM_ODP_CASE(snapshot),
	HMM_ODP_CASE(sticky_lost),
	HMM_ODP_CASE(restart),
	HMM_ODP_CASE(restart_sigbus),
	HMM_ODP_CASE(restart_no_memory),
	HMM_ODP_CASE(sigbus),
	HMM_ODP_CASE(hole),
	HMM_ODP_CASE(read_only),
	HMM_ODP_CASE(restart_waits),
	HMM_ODP_CASE(timeout),
	{}
};

static struct kunit_suite hmm_odp_test_suite = {
	.name = "hmm_odp",
	.suite_init = hmm_dma_suite_init,
	.suite_exit = hmm_dma_suite_exit,
	.init = hmm_odp_init,
	.exit = hmm_odp_exit,
	.test_cases = hmm_odp_test_cases,
};

kunit_test_suite(hmm_odp_test_suite);
