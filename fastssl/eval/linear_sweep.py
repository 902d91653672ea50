"""The cached protocol: features of centre crops are computed once, then all classifiers are trained on them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fastssl.distributed import gather_objects
from fastssl.eval.features import gather_features
from fastssl.eval.linear_cached import Setting, Sweep, count_sweep_hits, fit_linear
from fastssl.eval.memory import Rows
from fastssl.eval.session import Session

CACHED = "cached: frozen features of centre crops, no augmentation, accuracy after the last epoch"


def run_sweep(
    session: Session, train: tuple[Rows, Tensor], val: tuple[Rows, Tensor], num_classes: int, line: str
) -> dict:
    """Trains and validates every setting; the ranks share the settings. train, val: this rank's features and labels.

    line: printed for every setting, with {acc1} and {acc5}. Raises ValueError when every setting diverges.
    """
    o, ranks = session.options, session.ranks
    train, val = (
        (gather_features(session, features), torch.cat(gather_objects(labels, ranks)))
        for features, labels in (train, val)
    )
    for name, (_, labels) in (("training", train), ("held-out", val)):
        if not len(labels):
            raise ValueError(f"none of the {name} images can be read: check the files of that split")
    settings = [Setting(lr, wd) for lr, wd in product(o.lrs or [o.lr], o.wds or [o.weight_decay])]
    mine = settings[ranks.rank :: ranks.world_size]
    results = []
    if mine:
        sweep = Sweep(o.epochs, o.batch_size, o.schedule, o.momentum, o.seed)
        weight, bias = fit_linear(*train, num_classes, mine, sweep, device=ranks.device, bar=session.bar)
        percent = 100 * count_sweep_hits(*val, weight, bias).double() / len(val[1])
        finite = torch.isfinite(weight).flatten(1).all(1).tolist()
        for setting, (acc1, acc5), converged in zip(mine, percent.tolist(), finite):
            accuracy = {"acc1": acc1, "acc5": acc5} if converged else {"acc1": None, "acc5": None}
            results.append({**setting._asdict(), **accuracy})
    found = {(r["lr"], r["weight_decay"]): r for part in gather_objects(results, ranks) for r in part}
    results = [found[setting] for setting in settings]
    good = [r for r in results if r["acc1"] is not None]
    if not good:
        raise ValueError("training diverged with every setting: give smaller learning rates (--lr or --lrs)")
    for r in results:
        accuracy = line.format(acc1=r["acc1"], acc5=r["acc5"]) if r in good else "diverged"
        session.say(f"lr {r['lr']:g} wd {r['weight_decay']:g} {accuracy}")
    best = max(good, key=lambda r: r["acc1"])
    session.say(line.format(**best))
    return {"acc1": best["acc1"], "acc5": best["acc5"], "best": best, "settings": results}
