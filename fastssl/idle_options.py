"""Options that were set but have no effect beside the others: allowed, as old command lines have them, but said."""

from __future__ import annotations

from fastssl.config import Config, flat
from fastssl.config_checks import flag_of


def idle_options(config: Config) -> list[str]:
    """Each option that differs from its default and has no effect, as "--milestones (needs --lr-schedule step)"."""
    o, loss, loader, default, now = config.optim, config.loss, config.input.loader, flat(Config()), flat(config)
    can_read_beton = config.data.endswith(".beton") and loader != "dali"
    needs = [  # (what they need, whether it is there, the options)
        ("--shuffle blocks", config.input.shuffle == "blocks", ["block_size"]),
        ("--loader synthetic", loader == "synthetic", ["synthetic_images", "synthetic_size"]),
        ("a loader that reads files", loader != "synthetic", ["data", "workers", "on_bad_image", "val"]),
        ("--loader folder, beton or dali", loader not in ("resident", "synthetic"), ["read_ahead"]),
        ("a .beton file that DALI does not read", can_read_beton, ["beton_cache"]),
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
