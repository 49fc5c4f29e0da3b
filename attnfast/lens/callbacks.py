"""Callbacks that monitor and clip a model in the training loops of others."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ..requirements import MAX_FP32, MIN_FP32, fail, number
from .clip import QKClip
from .monitor import Monitor


def trainer_callback(*, clip: float | None = None, **monitor: Any) -> Any:
    """A callback for transformers' ``Trainer`` that monitors the model while it trains.

    ``Trainer(..., callbacks=[lens.trainer_callback(every=50, out="heads.csv")])``. Steps are the
    trainer's.

    Args:
        clip: the limit of a `QKClip` that is attached to the optimiser; None clips nothing.
        monitor: the arguments of the `Monitor`: every, out, floor, looks, limit.

    Raises:
        ImportError: There is no transformers.
    """
    transformers = imported("trainer_callback", "transformers")

    class LensCallback(transformers.TrainerCallback):  # type: ignore[name-defined]
        """Watches from the first step to the last."""

        def __init__(self) -> None:
            self.steering = Steering("trainer_callback", clip, monitor)

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.steering.begin(given["model"], [given["optimizer"]])

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.steering.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.steering.end()

    return LensCallback()


def lightning_callback(*, clip: float | None = None, **monitor: Any) -> Any:
    """The same for Lightning's ``Trainer``, of the package lightning or pytorch_lightning.

    Args:
        clip: the limit of a `QKClip` that is attached to the one optimiser; None clips nothing.
        monitor: the arguments of the `Monitor`: every, out, floor, looks, limit.

    Raises:
        ImportError: There is no Lightning.
    """
    pytorch = imported("lightning_callback", "lightning.pytorch", "pytorch_lightning")

    class LensCallback(pytorch.Callback):  # type: ignore[name-defined]
        """Watches from the first step to the last, or to an exception."""

        def __init__(self) -> None:
            self.steering = Steering("lightning_callback", clip, monitor)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.steering.begin(pl_module, trainer.optimizers)

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            self.steering.step(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.steering.end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.steering.end()

    return LensCallback()


class Steering:
    """A monitor, and perhaps a clip, from the first step of a training to its last."""

    def __init__(self, function: str, clip: Any, monitor: dict[str, Any]) -> None:
        self.function, self.options = function, monitor
        self.clip_at = None
        if clip is not None:
            self.clip_at = number(function, "clip", clip, MIN_FP32, MAX_FP32, "above 0, or None")
        Monitor(nn.Identity(), **{**monitor, "out": None})  # says now what is wrong with them
        self.monitor: Monitor | None = None
        self.clip: QKClip | None = None

    def begin(self, model: nn.Module, optimizers: list[Any]) -> None:
        """The model's first step comes."""
        self.end()
        if self.clip_at is not None:
            if len(optimizers) != 1:
                fail(self.function, "clip", "None with several optimisers", len(optimizers))
            optimizer = optimizers[0]
            while hasattr(optimizer, "optimizer"):  # accelerate's and Lightning's wrappers
                optimizer = optimizer.optimizer
            self.clip = QKClip(model, self.clip_at).attach(optimizer)
        self.monitor = Monitor(model, **self.options)
        self.monitor.start()

    def step(self, number: int) -> None:
        """A step comes."""
        if self.monitor is not None:
            self.monitor.step = number

    def end(self) -> None:
        """The last step is done."""
        if self.monitor is not None:
            self.monitor.stop()
        if self.clip is not None:
            self.clip.detach()
        self.monitor = self.clip = None


def imported(function: str, *names: str) -> Any:
    """The first of some modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    raise ImportError(f"{function}: needs {' or '.join(names)}, which is not installed")
