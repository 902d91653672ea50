"""What the trial of CUDA graphs compiled is what the training runs: nothing is compiled, or recorded, a second time."""

import warnings

import pytest
import torch
from ranks import run_ranks

from fastssl.build import make_trainee, open_loader, open_policy, wrap_ddp
from fastssl.config import Config, replace
from fastssl.distributed import Ranks
from fastssl.health import Health
from fastssl.plan import make_plan
from fastssl.train import make_train_step
from fastssl.trials import compile_encoders
from fastssl.trials.compile_encoders import try_compiled

SMALL = {"image_size": 32, "batch_size": 8, "queue_size": 16, "dim": 8, "epochs": 1, "device": "cpu"}
SYNTHETIC = {"loader": "synthetic", "synthetic_images": 16}


def compile_and_train(rank, world_size, **settings):
    """(graphs compiled by the trial, by two steps of training after it, inputs that move from step to step)."""
    graphs = []
    torch.compiler.reset()  # an earlier test may have compiled these layers for batches of several sizes

    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    def set_compiled(moco, how):
        for encoder in (moco.encoder_q, moco.encoder_k):
            encoder.compile(backend=backend)

    ranks = Ranks(rank, world_size, torch.device("cpu"))
    config = replace(Config(), **SMALL, **SYNTHETIC, **settings)
    trainee = make_trainee(config, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_encoders, "set_compiled", set_compiled)
        found = try_compiled("graphs", config, trainee.moco, ranks)[1]
    assert "failed" not in found, found
    tried = len(graphs)
    if world_size > 1:
        trainee = trainee._replace(encoder_q=wrap_ddp(trainee.moco.encoder_q, ranks.device))
    loader = open_loader(config, ranks)
    plan = make_plan(config, loader.batches_per_epoch)
    train_step = make_train_step(config, plan, trainee, open_policy(config), ranks, Health(ranks))
    for step, batch in zip(range(2), loader.batches()):
        train_step(batch, step)
    torch.compiler.reset()
    inputs = [node for graph in graphs for node in graph]
    moving = [n.name for n in inputs if not n.meta["tensor_dict"].get("_dynamo_static_input_type")]
    return tried, len(graphs) - tried, moving


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "resnet18", "precision": "fp32", "channels_last": "on"},
        {"arch": "mobilenetv3_small", "precision": "bf16", "channels_last": "off", "bn_splits": 2},
        {"arch": "deit_tiny", "precision": "bf16", "channels_last": "on"},
    ],
    ids=lambda settings: settings["arch"],
)
def test_training_runs_what_the_trial_compiled(settings):
    tried, again, moving = compile_and_train(0, 1, **settings)
    assert (tried, again) == (2, 0)
    # weights and buffers stay where they are, so that graphs may read them
    assert len(moving) == 2 and all("images" in name for name in moving)


def test_training_in_ddp_runs_what_the_trial_compiled():
    settings = {"arch": "resnet18", "precision": "fp32", "channels_last": "off"}
    for tried, again, _ in run_ranks(train_resnet, 2, settings):
        assert (tried, again) == (2, 0)


def train_resnet(rank, world_size, settings):
    warnings.simplefilter("default", DeprecationWarning)  # torch 2.11 gives one when it imports its compiler
    warnings.filterwarnings("default", "Guards may run slower on Python 3.13.0")  # as in conftest.py
    return compile_and_train(rank, world_size, **settings)
