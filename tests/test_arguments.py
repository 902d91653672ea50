"""A list's flag takes what can be its item: the data set's place may follow it, as on the references' command lines."""

import pytest

from fastssl.arguments import ListParser
from fastssl.eval.linear import make_linear_parser
from fastssl.flags import parse
from fastssl.launch import split_launch_flags


@pytest.mark.parametrize(
    ("line", "milestones", "policy_set"),
    [
        ("--policy-set solarise_p=0.2 blur_sigma=0.1,1 DATA", (120, 160), ("solarise_p=0.2", "blur_sigma=0.1,1")),
        ("--milestones 3 5 DATA --epochs 9", (3, 5), ()),
        ("--schedule 3 5 DATA --policy-set flip_p=0", (3, 5), ("flip_p=0",)),
        ("DATA --schedule --epochs 9", (), ()),
        ("--policy-set flip_p=0 -- DATA", (120, 160), ("flip_p=0",)),
        ("--policy-set flipp DATA", (120, 160), ("flipp",)),  # misspelt: named when the policy is made
    ],
)
def test_the_data_set_may_follow_a_list(line, milestones, policy_set):
    config = parse(line.split())
    assert config.data == "DATA"
    assert (config.optim.milestones, config.augment.policy_set) == (milestones, policy_set)


def test_gpus_end_where_no_number_follows(monkeypatch):
    flags, rest = split_launch_flags("--gpus 0 1 DATA --epochs 3".split())
    assert flags.gpus == [0, 1] and rest == ["DATA", "--epochs", "3"]


def test_evaluations_too():
    options = make_linear_parser().parse_args("--schedule 60 80 DIR".split())
    assert (options.data, options.schedule) == ("DIR", [60, 80])


def test_lists_of_choices_end_and_what_is_misspelt_is_named(capsys):
    parser = ListParser()
    parser.add_argument("data")
    parser.add_argument("--loader", nargs="+", choices=("folder", "beton"))
    parser.add_argument("--dim", nargs="*", type=int, choices=(64, 128))
    options = parser.parse_args("--loader beton folder --dim 64 128 DATA".split())
    assert (options.data, options.loader, options.dim) == ("DATA", ["beton", "folder"], [64, 128])
    for line in ("--loader betn DATA", "DATA --dim 65"):
        with pytest.raises(SystemExit):
            parser.parse_args(line.split())
        assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, number", [("--seed", 2**63), ("--seed", -(2**63) - 1), ("-b", 2**63), ("--workers", 2**63)]
)
def test_a_number_beyond_64_bits_is_refused_before_anything_is_read(flag, number, capsys):
    parser = make_linear_parser()
    assert parser.parse_args(["DIR", "--seed", str(-(2**63))]).seed == -(2**63)
    with pytest.raises(SystemExit):
        parser.parse_args(["DIR", flag, str(number)])
    error = capsys.readouterr().err
    assert flag in error and f"must fit into 64 bits, got {number}" in error
