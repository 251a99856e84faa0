#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Build the image of the test hosts (Debian 12 with systemd and sshd) from Debian packages, once per version of this
# file; prints its name. Needs root, mmdebstrap and podman.
set -eu
version=$(sha256sum "$0" | cut -c1-12)
image=localhost/celeryops-systemd:$version
if podman image exists "$image"; then
    echo "$image"
    exit 0
fi
exec 9>/run/lock/celeryops-image.lock
flock 9
if ! podman image exists "$image"; then
    echo "building the image of the test hosts (about a minute)" >&2
    tar=$(mktemp --suffix=.tar)
    trap 'rm -f "$tar"' EXIT
    trap 'exit 130' INT TERM
    # The package lists and the archives of what roles and tests install stay in the image: apt is the real one, but
    # asks the mirror only once the lists are older than its cache_valid_time.
    # shellcheck disable=SC2016
    mmdebstrap --quiet --variant=minbase --components=main \
        --include=systemd,systemd-sysv,dbus,openssh-server,python3,python3-venv,python3-apt,sudo,iproute2,procps \
        --include=ca-certificates,git,rsync \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --skip=cleanup/apt,cleanup/tmp \
        --customize-hook='chroot "$1" apt-get clean' \
        --customize-hook='chroot "$1" apt-get install -qq -y --no-install-recommends --download-only redis-server redis-sentinel logrotate rabbitmq-server >/dev/null' \
        --customize-hook='systemctl --root="$1" -q enable ssh' \
        --customize-hook='rm -f "$1"/etc/ssh/ssh_host_*; : > "$1/etc/machine-id"' \
        --customize-hook='printf "UseDNS no\nUsePAM yes\nMaxStartups 100:30:200\nMaxSessions 100\n" > "$1/etc/ssh/sshd_config.d/fleet.conf"' \
        --customize-hook='printf "[Unit]\nBefore=ssh.service\nConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\n[Service]\nType=oneshot\nExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key\n[Install]\nWantedBy=multi-user.target\n" > "$1/etc/systemd/system/ssh-keygen.service"; systemctl --root="$1" -q enable ssh-keygen' \
        --customize-hook='ln -sf /dev/null "$1/etc/systemd/system/apt-daily.timer"; ln -sf /dev/null "$1/etc/systemd/system/apt-daily-upgrade.timer"' \
        bookworm "$tar" >&2
    podman import -q --change 'CMD ["/lib/systemd/systemd"]' --change 'STOPSIGNAL SIGRTMIN+3' "$tar" "$image" >/dev/null
fi
echo "$image"
