/* SPDX-License-Identifier: GPL-3.0-only */
/* The protocol crate's `translate`, which specifies this, for frames: same names, same order, same bytes.
 *
 * First it is decided whether a segment passes, and the new header is made beside the old one; only then, the
 * segment being recorded, the frame and the conversation change.
 */
#pragma once

#define FIN_RST_URG 0x25
#define SYN 0x02
#define ACK 0x10

/* What becomes of a segment. */
#define PASSES 0
#define ASIDE 1 /* the daemon must deal with it */
#define ASIDE_FROM_NOW 2 /* and with all that follow, because it moves the conversation on */

/* One option per call, or one byte of an option that is overwritten: the verifier can't follow a loop in here. */
static long next_option(__u32 index, void *context)
{
	struct scratch *scratch = *(struct scratch **)context;
	struct options *options = &scratch->options;
	__u32 at = options->at & 63;
	__u8 *bytes = scratch->new + at;
	__u32 length;
	(void)index;

	if (options->to_fill) {
		bytes[0] = 1;
		options->to_fill -= 1;
		options->at += 1;
		return 0;
	}
	if (options->at >= options->end || bytes[0] == 0)
		return 1;
	if (bytes[0] == 1) {
		options->at += 1;
		return 0;
	}
	length = bytes[1];
	if (options->at + 1 >= options->end || length < 2 || options->at + length > options->end) {
		options->malformed = 1;
		return 1;
	}
	if (bytes[0] == 8 && length == 10 && !options->timestamps) {
		options->timestamps = at;
	} else if (bytes[0] == 5 && !options->sack &&
		   (length == 10 || length == 18 || length == 26 || length == 34)) {
		options->sack = at;
		options->sack_length = length;
	} else if (bytes[0] == 5 || bytes[0] == 8 || bytes[0] == 19 || bytes[0] == 29) {
		options->malformed = 1;
		return 1;
	} else {
		bytes[0] = 1;
		options->to_fill = length - 1;
		options->at += 1;
		return 0;
	}
	options->at += length;
	return 0;
}

/* Completes the old header, copies it to the new one, and reads the options there. */
static __always_inline int read_header(struct __sk_buff *skb, const struct segment *segment,
				       struct scratch *scratch)
{
	struct options *options = &scratch->options;
	__u32 more = segment->header - TCP_LEAST;

	__builtin_memset(options, 0, sizeof(*options));
	__builtin_memset(scratch->old + TCP_LEAST, 0, sizeof(scratch->old) - TCP_LEAST);
	/* Masked, then added: the 6.1 verifier forgets a lower bound. There are 40 at most. */
	if (more && bpf_skb_load_bytes(skb, segment->l4 + TCP_LEAST, scratch->old + TCP_LEAST, ((more - 1) & 63) + 1))
		return 0;
	__builtin_memcpy(scratch->new, scratch->old, sizeof(scratch->new));
	if (!more)
		return 1;
	/* What nearly every segment has: two NOPs and timestamps. */
	if (more == 12 && scratch->old[20] == 1 && scratch->old[21] == 1 && scratch->old[22] == 8 &&
	    scratch->old[23] == 10) {
		options->timestamps = 22;
		return 1;
	}
	options->at = TCP_LEAST;
	options->end = segment->header;
	bpf_loop(40, next_option, &scratch, 0);
	if (options->malformed)
		count(COUNT_MALFORMED_OPTIONS);
	return !options->malformed;
}

static __always_inline int aside(int moves)
{
	return moves ? ASIDE_FROM_NOW : ASIDE;
}

/* A segment of the client for the server; `next` is the conversation as it will be. */
static __always_inline int client_to_server(struct __sk_buff *skb, const struct segment *segment,
					    struct scratch *scratch, struct conversation *next)
{
	__u8 *old = scratch->old, *new = scratch->new;
	__u32 seq = be32_at(old + 4), ack = be32_at(old + 8);
	__u32 end = seq + segment->payload;
	int moves = segment->payload > 0 && later(end, next->up_nxt);
	struct options *options = &scratch->options;

	if (old[13] & FIN_RST_URG)
		return ASIDE_FROM_NOW;
	if ((old[13] & (SYN | ACK)) != ACK || !read_header(skb, segment, scratch))
		return aside(moves);
	if (seq != next->up_nxt || (segment->payload > 0 && later(end, next->told_edge)) ||
	    later(ack, next->down_nxt) || later(next->client_acked, ack) ||
	    (options->timestamps != 0) != (next->timestamps != 0))
		return aside(moves);
	if (options->timestamps) {
		__u32 at = options->timestamps & 63;
		__u32 tsval = be32_at(old + at + 2);
		__u32 echo = be32_at(old + at + 6) - next->ts_delta;

		if (later(next->ts_recent, tsval + 1))
			return aside(moves);
		if (later(echo, next->server_tsval))
			echo = next->server_tsval;
		else if (later(next->ts_floor, echo))
			echo = next->ts_floor;
		put_be32(new + at + 6, echo);
		if (!later(seq, next->told_acked) && later(tsval, next->ts_recent))
			next->ts_recent = tsval;
	}
	put_be32(new + 8, ack - next->seq_delta);
	for (__u32 edge = 0; edge < 8; edge++) {
		__u32 at = (options->sack + 2 + 4 * edge) & 63;

		if (options->sack && 2 + 4 * edge < options->sack_length)
			put_be32(new + at, be32_at(old + at) - next->seq_delta);
	}
	next->up_nxt = end;
	next->client_acked = ack;
	next->client_edge = ack + ((__u32)be16_at(old + 14) << (next->client_shift & 15));
	return PASSES;
}

/* A segment of the server for the client. */
static __always_inline int server_to_client(struct __sk_buff *skb, const struct segment *segment,
					    struct scratch *scratch, struct conversation *next)
{
	__u8 *old = scratch->old, *new = scratch->new;
	__u32 seq = be32_at(old + 4) + next->seq_delta, ack = be32_at(old + 8);
	__u32 end = seq + segment->payload;
	int moves = segment->payload > 0 && later(end, next->down_nxt);
	struct options *options = &scratch->options;
	__u32 edge, room;

	if (old[13] & FIN_RST_URG)
		return ASIDE_FROM_NOW;
	if ((old[13] & (SYN | ACK)) != ACK || !read_header(skb, segment, scratch))
		return aside(moves);
	if (seq != next->down_nxt || later(ack, next->up_nxt) || later(next->told_acked, ack) ||
	    (segment->payload > 0 && later(end, next->client_edge + 1)) ||
	    (options->timestamps != 0) != (next->timestamps != 0))
		return aside(moves);
	if (options->timestamps) {
		__u32 at = options->timestamps & 63;
		__u32 tsval = be32_at(old + at + 2);

		if (later(tsval, next->server_tsval) || next->server_tsval == 0)
			next->server_tsval = tsval;
		if (later(tsval + next->ts_delta, next->told_tsval))
			next->told_tsval = tsval + next->ts_delta;
		put_be32(new + at + 2, next->told_tsval);
	}
	put_be32(new + 4, seq);
	edge = ack + ((__u32)be16_at(old + 14) << (next->server_shift & 15));
	if (later(edge, next->told_edge))
		next->told_edge = edge;
	next->told_acked = ack;
	room = (next->told_edge - ack) >> (next->told_shift & 15);
	if (room > 0xffff)
		room = 0xffff;
	new[14] = room >> 8;
	new[15] = room;
	next->down_nxt = end;
	return PASSES;
}

/* Writes the new header, `address` in place of `before`, at `at` in the IP header, and both MACs. The helpers know a
 * partial checksum: there only the address counts. -1 if the frame can't be written.
 */
static __always_inline int rewrite(struct __sk_buff *skb, struct segment *segment, struct scratch *scratch,
				   __u32 at, __u8 *before, __u8 *address, const __u8 *to_mac,
				   const __u8 *from_mac)
{
	__u32 header = segment->header - TCP_LEAST;
	__u32 checksum = segment->l4 + 16;
	__u8 *ip = scratch->frame + ETHERNET;
	__s64 changed, moved;

	changed = bpf_csum_diff((__be32 *)scratch->old, 60, (__be32 *)scratch->new, 60, 0);
	__builtin_memcpy(scratch->frame, to_mac, 6);
	__builtin_memcpy(scratch->frame + 6, from_mac, 6);
	/* Constant lengths in each family. */
	if (segment->version == 4) {
		__u32 sum;

		moved = bpf_csum_diff((__be32 *)before, 4, (__be32 *)address, 4, 0);
		__builtin_memcpy(ip + (at & 31), address, 4);
		/* RFC 1624, on words as they lie in memory, as bpf_csum_diff has them. */
		sum = (__u16) ~*(__u16 *)(ip + 10) + ((__u32)moved & 0xffff) + ((__u32)moved >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		*(__u16 *)(ip + 10) = ~sum;
		if (bpf_skb_store_bytes(skb, 0, scratch->frame, ETHERNET + 20, 0))
			return -1;
	} else {
		moved = bpf_csum_diff((__be32 *)before, 16, (__be32 *)address, 16, 0);
		__builtin_memcpy(ip + (at & 31), address, 16);
		if (bpf_skb_store_bytes(skb, 0, scratch->frame, ETHERNET + 40, 0))
			return -1;
	}
	if (bpf_skb_store_bytes(skb, segment->l4, scratch->new, (header & 63) + TCP_LEAST, 0) ||
	    bpf_l4_csum_replace(skb, checksum, 0, changed, 0) ||
	    bpf_l4_csum_replace(skb, checksum, 0, moved, BPF_F_PSEUDO_HDR))
		return -1;
	return 0;
}
