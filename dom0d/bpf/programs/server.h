/* SPDX-License-Identifier: GPL-3.0-only */
/* Server side: ingress of each vif. The OVM's segments go on to the bridge as if the PSC had sent them. Any other server's
 * segments go to that server's own ring and no further.
 */
#pragma once

static __always_inline int from_server(struct __sk_buff *skb)
{
	struct segment segment;
	struct control *service;
	struct scratch *scratch;
	struct conversation *known, next;
	__u8 to_mac[6] __attribute__((aligned(2)));
	struct key key;
	__u64 active;
	__u32 zero = 0, slot = SLOTS, flags = 0;
	int recorded, trusted = 0, is_full = 0;

	service = bpf_map_lookup_elem(&control, &zero);
	scratch = bpf_map_lookup_elem(&scratches, &zero);
	if (!service || !scratch)
		return TC_ACT_UNSPEC;
	for (__u32 at = 0; at < SLOTS; at++)
		if (service->servers[at].ifindex == skb->ifindex)
			slot = at;
	if (slot >= SLOTS)
		return TC_ACT_UNSPEC;
	if (!parse(skb, &segment, scratch)) {
		count(COUNT_FOREIGN_SERVER);
		return TC_ACT_UNSPEC;
	}
	if (segment.version == 4 ? !service->servers[slot].has_v4 ||
					   !same(segment.source, service->servers[slot].v4, 4) :
				   !service->servers[slot].has_v6 ||
					   !same(segment.source, service->servers[slot].v6, 6))
		return TC_ACT_UNSPEC;
	if (!has_port(service, segment.source_port))
		return TC_ACT_UNSPEC;
	if (!in_vlan(skb, service)) {
		count(COUNT_OTHER_VLAN);
		return TC_ACT_UNSPEC;
	}
	if (segment.ip_length > LONGEST) {
		count(COUNT_TOO_LONG);
		return TC_ACT_SHOT;
	}
	active = *(volatile __u64 *)&service->active;
	if (slot != (active & 0xff)) {
		if (rvm_record(skb, &segment, service, active, slot) < 0)
			count(COUNT_RVM_RING_FULL);
		else
			count(COUNT_RVM_TO_DAEMON);
		return TC_ACT_SHOT;
	}

	__builtin_memset(&key, 0, sizeof(key));
	__builtin_memcpy(key.client, segment.destination, 16);
	key.client_port = segment.destination_port;
	key.psc_port = segment.source_port;
	key.version = segment.version;
	known = bpf_map_lookup_elem(&conversations, &key);
	if (known && known->epoch != active >> 8) {
		count(COUNT_WRONG_EPOCH);
		known = 0;
	}
	if (known && known->passing == PASSING) {
		int outcome;

		next = *known;
		outcome = server_to_client(skb, &segment, scratch, &next, bounds_of(service, known));
		known->server_tsval = next.server_tsval;
		if (outcome == PASSES)
			trusted = is_trusted(skb, &segment, scratch);
		if (outcome == PASSES && trusted >= 0) {
			flags |= trusted ? FORWARDED | TRUSTED : FORWARDED;
			/* At once: another CPU may have the next segment while this one is copied. */
			known->told_tsval = next.told_tsval;
			known->server_edge = next.server_edge;
			known->told_acked = next.told_acked;
			known->down_nxt = next.down_nxt;
		}
		if (outcome == ASIDE_FROM_NOW) {
			known->passing = 0;
			flags |= HANDED_OVER;
			count(COUNT_HANDED_OVER);
		}
	}
	if (!(flags & FORWARDED) && is_unattended(service, known)) {
		if (known && scratch->old[13] & SYN) {
			/* A new connection of the same addresses. */
			known->epoch = ~0u;
			known = 0;
		}
		if (translate_alone(skb, &segment, scratch, known, 0) == PASSES) {
			flags = FORWARDED | UNATTENDED;
			if (known)
				known->passing = ALONE;
			count(COUNT_UNATTENDED);
		}
	}
	recorded = record(skb, &segment, service, active, slot << 16 | flags);
	if (recorded < 0) {
		is_full = 1;
		count(COUNT_RING_FULL);
		if (!(flags & FORWARDED) || !is_deserted(service))
			return TC_ACT_SHOT;
	} else if (!(recorded & FORWARDED)) {
		count(COUNT_SERVER_TO_DAEMON);
		return TC_ACT_SHOT;
	}
	if (is_full) {
		__sync_fetch_and_add(&service->unrecorded, 1);
		count(COUNT_UNRECORDED);
	}
	/* To an unknown client: the address that the server has. */
	__builtin_memcpy(to_mac, HALF(known ? known->client_mac : scratch->frame), 6);
	if (rewrite(skb, &segment, scratch, segment.version == 4 ? 12 : 8,
		    segment.version == 4 ? service->psc_v4 : service->psc_v6, to_mac, service->psc_mac)) {
		count(COUNT_REWRITE_FAILED);
		return TC_ACT_SHOT;
	}
	count(COUNT_SERVER_FORWARDED);
	/* From here to the bridge: by way of the anchor it would wait for another softirq of this CPU. The mark, which no guest
	 * can set, tells the rules at the bridge that this frame speaks for the PSC.
	 */
	skb->mark = MARK;
	return TC_ACT_OK;
}
