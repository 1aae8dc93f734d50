"""What a run computes: the fields of a config that experiments share, and how values are checked."""

import dataclasses
import functools
from typing import Annotated, Any, Literal, get_type_hints

import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt, Lt

from jaxdl.errors import UserError
from jaxdl.nn import ATTENTIONS
from jaxdl.training import NOT_IDENTITY


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from."""

    data: str = ""
    """What to train on: builtin:NAME, tfds:NAME[/CONFIG][:VERSION] or folder:PATH."""
    eval_data: str = ""
    """What to measure on, in the same form. Empty: the held-out part of --data."""
    data_dir: str = ""
    """Where TFDS' prepared data sets lie. Empty: its own default."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is learned."""

    steps: Annotated[int, Ge(0)] = 1000
    """Updates of the parameters. 0: the model is measured as it begins."""
    batch_size: Annotated[int, Ge(1)] = 128
    """Examples in each update, over all devices."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """Decoupled from the gradient, multiplied by the learning rate."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Longest norm of the gradient; a longer one is scaled down."""
    accumulate: Annotated[int, Ge(1)] = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Keep an average of the parameters, `ema ← decay · ema + (1 − decay) · parameters`, and measure that. 0: none is kept."""
    precision: Literal["f32", "bf16"] = "f32"
    """What activations are computed in. Parameters and reductions are in f32 in any case."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """All randomness comes from it: the same seed gives the same bits on the same machine."""
    evaluate_every: Annotated[int, Ge(1)] = 200
    """Steps between two evaluations."""
    show_every: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=NOT_IDENTITY)
    """Steps between two drawings of what the model makes or sees. 0: at the end alone."""

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise UserError(
                f"a batch of {self.batch_size} cannot be cut into {self.accumulate} equal parts: choose --accumulate so that it divides --batch-size"
            )

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step."""
        return optax.warmup_cosine_decay_schedule(0, self.learning_rate, int(self.warmup * self.steps), max(self.steps, 1))


@dataclasses.dataclass(frozen=True)
class Config(Training, Data):
    """What is computed. A run's result depends on these fields and on nothing else.

    An experiment adds its own in a subclass, those of a Transformer with the mixin `Transformer`, questions to the finished model with `Ask`. Its presets give the values. Every field has a type that is checked, at construction too, and a docstring, which is its help text.
    """

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()

    @property
    def dtype(self) -> Any:
        """What modules compute in: None (that of the parameters) or bfloat16."""
        return jnp.bfloat16 if self.precision == "bf16" else None


@dataclasses.dataclass(frozen=True)
class Transformer:
    """How the Transformers of a model compute."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped."""
    attention: Literal[*ATTENTIONS] = "plain"
    """The plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass, and keep only what goes from block to block: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block and run it as often as the model is deep: quick to compile for deep models."""

    def layer_fields(self) -> dict[str, Any]:
        """The fields of a module that say it: `attention`, `dropout`, `remat`, `scan`, `dtype`."""
        how = dict(attention=ATTENTIONS[self.attention], dropout=self.dropout, remat=self.remat)
        return how | dict(scan=self.scan_layers, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class Agents:
    """Where agents act, and how many learn."""

    environment: str = "cartpole"
    """Where they act: cartpole, pendulum, acrobot, mountain_car, mountain_car_continuous, catch, breakout, or where those are installed gymnax:NAME or gymnasium:NAME."""
    environments: Annotated[int, Ge(1)] = 8
    """How many each agent acts in at once."""
    seeds: Annotated[int, Ge(1)] = 8
    """How many agents learn at once, from the seeds SEED, SEED + 1, …, without a thing in common."""
    discount: Annotated[float, Ge(0), Lt(1)] = 0.99
    """What a reward is worth a step later."""
    episodes: Annotated[int, Ge(1)] = 100
    """Of an evaluation: each agent plays so many, without exploring, from beginnings that are the same for all agents and all runs."""


@dataclasses.dataclass(frozen=True)
class Init:
    """What training begins with."""

    init: str = ""
    """Begin with these weights: the DIR of a finished run, a folder with config.json and *.safetensors, or a name on the Hugging Face hub. Sizes and tokenizer are then those of the weights. Empty: random ones."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """What the finished model is asked."""

    ask: tuple[str, ...] = dataclasses.field(default=(), metadata=NOT_IDENTITY)
    """What the finished model is asked about: image files to be recognised, names or sentences to be read, or an image file and questions about it, as the experiment is. A finished run answers at once: give its command again with this flag."""


def check(settings: Any) -> None:
    """Holds each field of a dataclass against its annotation; raises `UserError` for the first that does not fit."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        _check_value(field.name, getattr(settings, field.name), hints[field.name])


def _check_value(name: str, value: Any, hint: Any) -> None:
    import pydantic  # Here, so that who only reads this module does not wait for it.

    try:
        _adapter(hint).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"--{name.replace('_', '-')} {value!r}: {error.errors()[0]['msg'].replace('Input', 'it')}") from None


@functools.cache  # Configs have most of their fields in common, and each of fifty experiments makes several.
def _adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))
