#!/bin/sh
# Which kernel do dom0 and the guests run? Debian's, the newest that this machine's apt knows.
# Leaves `vmlinuz`, the same unpacked as `vmlinux`, and `modules/lib/modules/<version>` (all of them and one
# of our own, spin; each image takes what it lists).
set -eu
out=$1
scratch=$2
here=$(cd "$(dirname "$0")" && pwd)

cd "$scratch"
package=$(apt-cache depends --no-recommends linux-image-amd64 | awk '/Depends: linux-image-/ { print $2 }')
[ -n "$package" ] || {
    echo "apt does not know linux-image-amd64: run apt-get update" >&2
    exit 1
}
version=${package#linux-image-}
headers=linux-headers-$version
apt-get -o APT::Sandbox::User=root download \
    "$package" "$headers" "${headers%-amd64}-common" "linux-kbuild-${version%%.0-*}"
for deb in *.deb; do
    dpkg-deb -x "$deb" unpacked
done
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
mkdir spin
cp "$here/spin.c" spin/
echo 'obj-m := spin.o' >spin/Makefile
sources=$scratch/unpacked/usr/src
sed -i "s:/usr/src:$sources:" "$sources/$headers/Makefile"
make -C "$sources/$headers" "M=$scratch/spin" modules
strip --strip-debug spin/spin.ko

mkdir -p "$out/modules"
mv unpacked/lib "$out/modules/"
cp spin/spin.ko "$out/modules/lib/modules/$version/kernel/"
depmod -b "$out/modules" "$version"
