"""Try every language in the sandbox: python -m tasks.sandbox"""
import argparse

from tasks.sandbox import REQUIRED, SAMPLES, languages, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tries every language in the sandbox.")
    parser.add_argument("--require_isolation", action="store_true",
                        help=f"refuse to run unless these layers hold: {', '.join(REQUIRED)}")
    args = parser.parse_args()
    for name, lack in languages().items():
        if lack:
            print(f"{name:11} not here: {lack}")
            continue
        good, wrong = (run(code, name, SAMPLES[name][1], require_isolation=args.require_isolation)
                       for code in (SAMPLES[name][0], SAMPLES[name][0].replace("*", "+")))
        print(f"{name:11} {'PASS' if good.passed and not wrong.passed else 'FAIL'} in "
              f"{good.seconds:.3f} s  {good.reason}")
    print("layers:", ", ".join(run("pass").isolation))
