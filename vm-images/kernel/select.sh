#!/bin/sh
# Copies the listed modules, and what they depend on, into a tree, with an index of just these.
#   select.sh ALL LIST TREE
# ALL and TREE hold lib/modules/<version>; LIST names one module a line, or a folder by its slash.
set -eu
all=$1
list=$2
tree=$3

version=$(ls "$all/lib/modules")
base=lib/modules/$version
cd "$all"
sed 's/#.*//' "$list" | while read -r name; do
    case $name in
    '') ;;
    */) find "$base/kernel/$name" -name '*.ko' | sed 's:.*/::; s:\.ko$::' ;;
    *) echo "$name" ;;
    esac
done | xargs modprobe -d "$all" -S "$version" --all --show-depends --ignore-install |
    # Parts of the kernel itself are listed as "builtin".
    awk '$1 == "insmod" { print $2 }' | sed "s:^.*/$base/:$base/:" | sort -u |
    cpio --quiet -pdm "$tree"
cp "$base/modules.order" "$base/modules.builtin" "$base/modules.builtin.modinfo" "$tree/$base/"
depmod -b "$tree" "$version"
