"""Caches under kills, several writers, damaged files; and the commands that look at them."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from stillhouse.core.cache import CacheSpec, TeacherCache, cache_info, verify_cache
from stillhouse.core.cache.cli import app
from stillhouse.core.cli import run_app
from stillhouse.core.errors import DataError
from stillhouse.core.teacher import EmbeddingSignal, SparseTeacher
from stillhouse.core.testing import run_ranks, run_script

SPEC = CacheSpec(kind="embedding", teacher="t", teacher_hash="abc", dtype="float32")


def values(count: int, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5))


def write(path: Path, ids: range, *, rank: int = 0, close: bool = True, width: int = 4) -> None:
    writer = TeacherCache.create(path, SPEC, rank=rank, shard_bytes=100)
    for sample in ids:
        writer.add([sample], EmbeddingSignal(values(1000, width)[[sample]]))
    if close:
        writer.close()
    else:
        writer.abort()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write(tmp_path / "cache", range(40))
    TeacherCache.merge(tmp_path / "cache", writers=1)
    return tmp_path / "cache"


def check(path: Path, count: int) -> None:
    cache = TeacherCache.open(path, expect=SPEC, verify=True)
    assert len(cache) == count
    assert verify_cache(path) == []
    signal = cache.lookup(torch.arange(count)).signal
    assert isinstance(signal, EmbeddingSignal)
    assert torch.equal(signal.values, values(1000)[:count])


# --- kills
# ------------------------------------------------------------------------------------------------------

# One process with torch loaded forks a writer again and again and kills it, at a random size of whatever file
# the writer is writing at that moment, or at a random time; the last writer is left to finish.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from stillhouse.core.cache import CacheSpec, TeacherCache
from stillhouse.core.teacher import DenseSignal

torch.set_num_threads(1)
folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
spec = CacheSpec(kind="topk", teacher="t", teacher_hash="abc", vocab=5000, k=500, temperatures=(1.0, 2.0))
logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
randomness = random.Random(seed)


def work():
    with TeacherCache.create(folder, spec, shard_bytes=1_000_000) as writer:
        for start in range(0, 6016, 64):
            ids = list(range(start, start + 64))
            rows = writer.missing(ids)
            if rows:
                chosen = torch.tensor(rows)
                writer.add([ids[row] for row in rows], DenseSignal(logits[chosen].roll(start, -1)))
        writer.finish()


def partial_bytes():
    total = 0
    for path in folder.glob(".*.tmp"):
        try:
            total += path.stat().st_size
        except OSError:
            pass
    return total


log = []
while True:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    end = time.monotonic() + randomness.uniform(0.05, 0.6)
    target = randomness.randrange(1, 900_000) if len(log) % 2 else None
    status = None
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = code
        elif len(log) < kills and (
            time.monotonic() > end + 5 if target else time.monotonic() > end
        ) or (target and len(log) < kills and partial_bytes() >= target):
            os.kill(child, signal.SIGKILL)
            log.append({"partial": partial_bytes(), "shards": len(list(folder.glob("shard-*")))})
            os.waitpid(child, 0)
            status = -9
    if status == 0:
        break
    assert status == -9, status
print(json.dumps(log))
"""


def _killed_run(tmp_path: Path, seed: int, kills: int) -> list[dict[str, int]]:
    script, folder = tmp_path / "killer.py", tmp_path / "cache"
    script.write_text(KILLER)
    result = run_script([script, folder, str(seed), str(kills)], env={"OMP_NUM_THREADS": "1"}, timeout=300)
    assert result.returncode == 0, result.stderr
    assert verify_cache(folder) == []
    cache = TeacherCache.open(folder, verify=True)
    assert len(cache) == 6016
    assert cache.counts["duplicates"] == 0
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    for start in (0, 2944, 5952):
        ids = torch.arange(start, start + 64)
        signal = cache.lookup(ids).signal
        online = SparseTeacher.from_logits(logits.roll(start, -1), k=500, temperatures=(1.0, 2.0))
        assert isinstance(signal, SparseTeacher)
        assert torch.equal(signal.ids, online.ids)
        for temperature in (1.0, 2.0):
            for mine, theirs in zip(
                signal.log_probs(temperature), online.log_probs(temperature), strict=True
            ):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)
    assert list(folder.glob(".*tmp")) == []
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_writer_killed_at_random_bytes_goes_on(tmp_path: Path):
    log = _killed_run(tmp_path, seed=0, kills=4)
    assert log  # at least one kill landed before the end
    assert any(kill["shards"] for kill in log)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_writer_killed_many_times_goes_on(tmp_path: Path, seed: int):
    log = _killed_run(tmp_path, seed=seed, kills=30)
    assert any(kill["partial"] for kill in log)  # in the middle of a file


def test_what_a_kill_leaves_at_any_byte_is_swept_away(tmp_path: Path):
    folder = tmp_path / "cache"
    write(folder, range(10), close=False)  # 7 samples to a shard: one shard is listed, three samples are lost
    listed = sorted(path.name for path in folder.glob("shard-*"))
    assert listed == ["shard-00000-000000.safetensors"]
    whole = (folder / listed[0]).read_bytes()
    rng = random.Random(0)
    for cut in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))]:
        (folder / ".shard-00000-000001.safetensors.tmp").write_bytes(whole[:cut])
        (folder / f".writer-00000.json.{cut}.tmp").write_bytes(b'{"schema"')
        (folder / "shard-00000-000001.safetensors").write_bytes(whole)  # renamed, not listed yet
        writer = TeacherCache.create(folder, SPEC, shard_bytes=100)
        assert writer.missing(range(10)) == [7, 8, 9]  # type: ignore[arg-type]
        writer.abort()
        assert sorted(path.name for path in folder.glob("*shard-*")) == listed
        assert list(folder.glob(".*.tmp")) == []
    write(folder, range(7, 12))
    TeacherCache.merge(folder, writers=1)
    check(folder, 12)


def test_a_listed_shard_that_is_gone_is_no_silent_loss(tmp_path: Path):
    open_ = tmp_path / "open"
    write(open_, range(20), close=False)
    next(iter(open_.glob("shard-*"))).unlink()
    with pytest.raises(DataError, match="missing"):
        TeacherCache.create(open_, SPEC)
    other = tmp_path / "closed"
    write(other, range(20))
    next(iter(other.glob("shard-*"))).unlink()
    with pytest.raises(DataError, match="missing"):
        TeacherCache.merge(other)


def test_an_exception_while_writing_loses_memory_only(tmp_path: Path):
    def fail() -> None:
        with TeacherCache.create(tmp_path, SPEC, shard_bytes=10**6) as writer:
            writer.add([0], EmbeddingSignal(values(1)))
            writer.flush()
            writer.add([1], EmbeddingSignal(values(1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with TeacherCache.create(tmp_path, SPEC) as writer:
        assert writer.missing([0, 1]) == [1]


def test_a_finished_cache_can_grow(finished: Path):
    reader = TeacherCache.open(finished)
    write(finished, range(40, 60))
    check(finished, 40)  # readers see the finished part until the next merge
    TeacherCache.merge(finished, writers=1)
    check(finished, 60)
    assert len(list(finished.glob("index-*"))) == 1
    assert torch.equal(reader.lookup([39]).signal.values, values(1000)[[39]])  # type: ignore[union-attr]


# --- several writers
# --------------------------------------------------------------------------------------------


def _rank(folder: str) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = list(range(rank, 51, world)) + (
        [0] if rank == 1 else []
    )  # the last batch was padded with sample 0
    with TeacherCache.create(folder, SPEC, rank=rank, shard_bytes=100) as writer:
        for sample in share:
            writer.add([sample], EmbeddingSignal(values(1000)[[sample]]))
    return len(share)


def test_two_ranks_write_and_one_merges(tmp_path: Path):
    folder = tmp_path / "cache"
    assert run_ranks(_rank, 2, str(folder)) == [26, 26]
    with pytest.raises(DataError, match="not finished"):
        TeacherCache.open(folder)
    with pytest.raises(DataError, match=r"ranks \[2\] are missing of 3"):
        TeacherCache.merge(folder, writers=3)
    cache = TeacherCache.merge(folder, writers=2)
    assert cache.counts["duplicates"] in (0, 1)  # 1 unless rank 1 began after rank 0 had stored sample 0
    check(folder, 51)


def test_merge_waits_for_the_writers_of_this_run(tmp_path: Path):
    write(tmp_path, range(20), rank=0)
    write(tmp_path, range(20, 40), rank=1, close=False)
    with pytest.raises(DataError, match="rank 1 was interrupted"):
        TeacherCache.merge(tmp_path, writers=2)
    working = TeacherCache.create(tmp_path, SPEC, rank=1)
    with pytest.raises(DataError, match="rank 1 is still writing"):
        TeacherCache.merge(tmp_path, writers=2)
    with pytest.raises(DataError, match="another process writes as rank 1"):
        TeacherCache.create(tmp_path, SPEC, rank=1)
    with pytest.raises(ValueError, match="single writer"):
        working.finish()
    working.abort()


def test_resume_with_fewer_ranks_keeps_what_the_others_stored(tmp_path: Path):
    write(tmp_path, range(20), rank=0)
    write(tmp_path, range(20, 40), rank=1, close=False)  # killed: samples 34 … 39 were in memory
    with TeacherCache.create(tmp_path, SPEC, rank=0, shard_bytes=100) as writer:
        left = writer.missing(range(40))  # type: ignore[arg-type]
        assert left == list(range(34, 40))
        writer.add(left, EmbeddingSignal(values(1000)[left]))
        writer.finish()
    check(tmp_path, 40)


def test_ranks_with_other_shapes_do_not_merge(tmp_path: Path):
    writers = [TeacherCache.create(tmp_path, SPEC, rank=rank) for rank in range(2)]
    for width, writer in zip((4, 5), writers, strict=True):
        writer.add([width], EmbeddingSignal(torch.zeros(1, width)))
        writer.close()
    with pytest.raises(DataError, match=r"rank 1 stored samples of shapes .*\(5,\).*\(4,\)"):
        TeacherCache.merge(tmp_path)


def test_nothing_to_merge(tmp_path: Path):
    TeacherCache.create(tmp_path, SPEC).close()
    with pytest.raises(DataError, match="no samples"):
        TeacherCache.merge(tmp_path)
    for path in tmp_path.glob("writer-*.json"):
        path.unlink()
    with pytest.raises(DataError, match="no writer"):
        TeacherCache.merge(tmp_path)


# --- damage
# -----------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_anywhere(finished: Path):
    rng = random.Random(1)
    files = [finished / "manifest.json", *finished.glob("shard-*"), *finished.glob("index-*")]
    assert len(files) == 8
    for path in files:
        original = path.read_bytes()
        for position in [0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(12))]:
            changed = bytearray(original)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            problems = verify_cache(finished)
            assert problems, (path.name, position)
            assert any(path.name in problem for problem in problems)
            with pytest.raises(DataError, match=path.name):
                TeacherCache.open(finished, verify=True)
        path.write_bytes(original)
    check(finished, 40)


def test_cut_and_missing_files_are_named_on_open(finished: Path):
    for path in [*finished.glob("shard-*"), *finished.glob("index-*")]:
        original = path.read_bytes()
        for content in (original[:-1], original + b"\0", b"", None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(DataError, match=path.name):
                TeacherCache.open(finished)
            path.write_bytes(original)
    manifest = finished / "manifest.json"
    original = manifest.read_bytes()
    for cut in range(0, len(original), 101):
        manifest.write_bytes(original[:cut])
        with pytest.raises(DataError, match=r"manifest\.json"):
            TeacherCache.open(finished)
    manifest.unlink()
    with pytest.raises(DataError, match="no teacher cache"):
        TeacherCache.open(finished)
    with pytest.raises(DataError, match="not empty and no teacher cache"):
        TeacherCache.create(finished, SPEC)


def test_an_edited_manifest_is_not_believed(finished: Path):
    manifest = finished / "manifest.json"
    content = json.loads(manifest.read_text())
    content["spec"]["teacher_hash"] = "abd"
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match="changed after it was written"):
        TeacherCache.open(finished, expect={"teacher_hash": "abd"})
    manifest.write_text(json.dumps({**content, "schema": "stillhouse-teacher-cache/9"}))
    with pytest.raises(DataError, match=r"'stillhouse-teacher-cache/9'.*'stillhouse-teacher-cache/1'"):
        TeacherCache.open(finished)
    manifest.write_text("[1, 2]")
    with pytest.raises(DataError, match="schema"):
        TeacherCache.open(finished)


def test_shards_of_another_cache_are_noticed(finished: Path, tmp_path: Path):
    other = tmp_path / "other"
    write(other, range(100, 140))
    TeacherCache.merge(other)
    mine, theirs = (sorted(folder.glob("shard-*"))[0] for folder in (finished, other))
    assert mine.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, mine)
    assert [mine.name in problem for problem in verify_cache(finished)] == [True]


def test_a_manifest_cannot_reach_outside_its_folder(finished: Path):
    from stillhouse.core.cache._files import read_json, write_json

    content = read_json(finished / "manifest.json")
    content.pop("schema")
    content["shards"][0]["name"] = "../secret.safetensors"
    write_json(finished / "manifest.json", content)
    with pytest.raises(DataError, match="secret"):
        TeacherCache.open(finished)


def test_unfinished_cache_says_what_to_do(tmp_path: Path):
    write(tmp_path, range(10))
    with pytest.raises(DataError, match="merge"):
        TeacherCache.open(tmp_path)
    assert "not finished" in verify_cache(tmp_path)[0]
    info = cache_info(tmp_path)
    assert not info["complete"]
    assert info["writers"] == {"writer-00000": {"closed": True, "samples": 10}}


# --- commands
# ---------------------------------------------------------------------------------------------------


def test_info_shows_what_and_how_much(finished: Path):
    result = CliRunner().invoke(app, ["info", str(finished), "--json"])
    content = json.loads(result.output)
    assert content["complete"]
    assert content["samples"] == content["rows"] == 40
    assert content["spec"]["teacher_hash"] == "abc"
    assert content["bytes"] == sum(path.stat().st_size for path in finished.glob("shard-*"))
    assert content["bytes_per_row"] == pytest.approx(content["bytes"] / 40, abs=0.01)
    text = CliRunner().invoke(app, ["info", str(finished)]).output
    for word in ("complete", "embedding", "abc", "float32", "bytes per row"):
        assert word in text


def test_verify_exits_with_one_when_a_byte_is_wrong(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert run_app(app, ["verify", str(finished)], "cache") == 0
    shard = sorted(finished.glob("shard-*"))[2]
    changed = bytearray(shard.read_bytes())
    changed[-3] ^= 4
    shard.write_bytes(changed)
    capsys.readouterr()
    assert run_app(app, ["verify", str(finished)], "cache") == 1
    captured = capsys.readouterr()
    assert shard.name in captured.err
    assert "Traceback" not in captured.err
    assert run_app(app, ["verify", str(finished), "--json"], "cache") == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    assert shard.name in content["problems"][0]
    assert run_app(app, ["info", str(finished / "nowhere")], "cache") == 1
    assert "no such file" in capsys.readouterr().err


def test_clean_leaves_samples_and_working_writers_alone(tmp_path: Path):
    write(tmp_path, range(20), close=False)
    write(tmp_path, range(20, 30), rank=1, close=False)
    for name in (".shard-00000-000007.safetensors.tmp", "shard-00000-000009.safetensors"):
        (tmp_path / name).write_bytes(b"rest")
    working = TeacherCache.create(tmp_path, SPEC, rank=1)
    (tmp_path / "shard-00001-000009.safetensors").write_bytes(b"about to be listed")
    before = cache_info(tmp_path)["samples"]
    result = CliRunner().invoke(app, ["clean", str(tmp_path), "--json"])
    assert json.loads(result.output)["removed"] == [
        ".shard-00000-000007.safetensors.tmp",
        "shard-00000-000009.safetensors",
    ]
    assert (tmp_path / "shard-00001-000009.safetensors").exists()
    working.abort()
    assert "removed shard-00001-000009" in CliRunner().invoke(app, ["clean", str(tmp_path)]).output
    assert "nothing" in CliRunner().invoke(app, ["clean", str(tmp_path)]).output
    assert cache_info(tmp_path)["samples"] == before == 21
