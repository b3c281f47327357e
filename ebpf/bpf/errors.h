/* ICMP errors follow the flow that they tell of. */
#ifndef ERRORS_H
#define ERRORS_H

#include "clients.h"
#include "flows.h"
#include "interfaces.h"
#include "kernel.h"
#include "packet.h"
#include "records.h"
#include "translate.h"

/* A router, or the client, on what a container has sent. */
static OWN_FRAME int error_to_container(struct __sk_buff *skb, const struct packet *error)
{
	struct cause cause = {};
	struct service_key key = {};
	struct flow_key flow_key = {};
	struct service *service;
	struct flow *flow;
	struct exchange exchange = {};
	__u32 link;

	if (read_cause(skb, error, &cause) || !same(&cause.source, &error->destination))
		return NEXT;
	key.port = cause.source_port;
	key.protocol = cause.protocol;
	service = published(&key, &cause.source);
	if (!service)
		return NEXT;
	name_flow(&flow_key, cause.protocol, &service->target, service->target_port,
		  &cause.destination, cause.destination_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (!flow || (flow->flags & FLOW_LOCAL) || flow->life != service->life ||
	    flow->host_port != key.port || !same(&flow->host, &cause.source))
		return NEXT;
	exchange.address = service->target;
	exchange.old_port = cause.source_port;
	exchange.port = service->target_port;
	link = service->link_index;
	if (translate_error(skb, error, 0, &exchange))
		return DROP;
	return deliver(skb, link);
}

/* A container on what a client has sent. */
static OWN_FRAME int error_to_client(struct __sk_buff *skb, const struct packet *error)
{
	struct cause cause = {};
	struct flow_key flow_key = {};
	struct flow *flow;
	struct exchange exchange = {};
	__u32 uplink;

	if (read_cause(skb, error, &cause) || !same(&cause.destination, &error->source))
		return NEXT;
	name_flow(&flow_key, cause.protocol, &cause.destination, cause.destination_port,
		  &cause.source, cause.source_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (!flow || (flow->flags & FLOW_LOCAL) || flow->link_index != skb->ifindex)
		return NEXT;
	exchange.address = flow->host;
	exchange.old_port = cause.destination_port;
	exchange.port = flow->host_port;
	uplink = flow->uplink;
	if (translate_error(skb, error, 1, &exchange))
		return DROP;
	return bpf_redirect_neigh(uplink, 0, 0, 0);
}

#endif
