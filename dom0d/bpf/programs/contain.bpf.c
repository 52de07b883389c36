// SPDX-License-Identifier: GPL-3.0-only
/* Contains domains (rule 13), on the ingress of each vif, behind the services' programs and before the bridge: drops what a
 * domain sends that is not the OVM, and the OVM's segments under its own address from a port of the service. Frames that pass
 * here meet the nft table, the second fence, which others may flush.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "layout.h"

#define HOLDS 1024

/* By the number of the vif's interface. Interfaces without an entry are free. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HOLDS);
	__type(key, __u32);
	__type(value, struct hold);
} holds SEC(".maps");

static __always_inline int is_one_of(const __u16 *ports, __u16 port)
{
	for (int at = 0; at < ALLOWED; at++)
		if (ports[at] == port)
			return port != 0;
	return 0;
}

static __always_inline int may_go_to(const struct hold *hold, __u8 protocol, __u16 from, __u16 to)
{
	if (protocol == 6)
		return is_one_of(hold->tcp, to);
	if (hold->dhcp && ((from == 68 && to == 67) || (from == 546 && to == 547)))
		return 1;
	return is_one_of(hold->udp, to);
}

/* Ports of UDP or TCP behind an IP header. */
static __always_inline int is_allowed(struct __sk_buff *skb, const struct hold *hold, __u8 protocol, __u32 at)
{
	__be16 ports[2];

	if ((protocol != 6 && protocol != 17) || bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return 0;
	return may_go_to(hold, protocol, bpf_ntohs(ports[0]), bpf_ntohs(ports[1]));
}

static __always_inline int is_own(const __u8 *own, const __u8 *address, __u32 length)
{
	for (__u32 at = 0; at < ADDRESSES; at++) {
		__u32 differ = 0, any = 0;

		for (__u32 byte = 0; byte < length; byte++) {
			differ |= own[at * length + byte] ^ address[byte];
			any |= address[byte];
		}
		if (!differ && any)
			return 1;
	}
	return 0;
}

static __always_inline int is_let_go(struct __sk_buff *skb, const struct hold *hold)
{
	__u8 header[40];
	__be16 kind;

	/* The outer tag is beside the frame. */
	if (bpf_skb_load_bytes(skb, 12, &kind, sizeof(kind)))
		return 0;
	switch (bpf_ntohs(kind)) {
	case ETH_P_IP:
		if (bpf_skb_load_bytes(skb, ETH_HLEN, header, 20))
			return 0;
		/* A fragment behind the first has no ports. */
		if (header[0] >> 4 != 4 || (header[0] & 15) < 5 || header[6] & 0x1f || header[7])
			return 0;
		return is_allowed(skb, hold, header[9], ETH_HLEN + (header[0] & 15) * 4);
	case ETH_P_IPV6:
		if (bpf_skb_load_bytes(skb, ETH_HLEN, header, 40) || header[0] >> 4 != 6)
			return 0;
		if (header[6] == 58 && hold->found) {
			__u8 advert[24];

			return !bpf_skb_load_bytes(skb, ETH_HLEN + 40, advert, 24) && advert[0] == 136 &&
			       is_own(hold->v6, advert + 8, 16);
		}
		return is_allowed(skb, hold, header[6], ETH_HLEN + 40);
	case ETH_P_ARP:
		return hold->found && !bpf_skb_load_bytes(skb, ETH_HLEN, header, 28) && header[4] == 6 &&
		       header[5] == 4 && header[7] == 2 && is_own(hold->v4, header + 14, 4);
	default:
		return 0;
	}
}

/* Whether it is a segment of the service from the server's own address. */
static __always_inline int is_of_service(struct __sk_buff *skb, const struct hold *hold)
{
	__u8 header[40];
	__be16 kind, port;
	__u32 at;

	if (bpf_skb_load_bytes(skb, 12, &kind, sizeof(kind)))
		return 0;
	if (kind == bpf_htons(ETH_P_IP)) {
		/* Only the first fragment has ports; without it, the others are useless. */
		if (bpf_skb_load_bytes(skb, ETH_HLEN, header, 20) || header[9] != 6 || header[6] & 0x1f || header[7] ||
		    !is_own(hold->v4, header + 12, 4))
			return 0;
		at = ETH_HLEN + (header[0] & 15) * 4;
	} else if (kind == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN, header, 40) || header[6] != 6 || !is_own(hold->v6, header + 8, 16))
			return 0;
		at = ETH_HLEN + 40;
	} else {
		return 0;
	}
	return !bpf_skb_load_bytes(skb, at, &port, sizeof(port)) && is_one_of(hold->tcp, bpf_ntohs(port));
}

SEC("classifier")
int contain(struct __sk_buff *skb)
{
	__u32 interface = skb->ifindex;
	struct hold *hold = bpf_map_lookup_elem(&holds, &interface);

	if (!hold)
		return TC_ACT_UNSPEC;
	if (hold->is_ovm)
		return is_of_service(skb, hold) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (is_let_go(skb, hold))
		return TC_ACT_UNSPEC;
	__sync_fetch_and_add(&hold->dropped, 1);
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "GPL";
