// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * DMA mappings of the pages that hmm_range_fault() found
 */
#include <linux/bitops.h>
#include <linux/dma-mapping.h>
#include <linux/export.h>
#include <linux/hmm-dma.h>
#include <linux/hmm.h>
#include <linux/memremap.h>
#include <linux/overflow.h>
#include <linux/pci-p2pdma.h>
#include <linux/slab.h>
#include <linux/string.h>

/**
 * DOC: DMA mapping
 *
 * A &struct hmm_dma_map serves a device for one span of address space, for as
 * long as the device mirrors the span. It maps in one of three ways, chosen
 * once, when it is allocated:
 *
 * - IOVA: the IOMMU gives one contiguous IOVA space for the whole span, so
 *   the address of an entry follows from its index.
 * - Recorded: entries are mapped one at a time, and &hmm_dma_map.dma_list
 *   keeps their addresses for the unmap.
 * - Stateless: the device reaches memory directly, so the address of an entry
 *   follows from its page, and nothing has to be undone.
 *
 * Peer to peer memory behind the same PCI switch is reached by its bus
 * address, whichever way the map was allocated for.
 *
 * The mappings are open to CPU and device at the same time and for good. No
 * dma_sync call hands a page from one to the other, so nothing may be bounced
 * and caches have to be coherent. All mappings demand that by
 * %DMA_ATTR_REQUIRE_COHERENT.
 */

/* What hmm_dma_map_pfn() sets and hmm_dma_unmap_pfn() clears */
#define HMM_DMA_STICKY \
	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/*
 * How an entry is mapped is kept in the map, by the sticky bits that say so. Those
 * in the element are for the driver: a walk that runs at the same time may store an
 * output that it read before they were set.
 */
#define HMM_DMA_SHIFT		__ffs(HMM_PFN_P2PDMA_BUS)
static_assert(HMM_DMA_STICKY >> __builtin_ctzl(HMM_PFN_P2PDMA_BUS) <= U8_MAX);

/* The sticky bits of a mapped entry, or 0. */
static unsigned long hmm_dma_mapped(const struct hmm_dma_map *map, size_t idx)
{
	return map->mapped ? (unsigned long)map->mapped[idx] << HMM_DMA_SHIFT : 0;
}

static void hmm_dma_set_mapped(struct hmm_dma_map *map, size_t idx, unsigned long sticky)
{
	map->mapped[idx] = sticky >> HMM_DMA_SHIFT;
	set_mask_bits(&map->pfn_list[idx], HMM_DMA_STICKY, sticky);
}

/*
 * A device without enough address bits would have its pages bounced, and so
 * would some of those whose buffers need a sync. There is no better test
 * before there is a page to map.
 */
static bool hmm_dma_supported(struct device *dev)
{
	if (IS_ENABLED(CONFIG_DMA_NEED_SYNC) && !dev_dma_skip_sync(dev))
		return false;
	return !dma_addressing_limited(dev);
}

/* How many DMA entries a span has, or 0 if it cannot be cut into entries */
static size_t hmm_dma_nr_entries(size_t span, size_t dma_entry_size)
{
	if (!dma_entry_size || !IS_ALIGNED(dma_entry_size, PAGE_SIZE))
		return 0;
	return span / dma_entry_size;
}

/* Choose one of the three ways. Returns false if there is no memory for it. */
static bool hmm_dma_choose(struct device *dev, struct hmm_dma_map *map,
			   size_t span)
{
	size_t nr = hmm_dma_nr_entries(span, map->dma_entry_size);

	map->mapped = kvzalloc_objs(*map->mapped, nr, GFP_KERNEL | __GFP_NOWARN);
	if (!map->mapped)
		return false;
	if (dma_iova_try_alloc(dev, &map->state, 0, span))
		return true;
	if (!dma_need_unmap(dev))
		return true;

	map->dma_list = kvmalloc_objs(*map->dma_list, nr,
				      GFP_KERNEL | __GFP_NOWARN);
	return map->dma_list;
}

/**
 * hmm_dma_map_alloc() - prepare a map for a span of address space
 * @dev: device that is to reach the span
 * @map: map to set up, whatever it holds
 * @nr_entries: size of the span in pages, which is the number of elements that
 *	&hmm_dma_map.pfn_list gets
 * @dma_entry_size: bytes that one DMA entry maps: a multiple of %PAGE_SIZE,
 *	and no more than the span
 *
 * Nothing is mapped yet. All of &hmm_dma_map.pfn_list is zero.
 *
 * Context: May sleep.
 * Return: 0, or a negative errno with @map left empty, so that it need not be
 * but may be passed to hmm_dma_map_free():
 *
 * * %-EINVAL - the span is empty, its size in bytes does not fit into a size_t,
 *   or @dma_entry_size is not as above
 * * %-EOPNOTSUPP - @dev is not cache coherent, needs its buffers synced, or
 *   cannot address all memory
 * * %-ENOMEM - the lists could not be allocated
 */
int hmm_dma_map_alloc(struct device *dev, struct hmm_dma_map *map,
		      size_t nr_entries, size_t dma_entry_size)
{
	size_t span;

	memset(map, 0, sizeof(*map));

	if (check_mul_overflow(nr_entries, PAGE_SIZE, &span) ||
	    !hmm_dma_nr_entries(span, dma_entry_size))
		return -EINVAL;
	if (!hmm_dma_supported(dev))
		return -EOPNOTSUPP;

	map->dma_entry_size = dma_entry_size;
	map->pfn_list = kvzalloc_objs(*map->pfn_list, nr_entries,
				      GFP_KERNEL | __GFP_NOWARN);
	if (map->pfn_list && hmm_dma_choose(dev, map, span))
		return 0;

	hmm_dma_map_free(dev, map);
	return -ENOMEM;
}
EXPORT_SYMBOL_GPL(hmm_dma_map_alloc);

/*
 * Decide how the device gets at an entry's page. Returns the sticky bits that
 * say so, or 0 if the device cannot get at it.
 */
static unsigned long hmm_dma_route(struct device *dev, struct page *page,
				   struct pci_p2pdma_map_state *p2pdma_state)
{
	/* Its pfn stands for no address on any bus. */
	if (is_device_private_page(page))
		return 0;

	switch (pci_p2pdma_state(p2pdma_state, dev, page)) {
	case PCI_P2PDMA_MAP_NONE:
		return HMM_PFN_DMA_MAPPED;
	case PCI_P2PDMA_MAP_THRU_HOST_BRIDGE:
		return HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA;
	case PCI_P2PDMA_MAP_BUS_ADDR:
		return HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS;
	case PCI_P2PDMA_MAP_NOT_SUPPORTED:
	case PCI_P2PDMA_MAP_UNKNOWN:
		break;
	}
	return 0;
}

/* An entry is unmapped with the same attributes as it was mapped with. */
static unsigned long hmm_dma_attrs(unsigned long sticky)
{
	if (sticky & HMM_PFN_P2PDMA)
		return DMA_ATTR_REQUIRE_COHERENT | DMA_ATTR_MMIO;
	return DMA_ATTR_REQUIRE_COHERENT;
}

static size_t hmm_dma_offset(const struct hmm_dma_map *map, size_t idx)
{
	return idx * map->dma_entry_size;
}

/*
 * An entry may be mapped already, as when it was prefetched for reading and
 * the device now wants to write. It keeps its address, which the device may be
 * using at this moment. Returns DMA_MAPPING_ERROR if the address has to be
 * worked out from the page, which for a mapped entry changes nothing.
 */
static dma_addr_t hmm_dma_mapped_addr(struct hmm_dma_map *map, size_t idx)
{
	const unsigned long how = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS;

	if ((hmm_dma_mapped(map, idx) & how) != HMM_PFN_DMA_MAPPED)
		return DMA_MAPPING_ERROR;
	if (dma_use_iova(&map->state))
		return map->state.addr + hmm_dma_offset(map, idx);
	if (map->dma_list)
		return map->dma_list[idx];
	return DMA_MAPPING_ERROR;
}

static dma_addr_t hmm_dma_link(struct device *dev, struct hmm_dma_map *map,
			       size_t idx, phys_addr_t phys, unsigned long attrs)
{
	size_t offset = hmm_dma_offset(map, idx);
	size_t size = map->dma_entry_size;

	if (dma_iova_link(dev, &map->state, phys, offset, size,
			  DMA_BIDIRECTIONAL, attrs))
		return DMA_MAPPING_ERROR;

	if (dma_iova_sync(dev, &map->state, offset, size)) {
		dma_iova_unlink(dev, &map->state, offset, size,
				DMA_BIDIRECTIONAL, attrs);
		return DMA_MAPPING_ERROR;
	}
	return map->state.addr + offset;
}

static dma_addr_t hmm_dma_map_direct(struct device *dev,
				     struct hmm_dma_map *map, size_t idx,
				     phys_addr_t phys, unsigned long attrs)
{
	dma_addr_t addr;

	addr = dma_map_phys(dev, phys, map->dma_entry_size, DMA_BIDIRECTIONAL,
			    attrs);
	if (dma_mapping_error(dev, addr))
		return DMA_MAPPING_ERROR;
	if (map->dma_list)
		map->dma_list[idx] = addr;
	return addr;
}

static dma_addr_t hmm_dma_map_route(struct device *dev, struct hmm_dma_map *map,
				    size_t idx, phys_addr_t phys, unsigned long sticky,
				    struct pci_p2pdma_map_state *p2pdma_state)
{
	if (sticky & HMM_PFN_P2PDMA_BUS)
		return pci_p2pdma_bus_addr_map(p2pdma_state->mem, phys);
	if (dma_use_iova(&map->state))
		return hmm_dma_link(dev, map, idx, phys, hmm_dma_attrs(sticky));
	return hmm_dma_map_direct(dev, map, idx, phys, hmm_dma_attrs(sticky));
}

/**
 * hmm_dma_map_pfn() - map a DMA entry for the device
 * @dev: device the map was allocated for
 * @map: map the entry is in
 * @idx: which DMA entry, less than the size of the span divided by
 *	&hmm_dma_map.dma_entry_size. Element @idx of &hmm_dma_map.pfn_list is
 *	an output with %HMM_PFN_VALID. If an entry is larger than a page, that
 *	is the output of its first page, and the entry is physically contiguous.
 * @p2pdma_state: what is known of the peer the last page belonged to. Zeroed
 *	before the first of a series of calls for @dev.
 *
 * The device may read and write at the address. Keeping it from writing where
 * %HMM_PFN_WRITE is missing is up to the device's page table.
 *
 * Sets %HMM_PFN_DMA_MAPPED in the output, and %HMM_PFN_P2PDMA or
 * %HMM_PFN_P2PDMA_BUS if the page is peer to peer memory. An entry that is
 * mapped already keeps its address; only the flags and the order in its output
 * may have changed since.
 *
 * Context: The caller holds the lock under which mmu_interval_read_retry()
 * said that the output is good, and which the invalidate callback takes to
 * call hmm_dma_unmap_pfn(). Does not sleep.
 * Return: the DMA address of the entry's first byte, to be checked by
 * dma_mapping_error(). %DMA_MAPPING_ERROR, with nothing mapped that was not
 * and the output untouched, if
 *
 * * the output lacks %HMM_PFN_VALID, or is a device-private page
 * * hmm_dma_map_alloc() has not set the map up, which is a bug of the driver's
 * * the page belongs to a peer that @dev cannot reach
 * * the memory could be reached only by bouncing it or by flushing caches
 * * the DMA layer or the IOMMU driver failed, for lack of memory, say
 */
dma_addr_t hmm_dma_map_pfn(struct device *dev, struct hmm_dma_map *map,
			   size_t idx,
			   struct pci_p2pdma_map_state *p2pdma_state)
{
	unsigned long hmm_pfn = READ_ONCE(map->pfn_list[idx]);
	unsigned long sticky;
	dma_addr_t addr;

	if (WARN_ON_ONCE(!map->mapped) || !(hmm_pfn & HMM_PFN_VALID))
		return DMA_MAPPING_ERROR;

	addr = hmm_dma_mapped_addr(map, idx);
	if (addr != DMA_MAPPING_ERROR) {
		hmm_dma_set_mapped(map, idx, hmm_dma_mapped(map, idx));
		return addr;
	}

	sticky = hmm_dma_route(dev, hmm_pfn_to_page(hmm_pfn), p2pdma_state);
	if (!sticky)
		return DMA_MAPPING_ERROR;

	addr = hmm_dma_map_route(dev, map, idx, hmm_pfn_to_phys(hmm_pfn), sticky,
				 p2pdma_state);
	if (addr != DMA_MAPPING_ERROR)
		hmm_dma_set_mapped(map, idx, sticky);
	return addr;
}
EXPORT_SYMBOL_GPL(hmm_dma_map_pfn);

/*
 * Whether an unmap is due was settled when the map was allocated. A device
 * that began to bounce other buffers since then did not bounce these.
 */
static void hmm_dma_undo(struct device *dev, struct hmm_dma_map *map,
			 size_t idx)
{
	unsigned long attrs = hmm_dma_attrs(hmm_dma_mapped(map, idx));

	if (dma_use_iova(&map->state))
		dma_iova_unlink(dev, &map->state, hmm_dma_offset(map, idx),
				map->dma_entry_size, DMA_BIDIRECTIONAL, attrs);
	else if (map->dma_list)
		dma_unmap_phys(dev, map->dma_list[idx], map->dma_entry_size,
			       DMA_BIDIRECTIONAL, attrs);
}

/**
 * hmm_dma_unmap_pfn() - unmap a DMA entry
 * @dev: device the map was allocated for
 * @map: map the entry is in
 * @idx: which DMA entry, as for hmm_dma_map_pfn()
 *
 * Clears the sticky bits of element @idx of &hmm_dma_map.pfn_list. The rest
 * stays, so that the caller can see which page it was and whether it was
 * writable.
 *
 * Context: The caller holds the lock that it holds to map, and the device no
 * longer uses the address. Does not sleep, so that an invalidate callback can
 * call it whatever its own lock is.
 * Return: true if the entry was mapped, whatever a walk that runs at the same time
 * has stored in the element since. False if there was nothing to unmap, as in a map
 * that hmm_dma_map_alloc() has not set up.
 */
bool hmm_dma_unmap_pfn(struct device *dev, struct hmm_dma_map *map, size_t idx)
{
	unsigned long sticky = hmm_dma_mapped(map, idx);

	if (!sticky)
		return false;

	/* A bus address is a calculation that leaves nothing behind. */
	if (!(sticky & HMM_PFN_P2PDMA_BUS))
		hmm_dma_undo(dev, map, idx);

	hmm_dma_set_mapped(map, idx, 0);
	return true;
}
EXPORT_SYMBOL_GPL(hmm_dma_unmap_pfn);

/**
 * hmm_dma_map_free() - give back all that a map holds
 * @dev: device the map was allocated for
 * @map: map without a mapped entry. It is left empty, and freeing an empty map
 *	does nothing.
 *
 * Every entry has to have been unmapped by hmm_dma_unmap_pfn(): the IOVA space
 * may be given to somebody else at once.
 *
 * Context: May sleep. Nobody else may use @map any more.
 */
void hmm_dma_map_free(struct device *dev, struct hmm_dma_map *map)
{
	kvfree(map->dma_list);
	kvfree(map->mapped);
	kvfree(map->pfn_list);
	if (dma_use_iova(&map->state))
		dma_iova_free(dev, &map->state);
	memset(map, 0, sizeof(*map));
}
EXPORT_SYMBOL_GPL(hmm_dma_map_free);
