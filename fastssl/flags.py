"""Parses the command line of a run, with the reference projects' own flags translated to ours.

Flags override the recipe of --config, which overrides the defaults of config.py.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence

import tyro

from fastssl.arguments import data_first
from fastssl.config import Config
from fastssl.launch import launch_if_asked
from fastssl.recipe import load_recipe, option_types, to_yaml

# The reference projects' flags that stand for several of ours. Flags that only differ in name are aliases in config.py.
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
    # the small-model project has only the contrastive loss
    "--moco-t": ["--contrast-weight", "1", "--align-weight", "0", "--uniform-weight", "0", "--temperature"],
    "--schedule": ["--milestones"],
}
LISTS = {  # tests of their items, since the word after the last item may be the data set
    "--milestones": str.isdecimal,
    "--policy-set": lambda word: word.partition("=")[0].isidentifier() and "=" in word,
}


def translate_reference_flags(argv: Sequence[str]) -> list[str]:
    """The same command line with the reference projects' own flags replaced by ours."""
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--") else [word]
    switches, heads = REFERENCE_SWITCHES, typing.get_args(option_types()["head"])
    if "--cj" in words and "--policy" not in words:  # the small-model README adds --aug-plus, which its code ignores
        switches = switches | {"--cj": ["--policy", "small", "--cj"], "--aug-plus": []}
    result: list[str] = []
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word == "--mlp":  # a switch in one project, takes a head's name in the other
            result += ["--head"] if following in (*heads, "none") else ["--head", "simple"]
        elif word == "none" and words[i - 1 : i] == ["--mlp"]:  # there any unknown name leaves the linear head
            result += ["linear"]
        elif word in ("--compile", "--channels-last") and following in ("auto", "on", "off", "graphs"):
            result += [word]
        elif word in switches:
            result += switches[word]
        elif word in REFERENCE_VALUES:
            result += REFERENCE_VALUES[word]
        else:
            result += [word]
    return result


def join_starts(words: list[str]) -> list[str]:
    """The same command line with --resume auto behind --resume PATH, where scripts add it, as --resume auto:PATH."""
    places = [i + 1 for i, word in enumerate(words[:-1]) if word == "--resume"]
    paths = [words[i].removeprefix("auto:") for i in places if words[i] not in ("no", "", "auto")]
    if paths and words[places[-1]] == "auto":
        words[places[-1]] = f"auto:{paths[-1]}"
    return words


def parse_or_launch(argv: Sequence[str]) -> Config:
    """The configuration of `fastssl pretrain`; becomes torchrun when the command line asks for it."""
    return parse(launch_if_asked(argv, "fastssl.train", Config().train.batch_size))


def parse(argv: Sequence[str], program: str = "fastssl pretrain", description: str | None = None) -> Config:
    """The configuration of a command line. `--print-config` prints it as a recipe and exits.

    program, description: for --help; by default those of `fastssl pretrain`.
    """
    usage = f"{program} DATA [flags]"  # not the two flags of this parser alone
    first = argparse.ArgumentParser(prog=program, usage=usage, add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="RECIPE")
    first.add_argument("--print-config", action="store_true")
    own, rest = first.parse_known_args(list(argv))
    default = Config() if own.config is None else load_recipe(own.config)
    config = tyro.cli(
        Config,
        prog=program,
        description=description,
        args=data_first(join_starts(translate_reference_flags(rest)), LISTS),
        default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    if own.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config
