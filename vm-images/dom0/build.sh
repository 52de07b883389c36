#!/bin/sh
# What does the lab's host boot? Leaves `xen` (the hypervisor, ungzipped), `dom0.initrd` and
# `dom0.ext4`, the root file system: Debian 12 with Xen 4.17's tools, and the guests' files.
set -eu
out=$1
scratch=$2
here=$(cd "$(dirname "$0")" && pwd)
kernel=$here/../kernel

"$kernel/sources.sh" >"$scratch/sources.list"
apt-config dump Acquire >"$scratch/apt.conf"
packages=$(sed 's/#.*//' "$here/packages" | xargs | tr ' ' ,)
mmdebstrap --variant=minbase --mode=root --include="$packages" \
    --aptopt="$scratch/apt.conf" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --customize-hook="$here/customize.sh \"\$1\" $out" \
    bookworm "$scratch/root.tar" "$scratch/sources.list"
tar -xOf "$scratch/root.tar" ./var/lib/dpkg/status |
    awk '/^Package:/ { p = $2 } /^Version:/ { print p, $2 }' >"$out/dom0.packages"

# Unpacked in the order of the archive on a file system of its own, so that the image does not take
# over how this machine's file system orders its folders.
mkdir "$scratch/root"
unshare --mount sh -eu -s "$scratch" <<'INSIDE'
mount -t tmpfs -o size=2g,mode=755 root "$1/root"
tar -xf "$1/root.tar" -C "$1/root" --numeric-owner --xattrs --xattrs-include='*'
gzip -dc "$1"/root/boot/xen-4.17-amd64.gz >"$1/xen"
rm -rf "$1"/root/boot/*
find "$1/root" -exec touch --no-dereference --date=@"$SOURCE_DATE_EPOCH" {} +
E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -t ext4 -O ^metadata_csum_seed -L dom0 -m 0 \
    -U 5c1e6a2e-3c56-4a8e-9d5b-7a0f2a1d0001 \
    -E hash_seed=5c1e6a2e-3c56-4a8e-9d5b-7a0f2a1d0002,lazy_itable_init=1,lazy_journal_init=1 \
    -d "$1/root" "$1/dom0.ext4" 3g
INSIDE
mv "$scratch/xen" "$out/xen"
mv "$scratch/dom0.ext4" "$out/dom0.ext4"

"$here/initrd/build.sh" "$out" "$scratch"
