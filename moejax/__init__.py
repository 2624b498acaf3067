"""moejax: train sparse mixture-of-experts models in JAX.

Dims are letters, the same in names, einsums and docs:

    B batch (sequences)   T tokens of a sequence   D model width     V vocabulary
    L layers              H query heads            N key/value heads K head width
    E experts             F expert hidden width    S selected experts of a token (top-k)
    C capacity: slots of an expert in one group    G capacity groups
    A assignments of tokens to experts, T * S      R rows of a buffer
    Z devices that the experts are split over

An array that crosses a function carries its dims as a suffix: `x_btd`, `expert_ts`, `buf_ecd`.
Inside a per-sequence or per-device scope `t` runs over every token in that scope. In `latent.py`
C, Q and R are the widths of the latents, of the compressed queries and of RoPE.

Importing `moejax` does not import JAX: the command line must answer before that.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else on first use, by `__getattr__`
    from moejax.config import Config, MoEConfig, default_config
    from moejax.loss import load_balancing_loss, router_z_loss
    from moejax.moe import MoE

__version__ = "0.1.0"

_EXPORTS = {
    "MoE": "moejax.moe",
    "load_balancing_loss": "moejax.loss",
    "router_z_loss": "moejax.loss",
    "Config": "moejax.config",
    "MoEConfig": "moejax.config",
    "default_config": "moejax.config",
}
__all__ = [
    "Config",
    "MoE",
    "MoEConfig",
    "__version__",
    "default_config",
    "load_balancing_loss",
    "router_z_loss",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
