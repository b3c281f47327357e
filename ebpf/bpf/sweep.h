/* One look at all flows: removes those that are over, and counts the others. */
#ifndef SWEEP_H
#define SWEEP_H

#include "flows.h"
#include "interfaces.h"
#include "kernel.h"
#include "maps.h"
#include "policy.h"
#include "records.h"

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct sweep_order);
} orders SEC(".maps");

struct sweep_context {
	__u64 now;
	struct sweep_order order;
};

static ALWAYS_INLINE struct port_flows *counted(const struct service_key *key, __u32 pass)
{
	struct port_flows *count = bpf_map_lookup_elem(&active, key);

	if (count && count->pass != pass) {
		count->pass = pass;
		count->counted = 0;
	}
	return count;
}

/* Whether a flow has ended, is silent or has lost its row. */
static ALWAYS_INLINE int is_over(const struct service_key *key, const struct address *client,
				 struct flow *flow, const struct sweep_context *context)
{
	struct service *service = bpf_map_lookup_elem(&services, key);
	__u64 limit, age;
	int tcp = key->protocol == PROTOCOL_TCP;

	/* Clients of other hosts have lost it altogether, or this one has. */
	if (service && !(flow->flags & FLOW_LOCAL) &&
	    (!(service->flags & (SERVICE_REMOTE | SERVICE_REMOTE_OLD)) ||
	     !is_allowed(service, client)))
		return 1;
	if (!flow->seen_ns)
		flow->seen_ns = context->now;
	age = context->now > flow->seen_ns ? context->now - flow->seen_ns : 0;
	if (flow->flags & FLOW_ENDED)
		limit = context->order.ended_ns;
	else if (!tcp)
		limit = flow->flags & FLOW_ANSWERED ? context->order.datagram_idle_ns :
						      context->order.datagram_opening_ns;
	else if (!(flow->flags & (FLOW_ANSWERED | FLOW_REBUILT)) || (flow->flags & FLOW_HALF_OPEN))
		limit = context->order.opening_ns;
	/* The client may only listen, or be nobody. */
	else if (!(flow->flags & FLOW_ANSWERED) || (flow->flags & (FLOW_FIN_IN | FLOW_FIN_OUT)))
		limit = (__u64)context->order.closing_s * 1000000000ULL;
	else
		limit = context->order.idle_ns;
	return !service || service->life != flow->life || age > limit;
}

static long sweep_flow(void *map, const struct flow_key *at, struct flow *flow,
		       struct sweep_context *context)
{
	struct flow_key flow_key = *at;
	struct service_key key = {};
	struct port_flows *count;

	key.port = flow->host_port;
	key.protocol = flow_key.protocol;
	if (is_over(&key, &flow_key.client, flow, context)) {
		bpf_map_delete_elem(map, &flow_key);
		return 0;
	}
	if (flow->flags & (FLOW_ENDED | FLOW_LOCAL))
		return 0;
	/* Somebody may have changed it. */
	flow->mtu = mtu_of(flow->uplink);
	count = counted(&key, context->order.pass);
	if (count)
		count->counted++;
	return 0;
}

static long sweep_local(void *map, const __u32 *at, struct local_flow *local,
			struct sweep_context *context)
{
	struct service_key key = {};

	(void)map;
	(void)at;
	if (local->taken != LOCAL_THERE)
		return 0;
	key.port = local->flow.host_port;
	key.protocol = local->key.protocol;
	if (is_over(&key, &local->key.client, &local->flow, context))
		local->taken = 0;
	return 0;
}

static long sweep_port(void *map, const struct service_key *at, struct port_flows *count,
		       struct sweep_context *context)
{
	__s64 flows = count->pass == context->order.pass ? count->counted : 0;
	__s64 wrong = count->active - flows;

	(void)map;
	(void)at;
	/* Flows pushed out by newer ones, or by a race of two processors. */
	if (wrong)
		__sync_fetch_and_add(&count->active, -wrong);
	return 0;
}

#endif
