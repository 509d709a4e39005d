// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): large entries, against a reference
 *
 * The rows that a PMD, a PUD or a hugetlb page can have, for ranges that begin
 * and end in different places of the page, and ask for one of its pages or for
 * all. What is stored is compared with the table in hmm_reference.h, and with
 * what hmm_oracle() finds.
 */
#include <kunit/resource.h>
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hmm.h>
#include <linux/kthread.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "hmm_oracle.h"
#include "hmm_world.h"

#define HMM_HUGE_ORDER	((unsigned long)PMD_ORDER << HMM_PFN_ORDER_SHIFT)

struct hmm_slice {
	long first;
	long n;
	bool all;
};

struct hmm_leaf_case {
	const struct hmm_row *row;
	const struct hmm_slice *slice;
	long asked;
	bool all;
	enum hmm_call_kind call;
};

/* In VMAs of these kinds, huge pages are judged by the VMA, too. */
static bool hmm_leaf_vma_possible(const struct hmm_row *row)
{
	switch (row->vma) {
	case REF_VMA_WRITABLE:
	case REF_VMA_READ_ONLY:
		return true;
	case REF_VMA_SHADOW_STACK:
		return row->entry == REF_EMPTY || row->entry == REF_WRITABLE ||
		       row->entry == REF_PRIVATE_WRITE;
	case REF_VMA_RWP:
		return row->entry == REF_RWP || row->entry == REF_PRIVATE_WRITE ||
		       hmm_is_private_uffd(row->entry);
	default:
		return false;
	}
}

static bool hmm_leaf_possible(const struct hmm_row *row)
{
	switch (row->entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_READ_ONLY:
	case REF_ZERO:
	case REF_PROTNONE:
	case REF_RWP:
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
	case REF_PRIVATE_WRITE:
	case REF_PRIVATE_READ:
	case REF_PRIVATE_OTHER:
	case REF_PRIVATE_WRITE_UFFD:
	case REF_PRIVATE_READ_UFFD:
	case REF_PRIVATE_OTHER_UFFD:
		return hmm_leaf_vma_possible(row) &&
		       hmm_world_possible(row->vma, row->entry);
	case REF_SPECIAL:
		return row->vma == REF_VMA_MIXED;
	default:
		return false;
	}
}

static const void *hmm_leaf_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_world_row_gen(&row, prev, desc, hmm_leaf_possible);
}

/* One VMA around a huge page, with nothing else in it, or one of hugetlbfs inside. */
static bool hmm_map_leaf(struct hmm_world *w, vm_flags_t flags)
{
	unsigned long start = w->base - PMD_SIZE;

	if (vm_mmap(NULL, start, 3 * PMD_SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, 0) != start)
		return false;
	hmm_world_change_vma(w, flags | VM_HUGEPAGE);
	/* Have a table for the PMD, below which there is nothing. */
	if (apply_to_page_range(w->mm, start, PAGE_SIZE, NULL, NULL))
		return false;
	return !w->leaf.file ||
	       vm_mmap(w->leaf.file, w->base, PMD_SIZE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_FIXED | MAP_NORESERVE, 0) == w->base;
}

static bool hmm_needs_memory(enum hmm_ref_entry entry)
{
	switch (entry) {
	case REF_EMPTY:
	case REF_SPECIAL:
	case REF_UFFD_WP:
	case REF_GUARD:
	case REF_POISON:
	case REF_MIXED_MARKER:
		return false;
	default:
		return true;
	}
}

static bool hmm_touch_leaf(struct hmm_world *w, enum hmm_ref_entry entry)
{
	void __user *at = (void __user *)w->base;
	unsigned long left;
	char byte = 0;

	if (!hmm_needs_memory(entry))
		return true;
	left = entry == REF_ZERO ? copy_from_user(&byte, at, 1) : copy_to_user(at, &byte, 1);
	return !left && pmd_leaf(pmdp_get(hmm_pmd(w->mm, w->base)));
}

static bool hmm_build_leaf(struct hmm_world *w, const struct hmm_row *row)
{
	if (!hmm_map_leaf(w, VM_READ | VM_WRITE) || !hmm_touch_leaf(w, row->entry))
		return false;
	hmm_world_plant_leaf(w, row->entry);
	hmm_world_change_vma(w, hmm_world_vma_flags(row->vma));
	return true;
}

static void hmm_tear_down_leaf(struct hmm_world *w)
{
	hmm_world_unplant_leaf(w);
	hmm_world_change_vma(w, VM_READ | VM_WRITE);
	vm_munmap(w->base - PMD_SIZE, 3 * PMD_SIZE);
}

static int hmm_ask_leaf(struct hmm_world *w, const struct hmm_leaf_case *c)
{
	unsigned long faults = hmm_world_faults(), request = hmm_request_flags(c->row->request);
	const struct hmm_slice *slice = c->slice;
	int ret, tries = 0;

	w->stop = false;
	if (w->leaf.folio)
		schedule_work(&w->mover);
	do {
		memset_l(w->leaf.pfns, HMM_STICKY, HPAGE_PMD_NR + 2);
		w->leaf.pfns[c->asked] |= c->all ? 0 : request;
		w->range = (struct hmm_range) {
			.notifier	= &w->notifier,
			.start		= w->base + slice->first * (long)PAGE_SIZE,
			.end		= w->base + (slice->first + slice->n) * (long)PAGE_SIZE,
			.hmm_pfns	= w->leaf.pfns,
			.default_flags	= c->all ? request : 0,
			.pfn_flags_mask	= HMM_WRITE,
			.dev_private_owner = hmm_world_owner(),
		};
		ret = hmm_world_call(w, c->call);
	} while (ret == -EBUSY && c->call == HMM_CALL_LOCKED && ++tries < 3);
	w->faults = hmm_world_faults() - faults;
	WRITE_ONCE(w->stop, true);
	flush_work(&w->mover);
	return ret;
}

/* What is stored for the @i-th element, all being well. */
static bool hmm_check_leaf_output(struct hmm_world *w, const struct hmm_leaf_case *c,
				  enum hmm_ref_answer answer, long i)
{
	unsigned long out = w->leaf.pfns[i] & ~HMM_STICKY, want = hmm_ref_output(answer);
	unsigned long *first = &w->leaf.pfns[max(0, -c->slice->first)];
	long page = c->slice->first + i;

	if (!(w->leaf.pfns[i] & HMM_STICKY))
		return hmm_wrong(w, "page %ld: sticky bits lost", page);
	if (page < 0 || page >= HPAGE_PMD_NR)
		return !out || hmm_wrong(w, "page %ld: stored %#lx outside", page, out);
	if (want & HMM_PFN_VALID)
		want |= HMM_HUGE_ORDER;
	if (answer != REF_FAULT && (out & HMM_PFN_FLAGS) != want)
		return hmm_wrong(w, "page %ld: stored %#lx, not %#lx", page, out, want);
	want = HMM_PFN_VALID | HMM_HUGE_ORDER | hmm_request_flags(c->row->request);
	if (answer == REF_FAULT && (out & want) != want)
		return hmm_wrong(w, "page %ld: stored %#lx after a fault", page, out);
	if (c->row->entry == REF_EMPTY && (out & ~want & HMM_PFN_WRITE) && !w->leaf.file)
		return hmm_wrong(w, "page %ld: faulted for write", page);
	want = *first & ~HMM_STICKY;
	if (want & HMM_PFN_VALID)
		want += &w->leaf.pfns[i] - first;
	return out == want || hmm_wrong(w, "page %ld: stored %#lx after %#lx", page, out, *first);
}

/* Before the page that cannot be had, elements may be outputs or not. */
static bool hmm_check_leaf_error(struct hmm_world *w, const struct hmm_leaf_case *c, long i)
{
	unsigned long in = HMM_STICKY, now = w->leaf.pfns[i];

	if (!c->all && i == c->asked)
		in |= hmm_request_flags(c->row->request);
	if (now == in || (i < c->asked && !c->all && (now & HMM_STICKY) == HMM_STICKY))
		return true;
	return hmm_wrong(w, "element %ld: %#lx became %#lx behind the cursor", i, in, now);
}

static bool hmm_check_leaf_oracle(struct hmm_world *w, const struct hmm_leaf_case *c, long i)
{
	unsigned long addr = w->range.start + (i << PAGE_SHIFT), want;

	mmap_read_lock(w->mm);
	want = hmm_oracle(w->mm, addr, w->range.dev_private_owner).out;
	mmap_read_unlock(w->mm);
	return (w->leaf.pfns[i] & ~HMM_STICKY) == want ||
	       hmm_wrong(w, "element %ld: stored %#lx, and there is %#lx", i,
			 w->leaf.pfns[i], want);
}

static bool hmm_check_leaf(struct hmm_world *w, const struct hmm_leaf_case *c, int ret)
{
	enum hmm_ref_answer answer;
	bool right = true;
	int want = 0;
	long i;

	answer = hmm_ref_answer(c->row->vma, c->row->entry, c->row->request);
	if (answer == REF_EPERM || answer == REF_EFAULT)
		want = answer == REF_EPERM ? -EPERM : -EFAULT;
	if (ret != want)
		return hmm_wrong(w, "returned %d, not %d", ret, want);
	if (w->faults != (answer == REF_FAULT ? 1 : 0))
		return hmm_wrong(w, "%lu faults", w->faults);
	for (i = 0; right && i < c->slice->n; i++)
		right = ret ? hmm_check_leaf_error(w, c, i) :
			      hmm_check_leaf_output(w, c, answer, i);
	return right && (ret || (hmm_check_leaf_oracle(w, c, 0) &&
				 hmm_check_leaf_oracle(w, c, c->slice->n - 1)));
}

static void hmm_try_leaf(struct hmm_world *w, const struct hmm_leaf_case *c)
{
	bool right;

	right = hmm_build_leaf(w, c->row) ? hmm_check_leaf(w, c, hmm_ask_leaf(w, c)) :
					    hmm_wrong(w, "there is no huge page");
	hmm_tear_down_leaf(w);
	KUNIT_EXPECT_TRUE_MSG(w->test, right, "%ld pages from %ld, asked for %ld%s, %s: %s",
			      c->slice->n, c->slice->first, c->asked, c->all ? " and all" : "",
			      hmm_world_call_names[c->call], w->why);
}

/* The page asked for is the first of the leaf, one inside, and the last. */
static void hmm_try_slice(struct hmm_world *w, struct hmm_leaf_case *c)
{
	const struct hmm_slice *slice = c->slice;
	long first = max(0, -slice->first);
	long last = min(slice->n, HPAGE_PMD_NR - slice->first) - 1;
	long asked[] = { first, (first + last) / 2, last };
	int i;

	for (i = 0; i < ARRAY_SIZE(asked); i++) {
		if (i && asked[i] == asked[i - 1])
			continue;
		c->asked = asked[i];
		c->all = false;
		hmm_try_leaf(w, c);
	}
	c->asked = first;
	c->all = true;
	if (slice->all)
		hmm_try_leaf(w, c);
}

static void hmm_prepare_leaf(struct hmm_world *w, struct file *hugetlb)
{
	hmm_world_map_large(w);
	w->leaf.file = hugetlb;
	w->leaf.pfns = kunit_kcalloc(w->test, HPAGE_PMD_NR + 2, sizeof(*w->leaf.pfns),
				     GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(w->test, w->leaf.pfns);
}

static void hmm_try_leaf_row(struct hmm_world *w, const struct hmm_row *row)
{
	/* powerpc knows the size of a huge page only when it has booted. */
	const struct hmm_slice slices[] = {
		{ 0, HPAGE_PMD_NR, true },
		{ 100, 300, true },
		{ HPAGE_PMD_NR - 1, 1, true },
		{ -1, HPAGE_PMD_NR + 2, false },
	};
	struct hmm_leaf_case c = { .row = row };
	int i;

	for (i = 0; i < HMM_CALLS * ARRAY_SIZE(slices); i++) {
		c.slice = &slices[i / HMM_CALLS];
		c.call = i % HMM_CALLS;
		hmm_try_slice(w, &c);
	}
}

static void hmm_test_huge_table(struct kunit *test)
{
	hmm_prepare_leaf(test->priv, NULL);
	hmm_try_leaf_row(test->priv, test->param_value);
}

/* All lengths from the first two pages on; else the shortest and the longest. */
static long hmm_next_length(long first, long n)
{
	long rest = HPAGE_PMD_NR - first;

	return first < 2 || n < 2 || n >= rest - 1 ? n + 1 : rest - 1;
}

/* However a range cuts a large entry, it gets its own part of it. */
static void hmm_try_all_slices(struct hmm_world *w)
{
	struct hmm_row row = { REF_VMA_WRITABLE, REF_WRITABLE, REF_NOTHING };
	struct hmm_slice slice = {};
	struct hmm_leaf_case c = { .row = &row, .slice = &slice, .all = true };
	bool right = hmm_build_leaf(w, &row);
	unsigned int tried = 0;

	for (; right && slice.first < HPAGE_PMD_NR; slice.first += right)
		for (slice.n = 1; right && slice.first + slice.n <= HPAGE_PMD_NR;
		     slice.n = hmm_next_length(slice.first, slice.n)) {
			c.call = (slice.first ^ slice.n) % HMM_CALLS;
			right = hmm_check_leaf(w, &c, hmm_ask_leaf(w, &c));
			tried++;
		}
	hmm_tear_down_leaf(w);
	KUNIT_EXPECT_TRUE_MSG(w->test, right, "%ld pages from %ld: %s", slice.n, slice.first,
			      w->why);
	/* Of the last four offsets, three have fewer lengths than four. */
	KUNIT_EXPECT_EQ(w->test, tried,
			HPAGE_PMD_NR + HPAGE_PMD_NR - 1 + 4 * (HPAGE_PMD_NR - 5) + 3 + 2 + 1);
}

static void hmm_test_huge_slices(struct kunit *test)
{
	hmm_prepare_leaf(test->priv, NULL);
	hmm_try_all_slices(test->priv);
}

/* Entries that become another while they are looked at */

#define HMM_RACES	20000

/**
 * struct hmm_race - two outcomes, and a thread that changes which it is
 * @w: where
 * @change: makes it the other one, and then the first again
 * @outs: the flags that pages have then
 * @seen: how often that was what a walk found
 */
struct hmm_race {
	struct hmm_world *w;
	void (*change)(struct hmm_world *w);
	unsigned long outs[2];
	unsigned long seen[2];
};

static int hmm_race_thread(void *data)
{
	struct hmm_race *race = data;

	while (!kthread_should_stop()) {
		race->change(race->w);
		cond_resched();
	}
	return 0;
}

/* Both pages are what they are by one and the same entry. */
static bool hmm_race_walk(struct hmm_race *race, unsigned long page,
			  enum hmm_call_kind call)
{
	struct hmm_world *w = race->w;
	int ret = hmm_world_ask_around(w, hmm_addr(w, page), 0, call);
	unsigned long out = w->pfns[1] & HMM_PFN_FLAGS & ~HMM_STICKY;
	int i;

	for (i = 0; i < 2; i++)
		if (out == race->outs[i])
			break;
	if (ret || i == 2)
		return hmm_wrong(w, "returned %d, stored %#lx", ret, w->pfns[1]);
	race->seen[i]++;
	return !page || (w->pfns[0] & HMM_PFN_FLAGS) == (w->pfns[1] & HMM_PFN_FLAGS) ||
	       hmm_wrong(w, "stored %#lx, then %#lx", w->pfns[0], w->pfns[1]);
}

/* On a busy machine the thread may be late. */
static bool hmm_race_is_over(const struct hmm_race *race, unsigned int walks,
			     unsigned long timeout)
{
	if (walks < HMM_RACES)
		return false;
	return (race->seen[0] && race->seen[1]) || time_after(jiffies, timeout);
}

/*
 * Look at the first pages at the base, by themselves and with the page before
 * them, which has another entry.
 */
static void hmm_run_race(struct hmm_race *race)
{
	unsigned long timeout = jiffies + 10 * HZ;
	struct hmm_world *w = race->w;
	struct task_struct *task;
	bool right = true;
	unsigned int i;

	task = kthread_run(hmm_race_thread, race, "hmm_race");
	if (IS_ERR(task)) {
		KUNIT_FAIL(w->test, "there is no thread: %ld", PTR_ERR(task));
		return;
	}
	for (i = 0; right && !hmm_race_is_over(race, i, timeout); i++)
		right = hmm_race_walk(race, i / HMM_CALLS & 1, i % HMM_CALLS);
	kthread_stop(task);
	KUNIT_EXPECT_TRUE_MSG(w->test, right, "walk %u: %s", i, w->why);
	KUNIT_EXPECT_GT(w->test, race->seen[0], 0);
	KUNIT_EXPECT_GT(w->test, race->seen[1], 0);
}

static void hmm_put_pmd(struct hmm_world *w, pmd_t pmd)
{
	pmd_t *pmdp = hmm_pmd(w->mm, w->base);
	spinlock_t *ptl = pmd_lock(w->mm, pmdp);

	WRITE_ONCE(*pmdp, pmd);
	spin_unlock(ptl);
}

static void hmm_change_pmd(struct hmm_world *w)
{
	hmm_put_pmd(w, w->leaf.planted);
	hmm_put_pmd(w, w->leaf.saved);
}

/* A page table that is a huge entry of no memory, now and then. */
static void hmm_test_huge_race(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	struct hmm_race race = {
		.w	= w,
		.change	= hmm_change_pmd,
		.outs	= { HMM_PFN_VALID | HMM_PFN_WRITE, HMM_PFN_ERROR },
	};
	unsigned long start, page;
	char byte = 0;

	hmm_world_map_large(w);
	start = w->base - PMD_SIZE;
	KUNIT_ASSERT_EQ(test, start, vm_mmap(NULL, start, 3 * PMD_SIZE, PROT_READ | PROT_WRITE,
					     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, 0));
	hmm_world_change_vma(w, hmm_world_vma_flags(REF_VMA_MIXED) | VM_NOHUGEPAGE);
	for (page = 0; page < 2; page++)
		KUNIT_ASSERT_EQ(test, 0, copy_to_user((void __user *)hmm_addr(w, page), &byte, 1));
	w->leaf.saved = pmdp_get(hmm_pmd(w->mm, w->base));
	w->leaf.planted = hmm_world_make_pmd(w, REF_SPECIAL, w->leaf.saved);
	KUNIT_ASSERT_FALSE(test, pmd_leaf(w->leaf.saved));
	hmm_run_race(&race);
	hmm_world_change_vma(w, VM_READ | VM_WRITE);
}

#ifdef CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD
/* A PUD that is a leaf, of no memory, in a mapping that makes such on a fault */

/* Pages @page - 1 and @page of the PUD at the base, which maps pfn 0 and on. */
static void hmm_expect_pud(struct hmm_world *w, const struct hmm_row *row, unsigned long page,
			   enum hmm_call_kind call)
{
	enum hmm_ref_answer answer = hmm_ref_answer(row->vma, row->entry, row->request);
	unsigned long want = hmm_ref_output(answer) | HMM_STICKY;
	unsigned long faults = hmm_world_faults();
	int ret;

	if (answer == REF_FAULT)
		want |= hmm_request_flags(row->request);
	if (want & HMM_PFN_VALID)
		want |= (((unsigned long)PUD_ORDER << HMM_PFN_ORDER_SHIFT) | (page - 1));
	ret = hmm_world_ask_around(w, w->base + (page << PAGE_SHIFT),
				   hmm_request_flags(row->request), call);
	KUNIT_EXPECT_EQ(w->test, ret, answer == REF_EPERM ? -EPERM :
				      answer == REF_EFAULT ? -EFAULT : 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], ret ? HMM_STICKY : want);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], ret ? HMM_STICKY :
			want + (want & HMM_PFN_VALID ? 1 : 0));
	KUNIT_EXPECT_EQ(w->test, hmm_world_faults() - faults, answer == REF_FAULT);
}

static bool hmm_pud_possible(const struct hmm_row *row)
{
	switch (row->entry) {
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_READ_ONLY:
		return row->vma == REF_VMA_WRITABLE || row->vma == REF_VMA_READ_ONLY;
	case REF_SPECIAL:
		return row->vma == REF_VMA_MIXED;
	default:
		return false;
	}
}

static const void *hmm_pud_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_world_row_gen(&row, prev, desc, hmm_pud_possible);
}

static pud_t hmm_make_pud(enum hmm_ref_entry entry)
{
	vm_flags_t flags = entry == REF_WRITABLE ? VM_READ | VM_WRITE | VM_SHARED : VM_READ;
	pud_t pud = pud_mkhuge(pfn_pud(0, vm_get_page_prot(flags)));

	if (entry == REF_EMPTY)
		return __pud(0);
	return entry == REF_SPECIAL ? pud_mkspecial(pud) : pud;
}

static vm_fault_t hmm_pud_fault(struct vm_fault *vmf, unsigned int order)
{
	if (order != PUD_ORDER)
		return VM_FAULT_FALLBACK;
	*vmf->pud = hmm_make_pud(vmf->flags & FAULT_FLAG_WRITE ? REF_WRITABLE : REF_READ_ONLY);
	return VM_FAULT_NOPAGE;
}

static const struct vm_operations_struct hmm_pud_vm_ops = {
	.huge_fault = hmm_pud_fault,
};

static int hmm_pud_mmap(struct file *file, struct vm_area_struct *vma)
{
	vma->vm_ops = &hmm_pud_vm_ops;
	return 0;
}

static const struct file_operations hmm_pud_fops = {
	.mmap = hmm_pud_mmap,
};

/* The page before the PUD is ordinary memory, so that all tables above are there. */
static void hmm_map_pud(struct hmm_world *w)
{
	unsigned long start = hmm_world_map_large(w);
	struct file *file;

	w->base = start + PUD_SIZE;
	KUNIT_ASSERT_EQ(w->test, hmm_world_ask_around(w, w->base, HMM_READ, HMM_CALL_LOCKED), 0);
	file = anon_inode_create_getfile("[hmm_kunit]", &hmm_pud_fops, w, O_RDWR, NULL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(w->test, file);
	KUNIT_EXPECT_EQ(w->test, w->base,
			vm_mmap(file, w->base, PUD_SIZE, PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_FIXED, 0));
	fput(file);
}

static void hmm_test_pud_table(struct kunit *test)
{
	const unsigned long pages[] = { 1, 77, PTRS_PER_PMD * PTRS_PER_PTE - 1 };
	const struct hmm_row *row = test->param_value;
	struct hmm_world *w = test->priv;
	pud_t *pudp;
	int i;

	hmm_map_pud(w);
	pudp = hmm_pud(w->mm, w->base);
	KUNIT_ASSERT_TRUE(test, pud_none(pudp_get(pudp)));
	/* Faults ask a mapping for a PUD only if it is mixed and wants such. */
	hmm_world_change_vma(w, hmm_world_vma_flags(row->vma) | VM_MIXEDMAP | VM_HUGEPAGE);
	for (i = 0; i < HMM_CALLS * ARRAY_SIZE(pages); i++) {
		*pudp = hmm_make_pud(row->entry);
		hmm_expect_pud(w, row, pages[i / HMM_CALLS], i % HMM_CALLS);
	}
	*pudp = __pud(0);
	hmm_world_change_vma(w, VM_READ | VM_WRITE);
}

static void hmm_put_pud(struct hmm_world *w, pud_t pud)
{
	pud_t *pudp = hmm_pud(w->mm, w->base);
	spinlock_t *ptl = pud_lock(w->mm, pudp);

	WRITE_ONCE(*pudp, pud);
	spin_unlock(ptl);
}

static void hmm_change_pud(struct hmm_world *w)
{
	hmm_put_pud(w, hmm_make_pud(REF_WRITABLE));
	hmm_put_pud(w, hmm_make_pud(REF_EMPTY));
}

/* A hole that is a huge entry, now and then. */
static void hmm_test_pud_race(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	struct hmm_race race = {
		.w	= w,
		.change	= hmm_change_pud,
		.outs	= { 0, HMM_PFN_VALID | HMM_PFN_WRITE |
			       ((unsigned long)PUD_ORDER << HMM_PFN_ORDER_SHIFT) },
	};

	hmm_map_pud(w);
	KUNIT_ASSERT_TRUE(test, pud_none(pudp_get(hmm_pud(w->mm, w->base))));
	hmm_world_change_vma(w, hmm_world_vma_flags(REF_VMA_MIXED));
	hmm_run_race(&race);
	hmm_world_change_vma(w, VM_READ | VM_WRITE);
}

#define HMM_PUD_PAGES	((unsigned long)PTRS_PER_PMD * PTRS_PER_PTE)

/**
 * struct hmm_pud_change - an entry that becomes another while a walk stores its pages
 * @work: changes it
 * @w: where it is
 * @pfns: an element for each page
 * @from: what it is at first
 * @to: what it is after that
 * @loses: it loses something, so that the range is invalidated
 * @ready: @work waits for the walk
 * @over: the call is over, and there is nothing to wait for any more
 */
struct hmm_pud_change {
	struct work_struct work;
	struct hmm_world *w;
	unsigned long *pfns;
	enum hmm_ref_entry from;
	enum hmm_ref_entry to;
	bool loses;
	struct completion ready;
	bool over;
};

/* Modules cannot invalidate a range: what does it is not exported. */
#define HMM_MAY_LOSE	IS_BUILTIN(CONFIG_HMM_KUNIT_TEST)

/* No output of these entries is an error. */
#define HMM_NOT_STORED	HMM_PFN_ERROR

static void hmm_change_pud_half_way(struct work_struct *work)
{
	struct hmm_pud_change *c = container_of(work, struct hmm_pud_change, work);
	unsigned long base = c->w->base;
	struct mmu_notifier_range range;

	complete(&c->ready);
	while (READ_ONCE(c->pfns[HMM_PUD_PAGES / 2]) == HMM_NOT_STORED && !READ_ONCE(c->over))
		cond_resched();
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, c->w->mm, base, base + PUD_SIZE);
	if (HMM_MAY_LOSE && c->loses)
		mmu_notifier_invalidate_range_start(&range);
	hmm_put_pud(c->w, hmm_make_pud(c->to));
	if (HMM_MAY_LOSE && c->loses)
		mmu_notifier_invalidate_range_end(&range);
}

/* Where both get on at the same time, if there is more than one processor. */
static int hmm_other_cpu(void)
{
	int cpu = cpumask_any_but(cpu_online_mask, raw_smp_processor_id());

	return cpu < nr_cpu_ids ? cpu : raw_smp_processor_id();
}

/* The flags of the pages that @entry maps. */
static unsigned long hmm_pud_flags(enum hmm_ref_entry entry)
{
	unsigned long order = (unsigned long)PUD_ORDER << HMM_PFN_ORDER_SHIFT;

	if (entry == REF_EMPTY)
		return 0;
	return HMM_PFN_VALID | order | (entry == REF_WRITABLE ? HMM_PFN_WRITE : 0);
}

static void hmm_expect_alike(struct hmm_pud_change *c)
{
	unsigned long first = c->pfns[0], step = first & HMM_PFN_VALID ? 1 : 0;
	unsigned long i;

	for (i = 0; i < HMM_PUD_PAGES && c->pfns[i] == first + i * step; i++)
		;
	KUNIT_EXPECT_EQ_MSG(c->w->test, i, HMM_PUD_PAGES, "stored %#lx, then %#lx", first,
			    i < HMM_PUD_PAGES ? c->pfns[i] : 0);
}

/* Returns whether the change came while the walk was under way. */
static bool hmm_try_pud_change(struct hmm_pud_change *c, enum hmm_call_kind call)
{
	struct hmm_world *w = c->w;
	unsigned long flags;
	int ret;

	hmm_put_pud(w, hmm_make_pud(c->from));
	memset_l(c->pfns, HMM_NOT_STORED, HMM_PUD_PAGES);
	w->range = (struct hmm_range) {
		.notifier	= &w->notifier,
		.start		= w->base,
		.end		= w->base + PUD_SIZE,
		.hmm_pfns	= c->pfns,
	};
	c->over = false;
	schedule_work_on(hmm_other_cpu(), &c->work);
	wait_for_completion(&c->ready);
	ret = hmm_world_call(w, call);
	WRITE_ONCE(c->over, true);
	flush_work(&c->work);

	if (ret == -EBUSY && c->loses && call == HMM_CALL_LOCKED)
		return true;
	KUNIT_EXPECT_EQ(w->test, ret, 0);
	hmm_expect_alike(c);
	flags = c->pfns[0] & HMM_PFN_FLAGS;
	if (flags == hmm_pud_flags(c->to))
		return true;
	KUNIT_EXPECT_EQ(w->test, flags, hmm_pud_flags(c->from));
	return false;
}

/* On a busy machine the change is late, more often than not. */
static void hmm_expect_pud_change(struct hmm_pud_change *c)
{
	enum hmm_call_kind call;
	unsigned long timeout;
	bool in_time;

	for (call = HMM_CALL_LOCKED; call <= HMM_CALL_UNLOCKED; call++) {
		timeout = jiffies + 20 * HZ;
		do {
			in_time = hmm_try_pud_change(c, call);
		} while (!in_time && time_before(jiffies, timeout));
		KUNIT_EXPECT_TRUE_MSG(c->w->test, in_time, "%d to %d, %s", c->from, c->to,
				      hmm_world_call_names[call]);
	}
}

/* All pages of the entry are stored alike, though others may change it in between. */
static void hmm_test_pud_changes(struct kunit *test)
{
	static const struct {
		enum hmm_ref_entry from, to;
		bool loses;
	} rows[] = {
		{ REF_READ_ONLY, REF_WRITABLE, false },
		{ REF_EMPTY, REF_READ_ONLY, false },
		{ REF_WRITABLE, REF_READ_ONLY, true },
		{ REF_WRITABLE, REF_EMPTY, true },
	};
	struct hmm_world *w = test->priv;
	struct hmm_pud_change c = { .w = w };
	int i;

	hmm_map_pud(w);
	c.pfns = kvmalloc_array(HMM_PUD_PAGES, sizeof(*c.pfns), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, c.pfns);
	hmm_world_change_vma(w, hmm_world_vma_flags(REF_VMA_MIXED));
	init_completion(&c.ready);
	INIT_WORK_ONSTACK(&c.work, hmm_change_pud_half_way);
	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		if (rows[i].loses && !HMM_MAY_LOSE)
			continue;
		c.from = rows[i].from;
		c.to = rows[i].to;
		c.loses = rows[i].loses;
		hmm_expect_pud_change(&c);
	}
	destroy_work_on_stack(&c.work);
	kvfree(c.pfns);
	hmm_put_pud(w, __pud(0));
	hmm_world_change_vma(w, VM_READ | VM_WRITE);
}
#endif /* CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD */

#ifdef CONFIG_HUGETLBFS
/* Hugetlb entries */

static bool hmm_hugetlb_possible(const struct hmm_row *row)
{
	if (row->vma == REF_VMA_RWP)
		return row->entry == REF_RWP && hmm_world_possible(row->vma, row->entry);
	if (row->vma != REF_VMA_WRITABLE && row->vma != REF_VMA_READ_ONLY)
		return false;
	switch (row->entry) {
	case REF_PROTNONE:
		/* No kernel makes one, so that faults do not know what to do. */
		return hmm_ref_answer(row->vma, row->entry, row->request) != REF_FAULT &&
		       hmm_world_possible(row->vma, row->entry);
	case REF_EMPTY:
	case REF_WRITABLE:
	case REF_READ_ONLY:
	case REF_MIGRATION_READ:
	case REF_MIGRATION_EXCLUSIVE:
	case REF_MIGRATION_WRITE:
	case REF_UFFD_WP:
	case REF_GUARD:
	case REF_POISON:
	case REF_MIXED_MARKER:
	case REF_HWPOISON:
		return hmm_world_possible(row->vma, row->entry);
	default:
		return false;
	}
}

static const void *hmm_hugetlb_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_world_row_gen(&row, prev, desc, hmm_hugetlb_possible);
}

static void hmm_unmount(void *mount)
{
	kern_unmount(mount);
}

static void hmm_put_file(void *file)
{
	fput(file);
}

static struct file *hmm_hugetlb_file(struct kunit *test)
{
	struct file_system_type *type = get_fs_type("hugetlbfs");
	struct vfsmount *mount;
	struct file *file;
	struct path root;

	KUNIT_ASSERT_NOT_NULL(test, type);
	mount = kern_mount(type);
	module_put(type->owner);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, mount);
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, hmm_unmount, mount), 0);
	root = (struct path) { .mnt = mount, .dentry = mount->mnt_root };
	file = file_open_root(&root, "hmm", O_RDWR | O_CREAT, 0600);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, file);
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, hmm_put_file, file), 0);
	return file;
}

static void hmm_prepare_hugetlb(struct hmm_world *w)
{
	struct hmm_row row = { REF_VMA_WRITABLE, REF_WRITABLE, REF_NOTHING };
	bool built;

	hmm_prepare_leaf(w, hmm_hugetlb_file(w->test));
	built = hmm_build_leaf(w, &row);
	hmm_tear_down_leaf(w);
	if (!built)
		kunit_skip(w->test, "there is no page in the pool of hugetlb pages");
}

static void hmm_test_hugetlb_table(struct kunit *test)
{
	hmm_prepare_hugetlb(test->priv);
	hmm_try_leaf_row(test->priv, test->param_value);
}

static void hmm_test_hugetlb_slices(struct kunit *test)
{
	hmm_prepare_hugetlb(test->priv);
	hmm_try_all_slices(test->priv);
}

/* The last page of one huge page and the first of the next, or holes. */
static void hmm_expect_hugetlb(struct hmm_world *w, unsigned long addr, unsigned long request,
			       unsigned long want)
{
	int call;

	for (call = 0; call < HMM_CALLS; call++) {
		KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, request, call), 0);
		KUNIT_EXPECT_EQ(w->test, w->pfns[0] & HMM_PFN_FLAGS, want | HMM_STICKY);
		KUNIT_EXPECT_EQ(w->test, w->pfns[1] & HMM_PFN_FLAGS, want | HMM_STICKY);
	}
}

/* Several pages at once, where at first not even the tables of them are there. */
static void hmm_test_hugetlb_pages(struct kunit *test)
{
	const unsigned long mapped = HMM_PFN_VALID | HMM_PFN_WRITE | HMM_HUGE_ORDER;
	struct hmm_world *w = test->priv;
	unsigned long start, faults;

	hmm_prepare_hugetlb(w);
	start = w->base - PMD_SIZE + PUD_SIZE;
	KUNIT_ASSERT_EQ(test, start, vm_mmap(w->leaf.file, start, 2 * PMD_SIZE,
					     PROT_READ | PROT_WRITE,
					     MAP_SHARED | MAP_FIXED | MAP_NORESERVE, 0));
	faults = hmm_world_faults();
	hmm_expect_hugetlb(w, start + PMD_SIZE, 0, 0);
	hmm_expect_hugetlb(w, start + 77 * PAGE_SIZE, 0, 0);
	hmm_expect_hugetlb(w, start + PMD_SIZE, HMM_WRITE, mapped);
	KUNIT_EXPECT_EQ(test, hmm_world_faults() - faults, 2);
	hmm_expect_hugetlb(w, start + PMD_SIZE, 0, mapped);
	/* Each is itself, and not the other. */
	KUNIT_EXPECT_EQ(test, w->pfns[0] & (HPAGE_PMD_NR - 1), HPAGE_PMD_NR - 1);
	KUNIT_EXPECT_EQ(test, w->pfns[1] & (HPAGE_PMD_NR - 1), 0);
}
#endif /* CONFIG_HUGETLBFS */

static struct kunit_case hmm_leaf_cases[] = {
	KUNIT_CASE_PARAM_ATTR(hmm_test_huge_table, hmm_leaf_gen_params,
			      { .speed = KUNIT_SPEED_SLOW }),
	KUNIT_CASE_SLOW(hmm_test_huge_slices),
	KUNIT_CASE_SLOW(hmm_test_huge_race),
#ifdef CONFIG_HAVE_ARCH_TRANSPARENT_HUGEPAGE_PUD
	KUNIT_CASE_PARAM(hmm_test_pud_table, hmm_pud_gen_params),
	KUNIT_CASE_SLOW(hmm_test_pud_race),
	KUNIT_CASE_SLOW(hmm_test_pud_changes),
#endif
#ifdef CONFIG_HUGETLBFS
	KUNIT_CASE_PARAM_ATTR(hmm_test_hugetlb_table, hmm_hugetlb_gen_params,
			      { .speed = KUNIT_SPEED_SLOW }),
	KUNIT_CASE_SLOW(hmm_test_hugetlb_slices),
	KUNIT_CASE(hmm_test_hugetlb_pages),
#endif
	{}
};

static struct kunit_suite hmm_leaf_suite = {
	.name = "hmm_leaf",
	.suite_init = hmm_world_suite_init,
	.suite_exit = hmm_world_suite_exit,
	.init = hmm_world_init,
	.exit = hmm_world_exit,
	.test_cases = hmm_leaf_cases,
};

kunit_test_suite(hmm_leaf_suite);
