/* SPDX-License-Identifier: GPL-3.0-only */
/* Client side: egress of the anchor, to which the bridge sends frames for the PSC's MAC. */
#pragma once

static __always_inline int from_client(struct __sk_buff *skb)
{
	struct segment segment;
	struct control *service;
	struct scratch *scratch;
	struct conversation *known, next;
	struct server *server;
	struct key key;
	__u64 active;
	__u32 zero = 0, slot, flags = FROM_CLIENT;
	int recorded, trusted = 0, is_full = 0;

	service = bpf_map_lookup_elem(&control, &zero);
	scratch = bpf_map_lookup_elem(&scratches, &zero);
	if (!service || !scratch)
		return TC_ACT_UNSPEC;
	if (!parse(skb, &segment, scratch)) {
		count(COUNT_FOREIGN_CLIENT);
		return TC_ACT_UNSPEC;
	}
	if (segment.version == 4 ? !service->has_v4 || !same(segment.destination, service->psc_v4, 4) :
				   !service->has_v6 || !same(segment.destination, service->psc_v6, 6))
		return TC_ACT_UNSPEC;
	if (!has_port(service, segment.destination_port)) {
		count(COUNT_NOT_SERVICE_PORT);
		return TC_ACT_UNSPEC;
	}
	if (!in_vlan(skb, service)) {
		count(COUNT_OTHER_VLAN);
		return TC_ACT_UNSPEC;
	}
	if (segment.ip_length > LONGEST) {
		count(COUNT_TOO_LONG);
		return TC_ACT_SHOT;
	}
	active = *(volatile __u64 *)&service->active;
	slot = active & 0xff;

	__builtin_memset(&key, 0, sizeof(key));
	__builtin_memcpy(key.client, segment.source, 16);
	key.client_port = segment.source_port;
	key.psc_port = segment.destination_port;
	key.version = segment.version;
	known = bpf_map_lookup_elem(&conversations, &key);
	if (known && (known->epoch != active >> 8 || slot >= SLOTS)) {
		count(COUNT_WRONG_EPOCH);
		known = 0;
	} else if (!known) {
		count(COUNT_NO_CONVERSATION);
	}
	if (known && known->passing == PASSING) {
		int outcome;

		next = *known;
		outcome = client_to_server(skb, &segment, scratch, &next, bounds_of(service, known));
		if (outcome == PASSES)
			trusted = is_trusted(skb, &segment, scratch);
		if (outcome == PASSES && trusted >= 0) {
			flags |= trusted ? FORWARDED | TRUSTED : FORWARDED;
			/* At once: another CPU may have the next segment while this one is copied. */
			known->ts_recent = next.ts_recent;
			known->up_nxt = next.up_nxt;
			known->client_acked = next.client_acked;
			known->client_edge = next.client_edge;
			__builtin_memcpy(HALF(known->client_mac), HALF(segment.source_mac), 6);
		}
		if (outcome == ASIDE_FROM_NOW) {
			known->passing = 0;
			flags |= HANDED_OVER;
			count(COUNT_HANDED_OVER);
		}
	}
	if (!(flags & FORWARDED) && slot < SLOTS && is_unattended(service, known)) {
		/* Whether a SYN opens a new connection is the server's decision. */
		struct conversation *same = known && !(scratch->old[13] & SYN) ? known : 0;

		if (translate_alone(skb, &segment, scratch, same, 1) == PASSES) {
			flags = FROM_CLIENT | FORWARDED | UNATTENDED;
			if (same)
				same->passing = ALONE;
			count(COUNT_UNATTENDED);
		}
	}
	/* Unknown conversations, such as a SYN flood, may use half of the ring. */
	if (!known && !(flags & UNATTENDED) &&
	    bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) > bpf_ringbuf_query(&ring, BPF_RB_RING_SIZE) / 2) {
		count(COUNT_RING_SHARE_FULL);
		return TC_ACT_SHOT;
	}
	recorded = record(skb, &segment, service, active, (__u32)0xff << 16 | flags);
	if (recorded < 0) {
		is_full = 1;
		count(COUNT_RING_FULL);
		if (!(flags & FORWARDED) || !is_deserted(service))
			return TC_ACT_SHOT;
	} else if (!(recorded & FORWARDED)) {
		count(COUNT_CLIENT_TO_DAEMON);
		return TC_ACT_SHOT;
	}
	if (is_full) {
		__sync_fetch_and_add(&service->unrecorded, 1);
		count(COUNT_UNRECORDED);
	}
	server = &service->servers[slot & (SLOTS - 1)];
	if (rewrite(skb, &segment, scratch, segment.version == 4 ? 16 : 24,
		    segment.version == 4 ? server->v4 : server->v6, server->mac, service->psc_mac)) {
		count(COUNT_REWRITE_FAILED);
		return TC_ACT_SHOT;
	}
	count(COUNT_CLIENT_FORWARDED);
	return bpf_redirect(server->ifindex, 0);
}
