#!/bin/sh
# An empty merged-/usr root with busybox in it: skeleton.sh DEBIAN TREE
set -eu
debian=$1
tree=$2
mkdir -p "$tree/usr/bin" "$tree/usr/sbin" "$tree/usr/lib64" "$tree/usr/lib/x86_64-linux-gnu" \
    "$tree/dev" "$tree/proc" "$tree/sys" "$tree/run" "$tree/tmp" "$tree/etc" "$tree/var/log"
for name in bin sbin lib lib64; do
    ln -s "usr/$name" "$tree/$name"
done
ln -s ../run "$tree/var/run"
cp "$debian/bin/busybox" "$tree/usr/bin/busybox"
