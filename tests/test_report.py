"""The tables in the pages are those of the JSON under benchmarks/."""

import json

import pytest

from fastssl.bench import report


def test_the_pages_show_what_was_measured():
    report.main(["--check"])


def test_a_table_is_made_from_the_json(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    environment = {"gpus": [], "threads": 1, "cpu": "Z80", "command": ["x.py", "loss"], "torch": "2", "commit": "abc"}
    timing = {"median": 0.5, "low": 0.25, "high": 1.0, "rounds": 3}
    line = {
        "settings": {"arch": "resnet18", "batch_size": 10},
        "seconds_per_step": {"step": timing, "eager step": timing},
    }
    result = {"environment": environment | {"started": "2026-01-02T03"}, "lines": [line]}
    (tmp_path / "benchmarks" / "step-cpu.json").write_text(json.dumps(result))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: step-cpu.json -->\nold\n<!-- end of table -->\nafter\n")
    with pytest.raises(SystemExit):
        report.main(["--check"])
    report.main([])
    text = page.read_text()
    assert "| resnet18 | step | 20 (10 to 40) | 1.00 |" in text and "Z80" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end of table -->\nafter\n")
    report.main(["--check"])


def test_a_table_without_its_json_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"table of .*loss-x\.json, which does not exist"):
        report.fill("<!-- table: loss-x.json -->\n<!-- end of table -->")
