#!/usr/bin/env bash
# Six presets on LLaMA-60M by the protocol of main.sh, sized for ten minutes on one H100. Under torchrun the runs are divided over the GPUs.
#   DEVICE=cpu MODEL=tiny STEPS=4 SWEEP=2 benchmarks/convergence/on_a_gpu.sh       # a dry run
set -euo pipefail
cd "$(dirname "$0")"
subspace-opt compare cosmos muon adamw soap galore fft-soap-muon.yaml --model "${MODEL:-60m}" --data texts --steps "${STEPS:-300}" \
  --sweep-steps "${SWEEP:-100}" --seeds "${SEEDS:-2}" --batch-size "${BATCH:-32}" --length "${LENGTH:-512}" --weight-decay 0.1 --eval-batches 4 \
  --device "${DEVICE:-cuda}" --out results/gpu --title "Six optimizers on LLaMA-60M"
