/* SPDX-License-Identifier: GPL-3.0-only */
/* Finds the parts of a frame that holds one whole TCP segment right behind an IP header, as the protocol crate's `wire`
 * specifies it (rule 10).
 *
 * All other frames (fragments, IP options, extension headers, a broken IP header, a tag within a tag) are left to the daemon,
 * which reads them from a socket and drops them: they would be out of order. Headers are copied out, since they may lie
 * anywhere, also beyond the linear area.
 */
#pragma once

#define ETHERNET 14
#define TCP_LEAST 20

struct segment {
	__u32 l4; /* offset of the TCP header in the frame */
	__u32 ip_length; /* bytes of the packet, IP header included */
	__u32 header; /* bytes of the TCP header */
	__u32 payload;
	__u32 version;
	__u16 source_port, destination_port;
	/* An IPv4 address in the first four bytes. */
	__u8 source[16] __attribute__((aligned(8))), destination[16];
	__u8 source_mac[6] __attribute__((aligned(2)));
	__u32 edge; /* right edge of the window that the receiver is told */
};

/* BPF reads and writes unaligned words; but unless clang is told that they are aligned, it copies byte by byte. */
#define WORD(at) __builtin_assume_aligned(at, 4)
#define HALF(at) __builtin_assume_aligned(at, 2)

typedef __u32 __attribute__((__may_alias__)) word;
typedef __u16 __attribute__((__may_alias__)) half;

static __always_inline __u32 word_at(const __u8 *at)
{
	return *(const word *)at;
}

static __always_inline __u16 be16_at(const __u8 *at)
{
	return bpf_ntohs(*(const half *)at);
}

static __always_inline __u32 be32_at(const __u8 *at)
{
	return bpf_ntohl(word_at(at));
}

/* RFC 1982: a is later than b on a 32-bit circle. */
static __always_inline int later(__u32 a, __u32 b)
{
	return (__s32)(a - b) > 0;
}

/* Copies `length` bytes, a constant, from the frame. They begin within its first 128 bytes. */
static __always_inline int read_frame(struct __sk_buff *skb, __u32 from, void *to, __u32 length)
{
	const __u8 *at = (const __u8 *)(long)skb->data + (from & 127);

	if (at + length > (const __u8 *)(long)skb->data_end)
		return bpf_skb_load_bytes(skb, from, to, length);
	__builtin_memcpy(WORD(to), WORD(at), length);
	return 0;
}

/* Whether the checksum of an IPv4 header without options is right: a receiver drops others. */
static __always_inline int is_sound(const __u8 *ip)
{
	__u64 sum = (__u64)word_at(ip) + word_at(ip + 4) + word_at(ip + 8) + word_at(ip + 12) + word_at(ip + 16);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum == 0xffff;
}

/* Fills `segment`, the Ethernet and IP headers and the first 20 bytes of the TCP header. Returns 0 if the frame is no such
 * segment.
 */
static __always_inline int parse(struct __sk_buff *skb, struct segment *segment, struct scratch *scratch)
{
	__u8 *header = scratch->old, *ip = scratch->frame + ETHERNET;

	__builtin_memset(segment, 0, sizeof(*segment));
	if (read_frame(skb, 0, scratch->frame, ETHERNET + 20))
		return 0;
	__builtin_memcpy(segment->source_mac, HALF(scratch->frame + 6), 6);
	switch (be16_at(scratch->frame + 12)) {
	case 0x0800:
		if (ip[0] != 0x45 || be16_at(ip + 6) & 0x3fff || ip[9] != 6 || !is_sound(ip))
			return 0;
		segment->version = 4;
		segment->l4 = ETHERNET + 20;
		segment->ip_length = be16_at(ip + 2);
		__builtin_memcpy(segment->source, WORD(ip + 12), 4);
		__builtin_memcpy(segment->destination, WORD(ip + 16), 4);
		break;
	case 0x86dd:
		if (ip[0] >> 4 != 6 || ip[6] != 6 || read_frame(skb, ETHERNET + 20, ip + 20, 20))
			return 0;
		segment->version = 6;
		segment->l4 = ETHERNET + 40;
		segment->ip_length = 40 + be16_at(ip + 4);
		__builtin_memcpy(segment->source, WORD(ip + 8), 16);
		__builtin_memcpy(segment->destination, WORD(ip + 24), 16);
		break;
	default:
		return 0;
	}
	if (ETHERNET + segment->ip_length > skb->len ||
	    segment->l4 + TCP_LEAST > ETHERNET + segment->ip_length ||
	    read_frame(skb, segment->l4, header, TCP_LEAST))
		return 0;
	segment->header = (header[12] >> 4) * 4;
	if (segment->header < TCP_LEAST || segment->l4 + segment->header > ETHERNET + segment->ip_length)
		return 0;
	segment->payload = ETHERNET + segment->ip_length - segment->l4 - segment->header;
	segment->source_port = be16_at(header);
	segment->destination_port = be16_at(header + 2);
	return 1;
}

/* Whether the frame is in the service's VLAN. The kernel keeps the outer tag beside the frame. A tag with a priority and VLAN 0
 * counts as none.
 */
static __always_inline int in_vlan(struct __sk_buff *skb, const struct control *service)
{
	if (!skb->vlan_present)
		return !service->vlan;
	return skb->vlan_proto == bpf_htons(ETH_P_8021Q) && (skb->vlan_tci & 0xfff) == service->vlan;
}

static __always_inline int same(const __u8 *a, const __u8 *b, __u32 version)
{
	const __u32 *x = (const __u32 *)a, *y = (const __u32 *)b;

	if (version == 4)
		return x[0] == y[0];
	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

static __always_inline int has_port(const struct control *service, __u16 port)
{
	for (int at = 0; at < PORTS; at++)
		if (service->ports[at] == port)
			return port != 0;
	return 0;
}
