"""What a user gets wrong on the command line: a message that names it, exit code not 0, and nothing written."""

from __future__ import annotations

import dataclasses
import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.cli import main
from altgrad.study.runner import StudyConfig
from altgrad.train import TrainConfig

_SMALL = ["--steps", "3", "--batch", "1", "--context", "8", "--layers", "1", "--width", "8", "--heads", "1"]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command asks for a device for each core: not in the process of the other tests."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")


def _fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, expect it to refuse, and return what it said, on one line."""
    monkeypatch.setattr(sys, "argv", ["altgrad", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    message = said.out + said.err
    assert "Traceback" not in message
    return " ".join(message.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format", "e4m3"], "did you mean E4M3"),
        (["--format", "E9M9"], "19 bits"),
        (["--format", "float32", "--shift"], "float32 run cannot shift"),
        (["--format", "bf16", "--shift"], "bf16 run cannot shift"),
        (["--shift", "--no-recover"], "a shift needs recovery"),
        (["--clip", "--base-clip", "0"], "base_clip is 0.0; expected a positive finite number"),
        (["--clip", "--base-clip", "nan"], "base_clip is nan"),
        (["--clip", "--overflow-threshold", "1.5"], "overflow_threshold is 1.5; expected a fraction"),
        (["--base-clip", "2"], "--base-clip has no effect without --clip"),
        (["--nan-patience", "2"], "--nan-patience has no effect without --shift"),
        (["--shift", "--nan-patience", "0"], "nan_patience is 0; expected an integer of at least 1"),
        (["--shift", "--stall-threshold", "0.6"], "--stall-threshold has no effect"),
        (["--no-recover", "--snapshot-every", "5"], "--snapshot-every has no effect without --recover"),
        (["--no-recover", "--snapshots-kept", "3"], "--snapshots-kept has no effect without --recover"),
        (["--no-recover", "--rollback-moments", "reset"], "--rollback-moments has no effect without --recover"),
        (["--snapshots-kept", "0"], "--snapshots-kept is 0; expected at least 1"),
        (["--rollback-moments", "new"], "invalid choice 'new'"),
        (["--storage-rounding", "stochastic"], "expected it with --storage committed"),
        (["--format", "float32", "--storage", "committed"], "has no effect in float32"),
        (["--format", "float32", "--operand-overflow", "native"], "--operand-overflow has no effect"),
        (["--inject", "nan120"], "cannot read the fault 'nan120'; expected nan@120:5"),
        (["--inject", "bang@12"], "cannot read the fault 'bang@12'"),
        (["--inject", "nan@1:x"], "'x' is not a number of batches"),
        (["--inject", "nan@1:0"], "'0' is not a number of batches"),
        (["--inject", "spike@1:big"], "'big' is not a number"),
        (["--inject", "gradient@1:x"], "'x' is not a number"),
        (["--inject", "zeros@1:x"], "'x' is not a number of batches"),
        (["--clip-rule", "quantile"], "--clip-rule has no effect without --clip"),
        (
            ["--clip", "--clip-rule", "ungated", "--overflow-threshold", "0.1"],
            "has no effect without a gated --clip-rule",
        ),
        (["--no-recover", "--no-refuse-spikes"], "--no-refuse-spikes has no effect without --recover"),
        (["--scaling", "static", "--no-calibrate"], "--no-calibrate has no effect without --scaling delayed"),
        (["--scaling", "static", "--no-refuse-spikes"], "without --scaling delayed (or --shift and --policy by_cause)"),
        (
            ["--scaling", "static", "--no-refuse-spikes", "--shift", "--policy", "relative_stall"],
            "--no-refuse-spikes has no effect without --scaling delayed (or --shift and --policy by_cause)",
        ),
        (["--format", "float32", "--repair-scales"], "--repair-scales has no effect"),
        (["--inject", "nan@3"], "would never happen: the run has steps 0 to 2"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "4294967296"], "--seed is 4294967296; expected 0 to 4294967295"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected a positive number"),
        (["--learning-rate", "inf"], "--learning-rate is inf; expected a positive number"),
        (["--learning-rate", "0"], "--learning-rate is 0.0; expected a positive number"),
        (["--clip", "--base-clip", "1e-50"], "base_clip is 1e-50; expected a positive finite number"),
        (["--inject", "nan@1:²"], "'²' is not a number of batches"),
        (["--inject", ""], "cannot read the fault ''"),
        (["--inject", "nan@-1"], "cannot read the fault 'nan@-1'"),
        (["--inject", "nan@1", "spike@1:"], "cannot read the fault 'spike@1:'"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--context", "0"], "--context is 0; expected at least 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0; expected at least 1"),
        (["--policy", "fallback_chain"], "--policy has no effect without --shift"),
        (["--policy", "relative_stall"], "--policy has no effect without --shift"),
        (["--policy", "by_case"], "by_cause"),
        (["--per-layer"], "--per-layer has no effect without --shift and a --policy that judges rates"),
        (
            ["--shift", "--per-layer", "--policy", "relative_stall"],
            "--per-layer has no effect without --shift and a --policy that judges rates",
        ),
        (["--shift", "--per-layer", "--policy", "off"], "--per-layer has no effect without --shift and a --policy"),
        (["--recover-after", "50"], "--recover-after has no effect without --shift"),
        (["--shift", "--recover-after", "0"], "--recover-after is 0; expected an integer of at least 1"),
        (["--shift", "--recover-after", "3"], "--recover-after 3 would never happen: the run has 3 steps"),
        (["--shift", "--policy", "off", "--stall-threshold", "0.6"], "--stall-threshold has no effect"),
        (
            ["--shift", "--storage", "committed", "--policy", "off", "--stall-threshold", "0.6"],
            "--stall-threshold has no effect",
        ),
        (["--format", "E4M4b3", "--shift"], "E4M4b3 run cannot shift"),
        (["--heads", "3"], "does not divide width 8; nearest is 2"),
        (["--layers", "0"], "layers is 0; expected at least 1"),
        (["--storage", "elsewhere"], "master"),
        (["--resume"], "holds no run to resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(monkeypatch, capsys, tmp_path, arguments, expected):
    out = tmp_path / "run"
    message = _fails(monkeypatch, capsys, "train", *_SMALL, "--out", str(out), *arguments)
    assert expected in message
    assert not out.exists()


def test_a_folder_that_exists_is_left_alone(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine").write_text("kept")
    message = _fails(monkeypatch, capsys, "train", *_SMALL, "--out", str(tmp_path))
    assert f"{tmp_path} exists" in message
    assert "--resume" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"to be or not to be", "needs at least 90"),
        ("latin.txt", b"\xe9t\xe9" * 100, "cannot be read as UTF-8"),
        ("not.gz", b"plain text" * 100, "cannot be read"),
        ("cut.gz", gzip.compress(b"text" * 1000, mtime=0)[:20], "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_data_files(monkeypatch, capsys, tmp_path, name, content, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = _fails(monkeypatch, capsys, "train", *_SMALL, "--out", str(tmp_path / "run"), "--data", str(path))
    assert expected in message
    assert str(path) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["study", "--formats", "float32", "fp8"], "unknown format 'fp8'"),
        (["study", "--formats", "float32", "fp16"], "fp16 has no fallback"),
        (["study", "--seeds", "0"], "--seeds is 0"),
        (["study", "--scenes", "clean", "--faults", "nan@3"], "--faults have no effect without the stress scene"),
        (["report", "--folder", "nowhere"], "nowhere"),
        (["explain", "abc", "--format", "E4M3"], "a power of two (2^-9, 3*2^40), nan, inf or a float32 bit pattern"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands(monkeypatch, capsys, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in _fails(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_study_takes_other_names_of_the_formats_that_shift():
    assert StudyConfig(formats=("float32", "float8_e4m3fn"), scenes=("stress",)).formats[1] == "float8_e4m3fn"


@pytest.mark.parametrize(
    "options",
    [
        {"per_layer": True},
        {"scaling": "static", "refuse_spikes": False},
        {"storage": "committed", "stall_threshold": 0.6},
        {"policy": "relative_stall"},
        {"policy": "fallback_chain", "per_layer": True},
    ],
    ids=str,
)
def test_options_that_have_an_effect_in_a_run_that_shifts(options):
    assert TrainConfig(shift=True, **options).plan().controller()


def test_help_lists_every_option_with_its_text():
    command = [sys.executable, "-c", "from altgrad.cli import main; main()", "train", "--help"]
    root = Path(__file__).parents[1]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=None).stdout
    text = " ".join(said.replace("│", " ").split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("(default:") == len(dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("rule", ["max", "binades", "scaled_max", "quantile"])
def test_float32_casts_overflow_never_and_open_no_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    out = tmp_path / "run"
    clipping = ["--format", "float32", "--clip", "--clip-rule", rule]
    said = _fails(monkeypatch, capsys, "train", "--out", str(out), *clipping, *_SMALL)
    assert "--clip has no effect without a format other than float32 (or --clip-rule ungated)" in said
    assert not out.exists()


def test_float32_runs_clip_where_no_overflow_is_waited_for() -> None:
    for options in ({"clip_rule": "ungated"}, {"clip_rule": "quantile", "overflow_threshold": 0.0}):
        assert TrainConfig(format="float32", clip=True, **options).plan().spec.clip
    assert TrainConfig(format="bf16", clip=True).plan().spec.clip
