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

#endif
