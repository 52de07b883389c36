#!/bin/sh
# Makes a plain Debian the lab's dom0: customize.sh ROOT IMAGES
set -eu
root=$1
images=$2
here=$(cd "$(dirname "$0")" && pwd)

cp -R "$here/tree/." "$root/"
"$here/../kernel/select.sh" "$images/modules" "$here/modules" "$root"
mkdir -p "$root/srv/guests"
cp "$images/vmlinux" "$images"/guest*.cpio "$root/srv/guests/"

# Who may come in is said at each boot, by the lab (see tree/.../lab-keys).
rm -f "$root"/etc/ssh/ssh_host_*
: >"$root/etc/machine-id"
echo dom0 >"$root/etc/hostname"
echo '127.0.0.1 localhost dom0' >"$root/etc/hosts"
: >"$root/etc/fstab"

chroot "$root" systemctl --quiet enable lab-keys.service lab-network.service ssh.service
chroot "$root" systemctl --quiet disable xendomains.service 2>/dev/null || true
# Nothing here runs long enough for these, and each costs seconds in emulation.
chroot "$root" systemctl --quiet mask \
    systemd-udev-trigger.service getty-static.service getty.target systemd-sysusers.service \
    systemd-journal-flush.service modprobe@configfs.service modprobe@dm_mod.service \
    modprobe@efi_pstore.service modprobe@fuse.service systemd-remount-fs.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer xendomains.service getty@.service \
    serial-getty@.service console-getty.service systemd-update-utmp.service \
    systemd-random-seed.service systemd-tmpfiles-clean.timer ldconfig.service

# What differs from one build to the next and nobody reads.
rm -rf "$root"/var/cache/ldconfig/* "$root"/var/log/*.log "$root"/var/log/apt \
    "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old \
    "$root"/var/lib/dpkg/*-old "$root"/var/lib/systemd/random-seed
