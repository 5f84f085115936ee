"""Try every language in the sandbox: python -m tasks.sandbox"""
import argparse

from tasks.sandbox import SAMPLES, isolation_gaps, languages, run


def main():
    parser = argparse.ArgumentParser(description="Try every language in the sandbox.")
    parser.add_argument("--require_isolation", action="store_true",
                        help="run nothing unless all layers of isolation hold")
    isolated = parser.parse_args().require_isolation
    gaps = isolation_gaps()
    for layer, harm in gaps.items():
        print(f"without {layer!r} a program can {harm}")
    if isolated and gaps:
        raise SystemExit("refused: without " + ", ".join(gaps))
    print("layers:", ", ".join(run("pass").isolation))
    for name, lack in languages().items():
        if lack:
            print(f"{name:11} not here: {lack}")
            continue
        code, tests = SAMPLES[name]
        right = run(code, name, tests)
        wrong = run(code.replace("*", "+"), name, tests)
        verdict = "PASS" if right.passed and not wrong.passed else "FAIL"
        print(f"{name:11} {verdict} in {right.seconds:.3f} s  {right.reason}")


if __name__ == "__main__":
    main()
