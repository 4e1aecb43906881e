"""The language model: embedding, scanned blocks, head; losses and decode cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rla_jax import sharding
from rla_jax.layers.norms import at_least_float32
from rla_jax.models.blocks import Group, make_mixer, make_norm
from rla_jax.models.config import ModelConfig
from rla_jax.models.loss import TokenScores, score, score_chunked, summed_loss
from rla_jax.models.remat import policy
from rla_jax.shapes import Array, Float, Int, Segments

Tokens = Int[Array, 'B T']


class LanguageModel(nn.Module):
  """Pre-norm decoder: embedding, `num_layers` blocks of mixer and SwiGLU, RMS norm, head.

  The parameters of the blocks are stacked: every leaf under 'blocks' has a leading axis
  num_layers / len(pattern), over which `nn.scan` runs.

  Attributes:
    config: its settings.
  """

  config: ModelConfig

  def setup(self):
    c = self.config
    init = nn.initializers.normal(c.init_std)
    shape = c.vocab_size, c.model_dim
    self.embedding = self.param('embedding', init, shape, c.param_dtype)
    if not c.tie_embeddings:
      self.head = self.param('head', init, shape[::-1], c.param_dtype)
    self.final_norm = make_norm(c)
    groups = c.num_layers // len(c.pattern)
    group = Group
    if c.remat != 'none':
      # Inside a loop nothing can be merged with the forward pass, so no barriers are needed; a loop
      # over a single group is none to XLA.
      alone = c.unroll_layers or groups == 1
      group = nn.remat(group, policy=policy(c.remat), prevent_cse=alone)
    # Unrolled, the random draws of every layer would be compiled one by one: minutes.
    unrolled = c.unroll_layers and not self.is_initializing()
    self.blocks = nn.scan(
      group,
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, 0),
      length=groups,
      unroll=groups if unrolled else 1,
    )(c)

  def __call__(
    self, tokens: Tokens, segment_ids: Segments | None = None, cache: tuple | None = None
  ) -> Float[Array, 'B T S'] | tuple[Float[Array, 'B T S'], tuple]:
    """Logits of the next token at every position.

    Args:
      tokens: ids [B, T].
      segment_ids: documents of packed sequences [B, T]. None: one document a sequence.
      cache: from `init_cache` or the call before (the contract of `rla_jax.layers.cache`).

    Returns:
      Logits [B, T, S] in float32; with a cache, (logits, the cache after the last token).
    """
    x_BTD, cache = self._trunk(tokens, segment_ids, cache)
    logits_BTS = self._logits(x_BTD)
    return logits_BTS if cache is None else (logits_BTS, cache)

  def next_logits(
    self, tokens: Tokens, segment_ids: Segments | None, cache: tuple
  ) -> tuple[Float[Array, 'B S'], tuple]:
    """Logits [B, S] after the last token only, and the new cache: what generation needs.

    Arguments as for a call with a cache.
    """
    x_BTD, cache = self._trunk(tokens, segment_ids, cache)
    return self._logits(x_BTD[:, -1:])[:, 0], cache

  def loss(
    self,
    tokens: Tokens,
    targets: Tokens,
    mask: Float[Array, 'B T'] | None = None,
    segment_ids: Segments | None = None,
    keys: Array | None = None,
  ) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Sum of the masked -ln p(target) and the sum of the mask.

    Both are sums, so that micro-batches and devices add up exactly: divide once, at the end.

    Args:
      tokens: inputs [B, T].
      targets: the token after each of them [B, T].
      mask: weight of each target [B, T]; None: 1.
      segment_ids: documents [B, T].
      keys: a random key a sequence [B], for dropout; None: no dropout.

    Returns:
      (sum of losses in nats, sum of weights), float32.
    """
    x_BTD, _ = self._trunk(tokens, segment_ids, None, keys)
    dtype = at_least_float32(x_BTD.dtype)
    weights_BT = jnp.ones(targets.shape, dtype) if mask is None else mask.astype(dtype)
    total = summed_loss(
      _head, self._head_kernel(), x_BTD, targets, weights_BT, self.config.loss_chunk
    )
    return total, weights_BT.sum()

  def score(
    self,
    tokens: Tokens,
    targets: Tokens,
    segment_ids: Segments | None = None,
    cache: tuple | None = None,
    keys: Array | None = None,
  ) -> TokenScores | tuple[TokenScores, tuple]:
    """-ln p(target) and whether the target is the most probable token, at every position.

    Holds the logits of `config.loss_chunk` positions at a time. Arguments as for `loss`; with a
    cache, returns (scores, the cache after the last token).
    """
    x_BTD, new_cache = self._trunk(tokens, segment_ids, cache, keys)
    if self.config.loss_chunk is None:
      scores = score(self._logits(x_BTD), targets)
    else:
      kernel_DS = self._head_kernel()
      scores = score_chunked(_head, kernel_DS, x_BTD, targets, self.config.loss_chunk)
    return scores if cache is None else (scores, new_cache)

  def score_at(
    self,
    tokens: Tokens,
    positions: Int[Array, 'B N'],
    targets: Int[Array, 'B N'],
    segment_ids: Segments | None = None,
    keys: Array | None = None,
  ) -> TokenScores:
    """`score` at N positions of every sequence only, without the logits of the others.

    Args:
      tokens: inputs [B, T].
      positions: indices into T.
      targets: the token that follows at each of them.
      segment_ids: documents [B, T].
      keys: as for `loss`.
    """
    x_BTD, _ = self._trunk(tokens, segment_ids, None, keys)
    x_BND = jnp.take_along_axis(x_BTD, positions[..., None], axis=1)
    return score(self._logits(x_BND), targets)

  @nn.nowrap
  def init_cache(self, batch_size: int, max_length: int | None = None) -> tuple:
    """The cache before the first token: needs no parameters.

    Args:
      batch_size: sequences.
      max_length: tokens that fit; needed by attention layers without a window.

    Returns:
      One cache a layer of the pattern, its leaves stacked over the repetitions.
    """
    c = self.config
    repeats = c.num_layers // len(c.pattern)

    def stack(x):
      return jnp.repeat(x[None], repeats, axis=0)

    caches = (make_mixer(c, layer).init_cache(batch_size, max_length) for layer in c.pattern)
    return tuple(jax.tree.map(stack, cache) for cache in caches)

  def _trunk(self, tokens, segment_ids, cache, keys=None):
    dtype = jnp.dtype(self.config.dtype)
    table_SD = sharding.gathered(self.embedding, 'tensor', None)
    x_BTD = jnp.take(table_SD, tokens, axis=0).astype(dtype)
    x_BTD = sharding.constrain(x_BTD, None if cache is not None else 'seq', None)
    if keys is not None and self.config.embedding_dropout > 0:
      # A key a row: what is dropped depends neither on the mesh nor on the parts of a batch.
      kept = 1.0 - self.config.embedding_dropout
      kept_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, kept, x_BTD.shape[1:]))(keys)
      x_BTD = jnp.where(kept_BTD, x_BTD / kept, 0).astype(dtype)
    x_BTD, cache = self.blocks(x_BTD, segment_ids, cache)
    return self.final_norm(x_BTD), cache

  def _head_kernel(self):
    return self.embedding.T if self.config.tie_embeddings else self.head

  def _logits(self, x_BTD):
    return _head(x_BTD, self._head_kernel())


@jax.custom_vjp
def _head(x_BTD, kernel_DS):
  """Logits, added up in float32 or better."""
  dtype = at_least_float32(x_BTD.dtype)
  return jnp.dot(x_BTD, kernel_DS.astype(x_BTD.dtype), preferred_element_type=dtype)


def _head_forward(x_BTD, kernel_DS):
  return _head(x_BTD, kernel_DS), (x_BTD, kernel_DS)


def _head_backward(kept, dlogits_BTS):
  """Products in bfloat16 where the forward one is: JAX's own rule would make them float32's."""
  x_BTD, kernel_DS = kept
  if x_BTD.dtype == jnp.bfloat16:  # float16 has no room for a mean's small gradients
    dlogits_BTS = dlogits_BTS.astype(jnp.bfloat16)
  dx_BTD = jnp.einsum('bts,ds->btd', dlogits_BTS, kernel_DS.astype(x_BTD.dtype))
  # In the kernel's dtype at once: the loss adds up its gradient over its chunks.
  dkernel_DS = jnp.einsum(
    'btd,bts->ds', x_BTD, dlogits_BTS, preferred_element_type=kernel_DS.dtype
  )
  return dx_BTD.astype(x_BTD.dtype), dkernel_DS.astype(kernel_DS.dtype)


_head.defvjp(_head_forward, _head_backward)


def count_parameters(config: ModelConfig) -> int:
  """Number of parameters of a model, found without making any."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
