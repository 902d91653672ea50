"""Options that were set but have no effect beside the others: allowed, as old command lines have them, but said."""

from __future__ import annotations

from fastssl.augment.policy import Policy, parse_settings
from fastssl.build import open_policy
from fastssl.config import Config, flat
from fastssl.config_checks import flag_of


def idle_options(config: Config) -> list[str]:
    """Each option that differs from its default and has no effect, as "--milestones (needs --lr-schedule step)"."""
    o, loss, loader, default, now = config.optim, config.loss, config.input.loader, flat(Config()), flat(config)
    policy = open_policy(config)  # --policy-set can ask for hide-and-seek and pairs of crops too
    can_read_beton = config.data.endswith(".beton") and loader != "dali"
    needs = [  # (what they need, whether it is there, the options)
        ("--shuffle blocks", config.input.shuffle == "blocks", ["block_size"]),
        ("--loader synthetic", loader == "synthetic", ["synthetic_images", "synthetic_size"]),
        ("a loader that reads files", loader != "synthetic", ["data", "workers", "on_bad_image", "val"]),
        ("--loader folder, beton or dali", loader not in ("resident", "synthetic"), ["read_ahead"]),
        ("a .beton file that DALI does not read", can_read_beton, ["beton_cache"]),
        ("--hide-and-seek", policy.hide_and_seek, ["has_p"]),
        ("--crop-pair", policy.crop_iou is not None, ["crop_pair_p"]),
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
    ] + idle_settings(config, policy)


def idle_settings(config: Config, policy: Policy) -> list[str]:
    """Each setting of --policy-set that changes nothing, as "--policy-set blur_sigma (needs blur_p)"."""
    given, strengths = parse_settings(config.augment.policy_set), ["brightness", "contrast", "saturation", "hue"]
    needs = [
        ("another policy than none", policy.crop_scale is not None, ["crop_scale", "crop_ratio"]),
        ("crop_iou or --crop-pair", policy.crop_iou is not None, ["crop_iou_p"]),
        ("jitter_p", policy.jitter_p > 0, strengths),
        (" or ".join(strengths), any(getattr(policy, name) for name in strengths), ["jitter_p"]),
        ("grey_p", policy.grey_p > 0, ["grey_first"]),
        ("blur_p", policy.blur_p > 0, ["blur_sigma"]),
        ("hide_and_seek", policy.hide_and_seek, ["hide_p"]),
    ]
    return [
        f"--policy-set {name} (needs {what})"
        for what, there, names in needs
        for name in names
        if not there and name in given
    ]
