// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_dma_map_pfn() and its companions
 *
 * A case gets a device, and a map of a small span for it. The devices cover
 * the ways in which a map can work, see hmm_dma_ways.
 *
 * Mapping and unmapping is done under a spinlock, as drivers do.
 *
 * Everything used here is exported, so that the suite can be a module.
 */
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/dma-direct.h>
#include <linux/dma-map-ops.h>
#include <linux/fault-inject.h>
#include <linux/hmm-dma.h>
#include <linux/hmm.h>
#include <linux/ioport.h>
#include <linux/memremap.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/xarray.h>

#include "hmm_dma_device.h"

/* The span, in pages, and how large a large DMA entry is. */
#define HMM_DMA_PAGES	16
#define HMM_DMA_LARGE	4

/* How many pages of addresses the IOMMU has. */
#define HMM_DMA_IOVAS	64

/* Between physical addresses and those on the peer's bus. */
#define HMM_DMA_BUS_OFFSET	0x10000000UL

#define HMM_DMA_STICKY \
	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* What else an output has: a writable page in a mapping of order 9. */
#define HMM_DMA_OUTPUT \
	(HMM_PFN_VALID | HMM_PFN_WRITE | (9UL << HMM_PFN_ORDER_SHIFT))

/**
 * struct hmm_dma_fixture - what a case works with
 * @test: the running test
 * @device: the device, and how the map is to work
 * @map: the map that is tested
 * @peer: what is known of the peer; a plain page has none
 * @lock: what a driver has to keep invalidations out
 * @pages: HMM_DMA_PAGES contiguous pages
 * @crowd: takes all of the IOMMU's addresses
 */
struct hmm_dma_fixture {
	struct kunit *test;
	struct hmm_dma_device device;
	struct hmm_dma_map map;
	struct pci_p2pdma_map_state peer;
	spinlock_t lock;
	struct page *pages;
	struct hmm_dma_map crowd;
};

static const void *hmm_dma_next_way(const struct hmm_dma_way *way, char *desc)
{
	if (way == hmm_dma_ways + ARRAY_SIZE(hmm_dma_ways))
		return NULL;
	strscpy(desc, way->name, KUNIT_PARAM_DESC_SIZE);
	return way;
}

#define HMM_DMA_PARAMS(name, first)						\
static const void *name##_gen_params(struct kunit *test, const void *prev,	\
				     char *desc)				\
{										\
	const struct hmm_dma_way *way = prev;					\
										\
	return hmm_dma_next_way(way ? way + 1 : hmm_dma_ways + (first), desc);	\
}

HMM_DMA_PARAMS(hmm_dma_any, HMM_DMA_STATELESS)
HMM_DMA_PARAMS(hmm_dma_translated, HMM_DMA_RECORDED)
HMM_DMA_PARAMS(hmm_dma_flushed, HMM_DMA_CROWDED)

/* Maps */

static bool hmm_dma_is_empty(const struct hmm_dma_map *map)
{
	return !memchr_inv(map, 0, sizeof(*map));
}

/* Have a full IOMMU, for the ways that it takes that to get. */
static void hmm_dma_crowd(struct hmm_dma_fixture *t)
{
	int ret;

	if (!t->device.way->crowded)
		return;
	ret = hmm_dma_map_alloc(t->device.dev, &t->crowd, HMM_DMA_IOVAS, PAGE_SIZE);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	KUNIT_ASSERT_TRUE(t->test, dma_use_iova(&t->crowd.state));
}

static void hmm_dma_alloc(struct hmm_dma_fixture *t, size_t entry_pages)
{
	int ret;

	hmm_dma_crowd(t);
	ret = hmm_dma_map_alloc(t->device.dev, &t->map, HMM_DMA_PAGES,
				entry_pages * PAGE_SIZE);
	hmm_dma_map_free(t->device.dev, &t->crowd);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	KUNIT_ASSERT_EQ(t->test, dma_use_iova(&t->map.state), t->device.way->iova);
	KUNIT_ASSERT_EQ(t->test, !!t->map.dma_list, hmm_dma_records(&t->device));
}

static size_t hmm_dma_entries(const struct hmm_dma_fixture *t)
{
	return HMM_DMA_PAGES * PAGE_SIZE / t->map.dma_entry_size;
}

static dma_addr_t hmm_dma_map(struct hmm_dma_fixture *t, size_t idx)
{
	guard(spinlock)(&t->lock);
	return hmm_dma_map_pfn(t->device.dev, &t->map, idx, &t->peer);
}

static bool hmm_dma_unmap(struct hmm_dma_fixture *t, size_t idx)
{
	guard(spinlock)(&t->lock);
	return hmm_dma_unmap_pfn(t->device.dev, &t->map, idx);
}

/* The page that an entry is mapped to: no two entries have the same. */
static struct page *hmm_dma_page(const struct hmm_dma_fixture *t, size_t idx)
{
	return t->pages + idx * (t->map.dma_entry_size >> PAGE_SHIFT);
}

static void hmm_dma_put(struct hmm_dma_fixture *t, size_t idx, struct page *page)
{
	t->map.pfn_list[idx] = HMM_DMA_OUTPUT | page_to_pfn(page);
}

static unsigned long hmm_dma_sticky(const struct hmm_dma_fixture *t, size_t idx)
{
	return t->map.pfn_list[idx] & HMM_DMA_STICKY;
}

/* Whether the sticky bits of an output are those, and the rest is as it was. */
static void hmm_dma_expect_output(struct hmm_dma_fixture *t, size_t idx,
				  struct page *page, unsigned long sticky)
{
	KUNIT_EXPECT_EQ(t->test, t->map.pfn_list[idx],
			HMM_DMA_OUTPUT | page_to_pfn(page) | sticky);
}

/* Whether the device reaches a page at an address, and how. */
static void hmm_dma_expect_reach(struct hmm_dma_fixture *t, dma_addr_t addr,
				 phys_addr_t phys, bool mmio)
{
	if (t->device.way->stateless)
		KUNIT_EXPECT_EQ(t->test, addr, phys_to_dma(t->device.dev, phys));
	else
		KUNIT_EXPECT_PTR_EQ(t->test, xa_load(&t->device.reach, PHYS_PFN(addr)),
				    hmm_dma_reach(phys, mmio));
}

static void hmm_dma_expect_connected(struct hmm_dma_fixture *t, unsigned long pages)
{
	if (t->device.way->stateless)
		pages = 0;
	KUNIT_EXPECT_EQ(t->test, hmm_dma_connected(&t->device), pages);
}

/* Map an entry to its page; the device then reaches all of it. */
static dma_addr_t hmm_dma_map_entry(struct hmm_dma_fixture *t, size_t idx)
{
	struct page *page = hmm_dma_page(t, idx);
	dma_addr_t addr;
	size_t at;

	hmm_dma_put(t, idx, page);
	addr = hmm_dma_map(t, idx);
	KUNIT_ASSERT_FALSE(t->test, dma_mapping_error(t->device.dev, addr));
	for (at = 0; at < t->map.dma_entry_size; at += PAGE_SIZE)
		hmm_dma_expect_reach(t, addr + at, page_to_phys(page) + at, false);
	return addr;
}

static void hmm_dma_map_all(struct hmm_dma_fixture *t, dma_addr_t *addrs)
{
	size_t idx;

	for (idx = 0; idx < hmm_dma_entries(t); idx++)
		addrs[idx] = hmm_dma_map_entry(t, idx);
	hmm_dma_expect_connected(t, HMM_DMA_PAGES);
}

static void hmm_dma_unmap_all(struct hmm_dma_fixture *t)
{
	size_t idx;

	for (idx = 0; idx < hmm_dma_entries(t); idx++)
		KUNIT_EXPECT_TRUE(t->test, hmm_dma_unmap(t, idx));
	hmm_dma_expect_connected(t, 0);
}

/* An entry that cannot be mapped is left as it was. */
static void hmm_dma_expect_refused(struct hmm_dma_fixture *t, size_t idx)
{
	unsigned long connected = hmm_dma_connected(&t->device);
	unsigned long output = t->map.pfn_list[idx];

	KUNIT_EXPECT_EQ(t->test, hmm_dma_map(t, idx), DMA_MAPPING_ERROR);
	KUNIT_EXPECT_EQ(t->test, t->map.pfn_list[idx], output);
	KUNIT_EXPECT_EQ(t->test, hmm_dma_connected(&t->device), connected);
}

/* Mapping and unmapping */

static void hmm_dma_test_map(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];
	size_t idx;

	hmm_dma_alloc(t, 1);
	KUNIT_EXPECT_NULL(test, memchr_inv(t->map.pfn_list, 0,
					   HMM_DMA_PAGES * sizeof(*t->map.pfn_list)));
	hmm_dma_map_all(t, addrs);
	for (idx = 0; idx < HMM_DMA_PAGES; idx++)
		hmm_dma_expect_output(t, idx, hmm_dma_page(t, idx), HMM_PFN_DMA_MAPPED);

	hmm_dma_unmap_all(t);
	for (idx = 0; idx < HMM_DMA_PAGES; idx++)
		hmm_dma_expect_output(t, idx, hmm_dma_page(t, idx), 0);
}

static void hmm_dma_test_large_entries(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];

	hmm_dma_alloc(t, HMM_DMA_LARGE);
	KUNIT_EXPECT_EQ(test, t->map.dma_entry_size, HMM_DMA_LARGE * PAGE_SIZE);
	hmm_dma_map_all(t, addrs);
	KUNIT_EXPECT_EQ(test, hmm_dma_sticky(t, 3), HMM_PFN_DMA_MAPPED);
	KUNIT_EXPECT_EQ(test, t->map.pfn_list[4], 0);
	hmm_dma_unmap_all(t);
}

static void hmm_dma_test_whole_span(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];

	hmm_dma_alloc(t, HMM_DMA_PAGES);
	hmm_dma_map_all(t, addrs);
	hmm_dma_unmap_all(t);
}

/* As when a page that was prefetched for reading is to be written. */
static void hmm_dma_test_map_twice(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];
	size_t idx;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_all(t, addrs);
	for (idx = 0; idx < HMM_DMA_PAGES; idx++) {
		t->map.pfn_list[idx] ^= HMM_PFN_WRITE;
		KUNIT_EXPECT_EQ(test, hmm_dma_map(t, idx), addrs[idx]);
		t->map.pfn_list[idx] ^= HMM_PFN_WRITE;
		hmm_dma_expect_output(t, idx, hmm_dma_page(t, idx), HMM_PFN_DMA_MAPPED);
	}
	hmm_dma_expect_connected(t, HMM_DMA_PAGES);
	hmm_dma_unmap_all(t);
}

static void hmm_dma_test_unmap_part(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];
	size_t idx;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_all(t, addrs);
	for (idx = 0; idx < HMM_DMA_PAGES; idx += 2)
		KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, idx));

	hmm_dma_expect_connected(t, HMM_DMA_PAGES / 2);
	for (idx = 1; idx < HMM_DMA_PAGES; idx += 2) {
		hmm_dma_expect_reach(t, addrs[idx], page_to_phys(hmm_dma_page(t, idx)), false);
		KUNIT_EXPECT_EQ(test, hmm_dma_sticky(t, idx - 1), 0);
		KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, idx));
	}
	hmm_dma_expect_connected(t, 0);
}

static void hmm_dma_test_unmap_twice(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_entry(t, 0);
	hmm_dma_map_entry(t, 1);
	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 0));
	KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, 0));
	hmm_dma_expect_output(t, 0, hmm_dma_page(t, 0), 0);
	hmm_dma_expect_connected(t, 1);
}

static void hmm_dma_test_unmap_unmapped(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, 0));
	hmm_dma_put(t, 1, hmm_dma_page(t, 1));
	KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, 1));
	hmm_dma_expect_output(t, 1, hmm_dma_page(t, 1), 0);
}

/* Another page took the place of the one that was invalidated. */
static void hmm_dma_test_map_anew(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	struct page *other = hmm_dma_page(t, 0) + HMM_DMA_PAGES - 1;
	dma_addr_t addr;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_entry(t, 3);
	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 3));

	hmm_dma_put(t, 3, other);
	addr = hmm_dma_map(t, 3);
	hmm_dma_expect_reach(t, addr, page_to_phys(other), false);
	hmm_dma_expect_output(t, 3, other, HMM_PFN_DMA_MAPPED);
	hmm_dma_expect_connected(t, 1);
}

static void hmm_dma_test_not_valid(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_expect_refused(t, 0);
	t->map.pfn_list[0] = HMM_PFN_ERROR;
	hmm_dma_expect_refused(t, 0);
}

/*
 * A walk has found the page gone before the callback that tells of it has run. What is
 * mapped is unmapped all the same, once.
 */
static void hmm_dma_test_sticky_not_valid(struct kunit *test)
{
	static const unsigned long outputs[] = { 0, HMM_PFN_ERROR };
	struct hmm_dma_fixture *t = test->priv;
	unsigned long i;

	hmm_dma_alloc(t, 1);
	for (i = 0; i < ARRAY_SIZE(outputs); i++) {
		hmm_dma_map_entry(t, i);
		t->map.pfn_list[i] = outputs[i] | hmm_dma_sticky(t, i);
		hmm_dma_expect_refused(t, i);
		KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, i));
		KUNIT_EXPECT_EQ(test, t->map.pfn_list[i], outputs[i]);
		hmm_dma_expect_connected(t, 0);
		KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, i));
	}
}

/* The device began to bounce buffers, which none of these are. */
static void hmm_dma_test_bounces_later(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_entry(t, 0);
	dma_reset_need_sync(t->device.dev);
	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 0));
	hmm_dma_expect_output(t, 0, hmm_dma_page(t, 0), 0);
	hmm_dma_expect_connected(t, 0);
}

/* Failures of whoever translates */

static void hmm_dma_test_map_fails(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_entry(t, 0);
	hmm_dma_put(t, 1, hmm_dma_page(t, 1));
	t->device.fail_map = true;
	hmm_dma_expect_refused(t, 1);
	KUNIT_EXPECT_FALSE(test, t->device.fail_map);
	KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, 1));
	hmm_dma_map_entry(t, 1);
	hmm_dma_expect_connected(t, 2);
}

static void hmm_dma_test_sync_fails(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, HMM_DMA_LARGE);
	hmm_dma_map_entry(t, 0);
	hmm_dma_put(t, 1, hmm_dma_page(t, 1));
	t->device.fail_sync = true;
	hmm_dma_expect_refused(t, 1);
	KUNIT_EXPECT_FALSE(test, t->device.fail_sync);
	hmm_dma_map_entry(t, 1);
	hmm_dma_expect_connected(t, 2 * HMM_DMA_LARGE);
}

/* Allocating and freeing */

static void hmm_dma_expect_no_map(struct hmm_dma_fixture *t, int error,
				  size_t nr_entries, size_t dma_entry_size)
{
	int ret;

	memset(&t->map, 0x5a, sizeof(t->map));
	ret = hmm_dma_map_alloc(t->device.dev, &t->map, nr_entries, dma_entry_size);
	KUNIT_EXPECT_EQ(t->test, ret, error);
	KUNIT_EXPECT_TRUE(t->test, hmm_dma_is_empty(&t->map));
	if (!ret)
		hmm_dma_map_free(t->device.dev, &t->map);
	memset(&t->map, 0, sizeof(t->map));
}

static void hmm_dma_test_arguments(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_expect_no_map(t, -EINVAL, 0, PAGE_SIZE);
	hmm_dma_expect_no_map(t, -EINVAL, (SIZE_MAX >> PAGE_SHIFT) + 1, PAGE_SIZE);
	hmm_dma_expect_no_map(t, -EINVAL, SIZE_MAX, PAGE_SIZE);
	hmm_dma_expect_no_map(t, -EINVAL, HMM_DMA_PAGES, 0);
	hmm_dma_expect_no_map(t, -EINVAL, HMM_DMA_PAGES, PAGE_SIZE / 2);
	hmm_dma_expect_no_map(t, -EINVAL, HMM_DMA_PAGES, PAGE_SIZE + 1);
	hmm_dma_expect_no_map(t, -EINVAL, HMM_DMA_PAGES, (HMM_DMA_PAGES + 1) * PAGE_SIZE);
}

static void hmm_dma_test_limited_device(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	t->device.dev->bus_dma_limit = PAGE_SIZE - 1;
	hmm_dma_expect_no_map(t, -EOPNOTSUPP, HMM_DMA_PAGES, PAGE_SIZE);
}

static void hmm_dma_test_syncing_device(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	if (!IS_ENABLED(CONFIG_DMA_NEED_SYNC))
		kunit_skip(test, "needs CONFIG_DMA_NEED_SYNC");
	dma_reset_need_sync(t->device.dev);
	hmm_dma_expect_no_map(t, -EOPNOTSUPP, HMM_DMA_PAGES, PAGE_SIZE);
}

/* A span for which no machine has memory. */
static void hmm_dma_test_huge_span(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	if (!IS_ENABLED(CONFIG_64BIT))
		kunit_skip(test, "needs CONFIG_64BIT");
	hmm_dma_expect_no_map(t, -ENOMEM, SIZE_MAX >> PAGE_SHIFT, PAGE_SIZE);
}

/*
 * Have the task's @nth allocation from now on fail, or none. Returns how many
 * were missing until the one that was asked for before: 0 if that has failed.
 */
static unsigned int hmm_dma_fail_nth(unsigned int nth)
{
#ifdef CONFIG_FAILSLAB
	swap(current->fail_nth, nth);
#endif
	return nth;
}

static bool hmm_dma_can_fail(void)
{
	void *memory;

	hmm_dma_fail_nth(1);
	memory = kmalloc(8, GFP_KERNEL | __GFP_NOWARN);
	hmm_dma_fail_nth(0);
	kfree(memory);
	return !memory;
}

/*
 * Without memory for a list or the record there is no map. A failure elsewhere costs no more
 * than the IOVA space.
 */
static void hmm_dma_test_no_memory(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	unsigned int nth, left, errors = 0;
	int ret;

	if (!hmm_dma_can_fail())
		kunit_skip(test, "needs CONFIG_FAILSLAB, and no in its ignore-gfp-wait");
	hmm_dma_crowd(t);
	for (nth = 1, left = 0; !left; nth++) {
		hmm_dma_fail_nth(nth);
		ret = hmm_dma_map_alloc(t->device.dev, &t->map, HMM_DMA_PAGES, PAGE_SIZE);
		left = hmm_dma_fail_nth(0);
		KUNIT_EXPECT_EQ(test, ret, ret ? -ENOMEM : 0);
		KUNIT_EXPECT_EQ(test, hmm_dma_is_empty(&t->map), ret != 0);
		errors += ret != 0;
		hmm_dma_map_free(t->device.dev, &t->map);
	}
	KUNIT_EXPECT_EQ(test, errors, hmm_dma_records(&t->device) ? 3 : 2);
	KUNIT_EXPECT_EQ(test, ret, 0);
}

static void hmm_dma_test_free(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_free(t->device.dev, &t->map);
	KUNIT_EXPECT_TRUE(test, hmm_dma_is_empty(&t->map));
	hmm_dma_map_free(t->device.dev, &t->map);
	KUNIT_EXPECT_TRUE(test, hmm_dma_is_empty(&t->map));
}

/* What is freed is there for the next, as often as one likes. */
static void hmm_dma_test_reuse(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	dma_addr_t addrs[HMM_DMA_PAGES];
	int count;

	for (count = 0; count < 2 * HMM_DMA_IOVAS / HMM_DMA_PAGES; count++) {
		hmm_dma_alloc(t, 1);
		hmm_dma_map_all(t, addrs);
		hmm_dma_unmap_all(t);
		hmm_dma_map_free(t->device.dev, &t->map);
	}
}

/* Device memory */

#if defined(CONFIG_DEVICE_PRIVATE) && defined(CONFIG_PCI_P2PDMA)
#define HMM_DMA_DEVICE_SIZE	(PAGES_PER_SECTION << PAGE_SHIFT)

/**
 * struct hmm_dma_memory - memory that is on a device
 * @pagemap: private to the device, or a peer's
 * @provider: points to @peer, from where drivers/pci/p2pdma.c looks for it
 * @peer: whose bus the memory is on
 * @pci: owner of @peer, a device that can reach no other
 */
struct hmm_dma_memory {
	struct dev_pagemap pagemap;
	struct p2pdma_provider *provider;
	struct p2pdma_provider peer;
	struct pci_dev pci;
};

static vm_fault_t hmm_dma_to_ram(struct vm_fault *vmf)
{
	return VM_FAULT_SIGBUS;
}

static void hmm_dma_free_folio(struct folio *folio)
{
}

static const struct dev_pagemap_ops hmm_dma_memory_ops = {
	.folio_free	= hmm_dma_free_folio,
	.migrate_to_ram	= hmm_dma_to_ram,
};

static void hmm_dma_memory_destroy(void *data)
{
	struct hmm_dma_memory *memory = data;

	memory->pagemap.type = MEMORY_DEVICE_PRIVATE;
	memunmap_pages(&memory->pagemap);
	release_mem_region(memory->pagemap.range.start, HMM_DMA_DEVICE_SIZE);
}

static struct hmm_dma_memory *hmm_dma_device_memory(struct hmm_dma_fixture *t)
{
	struct hmm_dma_memory *memory;
	struct resource *res;
	void *ret;

	memory = kunit_kzalloc(t->test, sizeof(*memory), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(t->test, memory);
	res = request_free_mem_region(&iomem_resource, HMM_DMA_DEVICE_SIZE, "hmm_dma_kunit");
	KUNIT_ASSERT_FALSE(t->test, IS_ERR(res));
	memory->pagemap.type = MEMORY_DEVICE_PRIVATE;
	memory->pagemap.range.start = res->start;
	memory->pagemap.range.end = res->end;
	memory->pagemap.nr_range = 1;
	memory->pagemap.ops = &hmm_dma_memory_ops;
	memory->pagemap.owner = memory;
	ret = memremap_pages(&memory->pagemap, numa_mem_id());
	if (IS_ERR(ret))
		release_mem_region(res->start, HMM_DMA_DEVICE_SIZE);
	KUNIT_ASSERT_FALSE(t->test, IS_ERR(ret));
	KUNIT_ASSERT_EQ(t->test, 0, kunit_add_action_or_reset(t->test, hmm_dma_memory_destroy,
							      memory));
	return memory;
}

static struct page *hmm_dma_private_page(struct hmm_dma_fixture *t)
{
	return pfn_to_page(PHYS_PFN(hmm_dma_device_memory(t)->pagemap.range.start));
}

/*
 * A peer's page. What is known of the peer is that it is out of reach, until a
 * test says otherwise in @t->peer.
 */
static struct page *hmm_dma_peer_page(struct hmm_dma_fixture *t)
{
	struct hmm_dma_memory *memory = hmm_dma_device_memory(t);
	struct page *page = pfn_to_page(PHYS_PFN(memory->pagemap.range.start));

	memory->provider = &memory->peer;
	memory->peer.owner = &memory->pci.dev;
	memory->peer.bus_offset = HMM_DMA_BUS_OFFSET;
	memory->pagemap.type = MEMORY_DEVICE_PCI_P2PDMA;
	t->peer.mem = &memory->peer;
	t->peer.map = PCI_P2PDMA_MAP_NOT_SUPPORTED;
	return page;
}
#else
static struct page *hmm_dma_private_page(struct hmm_dma_fixture *t)
{
	kunit_skip(t->test, "needs CONFIG_DEVICE_PRIVATE and CONFIG_PCI_P2PDMA");
}

static struct page *hmm_dma_peer_page(struct hmm_dma_fixture *t)
{
	return hmm_dma_private_page(t);
}
#endif

/* Map a page of a peer that the device gets at in that way. */
static dma_addr_t hmm_dma_map_peer(struct hmm_dma_fixture *t, size_t idx,
				   struct page *page, enum pci_p2pdma_map_type type)
{
	dma_addr_t addr;

	t->peer.map = type;
	hmm_dma_put(t, idx, page);
	addr = hmm_dma_map(t, idx);
	KUNIT_ASSERT_FALSE(t->test, dma_mapping_error(t->device.dev, addr));
	return addr;
}

static void hmm_dma_test_device_private(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_private_page(t);

	hmm_dma_alloc(t, 1);
	hmm_dma_put(t, 0, page);
	hmm_dma_expect_refused(t, 0);
	KUNIT_EXPECT_FALSE(test, hmm_dma_unmap(t, 0));
}

static void hmm_dma_test_peer_bus(struct kunit *test)
{
	const unsigned long sticky = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS;
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_peer_page(t);
	dma_addr_t addr;

	hmm_dma_alloc(t, 1);
	addr = hmm_dma_map_peer(t, 5, page, PCI_P2PDMA_MAP_BUS_ADDR);
	KUNIT_EXPECT_EQ(test, addr, page_to_phys(page) + HMM_DMA_BUS_OFFSET);
	hmm_dma_expect_output(t, 5, page, sticky);
	KUNIT_EXPECT_EQ(test, hmm_dma_map(t, 5), addr);
	hmm_dma_expect_output(t, 5, page, sticky);
	hmm_dma_expect_connected(t, 0);

	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 5));
	hmm_dma_expect_output(t, 5, page, 0);
}

/* What a bus address leaves behind is nothing, whatever it took the place of. */
static void hmm_dma_test_peer_bus_among_others(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_peer_page(t);

	hmm_dma_alloc(t, 1);
	hmm_dma_map_entry(t, 0);
	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 0));
	hmm_dma_map_entry(t, 1);
	hmm_dma_map_peer(t, 0, page, PCI_P2PDMA_MAP_BUS_ADDR);
	hmm_dma_expect_connected(t, 1);
	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 0));
	hmm_dma_expect_connected(t, 1);
	hmm_dma_map_entry(t, 0);
	hmm_dma_expect_connected(t, 2);
}

static void hmm_dma_test_peer_host_bridge(struct kunit *test)
{
	const unsigned long sticky = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA;
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_peer_page(t);
	dma_addr_t addr;

	hmm_dma_alloc(t, 1);
	addr = hmm_dma_map_peer(t, 5, page, PCI_P2PDMA_MAP_THRU_HOST_BRIDGE);
	hmm_dma_expect_reach(t, addr, page_to_phys(page), true);
	hmm_dma_expect_output(t, 5, page, sticky);
	KUNIT_EXPECT_EQ(test, hmm_dma_map(t, 5), addr);
	hmm_dma_expect_output(t, 5, page, sticky);
	hmm_dma_expect_connected(t, 1);

	KUNIT_EXPECT_TRUE(test, hmm_dma_unmap(t, 5));
	hmm_dma_expect_output(t, 5, page, 0);
	hmm_dma_expect_connected(t, 0);
}

static void hmm_dma_test_peer_out_of_reach(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_peer_page(t);
	struct p2pdma_provider *mem = t->peer.mem;

	hmm_dma_alloc(t, 1);
	hmm_dma_put(t, 5, page);
	hmm_dma_expect_refused(t, 5);
	memset(&t->peer, 0, sizeof(t->peer));
	hmm_dma_expect_refused(t, 5);
	KUNIT_EXPECT_PTR_EQ(test, t->peer.mem, mem);
	KUNIT_EXPECT_EQ(test, t->peer.map, PCI_P2PDMA_MAP_NOT_SUPPORTED);
	t->peer.map = PCI_P2PDMA_MAP_UNKNOWN;
	hmm_dma_expect_refused(t, 5);
}

/* A peer that is out of reach does not keep the device from other pages. */
static void hmm_dma_test_peer_and_memory(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	struct page *page = hmm_dma_peer_page(t);

	hmm_dma_alloc(t, 1);
	hmm_dma_put(t, 0, page);
	hmm_dma_expect_refused(t, 0);
	hmm_dma_map_entry(t, 1);
	hmm_dma_expect_output(t, 1, hmm_dma_page(t, 1), HMM_PFN_DMA_MAPPED);
	hmm_dma_expect_connected(t, 1);
}

/* The suite */

static void hmm_dma_free_pages(void *pages)
{
	__free_pages(pages, get_order(HMM_DMA_PAGES * PAGE_SIZE));
}

static int hmm_dma_test_init(struct kunit *test)
{
	struct hmm_dma_fixture *t;

	t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, t);
	t->test = test;
	spin_lock_init(&t->lock);
	t->pages = alloc_pages(GFP_KERNEL, get_order(HMM_DMA_PAGES * PAGE_SIZE));
	KUNIT_ASSERT_NOT_NULL(test, t->pages);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, hmm_dma_free_pages, t->pages));

	test->priv = t;
	hmm_dma_device_create(&t->device, test,
			      test->param_value ?: &hmm_dma_ways[HMM_DMA_STATELESS],
			      HMM_DMA_IOVAS);
	return 0;
}

/* Leave no mapping behind, wherever a test ended. */
static void hmm_dma_test_exit(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	size_t idx;

	if (!t)
		return;
	hmm_dma_fail_nth(0);
	hmm_dma_map_free(t->device.dev, &t->crowd);
	if (t->map.pfn_list)
		for (idx = 0; idx < hmm_dma_entries(t); idx++)
			hmm_dma_unmap(t, idx);
	hmm_dma_map_free(t->device.dev, &t->map);
	hmm_dma_device_destroy(&t->device);
}

#define HMM_DMA_CASE(name) \
	KUNIT_CASE_PARAM(hmm_dma_test_##name, hmm_dma_any_gen_params)

static struct kunit_case hmm_dma_test_cases[] = {
	HMM_DMA_CASE(map),
	HMM_DMA_CASE(large_entries),
	HMM_DMA_CASE(whole_span),
	HMM_DMA_CASE(map_twice),
	HMM_DMA_CASE(unmap_part),
	HMM_DMA_CASE(unmap_twice),
	HMM_DMA_CASE(unmap_unmapped),
	HMM_DMA_CASE(map_anew),
	HMM_DMA_CASE(not_valid),
	HMM_DMA_CASE(sticky_not_valid),
	HMM_DMA_CASE(bounces_later),
	KUNIT_CASE_PARAM(hmm_dma_test_map_fails, hmm_dma_translated_gen_params),
	KUNIT_CASE_PARAM(hmm_dma_test_sync_fails, hmm_dma_flushed_gen_params),
	HMM_DMA_CASE(arguments),
	HMM_DMA_CASE(limited_device),
	HMM_DMA_CASE(syncing_device),
	HMM_DMA_CASE(huge_span),
	HMM_DMA_CASE(no_memory),
	HMM_DMA_CASE(free),
	HMM_DMA_CASE(reuse),
	HMM_DMA_CASE(device_private),
	HMM_DMA_CASE(peer_bus),
	HMM_DMA_CASE(peer_bus_among_others),
	HMM_DMA_CASE(peer_host_bridge),
	HMM_DMA_CASE(peer_out_of_reach),
	HMM_DMA_CASE(peer_and_memory),
	{}
};

static struct kunit_suite hmm_dma_test_suite = {
	.name = "hmm_dma",
	.suite_init = hmm_dma_suite_init,
	.suite_exit = hmm_dma_suite_exit,
	.init = hmm_dma_test_init,
	.exit = hmm_dma_test_exit,
	.test_cases = hmm_dma_test_cases,
};

kunit_test_suite(hmm_dma_test_suite);

MODULE_DESCRIPTION("KUnit tests of hmm_dma_map_pfn()");
MODULE_LICENSE("GPL");
