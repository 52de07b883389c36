#!/bin/sh
# Which kernel do dom0 and the guests run? Debian's, the newest that this machine's apt knows.
# Leaves `vmlinuz`, the same unpacked as `vmlinux`, and `modules/lib/modules/<version>` (all of them; each
# image takes what it lists).
set -eu
out=$1
scratch=$2

cd "$scratch"
package=$(apt-cache depends --no-recommends linux-image-amd64 | awk '/Depends: linux-image-/ { print $2 }')
[ -n "$package" ] || {
    echo "apt does not know linux-image-amd64: run apt-get update" >&2
    exit 1
}
apt-get -o APT::Sandbox::User=root download "$package"
dpkg-deb -x "$package"_*.deb unpacked
dpkg-query --showformat='${Package} ${Version}\n' --show "$package" 2>/dev/null ||
    dpkg-deb --show "$package"_*.deb
cp unpacked/boot/vmlinuz-* "$out/vmlinuz"
# The guests': to unpack it takes `xl create` 16 s in emulation. Where it is, the header says
# (Documentation/arch/x86/boot.rst); its length follows it in four bytes.
header() {
    od -An "-t$1" "-j$2" "-N${1#u}" "$out/vmlinuz" | tr -d ' '
}
begin=$((($(header u1 497) + 1) * 512 + $(header u4 584)))
tail -c "+$((begin + 1))" "$out/vmlinuz" | head -c "$(($(header u4 588) - 4))" | xz -dc >"$out/vmlinux"
mkdir -p "$out/modules"
mv unpacked/lib "$out/modules/"
depmod -b "$out/modules" "${package#linux-image-}"
