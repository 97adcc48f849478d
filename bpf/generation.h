/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The generation in force. */
#ifndef IMDS_GUARD_GENERATION_H
#define IMDS_GUARD_GENERATION_H

#include <linux/types.h>
#include "helpers.h"
#include "imds_guard.h"

#ifdef IG_TEST_DELAY
/* For tests alone: makes the time between reading the generation and using it long. */
ig_inline void ig_test_delay(void)
{
	__u32 i;

	for (i = 0; i < IG_TEST_DELAY; i++)
		ig_map_lookup_elem(IG_MAP(IG_MAP_MEMBERS), &(struct ig_member){ .id = i });
}
#else
ig_inline void ig_test_delay(void)
{
}
#endif

/*
 * 0 when nothing is locked. Each run reads it once, and finds everything else by this value: a second read could see
 * another generation, and mix two policies.
 */
ig_inline __u32 ig_generation(void)
{
	__u32 zero = 0, generation;
	const struct ig_config *config = ig_map_lookup_elem(IG_MAP(IG_MAP_CONFIG), &zero);

	generation = config ? *(const volatile __u8 *)&config->generation : 0;
	if (generation)
		ig_test_delay();
	return generation;
}

#endif
