"""Averages inside of the training loops of transformers and Lightning."""

import os
from pathlib import Path
from typing import Any

import torch

from cln_tutorial.weight_averaging.averages import ExponentialMovingAverage

FILE = "averages.safetensors"


def trainer_callback(
    average: ExponentialMovingAverage, resume_from: str | os.PathLike[str] | None = None
) -> Any:
    """Return a ``transformers.TrainerCallback`` that averages, saves and resumes.

    It updates after each step that the optimiser really makes, writes ``averages.safetensors``
    into each checkpoint, and reads it again when a run goes on from there.

    Args:
        average: of the model that the ``Trainer`` is given.
        resume_from: folder of that checkpoint, if it is not ``checkpoint-N`` in ``output_dir``.

    Raises:
        ImportError: without transformers.
        FileNotFoundError: at the start of training, for a checkpoint without averages.

    Example:
        >>> average = ExponentialMovingAverage([torch.zeros(2, requires_grad=True)], decay=0.999)
        >>> callback = trainer_callback(average)  # Trainer(model, callbacks=[callback])
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "`trainer_callback` needs transformers: pip install 'cln-tutorial[huggingface]'"
        ) from error

    class Averaging(_Attached, TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step > 0:
                folder = resume_from or _checkpoint(args, state)
                if not (path := Path(folder) / FILE).exists():
                    raise FileNotFoundError(
                        f"{path}: the run goes on from step {state.global_step}, and its averages "
                        f"are not there; give `resume_from`."
                    )
                average.load(path)
            # Accelerate's wrapper has no hooks of its own.
            self.attach(average, [getattr(optimizer, "optimizer", optimizer)])

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                average.save(_checkpoint(args, state) / FILE)

        def on_train_end(self, args, state, control, **kwargs):
            self.detach()

    return Averaging()


def lightning_callback(average: ExponentialMovingAverage) -> Any:
    """Return a ``lightning.pytorch.Callback`` that averages, saves and resumes.

    It updates after each step of the first optimiser that has the averaged parameters. The
    averages are part of Lightning's checkpoints, and are taken up from there.

    Args:
        average: of the ``LightningModule`` or of a part of it, a GAN's generator for instance.

    Raises:
        ImportError: without lightning.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise ImportError("`lightning_callback` needs Lightning: pip install lightning") from error

    class Averaging(_Attached, Callback):
        def on_train_start(self, trainer, pl_module):
            self.attach(average, trainer.optimizers)

        def on_train_end(self, trainer, pl_module):
            self.detach()

        def state_dict(self):
            return average.state_dict()

        def load_state_dict(self, state_dict):
            average.load_state_dict(state_dict)

    return Averaging()


class _Attached:
    """One hook on one optimiser at a time."""

    handle = None

    def attach(
        self, average: ExponentialMovingAverage, optimisers: list[torch.optim.Optimizer]
    ) -> None:
        self.detach()  # of a run that broke off
        reason = ValueError("the training has no optimiser to follow.")
        for optimiser in optimisers:
            try:
                self.handle = average.attach(optimiser)
            except ValueError as error:  # a GAN's other optimiser
                reason = error
            else:
                return
        raise reason

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
