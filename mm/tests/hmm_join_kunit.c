// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): large folios that PTEs map
 *
 * The tests' own fault handler maps the pages of compound pages one by one, so
 * that mappings of every order lie in every way to the page tables and to the
 * range. What the orders have to be is worked out page by page.
 */
#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/vmalloc.h>

#include "hmm_fixture.h"

/* Large enough for the largest folio at every place in the smallest's. */
#define HMM_JOIN_LAST	256UL

/* With so many pages of the first folio before it, all are aligned in the mapping. */
#define HMM_IN_STEP	((HMM_START >> PAGE_SHIFT) % 8)

/**
 * struct hmm_folios - what a mapping is made of
 * @order: of each
 * @shift: how many pages of the first one lie before the mapping
 * @missing: the one page that is not mapped, or HMM_JOIN_LAST
 * @pages: the first page of each
 */
struct hmm_folios {
	unsigned int order;
	unsigned long shift;
	unsigned long missing;
	struct page *pages[HMM_JOIN_LAST + 1];
};

static unsigned long hmm_nr_folios(const struct hmm_folios *f)
{
	return ((HMM_JOIN_LAST + f->shift - 1) >> f->order) + 1;
}

static struct page *hmm_folio_page(const struct hmm_folios *f, unsigned long page)
{
	unsigned long i = page + f->shift;

	return f->pages[i >> f->order] + (i & ((1UL << f->order) - 1));
}

static vm_fault_t hmm_handle_folio(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	vmf->page = hmm_folio_page(t->private, page);
	get_page(vmf->page);
	return 0;
}

static void hmm_put_folios(void *data)
{
	struct hmm_folios *f = data;
	unsigned long i;

	for (i = 0; i < ARRAY_SIZE(f->pages); i++)
		if (f->pages[i])
			put_page(f->pages[i]);
}

static void hmm_free_elements(void *elements)
{
	vfree(elements);
}

static struct hmm_folios *hmm_map_folios(struct hmm_fixture *t, unsigned int order,
					 unsigned long shift)
{
	struct hmm_folios *f = kunit_kzalloc(t->test, sizeof(*f), GFP_KERNEL);
	unsigned long i;

	KUNIT_ASSERT_NOT_NULL(t->test, f);
	KUNIT_ASSERT_EQ(t->test, 0, kunit_add_action_or_reset(t->test, hmm_put_folios, f));
	f->order = order;
	f->shift = shift;
	f->missing = HMM_JOIN_LAST;
	for (i = 0; i < hmm_nr_folios(f); i++) {
		f->pages[i] = alloc_pages(GFP_KERNEL | __GFP_COMP, order);
		KUNIT_ASSERT_NOT_NULL(t->test, f->pages[i]);
	}
	t->private = f;
	t->handle = hmm_handle_folio;
	return f;
}

/* Are pages [@page, @page + @size) what a device can map with one entry? */
static bool hmm_is_block(struct hmm_fixture *t, unsigned long page, unsigned long size)
{
	const struct hmm_folios *f = t->private;
	struct page *first = hmm_folio_page(f, page);

	return (page + f->shift) >> f->order == (page + size - 1 + f->shift) >> f->order &&
	       page_to_pfn(first) % size == 0 &&
	       (f->missing < page || f->missing >= page + size) &&
	       hmm_writable(t, page) == hmm_writable(t, page + size - 1);
}

/* What order has @page to have in a range of pages [@first, @end)? */
static unsigned int hmm_order_due(struct hmm_fixture *t, unsigned long page,
				  unsigned long first, unsigned long end)
{
	const struct hmm_folios *f = t->private;
	unsigned long vpn = t->start >> PAGE_SHIFT, size, begin;
	unsigned int order;

	for (order = f->order; order >= 2; order--) {
		size = 1UL << order;
		begin = ALIGN_DOWN(vpn + page, size);
		if (begin >= vpn + first && begin + size <= vpn + end &&
		    hmm_is_block(t, begin - vpn, size))
			return order;
	}
	return 0;
}

/* Sticky bits that differ are no reason to take a mapping apart. */
static unsigned long hmm_sticky(unsigned long page)
{
	return page % 3 ? HMM_PFN_P2PDMA : HMM_PFN_DMA_MAPPED;
}

/* The elements of the range, which begins with page @first of the mapping. */
static void hmm_expect_joined(struct hmm_fixture *t, unsigned long first, unsigned long end)
{
	const struct hmm_folios *f = t->private;
	unsigned long i, out;

	for (i = first; i < end; i++) {
		out = HMM_PFN_VALID | page_to_pfn(hmm_folio_page(f, i)) | hmm_sticky(i) |
		      (unsigned long)hmm_order_due(t, i, first, end) << HMM_PFN_ORDER_SHIFT;
		if (hmm_writable(t, i))
			out |= HMM_PFN_WRITE;
		if (i == f->missing)
			out = hmm_sticky(i);
		KUNIT_ASSERT_EQ_MSG(t->test, t->range.hmm_pfns[i - first], out,
				    "page %lu of [%lu, %lu), folios of order %u with %lu before",
				    i, first, end, f->order, f->shift);
	}
}

/*
 * Elements have what an earlier call may have left there, and so have those
 * around the range: @HMM_MARGIN before it, and as many behind it.
 */
#define HMM_MARGIN	4UL

static unsigned long hmm_left_there(const struct hmm_fixture *t, unsigned long page)
{
	if (page >= HMM_JOIN_LAST)
		return 0;
	return HMM_PFN_VALID | HMM_PFN_WRITE | page_to_pfn(hmm_folio_page(t->private, page)) |
	       hmm_sticky(page) | 3UL << HMM_PFN_ORDER_SHIFT;
}

/* A page that is missing is not asked for. */
static int hmm_ask_folios(struct hmm_fixture *t, unsigned long first, unsigned long end)
{
	const struct hmm_folios *f = t->private;
	unsigned long i;

	hmm_ask(t, first, end - first);
	for (i = 0; i < end - first + 2 * HMM_MARGIN; i++)
		t->pfns[i] = hmm_left_there(t, first + i - HMM_MARGIN);
	t->range.hmm_pfns = t->pfns + HMM_MARGIN;
	t->range.default_flags = f->missing < HMM_JOIN_LAST ? 0 : HMM_READ;
	return hmm_answer_retry(t);
}

/* Elements of t->pfns that are what they were. */
static void hmm_expect_as_asked(struct hmm_fixture *t, unsigned long i, unsigned long n)
{
	KUNIT_ASSERT_MEMEQ(t->test, &t->pfns[i], &t->asked[i], n * sizeof(*t->pfns));
}

static void hmm_ask_joined(struct hmm_fixture *t, unsigned long first, unsigned long end)
{
	KUNIT_ASSERT_EQ(t->test, hmm_ask_folios(t, first, end), 0);
	hmm_expect_joined(t, first, end);
	hmm_expect_as_asked(t, 0, HMM_MARGIN);
	hmm_expect_as_asked(t, HMM_MARGIN + end - first, HMM_MARGIN);
}

/* Every order, at some places in memory and the address space, cut everywhere. */
static void hmm_test_joined(struct kunit *test)
{
	static const unsigned long shifts[] = { 0, 1, HMM_IN_STEP, HMM_IN_STEP + 4 };
	struct hmm_fixture *t = test->priv;
	unsigned long i, first, end;
	unsigned int order;

	hmm_map_handler(t);
	for (order = 0; order <= 6; order++)
		for (i = 0; i < ARRAY_SIZE(shifts); i++) {
			hmm_zap(t, 0, HMM_JOIN_LAST);
			hmm_map_folios(t, order, shifts[i] % (1UL << order));
			for (first = 0; first < 70; first += 7)
				for (end = first + 1; end < HMM_JOIN_LAST; end += 13)
					hmm_ask_joined(t, first, end);
		}
}

/* From page 100 on nobody may write: that divides whatever folio it is in. */
static void hmm_test_joined_by_rights(struct kunit *test)
{
	const unsigned long from = 100, size = (HMM_PAGES - from) << PAGE_SHIFT;
	struct hmm_fixture *t = test->priv;
	unsigned long addr, first;

	hmm_map_handler(t);
	hmm_map_folios(t, 6, HMM_IN_STEP);
	addr = kunit_vm_mmap(test, t->file, hmm_addr(t, from), size, PROT_READ,
			     MAP_SHARED | MAP_FIXED, from << PAGE_SHIFT);
	KUNIT_ASSERT_EQ(test, addr, hmm_addr(t, from));
	for (first = 0; first < from; first++)
		hmm_ask_joined(t, first, HMM_JOIN_LAST);
}

/*
 * Give the pages from @from on a VMA of their own, with the same rights. It is mapped
 * with others, so that it is not merged.
 */
static void hmm_split_vma(struct hmm_fixture *t, unsigned long from)
{
	const unsigned long size = (HMM_PAGES - from) << PAGE_SHIFT;
	struct vm_area_struct *vma;
	unsigned long addr;

	addr = kunit_vm_mmap(t->test, t->file, hmm_addr(t, from), size, PROT_READ,
			     MAP_SHARED | MAP_FIXED, from << PAGE_SHIFT);
	KUNIT_ASSERT_EQ(t->test, addr, hmm_addr(t, from));
	mmap_write_lock(t->mm);
	vma = vma_lookup(t->mm, addr);
	vm_flags_set(vma, VM_WRITE);
	vma->vm_page_prot = vm_get_page_prot(vma->vm_flags);
	mmap_write_unlock(t->mm);
}

/* A page that is missing parts what is before it from what is behind. */
static void hmm_test_joined_around_hole(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	struct hmm_folios *f;

	hmm_map_handler(t);
	f = hmm_map_folios(t, 6, HMM_IN_STEP);
	for (f->missing = 0; f->missing < 70; f->missing++) {
		hmm_touch(t, 0, HMM_JOIN_LAST, true);
		hmm_zap(t, f->missing, 1);
		hmm_ask_joined(t, 0, HMM_JOIN_LAST);
	}
}

/*
 * A fault stops the walk in the middle of a folio: what was stored before that
 * and what is after it are one mapping all the same.
 */
static void hmm_test_joined_across_faults(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long missing;

	hmm_map_handler(t);
	hmm_map_folios(t, 5, HMM_IN_STEP);
	hmm_ask_joined(t, 0, HMM_JOIN_LAST);
	for (missing = 0; missing < 70; missing++) {
		hmm_zap(t, missing, 1);
		hmm_ask_joined(t, 3, HMM_JOIN_LAST);
	}
}

/* Nothing but the elements is looked at: what is around them cannot be read. */
static void hmm_test_joined_elements_alone(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long *elements, i, first;

	if (PAGE_SIZE / sizeof(*elements) > HMM_PAGES - 8)
		kunit_skip(test, "a page holds more elements than a mapping has pages");
	elements = vmalloc(PAGE_SIZE);
	KUNIT_ASSERT_NOT_NULL(test, elements);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, hmm_free_elements, elements));
	hmm_map_handler(t);
	hmm_map_folios(t, 5, HMM_IN_STEP);
	hmm_ask_joined(t, 0, HMM_JOIN_LAST);
	for (first = 0; first < 8; first++) {
		hmm_ask(t, first, PAGE_SIZE / sizeof(*elements));
		t->range.hmm_pfns = elements;
		for (i = 0; i < PAGE_SIZE / sizeof(*elements); i++)
			elements[i] = hmm_sticky(first + i);
		KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
		hmm_expect_joined(t, first, HMM_JOIN_LAST);
	}
}

static vm_fault_t hmm_handle_no_folio(struct hmm_fixture *t, struct vm_fault *vmf,
				      unsigned long page)
{
	return VM_FAULT_SIGBUS;
}

/* What is not stored is not looked at, however much it looks like an output. */
static void hmm_test_joined_before_error(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long missing;

	hmm_map_handler(t);
	hmm_map_folios(t, 5, HMM_IN_STEP);
	for (missing = 32; missing < 64; missing++) {
		t->handle = hmm_handle_folio;
		hmm_ask_joined(t, 0, HMM_JOIN_LAST);
		t->handle = hmm_handle_no_folio;
		hmm_zap(t, missing, 1);
		KUNIT_ASSERT_EQ(test, hmm_ask_folios(t, 0, HMM_JOIN_LAST), -EFAULT);
		hmm_expect_joined(t, 0, missing);
		hmm_expect_as_asked(t, HMM_MARGIN + missing, HMM_JOIN_LAST - missing);
	}
}

/*
 * Elements are the caller's, who may change what is in them at any time. What is joined
 * is what the page tables hold.
 */

/* Which pages somebody stores into the elements of, and what. */
struct hmm_scribble {
	struct hmm_folios *folios;
	unsigned long at;
	unsigned long first;
	unsigned long end;
	bool wild;
};

/* What the page would have if it was mapped, or a page that no machine has. */
static unsigned long hmm_scribbled(const struct hmm_scribble *s, unsigned long page)
{
	unsigned long out = HMM_PFN_VALID | HMM_PFN_WRITE;

	if (s->wild)
		return out | ((HMM_PFN_DMA_MAPPED >> 12) + page);
	return out | page_to_pfn(hmm_folio_page(s->folios, page));
}

static bool hmm_is_scribbled(const struct hmm_scribble *s, unsigned long page)
{
	return page >= s->first && page < s->end;
}

/* The fault of page @at stores into elements that the walk has been at before. */
static vm_fault_t hmm_handle_scribble(struct hmm_fixture *t, struct vm_fault *vmf,
				      unsigned long page)
{
	struct hmm_scribble *s = t->private;
	unsigned long i;

	vmf->page = hmm_folio_page(s->folios, page);
	get_page(vmf->page);
	if (page == s->at)
		for (i = s->first; i < s->end; i++)
			WRITE_ONCE(t->pfns[i], hmm_scribbled(s, i));
	return 0;
}

/*
 * An output of the walk is right, whatever is in the elements around it: all pages that
 * its order claims are mapped, one after the other, with the same rights.
 */
static void hmm_expect_true_order(struct hmm_fixture *t, unsigned long page)
{
	struct hmm_scribble *s = t->private;
	unsigned long vpn = (t->start >> PAGE_SHIFT) + page;
	unsigned long i, size = 1UL << hmm_pfn_to_map_order(t->pfns[page]);
	unsigned long first = ALIGN_DOWN(vpn, size) - (t->start >> PAGE_SHIFT);

	KUNIT_ASSERT_EQ(t->test, t->pfns[page] & ~HMM_PFN_FLAGS,
			page_to_pfn(hmm_folio_page(s->folios, page)));
	for (i = first; i < first + size; i++)
		KUNIT_ASSERT_TRUE_MSG(t->test, hmm_readable(t, i) &&
				      hmm_writable(t, i) == hmm_writable(t, page),
				      "page %lu has order %u, and page %lu is not like it",
				      page, hmm_pfn_to_map_order(t->pfns[page]), i);
}

/* Pages [@first, @end) are not mapped, nor asked for, but their elements say so. */
static void hmm_ask_scribbled(struct hmm_fixture *t, struct hmm_scribble *s)
{
	unsigned long i;

	t->private = s->folios;
	t->handle = hmm_handle_folio;
	hmm_touch(t, 0, HMM_JOIN_LAST, true);
	hmm_zap(t, s->first, s->end - s->first);
	hmm_zap(t, s->at, 1);
	t->private = s;
	t->handle = hmm_handle_scribble;
	hmm_ask(t, 0, HMM_JOIN_LAST);
	t->pfns[s->at] = HMM_READ;
	t->range.pfn_flags_mask = HMM_READ;
	KUNIT_ASSERT_EQ(t->test, hmm_answer(t), 0);

	for (i = 0; i < HMM_JOIN_LAST; i++) {
		if (hmm_is_scribbled(s, i))
			continue;
		KUNIT_ASSERT_TRUE(t->test, t->pfns[i] & HMM_PFN_VALID);
		hmm_expect_true_order(t, i);
	}
	t->private = s->folios;
}

/* Before the page that is faulted in, next to it and not, and across a border. */
static void hmm_scribble_around(struct hmm_fixture *t, struct hmm_folios *folios,
				unsigned long at, bool wild)
{
	struct hmm_scribble s = { .folios = folios, .at = at, .wild = wild };

	for (s.first = at - 12; s.first < at; s.first += 5)
		for (s.end = s.first + 1; s.end <= at; s.end += 4)
			hmm_ask_scribbled(t, &s);
}

static void hmm_test_joined_by_tables(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	struct hmm_folios *folios;
	unsigned long at;

	hmm_map_handler(t);
	folios = hmm_map_folios(t, 5, HMM_IN_STEP);
	for (at = 40; at < 72; at += 5) {
		hmm_scribble_around(t, folios, at, false);
		hmm_scribble_around(t, folios, at, true);
	}
}

/* The fault is the first of another VMA, whose pages go on where those before end. */
static void hmm_test_joined_in_two_vmas(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	struct hmm_folios *folios;
	unsigned long from;

	hmm_map_handler(t);
	folios = hmm_map_folios(t, 5, HMM_IN_STEP);
	for (from = 112; from > 92; from -= 4) {
		hmm_split_vma(t, from);
		hmm_scribble_around(t, folios, from, false);
		hmm_scribble_around(t, folios, from, true);
	}
}

/* The callback, or whoever shares the elements, clears them in the middle of a walk. */
static vm_fault_t hmm_handle_clear(struct hmm_fixture *t, struct vm_fault *vmf,
				   unsigned long page)
{
	struct hmm_scribble *s = t->private;
	unsigned long i;

	vmf->page = hmm_folio_page(s->folios, page);
	get_page(vmf->page);
	for (i = s->first; i < s->end; i++)
		WRITE_ONCE(t->pfns[i], 0);
	return 0;
}

static void hmm_test_joined_cleared(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	struct hmm_scribble s = { .end = 0 };
	unsigned long i;

	hmm_map_handler(t);
	s.folios = hmm_map_folios(t, 5, HMM_IN_STEP);
	for (s.at = 30; s.at < 70; s.at++) {
		t->private = s.folios;
		t->handle = hmm_handle_folio;
		hmm_touch(t, 0, HMM_JOIN_LAST, true);
		hmm_zap(t, s.at, 1);
		t->private = &s;
		t->handle = hmm_handle_clear;
		s.first = s.at - 10;
		s.end = s.at;
		hmm_ask(t, 0, HMM_JOIN_LAST);
		t->range.default_flags = HMM_READ;
		KUNIT_ASSERT_EQ(test, hmm_answer(t), 0);
		for (i = 0; i < HMM_JOIN_LAST; i++) {
			if (hmm_is_scribbled(&s, i) && !t->pfns[i])
				continue;
			hmm_expect_true_order(t, i);
		}
	}
}

static struct kunit_case hmm_join_cases[] = {
	HMM_CASE(joined),
	HMM_CASE(joined_by_rights),
	HMM_CASE(joined_around_hole),
	HMM_CASE(joined_across_faults),
	HMM_CASE(joined_elements_alone),
	HMM_CASE(joined_before_error),
	HMM_CASE(joined_by_tables),
	HMM_CASE(joined_in_two_vmas),
	HMM_CASE(joined_cleared),
	{}
};

static struct kunit_suite hmm_join_suite = {
	.name = "hmm_join",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_join_cases,
};

kunit_test_suite(hmm_join_suite);
