/* The kernel path of service ports: address translation between an uplink and a container's veth.
 *
 * from_uplink    ingress of an uplink: a client's packet for a published port goes straight into
 *                the container, with its destination rewritten and its source as it is.
 * from_container ingress of the host side of a container's veth: the replies of such a flow leave
 *                by the uplink the client came by, with their source rewritten.
 * to_container   egress of the host side of a container's veth: nobody but this host talks to the
 *                ports of the kernel's runner, and the bytes of its clients are counted.
 * sweep          run by the dataplane: removes flows that have ended, are silent or have lost
 *                their row, and counts those that live.
 *
 * Whatever is not clearly ours goes on to the next program and then the stack, where the listener
 * of the relay waits: IP options, VLAN tags, other protocols, other addresses, clients outside the
 * row's networks or without a route back, ports at their limit. A TCP flow starts with a SYN. A later
 * segment without an entry belongs to a socket of this host if there is one, or to a connection that was
 * made from here by somebody whom the host masquerades, else its entry was lost and is made again from
 * the row. Fragments follow the first of their datagram, ICMP errors the flow that they tell of. A
 * container whose veth is gone gets nothing: the redirect drops. Answers to this host's own clients
 * bypass the bridge's code.
 */
#include "clients.h"
#include "errors.h"
#include "flows.h"
#include "fragments.h"
#include "interfaces.h"
#include "kernel.h"
#include "local.h"
#include "maps.h"
#include "packet.h"
#include "policy.h"
#include "records.h"
#include "runner.h"
#include "sweep.h"
#include "translate.h"

SEC("classifier")
int from_uplink(struct __sk_buff *skb)
{
	struct packet it = {};
	struct service_key key = {};
	struct flow_key flow_key = {};
	struct service *service;
	struct flow *flow;
	int tcp, opening, takes_new;

	/* Sent to another machine's hardware address, and seen here by chance. */
	if (skb->pkt_type != PACKET_HOST)
		return NEXT;
	if (read_packet(skb, &it))
		return NEXT;
	if (it.kind == PACKET_LATER)
		return follow_fragments(skb, &it, 0);
	if (it.kind == PACKET_ERROR)
		return error_to_container(skb, &it);
	tcp = it.protocol == PROTOCOL_TCP;
	key.port = it.destination_port;
	key.protocol = it.protocol;
	service = published(&key, &it.destination);
	if (!service)
		return tcp ? NEXT : forget_datagrams(&it);

	name_flow(&flow_key, it.protocol, &service->target, service->target_port,
		  &it.source, it.source_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	/* Nobody outside has an address of ours. */
	if (flow && (flow->flags & FLOW_LOCAL))
		return NEXT;
	if (flow && (flow->life != service->life || flow->host_port != it.destination_port ||
		     !same(&flow->host, &it.destination))) {
		/* The same client port leads to this container by another of its ports or addresses. */
		if (!(flow->flags & FLOW_ENDED) && flow->host_port != key.port)
			return NEXT;
		if (!(flow->flags & FLOW_ENDED) && flow->life == service->life)
			return NEXT;
		flow = 0;
	}

	opening = tcp ? (it.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN : !flow;
	if (opening && flow && (flow->flags & FLOW_ENDED)) {
		/* Whoever takes the new one: nothing of it may meet this entry. */
		bpf_map_delete_elem(&flows, &flow_key);
		flow = 0;
	}
	takes_new = (service->flags & (SERVICE_DRAINING | SERVICE_REMOTE)) == SERVICE_REMOTE;
	if (opening && flow && (flow->first_sequence == it.sequence || !takes_new ||
				(flow->uplink != skb->ifindex && !leads_back(skb, &it)))) {
		/* The SYN once more. Or the client has forgotten a flow that could not be begun now, or a
		 * stranger says so, perhaps from where the client can't be. The container knows: if it has
		 * the connection, its answer has the client end that; if it has not, its answer to another
		 * SYN than the flow's ends the flow and leads nowhere. The client's next SYN is the
		 * listener's. */
	} else if (opening || !flow) {
		struct port_flows *count;
		struct port_counters *counter;
		struct flow fresh = {};
		__u16 in_place = 0;

		if (!opening && (it.flags & TCP_SYN) && was_made_here(&it))
			return NEXT;
		if (!takes_new)
			return NEXT;
		if (!opening && (it.flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
			return NEXT;
		if (!is_allowed(service, &it.source))
			return NEXT;
		if (is_unanswerable(&it.source))
			return NEXT;
		/* Nobody outside has an address of ours, and containers belong to the listener. */
		if (bpf_map_lookup_elem(&addresses, &it.source))
			return NEXT;
		/* The stack knows by where an answer goes, and the listener's goes there. Nothing of the new
		 * connection may meet what is left of an old one. */
		if (!leads_back(skb, &it)) {
			if (flow) {
				end_flow(flow, &key);
				bpf_map_delete_elem(&flows, &flow_key);
			}
			return NEXT;
		}
		if (tcp && (was_made_here(&it) || has_socket(skb, &it)))
			return NEXT;
		count = bpf_map_lookup_elem(&active, &key);
		/* Every service is given its count before it is put up. */
		if (!count)
			return NEXT;
		if (opening && !has_room(service, count))
			return NEXT;
		if (opening && !is_on_time(service, count)) {
			count_refused(&key);
			return DROP;
		}
		if (flow) {
			if ((flow->flags & (FLOW_ANSWERED | FLOW_HALF_OPEN)) == FLOW_ANSWERED ||
			    (flow->flags & FLOW_IN_PLACE))
				in_place = FLOW_IN_PLACE;
			end_flow(flow, &key);
		}
		fresh.host = it.destination;
		fresh.first_sequence = it.sequence;
		fresh.uplink = skb->ifindex;
		fresh.mtu = mtu_of(skb->ifindex);
		fresh.link_index = service->link_index;
		fresh.life = service->life;
		fresh.host_port = it.destination_port;
		if (!opening)
			fresh.flags = FLOW_REBUILT;
		else if (tcp)
			fresh.flags = FLOW_HALF_OPEN | in_place;
		fresh.seen_ns = bpf_ktime_get_coarse_ns();
		if (bpf_map_update_elem(&flows, &flow_key, &fresh, 0))
			return NEXT;
		__sync_fetch_and_add(&count->active, 1);
		flow = bpf_map_lookup_elem(&flows, &flow_key);
		if (!flow)
			return NEXT;
		counter = opening ? bpf_map_lookup_elem(&counters, &key) : 0;
		if (counter)
			counter->flows++;
	}

	/* Of a flow that the client has reset: when that was. */
	if (!(flow->flags & FLOW_RESET))
		flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (flow->uplink != skb->ifindex && leads_back(skb, &it)) {
		flow->uplink = skb->ifindex;
		flow->mtu = mtu_of(skb->ifindex);
	}
	if (tcp) {
		if ((flow->flags & (FLOW_HALF_OPEN | FLOW_ANSWERED)) ==
			    (FLOW_HALF_OPEN | FLOW_ANSWERED) &&
		    (it.flags & (TCP_SYN | TCP_ACK)) == TCP_ACK)
			flow->flags &= ~FLOW_HALF_OPEN;
		follow(flow, &key, it.flags, FLOW_FIN_IN);
	}
	count_in(&key, &it);
	__u32 link = service->link_index;
	struct address target = service->target;
	if (it.kind == PACKET_FIRST && lead_fragments(&it, &target, link, 0))
		return NEXT;
	if (translate(skb, &it, 0, &target, flow_key.container_port))
		return NEXT;
	return deliver(skb, link);
}

SEC("classifier")
int from_container(struct __sk_buff *skb)
{
	struct packet it = {};
	struct flow_key flow_key = {};
	struct service_key key = {};
	struct flow *flow;

	/* The frame is for the bridge's hardware address, which is another than this interface's. */
	if (read_packet(skb, &it))
		return NEXT;
	if (it.kind == PACKET_LATER)
		return follow_fragments(skb, &it, 1);
	if (it.kind == PACKET_ERROR)
		return error_to_client(skb, &it);
	name_flow(&flow_key, it.protocol, &it.source, it.source_port,
		  &it.destination, it.destination_port);
	flow = find_flow(&flow_key);
	if (!flow || flow->link_index != skb->ifindex)
		return NEXT;
	key.port = flow->host_port;
	key.protocol = it.protocol;
	if (flow->flags & FLOW_LOCAL) {
		__u16 before = flow->flags;

		flow->seen_ns = 0;
		if (!(before & FLOW_ANSWERED))
			flow->flags |= FLOW_ANSWERED;
		if (it.protocol == PROTOCOL_TCP)
			follow(flow, &key, it.flags, FLOW_FIN_OUT);
		count_out(&key, &it);
		/* Nothing is to be translated any more: its place is soon another's, and still warm. */
		if (is_last(&it, before))
			forget_local(&flow_key);
		/* Fragments stay together. */
		return it.kind == PACKET_WHOLE ? hand_to_host(skb, &it) : NEXT;
	}
	/* The answer to another SYN than ours: the client's port was used again for a connection that
	 * goes to the container directly. */
	if (it.protocol == PROTOCOL_TCP && (it.flags & TCP_SYN) &&
	    ((flow->flags & FLOW_REBUILT) || !(it.flags & TCP_ACK) ||
	     TO_NET32(it.acknowledged) != TO_NET32(flow->first_sequence) + 1)) {
		end_flow(flow, &key);
		bpf_map_delete_elem(&flows, &flow_key);
		return NEXT;
	}
	/* Too large for the way out: the stack, which forwards it no more than we can, tells the
	 * container how much would do. */
	__u32 length = skb->gso_size ? skb->gso_size + it.headers : skb->len - ETH_HEADER;
	if (length > flow->mtu)
		return NEXT;

	if (it.protocol != PROTOCOL_TCP || !(it.flags & (TCP_SYN | TCP_RST)))
		believe_container(flow, &key);
	if (!(flow->flags & FLOW_RESET))
		flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (!(flow->flags & FLOW_ANSWERED))
		flow->flags |= FLOW_ANSWERED;
	if (it.protocol == PROTOCOL_TCP)
		follow(flow, &key, it.flags, FLOW_FIN_OUT);
	count_out(&key, &it);
	__u32 uplink = flow->uplink;
	__u16 port = flow->host_port;
	struct address host = flow->host;
	if (it.kind == PACKET_FIRST && lead_fragments(&it, &host, uplink, 1))
		return DROP;
	if (translate(skb, &it, 1, &host, port))
		return DROP;
	return bpf_redirect_neigh(uplink, 0, 0, 0);
}

SEC("classifier")
int to_container(struct __sk_buff *skb)
{
	__u16 ports[2];
	int at;

	/* What this host sends has come in by no interface. */
	if (!skb->ingress_ifindex)
		return count_local(skb);
	at = find_tcp(skb);
	if (!at)
		return NEXT;
	if (at < 0 || bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return DROP;
	__u16 port = TO_NET16(ports[1]);
	return port >= RUNNER_FIRST_PORT && port <= RUNNER_LAST_PORT ? DROP : NEXT;
}

SEC("classifier")
int sweep(struct __sk_buff *skb)
{
	struct sweep_context context = {};
	__u32 zero = 0;
	struct sweep_order *order = bpf_map_lookup_elem(&orders, &zero);

	(void)skb;
	if (!order)
		return 1;
	context.order = *order;
	context.now = bpf_ktime_get_coarse_ns();
	bpf_for_each_map_elem(&flows, sweep_flow, &context, 0);
	bpf_for_each_map_elem(&local_flows, sweep_local, &context, 0);
	bpf_for_each_map_elem(&active, sweep_port, &context, 0);
	return 0;
}

/* Nothing that the kernel lends to GPL programs only is used. */
char program_license[] SEC("license") = "LGPL-3.0-or-later";
