// SPDX-License-Identifier: Apache-2.0
/* Hashes; and tries, as a hash of the prefixes of each length. */
#include "maps.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TRIE_HEAD 4 /* struct bpf_lpm_trie_key: prefixlen, then the data */

static bool is_trie(const struct map *map)
{
	return map->kind->type == BPF_MAP_TYPE_LPM_TRIE;
}

/* The part of a key that counts: all of it, or a prefix with zeros after it. */
static void normal_key(const struct map *map, const u8 *key, u32 length, u8 *normal)
{
	u32 data = map->key_size - TRIE_HEAD;

	memcpy(normal, key, map->key_size);
	if (!is_trie(map))
		return;
	memcpy(normal, &length, TRIE_HEAD);
	normal += TRIE_HEAD;
	if (length % 8)
		normal[length / 8] &= (u8)(0xff << (8 - length % 8));
	if ((length + 7) / 8 < data)
		memset(normal + (length + 7) / 8, 0, data - (length + 7) / 8);
}

static u32 prefix_length(const struct map *map, const u8 *key)
{
	return is_trie(map) ? (u32)read_little(key, TRIE_HEAD) : 0;
}

static bool key_is_valid(const struct map *map, const u8 *key)
{
	return !is_trie(map) || prefix_length(map, key) <= (map->key_size - TRIE_HEAD) * 8;
}

static u32 bucket_of(const struct map *map, const u8 *normal)
{
	u32 hash = 2166136261u, n; /* FNV-1a */

	for (n = 0; n < map->key_size; n++)
		hash = (hash ^ normal[n]) * 16777619u;
	return (hash ^ hash >> 15) % BUCKETS;
}

/* The pointer that points, or would point, to the element with a normal key. */
static struct element **place_of(const struct map *map, const u8 *normal)
{
	struct element **place;
	u8 other[MAX_KEY];

	for (place = &map->buckets[bucket_of(map, normal)]; *place; place = &(*place)->next) {
		normal_key(map, (*place)->key, prefix_length(map, (*place)->key), other);
		if (!memcmp(other, normal, map->key_size))
			break;
	}
	return place;
}

u8 *hash_find(struct machine *m, struct map *map, const u8 *key)
{
	struct element *found = *place_of(map, key);

	(void)m;
	return found ? found->value : NULL;
}

/* The longest prefix of the key, as long as the key's own at most. */
u8 *trie_find(struct machine *m, struct map *map, const u8 *key)
{
	s32 length = (s32)prefix_length(map, key);
	u8 normal[MAX_KEY];

	(void)m;
	if (!key_is_valid(map, key))
		return NULL;
	for (; length >= 0; length--) {
		struct element *found;

		if (!map->lengths[length])
			continue;
		normal_key(map, key, (u32)length, normal);
		found = *place_of(map, normal);
		if (found)
			return found->value;
	}
	return NULL;
}

static struct element *new_element(struct machine *m, struct map *map)
{
	struct element *element = map->freed;

	if (element) {
		journal_bytes(m, &map->freed, sizeof(map->freed));
		map->freed = element->next;
		journal_bytes(m, element, sizeof(*element));
		journal_bytes(m, element->value, map->value_size);
		return element;
	}
	element = memory_new(&m->map_memory, sizeof(*element), 0);
	element->value = memory_new(&m->map_memory, map->value_size, MAY_READ | MAY_WRITE);
	return element;
}

static void count_elements(struct machine *m, struct map *map, const u8 *key, int change)
{
	u32 *length = &map->lengths[prefix_length(map, key)];

	journal_bytes(m, &map->count, sizeof(map->count));
	journal_bytes(m, length, sizeof(*length));
	map->count += (u32)change;
	*length += (u32)change;
}

/* .reuse: the next element that is made takes this one's memory. */
static void unlink_element(struct machine *m, struct map *map, struct element **place, bool reuse)
{
	struct element *element = *place;

	count_elements(m, map, element->key, -1);
	journal_bytes(m, place, sizeof(*place));
	*place = element->next;
	if (!reuse)
		return;
	journal_bytes(m, &element->next, sizeof(element->next));
	journal_bytes(m, &map->freed, sizeof(map->freed));
	element->next = map->freed;
	map->freed = element;
}

int hash_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags)
{
	struct element **place, *old, *element;
	u8 normal[MAX_KEY];

	if (!key_is_valid(map, key))
		return -EINVAL;
	normal_key(map, key, prefix_length(map, key), normal);
	place = place_of(map, normal);
	old = *place;
	if (flags > BPF_EXIST || (old && flags == BPF_NOEXIST))
		return old ? -EEXIST : -EINVAL;
	if (!old && flags == BPF_EXIST)
		return -ENOENT;
	if (!old && map->count >= map->max_entries)
		return is_trie(map) ? -ENOSPC : -E2BIG;
	element = new_element(m, map);
	memcpy(element->key, key, map->key_size);
	memcpy(element->value, value, map->value_size);
	if (old)
		unlink_element(m, map, place, m->reuse_freed);
	place = &map->buckets[bucket_of(map, normal)];
	if (bucket_of(map, normal) < map->low)
		map->low = bucket_of(map, normal);
	if (bucket_of(map, normal) > map->high)
		map->high = bucket_of(map, normal);
	element->next = *place;
	journal_bytes(m, place, sizeof(*place));
	*place = element;
	count_elements(m, map, key, 1);
	return 0;
}

int hash_remove(struct machine *m, struct map *map, const u8 *key)
{
	struct element **place;
	u8 normal[MAX_KEY];

	if (!key_is_valid(map, key))
		return -EINVAL;
	normal_key(map, key, prefix_length(map, key), normal);
	place = place_of(map, normal);
	if (!*place)
		return -ENOENT;
	unlink_element(m, map, place, m->reuse_freed);
	return 0;
}

/* --- all elements --------------------------------------------------------------------------------------------------- */

static void no_elements(struct map *map)
{
	map->low = BUCKETS;
	map->high = 0;
}

/* A new map, or one whose elements are forgotten together with the memory of all maps. */
void hash_reset(struct map *map)
{
	if (!map->buckets)
		map->buckets = malloc(BUCKETS * sizeof(*map->buckets));
	memset(map->buckets, 0, BUCKETS * sizeof(*map->buckets));
	memset(map->lengths, 0, sizeof(map->lengths));
	map->count = 0;
	map->freed = NULL;
	no_elements(map);
}

/* Removes every element. Only between two runs: their memory is used again. */
void hash_clear(struct machine *m, struct map *map)
{
	u32 n;

	for (n = map->low; n <= map->high; n++)
		while (map->buckets[n])
			unlink_element(m, map, &map->buckets[n], true);
	if (!m->journal.on)
		no_elements(map);
}
