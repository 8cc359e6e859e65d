#!/bin/sh
# Installs the Debian packages named (or listed in files named with @) that are not there yet.
# Quick and silent when all are.
set -eu

wanted=
for name in "$@"; do
    case $name in
    @*) wanted="$wanted $(cat "${name#@}")" ;;
    *) wanted="$wanted $name" ;;
    esac
done

missing=
for name in $wanted; do
    case $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null || true) in
    installed) ;;
    *) missing="$missing $name" ;;
    esac
done
[ -n "$missing" ] || exit 0

echo "installing:$missing" >&2
if ! command -v apt-get >/dev/null; then
    echo "this is not Debian: install these by hand:$missing" >&2
    exit 1
fi
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get -q update >&2
# shellcheck disable=SC2086 # a list of words
$as_root apt-get -q -y install --no-install-recommends $missing >&2
