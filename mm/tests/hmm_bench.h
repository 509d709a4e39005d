/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is measured, and the memory that it is measured on
 */
#ifndef _MM_TESTS_HMM_BENCH_H
#define _MM_TESTS_HMM_BENCH_H

#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>

#define HMM_READ	HMM_PFN_REQ_FAULT
#define HMM_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

struct hmm_bench;

/**
 * struct hmm_bench_side - one of those that are compared
 * @name: what the output calls it
 * @fault: its hmm_range_fault()
 * @fault_unlocked: its hmm_range_fault_unlocked_timeout()
 * @fault_each: its hmm_range_fault_each(), or NULL if it has none
 */
struct hmm_bench_side {
	const char *name;
	int (*fault)(struct hmm_range *range);
	int (*fault_unlocked)(struct hmm_range *range, unsigned long timeout);
	int (*fault_each)(struct hmm_range *range, unsigned long timeout,
			  const struct hmm_commit_ops *ops);
};

/**
 * enum hmm_bench_way - how pages are asked for
 * @HMM_BENCH_LOCKED: by hmm_range_fault(), with the mmap lock held for all calls
 * @HMM_BENCH_UNLOCKED: by hmm_range_fault_unlocked_timeout()
 * @HMM_BENCH_EACH: by hmm_range_fault_each(). A side without that call does what it
 *	does around the one before
 */
enum hmm_bench_way {
	HMM_BENCH_LOCKED,
	HMM_BENCH_UNLOCKED,
	HMM_BENCH_EACH,
};

/**
 * enum hmm_bench_sizes - how large the calls are
 * @HMM_BENCH_CALLS: from one page to the whole range
 * @HMM_BENCH_LARGE_CALLS: only the larger of these
 * @HMM_BENCH_GROWING: the whole range, and ranges of several sizes
 * @HMM_BENCH_HALF_TABLE: the whole range, which is the first half of a page table
 */
enum hmm_bench_sizes {
	HMM_BENCH_CALLS,
	HMM_BENCH_LARGE_CALLS,
	HMM_BENCH_GROWING,
	HMM_BENCH_HALF_TABLE,
};

/**
 * struct hmm_bench_work - a workload
 * @name: what the output calls it
 * @map: map the memory and bring about what all rounds find; NULL if this
 *	kernel cannot have such memory
 * @reset: bring about what each round finds anew, or NULL; not measured
 * @unmap: undo what the end of the address space does not, or NULL
 * @run: ask for all pages, @repeat times; NULL has this thread do it call by call, once
 * @sizes: in which sizes of calls
 * @default_flags: of the range
 * @fill: what each element holds before a call, all of which is a request
 * @mixed: but odd pages ask to read
 * @want: what the outputs say, of %HMM_WRITE
 * @half: odd pages are not there, and stay so
 * @order: of the folios that the pages have to be in
 * @due: of how many pages one is to be faulted; 0 if none is
 * @way: by which call
 * @repeat: how often @run asks for each page; 0 is once
 * @beside: what another thread does over and over in the same address space, or NULL
 * @period_us: how often, in microseconds, so that it does as much beside either side;
 *	0 if it does so all the time
 */
struct hmm_bench_work {
	const char *name;
	bool (*map)(struct hmm_bench *b);
	bool (*reset)(struct hmm_bench *b);
	void (*unmap)(struct hmm_bench *b);
	int (*run)(struct hmm_bench *b);
	enum hmm_bench_sizes sizes;
	unsigned long default_flags;
	unsigned long fill;
	unsigned long want;
	unsigned int order;
	unsigned int due;
	bool mixed;
	bool half;
	enum hmm_bench_way way;
	unsigned int repeat;
	void (*beside)(struct hmm_bench *b);
	unsigned int period_us;
};

/**
 * struct hmm_bench - a workload that is being measured
 * @test: the running test
 * @work: the workload
 * @side: who is measured
 * @call: pages a call
 * @mm: the address space, the test thread's own
 * @start: where the range begins, aligned to huge pages
 * @pages: how many pages the range has
 * @room: how many were mapped
 * @notifier: covers those
 * @lock: the driver's lock, which its invalidate callback takes
 * @committed: how many pages were handed over by the call that was measured last
 * @pfns: an element for each of them
 * @owner: of the device-private pages, if they are such
 * @waited: the pages that were faulted once, if a fault has to wait for each
 * @file: what is mapped, if it is a file
 */
struct hmm_bench {
	struct kunit *test;
	const struct hmm_bench_work *work;
	const struct hmm_bench_side *side;
	unsigned long call;
	struct mm_struct *mm;
	unsigned long start;
	unsigned long pages;
	unsigned long room;
	struct mmu_interval_notifier notifier;
	struct mutex lock;	/* who commits excludes invalidations by it */
	unsigned long committed;
	unsigned long *pfns;
	void *owner;
	unsigned long *waited;
	struct file *file;
};

#ifdef HMM_BENCH_PEER
/* What mm/tests/Makefile calls the peer's. */
int hmm_peer_range_fault(struct hmm_range *range);
int hmm_peer_range_fault_unlocked_timeout(struct hmm_range *range,
					  unsigned long timeout);
#endif

/* Asking */
int hmm_bench_ask(struct hmm_bench *b, unsigned long *pfns, unsigned long first,
		  unsigned long end);

/* Memory: mapped for all rounds, and brought into a state for each */
bool hmm_bench_map_empty(struct hmm_bench *b);
bool hmm_bench_map_half(struct hmm_bench *b);
bool hmm_bench_map_full(struct hmm_bench *b);
bool hmm_bench_map_pieces(struct hmm_bench *b);
bool hmm_bench_map_waiting(struct hmm_bench *b);
bool hmm_bench_map_table(struct hmm_bench *b);
bool hmm_bench_zap(struct hmm_bench *b);
bool hmm_bench_zap_and_read(struct hmm_bench *b);
bool hmm_bench_zap_and_write_half(struct hmm_bench *b);

#ifdef CONFIG_TRANSPARENT_HUGEPAGE
bool hmm_bench_map_thp(struct hmm_bench *b);
bool hmm_bench_map_mthp(struct hmm_bench *b);
#else
#define hmm_bench_map_thp	NULL
#define hmm_bench_map_mthp	NULL
#endif

#ifdef CONFIG_HUGETLBFS
bool hmm_bench_map_hugetlb(struct hmm_bench *b);
#else
#define hmm_bench_map_hugetlb	NULL
#endif

#ifdef CONFIG_DEVICE_PRIVATE
bool hmm_bench_map_device(struct hmm_bench *b);
void hmm_bench_unmap_device(struct hmm_bench *b);
#else
#define hmm_bench_map_device	NULL
#define hmm_bench_unmap_device	NULL
#endif

/* Other threads */
struct hmm_bench_other;

int hmm_bench_run_threads(struct hmm_bench *b);
int hmm_bench_run_alike(struct hmm_bench *b);
void hmm_bench_map_beside(struct hmm_bench *b);
void hmm_bench_fault_beside(struct hmm_bench *b);
struct hmm_bench_other *hmm_bench_disturb(struct hmm_bench *b);
unsigned long hmm_bench_calm(struct hmm_bench_other *other, u64 *ns);

#endif
