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
EPOCHS=${EPOCHS:-1} N_RL=${N_RL:-128} STEPS=${STEPS:-8} BATCH=${BATCH:-12} N_TEST=${N_TEST:-500}
LR=${LR:-1} DTYPE=${DTYPE:-bfloat16} PYTHON=${PYTHON:-python}
lr() { "$PYTHON" -c "print($1 * $LR)"; }

# 1. Data. SVAMP varies each of its stories several times, in order: its second half is the test, and
# of the first, half are demonstrations, the equation's steps, and half RL's queries, answers only.
# GSM8K's problems of one step, their answers cut down to the calculator mark, are demonstrations too.
mkdir -p "$OUT/pretrain"
"$PYTHON" - "$GSM8K" "$SVAMP" "$OUT" <<'END'
import json, operator, random, re, sys
from pathlib import Path
gsm8k, svamp, out = map(Path, sys.argv[1:])
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

def solve(equation):
    """"( ( 10.0 - 3.0 ) - 5.0 )" -> ["10-3=7", "7-5=2"], innermost bracket first."""
    steps = []
    while found := re.search(r"\( (-?[\d.]+) ([-+*/]) (-?[\d.]+) \)", equation):
        a, sign, b = float(found[1]), found[2], float(found[3])
        value = OPERATORS[sign](a, b)
        steps.append(f"{a:g}{sign}{b:g}={value:g}")
        equation = equation.replace(found[0], str(value), 1)
    return steps

def chat(question, steps, answer):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": "\n".join([*steps, f"#### {answer}"])}]}

problems = sorted(read(svamp), key=lambda row: int(row["ID"].split("-")[1]))
half = len(problems) // 2
first, test, one_step = problems[:half], problems[half:], []
for row in read(gsm8k):
    steps, answer = re.findall(r"<<(.+?)>>", row["answer"]), row["answer"].split("#### ")[1]
    if len(steps) == 1 and steps[0].split("=")[-1] == answer:
        one_step.append(chat(row["question"], steps, answer))
for rows in (first, test, one_step):
    random.Random(0).shuffle(rows)
sft = [chat(f"{row['Body'].strip().rstrip('.')}. {row['Question']}", solve(row["Equation"]),
            f"{row['Answer']:g}") for row in first[:half // 2]] + one_step[:130]
random.Random(0).shuffle(sft)
for name, rows in (("sft", sft), ("rl", first[half // 2:]), ("test", test)):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
print(f"{len(sft)} demonstrations, {half - half // 2} queries for RL, {len(test)} for the test")
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

stage sft sft --init "$MODEL" --data "$OUT/sft.jsonl" --epochs "$EPOCHS" --batch_size 16 \
  --micro_batch 8 --warmup 3 --lr "$(lr 2e-4)"
evaluate sft --max_new_tokens 48 --samples 2

stage dpo dpo --init "$OUT/sft" --base "$MODEL" --queries "$OUT/rl.jsonl" --n_queries "$N_RL" \
  --pairs_per_query 2 --max_new_tokens 48 --epochs 1 --lr "$(lr 2e-5)" --warmup 2 \
  --batch_size 16 --micro_batch 8
evaluate dpo --max_new_tokens 48 --samples 2

stage reward reward --init "$OUT/sft" --policies "$OUT/sft,$OUT/dpo" --temperatures 1.0 \
  --pairs "$OUT/dpo/pairs.jsonl" --queries "$OUT/rl.jsonl" --n_queries $((N_RL / 2)) \
  --pairs_per_query 1 --max_new_tokens 48 --epochs 1 --lr "$(lr 2e-5)" --warmup 2 \
  --batch_size 16 --micro_batch 8

stage grpo grpo --init "$OUT/dpo" --reward_model "$OUT/reward" --queries "$OUT/rl.jsonl" \
  --n_queries "$N_RL" --steps "$STEPS" --batch_queries "$BATCH" --max_new_tokens 48 \
  --lr "$(lr 2e-5)" --warmup 2 --normalise none --resample 1 --save_every 12
evaluate grpo --max_new_tokens 48 --samples 2

"$PYTHON" report.py --run "$OUT"
cat "$OUT/times.txt"
