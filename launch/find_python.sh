# Sets PYTHON: an environment that is active, else the one that install.sh makes. Sourced in the repository's folder.
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" || ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || {
  echo "error: $PYTHON was not found: bash install.sh requirements.txt makes .venv" >&2
  exit 1
}
