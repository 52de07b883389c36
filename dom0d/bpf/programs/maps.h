/* SPDX-License-Identifier: GPL-3.0-only */
/* The maps that the programs share with the daemon: one set per service. */
#pragma once

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

/* Not preallocated, so that an idle service costs nothing. Only the daemon adds entries. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct key);
	__type(value, struct conversation);
} conversations SEC(".maps");

/* By the index in each conversation's entry. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct bounds);
} bounds SEC(".maps");

/* Both directions of clients and OVM: the order of reservations is the order of the record. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 25);
} ring SEC(".maps");

/* One ring per server that is not the OVM: what it sends can fill nothing else (rule 4). */
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

/* Offsets of the options that are translated; 0 if absent. Not on the stack: after a loop the 6.1 verifier trusts values there
 * that it saw in a single iteration, and removes code.
 */
struct options {
	__u32 at, end;
	__u32 timestamps;
	__u32 sack, sack_length;
	__u32 malformed;
	__u32 to_fill; /* bytes still to overwrite of an option without translation */
	__u32 filled; /* 1 if bytes were overwritten */
};

/* A TCP header before and after translation; too large for the stack. */
struct scratch {
	struct options options;
	/* What the new header adds to the old one's checksum, if no option was overwritten. Not 0 if a word changed. */
	__u64 changed;
	__u8 padding[2];
	/* Ethernet and IP header without options. The padding before it aligns the IP header to four bytes. */
	__u8 frame[62];
	__u8 old[64];
	__u8 new[64];
	/* Room for reads that begin within the header and end behind it. */
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

/* Whether the daemon has been away for so long that conversations continue without it. The difference is signed: the daemon may
 * write its heartbeat on another CPU after the time was read here. */
static __always_inline int is_deserted(struct control *service)
{
	__s64 away = bpf_ktime_get_ns() - *(volatile __u64 *)&service->heartbeat_ns;

	return service->policy == SERVE && away >= (__s64)service->grace_ns;
}

/* Whether the kernel must handle a segment that the daemon would otherwise handle. */
static __always_inline int is_unattended(struct control *service, struct conversation *known)
{
	return (known && known->passing == ALONE) || is_deserted(service);
}
