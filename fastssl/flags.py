"""The command line of a run: flags from the dataclasses, recipes from YAML, the reference projects' flags as aliases.

defaults (config.py)  <  --config RECIPE  <  flags
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import tyro

from fastssl.arguments import data_first
from fastssl.config import Config
from fastssl.recipe import load_recipe, to_yaml

# What a reference flag without a twin of its own means here. Flags that only differ in name are aliases in config.py.
REFERENCE_SWITCHES = {
    "--aug-plus": ["--policy", "v2"],
    "--cos": ["--lr-schedule", "cosine"],
    "--moco-unif-no-intra-batch": ["--no-intra-batch"],
    "--compile": ["--compile", "on"],
    "--no-compile": ["--compile", "off"],
    "--channels-last": ["--channels-last", "on"],
    "--no-channels-last": ["--channels-last", "off"],
}
REFERENCE_VALUES = {
    "--moco-contr-w": ["--contrast-weight"],
    "--moco-contr-tau": ["--temperature"],
    "--moco-align-w": ["--align-weight"],
    "--moco-align-alpha": ["--align-alpha"],
    "--moco-unif-w": ["--uniform-weight"],
    "--moco-unif-t": ["--uniform-t"],
    # the small-model project has the contrastive loss alone
    "--moco-t": ["--contrast-weight", "1", "--align-weight", "0", "--uniform-weight", "0", "--temperature"],
    "--schedule": ["--milestones"],
}
LISTS = {  # what their items look like: the word after them may be the data set
    "--milestones": str.isdecimal,
    "--policy-set": lambda word: word.partition("=")[0].isidentifier() and "=" in word,
}
HEADS = ("linear", "simple", "deep", "wide", "dropout")


def translate_reference_flags(argv: Sequence[str]) -> list[str]:
    """The same command line with the reference projects' own flags spelt as ours, same meaning."""
    words = [word for item in argv for word in (item.split("=", 1) if item.startswith("--") else [item])]
    switches = REFERENCE_SWITCHES
    if "--cj" in words and "--policy" not in words:  # its README passes --aug-plus too, where it means nothing
        switches = switches | {"--cj": ["--policy", "small", "--cj"], "--aug-plus": []}
    result: list[str] = []
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word == "--mlp":  # a switch in one project, a choice in the other
            result += ["--head"] if following in HEADS else ["--head", "simple"]
        elif word in ("--compile", "--channels-last") and following in ("auto", "on", "off", "graphs"):
            result += [word]
        elif word in switches:
            result += switches[word]
        elif word in REFERENCE_VALUES:
            result += REFERENCE_VALUES[word]
        else:
            result += [word]
    return result


def parse(argv: Sequence[str], program: str = "fastssl pretrain") -> Config:
    """The configuration of a command line. `--print-config` prints it as a recipe and exits."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="RECIPE")
    first.add_argument("--print-config", action="store_true")
    own, rest = first.parse_known_args(list(argv))
    default = Config() if own.config is None else load_recipe(own.config)
    config = tyro.cli(
        Config,
        prog=program,
        args=data_first(translate_reference_flags(rest), LISTS),
        default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    if own.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config
