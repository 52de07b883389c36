/* SPDX-License-Identifier: GPL-3.0-only */
/* Translates frames as the protocol crate's `translate` specifies: same names, same order, same bytes.
 *
 * First it decides whether the segment passes, makes the new header beside the old one, and moves the conversation on. The
 * frame changes only once the segment is recorded.
 */
#pragma once

#define FIN_RST_URG 0x25
#define SYN 0x02
#define ACK 0x10

/* What happens to a segment. */
#define PASSES 0
#define ASIDE 1 /* the daemon must handle it */
#define ASIDE_FROM_NOW 2 /* and all that follow, because it moves the conversation on */

/* Reads one option per call, or overwrites one byte of an option: the verifier can't follow a loop in here. */
static long next_option(__u32 index, void *context)
{
	struct scratch *scratch = *(struct scratch **)context;
	struct options *options = &scratch->options;
	__u32 at = options->at & 63;
	__u8 *bytes = scratch->new + at;
	__u32 length;
	(void)index;

	if (options->to_fill) {
		options->filled = 1;
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
	} else if (bytes[0] <= 5 || bytes[0] == 8 || bytes[0] == 19 || bytes[0] == 29) {
		options->malformed = 1;
		return 1;
	} else {
		options->filled = 1;
		bytes[0] = 1;
		options->to_fill = length - 1;
		options->at += 1;
		return 0;
	}
	options->at += length;
	return 0;
}

/* Completes the old header, and copies it to the new one. */
static __always_inline int copy_header(struct __sk_buff *skb, const struct segment *segment,
				       struct scratch *scratch)
{
	__u32 more = segment->header - TCP_LEAST;

	scratch->changed = 0;
	scratch->options.filled = 0;
	__builtin_memset(WORD(scratch->old + TCP_LEAST), 0, sizeof(scratch->old) - TCP_LEAST);
	if (more == 12) {
		if (read_frame(skb, segment->l4 + TCP_LEAST, scratch->old + TCP_LEAST, 12))
			return 0;
	/* Masked, then added: the 6.1 verifier forgets a lower bound. At most 40 bytes. */
	} else if (more && bpf_skb_load_bytes(skb, segment->l4 + TCP_LEAST, scratch->old + TCP_LEAST, ((more - 1) & 63) + 1)) {
		return 0;
	}
	__builtin_memcpy(WORD(scratch->new), WORD(scratch->old), sizeof(scratch->new));
	return 1;
}

/* What a checksum gains if a word replaces another (RFC 1624, on words as they lie in memory). Adding 0xffffffff, which is 0 in
 * one's complement, keeps the result from being 0.
 */
static __always_inline __u64 exchanged(__u32 before, __u32 after)
{
	return 0xffffffffull + ~before + after;
}

static __always_inline __u32 folded(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* Writes a word of the new header. */
static __always_inline void put_be32(struct scratch *scratch, __u32 at, __u32 value)
{
	__u32 before = word_at(scratch->old + at), after = bpf_htonl(value);

	if (before == after)
		return;
	*(word *)(scratch->new + at) = after;
	/* At an odd offset the bytes of each half-word change places. */
	if (at & 1) {
		before = before << 8 | before >> 24;
		after = after << 8 | after >> 24;
	}
	scratch->changed += exchanged(before, after);
}

/* Writes the window from `ack` to `edge`. */
static __always_inline void put_window(struct scratch *scratch, __u32 edge, __u32 ack, __u32 shift)
{
	__u32 room = later(ack, edge) ? 0 : (edge - ack) >> (shift & 15);
	__u16 before = *(half *)(scratch->old + 14), after = bpf_htons(room > 0xffff ? 0xffff : room);

	if (before == after)
		return;
	*(half *)(scratch->new + 14) = after;
	scratch->changed += exchanged(before, after);
}

/* Copies the header as copy_header does, and reads the options of the copy. */
static __always_inline int read_header(struct __sk_buff *skb, const struct segment *segment,
				       struct scratch *scratch)
{
	struct options *options = &scratch->options;
	__u32 more = segment->header - TCP_LEAST;

	__builtin_memset(options, 0, sizeof(*options));
	if (!copy_header(skb, segment, scratch))
		return 0;
	if (!more)
		return 1;
	/* Nearly every segment has these: two NOPs and timestamps. */
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

/* How far both sides may go on. If the daemon is away, which moves no bounds on, and the policy is to serve: without bounds.
 */
static __always_inline struct bounds bounds_of(struct control *service, struct conversation *known)
{
	struct bounds far = { known->up_nxt + (1u << 30), known->down_nxt + (1u << 30) };
	struct bounds *at = bpf_map_lookup_elem(&bounds, &known->place);
	struct bounds present;

	if (!at)
		return far;
	present.up = *(volatile __u32 *)&at->up;
	present.down = *(volatile __u32 *)&at->down;
	if ((later(known->server_edge, present.up) || later(known->client_edge, present.down)) &&
	    is_deserted(service))
		return far;
	return present;
}

static __always_inline int aside(int moves)
{
	return moves ? ASIDE_FROM_NOW : ASIDE;
}

/* The right edge of a window that must not go beyond `bound`. */
static __always_inline __u32 bounded(__u32 edge, __u32 bound)
{
	return later(edge, bound) ? bound : edge;
}

static __always_inline int is_between(__u32 low, __u32 seq, __u32 high)
{
	return seq - low <= high - low;
}

/* Whether a segment lies behind everything that came so far, and within the window. */
static __always_inline int is_new(__u32 next, __u32 seq, __u32 end, __u32 edge)
{
	if (later(next, edge))
		edge = next;
	return is_between(next, seq, edge) && is_between(next, end, edge);
}

static __always_inline void move_sack(struct scratch *scratch, __u32 seq_delta)
{
	struct options *options = &scratch->options;

	for (__u32 edge = 0; edge < 8; edge++) {
		__u32 at = (options->sack + 2 + 4 * edge) & 63;

		if (options->sack && 2 + 4 * edge < options->sack_length)
			put_be32(scratch, at, be32_at(scratch->old + at) - seq_delta);
	}
}

/* Translates any segment while the daemon is away. An unknown conversation began meanwhile, or was handled by the daemon: its
 * numbers are the server's own.
 */
static __noinline int translate_alone(struct __sk_buff *skb, struct segment *segment, struct scratch *scratch,
				      struct conversation *known, __u32 from_client)
{
	__u8 *old;
	__u32 at;

	if (!segment || !scratch)
		return ASIDE;
	old = scratch->old;
	if (!known)
		return copy_header(skb, segment, scratch) ? PASSES : ASIDE;
	if (!read_header(skb, segment, scratch))
		return ASIDE;
	at = scratch->options.timestamps & 63;
	if (from_client) {
		if (old[13] & ACK)
			put_be32(scratch, 8, be32_at(old + 8) - known->seq_delta);
		if (at)
			put_be32(scratch, at + 6, be32_at(old + at + 6) - known->ts_delta);
		move_sack(scratch, known->seq_delta);
	} else {
		put_be32(scratch, 4, be32_at(old + 4) + known->seq_delta);
		if (at)
			put_be32(scratch, at + 2, be32_at(old + at + 2) + known->ts_delta);
	}
	return PASSES;
}

/* Translates a client's segment for the server; `next` becomes the conversation after it. */
static __always_inline int client_to_server(struct __sk_buff *skb, struct segment *segment,
					    struct scratch *scratch, struct conversation *next,
					    struct bounds bounds)
{
	__u8 *old = scratch->old;
	__u32 seq = be32_at(old + 4), ack = be32_at(old + 8);
	__u32 end = seq + segment->payload;
	int moves = segment->payload > 0 && later(end, next->up_nxt);
	struct options *options = &scratch->options;

	if (old[13] & FIN_RST_URG)
		return ASIDE_FROM_NOW;
	if ((old[13] & (SYN | ACK)) != ACK || !read_header(skb, segment, scratch))
		return aside(moves);
	if (!is_new(next->up_nxt, seq, end, bounded(next->server_edge, bounds.up)) ||
	    !is_between(next->client_acked, ack, next->down_nxt) ||
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
		put_be32(scratch, at + 6, echo);
		if (!later(seq, next->told_acked) && later(tsval, next->ts_recent))
			next->ts_recent = tsval;
	}
	put_be32(scratch, 8, ack - next->seq_delta);
	move_sack(scratch, next->seq_delta);
	if (segment->payload > 0)
		next->up_nxt = end;
	next->client_acked = ack;
	next->client_edge = ack + ((__u32)be16_at(old + 14) << (next->client_shift & 15));
	segment->edge = bounded(next->client_edge, bounds.down);
	if (segment->edge != next->client_edge)
		put_window(scratch, segment->edge, ack, next->client_shift);
	return PASSES;
}

/* Translates a server's segment for the client. */
static __always_inline int server_to_client(struct __sk_buff *skb, struct segment *segment,
					    struct scratch *scratch, struct conversation *next,
					    struct bounds bounds)
{
	__u8 *old = scratch->old;
	__u32 seq = be32_at(old + 4) + next->seq_delta, ack = be32_at(old + 8);
	__u32 end = seq + segment->payload;
	int moves = segment->payload > 0 && later(end, next->down_nxt);
	struct options *options = &scratch->options;
	__u32 edge;

	if (old[13] & FIN_RST_URG)
		return ASIDE_FROM_NOW;
	if ((old[13] & (SYN | ACK)) != ACK || !read_header(skb, segment, scratch))
		return aside(moves);
	if (options->timestamps && next->timestamps && !moves) {
		__u32 tsval = be32_at(old + (options->timestamps & 63) + 2);

		/* Also of a retransmission: the client may echo it. */
		if (later(tsval, next->server_tsval) || next->server_tsval == 0)
			next->server_tsval = tsval;
	}
	if (!is_new(next->down_nxt, seq, end, next->client_edge + 1) ||
	    !is_between(next->told_acked, ack, next->up_nxt) ||
	    (options->timestamps != 0) != (next->timestamps != 0))
		return aside(moves);
	if (options->timestamps) {
		__u32 at = options->timestamps & 63;
		__u32 tsval = be32_at(old + at + 2);

		if (later(tsval, next->server_tsval) || next->server_tsval == 0)
			next->server_tsval = tsval;
		if (later(tsval + next->ts_delta, next->told_tsval))
			next->told_tsval = tsval + next->ts_delta;
		put_be32(scratch, at + 2, next->told_tsval);
	}
	put_be32(scratch, 4, seq);
	edge = ack + ((__u32)be16_at(old + 14) << (next->server_shift & 15));
	if (later(edge, next->server_edge))
		next->server_edge = edge;
	next->told_acked = ack;
	segment->edge = bounded(next->server_edge, bounds.up);
	put_window(scratch, segment->edge, ack, next->told_shift);
	if (segment->payload > 0)
		next->down_nxt = end;
	return PASSES;
}

/* Whether the receiver takes the frame without verifying its TCP checksum, because a device has verified it or will fill it in.
 * Only the helper's behaviour tells of the latter: it leaves a partial checksum alone. -1 if the frame can't be written.
 */
static __always_inline int is_trusted(struct __sk_buff *skb, const struct segment *segment, struct scratch *scratch)
{
	__u32 at = segment->l4 + 16;
	__u16 now;

	if (bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY) >= 0)
		return 1;
	if (bpf_l4_csum_replace(skb, at, 0, 1, 0) || bpf_skb_load_bytes(skb, at, &now, sizeof(now)))
		return -1;
	if (now == *(half *)(scratch->old + 16))
		return 1;
	return bpf_skb_store_bytes(skb, at, scratch->old + 16, sizeof(now), 0) ? -1 : 0;
}

/* Writes the new TCP header, `address` over the address at offset `at` in the IP header, and both MACs. The helpers recognise
 * a partial checksum, in which only the address counts. -1 if the frame can't be written.
 */
static __always_inline int rewrite(struct __sk_buff *skb, struct segment *segment, struct scratch *scratch,
				   __u32 at, const __u8 *address, const __u8 *to_mac, const __u8 *from_mac)
{
	__u32 header = segment->header - TCP_LEAST;
	__u32 checksum = segment->l4 + 16;
	__u8 *ip = scratch->frame + ETHERNET;
	__u64 moved = 0;

	__builtin_memcpy(HALF(scratch->frame), HALF(to_mac), 6);
	__builtin_memcpy(HALF(scratch->frame + 6), HALF(from_mac), 6);
	/* Constant lengths in each family. */
	if (segment->version == 4) {
		__u32 sum;

		moved = exchanged(word_at(ip + (at & 31)), word_at(address));
		__builtin_memcpy(WORD(ip + (at & 31)), WORD(address), 4);
		sum = (__u16)~*(half *)(ip + 10) + ((__u32)moved & 0xffff) + ((__u32)moved >> 16) + (__u32)(moved >> 32);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		*(half *)(ip + 10) = ~sum;
		if (bpf_skb_store_bytes(skb, 0, scratch->frame, ETHERNET + 20, 0))
			return -1;
	} else {
		for (__u32 part = 0; part < 16; part += 4)
			moved += exchanged(word_at(ip + (at & 31) + part), word_at(address + part));
		__builtin_memcpy(WORD(ip + (at & 31)), WORD(address), 16);
		if (bpf_skb_store_bytes(skb, 0, scratch->frame, ETHERNET + 40, 0))
			return -1;
	}
	if (scratch->changed || scratch->options.filled) {
		__u32 changed = folded(scratch->changed);

		if (scratch->options.filled)
			changed = bpf_csum_diff((__be32 *)scratch->old, 60, (__be32 *)scratch->new, 60, 0);
		if (bpf_skb_store_bytes(skb, segment->l4, scratch->new, (header & 63) + TCP_LEAST, 0) ||
		    bpf_l4_csum_replace(skb, checksum, 0, changed, 0))
			return -1;
	}
	return bpf_l4_csum_replace(skb, checksum, 0, folded(moved), BPF_F_PSEUDO_HDR) ? -1 : 0;
}
