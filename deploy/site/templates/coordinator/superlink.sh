#!/bin/sh
# The SuperLink of @site. Nodes come in by port @fleet_port; port @control_port is for this machine only, because
# whoever reaches it can start runs.
set -eu
umask 077
cd "$(dirname "$0")"
export @quiet
export FLWR_HOME="@state/flower"
mkdir -p "$FLWR_HOME"
exec flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
    --enable-supernode-auth --fleet-api-address "${BOUQUET_LISTEN:-[::]:@fleet_port}" \
    --host 127.0.0.1 --port @control_port --database "@state/superlink.db" \
    --health-server-address "${BOUQUET_HEALTH:-127.0.0.1:@health}" \
    --isolation process --superexec-auth-secret-file superexec.secret --disable-runtime-dependency-installation
