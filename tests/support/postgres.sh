#!/usr/bin/env bash
# A private PostgreSQL for one test run: its own cluster, in a directory of its own, on a free port
# of 127.0.0.1, gone without trace afterwards.
#
#   tests/support/postgres.sh [POSTGRES_OPTION…]      such as  -c shared_buffers=1GB
#
# Prints one line when it serves, `postgres://timelined@127.0.0.1:PORT/postgres`, and then follows
# its standard input: `stop` stops the server (fast) and prints `stopped`, `start` starts it on the
# same port and prints `started`, and the end of the input ends everything. The kernel closes that
# pipe when a test process dies, however it dies, so no cluster outlives its tests.
#
#   PG_FSYNC=on   writes reach the disk (default off: nobody needs this data after a power cut)
#   TMPDIR        where the directory is made; the unprivileged user must be able to enter it
set -euo pipefail

fsync=${PG_FSYNC:-off}
# Anything else named PG… would steer initdb or the server to somebody's real cluster.
unset "${!PG@}"
export LC_ALL=C.UTF-8 TZ=UTC

say() { printf 'postgres.sh: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# The newest one: 16 sorts after 9.6 and 15.
bin=$(printf '%s\n' /usr/lib/postgresql/*/bin/postgres | sort -V | tail -n 1)
[[ -x $bin ]] || die "no PostgreSQL in /usr/lib/postgresql; run tests/support/install.sh"
bin=$(dirname "$bin")

# The server refuses to run as root.
unprivileged=()
owner=
if [[ $EUID -eq 0 ]]; then
    owner=postgres
    id -u "$owner" >/dev/null 2>&1 || owner=nobody
    unprivileged=("--reuid=$owner" "--regid=$(id -g "$owner")" --clear-groups)
fi

dir=
server=
port=

# Waits for the server's end. A trapped signal interrupts `wait`, hence the loop.
reap() {
    while kill -0 "$server" 2>/dev/null; do wait "$server" 2>/dev/null || true; done
    server=
}

clean_up() {
    # A second signal must not interrupt the removal.
    trap '' INT TERM HUP PIPE
    # QUIT is an immediate shutdown: the postmaster ends its children and waits for them.
    if [[ -n $server ]]; then
        kill -QUIT "$server" 2>/dev/null || true
        reap
    fi
    if [[ -n $dir ]]; then rm -rf "$dir"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP PIPE

# Starts the server on $port; fails when it ends before it is ready.
launch() {
    # Not pg_ctl: as our own child the server gets QUIT from the kernel even if this shell is
    # killed with -9. It must not hold our stdin and stdout, whose ends others wait for.
    setpriv --pdeathsig QUIT "${unprivileged[@]}" "$bin/postgres" -D "$dir/data" -p "$port" "$@" \
        </dev/null >>"$dir/log" 2>&1 &
    server=$!
    local status
    while true; do
        # What pg_ctl looks at, too: line 8 of the file says `ready` once connections are
        # accepted, line 1 that it is this server's and not a predecessor's.
        status=()
        if [[ -s $dir/data/postmaster.pid ]]; then
            mapfile -t status <"$dir/data/postmaster.pid" 2>/dev/null || true
        fi
        if [[ ${status[0]-} == "$server" && ${status[7]-} == ready* ]]; then return 0; fi
        if ! kill -0 "$server" 2>/dev/null; then
            reap
            return 1
        fi
        sleep 0.02
    done
}

stop() {
    [[ -n $server ]] || return 0
    # INT is the fast shutdown: sessions are ended, and a checkpoint is written.
    kill -INT "$server" 2>/dev/null || true
    reap
}

start() {
    [[ -z $server ]] || return 0
    # Another process may hold the port for a moment.
    local tries
    for tries in {1..50}; do
        launch "$@" && return 0
        sleep 0.1
    done
    tail -n 5 "$dir/log" >&2
    die "the server did not start again on port $port after $tries tries"
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/timelined-pg.XXXXXX")
# The limit of a unix socket's path is 107 bytes.
[[ ${#dir} -le 80 ]] || die "$dir is too long a path for a unix socket; set TMPDIR to a shorter one"
if [[ -n $owner ]]; then chown "$owner" "$dir"; fi
# initdb and the server must be able to enter the working directory.
cd "$dir"

setpriv --pdeathsig KILL "${unprivileged[@]}" "$bin/initdb" -D "$dir/data" -U timelined -A trust \
    -E UTF8 --locale=C.UTF-8 --no-sync --no-instructions </dev/null >"$dir/log" 2>&1 || {
    cat "$dir/log" >&2
    die "initdb failed in $dir (may ${owner:-this user} enter it?)"
}

# What is not named here keeps its default, as on a real server.
cat >>"$dir/data/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$dir'
fsync = $fsync
full_page_writes = $fsync
max_connections = 200
shared_buffers = 32MB
timezone = 'UTC'
# In files below the data directory, so that even a kill -9 leaves nothing in /dev/shm.
dynamic_shared_memory_type = mmap
log_min_messages = fatal
log_min_error_statement = panic
CONF

# A port cannot be reserved and handed over, so the server's own bind decides, and another number
# is drawn when it was taken. Below 32768, where the kernel takes ports for outgoing connections
# and for `bind` to port 0: nobody is given our port by chance while the server is stopped.
for _ in {1..20}; do
    port=$((20000 + SRANDOM % 12000))
    if launch "$@"; then break; fi
done
if [[ -z $server ]]; then
    tail -n 20 "$dir/log" >&2
    die "the server did not start"
fi

# Nobody may be there to read it any more: then it is time to end, and nothing to complain of.
printf 'postgres://timelined@127.0.0.1:%s/postgres\n' "$port" 2>/dev/null || exit 0

while read -r command; do
    case $command in
    stop)
        stop
        echo stopped
        ;;
    start)
        start "$@"
        echo started
        ;;
    *) say "unknown command: $command (stop, start)" ;;
    esac
done
