#!/bin/sh
# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# On a host: build one release. Either it is complete at the end, with its marker, or nothing is left of it.
# From the environment: ROOT RELEASE APP APP_USER APP_GROUP CONFIG_DIR PYTHON REQUIREMENTS SOURCE_TYPE SOURCE_URL
# SOURCE_VERSION SOURCE_DIGEST RUNTIME_DIGEST WHEELHOUSE_DIGEST INCOMING SOURCE_JSON
set -eu
umask 022
shared=$ROOT/shared
dir=$ROOT/releases/$RELEASE
work=
built=
fail() { echo "release $RELEASE: $*" >&2; exit 1; }

# A build that is interrupted by SIGKILL leaves a release without its marker; the next build starts from nothing.
exec 9>"$shared/.build.lock"
flock 9
if [ -e "$dir/.complete" ]; then
    rm -rf "$INCOMING"
    exit 0
fi
cleanup() {
    [ -n "$built" ] || rm -rf "$dir"
    rm -rf "$work" "$INCOMING"
}
trap cleanup EXIT
trap 'exit 130' HUP INT TERM
rm -rf "$dir"
mkdir -p "$dir/src"
work=$(mktemp -d "$ROOT/releases/.work.XXXXXX")
chown "$APP_USER:$APP_GROUP" "$work" "$dir" "$dir/src"

# Live workers come first; the application's own build code never runs as root.
low() { nice -n 19 ionice -c 3 "$@"; }
as_user() { low runuser -u "$APP_USER" -- env HOME="$work" TMPDIR="$work" "$@"; }
# Says the end of the log only, where pip names the reason.
logged() {
    what=$1
    shift
    "$@" >"$work/log" 2>&1 || fail "$what failed: $(grep -v '^\[notice\]\|^WARNING: Location' "$work/log" | tail -n 12)"
}

# Packs are kept under their digest, so that the next release does not need them again.
unpack() {
    [ -n "$2" ] || return 0
    if [ ! -d "$shared/$1-$2" ]; then
        [ -e "$INCOMING/$1-$2.tar" ] || fail "$1-$2.tar did not reach this host"
        rm -rf "$shared/.$1-$2"
        mkdir "$shared/.$1-$2"
        tar -xf "$INCOMING/$1-$2.tar" --no-same-owner -C "$shared/.$1-$2"
        mv "$shared/.$1-$2" "$shared/$1-$2"
    fi
}
unpack wheelhouse "$WHEELHOUSE_DIGEST"
unpack runtime "$RUNTIME_DIGEST"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_NO_WARN_SCRIPT_LOCATION=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
if [ -n "$WHEELHOUSE_DIGEST" ]; then
    PIP_NO_INDEX=1
    PIP_FIND_LINKS=$shared/wheelhouse-$WHEELHOUSE_DIGEST
    export PIP_NO_INDEX PIP_FIND_LINKS
fi

# One pip for all releases of the host.
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "celeryops_python: $PYTHON does not run"
tools=$shared/tools-$version
if [ ! -e "$tools/.complete" ]; then
    rm -rf "$tools"
    logged "making a virtual environment with $PYTHON (Debian has it in python3-venv)" low "$PYTHON" -m venv "$tools"
    : >"$tools/.complete"
fi
case $SOURCE_TYPE in
git)
    command -v git >/dev/null || fail "git is not installed on this host (apt-get install git)"
    logged "fetching $SOURCE_VERSION" low git init -q --bare "$work/repo"
    # The one commit if the server gives it, else everything that it names.
    low git -C "$work/repo" fetch -q --depth 1 -- "$SOURCE_URL" "$SOURCE_VERSION" >/dev/null 2>&1 ||
        logged "fetching $SOURCE_VERSION" low git -C "$work/repo" fetch -q -- "$SOURCE_URL" '+refs/*:refs/*'
    git -C "$work/repo" rev-parse -q --verify "$SOURCE_VERSION^{commit}" >/dev/null 2>&1 ||
        fail "celeryops_release_src_version: the repository has no $SOURCE_VERSION"
    git -C "$work/repo" archive "$SOURCE_VERSION" | tar -xf - --no-same-owner -C "$dir/src"
    ;;
*) tar -xf "$INCOMING/source-$SOURCE_DIGEST.tar" --no-same-owner -C "$dir/src" ;;
esac
[ -e "$dir/src/$REQUIREMENTS" ] || fail "celeryops_release_requirements: the source holds no $REQUIREMENTS"

chown -R "$APP_USER:$APP_GROUP" "$dir"
logged "making the virtual environment" as_user "$PYTHON" -m venv --without-pip "$dir/venv"
logged "installing $REQUIREMENTS" as_user "$tools/bin/pip" --python "$dir/venv/bin/python" install -q \
    -r "$dir/src/$REQUIREMENTS" "$shared/runtime-$RUNTIME_DIGEST"/celeryops-*.whl
# Only to start quicker; a file that does not compile may be one that nobody imports.
as_user "$dir/venv/bin/python" -m compileall -q "$dir/src" >/dev/null 2>&1 || true
chown -R root:root "$dir"

# The import check, in the environment that the workers will have.
command="systemd-run --quiet --pipe --wait --collect --expand-environment=no"
systemd-run --help 2>&1 | grep -q expand-environment || command="systemd-run --quiet --pipe --wait --collect"
$command --property=User="$APP_USER" --property=Group="$APP_GROUP" --property=EnvironmentFile="$CONFIG_DIR/secret.env" \
    --property=WorkingDirectory="$dir/src" --property=Nice=19 --property=PrivateTmp=true --setenv=CELERYOPS_RELEASE="$RELEASE" \
    --setenv=PYTHONDONTWRITEBYTECODE=1 --property=RuntimeMaxSec=300 "$dir/venv/bin/python" -m celeryops.describe -A "$APP" \
    >"$work/release.json" 2>"$work/log" </dev/null || fail "$(tail -n 5 "$work/log" | grep . || echo "$APP does not import")"
"$PYTHON" -I -c 'import json, sys
described = json.load(open(sys.argv[1]))
described["source"] = json.loads(sys.argv[2])
json.dump(described, open(sys.argv[3], "w"), indent=2)' "$work/release.json" "$SOURCE_JSON" "$dir/release.json"
sync -f "$dir"
: >"$dir/.complete"
built=1
# Older packs are of no use to anybody.
for pack in "$shared"/wheelhouse-* "$shared"/runtime-*; do
    case ${pack##*/} in
    "wheelhouse-$WHEELHOUSE_DIGEST" | "runtime-$RUNTIME_DIGEST") ;;
    *) rm -rf "$pack" ;;
    esac
done
echo "built"
