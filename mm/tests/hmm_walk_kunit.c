// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * KUnit tests of hmm_range_fault(): every kind of entry, against a reference
 *
 * A case says what VMA and what entry each page of a small window has, what is
 * requested of it, and how. The window is built in an address space of the
 * test's own: memory is mapped and touched, and then entries are planted in
 * its page tables, which also brings about states that no program could. What
 * the call returns and stores is compared page by page with two things that
 * share no code with the walker: the table in hmm_reference.h says what has to
 * happen, and hmm_oracle() what is there afterwards. How many faults that took
 * is known from the task's own count, so one too many does not go unseen.
 *
 * The same check serves a test that goes through the table, row by row, and
 * one that makes cases up at random and shrinks what fails.
 */
#include <kunit/test.h>
#include <linux/hmm.h>
#include <linux/mman.h>
#include <linux/mmzone.h>
#include <linux/prandom.h>

#include "../hmm_internal.h"
#include "hmm_oracle.h"
#include "hmm_world.h"

/* What is found behind the end of the elements. */
#define HMM_CANARY	0x5a5a5a5aUL

/* What an output says of a page, whatever it is mapped together with. */
#define HMM_OUTPUTS	(HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_ERROR)

static unsigned long seed;
module_param(seed, ulong, 0644);
MODULE_PARM_DESC(seed, "of random cases; 0 for a new one each time");

static unsigned int walks = 4000;
module_param(walks, uint, 0644);
MODULE_PARM_DESC(walks, "how many random cases to try");

/* What the reference says */

/* Is this a fault for which there has to be swap, and is none? */
static bool hmm_lacks_swap(enum hmm_ref_entry entry, enum hmm_ref_answer answer)
{
	return entry == REF_SWAP && answer == REF_FAULT && !hmm_world_has_swap();
}

static enum hmm_ref_entry hmm_entry(const struct hmm_case *c, unsigned long page)
{
	enum hmm_ref_entry entry = c->page[page].entry;

	/* Without an owner's name all device memory is somebody else's. */
	if (c->owner)
		return entry;
	if (entry == REF_PRIVATE_WRITE || entry == REF_PRIVATE_READ)
		return REF_PRIVATE_OTHER;
	return hmm_is_private_uffd(entry) ? REF_PRIVATE_OTHER_UFFD : entry;
}

static enum hmm_ref_request hmm_request(const struct hmm_case *c, unsigned long page)
{
	return hmm_ref_request((c->page[page].in & c->mask) | c->default_flags);
}

static enum hmm_ref_answer hmm_answer(const struct hmm_case *c, unsigned long page)
{
	return hmm_ref_answer(c->page[page].vma, hmm_entry(c, page), hmm_request(c, page));
}

/* Has a migration to end for the call to get anywhere? */
static bool hmm_waits(const struct hmm_case *c)
{
	unsigned long page;

	for (page = c->first; page < c->end; page++)
		if (hmm_is_migration(c->page[page].entry) &&
		    hmm_answer(c, page) == REF_FAULT)
			return true;
	return false;
}

/* Asking */

static void hmm_fill_in(struct hmm_world *w)
{
	const struct hmm_case *c = w->c;
	unsigned long page;

	memset_l(w->pfns, HMM_CANARY, ARRAY_SIZE(w->pfns));
	for (page = c->first; page < c->end; page++)
		w->pfns[page - c->first] = c->page[page].in;
	w->range = (struct hmm_range) {
		.notifier		= &w->notifier,
		.start			= hmm_addr(w, c->first),
		.end			= hmm_addr(w, c->end),
		.hmm_pfns		= w->pfns,
		.default_flags		= c->default_flags,
		.pfn_flags_mask		= c->mask,
		.dev_private_owner	= c->owner ? hmm_world_owner() : NULL,
	};
}

/* As a driver does: start over for as long as faults invalidate the range. */
static int hmm_ask(struct hmm_world *w)
{
	unsigned long faults = hmm_world_faults();
	int ret, tries = 0;

	w->stop = false;
	if (hmm_waits(w->c))
		schedule_work(&w->mover);
	do {
		hmm_fill_in(w);
		ret = hmm_world_call(w, w->c->call);
	} while (ret == -EBUSY && w->c->call == HMM_CALL_LOCKED && ++tries < 3);
	w->faults = hmm_world_faults() - faults;
	WRITE_ONCE(w->stop, true);
	flush_work(&w->mover);
	return ret;
}

/* Checking */

/*
 * Clearing a marker that nobody needs any more is a fault of its own, and what
 * comes back from swap can be protected still.
 */
static unsigned long hmm_faults_due(const struct hmm_case *c, unsigned long page)
{
	enum hmm_ref_entry entry = c->page[page].entry;

	return entry == REF_UFFD_WP || entry == REF_SWAP_RWP ? 2 : 1;
}

/* A read fault brings the zero page there, and a write fault one to write to. */
static bool hmm_was_empty(const struct hmm_case *c, unsigned long page)
{
	return c->page[page].entry == REF_EMPTY || c->page[page].entry == REF_UFFD_WP;
}

/* Is @out what has to be stored for a page that was not faulted, or was? */
static bool hmm_check_output(struct hmm_world *w, unsigned long page, unsigned long out,
			     unsigned long there)
{
	const struct hmm_case *c = w->c;
	enum hmm_ref_answer answer = hmm_answer(c, page);
	unsigned long in = c->page[page].in, want;

	if ((out ^ in) & HMM_STICKY)
		return hmm_wrong(w, "page %lu: sticky bits %#lx became %#lx", page,
				 in & HMM_STICKY, out & HMM_STICKY);
	out &= ~HMM_STICKY;
	want = hmm_ref_output(answer);
	if (answer != REF_FAULT && (out & HMM_OUTPUTS) != want)
		return hmm_wrong(w, "page %lu: stored %#lx, not %#lx", page, out, want);
	want = HMM_PFN_VALID | (hmm_request(c, page) == REF_WRITE ? HMM_PFN_WRITE : 0);
	if (answer == REF_FAULT && (out & want) != want)
		return hmm_wrong(w, "page %lu: stored %#lx after a fault", page, out);
	if (answer == REF_FAULT && (out & ~want & HMM_PFN_WRITE) && hmm_was_empty(c, page))
		return hmm_wrong(w, "page %lu: faulted for write, not read", page);
	return out == there || hmm_wrong(w, "page %lu: stored %#lx, and there is %#lx",
					 page, out, there);
}

static bool hmm_check_untouched(struct hmm_world *w, unsigned long page)
{
	unsigned long now = w->pfns[page - w->c->first], in = w->c->page[page].in;

	return now == in || hmm_wrong(w, "page %lu: %#lx became %#lx behind the cursor",
				      page, in, now);
}

static bool hmm_check_elements(struct hmm_world *w, unsigned long cursor)
{
	struct hmm_oracle oracles[HMM_PAGES];
	const struct hmm_case *c = w->c;
	unsigned long page;

	for (page = c->first; page < cursor; page++)
		oracles[page - c->first] = hmm_oracle(w->mm, hmm_addr(w, page),
						      w->range.dev_private_owner);
	hmm_oracle_join(oracles, hmm_addr(w, c->first), cursor - c->first);

	for (page = c->first; page < cursor; page++)
		if (!hmm_check_output(w, page, w->pfns[page - c->first],
				      oracles[page - c->first].out))
			return false;
	for (; page < c->end; page++)
		if (!hmm_check_untouched(w, page))
			return false;
	return w->pfns[c->end - c->first] == HMM_CANARY ||
	       hmm_wrong(w, "wrote behind the last element");
}

static bool hmm_check(struct hmm_world *w, int ret)
{
	enum hmm_ref_answer answer = REF_STORE_0;
	const struct hmm_case *c = w->c;
	unsigned long page, faults = 0;
	bool right;
	int want;

	for (page = c->first; page < c->end; page++) {
		answer = hmm_answer(c, page);
		if (answer == REF_EPERM || answer == REF_EFAULT)
			break;
		if (answer == REF_FAULT)
			faults += hmm_faults_due(c, page);
	}
	want = page == c->end ? 0 : answer == REF_EPERM ? -EPERM : -EFAULT;
	if (ret != want)
		return hmm_wrong(w, "returned %d, not %d", ret, want);
	if (w->faults != faults)
		return hmm_wrong(w, "%lu faults, not %lu", w->faults, faults);

	mmap_read_lock(w->mm);
	right = hmm_check_elements(w, page);
	mmap_read_unlock(w->mm);
	return right;
}

/* Does HMM do what it has to do in this case? If not, @w->why says so. */
static bool hmm_try(struct hmm_world *w, const struct hmm_case *c)
{
	bool right;

	right = hmm_world_build(w, c) ? hmm_check(w, hmm_ask(w)) :
				  hmm_wrong(w, "the case could not be built");
	hmm_world_tear_down(w);
	return right;
}

/* The table, row by row */

static bool hmm_row_possible(const struct hmm_row *row)
{
	return hmm_world_possible(row->vma, row->entry) &&
	       !hmm_lacks_swap(row->entry, hmm_ref_answer(row->vma, row->entry, row->request));
}

static const void *hmm_row_gen_params(struct kunit *test, const void *prev, char *desc)
{
	static struct hmm_row row;

	return hmm_world_row_gen(&row, prev, desc, hmm_row_possible);
}

/* Ways to say what is requested of the page, and nothing of the others. */
enum { HMM_BY_DEFAULT, HMM_BY_MASK, HMM_BY_BOTH, HMM_WAYS };

static const char * const hmm_way_names[HMM_WAYS] = { "default", "mask", "both" };

static void hmm_case_request(struct hmm_case *c, struct hmm_case_page *p,
			     enum hmm_ref_request request, int way)
{
	static const unsigned long flags[] = { HMM_PFN_REQ_WRITE, HMM_READ, HMM_WRITE };

	switch (way) {
	case HMM_BY_DEFAULT:
		c->default_flags = flags[request];
		p->in |= HMM_WRITE;
		break;
	case HMM_BY_MASK:
		c->mask = HMM_WRITE;
		p->in |= flags[request];
		break;
	case HMM_BY_BOTH:
		c->default_flags = flags[request] & HMM_PFN_REQ_FAULT;
		c->mask = HMM_PFN_REQ_WRITE;
		p->in |= flags[request];
		break;
	}
}

/*
 * Six pages, three on either side of the border, all but one as they should be; and
 * that one alone.
 */
static const struct hmm_row_place {
	unsigned long first;
	unsigned long page;
	unsigned long end;
} hmm_row_places[] = {
	{ HMM_BORDER - 3, HMM_BORDER - 3, HMM_BORDER + 3 },
	{ HMM_BORDER - 3, HMM_BORDER, HMM_BORDER + 3 },
	{ HMM_BORDER - 3, HMM_BORDER + 2, HMM_BORDER + 3 },
	{ HMM_BORDER, HMM_BORDER, HMM_BORDER + 1 },
};

static void hmm_row_case(struct hmm_case *c, const struct hmm_row *row,
			 const struct hmm_row_place *place, int way)
{
	unsigned long page;

	*c = (struct hmm_case) {
		.first = place->first,
		.end = place->end,
		.owner = true,
	};
	for (page = c->first; page < c->end; page++)
		c->page[page] = (struct hmm_case_page) {
			.entry = REF_WRITABLE,
			.in = HMM_PFN_ERROR | (page & 1 ? HMM_STICKY : HMM_PFN_P2PDMA),
		};
	c->page[place->page].vma = row->vma;
	c->page[place->page].entry = row->entry;
	hmm_case_request(c, &c->page[place->page], row->request, way);
}

static void hmm_test_table(struct kunit *test)
{
	const struct hmm_row *row = test->param_value;
	struct hmm_case *c = kunit_kzalloc(test, sizeof(*c), GFP_KERNEL);
	struct hmm_world *w = test->priv;
	unsigned int i, way, call;

	KUNIT_ASSERT_NOT_NULL(test, c);
	for (i = 0; i < ARRAY_SIZE(hmm_row_places); i++)
		for (way = 0; way < HMM_WAYS; way++)
			for (call = 0; call < HMM_CALLS; call++) {
				hmm_row_case(c, row, &hmm_row_places[i], way);
				c->call = call;
				KUNIT_EXPECT_TRUE_MSG(test, hmm_try(w, c),
						      "at page %lu of %lu to %lu, by %s, %s: %s",
						      hmm_row_places[i].page, c->first,
						      c->end - 1, hmm_way_names[way],
						      hmm_world_call_names[call], w->why);
			}
}

/* Entries beside each other */

/* Each twice in a row, beside the other, and alone. */
static const bool hmm_neighbours[] = { 0, 0, 1, 1, 0, 1 };

static void hmm_neighbour_case(struct hmm_case *c, enum hmm_ref_vma vma,
			       enum hmm_ref_entry one, enum hmm_ref_entry other)
{
	unsigned long i;

	*c = (struct hmm_case) {
		.first = HMM_BORDER,
		.end = HMM_BORDER + ARRAY_SIZE(hmm_neighbours),
		.call = (one + other) % HMM_CALLS,
		.owner = true,
	};
	for (i = 0; i < ARRAY_SIZE(hmm_neighbours); i++)
		c->page[c->first + i] = (struct hmm_case_page) {
			.vma = vma,
			.entry = hmm_neighbours[i] ? other : one,
		};
}

/* One failure is enough: it says what @one is taken for. */
static void hmm_try_neighbours(struct hmm_world *w, struct hmm_case *c,
			       enum hmm_ref_vma vma, enum hmm_ref_entry one)
{
	enum hmm_ref_entry other;
	bool right = true;

	for (other = 0; right && other < REF_ENTRIES; other++) {
		if (!hmm_world_possible(vma, other))
			continue;
		hmm_neighbour_case(c, vma, one, other);
		right = hmm_try(w, c);
		KUNIT_EXPECT_TRUE_MSG(w->test, right, "%s, %s beside %s, %s: %s",
				      hmm_ref_vma_names[vma], hmm_ref_writable[one].name,
				      hmm_ref_writable[other].name,
				      hmm_world_call_names[c->call], w->why);
	}
}

/*
 * A walk that takes several entries at once, because they are alike, has to see
 * each difference that counts.
 */
static void hmm_test_neighbours(struct kunit *test)
{
	struct hmm_case *c = kunit_kzalloc(test, sizeof(*c), GFP_KERNEL);
	enum hmm_ref_entry entry;
	enum hmm_ref_vma vma;

	KUNIT_ASSERT_NOT_NULL(test, c);
	for (vma = 0; !hmm_is_refused(vma); vma++)
		for (entry = 0; entry < REF_ENTRIES; entry++)
			if (hmm_world_possible(vma, entry))
				hmm_try_neighbours(test->priv, c, vma, entry);
}

/* Cases made up at random */

static unsigned long hmm_random(struct rnd_state *rnd, unsigned long below)
{
	return prandom_u32_state(rnd) % below;
}

/* Half of what is there is plain, so that walks get somewhere. */
static enum hmm_ref_vma hmm_random_vma(struct rnd_state *rnd)
{
	enum hmm_ref_vma vma = REF_VMA_WRITABLE;

	if (hmm_random(rnd, 2))
		return vma;
	do {
		vma = hmm_random(rnd, REF_VMAS);
	} while (!hmm_world_possible(vma, REF_EMPTY));
	return vma;
}

static enum hmm_ref_entry hmm_random_entry(struct rnd_state *rnd, enum hmm_ref_vma vma)
{
	enum hmm_ref_entry entry;

	if (hmm_random(rnd, 2))
		return hmm_random(rnd, 2) ? REF_WRITABLE : REF_EMPTY;
	do {
		entry = hmm_random(rnd, REF_ENTRIES);
	} while (!hmm_world_possible(vma, entry));
	return entry;
}

/* An element is whatever an earlier call left there, with a request or none. */
static unsigned long hmm_random_in(struct rnd_state *rnd)
{
	static const unsigned long requests[] = {
		0, 0, HMM_READ, HMM_WRITE, HMM_PFN_REQ_WRITE
	};
	unsigned long junk = prandom_u32_state(rnd) | ((u64)prandom_u32_state(rnd) << 32);

	return (junk & ~HMM_WRITE) | requests[hmm_random(rnd, ARRAY_SIZE(requests))];
}

/* What would end most walks early, or takes long, is rarely asked for. */
static void hmm_random_page(struct rnd_state *rnd, struct hmm_case *c, unsigned long page,
			    enum hmm_ref_vma vma)
{
	struct hmm_case_page *p = &c->page[page];
	enum hmm_ref_answer answer;

	*p = (struct hmm_case_page) {
		.vma = vma,
		.entry = hmm_random_entry(rnd, vma),
		.in = hmm_random_in(rnd),
	};
	/* As in real page tables, many an entry is like the one before. */
	if (page && vma == p[-1].vma && hmm_random(rnd, 2))
		p->entry = p[-1].entry;
	answer = hmm_answer(c, page);
	if ((answer == REF_EFAULT || answer == REF_EPERM || hmm_is_migration(p->entry)) &&
	    hmm_random(rnd, 16))
		p->in &= ~HMM_WRITE;
	answer = hmm_answer(c, page);
	if (hmm_lacks_swap(p->entry, answer) ||
	    (hmm_is_migration(p->entry) && answer == REF_FAULT && hmm_random(rnd, 16)))
		p->entry = REF_READ_ONLY;
}

static void hmm_random_case(struct rnd_state *rnd, struct hmm_case *c)
{
	static const unsigned long defaults[] = {
		0, 0, 0, 0, HMM_READ, HMM_WRITE, HMM_PFN_REQ_WRITE
	};
	static const unsigned long masks[] = { 0, HMM_READ, HMM_WRITE, HMM_WRITE, ~0UL };
	enum hmm_ref_vma vma = REF_VMA_WRITABLE;
	unsigned long page;

	c->first = hmm_random(rnd, HMM_PAGES);
	c->end = c->first + 1 + hmm_random(rnd, HMM_PAGES - c->first);
	c->call = hmm_random(rnd, HMM_CALLS);
	c->owner = hmm_random(rnd, 4);
	c->default_flags = defaults[hmm_random(rnd, ARRAY_SIZE(defaults))];
	c->mask = masks[hmm_random(rnd, ARRAY_SIZE(masks))];
	for (page = 0; page < HMM_PAGES; page++) {
		if (!hmm_random(rnd, 4))
			vma = hmm_random_vma(rnd);
		hmm_random_page(rnd, c, page, vma);
	}
}

/* Shrinking: make the case simpler for as long as it still fails */

static bool hmm_keep_if_wrong(struct hmm_world *w, struct hmm_case *c,
			      const struct hmm_case *simpler)
{
	if (simpler->first >= simpler->end || !memcmp(c, simpler, sizeof(*c)) ||
	    hmm_try(w, simpler))
		return false;
	*c = *simpler;
	return true;
}

static bool hmm_shrink_page(struct hmm_world *w, struct hmm_case *c,
			    struct hmm_case *simpler, unsigned long page)
{
	bool shrunk;

	*simpler = *c;
	simpler->page[page].in = 0;
	shrunk = hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->page[page].entry = REF_EMPTY;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->page[page].vma = REF_VMA_WRITABLE;
	if (hmm_world_possible(REF_VMA_WRITABLE, c->page[page].entry))
		shrunk |= hmm_keep_if_wrong(w, c, simpler);
	return shrunk;
}

static bool hmm_shrink_once(struct hmm_world *w, struct hmm_case *c, struct hmm_case *simpler)
{
	unsigned long page;
	bool shrunk;

	*simpler = *c;
	simpler->first++;
	shrunk = hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->end--;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->default_flags = 0;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	*simpler = *c;
	simpler->mask = 0;
	shrunk |= hmm_keep_if_wrong(w, c, simpler);
	for (page = c->first; page < c->end; page++)
		shrunk |= hmm_shrink_page(w, c, simpler, page);
	return shrunk;
}

static void hmm_print_case(struct kunit *test, const struct hmm_case *c)
{
	unsigned long page;

	kunit_err(test, "pages %lu to %lu, %s, %s owner, default_flags %#lx, mask %#lx\n",
		  c->first, c->end - 1, hmm_world_call_names[c->call],
		  c->owner ? "an" : "no", c->default_flags, c->mask);
	for (page = c->first; page < c->end; page++)
		kunit_err(test, "page %lu: %s, %s, element %#lx\n", page,
			  hmm_ref_vma_names[c->page[page].vma],
			  hmm_ref_writable[c->page[page].entry].name, c->page[page].in);
}

static void hmm_random_failed(struct hmm_world *w, struct hmm_case *c)
{
	struct hmm_case *simpler = kunit_kzalloc(w->test, sizeof(*c), GFP_KERNEL);
	int rounds = 0;

	KUNIT_ASSERT_NOT_NULL(w->test, simpler);
	while (rounds++ < 100 && hmm_shrink_once(w, c, simpler))
		;
	hmm_print_case(w->test, c);
	/* Once more, to say what is wrong with this one. */
	KUNIT_EXPECT_TRUE_MSG(w->test, hmm_try(w, c), "%s", w->why);
}

static void hmm_test_random(struct kunit *test)
{
	struct hmm_case *c = kunit_kzalloc(test, sizeof(*c), GFP_KERNEL);
	u64 used = seed ?: get_random_u32();
	struct hmm_world *w = test->priv;
	struct rnd_state rnd;
	unsigned int i;

	KUNIT_ASSERT_NOT_NULL(test, c);
	kunit_info(test, "seed %llu, %u walks\n", used, walks);
	prandom_seed_state(&rnd, used);
	for (i = 0; i < walks; i++) {
		hmm_random_case(&rnd, c);
		if (hmm_try(w, c))
			continue;
		KUNIT_FAIL(test, "seed %llu, walk %u: %s", used, i, w->why);
		hmm_random_failed(w, c);
		return;
	}
}

/* Empty and bad tables, at every level */

/* Two empty pages in memory that cannot be written. */
static void hmm_expect_empty(struct hmm_world *w, unsigned long addr, enum hmm_call_kind call)
{
	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, 0, call), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, HMM_WRITE, call), -EPERM);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], HMM_STICKY);

	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, HMM_READ, call), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
}

/* No table has it like that: of x86 and User Mode Linux, or else of arm64. */
#define HMM_BAD_BIT	(IS_ENABLED(CONFIG_ARM64) ? BIT(1) : BIT(8))

/* The pages behind @addr have a bad table, and the one before it a good one. */
static void hmm_expect_bad(struct hmm_world *w, unsigned long addr, enum hmm_call_kind call)
{
	unsigned long before;

	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, 0, call), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0] & HMM_PFN_FLAGS, HMM_PFN_VALID | HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_PFN_ERROR | HMM_STICKY);
	before = w->pfns[0];

	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, HMM_READ, call), -EFAULT);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], before);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_STICKY);

	addr += PAGE_SIZE;
	KUNIT_EXPECT_EQ(w->test, hmm_world_ask_around(w, addr, 0, call), 0);
	KUNIT_EXPECT_EQ(w->test, w->pfns[0], HMM_PFN_ERROR | HMM_STICKY);
	KUNIT_EXPECT_EQ(w->test, w->pfns[1], HMM_PFN_ERROR | HMM_STICKY);
}

static void hmm_test_empty_tables(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_world_map_large(w);
	enum hmm_call_kind call = hmm_world_call_of(test);

	/* Each leaves tables behind that the next one finds. */
	hmm_expect_empty(w, addr + PUD_SIZE, call);
	hmm_expect_empty(w, addr + 2 * PMD_SIZE, call);
	hmm_expect_empty(w, addr + 2 * PMD_SIZE + 9 * PAGE_SIZE, call);
}

/*
 * Where there is nothing else mapped, so that not even a table of PUDs is there: at
 * 1 TiB, if the address space is that large.
 */
#define HMM_FAR	(IS_ENABLED(CONFIG_64BIT) ? BIT(BITS_PER_LONG - 24) : 0)

static void hmm_test_no_tables(struct kunit *test)
{
	struct hmm_world *w = test->priv;

	if (!HMM_FAR)
		kunit_skip(test, "no 64 bits of address");
	KUNIT_ASSERT_EQ(test, HMM_FAR,
			kunit_vm_mmap(test, NULL, HMM_FAR, 2 * PAGE_SIZE, PROT_READ,
				      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, 0));
	hmm_world_watch(w, HMM_FAR, 2 * PAGE_SIZE);
	hmm_expect_empty(w, HMM_FAR + PAGE_SIZE, hmm_world_call_of(test));
}

static void hmm_test_bad_pmd(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_world_map_large(w) + 2 * PMD_SIZE;
	pmd_t *pmdp, good, bad;

	KUNIT_ASSERT_EQ(test, hmm_world_ask_around(w, addr, HMM_READ, HMM_CALL_LOCKED), 0);
	pmdp = hmm_pmd(w->mm, addr);
	good = pmdp_get(pmdp);
	bad = __pmd(pmd_val(good) ^ HMM_BAD_BIT);
	if (pmd_trans_huge(bad))
		kunit_skip(test, "what is no table is a huge page");
	*pmdp = bad;
	hmm_expect_bad(w, addr, hmm_world_call_of(test));
	*pmdp = good;
}

static void hmm_test_bad_pud(struct kunit *test)
{
	struct hmm_world *w = test->priv;
	unsigned long addr = hmm_world_map_large(w) + PUD_SIZE;
	pud_t *pudp, good;

	KUNIT_ASSERT_EQ(test, hmm_world_ask_around(w, addr, HMM_READ, HMM_CALL_LOCKED), 0);
	pudp = hmm_pud(w->mm, addr);
	good = pudp_get(pudp);
	*pudp = __pud(pud_val(good) ^ HMM_BAD_BIT);
	hmm_expect_bad(w, addr, hmm_world_call_of(test));
	*pudp = good;
}

/* Pfns that have no room below the flags, which takes 32 bits and much memory */

static void hmm_test_pfn_fits(struct kunit *test)
{
	const unsigned long last = BIT(HMM_PFN_ORDER_SHIFT) - 1;

	KUNIT_EXPECT_TRUE(test, hmm_pfn_fits(0));
	KUNIT_EXPECT_TRUE(test, hmm_pfn_fits(last));
	KUNIT_EXPECT_EQ(test, last & HMM_PFN_FLAGS, 0);
	if (IS_ENABLED(CONFIG_64BIT)) {
#ifdef MAX_PHYSMEM_BITS
		/* There is no need to look at any pfn. */
		KUNIT_EXPECT_LE(test, PHYS_PFN((1ULL << MAX_PHYSMEM_BITS) - 1), last);
#endif
		return;
	}
	KUNIT_EXPECT_FALSE(test, hmm_pfn_fits(last + 1));
	KUNIT_EXPECT_FALSE(test, hmm_pfn_fits(ULONG_MAX));
}

/* The suite */

static struct kunit_case hmm_walk_cases[] = {
	KUNIT_CASE_PARAM(hmm_test_table, hmm_row_gen_params),
	KUNIT_CASE_SLOW(hmm_test_neighbours),
	KUNIT_CASE_SLOW(hmm_test_random),
	KUNIT_CASE_PARAM(hmm_test_empty_tables, hmm_world_call_gen),
	KUNIT_CASE_PARAM(hmm_test_no_tables, hmm_world_call_gen),
	KUNIT_CASE_PARAM(hmm_test_bad_pmd, hmm_world_call_gen),
	KUNIT_CASE_PARAM(hmm_test_bad_pud, hmm_world_call_gen),
	KUNIT_CASE(hmm_test_pfn_fits),
	{}
};

static struct kunit_suite hmm_walk_suite = {
	.name = "hmm_walk",
	.suite_init = hmm_world_suite_init,
	.suite_exit = hmm_world_suite_exit,
	.init = hmm_world_init,
	.exit = hmm_world_exit,
	.test_cases = hmm_walk_cases,
};

kunit_test_suite(hmm_walk_suite);

MODULE_IMPORT_NS("EXPORTED_FOR_KUNIT_TESTING");
MODULE_DESCRIPTION("KUnit tests of hmm_range_fault() against a reference");
MODULE_LICENSE("GPL");
