"""Draw the laws that scaling.py fits: one PNG per table of runs (needs matplotlib).

    python bench/plot_laws.py --data recipes/scaling.csv --degree 2 --within 0.05 --out runs/plots

Each picture shows the best learning rate and batch size over D, one colour per model size, with the
fitted law (line), Step Law's (dashed) and DeepSeek's (dotted); and predicted against measured loss.
The flags are those of `scaling.py fit`; --out is the folder of the pictures.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.args import cli, require  # noqa: E402
from lib.laws import PUBLISHED, Law, LossLaw  # noqa: E402
from scaling import Args, fit  # noqa: E402


def draw_loss(axes, law: LossLaw) -> None:
    predicted = law.predict(**dict(zip(law.axes, law.x.T, strict=True)))
    ends = [law.y.min(), law.y.max()]
    axes.plot(law.y, predicted, "o")
    axes.plot(ends, ends, "k-")
    axes.set(xlabel="measured", ylabel="predicted")


def draw_settings(axes, law: Law, published: dict[str, Law]) -> None:
    """Draw the optima of one of lr and batch, a law of N and D, and the laws for it."""
    D = np.geomspace(*law.seen[1])
    for number, N in enumerate(np.unique(law.x[:, 0])):
        color = f"C{number}"
        of_size = law.x[:, 0] == N
        axes.loglog(law.x[of_size, 1], law.y[of_size], "o", color=color, label=f"N {N:.3g}")
        laws = [law, published["Step Law"], published["DeepSeek"]]
        for drawn, style in zip(laws, ("-", "--", ":"), strict=True):
            axes.loglog(D, drawn.predict(N=N, D=D, C=6 * N * D), style, color=color)
    axes.set(xlabel="D, tokens")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)  # below: it hides no line


def main(args: Args) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        pyplot = None
    require(pyplot is not None, "no plots without matplotlib: pip install matplotlib")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for table, laws in fit(args).items():
        names = [name for name in laws if name != "batch(D)"]
        figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            axes.set(title=f"{table}: {name}")
            if name == "loss":
                draw_loss(axes, laws[name])
            else:
                draw_settings(axes, laws[name], PUBLISHED[name])
        figure.savefig(folder / f"{table}.png", bbox_inches="tight")
        print(f"plot {folder}/{table}.png")


if __name__ == "__main__":
    cli(main, Args)
