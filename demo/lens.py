"""What windows on heads do to MiniLM's embeddings of the standard library's docstrings."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

from demo.command import start

DESCRIPTION = """\
Looks at all heads of MiniLM over docstrings, writes a report about one text, gives every head the
window that keeps a share of its probability, and compares embeddings, neighbours and time."""
EPILOG = "exit codes: 0 all well; 2 bad input"
KEEP = (0.99, 0.95)
NEAREST = 5
FULL = "all keys"


def load() -> Callable[[], int]:
    """The long imports; returns the command."""
    import torch
    from torch import Tensor, nn

    import attnfast
    from attnfast import lens
    from attnfast.lens.report import pieces
    from demo.files import output_folder, write_json
    from demo.options import OUT, Parser, add, number
    from demo.report import console, heading, plain, show, table, versions
    from demo.search import corpus, encoder, measure

    class OneText(nn.Module):
        """The encoder, of a text without padding."""

        def __init__(self, model: encoder.SentenceEncoder) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            """Embed tokens (1, T)."""
            embedded: Tensor = self.model(ids, torch.zeros_like(ids, dtype=torch.bool))
            return embedded

    def neighbours(x: Tensor) -> Tensor:
        """Every text's nearest others, (N, NEAREST), the nearest first."""
        return (x @ x.T).fill_diagonal_(-2).topk(NEAREST).indices

    def compared(full: Tensor, other: Tensor) -> dict[str, float]:
        """What became of embeddings (N, E) of length one."""
        change = 1 - nn.functional.cosine_similarity(full.double(), other.double())
        before, after = neighbours(full), neighbours(other)
        both = (before[:, :, None] == after[:, None]).any(2).double()
        return {
            "largest change": float(change.max()),
            "mean change": float(change.mean()),
            "same nearest": float((before[:, 0] == after[:, 0]).double().mean()),
            f"of {NEAREST} nearest": float(both.mean()),
        }

    def run() -> int:
        parser = Parser("demo.lens", DESCRIPTION, EPILOG)
        add(parser, "--count", number(NEAREST + 1), "N", "at most N texts", 600)
        told = "texts are cut off here"
        add(parser, "--max-tokens", number(3, encoder.POSITIONS), "N", told, 256)
        add(parser, "--out", Path, "FOLDER", "where the report and the numbers go", OUT / "lens")
        add(parser, "--threads", number(1), "N", "CPU threads (default: torch's own choice)")
        options = parser.parse_args()
        if options.threads:
            torch.set_num_threads(options.threads)
        folder = output_folder(options.out)
        documents = corpus.collect_stdlib()
        documents = documents[:: -(-len(documents) // options.count)]
        tokenizer = encoder.load_tokenizer(options.max_tokens)
        found = tokenizer.encode_batch([document.text for document in documents])
        ids = [item.ids for item in found]
        batches = list(encoder.length_sorted(ids, 4096))
        model = encoder.load_encoder(dropout=0.0)
        attnfast.replace(model, verbose=False)
        out, cpu = console(), torch.device("cpu")
        plain(out, versions(cpu))
        plain(out, f"{len(ids)} docstrings, {sum(map(len, ids))} tokens")

        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        words, text = found[longest], documents[longest].text
        tokens = pieces(text, words.tokens, words.offsets)
        title = f"MiniLM, {documents[longest].name}"
        page = lens.report(OneText(model), torch.tensor([words.ids]), tokens, title=title)
        (folder / "report.html").write_text(page, encoding="utf-8")
        plain(out, f"{folder / 'report.html'}: {len(page) / 1e6:.1f} MB")

        with torch.inference_mode(), lens.observe(model, shares=True) as seen:
            for batch in batches:
                model(batch.tokens, batch.padding)
        models, local = {FULL: model}, {FULL: 0}
        for keep in KEEP:
            name = f"keep {keep}"
            models[name] = copy.deepcopy(model)
            local[name] = len(lens.apply_windows(models[name], seen, keep=keep))
        embeddings, seconds = measure.embed(models, batches, cpu, title="embedding")
        results = {}
        for name in models:
            found_here = compared(embeddings[FULL], embeddings[name])
            results[name] = {"local heads": local[name], **found_here, "seconds": seconds[name]}
        heading(out, "Windows on heads: 1 - cosine of embeddings, nearest texts, seconds")
        made = table("", *results[FULL])
        for name, values in results.items():
            made.add_row(name, *(f"{x:.3g}" for x in values.values()))
        show(out, made)
        plain(out, "local: the window leaves keys out. Time: in turns, batch by batch.")
        write_json(
            folder / "lens.json", {"texts": len(ids), "tokens": sum(map(len, ids)), **results}
        )
        return 0

    return run


if __name__ == "__main__":
    sys.exit(start("lens", "demo.lens", load, "pandas"))
