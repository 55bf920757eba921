#!/usr/bin/env bash
# Stage 1: UNet2D and BrushNet. Arguments are passed on to train_DiffuEraser_stage1.py; docs/settings.md lists the variables.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/find_python.sh
exec "$PYTHON" -m launch.launch 1 "$@"
