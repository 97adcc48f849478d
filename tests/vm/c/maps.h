/* SPDX-License-Identifier: Apache-2.0 */
/* What the kinds of maps share. */
#ifndef MAPS_H
#define MAPS_H

#include "machine.h"

struct map_kind {
	u32 type; /* BPF_MAP_TYPE_* */
	u8 *(*find)(struct machine *m, struct map *map, const u8 *key);
	int (*update)(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags);
	int (*remove)(struct machine *m, struct map *map, const u8 *key);
};

/* map_hash.c: hashes, and tries */
u8 *hash_find(struct machine *m, struct map *map, const u8 *key);
u8 *trie_find(struct machine *m, struct map *map, const u8 *key);
int hash_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags);
int hash_remove(struct machine *m, struct map *map, const u8 *key);
void hash_reset(struct map *map);
void hash_clear(struct machine *m, struct map *map);

#endif
