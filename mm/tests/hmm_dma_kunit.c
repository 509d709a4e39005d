// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_dma_map_pfn() and its companions
 *
 * A case gets a device, and a map of a small span for it. The devices cover
 * the ways in which a map can work, see hmm_dma_ways. Two of them need somebody
 * who translates addresses: the tests stand in for an architecture's
 * dma_map_ops and for an IOMMU. Either keeps a record of what the device can
 * reach, which is what results are compared with, so that hmm_dma.c is never
 * asked about itself.
 *
 * Mapping and unmapping is done under a spinlock, as drivers do.
 *
 * Everything used here is exported, so that the suite can be a module.
 */
#include <kunit/device.h>
#include <kunit/platform_device.h>
#include <kunit/resource.h>
#include <kunit/test.h>
#include <linux/dma-direct.h>
#include <linux/dma-map-ops.h>
#include <linux/fault-inject.h>
#include <linux/hmm-dma.h>
#include <linux/hmm.h>
#include <linux/iommu.h>
#include <linux/ioport.h>
#include <linux/memremap.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/xarray.h>

/* The span, in pages, and how large a large DMA entry is. */
#define HMM_DMA_PAGES	16
#define HMM_DMA_LARGE	4

/* Where the IOMMU has addresses, and how many pages of them. */
#define HMM_DMA_IOVA	0x1000000UL
#define HMM_DMA_IOVAS	64

/* Between physical addresses and those on the peer's bus. */
#define HMM_DMA_BUS_OFFSET	0x10000000UL

#define HMM_DMA_STICKY \
	(HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS)

/* What else an output has: a writable page in a mapping of order 9. */
#define HMM_DMA_OUTPUT \
	(HMM_PFN_VALID | HMM_PFN_WRITE | (9UL << HMM_PFN_ORDER_SHIFT))

struct hmm_dma_fixture;

/**
 * struct hmm_dma_way - a way in which a map can work
 * @name: what it is called
 * @create: make a device for which maps work that way, or skip the test
 * @stateless: whether the device needs nobody to translate
 * @iova: whether the map has an IOVA space of its own
 * @crowded: whether the IOMMU has no room for that when it is asked for
 */
struct hmm_dma_way {
	const char *name;
	struct device *(*create)(struct hmm_dma_fixture *t);
	bool stateless;
	bool iova;
	bool crowded;
};

/**
 * struct hmm_dma_fixture - what a case works with
 * @test: the running test
 * @way: how the map is to work
 * @dev: the device
 * @map: the map that is tested
 * @peer: what is known of the peer; a plain page has none
 * @lock: what a driver has to keep invalidations out
 * @pages: HMM_DMA_PAGES contiguous pages
 * @crowd: takes all of the IOMMU's addresses
 * @reach: what the device reaches at each page of addresses, if not stateless:
 *	hmm_dma_reach() of the physical page
 * @next: the next address that the dma_map_ops give out
 * @domain: the IOMMU's domain of the device
 * @fail_map: have the next mapping fail
 * @fail_sync: have the next flush of the IOTLB fail
 * @wrong: the first thing that a translator met and that was wrong
 */
struct hmm_dma_fixture {
	struct kunit *test;
	const struct hmm_dma_way *way;
	struct device *dev;
	struct hmm_dma_map map;
	struct pci_p2pdma_map_state peer;
	spinlock_t lock;
	struct page *pages;
	struct hmm_dma_map crowd;
	struct xarray reach;
	dma_addr_t next;
	struct iommu_domain domain;
	bool fail_map;
	bool fail_sync;
	const char *wrong;
};

/* Translators run with a spinlock held, where a failed expectation may not print. */
static void hmm_dma_check(struct hmm_dma_fixture *t, bool right, const char *wrong)
{
	if (!right && !t->wrong)
		t->wrong = wrong;
}

/* What the device reaches, as whoever translates for it knows, if anybody does */

static void *hmm_dma_reach(phys_addr_t phys, bool mmio)
{
	return xa_mk_value((PHYS_PFN(phys) << 1) | mmio);
}

static __maybe_unused void hmm_dma_connect(struct hmm_dma_fixture *t, dma_addr_t addr,
					   phys_addr_t phys, size_t size, bool mmio)
{
	size_t at;

	for (at = 0; at < size; at += PAGE_SIZE)
		hmm_dma_check(t, !xa_store(&t->reach, PHYS_PFN(addr + at),
					   hmm_dma_reach(phys + at, mmio), GFP_ATOMIC),
			      "a page of addresses was mapped twice");
}

static __maybe_unused void hmm_dma_disconnect(struct hmm_dma_fixture *t, dma_addr_t addr,
					      size_t size)
{
	size_t at;

	for (at = 0; at < size; at += PAGE_SIZE)
		hmm_dma_check(t, xa_erase(&t->reach, PHYS_PFN(addr + at)),
			      "a page of addresses was unmapped twice");
}

static unsigned long hmm_dma_connected(struct hmm_dma_fixture *t)
{
	unsigned long index, count = 0;
	void *entry;

	xa_for_each(&t->reach, index, entry)
		count++;
	return count;
}

static __maybe_unused bool hmm_dma_fails(bool *fail)
{
	bool fails = *fail;

	*fail = false;
	return fails;
}

/* A device that reaches memory directly */

static struct device *hmm_dma_create_direct(struct hmm_dma_fixture *t)
{
	return kunit_device_register(t->test, "direct");
}

/* A device for which dma_map_ops of the architecture's translate */

#ifdef CONFIG_ARCH_HAS_DMA_OPS
static void hmm_dma_check_ops(struct hmm_dma_fixture *t, enum dma_data_direction dir,
			      unsigned long attrs)
{
	hmm_dma_check(t, dir == DMA_BIDIRECTIONAL, "the direction");
	hmm_dma_check(t, (attrs & ~DMA_ATTR_MMIO) == DMA_ATTR_REQUIRE_COHERENT, "the attributes");
}

static dma_addr_t hmm_dma_ops_map(struct device *dev, phys_addr_t phys, size_t size,
				  enum dma_data_direction dir, unsigned long attrs)
{
	struct hmm_dma_fixture *t = dev_get_drvdata(dev);
	dma_addr_t addr = t->next;

	hmm_dma_check_ops(t, dir, attrs);
	if (hmm_dma_fails(&t->fail_map))
		return DMA_MAPPING_ERROR;
	hmm_dma_connect(t, addr, phys, size, attrs & DMA_ATTR_MMIO);
	t->next += size;
	return addr;
}

static void hmm_dma_ops_unmap(struct device *dev, dma_addr_t addr, size_t size,
			      enum dma_data_direction dir, unsigned long attrs)
{
	struct hmm_dma_fixture *t = dev_get_drvdata(dev);
	void *entry = xa_load(&t->reach, PHYS_PFN(addr));

	hmm_dma_check_ops(t, dir, attrs);
	hmm_dma_check(t, !!(attrs & DMA_ATTR_MMIO) == (entry && (xa_to_value(entry) & 1)),
		      "what was mapped as MMIO was not unmapped so, or the reverse");
	hmm_dma_disconnect(t, addr, size);
}

static const struct dma_map_ops hmm_dma_ops = {
	.map_phys	= hmm_dma_ops_map,
	.unmap_phys	= hmm_dma_ops_unmap,
};

static struct device *hmm_dma_create_ops(struct hmm_dma_fixture *t)
{
	struct device *dev = kunit_device_register(t->test, "ops");

	if (!IS_ERR(dev)) {
		dev_set_drvdata(dev, t);
		set_dma_ops(dev, &hmm_dma_ops);
	}
	t->next = HMM_DMA_IOVA;
	return dev;
}
#else
static struct device *hmm_dma_create_ops(struct hmm_dma_fixture *t)
{
	kunit_skip(t->test, "no device has DMA operations of its own here");
}
#endif

/* A device behind an IOMMU */

#ifdef CONFIG_IOMMU_DMA
static struct hmm_dma_fixture *hmm_dma_of_domain(struct iommu_domain *domain)
{
	return container_of(domain, struct hmm_dma_fixture, domain);
}

static int hmm_dma_iommu_attach(struct iommu_domain *domain, struct device *dev,
				struct iommu_domain *old)
{
	return 0;
}

static int hmm_dma_iommu_map(struct iommu_domain *domain, unsigned long iova,
			     phys_addr_t phys, size_t pgsize, size_t pgcount,
			     int prot, gfp_t gfp, size_t *mapped)
{
	struct hmm_dma_fixture *t = hmm_dma_of_domain(domain);

	hmm_dma_check(t, (prot & ~IOMMU_MMIO) ==
		      (IOMMU_READ | IOMMU_WRITE | (prot & IOMMU_MMIO ? 0 : IOMMU_CACHE)),
		      "the protection");
	if (hmm_dma_fails(&t->fail_map))
		return -ENOMEM;
	*mapped = pgsize * pgcount;
	hmm_dma_connect(t, iova, phys, *mapped, prot & IOMMU_MMIO);
	return 0;
}

static size_t hmm_dma_iommu_unmap(struct iommu_domain *domain, unsigned long iova,
				  size_t pgsize, size_t pgcount,
				  struct iommu_iotlb_gather *gather)
{
	hmm_dma_disconnect(hmm_dma_of_domain(domain), iova, pgsize * pgcount);
	return pgsize * pgcount;
}

static int hmm_dma_iommu_sync(struct iommu_domain *domain, unsigned long iova,
			      size_t size)
{
	struct hmm_dma_fixture *t = hmm_dma_of_domain(domain);

	return hmm_dma_fails(&t->fail_sync) ? -EIO : 0;
}

static phys_addr_t hmm_dma_iommu_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	struct hmm_dma_fixture *t = hmm_dma_of_domain(domain);
	void *entry = xa_load(&t->reach, PHYS_PFN(iova));

	return entry ? PFN_PHYS(xa_to_value(entry) >> 1) : 0;
}

/* The domain is part of the fixture. */
static void hmm_dma_iommu_free(struct iommu_domain *domain)
{
}

static const struct iommu_domain_ops hmm_dma_domain_ops = {
	.attach_dev	= hmm_dma_iommu_attach,
	.map_pages	= hmm_dma_iommu_map,
	.unmap_pages	= hmm_dma_iommu_unmap,
	.iotlb_sync_map	= hmm_dma_iommu_sync,
	.iova_to_phys	= hmm_dma_iommu_phys,
	.free		= hmm_dma_iommu_free,
};

static struct iommu_domain *hmm_dma_iommu_domain(struct device *dev)
{
	struct hmm_dma_fixture *t = dev_get_drvdata(dev);

	t->domain.pgsize_bitmap = PAGE_SIZE;
	t->domain.geometry = (struct iommu_domain_geometry) {
		.aperture_start	= HMM_DMA_IOVA,
		.aperture_end	= HMM_DMA_IOVA + HMM_DMA_IOVAS * PAGE_SIZE - 1,
		.force_aperture	= true,
	};
	return &t->domain;
}

static int hmm_dma_iommu_domain_type(struct device *dev)
{
	return IOMMU_DOMAIN_DMA;
}

static const struct device_type hmm_dma_behind_iommu = {
	.name = "hmm_dma_kunit",
};

static struct iommu_device hmm_dma_iommu;
static bool hmm_dma_iommu_ready;

/* Every device there is gets offered. */
static struct iommu_device *hmm_dma_iommu_probe(struct device *dev)
{
	return dev->type == &hmm_dma_behind_iommu ? &hmm_dma_iommu : ERR_PTR(-ENODEV);
}

static const struct iommu_ops hmm_dma_iommu_ops = {
	.owner			= THIS_MODULE,
	.probe_device		= hmm_dma_iommu_probe,
	.device_group		= generic_device_group,
	.def_domain_type	= hmm_dma_iommu_domain_type,
	.domain_alloc_paging	= hmm_dma_iommu_domain,
	.default_domain_ops	= &hmm_dma_domain_ops,
};

static int hmm_dma_suite_init(struct kunit_suite *suite)
{
	int ret;

	ret = iommu_device_sysfs_add(&hmm_dma_iommu, NULL, NULL, "hmm_dma_kunit");
	if (ret)
		return ret;
	ret = iommu_device_register(&hmm_dma_iommu, &hmm_dma_iommu_ops, NULL);
	if (ret)
		iommu_device_sysfs_remove(&hmm_dma_iommu);
	hmm_dma_iommu_ready = !ret;
	return ret;
}

static void hmm_dma_suite_exit(struct kunit_suite *suite)
{
	if (!hmm_dma_iommu_ready)
		return;
	iommu_device_unregister(&hmm_dma_iommu);
	iommu_device_sysfs_remove(&hmm_dma_iommu);
}

static struct device *hmm_dma_create_iommu(struct hmm_dma_fixture *t)
{
	struct platform_device *pdev;
	int ret;

	pdev = kunit_platform_device_alloc(t->test, "hmm_dma_kunit", PLATFORM_DEVID_NONE);
	KUNIT_ASSERT_NOT_NULL(t->test, pdev);
	pdev->dev.type = &hmm_dma_behind_iommu;
	platform_set_drvdata(pdev, t);
	ret = kunit_platform_device_add(t->test, pdev);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	if (iommu_get_domain_for_dev(&pdev->dev) != &t->domain)
		kunit_skip(t->test, "this machine has an IOMMU for all devices");
	return &pdev->dev;
}
#else
static int hmm_dma_suite_init(struct kunit_suite *suite)
{
	return 0;
}

static void hmm_dma_suite_exit(struct kunit_suite *suite)
{
}

static struct device *hmm_dma_create_iommu(struct hmm_dma_fixture *t)
{
	kunit_skip(t->test, "needs CONFIG_IOMMU_DMA");
}
#endif

/* First those that nobody can fail, last those that need a flush of the IOTLB. */
enum { HMM_DMA_STATELESS, HMM_DMA_RECORDED, HMM_DMA_CROWDED, HMM_DMA_IN_IOVA };

static const struct hmm_dma_way hmm_dma_ways[] = {
	[HMM_DMA_STATELESS] = {
		.name = "stateless", .create = hmm_dma_create_direct, .stateless = true,
	},
	[HMM_DMA_RECORDED] = { .name = "recorded", .create = hmm_dma_create_ops },
	[HMM_DMA_CROWDED] = {
		.name = "recorded_iommu", .create = hmm_dma_create_iommu, .crowded = true,
	},
	[HMM_DMA_IN_IOVA] = { .name = "iova", .create = hmm_dma_create_iommu, .iova = true },
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

/* Only debugging has a record kept of what needs no unmap. */
static bool hmm_dma_records(const struct hmm_dma_fixture *t)
{
	if (t->way->stateless)
		return IS_ENABLED(CONFIG_DMA_API_DEBUG);
	return !t->way->iova;
}

/* Maps */

static bool hmm_dma_is_empty(const struct hmm_dma_map *map)
{
	return !memchr_inv(map, 0, sizeof(*map));
}

/* Have a full IOMMU, for the ways that it takes that to get. */
static void hmm_dma_crowd(struct hmm_dma_fixture *t)
{
	int ret;

	if (!t->way->crowded)
		return;
	ret = hmm_dma_map_alloc(t->dev, &t->crowd, HMM_DMA_IOVAS, PAGE_SIZE);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	KUNIT_ASSERT_TRUE(t->test, dma_use_iova(&t->crowd.state));
}

static void hmm_dma_alloc(struct hmm_dma_fixture *t, size_t entry_pages)
{
	int ret;

	hmm_dma_crowd(t);
	ret = hmm_dma_map_alloc(t->dev, &t->map, HMM_DMA_PAGES,
				entry_pages * PAGE_SIZE);
	hmm_dma_map_free(t->dev, &t->crowd);
	KUNIT_ASSERT_EQ(t->test, ret, 0);
	KUNIT_ASSERT_EQ(t->test, dma_use_iova(&t->map.state), t->way->iova);
	KUNIT_ASSERT_EQ(t->test, !!t->map.dma_list, hmm_dma_records(t));
}

static size_t hmm_dma_entries(const struct hmm_dma_fixture *t)
{
	return HMM_DMA_PAGES * PAGE_SIZE / t->map.dma_entry_size;
}

static dma_addr_t hmm_dma_map(struct hmm_dma_fixture *t, size_t idx)
{
	guard(spinlock)(&t->lock);
	return hmm_dma_map_pfn(t->dev, &t->map, idx, &t->peer);
}

static bool hmm_dma_unmap(struct hmm_dma_fixture *t, size_t idx)
{
	guard(spinlock)(&t->lock);
	return hmm_dma_unmap_pfn(t->dev, &t->map, idx);
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
	if (t->way->stateless)
		KUNIT_EXPECT_EQ(t->test, addr, phys_to_dma(t->dev, phys));
	else
		KUNIT_EXPECT_PTR_EQ(t->test, xa_load(&t->reach, PHYS_PFN(addr)),
				    hmm_dma_reach(phys, mmio));
}

static void hmm_dma_expect_connected(struct hmm_dma_fixture *t, unsigned long pages)
{
	KUNIT_EXPECT_EQ(t->test, hmm_dma_connected(t), t->way->stateless ? 0 : pages);
}

/* Map an entry to its page; the device then reaches all of it. */
static dma_addr_t hmm_dma_map_entry(struct hmm_dma_fixture *t, size_t idx)
{
	struct page *page = hmm_dma_page(t, idx);
	dma_addr_t addr;
	size_t at;

	hmm_dma_put(t, idx, page);
	addr = hmm_dma_map(t, idx);
	KUNIT_ASSERT_FALSE(t->test, dma_mapping_error(t->dev, addr));
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
	unsigned long connected = hmm_dma_connected(t);
	unsigned long output = t->map.pfn_list[idx];

	KUNIT_EXPECT_EQ(t->test, hmm_dma_map(t, idx), DMA_MAPPING_ERROR);
	KUNIT_EXPECT_EQ(t->test, t->map.pfn_list[idx], output);
	KUNIT_EXPECT_EQ(t->test, hmm_dma_connected(t), connected);
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
	dma_reset_need_sync(t->dev);
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
	t->fail_map = true;
	hmm_dma_expect_refused(t, 1);
	KUNIT_EXPECT_FALSE(test, t->fail_map);
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
	t->fail_sync = true;
	hmm_dma_expect_refused(t, 1);
	KUNIT_EXPECT_FALSE(test, t->fail_sync);
	hmm_dma_map_entry(t, 1);
	hmm_dma_expect_connected(t, 2 * HMM_DMA_LARGE);
}

/* Allocating and freeing */

static void hmm_dma_expect_no_map(struct hmm_dma_fixture *t, int error,
				  size_t nr_entries, size_t dma_entry_size)
{
	int ret;

	memset(&t->map, 0x5a, sizeof(t->map));
	ret = hmm_dma_map_alloc(t->dev, &t->map, nr_entries, dma_entry_size);
	KUNIT_EXPECT_EQ(t->test, ret, error);
	KUNIT_EXPECT_TRUE(t->test, hmm_dma_is_empty(&t->map));
	if (!ret)
		hmm_dma_map_free(t->dev, &t->map);
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

	t->dev->bus_dma_limit = PAGE_SIZE - 1;
	hmm_dma_expect_no_map(t, -EOPNOTSUPP, HMM_DMA_PAGES, PAGE_SIZE);
}

static void hmm_dma_test_syncing_device(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	if (!IS_ENABLED(CONFIG_DMA_NEED_SYNC))
		kunit_skip(test, "needs CONFIG_DMA_NEED_SYNC");
	dma_reset_need_sync(t->dev);
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
		ret = hmm_dma_map_alloc(t->dev, &t->map, HMM_DMA_PAGES, PAGE_SIZE);
		left = hmm_dma_fail_nth(0);
		KUNIT_EXPECT_EQ(test, ret, ret ? -ENOMEM : 0);
		KUNIT_EXPECT_EQ(test, hmm_dma_is_empty(&t->map), ret != 0);
		errors += ret != 0;
		hmm_dma_map_free(t->dev, &t->map);
	}
	KUNIT_EXPECT_EQ(test, errors, hmm_dma_records(t) ? 3 : 2);
	KUNIT_EXPECT_EQ(test, ret, 0);
}

static void hmm_dma_test_free(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;

	hmm_dma_alloc(t, 1);
	hmm_dma_map_free(t->dev, &t->map);
	KUNIT_EXPECT_TRUE(test, hmm_dma_is_empty(&t->map));
	hmm_dma_map_free(t->dev, &t->map);
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
		hmm_dma_map_free(t->dev, &t->map);
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
	KUNIT_ASSERT_FALSE(t->test, dma_mapping_error(t->dev, addr));
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
	t->way = test->param_value ?: &hmm_dma_ways[HMM_DMA_STATELESS];
	spin_lock_init(&t->lock);
	xa_init(&t->reach);
	t->pages = alloc_pages(GFP_KERNEL, get_order(HMM_DMA_PAGES * PAGE_SIZE));
	KUNIT_ASSERT_NOT_NULL(test, t->pages);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, hmm_dma_free_pages, t->pages));

	test->priv = t;
	t->dev = t->way->create(t);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, t->dev);
	/* Where that is not a matter of course, a device is, or it gets no map. */
	dev_set_dma_coherent(t->dev);
	return dma_set_mask(t->dev, DMA_BIT_MASK(64));
}

/* Leave no mapping behind, wherever a test ended. */
static void hmm_dma_test_exit(struct kunit *test)
{
	struct hmm_dma_fixture *t = test->priv;
	size_t idx;

	if (!t)
		return;
	hmm_dma_fail_nth(0);
	hmm_dma_map_free(t->dev, &t->crowd);
	if (t->map.pfn_list)
		for (idx = 0; idx < hmm_dma_entries(t); idx++)
			hmm_dma_unmap(t, idx);
	hmm_dma_map_free(t->dev, &t->map);
	xa_destroy(&t->reach);
	KUNIT_EXPECT_NULL_MSG(test, t->wrong, "a translator met something wrong: %s", t->wrong);
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
