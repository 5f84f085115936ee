#!/usr/bin/env bash
# SFT -> DPO -> reward model -> GRPO on a real pretrained model of 135M parameters: word problems
# whose answers a program can check. What it measured is in recipes/real_135m.md.
#
#   bash recipes/real_135m.sh MODEL GSM8K_TRAIN.jsonl SVAMP.jsonl [OUT]
#
# MODEL is a Hugging Face directory of type qwen2, the files as they are published. A stage that is
# finished is skipped and an interrupted one continued, so the same command goes on after a Ctrl-C.
# The size comes from the environment: LR scales all learning rates, STEPS and BATCH are GRPO's.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8s/^# \?//p' "$0"; exit 2; }
MODEL=$(realpath "$1") GSM8K=$(realpath "$2") SVAMP=$(realpath "$3")
OUT=$(realpath -m "${4:-runs/real_135m}")
cd "$(dirname "$0")/.."
N_SFT=${N_SFT:-320} N_RL=${N_RL:-128} STEPS=${STEPS:-16} BATCH=${BATCH:-12} N_TEST=${N_TEST:-500}
LR=${LR:-1} DTYPE=${DTYPE:-bfloat16} PYTHON=${PYTHON:-python}
lr() { "$PYTHON" -c "print($1 * $LR)"; }

# 1. Data. Demonstrations: GSM8K's problems of at most 3 steps, their answers cut down to the
# calculator marks, one equation a step. RL's queries: the first half of SVAMP, answers only. Test:
# its second half (SVAMP varies each of its stories several times, in order: halves mix fewer of them
# than a shuffle would; no two problems of the two are equal but for their numbers).
mkdir -p "$OUT/pretrain"
"$PYTHON" - "$GSM8K" "$SVAMP" "$OUT" "$N_SFT" <<'END'
import json, random, re, sys
from pathlib import Path
gsm8k, svamp, out, n = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
read = lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
chats = []
for row in read(gsm8k):
    steps, answer = re.findall(r"<<(.+?)>>", row["answer"]), row["answer"].split("#### ")[1]
    if 1 <= len(steps) <= 3 and steps[-1].split("=")[-1] == answer:
        chats.append({"messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": "\n".join([*steps, f"#### {answer}"])}]})
problems = sorted(read(svamp), key=lambda row: int(row["ID"].split("-")[1]))
rl, test = problems[:len(problems) // 2], problems[len(problems) // 2:]
for rows in (chats, rl, test):
    random.Random(0).shuffle(rows)
for name, rows in (("sft", chats[:n]), ("rl", rl), ("test", test)):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
print(f"{len(chats[:n])} demonstrations, {len(rl)} queries for RL, {len(test)} for the test")
END

# 2. One stage after the other, the test before and after each that makes a policy.
finished() { grep -qs '"finished": true' "$OUT/$1/run.json"; }
evaluate() {  # name, flags
  [ -e "$OUT/$1/eval.json" ] || timed "evaluate $1" "$PYTHON" evaluate.py --init "$OUT/$1" \
    --queries "$OUT/test.jsonl" --n_queries "$N_TEST" --dtype "$DTYPE" "${@:2}"
}
stage() {  # script, name, flags
  finished "$2" || timed "$2" "$PYTHON" "$1.py" --out "$OUT/$2" --dtype "$DTYPE" "${@:3}" \
    $([ ! -e "$OUT/$2/run.json" ] || echo --resume)
}
timed() {
  printf '\n== %s\n' "$1"
  local TIMEFORMAT="%R s, %U + %S s of CPU: $1"
  { time "${@:2}" 2>&3; } 3>&2 2>> "$OUT/times.txt"
}

# The base model under a name that the report knows.
ln -sf "$MODEL"/* "$OUT/pretrain/"
[ -e "$OUT/pretrain/run.json" ] || { : > "$OUT/pretrain/log.jsonl"
  echo '{"command": "", "seed": 0}' > "$OUT/pretrain/run.json"; }
evaluate pretrain --samples 1 --max_new_tokens 64

stage sft sft --init "$MODEL" --data "$OUT/sft.jsonl" --epochs 1 --batch_size 16 --micro_batch 8 \
  --warmup 3 --lr "$(lr 1e-4)"
evaluate sft --max_new_tokens 64 --samples 2

stage dpo dpo --init "$OUT/sft" --base "$MODEL" --queries "$OUT/rl.jsonl" --n_queries "$N_RL" \
  --responses 4 --max_new_tokens 64 --lr "$(lr 2e-5)" --warmup 2 --batch_size 16 --micro_batch 8
evaluate dpo --max_new_tokens 64 --samples 2

stage reward reward --init "$OUT/sft" --policies "$OUT/sft,$OUT/dpo" --temperatures 1.0 \
  --pairs "$OUT/dpo/pairs.jsonl" --queries "$OUT/rl.jsonl" --n_queries $((N_RL / 2)) \
  --pairs_per_query 1 --max_new_tokens 64 --lr "$(lr 2e-5)" --warmup 2 --batch_size 16 \
  --micro_batch 8

stage grpo grpo --init "$OUT/dpo" --reward_model "$OUT/reward" --queries "$OUT/rl.jsonl" \
  --n_queries "$N_RL" --steps "$STEPS" --batch_queries "$BATCH" --max_new_tokens 64 \
  --lr "$(lr 4e-5)" --warmup 2 --normalise none --resample 1 --save_every 12
evaluate grpo --max_new_tokens 64 --samples 2

"$PYTHON" report.py --run "$OUT"
cat "$OUT/times.txt"
