/* SPDX-License-Identifier: GPL-3.0-only */
/* Copies a packet into a ring before anything else is done with it: without a record it is not forwarded (rule 2).
 *
 * Records have few sizes, because a reservation's size must be a constant.
 */
#pragma once

#define SMALL 128
#define MIDDLE 512
#define FULL 2048
#define LARGE 16384
#define LONGEST 65536

/* Reserves, copies and submits one record of `size` bytes in the map `to`. It reads the active server again after the
 * reservation, whose lock is a barrier: a daemon that changed the active server and then found the ring empty has seen
 * every record that says "forwarded".
 */
#define RECORD(to, size)                                                                      \
	do {                                                                                  \
		struct {                                                                      \
			struct record head;                                                   \
			__u8 packet[size];                                                    \
		} *entry = bpf_ringbuf_reserve(&to, sizeof(struct record) + size, 0);         \
		if (!entry)                                                                   \
			return -1;                                                            \
		if (flags & FORWARDED && *(volatile __u64 *)&service->active != active) {     \
			flags &= ~FORWARDED;                                                  \
			count(COUNT_LATE_FENCE);                                              \
		}                                                                             \
		entry->head.length = length;                                                  \
		entry->head.flags = flags;                                                    \
		entry->head.slot = slot;                                                      \
		entry->head.epoch = active >> 8;                                              \
		__builtin_memcpy(entry->head.source_mac, segment->source_mac, 6);             \
		entry->head.padding = 0;                                                      \
		entry->head.edge = segment->edge;                                                  \
		if (bpf_skb_load_bytes(skb, ETHERNET, entry->packet,                          \
				       ((length - 1) & (size - 1)) + 1)) {                    \
			bpf_ringbuf_discard(entry, BPF_RB_NO_WAKEUP);                         \
			return -1;                                                            \
		}                                                                             \
		bpf_ringbuf_submit(entry, wake);                                              \
		return flags;                                                                 \
	} while (0)

#define RECORD_BY_SIZE(to)                \
	do {                              \
		if (length <= SMALL)      \
			RECORD(to, SMALL); \
		if (length <= MIDDLE)     \
			RECORD(to, MIDDLE); \
		if (length <= FULL)       \
			RECORD(to, FULL); \
		if (length <= LARGE)      \
			RECORD(to, LARGE); \
		RECORD(to, LONGEST);      \
	} while (0)

/* Returns the flags as recorded, or -1 if there was no room. */
static __noinline int record(struct __sk_buff *skb, struct segment *segment, struct control *service,
			     __u64 active, __u32 slot_and_flags)
{
	__u32 slot = slot_and_flags >> 16;
	__u32 flags = slot_and_flags & 0xffff;
	/* A passed segment waits for the daemon's next look; one that the daemon must forward wakes it. */
	__u64 wake = flags & FORWARDED ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP;
	__u32 length;

	if (!segment || !service)
		return -1;
	length = segment->ip_length;
	RECORD_BY_SIZE(ring);
}

#define RVM_RECORD(at)                                                                            \
	static __noinline int rvm_record_##at(struct __sk_buff *skb, struct segment *segment,     \
					      struct control *service, __u64 active)              \
	{                                                                                         \
		__u32 slot = at, flags = 0, length;                                               \
		__u64 wake = 0;                                                                   \
		if (!segment || !service)                                                         \
			return -1;                                                                \
		length = segment->ip_length;                                                      \
		if (length <= SMALL)                                                              \
			RECORD(rvm_ring_##at, SMALL);                                             \
		if (length <= FULL)                                                               \
			RECORD(rvm_ring_##at, FULL);                                              \
		RECORD(rvm_ring_##at, LONGEST);                                                   \
	}
RVM_RECORD(0)
RVM_RECORD(1)
RVM_RECORD(2)
RVM_RECORD(3)
RVM_RECORD(4)
RVM_RECORD(5)
RVM_RECORD(6)
RVM_RECORD(7)

static __always_inline int rvm_record(struct __sk_buff *skb, struct segment *segment,
				      struct control *service, __u64 active, __u32 slot)
{
	switch (slot) {
	case 0:
		return rvm_record_0(skb, segment, service, active);
	case 1:
		return rvm_record_1(skb, segment, service, active);
	case 2:
		return rvm_record_2(skb, segment, service, active);
	case 3:
		return rvm_record_3(skb, segment, service, active);
	case 4:
		return rvm_record_4(skb, segment, service, active);
	case 5:
		return rvm_record_5(skb, segment, service, active);
	case 6:
		return rvm_record_6(skb, segment, service, active);
	default:
		return rvm_record_7(skb, segment, service, active);
	}
}
