"""Times the PyTorch peers: fla's kernels, one state, and two passes of them for two states.

Runs as a process of its own: `python peers.py PROBLEMS.json` prints a JSON object a problem, as
they come. Needs torch and flash-linear-attention. On Hopper with Triton 3.4 to 3.7.0 fla refuses
its gated backward because it computes wrong gradients there (its issue 640); the check is switched
off, so that time can be compared: there its backward is a time and no more.

Timing: CUDA events around back-to-back calls, and around replays of a CUDA graph of them; the
shorter is reported with its name, since a graph leaves the host's part out, as the loop of the JAX
side does.
"""

import json
import os
import statistics
import sys

os.environ.setdefault('FLA_DISABLE_BACKEND_DISPATCH', '1')  # its Triton kernels, no others

import torch
import torch.nn.functional as F

CALLS = 10  # in a sample
SAMPLES = 7


def load():
  """fla's functions, with its check of the Triton version switched off."""
  from fla.ops.common import chunk_o

  chunk_o.TRITON_ABOVE_3_7_1 = True
  from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
  from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

  def gdn(q, k, v, g, beta, gamma):
    return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, scale=1.0)[0]

  def simple_gla(q, k, v, g, beta, gamma):
    return chunk_simple_gla(q, k, v * beta[..., None], g=g, scale=1.0)[0]

  def two_passes(base):
    # The residual is taken as free, so this is a lower bound of what two passes cost.
    def run(q, k, v, g, beta, gamma):
      o = base(q, k, v, g, beta, gamma)
      r = (v - o).clamp(-1, 1)
      return o + gamma[..., None] * base(q, k, r, g, gamma, beta)

    return run

  def gdn_step(q, k, v, g, beta, state):
    return fused_recurrent_gated_delta_rule(
      q, k, v, g=g, beta=beta, scale=1.0, initial_state=state, output_final_state=True
    )

  def simple_gla_step(q, k, v, g, beta, state):
    return fused_recurrent_simple_gla(
      q, k, v * beta[..., None], g=g, scale=1.0, initial_state=state, output_final_state=True
    )

  operators = {
    'gdn': gdn, 'simple_gla': simple_gla, 'rdn': two_passes(gdn), 'rla': two_passes(simple_gla)
  }  # fmt: skip
  return operators, {'gdn': gdn_step, 'simple_gla': simple_gla_step}


def make_inputs(problem):
  """The distribution of the JAX side."""
  shape = (problem['batch'], problem['length'], problem['heads'], problem['size'])
  dtype = getattr(torch, problem['dtype'])
  generator = torch.Generator('cuda').manual_seed(0)

  def normal(*shape):
    return torch.randn(*shape, device='cuda', generator=generator)

  q, k = (F.normalize(normal(*shape), dim=-1).to(dtype) for _ in range(2))
  v = normal(*shape).to(dtype)
  g = F.logsigmoid(normal(*shape[:3]) + 4)
  beta, gamma = (torch.rand(shape[:3], device='cuda', generator=generator).to(dtype) for _ in '12')
  return [x.requires_grad_() for x in (q, k, v, g, beta, gamma)]


def by_events(run):
  """Milliseconds of one call."""
  samples = []
  for _ in range(SAMPLES):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in '12')
    start.record()
    for _ in range(CALLS):
      run()
    end.record()
    torch.cuda.synchronize()
    samples.append(start.elapsed_time(end) / CALLS)
  return statistics.median(samples)


def time_it(run):
  """Milliseconds, the method that gave them, and peak bytes."""
  for _ in range(3):
    run()
  torch.cuda.synchronize()
  torch.cuda.reset_peak_memory_stats()
  run()
  torch.cuda.synchronize()
  peak = torch.cuda.max_memory_allocated()
  milliseconds, method = by_events(run), 'events'
  try:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
      run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
      run()
    graph.replay()
    by_graph = by_events(graph.replay)
    if by_graph < milliseconds:
      milliseconds, method = by_graph, 'graph'
  except RuntimeError as error:  # a launch that cannot be captured: the events' time stands
    method = f'events ({str(error).splitlines()[0][:60]})'
  return milliseconds, method, peak


def build(problem, operators, steps):
  """A function without arguments that runs the problem once, or None where fla has none."""
  inputs = make_inputs(problem)
  if problem['direction'] == 'decode':
    if problem['operation'] not in steps:
      return None
    step = steps[problem['operation']]
    size = problem['size']
    state = torch.randn(problem['batch'], problem['heads'], size, size, device='cuda')
    return torch.no_grad()(lambda: step(*inputs[:5], state))
  if problem['operation'] not in operators:
    return None
  operator = operators[problem['operation']]
  if problem['direction'] == 'forward':
    return torch.no_grad()(lambda: operator(*inputs))
  do = torch.randn_like(inputs[2])
  used = inputs if problem['operation'] in ('rdn', 'rla') else inputs[:5]

  def both():
    return torch.autograd.grad(operator(*inputs), used, do)

  return both


def main(problems_path):
  """Times every problem of the file and prints a row for each."""
  from tqdm import tqdm

  operators, steps = load()
  with open(problems_path) as file:
    problems = json.load(file)
  for problem in tqdm(problems, desc='fla'):
    run = build(problem, operators, steps)
    if run is None:
      continue
    try:
      milliseconds, method, peak = time_it(run)
    except torch.cuda.OutOfMemoryError:
      print(f'fla {problem}: not run: out of memory', flush=True)
      continue
    row = {**problem, 'milliseconds': milliseconds, 'method': method, 'peak_bytes': peak}
    print(json.dumps(row), flush=True)
    del run
    torch.cuda.empty_cache()


if __name__ == '__main__':
  main(*sys.argv[1:])
