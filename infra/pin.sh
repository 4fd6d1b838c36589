#!/usr/bin/env bash
# Resolve the dependencies once and write the pins down, in the two forms that other machines read:
#   pyproject.toml             [tool.uv] constraint-dependencies, which `uv sync` and `uv run` obey
#   requirements.lock          name==version with hashes, default dependencies and the dev group
#   infra/requirements-gpu.lock  the same with the extra `gpu` and without dev, for the image
# uv's own lock file names the index that resolved it, so it stays out of git.
#
# usage: infra/pin.sh            keep the pinned versions, pin what was added to the dependencies
#        infra/pin.sh --upgrade  forget the pins and take the newest versions that resolve
set -euo pipefail
cd "$(dirname "$0")/.."

pins() { # the constraint list of pyproject.toml, from lines on stdin
  python3 -c '
import pathlib, re, sys, textwrap
path = pathlib.Path("pyproject.toml")
pins = sorted(line.strip() for line in sys.stdin if line.strip())
text = textwrap.fill(", ".join(chr(34) + pin + chr(34) + "," for pin in pins).replace(",,", ","), 118, break_on_hyphens=False)
block = "constraint-dependencies = [\n" + textwrap.indent(text, "  ") + ("\n" if text else "") + "]\n"
old = path.read_text(encoding="utf-8")
new, count = re.subn(r"^constraint-dependencies = \[[^\]]*(?:\[[^\]]*\][^\]]*)*\]\n", lambda _: block, old, flags=re.M)
assert count == 1, "pyproject.toml holds no constraint-dependencies list to write into"
path.write_text(new, encoding="utf-8")'
}

if [[ ${1:-} == --upgrade ]]; then
  pins </dev/null
  uv lock --quiet --upgrade
else
  uv lock --quiet
fi

export_pins=(uv export --quiet --frozen --format requirements.txt --no-emit-project --no-header --no-annotate)
"${export_pins[@]}" --all-extras --all-groups --no-hashes | sed 's/ *;.*//' | pins
uv lock --quiet # the constraints are part of the lock; this changes no version
"${export_pins[@]}" --output-file requirements.lock >/dev/null
"${export_pins[@]}" --no-dev --extra gpu --output-file infra/requirements-gpu.lock >/dev/null

if grep -nE '://|--(index|extra-index|find-links)' requirements.lock infra/requirements-gpu.lock; then
  echo "the lines above name an index; unset UV_INDEX_URL and its like, and run again" >&2
  exit 1
fi
echo "$(grep -c == requirements.lock) packages in requirements.lock, $(grep -c == infra/requirements-gpu.lock) in infra/requirements-gpu.lock"
