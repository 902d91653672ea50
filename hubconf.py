"""Entry points for torch.hub: encoders from a file or a URL.

model = torch.hub.load("/path/to/this/clone", "encoder", "resnet18.safetensors", source="local")
"""

dependencies = ["torch", "torchvision"]


def encoder(weights: str, arch: str | None = None, *, with_head: bool = False, normalise: bool = False, key: str = "q"):
    """A pretrained encoder in eval mode: (B, 3, S, S) normalised images -> features.

    weights: a file, or an http(s) URL, of any checkpoint that `fastssl.foreign.load_pretrained` reads. with_head: adds
    the projection head, or the linear classifier of a linear-evaluation checkpoint. normalise: scales the features to
    unit length. key: "q" or "k", the query or the key encoder.
    """
    import hashlib
    import os

    import torch

    import fastssl

    # torch.hub unpacks GitHub's archive with files in place of links: what those point to is looked for here
    if (clone := os.path.dirname(os.path.abspath(__file__))) not in fastssl.__path__:
        fastssl.__path__.append(clone)
    from fastssl.foreign import load_pretrained
    from fastssl.foreign.heads import Normalise

    weights = os.fspath(weights)
    if weights.startswith(("http://", "https://")):
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        os.makedirs(folder, exist_ok=True)
        # with a hash of the URL, because every MoCo checkpoint is called checkpoint_0199.pth.tar
        name = os.path.basename(weights.split("?")[0])
        path = os.path.join(folder, f"{hashlib.sha256(weights.encode()).hexdigest()[:8]}-{name}")
        if not os.path.exists(path):
            torch.hub.download_url_to_file(weights, path)
        weights = path
    module, _ = load_pretrained(weights, arch, key=key, with_head=with_head)
    return torch.nn.Sequential(module, Normalise()).eval() if normalise else module


def linear_classifier(weights: str, arch: str | None = None):
    """An encoder with the linear classifier trained on it: (B, 3, S, S) normalised images -> logits."""
    return encoder(weights, arch, with_head=True)
