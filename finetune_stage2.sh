#!/usr/bin/env bash
# Stage 2: motion modules. Arguments are passed on to train_DiffuEraser_stage2.py; docs/settings.md lists the variables.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/find_python.sh
exec "$PYTHON" -m launch.launch 2 "$@"
