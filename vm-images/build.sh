#!/bin/sh
# Where are the finished images? Prints the directory that holds them, and builds them first if this
# recipe was not built before. Progress goes to standard error.
#
# Needs root on Debian 12 and the packages mmdebstrap, e2fsprogs, cpio, kmod, xz-utils, binutils, gcc-12
# and make. But for one module, kernel/spin.c, everything in the images comes from the Debian sources that
# this machine's apt uses; run `apt-get update` before.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/understudy/vm-images

# A recipe is its files, with their modes. Documentation does not change an image.
key=$(cd "$here" && find . -type f ! -name '*.md' -printf '%m %p\n' | LC_ALL=C sort |
    while read -r mode path; do
        printf '%s %s %s\n' "$mode" "$path" "$(sha256sum <"$path")"
    done | sha256sum | cut -c1-16)
images=$cache/$key
if [ "${1-}" = --where ]; then
    echo "$images"
    exit
fi

mkdir -p "$cache"
# One build at a time; who comes second finds the first one's result.
exec 9>"$cache/lock"
flock 9
if [ ! -e "$images/complete" ]; then
    work=$(mktemp -d "$cache/building.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM HUP
    # The same bytes from the same packages: one instant for every file, one order, one umask.
    export SOURCE_DATE_EPOCH=1735689600 LC_ALL=C TZ=UTC
    umask 022
    for part in kernel guest dom0; do
        begun=$(date +%s)
        echo "vm-images: building $part" >&2
        mkdir "$work/$part.scratch"
        "$here/$part/build.sh" "$work" "$work/$part.scratch" >"$work/$part.log" 2>&1 || {
            tail -n 40 "$work/$part.log" >&2
            echo "vm-images: building $part failed; the end of its log is above" >&2
            exit 1
        }
        rm -rf "$work/$part.scratch"
        echo "vm-images: $part took $(($(date +%s) - begun)) s" >&2
    done
    : >"$work/complete"
    rm -rf "$images"
    chmod 755 "$work"
    mv "$work" "$images"
    # Only the newest three builds are kept.
    ls -1dt "$cache"/*/ | tail -n +4 | xargs -r rm -rf
fi
touch "$images"
echo "$images"
