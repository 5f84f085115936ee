"""Try every language in the sandbox: python -m tasks.sandbox"""
import argparse

from tasks.sandbox import REQUIRED, SAMPLES, isolation_gaps, languages, run


def main():
    parser = argparse.ArgumentParser(description="Try every language in the sandbox.")
    parser.add_argument("--require_isolation", action="store_true",
                        help=f"refuse to run unless these layers hold: {', '.join(REQUIRED)}")
    isolated = parser.parse_args().require_isolation
    for name, lack in languages().items():
        if lack:
            print(f"{name:11} not here: {lack}")
            continue
        code, tests = SAMPLES[name]
        right = run(code, name, tests, require_isolation=isolated)
        wrong = run(code.replace("*", "+"), name, tests, require_isolation=isolated)
        verdict = "PASS" if right.passed and not wrong.passed else "FAIL"
        print(f"{name:11} {verdict} in {right.seconds:.3f} s  {right.reason}")
    print("layers:", ", ".join(run("pass").isolation))
    for layer, harm in isolation_gaps().items():
        print(f"without {layer!r} a program can {harm}")


if __name__ == "__main__":
    main()
