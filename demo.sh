#!/usr/bin/env bash
# The whole pipeline, from raw text to a GRPO-tuned chat model, on 2 CPU cores (20 minutes).
# Each line is a command that you can run alone; `--help` of a stage explains its flags.
#
#   make demo                 sets up the environment, then runs this
#   SEED=1 make demo          another seed, in runs/demo-seed1
#   MOE=1 make demo           a mixture of experts of the same active size, in runs/demo-moe
#   REAL=dir make demo        with GSM8K's, MATH's and MBPP's training files too, found below dir
#   FRESH=1 make demo         starts anew; else finished stages are skipped, and a stopped one goes on
set -euo pipefail
cd "$(dirname "$0")"
SEED=${SEED:-0}
RUN=runs/demo
[ "$SEED" = 0 ] || RUN=runs/demo-seed$SEED
[ -z "${REAL:-}" ] || RUN=$RUN-real
[ -z "${MOE:-}" ] || RUN=$RUN-moe
[ -z "${FRESH:-}" ] || rm -rf "$RUN"
mkdir -p "$RUN"
say() { printf '\n== %s\n' "$*"; }
stage() {  # stage DIRECTORY PROGRAM --flags: skip it if it is finished, resume it if it was stopped
  local out="$RUN/$1" program="$2" resume=""
  if grep -qs '"finished": true' "$out/run.json"; then echo "$out is there already"; return; fi
  if [ -e "$out/run.json" ]; then resume=--resume; fi
  python "$program" --out "$out" --seed "$SEED" "${@:3}" $resume
}
evaluate() {  # evaluate DIRECTORY --flags
  if [ ! -e "$RUN/evaluation/$1/eval.json" ]; then
    python evaluate.py --init "$RUN/$1" --out "$RUN/evaluation/$1" --seed "$SEED" "${@:2}"
  fi
}

say "1. corpus: Python's own documentation and code, and synthetic documents, cleaned and mixed"
if [ ! -e "$RUN/data/report.json" ]; then
  python -m data --out "$RUN/data" --max_mb 3 --synthetic_mb 10 --seed "$SEED" --overwrite
fi

say "2. tokenizer: byte-level BPE from scratch"
if [ ! -e "$RUN/tokenizer/tokenizer_config.json" ]; then
  python tokenizer.py train --input "$RUN"/data/*.jsonl --vocab_size 2048 --out "$RUN/tokenizer"
fi

say "3. pre-training"
stage pretrain pretrain.py --data "$RUN/data" --tokenizer "$RUN/tokenizer" --tokens 3.4e6 \
  ${MOE:+--model tiny-moe}
evaluate pretrain --few_shot 1 --text "$RUN/data"

BASE=pretrain
SFT_DATA="--n_data 1200"  # both unquoted below: several words, or none
RL_QUERIES=""
N_QUERIES=1200  # of DPO, the reward model and GRPO: as in the report, they share their queries
if [ -n "${REAL:-}" ]; then
  say "3b. real mathematics and code: more pre-training, and a part of the data of SFT and RL"
  if [ ! -e "$RUN/real/data/report.json" ]; then
    python recipes/real_data.py write --real "$REAL" --out "$RUN/real" --seed "$SEED"
    python -m data --input "$RUN/real/documents.jsonl" --out "$RUN/real/data" --overwrite
  fi
  BASE=pretrain_real
  SFT_DATA="--data $RUN/real/sft.jsonl"
  RL_QUERIES="--queries $RUN/real/rl.jsonl --max_new_tokens 256"  # real answers are longer
  stage "$BASE" pretrain.py --init "$RUN/pretrain" --data "$RUN/data,$RUN/real/data" \
    --tokens 1.5e6 --lr 5e-4
  evaluate "$BASE" --few_shot 1 --text "$RUN/data"
fi

say "4. SFT on verified demonstrations"
stage sft sft.py --init "$RUN/$BASE" $SFT_DATA --epochs 4 --lr 5e-4
evaluate sft

# From here one core trains on, stage by stage, and the other runs the control: more SFT on the same
# demonstrations for as long. One thread each; run.json has the seconds of both.
export OMP_NUM_THREADS=1
say "(in the background) control: the time of stages 5 to 8 spent on more SFT"
(
stage sft_control sft.py --init "$RUN/sft" $SFT_DATA --epochs 57 --lr 2e-4
evaluate sft_control

# The report's further stages of pre-training, beside the road: nothing below starts from them, for
# at this size a new RoPE base costs more answers than longer rows bring (LOG.md, "three stages").
say "(in the background) further pre-training: more mathematics and code, then four times the length"
stage maths pretrain.py --data "$RUN/data" --init "$RUN/pretrain" --tokens 1.5e5 --lr 5e-4 \
  --weights mathematics=0.4,code=0.3,logic=0.2,stdlib_code=0.1
stage long pretrain.py --data "$RUN/data" --init "$RUN/maths" --tokens 1.5e5 --lr 5e-4 \
  --seq_len 512 --rope_theta 1e6 --long_share 0.4
evaluate maths --few_shot 1 --samples 1 --text "$RUN/data"
evaluate long --few_shot 1 --samples 1 --text "$RUN/data"
) > "$RUN/background.log" 2>&1 &
BACKGROUND=$!

say "5. DPO on the SFT model's own passing and failing answers to new queries"
stage dpo dpo.py --init "$RUN/sft" --base "$RUN/$BASE" $RL_QUERIES --n_queries $N_QUERIES \
  --check_format --pairs_per_query 4 --epochs 2 --batch_size 32 --lr 2e-4 --beta 0.05 --rpo_alpha 3
evaluate dpo

say "6. a first short RL run with the verifier alone, so that the reward model sees RL's answers too"
stage rl_first grpo.py --init "$RUN/dpo" $RL_QUERIES --n_queries 200 --steps 8 --batch_queries 24 \
  --check_steps --lr 3e-4

say "7. reward model on answers of the SFT, DPO and RL checkpoints"
stage reward reward.py --init "$RUN/sft" --policies "$RUN/sft,$RUN/dpo,$RUN/rl_first" \
  --pairs "$RUN/dpo/pairs.jsonl" $RL_QUERIES --n_queries $N_QUERIES --temperatures 1.0 \
  --responses 2 --epochs 3 --batch_size 32 --lr 5e-4
if [ ! -e "$RUN/best_of_8/eval.json" ]; then
  python evaluate.py --init "$RUN/sft" --reward_model "$RUN/reward" --samples 8 --seed "$SEED" \
    --out "$RUN/best_of_8"
fi

# As a part of the reward, a reward model of a million parameters costs a little (docs/findings.md,
# "Does the reward model help GRPO?"): it orders the queries, and the verifier alone rewards.
# --check_steps: "3 + 3 = 7. 3 * 7 = 12" earns nothing, although 12 is right.
say "8. GRPO: queries by variance of the reward model's scores, reward from the verifier"
stage grpo grpo.py --init "$RUN/dpo" --reward_model "$RUN/reward" --reward_model_weight 0 \
  $RL_QUERIES --n_queries $N_QUERIES --steps 200 --batch_queries 24 --check_steps --lr 3e-4 \
  --kl 0.03 --scale_rewards none
evaluate grpo

if ! wait "$BACKGROUND"; then
  tail -5 "$RUN/background.log"
  echo "the runs in the background stopped: the same command goes on"
  exit 1
fi
grep -vE "^(pretrain|sft) [0-9]" "$RUN/background.log"  # all but the lines of single steps

say "report"
python -m lib.report --run "$RUN"
if [ -n "${REAL:-}" ]; then
  python recipes/real_data.py measure --out "$RUN/real" \
    --models "$RUN/pretrain,$RUN/$BASE,$RUN/sft,$RUN/dpo,$RUN/grpo"
fi
cat <<END
This took $((SECONDS / 60)) minutes. Now try, after \`source .venv/bin/activate\`:
  python sample.py --init $RUN/grpo
  python grpo.py inspect --out $RUN/grpo
  python tokenizer.py show $RUN/sft --text "Hello, world"
END
