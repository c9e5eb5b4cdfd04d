#!/usr/bin/env bash
# Brings what the tests need: Debian packages (as root or through sudo) and a Python environment
# with the SMTP server's library. Idempotent, and a no-op of milliseconds when all of it is there.
#
#   tests/support/install.sh
#
#   TIMELINED_TEST_VENV   where the Python environment goes (default: target/test-venv)
#
# No package may start a service or create a database cluster: the tests start their own, in
# temporary directories, and a developer's machine should look the same afterwards.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${TIMELINED_TEST_VENV:-$root/target/test-venv}
# aiosmtpd and, pinned with it, the two packages that it draws in.
pins=(aiosmtpd==1.4.6 atpublic==9.0.0 attrs==26.1.0)
least_postgres=15

say() { printf 'install: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }

has_postgres_server() {
    local bin
    for bin in /usr/lib/postgresql/*/bin; do
        [[ -x $bin/postgres && $(basename "$(dirname "$bin")") -ge $least_postgres ]] && return
    done
    return 1
}

# Debian's own interpreter, whatever else stands first in PATH: `python3-venv` belongs to it.
python=/usr/bin/python3

# What is missing is decided by what can be used, not by the package database: it is faster, and
# right where a server came as `postgresql-16` or a compiler as `clang`.
missing_packages() {
    has_postgres_server || echo postgresql
    has psql || echo postgresql-client
    [[ -x $python ]] || echo python3
    # ensurepip is the part that Debian splits off into python3-venv.
    { [[ -x $python ]] && "$python" -c 'import ensurepip, venv' 2>/dev/null; } || echo python3-venv
    has strace || echo strace
    has pdftotext || echo poppler-utils
    [[ -e /usr/lib/$(uname -m)-linux-gnu/faketime/libfaketime.so.1 ]] || echo libfaketime
    has setpriv || echo util-linux
    has systemd-analyze || echo systemd
    has curl || echo curl
    has openssl || echo openssl
    [[ -s /etc/ssl/certs/ca-certificates.crt ]] || echo ca-certificates
    # For the bundled SQLite and the linker; an image with nothing but rustup has neither.
    has cc || printf '%s\n' gcc libc6-dev
    has make || echo make
}

as_root() {
    if [[ $EUID -eq 0 ]]; then "$@"; else sudo -- "$@"; fi
}

policy=/usr/sbin/policy-rc.d
createcluster=/etc/postgresql-common/createcluster.conf
laid_policy=
kept=

# Runs at every exit, so that a failed or interrupted installation leaves neither file behind.
put_back() {
    if [[ -n $laid_policy ]]; then
        as_root rm -f "$policy"
        laid_policy=
        if [[ -e $kept/policy-rc.d ]]; then as_root cp -p "$kept/policy-rc.d" "$policy"; fi
    fi
    if [[ -n $kept && -e $kept/createcluster.conf ]]; then
        as_root cp -p "$kept/createcluster.conf" "$createcluster"
    fi
    if [[ -n $kept ]]; then
        as_root rm -rf "$kept"
        kept=
    fi
}

forbid_service_starts() {
    # 101 is "forbidden". A policy that already says so (containers have one) is left alone.
    local answer=0
    if [[ -e $policy ]]; then
        "$policy" postgresql start >/dev/null 2>&1 || answer=$?
        [[ $answer -ne 101 ]] || return 0
        as_root cp -p "$policy" "$kept/policy-rc.d"
    fi
    laid_policy=yes
    # A rename, because the file may be asked at any moment, and never half written.
    printf '#!/bin/sh\nexit 101\n' >"$kept/deny"
    chmod 755 "$kept/deny"
    as_root install -m 755 -o root -g root "$kept/deny" "$policy.new"
    as_root mv "$policy.new" "$policy"
}

forbid_cluster() {
    # Laid before postgresql-common is unpacked: its server packages read it when configured.
    if [[ -e $createcluster ]]; then
        grep -Eq '^\s*create_main_cluster\s*=\s*false' "$createcluster" && return
        as_root cp -p "$createcluster" "$kept/createcluster.conf"
        printf '\ncreate_main_cluster = false\n' | as_root tee -a "$createcluster" >/dev/null
    else
        as_root mkdir -p "$(dirname "$createcluster")"
        printf '%s\n' \
            '# A server package creates no "main" cluster here; see createcluster.conf in' \
            '# /usr/share/postgresql-common for the other settings.' \
            'create_main_cluster = false' |
            as_root tee "$createcluster" >/dev/null
    fi
}

install_packages() {
    has apt-get || die "missing: $*; this is not Debian, so install their equivalents yourself"
    [[ $EUID -eq 0 ]] || has sudo ||
        die "missing: $*; run this as root, or install sudo"
    say "installing $*"
    kept=$(mktemp -d)
    trap put_back EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    forbid_service_starts
    forbid_cluster
    # The lock timeouts wait for another apt on the machine instead of failing at once.
    as_root apt-get -q -o DPkg::Lock::Timeout=300 update >&2
    # conffold: the createcluster.conf just laid stays; ucf and dpkg would otherwise ask.
    as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 \
        apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold \
        install --no-install-recommends "$@" </dev/null >&2
    put_back
}

install_venv() {
    local stamp=$venv/.stamp want
    want="$("$python" --version) ${pins[*]}"
    [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$want" ]] && return
    say "making $venv with ${pins[*]}"
    rm -rf "$venv"
    "$python" -m venv "$venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}" >&2
    # Last, so that an interrupted installation is done again.
    printf '%s\n' "$want" >"$stamp"
}

# Two runs at once (two checkouts, a CI job beside a developer) take turns. `flock` is in
# util-linux, which every Debian has, but another system may not.
mkdir -p "$(dirname "$venv")"
if has flock; then
    exec 9>"$venv.lock"
    flock 9
fi

mapfile -t packages < <(missing_packages)
if [[ ${#packages[@]} -gt 0 ]]; then
    install_packages "${packages[@]}"
    mapfile -t packages < <(missing_packages)
    [[ ${#packages[@]} -eq 0 ]] || die "still missing after the installation: ${packages[*]}"
fi
install_venv
