"""``altgrad parity`` and what is printed: the verdict, the exit code, the file, and what a user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from altgrad.cli import main
from altgrad.parity import Make, compare, lockstep
from altgrad.parity.show import comparison_table, lockstep_report
from altgrad.parity.weights import load_weights, save_weights
from altgrad_core.twins import GPTShape, MLPShape, Recipe, Shape

ROOT = Path(__file__).resolve().parents[1]
PAIR = """
import jax, jax.numpy as jnp, numpy as np, torch
from altgrad.parity import made_by

start, rate = np.random.default_rng(0).normal(size=64).astype(np.float32), np.float32(-0.1)

def jax_side():
    update = jax.jit(lambda w: w + w * rate)
    return jnp.asarray(start), lambda w, k: (update(w), {"w": made_by(update(w), "multiply_add", x=w, y=rate, z=w)})

def torch_side():
    return torch.from_numpy(start), lambda w, k: (w + w * -0.1, {"w": w + w * -0.1})

def torch_fused():
    rates = torch.full((64,), -0.1)
    step = lambda w: torch.addcmul(w, w, rates)
    return torch.from_numpy(start), lambda w, k: (step(w), {"w": step(w)})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user's pair lies."""
    (tmp_path / "a_pair.py").write_text(PAIR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["altgrad", "parity", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    finally:
        sys.modules.pop("a_pair", None)
    return 0


def test_a_pair_that_parts(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ("--jax", "a_pair:jax_side", "--torch", "a_pair:torch_side")
    assert run(monkeypatch, *sides, "--steps", "9", "--json", "found.json") == 1
    said = capsys.readouterr().out
    assert said.startswith("jax and torch part at step 0, in w: fused multiply-add")
    assert "jax rounded once; torch rounded twice" in said
    assert "jax against jax again" in said
    found = json.loads((folder / "found.json").read_text())
    assert (found["steps"], found["identical_steps"], found["passed"]) == (1, 0, False)
    assert found["first_difference"]["cause"] == "fused multiply-add"


def test_a_pair_that_stays_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ("--jax", "a_pair:jax_side", "--torch", "a_pair:torch_fused")
    assert run(monkeypatch, *sides, "--steps", "9") == 0
    assert capsys.readouterr().out.startswith("jax and torch are identical in 9 steps, every bit")
    near = ("--jax", "a_pair:jax_side", "--torch", "a_pair:torch_side")
    assert run(monkeypatch, *near, "--steps", "9", "--tolerance-ulps", "99", "--repeat-steps", "0") == 0
    assert capsys.readouterr().out.startswith("jax and torch are within tolerance in 9 steps, ")
    assert run(monkeypatch, *near, "--steps", "9", "--tolerances", "w", "99", "--repeat-steps", "0") == 0
    assert run(monkeypatch, *near, "--steps", "9", "--tolerances", ".*", "99", "--repeat-steps", "0") == 0
    capsys.readouterr()
    assert run(monkeypatch, *sides, "--steps", "2", "--ignore", "nan payload", "signed zero") == 0
    assert "identical in 2 steps, but for nan payload and signed zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--torch", "a_pair:x"], "--jax is missing; expected both sides, --jax package.module:make --torch"),
        (
            ["--jax", "a:b", "--torch", "a:b", "--format", "E5M2"],
            "--format would have no effect with --jax and --torch",
        ),
        (["--jax", "a:b", "--save-weights", "w"], "--save-weights would have no effect with --jax and --torch"),
        (["--save-weights", "no/such/file"], "--save-weights is no/such/file; expected a file in a folder that exists"),
        (["--weights", "no_such_file"], "No such file or directory: 'no_such_file'"),
        (["--weights", "a_pair.py"], "a_pair.py is no whole safetensors file"),
        (["--jax", "a:b", "--seed", "1"], "--seed would have no effect with --jax and --torch"),
        (["--seed", "-1"], "--seed is -1; expected 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed is 4294967296; expected 0 to 4294967295"),
        (["--json", "."], "--json is ., which is a folder; expected a file"),
        (["--html", ".."], "--html is .., which is a folder; expected a file"),
        (["--save-weights", "."], "--save-weights is ., which is a folder; expected a file"),
        (["--json", "x", "--html", "./x"], "--html is x, as --json is; expected another file"),
        (["--html", "x", "--save-weights", "x"], "--save-weights is x, as --html is; expected another file"),
        (["--format", "E5N2"], "unknown format 'E5N2'"),
        (["--activation", "gelu"], "--activation gelu would have no effect: it is for --model gpt"),
        (["--rounding", "stochastic"], "only committed weights are rounded"),
        (["--html", "no/such/file"], "expected a file in a folder that exists"),
        (["--jax", "a_pair:jax_side"], "--torch is missing; expected both sides"),
        (["--jax", "a_pair", "--torch", "a_pair:x"], "--jax is 'a_pair'; expected a module and a function of it"),
        (["--jax", "a_pear:x", "--torch", "a_pair:x"], "there is no module 'a_pear'"),
        (["--jax", "a_pair.x:x", "--torch", "a_pair:x"], "there is no module 'a_pair.x'"),
        (["--jax", "a_pair:jax_sid", "--torch", "a_pair:x"], "no function 'jax_sid'; did you mean 'jax_side'?"),
        (["--jax", "a_pair:jax_side", "--torch", "a_pair:torch_side", "--steps", "0"], "steps is 0"),
        (["--jax", "a_pair:jax_side", "--torch", "a_pair:torch_side", "--tolerances", "ww", "1"], "the nearest is 'w'"),
        (["--jax", "a:b", "--torch", "a:b", "--json", "no/such/file"], "expected a file in a folder that exists"),
        (["--jax", "a_pair:start", "--torch", "a_pair:x"], "has no function 'start'"),
    ],
)
def test_bad_input_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    message = said.out + said.err
    assert "Traceback" not in message
    assert expected in " ".join(message.replace("│", " ").split())


def test_the_built_in_pair(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("altgrad.parity.cli.MLPShape", lambda: MLPShape((24, 16, 10), batch=8))
    options = ("--format", "E7M0", "--storage", "committed", "--steps", "3", "--repeat-steps", "1")
    assert run(monkeypatch, *options, "--json", "found.json", "--html", "found.html") == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "jax and torch are identical in 3 steps, every bit\nMLP 784-512-512-10 in E7M0, SGD, committed"
    )
    found = json.loads((folder / "found.json").read_text())
    assert found["about"].endswith("committed weights, rounded stochastically, exact sums, seed 0")
    assert [step["identical"] == step["tensors"] for step in found["history"]] == [True] * 3
    page = (folder / "found.html").read_text()
    assert "jax and torch are identical in 3 steps, every bit" in page
    assert "0 to 2" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_weights_come_from_files_and_go_to_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = MLPShape((6, 4, 3), batch=2)
    monkeypatch.setattr("altgrad.parity.cli.MLPShape", lambda: shape)
    for seed in (7, 8):
        save_weights(folder / f"start {seed}", shape.initial_weights(seed))
    # So few products of so few bits are exact in float32, too, and native sums compile in no time.
    options = ("--accumulate", "native", "--format", "E0M7", "--steps", "2", "--seed", "7")
    assert run(monkeypatch, *options, "--save-weights", "by seed") == 0
    assert run(monkeypatch, *options, "--weights", "start 7", "--save-weights", "by file") == 0
    assert ", seed 7, from start 7" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, *options, "--weights", "start 8", "--save-weights", "other") == 0
    ends = {name: load_weights(folder / name, shape) for name in ("start 7", "by seed", "by file", "other")}
    for name, weight in ends["by seed"].items():
        np.testing.assert_array_equal(weight.view(np.int32), ends["by file"][name].view(np.int32))
    for name in ("start 7", "other"):
        assert np.any(ends[name]["layer0.weight"] != ends["by seed"]["layer0.weight"])


def test_the_gpt_with_gelu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def sides(shape: Shape, recipe: Recipe, weights: object) -> tuple[Make[float], Make[float]]:
        asked.append(shape)
        return (lambda: (0.0, lambda state, step: (state, {"w": np.float32(1)})),) * 2

    monkeypatch.setattr("altgrad.parity.twins.sides_of", sides)
    assert run(monkeypatch, "--model", "gpt", "--activation", "gelu", "--steps", "1") == 0
    assert "GPT of 2 layers with GELU in E5M2" in capsys.readouterr().out
    assert run(monkeypatch, "--model", "gpt", "--steps", "1") == 0
    assert asked == [GPTShape(activation="gelu"), GPTShape(activation="relu")]


def test_weights_that_differ_are_not_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parting(shape: Shape, recipe: Recipe, weights: object) -> tuple[Make[float], Make[float]]:
        def side(end: float) -> Make[float]:
            return lambda: (0.0, lambda state, step: (state, {"weight.w": np.float32(end)}))

        return side(1), side(2)

    monkeypatch.setattr("altgrad.parity.twins.sides_of", parting)
    assert run(monkeypatch, "--steps", "1", "--save-weights", "ends") == 1
    assert "ends is not written: the two do not end with the same weights" in capsys.readouterr().out
    assert not (folder / "ends").exists()


def test_a_page_names_the_first_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = ("--jax", "a_pair:jax_side", "--torch", "a_pair:torch_side")
    assert run(monkeypatch, *sides, "--steps", "9", "--html", "found.html") == 1
    page = (folder / "found.html").read_text()
    assert "The first difference" in page
    assert "jax rounded once; torch rounded twice" in page
    assert "a_pair:jax_side and a_pair:torch_side" in page


def bracketed(shape: Shape, recipe: Recipe, weights: object) -> tuple[Make[float], Make[float]]:
    """Sides that differ in a tensor whose name rich would take for markup, and fail at."""

    def side(value: float) -> Make[float]:
        return lambda: (0.0, lambda state, step: (state, {"w[bold]/[/red]x": np.float32(value)}))

    return side(1), side(2)


def test_names_in_brackets_are_no_markup(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("altgrad.parity.twins.sides_of", bracketed)
    assert run(monkeypatch, "--steps", "1", "--save-weights", "w[i]") == 1
    said = capsys.readouterr().out
    assert "step 0, w[bold]/[/red]x" in said
    assert "w[i] is not written" in said


def test_files_are_written_before_anything_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("altgrad.parity.twins.sides_of", bracketed)
    monkeypatch.setattr("altgrad.parity.cli.print_lockstep", unread)
    assert run(monkeypatch, "--steps", "1", "--json", "found.json", "--html", "found.html") == 130
    assert json.loads((folder / "found.json").read_text())["first_difference"]["tensor"] == "w[bold]/[/red]x"
    assert "w[bold]/[/red]x" in (folder / "found.html").read_text()


def test_a_file_that_cannot_be_written_costs_no_verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("altgrad.parity.twins.sides_of", bracketed)
    monkeypatch.setattr(Path, "write_text", full)
    assert run(monkeypatch, "--steps", "1", "--json", "found.json") == 2
    said = capsys.readouterr()
    assert said.out.startswith("jax and torch part at step 0")
    assert said.err == "altgrad: no space left\n"


def test_a_side_that_fails_is_no_difference(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a_pair.py").write_text(PAIR + "def broken():\n    return 0, lambda state, step: 1 / 0\n")
    assert run(monkeypatch, "--jax", "a_pair:jax_side", "--torch", "a_pair:broken", "--steps", "1") == 2
    assert capsys.readouterr().err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_missing_framework_is_named(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from altgrad.cli import main;"
        "sys.argv = ['altgrad', 'parity', '--jax', 'a_pair:jax_side', '--torch', 'a_pair:torch_side']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "torch is not installed; this command needs the extra altgrad[torch]" in done.stderr
    assert "Traceback" not in done.stderr


def printed(part: object) -> str:
    console = Console(width=160, file=StringIO())
    console.print(part)
    return console.file.getvalue()


def test_the_table_of_a_comparison() -> None:
    a = {"same": np.ones(2), "w": np.float32([[1, 2]]), "gone": np.ones(1), "half": np.ones(2, np.float16)}
    b = {"same": np.ones(2), "w": np.float32([[1, -2]]), "half": np.ones(2, np.float32)}
    said = printed(comparison_table(compare(a, b, labels=("jax", "torch"))))
    assert "at [0, 1] 2 (0x40000000) against -2 (0xc0000000)" in said
    assert "is missing in torch" in said
    assert "float16 / float32" in said
    assert "cause: unknown" in said
    said = printed(comparison_table(compare({"h[i]": 1.0, "w[bold]/[/red]x": 1.0}, {"h[i]": 1.0})))
    assert "h[i] " in said
    assert "w[bold]/[/red]x" in said
    many = {f"w{k}": np.float32(k) for k in range(100)}
    said = printed(comparison_table(compare(many, many | {"w99": np.float32(0)})))
    assert "w99" in said  # those that differ come first
    assert "and 60 more" in said


def test_the_report_of_a_side_that_does_not_repeat_itself() -> None:
    count = iter(range(99))
    found = lockstep(*[lambda: (0, lambda state, k: (0, {"w": next(count)}))] * 2, steps=2, labels=("jax", "torch"))
    assert "jax does not repeat itself, so nothing was compared" in printed(lockstep_report(found))


def test_labels_in_brackets_are_no_markup() -> None:
    found = lockstep(*[lambda: (0, lambda state, k: (0, {"w": 1.0}))] * 2, steps=1, labels=("a[i]", "b[/red]"))
    assert "a[i] against b[/red]" in printed(lockstep_report(found))
