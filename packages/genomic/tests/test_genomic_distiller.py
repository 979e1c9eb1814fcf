"""HAD: identities, where gradients flow, what must not leak, and what a batch's layout must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.core.testing import assert_gradient, assert_gradient_only, assert_no_gradient
from stillhouse.core.train import OptimConfig, Step
from stillhouse.genomic.config import DistillConfig
from stillhouse.genomic.distiller import HadDistiller, LogitDistiller, View, view_of
from stillhouse.genomic.distiller._had import window_mean
from stillhouse.genomic.masking import GroupMask, nothing_masked, seeded_mask
from stillhouse.genomic.student import MaskedDecoder, StudentConfig, build_student
from stillhouse.genomic.teacher import (
    KmerTeacher,
    KmerTransformer,
    KmerTransformerConfig,
    RandomTeacher,
    ShuffledTeacher,
)
from stillhouse.genomic.tokenizers import CharacterTokenizer, KmerTokenizer

K = 3
KMERS, CHARACTERS = KmerTokenizer(K), CharacterTokenizer()
LENGTH = 60


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _teacher(width: int = 16, depth: int = 2) -> KmerTeacher:
    config = KmerTransformerConfig(width=width, depth=depth, heads=2, k=K)
    return KmerTeacher(KmerTransformer(config, KMERS.vocab_size), KMERS)


def _windows(rows: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    windows = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, (rows, LENGTH))].copy()
    windows[0, 20] = windows[0, 47] = ord("N")  # breaks the frame
    windows[1, 50:] = ord("N")  # padding
    return windows


def _student(kind: str = "gdn", **options: Any) -> Any:
    return build_student(StudentConfig(kind=kind, width=16, gdn_layers=1, mlp_ratio=2.0, **options))


def _had(teacher: Any = None, *, encoder: Any = None, **options: Any) -> HadDistiller:
    config = DistillConfig(**{"mask_ratio": 0.4, **options})
    encoder = encoder or _student()
    decoder = MaskedDecoder(encoder.width) if config.reconstructs else None
    if config.aligns:
        teacher = teacher or _teacher()
    return HadDistiller(encoder, decoder, teacher if config.aligns else None, config, kmers=KMERS)


def _step(index: int = 0) -> Step:
    return Step(index, 10, 0, "student", 0, 1, None, torch.device("cpu"), 0, 1)


def _batch(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(_windows(seed=seed))


def _drawn(distiller: HadDistiller, windows: np.ndarray, key: int = 5) -> tuple[View, GroupMask]:
    view = view_of(windows, CHARACTERS, KMERS)
    return view, seeded_mask(view.tokens, distiller.config.mask_ratio, tokenizer=KMERS, key=key)


# ---- what both networks read


def test_n_at_the_ends_is_padding_and_n_inside_is_not() -> None:
    windows = np.frombuffer(b"NACGNNTTAN" + b"N" * 5, np.uint8)[None]
    view = view_of(windows, CHARACTERS, KMERS)
    assert view.attend[0].tolist() == [False, *[True] * 8, *[False] * 6]
    assert (view.ids[0][~view.attend[0]] == CHARACTERS.pad_id).all()
    assert view.ids[0, 4].item() == CHARACTERS.n_id
    assert view.nucleotides[0].tolist() == [-1, 0, 1, 2, -1, -1, 3, 3, 0, *[-1] * 6]
    assert view.tokens.lengths.tolist() == [5]  # N ACG N N TTA; the N after the last nucleotide are no tokens


def test_a_window_of_n_alone_costs_nothing_and_breaks_nothing() -> None:
    distiller = _had()
    batch = _batch()
    batch[2] = ord("N")
    losses = distiller.loss("student", batch, _step())
    assert torch.isfinite(losses.total)
    gradients = torch.autograd.grad(losses.total, list(distiller.parts.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    alone = torch.full((1, LENGTH), ord("N"), dtype=torch.uint8)
    assert distiller.loss("student", alone, _step()).total.item() == 0.0


# ---- closed forms


def test_alignment_is_the_formula_of_the_paper_written_with_loops() -> None:
    for reduction in ("mean", "sum"):
        distiller = _had(reduction=reduction, target_norm=False)
        assert distiller.teacher is not None
        view, mask = _drawn(distiller, _windows())
        features = torch.randn(4, LENGTH, 16)
        (target,) = distiller.teacher.features(view.tokens, visible=~mask.groups)
        means = []
        for row in range(4):
            errors = []
            for token in range(int(view.tokens.lengths[row])):
                members = [i for i in range(LENGTH) if view.tokens.groups[row, i] == token]
                letters = all(view.nucleotides[row, i] >= 0 for i in members)
                if mask.groups[row, token] or not letters:
                    continue
                pooled = torch.stack([features[row, i] for i in members]).mean(0)
                mine = distiller.projectors[0](pooled[None])[0]
                errors.append((mine - target[row, token]).square().sum().item())
            means.append(sum(errors) / len(errors) / (16 if reduction == "mean" else 1))
        assert distiller.alignment(features, view, mask).item() == pytest.approx(np.mean(means), rel=1e-5)


def test_a_student_that_represents_the_teacher_exactly_has_no_alignment_loss() -> None:
    """Features that a linear map turns into the targets: 0, for one layer and for several, with and without
    the norm; a scaled target is no longer matched, so that 0 is not what everything gives."""
    for target_norm in (False, True):
        distiller = _had(layers=(-1,), target_norm=target_norm)
        assert distiller.teacher is not None
        view, mask = _drawn(distiller, _windows())
        (target,) = distiller.teacher.features(view.tokens, visible=mask.visible)
        if target_norm:
            target = F.layer_norm(target, target.shape[-1:])
        turn, _ = torch.linalg.qr(torch.randn(16, 16))
        features = view.tokens.spread(target) @ turn
        linear = next(m for m in distiller.projectors.modules() if isinstance(m, torch.nn.Linear))
        with torch.no_grad():
            linear.weight.copy_(turn)
            linear.bias.zero_()
        assert distiller.alignment(features, view, mask).item() < 1e-9
        assert distiller.alignment(1.5 * features, view, mask).item() > 1e-2


def test_several_layers_are_averaged_with_a_projector_each() -> None:
    teacher = _teacher()
    both = _had(teacher, layers=(1, 2))
    view, mask = _drawn(both, _windows())
    features = torch.randn(4, LENGTH, 16)
    values = []
    for at, layer in enumerate((1, 2)):
        one = _had(teacher, layers=(layer,))
        one.projectors[0].load_state_dict(both.projectors[at].state_dict())
        values.append(one.alignment(features, view, mask))
    torch.testing.assert_close(both.alignment(features, view, mask), torch.stack(values).mean())


def test_reconstruction_divides_by_the_true_number_of_masked_characters() -> None:
    distiller = _had(method="reconstruct_only")
    assert distiller.decoder is not None
    view, mask = _drawn(distiller, _windows(), key=1)
    assert (mask.characters.sum(1) != K * mask.groups.sum(1)).any()  # single letters are among them
    hidden = view.ids.masked_fill(mask.characters, CHARACTERS.mask_id)
    features = distiller.encoder(hidden, attend=view.attend)
    logits = distiller.decoder(features, view.attend & ~mask.characters, mask.characters)
    rows = []
    for row in range(4):
        asked = [i for i in range(LENGTH) if mask.characters[row, i]]
        logs = [logits[row, i].log_softmax(-1)[view.nucleotides[row, i]].item() for i in asked]
        rows.append(-sum(logs) / len(asked))
    got = distiller.losses(view, mask)
    assert got.total.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_a_window_mean_does_not_depend_on_how_windows_are_spread_over_batches() -> None:
    distiller = _had()
    windows = _batch()
    whole = distiller.loss("student", windows, _step(3)).total
    parts = [distiller.loss("student", windows[rows], _step(3)).total for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    where = torch.zeros(2, 3, dtype=torch.bool)
    assert window_mean(torch.zeros(0), where).item() == 0.0


# ---- gradients


@pytest.mark.parametrize("view", ["visible", "full"])
@pytest.mark.parametrize("kind", ["gdn", "cnn", "transformer"])
def test_gradients_reach_all_of_the_student_and_none_of_the_teacher(view: str, kind: str) -> None:
    teacher = _teacher()
    distiller = _had(teacher, encoder=_student(kind), teacher_view=view)
    losses = distiller.loss("student", _batch(), _step())
    letters = distiller.encoder.embedding.weight
    rest = [p for p in distiller.parts.parameters() if p is not letters]
    assert_gradient_only(losses.total, rest, teacher.network)
    (gradient,) = torch.autograd.grad(losses.total, [letters], retain_graph=True)
    used = [CHARACTERS.mask_id, CHARACTERS.n_id, *CHARACTERS.nucleotide_ids]
    assert (gradient[used].abs().sum(1) > 0).all()
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert distiller.frozen() == {"teacher": teacher.network}
    mine = {id(p) for p in distiller.trainable()["student"].parameters()}
    assert mine.isdisjoint({id(p) for p in teacher.network.parameters()})


def test_each_method_trains_its_parts_and_no_others() -> None:
    for method, parts in (
        ("had", {"encoder", "decoder", "projectors"}),
        ("masked_only", {"encoder", "decoder", "projectors"}),
        ("distill_only", {"encoder", "projectors"}),
        ("reconstruct_only", {"encoder", "decoder"}),
    ):
        distiller = _had(method=method)
        assert set(distiller.parts) == parts
        losses = distiller.loss("student", _batch(), _step())
        for part in parts - {"encoder"}:
            assert_gradient(losses.total, list(distiller.parts[part].parameters()))
        assert set(losses.weights) == (
            {"align", "reconstruct"} & {"align" if "projectors" in parts else "", *losses.terms}
        )


def test_gradient_norms_of_both_terms_are_logged_every_so_often() -> None:
    distiller = _had(gradient_every=3, reconstruct_weight=2.0)
    names = {"gradient_align", "gradient_reconstruct"}
    assert names <= set(distiller.loss("student", _batch(), _step(3)).terms)
    assert not names & set(distiller.loss("student", _batch(), _step(4)).terms)
    view, mask = _drawn(distiller, _windows())
    shown = distiller.losses(view, mask, norms=True)
    hidden = view.ids.masked_fill(mask.characters, CHARACTERS.mask_id)
    features = distiller.encoder(hidden, attend=view.attend).detach().requires_grad_()
    (expected,) = torch.autograd.grad(distiller.alignment(features, view, mask), features)
    torch.testing.assert_close(shown.terms["gradient_align"], expected.norm())
    torch.testing.assert_close(
        shown.total, shown.terms["align"] + 2.0 * shown.terms["reconstruct"], check_stride=False
    )
    # Measuring changes no gradient.
    plain = distiller.losses(view, mask)
    weights = list(distiller.parts.parameters())
    for one, two in zip(
        torch.autograd.grad(shown.total, weights, allow_unused=True),
        torch.autograd.grad(plain.total, weights, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two)


# ---- no leak


def _changed(windows: np.ndarray, mask: GroupMask) -> np.ndarray:
    """The same windows with every masked nucleotide replaced by another one."""
    turn = dict(zip(b"ACGT", b"CGTA", strict=True))
    out = windows.copy()
    for row, at in mask.characters.nonzero().tolist():
        out[row, at] = turn[int(out[row, at])]
    return out


@pytest.mark.parametrize("kind", ["gdn", "cnn", "transformer"])
def test_masked_characters_change_neither_alignment_nor_what_is_decoded(kind: str) -> None:
    distiller = _had(encoder=_student(kind))
    assert distiller.decoder is not None
    view, mask = _drawn(distiller, _windows())
    other = view_of(_changed(_windows(), mask), CHARACTERS, KMERS)
    assert not torch.equal(view.ids, other.ids)
    assert torch.equal(view.tokens.groups, other.tokens.groups)
    seen = []
    for batch in (view, other):
        hidden = batch.ids.masked_fill(mask.characters, CHARACTERS.mask_id)
        features = distiller.encoder(hidden, attend=batch.attend)
        logits = distiller.decoder(features, batch.attend & ~mask.characters, mask.characters)
        seen.append((distiller.alignment(features, batch, mask), logits))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    one, two = distiller.losses(view, mask), distiller.losses(other, mask)
    assert one.terms["align"] == two.terms["align"]
    assert one.terms["reconstruct"] != two.terms["reconstruct"]  # the targets did change


def test_a_teacher_that_sees_the_whole_window_does_leak_into_its_targets() -> None:
    """What the test above must be able to find; student and decoder stay blind."""
    distiller = _had(teacher_view="full")
    view, mask = _drawn(distiller, _windows())
    other = view_of(_changed(_windows(), mask), CHARACTERS, KMERS)
    assert distiller.losses(view, mask).terms["align"] != distiller.losses(other, mask).terms["align"]


@pytest.mark.parametrize("kind", ["gdn", "cnn", "transformer"])
def test_no_gradient_comes_from_the_embedding_of_a_masked_character(kind: str) -> None:
    """By gradient: the loss with respect to the embedded input is zero wherever [MASK] hides a letter's own
    embedding, and not zero at visible letters."""
    distiller = _had(encoder=_student(kind))
    view, mask = _drawn(distiller, _windows())
    encoder = distiller.encoder
    letters = encoder.embedding(view.ids).detach().requires_grad_()
    masked = encoder.embedding(torch.full_like(view.ids, CHARACTERS.mask_id)).detach()
    shown = torch.where(mask.characters[..., None], masked, letters)
    features = encoder.encode(shown, attend=view.attend)
    loss = distiller.alignment(features, view, mask)
    assert distiller.decoder is not None
    logits = distiller.decoder(features, view.attend & ~mask.characters, mask.characters)
    loss = loss + F.cross_entropy(logits[mask.characters], view.nucleotides[mask.characters])
    (gradient,) = torch.autograd.grad(loss, letters)
    size = gradient.abs().sum(-1)
    assert (size[mask.characters] == 0).all()
    assert (size[view.attend & ~mask.characters] > 0).all()
    assert (size[~view.attend] == 0).all()  # nor from padding


# ---- controls


def test_masked_only_looks_at_masked_tokens_and_had_at_visible_ones() -> None:
    teacher = _teacher()
    had, masked = _had(teacher, target_norm=False), _had(teacher, method="masked_only", target_norm=False)
    masked.projectors.load_state_dict(had.projectors.state_dict())
    view, mask = _drawn(had, _windows())
    features = torch.randn(4, LENGTH, 16, requires_grad=True)
    for distiller, where in ((had, ~mask.characters), (masked, mask.characters)):
        (gradient,) = torch.autograd.grad(distiller.alignment(features, view, mask), features)
        size = gradient.abs().sum(-1)
        assert (size[~where] == 0).all()
        assert (size[where & mask.letters] > 0).all()


def test_a_shuffled_or_random_teacher_gives_other_targets() -> None:
    teacher = _teacher()
    plain = _had(teacher)
    view, mask = _drawn(plain, _windows())
    features = torch.randn(4, LENGTH, 16)
    values = [plain.alignment(features, view, mask).item()]
    for control in (ShuffledTeacher(teacher, seed=1), RandomTeacher(teacher, seed=1)):
        other = _had(control)
        other.projectors.load_state_dict(plain.projectors.state_dict())
        values.append(other.alignment(features, view, mask).item())
    assert len({round(value, 5) for value in values}) == 3


def test_the_mask_is_another_one_at_every_step_and_for_every_seed() -> None:
    distiller = _had()
    values = [distiller.loss("student", _batch(), _step(i)).total.item() for i in (0, 1, 0)]
    assert values[0] == values[2] != values[1]
    twin = HadDistiller(distiller.encoder, distiller.decoder, distiller.teacher, distiller.config, seed=1)
    twin.projectors.load_state_dict(distiller.projectors.state_dict())
    assert twin.loss("student", _batch(), _step()).total.item() != values[0]


def test_parts_that_do_not_fit_the_method_are_refused() -> None:
    encoder, decoder = _student(), MaskedDecoder(16)
    for method, given_decoder, given_teacher, message in (
        ("had", decoder, None, "needs a teacher"),
        ("had", None, _teacher(), "needs a decoder"),
        ("distill_only", decoder, _teacher(), "takes no decoder"),
        ("reconstruct_only", decoder, _teacher(), "takes no teacher"),
        ("none", None, None, "not one of this distiller"),
    ):
        with pytest.raises(ValueError, match=message):
            HadDistiller(encoder, given_decoder, given_teacher, DistillConfig(method=method))


# ---- the baseline


def _logit(**options: Any) -> LogitDistiller:
    return LogitDistiller(_student(), _teacher(), DistillConfig(method="logit_kd", **options))


def test_logit_distillation_is_its_closed_form() -> None:
    distiller = _logit(temperature=4.0, soft_weight=0.7, mask_ratio=0.4)
    view = view_of(_windows(), CHARACTERS, KMERS)
    mask = seeded_mask(view.tokens, 0.4, tokenizer=KMERS, key=2)
    got = distiller.losses(view, mask)
    student = distiller.head(distiller.encoder(view.ids, attend=view.attend))
    p = (distiller.teacher.nucleotide_log_probs(view.tokens) / 4).softmax(-1)
    kl = 16 * (p * (p.log() - (student / 4).log_softmax(-1))).sum(-1)
    rows = [kl[row][mask.letters[row]].mean().item() for row in range(4)]
    assert got.terms["kl"].item() == pytest.approx(np.mean(rows), rel=1e-4)
    hidden = view.ids.masked_fill(mask.characters, CHARACTERS.mask_id)
    second = distiller.head(distiller.encoder(hidden, attend=view.attend))
    rows = [
        F.cross_entropy(second[row][hard], view.nucleotides[row][hard]).item()
        for row, hard in enumerate(mask.characters)
    ]
    assert got.terms["hard"].item() == pytest.approx(np.mean(rows), rel=1e-4)
    assert got.total.item() == pytest.approx(0.7 * got.terms["kl"].item() + 0.3 * got.terms["hard"].item())


def test_the_reference_copies_what_it_sees_and_forgets_t_squared() -> None:
    view = view_of(_windows(), CHARACTERS, KMERS)
    mask = nothing_masked(view.tokens, tokenizer=KMERS)
    alone, twin = (_logit(soft_weight=1.0, compat=compat) for compat in ("none", "reference"))
    for part in ("encoder", "head"):
        twin.parts[part].load_state_dict(alone.parts[part].state_dict())
    twin.teacher = alone.teacher
    corrected, reference = alone.losses(view, mask), twin.losses(view, mask)
    torch.testing.assert_close(corrected.total, 16 * reference.total)
    assert set(reference.terms) == {"kl"}
    twin.config = replace(twin.config, soft_weight=0.5)
    both = twin.losses(view, mask)
    torch.testing.assert_close(both.terms["kl"], corrected.terms["kl"])
    plain = twin.head(twin.encoder(view.ids, attend=view.attend))
    rows = [
        F.cross_entropy(plain[row][all_], view.nucleotides[row][all_]).item()
        for row, all_ in enumerate(mask.letters)
    ]
    assert both.terms["hard"].item() == pytest.approx(np.mean(rows), rel=1e-4)


def test_logit_distillation_reaches_the_student_and_never_the_teacher() -> None:
    distiller = _logit()
    losses = distiller.loss("student", _batch(), _step())
    assert_gradient(losses.total, list(distiller.head.parameters()))
    assert_gradient(losses.total, list(distiller.encoder.blocks.parameters()))
    assert_no_gradient(losses.total, distiller.teacher.network)
    losses = distiller.loss("student", _batch(), _step())
    twin = _logit(soft_weight=1.0)
    alone = twin.loss("student", _batch(), _step())
    assert set(losses.terms) == {"kl", "hard"}
    assert set(alone.terms) == {"kl"}


# ---- what the optimizer gets


@pytest.mark.parametrize("method", ["had", "distill_only", "reconstruct_only", "logit_kd"])
@pytest.mark.parametrize("rc", [False, True])
def test_pre_training_does_not_decay_the_rates_of_the_recurrence(method: str, rc: bool) -> None:
    encoder = _student(rc_equivariant=rc)
    if method == "logit_kd":
        distiller: Any = LogitDistiller(encoder, _teacher(), DistillConfig(method="logit_kd"))
    else:
        distiller = _had(encoder=encoder, method=method)
    modules = distiller.trainable()["student"]
    optimizer, _ = OptimConfig(weight_decay=0.1).build(modules.parameters(), 10)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    rates = [p for name, p in encoder.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    assert len(rates) == 4
    assert {id(p) for p in kept["params"]} == {id(p) for p in rates}
    assert len(decayed["params"]) + 4 == len(list(modules.parameters()))
