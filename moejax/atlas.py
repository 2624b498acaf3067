"""What the experts of a checkpoint did: numbers, tokens and texts in one file. No JAX.

Dims besides those of the package docstring: L counts the MoE layers, E the choices of the widest
layer (free experts too), D domains, P the tenths of a document, W tokens kept of an expert,
N the tokens that have a text here.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.errors import ConfigError, file_error
from moejax.foreign import no_links, open_file

FORMAT = 2  # of the file
PARTS = 10  # of a document
TOP = 12  # tokens that are kept of an expert
SNIPPETS = 3  # contexts that are kept of an expert


class Snippet(NamedTuple):
    """A token that an expert took, in its context: text[start:end]."""

    layer: int  # in 0 .. L - 1
    expert: int
    text: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenView:
    """What every MoE layer did with the tokens of one text.

    Attributes:
        name: what to call the text.
        tokens: T texts; together they are the text.
        expert_ltk: int [L, T, K]; -1 for none, and for a choice that was dropped.
        weight_ltk: float [L, T, K]; combine weights, 0 where the expert is -1.
        loss_t: float [T]; nats of each token given those before it, NaN for the first.
    """

    name: str
    tokens: tuple[str, ...]
    expert_ltk: np.ndarray
    weight_ltk: np.ndarray
    loss_t: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """What the experts of one checkpoint did with the validation text, dropless.

    Layers with fewer experts than E have zeros behind them. All assignments count alike, whatever
    their weight.

    Attributes:
        step: of the checkpoint.
        layers_l: int [L]; the MoE layers' numbers in the model.
        experts_l: int [L]; the experts of each layer, E at most.
        domains: D names.
        tokens: tokens that were routed, padding apart.
        load_dle: int [D, L, E]; assignments by domain.
        load_ple: int [P, L, E]; assignments by tenth of the document that the token is in.
        coactivation_lee: int [L, E, E]; tokens that both experts took; the diagonal is the
            expert's own count.
        information_l: float [L]; mutual information of domain and expert, nats, less what it
            would be by chance. See `tallies.information`.
        norm_le: float [L, E]; mean over the expert's tokens of |weight * output|; NaN without any.
        removed_le: float [L, E]; what the mean loss over all tokens rises by, nats, when the
            expert's output is left out and the weights of the others stay; NaN where that was
            not measured.
        removed_own_le: the same over the tokens that take the expert in the whole model.
        removed_other_le: the same over those that do not.
        top_token_lew: int [L, E, W]; ids of the tokens that an expert takes most over chance, -1
            behind the last.
        top_lift_lew: float [L, E, W]; how many times over chance: its share of the expert's
            assignments over its share of all of the layer's.
        top_count_lew: int [L, E, W]; the token's assignments to the expert.
        text_ids_n: int [N]; ascending ids of all tokens in `top_token_lew`.
        top_text: N texts.
        snippets: up to `SNIPPETS` an expert, by layer and expert.
        saturation_steps: int [S]; earlier checkpoints.
        saturation_sl: float [S, L]; the share of the choices here that were already chosen there.
        views: texts, token by token.
        notes: what of this the router does not define, or was not measured, one sentence each.
        run: id of the run; "" for a model that is of no checkpoint.
        checkpoint: the digest of its manifest: a run that went back has another at the same step.
    """

    step: int
    layers_l: np.ndarray
    experts_l: np.ndarray
    domains: tuple[str, ...]
    tokens: int
    load_dle: np.ndarray
    load_ple: np.ndarray
    coactivation_lee: np.ndarray
    information_l: np.ndarray
    norm_le: np.ndarray
    removed_le: np.ndarray
    removed_own_le: np.ndarray
    removed_other_le: np.ndarray
    top_token_lew: np.ndarray
    top_lift_lew: np.ndarray
    top_count_lew: np.ndarray
    text_ids_n: np.ndarray
    top_text: tuple[str, ...]
    snippets: tuple[Snippet, ...] = ()
    saturation_steps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    saturation_sl: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    views: tuple[TokenView, ...] = ()
    notes: tuple[str, ...] = ()
    run: str = ""
    checkpoint: str = ""

    def __post_init__(self):
        if self.saturation_sl.size == 0:  # the default knows no L
            empty_sl = np.zeros((len(self.saturation_steps), len(self.layers_l)), np.float32)
            object.__setattr__(self, "saturation_sl", empty_sl)
        sizes = {"s": len(self.saturation_steps), "n": len(self.top_text)}
        sizes |= {"d": len(self.domains), "l": len(self.layers_l), "p": PARTS}
        for name in _ARRAYS:
            _check_dims(name, getattr(self, name), sizes)
        for view in self.views:
            own = {"l": sizes["l"], "t": len(view.tokens)}
            for name in _VIEW_ARRAYS:
                _check_dims(f"views[{view.name!r}].{name}", getattr(view, name), own)

    def text(self, token: int) -> str:
        """Returns the text of one of the tokens in `top_token_lew`."""
        index = np.searchsorted(self.text_ids_n, token)
        if index == len(self.text_ids_n) or self.text_ids_n[index] != token:
            raise KeyError(f"token {token} is none of the atlas's {len(self.text_ids_n)}")
        return self.top_text[index]


_VIEW_ARRAYS = ("expert_ltk", "weight_ltk", "loss_t")
_TEXTS = ("step", "tokens", "domains", "top_text", "snippets", "notes", "run", "checkpoint")
_ARRAYS = tuple(
    field.name for field in dataclasses.fields(Atlas) if field.name not in (*_TEXTS, "views")
)


def _check_dims(name: str, value: np.ndarray, sizes: dict[str, int]) -> None:
    """Checks an array by the letters of its name, and learns the sizes of new letters."""
    dims = "s" if name == "saturation_steps" else name.rsplit("_", 1)[1]
    if value.ndim != len(dims):
        raise ValueError(f"{name} has shape {value.shape}; it needs the dims [{', '.join(dims)}]")
    for dim, size in zip(dims, value.shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise ValueError(f"{name} has shape {value.shape}; {dim} is {sizes[dim]} elsewhere")


def save_atlas(atlas: Atlas, file: str | os.PathLike) -> None:
    """Writes an atlas as one compressed `.npz`; a reader sees the whole of it or nothing.

    Raises:
        ConfigError: it cannot be written; a NoSpaceError where the disk is full.
    """
    file = Path(file)
    entries = {name: getattr(atlas, name) for name in _ARRAYS}
    for i, view in enumerate(atlas.views):
        entries |= {f"view_{i}_{name}": getattr(view, name) for name in _VIEW_ARRAYS}
    texts = {name: getattr(atlas, name) for name in _TEXTS}
    texts |= {"format": FORMAT, "views": [(view.name, view.tokens) for view in atlas.views]}
    entries["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb", opener=no_links) as stream:
                np.savez_compressed(stream, allow_pickle=False, **entries)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{file} cannot be written: {reason}; give the workdir room and the right to it"
        raise file_error(message, error) from None


# what numpy, json and zipfile raise for a file that is not what was written
_DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, NotImplementedError)
_DAMAGE += (zipfile.BadZipFile, zlib.error)


def load_atlas(file: str | os.PathLike) -> Atlas:
    """Returns the atlas of a file.

    Raises:
        ConfigError: there is none, or it is damaged or of another format.
    """
    remedy = "write it with `moejax inspect --workdir W`"
    try:
        with open_file(file) as stream, np.load(stream, allow_pickle=False) as stored:
            texts = json.loads(stored["texts"].tobytes())
            if texts["format"] != FORMAT:
                raise ValueError(f"it has format {texts['format']}, and this reads {FORMAT}")
            return _atlas(texts, stored)
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; {remedy}") from None
    except _DAMAGE as error:
        raise ConfigError(f"{file} is not an atlas that can be read ({error}); {remedy}") from None


def _atlas(texts: dict, stored) -> Atlas:
    views = tuple(
        TokenView(name, tuple(tokens), *(stored[f"view_{i}_{field}"] for field in _VIEW_ARRAYS))
        for i, (name, tokens) in enumerate(texts["views"])
    )
    return Atlas(
        step=texts["step"],
        tokens=texts["tokens"],
        domains=tuple(texts["domains"]),
        top_text=tuple(texts["top_text"]),
        notes=tuple(texts["notes"]),
        run=texts["run"],
        checkpoint=texts["checkpoint"],
        snippets=tuple(Snippet(*row) for row in texts["snippets"]),
        views=views,
        **{name: stored[name] for name in _ARRAYS},
    )
