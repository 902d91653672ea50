"""Finds the images in tar files, which hold WebDataset samples, an image folder, or a tar file for each class."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fastssl.data_prep.find import ImageFolder, by_parts, label_by_folder
from fastssl.data_prep.manifest import check_count, name_classes, read_manifest
from fastssl.data_prep.splits import around_classes, look_like_splits
from fastssl.data_prep.walk import count_unread, is_image_name, unread_notice, walk_images

_MOST_LINKS = 40  # that lead to one another, as in Linux; a circle ends at one of its links, an empty file
WANTED = "give an image folder, a tar file of images, or a folder of those"


class Member(NamedTuple):
    """Where a file is in a tar file."""

    tar: str
    offset: int
    size: int


Members = dict[tuple[Path, str], Member]  # by tar file and name, in the order of the tar files


def find_tars(folder: str | os.PathLike) -> list[Path]:
    """The tar files in a folder, sorted, without hidden ones, such as macOS's `._name.tar` beside each `name.tar`.

    None if folders below it hold images, which were then unpacked from them. Raises ValueError when images lie beside
    them, and for those of a training split and of another one, such as ImageNet's, which must not become one data set.
    """
    tars, beside = sorted(Path(folder).glob("[!.]*.tar")), ""
    for image in walk_images(os.fspath(folder), Counter()) if tars else ():
        if "/" in image:
            return []
        beside = image
    if beside:
        raise ValueError(
            f"{folder} holds images and tar files, such as {beside} and {tars[0].name}: move either to another folder, "
            "or name a tar file"
        )
    if splits := look_like_splits(tar.stem for tar in tars):
        raise ValueError(
            f"{folder} holds tar files of several splits, {splits[0]}.tar and {splits[1]}.tar: name one of them, or "
            "move those of each split to a folder of its own"
        )
    return tars


def read_tars(path: Path, tars: list[Path]) -> tuple[ImageFolder, list[Member]]:
    """The images in the `tars` of `path`, and where each one is.

    With `.cls` files these are WebDataset samples, in the order of the tar files; without any, an image folder.
    Raises ValueError for a file that is not a tar file, when there are no images, and for a class that is missing or
    not a number.
    """
    images: Members = {}
    classes: dict[tuple[Path, str], int] = {}
    unread: Counter[str] = Counter()
    with tqdm(unit=" files", desc="listing", dynamic_ncols=True, disable=None, delay=1, leave=False) as bar:
        for tar in tars:
            try:
                with tarfile.open(tar, "r:") as archive:
                    members = _members(archive, bar)
                    images |= {(tar, name): m for name, m in members.items() if _counts(os.path.basename(name))}
                    texts = {name: _bytes(archive, m) for name, m in members.items() if name.endswith(".cls")}
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ValueError(f"{tar} is no whole, uncompressed tar file ({error}): {WANTED}") from error
            for name in members:
                count_unread(name, unread)
            for name, text in texts.items():
                if (tar, _key(name)) in classes:
                    raise ValueError(f"{tar}/{name}: another sample has the same name up to the first dot, rename one")
                classes[tar, _key(name)] = class_number(text, f"{tar}/{name}")
    if not images:
        raise ValueError(f"{path} holds no images: {WANTED}")
    folder, places = _samples(path, images, classes) if classes else _packed_folder(path, images)
    return folder._replace(notices=(*folder.notices, *unread_notice(unread))), places


def class_number(text: bytes, name: str) -> int:
    """The class number in a `.cls` file. Raises ValueError, with `name`, when it is not a number."""
    try:
        return int(np.int64(int(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"{name} holds {text[:20]!r}, not a class number: number the classes from 0") from None


def _samples(path: Path, images: Members, classes: dict[tuple[Path, str], int]) -> tuple[ImageFolder, list[Member]]:
    """One image of each sample: the first of those with the fewest dots in their names (.jpg, not .mask.png)."""
    names: dict[tuple[Path, str], str] = {}
    for tar, name in images:
        chosen = names.setdefault((tar, _key(name)), name)
        if name.count(".") < chosen.count("."):
            names[tar, _key(name)] = name
    shown = [f"{tar.name}/{name}" for (tar, _), name in names.items()]
    if missing := [name for name, sample in zip(shown, names) if sample not in classes]:
        raise ValueError(f"{missing[0]} has no .cls file beside it, unlike {len(classes)} other images: add its class")
    labels = np.array([classes[sample] for sample in names], dtype=np.int64)
    manifest = read_manifest(path if path.is_dir() else path.parent)
    if path.is_dir():  # not a single shard: none may be missing
        check_count(path, manifest, len(names))
    folder = ImageFolder(str(path), shown, labels, name_classes(path, manifest, int(labels.max())))
    return folder, [images[tar, name] for (tar, _), name in names.items()]


def _packed_folder(path: Path, images: Members) -> tuple[ImageFolder, list[Member]]:
    """The images of the training split, or all, in the order of an image folder, without folders around the classes.

    Several tar files that begin the names of all their images, such as n01440764.tar that of n01440764_10026.JPEG, are
    the class folders.
    """
    if len({tar for tar, _ in images}) > 1 and all(name.startswith(f"{tar.stem}_") for tar, name in images):
        images = {(tar, f"{tar.stem}/{name}"): member for (tar, name), member in images.items()}
    around = around_classes(str(path), [name for _, name in images])
    places = [place for place in images if place[1].startswith(around)]
    places.sort(key=lambda place: by_parts(place[1]))
    names = [name.removeprefix(around) for _, name in places]
    return label_by_folder(str(path), names), [images[place] for place in places]


def _members(archive: tarfile.TarFile, bar: tqdm) -> dict[str, Member]:
    """The files that are not hidden, in the order of the archive; a link is where the file that it leads to is.

    A link to something outside the archive counts as an empty file, so that it is reported. A tar file inside it, as in
    ImageNet's, is a folder.
    """
    members, links = {}, {}
    for member in archive:
        bar.update()
        name = os.path.normpath(member.name)
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if member.issparse() and _counts(os.path.basename(name)):
            raise ValueError(f"{name} is stored in pieces: pack without --sparse")
        if member.isfile() and name.endswith(".tar"):
            for below, offset, size in _inner(archive, member, bar):
                members[f"{name[:-4]}/{below}"] = Member(archive.name, member.offset_data + offset, size)
        elif member.isfile() or member.islnk() or member.issym():
            members[name] = Member(archive.name, member.offset_data, member.size if member.isfile() else 0)
        if member.islnk():  # a hard link
            links[name] = os.path.normpath(member.linkname)
        elif member.issym():
            links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))

    def end_of(link: str) -> str:
        for _ in range(_MOST_LINKS):
            link = links.get(link, link)
        return link

    nothing = Member(archive.name, 0, 0)
    return members | {name: members.get(end_of(name), nothing) for name in links}


def _inner(archive: tarfile.TarFile, member: tarfile.TarInfo, bar: tqdm) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar file inside another; of itself, if it is damaged or compressed."""
    try:
        with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
            return [(name, offset, size) for name, (_, offset, size) in _members(inner, bar).items()]
    except tarfile.TarError:  # reported as an image that cannot be used
        return [(os.path.basename(member.name), 0, member.size)]


def _counts(name: str) -> bool:
    """Whether a file in a tar file is an image, or stands for the images that it should hold."""
    return is_image_name(name) or name.endswith(".tar")


def _bytes(archive: tarfile.TarFile, member: Member) -> bytes:
    archive.fileobj.seek(member.offset)
    return archive.fileobj.read(member.size)


def _key(name: str) -> str:
    """The part that the names of a WebDataset sample's files share: up to the first dot."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])
