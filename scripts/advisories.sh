#!/usr/bin/env bash
# Asks for known vulnerabilities of locked requirements.
#
#   scripts/advisories.sh REQUIREMENTS
#
# Ends with 0 where none is known, 1 where some are, 2 where not all packages could be asked about.
set -euo pipefail
command -v pip-audit >/dev/null || { echo "pip-audit is not on the PATH, so this says nothing" >&2; exit 2; }
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
# --strict: a package that the index does not know would be left out, and count as sound.
if pip-audit --strict --progress-spinner off --disable-pip --require-hashes --requirement "$1" 2>"$errors"; then
  cat "$errors" >&2
  exit 0
fi
if grep -qE 'Traceback|^ERROR' "$errors"; then
  tail -n 1 "$errors" >&2
  echo "Not all packages could be asked about, so this says nothing: is there a network, and does the index answer?" >&2
  exit 2
fi
cat "$errors" >&2
exit 1
