// SPDX-License-Identifier: GPL-3.0-only
/* The tc programs. They record a segment before they forward it (rule 2), forward nothing under an older epoch (rule 1), and
 * put a replica's frames into its own ring only (rule 4). The verifier of kernel 6.1 must accept them: no TCX, no dynptr, no
 * open-coded iterators.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "layout.h"
#include "maps.h"
#include "parse.h"
#include "record.h"
#include "translate.h"
#include "client.h"
#include "server.h"

SEC("classifier")
int client(struct __sk_buff *skb)
{
	return from_client(skb);
}

SEC("classifier")
int server(struct __sk_buff *skb)
{
	return from_server(skb);
}

/* Some helpers are for programs under a GPL-compatible licence only. */
char LICENSE[] SEC("license") = "GPL";
