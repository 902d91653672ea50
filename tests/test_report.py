"""The tables in the pages are those of the JSON under benchmarks/."""

import json

import pytest

from fastssl.bench import report, tables


def test_the_pages_show_what_was_measured():
    report.main(["--check"])


def test_a_table_is_made_from_the_json(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    environment = {"gpus": [], "threads": 1, "cpu": "Z80", "command": ["x.py", "a b"], "torch": "2", "commit": "abc"}
    line = {
        "settings": {"arch": "resnet18", "image_size": 32, "batch_size": 10, "compile": "off"},
        "beside": "classical",
        "seconds_of_rounds": {"all": [0.25, 0.5, 1.0], "classical": [0.5, 1.0, 2.0]},
        "not_measured": {"DALI": "not installed"},
    }
    result = {"environment": environment | {"started": "2026-01-02T03"}, "lines": [line]}
    (tmp_path / "benchmarks" / "peers-cpu.json").write_text(json.dumps(result))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: peers-cpu.json -->\nold\n<!-- end of table -->\nafter\n")
    with pytest.raises(SystemExit):
        report.main(["--check"])
    report.main([])
    text = page.read_text()
    assert "| resnet18 | all | 20 (11.1 to 33.3) | 2 (2 to 2) |" in text and "Z80" in text and "old" not in text
    assert "| resnet18 | DALI | not measured | not installed |" in text
    assert "`python x.py 'a b'` on" in text  # as a shell takes it
    assert text.startswith("before\n") and text.endswith("<!-- end of table -->\nafter\n")
    report.main(["--check"])


def test_a_table_without_its_json_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"table of .*loss-x\.json, which does not exist"):
        report.fill("<!-- table: loss-x.json -->\n<!-- end of table -->")


def test_the_step_table_says_what_was_not_measured():
    parts = {"augmentation": 1.0, "encoder_k": 1.0, "encoder_q": 1.0, "loss": 0.5, "optimiser + EMA + queue": 0.5}
    line = {
        "settings": {"arch": "resnet18", "image_size": 32, "batch_size": 10},
        "beside": "step",
        "seconds_of_rounds": {"step": [2.0, 2.0]},
        "parts": parts,
        "floor": {"arithmetic_seconds": 1.0, "memory_seconds": 0.5},
    }
    row = tables.step_table({"lines": [line]}).splitlines()[-1]
    middle = "| 5 (5 to 5) | not measured | not measured | 25% | 50% | 12% | 12% | 50% | 25% |"
    assert row == f"| resnet18 | 32 | 10 {middle}"
    line |= {"beside": "eager step", "seconds_of_rounds": {"step": [2.0], "eager step": [4.0]}}
    assert "| 2.5 (2.5 to 2.5) | 2 (2 to 2) |" in tables.step_table({"lines": [line]})


def test_the_loader_table_does_without_the_bare_decoder():
    timing = {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}
    line = {"cpu_ms_per_pair": timing, "pairs_per_second": timing, "first_batch_seconds": 0.5}
    row = tables.loader_table({"loaders": {"ours, beton": line}}).splitlines()[-1]
    assert row == "| ours, beton | 2.000 (1.000 to 3.000) | 2 | not measured | 0.50 |"


def test_the_index_lists_every_result():
    index = report.index_table()
    assert all(f"[{path.name}]" in index for path in (report.ROOT / "benchmarks").glob("*.json"))
