"""MFU by its formula, statistics against their definition, traces, goodput, the switches."""

import functools
import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import sharding
from rla_jax.models import PRESETS, LanguageModel, ModelConfig, count_parameters
from rla_jax.training import train_and_evaluate
from rla_jax.training.benchmark import measure_overhead
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.feed import to_devices
from rla_jax.training.metrics import MetricsWriter, read
from rla_jax.training.statistics import gate_statistics, group_of, norms
from rla_jax.training.trained import evaluate_run
from rla_jax.training.utilisation import PEAKS, forward_flops, peak_of, training_flops

SMALL = {
  'vocab_size': 32, 'num_layers': 2, 'model_dim': 16, 'ffn_dim': 24, 'num_heads': 2, 'head_dim': 8,
  'dtype': 'float32', 'remat': 'none', 'implementation': 'reference',
}  # fmt: skip


@pytest.mark.parametrize('layer, products', [('rdn', 6), ('rla', 5), ('gdn', 3), ('sgla', 2)])
def test_recurrences_count_both_states(layer, products):
  config = ModelConfig(**SMALL, pattern=(layer,))
  H, K = 2, 8
  gates = {'rdn': 3, 'rla': 3, 'gdn': 2, 'sgla': 2}[layer] * 16 * H
  weights = 5 * 16 * 16 + 3 * 4 * 16 + gates + 3 * 16 * 24
  wanted = 2 * (2 * weights + 2 * products * H * K * K) + 2 * 16 * 32
  assert forward_flops(config, 64) == wanted
  assert training_flops(config, 64) == 3 * wanted


def test_attention_counts_what_is_seen():
  def seen(layer, length, **options):
    config = ModelConfig(**SMALL | {'num_layers': 1}, pattern=(layer,), layer_options=options)
    return (forward_flops(config, length) - forward_flops(config, 1)) / (4 * 16) + 1

  assert seen('attention', 9) == 5  # The mean of 1, 2, ... 9.
  options = {'sliding_window_attention': {'window': 3}}
  assert seen('sliding_window_attention', 9, **options) == pytest.approx((1 + 2 + 7 * 3) / 9)


def test_most_of_a_large_model_is_6_flops_a_parameter():
  config = PRESETS['rdn_1p5b']
  looked_up = config.vocab_size * config.model_dim
  ratio = training_flops(config, 4096) / (6 * (count_parameters(config) - looked_up))
  assert 1.01 < ratio < 1.03  # What is more: 12 K V a head and token, for both states.


def test_peaks_are_found_by_the_name_of_a_device():
  device = types.SimpleNamespace(device_kind='NVIDIA H200')
  assert peak_of(device).flops == 989e12
  assert peak_of(jax.devices()[0]) is None or jax.default_backend() != 'cpu'
  assert all(1e14 < peak.flops < 1e16 for peak in PEAKS.values())


def test_gate_statistics_are_what_they_say():
  """Against the recurrence token by token, from the layer's own q, k, v and gates."""
  model = LanguageModel(ModelConfig(**SMALL | {'init_std': 0.5}, pattern=('rdn', 'rla')))
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 32, (2, 12)))
  ids = jnp.asarray([[0] * 12, [0] * 5 + [1] * 7])
  params = jax.jit(model.init)(jax.random.key(0), tokens)['params']
  batch = {'tokens': tokens, 'targets': tokens, 'segment_ids': ids, 'loss_mask': jnp.ones((2, 12))}
  names = {'alpha', 'beta', 'gamma', 'clipped', 'base_norm', 'residual_norm'}
  with pytest.MonkeyPatch.context() as patch:
    from rla_jax.layers import recurrent

    original = recurrent.recurrence_statistics

    def with_inputs(s, recur, heads, gates):
      inputs = heads | dict(zip(('log_decay', 'beta', 'gamma'), gates))
      return original(s, recur, heads, gates) | {f'of {name}': x for name, x in inputs.items()}

    patch.setattr(recurrent, 'recurrence_statistics', with_inputs)
    found = jax.device_get(jax.jit(lambda p, b: gate_statistics(model, p, b))(params, batch))
  for layer, update in enumerate(('delta', 'additive')):
    values = {path.split('/')[1]: x for path, x in found.items() if path.endswith(f'/{layer:02d}')}
    assert names == {name for name in values if not name.startswith('of ')}
    heads = {name: values[f'of {name}'] for name in 'qkv'}
    log_decay, beta, gamma = (values[f'of {name}'] for name in ('log_decay', 'beta', 'gamma'))
    assert values['alpha'] == pytest.approx(np.exp(log_decay).mean(), rel=1e-5)
    assert values['beta'] == pytest.approx(beta.mean(), rel=1e-5)
    assert values['gamma'] == pytest.approx(gamma.mean(), rel=1e-5)
    clipped, base, residual = by_hand(update, heads, log_decay, beta, gamma, np.asarray(ids))
    assert 0 < clipped < 1
    assert values['clipped'] == pytest.approx(clipped)
    assert values['base_norm'] == pytest.approx(base, rel=1e-4)
    assert values['residual_norm'] == pytest.approx(residual, rel=1e-4)


def by_hand(update, heads, log_decay, beta, gamma, ids):
  """Share of clipped residuals and mean norms of the last states, equations (1) to (4)."""
  k, v = (np.asarray(heads[name], np.float64) for name in 'kv')
  B, T, H, V = v.shape
  clipped, norms_S, norms_R = [], [], []
  for b in range(B):
    for h in range(H):
      S = R = np.zeros((k.shape[-1], V))
      for t in range(T):
        if t and ids[b, t] != ids[b, t - 1]:
          S = R = np.zeros_like(S)
        x, a = k[b, t, h], np.exp(log_decay[b, t, h])
        error = v[b, t, h] - S.T @ x
        clipped.append(np.abs(error) >= 1)
        r = np.clip(error, -1, 1)
        write, fit = v[b, t, h], r
        if update == 'delta':
          write, fit = write - a * (S.T @ x), fit - a * (R.T @ x)
        S = a * S + beta[b, t, h] * np.outer(x, write)
        R = a * R + gamma[b, t, h] * np.outer(x, fit)
      norms_S.append(np.linalg.norm(S))
      norms_R.append(np.linalg.norm(R))
  return np.mean(clipped), np.mean(norms_S), np.mean(norms_R)


@pytest.mark.slow
@pytest.mark.parametrize('exchange_heads', [False, True])
def test_gate_statistics_are_the_same_on_a_mesh(exchange_heads):
  """Rows, tokens and heads in parts; documents end within them."""
  options = SMALL | {'init_std': 0.5, 'num_heads': 4, 'exchange_heads': exchange_heads}
  model = LanguageModel(ModelConfig(**options, pattern=('rdn', 'rla')))
  tokens = np.random.default_rng(0).integers(0, 32, (4, 16), np.int32)
  batch = {
    'tokens': tokens, 'targets': tokens, 'segment_ids': (np.arange(64) // 11).reshape(4, 16),
    'loss_mask': np.ones((4, 16), np.float32),
  }  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0), tokens)['params']

  def found(**sizes):
    mesh = sharding.make_mesh(**sizes, devices=None if sizes else jax.devices()[:1])
    with jax.set_mesh(mesh):
      function = jax.jit(functools.partial(gate_statistics, model))
      return jax.tree.map(float, function(params, to_devices(batch, mesh)))

  assert found(data=2, seq=2, tensor=2) == pytest.approx(found(), rel=1e-5)


def test_norms_by_group():
  tree = {
    'embedding': jnp.full((2, 2), 2.0), 'final_norm': {'scale': jnp.ones(4)},
    'blocks': {'block_0': {'mixer': {'q_proj': jnp.ones(9), 'beta_proj': jnp.ones(16)},
                           'ffn': {'up_proj': jnp.ones(25)}}},
  }  # fmt: skip
  assert jax.device_get(norms(tree, 'n')) == {
    'n/embedding': 4, 'n/norms': 2, 'n/mixers': 3, 'n/gates': 4, 'n/ffn': 5
  }  # fmt: skip
  assert group_of('strange') == 'others'


@pytest.mark.parametrize('layer, optimizer, told', [
  ('attention', 'adamw', {'grad_norm/mixers', 'param_norm/ffn'}),
  pytest.param('rla', 'muon', {'grad_norm/gates', 'gates/alpha/00'}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_with_everything_on(
  config, tmp_path, monkeypatch, compiled_anew, layer, optimizer, told
):
  """Statistics, two parts a batch, a mean of the parameters, the best checkpoint, W&B, MFU, ..."""
  sent = []
  if layer == 'rla':
    config.model.implementation = 'reference'
  run = types.SimpleNamespace(log=lambda record, step: sent.append(step), finish=lambda: None)
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **kwargs: run))
  monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, PEAKS['NVIDIA H200'])
  config.update_from_flattened_dict({
    'statistics_every': 2, 'ema_decay': 0.5, 'keep_best': True, 'keep_checkpoints': 1,
    'checkpoint_every': 2, 'eval_every': 2, 'profile.start': 2, 'profile.steps': 1,
    'compile_cache': str(tmp_path / 'cache'), 'wandb': 'project', 'model.pattern': (layer,),
    'optimizer.name': optimizer, 'optimizer.schedule': 'wsd',
    'max_spike': 10.0, 'data.batch_size': 16, 'accumulate': None, 'device_tokens': 16,
  })  # fmt: skip
  outcome = train_and_evaluate(config, tmp_path / 'run')
  assert list((tmp_path / 'cache').iterdir())
  found = read(tmp_path / 'run' / 'metrics.jsonl')
  assert told <= set(found[1])
  assert not told & set(found[0])
  assert sent == list(range(1, 7))
  assert 0 < found[-1]['train/goodput'] < 1
  assert 0 < found[-1]['train/mfu'] < 1
  assert found[-1]['train/productive_seconds'] > found[1]['train/productive_seconds'] > 0
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  losses = {r['step']: r['eval/loss'] for r in found if 'eval/loss' in r}
  best = min(losses, key=losses.get)
  kept = sorted(int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir())
  assert kept == sorted({best, 6})
  assert outcome.state.ema is not None
  step, evaluation = evaluate_run(tmp_path / 'run')
  assert step == 6
  assert evaluation.loss == pytest.approx(outcome.evaluation.loss, rel=1e-5)


def test_goodput_forgets_steps_that_were_lost(tmp_path):
  for start, steps in ((0, range(1, 7)), (3, range(4, 5))):
    with MetricsWriter(tmp_path, start) as metrics:
      kept = metrics.productive_seconds
      for step in steps:
        metrics.write(step, {'train/productive_seconds': 10.0 * step})
  assert kept == 30.0


def test_what_goes_wrong_at_wandb_does_not_end_the_run(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace())
  with MetricsWriter(tmp_path, 0, 'project') as metrics:
    metrics.write(1, {'train/loss': 1.0})
  assert json.loads((tmp_path / 'metrics.jsonl').read_text())['train/loss'] == 1.0
  assert 'no more is sent to Weights & Biases: AttributeError' in capsys.readouterr().err


def test_overhead_of_the_loop_is_measured(config, monkeypatch):
  config.log_every = 5
  slow = 0.1  # Seconds, much longer than a step; in the loop alone.
  check = Checkpoints.check
  monkeypatch.setattr(Checkpoints, 'check', lambda self: time.sleep(slow) or check(self))
  found = measure_overhead(config, steps=12)
  assert len(found.loop) == len(found.bare) == 2
  assert min(found.loop) > slow > min(found.bare) > 0
  assert found.part == pytest.approx(sum(found.parts) / 2)
  assert 'medians of 2 rounds' in str(found)
