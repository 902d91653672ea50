"""Instance discrimination, statistics, t-SNE and `all` on static view sets, against NumPy in float64."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch.nn.functional import normalize

from fastssl.command import run_command
from fastssl.distributed import Ranks
from fastssl.eval import __main__ as evaluations
from fastssl.eval import all as all_evaluations
from fastssl.eval import instdisc, stats, tsne
from fastssl.eval.instdisc import chunk_accuracy, count_above, count_above_over_ranks
from fastssl.eval.session import finite_or_null
from fastssl.eval.stats import alignment, class_alignment, subset_uniformity, uniformity
from fastssl.eval.view_set import collect_views, open_view_set
from fastssl.loaders.order import epoch_order

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def unit_rows(n=60, width=8, seed=0):
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


def make_view_set(root, classes=("ant", "bee-1", "cow"), per_class=6, views=3, side=32):
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            base = random.integers(0, 256, 3)
            for v in range(views):
                size = (side, side) if v else (side + int(random.integers(0, 20)), side + 8)
                pixels = np.clip(base + random.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{name}_{i}-{v}.jpeg", quality=95)
    return root


@pytest.fixture(scope="module")
def view_set(tmp_path_factory):
    return make_view_set(tmp_path_factory.mktemp("views"))


def squared_distances(x):
    x = x.double().numpy()
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    return d[np.triu_indices(len(x), 1)]


def ranks_slowly(query, positive, negatives):
    q, p, n = (x.double().numpy() for x in (query, positive, negatives))
    return ((q @ n.T) > (q * p).sum(1, keepdims=True) + 1e-13).sum(1)


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_ranks_equal_float64(rows):
    query, positive = unit_rows(), normalize(unit_rows() + unit_rows(seed=1))
    above = count_above(query, positive, query, rows)
    np.testing.assert_array_equal(above, ranks_slowly(query, positive, query))
    accuracy = chunk_accuracy(above, 5, 25)  # chunks of 25, 25 and 10
    truth = [[100 * np.mean(chunk <= k) for chunk in np.split(above.numpy(), [25, 50])] for k in range(1, 6)]
    np.testing.assert_allclose(accuracy, np.mean(truth, axis=1))
    assert 0 < accuracy[0] < accuracy[4]
    every_second = chunk_accuracy(above, 1, 25, every_second_chunk=True)
    np.testing.assert_allclose(every_second, (truth[0][0] + truth[0][2]) / 2)


def test_negatives_as_near_as_the_positive_do_not_count():
    """The float32 products of equal rows differ by rounding; float64 says that they are equal."""
    query = unit_rows(200, 700)
    positive = query.roll(1, 0)
    assert not count_above(query, query, query).any()
    above = count_above(query, positive, positive.repeat(3, 1))
    np.testing.assert_array_equal(above, 3 * ranks_slowly(query, positive, positive))


def test_statistics_equal_numpy():
    x, y, labels = unit_rows(60), unit_rows(60, seed=1), torch.arange(60) // 20
    assert alignment(x, y) == pytest.approx(float(((x - y).double() ** 2).sum(1).mean()), rel=1e-6)
    means = [squared_distances(x[labels == c]).mean() for c in range(3)]
    assert class_alignment(x, labels) == pytest.approx(np.mean(means), rel=1e-6)
    truth = np.log(np.exp(-2 * squared_distances(x)).mean())
    for tile in (1, 7, 64, 4096):
        assert uniformity(x, tile=tile) == pytest.approx(truth, rel=1e-5)
    assert uniformity(torch.cat([x[:1]] * 5)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("n", "sizes"), [(600, [128] * 3), (300, [128, 128, 44]), (200, [66] * 3), (5, [5])])
def test_subsets_are_seeded_and_never_empty(n, sizes):
    x, order = unit_rows(n), epoch_order(n, 4, 0)
    parts = np.split(order.numpy(), np.cumsum(sizes))[: len(sizes)]
    truth = np.mean([np.log(np.exp(-2 * squared_distances(x[p])).mean()) for p in parts])
    assert subset_uniformity(x, 4) == pytest.approx(truth, rel=1e-5)
    assert n < 10 or subset_uniformity(x, 5) != subset_uniformity(x, 4)


def test_degenerate_sets_are_nan_not_errors():
    assert np.isnan(uniformity(unit_rows(1))) and np.isnan(class_alignment(unit_rows(3), torch.arange(3)))


def commands_on_rank(rank, world_size, data):
    ranks = Ranks(rank, world_size, CPU)
    x, y = unit_rows(61), unit_rows(61, seed=1)
    found = [count_above_over_ranks(x, y, ranks).tolist(), uniformity(x, ranks, tile=8)]
    flags = [str(data), "-a", "resnet18", "--image-size", "32", "-b", "4", "-s", "6"]
    for module, parser in ((instdisc, instdisc.make_instdisc_parser()), (stats, stats.make_stats_parser())):
        options = instdisc.finish_options(parser.parse_args(flags))
        found.append(module.evaluate(instdisc.Session(options, ranks)))
    return found


def test_two_ranks_measure_what_one_does(view_set):
    truth = commands_on_rank(0, 1, view_set)
    for other in run_ranks(commands_on_rank, 2, view_set):
        assert other[0] == truth[0] and other[2] == truth[2]
        assert other[1] == pytest.approx(truth[1], rel=1e-12)
        assert other[3] == pytest.approx(truth[3], rel=1e-6)


def test_a_rank_without_images_has_the_features_on_its_device(view_set, monkeypatch):
    monkeypatch.setattr("fastssl.eval.view_set.gather_features", lambda session, features: features)
    options = instdisc.finish_options(instdisc.make_instdisc_parser().parse_args([str(view_set)]))
    views = open_view_set(options, ALONE)
    session = instdisc.Session(options, Ranks(0, 2, torch.device("meta")))  # one batch, dealt to rank 1
    found = collect_views(session, torch.nn.Flatten(), views, (0, 1))
    assert [features.device.type for features in found] == ["meta"] * 2


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run(name, *argv)` -> (exit code, stdout, stderr) of `fastssl eval` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*argv):
        try:
            code = run_command(evaluations.main, [str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


FLAGS = ("-a", "resnet18", "--image-size", 32)


def test_instdisc_line(run, view_set, tmp_path):
    code, out, err = run("instdisc", view_set, *FLAGS, "-s", 6, "--topk", 3, "--mode", "sd-sd", "--json", "a.json")
    accuracy = json.loads((tmp_path / "a.json").read_text())["accuracy"]["normal"]
    assert code == 0, err
    line = f"Masked: normal; Mode: sd-sd; Top1-3: {[round(a, 6) for a in accuracy]}; CKPT: ; Dataset: {view_set}"
    assert out.splitlines()[0] == str(view_set) and out.splitlines()[-1] == line


def test_masked_modes(run, tmp_path):
    data = make_view_set(tmp_path / "masked", per_class=2, views=11)
    code, out, _ = run("instdisc", data, *FLAGS, "-s", 2, "--topk", 1, "--dataset-mode", "all")
    modes = [line.split(";")[0] for line in out.splitlines() if line.startswith("Masked")]
    assert code == 0 and modes == [
        f"Masked: {m}" for m in ("normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask")
    ]


def test_every_second_chunk_only_where_the_reference_does_so():
    for data, samples, expected in (("x/auged-train", 50, True), ("x/auged-train", 40, False), ("x/val", 50, False)):
        assert instdisc.every_second(samples, data) is expected
        options = argparse.Namespace(views=data, sample_per_class=samples, topk=2)
        session = argparse.Namespace(options=options, ranks=ALONE, say=print)
        original, view1, view2 = (unit_rows(130, 3, seed) for seed in range(3))
        above = count_above(original, view1, original)
        found = all_evaluations.discriminate(session, [original, view1, view2])
        assert found["d-sd"] == chunk_accuracy(above, 2, samples, expected)


def test_stats_table(run, view_set, tmp_path):
    code, out, err = run("stats-dist", view_set, *FLAGS, "-s", 5, "--pretrained", "", "--json", "a.json")
    result = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and (result["samples"], result["classes"]) == (15, 3), err
    head, values = out.splitlines()[-3:-1]
    assert head.split("  ")[0] == "D-SD align" and len(head) == len(values) == 90
    assert [float(v) for v in values.split()] == pytest.approx([result[n] for n in stats.COLUMNS], abs=6e-5)


def test_a_number_that_does_not_exist_is_null_in_json(run, view_set, tmp_path):
    code, _, err = run("stats", view_set, *FLAGS, "-s", 1, "--json", "one.json")
    assert code == 0, err
    refuse = pytest.fail  # NaN, which Python reads and others do not
    result = json.loads((tmp_path / "one.json").read_text(), parse_constant=refuse)
    assert result["D cls-align"] is None and result["D-SD align"] > 0 and result["samples"] == 3
    assert finite_or_null({"a": [1.5, -np.inf, (np.nan, 2)], "b": "inf"}) == {"a": [1.5, None, [None, 2]], "b": "inf"}


def test_tsne_files(run, view_set, tmp_path):
    flags = [view_set, *FLAGS, "--perplexity", 5, "--pic-name", "pics/t", "--zoomin"]
    code, _, err = run("tsne", *flags)
    names = {f"t.{f}.{kind}" for f in ("full_rep", "auged_rep") for kind in ("pdf", "png")}
    names |= {f"t.{part}.npy" for part in ("Y0", "Y1", "Y2", "labels")}
    assert code == 0 and {p.name for p in (tmp_path / "pics").iterdir()} == names, err
    assert np.load(tmp_path / "pics/t.Y1.npy").shape == (18, 2)
    for path in (tmp_path / "pics").glob("*.p[dn]*"):
        path.unlink()
    code, _, err = run("tsne", *flags, "--paint")
    assert code == 0 and {p.name for p in (tmp_path / "pics").iterdir()} == names, err
    with Image.open(tmp_path / "pics/t.auged_rep.png") as picture:
        assert picture.size == (1000, 1000)


def test_tsne_is_given_the_principal_components(tmp_path, monkeypatch, capsys):
    """Originals, then both views; scikit-learn's PCA as the truth, whose axes may point the other way."""
    given = {}

    class Recorder(TSNE):
        def fit_transform(self, x):
            given.update(x=x, **self.get_params())
            return super().fit_transform(x)

    monkeypatch.setattr(tsne, "TSNE", Recorder)
    features, labels = [unit_rows(30, 70, seed=s) for s in range(3)], torch.arange(30) // 10
    options = tsne.make_tsne_parser().parse_args(
        ["x", "--perplexity", "7", "--pic-name", str(tmp_path / "p"), "--seed", "-5"]
    )
    coordinates = tsne.embed(tsne.Session(options, ALONE), features, labels)
    truth = PCA(50, svd_solver="full").fit_transform(torch.cat(features).double().numpy())
    np.testing.assert_allclose(given["x"] @ given["x"].T, truth @ truth.T, atol=1e-10)
    assert (given["perplexity"], given["random_state"], given["init"]) == (7.0, 2**32 - 5, "pca")
    again = TSNE(perplexity=7.0, init="pca", random_state=2**32 - 5).fit_transform(given["x"])
    np.testing.assert_array_equal(np.concatenate([coordinates[p] for p in ("Y0", "Y1", "Y2")]), again)
    np.testing.assert_array_equal(coordinates["labels"], labels)


def test_all_gives_the_numbers_of_each(run, image_folder, view_set, tmp_path):
    flags = [*FLAGS, "-b", 16, "--seed", 3]
    linear = ["--epochs", 3, "--lrs", "0.1,1"]
    # instance discrimination asks all images, in chunks of -s; the statistics the first -s of each class
    code, _, err = run("all", image_folder, "--views", view_set, *flags, *linear, "-k", 5, "-s", 4, "--perplexity", 5,
                       "--json", "all.json", "--figure", "page")  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "all.json").read_text())
    single = {}
    for name, data, more in [
        ("knn", image_folder, ["-k", 5, "--rep-space", "norm"]),
        ("linear", image_folder, ["--protocol", "cached", *linear]),
        ("instdisc", view_set, ["-s", 4]),
        ("instdisc", view_set, ["-s", 4, "--mode", "sd-sd"]),
        ("stats", view_set, ["-s", 4]),
    ]:
        assert run(name, data, *flags, *more, "--json", "one.json")[0] == 0
        result = json.loads((tmp_path / "one.json").read_text())
        single[result.get("mode", name)] = result
    assert found["knn"]["accuracy"] == single["knn"]["accuracy"]
    assert found["linear"]["settings"] == single["linear"]["settings"]
    assert found["instdisc"] == {mode: single[mode]["accuracy"]["normal"] for mode in ("d-sd", "sd-sd")}
    assert all(found["stats"][name] == pytest.approx(single["stats"][name]) for name in stats.COLUMNS)
    assert found["stats"]["samples"] == single["stats"]["samples"] == 12
    assert found["figures"] == ["page.pdf", "page.png"] and (tmp_path / "page.png").stat().st_size > 50_000


def test_bad_input_is_one_sentence(run, view_set, tmp_path):
    holed = make_view_set(tmp_path / "holed")
    (holed / "cow" / "cow_3-2.jpeg").unlink()
    odd = make_view_set(tmp_path / "odd")
    (odd / "ant" / "other.jpeg").write_bytes((odd / "ant" / "ant_0-0.jpeg").read_bytes())
    broken = make_view_set(tmp_path / "broken")
    (broken / "ant" / "ant_0-1.jpeg").write_bytes(b"no image")
    for words, sentence in [
        (["stats", view_set, *FLAGS], "class ant has fewer than 50 samples: use -s 6"),
        (["instdisc", view_set, *FLAGS, "-s", 7], "class ant has fewer than 7 samples: use -s 6"),
        (["tsne", view_set, *FLAGS, "-s", 7, "--classes", 2], "class ant has fewer than 7 samples: use -s 6"),
        (["stats", holed, *FLAGS, "-s", 6], "cow/cow_3-2.jpeg is missing"),
        (["instdisc", view_set, *FLAGS, "--dataset-mode", "g-mask"], "so mode g-mask is incomplete"),
        (["instdisc", odd, *FLAGS], "other.jpeg is not named <stem>-<number>.jpeg"),
        (["instdisc", broken, *FLAGS], "make the view set again with fastssl prep views"),
        (["instdisc", view_set, *FLAGS, "--topk", 19], "fewer than --topk 19 samples: choose --topk from 1 to 18"),
        (
            ["tsne", view_set, *FLAGS, "--perplexity", 54],
            "--perplexity 54 must be below the number of images shown, 54",
        ),
        (["tsne", view_set, "--paint"], "--paint draws saved coordinates"),
        (["instdisc", tmp_path / "nowhere"], "does not exist"),
    ]:
        code, _, err = run(*words)
        assert code == 1 and sentence in err and "Traceback" not in err, err
    code, _, err = run("instdics", view_set)
    assert code == 2 and "did you mean 'instdisc'?" in err
    assert run()[0] == 2 and run("--help")[0] == 0
