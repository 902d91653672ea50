"""What is made of a result: verdicts that follow from the numbers, comparisons with the spread, plots, the suites."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench_throughput
from fastssl.bench import suite, timing
from fastssl.bench.compare import announce, compare, differing_machines, differing_options, judge
from fastssl.bench.device import open_device
from fastssl.bench.eval import take_turns
from fastssl.bench.loop_verdicts import ADVICE, all_verdict, peers_verdicts, shares, step_verdict
from fastssl.bench.loss import TERMS, dot_products
from fastssl.bench.pil_processes import in_processes
from fastssl.bench.report import machine
from fastssl.bench.results import Row, begun, read_result, rows, stage_of, write_result
from fastssl.bench.suite_entries import Sizes, cpu_entries, gpu_entries
from fastssl.bench.timing import Timing
from fastssl.bench.verdicts import RAW, VERDICTS, verdicts
from fastssl.command import FAILED, run_command
from fastssl.environment import environment
from fastssl.machine.precision import bf16_unit

ENVIRONMENT = {"gpus": [], "threads": 1, "cpu": "Z80", "cpus": 1, "command": ["x.py"], "torch": "2", "commit": "abc",
               "started": "2026-01-02T03"}  # fmt: skip


def loop_result(**rounds: list[float]) -> dict:
    settings = {"arch": "resnet18", "image_size": 64, "batch_size": 10, "compile": "off", "device": "cpu"}
    line = {"settings": settings, "beside": "eager step", "seconds_of_rounds": rounds}
    return {"environment": ENVIRONMENT, "lines": [line]}


def write(path, result: dict) -> str:
    path.write_text(json.dumps(result))
    return str(path)


@pytest.mark.parametrize(
    "share, spare, expected",
    [
        (0.96, 2.0, "bound by the step: the loop runs at 96% of the step's rate"),
        (0.3, 0.3, "bound by the loader, which even alone reaches only 30%"),
        (0.7, 1.7, "bound by the cores"),
        (
            0.8,
            50.0,
            "bound by the step: the loop runs at 80% of the step's rate, although the loader alone needs only 2.0%",
        ),
    ],
)
def test_the_verdict_of_all_names_what_is_slow(share, spare, expected):
    assert expected in all_verdict(share, spare)


def test_the_verdicts_of_all_compare_within_rounds():
    """A machine that slows down from round to round slows the step and the loop alike."""
    rounds = {"step": [1.0, 2.0, 3.0], "all, folder": [1.25, 2.5, 3.75], "loader alone, folder": [0.5, 1.0, 1.5]}
    (verdict,) = verdicts("all", loop_result(**rounds))
    assert "all, folder: bound by the cores" in verdict and "at 80% of the step" in verdict and "feed 2.0" in verdict


@pytest.mark.parametrize(
    "ms, said",
    [
        (0.14, "not bound by decoding these JPEGs: 'ours, beton' takes only 0.14 times"),  # a .beton of pixels
        (1.1, "bound by JPEG decoding: 'ours, beton' takes 1.10 times"),
        (2.0, "bound by the loader itself: 'ours, beton' reaches 50% of"),
    ],
)
def test_the_verdict_of_loader_compares_with_the_bare_decoder(ms, said):
    timings = {name: Timing(cpu, cpu, cpu, 3)._asdict() for name, cpu in {"ours, beton": ms, RAW: 1.0}.items()}
    loaders = {name: {"cpu_ms_per_pair": timing, "pairs_per_second": timing} for name, timing in timings.items()}
    (verdict,) = verdicts("loader", {"loaders": loaders, "options": {"threads": 2}})
    assert verdict.startswith(said)


@pytest.mark.parametrize("slow", ["augmentation", "encoder_q", "loss", "optimiser + EMA + queue"])
def test_the_verdict_of_a_step_names_its_largest_part(slow):
    parts = {"augmentation": 1.0, "encoder_k": 1.0, "encoder_q": 1.0, "loss": 1.0, "optimiser + EMA + queue": 1.0}
    line = {"settings": {"compile": "off", "device": "cpu"}, "parts": parts | {slow: 12.0}}
    line["seconds_of_rounds"] = {"step": [16.0]}
    expected = "encoders" if slow == "encoder_q" else slow
    assert step_verdict(line).startswith(f"bound by the {expected}, ") and ADVICE[expected] in step_verdict(line)
    compiled = line | {"settings": {"compile": "auto", "device": "cuda"}}
    assert "--compile" not in step_verdict(compiled)
    on_gpu = {"settings": line["settings"] | {"device": "cuda"}}
    assert "GPU" not in step_verdict(line | on_gpu), "that is where it is"
    assert sum(shares(parts).values()) == pytest.approx(1) and shares(parts)["encoders"] == pytest.approx(0.4)


def test_the_verdict_of_a_step_says_when_its_parts_do_not_explain_it():
    line = {"settings": {"compile": "auto"}, "parts": {"encoder_q": 0.8, "loss": 0.2}}
    short, long = (step_verdict(line | {"seconds_of_rounds": {"step": [seconds]}}) for seconds in (1.5, 10.0))
    assert short.startswith("bound by the encoders, 80% of the step")
    assert long == "bound by the time between its parts, which take 10% of it by themselves: try --profile"


def test_the_verdict_of_a_step_says_when_the_host_is_what_it_waits_for():
    line = {
        "settings": {"compile": "auto"},
        "parts": {"encoder_q": 1.0},
        "seconds_of_rounds": {"step": [1.0, 3.0, 2.0]},
    }
    assert step_verdict(line | {"host_seconds": 1.0}).startswith("bound by the encoders")
    said = step_verdict(line | {"host_seconds": 1.8})
    assert said.startswith("bound by the host, which takes 90% of the step") and "--compile graphs" in said
    assert "graphs" not in step_verdict(line | {"host_seconds": 1.8, "settings": {"compile": "graphs"}})
    slower = {"compiled": "on", "why_compiled": "measured at the start: eager 2 ms, CUDA graphs 3 ms"}
    assert "graphs" not in step_verdict(line | {"host_seconds": 1.8} | slower)


@pytest.mark.parametrize(
    "arithmetic, memory, said",
    [(1.0, 0.5, "arithmetic, is 50%"), (3.0, 0.5, "arithmetic, is 150%"), (1.0, 3.0, "memory traffic, is 150%")],
)
def test_the_verdict_of_a_step_names_its_floor_and_how_it_can_be_beaten(arithmetic, memory, said):
    line = {"settings": {"compile": "auto"}, "parts": {"encoder_q": 1.0}, "seconds_of_rounds": {"step": [2.0]}}
    line["floor"] = {"arithmetic_seconds": arithmetic, "memory_seconds": memory}
    verdict = step_verdict(line)
    assert f"the floor, set by {said} of its time" in verdict and ("by Winograd" in verdict) == (arithmetic > 2)


@pytest.mark.parametrize("terms, sums", [("all", 2), ("align-uniform", 1), ("contrast", 1)])
def test_the_floor_of_a_loss_counts_the_products_that_it_needs(terms, sums):
    q, queue = torch.randn(6, 4), torch.randn(10, 4)
    with FlopCounterMode(display=False) as counter:
        weights = q @ queue.T
        for _ in range(sums):
            weights @ queue
        if terms != "contrast":
            (q @ q.T) @ q
    assert 2 * 4 * dot_products(6, 10, TERMS[terms]) == counter.get_total_flops()


def test_the_verdict_of_augment_is_of_whole_policies():
    medians = {"ours, reference": 9.0, "ours, triton": 1.0, "DALI": 5.0}
    medians |= {"ours, its part": 0.4, "triton-augment, its part": 1.5}
    timings = {name: Timing(ms, ms, ms, 3)._asdict() for name, ms in medians.items()}
    (verdict,) = verdicts("augment", {"copy": 1.0, "lines": [{"size": 224, "bytes": 1, "seconds": timings}]})
    assert verdict.startswith("views of 224 pixels: 'ours, triton' is 5.0 times as fast as 'DALI'; bound by")
    assert verdict.endswith("try smaller images or views")


@pytest.mark.parametrize(
    "one, said",
    [(2.0, "0.5 times as long as one setting: train them together"), (0.05, "20.0 times as long as one setting")],
)
def test_the_verdict_of_a_sweep_is_of_twelve_settings_beside_one(one, said):
    timings = {"one setting": Timing(one, one, one, 3)._asdict(), "12 settings": Timing(1.0, 1.0, 1.0, 3)._asdict()}
    assert verdicts("eval", {"lines": [{"what": "sweep", "seconds": timings}]}) == [f"sweep: 12 settings take {said}"]


@pytest.mark.parametrize("ours, word", [(0.5, "faster"), (2.0, "slower"), (1.0, "within the noise")])
def test_the_verdict_of_peers_looks_at_the_fastest_other_within_each_round(ours, word):
    others = {"DALI": [1.0, 5.0, 2.0], "classical": [3.0, 15.0, 6.0]}
    rounds = {"ours, beton": [ours * t for t in others["DALI"]], **others}
    line = loop_result()["lines"][0] | {
        "beside": "classical",
        "seconds_of_rounds": rounds,
        "not_measured": {"FFCV": "x"},
    }
    (verdict,) = peers_verdicts({"lines": [line]})
    assert f"the fastest other, 'DALI' ({word}), and at" in verdict and verdict.endswith("not measured: FFCV")
    line["seconds_of_rounds"] = {name: seconds[:1] for name, seconds in rounds.items()}
    (verdict,) = peers_verdicts({"lines": [line]})
    assert "'DALI' (too few rounds to judge: 1)" in verdict


@pytest.mark.parametrize(
    "old, new, word",
    [
        ((10, 9, 11), (20, 18, 22), "faster"),
        ((10, 9, 11), (5, 4, 6), "slower"),
        ((10, 5, 15), (12, 11, 13), "within the noise"),
    ],
)
def test_a_difference_counts_only_beyond_both_spreads(old, new, word):
    before, after = (Row("g", "n", Timing(*value, 5), "pairs/s", True) for value in (old, new))
    assert judge(before, after) == (new[0] / old[0], word)
    inverse = {"faster": "slower", "slower": "faster"}.get(word, word)
    before, after = (row._replace(unit="ms", higher_is_better=False) for row in (before, after))
    assert judge(before, after) == (old[0] / new[0], inverse)
    once = after._replace(value=after.value._replace(rounds=1))  # whose spread is none
    assert judge(before, once)[1] == judge(once, before)[1] == "with too few rounds to judge (1)"


def test_rows_that_only_one_result_has_are_named():
    row = Row("g", "n", Timing(1, 1, 1, 1), "ms", False)
    lines, slower = compare([row, row._replace(name="gone")], [row, row._replace(name="new")])
    assert lines[1:] == ["only in the old result: g: gone", "only in the new result: g: new"] and not slower
    with pytest.raises(ValueError, match="no row to compare: the old result has g; the new one has other"):
        compare([row], [row._replace(group="other")])
    assert "cpu Z80 -> 6502" in differing_machines(ENVIRONMENT, ENVIRONMENT | {"cpu": "6502"})


def test_results_of_other_options_are_no_regression():
    old, new = loop_result(step=[1.0]), loop_result(step=[1.0])
    assert differing_options(old, new) is None
    old["lines"][0] |= {"images": "somewhere/PHOTOS"}
    new["lines"][0] |= {"images": "elsewhere/PHOTOS", "settings": old["lines"][0]["settings"] | {"precision": "fp32"}}
    assert differing_options(old, new).endswith(": resnet18 precision default -> fp32")
    sizes = {"environment": ENVIRONMENT, "options": {"folder": "a/x", "threads": 1}, "loaders": {}}
    changed = differing_options(sizes, sizes | {"options": {"folder": "b/y", "threads": 2}})
    assert changed.endswith(": folder x -> y, threads 1 -> 2")
    batch = {"environment": ENVIRONMENT, "policy": "v2", "batch_size": 32, "copy": 1.5, "lines": []}
    assert differing_options(batch, batch | {"copy": 2.5, "short_side": 256}) is None  # of before that was recorded
    assert differing_options(batch, batch | {"batch_size": 8}).endswith(": batch_size 32 -> 8")


@pytest.mark.parametrize("seconds", [[], [0.0], ["1"], None])
def test_a_damaged_result_is_one_sentence(seconds):
    with pytest.raises(ValueError, match="old is not a result of the stage 'all'"):
        rows("all", loop_result(step=seconds), "old")


def test_cpus_of_one_name_and_other_instructions_are_other_machines():
    narrow, wide = (ENVIRONMENT | {"cpu_instructions": found} for found in ("AVX2", "AVX512 and AVX512-BF16"))
    assert "cpu_instructions AVX2 -> AVX512 and AVX512-BF16" in differing_machines(narrow, wide)
    assert differing_machines(ENVIRONMENT, wide) is None  # results of before they were recorded
    assert machine(narrow) == "1 CPU thread (Z80, AVX2)" and machine(ENVIRONMENT) == "1 CPU thread (Z80)"
    found = environment()["cpu_instructions"]
    assert found.startswith(torch.backends.cpu.get_cpu_capability()) and found.endswith(bf16_unit())


def test_every_stage_reports_and_compares(tmp_path, monkeypatch, capsys):
    """The options all stages share, with a stage whose measurements are given."""

    class Stage:
        seconds = 1.0

        def main(self, argv):
            write(
                tmp_path / argv[argv.index("--output") + 1],
                loop_result(step=[self.seconds] * 3, **{"eager step": [2.0] * 3}),
            )

    stage, imported = Stage(), bench_throughput.import_module
    monkeypatch.setattr(
        bench_throughput, "import_module", lambda name: stage if name == "fastssl.bench.whole_loop" else imported(name)
    )
    old = tmp_path / "old" / "all.json"
    assert bench_throughput.main(["all", "--report", str(old.parent), "--seconds", "9"]) == 0
    assert {path.name for path in old.parent.iterdir()} == {"all.json", "all.md", "all.png"}
    assert old.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "Z80" in old.with_suffix(".md").read_text()
    stage.seconds = 3.0
    assert bench_throughput.main(["all", "--compare", str(old)]) == 1
    assert "step: 0.33 times as fast, slower" in capsys.readouterr().out
    written = json.loads(old.read_text())
    written["lines"][0]["settings"]["queue_size"] = 1
    assert bench_throughput.main(["all", "--compare", write(tmp_path / "small.json", written)]) == 0
    assert "measured with other options" in capsys.readouterr().out
    stage.seconds = 0.5
    assert bench_throughput.main(["all", "--compare", str(old)]) == 0
    with pytest.raises(ValueError, match=r"missing\.json is not a result"):
        bench_throughput.main(["all", "--compare", str(tmp_path / "missing.json")])
    write(tmp_path / "other.json", {"environment": ENVIRONMENT, "lines": [{"what": "knn"}]})
    monkeypatch.setattr(Stage, "main", lambda *_: pytest.fail("it measured before it looked at the old result"))
    with pytest.raises(ValueError, match=r"other\.json is not a result of the stage 'all': it lacks 'settings'"):
        bench_throughput.main(["all", "--compare", str(tmp_path / "other.json")])
    with pytest.raises(ValueError, match="old is a folder: give --output a file, or use --report"):
        bench_throughput.main(["all", "--output", str(old.parent)])
    with pytest.raises(SystemExit):
        bench_throughput.main(["all", "--report", str(tmp_path), "--output", str(tmp_path / "x.json")])
    assert "--output: not allowed with argument --report" in capsys.readouterr().err


RESULTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "stage, old",
    [("eval", "loss-cpu-1-thread"), ("loss", "eval-cpu"), ("augment", "loss-cpu-1-thread"), ("step", "peers-cpu"),
     ("peers", "step-cpu"), ("loader", "all-cpu"), ("convert", "eval-cpu"), ("all", "suite-cpu")],
)  # fmt: skip
def test_a_result_of_another_stage_is_refused_before_anything_is_measured(monkeypatch, stage, old):
    monkeypatch.setitem(bench_throughput.STAGES, stage, "not imported, since nothing is measured")
    with pytest.raises(ValueError, match=rf"{old}\.json is not a result of the stage '{stage}': it lacks '"):
        bench_throughput.main([stage, "--compare", str(RESULTS / f"{old}.json")])


@pytest.mark.parametrize(
    "old, options",
    [("eval-cpu", "--what knn --bank 99 --queries 9 -k 3"), ("loss-cpu-1-thread", "--num 4"), ("step-cpu", ""),
     ("augment-v2-photos-1-thread", "--size 16 --batch-size 2"), ("peers-cpu", ""), ("all-cpu", "")],
)  # fmt: skip
def test_a_result_without_a_row_to_compare_is_refused_before_anything_is_measured(tmp_path, monkeypatch, old, options):
    stage, output = stage_of(Path(old)), tmp_path / "x.json"
    if stage in ("step", "peers", "all"):
        options = "--arch deit_tiny --device cpu"
    monkeypatch.setattr(timing, "turns", lambda rounds: pytest.fail("it measures"))
    with pytest.raises(ValueError, match=r"no row to compare: the old result has .*; the new one has .*: use the same"):
        bench_throughput.main([stage, *options.split(), "--compare", f"{RESULTS / old}.json", "--output", str(output)])


def test_what_will_differ_from_the_old_result_is_said_before_anything_is_measured(monkeypatch, capsys):
    old = read_result(RESULTS / "all-cpu.json")
    monkeypatch.setattr("fastssl.bench.compare._old", old)
    (line,) = ({key: line[key] for key in ("settings", "images")} for line in old["lines"])
    monkeypatch.setattr("fastssl.bench.compare.environment", lambda: old["environment"])
    announce({"lines": [line]})
    assert capsys.readouterr().out == ""
    announce({"lines": [line | {"settings": line["settings"] | {"queue_size": 7}}]})
    said = capsys.readouterr().out
    assert said == ("measured with other options, so slower need not be a regression: resnet18 queue_size 65536 -> 7\n")


def test_a_process_of_torchvisions_that_ends_is_one_sentence():
    views = in_processes(["image"], os._exit, 1)
    with pytest.raises(ValueError, match="a process with torchvision's views has ended"):
        views()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_published_results_can_be_compared_with(path):
    stage = stage_of(path)
    assert stage == "suite" or rows(stage, read_result(path))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no files")
@pytest.mark.parametrize("name, value", [("--output", "/proc/self/x.json"), ("--report", "/proc/self")])
def test_a_place_that_takes_no_result_is_refused_before_anything_is_measured(monkeypatch, name, value):
    monkeypatch.setitem(bench_throughput.STAGES, "all", "not imported, since nothing is measured")
    refusal = rf"{name} /proc/self/\w+\.json cannot be written \(.*\): choose another place"
    with pytest.raises(ValueError, match=refusal):
        bench_throughput.main(["all", name, value])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no files")
def test_a_suite_asks_for_its_folder_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(suite, "open_data", lambda *_: pytest.fail("it makes the images"))
    with pytest.raises(
        ValueError, match=r"--report /proc/self/suite-cpu\.json cannot be written \(.*\): choose another"
    ):
        suite.main(["--suite", "cpu", "--report", "/proc/self"])


@pytest.mark.parametrize("option", ["--report", "--rep", "--output", "--out"])
def test_what_was_measured_before_ctrl_c_is_judged_and_kept(tmp_path, monkeypatch, capsys, option):
    class Stage:
        def main(self, argv):
            write(Path(argv[argv.index("--output") + 1]), loop_result(step=[1.0], **{"eager step": [2.0]}))
            raise KeyboardInterrupt

    imported = bench_throughput.import_module
    monkeypatch.setattr(
        bench_throughput,
        "import_module",
        lambda name: Stage() if name == "fastssl.bench.whole_loop" else imported(name),
    )
    report = option.startswith("--rep")
    monkeypatch.setitem(VERDICTS, "all", lambda result: ["a verdict"])
    with pytest.raises(KeyboardInterrupt):
        bench_throughput.main(["all", option, str(tmp_path / "new" / ("" if report else "all.json"))])
    files = ["all.json", "all.md", "all.png"] if report else ["all.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == files
    assert "verdict: a verdict" in capsys.readouterr().out


def test_one_of_several_processes_measures_nothing(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(bench_throughput.STAGES, "loss", "not imported, since nothing is measured")
    for words in (["loss"], ["--suite", "cpu"]):
        with pytest.raises(ValueError, match="a benchmark is of a single process: start it without torchrun"):
            bench_throughput.main(words)


def test_help_is_help_and_a_stage_that_there_is_not_is_named(capsys):
    assert bench_throughput.main(["--help"]) == 0 and "usage: python bench" in capsys.readouterr().out
    assert bench_throughput.main(["stp"]) == 2
    assert "there is no stage 'stp': did you mean 'step'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["loss", "augment", "step"])
def test_a_gpu_that_there_is_not_is_one_sentence(stage):
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU; run `fastssl doctor`"):
        bench_throughput.main([stage, "--device", "cuda"])


def test_the_gpu_that_is_measured_is_the_current_one(monkeypatch):
    """Graphs are captured on the current device: on another one they would be empty, and their replays take no time."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [str(open_device(name)) for name in ("cuda:1", "cuda", "cpu")] == ["cuda:1", "cuda", "cpu"]
    assert chosen == [1, 0]
    with pytest.raises(ValueError, match="--device cuda:2: torch finds 2 GPUs, the last of them cuda:1"):
        open_device("cuda:2")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"--device {name}: .*use cpu, cuda or cuda:N"):
            open_device(name)


def test_bad_input_of_a_stage_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, sentence in [
        (["loss", "--compare", "nowhere.json"], "nowhere.json is not a result of bench_throughput.py"),
        (["eval", "--bank", "9", "-k", "11"], "-k 11 must not exceed the number of training features, --bank 9"),
        (["step", "--arch", "resnet18", "--batch-size", "1", "--image-size", "32"], "resnet18 cannot train on 1 x 3 x"),
    ]:
        assert run_command(bench_throughput.main, words) == FAILED
        said = capsys.readouterr().err
        assert f"fastssl: error: {sentence}" in said and "Traceback" not in said


def test_the_program_says_what_is_wrong_in_one_sentence(tmp_path):
    command = [sys.executable, str(suite.PROGRAM), "loader", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    sentence = "fastssl: error: nowhere is not a folder: give one with JPEGs in <class>/ or train/<class>/"
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--profile", "--no-eager", "--config resnet18"])
def test_peers_takes_no_flag_that_it_would_ignore(flag, capsys):
    with pytest.raises(SystemExit):
        bench_throughput.main(["peers", *flag.split()])
    assert f"unrecognized arguments: {flag.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["step --steps 0", "loss --rounds 0", "loss --num 4 0", "augment --size 0", "convert DATA --copies 0"]
)
def test_nothing_can_be_measured_none_times(words, capsys):
    with pytest.raises(SystemExit):
        bench_throughput.main(words.split())
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_the_time_limit_leaves_three_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_deadline", 0.0)
    assert list(timing.turns(9)) == [0, 1, 2] and list(timing.turns(2)) == [0, 1]
    monkeypatch.setattr(timing, "_deadline", float("inf"))
    assert len(list(timing.turns(9))) == 9
    monkeypatch.setattr(timing, "_deadline", 0.0)
    assert take_turns({"a": list}, 9)["a"].rounds == 3


@pytest.mark.parametrize("make, sizes", [(cpu_entries, Sizes.cpu()), (gpu_entries, Sizes.gpu())])
def test_the_shares_of_a_suite_leave_time_to_spare(make, sizes):
    entries = make(sizes, "DATA", "FILE")
    limit = suite.LIMIT["cpu" if sizes.device == "cpu" else "gpu"]
    assert sum(entry.seconds for entry in entries) + sizes.compile_seconds < limit
    assert {entry.stage for entry in entries} <= set(bench_throughput.STAGES)
    assert len({entry.name for entry in entries}) == len(entries)


def test_a_suite_survives_a_stage_that_fails_and_one_that_hangs(tmp_path, monkeypatch, capsys):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, pathlib\n"
        "output = sys.argv[sys.argv.index('--output') + 1]\n"
        f"pathlib.Path(output).write_text({json.dumps(loop_result(step=[1.0], **{'eager step': [2.0]}))!r})\n"
        "time.sleep(60 if 'hangs' in output else 0)\n"
        "sys.exit('fails' in output)\n"
    )
    monkeypatch.setattr(suite, "PROGRAM", program)
    entries = [suite.Entry(name, "all", [], 1.0) for name in ("fails", "hangs", "works")]
    monkeypatch.setattr(suite, "cpu_entries", lambda *_: entries)
    monkeypatch.setattr(suite, "open_data", lambda *_: (str(tmp_path), "FILE"))
    monkeypatch.setattr(suite, "verdicts", lambda stage, result: ["a verdict"])
    assert suite.main(["--suite", "cpu", "--report", str(tmp_path / "out")]) == 1
    lines = read_result(tmp_path / "out" / "suite-cpu.json")["lines"]
    states = [(line["name"], line["state"]) for line in lines]
    assert states == [("fails", "failed"), ("hangs", "killed"), ("works", "done")]
    assert "a verdict" in lines[1]["found"] and (tmp_path / "out" / "hangs-cpu.png").exists()
    assert "a verdict" in capsys.readouterr().out.split("== the suite")[1]


def test_a_stage_of_a_suite_leaves_the_next_ones_their_shares(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\ntime.sleep(60 if 'hangs' in sys.argv[sys.argv.index('--output') + 1] else 0)\n"
    )
    monkeypatch.setattr(suite, "PROGRAM", program)
    monkeypatch.setitem(suite.LIMIT, "cpu", 10.0)
    monkeypatch.setattr(suite, "cpu_entries", lambda *_: [suite.Entry(n, "all", [], 4.0) for n in ("hangs", "works")])
    monkeypatch.setattr(suite, "open_data", lambda *_: (str(tmp_path), "FILE"))
    assert suite.main(["--suite", "cpu", "--report", str(tmp_path / "out")]) == 1
    hangs, works = read_result(tmp_path / "out" / "suite-cpu.json")["lines"]
    assert (hangs["state"], works["state"]) == ("killed", "done") and 4 <= hangs["seconds"] < 7


def test_a_suite_that_is_ended_ends_its_stage(tmp_path, monkeypatch):
    program, mark = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(
        f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    monkeypatch.setattr(suite, "PROGRAM", program)
    monkeypatch.setattr(suite, "cpu_entries", lambda *_: [suite.Entry("hangs", "all", [], 30.0)])
    monkeypatch.setattr(suite, "open_data", lambda *_: (str(tmp_path), "FILE"))

    def end_it():
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_it, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--suite", "cpu", "--report", str(tmp_path / "out")])
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_suite_has_no_stage_of_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "open_data", lambda *_: (str(tmp_path), "FILE"))
    with pytest.raises(ValueError, match=r"--only takes all, augment, eval, .*, not convert, lss"):
        suite.main(["--suite", "cpu", "--only", "loss", "lss", "convert", "--report", str(tmp_path / "out")])


def test_the_gpu_suite_runs_at_its_smallest_sizes(tmp_path, capsys):
    """The stages that no other test runs as the suite does, in processes of their own, compiled ahead."""
    assert suite.main(["--suite", "gpu", "--tiny", "--only", "all", "--report", str(tmp_path)]) == 0
    lines = read_result(tmp_path / "suite-gpu-tiny.json")["lines"]
    assert [(line["name"], line["state"]) for line in lines] == [("all", "done")]
    assert any("bound by" in sentence for sentence in lines[0]["found"])
    assert "eager step" in (tmp_path / "all-gpu-tiny.md").read_text()
    assert "bound by" in capsys.readouterr().out


def test_a_result_tells_the_command_and_not_where_the_program_lies(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bench_throughput.py", "step", "--output", "out/step.json"])
    assert environment()["command"] == ["bench_throughput.py", "step", "--output", "out/step.json"]


def test_a_result_is_of_the_time_and_the_commit_at_which_it_was_begun(tmp_path, monkeypatch):
    first, later = begun(), {"commit": "another", "started": "later"}
    monkeypatch.setattr("fastssl.bench.results.environment", lambda: environment() | later)
    write_result(tmp_path / "a.json", {"lines": []}, device="cpu")
    assert read_result(tmp_path / "a.json")["environment"] == environment() | first | {"device": "cpu"}


def test_the_gpu_suite_asks_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        suite.main(["--suite", "gpu"])
    assert "needs a CUDA device: use --suite cpu, or --tiny" in capsys.readouterr().err


def test_a_result_of_an_unknown_stage_is_read_by_its_seconds():
    timings = {"ours": Timing(0.001, 0.001, 0.002, 3)._asdict()}
    (row,) = rows("new", {"lines": [{"queries": 5, "seconds": timings}]})
    assert row.group == "queries 5" and row.value.median == 1.0 and row.unit == "ms" and not row.higher_is_better


def test_what_there_is_no_time_for_is_named(monkeypatch, capsys):
    monkeypatch.setattr(timing, "_deadline", float("inf"))  # other tests of this process may have set one
    assert list(timing.while_time_lasts(["a", "b"])) == ["a", "b"]
    monkeypatch.setattr(timing, "_deadline", 0.0)
    assert list(timing.while_time_lasts(["a", "b", "c"])) == ["a"]
    assert "not measured, since the time of --seconds is over: b, c" in capsys.readouterr().out


def test_each_name_has_its_share_of_the_time(monkeypatch):
    monkeypatch.setattr(timing.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(timing, "_deadline", 190.0)
    assert [(name, timing._deadline) for name in timing.while_time_lasts("abc")] == [("a", 130), ("b", 160), ("c", 190)]


def test_a_result_of_a_gpu_tells_the_cpu_too():
    assert machine(ENVIRONMENT) == "1 CPU thread (Z80)"
    assert machine(ENVIRONMENT | {"gpus": ["H200"], "threads": 16}) == "H200, 16 CPU threads (Z80)"


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_limit_of_no_time_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        bench_throughput.main(["step", f"--seconds={seconds}"])
    assert "must be greater than 0" in capsys.readouterr().err
