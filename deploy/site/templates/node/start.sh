#!/bin/sh
# Node @node of @site: its SuperNode, and the SuperExec that starts a process for every task.
# The secret between the two is made here and never travels. If one of them ends, so does the other: a supervisor
# (systemd, compose) starts both again.
set -eu
umask 077
cd "$(dirname "$0")"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_HOME="@state/flower"
secret="@state/superexec.secret"
mkdir -p "$FLWR_HOME"
[ -s "$secret" ] || head -c 48 /dev/urandom >"$secret"
(
    flower-superexec --insecure --runtime-api-address 127.0.0.1:@port \
        --superexec-auth-secret-file "$secret" --parent-pid $$ || true
    kill $$
) &
exec flower-supernode --superlink @superlink --root-certificates ca.crt \
    --auth-supernode-private-key node.key --node-config node.toml \
    --isolation process --superexec-auth-secret-file "$secret" --port @port
