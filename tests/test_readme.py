"""The Python of the README runs as it stands, but for its sizes."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_of_the_readme_trains(image_folder):
    text = README.read_text("utf-8")
    code = re.search(r"^## From Python\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    sizes = {'"IMAGES"': repr(str(image_folder)), "range(100)": "range(4)", "batch_size=32": "batch_size=8"}
    for written, small in sizes.items():
        assert code.count(written) == 1
        code = code.replace(written, small)
    found = {}
    exec(code, found)
    moco, loader = found["moco"], found["loader"]
    loader.close()
    assert loader.num_images == 24
    assert found["epoch"] == 1  # three batches each
    assert moco.queue_ptr == 4 * 8
    assert torch.equal(moco.queue[24:32], found["k"])
    assert torch.isfinite(found["loss"])
    assert [tuple(part.shape) for part in found["features"]] == [(24, 512)]
