#!/bin/sh
# The SuperExec of node @node of @site: it starts a process for every task, on the data, and cannot read the node's key.
# A task is the code of a bundle, and bundles.txt says which may run here.
set -eu
umask 077
cd "$(dirname "$0")"
export @quiet @often
export FLWR_HOME="@state/flower" BOUQUET_BUNDLES="${BOUQUET_BUNDLES:-$PWD/bundles.txt}"
mkdir -p "$FLWR_HOME"
exec bouquet-superexec --insecure --runtime-api-address 127.0.0.1:@port \
    --superexec-auth-secret-file "${BOUQUET_SECRET:-@state/superexec.secret}" "$@@"
