// SPDX-License-Identifier: Apache-2.0
/*
 * Maps. A kind of map is one row of KINDS. What a program has found stays readable after it was removed, as
 * in the kernel until the end of a grace period.
 */
#include "maps.h"
#include "interface.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

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

/* Removes every element of a hash or a trie, and sets every byte of an array to zero. Only between two runs. */
void map_clear(struct machine *m, struct map *map)
{
	if (map->array) {
		journal_bytes(m, map->array, map->value_size * map->max_entries);
		memset(map->array, 0, (u64)map->value_size * map->max_entries);
	}
	if (map->buckets)
		hash_clear(m, map);
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
		if (map_is_array(map))
			map->array = memory_new(&m->map_memory, (u64)map->value_size * map->max_entries,
						MAY_READ | MAY_WRITE);
		else if (!map_is_storage(map) && !map_is_ring(map))
			hash_reset(map);
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
