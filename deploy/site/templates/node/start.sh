#!/bin/sh
# Node @node of @site as one user, where no supervisor keeps its two processes apart: if one ends, so does the other.
# The secret between the two is made here and never travels.
set -eu
umask 077
cd "$(dirname "$0")"
secret="@state/superexec.secret"
mkdir -p "@state"
[ -s "$secret" ] || head -c 48 /dev/urandom >"$secret"
(
    sh ./superexec.sh --parent-pid $$ || true
    kill $$
) &
exec sh ./supernode.sh
