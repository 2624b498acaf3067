"""The config: frozen dataclasses that validate themselves. Nothing here imports JAX.

A config file sees the same fields as an `ml_collections.ConfigDict` (`default_config()`);
`overrides.py` turns that, and the command line, back into a `Config`. Every default lives here.
"""

import dataclasses
import functools
import math
from typing import Literal

from ml_collections import ConfigDict

from moejax.errors import ConfigError as ConfigError  # where callers look for it
from moejax.errors import (
    require,
    require_above_zero,
    require_finite,
    require_positive,
    require_read,
)
from moejax.moe_config import MoEConfig, Stack
from moejax.watch_config import COLLAPSE_LIMITS, WatchConfig

# A key of the model that is listed here is read by this kind of attention only.
READ_BY_ATTENTION = {
    **dict.fromkeys(("num_kv_heads", "head_dim", "qk_norm"), "grouped"),
    **dict.fromkeys(("attention_bias", "attention_sinks"), "grouped"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), "latent"),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), "latent"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, attention with RoPE, SwiGLU."""

    num_layers: int = 4  # dense and MoE layers together
    d_model: int = 128  # width of the residual stream
    # grouped-query attention, or multi-head latent attention (DeepSeek-V2)
    attention: Literal["grouped", "latent"] = "grouped"
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # grouped: key and value heads
    head_dim: int = 32  # grouped: width of a head
    q_lora_rank: int = 96  # latent: width of the compressed queries
    kv_lora_rank: int = 64  # latent: width of the compressed keys and values
    qk_nope_head_dim: int = 32  # latent: width of a head's query and key without RoPE
    qk_rope_head_dim: int = 16  # latent: further width with RoPE, whose key all heads share
    v_head_dim: int = 32  # latent: width of a head's value
    attention_bias: bool = False  # a bias for queries, keys, values and output
    attention_sinks: bool = False  # a learned logit per head that takes part of each softmax
    attention_window: int | None = None  # tokens that a layer sees, its own included; None: all
    full_attention_every: int | None = None  # of layers with a window, every n-th sees all tokens
    dense_hidden: int = 512  # hidden width of the layers that are not MoE
    vocab_size: int = 264  # at least the tokenizer's; the byte tokenizer has 257 ids
    tie_embeddings: bool = False  # use the embedding as the unembedding too
    qk_norm: bool = True  # grouped: normalise queries and keys
    rope_theta: float = 10_000.0  # base of the wavelengths of RoPE
    # what the backward pass computes again instead of keeping (attention scores always): "full"
    # also repeats the exchange of tokens with the experts' devices; "exchange" keeps what that
    # delivered, and the matrices of dense layers that were gathered over fsdp
    remat: Literal[
        "none",
        "full",
        "dots",
        "dots_with_no_batch_dims",
        "exchange",
        "exchange_and_dots_with_no_batch_dims",
    ] = "none"
    loss_chunk: int | None = 1024  # tokens of a device whose logits exist at once; None: all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters (master weights)

    def __post_init__(self):
        require_positive(
            "model",
            self,
            "num_layers",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "attention_window",
            "full_attention_every",
            "dense_hidden",
            "vocab_size",
            "loss_chunk",
        )
        self._check_attention_reads()
        require(
            self.attention == "latent" or self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}; every key/value head serves the same number "
            "of query heads",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs, use an even width",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim={self.qk_rope_head_dim} is odd; RoPE rotates pairs, use an "
            "even width",
        )
        require(
            math.isfinite(self.rope_theta) and self.rope_theta > 1,
            f"model.rope_theta={self.rope_theta} must be a finite number above 1; 10000.0 is usual",
        )

    def _check_attention_reads(self) -> None:
        """Refuses a key that was set and that the attention would ignore."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, kind in READ_BY_ATTENTION.items():
            value = getattr(self, name)
            require(
                self.attention == kind or value == defaults[name],
                f"model.{name}={value} is not read by model.attention={self.attention!r}; leave it "
                f"at {defaults[name]}, or use model.attention={kind}",
            )
        every = self.full_attention_every
        require(
            every is None or self.attention_window is not None,
            f"model.full_attention_every={every} is not read without a window; leave it at None, "
            "or give model.attention_window, for example 128",
        )
        require(
            every is None or 2 <= every <= self.num_layers,
            f"model.full_attention_every={every} of model.num_layers={self.num_layers} gives "
            "a window to all layers or to none; use 2 up to model.num_layers, or leave out "
            "model.full_attention_every or model.attention_window",
        )

    @property
    def qk_width(self) -> int:
        """Width of a head's query and key."""
        if self.attention == "latent":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    @property
    def v_width(self) -> int:
        """Width of a head's value."""
        return self.v_head_dim if self.attention == "latent" else self.head_dim

    @property
    def num_full_layers(self) -> int:
        """Layers that see all earlier tokens, not a window of them."""
        if self.attention_window is None:
            return self.num_layers
        every = self.full_attention_every
        return 0 if every is None else self.num_layers // every


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: the texts that moejax brings, or a folder of `moejax prepare`."""

    source: Literal["embedded", "prepared"] = "embedded"  # moejax's own texts, or yours
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json or a SentencePiece model
    sequence_length: int = 256  # tokens of a sequence
    path: str | None = None  # folder of the prepared data
    # a damaged part of prepared data: end the run, or put padding in place of the sequence
    on_corrupt: Literal["stop", "skip"] = "stop"
    timeout_seconds: float = 300.0  # a batch that takes longer ends the run

    def __post_init__(self):
        require(
            self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} is below 2; a sequence needs a token "
            "and a target",
        )
        require_positive("data", self, "sequence_length")
        require(
            (self.source == "prepared") == (self.path is not None),
            f"data.source={self.source!r} with data.path={self.path!r}: data.source=prepared "
            "needs data.path, and no other source reads it",
        )
        require(
            self.source == "prepared" or self.on_corrupt == "stop",
            f"data.on_corrupt={self.on_corrupt!r} is not read by data.source={self.source!r}; "
            "leave it at 'stop', or use data.source=prepared",
        )
        require_above_zero("data", self, "timeout_seconds")


# A key that is listed here is read by these optimizers only.
OPTIM_READ_BY: dict[str, tuple[str, ...]] = {
    "state_dtype": ("adamw", "lion", "muon"),  # Adafactor keeps sums of rows and columns, float32
    "b1": ("adamw", "lion", "muon"),
    "b2": ("adamw", "lion", "muon"),
    "eps": ("adamw", "muon"),
    "momentum": ("muon",),
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Weight decay acts on matrices only, never on norms, biases or the router.

    A stack of layers or experts is not one parameter: each matrix in it is optimized by itself.
    `muon` is for matrices between layers, and AdamW with the same rate for all else: embeddings,
    norms, biases and routers. `adafactor` multiplies the rate by the size of the parameter.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # see design.md
    learning_rate: float = 3e-3  # the peak, at the end of warmup
    warmup_steps: int = 100  # over which the rate rises linearly to its peak
    weight_decay: float = 0.1  # decoupled, times the learning rate; of matrices only
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of squared gradients; lion: of the momentum
    eps: float = 1e-8  # added to denominators
    momentum: float = 0.95  # muon: decay of the momentum of matrices
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # of moments; computed in float32
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the rate, after warmup
    final_fraction: float = 0.1  # rate at the last step, as a fraction of the peak

    def __post_init__(self):
        require_finite(
            "optim", self, "learning_rate", "warmup_steps", "weight_decay", "final_fraction"
        )
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(
                0 <= value < 1, f"optim.{name}={value} is outside [0, 1); 0.9 and 0.95 are usual"
            )
            # 8 bits of a number: what moves a moment by less than 1 part in 256 is rounded away, at
            # 0.98 a gradient whose square is off the moment by less than a fifth
            require(
                self.state_dtype == "float32" or value <= 0.98,
                f"optim.{name}={value} with optim.state_dtype={self.state_dtype!r}: a step changes "
                "the moment by less than bfloat16 can hold, so it would never change; use at most "
                "0.98, or optim.state_dtype=float32",
            )
        for name in ("eps", "clip_norm"):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"optim.{name}={value} must be a finite number above 0",
            )
        self._check_reads()

    def _check_reads(self) -> None:
        """Refuses a key that was set and that the optimizer would ignore."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, readers in OPTIM_READ_BY.items():
            value = getattr(self, name)
            require_read(
                self.name in readers or value == defaults[name],
                f"optim.{name}",
                f"optim.{name}={value} is not read by optim.name={self.name!r}; leave it at "
                f"{defaults[name]}, or use {' or '.join(readers)}",
            )
        fraction, usual = self.final_fraction, defaults["final_fraction"]
        require_read(
            self.schedule != "constant" or fraction == usual,
            "optim.final_fraction",
            f"optim.final_fraction={fraction} is not read by optim.schedule='constant'; leave it "
            f"at {usual}, or use optim.schedule=linear",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and on batches of which size."""

    steps: int = 1000  # optimizer steps of the whole run, warmup included
    batch_size: int = 16  # sequences of a step, over all devices
    accumulation: int = 1  # microbatches that a step is split into
    replay: str | None = None  # workdir of a run whose choices of experts are used again

    def __post_init__(self):
        require_positive("train", self, "steps", "batch_size", "accumulation")
        require(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size={self.batch_size} is not a multiple of "
            f"train.accumulation={self.accumulation}; microbatches have equal size",
        )


AXES = ("data", "fsdp", "expert_fsdp", "expert", "context", "tensor")
FSDP_AXES = ("fsdp", "expert_fsdp")  # that split the matrices outside of experts
EXPERT_AXES = ("expert_fsdp", "expert")  # that split the experts
TOKEN_AXES = ("data", "fsdp", "expert_fsdp", "expert")  # that split sequences


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. At most one may be None: it takes the remaining devices."""

    data: int | None = None  # splits the batch and nothing else
    fsdp: int | None = 1  # splits the batch and every matrix, an expert's too; gathered before use
    expert: int | None = 1  # splits the batch and the experts; all else is whole on each device
    context: int | None = 1  # splits every sequence: for those too long for a device
    tensor: int | None = 1  # splits heads, hidden widths and the vocabulary
    expert_fsdp: int | None = 1  # splits the experts as `expert` does, and all else as `fsdp` does

    def __post_init__(self):
        require_positive("mesh", self, *AXES)
        free = [axis for axis in AXES if getattr(self, axis) is None]
        require(
            len(free) <= 1,
            f"mesh.{' and mesh.'.join(free)} are all None; at most one axis can take the devices "
            "that are left",
        )

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Returns the mesh with every size known, for `num_devices` devices.

        Raises:
            ConfigError: the sizes do not multiply to `num_devices`.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        product = math.prod(size for size in sizes.values() if size is not None)
        asked = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n != 1) or "data 1"
        require(
            product <= num_devices,
            f"mesh {asked} needs {product} devices (available: {num_devices}); make an axis "
            f"smaller, or on a CPU give --cpu_devices {product}",
        )
        free = [axis for axis in AXES if sizes[axis] is None]
        require(
            num_devices % product == 0 and (bool(free) or product == num_devices),
            f"mesh {asked} uses {product} devices (available: {num_devices}); sizes must multiply "
            f"to {num_devices}: set one axis to None to take the remaining devices",
        )
        for axis in free:
            sizes[axis] = num_devices // product
        return MeshConfig(**sizes)

    def check_slices(self, slices: int) -> None:
        """Checks that only `data` spans that many TPU slices; every size is known.

        Raises:
            ConfigError: another axis would have to.
        """
        assert self.data is not None
        sizes = ((axis, getattr(self, axis)) for axis in AXES[1:])
        inner = " x ".join(f"{axis} {n}" for axis, n in sizes if n > 1)
        require(
            self.data % slices == 0,
            f"mesh.data={self.data} is not a multiple of the {slices} TPU slices: only data spans "
            f"the network between slices, and {inner} has to fit into the "
            f"{self.num_devices // slices} devices of one; use mesh.data={slices} or a multiple",
        )

    @property
    def num_devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def token_shards(self) -> int:
        """Into how many parts a batch of sequences is split."""
        return math.prod(getattr(self, axis) for axis in TOKEN_AXES)

    @property
    def expert_degree(self) -> int:
        """Z, the devices that the experts are split over."""
        return math.prod(getattr(self, axis) for axis in EXPERT_AXES)

    @property
    def fsdp_degree(self) -> int:
        """The devices that a matrix outside of experts is split over, tensor aside."""
        return math.prod(getattr(self, axis) for axis in FSDP_AXES)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, where, and which checkpoints to keep."""

    every: int = 100  # steps between saves
    keep: int = 2  # how many of the last checkpoints stay, besides the best by validation loss
    local: str | None = None  # folder on a fast disk for more frequent saves; the last one stays
    local_every: int | None = None  # steps between local saves; every process must see the folder
    wait_seconds: float = 60.0  # saves are left out after waiting so long for the one before

    def __post_init__(self):
        require_positive("checkpoint", self, "every", "keep", "local_every")
        require_finite("checkpoint", self, "wait_seconds")
        require(
            (self.local is None) == (self.local_every is None),
            f"checkpoint.local={self.local} and checkpoint.local_every={self.local_every} go "
            "together; give both, or neither",
        )

    def saves_locally(self, step: int) -> bool:
        """Returns whether a local save is due after `step` finished steps."""
        return self.local_every is not None and step % self.local_every == 0


_LONGEST = 1e9


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds without progress after which a process ends, to be restarted; None: never."""

    step_seconds: float | None = 600.0  # for a step, and for waiting for its batch
    # for each slow thing: making or restoring the state, compiling, evaluating, saving
    slow_seconds: float | None = 7200.0

    def __post_init__(self):
        require_above_zero("watchdog", self, "step_seconds", "slow_seconds")
        for name in ("step_seconds", "slow_seconds"):
            value = getattr(self, name)
            require(
                value is None or value <= _LONGEST,
                f"watchdog.{name}={value} is above {_LONGEST:g} s, 31 years, which the clock of a "
                "thread does not take; use None for no limit",
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate while training, and on how much of the validation split."""

    every: int | None = 100  # steps between evaluations; None: only after the last step
    batches: int | None = 8  # batches of the validation split, evenly spread; None: all

    def __post_init__(self):
        require_positive("eval", self, "every", "batches")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What a run writes while it trains."""

    every: int = 10  # steps between lines of metrics
    choices: bool = False  # also store the experts of every token of every step, for train.replay

    def __post_init__(self):
        require_positive("logging", self, "every")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training, in sections."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    eval: EvalConfig = EvalConfig()
    logging: LoggingConfig = LoggingConfig()
    watch: WatchConfig = WatchConfig()
    seed: int = 0  # of first parameters, order of the data, and routers that draw

    def __post_init__(self):
        require(
            0 <= self.seed < 2**32,
            f"seed={self.seed} is outside [0, 2**32); use a non-negative whole number below "
            "4294967296",
        )
        if self.moe.every is not None:
            self._check_runs(self.moe.every)
            self._check_causal()
        self._check_groups()
        self._check_by_layer()
        self._check_watch()
        self._check_choices()

    def _check_runs(self, every: int) -> None:
        """Checks that the layers after the first dense ones are whole runs of `every` layers."""
        layers, first_dense = self.model.num_layers, self.moe.first_dense
        rest = layers - first_dense
        require(
            rest >= every and rest % every == 0,
            f"model.num_layers={layers} minus moe.first_dense={first_dense} is {rest}, not a "
            f"positive multiple of moe.every={every}; the layers after the first dense ones come "
            "in runs of moe.every",
        )

    def _check_causal(self) -> None:
        reason = self.moe.noncausal_reason
        require(
            reason is None or self.moe.allow_noncausal,
            f"{reason}; a decoder trained this way reads ahead, and its loss means nothing for "
            "generation. Use another one, or moe.allow_noncausal=True to study it",
        )

    def _check_groups(self) -> None:
        """Checks that a microbatch is whole capacity groups."""
        microbatch, group = self.microbatch_size, self.moe.group_sequences
        require(
            microbatch % group == 0,
            f"a microbatch of {microbatch} sequences (train.batch_size / train.accumulation) is "
            f"not a multiple of moe.group_sequences={group}; it must hold whole capacity groups",
        )

    def _check_by_layer(self) -> None:
        """Checks that lists by layer have a number for each MoE layer of the model."""
        model, moe = self.model, self.moe
        for name in ("num_experts_by_layer", "expert_hidden_by_layer"):
            by_layer = getattr(moe, name)
            require(
                by_layer is None or moe.every is not None,
                f"moe.{name}={by_layer} and moe.every=None, which has no MoE layer; leave one out",
            )
            require(
                by_layer is None or len(by_layer) == self.num_moe_layers,
                f"moe.{name}={by_layer} has a number for {len(by_layer or ())} MoE layers and the "
                f"model has {self.num_moe_layers} (model.num_layers={model.num_layers}, "
                f"moe.first_dense={moe.first_dense}, moe.every={moe.every}); give one for each",
            )

    def _check_watch(self) -> None:
        """Refuses what watches a router that is not there, and passing over batches in a replay."""
        watch, usual = self.watch, WatchConfig()
        for name in ("collapse", "collapse_steps", *COLLAPSE_LIMITS):
            value, default = getattr(watch, name), getattr(usual, name)
            require(
                self.moe.every is not None or value in (default, "off"),
                f"watch.{name}={value} and moe.every=None, which has no router to watch; leave it "
                f"at {default}",
            )
        passes = "watch.skip_batches" if watch.skip_batches else "rollback"
        require(
            self.train.replay is None or not (watch.skip_batches or "rollback" in watch.policies),
            f"train.replay={self.train.replay} repeats the choices recorded for each batch, but "
            f"{passes} gives steps other batches; leave one out",
        )

    def _check_choices(self) -> None:
        """Refuses to record or to replay choices where there are none."""
        chooses = self.moe.every is not None and self.moe.router != "soft"
        why = f"moe.every={self.moe.every} and moe.router={self.moe.router!r}"
        require_read(
            chooses or self.train.replay is None,
            "train.replay",
            f"train.replay={self.train.replay} with {why}: no token chooses an expert, so nothing "
            "can be replayed; leave it out, or use another router",
        )
        require_read(
            self.moe.every is not None or not self.logging.choices,
            "logging.choices",
            "logging.choices=True with moe.every=None, which has no MoE layer; leave it out",
        )

    def moe_stacks(self) -> "tuple[tuple[Stack, Config], ...]":
        """Returns the MoE layers in stacks of consecutive layers that are alike, in order.

        With each stack the config as if all MoE layers were like those of the stack.
        """
        stacks = self.moe.stacks(self.num_moe_layers) if self.num_moe_layers else ()
        return tuple((stack, dataclasses.replace(self, moe=stack.config)) for stack in stacks)

    @property
    def microbatch_size(self) -> int:
        """Sequences of a microbatch, over all devices."""
        return self.train.batch_size // self.train.accumulation

    @property
    def num_moe_layers(self) -> int:
        """How many layers are MoE; 0 for a dense model."""
        if self.moe.every is None:
            return 0
        return (self.model.num_layers - self.moe.first_dense) // self.moe.every

    @property
    def num_dense_layers(self) -> int:
        """How many layers are not MoE."""
        return self.model.num_layers - self.num_moe_layers

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Checks that this model and its training batch can be laid out on `mesh`.

        Args:
            mesh: with its sizes known.

        Raises:
            ConfigError: an axis does not divide what it splits.
        """
        self.check_model_fits(mesh)
        self.check_batch_fits(mesh)

    def check_model_fits(self, mesh: MeshConfig) -> None:
        """Checks that the parameters can be split over `mesh`; see `check_mesh`."""
        model, moe = self.model, self.moe
        divides = functools.partial(_require_divisible, mesh)
        tensor = ("tensor",)
        divides(("context",), "data.sequence_length", self.data.sequence_length)
        require(
            mesh.context == 1 or moe.every is None or moe.router != "soft",
            f"mesh.context={mesh.context} splits sequences, but moe.router='soft' mixes all tokens "
            "of one; use mesh.context=1 or another moe.router",
        )
        if moe.every is not None:
            for axes, name in ((EXPERT_AXES, "moe.num_experts"), (tensor, "moe.expert_hidden")):
                by_layer = getattr(moe, f"{name.removeprefix('moe.')}_by_layer")
                if by_layer is None:
                    divides(axes, name, getattr(moe, name.removeprefix("moe.")))
                for layer, value in enumerate(by_layer or ()):
                    divides(axes, f"{name}_by_layer[{layer}]", value)
        if self.num_dense_layers:
            divides(tensor, "model.dense_hidden", model.dense_hidden)
        divides(tensor, "model.num_heads", model.num_heads)
        if model.attention == "latent":
            for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
                divides(tensor, f"model.{name}", getattr(model, name))
            for name in ("q_lora_rank", "kv_lora_rank"):
                divides(FSDP_AXES, f"model.{name}", getattr(model, name))
        else:
            divides(tensor, "model.num_kv_heads", model.num_kv_heads)
        divides(tensor, "model.vocab_size", model.vocab_size)
        divides(FSDP_AXES, "model.d_model", model.d_model)

    def check_batch_fits(self, mesh: MeshConfig) -> None:
        """Checks that a microbatch splits into whole groups on `mesh`; see `check_mesh`."""
        moe, microbatch = self.moe, self.microbatch_size
        unit = mesh.token_shards * moe.group_sequences
        sizes = ((axis, getattr(mesh, axis)) for axis in TOKEN_AXES)
        split = " x ".join(f"{axis} {n}" for axis, n in sizes if n > 1) or "data 1"
        require(
            microbatch % unit == 0,
            f"train.batch_size={self.train.batch_size} over "
            f"train.accumulation={self.train.accumulation} gives microbatches of {microbatch} "
            f"sequences, not a multiple of {unit} = {split} x moe.group_sequences "
            f"{moe.group_sequences}; use "
            "train.batch_size="
            f"{max(1, round(microbatch / unit)) * unit * self.train.accumulation} or a smaller "
            "mesh",
        )


def _require_divisible(mesh: MeshConfig, axes: tuple[str, ...], name: str, value: int) -> None:
    """Checks that the mesh axes together divide the value of a key."""
    split = {axis: getattr(mesh, axis) for axis in axes if getattr(mesh, axis) > 1}
    size, several = math.prod(split.values()), len(split) > 1
    sizes = " x ".join(f"{axis} {n}" for axis, n in split.items())
    named = f"axes {sizes}" if several else f"{''.join(split)} axis"
    hint = _divisor_hint(value, size) + (" in all" if several else "")
    require(
        value % size == 0,
        f"{name}={value} is not divisible by the {named} ({size}); use a multiple of {size} or "
        f"another mesh.{' or mesh.'.join(split)}{hint}",
    )


def _divisor_hint(value: int, size: int) -> str:
    """Returns the largest smaller size that divides `value`, as a piece of a sentence."""
    divisors = [d for d in range(1, size) if value % d == 0]
    return f", for example {divisors[-1]}" if divisors else ""


def default_config() -> ConfigDict:
    """Returns the defaults as a locked `ConfigDict`, for `get_config` to change."""
    fields = {}
    for field in dataclasses.fields(Config):
        value = field.default
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields[field.name] = dataclasses.asdict(value)
        else:
            fields[field.name] = value
    config = ConfigDict(fields, type_safe=False)
    return config.lock()
