// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Devices to map pages for, in each of the ways in which a map can work
 */
#include <kunit/device.h>
#include <kunit/platform_device.h>
#include <kunit/test.h>
#include <linux/dma-map-ops.h>
#include <linux/iommu.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/xarray.h>

#include "hmm_dma_device.h"

/* Translators run with a spinlock held, where a failed expectation may not print. */
static void hmm_dma_check(struct hmm_dma_device *d, bool right, const char *wrong)
{
	if (!right && !d->wrong)
		d->wrong = wrong;
}

/* What the device reaches, as whoever translates for it knows, if anybody does */

static __maybe_unused void hmm_dma_connect(struct hmm_dma_device *d, dma_addr_t addr,
					   phys_addr_t phys, size_t size, bool mmio)
{
	size_t at;

	for (at = 0; at < size; at += PAGE_SIZE)
		hmm_dma_check(d, !xa_store(&d->reach, PHYS_PFN(addr + at),
					   hmm_dma_reach(phys + at, mmio), GFP_ATOMIC),
			      "a page of addresses was mapped twice");
}

static __maybe_unused void hmm_dma_disconnect(struct hmm_dma_device *d, dma_addr_t addr,
					      size_t size)
{
	size_t at;

	for (at = 0; at < size; at += PAGE_SIZE)
		hmm_dma_check(d, xa_erase(&d->reach, PHYS_PFN(addr + at)),
			      "a page of addresses was unmapped twice");
}

unsigned long hmm_dma_connected(struct hmm_dma_device *d)
{
	unsigned long index, count = 0;
	void *entry;

	xa_for_each(&d->reach, index, entry)
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

static struct device *hmm_dma_create_direct(struct hmm_dma_device *d)
{
	return kunit_device_register(d->test, "direct");
}

/* A device for which dma_map_ops of the architecture's translate */

#ifdef CONFIG_ARCH_HAS_DMA_OPS
static void hmm_dma_check_ops(struct hmm_dma_device *d, enum dma_data_direction dir,
			      unsigned long attrs)
{
	hmm_dma_check(d, dir == DMA_BIDIRECTIONAL, "the direction");
	hmm_dma_check(d, (attrs & ~DMA_ATTR_MMIO) == DMA_ATTR_REQUIRE_COHERENT, "the attributes");
}

static dma_addr_t hmm_dma_ops_map(struct device *dev, phys_addr_t phys, size_t size,
				  enum dma_data_direction dir, unsigned long attrs)
{
	struct hmm_dma_device *d = dev_get_drvdata(dev);
	dma_addr_t addr = d->next;

	hmm_dma_check_ops(d, dir, attrs);
	if (hmm_dma_fails(&d->fail_map))
		return DMA_MAPPING_ERROR;
	hmm_dma_connect(d, addr, phys, size, attrs & DMA_ATTR_MMIO);
	d->next += size;
	return addr;
}

static void hmm_dma_ops_unmap(struct device *dev, dma_addr_t addr, size_t size,
			      enum dma_data_direction dir, unsigned long attrs)
{
	struct hmm_dma_device *d = dev_get_drvdata(dev);
	void *entry = xa_load(&d->reach, PHYS_PFN(addr));

	hmm_dma_check_ops(d, dir, attrs);
	hmm_dma_check(d, !!(attrs & DMA_ATTR_MMIO) == (entry && (xa_to_value(entry) & 1)),
		      "what was mapped as MMIO was not unmapped so, or the reverse");
	hmm_dma_disconnect(d, addr, size);
}

static const struct dma_map_ops hmm_dma_ops = {
	.map_phys	= hmm_dma_ops_map,
	.unmap_phys	= hmm_dma_ops_unmap,
};

static struct device *hmm_dma_create_ops(struct hmm_dma_device *d)
{
	struct device *dev = kunit_device_register(d->test, "ops");

	if (!IS_ERR(dev)) {
		dev_set_drvdata(dev, d);
		set_dma_ops(dev, &hmm_dma_ops);
	}
	d->next = HMM_DMA_IOVA;
	return dev;
}
#else
static struct device *hmm_dma_create_ops(struct hmm_dma_device *d)
{
	kunit_skip(d->test, "no device has DMA operations of its own here");
}
#endif

/* A device behind an IOMMU */

#ifdef CONFIG_IOMMU_DMA
static struct hmm_dma_device *hmm_dma_of_domain(struct iommu_domain *domain)
{
	return container_of(domain, struct hmm_dma_device, domain);
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
	struct hmm_dma_device *d = hmm_dma_of_domain(domain);

	hmm_dma_check(d, (prot & ~IOMMU_MMIO) ==
		      (IOMMU_READ | IOMMU_WRITE | (prot & IOMMU_MMIO ? 0 : IOMMU_CACHE)),
		      "the protection");
	if (hmm_dma_fails(&d->fail_map))
		return -ENOMEM;
	*mapped = pgsize * pgcount;
	hmm_dma_connect(d, iova, phys, *mapped, prot & IOMMU_MMIO);
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
	struct hmm_dma_device *d = hmm_dma_of_domain(domain);

	return hmm_dma_fails(&d->fail_sync) ? -EIO : 0;
}

static phys_addr_t hmm_dma_iommu_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	struct hmm_dma_device *d = hmm_dma_of_domain(domain);
	void *entry = xa_load(&d->reach, PHYS_PFN(iova));

	return entry ? PFN_PHYS(xa_to_value(entry) >> 1) : 0;
}

/* The domain is part of the device. */
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
	struct hmm_dma_device *d = dev_get_drvdata(dev);

	d->domain.pgsize_bitmap = PAGE_SIZE;
	d->domain.geometry = (struct iommu_domain_geometry) {
		.aperture_start	= HMM_DMA_IOVA,
		.aperture_end	= HMM_DMA_IOVA + d->iovas * PAGE_SIZE - 1,
		.force_aperture	= true,
	};
	return &d->domain;
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

int hmm_dma_suite_init(struct kunit_suite *suite)
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

void hmm_dma_suite_exit(struct kunit_suite *suite)
{
	if (!hmm_dma_iommu_ready)
		return;
	iommu_device_unregister(&hmm_dma_iommu);
	iommu_device_sysfs_remove(&hmm_dma_iommu);
}

static struct device *hmm_dma_create_iommu(struct hmm_dma_device *d)
{
	struct platform_device *pdev;
	int ret;

	pdev = kunit_platform_device_alloc(d->test, "hmm_dma_kunit", PLATFORM_DEVID_NONE);
	KUNIT_ASSERT_NOT_NULL(d->test, pdev);
	pdev->dev.type = &hmm_dma_behind_iommu;
	platform_set_drvdata(pdev, d);
	ret = kunit_platform_device_add(d->test, pdev);
	KUNIT_ASSERT_EQ(d->test, ret, 0);
	if (iommu_get_domain_for_dev(&pdev->dev) != &d->domain)
		kunit_skip(d->test, "this machine has an IOMMU for all devices");
	return &pdev->dev;
}
#else
int hmm_dma_suite_init(struct kunit_suite *suite)
{
	return 0;
}

void hmm_dma_suite_exit(struct kunit_suite *suite)
{
}

static struct device *hmm_dma_create_iommu(struct hmm_dma_device *d)
{
	kunit_skip(d->test, "needs CONFIG_IOMMU_DMA");
}
#endif

const struct hmm_dma_way hmm_dma_ways[] = {
	[HMM_DMA_STATELESS] = {
		.name = "stateless", .create = hmm_dma_create_direct, .stateless = true,
	},
	[HMM_DMA_RECORDED] = { .name = "recorded", .create = hmm_dma_create_ops },
	[HMM_DMA_CROWDED] = {
		.name = "recorded_iommu", .create = hmm_dma_create_iommu, .crowded = true,
	},
	[HMM_DMA_IN_IOVA] = { .name = "iova", .create = hmm_dma_create_iommu, .iova = true },
};

/* Only debugging has a record kept of what needs no unmap. */
bool hmm_dma_records(const struct hmm_dma_device *d)
{
	if (d->way->stateless)
		return IS_ENABLED(CONFIG_DMA_API_DEBUG);
	return !d->way->iova;
}

/* Making devices */

/* Make a device for which maps work that way, or skip the test. */
void hmm_dma_device_create(struct hmm_dma_device *d, struct kunit *test,
			   const struct hmm_dma_way *way, size_t iovas)
{
	d->test = test;
	d->way = way;
	d->iovas = iovas;
	xa_init(&d->reach);
	d->dev = way->create(d);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, d->dev);
	/* Where that is not a matter of course, a device is, or it gets no map. */
	dev_set_dma_coherent(d->dev);
	KUNIT_ASSERT_EQ(test, dma_set_mask(d->dev, DMA_BIT_MASK(64)), 0);
}

/* Say what was wrong, if anything was. There need not be a device. */
void hmm_dma_device_destroy(struct hmm_dma_device *d)
{
	if (!d->test)
		return;
	xa_destroy(&d->reach);
	KUNIT_EXPECT_NULL_MSG(d->test, d->wrong, "a translator met something wrong: %s",
			      d->wrong);
}
