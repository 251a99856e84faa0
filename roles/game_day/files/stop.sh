#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# Units are stopped and stay so. Environment: UNITS.
set -eu
# shellcheck disable=SC2086
case $1 in
begin) systemctl stop $UNITS ;;
hold) exec sleep infinity ;;
end) systemctl start $UNITS ;;
esac
