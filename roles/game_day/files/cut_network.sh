#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# The host reaches the broker no more; packets are lost without a word. Environment: TARGETS, CELERY_BROKER_URL.
set -eu
case $1 in
begin)
    python3 -I -c '
import os, re, socket

names = os.environ["TARGETS"].split()
names += re.findall(r"://(?:[^@/;]*@)?([^:/;]+)", os.environ.get("CELERY_BROKER_URL", ""))
found = {info[4][0] for name in names for info in socket.getaddrinfo(name, None, socket.AF_INET)}
print("\n".join(sorted(found)))
' >wanted
    while read -r address; do
        case $(ip route get "$address") in
        local*) echo "$address, that of the broker, is this host's own: nothing can be cut" >&2 && exit 1 ;;
        esac
    done <wanted
    while read -r address; do
        ip route add blackhole "$address/32"
        echo "$address" >>told
    done <wanted
    ;;
hold) exec sleep infinity ;;
end)
    [ -e told ] || exit 0
    while read -r address; do
        ip route del blackhole "$address/32" || [ -z "$(ip route show type blackhole "$address/32")" ]
    done <told
    ;;
esac
