#!/bin/sh
# What runs in the domUs? Leaves `guest.cpio`: an initramfs with busybox, redis-server and nginx,
# that is also the root file system.
set -eu
out=$1
scratch=$2
here=$(cd "$(dirname "$0")" && pwd)
kernel=$here/../kernel

"$kernel/sources.sh" >"$scratch/sources.list"
apt-config dump Acquire >"$scratch/apt.conf"
# Unpacked only: nothing of it is configured or run, but for the dynamic linker.
packages=$(sed 's/#.*//' "$here/packages" | xargs | tr ' ' ,)
mmdebstrap --variant=extract --mode=root --include="$packages" --aptopt="$scratch/apt.conf" \
    --format=directory bookworm "$scratch/root" "$scratch/sources.list"

tree=$scratch/guest
"$here/skeleton.sh" "$scratch/root" "$tree"
cp -R "$here/tree/." "$tree/"
"$here/take.sh" "$scratch/root" "$here/programs" "$tree"
"$kernel/select.sh" "$out/modules" "$here/modules" "$tree"
"$kernel/pack.sh" "$tree" "$out/guest.cpio"
