#!/usr/bin/env bash
# All that a record of a GPU needs, in ten minutes on an H100: tests, the parts of a step, and steps at the shapes of LLaMA-130M, 1B and 7B
# (of 7B eight layers, as one GPU holds no more beside the peers). Run in the root of the repository, with the package on PYTHONPATH or
# installed; what is printed also lands in the folder given, and a part that fails does not stop the others.
#
#   benchmarks/on_a_gpu.sh records-of-today
#   DEVICE=cpu WIDTHS="128:1" benchmarks/on_a_gpu.sh /tmp/try      # that it runs
set -uo pipefail
out=${1:?a folder for what is measured}
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
