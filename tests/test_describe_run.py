"""What a run says before its first step."""

import math

import pytest
import torch

from fastssl.build import make_trainee
from fastssl.config import Config, replace
from fastssl.describe_run import describe, describe_loss
from fastssl.distributed import Ranks
from fastssl.kernels.reference import contrast_reference
from fastssl.losses import LossConfig
from fastssl.plan import make_plan

CPU = Ranks(0, 1, torch.device("cpu"))


class Loader:
    """What `describe` asks of one."""

    notices = ("passed over 1 file of a kind that is not read",)

    def __init__(self, num_images):
        self.num_images, self.class_names, self.name, self.reason = num_images, ["a", "b"], "folder", "asked for"


def lines_of(num_images, **options):
    options = {"arch": "resnet18", "queue_size": 16, "dim": 8, "batch_size": 4, **options}
    config = replace(Config(), device="cpu", channels_last="on", **options)
    return describe(config, make_plan(config, 1), Loader(num_images), make_trainee(config, CPU), CPU)


def test_the_loss_the_policy_and_the_optimiser_are_named():
    notice, images, model, machine, loss, how = lines_of(16, policy="v2", cj=None, align_weight=2)
    assert notice == Loader.notices[0]
    assert images == "16 images in 2 classes; loader folder (asked for)"
    assert model.startswith("resnet18, linear head, 11.2 M weights; batch size 4, 1 step per epoch, 200 in all")
    assert machine.startswith("1 x cpu, ") and "channels_last (requested)" in machine
    assert loss == "loss 2 align (alpha 2) + 1 uniform (t 3); loss kernel tiled (no CUDA device)"
    assert how.startswith("augmentation policy v2; augmentation kernel ")


def test_every_term_of_a_loss():
    mix = LossConfig(contrast_weight=0.5, temperature=0.1, align_alpha=1.5, uniform_t=2, intra_batch=False)
    assert describe_loss(mix, 65536) == (
        "0.5 contrast (temperature 0.1; by chance 11.09) + 3 align (alpha 1.5) + "
        "1 uniform (t 2, without the pairs of a batch)"
    )
    assert describe_loss(LossConfig(contrast_weight=1, align_weight=0, uniform_weight=0), 99).count("+") == 0


def test_by_chance_is_the_loss_of_rows_that_are_all_the_same():
    rows = torch.nn.functional.normalize(torch.ones(100, 8), dim=1)
    assert contrast_reference(rows[:4], rows[:4], rows, 0.07)[0].item() == pytest.approx(math.log(101), abs=1e-4)


@pytest.mark.parametrize(("images", "older"), [(15, 2), (16, None), (5, 4)])
def test_a_queue_that_holds_keys_of_the_query_itself(images, older):
    said = [line for line in lines_of(images) if "as negatives" in line]
    assert len(said) == (older is not None)
    if older:
        assert f"the queue holds 16 keys of {images} images, so an image meets up to {older} older keys" in said[0]
