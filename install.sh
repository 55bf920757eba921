#!/usr/bin/env bash
# Makes .venv with the project's packages, unless it is there already. An argument names another requirements file.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
requirements=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")"
requirements=${requirements:-requirements.txt}

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer was needed (diffusers 0.42 needs it), found $(python3 --version 2>&1 || true)" >&2
  exit 1
}

stamp=.venv/.installed-$(cat "$requirements" requirements.txt | sha256sum | cut -c1-16)
if [[ ! -f "$stamp" ]]; then
  python=$(find_python)
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  echo "installing $(basename "$requirements") into .venv (once)"
  # torch first and alone: a package that asks for just any torch must find this one.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
