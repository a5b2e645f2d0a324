#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 10 minutes of one: parity, CUDA graphs, shares of the card's limits, the
# quickstart, vLLM where it is installed, two learners by NCCL where there are two cards. A step that fails is written
# down, and the next one goes on.
# Usage: benchmarks/gpu_session.sh [OUT]      OUT: a folder for results and log (default: benchmarks/results/gpu)
#        CPU=1 ...                            the same steps at toy size without a GPU, to try the script
set -uo pipefail
cd "$(dirname "$0")/.."
out="$(realpath -m "${1:-benchmarks/results/gpu}")"
mkdir -p "$out"
log="$out/session.log"
: > "$log"
failed=0

step() { # NAME SECONDS COMMAND...
    local name="$1" limit="$2" begun=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >> "$log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=$((failed + 1))
    printf '%s: exit %d after %d s\n' "$name" "$code" "$((SECONDS - begun))" | tee -a "$log"
}

run=(python -m pipeline run quickstart)
pages=(explorer.enabled=false report.enabled=false)
engine=tests/latent_control/decoding/test_engine.py

if [ -n "${CPU:-}" ]; then
    cards=0 device=cpu sizes=(--quick)
    short=(actions.updates=10 actions.min_alive_share=0 clone.updates=10 improve.updates=1 evaluation.prompts=8)
    parity=(-k test_static_needs_blocks_it_knows)
else
    nvidia-smi >> "$log" 2>&1 || { echo "no GPU here (nvidia-smi fails); CPU=1 tries the script without one" >&2; exit 1; }
    cards="$(nvidia-smi --list-gpus | wc -l)" device=cuda sizes=(--repeats 3)
    short=(rollout.gpus_per_worker=0.3 rollout.num_workers=1)
    parity=()
fi

step "kernel parity, CUDA graphs" 90 python -m pytest -q -p no:cacheprovider "$engine" "${parity[@]}"
step "shares of the card" 200 python benchmarks/gpu.py --device "$device" "${sizes[@]}" --out "$out"
step "quickstart" 120 "${run[@]}" "${short[@]}" "${pages[@]}" --run-dir "$out/quickstart"
if python -c "import vllm" 2> /dev/null; then
    step "vLLM parity" 90 python -m pytest -q -p no:cacheprovider tests/rollout_workers/engines/test_vllm.py
fi
if [ "$cards" -ge 2 ]; then
    step "two learners by NCCL" 90 "${run[@]}" improve.updates=5 evaluation=null "${pages[@]}" \
        cluster.num_learners=2 cluster.gpus_per_learner=1 --run-dir "$out/two_learners"
fi
echo "results and log: $out" | tee -a "$log"
exit "$((failed > 0))"
