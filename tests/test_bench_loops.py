"""The step and whole-loop benchmarks run, and their verdict follows from what they measured."""

import json

import pytest

from bench_throughput import main
from fastssl.bench.timing import Timing
from fastssl.bench.whole_loop import verdict

TINY = "--image-size 32 --batch-size 8 --queue-size 40 --steps 2 --rounds 2 --device cpu --compile off".split()


def test_step(tmp_path, capsys):
    main(["step", "--arch", "resnet18", *TINY, "--output", str(tmp_path / "step.json")])
    line = json.loads((tmp_path / "step.json").read_text())["lines"][0]
    assert set(line["seconds_per_step"]) == {"step", "eager step"}
    assert all(timing["rounds"] == 2 and timing["median"] > 0 for timing in line["seconds_per_step"].values())
    assert line["settings"]["image_size"] == 32
    assert "pairs/s" in capsys.readouterr().out


def test_whole_loop_over_a_folder(tmp_path, capsys, make_image_folder):
    data = make_image_folder(tmp_path / "images", {"train": 8})
    main(["all", "--data", str(data), *TINY, "--workers", "0", "--output", str(tmp_path / "all.json")])
    line = json.loads((tmp_path / "all.json").read_text())["lines"][0]
    assert set(line["seconds_per_step"]) == {"step", "all", "loader alone", "classical", "classical, AMP"}
    assert line["verdict"].startswith("bound by")
    assert line["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "step, loop, loader, expected",
    [(1.0, 1.04, 0.5, "bound by the step"), (1.0, 3.0, 3.0, "bound by the loader"), (1.0, 1.5, 0.6, "by the cores")],
)
def test_the_verdict_names_what_is_slow(step, loop, loader, expected):
    seconds = {"step": step, "all": loop, "loader alone": loader}
    assert expected in verdict({name: Timing(s, s, s, 1) for name, s in seconds.items()})
