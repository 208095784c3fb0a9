#!/usr/bin/env bash
# The best candidate of search.sh against COSMOS, on another text and a model of twice the width, with more updates than the search had.
set -euo pipefail
cd "$(dirname "$0")"
OMP_NUM_THREADS=${THREADS:-1} subspace-opt compare cosmos,matrix.selector.rank=0.25 eigen25-soap-sign.yaml --model mini --data other \
  --steps "${STEPS:-400}" --sweep-steps "${SWEEP:-130}" --seeds 3 --weight-decay 0.1 --eval-batches 16 --device cpu --jobs "${JOBS:-1}" \
  --out results/longer --title "The find of the search, with more updates"
