from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.core import _folders, provenance
from stillhouse.core.artifact import Artifact, Licence
from stillhouse.core.errors import DataError

NAMES = {
    "artifact.json",
    "model.safetensors",
    "config.json",
    "metrics.json",
    "provenance.json",
    "README.md",
    "SHA256SUMS",
}


def make(folder: Path, **changes: object) -> Artifact:
    options: dict = {
        "kind": "test.student",
        "tensors": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -1])},
        "config": {"lr": 1e-3, "classes": ["a", "b"]},
        "metrics": {"accuracy": 0.75},
        "card": "# Student\n\nA test.",
        "files": {"classes.txt": b"a\nb\n"},
    }
    return Artifact.save(folder, **{**options, **changes})


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make sizes and checksums agree with it, as someone with write access could."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "artifact.json").read_bytes())
    if name != "artifact.json":
        manifest["files"][name] = len(content)
        (folder / "artifact.json").write_text(json.dumps(manifest))
    names = [*manifest["files"], "artifact.json"]
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in sorted(names)]
    (folder / "SHA256SUMS").write_text("".join(lines))


# ------------------------------------------------------------ round trip


def test_everything_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {
        "strided": torch.arange(12.0).reshape(3, 4).t()[1:, ::2],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "mask": torch.tensor([True, False]),
        "needs_grad": torch.ones(2, requires_grad=True),
    }
    source = tmp_path / "export.onnx"
    source.write_bytes(b"\x00\x01onnx")
    make(
        tmp_path / "runs" / "a",
        tensors=tensors,
        config={"path": Path("x/y"), "betas": (0.9, 0.999), "n": np.int64(3), "none": None},
        metrics={"f1": np.float32(0.5), "undefined": float("nan"), "confusion": np.eye(2, dtype=int)},
        files={"student.onnx": source, "gallery/α 1.txt": b"x"},
    )
    loaded = Artifact.load(tmp_path / "runs" / "a")
    read = loaded.tensors()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())
        assert not read[name].requires_grad
    assert loaded.config == {"path": "x/y", "betas": [0.9, 0.999], "n": 3, "none": None}
    assert loaded.metrics == {"f1": 0.5, "undefined": None, "confusion": [[1, 0], [0, 1]]}
    assert loaded.kind == "test.student"
    assert loaded.file("student.onnx").read_bytes() == b"\x00\x01onnx"
    assert loaded.file("gallery/α 1.txt").read_bytes() == b"x"
    assert loaded.tensor_info()["strided"] == ("F32", (3, 2))
    assert loaded.tensor("scalar").item() == 3.25
    on_disk = {p.relative_to(loaded.folder).as_posix(): p for p in loaded.folder.rglob("*") if p.is_file()}
    assert set(on_disk) == NAMES | {"student.onnx", "gallery/α 1.txt"}
    assert loaded.bytes == sum(p.stat().st_size for n, p in on_disk.items() if n != "SHA256SUMS")
    assert loaded.tensor_bytes == on_disk["model.safetensors"].stat().st_size


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(50, 20), "head": nn.Linear(20, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    saved = make(tmp_path / "a", tensors=model.state_dict())
    assert 4000 <= saved.tensor_bytes < 4300
    read = saved.tensors()
    assert read["head.weight"] is read["embed.weight"]
    assert saved.tensor_names() == ("embed.weight", "head.weight")
    assert saved.tensor_info()["head.weight"] == ("F32", (50, 20))
    fresh = nn.ModuleDict({"embed": nn.Embedding(50, 20), "head": nn.Linear(20, 50, bias=False)})
    fresh.load_state_dict(read)
    assert torch.equal(fresh["head"].weight, model["embed"].weight)


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    read = make(tmp_path / "a", tensors={"head": base[:3], "tail": base[5:], "all": base}).tensors()
    assert read["head"].tolist() == [0, 1, 2]
    assert read["tail"].tolist() == [5, 6, 7, 8, 9]
    assert read["all"].tolist() == base.tolist()
    small = make(tmp_path / "b", tensors={"x": torch.zeros(100_000)[:2]})
    assert small.tensor_bytes < 200


def test_the_same_content_at_the_same_time_has_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.digest == second.digest
    assert first.created == "2023-11-14T22:13:20Z"
    assert make(tmp_path / "c", metrics={"accuracy": 0.7500001}).digest != first.digest


def test_a_part_of_the_tensors_can_be_read(tmp_path: Path) -> None:
    saved = make(tmp_path / "a")
    assert list(saved.tensors(["b"])) == ["b"]
    with pytest.raises(KeyError, match="no tensor 'missing'"):
        saved.tensors(["missing"])
    with pytest.raises(DataError, match=r"no file 'absent'; files: classes\.txt"):
        saved.file("absent")
    assert saved.expect("test.student") is saved
    with pytest.raises(DataError, match=r"is a 'test\.student' where a 'other' is needed"):
        saved.expect("other")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_checksum_file_is_what_sha256sum_reads(tmp_path: Path) -> None:
    folder = make(tmp_path / "a").folder
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == len(NAMES)  # all but SHA256SUMS itself, and classes.txt


# ------------------------------------------------------------ damage and forgery


def test_any_truncation_and_any_flipped_bit_is_a_data_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "a").folder
    rng = np.random.default_rng(0)
    tried = 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        stride = 2 if path.name in ("SHA256SUMS", "model.safetensors") else 9
        for at in range(0, len(whole), stride):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            for damaged in (bytes(flipped), whole[:at]):
                path.write_bytes(damaged)
                with pytest.raises(DataError) as caught:
                    Artifact.load(folder)
                assert str(folder) in str(caught.value)
                tried += 1
        path.write_bytes(whole)
    assert tried > 1000
    Artifact.load(folder)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "a").folder
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        Artifact.load(folder)


def test_an_added_file_is_named_but_not_what_file_browsers_leave(tmp_path: Path) -> None:
    folder = make(tmp_path / "a").folder
    (folder / ".DS_Store").write_bytes(b"x")
    Artifact.load(folder)
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"notes\.txt: does not belong"):
        Artifact.load(folder)


@pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")
def test_links_to_folders_pipes_and_dead_links_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a").folder
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(DataError, match="more"):
        Artifact.load(folder)
    (folder / "more").unlink()
    (folder / "classes.txt").unlink()
    os.mkfifo(folder / "classes.txt")
    with pytest.raises(DataError, match="not a regular file"):
        Artifact.load(folder)
    (folder / "classes.txt").unlink()
    (folder / "classes.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError):
        Artifact.load(folder)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", "C:evil", "a\\b", "..", "sub/.hidden"]
)
def test_a_checksum_file_that_names_another_place_is_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "a").folder
    sums = (folder / "SHA256SUMS").read_text()
    lines = sorted([*sums.splitlines(keepends=True), f"{'0' * 64}  {name}\n"], key=lambda line: line[66:])
    (folder / "SHA256SUMS").write_text("".join(lines))
    with pytest.raises(DataError, match="not allowed"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, this version reads 1; upgrade"),
        ({"schema": True}, "schema True"),
        ({"schema": "1"}, "schema '1'"),
        ({"format": "other"}, "not the manifest"),
        ({"kind": 3}, "wrong type"),
        ({"created": None}, "wrong type"),
        ({"files": []}, "wrong type"),
        ({"files": {}}, "wrong type"),
        ({"aliases": {"x": 1}}, "wrong type"),
        ({"aliases": {"x": "nothing"}}, "alias 'x' of 'nothing'"),
        ({"aliases": {"b": "w"}}, "alias 'b' of 'w'"),
    ],
)
def test_a_manifest_with_valid_checksums_and_wrong_content_is_refused(
    tmp_path: Path, change: dict, message: str
) -> None:
    folder = make(tmp_path / "a").folder
    manifest = json.loads((folder / "artifact.json").read_bytes())
    sums = (folder / "SHA256SUMS").read_text()
    content = json.dumps({**manifest, **change}).encode()
    old = hashlib.sha256((folder / "artifact.json").read_bytes()).hexdigest()
    (folder / "artifact.json").write_bytes(content)
    (folder / "SHA256SUMS").write_text(sums.replace(old, hashlib.sha256(content).hexdigest()))
    with pytest.raises(DataError, match=message):
        Artifact.load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[1, 2]"),
        ("config.json", b"{"),
        ("metrics.json", b"[" * 100_000),
        ("metrics.json", b'{"a": ' + b"9" * 5000 + b"}"),
        ("README.md", b"\xff\xfe"),
        ("provenance.json", b"null"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b"\x80\x04pickle"),
    ],
)
def test_a_file_with_valid_checksums_and_wrong_content_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = make(tmp_path / "a").folder
    forge(folder, "classes.txt", b"c\n")
    Artifact.load(folder)  # the forgery itself is sound: only the content below is at fault
    forge(folder, name, content)
    with pytest.raises(DataError, match=name):
        Artifact.load(folder)


def test_tensors_that_change_after_loading_are_a_data_error(tmp_path: Path) -> None:
    loaded = make(tmp_path / "a")
    loaded.file("model.safetensors").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        loaded.tensors()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no artefact folder"):
        Artifact.load(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="no artefact folder"):
        Artifact.load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a whole artefact"):
        Artifact.load(tmp_path / "empty")


# ------------------------------------------------------------ replacing


def test_saving_again_replaces(tmp_path: Path) -> None:
    make(tmp_path / "a", files={"old.txt": b"old"})
    make(tmp_path / "a", metrics={"accuracy": 0.9})
    assert Artifact.load(tmp_path / "a").metrics == {"accuracy": 0.9}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "old.txt").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failure_at_any_step_leaves_the_old_artefact_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    make(tmp_path / "a", metrics={"accuracy": 0.1})
    if not exchange:
        monkeypatch.setattr(_folders, "_exchange", lambda a, b: False)
    real = {"fsync": os.fsync, "rename": os.rename}
    steps = {"left": 0}

    def failing(name: str):
        def call(*arguments: object) -> object:
            if steps["left"] == 0:
                steps["left"] = -1
                raise OSError("the disk is full")
            steps["left"] -= steps["left"] > 0
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    failures = 0
    for step in range(60):
        steps["left"] = step
        try:
            make(tmp_path / "a", metrics={"accuracy": 0.2 + step})
        except OSError:
            failures += 1
        steps["left"] = -1
        accuracy = Artifact.load(tmp_path / "a").metrics["accuracy"]
        assert accuracy in (0.1, 0.2 + step)
        if accuracy != 0.1:
            break
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert failures >= 10  # one fsync a file at least
    assert accuracy != 0.1


KILLED = """
import os, sys
from pathlib import Path
import torch
from stillhouse.core import _folders
from stillhouse.core.artifact import Artifact
folder, point = Path(sys.argv[1]), sys.argv[2]
def die(*arguments):
    os._exit(9)
if point == "while writing":
    _folders.os.fsync = die
elif point == "before replacing":
    _folders._exchange = die
else:
    _folders._exchange = lambda a, b: False
    rename = os.rename
    def second(a, b):
        if str(a).endswith("/a"):
            return rename(a, b)
        die()
    _folders.os.rename = second
Artifact.save(folder, kind="t", tensors={"w": torch.ones(2)}, config={}, metrics={"accuracy": 2.0},
card="new")
"""


@pytest.mark.parametrize("point", ["while writing", "before replacing", "between two renames"])
def test_a_killed_save_loses_nothing(tmp_path: Path, point: str) -> None:
    make(tmp_path / "a", metrics={"accuracy": 1.0})
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), point], capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    if point == "between two renames":  # only where the system cannot swap two folders in one step
        with pytest.raises(DataError, match="saving was interrupted and the previous artefact is at"):
            Artifact.load(tmp_path / "a")
        (old,) = tmp_path.glob(".a.old-*")
        old.rename(tmp_path / "a")
    assert Artifact.load(tmp_path / "a").metrics == {"accuracy": 1.0}
    make(tmp_path / "a", metrics={"accuracy": 3.0})
    assert Artifact.load(tmp_path / "a").metrics == {"accuracy": 3.0}


def test_what_a_killed_save_left_is_swept_after_a_day(tmp_path: Path) -> None:
    fresh, stale = tmp_path / ".a.partial-111111", tmp_path / ".a.partial-222222"
    for left in (fresh, stale):
        left.mkdir()
    os.utime(stale, (0, 0))
    make(tmp_path / "a")
    assert fresh.exists()
    assert not stale.exists()


def test_a_folder_of_other_origin_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not a whole artefact; nothing was written"):
        make(home)
    assert (home / "thesis.tex").read_text() == "years of work"
    make(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt: is not part of the artefact"):
        make(tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        make(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").kind == "test.student"


# ------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "a/../b",
        "a\\b",
        "x:y",
        ".hidden",
        "a/",
        "a\n",
        "con.txt",
        "dot.",
        "e\u0301",
    ],
)
def test_file_names_that_are_not_safe_everywhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        make(tmp_path / "a", files={name: b"x"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"files": {"readme.MD": b""}}, ValueError, "collides with 'README.md'"),
        ({"files": {"a.txt": b"", "A.txt": b""}}, ValueError, "collides with 'a.txt'"),
        ({"files": {"x": Path("/nonexistent/x")}}, DataError, "missing or not a regular file"),
        ({"kind": ""}, ValueError, "kind is ''"),
        ({"kind": "two\nlines"}, ValueError, "one non-empty line"),
        ({"config": {"a": {"b": float("inf")}}}, ValueError, r"config\.a\.b is inf"),
        ({"config": {"a": {1: 2}}}, TypeError, r"config\.a has the key 1 of type int"),
        ({"metrics": {"m": [object()]}}, TypeError, r"metrics\.m\[0\] is of type object"),
        ({"tensors": {"x": np.zeros(2)}}, TypeError, "is a ndarray; give a torch.Tensor"),
        (
            {"tensors": {"x": torch.zeros(2, dtype=torch.complex128)}},
            ValueError,
            "complex128, which safetensors",
        ),
        ({"tensors": {"x": torch.zeros(2, device="meta")}}, ValueError, "on 'meta'"),
        ({"tensors": {"x": torch.eye(2).to_sparse()}}, ValueError, "sparse"),
        ({"tensors": {"": torch.zeros(1)}}, ValueError, "non-empty"),
        ({"provenance": {"git": "x"}}, ValueError, "collected automatically"),
        ({"provenance": {"licences": [{"what": "weights"}]}}, ValueError, r"licences\[0\].*'name'"),
    ],
)
def test_wrong_arguments_name_themselves_and_write_nothing(
    tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ provenance


def test_licences_reach_the_card(tmp_path: Path) -> None:
    teacher = Licence(
        what="teacher weights", name="A | B", licence="CC-BY-NC-4.0", terms="No sale.", commercial=False
    )
    saved = make(
        tmp_path / "a", provenance={"licences": [teacher], "data": {"name": "d", "fingerprint": "f00"}}
    )
    assert saved.provenance["data"] == {"name": "d", "fingerprint": "f00"}
    assert saved.provenance["licences"][0]["commercial"] is False
    assert saved.card.startswith(
        "# Student\n\nA test.\n\n## Licences and terms\n\n**Not for commercial use**"
    )
    assert "| teacher weights | A \\| B | CC-BY-NC-4.0 | No sale. |" in saved.card
    assert "| model.safetensors | " in saved.card
    plain = make(tmp_path / "b").card
    assert "Licences" not in plain
    assert "commercial" not in plain


def test_provenance_says_what_was_run_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train", "--hub-token", "s3cret", "--api_key=abc", "--url=https://u:p@h/x"]
    )
    facts = make(tmp_path / "a").provenance
    assert facts["command"] == ["train", "--hub-token", "***", "--api_key=***", "--url=https://***@h/x"]
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["libraries"]["stillhouse-core"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "s3cret" not in (tmp_path / "a" / "provenance.json").read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_git_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    assert provenance.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.git_state(tmp_path) is None
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert provenance.git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "f").write_text("2")
    monkeypatch.chdir(tmp_path)
    assert provenance.git_state() == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(tmp_path) is None
