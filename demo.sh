#!/usr/bin/env bash
# The whole pipeline, raw text to a GRPO-tuned chat model, on 2 CPU cores in about a quarter of an
# hour. Every line is a command that you can run alone; every stage's flags are in its --help.
#
#   make demo                 the environment, then this
#   SEED=1 bash demo.sh       another seed, into runs/demo-seed1
set -euo pipefail
cd "$(dirname "$0")"
SEED=${SEED:-0}
RUN=runs/demo$([ "$SEED" = 0 ] || echo "-seed$SEED")
rm -rf "$RUN" && mkdir -p "$RUN"
date +%s > "$RUN/started"
stage() { echo; echo "== $*"; }
evaluate() { python evaluate.py --init "$RUN/$1" --seed "$SEED" "${@:2}"; }

