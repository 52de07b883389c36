#!/bin/sh
# Packs a tree as an initramfs, the same bytes from the same tree: pack.sh TREE FILE
# Not compressed: to unpack costs more in emulation than to read.
set -eu
cd "$1"
find . -exec touch --no-dereference --date=@"$SOURCE_DATE_EPOCH" {} +
find . | LC_ALL=C sort | cpio --quiet --reproducible --owner=+0:+0 -o -H newc >"$2"
