/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The locked endpoint that a request is for: the address in the trie, then the port. */
#ifndef IMDS_GUARD_ENDPOINT_H
#define IMDS_GUARD_ENDPOINT_H

#include <linux/types.h>
#include "helpers.h"
#include "imds_guard.h"
#include "request.h"

ig_inline const struct ig_endpoint *ig_find_endpoint(__u32 generation, const struct ig_address *address)
{
	struct ig_endpoint_key key = { .prefixlen = 32 + 128, .generation = generation, .address = *address };

	return ig_map_lookup_elem(IG_MAP(IG_MAP_ENDPOINTS), &key);
}

/* The most specific endpoint has all ranges: user space has copied those of shorter prefixes into longer ones. */
ig_inline bool ig_find_range(__u32 generation, const struct ig_request *request, struct ig_port_range *found)
{
	const struct ig_endpoint *endpoint = ig_find_endpoint(generation, &request->to);
	__u32 i;

	if (!endpoint)
		return false;
	for (i = 0; i < IG_RANGES; i++) {
		const struct ig_port_range *range = &endpoint->ranges[i];

		if (i >= endpoint->ranges_len)
			break;
		if (request->port >= range->low && request->port <= range->high &&
		    (range->protocols & request->protocol)) {
			*found = *range;
			return true;
		}
	}
	return false;
}

#endif
