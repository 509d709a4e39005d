// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What other threads do while HMM is measured
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/mman.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "hmm_bench.h"

#define HMM_BENCH_THREADS	4

/* Several threads ask at a time */

/**
 * struct hmm_bench_part - what one of them asks for
 * @work: runs it
 * @b: what is measured
 * @first: the first page
 * @end: the page behind the last
 * @pfns: an element for each of these
 * @ret: what came of it
 */
struct hmm_bench_part {
	struct work_struct work;
	struct hmm_bench *b;
	unsigned long first;
	unsigned long end;
	unsigned long *pfns;
	int ret;
};

static void hmm_bench_ask_part(struct work_struct *work)
{
	struct hmm_bench_part *part = container_of(work, struct hmm_bench_part, work);
	unsigned int i, repeat = part->b->work->repeat ?: 1;

	part->ret = 0;
	for (i = 0; i < repeat && !part->ret; i++)
		part->ret = hmm_bench_ask(part->b, part->pfns, part->first, part->end);
}

static int hmm_bench_run_parts(struct hmm_bench_part parts[HMM_BENCH_THREADS])
{
	int i, ret = 0;

	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		INIT_WORK_ONSTACK(&parts[i].work, hmm_bench_ask_part);
		queue_work(system_dfl_wq, &parts[i].work);
	}
	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		flush_work(&parts[i].work);
		destroy_work_on_stack(&parts[i].work);
		ret = ret ?: parts[i].ret;
	}
	return ret;
}

/* Each thread asks for a part of the range. */
int hmm_bench_run_threads(struct hmm_bench *b)
{
	struct hmm_bench_part parts[HMM_BENCH_THREADS];
	unsigned long share = b->pages / HMM_BENCH_THREADS;
	int i;

	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		parts[i].b = b;
		parts[i].first = i * share;
		parts[i].end = i == HMM_BENCH_THREADS - 1 ? b->pages : (i + 1) * share;
		parts[i].pfns = b->pfns + i * share;
	}
	return hmm_bench_run_parts(parts);
}

/* Each thread asks for all of the range. The elements of the first are looked at. */
int hmm_bench_run_alike(struct hmm_bench *b)
{
	struct hmm_bench_part parts[HMM_BENCH_THREADS];
	unsigned long *pfns;
	int i, ret;

	pfns = kvcalloc((HMM_BENCH_THREADS - 1) * b->pages, sizeof(*pfns), GFP_KERNEL);
	if (!pfns)
		return -ENOMEM;
	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		parts[i].b = b;
		parts[i].first = 0;
		parts[i].end = b->pages;
		parts[i].pfns = i ? pfns + (i - 1) * b->pages : b->pfns;
	}
	ret = hmm_bench_run_parts(parts);
	kvfree(pfns);
	return ret;
}

/* Another thread does something else meanwhile */

#define HMM_BENCH_BESIDE	(16 * PAGE_SIZE)

struct hmm_bench_other {
	struct task_struct *task;
	struct hmm_bench *b;
	unsigned long rounds;
	u64 ns;
};

/* Map memory beside the range, write to it, and unmap it. */
void hmm_bench_map_beside(struct hmm_bench *b)
{
	unsigned long at;
	char byte = 0;

	at = vm_mmap(NULL, 0, HMM_BENCH_BESIDE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, 0);
	if (IS_ERR_VALUE(at))
		return;
	if (copy_to_user((void __user *)at, &byte, 1))
		pr_warn_once("hmm_bench: memory beside the range cannot be written\n");
	do_madvise(b->mm, at, HMM_BENCH_BESIDE, MADV_DONTNEED);
	vm_munmap(at, HMM_BENCH_BESIDE);
}

/* Zap what the page table has behind the range, and fault it in again. */
void hmm_bench_fault_beside(struct hmm_bench *b)
{
	unsigned long at = b->start + (b->room << PAGE_SHIFT);
	unsigned long page, left = 0;
	char byte = 0;

	do_madvise(b->mm, at, b->room << PAGE_SHIFT, MADV_DONTNEED);
	for (page = 0; page < b->room && !left; page++)
		left = copy_to_user((void __user *)at + (page << PAGE_SHIFT), &byte, 1);
	if (left)
		pr_warn_once("hmm_bench: memory behind the range cannot be written\n");
}

static int hmm_bench_other_thread(void *data)
{
	struct hmm_bench_other *other = data;
	struct hmm_bench *b = other->b;
	unsigned int took_us, period_us = b->work->period_us;
	u64 began, took;

	kthread_use_mm(b->mm);
	while (!kthread_should_stop()) {
		began = ktime_get_ns();
		b->work->beside(b);
		took = ktime_get_ns() - began;
		took_us = min_t(u64, div_u64(took, NSEC_PER_USEC), period_us);
		other->ns += took;
		other->rounds++;
		if (took_us < period_us)
			fsleep(period_us - took_us);
		else
			cond_resched();
	}
	kthread_unuse_mm(b->mm);
	return 0;
}

/* Return what hmm_bench_calm() takes, or NULL if there is no thread to be had. */
struct hmm_bench_other *hmm_bench_disturb(struct hmm_bench *b)
{
	struct hmm_bench_other *other = kzalloc(sizeof(*other), GFP_KERNEL);

	if (!other)
		return NULL;
	other->b = b;
	other->task = kthread_run(hmm_bench_other_thread, other, "hmm_bench");
	if (!IS_ERR(other->task))
		return other;
	kfree(other);
	return NULL;
}

/* Return how often the thread did its work, and in @ns how long that took in all. */
unsigned long hmm_bench_calm(struct hmm_bench_other *other, u64 *ns)
{
	unsigned long rounds;

	kthread_stop(other->task);
	rounds = other->rounds;
	*ns = other->ns;
	kfree(other);
	return rounds;
}
