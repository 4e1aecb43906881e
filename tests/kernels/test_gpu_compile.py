"""The Triton kernels as they are compiled for A100 and H100/H200, without a card: nothing spills.

K = V = 128, bfloat16, the heuristic's choice for 256 heads of 2048 tokens, that of `pair` for 64 of
8192; 'short' for 64 of 512, where RDN's walk takes half the tile; 'alone' for as many of 8192 as
leave a program a multiprocessor. And what was tuned.
"""

import itertools

import jax.numpy as jnp
import pytest

pytest.importorskip('triton')

import triton

from rla_jax.kernels.residual.gpu import blocks, selftest
from rla_jax.kernels.residual.gpu.apart import base_part_kernel, residual_part_kernel
from rla_jax.kernels.residual.gpu.forward import forward_kernel
from rla_jax.kernels.residual.gpu.handover import HANDED_AT_A_TIME
from rla_jax.kernels.residual.gpu.keys import keys_kernel
from rla_jax.kernels.residual.gpu.pair import pair_kernel
from rla_jax.kernels.residual.gpu.parts import COMBINE
from rla_jax.kernels.residual.gpu.prepare import matrices, prepare_kernel
from rla_jax.kernels.residual.gpu.queries import queries_kernel
from rla_jax.kernels.residual.gpu.split import combine_kernel, transitions_kernel
from rla_jax.kernels.residual.gpu.sweep import sweep_kernel
from tests.kernels import triton_harness as harness

# By the first word of what is built: 'forward, saving, split'.
KERNELS = {
  'prepare': prepare_kernel,
  'forward': forward_kernel,
  'pair': pair_kernel,
  'base part': base_part_kernel,
  'residual part': residual_part_kernel,
  'sweep': sweep_kernel,
  'queries': queries_kernel,
  'keys': keys_kernel,
  'transitions': transitions_kernel,
  'combine': combine_kernel,
}
# Cards before Hopper share block sizes: what is built for sm_80 is to fit sm_86 and sm_89 too.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
FLOAT32 = (
  'log_decay_ptr', 'beta_ptr', 'gamma_ptr', 'gates_ptr', 'base_ptr', 'residual_ptr',
  'base_out_ptr', 'residual_out_ptr', 'dstate_in_ptr', 'dstate_ptr', 'dlog_decay_ptr',
  'dbeta_ptr', 'dgamma_ptr', 'dlog_decay_before_ptr', 'dbeta_before_ptr', 'dgamma_before_ptr',
  'edge_ptr', 'ends_ptr', 'transitions_ptr',
)  # fmt: skip
SCALARS = ('T', 'chunks', 'first_chunk')


def compiled(name, capability, delta, residual, chosen=None, size=128) -> harness.Compiled:
  """The compiler's report of a kernel, in the default configuration unless another is given."""
  word, *variants = name.split(', ')
  kernel = KERNELS[word]
  heads, length = (64, 512) if 'short' in variants else (256, 2048)
  if word == 'pair':
    heads, length = 64, 8192
  if 'alone' in variants:
    heads, length = 64 * 128 // size, 8192
  chosen = chosen or blocks.heuristic(
    delta=delta, residual=residual, key_dim=size, value_dim=size, dtype=jnp.bfloat16, heads=heads,
    length=length, hopper=capability >= 90,
  )  # fmt: skip
  split_launches = {
    'transitions': chosen.sweep, 'combine': COMBINE, 'base part': chosen.pair,
    'residual part': chosen.pair,
  }  # fmt: skip
  launch = split_launches.get(word) or getattr(chosen, word)
  is_split = 'split' in variants or (word in split_launches and 'whole' not in variants)
  constexprs = {
    'H': 16, 'G': 16, 'K': size, 'V': size, 'BLOCK_K': size, 'BLOCK_V': launch.value,
    'C': chosen.chunk * (chosen.span if name in ('queries', 'keys') else 1), 'SPAN': chosen.span,
    'SPLIT': 8 if is_split else 1,
    'STATES': 1 + residual, 'STATE': 0,
    'DELTA': delta, 'RESIDUAL': residual, 'CLIP': 1.0, 'SAVE': 'saving' in variants, 'EVEN': True,
    'OUTPUT': 'ends' not in variants, 'STORE': 'ends' not in variants,
    'BITS_LAST': chosen.bits_last, 'LOOPED': chosen.looped and launch.warps > 4,
    'SEGMENTED': False, 'ADJOINT': False, 'PRECISION': 'tf32', 'SOLVE': 'parts',
    'STAGES': launch.stages, 'MATRICES': matrices(delta=delta, residual=residual),
    'IS_RESIDUAL': 'residual' in variants, 'HANDED': HANDED_AT_A_TIME,
  }  # fmt: skip
  kinds = dict.fromkeys(('segments_ptr', 'passes_ptr', 'zeros_ptr', 'flags_ptr'), '*i32')
  kinds['residuals_ptr'] = '*fp16'
  kinds |= dict.fromkeys(FLOAT32, '*fp32') | dict.fromkeys(SCALARS, 'i32')
  if word == 'combine':
    kinds['states_ptr'] = '*fp32'
  names = [p.name for p in kernel.params if not p.is_constexpr]
  used = {p.name for p in kernel.params if p.is_constexpr}
  return harness.compile_kernel(
    kernel,
    [kinds.get(n, '*bf16') for n in names],
    {n: x for n, x in constexprs.items() if n in used},
    capability=capability,
    num_warps=launch.warps,
    num_stages=launch.stages,
  )


RULES = {
  'delta residual': (True, True),
  'additive residual': (False, True),
  'delta': (True, False),
  'additive': (False, False),
}
VERSION = tuple(int(part) for part in triton.__version__.split('.')[:2])
OLDER = pytest.mark.xfail(
  VERSION < (3, 9), strict=True, reason='Triton 3.6 leaves up to 20 bytes of spills'
)
WALKS = ('forward', 'forward, saving', 'sweep')
BUILDS = [
  *itertools.product((80, 90), ('prepare', *WALKS, 'queries', 'keys'), RULES),
  *itertools.product((80, 90), ('sweep, residual',), ('delta residual', 'additive residual')),
  *itertools.product(
    (80, 90), ('forward, ends, split', 'forward, saving, split'), ('additive residual', 'delta')
  ),
  *itertools.product((80, 90), ('transitions', 'combine'), ('delta residual', 'delta')),
  *itertools.product(
    (80,), ('forward, ends, split', 'forward, saving, split'), ('delta residual',)
  ),
  *itertools.product(
    (90,),
    (
      'pair', 'pair, saving', 'base part', 'base part, saving', 'residual part',
      'residual part, saving', 'residual part, ends', 'forward, short', 'forward, saving, short',
    ),
    ('delta residual',),
  ),
]
TIGHT = [(90, 'forward, saving', 'delta residual'), (90, 'pair, saving', 'delta residual')]


@pytest.mark.parametrize(('capability', 'name', 'rule'), BUILDS)
def test_fits_the_card(capability, name, rule):
  """Builds, fits shared memory, and uses the tensor cores' own instructions on Hopper."""
  report = compiled(name, capability, *RULES[rule])
  assert report.shared_bytes <= SHARED_LIMIT[capability]
  if capability == 90 and name not in ('prepare', 'combine'):
    # Half a tile is too narrow for them, and yet faster: it was measured.
    assert report.uses_wgmma == ('short' not in name)


@pytest.mark.parametrize(
  ('capability', 'name', 'rule'),
  [pytest.param(*x, marks=OLDER if x in TIGHT else ()) for x in BUILDS],
)
def test_no_register_spills(capability, name, rule):
  report = compiled(name, capability, *RULES[rule])
  assert report.spill_bytes == 0, report.log


@pytest.mark.parametrize('rule', ['delta residual', 'additive residual'])
@pytest.mark.parametrize('name', ['base part', 'residual part', 'pair'])
def test_large_heads_keep_a_state_in_registers(name, rule):
  """Of 256 keys and values; a program with both states would spill 2 KiB."""
  # Of a Hopper pairs spill more with chunks of 32 than of 16, and are faster: it was measured.
  # Triton 3.6 spills more than 3.9 before Hopper.
  bounds = {80: 440 if VERSION < (3, 9) else 360, 90: 760 if name == 'pair' else 310}
  shapes = ('',) if name == 'pair' else ('', ', whole')
  variants = itertools.product(bounds, ('', ', saving'), shapes)
  for capability, saving, shape in variants:
    report = compiled(name + saving + shape, capability, *RULES[rule], size=256)
    assert report.spill_bytes <= bounds[capability], report.log
    # Of a Hopper two programs are to have a multiprocessor.
    assert report.shared_bytes <= SHARED_LIMIT[capability] // (1 + (capability == 90))


@pytest.mark.parametrize('rule', RULES)
def test_large_heads_fit_the_card(rule):
  """Of 256 keys and values, on a Hopper; `queries` has its 64 tokens in registers."""
  names = ['prepare', 'sweep', 'sweep, alone', 'queries', 'keys']
  if 'residual' in rule:
    names += ['sweep, residual', 'sweep, residual, alone']
  else:
    names += ['forward', 'forward, saving', 'forward, alone', 'forward, saving, alone']
  if 'delta' in rule:
    names += ['transitions', 'combine']
  bounds = {'queries': 0, 'transitions': 0, 'combine': 0, 'keys': 310}
  for name in names:
    report = compiled(name, 90, *RULES[rule], size=256)
    assert report.shared_bytes <= SHARED_LIMIT[90], name
    assert report.uses_wgmma == (name not in ('prepare', 'combine')), name
    assert report.spill_bytes <= bounds.get(name, 220), (name, report.log)


@pytest.mark.parametrize(
  ('rule', 'size'),
  [
    pytest.param(*x, marks=() if x == ('additive residual', 256) else pytest.mark.slow)
    for x in itertools.product(RULES, (128, 256))
  ],
)
def test_chunks_of_64_fit_the_card(rule, size):
  """Which a caller may ask for: not fast, but they run."""
  delta, residual = RULES[rule]
  chosen = blocks.heuristic(
    delta=delta, residual=residual, key_dim=size, value_dim=size, dtype=jnp.bfloat16,
    heads=64 * 128 // size, length=8192,
  )  # fmt: skip
  chosen = blocks.with_chunk(chosen, 64, 1)
  names = ['prepare', 'sweep', 'queries', 'keys']
  names += ['sweep, residual'] * residual
  names += ['pair', 'pair, saving'] if chosen.pair else ['forward', 'forward, saving']
  for name in names:
    report = compiled(name, 90, delta, residual, chosen, size)
    assert report.shared_bytes <= SHARED_LIMIT[90], name


@pytest.mark.skipif(VERSION < (3, 9), reason="Triton 3.6 spills in the heuristic's, too")
def test_no_register_spills_in_what_was_tuned():
  """Of heads of 128 in bfloat16, on a Hopper."""
  cases = [c for c in selftest.tuned_cases('NVIDIA H200') if c.key_dim == c.value_dim == 128]
  assert cases
  for case in cases:
    walks = {'both': ['forward'], 'pair': ['pair'], 'apart': ['base part', 'residual part']}
    split = ', split' if case.blocks.split else ''
    names = ['prepare', 'queries', 'keys', f'sweep{split}']
    names += [f'sweep, residual{split}'] * case.residual
    for walk in walks[case.blocks.walk]:
      names += [f'{walk}{split}', f'{walk}, saving{split}']
    if split:
      names += ['forward, ends, split', 'sweep, ends, split', 'combine']
      names += ['transitions'] * case.delta
    for name in names:
      report = compiled(name, 90, case.delta, case.residual, case.blocks)
      assert report.spill_bytes == 0, (str(case), name, report.log)


def test_pairs_hand_over_in_order():
  """A release and an acquire, and no loads that may see what was in memory before."""
  ptx = compiled('pair', 90, delta=True, residual=True).ptx
  assert '.release.' in ptx and '.acquire.' in ptx
  assert 'ld.global.nc' not in ptx
