"""The benchmark of conversion: rates that add up, and rounds that stay when it is cut short."""

import json

import pytest

from bench_throughput import main
from fastssl.bench import convert
from fastssl.bench.convert import as_result


def test_rates_are_of_the_median_and_shares_of_the_work_alone():
    found = as_result({convert.ALONE: [1.0, 2.0, 3.0], "short side 256": [4.0, 4.0, 4.0]}, {"images": 12, "workers": 1})
    alone, short = found["lines"]
    assert (alone["images_per_s"], alone["share_of_alone"]) == (6, 1) and alone["low"] < 6 < alone["high"]
    assert (short["images_per_s"], short["share_of_alone"]) == (3, 0.5) and found["rounds"] == 3


def test_ctrl_c_in_the_second_round_keeps_the_first(tmp_path, monkeypatch, capsys, make_image_folder):
    calls, write = [], convert.write_beton

    def interrupted(*given, **options):
        calls.append(given)
        if len(calls) == 2 * 3:  # two that warm up, then two in a round
            raise KeyboardInterrupt
        return write(*given, **options)

    monkeypatch.setattr(convert, "write_beton", interrupted)
    images, output = make_image_folder(tmp_path / "images", {"train": 4}), tmp_path / "convert.json"
    flags = ["--copies", "1", "--workers", "1", "--scratch", str(tmp_path), "--output", str(output)]
    with pytest.raises(KeyboardInterrupt):
        main(["convert", str(images), *flags])
    result = json.loads(output.read_text())
    assert result["rounds"] == 1 and [line["what"] for line in result["lines"]][1:] == ["short side 256", "originals"]
    assert "verdict: short side 256 runs at" in capsys.readouterr().out
