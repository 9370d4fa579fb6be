#!/usr/bin/env bash
# Usage: scripts/demo_edge.sh OUT   compress -> recover -> export -> run without torch, on the demo model. `make demo-edge` calls it.
set -euo pipefail
out=$1
bin=${BIN:-.venv/bin}
model=src/eckart/demo
rm -rf "$out"
mkdir -p "$out"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# The demo's facts as text: what the model should stay good at.
"$bin/python" - "$model/countries.jsonl" >"$out/facts.txt" <<'PYTHON'
import json, random, sys
facts = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
lines = [f"{fact['prompt']} {fact['answer']}." for fact in facts]
random.Random(0).shuffle(lines)
print("\n<|endofdoc|>\n".join(" ".join(lines[i : i + 6]) for i in range(0, len(lines), 6)))
PYTHON

say "1. Half of the numbers of every matrix"
"$bin/eckart" compress "$model" --ratio 0.5 --calibration "$out/facts.txt" --out "$out/compressed"
say "2. Recovered by a short training, at the same size"
"$bin/eckart" recover "$out/compressed/model" --data "$out/facts.txt" --teacher "$model" --window 64 --steps 200 --out "$out/recovered"
say "3. One file in 8 bits"
"$bin/eckart" export "$out/recovered/model" --to onnx --quantize int8 --out "$out/device"
say "4. A device: an environment with onnxruntime and without torch"
"$bin/python" -m venv "$out/device-env"
"$out/device-env/bin/pip" install --quiet --disable-pip-version-check --no-deps .
"$out/device-env/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt onnxruntime tokenizers typer numpy
if "$out/device-env/bin/python" -c "import torch" 2>/dev/null; then
    echo "torch is there; the demo should run without it" >&2
    exit 1
fi
for prompt in "The capital of France is" "The continent of Vietnam is"; do
    printf '%s' "$prompt"
    "$out/device-env/bin/eckart" run "$out/device" --prompt "$prompt" --tokens 3
done
du -b "$model/model.safetensors" "$out/device/model.onnx"
