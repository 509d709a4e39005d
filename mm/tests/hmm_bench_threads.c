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

/* Several threads ask for one part of the range each */

struct hmm_bench_part {
	struct work_struct work;
	struct hmm_bench *b;
	unsigned long first;
	unsigned long end;
	int ret;
};

static void hmm_bench_ask_part(struct work_struct *work)
{
	struct hmm_bench_part *part = container_of(work, struct hmm_bench_part, work);

	part->ret = hmm_bench_ask(part->b, part->first, part->end);
}

int hmm_bench_run_threads(struct hmm_bench *b)
{
	struct hmm_bench_part parts[HMM_BENCH_THREADS];
	unsigned long share = b->pages / HMM_BENCH_THREADS;
	int i, ret = 0;

	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		struct hmm_bench_part *part = &parts[i];

		part->b = b;
		part->first = i * share;
		part->end = i == HMM_BENCH_THREADS - 1 ? b->pages : part->first + share;
		INIT_WORK_ONSTACK(&part->work, hmm_bench_ask_part);
		queue_work(system_dfl_wq, &part->work);
	}
	for (i = 0; i < HMM_BENCH_THREADS; i++) {
		flush_work(&parts[i].work);
		destroy_work_on_stack(&parts[i].work);
		ret = ret ?: parts[i].ret;
	}
	return ret;
}

/* One thread maps and unmaps memory beside the range */

#define HMM_BENCH_BESIDE	(16 * PAGE_SIZE)

struct hmm_bench_other {
	struct task_struct *task;
	struct mm_struct *mm;
	unsigned int pause_us;
	unsigned long rounds;
	u64 ns;
};

static void hmm_bench_map_beside(void)
{
	unsigned long at;
	char byte = 0;

	at = vm_mmap(NULL, 0, HMM_BENCH_BESIDE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, 0);
	if (IS_ERR_VALUE(at))
		return;
	if (copy_to_user((void __user *)at, &byte, 1))
		pr_warn_once("hmm_bench: memory beside the range cannot be written\n");
	do_madvise(current->mm, at, HMM_BENCH_BESIDE, MADV_DONTNEED);
	vm_munmap(at, HMM_BENCH_BESIDE);
}

static int hmm_bench_other_thread(void *data)
{
	struct hmm_bench_other *other = data;
	u64 began;

	kthread_use_mm(other->mm);
	while (!kthread_should_stop()) {
		began = ktime_get_ns();
		hmm_bench_map_beside();
		other->ns += ktime_get_ns() - began;
		other->rounds++;
		if (other->pause_us)
			usleep_range(other->pause_us, 2 * other->pause_us);
		else
			cond_resched();
	}
	kthread_unuse_mm(other->mm);
	return 0;
}

/* Return what hmm_bench_calm() takes, or NULL if there is no thread to be had. */
struct hmm_bench_other *hmm_bench_disturb(struct hmm_bench *b)
{
	struct hmm_bench_other *other = kzalloc(sizeof(*other), GFP_KERNEL);

	if (!other)
		return NULL;
	other->mm = b->mm;
	other->pause_us = b->work->pause_us;
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
