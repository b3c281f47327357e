/* Who may open a flow, and how many. */
#ifndef POLICY_H
#define POLICY_H

#include "kernel.h"
#include "maps.h"
#include "records.h"

static ALWAYS_INLINE int is_allowed(const struct service *service, const struct address *client)
{
	__u32 i;

	if (!service->networks)
		return 1;
#pragma unroll
	for (i = 0; i < CLIENT_NETWORKS; i++) {
		const struct client_network *network = &service->network[i];
		if (i < service->networks &&
		    !((client->word[0] ^ network->address.word[0]) & network->mask.word[0]) &&
		    !((client->word[1] ^ network->address.word[1]) & network->mask.word[1]) &&
		    !((client->word[2] ^ network->address.word[2]) & network->mask.word[2]) &&
		    !((client->word[3] ^ network->address.word[3]) & network->mask.word[3]))
			return 1;
	}
	return 0;
}

/* Whether there is room for one more flow of this port. */
static ALWAYS_INLINE int has_room(const struct service *service, const struct port_flows *count)
{
	return !service->max_flows || count->active + count->local < service->max_flows;
}

/* Whether a new flow comes no sooner than the port's rate allows; if so it is counted in. Two
 * processors may let one too many through. */
static ALWAYS_INLINE int is_on_time(const struct service *service, struct port_flows *count)
{
	const __u64 second = 1000000000;
	__u64 now, next = count->next_ns;

	if (!service->spacing_ns)
		return 1;
	now = bpf_ktime_get_coarse_ns();
	if (next > now + second)
		return 0;
	if (next < now)
		count->next_ns = now + service->spacing_ns;
	else
		__sync_fetch_and_add(&count->next_ns, service->spacing_ns);
	return 1;
}

static ALWAYS_INLINE void count_refused(const struct service_key *key)
{
	struct port_counters *counter = bpf_map_lookup_elem(&counters, key);

	if (counter)
		counter->refused++;
}

#endif
