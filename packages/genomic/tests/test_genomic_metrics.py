from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import nn

from stillhouse.core.errors import ConfigError
from stillhouse.genomic.heads import (
    Classifier,
    Head,
    attended,
    conjoined,
    flipped,
    left_padded,
    other_strand,
    pooled,
)
from stillhouse.genomic.metrics import accuracy, auroc, confusion, f1, mcc, metric, over_seeds, score
from stillhouse.genomic.tokenizers import CharacterTokenizer


def draw(seed: int, classes: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), count)
    return rng.integers(0, classes, count), p.argmax(axis=1), p


# ---- against scikit-learn and by hand


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 50))
def test_metrics_are_those_of_scikit_learn(seed: int, classes: int, count: int) -> None:
    y, p, _ = draw(seed, classes, count)
    table = confusion(y, p, classes)
    assert table.tolist() == sk.confusion_matrix(y, p, labels=range(classes)).tolist()
    assert accuracy(table) == pytest.approx(sk.accuracy_score(y, p))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # scikit-learn warns of a single class and says 0 as well
        assert mcc(table) == pytest.approx(sk.matthews_corrcoef(y, p), abs=1e-12)
    assert f1(table, "macro") == pytest.approx(sk.f1_score(y, p, average="macro", zero_division=0))
    assert f1(table, "weighted") == pytest.approx(sk.f1_score(y, p, average="weighted", zero_division=0))
    if classes == 2:
        assert f1(table) == pytest.approx(sk.f1_score(y, p, zero_division=0))


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_auroc_is_that_of_scikit_learn_ties_included(seed: int, classes: int) -> None:
    y, _, p = draw(seed, classes)
    y[:classes] = range(classes)
    coarse = np.round(p, 1)
    if classes == 2:
        assert auroc(y, coarse) == pytest.approx(sk.roc_auc_score(y, coarse[:, 1]))
    else:
        assert auroc(y, p) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"))


def test_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    table = np.array([[4, 1], [2, 3]])
    assert accuracy(table) == 0.7
    assert f1(table) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert mcc(table) == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))
    assert auroc([0, 1], [0.5, 0.5]) == 0.5
    assert auroc([1, 1], [0.2, 0.5]) == 0.5  # one class alone
    assert mcc(np.array([[5, 0], [5, 0]])) == 0.0  # everything called one class
    assert f1(np.array([[5, 0], [5, 0]])) == 0.0


# ---- conventions


CASES = [
    ("caduceus", "histone", "mcc"),
    ("caduceus", "enhancer", "mcc"),
    ("caduceus", "promoter", "f1_binary"),
    ("caduceus", "splice", "f1_binary"),
    ("caduceus", "splice_all", "accuracy"),
    ("caduceus", "gb", "accuracy"),
    ("hyenadna", "histone", "mcc"),
    ("hyenadna", "enhancer", "mcc"),
    ("hyenadna", "promoter", "f1_macro"),
    ("hyenadna", "splice", "f1_macro"),
    ("hyenadna", "gb", "accuracy"),
    ("gue", "histone", "mcc"),
    ("gue", "promoter", "mcc"),
    ("gue", "splice", "mcc"),
    ("gue", "covid", "f1_macro"),
    ("plain", "splice_all", "mcc"),
]


@pytest.mark.parametrize(("convention", "task", "key"), CASES)
def test_the_table_of_conventions(convention: str, task: str, key: str) -> None:
    found = metric("auto", convention, task)
    assert found.key == key
    assert found.label == f"{key} ({convention})"


def test_conventions_differ_where_they_must() -> None:
    y, p = np.array([0] * 7 + [1] * 3), np.array([0] * 6 + [1] * 2 + [0] * 2)
    values = {name: metric("auto", name, "promoter")(y, p) for name in ("caduceus", "hyenadna", "gue")}
    assert values["caduceus"] == pytest.approx(sk.f1_score(y, p))
    assert values["hyenadna"] == pytest.approx(sk.f1_score(y, p, average="macro"))
    assert values["gue"] == pytest.approx(sk.matthews_corrcoef(y, p))
    assert len({round(value, 6) for value in values.values()}) == 3
    three = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])
    assert metric("auto", "caduceus", "splice_all")(*three) == 0.75
    assert metric("auto", "plain", "splice_all")(*three) == pytest.approx(sk.matthews_corrcoef(*three))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", "hyenadna", "splice_all"), "does not score"),
        (("auto", "gue", "gb"), "does not score"),
        (("auto", "other", "gb"), "convention 'other'"),
        (("auto", "plain", "promotor"), "kind of task 'promotor'"),
        (("recall", "plain", "gb"), "metric 'recall'"),
    ],
)
def test_unknown_metrics_are_one_line(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metric(*arguments)


def test_f1_takes_the_conventions_average() -> None:
    assert metric("f1", "caduceus", "other").key == "f1_binary"
    assert metric("f1", "hyenadna", "other").key == "f1_macro"
    with pytest.raises(ValueError, match="needs two classes"):
        metric("f1", "caduceus", "other")(np.array([0, 1, 2]), np.array([0, 1, 2]))


# ---- intervals and seeds


def test_groups_widen_the_interval() -> None:
    """Twenty copies of the same window are one observation."""
    y, _, p = draw(3, 2, 30)
    y, p, groups = np.repeat(y, 20), np.repeat(p, 20, axis=0), np.repeat(np.arange(30), 20)
    alone, grouped = score(y, p, resamples=300), score(y, p, groups=groups, resamples=300)
    for key in ("accuracy", "mcc", "auroc"):
        assert alone[key].estimate == pytest.approx(grouped[key].estimate)
        assert grouped[key].high - grouped[key].low > 3 * (alone[key].high - alone[key].low)


def test_over_seeds() -> None:
    found = over_seeds([0.7, 0.9, 0.8])
    assert found["mean"] == pytest.approx(0.8)
    assert found["half_range"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.8 - 4.302653 * 0.1 / np.sqrt(3), abs=1e-6)
    assert over_seeds([0.5])["low"] is None


# ---- heads


def letters(*rows: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(row, np.uint8) for row in rows])


def test_padding_is_not_pooled_but_in_the_reference() -> None:
    x = torch.randn(2, 5, 3)
    real = attended([2, 5], 5)
    x[0, 2:] = float("nan")  # whatever stands at padding
    found = pooled(x, real)
    torch.testing.assert_close(found[0], x[0, :2].mean(dim=0))
    torch.testing.assert_close(found[1], x[1].mean(dim=0))
    x[0, 2:] = 0.0
    torch.testing.assert_close(pooled(x, real, compat="reference")[0], x[0, :2].sum(dim=0) / 5)


def test_center_pools_the_middle_whatever_the_padding() -> None:
    x = torch.arange(10.0).view(1, 10, 1)
    assert pooled(x, attended([10], 10), "center", middle=2).item() == 4.5
    assert pooled(x, attended([4], 10), "center", middle=2).item() == 1.5
    assert pooled(x, attended([1], 10), "center", middle=6).item() == 0.0
    left = attended([4], 10).flip(1)
    assert pooled(x, left, "center", middle=2).item() == 7.5


def test_strands_with_padding() -> None:
    x = letters(b"AACGNN", b"ACGTAC")
    assert other_strand(x, [4, 6]).tobytes() == b"CGTTNN" + b"GTACGT"
    assert (other_strand(other_strand(x, [4, 6]), [4, 6]) == x).all()
    assert left_padded(x, [4, 6]).tobytes() == b"NNAACG" + b"ACGTAC"
    marks = torch.arange(6.0).repeat(2, 1)[..., None]
    assert flipped(marks, [4, 6])[..., 0].tolist() == [[3, 2, 1, 0, 4, 5], [5, 4, 3, 2, 1, 0]]


class Toy(nn.Module):
    """Embeds letters and convolves: it sees order, so that the strands differ."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.mix = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, ids: torch.Tensor, *, attend: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(ids)
        if attend is not None:
            x = x * attend[..., None]
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_conjoined_logits_do_not_depend_on_the_strand(batch: int) -> None:
    """A batch of one works too: the reference squeezes it away."""
    torch.manual_seed(0)
    classifier = Classifier(Toy(), Head(4, 3), CharacterTokenizer())
    rng = np.random.default_rng(0)
    x = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (batch, 9))]
    lengths = [9, 5, 7][:batch]
    both = classifier.conjoined(x, lengths)
    assert both.shape == (batch, 3)
    torch.testing.assert_close(both, classifier.conjoined(other_strand(x, lengths), lengths))
    assert not torch.allclose(classifier(x, lengths), classifier(other_strand(x, lengths), lengths))
    constant = conjoined(lambda w, n: torch.ones(len(w), 2), x, lengths)
    assert constant.tolist() == [[1.0, 1.0]] * batch


def test_padding_does_not_change_a_classification() -> None:
    classifier = Classifier(Toy(), Head(4, 2), CharacterTokenizer()).eval()
    alone = classifier(letters(b"ACGTA"))
    torch.testing.assert_close(classifier(letters(b"ACGTANNN"), [5]), alone)
    reference = Classifier(Toy(), Head(4, 2, compat="reference"), CharacterTokenizer()).eval()
    assert not torch.allclose(reference(letters(b"ACGTANNN"), [5]), reference(letters(b"ACGTA")))


@pytest.mark.parametrize("compat", ["none", "reference"])
def test_a_classifier_does_not_read_n_at_the_ends(compat: str) -> None:
    seen: list[tuple[str, str]] = []

    class Spy(Toy):
        def forward(self, ids: torch.Tensor, *, attend: torch.Tensor | None = None) -> torch.Tensor:
            assert attend is not None
            read = "".join("ACGTN"[i - 7] if i >= 7 else "." for i in ids[0].tolist())
            seen.append((read, "".join(".#"[int(real)] for real in attend[0])))
            return super().forward(ids, attend=attend)

    classifier = Classifier(Spy(), Head(4, 2, "center", compat=compat), CharacterTokenizer())  # type: ignore[arg-type]
    classifier(letters(b"NACNGNNNN"), [7])
    left = compat == "reference"  # there the window stands at the right end
    assert seen == [("...ACNG..", "...####..") if left else (".ACNG....", ".####....")]
    *_, inside = classifier.prepare(letters(b"NACNGNNNN"), [7])
    assert int(inside.sum()) == 7


@pytest.mark.parametrize(
    "call",
    [
        lambda: Head(0, 2),
        lambda: Head(4, 1),
        lambda: Head(4, 2, "max"),  # type: ignore[arg-type]
        lambda: attended([7], 5),
        lambda: pooled(torch.zeros(1, 3, 2), torch.ones(1, 4, dtype=torch.bool)),
        lambda: confusion([0], [2], 2),
        lambda: confusion([], [], 2),
        lambda: over_seeds([]),
        lambda: score([0, 1], [[0.5, 0.5]]),
    ],
)
def test_wrong_arguments_are_said(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        call()
