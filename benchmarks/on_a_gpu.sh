#!/usr/bin/env bash
# Measures everything for a record of a GPU, in ten minutes on one H100 or H200. Run it in the root of the repository, with the package
# installed or on PYTHONPATH. The given folder is the record: environment.txt (GPU, versions, commit), commands.txt, and the output of each
# part. If a part fails or takes too long, the others still run, and the last lines name it.
#
#   benchmarks/on_a_gpu.sh record                                   # LLaMA-130M, 1B, and eight layers of 7B
#   DATA=/data/text benchmarks/on_a_gpu.sh record                   # a text of your own for the 300 training steps
#   DEVICE=cpu WIDTHS="128:1" benchmarks/on_a_gpu.sh record         # a dry run on a CPU, in a few minutes
#
# WIDTHS lists WIDTH:LAYERS. PYTHON is the interpreter. MODEL and STEPS change the training runs.
set -uo pipefail
out=${1:?give a folder for the results}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
if [ "$device" = cpu ]; then
  widths=${WIDTHS:-"128:1"} model=${MODEL:-tiny} steps=${STEPS:-10} rounds=2 timed=2 batch=2 slack=8
else
  widths=${WIDTHS:-"768:12 2048:24 4096:8"} model=${MODEL:-130m} steps=${STEPS:-300} rounds=5 timed=10 batch=32 slack=1
fi
presets=adamw,muon,cosmos,galore,sumo,adam-snsm,soap,kl-soap,dion2,normuon
peers=("torch Muon" "torch AdamW fused" "heavyball Muon" "heavyball SOAP" "pytorch-optimizer Muon" "pytorch-optimizer SOAP" "galore-torch GaLore")
mkdir -p "$out"
: >"$out/commands.txt"
failed=()
export COLUMNS=${COLUMNS:-160}

part() { # name, seconds at most, command
  local name=$1 most=$(($2 * slack)) status=0
  shift 2
  echo
  echo "=== $name"
  printf '%q ' "$@" >>"$out/commands.txt"
  echo >>"$out/commands.txt"
  timeout "$most" "$@" 2>&1 | sed -u '/^USDT:/d' | tee "$out/$name.txt" || status=${PIPESTATUS[0]}
  [ "$status" = 0 ] && return
  [ "$status" = 124 ] && echo "--- stopped after $most s" | tee -a "$out/$name.txt"
  failed+=("$name")
}

environment() {
  date -u +"%Y-%m-%d %H:%M UTC"
  git describe --always --dirty 2>/dev/null | sed 's/^/commit /'
  if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv; fi
  "$python" - <<'PYTHON'
import importlib.metadata
import platform

import torch

print("python", platform.python_version(), platform.machine())
for name in ("torch", "triton", "subspace-opt", "transformers", "heavyball", "pytorch-optimizer", "galore-torch"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
print("CUDA", torch.version.cuda or "is not part of this torch")
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), "compute capability", *torch.cuda.get_device_capability(number))
PYTHON
}

began=$SECONDS
echo "=== environment"
environment 2>&1 | tee "$out/environment.txt"
part tests 120 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_kernels.py
wanted=()
for peer in "${peers[@]}"; do wanted+=(--peer "$peer"); done
for shape in $widths; do
  width=${shape%:*} layers=${shape#*:}
  part "kernels-$width" 45 "$python" benchmarks/kernels.py --device "$device" --width "$width" --stack 4 --rounds "$rounds"
  for dtype in bfloat16 float32; do
    [ "$dtype:$width" = float32:4096 ] && continue # one GPU does not hold all optimizers
    sizes=(--device "$device" --width "$width" --layers "$layers" --dtype "$dtype")
    part "steps-$width-$dtype" 75 "$python" benchmarks/step_time.py "${sizes[@]}" --steps "$timed" --refreshes 2 --presets "$presets" "${wanted[@]}"
    part "checks-$width-$dtype" 45 "$python" benchmarks/gpu_steps.py "${sizes[@]}" --steps "$timed"
  done
done
part training 240 "$python" benchmarks/training.py --device "$device" --model "$model" --steps "$steps" --batch-size "$batch" ${DATA:+--data "$DATA"}

echo
echo "record in $out after $((SECONDS - began)) s"
[ ${#failed[@]} = 0 ] && exit 0
echo "failed: ${failed[*]}"
exit 1
