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

/* Sockets of this host that lead to containers, by cookie. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 65536);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, struct led_socket);
} led_sockets SEC(".maps");

/* Peers of datagram sockets that were led. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 65536);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct led_peer_key);
	MAP_TYPE(value, struct led_peer);
} led_peers SEC(".maps");

#endif
