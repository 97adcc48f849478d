// SPDX-License-Identifier: Apache-2.0
/*
 * Maps. A kind of map is one row of KINDS at the end. What a program has found stays readable after it was removed, as
 * in the kernel until the end of a grace period.
 */
#include "machine.h"
#include "interface.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct map_kind {
	u32 type; /* BPF_MAP_TYPE_* */
	u8 *(*find)(struct machine *m, struct map *map, const u8 *key);
	int (*update)(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags);
	int (*remove)(struct machine *m, struct map *map, const u8 *key);
};

/* --- arrays ------------------------------------------------------------------------------------------------------- */

static u8 *array_find(struct machine *m, struct map *map, const u8 *key)
{
	u32 index = (u32)read_little(key, 4);

	(void)m;
	return index < map->max_entries ? map->array + (u64)index * map->value_size : NULL;
}

/* In place, as the kernel does it: a program that is running may see half of it. */
static int array_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags)
{
	u8 *at = array_find(m, map, key);

	if (!at)
		return -E2BIG;
	if (flags == BPF_NOEXIST)
		return -EEXIST;
	journal_bytes(m, at, map->value_size);
	memcpy(at, value, map->value_size);
	return 0;
}

static int array_remove(struct machine *m, struct map *map, const u8 *key)
{
	(void)m, (void)map, (void)key;
	return -EINVAL;
}

/* --- hashes, and tries as hashes of the prefixes of each length ----------------------------------------------------- */

#define TRIE_HEAD 4 /* struct bpf_lpm_trie_key: prefixlen, then the data */

static bool is_trie(const struct map *map);

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

static u8 *hash_find(struct machine *m, struct map *map, const u8 *key)
{
	struct element *found = *place_of(map, key);

	(void)m;
	return found ? found->value : NULL;
}

/* The longest prefix of the key, as long as the key's own at most. */
static u8 *trie_find(struct machine *m, struct map *map, const u8 *key)
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

static int hash_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags)
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

static int hash_remove(struct machine *m, struct map *map, const u8 *key)
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

/* --- maps that no key leads into: socket storage, ring buffers ------------------------------------------------------ */

static u8 *no_find(struct machine *m, struct map *map, const u8 *key)
{
	(void)m, (void)map, (void)key;
	return NULL;
}

static int no_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags)
{
	(void)m, (void)map, (void)key, (void)value, (void)flags;
	return -EINVAL;
}

static int no_remove(struct machine *m, struct map *map, const u8 *key)
{
	return no_update(m, map, key, NULL, 0);
}

/* --- all maps ------------------------------------------------------------------------------------------------------- */

static const struct map_kind KINDS[] = {
	{ BPF_MAP_TYPE_ARRAY, array_find, array_update, array_remove },
	{ BPF_MAP_TYPE_PERCPU_ARRAY, array_find, array_update, array_remove }, /* of the one CPU that there is */
	{ BPF_MAP_TYPE_HASH, hash_find, hash_update, hash_remove },
	{ BPF_MAP_TYPE_LPM_TRIE, trie_find, hash_update, hash_remove },
	{ BPF_MAP_TYPE_SK_STORAGE, no_find, no_update, no_remove },
	{ BPF_MAP_TYPE_RINGBUF, no_find, no_update, no_remove },
};

static bool is_trie(const struct map *map)
{
	return map->kind->type == BPF_MAP_TYPE_LPM_TRIE;
}

bool map_is_array(const struct map *map)
{
	return map->kind->type == BPF_MAP_TYPE_ARRAY || map->kind->type == BPF_MAP_TYPE_PERCPU_ARRAY;
}

bool map_is_storage(const struct map *map)
{
	return map->kind->type == BPF_MAP_TYPE_SK_STORAGE;
}

bool map_is_ring(const struct map *map)
{
	return map->kind->type == BPF_MAP_TYPE_RINGBUF;
}

struct map *map_of(struct machine *m, u64 handle)
{
	u64 number = handle - MAP_HANDLE;

	return number < MAPS && m->maps[number].kind ? &m->maps[number] : NULL;
}

u8 *map_find(struct machine *m, struct map *map, const u8 *key)
{
	return map->kind->find(m, map, key);
}

int map_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags)
{
	return map->kind->update(m, map, key, value, flags);
}

int map_remove(struct machine *m, struct map *map, const u8 *key)
{
	return map->kind->remove(m, map, key);
}

static void no_elements(struct map *map)
{
	map->low = BUCKETS;
	map->high = 0;
}

/* Removes every element of a hash or a trie, and sets every byte of an array to zero. Only between two runs. */
void map_clear(struct machine *m, struct map *map)
{
	u32 n;

	if (map->array) {
		journal_bytes(m, map->array, map->value_size * map->max_entries);
		memset(map->array, 0, (u64)map->value_size * map->max_entries);
	}
	for (n = map->low; map->buckets && n <= map->high; n++)
		while (map->buckets[n])
			unlink_element(m, map, &map->buckets[n], true);
	if (!m->journal.on)
		no_elements(map);
}

/* --- for user space: interface.h ------------------------------------------------------------------------------------ */

/* 0, or -EINVAL for a type that no row of KINDS has, and for a key that is too long. */
int vm_map_define(struct machine *m, u32 number, u32 type, u32 key_size, u32 value_size, u32 max_entries)
{
	struct map *map = &m->maps[number];
	u32 n;

	for (n = 0; n < sizeof(KINDS) / sizeof(KINDS[0]); n++) {
		if (KINDS[n].type != type)
			continue;
		if (number >= MAPS || key_size > MAX_KEY)
			return -EINVAL;
		*map = (struct map){
			.kind = &KINDS[n], .key_size = key_size, .value_size = value_size, .max_entries = max_entries
		};
		return 0;
	}
	return -EINVAL;
}

/* How many elements a map may have from now on. */
void vm_map_limit(struct machine *m, u32 number, u32 max_entries)
{
	m->maps[number].max_entries = max_entries;
}

/* Empties all maps. */
void vm_maps_reset(struct machine *m)
{
	u32 n;

	memory_cut(&m->map_memory, 0);
	for (n = 0; n < MAPS; n++) {
		struct map *map = &m->maps[n];

		if (!map->kind)
			continue;
		map->count = 0;
		map->freed = NULL;
		memset(map->lengths, 0, sizeof(map->lengths));
		if (map_is_array(map)) {
			map->array = memory_new(&m->map_memory, (u64)map->value_size * map->max_entries,
						MAY_READ | MAY_WRITE);
		} else if (!map_is_storage(map) && !map_is_ring(map)) {
			if (!map->buckets)
				map->buckets = malloc(BUCKETS * sizeof(*map->buckets));
			memset(map->buckets, 0, BUCKETS * sizeof(*map->buckets));
			no_elements(map);
		}
	}
}

int vm_map_update(struct machine *m, u32 number, const u8 *key, const u8 *value, u64 flags)
{
	return map_update(m, &m->maps[number], key, value, flags);
}

int vm_map_delete(struct machine *m, u32 number, const u8 *key)
{
	return map_remove(m, &m->maps[number], key);
}

int vm_map_lookup(struct machine *m, u32 number, const u8 *key, u8 *value)
{
	u8 *found = map_find(m, &m->maps[number], key);

	if (!found)
		return -ENOENT;
	memcpy(value, found, m->maps[number].value_size);
	return 0;
}

u32 vm_map_count(struct machine *m, u32 number)
{
	return m->maps[number].count;
}

/* All elements of a hash or a trie: keys and values one after the other. There must be room for vm_map_count(). */
void vm_map_items(struct machine *m, u32 number, u8 *keys, u8 *values)
{
	struct map *map = &m->maps[number];
	const struct element *element;
	u32 n;

	for (n = map->low; map->buckets && n <= map->high; n++) {
		for (element = map->buckets[n]; element; element = element->next) {
			memcpy(keys, element->key, map->key_size);
			memcpy(values, element->value, map->value_size);
			keys += map->key_size;
			values += map->value_size;
		}
	}
}

void vm_map_clear(struct machine *m, u32 number)
{
	map_clear(m, &m->maps[number]);
}

/*
 * Whether the memory of an element that was removed is used again at once. Hashes do that since Linux fba1a1c6c912
 * ("bpf: Convert hash map to bpf_mem_alloc.") (in v6.1): a program that still has the element sees another one's value.
 */
void vm_reuse_freed(struct machine *m, bool reuse)
{
	m->reuse_freed = reuse;
}
