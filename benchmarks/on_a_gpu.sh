#!/usr/bin/env bash
# Measures everything for a record of a GPU, in ten minutes on an H100: the GPU tests, the parts of a step, and steps at the shapes of LLaMA-130M,
# 1B and 7B (eight layers of 7B, because one GPU holds no more together with the peers). Run it in the root of the repository, with the package
# installed or on PYTHONPATH. The output is also written to the given folder. If a part fails, the others still run.
#
#   benchmarks/on_a_gpu.sh records-of-today
#   DEVICE=cpu WIDTHS="128:1" benchmarks/on_a_gpu.sh /tmp/try      # a short trial on a CPU
set -uo pipefail
out=${1:?give a folder for the results}
device=${DEVICE:-cuda}
widths=${WIDTHS:-"768:12 2048:24 4096:8"}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

part() { # name, seconds at most, command
  local name=$1 most=$2
  shift 2
  echo "=== $*"
  timeout "$most" "$@" 2>&1 | tee "$out/$name.txt" || { echo "--- failed: $name" | tee -a "$out/$name.txt"; failed=1; }
}

part tests 150 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
for shape in $widths; do
  width=${shape%:*} layers=${shape#*:}
  part "kernels-$width" 60 "$python" benchmarks/kernels.py --device "$device" --width "$width" --stack 4 --rounds 3
  for dtype in bfloat16 float32; do
    [ "$dtype:$width" = float32:4096 ] && continue
    part "steps-$width-$dtype" 90 "$python" benchmarks/step_time.py --device "$device" --width "$width" --layers "$layers" --dtype "$dtype" \
      --steps 10 --refreshes 2 --presets 'muon,cosmos,galore,sumo,adam-snsm,muon!,cosmos!,galore!' --peer "torch Muon"
  done
done
exit $failed
