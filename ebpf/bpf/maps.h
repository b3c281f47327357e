/* The maps, each pinned by its name: every object that includes this works on the same ones. */
#ifndef MAPS_H
#define MAPS_H

#include "kernel.h"
#include "records.h"

struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct service);
} services SEC(".maps");

/* Addresses of this host, and those of the containers that services lead to. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct address);
	MAP_TYPE(value, __u32);
} addresses SEC(".maps");

struct {
	MAP_UINT(type, MAP_PERCPU_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct port_counters);
} counters SEC(".maps");

struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct port_flows);
} active SEC(".maps");

/* Sockets of this host that lead to containers, by cookie. An array and no hash: cookies are given
 * out one after the other, so sockets of the same time are neighbours here, and in the cache. */
struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, LED_SETS);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct led_set);
} led_sockets SEC(".maps");

/* Peers of datagram sockets that were led. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 65536);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct led_peer_key);
	MAP_TYPE(value, struct led_peer);
} led_peers SEC(".maps");

static ALWAYS_INLINE struct led_set *led_set_of(__u64 cookie)
{
	__u32 at = (cookie / LED_WAYS) % LED_SETS;

	return bpf_map_lookup_elem(&led_sockets, &at);
}

/* Where in its set a socket is; LED_WAYS when it was not led. */
static ALWAYS_INLINE __u32 led_way_of(const struct led_set *set, __u64 cookie)
{
	__u32 way;

#pragma unroll
	for (way = 0; way < LED_WAYS; way++) {
		if (set->cookie[way] == cookie)
			break;
	}
	return way;
}

static ALWAYS_INLINE struct led_socket *find_led(__u64 cookie)
{
	struct led_set *set = led_set_of(cookie);
	__u32 way;

	if (!set)
		return 0;
	way = led_way_of(set, cookie);
	return way < LED_WAYS ? &set->led[way] : 0;
}

/* Forgets where a socket was led. Two may do that at once: the one that frees the place counts. */
static ALWAYS_INLINE void forget(__u64 cookie)
{
	struct led_set *set = led_set_of(cookie);
	struct service_key key = {};
	struct service *service;
	struct port_flows *count;
	__u32 way, life;

	if (!set)
		return;
	way = led_way_of(set, cookie);
	if (way >= LED_WAYS)
		return;
	key.port = set->led[way].host_port;
	key.protocol = PROTOCOL_TCP;
	life = set->led[way].life;
	if (__sync_val_compare_and_swap(&set->cookie[way], cookie, 0) != cookie)
		return;
	service = bpf_map_lookup_elem(&services, &key);
	/* One that another route of the port has led is not among those that are counted now. */
	if (!service || service->life == life) {
		count = bpf_map_lookup_elem(&active, &key);
		if (count && count->local > 0)
			__sync_fetch_and_add(&count->local, -1);
	}
}

#endif
