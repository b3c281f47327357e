/* What veths have counted, as drivers/net/veth.c (veth_get_stats64) and net/core/dev.c (dev_get_stats)
 * add it up, but without the kernel's interface lock.
 *
 * A link is found by its index in the namespace's table of devices and believed for as long as something in
 * that table leads to it: such a device is not freed while a reader of RCU, which this is, can be on it, nor
 * is its peer, for the driver takes both out of the table before it waits for readers.
 */
#ifndef LINK_STATS_H
#define LINK_STATS_H

#include "reading.h"
#include "cgroup_records.h"
#include "link_records.h"

/* net/core/dev.h: NETDEV_HASHENTRIES. Were it another, no link would be found. */
#define DEVICE_LISTS 256
/* Longest such list that is looked through. */
#define MOST_DEVICES_LISTED 4096
/* Most receive queues of a link; the rest of it is not read. */
#define MOST_QUEUES 4096

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct u64_stats {
	__u64 v;
};

struct pcpu_lstats {
	struct u64_stats packets;
	struct u64_stats bytes;
};

struct pcpu_sw_netstats {
	struct u64_stats rx_packets;
	struct u64_stats rx_bytes;
	struct u64_stats tx_packets;
	struct u64_stats tx_bytes;
};

struct net_device_core_stats {
	unsigned long rx_dropped;
	unsigned long tx_dropped;
};

struct rtnl_link_ops {
	const char *kind;
};

struct net {
	struct hlist_head *dev_index_head;
};

struct namespace_pointer {
	struct net *net;
};

struct link_node {
	struct link_node *next, **pprev;
};

struct net_device {
	struct pcpu_sw_netstats *tstats;
	__s32 ifindex;
	__u32 num_rx_queues;
	struct namespace_pointer nd_net;
	struct hlist_node index_hlist;
	struct net_device_core_stats *core_stats;
	struct rtnl_link_ops *rtnl_link_ops;
};

struct nsproxy {
	struct net *net_ns;
};

struct task_struct {
	struct nsproxy *nsproxy;
};

#pragma clang attribute pop

enum netdev_stat_type {
	NETDEV_PCPU_STAT_LSTATS = 1,
	NETDEV_PCPU_STAT_TSTATS = 2,
};

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct link_target);
} link_targets SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct link_record);
} link_records SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct link_layout);
} link_layout SEC(".maps");

/* Kernels without such kinds have no place for one either. */
#define KIND(name)                                                                       \
	(__builtin_preserve_enum_value(*(enum netdev_stat_type *)name, ENUM_EXISTS) ?    \
		 __builtin_preserve_enum_value(*(enum netdev_stat_type *)name, ENUM_VALUE) : \
		 ~0ULL)

/* Set by the loader: 0 leaves links out, for kernels that refuse the program with them. */
const volatile __u32 reads_links = 1;

static __u64 (*const current_task)(void) = (void *)35;

#define HAS(type, field) __builtin_preserve_field_info(((struct type *)0)->field, FIELD_EXISTS)
#define KNOWS_LINKS                                                                            \
	(HAS(net_device, tstats) && HAS(net_device, ifindex) && HAS(net_device, num_rx_queues) && \
	 HAS(net_device, nd_net.net) && HAS(net_device, index_hlist) &&                         \
	 HAS(net_device, core_stats) && HAS(net_device, rtnl_link_ops) &&                       \
	 HAS(net_device_core_stats, rx_dropped) && HAS(net_device_core_stats, tx_dropped) &&    \
	 HAS(pcpu_sw_netstats, tx_packets) && HAS(pcpu_lstats, packets) &&                      \
	 HAS(rtnl_link_ops, kind) && HAS(net, dev_index_head) && HAS(hlist_node, next) &&       \
	 HAS(nsproxy, net_ns) && HAS(task_struct, nsproxy))

/* linux/list.h: `pprev` follows `next`. */
#define PREVIOUS 8

static ALWAYS_INLINE void begin_links(void)
{
	struct nsproxy *proxy = 0;
	struct net *net = 0;
	struct link_layout *layout;
	const int plain = 0;
	__u32 zero = 0;

	layout = map_lookup(&link_layout, &zero);
	if (!layout || !KNOWS_LINKS)
		return;
	READ(proxy, ((struct task_struct *)current_task())->nsproxy);
	if (proxy)
		READ(net, proxy->net_ns);
	layout->namespace = (__u64)net;
}

struct link_search {
	__u64 next;
	__u64 device;
	__u32 index;
};

static long look_at_device(__u32 number, void *context)
{
	struct link_search *search = context;
	struct hlist_node *node = (void *)search->next;
	struct net_device *device;
	__u32 index = 0;
	const int plain = 0;

	(void)number;
	if (!node)
		return 1;
	device = (void *)((char *)node - PLACE(net_device, index_hlist));
	READ(index, device->ifindex);
	if (index == search->index) {
		search->device = (__u64)device;
		return 1;
	}
	READ(node, node->next);
	search->next = (__u64)node;
	return 0;
}

static ALWAYS_INLINE int is_veth(struct net_device *device)
{
	struct rtnl_link_ops *operations = 0;
	char *kind = 0, name[8] = {};
	const int plain = 0;

	READ(operations, device->rtnl_link_ops);
	if (!operations)
		return 0;
	READ(kind, operations->kind);
	read_kernel(name, 5, kind);
	return name[0] == 'v' && name[1] == 'e' && name[2] == 't' && name[3] == 'h' && !name[4];
}

static ALWAYS_INLINE int find_link(struct link_target *target, struct link_record *record,
				   struct link_layout *layout)
{
	struct link_search search = { .index = target->index };
	struct net_device *device, *peer = 0, *back = 0;
	struct hlist_head *heads = 0;
	struct hlist_node *first = 0;
	struct net *net = (void *)layout->namespace;
	__u64 sent_only = layout->sent_only;
	__u8 kind = 0;
	const int plain = 0;

	target->device = 0;
	READ(heads, net->dev_index_head);
	heads = (void *)((char *)heads + 8 * (target->index % DEVICE_LISTS));
	READ(first, heads->first);
	search.next = (__u64)first;
	loop(MOST_DEVICES_LISTED, look_at_device, &search, 0);
	device = (void *)search.device;
	/* A list that is longer than is looked through has a rest. */
	record->absent = !device && !search.next;
	if (!device || !is_veth(device))
		return -1;
	if (layout->kind) {
		read_kernel(&kind, 1, (char *)device + layout->kind);
		if (kind == KIND(NETDEV_PCPU_STAT_TSTATS))
			sent_only = 0;
		else if (kind == KIND(NETDEV_PCPU_STAT_LSTATS))
			sent_only = 1;
		else
			return -1;
	}
	read_kernel(&peer, sizeof(peer), (char *)device + layout->peer);
	if (!peer)
		return -1;
	read_kernel(&back, sizeof(back), (char *)peer + layout->peer);
	if (back != device)
		return -1;
	target->peer = (__u64)peer;
	READ(target->counts, device->tstats);
	READ(target->peer_counts, peer->tstats);
	READ(target->queues_number, device->num_rx_queues);
	READ(target->peer_queues_number, peer->num_rx_queues);
	read_kernel(&target->queues, 8, (char *)device + layout->queues);
	read_kernel(&target->peer_queues, 8, (char *)peer + layout->queues);
	if (!target->counts || !target->peer_counts || !target->queues || !target->peer_queues ||
	    target->queues_number > MOST_QUEUES || target->peer_queues_number > MOST_QUEUES)
		return -1;
	target->finds = ((target->finds + 1) & ~FLAGS) | QUEUES_MOVE | (sent_only ? SENT_ONLY : 0);
	target->device = (__u64)device;
	return 0;
}

struct queue_walk {
	__u64 queue;
	__u64 packets;
	__u64 bytes;
	__u64 drops;
	__u64 send_errors;
	__u64 peer_errors;
};

static ALWAYS_INLINE long add_queue(struct queue_walk *sums, const int plain)
{
	struct link_layout *layout;
	__u32 zero = 0;
	char *queue = (void *)sums->queue;

	layout = map_lookup(&link_layout, &zero);
	if (!layout)
		return 1;
	sums->packets += read_u64(queue + layout->queue_packets, plain);
	sums->bytes += read_u64(queue + layout->queue_bytes, plain);
	sums->drops += read_u64(queue + layout->queue_drops, plain);
	sums->send_errors += read_u64(queue + layout->queue_send_errors, plain);
	sums->peer_errors += read_u64(queue + layout->queue_peer_errors, plain);
	sums->queue += layout->queue_size;
	return 0;
}

static long add_queue_by_helper(__u32 number, void *sums)
{
	(void)number;
	return add_queue(sums, 0);
}

static long add_queue_plainly(__u32 number, void *sums)
{
	(void)number;
	return add_queue(sums, 1);
}

/* Queues count only while they are polled: all of an end are, or none is. As there may be one for each CPU,
 * they are looked at when they may have counted, now and then, and when what is read is compared: they may have
 * been polled between two passes. */
static ALWAYS_INLINE void read_queues(struct link_target *target, struct link_layout *layout,
				      __u64 needed, const int plain)
{
	struct queue_walk own = { .queue = target->queues }, other = { .queue = target->peer_queues };
	__u64 polled = read_u64((char *)target->queues + layout->queue_napi, plain) |
		       read_u64((char *)target->peer_queues + layout->queue_napi, plain);

	if (!polled && !(target->finds & QUEUES_MOVE) && !needed)
		return;
	loop(target->queues_number, plain ? (void *)add_queue_plainly : (void *)add_queue_by_helper, &own, 0);
	loop(target->peer_queues_number, plain ? (void *)add_queue_plainly : (void *)add_queue_by_helper, &other, 0);
	target->queue_sums[0] = own.packets;
	target->queue_sums[1] = other.packets;
	target->queue_sums[2] = own.bytes;
	target->queue_sums[3] = other.bytes;
	target->queue_sums[4] = own.drops + own.peer_errors + other.send_errors;
	target->queue_sums[5] = own.send_errors + other.peer_errors;
	target->finds = (target->finds & ~(QUEUES_MOVE | QUEUES_COUNT)) | (polled ? QUEUES_MOVE : 0) |
			(own.packets | other.packets | own.drops | own.peer_errors | other.send_errors |
					 own.send_errors | other.peer_errors ?
				 QUEUES_COUNT :
				 0);
}

/* Whether it is still the device it was. Another one may have its memory, index and peer. What it counts in
 * must be where it was then, for that is all that is used of it. Nothing is followed that does not fit. */
static ALWAYS_INLINE int is_listed(struct net_device *device, struct link_target *target,
				   struct link_layout *layout, const int plain)
{
	struct net_device *peer = (void *)target->peer;
	__u64 net = 0, counts = 0, peer_counts = 0;
	__u32 index = 0;
	char *node;

	if (!device)
		return 0;
	READ(index, device->ifindex);
	READ(net, device->nd_net.net);
	if (index != target->index || net != layout->namespace ||
	    read_u64((char *)device + layout->peer, plain) != target->peer)
		return 0;
	READ(counts, device->tstats);
	READ(peer_counts, peer->tstats);
	if (counts != target->counts || peer_counts != target->peer_counts ||
	    read_u64((char *)device + layout->queues, plain) != target->queues ||
	    read_u64((char *)peer + layout->queues, plain) != target->peer_queues)
		return 0;
	node = (char *)__builtin_preserve_access_index(&device->index_hlist);
	return read_u64((char *)read_u64(node + PREVIOUS, plain), plain) == (__u64)node;
}

static ALWAYS_INLINE int read_link(__u32 place, const int plain)
{
	struct link_target *target = map_lookup(&link_targets, &place);
	struct link_record *record = map_lookup(&link_records, &place);
	struct net_device_core_stats *dropped = 0;
	struct net_device *device;
	struct link_layout *layout;
	struct cgroup_walk *order;
	__u64 packets = 0, bytes = 0, rx_packets = 0, rx_bytes = 0, rx_dropped = 0, tx_dropped = 0;
	__u32 zero = 0;

	layout = map_lookup(&link_layout, &zero);
	order = map_lookup(&walk, &zero);
	if (!target || !record || !layout || !order)
		return 1;
	record->filled = 0;
	record->absent = 0;
	if (!target->index || !layout->known || !layout->namespace || !offsets_known || !KNOWS_LINKS)
		return 0;
	device = (void *)target->device;
	if (!is_listed(device, target, layout, plain)) {
		if (find_link(target, record, layout))
			return 0;
		device = (void *)target->device;
	}
	READ(dropped, device->core_stats);
	tx_dropped = read_u64((char *)device + layout->dropped, plain);
	if (target->finds & SENT_ONLY) {
		for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
			struct pcpu_lstats *own = (void *)(target->counts + cpu_offset[cpu]);
			struct pcpu_lstats *other = (void *)(target->peer_counts + cpu_offset[cpu]);

			packets += read_u64(__builtin_preserve_access_index(&own->packets), plain);
			bytes += read_u64(__builtin_preserve_access_index(&own->bytes), plain);
			rx_packets += read_u64(__builtin_preserve_access_index(&other->packets), plain);
			rx_bytes += read_u64(__builtin_preserve_access_index(&other->bytes), plain);
		}
	} else {
		for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
			struct pcpu_sw_netstats *own = (void *)(target->counts + cpu_offset[cpu]);
			struct pcpu_sw_netstats *other = (void *)(target->peer_counts + cpu_offset[cpu]);

			packets += read_u64(__builtin_preserve_access_index(&own->tx_packets), plain);
			bytes += read_u64(__builtin_preserve_access_index(&own->tx_bytes), plain);
			rx_packets += read_u64(__builtin_preserve_access_index(&own->rx_packets), plain) +
				      read_u64(__builtin_preserve_access_index(&other->tx_packets), plain);
			rx_bytes += read_u64(__builtin_preserve_access_index(&own->rx_bytes), plain) +
				    read_u64(__builtin_preserve_access_index(&other->tx_bytes), plain);
		}
	}
	if (dropped)
		for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
			struct net_device_core_stats *own = (void *)((char *)dropped + cpu_offset[cpu]);

			rx_dropped += read_u64(__builtin_preserve_access_index(&own->rx_dropped), plain);
			tx_dropped += read_u64(__builtin_preserve_access_index(&own->tx_dropped), plain);
		}
	read_queues(target, layout,
		    order->links_compared || (order->passes + place) % LOOK_AGAIN == 0, plain);
	if (target->finds & QUEUES_COUNT) {
		rx_packets += target->queue_sums[0];
		packets += target->queue_sums[1];
		rx_bytes += target->queue_sums[2];
		bytes += target->queue_sums[3];
		rx_dropped += target->queue_sums[4];
		tx_dropped += target->queue_sums[5];
	}
	record->rx_packets = rx_packets;
	record->tx_packets = packets;
	record->rx_bytes = rx_bytes;
	record->tx_bytes = bytes;
	record->rx_dropped = rx_dropped;
	record->tx_dropped = tx_dropped;
	record->filled = target->finds & ~FLAGS;
	return 0;
}

static long read_link_by_helper(__u32 place, void *unused)
{
	(void)unused;
	return read_link(place, 0);
}

static long read_link_plainly(__u32 place, void *unused)
{
	(void)unused;
	return read_link(place, 1);
}

#endif
