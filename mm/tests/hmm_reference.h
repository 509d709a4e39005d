/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What hmm_range_fault() owes its callers, as a table
 *
 * For tests to compare with. One row is one kind of entry, one column one kind
 * of request, and what stands there is all that there is to know: nothing here
 * is computed, and nothing is shared with the walker.
 */
#ifndef _MM_TESTS_HMM_REFERENCE_H
#define _MM_TESTS_HMM_REFERENCE_H

#include <linux/hmm.h>
#include <linux/types.h>

/* What maps the page, if anything does. */
enum hmm_ref_vma {
	REF_VMA_WRITABLE,
	REF_VMA_READ_ONLY,
	REF_VMA_MIXED,
	REF_VMA_SHADOW_STACK,
	REF_VMA_RWP,
	REF_VMA_NONE,
	REF_VMA_IO,
	REF_VMA_PFNMAP,
	REF_VMA_NO_READ,
	REF_VMAS
};

/* What the page table holds for the page. */
enum hmm_ref_entry {
	REF_EMPTY,
	REF_WRITABLE,
	REF_READ_ONLY,
	REF_ZERO,
	REF_SPECIAL,
	REF_SPECIAL_PAGE,
	REF_PROTNONE,
	REF_RWP,
	REF_SWAP,
	REF_SWAP_RWP,
	REF_MIGRATION_READ,
	REF_MIGRATION_EXCLUSIVE,
	REF_MIGRATION_WRITE,
	REF_PRIVATE_WRITE,
	REF_PRIVATE_READ,
	REF_PRIVATE_OTHER,
	REF_PRIVATE_WRITE_UFFD,
	REF_PRIVATE_READ_UFFD,
	REF_PRIVATE_OTHER_UFFD,
	REF_EXCLUSIVE,
	REF_UFFD_WP,
	REF_GUARD,
	REF_POISON,
	REF_MIXED_MARKER,
	REF_HWPOISON,
	REF_BAD,
	REF_ENTRIES
};

enum hmm_ref_request { REF_NOTHING, REF_READ, REF_WRITE, REF_REQUESTS };

/* What becomes of the page. */
enum hmm_ref_answer {
	REF_STORE_0,		/* nothing there that a device could use */
	REF_STORE_R,		/* HMM_PFN_VALID */
	REF_STORE_RW,		/* HMM_PFN_VALID | HMM_PFN_WRITE */
	REF_STORE_E,		/* HMM_PFN_ERROR */
	REF_FAULT,		/* a fault, and then what is there */
	REF_EPERM,		/* the call fails */
	REF_EFAULT,
};

struct hmm_ref_row {
	const char *name;
	enum hmm_ref_answer answer[REF_REQUESTS];
};

#define _0	REF_STORE_0
#define _R	REF_STORE_R
#define _RW	REF_STORE_RW
#define _E	REF_STORE_E
#define _F	REF_FAULT
#define _EF	REF_EFAULT
#define _EP	REF_EPERM

/* In a VMA that may be read and written.	    nothing read write */
static const struct hmm_ref_row hmm_ref_writable[REF_ENTRIES] = {
	[REF_EMPTY]		 = { "empty",		{ _0,  _F,  _F  } },
	[REF_WRITABLE]		 = { "writable",	{ _RW, _RW, _RW } },
	[REF_READ_ONLY]		 = { "read-only",	{ _R,  _R,  _F  } },
	[REF_ZERO]		 = { "zero page",	{ _R,  _R,  _F  } },
	[REF_SPECIAL]		 = { "special",		{ _E,  _EF, _EF } },
	[REF_SPECIAL_PAGE]	 = { "special, a page",	{ _E,  _EF, _EF } },
	[REF_PROTNONE]		 = { "protnone",	{ _0,  _F,  _F  } },
	[REF_RWP]		 = { "rw-protected",	{ _0,  _F,  _F  } },
	[REF_SWAP]		 = { "swap",		{ _0,  _F,  _F  } },
	[REF_SWAP_RWP]		 = { "swap, rw-protected", { _0,  _F,  _F  } },
	[REF_MIGRATION_READ]	 = { "migration, r",	{ _0,  _F,  _F  } },
	[REF_MIGRATION_EXCLUSIVE] = { "migration, x",	{ _0,  _F,  _F  } },
	[REF_MIGRATION_WRITE]	 = { "migration, w",	{ _0,  _F,  _F  } },
	[REF_PRIVATE_WRITE]	 = { "private, w",	{ _RW, _RW, _RW } },
	[REF_PRIVATE_READ]	 = { "private, r",	{ _R,  _R,  _F  } },
	[REF_PRIVATE_OTHER]	 = { "other's private",	{ _0,  _F,  _F  } },
	[REF_PRIVATE_WRITE_UFFD] = { "private, w, uffd", { _R,  _R,  _F  } },
	[REF_PRIVATE_READ_UFFD]	 = { "private, r, uffd", { _R,  _R,  _F  } },
	[REF_PRIVATE_OTHER_UFFD] = { "other's private, uffd", { _0,  _F,  _F  } },
	[REF_EXCLUSIVE]		 = { "exclusive",	{ _0,  _F,  _F  } },
	[REF_UFFD_WP]		 = { "uffd-wp",		{ _0,  _F,  _F  } },
	[REF_GUARD]		 = { "guard",		{ _E,  _EF, _EF } },
	[REF_POISON]		 = { "poison",		{ _E,  _EF, _EF } },
	[REF_MIXED_MARKER]	 = { "uffd-wp, guard",	{ _E,  _EF, _EF } },
	[REF_HWPOISON]		 = { "hwpoison",	{ _E,  _EF, _EF } },
	[REF_BAD]		 = { "bad",		{ _E,  _EF, _EF } },
};

/* In a VMA without VM_WRITE. */
static const struct hmm_ref_row hmm_ref_read_only[REF_ENTRIES] = {
	[REF_EMPTY]		 = { "empty",		{ _0,  _F,  _EP } },
	[REF_WRITABLE]		 = { "writable",	{ _RW, _RW, _RW } },
	[REF_READ_ONLY]		 = { "read-only",	{ _R,  _R,  _EP } },
	[REF_ZERO]		 = { "zero page",	{ _R,  _R,  _EP } },
	[REF_SPECIAL]		 = { "special",		{ _E,  _EF, _EF } },
	[REF_SPECIAL_PAGE]	 = { "special, a page",	{ _E,  _EF, _EF } },
	[REF_PROTNONE]		 = { "protnone",	{ _0,  _F,  _EP } },
	[REF_RWP]		 = { "rw-protected",	{ _0,  _F,  _EP } },
	[REF_SWAP]		 = { "swap",		{ _0,  _F,  _EP } },
	[REF_SWAP_RWP]		 = { "swap, rw-protected", { _0,  _F,  _EP } },
	[REF_MIGRATION_READ]	 = { "migration, r",	{ _0,  _F,  _EP } },
	[REF_MIGRATION_EXCLUSIVE] = { "migration, x",	{ _0,  _F,  _EP } },
	[REF_MIGRATION_WRITE]	 = { "migration, w",	{ _0,  _F,  _EP } },
	[REF_PRIVATE_WRITE]	 = { "private, w",	{ _RW, _RW, _RW } },
	[REF_PRIVATE_READ]	 = { "private, r",	{ _R,  _R,  _EP } },
	[REF_PRIVATE_OTHER]	 = { "other's private",	{ _0,  _F,  _EP } },
	[REF_PRIVATE_WRITE_UFFD] = { "private, w, uffd", { _R,  _R,  _EP } },
	[REF_PRIVATE_READ_UFFD]	 = { "private, r, uffd", { _R,  _R,  _EP } },
	[REF_PRIVATE_OTHER_UFFD] = { "other's private, uffd", { _0,  _F,  _EP } },
	[REF_EXCLUSIVE]		 = { "exclusive",	{ _0,  _F,  _EP } },
	[REF_UFFD_WP]		 = { "uffd-wp",		{ _0,  _F,  _EP } },
	[REF_GUARD]		 = { "guard",		{ _E,  _EF, _EF } },
	[REF_POISON]		 = { "poison",		{ _E,  _EF, _EF } },
	[REF_MIXED_MARKER]	 = { "uffd-wp, guard",	{ _E,  _EF, _EF } },
	[REF_HWPOISON]		 = { "hwpoison",	{ _E,  _EF, _EF } },
	[REF_BAD]		 = { "bad",		{ _E,  _EF, _EF } },
};

/* In a shadow stack: only the processor itself may write. */
static const struct hmm_ref_row hmm_ref_shadow_stack[REF_ENTRIES] = {
	[REF_EMPTY]		 = { "empty",		{ _0,  _F,  _EP } },
	[REF_WRITABLE]		 = { "writable",	{ _R,  _R,  _EP } },
	[REF_READ_ONLY]		 = { "read-only",	{ _R,  _R,  _EP } },
	[REF_ZERO]		 = { "zero page",	{ _R,  _R,  _EP } },
	[REF_SPECIAL]		 = { "special",		{ _E,  _EF, _EF } },
	[REF_SPECIAL_PAGE]	 = { "special, a page",	{ _E,  _EF, _EF } },
	[REF_PROTNONE]		 = { "protnone",	{ _0,  _F,  _EP } },
	[REF_RWP]		 = { "rw-protected",	{ _0,  _F,  _EP } },
	[REF_SWAP]		 = { "swap",		{ _0,  _F,  _EP } },
	[REF_SWAP_RWP]		 = { "swap, rw-protected", { _0,  _F,  _EP } },
	[REF_MIGRATION_READ]	 = { "migration, r",	{ _0,  _F,  _EP } },
	[REF_MIGRATION_EXCLUSIVE] = { "migration, x",	{ _0,  _F,  _EP } },
	[REF_MIGRATION_WRITE]	 = { "migration, w",	{ _0,  _F,  _EP } },
	[REF_PRIVATE_WRITE]	 = { "private, w",	{ _R,  _R,  _EP } },
	[REF_PRIVATE_READ]	 = { "private, r",	{ _R,  _R,  _EP } },
	[REF_PRIVATE_OTHER]	 = { "other's private",	{ _0,  _F,  _EP } },
	[REF_PRIVATE_WRITE_UFFD] = { "private, w, uffd", { _R,  _R,  _EP } },
	[REF_PRIVATE_READ_UFFD]	 = { "private, r, uffd", { _R,  _R,  _EP } },
	[REF_PRIVATE_OTHER_UFFD] = { "other's private, uffd", { _0,  _F,  _EP } },
	[REF_EXCLUSIVE]		 = { "exclusive",	{ _0,  _F,  _EP } },
	[REF_UFFD_WP]		 = { "uffd-wp",		{ _0,  _F,  _EP } },
	[REF_GUARD]		 = { "guard",		{ _E,  _EF, _EF } },
	[REF_POISON]		 = { "poison",		{ _E,  _EF, _EF } },
	[REF_MIXED_MARKER]	 = { "uffd-wp, guard",	{ _E,  _EF, _EF } },
	[REF_HWPOISON]		 = { "hwpoison",	{ _E,  _EF, _EF } },
	[REF_BAD]		 = { "bad",		{ _E,  _EF, _EF } },
};

/* In a VMA of which userfaultfd protects pages from reads and writes. */
static const struct hmm_ref_row hmm_ref_rwp[REF_ENTRIES] = {
	[REF_EMPTY]		 = { "empty",		{ _0,  _F,  _F  } },
	[REF_WRITABLE]		 = { "writable",	{ _RW, _RW, _RW } },
	[REF_READ_ONLY]		 = { "read-only",	{ _R,  _R,  _F  } },
	[REF_ZERO]		 = { "zero page",	{ _R,  _R,  _F  } },
	[REF_SPECIAL]		 = { "special",		{ _E,  _EF, _EF } },
	[REF_SPECIAL_PAGE]	 = { "special, a page",	{ _E,  _EF, _EF } },
	[REF_PROTNONE]		 = { "protnone",	{ _0,  _F,  _F  } },
	[REF_RWP]		 = { "rw-protected",	{ _0,  _F,  _F  } },
	[REF_SWAP]		 = { "swap",		{ _0,  _F,  _F  } },
	[REF_SWAP_RWP]		 = { "swap, rw-protected", { _0,  _F,  _F  } },
	[REF_MIGRATION_READ]	 = { "migration, r",	{ _0,  _F,  _F  } },
	[REF_MIGRATION_EXCLUSIVE] = { "migration, x",	{ _0,  _F,  _F  } },
	[REF_MIGRATION_WRITE]	 = { "migration, w",	{ _0,  _F,  _F  } },
	[REF_PRIVATE_WRITE]	 = { "private, w",	{ _RW, _RW, _RW } },
	[REF_PRIVATE_READ]	 = { "private, r",	{ _R,  _R,  _F  } },
	[REF_PRIVATE_OTHER]	 = { "other's private",	{ _0,  _F,  _F  } },
	[REF_PRIVATE_WRITE_UFFD] = { "private, w, uffd", { _0,  _F,  _F  } },
	[REF_PRIVATE_READ_UFFD]	 = { "private, r, uffd", { _0,  _F,  _F  } },
	[REF_PRIVATE_OTHER_UFFD] = { "other's private, uffd", { _0,  _F,  _F  } },
	[REF_EXCLUSIVE]		 = { "exclusive",	{ _0,  _F,  _F  } },
	[REF_UFFD_WP]		 = { "uffd-wp",		{ _0,  _F,  _F  } },
	[REF_GUARD]		 = { "guard",		{ _E,  _EF, _EF } },
	[REF_POISON]		 = { "poison",		{ _E,  _EF, _EF } },
	[REF_MIXED_MARKER]	 = { "uffd-wp, guard",	{ _E,  _EF, _EF } },
	[REF_HWPOISON]		 = { "hwpoison",	{ _E,  _EF, _EF } },
	[REF_BAD]		 = { "bad",		{ _E,  _EF, _EF } },
};

/* Refused, whatever the page tables hold. */
static const struct hmm_ref_row hmm_ref_refused = {
	"refused", { _E, _EF, _EF }
};

static const char * const hmm_ref_vma_names[REF_VMAS] __maybe_unused = {
	[REF_VMA_WRITABLE]	= "writable VMA",
	[REF_VMA_READ_ONLY]	= "read-only VMA",
	[REF_VMA_MIXED]		= "mixed VMA",
	[REF_VMA_SHADOW_STACK]	= "shadow stack",
	[REF_VMA_RWP]		= "rwp VMA",
	[REF_VMA_NONE]		= "no VMA",
	[REF_VMA_IO]		= "I/O VMA",
	[REF_VMA_PFNMAP]	= "pfn VMA",
	[REF_VMA_NO_READ]	= "no-access VMA",
};

static const char * const hmm_ref_request_names[REF_REQUESTS] __maybe_unused = {
	[REF_NOTHING]	= "nothing",
	[REF_READ]	= "read",
	[REF_WRITE]	= "write",
};

#undef _0
#undef _R
#undef _RW
#undef _E
#undef _F
#undef _EF
#undef _EP

/* A write that is not also a fault asks for nothing. */
static inline enum hmm_ref_request hmm_ref_request(unsigned long flags)
{
	if (!(flags & HMM_PFN_REQ_FAULT))
		return REF_NOTHING;
	return flags & HMM_PFN_REQ_WRITE ? REF_WRITE : REF_READ;
}

static inline enum hmm_ref_answer hmm_ref_answer(enum hmm_ref_vma vma,
						 enum hmm_ref_entry entry,
						 enum hmm_ref_request request)
{
	switch (vma) {
	case REF_VMA_WRITABLE:
	case REF_VMA_MIXED:
		return hmm_ref_writable[entry].answer[request];
	case REF_VMA_READ_ONLY:
		return hmm_ref_read_only[entry].answer[request];
	case REF_VMA_SHADOW_STACK:
		return hmm_ref_shadow_stack[entry].answer[request];
	case REF_VMA_RWP:
		return hmm_ref_rwp[entry].answer[request];
	default:
		return hmm_ref_refused.answer[request];
	}
}

/* What is stored for an answer that stores, without pfn, order and sticky bits. */
static inline unsigned long hmm_ref_output(enum hmm_ref_answer answer)
{
	switch (answer) {
	case REF_STORE_R:
		return HMM_PFN_VALID;
	case REF_STORE_RW:
		return HMM_PFN_VALID | HMM_PFN_WRITE;
	case REF_STORE_E:
		return HMM_PFN_ERROR;
	default:
		return 0;
	}
}

#endif
