/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An address space to ask HMM about, as a driver would
 *
 * What becomes of the memory is seen as the CPU sees it, by accesses that do
 * not fault, or counted by a fault handler of the test's own.
 */
#ifndef _MM_TESTS_HMM_FIXTURE_H
#define _MM_TESTS_HMM_FIXTURE_H

#include <kunit/test.h>
#include <linux/completion.h>
#include <linux/hmm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/sizes.h>
#include <linux/workqueue.h>

/* More than one page table, wherever the mapping begins. */
#define HMM_PAGES	1024UL
#define HMM_SIZE	(HMM_PAGES << PAGE_SHIFT)

/*
 * Where the mapping begins: the first pages share a page table with many more,
 * and the next one begins where two of them are aligned together.
 */
#define HMM_START	(SZ_1G + (512 + 3) * PAGE_SIZE)

#define HMM_READ	HMM_PFN_REQ_FAULT
#define HMM_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* What no walk stores: an input that has to be found as it was left. */
#define HMM_UNTOUCHED	(0x5aUL | HMM_STICKY)

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
 * @call: which of the three calls is tested
 * @mm: the address space, the test thread's own
 * @notifier: covers the mapping, and the page before and after it
 * @invalidations: how often @notifier was told
 * @on_invalidate: what @notifier does besides
 * @start: where the mapping begins
 * @npages: how many pages it has; set before it is made, if not HMM_PAGES
 * @range: what is handed to the call
 * @pfns: its elements
 * @elements: its elements, if the mapping has more pages than HMM_PAGES
 * @asked: what they were before the call, to ask again
 * @file: what is mapped by hmm_map_handler()
 * @handle: decides a fault; NULL maps a new page
 * @private: what else @handle needs
 * @by_vma: @handle can do with the lock of the VMA, where there is one
 * @faults: how often each of the first HMM_PAGES pages was faulted, in a mapping with
 *	a handler
 * @handled: how many faults the handler has had in all
 * @plan: what faults do besides, for hmm_handle_plan()
 * @due: how often each page has to be faulted, in all
 * @sticky: the sticky bits that each element has to have in the end
 * @other: what another thread does meanwhile
 * @entered: @other is in the middle of it
 * @over: that @other may end
 * @late: that it did so by itself, and long after
 * @lost: how many outputs were not there when they were looked for
 * @slow: for how long a fault sleeps, in jiffies
 * @pause: for how long an invalidation goes on, in jiffies
 * @rounds: how often @other was begun
 * @limit: how often it is to be
 * @device: the lock that the driver would have
 * @committing: @device is held, and by whom
 * @before_commit: what happens just before @device is taken for a commit
 * @commit: what else a commit does, and what it returns
 * @committed: address where what was committed ends
 * @kept: how many pages were committed when others were taken away
 * @commits: how many steps were committed
 * @shortest: pages in the first of them, where a case asks
 * @longest: pages in the longest of them
 * @turns: how often @device was taken for one
 * @asking: the call is running
 * @locks: how many locks were held when it began
 * @was_locked: somebody else had the mmap lock then
 */
struct hmm_fixture {
	struct kunit *test;
	const struct hmm_call *call;
	struct mm_struct *mm;
	struct mmu_interval_notifier notifier;
	unsigned int invalidations;
	void (*on_invalidate)(struct hmm_fixture *t);
	unsigned long start;
	unsigned long npages;
	struct hmm_range range;
	unsigned long pfns[HMM_PAGES];
	unsigned long asked[HMM_PAGES];
	unsigned long *elements;
	struct file *file;
	vm_fault_t (*handle)(struct hmm_fixture *t, struct vm_fault *vmf,
			     unsigned long page);
	void *private;
	bool by_vma;
	unsigned int faults[HMM_PAGES];
	unsigned long handled;
	struct hmm_plan plan[HMM_PLAN_PAGES];
	unsigned int due[HMM_PLAN_PAGES];
	unsigned long sticky[HMM_PLAN_PAGES];
	struct work_struct other;
	struct completion entered;
	struct completion over;
	bool late;
	unsigned long lost;
	unsigned long slow;
	unsigned long pause;
	unsigned int rounds;
	unsigned int limit;
	struct mutex device;
	bool committing;
	void (*before_commit)(struct hmm_fixture *t);
	int (*commit)(struct hmm_fixture *t, unsigned long page, unsigned long npages);
	unsigned long committed;
	unsigned long kept;
	unsigned int commits;
	unsigned long shortest;
	unsigned long longest;
	unsigned int turns;
	bool asking;
	int locks;
	bool was_locked;
};

static inline unsigned long hmm_addr(const struct hmm_fixture *t, unsigned long page)
{
	return t->start + (page << PAGE_SHIFT);
}

static inline unsigned long hmm_flags(const struct hmm_fixture *t, unsigned long i)
{
	return t->pfns[i] & HMM_PFN_FLAGS;
}

/* How many pages have been committed. */
static inline unsigned long hmm_committed(const struct hmm_fixture *t)
{
	return t->committed ? (t->committed - t->start) >> PAGE_SHIFT : 0;
}

/* The three calls */
enum { HMM_CALL_LOCKED, HMM_CALL_UNLOCKED, HMM_CALL_EACH };

extern const struct hmm_call hmm_calls[3];

const void *hmm_call_gen_params(struct kunit *test, const void *prev, char *desc);
const void *hmm_unlocked_gen_params(struct kunit *test, const void *prev, char *desc);
int hmm_call_timeout(struct hmm_range *range, unsigned long timeout);
int hmm_call_each_timeout(struct hmm_range *range, unsigned long timeout);

/* Mappings */
void hmm_map_anon(struct hmm_fixture *t, unsigned long prot);
void hmm_map_anon_far(struct hmm_fixture *t, unsigned long distance, unsigned long prot);
vm_fault_t hmm_handler_map(struct vm_fault *vmf);
void hmm_map_handler(struct hmm_fixture *t);
void hmm_zap(struct hmm_fixture *t, unsigned long page, unsigned long npages);

/* What the CPU sees */
bool hmm_readable(const struct hmm_fixture *t, unsigned long page);
bool hmm_writable(const struct hmm_fixture *t, unsigned long page);
unsigned long hmm_count(const struct hmm_fixture *t,
			bool (*is)(const struct hmm_fixture *t, unsigned long page));
void hmm_touch(struct hmm_fixture *t, unsigned long page, unsigned long npages,
	       bool write);
struct page *hmm_cpu_page(struct hmm_fixture *t, unsigned long page);

/* Asking */
void hmm_ask(struct hmm_fixture *t, unsigned long page, unsigned long npages);
int hmm_answer(struct hmm_fixture *t);
int hmm_answer_retry(struct hmm_fixture *t);
int hmm_request_all(struct hmm_fixture *t, unsigned long request);
void hmm_expect_flags(struct hmm_fixture *t, unsigned long i, unsigned long n,
		      unsigned long flags);

void hmm_expect_untouched(struct hmm_fixture *t, unsigned long i, unsigned long n);

/* For the suites */
int hmm_test_init(struct kunit *test);
void hmm_test_exit(struct kunit *test);

/* A case that runs with all calls. */
#define HMM_CASE(name)	KUNIT_CASE_PARAM(hmm_test_##name, hmm_call_gen_params)

#endif
