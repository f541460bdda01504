"""Character-level text: the corpus that ships or a user's file, and batches that depend only on seed and step."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from altgrad_core.errors import InputError

_VALIDATION_SHARE = 10
_VALIDATION_STREAM = 2**63


class DataError(InputError):
    """A data file that cannot be trained on."""


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, the last tenth held out.

    Attributes:
        vocabulary: the distinct characters, sorted; a token is an index into it.
        train: int32 tokens.
        validation: int32 tokens.
    """

    vocabulary: str
    train: npt.NDArray[np.int32]
    validation: npt.NDArray[np.int32]

    def digest(self) -> str:
        """SHA-256 of vocabulary and tokens, in hexadecimal."""
        content = hashlib.sha256(self.vocabulary.encode())
        content.update(self.train.tobytes())
        content.update(self.validation.tobytes())
        return content.hexdigest()

    def batch(self, seed: int, step: int, size: int, context: int) -> npt.NDArray[np.int32]:
        """Training windows of ``context + 1`` tokens: int32 of shape ``(size, context + 1)``.

        They are a function of seed and step alone, so that a resumed run sees what it would have seen.
        """
        return _windows(self.train, seed, step, size, context)

    def validation_batches(self, count: int, size: int, context: int) -> npt.NDArray[np.int32]:
        """The same held-out windows for every run: int32 of shape ``(count, size, context + 1)``."""
        return np.stack([_windows(self.validation, 0, _VALIDATION_STREAM + k, size, context) for k in range(count)])


def load_corpus(path: Path | None, context: int) -> Corpus:
    """Read a text file, plain or gzipped, in UTF-8.

    Args:
        path: the file; None for the Shakespeare that ships.
        context: tokens that a window needs, so that a file too short is refused here.

    Raises:
        DataError: for a file that is missing, unreadable, empty, or too short in its held-out tenth for one window.
    """
    text = _shipped() if path is None else _read(path)
    name = "the shipped corpus" if path is None else str(path)
    if not text:
        raise DataError(f"{name} is empty; expected text")
    characters, ids = np.unique(np.array([text]).view(np.uint32), return_inverse=True)
    tokens = ids.astype(np.int32)
    held_out = len(tokens) // _VALIDATION_SHARE
    if held_out < context + 1:
        raise DataError(
            f"{name} has {len(tokens)} characters, of which the last {held_out} are held out; a context of {context} "
            f"needs at least {_VALIDATION_SHARE * (context + 1)}"
        )
    vocabulary = "".join(chr(c) for c in characters)
    return Corpus(vocabulary, tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :])


def _windows(tokens: npt.NDArray[np.int32], seed: int, step: int, size: int, context: int) -> npt.NDArray[np.int32]:
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts = generator.integers(0, len(tokens) - context, size)
    return tokens[starts[:, None] + np.arange(context + 1)]


def _shipped() -> str:
    packed = resources.files("altgrad_jax").joinpath("corpora", "shakespeare.txt.gz").read_bytes()
    return gzip.decompress(packed).decode()


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read as UTF-8 text: {error}") from error
