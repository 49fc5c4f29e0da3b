"""The demo: its collector, encoder, measurements, fine-tuning and command line."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from demo_needs import CPU, command, environment
from torch import Tensor

import attnfast
from demo.command import UsageError
from demo.files import written_whole
from demo.search import cli, corpus, encoder, finetune, look, measure, memory

TEXTS = [
    "That is a happy person",
    "That is a happy dog",
    "That is a very happy person",
    "Today is a sunny day",
    "Read and write ZIP files. An archive may hold many members, each compressed on its own.",
]


@pytest.fixture(scope="module")
def minilm() -> encoder.SentenceEncoder:
    return encoder.load_encoder()


@pytest.fixture(scope="module")
def batch() -> encoder.Batch:
    tokenizer = encoder.load_tokenizer(256)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    return encoder.pad(ids, list(range(len(ids))))


# --- the corpus


def test_the_collector_takes_public_documented_names_and_runs_nothing(tmp_path: Path) -> None:
    files = {
        "zipfile.py": '"""One two three four five six seven eight."""\nraise SystemExit\n',
        "json/__init__.py": "def loads():\n '''Turns a text into objects if it is JSON.'''\n",
        "json/decoder.py": (
            "class JSONDecoder:\n '''Decodes one document into objects, step by step by step.'''\n"
            " def method(self):\n  '''Methods are left out, however much they have to say.'''\n"
            "def _private():\n '''Private names are left out, however much they say.'''\n"
            "def brief():\n '''Too few words.'''\n"
            "async def again():\n '''Turns a text into objects if it is JSON.'''\n"
        ),
        "test/support.py": '"""Tests of the library are left out, whatever they have to say."""\n',
        "_compat_pickle.py": '"""Private modules are left out, whatever they have to say."""\n',
        "elsewhere.py": '"""Modules that are not of the library are left out, as this one is."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = corpus.collect_stdlib(root=tmp_path)
    assert [(document.name, document.module) for document in documents] == [
        ("json.loads", "json"),
        ("json.decoder.JSONDecoder", "json"),
        ("zipfile", "zipfile"),
    ]


def test_the_collector_over_the_real_library() -> None:
    documents = corpus.collect_stdlib()
    assert 1400 < len(documents) < 2100
    assert len({document.text for document in documents}) == len(documents)
    texts = {document.name: document.text for document in documents}
    assert texts["zipfile.ZipFile"] == inspect.getdoc(zipfile.ZipFile)
    some = corpus.collect_stdlib(["json", "zipfile"])
    assert some == [document for document in documents if document.module in ("json", "zipfile")]


def test_texts_are_lines_or_blocks_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("\none\ntwo\n")
    assert corpus.read_texts(path) == [("texts:2", "", "one"), ("texts:3", "", "two")]
    path.write_text("one\nstill one\n\n\ntwo\n")
    assert [document[::2] for document in corpus.read_texts(path)] == [
        ("texts:1", "one\nstill one"),
        ("texts:5", "two"),
    ]


def test_the_headline_is_the_first_line_with_words() -> None:
    assert corpus.Document("", "", "\n  \n  says this\nand that").headline == "says this"


# --- the encoder


def bert_in_fp64(tokens: Tensor) -> Tensor:
    """One text through BERT as its paper writes it, straight from the package's weights."""
    folder = encoder.model_folder()
    w = {n: x.double() for n, x in encoder.load_file(folder / "model.safetensors").items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][tokens] + w[f"{e}.token_type_embeddings.weight"][0]
    x = norm(x + w[f"{e}.position_embeddings.weight"][: len(tokens)], f"{e}.LayerNorm")
    for i in range(6):
        layer = f"encoder.layer.{i}"
        parts = (linear(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        q, k, v = (part.view(len(tokens), 12, 32).transpose(0, 1) for part in parts)
        attended = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v
        attended = attended.transpose(0, 1).reshape(len(tokens), 384)
        attended = linear(attended, f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x.mean(0) / x.mean(0).norm()


@pytest.mark.parametrize("replaced", [False, True], ids=["torch", "attnfast"])
def test_the_encoder_is_bert_with_its_trained_weights(
    minilm: encoder.SentenceEncoder, batch: encoder.Batch, replaced: bool
) -> None:
    if replaced:
        minilm = encoder.load_encoder()
        attnfast.replace(minilm)
    with torch.inference_mode():
        embedded = minilm(batch.tokens, batch.padding)
    expected = torch.stack(
        [bert_in_fp64(row[~out]) for row, out in zip(batch.tokens, batch.padding, strict=True)]
    )
    assert (embedded - expected).abs().max() <= cli.TOLERANCE
    # The similarities that the model's own page gives for its example sentences.
    similarities = [round(x, 3) for x in (embedded[0] @ embedded[1:4].T).tolist()]
    assert similarities == [0.695, 0.943, 0.257]


def test_mean_pooling_ignores_padding_even_if_it_is_not_finite() -> None:
    x = torch.tensor([[[1.0], [3.0], [torch.nan]], [[5.0], [torch.inf], [7.0]]])
    padding = torch.tensor([[False, False, True], [False, True, True]])
    assert encoder.mean_pool(x, padding).tolist() == [[2.0], [5.0]]


def test_batches_hold_every_text_once_sorted_and_within_the_limit() -> None:
    ids = [[7] * length for length in (3, 9, 1, 4, 4, 4, 40, 2)]
    tighter = [batch.indices for batch in encoder.length_sorted(ids, 11)]
    assert tighter == [[2, 7, 0], [3, 4], [5], [1], [6]]
    batches = list(encoder.length_sorted(ids, 12))
    assert [batch.indices for batch in batches] == [[2, 7, 0], [3, 4, 5], [1], [6]]
    for batch in batches:
        assert batch.tokens.numel() <= 12 or len(batch.indices) == 1
        assert (~batch.padding).sum(1).tolist() == [len(ids[i]) for i in batch.indices]
        assert torch.equal(batch.tokens == 7, ~batch.padding)


# --- the measurements


def test_the_watch_agrees_with_torchs_weights(batch: encoder.Batch) -> None:
    model = encoder.load_encoder()
    attnfast.replace(model)
    weights: list[Tensor] = []

    def note(module: torch.nn.MultiheadAttention, args: tuple[Tensor, ...], out: object) -> None:
        weights.append(
            torch.nn.MultiheadAttention.forward(
                module, *args[:3], key_padding_mask=batch.padding, average_attn_weights=False
            )[1]
        )

    with torch.no_grad(), look.AttentionWatch(model) as watch:
        hooks = [layer.self_attn.register_forward_hook(note) for layer in model.encoder.layers]
        model(batch.tokens, batch.padding)
        watch(batch)
    for hook in hooks:
        hook.remove()
    assert len(weights) == encoder.LAYERS
    p = torch.stack(weights).double().transpose(1, 2)  # (layers, heads, B, L, L)
    real = ~batch.padding
    breadth = torch.special.entr(p).sum(-1).exp()[:, :, real].mean(-1)
    torch.testing.assert_close(watch.breadth, breadth, rtol=1e-5, atol=0)
    torch.testing.assert_close(watch.focus, p.amax(-1)[:, :, real].mean(-1), rtol=1e-5, atol=0)
    one = encoder.Batch([0], batch.tokens[:1, :7], batch.padding[:1, :7])
    maps = look.sentence_maps(model, one)
    torch.testing.assert_close(maps.sum(-1), torch.ones(6, 12, 7))


def test_habits_name_where_a_head_looks() -> None:
    to_next = torch.eye(6).roll(1, 1).numpy()
    assert look.habits(to_next)[0] == ("next", 0.75)  # the last word's next one is [SEP]
    first = torch.zeros(6, 6)
    first[:, 0] = 1
    assert look.habits(first.numpy())[0] == ("[CLS]", 1.0)


def test_attention_is_a_part_of_the_time_of_both_models(
    minilm: encoder.SentenceEncoder, batch: encoder.Batch
) -> None:
    ours = encoder.load_encoder()
    attnfast.replace(ours)
    for model in (minilm, ours):
        share = measure.attention_share(model, [batch], CPU)
        assert 0 < share.core < share.attention < 1


def test_embed_gives_each_text_its_own_row(
    minilm: encoder.SentenceEncoder, batch: encoder.Batch
) -> None:
    parts = [
        encoder.Batch([3, 0], batch.tokens[[3, 0]], batch.padding[[3, 0]]),
        encoder.Batch([1, 2, 4], batch.tokens[[1, 2, 4]], batch.padding[[1, 2, 4]]),
    ]
    seen: list[encoder.Batch] = []
    embeddings, seconds = measure.embed({"a": minilm, "b": minilm}, parts, CPU, seen.append)
    with torch.inference_mode():
        expected = minilm(batch.tokens, batch.padding)
    assert seen == parts
    assert min(seconds.values()) > 0
    for found in embeddings.values():
        assert (found - expected).abs().max() <= cli.TOLERANCE


# --- fine-tuning


def test_the_split_holds_out_a_quarter_of_every_module() -> None:
    documents = [
        corpus.Document(f"{module}.{i}", module, f"{module} {i}")
        for module, count in (("a", 40), ("b", 20), ("few", finetune.FEWEST - 1))
        for i in range(count)
    ]
    split = finetune.split_by_module(documents, 0)
    assert split is not None
    assert split == finetune.split_by_module(documents, 0)
    assert split.modules == ["a", "b"]
    assert sorted(split.train + split.test) == list(range(60)) == sorted(split.labels)
    assert [split.labels[i] for i in split.test] == [0] * 10 + [1] * 5
    assert finetune.split_by_module(documents[:40], 0) is None


def test_weight_decay_spares_norms_and_biases(minilm: encoder.SentenceEncoder) -> None:
    model = finetune.Classifier(minilm, 3, 0.1)
    groups = finetune.parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert not decayed & spared
    assert decayed | spared == set(names.values())
    assert spared == {name for name in names.values() if "norm" in name or name.endswith("bias")}


def test_the_rate_rises_and_falls_linearly() -> None:
    factor = finetune.warm_up_and_decay(20)
    factors = [factor(step) for step in range(21)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[11] == pytest.approx(0.5)
    assert factors[20] == 0.0
    assert math.isfinite(finetune.warm_up_and_decay(1)(0))


def test_epochs_use_every_text_before_any_twice() -> None:
    ids = [[0] * (1 + i % 5) for i in range(50)]
    order = finetune.epochs(ids, range(50), 8, 14, seed=0)
    for epoch in (order[:7], order[7:]):
        assert sorted(itertools.chain(*epoch)) == list(range(50))
    assert order == finetune.epochs(ids, range(50), 8, 14, seed=0)


def test_without_dropout_both_models_learn_alike() -> None:
    torch_model, ours = encoder.load_encoder(0.0), encoder.load_encoder(0.0)
    attnfast.replace(ours)
    documents = corpus.collect_stdlib(["statistics", "platform"])
    split = finetune.split_by_module(documents, 0)
    assert split is not None
    texts = [document.text for document in documents]
    ids = [encoding.ids for encoding in encoder.load_tokenizer(24).encode_batch(texts)]
    before = [p.clone() for p in torch_model.parameters()]
    outcomes = finetune.fine_tune(
        {"torch": torch_model, "attnfast": ours},
        ids,
        split,
        steps=2,
        batch_size=8,
        max_tokens=24,
        dropout=0.0,
        seed=0,
        device=CPU,
    )
    a, b = outcomes["torch"], outcomes["attnfast"]
    assert a.losses == pytest.approx(b.losses, rel=1e-4)
    assert a.held_out_before == pytest.approx(b.held_out_before, rel=1e-4)
    assert a.losses[0] != a.losses[1]
    assert set(a.report) > {"platform", "statistics", "macro avg"}
    assert all(map(torch.equal, before, torch_model.parameters()))


# --- the command


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "result.json"

    def fail() -> None:
        with written_whole(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert not list(tmp_path.iterdir())
    with written_whole(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--texts", "absent"], "--texts: cannot read absent: No such file or directory"),
        (["--texts", "empty"], "--texts: empty is empty"),
        (["--texts", "binary"], "--texts: binary is not UTF-8 text"),
        (["--texts", "texts", "--modules", "json"], "not allowed with argument"),
        (["--queries", "empty"], "--queries: empty is empty"),
        (["--texts", "texts", " "], "a query is empty"),
        (["--modules", "json,nonesuch"], "--modules: no source in the standard library for 'non"),
        (["--device", "nonesuch"], "--device: 'nonesuch' cannot be used: "),
        (["--device", "meta"], "--device: 'meta' cannot be used: "),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--top", "many"], "--top: invalid number value: 'many'"),
        (["--layer", "7"], "--layer: must be from 1 to 6, got 7"),
        (["--max-tokens", "513"], "--max-tokens: must be from 3 to 512, got 513"),
        (["--threads", "-1"], "--threads: must be at least 1, got -1"),
        (["--nonesuch"], "unrecognized arguments: --nonesuch"),
        (["--texts", "texts", "--out", "texts"], "--out: cannot write to texts: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text(" \n")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("texts").write_text("one\n")
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("search: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_a_missing_model_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "nonesuch_model_package")
    assert cli.main(["--out", str(tmp_path)]) == 2
    told = f"search: the model package is missing: {encoder.INSTALL}\n"
    assert capsys.readouterr().err == told


def test_embeddings_that_differ_are_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(model: encoder.SentenceEncoder, verbose: bool) -> None:
        attnfast.replace(model, verbose=verbose)
        model.positions.weight.data[1, 0] += 1.0

    monkeypatch.setattr(cli, "replace", wrong)
    monkeypatch.setattr(cli, "peak_memory", lambda *_: None)
    texts = tmp_path / "texts"
    texts.write_text("\n".join(TEXTS))
    assert cli.main(["--texts", str(texts), "--out", str(tmp_path / "out"), "happy dog"]) == 1
    printed = capsys.readouterr()
    assert "MORE THAN 1e-5" in printed.out
    assert "search: the embeddings differ by" in printed.err


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    large = encoder.pad([[101] + [7592] * 254 + [102]] * 8, list(range(8)))
    added = memory.peak_memory("attnfast", [large], CPU)
    if added is None:
        pytest.skip("this system does not tell a process's peak memory")
    activations = 8 * 256 * encoder.FEEDFORWARD * 4
    assert activations < added < 20 * activations


def test_the_whole_command_on_a_small_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--modules", "statistics,platform", "--max-tokens", "24", "--train-tokens", "16"]
    arguments += ["--steps", "2", "--batch-size", "4", "--out", str(tmp_path)]
    assert cli.main([*arguments, "the middle of a list of numbers"]) == 0
    printed = capsys.readouterr()
    for said in ("statistics.median", "within 1e-5", "attention alone", "chosen: ", "precision"):
        assert said in printed.out
    assert "embedding twice: 100%" in printed.err
    names = ["attention.png", "losses.png", "results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["difference"] <= cli.TOLERANCE
    hits = results["hits"]["the middle of a list of numbers"]
    assert [name for name, _ in hits["torch"]] == [name for name, _ in hits["attnfast"]]
    for name in ("torch", "attnfast"):
        assert len(results["fine_tuning"][name]["losses"]) == 2
        assert {"precision", "recall", "f1-score"} < set(
            results["fine_tuning"][name]["report"]["macro avg"]
        )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_leaves_one_line_and_no_files(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.write_text("\n".join(f"{i} " + "and so on " * 80 for i in range(400)))
    given = ["--texts", texts, "--max-tokens", 256, "--out", out]
    with subprocess.Popen(
        command("demo.search", *given),
        env=environment(),
        stderr=subprocess.PIPE,
        # A shell starts background jobs, such as a CI run, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        seen = b""
        while b"embedding twice" not in seen and process.poll() is None:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert rest.endswith(b"\nsearch: interrupted\n")
    assert b"Traceback" not in rest
    assert not list(out.iterdir())


def test_output_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out: cannot write to .*file/folder"):
        cli.output_folder(tmp_path / "file" / "folder")
