"""The language model: cache, packing, losses, rematerialisation, sizes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.models import PRESETS, LanguageModel, ModelConfig, count_parameters, language_model
from rla_jax.models import loss as losses
from rla_jax.models.loss import score, score_chunked
from tests.layers.helpers import error

VOCABULARY, LENGTH = 40, 12
IDS = jnp.asarray([[1] * 5 + [2] * 7, [4] * 11 + [5]], jnp.int32)


def config(**changes):
  small = {
    'vocab_size': VOCABULARY, 'num_layers': 4, 'model_dim': 16, 'ffn_dim': 24, 'num_heads': 2,
    'head_dim': 8, 'pattern': ('rdn', 'attention'), 'init_std': 0.3, 'dtype': 'float32',
    'remat': 'none', 'implementation': 'reference',
  }  # fmt: skip
  return ModelConfig(**small | changes)


def tokens(seed=0):
  return jax.random.randint(jax.random.key(seed), (2, LENGTH), 0, VOCABULARY)


@pytest.fixture(scope='module')
def variables():
  return jax.jit(LanguageModel(config()).init)(jax.random.key(0), tokens())


def test_pieces_equal_the_whole_and_packed_equal_separate(variables):
  model = LanguageModel(config())

  @jax.jit
  def run(variables):
    whole = model.apply(variables, tokens(), segment_ids=IDS)
    cache, pieces = model.init_cache(2, LENGTH), []
    for now in (slice(0, 4), slice(4, 5), slice(5, 12)):
      logits, cache = model.apply(variables, tokens()[:, now], IDS[:, now], cache)
      pieces.append(logits)
    last, _ = model.apply(
      variables, tokens(), IDS, model.init_cache(2, LENGTH), method='next_logits'
    )
    alone = model.apply(variables, jnp.roll(tokens(), -5, axis=1))
    return whole, jnp.concatenate(pieces, axis=1), last, alone

  whole, pieces, last, alone = run(variables)
  assert whole.shape == (2, LENGTH, VOCABULARY)
  assert error(pieces, whole) < 5e-6
  assert error(last, whole[:, -1]) < 5e-6
  assert error(whole[0, 5:], alone[0, :7]) < 1e-5


def test_loss_is_a_masked_sum(variables):
  model = LanguageModel(config())
  mask = jnp.ones((2, LENGTH)).at[0, 3].set(0).at[1, 2].set(0.5)
  logits, (total, weight), (everything, count), scores = jax.jit(
    lambda v: (
      model.apply(v, tokens(), segment_ids=IDS),
      model.apply(v, tokens(), tokens(1), mask=mask, segment_ids=IDS, method='loss'),
      model.apply(v, tokens(), tokens(1), segment_ids=IDS, method='loss'),
      model.apply(v, tokens(), tokens(1), segment_ids=IDS, method='score'),
    )
  )(variables)
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_p, np.asarray(tokens(1))[..., None], -1)[..., 0]
  assert np.isclose(total, (nll * np.asarray(mask)).sum(), rtol=1e-5)
  assert np.isclose(weight, 2 * LENGTH - 1.5) and count == 2 * LENGTH
  assert np.isclose(everything, nll.sum(), rtol=1e-5)
  np.testing.assert_array_equal(scores.correct, logits.argmax(-1) == tokens(1))


def test_chunked_loss_equals_the_plain_one():
  x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (2, 11, 8)), (1, (8, 30))))
  targets = jax.random.randint(jax.random.key(2), (2, 11), 0, 30)
  weight = jax.random.normal(jax.random.key(3), targets.shape)

  def loss(chunk, x, kernel):
    found = score(x @ kernel, targets)
    if chunk is not None:
      found = score_chunked(jnp.matmul, kernel, x, targets, chunk)
    return (weight * found.nll).sum(), found

  gradient = jax.jit(jax.grad(loss, (1, 2), has_aux=True), static_argnums=0)
  want, want_scores = gradient(None, x, kernel)
  for chunk in (4, 11):
    got, scores = gradient(chunk, x, kernel)
    np.testing.assert_allclose(scores.nll, want_scores.nll, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, want_scores.correct)
    assert error(got[0], want[0]) < 1e-6 and error(got[1], want[1]) < 1e-6


def test_summed_loss_is_the_weighted_sum_and_makes_the_logits_once():
  x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (2, 11, 8)), (1, (8, 30))))
  targets = jax.random.randint(jax.random.key(2), (2, 11), 0, 30)
  weights = jax.random.normal(jax.random.key(3), targets.shape).at[0, 3].set(0)

  def definition(x, kernel, weights):
    nll = jnp.where(weights != 0, score(x @ kernel, targets).nll, 0)
    return 0.3 * (weights * nll).sum() ** 2

  def loss(chunk, x, kernel, weights):
    return 0.3 * losses.summed_loss(jnp.matmul, kernel, x, targets, weights, chunk) ** 2

  want = jax.jit(jax.value_and_grad(definition, (0, 1, 2)))(x, kernel, weights)
  for chunk in (None, 4, 11):
    gradient = jax.value_and_grad(functools.partial(loss, chunk), (0, 1, 2))
    got = jax.jit(gradient)(x, kernel, weights)
    assert np.isclose(loss(chunk, x, kernel, weights), want[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert error(a, b) < 1e-6
    # Logits, and the gradients of x and kernel.
    assert str(jax.make_jaxpr(gradient)(x, kernel, weights)).count('dot_general') == 3


@pytest.mark.parametrize('chunk', [None, 4])
def test_a_summed_loss_of_no_tokens_is_zero(chunk):
  empty, kernel = jnp.zeros((2, 0, 8)), jnp.ones((8, 30))
  nothing = jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0))

  def loss(x, kernel):
    return losses.summed_loss(jnp.matmul, kernel, x, *nothing, chunk)

  value, (dx, dkernel) = jax.value_and_grad(loss, (0, 1))(empty, kernel)
  assert value == 0 and dx.shape == empty.shape and not dkernel.any()


def test_the_gradient_of_a_score_is_that_of_its_definition():
  logits = 5 * jax.random.normal(jax.random.key(0), (2, 7, 30))
  logits = logits.at[0, 0, 3].set(-jnp.inf).at[0, 1, 4].set(1e4)
  targets = jax.random.randint(jax.random.key(1), (2, 7), 5, 30)
  weight = jax.random.normal(jax.random.key(2), (2, 7))

  def definition(logits):
    log_p = jax.nn.log_softmax(logits)
    return -(weight * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]).sum()

  got = jax.jit(jax.grad(lambda x: (weight * score(x, targets).nll).sum()))(logits)
  assert error(got, jax.jit(jax.grad(definition))(logits)) < 1e-6


def test_targets_may_have_a_dtype_too_narrow_for_the_vocabulary():
  logits = jax.random.normal(jax.random.key(0), (1, 2, 300))
  targets = jnp.asarray([[5, 100]])

  def gradient(dtype):
    return jax.grad(lambda x: score(x, targets.astype(dtype)).nll.sum())(logits)

  np.testing.assert_array_equal(gradient(jnp.int8), gradient(jnp.int32))


def test_one_pass_finds_maximum_and_sum():
  logits = 20 * jax.random.normal(jax.random.key(0), (4, 300))
  logits = logits.at[0, 0].set(-jnp.inf).at[1].set(-1e4).at[2, 5].set(1e4).at[3, 1].set(jnp.nan)
  want = jax.jit(losses._maximum_and_sum)(logits)
  got = jax.jit(losses._maximum_and_sum_at_once)(logits)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


def test_loss_chunks_bound_the_memory_of_the_logits():
  """Temporary bytes of the loss and its gradient, as compiled."""

  def temporary(chunk):
    c = config(
      vocab_size=4096, num_layers=1, pattern=('attention',), ffn_dim=None, loss_chunk=chunk
    )  # fmt: skip
    model, batch = LanguageModel(c), jax.ShapeDtypeStruct((2, 256), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    step = jax.jit(jax.grad(lambda v, t: model.apply(v, t, t, method='loss')[0]))
    return step.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes

  logits = 2 * 256 * 4096 * 4
  assert temporary(None) > logits > 1.5 * temporary(32)


def test_remat_policies_give_the_same_gradients():
  got = {}
  for remat in ('none', 'full', 'dots', 'names', 'both'):
    model = LanguageModel(config(remat=remat, num_layers=2))
    if not got:
      variables = jax.jit(model.init)(jax.random.key(0), tokens())

    def loss(variables, model=model):
      return model.apply(variables, tokens(), tokens(1), method='loss')[0]

    got[remat] = jax.jit(jax.grad(loss))(variables)
  for remat in ('full', 'dots', 'names', 'both'):
    for a, b in zip(jax.tree.leaves(got[remat]), jax.tree.leaves(got['none'])):
      assert error(a, b) < 1e-5, remat


def test_unrolled_layers_give_the_same_and_recompute_as_much():
  def step(num_layers=2, **changes):
    model = LanguageModel(config(num_layers=num_layers, pattern=('rdn',), **changes))
    gradient = jax.grad(lambda v: model.apply(v, tokens(), tokens(1), method='loss')[0])
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens())
    return jax.jit(gradient).trace(variables)

  loop, unrolled = (step(remat='full', unroll_layers=x) for x in (False, True))
  assert ['unroll=2' in str(x.jaxpr) for x in (loop, unrolled)] == [False, True]
  model = LanguageModel(config(num_layers=2, pattern=('rdn',), unroll_layers=True))
  init = jax.jit(model.init).trace(jax.random.key(0), tokens())
  assert 'unroll=2' not in str(init.jaxpr), 'random draws of every layer would be compiled'
  variables = init.lower().compile()(jax.random.key(0), tokens())
  lowered = [x.lower() for x in (loop, unrolled)]
  # Without them XLA may merge the recomputation with the forward pass, and keep what it made.
  barriers = [x.as_text().count('optimization_barrier') for x in lowered]
  assert barriers[1] > barriers[0]
  one = step(remat='full', num_layers=1).lower()
  assert one.as_text().count('optimization_barrier') > barriers[0], 'a loop of one is none'
  found = [x.compile()(variables) for x in lowered]
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    assert error(a, b) < 1e-5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_gradient_of_the_head(dtype):
  """Against float32, of a mean over 100,000 tokens; its products in bfloat16 if the forward is."""
  x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16)).astype(dtype)
  kernel = jax.random.normal(jax.random.key(1), (16, VOCABULARY))

  def loss(head, x, kernel):
    return score(head(x, kernel), tokens()).nll.sum() / 1e5

  wanted = jax.grad(functools.partial(loss, jnp.dot), (0, 1))(x.astype(jnp.float32), kernel)
  gradient = jax.jit(jax.grad(functools.partial(loss, language_model._head), (0, 1)))
  found = gradient(x, kernel)
  assert [g.dtype for g in found] == [dtype, jnp.float32]
  for a, b in zip(found, wanted, strict=True):
    assert error(a.astype(jnp.float32), b) < (1e-6 if dtype == 'float32' else 0.01)
  text = gradient.lower(x, kernel).as_text()
  products = re.findall(r'dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)', text)
  short = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}[dtype]
  assert len(products) == 3
  if dtype == 'float16':  # it has no room for gradients as small as these
    assert sorted(products) == [('f16', 'f16'), ('f32', 'f32'), ('f32', 'f32')]
  else:
    assert set(products) == {(short, short)}


def test_rematerialisation_saves_memory():
  """Bytes that the forward pass hands to the backward one: all, by name, and the inputs alone."""

  def saved(remat):
    model = LanguageModel(config(remat=remat, num_layers=8, pattern=('rdn',)))
    batch = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    _, pull = jax.eval_shape(
      lambda v, t: jax.vjp(lambda v: model.apply(v, t, t, method='loss')[0], v), shapes, batch
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

  assert saved('none') > saved('both') > saved('dots') > saved('names') > saved('full')


@pytest.mark.parametrize('name', PRESETS)
def test_presets_have_the_papers_parameter_counts(name):
  want = 1.51e9 if name.startswith('transformer') else 1.55e9
  got = count_parameters(PRESETS[name])
  print(f'{name} {got / 1e9:.4f} B')
  assert abs(got / want - 1) < 0.02


def test_shapes_and_dtypes_of_the_parameters():
  c = config(param_dtype='bfloat16', tie_embeddings=True, ffn_dim=None)
  shapes = jax.eval_shape(LanguageModel(c).init, jax.random.key(0), tokens())['params']
  assert set(shapes) == {'embedding', 'blocks', 'final_norm'}
  assert set(shapes['blocks']['block_1']) == {'mixer', 'mixer_norm'}
  assert shapes['blocks']['block_0']['mixer']['q_proj'].shape == (2, 16, 16)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_initial_values(variables):
  params = variables['params']
  projections = params['blocks']['block_0']['mixer']['q_proj']
  for values in (params['embedding'], params['head'], projections):
    assert 0.2 < float(values.std()) < 0.4
  assert not np.allclose(projections[0], projections[1])


def test_tied_half_precision_model_has_float32_logits():
  model = LanguageModel(config(tie_embeddings=True, dtype='bfloat16', num_layers=2))
  logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens())
  assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_scores_at_positions_are_those_of_the_whole():
  c = config(norm='layer', pattern=('base_conv', 'identity'), num_layers=2, num_heads=1)
  model, positions = LanguageModel(c), jnp.asarray([[3, 7, 7], [0, 11, 2]])
  variables = jax.jit(model.init)(jax.random.key(0), tokens())
  targets = jnp.take_along_axis(tokens(1), positions, axis=1)
  some, every = jax.jit(
    lambda v: (
      model.apply(v, tokens(), positions, targets, IDS, method='score_at'),
      model.apply(v, tokens(), tokens(1), IDS, method='score'),
    )
  )(variables)
  nll, right = (jnp.take_along_axis(x, positions, axis=1) for x in every)
  assert error(some.nll, nll) < 1e-6
  np.testing.assert_array_equal(some.correct, right)


def test_dropout_is_a_row_s_own_and_absent_without_keys():
  model = LanguageModel(config(embedding_dropout=0.5))
  variables = jax.jit(model.init)(jax.random.key(0), tokens())
  keys = jax.random.split(jax.random.key(1), 2)

  @jax.jit
  def losses(keys):
    scores = model.apply(variables, tokens(), tokens(1), keys=keys, method='score')
    return scores.nll

  dropped, without = losses(keys), losses(None)
  assert error(dropped, without) > 1e-2
  np.testing.assert_array_equal(losses(keys), dropped)
  swapped = losses(keys.at[1].set(jax.random.key(2)))
  np.testing.assert_array_equal(swapped[0], dropped[0])
  assert (swapped[1] != dropped[1]).any()
