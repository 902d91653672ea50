"""The recipes: each trains its own architecture, each says where it comes from."""

import os
import re
import subprocess
import sys

import pytest

from fastssl.cli import main
from fastssl.commands.recipes import header
from fastssl.config import replace
from fastssl.flags import parse
from fastssl.recipe import RECIPES, load_recipe
from fastssl.train import pretrain

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_every_recipe(name, tmp_path):
    recipe = load_recipe(name)
    tiny = {"batch_size": 8, "queue_size": 24, "image_size": 32, "bn_splits": min(recipe.model.bn_splits, 2)}
    config = replace(
        recipe,
        **tiny,
        loader="synthetic",
        synthetic_images=16,
        synthetic_size=40,
        steps=3,
        knn_every=0,
        channels_last="on",  # measuring it takes longer than the steps
        device="cpu",
        output=str(tmp_path / "run"),
    )
    assert pretrain(config) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"step": 3' in lines[-1] and "NaN" not in lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_holds_the_command_and_the_status_of_its_accuracy(name):
    text = " ".join(header(RECIPES / f"{name}.yaml"))
    assert f"--config {name}" in text
    if name != "smoke":
        assert "Source:" in text and re.search(r"Accuracy.*(published|measured)", text) and "Cost: " in text


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_the_header_are_understood(name):
    lines = [line for line in header(RECIPES / f"{name}.yaml") if f"--config {name}" in line]
    assert lines
    for line in lines:
        _, found, flags = line.partition(" -m fastssl.train " if line.startswith("torchrun") else "fastssl pretrain ")
        assert found and parse(flags.split()).model.arch == load_recipe(name).model.arch


def test_every_small_architecture_has_a_recipe_and_its_distilled_start():
    small = {"resnet18", "mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0", "deit_tiny"}
    found = {name: "\n".join(header(RECIPES / f"{name}.yaml")) for name in small}
    assert all(load_recipe(name).model.arch == name for name in small)
    assert all(f"--config {name} --resume STUDENT.pth.tar --restart" in text for name, text in found.items())


def test_the_list_names_every_recipe_and_prints_one(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name}  +\S", listed, re.MULTILINE) for name in NAMES)
    assert main(["recipes", "smoke"]) == 0
    assert capsys.readouterr().out == (RECIPES / "smoke.yaml").read_text()
    assert main(["recipes", "resnet81"]) == 1
    assert "did you mean 'resnet18'" in capsys.readouterr().err


def test_a_recipe_is_printed_from_utf8_whatever_the_locale(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# gr\u00f6\u00dfer\n", "utf-8")
    code = (  # without the options of a run, which import torch
        "import sys, types, pathlib as p; recipe = types.SimpleNamespace(RECIPES=None, find_recipe=p.Path)\n"
        "sys.modules['fastssl.recipe'] = recipe; from fastssl.commands.recipes import main; main(sys.argv[1:])"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code, recipe], env=os.environ | plain, capture_output=True, check=True)
    assert done.stdout == recipe.read_bytes()
