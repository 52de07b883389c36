/* SPDX-License-Identifier: GPL-3.0-only */
/* What the programs share with the daemon, one set of maps per service. */
#pragma once

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

/* Not preallocated: an idle service costs nothing, and only the daemon adds entries. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct key);
	__type(value, struct conversation);
} conversations SEC(".maps");

/* By the place of each conversation. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct bounds);
} bounds SEC(".maps");

/* Both directions of clients and OVM: the order of reservations is the service-wide order. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 25);
} ring SEC(".maps");

/* One per server that is not the OVM: what it sends can fill nothing else. */
#define RVM_RING(slot)                                \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_RINGBUF);   \
		__uint(max_entries, 1 << 20);         \
	} rvm_ring_##slot SEC(".maps")
RVM_RING(0);
RVM_RING(1);
RVM_RING(2);
RVM_RING(3);
RVM_RING(4);
RVM_RING(5);
RVM_RING(6);
RVM_RING(7);

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASONS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Where the options are that are translated; 0 if not there. Not on the stack: of what lies there, a 6.1
 * verifier believes to know what it is after a loop, from a single turn, and leaves out code.
 */
struct options {
	__u32 at, end;
	__u32 timestamps;
	__u32 sack, sack_length;
	__u32 malformed;
	__u32 to_fill; /* bytes of an option without translation that are left */
	__u32 filled; /* bytes were overwritten */
};

/* A TCP header before and after; too big for the stack beside all else. */
struct scratch {
	struct options options;
	/* What the new header adds to the old one's checksum, as long as no byte was overwritten. Never 0 if a word changed. */
	__u64 changed;
	__u8 padding[2];
	/* Ethernet and IP header, without options; the latter at a multiple of four. */
	__u8 frame[62];
	__u8 old[64];
	__u8 new[64];
	/* Room for reads that begin within the header. */
	__u8 beyond[64];
} __attribute__((aligned(8)));

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

static __always_inline void count(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &reason);
	if (counter)
		*counter += 1;
}

/* Whether the daemon has been away for so long that conversations go on without it. It may write its heartbeat on
 * another CPU at this very moment, so that it lies ahead of the time read here. */
static __always_inline int is_deserted(struct control *service)
{
	__s64 away = bpf_ktime_get_ns() - *(volatile __u64 *)&service->heartbeat_ns;

	return service->policy == SERVE && away >= (__s64)service->grace_ns;
}

/* Whether the kernel must deal with a segment that the daemon is to deal with. */
static __always_inline int is_unattended(struct control *service, struct conversation *known)
{
	return (known && known->passing == ALONE) || is_deserted(service);
}
