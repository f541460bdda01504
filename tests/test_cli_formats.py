"""``altgrad formats``, ``explain`` and ``vectors`` as commands: what they print, refuse, and import."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from altgrad.cli import main
from altgrad.show.cli import ExplainConfig, FormatsConfig, explain, formats
from altgrad.story import binades, distinct_formats, in_words, multiples, namesakes, other_names, positive_values
from altgrad_core.formats import FORMAT_REGISTRY, parse
from altgrad_core.vectors import golden_vectors, read_vectors, vector_lines

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command and returns what it printed, with spaces as one."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["altgrad", *arguments])
        main()
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split())

    return run


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs the command, expects it to refuse, and returns what it said."""

    def fails(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["altgrad", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        said = capsys.readouterr()
        message = said.out + said.err
        assert "Traceback" not in message
        return " ".join(message.replace("│", " ").split())

    return fails


def printed(width: int, *names: str, plot: bool = False) -> list[str]:
    out = io.StringIO()
    formats(FormatsConfig(names, plot), Console(file=out, width=width))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_registry_fits_and_is_whole(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    named = set(map(str, distinct_formats())) if width < 80 else set(FORMAT_REGISTRY)
    assert named <= set(text.replace(",", " ").split())
    assert "124" in next(line for line in lines if line.startswith("E3M4 "))
    assert "0.9921875" in next(line for line in lines if line.startswith("E0M7 "))
    assert "2^-126" in next(line for line in lines if line.startswith("bf16 "))


NARROW = pytest.mark.parametrize("width", [30, 40, 60, 80])


@NARROW
@pytest.mark.parametrize("name", ["E4M3", "bf16", "float32", "E8M0b130fnu"])
def test_a_story_is_whole(name: str, width: int) -> None:
    """Beyond the end of the line rather than cut: the same numbers as with all the room in the world."""
    told = "\n".join(printed(width, name, plot=True))
    assert "…" not in told
    wide = "\n".join(printed(300, name))
    spacing = wide[wide.index("Spacing") : wide.index("\nOverflow")]
    assert set(spacing.replace("─", "").split()) <= set(told.split())


@NARROW
@pytest.mark.parametrize(
    "arguments",
    ["1e-39 --format float32", "1.3 --format E4M3", "1e-30 --format bf16", "1000 --format E4M3", "-1e9 --format fp16"],
)
def test_an_explanation_is_whole(width: int, arguments: str) -> None:
    def rows(width: int) -> list[str]:
        value, _, name = arguments.split()
        out = io.StringIO()
        explain(ExplainConfig(value, name), Console(file=out, width=width))
        told = out.getvalue()
        assert "…" not in told
        return [" ".join(line.split()) for line in told[told.index("Candidates") :].splitlines()]

    wide = rows(300)
    assert wide[1 : wide.index("")][2:] == rows(width)[1 : wide.index("")][2:]
    for library in ("ml_dtypes", "torch", "gfloat"):
        whole, narrow = (next((row for row in told if row.startswith(library)), "") for told in (wide, rows(width)))
        assert whole.split()[:4] == narrow.split()[:4]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("name", [*FORMAT_REGISTRY, "E4M3b11fnuz", "E8M7b140", "E2M3", "E4M11", "E7M8ieee"])
def test_a_story_fits(name: str, width: int) -> None:
    lines = printed(width, name, plot=True)
    assert max(map(len, lines)) <= width
    assert "…" not in "\n".join(lines)
    assert lines[0] == name
    assert any("Too large" in line for line in lines) or parse(name).is_float32


def test_what_a_story_tells(run) -> None:
    told = run("formats", "E1M6")
    assert "E0M7 is 0.25 x E1M6, on every code" in told
    assert "a failing run goes to E3M4" in told
    told = run("formats", "E3M4")
    assert "not to be taken for float8_e3m4 (bias 3, specials: inf NaN, max 15.5)" in told
    assert "0.0625 0.9375 0.0625 100% 15 0x01 to 0x0f" in told
    assert "0x78 96 100 104 108 112 116 120 124" in told
    assert "clip threshold 0.00216239 x the base" in told
    told = run("formats", "float8_e4m3fn")
    assert "equals E4M3, E4M3fn" in told
    assert "NaN 0x7f 0xff" in told
    assert "beyond 464, which still rounds to max" in told
    assert "±inf 0x7c 0xfc; NaN 0x7d to 0x7f, 0xfd to 0xff (as a result 0x7e)" in run("formats", "E5M2")
    assert "NaN 0x80" in run("formats", "float8_e4m3fnuz")
    assert "eeeeeeee (bit 7 to bit 0)" in run("formats", "float8_e8m0fnu")


def test_several_formats_side_by_side(run) -> None:
    told = run("formats", "E3M4", "E4M3b3", "--plot")
    assert "4/3/3" in told
    assert "█" in told
    assert "E5M2 " not in told


@pytest.mark.parametrize("name", [name for name in FORMAT_REGISTRY if parse(name).bits <= 16])
def test_binades_are_the_values(name: str) -> None:
    known = parse(name)
    book, codes = known.code_book(), []
    for binade in binades(known):
        values = book[binade.first : binade.last + 1]
        codes += range(binade.first, binade.last + 1)
        assert (values[0], values[-1]) == (binade.low, binade.high)
        assert all(after - before == binade.step for before, after in pairwise(values))
        assert binade.is_subnormal == (known.is_signed and binade.first < 1 << known.mantissa_bits)
    assert len(codes) == positive_values(known) == (book[: known.max_code + 1] > 0).sum()
    assert in_words(known).startswith(f"{name} has {known.bits} bits")


def test_names() -> None:
    assert other_names(parse("float8_e4m3fn")) == ["E4M3"]
    assert multiples(parse("E1M6")) == [("E0M7", 0.25)]
    assert multiples(parse("float8_e4m3fnuz")) == [("float8_e4m3b11fnuz", 0.125)]
    assert multiples(parse("E5M2")) == []
    assert [str(other) for other in namesakes(parse("E4M3"))] == [
        "float8_e4m3",
        "float8_e4m3fnuz",
        "float8_e4m3b11fnuz",
    ]
    assert len(set(map(str, distinct_formats()))) == len(distinct_formats())


def test_explain(run) -> None:
    told = run("explain", "1.5", "--format", "E7M0")
    assert "1.5 in E7M0 is 2" in told
    assert "code 0x40 = 0 1000000" in told
    assert "float32 0x40000000" in told
    told = run("explain", "0.1", "--format", "E5M2")
    assert "0.1 is not a float32, the nearest one is 0.100000001490116119384765625" in told
    told = run("explain", "-1e30", "--format", "E4M3")
    for policy, result in (("native", "NaN"), ("saturate", "-448"), ("saturate_finite", "-448")):
        assert f"{policy} {result} " in told


@pytest.mark.parametrize("value", ["-0", "-1e-3", "-inf", "-nan", "-0x1.8p3", "-2^-3", "nan", "0x7f800001"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_explain_takes_negative_numbers(run, value: str, rounding: str) -> None:
    assert f"{value} in E5M2 is " in run("explain", value, "--format", "E5M2", "--rounding", rounding)


def test_vectors(run, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    said = run("vectors", "--format", "E2M1", "--out", str(path), "--rounding", "stochastic", "--stochastic-bits", "4")
    vectors = read_vectors(path)
    assert said.endswith(str(path))
    assert f"{len(vectors):,} vectors" in said
    assert (vectors.rounding, vectors.stochastic_bits) == ("stochastic", 4)
    run("vectors", "--format", "E2M1", "--out", str(path), "--overwrite", "--random-inputs", "0")
    assert read_vectors(path).rounding == "nearest_even"


def test_vectors_to_standard_output(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["altgrad", "vectors", "--format", "E2M1", "--random-inputs", "0", "--out", "-"])
    main()
    said = capsys.readouterr()
    made = golden_vectors("E2M1", random_inputs=0)
    assert said.out.splitlines(keepends=True) == list(vector_lines(made))
    assert said.err == f"{len(made):,} vectors\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["formats", "e4m3"], "did you mean E4M3"),
        (["formats", "E3M4", "fp8"], "unknown format 'fp8'"),
        (["explain", "1.5", "--format", "e5m2"], "did you mean E5M2"),
        (["explain", "1,5", "--format", "E5M2"], "did you mean 1.5?"),
        (["explain", "0x3fc", "--format", "E5M2"], "8 digits (0x000003fc)"),
        (["explain", "1.5"], "--format"),
        (["explain", "1.5", "--format", "E5M2", "--rounding", "up"], "nearest_even"),
        (["explain", "1.5", "--format", "E5M2", "--random-bits", "3"], "--random-bits has no effect"),
        (["explain", "1.5", "--format", "E5M2", "--stochastic-bits", "3"], "--stochastic-bits has no effect"),
        (["vectors", "--format", "E9M9", "--out", "v"], "19 bits"),
        (["vectors", "--format", "float32", "--out", "v"], "at most 16"),
        (["vectors", "--format", "E5M2", "--out", "v", "--stochastic-bits", "3"], "--stochastic-bits has no effect"),
        (["vectors", "--format", "E5M2", "--out", "v", "--random-inputs", "-1"], "random_inputs is -1"),
        (["vectors", "--format", "E5M2", "--out", "missing/v"], "missing/v"),
        (["vectors", "--format", "E5M2", "--out", "-", "--overwrite"], "--overwrite has no effect with --out -"),
        (["fromats"], "unknown command 'fromats'; did you mean formats?"),
        ([], "usage: altgrad COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(fails, monkeypatch, tmp_path: Path, arguments, expected) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in fails(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_left_alone(fails, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("kept")
    message = fails("vectors", "--format", "E2M1", "--out", str(path))
    assert f"{path} exists" in message
    assert "--overwrite" in message
    assert path.read_text() == "kept"


@pytest.mark.parametrize("arguments", ["'formats'", "'formats', 'E3M4', '--plot'", "'--help'", "'vectors', '--help'"])
def test_imports_no_framework(arguments: str) -> None:
    code = (
        f"import sys; sys.argv = ['altgrad', {arguments}]\nfrom altgrad.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert not {'jax', 'torch', 'flax', 'gfloat'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["formats", "--plot"],
        ["formats", "E5M2", "--plot"],
        ["explain", "1e-40", "--format", "float32"],
    ],
    ids=" ".join,
)
def test_outputs_of_any_encoding(encoding: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "altgrad", *arguments],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lacking = encoding == "ascii" or "--plot" in arguments
    assert ("?" in done.stdout.decode(encoding)) == lacking


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "altgrad", "formats", "E7M0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "E7M0" in done.stdout


def test_the_overview_names_every_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["altgrad", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for command in ("train", "study", "report", "formats", "explain", "vectors", "packed"):
        assert f"\n  {command} " in said


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [("rich", "formats", "cli"), ("tyro", "explain", "cli"), ("tyro", "train", "train"), ("plotly", "study", "report")],
)
def test_a_missing_package_names_its_extra(monkeypatch, fails, package: str, command: str, extra: str) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=package)

    monkeypatch.setattr("altgrad.cli.import_module", missing)
    assert f"{package} is not installed; this command needs the extra altgrad[{extra}]" in fails(command)


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m altgrad vectors --format E4M3 --out - | head -1"
    piped = f"{command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    assert json.loads(done.stdout)["count"] == 3576
