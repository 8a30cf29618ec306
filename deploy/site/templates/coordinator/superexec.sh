#!/bin/sh
# The SuperExec of @site: starts a process for every run whose bundle is in bundles.txt. It survives a restart
# of the SuperLink.
set -eu
umask 077
cd "$(dirname "$0")"
export @quiet
# Names and weights belong to keys: what a node calls itself does not count.
export BOUQUET_NODES="$PWD/nodes.json"
export FLWR_HOME="@state/flower" BOUQUET_BUNDLES="${BOUQUET_BUNDLES:-$PWD/bundles.txt}"
mkdir -p "$FLWR_HOME"
exec bouquet-superexec --root-certificates ca.crt --runtime-api-address 127.0.0.1:@control_port \
    --superexec-auth-secret-file superexec.secret "$@@"
