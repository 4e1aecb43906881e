"""Attributes of the recurrent layers: every backbone, and every piece of the paper's ablation."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax.numpy as jnp

DEFAULT_INIT = nn.initializers.lecun_normal()  # one object, so that equal settings are equal


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class Settings:
  """What a recurrent layer computes; the Linen and the NNX layers have these as attributes.

  The defaults are those of a Residual Delta Net. Sizes: H = num_heads, G = num_qk_heads or H,
  K = head_dim, V = head_dim * expand_v.

  Raises:
    ValueError: a value that is not allowed, or two that exclude each other.
  """

  num_heads: int = 16  # value heads H
  num_qk_heads: int | None = None  # query and key heads G, a divisor of H; None: H
  head_dim: int = 128  # key size K of a head
  expand_v: float = 1.0  # V / K

  # The recurrence.
  update: Literal['additive', 'delta'] = 'delta'  # additive: RLA's; delta: RDN's
  residual: bool = True  # a second state that fits the residual of the first
  gamma_is_beta: bool = False  # gamma := beta instead of a projection of its own
  clip: float | None = 1.0  # bound of the residual; None: no clipping
  readout: Literal['gated', 'sum'] = 'gated'  # sum: without alpha and gamma
  two_states: bool = False  # instead of the residual: a second state that fits v itself

  # Gates; gates.py has the equations.
  decay: Literal['none', 'fixed', 'scalar', 'channel', 'channel_sigmoid'] = 'scalar'
  decay_rank: int | None = None  # of the projection of a decay a channel; None: K
  write: Literal['sigmoid', 'one', 'step'] = 'sigmoid'  # beta; step: that of the decay
  allow_neg_eigval: bool = False  # beta in (0, 2) instead of (0, 1)

  # Queries, keys and values.
  conv_width: int | None = 4  # tokens under the short causal convolution; None: no convolution
  activation: Literal['silu', 'none'] = 'silu'  # after the convolution, or the projection
  qk_norm: bool = True  # L2 norm of q and k
  query_scale: float | None = None  # factor of q; None: 1 / sqrt(K), as in Gated DeltaNet
  rope_base: float | None = None  # rotary positions for q and k; None: no positions

  # Output.
  output_gate: Literal['silu', 'sigmoid', 'none'] = 'silu'  # activation of the gate
  low_rank_gate: bool = False  # the gate's projection has rank V (Kimi Delta Attention)
  output_norm: Literal['head', 'gated', 'none'] = 'head'  # RMS of a head, then the gate; gated:
  # the gate, then the RMS over all heads (Mamba-2)
  skip: bool = False  # adds v to the read-out, with a learned factor a head (Mamba-2's D)
  norm_eps: float = 1e-6  # added to the mean square in the output norm

  # Numbers and execution.
  dtype: Any = None  # of the products; None: that of x. Gates, norms and states: float32
  param_dtype: Any = jnp.float32  # of the parameters
  kernel_init: Callable = DEFAULT_INIT  # of the projections
  chunk_size: int | None = None  # tokens of a chunk; None: the implementation's choice
  # Of the operator, and of its inputs where Triton comes first; None: the platform's best.
  implementation: str | Sequence[str] | None = None
  exchange_heads: bool = False  # on a split sequence: tokens for heads, instead of states

  def __post_init__(self):
    check_choices(self)
    _check(self)
    if hasattr(super(), '__post_init__'):  # Linen registers its modules here
      super().__post_init__()

  def plain(self) -> 'Settings':
    """The attributes alone, without the Linen module that may hold them."""
    names = (field.name for field in dataclasses.fields(Settings))
    return Settings(**{name: getattr(self, name) for name in names})

  @property
  def key_heads(self) -> int:
    """Query and key heads G."""
    return self.num_qk_heads or self.num_heads

  @property
  def value_dim(self) -> int:
    """Value size V of a head."""
    return round(self.head_dim * self.expand_v)

  @property
  def channel_decay(self) -> bool:
    """Whether every channel has a decay of its own."""
    return self.decay in ('channel', 'channel_sigmoid')

  @property
  def second_gate(self) -> bool:
    """Whether there is a projection for gamma."""
    return (self.residual or self.two_states) and not self.gamma_is_beta


def check_choices(settings) -> None:
  """Raises ValueError for a field annotated `Literal[...]` that holds anything else."""
  for name, hint in get_type_hints(type(settings)).items():
    value = getattr(settings, name, None)
    if get_origin(hint) is Literal and value not in get_args(hint):
      raise ValueError(f'{name} is {value!r}; expected one of {list(get_args(hint))}')


def check_keys(given, known, what: str) -> None:
  """Raises ValueError for a key that is not known, with the nearest one that is."""
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else f'; expected one of {sorted(known)}'
      raise ValueError(f'{what} has no {key!r}{hint}')


def check_positive_int(name: str, value, optional: bool = False) -> None:
  """Raises ValueError unless the value is an int >= 1, or None where that is allowed."""
  if optional and value is None:
    return
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f'{name} is {value!r}; expected an int >= 1{" or None" if optional else ""}')


def _check(s: Settings) -> None:
  check_positive_int('num_heads', s.num_heads)
  check_positive_int('head_dim', s.head_dim)
  for name in ('num_qk_heads', 'decay_rank', 'conv_width', 'chunk_size'):
    check_positive_int(name, getattr(s, name), optional=True)
  if s.num_heads % s.key_heads:
    raise ValueError(
      f'num_qk_heads is {s.num_qk_heads}; expected a divisor of num_heads = {s.num_heads}'
    )
  size = s.head_dim * s.expand_v
  if size < 1 or not math.isclose(size, round(size)):
    raise ValueError(
      f'expand_v is {s.expand_v}; expected head_dim * expand_v to be a whole number, it is {size}'
    )
  if s.clip is not None and not s.clip > 0:
    raise ValueError(f'clip is {s.clip}; expected a number > 0, or None for no clipping')
  if s.two_states and s.residual:
    raise ValueError('two_states is True and residual is True; expected one of them at most')
  if s.allow_neg_eigval and s.write != 'sigmoid':
    raise ValueError(f"allow_neg_eigval is True and write is {s.write!r}; expected 'sigmoid'")
  if s.write == 'step' and s.decay != 'scalar':
    raise ValueError(f"write is 'step' and decay is {s.decay!r}; expected 'scalar'")
  if s.gamma_is_beta and not (s.residual or s.two_states):
    raise ValueError('gamma_is_beta is True without a second state; expected residual=True')
