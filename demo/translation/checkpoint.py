"""Checkpoints: everything a training run needs to go on as if it had not stopped."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.command import UsageError
from demo.files import written_whole
from demo.translation.settings import Settings
from demo.translation.tokens import Data
from demo.translation.train import Trainer
from demo.translation.watch import Look

FORMAT = 1
SHAPE = ("width", "heads", "layers", "feedforward")


def save(trainer: Trainer, path: Path) -> None:
    """Write model, optimiser, schedule, history and generators to a file, whole or not at all."""
    state = {
        "format": FORMAT,
        "settings": trainer.settings.as_dict(),
        "data": trainer.data.fingerprint,
        "tokenizer": trainer.data.tokenizer.to_str(),
        "vocabulary": trainer.model.embedding.num_embeddings,
        "model": trainer.model.state_dict(),
        "optimiser": trainer.optimiser.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "goal": trainer.goal,
        "losses": trainer.losses,  # their number is the place in the order of the data
        "seconds": trainer.seconds,
        "tokens": trainer.tokens,
        "looks": [tuple(look) for look in trainer.looks],
        "generators": generator_states(trainer.device),
    }
    with written_whole(path) as temporary:
        torch.save(state, temporary)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint's content; nothing in it is executed.

    Raises:
        UsageError: the file cannot be read, or is none of ours.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UsageError(f"--resume: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch.load raises what its unpickler happens to
        raise UsageError(f"--resume: {path} is no checkpoint of this demo") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"--resume: {path} is no checkpoint of this demo")
    return state


def check(state: dict[str, Any], path: Path, settings: Settings, data: Data) -> None:
    """Raise unless the checkpoint is of this model, trained in this way on these pairs.

    Raises:
        UsageError: what differs first, with both values.
    """
    made, asked = state["settings"], settings.as_dict()
    order = [*SHAPE, *(name for name in asked if name not in SHAPE)]
    for name in order:
        if made.get(name) != asked[name]:
            what = "of another shape" if name in SHAPE else "of another training run"
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--resume: {path} is {what}: it was made with {option} {made.get(name)},"
                f" got {asked[name]}"
            )
    size = data.tokenizer.get_vocab_size()
    if state["vocabulary"] != size:
        raise UsageError(
            f"--resume: {path} is of another shape: its vocabulary has {state['vocabulary']}"
            f" tokens, that of these pairs has {size}"
        )
    if state["data"] != data.fingerprint:
        raise UsageError(f"--resume: {path} was trained on other pairs")


def restore(state: dict[str, Any], trainer: Trainer) -> None:
    """Put a trainer where the one was that was saved, the global generators included."""
    trainer.model.load_state_dict(state["model"])
    trainer.optimiser.load_state_dict(state["optimiser"])
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.goal = state.get("goal")  # which older checkpoints lack
    trainer.losses = list(state["losses"])
    trainer.seconds = list(state["seconds"])
    trainer.tokens = list(state["tokens"])
    trainer.looks = [Look(step, *map(_on_cpu, measures)) for step, *measures in state["looks"]]
    restore_generators(state["generators"], trainer.device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Where Python's, NumPy's and torch's generators stand, in types that load safely."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    states = {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Undo whatever was drawn since `generator_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _on_cpu(measures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {kind: values.cpu() for kind, values in measures.items()}
