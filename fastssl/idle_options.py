"""Options that were set but have no effect beside the others: allowed, as old command lines have them, but said."""

from __future__ import annotations

from fastssl.config import Config, flat
from fastssl.config_checks import flag_of


def idle_options(config: Config) -> list[str]:
    """Each option that differs from its default and has no effect, as "--milestones (needs --lr-schedule step)"."""
    o, loss, default, now = config.optim, config.loss, flat(Config()), flat(config)
    needs = [  # (what they need, whether it is there, the options)
        ("--shuffle blocks", config.input.shuffle == "blocks", ["block_size"]),
        ("--loader synthetic", config.input.loader == "synthetic", ["synthetic_images", "synthetic_size"]),
        ("a loader that reads files", config.input.loader != "synthetic", ["data"]),
        ("--hide-and-seek", config.augment.hide_and_seek, ["has_p"]),
        ("--crop-pair", config.augment.crop_pair != "free", ["crop_pair_p"]),
        ("--lr-schedule step", o.lr_schedule == "step", ["milestones", "lr_drop"]),
        ("--optimizer sgd or lars", o.optimizer != "adamw", ["momentum"]),
        ("--contrast-weight", loss.contrast_weight > 0, ["temperature"]),
        ("--align-weight", loss.align_weight > 0, ["align_alpha"]),
        ("--uniform-weight", loss.uniform_weight > 0, ["uniform_t", "intra_batch"]),
        ("--knn-every", config.eval.knn_every > 0, ["knn_k", "knn_images", "eval_resize", "val"]),
    ]
    return [
        f"{'DATA' if name == 'data' else flag_of(name)} (needs {what})"
        for what, there, names in needs
        for name in names
        if not there and now[name] != default[name]
    ]
