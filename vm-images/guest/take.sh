#!/bin/sh
# Copies programs and the libraries they need from an unpacked Debian: take.sh DEBIAN LIST TREE
set -eu
debian=$1
list=$2
tree=$3
sed 's/#.*//' "$list" | while read -r program; do
    [ -n "$program" ] || continue
    mkdir -p "$tree/$(dirname "$program")"
    cp -L "$debian/$program" "$tree/$program"
    chroot "$debian" /lib64/ld-linux-x86-64.so.2 --list "/$program" |
        sed -n 's:.*[[:space:]]\(/[^ ]*\) (0x.*:\1:p'
done | LC_ALL=C sort -u | while read -r library; do
    # Debian's libraries are all in /lib or /usr/lib, which are one here.
    target=$tree/usr/lib/x86_64-linux-gnu/${library##*/}
    case $library in
    */ld-linux-*) target=$tree/usr/lib64/${library##*/} ;;
    esac
    cp -L "$debian$library" "$target"
done
