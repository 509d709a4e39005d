// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): how long calls go on, and who waits for them
 *
 * A call that others keep from finishing gives up, one that has become pointless
 * ends soon, and nobody waits for its locks for longer than it takes to fault in
 * what a page table or two cover.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/delay.h>
#include <linux/hmm.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/leafops.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/swapops.h>

#include "hmm_fixture.h"

/* How many more faults there may be once it is clear that they are pointless. */
#define HMM_FEW_FAULTS	8

/* One page is enough for all of a large mapping. */

static void hmm_put_page(void *page)
{
	put_page(page);
}

static vm_fault_t hmm_handle_one_page(struct hmm_fixture *t, struct vm_fault *vmf)
{
	vmf->page = t->private;
	get_page(vmf->page);
	return 0;
}

/* Map @npages pages that all are the same one. */
static void hmm_map_one_page(struct hmm_fixture *t, unsigned long npages)
{
	struct page *page = alloc_page(GFP_HIGHUSER | __GFP_ZERO);
	int ret;

	KUNIT_ASSERT_NOT_NULL(t->test, page);
	ret = kunit_add_action_or_reset(t->test, hmm_put_page, page);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	t->private = page;
	t->npages = npages;
	hmm_map_handler(t);
}

/* Map memory that has no huge pages. */
static void hmm_map_small_pages(struct hmm_fixture *t)
{
	hmm_map_anon(t, PROT_READ | PROT_WRITE);
	mmap_write_lock(t->mm);
	vm_flags_set(vma_lookup(t->mm, t->start), VM_NOHUGEPAGE);
	mmap_write_unlock(t->mm);
}

/* Map memory whose pages all are the zero page. Each write is copied by a fault. */
static void hmm_map_zero_pages(struct hmm_fixture *t, unsigned long npages)
{
	t->npages = npages;
	hmm_map_small_pages(t);
	hmm_touch(t, 0, npages, false);
}

static int hmm_call_for(struct hmm_fixture *t, unsigned long timeout)
{
	if (t->call == &hmm_calls[HMM_CALL_EACH])
		return hmm_call_each_timeout(&t->range, timeout);
	return hmm_call_timeout(&t->range, timeout);
}

/* Timeouts */

#define HMM_TIMEOUT	msecs_to_jiffies(100)

/* So many pages are fought for. */
#define HMM_FOUGHT_FOR	8UL

/* Do others still take pages away? They stop when the call should have ended long ago. */
static bool hmm_goes_on(const struct hmm_fixture *t)
{
	const unsigned long *until = t->private;

	return time_before(jiffies, *until);
}

/* A fault in one half of the pages takes the other half away. */
static vm_fault_t hmm_handle_fought_for(struct hmm_fixture *t, struct vm_fault *vmf,
					unsigned long page)
{
	schedule_timeout_uninterruptible(t->slow);
	if (hmm_goes_on(t))
		hmm_zap(t, page < HMM_FOUGHT_FOR / 2 ? HMM_FOUGHT_FOR / 2 : 0,
			HMM_FOUGHT_FOR / 2);
	return hmm_handler_map(vmf);
}

/* The first page of the step is gone when the step is about to be committed. */
static void hmm_zap_before_commit(struct hmm_fixture *t)
{
	if (hmm_goes_on(t))
		hmm_zap(t, hmm_committed(t), 1);
}

/*
 * Whatever a walk faults in is taken away before it is of use, so the time of the
 * faults counts. The call ends after a few timeouts.
 */
static void hmm_expect_gives_up(struct hmm_fixture *t, unsigned long slow)
{
	unsigned long timeout = HMM_TIMEOUT, began = jiffies, took;
	unsigned long until = began + 15 * timeout;
	int ret;

	t->slow = slow;
	t->private = &until;
	hmm_zap(t, 0, HMM_FOUGHT_FOR);
	hmm_ask(t, 0, HMM_FOUGHT_FOR);
	t->range.default_flags = HMM_READ;
	ret = hmm_call_for(t, timeout);
	took = jiffies - began;

	KUNIT_EXPECT_EQ(t->test, ret, -EBUSY);
	KUNIT_EXPECT_GE(t->test, took, timeout);
	KUNIT_EXPECT_LE(t->test, took, 10 * timeout);
}

static void hmm_test_faults_for_nothing(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_fought_for;
	t->before_commit = hmm_zap_before_commit;
	hmm_expect_gives_up(t, 1);
	hmm_expect_gives_up(t, HMM_TIMEOUT / 2);
}

/* Another thread takes all pages away, over and over. */
static void hmm_zap_all_along(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	while (hmm_goes_on(t) && !try_wait_for_completion(&t->over)) {
		hmm_zap(t, 0, HMM_FOUGHT_FOR);
		schedule_timeout_uninterruptible(1);
	}
}

static vm_fault_t hmm_handle_slowly(struct hmm_fixture *t, struct vm_fault *vmf,
				    unsigned long page)
{
	schedule_timeout_uninterruptible(t->slow);
	return hmm_handler_map(vmf);
}

/* No fault is done before the pages of all others are gone. */
static void hmm_test_faults_outrun(struct kunit *test)
{
	unsigned long timeout = HMM_TIMEOUT, began = jiffies, took;
	unsigned long until = began + 15 * timeout;
	struct hmm_fixture *t = test->priv;
	int ret;

	hmm_map_handler(t);
	t->handle = hmm_handle_slowly;
	t->slow = 3;
	t->private = &until;
	hmm_ask(t, 0, HMM_FOUGHT_FOR);
	t->range.default_flags = HMM_READ;
	INIT_WORK(&t->other, hmm_zap_all_along);
	schedule_work(&t->other);
	ret = hmm_call_timeout(&t->range, timeout);
	took = jiffies - began;
	complete(&t->over);
	flush_work(&t->other);

	KUNIT_EXPECT_EQ(test, ret, -EBUSY);
	KUNIT_EXPECT_GE(test, took, timeout);
	KUNIT_EXPECT_LE(test, took, 10 * timeout);
}

/*
 * Each fault copies a page, which takes the one away that was there: nobody else
 * is to blame for that, and the next walk finds all pages. The notifier is slow.
 */
static void hmm_test_copying_takes_long(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long began;

	hmm_map_zero_pages(t, HMM_PAGES);
	hmm_ask(t, 0, 20);
	t->range.default_flags = HMM_WRITE;
	t->invalidations = 0;
	t->pause = HMM_TIMEOUT / 10;
	began = jiffies;
	KUNIT_EXPECT_EQ(test, hmm_call_for(t, HMM_TIMEOUT), 0);
	KUNIT_EXPECT_GE(test, jiffies - began, 2 * HMM_TIMEOUT);
	t->pause = 0;
	hmm_expect_flags(t, 0, 20, HMM_PFN_VALID | HMM_PFN_WRITE);
	KUNIT_EXPECT_EQ(test, t->invalidations, 20);
}

/* Calls that have become pointless */

#define HMM_LARGE	(SZ_1G >> PAGE_SHIFT)

/* In which fault somebody takes page 0 away. */
#define HMM_STALE_FAULT	20UL

static void hmm_zap_page_0(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	hmm_zap(t, 0, 1);
}

/* Another thread takes page 0 away, once. No walk is to go on for so long after that. */
static vm_fault_t hmm_handle_stale(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	schedule_timeout_uninterruptible(t->slow);
	if (t->handled == HMM_STALE_FAULT) {
		schedule_work(&t->other);
		flush_work(&t->other);
	}
	if (t->handled > HMM_STALE_FAULT + t->limit)
		return VM_FAULT_SIGBUS;
	return hmm_handle_one_page(t, vmf);
}

static void hmm_map_stale(struct hmm_fixture *t)
{
	INIT_WORK(&t->other, hmm_zap_page_0);
	hmm_map_one_page(t, HMM_LARGE);
	t->handle = hmm_handle_stale;
	hmm_ask(t, 0, HMM_LARGE);
	t->range.default_flags = HMM_READ;
}

/* The caller has to begin again, so the rest is left for then. */
static void hmm_test_stale_large_range(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	t->call = &hmm_calls[HMM_CALL_LOCKED];
	t->limit = 100;
	hmm_map_stale(t);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -EBUSY);
	KUNIT_EXPECT_LE(test, t->handled, HMM_STALE_FAULT + HMM_FEW_FAULTS);
}

/* Nor does a walk that is for nothing go on when that has cost more than the timeout. */
static void hmm_test_stale_slow_range(struct kunit *test)
{
	unsigned long timeout = HMM_TIMEOUT, began = jiffies;
	struct hmm_fixture *t = test->priv;

	t->slow = 1;
	t->limit = 15 * timeout;
	hmm_map_stale(t);
	KUNIT_EXPECT_EQ(test, hmm_call_timeout(&t->range, timeout), -EBUSY);
	KUNIT_EXPECT_GE(test, jiffies - began, timeout);
	KUNIT_EXPECT_LE(test, jiffies - began, 10 * timeout);
}

static void hmm_kill_self(void)
{
	send_sig(SIGKILL, current, 1);
}

static void hmm_survive(void)
{
	flush_signals(current);
	disallow_signal(SIGKILL);
}

/* Which fault is the last that a task lives to see. */
#define HMM_LAST_FAULT	10

/* However often the fault is handled, it brings no page, until it is far too late. */
static vm_fault_t hmm_handle_in_vain(struct hmm_fixture *t, struct vm_fault *vmf,
				     unsigned long page)
{
	if (t->handled == HMM_LAST_FAULT)
		hmm_kill_self();
	if (t->handled < 10 * HMM_LAST_FAULT)
		return VM_FAULT_NOPAGE;
	return hmm_handler_map(vmf);
}

/* An entry that no fault ever changes keeps nobody from dying. */
static void hmm_test_killed_in_vain(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_in_vain;
	hmm_ask(t, 0, 1);
	t->pfns[0] = HMM_UNTOUCHED;
	t->range.default_flags = HMM_READ;
	allow_signal(SIGKILL);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -EINTR);
	hmm_survive();
	KUNIT_EXPECT_LE(test, t->handled, HMM_LAST_FAULT + 1);
	hmm_expect_untouched(t, 0, 1);
}

/* No signal comes, as to a kernel thread: it is the timeout that ends the call. */
static vm_fault_t hmm_handle_never(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	schedule_timeout_uninterruptible(1);
	return hmm_goes_on(t) ? VM_FAULT_NOPAGE : hmm_handler_map(vmf);
}

static void hmm_test_never_comes(struct kunit *test)
{
	unsigned long timeout = HMM_TIMEOUT, began = jiffies;
	unsigned long until = began + 15 * timeout;
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_never;
	t->private = &until;
	hmm_ask(t, 0, 2);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_for(t, timeout), -EBUSY);
	KUNIT_EXPECT_LE(test, jiffies - began, 11 * timeout);
	KUNIT_EXPECT_EQ(test, t->faults[1], 0);
}

/* The page is read from somewhere slow, without the lock, and mapped by the next fault. */
static vm_fault_t hmm_handle_slow_read(struct hmm_fixture *t, struct vm_fault *vmf,
				       unsigned long page)
{
	const unsigned long *wait = t->private;

	if (t->faults[page] > 1)
		return hmm_handler_map(vmf);
	schedule_timeout_uninterruptible(*wait);
	release_fault_lock(vmf);
	return VM_FAULT_RETRY;
}

/* However long that took, the fault that maps the page is not refused. */
static void hmm_expect_waits(struct hmm_fixture *t)
{
	unsigned long timeout = HMM_TIMEOUT, wait = 12 * timeout;

	hmm_map_handler(t);
	t->handle = hmm_handle_slow_read;
	t->private = &wait;
	hmm_ask(t, 0, 1);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(t->test, hmm_call_for(t, timeout), 0);
	KUNIT_EXPECT_EQ(t->test, t->faults[0], 2);
}

static void hmm_test_slow_read(struct kunit *test)
{
	hmm_expect_waits(test->priv);
}

/* As userfaultfd waits, and whoever needs a folio that somebody else reads. */
static void hmm_test_slow_read_by_vma(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	t->by_vma = true;
	hmm_expect_waits(t);
}

static void hmm_hold_mmap_lock(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	mmap_write_lock(t->mm);
	complete(&t->over);
	schedule_timeout_uninterruptible(t->slow);
	mmap_write_unlock(t->mm);
}

/* Drop the lock, and see that it takes a while to get it back. */
static vm_fault_t hmm_handle_kept_waiting(struct hmm_fixture *t, struct vm_fault *vmf,
					  unsigned long page)
{
	release_fault_lock(vmf);
	schedule_work(&t->other);
	wait_for_completion(&t->over);
	return VM_FAULT_RETRY;
}

static vm_fault_t hmm_handle_waits_once(struct hmm_fixture *t, struct vm_fault *vmf,
					unsigned long page)
{
	return t->faults[page] > 1 ? hmm_handler_map(vmf) :
				     hmm_handle_kept_waiting(t, vmf, page);
}

/* However long the mmap lock could not be had, the fault that needs it is not refused. */
static void hmm_test_slow_mmap_lock(struct kunit *test)
{
	unsigned long timeout = HMM_TIMEOUT, began = jiffies;
	struct hmm_fixture *t = test->priv;

	hmm_map_handler(t);
	t->handle = hmm_handle_waits_once;
	t->slow = 12 * timeout;
	INIT_WORK(&t->other, hmm_hold_mmap_lock);
	hmm_ask(t, 0, 1);
	t->range.default_flags = HMM_READ;
	KUNIT_EXPECT_EQ(test, hmm_call_for(t, timeout), 0);
	KUNIT_EXPECT_GE(test, jiffies - began, t->slow);
	KUNIT_EXPECT_EQ(test, t->faults[0], 2);
	flush_work(&t->other);
}

/*
 * Another thread keeps everybody waiting, and takes away what they got, over and over:
 * pages that are not there yet take their place.
 */
static void hmm_keep_from(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);
	unsigned long at = t->start;

	kthread_use_mm(t->mm);
	while (at == t->start && hmm_goes_on(t) && !try_wait_for_completion(&t->over)) {
		mmap_write_lock(t->mm);
		vma_start_write(vma_lookup(t->mm, t->start));
		schedule_timeout_uninterruptible(t->slow);
		mmap_write_unlock(t->mm);
		at = vm_mmap(NULL, t->start, 2 * PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, 0);
	}
	kthread_unuse_mm(t->mm);
}

/*
 * The wait for the mmap lock is of no account, unless nothing comes of it for too long.
 * A long timeout makes little of the jiffies that are lost in rounding.
 */
static void hmm_test_kept_from(struct kunit *test)
{
	unsigned long timeout = 3 * HMM_TIMEOUT, began = jiffies;
	unsigned long until = began + 20 * timeout;
	struct hmm_fixture *t = test->priv;
	int ret;

	hmm_map_small_pages(t);
	t->slow = timeout - 2;
	t->private = &until;
	INIT_WORK(&t->other, hmm_keep_from);
	schedule_work(&t->other);
	schedule_timeout_uninterruptible(2);
	hmm_ask(t, 0, 2);
	t->range.default_flags = HMM_READ;
	ret = hmm_call_timeout(&t->range, timeout);
	KUNIT_EXPECT_LE(test, jiffies - began, 15 * timeout);
	/* With several processors, the call may be quicker than the other thread. */
	KUNIT_EXPECT_TRUE(test, !ret || ret == -EBUSY);
	complete(&t->over);
	flush_work(&t->other);
}

/**
 * struct hmm_migration - one that does not end
 * @work: wakes up the task that waits for it
 * @mm: has the entry
 * @addr: of the page
 * @folio: what migrates
 * @locked: @folio has been locked again
 * @saved: the entry of that
 * @entry: the migration entry
 * @task: waits, and is killed
 * @wakes: how often it was woken
 * @over: it waits no more
 */
struct hmm_migration {
	struct work_struct work;
	struct mm_struct *mm;
	unsigned long addr;
	struct folio *folio;
	bool locked;
	pte_t saved;
	pte_t entry;
	struct task_struct *task;
	unsigned int wakes;
	struct completion over;
};

static int hmm_begin_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_migration *m = data;

	m->saved = ptep_get(ptep);
	m->entry = swp_entry_to_pte(make_writable_migration_entry(pte_pfn(m->saved)));
	set_pte_at(m->mm, addr, ptep, m->entry);
	return 0;
}

static int hmm_end_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_migration *m = data;

	if (pte_same(ptep_get(ptep), m->entry))
		set_pte_at(m->mm, addr, ptep, m->saved);
	return 0;
}

/*
 * The page table lock keeps the task that is woken from looking at the entry for as
 * long as the folio is not locked, which no migration allows.
 */
static int hmm_wake_pte(pte_t *ptep, unsigned long addr, void *data)
{
	struct hmm_migration *m = data;

	folio_unlock(m->folio);
	m->locked = folio_trylock(m->folio);
	return 0;
}

/* A task that waits is woken, and finds the entry as it was, until it is far too late. */
static void hmm_wake_waiters(struct work_struct *work)
{
	struct hmm_migration *m = container_of(work, struct hmm_migration, work);

	while (!try_wait_for_completion(&m->over)) {
		if (folio_test_waiters(m->folio)) {
			apply_to_page_range(m->mm, m->addr, PAGE_SIZE, hmm_wake_pte, m);
			if (!m->locked)
				folio_lock(m->folio);
			m->wakes++;
		}
		if (m->wakes == HMM_LAST_FAULT)
			send_sig(SIGKILL, m->task, 1);
		if (m->wakes == 10 * HMM_LAST_FAULT)
			apply_to_page_range(m->mm, m->addr, PAGE_SIZE, hmm_end_pte, m);
		usleep_range(20, 50);
	}
}

/* Page 7 has a migration entry that no migration removes. */
static int hmm_answer_migrating(struct hmm_fixture *t, struct hmm_migration *m)
{
	int ret;

	folio_lock(m->folio);
	apply_to_page_range(m->mm, m->addr, PAGE_SIZE, hmm_begin_pte, m);
	schedule_work(&m->work);
	allow_signal(SIGKILL);
	ret = hmm_answer(t);
	hmm_survive();
	complete(&m->over);
	flush_work(&m->work);
	apply_to_page_range(m->mm, m->addr, PAGE_SIZE, hmm_end_pte, m);
	folio_unlock(m->folio);
	return ret;
}

static void hmm_test_killed_migrating(struct kunit *test)
{
	struct hmm_migration m = { .task = current };
	struct hmm_fixture *t = test->priv;
	int ret;

	if (!IS_ENABLED(CONFIG_MIGRATION))
		kunit_skip(test, "needs CONFIG_MIGRATION");
	hmm_map_small_pages(t);
	hmm_touch(t, 7, 1, true);
	m.mm = t->mm;
	m.addr = hmm_addr(t, 7);
	m.folio = page_folio(hmm_cpu_page(t, 7));
	init_completion(&m.over);
	INIT_WORK_ONSTACK(&m.work, hmm_wake_waiters);
	hmm_ask(t, 7, 1);
	t->pfns[0] = HMM_UNTOUCHED;
	t->range.default_flags = HMM_READ;
	ret = hmm_answer_migrating(t, &m);
	destroy_work_on_stack(&m.work);

	KUNIT_EXPECT_EQ(test, ret, -EINTR);
	KUNIT_EXPECT_GE(test, m.wakes, HMM_LAST_FAULT);
	KUNIT_EXPECT_LE(test, m.wakes, HMM_LAST_FAULT + 1);
	hmm_expect_untouched(t, 0, 1);
}

static void hmm_kill_when_copied(struct hmm_fixture *t)
{
	if (t->invalidations == HMM_LAST_FAULT)
		hmm_kill_self();
}

/* Where many pages lack the same, too, a signal ends the call between two faults. */
static void hmm_test_killed_copying(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_zero_pages(t, HMM_PAGES);
	hmm_ask(t, 0, HMM_PAGES);
	t->range.default_flags = HMM_WRITE;
	t->invalidations = 0;
	t->on_invalidate = hmm_kill_when_copied;
	allow_signal(SIGKILL);
	KUNIT_EXPECT_EQ(test, hmm_answer(t), -EINTR);
	hmm_survive();
	KUNIT_EXPECT_LE(test, t->invalidations, HMM_LAST_FAULT + 1);
}

/* Those who wait for a lock */

/* Many times what a page table covers, and the most that anybody waits for. */
#define HMM_WAITED_FOR	(8UL * PTRS_PER_PTE)
#define HMM_LONG_WAIT	(2UL * PTRS_PER_PTE + 64)

/* Which fault it is in which somebody begins to wait. */
#define HMM_WAIT_FAULT	100UL

static unsigned long hmm_faults_so_far(const struct hmm_fixture *t)
{
	return READ_ONCE(t->handled) ?: READ_ONCE(t->invalidations);
}

/* As mprotect() does: keep everybody out of the address space, and of the VMA. */
static void hmm_lock_for_writing(struct work_struct *work)
{
	struct hmm_fixture *t = container_of(work, struct hmm_fixture, other);

	mmap_write_lock(t->mm);
	vma_start_write(vma_lookup(t->mm, t->start));
	t->kept = hmm_faults_so_far(t);
	mmap_write_unlock(t->mm);
}

static void hmm_begin_waiting(struct hmm_fixture *t)
{
	if (hmm_faults_so_far(t) != HMM_WAIT_FAULT)
		return;
	schedule_work(&t->other);
	schedule_timeout_uninterruptible(msecs_to_jiffies(50));
}

static vm_fault_t hmm_handle_waited_for(struct hmm_fixture *t, struct vm_fault *vmf,
					unsigned long page)
{
	hmm_begin_waiting(t);
	return hmm_handle_one_page(t, vmf);
}

/* A writer gets in soon, and the call gets done. */
static void hmm_expect_short_wait(struct hmm_fixture *t)
{
	INIT_WORK(&t->other, hmm_lock_for_writing);
	hmm_ask(t, 0, HMM_WAITED_FOR);
	t->range.default_flags = HMM_WRITE;
	KUNIT_EXPECT_EQ(t->test, hmm_answer(t), 0);
	flush_work(&t->other);
	KUNIT_EXPECT_GE(t->test, t->kept, HMM_WAIT_FAULT);
	KUNIT_EXPECT_LE(t->test, t->kept, HMM_WAIT_FAULT + HMM_LONG_WAIT);
}

/* The mmap lock is what the handler needs. */
static void hmm_test_wait_for_mmap_lock(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	hmm_map_one_page(t, HMM_WAITED_FOR);
	t->handle = hmm_handle_waited_for;
	hmm_expect_short_wait(t);
}

/* The lock of the VMA is all that it needs, where there is one. */
static void hmm_test_wait_for_vma_lock(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	t->by_vma = true;
	hmm_map_one_page(t, HMM_WAITED_FOR);
	t->handle = hmm_handle_waited_for;
	hmm_expect_short_wait(t);
}

/* Where pages are faulted one after the other, too. */
static void hmm_test_wait_for_copies(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;

	if (HMM_WAITED_FOR << PAGE_SHIFT > SZ_64M)
		kunit_skip(test, "page tables are too large");
	hmm_map_zero_pages(t, HMM_WAITED_FOR);
	t->invalidations = 0;
	t->on_invalidate = hmm_begin_waiting;
	hmm_expect_short_wait(t);
}

/* The suite */

#define HMM_UNLOCKED_CASE(name)	\
	KUNIT_CASE_PARAM(hmm_test_##name, hmm_unlocked_gen_params)

static struct kunit_case hmm_time_cases[] = {
	HMM_UNLOCKED_CASE(faults_for_nothing),
	KUNIT_CASE(hmm_test_faults_outrun),
	HMM_UNLOCKED_CASE(copying_takes_long),
	KUNIT_CASE(hmm_test_stale_large_range),
	KUNIT_CASE(hmm_test_stale_slow_range),
	HMM_CASE(killed_in_vain),
	HMM_UNLOCKED_CASE(never_comes),
	HMM_UNLOCKED_CASE(slow_read),
	HMM_UNLOCKED_CASE(slow_read_by_vma),
	HMM_UNLOCKED_CASE(slow_mmap_lock),
	KUNIT_CASE_SLOW(hmm_test_kept_from),
	HMM_CASE(killed_migrating),
	HMM_CASE(killed_copying),
	HMM_UNLOCKED_CASE(wait_for_mmap_lock),
	HMM_UNLOCKED_CASE(wait_for_vma_lock),
	HMM_UNLOCKED_CASE(wait_for_copies),
	{}
};

static struct kunit_suite hmm_time_suite = {
	.name = "hmm_time",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_time_cases,
};

kunit_test_suite(hmm_time_suite);
