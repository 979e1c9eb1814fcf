"""Folders and tables become collections; what is wrong with them is said in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stillhouse.core.errors import DataError
from stillhouse.kidney.data import (
    Collection,
    Item,
    read_collection,
    read_folder,
    read_kth_tips,
    read_manifest,
)


def put(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, 10, 200)).save(path)


def kth_folder() -> Path:
    root = os.environ.get("STILLHOUSE_TEST_DATA")
    if not root:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    return Path(root) / "kidney" / "kth_tips_gray"


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "WW/b.png", "WW/a.png", "CYS/a.jpg")
    seen: list[tuple[int, int]] = []
    collection = read_folder(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert collection.classes == ("CYS", "WW")
    assert collection.views == ("image",)
    assert [item.name for item in collection.items] == ["CYS/a.jpg", "WW/a.png", "WW/b.png"]
    assert all(item.split is None for item in collection.items)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_view_split_class_layout_and_the_union_folder(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(
            f"{v}/{s}/{c}/1.png"
            for v in ("MIX", "SEC", "SUR")
            for s in ("train", "test")
            for c in ("WW", "UA")
        ),
    )
    collection = read_folder(tmp_path)
    assert collection.views == ("surface", "section")
    assert len(collection) == 8
    assert {item.split for item in collection.items} == {"train", "test"}
    assert any("mixed" in note for note in collection.notes)
    alone = read_folder(tmp_path / "MIX")
    assert alone.views == ("image",)
    assert len(alone) == 4


def test_the_mixed_view_alone_is_kept(tmp_path: Path) -> None:
    put(tmp_path, "MIX/train/WW/1.png", "MIX/test/WW/2.png")
    collection = read_folder(tmp_path)
    assert collection.views == ("mixed",)
    assert [item.split for item in collection.items] == ["test", "train"]


@pytest.mark.parametrize(
    ("name", "view", "split"),
    [
        ("surface/WW/1.png", "surface", None),
        ("WW/surface/1.png", "surface", None),
        ("Validation/WW/1.png", "image", "validation"),
        ("mystone/WW/1.png", "mystone", None),
        ("Sur/val/WW/1.png", "surface", "validation"),
    ],
)
def test_layouts(tmp_path: Path, name: str, view: str, split: str | None) -> None:
    put(tmp_path, name)
    (item,) = read_folder(tmp_path).items
    assert (item.label, item.view, item.split) == ("WW", view, split)


@pytest.mark.parametrize(
    "name", ["1.png", "a/b/c/1.png", "train/1.png", "train/test/WW/1.png", "surface/1.png"]
)
def test_layouts_that_tell_no_class_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    with pytest.raises(DataError, match="cannot tell its class"):
        read_folder(tmp_path)


def test_rubbish_is_left_out_and_empty_class_folders_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "WW/1.png", ".cache/WW/2.png", "__MACOSX/WW/3.png", "WW/._1.png")
    (tmp_path / "WW" / "Thumbs.db").touch()
    assert len(read_folder(tmp_path)) == 1
    (tmp_path / "CYS").mkdir()
    with pytest.raises(DataError, match="CYS: holds no images"):
        read_folder(tmp_path)


def test_no_folder_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="holds no images"):
        read_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        read_folder(tmp_path / "file")


def test_a_broken_image_is_found_before_anything_else_happens(tmp_path: Path) -> None:
    put(tmp_path, "WW/1.png", "WW/2.png")
    (tmp_path / "WW" / "2.png").write_bytes((tmp_path / "WW" / "1.png").read_bytes()[:45])
    with pytest.raises(DataError, match=r"2\.png"):
        read_folder(tmp_path)
    assert len(read_folder(tmp_path, check=False)) == 2


def test_without_ids_stones_are_unknown_and_said_so(tmp_path: Path) -> None:
    put(tmp_path, "WW/1.png", "WW/2.png")
    collection = read_folder(tmp_path)
    assert not collection.stone_known
    assert len(collection.stones) == 2
    assert any("patch-level" in note for note in collection.notes)
    assert "stones unknown" in collection.summary()


def test_stone_pattern(tmp_path: Path) -> None:
    put(tmp_path, "WW/s1_a.png", "WW/s1_b.png", "WW/s2_a.png", "UA/s1_a.png")
    collection = read_folder(tmp_path, stone_pattern=r"([^/]+)/s(\d+)_")
    assert collection.stone_known
    assert collection.stones == ("UA-1", "WW-1", "WW-2")
    across = read_folder(tmp_path, stone_pattern=r"s\d+")
    assert across.stones == ("s1", "s2")
    assert any("more than one class" in note for note in across.notes)
    with pytest.raises(DataError, match="finds no id"):
        read_folder(tmp_path, stone_pattern="x(.)")
    with pytest.raises(ValueError, match="stone_pattern"):
        read_folder(tmp_path, stone_pattern="(")


def test_classes_fix_the_order_and_must_be_there(tmp_path: Path) -> None:
    put(tmp_path, "WW/1.png", "UA/1.png")
    assert read_folder(tmp_path, classes=("WW", "UA")).classes == ("WW", "UA")
    with pytest.raises(DataError, match="asked for WW, XX"):
        read_folder(tmp_path, classes=("WW", "XX"))


def table(root: Path, text: str) -> Path:
    path = root / "manifest.csv"
    path.write_bytes(text.encode())
    return path


def test_manifest(tmp_path: Path) -> None:
    put(tmp_path, "p/1.png", "p/2.png", "p/3.png")
    path = table(
        tmp_path,
        "\ufeffpath;class;view;stone;split;remark\n"
        "p/1.png;WW;SUR;7;train;x\n\np/2.png;WW;section;7;test;\np\\3.png;;sec;8;unlabelled;\n",
    )
    collection = read_manifest(path)
    assert collection.stone_known
    assert collection.classes == ("WW",)
    assert [(i.label, i.view, i.stone, i.split) for i in collection.items] == [
        ("WW", "surface", "7", "train"),
        ("WW", "section", "7", "test"),
        ("", "section", "8", "unlabelled"),
    ]
    assert read_collection(tmp_path).items == collection.items
    assert read_collection(path).items == collection.items


def test_manifest_with_another_root_and_absolute_paths(tmp_path: Path) -> None:
    put(tmp_path / "data", "1.png")
    path = table(tmp_path, f"path,class\n{tmp_path / 'data' / '1.png'},WW\n")
    (item,) = read_manifest(path, tmp_path / "data").items
    assert item.name == "1.png"
    assert not read_manifest(path).stone_known


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,class\n../x.png,WW\n", r"row 2: \.\./x\.png lies outside"),
        ("path,class\n1.png,WW\n/etc/passwd,WW\n", "row 3: /etc/passwd lies outside"),
        ("path,class\na/../../x.png,WW\n", "row 2: .* lies outside"),
        ("path,class\n..\\x.png,WW\n", "row 2: .* lies outside"),
        ("path,class\nnone.png,WW\n", r"row 2: there is no file none\.png"),
        ("path,class\n,WW\n", "row 2: the path is empty"),
        ("path,class\n.,WW\n", "row 2: there is no file"),
        ("path,class\n1.png,WW\n./1.png,WW\n", "row 3: 1.png is already in row 2"),
        ("path,class,stone\n1.png,WW,\n", "row 2: the stone is empty"),
        ("path,class,split\n1.png,WW,exam\n", "row 2: unknown split 'exam'; allowed are train"),
        ("path,class\n1.png\n", "row 2: has 1 cells, the header has 2"),
        ("path,label,label\n1.png,a,b\n", "'label' twice"),
        ("file,view\n1.png,a\n", "no column 'class'"),
        ("path,class\n", "no rows"),
        ("", "is empty"),
        ('path,class\n"1.png,WW\n', "no CSV table"),
        ("path,class\n1.png\0,WW\n", "row 2"),
    ],
)
def test_manifest_errors_name_file_and_row(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path, "1.png")
    with pytest.raises(DataError, match=words) as error:
        read_manifest(table(tmp_path, text))
    assert "manifest.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_manifest_that_is_not_utf8_or_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,class\n\xff\xfe,WW\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_manifest(tmp_path / "a.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "none.csv")


def test_kth_tips_names(tmp_path: Path) -> None:
    put(tmp_path, *(f"linen/44-scale_{s}_im_{i}_grey.png" for s in (1, 2, 9) for i in (1, 2)))
    collection = read_collection(tmp_path)
    assert collection.name == "KTH-TIPS"
    assert collection.stones == ("linen/im_1", "linen/im_2")
    assert collection.views == ("scale_1", "scale_2", "scale_9")
    assert any("one physical sample per class" in note for note in collection.notes)
    binned = read_kth_tips(tmp_path, views={"near": (1, 2), "far": (8,)})
    assert binned.views == ("near",)
    assert len(binned) == 4
    with pytest.raises(ValueError, match="scale 1 is in 'a' and in 'b'"):
        read_kth_tips(tmp_path, views={"a": (1,), "b": (1, 2)})
    with pytest.raises(DataError, match="holds no <class>"):
        read_kth_tips(tmp_path / "linen")


@pytest.mark.real_data
def test_kth_tips_as_published() -> None:
    collection = read_kth_tips(kth_folder())
    assert len(collection) == 810
    assert len(collection.classes) == 10
    assert len(collection.views) == 9
    assert len(collection.stones) == 90
    assert collection.items[0].load().shape == (200, 200, 3)


def test_items_and_collections_check_themselves() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="both path and array"):
        Item(path=None, label="a", view="v", stone="s")
    with pytest.raises(ValueError, match="must be uint8"):
        Item(path=None, array=pixels.astype(float), label="a", view="v", stone="s")
    item = Item(path=None, array=pixels, label="a", view="v", stone="s")
    with pytest.raises(ValueError, match="not in classes"):
        Collection(items=(item,), classes=("b",), views=("v",), stone_known=True, name="x")
    collection = Collection(items=(item,), classes=("a", "b"), views=("v", "w"), stone_known=True, name="x")
    assert collection.counts() == {"a": {"v": 1, "w": 0}, "b": {"v": 0, "w": 0}}
    assert collection.filter(view="w").items == ()
    assert collection.filter(labels=("b",)).classes == ("b",)
    for wrong in ({"view": "z"}, {"labels": ("z",)}, {"stones": ("z",)}):
        with pytest.raises(ValueError, match="not in this collection"):
            collection.filter(**wrong)  # type: ignore[arg-type]
