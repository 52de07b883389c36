#!/bin/sh
# Leaves `dom0.initrd`: what finds the root disk.
set -eu
out=$1
scratch=$2
here=$(cd "$(dirname "$0")" && pwd)
kernel=$here/../../kernel

tree=$scratch/initrd
mkdir -p "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/root"
cd "$scratch"
apt-get -o APT::Sandbox::User=root download busybox-static
dpkg-deb --fsys-tarfile busybox-static_*.deb | tar -xO ./bin/busybox >"$tree/bin/busybox"
chmod 755 "$tree/bin/busybox"
install -m 755 "$here/init" "$tree/init"
"$kernel/select.sh" "$out/modules" "$here/modules" "$tree"
"$kernel/pack.sh" "$tree" "$out/dom0.initrd"
