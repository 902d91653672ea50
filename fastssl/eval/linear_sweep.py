"""The cached protocol: features of centre crops once, then every (learning rate, weight decay) on them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fastssl.distributed import gather_objects
from fastssl.eval.features import put_rows
from fastssl.eval.linear_cached import Setting, Sweep, count_sweep_hits, fit_linear
from fastssl.eval.memory import Rows
from fastssl.eval.search import share_chunk
from fastssl.eval.session import Session

_AT_ONCE = 4096  # features that travel together
CACHED = "cached: frozen features of centre crops, no augmentation, accuracy after the last epoch"


def settings_of(session: Session) -> list[Setting]:
    """All combinations of --lrs and --wds, or the one of --lr and --wd."""
    o = session.options
    return [Setting(lr, wd) for lr, wd in product(o.lrs or [o.lr], o.wds or [o.weight_decay])]


def run_sweep(
    session: Session, train: tuple[Rows, Tensor], val: tuple[Rows, Tensor], num_classes: int, line: str
) -> dict:
    """Trains and validates every setting; ranks share the settings. train, val: this rank's features and labels.

    line: for stdout, with {acc1} and {acc5}. Raises ValueError when every setting diverges.
    """
    o, ranks = session.options, session.ranks
    train, val = (part if ranks.world_size == 1 else gather_all(session, *part) for part in (train, val))
    if not len(val[1]) or not len(train[1]):
        raise ValueError("no image of one of the splits can be read")
    settings = settings_of(session)
    mine = settings[ranks.rank :: ranks.world_size]
    results = []
    if mine:
        sweep = Sweep(o.epochs, o.batch_size, o.schedule, 0.1, o.momentum, o.seed)
        weight, bias = fit_linear(*train, num_classes, mine, sweep, device=ranks.device, bar=session.bar)
        percent = 100 * count_sweep_hits(*val, weight, bias).double() / len(val[1])
        finite = torch.isfinite(weight).flatten(1).all(1).tolist()
        results = [
            {**setting._asdict(), "acc1": acc1 if ok else None, "acc5": acc5 if ok else None}
            for setting, (acc1, acc5), ok in zip(mine, percent.tolist(), finite)
        ]
    found = {(r["lr"], r["weight_decay"]): r for part in gather_objects(results, ranks) for r in part}
    results = [found[setting] for setting in settings]
    good = [r for r in results if r["acc1"] is not None]
    if not good:
        raise ValueError("the classifiers of all settings diverged: give smaller --lrs")
    for r in results:
        accuracy = line.format(acc1=r["acc1"], acc5=r["acc5"]) if r in good else "diverged"
        session.say(f"lr {r['lr']:g} wd {r['weight_decay']:g} {accuracy}")
    best = max(good, key=lambda r: r["acc1"])
    session.say(line.format(**best))
    return {"acc1": best["acc1"], "acc5": best["acc5"], "best": best, "settings": results}


def gather_all(session: Session, rows: Rows, labels: Tensor) -> tuple[Rows, Tensor]:
    """All ranks' (n, C) features in rank order on every rank, where `Memory.make_rows` finds room, and their labels."""
    ranks = session.ranks
    shapes = gather_objects(tuple(rows.shape), ranks)
    everything, done = session.memory.make_rows(sum(n for n, _ in shapes), max(c for _, c in shapes)), 0
    for owner, (num, _) in enumerate(shapes):
        for start in range(0, num, _AT_ONCE):
            chunk = share_chunk(rows, start, min(_AT_ONCE, num - start), everything.shape[1], owner, ranks)
            put_rows(everything, done, chunk)
            done += len(chunk)
    return everything, torch.cat(gather_objects(labels.cpu(), ranks))
