"""Try every language in the sandbox: python -m tasks.sandbox"""
from tasks.sandbox import SAMPLES, isolation_gaps, languages, run


def main():
    """Print the layers of isolation, and per language whether it tells right code from wrong."""
    for layer, harm in isolation_gaps().items():
        print(f"without {layer!r} a program can {harm}")
    print("layers:", ", ".join(run("pass").isolation))
    for name, lack in languages().items():
        if lack:
            print(f"{name:11} not here: {lack}")
            continue
        code, tests = SAMPLES[name]
        right = run(code, name, tests)
        wrong = run(code.replace("*", "+"), name, tests)
        is_right = right.passed and not wrong.passed
        verdict = "PASS" if is_right else "FAIL"
        print(f"{name:11} {verdict} in {right.seconds:.3f} s  {right.reason}")


if __name__ == "__main__":
    main()
