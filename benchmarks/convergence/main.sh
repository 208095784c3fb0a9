#!/usr/bin/env bash
# Seven presets and a hybrid on a small LLaMA: each with its own learning rate, three seeds. Ranks are a quarter of the width.
set -euo pipefail
cd "$(dirname "$0")"
rank=matrix.selector.rank=32
OMP_NUM_THREADS=${THREADS:-1} subspace-opt compare "cosmos,$rank" muon adamw soap "galore,$rank" "fft-soap-muon.yaml,$rank" "sumo,$rank" "trion,$rank" \
  --model mini --data texts --steps "${STEPS:-450}" --sweep-steps "${SWEEP:-150}" --seeds 3 --weight-decay 0.1 --eval-batches 16 \
  --device cpu --jobs "${JOBS:-1}" --out results/main --title "Eight optimizers on a small LLaMA"
