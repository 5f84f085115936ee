"""The house keeps its budgets (tests/house.py); the measure itself, by hand on small files."""
import ast

import house


def test_the_house_is_within_its_budgets():
    files = {path: house.measure(path) for path in house.project_files()}
    assert house.over_budget(files) == []


def test_density_by_hand(tmp_path, monkeypatch):
    """Two code lines: `x = 1` has 3 nodes, `f(x)` has 4, the docstring 2."""
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text('"""Doc.\n\nMore."""\n# why\n\nx = 1\nf(x)\n')
    file = house.measure(path)
    assert (file.lines, file.code_lines, file.nodes, file.golf) == (7, 2, 9, [])
    assert file.density == 4.5 and file.is_root


def test_each_kind_of_golf_is_seen_and_its_long_hand_is_not():
    folded = ["a = 'x' * (b > 1)", "a, b, c = 1, 2, 3", "a, b = (f(x) for x in y)", "f(*g(x))",
              "a = 1 if b else 2 if c else 3", "a or f()",
              "[[[x for x in y] for y in z] for z in w for v in u]"]
    plain = ["a = 'x' * 3", "a, b = 1, 2", "a, b = f(x)", "f(*x)", "a = 1 if b else 2", "f()",
             "[[x for x in y] for y in z]"]
    assert [len(house.golf(ast.parse(line))) for line in folded] == [1] * 7
    assert [house.golf(ast.parse(line)) for line in plain] == [[]] * 7


def test_an_import_upwards_is_found(tmp_path, monkeypatch):
    """A room may import model.py, not a stage; a program that is run by python -m may."""
    monkeypatch.setattr(house, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    for name in house.MISSION:
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    (tmp_path / "data" / "mix.py").write_text("import model\nfrom sft import x\n")
    (tmp_path / "data" / "__main__.py").write_text("import sft\n")
    files = {path: house.measure(path) for path in house.project_files()}
    assert house.over_budget(files) == ["data/mix.py imports sft.py: rooms lie below the root"]
    assert house.closure(tmp_path / "data" / "mix.py", files) == 2 + 1 + 1
