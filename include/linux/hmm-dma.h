/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * DMA mappings of the pages that hmm_range_fault() found
 *
 * Documentation/mm/hmm.rst says how the two work together.
 */
#ifndef LINUX_HMM_DMA_H
#define LINUX_HMM_DMA_H

#include <linux/dma-mapping.h>

struct pci_p2pdma_map_state;

/**
 * struct hmm_dma_map - what a device can reach of a span of address space
 * @state: the IOVA space of the whole span, if the IOMMU gives one
 * @pfn_list: an element for each page of the span, see &enum hmm_pfn_flags.
 *	All or part of it serves as &hmm_range.hmm_pfns.
 * @dma_list: where each DMA entry is mapped; NULL if that needs no record,
 *	because @state or the page itself tells
 * @mapped: how each DMA entry is mapped, for hmm_dma_map_pfn() and
 *	hmm_dma_unmap_pfn() alone
 * @dma_entry_size: bytes that one DMA entry maps
 *
 * A DMA entry is what one call maps or unmaps. Entry idx covers the bytes
 * [idx * @dma_entry_size, (idx + 1) * @dma_entry_size) of the span. Element idx
 * of @pfn_list holds its pfn and says by sticky bits how it is mapped. If
 * @dma_entry_size is larger than a page, bringing the outputs of
 * hmm_range_fault() to those places is up to the driver.
 */
struct hmm_dma_map {
	struct dma_iova_state	state;
	unsigned long		*pfn_list;
	dma_addr_t		*dma_list;
	u8			*mapped;
	size_t			dma_entry_size;
};

int hmm_dma_map_alloc(struct device *dev, struct hmm_dma_map *map,
		      size_t nr_entries, size_t dma_entry_size);
void hmm_dma_map_free(struct device *dev, struct hmm_dma_map *map);
dma_addr_t hmm_dma_map_pfn(struct device *dev, struct hmm_dma_map *map,
			   size_t idx,
			   struct pci_p2pdma_map_state *p2pdma_state);
bool hmm_dma_unmap_pfn(struct device *dev, struct hmm_dma_map *map, size_t idx);

#endif /* LINUX_HMM_DMA_H */
