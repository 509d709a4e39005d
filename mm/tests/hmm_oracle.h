/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _MM_TESTS_HMM_ORACLE_H
#define _MM_TESTS_HMM_ORACLE_H

struct folio;
struct mm_struct;
struct page;

/**
 * struct hmm_oracle - what a device may know of a page
 * @out: what HMM has to store for it if nothing is requested, without sticky
 *	bits
 * @exclusive: the page, if some device has it for itself
 * @folio: what the page is part of, if it is valid and mapped by a PTE
 */
struct hmm_oracle {
	unsigned long out;
	struct page *exclusive;
	struct folio *folio;
};

struct hmm_oracle hmm_oracle(struct mm_struct *mm, unsigned long addr,
			     void *owner);
void hmm_oracle_join(struct hmm_oracle *oracles, unsigned long addr,
		     unsigned long npages);
bool hmm_oracle_page_out(unsigned long addr);
int hmm_oracle_madvise(struct mm_struct *mm, unsigned long start, unsigned long size,
		       int advice);
void hmm_oracle_write_protect(struct mm_struct *mm, unsigned long start, unsigned long size);
unsigned long hmm_oracle_mmap_hugetlb(unsigned long start, unsigned long size);

#endif
