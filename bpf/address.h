/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Addresses, and the bitmap that tells nearly all of them from locked ones. */
#ifndef IMDS_GUARD_ADDRESS_H
#define IMDS_GUARD_ADDRESS_H

#include <linux/types.h>
#include "helpers.h"
#include "imds_guard.h"

#define IG_MAPPED ig_be32(0xffff) /* word[2] of ::ffff:a.b.c.d */
#define IG_LOOPBACK4 ig_be32(0x7f000001)

ig_inline bool ig_is_ipv4(const struct ig_address *address)
{
	return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == IG_MAPPED;
}

/* :: or ::ffff:0.0.0.0 */
ig_inline bool ig_is_unspecified(const struct ig_address *address)
{
	return address->word[3] == 0 && address->word[0] == 0 && address->word[1] == 0 &&
	       (address->word[2] == 0 || address->word[2] == IG_MAPPED);
}

ig_inline void ig_set_ipv4(struct ig_address *address, __u32 word)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = IG_MAPPED;
	address->word[3] = word;
}

/* A macro, because the verifier rejects pointers to context fields. */
#define ig_set_ipv6(address, words)              \
	do {                                     \
		(address)->word[0] = (words)[0]; \
		(address)->word[1] = (words)[1]; \
		(address)->word[2] = (words)[2]; \
		(address)->word[3] = (words)[3]; \
	} while (0)

/* abi.py: host_bit(). Any hash will do: a collision costs one lookup in the trie, and never a wrong answer. */
ig_inline __u32 ig_host_bit(const struct ig_address *address)
{
	__u32 hash = address->word[0] * 0x9e3779b1u + address->word[1] * 0x85ebca77u + address->word[2] * 0xc2b2ae3du +
		     address->word[3] * 0x27d4eb2fu;

	hash ^= hash >> 15;
	hash *= 0x2c1b3c6du;
	return hash >> (32 - IG_HOST_BITS_LOG2);
}

/*
 * False: the address is not locked. True: it may be. Nearly every connect of the machine ends here, after two bits
 * and without a hash lookup. Where an unspecified address leads is seen later (ig_resolve_unspecified()).
 */
ig_inline bool ig_may_be_locked(__u32 generation, const struct ig_address *address)
{
	const struct ig_address_bitmap *bitmap = ig_map_lookup_elem(IG_MAP(IG_MAP_ADDRESS_BITMAP), &generation);
	__u32 host = ig_host_bit(address);
	__u32 network, bits;

	if (!bitmap || ig_is_unspecified(address))
		return true;
	bits = bitmap->hosts[(host >> 5) & (IG_HOST_WORDS - 1)] >> (host & 31);
	if (ig_is_ipv4(address)) {
		network = ig_be32(address->word[3]) >> 16;
		bits |= bitmap->networks4[(network >> 5) & (IG_NETWORK_WORDS - 1)] >> (network & 31);
	} else {
		network = ig_be32(address->word[0]) >> 16;
		bits |= bitmap->networks6[(network >> 5) & (IG_NETWORK_WORDS - 1)] >> (network & 31);
	}
	return bits & 1;
}

#endif
