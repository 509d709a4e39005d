/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A small address space to walk, with entries of every kind
 *
 * Memory is mapped and touched in an address space of the test's own, and then
 * entries are planted in its page tables, which also brings about states that
 * no program could. Planted entries have to go before their test ends: no
 * assertion may stand in between.
 */
#ifndef _MM_TESTS_HMM_WORLD_H
#define _MM_TESTS_HMM_WORLD_H

#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/huge_mm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/pgtable.h>
#include <linux/workqueue.h>

#include "hmm_reference.h"

/* The window lies across the border of two page tables. */
#define HMM_PAGES	32
#define HMM_BORDER	(HMM_PAGES / 2)

#define HMM_READ	HMM_PFN_REQ_FAULT
#define HMM_WRITE	(HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)
#define HMM_STICKY	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* The three calls */
enum hmm_call_kind { HMM_CALL_LOCKED, HMM_CALL_UNLOCKED, HMM_CALL_EACH, HMM_CALLS };

struct hmm_case_page {
	enum hmm_ref_vma vma;
	enum hmm_ref_entry entry;
	unsigned long in;
};

/**
 * struct hmm_case - all there is to know of one call
 * @first: first page of the range
 * @end: the page behind its last
 * @call: which of the three calls it is
 * @owner: name an owner of device-private memory
 * @default_flags: of the range
 * @mask: &hmm_range.pfn_flags_mask
 * @page: what is where, and the element that is passed in for it
 */
struct hmm_case {
	unsigned long first;
	unsigned long end;
	enum hmm_call_kind call;
	bool owner;
	unsigned long default_flags;
	unsigned long mask;
	struct hmm_case_page page[HMM_PAGES];
};

/**
 * struct hmm_leaf - a huge page that begins at &hmm_world.base
 * @saved: what was there before another entry was planted
 * @planted: that
 * @has_planted: it is not yet put back
 * @folio: what is locked while an entry is planted, if anything is
 * @file: of hugetlbfs, if the page is to be one of that
 * @pfns: elements for all of the page, and one before and behind it
 */
struct hmm_leaf {
	pmd_t saved;
	pmd_t planted;
	bool has_planted;
	struct folio *folio;
	struct file *file;
	unsigned long *pfns;
};

/**
 * struct hmm_world - where a case takes place
 * @test: the running test
 * @mm: the address space, the test thread's own
 * @base: where the window begins
 * @notifier: covers the window
 * @c: the case whose pages are there
 * @saved: what was in the page tables before entries were planted
 * @planted: those
 * @has_planted: the pages whose entry is not yet put back
 * @leaf: the huge page, in tests of those
 * @mover: ends migrations that are waited for
 * @stop: tells @mover to end
 * @range: what is handed to the call
 * @pfns: its elements
 * @committed: address where what hmm_range_fault_each() has committed ends
 * @device: the lock that a driver would have
 * @committing: a commit has it
 * @faults: how many faults the call handled
 * @why: what is wrong with what it did
 */
struct hmm_world {
	struct kunit *test;
	struct mm_struct *mm;
	unsigned long base;
	struct mmu_interval_notifier notifier;
	const struct hmm_case *c;
	pte_t saved[HMM_PAGES];
	pte_t planted[HMM_PAGES];
	DECLARE_BITMAP(has_planted, HMM_PAGES);
	struct hmm_leaf leaf;
	struct work_struct mover;
	bool stop;
	struct hmm_range range;
	unsigned long pfns[HMM_PAGES + 1];
	unsigned long committed;
	struct mutex device;	/* what commits and invalidations exclude each other by */
	bool committing;
	unsigned long faults;
	char why[160];
};

struct hmm_row {
	enum hmm_ref_vma vma;
	enum hmm_ref_entry entry;
	enum hmm_ref_request request;
};

#define hmm_wrong(w, ...)	(snprintf((w)->why, sizeof((w)->why), __VA_ARGS__), false)

static inline unsigned long hmm_addr(const struct hmm_world *w, unsigned long page)
{
	return w->base + (page << PAGE_SHIFT);
}

static inline bool hmm_is_migration(enum hmm_ref_entry entry)
{
	return entry == REF_MIGRATION_READ || entry == REF_MIGRATION_EXCLUSIVE ||
	       entry == REF_MIGRATION_WRITE;
}

/* Device-private memory, and the bit of its entry says that userfaultfd protects it. */
static inline bool hmm_is_private_uffd(enum hmm_ref_entry entry)
{
	return entry == REF_PRIVATE_WRITE_UFFD || entry == REF_PRIVATE_READ_UFFD ||
	       entry == REF_PRIVATE_OTHER_UFFD;
}

static inline bool hmm_is_refused(enum hmm_ref_vma vma)
{
	return vma >= REF_VMA_NONE;
}

static inline unsigned long hmm_request_flags(enum hmm_ref_request request)
{
	static const unsigned long flags[] = { 0, HMM_READ, HMM_WRITE };

	return flags[request];
}

static inline pmd_t *hmm_pmd(struct mm_struct *mm, unsigned long addr)
{
	return pmd_offset(pud_offset(p4d_offset(pgd_offset(mm, addr), addr), addr), addr);
}

static inline pud_t *hmm_pud(struct mm_struct *mm, unsigned long addr)
{
	return pud_offset(p4d_offset(pgd_offset(mm, addr), addr), addr);
}

/* What a kernel can have, and rows of the table that it can */
bool hmm_world_possible(enum hmm_ref_vma vma, enum hmm_ref_entry entry);
bool hmm_world_has_swap(void);
const void *hmm_world_row_gen(struct hmm_row *row, const void *prev, char *desc,
			      bool (*possible)(const struct hmm_row *row));

/* Building and tearing down */
bool hmm_world_build(struct hmm_world *w, const struct hmm_case *c);
void hmm_world_tear_down(struct hmm_world *w);
void hmm_world_watch(struct hmm_world *w, unsigned long start, unsigned long size);
unsigned long hmm_world_map_large(struct hmm_world *w);
pte_t hmm_world_make_pte(struct hmm_world *w, enum hmm_ref_entry entry, pte_t pte);
pmd_t hmm_world_make_pmd(struct hmm_world *w, enum hmm_ref_entry entry, pmd_t pmd);
vm_flags_t hmm_world_vma_flags(enum hmm_ref_vma vma);
void hmm_world_change_vma(struct hmm_world *w, vm_flags_t flags);
void hmm_world_plant_leaf(struct hmm_world *w, enum hmm_ref_entry entry);
void hmm_world_unplant_leaf(struct hmm_world *w);

/* Asking */
void *hmm_world_owner(void);
unsigned long hmm_world_faults(void);
extern const char * const hmm_world_call_names[HMM_CALLS];
const void *hmm_world_call_gen(struct kunit *test, const void *prev, char *desc);
enum hmm_call_kind hmm_world_call_of(const struct kunit *test);
int hmm_world_call(struct hmm_world *w, enum hmm_call_kind call);
int hmm_world_ask_around(struct hmm_world *w, unsigned long addr, unsigned long request,
			 enum hmm_call_kind call);

/* For the suites */
int hmm_world_suite_init(struct kunit_suite *suite);
void hmm_world_suite_exit(struct kunit_suite *suite);
int hmm_world_init(struct kunit *test);
void hmm_world_exit(struct kunit *test);

#endif
