#!/usr/bin/env bash
# Run every test marked gpu on a CUDA host, offline, and sum up.
#
# usage: tests/gpu.sh OUT_DIR [pytest arguments...]
# Writes OUT_DIR/gpu-tests.xml (JUnit), OUT_DIR/gpu-tests.log and OUT_DIR/gpu-summary.json, prints the summary as the
# last line, and exits with pytest's status. PYTHON picks the interpreter (default python3); the host needs
# pytest, torch and the GPU stack, and may lack prefect, ray and PyAV.
set -uo pipefail
if (($# < 1)); then
  sed -n '4,5p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
rm -f "$out"/gpu-tests.xml "$out"/gpu-summary.json # of an earlier run
shift
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

# Files without a gpu test are left out, because the host may lack what they import.
mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)
if ((${#files[@]} == 0)); then
  echo "no test below tests/ is marked gpu" >&2
  exit 2
fi
started=$SECONDS
"$python" -m pytest -m gpu -p no:cacheprovider --durations=10 --junitxml="$out/gpu-tests.xml" "${files[@]}" "$@" \
  </dev/null 2>&1 | tee "$out/gpu-tests.log"
status=${PIPESTATUS[0]}

"$python" - "$out" "$status" $((SECONDS - started)) <<'PYTHON' || exit
import json, pathlib, subprocess, sys
import xml.etree.ElementTree as ET

import torch

out, status, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
report = out / "gpu-tests.xml"
cases = list(ET.parse(report).iter("testcase")) if report.is_file() else []
def named(tag):
    return [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find(tag) is not None]
failed, skipped = named("failure") + named("error"), named("skipped")
commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
summary = {
    "status": status, "tests": len(cases), "failed": failed, "skipped": skipped, "seconds": seconds,
    "commit": commit or None, "torch": torch.__version__, "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}
(out / "gpu-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
print(json.dumps(summary))
PYTHON
exit "$status"
