#!/usr/bin/env bash
# A search for a hybrid with at most 0.8 of AdamW's state, and its confirmation on another text, a model of twice the width and other seeds.
set -euo pipefail
cd "$(dirname "$0")"
OMP_NUM_THREADS=${THREADS:-1} subspace-opt search --budget "${BUDGET:-45m}" --bytes 0.8x --time 2x --model tiny --data texts --confirm-data other \
  --confirm-model mini --first-steps 50 --steps 400 --weight-decay 0.1 --eval-batches 8 --device cpu --jobs "${JOBS:-1}" --out results/search
