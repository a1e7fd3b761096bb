#!/usr/bin/env bash
# Parity and latency of every provider on this machine's GPU, against PyTorch in FP16 on the same card.
#
#   pip install ".[demo,evaluation,export,gpu,tensorrt]"     # or tensorrt-rtx
#   bash benchmarks/gpu.sh [MODEL [ADAPTER]]                 # default: the demo
#
# Writes its results to benchmarks/results/gpu-DATE.md. A provider that is not installed or not usable is listed there with the
# reason; a failed gate is recorded like a passed one.
set -uo pipefail
cd "$(dirname "$0")/.."
model=${1:-demo}
adapter=(${2:+--adapter "$2"})
bundle=$(mktemp -d)/gircse-gpu
reports=$(mktemp -d)
results=benchmarks/results/gpu-$(date -u +%F).md
card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1) || exit 2

gircse-export --steps 8 --model "$model" "${adapter[@]}" --precision fp32,fp16,bf16 --output "$bundle" || exit 2
{
    printf '\n## GPU: %s\n\n' "$card"
    printf '`bash benchmarks/gpu.sh %s`, %s. ' "$*" "$(date -u +%F)"
    python - <<'PYTHON'
import importlib.metadata as metadata
import platform

names = ("torch", "transformers", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings")
found = {}
for name in names:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items()) + ".")
PYTHON
} >>"$results"

# Runs a command and writes its output, or why there is none, under a heading.
record() {
    local title=$1 output
    shift
    output=$("$@" 2>"$reports/errors")
    local code=$?
    printf '\n### %s\n\n`%s`, exit code %d\n\n```\n%s\n```\n' "$title" "${*//$bundle/BUNDLE}" "$code" "${output:-$(tail -3 "$reports/errors")}" \
        >>"$results"
}

for provider in tensorrt tensorrt-rtx; do
    for precision in fp16 bf16; do
        record "Build, $provider $precision" gircse-build "$bundle" --provider "$provider" --precision "$precision"
    done
done
for provider in cuda onnxruntime-tensorrt tensorrt tensorrt-rtx; do
    for layout in unrolled stepwise; do
        [[ $provider == tensorrt* && $layout == unrolled ]] && continue # the engines above are stepwise
        record "Parity, $provider $layout" gircse-parity "$bundle" --provider "$provider" --layout "$layout" \
            --precision fp16,bf16 --device cuda
        record "Latency, $provider $layout" gircse-bench "$bundle" --provider "$provider" --layout "$layout" \
            --precision fp16 --against torch --device cuda --dtype fp16 --batch 1,8,32 --tokens 24,128 --steps 1,4,8
    done
done
if command -v gircse-embed-cpp >/dev/null; then # docs/cpp.md; CUDA and cuDNN from pip lie where the loader does not look
    site=$(python -c 'import site; print(site.getsitepackages()[0])')
    LD_LIBRARY_PATH=$(printf '%s:' "$site"/nvidia/*/lib)${LD_LIBRARY_PATH:-}
    GIRCSE_ONNXRUNTIME=$(echo "$site"/onnxruntime/capi/libonnxruntime.so.1*)
    export LD_LIBRARY_PATH GIRCSE_ONNXRUNTIME
    for provider in cuda onnxruntime-tensorrt; do
        for precision in fp32 fp16 bf16; do
            record "C++, $provider $precision" gircse-embed-cpp "$bundle" --provider "$provider" \
                --precision "$precision" --self-test
        done
    done
fi
record "Tests marked gpu" python -m pytest -q -m gpu
echo "$results"
