"""Training that can be stopped at any step and goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from demo.measure import now
from demo.translation.batches import Batch, in_order, training_batches
from demo.translation.interrupt import Interrupt
from demo.translation.model import Translator
from demo.translation.settings import Settings
from demo.translation.tokens import PAD, Data
from demo.translation.watch import MEASURES, Look, probe, watch

LARGEST_GRADIENT = 1.0  # norm
BETAS = (0.9, 0.98)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on the matrices of linear and attention layers only.

    Biases, norms and embeddings are spared: their size is no sign of overfitting.
    """
    spared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, others = [], []
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2 and id(parameter) not in spared
        (decayed if matrix else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def rate_factor(warm_up: int) -> Callable[[int], float]:
    """The rate's factor: linear up to one in `warm_up` steps, then with the root of the step down.

    It does not depend on how many steps there will be, so that a run can be made longer.
    """
    return lambda step: min((step + 1) / warm_up, math.sqrt(warm_up / (step + 1)))


class Trainer:
    """A model in training: all that one step changes.

    Args:
        model: on its device.
        data: what it learns from.
        settings: how.
        watch_every: steps between two looks at the attention, or 0: the model's is torch's.
        logdir: a folder for TensorBoard.
    """

    def __init__(
        self,
        model: Translator,
        data: Data,
        settings: Settings,
        watch_every: int = 0,
        logdir: Path | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.watch_every = watch_every
        self.logdir = logdir
        self.device = next(model.parameters()).device
        groups = parameter_groups(model, settings.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, settings.rate, BETAS)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, rate_factor(settings.warm_up)
        )
        self.losses: list[float] = []  # of each step, with dropout
        self.seconds: list[float] = []  # of each step: forward, backward and optimiser
        self.tokens: list[int] = []  # of each step's batch, padding not counted
        self.looks: list[Look] = []
        self.goal: int | None = None  # steps to be done in all, once that is decided

    @property
    def steps(self) -> int:
        """How many steps have been done."""
        return len(self.losses)

    def train(
        self, steps: int, *, save: Callable[[], None], save_every: int = 0, label: str = "training"
    ) -> bool:
        """Train until `steps` steps are done in all; False where Ctrl-C ended it earlier.

        Args:
            steps: those of earlier runs counted.
            save: called at the end and when interrupted, with every step whole.
            save_every: and after every so many steps; 0 is never.
            label: of the progress bar.
        """
        if self.steps >= steps:
            return True
        size, seed = self.settings.batch_tokens, self.settings.seed
        batches = iter(training_batches(self.data.train, size, seed, self.steps))
        writer = None
        if self.logdir is not None:
            after = self.steps + 1 if self.steps else 0  # what an interrupted run logged beyond
            writer = SummaryWriter(str(self.logdir), purge_step=after)
        bar = partial(tqdm, desc=label, unit=" steps", mininterval=0.5)
        try:
            with Interrupt() as interrupt, bar(total=steps, initial=self.steps) as progress:
                if not self.looks:
                    self._look(writer)
                while self.steps < steps and not interrupt.asked:
                    self._step(next(batches).to(self.device))
                    self._log(writer)
                    if self.watch_every and self.steps % self.watch_every == 0:
                        self._look(writer)
                    progress.update()
                    progress.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                    if save_every and self.steps % save_every == 0 and self.steps < steps:
                        save()
                save()
        finally:
            if writer is not None:
                writer.close()
        return self.steps >= steps

    def autocast(self) -> torch.autocast:
        """The precision asked for."""
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def held_out_loss(self) -> float:
        """The mean loss of a held-out token, without dropout."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.inference_mode(), self.autocast():
            for _, batch in in_order(self.data.held_out, self.settings.batch_tokens):
                real = batch.target[batch.target != PAD]
                total += self._loss(batch.to(self.device)).item() * len(real)
                count += len(real)
        return total / count

    def _step(self, batch: Batch) -> None:
        """One optimiser step."""
        started = now(self.device)
        self.model.train()
        with self.autocast():
            loss = self._loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(now(self.device) - started)
        self.tokens.append(batch.tokens)

    def _loss(self, batch: Batch) -> Tensor:
        """The mean cross entropy of the tokens that are no padding, in fp32."""
        return F.cross_entropy(self.model(*batch).float(), batch.target[batch.target != PAD])

    def _log(self, writer: SummaryWriter | None) -> None:
        if writer is not None:
            writer.add_scalar("loss", self.losses[-1], self.steps)
            writer.add_scalar("rate", self.schedule.get_last_lr()[0], self.steps)
            rate = self.tokens[-1] / self.seconds[-1]
            writer.add_scalar("tokens per second", rate, self.steps)

    def _look(self, writer: SummaryWriter | None) -> None:
        if not self.watch_every:
            return
        with self.autocast():
            look = watch(self.model, probe(self.data.held_out).to(self.device), self.steps)
        self.looks.append(look)
        if writer is None:
            return
        for measure in MEASURES:
            for kind, layers in getattr(look, measure).items():
                for layer, heads in enumerate(layers.tolist(), 1):
                    for head, value in enumerate(heads, 1):
                        name = f"{measure}/{kind} layer {layer} head {head}"
                        writer.add_scalar(name, value, look.step)
