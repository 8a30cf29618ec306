#!/bin/sh
# The SuperNode of node @node of @site: it holds the node's key, talks to the SuperLink, and runs no submitted code.
set -eu
umask 077
cd "$(dirname "$0")"
export @quiet
export FLWR_HOME="${BOUQUET_LINK_STATE:-@state/link}/flower"
mkdir -p "$FLWR_HOME"
exec bouquet-supernode --superlink @superlink --root-certificates ca.crt \
    --auth-supernode-private-key node.key --node-config node.toml \
    --isolation process --superexec-auth-secret-file "${BOUQUET_SECRET:-@state/superexec.secret}" \
    --port @port --health-server-address "${BOUQUET_HEALTH:-127.0.0.1:@health}"
