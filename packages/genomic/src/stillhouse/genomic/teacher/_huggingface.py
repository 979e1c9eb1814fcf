"""Masked language models of Hugging Face as teachers: NTv2, ESM layouts, and any other by the same class."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stillhouse.core.errors import DataError, MissingDependencyError
from stillhouse.core.teacher import freeze

from ..tokenizers import KmerTokenizer, KmerTokens
from ._licence import find_licence
from ._marginal import nucleotide_marginals
from ._protocol import check_tokens, count_parameters, layer_indices, shown_ids

Final = Literal["norm", "block"]
_LOADING_FAILS = (
    *(OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, TypeError),
    SafetensorError,
)
_UNUSED = ("contact_head", "pooler", "position_ids", "inv_freq")  # weights that no answer depends on


class HuggingFaceTeacher:
    """A masked language model of transformers, frozen; see `Teacher` for what it answers.

    Which hidden state is the last is a choice, `final`:

    - "norm": what the model itself returns as its last hidden state. In ESM and NTv2 that is after
      `emb_layer_norm_after`, which the JAX release calls the first layer norm of the LM head: both libraries
      return the same tensor, and it is the one to align to (our reading of "final layer").
    - "block": the output of the last block before that norm; for ESM layouts only.

    Args:
        network: a model with a language-modelling head; frozen in place.
        tokenizer: the vocabulary; `starts_with` is put before every window and dropped from what comes back.
        name: for people.
        licence: terms of the weights, or None when they are not known.
        final: see above.

    Raises:
        ValueError: a vocabulary that is larger than the model's, or a `final` that the model does not have.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: KmerTokenizer,
        *,
        name: str,
        licence: str | None = None,
        final: Final = "norm",
    ) -> None:
        if final not in ("norm", "block"):
            raise ValueError(f'final is {final!r}; allowed: "norm", "block"')
        self.config: Any = network.config
        if self.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer has {tokenizer.vocab_size} ids and the model {self.config.vocab_size}; they are "
                "not of one model"
            )
        base = getattr(network, getattr(network, "base_model_prefix", ""), None)
        self._base: nn.Module = base if isinstance(base, nn.Module) else network
        self._last_block = _last_block(self._base)
        if final == "block" and self._last_block is None:
            raise ValueError(
                'final is "block", which needs an ESM layout (encoder.layer, emb_layer_norm_after)'
            )
        self.network, self.tokenizer, self.name, self.licence = freeze(network), tokenizer, name, licence
        self.final = final
        self.width, self.depth = int(self.config.hidden_size), _depth(self.config)
        self.parameters = count_parameters(network)
        self.max_tokens = _limit(self.config, tokenizer)
        self._takes_mask = "attention_mask" in inspect.signature(self._base.forward).parameters

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        licence: str | None = None,
        final: Final = "norm",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HuggingFaceTeacher:
        """Load a model folder, or a name of the Hugging Face hub.

        NTv2 is loaded without its own code (see `_nucleotide_transformer`), and so is every layout that
        transformers knows. The vocabulary must consist of non-overlapping k-mers or of single letters.

        Args:
            source: folder or name.
            trust_remote_code: run the Python code that comes with the model. Read it first; False runs none.
            licence: overrides what the model card says.
            final: see the class.
            device: where the model goes.
            dtype: of its weights.

        Raises:
            DataError: no model there, weights that do not fit the class, a vocabulary without character
                groups.
            MissingDependencyError: transformers is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                "transformers is not installed; run: pip install 'transformers>=5.0'"
            ) from error
        folder = _folder(source, transformers)
        raw = _config(folder)
        tokenizer = KmerTokenizer.from_pretrained(folder)
        log = transformers.logging
        verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()
        log.disable_progress_bar()
        try:
            network, info = _load(folder, raw, transformers, trust_remote_code, dtype)
        except _LOADING_FAILS as error:
            code = (
                ""
                if trust_remote_code or "auto_map" not in raw
                else (
                    ". The model comes with its own code, which was not run; read it and pass "
                    "trust_remote_code=True"
                )
            )
            raise DataError(f"{source}: cannot be loaded ({str(error).splitlines()[0]}){code}") from error
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
        _check_loaded(source, info)
        stated = raw.get("mask_token_id")
        if stated is not None and stated != tokenizer.mask_id:
            raise DataError(
                f"{source}: config.json has the mask token {stated} and the vocabulary {tokenizer.mask_id}; "
                "vocabulary and weights are not of one model"
            )
        names = (str(source), str(raw.get("_name_or_path", "")))
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
        try:
            return cls(
                network.to(device),
                tokenizer,
                name=Path(source).name or folder.resolve().name,
                licence=licence or find_licence(text, raw, names),
                final=final,
            )
        except ValueError as error:
            raise DataError(f"{source}: {error}") from error

    def to(self, device: torch.device | str) -> HuggingFaceTeacher:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _inputs(self, tokens: KmerTokens, visible: Tensor | None) -> dict[str, Tensor]:
        check_tokens(tokens, self.tokenizer, self.max_tokens)
        ids = shown_ids(tokens, visible, self.tokenizer.mask_id)
        attend = tokens.valid
        if self.tokenizer.cls_id is not None:
            first = ids.new_full((len(ids), 1), self.tokenizer.cls_id)
            ids = torch.cat([first, ids], 1)
            attend = torch.cat([torch.ones_like(first, dtype=torch.bool), attend], 1)
        inputs = {"input_ids": ids.to(self._device)}
        if self._takes_mask:
            inputs["attention_mask"] = attend.long().to(self._device)
        return inputs

    def _body(self, values: Tensor) -> Tensor:
        return values if self.tokenizer.cls_id is None else values[:, 1:]

    @torch.no_grad()
    def features(
        self, tokens: KmerTokens, *, visible: Tensor | None = None, layers: Sequence[int] = (-1,)
    ) -> list[Tensor]:
        """See `Teacher.features`."""
        wanted = layer_indices(layers, self.depth)
        inner = any(layer < self.depth for layer in wanted)
        before: list[Tensor] = []
        hook = None
        if self.final == "block" and self._last_block is not None:
            hook = self._last_block.register_forward_hook(
                lambda _module, _inputs, output: before.append(
                    output if isinstance(output, Tensor) else output[0]
                )
            )
        try:
            output = self._base(**self._inputs(tokens, visible), output_hidden_states=inner)
        finally:
            if hook is not None:
                hook.remove()
        states = getattr(output, "hidden_states", None)
        if inner and (states is None or len(states) < self.depth):
            raise ValueError(
                f"layers is {tuple(layers)}, and {self.name} returns "
                f"{'no' if states is None else len(states)} hidden states; only −1 can be asked of it"
            )
        if self.final == "block":
            last = before[-1]
        elif getattr(output, "last_hidden_state", None) is not None:
            last = output.last_hidden_state
        elif states is not None:
            last = states[-1]
        else:
            last = self._base(**self._inputs(tokens, visible), output_hidden_states=True).hidden_states[-1]
        found = [last if states is None or layer == self.depth else states[layer] for layer in wanted]
        return [self._body(values).float() for values in found]

    @torch.no_grad()
    def nucleotide_log_probs(self, tokens: KmerTokens, *, visible: Tensor | None = None) -> Tensor:
        """See `Teacher.nucleotide_log_probs`."""
        logits = self._body(self.network(**self._inputs(tokens, visible)).logits)
        return nucleotide_marginals(logits, tokens.to(logits.device), self.tokenizer)

    def untrained(self, seed: int) -> HuggingFaceTeacher:
        """The same architecture with fresh weights, as its class initialises them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(self.network)(self.config)
        dtype = next(self.network.parameters()).dtype
        return HuggingFaceTeacher(
            fresh.to(device=self._device, dtype=dtype),
            self.tokenizer,
            name=f"untrained {self.name}",
            final=self.final,
        )


def _folder(source: str | os.PathLike[str], transformers: Any) -> Path:
    """The folder of a model, downloaded into the cache of Hugging Face where `source` is a name."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise DataError(
            f"{source}: no such folder; give the folder of a model, or its name on the hub (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.safetensors", "*.py", "README.md"]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"{source}: no such folder, and as a name of the hub it cannot be downloaded ("
            f"{str(error).splitlines()[0]}); download the model where there "
            "is a network and give its folder"
        ) from error
    return folder


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the folder of a whole model") from error
    return found


def _load(
    folder: Path, raw: Mapping[str, Any], transformers: Any, trust: bool, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Network and what loading it reports."""
    if "add_bias_fnn" in raw and not trust:
        from ._nucleotide_transformer import NucleotideTransformerV2

        kept = {key: value for key, value in raw.items() if key not in ("auto_map", "model_type")}
        config = transformers.EsmConfig(**{**kept, "architectures": None})
        loaded: Any = NucleotideTransformerV2.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    else:
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, trust_remote_code=trust, dtype=dtype, output_loading_info=True
        )
    return loaded[0], loaded[1]


def _check_loaded(source: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Refuse weights that were made up or left over; transformers only logs them."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        names = [k if isinstance(k, str) else k[0] for k in info.get(key, ())]
        names = sorted(n for n in names if not any(part in n for part in _UNUSED))
        if names:
            raise DataError(
                f"{source}: the checkpoint {what} {len(names)} weights, such as {names[0]}, so the model "
                "would be partly random; give the folder of a whole masked language model"
            )
    left = sorted(n for n in info.get("unexpected_keys", ()) if not any(part in n for part in _UNUSED))
    left = [n for n in left if "position_embeddings" not in n]
    if left:
        raise DataError(
            f"{source}: {len(left)} weights of the checkpoint have no place in the model, such as {left[0]}; "
            "it is of another architecture than its config.json says"
        )


def _last_block(base: nn.Module) -> nn.Module | None:
    encoder = getattr(base, "encoder", None)
    layers = getattr(encoder, "layer", None)
    if isinstance(layers, nn.ModuleList) and hasattr(encoder, "emb_layer_norm_after"):
        return layers[-1]
    return None


def _depth(config: Any) -> int:
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ValueError("the model's configuration names no number of layers (num_hidden_layers)")


def _limit(config: Any, tokenizer: KmerTokenizer) -> int | None:
    """Tokens of a window that fit beside [CLS]; ESM and RoBERTa count positions from the pad id + 1."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if getattr(config, "model_type", "") in ("esm", "roberta", "xlm-roberta", "camembert"):
        positions -= tokenizer.pad_id + 1
    return positions - (0 if tokenizer.cls_id is None else 1)
