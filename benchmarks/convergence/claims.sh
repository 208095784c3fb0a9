#!/usr/bin/env bash
# Claims of four papers on a small LLaMA. Runs that main.sh has made are not made again.
#   SUMO         an exact SVD inside the subspace is better than Newton-Schulz        sumo, sumo-newton-schulz
#   Subset-Norm  AdamW's loss with a fraction of its state                            adam-sn, adam-snsm, adamw
#   Trion        between Dion and Muon                                                dion, trion, muon
#   COSMOS       SOAP's loss with about the memory of Muon                            cosmos, soap, muon
set -euo pipefail
cd "$(dirname "$0")"
rank=matrix.selector.rank=32
mkdir -p results/claims
[ -e results/claims/runs.jsonl ] || cp results/main/runs.jsonl results/claims/
OMP_NUM_THREADS=${THREADS:-1} subspace-opt compare "cosmos,$rank" soap muon "trion,$rank" dion adamw adam-sn "adam-snsm,$rank" "sumo,$rank" \
  "sumo-newton-schulz=sumo,$rank,matrix.inside.1.method=newton_schulz" \
  --model mini --data texts --steps "${STEPS:-450}" --sweep-steps "${SWEEP:-150}" --seeds 3 --weight-decay 0.1 --eval-batches 16 \
  --device cpu --jobs "${JOBS:-1}" --out results/claims --title "Claims of four papers on a small LLaMA"
