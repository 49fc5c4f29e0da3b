"""demo/sentences.py: MiniLM as Hugging Face's BertModel, with stock attention and ours."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import demo_needs  # noqa: F401
import pytest
import torch
from kernel_calls import kernel_calls

from attnfast.integrations import transformers as integration
from demo import sentences
from demo.command import UsageError
from demo.search import encoder

TEXTS = [
    "That is a happy person",
    "Read and write ZIP files. An archive may hold many members, each compressed on its own.",
    "Hello",
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_embeddings_are_stocks_and_those_of_torchs_encoder() -> None:
    ids = [item.ids for item in encoder.load_tokenizer(256).encode_batch(TEXTS)]
    batch = encoder.pad(ids, list(range(len(ids))))
    assert batch.padding.any()
    name = integration.register()
    try:
        stock, ours = sentences.BertSentences("eager"), sentences.BertSentences(name)
        with torch.inference_mode():
            expected = stock(batch.tokens, batch.padding)
            found = ours(batch.tokens, batch.padding)
            assert kernel_calls(lambda: ours(batch.tokens, batch.padding)) == encoder.LAYERS
            assert kernel_calls(lambda: stock(batch.tokens, batch.padding)) == 0
            alone = [
                ours(row[~out][None], out[~out][None]) for row, out in zip(*batch[1:], strict=True)
            ]
        assert (found - expected).abs().max() <= sentences.TOLERANCE
        assert (found - torch.cat(alone)).abs().max() <= sentences.TOLERANCE
        with torch.inference_mode():
            own = encoder.load_encoder()(batch.tokens, batch.padding)
        assert (found - own).abs().max() <= sentences.TOLERANCE
    finally:
        integration.unregister()


def test_the_command_reports_every_implementation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "texts"
    path.write_text("\n".join(TEXTS))
    monkeypatch.setattr(sys, "argv", ["sentences", "--texts", str(path)])
    monkeypatch.delitem(sys.modules, "demo.sentences")
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("demo.sentences", run_name="__main__")
    finally:
        integration.unregister()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert printed.out.startswith("3 texts, ")
    rows = re.findall(r"^(\w+) +[\d.]+ +\d+ +[\d.]+ +([\d.e+-]+)$", printed.out, re.MULTILINE)
    assert [row[0] for row in rows] == ["eager", "sdpa", "attnfast"]
    assert all(float(row[1]) <= sentences.TOLERANCE for row in rows)


def test_a_difference_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "texts"
    path.write_text("\n".join(TEXTS))
    monkeypatch.setattr(sentences, "TOLERANCE", -1.0)
    try:
        assert sentences.run(["--texts", str(path)]) == 1
    finally:
        integration.unregister()
    assert re.search(r"sentences: embeddings differ by .*, more than -1.0", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--texts", "/nowhere"], ["extra"]])
def test_bad_input_is_one_line(arguments: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        sentences.run(arguments)
    assert "\n" not in str(caught.value)
