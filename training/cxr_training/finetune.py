"""Fine-tuning: the network itself is trained, in steps that a kill cannot undo.

A checkpoint holds everything that the next step depends on, and each image's random change depends
on the seed, the epoch and the image alone. So a training that goes on from a checkpoint ends with
the same numbers as one that was never stopped.
"""

import hashlib
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from cxr_training.backbones import Backbone, PooledLast, PooledStages, retrained
from cxr_training.errors import TrainingError
from cxr_training.features import Variation, image_tensors
from cxr_training.heads import LinearHead
from cxr_training.processes import Processes
from cxr_training.recipes import Finetuning, LearningRates, Recipe
from cxr_training.runs import Epoch

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A network and its linear head after fine-tuning.

    Attributes:
        backbone: the feature extractor, frozen again.
        head: the linear head.
        history: figures of each epoch.
        best: the epoch of lowest validation loss, whose weights these are; from 1.
    """

    backbone: Backbone
    head: LinearHead
    history: tuple[Epoch, ...]
    best: int


def finetune(
    recipe: Recipe,
    backbone: Backbone,
    start: LinearHead,
    training: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    weights: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    seed: int,
    group: Processes,
    checkpoint: Path | None = None,
) -> Finetuned:
    """Train a network and its linear head, until the validation loss no longer falls.

    Args:
        recipe: a recipe that fine-tunes.
        backbone: where to start; its module is changed.
        start: the head to start with; its labels are the classes.
        training: rows of a manifest.
        validation: rows of a manifest.
        weights: weight per image of the training and of the validation rows.
        seed: of the order of the images and of their changes.
        group: the processes that train together; all call this alike.
        checkpoint: file that keeps the state, and from which a killed training goes on; `None`
            keeps none.

    Returns:
        The weights of the epoch with the lowest validation loss.

    Raises:
        TrainingError: an image cannot be used, or the checkpoint is of another training.
    """
    assert recipe.finetune is not None  # noqa: S101 - the caller looks
    work = _Training(
        settings=recipe.finetune,
        backbone=backbone,
        start=start,
        training=_Images(training, start.labels, weights[0]),
        validation=_Images(validation, start.labels, weights[1]),
        seed=seed,
        group=group,
    )
    key = _key(recipe, backbone, training, validation, seed)
    if checkpoint is not None and checkpoint.exists():
        work.restore(_read_checkpoint(checkpoint, key))
    while not work.finished:
        for _ in work.steps():
            if checkpoint is not None and work.step % recipe.finetune.checkpoint_steps == 0:
                work.write(checkpoint, key)
        work.end_epoch()
        if checkpoint is not None:
            work.write(checkpoint, key)
    best = work.best_state
    prefix = "features."
    state = {k.removeprefix(prefix): v for k, v in best.items() if k.startswith(prefix)}
    backbone.module.cpu()
    return Finetuned(
        backbone=retrained(backbone, state, recipe.weights),
        head=LinearHead(
            start.labels, best["head.weight"].double().numpy(), best["head.bias"].double().numpy()
        ),
        history=tuple(work.history),
        best=1 + min(range(len(work.history)), key=lambda n: work.history[n].validation_loss),
    )


def layer_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a feature extractor by depth: `stem`, `early`, `late`."""
    groups: dict[str, list[nn.Parameter]] = {"stem": [], "early": [], "late": []}
    for network in module.modules():
        if isinstance(network, PooledStages | PooledLast):
            half = (len(network.stages) + 1) // 2
            groups["stem"] += network.stem.parameters()
            groups["early"] += network.stages[:half].parameters()
            groups["late"] += network.stages[half:].parameters()
            if isinstance(network, PooledLast):
                groups["late"] += network.tail.parameters()
    return groups


class _Network(nn.Module):
    def __init__(self, features: nn.Module, start: LinearHead) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(start.weight.shape[1], start.weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(start.weight))
            self.head.bias.copy_(torch.from_numpy(start.bias))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))  # type: ignore[no-any-return]


class _Images:
    """Rows of a manifest with their classes and weights as tensors."""

    def __init__(
        self, frame: pd.DataFrame, labels: tuple[str, ...], weights: np.ndarray[Any, Any]
    ) -> None:
        self.frame = frame
        self.truth = torch.tensor([labels.index(name) for name in frame["label"]])
        self.weights = torch.from_numpy(np.asarray(weights, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.frame)


class _Training:
    """The state of one training, and its steps."""

    def __init__(
        self,
        *,
        settings: Finetuning,
        backbone: Backbone,
        start: LinearHead,
        training: _Images,
        validation: _Images,
        seed: int,
        group: Processes,
    ) -> None:
        self.settings, self.seed, self.group = settings, seed, group
        self.training, self.validation = training, validation
        self.spec = backbone.preprocessing
        network = _Network(backbone.module, start).requires_grad_(True)
        self.network = network.to(group.device).to(memory_format=torch.channels_last)
        self.optimizer = _optimizer(self.network, settings)
        self.batches = math.ceil(len(training) / settings.batch_size)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._slope)
        self.dtype = _precision(settings, group.device)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=self.dtype == torch.float16)
        self.epoch = self.step = self.without_progress = 0
        self.loss_sum = self.weight_sum = 0.0
        self.order = self._drawn_order()
        self.history: list[Epoch] = []
        self.best_state: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        stale = self.without_progress >= self.settings.patience
        return stale or self.epoch >= self.settings.epochs

    def steps(self) -> Iterator[None]:
        """Take the steps of this epoch that are still to be taken."""
        size, augmentation = self.settings.batch_size, self.settings.augmentation
        batches = list(torch.split(self.order, size))[self.step :]
        own = [batch[self.group.rank :: self.group.count] for batch in batches]
        variation = Variation(augmentation, (self.seed, self.epoch)) if augmentation else None
        rows = torch.cat(own).tolist() if own else []
        tensors = image_tensors(self.training.frame.iloc[rows], self.spec, variation)
        self._training_mode()
        for batch, mine in zip(batches, own, strict=True):
            self._step(
                batch, mine, np.stack(list(islice(tensors, len(mine)))) if len(mine) else None
            )
            self.step += 1
            yield

    def _step(self, batch: Tensor, mine: Tensor, images: np.ndarray[Any, Any] | None) -> None:
        self.optimizer.zero_grad()
        total = float(self.training.weights[batch].sum())
        loss = torch.zeros((), device=self.group.device)
        if images is not None:
            losses = self._losses(images, self.training, mine)
            loss = (losses * self.training.weights[mine].to(losses.device)).sum()
            self.scaler.scale(loss / total).backward()  # type: ignore[no-untyped-call]
        if self.group.count > 1:
            self._add_up_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.loss_sum += float(self.group.sum(loss.detach().clone()))
        self.weight_sum += total

    def _losses(self, images: np.ndarray[Any, Any], data: _Images, rows: Tensor) -> Tensor:
        return functional.cross_entropy(
            self._logits(images), data.truth[rows].to(self.group.device), reduction="none"
        )

    def _logits(self, images: np.ndarray[Any, Any]) -> Tensor:
        inputs = torch.from_numpy(images).to(self.group.device, memory_format=torch.channels_last)
        with self._autocast():
            return self.network(inputs).float()  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.group.device.type, dtype=self.dtype, enabled=enabled)

    def _add_up_gradients(self) -> None:
        """As if one process had seen the whole batch: each has divided by the batch's weight."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.group.sum(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        for parameter, part in zip(
            trained, torch.split(flat, [p.numel() for p in trained]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def end_epoch(self) -> None:
        """Measure on the validation split, and note whether it got better."""
        self._share_statistics()
        loss, accuracy = self._validate()
        if not self.history or loss < min(e.validation_loss for e in self.history):
            self.best_state = {
                key: value.detach().cpu().clone().contiguous()
                for key, value in self.network.state_dict().items()
            }
            self.without_progress = 0
        else:
            self.without_progress += 1
        self.epoch += 1
        self.history.append(
            Epoch(
                epoch=self.epoch,
                training_loss=self.loss_sum / self.weight_sum,
                validation_loss=loss,
                validation_accuracy=accuracy,
                learning_rate=float(self.optimizer.param_groups[-1]["lr"]),
            )
        )
        self.step, self.loss_sum, self.weight_sum = 0, 0.0, 0.0
        self.order = self._drawn_order()

    def _validate(self) -> tuple[float, float]:
        data = self.validation
        self.network.eval()
        rows = torch.arange(len(data))[self.group.rank :: self.group.count]
        tensors = image_tensors(data.frame.iloc[rows.tolist()], self.spec)
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.inference_mode():
            for part in torch.split(rows, self.settings.batch_size):
                if len(part):
                    logits = self._logits(np.stack(list(islice(tensors, len(part))))).cpu()
                    losses = functional.cross_entropy(logits, data.truth[part], reduction="none")
                    sums[0] += (losses * data.weights[part]).sum()
                    sums[1] += data.weights[part].sum()
                    sums[2] += (logits.argmax(dim=1) == data.truth[part]).sum()
        loss, weight, right = self.group.sum(sums.to(self.group.device)).tolist()
        return loss / weight, right / len(data)

    def _training_mode(self) -> None:
        self.network.train()
        if self.settings.freeze_batch_norm:
            for module in self.network.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()

    def _share_statistics(self) -> None:
        """Give all processes the mean of their normalisation layers' statistics."""
        if self.group.count > 1:
            for buffer in self.network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.group.sum(buffer.clone()) / self.group.count)

    def _drawn_order(self) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return torch.randperm(len(self.training), generator=generator)

    def _slope(self, step: int) -> float:
        """Share of the step size that is used at a step."""
        total = self.batches * self.settings.epochs
        warmup = self.settings.warmup * total
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

    def write(self, file: Path, key: str) -> None:
        """Write a checkpoint by rename, so that a kill leaves the old one or the new one."""
        self._share_statistics()
        if self.group.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            torch.save(
                {
                    "key": key,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "random": torch.get_rng_state(),
                    "random_gpu": torch.cuda.get_rng_state_all(),
                    "order": self.order,
                    "epoch": self.epoch,
                    "step": self.step,
                    "loss_sum": self.loss_sum,
                    "weight_sum": self.weight_sum,
                    "without_progress": self.without_progress,
                    "history": [epoch.model_dump() for epoch in self.history],
                    "best_state": self.best_state,
                },
                temporary,
            )
            os.replace(temporary, file)  # noqa: PTH105 - says that it is atomic
        self.group.wait()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_gpu"])
        self.order = state["order"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum, self.weight_sum = state["loss_sum"], state["weight_sum"]
        self.without_progress = state["without_progress"]
        self.history = [Epoch.model_validate(epoch) for epoch in state["history"]]
        self.best_state = state["best_state"]


def _optimizer(network: _Network, settings: Finetuning) -> torch.optim.Optimizer:
    rates = settings.learning_rate
    if not isinstance(rates, LearningRates):
        rates = LearningRates(stem=rates, early=rates, late=rates, head=rates)
    parameters = layer_groups(network.features) | {"head": list(network.head.parameters())}
    groups = []
    for name, members in parameters.items():
        rate = getattr(rates, name)
        if rate:
            groups.append({"params": members, "lr": rate})
        else:
            for parameter in members:
                parameter.requires_grad_(False)
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, weight_decay=decay)


def _precision(settings: Finetuning, device: torch.device) -> torch.dtype:
    if settings.precision == "float32" or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _key(
    recipe: Recipe, backbone: Backbone, training: pd.DataFrame, validation: pd.DataFrame, seed: int
) -> str:
    """Names what a training is made of; a checkpoint of another key is not gone on from."""
    digest = hashlib.sha256(f"{recipe.model_dump_json()}{backbone.fingerprint}{seed}".encode())
    for frame in (training, validation):
        for column in ("sha256", "label"):
            digest.update("\0".join(frame[column]).encode())
    return digest.hexdigest()


def _read_checkpoint(file: Path, key: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        found = state["key"]
    except (
        OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        raise TrainingError(
            f"The checkpoint {file} is damaged; delete it to start anew."
        ) from error
    if found != key:
        raise TrainingError(
            f"The checkpoint {file} is of another recipe, seed or data; delete it or choose "
            "another folder."
        )
    return state
