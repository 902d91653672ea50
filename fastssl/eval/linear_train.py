"""The reference's linear evaluation: a classifier trained by SGD on augmented images, the backbone frozen or not.

All ranks share one order of the images, the last incomplete batch included, and a step's loss is the mean over all
ranks' images. So the number of ranks changes only the speed (and, in fine-tuning, the images that batch norm sees).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastssl.batch import ImageBatch
from fastssl.data_prep.files import check_writable
from fastssl.distributed import Ranks, gather_objects
from fastssl.eval.classifier import Classifier, Keeper, read_classifier, validate
from fastssl.eval.features import View, share_buffers
from fastssl.eval.images import Images
from fastssl.eval.session import Session
from fastssl.loaders.order import epoch_order
from fastssl.random_key import STREAM_STEP, derive_seed
from fastssl.schedules import learning_rate

TrainView = Callable[[ImageBatch, int], Tensor]  # (batch, epoch) -> (B, 3, S, S)


class Protocol(NamedTuple):
    """What distinguishes linear evaluation, transfer and fine-tuning."""

    train_view: TrainView
    val_view: View
    line: str  # printed after a validation, with {acc1} and {acc5}
    drop: float = 0.1  # factor of the learning rate at each milestone
    finetune: bool = False  # train the backbone, too, but for what its architecture freezes (vit_tiny)
    eval_after_first: bool = False  # fine-tune in eval mode after the first epoch, as the reference does


def train_classifier(
    session: Session, model: Classifier, train: Images, val: Images, protocol: Protocol, folder: Path
) -> dict:
    """Trains, validates after every epoch and keeps the best classifier. Returns accuracies in percent.

    Raises ValueError when the loss is not finite, RuntimeError when a frozen backbone has changed.
    """
    o, keeper = session.options, Keeper(folder, session.ranks, session.options.resume)
    if not protocol.finetune:
        model.backbone.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    first, best = resume(session, model, optimizer)
    frozen = None if protocol.finetune else copy_state(model.backbone)
    if o.evaluate:
        return {**report(session, model, val, protocol), "epochs_trained": first}
    if first >= o.epochs:
        raise ValueError(f"{o.resume} has already reached --epochs {o.epochs}: give more, or validate it with -e")
    if session.ranks.rank == 0:
        check_writable(folder / "model_best.pth.tar", "--output")
    # a checkpoint has the reference's keys: of the best epoch before --resume it holds only acc1
    result = {"epochs_trained": first, "best_acc1": best, "best_acc5": None, "best_epoch": None, "acc1_by_epoch": []}
    for epoch in range(first, o.epochs):
        rate = learning_rate(
            epoch, base_lr=o.lr, epochs=o.epochs, steps_per_epoch=1, schedule="step", milestones=o.schedule,
            drop=protocol.drop,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train(protocol.finetune and not (protocol.eval_after_first and epoch > o.start_epoch))
        train_epoch(session, model, train, optimizer, protocol.train_view, epoch)
        if protocol.finetune:
            share_buffers(model, session.ranks)
        if frozen is not None and epoch == first:
            check_frozen(model.backbone, frozen)
            session.say("=> sanity check passed.")
        result |= {"epochs_trained": epoch + 1, **report(session, model, val, protocol)}
        result["acc1_by_epoch"].append(result["acc1"])
        is_best = result["acc1"] > result["best_acc1"]
        if is_best:
            result |= {"best_acc1": result["acc1"], "best_acc5": result["acc5"], "best_epoch": epoch}
            session.say(f"New best Acc1 {result['acc1']:.4f}")
        keeper.save(state_of(o, model, optimizer, result), epoch, is_best)
    return {**result, "folder": str(folder)}


def report(session: Session, model: Classifier, val: Images, protocol: Protocol) -> dict[str, float]:
    """Validates and prints the protocol's line. Returns the accuracies."""
    acc1, acc5 = validate(session, model, val, protocol.val_view)
    session.say(protocol.line.format(acc1=acc1, acc5=acc5))
    return {"acc1": acc1, "acc5": acc5}


def train_epoch(
    session: Session,
    model: Classifier,
    images: Images,
    optimizer: torch.optim.Optimizer,
    view: TrainView,
    epoch: int,
) -> None:
    """One pass over all images. Raises ValueError when the loss is not finite."""
    o, ranks = session.options, session.ranks
    torch.manual_seed(derive_seed(o.seed, epoch, STREAM_STEP, ranks.rank))  # for the dropout of a fine-tuned encoder
    steps = epoch_order(images.num_images, o.seed, epoch).split(o.batch_size)
    shares = [step.tensor_split(ranks.world_size)[ranks.rank] for step in steps]
    batches = images.read(iter(shares), replace_bad=True)
    losses = []
    for i, (step, share) in enumerate(zip(session.bar(steps, len(steps), f"epoch {epoch}"), shares)):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=ranks.device)
        if len(share):  # the last batch may hold fewer images than there are ranks
            batch = next(batches).to(ranks.device)
            logits = model(view(batch, epoch), session.dtype)
            loss = cross_entropy(logits, batch.label, reduction="sum") / len(step)
            loss.backward()
        sum_gradients(optimizer, ranks)
        optimizer.step()
        losses.append(loss.detach())
        if i % o.print_freq == 0:
            mean = sum(gather_objects(float(losses[-1]), ranks))
            session.say(f"Epoch: [{epoch}][{i}/{len(steps)}]\tLoss {mean:.4e}\tlr {optimizer.param_groups[0]['lr']:g}")
    batches.close()
    if not torch.isfinite(torch.stack(losses)).all():
        raise ValueError(f"the loss of epoch {epoch} is not finite: lower --lr")


def sum_gradients(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Replaces every gradient by its sum over the ranks, in one all-reduce."""
    if ranks.world_size == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


def resume(session: Session, model: Classifier, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Loads the checkpoint of --resume, if there is one. Returns (first epoch, best Acc1 so far).

    Momentum and weight decay stay the checkpoint's, as in the reference; a note says so where the options differ.
    Raises ValueError when it is not a checkpoint of this classifier, or trained other weights of it.
    """
    o, path = session.options, session.options.resume
    if not path:
        return o.start_epoch, 0.0
    _, weights, entries = read_classifier(path)
    model.import_state(weights)
    if o.evaluate:  # any classifier can be validated, whichever of its weights were trained
        return entries["epoch"], float(entries["best_acc1"])
    try:
        optimizer.load_state_dict(entries["optimizer"])
    except ValueError:
        raise ValueError(f"{path} trained other weights: give --finetune only if its run was given it") from None
    for flag, name in (("--wd", "weight_decay"), ("--momentum", "momentum")):
        saved = optimizer.param_groups[0][name]
        if saved != getattr(o, name):
            session.note(f"{flag} is {saved:g}, as in {path}, and not {getattr(o, name):g}")
            setattr(o, name, saved)
    return entries["epoch"], float(entries["best_acc1"])


def state_of(o: argparse.Namespace, model: Classifier, optimizer: torch.optim.Optimizer, result: dict) -> dict:
    """A checkpoint with the reference's keys, and the stem."""
    return {
        "epoch": result["epochs_trained"],
        "arch": o.arch,
        "stem": o.stem,
        "state_dict": model.export_state(),
        "best_acc1": result["best_acc1"],
        "acc1": result["acc1"],
        "acc5": result["acc5"],
        "optimizer": optimizer.state_dict(),
    }


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's parameters and buffers, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def check_frozen(backbone: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises RuntimeError when a parameter or buffer of the backbone is not, bit for bit, what it was before."""
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor.cpu(), before[name])]
    if changed:
        raise RuntimeError(
            f"the frozen backbone has changed while the classifier was trained: {', '.join(changed[:5])}"
        )
