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

#include "hmm_fixture.h"

/* Large enough for the largest folio at every place in the smallest's. */
#define HMM_JOIN_LAST	256UL

/**
 * struct hmm_folios - what a mapping is made of
 * @order: of each
 * @shift: how many pages of the first one lie before the mapping
 * @pages: the first page of each
 */
struct hmm_folios {
	unsigned int order;
	unsigned long shift;
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

static struct hmm_folios *hmm_map_folios(struct hmm_fixture *t, unsigned int order,
					 unsigned long shift)
{
	struct hmm_folios *f = kunit_kzalloc(t->test, sizeof(*f), GFP_KERNEL);
	unsigned long i;

	KUNIT_ASSERT_NOT_NULL(t->test, f);
	KUNIT_ASSERT_EQ(t->test, 0, kunit_add_action_or_reset(t->test, hmm_put_folios, f));
	f->order = order;
	f->shift = shift;
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

/* The elements of the range, which begins with page @first of the mapping. */
static void hmm_expect_joined(struct hmm_fixture *t, unsigned long first, unsigned long end)
{
	const struct hmm_folios *f = t->private;
	unsigned long i, out;

	for (i = first; i < end; i++) {
		out = HMM_PFN_VALID | page_to_pfn(hmm_folio_page(f, i)) | HMM_PFN_P2PDMA |
		      (unsigned long)hmm_order_due(t, i, first, end) << HMM_PFN_ORDER_SHIFT;
		if (hmm_writable(t, i))
			out |= HMM_PFN_WRITE;
		KUNIT_ASSERT_EQ_MSG(t->test, t->pfns[i - first], out,
				    "page %lu of [%lu, %lu), folios of order %u with %lu before",
				    i, first, end, f->order, f->shift);
	}
}

/* Sticky bits that differ are no reason to take a mapping apart. */
static void hmm_ask_joined(struct hmm_fixture *t, unsigned long first, unsigned long end)
{
	unsigned long i;

	hmm_ask(t, first, end - first);
	for (i = 0; i < end - first; i++)
		t->pfns[i] = HMM_PFN_P2PDMA;
	t->range.default_flags = HMM_READ;
	KUNIT_ASSERT_EQ(t->test, hmm_answer_retry(t), 0);
	hmm_expect_joined(t, first, end);
}

/* Every order, at some places in memory and the address space, cut everywhere. */
static void hmm_test_joined(struct kunit *test)
{
	struct hmm_fixture *t = test->priv;
	unsigned long shift, first, end;
	unsigned int order;

	hmm_map_handler(t);
	for (order = 0; order <= 6; order++)
		for (shift = 0; shift < 5; shift++) {
			hmm_zap(t, 0, HMM_JOIN_LAST);
			hmm_map_folios(t, order, shift % (1UL << order));
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
	hmm_map_folios(t, 6, 0);
	addr = kunit_vm_mmap(test, t->file, hmm_addr(t, from), size, PROT_READ,
			     MAP_SHARED | MAP_FIXED, from << PAGE_SHIFT);
	KUNIT_ASSERT_EQ(test, addr, hmm_addr(t, from));
	for (first = 0; first < from; first++)
		hmm_ask_joined(t, first, HMM_JOIN_LAST);
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
	hmm_map_folios(t, 5, 0);
	hmm_ask_joined(t, 0, HMM_JOIN_LAST);
	for (missing = 0; missing < 70; missing++) {
		hmm_zap(t, missing, 1);
		hmm_ask_joined(t, 3, HMM_JOIN_LAST);
	}
}

static struct kunit_case hmm_join_cases[] = {
	HMM_CASE(joined),
	HMM_CASE(joined_by_rights),
	HMM_CASE(joined_across_faults),
	{}
};

static struct kunit_suite hmm_join_suite = {
	.name = "hmm_join",
	.init = hmm_test_init,
	.exit = hmm_test_exit,
	.test_cases = hmm_join_cases,
};

kunit_test_suite(hmm_join_suite);
