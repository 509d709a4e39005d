/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Devices to map pages for, in each of the ways in which a map can work
 *
 * Two of the ways need somebody who translates addresses: the tests stand in
 * for an architecture's dma_map_ops and for an IOMMU. Either keeps a record of
 * what the device can reach, which is what results are compared with, so that
 * hmm_dma.c is never asked about itself.
 *
 * Everything used here is exported, so that the suites can be a module.
 */
#ifndef _MM_TESTS_HMM_DMA_DEVICE_H
#define _MM_TESTS_HMM_DMA_DEVICE_H

#include <kunit/test.h>
#include <linux/iommu.h>
#include <linux/xarray.h>

/* Where the IOMMU has addresses. */
#define HMM_DMA_IOVA	0x1000000UL

struct hmm_dma_device;

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
	struct device *(*create)(struct hmm_dma_device *d);
	bool stateless;
	bool iova;
	bool crowded;
};

/**
 * struct hmm_dma_device - a device, and what it can reach
 * @test: the running test
 * @way: how maps are to work
 * @dev: the device
 * @iovas: how many pages of addresses the IOMMU has
 * @reach: what the device reaches at each page of addresses, if not stateless:
 *	hmm_dma_reach() of the physical page
 * @next: the next address that the dma_map_ops give out
 * @domain: the IOMMU's domain of the device
 * @fail_map: have the next mapping fail
 * @fail_sync: have the next flush of the IOTLB fail
 * @wrong: the first thing that a translator met and that was wrong
 */
struct hmm_dma_device {
	struct kunit *test;
	const struct hmm_dma_way *way;
	struct device *dev;
	size_t iovas;
	struct xarray reach;
	dma_addr_t next;
	struct iommu_domain domain;
	bool fail_map;
	bool fail_sync;
	const char *wrong;
};

/* First those that nobody can fail, last those that need a flush of the IOTLB. */
enum { HMM_DMA_STATELESS, HMM_DMA_RECORDED, HMM_DMA_CROWDED, HMM_DMA_IN_IOVA };

extern const struct hmm_dma_way hmm_dma_ways[4];

static inline void *hmm_dma_reach(phys_addr_t phys, bool mmio)
{
	return xa_mk_value((PHYS_PFN(phys) << 1) | mmio);
}

void hmm_dma_device_create(struct hmm_dma_device *d, struct kunit *test,
			   const struct hmm_dma_way *way, size_t iovas);
void hmm_dma_device_destroy(struct hmm_dma_device *d);
unsigned long hmm_dma_connected(struct hmm_dma_device *d);
bool hmm_dma_records(const struct hmm_dma_device *d);

int hmm_dma_suite_init(struct kunit_suite *suite);
void hmm_dma_suite_exit(struct kunit_suite *suite);

#endif
