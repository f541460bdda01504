"""Golden vectors: the file, the check, and both packages held against it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from altgrad_core.formats import FORMAT_REGISTRY, OVERFLOWS, ROUNDINGS, Overflow, Rounding, parse
from altgrad_core.reference import quantize_reference, round_to_format
from altgrad_core.vector_inputs import beyond_max, fraction_of_quantum, input_bits
from altgrad_core.vectors import (
    Vectors,
    check_vectors,
    golden_vectors,
    package_result,
    read_vectors,
    vector_lines,
    write_vectors,
)

DOCS = Path(__file__).parents[1] / "docs" / "vectors.md"
NAMES = ("E0M7", "E3M4", "E4M3", "E5M2", "E7M0", "float8_e4m3fnuz", "binary8p3se", "float8_e8m0fnu", "float4_e2m1fn")
SMALL = [name for name in FORMAT_REGISTRY if parse(name).bits <= 8]

Floats = npt.NDArray[np.float32]


def by_the_code_book(vectors: Vectors) -> Floats:
    """Nearest even by the other reference, as the packages return it."""
    x = vectors.inputs.view(np.float32)
    exact = quantize_reference(x, vectors.format, overflow=vectors.overflow)
    return np.array([package_result(value, vectors.format) for value in exact.tolist()], np.float32)


@pytest.mark.parametrize("name", SMALL)
def test_the_second_reference_agrees(name: str) -> None:
    for overflow in OVERFLOWS:
        vectors = golden_vectors(name, overflow=overflow, random_inputs=50)
        report = check_vectors(vectors, lambda x, vectors=vectors: by_the_code_book(vectors))
        assert report.passed, report
        finite = np.isfinite(vectors.outputs.view(np.float32))
        book = vectors.format.code_book()[vectors.codes[finite]]
        shown = np.array([package_result(value, vectors.format) for value in book.tolist()])
        assert np.array_equal(shown, vectors.outputs.view(np.float32)[finite])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_among_the_inputs(name: str) -> None:
    known = parse(name)
    bits = input_bits(known, random_inputs=10, seed=3)
    assert np.array_equal(bits, np.unique(bits))
    grid = known.code_book()[: known.max_code + 1]
    ends = np.append(grid[1:], beyond_max(known))
    middles = ((grid + ends) / 2).astype(np.float32).view(np.uint32)
    wanted = np.concatenate([grid.astype(np.float32).view(np.uint32), middles])
    wanted = np.concatenate([wanted, wanted[wanted > 0] - 1, wanted + 1])
    wanted = np.concatenate([wanted, wanted | np.uint32(1 << 31), np.uint32([0x7F800000, 0x7FC00000, 1, 0x7FFFFF])])
    assert np.isin(wanted, bits).all()
    assert input_bits(known, random_inputs=11, seed=3).size > bits.size
    assert not np.array_equal(input_bits(known, random_inputs=10, seed=4), bits)


def test_fraction_of_quantum() -> None:
    known = parse("E5M2")
    for value in (1.0, 1.1, -1.3, 3 * 2.0**-18, 2.0**-20, 57344.0, 60000.0):
        down = round_to_format(value, known, rounding="toward_zero")
        code = known.to_bits(abs(down))
        gap = (beyond_max(known) if code == known.max_code else known.to_real(code + 1)) - abs(down)
        assert float(fraction_of_quantum(value, known)) == (abs(value) - abs(down)) / gap


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["E4M3", "E7M0", "float8_e8m0fnu"])
def test_written_and_read(tmp_path: Path, name: str, rounding: Rounding) -> None:
    made = golden_vectors(name, rounding=rounding, overflow="saturate", random_inputs=20)
    read = read_vectors(write_vectors(tmp_path / "v.jsonl", made))
    assert (read.format, str(read.format)) == (made.format, name)
    assert (read.rounding, read.overflow) == (rounding, "saturate")
    assert read.stochastic_bits == (24 if rounding == "stochastic" else None)
    for column in ("inputs", "outputs", "codes", "random_bits"):
        one, other = getattr(read, column), getattr(made, column)
        assert (one is None and other is None) or np.array_equal(one, other)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_columns_in_the_order_of_the_header(tmp_path: Path, rounding: Rounding) -> None:
    made = golden_vectors("E2M1", rounding=rounding, random_inputs=0)
    header, *rows = map(json.loads, vector_lines(made))
    header["columns"].reverse()
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(map(json.dumps, [header, *(row[::-1] for row in rows)])))
    read = read_vectors(path)
    for column in ("inputs", "outputs", "codes", "random_bits"):
        assert np.array_equal(getattr(read, column), getattr(made, column))


def test_a_file_is_left_alone_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("kept")
    made = golden_vectors("E2M1", random_inputs=0)
    with pytest.raises(ValueError, match="exists"):
        write_vectors(path, made)
    assert path.read_text() == "kept"
    write_vectors(path, made, overwrite=True)
    assert len(read_vectors(path)) == len(made)


def test_the_documented_example(tmp_path: Path) -> None:
    lines = write_vectors(tmp_path / "v.jsonl", golden_vectors("E4M3")).read_text().splitlines()
    header, row = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert json.loads(header) == json.loads(lines[0])
    assert row.strip() in lines
    assert f"all {len(lines) - 1} agree" in DOCS.read_text(encoding="utf-8")


def _wrong_ties(x: Floats) -> Floats:
    """Right but for ties, which go away from zero."""
    vectors = golden_vectors("E4M3", rounding="nearest_away")
    assert np.array_equal(vectors.inputs, x.view(np.uint32))
    return vectors.outputs.view(np.float32)


def _sign_lost(x: Floats) -> Floats:
    return np.abs(golden_vectors("E4M3").outputs.view(np.float32))


def _nan_lost(x: Floats) -> Floats:
    return np.nan_to_num(golden_vectors("E4M3").outputs.view(np.float32))


@pytest.mark.parametrize("wrong", [_wrong_ties, _sign_lost, _nan_lost, lambda x: x], ids=["ties", "sign", "nan", "id"])
def test_a_wrong_cast_is_caught(wrong) -> None:
    report = check_vectors(golden_vectors("E4M3"), wrong, first=3)
    assert not report.passed
    assert report.mismatches >= len(report.first) == 3
    assert "differ" in str(report)
    assert "0x" in str(report)


def test_any_nan_is_nan() -> None:
    vectors = golden_vectors("E4M3")
    noisy = np.where(np.isnan(vectors.outputs.view(np.float32)), np.uint32(0xFF812345), vectors.outputs)
    assert check_vectors(vectors, lambda x: noisy.view(np.float32)).passed


@pytest.mark.parametrize("bad", [lambda x: np.zeros(x.shape), lambda x: x[1:], lambda x: 1.0])
def test_a_cast_must_return_what_it_got(bad) -> None:
    with pytest.raises(ValueError, match="expected float32"):
        check_vectors(golden_vectors("E2M1"), bad)


def _reference_codes(x: Floats) -> list[int]:
    return [parse("E5M2").to_bits(value) for value in x.tolist()]


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64])
def test_a_right_encoder_passes(kind: type) -> None:
    report = check_vectors(golden_vectors("E5M2"), lambda x: np.array(_reference_codes(x), kind), column="code")
    assert report.passed, report
    assert str(report) == f"all {report.count} agree"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda codes: codes ^ 0x80,
        lambda codes: codes + 256,
        lambda codes: codes.astype(np.int8),  # negative ones are no codes
        lambda codes: np.where(codes == 0x80, 0, codes),  # -0
    ],
    ids=["sign", "wide", "int8", "zero"],
)
def test_a_wrong_encoder_is_caught(wrong) -> None:
    report = check_vectors(
        golden_vectors("E5M2"), lambda x: wrong(np.array(_reference_codes(x))), column="code", first=3
    )
    assert report.mismatches >= len(report.first) == 3
    assert "codes differ" in str(report)


def test_codes_in_the_report() -> None:
    vectors = golden_vectors("E4M3", random_inputs=0)
    row = vectors.inputs.tolist().index(0x3F800000)
    for wrong, shown in ((0x39, "code 0x39 (1.125)"), (256, "code 0x100, which is none of E4M3")):
        codes = vectors.codes.copy()
        codes[row] = wrong
        report = check_vectors(vectors, lambda x, codes=codes: codes, column="code")
        assert str(report) == f"1 of {len(vectors)} codes differ\n  1.0 (0x3f800000) gives {shown}, not code 0x38 (1.0)"


def test_any_code_of_nan_is_nan() -> None:
    vectors = golden_vectors("E5M2")
    of_nan = np.isnan(vectors.format.code_book())[vectors.codes]
    for code in (0x7D, 0x7F, 0xFE):
        assert check_vectors(vectors, lambda x, code=code: np.where(of_nan, code, vectors.codes), column="code").passed
    infinite = check_vectors(vectors, lambda x: np.where(of_nan, 0x7C, vectors.codes), column="code")
    assert infinite.mismatches == of_nan.sum()
    without = golden_vectors("E3M4")  # NaN is code 0 there, and no other zero
    was_nan = np.isnan(without.inputs.view(np.float32))
    report = check_vectors(without, lambda x: np.where(was_nan, 0x80, without.codes), column="code")
    assert report.mismatches == was_nan.sum()


@pytest.mark.parametrize("package", ["altgrad_jax", "altgrad_torch"])
@pytest.mark.parametrize("name", NAMES)
def test_encoders_of_both_packages(package: str, name: str) -> None:
    encode = pytest.importorskip(package).encode
    as_array = pytest.importorskip("torch").from_numpy if package == "altgrad_torch" else np.asarray
    for overflow in OVERFLOWS:
        vectors = golden_vectors(name, overflow=overflow, random_inputs=100)
        report = check_vectors(
            vectors, lambda x, overflow=overflow: encode(as_array(x), name, overflow=overflow), column="code"
        )
        assert report.passed, report


def test_an_encoder_must_return_integers() -> None:
    vectors = golden_vectors("E2M1", random_inputs=0)
    for bad in (lambda x: x, lambda x: vectors.codes[1:]):
        with pytest.raises(ValueError, match=r"the encoder returned .*; expected integers \["):
            check_vectors(vectors, bad, column="code")
    with pytest.raises(ValueError, match=r"expected float32\[\d+\], or column='code' for an encoder"):
        check_vectors(vectors, lambda x: vectors.codes)
    with pytest.raises(ValueError, match="unknown column 'codes'; did you mean 'code'"):
        check_vectors(vectors, lambda x: vectors.codes, column="codes")  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [-1, 1.5, None])
def test_how_many_mismatches_are_kept(first: int) -> None:
    with pytest.raises(ValueError, match=f"first is {first}; expected an integer of 0 or more"):
        check_vectors(golden_vectors("E2M1", random_inputs=0), lambda x: x, first=first)


def test_stochastic_draws_meet_the_turning_point() -> None:
    """For an input between two values, the last draw that does not take it up and the first that does."""
    vectors = golden_vectors("E5M2", rounding="stochastic", overflow="saturate", stochastic_bits=3, random_inputs=200)
    assert vectors.random_bits is not None
    drawn, outputs = vectors.random_bits & 7, np.abs(vectors.outputs.view(np.float32))
    turned = 0
    for word in np.unique(vectors.inputs).tolist():
        rows = np.flatnonzero(vectors.inputs == word)
        if rows.size == 3:
            assert drawn[rows[1]] + 1 == drawn[rows[2]]
            turned += bool(outputs[rows[1]] < outputs[rows[2]])
    assert turned > 500
    assert (vectors.random_bits >> 3).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rounding", "overflow"),
    [("nearest_even", "native"), ("nearest_away", "saturate"), ("toward_zero", "saturate_finite")],
)
def test_both_packages_agree(tmp_path: Path, name: str, rounding: Rounding, overflow: Overflow) -> None:
    jnp, in_jax = pytest.importorskip("jax.numpy"), pytest.importorskip("altgrad_jax")
    torch, in_torch = pytest.importorskip("torch"), pytest.importorskip("altgrad_torch")
    modes = {"rounding": rounding, "overflow": overflow}
    path = write_vectors(tmp_path / "v.jsonl", golden_vectors(name, random_inputs=200, **modes))
    report = check_vectors(path, lambda x: np.asarray(in_jax.quantize(jnp.asarray(x), name, **modes)))
    assert report.passed, report
    report = check_vectors(path, lambda x: in_torch.quantize(torch.from_numpy(x), name, **modes).numpy())
    assert report.passed, report


@pytest.mark.parametrize("name", ["E3M4", "E5M2", "E7M0"])
@pytest.mark.parametrize("count", [None, 5])
def test_both_packages_agree_stochastically(name: str, count: int | None) -> None:
    jnp, in_jax = pytest.importorskip("jax.numpy"), pytest.importorskip("altgrad_jax")
    torch, in_torch = pytest.importorskip("torch"), pytest.importorskip("altgrad_torch")
    vectors = golden_vectors(name, rounding="stochastic", stochastic_bits=count, random_inputs=200)
    assert vectors.stochastic_bits is not None
    modes = {"rounding": "stochastic", "stochastic_bits": vectors.stochastic_bits}

    def jax_cast(x: Floats, drawn: npt.NDArray[np.uint32]) -> Floats:
        bits = jnp.asarray(drawn.view(np.int32))
        return np.asarray(in_jax.quantize(jnp.asarray(x), name, random_bits=bits, **modes))

    def torch_cast(x: Floats, drawn: npt.NDArray[np.uint32]) -> Floats:
        bits = torch.from_numpy(drawn.view(np.int32))
        return in_torch.quantize(torch.from_numpy(x), name, random_bits=bits, **modes).numpy()

    for cast in (jax_cast, torch_cast):
        report = check_vectors(vectors, cast)
        assert report.passed, report


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "E4M4x"}, "unknown format"),
        ({"format": "float32"}, "32 bits; vectors are made for formats of at most 16"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"overflow": "wrap"}, "unknown overflow policy 'wrap'"),
        ({"stochastic_bits": 4}, "no effect with rounding 'nearest_even'"),
        ({"stochastic_bits": 25, "rounding": "stochastic"}, "stochastic_bits is 25"),
        ({"random_inputs": -1}, "random_inputs is -1; expected an integer of 0 or more"),
        ({"random_inputs": 1.5}, "random_inputs is 1.5; expected an integer of 0 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_options(options, expected) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        golden_vectors(**{"format": "E4M3", **options})


def test_options_may_be_integers_of_numpy() -> None:
    made, expected = (
        golden_vectors("E2M1", rounding="stochastic", stochastic_bits=kind(8), random_inputs=kind(9), seed=kind(3))
        for kind in (np.uint8, int)
    )
    assert list(vector_lines(made)) == list(vector_lines(expected))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda lines: [], "is no file of vectors"),
        (lambda lines: ["[1, 2]", *lines[1:]], "is no file of vectors"),
        (lambda lines: ["é"], "is no file of vectors"),
        (lambda lines: [lines[0].replace("altgrad-vectors", "other"), *lines[1:]], "is no file of vectors"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 2'), *lines[1:]], "version 2 of the layout"),
        (lambda lines: [lines[0].replace('"rounding"', '"round"'), *lines[1:]], "'rounding' is missing"),
        (lambda lines: [lines[0].replace("nearest_even", "up"), *lines[1:]], "unknown rounding 'up'"),
        (lambda lines: [lines[0].replace('"bias": 1', '"bias": 999'), *lines[1:]], "bias 999"),
        (lambda lines: [lines[0].replace('"columns"', '"rows"'), *lines[1:]], "'columns' is missing"),
        (
            lambda lines: [lines[0].replace('"output"', '"input"'), *lines[1:]],
            "the header's columns are ['input', 'input', 'code']; expected ['input', 'output', 'code'], in any order",
        ),
        (lambda lines: [lines[0].replace('"code"]', '"code", "more"]'), *lines[1:]], "'more']; expected ['input'"),
        (lambda lines: [lines[0].replace('["input", "output", "code"]', "3"), *lines[1:]], "columns are 3; expected"),
        (lambda lines: lines[:-1], "the file was cut or added to"),
        (lambda lines: [*lines[:2], '["0", "0"]', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '["0", "0", "zz"]', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '["0", "0", "fffffffff"]', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], "7", *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '{"1": 1, "2": 2, "3": 3}', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '"abc"', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '["0", "0", 1]', *lines[3:]], "line 3 is"),
        (lambda lines: [*lines[:2], '["0", "+0", "0x1"]', *lines[3:]], "line 3 is"),
        (
            lambda lines: [*lines[:2], lines[2][:-3] + 'ffff"]', *lines[3:]],
            "line 3 has the code ffff; expected one of the 4 bits of E2M1, 0 to f",
        ),
        (
            lambda lines: [lines[0].replace('"E2M1"', '"E5M2"'), *lines[1:]],
            "format E5M2 is said to have exponent_bits 2; expected 5",
        ),
        (lambda lines: [lines[0].replace('"E2M1"', "5"), *lines[1:]], "the name is 5; expected a string"),
        (
            lambda lines: [lines[0].replace('"has_nan": false', '"has_nan": "yes"'), *lines[1:]],
            "has_nan is 'yes'; expected True or False",
        ),
        (
            lambda lines: [lines[0].replace("{", '{"stochastic_bits": 8, ', 1), *lines[1:]],
            "stochastic_bits has no effect with rounding 'nearest_even'; expected it with 'stochastic'",
        ),
        (
            lambda lines: [lines[0].replace("nearest_even", "stochastic"), *lines[1:]],
            "'stochastic_bits' is missing",
        ),
        (
            lambda lines: ['{"stochastic_bits": null, ' + lines[0][1:].replace("nearest_even", "stochastic")],
            "stochastic_bits is None; expected an integer from 1 to 24",
        ),
        (
            lambda lines: [re.sub(r'"format": \{.*?\}', '"format": "E2M1"', lines[0]), *lines[1:]],
            "the header's format is 'E2M1'; expected an object",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, edit, expected) -> None:
    path = write_vectors(tmp_path / "v.jsonl", golden_vectors("E2M1", random_inputs=0))
    path.write_text("\n".join(edit(path.read_text().splitlines())), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        read_vectors(path)
    assert str(path) in str(refused.value)


def with_row(path: Path, name: str, output: str, code: str) -> Path:
    """A file whose line 4, of three rows, has this output and this code."""
    header, *rows = vector_lines(golden_vectors(name, overflow="saturate_finite", random_inputs=0))
    header = re.sub(r'"count": \d+', '"count": 3', header)
    path.write_text("".join([header, *rows[:2], json.dumps(["3f800000", output, code])]), encoding="ascii")
    return path


@pytest.mark.parametrize(
    ("name", "output", "code", "expected"),
    [
        ("E4M3", "3f800000", "39", "1.0 (0x3f800000) and code 0x39 (1.125); expected code 0x38 (1.0)"),
        ("E4M3", "3f800000", "b8", "1.0 (0x3f800000) and code 0xb8 (-1.0); expected code 0x38 (1.0)"),
        ("E4M3", "3f800000", "7f", "1.0 (0x3f800000) and code 0x7f (nan); expected code 0x38 (1.0)"),
        ("E4M3", "00000000", "80", "0.0 (0x00000000) and code 0x80 (-0.0); expected code 0x0 (0.0)"),
        ("E4M3", "80000000", "00", "-0.0 (0x80000000) and code 0x0 (0.0); expected code 0x80 (-0.0)"),
        ("E4M3", "7fc00000", "7e", "nan (0x7fc00000) and code 0x7e (448.0); expected code 0x7f (nan)"),
        ("E4M3", "7f800000", "7f", "inf (0x7f800000) and code 0x7f (nan); expected code 0x7e (448.0)"),
        ("E4M3", "ff800000", "7e", "-inf (0xff800000) and code 0x7e (448.0); expected code 0xfe (-448.0)"),
        ("E4M3", "3f8ccccd", "39", "1.100000023841858 (0x3f8ccccd) and code 0x39 (1.125); expected the output to be a"),
        ("E5M2", "7f800000", "7b", "inf (0x7f800000) and code 0x7b (57344.0); expected code 0x7c (inf)"),
        ("E5M2", "7fc00000", "7c", "nan (0x7fc00000) and code 0x7c (inf); expected code 0x7e (nan)"),
        ("E3M4", "7fc00000", "80", "nan (0x7fc00000) and code 0x80 (-0.0); expected code 0x0 (0.0)"),
        ("float8_e4m3fnuz", "80000000", "00", "-0.0 (0x80000000) and code 0x0 (0.0); expected the output to be"),
        ("float8_e4m3fnuz", "00000000", "80", "0.0 (0x00000000) and code 0x80 (nan); expected code 0x0 (0.0)"),
        ("float8_e8m0fnu", "bf800000", "7f", "-1.0 (0xbf800000) and code 0x7f (1.0); expected the output to be a"),
        ("float8_e8m0fnu", "ff800000", "fe", "-inf (0xff800000) and code 0xfe (1.7014118346046923e+38); expected the"),
        ("bf16", "00000000", "0001", "0.0 (0x00000000) and code 0x1 (9.183549615799121e-41); expected code 0x0 (0.0)"),
    ],
)
def test_codes_that_are_not_of_their_outputs(tmp_path: Path, name: str, output: str, code: str, expected: str) -> None:
    path = with_row(tmp_path / "v.jsonl", name, output, code)
    for read in (read_vectors, lambda path: check_vectors(path, lambda x: x)):
        with pytest.raises(ValueError, match=re.escape(f"line 4 has the output {expected}")):
            read(path)


@pytest.mark.parametrize(
    ("name", "output", "code"),
    [
        *(("E5M2", "7fc00000", code) for code in ("7d", "7e", "ff")),
        *(("E4M3", output, code) for output in ("7fc00000", "ffc00000", "7f800001") for code in ("7f", "ff")),
        *(("E3M4", "7fc00000", "00"), ("E3M4", "ff800000", "ff"), ("float8_e8m0fnu", "7f800000", "fe")),
        *(("float8_e4m3fnuz", "7fc00000", "80"), ("E4M3", "80000000", "80"), ("E4M3", "ff800000", "fe")),
    ],
)
def test_codes_that_are_of_their_outputs(tmp_path: Path, name: str, output: str, code: str) -> None:
    assert len(read_vectors(with_row(tmp_path / "v.jsonl", name, output, code))) == 3


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str, overflow: Overflow) -> None:
    made = golden_vectors(name, overflow=overflow, random_inputs=50)
    assert np.array_equal(read_vectors(write_vectors(tmp_path / "v.jsonl", made)).codes, made.codes)


def test_a_name_of_the_writers_own_is_read(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.jsonl", golden_vectors("E2M1", random_inputs=0))
    path.write_text(path.read_text().replace('"E2M1"', '"our fp4"'))
    assert read_vectors(path).format == parse("E2M1")
