"""How good translations are: of single tokens, and of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sacrebleu
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from demo.translation.batches import in_order
from demo.translation.model import Translator
from demo.translation.tokens import PAD, Data

# How sacrebleu cuts text into words for BLEU.
BLEU_TOKENIZERS = {"zh": "zh"}
AVERAGES = ("macro", "weighted")


class TokenScores(NamedTuple):
    """Of the next token, told from the source and the reference so far, against the reference."""

    accuracy: float
    precision: dict[str, float]  # by average: "macro" over tokens, "weighted" by how often they are
    recall: dict[str, float]
    f1: dict[str, float]
    count: int  # tokens of the references, END included


class TextScores(NamedTuple):
    """Of whole translations against their references, from 0 to 100, by sacrebleu."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def token_scores(model: Translator, data: Data, batch_tokens: int) -> TokenScores:
    """Precision, recall and F1 over the tokens of the held-out references, by scikit-learn.

    The classes are the tokens that occur in the references; a wrong guess counts against the
    recall of the right token and, if it is such a class, the precision of the one that was told.
    """
    model.eval()
    device = model.embedding.weight.device
    told, right = [], []
    with torch.inference_mode():
        for _, batch in in_order(data.held_out, batch_tokens):
            told.append(model(*batch.to(device)).argmax(-1).cpu())
            right.append(batch.target[batch.target != PAD])
    truth, guess = torch.cat(right).numpy(), torch.cat(told).numpy()
    by_average = {}
    for average in AVERAGES:
        by_average[average] = precision_recall_fscore_support(
            truth, guess, labels=sorted(set(truth)), average=average, zero_division=0.0
        )
    precision, recall, f1 = (
        {average: float(values[i]) for average, values in by_average.items()} for i in range(3)
    )
    return TokenScores(float(accuracy_score(truth, guess)), precision, recall, f1, len(truth))


def text_scores(texts: Sequence[str], references: Sequence[str], lang: str) -> TextScores:
    """BLEU (arXiv:1804.08771) and chrF of translations into `lang`."""
    bleu = sacrebleu.BLEU(tokenize=BLEU_TOKENIZERS.get(lang, "13a"))
    chrf = sacrebleu.CHRF()
    scores = [metric.corpus_score(texts, [references]).score for metric in (bleu, chrf)]
    signatures = [str(metric.get_signature()) for metric in (bleu, chrf)]
    return TextScores(*scores, *signatures)
