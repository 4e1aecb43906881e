"""The linear-attention baselines: choices of the attributes of `RecurrentLayer`.

Sizes H, G, K, V as in `Settings`; all read out S_t, the current token included. Each docstring says
what the original has that this one does not.
"""

from typing import Literal

from rla_jax.layers.residual import RecurrentLayer, ResidualDeltaNet, ResidualLinearAttention

Decay = Literal['none', 'fixed', 'scalar', 'channel', 'channel_sigmoid']
Update = Literal['additive', 'delta']
Write = Literal['sigmoid', 'one', 'step']
Activation = Literal['silu', 'none']
OutputGate = Literal['silu', 'sigmoid', 'none']
OutputNorm = Literal['head', 'gated', 'none']


class SimpleGLA(ResidualLinearAttention, kw_only=True):
  """Simple gated linear attention (sGLA), the base of Residual Linear Attention.

    S_t = alpha_t S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t,   alpha_t, beta_t one number a head

  Reference:
    Lai et al., arXiv:2509.25223; Yang et al.: Gated Linear Attention, arXiv:2312.06635.
  """

  residual: bool = False


class RetNet(RecurrentLayer, kw_only=True):
  """Retention: linear attention with a fixed decay a head and rotary positions.

    S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t

  q and k are projections, rotated, without convolution, activation or norm; V = 2 K; the read-out
  is normalised a head and gated by silu. The original normalises by GroupNorm, this by RMS.

  Reference:
    Sun et al.: Retentive Network, arXiv:2307.08621.
  """

  expand_v: float = 2.0
  update: Update = 'additive'
  residual: bool = False
  decay: Decay = 'fixed'
  write: Write = 'one'
  conv_width: int | None = None
  activation: Activation = 'none'
  qk_norm: bool = False
  rope_base: float | None = 10_000.0


class Mamba2(RecurrentLayer, kw_only=True):
  """Mamba-2: one q (its C) and one k (its B) for all heads, written at the decay's step size.

    S_t = exp(-A dt_t) S_{t-1} + dt_t k_t v_t^T,   o_t = S_t^T q_t + D v_t,
    dt_t = softplus(x_t W + dt_bias),  A = exp(A_log)

  G = 1, V = K / 2, neither norm nor scale on q and k. The output is rms_norm(o * silu(z)) over all
  heads. At width D the original has H V = 2 D, and a bias in its convolutions.

  Reference:
    Dao, Gu: Transformers are SSMs, arXiv:2405.21060.
  """

  num_heads: int = 64
  num_qk_heads: int | None = 1
  expand_v: float = 0.5
  update: Update = 'additive'
  residual: bool = False
  write: Write = 'step'
  qk_norm: bool = False
  query_scale: float | None = 1.0
  output_norm: OutputNorm = 'gated'
  skip: bool = True


class GLA(RecurrentLayer, kw_only=True):
  """Gated Linear Attention: a decay a channel.

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16),  W_1 of rank 16

  q and k are plain projections; V = 2 K; read-out normalised a head and gated by silu.

  Reference:
    Yang et al.: Gated Linear Attention, arXiv:2312.06635.
  """

  expand_v: float = 2.0
  update: Update = 'additive'
  residual: bool = False
  decay: Decay = 'channel_sigmoid'
  decay_rank: int | None = 16
  write: Write = 'one'
  conv_width: int | None = None
  activation: Activation = 'none'
  qk_norm: bool = False


class DeltaNet(ResidualDeltaNet, kw_only=True):
  """DeltaNet: the delta rule without decay, and without an output gate.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)

  Reference:
    Yang et al.: Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484.
  """

  residual: bool = False
  decay: Decay = 'none'
  output_gate: OutputGate = 'none'


class GatedDeltaNet(ResidualDeltaNet, kw_only=True):
  """Gated DeltaNet, the base of Residual Delta Net.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)

  V = K, as in the comparison with Residual Delta Net; the original's models have expand_v = 2.

  Reference:
    Yang, Kautz, Hatamizadeh: Gated Delta Networks, arXiv:2412.06464.
  """

  residual: bool = False


class KimiDeltaAttention(ResidualDeltaNet, kw_only=True):
  """Kimi Delta Attention (KDA): Gated DeltaNet with a decay a channel.

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(K)
    alpha_t = exp(-exp(A_log) softplus(x_t W_1 W_2 + dt_bias)),  W_1 of rank K

  The output gate is a sigmoid of rank V; the original's has a bias.

  Reference:
    Kimi Team: Kimi Linear, arXiv:2510.26692.
  """

  residual: bool = False
  decay: Decay = 'channel'
  output_gate: OutputGate = 'sigmoid'
  low_rank_gate: bool = True


class TwoStateDeltaNet(ResidualDeltaNet, kw_only=True):
  """The control that Residual Delta Net needs: its parameters and its state, but no residual.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    R_t = alpha_t (I - gamma_t k_t k_t^T) R_{t-1} + gamma_t k_t v_t^T
    o_t = (S_t^T q_t + R_t^T q_t) / sqrt(K)

  Both states fit v, each at a rate of its own. What Residual Delta Net gains over this it owes to
  fitting the residual, not to the size of its state. The cache holds R as every second head.
  """

  residual: bool = False
  two_states: bool = True
