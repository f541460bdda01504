"""``altgrad packed``: what it prints and refuses, without either framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from altgrad.cli import main
from altgrad_torch import PackRule, PerBlock, PerChannel, pack_tensors, save_packed


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    weights = {
        "transformer.h.0.attn.c_attn.weight": torch.ones(96, 64),
        "transformer.h.0.attn.c_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16),
        "[bold]odd": torch.tensor(2.0),
        "transformer.h.0.bias": torch.zeros(64),
        "empty": torch.zeros(0, 4),
    }
    rules = {
        ".*attn.*weight": PackRule("E3M4", granularity=PerChannel(0)),
        ".*proj.*": PackRule("E2M1", "mx", PerBlock(16, 0)),
        ".*odd|empty": PackRule("E4M3"),
        ".*": None,
    }
    rules = {".*proj.*": rules.pop(".*proj.*")} | rules
    save_packed(path, pack_tensors(weights, rules), {"step": "7", "note": "[red]plain"})
    return path


def run(monkeypatch, capsys, width: int, *arguments: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["altgrad", "packed", *arguments])
    main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_it_fits_and_is_whole(monkeypatch, capsys, file: Path, width: int) -> None:
    lines = run(monkeypatch, capsys, width, str(file))
    assert max(len(line) for line in lines if not line.startswith("5 tensors")) <= width
    assert "…" not in "\n".join(lines)


def test_numbers_are_never_cut(monkeypatch, capsys, file: Path) -> None:
    told = " ".join(" ".join(run(monkeypatch, capsys, 20, str(file))).split())
    for numbers in ("5 0.80x", "6,528 3.76x", "2,176 1.88x", "256 -"):
        assert f" {numbers} " in told


def test_what_it_tells(monkeypatch, capsys, file: Path) -> None:
    lines = [" ".join(line.split()) for line in run(monkeypatch, capsys, 160, str(file))]
    assert lines[0] == "tensor shape was format scales bytes smaller"
    assert "[bold]odd scalar float32 E4M3 power_of_two / tensor 5 0.80x" in lines
    assert "empty 0x4 float32 E4M3 power_of_two / tensor 4 -" in lines
    assert "transformer.h.0.attn.c_attn.weight 96x64 float32 E3M4 power_of_two / channel, axes 0 6,528 3.76x" in lines
    assert "transformer.h.0.attn.c_proj.weight 32x64 bfloat16 E2M1 mx / block16, axis 0 2,176 1.88x" in lines
    assert "transformer.h.0.bias 64 float32 float32 - 256 -" in lines
    assert lines[-3:] == [
        "5 tensors, 4 of them packed: 8,969 bytes, 3.23x smaller than unpacked",
        "note: [red]plain",
        "step: 7",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain holds no packed tensors: its metadata has no 'altgrad'"),
        ("part", "part is no whole safetensors file"),
        ("nowhere", "No such file or directory"),
        ("", "Is a directory"),
    ],
)
def test_what_it_refuses(monkeypatch, capsys, file: Path, tmp_path: Path, name: str, expected: str) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "plain")
    (tmp_path / "part").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, 80, str(tmp_path / name))
    assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, 80)


def test_it_needs_no_framework(file: Path) -> None:
    code = (
        "import sys; sys.argv = ['altgrad', 'packed', sys.argv[1]]\n"
        "from altgrad.cli import main; main()\n"
        "assert not {'jax', 'torch'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_names_the_extra(monkeypatch, capsys, file: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, 80, str(file))
    expected = "safetensors is not installed; this command needs the extra altgrad[storage]"
    assert expected in capsys.readouterr().err
