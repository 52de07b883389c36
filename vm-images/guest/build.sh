#!/bin/sh
# What runs in the domUs? Leaves `guest.cpio`: an initramfs with busybox, redis-server and nginx,
# that is also the root file system; and `guest-postgresql.cpio`, the same with PostgreSQL.
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

# The kernel unpacks one archive after the other.
tree=$scratch/postgresql
mkdir -p "$tree/usr/lib/x86_64-linux-gnu" "$tree/usr/lib64"
"$here/take.sh" "$scratch/root" "$here/postgresql/programs" "$tree"
sed 's/#.*//' "$here/postgresql/files" | while read -r path; do
    [ -z "$path" ] || (cd "$scratch/root" && cp -R --parents "$path" "$tree")
done
"$kernel/pack.sh" "$tree" "$scratch/postgresql.cpio"
cat "$out/guest.cpio" "$scratch/postgresql.cpio" >"$out/guest-postgresql.cpio"
