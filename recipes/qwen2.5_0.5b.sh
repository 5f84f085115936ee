#!/usr/bin/env bash
# The commands of real_135m.sh for Qwen2.5-0.5B, from a local directory of its published files, on
# one GPU: lower learning rates, more steps. Not run by this project, which had neither.
#
#   bash recipes/qwen2.5_0.5b.sh Qwen2.5-0.5B SVAMP.jsonl [OUT]
LR=${LR:-0.1} EPOCHS=${EPOCHS:-2} STEPS=${STEPS:-50} exec bash "$(dirname "$0")/real_135m.sh" \
  "${@:1:2}" ${2:+"${3:-runs/qwen2.5_0.5b}"}
