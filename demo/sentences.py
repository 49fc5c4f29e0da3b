"""Sentence embeddings by Hugging Face's BertModel: stock attention and attnfast's, timed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("torch", "transformers", "attnfast", "safetensors", "tokenizers", "tqdm")
TOLERANCE = 1e-5
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(f"sentences: {missing[0]} is not installed (`make venv demo` does it)", file=sys.stderr)
    sys.exit(2)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertModel  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from attnfast.integrations import transformers as attnfast_transformers  # noqa: E402
from demo.command import guarded  # noqa: E402
from demo.options import Parser, add, number  # noqa: E402
from demo.search import corpus, encoder, measure  # noqa: E402

STOCK = ("eager", "sdpa")
DESCRIPTION = """\
Embeds texts with MiniLM, loaded as a transformers.BertModel: with eager attention, with torch's
sdpa and with attnfast. Prints the time of each and the largest difference from eager."""
EPILOG = "exit codes: 0 all well; 1 an embedding differs by more than 1e-5; 2 bad input"


class BertSentences(nn.Module):
    """A BertModel, the mean over each text's tokens, and length one."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        folder = encoder.model_folder()
        self.bert = BertModel.from_pretrained(folder, attn_implementation=implementation).eval()

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Embed tokens (B, L) int64 with padding (B, L), True where padded: (B, 384)."""
        hidden = self.bert(tokens, attention_mask=~padding).last_hidden_state  # (B, L, 384)
        return nn.functional.normalize(encoder.mean_pool(hidden, padding), dim=-1)


def parser() -> Parser:
    """Every option."""
    parser = Parser("demo.sentences", DESCRIPTION, EPILOG)
    told = "one a line, or parted by blank lines (default: docstrings of the standard library)"
    add(parser, "--texts", Path, "FILE", told)
    add(parser, "--count", number(1), "N", "at most N texts", 400)
    add(parser, "--threads", number(1), "N", "CPU threads (default: torch's own choice)")
    told = "texts are cut off here"
    add(parser, "--max-tokens", number(3, encoder.POSITIONS), "N", told, 256)
    add(parser, "--batch-tokens", number(1), "N", "positions of a padded batch", 4096)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Embed, compare and report.

    Returns:
        0, or 1 if an embedding differs from eager's by more than 1e-5.

    Raises:
        UsageError: an option is wrong, or there is nothing to embed.
    """
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.texts:
        documents = corpus.read_texts(options.texts)
    else:
        documents = corpus.collect_stdlib()
    documents = documents[:: -(-len(documents) // options.count)]  # of all parts
    tokenizer = encoder.load_tokenizer(options.max_tokens)
    ids = [item.ids for item in tokenizer.encode_batch([document.text for document in documents])]
    batches = list(encoder.length_sorted(ids, options.batch_tokens))

    ours = attnfast_transformers.register()
    disable_progress_bar()
    models = {name: BertSentences(name) for name in (*STOCK, ours)}
    cpu, title = torch.device("cpu"), f"embedding with {', '.join(models)}"
    embeddings, seconds = measure.embed(models, batches, cpu, title=title)

    tokens = sum(map(len, ids))
    print(f"{len(documents)} texts, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'':10}{'seconds':>9}{'tokens/s':>10}{'eager / it':>12}   difference from eager")
    worst = 0.0
    for name, spent in seconds.items():
        difference = (embeddings[name] - embeddings["eager"]).abs().max().item()
        worst = max(worst, difference)
        faster = seconds["eager"] / spent
        print(f"{name:10}{spent:9.2f}{tokens / spent:10.0f}{faster:12.2f}   {difference:.1e}")
    if not worst <= TOLERANCE:
        print(
            f"sentences: embeddings differ by {worst:.1e}, more than {TOLERANCE}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded("sentences", run))
