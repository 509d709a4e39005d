/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Heterogeneous memory management: what the walker and its tests share
 */
#ifndef MM_HMM_INTERNAL_H
#define MM_HMM_INTERNAL_H

#include <linux/hmm.h>

/*
 * Where the block of @size bytes ends that @addr lies in, or @end if that comes
 * first. Blocks are naturally aligned. The last block of the address space ends at
 * 0, which is why ends are compared by their last bytes, as pmd_addr_end() does.
 */
static inline unsigned long hmm_addr_end(unsigned long addr, unsigned long size,
					 unsigned long end)
{
	unsigned long boundary = (addr + size) & ~(size - 1);

	return boundary - 1 < end - 1 ? boundary : end;
}

/* On 32 bits there are more pfns than fit below the flags: 8 GiB have all that do. */
static inline bool hmm_pfn_fits(unsigned long pfn)
{
	return IS_ENABLED(CONFIG_64BIT) || !(pfn & HMM_PFN_FLAGS);
}

#endif /* MM_HMM_INTERNAL_H */
